"""Where images come from (files, folders, videos, cameras) and where masks go (palette PNGs, overlays)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mess_runtime.bundle import check
from mess_runtime.files import write_atomically

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
VIDEO_SUFFIXES = {".avi", ".mkv", ".mov", ".mp4", ".webm"}
CAMERA = "camera:"

Frames = Iterator[tuple[str, np.ndarray]]


class UnreadableError(ValueError):
    """An image or video that cannot be read; others may be."""


def is_film(source: Path) -> bool:
    """Whether a source gives more than one frame: a video or a camera."""
    return str(source).startswith(CAMERA) or source.suffix.lower() in VIDEO_SUFFIXES


def expand(paths: Sequence[Path], suffixes: set[str]) -> list[Path]:
    """Returns the files, with every folder replaced by its files of these suffixes, in order and without repetition."""
    files = {}
    for path in paths:
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path}: must hold files with the suffix {' or '.join(sorted(suffixes))}, got none")
        files |= {file.resolve(): file for file in found}
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
            opened.append((Path(source), _video(source, source.replace(":", ""), limit)))
            continue
        for path in expand([Path(source)], IMAGE_SUFFIXES):
            opened.append((path, _video(str(path), path.stem, limit) if is_film(path) else _image(path)))
    paths = {}
    for path, frames in opened:
        paths.setdefault(path.resolve(), (path, frames))
    return list(paths.values())


def _image(path: Path) -> Frames:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableError(f"{path}: not a readable image: {error}") from error
    yield path.stem, pixels


def _video(source: str, stem: str, limit: int | None) -> Frames:
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
            yield f"{stem}.{number:06d}", cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if not number:
            raise UnreadableError(f"{source}: not a readable video or camera")
    finally:
        capture.release()


class Writer:
    """Writes masks as palette PNGs, and overlays.

    Args:
      folder: where to.
      palette: RGB by class index.
      overlay: also write NAME.overlay.png.
      sources: what is read, none of which may be overwritten.

    Raises:
      ValueError: two images have the same name, or a mask would replace an image.
    """

    def __init__(self, folder: Path, palette: Sequence[tuple[int, int, int]], overlay: bool, sources: Sequence[Path]):
        self._folder, self._palette, self._overlay = folder, np.array(palette, np.uint8), overlay
        names: dict[str, Path] = {}
        for source in sources:
            if source.stem in names:
                raise ValueError(f"{source}: another image's mask is called {folder / source.stem}.png already")
            names[source.stem] = source
        written = {(folder / f"{stem}{suffix}").resolve() for stem in names for suffix in (".png", ".overlay.png")}
        if written & {source.resolve() for source in sources}:
            raise ValueError(f"--output: must be a folder where masks do not replace images, got {folder}")
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, image: np.ndarray, mask: np.ndarray) -> None:
        """Writes the mask uint8 [h, w] of an image uint8 [h, w, 3]."""
        picture = Image.fromarray(mask)
        picture.putpalette(self._palette.tobytes())
        self._save(f"{name}.png", picture)
        if self._overlay:
            self._save(f"{name}.overlay.png", Image.blend(Image.fromarray(image), Image.fromarray(self._palette[mask]), 0.5))

    def _save(self, name: str, picture: Image.Image) -> None:
        write_atomically(self._folder / name, lambda temporary: picture.save(temporary, format="PNG"))
