"""What a phone makes of images: a bundle's segments, one after another, each reading what the one before made there.

TensorFlow Lite's tool takes raw inputs and writes the raw outputs of its last inference. A delegate may be right at first and wrong later,
so every image is inferred several times; the first image's outputs are kept from an early inference too.
"""

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from android_bench import adb, benchmark_model
from android_bench.benchmark_model import BenchmarkError, Feed
from android_bench.session import Binary, Session
from mess_runtime import terminal
from mess_runtime.bundle import IMAGE, SIGNATURE, segment_signature
from mess_runtime.engines import Tensor, open_interpreter
from mess_runtime.verify import Outputs, Ran

RUNS = 5  # after one of warm-up


@dataclasses.dataclass(frozen=True)
class Layout:
    """A graph's inputs and outputs by name, in the order in which the tool reads and writes them."""

    inputs: tuple[tuple[str, Tensor], ...]
    outputs: tuple[tuple[str, Tensor], ...]

    @classmethod
    def of(cls, path: Path) -> "Layout":
        """Reads it from a file with one signature."""
        interpreter = open_interpreter(path, 1)
        runner = interpreter.get_signature_runner(SIGNATURE)

        def named(tensors: Sequence[dict[str, Any]], by_name: Mapping[str, dict[str, Any]]) -> tuple[tuple[str, Tensor], ...]:
            names = {each["index"]: name for name, each in by_name.items()}
            return tuple((names[each["index"]], Tensor(np.dtype(each["dtype"]).name, tuple(map(int, each["shape"])))) for each in tensors)

        return cls(
            named(interpreter.get_input_details(), runner.get_input_details()),
            named(interpreter.get_output_details(), runner.get_output_details()),
        )

    def split(self, content: bytes | None) -> dict[str, np.ndarray]:
        """The outputs in what the tool wrote.

        Raises:
          BenchmarkError: it is not as long as they are.
        """
        sizes = [np.dtype(tensor.dtype).itemsize * math.prod(tensor.shape) for _, tensor in self.outputs]
        if content is None or len(content) != sum(sizes):
            raise BenchmarkError(f"the file of outputs must hold {sum(sizes)} bytes, got {'none' if content is None else len(content)}")
        ends = np.cumsum(sizes)
        return {
            name: np.frombuffer(content[end - size : end], tensor.dtype).reshape(tensor.shape)
            for (name, tensor), size, end in zip(self.outputs, sizes, ends, strict=True)
        }


def run_segments(session: Session, segments: Mapping[str, Path], images: Sequence[np.ndarray], names: Sequence[str]) -> Ran:
    """Runs all segments on every image on a phone.

    Args:
      session: with the backend in its settings.
      segments: file by exit, in their order.
      images: as the network takes them, [1, H, W, 3].
      names: of the images, for errors.

    Returns:
      The outputs of the first image after two inferences, and those of every image after `RUNS` more than one. A tool that fails, writes
      too little or falls back to the CPU is a fault of the backend, after which nothing more is run.

    Raises:
      AdbError: the phone cannot be used any more.
    """
    layouts = {exit: Layout.of(path) for exit, path in segments.items()}
    backend = session.options.settings.backend
    shares, turns = [], []
    with session.program({path.name: path for path in segments.values()}) as program:
        runtime = f"{program.name} sha256 {benchmark_model.file_sha256(program.path)[:16]}"
        work = [(images[0], names[0], 1), *((image, name, RUNS) for image, name in zip(images, names, strict=True))]
        with terminal.Bar(session.device.serial, len(work), "image", say=session.say) as bar:
            for image, name, runs in work:
                tensors, outputs = {IMAGE: image}, {}
                for exit, path in segments.items():
                    if session.stopped.is_set():
                        raise adb.AdbError(session.device.serial, "verify", "stopped")
                    try:
                        made, share = _run(session, program, path, layouts[exit], tensors, runs)
                    except BenchmarkError as error:
                        return Ran([], runtime, session.phone.name, None, (f"{path.stem}: {name}: {error}",))
                    shares.append(share)
                    tensors |= made
                    outputs[segment_signature(exit)] = made
                turns.append(outputs)
                bar.advance(name, f"image {len(turns)}/{len(work)} {name} on={backend}")
    accelerated = None if None in shares else sum(shares) / len(shares)
    return Ran(turns, runtime, session.phone.name, accelerated, ())


def _run(
    session: Session, program: Binary, path: Path, layout: Layout, tensors: Outputs, runs: int
) -> tuple[dict[str, np.ndarray], float | None]:
    """The outputs of one segment, and the share of its operations that ran on the backend."""
    settings = dataclasses.replace(session.options.settings, num_runs=runs, min_secs=0.0, warmup_runs=1)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for number, (name, tensor) in enumerate(layout.inputs):
            file = Path(folder) / f"input{number}.bin"
            file.write_bytes(np.ascontiguousarray(tensors[name], tensor.dtype).tobytes())
            files[file.name] = file
        session.device.push(files)
    inputs = tuple((tensor.shape, f"{adb.FOLDER}/{file}") for file, (_, tensor) in zip(files, layout.inputs, strict=True))
    feed = Feed(inputs, f"{adb.FOLDER}/{adb.OUTPUT_FILE}")
    output = program.run(f"run {path.stem}", f"{adb.FOLDER}/{path.name}", settings, feed=feed)
    measurement = benchmark_model.parse(*output, settings.backend)
    if measurement.fell_back(settings.backend):
        raise BenchmarkError(f"asked for {settings.backend}, ran on {measurement.backend_obtained}")
    return layout.split(session.device.pull(adb.OUTPUT_FILE)), benchmark_model.accelerated(output[0], settings.backend)
