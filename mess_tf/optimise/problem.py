"""What the optimum works on: the space and what is asked, what was found and proven, and the parts of the space in between.

`optimum` says what bounds, prices and potentials are.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Resources:
    """What a configuration costs, in R ways. E exits, K candidates.

    Attributes:
      kind: int64 [R], MEAN (over the images), P90 (over the images), TOTAL (prefix of the last exit and all chosen heads) or PEAK (largest
        of these).
      prefix: float64 [R, E], up to each exit.
      head: float64 [R, K], of each candidate.
      decision: float64 [R, K], of a candidate's decision; unused where it ends the network.
    """

    kind: np.ndarray
    prefix: np.ndarray
    head: np.ndarray
    decision: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Root:
    """A part of the space, with one kind of confidence.

    Attributes:
      order: int32 [K - 1, T, I], images by decreasing confidence.
      allowed: bool [K - 1, T, I], at a: the first a + 1 images of the order can be those that leave.
      resources: with the costs of this kind of decision.
      least, most: number of early exits.
    """

    order: np.ndarray
    allowed: np.ndarray
    resources: Resources
    least: int
    most: int


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """The space and what is asked.

    Attributes:
      tp, fp: float64 [K, I, C] of the classes that labels hold.
      labelled: float64 [C], above 0.
      exit_of: int64 [K], not decreasing; only the last candidate is at the last exit.
      roots: parts of the space, without common configurations.
      min_miou: 0..1; 0 for none.
      limits: float64 [R], infinite for none.
      target: resource to minimise; -1 to maximise mIoU.
      second: resource that decides between equal mIoU.
    """

    tp: np.ndarray
    fp: np.ndarray
    labelled: np.ndarray
    exit_of: np.ndarray
    roots: tuple[Root, ...]
    min_miou: float
    limits: np.ndarray
    target: int
    second: int


@dataclasses.dataclass(frozen=True)
class Found:
    """A configuration and its score.

    Attributes:
      root: position in the problem's roots.
      early: (candidate, pixel threshold, images of the order that would leave), shallow to deep.
      last: candidate where all others leave.
      miou: 0..1.
      costs: R values.
    """

    root: int
    early: tuple[tuple[int, int, int], ...]
    last: int
    miou: float
    costs: tuple[float, ...]


@dataclasses.dataclass
class Proof:
    """What was done: covered = scored + all cut once nothing is open; `bound` holds for what was not looked at."""

    covered: int = 0
    scored: int = 0
    open: int = 0
    cut: dict[str, int] = dataclasses.field(default_factory=lambda: {"bound": 0, "reduced_cost": 0, "linear_bound": 0, "limit": 0})
    bound: float = math.nan


# === Nodes ===


@dataclasses.dataclass
class Node:
    """Configurations with the same m early exits, and what is known about them.

    Attributes:
      root: position in the problem's roots.
      position, candidate, theta: int64 [n], of the orders that are open; sorted by position, which counts the early exits from 0.
      allowed: bool [n, I], their cuts that are open.
      lasts: int64, candidates of the last exit that are open.
      expected: (early decisions, last candidate), a configuration near which the best of the node is expected.
      potentials: float64 [m, I] behind each early exit, without what the prices add.
      prices: float64 [R], of the limits.
      upper: bound on the mIoU of all that keeps the limits.
      lower: bound on the target's cost of all that has the mIoU needed.
      spare: by how much its bound was above what was needed when it was last improved.
      visits: how often that was.
    """

    root: int
    position: np.ndarray
    candidate: np.ndarray
    theta: np.ndarray
    allowed: np.ndarray
    lasts: np.ndarray
    expected: tuple[list[tuple[int, int, int]], int]
    potentials: np.ndarray
    prices: np.ndarray
    upper: float = math.inf
    lower: float = 0.0
    spare: float = math.inf
    visits: int = 0

    def count(self) -> int:
        """Number of its configurations."""
        cuts = self.allowed.sum(axis=1)
        return math.prod(int(cuts[self.position == p].sum()) for p in range(len(self.potentials))) * self.lasts.size

    def keep(self, orders: np.ndarray, lasts: np.ndarray) -> None:
        """Drops all orders and last candidates but these (bool)."""
        self.position, self.candidate, self.theta = self.position[orders], self.candidate[orders], self.theta[orders]
        self.allowed, self.lasts = self.allowed[orders], self.lasts[lasts]

    def part(self, cuts: np.ndarray | bool = True, lasts: np.ndarray | slice = slice(None)) -> "Node":
        """A node of its own with what is left if only these cuts (bool, broadcast to [n, I]) and last candidates (bool) stay open."""
        part = dataclasses.replace(self, allowed=self.allowed & cuts)
        part.keep(part.allowed.any(axis=1), lasts)
        return part


class Relaxation(NamedTuple):
    """The problem that bounds a node: an image is worth w[k, i] at candidate k, and every finite limit is a constraint scaled to 1.

    Attributes:
      w, constant: float64 [K, I], see `Optimiser._tangent`.
      bonus, bonus_last: float64 [n, I] of the cuts of each order (minus infinity for those that are not open), and of each last candidate:
        what mIoU can be above its tangent.
      leave, leave_last, stay: float64 [R, K], what an image adds to a constraint that leaves at a candidate, ends there, or passes it.
      fixed, fixed_last: float64 [R, K], what choosing the candidate adds.
      limit: float64 [R].
      to_go: float64 [R], what an image adds that goes on to the last exit.
    """

    w: np.ndarray
    constant: float
    bonus: np.ndarray
    bonus_last: np.ndarray
    leave: np.ndarray
    leave_last: np.ndarray
    stay: np.ndarray
    fixed: np.ndarray
    fixed_last: np.ndarray
    limit: np.ndarray
    to_go: np.ndarray


@dataclasses.dataclass
class Values:
    """What prices and potentials give.

    Attributes:
      bound: on mIoU.
      tops: float64 [m + 1], largest worth at each early exit and at the last.
      orders, cuts: float64 and int64 [n], largest worth of each order, and its cut.
      lasts: float64, worth of each last candidate.
      bonus, bonus_last: of the relaxation.
    """

    bound: float
    tops: np.ndarray
    orders: np.ndarray
    cuts: np.ndarray
    lasts: np.ndarray
    bonus: np.ndarray
    bonus_last: np.ndarray

    def keep(self, orders: np.ndarray, lasts: np.ndarray) -> None:
        """Drops all orders and last candidates but these (bool)."""
        self.orders, self.cuts, self.bonus = self.orders[orders], self.cuts[orders], self.bonus[orders]
        self.lasts, self.bonus_last = self.lasts[lasts], self.bonus_last[lasts]


class Wish(NamedTuple):
    """What is wanted: the least of prices · costs - weight · mIoU, with at least `floor` mIoU and within the limits [R]."""

    floor: float
    limits: np.ndarray
    weight: float
    prices: np.ndarray
