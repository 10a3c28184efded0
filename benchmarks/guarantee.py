"""Is the risk that `search --max_risk` promises exceeded as rarely as promised? A simulation with the whole search.

`python benchmarks/guarantee.py [--sets=1000]`. From a population of 4,000 drawn images, every set of 200 calibration images is drawn anew,
with replacement; the search chooses a configuration on one half of the set and tests it on the other; then its risk is that of the whole
population. The last line is one JSON object, for each risk, and for `labels` over two precisions, of which the cheaper one loses some of
the right pixels everywhere:
  final_exceeded, labels_exceeded, precisions_exceeded: share of the sets whose configuration exceeds the promised risk; at most
    1 - confidence is promised.
  final_cost, labels_cost, precisions_cost: mean cost of the chosen configurations, relative to the original network; 1 where nothing could
    be shown.
"""

import dataclasses
import json

import numpy as np
from absl import app, flags
from paper_space import drawn_stats

from mess_tf.optimise import guarantee
from mess_tf.optimise.search import InfeasibleError, search_guaranteed
from mess_tf.optimise.space import macs_costs, mixture, original


def main(argv) -> None:
    del argv
    population = drawn_stats(exits=2, heads=2, images=4000, classes=5, thetas=3)
    rng = np.random.default_rng(0)
    cheaper = {name: (0.6 * getattr(population, name)).astype(np.int64) for name in ("prefix_macs", "head_macs")}
    worse = dataclasses.replace(population, tp=rng.binomial(population.tp, 0.98).astype(np.int32), **cheaper)
    start = original(population, macs_costs(population)).cost
    figures = {}
    for name, risk, max_risk, precisions in (
        ("final", "final", FLAGS.max_final_risk, [population]),
        ("labels", "labels", FLAGS.max_labels_risk, [population]),
        ("precisions", "labels", FLAGS.max_labels_risk, [population, worse]),
    ):
        exceeded, share = [], []
        for number in range(1, FLAGS.sets + 1):
            images = rng.integers(0, len(population.images), FLAGS.images)
            drawn = [guarantee.select(each, images) for each in precisions]
            choices, promise = [(each, macs_costs(each)) for each in drawn], (max_risk, FLAGS.confidence, risk, 0.5)
            try:
                which, chosen = search_guaranteed(choices, drawn[0], start, *promise, max_early_exits=1)
            except InfeasibleError:
                exceeded.append(False)
                share.append(1.0)
            else:
                here = precisions[which]
                losses = guarantee.image_losses(here, mixture(here, macs_costs(here), chosen), risk, population)
                exceeded.append(losses.mean() > max_risk)
                share.append(chosen.predicted.cost_mean / start)
            if number % 50 == 0:
                print(f"{name}: {number} sets, {sum(exceeded)} exceed {max_risk:g}; cost {np.mean(share):.3f}x", flush=True)
        figures |= {f"{name}_exceeded": float(np.mean(exceeded)), f"{name}_cost": float(np.mean(share))}
    print(json.dumps(figures))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_integer("sets", 1000, "calibration sets", lower_bound=1)
    flags.DEFINE_integer("images", 200, "images of a calibration set", lower_bound=2)
    flags.DEFINE_float("confidence", 0.95, "of the promise")
    flags.DEFINE_float("max_final_risk", 0.12, "largest share of pixels that may differ from the original's")
    flags.DEFINE_float("max_labels_risk", 0.08, "largest pixel accuracy that may be lost")
    app.run(main)
