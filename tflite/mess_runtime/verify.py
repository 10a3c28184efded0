"""Proof of a file on a backend: every output of every signature against the CPU's for the same images, after several runs.

A delegate may compute nonsense and say nothing, or be right at its first inference only. The features between segments are compared too,
each segment reading what the one before made on the same backend, and what the backend's libraries write to stderr counts: LiteRT reports
shaders that do not compile nowhere else. The backend runs in a process of its own, which it may crash.

Segments that work on the least sure cells get the same ones on both, drawn at random: which come first of equally sure ones is no result.
"""

import dataclasses
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mess_runtime import engines
from mess_runtime.bundle import (
    CONFIDENT_PIXELS,
    IMAGE,
    MASK,
    SURE,
    Bundle,
    InputSpec,
    Manifest,
    Verification,
    check,
    file_sha256,
    segment_signature,
    write_manifest,
)
from mess_runtime.images import fit, mask_at
from mess_runtime.runner import SURE_ROUNDING, Runner, needed_pixels

# By the file's precision: root mean square error of a tensor over that of its values, share of the pixels of a mask. GPUs compute in half
# precision if the file leaves it to them, and int8 by other roundings than XNNPACK.
LIMITS = {"fp32": (0.01, 0.002), "fp16": (0.03, 0.01), "int8": (0.15, 0.03)}
ABSENT = re.compile(r"No adapters found|Failed to initialize WebGPU|GPU accelerator could not be loaded")
FAULTS = re.compile(r"^E\d{4} .*|.*[Vv]alidation error.*", re.MULTILINE)
EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception): .*", re.MULTILINE)
ADAPTER = re.compile(r"Selected adapter: ([^,\n]+)")
ON_CPU = re.compile(r"(\d+) operations? will run on the GPU, and the remaining (\d+) operations? will run on the CPU")

POLICY = "policy"

Outputs = dict[str, dict[str, np.ndarray]]  # by signature and name


class Ran(NamedTuple):
    """What a backend made of images.

    Attributes:
      outputs: at every turn: the first image's, several times, then those of each other image.
      runtime, device, accelerated, faults: see `Report`; without outputs there are faults.
    """

    outputs: Sequence[Outputs]
    runtime: str
    device: str
    accelerated: float | None
    faults: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Difference:
    """What a backend makes of an output, against the CPU.

    Attributes:
      signature, output: of the file.
      first, last: at the first and at the last run of the first image: root mean square error over that of the CPU's values, or the share
        of the image's pixels that have another class, or that are counted more or less, with regions as a mean over the cells.
      worst: over all runs and images.
      largest: difference of a single value, of a mask 1 where anything differs.
      limit: of `worst` for the file's precision.
    """

    signature: str
    output: str
    first: float
    last: float
    worst: float
    largest: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the backend may stand in for the CPU."""
        return self.worst <= self.limit


@dataclasses.dataclass(frozen=True)
class Report:
    """All about one file on one backend.

    Attributes:
      path, sha256: of the .tflite.
      precision: of the file.
      backend, runtime, device: that ran it.
      accelerated: share of the operations that did not stay on the CPU, None where it is not told.
      images, runs: how many, and how often the first of them ran.
      differences: of every output.
      decisions: images that leave at another exit, with regions of which other cells leave at one; None without a decision.
      mious: by exit, and where there is a decision for the whole image of the `POLICY`, which takes each image where it leaves; of the CPU
        and of the backend, where there were labels.
      faults: what the backend's libraries wrote of errors, and what is not finite: of the outputs on either side, and of all tensors on
        the CPU with the first image. A mask alone does not tell of it.
    """

    path: str
    sha256: str
    precision: str
    backend: str
    runtime: str
    device: str
    accelerated: float | None
    images: int
    runs: int
    differences: tuple[Difference, ...]
    decisions: int | None
    mious: dict[str, tuple[float, float]]
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing differs beyond the file's precision and nothing failed."""
        return not self.faults and all(difference.ok for difference in self.differences)

    @property
    def different(self) -> float:
        """Largest share of the pixels of a mask that have another class than on the CPU."""
        return max((difference.worst for difference in self.differences if difference.output.endswith(MASK)), default=0.0)

    @property
    def verification(self) -> Verification:
        """What the manifest says of it."""
        return Verification(self.backend, self.runtime, self.device, self.accelerated, self.images, self.runs, self.different)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return dataclasses.asdict(self) | {"ok": self.ok}

    def table(self) -> str:
        """A few lines for people."""
        rows = [("signature", "output", "first run", f"run {self.runs}", "worst", "largest", "limit", "")]
        for each in self.differences:
            numbers = [f"{value:.3g}" for value in (each.first, each.last, each.worst, each.largest, each.limit)]
            rows.append((each.signature, each.output, *numbers, "" if each.ok else "DIFFERS"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        unknown = self.accelerated is None or self.backend == engines.CPU
        lines = [
            f"{self.path}: {self.backend} ({self.device}), {self.runtime}, {self.precision}, {self.images} images,"
            + ("" if unknown else f" {100 * self.accelerated:.0f} % of the operations accelerated")
        ]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.decisions is not None:
            lines.append(f"decisions that differ: {self.decisions} of {self.images}")
        lines += [f"{name}: mIoU {100 * cpu:.2f} %, on {self.backend} {100 * here:.2f} %" for name, (cpu, here) in self.mious.items()]
        return "\n".join([*lines, *(f"error: {fault}" for fault in self.faults)])


def verify(
    path: str | os.PathLike,
    backend: str,
    images: Sequence[np.ndarray] = (),
    labels: Sequence[np.ndarray | None] = (),
    runs: int = 5,
    precision: str | None = None,
) -> Report:
    """Runs a file on the CPU and on a backend.

    Args:
      path: a bundle, or a .tflite of one chain or with signatures that take an image; inputs that nothing makes are noise.
      backend: one of `engines.BACKENDS`.
      images: uint8 [h, w, 3]; without any, two of smooth noise.
      labels: uint8 [h, w] of them for the mIoU, or None each.
      runs: of the first image; the others run once, after it.
      precision: of a .tflite; a bundle knows it.

    Raises:
      engines.AbsentError: the backend is not there, so nothing can be said of the file.
      FileNotFoundError: there is no such bundle.
      ValueError: the file cannot be loaded on the CPU, or its manifest describes another one, or knows the precision.
    """
    check(backend in engines.BACKENDS, "backend", f"one of {', '.join(engines.BACKENDS)}", backend)
    check(runs >= 1, "runs", "at least 1", runs)

    def run(file: Path, pixels: Sequence[np.ndarray]) -> Ran:
        with tempfile.TemporaryDirectory(prefix="mess_runtime.") as folder:
            np.savez(Path(folder) / "images.npz", *pixels)
            accelerated, text, faults = _on_backend(file, backend, runs, Path(folder))
            got = [_read(Path(folder) / f"{turn}.npz") for turn in range(runs + len(pixels) - 1)] if not faults else []
        faults += tuple(dict.fromkeys(re.sub(r"^E\d{4} \S+ +\d+ ", "", line) for line in FAULTS.findall(text)))
        device = found.group(1) if (found := ADAPTER.search(text)) else backend
        return Ran(got, f"{engines.RUNTIME} {engines.runtime_version()}", device, accelerated, faults)

    return compare(path, backend, run, images, labels, runs, precision)


def compare(
    path: str | os.PathLike,
    backend: str,
    run: Callable[[Path, Sequence[np.ndarray]], Ran],
    images: Sequence[np.ndarray] = (),
    labels: Sequence[np.ndarray | None] = (),
    runs: int = 5,
    precision: str | None = None,
) -> Report:
    """Compares what `run` makes of a file's .tflite and its inputs with what the CPU does; see `verify`."""
    path = Path(path)
    bundle = Bundle.load(path) if path.is_dir() or not (path.exists() or path.suffix == ".tflite") else None
    if bundle:
        check(precision is None, "precision", "left out for a bundle, which knows it", precision)
        Runner(bundle, engine=engines.INTERPRETER, backend=engines.CPU)  # says where the file is not what the manifest describes
    file = bundle.path if bundle else path
    precision = bundle.manifest.precision if bundle else precision or "fp32"
    reference = engines.InterpreterEngine(file, os.cpu_count() or 1)
    for signature in reference.inputs:
        reference.prepare(signature)
    spec = bundle.manifest.input if bundle else _spec(reference)
    images = list(images) or [_noise(spec, seed) for seed in (0, 1)]
    pixels = [fit(image, (spec.height, spec.width), spec.resize)[None].astype(spec.dtype) for image in images]
    ran = run(file, pixels)
    got = ran.outputs
    expected = [outputs for _, outputs in _outputs(reference, pixels, 1)] if got else []
    turns = len(got) - len(images) + 1  # of the first image
    return Report(
        path=os.fspath(path),
        sha256=file_sha256(file),
        precision=precision,
        backend=backend,
        runtime=ran.runtime,
        device=ran.device,
        accelerated=ran.accelerated,
        images=len(images),
        runs=runs,
        differences=tuple(_differences(expected, got, turns, LIMITS[precision])) if expected else (),
        decisions=_decisions(bundle, expected, got[turns - 1 :]) if expected else None,
        mious=_mious(bundle, expected, got[turns - 1 :], labels) if expected else {},
        faults=(*ran.faults, *_not_finite_inside(file, pixels[0]), *_not_finite("the CPU", expected), *_not_finite(backend, got)),
    )


def record(folder: str | os.PathLike, report: Report) -> None:
    """Writes the result into a bundle's manifest, in the place of an earlier one of the same backend, runtime and device."""
    manifest, fresh = Bundle.load(folder).manifest, report.verification
    others = [
        each for each in manifest.verified if (each.backend, each.runtime, each.device) != (fresh.backend, fresh.runtime, fresh.device)
    ]
    write_manifest(folder, dataclasses.replace(manifest, verified=(*others, fresh)))


def check_finite(bundle: Bundle) -> None:
    """Raises ValueError where a tensor of a bundle's file is not finite on the CPU, weights included."""
    spec = bundle.manifest.input
    image = fit(_noise(spec, 0), (spec.height, spec.width), spec.resize)[None].astype(spec.dtype)
    found = _not_finite_inside(bundle.path, image)
    check(not found, os.fspath(bundle.path), "a model whose values are finite", "; ".join(found))


def _not_finite_inside(file: Path, image: np.ndarray) -> list[str]:
    """What is not finite in a file on the CPU, weights included."""
    engine = engines.InterpreterEngine(file, os.cpu_count() or 1, keep=True)
    for signature in engine.inputs:
        engine.prepare(signature)
    for _ in _outputs(engine, [image], 1):
        pass
    found = engine.not_finite().items()
    return [f"{signature}: {name}, inside: {wrong} of {size} values are not finite on the CPU" for signature, (name, wrong, size) in found]


def _not_finite(where: str, turns: Sequence[Outputs]) -> Iterator[str]:
    """The outputs that are not finite at some turn, with how many of their values."""
    for signature, names in turns[0].items() if turns else ():
        for name, value in names.items():
            if wrong := max(engines.not_finite(outputs[signature][name]) for outputs in turns):
                yield f"{signature}: {name}: {wrong} of {value.size} values are not finite on {where}"


def _spec(engine: engines.InterpreterEngine) -> InputSpec:
    """The input of a file without a manifest."""
    for tensors in engine.inputs.values():
        if IMAGE in tensors:
            return InputSpec(*tensors[IMAGE].shape[1:3], tensors[IMAGE].dtype)
    return InputSpec(1, 1)


def _noise(spec: InputSpec, seed: int) -> np.ndarray:
    """Smooth, so that as in a photo few pixels are equally near to two classes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((spec.width, spec.height), Image.Resampling.BICUBIC))


def _outputs(engine: Any, images: Sequence[np.ndarray], runs: int) -> Iterator[tuple[int, Outputs]]:
    """Runs all signatures in order, the first image several times; yields the number of the turn and copies of what was made."""
    turns = [images[0]] * runs + list(images[1:])
    for turn, image in enumerate(turns):
        made, before, outputs, segment = {}, {}, {}, ""
        for signature, tensors in engine.inputs.items():
            if (own := ".".join(signature.split(".")[:2])) != segment:  # all budgets of a segment read what the segments before it made
                before, segment = dict(made), own
            inputs = {}
            for name, tensor in tensors.items():
                if name == SURE:
                    count = math.prod(tensor.shape)
                    sure = np.random.default_rng(0).permutation(count).reshape(tensor.shape) / count
                    inputs[name] = engine.put(signature, name, sure.astype(tensor.dtype))
                elif name == IMAGE or name not in before:
                    value = image if name == IMAGE else np.random.default_rng(len(name)).normal(0, 3, tensor.shape).astype(tensor.dtype)
                    inputs[name] = engine.put(signature, name, value)
                else:
                    inputs[name] = before[name]
            results = engine.run(signature, inputs)
            made |= results
            outputs[signature] = {name: np.array(engine.get(signature, name, value)) for name, value in results.items()}
        yield turn, outputs


def _on_backend(file: Path, backend: str, runs: int, folder: Path) -> tuple[float, str, tuple[str, ...]]:
    """Lets another process write the outputs of every turn; the share of accelerated operations, its stderr, and how it failed."""
    words = [sys.executable, "-c", "from mess_runtime import verify; verify.serve()", file, backend, runs, folder]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([str(word) for word in words], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    text = done.stdout + done.stderr
    if done.returncode:
        if ABSENT.search(text):
            raise engines.AbsentError(f"backend: must be there to verify a file on it, got {backend!r}, which {engines.NEEDS}")
        raised = EXCEPTION.findall(text)
        return 0.0, text, (raised[-1] if raised else f"ended with {done.returncode}",)
    partly = [(int(there), int(left)) for there, left in ON_CPU.findall(text)]
    there, left = sum(there for there, _ in partly), sum(left for _, left in partly)
    fully = (folder / "accelerated").exists()
    return (1.0 if fully else there / max(1, there + left)), text, ()


def serve() -> None:
    """What the process of the backend does: `FILE BACKEND RUNS FOLDER`."""
    file, backend, runs, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    engine = engines.CompiledEngine(file, os.cpu_count() or 1, backend)
    for signature in engine.inputs:
        engine.prepare(signature)
    with np.load(folder / "images.npz") as images:
        for turn, outputs in _outputs(engine, list(images.values()), runs):
            arrays = {f"{signature}/{name}": value for signature, tensors in outputs.items() for name, value in tensors.items()}
            np.savez(folder / f"{turn}.npz", **arrays)
    if engine.fully_accelerated:
        (folder / "accelerated").touch()


def _read(path: Path) -> Outputs:
    outputs: Outputs = {}
    with np.load(path) as arrays:
        for key, value in arrays.items():
            signature, _, name = key.partition("/")
            outputs.setdefault(signature, {})[name] = value
    return outputs


def _differences(expected: Sequence[Outputs], got: Sequence[Outputs], runs: int, limits: tuple[float, float]) -> Iterator[Difference]:
    for signature in got[0]:
        names = expected[0][signature]
        size = next((value.size for name, value in names.items() if name.endswith(MASK)), 1)
        for name in names:
            pairs = [(expected[max(0, turn - runs + 1)][signature][name], outputs[signature][name]) for turn, outputs in enumerate(got)]
            pairs = [_both_finite(*pair) for pair in pairs]
            errors = [_error(name, cpu, here, size) for cpu, here in pairs]
            largest = max(float(np.abs(cpu.astype(np.float64) - here.astype(np.float64)).max()) for cpu, here in pairs)
            whole = name == SURE or name.endswith((MASK, CONFIDENT_PIXELS))
            yield Difference(
                signature,
                name,
                errors[0],
                errors[runs - 1],
                max(errors),
                min(largest, 1.0) if name.endswith(MASK) else largest,
                limits[whole],
            )


def _both_finite(cpu: np.ndarray, here: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with 0 where one is not finite, which is a fault of its own, so that reports hold numbers."""
    finite = np.isfinite(cpu) & np.isfinite(here)
    return np.where(finite, cpu, cpu.dtype.type(0)), np.where(finite, here, here.dtype.type(0))


def _error(name: str, cpu: np.ndarray, here: np.ndarray, pixels: int) -> float:
    if name.endswith(MASK):
        return float((cpu != here).mean())
    cpu, here = cpu.astype(np.float64), here.astype(np.float64)
    if name == SURE:
        return float(np.abs(cpu - here).mean())
    if name.endswith(CONFIDENT_PIXELS):
        return float(np.abs(cpu - here).max() / pixels)
    scale = cpu - cpu.min() if cpu.size else cpu  # quantised tensors have their zero anywhere
    return float(np.sqrt(np.square(cpu - here).mean() / max(np.square(scale).mean(), 1e-12)))


def _exits(bundle: Bundle | None, outputs: Sequence[Outputs]) -> list[str] | None:
    """Where each image leaves as a whole, None without a decision."""
    needed = needed_pixels(bundle.manifest) if bundle and not bundle.manifest.regions else []
    if all(count is None for count in needed):
        return None

    def exit_of(outputs: Outputs) -> str:
        for segment, count in zip(bundle.manifest.segments, needed, strict=True):
            if count is not None and outputs[f"segment.{segment.exit}"][CONFIDENT_PIXELS][0] >= count:
                return segment.exit
        return bundle.manifest.exits[-1]

    return [exit_of(each) for each in outputs]


def _decisions(bundle: Bundle | None, expected: Sequence[Outputs], got: Sequence[Outputs]) -> int | None:
    decide = _leaving if bundle and bundle.manifest.regions else _exits
    cpu, here = decide(bundle, expected), decide(bundle, got)
    return None if cpu is None else sum(there != other for there, other in zip(cpu, here, strict=True))


def _whole(manifest: Manifest) -> dict[str, str]:
    """By exit, the signature of the segment that works on the whole image."""
    later = manifest.regions and manifest.regions.cells
    return {exit: segment_signature(exit, later if index else None) for index, exit in enumerate(manifest.exits)}


def _leaving(bundle: Bundle, outputs: Sequence[Outputs]) -> list[list[list[bool]]]:
    """Of each image, by exit, which cells leave there, if all have come so far."""
    signatures = _whole(bundle.manifest)
    early = [(signatures[each.exit], each.theta_img - SURE_ROUNDING) for each in bundle.manifest.segments[:-1]]
    return [[(each[signature][SURE] >= theta).ravel().tolist() for signature, theta in early] for each in outputs]


def _mious(
    bundle: Bundle | None, expected: Sequence[Outputs], got: Sequence[Outputs], labels: Sequence[np.ndarray | None]
) -> dict[str, tuple[float, float]]:
    """By exit, at the labels' size. Classes that the bundle does not have are ignored."""
    if bundle is None or not any(label is not None for label in labels):
        return {}
    classes, signatures, result = len(bundle.manifest.classes), _whole(bundle.manifest), {}
    left = [_exits(bundle, outputs) for outputs in (expected, got)]
    for name in (*bundle.manifest.exits, *([POLICY] if left[0] else [])):
        counts = np.zeros((2, classes, classes + 1), np.int64)  # the last for what is no class
        for side, outputs in enumerate((expected, got)):
            exits = left[side] if name == POLICY else [name] * len(outputs)
            for label, exit, each in zip(labels, exits, outputs, strict=True):
                if label is not None:
                    mask = mask_at(each[signatures[exit]][MASK][0], label.shape, bundle.manifest.input.resize)
                    known = label < classes
                    pairs = label[known].astype(np.int64) * (classes + 1) + np.minimum(mask[known], classes)
                    counts[side] += np.bincount(pairs, minlength=counts[side].size).reshape(counts[side].shape)
        result[name] = tuple(_miou(matrix) for matrix in counts)
    return result


def _miou(confusion: np.ndarray) -> float:
    """Over the classes that the labels hold, as in `mess_tf.metrics.miou`; 0 where they hold none."""
    both, labelled = np.diag(confusion), confusion.sum(1)
    held = labelled > 0
    union = confusion.sum(0)[:-1] + labelled - both
    return float((both[held] / union[held]).mean()) if held.any() else 0.0
