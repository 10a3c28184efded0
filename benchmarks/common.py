"""What the benchmarks share: interleaved timing, bundles of a trained network, and calls of the commands."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from ai_edge_litert.interpreter import Interpreter

from mess_runtime.bundle import ANYTIME, EXTRA_SIGNATURES, INPUT_DEPENDENT, Bundle, InputSpec
from mess_tf import configs, metrics
from mess_tf.data.examples import Examples
from mess_tf.data.sources import open_split
from mess_tf.export_tflite import calibration_images
from mess_tf.files import Configuration, Deployment, ExitChoice, Stats
from mess_tf.graph.conversion import FP32, INT8
from mess_tf.graph.exporter import Exporter
from mess_tf.network.model import FINAL, load_network


def define_flags() -> None:
    """The flags of every benchmark on a trained network."""
    flags.DEFINE_string("workdir", None, "folder of a training", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_string("split", "val", "split whose images are used")
    flags.DEFINE_list("candidates", [], "EXIT.HEAD of each exit, shallow to deep; default: every exit with the head of stage 1")


class Trained:
    """The network that the flags name, its data, and exports of it."""

    def __init__(self):
        values = flags.FLAGS
        self.config = configs.with_data_dir(configs.load_config(values.workdir), values.data_dir)
        self.size = self.config.data.input_size
        self.examples: Examples = open_split(self.config.data, values.split)
        self.network = load_network(values.workdir, self.config, self.examples.info.num_classes)
        plain = [f"{point.name}.{self.config.exits.plain_head}" for point in self.network.exit_points]
        self.candidates = values.candidates or [*plain, FINAL]

    def exporter(self, precision: str = FP32, float_operations: Sequence[str] = ()) -> Exporter:
        """An exporter, with calibration images for int8."""
        samples = calibration_images(self.config) if precision == INT8 else ()
        return Exporter(self.network, self.size, precision=precision, samples=samples, float_operations=float_operations)

    def bundle(
        self,
        folder: Path,
        exporter: Exporter,
        candidates: Sequence[str],
        theta: tuple[float, float] | None = None,
        input_type: str = "uint8",
        measure: bool = False,
    ) -> Bundle:
        """Exports some candidates, which decide edge-aware at (theta_pix, theta_img) or, without, run to a deadline."""
        *early, last = [ExitChoice(*name.split(".")) for name in candidates]
        if theta:
            early = [ExitChoice(choice.exit, choice.head, *theta) for choice in early]
        configuration = Configuration(*((INPUT_DEPENDENT, True, (*early, last), None) if theta else (ANYTIME, False, (*early, last), 1.0)))
        spec = InputSpec(*self.size, input_type, self.config.data.resize)
        exporter.bundle(folder, configuration, None, self.examples.info.classes, spec, self.examples if measure else None, EXTRA_SIGNATURES)
        return Bundle.load(folder)


def interleaved(
    sides: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3, clock: Callable[[], int] = time.perf_counter_ns
) -> dict[str, np.ndarray]:
    """Calls every side once per round, in an order that turns from round to round.

    Args:
      sides: by name.
      rounds: how many times.
      warmup: calls of each side before.
      clock: nanoseconds.

    Returns:
      Milliseconds float64 [rounds] of each side.
    """
    for call in sides.values():
        for _ in range(warmup):
            call()
    names = list(sides)
    samples = {name: np.zeros(rounds) for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            sides[name]()
            samples[name][turn] = (clock() - start) / 1e6
    return samples


def invocation(content: bytes, threads: int, inputs: Mapping[str, np.ndarray] | None = None) -> Callable[[], None]:
    """Makes a function that runs a .tflite with one signature, on random inputs unless some are given by name."""
    interpreter = Interpreter(model_content=content, num_threads=threads)
    interpreter.allocate_tensors()
    details = interpreter.get_signature_runner().get_input_details()
    generator = np.random.default_rng(0)
    for name, each in details.items():
        value = generator.uniform(0, 127, each["shape"]).astype(each["dtype"]) if inputs is None else inputs[name]
        interpreter.set_tensor(each["index"], value)
    return interpreter.invoke


def run(module: str, *words: str) -> None:
    """Runs one of the project's commands in a process of its own."""
    subprocess.run([sys.executable, "-m", module, *words], check=True)


def best_evaluation(workdir: Path, stage: str) -> dict[str, float]:
    """mIoU % of every candidate in the evaluation whose weights were kept."""
    lines = (workdir / "logs" / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [row["miou"] for row in map(json.loads, lines) if "miou" in row]
    best = max(evaluations, key=lambda miou: np.mean(list(miou.values())))
    return {name: 100 * value for name, value in best.items()}


def searched(workdir: Path, output: Path, *words: str) -> Deployment | None:
    """What `mess_tf.search` chooses under a constraint, written to `output`; None where nothing meets it, which is printed."""
    command = [sys.executable, "-m", "mess_tf.search", f"--workdir={workdir}", f"--output={output}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Deployment.load(output)
    if "out of reach" not in done.stderr:
        raise RuntimeError(done.stderr)
    print(done.stderr.strip().splitlines()[-1], flush=True)
    return None


def most_accurate(stats: Stats) -> list[ExitChoice]:
    """The head of each exit with the highest mIoU on the images of the statistics."""
    accuracy = [metrics.miou(*(counts.sum(0) for counts in stats.counts(k))) for k in range(len(stats.candidates))]
    best = {}
    for candidate in np.argsort(accuracy).tolist():  # the last one of an exit stays
        choice = ExitChoice(*stats.candidates[candidate].split("."))
        best[choice.exit] = choice
    return [best[name] for name in stats.exits]


def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float, float]:
    """Median of the ratio of two sides round by round, and its 25 % and 75 % quantiles."""
    return tuple(float(value) for value in np.quantile(above / below, [0.5, 0.25, 0.75]))
