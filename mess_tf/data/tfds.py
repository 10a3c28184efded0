"""Sources of TensorFlow Datasets."""

import dataclasses

import numpy as np

from mess_tf.configs import CITYSCAPES_IDS, IGNORE, DataConfig
from mess_tf.data.examples import DataError, DatasetInfo, Examples
from mess_tf.data.labels import INVALID, apply_table
from mess_tf.data.layouts import CITYSCAPES_CLASSES, PET_CLASSES


@dataclasses.dataclass(frozen=True)
class _TfdsSource:
    """Where a data set keeps image and label, and which stored value is which class; `others` is what all other values become."""

    image: str
    label: str
    classes: dict[int, str]
    others: int = INVALID
    ignored: tuple[int, ...] = ()


TFDS = {
    "oxford_iiit_pet": _TfdsSource("image", "segmentation_mask", dict(enumerate(PET_CLASSES, 1))),
    "cityscapes/semantic_segmentation": _TfdsSource(
        "image_left", "segmentation_label", dict(zip(CITYSCAPES_IDS, CITYSCAPES_CLASSES, strict=True)), others=IGNORE
    ),
    # The red channel of the instance annotation, which is what this data set holds: numbered object categories, 0 elsewhere.
    "scene_parse150": _TfdsSource("image", "annotation", {i: f"category {i}" for i in range(1, 151)}, ignored=(0,)),
}


def open_tfds(config: DataConfig, name: str, split: str) -> Examples:
    """Opens a TensorFlow Datasets split for random access; it is downloaded and prepared if need be. Labels are checked when read."""
    if name not in TFDS:
        raise DataError(f"data.source: must be one of {', '.join(f'tfds:{known}' for known in TFDS)}, got {config.source!r}")
    import tensorflow_datasets as tfds

    spec = TFDS[name]
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
        return image, apply_table(raw, table, where)

    return Examples(DatasetInfo(config.source, tuple(spec.classes.values())), names, read)
