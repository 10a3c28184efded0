"""Anytime inference: whether results keep their deadlines, and what handing features on is worth.

`python benchmarks/anytime.py --workdir W [--data_dir D] --split val [--images 200] [--deadlines 20]`, after training. Runs every image
under every deadline, from the first exit's latency to that of the whole chain; the split is gone through again until there are enough
images. Then the same exits run one after another, each from the image, as a network without segments has to. The last line is one JSON
object:
  late_by_more_than_a_segment: results later than their deadline plus the longest segment of their image (deadlines before the first
    result aside); late_share: results later than their deadline at all.
  mean_miou: mean over the deadlines of the mIoU, percent; mean_miou_from_scratch: of prefixes from scratch under the same deadlines.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags
from common import Trained, define_flags

from mess_runtime.bundle import ANYTIME, BUDGETED
from mess_runtime.runner import Runner
from mess_tf import metrics


def main(argv) -> None:
    del argv
    trained = Trained()
    classes = trained.examples.info.num_classes
    with tempfile.TemporaryDirectory() as folder:
        bundle = trained.bundle(Path(folder) / "bundle", trained.exporter(), trained.candidates)
        runner = Runner(bundle, FLAGS.threads)
        exits = bundle.manifest.exits
        images = [trained.examples.load(i % len(trained.examples)) for i in range(FLAGS.images)]
        probe = [list(runner.refine(image))[-1] for image, _ in images[:10]]
        first, last = np.median([[result.trace[0].latency_ms, result.latency_ms] for result in probe], axis=0)
        deadlines = np.linspace(first, 1.1 * last, FLAGS.deadlines)

        confusion = np.zeros((2, len(deadlines), classes, classes), np.int64)
        late, very_late = 0, 0
        for image, label in images:
            scratch = [runner.run(image, BUDGETED, exit=name) for name in exits]
            arrivals = np.cumsum([result.latency_ms for result in scratch])
            for k, deadline in enumerate(deadlines):
                result = runner.run(image, ANYTIME, deadline_ms=float(deadline))
                confusion[0, k] += metrics.confusion_matrix(label, result.mask, classes)
                late += result.latency_ms > deadline
                very_late += result.latency_ms > deadline + max(step.latency_ms for step in result.trace)
                in_time = max(0, np.searchsorted(arrivals, deadline, side="right") - 1)
                confusion[1, k] += metrics.confusion_matrix(label, scratch[in_time].mask, classes)
    miou = np.array([[metrics.miou(*metrics.class_counts(matrix)) for matrix in side] for side in confusion]) * 100
    for deadline, ours, theirs in zip(deadlines, *miou, strict=True):
        print(f"deadline {deadline:7.2f} ms: mIoU {ours:.2f} %, prefixes from scratch {theirs:.2f} %")
    figures = {
        "late_by_more_than_a_segment": int(very_late),
        "late_share": late / (len(images) * len(deadlines)),
        "mean_miou": float(miou[0].mean()),
        "mean_miou_from_scratch": float(miou[1].mean()),
        "images": len(images),
        "deadlines": len(deadlines),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    define_flags()
    flags.DEFINE_integer("images", 200, "how many images")
    flags.DEFINE_integer("deadlines", 20, "how many deadlines")
    flags.DEFINE_integer("threads", 1, "of the runtime")
    app.run(main)
