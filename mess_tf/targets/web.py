"""A folder for any static web server: a page that runs a bundle in the browser, LiteRT.js, and the bundle.

The page shows mask, exit, confidence and time of a photo or of the camera; nothing leaves the browser. `mess.js`, which it runs, is a
module for other pages too.
"""

import base64
import hashlib
import itertools
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import jinja2

from mess_runtime import bundle as bundles
from mess_runtime.files import replace_folder
from mess_tf.graph import flatbuffer
from mess_tf.targets import check_output, write_segments

PAGES = Path(__file__).parents[1] / "pages"
BUNDLE, LITERTJS, RUNNER = "bundle", "litertjs", "mess.js"
VERSION = "2.5.3"
# Of LiteRT.js: by npm package, its hash as npm writes it, and the files that are taken.
PACKAGES = {
    "core": ("sha512-PlGmbMOq9WitX7FO0jhbdJw9GthatsyuCQXjTt/wJZo0FLaw48q4tz8IwqgqCIkviYGr9OFDL1kCnN4nzWoyJQ==", ["dist/index.js"]),
    "wasm-utils": ("sha512-4fJiw6tBQnIs+0jH/OQ16nYOiSl8/+zZnn5h2ul8aTKHi05sVqZW580Tmk78pC2kT39A9OYBVdFawteZ/sI1kQ==", ["dist/index.js"]),
}
# For browsers with relaxed SIMD, for those without, and for pages that may use threads: a browser loads one of the three.
for kind, suffix in itertools.product(("", "compat_", "threaded_"), ("js", "wasm")):
    PACKAGES["core"][1].append(f"wasm/litert_wasm_{kind}internal.{suffix}")


def write(bundle: bundles.Bundle, output: Path, litertjs: Path | None = None) -> None:
    """Writes the folder; an earlier one is replaced as a whole.

    Args:
      bundle: to run. Features that it hands on in int8, which LiteRT.js does not take, become float32 there, with the same values; of its
        signatures only the segments are kept, since LiteRT.js opens all.
      output: a folder that is new, empty, or was written by this function.
      litertjs: folder with the packages of LiteRT.js as `npm pack` writes them; by default npm fetches them.

    Raises:
      ValueError: the output is something else, a package is missing or another one, or see `write_segments`.
      OSError: npm is needed and not there, or cannot fetch the packages.
    """
    check(output, litertjs)

    def fill(folder: Path) -> None:
        write_bundle(bundle, folder / BUNDLE)
        with tempfile.TemporaryDirectory() as temporary:
            unpack(litertjs or fetch(Path(temporary)), folder / LITERTJS)
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(PAGES), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
        )
        names = {"bundle": BUNDLE, "litertjs": LITERTJS, "runner": RUNNER, "version": VERSION}
        (folder / "index.html").write_text(environment.get_template("web.html").render(names), encoding="utf-8")
        (folder / RUNNER).write_bytes((PAGES / RUNNER).read_bytes())

    replace_folder(output, fill)


def check(output: Path, litertjs: Path | None = None) -> None:
    """Raises what `write` would raise of its arguments."""
    check_output(output, LITERTJS)
    if litertjs:
        for name in PACKAGES:
            _package(litertjs, name)
    elif shutil.which("npm") is None:
        raise OSError(f"--litertjs: must be given where npm cannot fetch {' and '.join(_names())}, got: no such command")


def _names() -> list[str]:
    return [f"@litertjs/{name}@{VERSION}" for name in PACKAGES]


def fetch(folder: Path) -> Path:
    """Lets npm fetch the packages of LiteRT.js into an existing folder, which is returned.

    Raises:
      OSError: npm failed; the message ends with its last line.
    """
    done = subprocess.run(["npm", "pack", "--silent", *_names()], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise OSError(f"--litertjs: must be given where npm cannot fetch {' and '.join(_names())}, got: {said}")
    return folder


def _package(packages: Path, name: str) -> Path:
    """A package in a folder of them, after its hash was compared."""
    path = packages / f"litertjs-{name}-{VERSION}.tgz"
    bundles.check(path.is_file(), "--litertjs", f"a folder with {path.name}, as `npm pack {' '.join(_names())}` writes it", str(packages))
    received = f"sha512-{base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()}"
    bundles.check(received == PACKAGES[name][0], str(path), f"the package with the hash {PACKAGES[name][0]}", received)
    return path


def unpack(packages: Path, folder: Path) -> None:
    """Takes what a page needs out of the packages of LiteRT.js in a folder, into a folder for each."""
    for name, (_, files) in PACKAGES.items():
        with tarfile.open(_package(packages, name)) as archive:
            for file in files:
                target = folder / name / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(f"package/{file}").read())


def write_bundle(bundle: bundles.Bundle, folder: Path) -> None:
    """Writes the segments of a bundle with features that LiteRT.js takes, see `write`, and checks that they do what they did."""
    folder.mkdir()
    write_segments(bundle, folder, flatbuffer.with_float_ends)
