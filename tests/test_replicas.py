"""Training on several devices computes what one device does: virtual CPUs, and two processes."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

from mess_tf import configs, train
from mess_tf.configs import Config, DataConfig, StageConfig
from mess_tf.data.pipelines import training_batches
from mess_tf.data.sources import open_split
from mess_tf.data.synthetic import SYNTHETIC_CLASSES
from mess_tf.files import best_weights
from mess_tf.learning.logs import Log
from mess_tf.learning.stage import check_start
from mess_tf.learning.steps import make_optimizer, update
from mess_tf.network.evaluation import confusion_matrices, keras_predictor
from mess_tf.network.layers import BatchNormalization
from mess_tf.network.model import load_network
from mess_tf.network.replicas import on_replicas, open_strategy

# Stage 1: 20 steps, checkpoints at 8, 16 and 20. Stage 2: 2 steps. The images to evaluate do not come out even on two replicas.
OVERRIDES = (
    *("data.input_size=[32, 64]", "data.synthetic_train=16", "data.synthetic_val=3"),
    *("backbone.name=keras_file", 'exits.layers=["tap"]', "exits.plain_head=fcn-r2-b0", 'exits.heads=["fcn-r4-b0"]'),
    *("stage1.epochs=5", "stage1.batch_size=4", "stage1.checkpoint_steps=8", "stage1.eval_epochs=5", "stage1.weight_decay=0.0001"),
    *("stage1.exits=all", "stage1.distillation=filtered"),
    *("stage2.epochs=1", "stage2.batch_size=8", "stage2.eval_epochs=1"),
)
SIZE = (32, 64)
KILLED_AT = 10
# oneDNN sums a batch and its halves in other orders: 3e-7 apart after 12 steps, 3e-4 after 20. A jump, as where a pixel's answer is right
# in one run alone, which filtered distillation gives another loss. Eigen's sums are closer. A process reads this as it imports TensorFlow.
EIGEN = {"TF_ENABLE_ONEDNN_OPTS": "0"}


def make_model() -> keras.Model:
    """With batch normalisation of both kinds, as in networks that others wrote."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    image = keras.Input((None, None, 3), name="image")
    x = layers.Rescaling(1 / 127.5, -1.0)(image)
    for channels, strides, norm in ((8, 2, BatchNormalization), (16, 2, layers.BatchNormalization), (16, 1, BatchNormalization)):
        x = norm(momentum=0.9)(layers.Conv2D(channels, 3, strides, padding="same", use_bias=False)(x))
        x = layers.ReLU(name="tap" if norm is layers.BatchNormalization else None)(x)
    return keras.Model(image, layers.Conv2D(len(SYNTHETIC_CLASSES), 1, dtype="float32")(x))


def config_of(folder: Path) -> Config:
    return configs.apply_overrides(Config(), [*OVERRIDES, f"backbone.weights={folder / 'model.keras'}"])


def evaluate(folder: Path, name: str) -> None:
    """What the network of the run on replicas finds in the images, on as many devices as there are."""
    config = config_of(folder)
    network = load_network(folder / "mirrored", config, len(SYNTHETIC_CLASSES))
    found = confusion_matrices(keras_predictor(network, network.candidates, SIZE), open_split(config.data, "val"))
    np.savez(folder / name, **found)


def two_replicas(folder: Path) -> None:
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration() for _ in range(2)]
    )
    with open_strategy("mirrored").scope():
        assert tf.distribute.get_strategy().num_replicas_in_sync == 2
        check_refusals()
        check_loss_scaling()
        write = Log.write

        def write_and_copy(log, step, **fields):
            write(log, step, **fields)
            if step == KILLED_AT:
                shutil.copytree(folder / "mirrored", folder / "killed")

        Log.write = write_and_copy
        train.train(config_of(folder), str(folder / "mirrored"))
        evaluate(folder, "of_two.npz")


def one_device(folder: Path) -> None:
    train.train(config_of(folder), str(folder / "none"))
    train.train(config_of(folder), str(folder / "killed"), "stage1")
    evaluate(folder, "of_one.npz")
    with pytest.raises(ValueError, match=r"^--strategy: must be none or mirrored on a machine without a TPU, got 'tpu'"):
        open_strategy("tpu")


def check_refusals() -> None:
    for values, message in (
        ({"batch_size": 3}, r"^stage1\.batch_size: must be a multiple of 2, one part for each replica, got 3"),
        ({"jit_compile": True}, r"^stage1\.jit_compile: must be false on 2 replicas, got True"),
    ):
        with pytest.raises(ValueError, match=message):
            check_start("stage1", StageConfig(**values), None, None, "")


def check_loss_scaling() -> None:
    """A step is left out if its gradients are not finite on any replica."""
    strategy, weight = tf.distribute.get_strategy(), keras.Variable(np.ones(2, np.float32))
    optimizer = make_optimizer(StageConfig(precision="mixed_float16", momentum=0.0), [weight])
    optimizer.learning_rate.assign(0.5)
    step = on_replicas(lambda x: update(optimizer, {"loss": tf.reduce_sum(x * weight.value)}, [weight]))

    def on(*values: float) -> tuple[np.ndarray, float]:
        step(strategy.experimental_distribute_values_from_function(lambda context: tf.constant(values[context.replica_id_in_sync_group])))
        return weight.numpy(), float(optimizer.dynamic_scale.numpy())

    first = on(0.5, 0.25)
    np.testing.assert_allclose(first[0], 1 - 0.5 * 0.75)
    for values in ((1.0, np.inf), (np.nan, 1.0)):
        before, after = first, on(*values)
        np.testing.assert_array_equal(after[0], before[0])
        assert after[1] == before[1] / 2
        first = after
    for copy in weight.value.values:
        np.testing.assert_array_equal(copy.numpy(), weight.numpy())


def target(function: Callable[[Path], None], folder: Path) -> None:
    descriptor = os.open(folder / f"{function.__name__}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        function(folder)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        print("CPU", time.process_time(), flush=True)


def run(function: Callable[[Path], None], folder: Path) -> tuple[int, str]:
    """In a process of its own, since a process has its virtual devices for good."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=(function, folder))
    with mock.patch.dict(os.environ, EIGEN):
        process.start()
    process.join()
    return process.exitcode, (folder / f"{function.__name__}.txt").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Work folders of trainings on two replicas, what a kill there would have left ended on one device, and on one device."""
    folder = tmp_path_factory.mktemp("replicas")
    make_model().save(folder / "model.keras")
    for function in (two_replicas, one_device):
        code, output = run(function, folder)
        assert code == 0, output
    assert "stage1: resumed at step 8 of 20" in output
    return folder


def checkpoint(workdir: Path, stage: str) -> dict[str, np.ndarray]:
    reader = tf.train.load_checkpoint(str(workdir / "checkpoints" / stage))
    return {name: reader.get_tensor(name) for name, kind in reader.get_variable_to_dtype_map().items() if kind.is_floating}


def rows(workdir: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (workdir / "logs" / stage / "metrics.jsonl").read_text().splitlines()]


def assert_same(workdir: Path, other: Path, *stages: str) -> None:
    """Weights and state of the optimizer after the last step, and the losses on the way."""
    for stage in stages:
        found, expected = checkpoint(workdir, stage), checkpoint(other, stage)
        assert found.keys() == expected.keys() and any("moving_variance" in name for name in [*np.load(best_weights(workdir, stage))])
        for name, array in expected.items():
            if not name.startswith("best/"):
                np.testing.assert_allclose(found[name], array, atol=1e-5, err_msg=name)
        curves = [[(row["step"], row["loss"]) for row in rows(each, stage) if "loss" in row] for each in (workdir, other)]
        assert len(curves[0]) == len(curves[1]) >= (4 if stage == "stage1" else 1)
        for (step, losses), (other_step, other_losses) in zip(*curves, strict=True):
            assert step == other_step and losses == pytest.approx(other_losses, abs=1e-5)


@pytest.mark.full
def test_two_replicas_train_as_one_does(folder):
    assert_same(folder / "mirrored", folder / "none", "stage1", "stage2")


@pytest.mark.full
def test_a_run_killed_on_two_replicas_ends_on_one_as_an_unbroken_one(folder):
    assert_same(folder / "killed", folder / "none", "stage1")


@pytest.mark.full
def test_two_replicas_find_what_one_does_in_images(folder):
    one, two = (dict(np.load(folder / f"of_{count}.npz")) for count in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 2
    for name, matrix in one.items():
        np.testing.assert_array_equal(two[name], matrix, name)


@pytest.mark.full
def test_two_processes_train_as_one_does(folder):
    """Each reads its own half of every batch, and the first one alone writes the work folder."""
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("localhost", 0))
        cluster = {"worker": [f"localhost:{each.getsockname()[1]}" for each in (one, two)]}
    workdir, words = folder / "processes", [f"--set={override}" for override in (*OVERRIDES, f"backbone.weights={folder / 'model.keras'}")]
    processes = []
    for index in range(2):
        output = folder / f"worker{index}.txt"
        environment = {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}), **EIGEN}
        given = (sys.executable, "-m", "mess_tf.train", f"--workdir={workdir}", "--strategy=multi_worker", "--stages=stage1", *words)
        with output.open("w") as file:
            processes.append(subprocess.Popen(given, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment))
    try:
        for index, process in enumerate(processes):
            assert process.wait(600) == 0, (folder / f"worker{index}.txt").read_text()
    finally:
        for process in processes:
            process.kill()
    assert_same(workdir, folder / "none", "stage1")
    found, expected = ({path.name for path in each.glob("[!.]*")} for each in (workdir, folder / "none"))
    assert found == expected | {"config.json", "training.json"}


def test_what_there_is_no_device_for_is_refused(monkeypatch, tmp_path):
    two = '{"cluster":{"worker":["localhost:1","localhost:2"]},"task":{"type":"worker","index":%s}}'
    others = [two % index for index in ("2", "-1", '"x"', "true")] + [(two % 0).replace(":2", ""), (two % 0).replace(',"index":0', "")]
    others += ['{"cluster":{"worker":["localhost:1"]},"task":{"type":"worker","index":0}}']
    others += ['{"cluster":{"worker":"localhost:1"},"task":{"type":"worker","index":0}}']
    for text in ("", "{}", "[1]", *others):
        monkeypatch.setenv("TF_CONFIG", text)
        with pytest.raises(ValueError, match=r'^TF_CONFIG: must be \{"cluster":\{"worker":\["HOST:PORT",\.\.\.\]\}.*, got '):
            open_strategy("multi_worker")
    with pytest.raises(ValueError, match=r"^--strategy: must be one of none, mirrored, multi_worker, tpu, got 'both'"):
        open_strategy("both")
    vendor = tmp_path / "0000:00:04.0" / "vendor"
    vendor.parent.mkdir()
    vendor.write_text("0x8086\n")
    monkeypatch.setattr(configs, "PCI", str(tmp_path))
    with pytest.raises(ValueError, match=r"^--strategy: must be none or mirrored on a machine without a TPU, got 'tpu'$"):
        configs.check_strategy("tpu")
    vendor.write_text("0x1ae0\n")
    configs.check_strategy("tpu")


def test_batches_of_processes_and_replicas_make_up_the_batch():
    config = DataConfig(input_size=SIZE, synthetic_train=6)
    examples = open_split(config, "train")
    whole = list(training_batches(examples, config, 4, 7, 1, 3).as_numpy_iterator())
    parts = [list(training_batches(examples, config, 4, 7, 1, 3, None, 4, (part, 2)).as_numpy_iterator()) for part in range(2)]
    assert [len(part) for part in parts] == [6, 6]
    for step, batch in enumerate(whole):
        each = [*parts[0][2 * step : 2 * step + 2], *parts[1][2 * step : 2 * step + 2]]
        for place in range(2):
            np.testing.assert_array_equal(np.concatenate([one[place] for one in each]), batch[place])
