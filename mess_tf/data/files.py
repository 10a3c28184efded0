"""Sources of image files: a folder per split, and VOCdevkit. All labels are checked on opening."""

import concurrent.futures
import contextlib
import os
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from mess_runtime import terminal
from mess_tf.configs import IGNORE, DataConfig
from mess_tf.data.examples import DataError, DatasetInfo, Examples

INVALID = -1  # in a label table: a stored value that must not occur
_SHOWN_PROBLEMS = 5

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def open_folder(config: DataConfig, split: str) -> Examples:
    root = pathlib.Path(config.data_dir)
    classes = _read_classes(root / "classes.txt")
    folder = _need_folder(root / split / "images")
    labels = _need_folder(root / split / "labels")
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pairs = [(path, labels / f"{path.stem}.png") for path in images]
    return _open_files(DatasetInfo(config.source, classes), pairs, config.ignore_value, empty=folder)


def open_voc(config: DataConfig, split: str) -> Examples:
    data_dir = pathlib.Path(config.data_dir)
    roots = [path.parent for start in ("", "VOC*/", "VOCdevkit/VOC*/") for path in data_dir.glob(f"{start}JPEGImages")]
    if len(roots) != 1:
        found = ", ".join(str(root) for root in roots) or "none"
        raise DataError(f"{data_dir}: must be or contain exactly one VOC year with a JPEGImages folder, found {found}")
    split_file = roots[0] / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not split_file.is_file():
        raise DataError(f"{split_file}: the list of images of split {split!r} is missing")
    names = split_file.read_text().split()
    pairs = [(roots[0] / "JPEGImages" / f"{name}.jpg", roots[0] / "SegmentationClass" / f"{name}.png") for name in names]
    return _open_files(DatasetInfo(config.source, VOC_CLASSES), pairs, config.ignore_value, empty=split_file)


def _read_classes(path: pathlib.Path) -> tuple[str, ...]:
    if not path.is_file():
        raise DataError(f"{path}: missing; it must list the class names, one a line, in the order of the label values")
    classes = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if not 2 <= len(set(classes)) == len(classes) <= IGNORE:
        raise DataError(f"{path}: must list 2 to {IGNORE} different class names, got {len(classes)}, {len(set(classes))} of them different")
    return classes


def _need_folder(path: pathlib.Path) -> pathlib.Path:
    if not path.is_dir():
        raise DataError(f"{path}: folder is missing")
    return path


def _open_files(info: DatasetInfo, pairs: list[tuple[pathlib.Path, pathlib.Path]], ignore_value: int, empty: pathlib.Path) -> Examples:
    """Checks every (image, label) pair of files, counting class pixels on the way."""
    if not pairs:
        raise DataError(f"{empty}: the split has no images")
    if not info.num_classes <= ignore_value <= 255:
        raise DataError(f"data.ignore_value: must be above the {info.num_classes} classes of {empty} and at most 255, got {ignore_value}")
    table = np.full(256, INVALID, np.int16)
    table[: info.num_classes] = np.arange(info.num_classes)
    table[ignore_value] = IGNORE

    counts = np.zeros(info.num_classes, np.int64)
    problems = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda pair: _check_pair(*pair, table, info.num_classes), pairs)
        for _, result in zip(terminal.progress(pairs, f"check {pairs[0][1].parent}", "label"), results, strict=True):
            if isinstance(result, DataError):
                problems.append(str(result))
            else:
                counts += result
    if problems:
        more = [f"... and {len(problems) - _SHOWN_PROBLEMS} more"] if len(problems) > _SHOWN_PROBLEMS else []
        raise DataError("\n".join(problems[:_SHOWN_PROBLEMS] + more))

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        image_path, label_path = pairs[index]
        return _decode_image(image_path), apply_table(_decode_label(label_path), table, label_path)

    return Examples(info, [image.stem for image, _ in pairs], read, class_pixels=counts)


def _check_pair(image_path: pathlib.Path, label_path: pathlib.Path, table: np.ndarray, num_classes: int) -> np.ndarray | DataError:
    """Returns the pixels per class, int64 [C], or what is wrong with the pair. Decodes the label, of the image only the header."""
    try:
        if not label_path.is_file():
            raise DataError(f"{label_path}: the label of {image_path} is missing")
        with _opened(image_path) as image:
            width, height = image.size
        label = _decode_label(label_path)
        if label.shape != (height, width):
            raise DataError(f"{label_path}: must be as large as its image, {height}x{width}, got {label.shape[0]}x{label.shape[1]}")
        return np.bincount(apply_table(label, table, label_path).ravel(), minlength=256)[:num_classes]
    except DataError as error:
        return error


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError) as error:  # Pillow reports some broken PNG files as a SyntaxError
        raise DataError(f"{path}: not a readable image ({error})") from error


def _decode_image(path: pathlib.Path) -> np.ndarray:
    with _opened(path) as image:
        return np.array(image.convert("RGB"))


def _decode_label(path: pathlib.Path) -> np.ndarray:
    with _opened(path) as image:
        if image.mode not in ("L", "P"):
            raise DataError(f"{path}: must be a single-channel or palette image of one byte per pixel, got mode {image.mode}")
        return np.array(image)


def apply_table(raw: np.ndarray, table: np.ndarray, name: object) -> np.ndarray:
    """Turns stored label values into classes and IGNORE; `table` is int16 [256] with `INVALID` where a value must not occur."""
    label = table[raw]
    wrong = label == INVALID
    if wrong.any():
        raise DataError(f"{name}: label values must be classes or the ignored value, got {np.unique(raw[wrong]).tolist()[:10]}")
    return label.astype(np.uint8)
