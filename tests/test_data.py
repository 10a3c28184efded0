import dataclasses
import pathlib

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from mess_runtime.images import GREY, mask_at, placed
from mess_tf.configs import IGNORE, DataConfig
from mess_tf.data import examples as examples_module
from mess_tf.data.examples import DataError, palette
from mess_tf.data.pipelines import augment, evaluation_batches, network_input, training_batches
from mess_tf.data.sources import open_split
from mess_tf.learning.losses import class_weights

SMALL = DataConfig(input_size=(32, 64), synthetic_train=10, synthetic_val=7, brightness=0.3, contrast=0.2, saturation=0.2)


def write_image(path: pathlib.Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def folder_config(root: pathlib.Path, label_values: tuple[int, ...] = (0, 7), classes: int = 8, count: int = 3, **changes) -> DataConfig:
    """Writes a train split of `count` images, 40x60, whose labels hold only `label_values`, and its classes.txt."""
    rng = np.random.default_rng(0)
    (root / "classes.txt").write_text("".join(f"class{i}\n" for i in range(classes)))
    for i in range(count):
        write_image(root / "train" / "images" / f"{i}.jpg", rng.integers(0, 256, (40, 60, 3), np.uint8))
        write_image(root / "train" / "labels" / f"{i}.png", rng.choice(np.array(label_values, np.uint8), (40, 60)))
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
    return r"train/images: the split has no images"


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
    config = folder_config(tmp_path, count=8)
    for i in range(7):
        (tmp_path / f"train/labels/{i}.png").unlink()
    with pytest.raises(DataError) as caught:
        open_split(config, "train")
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert [f"labels/{i}.png" in line for i, line in enumerate(lines)] == [True] * 5 + [False]
    assert lines[-1] == "... and 2 more"


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
