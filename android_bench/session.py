"""Measuring on one phone: order, heat, repetitions, and what is kept of them.

All submodels are measured once per repetition, in an order shuffled anew each time, so that a phone that heats up slows all alike, and the
last repetition against the first shows by how much. Every run is kept as soon as it ends, with the temperatures before it, in a file
beside latency.json; a submodel gets its row there after its last repetition. The same command again measures only what is missing.
"""

import contextlib
import dataclasses
import random
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from android_bench import adb, benchmark_model
from android_bench.benchmark_model import BenchmarkError, Feed, Measurement, OpTime, Settings
from mess_runtime import terminal
from mess_runtime.benchmark import LatencyRow, LatencyTable, created_by
from mess_runtime.bundle import FORMAT, check, decode_versioned, file_sha256, read_json, write_json
from mess_runtime.files import locked

PROGRAM = "benchmark_model"
THROTTLED = 1.1  # median drift from which a phone counts as throttled
FAILURES_IN_A_ROW = 3
COOLDOWN_POLL_S = 10.0
LOG_POLL_S = 0.5
LOADING_S = 60.0  # what a run of the tool may take beside warm-up and measurement
_APP_ENDED = re.compile(r"Inference timings in us|Benchmarking failed|FATAL EXCEPTION")


class TooHotError(adb.AdbError):
    """The phone does not cool down."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What `run` and `verify` are asked to do on every phone.

    Attributes:
      settings: of the tool.
      tool: the benchmark_model to push, or `tflite` or `litert` for the one that its makers offer.
      app: the benchmark app to measure with instead.
      libraries: files to put beside the tool, such as an accelerator's.
      repetitions: runs of the tool per submodel.
      sustained_s: seconds of full load before the first run; 0 measures a cool phone.
      max_battery_c: a run waits until the battery is no warmer, and until Android throttles nothing.
      max_cooldown_s: longest such wait.
      details: also run each submodel once for the time per operation and the peak memory.
      keep: leave the files on the phone.
      by_model: all phones of a model are one device, so that another of them goes on where one has stopped.
      cache: folder of fetched tools.
    """

    settings: Settings
    tool: str
    app: Path | None
    libraries: tuple[Path, ...]
    repetitions: int
    sustained_s: float
    max_battery_c: float
    max_cooldown_s: float
    details: bool
    keep: bool
    by_model: bool
    cache: Path

    def __post_init__(self):
        check(self.repetitions >= 1, "repetitions", "at least 1", self.repetitions)
        check(self.sustained_s >= 0, "sustained", "at least 0", self.sustained_s)
        check(self.app is None or not self.libraries, "library", "left out with the app, which holds its own", [*map(str, self.libraries)])
        check(self.app is None or self.tool == benchmark_model.TFLITE, "tool", "left out with the app", self.tool)
        check(self.app is None or self.settings.cpus == "all", "cpus", "all with the app, which Android places", self.settings.cpus)
        for path in (*self.libraries, *([self.app] if self.app else [])):
            check(path.is_file(), str(path), "an existing file", "none")


# === What is kept ===


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What two runs must share to be repetitions of each other.

    Attributes:
      tool: `tflite benchmark_model`, `litert benchmark_model` or `tflite benchmark app`.
      tool_sha256: of its file.
      settings: of the run.
      sustained_s: seconds of full load before the first run.
    """

    tool: str
    tool_sha256: str
    settings: Settings
    sustained_s: float


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the tool.

    Attributes:
      device: name of the phone; submodel, sha256: of the file; repetition: from 1.
      conditions: of the run.
      before: temperatures when it started.
      measurement: what it gave.
    """

    device: str
    submodel: str
    sha256: str
    repetition: int
    conditions: Conditions
    before: adb.Thermal
    measurement: Measurement


@dataclasses.dataclass(frozen=True)
class Details:
    """What a run with profiling gave; op_times are empty and peak_memory_mb is None where the tool did not print them."""

    device: str
    submodel: str
    sha256: str
    conditions: Conditions
    peak_memory_mb: float | None
    op_times: tuple[OpTime, ...]


@dataclasses.dataclass(frozen=True)
class RunLog:
    """The content of the file of runs beside latency.json."""

    created_by: dict[str, str]
    runs: tuple[Run, ...]
    details: tuple[Details, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the log as JSON values."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Reads what `to_json` made.

        Raises:
          ValueError: the format is another one, a key is unknown or missing, or a value is not allowed.
        """
        return decode_versioned(cls, value, "runs")


class Store:
    """latency.json and the runs behind it, shared by the phones of one command; without a path, in memory only."""

    def __init__(self, path: Path | None):
        """Reads what is there.

        Raises:
          ValueError: a file is broken.
        """
        self.path = path
        self.runs_path = path and path.with_suffix(".runs.json")
        self._lock = threading.Lock()
        self._table, self._log = LatencyTable({}, ()), RunLog({}, (), ())
        self._serials: dict[str, str] = {}  # by name of the phone
        self._read()

    def _read(self) -> None:
        if self.path and self.path.exists():
            self._table = read_json(self.path, LatencyTable.from_json)
        if self.runs_path and self.runs_path.exists():
            self._log = read_json(self.runs_path, RunLog.from_json)

    def claim(self, device: str, serial: str) -> None:
        """Raises ValueError if another phone of this command has the same name: their latencies could not be told apart."""
        with self._lock:
            other = self._serials.setdefault(device, serial)
        check(
            other == serial, "device", f"another name than that of {other}; measure them one after the other, in files of their own", device
        )

    @contextlib.contextmanager
    def _updating(self) -> Iterator[None]:
        """Keeps other threads and processes out, and starts from what they have written."""
        with self._lock, locked(self.path) if self.path else contextlib.nullcontext():
            self._read()
            yield

    def runs(self, device: str, conditions: Conditions) -> list[Run]:
        """Returns the runs of a phone under these conditions."""
        return [run for run in self._log.runs if (run.device, run.conditions) == (device, conditions)]

    def details(self, device: str, conditions: Conditions) -> list[Details]:
        """Returns likewise the runs with profiling."""
        return [each for each in self._log.details if (each.device, each.conditions) == (device, conditions)]

    def check_rows(self, device: str, conditions: Conditions) -> None:
        """Raises ValueError if latency.json has rows of this phone that must not stand beside new ones."""
        ours = _row_conditions(conditions)
        for row in self._table.rows:
            if (row.device, row.threads, row.backend_requested) == (device, conditions.settings.threads, conditions.settings.backend):
                theirs = {name: getattr(row, name) for name in ours}
                check(theirs == ours, f"{self.path}: rows of {device}", f"measured with {ours}, or in another --output", theirs)
        asked = conditions.settings
        for settings in (run.conditions.settings for run in self._log.runs if run.device == device):
            if (settings.threads, settings.backend) == (asked.threads, asked.backend):
                ours, theirs = ({"cpus": each.cpus, "flags": each.extra} for each in (asked, settings))
                check(theirs == ours, f"{self.runs_path}: runs of {device}", f"measured with {ours}, or in another --output", theirs)

    def add(self, runs: Iterable[Run] = (), details: Iterable[Details] = (), rows: Iterable[LatencyRow] = ()) -> None:
        """Adds to both files."""
        runs, details, rows = tuple(runs), tuple(details), tuple(rows)
        with self._updating():
            if runs or details:
                self._log = RunLog(created_by(), self._log.runs + runs, self._log.details + details)
                if self.runs_path:
                    write_json(self.runs_path, self._log.to_json())
            if rows:
                self._table = self._table.merged(rows)
                if self.path:
                    write_json(self.path, self._table.to_json())

    def forget(self, runs: Sequence[Run]) -> None:
        """Takes runs out, so that they are measured again."""
        with self._updating():
            self._log = dataclasses.replace(self._log, runs=tuple(run for run in self._log.runs if run not in runs))
            if self.runs_path:
                write_json(self.runs_path, self._log.to_json())


def _row_conditions(conditions: Conditions) -> dict[str, Any]:
    """What a row keeps of the conditions, beside the threads."""
    return {
        "runtime": conditions.tool,
        "runtime_version": f"sha256 {conditions.tool_sha256[:16]}",
        "backend_requested": conditions.settings.backend,
        "sustained_s": conditions.sustained_s,
    }


def make_row(phone: adb.Phone, path: Path, runs: Sequence[Run]) -> LatencyRow:
    """Joins all repetitions of one submodel: the median of their medians, and the mean of all their samples."""
    measured = [run.measurement for run in runs]
    samples = sum(each.runs for each in measured)
    backends = {each.backend_obtained for each in measured}
    return LatencyRow(
        submodel=path.stem,
        sha256=runs[0].sha256,
        size_bytes=path.stat().st_size,
        device=phone.name,
        soc=phone.soc,
        os=phone.os,
        **_row_conditions(runs[0].conditions),
        backend_obtained=backends.pop() if len(backends) == 1 else benchmark_model.UNKNOWN,
        threads=runs[0].conditions.settings.threads,
        p50_ms=statistics.median(each.p50_ms for each in measured),
        p90_ms=None,
        mean_ms=sum(each.mean_ms * each.runs for each in measured) / samples,
        runs=samples,
        temperature_c=runs[-1].before.hottest_c,
        drift=measured[-1].p50_ms / measured[0].p50_ms if len(measured) > 1 else None,
    )


# === The two ways to run ===


class Binary:
    """benchmark_model, pushed to the phone and started from its shell."""

    def __init__(self, device: adb.Device, phone: adb.Phone, options: Options):
        fetched = options.tool in (benchmark_model.TFLITE, benchmark_model.LITERT)
        self.path = benchmark_model.fetch(options.tool, phone.abis, options.cache) if fetched else Path(options.tool)
        check(self.path.is_file(), "tool", f"{benchmark_model.TFLITE}, {benchmark_model.LITERT} or an existing file", options.tool)
        self.device = device
        told = options.settings.cpus != "big" or phone.big_cpus() is not None
        check(told, "cpus", f"all or a mask with {phone.name}, which tells no slowest kind of CPU", "big")
        self.cpus = {"all": None, "big": phone.big_cpus()}.get(options.settings.cpus, options.settings.cpus)
        self.files = {PROGRAM: self.path} | {path.name: path for path in options.libraries}

    def install(self) -> None:
        """Reads what the pushed tool can do."""
        _, usage = self.device.execute("read usage", PROGRAM, ["--help"], adb.SHELL_SECONDS)
        self.tool = benchmark_model.read_usage(usage)
        self.name = f"{self.tool.kind} benchmark_model"

    def uninstall(self) -> None:
        """Nothing is outside of the folder that is removed."""

    def run(
        self, step: str, graph: str, settings: Settings, details: bool = False, feed: Feed | None = None
    ) -> tuple[str, int | None, bytes | None]:
        """Returns the output, exit code and result file of one run."""
        writes = "result_file_path" in self.tool.flags
        result_file = f"{adb.FOLDER}/{adb.RESULT_FILE}" if writes else None
        words = benchmark_model.arguments(self.tool, settings, graph, result_file, details, feed)
        try:
            code, text = self.device.execute(step, PROGRAM, words, 2 * settings.max_secs + LOADING_S, self.cpus)
        except adb.TimedOutError as error:
            self.device.stop()
            raise BenchmarkError(str(error)) from error
        return text, code, self.device.pull(adb.RESULT_FILE) if writes and code == 0 else None


class App:
    """The benchmark app, whose output is in the phone's log."""

    name = "tflite benchmark app"

    def __init__(self, device: adb.Device, options: Options):
        self.device, self.path, self.files = device, options.app, {}

    def install(self) -> None:
        """Installs the app."""
        self.device.install(self.path)

    def uninstall(self) -> None:
        """Removes the app."""
        self.device.uninstall()

    def run(self, step: str, graph: str, settings: Settings, details: bool = False) -> tuple[str, int | None, bytes | None]:
        """Returns the log of one run; there is no exit code and no result file."""
        words = benchmark_model.arguments(benchmark_model.APP_TOOL, settings, graph, None, details)
        self.device.start_app(step, words)
        deadline = time.monotonic() + 2 * settings.max_secs + LOADING_S
        try:
            while not _APP_ENDED.search(text := self.device.read_log(step)):
                if time.monotonic() > deadline:
                    raise BenchmarkError(f"the log has no result after {2 * settings.max_secs + LOADING_S:.0f} s")
                time.sleep(LOG_POLL_S)
            time.sleep(LOG_POLL_S)  # an error follows the result
            text = self.device.read_log(step)
        finally:
            self.device.stop_app()
        return text, None, None


# === One phone ===


def program_of(device: adb.Device, phone: adb.Phone, options: Options) -> Binary | App:
    """What will measure; nothing is on the phone yet.

    Raises:
      BenchmarkError, ValueError: there is no such tool, or it cannot be fetched.
    """
    return App(device, options) if options.app else Binary(device, phone, options)


class Session:
    """Measures submodels on one phone."""

    def __init__(self, device: adb.Device, options: Options, store: Store, say: Callable[[str], None], stopped: threading.Event):
        """Does nothing yet.

        Args:
          device: the phone.
          options: see there.
          store: where runs and rows go.
          say: receives progress and warnings, line by line.
          stopped: when set, the session ends after the current run.
        """
        self.device, self.options, self.store, self.stopped = device, options, store, stopped
        self.say = lambda line: say(f"{device.serial} {line}")
        self.problems: list[str] = []

    def measure(self, paths: Sequence[Path]) -> list[LatencyRow]:
        """Measures files, and leaves nothing behind on the phone.

        Args:
          paths: submodels; of files with equal content only the first counts.

        Returns:
          A row per file whose repetitions are complete. `problems` then lists what went wrong with the others, and who fell back to
          the CPU.

        Raises:
          AdbError, BenchmarkError, ValueError: nothing more can be measured on this phone; what was measured is kept.
        """
        submodels: dict[str, Path] = {}
        for path in paths:
            submodels.setdefault(file_sha256(path), path)
        with self.program({f"{sha256}.tflite": path for sha256, path in submodels.items()}) as program:
            return self._measure(program, submodels)

    @contextlib.contextmanager
    def program(self, files: Mapping[str, Path]) -> Iterator[Binary | App]:
        """A tool that is ready on the phone, with files of these plain names beside it; nothing of it stays.

        Raises:
          AdbError, BenchmarkError, ValueError: see `measure`.
        """
        self.device.stop()
        self.phone = self.device.read_phone(self.options.by_model)
        self.store.claim(self.phone.name, self.device.serial)
        program = program_of(self.device, self.phone, self.options)
        try:
            copied = self.device.push({**files, **program.files})
            self.say(f"{self.phone.name}: {self.phone.soc}, {self.phone.os}; {copied} files copied")
            program.install()
            yield program
        except BaseException:
            with contextlib.suppress(adb.AdbError):
                self._clean(program)
            raise
        self._clean(program)

    def _clean(self, program: Binary | App) -> None:
        if not self.options.keep:
            self.device.clean()
            program.uninstall()

    def _measure(self, program: Binary | App, submodels: Mapping[str, Path]) -> list[LatencyRow]:
        conditions = Conditions(program.name, file_sha256(program.path), self.options.settings, self.options.sustained_s)
        self.store.check_rows(self.phone.name, conditions)
        earlier = [run for run in self.store.runs(self.phone.name, conditions) if run.sha256 in submodels]
        self.store.forget([run for run in earlier if run.measurement.fell_back(conditions.settings.backend)])
        rows = self._rows(conditions, submodels)
        self.store.add(rows=rows.values())
        missing = self._missing(conditions, submodels)
        if missing and conditions.sustained_s:
            self._heat(program, max(submodels, key=lambda sha256: submodels[sha256].stat().st_size))
        self._repeat(program, conditions, submodels, missing)
        if self.options.details:
            self._profile(program, conditions, submodels)
        return list(self._report(conditions, submodels).values())

    def _rows(self, conditions: Conditions, submodels: Mapping[str, Path]) -> dict[str, LatencyRow]:
        """Rows, by hash, of the submodels whose repetitions are complete."""
        wanted = range(1, self.options.repetitions + 1)
        runs = {(run.sha256, run.repetition): run for run in self.store.runs(self.phone.name, conditions)}
        complete = [sha256 for sha256 in submodels if all((sha256, repetition) in runs for repetition in wanted)]
        return {sha256: make_row(self.phone, submodels[sha256], [runs[sha256, repetition] for repetition in wanted]) for sha256 in complete}

    def _missing(self, conditions: Conditions, submodels: Mapping[str, Path]) -> list[tuple[int, str]]:
        """Repetition and hash of what is still to be measured, in order."""
        there = {(run.repetition, run.sha256) for run in self.store.runs(self.phone.name, conditions)}
        order = []
        for repetition in range(1, self.options.repetitions + 1):
            shuffled = sorted(submodels)
            random.Random(f"{self.phone.name} {repetition}").shuffle(shuffled)
            order += [(repetition, sha256) for sha256 in shuffled]
        return [each for each in order if each not in there]

    def _repeat(self, program: Binary | App, conditions: Conditions, submodels: Mapping[str, Path], missing: Sequence) -> None:
        with terminal.Bar(self.device.serial, len(missing), "run", say=self.say) as bar:
            self._run_all(program, conditions, submodels, missing, bar)

    def _run_all(
        self, program: Binary | App, conditions: Conditions, submodels: Mapping[str, Path], missing: Sequence, bar: terminal.Bar
    ) -> None:
        begin, failed, in_a_row = time.monotonic(), set(), 0
        for count, (repetition, sha256) in enumerate(missing, 1):
            if sha256 in failed:
                bar.advance(line="")
                continue
            if self.stopped.is_set():
                raise adb.AdbError(self.device.serial, "measure", "stopped; the same command goes on from here")
            name = submodels[sha256].stem
            before = self._cool()
            try:
                output = program.run(f"measure {name}", f"{adb.FOLDER}/{sha256}.tflite", conditions.settings)
                measurement = benchmark_model.parse(*output, conditions.settings.backend)
            except BenchmarkError as error:
                failed.add(sha256)
                in_a_row += 1
                self._problem(f"measure {name}: {error}")
                bar.advance(line="")
                if in_a_row == FAILURES_IN_A_ROW:
                    raise BenchmarkError(f"{self.device.serial}: {in_a_row} submodels in a row failed") from error
                continue
            in_a_row = 0
            self.store.add([Run(self.phone.name, name, sha256, repetition, conditions, before, measurement)])
            if sha256 in (rows := self._rows(conditions, {sha256: submodels[sha256]})):
                self.store.add(rows=rows.values())
            eta = (time.monotonic() - begin) / count * (len(missing) - count)
            warm = "-" if before.battery_c is None else f"{before.battery_c:.1f}"
            note = f"{name} p50_ms={measurement.p50_ms:.3f} on={measurement.backend_obtained} battery_c={warm}"
            bar.advance(note, f"repetition {repetition}/{self.options.repetitions} {count}/{len(missing)} {note} eta_s={eta:.0f}")

    def _cool(self) -> adb.Thermal:
        """Waits until the phone is cool, unless the speed of a hot one is asked for, and returns its temperatures."""
        begin, limit = time.monotonic(), self.options.max_battery_c
        while True:
            thermal = self.device.read_thermal()
            hot = (thermal.battery_c or 0) > limit or (thermal.status or 0) > 0
            if not hot or self.options.sustained_s:
                return thermal
            state = f"battery {thermal.battery_c} °C (at most {limit:g}), throttling status {thermal.status} (must be 0)"
            if time.monotonic() - begin >= self.options.max_cooldown_s:
                problem = f"after {self.options.max_cooldown_s:.0f} s still too hot: {state}"
                raise TooHotError(self.device.serial, "cool down", problem)
            self.say(f"waiting to cool: {state}")
            time.sleep(COOLDOWN_POLL_S)

    def _heat(self, program: Binary | App, sha256: str) -> None:
        """Runs the largest submodel for as long as asked."""
        seconds = self.options.sustained_s
        self.say(f"full load for {seconds:.0f} s")
        settings = dataclasses.replace(self.options.settings, num_runs=1, min_secs=seconds, max_secs=seconds)
        output = program.run("full load", f"{adb.FOLDER}/{sha256}.tflite", settings)
        benchmark_model.parse(*output, settings.backend)

    def _profile(self, program: Binary | App, conditions: Conditions, submodels: Mapping[str, Path]) -> None:
        there = {each.sha256 for each in self.store.details(self.phone.name, conditions)}
        for sha256, path in submodels.items():
            if sha256 in there:
                continue
            try:
                output = program.run(f"profile {path.stem}", f"{adb.FOLDER}/{sha256}.tflite", conditions.settings, details=True)
                benchmark_model.parse(*output, conditions.settings.backend)
            except BenchmarkError as error:
                self._problem(f"profile {path.stem}: {error}")
                continue
            op_times, peak = benchmark_model.parse_details(output[0])
            self.store.add(details=[Details(self.phone.name, path.stem, sha256, conditions, peak, op_times)])
            slowest = max(op_times, key=lambda each: each.mean_ms, default=None)
            self.say(f"profile {path.stem} peak_memory_mb={peak} slowest={slowest and slowest.node_type}")

    def _report(self, conditions: Conditions, submodels: Mapping[str, Path]) -> dict[str, LatencyRow]:
        """Says what must be known about the rows, and returns them."""
        rows = self._rows(conditions, submodels)
        runs = [run for run in self.store.runs(self.phone.name, conditions) if run.sha256 in rows]
        asked = conditions.settings.backend
        fallen = {run.submodel for run in runs if run.measurement.fell_back(asked)}
        if fallen:
            self._problem(f"measure: asked for {asked}, ran on cpu: {', '.join(sorted(fallen))} (their rows say so)")
        others = {run.submodel: run.measurement.backend_obtained for run in runs if run.submodel not in fallen}
        others = [f"{name} ({backend})" for name, backend in sorted(others.items()) if backend != asked]
        if others:
            self.say(f"WARNING: asked for {asked}, the log shows something else: {', '.join(others)}")
        drift = statistics.median([row.drift for row in rows.values() if row.drift] or [1.0])
        if drift > THROTTLED or any(run.before.status for run in runs):
            self.say(f"WARNING: throttled: the last repetition took {drift:.2f} times as long as the first (drift in latency.json)")
        return rows

    def _problem(self, text: str) -> None:
        self.problems.append(f"{self.device.serial}: {text}")
        self.say(f"FAILED {text}")
