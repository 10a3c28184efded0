"""Segments at active cells as graphs (see `mess_tf.network.regions`): one for each budget of cells, checked against Keras.

A graph takes, beside the features, how sure each cell is, and works on the least sure ones: as many as its budget, by TOPK_V2.
"""

import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from mess_runtime import bundle as bundles
from mess_runtime.bundle import ANSWER, GONE, SURE
from mess_tf.graph import flatbuffer
from mess_tf.graph.conversion import FP32, TOLERANCE, ExportError, Tensors, check_outputs, convert, pixels, run_signature
from mess_tf.graph.policy import decide, decide_by_cell
from mess_tf.network.model import MultiExitNetwork
from mess_tf.network.regions import ActiveSegment, resized, segments_on_grid

CELLS = "cells"
LOGITS = "logits"
INT8_TOLERANCE = 0.2  # of features and logits: root mean square of the error over that of the values
SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)


def budgets(segment: ActiveSegment, shares: Sequence[float] = SHARES) -> list[int]:
    """Numbers of cells that are at least these shares of all, each once, without those that take no less work than all cells.

    Cells that the map cuts off are computed whole, but where all are active.
    """
    everything = math.prod(segment.grid)
    counts = sorted({math.ceil(share * everything) for share in shares})
    return [count for count in counts if count == everything or segment.macs(count) < segment.macs(everything)]


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


class RegionChain:
    """A network in which every cell leaves at the first exit that is sure of it, as graphs.

    The first exit takes `image` [1, H, W, 3], each later one at a budget of cells what earlier ones hand on. All make `mask` uint8
    [1, H, W]; all but the last `sure` float32 [1, rows, columns], the share of confident pixels, GONE where a cell has left before, and
    `answer` float32 [1, h, w, C], logits. A later one reads the three from the one before. It works on the cells that are least sure, as
    many as its budget, and changes the mask there, but for those that have left. Logits of cells that it does not work on, which count
    where a pixel lies between two positions, are those of the answer, see `ActiveSegment.answer`. A cell leaves an exit when its share
    reaches a threshold that whoever runs the file compares it with: it takes the least budget that holds the others, the largest where
    none does, and stops if there are no others. More cells than others are no loss: they are the next least sure.

    Attributes:
      segments: those after the first; None for one that can only be dense, whose only budget is all cells.
    """

    def __init__(
        self,
        network: MultiExitNetwork,
        candidates: Sequence[str],
        regions: bundles.Regions,
        input_size: tuple[int, int],
        thresholds: Sequence[tuple[float, bool]],
        precision: str = FP32,
        images: Sequence[np.ndarray] = (),
        cells: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        """Plans the segments.

        Args:
          network: the multi-exit network.
          candidates: one per exit, shallow to deep.
          regions: cells and budgets.
          input_size: (H, W).
          thresholds: of all exits but the last: confidence that makes a pixel count, and whether edges are handled, see `policy.decide`.
          precision: see `convert`; what decides stays in floating point.
          images: float32 [1, H, W, 3], at least one: int8 takes its ranges from them, and the first is what is checked on.
          cells: for a part of a longer chain, with dense segments only: rows and columns of cells that those of the image lie in.

        Raises:
          ValueError: see `segments_on_grid`.
        """
        self.segments = [None] * (len(candidates) - 1) if cells else segments_on_grid(network, candidates, input_size, regions)
        self._exits = [candidate.partition(".")[0] for candidate in candidates]
        self._models = network.segments(candidates)
        self._regions, self._size, self._thresholds = regions, input_size, [*thresholds, None]
        self._precision, self._images = precision, images
        some = next(filter(None, self.segments), None)
        self._by_pixel = cells or tuple(some.cells_of(side, axis) for axis, side in enumerate(input_size))

    @functools.cached_property
    def samples(self) -> list[dict[str, np.ndarray]]:
        """Each image, all features that are handed on, and the logits of all exits but the last under their names."""
        found = []
        for image in self._images:
            sample = {bundles.IMAGE: image}
            for exit_name, model in zip(self._exits, self._models[:-1], strict=False):
                made = model({name: sample[name] for name in model.input}, training=False)
                sample |= {exit_name if name == LOGITS else name: value.numpy() for name, value in made.items()}
            found.append(sample)
        return found

    def budgets(self, index: int) -> tuple[int, ...]:
        """Those of a segment after the first."""
        return self._regions.budgets if self.segments[index - 1] else self._regions.budgets[-1:]

    def first(self, input_type: str = "uint8") -> flatbuffer.Graph:
        """The graph of the first exit.

        Raises:
          ExportError: it does not compute what Keras does, or see `convert`.
        """
        shape = self.samples[0][bundles.IMAGE].shape
        model = self._models[0]
        graph = convert(lambda **image: model(image, training=False), {bundles.IMAGE: shape}, self._precision, lambda: iter(self.samples))
        graph = self._with_decision(graph, 0, None)
        if input_type == "uint8":
            whole = flatbuffer.join(pixels(shape), graph, {bundles.IMAGE: bundles.IMAGE})
            graph = flatbuffer.cut(whole, whole.inputs, {name: whole.outputs[name] for name in graph.outputs})
        image = self._images[0].astype(input_type)
        got = run_signature(self._content(graph), {bundles.IMAGE: image})
        if self._precision in TOLERANCE:
            made = {name: value.numpy() for name, value in model({bundles.IMAGE: image.astype(np.float32)}, training=False).items()}
            self._check(got, 0, made, tf.ones((1, *self._regions.grid), tf.bool), None)
        return graph

    def later(self, index: int) -> dict[int, flatbuffer.Graph]:
        """The graphs of a later exit by budget.

        Raises:
          ExportError: one does not compute what Keras does, or see `convert`.
        """
        segment, model, graphs = self.segments[index - 1], self._models[index], {}
        for budget in self.budgets(index):
            features = {name: self.samples[0][name] for name in model.input}
            if segment is None:
                shapes = {name: value.shape for name, value in features.items()}
                graph = convert(lambda **tensors: model(tensors, training=False), shapes, self._precision, lambda: iter(self.samples))
                expected = {name: value.numpy() for name, value in model(features, training=False).items()}
                _check_close(self._content(graph), features, expected, self._precision)
            else:
                graph = segment_graph(segment, budget, self._precision, self.samples)
                check_segment(segment, budget, self._content(graph), features, self._precision)
            graphs[budget] = self._with_decision(graph, index, budget)
        return graphs

    def signatures(self, input_type: str = "uint8") -> dict[str, flatbuffer.Graph]:
        """All graphs by the names that they have in a file, see `mess_runtime.bundle`."""
        graphs = {bundles.segment_signature(self._exits[0]): self.first(input_type)}
        for index, exit_name in enumerate(self._exits[1:], 1):
            graphs |= {bundles.segment_signature(exit_name, budget): graph for budget, graph in self.later(index).items()}
        return graphs

    def check(self, content: bytes, input_type: str = "uint8") -> None:
        """Runs a file's signatures one after another, at every budget, and compares each with Keras on what the file made before.

        Raises:
          ExportError: a mask, a feature or what is sure differs, or a cell that was left alone has changed. The network of int8 is
            compared by `later` only.
        """
        interpreter = Interpreter(model_content=content, num_threads=os.cpu_count())

        def run(signature: str, tensors: Tensors) -> dict[str, np.ndarray]:
            runner = interpreter.get_signature_runner(signature)
            return runner(**{name: tensors[name] for name in runner.get_input_details()})

        beginning = run(bundles.segment_signature(self._exits[0]), {bundles.IMAGE: self._images[0].astype(input_type)})
        for budget in self._regions.budgets:
            before = beginning
            for index, (segment, model) in enumerate(zip(self.segments, self._models[1:], strict=True), 1):
                here = budget if budget in self.budgets(index) else self._regions.cells
                signature = bundles.segment_signature(self._exits[index], here)
                got = run(signature, before)
                features = {name: before[name] for name in model.input}
                if segment is None:
                    chosen, made = tf.ones((1, *self._regions.grid), tf.bool), model(features, training=False)
                else:
                    chosen = segment.active(segment.most_unsure(before[SURE], here))
                    made = segment.masked(features, chosen)
                    if here < self._regions.cells:
                        made[LOGITS] = segment.answer(before[ANSWER], made[LOGITS], chosen & (before[SURE] < GONE))
                try:
                    made = {name: value.numpy() for name, value in made.items()}
                    self._check(got, index, made, chosen & (before[SURE] < GONE), before[bundles.MASK])
                except ExportError as error:
                    raise ExportError(f"{signature}: {error}") from error
                before = before | got

    def _check(self, got: Tensors, index: int, made: Tensors, active: tf.Tensor, before: np.ndarray | None) -> None:
        """Compares what a file made at an exit with what Keras made there of the same features, and the mask before."""
        threshold, expected = self._thresholds[index], {}
        logits = tf.constant(made[LOGITS])
        decided = self._decided(logits, index)
        changed = _of_pixels(active, self._by_pixel).numpy()
        mask = decided[bundles.MASK].numpy()
        if before is not None:
            if (got[bundles.MASK] != before)[~changed].any():
                raise ExportError(f"{bundles.MASK}: changed where a cell was left alone")
            mask = np.where(changed, mask, before)
        if threshold and ((got[SURE] == GONE) != ~active.numpy()).any():
            raise ExportError(f"{SURE}: must be {GONE:g} where a cell has left and only there, got {got[SURE].tolist()}")
        if self._precision not in TOLERANCE:
            return
        tolerance = TOLERANCE[self._precision]
        expected = {name: value for name, value in made.items() if name in got} | {bundles.MASK: mask}
        if threshold:
            expected[ANSWER] = made[LOGITS]
        check_outputs(got, expected, {bundles.MASK: made[LOGITS]}, tolerance)
        if threshold:
            error = np.abs(got[SURE] - np.where(active, decided[SURE], GONE)).mean()
            if not error <= max(10 * tolerance, 1 / mask.size):  # as many pixels as of a whole image, see `check_outputs`
                raise ExportError(f"{SURE}: differs from Keras by {error:.2g} as a mean over the cells")

    def _content(self, graph: flatbuffer.Graph) -> bytes:
        return flatbuffer.write({bundles.SIGNATURE: graph}, self._precision != FP32)

    def _with_decision(self, graph: flatbuffer.Graph, index: int, budget: int | None) -> flatbuffer.Graph:
        """A graph that makes logits, and for a later exit cells, as one that makes the mask and how sure its cells are."""
        handed = [name for name in self._models[index].output if name != LOGITS]
        decision = self._decision(graph.outputs[LOGITS].shape, index, budget)
        given = {name: tensor for name, tensor in decision.inputs.items() if name not in (LOGITS, CELLS)}
        answers = self._thresholds[index] and ANSWER not in decision.outputs
        given = {name: graph.inputs.get(name, tensor) for name, tensor in given.items()}
        graph = flatbuffer.Graph(graph.inputs | given, graph.outputs | given, graph.operations)
        joined = flatbuffer.join(graph, decision, {name: name for name in decision.inputs}, "made.")
        outputs = {made: joined.outputs[f"made.{made}"] for made in decision.outputs}
        outputs |= {name: joined.outputs[name] for name in handed} | ({ANSWER: joined.outputs[LOGITS]} if answers else {})
        return flatbuffer.cut(joined, joined.inputs, outputs)

    def _decided(self, logits: tf.Tensor, index: int) -> dict[str, tf.Tensor]:
        """An exit's mask, and of all but the last how sure its cells are."""
        if not (threshold := self._thresholds[index]):
            return decide(logits, self._size, ())
        return decide_by_cell(logits, self._size, threshold, self._by_pixel, self.segments[index] is None)

    def _decision(self, logits: tuple[int, ...], index: int, budget: int | None) -> flatbuffer.Graph:
        """An exit's logits, and for a later one the cells, how sure they were and the mask before, to the mask and how sure they are."""
        threshold = self._thresholds[index]
        selects = budget is not None and budget < self._regions.cells

        def function(logits: tf.Tensor, **before: tf.Tensor) -> dict[str, tf.Tensor]:
            if budget is not None:
                active = before[SURE] < GONE
            if selects:
                segment = self.segments[index - 1]
                active &= segment.active(before[CELLS][None])
                size = logits.shape[1:3]
                there = _of_pixels(active, tuple(segment.cells_of(side, axis) for axis, side in enumerate(size)))[..., None]
                logits = tf.where(there, logits, resized(before[ANSWER], size))
            made = self._decided(logits, index)
            if budget is None:
                return made
            if threshold:
                made[SURE] = tf.where(active, made[SURE], GONE)
                if selects:
                    made[ANSWER] = logits
            changed = _of_pixels(active, self._by_pixel)
            new, old = (tf.cast(masks[bundles.MASK], tf.int32) for masks in (made, before))  # no runtime compares or selects uint8
            return made | {bundles.MASK: tf.cast(tf.where(changed, new, old), tf.uint8)}

        inputs: dict = {LOGITS: logits}
        if budget is not None:
            inputs |= {SURE: (1, *self._regions.grid), bundles.MASK: tf.TensorSpec((1, *self._size), tf.uint8)}
        if selects:
            inputs |= {CELLS: tf.TensorSpec((budget,), tf.int32), ANSWER: self.samples[0][self._exits[index - 1]].shape}
        return convert(function, inputs)


def _of_pixels(cells: tf.Tensor, by_pixel: tuple[np.ndarray, np.ndarray]) -> tf.Tensor:
    """bool [1, rows, columns] of cells to [1, H, W], by products: GPU delegates refuse or mistake a GATHER by a list of rows."""
    rows, columns = (np.eye(places[-1] + 1, dtype=np.float32)[places].T for places in by_pixel)
    wide = tf.matmul(tf.reshape(tf.cast(cells, tf.float32), cells.shape[1:]), columns)
    changed = tf.transpose(tf.matmul(tf.transpose(wide), rows)) > 0.5
    return tf.reshape(changed, (1, *changed.shape))


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
    _check_close(content, inputs, {name: value.numpy() for name, value in expected.items()}, precision)


def _check_close(content: bytes, inputs: Tensors, expected: Mapping[str, np.ndarray], precision: str) -> None:
    got = run_signature(content, inputs)
    whole = {name: value for name, value in expected.items() if value.dtype == np.int32}
    for name, value in whole.items():
        if not np.array_equal(got[name], value):
            raise ExportError(f"{name}: differs from Keras: {got[name].tolist()}, not {value.tolist()}")
    expected = {name: value for name, value in expected.items() if name not in whole}
    if precision in TOLERANCE:
        check_outputs(got, expected, {}, TOLERANCE[precision])
        return
    for name, value in expected.items():
        error = math.sqrt(np.square(got[name] - value).mean(dtype=np.float64) / max(np.square(value).mean(dtype=np.float64), 1e-12))
        if not error <= INT8_TOLERANCE:  # which a NaN is not either
            raise ExportError(f"{name}: differs from Keras by {error:.2g} of its size")
