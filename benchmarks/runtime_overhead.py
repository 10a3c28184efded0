"""What splitting a network into segments costs, and what the runner adds to the interpreter.

`python benchmarks/runtime_overhead.py --workdir W [--data_dir D]`, after training. Everything in one process and interleaved, at 1 and 2
threads, on a bundle without decisions. The last line is one JSON object, of 1 thread:
  chain_over_monolithic: latency of all segments one after another over that of the signature `full`, which computes the same at a
    stretch; through CompiledModel with shared buffers. chain_interval: the quartiles.
  chain_over_monolithic_interpreter: likewise through signature runners of the Interpreter, which copy.
  exit1_over_prefix: the first segment, which hands features on, over the first exit alone.
  runner_overhead_ms: `Runner.run` of the last exit (uint8 image in, mask out) less the time that the runtime's own functions take in it,
    for a bundle that takes uint8; runner_overhead_float32_ms: for one that takes float32, whose image is converted before.
  runner_copies_ms: of the runtime's time, what goes into and out of its buffers (the Interpreter does that while it runs).
"""

import functools
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from common import Trained, define_flags, interleaved, ratio

from mess_runtime.bundle import BUDGETED, FULL, IMAGE, INPUT_TYPES, Bundle, alone_signature, segment_signature
from mess_runtime.engines import COMPILED, ENGINES, open_engine
from mess_runtime.images import fit
from mess_runtime.runner import Runner


def measure(bundle: Bundle, image: np.ndarray, engine_name: str, threads: int, rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of each side, [rounds]."""
    engine = open_engine(bundle.path, threads, engine_name)
    exits = bundle.manifest.exits
    segments, prefix = [segment_signature(name) for name in exits], alone_signature(exits[0])
    for signature in (*segments, prefix, FULL):
        engine.prepare(signature)
    pixels = image[None].astype(bundle.manifest.input.dtype)

    def run(*signatures):
        tensors = {}
        for signature in signatures:
            inputs = {name: engine.put(signature, name, pixels) if name == IMAGE else tensors[name] for name in engine.inputs[signature]}
            tensors |= engine.run(signature, inputs)

    return interleaved(
        {
            "chain": lambda: run(*segments),
            "full": lambda: run(FULL),
            "exit1": lambda: run(segments[0]),
            "prefix1": lambda: run(prefix),
        },
        rounds,
    )


def overhead(bundle: Bundle, image: np.ndarray, engine_name: str, threads: int, rounds: int) -> tuple[float, float]:
    """Median milliseconds that `Runner.run` spends outside the runtime's functions, and in those that copy."""
    runner = Runner(bundle, threads, engine_name)
    inside = {name: [] for name in ("put", "run", "get")}

    def timed(function, samples, *arguments):
        start = time.perf_counter_ns()
        result = function(*arguments)
        samples.append((time.perf_counter_ns() - start) / 1e6)
        return result

    for name, samples in inside.items():
        setattr(runner._engine, name, functools.partial(timed, getattr(runner._engine, name), samples))
    total = interleaved({"runner": lambda: runner.run(image, BUDGETED)}, rounds)["runner"]
    put, run, get = (np.array(samples[-rounds:]) for samples in inside.values())
    return float(np.median(total - put - run - get)), float(np.median(put + get))


def main(argv) -> None:
    del argv
    trained = Trained()
    figures, image = {}, fit(trained.examples.load(0)[0], trained.size, trained.config.data.resize)
    with tempfile.TemporaryDirectory() as folder:
        bundles = {
            name: trained.bundle(Path(folder) / name, trained.exporter(), trained.candidates, input_type=name) for name in INPUT_TYPES
        }
        for threads, engine in itertools.product((2, 1), ENGINES):
            samples = measure(bundles["float32"], image, engine, threads, FLAGS.rounds)
            chain, exit1 = ratio(samples["chain"], samples["full"]), ratio(samples["exit1"], samples["prefix1"])
            spent = {name: overhead(bundle, image, engine, threads, FLAGS.rounds) for name, bundle in bundles.items()}
            medians = ", ".join(f"{name} {np.median(values):.2f}" for name, values in samples.items())
            print(
                f"{threads} thread(s), {engine}: {medians} ms; chain {chain[0]:.3f} ({chain[1]:.3f} to {chain[2]:.3f}),"
                f" exit1 {exit1[0]:.3f},"
                f" runner +{spent['uint8'][0]:.2f} ms (uint8), +{spent['float32'][0]:.2f} ms (float32), copies {spent['uint8'][1]:.2f} ms",
                flush=True,
            )
            if engine == COMPILED:
                figures |= {"chain_over_monolithic": chain[0], "chain_interval": chain[1:], "exit1_over_prefix": exit1[0]}
                figures |= {"runner_overhead_ms": spent["uint8"][0], "runner_overhead_float32_ms": spent["float32"][0]}
                figures |= {"runner_copies_ms": spent["uint8"][1]}
            else:
                figures |= {"chain_over_monolithic_interpreter": chain[0]}
    print(json.dumps(figures))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    define_flags()
    flags.DEFINE_integer("rounds", 40, "timed runs of each side")
    app.run(main)
