"""What splitting a network into segments costs, and what the runner adds to the interpreter.

`python benchmarks/runtime_overhead.py --workdir W [--data_dir D]`, after training. Everything in one process and interleaved, at 1 and 2
threads, on one bundle. The last line is one JSON object, of 1 thread:
  chain_over_monolithic: latency of all segments one after another over that of the signature `full`, which computes the same at a
    stretch; through CompiledModel with shared buffers. chain_interval: the quartiles.
  chain_over_monolithic_interpreter: likewise through signature runners of the Interpreter, which copy.
  exit1_over_prefix: the first segment, which hands features on, over the first exit alone.
  runner_overhead_ms: `Runner.run` of one exit (image in, mask out) less the invocation of the same signature.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags
from common import Trained, define_flags, interleaved, ratio

from mess_runtime.bundle import BUDGETED, FULL, IMAGE, Bundle, alone_signature, segment_signature
from mess_runtime.engines import COMPILED, ENGINES, open_engine
from mess_runtime.runner import Runner


def measure(bundle: Bundle, image: np.ndarray, engine_name: str, threads: int, rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of each side, [rounds]."""
    engine = open_engine(bundle.path, threads, engine_name)
    exits = bundle.manifest.exits
    segments, alone = [segment_signature(name) for name in exits], alone_signature(exits[-1])
    for signature in (*segments, alone, alone_signature(exits[0]), FULL):
        engine.prepare(signature)
    pixels = image[None].astype(bundle.manifest.input.dtype)
    runner = Runner(bundle, threads, engine_name)

    def run(*signatures):
        tensors = {}
        for signature in signatures:
            inputs = {name: engine.put(signature, name, pixels) if name == IMAGE else tensors[name] for name in engine.inputs[signature]}
            tensors |= engine.run(signature, inputs)

    given = {IMAGE: engine.put(alone, IMAGE, pixels)}
    return interleaved(
        {
            "chain": lambda: run(*segments),
            "full": lambda: run(FULL),
            "exit1": lambda: run(segments[0]),
            "prefix1": lambda: run(alone_signature(exits[0])),
            "invocation": lambda: engine.run(alone, given),
            "runner": lambda: runner.run(image, BUDGETED, exits[-1]),
        },
        rounds,
    )


def main(argv) -> None:
    del argv
    trained = Trained()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = trained.bundle(Path(folder) / "bundle", trained.exporter(), FLAGS.candidates, (0.9, 0.9), FLAGS.input)
        image = trained.examples.load(0)[0]
        for threads in (2, 1):
            for engine in ENGINES:
                samples = measure(bundle, image, engine, threads, FLAGS.rounds)
                chain, exit1 = ratio(samples["chain"], samples["full"]), ratio(samples["exit1"], samples["prefix1"])
                overhead = float(np.median(samples["runner"] - samples["invocation"]))
                medians = ", ".join(f"{name} {np.median(values):.2f}" for name, values in samples.items())
                print(f"{threads} thread(s), {engine}: {medians} ms; chain {chain[0]:.3f}, exit1 {exit1[0]:.3f}, runner +{overhead:.2f} ms")
                if engine == COMPILED:
                    figures |= {"chain_over_monolithic": chain[0], "chain_interval": chain[1:], "exit1_over_prefix": exit1[0]}
                    figures |= {"runner_overhead_ms": overhead}
                else:
                    figures |= {"chain_over_monolithic_interpreter": chain[0]}
    print(json.dumps(figures))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    define_flags()
    flags.DEFINE_enum("input", "float32", ("float32", "uint8"), "type of the bundle's input")
    flags.DEFINE_integer("rounds", 40, "timed runs of each side")
    app.run(main)
