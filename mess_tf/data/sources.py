"""Opens a split of the configured source."""

import difflib

from mess_tf.configs import DataConfig
from mess_tf.data.examples import DataError, Examples
from mess_tf.data.files import open_folder, open_voc
from mess_tf.data.synthetic import open_synthetic
from mess_tf.data.tfds import TFDS, open_tfds


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
        return open_synthetic(config, split)
    if config.source == "folder":
        return open_folder(config, split)
    if config.source == "voc":
        return open_voc(config, split)
    if source == "tfds":
        return open_tfds(config, name, split)
    known = ["synthetic", "folder", "voc", *(f"tfds:{name}" for name in TFDS)]
    nearest = difflib.get_close_matches(config.source, known, cutoff=0.3) or known
    raise DataError(f"data.source: must be a known source (nearest: {', '.join(nearest)}), got {config.source!r}")
