"""The picture of one decision per image: `make demo`, then `python docs/picture.py`.

One row per image: the image, the mask of the first exit, where it is sure, the mask of the last exit, and where the bundle of WORKDIR
let the image leave, after how long (the median of `REPETITIONS` runs, one thread). Which pixels are sure is computed from the logits of
WORKDIR/submodels, edge handling left aside.
"""

import io
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from mess_runtime.bundle import BUDGETED, INPUT_DEPENDENT, Bundle, Manifest, check
from mess_runtime.engines import open_interpreter
from mess_runtime.files import write_atomically
from mess_runtime.runner import Runner

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


def one_of_each(runner: Runner, folder: Path) -> list[Path]:
    """For the first and the last exit, the first image of a folder that leaves there."""
    by_exit: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        by_exit.setdefault(runner.run(np.asarray(Image.open(path).convert("RGB"))).exit, path)
    exits = (runner.manifest.exits[0], runner.manifest.exits[-1])
    check(by_exit.keys() >= set(exits), "--images", f"given, as no image of {folder} leaves at one of {exits}", list(by_exit))
    return [by_exit[name] for name in exits]


def show(row: Sequence[Axes], images: Sequence[np.ndarray]) -> None:
    """Draws a row of images without axes."""
    for panel, shown in zip(row, images, strict=True):
        panel.imshow(shown)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)


def add_legend(figure: Figure, manifest: Manifest, seen: Collection[int], unsure: str) -> None:
    """Says which colours are which classes, and what the shade of unsure parts is called."""
    patches = [Patch(color=np.array(manifest.palette[index]) / 255, label=manifest.classes[index]) for index in sorted(seen)]
    patches.append(Patch(color=np.array(UNSURE) / 255, label=unsure))
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=11)


def save(figure: Figure, output: str) -> None:
    """Writes a small PNG and prints its path."""
    figure.savefig(buffer := io.BytesIO(), dpi=100, facecolor="white")
    small = Image.open(buffer).convert("RGB").quantize(256)  # a third of the bytes
    write_atomically(output, lambda temporary: small.save(temporary, "PNG", optimize=True))
    print(output)


def picture(workdir: Path, images: Sequence[Path]) -> Figure:
    """Draws the rows; without images, one image that leaves at the first exit and one that leaves at the last."""
    manifest = (bundle := Bundle.load(workdir / "bundle")).manifest
    check(len(manifest.segments) > 1, f"{workdir / 'bundle'}", "a bundle that decides per image", f"{manifest.exits} only")
    check(manifest.setting == INPUT_DEPENDENT, f"{workdir / 'bundle'}: setting", INPUT_DEPENDENT, manifest.setting)
    first, last = manifest.segments[0], manifest.segments[-1]
    runner = Runner(bundle)
    images = images or one_of_each(runner, workdir / "examples")
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
        results = [runner.run(image) for _ in range(REPETITIONS)]
        latency = f"{np.median([result.latency_ms for result in results]):.2g} ms"
        masks = [runner.run(image, setting=BUDGETED, exit=segment.exit).mask for segment in (first, last)]
        fitted = np.asarray(photo.resize((manifest.input.width, manifest.input.height), Image.Resampling.BILINEAR))
        sure = sure_pixels(workdir / "submodels" / f"logits.{first.exit}.tflite", fitted, first.theta_pix)
        shade = np.repeat(np.asarray(Image.fromarray(fitted).convert("L"))[..., None], 3, -1)
        shade = np.where(sure[..., None], shade, (0.4 * shade + 0.6 * np.array(UNSURE)).astype(np.uint8))
        show(row, (image, palette[masks[0]], shade, palette[masks[1]]))
        row[2].set_xlabel(f"{results[0].trace[0].confidence:.0%} of the pixels, {first.theta_img:.0%} needed", fontsize=11)
        left_early = results[0].exit == first.exit
        row[1].set_xlabel(f"left at {first.exit} after {latency}" if left_early else "not sure enough: goes on", fontsize=11)
        row[3].set_xlabel("not run" if left_early else f"left at {results[0].exit} after {latency}", fontsize=11)
        row[1 if left_early else 3].xaxis.label.set_weight("bold")
        seen |= set(np.unique(masks))
    add_legend(figure, manifest, seen, "not sure")
    return figure


def main(argv: Sequence[str]) -> None:
    del argv
    save(picture(Path(FLAGS.workdir), [Path(path) for path in FLAGS.images]), FLAGS.output)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", "runs/demo", "folder of a training, with bundle/, submodels/ and examples/")
    flags.DEFINE_list("images", [], "images to show, one a row; default: two of the examples")
    flags.DEFINE_string("output", "docs/picture.png", "file to write")
    app.run(main)
