"""Segments at active cells as graphs (see `mess_tf.network.regions`): one for each budget of cells, checked against Keras.

A graph takes, beside the features, how sure each cell is, and works on the least sure ones: as many as its budget, by TOPK_V2.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from mess_tf.graph import flatbuffer
from mess_tf.graph.conversion import FP32, TOLERANCE, Tensors, check_parity, convert
from mess_tf.network.regions import ActiveSegment

CELLS, SURE = "cells", "sure"
INT8_TOLERANCE = 0.2  # of the largest value, of features and logits
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)


def budgets(segment: ActiveSegment, shares: Sequence[float] = SHARES) -> list[int]:
    """Numbers of cells that are at least these shares of all, each once."""
    return sorted({math.ceil(share * math.prod(segment.grid)) for share in shares})


def segment_graph(segment: ActiveSegment, budget: int, precision: str = FP32, samples: Sequence[Tensors] = ()) -> flatbuffer.Graph:
    """Converts a segment at a budget.

    Args:
      segment: what is to be computed.
      budget: number of cells to compute it at; all of them make it the dense network.
      precision: see `convert`.
      samples: the features that the segment reads, by name, of some images: for int8 to take its ranges from.

    Returns:
      Graph from the features and, unless the budget is all cells, `sure` float32 [1, rows, columns], the share of sure pixels in each
      cell, to `logits` and the features that are handed on.

    Raises:
      ExportError: if it cannot be expressed in builtin operations of static shape.
    """
    everything = math.prod(segment.grid)
    if budget == everything:
        return convert(lambda **tensors: segment.dense(tensors), segment.inputs, precision, lambda: iter(samples))

    def with_cells() -> Iterator[Tensors]:
        generator = np.random.default_rng(0)
        for sample in samples:
            yield sample | {CELLS: generator.permutation(everything)[:budget].astype(np.int32)}

    def gathered(cells: tf.Tensor, **tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        return segment.gathered(tensors, cells)

    cells = tf.TensorSpec((budget,), tf.int32)
    graph = convert(gathered, dict(segment.inputs) | {CELLS: cells}, precision, with_cells)
    selection = convert(lambda sure: {CELLS: segment.most_unsure(sure, budget)[0]}, {SURE: (1, *segment.grid)})
    features = {name: graph.inputs[name] for name in segment.inputs}
    selection = flatbuffer.Graph(selection.inputs | features, selection.outputs | features, selection.operations)
    joined = flatbuffer.join(selection, graph, {name: name for name in graph.inputs})
    return flatbuffer.cut(joined, joined.inputs, {name: joined.outputs[name] for name in graph.outputs})


def check_segment(segment: ActiveSegment, budget: int, content: bytes, features: Tensors, precision: str = FP32) -> None:
    """Raises ExportError if the file of a segment at a budget does not compute what `ActiveSegment.masked` does.

    Args:
      segment: what it is of.
      budget: number of cells.
      content: the .tflite with this graph only.
      features: what the segment reads, by name.
      precision: of the file.
    """
    sure = np.random.default_rng(0).uniform(0, 1, (1, *segment.grid)).astype(np.float32)
    expected = segment.masked(features, segment.active(segment.most_unsure(sure, budget)))
    inputs = dict(features) if budget == math.prod(segment.grid) else features | {SURE: sure}
    check_parity(content, inputs, {name: value.numpy() for name, value in expected.items()}, {}, TOLERANCE.get(precision, INT8_TOLERANCE))
