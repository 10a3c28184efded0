"""Backend, precision and who decides as choices of the search: each combination is searched alone, and the best of all is taken.

What is asked for relative to the original network is relative to one original for all of them, see `reference`.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mess_runtime.bundle import NEIGHBOURS, PRECISIONS, check
from mess_tf.files import (
    IMAGE_DECIDES,
    REGIONS,
    REGIONS_DECIDE,
    Asked,
    Certificate,
    Combination,
    Configuration,
    Deployment,
    Objective,
    Original,
    RegionStats,
    Stats,
    made_by,
    shown,
)
from mess_tf.optimise import guarantee, regions
from mess_tf.optimise.regions import RegionCosts
from mess_tf.optimise.search import InfeasibleError, resolve_objective, search, search_guaranteed
from mess_tf.optimise.space import Costs, latency_costs, macs_costs, matching, original, predict


@dataclasses.dataclass(frozen=True, eq=False)
class Regional:
    """What is known of an option where regions decide.

    Attributes:
      stats: of the same precision and images.
      stats_sha256: of the file of the statistics.
      costs: None where it cannot be chosen.
      reason: why it cannot.
    """

    stats: RegionStats
    stats_sha256: str
    costs: RegionCosts | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Option:
    """One backend and precision.

    Attributes:
      backend: as in latency.json; None without latencies.
      stats: of this precision.
      costs: on this backend; None where it cannot be chosen.
      reason: why it cannot.
      stats_sha256: of the file of the statistics.
      regional: where there are statistics of regions.
    """

    backend: str | None
    stats: Stats
    costs: Costs | None
    reason: str = ""
    stats_sha256: str = ""
    regional: Regional | None = None

    @property
    def name(self) -> str:
        """Precision and backend, in words."""
        return " on ".join(filter(None, (self.stats.precision, self.backend)))


def options_of(
    stats: Mapping[str, Stats],
    rows: Sequence[Mapping[str, Any]] | None,
    device: str | None = None,
    threads: int | None = None,
    backends: Sequence[str] = (),
    refused: Mapping[tuple[str, str], str] | None = None,
    regional: Mapping[str, Regional] | None = None,
) -> list[Option]:
    """All backends and precisions that there are to choose from, those among them that cannot be chosen with the reason.

    Args:
      stats: of one precision each, by SHA-256 of the file.
      rows: of latency.json, None for costs in multiply-accumulates.
      device, threads: see `latency_costs`.
      backends: as in latency.json; none for all of this device.
      refused: by backend and precision: why one must not be chosen.
      regional: statistics of regions, by SHA-256 of the file of those of whole images that they belong to.

    Raises:
      ValueError: nothing can be chosen, statistics cannot be compared, or as `latency_costs` of the only combination.
    """
    first, *others = stats.values()
    for each, key in itertools.product(others, ("split", "images", "classes", "candidates", "fidelity")):
        same = getattr(each, key) == getattr(first, key)
        check(same, f"statistics in {each.precision}: {key}", f"those in {first.precision}", getattr(each, key))
    regional = dict(regional or {})
    if rows is None:
        for digest, each in regional.items():
            if not each.reason:
                regional[digest] = dataclasses.replace(each, costs=regions.region_macs(each.stats))
        return [Option(None, each, macs_costs(each), "", digest, regional.get(digest)) for digest, each in stats.items()]
    known = sorted({row["backend_requested"] for row in rows})
    check(set(backends) <= set(known), "backends", f"of {known} as in latency.json", ",".join(backends))
    here = matching(rows, device=device, threads=threads)
    wanted = [*itertools.product(stats.items(), backends or sorted({row["backend_requested"] for row in here}))]
    options = []
    for (digest, each), backend in wanted:
        costs, reason = None, (refused or {}).get((backend, each.precision), "")
        if not reason:
            try:
                costs = latency_costs(each, here, backend=backend)
            except ValueError as error:
                if len(wanted) == 1:
                    raise
                reason = str(error)
        of_regions = regional.get(digest)
        if of_regions and costs and not of_regions.reason:
            try:
                here_too = regions.region_latencies(of_regions.stats, each, costs, here, backend=backend)
                of_regions = dataclasses.replace(of_regions, costs=here_too)
            except ValueError as error:
                of_regions = dataclasses.replace(of_regions, reason=str(error))
        options.append(Option(backend, each, costs, reason, digest, of_regions))
    left_out = "; ".join(f"{option.name}: {option.reason}" for option in options)
    check(any(option.costs for option in options), "backends", "such that one can be chosen in one of the precisions", left_out)
    return options


def sha256(options: Sequence[Option]) -> str:
    """SHA-256 of all that decides between options, in lower-case hexadecimal."""
    lines = []
    for option in options:
        lines.append(f"{option.backend} {option.stats_sha256} {option.costs.sha256 if option.costs else option.reason}\n")
        if each := option.regional:
            lines.append(f"{each.stats_sha256} {each.costs.sha256 if each.costs else each.reason}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def reference(options: Sequence[Option]) -> Original:
    """The original network that a question is relative to, the same for all options.

    Its mIoU is that of the highest precision of which there are statistics, be it to be chosen or not. Its cost is that of the highest
    precision that can be chosen, on the backend where that is least.
    """
    best = min(options, key=_rank_of_precision)
    able = [option for option in options if option.costs]
    highest = min(map(_rank_of_precision, able))
    cost = min(original(option.stats, option.costs).cost for option in able if _rank_of_precision(option) == highest)
    return Original(original(best.stats, macs_costs(best.stats)).miou, cost)


def _rank_of_precision(option: Option) -> int:
    """Less is higher."""
    return PRECISIONS.index(option.stats.precision) if option.stats.precision else 0


def choose(options: Sequence[Option], asked: Asked) -> Deployment:
    """The best deployment of all options.

    Raises:
      InfeasibleError, TimeoutError: nothing meets the constraint with any option; the message begins with its flag.
    """
    if asked.max_risk is not None:
        return _guaranteed(options, asked)

    choosing = checking = options
    if asked.check_share:
        choosing, checking = ([_of_images(option, asked.check_share, part) for option in options] for part in range(2))
    against = reference(choosing)
    deciders = asked.deciders(any(option.regional for option in options))
    if asked.decide == REGIONS_DECIDE:
        reasons = [_why_not(option, REGIONS_DECIDE) for option in options]
        check(not all(reasons), "decide", f"{IMAGE_DECIDES}, since {'; '.join(dict.fromkeys(reasons))}", asked.decide)
    keys = [*itertools.product(range(len(options)), deciders)]
    found, problems = {}, {}
    for key in keys:
        option, decide = choosing[key[0]], key[1]
        if problem := _why_not(option, decide):
            problems[key] = problem
            continue
        objective = resolve_objective(against, option.costs, asked.setting, **asked.constraint)
        try:
            found[key] = _searched(option, decide, objective, asked, against.cost)
        except (InfeasibleError, TimeoutError) as error:
            problems[key] = error
    if not found:
        errors = [(index, error) for (index, _), error in problems.items() if isinstance(error, Exception)]
        kind = TimeoutError if any(isinstance(error, TimeoutError) for _, error in errors) else InfeasibleError
        told = [f"{options[index].name}: {error}" if len(options) > 1 else str(error) for index, error in errors]
        raise kind(f"{asked.flag}: {'; '.join(told)}")
    best = min(found, key=lambda key: _rank(found[key]))
    deployment, checks = found[best], checking[best[0]]
    if deployment.regions:
        number = regions.configuration_of(checks.regional.stats, deployment.exits)
        predicted = regions.predict_regions(checks.regional.stats, checks.regional.costs, number)
    else:
        predicted = predict(checks.stats, checks.costs, deployment)
    deployment = dataclasses.replace(deployment, predicted=predicted, original=original(checks.stats, checks.costs))
    return _of_option(deployment, options[best[0]], asked, _compared(options, found, best, problems))


def _guaranteed(options: Sequence[Option], asked: Asked) -> Deployment:
    """The cheapest deployment of all options whose risk is shown; see `search_guaranteed`."""
    able = [number for number, option in enumerate(options) if option.costs]
    choices = [(options[number].stats, options[number].costs) for number in able]
    promise = (asked.max_risk, asked.confidence, asked.risk, asked.check_share or 0.5)
    best, deployment = search_guaranteed(
        choices, min(options, key=_rank_of_precision).stats, reference(options).cost, *promise, asked.limits, **asked.space
    )
    best = able[best]
    reasons = {number: option.reason or f"the cheapest that is shown is {options[best].name}" for number, option in enumerate(options)}
    others = {(number, IMAGE_DECIDES): reason for number, reason in reasons.items() if number != best}
    chosen = best, IMAGE_DECIDES
    return _of_option(deployment, options[best], asked, _compared(options, {chosen: deployment}, chosen, others))


def _of_images(option: Option, check_share: float, part: int) -> Option:
    """The option on the images that choose (0) or check (1)."""
    changed = {"stats": guarantee.split(option.stats, check_share)[part]}
    if each := option.regional:
        images = guarantee.split_positions(len(each.stats.images), check_share)[part]
        changed["regional"] = dataclasses.replace(each, stats=regions.select(each.stats, images))
    return dataclasses.replace(option, **changed)


def _why_not(option: Option, decide: str) -> str:
    """Why an option cannot be chosen, empty if it can."""
    if not option.costs or decide == IMAGE_DECIDES:
        return "" if option.costs else option.reason
    if option.regional is None:
        command = f"`python -m mess_tf.calibrate --regions={NEIGHBOURS[0]}`"
        return f"there is no {REGIONS} of {option.stats.precision or 'it'}, which {command} makes"
    return "" if option.regional.costs else option.regional.reason


def _searched(option: Option, decide: str, objective: Objective, asked: Asked, horizon: float) -> Deployment:
    if decide == IMAGE_DECIDES:
        return search(option.stats, option.costs, objective, asked.setting, horizon=horizon, **asked.space)
    stats, costs, alone = option.regional.stats, option.regional.costs, original(option.stats, option.costs)
    return regions.search_regions(stats, costs, objective, alone, option.stats.fidelity, asked.max_early_exits)


def _rank(deployment: Deployment) -> tuple[float, ...]:
    """Less is better: as between configurations of one option, see `search.search`."""
    predicted, minimise = deployment.predicted, deployment.constraint.minimise
    if minimise is None:
        return -predicted.miou, predicted.cost_mean
    return predicted.costs[minimise], -predicted.miou, predicted.cost_mean


def _compared(
    options: Sequence[Option],
    found: Mapping[tuple[int, str], Deployment],
    best: tuple[int, str],
    problems: Mapping[tuple[int, str], object],
) -> tuple[Combination, ...]:
    rows, chosen = [], found[best]
    for key in sorted({**found, **problems}):
        option, decide = options[key[0]], key[1]
        if (deployment := found.get(key)) is None:
            rows.append(Combination(option.backend, option.stats.precision, None, None, (), str(problems[key]), decide))
            continue
        reason, minimise = "", chosen.constraint.minimise
        if key != best:
            here, there = (_rank(each)[0] for each in (deployment, chosen))
            reason = (
                f"mIoU {-100 * here:.2f} % against {-100 * there:.2f} %"
                if minimise is None
                else f"{minimise} {shown(minimise, here)} against {shown(minimise, there)}"
            )
        exits = tuple(f"{choice.exit}.{choice.head}" for choice in deployment.exits)
        predicted = deployment.predicted
        rows.append(Combination(option.backend, option.stats.precision, predicted.miou, predicted.cost_mean, exits, reason, decide))
    return tuple(rows)


def _of_option(deployment: Deployment, option: Option, asked: Asked, rows: tuple[Combination, ...]) -> Deployment:
    about = {"backend": option.backend, "precision": option.stats.precision, "stats_sha256": option.stats_sha256}
    return dataclasses.replace(deployment, asked=asked, combinations=rows, **about)


def deployed(option: Option, asked: Asked, configuration: Configuration, objective: Objective, certificate: Certificate) -> Deployment:
    """The deployment of a configuration that a search for several devices has found, with the figures of one of them."""
    deployment = Deployment(
        **{field.name: getattr(configuration, field.name) for field in dataclasses.fields(Configuration)},
        constraint=objective,
        predicted=predict(option.stats, option.costs, configuration),
        original=original(option.stats, option.costs),
        certificate=certificate,
        guarantee=None,
        stats_sha256="",
        fidelity=option.stats.fidelity,
        made_by=made_by(),
    )
    return _of_option(deployment, option, asked, ())
