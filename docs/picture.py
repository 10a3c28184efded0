"""The picture of the README: `python docs/picture.py --workdir=W --images=A.png,B.png --output=docs/picture.png`.

One row per image: the image, the mask of the first exit, where it is sure, the mask of the last exit, and where the bundle of WORKDIR
let the image leave, after how long (the median of `REPETITIONS` runs, one thread). Which pixels are sure is computed from the logits of
WORKDIR/submodels, edge handling left aside.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from mess_runtime.bundle import BUDGETED, INPUT_DEPENDENT, Bundle, check
from mess_runtime.engines import open_interpreter
from mess_runtime.files import write_atomically
from mess_runtime.runner import Result, Runner

REPETITIONS = 21
UNSURE = (255, 120, 0)


def sure_pixels(logits_file: Path, image: np.ndarray, theta_pix: float) -> np.ndarray:
    """Which pixels of an image, uint8 [H, W, 3] of the network's size, reach the confidence `theta_pix`: bool [H, W]."""
    interpreter = open_interpreter(logits_file, 1)
    runner = interpreter.get_signature_runner()
    ((argument, details),) = runner.get_input_details().items()
    (logits,) = runner(**{argument: image[None].astype(details["dtype"])}).values()
    height, width = image.shape[:2]
    planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR) for plane in np.moveaxis(logits[0], -1, 0)]
    values = np.exp(np.stack(planes) - np.max(planes, axis=0))
    return values.max(0) / values.sum(0) >= theta_pix


def median_run(runner: Runner, image: np.ndarray, **how) -> tuple[Result, float]:
    """An image's result and its median latency in ms."""
    results = [runner.run(image, **how) for _ in range(REPETITIONS)]
    return results[0], float(np.median([result.latency_ms for result in results]))


def picture(workdir: Path, images: Sequence[Path]) -> Figure:
    """Draws the rows."""
    manifest = (bundle := Bundle.load(workdir / "bundle")).manifest
    check(len(manifest.segments) > 1, f"{workdir / 'bundle'}", "a bundle that decides per image", f"{manifest.exits} only")
    check(manifest.setting == INPUT_DEPENDENT, f"{workdir / 'bundle'}: setting", INPUT_DEPENDENT, manifest.setting)
    first, last = manifest.segments[0], manifest.segments[-1]
    runner = Runner(bundle)
    palette = np.array(manifest.palette, np.uint8)
    figure = Figure((12, 2.55 * len(images) + 0.9), layout="constrained")
    axes = figure.subplots(len(images), 4, squeeze=False)
    titles = ("image", f"mask of {first.exit}", f"where {first.exit} is sure", f"mask of {last.exit}")
    for panel, title in zip(axes[0], titles, strict=True):
        panel.set_title(title, fontsize=13)
    seen = set()
    for row, path in zip(axes, images, strict=True):
        photo = Image.open(path).convert("RGB")
        image = np.asarray(photo)
        chosen, chosen_ms = median_run(runner, image)
        results = [median_run(runner, image, setting=BUDGETED, exit=segment.exit) for segment in (first, last)]
        fitted = np.asarray(photo.resize((manifest.input.width, manifest.input.height), Image.Resampling.BILINEAR))
        sure = sure_pixels(workdir / "submodels" / f"logits.{first.exit}.tflite", fitted, first.theta_pix)
        shade = np.repeat(np.asarray(Image.fromarray(fitted).convert("L"))[..., None], 3, -1)
        shade = np.where(sure[..., None], shade, (0.4 * shade + 0.6 * np.array(UNSURE)).astype(np.uint8))
        for panel, shown in zip(row, (image, palette[results[0][0].mask], shade, palette[results[1][0].mask]), strict=True):
            panel.imshow(shown)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        share = chosen.trace[0].confidence
        row[2].set_xlabel(f"{share:.0%} of the pixels, {first.theta_img:.0%} needed", fontsize=11)
        if chosen.exit == first.exit:
            row[1].set_xlabel(f"left at {first.exit} after {chosen_ms:.2g} ms", fontsize=11, weight="bold")
            row[3].set_xlabel(f"not run: {results[1][1]:.2g} ms", fontsize=11, color="0.45")
        else:
            row[1].set_xlabel("not sure enough: went on", fontsize=11, color="0.45")
            row[3].set_xlabel(f"left at {chosen.exit} after {chosen_ms:.2g} ms", fontsize=11, weight="bold")
        seen |= set(np.unique([result.mask for result, _ in results]))
    patches = [Patch(color=palette[index] / 255, label=manifest.classes[index]) for index in sorted(seen)]
    patches.append(Patch(color=np.array(UNSURE) / 255, label="not sure"))
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=11)
    return figure


def main(argv: Sequence[str]) -> None:
    del argv
    figure = picture(Path(FLAGS.workdir), [Path(path) for path in FLAGS.images])
    write_atomically(FLAGS.output, lambda temporary: figure.savefig(temporary, format="png", dpi=100, facecolor="white"))
    print(FLAGS.output)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "folder of a training, with bundle/ and submodels/", required=True)
    flags.DEFINE_list("images", None, "images to show, one a row", required=True)
    flags.DEFINE_string("output", "docs/picture.png", "file to write")
    app.run(main)
