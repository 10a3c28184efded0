"""Latency of .tflite files on this machine, and latency.json, the table that the search reads."""

import contextlib
import dataclasses
import itertools
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

import mess_runtime
from mess_runtime import terminal
from mess_runtime.bundle import FORMAT, check, check_sha256, decode_versioned, file_sha256, read_json, write_json
from mess_runtime.engines import MAX_THREADS, RUNTIME, Interpreter, open_interpreter, runtime_version
from mess_runtime.files import locked

BACKEND = "xnnpack"
WARMUP = 3


@dataclasses.dataclass(frozen=True)
class LatencyRow:
    """Latency of one submodel on one device.

    Attributes:
      submodel: file name without `.tflite`.
      sha256, size_bytes: of the file.
      device: host name or model; soc: processor; os: system and release.
      runtime, runtime_version: of the interpreter.
      backend_requested, backend_obtained: `xnnpack`, `cpu`, or what a phone offers; obtained is `unknown` where the runtime does not tell.
      threads: of the interpreter.
      p50_ms, p90_ms, mean_ms: of the interpreter's invocation alone, over `runs` samples; p90 is None where the tool does not tell it.
      runs: number of samples.
      temperature_c: hottest sensor in degrees Celsius when the file was last measured, None where there is none.
      drift: median of the last round's samples over that of the first's; above 1 the device has slowed down. None with a single round.
      sustained_s: seconds of full load before the measurement; 0 means the speed of a cool device.
    """

    submodel: str
    sha256: str
    size_bytes: int
    device: str
    soc: str
    os: str
    runtime: str
    runtime_version: str
    backend_requested: str
    backend_obtained: str
    threads: int
    p50_ms: float
    p90_ms: float | None
    mean_ms: float
    runs: int
    temperature_c: float | None
    drift: float | None = None
    sustained_s: float = 0.0

    def __post_init__(self):
        check_sha256(self.sha256)
        for name in ("size_bytes", "threads", "p50_ms", "p90_ms", "mean_ms", "runs", "drift"):
            value = getattr(self, name)
            check(value is None or value > 0, name, "positive", value)
        check(self.p90_ms is None or self.p50_ms <= self.p90_ms, "p50_ms", f"at most p90_ms = {self.p90_ms}", self.p50_ms)
        check(self.sustained_s >= 0, "sustained_s", "at least 0", self.sustained_s)

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What makes a row the successor of another: sha256, device, threads and the backend asked for."""
        return self.sha256, self.device, self.threads, self.backend_requested


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """The content of latency.json.

    Attributes:
      created_by: versions of what last wrote it.
      rows: no two with the same sha256, device, threads and backend asked for.
    """

    created_by: dict[str, str]
    rows: tuple[LatencyRow, ...]

    def __post_init__(self):
        keys = [row.key for row in self.rows]
        check(len(set(keys)) == len(keys), "rows", "different in sha256, device, threads or backend_requested", keys)

    def to_json(self) -> dict[str, Any]:
        """Returns the table as JSON values."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Reads what `to_json` made.

        Raises:
          ValueError: the format is another one, a key is unknown or missing, or a value is not allowed.
        """
        return decode_versioned(cls, value, "latency")

    @classmethod
    def load(cls, path: str | os.PathLike, flag: str = "--latency") -> Self:
        """Reads a latency.json.

        Args:
          path: of the file.
          flag: that names another one.

        Raises:
          ValueError: there is no such file, or it is none; the message begins with the flag.
        """
        with terminal.reading(flag, "a latency.json, which `python -m mess_runtime benchmark` or `android_bench run` makes"):
            return read_json(path, cls.from_json)

    def merged(self, rows: Sequence[LatencyRow]) -> Self:
        """Returns a table of this program with `rows` in it, and of the rows here those that none of them replaces."""
        merged = {row.key: row for row in (*self.rows, *rows)}
        return dataclasses.replace(self, created_by=created_by(), rows=tuple(merged.values()))


def created_by() -> dict[str, str]:
    """Returns the versions that a file written here records."""
    return {
        "mess_runtime": mess_runtime.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str:
    """The commit of the source tree that this package is part of; a copy elsewhere has none."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "rev-parse", "--show-prefix", "HEAD"]
    try:
        prefix, commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError, ValueError):
        return "unknown"
    return commit if prefix == "tflite/mess_runtime/" else "unknown"


def measure(
    paths: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    threads: int = 1,
    runs: int = 50,
    min_seconds: float = 0.5,
    rounds: int = 5,
) -> LatencyTable:
    """Measures files, see `benchmark_files`, and puts their rows into a latency.json, which is made if there is none.

    Raises:
      ValueError: as `benchmark_files`, or `output` is something else.
    """

    def table() -> LatencyTable:
        return LatencyTable.load(output, "--output") if os.path.exists(output) else LatencyTable({}, ())

    table()  # a broken file is found before the work
    rows = benchmark_files(paths, threads, runs=runs, min_seconds=min_seconds, rounds=rounds, progress=True)
    with locked(output):  # others may have measured meanwhile
        merged = table().merged(rows)
        write_json(output, merged.to_json())
    return merged


def device_name() -> str:
    """The name of this machine in latency.json."""
    return platform.node() or "unknown"


def benchmark_files(
    paths: Sequence[str | os.PathLike],
    threads: int = 1,
    warmup: int = WARMUP,
    runs: int = 50,
    min_seconds: float = 0.5,
    rounds: int = 5,
    progress: bool = False,
) -> list[LatencyRow]:
    """Measures files in turns, so that drift of the machine meets all of them alike; one is loaded at a time.

    Args:
      paths: files with a single signature each. Of files with equal content only the first is measured.
      threads: of the interpreter.
      warmup: invocations after each loading that are not counted.
      runs, min_seconds: least number and least total time of a file's samples, spread over the rounds.
      rounds: turns.
      progress: shows a bar on a terminal, elsewhere a line after every file of every round.

    Returns:
      A row per file, over the samples of all rounds.

    Raises:
      ValueError: an argument is out of range, a file cannot be loaded, or it has several signatures.
    """
    for name, value, least in (("threads", threads, 1), ("warmup", warmup, 0), ("runs", runs, 1), ("rounds", rounds, 1)):
        check(value >= least, name, f"at least {least}", value)
    check(threads <= MAX_THREADS, "threads", f"at most {MAX_THREADS}", threads)
    check(0 <= min_seconds < math.inf, "min_seconds", "at least 0 and finite", min_seconds)
    files = {}
    for path in paths:
        files.setdefault(file_sha256(path), Path(path))
    samples, medians = ({sha256: [] for sha256 in files} for _ in range(2))
    backends, temperatures = {}, {}
    begin, total = time.perf_counter(), rounds * len(files)
    with terminal.Bar("measure", total, "file") if progress else contextlib.nullcontext() as bar:
        for count, (number, (sha256, path)) in enumerate(itertools.product(range(1, rounds + 1), files.items()), start=1):
            interpreter = open_interpreter(path, threads)
            latest = _sample(path, interpreter, warmup, math.ceil(runs / rounds), min_seconds / rounds)
            samples[sha256] += latest
            medians[sha256].append(float(np.median(latest)))
            backends[sha256] = _backend(interpreter)
            temperatures[sha256] = _temperature_c()
            if bar:
                eta = (time.perf_counter() - begin) / count * (total - count)
                note = f"{path.stem} p50_ms={np.median(samples[sha256]):.3f}"
                bar.advance(note, f"round {number}/{rounds} {note} eta_s={eta:.0f}")
    machine = {
        "device": device_name(),
        "soc": _soc(),
        "os": f"{platform.system()} {platform.release()}",
        "runtime": RUNTIME,
        "runtime_version": runtime_version(),
    }
    return [
        LatencyRow(
            submodel=path.stem,
            sha256=sha256,
            size_bytes=path.stat().st_size,
            **machine,
            backend_requested=BACKEND,
            backend_obtained=backends[sha256],
            threads=threads,
            p50_ms=float(np.percentile(samples[sha256], 50)),
            p90_ms=float(np.percentile(samples[sha256], 90)),
            mean_ms=float(np.mean(samples[sha256])),
            runs=len(samples[sha256]),
            temperature_c=temperatures[sha256],
            drift=medians[sha256][-1] / medians[sha256][0] if rounds > 1 else None,
        )
        for sha256, path in files.items()
    ]


def _sample(path: Path, interpreter: Interpreter, warmup: int, runs: int, min_seconds: float) -> list[float]:
    """Latencies in ms of at least `runs` invocations that take at least `min_seconds` together."""
    signatures = list(interpreter.get_signature_list())
    check(len(signatures) <= 1, f"{path}: signatures", "a single one, since only the first would be measured", signatures)
    generator = np.random.default_rng(0)
    for details in interpreter.get_input_details():
        shape, dtype = details["shape"], np.dtype(details["dtype"])
        values = generator.random(shape) if dtype.kind == "f" else generator.integers(0, 128, shape)
        interpreter.set_tensor(details["index"], values.astype(dtype))
    for _ in range(warmup):
        interpreter.invoke()
    samples, total = [], 0.0
    while len(samples) < runs or total < min_seconds * 1e3:
        start = time.perf_counter_ns()
        interpreter.invoke()
        samples.append((time.perf_counter_ns() - start) / 1e6)
        total += samples[-1]
    return samples


def _backend(interpreter: Interpreter) -> str:
    """The only delegate that the interpreter takes by itself is XNNPACK: a delegated node means that it runs part of the graph or all."""
    try:
        operations = interpreter._get_ops_details()
    except AttributeError:
        return "unknown"
    return BACKEND if any(operation["op_name"] == "DELEGATE" for operation in operations) else "cpu"


def _soc() -> str:
    """The processor's name, as far as the system tells; on boards the device tree's model."""
    for path, field in (("/proc/device-tree/model", ""), ("/proc/cpuinfo", "model name")):
        if Path(path).is_file():
            for line in Path(path).read_text(errors="replace").splitlines():
                if line.startswith(field):
                    return line.rpartition(":")[2].strip(" \t\0")
    return platform.processor() or platform.machine()


def _temperature_c() -> float | None:
    """The hottest thermal zone of Linux in degrees Celsius."""
    readings = []
    for path in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        try:
            readings.append(int(path.read_text()) / 1000)
        except (OSError, ValueError):
            continue
    return max(readings, default=None)
