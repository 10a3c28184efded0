"""Which exits, which heads and which thresholds meet a constraint best.

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
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mess_runtime.bundle import ANYTIME, INPUT_DEPENDENT, SETTINGS, check
from mess_tf.files import (
    Certificate,
    Configuration,
    Deployment,
    ExitChoice,
    Guarantee,
    Objective,
    Original,
    Stats,
    made_by,
)
from mess_tf.optimise import guarantee, kernels, optimum
from mess_tf.optimise import problem as problems
from mess_tf.optimise.anytime import best_anytime
from mess_tf.optimise.space import Costs, configuration_costs, evaluate_configuration, mixture, original, predict

# Points of the path that a guarantee is sought on, from the original network to the cheapest configuration.
PATH_POINTS = 20


class InfeasibleError(ValueError):
    """No configuration of the space meets the constraint; the message names the nearest one on each axis."""


def exit_orders(stats: Stats, edge_aware: bool, quantiles: int | None) -> tuple[np.ndarray, np.ndarray]:
    """How the early candidates can split the images.

    theta_img takes the image confidences themselves (or, of these, `quantiles` evenly picked by rank), so that the exit rule meets them
    exactly.

    Returns:
      int32 [K - 1, T, I], the images by decreasing confidence; bool [K - 1, T, I], where in that order those that leave can end.
    """
    candidates, images, thetas = stats.confident.shape[:3]
    order, allowed = np.empty((candidates - 1, thetas, images), np.int32), np.empty((candidates - 1, thetas, images), bool)
    for k in range(candidates - 1):  # one by one, since those of all together would be the most that lies in memory
        shares = (stats.confident[k, :, :, int(edge_aware)] / stats.pixels[:, None]).T
        order[k] = np.argsort(-shares, axis=1, kind="stable")
        ranked = np.take_along_axis(shares, order[k], axis=1)
        ends = np.ones(ranked.shape, bool)
        ends[:, :-1] = ranked[:, 1:] < ranked[:, :-1]
        if quantiles is not None and quantiles < images:
            picked = images - 1 - np.linspace(0, images - 1, quantiles).round().astype(int)
            # Of images that are equally confident all leave or none.
            end_of = np.where(ends, np.arange(images), images)[:, ::-1]
            end_of = np.minimum.accumulate(end_of, axis=1)[:, ::-1]
            ends = np.zeros(ranked.shape, bool)
            np.put_along_axis(ends, end_of[:, picked], True, axis=1)
        allowed[k] = ends
    return order, allowed


def _dense(stats: Stats, counts: np.ndarray) -> np.ndarray:
    """Counts [K, P] of the pairs of `Stats`, float64 [K, I, C] of the classes that labels hold."""
    held = stats.labelled_of_class > 0
    kept = held[stats.class_of_pair]
    where = stats.image_of_pair[kept], (np.cumsum(held) - 1)[stats.class_of_pair[kept]]
    dense = np.zeros((len(counts), len(stats.images), np.count_nonzero(held)))
    for of_candidate, values in zip(dense, counts, strict=True):
        of_candidate[where] = values[kept]
    return dense


def _roots(stats: Stats, costs: Costs, max_early_exits: int, quantiles: int | None) -> tuple[list[bool], tuple[problems.Root, ...]]:
    """The parts of the space, and which kind of confidence decides in each."""
    most = min(max_early_exits, len(stats.exits) - 1)
    parts = [(None, 0, most)] if quantiles is None or most < 2 else [(None, 0, 1), (quantiles, 2, most)]
    kinds, roots = [], []
    for edge_aware in (False, True):
        resources = problems.Resources(
            np.array([resource.kind for resource in costs.resources]),
            np.stack([resource.prefix for resource in costs.resources]),
            np.stack([resource.head for resource in costs.resources]),
            np.stack([resource.decision[:, int(edge_aware)] for resource in costs.resources]),
        )
        for grid, least, most in parts:
            least = max(least, int(edge_aware))  # one exit alone decides nothing
            if least <= most:
                kinds.append(edge_aware)
                roots.append(problems.Root(*exit_orders(stats, edge_aware, grid), resources, least, most))
    return kinds, tuple(roots)


def find(
    stats: Stats,
    costs: Costs,
    objective: Objective,
    setting: str,
    max_early_exits: int,
    quantiles: int | None,
    deadline: float,
    horizon: float = math.inf,
) -> tuple[Configuration | None, problems.Proof]:
    """The best configuration, None if there is none, and what was done; as `search`, until a deadline of kernels.clock()."""
    limits = np.array([objective.limits.get(name, math.inf) for name in costs.names])
    kinds, roots = _roots(stats, costs, 0 if setting != INPUT_DEPENDENT else max_early_exits, quantiles)
    problem = problems.Problem(
        tp=_dense(stats, stats.tp),
        fp=_dense(stats, stats.fp),
        labelled=stats.labelled_of_class[stats.labelled_of_class > 0].astype(np.float64),
        exit_of=stats.exit_of_candidate,
        roots=roots,
        min_miou=objective.min_miou or 0.0,
        limits=limits,
        target=-1 if objective.minimise is None else costs.names.index(objective.minimise),
        second=0,
    )
    if setting == ANYTIME:
        chain, proof = best_anytime(problem, max_early_exits, horizon, deadline)
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
    horizon: float | None = None,
) -> Deployment:
    """Finds the best configuration of the space. Of equally good ones: that with the better mIoU, or with the lower first cost.

    Args:
      stats: of the candidates.
      costs: of the candidates.
      objective: what to reach. With `anytime`, deadlines are spread over 0 to the limit of the first cost, or to `horizon` if it has none.
      setting: `budgeted`, `input-dependent` or `anytime`.
      max_early_exits: largest number of exits in front of the last one; unused by `budgeted`.
      quantiles: values of theta_img per exit and theta_pix where several early exits decide, at least 2; None for every value that changes
        a decision.
      time_limit: in seconds, after which the best found is returned with what is proven of it.
      horizon: None for the original's cost.

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
    start = kernels.clock()
    reference = original(stats, costs)
    horizon = objective.limits.get(costs.name, horizon or reference.cost)

    def best(asked: Objective) -> tuple[Configuration | None, problems.Proof]:
        return find(stats, costs, asked, setting, max_early_exits, quantiles, start + time_limit, horizon)

    configuration, proof = best(objective)
    if configuration is None and proof.open:
        raise TimeoutError(f"time_limit: must be longer; after {time_limit:g} s nothing was found that meets {asked_in_words(objective)}")
    if configuration is None:
        raise InfeasibleError(_nearest(stats, costs, objective, best))

    predicted = predict(stats, costs, configuration)
    reached = predicted.miou if objective.minimise is None else predicted.costs[objective.minimise]
    gap = abs(reached - proof.bound) if proof.open else 0.0
    bound = proof.bound if proof.open else reached
    certificate = Certificate(proof.covered, proof.scored, proof.cut, proof.open, float(bound), gap, kernels.clock() - start, quantiles)
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


def asked_in_words(objective: Objective) -> str:
    """The constraint of an objective."""
    asked = [] if objective.min_miou is None else [f"min_miou={objective.min_miou:.6g}"]
    return " and ".join(asked + [f"{name}<={limit:.6g}" for name, limit in objective.limits.items()])


def relaxed(objective: Objective) -> dict[str, Objective]:
    """For each constraint, in words, what gets nearest to it if the others hold."""
    found = {}
    if objective.min_miou is not None:
        found["highest mIoU"] = Objective(limits=objective.limits)
    for name in objective.limits:
        others = {other: limit for other, limit in objective.limits.items() if other != name}
        found[f"least {name}"] = Objective(name, objective.min_miou or 0.0, others)
    return found


def _nearest(stats: Stats, costs: Costs, objective: Objective, best) -> str:
    """Says for each constraint how near to it one gets if the others hold."""
    nearest = []
    for axis, asked in relaxed(objective).items():
        configuration, _ = best(asked)
        if configuration is None:
            nearest.append(f"the {axis} is out of reach as well")
            continue
        accuracy = evaluate_configuration(stats, costs, configuration)[0]
        values = configuration_costs(stats, costs, configuration)
        names = " + ".join(f"{choice.exit}.{choice.head}" for choice in configuration.exits)
        named = ", ".join(f"{name} {values[name]:.6g}" for name in dict.fromkeys([costs.name, *objective.limits]))
        nearest.append(f"the {axis} is at {names}: mIoU {accuracy:.6f}, {named}")
    return f"{asked_in_words(objective)} is out of reach; {'; '.join(nearest)}"


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
    choices: Sequence[tuple[Stats, Costs]],
    against: Stats,
    start: float,
    max_risk: float,
    confidence: float,
    risk: str,
    check_share: float,
    limits: dict[str, float] | None = None,
    **space,
) -> tuple[int, Deployment]:
    """Finds the cheapest configuration whose risk is shown, on images that had no part in choosing it, to stay within a limit.

    On the choosing images, the best configurations of all choices at falling cost make up one path from the original network. On the
    checking images, their risks are tested in that order, each at the full level, up to the first that fails (fixed sequence testing, Learn
    then Test). The path is the same whatever the checking images show, so the promise holds for any number of choices.

    Args:
      choices: statistics of the same images, and costs of the same name.
      against: of the same images, whose original network the risk `labels` is against.
      start: cost of the original network, where the path begins.
      max_risk, confidence, risk: see `Guarantee`.
      check_share: share of the images that check, between 0 and 1.
      limits: see `Objective`.
      space: `max_early_exits`, `quantiles` and `time_limit` (of each of the searches) of `search`.

    Returns:
      The position of the choice, and its configuration. What was predicted is of the checking images.

    Raises:
      InfeasibleError: not even the original network keeps the limits.
    """
    parts = [(*guarantee.split(stats, check_share), costs) for stats, costs in choices]
    against = guarantee.split(against, check_share)[1]
    limits = limits or {}

    def path() -> Iterator[tuple[int, Deployment]]:
        cheapest, problems = {}, []
        for number, (choosing, _, costs) in enumerate(parts):
            try:
                cheapest[number] = search(choosing, costs, Objective(costs.name, 0.0, limits), **space).predicted.cost_mean
            except InfeasibleError as error:
                problems.append(error)
        if not cheapest:
            raise problems[0]
        end, last = min(cheapest.values()) * (1 + 1e-9), math.inf
        for limit in np.geomspace(max(start, end), end, PATH_POINTS):
            if limit >= last:
                continue
            found = []
            for number in (number for number, least in cheapest.items() if least <= limit):
                choosing, _, costs = parts[number]
                within = limits | {costs.name: min(limit, limits.get(costs.name, math.inf))}
                found.append((number, search(choosing, costs, Objective(limits=within), **space)))
            best = min(found, key=lambda each: (-each[1].predicted.miou, each[1].predicted.cost_mean))
            last = best[1].predicted.cost_mean
            yield best

    def losses(found: tuple[int, Deployment]) -> np.ndarray:
        number, candidate = found
        _, checking, costs = parts[number]
        return guarantee.image_losses(checking, mixture(checking, costs, candidate), risk, against)

    shown = guarantee.last_shown(path(), losses, max_risk, confidence)
    if shown is None:
        images = len(against.images)
        raise InfeasibleError(
            f"max_risk={max_risk:g} cannot be shown with confidence {confidence:g} on {images} checking images of anything "
            f"but the original network; even no loss on any shows no less than {guarantee.least_risk(images, confidence):.4f}"
        )
    number, accepted = shown
    _, checking, costs = parts[number]
    estimate = losses(shown)
    return number, dataclasses.replace(
        accepted,
        predicted=predict(checking, costs, accepted),
        original=original(checking, costs),
        guarantee=Guarantee(risk, max_risk, confidence, float(estimate.mean()), estimate.size),
    )


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
    for name, value in given.items():
        check(math.isfinite(value), name, "finite", value)
    if max_drop_pp is not None:
        if setting == ANYTIME:
            raise ValueError("max_drop_pp: must be left out with anytime, whose mIoU is a mean over deadlines; use --min_miou")
        min_miou = max(0.0, reference.miou - max_drop_pp / 100)
        check(min_miou <= 1, "max_drop_pp", f"at least {100 * (reference.miou - 1):.4g}, which is an mIoU of 100 %", max_drop_pp)
    if min_miou is not None:
        return Objective(minimise or costs.name, min_miou, limits)
    check(minimise is None, "minimise", "left out where the cost is limited and mIoU maximised", minimise)
    check(costs.name not in limits, f"limits.{costs.name}", "left out where the constraint is one on it", limits.get(costs.name))
    return Objective(limits={costs.name: cost_share * reference.cost if max_cost is None else max_cost} | limits)
