"""Sources of image files: a folder per split, and VOCdevkit. All labels are checked on opening."""

import codecs
import concurrent.futures
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from mess_runtime.files import printable
from mess_runtime.images import SUFFIXES, UnreadableError, files_in, photo_size, read_photo
from mess_runtime.terminal import Bar, complain
from mess_tf.configs import IGNORE, DataConfig
from mess_tf.data.examples import DataError, DatasetInfo, Examples, first_few
from mess_tf.data.labels import LabelReader

_COLUMNS = "a name, the path of an image, or its path and that of its label"

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def open_folder(config: DataConfig, split: str) -> Examples:
    root = pathlib.Path(config.data_dir)
    classes = _read_classes(root / "classes.txt")
    images = _by_stem(root / split / "images", SUFFIXES)
    folder = root / split / "labels"
    labels = _by_stem(folder, {".png"})
    if surplus := sorted(labels.keys() - images.keys()):
        more = f" and {len(surplus) - 1} more" if len(surplus) > 1 else ""
        complain(f"{printable(str(labels[surplus[0]]))}{more}: left out, there is no image of this name")
    pairs = [(path, labels.get(stem, folder / f"{stem}.png")) for stem, path in images.items()]
    return _open_files(config, classes, pairs, root / split)


def open_voc(config: DataConfig, split: str) -> Examples:
    data_dir = pathlib.Path(config.data_dir)
    roots = [path.parent for start in ("", "VOC*/", "VOCdevkit/VOC*/") for path in data_dir.glob(f"{start}JPEGImages")]
    if len(roots) != 1:
        found = ", ".join(str(root) for root in roots) or "none"
        raise DataError(f"{data_dir}: must be or contain exactly one VOC year with a JPEGImages folder, found {found}")
    split_file = roots[0] / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not split_file.is_file():
        raise DataError(f"{split_file}: the list of images of split {split!r} is missing")
    pairs, lines = [], {}
    for line in _read_lines(split_file):
        pairs.append(_listed(line, roots[0], split_file))
        other = lines.setdefault(pairs[-1][0].stem, line)
        if len(lines) < len(pairs):
            raise DataError(f"{printable(str(split_file))}: must list each image once, got {other!r} and {line!r}")
    if not pairs:
        raise DataError(f"{split_file}: the split has no images")
    return _open_files(config, VOC_CLASSES, pairs, split_file)


def _listed(line: str, root: pathlib.Path, split_file: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Image and label of a line of an ImageSets list: a name, or paths inside the VOC year, as lists of SBD's `train_aug` hold them."""
    words = line.split()
    if len(words) == 1 or (root / "JPEGImages" / f"{line}.jpg").is_file():
        words = [line]
    is_path = ["/" in word or pathlib.Path(word).suffix.lower() in SUFFIXES for word in words]
    if len(words) > 2 or (len(words) == 2 and not all(is_path)):
        raise DataError(f"{printable(str(split_file))}: each line must be {_COLUMNS}, got {line!r}")
    if not is_path[0]:
        return root / "JPEGImages" / f"{line}.jpg", root / "SegmentationClass" / f"{line}.png"
    paths = [root / word.lstrip("/") if "/" in word else root / "JPEGImages" / word for word in words]
    return paths[0], paths[1] if len(paths) == 2 else root / "SegmentationClass" / f"{paths[0].stem}.png"


def _read_lines(path: pathlib.Path) -> list[str]:
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
    classes = tuple(_read_lines(path))
    if not 2 <= len(set(classes)) == len(classes) <= IGNORE:
        raise DataError(f"{path}: must list 2 to {IGNORE} different class names, got {len(classes)}, {len(set(classes))} of them different")
    return classes


def _by_stem(folder: pathlib.Path, suffixes: set[str]) -> dict[str, pathlib.Path]:
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


def _open_files(
    config: DataConfig, classes: Sequence[str], pairs: list[tuple[pathlib.Path, pathlib.Path]], split: pathlib.Path
) -> Examples:
    """Checks every (image, label) pair of files, counting class pixels on the way."""
    info = DatasetInfo(config.source, tuple(classes))
    reader = LabelReader(config, info.num_classes)
    counts = np.zeros(info.num_classes, np.int64)
    problems = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, Bar(f"checking {split.stem}", len(pairs), "label") as bar:
        for result in pool.map(lambda pair: _check_pair(*pair, reader, info.num_classes), pairs):
            if isinstance(result, Exception):
                problems.append(str(result))
            else:
                counts += result
            bar.advance()
    if problems:
        raise DataError(first_few(problems))
    if not counts.any():
        ignored = f"; data.ignore_value is {config.ignore_value}, data.label_values tells what label files mean"
        raise DataError(f"{printable(str(split))}: must hold labelled pixels, got none in {len(pairs)} labels{ignored}")

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        image_path, label_path = pairs[index]
        try:
            image, label = read_photo(image_path), reader.read(label_path)
        except UnreadableError as error:
            raise DataError(str(error)) from error
        _check_sizes(image.shape[:2], label, label_path)
        return image, label

    def content(index: int) -> list[bytes]:
        return [path.read_bytes() for path in pairs[index]]

    # Names that are not UTF-8, or hold line breaks, are shown with escapes: they go into logs, tables and files of text.
    names = [path.stem if path.stem.isprintable() else path.stem.encode("unicode_escape").decode() for path, _ in pairs]
    return Examples(info, names, read, class_pixels=counts, content=content)


def _check_pair(image_path: pathlib.Path, label_path: pathlib.Path, reader: LabelReader, num_classes: int) -> np.ndarray | ValueError:
    """Returns the pixels per class, int64 [C], or what is wrong with the pair. Decodes the label, of the image only the header."""
    try:
        if not label_path.is_file():
            others = [path.name for path in sorted(label_path.parent.glob("*.*")) if path.stem == label_path.stem]
            hint = f"; there is {others[0]}, labels must be PNG" if others else ""
            raise DataError(f"{printable(str(label_path))}: the label of {printable(str(image_path))} is missing{printable(hint)}")
        size = photo_size(image_path)
        label = reader.read(label_path)
        _check_sizes(size, label, label_path)
        return np.bincount(label.ravel(), minlength=256)[:num_classes]
    except (DataError, UnreadableError) as error:
        return error


def _check_sizes(size: tuple[int, int], label: np.ndarray, path: pathlib.Path) -> None:
    (height, width), received = size, f"{label.shape[0]}x{label.shape[1]}"
    if label.shape != (height, width):
        raise DataError(f"{printable(str(path))}: must be as large as its image, {height}x{width}, got {received}")
