"""The picture of the README: `python docs/picture_regions.py --bundle=B --images=PHOTO,...`, B a bundle whose cells leave, of two exits.

One row per photo: the photo, the mask of the first exit, which cells go on, and the mask that comes out, with the milliseconds to each
mask (the median of `REPETITIONS` runs, one thread) and what the last exit takes for the whole image. docs/regions.png is of the bundle
of "Under a DeepLabV3 head" in benchmarks/README.md that loses nothing, and of two photos that come with scikit-image: chelsea.png (Stefan
van der Walt, CC0) and astronaut.png (NASA, public domain).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from picture import REPETITIONS, UNSURE, add_legend, save, show
from PIL import Image

from mess_runtime.bundle import BUDGETED, Bundle, check
from mess_runtime.runner import Runner


def picture(bundle: Bundle, images: Sequence[Path]) -> Figure:
    """Draws the rows."""
    manifest, runner = bundle.manifest, Runner(bundle)
    check(manifest.regions is not None and len(manifest.exits) == 2, "--bundle", "one of two exits whose cells leave", manifest.exits)
    first, last = manifest.exits
    palette = np.array(manifest.palette, np.uint8)
    figure = Figure((12, 2.9 * len(images) + 0.5), layout="constrained")
    axes, seen = figure.subplots(len(images), 4, squeeze=False), set()
    for panel, title in zip(axes[0], ("photo", f"mask of {first}", "cells that go on", "mask"), strict=True):
        panel.set_title(title, fontsize=13)
    for row, path in zip(axes, images, strict=True):
        photo = Image.open(path).convert("RGB")
        image = np.asarray(photo)
        results = [runner.run(image) for _ in range(REPETITIONS)]
        whole = [runner.run(image, setting=BUDGETED, exit=last) for _ in range(REPETITIONS)]
        early = runner.run(image, setting=BUDGETED, exit=first).mask
        result, first_ms = results[0], np.median([each.trace[0].latency_ms for each in results])
        goes_on = np.asarray(Image.fromarray((result.cells > 0).astype(np.uint8)).resize(photo.size, Image.Resampling.NEAREST), bool)
        shade = np.repeat(np.asarray(photo.convert("L"))[..., None], 3, -1)
        shade = np.where(goes_on[..., None], (0.4 * shade + 0.6 * np.array(UNSURE)).astype(np.uint8), shade)
        show(row, (image, palette[early], shade, palette[result.mask]))
        row[1].set_xlabel(f"after {first_ms:.3g} ms", fontsize=11)
        row[2].set_xlabel(f"{(result.cells > 0).mean():.0%} of the image", fontsize=11)
        total = np.median([each.latency_ms for each in results])
        alone = np.median([each.latency_ms for each in whole])
        row[3].set_xlabel(f"after {total:.3g} ms; all cells: {alone:.3g} ms", fontsize=11, weight="bold")
        seen |= {*np.unique(early), *np.unique(result.mask)}
    add_legend(figure, manifest, seen, "goes on")
    return figure


def main(argv: Sequence[str]) -> None:
    del argv
    save(picture(Bundle.load(FLAGS.bundle), [Path(path) for path in FLAGS.images]), FLAGS.output)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("bundle", None, "folder of a bundle whose cells leave", required=True)
    flags.DEFINE_list("images", None, "photos to show, one a row", required=True)
    flags.DEFINE_string("output", "docs/regions.png", "file to write")
    app.run(main)
