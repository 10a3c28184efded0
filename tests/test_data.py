import dataclasses
import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from pngs import png

from mess_runtime import terminal
from mess_runtime.frames import open_sources
from mess_runtime.images import GREY, SUFFIXES, mask_at, placed
from mess_tf.configs import IGNORE, RECIPES, DataConfig
from mess_tf.data import examples as examples_module
from mess_tf.data.examples import DataError, palette
from mess_tf.data.pipelines import augment, evaluation_batches, network_input, training_batches
from mess_tf.data.sources import open_split, open_training
from mess_tf.learning.losses import class_weights
from mess_tf.train import check_data, has_its_data, keep_data

SMALL = DataConfig(input_size=(32, 64), synthetic_train=10, synthetic_val=7, brightness=0.3, contrast=0.2, saturation=0.2)


def write_image(path: pathlib.Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def folder_config(root: pathlib.Path, stored: tuple[int, ...] = (0, 7), classes: int = 8, count: int = 3, **changes) -> DataConfig:
    """Writes a train split of `count` images, 40x60, whose labels hold only `stored`, and its classes.txt."""
    rng = np.random.default_rng(0)
    (root / "classes.txt").write_text("".join(f"class{i}\n" for i in range(classes)))
    for i in range(count):
        write_image(root / "train" / "images" / f"{i}.jpg", rng.integers(0, 256, (40, 60, 3), np.uint8))
        write_image(root / "train" / "labels" / f"{i}.png", rng.choice(np.array(stored, np.uint8), (40, 60)))
    return dataclasses.replace(DataConfig(source="folder", data_dir=str(root), input_size=(32, 64)), **changes)


def stack(batches: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*batches.as_numpy_iterator(), strict=True)
    return np.stack(images), np.stack(labels)


# --- synthetic scenes


def test_scene_depends_on_seed_split_and_index_only():
    few = open_split(SMALL, "train")
    many = open_split(dataclasses.replace(SMALL, synthetic_train=30), "train")
    for i in (9, 0):  # in another order than the other split is read
        for ours, theirs in zip(few.load(i), many.load(i), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert few.names == many.names[:10]
    pictures = [few.load(0)[0], few.load(2)[0], open_split(SMALL, "val").load(0)[0]]
    pictures.append(open_split(dataclasses.replace(SMALL, seed=1), "train").load(0)[0])
    assert len({picture.tobytes() for picture in pictures}) == 4


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 10), (0.3, 12), (0.5, 20), (1.0, 40)])
def test_share_of_hard_scenes_is_exact(share, expected):
    examples = open_split(dataclasses.replace(SMALL, synthetic_train=40, synthetic_hard=share), "train")
    assert examples.hard.sum() == expected
    assert [name.endswith("hard") for name in examples.names] == examples.hard.tolist()


def test_colour_tells_the_class_in_easy_scenes_only():
    examples = open_split(dataclasses.replace(SMALL, synthetic_train=40), "train")

    def share_told(hard):  # of the pixels whose class is the one with the nearest mean colour
        images, labels = (
            np.stack(part) for part in zip(*(examples.load(index) for index in np.flatnonzero(examples.hard == hard)), strict=True)
        )
        colours, labels = images[labels != IGNORE].astype(float), labels[labels != IGNORE]
        means = np.stack([colours[labels == value].mean(0) for value in range(examples.info.num_classes)])
        return np.mean(np.linalg.norm(colours[:, None] - means, axis=2).argmin(1) == labels)

    assert share_told(hard=False) > 0.7
    assert share_told(hard=True) < 0.45


@pytest.mark.parametrize("size", [(16, 16), (32, 64), (65, 33), (96, 128)])
def test_scenes_hold_every_class_at_any_size(size):
    examples = open_split(dataclasses.replace(SMALL, input_size=size, synthetic_val=12), "val")
    image, label = examples.load(0)
    assert (image.dtype, image.shape, label.dtype, label.shape) == (np.uint8, (*size, 3), np.uint8, size)
    values = np.unique([examples.load(i)[1] for i in range(12)])
    assert values.tolist() == [*range(examples.info.num_classes), IGNORE]


def test_synthetic_refuses_other_splits_and_empty_ones():
    with pytest.raises(DataError, match=r"'train', 'val', got 'test'"):
        open_split(SMALL, "test")
    with pytest.raises(DataError, match="'val' must have at least one image, got 0"):
        open_split(dataclasses.replace(SMALL, synthetic_val=0), "val")


# --- image folders


def test_folder_maps_ignore_and_counts_classes(tmp_path):
    config = folder_config(tmp_path, (0, 1, 2, 9), classes=3, ignore_value=9)
    palette_label = Image.fromarray(np.full((40, 60), 2, np.uint8))
    palette_label.putpalette([7, 8, 9] * 256)
    palette_label.save(tmp_path / "train" / "labels" / "1.png")
    examples = open_split(config, "train")
    assert (examples.names, examples.info.classes, examples.hard) == (("0", "1", "2"), ("class0", "class1", "class2"), None)

    raw = [np.array(Image.open(tmp_path / "train" / "labels" / f"{i}.png")) for i in range(3)]
    assert (raw[1] == 2).all()
    for i in range(3):
        image, label = examples.load(i)
        np.testing.assert_array_equal(image, np.array(Image.open(tmp_path / "train" / "images" / f"{i}.jpg")))
        np.testing.assert_array_equal(label, np.where(raw[i] == 9, IGNORE, raw[i]))
    by_hand = [sum(int((label == value).sum()) for label in raw) for value in range(3)]
    assert examples.class_pixels().dtype == np.int64
    assert examples.class_pixels().tolist() == by_hand


def test_class_pixels_of_synthetic_equal_a_count_by_hand():
    examples = open_split(SMALL, "val")
    labels = np.stack([examples.load(i)[1] for i in range(7)])
    assert examples.class_pixels().tolist() == [int((labels == value).sum()) for value in range(8)]


def damage_missing_label(root):
    (root / "train/labels/1.png").unlink()
    return r"labels/1\.png: the label of .*images/1\.jpg is missing"


def damage_size(root):
    write_image(root / "train/labels/1.png", np.zeros((40, 59), np.uint8))
    return r"labels/1\.png: must be as large as its image, 40x60, got 40x59"


def damage_value(root):
    write_image(root / "train/labels/1.png", np.full((40, 60), 8, np.uint8))
    return r"labels/1\.png: label values must be classes or the ignored value, got \[8\]"


def damage_mode(root):
    write_image(root / "train/labels/1.png", np.zeros((40, 60, 3), np.uint8))
    return r"labels/1\.png: must be a single-channel or palette image .* got mode RGB"


def damage_image(root):
    (root / "train/images/1.jpg").write_bytes(b"no image")
    return r"images/1\.jpg: not a readable image"


def damage_label(root):
    path = root / "train/labels/1.png"
    path.write_bytes(path.read_bytes()[:300])
    return r"labels/1\.png: not a readable image"


def damage_empty(root):
    for path in (root / "train/images").iterdir():
        path.unlink()
    return r"train/images: must hold files with the suffix .*, got none"


def damage_folder(root):
    (root / "train/labels").rename(root / "train/masks")
    return r"train/labels: folder is missing"


def damage_classes(root):
    (root / "classes.txt").unlink()
    return r"classes\.txt: missing"


def damage_class_names(root):
    (root / "classes.txt").write_text("a\nb\na\n")
    return r"classes\.txt: must list 2 to 255 different class names, got 3, 2 of them different"


@pytest.mark.parametrize("damage", [value for name, value in list(globals().items()) if name.startswith("damage_")])
def test_damage_is_named_with_its_file(tmp_path, damage):
    config = folder_config(tmp_path)
    open_split(config, "train")
    message = damage(tmp_path)
    with pytest.raises(DataError, match=message):
        open_split(config, "train")


def test_several_problems_are_reported_together(tmp_path):
    config = folder_config(tmp_path, count=9)
    for i in range(7):
        (tmp_path / f"train/labels/{i}.png").unlink()
    for i, value in ((7, 100), (8, 200)):
        write_image(tmp_path / f"train/labels/{i}.png", np.full((40, 60), value, np.uint8))
    with pytest.raises(DataError) as caught:
        open_split(config, "train")
    missing, values = str(caught.value).splitlines()
    assert missing.endswith(
        "images/0.jpg is missing; likewise 1.png, 2.png, 3.png, 4.png, 5.png and 1 more (--verbose names all), 7 in all"
    )
    assert values.endswith("got [100]; data.label_values tells what they mean; likewise 8.png, 2 in all") and "labels/7.png: " in values
    kinds = [f"{name}.png: {sentence}" for sentence in ("one", "two", "three", "four", "five", "six", "seven") for name in "ab"]
    lines = terminal.first_few(kinds).splitlines()
    assert lines[0] == "a.png: one; likewise b.png, 2 in all" and len(lines) == 6
    assert lines[-1] == "... and 2 more, 14 problems in all (--verbose names all)"


def test_all_problems_are_named_where_asked(monkeypatch):
    monkeypatch.setattr("mess_runtime.terminal._verbose", True)
    kinds = [f"{name}.png: {sentence}" for sentence in ("one", "two", "three", "four", "five", "six", "seven") for name in "abcdefgh"]
    lines = terminal.first_few(kinds).splitlines()
    assert len(lines) == 7 and lines[6] == "a.png: seven; likewise b.png, c.png, d.png, e.png, f.png, g.png, h.png, 8 in all"


def test_truncated_image_is_named_when_read(tmp_path):
    config = folder_config(tmp_path)
    path = tmp_path / "train/images/1.jpg"
    path.write_bytes(path.read_bytes()[:900])
    examples = open_split(config, "train")
    with pytest.raises(DataError, match=r"images/1\.jpg: not a readable image"):
        examples.load(1)


def test_bad_settings_are_refused(tmp_path):
    config = folder_config(tmp_path)
    with pytest.raises(DataError, match=r"data\.ignore_value: must be above the 8 classes .* got 3"):
        open_split(dataclasses.replace(config, ignore_value=3), "train")
    for value in (-1, 2**16):
        with pytest.raises(DataError, match=rf"data\.ignore_value: must be a value of a label, 0 to 65535, got {value}"):
            open_split(dataclasses.replace(config, label_values={"0": 0, "1": 1}, ignore_value=value), "train")
    with pytest.raises(DataError, match=r"data\.data_dir: must be the root folder of the 'folder' source"):
        open_split(dataclasses.replace(config, data_dir=""), "train")
    with pytest.raises(DataError, match=r"nearest: folder.*got 'foldr'"):
        open_split(dataclasses.replace(config, source="foldr"), "train")


# --- Pascal VOC


@pytest.mark.parametrize("inside", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_round_trip(tmp_path, inside):
    root = tmp_path / inside
    raw = np.arange(40 * 60).reshape(40, 60) % 22
    raw = np.where(raw == 21, 255, raw).astype(np.uint8)
    for name in ("b", "a", "unlisted"):
        write_image(root / "JPEGImages" / f"{name}.jpg", np.full((40, 60, 3), 90, np.uint8))
        label = Image.fromarray(raw)
        label.putpalette(list(range(256)) * 3)
        (root / "SegmentationClass").mkdir(exist_ok=True)
        label.save(root / "SegmentationClass" / f"{name}.png")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("b\na\n")
    config = DataConfig(source="voc", data_dir=str(tmp_path))
    examples = open_split(config, "val")
    assert (examples.names, examples.info.num_classes) == (("b", "a"), 21)
    np.testing.assert_array_equal(examples.load(1)[1], raw)
    assert examples.class_pixels().tolist() == [2 * int((raw == value).sum()) for value in range(21)]

    with pytest.raises(DataError, match=r"Segmentation/train\.txt"):
        open_split(config, "train")
    (lists / "val.txt").write_text("b\nunlisted\ngone\n")
    (root / "JPEGImages" / "unlisted.jpg").unlink()
    with pytest.raises(DataError, match=r"JPEGImages/unlisted\.jpg: not a readable image[^\n]*\n[^\n]*SegmentationClass/gone\.png"):
        open_split(config, "val")


def test_voc_needs_exactly_one_year(tmp_path):
    config = DataConfig(source="voc", data_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"exactly one VOC year .* found none"):
        open_split(config, "val")
    for year in ("VOC2007", "VOC2012"):
        (tmp_path / year / "JPEGImages").mkdir(parents=True)
    with pytest.raises(DataError, match=r"exactly one VOC year .* found .*VOC20.*VOC20"):
        open_split(config, "val")


# --- TensorFlow Datasets


@pytest.mark.parametrize(
    ("name", "image_key", "label_key", "channels", "raw", "expected", "classes"),
    [
        ("oxford_iiit_pet", "image", "segmentation_mask", 1, [1, 2, 3], [0, 1, 2], 3),
        ("cityscapes/semantic_segmentation", "image_left", "segmentation_label", 1, [0, 7, 8, 33, 255], [255, 0, 1, 18, 255], 19),
        ("scene_parse150", "image", "annotation", 3, [0, 1, 100, 150], [255, 0, 99, 149], 150),
    ],
)
def test_tfds_round_trip(name, image_key, label_key, channels, raw, expected, classes):
    image = np.full((8, len(raw), 3), 50, np.uint8)
    label = np.zeros((8, len(raw), channels), np.uint8)
    label[..., 0] = raw
    records = [{image_key: image, label_key: label}, {image_key: image, label_key: label[1:]}]
    with tfds.testing.mock_data(as_data_source_fn=lambda self, split, **_: records):
        examples = open_split(DataConfig(source=f"tfds:{name}"), "test")
    assert (len(examples), examples.info.num_classes, len(set(examples.info.classes))) == (2, classes, classes)
    np.testing.assert_array_equal(examples.load(0)[0], image)
    np.testing.assert_array_equal(examples.load(0)[1], np.tile(np.array(expected, np.uint8), (8, 1)))
    with pytest.raises(DataError, match=rf"{name} test/000001: label must be as large as its image, \(8, .*got \(7,"):
        examples.load(1)


def test_tfds_random_access_and_bad_values():
    # The mocked cityscapes draws image and label at random, of equal size: every raw value is legal there, but not in the pets' trimap.
    with tfds.testing.mock_data(num_examples=3):
        cityscapes = open_split(DataConfig(source="tfds:cityscapes/semantic_segmentation"), "validation")
        image, label = cityscapes.load(2)
    assert (len(cityscapes), image.shape, label.shape) == (3, (1024, 2048, 3), (1024, 2048))
    assert np.unique(label).tolist() == [*range(19), IGNORE]
    record = {"image": np.zeros((2, 2, 3), np.uint8), "segmentation_mask": np.full((2, 2, 1), 4, np.uint8)}
    with tfds.testing.mock_data(as_data_source_fn=lambda self, split, **_: [record]):
        pets = open_split(DataConfig(source="tfds:oxford_iiit_pet"), "train")
    with pytest.raises(DataError, match=r"oxford_iiit_pet train/000000: label values .* got \[4\]"):
        pets.class_pixels()


def test_unknown_and_empty_tfds_are_refused():
    with pytest.raises(
        DataError, match=r"tfds:oxford_iiit_pet, tfds:cityscapes/semantic_segmentation, tfds:scene_parse150, got 'tfds:mnist'"
    ):
        open_split(DataConfig(source="tfds:mnist"), "train")
    with (
        tfds.testing.mock_data(as_data_source_fn=lambda self, split, **_: []),
        pytest.raises(DataError, match="tfds:oxford_iiit_pet: split 'train' has no images"),
    ):
        open_split(DataConfig(source="tfds:oxford_iiit_pet"), "train")


# --- pipelines


def test_batches_are_a_function_of_seed_and_step():
    examples = open_split(SMALL, "train")
    images, labels = stack(training_batches(examples, SMALL, 4, seed=3, first_step=0, steps=7))
    assert (images.dtype, images.shape, labels.dtype, labels.shape) == (np.float32, (7, 4, 32, 64, 3), np.uint8, (7, 4, 32, 64))
    again = stack(training_batches(examples, SMALL, 4, seed=3, first_step=0, steps=7))
    resumed = stack(training_batches(examples, SMALL, 4, seed=3, first_step=4, steps=3))  # in the middle of the second epoch
    np.testing.assert_array_equal(images, again[0])
    np.testing.assert_array_equal(images[4:], resumed[0])
    np.testing.assert_array_equal(labels[4:], resumed[1])
    other, _ = stack(training_batches(examples, SMALL, 4, seed=4, first_step=0, steps=7))
    assert not any((mine == theirs).all() for mine, theirs in zip(images, other, strict=True))


def test_every_epoch_shows_every_image_once_in_another_order(tmp_path):
    config = folder_config(tmp_path, count=5, scale_range=(1.0, 1.0), flip=False, brightness=0.0)
    for i in range(5):
        write_image(tmp_path / f"train/images/{i}.jpg", np.full((40, 60, 3), 40 * i, np.uint8))
    examples = open_split(config, "train")
    images, _ = stack(training_batches(examples, config, 3, seed=0, first_step=0, steps=10))  # 6 epochs of 5
    epochs = np.rint(images.mean(axis=(2, 3, 4)) / 40).astype(int).reshape(6, 5)
    assert (np.sort(epochs) == np.arange(5)).all()
    assert len(np.unique(epochs, axis=0)) > 3


def test_labels_are_never_interpolated(tmp_path):
    config = folder_config(tmp_path, (0, 7))
    examples = open_split(config, "train")
    _, labels = stack(training_batches(examples, config, 4, seed=0, first_step=0, steps=10))
    assert np.unique(labels).tolist() == [0, 7, IGNORE]


def test_small_scale_is_padded_and_large_scale_is_not(tmp_path):
    config = folder_config(tmp_path, scale_range=(0.5, 0.5))
    examples = open_split(config, "train")
    images, labels = stack(training_batches(examples, config, 4, seed=0, first_step=0, steps=4))
    padded = labels == IGNORE
    np.testing.assert_array_equal(padded.sum(axis=(2, 3)), 32 * 64 - 16 * 32)
    assert (images[padded] == GREY).all()
    assert len(np.unique(padded.reshape(16, -1), axis=0)) > 8  # the place of the image in the crop is random
    config = dataclasses.replace(config, scale_range=(1.0, 2.0))
    _, labels = stack(training_batches(examples, config, 4, seed=0, first_step=0, steps=4))
    assert not (labels == IGNORE).any()


@pytest.mark.parametrize("size", [(32, 64), (45, 61), (16, 100), (16, 16), (120, 90)])
@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
def test_scale_one_is_the_resize_of_evaluation(tmp_path, size, resize):
    config = folder_config(tmp_path, tuple(range(8)), scale_range=(1.0, 1.0), flip=False, brightness=0.0, input_size=size, resize=resize)
    image, label = open_split(config, "train").load(0)
    ours, ours_label = (tensor.numpy() for tensor in augment(image, label, config, tf.constant([0, 0], tf.int64)))
    inside = np.nonzero(ours_label != IGNORE)  # in a crop, a letterboxed image lies anywhere
    inside = tuple(slice(axis.min(), axis.max() + 1) for axis in inside)
    expected = network_input(image, size, resize)[0][placed((40, 60), size, resize)]
    assert ours[inside].shape == expected.shape
    assert np.abs(ours[inside] - expected).max() < 1.01  # twice rounded to whole values
    back = mask_at(label, expected.shape[:2], "stretch")  # the nearest pixel
    np.testing.assert_array_equal(ours_label[inside], back)


def test_image_and_label_move_together(tmp_path):
    # A label that can be read off the image: left half black and class 0, right half white and class 7.
    config = folder_config(tmp_path, brightness=0.0, scale_range=(0.6, 1.8))
    half = np.repeat([[0, 1]], 30, axis=1).repeat(40, axis=0).astype(np.uint8)
    for i in range(3):
        write_image(tmp_path / f"train/images/{i}.jpg", np.repeat(255 * half[..., None], 3, axis=2))
        write_image(tmp_path / f"train/labels/{i}.png", 7 * half)
    examples = open_split(config, "train")
    images, labels = stack(training_batches(examples, config, 8, seed=0, first_step=0, steps=4))
    grey = images.mean(axis=-1)
    bright = np.where(labels == IGNORE, labels, 7 * (grey > 127.5))
    assert (bright == labels).mean() > 0.98  # all but the blurred edge
    left_is_bright = [np.argmax(label.max(0) == 7) < np.argmax(label.max(0) == 0) for label in labels.reshape(-1, 32, 64)]
    assert 0 < sum(left_is_bright) < 32  # some are flipped, some are not


def test_soft_targets_move_with_the_image(tmp_path):
    # A soft target that can be read off the image: how bright a pixel is, at a quarter of the size.
    config = folder_config(tmp_path, brightness=0.0, scale_range=(0.6, 1.8), crop_size=(64, 128), input_size=(64, 128))
    half = np.repeat([[0, 1]], 64, axis=1).repeat(64, axis=0).astype(np.uint8)
    for i in range(3):
        write_image(tmp_path / f"train/images/{i}.jpg", np.repeat(255 * half[..., None], 3, axis=2))
        write_image(tmp_path / f"train/labels/{i}.png", 7 * half)
    examples = open_split(config, "train")
    soft = np.stack([1 - half[::4, ::4], half[::4, ::4]], axis=-1).astype(np.float16)[None].repeat(3, axis=0)
    batches = list(training_batches(examples, config, 8, seed=0, first_step=0, steps=4, soft_targets=soft))
    labels, targets = (np.concatenate([batch[k] for batch in batches]) for k in (1, 2))
    assert (targets.shape, targets.dtype) == ((32, 16, 32, 2), np.float32)
    inside = labels[:, 2::4, 2::4]
    assert ((targets.sum(-1) > 0.5) == (inside != IGNORE)).mean() > 0.98  # all but the border, which lies between two cells
    right = (targets[..., 1] > 0.5) == (inside == 7)
    assert right[inside != IGNORE].mean() > 0.97  # all but the edge
    _, plain = stack(training_batches(examples, config, 8, seed=0, first_step=0, steps=4))
    np.testing.assert_array_equal(plain.reshape(labels.shape), labels)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_changes_stay_in_range(tmp_path, name):
    plain = folder_config(tmp_path, scale_range=(1.0, 1.0), flip=False, brightness=0.0)
    image, label = open_split(plain, "train").load(0)
    before, _ = augment(image, label, plain, tf.constant([0, 0], tf.int64))
    changed = [augment(image, label, dataclasses.replace(plain, **{name: 0.4}), tf.constant([0, i], tf.int64))[0] for i in range(6)]
    before, changed = before.numpy(), np.stack(changed)
    assert changed.min() >= 0
    assert changed.max() <= 255
    measures = {
        "brightness": lambda images: images.mean(axis=(-3, -2, -1)),
        "contrast": lambda images: images.std(axis=(-3, -2, -1)),
        "saturation": lambda images: images.std(axis=-1).mean(axis=(-2, -1)),
    }
    factors = measures[name](changed) / measures[name](before)
    assert (np.abs(factors - 1) < 0.41).all()
    assert factors.max() - factors.min() > 0.1


def test_evaluation_batches_are_the_images_themselves(tmp_path):
    config = folder_config(tmp_path)
    write_image(tmp_path / "train/images/1.jpg", np.zeros((50, 30, 3), np.uint8))
    write_image(tmp_path / "train/labels/1.png", np.zeros((50, 30), np.uint8))
    examples = open_split(config, "train")
    batches = list(evaluation_batches(examples).as_numpy_iterator())
    assert [image.shape for image, _ in batches] == [(1, 40, 60, 3), (1, 50, 30, 3), (1, 40, 60, 3)]
    for i, (image, label) in enumerate(batches):
        assert (image.dtype, label.dtype) == (np.uint8, np.uint8)
        np.testing.assert_array_equal(image[0], examples.load(i)[0])
        np.testing.assert_array_equal(label[0], examples.load(i)[1])


def test_memory_of_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(examples_module, "CACHE_BYTES", 3 * 32 * 64 * 4)
    examples = open_split(SMALL, "train")
    first = [examples.load(i) for i in range(5)]
    kept = [examples.load(i)[0] is first[i][0] for i in range(5)]
    assert kept == [True] * 3 + [False] * 2
    with pytest.raises(ValueError, match="read-only"):
        first[0][0][0, 0] = 0


# --- weights and colours


def test_class_weights():
    pixels = np.array([100, 400, 0, 1600], np.int64)
    weights = class_weights(pixels, "sqrt_median_frequency")
    np.testing.assert_allclose(weights, [2, 1, 0, 0.5])
    assert weights.dtype == np.float32
    assert class_weights(pixels, "none").tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="'sqrt_median_frequency', got 'median'"):
        class_weights(pixels, "median")


def test_palette_is_fixed_and_distinct():
    colours = palette(150)
    assert (colours.dtype, colours.shape) == (np.uint8, (150, 3))
    assert len(np.unique(colours, axis=0)) == 150
    np.testing.assert_array_equal(colours[:21], palette(21))
    distances = np.linalg.norm(colours[:21, None].astype(int) - colours[None, :21], axis=-1) + 255 * np.eye(21)
    assert distances.min() > 25


# --- CamVid


def test_camvid(camvid_dir):
    config = DataConfig(source="folder", data_dir=str(camvid_dir), ignore_value=11, input_size=(96, 128))
    train, val = (open_split(config, split) for split in ("train", "val"))
    assert (len(train), len(val), train.info.num_classes) == (367, 101, 11)
    assert not set(train.names) & set(val.names)
    image, label = val.load(0)
    assert (image.shape, label.shape) == ((360, 480, 3), (360, 480))
    assert (train.class_pixels() > 0).all()
    images, labels = next(iter(training_batches(train, config, 2, seed=0, first_step=0, steps=1)))
    assert images.shape == (2, 96, 128, 3)
    assert set(np.unique(labels)) <= {*range(11), IGNORE}


# --- labels of every kind


def turned(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def test_labels_are_those_of_the_photo_as_it_is_shown(tmp_path):
    config = folder_config(tmp_path)
    array = np.zeros((40, 60, 3), np.uint8)
    array[:, :20] = 255
    Image.fromarray(array).save(tmp_path / "train/images/1.jpg", exif=turned(6))
    turn = r"viewers turn the photo \(EXIF orientation 6\), the label is of it as it is stored: turn one like the other"
    with pytest.raises(DataError, match=rf"labels/1\.png: must be as large as its image, 60x40, got 40x60; {turn}$"):
        open_split(config, "train")
    write_image(tmp_path / "train/labels/1.png", np.zeros((40, 61), np.uint8))
    with pytest.raises(DataError, match=r"must be as large as its image, 60x40, got 40x61$"):
        open_split(config, "train")
    label = np.zeros((60, 40), np.uint8)
    label[:20] = 7  # after the turn, what was on the left is on top
    write_image(tmp_path / "train/labels/1.png", label)
    image, read = open_split(config, "train").load(1)
    assert ((image[..., 0] > 127) == (read == 7)).all()
    Image.fromarray(np.ascontiguousarray(label.T[::-1])).save(tmp_path / "train/labels/1.png", exif=turned(6))  # one that is turned itself
    np.testing.assert_array_equal(open_split(config, "train").load(1)[1], label)


def test_labels_that_may_be_of_the_stored_photo_are_warned_of(tmp_path, capsys):
    config = folder_config(tmp_path, count=5)
    square = np.zeros((40, 40, 3), np.uint8)
    for name, orientation, array in ((1, 3, None), (2, 2, None), (3, 6, square), (4, 4, None)):
        path = tmp_path / f"train/images/{name}.jpg"
        Image.fromarray(np.zeros((40, 60, 3), np.uint8) if array is None else array).save(path, exif=turned(orientation))
    write_image(tmp_path / "train/labels/3.png", np.zeros((40, 40), np.uint8))
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path / "train/labels/4.png", exif=turned(4))  # which says itself how it lies
    assert len(open_split(config, "train")) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"warning: {tmp_path}/train: 3 photos, such as 1.jpg, are stored turned or mirrored (EXIF orientation): their labels"
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_labels_of_any_depth_are_true_values(tmp_path, bits):
    config = folder_config(tmp_path, (0, 1), classes=60, count=1)
    label = np.arange(40 * 64).reshape(40, 64) % min(2**bits, 60)
    write_image(tmp_path / "train/images/0.jpg", np.zeros((40, 64, 3), np.uint8))
    if bits == 16:
        packed = label.astype(">u2").view(np.uint8)
    else:
        packed = np.packbits((label[..., None] >> np.arange(bits)[::-1] & 1).astype(np.uint8).reshape(40, -1), axis=-1)
    png(tmp_path / "train/labels/0.png", bits, 0, packed)
    np.testing.assert_array_equal(open_split(config, "train").load(0)[1], label)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_labels_are_their_indices_whatever_is_transparent(tmp_path, bits):
    config = folder_config(tmp_path, (0, 1))
    label = Image.fromarray(np.tile(np.arange(2, dtype=np.uint8), (40, 30)))
    label.putpalette([9, 8, 7] * 256)
    label.save(tmp_path / "train/labels/1.png", transparency=1, bits=bits)
    np.testing.assert_array_equal(open_split(config, "train").load(1)[1], np.array(label))


def test_wide_values_and_jpegs_are_no_labels(tmp_path):
    config = folder_config(tmp_path)
    Image.fromarray(np.full((40, 60), 260, np.uint16)).save(tmp_path / "train/labels/0.png")
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path / "train/labels/1.png", "JPEG")
    (tmp_path / "train/labels/2.png").unlink()
    (tmp_path / "train/labels/2.tif").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        open_split(config, "train")
    first, second, third = str(caught.value).splitlines()
    assert "labels/0.png: label values" in first and "got [260]" in first
    assert second.endswith("labels/1.png: not a readable image: does not hold PNG")
    assert third.endswith("is missing; there is 2.tif, labels must be PNG")


@pytest.mark.parametrize(
    ("label_values", "classes", "stored", "expected"),
    [
        ({"0": 0, "255": 1}, 2, [0, 255], [0, 1]),
        ({"0": 255, "300": 1, "7": 0}, 2, [0, 300, 7, 255], [255, 1, 0, 255]),
        ("cityscapes", 19, [0, 7, 8, 33, 18, 255], [255, 0, 1, 18, 255, 255]),
        ("ade20k", 150, [0, 1, 2, 150], [255, 0, 1, 149]),
    ],
)
def test_label_values_say_which_value_is_which_class(tmp_path, label_values, classes, stored, expected):
    config = folder_config(tmp_path, classes=classes, count=1, label_values=label_values)
    write_image(tmp_path / "train/images/0.jpg", np.zeros((3, len(stored), 3), np.uint8))
    write_image(tmp_path / "train/labels/0.png", np.array([stored] * 3, np.uint16 if 300 in stored else np.uint8))
    examples = open_split(config, "train")
    np.testing.assert_array_equal(examples.load(0)[1], np.array([expected] * 3))
    assert examples.class_pixels().sum() == 3 * sum(value != 255 for value in expected)


def test_values_and_classes_that_do_not_fit_label_values(tmp_path):
    config = folder_config(tmp_path, (0, 128), classes=2, label_values={"0": 0, "255": 1})
    with pytest.raises(DataError, match=r"labels/0\.png: label values must be classes or the ignored value, got \[128\]"):
        open_split(config, "train")
    with pytest.raises(DataError, match=r"data\.label_values: must lead to the 2 classes of the data or 255, got 2"):
        open_split(dataclasses.replace(config, label_values={"0": 2}), "train")


def test_labels_may_be_colours(tmp_path):
    config = folder_config(tmp_path, classes=2, count=2, label_values={"#804080": 0, "70, 70,70": 1, "#000000": 255})
    which = np.arange(40 * 60).reshape(40, 60) % 3
    painted = np.array([[128, 64, 128], [70, 70, 70], [0, 0, 0]], np.uint8)[which]
    write_image(tmp_path / "train/labels/0.png", painted)
    Image.fromarray(painted).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "train/labels/1.png")
    examples = open_split(config, "train")
    for i in range(2):
        np.testing.assert_array_equal(examples.load(i)[1], np.array([0, 1, 255])[which])
    painted[3, 4] = (1, 2, 3)
    write_image(tmp_path / "train/labels/0.png", painted)
    with pytest.raises(DataError, match=r"labels/0\.png: label values must be .*, got \['#010203'\]"):
        open_split(config, "train")


@pytest.mark.parametrize(
    ("label_values", "message"),
    [
        ("citscapes", "a table or one of cityscapes, ade20k, got 'citscapes'"),
        ({"red": 0}, "with keys like 7"),
        ({"0,0,256": 0}, "with keys like 7"),
        ({"65536": 0}, "with keys like 7"),
        ({"0": 256}, "with classes from 0 on"),
        ({"0": "1"}, "with classes from 0 on, 255 for none, got '1'"),
        ({7: 0}, "with keys like .*, as text, got 7"),
        ([0, 7], "a table or the name of one"),
        ({"0": 0, "00": 1}, "without a value or colour twice, got '00'"),
        ({"0": 0, "#000000": 1}, "of values or of colours, not of both"),
    ],
)
def test_bad_label_values_are_refused(label_values, message):
    with pytest.raises(ValueError, match=rf"^label_values: must be {message}"):
        DataConfig(source="folder", data_dir="D", label_values=label_values)


# --- names and lists of every kind


def test_names_that_are_not_utf8_are_shown_with_escapes(tmp_path):
    config = folder_config(tmp_path, count=1)
    for kind, suffix in (("images", b"jpg"), ("labels", b"png")):
        path = os.fsencode(tmp_path / "train" / kind)
        os.rename(path + b"/0." + suffix, path + b"/stra\xdfe\n." + suffix)
    examples = open_split(config, "train")
    assert examples.names == (r"stra\udcdfe\n",)
    assert examples.load(0)[0].shape == (40, 60, 3)


def test_two_images_of_one_name_and_nested_folders_are_refused(tmp_path):
    config = folder_config(tmp_path)
    write_image(tmp_path / "train/images/1.PNG", np.zeros((40, 60, 3), np.uint8))
    with pytest.raises(DataError, match=r"images/1\.jpg: must have a name of its own, got that of 1\.PNG"):
        open_split(config, "train")
    (tmp_path / "train/images").rename(tmp_path / "train/city")
    (tmp_path / "train/images").mkdir()
    (tmp_path / "train/city").rename(tmp_path / "train/images/city")
    with pytest.raises(DataError, match=r"train/images: must hold files .*; its folder city does"):
        open_split(config, "train")


@pytest.mark.parametrize(
    ("image", "label", "how"),
    [("caf\u00e9", "cafe\u0301", "in how Unicode composes its letters"), ("A", "a", "by case"), ("\u00c9", "e\u0301", "by case")],
)
def test_names_that_people_read_as_the_same_are_hinted_at(tmp_path, image, label, how):
    config = folder_config(tmp_path, count=1)
    (tmp_path / "train/images/0.jpg").rename(tmp_path / f"train/images/{image}.jpg")
    (tmp_path / "train/labels/0.png").rename(tmp_path / f"train/labels/{label}.png")
    with pytest.raises(
        DataError, match=rf"labels/{image}\.png: the label of .* is missing; there is {label}\.png, whose name differs {how}"
    ):
        open_split(config, "train")


def test_a_photo_of_a_list_whose_name_differs_by_case_is_hinted_at(tmp_path):
    config = voc_list(tmp_path, b"a\nb\n")
    (tmp_path / "JPEGImages/b.jpg").rename(tmp_path / "JPEGImages/b.JPG")
    with pytest.raises(DataError, match=r"b\.jpg: not a readable image: missing; there is b\.JPG, whose name differs by case"):
        open_split(config, "train_aug")


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_the_runtime_reads_the_photos_that_training_reads(tmp_path, suffix):
    config = folder_config(tmp_path, count=1)
    photo = tmp_path / "train/images/0.jpg"
    with Image.open(photo) as image:
        image.save(photo.with_suffix(suffix))
    if suffix != ".jpg":
        photo.unlink()
    ((_, frames),) = open_sources([str(photo.parent)])
    np.testing.assert_array_equal(open_split(config, "train").load(0)[0], next(frames)[1])


def test_what_is_left_out_is_said(tmp_path, capsys):
    config = folder_config(tmp_path)
    for name in ("3.heic", "._0.jpg", "Thumbs.db"):
        (tmp_path / "train/images" / name).write_bytes(b"")
    for name in ("3", "5", "6"):
        write_image(tmp_path / f"train/labels/{name}.png", np.zeros((40, 60), np.uint8))
    write_image(tmp_path / "train/images/4.tif", np.zeros((40, 60, 3), np.uint8))
    write_image(tmp_path / "train/labels/4.PNG", np.zeros((40, 60), np.uint8))
    assert open_split(config, "train").names == ("0", "1", "2", "4")
    images, labels = capsys.readouterr().err.splitlines()
    assert "images/3.heic: left out, the suffix must be one of" in images
    assert labels.endswith("labels/3.png: left out, there is no image of this name; likewise 5.png, 6.png, 3 in all")


@pytest.mark.parametrize("content", ["a\nb\n".encode("utf-8-sig"), b"a\r\n\r\nb\r\n", "a\nb\n".encode("utf-16"), b"a\nb"])
def test_class_names_of_windows_are_read(tmp_path, content):
    config = folder_config(tmp_path, (0, 1), classes=2)
    (tmp_path / "classes.txt").write_bytes(content)
    assert open_split(config, "train").info.classes == ("a", "b")


@pytest.mark.parametrize(
    ("content", "message"), [(b"a\nstra\xdfe", "got byte 0xdf at 6"), ("a\nb".encode("utf-16-le"), "control characters")]
)
def test_other_texts_are_refused_by_name(tmp_path, content, message):
    config = folder_config(tmp_path)
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"classes\.txt: must be text in UTF-8.*{message}"):
        open_split(config, "train")


def voc_list(root: pathlib.Path, content: bytes) -> DataConfig:
    """A VOC year: labels 0, 1 and 2 of three images, 10 to 13 in SegmentationClassAug, of one more too, and a list train_aug."""
    for value, name in enumerate(("a", "b", "two words", "only_sbd")):
        write_image(root / "JPEGImages" / f"{name}.jpg", np.zeros((4, 5, 3), np.uint8))
        if name != "only_sbd":
            write_image(root / "SegmentationClass" / f"{name}.png", np.full((4, 5), value, np.uint8))
        write_image(root / "SegmentationClassAug" / f"{name}.png", np.full((4, 5), 10 + value, np.uint8))
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train_aug.txt").write_bytes(content)
    return DataConfig(source="voc", data_dir=str(root))


@pytest.mark.parametrize(
    ("content", "names", "first"),
    [
        ("\ufeffb\r\n\r\na\r\n".encode(), ("b", "a"), 1),
        ("b\na\n".encode("utf-16"), ("b", "a"), 1),
        (b"two words\na", ("two words", "a"), 2),
        (b"/JPEGImages/b.jpg /SegmentationClassAug/b.png\nJPEGImages/a.jpg SegmentationClassAug/a.png\n", ("b", "a"), 11),
        (b"JPEGImages/b.jpg\na.jpg\n", ("b", "a"), 1),
        (b"only_sbd\na\n", ("only_sbd", "a"), 13),
        (b"JPEGImages/only_sbd.jpg\na\n", ("only_sbd", "a"), 13),
    ],
)
def test_voc_lists_of_every_kind(tmp_path, content, names, first):
    examples = open_split(voc_list(tmp_path, content), "train_aug")
    assert examples.names == names
    assert (examples.load(0)[1] == first).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"a  1\nb -1\n",
            r"each line must be a name, .* got 'a  1'; this is the list of one class, where `awk '\{print \$1\}' train_aug\.txt`",
        ),
        (b"a b\n", "each line must be a name, .* got 'a b'$"),
        (b"a\nb\na\n", r"must hold each name once, got .*/a\.jpg and .*/a\.jpg"),
        (b"a\nstra\xdfe\n", "must be text in UTF-8, got byte 0xdf at 6"),
        (b"\n", "the split has no images"),
    ],
)
def test_other_voc_lists_are_refused_by_name(tmp_path, content, message):
    with pytest.raises(DataError, match=rf"train_aug\.txt: {message}"):
        open_split(voc_list(tmp_path, content), "train_aug")


# --- both splits of a training


def two_splits(root: pathlib.Path, trained: tuple[int, ...], judged: tuple[int, ...], classes: int) -> DataConfig:
    root.mkdir(exist_ok=True)
    folder_config(root, judged, classes)
    (root / "train").rename(root / "val")
    return folder_config(root, trained, classes)


def test_classes_that_a_split_lacks_are_named(tmp_path, capsys):
    open_training(two_splits(tmp_path, (0, 1), (0, 2), 4))
    trained, judged = capsys.readouterr().err.splitlines()
    assert trained == "warning: the train split holds no labelled pixel of class2, class3 (nor elsewhere): nothing is learnt of them"
    assert judged == "warning: the val split holds no labelled pixel of class1, class3 (nor elsewhere): mIoU leaves them out"


def test_nothing_to_learn_or_to_judge_is_refused(tmp_path, capsys):
    config = two_splits(tmp_path / "binary", (0, 255), (0, 255), 2)
    with pytest.raises(DataError, match=r"at least two classes, got \['class0'\]; of binary masks of 0 and 255, data\.label_values="):
        open_training(config)
    train, val = open_training(dataclasses.replace(config, label_values={"0": 0, "255": 1}))
    assert (train.class_pixels() > 0).all() and (val.class_pixels() > 0).all()
    assert capsys.readouterr().err == ""
    with pytest.raises(DataError, match=r"ignored/val: must hold labelled pixels, got none in 3 labels"):
        open_training(two_splits(tmp_path / "ignored", (0, 1), (255,), 2))


def test_a_truncated_photo_is_known_before_training(tmp_path):
    config = two_splits(tmp_path, (0, 1), (0, 1), 2)
    path = tmp_path / "train/images/1.jpg"
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match=r"images/1\.jpg: not a readable image"):
        open_training(config)


def test_digests_are_of_contents(tmp_path):
    config = folder_config(tmp_path)
    found = [open_split(config, "train").digests for _ in range(2)]
    for name, array in (("images/1.jpg", np.zeros((40, 60, 3), np.uint8)), ("labels/1.png", np.zeros((40, 60), np.uint8))):
        write_image(tmp_path / "train" / name, array)
        found.append(open_split(config, "train").digests)
    assert found[0] == found[1] and len({tuple(each.items()) for each in found}) == 3
    drawn = [open_split(dataclasses.replace(SMALL, seed=seed), "train").digests for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_changed_data_are_refused_at_a_later_start(tmp_path):
    config = two_splits(tmp_path / "data", (0, 1), (0, 1), 2)

    def start():
        splits = {name: open_split(config, name) for name in ("train", "val")}
        check_data(tmp_path / "work", splits)
        keep_data(tmp_path / "work", splits)

    start()
    start()
    write_image(tmp_path / "data/val/images/1.jpg", np.zeros((40, 60, 3), np.uint8))
    for kind, suffix in (("images", "jpg"), ("labels", "png")):
        (tmp_path / f"data/val/{kind}/2.{suffix}").rename(tmp_path / f"data/val/{kind}/3.{suffix}")
    of_work = dataclasses.replace(RECIPES["smoke"], data=config)
    for again in (start, lambda: has_its_data(tmp_path / "work", of_work)):
        with pytest.raises(DataError, match=r"work/data\.json: data must be .*\n1: changed\n2: gone\n3: new"):
            again()
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert has_its_data(tmp_path / "work", of_work)
    (tmp_path / "elsewhere").rename(tmp_path / "data")
    (tmp_path / "work/data.json").unlink()
    start()
    assert has_its_data(tmp_path / "work", of_work)
