"""Segments of a network computed where the image still needs them: masked, as a reference and for training, and at a list of cells.

A cell is a square of `cell` x `cell` positions of the map that the deepest residual blocks of a segment work on (cut off at the map's end).
Cells whose answer stands have left; the others are active. A segment computes its residual blocks at active positions only:

* A block that adds its input adds nothing where a position has left: `x + active * branch(x)`. The features of such a position stay as
  they were, and its neighbours see them so.
* What neighbours see inside a branch, where a position that has left has no features, is `neighbours`:
    * `stale`: what the layers before the last k x k convolution of the branch make of the features that stayed. They are computed
      everywhere, and so is everything outside of such branches.
    * `nearest`: the features of the nearest active position: after each of REACH steps, a position without takes those of the last one, in
      the order of the map, of its 3 x 3 neighbours that have; further away it is the mean over all active positions. Layers that
      change the number of channels, and all others that work position by position or on neighbours, are computed at active positions as
      well. From the first of them on no position that has left has features, and layers that read a whole map (resizing, pooling) read it
      filled up so.
    * `zeros`: zeros, where `nearest` has the nearest one or the mean.

A segment without such blocks, as a head of DeepLabV3's kind, is like one branch on the map where most of its work is done, but for what
it adds. What such a head reads is known everywhere: where it has one layer of k x k convolutions, leaving cells out changes nothing at
the others.

With everything active, each of the three is the network itself. Layers on other maps are always dense.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from mess_runtime.bundle import NEIGHBOURS, Regions, check
from mess_tf.network.costs import Node, graph_nodes, with_input_size
from mess_tf.network.exits import TAP
from mess_tf.network.model import FINAL, MultiExitNetwork

STALE, NEAREST, ZEROS = NEIGHBOURS
REACH = 4  # positions
TILE_VALUES = 120_000  # float32 that are gathered at once: they stay in a level 2 cache until they are convolved

POSITIONWISE = (
    keras.layers.Activation,
    keras.layers.Add,
    keras.layers.BatchNormalization,
    keras.layers.Concatenate,
    keras.layers.Dropout,
    keras.layers.Multiply,
    keras.layers.ReLU,
)
# Where a tensor is known: at every position; at active ones; at active ones, with what its block read elsewhere.
_MAP, _LISTED, _KEPT = "map", "listed", "kept"


@dataclasses.dataclass(frozen=True)
class ResidualBlock:
    """A block whose output is its input plus a branch of it.

    Attributes:
      input: name of the tensor that the block reads, and adds.
      output: name of the sum.
      branch: names of what lies between them, in order.
    """

    input: str
    output: str
    branch: tuple[str, ...]


def residual_blocks(nodes: Sequence[Node]) -> list[ResidualBlock]:
    """Finds the sums of two tensors one of which is made of the other alone, in order; blocks with a layer in their shortcut are none."""
    by_name = {node.name: node for node in nodes}
    found = []
    for node in nodes:
        if not isinstance(node.operation, keras.layers.Add) or len(node.inputs) != 2:
            continue
        for source, end in (node.inputs, node.inputs[::-1]):
            branch, stack = set(), [end]
            while stack and None not in branch:
                name = stack.pop()
                if name != source and name not in branch:
                    inputs = by_name[name].inputs if name in by_name else ()
                    branch.add(name if inputs else None)
                    stack.extend(inputs)
            if branch and None not in branch:
                found.append(ResidualBlock(source, node.name, tuple(each.name for each in nodes if each.name in branch)))
    return found


class DenseSegmentError(ValueError):
    """No layer of a segment, or of all segments of a chain, can be computed at some positions only."""


class ActiveSegment:
    """A segment of a network between chosen exits (see `MultiExitNetwork.segments`), with its layers and their weights, at active cells.

    Attributes:
      inputs: shape (1, h, w, C) of each tensor that it reads, by name.
      outputs: names of what it makes beside `logits`: the tensors handed on.
      blocks: the residual blocks that are computed at active positions only; empty in a segment without.
      size: (height, width) of the map on which cells lie.
      cell: side of a cell in positions of that map.
      neighbours: see above.
    """

    def __init__(
        self,
        network: MultiExitNetwork,
        candidates: Sequence[str],
        index: int,
        input_size: tuple[int, int],
        cell: int = 1,
        neighbours: str = STALE,
    ):
        """Plans what is computed where.

        Args:
          network: the multi-exit network.
          candidates: one per exit, shallow to deep.
          index: of the segment, at least 1: the first one has no earlier answer.
          input_size: (height, width) in pixels of the image.
          cell: side of a cell in positions.
          neighbours: see above.

        Raises:
          DenseSegmentError: if no layer can be computed at some positions only.
          ValueError: if a residual block cannot; the message names the layer.
        """
        check(0 < index < len(candidates), "index", f"of a segment after the first, below {len(candidates)}", index)
        check(cell >= 1, "cell", "at least 1", cell)
        check(neighbours in NEIGHBOURS, "neighbours", f"one of {', '.join(NEIGHBOURS)}", neighbours)
        self.cell, self.neighbours = cell, neighbours
        segment = network.segments(candidates)[index]
        self.outputs = tuple(name for name in segment.output if name != "logits")
        nodes, self._logits = _nodes(network, candidates[index], input_size)
        self._nodes = _needed(nodes, {*segment.input}, {*self.outputs, self._logits})
        self.inputs = {node.name: (1, *node.output.shape[1:]) for node in self._nodes if node.name in segment.input}
        everywhere = {node.name: node for node in nodes}
        inside = [node for node in self._nodes if node.name not in self.inputs]
        blocks = [block for block in residual_blocks(nodes) if {block.output, *block.branch} <= {node.name for node in inside}]
        shapes = {node.name: tuple(node.output.shape[1:3]) for node in nodes if len(node.output.shape) == 4}
        work: dict[tuple[int, int], int] = {}
        for block in blocks:
            size = shapes[block.output]
            work[size] = work.get(size, 0) + sum(everywhere[name].macs for name in block.branch)
        for node in () if blocks else inside:
            if _kind(node, shapes):
                work[shapes[node.name]] = work.get(shapes[node.name], 0) + node.macs
        if not any(work.values()):
            reason = f"{candidates[index]}: must have a convolution of stride 1, after what it reads ({', '.join(self.inputs)})"
            raise DenseSegmentError(f"{reason}, got {[node.name for node in inside if node.macs][:6]}")
        self.size = max(work, key=work.get)
        self.blocks = tuple(block for block in blocks if shapes[block.output] == self.size)
        self._kinds = {node.name: _kind(node, shapes) if shapes.get(node.name) == self.size else None for node in inside}
        for block in self.blocks:
            for name in block.branch:
                if self._kinds[name] is None:
                    raise ValueError(
                        f"{candidates[index]}: the branch of {block.output} must work position by position or on neighbours, "
                        f"with stride 1; {name} ({type(everywhere[name].operation).__name__}) does not"
                    )
        self._where = self._plan(everywhere)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of cells."""
        return tuple(math.ceil(side / self.cell) for side in self.size)

    def with_cell(self, cell: int) -> "ActiveSegment":
        """The same segment with cells of another side."""
        other = copy.copy(self)
        other.cell = cell
        return other

    def shares_of_macs(self) -> tuple[float, float]:
        """Of the segment's multiply-accumulates: the share that is computed everywhere, and the share at active positions only."""
        listed = sum(node.macs for node in self._nodes if node.name not in self.inputs and self._where[node.name] != _MAP)
        total = sum(node.macs for node in self._nodes if node.name not in self.inputs)
        return 1 - listed / total, listed / total

    def macs(self, cells: int) -> int:
        """Multiply-accumulates where so many cells are active; with all of them, those of the network itself."""
        nodes = [node for node in self._nodes if node.name not in self.inputs]
        listed = sum(node.macs for node in nodes if self._where[node.name] != _MAP)
        share = 1 if cells == math.prod(self.grid) else cells * self.cell**2 / math.prod(self.size)
        return sum(node.macs for node in nodes) - listed + round(listed * share)

    @property
    def parameters(self) -> int:
        """Number of weights, moving statistics included."""
        layers = {id(node.operation): node.operation for node in self._nodes if node.name not in self.inputs}
        return sum(math.prod(weight.shape) for layer in layers.values() for weight in getattr(layer, "weights", ()))

    def _plan(self, nodes: Mapping[str, Node]) -> dict[str, str]:
        """Where each tensor is known."""
        sums = {block.output: block for block in self.blocks}
        branches = [block.branch for block in self.blocks] or [[name for name, kind in self._kinds.items() if kind]]
        behind = set().union(*map(self._behind, branches))
        where = dict.fromkeys(self.inputs, _MAP)
        for node in self._nodes:
            name = node.name
            if name in where:
                continue
            source = node.inputs[0] if node.inputs else ""
            if name in sums:
                where[name] = _LISTED if where[sums[name].input] == _LISTED else _KEPT
            elif where.get(source) == _KEPT and source in sums and _same_activation(node, nodes[sums[source].input]):
                where[name] = _KEPT
            elif name in behind if self.neighbours == STALE else self._kinds[name]:
                where[name] = _LISTED
            else:
                where[name] = _MAP
        return where

    def _behind(self, branch: Sequence[str]) -> set[str]:
        """The layers of a branch whose neighbours nothing in it reads: its last k x k convolutions and what follows."""
        nodes = {node.name: node for node in self._nodes}
        before: set[str] = set()
        for name in reversed(branch):
            readers = [nodes[other] for other in branch if name in nodes[other].inputs]
            if any(reader.name in before or self._kinds[reader.name] is not _positionwise for reader in readers):
                before.add(name)
        return {*branch} - before

    def sure(self, confident: tf.Tensor) -> tf.Tensor:
        """The share of a cell's pixels that are confident: [B, H, W] of 0 and 1 to float32 [B, rows, columns]."""
        by_row, by_column = (_one_hot(self.cells_of(length, axis)) for axis, length in enumerate(confident.shape[1:3]))
        return tf.einsum("bhw,hr,wc->brc", tf.cast(confident, tf.float32), by_row / by_row.sum(0), by_column / by_column.sum(0))

    def most_unsure(self, sure: tf.Tensor, count: int) -> tf.Tensor:
        """Numbers of the cells with the least of `sure` [B, rows, columns], of equal ones the first by rows: int32 [B, count]."""
        return tf.math.top_k(-tf.reshape(sure, (-1, math.prod(self.grid))), count).indices

    def merged(self, early: tf.Tensor, late: tf.Tensor, active: tf.Tensor) -> tf.Tensor:
        """What this segment's exit makes at active cells, what an earlier one made elsewhere: [B, H, W, ...]; `active` as in `masked`."""
        rows, columns = (self.cells_of(length, axis) for axis, length in enumerate(early.shape[1:3]))
        where = tf.gather(tf.gather(tf.cast(active, tf.bool), rows, axis=1), columns, axis=2)
        return tf.where(tf.reshape(where, (*where.shape, *[1] * (len(early.shape) - 3))), late, early)

    def answer(self, early: tf.Tensor, late: tf.Tensor, active: tf.Tensor) -> tf.Tensor:
        """This segment's logits at active cells, those of an earlier exit, brought to the same size, elsewhere: float32 [B, h, w, C].

        A pixel near the border of a cell is a mixture of the logits on both sides. Of a cell that has left the earlier exit knows them
        better than whatever fills this segment's features there.
        """
        return self.merged(resized(early, late.shape[1:3]), late, active)

    def cells_of(self, length: int, axis: int) -> np.ndarray:
        """Row or column of the cell that each row or column of an image lies in: that of the nearest position."""
        return np.arange(length) * self.size[axis] // length // self.cell

    def active(self, cells: tf.Tensor) -> tf.Tensor:
        """Indices of cells int32 [B, n], in the order of rows, to a map bool [B, rows, columns] that holds where they are."""
        rows, columns = self.grid
        return tf.reshape(tf.reduce_any(tf.equal(cells[:, :, None], tf.range(rows * columns)), 1), (-1, rows, columns))

    def masked(self, tensors: Mapping[str, tf.Tensor], active: tf.Tensor) -> dict[str, tf.Tensor]:
        """Computes everything, and what active cells do not need only to throw it away: what `gathered` must equal, and for training.

        Args:
          tensors: by name, float32 [B, h, w, C].
          active: bool [B, rows, columns], see `grid`.

        Returns:
          `logits` and the tensors handed on, by name: at positions that have left as they stayed, or filled up (see above).
        """
        active = self._positions(tf.cast(active, tf.bool))
        fill = _Filler(active, self.neighbours == ZEROS)
        values = {name: tensors[name] for name in self.inputs}
        sums = {block.output: block.input for block in self.blocks}
        for node in self._nodes:
            if node.name in values:
                continue
            read, where = {}, self._where[node.name]
            for name in node.inputs:
                unknown = self._where[name] == _LISTED and (where == _MAP or self._kinds[node.name] is not _positionwise)
                read[name] = fill(values[name]) if unknown else values[name]
            made = _call(node, read)
            if node.name in sums and where == _KEPT:
                made = tf.where(active, made, values[sums[node.name]])
            values[node.name] = made
        results = (self._logits, *self.outputs)
        return self._results({name: fill(values[name]) if self._where[name] == _LISTED else values[name] for name in results})

    def dense(self, tensors: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Computes the same with every cell active: the network itself."""
        values = {name: tensors[name] for name in self.inputs}
        for node in self._nodes:
            if node.name not in values:
                values[node.name] = _call(node, values)
        return self._results(values)

    def gathered(self, tensors: Mapping[str, tf.Tensor], cells: tf.Tensor) -> dict[str, tf.Tensor]:
        """Computes the same for one image at active positions only, of builtin TFLite operations.

        Args:
          tensors: by name, float32 [1, h, w, C].
          cells: int32 [n], the numbers of active cells in the order of rows, in any order, each once.

        Returns:
          As `masked`.
        """
        places = _Places(self, cells)
        values = {name: _Value(places, whole=tensors[name]) for name in self.inputs}
        sums = {block.output: block.input for block in self.blocks}
        for node in self._nodes:
            name, where = node.name, self._where[node.name]
            if name in values:
                continue
            if where == _MAP:
                made = _Value(places, whole=_call(node, {source: values[source].whole for source in node.inputs}))
            else:
                rows = self._kinds[name](node, values, places)
                kept = None
                if where == _KEPT:
                    source = values[sums.get(name, node.inputs[0])]
                    kept = source.kept if source.kept is not None else source.whole
                made = _Value(places, rows=rows, kept=kept)
            values[name] = made
        return self._results({name: values[name].whole for name in (self._logits, *self.outputs)})

    def _results(self, values: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {"logits": values[self._logits]} | {name: values[name] for name in self.outputs}

    def _positions(self, active: tf.Tensor) -> tf.Tensor:
        """[B, rows, columns] of cells to [B, h, w, 1] of positions."""
        wide = tf.repeat(tf.repeat(active, self.cell, 1), self.cell, 2)
        return wide[:, : self.size[0], : self.size[1], None]


def _kind(node: Node, shapes: Mapping[str, tuple[int, int]]) -> Callable | None:
    """How a layer is computed at some positions of its map; None if it cannot be."""
    operation, layers, size = node.operation, keras.layers, shapes.get(node.name, (1, 1))
    if size == (1, 1) or any(shapes.get(name) not in (size, (1, 1)) for name in node.inputs):
        return None
    if isinstance(operation, layers.Conv2D | layers.DepthwiseConv2D):
        kernel, strides = operation.kernel_size, operation.strides
        if max(strides) > 1:
            return None
        if max(kernel) == 1:
            return _positionwise
        if operation.padding != "same" or any(side % 2 == 0 for side in kernel):
            return None
        if isinstance(operation, layers.DepthwiseConv2D):
            return _depthwise
        return _convolution if operation.groups == 1 else None
    by_channel = getattr(operation, "axis", -1) in (-1, 3)
    return _positionwise if isinstance(operation, POSITIONWISE) and by_channel else None


def resized(logits: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Logits [B, h, w, C] as a map of another size: means where it is a whole number of times smaller, else bilinear."""
    height, width = logits.shape[1:3]
    if (height, width) == tuple(size):
        return logits
    if height % size[0] == width % size[1] == 0:
        factors = (height // size[0], width // size[1])
        return tf.nn.avg_pool2d(logits, factors, factors, "VALID")
    return tf.image.resize(logits, size)


def _one_hot(numbers: np.ndarray) -> np.ndarray:
    return np.eye(numbers[-1] + 1, dtype=np.float32)[numbers]


def _nodes(network: MultiExitNetwork, candidate: str, input_size: tuple[int, int]) -> tuple[list[Node], str]:
    """All calls of the original and of a candidate's head, whose names begin with the candidate's, and the name of its logits."""
    nodes = graph_nodes(with_input_size(network.original, input_size))
    if candidate == FINAL:
        return nodes, nodes[-1].name
    shapes = {TAP + node.name: tuple(node.output.shape[1:3]) for node in nodes}
    names: dict[str, str] = {}
    for node in graph_nodes(with_input_size(network.heads[candidate], shapes)):
        if node.inputs:
            names[node.name] = f"{candidate}/{node.name}"
            inputs = tuple(names[name] for name in node.inputs)
            nodes.append(dataclasses.replace(node, name=names[node.name], inputs=inputs))
        else:
            names[node.name] = node.name.removeprefix(TAP)
    return nodes, nodes[-1].name


def _needed(nodes: list[Node], given: Collection[str], wanted: Collection[str]) -> list[Node]:
    """The calls that make what is wanted of what is given, the given ones included."""
    needed = set(wanted)
    for node in reversed(nodes):
        if node.name in needed and node.name not in given:
            needed.update(node.inputs)
    return [node for node in nodes if node.name in needed]


def _same_activation(node: Node, other: Node) -> bool:
    """Whether a layer rectifies what the other has rectified in the same way, and so changes nothing."""

    def limits(operation: keras.Operation) -> str | None:
        if isinstance(operation, keras.layers.ReLU) and not operation.threshold and not operation.negative_slope:
            return f"relu{operation.max_value or ''}".removesuffix(".0")
        name = getattr(getattr(operation, "activation", None), "__name__", "")
        return name if isinstance(operation, keras.layers.Activation) and name in ("relu", "relu6") else None

    return limits(node.operation) is not None and limits(node.operation) == limits(other.operation)


def _call(node: Node, tensors: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """Calls a layer on other tensors than in its graph."""
    operation, place, _ = node.output._keras_history
    call = operation._inbound_nodes[place]
    read = {id(tensor): tensors[name] for tensor, name in zip(call.input_tensors, node.inputs, strict=True)}
    args, kwargs = call.arguments.fill_in(read)
    if isinstance(operation, keras.layers.BatchNormalization | keras.layers.Dropout):
        kwargs["training"] = False
    return operation(*args, **kwargs)


def segment_with_cells(
    network: MultiExitNetwork, candidates: Sequence[str], index: int, input_size: tuple[int, int], pixels: int, neighbours: str
) -> ActiveSegment:
    """A segment whose cells have so many pixels of the image to a side, as nearly as its positions allow; see `ActiveSegment`.

    Raises:
      ValueError: all of the image is one cell.
    """
    segment = ActiveSegment(network, candidates, index, input_size, neighbours=neighbours)
    segment = segment.with_cell(max(1, round(pixels * segment.size[0] / input_size[0])))
    check(math.prod(segment.grid) > 1, "region_cell", f"less than the image's {' x '.join(map(str, input_size))} pixels", pixels)
    return segment


def segments_on_grid(
    network: MultiExitNetwork, candidates: Sequence[str], input_size: tuple[int, int], regions: Regions
) -> list[ActiveSegment | None]:
    """The segments after the first, with the cells of a deployment; None for those that are always dense, or shall be (`regions.dense`).

    Raises:
      DenseSegmentError: all can only be dense.
      ValueError: a segment cannot be computed at some positions only, or the cells do not fit.
    """
    found: list[ActiveSegment | None] = []
    for index in range(1, len(candidates)):
        try:
            exit_name = candidates[index].partition(".")[0]
            if exit_name in regions.dense:
                raise DenseSegmentError(f"{exit_name} shall be dense")
            segment = ActiveSegment(network, candidates, index, input_size, neighbours=regions.neighbours)
        except DenseSegmentError as error:
            if index + 1 == len(candidates) and not any(found):
                reason = "regions: must leave out work in one segment at least, got only dense ones"
                raise DenseSegmentError(f"{reason}; {error}") from error
            found.append(None)
            continue
        fitting = [each for each in map(segment.with_cell, range(1, max(segment.size) + 1)) if each.grid == regions.grid]
        positions = " x ".join(map(str, segment.size))
        check(len(fitting) > 0, "regions.grid", f"of squares of the {positions} positions of {candidates[index]}", regions.grid)
        found.append(fitting[0])
    first, *others = filter(None, found)
    for axis, side in enumerate(input_size):
        same = all(np.array_equal(first.cells_of(side, axis), each.cells_of(side, axis)) for each in others)
        check(same, "regions.grid", "such that the cells of all segments are the same pixels", regions.grid)
    return found


class _Filler:
    """Gives positions that have left the features of others, see above. `active` is bool [B, h, w, 1]."""

    def __init__(self, active: tf.Tensor, zeros: bool):
        self._active, self._zeros = active, zeros

    def __call__(self, values: tf.Tensor) -> tf.Tensor:
        """Fills up features [B, h, w, C] that are known at active positions."""
        known = tf.where(self._active, values, 0.0)
        if self._zeros:
            return known
        mean = tf.reduce_sum(known, (1, 2)) / tf.maximum(tf.reduce_sum(tf.cast(self._active, tf.float32), (1, 2)), 1.0)
        rows = tf.concat([mean[:, None], tf.reshape(known, (-1, math.prod(values.shape[1:3]), values.shape[3]))], 1)
        return tf.reshape(tf.gather(rows, self._nearest, batch_dims=1), tf.shape(values))

    @functools.cached_property
    def _nearest(self) -> tf.Tensor:
        """The number of the nearest active position in the order of rows, plus 1; 0 where none is within reach: int32 [B, h·w]."""
        height, width = self._active.shape[1:3]
        order = np.arange(1, height * width + 1, dtype=np.float32).reshape(1, height, width, 1)
        nearest = tf.where(self._active, order, 0.0)
        for _ in range(REACH):
            nearest = tf.where(nearest > 0, nearest, tf.nn.max_pool2d(nearest, 3, 1, "SAME"))
        return tf.reshape(tf.cast(nearest, tf.int32), (-1, height * width))


class _Places:
    """Where the positions of active cells are: in maps by number, in the order of rows, and in the list, cell after cell."""

    def __init__(self, segment: ActiveSegment, cells: tf.Tensor):
        self.segment, self.cells = segment, cells
        self.count = cells.shape[0] * segment.cell**2  # of the list
        self.positions = math.prod(segment.size)

    @functools.cached_property
    def listed(self) -> tf.Tensor:
        """The number of each position in the list, int32 [count]; in cells that the map cuts off, the nearest one on it."""
        return self._of_cells(np.minimum(self._numbers(self.own), self.positions - 1) if self._cut_off else self._numbers(self.own))

    @functools.cached_property
    def own(self) -> np.ndarray:
        """Rows and columns of a cell's own positions, from its corner: int [cell², 2]."""
        return np.stack(np.indices((self.segment.cell,) * 2), -1).reshape(-1, 2)

    @functools.cached_property
    def rows(self) -> tf.Tensor:
        """Place in the list of every position of the map, plus 1; 0 if it has left: int32 [positions]."""
        cell, (rows, columns) = self.segment.cell, self.segment.grid
        first = tf.scatter_nd(self.cells[:, None], tf.range(1, self.count + 1, cell**2), [rows * columns])
        if cell == 1:
            return first
        y, x = np.indices(self.segment.size, np.int32).reshape(2, -1)
        first = tf.gather(first, y // cell * columns + x // cell)
        return tf.where(first > 0, first + (y % cell * cell + x % cell), 0)

    @functools.cached_property
    def nearest(self) -> tf.Tensor:
        """As `rows`, but of the nearest active position; 0 where none is within reach."""
        order = np.arange(1, self.positions + 1, dtype=np.int32)
        found = tf.reshape(tf.where(self.rows > 0, order, 0), self.segment.size)
        height, width = self.segment.size
        for _ in range(REACH):
            padded = tf.pad(found, [[1, 1], [1, 1]])
            around = tf.maximum(tf.maximum(padded[:height], padded[1 : height + 1]), padded[2:])
            around = tf.maximum(tf.maximum(around[:, :width], around[:, 1 : width + 1]), around[:, 2:])
            found = tf.where(found > 0, found, around)
        return tf.gather(tf.concat([[0], self.rows], 0), tf.reshape(found, (self.positions,)))

    @functools.cached_property
    def shares(self) -> tf.Tensor | float:
        """What each of the list counts for in a mean over active positions, float32 [count, 1]."""
        if not self._cut_off:
            return 1 / self.count
        inside = tf.cast(self._of_cells(self._numbers(self.own)) < self.positions, tf.float32)[:, None]
        return inside / tf.reduce_sum(inside)

    def around(self, offsets: np.ndarray) -> tf.Tensor:
        """Numbers of the positions at these rows and columns [m, 2] from the corner of each active cell, int32 [n·m].

        What is off the map has the number behind the last.
        """
        return self._of_cells(self._numbers(offsets))

    @property
    def _cut_off(self) -> bool:
        return any(side % self.segment.cell for side in self.segment.size)

    def _numbers(self, offsets: np.ndarray) -> np.ndarray:
        """Those of `around`, for all cells: int32 [cells, m]."""
        corners = np.stack(np.indices(self.segment.grid), -1).reshape(-1, 1, 2) * self.segment.cell
        y, x = np.moveaxis(corners + offsets, -1, 0)
        height, width = self.segment.size
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        return np.where(inside, y * width + x, self.positions).astype(np.int32)

    def _of_cells(self, numbers: np.ndarray) -> tf.Tensor:
        if np.array_equal(numbers, np.arange(self.positions)[:, None]):
            return self.cells
        return tf.reshape(tf.gather(numbers, self.cells), (-1,))


class _Value:
    """A tensor [1, h, w, C] of which there is the whole, or the list of its active positions [1, count, 1, C].

    Attributes:
      kept: the whole tensor whose values the positions that have left have, where that is known.
    """

    def __init__(self, places: _Places, whole: tf.Tensor | None = None, rows: tf.Tensor | None = None, kept: tf.Tensor | None = None):
        self._places, self._whole, self._rows, self.kept = places, whole, rows, kept

    @property
    def rows(self) -> tf.Tensor:
        if self._rows is None:
            on_map = tuple(self._whole.shape[1:3]) == self._places.segment.size
            self._rows = tf.gather(_flat(self._whole), self._places.listed)[None, :, None] if on_map else self._whole
        return self._rows

    @property
    def whole(self) -> tf.Tensor:
        if self._whole is None:
            source, index = self._source(True)
            self._whole = tf.reshape(tf.gather(source, index), (1, *self._places.segment.size, source.shape[-1]))
        return self._whole

    def around(self, offsets: np.ndarray) -> tuple[tf.Tensor, tf.Tensor]:
        """Rows [R, C], and which of them are the features at rows and columns [m, 2] from the corner of each active cell, int32 [n·m]."""
        places = self._places
        numbers = places.around(offsets)
        if self._whole is not None:
            return _with_zeros(_flat(self._whole)), numbers
        distance = np.abs(offsets - np.clip(offsets, 0, places.segment.cell - 1)).max()
        source, index = self._source(distance > REACH)
        source = _with_zeros(source)
        return source, tf.gather(tf.concat([index, [source.shape[0] - 1]], 0), numbers)

    def _source(self, far: bool) -> tuple[tf.Tensor, tf.Tensor]:
        """Rows [R, C], and for each position of the map which of them is its own; `far`: whether there may be none within reach."""
        places, rows = self._places, _flat(self._rows)
        if self.kept is not None:
            left = np.arange(places.count, places.count + places.positions, dtype=np.int32)
            return tf.concat([rows, _flat(self.kept)], 0), tf.where(places.rows > 0, places.rows - 1, left)
        if places.segment.neighbours == ZEROS:
            return tf.concat([tf.zeros_like(rows[:1]), rows], 0), places.rows
        if not far:
            return rows, places.nearest - 1
        mean = tf.reduce_sum(rows * places.shares, 0, keepdims=True)
        return tf.concat([mean, rows], 0), places.nearest


def _flat(tensor: tf.Tensor) -> tf.Tensor:
    return tf.reshape(tensor, (-1, tensor.shape[-1]))


def _with_zeros(rows: tf.Tensor) -> tf.Tensor:
    return tf.pad(rows, [[0, 1], [0, 0]])


def _positionwise(node: Node, values: Mapping[str, _Value], places: _Places) -> tf.Tensor:
    return _call(node, {name: values[name].rows for name in node.inputs})


def _depthwise(node: Node, values: Mapping[str, _Value], places: _Places) -> tf.Tensor:
    """A depthwise convolution of tiles: each cell with the neighbours that it reads. Of a cell of one position, only those are gathered."""
    layer, cell = node.operation, places.segment.cell
    steps = layer.dilation_rate if cell == 1 else (1, 1)
    reach = [side // 2 * rate for side, rate in zip(layer.kernel_size, layer.dilation_rate, strict=True)]
    rows, columns = (np.arange(-radius, cell + radius, step) for radius, step in zip(reach, steps, strict=True))
    offsets = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    source, index = values[node.inputs[0]].around(offsets)
    dilations = None if cell == 1 else layer.dilation_rate
    step = max(1, TILE_VALUES // (len(offsets) * source.shape[1])) * len(offsets)
    made = []
    for start in range(0, index.shape[0], step):
        part = index[start : min(start + step, index.shape[0])]  # converters refuse an end behind the last
        tiles = tf.reshape(tf.gather(source, part), (-1, len(rows), len(columns), source.shape[1]))
        made.append(tf.nn.depthwise_conv2d(tiles, layer.kernel, (1, 1, 1, 1), "VALID", dilations=dilations))
    made = tf.concat(made, 0) if len(made) > 1 else made[0]
    return _activated(layer, tf.reshape(made, (1, places.count, 1, made.shape[-1])))


def _convolution(node: Node, values: Mapping[str, _Value], places: _Places) -> tf.Tensor:
    """A convolution as one product with the list of all that each position reads."""
    layer = node.operation
    taps = (np.stack(np.indices(layer.kernel_size), -1) - np.array(layer.kernel_size) // 2) * layer.dilation_rate
    offsets = places.own[:, None] + taps.reshape(1, -1, 2)
    read = tf.gather(*values[node.inputs[0]].around(offsets.reshape(-1, 2)))
    channels = read.shape[-1] * math.prod(layer.kernel_size)
    kernel = tf.reshape(layer.kernel, (1, 1, channels, layer.filters))
    return _activated(layer, tf.nn.conv2d(tf.reshape(read, (1, places.count, 1, channels)), kernel, 1, "VALID"))


def _activated(layer: keras.layers.Layer, values: tf.Tensor) -> tf.Tensor:
    if layer.use_bias:
        values += layer.bias
    return layer.activation(values)
