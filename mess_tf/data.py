"""Images and labels of every source, checked on opening, and the `tf.data` pipelines of training and evaluation.

Inside the project a label is uint8 [H, W] with classes 0..C-1 and `configs.IGNORE` (255) for pixels without a class, whatever the
files hold.
"""

import colorsys
import concurrent.futures
import contextlib
import dataclasses
import difflib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf
from absl import logging
from PIL import Image, ImageDraw

from mess_tf.configs import IGNORE, DataConfig

PAD_COLOUR = 127.5
CACHE_BYTES = 2**30
_INVALID = -1  # in a label table: a stored value that must not occur
_SHOWN_PROBLEMS = 5
# Soft targets of a training image are made at this share of its size, per axis.
SOFT_STRIDE = 4
_LOGGED_SCAN = 1000  # labels from which on the scan announces itself


class DataError(ValueError):
    """A data set that cannot be used; the message names the file or the argument."""


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What all splits of a source share.

    Attributes:
      source: `DataConfig.source`.
      classes: class names, the position is the label value.
    """

    source: str
    classes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)


class Examples:
    """The images and labels of one split, in a fixed order and by random access.

    Attributes:
      info: classes of the source.
      names: name of every image.
      hard: bool [N], which images were made hard on purpose; None where the source does not say.
    """

    def __init__(
        self,
        info: DatasetInfo,
        names: Sequence[str],
        read: Callable[[int], tuple[np.ndarray, np.ndarray]],
        hard: np.ndarray | None = None,
        class_pixels: np.ndarray | None = None,
    ):
        self.info = info
        self.names = tuple(names)
        self.hard = hard
        self._read = read
        self._class_pixels = class_pixels
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns one image, uint8 [H, W, 3] RGB, and its label, uint8 [H, W]; both read-only.

        Decoded pairs stay in memory as long as they fit into `CACHE_BYTES`.

        Raises:
          DataError: the file or record is broken, the sizes differ, or a label value is neither a class nor ignored.
        """
        pair = self._cache.get(index)
        if pair is None:
            pair = self._read(index)
            for array in pair:
                array.flags.writeable = False
            self._cached_bytes += sum(array.nbytes for array in pair)
            if self._cached_bytes <= CACHE_BYTES:
                self._cache[index] = pair
        return pair

    def class_pixels(self) -> np.ndarray:
        """Returns the number of labelled pixels per class over the split, int64 [C]; counted once."""
        if self._class_pixels is None:
            counts = np.zeros(256, np.int64)
            for index in range(len(self)):
                counts += np.bincount(self.load(index)[1].ravel(), minlength=256)
            self._class_pixels = counts[: self.info.num_classes]
        return self._class_pixels


def open_split(config: DataConfig, split: str) -> Examples:
    """Opens and checks one split of the configured source.

    Args:
      config: the data section of a run.
      split: the source's own name of the split, for instance `config.train_split`.

    Raises:
      DataError: unknown source, missing folder, file or label, broken image, sizes that differ, a label value that is neither a
        class nor ignored, or an empty split. Lists the first few problems, each with its file.
    """
    source, _, name = config.source.partition(":")
    if config.source in ("folder", "voc") and not config.data_dir:
        raise DataError(f"data.data_dir: must be the root folder of the {config.source!r} source, got ''")
    if config.source == "synthetic":
        return _open_synthetic(config, split)
    if config.source == "folder":
        return _open_folder(config, split)
    if config.source == "voc":
        return _open_voc(config, split)
    if source == "tfds":
        return _open_tfds(config, name, split)
    known = ["synthetic", "folder", "voc", *(f"tfds:{name}" for name in _TFDS)]
    nearest = difflib.get_close_matches(config.source, known, cutoff=0.3) or known
    raise DataError(f"data.source: must be a known source (nearest: {', '.join(nearest)}), got {config.source!r}")


# ------------------------------------------------------------------------------------------------------------------ files on disk

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def _open_folder(config: DataConfig, split: str) -> Examples:
    root = pathlib.Path(config.data_dir)
    classes = _read_classes(root / "classes.txt")
    folder = _need_folder(root / split / "images")
    labels = _need_folder(root / split / "labels")
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pairs = [(path, labels / f"{path.stem}.png") for path in images]
    return _open_files(DatasetInfo(config.source, classes), pairs, config.ignore_value, empty=folder)


def _open_voc(config: DataConfig, split: str) -> Examples:
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
    table = np.full(256, _INVALID, np.int16)
    table[: info.num_classes] = np.arange(info.num_classes)
    table[ignore_value] = IGNORE

    if len(pairs) >= _LOGGED_SCAN:
        logging.info("checking %d labels, the first is %s", len(pairs), pairs[0][1])
    counts = np.zeros(info.num_classes, np.int64)
    problems = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(lambda pair: _check_pair(*pair, table, info.num_classes), pairs):
            if isinstance(result, DataError):
                problems.append(str(result))
            else:
                counts += result
    if problems:
        more = [f"... and {len(problems) - _SHOWN_PROBLEMS} more"] if len(problems) > _SHOWN_PROBLEMS else []
        raise DataError("\n".join(problems[:_SHOWN_PROBLEMS] + more))

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        image_path, label_path = pairs[index]
        return _decode_image(image_path), _apply_table(_decode_label(label_path), table, label_path)

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
        return np.bincount(_apply_table(label, table, label_path).ravel(), minlength=256)[:num_classes]
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


def _apply_table(raw: np.ndarray, table: np.ndarray, name: object) -> np.ndarray:
    """Turns stored label values into classes and IGNORE; `table` is int16 [256] with `_INVALID` where a value must not occur."""
    label = table[raw]
    wrong = label == _INVALID
    if wrong.any():
        raise DataError(f"{name}: label values must be classes or the ignored value, got {np.unique(raw[wrong]).tolist()[:10]}")
    return label.astype(np.uint8)


# --------------------------------------------------------------------------------------------------------------- TensorFlow Datasets

_CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light", 20: "traffic sign",
    21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
    32: "motorcycle", 33: "bicycle",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _TfdsSource:
    """Where a data set keeps image and label, and which stored value is which class; `others` is what all other values become."""

    image: str
    label: str
    classes: dict[int, str]
    others: int = _INVALID
    ignored: tuple[int, ...] = ()


_TFDS = {
    "oxford_iiit_pet": _TfdsSource("image", "segmentation_mask", {1: "foreground", 2: "background", 3: "border"}),
    "cityscapes/semantic_segmentation": _TfdsSource("image_left", "segmentation_label", _CITYSCAPES, others=IGNORE),
    # The red channel of the instance annotation, which is what this data set holds: numbered object categories, 0 elsewhere.
    "scene_parse150": _TfdsSource("image", "annotation", {i: f"category {i}" for i in range(1, 151)}, ignored=(0,)),
}


def _open_tfds(config: DataConfig, name: str, split: str) -> Examples:
    """Opens a TensorFlow Datasets split for random access; it is downloaded and prepared if need be. Labels are checked when read."""
    if name not in _TFDS:
        raise DataError(f"data.source: must be one of {', '.join(f'tfds:{known}' for known in _TFDS)}, got {config.source!r}")
    import tensorflow_datasets as tfds

    spec = _TFDS[name]
    records = tfds.data_source(name, split=split, data_dir=config.data_dir or None)
    if len(records) == 0:
        raise DataError(f"{config.source}: split {split!r} has no images")
    table = np.full(256, spec.others, np.int16)
    table[list(spec.classes)] = np.arange(len(spec.classes))
    table[list(spec.ignored)] = IGNORE
    names = [f"{split}/{index:06d}" for index in range(len(records))]

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        record = records[index]
        image, raw = np.array(record[spec.image]), record[spec.label][..., 0]
        where = f"{config.source} {names[index]}"
        if image.shape[:2] != raw.shape:
            raise DataError(f"{where}: label must be as large as its image, {image.shape[:2]}, got {raw.shape}")
        return image, _apply_table(raw, table, where)

    return Examples(DatasetInfo(config.source, tuple(spec.classes.values())), names, read)


# ------------------------------------------------------------------------------------------------------------------ synthetic scenes

# Class: colour, then the strength of fine, leaf-sized and cloud-sized texture (grey levels).
_SURFACES = {
    "sky": ((140, 182, 226), 0, 0, 14),
    "building": ((168, 128, 108), 5, 4, 10),
    "road": ((92, 92, 98), 8, 2, 8),
    "pavement": ((172, 162, 150), 7, 6, 6),
    "tree": ((62, 112, 52), 10, 26, 12),
    "pole": ((66, 62, 62), 3, 0, 0),
    "car": ((178, 44, 48), 3, 0, 5),
    "person": ((206, 132, 58), 6, 4, 0),
}
SYNTHETIC_CLASSES = tuple(_SURFACES)
_SUPERSAMPLE = 2


@dataclasses.dataclass(frozen=True)
class _Conditions:
    """How a scene is filled and photographed; pairs are (low, high).

    Attributes:
      cars, people, trees, poles, litter: number of objects; litter is unlabelled.
      nearness: where objects stand, 0 = horizon (tiny), 1 = lower image edge.
      stray: spread of an object's colour around its class colour, grey levels.
      haze: opacity of haze at the horizon.
      contrast, light: factors of the finished picture.
      noise: standard deviation of the sensor noise, grey levels.
    """

    cars: tuple[int, int]
    people: tuple[int, int]
    trees: tuple[int, int]
    poles: tuple[int, int]
    litter: tuple[int, int]
    nearness: tuple[float, float]
    stray: float
    haze: tuple[float, float]
    contrast: tuple[float, float]
    light: tuple[float, float]
    noise: tuple[float, float]


_EASY = _Conditions((1, 2), (1, 2), (1, 3), (2, 3), (0, 0), (0.45, 0.9), 7, (0, 0.1), (0.9, 1.1), (0.9, 1.1), (2, 5))
_HARD = _Conditions((3, 6), (3, 6), (2, 5), (3, 5), (2, 4), (0.2, 0.6), 26, (0.1, 0.5), (0.5, 0.8), (0.45, 0.9), (8, 16))


def _open_synthetic(config: DataConfig, split: str) -> Examples:
    sizes = {config.train_split: config.synthetic_train, config.val_split: config.synthetic_val}
    if split not in sizes:
        raise DataError(f"synthetic: split must be one of {', '.join(map(repr, sizes))}, got {split!r}")
    if sizes[split] < 1:
        raise DataError(f"synthetic: split {split!r} must have at least one image, got {sizes[split]}")
    # Evenly spread, so that the share is exact and scene i stays the same however many follow it.
    hard = np.diff(np.floor(np.arange(sizes[split] + 1) * config.synthetic_hard + 1e-9)).astype(bool)
    stream = list(sizes).index(split)

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([config.seed, stream, index])
        return _draw_scene(rng, _HARD if hard[index] else _EASY, config.input_size)

    names = [f"{split}/{index:05d}_{'hard' if is_hard else 'easy'}" for index, is_hard in enumerate(hard)]
    return Examples(DatasetInfo(config.source, SYNTHETIC_CLASSES), names, read, hard=hard)


class _Canvas:
    """A map of paint numbers that shapes are drawn into, and what each paint stands for."""

    def __init__(self, height: int, width: int, rng: np.random.Generator, stray: float):
        self._map = Image.new("I", (width, height))
        self._draw = ImageDraw.Draw(self._map)
        self._rng, self._stray = rng, stray
        self._labels: list[int] = []
        self._paints: list[tuple[float, ...]] = []  # red, green, blue, three texture strengths

    def paint(self, surface: str, colour: Sequence[float] | None = None, label: int | None = None) -> int:
        """Returns a new paint: the look of a surface, with another colour or label if given. Colours stray."""
        default, *texture = _SURFACES[surface]
        strayed = np.asarray(colour or default) + self._stray * self._rng.standard_normal(3)
        self._labels.append(SYNTHETIC_CLASSES.index(surface) if label is None else label)
        self._paints.append((*strayed, *texture))
        return len(self._labels) - 1

    def polygon(self, paint: int, *points: tuple[float, float]) -> None:
        self._draw.polygon(points, fill=paint)

    def ellipse(self, paint: int, x: float, y: float, radius_x: float, radius_y: float) -> None:
        self._draw.ellipse((x - radius_x, y - radius_y, x + radius_x, y + radius_y), fill=paint)

    def box(self, paint: int, left: float, top: float, right: float, bottom: float) -> None:
        self._draw.rectangle((left, top, max(left, right), max(top, bottom)), fill=paint)

    def line(self, paint: int, start: tuple[float, float], end: tuple[float, float], width: float) -> None:
        self._draw.line((*start, *end), fill=paint, width=max(_SUPERSAMPLE, round(width)))

    def develop(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the textured picture, float [h, w, 3], and the label, uint8 [h, w], both without supersampling."""
        paints = np.array(self._map)
        height, width = paints.shape
        table = np.array(self._paints)
        picture = table[paints, :3]
        for strength, cell in zip(table[:, 3:].T, (1, 4, height // 4), strict=True):
            grid = self._rng.standard_normal((height // cell + 1, width // cell + 1)).astype(np.float32)
            texture = np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
            picture += (strength[paints] * texture)[..., None]
        picture = picture.reshape(height // _SUPERSAMPLE, _SUPERSAMPLE, width // _SUPERSAMPLE, _SUPERSAMPLE, 3).mean(axis=(1, 3))
        return picture, np.array(self._labels, np.uint8)[paints[::_SUPERSAMPLE, ::_SUPERSAMPLE]]


def _draw_scene(rng: np.random.Generator, conditions: _Conditions, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draws a street in one-point perspective.

    Args:
      rng: the only source of randomness.
      conditions: how full the street is and how well it is photographed.
      size: (height, width) in pixels.

    Returns:
      The image, uint8 [height, width, 3] RGB, and its label, uint8 [height, width] with `SYNTHETIC_CLASSES` and IGNORE.
    """
    height, width = (_SUPERSAMPLE * side for side in size)
    canvas = _Canvas(height, width, rng, conditions.stray)
    horizon = height * rng.uniform(0.36, 0.5)
    vanishing = width * rng.uniform(0.35, 0.65)
    kerbs = width * rng.uniform((-0.1, 0.85), (0.15, 1.1))  # where the road's two edges meet the lower image edge
    walls = kerbs + (kerbs - vanishing) * rng.uniform(0.5, 1.1, 2)  # the same for the lines the buildings stand on

    def ground(bottom_x: float, nearness: float) -> tuple[float, float]:
        """The point on the line from the vanishing point to (bottom_x, lower image edge)."""
        return vanishing + (bottom_x - vanishing) * nearness, horizon + (height - horizon) * nearness

    # The stage: sky, ground, road with lane marks, the far end of the street, houses.
    canvas.box(canvas.paint("sky"), 0, 0, width, horizon)
    canvas.box(canvas.paint("pavement"), 0, horizon, width, height)
    canvas.polygon(canvas.paint("road"), (vanishing, horizon), ground(kerbs[0], 1), ground(kerbs[1], 1))
    marks = canvas.paint("road", (205, 205, 195))
    for start in np.geomspace(0.12, 0.8, 6):
        middle = kerbs.mean()
        half = 0.012 * width
        corners = ((middle - half, start), (middle + half, start), (middle + half, 1.2 * start), (middle - half, 1.2 * start))
        canvas.polygon(marks, *(ground(*corner) for corner in corners))
    for left in np.arange(-0.05, 1.0, 0.09) * width:
        surface = "tree" if rng.random() < 0.35 else "building"
        top = horizon - height * rng.uniform(0.02, 0.13)
        canvas.box(canvas.paint(surface), left, top, left + 0.09 * width, horizon + 0.03 * height)
    for wall in walls:
        _draw_houses(canvas, rng, lambda nearness, wall=wall: ground(wall, nearness), height)

    # Things that stand on the ground, far ones first, so that near ones hide them.
    near = np.sort(rng.uniform(*conditions.nearness, conditions.poles[1] + 1))
    side = int(rng.integers(2))
    kerb = kerbs[side] + 0.12 * (walls[side] - kerbs[side])
    poles = [(*ground(kerb, nearness), nearness) for nearness in near[: rng.integers(*conditions.poles, endpoint=True)]]
    wire = canvas.paint("pole", (50, 50, 54))
    tops = [(x, y - 0.95 * nearness * height) for x, y, nearness in poles]
    for start, end in itertools.pairwise(tops):
        canvas.line(wire, start, end, 1)
    things = [(nearness, _draw_pole, x) for x, _, nearness in poles]
    for count, draw, places in (
        (conditions.trees, _draw_tree, (kerbs, walls, 0.25, 0.8)),
        (conditions.people, _draw_person, (kerbs, walls, -0.2, 0.5)),
        (conditions.litter, _draw_litter, (kerbs, walls, -0.1, 0.6)),
        (conditions.cars, _draw_car, (kerbs, kerbs[::-1], 0.12, 0.4)),
    ):
        for _ in range(rng.integers(*count, endpoint=True)):
            nearness, at = rng.uniform(*conditions.nearness), int(rng.integers(2))
            share = rng.uniform(*places[2:])
            bottom_x = (1 - share) * places[0][at] + share * places[1][at]
            things.append((nearness, draw, ground(bottom_x, nearness)[0]))
    for nearness, draw, x in sorted(things, key=lambda thing: thing[0]):
        draw(canvas, rng, x, horizon + (height - horizon) * nearness, nearness * height)
    if rng.random() < 0.5:  # the bonnet of the car that carries the camera
        canvas.ellipse(canvas.paint("car", (40, 42, 48), IGNORE), width / 2, height * 1.04, width * 0.45, height * 0.11)

    # The photograph.
    picture, label = canvas.develop()
    rows = np.arange(size[0])[:, None, None] * _SUPERSAMPLE
    distance = np.clip((height - rows) / (height - horizon), 0, 1)
    haze = rng.uniform(*conditions.haze) * distance
    picture = picture * (1 - haze) + 190 * haze
    picture = (picture - 120) * rng.uniform(*conditions.contrast) + 120
    picture = picture + rng.uniform(*conditions.noise) * rng.standard_normal(picture.shape)
    picture = picture * rng.uniform(*conditions.light) * rng.uniform(0.94, 1.06, 3)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), label


def _draw_houses(canvas: _Canvas, rng: np.random.Generator, foot: Callable[[float], tuple[float, float]], height: int) -> None:
    """Draws a row of house fronts along `foot`, which maps nearness to a point on the ground."""
    edges = np.geomspace(0.1, 1.6, rng.integers(4, 7))
    for far, near in itertools.pairwise(edges):
        if rng.random() < 0.15:  # a gap in the row
            continue
        storeys = rng.uniform(0.7, 1.5) * height

        def point(along: float, up: float, far=far, near=near, storeys=storeys) -> tuple[float, float]:
            nearness = far + (near - far) * along
            x, y = foot(nearness)
            return x, y - storeys * up * nearness

        canvas.polygon(canvas.paint("building"), point(0, 0), point(1, 0), point(1, 1), point(0, 1))
        window = canvas.paint("building", (92, 98, 112) if rng.random() < 0.7 else (228, 214, 160))
        columns, rows = rng.integers(2, 5), rng.integers(3, 7)
        for column in (np.arange(columns) + 0.3) / columns:
            for row in (np.arange(rows) + 0.35) / rows:
                right, top = column + 0.4 / columns, row + 0.4 / rows
                canvas.polygon(window, point(column, row), point(right, row), point(right, top), point(column, top))


def _draw_pole(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, scale: float) -> None:
    paint = canvas.paint("pole")
    canvas.line(paint, (x, y), (x, y - scale), 0.028 * scale)
    reach = rng.uniform(-0.16, 0.16) * scale
    canvas.line(paint, (x, y - 0.97 * scale), (x + reach, y - scale), 0.02 * scale)


def _draw_tree(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, scale: float) -> None:
    tall = rng.uniform(0.55, 0.9) * scale
    canvas.line(canvas.paint("tree", (92, 70, 50)), (x, y), (x, y - 0.6 * tall), 0.06 * scale)
    for _ in range(6):
        dx, dy = rng.uniform((-0.14, 0.5), (0.14, 0.95))
        canvas.ellipse(canvas.paint("tree"), x + dx * scale, y - dy * tall, *(rng.uniform(0.09, 0.16, 2) * scale))


def _draw_person(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, scale: float) -> None:
    tall = rng.uniform(0.4, 0.5) * scale
    broad = 0.15 * tall
    legs, skin = canvas.paint("person", (60, 60, 100)), canvas.paint("person", (214, 170, 140))
    stride = rng.uniform(0.3, 1.0) * broad
    for foot in (-stride, stride):
        canvas.line(legs, (x, y - 0.5 * tall), (x + foot, y), 0.11 * tall)
    shirts = ((206, 132, 58), (190, 60, 130), (60, 150, 190))
    canvas.polygon(
        canvas.paint("person", shirts[rng.integers(len(shirts))]),
        *(
            (x - broad, y - 0.84 * tall),
            (x + broad, y - 0.84 * tall),
            (x + 0.8 * broad, y - 0.42 * tall),
            (x - 0.8 * broad, y - 0.42 * tall),
        ),
    )
    canvas.ellipse(skin, x, y - 0.92 * tall, 0.075 * tall, 0.085 * tall)


def _draw_car(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, scale: float) -> None:
    half, tall = 0.24 * scale, rng.uniform(0.3, 0.38) * scale
    colours = ((178, 44, 48), (44, 74, 160), (222, 222, 226), (226, 182, 40))
    body, tyre = canvas.paint("car", colours[rng.integers(len(colours))]), canvas.paint("car", (30, 30, 32))
    for wheel in (-0.72, 0.72):
        canvas.box(tyre, x + (wheel - 0.2) * half, y - 0.3 * tall, x + (wheel + 0.2) * half, y)
    canvas.box(body, x - half, y - 0.58 * tall, x + half, y - 0.14 * tall)
    roof = ((x - 0.86 * half, y - 0.56 * tall), (x - 0.6 * half, y - tall), (x + 0.6 * half, y - tall), (x + 0.86 * half, y - 0.56 * tall))
    canvas.polygon(body, *roof)
    glass = (
        (x - 0.68 * half, y - 0.6 * tall),
        (x - 0.5 * half, y - 0.92 * tall),
        (x + 0.5 * half, y - 0.92 * tall),
        (x + 0.68 * half, y - 0.6 * tall),
    )
    canvas.polygon(canvas.paint("car", (52, 62, 76)), *glass)
    lamp = canvas.paint("car", (240, 90, 70))
    for at in (-0.8, 0.8):
        canvas.ellipse(lamp, x + at * half, y - 0.44 * tall, 0.12 * half, 0.08 * tall)


def _draw_litter(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, scale: float) -> None:
    """A box of any colour, without a label."""
    half, tall = rng.uniform(0.04, 0.1, 2) * scale
    canvas.box(canvas.paint("car", tuple(rng.uniform(40, 220, 3)), IGNORE), x - half, y - 2 * tall, x + half, y)


# ------------------------------------------------------------------------------------------------------------------------- pipelines


def training_batches(
    examples: Examples,
    config: DataConfig,
    batch_size: int,
    seed: int,
    first_step: int,
    steps: int,
    soft_targets: np.ndarray | None = None,
) -> tf.data.Dataset:
    """Builds the augmented training batches number first_step .. first_step + steps - 1.

    Batch k depends on nothing but (seed, k, batch_size): a run resumed at step k sees what it would have seen without the break.
    Each epoch is one permutation of the split; its remainder runs on into the next epoch.

    Args:
      examples: the training split.
      config: size and augmentation.
      batch_size: images per batch.
      seed: not negative.
      first_step: absolute number of the first batch.
      steps: number of batches.
      soft_targets: float16 [N, h, w, C], of the whole images at any size, to be augmented with them.

    Returns:
      A data set of (image, label): float32 [B, h, w, 3] RGB 0..255 and uint8 [B, h, w], (h, w) = config.training_size; with soft
      targets (image, label, soft target), the last one float32 [B, h, w, C] at 1 / SOFT_STRIDE of the training size.
    """
    start, stop = first_step * batch_size, (first_step + steps) * batch_size
    count = len(examples)
    epochs = range(start // count, -(-stop // count))
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs])
    indices = order[start - epochs[0] * count :][: stop - start]

    @tf.autograph.experimental.do_not_convert
    def prepare(position: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, ...]:
        image, label = _load(examples, index)
        soft = None
        if soft_targets is not None:
            soft = tf.numpy_function(lambda i: soft_targets[i].astype(np.float32), [index], tf.float32, stateful=False)
            soft = tf.ensure_shape(soft, soft_targets.shape[1:])
        return augment(image, label, config, tf.stack([tf.constant(seed, tf.int64), position]), soft)

    dataset = tf.data.Dataset.from_tensor_slices((np.arange(start, stop), indices))
    dataset = dataset.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return dataset.batch(batch_size, drop_remainder=True).prefetch(2)


def evaluation_batches(examples: Examples) -> tf.data.Dataset:
    """Builds batches of one, in order, at native size: float32 [1, H, W, 3] RGB 0..255 and uint8 [1, H, W]."""

    @tf.autograph.experimental.do_not_convert
    def prepare(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image, label = _load(examples, index)
        return tf.cast(image, tf.float32), label

    dataset = tf.data.Dataset.range(len(examples))
    return dataset.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).batch(1).prefetch(2)


def _load(examples: Examples, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    image, label = tf.numpy_function(lambda i: examples.load(int(i)), [index], [tf.uint8, tf.uint8], stateful=False)
    return tf.ensure_shape(image, [None, None, 3]), tf.ensure_shape(label, [None, None])


def augment(
    image: tf.Tensor, label: tf.Tensor, config: DataConfig, seed: tf.Tensor, soft: tf.Tensor | None = None
) -> tuple[tf.Tensor, ...]:
    """Scales, crops, flips and recolours one example at random.

    Scale 1 is the image resized to the input size, as in evaluation. Image pixels are interpolated once, label pixels never.
    Where a scaled image does not fill the crop, the image is grey and the label IGNORE.

    Args:
      image: uint8 [H, W, 3].
      label: uint8 [H, W].
      config: size and ranges.
      seed: int64 [2]; the result depends on nothing else that is random.
      soft: float32 [h', w', C] of the whole image, if there are soft targets.

    Returns:
      float32 [h, w, 3] in 0..255 and uint8 [h, w]; with soft targets also these, float32 [h / SOFT_STRIDE, w / SOFT_STRIDE, C], 0
      where the image does not fill the crop.
    """
    dice = tf.unstack(tf.random.stateless_uniform([7], seed))

    def between(low: float | tf.Tensor, high: float | tf.Tensor) -> tf.Tensor:
        return low + (high - low) * dice.pop()

    target = tf.constant(config.training_size)
    scaled = tf.cast(tf.round(between(*config.scale_range) * tf.constant(config.input_size, tf.float32)), tf.int32)
    room = tf.cast(scaled - target, tf.float32)  # below zero where the scaled image does not fill the crop
    offset = tf.cast(tf.round([between(0.0, room[0]), between(0.0, room[1])]), tf.int32)
    start, extent = tf.maximum(offset, 0), tf.minimum(scaled, target)
    scale = tf.cast(scaled, tf.float32) / tf.cast(tf.shape(label), tf.float32)

    # One interpolation from native pixels to the crop, for the label the nearest pixel by the same rule.
    image = tf.raw_ops.ScaleAndTranslate(
        images=image[None], size=extent, scale=scale, translation=-tf.cast(start, tf.float32), kernel_type="triangle", antialias=False
    )[0]
    for axis in (0, 1):
        centres = tf.cast(start[axis] + tf.range(extent[axis]), tf.float32) + 0.5
        nearest = tf.cast(centres / scale[axis], tf.int32)
        label = tf.gather(label, tf.minimum(nearest, tf.shape(label)[axis] - 1), axis=axis)

    if config.brightness:
        image *= 1 + between(-config.brightness, config.brightness)
    if config.contrast:
        mean = tf.reduce_mean(image)
        image = mean + (image - mean) * (1 + between(-config.contrast, config.contrast))
    if config.saturation:
        grey = tf.reduce_mean(image, axis=-1, keepdims=True)
        image = grey + (image - grey) * (1 + between(-config.saturation, config.saturation))
    image = tf.clip_by_value(image, 0, 255)

    mirrored = dice.pop() < 0.5 if config.flip else tf.constant(False)
    before = tf.maximum(-offset, 0)
    margins = tf.stack([before, target - extent - before], axis=1)
    image = tf.pad(image, tf.concat([margins, [[0, 0]]], axis=0), constant_values=PAD_COLOUR)
    label = tf.pad(label, margins, constant_values=IGNORE)
    result = [tf.ensure_shape(image, [*config.training_size, 3]), tf.ensure_shape(label, config.training_size)]
    if soft is not None:
        size = [side // SOFT_STRIDE for side in config.training_size]
        scale = tf.cast(scaled, tf.float32) / SOFT_STRIDE / tf.cast(tf.shape(soft)[:2], tf.float32)
        translation = -tf.cast(offset, tf.float32) / SOFT_STRIDE
        soft = tf.raw_ops.ScaleAndTranslate(
            images=soft[None], size=size, scale=scale, translation=translation, kernel_type="triangle", antialias=False
        )[0]
        result.append(tf.ensure_shape(soft, [*size, soft.shape[2]]))
    return tuple(tf.cond(mirrored, lambda: [each[:, ::-1] for each in result], lambda: result))


def resize_image(image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Resizes [..., H, W, 3] bilinearly to float32 [..., h, w, 3], with half-pixel centres and no antialiasing."""
    return tf.image.resize(tf.cast(image, tf.float32), size, "bilinear", antialias=False)


def resize_label(label: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Resizes [..., H, W] to [..., h, w] by taking the nearest pixel; keeps the dtype."""
    return tf.image.resize(label[..., None], size, "nearest")[..., 0]


# --------------------------------------------------------------------------------------------------------------- weights and colours


def class_weights(class_pixels: np.ndarray, kind: str) -> np.ndarray:
    """Computes the loss weight of every class.

    Args:
      class_pixels: int [C], labelled pixels per class.
      kind: `none` (all ones) or `sqrt_median_frequency` (square root of the present classes' median frequency over the class's own).

    Returns:
      float32 [C]; a class without pixels weighs 0 unless kind is `none`.
    """
    if kind == "none":
        return np.ones(len(class_pixels), np.float32)
    if kind != "sqrt_median_frequency":
        raise ValueError(f"kind: must be 'none' or 'sqrt_median_frequency', got {kind!r}")
    present = class_pixels > 0
    weights = np.zeros(len(class_pixels), np.float32)
    weights[present] = np.sqrt(np.median(class_pixels[present]) / class_pixels[present])
    return weights


def palette(num_classes: int) -> np.ndarray:
    """Returns a fixed colour per class, uint8 [C, 3] RGB: hues far apart, alternating in brightness; the first C never change."""
    hues = (0.58 + 0.618034 * np.arange(num_classes)) % 1
    tones = ((0.65, 0.95), (0.9, 0.6), (0.4, 0.8))  # saturation, brightness
    colours = [colorsys.hsv_to_rgb(hue, *tones[index % 3]) for index, hue in enumerate(hues)]
    return np.rint(255 * np.array(colours)).astype(np.uint8)
