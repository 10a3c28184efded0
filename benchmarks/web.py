"""The page of `export_tflite --target=web` in headless Chromium, against Python's runner on the same photos, one after the other in turn.

    python -m mess_tf.export_tflite --bundle=BUNDLE --target=web --output=FOLDER
    python benchmarks/web.py --folder=FOLDER --images=photos

The last line of the output is JSON: pixels, and those that differ; photos, and those that leave at another exit; what the folder holds and
what a browser loads of it, in bytes; seconds from opening the page until the bundle was run twice; median of the page's time over Python's.
`--accelerator=webgpu` runs in software here, for results and not for speed.
"""

import base64
import functools
import http.server
import io
import json
import statistics
import threading
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from mess_runtime.bundle import Bundle
from mess_runtime.frames import expand
from mess_runtime.images import SUFFIXES, read_photo
from mess_runtime.runner import Runner
from mess_tf.targets.web import BUNDLE

SECONDS = 1800  # a GPU in software takes minutes
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan,WebGPU",
    "--use-vulkan=swiftshader",
    "--ignore-gpu-blocklist",
)


class Page:
    """The page, open in a browser; every method returns when the page has done what was asked."""

    def __init__(self, folder: Path, accelerator: str):
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
        handler.func.log_message = lambda *_: None
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = webdriver.ChromeOptions()
        for argument in ARGUMENTS:
            options.add_argument(argument)
        self.browser = webdriver.Chrome(options)
        begin = time.perf_counter()
        self.browser.get(f"http://127.0.0.1:{server.server_port}/")
        self._rest()
        self.load_s = time.perf_counter() - begin
        sizes = "return performance.getEntriesByType(arguments[0]).reduce((sum, each) => sum + each.encodedBodySize, 0)"
        self.loaded_bytes = sum(self.browser.execute_script(sizes, kind) for kind in ("navigation", "resource"))
        choose = "const made = arguments[0]; made.value = arguments[1]; made.dispatchEvent(new Event('change'))"
        self.browser.execute_script(choose, self._by_id("accelerator"), accelerator)
        self._rest()
        if self._by_id("accelerator").get_attribute("value") != accelerator:
            raise ValueError(f"accelerator: must be one of this browser, got {accelerator!r}: {self._by_id('status').text}")

    def _by_id(self, name: str):
        return self.browser.find_element(By.ID, name)

    def _rest(self) -> None:
        WebDriverWait(self.browser, SECONDS).until(lambda _: self._by_id("picture").get_attribute("aria-busy") == "false")

    def run(self, photo: Path) -> tuple[str, np.ndarray, float]:
        """The exit, the mask in its colours, uint8 [h, w, 3] at the size of the photo, and milliseconds."""
        self._by_id("file").send_keys(str(photo.resolve()))
        WebDriverWait(self.browser, SECONDS).until(lambda _: self._by_id("status").text == photo.name)
        self._rest()
        address = self.browser.execute_script("return document.getElementById('mask').toDataURL()")
        drawn = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB")
        return self._by_id("left").text.split()[-1], np.asarray(drawn), float(self._by_id("total").text.split()[0])


def main(argv) -> None:
    del argv
    folder = Path(FLAGS.folder)
    runner = Runner(Bundle.load(folder / BUNDLE))
    palette = np.array(runner.manifest.palette, np.uint8)
    page = Page(folder, FLAGS.accelerator)
    pixels = different = exits = 0
    ratios = []
    photos = expand([Path(FLAGS.images)], SUFFIXES)[: FLAGS.photos]
    try:
        for photo in photos:
            exit, mask, milliseconds = page.run(photo)
            result = runner.run(read_photo(photo))
            pixels += result.mask.size
            different += int((mask != palette[result.mask]).any(-1).sum())
            exits += exit != result.exit
            ratios.append(milliseconds / result.latency_ms)
            print(f"{photo.name}: {exit}, {different} of {pixels} pixels differ so far", flush=True)
    finally:
        page.browser.quit()
    figures = {
        "pixels": pixels,
        "different_pixels": different,
        "photos": len(photos),
        "other_exits": exits,
        "folder_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "loaded_bytes": page.loaded_bytes,
        "load_s": page.load_s,
        "times_python": statistics.median(ratios),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("folder", None, "that export_tflite wrote", required=True)
    flags.DEFINE_string("images", None, "folder of photos of at most 1600 pixels across, larger ones are drawn smaller", required=True)
    flags.DEFINE_integer("photos", None, "how many of them; default: all")
    flags.DEFINE_enum("accelerator", "wasm", ["wasm", "webgpu"], "what the page runs on")
    app.run(main)
