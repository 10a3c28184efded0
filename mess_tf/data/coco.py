"""COCO's objects as labels of Pascal VOC's 21 classes, made as in torchvision's reference for segmentation."""

import collections
import dataclasses
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mess_runtime.bundle import read_json
from mess_runtime.files import printable
from mess_runtime.terminal import Bar
from mess_tf.configs import IGNORE, DataConfig
from mess_tf.data.examples import DataError, Examples
from mess_tf.data.files import open_pairs
from mess_tf.data.layouts import VOC_CLASSES

# What COCO calls some of VOC's classes.
_COCO_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
_LEAST_AREA = 1000  # of an image's objects, in pixels; training leaves out images with no more
_LONGEST_SIDE = 2**14


@dataclasses.dataclass(frozen=True)
class Objects:
    """The objects of one image, from which its label is made.

    Attributes:
      where: file and image, for messages.
      size: (height, width) in pixels.
      regions: class and run lengths, as pycocotools packs them, of each object.
    """

    where: str
    size: tuple[int, int]
    regions: list[tuple[int, bytes]]

    def read(self) -> np.ndarray:
        """Background where no object is, IGNORE where several are: which is in front is not known."""
        from pycocotools import mask

        label, covered = np.zeros(self.size, np.uint8, order="F"), np.zeros(self.size, bool, order="F")
        for value, counts in self.regions:
            region = mask.decode({"size": self.size, "counts": counts}).view(bool)
            label[region] = value
            label[region & covered] = IGNORE
            covered |= region
        return np.ascontiguousarray(label)

    def content(self) -> bytes:
        return repr((self.size, self.regions)).encode()

    def __str__(self) -> str:
        return self.where


def open_coco21(config: DataConfig, split: str) -> Examples:
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError:
        raise DataError("data.source: 'coco21' needs pycocotools, install it or take another source") from None
    root = pathlib.Path(config.data_dir)
    path = _annotations(root, split)
    images = root / path.stem.removeprefix("instances_")
    if not images.is_dir():
        images = root / "images" / images.name
    if not images.is_dir():
        raise DataError(f"{images}: folder is missing, as is {root / images.name}")
    pairs = [(images / name, objects) for name, objects in read_objects(path, split.startswith("train"))]
    return open_pairs(config, VOC_CLASSES, pairs, path)


def _annotations(root: pathlib.Path, split: str) -> pathlib.Path:
    """The file of a split: that of its name or, if the name has no year, the only one of any year."""
    folder = root / "annotations"
    path = folder / f"instances_{split}.json"
    found = [path] if path.is_file() else sorted(folder.glob(f"instances_{split}20[0-9][0-9].json"))
    if len(found) != 1:
        unlabelled = sorted(folder.glob(f"image_info_{split}*.json"))
        hint = f"; {unlabelled[0].name} has no labels" if unlabelled and not found else ""
        raise DataError(f"{path}: must be there, or one such file with a year, got {[each.name for each in found]}{hint}")
    return found[0]


def read_objects(path: pathlib.Path, training: bool) -> list[tuple[str, Objects]]:
    """Reads a file of instances.

    Args:
      path: the file.
      training: leaves out images whose objects of the classes are small together.

    Returns:
      File name and objects of every image, in the order of their numbers.

    Raises:
      DataError: the file is not in order; names the entry.
    """
    try:
        document = read_json(path, lambda value: value)
    except ValueError as error:
        raise DataError(str(error)) from error
    _check(isinstance(document, dict), str(path), "an object", document)
    images, annotations, categories = (document.get(name) for name in ("images", "annotations", "categories"))
    for name, entries in (("images", images), ("annotations", annotations), ("categories", categories)):
        known = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
        _check(known, f"{path}: {name}", "a list of objects", entries)
    values = {}
    for value, name in enumerate(VOC_CLASSES[1:], 1):
        name = _COCO_NAMES.get(name, name)
        numbers = [category.get("id") for category in categories if category.get("name") == name]
        _check(len(numbers) == 1 and isinstance(numbers[0], int), f"{path}: categories", f"COCO's, with one number of {name!r}", numbers)
        values[numbers[0]] = value

    found: dict[int, tuple[str, Objects]] = {}
    for entry in images:
        number, name, height, width = (entry.get(key) for key in ("id", "file_name", "height", "width"))
        where = f"{path}: image {number!r}"
        _check(isinstance(number, int) and number not in found, where, "numbered, each once", entry)
        _check(isinstance(name, str) and pathlib.Path(name).name == name, f"{where}: file_name", "a name without folders", name)
        sides_ok = all(isinstance(side, int) and 1 <= side <= _LONGEST_SIDE for side in (height, width))
        _check(sides_ok, f"{where}: height and width", f"1 to {_LONGEST_SIDE} pixels", (height, width))
        found[number] = (name, Objects(f"{where}, {printable(name)}", (height, width), []))

    areas: dict[int, float] = collections.Counter()
    with Bar(f"reading {path.stem}", len(annotations), "object") as bar:
        for entry in annotations:
            bar.advance()
            category, number, area = (entry.get(key) for key in ("category_id", "image_id", "area"))
            where = f"{path}: annotation {entry.get('id')!r}"
            _check(isinstance(category, int), f"{where}: category_id", "a number", category)
            if category not in values:
                continue
            _check(isinstance(number, int) and number in found, f"{where}: image_id", "that of an image", number)
            _check(isinstance(area, int | float), f"{where}: area", "a number of pixels", area)
            areas[number] += area
            objects = found[number][1]
            if counts := _run_lengths(entry.get("segmentation"), objects.size, f"{where}: segmentation"):
                objects.regions.append((values[category], counts))
    return [found[number] for number in sorted(found) if not training or areas[number] > _LEAST_AREA]


def _run_lengths(segmentation: Any, size: tuple[int, int], where: str) -> bytes | None:
    """Packs an object's polygons, or a crowd's run lengths; None where it has no pixel.

    pycocotools reads and writes out of bounds when these are not what they should be: they are checked before.
    """
    from pycocotools import mask

    height, width = size
    if isinstance(segmentation, Mapping):
        lengths = segmentation.get("counts")
        known = isinstance(lengths, list) and all(isinstance(length, int) and length >= 0 for length in lengths)
        fits = known and sum(lengths) == height * width and segmentation.get("size") == [height, width]
        _check(fits, where, f"the unpacked run lengths of {height}x{width} pixels", segmentation)
        return mask.frPyObjects(segmentation, height, width)["counts"]

    def is_polygon(points: Any) -> bool:
        limit = 2 * max(size)
        numbers = isinstance(points, list) and all(isinstance(point, int | float) and abs(point) <= limit for point in points)
        return numbers and len(points) >= 6 and len(points) % 2 == 0

    polygons_ok = isinstance(segmentation, list) and all(map(is_polygon, segmentation))
    _check(polygons_ok, where, "polygons of at least three points in or near the image", segmentation)
    return mask.merge(mask.frPyObjects(segmentation, height, width))["counts"] if segmentation else None


def _check(ok: bool, where: str, required: str, received: Any) -> None:
    if not ok:
        raise DataError(f"{where}: must be {required}, got {reprlib.repr(received)}")
