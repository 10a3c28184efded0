"""Deployment search: which exits, which heads and which thresholds meet a constraint best. NumPy only.

stats (what each candidate did to each image) → costs → enumeration of configurations → the best of them. Because the backbone is
frozen, heads do not disturb each other, so every configuration is scored from the statistics, without running a network.

The space: one exit alone (the original network among them); with `input-dependent`, also one or two early exits in front of any deeper
last exit, every head at each, every theta_pix, plain and edge-aware confidence. One early exit tries every theta_img that changes a
decision; two early exits try quantiles of the image confidences. The result is the exact optimum of that space: a configuration goes
unscored only if its cost, or an upper bound on its mIoU, shows that it is no better than the result.

Source: Kouris et al., "Multi-Exit Semantic Segmentation Networks", ECCV 2022. Departure: bounds replace the exhaustive scoring.
"""

import dataclasses
import functools
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags

from mess_runtime.bundle import ANYTIME, BUDGETED, INPUT_DEPENDENT, SETTINGS, check, file_sha256, read_json
from mess_tf.files import (
    Certificate,
    Configuration,
    Deployment,
    ExitChoice,
    Objective,
    Original,
    Predicted,
    Stats,
    made_by,
)
from mess_tf.metrics import miou

# A constraint counts as met, and a bound as reached, within the rounding of sums of float64.
ROUNDING = 1e-12
BATCH = 1024
# What the full cost limit is worth in mIoU: the multipliers that the relaxation tries.
PRICES = np.array([0.0, *2.0 ** np.arange(-6, 4)])


class InfeasibleError(ValueError):
    """No configuration of the space meets the constraint; the message names the one that comes nearest."""


# === Costs ===


@dataclasses.dataclass(frozen=True, eq=False)
class Costs:
    """What prefixes and heads cost.

    Attributes:
      name: `macs` or `latency_ms`.
      prefix: float64 [E], from the image to the tap of each exit, above 0.
      head: float64 [K], of each candidate, up to its mask.
      decision: float64 [K, 2], of computing a candidate's confidence beside its mask, plain and edge-aware.
    """

    name: str
    prefix: np.ndarray
    head: np.ndarray
    decision: np.ndarray

    def __post_init__(self):
        check(self.prefix.min() > 0, "prefix", "above 0 at every exit", self.prefix.tolist())


def macs_costs(stats: Stats) -> Costs:
    """Costs in multiply-accumulate operations, which need no device."""
    return Costs("macs", stats.prefix_macs.astype(np.float64), stats.head_macs.astype(np.float64), np.zeros((len(stats.candidates), 2)))


def latency_costs(stats: Stats, rows: Sequence[Mapping[str, Any]], device: str | None = None, threads: int | None = None) -> Costs:
    """Costs in ms (the median), joined to the candidates by the hash of their submodels.

    Args:
      stats: with the hashes of the exported submodels.
      rows: of latency.json, no two of the same sha256, device and threads; `submodel` and `p50_ms` are read as well.
      device: whose rows count; needed where the file has several.
      threads: likewise.

    Raises:
      ValueError: the rows leave the device or the number of threads open, or lack a submodel.
    """
    for name, wanted in (("device", device), ("threads", threads)):
        known = sorted({row[name] for row in rows})
        if wanted is None and len(known) > 1:
            raise ValueError(f"{name}: must be given where latency.json has several, got none; there are {known}")
        if wanted is not None and wanted not in known:
            raise ValueError(f"{name}: must be one of {known} as in latency.json, got {wanted!r}")
        rows = [row for row in rows if wanted is None or row[name] == wanted]

    by_sha256 = {row["sha256"]: row for row in rows}
    measured = {row["submodel"] for row in rows}
    wanted = {f"prefix.{name}": sha256 for name, sha256 in zip(stats.exits, stats.prefix_sha256, strict=True)}
    wanted |= {f"head.{name}": sha256 for name, sha256 in zip(stats.candidates, stats.head_sha256, strict=True)}
    for mode, of_candidate in (("mask", stats.mask_sha256), ("plain", stats.plain_sha256), ("edge", stats.edge_sha256)):
        wanted |= {f"{mode}.{name}": sha256 for name, sha256 in zip(stats.candidates, of_candidate, strict=True)}
    problems = []
    for submodel, sha256 in wanted.items():
        if not sha256:
            problems.append(f"{submodel} (not exported yet: stats.npz has no hash of it)")
        elif sha256 not in by_sha256:
            problems.append(f"{submodel} (stale: another version of it was measured)" if submodel in measured else submodel)
    if problems:
        raise ValueError(f"latency.json: must have a row for every submodel of stats.npz, missing are {', '.join(problems)}")
    values = np.array([by_sha256[sha256]["p50_ms"] for sha256 in wanted.values()], np.float64)
    prefix, (head, mask, plain, edge) = values[: len(stats.exits)], values[len(stats.exits) :].reshape(4, -1)
    return Costs("latency_ms", prefix, head, np.maximum(np.stack([plain - mask, edge - mask], axis=1), 0.0))


def arrival_costs(stats: Stats, costs: Costs, chain: Sequence[int], edge_aware: bool | None) -> np.ndarray:
    """Cost of reaching the result of each exit of a chain: its prefix, all chosen heads up to it, and the decisions taken on the way.

    Args:
      stats: of the candidates.
      costs: of the candidates.
      chain: m candidates, shallow to deep.
      edge_aware: how all exits but the last decide; None where none does.

    Returns:
      float64 [m].
    """
    chain = list(chain)
    arrivals = costs.prefix[stats.exit_of_candidate[chain]] + np.cumsum(costs.head[chain])
    if edge_aware is not None:
        decision = costs.decision[chain, int(edge_aware)]
        decision[-1] = 0.0
        arrivals += np.cumsum(decision)
    return arrivals


# === The definition ===


def _decides(configuration: Configuration) -> bool | None:
    return configuration.edge_aware if configuration.setting == INPUT_DEPENDENT else None


def evaluate_configuration(stats: Stats, costs: Costs, configuration: Configuration) -> tuple[float, float, np.ndarray]:
    """Accuracy and cost of one configuration, straight from their definition; slow.

    Args:
      stats: of the candidates.
      costs: of the candidates.
      configuration: a deployment or a plain configuration.

    Returns:
      mIoU (0..1): of the counts summed over the images, each taken at the exit where it leaves; with `anytime`, the mean mIoU of the
        result that stands at a deadline anywhere between 0 and the horizon, 0 before the first result.
      Mean cost of an image.
      int64 [I], the exit where each image leaves, as position in `configuration.exits`; with `anytime` always the last.
    """
    chain = [stats.candidates.index(f"{choice.exit}.{choice.head}") for choice in configuration.exits]
    arrivals = arrival_costs(stats, costs, chain, _decides(configuration))
    leaves_at = np.full(len(stats.images), len(chain) - 1)
    if configuration.setting == ANYTIME:
        miou_of_exit = [float(miou(stats.tp[k].sum(0), stats.fp[k].sum(0), stats.fn[k].sum(0))) for k in chain]
        return mean_over_deadlines(miou_of_exit, arrivals, configuration.horizon), float(arrivals[-1]), leaves_at
    for image, pixels in enumerate(stats.pixels):
        for position, choice in enumerate(configuration.exits[:-1]):
            theta = stats.theta_pix.tolist().index(choice.theta_pix)
            if stats.confident[chain[position], image, theta, int(configuration.edge_aware)] >= math.ceil(choice.theta_img * pixels - 1e-9):
                leaves_at[image] = position
                break
    candidate = np.array(chain)[leaves_at]
    images = np.arange(len(stats.images))
    tp, fp, fn = (counts[candidate, images].sum(0) for counts in (stats.tp, stats.fp, stats.fn))
    return float(miou(tp, fp, fn)), float(arrivals[leaves_at].mean()), leaves_at


def mean_over_deadlines(miou_of_exit: Sequence[float], arrivals: np.ndarray, horizon: float) -> float:
    """Mean over all deadlines in [0, horizon] of the mIoU of the latest result, 0 before the first one."""
    changes = np.minimum(np.append(np.maximum.accumulate(arrivals), np.inf), horizon)
    return float(np.dot(miou_of_exit, np.diff(changes)) / horizon)


def original(stats: Stats, costs: Costs) -> Original:
    """The network without early exits."""
    choice = ExitChoice("final", stats.candidates[-1].partition(".")[2])
    accuracy, cost, _ = evaluate_configuration(stats, costs, Configuration(BUDGETED, False, (choice,), None))
    return Original(accuracy, cost)


# === Enumeration ===


@dataclasses.dataclass(frozen=True, eq=False)
class Decisions:
    """All ways in which one candidate can split the images.

    Attributes:
      theta_pix, theta_img: float64 [S].
      leaves: float64 [S, I], 1 where the image leaves, otherwise 0.
    """

    theta_pix: np.ndarray
    theta_img: np.ndarray
    leaves: np.ndarray


def decisions(stats: Stats, candidate: int, edge_aware: bool, limit: int) -> Decisions:
    """Lists a candidate's thresholds and the images that leave at each.

    theta_img takes the image confidences themselves, evenly picked by rank, so that the exit rule meets them exactly.

    Args:
      stats: of the candidates.
      candidate: position in `stats.candidates`.
      edge_aware: which of the two confidences decides.
      limit: largest number of theta_img per theta_pix; from the number of images on, every different decision is listed.
    """
    shares = (stats.confident[candidate, :, :, int(edge_aware)] / stats.pixels[:, None]).T  # [T, I]
    ranks = np.linspace(0, shares.shape[1] - 1, min(limit, shares.shape[1])).round().astype(int)
    theta_img = [np.unique(np.sort(row)[ranks]) for row in shares]
    leaves = [row >= values[:, None] for row, values in zip(shares, theta_img, strict=True)]
    sizes = [values.size for values in theta_img]
    return Decisions(np.repeat(stats.theta_pix, sizes), np.concatenate(theta_img), np.concatenate(leaves).astype(np.float64))


def chains(stats: Stats, length: int) -> Iterator[tuple[int, ...]]:
    """Candidates of `length` different exits, shallow to deep."""
    groups = [np.flatnonzero(stats.exit_of_candidate == e).tolist() for e in range(len(stats.exits))]
    for exits in itertools.combinations(groups, length):
        yield from itertools.product(*exits)


def mixture_sums(leaves: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> np.ndarray:
    """Sums a value over the images, each taken at the exit where it leaves, for every combination of decisions.

    Args:
      leaves: float64 [S_j, I] of each early exit, 1 where the image leaves.
      values: float64 [I] of each exit, the last one included.

    Returns:
      float64 [S_1 · S_2 · …], the last early exit's decisions fastest.
    """
    images = values[-1].size
    later = values[-1][None]
    for leave, value in zip(reversed(leaves[1:]), reversed(values[1:-1]), strict=True):
        later = np.where(leave[:, None] > 0, value, later).reshape(-1, images)
    if not leaves:
        return later.sum(axis=1)
    return ((leaves[0] @ values[0])[:, None] + (1 - leaves[0]) @ later.T).ravel()


def miou_bound(tp: np.ndarray, fp: np.ndarray, labelled: np.ndarray) -> tuple[float, np.ndarray]:
    """Bounds the mIoU of every mixture of some candidates from above by a sum over the images.

    Summed over the images, TP lies in a box [t0, t1] and the union U = labelled + FP in a box [u0, u1]. 1/U is convex, so it stays
    below its chord, and the product TP · 1/U below the mean of its two McCormick planes. Both are exact where TP is largest and U
    smallest.

    Args:
      tp, fp: int64 [m, I, C] of the m candidates.
      labelled: int64 [C], pixels per class, above 0.

    Returns:
      The constant and the weights, float64 [m, I], of the bound: constant + sum over images of the weight where it leaves.
    """
    t0, t1 = tp.min(0).sum(0), tp.max(0).sum(0)
    f0, f1 = fp.min(0).sum(0), fp.max(0).sum(0)
    low, high = 1 / (labelled + f1), 1 / (labelled + f0)  # of 1/U
    slope = (t0 + t1) / 2 * low * high
    constant = (t0 + t1) / 2 * high + slope * f0 - (t0 * high + t1 * low) / 2
    weights = tp @ ((low + high) / 2) - fp @ slope
    return float(constant.mean()), weights / labelled.size


# === Search ===


class Best:
    """The best configuration so far, what a better one needs, and how many configurations were scored or cut."""

    def __init__(self, objective: Objective):
        self.minimise_cost = objective.min_miou is not None
        self.cost_limit = math.inf if self.minimise_cost else objective.max_cost
        self.miou_floor = objective.min_miou if self.minimise_cost else 0.0
        self.key: tuple[float, float] | None = None
        self.configuration: Callable[[], Configuration] | None = None
        self.covered = 0
        self.scored = 0
        self.cut = {"relaxation": 0, "cost": 0, "miou_bound": 0}

    def promising(self, arrivals: np.ndarray, constant: float, weights: np.ndarray, leaves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Which decisions of each early exit may be part of something better; counts the combinations of the others as cut.

        A Lagrangian relaxation: whatever keeps the cost limit has a mIoU of at most the bound plus price · (limit - mean cost), at any
        price of at least 0. That is a sum over the images, so letting each image leave where it is worth most bounds all that a
        decision leaves open.

        Args:
          arrivals: float64 [m], cost of leaving at each exit.
          constant: of the bound on mIoU, see `miou_bound`.
          weights: float64 [m, I], likewise.
          leaves: float64 [S_j, I] of the m - 1 early exits.

        Returns:
          Positions int64 [at most S_j] per early exit.
        """
        worth = weights
        if self.cost_limit < math.inf:
            limit = self.cost_limit * (1 + ROUNDING)
            spared = (limit - arrivals[:, None]) / weights.shape[1]
            priced = weights + (PRICES / limit)[:, None, None] * spared
            worth = priced[priced.max(axis=1).sum(axis=1).argmin()]
        floor = self.miou_floor - ROUNDING
        kept = []
        for position, leave in enumerate(leaves):
            before = worth[:position].max(axis=0, initial=-math.inf)
            here = np.maximum(before, worth[position])
            later = np.maximum(before, worth[position + 1 :].max(axis=0))
            upper = constant + later.sum() + leave @ (here - later)
            kept.append(np.flatnonzero(upper >= floor))
        sizes = [leave.shape[0] for leave in leaves]
        self.cut["relaxation"] += math.prod(sizes) - math.prod(each.size for each in kept)
        return kept

    def may_improve(self, cost: np.ndarray, bound: np.ndarray) -> np.ndarray:
        """Which configurations, given their cost and an upper bound on their mIoU, may be better; counts the others as cut."""
        affordable = cost <= self.cost_limit * (1 + ROUNDING)
        keep = affordable & (bound >= self.miou_floor - ROUNDING)
        self.cut["cost"] += cost.size - int(affordable.sum())
        self.cut["miou_bound"] += int(affordable.sum()) - int(keep.sum())
        return keep

    def offer(self, cost: np.ndarray, accuracy: np.ndarray, configuration: Callable[[int], Configuration]) -> None:
        """Takes the best of some scored configurations if it beats the best so far.

        Args:
          cost: float64 [n].
          accuracy: float64 [n], mIoU.
          configuration: gives the configuration of a position in them.
        """
        self.scored += cost.size
        meets = np.flatnonzero((cost <= self.cost_limit * (1 + ROUNDING)) & (accuracy >= self.miou_floor - ROUNDING))
        if not meets.size:
            return
        first, second = (cost, -accuracy) if self.minimise_cost else (-accuracy, cost)
        position = meets[np.lexsort((second[meets], first[meets]))[0]]
        key = (float(first[position]), float(second[position]))
        if self.key is None or key < self.key:
            self.key, self.configuration = key, functools.partial(configuration, position)
            if self.minimise_cost:
                self.cost_limit = float(cost[position])
            else:
                self.miou_floor = float(accuracy[position])


def search(
    stats: Stats,
    costs: Costs,
    objective: Objective,
    setting: str = INPUT_DEPENDENT,
    max_early_exits: int = 1,
    quantiles: int = 26,
) -> Deployment:
    """Finds the best configuration of the space. Equally good ones: the better one on the other axis, then the one with fewer exits.

    Args:
      stats: of the candidates.
      costs: of the candidates.
      objective: what to reach. With `anytime` deadlines are spread over 0 to max_cost, or to the original's cost if min_miou is given.
      setting: `budgeted`, `input-dependent` or `anytime`.
      max_early_exits: largest number of exits in front of the last one, 0 to 2; unused by `budgeted`.
      quantiles: values of theta_img per exit and theta_pix where two early exits decide, at least 2.

    Raises:
      InfeasibleError: nothing meets the constraint.
      ValueError: an argument is outside its range.
    """
    check(setting in SETTINGS, "setting", f"one of {', '.join(SETTINGS)}", setting)
    check(max_early_exits in (0, 1, 2), "max_early_exits", "0, 1 or 2", max_early_exits)
    check(quantiles >= 2, "quantiles", "at least 2", quantiles)
    start = time.perf_counter()
    reference = original(stats, costs)

    def run(objective: Objective) -> Best:
        best = Best(objective)
        if setting == ANYTIME:
            _search_anytime(stats, costs, best, max_early_exits, horizon)
        else:
            _search_mixtures(stats, costs, best, setting, 0 if setting == BUDGETED else max_early_exits, quantiles)
        return best

    horizon = objective.max_cost or reference.cost
    best = run(objective)
    if best.configuration is None:
        if objective.min_miou is not None:
            asked, axis, nearest = f"min_miou={objective.min_miou:.6g}", "highest mIoU", run(Objective(max_cost=math.inf))
        else:
            asked, axis, nearest = f"max_cost={objective.max_cost:.6g}", "least cost", run(Objective(min_miou=0.0))
        configuration = nearest.configuration()
        accuracy, cost, _ = evaluate_configuration(stats, costs, configuration)
        names = " + ".join(f"{choice.exit}.{choice.head}" for choice in configuration.exits)
        raise InfeasibleError(f"{asked} is out of reach; the {axis} is at {names}: mIoU {accuracy:.6f}, {costs.name} {cost:.6g}")

    configuration = best.configuration()
    accuracy, cost, leaves_at = evaluate_configuration(stats, costs, configuration)
    chain = [stats.candidates.index(f"{choice.exit}.{choice.head}") for choice in configuration.exits]
    cost_p90 = np.quantile(arrival_costs(stats, costs, chain, _decides(configuration))[leaves_at], 0.9, method="inverted_cdf")
    rates = np.bincount(leaves_at, minlength=len(chain)) / leaves_at.size
    return Deployment(
        **{field.name: getattr(configuration, field.name) for field in dataclasses.fields(Configuration)},
        constraint=objective,
        predicted=Predicted(accuracy, costs.name, cost, float(cost_p90), tuple(rates.tolist())),
        original=reference,
        certificate=Certificate(best.covered, best.scored, best.cut, 0.0, time.perf_counter() - start, quantiles),
        stats_sha256="",
        fidelity=stats.fidelity,
        made_by=made_by(),
    )


def _choices(stats: Stats, chain: Sequence[int], thetas: Sequence[tuple[float, float]]) -> tuple[ExitChoice, ...]:
    names = [stats.candidates[k].partition(".") for k in chain]
    thresholds = [*thetas, *[(None, None)] * (len(chain) - len(thetas))]
    return tuple(ExitChoice(name, head, *pair) for (name, _, head), pair in zip(names, thresholds, strict=True))


def _search_anytime(stats: Stats, costs: Costs, best: Best, max_early_exits: int, horizon: float) -> None:
    miou_of_candidate = miou(stats.tp.sum(1), stats.fp.sum(1), stats.fn.sum(1))
    for chain in itertools.chain.from_iterable(chains(stats, length) for length in range(1, max_early_exits + 2)):
        arrivals = arrival_costs(stats, costs, chain, None)
        accuracy = mean_over_deadlines(miou_of_candidate[list(chain)], arrivals, horizon)
        best.covered += 1
        best.offer(
            arrivals[-1:],
            np.array([accuracy]),
            lambda _, chain=chain: Configuration(ANYTIME, False, _choices(stats, chain, []), horizon),
        )


def _search_mixtures(stats: Stats, costs: Costs, best: Best, setting: str, max_early_exits: int, quantiles: int) -> None:
    for early_exits in range(max_early_exits + 1):
        limit = quantiles if early_exits > 1 else len(stats.images)
        for edge_aware in (False, True) if early_exits else (False,):
            early = range(len(stats.candidates) - 1) if early_exits else ()
            of_candidate = [decisions(stats, candidate, edge_aware, limit) for candidate in early]
            for chain in chains(stats, early_exits + 1):
                _score_chain(stats, costs, best, setting, edge_aware, chain, [of_candidate[candidate] for candidate in chain[:-1]])


def _score_chain(
    stats: Stats, costs: Costs, best: Best, setting: str, edge_aware: bool, chain: Sequence[int], chosen: Sequence[Decisions]
) -> None:
    """Scores what may be better among all combinations of the decisions of a chain's early exits."""
    best.covered += math.prod(each.theta_img.size for each in chosen)
    arrivals = arrival_costs(stats, costs, chain, edge_aware)
    labelled = (stats.tp[-1] + stats.fn[-1]).sum(0)
    present = labelled > 0
    labelled = labelled[present]
    tp, fp = (counts[list(chain)][:, :, present] for counts in (stats.tp, stats.fp))
    constant, weights = miou_bound(tp, fp, labelled)

    rows = best.promising(arrivals, constant, weights, [each.leaves for each in chosen])
    leaves = [each.leaves[kept] for each, kept in zip(chosen, rows, strict=True)]
    shape = [kept.size for kept in rows]
    if 0 in shape:
        return
    cost = mixture_sums(leaves, [np.full(len(stats.images), each) for each in arrivals]) / len(stats.images)
    bound = constant + mixture_sums(leaves, list(weights))
    todo = np.flatnonzero(best.may_improve(cost, bound))
    todo = todo[np.argsort(cost[todo] if best.minimise_cost else -bound[todo])]
    for first in range(0, todo.size, BATCH):
        batch = todo[first : first + BATCH]
        if first:
            batch = batch[best.may_improve(cost[batch], bound[batch])]
        picked = np.unravel_index(batch, shape) if shape else ()
        stays = np.ones((batch.size, len(stats.images)))
        summed = np.zeros((2, batch.size, labelled.size))
        for position in range(len(chain)):
            here = stays * leaves[position][picked[position]] if position < len(chosen) else stays
            summed += [here @ tp[position], here @ fp[position]]
            stays = stays - here
        accuracy = miou(summed[0], summed[1], labelled - summed[0])

        def configuration(index: int, picked=picked) -> Configuration:
            at = [kept[pick[index]] for kept, pick in zip(rows, picked, strict=True)]
            thetas = [(float(each.theta_pix[s]), float(each.theta_img[s])) for each, s in zip(chosen, at, strict=True)]
            return Configuration(setting, edge_aware, _choices(stats, chain, thetas), None)

        best.offer(cost[batch], accuracy, configuration)


# === Command ===


def resolve_objective(
    reference: Original,
    setting: str,
    min_miou: float | None = None,
    max_drop_pp: float | None = None,
    max_cost: float | None = None,
    cost_share: float | None = None,
) -> Objective:
    """Turns the one constraint that is given, absolute or relative to the original network, into an objective.

    Args:
      reference: the original network.
      setting: see `search`.
      min_miou: 0..1.
      max_drop_pp: percentage points of mIoU below the original's; not for `anytime`, whose mIoU is a mean over deadlines.
      max_cost: in the unit of the costs.
      cost_share: of the original's cost.

    Raises:
      ValueError: not exactly one constraint is given, or it does not suit the setting.
    """
    given = {"min_miou": min_miou, "max_drop_pp": max_drop_pp, "max_cost": max_cost, "cost_share": cost_share}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"constraint: must be one of --min_miou, --max_drop_pp, --max_cost and --cost_share, got {given}")
    if max_drop_pp is not None:
        if setting == ANYTIME:
            raise ValueError("max_drop_pp: must be left out with anytime, whose mIoU is a mean over deadlines; use --min_miou")
        return Objective(min_miou=max(0.0, reference.miou - max_drop_pp / 100))
    if cost_share is not None:
        return Objective(max_cost=cost_share * reference.cost)
    return Objective(min_miou=min_miou, max_cost=max_cost)


def table(deployment: Deployment) -> str:
    """The chosen exits, and what they promise next to the original network."""
    confidence = "edge-aware" if deployment.edge_aware else "plain"
    lines = [f"{'exit':<8}{'head':<24}{'theta_pix':>10}{'theta_img':>10}{'leave here':>12}"]
    for choice, rate in zip(deployment.exits, deployment.predicted.exit_rates, strict=True):
        pix, img = ("-" if theta is None else f"{theta:.4f}" for theta in (choice.theta_pix, choice.theta_img))
        lines.append(f"{choice.exit:<8}{choice.head:<24}{pix:>10}{img:>10}{rate:>12.1%}")
    predicted, reference = deployment.predicted, deployment.original
    unit, scale = ("GMACs", 1e-9) if predicted.cost_name == "macs" else ("ms", 1.0)
    lines += [
        f"{deployment.setting}, {confidence} confidence",
        f"{'':<12}{'mIoU %':>10}{'mean ' + unit:>14}{'p90 ' + unit:>14}",
        f"{'original':<12}{100 * reference.miou:>10.2f}{scale * reference.cost:>14.4g}{scale * reference.cost:>14.4g}",
        f"{'predicted':<12}{100 * predicted.miou:>10.2f}{scale * predicted.cost_mean:>14.4g}{scale * predicted.cost_p90:>14.4g}",
        f"{'difference':<12}{100 * (predicted.miou - reference.miou):>+10.2f}{predicted.cost_mean / reference.cost:>13.3f}x"
        f"{predicted.cost_p90 / reference.cost:>13.3f}x",
    ]
    certificate = deployment.certificate
    cut = ", ".join(f"{count} by {rule}" for rule, count in certificate.cut_by_rule.items())
    lines.append(f"{certificate.covered} configurations: {certificate.scored} scored, cut {cut}; {certificate.seconds:.1f} s")
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """The command; see the flags."""
    values = flags.FLAGS
    path = os.path.join(values.workdir, "stats.npz")
    stats = Stats.load(path)
    if values.latency:
        from mess_runtime.benchmark import LatencyTable  # needs an interpreter

        measured = read_json(values.latency, LatencyTable.from_json)
        costs = latency_costs(stats, [dataclasses.asdict(row) for row in measured.rows], values.device, values.threads)
    else:
        costs = macs_costs(stats)
    objective = resolve_objective(
        original(stats, costs), values.setting, values.min_miou, values.max_drop_pp, values.max_cost, values.cost_share
    )
    try:
        deployment = search(stats, costs, objective, values.setting, values.max_early_exits, values.quantiles)
    except InfeasibleError as error:
        sys.exit(f"mess_tf.search: {error}")
    deployment = dataclasses.replace(deployment, stats_sha256=file_sha256(path))
    output = values.output or os.path.join(values.workdir, "deployment.json")
    deployment.save(output)
    print(table(deployment))
    print(output)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run, with stats.npz.", required=True)
    flags.DEFINE_string("latency", None, "latency.json: the costs are its medians in ms; without it, they are MACs.")
    flags.DEFINE_string("device", None, "Whose latencies count, where the file has several devices.")
    flags.DEFINE_integer("threads", None, "Latencies at how many threads count, where the file has several.")
    flags.DEFINE_float("min_miou", None, "Least cost with at least this mIoU, 0..1.")
    flags.DEFINE_float("max_drop_pp", None, "Least cost with an mIoU at most so many percentage points below the original's.")
    flags.DEFINE_float("max_cost", None, "Best mIoU with at most this mean cost, in MACs or ms.")
    flags.DEFINE_float("cost_share", None, "Best mIoU with at most this share of the original's cost.")
    flags.DEFINE_enum("setting", INPUT_DEPENDENT, SETTINGS, "How the network will run.")
    flags.DEFINE_integer("max_early_exits", 1, "Largest number of exits in front of the last one.", lower_bound=0, upper_bound=2)
    flags.DEFINE_integer("quantiles", 26, "Values of theta_img per exit and theta_pix where two early exits decide.", lower_bound=2)
    flags.DEFINE_string("output", None, "The file to write; default: deployment.json in the workdir.")
    app.run(main)
