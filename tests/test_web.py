"""The target `web`: its folder, and in a browser the masks, exits and decisions of Python's runner."""

import base64
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import browsers
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from small_network import small_network

from mess_runtime.bundle import MODEL, Bundle, InputSpec, Regions, write_manifest
from mess_runtime.images import fit, mask_at, read_photo
from mess_runtime.runner import Runner
from mess_tf.configs import DataConfig, HeadSpec
from mess_tf.data.sources import open_split
from mess_tf.files import Configuration, ExitChoice
from mess_tf.graph import flatbuffer
from mess_tf.graph.exporter import Exporter
from mess_tf.network.model import convert
from mess_tf.targets import web

ROOT = Path(__file__).resolve().parents[1]
INT8 = ROOT / "models/camvid_lite0/int8/minus_1pp.input-dependent"
SIZE, PHOTO_SIZE, HEAD, THETA_PIX = (32, 64), (60, 90), "fcn-r1-b0", 0.4
SECONDS = 120  # a slow machine's
UNDECIDED = 1e-4  # share of the pixels that int8 leaves between two classes; 5e-7 in photos of CamVid
# WebGPU in software, a camera that plays a file, and no question before it does.
ARGUMENTS = (
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan,WebGPU",
    "--use-vulkan=swiftshader",
    "--ignore-gpu-blocklist",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
)


@pytest.fixture(scope="module")
def photos():
    """Drawn scenes, uint8 [60, 90, 3]."""
    examples = open_split(DataConfig(input_size=PHOTO_SIZE, synthetic_train=2, synthetic_val=3), "val")
    return [examples.load(i)[0] for i in range(len(examples))]


@pytest.fixture(scope="module")
def network(photos):
    """Random weights."""
    tf.keras.utils.set_random_seed(0)
    network = convert(small_network(5), 3, SIZE)
    network.add_heads([HeadSpec.parse(HEAD)], 0.9)
    run = tf.function(network.submodel(network.candidates), autograph=False)
    images = np.stack([fit(photo, SIZE, "letterbox") for photo in photos]).astype(np.float32)
    for _ in range(40):  # statistics of batch normalisation that belong to these weights
        run(images, training=True)
    return network


@pytest.fixture(scope="module")
def bundle(network, photos, tmp_path_factory):
    """An early exit and the last; takes bytes, letterboxed; the first one is sure enough of one of the photos."""
    choices = ExitChoice("exit1", HEAD, THETA_PIX, 0.5), ExitChoice("final", "original")
    configuration = Configuration("input-dependent", True, choices, None)
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    Exporter(network, SIZE).bundle(folder, configuration, None, list("abcde"), InputSpec(*SIZE, "uint8", "letterbox"))
    manifest = Bundle.load(folder).manifest
    sure = sorted(next(Runner(Bundle.load(folder)).refine(photo)).trace[0].confidence for photo in photos)
    assert sure[1] < sure[2], sure
    theta = (sure[1] + sure[2]) / 2
    segments = [dataclasses.replace(each, theta_img=each.theta_img and theta) for each in manifest.segments]
    write_manifest(folder, dataclasses.replace(manifest, segments=tuple(segments)))
    return Bundle.load(folder)


@pytest.fixture(scope="module")
def regions(network, tmp_path_factory):
    """The same exits, where each of eight cells leaves for itself."""
    choices = ExitChoice("exit1", HEAD, 0.34, 0.5), ExitChoice("final", "original")
    configuration = Configuration("input-dependent", False, choices, None, regions=Regions("nearest", (2, 4), (2, 8)))
    folder = tmp_path_factory.mktemp("regions") / "bundle"
    Exporter(network, SIZE).bundle(folder, configuration, None, list("abcde"), InputSpec(*SIZE, "uint8", "letterbox"))
    return Bundle.load(folder)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """LiteRT.js, as npm fetches it."""
    folder = tmp_path_factory.mktemp("npm")
    try:
        web.check(folder)
        return web.fetch(folder)
    except OSError as error:
        pytest.skip(f"needs npm and what it fetches: {error}")


@pytest.fixture(scope="module")
def folder(bundle, regions, packages, tmp_path_factory):
    """Three pages: small/, int8/ and regions/, which are the same but for their bundles."""
    folder = tmp_path_factory.mktemp("site")
    web.write(bundle, folder / "small", packages)
    for name, other in (("int8", Bundle.load(INT8)), ("regions", regions)):
        (folder / name).mkdir()
        for path in (folder / "small").iterdir():
            if path.name != web.BUNDLE:
                (folder / name / path.name).symlink_to(path)
        web.write_bundle(other, folder / name / web.BUNDLE)
    return folder


@pytest.fixture(scope="module")
def site(folder):
    """Address of a static server of that folder."""
    with browsers.served(folder) as address:
        yield address


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A video of one grey-blue still, for the camera."""
    path = tmp_path_factory.mktemp("film") / "camera.y4m"
    planes = b"FRAME\n" + bytes([90]) * 64 * 48 + bytes([150]) * 32 * 24 + bytes([120]) * 32 * 24
    path.write_bytes(b"YUV4MPEG2 W64 H48 F10:1 Ip A1:1 C420jpeg\n" + planes * 3)
    return path


@pytest.fixture(scope="module")
def browser(film):
    started = browsers.start(*ARGUMENTS, f"--use-file-for-fake-video-capture={film}")
    started.set_script_timeout(SECONDS)
    yield started
    started.quit()


@pytest.fixture(scope="module")
def page(browser, site):
    """The page of the small bundle, ready; the browser has nothing to complain of. LiteRT.js tells its news as console errors."""
    open_page(browser, f"{site}/small/")
    yield browser
    told = [entry for entry in browser.get_log("browser") if entry["source"] != "console-api"]
    assert [entry for entry in told if "favicon.ico" not in entry["message"]] == []  # of the page that has no icon


def open_page(browser, address: str) -> None:
    browsers.show(browser, address, width=1200, dark=False)
    rest(browser)
    assert status(browser).startswith("Ready")


def rest(browser) -> None:
    """Waits until all is done that was asked for."""
    WebDriverWait(browser, SECONDS).until(lambda _: by_id(browser, "picture").get_attribute("aria-busy") == "false")


def by_id(browser, name: str):
    return browser.find_element(By.ID, name)


def status(browser) -> str:
    return by_id(browser, "status").text


def put(browser, selector: str, value) -> None:
    """Moves a slider, or chooses of a list."""
    script = (
        "const [made, value] = arguments; made.value = value; for (const kind of ['input', 'change']) made.dispatchEvent(new Event(kind))"
    )
    browser.execute_script(script, browser.find_element(By.CSS_SELECTOR, selector), value)


def open_photo(browser, path: Path) -> None:
    by_id(browser, "file").send_keys(str(path))
    WebDriverWait(browser, SECONDS).until(lambda _: status(browser) == path.name)
    rest(browser)


def canvas(browser, name: str) -> np.ndarray:
    address = browser.execute_script("return document.getElementById(arguments[0]).toDataURL()", name)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB"))


def trace(browser) -> list[list[str]]:
    """The rows of the table of exits, of those that ran."""
    script = "return [...document.querySelectorAll('#trace tbody tr')].map((row) => [...row.cells].map((cell) => cell.textContent))"
    return [row for row in browser.execute_script(script) if row[3] != "–"]


def expected(runner: Runner, image: np.ndarray, theta: float | None = None):
    """What Python makes of an image, and the confidence at each exit up to its own as the page writes it."""
    needed = [each.theta_img if theta is None else theta for each in runner.manifest.segments]
    for result, least in zip(runner.refine(image), needed, strict=True):
        if (sure := result.trace[-1].confidence) is not None and sure >= least:
            break
    return result, ["–" if step.confidence is None else f"{100 * step.confidence:.1f} %" for step in result.trace]


def check_shown(browser, runner: Runner, image: np.ndarray, theta: float | None = None, undecided: float = 0) -> str:
    """Asserts that what is shown is what Python makes of the image, but for a share of undecided pixels; returns the exit."""
    result, sure = expected(runner, image, theta)
    assert by_id(browser, "left").text == f"Left at {result.exit}"
    assert [row[:2] for row in trace(browser)] == [[step.exit, text] for step, text in zip(result.trace, sure, strict=True)]
    assert different(browser, runner, result.mask) <= undecided
    return result.exit


def different(browser, runner: Runner, mask: np.ndarray) -> float:
    """Share of the pixels of the shown mask that have another class."""
    return (canvas(browser, "mask") != np.array(runner.manifest.palette, np.uint8)[mask]).any(-1).mean()


# === The folder ===


def test_a_bundle_hands_on_what_litertjs_takes_and_does_what_it_did(tmp_path, photos):
    web.write_bundle(Bundle.load(INT8), tmp_path / "bundle")
    made = Bundle.load(tmp_path / "bundle")
    ends = {name: {**graph.inputs, **graph.outputs} for name, graph in flatbuffer.read_signatures(made.path.read_bytes()).items()}
    assert list(ends) == ["segment.exit1", "segment.final"]
    types = [tensor.description.type for tensors in ends.values() for tensor in tensors.values()]
    assert set(types) == {schema.TensorType.FLOAT32, schema.TensorType.INT32, schema.TensorType.UINT8}
    for before, after in zip(*(Runner(each).refine(photos[0]) for each in (Bundle.load(INT8), made)), strict=True):
        assert before.trace[-1].confidence == after.trace[-1].confidence
        np.testing.assert_array_equal(before.mask, after.mask)


def test_what_is_no_package_of_litertjs_is_refused(tmp_path, bundle):
    (tmp_path / "litertjs-core-2.5.3.tgz").write_bytes(b"another one")
    with pytest.raises(ValueError, match=r"core-2\.5\.3\.tgz: must be the package with the hash sha512-PlGmb.*, got 'sha512-"):
        web.write(bundle, tmp_path / "new", tmp_path)
    missing = r"--litertjs: must be a folder with litertjs-core-2\.5\.3\.tgz, as `npm pack @litertjs/core@2\.5\.3 .*` writes it, got"
    with pytest.raises(ValueError, match=missing):
        web.write(bundle, tmp_path / "new", tmp_path / "none")
    assert not (tmp_path / "new").exists()


def test_nothing_of_others_is_replaced(tmp_path, bundle):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"--output: must be a folder that is new, empty or of an earlier export, with litertjs in it, got"
    ):
        web.write(bundle, tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "mine"


def test_without_npm_the_message_says_what_to_give(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"--litertjs: must be given where npm cannot fetch @litertjs/core@2\.5\.3 .*, got: no such command"):
        web.check(tmp_path / "new")


def test_the_page_asks_no_other_server():
    for path in (web.PAGES / "web.html", web.PAGES / "web.js", web.PAGES / "web.css", web.PAGES / "mess.js"):
        assert not re.search(r"https?://|//cdn", path.read_text(encoding="utf-8")), path
    assert "default-src 'none'; connect-src 'self';" in (web.PAGES / "web.html").read_text(encoding="utf-8")


# === In a browser ===


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
@pytest.mark.parametrize("size", [(32, 64), (131, 247), (20, 300), (300, 20), (17, 200), (64, 64)])
def test_images_are_fitted_with_the_bits_of_python(page, size, resize):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    mask = np.random.default_rng(1).integers(0, 5, SIZE, np.uint8)
    alpha = np.full((*size, 1), 255, np.uint8)
    script = """
        const [pixels, mask, size, input, done] = arguments;
        const values = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        import("./mess.js").then(({ fit, maskAt }) => {
            const image = new ImageData(new Uint8ClampedArray(values(pixels).buffer), size.width, size.height);
            done([Array.from(fit(image, input)), Array.from(maskAt(values(mask), input, size))]);
        });"""
    sent = [base64.b64encode(each.tobytes()).decode() for each in (np.concatenate([image, alpha], -1), mask)]
    sizes = {"height": size[0], "width": size[1]}, {"height": SIZE[0], "width": SIZE[1], "resize": resize}
    fitted, grown = page.execute_async_script(script, *sent, *sizes)
    np.testing.assert_array_equal(np.reshape(fitted, (*SIZE, 3)), fit(image, SIZE, resize))
    np.testing.assert_array_equal(np.reshape(grown, size), mask_at(mask, size, resize))


@pytest.mark.parametrize("accelerator", ["wasm", pytest.param("webgpu", marks=pytest.mark.full)])
def test_photos_give_the_masks_and_exits_of_python(page, bundle, photos, tmp_path, accelerator):
    if accelerator == "webgpu" and not page.execute_async_script(
        "const done = arguments[0]; navigator.gpu ? navigator.gpu.requestAdapter().then((made) => done(made !== null)) : done(false)"
    ):
        pytest.skip("needs WebGPU, in Chromium on Debian the package libvulkan1")
    runner, exits = Runner(bundle), set()
    put(page, "#accelerator", accelerator)
    rest(page)
    assert page.execute_script("return document.getElementById('accelerator').value") == accelerator, status(page)
    for number, photo in enumerate(photos):
        Image.fromarray(photo).save(path := tmp_path / f"{number}.png")
        open_photo(page, path)
        np.testing.assert_array_equal(canvas(page, "photo"), photo)
        exits.add(check_shown(page, runner, photo))
    assert exits == {"exit1", "final"}
    for theta, exit in ((0.0, "exit1"), (1.0, "final")):
        put(page, "[data-exit=exit1]", theta)
        rest(page)
        assert check_shown(page, runner, photos[-1], theta) == exit
    by_id(page, "reset").click()
    rest(page)
    check_shown(page, runner, photos[-1])
    if accelerator == "webgpu":
        by_id(page, "check").click()
        rest(page)
        assert by_id(page, "checked").text == "0.0 % of the pixels differ."
        put(page, "#accelerator", "wasm")
        rest(page)


def test_photos_are_read_upright(page, bundle, photos, tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(photos[0]).save(path := tmp_path / "turned.jpg", exif=tags, quality=95, subsampling=0)
    open_photo(page, path)
    seen = canvas(page, "photo")
    assert seen.shape == (90, 60, 3)
    assert np.abs(seen.astype(int) - read_photo(path)).max() <= 2
    check_shown(page, Runner(bundle), seen)


def test_what_is_no_picture_is_named(page, tmp_path):
    (tmp_path / "letter.png").write_text("mine")
    by_id(page, "file").send_keys(str(tmp_path / "letter.png"))
    WebDriverWait(page, SECONDS).until(lambda _: status(page) == "letter.png: must be a picture that this browser can show")


def test_the_camera_is_segmented_until_it_is_stopped(page, bundle):
    by_id(page, "camera").click()
    WebDriverWait(page, SECONDS).until(lambda _: by_id(page, "camera").get_attribute("aria-pressed") == "true")
    for _ in range(2):  # again and again
        page.execute_script("document.getElementById('total').textContent = ''")
        WebDriverWait(page, SECONDS).until(lambda _: by_id(page, "total").text)
    by_id(page, "camera").click()
    rest(page)
    seen = canvas(page, "photo")
    assert seen.shape[1] * 3 == seen.shape[0] * 4 and seen[..., 2].mean() > seen[..., 0].mean() + 20
    check_shown(page, Runner(bundle), seen)


@pytest.mark.parametrize("width", [390, 1200])
def test_dark_and_light_at_any_width(page, photos, tmp_path, width):
    Image.fromarray(photos[0]).save(tmp_path / "photo.png")
    open_photo(page, tmp_path / "photo.png")
    backgrounds = set()
    for dark in (False, True):
        browsers.screen(page, width, dark)
        assert page.execute_script("const page = document.documentElement; return page.scrollWidth <= page.clientWidth")
        backgrounds.add(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2


def test_an_int8_bundle_runs_and_keeps_a_deadline(browser, site, photos, tmp_path):
    open_page(browser, f"{site}/int8/")
    runner = Runner(Bundle.load(INT8))
    Image.fromarray(photos[0]).save(tmp_path / "photo.png")
    open_photo(browser, tmp_path / "photo.png")
    put(browser, "[data-exit=exit1]", 1)
    rest(browser)
    assert check_shown(browser, runner, photos[0], 1.0, UNDECIDED) == "final"
    put(browser, "#deadline", 1)
    rest(browser)
    assert by_id(browser, "deadline-value").text == "1 ms"
    assert by_id(browser, "left").text == "Left at exit1" and len(trace(browser)) == 1 and not by_id(browser, "cells").is_displayed()
    assert different(browser, runner, next(runner.refine(photos[0])).mask) <= UNDECIDED
    names = [item.text.rstrip("0123456789.% ") for item in browser.find_elements(By.CSS_SELECTOR, "#legend li")]
    assert names == json.loads((INT8 / "manifest.json").read_text())["classes"]


def test_cells_leave_each_for_itself(browser, site, regions, photos, tmp_path):
    open_page(browser, f"{site}/regions/")
    script = """
        const [pixels, size, options, done] = arguments;
        const image = new ImageData(Uint8ClampedArray.from(atob(pixels), (letter) => letter.charCodeAt(0)), size.width, size.height);
        import("./mess.js").then(async ({ Runner }) => {
            const runner = await Runner.load("bundle/", "litertjs/core/wasm/");
            const { mask, exit, trace, cells } = await runner.run(image, options);
            done({ mask: Array.from(mask), exit, trace, cells: Array.from(cells) });
        }).catch((error) => done(String(error)));"""
    alpha, taken = np.full((*PHOTO_SIZE, 1), 255, np.uint8), set()
    sent = [base64.b64encode(np.concatenate([photo, alpha], -1).tobytes()).decode() for photo in photos]
    for theta in (0.1, 0.9):
        *_, last = regions.manifest.segments
        early = dataclasses.replace(regions.manifest.segments[0], theta_img=theta)
        asked = dataclasses.replace(regions, manifest=dataclasses.replace(regions.manifest, segments=(early, last)))
        for photo, pixels in zip(photos, sent, strict=True):
            expected = Runner(asked).run(photo)
            size = {"height": photo.shape[0], "width": photo.shape[1]}
            made = browser.execute_async_script(script, pixels, size, {"thresholds": [theta, None]})
            assert made["exit"] == expected.exit
            steps = [(each["exit"], each["confidence"], each["budget"], each["active"]) for each in made["trace"]]
            assert steps == [(step.exit, step.confidence, step.budget, step.active) for step in expected.trace]
            np.testing.assert_array_equal(np.reshape(made["mask"], photo.shape[:2]), expected.mask)
            np.testing.assert_array_equal(np.reshape(made["cells"], expected.cells.shape), expected.cells)
            taken |= {step.budget for step in expected.trace[1:]}
    assert taken == {2, 8}
    late = browser.execute_async_script(script, sent[0], size, {"thresholds": [0.9, None], "deadlineMs": 1e-6})
    assert len(late["trace"]) == 1 and late["exit"] == "exit1" and late["cells"] == [0] * 8


SIZE_OF_MODEL, HASH_OF_MODEL = r"model\.tflite: must have \d+ bytes, got 1000$", r"model\.tflite: must have the SHA-256 \w{64}, got \w{64}$"
NO_CLASS = r"mask of exit1: must be of classes 0 to 0, got [1-4]$"


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "size", "secure", "message"),
    [
        (lambda content: content[:1000], None, True, SIZE_OF_MODEL),
        (lambda content: content[:1000], None, False, SIZE_OF_MODEL),
        (lambda content: content[:1000], 1000, False, r"model\.tflite: LiteRT\.js cannot load it: "),
        (flipped, None, True, HASH_OF_MODEL),
        (flipped, None, False, NO_CLASS),
        (lambda content: content, None, True, NO_CLASS),
    ],
)
def test_a_model_that_is_not_the_manifests_and_a_mask_of_no_class_are_errors(
    browser, site, folder, photos, tmp_path, change, size, secure, message
):
    broken = folder / "small" / tmp_path.name  # of this case alone: the browser keeps files of a second ago
    shutil.copytree(folder / "small" / web.BUNDLE, broken)
    manifest = Bundle.load(broken).manifest
    few = dataclasses.replace(manifest, classes=("a",), palette=manifest.palette[:1], size_bytes=size or manifest.size_bytes)
    write_manifest(broken, few)
    content = (broken / MODEL).read_bytes()
    (broken / MODEL).write_bytes(change(content))
    browser.get(f"{site}/small/")
    rest(browser)
    script = """
        const [secure, folder, done] = arguments;
        if (!secure) Object.defineProperty(crypto, "subtle", { value: undefined });
        import("./mess.js").then(async ({ Runner }) => {
            const runner = await Runner.load(folder, "litertjs/core/wasm/");
            const pixels = new Uint8ClampedArray(60 * 90 * 4).map((_, place) => (place * 37) % 256);
            done((await runner.run(new ImageData(pixels, 90, 60), { thresholds: [0, null] })).exit);
        }).catch((error) => done(error.message));"""
    assert re.search(message, browser.execute_async_script(script, secure, f"{broken.name}/"))


def test_cells_are_shown_in_the_colour_of_their_exit(browser, site, regions, photos, tmp_path):
    open_page(browser, f"{site}/regions/")
    Image.fromarray(photos[0]).save(tmp_path / "photo.png")
    open_photo(browser, tmp_path / "photo.png")
    put(browser, "[data-exit=exit1]", 0.1)
    rest(browser)
    early, last = regions.manifest.segments
    segments = (dataclasses.replace(early, theta_img=0.1), last)
    expected = Runner(dataclasses.replace(regions, manifest=dataclasses.replace(regions.manifest, segments=segments))).run(photos[0])
    assert [row[4] for row in trace(browser)] == [str(step.budget) for step in expected.trace]
    assert by_id(browser, "left").text == f"Deepest exit {expected.exit}" and {*expected.cells.ravel().tolist()} == {0, 1}
    by_id(browser, "cells").click()
    # 60x90 letterboxed to 32x48 of 32x64, whose columns of cells begin at 0, 16, 32 and 48, the photo at 8.
    rows, columns = (0, 1 / 2, 1), (0, 1 / 6, 1 / 2, 5 / 6, 1)
    for exit in (0, 1):
        drawn = browser.find_element(By.CSS_SELECTOR, f"#picture .exit[data-exit='{exit}']").get_attribute("d")
        corners = re.findall(r"M([^ ]+) ([^H]+)H([^V]+)V([^H]+)H[^Z]+Z", drawn)
        places = [(columns[x], rows[y], columns[x + 1], rows[y + 1]) for y, x in np.argwhere(expected.cells == exit)]
        np.testing.assert_allclose(np.array(corners, float), places)
    shares = [f"{100 * (expected.cells == exit).mean():.1f} %" for exit in (0, 1)]
    legend = [item.text for item in browser.find_elements(By.CSS_SELECTOR, "#legend li")]
    assert all(text.startswith(f"{name} {share}, ") for text, name, share in zip(legend, ("exit1", "final"), shares, strict=True))
    assert not by_id(browser, "mask").is_displayed()
    by_id(browser, "cells").click()
    assert by_id(browser, "mask").is_displayed() and not browser.find_elements(By.CSS_SELECTOR, "#picture svg")
    assert different(browser, Runner(regions), expected.mask) == 0


def test_the_code_of_the_docs_runs(browser, site, folder, bundle, photos, tmp_path):
    block = re.findall(r"^```html\n(.*?)^```$", (ROOT / "docs/web.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[-1]
    (folder / "small" / "pasted.html").write_text(block)
    Image.fromarray(photos[0]).save(tmp_path / "photo.png")
    browser.get(f"{site}/small/pasted.html")
    WebDriverWait(browser, SECONDS).until(lambda _: browser.execute_script("return document.querySelector('input').onchange !== null"))
    browser.find_element(By.CSS_SELECTOR, "input").send_keys(str(tmp_path / "photo.png"))
    WebDriverWait(browser, SECONDS).until(lambda _: browser.find_element(By.CSS_SELECTOR, "p").text)
    result = Runner(bundle).run(photos[0])
    assert browser.find_element(By.CSS_SELECTOR, "p").text.startswith(f"left at {result.exit} after ")
    browser.execute_script("document.querySelector('canvas').id = 'mask'")
    assert different(browser, Runner(bundle), result.mask) == 0
