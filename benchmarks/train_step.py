"""What exit dropout costs: step time of stage 1 against plain training of the same backbone, and of joint training of all exits.

`python benchmarks/train_step.py [--steps=30] [--backbone=efficientnet_lite0] [--size=288x384] [--batch=8]` takes the three kinds of step in
turn, in one process, on random images; early exits also learn from the final one. A round is as many steps of each kind as there are early
exits, so that each exit has its turn in stage 1. Where the network dilates other than depthwise convolutions, as that of `originals.py`
does (`--backbone=resnet.keras --size=192x192`), a fourth kind is plain training that leaves them to Keras. The last line is one JSON
object: medians over the rounds of seconds per step, and of the ratios within a round with their range.
"""

import mess_tf  # noqa: F401  # isort: skip  # before TensorFlow, which then uses oneDNN
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

CLASSES = 7
KINDS = ("none", "round_robin", "all")
KERAS_DILATION = "keras_dilation"


def make_step(
    backbone: BackboneConfig, exits: ExitsConfig, stage: StageConfig, size: tuple[int, int], keras_dilation: bool = False
) -> Callable[[int], float] | None:
    """Makes a function from the number of a step of stage 1 to its seconds, on the devices of the strategy in scope.

    With `keras_dilation` dilated convolutions run as Keras has it; None if there are none.
    """
    keras.utils.set_random_seed(0)
    config = Config(DataConfig(input_size=size), backbone, exits, stage)
    network = build_network(config, CLASSES)
    network.add_heads([HeadSpec.parse(config.exits.plain_head)], backbone.batch_norm_momentum)
    parts = [network.original, *network.heads.values()]
    if keras_dilation:
        layers = [layer for part in parts for layer in part._flatten_layers() if "convolution_op" in vars(layer)]
        if not layers:
            return None
        for layer in layers:
            del layer.convolution_op  # back to the class's own
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
    own = FLAGS.backbone.endswith(".keras")
    backbone = BackboneConfig("keras_file", weights=FLAGS.backbone) if own else BackboneConfig(name=FLAGS.backbone)
    early = FLAGS.exits - 1
    exits = ExitsConfig(count=FLAGS.exits)
    fix_summation_order()
    stages = {kind: StageConfig(exits=kind, distillation="filtered", batch_size=FLAGS.batch) for kind in KINDS}
    steps = {kind: make_step(backbone, exits, stage, size) for kind, stage in stages.items()}
    if of_keras := make_step(backbone, exits, stages["none"], size, keras_dilation=True):
        steps[KERAS_DILATION] = of_keras
    for number in range(early):
        for step in steps.values():
            step(number)  # compiles

    rounds = []
    for start in range(0, FLAGS.steps, early):
        seconds = dict.fromkeys(steps, 0.0)
        for number in range(start, start + early):
            for kind in steps:
                seconds[kind] += steps[kind](number) / early
        rounds.append(seconds)
        print(f"round {len(rounds)}: " + " ".join(f"{kind} {value:.3f} s/step" for kind, value in seconds.items()), flush=True)

    medians = {kind: float(np.median([row[kind] for row in rounds])) for kind in steps}
    ratios_of = {kind: [row[kind] / row["none"] for row in rounds] for kind in steps if kind != "none"}
    stage1, joint = ratios_of["round_robin"], ratios_of["all"]
    names = {"round_robin": "stage 1", "all": "joint training", KERAS_DILATION: "dilation by Keras"}
    for kind, ratios in ratios_of.items():
        spread = f"{min(ratios):.3f} to {max(ratios):.3f} in {len(rounds)} rounds"
        print(f"{names[kind]}: {np.median(ratios):.3f} times the step of plain training ({spread})")
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
    if KERAS_DILATION in ratios_of:
        ratios = ratios_of[KERAS_DILATION]
        document |= {
            "keras_dilation_over_plain": round(float(np.median(ratios)), 4),
            "keras_dilation_spread": [round(min(ratios), 4), round(max(ratios), 4)],
        }
    print(json.dumps(document))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_integer("steps", 30, "steps of each kind, rounded up to whole rounds", lower_bound=1)
    flags.DEFINE_string("backbone", "efficientnet_lite0", "backbone, with random weights, or the .keras file of a network")
    flags.DEFINE_string("size", "288x384", "height x width of the images in pixels")
    flags.DEFINE_integer("batch", 8, "images per step", lower_bound=1)
    flags.DEFINE_integer("exits", 7, "exits, the final one included", lower_bound=2)
    app.run(main)
