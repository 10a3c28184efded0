"""Networks with two early exits: every pair of orders with every last candidate, bounded in blocks of cuts, then scored. Numba kernels.

The cuts of an order fall into blocks. Within a block of both orders most images leave at the same exit whatever the cuts; the others count
with the best that they can be worth. A pair is bounded first by what its blocks cost at least, and with potentials in place of the last
candidates, several for each image, of which the tightest counts; then, if that does not rule it out, with every last candidate. By that,
few blocks can hold what is needed. In these, the linear worth of every pair of cuts is followed exactly, and what it does not rule out is
scored. `optimum` says what linear worth, bonus and potentials are.
"""

import numpy as np
from numba import njit

from mess_tf.optimise.kernels import CHUNKS, MEAN, ROUNDING, SLACK, chain_costs, mean_iou, take, within

# Blocks of cuts of an order, at most.
BLOCKS = 12
# Potentials of each image.
POTENTIALS = 15
# Columns of `joint_vectors`.
LEAVE, OPEN, NUMBER, WIDTH = POTENTIALS, POTENTIALS + 1, 2 * POTENTIALS + 1, 2 * POTENTIALS + 2
# The terms of a bound may be added in any order: rounding is allowed for.
FAST = {"reassoc", "nsz", "nnan", "ninf", "contract"}
ZERO, HALF = np.float32(0.0), np.float32(0.5)


@njit(cache=True, nogil=True)
def cut_blocks(order, candidate, theta, allowed, bonus, lacking, indices, rows, begins, blocks, largest, least):
    """Puts the open cuts of each order into blocks, none of which covers more than a share of the images.

    Args:
      order, candidate, theta, allowed: see `optimum.Node`.
      bonus, lacking: float64 [n, I], bonus and reduced cost of the cuts.
      indices: int32 [n, I], set to the first open cut with which an image leaves, or to the number of cuts if there is none.
      rows: int8 [n, I], set to at most 2 b if an image leaves with all cuts of block b, to 2 b + 1 if with some, to more if with none.
      begins: int64 [n, BLOCKS + 1], set to the first cut of each block, and behind the last one to the number of cuts.
      blocks: int64 [n], set to their number.
      largest, least: float64 [n, BLOCKS], set to the largest bonus and the least reduced cost of each block.
    """
    largest[:], least[:] = -np.inf, np.inf
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
                largest[n, block] = max(largest[n, block], bonus[n, a])
                least[n, block] = min(least[n, block], lacking[n, a])
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
    """sums += values, of which there may be more."""
    for q in range(sums.size):
        sums[q] += values[q]


@njit(cache=True, nogil=True, fastmath=FAST)
def subtract(sums, values):
    """sums -= values, of which there may be more."""
    for q in range(sums.size):
        sums[q] -= values[q]


@njit(cache=True, nogil=True, fastmath=FAST)
def largest_sum(one, other):
    """The largest of one + other, which may be longer."""
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
      passes: float32 [I, 2 D + 2 + L], set to the terms of k2, the worth at k2, 1, the terms of a last candidate, the worth at each.
      opens: float32 [I, D + L], set to half of what is between these terms, and the larger worth of k2 and each last candidate.
    """
    of_candidate, of_last = terms
    depth = of_last.shape[1]
    for i in range(of_last.shape[0]):
        for c in range(depth):
            passes[i, c], passes[i, depth + 2 + c] = of_candidate[k2, i, c], of_last[i, c]
            opens[i, c] = HALF * abs(of_last[i, c] - of_candidate[k2, i, c])
        passes[i, depth], passes[i, depth + 1] = w[k2, i], 1
        for q in range(lasts.size):
            passes[i, 2 * depth + 2 + q] = w[lasts[q], i]
            opens[i, depth + q] = max(w[lasts[q], i], w[k2, i])


@njit(cache=True, nogil=True, fastmath=FAST)
def band_vectors(w, terms, k1, k2, passes, bands):
    """What each image can add to that which may also leave at the first decision.

    Args:
      passes: see `pass_vectors`, of k2.
      bands: float32 [I, 2 D + 2 + L], set to half the width of how its terms may change, what it is worth more at k1 than at k2, 1, the
        middle of how its terms may change, what it is worth more at k1 than at each last candidate.
    """
    of_candidate, of_last = terms
    depth = of_last.shape[1]
    for i in range(of_last.shape[0]):
        worth = np.float32(w[k1, i])
        for c in range(depth):
            second, last = of_candidate[k1, i, c] - of_candidate[k2, i, c], of_candidate[k1, i, c] - of_last[i, c]
            low, high = min(second, last, ZERO), max(second, last, ZERO)
            bands[i, c], bands[i, depth + 2 + c] = HALF * (high - low), HALF * (low + high)
        bands[i, depth], bands[i, depth + 1] = max(worth - passes[i, depth], ZERO), 1
        for q in range(2 * depth + 2, passes.shape[1]):
            bands[i, q] = max(worth - passes[i, q], ZERO)


@njit(cache=True, nogil=True)
def leave_vectors(order, first, w, of_candidate, start, worth, vectors):
    """What the images add that leave at the first decision with every cut of a block.

    Args:
      start: of the sums of the terms, float64 [D].
      worth: float64 [K, I], see `joint_bound`.
      vectors: float64 [n, BLOCKS, D + 3], set to the terms, the worth w, the other worth, and their number.
    """
    candidate, theta, _, rows = first[:4]
    depth = start.size
    for n in range(candidate.size):
        k, rank, sums = candidate[n], 0, np.append(start, np.zeros(3))
        for block in range(BLOCKS):
            while rank < rows.shape[1] and rows[n, order[k, theta[n], rank]] <= 2 * block:
                i = order[k, theta[n], rank]
                for c in range(depth):
                    sums[c] += of_candidate[k, i, c]
                sums[depth] += w[k, i]
                sums[depth + 1] += worth[k, i]
                sums[depth + 2] += 1
                rank += 1
            vectors[n, block] = sums


@njit(cache=True, nogil=True, fastmath=FAST)
def joint_vectors(onward, first, second, passes, bands):
    """What each image adds to the bounds of `joint_bound`.

    Args:
      onward: float32 [I, POTENTIALS]; first, second: worth of leaving at each decision, float64 [I].
      passes: float32 [I, WIDTH], of an image that passes the first decision: its potentials if it goes on, its worth if it leaves at the
        second, the larger of the two if that is open, 1.
      bands: float32 [I, WIDTH], the same where it may also leave at the first, with 0 in place of 1.
    """
    for i in range(onward.shape[0]):
        leaves1, leaves2 = np.float32(first[i]), np.float32(second[i])
        for s in range(POTENTIALS):
            passes[i, s], passes[i, OPEN + s] = onward[i, s], max(onward[i, s], leaves2)
        passes[i, LEAVE], passes[i, NUMBER] = leaves2, 1
        for s in range(WIDTH):
            bands[i, s] = max(passes[i, s], leaves1)
        bands[i, NUMBER] = 0


@njit(cache=True, nogil=True, fastmath=FAST)
def tightest(on, open_):
    """The smallest of `on + open_` over the potentials."""
    least = np.float32(1e30)
    for s in range(POTENTIALS):
        least = min(least, on[s] + open_[OPEN + s])
    return least


@njit(cache=True, nogil=True, fastmath=FAST)
def joint_bound(passes, bands, tops, ranked, leaving, one, two, spending, budget, needed, hopeful, sums, totals, ends, counts):
    """A bound on all cuts of a pair of orders, with potentials in place of the last candidates.

    Args:
      passes, bands: see `joint_vectors`.
      tops: float32 [WIDTH], what the best last candidate adds to each of the potentials.
      ranked: images by the first order.
      leaving: float64 [BLOCKS], worth of all that leave at the first decision with every cut of a block.
      one, two: (rows, number of blocks, largest bonus of each, least reduced cost of each) of the orders.
      spending: the arguments of `affordable`, but for the counts.
      budget: of reduced costs; needed: mIoU.
      hopeful: bool [BLOCKS, BLOCKS], set to whether a pair of blocks is affordable, and its bound is what is needed.
      sums, totals, ends: float32 [2 BLOCKS + 1, WIDTH] twice and [WIDTH], room to work in, as are the counts, int64 [3].

    Returns:
      The first block of the first order with any that is hopeful, or their number; the largest bound by the last of the potentials alone.
    """
    row1, blocks1, bonus1, less1 = one
    row2, blocks2, bonus2, less2 = two
    rank, lowest, alone, end, cheapest = ranked.size, blocks1, -1e30, 2 * blocks2, less2[:blocks2].min()
    sums[: end + 1], hopeful[:blocks1] = 0, False
    for block1 in range(blocks1 - 1, -1, -1):
        if less1[block1] + cheapest > budget:
            continue
        while rank > 0 and row1[ranked[rank - 1]] > 2 * block1 + 1:
            rank -= 1
            i = ranked[rank]
            add(sums[row2[i]], passes[i])
        # Cheapest is that whoever may leave does; from here on, fewer do.
        counts[0], counts[2] = rank, sums[end, NUMBER]
        counts[1] = ranked.size - counts[0] - counts[2]
        if not affordable(*spending, counts):
            break
        for column in range(end + 1):  # faster than assigning the array
            for q in range(WIDTH):
                totals[column, q] = sums[column, q]
        band = rank
        while band > 0 and row1[ranked[band - 1]] == 2 * block1 + 1:
            band -= 1
            i = ranked[band]
            add(totals[row2[i]], bands[i])
        sure = leaving[block1] + bonus1[block1]
        for column in range(end - 1):
            sure += totals[column, LEAVE]
        ends[:] = tops
        add(ends, totals[end])
        for block2 in range(blocks2 - 1, -1, -1):
            column = 2 * block2 + 1
            counts[2] = ends[NUMBER]
            counts[1] = ranked.size - counts[0] - counts[2]
            if not affordable(*spending, counts):
                break
            here = sure + bonus2[block2]
            if less1[block1] + less2[block2] <= budget and here + tightest(ends, totals[column]) >= needed:
                hopeful[block1, block2], lowest = True, block1
                alone = max(alone, here + ends[POTENTIALS - 1] + totals[column, OPEN + POTENTIALS - 1])
            add(ends, totals[column])
            add(ends, totals[column - 1])
            sure -= totals[column - 1, LEAVE]
            if block2 > 0:
                sure -= totals[column - 2, LEAVE]
    return lowest, alone


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


def make_rooms(images: int, depth: int, lasts: int) -> tuple[np.ndarray, ...]:
    """What `bound_pairs` works in, float32 [CHUNKS, n, width] each. Loops on arrays that a kernel makes itself take twice the time."""
    width, columns = 2 * depth + 2 + lasts, 2 * BLOCKS + 1
    shapes = (
        *((images, WIDTH), (images, WIDTH), (columns, WIDTH), (columns, WIDTH), (1, WIDTH)),
        # By image: what passes the first decision, may leave there, may leave at the second. Sums over the images with the same row by the
        # second order: of those that pass the first decision, or may; of those that may leave at the first; of those that pass the first,
        # or may, and may leave at the second or go on.
        *((images, width), (images, width), (images, depth + lasts), (columns, width), (columns, width), (BLOCKS, depth + lasts)),
        *((1, depth + lasts), (1, 2 * depth), (3, depth)),
    )
    return tuple(np.empty((CHUNKS, *shape), np.float32) for shape in shapes)


@njit(cache=True, nogil=True)
def bound_pairs(
    problem,
    resources,
    plane,
    terms,
    joint,
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
    rooms,
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
      joint: (worth, what passing subtracts, what choosing subtracts, onward, tops, constant), the plane of the potentials: float64 [K, I]
        and [K] twice, float32 [I, POTENTIALS] and [WIDTH], the rest as in `plane`.
      order: see `optimum.Root`.
      first, second: (candidate, theta, cut indices, rows, where blocks begin, blocks, reduced cost, bonus of each block, reduced cost of
        each) of the orders, see `cut_blocks`.
      leaves: of the first orders, see `leave_vectors`.
      groups: int64 [G, 4], orders of one head from, to, of the first and of the second.
      lasts: (candidate, reduced cost), by rising reduced cost; budget: of reduced costs.
      objective: (target, second), see `optimum.Problem`; floor: mIoU that is needed; limits: float64 [R].
      best: float64 [CHUNKS, 2], value and tie-breaker to beat, smaller is better.
      found: int64 [CHUNKS, 5], places of the two orders, indices of their cuts, last candidate.
      tally: int64 [CHUNKS, 2], configurations scored and failed by limit.
      rooms: see `make_rooms`.
    """
    exit_of, (kind, prefix, head, decision) = problem[3], resources
    w, constant = plane
    of_candidate, of_last, doubt, rounding = terms
    worth, passing_less, choosing_less, onward, tops, joint_constant = joint
    needed, bounds = floor, limits.copy()
    images, depth = w.shape[1], doubt.size
    gain, ending = depth, depth + 2  # columns of `passes` and `bands`: the worth at k2; from where on the last candidates count
    arrival, head_least = np.empty((kind.size, 3)), np.empty(kind.size)
    for r in range(kind.size):
        head_least[r] = head[r][lasts[0]].min()
    joint_passes, joint_bands, sums, totals = rooms[0][chunk], rooms[1][chunk], rooms[2][chunk], rooms[3][chunk]
    joint_ends, passes, bands, opens = rooms[4][chunk, 0], rooms[5][chunk], rooms[6][chunk], rooms[7][chunk]
    passing, band = rooms[8][chunk], rooms[9][chunk]
    open_, ends, in_band = rooms[10][chunk], rooms[11][chunk, 0], rooms[12][chunk, 0]
    leave, middle, spread = rooms[13][chunk, 0], rooms[13][chunk, 1], rooms[13][chunk, 2]
    leaving, hopeful = np.empty(BLOCKS), np.empty((BLOCKS, BLOCKS), np.bool_)
    chain, counts = np.empty(3, np.int64), np.empty(3, np.int64)
    k2 = -1  # that `passes` and `opens` are of
    for group in range(chunk, groups.shape[0], CHUNKS):
        low1, high1, low2, high2 = groups[group]
        if second[0][low2] != k2:
            k2 = second[0][low2]
            pass_vectors(w, (of_candidate, of_last), k2, lasts[0], passes, opens)
        k1, prepared = first[0][low1], False
        chain[0], chain[1] = k1, k2
        arrival[:, 0] = prefix[:, exit_of[k1]] + head[:, k1] + decision[:, k1]
        arrival[:, 1] = prefix[:, exit_of[k2]] - prefix[:, exit_of[k1]] + arrival[:, 0] + head[:, k2] + decision[:, k2]
        arrival[:, 2] = prefix[:, exit_of[lasts[0][0]]] - prefix[:, exit_of[k2]] + arrival[:, 1]
        # What passing a decision subtracts is given to all images, and back to those that leave there or before.
        back1, back2 = passing_less[k1] + passing_less[k2], passing_less[k2]
        joint_vectors(onward, worth[k1] + back1, worth[k2] + back2, joint_passes, joint_bands)
        both = joint_constant - images * back1 - choosing_less[k1] - choosing_less[k2]
        for n2 in range(low2, high2):
            row2, begin2, blocks2 = second[3][n2], second[4][n2], second[5][n2]
            end2 = 2 * blocks2
            for n1 in range(low1, high1):
                left = budget - first[6][n1] - second[6][n2]
                if left < lasts[1][0]:
                    continue
                row1, begin1, blocks1, ranked = first[3][n1], first[4][n1], first[5][n1], order[k1, first[1][n1]]
                for block1 in range(blocks1):
                    leaving[block1] = both + leaves[n1, block1, depth + 1] + leaves[n1, block1, depth + 2] * back1
                lowest1, alone = joint_bound(
                    *(joint_passes, joint_bands, tops, ranked, leaving),
                    *((row1, blocks1, first[7][n1], first[8][n1]), (row2, blocks2, second[7][n2], second[8][n2])),
                    *((kind, arrival, head_least, bounds), budget - lasts[1][0], needed, hopeful, sums, totals, joint_ends, counts),
                )
                lanes = np.searchsorted(lasts[1], min(left, alone - needed), "right")
                if lowest1 == blocks1 or lanes == 0:
                    continue
                if not prepared:
                    prepared = True
                    band_vectors(w, (of_candidate, of_last), k1, k2, passes, bands)
                width = ending + depth + lanes
                passing[: end2 + 1, :width] = 0
                open_[:, : depth + lanes] = 0
                rank = images
                for block1 in range(blocks1, lowest1 - 1, -1):
                    lowest = 0
                    while lowest < blocks2 and not (block1 < blocks1 and hopeful[block1, lowest]):
                        lowest += 1
                    before = rank
                    if lowest < blocks2:
                        band[: end2 + 1, :width] = 0
                    while rank > 0 and row1[ranked[rank - 1]] > 2 * block1:
                        rank -= 1
                        i = ranked[rank]
                        add(passing[row2[i], :width], passes[i])
                        if lowest < blocks2:
                            add(band[row2[i], :width], bands[i])
                        if row2[i] % 2:
                            add(open_[row2[i] // 2, : depth + lanes], opens[i])
                    if lowest < blocks2:
                        in_band[:] = 0
                        for column in range(end2 + 1):
                            add(in_band[:depth], band[column, ending:])
                            add(in_band[depth:], band[column])
                        ends[: depth + lanes] = passing[end2, ending:width]
                        add(ends[:depth], in_band)
                        add(ends[depth : depth + lanes], band[end2, ending + depth :])
                        for c in range(depth):
                            leave[c] = leaves[n1, block1, c]
                        sure = constant + leaves[n1, block1, depth]
                        counts[0], counts[2] = before, passing[end2, gain + 1] - band[end2, gain + 1]
                        for column in range(end2 - 1):
                            add(leave, passing[column])
                            sure += passing[column, gain] + band[column, gain]
                        for block2 in range(blocks2 - 1, lowest - 1, -1):
                            column = 2 * block2 + 1
                            counts[1] = images - counts[0] - counts[2]
                            if hopeful[block1, block2]:
                                for c in range(depth):
                                    middle[c] = ends[c] + leave[c] + HALF * (passing[column, ending + c] + passing[column, c])
                                    spread[c] = open_[block2, c] + in_band[depth + c] + rounding[c]
                                upper = sure + band[column, gain]
                                bonus = squares(middle, spread, doubt)
                                if upper + largest_sum(ends[depth : depth + lanes], open_[block2, depth:]) + bonus < needed:
                                    hopeful[block1, block2] = False
                            if hopeful[block1, block2]:
                                for q in range(lanes):
                                    chain[2], value = lasts[0][q], upper + ends[depth + q] + open_[block2, depth + q]
                                    if value + bonus < needed or not affordable(kind, arrival, head[:, chain[2]], bounds, counts):
                                        continue
                                    own = bonus_with(chain[2], middle, spread, of_candidate, of_last, ranked, rank, before, row2, column)
                                    if value + own >= needed:
                                        needed = look_into(
                                            *(problem, resources, plane, own, chain),
                                            (first[2][n1], begin1[block1], begin1[block1 + 1] - begin1[block1]),
                                            (second[2][n2], begin2[block2], begin2[block2 + 1] - begin2[block2]),
                                            *(objective, needed, bounds, (n1, n2), best, found, tally, chunk),
                                        )
                            # With the block before, two columns more go on, and one more may.
                            for here in range(column, column - 2, -1):
                                add(ends[: depth + lanes], passing[here, ending:])
                                add(ends[depth : depth + lanes], band[here, ending + depth :])
                                counts[2] += passing[here, gain + 1] - band[here, gain + 1]
                            for here in range(column - 1, max(column - 3, -1), -1):
                                subtract(leave, passing[here])
                                sure -= passing[here, gain] + band[here, gain]
                    # With the block before, the band passes for sure, and so do those that leave with every cut of this block.
                    while rank > 0 and row1[ranked[rank - 1]] == 2 * block1:
                        rank -= 1
                        i = ranked[rank]
                        add(passing[row2[i], :width], passes[i])
                        if row2[i] % 2:
                            add(open_[row2[i] // 2, : depth + lanes], opens[i])
