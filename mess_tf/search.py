"""Deployment search: which exits, which heads and which thresholds meet a constraint best.

stats (what each candidate did to each image) → costs → the optimum of the space → deployment.json. Because the backbone is frozen, heads do
not disturb each other, so every configuration is scored from the statistics, without running a network. Needs no TensorFlow.

The space: one exit alone (the original network among them); with `input-dependent`, also any number of early exits in front of any deeper
last exit, every head at each, every theta_pix, plain and edge-aware confidence, and every theta_img that changes a decision (or, where
several early exits decide, quantiles of the image confidences). The result is the optimum of that space, or, where a time limit stopped the
search, the best found with the distance to a proven bound; see `optimum`.

Source: Kouris et al., "Multi-Exit Semantic Segmentation Networks", ECCV 2022. Departure: bounds replace the exhaustive scoring.
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from mess_runtime.bundle import ANYTIME, BUDGETED, FORMAT, INPUT_DEPENDENT, SETTINGS, check, file_sha256, read_json, write_json
from mess_tf import guarantee, kernels, optimum
from mess_tf.files import (
    RISKS,
    Certificate,
    Configuration,
    Deployment,
    ExitChoice,
    Guarantee,
    Objective,
    Original,
    Predicted,
    Stats,
    made_by,
)
from mess_tf.metrics import miou

# Points of the path that a guarantee is sought on, from the original network to the cheapest configuration.
PATH_POINTS = 20


class InfeasibleError(ValueError):
    """No configuration of the space meets the constraint; the message names the nearest one on each axis."""


# === Costs ===


@dataclasses.dataclass(frozen=True, eq=False)
class Resource:
    """One cost of prefixes and heads, and how those of a configuration make up its own.

    Attributes:
      name: with its unit.
      kind: `kernels.MEAN` or `P90` over the images, `TOTAL` of all that is deployed, or `PEAK`, the largest of its parts.
      prefix: float64 [E], from the image to the tap of each exit.
      head: float64 [K], of each candidate, up to its mask.
      decision: float64 [K, 2], of computing a candidate's confidence beside its mask, plain and edge-aware.
    """

    name: str
    kind: int
    prefix: np.ndarray
    head: np.ndarray
    decision: np.ndarray

    def __post_init__(self):
        for part in ("prefix", "head", "decision"):
            values = getattr(self, part)
            wrong = ~(np.isfinite(values) & (values >= 0))
            check(
                not wrong.any(), f"{self.name}.{part}{np.argwhere(wrong)[:1].tolist()}", "finite and at least 0", values[wrong][:1].tolist()
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Costs:
    """All costs; the first one is the mean cost of an image, `macs` or `latency_ms`, above 0 at every prefix.

    Names: `macs` and `macs_p90`, `latency_ms` and `latency_p90_ms` (means and 90th percentiles over the images), `parameters`, `size_bytes`
    and `memory_bytes` (the most that is alive at once).
    """

    resources: tuple[Resource, ...]

    def __post_init__(self):
        check(self.prefix.min() > 0, f"{self.name}.prefix", "above 0 at every exit", self.prefix.tolist())

    @property
    def names(self) -> list[str]:
        """Of all costs."""
        return [resource.name for resource in self.resources]

    @property
    def name(self) -> str:
        """Of the first one."""
        return self.resources[0].name

    @property
    def prefix(self) -> np.ndarray:
        """Of the first one, float64 [E]."""
        return self.resources[0].prefix

    @property
    def head(self) -> np.ndarray:
        """Of the first one, float64 [K]."""
        return self.resources[0].head

    @property
    def decision(self) -> np.ndarray:
        """Of the first one, float64 [K, 2]."""
        return self.resources[0].decision


def macs_costs(stats: Stats) -> Costs:
    """Costs that need no device; the first are multiply-accumulate operations."""
    free = np.zeros((len(stats.candidates), 2))
    parts = (
        ("macs", kernels.MEAN, stats.prefix_macs, stats.head_macs),
        ("macs_p90", kernels.P90, stats.prefix_macs, stats.head_macs),
        ("parameters", kernels.TOTAL, stats.prefix_parameters, stats.head_parameters),
        ("memory_bytes", kernels.PEAK, stats.prefix_memory_bytes, stats.head_memory_bytes),
    )
    return Costs(tuple(Resource(name, kind, prefix.astype(float), head.astype(float), free) for name, kind, prefix, head in parts))


def latency_costs(stats: Stats, rows: Sequence[Mapping[str, Any]], device: str | None = None, threads: int | None = None) -> Costs:
    """Costs of a device, the first in ms (the median), joined to the candidates by the hash of their submodels, and those of `macs_costs`.

    Args:
      stats: with the hashes of the exported submodels.
      rows: of latency.json, no two of the same sha256, device and threads; `submodel`, `p50_ms` and `size_bytes` are read as well.
      device: whose rows count; needed where the file has several.
      threads: likewise.

    Raises:
      ValueError: the rows leave the device or the number of threads open, lack a submodel, or hold something that is no latency.
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
    for submodel, sha256 in wanted.items():
        latency = by_sha256[sha256]["p50_ms"]
        check(math.isfinite(latency) and latency > 0, f"latency.json: {submodel}: p50_ms", "above 0", latency)

    def resource(name: str, kind: int, key: str) -> Resource:
        values = np.array([by_sha256[sha256][key] for sha256 in wanted.values()], np.float64)
        prefix, (head, mask, plain, edge) = values[: len(stats.exits)], values[len(stats.exits) :].reshape(4, -1)
        return Resource(name, kind, prefix, head, np.maximum(np.stack([plain - mask, edge - mask], axis=1), 0.0))

    measured = (
        resource("latency_ms", kernels.MEAN, "p50_ms"),
        resource("latency_p90_ms", kernels.P90, "p50_ms"),
        resource("size_bytes", kernels.TOTAL, "size_bytes"),
    )
    return Costs((*measured, *macs_costs(stats).resources))


def arrival_costs(stats: Stats, costs: Costs | Resource, chain: Sequence[int], edge_aware: bool | None) -> np.ndarray:
    """Cost of reaching the result of each exit of a chain: its prefix, all chosen heads up to it, and the decisions taken on the way.

    Args:
      stats: of the candidates.
      costs: of the candidates; of several, the first counts.
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
        return float(mean_over_deadlines(miou_of_exit, arrivals, configuration.horizon)), float(arrivals[-1]), leaves_at
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


def mean_over_deadlines(miou_of_exit: np.ndarray, arrivals: np.ndarray, horizon: float) -> np.ndarray:
    """Mean over all deadlines in [0, horizon] of the mIoU [m] or [m, B] of the latest result, 0 before the first one."""
    changes = np.minimum(np.append(np.maximum.accumulate(arrivals), np.inf), horizon)
    return np.diff(changes) @ np.asarray(miou_of_exit) / horizon


def mixture(stats: Stats, costs: Costs, configuration: Configuration) -> np.ndarray:
    """The candidate where each image leaves, int64 [I]."""
    chain = np.array([stats.candidates.index(f"{choice.exit}.{choice.head}") for choice in configuration.exits])
    return chain[evaluate_configuration(stats, costs, configuration)[2]]


def configuration_costs(stats: Stats, costs: Costs, configuration: Configuration) -> dict[str, float]:
    """All costs of one configuration by name, straight from their definition."""
    chain = [stats.candidates.index(f"{choice.exit}.{choice.head}") for choice in configuration.exits]
    leaves_at = evaluate_configuration(stats, costs, configuration)[2]
    values = {}
    for resource in costs.resources:
        arrivals = arrival_costs(stats, resource, chain, _decides(configuration))
        if resource.kind == kernels.MEAN:
            value = arrivals[leaves_at].mean()
        elif resource.kind == kernels.P90:
            value = np.quantile(arrivals[leaves_at], kernels.P90_SHARE, method="inverted_cdf")
        elif resource.kind == kernels.TOTAL:
            value = arrivals[-1]
        else:
            value = max(resource.prefix[stats.exit_of_candidate[chain[-1]]], resource.head[chain].max())
        values[resource.name] = float(value)
    return values


def original(stats: Stats, costs: Costs) -> Original:
    """The network without early exits."""
    choice = ExitChoice("final", stats.candidates[-1].partition(".")[2])
    accuracy, cost, _ = evaluate_configuration(stats, costs, Configuration(BUDGETED, False, (choice,), None))
    return Original(accuracy, cost)


# === Search ===


def exit_orders(stats: Stats, edge_aware: bool, quantiles: int | None) -> tuple[np.ndarray, np.ndarray]:
    """How the early candidates can split the images.

    theta_img takes the image confidences themselves (or, of these, `quantiles` evenly picked by rank), so that the exit rule meets them
    exactly.

    Returns:
      int32 [K - 1, T, I], the images by decreasing confidence; bool [K - 1, T, I], where in that order those that leave can end.
    """
    shares = (stats.confident[:-1, :, :, int(edge_aware)] / stats.pixels[:, None]).transpose(0, 2, 1)
    order = np.argsort(-shares, axis=2, kind="stable")
    ranked = np.take_along_axis(shares, order, axis=2)
    images = ranked.shape[2]
    ends = np.ones(ranked.shape, bool)
    ends[:, :, :-1] = ranked[:, :, 1:] < ranked[:, :, :-1]
    if quantiles is not None and quantiles < images:
        picked = images - 1 - np.linspace(0, images - 1, quantiles).round().astype(int)
        # Of images that are equally confident all leave or none.
        end_of = np.where(ends, np.arange(images), images)[:, :, ::-1]
        end_of = np.minimum.accumulate(end_of, axis=2)[:, :, ::-1]
        ends = np.zeros(ranked.shape, bool)
        np.put_along_axis(ends, end_of[:, :, picked], True, axis=2)
    return np.ascontiguousarray(order, np.int32), ends


def _roots(stats: Stats, costs: Costs, max_early_exits: int, quantiles: int | None) -> tuple[list[bool], tuple[optimum.Root, ...]]:
    """The parts of the space, and which kind of confidence decides in each."""
    most = min(max_early_exits, len(stats.exits) - 1)
    parts = [(None, 0, most)] if quantiles is None or most < 2 else [(None, 0, 1), (quantiles, 2, most)]
    kinds, roots = [], []
    for edge_aware in (False, True):
        resources = optimum.Resources(
            np.array([resource.kind for resource in costs.resources]),
            np.stack([resource.prefix for resource in costs.resources]),
            np.stack([resource.head for resource in costs.resources]),
            np.stack([resource.decision[:, int(edge_aware)] for resource in costs.resources]),
        )
        for grid, least, most in parts:
            least = max(least, int(edge_aware))  # one exit alone decides nothing
            if least <= most:
                kinds.append(edge_aware)
                roots.append(optimum.Root(*exit_orders(stats, edge_aware, grid), resources, least, most))
    return kinds, tuple(roots)


def _optimise(
    stats: Stats,
    costs: Costs,
    objective: Objective,
    setting: str,
    max_early_exits: int,
    quantiles: int | None,
    deadline: float,
    horizon: float,
) -> tuple[Configuration | None, optimum.Proof]:
    """The best configuration, None if there is none, and what was done."""
    limits = np.array([objective.limits.get(name, math.inf) for name in costs.names])
    present = (stats.tp[-1] + stats.fn[-1]).sum(0) > 0
    kinds, roots = _roots(stats, costs, 0 if setting != INPUT_DEPENDENT else max_early_exits, quantiles)
    problem = optimum.Problem(
        tp=np.ascontiguousarray(stats.tp[:, :, present], np.float64),
        fp=np.ascontiguousarray(stats.fp[:, :, present], np.float64),
        labelled=(stats.tp[-1] + stats.fn[-1]).sum(0)[present].astype(np.float64),
        exit_of=stats.exit_of_candidate,
        roots=roots,
        min_miou=objective.min_miou or 0.0,
        limits=limits,
        target=-1 if objective.minimise is None else costs.names.index(objective.minimise),
        second=0,
    )
    if setting == ANYTIME:
        chain, proof = optimum.best_anytime(problem, max_early_exits, horizon, deadline)
        return None if chain is None else Configuration(ANYTIME, False, _choices(stats, chain), horizon), proof

    search_of = optimum.Optimiser(problem, deadline)
    search_of.run()
    found, proof = search_of.best, search_of.proof
    if found and problem.target >= 0 and costs.resources[problem.target].kind != kernels.MEAN and not proof.open:
        # Such costs come in steps, so many configurations are equally cheap: the one with the best mIoU is sought among them.
        limits = problem.limits.copy()
        limits[problem.target] = found.costs[problem.target]
        among = optimum.Optimiser(dataclasses.replace(problem, limits=limits, target=-1), deadline)
        among.run()
        found, proof = among.best or found, dataclasses.replace(proof, covered=proof.covered + among.proof.covered)
        proof.scored, proof.open = proof.scored + among.proof.scored, among.proof.open
        proof.cut = {rule: count + among.proof.cut[rule] for rule, count in proof.cut.items()}
    if found is None:
        return None, proof
    edge_aware, order = kinds[found.root], problem.roots[found.root].order
    thetas = []
    for k, t, cut in found.early:
        image = order[k, t, cut - 1]
        thetas.append((float(stats.theta_pix[t]), float(stats.confident[k, image, t, int(edge_aware)] / stats.pixels[image])))
    chain = [*(k for k, _, _ in found.early), found.last]
    return Configuration(setting, edge_aware, _choices(stats, chain, thetas), None), proof


def _choices(stats: Stats, chain: Sequence[int], thetas: Sequence[tuple[float, float]] = ()) -> tuple[ExitChoice, ...]:
    names = [stats.candidates[k].partition(".") for k in chain]
    thresholds = [*thetas, *[(None, None)] * (len(chain) - len(thetas))]
    return tuple(ExitChoice(name, head, *pair) for (name, _, head), pair in zip(names, thresholds, strict=True))


def search(
    stats: Stats,
    costs: Costs,
    objective: Objective,
    setting: str = INPUT_DEPENDENT,
    max_early_exits: int = 2,
    quantiles: int | None = None,
    time_limit: float = math.inf,
) -> Deployment:
    """Finds the best configuration of the space. Of equally good ones: that with the better mIoU, or with the lower first cost.

    Args:
      stats: of the candidates.
      costs: of the candidates.
      objective: what to reach. With `anytime`, deadlines are spread over 0 to the limit of the first cost, or to the original's cost if it
        has none.
      setting: `budgeted`, `input-dependent` or `anytime`.
      max_early_exits: largest number of exits in front of the last one; unused by `budgeted`.
      quantiles: values of theta_img per exit and theta_pix where several early exits decide, at least 2; None for every value that changes
        a decision.
      time_limit: in seconds, after which the best found is returned with what is proven of it.

    Raises:
      InfeasibleError: nothing meets the constraint.
      TimeoutError: nothing was found in time that meets it, nor shown that there is nothing.
      ValueError: an argument is outside its range.
    """
    check(setting in SETTINGS, "setting", f"one of {', '.join(SETTINGS)}", setting)
    check(max_early_exits >= 0, "max_early_exits", "at least 0", max_early_exits)
    check(quantiles is None or quantiles >= 2, "quantiles", "at least 2", quantiles)
    check(time_limit > 0, "time_limit", "above 0", time_limit)
    for name in (*objective.limits, *([objective.minimise] if objective.minimise else [])):
        check(name in costs.names, "objective", f"of costs {', '.join(costs.names)}", name)
    start = time.perf_counter()
    reference = original(stats, costs)
    horizon = objective.limits.get(costs.name, reference.cost)

    def best(asked: Objective) -> tuple[Configuration | None, optimum.Proof]:
        return _optimise(stats, costs, asked, setting, max_early_exits, quantiles, start + time_limit, horizon)

    configuration, proof = best(objective)
    if configuration is None and proof.open:
        raise TimeoutError(f"time_limit: must be longer; after {time_limit:g} s nothing was found that meets {_asked(objective)}")
    if configuration is None:
        raise InfeasibleError(_nearest(stats, costs, objective, best))

    predicted = predict(stats, costs, configuration)
    reached = predicted.miou if objective.minimise is None else predicted.costs[objective.minimise]
    gap = abs(reached - proof.bound) if proof.open else 0.0
    bound = proof.bound if proof.open else reached
    certificate = Certificate(proof.covered, proof.scored, proof.cut, proof.open, float(bound), gap, time.perf_counter() - start, quantiles)
    return Deployment(
        **{field.name: getattr(configuration, field.name) for field in dataclasses.fields(Configuration)},
        constraint=objective,
        predicted=predicted,
        original=reference,
        certificate=certificate,
        guarantee=None,
        stats_sha256="",
        fidelity=stats.fidelity,
        made_by=made_by(),
    )


def predict(stats: Stats, costs: Costs, configuration: Configuration) -> Predicted:
    """What a configuration does on the images of the statistics."""
    accuracy, cost, leaves_at = evaluate_configuration(stats, costs, configuration)
    chain = [stats.candidates.index(f"{choice.exit}.{choice.head}") for choice in configuration.exits]
    arrivals = arrival_costs(stats, costs, chain, _decides(configuration))
    rates = np.bincount(leaves_at, minlength=len(chain)) / leaves_at.size
    drawn = guarantee.resamples(leaves_at.size)
    if configuration.setting == ANYTIME:
        of_exit = np.array([miou(*(drawn @ counts[k] for counts in (stats.tp, stats.fp, stats.fn))) for k in chain])
        mious = mean_over_deadlines(of_exit, arrivals, configuration.horizon)
    else:
        candidate, images = np.array(chain)[leaves_at], np.arange(leaves_at.size)
        mious = miou(*(drawn @ counts[candidate, images] for counts in (stats.tp, stats.fp, stats.fn)))
    return Predicted(
        miou=accuracy,
        cost_name=costs.name,
        cost_mean=cost,
        cost_p90=float(np.quantile(arrivals[leaves_at], kernels.P90_SHARE, method="inverted_cdf")),
        exit_rates=tuple(rates.tolist()),
        costs=configuration_costs(stats, costs, configuration),
        miou_interval=guarantee.interval(mious),
        cost_interval=guarantee.interval(drawn @ arrivals[leaves_at] / leaves_at.size),
        images=leaves_at.size,
    )


def _asked(objective: Objective) -> str:
    asked = [] if objective.min_miou is None else [f"min_miou={objective.min_miou:.6g}"]
    return " and ".join(asked + [f"{name}<={limit:.6g}" for name, limit in objective.limits.items()])


def _nearest(stats: Stats, costs: Costs, objective: Objective, best) -> str:
    """Says for each constraint how near to it one gets if the others hold."""
    relaxed = {}
    if objective.min_miou is not None:
        relaxed["highest mIoU"] = Objective(limits=objective.limits)
    for name in objective.limits:
        others = {other: limit for other, limit in objective.limits.items() if other != name}
        relaxed[f"least {name}"] = Objective(name, objective.min_miou or 0.0, others)
    nearest = []
    for axis, asked in relaxed.items():
        configuration, _ = best(asked)
        if configuration is None:
            nearest.append(f"the {axis} is out of reach as well")
            continue
        accuracy = evaluate_configuration(stats, costs, configuration)[0]
        values = configuration_costs(stats, costs, configuration)
        names = " + ".join(f"{choice.exit}.{choice.head}" for choice in configuration.exits)
        named = ", ".join(f"{name} {values[name]:.6g}" for name in dict.fromkeys([costs.name, *objective.limits]))
        nearest.append(f"the {axis} is at {names}: mIoU {accuracy:.6f}, {named}")
    return f"{_asked(objective)} is out of reach; {'; '.join(nearest)}"


def front(stats: Stats, costs: Costs, points: int | None = None, **space) -> list[Deployment]:
    """The Pareto front of mIoU and the first cost, from the cheapest configuration to the most accurate.

    Args:
      stats, costs: of the candidates.
      points: how many mIoU to ask for, evenly spread; None for every point of the front.
      space: `setting`, `max_early_exits` and `quantiles` of `search`.

    Returns:
      Each is the cheapest with its mIoU or more, and the most accurate at its cost.
    """
    check(points is None or points >= 2, "points", "at least 2", points)
    found = [search(stats, costs, Objective(costs.name, 0.0), **space)]
    highest = search(stats, costs, Objective(), **space).predicted.miou
    targets = iter(np.linspace(found[0].predicted.miou, highest, points)[1:]) if points else None
    while found[-1].predicted.miou < highest - kernels.ROUNDING:
        # A step that is far below one pixel of one class.
        target = next(targets) if targets else found[-1].predicted.miou + 1e-11
        if target > found[-1].predicted.miou:
            found.append(search(stats, costs, Objective(costs.name, min(target, highest)), **space))
    return found


def search_guaranteed(
    stats: Stats,
    costs: Costs,
    max_risk: float,
    confidence: float,
    risk: str,
    check_share: float,
    limits: dict[str, float] | None = None,
    **space,
) -> Deployment:
    """Finds the cheapest configuration whose risk is shown, on images that had no part in choosing it, to stay within a limit.

    On the choosing images, the best configurations at falling cost make up a path from the original network. On the checking images, their
    risks are tested in that order, each at the full level, up to the first that fails (fixed sequence testing, Learn then Test).

    Args:
      stats, costs: of the candidates.
      max_risk, confidence, risk: see `Guarantee`.
      check_share: share of the images that check, between 0 and 1.
      limits: see `Objective`.
      space: `max_early_exits`, `quantiles` and `time_limit` (of each of the searches) of `search`.

    Returns:
      What was predicted is of the checking images.

    Raises:
      InfeasibleError: not even the original network keeps the limits.
    """
    choosing, checking = guarantee.split(stats, check_share)
    reference = original(choosing, costs)
    limits = limits or {}

    def path() -> Iterator[Deployment]:
        cheapest = search(choosing, costs, Objective(costs.name, 0.0, limits), **space).predicted.cost_mean
        last = math.inf
        for limit in np.geomspace(reference.cost, cheapest * (1 + 1e-9), PATH_POINTS):
            if limit < last:
                within = limits | {costs.name: min(limit, limits.get(costs.name, math.inf))}
                candidate = search(choosing, costs, Objective(limits=within), **space)
                last = candidate.predicted.cost_mean
                yield candidate

    def losses(candidate: Deployment) -> np.ndarray:
        return guarantee.image_losses(checking, mixture(checking, costs, candidate), risk)

    accepted = guarantee.last_shown(path(), losses, max_risk, confidence)
    if accepted is None:
        raise InfeasibleError(
            f"max_risk={max_risk:g} cannot be shown with confidence {confidence:g} on {len(checking.images)} checking images of anything "
            f"but the original network; even no loss on any shows no less than {guarantee.least_risk(len(checking.images), confidence):.4f}"
        )
    estimate = losses(accepted)
    return dataclasses.replace(
        accepted,
        predicted=predict(checking, costs, accepted),
        original=original(checking, costs),
        guarantee=Guarantee(risk, max_risk, confidence, float(estimate.mean()), estimate.size),
    )


# === Command ===


def resolve_objective(
    reference: Original,
    costs: Costs,
    setting: str,
    min_miou: float | None = None,
    max_drop_pp: float | None = None,
    max_cost: float | None = None,
    cost_share: float | None = None,
    limits: Mapping[str, float] | None = None,
    minimise: str | None = None,
) -> Objective:
    """Turns the one constraint that is given, absolute or relative to the original network, into an objective.

    Args:
      reference: the original network.
      costs: of the candidates.
      setting: see `search`.
      min_miou: 0..1.
      max_drop_pp: percentage points of mIoU below the original's; not for `anytime`, whose mIoU is a mean over deadlines.
      max_cost: of the first cost, in its unit.
      cost_share: of the original's first cost.
      limits: further limits by name of the cost.
      minimise: cost that is minimised under a constraint on mIoU; the first one if it is not given.

    Raises:
      ValueError: not exactly one constraint is given, or it does not suit the setting.
    """
    given = {"min_miou": min_miou, "max_drop_pp": max_drop_pp, "max_cost": max_cost, "cost_share": cost_share}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"constraint: must be one of --min_miou, --max_drop_pp, --max_cost and --cost_share, got {given}")
    limits = dict(limits or {})
    if max_drop_pp is not None:
        if setting == ANYTIME:
            raise ValueError("max_drop_pp: must be left out with anytime, whose mIoU is a mean over deadlines; use --min_miou")
        min_miou = max(0.0, reference.miou - max_drop_pp / 100)
    if min_miou is not None:
        return Objective(minimise or costs.name, min_miou, limits)
    check(minimise is None, "minimise", "left out where the cost is limited and mIoU maximised", minimise)
    return Objective(limits={costs.name: cost_share * reference.cost if max_cost is None else max_cost} | limits)


def search_table(
    stats: Stats, devices: Mapping[str, Costs], constraints: Sequence[Mapping[str, Any]], setting: str = INPUT_DEPENDENT, **space
) -> list[tuple[str, Mapping[str, Any], Deployment | None]]:
    """The best configuration for every device and constraint.

    Args:
      stats: of the candidates.
      devices: name to costs.
      constraints: keyword arguments of `resolve_objective`.
      setting, space: see `search`.

    Returns:
      Device, constraint and deployment, None where the constraint is out of reach.
    """
    rows = []
    for device, costs in devices.items():
        for constraint in constraints:
            objective = resolve_objective(original(stats, costs), costs, setting, **constraint)
            try:
                rows.append((device, constraint, search(stats, costs, objective, setting, **space)))
            except InfeasibleError:
                rows.append((device, constraint, None))
    return rows


def _unit(cost_name: str) -> tuple[str, float]:
    return ("GMACs", 1e-9) if cost_name == "macs" else ("ms", 1.0)


def table(deployment: Deployment) -> str:
    """The chosen exits, and what they promise next to the original network."""
    confidence = "edge-aware" if deployment.edge_aware else "plain"
    lines = [f"{'exit':<8}{'head':<24}{'theta_pix':>10}{'theta_img':>10}{'leave here':>12}"]
    for choice, rate in zip(deployment.exits, deployment.predicted.exit_rates, strict=True):
        pix, img = ("-" if theta is None else f"{theta:.4f}" for theta in (choice.theta_pix, choice.theta_img))
        lines.append(f"{choice.exit:<8}{choice.head:<24}{pix:>10}{img:>10}{rate:>12.1%}")
    predicted, reference = deployment.predicted, deployment.original
    unit, scale = _unit(predicted.cost_name)
    lines += [
        f"{deployment.setting}, {confidence} confidence",
        f"{'':<12}{'mIoU %':>10}{'mean ' + unit:>14}{'p90 ' + unit:>14}",
        f"{'original':<12}{100 * reference.miou:>10.2f}{scale * reference.cost:>14.4g}{scale * reference.cost:>14.4g}",
        f"{'predicted':<12}{100 * predicted.miou:>10.2f}{scale * predicted.cost_mean:>14.4g}{scale * predicted.cost_p90:>14.4g}",
        f"{'difference':<12}{100 * (predicted.miou - reference.miou):>+10.2f}{predicted.cost_mean / reference.cost:>13.3f}x"
        f"{predicted.cost_p90 / reference.cost:>13.3f}x",
    ]
    low, high = (100 * value for value in predicted.miou_interval)
    cheap, dear = (scale * value for value in predicted.cost_interval)
    lines.append(
        f"95 % of resamples of the {predicted.images} images: mIoU {low:.2f} to {high:.2f} %, mean {cheap:.4g} to {dear:.4g} {unit}"
    )
    lines += [
        f"{name} {predicted.costs[name]:.6g}, at most {limit:.6g}"
        for name, limit in deployment.constraint.limits.items()
        if name in predicted.costs
    ]
    if (promise := deployment.guarantee) is not None:
        against = "the original network" if promise.risk == "final" else "the labels"
        lines.append(
            f"risk against {against} at most {promise.max_risk:g} with confidence {promise.confidence:g} "
            f"({promise.estimate:.4f} on {promise.images} checking images), for images like these"
        )
    certificate = deployment.certificate
    cut = ", ".join(f"{count} by {rule}" for rule, count in certificate.cut_by_rule.items())
    proven = "the optimum" if certificate.gap == 0 else f"within {certificate.gap:.6g} of the optimum, {certificate.open} left open"
    lines.append(f"{certificate.covered} configurations: {certificate.scored} scored, cut {cut}; {proven}; {certificate.seconds:.1f} s")
    return "\n".join(lines)


def overview(rows: Sequence[tuple[str, Mapping[str, Any], Deployment | None]]) -> str:
    """One line per row of `search_table`."""
    lines = [f"{'device':<24}{'constraint':<28}{'mIoU %':>8}{'mean':>12}{'':<6} {'original':>9}  exits"]
    for device, constraint, deployment in rows:
        asked = ", ".join(f"{name}={value:g}" for name, value in constraint.items() if isinstance(value, float))
        if deployment is None:
            lines.append(f"{device:<24}{asked:<28}  out of reach")
            continue
        predicted = deployment.predicted
        unit, scale = _unit(predicted.cost_name)
        exits = " + ".join(f"{choice.exit}.{choice.head}" for choice in deployment.exits)
        share = predicted.cost_mean / deployment.original.cost
        lines.append(
            f"{device:<24}{asked:<28}{100 * predicted.miou:>8.2f}{scale * predicted.cost_mean:>12.4g} {unit:<5} {share:>8.3f}x  {exits}"
        )
    return "\n".join(lines)


def plot_front(stats: Stats, costs: Costs, points: Sequence[Deployment], chosen: Deployment, path: str | os.PathLike) -> None:
    """Draws the Pareto front with the chosen configuration, the original network and every candidate alone."""
    from matplotlib.figure import Figure

    unit, scale = _unit(costs.name)
    figure = Figure((8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel=f"mean {unit} per image", ylabel=f"mIoU % on {stats.split}")
    alone = 100 * miou(stats.tp.sum(1), stats.fp.sum(1), stats.fn.sum(1))
    for e, name in enumerate(stats.exits[:-1]):
        here = stats.exit_of_candidate == e
        axes.scatter(scale * (costs.prefix[e] + costs.head[here]), alone[here], s=14, alpha=0.6, label=f"{name} alone")
    axes.step(
        [scale * point.predicted.cost_mean for point in points],
        [100 * point.predicted.miou for point in points],
        where="post",
        color="black",
        marker=".",
        label="front",
    )
    for name, cost, accuracy, marker in (
        ("original", chosen.original.cost, chosen.original.miou, "s"),
        ("chosen", chosen.predicted.cost_mean, chosen.predicted.miou, "*"),
    ):
        axes.scatter(scale * cost, 100 * accuracy, s=120, marker=marker, edgecolors="black", label=name, zorder=3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _devices(stats: Stats, values) -> dict[str, Costs]:
    """Costs of every device and number of threads that the flags allow."""
    if not values.latency:
        return {"macs": macs_costs(stats)}
    from mess_runtime.benchmark import LatencyTable  # needs an interpreter

    rows = [dataclasses.asdict(row) for row in read_json(values.latency, LatencyTable.from_json).rows]
    if not values.all_devices:
        costs = latency_costs(stats, rows, values.device, values.threads)
        return {values.device or rows[0]["device"]: costs}
    pairs = sorted({(row["device"], row["threads"]) for row in rows})
    return {f"{device}-t{threads}": latency_costs(stats, rows, device, threads) for device, threads in pairs}


def _limits(values) -> dict[str, float]:
    limits = {}
    for text in values.limit:
        name, _, number = text.partition("=")
        try:
            limits[name] = float(number)
        except ValueError:
            raise ValueError(f"limit: must be NAME=NUMBER, got {text!r}") from None
    return limits


def main(_: Sequence[str]) -> None:
    """The command; see the flags."""
    values = flags.FLAGS
    path = os.path.join(values.workdir, "stats.npz")
    stats = Stats.load(path)
    devices, limits, digest = _devices(stats, values), _limits(values), file_sha256(path)
    space = {"max_early_exits": values.max_early_exits, "quantiles": values.quantiles, "time_limit": values.time_limit}
    given = [(name, float(value)) for name in ("min_miou", "max_drop_pp", "max_cost", "cost_share") for value in values[name].value or []]
    constraints = [{name: value, "limits": limits, "minimise": values.minimise} for name, value in given]
    output = values.output or os.path.join(values.workdir, "deployment.json")
    try:
        if values.max_risk is not None:
            check(
                not constraints and len(devices) == 1, "max_risk", "given for one device, without another constraint", given or [*devices]
            )
            (costs,) = devices.values()
            deployment = search_guaranteed(
                stats, costs, values.max_risk, values.confidence, values.risk, values.check_share or 0.5, limits, **space
            )
        elif len(constraints) * len(devices) > 1:
            rows = search_table(stats, devices, constraints, values.setting, **space)
            folder = Path(values.output or os.path.join(values.workdir, "deployments"))
            folder.mkdir(parents=True, exist_ok=True)
            for device, constraint, deployment in rows:
                if deployment is not None:
                    (asked,) = (f"{name}-{value:g}" for name, value in constraint.items() if isinstance(value, float))
                    dataclasses.replace(deployment, stats_sha256=digest).save(folder / f"{device}-{asked}.json")
            print(overview(rows))
            print(folder)
            return
        else:
            (costs,) = devices.values()
            chooses, checks = (stats, stats) if not values.check_share else guarantee.split(stats, values.check_share)
            objective = resolve_objective(
                original(chooses, costs), costs, values.setting, **(constraints[0] if constraints else {"limits": limits})
            )
            deployment = search(chooses, costs, objective, values.setting, **space)
            deployment = dataclasses.replace(deployment, predicted=predict(checks, costs, deployment), original=original(checks, costs))
    except (InfeasibleError, TimeoutError) as error:
        sys.exit(f"mess_tf.search: {error}")
    deployment = dataclasses.replace(deployment, stats_sha256=digest)
    deployment.save(output)
    print(table(deployment))
    if values.front:
        points = front(stats, costs, values.front, setting=values.setting, **space)
        rows = [
            {"miou": point.predicted.miou, **point.predicted.costs, "exits": list(map(dataclasses.asdict, point.exits))} for point in points
        ]
        write_json(Path(output).with_name("front.json"), {"format": FORMAT, "setting": values.setting, "points": rows})
        plot_front(stats, costs, points, deployment, Path(output).with_name("front.png"))
        print(Path(output).with_name("front.png"))
    print(output)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run, with stats.npz.", required=True)
    flags.DEFINE_string("latency", None, "latency.json: the costs are its medians in ms; without it, they are MACs.")
    flags.DEFINE_string("device", None, "Whose latencies count, where the file has several devices.")
    flags.DEFINE_integer("threads", None, "Latencies at how many threads count, where the file has several.")
    flags.DEFINE_bool("all_devices", False, "A deployment for each device and number of threads of the file.")
    flags.DEFINE_list(
        "min_miou",
        None,
        "Least cost with at least this mIoU, 0..1. Of this and the next three one is given; several values, with commas, make a table.",
    )
    flags.DEFINE_list("max_drop_pp", None, "Least cost with an mIoU at most so many percentage points below the original's.")
    flags.DEFINE_list("max_cost", None, "Best mIoU with at most this mean cost, in MACs or ms.")
    flags.DEFINE_list("cost_share", None, "Best mIoU with at most this share of the original's cost.")
    flags.DEFINE_multi_string("limit", [], "Further limits, NAME=NUMBER: " + Costs.__doc__.split("Names: ")[1])
    flags.DEFINE_string("minimise", None, "Cost that is minimised with --min_miou or --max_drop_pp; default: the mean cost of an image.")
    flags.DEFINE_enum("setting", INPUT_DEPENDENT, SETTINGS, "How the network will run.")
    flags.DEFINE_integer("max_early_exits", 2, "Largest number of exits in front of the last one.", lower_bound=0)
    flags.DEFINE_integer(
        "quantiles", None, "Values of theta_img per exit and theta_pix where several early exits decide; default: all.", lower_bound=2
    )
    flags.DEFINE_float("time_limit", 600.0, "Seconds after which the best found is taken, with a proven bound.")
    flags.DEFINE_float("check_share", None, "Share of the images that have no part in choosing; the predictions are of them.")
    flags.DEFINE_float("max_risk", None, "Least cost with a risk of at most this, guaranteed with --confidence; see --risk.")
    flags.DEFINE_float("confidence", 0.95, "Of the guarantee, for images drawn like those of the calibration.")
    flags.DEFINE_enum(
        "risk", "labels", RISKS, "final: share of pixels that differ from the original's; labels: pixel accuracy lost against it."
    )
    flags.DEFINE_integer("front", None, "Draws the Pareto front with so many points: front.png and front.json.", lower_bound=2)
    flags.DEFINE_string(
        "output", None, "The file to write, or the folder for several; default: deployment.json or deployments in the workdir."
    )
    app.run(main)
