"""Where images come from (files, folders, videos, cameras) and where masks go (palette PNGs, overlays)."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mess_runtime.bundle import check
from mess_runtime.files import printable, write_atomically
from mess_runtime.images import SUFFIXES, UnreadableError, check_label_size, files_in, opened, read_photo, upright

VIDEO_SUFFIXES = {".avi", ".mkv", ".mov", ".mp4", ".webm"}
CAMERA = "camera:"
_FRAME_NUMBER = re.compile(r"\.\d{6,}(?=(\.overlay)?\.png$)")

Frames = Iterator[tuple[str, np.ndarray]]


def is_film(source: Path) -> bool:
    """Whether a source gives more than one frame: a video or a camera."""
    return str(source).startswith(CAMERA) or source.suffix.lower() in VIDEO_SUFFIXES


def expand(paths: Sequence[Path], suffixes: set[str]) -> list[Path]:
    """Returns the files, with every folder replaced by its `files_in`, in order and without repetition."""
    files = {}
    for path in paths:
        files |= {os.path.realpath(file): file for file in (files_in(path, suffixes) if path.is_dir() else [path])}
    return list(files.values())


def open_sources(sources: Sequence[str], limit: int | None = None) -> list[tuple[Path, Frames]]:
    """Makes iterators of frames.

    Args:
      sources: image files, video files, folders of images, `camera:NUMBER`.
      limit: largest number of frames of a video or camera.

    Returns:
      For each source (each image of a folder) its path and an iterator over (name of the mask without suffix, uint8 [h, w, 3] RGB),
      which raises UnreadableError.
    """
    opened = []
    for source in sources:
        if source.startswith(CAMERA):
            number = source.removeprefix(CAMERA)
            check(number.isdecimal() and len(number) < 4, "source", f"{CAMERA}NUMBER, the number of a camera from 0 on", source)
            opened.append((Path(source), _video(Path(source), limit)))
            continue
        for path in expand([Path(source)], SUFFIXES):
            opened.append((path, _video(path, limit) if is_film(path) else _image(path)))
    paths = {}
    for path, frames in opened:
        paths.setdefault(os.path.realpath(path), (path, frames))
    return list(paths.values())


def read_label(path: Path, size: tuple[int, int]) -> np.ndarray | None:
    """The label beside an image of a (height, width), if `path` is images/NAME.SUFFIX and there is labels/NAME.png.

    Returns:
      Class indices uint8 [h, w].

    Raises:
      UnreadableError: it is broken, or not as large as the image; both are as viewers show them.
    """
    label = path.parent.parent / "labels" / f"{path.stem}.png"
    if path.parent.name != "images" or not label.exists():
        return None
    with opened(label, ("PNG",)) as image:
        image.load()
        pixels = np.array(upright(image, image))
        if pixels.ndim != 2 or pixels.dtype not in (np.uint8, np.bool_):
            raise UnreadableError(f"{label}: must have one channel of at most 8 bits, or a palette, got mode {image.mode}")
        pixels = pixels.astype(np.uint8)
    check_label_size(label, pixels.shape[:2], path, size)
    return pixels


def _mask_name(source: Path, number: str) -> str:
    """Name of the mask of an image, or of a frame of a video or camera, without suffix."""
    stem = str(source).replace(":", "") if str(source).startswith(CAMERA) else source.stem
    return f"{stem}.{number}" if is_film(source) else stem


def _image(path: Path) -> Frames:
    yield _mask_name(path, ""), read_photo(path)


def _video(path: Path, limit: int | None) -> Frames:
    source = str(path)
    try:
        import cv2
    except ModuleNotFoundError:
        raise ImportError(f"{source}: videos and cameras need OpenCV, install opencv-python-headless") from None
    capture = cv2.VideoCapture(int(source.removeprefix(CAMERA)) if source.startswith(CAMERA) else source)
    try:
        number = 0
        while limit is None or number < limit:
            found, frame = capture.read()
            if not found:
                break
            number += 1
            yield _mask_name(path, f"{number:06d}"), cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if not number:
            raise UnreadableError(f"{printable(str(source))}: not a readable video or camera")
    finally:
        capture.release()


class Writer:
    """Writes masks as palette PNGs, and overlays.

    Attributes:
      written: number of masks.

    Args:
      folder: where to; made with the first mask.
      palette: RGB by class index.
      overlay: also write NAME.overlay.png.
      sources: what is read, none of which may be overwritten.

    Raises:
      ValueError: two files that would be written have the same name (in small letters, as some file systems see them), or one would
        replace a source.
    """

    def __init__(self, folder: Path, palette: Sequence[tuple[int, int, int]], overlay: bool, sources: Sequence[Path]):
        self.written = 0
        self._folder, self._palette, self._overlay = folder, np.array(palette, np.uint8), overlay
        written: dict[str, Path] = {}  # sources by the names they lead to, in small letters, with a \0 for the number of a frame

        def writer_of(name: str) -> Path | None:
            return written.get(name.casefold()) or written.get(_FRAME_NUMBER.sub(".\0", name.casefold()))

        for source in sorted(sources, key=is_film, reverse=True):  # first the videos, whose frames may be called like an image
            for suffix in (".png", ".overlay.png") if overlay else (".png",):
                name = _mask_name(source, "\0") + suffix
                if (other := writer_of(name)) is not None:
                    path = printable(str(folder / name.replace("\0", "NUMBER")))
                    raise ValueError(f"{printable(str(source))}: another image's mask is called {path} already, of {printable(str(other))}")
                written[name.casefold()] = source
        output = os.path.realpath(folder)
        for path in {*sources, *(Path(os.path.realpath(source)) for source in sources)}:
            if writer_of(path.name) is not None and os.path.realpath(path.parent) == output:
                raise ValueError(f"--output: must be a folder where masks do not replace images, got {printable(str(folder))}")

    def write(self, name: str, image: np.ndarray, mask: np.ndarray) -> None:
        """Writes the mask uint8 [h, w] of an image uint8 [h, w, 3]."""
        self._folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(mask)
        picture.putpalette(self._palette.tobytes())
        self._save(f"{name}.png", picture)
        if self._overlay:
            self._save(f"{name}.overlay.png", Image.blend(Image.fromarray(image), Image.fromarray(self._palette[mask]), 0.5))
        self.written += 1

    def _save(self, name: str, picture: Image.Image) -> None:
        write_atomically(self._folder / name, lambda temporary: picture.save(temporary, format="PNG"))
