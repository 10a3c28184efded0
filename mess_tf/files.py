"""The files that pass between calibration, search and export: `stats.npz`, `regions.npz` and `deployment.json`.

Reading is strict, writing is atomic. This module imports no TensorFlow.
"""

import contextlib
import dataclasses
import functools
import json
import math
import mmap
import os
import platform
import struct
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np

from mess_runtime import bundle
from mess_runtime.bundle import (
    ANYTIME,
    BUDGETED,
    FORMAT,
    INPUT_DEPENDENT,
    PRECISIONS,
    SETTINGS,
    Fidelity,
    check,
    decode_versioned,
    file_sha256,
    read_json,
    write_json,
)
from mess_runtime.files import write_atomically
from mess_tf import __version__
from mess_tf.configs import MAX_PIXELS

# Of an .npz file, unpacked: more is no file of ours, but one that is made to fill the memory.
MAX_ARRAYS_BYTES = 8 * 2**30

# Of stats.npz and regions.npz, which have other readers than the rest and so a number of their own.
STATS_FORMAT = 2

# Names in a work folder.
CANDIDATES, STATS, REGIONS = "candidates", "stats.npz", "regions.npz"
DEPLOYMENT, VERIFICATION = "deployment.json", "verification.json"
# Names of all costs, see `optimise.space.Costs`.
COSTS = ("latency_ms", "latency_p90_ms", "size_bytes", "macs", "macs_p90", "parameters", "memory_bytes")
# Those of them that are known where regions decide.
REGION_COSTS = ("latency_ms", "latency_p90_ms", "macs", "macs_p90", "parameters")
RISKS = ("final", "labels")
# Who decides: the image as a whole, every cell of it, or whichever is better.
IMAGE_DECIDES, REGIONS_DECIDE, BEST_DECIDES = DECIDES = ("image", "regions", "best")
# What deployments that devices share make least, of their mean latencies: the total, or the largest.
SUM, WORST = FLEETS = ("sum", "worst")
THETA_IMG = (0.5, 0.7, 0.8, 0.9, 0.95)  # shares of a cell's pixels
THETA_IMG_WHOLE = (0.7, 0.8, 0.9, 0.95, 0.98)  # shares of an image's, where it decides in front of a segment that runs densely


def unit(cost: str) -> tuple[str, float]:
    """The unit in which a cost is shown, empty where its name says it or there is none, and the factor to it."""
    if cost.startswith("macs"):
        return "GMACs", 1e-9
    return ("ms" if cost.startswith("latency") else ""), 1.0


def shown(cost: str, value: float, digits: int = 4) -> str:
    """A cost in that unit."""
    name, scale = unit(cost)
    return f"{scale * value:.{digits}g} {name}".rstrip()


def made_by() -> dict[str, str]:
    """Versions and git commit of the running code; the commit is empty outside a git checkout."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        commit = ""
    return {"mess_tf": __version__, "python": platform.python_version(), "numpy": np.__version__, "git_commit": commit}


def of_precision(name: str, precision: str | None) -> str:
    """Name of the candidates or statistics that stand beside those of other precisions: `stats.fp16.npz`; None for the only ones."""
    path = Path(name)
    return name if precision is None else f"{path.stem}.{precision}{path.suffix}"


def candidate_files(workdir: str | os.PathLike, precisions: Sequence[str | None] = (None, *PRECISIONS)) -> list[Path]:
    """The files of the candidates of some precisions (see `of_precision`), by default of all that there are."""
    names = [of_precision(CANDIDATES, precision) for precision in precisions]
    return [path for name in names for path in sorted(Path(workdir, name).glob("*.tflite"))]


def best_weights(workdir: str | os.PathLike, stage: str) -> str:
    """Path of the weights of a stage's best evaluation."""
    return os.path.join(workdir, "checkpoints", stage, "best.npz")


def trained_weights(workdir: str | os.PathLike) -> str:
    """Path of the weights that a training came to: of stage 2, or of stage 1 where there is no other.

    Raises:
      FileNotFoundError: there are none.
    """
    for stage in ("stage2", "stage1"):
        if os.path.exists(path := best_weights(workdir, stage)):
            return path
    raise FileNotFoundError(f"workdir: must hold trained weights, which `python -m mess_tf.train` makes, got {str(workdir)!r}")


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads an .npz file without objects in it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is another or a broken file, or is larger than `MAX_ARRAYS_BYTES` unpacked.
    """
    size = sum(member.file_size for member in _members(path).values())
    check(size <= MAX_ARRAYS_BYTES, f"{os.fspath(path)}: arrays", f"of at most {MAX_ARRAYS_BYTES} bytes", size)
    with _unpacking(path), np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def map_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an .npz file as `write_arrays` writes it, read-only. They stay in the file until they are used.

    The check sums are compared first, in pieces, so that what is used later is what was written.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is another or a broken file, or what is in it is compressed.
    """
    members, arrays = _members(path), {}
    with _unpacking(path), zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        if (broken := archive.testzip()) is not None:
            raise ValueError(f"{broken} is damaged")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for name, member in members.items():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed")
            with archive.open(member) as array:
                if (version := np.lib.format.read_magic(array)) != (1, 0):
                    raise ValueError(f"{name} has the version {version}")
                shape, by_column, kind = np.lib.format.read_array_header_1_0(array)
                header = array.tell()
            # The archive's own header tells how long its two texts are that stand between it and the content.
            begin = member.header_offset + 30 + sum(struct.unpack_from("<HH", content, member.header_offset + 26)) + header
            if by_column or kind.hasobject or min(shape, default=0) < 0 or header + math.prod(shape) * kind.itemsize != member.file_size:
                raise ValueError(f"{name} is no plain array")
            arrays[name] = np.ndarray(shape, kind, content, begin)
    return arrays


def write_arrays(path: str | os.PathLike, **arrays: Any) -> None:
    """Writes an .npz file that `map_arrays` reads, atomically. Equal arrays make equal bytes."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **{name: np.asarray(array, order="C") for name, array in arrays.items()})

    write_atomically(path, write)


def _members(path: str | os.PathLike) -> dict[str, zipfile.ZipInfo]:
    """The arrays of an .npz file by name."""
    with _unpacking(path), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    named = {member.filename.removesuffix(".npy"): member for member in members}
    names = [member.filename for member in members]
    check(len(named) == len(names), f"{os.fspath(path)}: arrays", "of different names", names)
    return named


@contextlib.contextmanager
def _unpacking(path: str | os.PathLike) -> Iterator[None]:
    """Names the file where it is broken; then zipfile, zlib and NumPy raise nearly anything."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # it cannot be opened
            raise
        raise ValueError(f"{os.fspath(path)}: must be a complete .npz file, got {str(error) or type(error).__name__}") from error


def _must_exist(path: str | os.PathLike, command: str) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{os.fspath(path)}: must exist, `python -m {command}` makes it, got no such file")


# === stats.npz ===


def check_theta_pix(values: Sequence[float]) -> None:
    """Raises ValueError unless these are thresholds of the pixel confidence: at least one, increasing, in (0, 1]."""
    grid = np.asarray(values, np.float64)
    ok = grid.size > 0 and np.isfinite(grid).all() and grid[0] > 0 and grid[-1] <= 1 and (np.diff(grid) > 0).all()
    check(bool(ok), "theta_pix", "increasing numbers above 0 and at most 1", grid.tolist())


def _of_format(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a `stats.npz` or `regions.npz` but its format, which says whether this version can read it."""
    told = _members(path).get("format")
    with _unpacking(path), np.load(path, allow_pickle=False) as arrays:
        found = arrays["format"].tolist() if told is not None and told.file_size < 1024 else "none"
    required = f"{STATS_FORMAT}; `python -m mess_tf.calibrate` makes the file anew"
    check(found == STATS_FORMAT, f"{os.fspath(path)}: format", required, found)
    return {name: array for name, array in map_arrays(path).items() if name != "format"}


def packed(tp: np.ndarray, fp: np.ndarray, labelled: np.ndarray) -> dict[str, np.ndarray]:
    """The counts of `Stats`, by name, of dense ones.

    Args:
      tp, fp: integers [K, I, C].
      labelled: integers [I, C].

    Raises:
      ValueError: one is larger than an int32.
    """
    most = max(int(each.max(initial=0)) for each in (tp, fp, labelled))
    check(most < 2**31, "labelled", f"below {2**31} pixels of a class in each image", most)
    pairs = np.nonzero((labelled > 0) | (fp > 0).any(axis=0))
    arrays = dict(zip(("image_of_pair", "class_of_pair"), pairs, strict=True))
    arrays |= {"labelled": labelled[pairs], "tp": tp[:, *pairs], "fp": fp[:, *pairs]}
    return {name: array.astype(np.int32, order="C") for name, array in arrays.items()}


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What `Stats` keeps of all images, of what it keeps of some of them each: the arrays of `packed`, `confident` and `changed`."""
    before = np.cumsum([0, *(part["changed"].shape[1] for part in parts)])
    images = [part["image_of_pair"] + first for part, first in zip(parts, before, strict=False)]
    arrays = {"image_of_pair": np.concatenate(images).astype(np.int32)}
    for name, axis in (("class_of_pair", 0), ("labelled", 0), ("tp", 1), ("fp", 1), ("confident", 1), ("changed", 1)):
        arrays[name] = np.concatenate([part[name] for part in parts], axis=axis)
    return arrays


def _check_maker(made_by: str) -> None:
    try:
        maker = json.loads(made_by)
    except json.JSONDecodeError:
        maker = made_by
    check(isinstance(maker, dict), "made_by", "a JSON object", made_by)


class _Arrays:
    """A dataclass of arrays, texts and tuples of texts that is kept as an .npz file."""

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        texts = {name: np.array(value, str) for name, value in values.items() if isinstance(value, tuple)}  # none of them is text, too
        write_arrays(path, format=np.int64(STATS_FORMAT), **values | texts)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Reads and checks the file. Its arrays stay in the file until they are used.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: naming the file and the key that is missing, unknown or does not fit.
        """
        _must_exist(path, "mess_tf.calibrate")
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        arrays = _of_format(path)
        try:
            for problem, keys in (("missing", {*fields} - {*arrays}), ("unknown", {*arrays} - {*fields})):
                check(not keys, "arrays", ", ".join(sorted(fields)), f"{problem} {', '.join(sorted(keys))}")
            values = {}
            for key, kind in fields.items():
                array = arrays[key]
                if kind is not np.ndarray:
                    ndim = 0 if kind is str else 1
                    check(
                        array.dtype.kind == "U" and array.ndim == ndim, key, f"text of {ndim} dimensions", (array.dtype.name, array.shape)
                    )
                values[key] = array if kind is np.ndarray else array.item() if kind is str else tuple(array.tolist())
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Stats(_Arrays):
    """What the search needs to know of a trained network: counts per image and candidate, and costs that need no device.

    A candidate is one head at one exit. K candidates, E exits, I images, C classes, T pixel thresholds. An image holds few of many
    classes, so counts are kept for P pairs of an image and a class, at least those that the label or any candidate has a pixel of; all
    other counts are 0.

    Attributes:
      split: name of the calibration split.
      fidelity: of the exit policy, see `policy.decide`.
      candidates: K names `exit1.fcn-r2-b1-d2`, grouped by exit, exit1 to exitN-1; the last one, alone of its exit, is `final.<head>`.
      images: I names.
      classes: C names.
      pixels: int64 [I], pixels of the mask (H·W), ignored ones included.
      image_of_pair, class_of_pair: int32 [P], by image, then by class, each pair once.
      labelled: int32 [P], labelled pixels; ignored ones are not counted, here and in the next two.
      tp, fp: int32 [K, P], predicted against labelled pixels; what `labelled` has more than `tp` is FN.
      theta_pix: float64 [T], increasing, in [0, 1].
      confident: int32 [K, I, T, 2], pixels with a confidence of at least theta_pix; last axis: plain, edge-aware.
      changed: int32 [K, I], pixels of the mask whose class is not the final exit's.
      prefix_macs, prefix_parameters, prefix_memory_bytes: int64 [E], from the image to all that the exit's heads read; memory is the most
        that is alive at once.
      head_macs, head_parameters, head_memory_bytes: int64 [K].
      prefix_sha256: E hashes of the exported submodels, empty strings before the export.
      head_sha256: K hashes, likewise.
      mask_sha256, plain_sha256, edge_sha256: K hashes each, likewise, of the submodels from a candidate's logits to its mask, and to
        its mask and plain or edge-aware confidence; candidates with logits of one size share them.
      made_by: JSON object, the versions and the git commit that made it.
      precision: of the candidates.

    Raises:
      ValueError: naming the key that does not fit.
    """

    split: str
    fidelity: str
    candidates: tuple[str, ...]
    images: tuple[str, ...]
    classes: tuple[str, ...]
    pixels: np.ndarray
    image_of_pair: np.ndarray
    class_of_pair: np.ndarray
    labelled: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    theta_pix: np.ndarray
    confident: np.ndarray
    changed: np.ndarray
    prefix_macs: np.ndarray
    head_macs: np.ndarray
    prefix_parameters: np.ndarray
    head_parameters: np.ndarray
    prefix_memory_bytes: np.ndarray
    head_memory_bytes: np.ndarray
    prefix_sha256: tuple[str, ...]
    head_sha256: tuple[str, ...]
    mask_sha256: tuple[str, ...]
    plain_sha256: tuple[str, ...]
    edge_sha256: tuple[str, ...]
    made_by: str
    precision: str = ""

    def __post_init__(self):
        check(self.precision in ("", *PRECISIONS), "precision", f"one of {', '.join(PRECISIONS)}", self.precision)
        check(self.fidelity in get_args(Fidelity), "fidelity", f"one of {', '.join(get_args(Fidelity))}", self.fidelity)
        for key in ("candidates", "images", "classes"):
            names = getattr(self, key)
            check(len(names) > 0 and len(set(names)) == len(names), key, "distinct names, at least one", names)
        expected = [f"exit{number}" for number in range(1, len(self.exits))] + ["final"]
        grouped = list(self.exit_of_candidate) == sorted(self.exit_of_candidate)
        alone = sum(name.startswith("final.") for name in self.candidates) == 1
        ok = list(self.exits) == expected and grouped and alone and all("." in name for name in self.candidates)
        check(ok, "candidates", "EXIT.HEAD names grouped by exit: exit1 to exitN-1, then one `final.HEAD`", self.candidates)

        k, e, i, p = len(self.candidates), len(self.exits), len(self.images), self.image_of_pair.size
        check(self.theta_pix.ndim == 1 and self.theta_pix.size > 0, "theta_pix", "a vector of at least one threshold", self.theta_pix.shape)
        t = self.theta_pix.size
        shapes = {"image_of_pair": (p,), "class_of_pair": (p,), "labelled": (p,), "tp": (k, p), "fp": (k, p)}
        shapes |= {"confident": (k, i, t, 2), "changed": (k, i)}
        kinds = dict.fromkeys(shapes, np.int32)
        shapes |= {"pixels": (i,)}
        for cost in ("macs", "parameters", "memory_bytes"):
            shapes |= {f"prefix_{cost}": (e,), f"head_{cost}": (k,)}
        for key, shape in shapes.items():
            array, kind = getattr(self, key), np.dtype(kinds.get(key, np.int64))
            check(array.dtype == kind, key, kind.name, array.dtype.name)
            check(array.shape == shape, key, f"of shape {shape}", array.shape)
            check(array.min(initial=0) >= 0, key, "without negative values", array.min(initial=0))
        check(self.theta_pix.dtype == np.float64, "theta_pix", "float64", self.theta_pix.dtype.name)
        check_theta_pix(self.theta_pix)
        ok = self.pixels.min() >= 1 and self.pixels.max() <= MAX_PIXELS
        check(ok, "pixels", f"between 1 and {MAX_PIXELS} in each image", (self.pixels.min(), self.pixels.max()))
        for key, most in (("image_of_pair", i), ("class_of_pair", len(self.classes))):
            check(getattr(self, key).max(initial=0) < most, key, f"below {most}", getattr(self, key).max(initial=0))
        rising = np.diff(self.image_of_pair.astype(np.int64) * len(self.classes) + self.class_of_pair) > 0
        check(rising.all(), "class_of_pair", "rising within an image, and images rising", f"{(~rising).sum()} pairs that are not")
        for key, most in (("tp", self.labelled), ("confident", self.pixels[:, None, None]), ("changed", self.pixels)):
            above = sum(np.count_nonzero(of_candidate > most) for of_candidate in getattr(self, key))
            required = "at most the labelled pixels" if key == "tp" else "at most the pixels of the image"
            check(not above, key, required, f"{above} larger counts")
        check(not self.changed[-1].any(), "changed", "0 at the final exit", self.changed[-1].max())
        check(self.labelled.any(), "labelled", "those of at least one labelled pixel", 0)
        check(len(self.prefix_sha256) == e, "prefix_sha256", f"{e} strings", len(self.prefix_sha256))
        for key in ("head_sha256", "mask_sha256", "plain_sha256", "edge_sha256"):
            check(len(getattr(self, key)) == k, key, f"{k} strings", len(getattr(self, key)))
        _check_maker(self.made_by)

    @functools.cached_property
    def exits(self) -> tuple[str, ...]:
        """The E exit names in order."""
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.candidates))

    @functools.cached_property
    def exit_of_candidate(self) -> np.ndarray:
        """int64 [K], the position in `exits` of each candidate's exit."""
        return np.array([self.exits.index(name.partition(".")[0]) for name in self.candidates])

    @functools.cached_property
    def labelled_of_class(self) -> np.ndarray:
        """int64 [C], labelled pixels of all images."""
        return np.bincount(self.class_of_pair, self.labelled, len(self.classes)).astype(np.int64)

    def counts(self, candidate: int | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """TP, FP and FN, int64 [I, C] each, where all images leave at one candidate or each at its own, int64 [I]."""
        pairs = np.arange(self.labelled.size)
        of_pair = np.broadcast_to(candidate, len(self.images))[self.image_of_pair]
        tp, fp = self.tp[of_pair, pairs], self.fp[of_pair, pairs]
        dense = np.zeros((3, len(self.images), len(self.classes)), np.int64)
        for each, values in zip(dense, (tp, fp, self.labelled - tp), strict=True):
            each[self.image_of_pair, self.class_of_pair] = values
        return tuple(dense)


# === regions.npz ===


@dataclasses.dataclass(frozen=True, eq=False)
class RegionStats(_Arrays):
    """What chains of exits come to where every cell of an image leaves for itself: the whole outcome of each configuration.

    A chains' candidates, J pairs of them, B budgets, K configurations with up to M early exits, I images, C classes. Chains that are
    shorter are filled up with -1, and with NaN in the thresholds.

    Attributes:
      split, images, classes, precision, made_by: as in `Stats`.
      stats_sha256: of the `stats.npz` that it belongs to, of the same images and the same network.
      neighbours: see `bundle.Regions`.
      grid: int64 [2], rows and columns of cells.
      budgets: int64 [B], rising; the last one is all cells.
      dense: names of exits, see there; those may be none.
      candidates: A names, shallow to deep.
      chains: int64 [K, M + 1], positions in `candidates`.
      theta_pix, theta_img: float64 [K, M], of each early exit.
      tp, fp: int32 [K, I, C], predicted against labelled pixels of the mask that comes out, ignored ones not counted.
      labelled: int64 [I, C].
      taken: int32 [K, I, M], the budget that each exit after the first took; 0 if no cell came so far.
      cells: int32 [K, I, M + 1], cells whose answer is that of each exit.
      first_macs, first_parameters: int64 [A], from the image to a candidate, as the first of a chain.
      pairs: int64 [J, 2], positions in `candidates` of neighbours in a chain.
      pair_macs: int64 [J, B], from the first of a pair to the second at a budget; 0 at those that a pair does not have: all but the last,
        where it can only run densely.
      pair_parameters: int64 [J], likewise.
      first_sha256: A hashes of the submodels, empty before the export, and where a candidate begins no chain.
      pair_sha256: J * B hashes, likewise, budget by budget; empty at those that a pair does not have.

    Raises:
      ValueError: naming the key that does not fit.
    """

    split: str
    stats_sha256: str
    images: tuple[str, ...]
    classes: tuple[str, ...]
    neighbours: str
    grid: np.ndarray
    budgets: np.ndarray
    dense: tuple[str, ...]
    candidates: tuple[str, ...]
    chains: np.ndarray
    theta_pix: np.ndarray
    theta_img: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    labelled: np.ndarray
    taken: np.ndarray
    cells: np.ndarray
    first_macs: np.ndarray
    first_parameters: np.ndarray
    pairs: np.ndarray
    pair_macs: np.ndarray
    pair_parameters: np.ndarray
    first_sha256: tuple[str, ...]
    pair_sha256: tuple[str, ...]
    made_by: str
    precision: str

    def __post_init__(self):
        check(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}", self.precision)
        for key in ("candidates", "images", "classes"):
            names = getattr(self, key)
            check(len(names) > 0 and len(set(names)) == len(names), key, "distinct names, at least one", names)
        check(self.chains.ndim == 2 and min(self.chains.shape) > 0, "chains", "a table of at least one chain", self.chains.shape)
        k, most = self.chains.shape
        a, i, c, j, b = len(self.candidates), len(self.images), len(self.classes), len(self.pairs), self.budgets.size
        shapes = {"grid": (2,), "budgets": (b,), "chains": (k, most), "pairs": (j, 2), "pair_macs": (j, b), "pair_parameters": (j,)}
        shapes |= {"first_macs": (a,), "first_parameters": (a,), "labelled": (i, c), "theta_pix": (k, most - 1), "theta_img": (k, most - 1)}
        shapes |= {"tp": (k, i, c), "fp": (k, i, c), "taken": (k, i, most - 1), "cells": (k, i, most)}
        kinds = {"theta_pix": np.float64, "theta_img": np.float64} | dict.fromkeys(("tp", "fp", "taken", "cells"), np.int32)
        for key, shape in shapes.items():
            array, kind = getattr(self, key), np.dtype(kinds.get(key, np.int64))
            check(array.dtype == kind, key, kind.name, array.dtype.name)
            check(array.shape == shape, key, f"of shape {shape}", array.shape)
            check(key == "chains" or not (array < 0).any(), key, "without negative values", array.min(initial=0))
        check(self.regions.cells == self.budgets[-1], "budgets", "such that the last is all cells", self.budgets.tolist())
        used = self.chains >= 0
        ok = (self.chains >= -1) & (self.chains < a)
        ok[:, 1:] &= ~used[:, 1:] | (self.chains[:, 1:] > self.chains[:, :-1]) & used[:, :-1]
        ok[:, :2] &= used[:, :2]
        check(
            bool(ok.all()), "chains", "positions of two candidates or more, each deeper than the one before", np.argwhere(~ok)[:1].tolist()
        )
        for key in ("theta_pix", "theta_img"):
            values = getattr(self, key)
            ok = np.where(used[:, 1:], (values >= 0) & (values <= 1), np.isnan(values))
            check(bool(ok.all()), key, "in [0, 1] at every early exit, NaN elsewhere", np.argwhere(~ok)[:1].tolist())
        rows = np.concatenate([self.chains, np.nan_to_num(self.theta_pix), np.nan_to_num(self.theta_img)], 1)
        check(len(np.unique(rows, axis=0)) == k, "chains", "with other thresholds where they are the same", "equal configurations")
        of_pair = self.pair_of_hop
        ok = (of_pair >= 0) == used[:, 1:]
        check(bool(ok.all()), "pairs", "distinct, all neighbours in a chain among them", np.argwhere(~ok)[:1].tolist())
        check((self.tp <= self.labelled).all(), "tp", "at most the labelled pixels", "more")
        check(self.labelled.sum() > 0, "labelled", "above 0 in at least one image", 0)
        check((self.pair_macs[:, -1] > 0).all(), "pair_macs", "above 0 at the last budget", int(self.pair_macs[:, -1].min()))
        known = np.isin(self.taken, (0, *self.budgets.tolist()))
        place = np.minimum(np.searchsorted(self.budgets, self.taken), b - 1)
        known &= (self.taken == 0) | (self.pair_macs[of_pair[:, None], place] > 0)
        required = f"0 or of the budgets {self.budgets.tolist()} that the pair has"
        check(bool(known.all()), "taken", required, self.taken[~known][:1].tolist())
        whole = (self.cells.sum(2) == self.budgets[-1]).all()
        check(bool(whole), "cells", f"{self.budgets[-1]} in each image", "others")
        check(len(self.first_sha256) == a, "first_sha256", f"{a} strings", len(self.first_sha256))
        check(len(self.pair_sha256) == j * b, "pair_sha256", f"{j * b} strings", len(self.pair_sha256))
        _check_maker(self.made_by)

    @functools.cached_property
    def regions(self) -> bundle.Regions:
        """How a deployment runs them."""
        return bundle.Regions(self.neighbours, tuple(self.grid.tolist()), tuple(self.budgets.tolist()), self.dense)

    @functools.cached_property
    def pair_of_hop(self) -> np.ndarray:
        """int64 [K, M], position in `pairs` of each exit after the first with the one before; -1 where there is none."""
        places = np.full((len(self.candidates) + 1,) * 2, -1)  # the last ones are those that fill up
        places[self.pairs[:, 0], self.pairs[:, 1]] = np.arange(len(self.pairs))
        return places[self.chains[:, :-1], self.chains[:, 1:]]

    def exits(self, configuration: int) -> tuple["ExitChoice", ...]:
        """The chosen exits of a configuration, by number."""
        chain = self.chains[configuration]
        names = [self.candidates[k].partition(".") for k in chain[chain >= 0]]
        thetas = [*zip(self.theta_pix[configuration].tolist(), self.theta_img[configuration].tolist(), strict=True)][: len(names) - 1]
        return tuple(ExitChoice(name, head, *pair) for (name, _, head), pair in zip(names, [*thetas, (None, None)], strict=True))


# === deployment.json ===


@dataclasses.dataclass(frozen=True)
class Objective:
    """What to reach: the least of a cost, or the best mIoU, within limits.

    Attributes:
      minimise: name of the cost, see `search.Costs`; None to maximise mIoU.
      min_miou: 0..1, None for any.
      limits: largest allowed value of costs by name, above 0.
    """

    minimise: str | None = None
    min_miou: float | None = None
    limits: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check(self.min_miou is None or 0 <= self.min_miou <= 1, "min_miou", "in [0, 1]", self.min_miou)
        check(self.minimise is None or self.min_miou is not None, "min_miou", "given where a cost is minimised", self.min_miou)
        for name, limit in self.limits.items():
            check(limit > 0, f"limits.{name}", "above 0", limit)


@dataclasses.dataclass(frozen=True)
class ExitChoice:
    """One chosen exit, its head, and when an image leaves there.

    Attributes:
      exit: exit1 … exitN-1 or final.
      head: name of the head, without the exit.
      theta_pix: confidence from which a pixel counts as confident; None where no decision is taken.
      theta_img: share of confident pixels from which the image leaves; None where no decision is taken.
    """

    exit: str
    head: str
    theta_pix: float | None = None
    theta_img: float | None = None

    def __post_init__(self):
        check((self.theta_pix is None) == (self.theta_img is None), self.exit, "with both thresholds or none", self)
        for name in ("theta_pix", "theta_img"):
            value = getattr(self, name)
            check(value is None or 0 <= value <= 1, f"{self.exit}.{name}", "in [0, 1]", value)


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A way to run the network.

    Attributes:
      setting: `budgeted` (one exit), `input-dependent` (an image leaves at the first exit that is sure of it) or `anytime` (all chosen
        exits one after another, until the deadline).
      edge_aware: the confidence is edge-aware.
      exits: the chosen exits, shallow to deep. With `input-dependent` or `regions`, all but the last have thresholds; otherwise none has.
      horizon: latest deadline of `anytime`, in the unit of the costs; None in the other settings.
      regions: where every cell leaves for itself: `theta_img` is asked of each, and all exits but the last have thresholds.
    """

    setting: str
    edge_aware: bool
    exits: tuple[ExitChoice, ...]
    horizon: float | None
    regions: bundle.Regions | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        check(self.setting in SETTINGS, "setting", f"one of {', '.join(SETTINGS)}", self.setting)
        names = [choice.exit for choice in self.exits]
        check(len(names) > 0 and len(set(names)) == len(names), "exits", "distinct exits, at least one", names)
        check(self.setting != BUDGETED or len(names) == 1, "exits", "one exit in the budgeted setting", names)
        decides = [choice.theta_pix is not None for choice in self.exits]
        expected = [self.setting == INPUT_DEPENDENT or self.regions is not None] * (len(names) - 1) + [False]
        required = "with thresholds in all but the last exit, and only if input-dependent or with regions"
        check(decides == expected, "exits", required, self.exits)
        if self.regions:
            bundle.check_with_regions(self.setting, tuple(names))
        check((self.horizon is not None) == (self.setting == ANYTIME), "horizon", "given with anytime and only there", self.horizon)


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What the calibration images promise.

    Attributes:
      miou: 0..1; with `anytime`, the mean over the deadlines.
      cost_name: unit of the cost of an image, `macs` or `latency_ms`.
      cost_mean, cost_p90: over the images.
      exit_rates: share of the images that leave at each chosen exit; with regions, of the cells that have their answer from it.
      costs: all costs by name.
      miou_interval, cost_interval: of `miou` and `cost_mean`, 95 % bootstrap over the images.
      images: number of calibration images that these figures are of.
    """

    miou: float
    cost_name: str
    cost_mean: float
    cost_p90: float
    exit_rates: tuple[float, ...]
    costs: dict[str, float]
    miou_interval: tuple[float, float]
    cost_interval: tuple[float, float]
    images: int

    def in_manifest(self, backend: str | None = None) -> bundle.Predicted:
        """What of it goes with a bundle, with the backend that the cost is of."""
        return bundle.Predicted(self.miou, bundle.Cost(self.cost_name, self.cost_mean), self.exit_rates, backend)


@dataclasses.dataclass(frozen=True)
class Original:
    """The network without early exits: mIoU (0..1) and cost of its final exit alone."""

    miou: float
    cost: float


@dataclasses.dataclass(frozen=True)
class Certificate:
    """How the optimum was made sure: covered = scored + all that was cut + open.

    Attributes:
      covered: configurations of the searched space; twice where a second pass has settled which of several equally cheap ones is best.
      scored: those with an exactly computed mIoU.
      cut_by_rule: those that a rule has shown to be no better than the result, per rule: `bound` of a part of the space, `reduced_cost` of
        one of its decisions, `linear_bound` of the configuration itself, `limit` that it breaks.
      open: those left when the time was up.
      bound: no configuration is better than this, in mIoU or in the cost that is minimised.
      gap: distance of the result to the bound; 0 is exact.
      seconds: of the search.
      quantiles: values of theta_img per exit and theta_pix where several early exits decide; None for every one that changes a decision.
    """

    covered: int
    scored: int
    cut_by_rule: dict[str, int]
    open: int
    bound: float
    gap: float
    seconds: float
    quantiles: int | None


@dataclasses.dataclass(frozen=True)
class Guarantee:
    """A promise on images like those of the calibration (drawn independently from the same source), by Learn then Test.

    Attributes:
      risk: `final`, the share of an image's pixels whose class is not the original network's, or `labels`, the pixel accuracy that an image
        loses against the original network (0 where it gains); both as the mean over images.
      max_risk: what the risk does not exceed ...
      confidence: ... with at least this probability over the draw of the checking images.
      estimate: of the risk, on the checking images.
      images: number of checking images; none of them was used to choose.
    """

    risk: str
    max_risk: float
    confidence: float
    estimate: float
    images: int

    def __post_init__(self):
        check(self.risk in RISKS, "risk", f"one of {', '.join(RISKS)}", self.risk)
        check(0 < self.max_risk < 1, "max_risk", "between 0 and 1", self.max_risk)
        check(0 < self.confidence < 1, "confidence", "between 0 and 1", self.confidence)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a search is asked for, as the flags of `mess_tf.search` say it; `Objective` is what that comes to in its statistics.

    Attributes:
      min_miou, max_drop_pp, max_cost, cost_share: the constraint, see `optimise.search.resolve_objective`; one of these and `max_risk`.
      max_risk, confidence, risk: see `Guarantee`.
      limits, minimise: see `Objective`.
      setting, max_early_exits, quantiles, time_limit: see `optimise.search.search`.
      check_share: share of the images that have no part in choosing; None for none, or with `max_risk` half of them.
      device, threads: whose latencies count; None where the file leaves no choice.
      backends: of which one is chosen, as in latency.json; none for all that the device was measured on.
      precisions: of which one is chosen, each with statistics of its own (`of_precision`); none for `stats.npz`, whatever its precision.
      decide: one of DECIDES; None for the best of both where there is a `regions.npz` and regions can be asked this, otherwise for images.
    """

    min_miou: float | None = None
    max_drop_pp: float | None = None
    max_cost: float | None = None
    cost_share: float | None = None
    max_risk: float | None = None
    confidence: float = 0.95
    risk: str = "labels"
    limits: dict[str, float] = dataclasses.field(default_factory=dict)
    minimise: str | None = None
    setting: str = INPUT_DEPENDENT
    max_early_exits: int = 2
    quantiles: int | None = None
    time_limit: float = 600.0
    check_share: float | None = None
    device: str | None = None
    threads: int | None = None
    backends: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    decide: str | None = None

    def __post_init__(self):
        check(self.decide in (None, *DECIDES), "decide", f"one of {', '.join(DECIDES)}", self.decide)
        for name in ("backends", "precisions"):
            values = getattr(self, name)
            check(len(set(values)) == len(values) and all(values), name, "different names", ",".join(values))
        check(set(self.precisions) <= set(PRECISIONS), "precisions", f"of {', '.join(PRECISIONS)}", ",".join(self.precisions))
        names = ("min_miou", "max_drop_pp", "max_cost", "cost_share", "max_risk")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        check(len(given) == 1, "constraint", f"one of --{', --'.join(names[:-1])} and --{names[-1]}", given or "none")
        for name, ok, required in (
            ("min_miou", lambda value: 0 <= value <= 1, "in [0, 1], not in percent"),
            ("max_drop_pp", lambda value: -100 <= value <= 100, "percentage points, in [-100, 100]"),
            ("max_cost", lambda value: 0 < value < math.inf, "above 0 and finite"),
            ("cost_share", lambda value: 0 < value < math.inf, "above 0 and finite"),
            ("max_risk", lambda value: 0 < value < 1, "between 0 and 1"),
            ("confidence", lambda value: 0 < value < 1, "between 0 and 1"),
            ("check_share", lambda value: 0 < value < 1, "between 0 and 1"),
            ("time_limit", lambda value: value > 0, "above 0"),
        ):
            value = getattr(self, name)
            check(value is None or ok(value), name, required, value)
        compared = self.max_risk is not None and len(self.precisions) > 1
        against = "labels where several precisions are compared, as statistics tell what differs from the original in their own only"
        check(not compared or self.risk == "labels", "risk", against, self.risk)
        for name in (*self.limits, *([self.minimise] if self.minimise else [])):
            check(name in COSTS, "minimise" if name == self.minimise else "limit", f"of costs {', '.join(COSTS)}", name)
        if self.decide in (REGIONS_DECIDE, BEST_DECIDES) and (reason := self._not_of_regions):
            raise ValueError(f"decide: must be {IMAGE_DECIDES} with {reason}, got {self.decide!r}")

    @property
    def _not_of_regions(self) -> str:
        """What of it no regions can be asked; empty if there is nothing."""
        if self.setting != INPUT_DEPENDENT:
            return f"the setting {self.setting}"
        if self.max_risk is not None:
            return "max_risk, which is shown of whole images"
        names = {*self.limits, self.minimise} - {None, *REGION_COSTS}
        return f"{', '.join(sorted(names))}, which is not known of regions" if names else ""

    def deciders(self, known: bool) -> tuple[str, ...]:
        """Which searches the best is taken of; `known`: there are statistics of regions."""
        if self.decide in (IMAGE_DECIDES, REGIONS_DECIDE):
            return (self.decide,)
        both = self.decide == BEST_DECIDES or (known and not self._not_of_regions)
        return (IMAGE_DECIDES, REGIONS_DECIDE) if both else (IMAGE_DECIDES,)

    @property
    def flag(self) -> str:
        """The constraint as the flag that asks for it."""
        names = ("min_miou", "max_drop_pp", "max_cost", "cost_share", "max_risk")
        ((name, value),) = ((name, getattr(self, name)) for name in names if getattr(self, name) is not None)
        return f"--{name}={value:g}"

    @property
    def constraint(self) -> dict[str, Any]:
        """The keyword arguments of `optimise.search.resolve_objective`."""
        names = ("min_miou", "max_drop_pp", "max_cost", "cost_share", "limits", "minimise")
        return {name: getattr(self, name) for name in names}

    @property
    def space(self) -> dict[str, Any]:
        """What is searched: keyword arguments of `optimise.search.search`."""
        return {name: getattr(self, name) for name in ("max_early_exits", "quantiles", "time_limit")}


@dataclasses.dataclass(frozen=True)
class Combination:
    """A backend, a precision and who decides, that the search had to choose from.

    Attributes:
      backend: as in latency.json, None without latencies.
      precision: of the statistics.
      miou, cost_mean: of its best configuration, on the images that choose; None where it has none.
      exits: of that configuration, EXIT.HEAD.
      reason: why another one was chosen; empty for the chosen one.
      decide: `image` or `regions`.
    """

    backend: str | None
    precision: str
    miou: float | None
    cost_mean: float | None
    exits: tuple[str, ...]
    reason: str
    decide: str = IMAGE_DECIDES


@dataclasses.dataclass(frozen=True)
class Deployment(Configuration):
    """The result of the search: a configuration, what was asked, and what it promises.

    Attributes:
      constraint: what was asked.
      predicted, certificate: see there.
      original: of the same backend and precision; what accuracy was asked for may be relative to another one, see `combinations.reference`.
      guarantee: what is promised, where it was asked for.
      stats_sha256: of the `stats.npz` that was searched; empty where the statistics came from no file.
      fidelity: of the exit policy that the thresholds were chosen for.
      made_by: versions and git commit.
      asked: what the command was asked for; None where it was no command that searched.
      costs_sha256: of all statistics and costs that were searched, see `combinations.sha256`; empty likewise.
      backend: that its costs are of, as in latency.json; None without latencies.
      precision: of the statistics, in which it is exported; empty where they do not say.
      combinations: all backends, precisions and ways to decide that there were to choose from.
    """

    constraint: Objective
    predicted: Predicted
    original: Original
    certificate: Certificate
    guarantee: Guarantee | None
    stats_sha256: str
    fidelity: Fidelity
    made_by: dict[str, str]
    asked: Asked | None = None
    costs_sha256: str = ""
    backend: str | None = None
    precision: str = ""
    combinations: tuple[Combination, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        check(self.precision in ("", *PRECISIONS), "precision", f"one of {', '.join(PRECISIONS)}", self.precision)
        rates = self.predicted.exit_rates
        check(len(rates) == len(self.exits), "predicted.exit_rates", f"{len(self.exits)} shares, one per exit", rates)

    @property
    def decide(self) -> str:
        """Who decides: `image` or `regions`."""
        return REGIONS_DECIDE if self.regions else IMAGE_DECIDES

    def named(self, name: str) -> str:
        """Name in the work folder of the statistics or candidates that it was searched in, see `of_precision`."""
        return of_precision(name, self.precision if self.asked and self.asked.precisions else None)

    def save(self, path: str | os.PathLike) -> None:
        """Writes `deployment.json`."""
        write_json(path, {"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Reads and checks `deployment.json`.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: naming the file and the key that is missing, unknown or does not fit.
        """
        _must_exist(path, "mess_tf.search")
        return read_json(path, lambda value: decode_versioned(cls, value, "deployment"))

    def check_stats(self, path: str | os.PathLike, stats: str | os.PathLike) -> None:
        """Checks that this was searched in a file of statistics. One that is not there, or a search in no file, tells nothing.

        Args:
          path: of this deployment, for the message.
          stats: the `stats.npz`.

        Raises:
          ValueError: it was searched in others.
        """
        now = file_sha256(stats) if self.stats_sha256 and os.path.exists(stats) else self.stats_sha256
        check(now == self.stats_sha256, f"{os.fspath(path)}: stats_sha256", f"that of {os.fspath(stats)}; search again", self.stats_sha256)
