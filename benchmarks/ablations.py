"""The paper's claims about training, each with and without, over several seeds.

`python benchmarks/ablations.py --workdir W --recipe R [--data_dir D] [--seeds 3] [--set section.field=value ...]` trains five variants per
seed under W, goes on where it was stopped, and compares them seed by seed:
  exit dropout + PFD   stage 1 with round robin over the early exits, stage 2 with positive filtering distillation: the method
  plain backbone       stage 1 without early exits
  joint training       stage 1 with all early exits in every step
  CE only              stage 2 without distillation
  KD everywhere        stage 2 with distillation that is not filtered
The lines after the table, and the last line, one JSON object, hold the differences in percentage points of val mIoU, mean and standard
deviation over the seeds; a claim counts as reproduced if every seed says so.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import app, flags

BASE = "exit dropout + PFD"
STAGE1 = {"plain backbone": "stage1.exits=none", "joint training": "stage1.exits=all"}
STAGE2 = {"CE only": "stage2.distillation=none", "KD everywhere": "stage2.distillation=all"}
FINAL_TOLERANCE_PP = 0.5  # "no cost to the final exit": at most this much lower


def train(workdir: Path, seed: int, overrides: list[str]) -> None:
    """Trains both stages in a process of its own, from the last checkpoint if there is one."""
    command = [sys.executable, "-m", "mess_tf.train", f"--workdir={workdir}", f"--recipe={FLAGS.recipe}", f"--data_dir={FLAGS.data_dir}"]
    seeds = [f"stage1.seed={seed}", f"stage2.seed={seed}"]
    subprocess.run([*command, *(f"--set={override}" for override in [*FLAGS.set, *seeds, *overrides])], check=True)


def best_evaluation(workdir: Path, stage: str) -> dict[str, float]:
    """mIoU % of every candidate in the evaluation whose weights were kept."""
    lines = (workdir / "logs" / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [row["miou"] for row in map(json.loads, lines) if "miou" in row]
    best = max(evaluations, key=lambda miou: np.mean(list(miou.values())))
    return {name: 100 * value for name, value in best.items()}


def accuracy(workdir: Path) -> dict[str, float]:
    """mIoU % of each early exit's best head after stage 2, their mean as `early`, and that of the original network as `final`."""
    result: dict[str, float] = {}
    for name, value in best_evaluation(workdir, "stage2").items():
        exit_name = name.partition(".")[0]
        result[exit_name] = max(result.get(exit_name, 0.0), value)
    return result | {"early": float(np.mean(list(result.values()))), "final": best_evaluation(workdir, "stage1")["final.original"]}


def main(argv) -> None:
    del argv
    root = Path(FLAGS.workdir)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in (BASE, *STAGE1, *STAGE2)}
    for seed in range(FLAGS.seeds):
        folders = {name: root / f"seed{seed}" / name.replace(" ", "_") for name in runs}
        train(folders[BASE], seed, [])
        for name, override in STAGE1.items():
            train(folders[name], seed, [override])
        for name, override in STAGE2.items():
            for part in ("checkpoints", "logs"):
                shutil.copytree(folders[BASE] / part / "stage1", folders[name] / part / "stage1", dirs_exist_ok=True)
            train(folders[name], seed, [override])
        for name, folder in folders.items():
            runs[name].append(accuracy(folder))

    columns = list(runs[BASE][0])
    print(f"{'':<22}" + "".join(f"{column:>15}" for column in columns))
    for name, of_seed in runs.items():
        values = [[accuracies[column] for accuracies in of_seed] for column in columns]
        print(f"{name:<22}" + "".join(f"{np.mean(v):>9.2f} ±{np.std(v):>4.2f}" for v in values))

    figures: dict[str, object] = {"seeds": FLAGS.seeds}
    claims = [(f"exits_over_{name}", name, "early", 0.0) for name in (*STAGE1, *STAGE2)]
    claims += [(f"final_over_{name}", name, "final", -FINAL_TOLERANCE_PP) for name in STAGE1]
    for key, name, column, at_least in claims:
        differences = [ours[column] - theirs[column] for ours, theirs in zip(runs[BASE], runs[name], strict=True)]
        reproduced = all(difference > at_least for difference in differences)
        print(f"{key:<30}{np.mean(differences):>+8.2f} ± {np.std(differences):.2f} pp  {'reproduced' if reproduced else 'not reproduced'}")
        key = key.replace(" ", "_").lower()
        figures |= {f"{key}_pp": float(np.mean(differences)), f"{key}_std_pp": float(np.std(differences)), f"{key}_reproduced": reproduced}
    print(json.dumps(figures))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "folder of all runs", required=True)
    flags.DEFINE_string("recipe", "demo", "recipe of every run")
    flags.DEFINE_string("data_dir", "", "root of the data")
    flags.DEFINE_integer("seeds", 3, "number of seeds", lower_bound=1)
    flags.DEFINE_multi_string("set", [], "section.field=value for every run")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main)
