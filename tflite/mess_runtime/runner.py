"""Runs a bundle: budgeted, anytime and input-dependent, each segment once per image, features handed from one to the next."""

import contextlib
import itertools
import math
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mess_runtime import terminal
from mess_runtime.bundle import (
    ANYTIME,
    BUDGETED,
    CONFIDENT_PIXELS,
    GONE,
    IMAGE,
    INPUT_DEPENDENT,
    MASK,
    SETTINGS,
    SURE,
    Bundle,
    Manifest,
    alone_signature,
    check,
    segment_signature,
)
from mess_runtime.engines import CPU, MAX_THREADS, MEASURED, AbsentError, CompiledEngine, InterpreterEngine, Tensor, open_engine
from mess_runtime.images import fit, mask_at

# The first run touches the memory, the second has a typical latency.
WARMUP_RUNS = 2
# What is not used of the share that may go on is kept for as many images as this.
HELD_IMAGES = 100
# Of how sure a cell is: a sum of as many float32 as it has pixels.
SURE_ROUNDING = 1e-5


class LatencyRow(Protocol):
    """What is read of a row of latency.json, see `mess_runtime.benchmark`."""

    sha256: str
    device: str
    threads: int
    backend_requested: str
    p50_ms: float


class StepTrace(NamedTuple):
    """One executed signature.

    Attributes:
      exit: name of the exit at its end.
      confidence: share of confident pixels in 0..1, with regions of the cells that are sure; None where neither is known.
      latency_ms: of the signature, from its inputs (the image at the network's size, features) to the mask at that size.
      budget: with regions, how many cells it worked on; None without.
      active: with regions, how many cells had no answer yet, at the first exit all; None without.
    """

    exit: str
    confidence: float | None
    latency_ms: float
    budget: int | None = None
    active: int | None = None

    def to_json(self) -> dict[str, str | float | None]:
        """As JSON values; what is only known with regions is left out without them."""
        of_regions = () if self.budget is not None else ("budget", "active")
        return {name: value for name, value in self._asdict().items() if name not in of_regions}


class Result(NamedTuple):
    """The answer for one image.

    Attributes:
      mask: uint8 [h, w], class indices at the size of the image.
      exit: name of the exit that made the mask.
      trace: every signature that was run, in order.
      latency_ms: sum over the trace.
      cells: with regions, uint8 [rows, columns], which exit, by position in the manifest, each cell has its answer from; None without.
    """

    mask: np.ndarray
    exit: str
    trace: tuple[StepTrace, ...]
    latency_ms: float
    cells: np.ndarray | None = None


def _open(bundle: Bundle, threads: int, engine: str | None, backend: str | None) -> tuple[str, CompiledEngine | InterpreterEngine]:
    """An engine and its backend: as asked for, or that of the manifest if this machine has it."""
    predicted = bundle.manifest.predicted
    recorded = predicted.backend if backend is None and predicted else None
    wanted = backend or MEASURED.get(recorded or CPU)
    try:
        if wanted is not None:
            return wanted, open_engine(bundle.path, threads, engine, wanted)
        problem = f"it is none of {', '.join(MEASURED)}"
    except ValueError as error:
        if backend is not None or wanted == CPU:
            raise
        problem = str(error)
    terminal.complain(f"mess_runtime: on the CPU, as the backend {recorded} that the search chose is not there: {problem}")
    return CPU, open_engine(bundle.path, threads, engine)


class Runner:
    """Executes a bundle, image after image. Threads may share it: one image is worked on at a time.

    With regions, each cell of the image leaves at the first exit that is sure of it. The next segment takes the smallest budget that holds
    the other cells, and its mask counts where it worked. When no cell is left, the image is done, in the anytime setting too.

    Attributes:
      backend: that it runs on.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int = 1,
        engine: str | None = None,
        latency: Sequence[LatencyRow] = (),
        hold_latency: bool = False,
        backend: str | None = None,
    ):
        """Loads and warms up every segment.

        Args:
          bundle: the checked folder.
          threads: of the runtime.
          engine: see `engines.open_engine`.
          latency: rows of latency.json, for `latency_budget_ms`.
          hold_latency: in the input-dependent setting, lets no more images go on than the search expected. Thresholds alone keep the
            accuracy when images get harder, as in the dark, and the latency rises; with this it is the other way round. Of any first T
            images, at most T times the expected share go on beyond an exit; of any T in a row, 100 times that share more. With regions,
            parts of images count: the budget is the largest one that keeps this, and what it has no room for leaves.
          backend: see `engines.open_engine`; None for the one that the search chose, or with a warning the CPU where it is not there.
            On a GPU the features stay in its memory; the host reads a count per segment and a mask.

        Raises:
          ValueError: the file cannot be loaded, its signatures do not fit the manifest, or nothing was expected whose latency can be held.
        """
        check(1 <= threads <= MAX_THREADS, "threads", f"between 1 and {MAX_THREADS}", threads)
        manifest = bundle.manifest
        self.manifest, self.threads, self.latency = manifest, threads, tuple(latency)
        self._path, self._input = bundle.path, manifest.input
        with self._loading():
            self.backend, self._engine = _open(bundle, threads, engine, backend)
        self._pixels = self._input.height * self._input.width
        self._shape = (1, self._input.height, self._input.width, 3)
        self._lock = threading.Lock()
        self._exits = manifest.exits
        self._regions = manifest.regions
        self._forms = [self._forms_of(index) for index in range(len(self._exits))]
        self._signatures = [[*forms.values()][-1] for forms in self._forms]  # of the whole image
        self._needed = needed_pixels(manifest)
        self._going_on: list[float] | None = None  # expected shares, by segment
        if hold_latency:
            check(manifest.predicted is not None, "hold_latency", "left out, as the manifest holds no prediction", hold_latency)
            self._going_on = [1 - share for share in itertools.accumulate(manifest.predicted.exit_rates)]
        self._credit = [0.0] * len(manifest.segments)  # images that may still go on
        self._fastest_ms: dict[str, float] = {}
        self._tensors: dict[str, object] = {}  # the image and features by name, as the engine holds them
        self._outputs: dict[str, dict[str, object]] = {}  # by signature
        self._read: dict[str, dict[str, np.ndarray]] = {}  # of the outputs, likewise
        self._turn = 0
        made = {IMAGE: Tensor(self._input.dtype, self._shape)}
        own = () if self._regions else (MASK, CONFIDENT_PIXELS)
        with self._loading():
            for forms, needed in zip(self._forms, self._needed, strict=True):
                for signature in forms.values():
                    self._prepare(signature, needed is not None, made)
                made |= {name: tensor for name, tensor in self._engine.outputs[signature].items() if name not in own}
            self._image = np.zeros(self._shape, self._input.dtype)  # not before the file has agreed to its size
            self._warm_up([[*forms.values()] for forms in self._forms])

    def _forms_of(self, index: int) -> dict[int, str]:
        """The signatures of a segment by number of cells, rising; one that can only be dense has no other budgets in the file."""
        exit = self._exits[index]
        if not self._regions or not index:
            return {self._regions.cells if self._regions else 0: segment_signature(exit)}
        named = {budget: segment_signature(exit, budget) for budget in self._regions.budgets}
        return {budget: name for budget, name in named.items() if name in self._engine.inputs or budget == self._regions.cells}

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        """Names the file where the runtime cannot make ready or run what is in it."""
        try:
            yield
        except AbsentError:
            raise
        except (ValueError, RuntimeError, MemoryError) as error:
            if str(self._path) in str(error):
                raise
            raise ValueError(f"{self._path}: must run, got {' '.join(str(error).split()) or type(error).__name__}") from error

    def run(
        self,
        image: np.ndarray,
        setting: str | None = None,
        exit: str | None = None,
        latency_budget_ms: float | None = None,
        deadline_ms: float | None = None,
    ) -> Result:
        """Segments one image.

        Args:
          image: uint8 [h, w, 3], RGB, any size; fitted to the network as the manifest says, and the mask back by nearest neighbours.
          setting: `input-dependent` leaves at the first exit with enough confident pixels, `budgeted` runs to one exit, without
            the heads before it where the file has `alone.EXIT` and in any case on the whole image, `anytime` gives the latest result that
            was finished by the deadline; by default what the manifest says.
          exit: the exit for `budgeted`; by default the last.
          latency_budget_ms: instead of `exit`: takes the best exit whose latency.json median keeps it, see `exit_within`.
          deadline_ms: for `anytime`, counted like the latency in the result. A segment that cannot make it even in the least time it
            ever took is not started; one that turns out late is in the trace, but its mask does not count. The first exit always counts.
            With regions, the largest budget that can make it is taken where the one that holds all cells cannot.

        Returns:
          The mask, with what was run for it.

        Raises:
          ValueError: the image has another type or shape, or the options do not go together, or the mask has a value that is no class.
        """
        setting, exit = self.plan(setting, exit, latency_budget_ms, deadline_ms)
        with self._lock:
            return self._budgeted(image, exit) if exit else self._in_turn(image, setting, deadline_ms)

    def plan(
        self,
        setting: str | None = None,
        exit: str | None = None,
        latency_budget_ms: float | None = None,
        deadline_ms: float | None = None,
    ) -> tuple[str, str | None]:
        """What these options of `run` come to for every image: the setting, and for `budgeted` the exit.

        Raises:
          ValueError: they do not go together.
        """
        setting = self.manifest.setting if setting is None else setting
        check(setting in SETTINGS, "setting", f"one of {', '.join(SETTINGS)}", setting)
        holds = self._going_on is not None
        check(not holds or setting == INPUT_DEPENDENT, "hold_latency", f"left out unless the setting is {INPUT_DEPENDENT}", setting)
        for name, value, fits in (
            ("exit", exit, BUDGETED),
            ("latency_budget_ms", latency_budget_ms, BUDGETED),
            ("deadline_ms", deadline_ms, ANYTIME),
        ):
            check(value is None or setting == fits, name, f"left out unless the setting is {fits}", value)
        if setting == BUDGETED:
            check(exit is None or latency_budget_ms is None, "latency_budget_ms", "left out where the exit is given", latency_budget_ms)
            if latency_budget_ms is not None:
                measured = len(self._exits) == 1 or alone_signature(self._exits[-1]) in self._engine.inputs
                check(measured, "latency_budget_ms", "left out for a file without alone.EXIT, whose latencies these are", latency_budget_ms)
                exit = exit_within(self.manifest, self.latency, latency_budget_ms, self.threads, self.backend)
            exit = self._exits[-1] if exit is None else exit
            check(exit in self._exits, "exit", f"one of {', '.join(self._exits)}", exit)
        elif setting == ANYTIME:
            check(deadline_ms is not None and deadline_ms > 0, "deadline_ms", f"positive milliseconds for {ANYTIME}", deadline_ms)
        else:
            check(None not in self._needed[:-1], "setting", f"{BUDGETED} or {ANYTIME}, as the bundle has no theta_img", setting)
        return setting, exit

    def _in_turn(self, image: np.ndarray, setting: str, deadline_ms: float | None) -> Result:
        """Runs segment after segment until the setting says stop."""
        self._take(image)
        if self._going_on is not None:
            self._credit = [min(had + share, HELD_IMAGES * share) for had, share in zip(self._credit, self._going_on, strict=True)]

        trace, spent_ms, stands, active = [], 0.0, "", self._regions.cells if self._regions else 0
        for index, forms in enumerate(self._forms):
            able = forms
            if index and deadline_ms is not None:
                able = {budget: name for budget, name in able.items() if spent_ms + self._fastest_ms[name] <= deadline_ms}
            if index and self._regions and self._going_on is not None:
                able = {budget: name for budget, name in able.items() if self._share(stands, budget) <= self._credit[index - 1] + 1e-9}
            if not able:
                break
            budget = next((budget for budget in able if budget >= active), max(able))
            if index and self._regions and self._going_on is not None:
                self._credit[index - 1] -= self._share(stands, budget)
            trace.append(self._step(able[budget], budget, active))
            spent_ms += trace[-1].latency_ms
            if index and deadline_ms is not None and spent_ms > deadline_ms:
                break
            stands = able[budget]
            if self._regions:
                active = self._unsure(stands)
                if not active:
                    break
            elif setting == INPUT_DEPENDENT and self._leaves(index):
                break
        return self._result(stands, trace, image)

    def _unsure(self, signature: str) -> int:
        """Number of cells that have no answer yet behind a signature; the last exit answers all."""
        if SURE not in self._outputs[signature]:
            return 0
        theta = self.manifest.segments[self._exits.index(_exit_of(signature))].theta_img
        return int(np.count_nonzero(self._sure(signature) < theta - SURE_ROUNDING))

    def _share(self, signature: str, budget: int) -> float:
        """Share of the image that a budget would give another answer, behind a signature."""
        return min(budget, int(np.count_nonzero(self._sure(signature) < GONE))) / self._regions.cells

    def _sure(self, signature: str) -> np.ndarray:
        return self._get(signature, SURE)

    def _leaves(self, index: int) -> bool:
        """Whether the image that has reached a segment's exit leaves there."""
        needed = self._needed[index]
        if needed is None or self._confident_pixels(self._signatures[index]) >= needed:
            return True
        if self._going_on is None:
            return False
        if self._credit[index] < 1 - 1e-9:
            return True
        self._credit[index] -= 1
        return False

    def refine(self, image: np.ndarray) -> Iterator[Result]:
        """Yields a result after each segment, the last one being the best; stop iterating to save the rest. With regions, it ends when no
        cell is left.

        Args:
          image: uint8 [h, w, 3], RGB, any size.

        Raises:
          ValueError: the image has another type or shape.
          RuntimeError: this runner was given another image in the meantime.
        """
        with self._lock:
            self._take(image)
            turn, trace, active = self._turn, [], self._regions.cells if self._regions else 0
        for forms in self._forms:
            with self._lock:
                if self._turn != turn:
                    raise RuntimeError("refine: the runner was given another image, whose features have replaced this one's")
                budget = next(budget for budget in forms if budget >= active)
                trace.append(self._step(forms[budget], budget, active))
                result = self._result(forms[budget], trace, image)
                active = self._unsure(forms[budget]) if self._regions else 0
            yield result
            if self._regions and not active:
                break

    def _budgeted(self, image: np.ndarray, exit: str) -> Result:
        signature = alone_signature(exit)
        if signature not in self._engine.inputs:
            self._take(image)
            cells = self._regions.cells if self._regions else 0
            trace = [self._step(segment, cells, cells) for segment in self._signatures[: self._exits.index(exit) + 1]]
            return self._result(self._signatures[len(trace) - 1], trace, image)
        if signature not in self._fastest_ms:
            with self._loading():
                self._prepare(signature, False, {IMAGE: Tensor(self._input.dtype, self._shape)})
                self._warm_up([[signature]])
        self._take(image)
        return self._result(signature, [self._step(signature)], image)

    def _prepare(self, signature: str, decides: bool, available: dict[str, Tensor]) -> None:
        """Readies a signature after checking that its inputs are there and that it makes what a decision needs."""
        engine, where = self._engine, f"{self._path}: {signature}"
        check(signature in engine.inputs, f"{self._path}: signatures", f"with {signature!r}", sorted(engine.inputs))
        engine.prepare(signature)
        self._fastest_ms[signature] = math.inf
        for name, tensor in engine.inputs[signature].items():
            check(available.get(name) == tensor, f"{where}: input {name!r}", f"one of {available}", tensor)
        expected = {MASK: Tensor("uint8", self._shape[:3])}
        if self._regions:
            expected |= {SURE: Tensor("float32", (1, *self._regions.grid))} if decides else {}
        elif decides or CONFIDENT_PIXELS in engine.outputs[signature]:
            expected[CONFIDENT_PIXELS] = Tensor("int32", (1,))
        for name, tensor in expected.items():
            received = engine.outputs[signature].get(name)
            check(received == tensor, f"{where}: output {name!r}", str(tensor), received)

    def _warm_up(self, segments: Sequence[Sequence[str]]) -> None:
        """Runs every form of each segment on what the segment before made: its own answer may have another size."""
        for _ in range(WARMUP_RUNS):
            self._tensors = {IMAGE: self._engine.put(self._signatures[0], IMAGE, self._image)}
            for forms in segments:
                before = self._tensors
                for signature in forms:
                    self._tensors = dict(before)
                    self._step(signature)

    def _take(self, image: np.ndarray) -> None:
        """Makes the image, fitted to the network's input, the one that the next steps work on."""
        if not isinstance(image, np.ndarray):
            raise ValueError(f"image: must be a NumPy array, uint8 [h, w, 3], got {type(image).__name__}")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"image: must be uint8 [h, w, 3], got {image.dtype} {list(image.shape)}")
        pixels = fit(image, self._image.shape[1:3], self._input.resize)[None]
        if pixels.dtype != self._image.dtype:
            np.copyto(self._image, pixels)
            pixels = self._image
        self._tensors = {IMAGE: self._engine.put(self._signatures[0], IMAGE, pixels)}
        self._turn += 1

    def _step(self, signature: str, budget: int = 0, active: int = 0) -> StepTrace:
        """Runs one signature; what it reads must have been made from the same image. 0 cells: they do not leave.

        A GPU may still be at work when `run` returns: what is read then, inside of the time taken, waits for it.
        """
        engine, tensors = self._engine, self._tensors
        inputs = {name: tensors[name] for name in engine.inputs[signature]}
        start = time.perf_counter_ns()
        outputs = engine.run(signature, inputs)
        self._outputs[signature], self._read[signature] = outputs, {}
        self._get(signature, next(name for name in (CONFIDENT_PIXELS, SURE, MASK) if name in outputs))
        latency_ms = (time.perf_counter_ns() - start) / 1e6
        tensors |= outputs
        if latency_ms < self._fastest_ms[signature]:
            self._fastest_ms[signature] = latency_ms
        confidence = self._confident_pixels(signature) / self._pixels if CONFIDENT_PIXELS in outputs else None
        if SURE in outputs:
            confidence = 1 - self._unsure(signature) / self._regions.cells
        return StepTrace(_exit_of(signature), confidence, latency_ms, budget or None, active if budget else None)

    def _get(self, signature: str, name: str) -> np.ndarray:
        """What the last run of a signature made, read once."""
        read = self._read[signature]
        if name not in read:
            read[name] = self._engine.get(signature, name, self._outputs[signature][name])
        return read[name]

    def _confident_pixels(self, signature: str) -> int:
        return int(self._get(signature, CONFIDENT_PIXELS)[0])

    def _result(self, signature: str, trace: list[StepTrace], image: np.ndarray) -> Result:
        mask = self._get(signature, MASK)[0]
        classes, top = len(self.manifest.classes), int(mask.max())  # of values that are not finite there may be no class
        check(top < classes, f"{self._path}: {signature}: mask", f"of classes 0 to {classes - 1}", top)
        mask = mask_at(mask, image.shape[:2], self._input.resize)
        exit = _exit_of(signature)
        cells = self._cells(exit, trace) if self._regions else None
        return Result(mask, exit, tuple(trace), sum(step.latency_ms for step in trace), cells)

    def _cells(self, exit: str, trace: Sequence[StepTrace]) -> np.ndarray:
        """Which exit each cell has its answer from, once those up to `exit` have run: a segment works on the least sure cells."""
        last = self._exits.index(exit)
        if len(trace) <= last:  # by a signature of this exit alone
            return np.full(self._regions.grid, last, np.uint8)
        cells = np.zeros(self._regions.cells, np.uint8)
        for index in range(1, last + 1):
            sure = self._sure(self._forms[index - 1][trace[index - 1].budget]).ravel()
            least = np.argsort(sure, kind="stable")[: trace[index].budget]
            cells[least[sure[least] < GONE]] = index
        return cells.reshape(self._regions.grid)


def _exit_of(signature: str) -> str:
    """Name of the exit at the end of `segment.EXIT`, `segment.EXIT.BUDGET` or `alone.EXIT`."""
    return signature.split(".")[1]


def exit_within(manifest: Manifest, rows: Sequence[LatencyRow], latency_budget_ms: float, threads: int, backend: str = CPU) -> str:
    """Chooses the best exit that keeps a latency budget.

    Args:
      manifest: of the bundle.
      rows: of latency.json, with the `alone.EXIT` submodels measured at this number of threads, on one device or on this one, by one
        backend or by that of the runtime, on the CPU XNNPACK.
      latency_budget_ms: for one image.
      threads, backend: of the runtime.

    Returns:
      The name of the exit with the highest measured mIoU (the deepest one where mIoU was not measured) among those whose median latency
      is within the budget.

    Raises:
      ValueError: a submodel was not measured, or none is fast enough.
    """
    rows = [row for row in rows if row.threads == threads]
    if len({row.device for row in rows}) > 1:
        rows = [row for row in rows if row.device == platform.node()]
    if len({row.backend_requested for row in rows}) > 1:
        rows = [row for row in rows if row.backend_requested == ("xnnpack" if backend == CPU else backend)]
    measured = {row.sha256: row.p50_ms for row in rows}
    missing = [segment.exit for segment in manifest.segments if segment.alone_sha256 not in measured]
    check(
        not missing, "latency", f"with rows of this bundle's alone.EXIT submodels at {threads} threads on this device", f"none of {missing}"
    )
    latencies = {segment.exit: measured[segment.alone_sha256] for segment in manifest.segments}
    fastest = min(latencies, key=latencies.get)
    check(latencies[fastest] <= latency_budget_ms, "latency_budget_ms", f"at least {latencies[fastest]:g} for {fastest}", latency_budget_ms)
    fast = [(segment.miou or 0.0, index) for index, segment in enumerate(manifest.segments) if latencies[segment.exit] <= latency_budget_ms]
    return manifest.exits[max(fast)[1]]


def needed_pixels(manifest: Manifest) -> list[int | None]:
    """Confident pixels from which on an image leaves at each segment, None where there is no decision."""
    pixels = manifest.input.height * manifest.input.width
    return [None if each.theta_img is None else math.ceil(each.theta_img * pixels - 1e-9) for each in manifest.segments]
