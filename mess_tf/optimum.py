"""The exact optimum over mixtures of exits: a dual bound, branch and bound, and the scoring of what is left. NumPy, Numba and SciPy.

What is searched: at every exit a network may skip it, take a decision there (a head, a pixel threshold, how many of the images, ordered by
their confidence, would leave), or end there (all images that are left leave at one head). mIoU is a ratio of sums over the images, so
three steps make it tractable:

1. `Planes`: a linear upper bound of mIoU, valid wherever TP and union of each class lie in a box. Then the worth of a configuration is a
   sum over the images of what the head that each one leaves at is worth to it.
2. `_evaluate`: a Lagrangian bound over all configurations of a node at once. Prices make the limits on costs part of the worth. Potentials,
   one per exit and image, say what an image is worth that reaches the exit; given them, the exits part, and each one picks its best decision
   by itself in one pass over the sorted images. Any prices and potentials give a valid bound, `_descend` looks for the best ones. What a
   decision lacks to the best of its exit is a reduced cost: they add up, so a decision that lacks more than the node has to spare is cut.
3. `_scan`: what remains is enumerated as long as reduced costs allow, filtered by its exact linear worth, then scored exactly.

Source: Lagrangian decomposition with potentials as in Held and Karp (1970) and Guignard and Kim (1987); McCormick planes (1976).
"""

import concurrent.futures
import dataclasses
import heapq
import itertools
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit
from scipy.optimize import minimize

# A constraint counts as met, and a bound as reached, within the rounding of sums of float64.
ROUNDING = 1e-12
# The sums of a bound have as many terms as there are images and exits, so its rounding is larger.
SLACK = 1e-10
# Parts of a loop that run side by side. Their results are put together in a fixed order, so the number of cores does not change them.
CHUNKS = 4
# Shorter loops, in steps over sorted images, run on one core.
PARALLEL_STEPS = 1e5
MEAN, P90, TOTAL, PEAK = range(4)
P90_SHARE = 0.9
# Of the softened maximum, in mIoU; coarse first, so that the search for potentials neither stalls nor stops too early.
TEMPERATURES = (1e-3, 3e-4, 1e-4)
# What the costs of the original network are worth in mIoU, where a search for good configurations starts.
START_PRICES = (0.01, 0.02, 0.04, 0.08, 0.16)
# What is scored at once, in steps over sorted images: what takes less time than to bound it again, and what is not branched.
CHEAP_STEPS = 1e5
SCAN_STEPS = 3e9


@dataclasses.dataclass(frozen=True, eq=False)
class Resources:
    """What a configuration costs, in R ways. E exits, K candidates.

    Attributes:
      kind: int64 [R], MEAN (over the images), P90 (over the images), TOTAL (prefix of the last exit and all chosen heads) or PEAK (largest of
        these).
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


# === Kernels ===


@njit(cache=True, nogil=True)
def _chain_costs(kind, prefix, head, decision, exit_of, chain, counts, costs):
    """Costs [R] of a chain of candidates, of which counts[j] images leave at chain[j]."""
    length, images = chain.size, counts.sum()
    arrival = np.empty(length)
    for r in range(kind.size):
        heads = 0.0
        peak = 0.0
        for j in range(length):
            heads += head[r, chain[j]]
            peak = max(peak, head[r, chain[j]])
            if j < length - 1:
                heads += decision[r, chain[j]]
            arrival[j] = prefix[r, exit_of[chain[j]]] + heads
        if kind[r] == MEAN:
            total = 0.0
            for j in range(length):
                total += counts[j] * arrival[j]
            costs[r] = total / images
        elif kind[r] == P90:
            needed = math.ceil(P90_SHARE * images - 1e-9)
            best = np.inf
            for j in range(length):
                within = 0
                for other in range(length):
                    if arrival[other] <= arrival[j]:
                        within += counts[other]
                if within >= needed:
                    best = min(best, arrival[j])
            costs[r] = best
        elif kind[r] == TOTAL:
            costs[r] = arrival[length - 1]
        else:
            costs[r] = max(peak, prefix[r, exit_of[chain[length - 1]]])


@njit(cache=True, nogil=True)
def _within(costs, limits):
    """Whether all costs are within their limits."""
    for r in range(costs.size):
        if costs[r] > limits[r] * (1 + ROUNDING):
            return False
    return True


@njit(cache=True, nogil=True)
def _miou(tp, fp, labelled):
    """mIoU of sums over the images, [C] each."""
    total = 0.0
    for c in range(labelled.size):
        total += tp[c] / (labelled[c] + fp[c])
    return total / labelled.size


@njit(cache=True, nogil=True)
def _stay_and_gain(first, worth, leave, stay, inside, outside, gain):
    """Worth of a decision at which nobody leaves, and in `gain` what changes when an image leaves; all given the potentials."""
    total = 0.0
    for i in range(gain.size):
        if first:
            stays, leaves = outside[i] - stay, worth[i] - leave
        else:
            stays, leaves = max(0.0, outside[i] - stay - inside[i]), max(0.0, worth[i] - leave - inside[i])
        total += stays
        gain[i] = leaves - stays
    return total


@njit(cache=True, nogil=True)
def _share(chunk, size):
    """The part of a range that a chunk works on."""
    return size * chunk // CHUNKS, size * (chunk + 1) // CHUNKS


@njit(cache=True, nogil=True)
def _best_cuts(w, prices, order, position, candidate, theta, allowed, potentials, floors, best, chunk):
    """Largest worth of each order's allowed cuts, into `best` [n]; takes the permission from cuts worth less than their position's floor.

    Args:
      w: float64 [K, I]; prices: (leave, stay, fixed), float64 [K] each.
      order: see `Root`.
      position, candidate, theta, allowed: of the n orders, see `_Node`.
      potentials: float64 [m + 1, I] of the chain's positions, 0 at the first.
      floors: float64 [m].
    """
    leave, stay, fixed = prices
    images = w.shape[1]
    gain, start, done = np.empty(images), 0.0, -1
    low, high = _share(chunk, candidate.size)
    for n in range(low, high):
        k, p = candidate[n], position[n]
        if k != done:
            start = _stay_and_gain(p == 0, w[k], leave[k], stay[k], potentials[p], potentials[p + 1], gain) - fixed[k]
            done = k
        value, most = start, -np.inf
        ranked = order[k, theta[n]]
        for a in range(images):
            value += gain[ranked[a]]
            if allowed[n, a]:
                most = max(most, value)
                if value < floors[p]:
                    allowed[n, a] = False
        best[n] = most


@njit(cache=True, nogil=True)
def _soften(w, prices, order, position, candidate, theta, allowed, potentials, best, tops, temperature, of_candidate, of_image, chunk):
    """Softmax over the cuts of each position, the largest worth having the weight 1; see `_best_cuts`.

    Args:
      best: float64 [n], of `_best_cuts`; tops: float64 [m], largest worth of each position.
      of_candidate: float64 [CHUNKS, K, 3], to which are added the weight of a candidate, the images that leave and that stay times weight.
      of_image: float64 [CHUNKS, m, 2, I], the weight with which each image leaves and stays. Only images that take part count: all at the
        first position, else those worth more than their potential.
    """
    leave, stay, fixed = prices
    images = w.shape[1]
    gain, weight, start, done = np.empty(images), np.empty(images), 0.0, -1
    low, high = _share(chunk, candidate.size)
    for n in range(low, high):
        k, p = candidate[n], position[n]
        least = tops[p] - 15 * temperature
        if best[n] < least:
            continue
        inside, outside = potentials[p], potentials[p + 1]
        if k != done:
            start = _stay_and_gain(p == 0, w[k], leave[k], stay[k], inside, outside, gain) - fixed[k]
            done = k
        value, total = start, 0.0
        ranked = order[k, theta[n]]
        for a in range(images):
            value += gain[ranked[a]]
            weight[a] = 0.0
            if allowed[n, a] and value > least:
                weight[a] = math.exp((value - tops[p]) / temperature)
                total += weight[a]
        of_candidate[chunk, k, 0] += total
        left = 0.0
        for a in range(images - 1, -1, -1):
            left += weight[a]
            i = ranked[a]
            if p == 0 or w[k, i] - leave[k] - inside[i] > 0:
                of_candidate[chunk, k, 1] += left
                of_image[chunk, p, 0, i] += left
            if p == 0 or outside[i] - stay[k] - inside[i] > 0:
                of_candidate[chunk, k, 2] += total - left
                of_image[chunk, p, 1, i] += total - left


@njit(cache=True, nogil=True)
def _worths(w, prices, order, position, candidate, theta, potentials, worths, chunk):
    """Worth of every cut of every order, into float64 [n, I]; see `_best_cuts`."""
    leave, stay, fixed = prices
    images = w.shape[1]
    gain = np.empty(images)
    low, high = _share(chunk, candidate.size)
    for n in range(low, high):
        k, p = candidate[n], position[n]
        value = _stay_and_gain(p == 0, w[k], leave[k], stay[k], potentials[p], potentials[p + 1], gain) - fixed[k]
        ranked = order[k, theta[n]]
        for a in range(images):
            value += gain[ranked[a]]
            worths[n, a] = value


@njit(cache=True, nogil=True)
def _possible(order, position, candidate, theta, allowed, lasts, possible):
    """At which candidates an image can be, into bool [K, I]; the orders are sorted by position."""
    images = possible.shape[1]
    reach, stays = np.ones(images, np.bool_), np.zeros(images, np.bool_)
    for n in range(candidate.size):
        if n and position[n] != position[n - 1]:
            reach[:] = stays
            stays[:] = False
        ranked = order[candidate[n], theta[n]]
        lowest, highest = images, -1
        for a in range(images):
            if allowed[n, a]:
                lowest = min(lowest, a)
                highest = a
        for a in range(images):
            i = ranked[a]
            if reach[i] and a <= highest:
                possible[candidate[n], i] = True
            if reach[i] and a > lowest:
                stays[i] = True
    for k in lasts:
        possible[k] |= stays if candidate.size else reach


@njit(cache=True, nogil=True)
def _ranges(lack, fp, possible, parts, chunk):
    """Smallest and largest lack and FP per class of all mixtures in which image i is at one of the candidates with possible[k, i].

    Added to float64 [CHUNKS, 4, C].
    """
    images, classes = fp.shape[1:]
    of_image = np.empty((4, classes))
    for i in range(chunk, images, CHUNKS):
        of_image[0::2] = np.inf
        of_image[1::2] = -np.inf
        for k in range(fp.shape[0]):
            if possible[k, i]:
                for c in range(classes):
                    of_image[0, c] = min(of_image[0, c], lack[k, i, c])
                    of_image[1, c] = max(of_image[1, c], lack[k, i, c])
                    of_image[2, c] = min(of_image[2, c], fp[k, i, c])
                    of_image[3, c] = max(of_image[3, c], fp[k, i, c])
        parts[chunk] += of_image


@njit(cache=True, nogil=True)
def _scan(
    problem, resources, order, planes, limits, target, second, floor, fixed, outer, lasts, inner, allowed, budget, best, found, tally, chunk
):
    """Scores the configurations of one pattern of exits whose reduced costs fit the budget.

    For every outer decision and every last candidate, one pass over each inner order follows the exact linear worth and the costs; what
    passes is scored exactly.

    Args:
      problem: (tp, fp, labelled, exit_of).
      resources: (kind, prefix, head, decision).
      planes: (w, constant).
      limits, target, second: see `Problem`; floor: mIoU that is needed.
      fixed: (who, counts, chain) of the decisions before: candidate of each image that has left (-1: none yet), images per decision,
        candidates.
      outer: (candidate, theta, cut, reduced cost) of the last but one decision; a candidate of -1 stands for none.
      lasts: (candidate, reduced cost) of the last exit.
      inner: (candidate, theta, smallest reduced cost) of the orders of the last decision; allowed: bool [n, I], their cuts.
      best: float64 [CHUNKS, 2], value and tie-breaker to beat, smaller is better; found: int64 [CHUNKS, 7]; tally: int64 [CHUNKS, 3], scored
        and failed by limit and by linear bound.
    """
    tp, fp, labelled, exit_of = problem
    kind, prefix, head, decision = resources
    w, constant = planes
    who_fixed, counts_fixed, chain_fixed = fixed
    images, classes = who_fixed.size, labelled.size
    before = chain_fixed.size
    who, passes = np.empty(images, np.int64), np.empty(images, np.bool_)
    t, t_last, t_gone = np.empty(classes), np.empty(classes), np.empty(classes)
    f, f_last, f_gone = np.empty(classes), np.empty(classes), np.empty(classes)
    costs, bounds = np.empty(kind.size), limits.copy()
    needed = floor
    for o in range(chunk, outer[0].size, CHUNKS):
        with_outer = 1 if outer[0][o] >= 0 else 0
        length = before + with_outer + 2
        chain, counts = np.empty(length, np.int64), np.zeros(length, np.int64)
        chain[:before] = chain_fixed
        counts[:before] = counts_fixed
        who[:] = who_fixed
        if with_outer:
            chain[before] = outer[0][o]
            ranked = order[outer[0][o], outer[1][o]]
            for a in range(outer[2][o]):
                if who[ranked[a]] < 0:
                    who[ranked[a]] = outer[0][o]
                    counts[before] += 1
        reached, gone = 0, constant
        t_gone[:] = 0
        f_gone[:] = 0
        for i in range(images):
            if who[i] < 0:
                reached += 1
            else:
                gone += w[who[i], i]
                t_gone += tp[who[i], i]
                f_gone += fp[who[i], i]
        for q in range(lasts[0].size):
            spent = outer[3][o] + lasts[1][q]
            if spent > budget:
                continue
            last = lasts[0][q]
            chain[length - 1] = last
            stay = gone
            t_last[:] = t_gone
            f_last[:] = f_gone
            for i in range(images):
                if who[i] < 0:
                    stay += w[last, i]
                    t_last += tp[last, i]
                    f_last += fp[last, i]
            for n in range(inner[0].size):
                if spent + inner[2][n] > budget:
                    continue
                k = inner[0][n]
                chain[length - 2] = k
                ranked = order[k, inner[1][n]]
                worth, passing = stay, 0
                for a in range(images):
                    i = ranked[a]
                    if who[i] < 0:
                        worth += w[k, i] - w[last, i]
                    passes[a] = allowed[n, a] and worth >= needed - SLACK
                    passing += passes[a]
                    tally[chunk, 2] += allowed[n, a] and not passes[a]
                if not passing:
                    continue
                t[:] = t_last
                f[:] = f_last
                left = 0
                for a in range(images):
                    i = ranked[a]
                    if who[i] < 0:
                        left += 1
                        for c in range(classes):
                            t[c] += tp[k, i, c] - tp[last, i, c]
                            f[c] += fp[k, i, c] - fp[last, i, c]
                    if not passes[a]:
                        continue
                    counts[length - 2] = left
                    counts[length - 1] = reached - left
                    _chain_costs(kind, prefix, head, decision, exit_of, chain, counts, costs)
                    if not _within(costs, bounds):
                        tally[chunk, 1] += 1
                        continue
                    tally[chunk, 0] += 1
                    miou = _miou(t, f, labelled)
                    if miou < needed - ROUNDING:
                        continue
                    value = costs[target] if target >= 0 else -miou
                    tie = -miou if target >= 0 else costs[second]
                    if value < best[chunk, 0] or (value == best[chunk, 0] and tie < best[chunk, 1]):
                        best[chunk, 0] = value
                        best[chunk, 1] = tie
                        found[chunk, 0], found[chunk, 1], found[chunk, 2] = outer[0][o], outer[1][o], outer[2][o]
                        found[chunk, 3], found[chunk, 4], found[chunk, 5], found[chunk, 6] = k, inner[1][n], a + 1, last
                        if target >= 0:
                            bounds[target] = min(bounds[target], value)
                        else:
                            needed = max(needed, miou)


@njit(cache=True, nogil=True)
def _improve(
    problem,
    resources,
    order,
    wish,
    second,
    who,
    after,
    chain,
    position,
    candidate,
    theta,
    allowed,
    counts_of,
    best,
    found,
    chunk,
):
    """The best decision at one position of a chain, the others staying as they are; exact.

    Args:
      wish: see `_Wish`.
      who: int64 [I], candidate of each image that has left before, else -1.
      after: int64 [I], position in the chain where an image leaves that stays here.
      chain: int64 [m], candidates; the one at `position` is replaced.
      counts_of: int64 [m], images that have left at the positions before.
      others: see `_scan`.
    """
    tp, fp, labelled, exit_of = problem
    kind, prefix, head, decision = resources
    floor, limits, weight, prices = wish
    images, classes = who.size, labelled.size
    start_t, start_f = np.zeros(classes), np.zeros(classes)
    start_counts = counts_of.copy()
    for i in range(images):
        k = who[i]
        if k < 0:
            k = chain[after[i]]
            start_counts[after[i]] += 1
        start_t += tp[k, i]
        start_f += fp[k, i]
    chain_here, counts, costs = chain.copy(), start_counts.copy(), np.empty(kind.size)
    t, f = np.empty(classes), np.empty(classes)
    for n in range(chunk, candidate.size, CHUNKS):
        k = candidate[n]
        chain_here[position] = k
        counts[:] = start_counts
        t[:] = start_t
        f[:] = start_f
        ranked = order[k, theta[n]]
        for a in range(images):
            i = ranked[a]
            if who[i] < 0:
                other = chain[after[i]]
                counts[after[i]] -= 1
                counts[position] += 1
                for c in range(classes):
                    t[c] += tp[k, i, c] - tp[other, i, c]
                    f[c] += fp[k, i, c] - fp[other, i, c]
            if not allowed[n, a]:
                continue
            miou = _miou(t, f, labelled)
            if miou < floor - ROUNDING or -weight * miou > best[chunk, 0]:
                continue
            _chain_costs(kind, prefix, head, decision, exit_of, chain_here, counts, costs)
            value = -weight * miou
            for r in range(costs.size):
                value += prices[r] * costs[r]
            tie = costs[second] if weight else -miou
            if _within(costs, limits) and (value < best[chunk, 0] or (value == best[chunk, 0] and tie < best[chunk, 1])):
                best[chunk, 0], best[chunk, 1] = value, tie
                found[chunk, 0], found[chunk, 1], found[chunk, 2] = k, theta[n], a + 1


# === Nodes ===


@dataclasses.dataclass
class _Node:
    """Configurations with the same m early exits, and what is known about them.

    Attributes:
      root: position in the problem's roots.
      position, candidate, theta: int64 [n], of the orders that are open; sorted by position, which counts the early exits from 0.
      allowed: bool [n, I], their cuts that are open.
      lasts: int64, candidates of the last exit that are open.
      box: float64 [4, C], smallest and largest lack (see `_planes`) and FP of what may be better than the best so far.
      potentials: float64 [m, I] behind each early exit, without what the prices add.
      prices: float64 [R], of the limits.
      upper: bound on the mIoU of all that keeps the limits.
      lower: bound on the target's cost of all that has the mIoU needed.
      spare: by how much its bound was above what was needed when it was last improved.
    """

    root: int
    position: np.ndarray
    candidate: np.ndarray
    theta: np.ndarray
    allowed: np.ndarray
    lasts: np.ndarray
    box: np.ndarray
    potentials: np.ndarray
    prices: np.ndarray
    upper: float = math.inf
    lower: float = 0.0
    spare: float = math.inf

    def count(self) -> int:
        """Number of its configurations."""
        cuts = self.allowed.sum(axis=1)
        return math.prod(int(cuts[self.position == p].sum()) for p in range(len(self.potentials))) * self.lasts.size

    def keep(self, orders: np.ndarray, lasts: np.ndarray) -> None:
        """Drops all orders and last candidates but these (bool)."""
        self.position, self.candidate, self.theta = self.position[orders], self.candidate[orders], self.theta[orders]
        self.allowed, self.lasts = self.allowed[orders], self.lasts[lasts]

    def copy(self) -> "_Node":
        """A node of its own with the same content."""
        return dataclasses.replace(self, allowed=self.allowed.copy(), box=self.box.copy())


@dataclasses.dataclass
class _Values:
    """What prices and potentials give.

    Attributes:
      bound: on mIoU.
      tops: float64 [m + 1], largest worth at each early exit and at the last.
      orders: float64 [n], largest worth of each order.
      lasts: float64, worth of each last candidate.
    """

    bound: float
    tops: np.ndarray
    orders: np.ndarray
    lasts: np.ndarray


class _Wish(NamedTuple):
    """What a configuration is judged by: the least of prices · costs - weight · mIoU, with at least `floor` mIoU and within the limits [R]."""

    floor: float
    limits: np.ndarray
    weight: float
    prices: np.ndarray


class _Pruned(Exception):
    """The bound of a node fell below what is needed."""


class Optimiser:
    """One search; see the module. `best` is what was found, `proof` what was done."""

    def __init__(self, problem: Problem, deadline: float = math.inf):
        """Prepares a search.

        Args:
          problem: the space and what is asked.
          deadline: of time.perf_counter(), in seconds.
        """
        self.problem = problem
        self.deadline = deadline
        self.best: Found | None = None
        self.proof = Proof()
        self.exits = int(problem.exit_of[-1]) + 1
        self.images = problem.tp.shape[1]
        self.prices = np.zeros(problem.limits.size)
        priced = np.zeros(problem.limits.size)
        priced[max(problem.target, 0)] = problem.target >= 0
        self.wish = _Wish(problem.min_miou, problem.limits, float(problem.target < 0), priced)
        self.value = (math.inf, math.inf)

    def _spread(self, kernel, orders: int, *arguments) -> None:
        """Runs all chunks of a kernel that passes over so many orders."""
        if orders * self.images < PARALLEL_STEPS:
            for chunk in range(CHUNKS):
                kernel(*arguments, chunk)
        else:
            list(self.pool.map(lambda chunk: kernel(*arguments, chunk), range(CHUNKS)))

    # --- What is needed ---

    @property
    def floor(self) -> float:
        """mIoU that something better has at least."""
        return max(self.problem.min_miou, self.best.miou) if self.best and self.problem.target < 0 else self.problem.min_miou

    @property
    def limits(self) -> np.ndarray:
        """Costs [R] that something better has at most. An equal mean cost counts, for the sake of a better mIoU; costs that come in steps must fall."""
        limits, target = self.problem.limits.copy(), self.problem.target
        if self.best and target >= 0:
            equal = self.problem.roots[0].resources.kind[target] == MEAN
            limits[target] = min(limits[target], self.best.costs[target] * (1 if equal else 1 - 1e-9))
        return limits

    def _judge(self, found: Found, wish: _Wish) -> tuple[float, float]:
        """Value and tie-breaker, smaller is better; infinite if a constraint is broken."""
        costs = np.array(found.costs)
        if found.miou < wish.floor - ROUNDING or (costs > wish.limits * (1 + ROUNDING)).any():
            return math.inf, math.inf
        return float(wish.prices @ costs - wish.weight * found.miou), found.costs[self.problem.second] if wish.weight else -found.miou

    def _score(self, root: int, early: Sequence[tuple[int, int, int]], last: int) -> Found:
        """Scores a configuration from its definition."""
        problem = self.problem
        who, counts = self._leave(root, early)
        counts = np.append(counts, (who < 0).sum())
        who[who < 0] = last
        costs = np.empty(problem.limits.size)
        chain = np.array([*(k for k, _, _ in early), last])
        _chain_costs(*self._resources(root), problem.exit_of, chain, counts, costs)
        images = np.arange(self.images)
        miou = _miou(problem.tp[who, images].sum(axis=0), problem.fp[who, images].sum(axis=0), problem.labelled)
        return Found(root, tuple((int(k), int(t), int(cut)) for k, t, cut in early), int(last), miou, tuple(costs.tolist()))

    def _leave(self, root: int, early: Sequence[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """The candidate where each image leaves, -1 if at none of the decisions, and how many leave at each."""
        who, counts = np.full(self.images, -1), np.zeros(len(early), np.int64)
        for j, (k, t, cut) in enumerate(early):
            leaving = self.problem.roots[root].order[k, t, :cut]
            leaving = leaving[who[leaving] < 0]
            who[leaving] = k
            counts[j] = leaving.size
        return who, counts

    def _offer(self, found: Found) -> None:
        """Takes a configuration if it meets the constraints and is better than the best."""
        value = self._judge(found, self.wish)
        if value < self.value:
            self.best, self.value = found, value

    def _resources(self, root: int) -> tuple[np.ndarray, ...]:
        resources = self.problem.roots[root].resources
        return resources.kind, resources.prefix, resources.head, resources.decision

    # --- The linear problem of a node ---

    def _linear(self, root: int, limits: np.ndarray) -> dict[str, np.ndarray]:
        """Finite limits as linear constraints, each scaled to 1: [R, K] of what an image adds that leaves or stays, and of what a choice adds."""
        kind, prefix, head, decision = self._resources(root)
        rows, candidates = kind.size, self.problem.exit_of.size
        names = ("leave", "leave_last", "stay", "fixed", "fixed_last")
        linear = {name: np.zeros((rows, candidates)) for name in names} | {"limit": np.zeros(rows)}
        for r in np.flatnonzero(np.isfinite(limits)):
            until = prefix[r, self.problem.exit_of]
            here, passing, alone = until + head[r] + decision[r], head[r] + decision[r], until + head[r]
            if kind[r] == MEAN:
                scale = self.images * max(limits[r], 1e-300)
                linear["leave"][r], linear["leave_last"][r], linear["stay"][r] = here / scale, alone / scale, passing / scale
                linear["limit"][r] = min(limits[r] / max(limits[r], 1e-300), 1)
            elif kind[r] == P90:
                slow = self.images - math.ceil(P90_SHARE * self.images - 1e-9)
                most = limits[r] * (1 + ROUNDING)
                linear["leave"][r], linear["leave_last"][r] = (here > most) / max(slow, 1), (alone > most) / max(slow, 1)
                linear["limit"][r] = min(slow, 1)
            elif kind[r] == TOTAL:
                scale = max(limits[r], 1e-300)
                linear["fixed"][r], linear["fixed_last"][r] = passing / scale, alone / scale
                linear["limit"][r] = min(limits[r] / scale, 1)
        return linear

    def _fitting(self, root: int, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Candidates that may decide, and that may be last, as far as one alone can exceed a limit: bool [K] each."""
        kind, prefix, head, decision = self._resources(root)
        until = prefix[:, self.problem.exit_of]
        within = limits[:, None] * (1 + ROUNDING)
        total, peak = kind[:, None] == TOTAL, kind[:, None] == PEAK
        decides = np.where(peak, head, np.where(total, head + decision, 0)) <= within
        ends = np.where(peak, np.maximum(head, until), np.where(total, until + head, 0)) <= within
        return decides.all(axis=0), ends.all(axis=0)

    def _planes(self, box: np.ndarray) -> tuple[np.ndarray, float]:
        """Linear upper bound of mIoU in a box.

        With the union U = labelled + FP and what the class lacks to a reference IoU r, G = r U - TP, IoU is r - G / U. In a box, one of the two
        McCormick planes of G times 1/U bounds it: that which errs less at the reference. 1/U is convex, so it lies below its chord and above
        its tangent.

        Args:
          box: [4, C], smallest and largest G and FP.

        Returns:
          Weights [K, I] and constant.
        """
        problem, reference, union = self.problem, self.reference, self.reference_union
        g0, g1 = np.maximum(-box[0], 0), np.maximum(box[1], 0)
        u0, u1 = problem.labelled + box[2], problem.labelled + box[3]
        middle = np.clip(union, u0, u1)
        error_high, error_low = g0 * (u1 - middle) / (u0 * u1), g1 * (1 / u0 - 1 / middle)
        high = error_high <= error_low
        per_lack = np.where(high, -1 / u1, -1 / u0)
        per_fp = np.where(high, -g0 / (u0 * u1), g1 / middle**2)
        constant = reference + per_lack * reference * problem.labelled
        constant += np.where(high, g0 * (u1 - problem.labelled) / (u0 * u1), g1 * (1 / u0 - 2 / middle + problem.labelled / middle**2))
        classes = problem.labelled.size
        return (self.lack @ per_lack + problem.fp @ per_fp) / classes, float(constant.mean())

    def _evaluate(self, node: _Node, w, constant, prices, potentials, linear, spare=math.inf) -> _Values:
        """The bound that prices and potentials give.

        Args:
          node: what is open.
          w, constant: see `_planes`.
          prices: [R].
          potentials: [m + 1, I], what an image is worth, costs included, that reaches a position; 0 at the first.
          linear: see `_linear`.
          spare: if finite, what lacks more to the best of its position is dropped from the node.
        """
        order, m = self.problem.roots[node.root].order, len(node.potentials)
        leave, leave_last, stay, fixed, fixed_last = (
            prices @ linear[name] for name in ("leave", "leave_last", "stay", "fixed", "fixed_last")
        )
        orders = np.empty(node.candidate.size)
        by_order = (w, (leave, stay, fixed), order, node.position, node.candidate, node.theta, node.allowed, potentials)
        tops = np.full(m + 1, -np.inf)
        if m:
            self._spread(_best_cuts, orders.size, *by_order, np.full(m, -np.inf), orders)
            np.maximum.at(tops, node.position, orders)
        ends = w[node.lasts] - leave_last[node.lasts, None] - potentials[m]
        lasts = (np.maximum(ends, 0) if m else ends).sum(axis=1) - fixed_last[node.lasts]
        tops[m] = lasts.max(initial=-np.inf)
        if spare < math.inf:
            if m:
                self._spread(_best_cuts, orders.size, *by_order, tops[:m] - spare, orders)
            kept_lasts = lasts >= tops[m] - spare
            kept = node.allowed.any(axis=1)
            node.keep(kept, kept_lasts)
            orders, lasts = orders[kept], lasts[kept_lasts]
        return _Values(constant + float(prices @ linear["limit"] + tops.sum()), tops, orders, lasts)

    def _gradient(self, node: _Node, w, prices, potentials, linear, values: _Values, temperature: float):
        """Softened bound and its derivatives by the potentials [m, I] behind the early exits and by the prices [R]."""
        order, m = self.problem.roots[node.root].order, len(node.potentials)
        leave, leave_last, stay, fixed = (prices @ linear[name] for name in ("leave", "leave_last", "stay", "fixed"))
        by_potential, by_price, softened = np.zeros((m + 1, self.images)), linear["limit"].copy(), values.bound
        if m:
            of_candidate, of_image = np.zeros((CHUNKS, w.shape[0], 3)), np.zeros((CHUNKS, m, 2, self.images))
            self._spread(
                *(
                    _soften,
                    node.candidate.size,
                    w,
                    (leave, stay, fixed),
                    order,
                    node.position,
                    node.candidate,
                    node.theta,
                    node.allowed,
                    potentials,
                ),
                *(values.orders, values.tops, temperature, of_candidate, of_image),
            )
            of_candidate, of_image = of_candidate.sum(axis=0), of_image.sum(axis=0)
            position_of = np.zeros(w.shape[0], np.int64)
            position_of[node.candidate] = node.position
            totals = np.bincount(position_of, of_candidate[:, 0], m)
            softened += temperature * np.log(totals).sum()
            use, leaves, stays = (of_candidate / totals[position_of, None]).T
            of_image /= totals[:, None, None]
            by_potential[:m] -= of_image.sum(axis=1)
            by_potential[1:] += of_image[:, 1]
            by_price -= linear["leave"] @ leaves + linear["stay"] @ stays + linear["fixed"] @ use
        weight = np.exp((values.lasts - values.tops[m]) / temperature)
        softened += temperature * math.log(weight.sum())
        weight /= weight.sum()
        ends = w[node.lasts] - leave_last[node.lasts, None] > (potentials[m] if m else -np.inf)
        by_potential[m] -= weight @ ends
        by_price -= linear["leave_last"][:, node.lasts] @ (weight * ends.sum(axis=1)) + linear["fixed_last"][:, node.lasts] @ weight
        return softened, by_potential[1:], by_price

    @staticmethod
    def _priced(potentials: np.ndarray, prices: np.ndarray, to_go: np.ndarray) -> np.ndarray:
        """Potentials [m + 1, I] as `_evaluate` takes them, from those of a node, which leave out the costs of going to the last exit."""
        return np.concatenate([np.zeros((1, potentials.shape[1])), potentials - prices @ to_go])

    def _to_go(self, node: _Node, linear) -> np.ndarray:
        return linear["leave_last"][:, node.lasts].min(axis=1)

    def _descend(self, node: _Node, w, constant, linear) -> _Values:
        """Improves a node's potentials and prices; raises _Pruned once they show that the node holds nothing better."""
        images, shape, size = self.images, node.potentials.shape, node.potentials.size
        to_go = self._to_go(node, linear)
        best: list = [math.inf, None, None]
        scale = 100.0  # of the objective, so that the tolerances of the minimiser mean something

        def value(x: np.ndarray, temperature: float):
            prices = x[size:]
            potentials = self._priced(x[:size].reshape(shape) / images, prices, to_go)
            values = self._evaluate(node, w, constant, prices, potentials, linear)
            if values.bound < best[0]:
                best[:] = values.bound, x.copy(), values
                if values.bound < self.floor - SLACK or time.perf_counter() > self.deadline:
                    raise StopIteration
            softened, by_potential, by_price = self._gradient(node, w, prices, potentials, linear, values, temperature)
            by_price = by_price - to_go * by_potential.sum()
            return scale * softened, scale * np.concatenate([by_potential.ravel() / images, by_price])

        x = np.concatenate([node.potentials.ravel() * images, node.prices])
        bounds = [(None, None)] * size + [(0, None)] * node.prices.size
        options = {"maxiter": 60, "maxcor": 20, "ftol": 1e-5}
        try:
            for temperature in TEMPERATURES:
                minimize(value, x, (temperature,), "L-BFGS-B", True, bounds=bounds, options=options)
                x = best[1]
        except StopIteration:
            pass
        node.upper = min(node.upper, best[0])
        node.potentials, node.prices = best[1][:size].reshape(shape) / images, best[1][size:]
        target = self.problem.target
        if target >= 0 and node.prices[target] > 0 and linear["limit"][target] == 1:
            node.lower = max(node.lower, self.limits[target] * (1 - (best[0] - self.floor) / node.prices[target]))
        if node.upper < self.floor - SLACK:
            raise _Pruned
        return best[2]

    def _tighten(self, node: _Node, w, constant, linear, values: _Values) -> None:
        """Shrinks the box of a node: how far can a class go while the bound on mIoU still reaches what is needed?"""
        problem, order, m = self.problem, self.problem.roots[node.root].order, len(node.potentials)
        prices, potentials = node.prices, self._priced(node.potentials, node.prices, self._to_go(node, linear))
        surplus = constant + float(prices @ linear["limit"]) - self.floor
        spare = max(values.bound - self.floor, 1e-5)
        # Where each image goes from each position on in the relaxed optimum.
        goes = np.empty((m + 1, self.images), np.int64)
        goes[m] = node.lasts[values.lasts.argmax()]
        for p, (k, t, cut) in reversed(list(enumerate(self._relaxed(node, values)))):
            goes[p] = goes[p + 1]
            goes[p, order[k, t, :cut]] = k
        images = np.arange(self.images)
        nothing = linear | {"limit": linear["limit"] * 0}
        # How much the bound on mIoU weighs against one class: the more is to spare, the less it helps.
        pulls = np.array([0.01, 0.04, 0.16]) / spare
        for axis, (counts, offset) in enumerate(((self.lack, self.reference * problem.labelled), (problem.fp, 0 * problem.labelled))):
            for c in range(problem.labelled.size):
                for sign in (-1, 1):
                    measure = sign * counts[:, :, c] / self.reference_union[c]
                    to_come = measure[goes, images]
                    to_come[0] = 0
                    reached = math.inf
                    for pull in pulls:
                        relaxed = self._evaluate(node, measure + pull * w, 0.0, pull * prices, to_come + pull * potentials, nothing)
                        reached = min(reached, relaxed.bound + pull * surplus)
                    row = 2 * axis + (sign > 0)
                    limit = sign * self.reference_union[c] * (reached + SLACK) + offset[c]
                    node.box[row, c] = min(node.box[row, c], limit) if sign > 0 else max(node.box[row, c], limit)
        # Bounds that cross mean that nothing better is there.
        if (node.box[0::2] > node.box[1::2]).any():
            raise _Pruned

    # --- Branch and bound ---

    def _nodes(self) -> list[_Node]:
        """The whole space, by early exits and last exit."""
        problem, nodes = self.problem, []
        candidates = [np.flatnonzero(problem.exit_of == e) for e in range(self.exits)]
        for root, part in enumerate(problem.roots):
            decides, ends = self._fitting(root, problem.limits)
            thetas = part.order.shape[1]
            for m, last in itertools.product(range(part.least, part.most + 1), range(self.exits)):
                for early in itertools.combinations(range(last), m):
                    k = np.concatenate([np.repeat(candidates[e], thetas) for e in early] or [candidates[0][:0]])
                    t = np.concatenate([np.tile(np.arange(thetas), candidates[e].size) for e in early] or [candidates[0][:0]])
                    node = _Node(
                        *(root, np.searchsorted(early, problem.exit_of[k]), k, t, part.allowed[k, t], candidates[last]),
                        box=np.stack([np.full_like(problem.labelled, sign * np.inf) for sign in (-1, 1, -1, 1)]),
                        potentials=np.zeros((m, self.images)),
                        prices=np.zeros(problem.limits.size),
                    )
                    self.proof.covered += (whole := node.count())
                    node.keep(decides[node.candidate], ends[node.lasts])
                    self.proof.cut["limit"] += whole - node.count()
                    nodes.append(node)
        return nodes

    def _relaxed(self, node: _Node, values: _Values) -> list[tuple[int, int, int]]:
        """The best order of each early exit in the relaxed optimum, with its middle open cut."""
        decisions = []
        for p in range(len(node.potentials)):
            here = np.flatnonzero(node.position == p)
            n = here[values.orders[here].argmax()]
            cuts = np.flatnonzero(node.allowed[n])
            decisions.append((int(node.candidate[n]), int(node.theta[n]), int(cuts[cuts.size // 2]) + 1))
        return decisions

    def _solve(self, node: _Node) -> list[_Node]:
        """Bounds a node more tightly; returns what is left of it: nothing, itself or its parts."""
        order = self.problem.roots[node.root].order
        possible = np.zeros(self.lack.shape[:2], bool)
        _possible(order, node.position, node.candidate, node.theta, node.allowed, node.lasts, possible)
        parts = np.zeros((CHUNKS, 4, self.problem.labelled.size))
        self._spread(_ranges, possible.sum(), self.lack, self.problem.fp, possible, parts)
        ranges = parts.sum(axis=0)
        ranges[:2] += self.reference * self.problem.labelled
        node.box[0::2], node.box[1::2] = np.maximum(node.box[0::2], ranges[0::2]), np.minimum(node.box[1::2], ranges[1::2])
        w, constant = self._planes(node.box)
        linear = self._linear(node.root, self.limits)
        if not node.potentials.any():
            node.prices = self.prices.copy()
            worths = w[node.lasts].sum(axis=1) - node.prices @ linear["leave_last"][:, node.lasts] * self.images
            node.potentials[:] = w[node.lasts[worths.argmax()]]
        values = self._descend(node, w, constant, linear)
        self.prices = node.prices
        finite = np.where(np.isfinite(self.limits), np.maximum(self.limits, 1e-300), np.inf)
        self._polish(node.root, self._relaxed(node, values), int(node.lasts[values.lasts.argmax()]), node.prices / finite)
        potentials = self._priced(node.potentials, node.prices, self._to_go(node, linear))
        count, spare = node.count(), values.bound - self.floor
        values = self._evaluate(node, w, constant, node.prices, potentials, linear, spare + SLACK)
        self.proof.cut["reduced_cost"] += count - node.count()
        stalls, node.spare = spare > 0.7 * node.spare, spare
        if self._scan_node(node, w, constant, linear, potentials, values, SCAN_STEPS if stalls else CHEAP_STEPS):
            return []
        if time.perf_counter() > self.deadline:
            return [node]
        if stalls:
            return self._branch(node, values)
        self._tighten(node, w, constant, linear, values)
        return [node]

    def run(self) -> None:
        """Searches until nothing better is left or the time is up."""
        with concurrent.futures.ThreadPoolExecutor(CHUNKS) as self.pool:
            self._start()
            self._refer()
            heap, ticket = [(-math.inf, i, node) for i, node in enumerate(self._nodes())], itertools.count(1 << 32)
            while heap and time.perf_counter() < self.deadline:
                _, _, node = heapq.heappop(heap)
                try:
                    if node.upper < self.floor - SLACK or not node.count():
                        raise _Pruned
                    for child in self._solve(node):
                        heapq.heappush(heap, (-child.upper, next(ticket), child))
                except _Pruned:
                    self.proof.cut["bound"] += node.count()
        left = [node for _, _, node in heap if node.upper >= self.floor - SLACK]
        self.proof.cut["bound"] += sum(node.count() for _, _, node in heap) - sum(node.count() for node in left)
        self.proof.open = sum(node.count() for node in left)
        self._close(left)

    def _close(self, left: list[_Node]) -> None:
        """Fills in the bound that holds for the whole space."""
        if self.problem.target < 0:
            self.proof.bound = max([self.floor, *(min(node.upper, 1.0) for node in left)])
        else:
            known = self.best.costs[self.problem.target] if self.best else math.inf
            self.proof.bound = min([known, *(node.lower for node in left)])

    def _branch(self, node: _Node, values: _Values) -> list[_Node]:
        """Splits a node at the first exit that leaves something open: by head, then by threshold, then by cut."""
        for p in range(len(node.potentials)):
            here = np.flatnonzero(node.position == p)
            for names in (node.candidate, node.theta):
                ranked = list(dict.fromkeys(names[here][np.argsort(-values.orders[here], kind="stable")].tolist()))
                if len(ranked) > 1:
                    better = np.isin(names, ranked[: len(ranked) // 2])
                    return self._parts(node, [(better | (node.position != p), None), (~better | (node.position != p), None)])
            cuts = np.flatnonzero(node.allowed[here[0]])
            if cuts.size > 1:
                parts = [node, node.copy()]
                parts[0].allowed[here[0], cuts[cuts.size // 2] :] = False
                parts[1].allowed[here[0], : cuts[cuts.size // 2]] = False
                return parts
        better = values.lasts >= np.median(values.lasts)
        if better.all():
            better = np.arange(better.size) < better.size // 2
        return self._parts(node, [(None, better), (None, ~better)])

    @staticmethod
    def _parts(node: _Node, kept) -> list[_Node]:
        parts = []
        for orders, lasts in kept:
            parts.append(node.copy())
            parts[-1].keep(slice(None) if orders is None else orders, slice(None) if lasts is None else lasts)
        return parts

    # --- Scoring what is left of a node ---

    def _scan_node(self, node: _Node, w, constant, linear, potentials, values: _Values, most_steps: float) -> bool:
        """Scores all of a node that its reduced costs leave; returns False, having done nothing, if that takes more steps."""
        m, spare = len(node.potentials), values.bound - self.floor + SLACK
        prices = tuple(node.prices @ linear[name] for name in ("leave", "stay", "fixed"))
        lacking = np.empty(node.allowed.shape)
        if m:
            order = self.problem.roots[node.root].order
            worths = np.empty(node.allowed.shape)
            self._spread(_worths, len(worths), w, prices, order, node.position, node.candidate, node.theta, potentials, worths)
            lacking = np.where(node.allowed, values.tops[node.position][:, None] - worths, np.inf)
        decisions = []
        for p in range(m - 1):
            n, a = np.nonzero((lacking <= spare) & (node.position == p)[:, None])
            ranked = np.argsort(lacking[n, a], kind="stable")
            n, a = n[ranked], a[ranked]
            decisions.append((node.candidate[n], node.theta[n], a + 1, lacking[n, a]))
        here = node.position == m - 1
        inner = node.candidate[here], node.theta[here], lacking[here].min(axis=1, initial=np.inf)
        lasts = node.lasts, values.tops[m] - values.lasts
        lists = [each[3] for each in decisions] + ([inner[2]] if m else []) + [lasts[1]]
        if self._steps(lists, max(spare, SLACK)) > most_steps:
            return False

        before = self.proof.scored + self.proof.cut["limit"] + self.proof.cut["linear_bound"]
        if m:
            none = np.array([-1]), np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1)
            outer = decisions[-1] if m > 1 else none
            for early, less in self._fixed(decisions[:-1], spare):
                self._scan_pattern(node.root, early, outer, lasts, inner, node.allowed[here], spare - less, (w, constant))
        else:
            for k in node.lasts[lasts[1] <= spare]:
                self._offer(self._score(node.root, (), k))
                self.proof.scored += 1
        done = self.proof.scored + self.proof.cut["limit"] + self.proof.cut["linear_bound"] - before
        self.proof.cut["reduced_cost"] += node.count() - done
        return True

    def _steps(self, lists: Sequence[np.ndarray], spare: float) -> float:
        """How many steps over sorted images a scan takes at most, by histograms of the reduced costs of all that is combined."""
        bins, passes = 64, []
        histogram = np.zeros(bins)
        histogram[0] = 1
        for each in lists:
            fitting = np.minimum((each[each <= spare] / spare * bins).astype(int), bins - 1)
            histogram = np.convolve(histogram, np.bincount(fitting, minlength=bins))[:bins]
            passes.append(histogram.sum())
        # One call per combination of the decisions before the last two, whose overhead is worth many steps.
        calls = passes[len(lists) - 4] if len(lists) > 3 else 0.0
        return self.images * sum(passes) + 1e5 * calls

    def _fixed(self, decisions, spare: float):
        """Yields all combinations of decisions of some exits that fit, with their reduced cost."""
        if not decisions:
            yield (), 0.0
            return
        for rest, less in self._fixed(decisions[:-1], spare):
            for k, t, cut, lacking in zip(*decisions[-1], strict=True):
                if less + lacking > spare:
                    break
                yield (*rest, (int(k), int(t), int(cut))), less + lacking

    def _scan_pattern(self, root: int, early, outer, lasts, inner, allowed, budget: float, planes) -> None:
        problem, order = self.problem, self.problem.roots[root].order
        fixed = *self._leave(root, early), np.array([k for k, _, _ in early], np.int64)
        best, found, tally = np.tile(self.value, (CHUNKS, 1)), np.zeros((CHUNKS, 7), np.int64), np.zeros((CHUNKS, 3), np.int64)
        self._spread(
            *(_scan, outer[0].size * lasts[0].size * inner[0].size),
            *((problem.tp, problem.fp, problem.labelled, problem.exit_of), self._resources(root), order, planes, self.limits),
            *(problem.target, problem.second, self.floor, fixed, outer, lasts, inner, allowed, budget, best, found, tally),
        )
        self.proof.scored += int(tally[:, 0].sum())
        self.proof.cut["limit"] += int(tally[:, 1].sum())
        self.proof.cut["linear_bound"] += int(tally[:, 2].sum())
        for chunk in np.flatnonzero((best < self.value).any(axis=1)):
            k0, t0, cut0, k1, t1, cut1, last = found[chunk].tolist()
            self._offer(self._score(root, (*early, *([(k0, t0, cut0)] if k0 >= 0 else []), (k1, t1, cut1)), last))

    # --- Good configurations to start from ---

    def _start(self) -> None:
        """Looks for good configurations: single exits, then those that price costs in various ways, in every part of the space."""
        self.tried: set[tuple] = set()
        final = self.problem.exit_of.size - 1
        for root, part in enumerate(self.problem.roots):
            if part.least == 0:
                for k in range(final + 1):
                    self._offer(self._score(root, (), k))
            original = np.array(self._score(root, (), final).costs)
            priced = np.isfinite(self.problem.limits) | (self.wish.prices > 0)
            for price in START_PRICES if part.most else ():
                early = self._nearest(root, self.best.early) if self.best and len(self.best.early) <= part.most else []
                self._polish(root, early, self.best.last if self.best else final, price * priced / np.maximum(original, 1e-300))

    def _refer(self) -> None:
        """Takes the class sums of the best configuration, else of the original network, as the reference of all planes."""
        problem = self.problem
        who = np.full(self.images, -1)
        if self.best:
            who, _ = self._leave(self.best.root, self.best.early)
        who[who < 0] = self.best.last if self.best else problem.exit_of.size - 1
        images = np.arange(self.images)
        self.reference_union = problem.labelled + problem.fp[who, images].sum(0)
        self.reference = problem.tp[who, images].sum(0) / self.reference_union
        self.lack = self.reference * problem.fp - problem.tp

    def _nearest(self, root: int, early) -> list[tuple[int, int, int]]:
        """Decisions with cuts that a part of the space has."""
        nearest = []
        for k, t, cut in early:
            cuts = np.flatnonzero(self.problem.roots[root].allowed[k, t]) + 1
            nearest.append((k, t, int(cuts[np.abs(cuts - cut).argmin()])))
        return nearest

    def _polish(self, root: int, early: Sequence[tuple[int, int, int]], last: int, prices: np.ndarray) -> None:
        """Improves a configuration step by step, first with priced costs in place of all constraints, and offers the result."""
        free = _Wish(0.0, np.full_like(prices, np.inf), 1.0, prices)
        configuration = list(early), last
        for wish in (free, self.wish):
            pattern = root, wish.weight, tuple(k for k, _, _ in configuration[0]), configuration[1]
            if pattern in self.tried:
                return
            self.tried.add(pattern)
            configuration = self._climb(root, *configuration, wish)
        if len(configuration[0]) >= self.problem.roots[root].least:
            self._offer(self._score(root, *configuration))

    def _climb(self, root: int, early, last: int, wish: _Wish) -> tuple[list[tuple[int, int, int]], int]:
        """Changes one exit at a time, adds and drops exits, for as long as the configuration gets better."""
        part, exit_of = self.problem.roots[root], self.problem.exit_of
        current, value, improved = (early, last), self._judge(self._score(root, early, last), wish), True
        while improved and time.perf_counter() < self.deadline:
            improved = False
            for e in range(self.exits - 1):
                chosen, last = current
                exits = [int(exit_of[k]) for k, _, _ in chosen]
                position = sum(exit < e for exit in exits)
                if e in exits:
                    others = chosen[:position] + chosen[position + 1 :]
                    options = [(others, last)] if len(others) >= part.least else []
                elif e < exit_of[last] and len(chosen) < part.most:
                    others, options = chosen, []
                else:
                    continue
                if (decision := self._best_decision(root, others, last, position, e, wish, value)) is not None:
                    options.append(([*others[:position], decision, *others[position:]], last))
                for option in options:
                    if (new := self._judge(self._score(root, *option), wish)) < value:
                        current, value, improved = option, new, True
            chosen, last = current
            behind = int(exit_of[chosen[-1][0]]) if chosen else -1
            for k in np.flatnonzero(exit_of > behind).tolist():
                if (new := self._judge(self._score(root, chosen, k), wish)) < value:
                    current, value, improved = (chosen, k), new, True
        return current

    def _best_decision(self, root: int, others, last: int, position: int, e: int, wish: _Wish, value) -> tuple[int, int, int] | None:
        """The best decision at exit `e`, in front of `others[position:]`, if it beats `value`."""
        problem, part = self.problem, self.problem.roots[root]
        who, before = self._leave(root, others[:position])
        counts = np.concatenate([before, np.zeros(len(others) + 2 - position, np.int64)])
        after = np.full(self.images, len(others) + 1)
        for j in range(len(others) - 1, position - 1, -1):
            k, t, cut = others[j]
            after[part.order[k, t, :cut]] = j + 1
        chain = np.array([k for k, _, _ in others[:position]] + [-1] + [k for k, _, _ in others[position:]] + [last])
        candidates = np.flatnonzero(problem.exit_of == e)
        thetas = part.order.shape[1]
        k, t = np.repeat(candidates, thetas), np.tile(np.arange(thetas), candidates.size)
        best, found = np.tile(value, (CHUNKS, 1)), np.full((CHUNKS, 3), -1)
        self._spread(
            *(_improve, k.size),
            *((problem.tp, problem.fp, problem.labelled, problem.exit_of), self._resources(root), part.order),
            *(wish, problem.second, who, after, chain, position, k, t, part.allowed[k, t], counts, best, found),
        )
        chunk = min(range(CHUNKS), key=lambda c: tuple(best[c]))
        return tuple(found[chunk].tolist()) if found[chunk, 0] >= 0 else None


# === Anytime ===


@njit(cache=True, nogil=True)
def _anytime(first, exit_of, mious, resources, limits, floor, target, most, horizon, span, extensions, best, best_chain):
    """Depth-first search over the chains of candidates, without decisions, that begin with one candidate.

    Args:
      first: the candidate.
      mious: float64 [K], of each candidate alone.
      resources: (kind, prefix, head, decision).
      floor: mean mIoU needed.
      most: early exits.
      span: int64 [E, 2], first candidate of each exit, and the one after its last.
      extensions: int64 [E, most + 1], number of chains of so many candidates or less, at least one, behind each exit.
      best: float64 [2], value and tie-breaker to beat, smaller is better; best_chain: int64 [most + 1], with -1 behind its end.

    Returns:
      Chains scored, and cut by the bound.
    """
    kind, prefix, head, decision = resources
    exits = span.shape[0]
    chain = np.full(most + 1, -1)
    scored, cut = 0, 0
    # Until the latest exit of a chain is reached: the area below mIoU over time, the time, the cost of the heads.
    area, time_of, heads = np.zeros(most + 2), np.zeros(most + 2), np.zeros(most + 2)
    cheapest = np.empty(exits)
    for e in range(exits):
        cheapest[e] = head[0, span[e, 0] : span[e, 1]].min()
    no_decision, costs, counts = np.zeros_like(decision), np.empty(kind.size), np.zeros(most + 1, np.int64)
    bounds = limits.copy()
    depth, k = 0, first
    while depth >= 0:
        if k == exit_of.size or (depth == 0 and k > first):
            depth -= 1
            if depth >= 0:
                k = chain[depth] + 1
            continue
        e = exit_of[k]
        heads[depth + 1] = heads[depth] + head[0, k]
        arrives = min(max(prefix[0, e] + heads[depth + 1], time_of[depth]), horizon)
        stood = mious[chain[depth - 1]] if depth else 0.0
        area[depth + 1] = area[depth] + stood * (arrives - time_of[depth])
        time_of[depth + 1] = arrives
        chain[depth] = k
        counts[:depth] = 0
        counts[depth] = 1
        _chain_costs(kind, prefix, head, no_decision, exit_of, chain[: depth + 1], counts[: depth + 1], costs)
        mean = (area[depth + 1] + mious[k] * (horizon - arrives)) / horizon
        scored += 1
        fits = mean >= floor - ROUNDING and _within(costs, bounds)
        value = costs[target] if target >= 0 else -mean
        tie = -mean if target >= 0 else costs[0]
        if fits and (value < best[0] or (value == best[0] and tie < best[1])):
            best[0], best[1] = value, tie
            best_chain[:] = -1
            best_chain[: depth + 1] = chain[: depth + 1]
            if target >= 0:
                bounds[target] = min(bounds[target], value)
            else:
                floor = max(floor, mean)
        # Whatever goes on from here has at most the best mIoU that can stand at each time.
        upper, stands, time_ = area[depth + 1], mious[k], arrives
        for later in range(e + 1, exits):
            soonest = min(max(prefix[0, later] + heads[depth + 1] + cheapest[later], time_), horizon)
            upper += stands * (soonest - time_)
            time_ = soonest
            stands = max(stands, mious[span[later, 0] : span[later, 1]].max())
        upper += stands * (horizon - time_)
        if depth < most and upper / horizon >= floor - ROUNDING:
            depth += 1
            k = span[e, 1]
        else:
            cut += extensions[e, most - depth]
            k += 1
    return scored, cut


def best_anytime(problem: Problem, max_early_exits: int, horizon: float, deadline: float) -> tuple[list[int] | None, Proof]:
    """The best chain of candidates that run one after another: mIoU is its mean over all deadlines up to the horizon.

    Args:
      problem: the first resource is the time; a single root, whose decisions cost nothing here.
      max_early_exits: largest number of candidates in front of the last.
      horizon: latest deadline.
      deadline: of the search, of time.perf_counter().
    """
    exits, candidates = int(problem.exit_of[-1]) + 1, problem.exit_of.size
    most = min(max_early_exits, exits - 1)
    resources = problem.roots[0].resources
    span = np.searchsorted(problem.exit_of, np.arange(exits + 1))
    span = np.stack([span[:-1], span[1:]], axis=1)
    extensions = np.zeros((exits, most + 1), np.int64)
    for e in reversed(range(exits - 1)):
        for left in range(1, most + 1):
            extensions[e, left] = sum(
                int(np.diff(span[later])[0]) * (1 + int(extensions[later, left - 1])) for later in range(e + 1, exits)
            )
    mious = (problem.tp.sum(1) / (problem.labelled + problem.fp.sum(1))).mean(1)
    proof = Proof(cut={"bound": 0})
    best, best_chain = np.full(2, np.inf), np.full(most + 1, -1)
    limits, floor = problem.limits.copy(), problem.min_miou
    for first in range(candidates):
        whole = 1 + int(extensions[problem.exit_of[first], most])
        proof.covered += whole
        if time.perf_counter() > deadline:
            proof.open += whole
            continue
        scored, cut = _anytime(
            *(first, problem.exit_of, mious, (resources.kind, resources.prefix, resources.head, resources.decision), limits, floor),
            *(problem.target, most, horizon, span, extensions, best, best_chain),
        )
        proof.scored += scored
        proof.cut["bound"] += cut
        if best[0] < math.inf and problem.target >= 0:
            limits[problem.target] = min(limits[problem.target], best[0])
        elif best[0] < math.inf:
            floor = max(floor, -best[0])
    proof.bound = float(mious.max()) if problem.target < 0 else 0.0
    return ([int(k) for k in best_chain if k >= 0] or None), proof
