"""fp32, fp16 and int8 bundles of the same network on real images: latency, mIoU and decisions.

`python benchmarks/precision.py --workdir W [--data_dir D] --split val`, after training. In one process, latencies interleaved. The last
line is one JSON object, int8 against fp32:
  latency_ratio: of the last exit alone, image to mask, at 1 thread; ratio_interval: its quartiles; latency_ratio_largest: over the exits.
  miou_drop_pp: percentage points, the largest over the exits; fp16_miou_drop_pp: likewise of fp16.
  decision_agreement: share of the images on which both leave, or both stay, at the exit, where theta_img is the median of the fp32
    confidences (the hardest place for it); the least over the exits. decision_agreement_mean: over theta_img at every decile.
  size_ratio: of the files.
`--sensitivity N` also prints the N operations whose int8 error is largest, for `export_tflite --float_operations`.
`--other_python PYTHON`, of an environment with a runtime of its own, Pillow and NumPy, adds by precision, of `--other_images` there against
here: other_mask_differs: share of the last exit's pixels; other_confidence_differs: largest difference of a confidence. PYTHON may be a
script that starts one for another processor in an emulator: ARM computes fp16 files in float16, x86 does not.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from common import Trained, define_flags, interleaved, ratio
from PIL import Image

import mess_runtime
from mess_runtime.bundle import BUDGETED, FULL, IMAGE, Bundle
from mess_runtime.engines import open_engine
from mess_runtime.runner import Runner
from mess_tf.data.pipelines import evaluation_batches, network_input
from mess_tf.graph.conversion import FP32, INT8, PRECISIONS

THETA_PIX = 0.9


def confidences(bundle: Bundle, trained: Trained) -> np.ndarray:
    """Shares of confident pixels, float64 [early exits, images]."""
    engine = open_engine(bundle.path, 2)
    engine.prepare(FULL)
    rows = []
    for image, _ in evaluation_batches(trained.examples).as_numpy_iterator():
        pixels = network_input(image, trained.size, bundle.manifest.input.resize).astype(bundle.manifest.input.dtype)
        outputs = engine.run(FULL, {IMAGE: engine.put(FULL, IMAGE, pixels)})
        names = [f"{name}.confident_pixels" for name in bundle.manifest.exits[:-1]]
        rows.append([engine.get(FULL, name, outputs[name])[0] / pixels[0, ..., 0].size for name in names])
    return np.array(rows).T


def run_in(python: str, bundle: Bundle, images: Path, masks: Path) -> tuple[np.ndarray, np.ndarray]:
    """The last exit's masks uint8 [n, H, W] and the confidences [n, early exits] by `mess_runtime run` in an environment of its own."""
    options = ["--setting=anytime", "--deadline_ms=1e9", "--engine=interpreter", f"--output={masks}"]
    words = [python, "-m", "mess_runtime", "run", str(bundle.folder), str(images), *options]
    environment = os.environ | {"PYTHONPATH": str(Path(mess_runtime.__file__).parents[1])}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()[:-1]]
    read = [np.asarray(Image.open(masks / line["mask"])) for line in lines]
    return np.array(read), np.array([[step["confidence"] for step in line["segments"][:-1]] for line in lines])


def compare_runtimes(bundle: Bundle, images: Sequence[np.ndarray], python: str) -> tuple[float, float]:
    """Share of mask pixels that differ in another environment's runtime, and the largest difference of a confidence."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "images").mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(Path(folder) / "images" / f"{number:03d}.png")
        results = []
        for each in (sys.executable, python):
            results.append(run_in(each, bundle, Path(folder) / "images", Path(folder) / f"masks{len(results)}"))
    (masks, confidences), (other_masks, other_confidences) = results
    return float((masks != other_masks).mean()), float(np.abs(confidences - other_confidences).max())


def main(argv) -> None:
    del argv
    trained = Trained()
    with tempfile.TemporaryDirectory() as folder:
        bundles = {}
        for precision in PRECISIONS:
            floats = FLAGS.float_operations if precision == INT8 else ()
            exporter = trained.exporter(precision, floats)
            bundles[precision] = trained.bundle(Path(folder) / precision, exporter, trained.candidates, (THETA_PIX, 0.5), measure=True)
            for segment in bundles[precision].manifest.segments:
                print(f"{precision} {segment.exit:8} mIoU {100 * segment.miou:.2f} %", flush=True)
            if precision == INT8 and FLAGS.sensitivity:
                for error, name in exporter.quantization_errors(trained.candidates)[: FLAGS.sensitivity]:
                    print(f"rmse/scale {error:7.3f}  {name}")

        first, second = (confidences(bundles[precision], trained) for precision in (FP32, INT8))
        theta = np.quantile(first, np.linspace(0.1, 0.9, 9), axis=1)[..., None]  # [9, early exits, 1]
        agreement = ((first >= theta) == (second >= theta)).mean(2)

        image, ratios = trained.examples.load(0)[0], {}
        exits = bundles[FP32].manifest.exits
        for threads in (2, 1):
            runners = {precision: Runner(bundle, threads) for precision, bundle in bundles.items()}
            for name in exits:
                samples = interleaved(
                    {
                        precision: lambda runner=runner, name=name: runner.run(image, BUDGETED, name)
                        for precision, runner in runners.items()
                    },
                    FLAGS.rounds,
                )
                ratios[name] = ratio(samples[INT8], samples[FP32])
                medians = ", ".join(f"{precision} {np.median(values):.2f} ms" for precision, values in samples.items())
                print(f"{threads} thread(s) {name:8} {medians}, int8 / fp32 {ratios[name][0]:.3f}")

        def drop(precision: str) -> float:
            pairs = zip(bundles[FP32].manifest.segments, bundles[precision].manifest.segments, strict=True)
            return max(100 * (before.miou - after.miou) for before, after in pairs)

        figures = {
            "latency_ratio": ratios[exits[-1]][0],
            "ratio_interval": ratios[exits[-1]][1:],
            "latency_ratio_largest": max(ratios.values())[0],
            "miou_drop_pp": drop(INT8),
            "fp16_miou_drop_pp": drop("fp16"),
            "decision_agreement": float(agreement[4].min()),
            "decision_agreement_mean": float(agreement.mean(0).min()),
            "size_ratio": bundles[INT8].manifest.size_bytes / bundles[FP32].manifest.size_bytes,
        }
        if FLAGS.other_python:
            picked = np.linspace(0, len(trained.examples) - 1, min(FLAGS.other_images, len(trained.examples))).round().astype(int)
            images = [trained.examples.load(i)[0] for i in picked]
            compared = {each: compare_runtimes(bundle, images, FLAGS.other_python) for each, bundle in bundles.items()}
            figures["other_mask_differs"] = {each: differs for each, (differs, _) in compared.items()}
            figures["other_confidence_differs"] = {each: differs for each, (_, differs) in compared.items()}
        print(json.dumps(figures))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    define_flags()
    flags.DEFINE_list("float_operations", [], "see export_tflite")
    flags.DEFINE_string("other_python", "", "interpreter of an environment with another runtime, to compare results with")
    flags.DEFINE_integer("other_images", 20, "evenly picked images to compare results on")
    flags.DEFINE_integer("sensitivity", 0, "how many operations to list")
    flags.DEFINE_integer("rounds", 30, "timed runs of each side")
    app.run(main)
