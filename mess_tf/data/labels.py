"""What label files hold: values or colours to classes."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mess_runtime.files import printable
from mess_runtime.images import opened, upright
from mess_tf.configs import IGNORE, parse_label_values
from mess_tf.data.examples import DataError

INVALID = -1  # in a label table: a stored value that must not occur
_GREY, _PALETTE = 0, 3  # colour types of PNG
_SHOWN_VALUES = 10


class LabelReader:
    """Reads label files as `data.label_values`, or those of a published data set, and `data.ignore_value` say.

    Raises:
      DataError: these two do not fit the classes.
    """

    def __init__(self, label_values: str | Mapping[str, int], ignore_value: int, num_classes: int):
        values = parse_label_values(label_values) or {value: value for value in range(num_classes)}
        classes = sorted({value for value in values.values() if value != IGNORE})
        if classes and classes[-1] >= num_classes:
            raise DataError(f"data.label_values: must lead to the {num_classes} classes of the data or {IGNORE}, got {classes[-1]}")
        if not label_values and not num_classes <= ignore_value <= 255:
            raise DataError(f"data.ignore_value: must be above the {num_classes} classes and at most 255, got {ignore_value}")
        if not 0 <= ignore_value < 2**16:
            raise DataError(f"data.ignore_value: must be a value of a label, 0 to {2**16 - 1}, got {ignore_value}")
        self._in_colours = isinstance(next(iter(values)), tuple)
        if self._in_colours:
            values = {int.from_bytes(bytes(colour)): value for colour, value in values.items()}
        else:
            values = {ignore_value: IGNORE} | values
        self._table = np.full(2**24 if self._in_colours else 2**16, INVALID, np.int16)
        self._table[list(values)] = list(values.values())

    def read(self, path: Path) -> np.ndarray:
        """Returns the label as viewers show it, uint8 [H, W] of classes and IGNORE.

        Raises:
          UnreadableError: the file is no PNG, or broken.
          DataError: it has several values per pixel, or one that has no class.
        """
        with opened(path, ("PNG",)) as image, open(path, "rb") as file:
            bits, colour_type = file.read(26)[24:]
            frames = getattr(image, "n_frames", 1)
            mode = image.mode
            image.load()
            if self._in_colours:
                pixels = np.array(upright(image, image.convert("RGBA")), np.int32)  # RGBA, since Pillow warns of palettes otherwise
                stored = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
            else:
                stored = np.array(upright(image, image)).astype(np.uint16)
        name = printable(str(path))
        if frames > 1:
            raise DataError(f"{name}: must hold one picture, got {frames}")
        if self._in_colours:
            if bits > 8:
                raise DataError(f"{name}: must have at most 8 bits per channel, got {bits}")
        elif colour_type not in (_GREY, _PALETTE):
            raise DataError(
                f"{name}: must be a single-channel or palette image unless data.label_values tells what colours mean, got mode {mode}"
            )
        elif colour_type == _GREY and 1 < bits < 8:
            stored //= 255 // (2**bits - 1)  # Pillow stretches them over the bytes
        shown = (lambda value: f"#{value:06X}") if self._in_colours else int
        return apply_table(stored, self._table, name, shown)


def apply_table(raw: np.ndarray, table: np.ndarray, name: object, shown: Callable[[int], object] = int) -> np.ndarray:
    """Turns stored label values into classes and IGNORE; `table` is int16 with `INVALID` where a value must not occur."""
    label = table[raw]
    wrong = label == INVALID
    if wrong.any():
        found = [shown(value) for value in np.unique(raw[wrong])[:_SHOWN_VALUES]]
        raise DataError(f"{name}: label values must be classes or the ignored value, got {found}; data.label_values tells what they mean")
    return label.astype(np.uint8)
