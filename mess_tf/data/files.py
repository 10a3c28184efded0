"""Image files and their labels, all checked on opening, and the source that is a folder per split."""

import codecs
import concurrent.futures
import dataclasses
import os
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mess_runtime.files import printable
from mess_runtime.images import SUFFIXES, UnreadableError, check_label_size, files_in, photo_header, read_photo
from mess_runtime.terminal import Bar, complain, first_few
from mess_tf.configs import IGNORE, OWN_LABELS, DataConfig
from mess_tf.data.examples import DataError, DatasetInfo, Examples
from mess_tf.data.labels import LabelReader


class Label(Protocol):
    """The label of one image, where and however it is kept. As text it is its name in messages."""

    def read(self) -> np.ndarray:
        """Returns it, uint8 [H, W] of classes and IGNORE.

        Raises:
          DataError, UnreadableError: it is missing, broken, or holds what is no class.
        """

    def content(self) -> bytes:
        """What it is made from, to tell changed data from others."""


@dataclasses.dataclass(frozen=True)
class LabelFile:
    """A label that is a PNG file; `image` is whose."""

    path: pathlib.Path
    image: pathlib.Path
    reader: LabelReader

    def read(self) -> np.ndarray:
        if not self.path.is_file():
            others = [path.name for path in sorted(self.path.parent.glob("*.*")) if path.stem == self.path.stem]
            hint = f"; there is {printable(others[0])}, labels must be PNG" if others else _nearly(self.path)
            raise DataError(f"{self}: the label of {printable(str(self.image))} is missing{hint}")
        return self.reader.read(self.path)

    def content(self) -> bytes:
        return self.path.read_bytes()

    def __str__(self) -> str:
        return printable(str(self.path))


def _nearly(path: pathlib.Path) -> str:
    """A hint at a file that there is instead of a missing one, whose name people read as the same."""

    def read(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    for other in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
        if read(other.name) == read(path.name):
            by_case = unicodedata.normalize("NFC", other.name) != unicodedata.normalize("NFC", path.name)
            how = "by case" if by_case else "in how Unicode composes its letters (NFC, NFD)"
            return f"; there is {printable(other.name)}, whose name differs {how}"
    return ""


def open_folder(config: DataConfig, split: str) -> Examples:
    root = pathlib.Path(config.data_dir)
    classes = _read_classes(root / "classes.txt")
    images = by_stem(root / split / "images", SUFFIXES)
    folder = root / split / "labels"
    labels = by_stem(folder, {".png"})
    if surplus := sorted(labels.keys() - images.keys()):
        complain(first_few([f"{printable(str(labels[stem]))}: left out, there is no image of this name" for stem in surplus]))
    reader = LabelReader(config.label_values, config.ignore_value, len(classes))
    pairs = [(path, LabelFile(labels.get(stem, folder / f"{stem}.png"), path, reader)) for stem, path in images.items()]
    return open_pairs(config, classes, pairs, root / split)


def read_lines(path: pathlib.Path) -> list[str]:
    """The lines of a text file that are not blank. UTF-8, or UTF-16 with a byte order mark, as Windows' editors write them."""
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        lines = [line.strip() for line in content.decode(encoding).splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{printable(str(path))}: must be text in UTF-8, got byte {error.object[error.start]:#04x} at {error.start}"
        ) from error
    for line in lines:
        if not line.isprintable():
            raise DataError(f"{printable(str(path))}: must be text in UTF-8 without control characters, got {line!r}")
    return [line for line in lines if line]


def _read_classes(path: pathlib.Path) -> tuple[str, ...]:
    if not path.is_file():
        raise DataError(f"{path}: missing; it must list the class names, one a line, in the order of the label values")
    classes = tuple(read_lines(path))
    if not 2 <= len(set(classes)) == len(classes) <= IGNORE:
        raise DataError(f"{path}: must list 2 to {IGNORE} different class names, got {len(classes)}, {len(set(classes))} of them different")
    return classes


def by_stem(folder: pathlib.Path, suffixes: set[str]) -> dict[str, pathlib.Path]:
    """The files of a folder by their names without suffix, which must be different."""
    if not folder.is_dir():
        raise DataError(f"{printable(str(folder))}: folder is missing")
    try:
        paths = files_in(folder, suffixes)
    except ValueError as error:
        raise DataError(str(error)) from error
    found: dict[str, pathlib.Path] = {}
    for path in paths:
        if (other := found.setdefault(path.stem, path)) != path:
            raise DataError(f"{printable(str(path))}: must have a name of its own, got that of {printable(other.name)}")
    return found


def open_pairs(config: DataConfig, classes: Sequence[str], pairs: Sequence[tuple[pathlib.Path, Label]], where: pathlib.Path) -> Examples:
    """Checks every pair of an image file and its label, counting class pixels on the way; `where` is what names them."""
    if not pairs:
        raise DataError(f"{printable(str(where))}: the split has no images")
    paths: dict[str, pathlib.Path] = {}
    for path, _ in pairs:
        if path.stem in paths:
            twice = f"{printable(str(paths[path.stem]))} and {printable(str(path))}"
            raise DataError(f"{printable(str(where))}: must hold each name once, got {twice}")
        paths[path.stem] = path
    info = DatasetInfo(config.source, tuple(classes))
    counts = np.zeros(info.num_classes, np.int64)
    problems, doubtful = [], []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, Bar(f"checking {where.stem}", len(pairs), "label") as bar:
        for (path, _), result in zip(pairs, pool.map(lambda pair: _check_pair(*pair, info.num_classes), pairs), strict=True):
            if isinstance(result, Exception):
                problems.append(str(result))
            else:
                counts += result[0]
                doubtful += [path] if result[1] else []
            bar.advance()
    if problems:
        raise DataError(first_few(problems))
    if not counts.any():
        told = f"; data.ignore_value is {config.ignore_value}, data.label_values tells what label files mean"
        hint = told if config.source in OWN_LABELS else "; those of a test split may be kept back"
        raise DataError(f"{printable(str(where))}: must hold labelled pixels, got none in {len(pairs)} labels{hint}")

    if doubtful:
        which = f"{len(doubtful)} photos, such as {printable(doubtful[0].name)}, are stored turned or mirrored (EXIF orientation)"
        complain(
            f"warning: {printable(str(where))}: {which}: their labels, of the same size either way, are taken to be as viewers show them"
        )

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        path, label = pairs[index]
        try:
            image, pixels = read_photo(path), label.read()
            check_label_size(label, pixels.shape, path, image.shape[:2])
        except UnreadableError as error:
            raise DataError(str(error)) from error
        return image, pixels

    def content(index: int) -> list[bytes]:
        path, label = pairs[index]
        return [path.read_bytes(), label.content()]

    # Names that are not UTF-8, or hold line breaks, are shown with escapes: they go into logs, tables and files of text.
    names = [stem if stem.isprintable() else stem.encode("unicode_escape").decode() for stem in paths]
    return Examples(info, names, read, class_pixels=counts, content=content)


def _check_pair(path: pathlib.Path, label: Label, num_classes: int) -> tuple[np.ndarray, bool] | ValueError:
    """The pixels per class, int64 [C], and whether the label may be of the photo as it is stored rather than shown; or what is wrong.

    Decodes the label, of the image only the header.
    """
    try:
        pixels = label.read()
        if not path.is_file():
            raise DataError(f"{printable(str(path))}: not a readable image: missing{_nearly(path)}")
        size, orientation = photo_header(path)
        check_label_size(label, pixels.shape, path, size)
        doubtful = orientation in range(2, 5) or (orientation > 4 and size[0] == size[1])
        if doubtful and isinstance(label, LabelFile):
            doubtful = photo_header(label.path)[1] == 1
        return np.bincount(pixels.ravel(), minlength=256)[:num_classes], doubtful
    except (DataError, UnreadableError) as error:
        return error
