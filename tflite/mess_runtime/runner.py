"""Runs a bundle: one interpreter per segment, features handed from one to the next, three settings."""

import dataclasses
import math
import os
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

from mess_runtime.bundle import ANYTIME, BUDGETED, CONFIDENT_PIXELS, IMAGE, INPUT_DEPENDENT, MASK, SETTINGS, SIGNATURE, Bundle, check

try:
    from ai_edge_litert.interpreter import Interpreter

    RUNTIME = "ai-edge-litert"
except ModuleNotFoundError:
    try:
        from tflite_runtime.interpreter import Interpreter
    except ModuleNotFoundError:
        raise ImportError("an interpreter is needed: install ai-edge-litert or tflite-runtime, see requirements.txt") from None
    RUNTIME = "tflite-runtime"

# The first run touches the memory, the second has a typical latency.
WARMUP_RUNS = 2


@dataclasses.dataclass(frozen=True)
class StepTrace:
    """One executed segment.

    Attributes:
      exit: name of the exit at its end.
      confidence: share of confident pixels in 0..1, None where the segment does not count them.
      latency_ms: from its inputs (the float image, features) to the mask at the network's size.
    """

    exit: str
    confidence: float | None
    latency_ms: float


@dataclasses.dataclass(frozen=True)
class Result:
    """The answer for one image.

    Attributes:
      mask: uint8 [h, w], class indices at the size of the image.
      exit: name of the exit that made the mask.
      trace: every segment that was run, in order.
      latency_ms: sum over the trace.
    """

    mask: np.ndarray
    exit: str
    trace: tuple[StepTrace, ...]
    latency_ms: float


def open_interpreter(path: str | os.PathLike, threads: int) -> Interpreter:
    """Returns an interpreter of a .tflite with its tensors allocated.

    Raises:
      ValueError: the file is not a model, or needs operations that the runtime does not have.
    """
    try:
        interpreter = Interpreter(os.fspath(path), num_threads=threads)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {RUNTIME} cannot load it: {' '.join(str(error).split())}") from error
    return interpreter


class _Stage:
    """A segment in its interpreter. Tensors are known by their signature names, since their order in the file is arbitrary."""

    def __init__(self, path: os.PathLike, threads: int):
        self.path = path
        self.interpreter = open_interpreter(path, threads)
        signatures = list(self.interpreter.get_signature_list())
        check(signatures == [SIGNATURE], f"{path}: signatures", f"[{SIGNATURE!r}]", signatures)
        # The signature runner dies with this method: while one lives, invoke() refuses to run.
        runner = self.interpreter.get_signature_runner(SIGNATURE)
        self.inputs = runner.get_input_details()
        self.outputs = runner.get_output_details()

    def input(self, name: str) -> np.ndarray:
        """A view into the interpreter; it must not be held, for invoke() refuses to run while one exists."""
        return self.interpreter.tensor(self.inputs[name]["index"])()

    def output(self, name: str) -> np.ndarray:
        """A view like `input`."""
        return self.interpreter.tensor(self.outputs[name]["index"])()

    def check_tensor(self, details: dict, name: str, dtype: type, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless the named tensor exists with this type and shape."""
        check(name in details, f"{self.path}: tensors", f"with {name!r}", sorted(details))
        received = details[name]["dtype"].__name__, tuple(details[name]["shape"].tolist())
        check(received == (dtype.__name__, shape), f"{self.path}: {name}", f"{dtype.__name__} {list(shape)}", received)


class Runner:
    """Executes a bundle, image after image, on one thread of Python.

    No segment runs twice for an image. A feature is copied only when a segment that takes it runs, straight from output to input.
    """

    def __init__(self, bundle: Bundle, threads: int = 1):
        """Loads and warms up every segment.

        Args:
          bundle: the checked folder.
          threads: of each interpreter.

        Raises:
          ValueError: a segment cannot be loaded, or its inputs and outputs do not fit the manifest or the segments before it.
        """
        check(threads >= 1, "threads", "at least 1", threads)
        manifest = bundle.manifest
        self.segments = manifest.segments
        self.setting = manifest.setting
        self._height, self._width = manifest.input.height, manifest.input.width
        self._image = np.zeros((1, self._height, self._width, 3), np.float32)
        self._stages = [_Stage(bundle.path(segment), threads) for segment in self.segments]
        self._sources = self._wire()
        pixels = self._height * self._width
        self._needed = [None if s.theta_img is None else math.ceil(s.theta_img * pixels - 1e-9) for s in self.segments]
        self._turn = 0
        self._fastest_ms = [math.inf] * len(self.segments)
        for _ in range(WARMUP_RUNS):
            for index in range(len(self.segments)):
                self._step(index)

    def run(self, image: np.ndarray, setting: str | None = None, exit: str | None = None, deadline_ms: float | None = None) -> Result:
        """Segments one image.

        Args:
          image: uint8 [h, w, 3], RGB, any size; resized bilinearly for the network, and the mask back by nearest neighbours.
          setting: `input-dependent` leaves at the first exit with enough confident pixels, `budgeted` at the exit named,
            `anytime` gives the latest result that was finished by the deadline; by default what the manifest says.
          exit: where to leave, for `budgeted`; by default at the last.
          deadline_ms: for `anytime`, counted like the latency in the result. A segment that cannot make it even in the least time it
            ever took is not started; one that turns out late is in the trace, but its mask does not count. The first exit always counts.

        Returns:
          The mask, with what was run for it.

        Raises:
          ValueError: the image has another type or shape, or the options do not go together.
        """
        setting = self.setting if setting is None else setting
        check(setting in SETTINGS, "setting", f"one of {', '.join(SETTINGS)}", setting)
        last = len(self.segments) - 1
        if exit is not None:
            check(setting == BUDGETED, "exit", f"left out unless the setting is {BUDGETED}", exit)
            exits = [segment.exit for segment in self.segments]
            check(exit in exits, "exit", f"one of {', '.join(exits)}", exit)
            last = exits.index(exit)
        if setting == ANYTIME:
            check(deadline_ms is not None and deadline_ms > 0, "deadline_ms", f"positive milliseconds for {ANYTIME}", deadline_ms)
        else:
            check(deadline_ms is None, "deadline_ms", f"left out unless the setting is {ANYTIME}", deadline_ms)
        if setting == INPUT_DEPENDENT:
            check(None not in self._needed[:-1], "setting", f"{BUDGETED} or {ANYTIME}, as the bundle has no theta_img", setting)

        self._take(image)
        trace, spent_ms, stands = [], 0.0, 0
        for index in range(last + 1):
            if index and deadline_ms is not None and spent_ms + self._fastest_ms[index] > deadline_ms:
                break
            trace.append(self._step(index))
            spent_ms += trace[-1].latency_ms
            if index and deadline_ms is not None and spent_ms > deadline_ms:
                break
            stands = index
            if setting == INPUT_DEPENDENT and self._leaves(index):
                break
        return self._result(stands, trace, image)

    def refine(self, image: np.ndarray) -> Iterator[Result]:
        """Yields a result after each segment, the last one being the best; stop iterating to save the rest.

        Args:
          image: uint8 [h, w, 3], RGB, any size.

        Raises:
          ValueError: the image has another type or shape.
          RuntimeError: this runner was given another image in the meantime.
        """
        self._take(image)
        turn, trace = self._turn, []
        for index in range(len(self.segments)):
            if self._turn != turn:
                raise RuntimeError("refine: the runner was given another image, whose features have replaced this one's")
            trace.append(self._step(index))
            yield self._result(index, trace, image)

    def _wire(self) -> list[dict[str, _Stage | None]]:
        """Returns, per segment and input name, the stage that makes the input (None for the image), after checking every tensor."""
        size = (self._height, self._width)
        makers, sources = {}, []
        for segment, stage in zip(self.segments, self._stages, strict=True):
            stage.check_tensor(stage.outputs, MASK, np.uint8, (1, *size))
            if CONFIDENT_PIXELS in stage.outputs or segment.theta_img is not None:
                stage.check_tensor(stage.outputs, CONFIDENT_PIXELS, np.int32, (1,))
            for name, details in stage.inputs.items():
                if name == IMAGE:
                    stage.check_tensor(stage.inputs, IMAGE, np.float32, (1, *size, 3))
                    continue
                check(name in makers, f"{stage.path}: input {name!r}", f"{IMAGE!r} or made by a segment before", sorted(makers))
                made = makers[name].outputs[name]
                stage.check_tensor(stage.inputs, name, made["dtype"], tuple(made["shape"].tolist()))
                check(
                    details["quantization"] == made["quantization"],
                    f"{stage.path}: {name} quantization",
                    str(made["quantization"]),
                    details["quantization"],
                )
            sources.append({name: makers.get(name) for name in stage.inputs})
            for name in stage.outputs.keys() - {MASK, CONFIDENT_PIXELS}:
                check(name not in makers, f"{stage.path}: output {name!r}", "made by one segment only", name)
                makers[name] = stage
        return sources

    def _take(self, image: np.ndarray) -> None:
        """Makes the image, resized to the network's input, the one that the next steps work on."""
        received = f"{image.dtype} {list(image.shape)}"
        fits = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size > 0
        check(fits, "image", "uint8 [h, w, 3]", received)
        size = (self._width, self._height)
        if image.shape[1::-1] != size:
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        self._image[0] = image
        self._turn += 1

    def _step(self, index: int) -> StepTrace:
        """Runs one segment; those before it must have run on the same image."""
        stage = self._stages[index]
        start = time.perf_counter_ns()
        for name, maker in self._sources[index].items():
            np.copyto(stage.input(name), self._image if maker is None else maker.output(name))
        stage.interpreter.invoke()
        latency_ms = (time.perf_counter_ns() - start) / 1e6
        self._fastest_ms[index] = min(self._fastest_ms[index], latency_ms)
        confidence = self._confident_pixels(index) / (self._height * self._width) if CONFIDENT_PIXELS in stage.outputs else None
        return StepTrace(self.segments[index].exit, confidence, latency_ms)

    def _confident_pixels(self, index: int) -> int:
        return int(self._stages[index].output(CONFIDENT_PIXELS)[0])

    def _leaves(self, index: int) -> bool:
        needed = self._needed[index]
        return needed is not None and self._confident_pixels(index) >= needed

    def _result(self, index: int, trace: list[StepTrace], image: np.ndarray) -> Result:
        mask = _resize_nearest(self._stages[index].output(MASK)[0], *image.shape[:2])
        return Result(mask, self.segments[index].exit, tuple(trace), sum(step.latency_ms for step in trace))


def _resize_nearest(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A copy in which every pixel has the class at its centre, in whole numbers because Pillow's rounding is off at some sizes."""
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip((height, width), mask.shape, strict=True))
    return mask.take(columns, axis=1).take(rows, axis=0)
