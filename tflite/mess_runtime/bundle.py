"""The deployable folder: a manifest and one .tflite, checked before anything runs.

The .tflite has these signatures, which share their weights, the last two only where they were asked for, as each that runs takes memory:

* `segment.EXIT`: image or features of earlier segments to `mask`, `confident_pixels` where there is a decision, and the features that
  later segments still need; run one after another, they are the chain
* `alone.EXIT`: image to `mask` of one exit, without the heads of those before and without a decision
* `full`: image to EXIT.mask (and EXIT.confident_pixels) of every exit, at a stretch

Where every part of the image leaves for itself (see `Regions`), `segment.EXIT` of the first exit makes `sure` in the place of
`confident_pixels`, and `answer`, and there is a `segment.EXIT.BUDGET` of every later exit and budget, which reads these and `mask` of the
exit before.

The strict JSON reading and atomic writing here also serve latency.json. This module needs no interpreter.
"""

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from mess_runtime.files import parse_json, write_atomically

FORMAT = 1
MANIFEST = "manifest.json"
MODEL = "model.tflite"

# Names inside a .tflite: the signature of files that have only one, that of everything, inputs and outputs.
SIGNATURE = "serve"
ALONE, FULL = EXTRA_SIGNATURES = ("alone", "full")
IMAGE = "image"
MASK = "mask"
CONFIDENT_PIXELS = "confident_pixels"
SURE = "sure"
ANSWER = "answer"  # logits of the deepest exit that has worked at a position
GONE = 2.0  # how sure a cell is that has left before

INPUT_DEPENDENT = "input-dependent"
BUDGETED = "budgeted"
ANYTIME = "anytime"
SETTINGS = (INPUT_DEPENDENT, BUDGETED, ANYTIME)
FP32, FP16, INT8 = PRECISIONS = ("fp32", "fp16", "int8")
INPUT_TYPES = ("uint8", "float32")
Fidelity = Literal["exact", "low_confidence", "low"]
FIDELITIES = typing.get_args(Fidelity)
RESIZES = ("stretch", "letterbox")
NEIGHBOURS = ("stale", "nearest", "zeros")
OPTIONAL = ("backend", "verified", "regions", "decide")  # keys that earlier files do not have

T = TypeVar("T")


def check(ok: bool, argument: str, required: str, received: Any) -> None:
    """Raises ValueError that names the argument, what it must be and what it was, unless `ok`."""
    if not ok:
        raise ValueError(f"{argument}: must be {required}, got {received!r}")


def segment_signature(exit: str, budget: int | None = None) -> str:
    """Name of the signature of the segment that ends at an exit, where there are any at a budget of cells."""
    return f"segment.{exit}" if budget is None else f"segment.{exit}.{budget}"


def alone_signature(exit: str) -> str:
    """Name of the signature from the image to one exit alone."""
    return f"{ALONE}.{exit}"


def check_sha256(value: str) -> None:
    """Raises ValueError unless `value` is a SHA-256 in lower-case hexadecimal."""
    check(re.fullmatch(r"[0-9a-f]{64}", value) is not None, "sha256", "64 lower-case hexadecimal digits", value)


@dataclasses.dataclass(frozen=True)
class CreatedBy:
    """Versions of what wrote the bundle."""

    mess_tf: str
    tensorflow: str
    git_commit: str


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """The network's input, RGB [1, height, width, 3] in 0..255; scaling is inside the graph.

    Attributes:
      height, width: in pixels.
      dtype: `uint8` or `float32`.
      resize: how images of another size are fitted: `stretch`, or `letterbox`, which keeps the aspect ratio and fills up with grey.
    """

    height: int
    width: int
    dtype: Literal["uint8", "float32"] = "uint8"
    resize: Literal["stretch", "letterbox"] = "stretch"

    def __post_init__(self):
        check(self.height > 0, "height", "positive", self.height)
        check(self.width > 0, "width", "positive", self.width)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Mean cost of one image: milliseconds for `latency_ms`, multiply-accumulates for `macs`."""

    name: Literal["latency_ms", "macs"]
    mean: float

    def __post_init__(self):
        check(self.mean >= 0, "mean", "at least 0", self.mean)


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What the search expects of the bundle.

    Attributes:
      miou: 0..1.
      cost: of an image.
      exit_rates: share of the images that leave at each segment.
      backend: that the cost was measured on, as in latency.json; None where it was not measured.
    """

    miou: float
    cost: Cost
    exit_rates: tuple[float, ...]
    backend: str | None = None

    def __post_init__(self):
        check(0 <= self.miou <= 1, "miou", "in [0, 1]", self.miou)
        check(abs(sum(self.exit_rates) - 1) < 1e-6 and min(self.exit_rates) >= 0, "exit_rates", "shares that sum to 1", self.exit_rates)


@dataclasses.dataclass(frozen=True)
class Segment:
    """The backbone from the exit before to this exit, and this exit's head.

    Attributes:
      exit: name of the exit at the segment's end.
      head: name of the head there.
      macs: multiply-accumulates of the segment.
      alone_macs: multiply-accumulates from the image to this exit alone.
      alone_sha256: of the file with this exit alone, by which latency.json knows it.
      theta_pix: a pixel is confident from this probability on; built into the graph, kept here to be read.
      theta_img: an image leaves here from this share of confident pixels on; None where there is no decision.
      edge_aware: whether the confidence of pixels on predicted edges is the median around them.
      miou: of this exit alone in this file, 0..1, if it was measured.
    """

    exit: str
    head: str
    macs: int
    alone_macs: int
    alone_sha256: str
    theta_pix: float | None
    theta_img: float | None
    edge_aware: bool
    miou: float | None

    def __post_init__(self):
        check(re.fullmatch(r"\w+", self.exit) is not None, "exit", "a name of letters, digits and underscores", self.exit)
        check(bool(self.head), "head", "a name", self.head)
        check_sha256(self.alone_sha256)
        for name in ("macs", "alone_macs"):
            check(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("theta_pix", "theta_img", "miou"):
            value = getattr(self, name)
            check(value is None or 0 <= value <= 1, name, "in [0, 1] or null", value)
        both_or_none = (self.theta_pix is None) == (self.theta_img is None)
        check(both_or_none, "theta_img", "given or null together with theta_pix", self.theta_img)

    def to_json(self) -> dict[str, Any]:
        """Returns the segment as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any, where: str = "segment") -> Self:
        """Reads what `to_json` made; errors begin with `where`.

        Raises:
          ValueError: a key is unknown or missing, or a value is not allowed.
        """
        return decode(cls, value, where)


@dataclasses.dataclass(frozen=True)
class Verification:
    """A proof of the .tflite on a backend, see `mess_runtime.verify`.

    Attributes:
      backend: that it ran on.
      runtime: name and version of the package.
      device: as the backend calls it.
      accelerated: share of the operations that did not stay on the CPU.
      images: how many.
      runs: of the first image.
      different: largest share of the pixels of a mask that have another class than on the CPU.
    """

    backend: str
    runtime: str
    device: str
    accelerated: float
    images: int
    runs: int
    different: float

    def __post_init__(self):
        for name in ("accelerated", "different"):
            check(0 <= getattr(self, name) <= 1, name, "in [0, 1]", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Regions:
    """Every cell of the image, a square of it, leaves at the first exit that is sure of it; see `mess_tf.network.regions`.

    Attributes:
      neighbours: what segments see where cells have left, one of `NEIGHBOURS`.
      grid: (rows, columns) of cells.
      budgets: numbers of cells that the segments after the first can work on, rising; the last is all of them, the dense network.
      dense: exits whose segments always work on all cells. An exit in front of a segment that does decides for the whole image: each of
        its cells has the share of the image.
    """

    neighbours: Literal["stale", "nearest", "zeros"]
    grid: tuple[int, int]
    budgets: tuple[int, ...]
    dense: tuple[str, ...] = ()

    def __post_init__(self):
        check(self.neighbours in NEIGHBOURS, "neighbours", f"one of {', '.join(NEIGHBOURS)}", self.neighbours)
        check(min(self.grid) > 0, "grid", "positive numbers of rows and columns", self.grid)
        rising = all(first < second for first, second in itertools.pairwise((0, *self.budgets)))
        check(rising, "budgets", "positive, each larger than the one before", self.budgets)
        check(self.budgets[-1:] == (self.cells,), "budgets", f"such that the last is all {self.cells} cells", self.budgets)

    def __str__(self) -> str:
        dense = f", {', '.join(self.dense)} dense" if self.dense else ""
        return f"{self.grid[0]} x {self.grid[1]} cells, {self.neighbours}, budgets of {', '.join(map(str, self.budgets))}{dense}"

    @property
    def cells(self) -> int:
        """Number of cells."""
        return math.prod(self.grid)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything about a bundle that is not in its .tflite.

    Attributes:
      created_by: versions of what wrote it.
      input: size of the network's input.
      classes: names by class index.
      palette: RGB in 0..255 by class index.
      setting: how the bundle is meant to run, one of `SETTINGS`.
      precision: of the network, one of `PRECISIONS`.
      fidelity: what the exit policy computes at the size of the image: `exact` everything, `low_confidence` the mask, `low` nothing.
      sha256, size_bytes: of the .tflite.
      predicted: what the search expects, if there was a search.
      segments: in the order of execution; every image that leaves nowhere else leaves at the last.
      verified: where the .tflite was found to give what it gives on the CPU.
      regions: where every cell of the image leaves for itself, None where the image leaves as a whole. With them, `theta_img` is asked of a
        cell, all exits but the last have one, and `predicted.exit_rates` are shares of the cells.
    """

    created_by: CreatedBy
    input: InputSpec
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    setting: Literal["input-dependent", "budgeted", "anytime"]
    precision: Literal["fp32", "fp16", "int8"]
    fidelity: Fidelity
    sha256: str
    size_bytes: int
    predicted: Predicted | None
    segments: tuple[Segment, ...]
    verified: tuple[Verification, ...] = ()
    regions: Regions | None = None

    def __post_init__(self):
        check(0 < len(set(self.classes)) == len(self.classes) <= 256, "classes", "1 to 256 different names", self.classes)
        check(len(self.palette) == len(self.classes), "palette", f"one colour for each of {len(self.classes)} classes", len(self.palette))
        for index, colour in enumerate(self.palette):
            check(all(0 <= channel <= 255 for channel in colour), f"palette[{index}]", "three values in 0..255", colour)
        check(len(self.segments) > 0, "segments", "at least one segment", self.segments)
        check_sha256(self.sha256)
        check(self.size_bytes > 0, "size_bytes", "positive", self.size_bytes)
        check(len(set(self.exits)) == len(self.exits), "segments.exit", "different in every segment", self.exits)
        *early, last = self.segments
        check(last.theta_img is None, f"segments[{len(early)}].theta_img", "null in the last segment", last.theta_img)
        if self.setting == INPUT_DEPENDENT or self.regions:
            reason = "with regions" if self.regions else f"for {INPUT_DEPENDENT}"
            for index, segment in enumerate(early):
                check(segment.theta_img is not None, f"segments[{index}].theta_img", f"given {reason}", segment.theta_img)
        if self.regions:
            check_with_regions(self.setting, self.exits)
            fits = self.regions.grid[0] <= self.input.height and self.regions.grid[1] <= self.input.width
            check(fits, "regions.grid", f"of no more cells than {self.input.height} x {self.input.width} pixels", self.regions.grid)
            later = self.exits[1:]
            known = len(set(self.regions.dense)) == len(self.regions.dense) and set(self.regions.dense) <= set(later)
            check(known, "regions.dense", f"different ones of {', '.join(later)}", self.regions.dense)
        if self.predicted is not None:
            rates = self.predicted.exit_rates
            check(len(rates) == len(self.segments), "predicted.exit_rates", f"{len(self.segments)} shares, one per segment", rates)

    @property
    def exits(self) -> tuple[str, ...]:
        """Names of the exits, shallow to deep."""
        return tuple(segment.exit for segment in self.segments)

    def to_json(self) -> dict[str, Any]:
        """Returns the manifest as JSON values; what has no regions can be read by runtimes that do not know them."""
        value = {"format": FORMAT, **dataclasses.asdict(self)}
        if self.regions is None:
            del value["regions"]
        return value

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Reads what `to_json` made.

        Raises:
          ValueError: the format is another one, a key is unknown or missing, or a value is not allowed.
        """
        return decode_versioned(cls, value, "manifest")


def check_with_regions(setting: str, exits: tuple[str, ...]) -> None:
    """Raises ValueError where cells cannot leave: at one exit, or in a setting that takes no decision."""
    check(setting in (INPUT_DEPENDENT, ANYTIME), "setting", f"{INPUT_DEPENDENT} or {ANYTIME} with regions", setting)
    check(len(exits) > 1, "exits", "at least two with regions", exits)


def write_manifest(folder: str | os.PathLike, manifest: Manifest) -> Path:
    """Writes the manifest into the bundle folder atomically and returns its path."""
    path = Path(folder) / MANIFEST
    write_json(path, manifest.to_json())
    return path


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle folder whose manifest and .tflite passed every check."""

    folder: Path
    manifest: Manifest

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self:
        """Reads `folder`/manifest.json and compares the .tflite with its size and SHA-256.

        Raises:
          FileNotFoundError: the manifest or the .tflite is missing.
          ValueError: the manifest breaks the schema or the .tflite is not the one that it describes.
        """
        if not (Path(folder) / MANIFEST).exists():
            got = f"a folder without {MANIFEST}" if Path(folder).is_dir() else "no folder"
            made = "`python -m mess_tf.export_tflite --deployment=FILE` or the pipeline makes"
            raise FileNotFoundError(f"{folder}: must be a bundle, the folder that {made}, got {got}")
        bundle = cls(Path(folder), read_json(Path(folder) / MANIFEST, Manifest.from_json))
        if not bundle.path.is_file():
            raise FileNotFoundError(f"{bundle.path}: missing, described by {MANIFEST} beside it")
        size = bundle.path.stat().st_size
        check(size == bundle.manifest.size_bytes, f"{bundle.path}: size", f"{bundle.manifest.size_bytes} bytes", size)
        received = file_sha256(bundle.path)
        check(received == bundle.manifest.sha256, f"{bundle.path}: sha256", bundle.manifest.sha256, received)
        return bundle

    @property
    def path(self) -> Path:
        """The .tflite."""
        return self.folder / MODEL


def sha256(content: bytes) -> str:
    """Returns the SHA-256 of some bytes in lower-case hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file in lower-case hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(argument: str, path: str | os.PathLike, folder: bool = False) -> None:
    """Checks before long work that its result can be written.

    Args:
      argument: that says where to.
      path: of a file to write, in a folder that is there.
      folder: `path` is a folder, which need not be there yet.

    Raises:
      ValueError: it cannot.
    """
    path = Path(path)
    if folder:
        parent = next(each for each in (path, *path.absolute().parents) if each.exists())
        required = "a folder that can be written to, not a .json file" if path.suffix == ".json" else "a folder that can be written to"
    else:
        parent, required = path.absolute().parent, "a file in a folder that exists and can be written to"
    ok = path.suffix != ".json" if folder else not path.is_dir()
    try:  # what is allowed need not be possible, as in /proc
        tempfile.TemporaryFile(dir=parent).close()
    except OSError:
        ok = False
    check(ok, argument, required, str(path))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON atomically; NaN and infinities raise ValueError."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: str | os.PathLike, from_json: Callable[[Any], T]) -> T:
    """Returns `from_json` of the file's content.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not JSON, or `from_json` refused it; the message begins with the path.
    """
    text = Path(path).read_bytes()
    try:
        return from_json(parse_json(text))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def decode_versioned(cls: type[T], value: Any, where: str) -> T:
    """Returns the dataclass `cls` from a JSON object that also holds `format`, which is looked at first."""
    check(isinstance(value, dict), where, "a JSON object", value)
    check(value.get("format") == FORMAT, f"{where}.format", str(FORMAT), value.get("format"))
    return decode(cls, {key: item for key, item in value.items() if key != "format"}, where)


def decode(kind: Any, value: Any, where: str) -> Any:
    """Returns a JSON value as the annotated type `kind`, or raises ValueError with the path `where` of the offending key.

    Known types: dataclasses, tuples, string dictionaries, literals, optional types, str, bool, int and finite float (int accepted).
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin is types.UnionType:
        return None if value is None else decode(arguments[0], value, where)
    if origin is Literal:
        check(value in arguments, where, f"one of {', '.join(arguments)}", value)
    elif origin is tuple:
        check(isinstance(value, list), where, "a list", value)
        items = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        check(len(items) == len(value), where, f"a list of {len(items)}", value)
        return tuple(decode(item, entry, f"{where}[{index}]") for index, (item, entry) in enumerate(zip(items, value, strict=True)))
    elif origin is dict:
        check(isinstance(value, dict), where, "a JSON object", value)
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    elif kind is float:
        finite = (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) <= sys.float_info.max)
        check(finite, where, "a finite number", value)
        return float(value)
    else:
        check(type(value) is kind, where, f"of type {kind.__name__}", value)
    return value


def _decode_dataclass(cls: type, value: Any, where: str) -> Any:
    check(isinstance(value, dict), where, "a JSON object", value)
    hints = typing.get_type_hints(cls)
    for key in value:
        if key not in hints:
            near = difflib.get_close_matches(key, hints) or list(hints)
            raise ValueError(f"{where}.{key}: unknown key, must be one of {', '.join(near)}")
    for key in hints:
        check(key in value or key in OPTIONAL, where, f"an object with the key {key!r}", sorted(value))
    arguments = {key: decode(hint, value[key], f"{where}.{key}") for key, hint in hints.items() if key in value}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error
