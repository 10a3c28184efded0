"""Training: killed and started again, switched, frozen, and learning."""

import dataclasses
import json
import pickle
import re
import signal
import time
import zipfile
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import commands
import keras
import numpy as np
import pytest
import tensorflow as tf

from mess_tf import configs, tasks, train
from mess_tf.configs import BackboneConfig, Config, DataConfig, ExitsConfig, HeadSpec, StageConfig
from mess_tf.data.examples import Examples
from mess_tf.data.sources import open_split
from mess_tf.files import best_weights
from mess_tf.learning import parts, steps
from mess_tf.learning.losses import class_weights
from mess_tf.learning.stage import LOGIT_SHARES
from mess_tf.learning.steps import gradients, safe_convolutions, sampled_pixels
from mess_tf.metrics import class_counts, confusion_matrix, miou
from mess_tf.network.evaluation import Accuracy, accuracies, confusion_matrices, keras_predictor
from mess_tf.network.exits import REST_DETAIL
from mess_tf.network.layers import BatchNormalization
from mess_tf.network.model import FINAL, MultiExitNetwork, build_network, convert, load_network
from mess_tf.network.regions import ActiveSegment
from mess_tf.rescale import rescale

SIZE, CLASSES = (32, 64), 8
VAL_IMAGE_SIZE = (48, 96)  # images are brought to the input size
HEADS = ("decoder-r4-b0", "fcn-r2-b0")

# 4 steps an epoch. Stage 1: 20 steps, checkpoints at 8, 12, 16, 20. Stage 2: 16 steps, checkpoints at 6, 8, 12, 16.
OVERRIDES = (
    "data.input_size=[32, 64]",
    "data.synthetic_train=16",
    "data.synthetic_val=2",
    "backbone.name=keras_file",
    "exits.count=2",
    "exits.plain_head=fcn-r2-b0",
    'exits.heads=["decoder-r4-b0", "fcn-r8-b1-d2"]',
    *("stage1.epochs=5", "stage1.batch_size=4", "stage1.checkpoint_steps=8", "stage1.eval_epochs=3", "stage1.weight_decay=0.0001"),
    *("stage2.epochs=4", "stage2.batch_size=4", "stage2.checkpoint_steps=6", "stage2.eval_epochs=2", "stage2.group_size=1"),
)
STEPS = {"stage1": [8, 10, 12, 12, 16, 20, 20], "stage2": [6, 8, 8, 10, 12, 16, 16]}


@pytest.fixture(autouse=True)
def _float32():
    yield
    keras.mixed_precision.set_global_policy("float32")


def make_model(seed: int = 0, blocks: int = 4) -> keras.Model:
    """A segmentation network of so many residual blocks, with four of them of stride 8."""
    keras.utils.set_random_seed(seed)
    image = keras.Input((None, None, 3), name="image")
    x = keras.layers.Rescaling(1 / 127.5, -1.0)(image)
    for channels, strides in ((8, 2), (16, 2), (24, 2), (24, 1))[:blocks]:
        x = keras.layers.Conv2D(channels, 3, strides, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU()(BatchNormalization(momentum=0.9)(x))
        y = keras.layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        x = keras.layers.Add()([x, BatchNormalization(momentum=0.9)(y)])
    return keras.Model(image, keras.layers.Conv2D(CLASSES, 1, dtype="float32")(x))


# ------------------------------------------------------------------------------------------------------ stopped and started again


def logged_steps(workdir: Path, stage: str) -> list[int]:
    path = workdir / "logs" / stage / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def last_checkpoint(workdir: Path, stage: str) -> int:
    return int(tf.train.latest_checkpoint(str(workdir / "checkpoints" / stage)).rsplit("-", 1)[1])


def start(workdir: Path) -> BaseProcess:
    """In a process of its own, as users do: the bits depend on what a process has built before, and threads could change them."""
    model = workdir.parent / "model.keras"
    if not model.exists():
        make_model(blocks=2).save(model)
    overrides = [f"--set={override}" for override in (*OVERRIDES, f"backbone.weights={model}")]
    return commands.start("mess_tf.train", f"--workdir={workdir}", *overrides, stdout=workdir / "output.txt", stderr=workdir / "output.txt")


@pytest.fixture
def unbroken_and_killed(tmp_path) -> tuple[Path, Path]:
    """Two runs of the same configuration side by side; the second is killed in each stage at step 10, after checkpoint 8."""
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    unbroken.mkdir()
    killed.mkdir()
    undisturbed = start(unbroken)
    for stage in STEPS:
        process = start(killed)
        while process.is_alive() and 10 not in logged_steps(killed, stage):
            time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (killed / "output.txt").read_text()
        assert 8 <= last_checkpoint(killed, stage) < STEPS[stage][-1]
    for workdir, process in ((killed, start(killed)), (unbroken, undisturbed)):
        process.join()
        assert process.exitcode == 0, (workdir / "output.txt").read_text()
    return unbroken, killed


@pytest.mark.slow
def test_a_killed_run_ends_as_an_unbroken_one(unbroken_and_killed):
    """One test, since the runs take long and two test workers would each make them: weights, optimizer, logs, and the frozen original."""
    unbroken, killed = unbroken_and_killed
    for stage in STEPS:
        for name, array in np.load(best_weights(str(unbroken), stage)).items():
            np.testing.assert_array_equal(np.load(best_weights(str(killed), stage))[name], array, name)
        expected, received = (tf.train.load_checkpoint(str(workdir / "checkpoints" / stage)) for workdir in unbroken_and_killed)
        names = [name for name, dtype in expected.get_variable_to_dtype_map().items() if dtype != tf.string]
        assert any("momentum" in name or "optimizer" in name for name in names)
        for name in names:
            np.testing.assert_array_equal(received.get_tensor(name), expected.get_tensor(name), name)
        assert logged_steps(killed, stage) == STEPS[stage]
        assert (killed / "logs" / stage / "metrics.jsonl").read_text() == (unbroken / "logs" / stage / "metrics.jsonl").read_text()

    before, after = (dict(np.load(best_weights(str(unbroken), stage))) for stage in STEPS)
    original = [name for name in before if name.startswith(FINAL)]
    assert sum("moving_variance" in name for name in original) == 4
    for name in original:
        np.testing.assert_array_equal(after[name], before[name], name)


def test_gradients_are_summed_two_at_a_time():
    variable = keras.Variable(np.ones(3, np.float32))

    @tf.function
    def step(x):
        return steps.gradients({"a": x * variable.value, "b": x * tf.exp(variable.value), "c": tf.sin(variable.value) * x}, [variable])

    train.fix_summation_order()
    graph = step.get_concrete_function(tf.ones(3)).graph
    assert [len(operation.inputs) for operation in graph.get_operations() if operation.type == "AddN"] == [2, 2]
    assert tf.config.optimizer.get_experimental_options()["arithmetic_optimization"] is False
    np.testing.assert_allclose(step(tf.ones(3))[0], 1 + np.exp(1) + np.cos(1), rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------- steps of a small network


def make_network(heads: tuple[str, ...] = ("fcn-r2-b0",), seed: int = 0) -> MultiExitNetwork:
    """A small network with exits 1 and 2."""
    network = convert(make_model(seed), 3, SIZE)
    network.add_heads([HeadSpec.parse(head) for head in heads], 0.9)
    return network


def weights_of(model: keras.Model) -> list[np.ndarray]:
    return [variable.numpy() for variable in model.weights]


def same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def make_batch(seed: int = 0) -> tuple[tf.Tensor, tf.Tensor]:
    rng = np.random.default_rng(seed)
    images, labels = rng.uniform(0, 255, (2, *SIZE, 3)), rng.integers(0, CLASSES, (2, *SIZE))
    labels[:, :4] = configs.IGNORE
    return tf.constant(images, tf.float32), tf.constant(labels, tf.uint8)


def make_step(network: MultiExitNetwork, stage: StageConfig) -> steps.Step:
    parts = list(network.heads.values()) + ([network.original] if stage.trains == "network" else [])
    optimizer = steps.make_optimizer(stage, [variable for part in parts for variable in part.trainable_variables])
    make = steps.network_step if stage.trains == "network" else steps.heads_step
    return make(network, stage, optimizer, SIZE, np.ones(CLASSES, np.float32))


@pytest.mark.parametrize(
    ("exits", "expected"),
    [
        ("none", {5: set(), 2: set()}),
        ("all", {5: {"exit1.fcn-r2-b0", "exit2.fcn-r2-b0"}, 2: {"exit1.fcn-r2-b0", "exit2.fcn-r2-b0"}}),
        ("round_robin", {5: {"exit2.fcn-r2-b0"}, 2: {"exit1.fcn-r2-b0"}}),
    ],
)
def test_stage1_updates_the_original_and_the_exits_of_the_schedule(exits, expected):
    network = make_network()
    step = make_step(network, StageConfig(exits=exits, weight_decay=0.1))
    for number, changing in expected.items():
        original, before = weights_of(network.original), {name: weights_of(head) for name, head in network.heads.items()}
        values = step(make_batch(), number)
        assert {name for name, head in network.heads.items() if not same(before[name], weights_of(head))} == changing
        assert set(values) == changing | {FINAL}
        assert not any(same([a], [b]) for a, b in zip(original, weights_of(network.original), strict=True) if b.ndim == 4)


def test_stage1_distils_from_the_final_exit_as_the_stage_says():
    def losses_of(**values) -> dict[str, float]:
        return {name: float(value) for name, value in make_step(make_network(), StageConfig(**values))(make_batch(), 0).items()}

    plain, distilled, mixed = losses_of(), losses_of(distillation="all", alpha=1.0), losses_of(distillation="all", alpha=0.25)
    early = "exit1.fcn-r2-b0"
    assert distilled[early] != pytest.approx(plain[early], rel=0.01)
    assert mixed[early] == pytest.approx(0.25 * distilled[early] + 0.75 * plain[early], rel=1e-5)
    assert plain[FINAL] == pytest.approx(distilled[FINAL], rel=1e-6)
    assert losses_of(distillation="filtered", alpha=1.0)[early] < distilled[early]  # a random teacher is wrong at most pixels


def test_stage1_with_regions_also_learns_from_the_cells_that_an_exit_is_not_sure_of():
    early = "exit1.fcn-r2-b0"
    behind = f"{FINAL} behind {early}"
    first = {}
    for regions in ("stale", "nearest"):
        network = make_network()
        step = make_step(network, StageConfig(regions=regions, region_cell=8, region_warmup=2))
        statistics = [variable for variable in network.original.non_trainable_variables if "moving" in variable.path]
        new = [variable.numpy() for variable in statistics]
        assert set(step(make_batch(), 0)) == {early, FINAL}
        warm = [variable.numpy() for variable in statistics]
        assert any((before != after).any() for before, after in zip(new, warm, strict=True))
        values = [step(make_batch(), number) for number in range(2, 12, 2)]
        for before, variable in zip(warm, statistics, strict=True):
            np.testing.assert_array_equal(before, variable)
        assert all(set(each) == {early, FINAL, behind} for each in values)
        first[regions] = float(values[0][behind])
        assert 0 < first[regions] < 20
        assert float(values[-1][behind]) < first[regions]  # one batch again and again
    assert first["stale"] != pytest.approx(first["nearest"], rel=1e-6)


def test_cells_are_drawn_among_those_that_an_exit_is_not_sure_of():
    segment = ActiveSegment(make_network(), ("exit1.fcn-r2-b0", FINAL), 1, SIZE, cell=1)
    rows, columns = segment.grid
    logits = np.zeros((1, *SIZE, CLASSES), np.float32)
    logits[:, :, SIZE[1] // 2 :, 0] = 20  # the right half is sure
    left = np.repeat([[i < columns // 2 for i in range(columns)]], rows, 0)
    np.testing.assert_array_equal(steps.drawn_cells(segment, tf.constant(logits), tf.constant([0.5, 0.999]))[0], left)
    few = steps.drawn_cells(segment, tf.constant(logits), tf.constant([0.5, 0.01]))[0].numpy()
    assert few.sum() == 1
    assert few[left].sum() == 1


def test_every_exit_learns_from_a_teacher():
    def losses_of(soft: list[tf.Tensor], **values) -> dict[str, float]:
        step = make_step(make_network(), StageConfig(exits="all", **values))
        return {name: float(value) for name, value in step((*make_batch(), *soft), 0).items()}

    uniform, labels = tf.zeros((2, SIZE[0] // 4, SIZE[1] // 4, CLASSES)), make_batch()[1]
    plain, taught = losses_of([]), losses_of([uniform], distillation="all", alpha=1.0, teacher="soft.npz")
    for name, value in taught.items():
        assert value != pytest.approx(plain[name], rel=0.01)
    mixed = losses_of([uniform], distillation="all", alpha=0.25, teacher="soft.npz")
    assert mixed[FINAL] == pytest.approx(0.25 * taught[FINAL] + 0.75 * plain[FINAL], rel=1e-5)
    # A teacher that is wrong everywhere teaches nothing if it is filtered.
    wrong = tf.one_hot(tf.cast(labels + 1, tf.int32) % CLASSES, CLASSES, on_value=9.0)
    assert losses_of([wrong], distillation="filtered", alpha=1.0, teacher="soft.npz") == dict.fromkeys(taught, 0.0)
    heads = [train_heads(("fcn-r2-b0",), steps=1, soft=soft, distillation="all", teacher="soft.npz")[0] for soft in ([uniform], [wrong])]
    assert largest_difference(*heads) > 1e-4


def train_heads(
    heads: tuple[str, ...], steps: int, teacher_factor: float = 1.0, soft: Sequence[tf.Tensor] = (), **values
) -> tuple[MultiExitNetwork, int]:
    """A network after some steps of stage 2, and how often the original ran."""
    network, runs = make_network(heads), tf.Variable(0)
    kernel = network.original.layers[-1].kernel
    kernel.assign(teacher_factor * kernel)
    features = network.features

    def counted_features(candidates):
        model = features(candidates)

        def call(images, training):
            runs.assign_add(1)
            return model(images, training=training)

        return call

    network.features = counted_features
    step = make_step(network, StageConfig(trains="heads", **values))
    for number in range(steps):
        step((*make_batch(number), *soft), number)
    return network, int(runs.numpy())


def largest_difference(first: MultiExitNetwork, second: MultiExitNetwork) -> float:
    pairs = [(a, b) for name in first.heads for a, b in zip(weights_of(first.heads[name]), weights_of(second.heads[name]), strict=True)]
    return max(float(np.abs(a - b).max()) for a, b in pairs)


@pytest.fixture(scope="module")
def heads_in_groups_of_three() -> tuple[MultiExitNetwork, int]:
    return train_heads(HEADS, steps=3, distillation="filtered", group_size=3)


def test_stage2_trains_every_head_and_nothing_else(heads_in_groups_of_three):
    untrained, network = make_network(HEADS), heads_in_groups_of_three[0]
    assert same(weights_of(network.original), weights_of(untrained.original))
    for name, head in network.heads.items():
        changed = [not np.array_equal(a, b) for a, b in zip(weights_of(head), weights_of(untrained.heads[name]), strict=True)]
        assert all(changed), name


def test_the_original_runs_once_per_batch_and_groups_do_not_change_the_result(heads_in_groups_of_three):
    network, runs = heads_in_groups_of_three
    one_by_one, runs_one_by_one = train_heads(HEADS, steps=3, distillation="filtered", group_size=1)
    assert runs == runs_one_by_one == 3
    assert largest_difference(network, one_by_one) == 0


def test_distillation_switches():
    heads = {kind: train_heads(("fcn-r2-b0",), steps=1, distillation=kind)[0] for kind in ("none", "all", "filtered")}
    for first, second in (("none", "all"), ("none", "filtered"), ("all", "filtered")):
        assert largest_difference(heads[first], heads[second]) > 1e-4
    other_teacher, _ = train_heads(("fcn-r2-b0",), steps=1, teacher_factor=-3.0, distillation="none")
    assert largest_difference(heads["none"], other_teacher) == 0


def test_learning_rate_schedule():
    stage = StageConfig(learning_rate=0.1, final_learning_rate=0.01, power=2.0)
    assert [steps.learning_rate(stage, step, 10) for step in (0, 5, 10)] == pytest.approx([0.1, 0.01 + 0.09 / 4, 0.01])


def test_weight_decay_leaves_biases_and_batch_normalisation_alone():
    network = make_network()
    variables = network.original.trainable_variables + network.heads["exit1.fcn-r2-b0"].trainable_variables
    before = [variable.numpy() + 1 for variable in variables]
    for variable, value in zip(variables, before, strict=True):
        variable.assign(value)
    steps.make_optimizer(StageConfig(learning_rate=0.5, weight_decay=0.1), variables).apply([tf.zeros_like(v.value) for v in variables])
    assert {variable.name for variable in variables} == {"kernel", "gamma", "beta", "bias"}
    for variable, value in zip(variables, before, strict=True):
        factor = 0.95 if variable.name == "kernel" else 1
        np.testing.assert_allclose(variable.numpy(), factor * value, rtol=1e-6, err_msg=variable.path)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_mixed_precision_learns(kind):
    keras.mixed_precision.set_global_policy(f"mixed_{kind}")
    network = make_network()
    step = make_step(network, StageConfig(exits="all", precision=f"mixed_{kind}", label_smoothing=0.1))
    computed = {layer.compute_dtype for layer in network.original.layers}
    values = [step(make_batch(), number) for number in range(12)]
    assert computed == {kind, "float32"} and all(variable.dtype == "float32" for variable in network.original.weights)
    for name in values[0]:
        assert values[0][name].dtype == tf.float32 and float(values[-1][name]) < float(values[0][name]) - 0.05


@pytest.mark.full
def test_compiled_steps_do_the_same():
    networks = [make_network() for _ in range(2)]
    for network, jit_compile in zip(networks, (False, True), strict=True):
        step = make_step(network, StageConfig(exits="none", jit_compile=jit_compile))
        for number in range(2):
            step(make_batch(number), number)
    for weight, other in zip(*(weights_of(network.original) for network in networks), strict=True):
        np.testing.assert_allclose(weight, other, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- a stage of a small network


def run_stage(workdir: Path, network: MultiExitNetwork, images: int = 16, **values) -> None:
    stage = StageConfig(batch_size=4, **values)
    config = Config(DataConfig(input_size=SIZE, synthetic_train=images, synthetic_val=4))
    train.train_stage("stage1", stage, network, config, open_split(config.data, "train"), validation(), str(workdir))


def validation() -> Examples:
    return open_split(DataConfig(input_size=VAL_IMAGE_SIZE, synthetic_val=4), "val")


def rows_of(workdir: Path, field: str) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "logs" / "stage1" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if field in row]


def test_a_short_run_learns_to_beat_the_best_constant_answer(tmp_path, capsys):
    network = make_network()
    run_stage(tmp_path, network, images=32, epochs=12, eval_epochs=12)
    losses = [row["loss"] for row in rows_of(tmp_path, "loss")]
    assert len(losses) == 10 and all(losses[-1][name] < 0.85 * losses[0][name] for name in losses[0])

    val = validation()
    result = accuracies(confusion_matrices(keras_predictor(network, network.candidates, SIZE), val))
    labels = np.stack([val.load(index)[1] for index in range(len(val))])
    constant = max(float(miou(*class_counts(confusion_matrix(labels, np.full_like(labels, c), CLASSES)))) for c in range(CLASSES))
    assert all(accuracy.miou > 2 * constant for accuracy in result.values())
    assert rows_of(tmp_path, "miou")[-1]["miou"] == pytest.approx({name: accuracy.miou for name, accuracy in result.items()})

    line, evaluation = capsys.readouterr().out.splitlines()[-2:]
    assert evaluation.startswith("stage1: step 96 val mIoU mean ")
    assert re.fullmatch(r"stage1 step 96/96 epoch 12\.00 lr 0\.\d{4} loss \d\.\d{4} \d+\.\d\d s/step eta 0\.0 min", line)


def test_the_best_evaluation_is_kept(tmp_path, monkeypatch):
    network = make_network()
    means, seen = [0.3, 0.6, 0.2], []

    def accuracies_to_order(matrices):
        seen.append(weights_of(network.original))
        return {name: Accuracy(means[len(seen) - 1], 0.0, ()) for name in matrices}

    monkeypatch.setattr("mess_tf.learning.stage.accuracies", accuracies_to_order)
    run_stage(tmp_path, network, exits="none", epochs=3, eval_epochs=1)
    assert [row["miou"] for row in rows_of(tmp_path, "miou")] == [{FINAL: mean} for mean in means]
    assert same(weights_of(network.original), seen[1]) and not same(seen[1], seen[2])
    network.load_weights(best_weights(str(tmp_path), "stage1"))
    assert same(weights_of(network.original), seen[1])


@pytest.mark.full
def test_class_weights_are_taken_back_as_far_as_validation_wants(tmp_path):
    network, path = make_network(), str(tmp_path / "given.npz")
    run_stage(tmp_path / "plain", network, images=32, exits="all", epochs=12, eval_epochs=12, class_weights="none")
    assert set(rows_of(tmp_path / "plain", "miou")[-1]["logit_share"].values()) == {0}

    config = DataConfig(input_size=SIZE, synthetic_train=16, synthetic_val=4)
    weights = class_weights(open_split(config, "train").class_pixels(), "sqrt_median_frequency")
    shift, val = np.log(np.where(weights > 0, weights, 1)), validation()
    for name in network.candidates:
        network.logit_bias(name).assign_add(2 * shift)
    network.save_weights(path)
    run_stage(tmp_path, network, exits="all", epochs=1, eval_epochs=1, initial=path, learning_rate=1e-12, final_learning_rate=1e-12)
    row = rows_of(tmp_path, "miou")[-1]
    assert 0 < max(row["logit_share"].values()) <= 1 and set(row["logit_share"]) == set(network.candidates)
    for name, taken in row["logit_share"].items():
        bias, reached = network.logit_bias(name), {}
        trained = bias.numpy() + taken * shift
        for share in LOGIT_SHARES:
            bias.assign(trained - share * shift)
            reached[share] = accuracies(confusion_matrices(keras_predictor(network, [name], SIZE), val))[name].miou
        assert row["miou"][name] == pytest.approx(reached[taken]) == pytest.approx(max(reached.values()))


def test_a_stage_starts_from_the_weights_that_it_is_given(tmp_path):
    given, path = make_network(seed=1), str(tmp_path / "given.npz")
    given.save_weights(path)
    network = make_network()
    assert not same(weights_of(network.original), weights_of(given.original))
    still = {"learning_rate": 1e-12, "final_learning_rate": 1e-12, "class_weights": "none"}  # class weights would move the last bias
    run_stage(tmp_path, network, epochs=1, eval_epochs=1, initial=path, **still)
    trained = [variable.numpy() for variable in network.original.trainable_variables]
    wanted = [variable.numpy() for variable in given.original.trainable_variables]
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(trained, wanted, strict=True))

    run_stage(tmp_path, network, epochs=2, eval_epochs=1, initial=str(tmp_path / "gone.npz"))  # it goes on from its checkpoint
    with pytest.raises(FileNotFoundError, match=r"stage1\.initial: must be an existing file, got '.*gone\.npz'"):
        run_stage(tmp_path / "other", make_network(), epochs=1, initial=str(tmp_path / "gone.npz"))


def test_stage_2_goes_on_from_rest_heads_of_another_run(tmp_path):
    overrides = ["exits.count=2", "exits.plain_head=rest", 'exits.heads=["rest"]', "exits.final_head=fcn-r1-b0", "stage1.epochs=0"]
    config = configs.apply_overrides(configs.RECIPES["smoke"], overrides)
    network, _ = train.prepare(config, str(tmp_path / "one"), "stage1")
    network.save_weights(str(tmp_path / "trained.npz"))
    assert any(layer.name.startswith(REST_DETAIL) for layer in network.heads["exit1.rest"].layers)
    train.prepare(configs.apply_overrides(config, [f"stage2.initial={tmp_path / 'trained.npz'}"]), str(tmp_path / "other"), "both")


@pytest.mark.parametrize(
    ("stage2", "heads", "message"),
    [
        ({"initial": "gone.npz"}, ("fcn-r2-b0",), r"stage2\.initial: must be an existing file, got 'gone\.npz'"),
        ({"teacher": "gone.npz", "distillation": "all"}, ("fcn-r2-b0",), r"teacher: must be an existing file, .* got 'gone\.npz'"),
        ({}, ("fcn-r2-b0", "rest"), "head: rest does not fit exit1"),
    ],
)
def test_what_stage_2_needs_is_checked_before_stage_1(tmp_path, monkeypatch, stage2, heads, message):
    monkeypatch.chdir(tmp_path)
    image = keras.Input((*SIZE, 3), name="image")
    x = keras.layers.Conv2D(8, 3, 2, "same", name="tap")(image)
    place = keras.layers.Dense(CLASSES)(keras.layers.Flatten()(x))  # its size is fixed
    logits = keras.layers.Conv2D(CLASSES, 1)(x) + keras.layers.Reshape((1, 1, CLASSES))(place)
    keras.Model(image, logits).save("own.keras")
    config = Config(
        DataConfig(input_size=SIZE, synthetic_train=8, synthetic_val=2),
        BackboneConfig(name="keras_file", weights="own.keras"),
        ExitsConfig(layers=("tap",), plain_head="fcn-r2-b0", heads=heads),
        stage2=StageConfig(trains="heads", **stage2),
    )
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        train.train(config, "run")
    assert not Path("run", "checkpoints").exists() and not Path("run", "logs").exists()


def test_a_stride_above_the_image_still_samples_a_pixel():
    for step in range(20):
        rows, columns = sampled_pixels(StageConfig(pixel_stride=200), (24, 32), step)
        assert rows.size >= 1 and columns.size >= 1 and rows.max() < 24 and columns.max() < 32


def test_weights_of_a_network_with_other_heads(tmp_path):
    given, path = make_network(heads=("fcn-r2-b0", "fcn-r8-b0"), seed=1), str(tmp_path / "given.npz")
    given.save_weights(path)
    network = make_network(heads=("fcn-r2-b0", "decoder-r4-b0", "rest"))
    fresh = weights_of(network.heads["exit2.decoder-r4-b0"])
    with pytest.raises(ValueError, match=r"given\.npz: does not fit this network; .*exit1\.decoder-r4-b0.*unknown.*exit1\.fcn-r8-b0"):
        network.load_weights(path)
    assert not same(weights_of(network.original), weights_of(given.original))
    network.load_weights(path, other_heads=True)
    assert same(weights_of(network.original), weights_of(given.original))
    assert same(weights_of(network.heads["exit2.fcn-r2-b0"]), weights_of(given.heads["exit2.fcn-r2-b0"]))
    assert same(weights_of(network.heads["exit2.decoder-r4-b0"]), fresh)
    of_rest = [layer for layer in network.heads["exit1.rest"].layers if layer.weights and not layer.name.startswith(REST_DETAIL)]
    assert of_rest and all(same(layer.get_weights(), network.original.get_layer(layer.name).get_weights()) for layer in of_rest)
    np.savez(tmp_path / "empty.npz")
    with pytest.raises(ValueError, match=r"empty\.npz: does not fit this network; .*final\.original"):
        network.load_weights(str(tmp_path / "empty.npz"), other_heads=True)


def test_a_loss_that_is_not_finite_names_the_steps_and_is_not_kept(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"stage1: the loss of \[.*final\.original.*\] is not finite in steps 1 to 4; lower stage1\."
    ):
        run_stage(tmp_path, make_network(), exits="all", learning_rate=1e38, epochs=2, checkpoint_steps=4)
    assert not list((tmp_path / "checkpoints" / "stage1").iterdir())


@pytest.mark.parametrize(("size", "kernel", "strides"), [((6, 9), 1, 2), ((5, 7), 1, (2, 3)), ((6, 8), 3, 2), ((6, 8), 1, 1)])
def test_gradients_of_strided_1x1_convolutions_pass_ones_without_strides(size, kernel, strides):
    layer = keras.layers.Conv2D(4, kernel, strides, "same", use_bias=False)
    x = tf.random.normal((2, *size, 3))
    weights = tf.random.normal(layer(x).shape)

    def slopes():
        loss = {"loss": tf.reduce_sum(layer(x) * weights)}
        return *tf.gradients(list(loss.values()), [x]), *gradients(loss, layer.trainable_variables)

    safe = tf.function(safe_convolutions(slopes), autograph=False).get_concrete_function()
    for ours, own in zip(safe(), tf.function(slopes, autograph=False)(), strict=True):
        np.testing.assert_allclose(ours, own, rtol=1e-4, atol=1e-4)
    backward = [op for op in safe.graph.get_operations() if op.type.startswith("Conv2DBackprop")]
    assert len(backward) == 4  # of either gradient, both ways
    assert all(max(op.get_attr("strides")) == (2 if kernel == 3 else 1) for op in backward)


# ------------------------------------------------------------------------------------------------------------- stage 2 in parts


def config_in_parts(folder: Path) -> Config:
    """Stage 2 of two groups, the head of an exit each, behind a stage 1 without steps."""
    model = folder / "model.keras"
    make_model().save(model)
    values = {"distillation": "filtered", "epochs": 2, "eval_epochs": 1, "batch_size": 4, "checkpoint_steps": 3, "group_size": 1}
    return Config(
        DataConfig(input_size=SIZE, synthetic_train=16, synthetic_val=2),
        BackboneConfig("keras_file", weights=str(model)),
        ExitsConfig(3, plain_head="fcn-r2-b0", heads=("decoder-r4-b0",)),
        StageConfig(epochs=0),
        StageConfig(trains="heads", class_weights="none", **values),
    )


def results(workdir: Path) -> tuple[dict[str, bytes], str]:
    """The best weights and the log of stage 2."""
    arrays = {name: array.tobytes() for name, array in np.load(best_weights(workdir, "stage2")).items()}
    return arrays, (workdir / "logs" / "stage2" / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def in_one_piece(tmp_path_factory) -> tuple[Config, tuple[dict[str, bytes], str]]:
    folder = tmp_path_factory.mktemp("whole")
    config = config_in_parts(folder)
    train.run(folder / "whole", config)
    return config, results(folder / "whole")


@pytest.mark.full
def test_heads_in_parts_become_those_in_one_piece(in_one_piece, tmp_path, monkeypatch):
    """One as in another process, the other one stopped on the way and gone on with here; what is finished is not done again."""
    config, expected = in_one_piece
    started, run_task, save = [], parts.train_part, tf.train.CheckpointManager.save

    def run_on_ray(todo, address):
        (first, second), do = todo, tasks._elsewhere
        assert address == "local" and first.on_gpu and second.on_gpu
        assert do(str(Path.cwd()), pickle.dumps((tasks._place(second.function), second.arguments))) is None
        yield
        monkeypatch.setattr(tf.train.CheckpointManager, "save", lambda *args, **kwargs: save(*args, **kwargs) and 1 // 0)
        tasks._here(first)

    monkeypatch.setattr(tasks, "_on_ray", run_on_ray)
    with pytest.raises(ZeroDivisionError):
        train.run(tmp_path, config, ray="local")
    monkeypatch.setattr(tf.train.CheckpointManager, "save", save)
    monkeypatch.setattr(parts, "train_part", lambda opened, name, *rest: started.append(name) or run_task(opened, name, *rest))
    assert not Path(best_weights(tmp_path, "stage2")).exists()
    train.run(tmp_path, config)
    assert started == ["stage2/0-1"]
    assert results(tmp_path) == expected
    train.run(tmp_path, config, ray="local")
    assert started == ["stage2/0-1"] and results(tmp_path) == expected


@pytest.mark.full
def test_what_was_begun_in_one_piece_stays_so(in_one_piece, tmp_path):
    config, _ = in_one_piece
    heads = ["exit1.decoder-r4-b0", "exit2.decoder-r4-b0"]
    assert parts.are_wanted("stage2", config.stage2, heads, tmp_path, "local")
    assert not parts.are_wanted("stage2", config.stage2, heads, tmp_path, "")
    assert not parts.are_wanted("stage2", config.stage2, heads[:1], tmp_path, "local")
    tf.train.CheckpointManager(tf.train.Checkpoint(step=tf.Variable(6)), tmp_path / "checkpoints" / "stage2", 1).save()
    assert not parts.are_wanted("stage2", config.stage2, heads, tmp_path, "local")


def test_heads_that_go_on_have_the_original_that_they_were_begun_with(tmp_path, monkeypatch):
    """That of `initial`, which is in no checkpoint of heads."""
    given, path, seen = make_network(seed=1), str(tmp_path / "given.npz"), []
    given.save_weights(path)
    stage = StageConfig(trains="heads", batch_size=4, epochs=1, eval_epochs=1, initial=path)
    config = Config(DataConfig(input_size=SIZE, synthetic_train=4, synthetic_val=2))
    for epochs in (1, 2):
        network = make_network()
        monkeypatch.setattr(
            "mess_tf.learning.stage.accuracies", lambda found, of=network: seen.append(weights_of(of.original)) or accuracies(found)
        )
        longer = dataclasses.replace(stage, epochs=epochs)
        train.train_stage("stage2", longer, network, config, open_split(config.data, "train"), validation(), str(tmp_path))
    assert len(seen) == 2 and all(same(each, weights_of(given.original)) for each in seen)


# ------------------------------------------------------------------------------------------------------------------------- the command


def test_a_network_of_ones_own_gets_exits_and_keeps_its_weights(tmp_path):
    image = keras.Input((*SIZE, 3))
    x = image
    for width in (8, 16, 16):
        x = keras.layers.Conv2D(width, 3, 2, "same", activation="relu")(x)
    own = keras.Model(image, keras.layers.Conv2D(CLASSES, 1, activation="softmax")(x))
    own.save(tmp_path / "own.keras")
    overrides = ["data.input_size=[32, 64]", "data.synthetic_train=8", "data.synthetic_val=2", "exits.count=2", 'exits.heads=["fcn-r1-b0"]']
    overrides += ["backbone.name=keras_file", f"backbone.weights={tmp_path / 'own.keras'}", "stage1.epochs=0", "stage2.epochs=1"]
    config = train.resolve_config(str(tmp_path / "run"), "", "", "", overrides)
    train.run(str(tmp_path / "run"), config)
    (tmp_path / "own.keras").unlink()  # the work folder alone suffices, wherever it is moved to
    (tmp_path / "run").rename(tmp_path / "moved")
    rescale(tmp_path / "moved", 1.0, tmp_path / "run")
    network = load_network(str(tmp_path / "run"), config, CLASSES)
    assert network.candidates == ["exit1.fcn-r1-b0", FINAL] and not (tmp_path / "run" / "checkpoints" / "stage1").exists()
    picture = np.random.default_rng(0).uniform(0, 255, (1, *SIZE, 3)).astype(np.float32)
    probabilities = tf.nn.softmax(network.submodel([FINAL])(picture)[FINAL])
    np.testing.assert_allclose(probabilities, own(picture), atol=1e-5)


def test_a_network_file_that_does_not_fit_is_an_error(tmp_path):
    def load(path: str, classes: int):
        backbone = configs.BackboneConfig("keras_file", weights=str(tmp_path / path))
        return build_network(configs.Config(DataConfig(input_size=SIZE), backbone, configs.ExitsConfig(2)), classes)

    image = keras.Input((*SIZE, 3))
    keras.Model(image, keras.layers.Conv2D(3, 3, 2)(keras.layers.Conv2D(8, 3, 2)(image))).save(tmp_path / "three.keras")
    with pytest.raises(FileNotFoundError, match=r"backbone\.weights: must be an existing file, got '.*none\.keras'"):
        load("none.keras", 3)
    for content, what in ((b"no network", "no ZIP archive"), (b"\x89HDF\r\n\x1a\n", "an HDF5 file of older versions")):
        (tmp_path / "text.keras").write_bytes(content)
        with pytest.raises(ValueError, match=rf"backbone\.weights: must be a file that .* made, got '.*text\.keras, {what}"):
            load("text.keras", 3)
    with zipfile.ZipFile(tmp_path / "text.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ValueError, match=r"text\.keras, an archive without model\.weights\.h5"):
        load("text.keras", 3)
    with pytest.raises(ValueError, match=r"backbone\.weights: '.*three\.keras' must have the data's 5 classes, got 3"):
        load("three.keras", 5)


def test_a_folder_keeps_its_configuration(tmp_path):
    config = train.resolve_config(str(tmp_path), "camvid_lite0", "", "somewhere", ["stage1.epochs=3"])
    assert not [*tmp_path.iterdir()], "it is kept where a training begins"
    (tmp_path / "config.json").write_text(configs.to_json(config))
    assert train.resolve_config(str(tmp_path), "", "", "", []) == config
    assert train.resolve_config(str(tmp_path), "camvid_lite0", "", "", ["stage1.epochs=3"]) == config
    elsewhere = train.resolve_config(str(tmp_path), "", "", "elsewhere", [])
    assert elsewhere == dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir="elsewhere"))
    assert train.resolve_config(str(tmp_path), "camvid_lite0", "", "somewhere", ["stage1.epochs=5"]).stage1.epochs == 5  # nothing trained
    assert train.resolve_config(str(tmp_path), "camvid_lite0", "", "somewhere", ["stage1.epochs=3"]) == config
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"workdir: .*config\.json was made with stage1\.epochs 3, not 4; leave the flags out"):
        train.resolve_config(str(tmp_path), "camvid_lite0", "", "", ["stage1.epochs=4"])
    with pytest.raises(ValueError, match=r"data\.source 'folder', not 'synthetic'"):
        train.resolve_config(str(tmp_path), "camvid_lite0", "synthetic", "", ["stage1.epochs=3"])


def test_another_recipe_is_told_in_a_short_line(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(configs.RECIPES["camvid_lite0"]))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"; \d+ more; leave the flags out to go on with it, or choose another folder$") as error:
        train.resolve_config(str(tmp_path), "demo", "", "", [])
    assert len(str(error.value).replace(str(path), "")) < 400 and str(error.value).count(", not ") == train.SHOWN_DIFFERENCES


def test_a_trained_network_at_another_input_size(tmp_path):
    network, old, new = make_network(), tmp_path / "old", tmp_path / "new" / "0.5"
    config = train.resolve_config(str(old), "camvid_lite0", "", "", ["data.input_size=[64,64]"])
    old.mkdir()
    (old / "config.json").write_text(configs.to_json(config))
    with pytest.raises(FileNotFoundError, match=r"workdir: must hold trained weights, which .* makes, got '.*old'"):
        rescale(old, 0.5, new)
    run_stage(old, network, epochs=1)
    with pytest.raises(ValueError, match=r"^input_scale: must be in \(0, 4\], got 5\.0"):
        rescale(old, 5.0, new)
    assert not new.exists()
    rescale(old, 0.5, new)
    assert configs.load_config(str(new)) == dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, crop_size=(0, 0)),
        backbone=dataclasses.replace(config.backbone, input_scale=0.5),
    )
    with np.load(old / "checkpoints" / "stage1" / "best.npz") as before, np.load(best_weights(str(new), "stage1")) as after:
        assert before.files == after.files
    with pytest.raises(ValueError, match="output: must be a folder that does not exist yet"):
        rescale(old, 0.75, new)


def test_an_unknown_recipe_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"--recipe: must be a known name, nearest \['camvid_lite0'.*, got 'camvid'"):
        train.resolve_config(str(tmp_path / "new"), "camvid", "", "", [])
    assert not (tmp_path / "new").exists()
