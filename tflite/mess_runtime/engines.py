"""What runs a .tflite with several signatures: LiteRT's CompiledModel, or an Interpreter of one of three packages."""

import dataclasses
import importlib.metadata
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mess_runtime.bundle import check

try:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    RUNTIME = "ai-edge-litert"
except ModuleNotFoundError:
    try:
        from tflite_runtime.interpreter import Interpreter, OpResolverType

        RUNTIME = "tflite-runtime"
    except ModuleNotFoundError:
        try:
            import tensorflow

            Interpreter, OpResolverType = tensorflow.lite.Interpreter, tensorflow.lite.experimental.OpResolverType
            RUNTIME = "tensorflow"
        except ModuleNotFoundError:
            raise ImportError("an interpreter is needed: install ai-edge-litert or tflite-runtime, see requirements.txt") from None
try:
    from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, HardwareAccelerator, Options
except ModuleNotFoundError:
    CompiledModel = None

# XNNPACK packs weights for each signature anew otherwise; in memory it can only share them where the system has memfd_create.
SHARED_WEIGHTS = ":memory:" if sys.platform == "linux" else ""
MAX_THREADS = 256  # runtimes crash where the system has no more
COMPILED, INTERPRETER = ENGINES = ("compiled", "interpreter")
CPU, GPU = BACKENDS = ("cpu", "gpu")
MEASURED = {"xnnpack": CPU, "cpu": CPU, "gpu": GPU}  # by the names of latency.json, those that are backends here
NEEDS = "needs ai-edge-litert 2.1.6 or newer and a GPU with a driver for Vulkan"
_REFUSALS = (ValueError, RuntimeError, MemoryError)  # of a runtime that cannot load a file


class AbsentError(ValueError):
    """The machine does not have a backend, or it does not take the file."""


def runtime_version() -> str:
    """The version of the interpreter's package, a nightly one too; `unknown` where it tells none."""
    for name in (RUNTIME, f"{RUNTIME}-nightly"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def not_finite(value: np.ndarray) -> int:
    """How many values are not finite, or the largest of their type, at which TensorFlow Lite's kernels hold what is above."""
    if not np.issubdtype(value.dtype, np.floating):
        return 0
    return int(value.size - (np.abs(value) < np.finfo(value.dtype).max).sum())


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Type and shape of an input or output."""

    dtype: str
    shape: tuple[int, ...]


class InterpreterEngine:
    """Signature runners of one interpreter. Tensors between signatures are NumPy arrays, copied out and in.

    With `keep`, every tensor inside stays to be looked at, at the price of memory and of kernels that are slower than XNNPACK's.
    """

    def __init__(self, path: str | os.PathLike, threads: int, keep: bool = False):
        self._path, self._interpreter = path, open_interpreter(path, threads, keep)
        signatures = self._interpreter.get_signature_list()
        self._runners = {}
        self.inputs: dict[str, dict[str, Tensor]] = {}
        self.outputs: dict[str, dict[str, Tensor]] = {}
        for name, tensors in signatures.items():
            self.inputs[name] = dict.fromkeys(tensors["inputs"])
            self.outputs[name] = dict.fromkeys(tensors["outputs"])

    def prepare(self, signature: str) -> None:
        """Makes a signature ready to run and describes its inputs and outputs."""
        runner = self._interpreter.get_signature_runner(signature)
        for tensors, details in ((self.inputs, runner.get_input_details()), (self.outputs, runner.get_output_details())):
            tensors[signature] = {
                name: Tensor(np.dtype(each["dtype"]).name, tuple(int(side) for side in each["shape"])) for name, each in details.items()
            }
        self._runners[signature] = runner

    def put(self, signature: str, name: str, value: np.ndarray) -> Any:
        """Turns an array into what `run` takes for such an input of this or another signature."""
        return value

    def run(self, signature: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs a prepared signature on inputs from `put` or from another run."""
        return self._runners[signature](**inputs)

    def get(self, signature: str, name: str, value: Any) -> np.ndarray:
        """Turns an output of `run` into an array that stays as it is."""
        return value

    def not_finite(self) -> dict[str, tuple[str, int, int]]:
        """With `keep`: the first tensor of each signature that is not finite, weights included, after its last run.

        Returns:
          By signature: name of the tensor, how many of its values are not, of how many.
        """
        content, found = Path(self._path).read_bytes(), {}
        model = _offset(content, 0)
        graphs = _tables(content, model, 2)
        for definition in _tables(content, model, 7):
            field = _field(content, definition, 4)
            graph = int.from_bytes(content[field : field + 4], "little") if field else 0
            for number, tensor in enumerate(_tables(content, graphs[graph], 0)):
                field = _field(content, tensor, 1)
                if field and content[field] not in _FLOATS:
                    continue
                try:
                    value = self._interpreter.get_tensor(number, graph)
                except ValueError:  # one that no operation has made
                    continue
                if wrong := not_finite(value):
                    found[_string(content, definition, 2)] = _string(content, tensor, 3), wrong, value.size
                    break
        return found


class CompiledEngine:
    """LiteRT's CompiledModel. What one signature makes, another reads from the same buffer, on a GPU in its memory.

    Attributes:
      fully_accelerated: whether no operation was left to the CPU of those that another backend was to run.
    """

    def __init__(self, path: str | os.PathLike, threads: int, backend: str = CPU):
        verify(path)
        accelerators = HardwareAccelerator.CPU if backend == CPU else HardwareAccelerator.GPU | HardwareAccelerator.CPU
        cpu = CpuOptions(num_threads=threads, xnnpack_weight_cache_path=SHARED_WEIGHTS)
        options = Options(hardware_accelerators=accelerators, cpu_options=cpu)
        try:
            self._model = CompiledModel.from_file(os.fspath(path), options=options)
        except _REFUSALS as error:
            if backend == CPU:
                raise _cannot_load(path, error) from error
            raise AbsentError(f"backend: must be {CPU} on this machine, got {backend!r}, which {NEEDS}") from error
        self.fully_accelerated = self._model.is_fully_accelerated()
        signatures = self._model.get_signature_list()
        self._inputs: dict[str, Any] = {}  # of `put`
        self._outputs: dict[str, dict[str, Any]] = {}  # by signature
        self._layouts: dict[tuple[str, str], tuple[int, np.dtype, tuple[int, ...]]] = {}  # of outputs
        self.inputs: dict[str, dict[str, Tensor]] = {name: dict.fromkeys(tensors["inputs"]) for name, tensors in signatures.items()}
        self.outputs: dict[str, dict[str, Tensor]] = {name: dict.fromkeys(tensors["outputs"]) for name, tensors in signatures.items()}

    def prepare(self, signature: str) -> None:
        """Like `InterpreterEngine.prepare`."""
        model = self._model
        for tensors, details in (
            (self.inputs, model.get_input_tensor_details(signature)),
            (self.outputs, model.get_output_tensor_details(signature)),
        ):
            tensors[signature] = {
                name: Tensor(str(np.dtype(details[name]["dtype"]).name), tuple(int(side) for side in details[name]["shape"]))
                for name in tensors[signature]
            }
        for name, tensor in self.outputs[signature].items():
            self._layouts[signature, name] = math.prod(tensor.shape), np.dtype(tensor.dtype), tensor.shape
        self._outputs[signature] = {name: model.create_output_buffer_by_name(signature, name) for name in self.outputs[signature]}

    def put(self, signature: str, name: str, value: np.ndarray) -> Any:
        """Like `InterpreterEngine.put`; the next call for an input of this name overwrites what this one returned."""
        if name not in self._inputs:
            self._inputs[name] = self._model.create_input_buffer_by_name(signature, name)
        self._inputs[name].write(value)
        return self._inputs[name]

    def run(self, signature: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Like `InterpreterEngine.run`; the next run of the same signature overwrites what this one returned."""
        outputs = self._outputs[signature]
        self._model.run_by_name(signature, inputs, outputs)
        return outputs

    def get(self, signature: str, name: str, value: Any) -> np.ndarray:
        """Like `InterpreterEngine.get`."""
        size, dtype, shape = self._layouts[signature, name]
        return value.read(size, dtype).reshape(shape)


def open_engine(path: str | os.PathLike, threads: int, engine: str | None = None, backend: str = CPU) -> InterpreterEngine | CompiledEngine:
    """Opens a .tflite with several signatures.

    Args:
      path: of the file.
      threads: to run on.
      engine: `compiled`, `interpreter`, or the faster of those that are installed.
      backend: `cpu`, or `gpu`, for which `compiled` is needed; what it cannot run stays on the CPU.

    Raises:
      ValueError: the file is not a model, needs operations that the runtime does not have, or the engine or backend is not there.
    """
    check(backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", backend)
    if engine is None:
        engine = COMPILED if CompiledModel else INTERPRETER
    if engine == COMPILED and CompiledModel is None:
        raise ValueError(f"engine: must be {INTERPRETER} without ai-edge-litert, got {engine!r}")
    if engine == COMPILED:
        return CompiledEngine(path, threads, backend)
    check(backend == CPU, "backend", f"{CPU} for the engine {INTERPRETER}", backend)
    return InterpreterEngine(path, threads)


def verify(path: str | os.PathLike) -> None:
    """Checks that a file is a whole flatbuffer of a model, which CompiledModel does not: it would end the process.

    Raises:
      ValueError: it is not.
    """
    _load(path)


def open_interpreter(path: str | os.PathLike, threads: int, keep: bool = False) -> Interpreter:
    """Returns an interpreter of a .tflite with its tensors allocated. `keep`: see `InterpreterEngine`.

    Raises:
      ValueError: the file is not a model, or needs operations that the runtime does not have.
    """
    kept = {"experimental_preserve_all_tensors": True, "experimental_op_resolver_type": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES}
    interpreter = _load(path, num_threads=threads, **(kept if keep else {}))
    try:
        interpreter.allocate_tensors()
    except _REFUSALS as error:
        raise _cannot_load(path, error) from error
    return interpreter


def _load(path: str | os.PathLike, **options: Any) -> Interpreter:
    """An interpreter of a file whose flatbuffer is whole, and whose tensors have names: asked for one that is not there, it crashes."""
    try:
        interpreter = Interpreter(os.fspath(path), **options)
    except _REFUSALS as error:
        raise _cannot_load(path, error) from error
    content = Path(path).read_bytes()
    for graph in _tables(content, _offset(content, 0), 2):
        nameless = [number for number, tensor in enumerate(_tables(content, graph, 0)) if not _field(content, tensor, 3)]
        check(not nameless, os.fspath(path), "a model whose tensors have names", f"none for number {', '.join(map(str, nameless[:3]))}")
    return interpreter


def _cannot_load(path: str | os.PathLike, error: Exception) -> ValueError:
    return ValueError(f"{os.fspath(path)}: {RUNTIME} cannot load it: {' '.join(str(error).split()) or type(error).__name__}")


# A flatbuffer that was verified: tables of fields by number, as TensorFlow Lite's schema has them (Model.subgraphs 2 and signature_defs 7,
# SubGraph.tensors 0, Tensor.type 1 and name 3, SignatureDef.signature_key 2 and subgraph_index 4). tflite-runtime brings no reader.

_FLOATS = (0, 1, 10)  # of TensorType: 32, 16, 64 bits


def _offset(content: bytes, at: int) -> int:
    """Where the offset that stands at a place leads."""
    return at + int.from_bytes(content[at : at + 4], "little")


def _field(content: bytes, table: int, number: int) -> int:
    """Where a field of a table is, 0 if the table lacks it."""
    sizes = table - int.from_bytes(content[table : table + 4], "little", signed=True)
    place = 4 + 2 * number
    if place >= int.from_bytes(content[sizes : sizes + 2], "little"):
        return 0
    inside = int.from_bytes(content[sizes + place : sizes + place + 2], "little")
    return table + inside if inside else 0


def _tables(content: bytes, table: int, number: int) -> list[int]:
    """Where the tables in a list of a table begin."""
    if not (field := _field(content, table, number)):
        return []
    vector = _offset(content, field)
    count = int.from_bytes(content[vector : vector + 4], "little")
    return [_offset(content, vector + 4 + 4 * i) for i in range(count)]


def _string(content: bytes, table: int, number: int) -> str:
    """The text in a field of a table."""
    text = _offset(content, _field(content, table, number))
    size = int.from_bytes(content[text : text + 4], "little")
    return content[text + 4 : text + 4 + size].decode(errors="backslashreplace")
