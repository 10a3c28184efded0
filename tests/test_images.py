"""What a photo is read as, and how it is fitted to a network: the pixels of training and of the device."""

import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features
from pngs import png

from mess_runtime import images
from mess_runtime.frames import open_sources
from mess_runtime.images import UnreadableError, files_in, fit, mask_at, photo_header, placed, read_photo

# By EXIF orientation, what a viewer makes of the stored pixels.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


@pytest.fixture
def photo():
    """Smooth, so that JPEG keeps it, and without symmetry: uint8 [40, 64, 3]."""
    rows, columns = np.mgrid[0:40, 0:64]
    return np.stack([rows * 5, columns * 3, (rows + columns) * 2], axis=-1).astype(np.uint8)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


# --- orientation


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("suffix", "options"), [("jpg", {"quality": 95, "subsampling": 0}), ("png", {}), ("webp", {"lossless": True})])
def test_photos_are_upright(tmp_path, photo, orientation, suffix, options):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(photo).save(path, exif=exif(orientation), **options)
    expected = UPRIGHT[orientation](photo)
    assert photo_header(path) == (expected.shape[:2], orientation)
    ((_, frames),) = open_sources([str(path)])
    for read in (read_photo(path), next(frames)[1]):
        assert read.shape == expected.shape
        assert np.abs(read.astype(int) - expected).max() <= (6 if suffix == "jpg" else 0)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("compression", ["raw", "tiff_deflate"])
def test_tiff_is_upright(tmp_path, photo, orientation, compression):
    Image.fromarray(photo).save(tmp_path / "x.tif", compression=compression, tiffinfo={0x0112: orientation})
    expected = UPRIGHT[orientation](photo)
    np.testing.assert_array_equal(read_photo(tmp_path / "x.tif"), expected)
    assert photo_header(tmp_path / "x.tif") == (expected.shape[:2], orientation)


def test_orientation_behind_the_pixels_of_a_png(tmp_path, photo):
    png(tmp_path / "x.png", 8, 2, photo.reshape(40, -1), (b"eXIf", exif(6).tobytes()[6:]))
    np.testing.assert_array_equal(read_photo(tmp_path / "x.png"), UPRIGHT[6](photo))


@pytest.mark.parametrize("content", [b"Exif\0\0no tags", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(9).tobytes(), exif(0).tobytes()])
def test_broken_orientation_is_none(tmp_path, photo, content):
    Image.fromarray(photo).save(tmp_path / "x.jpg", exif=content, quality=95, subsampling=0)
    assert photo_header(tmp_path / "x.jpg") == ((40, 64), 1)
    assert np.abs(read_photo(tmp_path / "x.jpg").astype(int) - photo).max() <= 6


# --- modes


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_its_upper_byte(tmp_path, suffix):
    values = np.linspace(0, 65535, 40 * 64).astype(np.uint16).reshape(40, 64)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    read = read_photo(tmp_path / f"x.{suffix}")
    assert (read.dtype, read.shape) == (np.uint8, (40, 64, 3))
    np.testing.assert_array_equal(read, np.repeat((values // 256)[..., None], 3, axis=2))


def test_sixteen_bit_colour_and_big_endian_grey_are_their_upper_bytes(tmp_path, photo):
    wide = (photo.astype(int) * 256 + 255).astype(">u2")
    png(tmp_path / "x.png", 16, 2, wide.reshape(40, -1).view(np.uint8))
    np.testing.assert_array_equal(read_photo(tmp_path / "x.png"), photo)
    Image.frombytes("I;16B", (64, 40), np.ascontiguousarray(wide[..., 0]).tobytes()).save(tmp_path / "x.tif")
    np.testing.assert_array_equal(read_photo(tmp_path / "x.tif")[..., 1], photo[..., 0])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_of_grey_fill_the_range(tmp_path, bits):
    packed = np.arange(40 * 8, dtype=np.uint8).reshape(40, 8)
    png(tmp_path / "x.png", bits, 0, packed)
    values = np.unpackbits(packed, axis=1).reshape(40, -1, bits) @ (1 << np.arange(bits)[::-1])
    np.testing.assert_array_equal(read_photo(tmp_path / "x.png")[..., 0], values * 255 // (2**bits - 1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "RGB+transparency", "P+transparency"])
def test_every_mode_becomes_rgb_without_its_transparency(tmp_path, photo, mode, recwarn):
    mode, _, transparency = mode.partition("+")
    picture = Image.fromarray(photo).convert(mode)
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(photo[..., 0]))
    path, options = (tmp_path / "x.tif", {}) if mode == "CMYK" else (tmp_path / "x.png", {})
    if transparency:
        options = {"transparency": bytes(range(256)) if mode == "P" else (0, 0, 0)}
    picture.save(path, **options)
    np.testing.assert_array_equal(read_photo(path), np.asarray(picture.convert("RGB")))
    assert not recwarn


def test_cmyk_and_progressive_jpeg(tmp_path, photo):
    Image.fromarray(photo).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    Image.fromarray(photo).save(tmp_path / "progressive.jpg", quality=95, progressive=True)
    for name in ("cmyk", "progressive"):
        assert np.abs(read_photo(tmp_path / f"{name}.jpg").astype(int) - photo).mean() < 3


def test_of_several_pictures_the_first_counts(tmp_path, photo):
    frames = [Image.fromarray(photo), Image.fromarray(255 - photo)]
    for suffix, options in (("png", {}), ("webp", {"lossless": True}), ("tif", {})):
        frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(read_photo(tmp_path / f"x.{suffix}"), photo)


@pytest.mark.parametrize(("array", "message"), [(np.float32, "got floats"), (np.int32, "got 32 bits")])
def test_values_of_no_known_range_are_refused(tmp_path, array, message):
    Image.fromarray(np.ones((4, 5), array)).save(tmp_path / "x.tif")
    with pytest.raises(UnreadableError, match=rf"x\.tif: not a readable image: must have 8 or 16 bits per channel, {message}"):
        read_photo(tmp_path / "x.tif")


# --- refusals


def empty(path):
    path.write_bytes(b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 0, 0, 1, 24, 0, 0, 0, 0, 0, 0))


def large(path):
    png(path, 1, 0, np.zeros((1, 2500), np.uint8))
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 20000, 20000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def long_text(path):
    text = PngImagePlugin.PngInfo()
    text.add_text("project", "y" * 70_000_000, zip=True)
    Image.new("L", (4, 4)).save(path, pnginfo=text)


def other_content(kind):
    return lambda path: Image.new("RGB", (16, 16)).save(path, kind)


def truncated(path):
    Image.effect_noise((64, 64), 50).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:800])


def eps(path):
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")


@pytest.mark.parametrize(
    "write",
    [
        empty,
        large,
        long_text,
        *(other_content(kind) for kind in ("GIF", "ICO", "DDS", "PPM", *(["AVIF"] if features.check("avif") else []))),
        truncated,
        eps,
        lambda path: path.write_bytes(b""),
        lambda path: path.symlink_to(path),
        lambda path: path.mkdir(),
        lambda path: None,
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, write, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *words, **_: pytest.fail(f"starts {words}"))  # Ghostscript
    write(tmp_path / "x.png")
    with pytest.raises(UnreadableError, match=r"x\.png: not a readable image: "):
        read_photo(tmp_path / "x.png")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("broken"), NotImplementedError("no"), KeyError(3), RecursionError("deep")])
def test_whatever_pillow_raises_names_the_file(tmp_path, photo, monkeypatch, error):
    Image.fromarray(photo).save(tmp_path / "x.png")

    def fail(_):
        raise error

    monkeypatch.setattr(images, "_rgb", fail)
    with pytest.raises(UnreadableError, match=rf"x\.png: not a readable image: ({type(error).__name__}|broken|no|3|deep)"):
        read_photo(tmp_path / "x.png")


# --- folders


def test_a_folder_lists_its_photos_and_says_what_it_leaves_out(tmp_path, photo, capsys):
    for name in ("b.JPG", "a.tif", "._b.JPG", ".hidden/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(photo).save(tmp_path / name)
    for name in ("Thumbs.db", ".DS_Store", "notes.txt"):
        (tmp_path / name).write_text("")
    assert [path.name for path in files_in(tmp_path, images.SUFFIXES)] == ["a.tif", "b.JPG"]
    assert capsys.readouterr().err == ""
    for name in ("c.heic", "d.gif"):
        (tmp_path / name).write_text("")
    files_in(tmp_path, images.SUFFIXES)
    assert re.search(r"c\.heic: left out, the suffix must be one of \.bmp, .*; likewise .*, 2 in all$", capsys.readouterr().err.strip())


@pytest.mark.parametrize("read", [lambda folder: files_in(folder, images.SUFFIXES), lambda folder: open_sources([str(folder)])])
def test_photos_in_folders_beside_photos_are_said_to_be_left_out(tmp_path, photo, capsys, read):
    for name in ("a.png", "sub/b.png", "sub/deep/c.JPG", "sub/._b.png", "sub/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(photo).save(tmp_path / name, "PNG")
    assert len(read(tmp_path)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{tmp_path}: files must lie in the folder itself, 2 in the folders below are left out, such as sub/b.png"


def test_photos_in_linked_folders_are_said_to_be_left_out(tmp_path, photo, capsys):
    for name in ("here/a.png", "there/b.png"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(photo).save(tmp_path / name)
    (tmp_path / "here/link").symlink_to(tmp_path / "there", target_is_directory=True)
    (tmp_path / "there/back").symlink_to(tmp_path / "here", target_is_directory=True)
    assert len(files_in(tmp_path / "here", images.SUFFIXES)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(": files must lie in the folder itself, 1 in the folders below are left out, such as link/b.png")


def test_a_folder_of_folders_is_explained(tmp_path, photo):
    (tmp_path / "aachen").mkdir()
    Image.fromarray(photo).save(tmp_path / "aachen" / "x.png")
    with pytest.raises(ValueError, match=r"must hold files with the suffix .*; its folder aachen does, they must lie in the folder itself"):
        files_in(tmp_path, images.SUFFIXES)


# --- the fit to a network


def resized(values, size):
    """Along the first axis, by the words of `fit`: triangle weights in units of 2**-22, rounded to whole values."""
    old = len(values)
    reach = max(1.0, old / size)
    made = []
    for position in range(size):
        centre = (position + 0.5) * (old / size)
        first, stop = max(0, int(centre - reach + 0.5)), min(old, int(centre + reach + 0.5))
        weights = np.maximum(0, 1 - np.abs(np.arange(first, stop) + 0.5 - centre) / reach)
        weights = np.floor(weights / weights.sum() * 2**22 + 0.5).astype(np.int64)
        made.append((np.tensordot(weights, values[first:stop].astype(np.int64), 1) + 2**21) >> 22)
    return np.clip(made, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(96, 192), (300, 100), (17, 200), (331, 447), (20, 20)])
def test_fit_is_the_resize_that_its_words_define(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    across = resized(image.swapaxes(0, 1), 64).swapaxes(0, 1)
    np.testing.assert_array_equal(fit(image, (32, 64), "stretch"), resized(across, 32))


def test_a_reduction_is_antialiased():
    stripes = np.tile(np.array([0, 255], np.uint8), (160, 160))[..., None].repeat(3, 2)
    assert np.abs(fit(stripes, (32, 64), "stretch").astype(int) - 127.5).max() < 27  # without antialiasing: 0 and 255


@pytest.mark.parametrize(
    ("size", "inside"),
    [
        ((96, 96), (0, 32, 16, 48)),
        ((20, 300), (14, 18, 0, 64)),
        ((300, 20), (0, 32, 31, 33)),
        ((2000, 1), (0, 32, 31, 32)),
        ((64, 128), (0, 32, 0, 64)),
    ],
)
def test_a_letterboxed_image_lies_in_the_middle_and_its_mask_comes_back(size, inside):
    top, bottom, left, right = inside
    rows, columns = placed(size, (32, 64), "letterbox")
    assert (rows, columns) == (slice(top, bottom), slice(left, right))
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    boxed = fit(image, (32, 64), "letterbox")
    np.testing.assert_array_equal(boxed[rows, columns], fit(image, (bottom - top, right - left), "stretch"))
    boxed[rows, columns] = images.GREY
    assert (boxed == images.GREY).all()
    mask = np.zeros((32, 64), np.uint8)
    mask[rows, columns] = 1
    assert mask_at(mask, size, "letterbox").shape == size
    assert (mask_at(mask, size, "letterbox") == 1).all()


@pytest.fixture(scope="session")
def cpp_fit(tmp_path_factory):
    """tflite/examples/cpp/mess_fit, built."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("cpp") / "mess_fit"
    source = Path(__file__).parents[1] / "tflite" / "examples" / "cpp" / "mess_fit.cc"
    subprocess.run(["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", str(source), "-o", str(path)], check=True)
    return path


@pytest.mark.parametrize("size", [(32, 64), (331, 447), (20, 300), (300, 20), (17, 200), (64, 64)])
def test_cpp_fits_images_with_the_same_bits(cpp_fit, tmp_path, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.ppm")
    for resize in ("stretch", "letterbox"):
        for dtype in ("uint8", "float32"):
            words = [cpp_fit, tmp_path / "photo.ppm", 32, 64, resize, dtype, tmp_path / "image.rgb"]
            subprocess.run([str(word) for word in words], check=True)
            made = np.fromfile(tmp_path / "image.rgb", dtype).reshape(32, 64, 3)
            np.testing.assert_array_equal(made, fit(image, (32, 64), resize))


def test_cpp_fit_names_what_is_wrong(cpp_fit, tmp_path):
    (tmp_path / "short.ppm").write_bytes(b"P6\n4 4\n255\nabc")
    (tmp_path / "no.ppm").write_bytes(b"P5\n4 4\n255\nabc")
    for words, message in (
        (["short.ppm", "4", "4", "stretch", "uint8", "o"], "short.ppm: ends before its last pixel"),
        (["no.ppm", "4", "4", "stretch", "uint8", "o"], "no.ppm: must be a binary PPM"),
        (["short.ppm", "4", "4", "crop", "uint8", "o"], "the fit must be stretch or letterbox, got crop"),
    ):
        done = subprocess.run([str(cpp_fit), *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1 and message in done.stderr
