"""Opens a split of the configured source."""

import difflib

from mess_runtime.terminal import complain
from mess_tf.configs import FILE_SOURCES, DataConfig
from mess_tf.data.coco import open_coco21
from mess_tf.data.examples import DataError, Examples
from mess_tf.data.files import open_folder
from mess_tf.data.layouts import LAYOUTS, open_layout
from mess_tf.data.synthetic import open_synthetic
from mess_tf.data.tfds import TFDS, open_tfds

_OPEN = {"synthetic": open_synthetic, "folder": open_folder, "coco21": open_coco21} | dict.fromkeys(LAYOUTS, open_layout)


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
    if config.source in FILE_SOURCES and not config.data_dir:
        raise DataError(f"data.data_dir: must be the root folder of the {config.source!r} source, got ''")
    if config.source in _OPEN:
        return _OPEN[config.source](config, split)
    if source == "tfds":
        return open_tfds(config, name, split)
    known = [*_OPEN, *(f"tfds:{name}" for name in TFDS)]
    nearest = difflib.get_close_matches(config.source, known, cutoff=0.3) or known
    raise DataError(f"data.source: must be a known source (nearest: {', '.join(nearest)}), got {config.source!r}")


def open_training(config: DataConfig) -> tuple[Examples, Examples]:
    """Opens the training and the validation split, decodes all of both, and warns of classes that one of them lacks.

    Raises:
      DataError: see `open_split`; also where nothing can be learnt or judged: a split without labelled pixels, training data of one class.
    """
    train, val = open_split(config, config.train_split), open_split(config, config.val_split)
    for examples in (train, val):
        examples.check()
    names = train.info.classes
    trained, judged = (examples.class_pixels() > 0 for examples in (train, val))
    if trained.sum() < 2:
        found = [name for name, there in zip(names, trained, strict=True) if there]
        hint = 'of binary masks of 0 and 255, data.label_values={"0":0,"255":1} tells the classes'
        raise DataError(f"data.train_split: must hold labelled pixels of at least two classes, got {found}; {hint}")
    if not judged.any():
        raise DataError("data.val_split: must hold labelled pixels, got none")
    for split, there, elsewhere, outcome in (
        (config.train_split, trained, judged, "nothing is learnt of them"),
        (config.val_split, judged, trained, "mIoU leaves them out"),
    ):
        lacking = [(name, other) for name, here, other in zip(names, there, elsewhere, strict=True) if not here]
        missing = [name if other else f"{name} (nor elsewhere)" for name, other in lacking]
        if missing:
            complain(f"warning: the {split} split holds no labelled pixel of {', '.join(missing)}: {outcome}")
    return train, val
