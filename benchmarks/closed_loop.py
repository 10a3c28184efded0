"""The closed loop on real images: what the search predicts of a deployment, what its bundle does, and its speed-up over the original.

`python benchmarks/closed_loop.py --workdir W [--data_dir D] --split val [--max_drop_pp 0,0.5,1,2]`, after training,
`export_tflite --candidates` and `calibrate`.

In one process: times every candidate submodel, searches for each target the least mean latency within `max_drop_pp` of the original's mIoU,
exports those bundles and, the same way, the original and the most accurate head of each exit into WORKDIR/closed_loop, then runs all over
all images of the split, in turn for every ten images, and times the submodels of what was chosen in the same turns. The last line is one
JSON object, with these keys (for several targets, a list of such objects as `targets`, and the largest `latency_error`, `search_error` and
`miou_error_pp`), and of each exit alone, as `exits_alone`, `candidate`, `miou`, `ms` and the `share` of the original's latency:
  max_drop_pp: the target; exits: what was chosen.
  speedup: mean latency of the original over that of the bundle; speedup_interval: 95 % bootstrap interval over the images.
  miou_drop_pp: mIoU of the original less that of the bundle, in percentage points, both from the masks returned.
  predicted_ms, bundle_ms, original_ms; predicted_miou, bundle_miou, original_miou: means over the images, and mIoU (0..1).
    predicted_ms is made of latencies taken in turn with the bundle's: it shows whether they add up. searched_ms is what the search
    promised, of latencies taken minutes before: the machine's drift between the two is in it.
  latency_error, search_error: |predicted - measured| / measured mean latency of the bundle, of these two; miou_error_pp: the same
    difference for its mIoU.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from common import most_accurate
from headline import BLOCK

from mess_runtime.benchmark import LatencyRow, benchmark_files
from mess_runtime.bundle import ALONE, ANYTIME, BUDGETED, Bundle, InputSpec
from mess_runtime.runner import Result, Runner
from mess_tf import configs, metrics
from mess_tf.data.examples import Examples
from mess_tf.data.sources import open_split
from mess_tf.files import CANDIDATES, Configuration, Deployment, Stats
from mess_tf.graph.exporter import Exporter
from mess_tf.network.model import FINAL, load_network
from mess_tf.optimise.search import resolve_objective, search
from mess_tf.optimise.space import latency_costs, original, predict
from mess_tf.search import table


def submodels(deployments: Sequence[Deployment], folder: Path) -> list[Path]:
    """The candidate submodels that the predicted latencies of some deployments are made of."""
    heads = {f"head.{choice.exit}.{choice.head}" for deployment in deployments for choice in deployment.exits} | {f"head.{FINAL}"}
    return [path for path in sorted(folder.glob("*.tflite")) if not path.name.startswith("head.") or path.stem in heads]


def run_all(
    sides: Sequence[Callable[[np.ndarray], Result]], parts: Sequence[Path], examples: Examples, threads: int, rounds: int
) -> tuple[np.ndarray, list[float], list[list[str]], list[LatencyRow]]:
    """Runs networks over a split, in blocks of images, in random order per block: each as on a device that runs nothing else.

    Returns:
      Latencies in ms [sides, images] (the median of the rounds); of each side, mIoU and the exit of each image; of each submodel in
      `parts` the latency over all blocks.
    """
    classes = examples.info.num_classes
    latency = np.zeros((rounds, len(sides), len(examples)))
    confusion = np.zeros((len(sides), classes, classes), np.int64)
    exits, timed = [[] for _ in sides], []
    order = np.random.default_rng(0)
    for start in range(0, len(examples), BLOCK):
        block = [(i, *examples.load(i)) for i in range(start, min(start + BLOCK, len(examples)))]
        for turn in range(rounds):
            for side in order.permutation(len(sides)).tolist():
                sides[side](block[0][1])  # what ran before has left the caches cold
                for i, image, label in block:
                    result = sides[side](image)
                    latency[turn, side, i] = result.latency_ms
                    if turn == 0:
                        confusion[side] += metrics.confusion_matrix(label, result.mask, classes)
                        exits[side].append(result.exit)
            timed.append(benchmark_files(parts, threads, runs=BLOCK, min_seconds=0.0, rounds=1))
    p50_ms = np.mean([[row.p50_ms for row in turn] for turn in timed], axis=0)
    rows = [dataclasses.replace(row, p50_ms=float(ms), p90_ms=None) for row, ms in zip(timed[0], p50_ms, strict=True)]
    return np.median(latency, axis=0), [float(metrics.miou(*metrics.class_counts(matrix))) for matrix in confusion], exits, rows


def main(argv) -> None:
    del argv
    workdir = Path(FLAGS.workdir)
    config = configs.with_data_dir(configs.load_config(FLAGS.workdir), FLAGS.data_dir)
    examples = open_split(config.data, FLAGS.split)
    stats = Stats.load(workdir / "stats.npz")
    rows = benchmark_files(
        sorted((workdir / CANDIDATES).glob("*.tflite")), threads=FLAGS.threads, runs=FLAGS.runs, min_seconds=0.0, rounds=5, progress=True
    )
    costs = latency_costs(stats, [dataclasses.asdict(row) for row in rows])
    network = load_network(FLAGS.workdir, config, examples.info.num_classes)
    exporter = Exporter(network, config.data.input_size, stats.fidelity)
    targets = [float(value) for value in FLAGS.max_drop_pp]
    folder = workdir / "closed_loop"
    exits_alone = most_accurate(stats)
    all_exits = Configuration(ANYTIME, False, tuple(exits_alone), 1.0)
    spec = InputSpec(*config.data.input_size, resize=config.data.resize)
    exporter.bundle(folder / "exits", all_exits, None, examples.info.classes, spec, extra_signatures=(ALONE,))
    deployments = []
    for target in targets:
        objective = resolve_objective(original(stats, costs), costs, "input-dependent", max_drop_pp=target)
        deployment = search(stats, costs, objective, max_early_exits=FLAGS.max_early_exits)
        print(table(deployment))
        exporter.bundle(folder / f"{target:g}pp", deployment, deployment.predicted.in_manifest(), examples.info.classes, spec)
        deployments.append(deployment)

    runners = [Runner(Bundle.load(folder / name), FLAGS.threads) for name in ("exits", *(f"{target:g}pp" for target in targets))]
    sides = [functools.partial(runners[0].run, setting=BUDGETED, exit=choice.exit) for choice in reversed(exits_alone)]
    sides += [runner.run for runner in runners[1:]]
    parts = submodels(deployments, workdir / CANDIDATES)
    latency, miou, exits, timed = run_all(sides, parts, examples, FLAGS.threads, FLAGS.rounds)
    latest = {row.sha256: row for row in (*rows, *timed)}
    costs = latency_costs(stats, [dataclasses.asdict(row) for row in latest.values()])
    means = latency.mean(axis=1)
    resampled = np.random.default_rng(0).integers(len(examples), size=(2000, len(examples)))
    figures = []
    alone = []
    for side, choice in enumerate(reversed(exits_alone)):
        row = {"candidate": f"{choice.exit}.{choice.head}", "miou": miou[side], "ms": means[side], "share": means[side] / means[0]}
        print(f"{row['candidate']} alone: {row['ms']:.2f} ms, {row['share']:.3f} of the original, mIoU {100 * row['miou']:.2f}")
        alone.append(row)
    for side, (target, deployment) in enumerate(zip(targets, deployments, strict=True), start=len(alone)):
        predicted, left = predict(stats, costs, deployment), collections.Counter(exits[side])
        print(f"within {target:g} pp, bundle: {means[side]:.2f} ms, mIoU {100 * miou[side]:.2f}; images left: {dict(left)}")
        print(f"  predicted: {predicted.cost_mean:.2f} ms, mIoU {100 * predicted.miou:.2f}")
        ratios = latency[0][resampled].mean(1) / latency[side][resampled].mean(1)
        figures.append(
            {
                "max_drop_pp": target,
                "exits": [f"{choice.exit}.{choice.head}" for choice in deployment.exits],
                "speedup": means[0] / means[side],
                "speedup_interval": np.quantile(ratios, [0.025, 0.975]).tolist(),
                "miou_drop_pp": 100 * (miou[0] - miou[side]),
                "latency_error": abs(predicted.cost_mean - means[side]) / means[side],
                "search_error": abs(deployment.predicted.cost_mean - means[side]) / means[side],
                "miou_error_pp": 100 * abs(predicted.miou - miou[side]),
                "original_ms": means[0],
                "predicted_ms": predicted.cost_mean,
                "searched_ms": deployment.predicted.cost_mean,
                "bundle_ms": means[side],
                "original_miou": miou[0],
                "predicted_miou": predicted.miou,
                "bundle_miou": miou[side],
                "threads": FLAGS.threads,
            }
        )
    worst = {key: max(row[key] for row in figures) for key in ("latency_error", "search_error", "miou_error_pp")}
    print(json.dumps((figures[0] if len(figures) == 1 else {"targets": figures, **worst}) | {"exits_alone": alone}))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "folder of a training, with candidates/ and stats.npz", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_string("split", "val", "split to run over")
    flags.DEFINE_list("max_drop_pp", ["1"], "percentage points of mIoU that may be lost; several targets are separated by commas")
    flags.DEFINE_integer("max_early_exits", 2, "largest number of exits in front of the last one", lower_bound=0)
    flags.DEFINE_integer("threads", 1, "interpreter threads")
    flags.DEFINE_integer("runs", 50, "timed runs of each submodel")
    flags.DEFINE_integer("rounds", 3, "runs of each image")
    app.run(main)
