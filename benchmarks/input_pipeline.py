"""Whether training waits for its data: images per second of the input pipeline alone, of the step of stage 1 alone, and both together.

`python benchmarks/input_pipeline.py --recipe=camvid_lite0 --data_dir=CAMVID [--data=S] [--set section.field=value] [--steps=20]` takes, in
each round, in one process: the pipeline with every image decoded from its file (which the system may hold in memory), the same batches from
decoded images that are kept, the step on one batch again and again, and the step fed by the pipeline, decoding; on a CPU these two then
share the cores. The last line is one JSON object: medians over the rounds, and the range of what keeping decoded images gains.
"""

import mess_tf  # noqa: F401  # isort: skip  # before TensorFlow, which then uses oneDNN
import collections
import json
import math
import os
import time
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

from mess_tf import configs
from mess_tf.configs import Config, HeadSpec
from mess_tf.data import examples as examples_module
from mess_tf.data import open_split
from mess_tf.data.examples import Examples
from mess_tf.data.pipelines import training_batches
from mess_tf.learning.steps import Step, fix_summation_order, make_optimizer, network_step
from mess_tf.network.model import build_network


def make_step(config: Config, num_classes: int) -> Step:
    """Makes the step of stage 1, as a training does."""
    keras.mixed_precision.set_global_policy(config.stage1.precision)
    network = build_network(config, num_classes)
    network.add_heads([HeadSpec.parse(config.exits.plain_head)], config.backbone.batch_norm_momentum)
    parts = [network.original, *network.heads.values()]
    optimizer = make_optimizer(config.stage1, [variable for part in parts for variable in part.trainable_variables])
    return network_step(network, config.stage1, optimizer, config.data.training_size, np.ones(num_classes, np.float32))


def drawn(batches: tf.data.Dataset, use: Callable[[tuple, int], object] = lambda batch, number: None) -> tuple[float, float]:
    """Seconds that each batch is waited for and, in `use`, worked on; means without the first batch, for which the pipeline starts."""
    iterator, waited, worked = iter(batches), [], []
    while True:
        started = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            return float(np.mean(waited[1:])), float(np.mean(worked[1:]))
        waited.append(time.perf_counter() - started)
        started = time.perf_counter()
        use(batch, len(worked))
        worked.append(time.perf_counter() - started)


def main(argv: Sequence[str]) -> None:
    del argv
    config = configs.with_data_dir(configs.of_recipe(FLAGS.recipe, FLAGS.data, FLAGS.set), FLAGS.data_dir)
    fix_summation_order()
    keras.utils.set_random_seed(0)
    batch_size = config.stage1.batch_size

    decoding, kept = (open_split(config.data, config.data.train_split) for _ in range(2))

    def batches(examples: Examples) -> tf.data.Dataset:
        return training_batches(examples, config.data, batch_size, config.stage1.seed, 0, FLAGS.steps + 1)

    examples_module.CACHE_BYTES = math.inf
    (batch,) = collections.deque(batches(kept), maxlen=1)  # decodes them
    examples_module.CACHE_BYTES = 0
    step = make_step(config, kept.info.num_classes)

    def work(batch: tuple, number: int) -> None:
        for value in step(batch, number).values():
            value.numpy()  # waits for the result

    early = max(1, len(config.exits.layers) or config.exits.count - 1)
    for number in range(early):
        work(batch, number)  # compiles

    rounds = []
    for _ in range(FLAGS.rounds):
        from_files, _ = drawn(batches(decoding))
        from_memory, _ = drawn(batches(kept))
        started = time.perf_counter()
        for number in range(FLAGS.steps):
            work(batch, number)
        alone = (time.perf_counter() - started) / FLAGS.steps
        waited, worked = drawn(batches(decoding), work)
        rounds.append({"decoding": from_files, "kept": from_memory, "step": alone, "waited": waited, "worked": worked})
        print(
            f"round {len(rounds)}, ms per batch: " + " ".join(f"{name} {1000 * value:.1f}" for name, value in rounds[-1].items()),
            flush=True,
        )

    def median(value: Callable[[dict], float]) -> float:
        return round(float(np.median([value(each) for each in rounds])), 4)

    gains = [each["decoding"] / each["kept"] for each in rounds]
    document = {
        "images_per_s": {name: median(lambda each, name=name: batch_size / each[name]) for name in ("decoding", "kept", "step")},
        "kept_over_decoding": round(float(np.median(gains)), 4),
        "spread": [round(min(gains), 4), round(max(gains), 4)],
        "share_waiting": median(lambda each: each["waited"] / (each["waited"] + each["worked"])),
        "fed_step_over_step": median(lambda each: (each["waited"] + each["worked"]) / each["step"]),
        "rounds": len(rounds),
        "recipe": FLAGS.recipe or "default",
        "source": config.data.source,
        "backbone": config.backbone.name,
        "training_size": list(config.data.training_size),
        "batch": batch_size,
        "cpus": os.cpu_count(),
        "accelerators": [device.name for device in tf.config.list_physical_devices("GPU")],
        "tensorflow": tf.__version__,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("recipe", "", f"one of {sorted(configs.RECIPES)}")
    flags.DEFINE_string("data", "", "data source, in place of the recipe's")
    flags.DEFINE_string("data_dir", "", "root folder of the data")
    flags.DEFINE_multi_string("set", [], "section.field=value, e.g. stage1.batch_size=32; may be given several times")
    flags.DEFINE_integer("steps", 20, "batches of each kind in a round", lower_bound=2)
    flags.DEFINE_integer("rounds", 5, "rounds", lower_bound=1)
    app.run(main)
