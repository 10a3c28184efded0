"""Published data sets, made small in their real layouts: folders, lists, sizes and quirks."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mess_tf.configs import FILE_SOURCES, IGNORE, DataConfig
from mess_tf.data import DataError, open_split
from mess_tf.data.layouts import LAYOUTS, VOC_CLASSES

HEIGHT, WIDTH = 48, 64


def write(path: Path, array: np.ndarray, kind: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, kind)


def filled(shape: tuple[int, int], *values: int) -> np.ndarray:
    """Columns that hold the values in turn."""
    return np.tile(np.array(values, np.uint8), (shape[0], shape[1] // len(values) + 1))[:, : shape[1]]


def test_every_source_has_its_entry_and_its_root():
    page = (Path(__file__).parents[1] / "docs/data.md").read_text(encoding="utf-8")
    for source in FILE_SOURCES:
        assert f"\n| `{source}` |" in page
        with pytest.raises(DataError, match=rf"data\.data_dir: must be the root folder of the '{source}' source"):
            open_split(DataConfig(source=source), "train")
    counts = {name: (len(layout.classes), len(set(layout.classes))) for name, layout in LAYOUTS.items()}
    assert counts == {"voc": (21, 21), "ade20k": (150, 150), "cityscapes": (19, 19), "oxford_iiit_pet": (3, 3)}


@pytest.mark.parametrize("source", ["coco21", "ade20k", "cityscapes", "oxford_iiit_pet"])
def test_what_labels_mean_is_known(source):
    with pytest.raises(ValueError, match=r"^label_values: must be left out unless data\.source is folder or voc"):
        DataConfig(source=source, label_values="ade20k")


# --- data sets of label files


def make_ade20k(root: Path) -> None:
    root /= "ADEChallengeData2016"
    for split, short in (("training", "train"), ("validation", "val")):
        for number in (1, 2):
            name = f"ADE_{short}_{number:08d}"
            write(root / "images" / split / f"{name}.jpg", np.zeros((512, 683, 3)[: 4 - number], np.uint8))  # the second one is grey
            write(root / "annotations" / split / f"{name}.png", filled((512, 683), 0, 1, 150, number))
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n")


def make_cityscapes(root: Path, shape: tuple[int, int] = (1024, 2048)) -> None:
    for split, cities in (("train", ("aachen", "zurich")), ("val", ("munster",)), ("test", ("berlin",))):
        for city in cities:
            name = f"{city}_000000_000019"
            write(root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", np.zeros((*shape, 3), np.uint8))
            labels = root / f"gtFine/{split}/{city}"
            ids = filled(shape, *((0, 4, 7, 8, 33) if split != "test" else (0, 1, 2, 3)))  # those of test are kept back
            write(labels / f"{name}_gtFine_labelIds.png", ids)
            write(labels / f"{name}_gtFine_instanceIds.png", ids.astype(np.uint16) * 1000)
            (labels / f"{name}_gtFine_polygons.json").write_text("{}")


def make_pets(root: Path) -> None:
    shape = (500, 333)
    # One photo is grey, one is a PNG with transparency for all its name.
    for name, pixels, kind in (
        ("Abyssinian_100", np.zeros(shape, np.uint8), "JPEG"),
        ("beagle_1", np.zeros((*shape, 4), np.uint8), "PNG"),
        ("unlisted", np.zeros(shape, np.uint8), "GIF"),
    ):
        write(root / f"images/{name}.jpg", pixels, kind)
        write(root / f"annotations/trimaps/{name}.png", filled(shape, 1, 2, 3))
        (root / f"annotations/trimaps/._{name}.png").write_bytes(b"macOS")
    (root / "images/Abyssinian_100.mat").write_bytes(b"MATLAB")
    lines = ["Abyssinian_100 1 1 1", "beagle_1 5 2 2"]
    for split, listed in (("list", ["#Image CLASS-ID SPECIES BREED ID", *lines]), ("trainval", lines), ("test", lines[1:])):
        (root / f"annotations/{split}.txt").write_text("\n".join([*listed, ""]))


DATA_SETS = {
    "ade20k": (make_ade20k, ("ADE_train_00000001", "ADE_train_00000002"), ("ADE_val_00000001", "ADE_val_00000002"), [255, 0, 149, 0]),
    "cityscapes": (
        *(make_cityscapes, ("aachen_000000_000019_leftImg8bit", "zurich_000000_000019_leftImg8bit")),
        *(("munster_000000_000019_leftImg8bit",), [255, 255, 0, 1, 18]),
    ),
    "oxford_iiit_pet": (make_pets, ("Abyssinian_100", "beagle_1"), ("beagle_1",), [0, 1, 2]),
}


@pytest.fixture(scope="module", params=DATA_SETS)
def data_set(request, tmp_path_factory):
    """Configuration of a data set in its folder, and what is expected of it."""
    make, *expected = DATA_SETS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    make(root)
    return DataConfig(source=request.param, data_dir=str(root)), *expected


def test_splits_of_the_usual_names(data_set):
    config, train_names, val_names, first_labels = data_set
    train, val = (open_split(config, split) for split in ("train", "val"))
    assert (train.names, val.names) == (train_names, val_names)
    assert train.info.classes == LAYOUTS[config.source].classes
    image, label = train.load(0)
    assert (image.dtype, image.shape, label.dtype) == (np.uint8, (*label.shape, 3), np.uint8)
    assert label[0, : len(first_labels)].tolist() == first_labels
    for index in range(len(train)):
        assert train.load(index)[0].shape[:2] == label.shape
    pixels = np.bincount(np.concatenate([train.load(index)[1].ravel() for index in range(len(train))]), minlength=256)
    assert train.class_pixels().tolist() == pixels[: len(train.info.classes)].tolist()
    assert train.digests == open_split(config, "train").digests != val.digests


def test_a_label_that_is_missing_or_holds_other_values_is_named(data_set, tmp_path):
    config, *_ = data_set
    make = DATA_SETS[config.source][0]
    make(tmp_path)
    pattern = {"ade20k": "**/ADE_val_*2.png", "cityscapes": "**/munster*labelIds.png", "oxford_iiit_pet": "**/beagle_1.png"}
    (label,) = (path for path in tmp_path.glob(pattern[config.source]) if not path.name.startswith("."))
    shape = np.array(Image.open(label)).shape
    write(label, filled(shape, 1, 200))
    config = dataclasses.replace(config, data_dir=str(tmp_path))
    with pytest.raises(DataError, match=rf"{label.name}: label values must be classes or the ignored value, got \[200\]"):
        open_split(config, "val")
    label.unlink()
    with pytest.raises(DataError, match=rf"{label.name}: the label of .* is missing"):
        open_split(config, "val")


def test_folders_that_are_not_there_are_named(data_set, tmp_path):
    config, *_ = data_set
    layout = LAYOUTS[config.source]
    with pytest.raises(DataError, match=rf"must be or contain exactly one {layout.title} with a {layout.marker} folder, found none"):
        open_split(dataclasses.replace(config, data_dir=str(tmp_path)), "val")
    missing = (
        r"other\.txt: the list of images of split 'other' is missing" if config.source == "oxford_iiit_pet" else "other: folder is missing"
    )
    with pytest.raises(DataError, match=missing):
        open_split(config, "other")


def test_labels_that_are_kept_back_are_no_labels(tmp_path):
    make_cityscapes(tmp_path)
    config = DataConfig(source="cityscapes", data_dir=str(tmp_path))
    message = r"leftImg8bit/test: must hold labelled pixels, got none in 1 labels; those of a test split may be kept back"
    with pytest.raises(DataError, match=message):
        open_split(config, "test")


# --- COCO


def rectangle(left: int, top: int, right: int, bottom: int) -> list[int]:
    """Corners of the pixels left..right - 1, top..bottom - 1."""
    return [left, top, right, top, right, bottom, left, bottom]


def run_lengths(mask: np.ndarray) -> dict:
    """What COCO keeps of a crowd: how many pixels are 0, then 1, then 0, ..., down the columns."""
    flat = np.concatenate([[0], mask.T.ravel(), [0]])
    changes = np.flatnonzero(np.diff(flat))
    return {"size": list(mask.shape), "counts": np.diff([0, *changes, mask.size] if changes[-1] != mask.size else [0, *changes]).tolist()}


CROWD = np.zeros((HEIGHT, WIDTH), np.uint8)
CROWD[40:48, 10:64] = 1
COCO_CLASSES = {"person": 1, "truck": 8, "dog": 18, "tv": 72}
OTHER_CLASSES = ("bicycle", "car", "motorcycle", "airplane", "bus", "train", "boat", "bird", "cat", "horse", "sheep", "cow", "bottle")
OTHER_CLASSES += ("chair", "couch", "potted plant", "dining table")


def coco_document() -> dict:
    """Three images: 3 without objects, 5 with an object of another class, 9 with all the rest; the numbers are in no order."""
    objects = [
        (9, "person", [rectangle(4, 2, 44, 32), rectangle(50, 2, 60, 12)], 0),
        (9, "dog", [rectangle(40, 20, 62, 38)], 0),
        (9, "person", run_lengths(CROWD), 1),
        (9, "tv", [], 0),
        (9, "truck", [rectangle(0, 0, 64, 48)], 0),
        (5, "truck", [rectangle(0, 0, 64, 48)], 0),
        (5, "tv", [rectangle(0, 0, 10.0, 10)], 0),
    ]
    return {
        "info": {"year": 2017},
        "images": [{"id": id, "file_name": f"{id:012d}.jpg", "height": HEIGHT, "width": WIDTH, "license": 1} for id in (9, 3, 5)],
        "annotations": [
            {"id": id, "image_id": image, "category_id": COCO_CLASSES[name], "iscrowd": crowd, "segmentation": region, "area": 501.5}
            for id, (image, name, region, crowd) in enumerate(objects)
        ],
        "categories": [{"id": id, "name": name} for name, id in COCO_CLASSES.items()]
        + [{"id": 100 + id, "name": name} for id, name in enumerate(OTHER_CLASSES)],
    }


def coco_config(root: Path, document: dict, split: str = "val2017", images: str = "") -> DataConfig:
    """Writes one split; photo 3 is a JPEG, 5 a grey one, 9 a PNG for all its name."""
    for number, pixels, kind in (
        (3, np.zeros((HEIGHT, WIDTH, 3), np.uint8), "JPEG"),
        (5, np.zeros((HEIGHT, WIDTH), np.uint8), "JPEG"),
        (9, np.zeros((HEIGHT, WIDTH, 3), np.uint8), "PNG"),
    ):
        write(root / images / split / f"{number:012d}.jpg", pixels, kind)
    (root / "annotations").mkdir(exist_ok=True)
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(document))
    return DataConfig(source="coco21", data_dir=str(root))


PERSON, DOG, TV = (VOC_CLASSES.index(name) for name in ("person", "dog", "tvmonitor"))


@pytest.mark.parametrize("images", ["", "images"])
def test_coco_becomes_the_classes_of_voc(tmp_path, images):
    config = coco_config(tmp_path, coco_document(), images=images)
    examples = open_split(config, "val")
    assert (examples.names, examples.info.classes) == (("000000000003", "000000000005", "000000000009"), VOC_CLASSES)
    empty, grey, full = (examples.load(index) for index in range(3))
    for image, label in (empty, grey, full):
        assert (image.shape, image.dtype, label.shape, label.dtype) == ((HEIGHT, WIDTH, 3), np.uint8, (HEIGHT, WIDTH), np.uint8)
    assert not empty[1].any()
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[:10, :10] = TV
    np.testing.assert_array_equal(grey[1], expected)
    expected = PERSON * CROWD
    expected[2:32, 4:44] = PERSON
    expected[2:12, 50:60] = PERSON
    expected[20:38, 40:62] = DOG
    expected[20:32, 40:44] = IGNORE  # both are there
    np.testing.assert_array_equal(full[1], expected)
    counts = np.bincount(np.concatenate([examples.load(index)[1].ravel() for index in range(3)]), minlength=256)
    assert examples.class_pixels().tolist() == counts[:21].tolist()


def test_coco_trains_on_images_with_large_objects(tmp_path):
    document = coco_document()
    config = coco_config(tmp_path, document, "train2014")
    assert open_split(config, "train").names == ("000000000009",)  # 4 objects of 501.5 pixels, 5 has one
    then = open_split(config, "train2014").digests
    document["annotations"][1]["segmentation"] = [rectangle(40, 20, 62, 39)]
    coco_config(tmp_path, document, "train2014")
    assert open_split(config, "train").digests != then
    for entry in document["annotations"]:
        entry["area"] = 100
    coco_config(tmp_path, document, "train2014")
    with pytest.raises(DataError, match=r"instances_train2014\.json: the split has no images"):
        open_split(config, "train")


def change(**values):
    def apply(document):
        document["annotations"][0].update(values)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(segmentation=[[1, 2, 3, 4]]), r"annotation 0: segmentation: must be polygons of at least three .*got \[\[1, 2, 3, 4\]\]"),
        (change(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "segmentation: must be polygons"),
        (change(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "segmentation: must be polygons"),
        (change(segmentation=[[1, 2, 3, 4, 5, 1e9]]), "segmentation: must be polygons of at least three points in or near the image"),
        (change(segmentation=["polygon"]), "segmentation: must be polygons"),
        (change(segmentation=None), "segmentation: must be polygons"),
        (
            change(segmentation={"size": [HEIGHT, WIDTH], "counts": [5, 5]}),
            "segmentation: must be the unpacked run lengths of 48x64 pixels",
        ),
        (change(segmentation={"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}), "segmentation: must be the unpacked run lengths"),
        (change(segmentation={"size": [HEIGHT, WIDTH], "counts": "PPYo0"}), "segmentation: must be the unpacked run lengths"),
        (change(image_id=4), "annotation 0: image_id: must be that of an image, got 4"),
        (change(image_id=[9]), "annotation 0: image_id: must be that of an image"),
        (change(category_id=[1]), "annotation 0: category_id: must be a number"),
        (change(area="large"), "annotation 0: area: must be a number of pixels"),
        (lambda document: document["images"][1].update(id=9), "image 9: must be numbered, each once"),
        (lambda document: document["images"][0].update(file_name="../9.jpg"), r"image 9: file_name: must be a name without folders"),
        (lambda document: document["images"][0].update(width=10**9), "image 9: height and width: must be 1 to 16384 pixels"),
        (lambda document: document["images"][1].update(height=50), r"image 3, 0*3\.jpg: must be as large as its image, 48x64, got 50x64"),
        (lambda document: document["images"][1].update(file_name="gone.jpg"), r"val2017/gone\.jpg: not a readable image"),
        (lambda document: document["categories"].pop(0), "categories: must be COCO's, with one number of 'person'"),
        (lambda document: document.update(annotations={}), "annotations: must be a list of objects"),
        (lambda document: document.pop("images"), "images: must be a list of objects, got None"),
    ],
)
def test_coco_files_that_are_not_in_order_are_refused_by_entry(tmp_path, damage, message):
    document = coco_document()
    damage(document)
    with pytest.raises(DataError, match=message):
        open_split(coco_config(tmp_path, document), "val")


def test_coco_files_that_are_missing_are_named(tmp_path):
    config = coco_config(tmp_path, coco_document())
    (tmp_path / "annotations/image_info_test2017.json").write_text("{}")
    with pytest.raises(DataError, match=r"instances_test2017\.json: must be there.*got \[\]; image_info_test2017\.json has no labels"):
        open_split(config, "test2017")
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"val2017: folder is missing"):
        open_split(config, "val")
    coco_config(tmp_path, coco_document(), "val2014")
    with pytest.raises(DataError, match=r"got \['instances_val2014\.json', 'instances_val2017\.json'\]"):
        open_split(config, "val")
    assert len(open_split(config, "val2014")) == 3
    (tmp_path / "annotations/instances_val2014.json").write_text("{")
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "annotations/instances_val2014.json: "))):
        open_split(config, "val2014")


def test_coco_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.delitem(sys.modules, "pycocotools.mask", raising=False)
    with pytest.raises(DataError, match="'coco21' needs pycocotools, install it"):
        open_split(DataConfig(source="coco21", data_dir=str(tmp_path)), "val")
