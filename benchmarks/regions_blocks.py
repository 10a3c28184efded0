"""Segments of residual blocks at active cells against the same segments dense: time at each budget.

A segment is a run of equal blocks, from the features that it reads to those that it hands on: the least sure cells are selected, gathered
and put back within it. Both sides run on one thread, in turn, in this process; what is compared is the processor time of that thread,
which holds on a machine that others use too.

    python benchmarks/regions_blocks.py [--networks=...] [--precisions=...] [--blocks=3] [--rounds=30]

The last line is one JSON object: for network, precision, cell, neighbours and share of the cells, the ratio to the dense segment (median,
25 % and 75 % quantiles over rounds), and the dense segment's milliseconds.
"""

import functools
import json
import time

import keras
import numpy as np
from absl import app, flags
from common import interleaved, invocation, ratio

from mess_runtime.bundle import SIGNATURE, SURE
from mess_tf.configs import HeadSpec
from mess_tf.graph import flatbuffer
from mess_tf.graph.conversion import FP32, PRECISIONS
from mess_tf.graph.regions import SHARES, budgets, segment_graph
from mess_tf.network.layers import BatchNormalization
from mess_tf.network.model import FINAL, MultiExitNetwork, convert
from mess_tf.network.regions import NEAREST, STALE, ActiveSegment

HEAD = "fcn-r8-b0"
MAPS = {"resnet": (32, 32), "mobilenet_v2": (24, 32), "lite_3x3": (24, 32), "lite_5x5": (24, 32)}
CHANNELS = {"resnet": (1024, 256), "mobilenet_v2": (96, 576), "lite_3x3": (80, 480), "lite_5x5": (112, 672)}
FORMS = {"resnet": ((1, NEAREST), (2, NEAREST), (1, STALE))}
MOBILE_FORMS = ((1, NEAREST), (2, NEAREST), (4, NEAREST), (2, STALE))


def block(network: str, x: keras.KerasTensor, number: int) -> keras.KerasTensor:
    """A ResNet bottleneck with a dilated 3x3 convolution, or an inverted residual."""
    layers, (outer, inner), y = keras.layers, CHANNELS[network], x
    if network == "resnet":
        for kernel, channels in ((1, inner), (3, inner)):
            y = layers.Conv2D(channels, kernel, padding="same", dilation_rate=2 if kernel > 1 else 1, use_bias=False)(y)
            y = layers.Activation("relu")(BatchNormalization()(y))
        y = BatchNormalization()(layers.Conv2D(outer, 1, use_bias=False)(y))
        return layers.Activation("relu", name=f"block{number}")(layers.Add()([x, y]))
    y = layers.ReLU(6.0)(BatchNormalization()(layers.Conv2D(inner, 1, use_bias=False)(y)))
    y = layers.DepthwiseConv2D(5 if network == "lite_5x5" else 3, padding="same", use_bias=False)(y)
    y = layers.ReLU(6.0)(BatchNormalization()(y))
    y = BatchNormalization()(layers.Conv2D(outer, 1, use_bias=False)(y))
    return layers.Add(name=f"block{number}")([x, y])


def build(network: str, blocks: int) -> tuple[MultiExitNetwork, tuple[int, int]]:
    """A network whose second segment is a run of blocks, between the taps of two early exits; and the size of its input."""
    size = tuple(16 * side for side in MAPS[network])
    image = keras.Input((None, None, 3), name="image")
    x = keras.layers.Conv2D(CHANNELS[network][0], 1, 16, name="stem")(keras.layers.Rescaling(1 / 255)(image))
    x = keras.layers.Activation("relu", name="block0")(x)
    for number in range(1, blocks + 2):
        x = block(network, x, number)
    made = convert(keras.Model(image, keras.layers.Conv2D(4, 1)(x)), ["block0", f"block{blocks}"], size)
    made.add_heads([HeadSpec.parse(HEAD)], 0.9)
    return made, size


def measure(network: str, precision: str, blocks: int, rounds: int) -> list[dict]:
    """The rows of one network at one precision."""
    made, size = build(network, blocks)
    candidates = [f"exit1.{HEAD}", f"exit2.{HEAD}", FINAL]
    generator = np.random.default_rng(0)
    end = f"block{blocks}"
    segment = functools.partial(ActiveSegment, made, candidates, 1, size)

    def content(cell: int, neighbours: str, share: float) -> bytes:
        part = segment(cell, neighbours)
        (budget,) = budgets(part, [share])
        samples = [{name: generator.normal(0, 1, shape).astype(np.float32) for name, shape in part.inputs.items()}]
        graph = segment_graph(part, budget, precision, samples)
        return flatbuffer.write({SIGNATURE: flatbuffer.cut(graph, graph.inputs, {end: graph.outputs[end]})}, precision != FP32)

    inputs = {"block0": generator.normal(0, 1, (1, *MAPS[network], CHANNELS[network][0])).astype(np.float32)}
    sides = {"dense": invocation(content(1, NEAREST, 1), 1, inputs)}
    for cell, neighbours in FORMS.get(network, MOBILE_FORMS):
        sure = generator.uniform(0, 1, (1, *segment(cell).grid)).astype(np.float32)
        for share in SHARES[:-1]:
            sides[cell, neighbours, share] = invocation(content(cell, neighbours, share), 1, inputs | {SURE: sure})
    times = interleaved(sides, rounds, clock=time.thread_time_ns)
    dense = times.pop("dense")
    rows = []
    for (cell, neighbours, share), values in times.items():
        middle, low, high = ratio(values, dense)
        rows.append(
            {"network": network, "precision": precision, "cell": cell, "neighbours": neighbours, "share": share}
            | {"ratio": round(middle, 3), "low": round(low, 3), "high": round(high, 3), "dense_ms": round(float(np.median(dense)), 3)}
        )
        print(f"{network:13} {precision} cell {cell} {neighbours:8} {share:5} {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)
    return rows


def main(argv: list[str]) -> None:
    del argv
    values = flags.FLAGS
    rows = []
    for network in values.networks:
        for precision in values.precisions:
            rows += measure(network, precision, values.blocks, values.rounds)
    print(json.dumps({"blocks": values.blocks, "rows": rows}))


if __name__ == "__main__":
    flags.DEFINE_multi_enum("networks", [*MAPS], [*MAPS], "kinds of blocks")
    flags.DEFINE_multi_enum("precisions", [*PRECISIONS], PRECISIONS, "precisions of the files")
    flags.DEFINE_integer("blocks", 3, "blocks in a segment")
    flags.DEFINE_integer("rounds", 30, "runs of each side")
    app.run(main)
