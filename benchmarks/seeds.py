"""One recipe from its first weights to a bundle, in one go, over several seeds: mean and spread.

`python benchmarks/seeds.py --workdir W --recipe R --data_dir D [--seeds 3] [--set section.field=value ...]` trains the original plainly
(`stage1.exits=none`, one stage) and runs `mess_tf.pipeline` for each seed under W, one after the other, and goes on where it was stopped.
The seed is that of weights, batches and augmentation. Then the search chooses, per seed, by multiply-accumulates, on all of val:
  no loss, -1 pp    the least that reach the mIoU of this seed's original, or one percentage point less: its speed-up
  equal cost        the best mIoU at no more than the original's: its gain
A seed whose search finds nothing for a row counts as 1 or 0 there: the original itself. The last line is one JSON object with the values
of each seed; printed before are mean and standard deviation.
"""

import json
import os
from pathlib import Path

import numpy as np
from absl import app, flags
from common import best_evaluation, most_accurate, run, searched

from mess_tf import metrics
from mess_tf.files import Stats
from mess_tf.network.model import FINAL

ROWS = {"no loss": 0.0, "-1 pp": 0.01}


def of_seed(folder: Path, seed: int) -> dict[str, float]:
    """Trains and converts with one seed; mIoU % by exit, and what the search makes of it."""
    seeds = [f"--set={section}.seed={seed}" for section in ("data", "stage1", "stage2")]
    common = [f"--recipe={FLAGS.recipe}", f"--data_dir={FLAGS.data_dir}", *(f"--set={each}" for each in FLAGS.set), *seeds]
    plain = ("--set=stage1.exits=none", "--set=stage1.distillation=none", "--stages=stage1")
    run("mess_tf.train", f"--workdir={folder / 'original'}", *common, *plain)
    work = folder / "work"
    run("mess_tf.pipeline", f"--workdir={work}", *common, "--max_drop_pp=1")
    stats = Stats.load(work / "stats.npz")
    original = best_evaluation(folder / "original", "stage1")[FINAL] / 100
    result = {"original, mIoU %": 100 * original}
    for choice in most_accurate(stats):
        name = f"{choice.exit}.{choice.head}"
        accuracy = metrics.miou(*(counts.sum(0) for counts in stats.counts(stats.candidates.index(name))))
        result[f"{choice.exit}, mIoU %"] = 100 * float(accuracy)
    for row, drop in ROWS.items():
        chosen = searched(work, folder / "chosen.json", f"--min_miou={original - drop}", "--decide=image")
        result[f"{row}, speed-up in MACs"] = chosen.original.cost / chosen.predicted.cost_mean if chosen else 1.0
    chosen = searched(work, folder / "chosen.json", "--cost_share=1", "--decide=image")
    result["equal cost, gain in pp"] = 100 * (chosen.predicted.miou - original) if chosen else 0.0
    return result


def main(argv) -> None:
    del argv
    runs = [of_seed(Path(FLAGS.workdir) / f"seed{seed}", seed) for seed in range(FLAGS.seeds)]
    for name in runs[0]:
        values = [each[name] for each in runs]
        print(f"{name:<28}{np.mean(values):>8.2f} ± {np.std(values):.2f}   ({', '.join(f'{value:.2f}' for value in values)})")
    print(json.dumps({"recipe": FLAGS.recipe, "seeds": FLAGS.seeds} | {name: [each[name] for each in runs] for name in runs[0]}))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "folder of all runs", required=True)
    flags.DEFINE_string("recipe", "photos_lite0", "recipe of every run")
    flags.DEFINE_string("data_dir", "", "root of the data")
    flags.DEFINE_integer("seeds", 3, "number of seeds", lower_bound=1)
    flags.DEFINE_multi_string("set", [], "section.field=value for every run")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main)
