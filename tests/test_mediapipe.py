"""The target `mediapipe`: MediaPipe's ImageSegmenter, in Python and in a browser, gives exits, scores and masks of our runner."""

import base64
import dataclasses
import io
import json
import math
import shutil
import subprocess
from pathlib import Path

import browsers
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from PIL import ExifTags, Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from small_network import small_network

from mess_runtime.bundle import IMAGE, RESIZES, SIGNATURE, Bundle, write_manifest
from mess_runtime.images import fit, read_photo
from mess_runtime.runner import Runner, needed_pixels
from mess_tf.configs import DataConfig, HeadSpec
from mess_tf.data.sources import open_split
from mess_tf.files import Configuration, ExitChoice
from mess_tf.graph import policy
from mess_tf.graph.exporter import Exporter
from mess_tf.network.model import convert
from mess_tf.targets import mediapipe

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "tflite/examples/mediapipe"
PYTHON = ROOT / ".venv-runtimes/mediapipe/bin/python"
MODULES = ROOT / ".venv-runtimes/tasks-vision/node_modules"
CAMVID = ROOT.parent / "shared/data/camvid/val/images"
BUNDLES = {
    "fp16": ROOT / "models/camvid_mobilenet_v2/fp16/equal_latency.input-dependent",
    "int8": ROOT / "models/camvid_lite0/int8/minus_1pp.input-dependent",
}
SIZE = (360, 480)
SECONDS = 120  # a slow machine's
needs_mediapipe = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"needs {PYTHON}, an environment with nothing but mediapipe, which .ci/run makes"
)
needs_tasks_vision = pytest.mark.skipif(
    not MODULES.exists(), reason=f"needs {MODULES} with the npm package @mediapipe/tasks-vision, which .ci/run fetches"
)
# Runs the example on each list of arguments from standard input, in this process, and says how each ends: a text is one line and code 1.
ENDS = """
import json, runpy, sys
program, ends = sys.argv[1], []
for sys.argv in json.load(sys.stdin):
    try:
        runpy.run_path(program, run_name="__main__")
        ends.append(0)
    except SystemExit as end:
        ends.append(end.code)
print(json.dumps(ends))
"""
# What the example makes of photos for each input.
FITS = """
import json, runpy, sys, types
import numpy, PIL.Image
fit = runpy.run_path(sys.argv[1])["EarlyExit"].fit
for number, (path, given) in enumerate(json.load(sys.stdin)):
    numpy.save(f"{number}.npy", fit(types.SimpleNamespace(input=given), PIL.Image.open(path)))
"""
# Runs the example, then writes down the names of the classes and, of the last photo, what MediaPipe makes of the first exit's logits.
CODE = """
import json, runpy, sys
import mediapipe, numpy
made = runpy.run_path(sys.argv.pop(1), run_name="__main__")
(first, *_), segmenter = made["early_exit"].segmenters, made["image_segmenter"].ImageSegmenter
probabilities = segmenter.create_from_model_path(f"{sys.argv[1]}/exit1.tflite").segment(mediapipe.Image.create_from_file(sys.argv[-1]))
numpy.save("probabilities.npy", [numpy.squeeze(each.numpy_view()) for each in probabilities.confidence_masks])
print(json.dumps(first.labels))
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Files of drawn scenes and, where there are some, of photos, at the networks' size."""
    folder = tmp_path_factory.mktemp("photos")
    examples = open_split(DataConfig(input_size=SIZE, synthetic_train=2, synthetic_val=3), "val")
    images = [examples.load(i)[0] for i in range(len(examples))]
    images += [fit(read_photo(path), SIZE, "stretch") for path in sorted(CAMVID.glob("*.jpg"))[::60]]
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module", params=["fp16", pytest.param("int8", marks=pytest.mark.full)])
def bundle(request, photos, tmp_path_factory):
    """A bundle at whose first exit about half of these photos leave, one of them with just as many confident pixels as are needed."""
    shipped = Bundle.load(BUNDLES[request.param])
    folder = shutil.copytree(shipped.folder, tmp_path_factory.mktemp("bundle") / "bundle")
    runner = Runner(shipped)
    confidences = sorted(next(runner.refine(read_photo(path))).trace[0].confidence for path in photos)
    first, *others = shipped.manifest.segments
    first = dataclasses.replace(first, theta_img=confidences[len(confidences) // 2])
    write_manifest(folder, dataclasses.replace(shipped.manifest, segments=(first, *others)))
    return Bundle.load(folder)


@pytest.fixture(scope="module")
def written(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "mediapipe"
    mediapipe.write(bundle, folder)
    return folder


def expected(bundle, photos):
    """By photo: exit, its confidence (1 at the last, which has none), mask."""
    runner = Runner(bundle)
    results = [runner.run(read_photo(path)) for path in photos]
    return [(each.exit, 1.0 if each.trace[-1].confidence is None else each.trace[-1].confidence, each.mask) for each in results]


def check_mask(mask, expected, file, photo):
    """Fails if masks differ but where the two largest logits of the file are all but equal."""
    if not np.array_equal(mask, expected):
        run = Interpreter(str(file)).get_signature_runner(SIGNATURE)
        best = np.sort(run(**{IMAGE: read_photo(photo)[None]})[mediapipe.LOGITS][0], -1)
        assert (best[..., -1] - best[..., -2])[mask != expected].max() <= 1e-4 * np.abs(best).max()


@needs_mediapipe
def test_the_example_gives_exits_scores_and_masks_of_the_runner(bundle, written, photos, tmp_path):
    words = [str(word) for word in (PYTHON, "-c", CODE, EXAMPLES / "segment.py", written, *photos)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *lines, labels = done.stdout.splitlines()
    results = expected(bundle, photos)
    assert {name for name, _, _ in results} == set(bundle.manifest.exits)
    for line, path, (name, confidence, mask) in zip(lines, photos, results, strict=True):
        assert line.split()[:2] == [str(path), name]
        assert float(line.split()[2]) == pytest.approx(confidence, abs=1e-6)
        with Image.open(tmp_path / f"{path.stem}.mask.png") as picture:
            check_mask(np.asarray(picture), mask, written / f"{name}.tflite", path)
            assert picture.getpalette()[: 3 * len(bundle.manifest.classes)] == np.ravel(bundle.manifest.palette).tolist()
    assert json.loads(labels) == list(bundle.manifest.classes)
    run = Interpreter(str(written / "exit1.tflite")).get_signature_runner(SIGNATURE)
    logits = run(**{IMAGE: read_photo(photos[-1])[None]})[mediapipe.LOGITS][0].astype(float)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(np.load(tmp_path / "probabilities.npy").transpose(1, 2, 0), softmax, atol=1e-5)


@pytest.mark.parametrize("bundle", ["fp16"], indirect=True)
@needs_tasks_vision
def test_the_page_gives_exits_scores_and_masks_of_the_runner(bundle, written, photos, tmp_path):
    for name, target in {"index.html": EXAMPLES / "index.html", "node_modules": MODULES, "mediapipe": written}.items():
        (tmp_path / name).symlink_to(target)
    classes = {tuple(colour): number for number, colour in enumerate(bundle.manifest.palette)}
    browser = browsers.start()
    with browsers.served(tmp_path) as address:
        try:
            browser.get(address)
            output, canvas, choose = (browser.find_element(By.TAG_NAME, name) for name in ("output", "canvas", "input"))
            WebDriverWait(browser, SECONDS).until(lambda _: output.text == "ready")
            for path, (name, confidence, mask) in zip(photos, expected(bundle, photos), strict=True):
                browser.execute_script("arguments[0].textContent = ''", output)
                choose.send_keys(str(path))
                WebDriverWait(browser, SECONDS).until(lambda _: output.text)
                assert output.text.split()[0] == name
                assert float(output.text.split()[1]) == pytest.approx(confidence, abs=1e-6)
                picture = browser.execute_script("return arguments[0].toDataURL().split(',')[1]", canvas)
                with Image.open(io.BytesIO(base64.b64decode(picture))) as drawn:
                    colours = np.asarray(drawn.convert("RGB")).reshape(-1, 3).tolist()
                check_mask(np.reshape([classes[tuple(colour)] for colour in colours], SIZE), mask, written / f"{name}.tflite", path)
            choose.send_keys(str(written / mediapipe.DESCRIPTION))  # no image
            WebDriverWait(browser, SECONDS).until(lambda _: output.text.startswith("error: "))
            assert canvas.get_property("width") == 0
        finally:
            browser.quit()


def run_example(code, given, folder):
    """Runs code of above in MediaPipe's environment, in a folder, with something as JSON on standard input."""
    words = [str(PYTHON), "-c", code, str(EXAMPLES / "segment.py")]
    done = subprocess.run(words, input=json.dumps(given), cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_mediapipe
def test_the_example_fits_photos_as_training_does(tmp_path):
    rng, cases, expected = np.random.default_rng(2), [], []
    sizes = [(61, 203), (203, 61), (150, 113), (20, 31), (48, 36), (90, 36), (48, 70), (3, 401), (401, 3)]
    for number, (width, height) in enumerate(sizes):
        path = tmp_path / f"{number}.png"
        photo = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        exif = photo.getexif()
        exif[ExifTags.Base.Orientation] = 1 + number % 8
        photo.convert(["RGB", "L", "RGBA", "P"][number % 4]).save(path, exif=exif)
        for resize in RESIZES:
            cases.append((str(path), {"width": 48, "height": 36, "resize": resize}))
            expected.append(fit(read_photo(path), (36, 48), resize))
    run_example(FITS, cases, tmp_path)
    for number, pixels in enumerate(expected):
        np.testing.assert_array_equal(np.load(tmp_path / f"{number}.npy"), pixels, err_msg=str(cases[number]))


@needs_mediapipe
@pytest.mark.parametrize("bundle", ["fp16"], indirect=True)
def test_the_example_writes_over_no_photo_and_says_in_a_line_what_is_wrong(bundle, written, photos, tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("photo.png", "d/photo.png", "d/cut.png", "other.png", "other.mask.png"):
        shutil.copy(photos[0], tmp_path / name)
    (tmp_path / "cut.png").write_bytes(photos[0].read_bytes()[:3000])
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(np.full((36, 48), 40000, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((36, 48), 0.5, np.float32)).save(tmp_path / "floats.tif")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    folder = str(written)
    ends = {
        (): "usage: ",
        (folder,): "usage: ",
        ("d", "photo.png"): "d: FileNotFoundError(",
        (folder, "photo.png", "gone.png"): "gone.png: must be a file",
        (folder, "photo.png", "d"): "d: must be a file",
        (folder, "d/photo.png", "photo.png"): "photos: must have different names",
        (folder, "other.png", "other.mask.png"): "photos: must have different names",
        (folder, "deep.png"): 'deep.png: ValueError("must have 8 bits per channel, got Pillow\'s mode I;16")',
        (folder, "floats.tif"): "floats.tif: ValueError(",
        (folder, "text.png"): "text.png: UnidentifiedImageError(",
        (folder, "cut.png"): "cut.png: OSError(",
    }
    *lines, got = run_example(ENDS, [["segment.py", *words] for words in [*ends, (folder, "photo.png")]], tmp_path).splitlines()
    *failures, last = json.loads(got)
    for failure, expected in zip(failures, ends.values(), strict=True):
        assert failure.startswith(expected) and "\n" not in failure, failure
    assert last == 0 and len(lines) == 1
    after = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert after.pop(tmp_path / "photo.mask.png") and after == before


@needs_tasks_vision
def test_the_page_says_what_is_missing(tmp_path):
    (tmp_path / "index.html").symlink_to(EXAMPLES / "index.html")
    browser = browsers.start()
    with browsers.served(tmp_path) as address:
        try:
            for missing in ("vision_bundle.mjs", "early_exit.json: 404"):
                browser.get(address)
                output = browser.find_element(By.TAG_NAME, "output")
                WebDriverWait(browser, SECONDS).until(lambda _, output=output: output.text.startswith("error: "))
                assert missing in output.text
                assert not browser.find_element(By.TAG_NAME, "input").is_enabled()
                if missing == "vision_bundle.mjs":
                    (tmp_path / "node_modules").symlink_to(MODULES)
        finally:
            browser.quit()


@pytest.mark.parametrize("name", ["segment.py", "index.html"])
def test_examples_are_short(name):
    """At most 60 lines of code, which are not empty and more than a comment or docstring."""
    lines = map(str.strip, (EXAMPLES / name).read_text(encoding="utf-8").splitlines())
    assert len([line for line in lines if line and not line.startswith(("#", '"""', "//", "/*"))]) <= 60


def test_no_rounding_of_a_score_decides(bundle, written):
    description = json.loads((written / mediapipe.DESCRIPTION).read_text())
    needed = needed_pixels(bundle.manifest)
    pixels = math.prod(SIZE)
    for each, count in zip(description["exits"], needed, strict=True):
        assert (written / each["file"]).is_file()
        scores = [0.0] if count is None else [np.float32(wanted / pixels) for wanted in (count, count - 1)]
        assert [score >= each["leave_from"] for score in scores] == [True, False][: len(scores)]


@pytest.mark.parametrize("bundle", ["fp16"], indirect=True)
def test_only_an_earlier_export_is_replaced_and_only_by_files_that_do_the_same(bundle, written, tmp_path, monkeypatch):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match=r"--output: must be a folder that is new, empty or of an earlier export, with early_exit\.json"):
        mediapipe.write(bundle, tmp_path)
    before = (written / mediapipe.DESCRIPTION).stat()
    resize = tf.image.resize
    monkeypatch.setattr(tf.image, "resize", lambda *arguments: -resize(*arguments))
    with pytest.raises(ValueError, match="exit1: must be the same on its own, got 'another mask or confidence'"):
        mediapipe.write(bundle, written)
    assert (written / mediapipe.DESCRIPTION).stat() == before and len(list(written.parent.iterdir())) == 1


def test_a_policy_at_the_size_of_the_logits_with_edges(tmp_path):
    size, head = (40, 56), "fcn-r1-b0"
    tf.keras.utils.set_random_seed(0)
    network = convert(small_network(3), 2, size)
    network.add_heads([HeadSpec.parse(head)], 0.9)
    configuration = Configuration("input-dependent", True, (ExitChoice("exit1", head, 0.4, 0.5), ExitChoice("final", "original")), None)
    Exporter(network, size, policy.LOW).bundle(tmp_path / "bundle", configuration, None, list("abc"))
    bundle = Bundle.load(tmp_path / "bundle")
    mediapipe.write(bundle, tmp_path / "mediapipe")
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    for name, expected in zip(bundle.manifest.exits, Runner(bundle).refine(image), strict=True):
        made = Interpreter(str(tmp_path / f"mediapipe/{name}.tflite")).get_signature_runner(SIGNATURE)(**{IMAGE: image[None]})
        assert list(made) == [mediapipe.CONFIDENCE, mediapipe.LOGITS] or name == "final"
        np.testing.assert_array_equal(made[mediapipe.LOGITS][0].argmax(-1), expected.mask)
        if name == "exit1":
            assert made[mediapipe.CONFIDENCE] == pytest.approx([expected.trace[-1].confidence], abs=1e-6)
