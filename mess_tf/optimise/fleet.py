"""Few bundles for many devices: the K bundles with which a fleet has the least total, or the least largest, mean latency.

Every device takes, of the bundles, the one that is fastest on it, so to share bundles is to divide the devices into at most K groups with a
bundle each. What a group can reach is a search like any other, with a proof:

* sum: mean latency is linear in the latencies of the submodels, so its sum over some devices is the mean latency of one that takes as long
  as all of them together.
* worst: the latencies on the devices are costs of their own. Of what is below the largest latency found so far on each, the fastest on the
  device that was the slowest is sought, until there is none, or until that device is still the slowest.

Accuracy does not depend on the device, so a configuration that meets the target meets it everywhere. Two groups together reach no less than
both of them alone (sum), or than the worse one (worst). So what is known of some groups bounds all others, and with them all ways to divide
the devices. The way with the least bound is looked at: are all of its groups known, it is the optimum, as it is reached and nothing has a
lower bound; otherwise the first unknown one is searched. Up to `MOST_DEVICES` that ends with a proof unless time runs out.

More devices are dealt into blocks of no more than that. K bundles for all devices are K bundles for each block, so the optima of the
blocks, each found and proven as above, together bound the optimum of all (sum), or the worst of them does. What is chosen is the best of
all bundles that were found, for the blocks and for the devices that share one so far; its distance to the bound is given.

Which of the bundles found are the best K is the p-median problem (sum; ReVelle and Swain, 1970) or the p-center problem (worst), solved to
its optimum as a mixed-integer program by HiGHS (`scipy.optimize.milp`).

Departure from clustering by latency: which devices share a bundle follows from what is chosen, not from how alike they are.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse

from mess_runtime.bundle import check
from mess_tf.files import FLEETS, SUM, Certificate, Configuration, Objective, Stats
from mess_tf.optimise import kernels
from mess_tf.optimise.search import InfeasibleError, find
from mess_tf.optimise.space import Costs, Resource, evaluate_configuration

# All ways to divide so many devices are bounded in a moment; there are 3 to the power of their number.
MOST_DEVICES = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """Statistics in one precision, and costs by device, in ms, of those that can run it."""

    stats: Stats
    costs: Mapping[str, Costs]


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A configuration of a variant (by position), its latency in ms on each device, infinite where it does not run, and its search."""

    variant: int
    configuration: Configuration
    latencies: np.ndarray
    certificate: Certificate


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """What is chosen.

    Attributes:
      bundles: at most K.
      bundle_of: int64 [D], of each device.
      value: of the fleet, in ms.
      bound: no choice has a lower value; the same where the choice is proven to be the best.
      divisions: ways to divide the devices that the bound covers.
      groups: that were searched.
      seconds: for all of it.
    """

    bundles: tuple[Bundle, ...]
    bundle_of: np.ndarray
    value: float
    bound: float
    divisions: int
    groups: int
    seconds: float


def divisions(devices: int, most: int) -> int:
    """Number of ways to divide devices into at most so many groups."""
    ways = [1] + [0] * most
    for _ in range(devices):
        ways = [0] + [count * size + ways[size - 1] for size, count in enumerate(ways[1:], start=1)]
    return sum(ways)


class _Fleet:
    """One search for bundles; a group is a set of devices as the bits of a number."""

    def __init__(
        self,
        devices: Sequence[str],
        variants: Sequence[Variant],
        objective: Objective,
        fleet: str,
        space: Mapping[str, Any],
        deadline: float,
    ):
        self.devices, self.variants, self.objective = tuple(devices), variants, objective
        self.least = self._least_sum if fleet == SUM else self._least_worst
        self.join = np.sum if fleet == SUM else np.max
        self.space, self.deadline = space, deadline
        self.found: list[Bundle] = []
        self.bounds: dict[int, float] = {}  # of the groups that were searched

    def search(self, group: int) -> None:
        """Finds the best bundle of a group in each variant, and what bounds all others."""
        members = self.members(group)
        able = [v for v, each in enumerate(self.variants) if all(self.devices[d] in each.costs for d in members)]
        self.bounds[group] = min((self.least(v, members) for v in able), default=math.inf)

    def members(self, group: int) -> list[int]:
        """Positions of the devices of a group."""
        return [d for d in range(len(self.devices)) if group >> d & 1]

    def _find(self, v: int, resources: Sequence[Resource], limits: Mapping[str, float]) -> tuple[Bundle | None, float]:
        """The least of the first cost within limits, None if there is none, and its bound."""
        stats, begin = self.variants[v].stats, kernels.clock()
        of_any_device = [each for each in next(iter(self.variants[v].costs.values())).resources if not each.name.startswith("latency")]
        costs = Costs((*resources, *of_any_device))
        objective = dataclasses.replace(self.objective, minimise=costs.name, limits=self.objective.limits | dict(limits))
        configuration, proof = find(stats, costs, objective, **self.space, deadline=self.deadline)
        if configuration is None:
            return None, proof.bound if proof.open else math.inf
        reached = evaluate_configuration(stats, costs, configuration)[1]
        bound = min(proof.bound, reached) if proof.open else reached
        seconds = kernels.clock() - begin
        certificate = Certificate(
            *(proof.covered, proof.scored, proof.cut, proof.open, float(bound), reached - bound, seconds, self.space["quantiles"])
        )
        self.found.append(Bundle(v, configuration, self._latencies(v, configuration), certificate))
        return self.found[-1], bound

    def _latencies(self, v: int, configuration: Configuration) -> np.ndarray:
        """Mean latency on each device, float64 [D]."""
        stats, costs = self.variants[v].stats, self.variants[v].costs
        means = {name: evaluate_configuration(stats, each, configuration)[1] for name, each in costs.items()}
        return np.array([means.get(name, math.inf) for name in self.devices])

    def _least_sum(self, v: int, members: Sequence[int]) -> float:
        """Bound of a group's total latency."""
        each = [self.variants[v].costs[self.devices[d]].resources[0] for d in members]
        parts = {part: np.sum([getattr(one, part) for one in each], axis=0) for part in ("prefix", "head", "decision")}
        return self._find(v, [dataclasses.replace(each[0], **parts)], {})[1]

    def _least_worst(self, v: int, members: Sequence[int]) -> float:
        """Bound of a group's largest latency."""
        each = [self.variants[v].costs[self.devices[d]].resources[0] for d in members]
        each = [dataclasses.replace(one, name=f"latency_ms of {self.devices[d]}") for one, d in zip(each, members, strict=True)]
        slowest, limit, lowest = int(np.argmax([one.prefix[-1] for one in each])), math.inf, 0.0
        while True:
            within = {} if limit == math.inf else {one.name: limit * (1 - kernels.SLACK) for one in each}
            bundle, bound = self._find(v, [each[slowest], *each[:slowest], *each[slowest + 1 :]], within)
            lowest = max(lowest, min(bound, limit))
            if bundle is None or bundle.certificate.open:
                return lowest
            latencies = bundle.latencies[members]
            if latencies.max() <= latencies[slowest] * (1 + kernels.SLACK):
                return lowest
            limit, slowest = float(latencies.max()), int(latencies.argmax())

    def division(self, most: int, block: Sequence[int]) -> tuple[float, list[int]]:
        """The way to divide the devices of a block into at most so many groups that has the least bound, and that bound."""
        everyone, places = 1 << len(block), {1 << d: 1 << place for place, d in enumerate(block)}
        known = {}  # groups of the block, whose bits are places in it
        for group, bound in self.bounds.items():
            devices = [1 << d for d in self.members(group)]
            if places.keys() >= {*devices}:
                known[sum(map(places.get, devices))] = bound
        lower = np.zeros(everyone)
        for group in range(1, everyone):
            inside = [(part, bound) for part, bound in known.items() if part & group == part]
            if self.join is np.max:
                lower[group] = max(bound for _, bound in inside)
            else:
                lower[group] = max(bound + lower[group ^ part] for part, bound in inside)
        # By group: the least bound, how many of its parts are unknown, and the parts.
        best: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, ())] + [(math.inf, 0, ())] * (everyone - 1)
        for _ in range(most):
            before, best = best, [*best]
            for group in range(1, everyone):
                lowest, part = group & -group, group
                while part:
                    if part & lowest:
                        bound, unknown, parts = before[group ^ part]
                        way = float(self.join([lower[part], bound])), unknown + (part not in known), (part, *parts)
                        best[group] = min(best[group], way)
                    part = (part - 1) & group
        bound, _, parts = best[-1]
        return bound, [sum(device for device, place in places.items() if part & place) for part in parts]

    def chosen(self, most: int) -> tuple[list[Bundle], np.ndarray, float]:
        """Of the bundles found so far the best K, which of them each device takes, and what they come to."""
        latencies = np.array([bundle.latencies for bundle in self.found])
        best = best_of(latencies, most, self.join is np.max)
        return [self.found[k] for k in best], latencies[best].argmin(axis=0), float(self.join(latencies[best].min(axis=0)))


def best_of(latencies: np.ndarray, most: int, worst: bool) -> list[int]:
    """Solves the p-median problem, or the p-center problem.

    Args:
      latencies: float64 [J, D], of each bundle on each device, infinite where it does not run.
      most: bundles that may be chosen.
      worst: whether the largest latency is to be least, rather than the sum.

    Returns:
      Positions of the chosen bundles, ascending.

    Raises:
      InfeasibleError: so few do not run on all devices.
    """
    kept = _undominated(latencies)
    able = np.isfinite(latencies[kept])
    costs = np.where(able, latencies[kept] / np.median(latencies[kept][able]), 0.0)
    count, devices = costs.shape
    # Whether each bundle is chosen [J], whether it serves each device [J * D], and the largest latency.
    one, eye = np.ones, scipy.sparse.eye_array
    matrix = scipy.sparse.block_array(
        [
            [one((1, count)), None, None],
            [None, scipy.sparse.kron(one((1, count)), eye(devices)), None],
            [-scipy.sparse.kron(eye(count), one((devices, 1))), eye(costs.size), None],
            [None, scipy.sparse.hstack([*map(scipy.sparse.diags_array, costs)]), -one((devices, 1))],
        ]
    )
    least = np.repeat((-math.inf, 1.0, -math.inf), (1, devices, costs.size + devices))
    largest = np.repeat((most, 1.0, 0.0), (1, devices, costs.size + devices))
    upper = np.concatenate([np.ones(count), able.ravel(), [math.inf]])
    found = scipy.optimize.milp(
        np.concatenate([np.zeros(count), 0.0 * costs.ravel() if worst else costs.ravel(), [float(worst)]]),
        integrality=np.repeat((1, 0), (count, costs.size + 1)),
        bounds=scipy.optimize.Bounds(0.0, upper),
        constraints=scipy.optimize.LinearConstraint(matrix, least, largest),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise InfeasibleError(f"max_bundles={most} is out of reach: so few do not run on all devices")
    return kept[found.x[:count] > 0.5].tolist()


def _undominated(latencies: np.ndarray) -> np.ndarray:
    """Positions of the rows, ascending, than which no other one is as low everywhere; of equal rows the first."""
    _, first = np.unique(latencies, axis=0, return_index=True)
    return np.array([k for k in np.sort(first) if ((latencies[first] <= latencies[k]).all(axis=1)).sum() == 1])


def share(
    devices: Sequence[str],
    variants: Sequence[Variant],
    most: int,
    objective: Objective,
    fleet: str,
    time_limit: float = math.inf,
    **space: Any,
) -> Shared:
    """Finds the bundles for a fleet.

    Args:
      devices: D names.
      variants: what can be deployed.
      most: K, of bundles.
      objective: the mIoU that each bundle must have, and limits on costs that are the same on all devices.
      fleet: what is least, `sum` or `worst`.
      time_limit: in seconds, for all searches together.
      space: `setting`, `max_early_exits` and `quantiles` of `search.search`.

    Raises:
      InfeasibleError: a device has no bundle that meets the objective.
      TimeoutError: time ran out before each device had one.
      ValueError: an argument is outside its range.
    """
    check(fleet in FLEETS, "fleet", f"one of {', '.join(FLEETS)}", fleet)
    check(most >= 1, "max_bundles", "at least 1", most)
    begin = kernels.clock()
    search = _Fleet(devices, variants, objective, fleet, space, begin + time_limit)
    alone = [1 << d for d in range(len(devices))]
    for group, name in zip(alone, devices, strict=True):
        search.search(group)
        if not np.isfinite([bundle.latencies[devices.index(name)] for bundle in search.found]).any():
            if search.bounds[group] < math.inf:
                raise TimeoutError(f"time_limit: must be longer; after {time_limit:g} s nothing was found for {name}")
            raise InfeasibleError(f"min_miou={objective.min_miou:.6g} is out of reach within the limits on {name}")
    blocks = [[*range(len(devices))]]
    if len(devices) > MOST_DEVICES:  # devices that take the same bundle are dealt out, so that each block has some of all kinds
        _, bundle_of, _ = search.chosen(most)
        number = math.ceil(len(devices) / MOST_DEVICES)
        blocks = [sorted(np.argsort(bundle_of, kind="stable")[start::number].tolist()) for start in range(number)]
    ways = [search.division(most, block) for block in blocks]
    while True:
        bound = float(search.join([each for each, _ in ways]))
        chosen, bundle_of, value = search.chosen(most)
        groups = [sum(1 << int(d) for d in np.flatnonzero(bundle_of == b)) for b in np.unique(bundle_of)] if len(blocks) > 1 else []
        unknown = [group for group in itertools.chain(groups, *(parts for _, parts in ways)) if group not in search.bounds]
        if not unknown or value <= bound * (1 + kernels.SLACK) or kernels.clock() > search.deadline:
            break
        search.search(unknown[0])
        members = {*search.members(unknown[0])}
        ways = [search.division(most, block) if members <= {*block} else way for block, way in zip(blocks, ways, strict=True)]
    used = np.unique(bundle_of)
    return Shared(
        bundles=tuple(chosen[b] for b in used),
        bundle_of=np.searchsorted(used, bundle_of),
        value=value,
        bound=value if value <= bound * (1 + kernels.SLACK) else bound,
        divisions=divisions(len(devices), most),
        groups=len(search.bounds),
        seconds=kernels.clock() - begin,
    )
