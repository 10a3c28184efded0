"""The exact optimum over mixtures of exits: a dual bound, branch and bound, and the scoring of what is left. NumPy, Numba and SciPy.

What is searched: at every exit a network may skip it, take a decision there (a head, a pixel threshold, how many of the images, ordered by
their confidence, would leave), or end there (all images that are left leave at one head). mIoU is a ratio of sums over the images, so
three steps make it tractable:

1. `_tangent`: the linear function that is equal to mIoU at the middle of a part of the space. Then the worth of a configuration is a sum
   over the images of what the head that each one leaves at is worth to it. By how much mIoU can be above that is a square of what the class
   sums differ from the middle; it is bounded by a sum over the decisions, so it is a bonus to the worth of each. It shrinks with the square
   of the part's size.
2. `_evaluate`: a Lagrangian bound over all configurations of a node at once. Prices make the limits on costs part of the worth.
   Potentials, one per exit and image, say what an image is worth that goes on from the exit; given them, the exits part, and each one picks
   its best decision by itself in one pass over the sorted images. Any prices and potentials give a valid bound, `_descend` looks for the
   best ones. What a decision lacks to the best of its exit is a reduced cost: they add up, so `_reduce` drops what lacks more than the
   node has to spare.
3. `_scan`: what remains is enumerated as long as reduced costs allow, filtered by its exact linear worth, then scored exactly.
4. Where the bonus takes up too much of what a bound has to spare, or with more than two early exits, `_branch` halves a node where the
   bonus is largest: by cut, by head, by threshold or by last candidate.
5. With two early exits, `_pairs` bounds what remains: every pair of orders, by blocks of cuts. Which images reach which decision is then
   known but for a few. `_joint` prepares a first bound, with potentials for what the last candidates are worth; what that leaves is
   bounded with each of them, and needs neither potentials nor a bonus for what may reach it.

`_solve` takes these steps for one node, `run` for all that are left, best bound first. `_climb`, and `_wander` with more than two early
exits, find the good configurations that the bounds are compared with.

This file is longer than most: it is one class, whose steps share the node they work on and the best that was found.

Source: Lagrangian decomposition with potentials as in Held and Karp (1970) and Guignard and Kim (1987).
"""

import concurrent.futures
import contextlib
import heapq
import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize

from mess_runtime import terminal
from mess_tf.optimise import kernels, pairs
from mess_tf.optimise.kernels import CHUNKS, MEAN, P90, P90_SHARE, PEAK, ROUNDING, SLACK, TOTAL
from mess_tf.optimise.problem import Found, Node, Problem, Proof, Relaxation, Values, Wish

# Shorter loops, in steps over sorted images, run on one core.
PARALLEL_STEPS = 1e5
# Of the softened maximum, in mIoU, at each visit of a node; coarse first, so that the search for potentials neither stalls nor stops early.
TEMPERATURES = (1e-3, 3e-4, 1e-4)
# What is scored at once rather than bounded again, in steps over sorted images: so many, and so many passes over all that is open.
CHEAP_STEPS = 1e6
CHEAP_PASSES = 200
# What is scored at once rather than branched.
SCAN_STEPS = 3e8
# A part where mIoU may be above its tangent by this share of what its bound has to spare is split, unless it has so few pairs of orders.
BRANCH_SHARE = 0.5
CHEAP_PAIRS = 1e5
# Heads of the second exit whose pairs are bounded between two looks at the clock.
HEADS = 8
# Multiplicative steps of the weights of last candidates in `Optimiser._joint`: how many, and the first one per mIoU.
WEIGHT_STEPS, WEIGHT_RATE = 12, 3000.0
# Decisions that a step of `_wander` changes at most, near and to start elsewhere, and steps without gain until it does.
NEAR, FAR, PATIENCE = 3, 12, 60
# Configurations with one early exit that the search of each part of the space starts from.
STARTS = 3
# Orders of each exit whose mean is the middle of a part, or that show how often images go on.
SAMPLE = 40
# By how much G varies more than the union in `Optimiser._terms`: the root of its inverse.
BALANCE = 0.85
# Share of the images: exits where cuts further apart than this are open are split by cut.
CUT_SPAN = 0.08


def _runs(values: np.ndarray) -> np.ndarray:
    """Where the runs of equal values begin and end, int64 [runs, 2]."""
    begins = np.flatnonzero(np.diff(values, prepend=values[0] - 1))
    return np.stack([begins, np.append(begins[1:], values.size)], axis=1)


class PrunedError(Exception):
    """The bound of a node fell below what is needed."""


class Optimiser:
    """One search; see the module. `best` is what was found, `proof` what was done."""

    def __init__(self, problem: Problem, deadline: float = math.inf):
        """Prepares a search.

        Args:
          problem: the space and what is asked.
          deadline: of kernels.clock(), in seconds.
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
        self.wish = Wish(problem.min_miou, problem.limits, float(problem.target < 0), priced)
        self.value = (math.inf, math.inf)
        # Potentials, prices and expectation by exits: the kinds of confidence are alike.
        self.known: dict[tuple, tuple] = {}
        # With two early exits, by part of the space and exits: what the best configuration may be like.
        self.climbed: dict[tuple, tuple] = {}
        # Of `_wander`: where it is, with the value there, and for how many more steps it stays without finding something better.
        self.here: tuple | None = None
        self.patience = PATIENCE
        self.random = np.random.default_rng(0)
        self.least_fp = np.stack([problem.fp[problem.exit_of == e].min(axis=0) for e in range(self.exits)])

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
        """Costs [R] that something better has at most.

        An equal mean cost counts, for the sake of a better mIoU; costs that come in steps must fall.
        """
        limits, target = self.problem.limits.copy(), self.problem.target
        if self.best and target >= 0:
            equal = self.problem.roots[0].resources.kind[target] == MEAN
            limits[target] = min(limits[target], self.best.costs[target] * (1 if equal else 1 - 1e-9))
        return limits

    def _judge(self, found: Found) -> tuple[float, float]:
        """Value and tie-breaker, smaller is better; infinite if a constraint is broken."""
        costs, wish = np.array(found.costs), self.wish
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
        kernels.chain_costs(*self._resources(root), problem.exit_of, chain, counts, costs)
        miou = kernels.mixture_miou(problem.tp, problem.fp, problem.labelled, who)
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
        value = self._judge(found)
        if value < self.value:
            self.best, self.value = found, value

    def _resources(self, root: int) -> tuple[np.ndarray, ...]:
        resources = self.problem.roots[root].resources
        return resources.kind, resources.prefix, resources.head, resources.decision

    # --- The relaxation of a node ---

    def _relax(self, node: Node, limits: np.ndarray) -> Relaxation:
        """The problem that bounds a node."""
        kind, prefix, head, decision = self._resources(node.root)
        rows, candidates = kind.size, self.problem.exit_of.size
        leave, leave_last, stay, fixed, fixed_last = (np.zeros((rows, candidates)) for _ in range(5))
        limit = np.zeros(rows)
        for r in np.flatnonzero(np.isfinite(limits)):
            until = prefix[r, self.problem.exit_of]
            here, passing, alone = until + head[r] + decision[r], head[r] + decision[r], until + head[r]
            scale = max(limits[r], 1e-300)
            limit[r] = min(limits[r] / scale, 1)
            if kind[r] == MEAN:
                each = scale * self.images
                leave[r], leave_last[r], stay[r] = here / each, alone / each, passing / each
            elif kind[r] == P90:
                slow = self.images - math.ceil(P90_SHARE * self.images - 1e-9)
                most = limits[r] * (1 + ROUNDING)
                leave[r], leave_last[r] = (here > most) / max(slow, 1), (alone > most) / max(slow, 1)
                limit[r] = min(slow, 1)
            elif kind[r] == TOTAL:
                fixed[r], fixed_last[r] = passing / scale, alone / scale
            else:
                limit[r] = 0  # `_fitting` has seen to it
        to_go = leave_last[:, node.lasts].min(axis=1)
        return Relaxation(*self._tangent(node), leave, leave_last, stay, fixed, fixed_last, limit, to_go)

    def _fitting(self, root: int, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Candidates that may decide, and that may be last, as far as one alone can exceed a limit: bool [K] each."""
        kind, prefix, head, decision = self._resources(root)
        until = prefix[:, self.problem.exit_of]
        within = limits[:, None] * (1 + ROUNDING)
        total, peak = kind[:, None] == TOTAL, kind[:, None] == PEAK
        decides = np.where(peak, head, np.where(total, head + decision, 0)) <= within
        ends = np.where(peak, np.maximum(head, until), np.where(total, until + head, 0)) <= within
        return decides.all(axis=0), ends.all(axis=0)

    def _tangent(self, node: Node) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
        """Linear function that is equal to mIoU at the middle of a node, and what mIoU can be above it.

        With the union U = labelled + FP and r and V the IoU and the union in the middle, IoU is r - G / V + (G / V) (U - V) / U, where
        G = r U - TP. The first two terms are linear. The product is at most a quarter of the square of e G / V + (U - V) / (e U), for
        any e of each class; the one taken makes both terms vary alike. This sum is made up of what each decision contributes, a vector
        over the classes that is known but for the images of which it is open whether they reach the decision. Cauchy's inequality makes
        the square of the sum a sum of squares.

        Returns:
          Weights [K, I], constant and, as in `Relaxation`, the bonuses.
        """
        problem, m, order = self.problem, len(node.potentials), self.problem.roots[node.root].order
        images, classes = np.arange(self.images), problem.labelled.size
        early, last = node.expected
        goes = np.full((m + 1, self.images), last)
        for p, (k, t, _) in reversed(list(enumerate(early))):
            ranks = np.flatnonzero(node.allowed[node.position == p].any(axis=0))
            goes[p] = goes[p + 1]
            goes[p, order[k, t, : ranks[ranks.size // 2] + 1]] = k
        can, must = np.ones((2, m + 1, self.images), bool)
        orders = order, node.position, node.candidate, node.theta, node.allowed
        kernels.reaching(*orders, can, must)
        doubt = np.where(can[m] & ~must[m], 0.5, 0.0)
        weight = can[m] - doubt
        # The middle may be any: some orders of each position show well enough where it is.
        sample = [np.flatnonzero(node.position == p) for p in range(m)]
        sample = np.concatenate([here[:: 1 + here.size // SAMPLE] for here in sample] or [node.position])
        sampled = order, *(each[sample] for each in orders[1:])

        def contributions(per_tp: np.ndarray, per_fp: np.ndarray) -> tuple[np.ndarray, ...]:
            """What orders (at their middle cut) and last candidates add to sums over the images, [n + lasts, C], the doubt (of the orders
            alone), and the terms."""
            terms = problem.tp, problem.fp, per_tp, per_fp, per_tp * expected_tp + per_fp * expected_fp
            sums, spread = np.empty((2, sample.size + node.lasts.size, classes))
            self._spread(kernels.middles, sample.size, *terms, can, must, *sampled, sums, spread)
            of_lasts = slice(sample.size, None)
            sums[of_lasts] = per_tp * lasts_tp + per_fp * lasts_fp - weight @ terms[-1][m]
            return sums, spread, terms

        lasts_tp, lasts_fp = (weight @ counts[node.lasts] for counts in (problem.tp, problem.fp))
        expected_tp, expected_fp = problem.tp[goes, images], problem.fp[goes, images]
        of = np.append(node.position[sample], np.full(node.lasts.size, m))
        mean_of = np.equal.outer(np.arange(m + 1), of) / np.bincount(of, minlength=m + 1)[:, None]
        none, one = np.zeros(classes), np.ones(classes)
        of_tp, of_fp = contributions(one, none)[0], contributions(none, one)[0]
        center_tp, center_fp = mean_of @ of_tp, mean_of @ of_fp
        union = problem.labelled + expected_fp[0].sum(0) + center_fp.sum(0)
        iou = (expected_tp[0].sum(0) + center_tp.sum(0)) / union
        exits = np.unique(problem.exit_of[np.append(node.candidate, node.lasts)])
        least = problem.labelled + self.least_fp[exits].min(axis=0).sum(axis=0)
        of_g, of_union = iou * (of_fp - center_fp[of]) - (of_tp - center_tp[of]), of_fp - center_fp[of]
        varies_g, varies_union = (of_g**2).sum(axis=0) / union**2, (of_union**2).sum(axis=0) / least**2
        balance = ((varies_union + 1e-12) / (varies_g + 1e-12)) ** 0.25
        per_tp, per_fp = -balance / union, balance * iou / union + 1 / (balance * least)
        center = per_tp * center_tp + per_fp * center_fp
        sums, spread, terms = contributions(per_tp, per_fp)
        for row, k in enumerate(node.lasts, start=sample.size):
            spread[row] = doubt @ np.abs(per_tp * problem.tp[k] + per_fp * problem.fp[k] - terms[-1][m])
        squares = ((np.abs(sums - center[of]) + spread) ** 2).sum(axis=1)
        typical = np.sqrt(mean_of @ squares)
        typical += 0.05 * typical.sum() + 1e-12
        scale = typical.sum() / typical / (4 * classes)
        bonus = np.empty(node.allowed.shape)
        self._spread(kernels.bonuses, len(bonus), *terms, can, must, *orders, center, scale, bonus)
        w = np.zeros(problem.tp.shape[:2])
        for e in exits:
            here = slice(*np.searchsorted(problem.exit_of, [e, e + 1]))
            w[here] = (problem.tp[here] @ (1 / union) - problem.fp[here] @ (iou / union)) / classes
        constant = float((iou - iou * problem.labelled / union).mean())
        return w, constant, bonus, scale[m] * squares[of == m]

    def _evaluate(self, node: Node, relaxation: Relaxation, prices: np.ndarray, potentials: np.ndarray) -> Values:
        """The bound that prices [R] and potentials [m, I] of the early exits give."""
        m = len(potentials)
        orders, cuts = np.empty(node.candidate.size), np.empty(node.candidate.size, np.int64)
        tops = np.full(m + 1, -np.inf)
        if m:
            self._spread(kernels.best_cuts, orders.size, *self._passes(node, relaxation, prices, potentials), orders, cuts)
            np.maximum.at(tops, node.position, orders)
        ends = relaxation.w[node.lasts] - (prices @ relaxation.leave_last)[node.lasts, None]
        ends = np.maximum(ends - (potentials[-1] - prices @ relaxation.to_go), 0) if m else ends
        lasts = ends.sum(axis=1) - (prices @ relaxation.fixed_last)[node.lasts] + relaxation.bonus_last
        tops[m] = lasts.max(initial=-np.inf)
        bound = relaxation.constant + float(prices @ relaxation.limit + tops.sum())
        return Values(bound, tops, orders, cuts, lasts, relaxation.bonus, relaxation.bonus_last)

    def _passes(self, node: Node, relaxation: Relaxation, prices: np.ndarray, potentials: np.ndarray) -> tuple:
        """What the kernels need to pass over the orders of a node."""
        priced = prices @ relaxation.leave, prices @ relaxation.stay, prices @ relaxation.fixed
        whole = np.concatenate([np.zeros((1, self.images)), potentials - prices @ relaxation.to_go])
        order = self.problem.roots[node.root].order
        return relaxation.w, priced, order, node.position, node.candidate, node.theta, relaxation.bonus, whole

    def _gradient(self, node: Node, relaxation: Relaxation, prices, potentials, values: Values, temperature: float):
        """Softened bound and its derivatives by the potentials [m, I] and by the prices [R]."""
        m, candidates = len(potentials), self.problem.exit_of.size
        by_potential, by_price, softened = np.zeros((m + 1, self.images)), relaxation.limit.copy(), values.bound
        if m:
            of_candidate, of_image = np.zeros((CHUNKS, candidates, 3)), np.zeros((CHUNKS, m, 2, self.images))
            passes = self._passes(node, relaxation, prices, potentials)
            self._spread(
                *(kernels.soften, node.candidate.size, *passes),
                *(values.orders, values.cuts, values.tops, temperature, of_candidate, of_image),
            )
            of_candidate, of_image = of_candidate.sum(axis=0), of_image.sum(axis=0)
            position_of = np.zeros(candidates, np.int64)
            position_of[node.candidate] = node.position
            totals = np.bincount(position_of, of_candidate[:, 0], m)
            softened += temperature * np.log(totals).sum()
            use, leaves, stays = (of_candidate / totals[position_of, None]).T
            of_image /= totals[:, None, None]
            by_potential[:m] -= of_image.sum(axis=1)
            by_potential[1:] += of_image[:, 1]
            by_price -= relaxation.leave @ leaves + relaxation.stay @ stays + relaxation.fixed @ use
        weight = np.exp((values.lasts - values.tops[m]) / temperature)
        softened += temperature * math.log(weight.sum())
        weight /= weight.sum()
        ends = relaxation.w[node.lasts] - (prices @ relaxation.leave_last)[node.lasts, None]
        ends = ends > (potentials[-1] - prices @ relaxation.to_go if m else -np.inf)
        by_potential[m] -= weight @ ends
        by_price -= relaxation.leave_last[:, node.lasts] @ (weight * ends.sum(axis=1)) + relaxation.fixed_last[:, node.lasts] @ weight
        return softened, by_potential[1:], by_price - relaxation.to_go * by_potential[1:].sum()

    def _descend(self, node: Node, relaxation: Relaxation) -> Values:
        """Improves a node's potentials and prices; raises PrunedError once they show that the node holds nothing better."""
        images, shape, size = self.images, node.potentials.shape, node.potentials.size
        best: list = [math.inf, None, None]
        scale = 100.0  # of the objective, so that the tolerances of the minimiser mean something

        def value(x: np.ndarray, temperature: float):
            prices, potentials = x[size:], x[:size].reshape(shape) / images
            values = self._evaluate(node, relaxation, prices, potentials)
            if values.bound < best[0]:
                best[:] = values.bound, x.copy(), values
                if values.bound < self.floor - SLACK or kernels.clock() > self.deadline:
                    raise StopIteration
            softened, by_potential, by_price = self._gradient(node, relaxation, prices, potentials, values, temperature)
            return scale * softened, scale * np.concatenate([by_potential.ravel() / images, by_price])

        x = np.concatenate([node.potentials.ravel() * images, node.prices])
        bounds = [(None, None)] * size + [(0, None)] * node.prices.size
        options = {"maxiter": 30, "maxcor": 10, "ftol": 3e-5}
        temperature = TEMPERATURES[min(node.visits, len(TEMPERATURES) - 1)]
        with contextlib.suppress(StopIteration):
            minimize(value, x, (temperature,), "L-BFGS-B", True, bounds=bounds, options=options)
        node.visits += 1
        node.upper = min(node.upper, best[0])
        node.potentials, node.prices = best[1][:size].reshape(shape) / images, best[1][size:]
        target = self.problem.target
        if target >= 0 and node.prices[target] > 0 and relaxation.limit[target] == 1:
            node.lower = max(node.lower, self.limits[target] * (1 - (best[0] - self.floor) / node.prices[target]))
        if node.upper < self.floor - SLACK:
            raise PrunedError
        return best[2]

    def _reduce(self, node: Node, relaxation: Relaxation, values: Values) -> np.ndarray:
        """Drops what lacks more to the best of its position than the node has to spare.

        Returns:
          float64 [n, I], what each cut of the orders that are left lacks, infinite for those that are not open.
        """
        spare, count = values.bound - self.floor + SLACK, node.count()
        lacking = np.full(node.allowed.shape, np.inf)
        if len(node.potentials):
            passes = self._passes(node, relaxation._replace(bonus=values.bonus), node.prices, node.potentials)
            self._spread(kernels.worths, len(lacking), *passes, lacking)
            lacking = values.tops[node.position][:, None] - lacking
            node.allowed &= lacking <= spare
            lacking[~node.allowed], values.bonus[~node.allowed] = np.inf, -np.inf
        orders, lasts = node.allowed.any(axis=1), values.tops[-1] - values.lasts <= spare
        node.keep(orders, lasts)
        values.keep(orders, lasts)
        self.proof.cut["reduced_cost"] += count - node.count()
        return lacking[orders]

    # --- Branch and bound ---

    def _nodes(self) -> list[Node]:
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
                    node = Node(
                        *(root, np.searchsorted(early, problem.exit_of[k]), k, t, part.allowed[k, t], candidates[last]),
                        expected=([], 0),
                        potentials=np.zeros((m, self.images)),
                        prices=np.zeros(problem.limits.size),
                    )
                    node.expected = self._middle(node)
                    self.proof.covered += (whole := node.count())
                    node.keep(decides[node.candidate], ends[node.lasts])
                    self.proof.cut["limit"] += whole - node.count()
                    nodes.append(node)
        return nodes

    def _relaxed(self, node: Node, values: Values) -> list[tuple[int, int, int]]:
        """The best decision of each early exit in the relaxed optimum."""
        decisions = []
        for p in range(len(node.potentials)):
            here = np.flatnonzero(node.position == p)
            n = here[values.orders[here].argmax()]
            decisions.append((int(node.candidate[n]), int(node.theta[n]), int(values.cuts[n]) + 1))
        return decisions

    def _bonus(self, node: Node, values: Values) -> float:
        """By how much mIoU may be above its tangent in the relaxed optimum."""
        best = [np.flatnonzero(node.position == p) for p in range(len(node.potentials))]
        best = [here[values.orders[here].argmax()] for here in best]
        return float(values.bonus[best, values.cuts[best]].sum() + values.bonus_last[values.lasts.argmax()])

    def _solve(self, node: Node) -> list[Node]:
        """Bounds a node more tightly; returns what is left of it: nothing, itself or its parts."""
        pattern = tuple(np.unique(self.problem.exit_of[node.candidate])), int(self.problem.exit_of[node.lasts[0]])
        known = not node.visits and self.known.get(pattern)
        if known:
            node.potentials, node.prices, node.expected = known
        relaxation = self._relax(node, self.limits)
        cheap = CHEAP_STEPS + CHEAP_PASSES * node.candidate.size * self.images
        if not node.visits and not known:
            node.prices = self.prices.copy()
            worths = relaxation.w[node.lasts].sum(axis=1) - node.prices @ relaxation.leave_last[:, node.lasts] * self.images
            node.potentials[:] = relaxation.w[node.lasts[worths.argmax()]]
        first, values = node.upper == math.inf, self._evaluate(node, relaxation, node.prices, node.potentials)
        node.upper = min(node.upper, values.bound)
        if node.upper < self.floor - SLACK:
            raise PrunedError
        if first:  # nothing was known: all nodes get a first bound before any gets a better one
            return [] if self._scan(node, relaxation, values, cheap) else [node]
        values = self._descend(node, relaxation)
        self.prices = node.prices
        node.expected = self._relaxed(node, values), int(node.lasts[values.lasts.argmax()])
        if node.visits == 1:
            self._improve(node.root, *node.expected)
        self.known.setdefault(pattern, (node.potentials, node.prices, node.expected))
        spare = values.bound - self.floor
        curved = self._bonus(node, values) > BRANCH_SHARE * spare
        stalls = node.visits > 1 and (spare > 0.7 * node.spare - SLACK or curved)
        node.spare = spare
        if self._scan(node, relaxation, values, SCAN_STEPS if stalls and len(node.potentials) != 2 else cheap):
            return []
        if kernels.clock() > self.deadline:
            return [node]
        if len(node.potentials) == 2:
            few = self._count_pairs(node, values) <= CHEAP_PAIRS
            return self._pairs(node, relaxation, values) if few or not curved else self._branch(node, values)
        if stalls:
            return self._branch(node, values)
        return [node]

    def run(self) -> None:
        """Searches until nothing better is left or the time is up."""
        bar = terminal.Bar("search", 1000, most_s=self.deadline - kernels.clock())
        with concurrent.futures.ThreadPoolExecutor(CHUNKS) as self.pool, bar:
            self._start()
            heap, ticket = [(-math.inf, i, node) for i, node in enumerate(self._nodes())], itertools.count(1 << 32)
            while heap and kernels.clock() < self.deadline:
                _, _, node = heapq.heappop(heap)
                begin, wanders = kernels.clock(), len(node.potentials) > 2 and node.upper < math.inf
                try:
                    if node.upper < self.floor - SLACK or not node.count():
                        raise PrunedError
                    for child in self._solve(node):
                        heapq.heappush(heap, (-child.upper, next(ticket), child))
                except PrunedError:
                    self.proof.cut["bound"] += node.count()
                until = min(1.5 * kernels.clock() - 0.5 * begin, self.deadline)  # a third of the time
                while wanders and kernels.clock() < until:  # with fewer early exits, bounds alone soon lead to the optimum
                    self._wander()
                bar.reach(1000 * (self.proof.scored + sum(self.proof.cut.values())) // max(1, self.proof.covered))
        left = [node for _, _, node in heap if node.upper >= self.floor - SLACK]
        self.proof.cut["bound"] += sum(node.count() for _, _, node in heap) - sum(node.count() for node in left)
        self.proof.open = sum(node.count() for node in left)
        self._close(left)

    def _close(self, left: list[Node]) -> None:
        """Fills in the bound that holds for the whole space."""
        if self.problem.target < 0:
            self.proof.bound = max([self.floor, *(min(node.upper, 1.0) for node in left)])
        else:
            known = self.best.costs[self.problem.target] if self.best else math.inf
            self.proof.bound = min([known, *(node.lower for node in left)])

    def _branch(self, node: Node, values: Values) -> list[Node]:
        """Halves a node where mIoU may be most above its tangent: the last candidates, or an exit by cut, by head or by threshold."""
        m = len(node.potentials)
        most = [*(values.bonus[node.position == p].max() for p in range(m)), values.bonus_last.max()]
        for p in sorted(range(m + 1), key=lambda p: -most[p]):
            here = node.position == p
            if p == m and node.lasts.size > 1:
                better = np.zeros(node.lasts.size, bool)
                better[np.argsort(-values.lasts)[: better.size // 2]] = True
                return [node.part(lasts=side) for side in (better, ~better)]
            ranks = np.flatnonzero(node.allowed[here].any(axis=0))
            if ranks.size > 1 and (ranks[-1] - ranks[0] > CUT_SPAN * self.images or here.sum() == 1):
                low = np.arange(self.images) < ranks[ranks.size // 2]
                return [node.part(cuts=~here[:, None] | side) for side in (low, ~low)]
            for names in (node.candidate, node.theta):
                ranked = list(dict.fromkeys(names[here][np.argsort(-values.orders[here], kind="stable")].tolist()))
                if len(ranked) > 1:
                    better = np.isin(names, ranked[: len(ranked) // 2])
                    return [node.part(cuts=~here[:, None] | side[:, None]) for side in (better, ~better)]
        return [node]

    # --- Scoring what is left of a node ---

    def _scan(self, node: Node, relaxation: Relaxation, values: Values, most_steps: float) -> bool:
        """Drops what its bounds rule out and scores the rest; returns False, having scored nothing, if that takes more steps."""
        m, spare = len(node.potentials), values.bound - self.floor + SLACK
        lacking = self._reduce(node, relaxation, values)
        if not node.count():
            return True
        decisions = []
        for p in range(m - 1):
            n, a = np.nonzero(np.isfinite(lacking) & (node.position == p)[:, None])
            ranked = np.argsort(lacking[n, a], kind="stable")
            n, a = n[ranked], a[ranked]
            decisions.append((node.candidate[n], node.theta[n], a + 1, lacking[n, a], values.bonus[n, a]))
        here = node.position == m - 1
        inner = node.candidate[here], node.theta[here], lacking[here].min(axis=1, initial=np.inf)
        lasts = node.lasts, values.bonus_last, values.tops[m] - values.lasts
        lists = [each[3] for each in decisions] + ([inner[2]] if m else []) + [lasts[2]]
        if self._steps(lists, max(spare, SLACK)) > most_steps:
            return False

        before = self.proof.scored + self.proof.cut["limit"] + self.proof.cut["linear_bound"]
        if m:
            none = np.array([-1]), np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
            outer = decisions[-1] if m > 1 else none
            for early, less, more in self._fixed(decisions[:-1], spare):
                planes = relaxation.w, relaxation.constant + more
                self._scan_pattern(node, early, outer, lasts, inner, values.bonus[here], spare - less, planes)
        else:
            for k in node.lasts:
                self._offer(self._score(node.root, (), k))
            self.proof.scored += node.lasts.size
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
        """Yields all combinations of decisions of some exits that fit, with their reduced cost and their bonus."""
        if not decisions:
            yield (), 0.0, 0.0
            return
        for rest, less, more in self._fixed(decisions[:-1], spare):
            for k, t, cut, lacking, bonus in zip(*decisions[-1], strict=True):
                if less + lacking > spare:
                    break
                yield (*rest, (int(k), int(t), int(cut))), less + lacking, more + bonus

    def _scan_pattern(self, node: Node, early, outer, lasts, inner, bonus, budget: float, planes) -> None:
        problem, root = self.problem, node.root
        fixed = *self._leave(root, early), np.array([k for k, _, _ in early], np.int64)
        best, found, tally = np.tile(self.value, (CHUNKS, 1)), np.zeros((CHUNKS, 7), np.int64), np.zeros((CHUNKS, 3), np.int64)
        self._spread(
            *(kernels.scan, outer[0].size * lasts[0].size * inner[0].size),
            *((problem.tp, problem.fp, problem.labelled, problem.exit_of), self._resources(root)),
            *(problem.roots[root].order, planes, self.limits),
            *(problem.target, problem.second, self.floor, fixed, outer, lasts, inner, bonus, budget, best, found, tally),
        )
        self.proof.scored += int(tally[:, 0].sum())
        self.proof.cut["limit"] += int(tally[:, 1].sum())
        self.proof.cut["linear_bound"] += int(tally[:, 2].sum())
        for chunk in np.flatnonzero((best < self.value).any(axis=1)):
            k0, t0, cut0, k1, t1, cut1, last = found[chunk].tolist()
            self._offer(self._score(root, (*early, *([(k0, t0, cut0)] if k0 >= 0 else []), (k1, t1, cut1)), last))

    # --- Two early exits: pairs of orders ---

    def _terms(self, node: Node) -> tuple[tuple, tuple, np.ndarray]:
        """Linear function that is equal to mIoU at the expected configuration of a node, and what mIoU can be above it, by image.

        As in `_tangent`, but the sum over the images whose square bounds that is kept as it is: one vector for each image and candidate.

        Returns:
          (w, constant), see `Relaxation`, with the rounding of sums of float32 in the constant; (terms of the candidates, of a last
          candidate, doubt, rounding), see `pairs.bound_pairs`; what the sum of the terms starts from.
        """
        problem, images, classes = self.problem, np.arange(self.images), self.problem.labelled.size
        early, last = node.expected
        who, _ = self._leave(node.root, early)
        who[who < 0] = last
        union = problem.labelled + problem.fp[who, images].sum(axis=0)
        iou = problem.tp[who, images].sum(axis=0) / union
        used = np.unique(np.concatenate([node.candidate, node.lasts]))
        least = problem.labelled + self.least_fp[np.unique(problem.exit_of[used])].min(axis=0).sum(axis=0)
        scale = 1 / math.sqrt(4 * classes)
        per_tp, per_fp = scale * -BALANCE / union, scale * (BALANCE * iou / union + 1 / (BALANCE * least))
        start = scale * (BALANCE * iou * problem.labelled / union - (union - problem.labelled) / (BALANCE * least))
        w, of_candidate = np.zeros(problem.tp.shape[:2]), np.zeros(problem.tp.shape, np.float32)
        for k in used:
            w[k] = (problem.tp[k] @ (1 / union) - problem.fp[k] @ (iou / union)) / classes
            of_candidate[k] = problem.tp[k] * per_tp + problem.fp[k] * per_fp
        of_last = of_candidate[node.lasts].mean(axis=0)
        apart = of_candidate[node.lasts] - of_last
        doubt = np.maximum(np.maximum(apart, 0).sum(axis=1), np.maximum(-apart, 0).sum(axis=1)).max(axis=0)
        rounding = 4 * self.images * np.finfo(np.float32).eps
        of_terms = rounding * np.abs(of_candidate[used]).max(axis=0).sum(axis=0)
        constant = float((iou - iou * problem.labelled / union).mean() + rounding * np.abs(w[used]).max(axis=0).sum()) + SLACK
        return (w, constant), (of_candidate, of_last, doubt, of_terms.astype(np.float32)), start

    def _middle(self, node: Node) -> tuple[list[tuple[int, int, int]], int]:
        """The heads of a node that are best alone, each of which an equal share of the images leaves at."""
        early = []
        for p in range(m := len(node.potentials)):
            here = node.position == p
            k = node.candidate[here][self.alone[node.candidate[here]].argmax()]
            thetas = node.theta[here & (node.candidate == k)]
            early.append((int(k), int(thetas[thetas.size // 2]), self.images * (p + 1) // (m + 1)))
        return early, int(node.lasts[self.alone[node.lasts].argmax()])

    def _count_pairs(self, node: Node, values: Values) -> int:
        """How many pairs of orders of a node with two early exits its reduced costs allow."""
        less = values.tops[node.position] - values.orders
        first, second = (np.sort(less[node.position == p]) for p in range(2))
        return int(np.searchsorted(second, values.bound - self.floor + SLACK - first, "right").sum())

    def _pairs(self, node: Node, relaxation: Relaxation, values: Values) -> list[Node]:
        """Bounds every pair of orders of a node with two early exits, and scores what is left; returns what the time was too short for."""
        problem, spare = self.problem, values.bound - self.floor + SLACK
        lacking, order = self._reduce(node, relaxation, values), problem.roots[node.root].order
        if not node.count():
            return []
        pattern = node.root, *np.unique(problem.exit_of[node.candidate]), problem.exit_of[node.lasts[0]]
        if pattern not in self.climbed:
            self.climbed[pattern] = self._climb(node.root, *self._middle(node), stay=True)
        node.expected = self.climbed[pattern]
        plane, terms, start = self._terms(node)
        first, second = (self._blocks(order, node, np.flatnonzero(node.position == p), lacking, values.bonus) for p in range(2))
        joint = self._joint(node, relaxation, values)
        leaves = np.empty((first[0].size, pairs.BLOCKS, start.size + 3))
        pairs.leave_vectors(order, first, plane[0], terms[0], start, joint[0], leaves)
        less = values.tops[2] - values.lasts
        ranked = np.argsort(less, kind="stable")
        lasts = node.lasts[ranked], less[ranked]
        of_first, of_second = (_runs(side[0]) for side in (first, second))
        rooms = pairs.make_rooms(self.images, start.size, node.lasts.size)
        orders, left = first[0].size, np.ones(node.candidate.size, bool)
        runs = np.array(sorted(of_second.tolist(), key=lambda run: second[6][slice(*run)].min()))
        for some in np.array_split(runs, math.ceil(len(runs) / HEADS)):
            if kernels.clock() > self.deadline:
                break
            groups = np.concatenate([np.tile(of_first, (len(some), 1)), np.repeat(some, len(of_first), axis=0)], axis=1)
            these = np.concatenate([np.arange(*run) for run in some])
            best, found, tally = np.tile(self.value, (CHUNKS, 1)), np.zeros((CHUNKS, 5), np.int64), np.zeros((CHUNKS, 2), np.int64)
            self._spread(
                *(pairs.bound_pairs, orders * these.size, (problem.tp, problem.fp, problem.labelled, problem.exit_of)),
                *(self._resources(node.root), plane, terms, joint, order, first, leaves, second, groups, lasts, spare),
                *((problem.target, problem.second), self.floor, self.limits, best, found, tally, rooms),
            )
            scored, limit = tally.sum(axis=0).tolist()
            self.proof.scored += scored
            self.proof.cut["limit"] += limit
            self.proof.cut["linear_bound"] += int(first[4][:, -1].sum() * second[4][these, -1].sum()) * lasts[0].size - scored - limit
            left[orders + these] = False
            for chunk in np.flatnonzero((best < self.value).any(axis=1)):
                n1, n2, cut1, cut2, last = found[chunk].tolist()
                chosen = (n1, cut1), (orders + n2, cut2)
                early = [(int(node.candidate[n]), int(node.theta[n]), int(np.flatnonzero(node.allowed[n])[cut]) + 1) for n, cut in chosen]
                self._offer(self._score(node.root, early, last))
        node.keep(left, np.ones(node.lasts.size, bool))
        return [node] if left[orders:].any() else []

    def _joint(self, node: Node, relaxation: Relaxation, values: Values) -> tuple:
        """The plane of the potentials for `pairs.bound_pairs`: those of the node, and some for a few to many images that go on.

        Given how often each image goes on, and a weight of each last candidate, the tightest potential of an image is a quantile of what it
        is worth at the last candidates. The weights are those that make the bound largest, as far as a few multiplicative steps find them.
        """
        prices, last = node.prices, node.lasts
        leave, stay, fixed = prices @ relaxation.leave, prices @ relaxation.stay, prices @ relaxation.fixed
        ends = relaxation.w[last] - (prices @ relaxation.leave_last)[last, None]
        chosen = values.bonus_last - (prices @ relaxation.fixed_last)[last]
        ranked = np.argsort(-ends, axis=0)
        ordered = np.take_along_axis(ends, ranked, axis=0)
        onward, weight = [], np.full(last.size, 1 / last.size)
        for share in self._going_on(node, values):
            best = math.inf
            for step in range(WEIGHT_STEPS):
                above = (np.cumsum(weight[ranked], axis=0) < share - 1e-12).sum(axis=0)
                potential = np.take_along_axis(ordered, np.minimum(above, last.size - 1)[None], axis=0)[0]
                worth = chosen + np.maximum(ends - potential, 0).sum(axis=1)
                if (bound := share @ potential + worth.max()) < best:
                    best, tightest = bound, potential
                weight *= np.exp(WEIGHT_RATE * 0.9**step * (worth - worth.max()))
                weight = 0.98 * weight / weight.sum() + 0.02 / last.size  # none dies out
            onward.append(tightest)
        onward = np.array([*onward, node.potentials[1] - prices @ relaxation.to_go])
        tops = np.zeros(pairs.WIDTH, np.float32)
        tops[: pairs.POTENTIALS] = [(chosen + np.maximum(ends - potential, 0).sum(axis=1)).max() for potential in onward]
        middle = onward.mean(axis=0)
        worth = relaxation.w - leave[:, None] + stay[:, None] - middle
        onward = np.ascontiguousarray((onward - middle).T, np.float32)
        used = np.unique(node.candidate)
        largest = np.maximum(np.abs(onward).max(axis=1), np.abs(worth[used]).max(axis=0)) + 2 * np.abs(stay[used]).max()
        rounding = 4 * self.images * np.finfo(np.float32).eps * (largest.sum() + np.abs(tops).max())
        constant = relaxation.constant + float(prices @ relaxation.limit) + middle.sum() + rounding + SLACK
        return worth, stay, fixed, onward, tops, constant

    def _going_on(self, node: Node, values: Values) -> list[np.ndarray]:
        """How often each image goes on from both early exits, float64 [I], from few to many: of the best orders, at some of their cuts."""
        order, ranks, spans = self.problem.roots[node.root].order, [], []
        for p in range(2):
            here = np.flatnonzero(node.position == p)
            here = here[np.argsort(-values.orders[here], kind="stable")][:SAMPLE]
            ranks.append(np.argsort(order[node.candidate[here], node.theta[here]], axis=1))
            open_ = np.flatnonzero(node.allowed[here].any(axis=0))
            spans.append(np.linspace(open_[0], open_[-1], 8))
        size = min(len(rank) for rank in ranks)
        goes = [((ranks[0][:size] > a) & (ranks[1][:size] > b)).mean(axis=0) for a, b in itertools.product(*spans)]
        goes.sort(key=lambda often: often.sum())
        return [np.mean(some, axis=0) for some in np.array_split(goes, pairs.POTENTIALS - 1)]

    def _blocks(self, order: np.ndarray, node: Node, here: np.ndarray, lacking: np.ndarray, bonus: np.ndarray) -> tuple[np.ndarray, ...]:
        """What `pairs.bound_pairs` needs of some orders of a node."""
        side = node.candidate[here], node.theta[here]
        indices, rows = np.empty((here.size, self.images), np.int32), np.empty((here.size, self.images), np.int8)
        begins, blocks = np.empty((here.size, pairs.BLOCKS + 1), np.int64), np.empty(here.size, np.int64)
        largest, least = np.empty((2, here.size, pairs.BLOCKS))
        pairs.cut_blocks(order, *side, node.allowed[here], bonus[here], lacking[here], indices, rows, begins, blocks, largest, least)
        return *side, indices, rows, begins, blocks, least.min(axis=1, initial=np.inf), largest, least

    # --- Good configurations to start from ---

    def _start(self) -> None:
        """Looks for good configurations: single exits, then what the best of those with one early exit can be improved to."""
        problem = self.problem
        self.tried: set[tuple] = set()
        self.alone = (problem.tp.sum(1) / (problem.labelled + problem.fp.sum(1))).mean(1)
        for root, part in enumerate(problem.roots):
            for k in range(problem.exit_of.size if part.least == 0 else 0):
                self._offer(self._score(root, (), k))
            starts = []
            for e, last in itertools.combinations(range(self.exits if part.most else 0), 2):
                heads = np.flatnonzero(problem.exit_of == last)
                k = int(heads[self.alone[heads].argmax()])
                if (decision := self._best_decision(root, [], k, 0, e, (math.inf, math.inf))) is not None:
                    starts.append((self._judge(self._score(root, [decision], k)), [decision], k))
            for _, early, last in sorted(starts)[:STARTS]:
                self._improve(root, early, last)

    def _improve(self, root: int, early: Sequence[tuple[int, int, int]], last: int) -> None:
        """Improves a configuration step by step and offers the result."""
        pattern = root, tuple(k for k, _, _ in early), last
        if pattern not in self.tried:
            self.tried.add(pattern)
            early, last = self._climb(root, list(early), last)
            if len(early) >= self.problem.roots[root].least:
                self._offer(self._score(root, early, last))

    def _wander(self) -> None:
        """Puts random decisions in place of some of a configuration's, improves what comes of it, and stays there if it is better.

        A step of iterated local search, Lourenço, Martin and Stützle (2003). Where nothing better was found for long, it starts elsewhere.
        """
        if self.best is None or not (part := self.problem.roots[self.best.root]).most:
            return
        if self.here is None or self.here[0] != self.best.root:
            self.here = self.best.root, self.best.early, self.best.last, self.value
        root, early, last, value = self.here
        exit_of, rng, changes, early = self.problem.exit_of, self.random, NEAR, list(early)
        if self.patience == 0:
            changes, value = FAR, (math.inf, math.inf)
        for _ in range(rng.integers(1, changes + 1)):
            if (e := rng.integers(exit_of[last] + 1)) == exit_of[last]:
                last = int(rng.choice(np.flatnonzero(exit_of == e)))
                continue
            k, t = int(rng.choice(np.flatnonzero(exit_of == e))), int(rng.integers(part.order.shape[1]))
            decision = k, t, 1 + int(rng.choice(np.flatnonzero(part.allowed[k, t])))
            early = [other for other in early if exit_of[other[0]] != e]
            if len(early) == part.most:
                del early[rng.integers(part.most)]
            early = sorted([*early, decision])
        early, last = self._climb(root, early, last)
        found = self._score(root, early, last)
        self._offer(found)
        self.patience = max(self.patience - 1, 0)
        if (new := self._judge(found)) < value:
            self.here, self.patience = (root, early, last, new), PATIENCE

    def _climb(self, root: int, early, last: int, stay: bool = False) -> tuple[list[tuple[int, int, int]], int]:
        """Changes one exit at a time, adds and drops exits unless they shall stay, for as long as the configuration gets better."""
        part, exit_of = self.problem.roots[root], self.problem.exit_of
        current, value, improved = (early, last), self._judge(self._score(root, early, last)), True
        while improved and kernels.clock() < self.deadline:
            improved = False
            for e in range(self.exits - 1):
                chosen, last = current
                exits = [int(exit_of[k]) for k, _, _ in chosen]
                position = sum(exit < e for exit in exits)
                if e in exits:
                    others = chosen[:position] + chosen[position + 1 :]
                    options = [(others, last)] if len(others) >= part.least and not stay else []
                elif e < exit_of[last] and len(chosen) < part.most and not stay:
                    others, options = chosen, []
                else:
                    continue
                if (decision := self._best_decision(root, others, last, position, e, value)) is not None:
                    options.append(([*others[:position], decision, *others[position:]], last))
                for option in options:
                    if (new := self._judge(self._score(root, *option))) < value:
                        current, value, improved = option, new, True
            chosen, last = current
            behind = int(exit_of[chosen[-1][0]]) if chosen else -1
            for k in np.flatnonzero(exit_of == exit_of[last] if stay else exit_of > behind).tolist():
                if (new := self._judge(self._score(root, chosen, k))) < value:
                    current, value, improved = (chosen, k), new, True
        return current

    def _best_decision(self, root: int, others, last: int, position: int, e: int, value) -> tuple[int, int, int] | None:
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
            *(kernels.improve, k.size),
            *((problem.tp, problem.fp, problem.labelled, problem.exit_of), self._resources(root), part.order),
            *(tuple(self.wish), problem.second, who, after, chain, position, k, t, part.allowed[k, t], counts, best, found),
        )
        chunk = min(range(CHUNKS), key=lambda c: tuple(best[c]))
        return tuple(found[chunk].tolist()) if found[chunk, 0] >= 0 else None
