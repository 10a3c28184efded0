"""Published data sets in the folders that they come in: Pascal VOC, ADE20K, Cityscapes and Oxford-IIIT Pet."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping

from mess_runtime.files import printable
from mess_runtime.images import SUFFIXES
from mess_tf.configs import DataConfig
from mess_tf.data.examples import DataError, Examples
from mess_tf.data.files import LabelFile, by_stem, open_pairs, read_lines
from mess_tf.data.labels import LabelReader

Paths = tuple[pathlib.Path, pathlib.Path]  # of an image and its label

_COLUMNS = "a name, the path of an image, or its path and that of its label"

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# The first of the names that objectInfo150.txt has for each.
ADE20K_CLASSES = (
    "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass", "cabinet", "sidewalk", "person", "earth",
    "door", "table", "mountain", "plant", "curtain", "chair", "car", "water", "painting", "sofa", "shelf", "house", "sea", "mirror", "rug",
    "field", "armchair", "seat", "fence", "desk", "rock", "wardrobe", "lamp", "bathtub", "railing", "cushion", "base", "box", "column",
    "signboard", "chest of drawers", "counter", "sand", "sink", "skyscraper", "fireplace", "refrigerator", "grandstand", "path", "stairs",
    "runway", "case", "pool table", "pillow", "screen door", "stairway", "river", "bridge", "bookcase", "blind", "coffee table", "toilet",
    "flower", "book", "hill", "bench", "countertop", "stove", "palm", "kitchen island", "computer", "swivel chair", "boat", "bar",
    "arcade machine", "hovel", "bus", "towel", "light", "truck", "tower", "chandelier", "awning", "streetlight", "booth",
    "television receiver", "airplane", "dirt track", "apparel", "pole", "land", "bannister", "escalator", "ottoman", "bottle", "buffet",
    "poster", "stage", "van", "ship", "fountain", "conveyer belt", "canopy", "washer", "plaything", "swimming pool", "stool", "barrel",
    "basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball", "food", "step", "tank", "trade name", "microwave", "pot",
    "animal", "bicycle", "lake", "dishwasher", "screen", "blanket", "sculpture", "hood", "sconce", "vase", "traffic light", "tray",
    "ashcan", "fan", "pier", "crt screen", "plate", "monitor", "bulletin board", "shower", "radiator", "glass", "clock", "flag",
)  # fmt: skip

CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person",
    "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip

PET_CLASSES = ("foreground", "background", "border")


def _voc(root: pathlib.Path, listing: pathlib.Path) -> Iterator[Paths]:
    """A line is a name, or holds paths inside the VOC year, as lists of SBD's `train_aug` do."""

    def label(name: str) -> pathlib.Path:
        own, augmented = (root / folder / f"{name}.png" for folder in ("SegmentationClass", "SegmentationClassAug"))
        return augmented if augmented.is_file() and not own.is_file() else own

    for line in read_lines(listing):
        words = line.split()
        if len(words) == 1 or (root / "JPEGImages" / f"{line}.jpg").is_file():
            words = [line]
        is_path = ["/" in word or pathlib.Path(word).suffix.lower() in SUFFIXES for word in words]
        if len(words) > 2 or (len(words) == 2 and not all(is_path)):
            of_class = len(words) == 2 and words[1] in ("-1", "0", "1")
            hint = f"; this is the list of one class, where `awk '{{print $1}}' {listing.name}` leaves the names" if of_class else ""
            raise DataError(f"{printable(str(listing))}: each line must be {_COLUMNS}, got {line!r}{printable(hint)}")
        if is_path[0]:
            image, *labels = (root / word.lstrip("/") if "/" in word else root / "JPEGImages" / word for word in words)
            yield image, labels[0] if labels else label(image.stem)
        else:
            yield root / "JPEGImages" / f"{line}.jpg", label(line)


def _ade20k(root: pathlib.Path, listing: pathlib.Path) -> Iterator[Paths]:
    for stem, image in by_stem(listing, SUFFIXES).items():
        yield image, root / "annotations" / listing.name / f"{stem}.png"


def _cityscapes(root: pathlib.Path, listing: pathlib.Path) -> Iterator[Paths]:
    if not listing.is_dir():
        raise DataError(f"{printable(str(listing))}: folder is missing")
    for city in sorted(path for path in listing.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for stem, image in by_stem(city, {".png"}).items():
            name = stem.removesuffix("_leftImg8bit")
            yield image, root / "gtFine" / listing.name / city.name / f"{name}_gtFine_labelIds.png"


def _pets(root: pathlib.Path, listing: pathlib.Path) -> Iterator[Paths]:
    """A line is a name and three numbers: breed, species, breed within the species."""
    for line in read_lines(listing):
        if not line.startswith("#"):
            name = line.split()[0]
            yield root / "images" / f"{name}.jpg", root / "annotations" / "trimaps" / f"{name}.png"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a data set keeps its images and labels.

    Attributes:
      title: what the folder that holds all of it is called in messages.
      marker: a folder in it by which it is known.
      roots: where it may lie below `data_dir`, as patterns.
      listing: below it, what tells the images of a split: a list, or a folder.
      paths: from these two to the paths of every image and its label.
      classes: names.
      splits: its names of splits that are usually called otherwise.
      label_values: as `data.label_values`; empty for what the user says.
    """

    title: str
    marker: str
    roots: tuple[str, ...]
    listing: str
    paths: Callable[[pathlib.Path, pathlib.Path], Iterator[Paths]]
    classes: tuple[str, ...]
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    label_values: str | Mapping[str, int] = ""


LAYOUTS = {
    "voc": Layout(
        title="VOC year",
        marker="JPEGImages",
        roots=("", "VOC*/", "VOCdevkit/VOC*/"),
        listing="ImageSets/Segmentation/{split}.txt",
        paths=_voc,
        classes=VOC_CLASSES,
    ),
    "ade20k": Layout(
        title="ADE20K",
        marker="annotations",
        roots=("", "ADEChallengeData2016/"),
        listing="images/{split}",
        paths=_ade20k,
        classes=ADE20K_CLASSES,
        splits={"train": "training", "val": "validation"},
        label_values="ade20k",
    ),
    "cityscapes": Layout(
        title="Cityscapes",
        marker="leftImg8bit",
        roots=("", "cityscapes/"),
        listing="leftImg8bit/{split}",
        paths=_cityscapes,
        classes=CITYSCAPES_CLASSES,
        label_values="cityscapes",
    ),
    "oxford_iiit_pet": Layout(
        title="Oxford-IIIT Pet",
        marker="annotations",
        roots=("", "oxford-iiit-pet/"),
        listing="annotations/{split}.txt",
        paths=_pets,
        classes=PET_CLASSES,
        splits={"train": "trainval", "val": "test"},
        label_values={"1": 0, "2": 1, "3": 2},
    ),
}


def open_layout(config: DataConfig, split: str) -> Examples:
    layout = LAYOUTS[config.source]
    data_dir = pathlib.Path(config.data_dir)
    roots = [path.parent for start in layout.roots for path in data_dir.glob(f"{start}{layout.marker}")]
    if len(roots) != 1:
        found = ", ".join(str(root) for root in roots) or "none"
        raise DataError(f"{data_dir}: must be or contain exactly one {layout.title} with a {layout.marker} folder, found {found}")
    listing = roots[0] / layout.listing.format(split=layout.splits.get(split, split))
    if listing.suffix == ".txt" and not listing.is_file():
        raise DataError(f"{listing}: the list of images of split {split!r} is missing")
    reader = LabelReader(layout.label_values or config.label_values, config.ignore_value, len(layout.classes))
    pairs = [(image, LabelFile(label, image, reader)) for image, label in layout.paths(roots[0], listing)]
    return open_pairs(config, layout.classes, pairs, listing)
