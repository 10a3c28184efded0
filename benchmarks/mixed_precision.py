"""What choosing fp16 or int8 for each segment could gain over one precision per bundle: a bound from measured segments.

`python benchmarks/mixed_precision.py --workdir W [--data_dir D] --split val [--candidates=EXIT.HEAD,...]`, after training. The segments of
a chain in fp16 and in int8 are run one after another in one process, in turns; what is compared is the CPU time of one thread, so another
process on the machine matters little. A chain in mixed precision is given the faster of the two for every segment, features converted
between precisions for nothing, and the accuracy of the better one, so no real one is as good. Images reach each segment as often as the one
before or less: all such shares in steps of a quarter are tried. The last line is one JSON object:
  int8_over_fp16: by exit, the ratio of the CPU time of the segment that ends there, with its quartiles.
  bound: the largest ratio, over the shares, of the better single precision's time to that of the mixed chain; reach: those shares.
  miou: by precision and exit, in percent; miou_gap_pp: the most that int8 loses at any exit, which is all that fp16 segments can win back.
"""

import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from common import Trained, define_flags, interleaved, ratio

from mess_runtime.bundle import IMAGE, Bundle, segment_signature
from mess_runtime.engines import INTERPRETER, open_engine
from mess_runtime.images import fit
from mess_tf.graph.conversion import FP16, INT8

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)


def segment_times(bundles: dict[str, Bundle], image: np.ndarray, rounds: int) -> dict[str, dict[str, np.ndarray]]:
    """CPU milliseconds [rounds] by precision and exit."""
    sides = {}
    for precision, bundle in bundles.items():
        engine, tensors = open_engine(bundle.path, 1, INTERPRETER), {}
        spec = bundle.manifest.input
        tensors[IMAGE] = fit(image, (spec.height, spec.width), spec.resize)[None].astype(spec.dtype)
        for name in bundle.manifest.exits:
            signature = segment_signature(name)
            engine.prepare(signature)
            inputs = {
                each: engine.put(signature, each, tensors[each]) if each == IMAGE else tensors[each] for each in engine.inputs[signature]
            }
            tensors |= engine.run(signature, inputs)
            sides[precision, name] = lambda engine=engine, signature=signature, inputs=inputs: engine.run(signature, inputs)
    samples = interleaved(sides, rounds, clock=time.process_time_ns)
    return {precision: {name: samples[precision, name] for name in bundle.manifest.exits} for precision, bundle in bundles.items()}


def bound(first: np.ndarray, second: np.ndarray) -> tuple[float, tuple[float, ...]]:
    """The largest gain of mixing two precisions whose segments take so long, and the shares of the images that reach each segment."""

    def gain(reach: tuple[float, ...]) -> float:
        return float(min(first @ reach, second @ reach) / (np.minimum(first, second) @ reach))

    shares = ((1.0, *rest) for rest in itertools.combinations_with_replacement(SHARES, len(first) - 1))
    best = max(shares, key=gain)
    return gain(best), best


def main(argv) -> None:
    del argv
    trained = Trained()
    with tempfile.TemporaryDirectory() as folder:
        bundles = {
            precision: trained.bundle(Path(folder) / precision, trained.exporter(precision), trained.candidates, (0.9, 0.5), measure=True)
            for precision in (FP16, INT8)
        }
        times = segment_times(bundles, trained.examples.load(0)[0], FLAGS.rounds)
    names = bundles[FP16].manifest.exits
    miou = {precision: {each.exit: 100 * each.miou for each in bundle.manifest.segments} for precision, bundle in bundles.items()}
    ratios = {name: ratio(times[INT8][name], times[FP16][name]) for name in names}
    for name in names:
        medians = ", ".join(f"{precision} {np.median(times[precision][name]):.2f} ms" for precision in bundles)
        accuracy = ", ".join(f"{precision} {miou[precision][name]:.2f} %" for precision in bundles)
        print(f"{name:8} CPU time {medians}, int8 / fp16 {ratios[name][0]:.3f}; mIoU {accuracy}", flush=True)
    medians = [np.array([np.median(times[precision][name]) for name in names]) for precision in (FP16, INT8)]
    most, reach = bound(*medians)
    gap = max(miou[FP16][name] - miou[INT8][name] for name in names)
    print(json.dumps({"int8_over_fp16": ratios, "bound": most, "reach": reach, "miou": miou, "miou_gap_pp": gap}))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    define_flags()
    flags.DEFINE_integer("rounds", 30, "timed runs of each segment in each precision")
    app.run(main)
