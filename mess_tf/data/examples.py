"""The images and labels of one split, by random access.

Inside the project a label is uint8 [H, W] with classes 0..C-1 and `configs.IGNORE` (255) for pixels without a class, whatever the
files hold.
"""

import colorsys
import concurrent.futures
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mess_runtime.terminal import Bar, first_few

CACHE_BYTES = 2**30


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
        content: Callable[[int], Iterable[bytes]] | None = None,
    ):
        self.info = info
        self.names = tuple(names)
        self.hard = hard
        self._read = read
        self._class_pixels = class_pixels
        self._content = content or self.load  # what an image and its label are made from
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

    def check(self) -> None:
        """Decodes every image once, so that what is broken is known before work starts.

        Raises:
          DataError: see `load`; lists the first few problems.
        """

        def problem(index: int) -> str | None:
            try:
                self.load(index)
            except DataError as error:
                return str(error)

        problems = []
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, Bar("decoding", len(self), "image") as bar:
            for found in pool.map(problem, range(len(self))):
                problems += [found] if found else []
                bar.advance()
        if problems:
            raise DataError(first_few(problems))

    def digest(self, index: int) -> str:
        """The first 16 digits of the SHA-256 of an image's and its label's content, as it is in the files."""
        sha256 = hashlib.sha256()
        for part in self._content(index):
            sha256.update(hashlib.sha256(part).digest())
        return sha256.hexdigest()[:16]

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """Name of every image to its `digest`."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(self.names, pool.map(self.digest, range(len(self))), strict=True))

    def class_pixels(self) -> np.ndarray:
        """Returns the number of labelled pixels per class over the split, int64 [C]; counted once."""
        if self._class_pixels is None:
            counts = np.zeros(256, np.int64)
            for index in range(len(self)):
                counts += np.bincount(self.load(index)[1].ravel(), minlength=256)
            self._class_pixels = counts[: self.info.num_classes]
        return self._class_pixels


def palette(num_classes: int) -> np.ndarray:
    """Returns a fixed colour per class, uint8 [C, 3] RGB: hues far apart, alternating in brightness; the first C never change."""
    hues = (0.58 + 0.618034 * np.arange(num_classes)) % 1
    tones = ((0.65, 0.95), (0.9, 0.6), (0.4, 0.8))  # saturation, brightness
    colours = [colorsys.hsv_to_rgb(hue, *tones[index % 3]) for index, hue in enumerate(hues)]
    return np.rint(255 * np.array(colours)).astype(np.uint8)
