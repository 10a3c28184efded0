"""The best chain of exits where each result stands until the next one is there."""

import math

import numpy as np

from mess_runtime import terminal
from mess_tf.optimise import kernels
from mess_tf.optimise.problem import Problem, Proof


def best_anytime(problem: Problem, max_early_exits: int, horizon: float, deadline: float) -> tuple[list[int] | None, Proof]:
    """The best chain of candidates that run one after another: mIoU is its mean over all deadlines up to the horizon.

    Args:
      problem: the first resource is the time; a single root, whose decisions cost nothing here.
      max_early_exits: largest number of candidates in front of the last.
      horizon: latest deadline.
      deadline: of the search, of kernels.clock().
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
    with terminal.Bar("search", candidates, "candidate", most_s=deadline - kernels.clock()) as bar:
        for first in range(candidates):
            bar.reach(first)
            whole = 1 + int(extensions[problem.exit_of[first], most])
            proof.covered += whole
            if kernels.clock() > deadline:
                proof.open += whole
                continue
            scored, cut = kernels.anytime(
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
