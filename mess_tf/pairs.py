"""Networks with two early exits: every pair of orders with every last candidate, bounded in blocks of cuts, then scored. Numba kernels.

The cuts of an order fall into blocks. Within a block of both orders most images leave at the same exit whatever the cuts; the others count
with the best that they can be worth. By that, few blocks can hold what is needed. In these, the linear worth of every pair of cuts is
followed exactly, and what it does not rule out is scored. `optimum` says what linear worth and bonus are.
"""

import numpy as np
from numba import njit

from mess_tf.kernels import CHUNKS, MEAN, ROUNDING, SLACK, chain_costs, mean_iou, take, within

# Blocks of cuts of an order, at most.
BLOCKS = 12
# The terms of a bound may be added in any order: rounding is allowed for.
FAST = {"reassoc", "nsz", "nnan", "ninf", "contract"}
ZERO, HALF = np.float32(0.0), np.float32(0.5)


@njit(cache=True, nogil=True)
def cut_blocks(order, candidate, theta, allowed, indices, rows, begins, blocks):
    """Puts the open cuts of each order into blocks, none of which covers more than a share of the images.

    Args:
      order, candidate, theta, allowed: see `optimum.Node`.
      indices: int32 [n, I], set to the first open cut with which an image leaves, or to the number of cuts if there is none.
      rows: int8 [n, I], set to at most 2 b if an image leaves with all cuts of block b, to 2 b + 1 if with some, to more if with none.
      begins: int64 [n, BLOCKS + 1], set to the first cut of each block, and behind the last one to the number of cuts.
      blocks: int64 [n], set to their number.
    """
    images = allowed.shape[1]
    span = (images + BLOCKS - 1) // BLOCKS
    for n in range(candidate.size):
        cut, block, begin = 0, -1, -images
        for a in range(images):
            i = order[candidate[n], theta[n], a]
            indices[n, i] = cut
            rows[n, i] = 2 * block + 1
            if allowed[n, a]:
                if a >= begin + span:
                    block, begin = block + 1, a
                    begins[n, block] = cut
                    # With the first cut of a block, and so with all of them, whoever has come since the one before leaves.
                    for before in range(a, -1, -1):
                        other = order[candidate[n], theta[n], before]
                        if indices[n, other] < cut:
                            break
                        rows[n, other] = 2 * block
                cut += 1
        blocks[n] = block + 1
        begins[n, block + 1 :] = cut
        for i in range(images):
            if indices[n, i] == cut:
                rows[n, i] = 2 * blocks[n]


@njit(cache=True, nogil=True)
def affordable(kind, arrival, head_last, limits, counts):
    """Whether mean costs are within the limits.

    Args:
      arrival: float64 [R, 3], cost of an image that leaves at each exit of a chain, without the last head; head_last: float64 [R], of that.
      counts: images that leave at each exit.
    """
    for r in range(kind.size):
        if kind[r] == MEAN:
            total = counts[0] * arrival[r, 0] + counts[1] * arrival[r, 1] + counts[2] * (arrival[r, 2] + head_last[r])
            if total > limits[r] * counts.sum() * (1 + SLACK):
                return False
    return True


@njit(cache=True, nogil=True, fastmath=FAST)
def add(sums, values):
    """sums += values."""
    for q in range(sums.size):
        sums[q] += values[q]


@njit(cache=True, nogil=True, fastmath=FAST)
def subtract(sums, values):
    """sums -= values."""
    for q in range(sums.size):
        sums[q] -= values[q]


@njit(cache=True, nogil=True, fastmath=FAST)
def largest_sum(one, other):
    """The largest of one + other."""
    most = np.float32(-1e30)
    for q in range(one.size):
        most = max(most, one[q] + other[q])
    return most


@njit(cache=True, nogil=True, fastmath=FAST)
def squares(middle, spread, doubt):
    """Sum of the squares of what the sums of terms can be at most, either way."""
    total = ZERO
    for c in range(middle.size):
        total += (abs(middle[c]) + spread[c] + doubt[c]) ** 2
    return total


@njit(cache=True, nogil=True)
def pass_vectors(w, terms, k2, lasts, passes, opens):
    """What each image adds that passes the first decision.

    Args:
      passes: float32 [I, L + 2 D + 2], set to the worth at each last candidate, the terms of a last candidate and of k2, the worth at k2,
        and 1.
      opens: float32 [I, L + D], set to the larger worth of k2 and each last candidate, and half of what is between their terms.
    """
    of_candidate, of_last = terms
    many, depth = lasts.size, of_last.shape[1]
    for i in range(of_last.shape[0]):
        for q in range(many):
            passes[i, q] = w[lasts[q], i]
            opens[i, q] = max(w[lasts[q], i], w[k2, i])
        for c in range(depth):
            passes[i, many + c], passes[i, many + depth + c] = of_last[i, c], of_candidate[k2, i, c]
            opens[i, many + c] = HALF * abs(of_last[i, c] - of_candidate[k2, i, c])
        passes[i, many + 2 * depth], passes[i, many + 2 * depth + 1] = w[k2, i], 1


@njit(cache=True, nogil=True)
def band_vectors(w, terms, k1, k2, lasts, bands):
    """What each image can add to that which may also leave at the first decision.

    Args:
      bands: float32 [I, L + 2 D + 2], set to what it is worth more at k1 than at each last candidate, the middle and half the width of how
        its terms may change, what it is worth more at k1 than at k2, and 1.
    """
    of_candidate, of_last = terms
    many, depth = lasts.size, of_last.shape[1]
    for i in range(of_last.shape[0]):
        for q in range(many):
            bands[i, q] = max(w[k1, i] - w[lasts[q], i], 0.0)
        for c in range(depth):
            second, last = of_candidate[k1, i, c] - of_candidate[k2, i, c], of_candidate[k1, i, c] - of_last[i, c]
            low, high = min(second, last, ZERO), max(second, last, ZERO)
            bands[i, many + c], bands[i, many + depth + c] = HALF * (low + high), HALF * (high - low)
        bands[i, many + 2 * depth], bands[i, many + 2 * depth + 1] = max(w[k1, i] - w[k2, i], 0.0), 1


@njit(cache=True, nogil=True)
def leave_vectors(order, first, w, of_candidate, start, vectors):
    """What the images that leave at the first decision with every cut of a block add, terms and worth, into float64 [n, BLOCKS, D + 1].

    Args:
      start: of the sums of the terms.
    """
    candidate, theta, _, rows = first[:4]
    depth = start.size
    for n in range(candidate.size):
        k, rank, sums = candidate[n], 0, np.append(start, 0.0)
        for block in range(BLOCKS):
            while rank < rows.shape[1] and rows[n, order[k, theta[n], rank]] <= 2 * block:
                i = order[k, theta[n], rank]
                for c in range(depth):
                    sums[c] += of_candidate[k, i, c]
                sums[depth] += w[k, i]
                rank += 1
            vectors[n, block] = sums


@njit(cache=True, nogil=True, fastmath=FAST)
def bonus_with(last, middle, spread, of_candidate, of_last, ranked, band, passing, row2, column):
    """The bonus with one last candidate instead of any of them.

    Args:
      middle, spread: float32 [D], the middle and half the width of what the sums of the terms can be with `of_last` for the last candidate.
      ranked: int32 [I], images by the first order: from `band` on they may pass, from `passing` on they do.
      row2, column: rows by the second order; below the column images leave there, above it they go on.
    """
    change, open_ = np.zeros(middle.size, np.float32), np.zeros(middle.size, np.float32)
    for rank in range(band, ranked.size):
        i = ranked[rank]
        if rank >= passing and row2[i] > column:
            for c in range(change.size):
                change[c] += of_candidate[last, i, c] - of_last[i, c]
        elif row2[i] >= column:
            for c in range(change.size):
                open_[c] += abs(of_candidate[last, i, c] - of_last[i, c])
    total = ZERO
    for c in range(change.size):
        total += (abs(middle[c] + change[c]) + spread[c] + open_[c]) ** 2
    return total


@njit(cache=True, nogil=True)
def look_into(problem, resources, plane, bonus, chain, one, two, objective, needed, bounds, places, best, found, tally, chunk):
    """Follows the linear worth of every pair of cuts of a pair of blocks, and scores what it does not rule out.

    Args:
      bonus: of all of them.
      chain: candidates.
      one, two: (cut indices [I], first cut, cuts) of the blocks.
      needed: mIoU.
      places: of the two orders.
      others: see `bound_pairs`.

    Returns:
      mIoU that is needed from now on.
    """
    tp, fp, labelled, exit_of = problem
    w, constant = plane
    target, second = objective
    k1, k2, last = chain
    images, classes, rows, columns = w.shape[1], labelled.size, one[2], two[2]
    # By the first cut of each block with which an image leaves: 0 if with all of them, the number of cuts if with none.
    row, column = np.empty(images, np.int64), np.empty(images, np.int64)
    gone, stay, gain = constant, np.zeros(rows + 1), np.zeros((rows + 1, columns + 1))
    for i in range(images):
        row[i], column[i] = min(max(one[0][i] - one[1], 0), rows), min(max(two[0][i] - two[1], 0), columns)
        gone += w[k1, i]
        stay[row[i]] += w[last, i] - w[k1, i]
        gain[row[i], column[i]] += w[k2, i] - w[last, i]
    hopeful, some = np.zeros((rows, columns), np.bool_), False
    line = np.zeros(columns)
    for a in range(rows - 1, -1, -1):
        gone += stay[a + 1]
        worth = gone
        for b in range(columns):
            line[b] += gain[a + 1, b]
            worth += line[b]
            hopeful[a, b] = worth + bonus >= needed
            some |= hopeful[a, b]
    if not some:
        return needed

    counts, costs, leaving = np.empty(3, np.int64), np.empty(bounds.size), np.zeros(columns, np.int64)
    t_go, f_go, t_gain, f_gain = np.zeros(classes), np.zeros(classes), np.zeros((columns, classes)), np.zeros((columns, classes))
    t, f = np.empty(classes), np.empty(classes)
    for i in range(images):
        for c in range(classes):
            t_go[c] += tp[k1, i, c]
            f_go[c] += fp[k1, i, c]
    counts[0] = images
    for a in range(rows - 1, -1, -1):
        for i in range(images):
            if row[i] == a + 1:
                counts[0] -= 1
                for c in range(classes):
                    t_go[c] += tp[last, i, c] - tp[k1, i, c]
                    f_go[c] += fp[last, i, c] - fp[k1, i, c]
                if column[i] < columns:
                    leaving[column[i]] += 1
                    for c in range(classes):
                        t_gain[column[i], c] += tp[k2, i, c] - tp[last, i, c]
                        f_gain[column[i], c] += fp[k2, i, c] - fp[last, i, c]
        t[:] = t_go
        f[:] = f_go
        counts[1] = 0
        for b in range(columns):
            for c in range(classes):
                t[c] += t_gain[b, c]
                f[c] += f_gain[b, c]
            counts[1] += leaving[b]
            if not hopeful[a, b]:
                continue
            counts[2] = images - counts[0] - counts[1]
            chain_costs(*resources, exit_of, chain, counts, costs)
            if not within(costs, bounds):
                tally[chunk, 1] += 1
                continue
            tally[chunk, 0] += 1
            miou = mean_iou(t, f, labelled)
            if miou < needed - ROUNDING:
                continue
            if take(miou, costs, target, second, best[chunk], bounds):
                found[chunk, 0], found[chunk, 1], found[chunk, 2], found[chunk, 3], found[chunk, 4] = *places, one[1] + a, two[1] + b, last
                if target < 0:
                    needed = max(needed, miou)
    return needed


@njit(cache=True, nogil=True)
def bound_pairs(
    problem,
    resources,
    plane,
    terms,
    order,
    first,
    leaves,
    second,
    groups,
    lasts,
    budget,
    objective,
    floor,
    limits,
    best,
    found,
    tally,
    chunk,
):
    """Bounds and scores the configurations of pairs of orders; every chunk does its share of the pairs of heads.

    Args:
      problem: (tp, fp, labelled, exit_of).
      resources: (kind, prefix, head, decision).
      plane: (w, constant), see `optimum.Relaxation`; with the rounding of sums of float32 in the constant.
      terms: (of the candidates, of a last candidate, doubt, rounding), float32 [K, I, D], [I, D], [D], [D]. The bonus is the sum of the
        squares of a sum over the images of the terms where they leave; by what the terms of one last candidate or another can change that
        is the doubt, and the rounding that of its sum.
      order: see `optimum.Root`.
      first, second: (candidate, theta, cut indices, rows, where blocks begin, blocks, reduced cost) of the orders, see `cut_blocks`.
      leaves: of the first orders, see `leave_vectors`.
      groups: int64 [G, 4], orders of one head from, to, of the first and of the second.
      lasts: (candidate, reduced cost), by rising reduced cost; budget: of reduced costs.
      objective: (target, second), see `optimum.Problem`; floor: mIoU that is needed; limits: float64 [R].
      best: float64 [CHUNKS, 2], value and tie-breaker to beat, smaller is better.
      found: int64 [CHUNKS, 5], places of the two orders, indices of their cuts, last candidate.
      tally: int64 [CHUNKS, 2], configurations scored and failed by limit.
    """
    exit_of, (kind, prefix, head, decision) = problem[3], resources
    w, constant = plane
    of_candidate, of_last, doubt, rounding = terms
    needed, bounds = floor, limits.copy()
    images, depth, many = w.shape[1], doubt.size, lasts[0].size
    go, gain = many + depth, many + 2 * depth  # where the terms of k2 begin in `passes`, and the worth in `passes` and `bands`
    arrival, head_least = np.empty((kind.size, 3)), np.empty(kind.size)
    for r in range(kind.size):
        head_least[r] = head[r][lasts[0]].min()
    passes, opens = np.empty((images, gain + 2), np.float32), np.empty((images, go), np.float32)
    bands = np.empty((images, gain + 2), np.float32)
    # Sums over the images with the same row by the second order: of those that pass the first decision, or may; of those of them that may
    # leave at the second or go on; of the band, those that may leave at the first.
    passing, band = np.empty((2 * BLOCKS + 1, gain + 2), np.float32), np.empty((2 * BLOCKS + 1, gain + 2), np.float32)
    open_ = np.empty((BLOCKS, go), np.float32)
    ends, leave = np.empty(go, np.float32), np.empty(depth, np.float32)
    middle, spread = np.empty(depth, np.float32), np.empty(depth, np.float32)
    in_band, chain, counts, k2 = np.empty(2 * depth, np.float32), np.empty(3, np.int64), np.empty(3, np.int64), -1
    for group in range(chunk, groups.shape[0], CHUNKS):
        low1, high1, low2, high2 = groups[group]
        if second[0][low2] != k2:
            k2 = second[0][low2]
            pass_vectors(w, (of_candidate, of_last), k2, lasts[0], passes, opens)
        k1 = first[0][low1]
        band_vectors(w, (of_candidate, of_last), k1, k2, lasts[0], bands)
        chain[0], chain[1] = k1, k2
        arrival[:, 0] = prefix[:, exit_of[k1]] + head[:, k1] + decision[:, k1]
        arrival[:, 1] = prefix[:, exit_of[k2]] - prefix[:, exit_of[k1]] + arrival[:, 0] + head[:, k2] + decision[:, k2]
        arrival[:, 2] = prefix[:, exit_of[lasts[0][0]]] - prefix[:, exit_of[k2]] + arrival[:, 1]
        for n2 in range(low2, high2):
            row2, begin2, blocks2 = second[3][n2], second[4][n2], second[5][n2]
            end2 = 2 * blocks2
            for n1 in range(low1, high1):
                lanes = np.searchsorted(lasts[1], budget - first[6][n1] - second[6][n2], "right")
                if lanes == 0:
                    continue
                row1, begin1, blocks1, ranked = first[3][n1], first[4][n1], first[5][n1], order[k1, first[1][n1]]
                passing[:] = 0
                open_[:] = 0
                rank = images
                for block1 in range(blocks1, -1, -1):
                    before, reached = rank, block1 == blocks1
                    band[:] = 0
                    while rank > 0 and row1[ranked[rank - 1]] > 2 * block1:
                        rank -= 1
                        i = ranked[rank]
                        add(passing[row2[i]], passes[i])
                        add(band[row2[i]], bands[i])
                        if row2[i] % 2:
                            add(open_[row2[i] // 2], opens[i])
                    if block1 < blocks1:
                        in_band[:] = 0
                        for column in range(end2 + 1):
                            add(in_band, band[column, many:gain])
                        ends[:] = passing[end2, :go]
                        add(ends[:many], band[end2, :many])
                        add(ends[many:], in_band[:depth])
                        for c in range(depth):
                            leave[c] = leaves[n1, block1, c]
                        sure = constant + leaves[n1, block1, depth]
                        counts[0], counts[2] = before, passing[end2, gain + 1] - band[end2, gain + 1]
                        for column in range(end2 - 1):
                            add(leave, passing[column, go:gain])
                            sure += passing[column, gain] + band[column, gain]
                        for block2 in range(blocks2 - 1, -1, -1):
                            column = 2 * block2 + 1
                            # Cheapest is that whoever may leave does.
                            counts[1] = images - counts[0] - counts[2]
                            if not affordable(kind, arrival, head_least, bounds, counts):
                                break
                            reached = True
                            for c in range(depth):
                                middle[c] = ends[many + c] + leave[c] + HALF * (passing[column, many + c] + passing[column, go + c])
                                spread[c] = open_[block2, many + c] + in_band[depth + c] + rounding[c]
                            upper = sure + band[column, gain]
                            bonus = squares(middle, spread, doubt)
                            if upper + largest_sum(ends[:many], open_[block2, :many]) + bonus >= needed:
                                for q in range(lanes):
                                    chain[2], worth = lasts[0][q], upper + ends[q] + open_[block2, q]
                                    if worth + bonus < needed or not affordable(kind, arrival, head[:, chain[2]], bounds, counts):
                                        continue
                                    own = bonus_with(chain[2], middle, spread, of_candidate, of_last, ranked, rank, before, row2, column)
                                    if worth + own >= needed:
                                        needed = look_into(
                                            *(problem, resources, plane, own, chain),
                                            (first[2][n1], begin1[block1], begin1[block1 + 1] - begin1[block1]),
                                            (second[2][n2], begin2[block2], begin2[block2 + 1] - begin2[block2]),
                                            *(objective, needed, bounds, (n1, n2), best, found, tally, chunk),
                                        )
                            # With the block before, two columns more go on, and one more may.
                            for here in range(column, column - 2, -1):
                                add(ends, passing[here, :go])
                                add(ends[:many], band[here, :many])
                                counts[2] += passing[here, gain + 1] - band[here, gain + 1]
                            for here in range(column - 1, max(column - 3, -1), -1):
                                subtract(leave, passing[here, go:gain])
                                sure -= passing[here, gain] + band[here, gain]
                    if not reached:
                        break
                    # With the block before, the band passes for sure, and so do those that leave with every cut of this block.
                    while rank > 0 and row1[ranked[rank - 1]] == 2 * block1:
                        rank -= 1
                        i = ranked[rank]
                        add(passing[row2[i]], passes[i])
                        if row2[i] % 2:
                            add(open_[row2[i] // 2], opens[i])
