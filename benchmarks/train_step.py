"""What exit dropout costs: step time of stage 1 against plain training of the same backbone, and of joint training of all exits.

`python benchmarks/train_step.py [--steps=30] [--backbone=efficientnet_lite0] [--size=288x384] [--batch=8]` takes the three kinds of step in
turn, in one process, on random images; early exits also learn from the final one. A round is as many steps of each kind as there are early
exits, so that each exit has its turn in stage 1. The last line is one JSON object: medians over the rounds of seconds per step, and of the
ratios within a round with their range.
"""

import json
import time
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

from mess_tf.configs import BackboneConfig, Config, DataConfig, ExitsConfig, HeadSpec, StageConfig
from mess_tf.learning.steps import fix_summation_order, make_optimizer, network_step
from mess_tf.network.model import build_network

CLASSES = 11
KINDS = ("none", "round_robin", "all")


def make_step(backbone: BackboneConfig, exits: int, stage: StageConfig, size: tuple[int, int]) -> Callable[[int], float]:
    """Makes a function from the number of a step of stage 1 to its seconds, on the devices of the strategy in scope."""
    keras.utils.set_random_seed(0)
    config = Config(DataConfig(input_size=size), backbone, ExitsConfig(count=exits), stage)
    network = build_network(config, CLASSES)
    network.add_heads([HeadSpec.parse(config.exits.plain_head)], backbone.batch_norm_momentum)
    parts = [network.original, *network.heads.values()]
    optimizer = make_optimizer(config.stage1, [variable for part in parts for variable in part.trainable_variables])
    step = network_step(network, config.stage1, optimizer, size, np.ones(CLASSES, np.float32))
    images = tf.random.uniform((stage.batch_size, *size, 3), 0, 255)
    labels = tf.cast(tf.random.uniform((stage.batch_size, *size), 0, CLASSES, tf.int32), tf.uint8)

    def timed(number: int) -> float:
        started = time.perf_counter()
        for value in step((images, labels), number).values():
            value.numpy()  # waits for the result
        return time.perf_counter() - started

    return timed


def main(argv: Sequence[str]) -> None:
    del argv
    size = tuple(int(side) for side in FLAGS.size.split("x"))
    backbone = BackboneConfig(name=FLAGS.backbone)
    early = FLAGS.exits - 1
    fix_summation_order()
    stages = {kind: StageConfig(exits=kind, distillation="filtered", batch_size=FLAGS.batch) for kind in KINDS}
    steps = {kind: make_step(backbone, FLAGS.exits, stage, size) for kind, stage in stages.items()}
    for number in range(early):
        for step in steps.values():
            step(number)  # compiles

    rounds = []
    for start in range(0, FLAGS.steps, early):
        seconds = dict.fromkeys(KINDS, 0.0)
        for number in range(start, start + early):
            for kind in KINDS:
                seconds[kind] += steps[kind](number) / early
        rounds.append(seconds)
        print(f"round {len(rounds)}: " + " ".join(f"{kind} {value:.3f} s/step" for kind, value in seconds.items()), flush=True)

    medians = {kind: float(np.median([row[kind] for row in rounds])) for kind in KINDS}
    stage1, joint = ([row[kind] / row["none"] for row in rounds] for kind in ("round_robin", "all"))
    for name, ratios in (("stage 1", stage1), ("joint training", joint)):
        spread = f"{min(ratios):.3f} to {max(ratios):.3f} in {len(rounds)} rounds"
        print(f"{name}: {np.median(ratios):.3f} times the step of plain training ({spread})")
    document = {
        "stage1_over_plain": round(float(np.median(stage1)), 4),
        "spread": [round(min(stage1), 4), round(max(stage1), 4)],
        "joint_over_plain": round(float(np.median(joint)), 4),
        "joint_spread": [round(min(joint), 4), round(max(joint), 4)],
        "stage1_s": round(medians["round_robin"], 4),
        "plain_s": round(medians["none"], 4),
        "joint_s": round(medians["all"], 4),
        "rounds": len(rounds),
        "backbone": FLAGS.backbone,
        "size": list(size),
        "batch": FLAGS.batch,
        "exits": FLAGS.exits,
        "tensorflow": tf.__version__,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_integer("steps", 30, "steps of each kind, rounded up to whole rounds", lower_bound=1)
    flags.DEFINE_string("backbone", "efficientnet_lite0", "backbone, with random weights")
    flags.DEFINE_string("size", "288x384", "height x width of the images in pixels")
    flags.DEFINE_integer("batch", 8, "images per step", lower_bound=1)
    flags.DEFINE_integer("exits", 7, "exits, the final one included", lower_bound=2)
    app.run(main)
