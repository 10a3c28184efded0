"""Photos as pixels and their fit to a network's input: the one rule of training, calibration, evaluation and the device."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mess_runtime.files import printable
from mess_runtime.terminal import complain, first_few

# What is opened, whatever a file's name says: Pillow would hand others to decoders of doubtful safety, EPS even to Ghostscript.
FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
# Pictures that are not read. That they are left out is said, as of no other file.
OTHER_SUFFIXES = {
    ".avif",
    ".dng",
    ".gif",
    ".heic",
    ".heif",
    ".ico",
    ".jfif",
    ".jp2",
    ".jxl",
    ".pgm",
    ".ppm",
    ".psd",
    ".raw",
    ".svg",
    ".tga",
}
GREY = 128  # around images that do not fill their frame

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE_IS_ZERO, _PHOTOMETRIC, _BITS = 0, 262, 258  # of TIFF

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # at half the size that is an error


class UnreadableError(ValueError):
    """An image or video that cannot be read; others may be."""


def files_in(folder: Path, suffixes: set[str]) -> list[Path]:
    """Lists the files of some suffixes (in small letters) that lie directly in a folder, in the order of their names.

    Hidden files are passed over, as macOS' `._x.jpg`. Where photos are looked for, warnings tell of pictures of other kinds, and of photos
    in folders below.

    Raises:
      ValueError: there is none; tells whether the folders in it hold some.
    """
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in entries if path.suffix.lower() in suffixes and not path.is_dir()]
    others = [path for path in entries if path.suffix.lower() in OTHER_SUFFIXES - suffixes]
    if others and suffixes & SUFFIXES:
        reason = f"left out, the suffix must be one of {', '.join(sorted(suffixes))}"
        complain(first_few([f"{printable(str(path))}: {reason}" for path in others]))
    nested = sorted(_below(folder, suffixes)) if suffixes & SUFFIXES or not files else []
    if not files:
        hint = f"; its folder {printable(str(nested[0].parent))} does, they must lie in the folder itself" if nested else ""
        raise ValueError(f"{printable(str(folder))}: must hold files with the suffix {' or '.join(sorted(suffixes))}, got none{hint}")
    if nested:
        left_out = f"{len(nested)} in the folders below are left out, such as {printable(str(nested[0]))}"
        complain(f"{printable(str(folder))}: files must lie in the folder itself, {left_out}")
    return files


def _below(folder: Path, suffixes: set[str]) -> Iterator[Path]:
    """The files of some suffixes in the folders of a folder, those that links lead to too, without hidden ones, as paths from it."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(root).relative_to(folder)
        if inside.parts:
            yield from (inside / name for name in names if not name.startswith(".") and Path(name).suffix.lower() in suffixes)


@contextlib.contextmanager
def opened(path: str | Path, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """Opens an image file that holds one of some formats. What goes wrong, in the block too, is an UnreadableError that names the file."""
    try:
        with Image.open(path, formats=formats) as image:
            if not all(image.size):
                raise UnreadableError("must have pixels, got none")
            yield image
    except UnidentifiedImageError as error:
        raise UnreadableError(f"{printable(str(path))}: not a readable image: does not hold {' or '.join(formats)}") from error
    except Image.DecompressionBombError as error:
        limit = f"must have at most {2 * Image.MAX_IMAGE_PIXELS} pixels, cut it into tiles"
        raise UnreadableError(f"{printable(str(path))}: not a readable image: {limit}") from error
    except Exception as error:  # what Pillow's decoders make of broken files has no common type
        raise UnreadableError(f"{printable(str(path))}: not a readable image: {printable(str(error)) or type(error).__name__}") from error


def read_photo(path: str | Path) -> np.ndarray:
    """Reads a photo as viewers show it: uint8 [h, w, 3] RGB, upright by its EXIF orientation.

    Transparency is left out. Of more than 8 bits the upper 8 count, of several pictures the first.

    Raises:
      UnreadableError: the file is broken, too large, of another format, or its values have no known range (floats, 32 bits).
    """
    with opened(path) as image:
        image.load()
        return np.array(upright(image, _rgb(image)))


def upright(image: Image.Image, pixels: Image.Image) -> Image.Image:
    """The pixels of a loaded image as viewers show them. Before it is loaded, PNG may not know its orientation; TIFF then turns itself."""
    turn = _UPRIGHT.get(_orientation(image))
    return pixels if turn is None else pixels.transpose(turn)


def photo_header(path: str | Path) -> tuple[tuple[int, int], int]:
    """Returns (height, width) of a photo as viewers show it, and its EXIF orientation (1 to 8), from its header.

    Raises:
      UnreadableError: see `read_photo`.
    """
    with opened(path) as image:
        width, height = image.size
        orientation = _orientation(image, Image.Image.getexif)
        turned = image.format != "TIFF" and orientation >= 5  # TIFF tells the upright size itself
        return (width, height) if turned else (height, width), orientation


def check_label_size(label: object, size: tuple[int, int], path: str | Path, photo_size: tuple[int, int]) -> None:
    """Raises UnreadableError unless a label, called so and of (height, width), is as large as the photo of this path as viewers show it."""
    if tuple(size) == tuple(photo_size):
        return
    hint, (_, orientation) = "", photo_header(path)
    if orientation >= 5 and tuple(size) == tuple(reversed(photo_size)):
        hint = f"; viewers turn the photo (EXIF orientation {orientation}), the label is of it as it is stored: turn one like the other"
    required = f"must be as large as its image, {photo_size[0]}x{photo_size[1]}"
    raise UnreadableError(f"{printable(str(label))}: {required}, got {size[0]}x{size[1]}{hint}")


def _orientation(image: Image.Image, getexif=lambda image: image.getexif()) -> int:
    """1 to 8. `Image.Image.getexif` is one that decodes no pixels."""
    try:
        value = getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # viewers show a photo with broken EXIF data as it is stored
        return 1
    return value if value in _UPRIGHT else 1


def _rgb(image: Image.Image) -> Image.Image:
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")  # the latter in Pillow before 11
    if sixteen:
        tags = getattr(image, "tag_v2", {})
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            raise UnreadableError("must not count from white to black in 16 bits")
        shift = tags.get(_BITS, (16,))[0] - 8
        image = Image.fromarray((np.asarray(image) >> shift).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnreadableError(f"must have 8 or 16 bits per channel, got {'floats' if image.mode == 'F' else '32 bits'}")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def placed(size: tuple[int, int], input_size: tuple[int, int], resize: str) -> tuple[slice, slice]:
    """Rows and columns of a network's input (height, width) that an image of (height, width) takes, by one of `bundle.RESIZES`."""
    (height, width), (rows, columns) = size, input_size
    if resize == "letterbox":  # whole numbers, rounded half up, so that every language gets the same
        if rows * width <= columns * height:
            columns = min(columns, max(1, (2 * width * rows + height) // (2 * height)))
        else:
            rows = min(rows, max(1, (2 * height * columns + width) // (2 * width)))
    top, left = (input_size[0] - rows) // 2, (input_size[1] - columns) // 2
    return slice(top, top + rows), slice(left, left + columns)


def fit(image: np.ndarray, input_size: tuple[int, int], resize: str) -> np.ndarray:
    """An image uint8 [H, W, 3] at a network's input size, uint8 [h, w, 3], grey where it does not fill it.

    Reductions are antialiased: a new pixel is the mean of the old ones around its centre, their weights falling linearly to 0 at a distance
    of max(1, reduction), across the width first, then across the height, each rounded to whole values (Pillow's BILINEAR; weights in units
    of 2**-22). `tflite/examples` has the same in other languages, `mess_tf/pages/mess.js` in JavaScript.
    """
    if image.shape[:2] == tuple(input_size):
        return image
    rows, columns = placed(image.shape[:2], input_size, resize)
    pixels = np.full((*input_size, 3), GREY, np.uint8)
    width, height = columns.stop - columns.start, rows.stop - rows.start
    # One axis at a time: which of both Pillow takes first depends on its version and the sizes.
    for size in ((width, image.shape[0]), (width, height)):
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    pixels[rows, columns] = image
    return pixels


def mask_at(mask: np.ndarray, size: tuple[int, int], resize: str) -> np.ndarray:
    """Masks [..., h, w] of a network at the (height, width) of the image that was fitted to it: of each pixel the class at its centre."""
    if mask.shape[-2:] == tuple(size):
        return mask
    rows, columns = placed(size, mask.shape[-2:], resize)
    mask = mask[..., rows, columns]
    rows, columns = (nearest(old, new, np.arange(new)) for old, new in zip(mask.shape[-2:], size, strict=True))
    return mask.take(columns, axis=-1).take(rows, axis=-2)


def nearest(old, new, position):
    """The pixel of `old` in a row that the centre of pixel `position` of `new` falls into, in whole numbers."""
    return (2 * position + 1) * old // (2 * new)
