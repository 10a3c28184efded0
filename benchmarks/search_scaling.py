"""How long the search takes on spaces of the paper's size, and what its certificates say.

`python benchmarks/search_scaling.py [--rows=1_exit --rows=2_exits_grid ...]`. Needs no network: the statistics are drawn, 5 exit points ×
80 heads × 10 theta_pix, 500 images × 21 classes, unless a row says otherwise. Every row asks for the best mIoU at `--cost_share` of the
original's MACs; compiling the kernels, which happens once per installation, is not counted. `grid`: theta_img on 100 quantiles wherever
several early exits decide; `full`: on every value that changes a decision. The last line is one JSON object, of the rows that ran:
  seconds_1_exit, seconds_2_exits_grid, seconds_2_exits_full, seconds_5_exits: of the search, with up to so many early exits (5: grid).
  gap_pp_5_exits: between the result with up to 5 early exits and its proven bound, in percentage points of mIoU; 0 is the optimum.
  grid_loss_pp: how far the optimum of the 100 quantiles is below the full one, with up to two early exits.
  peak_gib: largest memory of the process.
"""

import dataclasses
import json
import resource

from absl import app, flags
from paper_space import drawn_stats

from mess_tf.files import Deployment
from mess_tf.optimise.search import resolve_objective, search
from mess_tf.optimise.space import macs_costs, original

GRID = 100


@dataclasses.dataclass(frozen=True)
class Row:
    """One search: most early exits, values of theta_img (None for all), and the size of the space."""

    early_exits: int
    quantiles: int | None
    heads: int = 80
    images: int = 500


ROWS = {
    "1_exit": Row(1, None),
    "2_exits_grid": Row(2, GRID),
    "2_exits_full": Row(2, None),
    "5_exits": Row(5, GRID),
    "3_exits": Row(3, GRID),
    "4_exits": Row(4, GRID),
    "125_images": Row(2, GRID, images=125),
    "250_images": Row(2, GRID, images=250),
    "1000_images": Row(2, GRID, images=1000),
    "20_heads": Row(2, GRID, heads=20),
    "40_heads": Row(2, GRID, heads=40),
    "120_heads": Row(2, GRID, heads=120),
}


def run(row: Row, time_limit: float) -> Deployment:
    """Searches the space of a row."""
    stats = drawn_stats(heads=row.heads, images=row.images)
    costs = macs_costs(stats)
    objective = resolve_objective(original(stats, costs), costs, "input-dependent", cost_share=FLAGS.cost_share)
    return search(stats, costs, objective, max_early_exits=row.early_exits, quantiles=row.quantiles, time_limit=time_limit)


def main(argv) -> None:
    del argv
    run(Row(2, 10, heads=2, images=20), 60.0)  # compiles, or loads what is compiled
    results = {}
    print(f"{'row':<14}{'seconds':>8}{'mIoU %':>8}{'gap pp':>8}{'covered':>10}{'scored':>10}{'open':>10}  cut")
    for name in FLAGS.rows:
        results[name] = deployment = run(ROWS[name], FLAGS.time_limit)
        proof = deployment.certificate
        cut = ", ".join(f"{count:.3g} by {rule}" for rule, count in proof.cut_by_rule.items() if count)
        print(
            f"{name:<14}{proof.seconds:>8.1f}{100 * deployment.predicted.miou:>8.3f}{100 * proof.gap:>8.3f}{proof.covered:>10.3g}"
            f"{proof.scored:>10.3g}{proof.open:>10.3g}  {cut}",
            flush=True,
        )
    named = ("1_exit", "2_exits_grid", "2_exits_full", "5_exits")
    figures = {f"seconds_{name}": results[name].certificate.seconds for name in named if name in results}
    if "5_exits" in results:
        figures["gap_pp_5_exits"] = 100 * results["5_exits"].certificate.gap
    if {"2_exits_grid", "2_exits_full"} <= results.keys():
        figures["grid_loss_pp"] = 100 * (results["2_exits_full"].predicted.miou - results["2_exits_grid"].predicted.miou)
    print(json.dumps(figures | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_multi_enum("rows", list(ROWS), ROWS, "which rows to run")
    flags.DEFINE_float("cost_share", 0.6, "of the original's MACs")
    flags.DEFINE_float("time_limit", 540.0, "seconds for each row, after which the best found is taken, with a proven bound")
    app.run(main)
