"""The closed loop on real images: what the search predicts of a deployment, what its bundle does, and its speed-up over the original.

`python benchmarks/closed_loop.py --workdir W [--data_dir D] --split val [--max_drop_pp 1]`, after training, `export_tflite --candidates`
and `calibrate`.

In one process: times every candidate submodel, searches the least mean latency within `max_drop_pp` of the original's mIoU, exports that
bundle and the original the same way, then runs both over all images of the split, image by image in turn. The last line is one JSON
object:
  speedup: mean latency of the original over that of the bundle; speedup_interval: 95 % bootstrap interval over the images.
  miou_drop_pp: mIoU of the original less that of the bundle, in percentage points, both from the masks returned.
  latency_error: |predicted - measured| / measured mean latency of the bundle; miou_error_pp: the same difference for its mIoU.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from absl import app, flags

from mess_runtime.benchmark import benchmark_files
from mess_runtime.bundle import Bundle
from mess_runtime.runner import Runner
from mess_tf import configs, metrics
from mess_tf.data import open_split
from mess_tf.export_tflite import CANDIDATES, Exporter, export_deployment
from mess_tf.files import Stats
from mess_tf.model import load_network
from mess_tf.search import latency_costs, original, resolve_objective, search, table

SIDES = ("bundle_original", "bundle")


def run_both(workdir: Path, examples, threads: int, rounds: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Runs both bundles over a split, in turn.

    Returns:
      Latencies in ms [2, images] (the median of the rounds), summed confusion matrices [2, C, C], and the exit of each image in the bundle.
    """
    runners = [Runner(Bundle.load(workdir / side), threads) for side in SIDES]
    classes = examples.info.num_classes
    latency = np.zeros((rounds, len(SIDES), len(examples)))
    confusion = np.zeros((len(SIDES), classes, classes), np.int64)
    exits = []
    for i in range(len(examples)):
        image, label = examples.load(i)
        for turn in range(rounds):
            for side in (0, 1) if turn % 2 == 0 else (1, 0):
                result = runners[side].run(image)
                latency[turn, side, i] = result.latency_ms
                if turn == 0:
                    confusion[side] += metrics.confusion_matrix(label, result.mask, classes)
                    if side == 1:
                        exits.append(result.exit)
    return np.median(latency, axis=0), confusion, exits


def main(argv) -> None:
    del argv
    workdir = Path(FLAGS.workdir)
    config = configs.with_data_dir(configs.load_config(FLAGS.workdir), FLAGS.data_dir)
    examples = open_split(config.data, FLAGS.split)
    stats = Stats.load(workdir / "stats.npz")
    rows = benchmark_files(
        sorted((workdir / CANDIDATES).glob("*.tflite")), threads=FLAGS.threads, runs=FLAGS.runs, min_seconds=0.0, rounds=5, progress=print
    )
    costs = latency_costs(stats, [dataclasses.asdict(row) for row in rows])
    objective = resolve_objective(original(stats, costs), "input-dependent", max_drop_pp=FLAGS.max_drop_pp)
    deployment = search(stats, costs, objective, max_early_exits=FLAGS.max_early_exits)
    print(table(deployment))

    network = load_network(FLAGS.workdir, config, examples.info.num_classes)
    export_deployment(Exporter(network, config.data.input_size, deployment.fidelity), deployment, examples.info.classes, workdir)
    latency, confusion, exits = run_both(workdir, examples, FLAGS.threads, FLAGS.rounds)

    means = latency.mean(axis=1)
    resampled = np.random.default_rng(0).integers(len(examples), size=(2000, len(examples)))
    ratios = latency[0][resampled].mean(1) / latency[1][resampled].mean(1)
    miou = [float(metrics.miou(*metrics.class_counts(matrix))) for matrix in confusion]
    for name in dict.fromkeys(exits):
        print(f"{exits.count(name):4d} of {len(exits)} images left at {name}")
    print(f"original: {means[0]:.2f} ms, mIoU {100 * miou[0]:.2f};  bundle: {means[1]:.2f} ms, mIoU {100 * miou[1]:.2f}")
    print(f"predicted: {deployment.predicted.cost_mean:.2f} ms, mIoU {100 * deployment.predicted.miou:.2f}")
    figures = {
        "speedup": means[0] / means[1],
        "speedup_interval": np.quantile(ratios, [0.025, 0.975]).tolist(),
        "miou_drop_pp": 100 * (miou[0] - miou[1]),
        "latency_error": abs(deployment.predicted.cost_mean - means[1]) / means[1],
        "miou_error_pp": 100 * abs(deployment.predicted.miou - miou[1]),
        "original_ms": means[0],
        "bundle_ms": means[1],
        "threads": FLAGS.threads,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "folder of a training, with candidates/ and stats.npz", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_string("split", "val", "split to run over")
    flags.DEFINE_float("max_drop_pp", 1.0, "percentage points of mIoU that may be lost")
    flags.DEFINE_integer("max_early_exits", 1, "0, 1 or 2")
    flags.DEFINE_integer("threads", 1, "interpreter threads")
    flags.DEFINE_integer("runs", 50, "timed runs of each submodel")
    flags.DEFINE_integer("rounds", 3, "runs of each image")
    app.run(main)
