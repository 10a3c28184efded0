"""Chains of exits whose cells leave each for itself: which there are, what they cost, and what each comes to on every image.

A configuration is a chain of candidates, shallow to deep, with theta_pix and theta_img of each early exit. What it does to an image depends
on theta_img only through the budgets that are taken. So the network runs once for an image; then each segment of a chain runs once for
every theta_pix and budget that occur before it, on the cells that are least sure: all of them are the network itself. The gathered
segments of `mess_tf.network.regions` run, in float32; what decides is the .tflite that devices run.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf
from absl import flags
from ai_edge_litert.interpreter import Interpreter

from mess_runtime.bundle import GONE, MASK, SIGNATURE, SURE, Regions, check
from mess_runtime.images import mask_at
from mess_runtime.runner import SURE_ROUNDING
from mess_runtime.terminal import Bar
from mess_tf.configs import IGNORE, Config
from mess_tf.data.examples import Examples
from mess_tf.data.pipelines import evaluation_batches, network_input
from mess_tf.files import THETA_IMG, THETA_IMG_WHOLE
from mess_tf.graph import flatbuffer
from mess_tf.graph.conversion import convert
from mess_tf.graph.exporter import head_cost, tensor_shapes
from mess_tf.graph.policy import decide, decide_by_cell
from mess_tf.graph.regions import budgets
from mess_tf.network.costs import model_cost
from mess_tf.network.model import MultiExitNetwork
from mess_tf.network.regions import ActiveSegment, DenseSegmentError, segment_with_cells, segments_on_grid

NONE = "none"
# On an image each may run a segment of its own, and each keeps counts of every image and class.
MOST_CONFIGURATIONS = 5000

Thetas = tuple[tuple[float, float], ...]  # theta_pix and theta_img of each early exit


@dataclasses.dataclass(frozen=True)
class RegionOptions:
    """Which chains there are to choose from.

    Attributes:
      neighbours: one of `NEIGHBOURS`, or `none` for no regions; empty for what stage 1 trained for.
      cell: side of a cell in pixels; 0 for what stage 1 trained for.
      candidates: EXIT.HEAD of one per exit; empty for every exit with the plain head.
      dense: exits, see `bundle.Regions`.
      max_early: largest number of early exits of a chain, 1 or 2.
      theta_img: shares of a cell's pixels that must be confident.
    """

    neighbours: str = ""
    cell: int = 0
    candidates: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    max_early: int = 1
    theta_img: tuple[float, ...] = THETA_IMG

    def __post_init__(self):
        grid = np.array(self.theta_img)
        ok = grid.size > 0 and (np.diff(grid) > 0).all() and grid[0] > 0 and grid[-1] <= 1
        check(bool(ok), "theta_img", "increasing shares above 0, at most 1", self.theta_img)

    def of(self, config: Config) -> "RegionOptions":
        """With what the training says where nothing is said here."""
        stage = config.stage1
        return dataclasses.replace(self, neighbours=self.neighbours or stage.regions, cell=self.cell or stage.region_cell)


BY_TRAINING, WITHOUT = RegionOptions(), RegionOptions(NONE)


def options_of_flags() -> RegionOptions:
    """What the flags of `arguments.define_region_flags` ask for."""
    values = flags.FLAGS
    return RegionOptions(values.regions or "", values.region_cell or 0, tuple(values.region_heads), tuple(values.region_dense))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The chains of a network.

    Attributes:
      regions: cells and budgets.
      candidates: those of any chain, shallow to deep.
      segments: the segments after the first of each chain, one at least that can leave cells out; None for those that can only run densely.
      pairs: the segment between neighbours in a chain of up to two early exits, likewise.
      left_out: chains that cannot be, with the reason.
      cells: rows and columns of cells that the rows and the columns of the image lie in.
    """

    regions: Regions
    candidates: tuple[str, ...]
    segments: Mapping[tuple[str, ...], Sequence[ActiveSegment | None]]
    pairs: Mapping[tuple[str, str], ActiveSegment | None]
    left_out: Mapping[tuple[str, ...], str]
    cells: tuple[np.ndarray, np.ndarray]

    @property
    def chains(self) -> list[tuple[str, ...]]:
        """The candidates of each, shallow to deep."""
        return [*self.segments]


def plan(network: MultiExitNetwork, config: Config, options: RegionOptions) -> Plan | None:
    """Finds the chains one of whose segments can leave cells out.

    Args:
      network: with all heads.
      config: of its training.
      options: what is asked for.

    Returns:
      The chains, or None where no regions are asked for.

    Raises:
      ValueError: there is no such chain, or a candidate is unknown.
    """
    options, size = options.of(config), config.data.input_size
    if options.neighbours == NONE:
        return None
    plain = [f"{point.name}.{config.exits.plain_head}" for point in network.exit_points]
    candidates = options.candidates or [*plain, network.candidates[-1]]
    unknown = [name for name in candidates if name not in network.candidates]
    check(not unknown, "region_heads", f"of the candidates {', '.join(network.candidates)}", ", ".join(unknown))
    candidates = sorted(candidates, key=network.candidates.index)
    exits = [name.partition(".")[0] for name in candidates]
    check(1 < len(exits) == len({*exits}), "region_heads", "of two exits or more, one each", ", ".join(candidates))
    unknown = [name for name in options.dense if name not in exits[1:]]
    check(not unknown, "region_dense", f"of the exits {', '.join(exits[1:])}", ", ".join(unknown))
    some = {*exits[1:]} > {*options.dense}
    check(some, "region_dense", f"fewer than all exits behind the first ({', '.join(exits[1:])})", ", ".join(options.dense))
    pairs, left_out, regions = [*itertools.combinations(candidates, 2)], {}, None
    for pair in reversed(pairs):  # the last ones end at the final exit
        if pair[1].partition(".")[0] in options.dense:
            left_out[pair] = f"{pair[1]}: shall be dense"
            continue
        try:
            segment = segment_with_cells(network, pair, 1, size, options.cell, options.neighbours)
            regions = Regions(options.neighbours, segment.grid, tuple(budgets(segment)), options.dense)
            break
        except ValueError as error:
            left_out[pair] = str(error)
    check(regions is not None, "regions", f"{NONE} with this network", "; ".join(dict.fromkeys(left_out.values())))
    cells = tuple(segment.cells_of(side, axis) for axis, side in enumerate(size))
    segments: dict[tuple[str, ...], Sequence[ActiveSegment | None]] = {}
    found: dict[tuple[str, str], ActiveSegment | None] = {}
    for pair in pairs:
        try:
            [found[pair]] = segments[pair] = _segments(network, pair, size, regions, cells)
        except DenseSegmentError as error:
            found[pair], left_out[pair] = None, str(error)
        except ValueError as error:
            left_out[pair] = str(error)
    begins, used = {first for first, _ in segments}, {*segments}
    for chain in itertools.combinations(candidates, 3):
        between = [*itertools.pairwise(chain)]
        if chain[0] not in begins or not {*between} <= {*found} or not any(found[pair] for pair in between):
            continue
        used |= {*between}  # with one early exit too: the files that are measured serve both
        if options.max_early > 1:
            try:
                segments[chain] = _segments(network, chain, size, regions, cells)
            except ValueError as error:
                left_out[chain] = str(error)
    of_pairs = {pair: segment for pair, segment in found.items() if pair in used}
    names = {name for pair in used for name in pair}
    return Plan(regions, tuple(name for name in candidates if name in names), segments, of_pairs, left_out, cells)


def _segments(
    network: MultiExitNetwork, chain: Sequence[str], size: tuple[int, int], regions: Regions, cells: Sequence[np.ndarray]
) -> list[ActiveSegment | None]:
    """See `segments_on_grid`, which raises the errors; `cells` as of `Plan`."""
    found = segments_on_grid(network, chain, size, regions)
    some = next(filter(None, found))
    same = all(np.array_equal(some.cells_of(side, axis), cells[axis]) for axis, side in enumerate(size))
    check(same, "regions", "of the same pixels in all chains", chain)
    return found


def plan_of(network: MultiExitNetwork, chain: Sequence[str], regions: Regions, size: tuple[int, int]) -> Plan:
    """The one chain of a deployment, candidates shallow to deep, at an input size (H, W); raises as `segments_on_grid`."""
    segments = segments_on_grid(network, chain, size, regions)
    some = next(filter(None, segments))
    cells = tuple(some.cells_of(side, axis) for axis, side in enumerate(size))
    pairs = dict(zip(itertools.pairwise(chain), segments, strict=True))
    return Plan(regions, tuple(chain), {tuple(chain): segments}, pairs, {}, cells)


def submodels(plan: Plan) -> tuple[list[str], list[str]]:
    """Names of the files that are measured: of each candidate as the first, and of each pair and budget, budget by budget.

    Of a pair that can only run densely there is the file of the last budget only.
    """
    pairs = [f"region.{first}.{second}.{budget}" for first, second in plan.pairs for budget in plan.regions.budgets]
    return [f"region.{candidate}" for candidate in plan.candidates], pairs


def needed(plan: Plan) -> list[str]:
    """Names of the files without which a chain has no latency: those of `submodels` that the network has, at the largest budget."""
    largest = plan.regions.budgets[-1]
    return [f"region.{name}" for name in sorted({chain[0] for chain in plan.chains})] + [
        f"region.{first}.{second}.{largest}" for first, second in plan.pairs
    ]


class _Computed:
    """What was computed of an image: the network itself, or where segments have worked at some cells only.

    Attributes:
      tensors: features by name.
      logits: by candidate.
      decided: mask, and with a threshold how sure each cell is, by candidate, theta_pix and whether the image decides.
      later: what a segment of the chain made of it, by candidate and cells.
    """

    def __init__(self, tensors: Mapping[str, tf.Tensor], logits: Mapping[str, np.ndarray]):
        self.tensors, self.logits = tensors, dict(logits)
        self.decided: dict[tuple[str, float | None, bool], dict[str, np.ndarray]] = {}
        self.later: dict[tuple[str, bytes], _Computed] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What a configuration does to an image.

    Attributes:
      mask: uint8 [H, W] at the network's size.
      exits: int [rows, columns], the position in the chain of the exit that each cell has its answer from.
      taken: the budget that each exit after the first took, of those that cells came to.
      computed: what the last of these exits hands on.
    """

    mask: np.ndarray
    exits: np.ndarray
    taken: tuple[int, ...]
    computed: _Computed


class Outcomes:
    """Runs chains over one image after another; of an image and a chain, nothing is computed twice."""

    def __init__(self, network: MultiExitNetwork, plan: Plan, size: tuple[int, int]):
        """Plans only.

        Args:
          network: the multi-exit network.
          plan: its chains.
          size: (H, W) of its input.
        """
        self._network, self._plan, self.size = network, plan, size
        self._dense = {chain: network.segments(chain) for chain, segments in plan.segments.items() if None in segments}
        read = set()
        for chain, segments in plan.segments.items():
            for index, segment in enumerate(segments, 1):
                read.update(segment.inputs if segment else self._dense[chain][index].input)
        self._features_of = tf.function(network.features(plan.candidates, sorted(read)), autograph=False)
        self._head_of = tf.function(network.head_logits, autograph=False)
        self._late: dict[tuple, tf.types.experimental.PolymorphicFunction] = {}
        self._deciders: dict[tuple, object] = {}

    def take(self, image: np.ndarray) -> None:
        """The next image, float32 [1, H, W, 3]."""
        self._whole = _Computed(dict(self._features_of(image, training=False)), {})
        self._chain: tuple[str, ...] = ()

    def outcome(self, chain: tuple[str, ...], thetas: Thetas) -> Outcome:
        """Runs a chain as `mess_runtime.runner.Runner` does. Configurations of a chain with one outcome share the object.

        What is known of a chain is forgotten with the next, so it is best to ask for all of a chain in a row.
        """
        if chain != self._chain:
            self._whole.later.clear()
            made = self._decide(self._whole, chain, 0, thetas[0][0])
            nothing = Outcome(made[MASK][0], np.zeros(self._plan.regions.grid, int), (), self._whole)
            self._chain, self._outcomes = chain, {(): nothing}
        ran, outcome = (), self._outcomes[()]
        for index, (theta_pix, theta_img) in enumerate(thetas, 1):
            sure = self._decide(outcome.computed, chain, index - 1, theta_pix)[SURE][0]
            sure = np.where(outcome.exits == index - 1, sure, GONE)
            unsure = int((sure < theta_img - SURE_ROUNDING).sum())
            if not unsure:
                break
            able = self._plan.regions.budgets[0 if self._plan.segments[chain][index - 1] else -1 :]
            budget = next(each for each in able if each >= unsure)
            ran = (*ran, theta_pix, budget)
            if ran not in self._outcomes:
                following = thetas[index][0] if index < len(thetas) else None
                self._outcomes[ran] = self._later(outcome, chain, sure, budget, following)
            outcome = self._outcomes[ran]
        return outcome

    def _later(self, before: Outcome, chain: tuple[str, ...], sure: np.ndarray, budget: int, theta_pix: float | None) -> Outcome:
        """What the next exit, whose theta_pix this is, makes of an outcome at the cells that are least sure: `sure` [rows, columns]."""
        index, (rows, columns) = len(before.taken) + 1, self._plan.cells
        chosen = np.zeros(sure.size, bool)
        chosen[np.argsort(sure, axis=None, kind="stable")[:budget]] = True
        chosen = chosen.reshape(sure.shape)
        active = chosen & (sure < GONE)
        computed = self._ran(before.computed, chain, index, chosen, active)
        mask = np.where(active[rows][:, columns], self._decide(computed, chain, index, theta_pix)[MASK][0], before.mask)
        return Outcome(mask, np.where(active, index, before.exits), (*before.taken, budget), computed)

    def _ran(self, before: _Computed, chain: tuple[str, ...], index: int, chosen: np.ndarray, active: np.ndarray) -> _Computed:
        """Runs a segment of a chain at some cells; `active` are those of them that have no answer yet, both bool [rows, columns]."""
        if before is self._whole and chosen.all():
            return before
        key = (chain[index], chosen.tobytes())
        if key not in before.later:
            segment = self._plan.segments[chain][index - 1]
            reads = segment.inputs if segment else self._dense[chain][index].input
            inputs = {name: before.tensors[name] for name in reads}
            if segment:
                early = before.logits[chain[index - 1]]
                cells = tf.constant(np.flatnonzero(chosen), tf.int32)
                made = self._function(chain, index, len(cells))(inputs, early, cells, tf.constant(active[None]))
            else:
                made = self._function(chain, index)(inputs)
            logits = {chain[index]: made.pop("logits").numpy()}
            before.later[key] = _Computed(before.tensors | made, logits)
        return before.later[key]

    def _function(self, chain: tuple[str, ...], index: int, budget: int | None = None):
        """What runs a segment, at so many cells if it can leave cells out; of chains that share one, it is traced once."""
        segment = self._plan.segments[chain][index - 1]
        if segment:
            key, function = (segment.inputs, segment.outputs), functools.partial(_late, segment)
        else:
            model = self._dense[chain][index]
            key, function = (model.input, model.output), functools.partial(model, training=False)
        key = (*chain[index - 1 : index + 1], budget, *map(tuple, key))
        if key not in self._late:
            self._late[key] = tf.function(function, autograph=False)
        return self._late[key]

    def _decide(self, computed: _Computed, chain: tuple[str, ...], index: int, theta_pix: float | None) -> dict[str, np.ndarray]:
        """Mask and, with a threshold, how sure each cell is, of an exit of a chain."""
        candidate, segments = chain[index], self._plan.segments[chain]
        whole = index < len(segments) and segments[index] is None
        key = (candidate, theta_pix, whole)
        if key not in computed.decided:
            if candidate not in computed.logits:
                features = {name: computed.tensors[name] for name in self._network.taps(candidate)}
                computed.logits[candidate] = self._head_of(candidate, features).numpy()
            logits = computed.logits[candidate]
            computed.decided[key] = self._decider(logits.shape, theta_pix, whole)(logits=logits)
        return computed.decided[key]

    def _decider(self, shape: tuple[int, ...], theta_pix: float | None, whole: bool):
        key = (shape, theta_pix, whole)
        if key not in self._deciders:

            def function(logits: tf.Tensor) -> dict[str, tf.Tensor]:
                if theta_pix is None:
                    return decide(logits, self.size, ())
                return decide_by_cell(logits, self.size, (theta_pix, False), self._plan.cells, whole)

            content = flatbuffer.write({SIGNATURE: convert(function, {"logits": shape})})
            interpreter = Interpreter(model_content=content, num_threads=os.cpu_count())
            self._deciders[key] = interpreter.get_signature_runner(SIGNATURE)
        return self._deciders[key]


def _late(
    segment: ActiveSegment, tensors: Mapping[str, tf.Tensor], early: tf.Tensor, cells: tf.Tensor, active: tf.Tensor
) -> dict[str, tf.Tensor]:
    """A segment at the cells that are computed, int32 [n], with the logits of an earlier exit where no cell is active."""
    made = segment.gathered(tensors, cells) if cells.shape[0] < math.prod(segment.grid) else segment.dense(tensors)
    return made | {"logits": segment.answer(early, made["logits"], active)}


def configurations(plan: Plan, theta_pix: Sequence[float], theta_img: Sequence[float]) -> list[tuple[tuple[str, ...], Thetas]]:
    """Chain and thresholds of each, chain by chain: of every early exit every pair of theta_pix and theta_img.

    An exit that decides for the whole image has THETA_IMG_WHOLE instead of the latter.

    Raises:
      ValueError: there are more than MOST_CONFIGURATIONS.
    """
    of_cells, of_image = ([*itertools.product(theta_pix, each)] for each in (theta_img, THETA_IMG_WHOLE))
    found = [
        (chain, thetas)
        for chain, segments in plan.segments.items()
        for thetas in itertools.product(*(of_cells if segment else of_image for segment in segments))
    ]
    if len(found) > MOST_CONFIGURATIONS:
        early = Counter(len(chain) - 1 for chain in plan.chains)
        chains = ", ".join(f"{number} with {exits} early" for exits, number in sorted(early.items()))
        required = f"so few that there are at most {MOST_CONFIGURATIONS} configurations, or fewer exits by region_heads (chains: {chains})"
        raise ValueError(f"theta_pix, theta_img: must be {required}, got {len(of_cells)} pairs, {len(found)} configurations")
    return found


def count(
    outcomes: Outcomes, every: Sequence[tuple[tuple[str, ...], Thetas]], examples: Examples, images: range, resize: str
) -> dict[str, np.ndarray]:
    """Runs configurations over some images.

    Args:
      outcomes: of the network.
      every: see `configurations`.
      examples: the split.
      images: positions in it, one after another.
      resize: how images are fitted, see `images.fit`.

    Returns:
      `tp`, `fp`, `labelled`, `taken` and `cells` of these images, see `RegionStats`.
    """
    most, classes, shape = max(len(chain) for chain, *_ in every), examples.info.num_classes, (len(every), len(images))
    tp, fp = np.zeros((2, *shape, classes), np.int32)
    labelled = np.zeros((len(images), classes), np.int64)
    taken, cells = np.zeros((*shape, most - 1), np.int32), np.zeros((*shape, most), np.int32)
    with Bar("regions", len(images), "image") as bar:
        for i, (image, label) in enumerate(evaluation_batches(examples, images).as_numpy_iterator()):
            outcomes.take(network_input(image, outcomes.size, resize))
            count_mask = _counter(label[0], outcomes.size, resize, classes)
            labelled[i] = count_mask(None)
            for _, of_chain in itertools.groupby(enumerate(every), lambda each: each[1][0]):
                counted = {}
                for k, configuration in of_chain:
                    outcome = outcomes.outcome(*configuration)
                    if outcome not in counted:
                        counted[outcome] = (*count_mask(outcome.mask), np.bincount(outcome.exits.ravel(), minlength=most))
                    tp[k, i], fp[k, i], cells[k, i] = counted[outcome]
                    taken[k, i, : len(outcome.taken)] = outcome.taken
            bar.advance(examples.names[images[i]])
    return {"tp": tp, "fp": fp, "labelled": labelled, "taken": taken, "cells": cells}


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The `count` of all images, of that of some of them each, in order."""
    axes = {"tp": 1, "fp": 1, "labelled": 0, "taken": 1, "cells": 1}
    return {name: np.concatenate([part[name] for part in parts], axis=axis) for name, axis in axes.items()}


def described(
    network: MultiExitNetwork, plan: Plan, size: tuple[int, int], every: Sequence[tuple[tuple[str, ...], Thetas]]
) -> dict[str, np.ndarray]:
    """What configurations are and cost, whatever the images: arrays of `RegionStats` by name.

    Args:
      network: the multi-exit network.
      plan: its chains.
      size: (H, W) of the network's input.
      every: see `configurations`.
    """
    most = max(map(len, plan.chains))
    chains = np.full((len(every), most), -1)
    theta = np.full((2, len(every), most - 1), np.nan)
    for k, (chain, thetas) in enumerate(every):
        chains[k, : len(chain)] = [plan.candidates.index(name) for name in chain]
        theta[:, k, : len(thetas)] = np.transpose(thetas)
    shapes, begins = tensor_shapes(network, size), {chain[0] for chain in plan.chains}
    reached = {name: model_cost(network.features([name]), size) for name in plan.candidates}
    heads = {name: head_cost(network, name, shapes) for name in plan.candidates}
    first = [(reached[name], heads[name]) if name in begins else () for name in plan.candidates]

    def costs(pair: tuple[str, str], segment: ActiveSegment | None) -> tuple[list[int], int]:
        """MACs at each budget, 0 at those that a dense segment does not have, and parameters."""
        if segment:
            return [segment.macs(budget) for budget in plan.regions.budgets], segment.parameters
        whole, before, head = model_cost(network.features(pair), size), reached[pair[0]], heads[pair[1]]
        macs = whole.macs - before.macs + head.macs
        return [0] * (len(plan.regions.budgets) - 1) + [macs], whole.parameters - before.parameters + head.parameters

    pair_macs, pair_parameters = zip(*itertools.starmap(costs, plan.pairs.items()), strict=True)
    return {
        "grid": np.array(plan.regions.grid),
        "budgets": np.array(plan.regions.budgets),
        "chains": chains,
        "theta_pix": theta[0],
        "theta_img": theta[1],
        "first_macs": np.array([sum(cost.macs for cost in costs) for costs in first]),
        "first_parameters": np.array([sum(cost.parameters for cost in costs) for costs in first]),
        "pairs": np.array([[plan.candidates.index(name) for name in pair] for pair in plan.pairs]),
        "pair_macs": np.array(pair_macs),
        "pair_parameters": np.array(pair_parameters),
    }


def _counter(label: np.ndarray, size: tuple[int, int], resize: str, classes: int):
    """Of a label [H, W], what counts a mask at the network's size by class: (TP, FP), or of no mask the labelled pixels; int64 [C]."""
    pixels = np.arange(size[0] * size[1]).reshape(size)
    valid = label != IGNORE
    truth, source = label[valid].astype(int), mask_at(pixels, label.shape, resize)[valid]
    # How many labelled pixels of each class the mask's pixels stand for.
    of_pixel = np.bincount(source * classes + truth, minlength=pixels.size * classes).reshape(-1, classes)
    total = of_pixel.sum(1)

    def count(mask: np.ndarray | None):
        if mask is None:
            return of_pixel.sum(0)
        predicted = mask.ravel().astype(int)
        right = of_pixel[np.arange(pixels.size), predicted]
        tp, given = (np.bincount(predicted, weights, classes).round().astype(np.int64) for weights in (right, total))
        return tp, given - tp

    return count
