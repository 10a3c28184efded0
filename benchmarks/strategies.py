"""What `tf.distribute` on one device costs in the step of stage 1, and what `stage1.jit_compile` and half precision gain there.

`python benchmarks/strategies.py [--rounds=30] [--backbone=mobilenet_v2] [--size=96x128] [--batch=4] [--exits=3] [--cpu_time]` takes
the same step in turn, in one process, on random images; early exits learn from the final one, and all of them in every step. `none` is
without a strategy, `mirrored` on all GPUs or the one CPU, the others are without a strategy too. A machine that does other work meanwhile
is better judged by --cpu_time. The last line is one JSON object: medians of milliseconds per step, and median and quartiles of the ratio to
`none` within a round.
"""

import mess_tf  # noqa: F401  # isort: skip  # before TensorFlow, which then uses oneDNN
import dataclasses
import json
import time
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from common import interleaved, ratio
from train_step import make_step

from mess_tf.configs import BackboneConfig, ExitsConfig, StageConfig
from mess_tf.learning.steps import fix_summation_order
from mess_tf.network.replicas import open_strategy

VARIANTS = {
    "none": {},
    "mirrored": {},
    "jit_compile": {"jit_compile": True},
    "mixed_bfloat16": {"precision": "mixed_bfloat16"},
    "mixed_float16": {"precision": "mixed_float16"},
}


def make_side(name: str, stage: StageConfig, size: tuple[int, int]) -> Callable[[], object]:
    """Makes a function that does one step of a variant."""
    keras.mixed_precision.set_global_policy(stage.precision)
    with open_strategy("mirrored" if name == "mirrored" else "none").scope():
        step = make_step(BackboneConfig(FLAGS.backbone), ExitsConfig(count=FLAGS.exits), stage, size)

    def call() -> None:
        keras.mixed_precision.set_global_policy(stage.precision)  # the first call builds the graph
        step(0)

    return call


def main(argv: Sequence[str]) -> None:
    del argv
    size = tuple(int(side) for side in FLAGS.size.split("x"))
    fix_summation_order()
    stage = StageConfig(exits="all", distillation="filtered", batch_size=FLAGS.batch)
    sides = {name: make_side(name, dataclasses.replace(stage, **VARIANTS[name]), size) for name in FLAGS.variants}
    samples = interleaved(sides, FLAGS.rounds, clock=time.process_time_ns if FLAGS.cpu_time else time.perf_counter_ns)
    ratios = {name: ratio(samples[name], samples["none"]) for name in sides if name != "none"}
    for name, (median, low, high) in ratios.items():
        print(f"{name}: {median:.3f} times the step without it ({low:.3f} to {high:.3f} in {FLAGS.rounds} rounds)")
    document = {
        "over_none": {name: [round(value, 4) for value in values] for name, values in ratios.items()},
        "ms": {name: round(float(np.median(values)), 2) for name, values in samples.items()},
        "clock": "CPU" if FLAGS.cpu_time else "wall",
        "rounds": FLAGS.rounds,
        "backbone": FLAGS.backbone,
        "size": list(size),
        "batch": FLAGS.batch,
        "exits": FLAGS.exits,
        "tensorflow": tf.__version__,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_integer("rounds", 30, "steps of each", lower_bound=1)
    flags.DEFINE_multi_enum("variants", list(VARIANTS), list(VARIANTS), "which; with none among them")
    flags.DEFINE_string("backbone", "mobilenet_v2", "backbone, with random weights")
    flags.DEFINE_string("size", "96x128", "height x width of the images in pixels")
    flags.DEFINE_integer("batch", 4, "images per step", lower_bound=1)
    flags.DEFINE_integer("exits", 3, "exits, the final one included", lower_bound=2)
    flags.DEFINE_bool("cpu_time", False, "CPU seconds of all threads instead of the clock's")
    app.run(main)
