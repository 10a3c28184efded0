"""What a teacher says of the training images, as a file: read in training in place of running the teacher."""

import dataclasses
from pathlib import Path

import numpy as np

from mess_tf.data.examples import Examples
from mess_tf.files import read_arrays, write_arrays


@dataclasses.dataclass(frozen=True, eq=False)
class SoftTargets:
    """What a teacher says of the images of a training split.

    Attributes:
      names: of the images, in the order of the split.
      log_probability: float16 [N, h, w, C], of the whole image at 1 / SOFT_STRIDE of the input size.
    """

    names: tuple[str, ...]
    log_probability: np.ndarray

    @classmethod
    def load(cls, path: str, examples: Examples) -> "SoftTargets":
        """Reads a file of this module.

        Raises:
          FileNotFoundError, ValueError: if there is no such file, or it was made for other images or classes.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"teacher: must be an existing file, as `python -m mess_tf.teacher` makes it, got {path!r}")
        arrays = read_arrays(path)
        targets = cls(tuple(arrays["names"].tolist()), arrays["log_probability"])
        if targets.names != examples.names or targets.log_probability.shape[3] != examples.info.num_classes:
            raise ValueError(
                f"teacher: {path} must hold the {len(examples)} images and {examples.info.num_classes} classes of the training split, "
                f"got {len(targets.names)} images, the first is {targets.names[:1]}, and {targets.log_probability.shape[3]} classes"
            )
        return targets

    def save(self, path: str) -> None:
        """Writes the file atomically."""
        write_arrays(path, names=np.array(self.names), log_probability=self.log_probability)
