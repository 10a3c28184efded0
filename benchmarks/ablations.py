"""The paper's claims, each with and without, over several seeds.

`python benchmarks/ablations.py --workdir W [--recipe R] [--data_dir D] [--seeds 3] [--set section.field=value ...]` trains six variants per
seed under W, one after the other, and goes on where it was stopped:
  exit dropout + PFD   stage 1 with round robin over the early exits, stage 2 with positive filtering distillation: the method
  plain backbone       stage 1 without early exits
  joint training       stage 1 with all early exits in every step
  CE only              stage 2 without distillation, on the method's stage 1
  KD everywhere        stage 2 with distillation that is not filtered, on the method's stage 1
  fewer exits          the method with `--fewer` exits, the final one included

Claims on training compare val mIoU: of each early exit's best head, as a mean over the exits, and of the final exit. Claims on deployment
compare the mIoU of what `mess_tf.search` chooses at `--cost_shares` of the original's MACs (input-dependent, one early exit), as a mean
over them: chosen on every second val image and scored on the others, and the other way round. The method's candidates and confidences
are narrowed for that: one kind of confidence, one early exit, one value of a head's knob. What cannot be as cheap as every share is left
out.

A line per claim: difference in percentage points, mean and standard deviation over the seeds; reproduced if it is above 0 for every seed
(above -0.5 where the claim is that nothing is lost). The schedule is printed first. The last line is one JSON object.

On CamVid, two hours on 2 busy cores: `--recipe camvid_lite0 --data_dir CAMVID --set data.input_size=[180,240]
--set data.crop_size=[144,192] --set backbone.weights=FILE --set exits.layers=[] --set exits.count=5 --fewer 3 --set stage1.epochs=6
--set stage1.eval_epochs=6 --set stage2.epochs=3 --set stage2.eval_epochs=3`.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import app, flags
from common import best_evaluation, run, searched

from mess_runtime.bundle import check
from mess_tf import configs
from mess_tf.configs import HeadSpec
from mess_tf.files import Stats
from mess_tf.optimise import guarantee
from mess_tf.optimise.space import evaluate_configuration, macs_costs

BASE, FEWER = "exit dropout + PFD", "fewer exits"
STAGE1 = {"plain backbone": "stage1.exits=none", "joint training": "stage1.exits=all"}
STAGE2 = {"CE only": "stage2.distillation=none", "KD everywhere": "stage2.distillation=all"}
FINAL_TOLERANCE_PP = 0.5  # "no cost to the final exit": at most this much lower
# A knob's plain value, and the heads that have it.
KNOBS: dict[str, Callable[[HeadSpec], bool]] = {
    "FCN only": lambda head: head.kind == "fcn",
    "no channel reduction": lambda head: head.reduction == 1,
    "no extra blocks": lambda head: head.blocks == 0,
    "no dilation": lambda head: head.dilation == 1,
}

Accuracies = dict[str, float]


# === Training ===


def train(workdir: Path, seed: int, overrides: list[str]) -> None:
    """Trains both stages, from the last checkpoint if there is one."""
    seeds = [f"stage1.seed={seed}", f"stage2.seed={seed}"]
    words = [f"--set={override}" for override in [*FLAGS.set, *seeds, *overrides]]
    run("mess_tf.train", f"--workdir={workdir}", f"--recipe={FLAGS.recipe}", f"--data_dir={FLAGS.data_dir}", *words)


def accuracy(workdir: Path) -> Accuracies:
    """mIoU % of each early exit's best head after stage 2, their mean as `early`, and that of the original network as `final`."""
    result: Accuracies = {}
    for name, value in best_evaluation(workdir, "stage2").items():
        exit_name = name.partition(".")[0]
        result[exit_name] = max(result.get(exit_name, 0.0), value)
    return result | {"early": float(np.mean(list(result.values()))), "final": best_evaluation(workdir, "stage1")["final.original"]}


# === Deployment ===


CONSTANT = ("images", "classes", "pixels", "theta_pix", "image_of_pair", "class_of_pair", "labelled")  # whatever the candidates


def narrowed(stats: Stats, keep: np.ndarray) -> Stats:
    """Statistics of some candidates (bool [K], the last one among them); their exits are numbered anew."""
    exits = np.unique(stats.exit_of_candidate[keep])
    renamed = {stats.exits[old]: stats.exits[new] for new, old in enumerate(exits[:-1])} | {"final": "final"}
    values = {}
    for field in dataclasses.fields(Stats):
        value = getattr(stats, field.name)
        if field.name.startswith("prefix_"):
            rows = exits
        elif isinstance(value, str) or field.name in CONSTANT:
            continue
        else:
            rows = np.flatnonzero(keep)
        values[field.name] = tuple(value[row] for row in rows) if isinstance(value, tuple) else value[rows]
    names = [name.partition(".") for name in values["candidates"]]
    values["candidates"] = tuple(f"{renamed[exit_name]}.{head}" for exit_name, _, head in names)
    return dataclasses.replace(stats, **values)


def one_confidence(stats: Stats, edge_aware: bool) -> Stats:
    """Statistics in which both confidences are the plain or the edge-aware one."""
    return dataclasses.replace(stats, confident=np.repeat(stats.confident[..., int(edge_aware), None], 2, axis=3))


def deployed(stats: Stats, folder: Path) -> float | None:
    """Mean mIoU % over the cost shares and both halves of the images, each scored on the other half; None if a share is out of reach."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = []
    halves = [guarantee.select(stats, np.arange(start, len(stats.images), 2)) for start in (0, 1)]
    for seen, unseen in (halves, reversed(halves)):
        seen.save(folder / "stats.npz")
        for share in FLAGS.cost_shares:
            chosen = searched(folder, folder / "deployment.json", f"--cost_share={share}", "--max_early_exits=1")
            if chosen is None:
                return None
            scores.append(100 * evaluate_configuration(unseen, macs_costs(unseen), chosen)[0])
    return float(np.mean(scores))


def deployment_accuracies(workdir: Path, fewer: Path) -> Accuracies:
    """What the search makes of the method, of its narrowed forms, and of fewer exits: mIoU % by name."""
    all_stats = []
    for folder in (workdir, fewer):
        if not (folder / "stats.npz").exists():
            run("mess_tf.calibrate", f"--workdir={folder}")
        all_stats.append(Stats.load(folder / "stats.npz"))
    stats, of_fewer = all_stats
    final = stats.exit_of_candidate == len(stats.exits) - 1
    heads = [HeadSpec() if last else HeadSpec.parse(name.partition(".")[2]) for name, last in zip(stats.candidates, final, strict=True)]
    ways = {"method": stats, FEWER: of_fewer, "plain confidence": one_confidence(stats, False), "edge-aware": one_confidence(stats, True)}
    ways |= {f"{name} only": narrowed(stats, final | (stats.exit_of_candidate == k)) for k, name in enumerate(stats.exits[:-1])}
    for name, has in KNOBS.items():
        keep = final | np.array([has(head) for head in heads])
        if not keep.all() and set(stats.exit_of_candidate[keep]) == set(stats.exit_of_candidate):
            ways[name] = narrowed(stats, keep)
    scores = {name: deployed(each, workdir / "search") for name, each in ways.items()}
    scores = {name: score for name, score in scores.items() if score is not None}
    fixed = [scores[name] for name in (f"{exit_name} only" for exit_name in stats.exits[:-1]) if name in scores]
    check({"method", FEWER} <= scores.keys() and bool(fixed), "cost_shares", "within the reach of an early exit", FLAGS.cost_shares)
    return scores | {"one exit for all": max(fixed)}


# === Command ===


def claims(training: dict[str, Accuracies], deployment: Accuracies) -> dict[str, tuple[float, float]]:
    """Difference in percentage points of each claim, and what it must exceed."""
    early = {name: training[BASE]["early"] - training[name]["early"] for name in (*STAGE1, *STAGE2)}
    result = {
        "early exits: exit dropout over plain backbone": (early["plain backbone"], 0.0),
        "early exits: exit dropout over joint training": (early["joint training"], 0.0),
    }
    for name in STAGE1:
        result[f"final exit: exit dropout loses nothing to {name}"] = (
            training[BASE]["final"] - training[name]["final"],
            -FINAL_TOLERANCE_PP,
        )
    result |= {f"early exits: PFD over {name}": (early[name], 0.0) for name in STAGE2}
    result["deployed: edge-aware over plain confidence"] = (deployment["edge-aware"] - deployment["plain confidence"], 0.0)
    result["deployed: more exits over fewer"] = (deployment["method"] - deployment[FEWER], 0.0)
    result["deployed: searched placement over the best fixed exit"] = (deployment["method"] - deployment["one exit for all"], 0.0)
    for name in (name for name in KNOBS if name in deployment):
        result[f"deployed: all heads over {name}"] = (deployment["method"] - deployment[name], 0.0)
    return result


def main(argv) -> None:
    del argv
    root = Path(FLAGS.workdir)
    config = configs.apply_overrides(configs.RECIPES[FLAGS.recipe], FLAGS.set)
    schedule = {
        "source": config.data.source,
        "input_size": config.data.input_size,
        "backbone": config.backbone.name,
        "exits": len(config.exits.layers) + 1 if config.exits.layers else config.exits.count,
        "fewer_exits": FLAGS.fewer,
        "heads": len(config.exits.head_specs),
        "stage1_epochs": config.stage1.epochs,
        "stage2_epochs": config.stage2.epochs,
        "batch_size": config.stage1.batch_size,
        "seeds": FLAGS.seeds,
        "cost_shares": FLAGS.cost_shares,
    }
    print("schedule: " + ", ".join(f"{key} {value}" for key, value in schedule.items()), flush=True)
    training: dict[str, list[Accuracies]] = {name: [] for name in (BASE, *STAGE1, *STAGE2)}
    deployment: list[Accuracies] = []
    for seed in range(FLAGS.seeds):
        folders = {name: root / f"seed{seed}" / name.replace(" ", "_") for name in (*training, FEWER)}
        train(folders[BASE], seed, [])
        for name, override in STAGE1.items():
            train(folders[name], seed, [override])
        for name, override in STAGE2.items():
            for part in ("checkpoints", "logs"):
                if not (folders[name] / part / "stage2").exists():
                    shutil.copytree(folders[BASE] / part / "stage1", folders[name] / part / "stage1", dirs_exist_ok=True)
            train(folders[name], seed, [override])
        train(folders[FEWER], seed, ["exits.layers=[]", f"exits.count={FLAGS.fewer}"])
        for name, of_seed in training.items():
            of_seed.append(accuracy(folders[name]))
        deployment.append(deployment_accuracies(folders[BASE], folders[FEWER]))

    def line(name: str, values: list[float]) -> str:
        return f"{name:<60}{np.mean(values):>8.2f} ± {np.std(values):.2f}"

    for name, of_seed in training.items():
        for column in of_seed[0]:
            print(line(f"{name}: {column}, mIoU %", [accuracies[column] for accuracies in of_seed]))
    for name in deployment[0]:
        print(line(f"deployed, {name}: mIoU %", [accuracies[name] for accuracies in deployment]))

    by_seed = [claims({name: runs[seed] for name, runs in training.items()}, deployment[seed]) for seed in range(FLAGS.seeds)]
    figures = []
    for claim, (_, above) in by_seed[0].items():
        differences = [each[claim][0] for each in by_seed]
        reproduced = all(difference > above for difference in differences)
        print(line(claim, differences) + f" pp  {'reproduced' if reproduced else 'not reproduced'}")
        figures.append({"claim": claim, "pp": np.mean(differences), "std_pp": np.std(differences), "reproduced": reproduced})
    print(json.dumps({"schedule": schedule, "claims": figures}))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "folder of all runs", required=True)
    flags.DEFINE_string("recipe", "demo", "recipe of every run")
    flags.DEFINE_string("data_dir", "", "root of the data")
    flags.DEFINE_integer("seeds", 3, "number of seeds", lower_bound=1)
    flags.DEFINE_integer("fewer", 3, "exits of the variant with fewer, the final one included", lower_bound=2)
    flags.DEFINE_multi_float("cost_shares", [0.5, 0.65, 0.8], "of the original's MACs, for what is deployed")
    flags.DEFINE_multi_string("set", [], "section.field=value for every run")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main)
