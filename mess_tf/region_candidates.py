"""Chains of exits whose cells leave each for itself: which there are, what they cost, and what each comes to on every image.

A configuration is a chain of candidates, shallow to deep, with theta_pix and theta_img, the same ones at all of its early exits. What it
does to an image depends on theta_img only through the budgets that are taken. So the network runs once for an image; then each segment
runs once for every pair of exits, theta_pix and budget that occurs, on the cells that are least sure: all of them are the network itself.
The masked segments of `mess_tf.network.regions` run, in float32; what decides is the .tflite that devices run.
"""

import dataclasses
import functools
import itertools
import os
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
from mess_tf.files import THETA_IMG
from mess_tf.graph import flatbuffer
from mess_tf.graph.conversion import convert
from mess_tf.graph.exporter import head_cost, tensor_shapes
from mess_tf.graph.policy import decide, decide_by_cell
from mess_tf.graph.regions import budgets
from mess_tf.network.costs import model_cost
from mess_tf.network.model import MultiExitNetwork
from mess_tf.network.regions import ActiveSegment, segment_with_cells, segments_on_grid

NONE = "none"
MOST_CONFIGURATIONS = 5000


@dataclasses.dataclass(frozen=True)
class RegionOptions:
    """Which chains there are to choose from.

    Attributes:
      neighbours: one of `NEIGHBOURS`, or `none` for no regions; empty for what stage 1 trained for.
      cell: side of a cell in pixels; 0 for what stage 1 trained for.
      candidates: EXIT.HEAD of one per exit; empty for every exit with the plain head.
      max_early: largest number of early exits of a chain, 1 or 2.
      theta_img: shares of a cell's pixels that must be confident.
    """

    neighbours: str = ""
    cell: int = 0
    candidates: tuple[str, ...] = ()
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
    return RegionOptions(values.regions or "", values.region_cell or 0, tuple(values.region_heads))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The chains of a network.

    Attributes:
      regions: cells and budgets.
      candidates: those of any chain, shallow to deep.
      segments: the segments after the first of each chain.
      left_out: chains that cannot be, with the reason.
      cells: rows and columns of cells that the rows and the columns of the image lie in.
    """

    regions: Regions
    candidates: tuple[str, ...]
    segments: Mapping[tuple[str, ...], Sequence[ActiveSegment]]
    left_out: Mapping[tuple[str, ...], str]
    cells: tuple[np.ndarray, np.ndarray]

    @property
    def chains(self) -> list[tuple[str, ...]]:
        """The candidates of each, shallow to deep."""
        return [*self.segments]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Neighbours in a chain, each of which is a chain too."""
        return [chain for chain in self.segments if len(chain) == 2]


def plan(network: MultiExitNetwork, config: Config, options: RegionOptions) -> Plan | None:
    """Finds the chains whose every segment can leave cells out.

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
    pairs, left_out, regions = [*itertools.combinations(candidates, 2)], {}, None
    for pair in reversed(pairs):  # the last ones end at the final exit
        try:
            segment = segment_with_cells(network, pair, 1, size, options.cell, options.neighbours)
            regions = Regions(options.neighbours, segment.grid, tuple(budgets(segment)))
            break
        except ValueError as error:
            left_out[pair] = str(error)
    check(regions is not None, "regions", f"{NONE} with this network", "; ".join(dict.fromkeys(left_out.values())))
    cells = tuple(segment.cells_of(side, axis) for axis, side in enumerate(size))
    segments: dict[tuple[str, ...], list[ActiveSegment]] = {}
    for length in range(2, options.max_early + 2):
        for chain in itertools.combinations(candidates, length):
            if chain in left_out or any(pair not in segments for pair in itertools.pairwise(chain) if length > 2):
                continue
            try:
                found = segments_on_grid(network, chain, size, regions)
                whole = [name for name, each in zip(chain[1:], found, strict=True) if each is None]
                check(not whole, "regions", "such that every segment leaves out work", ", ".join(whole))
                same = all(np.array_equal(found[0].cells_of(side, axis), cells[axis]) for axis, side in enumerate(size))
                check(same, "regions", "of the same pixels in all chains", chain)
                segments[chain] = found
            except ValueError as error:
                left_out[chain] = str(error)
    used = {name for chain in segments for name in chain}
    return Plan(regions, tuple(name for name in candidates if name in used), segments, left_out, cells)


def plan_of(network: MultiExitNetwork, chain: Sequence[str], regions: Regions, size: tuple[int, int]) -> Plan:
    """The one chain of a deployment, candidates shallow to deep, at an input size (H, W); raises as `segments_on_grid`."""
    segments = segments_on_grid(network, chain, size, regions)
    some = next(filter(None, segments))
    cells = tuple(some.cells_of(side, axis) for axis, side in enumerate(size))
    return Plan(regions, tuple(chain), {tuple(chain): segments}, {}, cells)


def submodels(plan: Plan) -> tuple[list[str], list[str]]:
    """Names of the files that are measured: of each candidate as the first, and of each pair and budget, budget by budget."""
    pairs = [f"region.{first}.{second}.{budget}" for first, second in plan.pairs for budget in plan.regions.budgets]
    return [f"region.{candidate}" for candidate in plan.candidates], pairs


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a configuration does to an image.

    Attributes:
      mask: uint8 [H, W] at the network's size.
      exits: int [rows, columns], the position in the chain of the exit that each cell has its answer from.
      taken: the budget that each exit after the first took, 0 for those that no cell came to.
    """

    mask: np.ndarray
    exits: np.ndarray
    taken: tuple[int, ...]


class Outcomes:
    """Runs chains over one image after another; of an image, nothing is computed twice."""

    def __init__(self, network: MultiExitNetwork, plan: Plan, size: tuple[int, int]):
        """Plans only.

        Args:
          network: the multi-exit network.
          plan: its chains.
          size: (H, W) of its input.
        """
        self._network, self._plan, self.size = network, plan, size
        read = {name for segments in plan.segments.values() for segment in segments for name in segment.inputs}
        self._features_of = tf.function(network.features(plan.candidates, sorted(read)), autograph=False)
        self._head_of = tf.function(network.head_logits, autograph=False)
        self._late: dict[tuple, tf.types.experimental.PolymorphicFunction] = {}
        self._deciders: dict[tuple, object] = {}

    def take(self, image: np.ndarray) -> None:
        """The next image, float32 [1, H, W, 3]."""
        # By path, the segments that were computed at some cells only: () is the network itself.
        self._tensors = {(): dict(self._features_of(image, training=False))}
        self._logits: dict[tuple, np.ndarray] = {}
        self._decided: dict[tuple, dict[str, np.ndarray]] = {}
        self._outcomes: dict[tuple, Outcome] = {}

    def outcome(self, chain: tuple[str, ...], theta_pix: float, theta_img: float) -> Outcome:
        """Runs a chain as `mess_runtime.runner.Runner` does. Two configurations with one outcome share the object."""
        regions, (rows, columns) = self._plan.regions, self._plan.cells
        made = self._decide(chain[0], (), theta_pix)
        mask, sure = made[MASK][0], made[SURE].ravel()
        at, path, taken = np.zeros(regions.cells, int), (), []
        for index, candidate in enumerate(chain[1:], 1):
            unsure = int((sure < theta_img - SURE_ROUNDING).sum())
            if not unsure:
                break
            budget = next(each for each in regions.budgets if each >= unsure)
            taken.append(budget)
            if (known := self._outcomes.get((chain, theta_pix, *taken))) is not None and index + 1 == len(chain):
                return known
            cells = np.sort(np.argsort(sure, kind="stable")[:budget])
            active = np.zeros(regions.cells, bool)
            active[cells] = True
            active &= sure < GONE
            path = self._ran(chain, index, path, cells, active)
            made = self._decide(candidate, path, theta_pix if index + 1 < len(chain) else None)
            at[active] = index
            mask = np.where(active.reshape(regions.grid)[rows][:, columns], made[MASK][0], mask)
            if SURE in made:
                sure = np.where(active, made[SURE].ravel(), GONE)
        key = (chain, theta_pix, *taken)
        if key not in self._outcomes:
            unused = (0,) * (len(chain) - 1 - len(taken))
            self._outcomes[key] = Outcome(mask, at.reshape(regions.grid), (*taken, *unused))
        return self._outcomes[key]

    def _ran(self, chain: tuple[str, ...], index: int, path: tuple, cells: np.ndarray, active: np.ndarray) -> tuple:
        """Runs a segment of a chain at some cells, behind what ran at a path, and returns its own path; `active`: bool, those of them
        that have no answer yet.
        """
        if cells.size == self._plan.regions.cells:  # all cells are left, so those before were all computed too
            return ()
        segment = self._plan.segments[chain][index - 1]
        of_segment = (chain[index - 1], chain[index], tuple(segment.inputs), segment.outputs)
        longer = (*path, (*of_segment, cells.tobytes()))
        if longer not in self._tensors:
            if of_segment not in self._late:
                self._late[of_segment] = tf.function(functools.partial(_late, segment), autograph=False)
            computed = np.zeros(self._plan.regions.cells, bool)
            computed[cells] = True
            before = self._tensors[path]
            inputs = {name: before[name] for name in segment.inputs}
            grid = (1, *self._plan.regions.grid)
            early = self._logits[chain[index - 1], path]
            made = self._late[of_segment](inputs, early, tf.constant(computed.reshape(grid)), tf.constant(active.reshape(grid)))
            self._logits[chain[index], longer] = made.pop("logits").numpy()
            self._tensors[longer] = before | made
        return longer

    def _decide(self, candidate: str, path: tuple, theta_pix: float | None) -> dict[str, np.ndarray]:
        """Mask and, with a threshold, how sure each cell is."""
        key = (candidate, path, theta_pix)
        if key not in self._decided:
            if (candidate, path) not in self._logits:
                features = {name: self._tensors[()][name] for name in self._network.taps(candidate)}
                self._logits[candidate, path] = self._head_of(candidate, features).numpy()
            logits = self._logits[candidate, path]
            self._decided[key] = self._decider(logits.shape, theta_pix)(logits=logits)
        return self._decided[key]

    def _decider(self, shape: tuple[int, ...], theta_pix: float | None):
        if (shape, theta_pix) not in self._deciders:

            def function(logits: tf.Tensor) -> dict[str, tf.Tensor]:
                if theta_pix is None:
                    return decide(logits, self.size, ())
                return decide_by_cell(logits, self.size, (theta_pix, False), self._plan.cells)

            content = flatbuffer.write({SIGNATURE: convert(function, {"logits": shape})})
            interpreter = Interpreter(model_content=content, num_threads=os.cpu_count())
            self._deciders[shape, theta_pix] = interpreter.get_signature_runner(SIGNATURE)
        return self._deciders[shape, theta_pix]


def _late(
    segment: ActiveSegment, tensors: Mapping[str, tf.Tensor], early: tf.Tensor, computed: tf.Tensor, active: tf.Tensor
) -> dict[str, tf.Tensor]:
    """A segment at the cells that are computed, with the logits of an earlier exit where no cell is active."""
    made = segment.masked(tensors, computed)
    return made | {"logits": segment.answer(early, made["logits"], active)}


def configurations(plan: Plan, theta_pix: Sequence[float], theta_img: Sequence[float]) -> list[tuple[tuple[str, ...], float, float]]:
    """Chain, theta_pix and theta_img of each; those of a chain's early exits are the same.

    Raises:
      ValueError: there are more than MOST_CONFIGURATIONS.
    """
    found = [*itertools.product(plan.chains, theta_pix, theta_img)]
    required = f"so many that there are at most {MOST_CONFIGURATIONS} configurations of regions"
    check(len(found) <= MOST_CONFIGURATIONS, "region_heads, max_early, theta_pix and theta_img", required, len(found))
    return found


def count(
    outcomes: Outcomes, every: Sequence[tuple[tuple[str, ...], float, float]], examples: Examples, images: range, resize: str
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
            labelled[i], counted = count_mask(None), {}
            for k, configuration in enumerate(every):
                outcome = outcomes.outcome(*configuration)
                if id(outcome) not in counted:
                    counted[id(outcome)] = count_mask(outcome.mask)
                tp[k, i], fp[k, i] = counted[id(outcome)]
                taken[k, i, : len(outcome.taken)] = outcome.taken
                cells[k, i] = np.bincount(outcome.exits.ravel(), minlength=most)
            bar.advance(examples.names[images[i]])
    return {"tp": tp, "fp": fp, "labelled": labelled, "taken": taken, "cells": cells}


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The `count` of all images, of that of some of them each, in order."""
    axes = {"tp": 1, "fp": 1, "labelled": 0, "taken": 1, "cells": 1}
    return {name: np.concatenate([part[name] for part in parts], axis=axis) for name, axis in axes.items()}


def described(
    network: MultiExitNetwork, plan: Plan, size: tuple[int, int], every: Sequence[tuple[tuple[str, ...], float, float]]
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
    for k, (chain, pix, img) in enumerate(every):
        chains[k, : len(chain)] = [plan.candidates.index(name) for name in chain]
        theta[:, k, : len(chain) - 1] = np.array([[pix], [img]])
    pairs = {pair: plan.segments[pair][0] for pair in plan.pairs}
    begins, shapes = {first for first, _ in pairs}, tensor_shapes(network, size)
    first = [
        (model_cost(network.features([name]), size), head_cost(network, name, shapes)) if name in begins else () for name in plan.candidates
    ]
    return {
        "grid": np.array(plan.regions.grid),
        "budgets": np.array(plan.regions.budgets),
        "chains": chains,
        "theta_pix": theta[0],
        "theta_img": theta[1],
        "first_macs": np.array([sum(cost.macs for cost in costs) for costs in first]),
        "first_parameters": np.array([sum(cost.parameters for cost in costs) for costs in first]),
        "pairs": np.array([[plan.candidates.index(name) for name in pair] for pair in pairs]),
        "pair_macs": np.array([[segment.macs(budget) for budget in plan.regions.budgets] for segment in pairs.values()]),
        "pair_parameters": np.array([segment.parameters for segment in pairs.values()]),
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
