"""The exact search against Optuna (TPE) and pymoo (NSGA-II): the same statistics, the same question, the same time.

`pip install -r benchmarks/requirements.txt`, then `python benchmarks/search_vs_peers.py [--seeds=3]`. In one process: the best mIoU at
`--cost_share` of the original's MACs in a space of the paper's size (5 exit points × 80 heads × 10 theta_pix, 500 images × 21 classes,
up to `--max_early_exits`, every theta_img that changes a decision; drawn statistics). Then each of the others searches that space, for as
long as the exact search took, once per seed; compiling is not counted. The others choose a chain of exits, and at each of its positions a
head, a theta_pix and how many images leave. The last line is one JSON object:
  tpe_shortfall, nsga2_shortfall: share of our mIoU that the best configuration found lacks, median of the seeds; _range: least and largest.
  tpe_reached, nsga2_reached: seeds that found our optimum.
  tpe_scored, nsga2_scored: configurations scored, median; seconds: of each search; gap: of ours, 0 if it is the optimum.
"""

import itertools
import json
import sys
import time

import numpy as np
from absl import app, flags
from paper_space import drawn_stats

from mess_tf.files import Stats
from mess_tf.optimise.search import resolve_objective, search
from mess_tf.optimise.space import Costs, macs_costs, original

try:
    import optuna
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import ElementwiseProblem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize
except ModuleNotFoundError as error:
    sys.exit(f"search_vs_peers: needs {error.name}; pip install -r benchmarks/requirements.txt")


class Space:
    """The space as whole numbers: a chain of exits, plain or edge-aware, then head, theta_pix and images that leave at each position."""

    def __init__(self, stats: Stats, costs: Costs, max_early_exits: int, limit: float):
        self.costs, self.limit, self.most = costs, limit, max_early_exits
        dense = [stats.counts(k)[:2] for k in range(len(stats.candidates))]
        self.tp, self.fp = (np.array([each[which] for each in dense], np.float64) for which in (0, 1))
        self.labelled = stats.labelled_of_class.astype(np.float64)
        self.exit_of = stats.exit_of_candidate
        self.first = np.searchsorted(self.exit_of, np.arange(len(stats.exits) + 1))
        self.shares = stats.confident / stats.pixels[:, None, None]
        exits, images = len(stats.exits), len(stats.images)
        self.chains = [chain for m in range(1, max_early_exits + 2) for chain in itertools.combinations(range(exits), m)]
        heads, thetas = int(np.diff(self.first).max()), stats.theta_pix.size
        self.names = ["chain", "edge_aware"] + [f"{what}{p}" for p in range(self.most + 1) for what in ("head", "theta", "leave")]
        self.upper = np.array([len(self.chains) - 1, 1, *([heads - 1, thetas - 1, images - 1] * (self.most + 1))])
        self.scored, self.best = 0, 0.0

    def score(self, numbers: np.ndarray) -> tuple[float, float]:
        """mIoU and mean cost of a configuration, and remembers the best that keeps the limit."""
        chain, edge_aware = self.chains[numbers[0]], numbers[1]
        images = np.arange(self.tp.shape[1])
        who, cost, spent = np.full(images.size, -1), np.zeros(images.size), 0.0
        for p, e in enumerate(chain):
            head, theta, leave = numbers[2 + 3 * p : 5 + 3 * p]
            k = self.first[e] + head % (self.first[e + 1] - self.first[e])
            leaving = who < 0
            spent += self.costs.head[k]
            if p < len(chain) - 1:
                spent += self.costs.decision[k, edge_aware]
                shares = self.shares[k, :, theta, edge_aware]
                leaving &= shares >= np.partition(shares, images.size - 1 - leave)[images.size - 1 - leave]
            who[leaving] = k
            cost[leaving] = self.costs.prefix[e] + spent
        tp, fp = self.tp[who, images].sum(0), self.fp[who, images].sum(0)
        present = self.labelled > 0
        miou, mean = float((tp / (self.labelled + fp))[present].mean()), float(cost.mean())
        self.scored += 1
        if mean <= self.limit:
            self.best = max(self.best, miou)
        return miou, mean


def tpe(space: Space, seconds: float, seed: int) -> None:
    """Optuna's tree-structured Parzen estimator, with the limit as a constraint."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def objective(trial: optuna.Trial) -> float:
        numbers = [trial.suggest_int(name, 0, int(upper)) for name, upper in zip(space.names, space.upper, strict=True)]
        miou, cost = space.score(np.array(numbers))
        trial.set_constraint("cost", cost / space.limit - 1)
        return miou

    sampler = optuna.samplers.TPESampler(seed=seed)
    optuna.create_study(direction="maximize", sampler=sampler).optimize(objective, timeout=seconds)


def nsga2(space: Space, seconds: float, seed: int) -> None:
    """pymoo's NSGA-II on mIoU and cost, with the limit as a constraint."""

    class Problem(ElementwiseProblem):
        def __init__(self):
            super().__init__(n_var=space.upper.size, n_obj=2, n_ieq_constr=1, xl=0 * space.upper, xu=space.upper, vtype=int)

        def _evaluate(self, x, out, *args, **kwargs):
            miou, cost = space.score(x)
            out["F"], out["G"] = [-miou, cost / space.limit], [cost / space.limit - 1]

    crossover = SBX(vtype=float, repair=RoundingRepair())
    mutation = PM(vtype=float, repair=RoundingRepair())
    algorithm = NSGA2(pop_size=100, sampling=IntegerRandomSampling(), crossover=crossover, mutation=mutation, eliminate_duplicates=True)
    minimize(Problem(), algorithm, ("time", seconds), seed=seed)


def main(argv) -> None:
    del argv
    stats = drawn_stats()
    costs = macs_costs(stats)
    objective = resolve_objective(original(stats, costs), costs, "input-dependent", cost_share=FLAGS.cost_share)
    small = drawn_stats(heads=2, images=20)
    search(small, macs_costs(small), objective, max_early_exits=FLAGS.max_early_exits)  # compiles, or loads what is compiled
    start = time.perf_counter()
    ours = search(stats, costs, objective, max_early_exits=FLAGS.max_early_exits, time_limit=FLAGS.time_limit)
    seconds = time.perf_counter() - start
    print(f"ours: mIoU {100 * ours.predicted.miou:.3f} in {seconds:.1f} s, gap {100 * ours.certificate.gap:.3f} pp")
    figures = {"seconds": seconds, "gap": ours.certificate.gap}
    for name, peer in (("tpe", tpe), ("nsga2", nsga2)):
        spaces = []
        for seed in range(FLAGS.seeds):
            spaces.append(Space(stats, costs, FLAGS.max_early_exits, objective.limits[costs.name]))
            peer(spaces[-1], seconds, seed)
            print(f"{name}, seed {seed}: mIoU {100 * spaces[-1].best:.3f}, {spaces[-1].scored} scored", flush=True)
        shortfalls = np.array([1 - space.best / ours.predicted.miou for space in spaces])
        figures |= {
            f"{name}_shortfall": float(np.median(shortfalls)),
            f"{name}_shortfall_range": [float(shortfalls.min()), float(shortfalls.max())],
            f"{name}_reached": int((shortfalls <= 1e-9).sum()),
            f"{name}_scored": float(np.median([space.scored for space in spaces])),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_integer("seeds", 3, "runs of each of the others", lower_bound=1)
    flags.DEFINE_integer("max_early_exits", 2, "largest number of exits in front of the last one", lower_bound=0)
    flags.DEFINE_float("cost_share", 0.6, "of the original's MACs")
    flags.DEFINE_float("time_limit", 600.0, "seconds for the exact search")
    app.run(main)
