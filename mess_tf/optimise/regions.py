"""The search where every cell of an image leaves for itself: all configurations of `regions.npz`, each scored, the best one taken.

What a configuration does to an image is in the statistics, whole: mIoU comes from counts, and costs from budgets, that add up over the
images. So the optimum of these configurations is exact, and the certificate counts them. Of equally good ones the order of the image's
search holds: that with the better mIoU, or with the lower first cost.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mess_runtime.bundle import INPUT_DEPENDENT, check
from mess_tf.files import Certificate, Deployment, ExitChoice, Objective, Original, Predicted, RegionStats, Stats, made_by
from mess_tf.metrics import miou
from mess_tf.optimise import guarantee, kernels
from mess_tf.optimise.search import InfeasibleError, asked_in_words, relaxed
from mess_tf.optimise.space import Costs, matching, measured


@dataclasses.dataclass(frozen=True, eq=False)
class RegionCost:
    """A cost of an image, in parts, and what it is called as a mean and as a 90th percentile over the images.

    Attributes:
      mean, p90: names.
      first: float64 [A], from the image to a candidate.
      pair: float64 [J, B], from one to the next at a budget; 0 at those that a pair does not have.
      decision: float64 [A], what a candidate in the middle of a chain costs more than as its last: how sure it is of each cell.
    """

    mean: str
    p90: str
    first: np.ndarray
    pair: np.ndarray
    decision: np.ndarray

    def of_images(self, stats: RegionStats) -> np.ndarray:
        """Of every configuration and image: float64 [K, I]."""
        return functools.reduce(np.add, self.by_exit(stats))

    def by_exit(self, stats: RegionStats) -> Iterator[np.ndarray]:
        """The part of each exit after the one before, shallow to deep, of every configuration and image: float64 [K, I]."""
        yield np.repeat(self.first[stats.chains[:, 0], None], len(stats.images), 1)
        for hop in range(stats.taken.shape[2]):
            taken, pair, here = stats.taken[:, :, hop], stats.pair_of_hop[:, hop, None], stats.chains[:, hop + 1]
            in_middle = (stats.chains[:, hop + 2] >= 0) if hop + 2 < stats.chains.shape[1] else np.zeros(here.size, bool)
            cost = self.pair[pair, np.searchsorted(stats.budgets, taken)] + np.where(in_middle, self.decision[here], 0.0)[:, None]
            yield np.where(taken > 0, cost, 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class RegionCosts:
    """All costs; the mean of the first one is what is minimised if nothing else is said."""

    of_image: tuple[RegionCost, ...]

    @property
    def sha256(self) -> str:
        """SHA-256 of all costs, in lower-case hexadecimal."""
        digest = hashlib.sha256()
        for cost in self.of_image:
            digest.update(cost.mean.encode())
            for part in (cost.first, cost.pair, cost.decision):
                digest.update(part.astype(np.float64).tobytes())
        return digest.hexdigest()

    @property
    def names(self) -> list[str]:
        """Of all costs."""
        return [name for cost in self.of_image for name in (cost.mean, cost.p90)] + ["parameters"]

    @property
    def name(self) -> str:
        """Of the first one."""
        return self.of_image[0].mean


def region_macs(stats: RegionStats) -> RegionCosts:
    """Costs that need no device."""
    return RegionCosts((_macs(stats),))


def _macs(stats: RegionStats) -> RegionCost:
    free = np.zeros(len(stats.candidates))
    return RegionCost("macs", "macs_p90", stats.first_macs.astype(float), stats.pair_macs.astype(float), free)


def region_latencies(
    stats: RegionStats,
    images: Stats,
    costs: Costs,
    rows: Sequence[Mapping[str, Any]],
    device: str | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> RegionCosts:
    """Costs of a device, the first in ms, joined by the hash of the submodels, and MACs.

    Args:
      stats: with the hashes of the exported submodels.
      images: statistics of whole images, and
      costs: their costs on the same device, which know what a decision costs.
      rows, device, threads, backend: as of `space.latency_costs`.

    Raises:
      ValueError: see there.
    """
    rows = matching(rows, device=device, threads=threads, backend_requested=backend)
    begins = sorted({*stats.chains[:, 0].tolist()})
    wanted = {f"region.{stats.candidates[k]}": stats.first_sha256[k] for k in begins}
    there = stats.pair_macs > 0
    hashes = np.reshape(stats.pair_sha256, there.shape)
    for j, b in np.argwhere(there).tolist():
        first, second = (stats.candidates[k] for k in stats.pairs[j])
        wanted[f"region.{first}.{second}.{stats.budgets[b]}"] = str(hashes[j, b])
    by_sha256 = measured(rows, wanted, "regions.npz")
    values = [by_sha256[digest]["p50_ms"] for digest in wanted.values()]
    first = np.zeros(len(stats.candidates))
    first[begins] = values[: len(begins)]
    decision = np.array([costs.decision[images.candidates.index(name), 0] for name in stats.candidates])
    pair = np.zeros(there.shape)
    pair[there] = values[len(begins) :]
    return RegionCosts((RegionCost("latency_ms", "latency_p90_ms", first, pair, decision), _macs(stats)))


def select(stats: RegionStats, images: np.ndarray) -> RegionStats:
    """The statistics of some distinct images, by position."""
    drawn = {name: getattr(stats, name)[:, images] for name in ("tp", "fp", "taken", "cells")}
    names = tuple(stats.images[image] for image in images.tolist())
    return dataclasses.replace(stats, images=names, labelled=stats.labelled[images], **drawn)


def scores(stats: RegionStats, costs: RegionCosts) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """mIoU in 0..1, and all costs by name, of every configuration: float64 [K] each."""
    tp, labelled = stats.tp.sum(1, dtype=np.int64), stats.labelled.sum(0)
    values = {}
    for cost in costs.of_image:
        of_images = cost.of_images(stats)
        values[cost.mean] = of_images.mean(1)
        values[cost.p90] = np.quantile(of_images, kernels.P90_SHARE, axis=1, method="inverted_cdf")
    hops = np.where(stats.pair_of_hop >= 0, stats.pair_parameters[stats.pair_of_hop], 0)
    values["parameters"] = (stats.first_parameters[stats.chains[:, 0]] + hops.sum(1)).astype(float)
    return miou(tp, stats.fp.sum(1, dtype=np.int64), labelled - tp), values


def predict_regions(stats: RegionStats, costs: RegionCosts, configuration: int) -> Predicted:
    """What a configuration, by number, does on the images of the statistics; `exit_rates` are shares of the cells."""
    alone = only(stats, np.array([configuration]))
    accuracy, values = scores(alone, costs)
    cost = costs.of_image[0].of_images(alone)[0]
    drawn = guarantee.resamples(cost.size)
    tp, fp = drawn @ alone.tp[0], drawn @ alone.fp[0]
    rates = alone.cells[0].sum(0) / alone.cells[0].sum()
    return Predicted(
        miou=float(accuracy[0]),
        cost_name=costs.name,
        cost_mean=float(cost.mean()),
        cost_p90=float(np.quantile(cost, kernels.P90_SHARE, method="inverted_cdf")),
        exit_rates=tuple(rates[alone.chains[0] >= 0].tolist()),
        costs={name: float(value[0]) for name, value in values.items()},
        miou_interval=guarantee.interval(miou(tp, fp, drawn @ alone.labelled - tp)),
        cost_interval=guarantee.interval(drawn @ cost / cost.size),
        images=cost.size,
    )


def only(stats: RegionStats, configurations: np.ndarray) -> RegionStats:
    """The statistics of some configurations, by number.

    Raises:
      InfeasibleError: of none.
    """
    if not configurations.size:
        raise InfeasibleError("max_early_exits: must be at least 1 where regions decide")
    names = ("chains", "theta_pix", "theta_img", "tp", "fp", "taken", "cells")
    return dataclasses.replace(stats, **{name: getattr(stats, name)[configurations] for name in names})


def configuration_of(stats: RegionStats, exits: Sequence[ExitChoice]) -> int:
    """The number of the configuration with these exits and thresholds.

    Raises:
      ValueError: there is none.
    """
    found = [k for k in range(len(stats.chains)) if stats.exits(k) == tuple(exits)]
    check(len(found) == 1, "deployment", "one of the configurations of regions.npz; search again", tuple(exits))
    return found[0]


def search_regions(
    stats: RegionStats, costs: RegionCosts, objective: Objective, reference: Original, fidelity: str, max_early_exits: int = 2
) -> Deployment:
    """Finds the best configuration of the statistics.

    Args:
      stats: of the configurations.
      costs: likewise.
      objective: what to reach.
      reference: the original network in the same precision on the same backend.
      fidelity: of the statistics of whole images.
      max_early_exits: largest number of exits in front of the last one.

    Raises:
      InfeasibleError: nothing meets the constraint.
      ValueError: a cost that is asked for is not known of regions.
    """
    for name in (*objective.limits, *([objective.minimise] if objective.minimise else [])):
        check(name in costs.names, "objective", f"of costs {', '.join(costs.names)} where regions decide", name)
    start = kernels.clock()
    stats = only(stats, np.flatnonzero((stats.chains >= 0).sum(1) <= max_early_exits + 1))
    count = len(stats.chains)
    accuracy, values = scores(stats, costs)
    best = _best(accuracy, values, objective, costs.name)
    if best is None:
        raise InfeasibleError(_nearest(stats, accuracy, values, objective, costs.name))
    predicted = predict_regions(stats, costs, best)
    reached = predicted.miou if objective.minimise is None else predicted.costs[objective.minimise]
    exits = stats.exits(best)
    dense = tuple(choice.exit for choice in exits[1:] if choice.exit in stats.dense)
    return Deployment(
        setting=INPUT_DEPENDENT,
        edge_aware=False,
        exits=exits,
        horizon=None,
        regions=dataclasses.replace(stats.regions, dense=dense),
        constraint=objective,
        predicted=predicted,
        original=reference,
        certificate=Certificate(count, count, {}, 0, reached, 0.0, kernels.clock() - start, None),
        guarantee=None,
        stats_sha256="",
        fidelity=fidelity,
        made_by=made_by(),
    )


def _best(accuracy: np.ndarray, values: Mapping[str, np.ndarray], objective: Objective, first: str) -> int | None:
    """The number of the best configuration that meets the constraint."""
    meets = accuracy >= (objective.min_miou or 0.0) - kernels.ROUNDING
    for name, limit in objective.limits.items():
        meets &= values[name] <= limit * (1 + kernels.ROUNDING)
    rounded = np.round(accuracy, 12)
    keys = (values[first], -rounded) if objective.minimise is None else (values[first], -rounded, values[objective.minimise])
    return next((int(k) for k in np.lexsort(keys) if meets[k]), None)


def _nearest(stats: RegionStats, accuracy: np.ndarray, values: Mapping[str, np.ndarray], objective: Objective, first: str) -> str:
    """Says for each constraint how near to it one gets if the others hold."""
    nearest = []
    for axis, asked in relaxed(objective).items():
        if (k := _best(accuracy, values, asked, first)) is None:
            nearest.append(f"the {axis} is out of reach as well")
            continue
        names = " + ".join(f"{choice.exit}.{choice.head}" for choice in stats.exits(k))
        named = ", ".join(f"{name} {values[name][k]:.6g}" for name in dict.fromkeys([first, *objective.limits]))
        nearest.append(f"the {axis} is at {names}: mIoU {accuracy[k]:.6f}, {named}")
    return f"{asked_in_words(objective)} is out of reach where regions decide; {'; '.join(nearest)}"


def taken_shares(stats: RegionStats, configuration: int) -> np.ndarray:
    """Of a configuration, by number: share of the images that take no budget, and each budget, at each exit after the first: [M, 1 + B]."""
    used = int((stats.chains[configuration] >= 0).sum()) - 1
    taken = stats.taken[configuration, :, :used]
    return np.stack([(taken == budget).mean(0) for budget in (0, *stats.budgets.tolist())], axis=1)
