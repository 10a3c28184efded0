"""Segments at active cells as graphs (see `mess_tf.network.regions`): one for each budget of cells, checked against Keras.

A graph takes, beside the features, how sure each cell is, and works on the least sure ones: as many as its budget, by TOPK_V2.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from mess_runtime import bundle as bundles
from mess_runtime.bundle import GONE, SURE
from mess_tf.graph import flatbuffer
from mess_tf.graph.conversion import FP32, TOLERANCE, Tensors, check_parity, convert
from mess_tf.graph.policy import decide, decide_by_cell
from mess_tf.network.model import MultiExitNetwork
from mess_tf.network.regions import ActiveSegment

CELLS = "cells"
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
      Graph from the features and, unless the budget is all cells, `sure` float32 [1, rows, columns], the share of confident pixels in
      each cell, to `logits` and the features that are handed on, and `cells` int32 [budget].

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
    return flatbuffer.cut(joined, joined.inputs, {name: joined.outputs[name] for name in (*graph.outputs, CELLS)})


def region_graphs(
    network: MultiExitNetwork,
    candidates: Sequence[str],
    segments: Sequence[ActiveSegment],
    input_size: tuple[int, int],
    thresholds: Sequence[tuple[float, bool]],
    shares: Sequence[float] = SHARES,
    precision: str = FP32,
    images: Sequence[np.ndarray] = (),
) -> dict[str, flatbuffer.Graph]:
    """The signatures of a network in which every cell leaves at the first exit that is sure of it, by the names that they have in a file.

    `segment.EXIT` of the first exit takes `image` float32 [1, H, W, 3], and `segment.EXIT.N` of each later one, N a budget of cells, what
    earlier ones hand on. All make `mask` uint8 [1, H, W]; all but those of the last exit `sure` float32 [1, rows, columns], the share of
    confident pixels, GONE where a cell has left before. A later one reads both from the one before. It works on the N cells that are least
    sure, and changes the mask there, but for those that have left. A cell leaves an exit when its share reaches a threshold that whoever
    runs the file compares it with: it takes the least budget that holds the others, the largest where none does, and stops if there are no
    others. More cells than others are no loss: they are the next least sure.

    Args:
      network: the multi-exit network.
      candidates: one per exit, shallow to deep.
      segments: those after the first, on the same grid.
      input_size: (H, W).
      thresholds: of all exits but the last: confidence that makes a pixel count, and whether edges are handled, see `policy.decide`.
      shares: of the cells, see `budgets`.
      precision: see `convert`; what decides stays in floating point.
      images: float32 [1, H, W, 3] that int8 takes its ranges from.

    Raises:
      ValueError: the grids differ.
      ExportError: see `segment_graph`.
    """
    grids = {segment.grid for segment in segments}
    bundles.check(len(grids) == 1, "segments", "on one grid, which cells of other sizes give", sorted(grids))
    first, *_ = models = network.segments(candidates)
    samples = [{bundles.IMAGE: image} for image in images]
    shape = (1, *input_size, 3)
    graph = convert(lambda **image: first(image, training=False), {bundles.IMAGE: shape}, precision, lambda: iter(samples))
    graphs = {}
    for index, candidate in enumerate(candidates):
        exit_name = candidate.partition(".")[0]
        threshold = thresholds[index] if index < len(thresholds) else None
        handed = {name for name in models[index].output if name != "logits"}
        for budget in budgets(segments[0], shares) if index else [None]:
            name = bundles.segment_signature(exit_name)
            if budget is not None:
                name, graph = f"{name}.{budget}", segment_graph(segments[index - 1], budget, precision, samples)
            decision = _decision(graph.outputs["logits"].shape, segments[0], input_size, threshold, budget)
            given = {name: tensor for name, tensor in decision.inputs.items() if name not in ("logits", CELLS)}
            given = {name: graph.inputs.get(name, tensor) for name, tensor in given.items()}
            graph = flatbuffer.Graph(graph.inputs | given, graph.outputs | given, graph.operations)
            joined = flatbuffer.join(graph, decision, {name: name for name in decision.inputs}, "made.")
            outputs = {made: joined.outputs[f"made.{made}"] for made in decision.outputs}
            outputs |= {name: joined.outputs[name] for name in graph.outputs if name in handed}
            graphs[name] = flatbuffer.cut(joined, joined.inputs, outputs)
        for sample in samples:
            made = models[index]({name: sample[name] for name in models[index].input}, training=False)
            sample |= {name: value.numpy() for name, value in made.items() if name != "logits"}
    return graphs


def _decision(
    logits: tuple[int, ...], segment: ActiveSegment, size: tuple[int, int], threshold: tuple[float, bool] | None, budget: int | None
) -> flatbuffer.Graph:
    """From an exit's logits, and for a later one the cells, how sure they were and the mask before, to the mask and how sure they are."""
    rows, columns = by_pixel = tuple(segment.cells_of(side, axis) for axis, side in enumerate(size))
    selects = budget is not None and budget < math.prod(segment.grid)

    def function(logits: tf.Tensor, **before: tf.Tensor) -> dict[str, tf.Tensor]:
        made = decide_by_cell(logits, size, threshold, by_pixel) if threshold else decide(logits, size, ())
        if budget is None:
            return made
        active = before[SURE] < GONE
        if selects:
            active &= segment.active(before[CELLS][None])
        if SURE in made:
            made[SURE] = tf.where(active, made[SURE], GONE)
        changed = tf.gather(tf.gather(tf.cast(active, tf.int32), rows, axis=1), columns, axis=2) > 0
        new, old = (tf.cast(masks[bundles.MASK], tf.int32) for masks in (made, before))  # no runtime compares or selects uint8
        return made | {bundles.MASK: tf.cast(tf.where(changed, new, old), tf.uint8)}

    inputs: dict = {"logits": logits}
    if budget is not None:
        inputs |= {SURE: (1, *segment.grid), bundles.MASK: tf.TensorSpec((1, *size), tf.uint8)}
    if selects:
        inputs[CELLS] = tf.TensorSpec((budget,), tf.int32)
    return convert(function, inputs)


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
    cells = segment.most_unsure(sure, budget)
    expected = segment.masked(features, segment.active(cells))
    if budget < math.prod(segment.grid):
        expected[CELLS] = cells[0]
    inputs = dict(features) if budget == math.prod(segment.grid) else features | {SURE: sure}
    check_parity(content, inputs, {name: value.numpy() for name, value in expected.items()}, {}, TOLERANCE.get(precision, INT8_TOLERANCE))
