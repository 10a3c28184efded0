"""The compiled loops of the search: Numba kernels over images sorted by confidence. What they compute together is told in `optimum`.

A kernel with a `chunk` does its share of the work, so that several threads can run it side by side.
"""

import math
import time

import numpy as np
from numba import njit
from numba.core import event

# A constraint counts as met, and a bound as reached, within the rounding of sums of float64.
ROUNDING = 1e-12
# The sums of a bound have as many terms as there are images and exits, so its rounding is larger.
SLACK = 1e-10
# Parts of a loop that run side by side. Their results are put together in a fixed order, so the number of cores does not change them.
CHUNKS = 4
MEAN, P90, TOTAL, PEAK = range(4)
P90_SHARE = 0.9
# A kernel is compiled when it is first called, which takes seconds, or loaded where an earlier process has compiled it.
_COMPILING = event.TimingListener()
event.register("numba:compiler_lock", _COMPILING)


def compiled_s() -> float:
    """Seconds that kernels were compiled and loaded for in this process so far."""
    return _COMPILING.duration if _COMPILING.done else 0.0


def clock() -> float:
    """The clock of all searches, in seconds: `time.perf_counter()`, but it stands still while kernels are compiled."""
    return time.perf_counter() - compiled_s()


@njit(cache=True, nogil=True)
def chain_costs(kind, prefix, head, decision, exit_of, chain, counts, costs):
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
def within(costs, limits):
    """Whether all costs are within their limits."""
    met = True
    for r in range(costs.size):
        met &= costs[r] <= limits[r] * (1 + ROUNDING)
    return met


@njit(cache=True, nogil=True)
def take(miou, costs, target, second, best, bounds):
    """Keeps a score if it is better; returns whether it is.

    Args:
      target, second: see `optimum.Problem`.
      best: float64 [2], value and tie-breaker to beat, smaller is better.
      bounds: float64 [R], limits on costs, of which that of the target falls.
    """
    value = costs[target] if target >= 0 else -miou
    tie = -miou if target >= 0 else costs[second]
    if value > best[0] or (value == best[0] and tie >= best[1]):
        return False
    best[0], best[1] = value, tie
    if target >= 0:
        bounds[target] = min(bounds[target], value)
    return True


@njit(cache=True, nogil=True)
def mean_iou(tp, fp, labelled):
    """mIoU of sums over the images, [C] each."""
    total = 0.0
    for c in range(labelled.size):
        total += tp[c] / (labelled[c] + fp[c])
    return total / labelled.size


@njit(cache=True, nogil=True)
def mixture_miou(tp, fp, labelled, who):
    """mIoU of a mixture of candidates; who: int64 [I], where each image leaves."""
    t, f = np.zeros(labelled.size), np.zeros(labelled.size)
    for i in range(who.size):
        for c in range(labelled.size):
            t[c] += tp[who[i], i, c]
            f[c] += fp[who[i], i, c]
    return mean_iou(t, f, labelled)


@njit(cache=True, nogil=True)
def stay_and_gain(first, worth, leave, stay, inside, outside, gain):
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
def share(chunk, size):
    """The part of a range that a chunk works on."""
    return size * chunk // CHUNKS, size * (chunk + 1) // CHUNKS


@njit(cache=True, nogil=True)
def best_cuts(w, prices, order, position, candidate, theta, bonus, potentials, best, cuts, chunk):
    """Largest worth of each order's cuts, into `best` [n], and the cut, into `cuts` [n].

    Args:
      w: float64 [K, I]; prices: (leave, stay, fixed), float64 [K] each.
      order: see `optimum.Root`.
      position, candidate, theta: of the n orders, see `optimum.Node`.
      bonus: float64 [n, I], see `optimum.Relaxation`.
      potentials: float64 [m + 1, I] of the chain's positions, 0 at the first.
    """
    leave, stay, fixed = prices
    images = w.shape[1]
    gain = np.empty(images)
    n, high = share(chunk, candidate.size)
    while n < high:
        k, p = candidate[n], position[n]
        start = stay_and_gain(p == 0, w[k], leave[k], stay[k], potentials[p], potentials[p + 1], gain) - fixed[k]
        while n < high and candidate[n] == k:
            # Four orders side by side, as each sum has to wait for the one before; towards the end some of them are the same.
            last = n
            while last < n + 3 and last + 1 < high and candidate[last + 1] == k:
                last += 1
            n1, n2 = min(n + 1, last), min(n + 2, last)
            ranked0, ranked1, ranked2, ranked3 = order[k, theta[n]], order[k, theta[n1]], order[k, theta[n2]], order[k, theta[last]]
            bonus0, bonus1, bonus2, bonus3 = bonus[n], bonus[n1], bonus[n2], bonus[last]
            value0 = value1 = value2 = value3 = start
            most0 = most1 = most2 = most3 = -np.inf
            cut0 = cut1 = cut2 = cut3 = 0
            for a in range(images):
                value0 += gain[ranked0[a]]
                value1 += gain[ranked1[a]]
                value2 += gain[ranked2[a]]
                value3 += gain[ranked3[a]]
                if value0 + bonus0[a] > most0:
                    most0, cut0 = value0 + bonus0[a], a
                if value1 + bonus1[a] > most1:
                    most1, cut1 = value1 + bonus1[a], a
                if value2 + bonus2[a] > most2:
                    most2, cut2 = value2 + bonus2[a], a
                if value3 + bonus3[a] > most3:
                    most3, cut3 = value3 + bonus3[a], a
            best[n], best[n1], best[n2], best[last] = most0, most1, most2, most3
            cuts[n], cuts[n1], cuts[n2], cuts[last] = cut0, cut1, cut2, cut3
            n = last + 1


@njit(cache=True, nogil=True)
def soften(w, prices, order, position, candidate, theta, bonus, potentials, best, cuts, tops, temperature, of_candidate, of_image, chunk):
    """Softmax over the orders of each position, each at its best cut, the largest worth having the weight 1; see `best_cuts`.

    Args:
      tops: float64 [m], largest worth of each position.
      of_candidate: float64 [CHUNKS, K, 3], to which are added the weight of a candidate, the images that leave and that stay times weight.
      of_image: float64 [CHUNKS, m, 2, I], the weight with which each image leaves and stays. Only images that take part count: all at the
        first position, else those worth more than their potential.
    """
    leave, stay, _ = prices
    images = w.shape[1]
    low, high = share(chunk, candidate.size)
    for n in range(low, high):
        k, p = candidate[n], position[n]
        if best[n] < tops[p] - 15 * temperature:
            continue
        inside, outside, ranked = potentials[p], potentials[p + 1], order[k, theta[n]]
        weight = math.exp((best[n] - tops[p]) / temperature)
        of_candidate[chunk, k, 0] += weight
        for a in range(images):
            i = ranked[a]
            if a <= cuts[n]:
                if p == 0 or w[k, i] - leave[k] - inside[i] > 0:
                    of_candidate[chunk, k, 1] += weight
                    of_image[chunk, p, 0, i] += weight
            elif p == 0 or outside[i] - stay[k] - inside[i] > 0:
                of_candidate[chunk, k, 2] += weight
                of_image[chunk, p, 1, i] += weight


@njit(cache=True, nogil=True)
def worths(w, prices, order, position, candidate, theta, bonus, potentials, worths, chunk):
    """Worth of every cut of every order, into float64 [n, I]; see `best_cuts`."""
    leave, stay, fixed = prices
    images = w.shape[1]
    gain = np.empty(images)
    low, high = share(chunk, candidate.size)
    for n in range(low, high):
        k, p = candidate[n], position[n]
        value = stay_and_gain(p == 0, w[k], leave[k], stay[k], potentials[p], potentials[p + 1], gain) - fixed[k]
        ranked = order[k, theta[n]]
        for a in range(images):
            value += gain[ranked[a]]
            worths[n, a] = value + bonus[n, a]


@njit(cache=True, nogil=True)
def reaching(order, position, candidate, theta, allowed, can, must):
    """Which images can reach each position, and which have to, into bool [m + 1, I]; the orders are sorted by position."""
    images = can.shape[1]
    can[0], must[0] = True, True
    for n in range(candidate.size):
        p = position[n]
        if n == 0 or p != position[n - 1]:
            can[p + 1], must[p + 1] = False, must[p]
        ranked = order[candidate[n], theta[n]]
        lowest, highest = images, -1
        for a in range(images):
            if allowed[n, a]:
                lowest = min(lowest, a)
                highest = a
        for a in range(images):
            i = ranked[a]
            can[p + 1, i] |= can[p, i] and a > lowest
            must[p + 1, i] &= a > highest


@njit(cache=True, nogil=True)
def stay_and_leave(tp, fp, per_tp, per_fp, goes, goes_on, can, must, sums, spread, sum_steps, spread_steps):
    """By how much sums of per_tp TP + per_fp FP differ from what is expected if all images stay, and what changes when one leaves.

    What reaches the position for sure counts fully. What may reach it counts half, and the other half as uncertain.

    Args:
      tp, fp: float64 [I, C] of the candidate; per_tp, per_fp: float64 [C].
      goes, goes_on: float64 [I, C], what is expected of an image that reaches the position, or passes it.
      can, must: bool [I], see `reaching`.
      sums, spread: float64 [C], difference and uncertainty; sum_steps, spread_steps: float64 [I, C], their changes.
    """
    sums[:] = 0.0
    spread[:] = 0.0
    images, classes = tp.shape
    for i in range(images):
        weight = 1.0 if must[i] else (0.5 if can[i] else 0.0)
        doubt = 0.0 if must[i] else weight
        for c in range(classes):
            stays, leaves = goes_on[i, c] - goes[i, c], per_tp[c] * tp[i, c] + per_fp[c] * fp[i, c] - goes[i, c]
            sums[c] += weight * stays
            spread[c] += doubt * abs(stays)
            sum_steps[i, c] = weight * (leaves - stays)
            spread_steps[i, c] = doubt * (abs(leaves) - abs(stays))


@njit(cache=True, nogil=True)
def middles(tp, fp, per_tp, per_fp, goes, can, must, order, position, candidate, theta, allowed, sums, spread, chunk):
    """Differences of the class sums, and their uncertainties, at the middle cut of each order, into float64 [n, C].

    Args:
      tp, fp: float64 [K, I, C]; per_tp, per_fp: float64 [C], of the sums.
      goes: float64 [m + 1, I, C], what is expected of an image that reaches a position.
      others: see `reaching`.
    """
    images, classes = tp.shape[1:]
    start, doubt = np.empty(classes), np.empty(classes)
    sum_steps, spread_steps, done = np.empty((images, classes)), np.empty((images, classes)), -1
    low, high = share(chunk, candidate.size)
    for n in range(low, high):
        k, p = candidate[n], position[n]
        if k != done:
            stay_and_leave(*(tp[k], fp[k], per_tp, per_fp, goes[p], goes[p + 1], can[p], must[p]), start, doubt, sum_steps, spread_steps)
            done = k
        sums[n] = start
        spread[n] = doubt
        left = (allowed[n].sum() + 1) // 2
        for a in range(images):
            i = order[k, theta[n], a]
            for c in range(classes):
                sums[n, c] += sum_steps[i, c]
                spread[n, c] += spread_steps[i, c]
            left -= allowed[n, a]
            if left == 0:
                break


@njit(cache=True, nogil=True)
def bonuses(tp, fp, per_tp, per_fp, goes, can, must, order, position, candidate, theta, allowed, center, scale, bonus, chunk):
    """Sums of the squares by which the class sums of each cut may differ from the center, times a scale, into float64 [n, I].

    Args:
      center: float64 [m, C]; scale: float64 [m]; both by position.
      bonus: minus infinity for cuts that are not allowed.
      others: see `middles`.
    """
    images, classes = tp.shape[1:]
    start, doubt, sums, spread = np.empty(classes), np.empty(classes), np.empty(classes), np.empty(classes)
    sum_steps, spread_steps, done = np.empty((images, classes)), np.empty((images, classes)), -1
    low, high = share(chunk, candidate.size)
    for n in range(low, high):
        k, p = candidate[n], position[n]
        if k != done:
            stay_and_leave(*(tp[k], fp[k], per_tp, per_fp, goes[p], goes[p + 1], can[p], must[p]), start, doubt, sum_steps, spread_steps)
            done = k
        sums[:] = start - center[p]
        spread[:] = doubt
        for a in range(images):
            i = order[k, theta[n], a]
            for c in range(classes):
                sums[c] += sum_steps[i, c]
                spread[c] += spread_steps[i, c]
            bonus[n, a] = -np.inf
            if allowed[n, a]:
                total = 0.0
                for c in range(classes):
                    total += (abs(sums[c]) + spread[c]) ** 2
                bonus[n, a] = scale[p] * total


@njit(cache=True, nogil=True)
def leaving_range(kind, none, everyone, reached, limits):
    """Least and most of the images that reached a decision which can leave there within the limits, as far as costs are linear in that.

    Args:
      none, everyone: float64 [R], costs if none or all of them leave.
    """
    least, most = 0, reached
    for r in range(kind.size):
        bound = limits[r] * (1 + ROUNDING)
        if kind[r] == P90 or (none[r] <= bound and everyone[r] <= bound):
            continue
        if none[r] > bound and everyone[r] > bound:
            return 0, -1
        crossing = reached * (none[r] - bound) / (none[r] - everyone[r])
        if none[r] > bound:
            least = max(least, math.ceil(crossing - 1e-6))
        else:
            most = min(most, math.floor(crossing + 1e-6))
    return least, most


@njit(cache=True, nogil=True)
def scan(
    problem,
    resources,
    order,
    planes,
    limits,
    target,
    second,
    floor,
    fixed,
    outer,
    lasts,
    inner,
    bonus,
    budget,
    best,
    found,
    tally,
    chunk,
):
    """Scores the configurations of one pattern of exits whose reduced costs fit the budget.

    For every outer decision and every last candidate, one pass over each inner order follows the exact linear worth and the costs; what
    passes is scored exactly.

    Args:
      problem: (tp, fp, labelled, exit_of).
      resources: (kind, prefix, head, decision).
      planes: (w, constant with the bonus of the decisions before).
      limits, target, second: see `optimum.Problem`; floor: mIoU that is needed.
      fixed: (who, counts, chain) of the decisions before: candidate of each image that has left (-1: none yet), images per decision,
        candidates.
      outer: (candidate, theta, cut, reduced cost, bonus) of the last but one decision; a candidate of -1 stands for none.
      lasts: (candidate, bonus, reduced cost) of the last exit.
      inner: (candidate, theta, smallest reduced cost) of the orders of the last decision; bonus: float64 [n, I], of their cuts.
      best: float64 [CHUNKS, 2], value and tie-breaker to beat, smaller is better; found: int64 [CHUNKS, 7].
      tally: int64 [CHUNKS, 3], scored and failed by limit and by linear bound.
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
    costs, costs_of_none, bounds = np.empty(kind.size), np.empty(kind.size), limits.copy()
    needed = floor
    # The chunks share the outer decisions or, if there is only one, the inner orders.
    by_order = outer[0].size == 1
    for o in range(0 if by_order else chunk, outer[0].size, 1 if by_order else CHUNKS):
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
        reached, gone = 0, constant + outer[4][o]
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
            spent = outer[3][o] + lasts[2][q]
            if spent > budget:
                continue
            last = lasts[0][q]
            chain[length - 1] = last
            stay = gone + lasts[1][q]
            t_last[:] = t_gone
            f_last[:] = f_gone
            for i in range(images):
                if who[i] < 0:
                    stay += w[last, i]
                    t_last += tp[last, i]
                    f_last += fp[last, i]
            for n in range(chunk if by_order else 0, inner[0].size, CHUNKS if by_order else 1):
                if spent + inner[2][n] > budget:
                    continue
                k = inner[0][n]
                chain[length - 2] = k
                counts[length - 2], counts[length - 1] = 0, reached
                chain_costs(kind, prefix, head, decision, exit_of, chain, counts, costs_of_none)
                counts[length - 2], counts[length - 1] = reached, 0
                chain_costs(kind, prefix, head, decision, exit_of, chain, counts, costs)
                least, most = leaving_range(kind, costs_of_none, costs, reached, bounds)
                ranked = order[k, inner[1][n]]
                worth, passing, left = stay, 0, 0
                for a in range(images):
                    i = ranked[a]
                    if who[i] < 0:
                        worth += w[k, i] - w[last, i]
                        left += 1
                    passes[a] = False
                    if bonus[n, a] > -np.inf:
                        if worth + bonus[n, a] < needed - SLACK:
                            tally[chunk, 2] += 1
                        elif left < least or left > most:
                            tally[chunk, 1] += 1
                        else:
                            passes[a] = True
                            passing += 1
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
                    chain_costs(kind, prefix, head, decision, exit_of, chain, counts, costs)
                    if not within(costs, bounds):
                        tally[chunk, 1] += 1
                        continue
                    tally[chunk, 0] += 1
                    miou = mean_iou(t, f, labelled)
                    if miou < needed - ROUNDING:
                        continue
                    if take(miou, costs, target, second, best[chunk], bounds):
                        found[chunk, 0], found[chunk, 1], found[chunk, 2] = outer[0][o], outer[1][o], outer[2][o]
                        found[chunk, 3], found[chunk, 4], found[chunk, 5], found[chunk, 6] = k, inner[1][n], a + 1, last
                        if target < 0:
                            needed = max(needed, miou)


@njit(cache=True, nogil=True)
def improve(
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
      wish: see `optimum.Wish`.
      who: int64 [I], candidate of each image that has left before, else -1.
      after: int64 [I], position in the chain where an image leaves that stays here.
      chain: int64 [m], candidates; the one at `position` is replaced.
      counts_of: int64 [m], images that have left at the positions before.
      others: see `scan`.
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
            miou = mean_iou(t, f, labelled)
            if miou < floor - ROUNDING or -weight * miou > best[chunk, 0]:
                continue
            chain_costs(kind, prefix, head, decision, exit_of, chain_here, counts, costs)
            value = -weight * miou
            for r in range(costs.size):
                value += prices[r] * costs[r]
            tie = costs[second] if weight else -miou
            if within(costs, limits) and (value < best[chunk, 0] or (value == best[chunk, 0] and tie < best[chunk, 1])):
                best[chunk, 0], best[chunk, 1] = value, tie
                found[chunk, 0], found[chunk, 1], found[chunk, 2] = k, theta[n], a + 1


@njit(cache=True, nogil=True)
def anytime(first, exit_of, mious, resources, limits, floor, target, most, horizon, span, extensions, best, best_chain):
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
        chain_costs(kind, prefix, head, no_decision, exit_of, chain[: depth + 1], counts[: depth + 1], costs)
        mean = (area[depth + 1] + mious[k] * (horizon - arrives)) / horizon
        scored += 1
        if mean >= floor - ROUNDING and within(costs, bounds) and take(mean, costs, target, 0, best, bounds):
            best_chain[:] = -1
            best_chain[: depth + 1] = chain[: depth + 1]
            if target < 0:
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
