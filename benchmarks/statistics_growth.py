"""How memory, time and files grow with images, heads and classes: the merge of calibration's shards, and the search.

`python benchmarks/statistics_growth.py --output=DIR [--rows=coco21 --rows=images ...]`. Needs no network: the statistics are drawn
(`paper_space.py`), 5 exit points and 8 theta_pix. Of the classes that a label does not hold, predictions have pixels in `--stray`, the same
of all candidates; 1 keeps all, which is the largest that a file can be. Each step has a process of its own, and works on real files:
  draw: writes shards, as `calibrate` does; not counted.
  count: `mess_tf.calibrate` of an untrained MobileNetV2 of width 0.35 with as many heads, on `--counted` drawn images of 64x64. What it
    holds at a time does not grow with the images, but for decoded ones (at most 1 GiB of them); its own merge is of these few images.
  merge: as at the end of `calibrate`, of all images, with TensorFlow imported.
  search: `--cost_share=0.6`, to the proven optimum, or for at most `--time_limit` seconds. Small rows with up to one early exit, the two
    large ones with up to two; all with up to `--early_exits` where that is given.
Peaks are of resident memory, pages of files among it that the system may take back. Seconds are those of the CPU, of all threads: they do
not depend on what else runs. The last line is one JSON object: by row, images, heads, classes, pairs (of an image and a class that are
kept), counted_images, count_s, count_gib, shards_mib, stats_mib, merge_s, merge_gib, search_s, search_gib, search_gap_pp.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from paper_space import drawn_stats
from PIL import Image

from mess_tf import configs
from mess_tf.configs import HEAD_SPACE, BackboneConfig, Config, DataConfig, ExitsConfig
from mess_tf.files import STATS, Objective, Stats, best_weights, joined, map_arrays, write_arrays
from mess_tf.optimise.guarantee import select
from mess_tf.optimise.search import resolve_objective, search
from mess_tf.optimise.space import macs_costs, original

EXITS, THETAS, SHARD = 5, 8, 64


@dataclasses.dataclass(frozen=True)
class Row:
    """Sizes: heads at all exits together, and the early exits of the search."""

    images: int
    heads: int
    classes: int
    early_exits: int = 1


ROWS = {
    "base": Row(1000, 120, 21),
    "images": Row(2000, 120, 21),
    "heads": Row(1000, 240, 21),
    "classes": Row(1000, 120, 42),
    "coco21": Row(5000, 480, 21, 2),
    "ade20k": Row(2000, 240, 150, 2),
}


def draw(row: Row, stray: float, folder: Path) -> None:
    """Writes the shards, and the rest of the statistics."""
    stats = drawn_stats(EXITS, row.heads // EXITS, row.images, row.classes, THETAS)
    rng = np.random.default_rng(1)
    kept = (stats.labelled > 0) | (rng.random(stats.labelled.size) < stray)
    for start in range(0, row.images, SHARD):
        images = slice(start, start + SHARD)
        pairs = kept & (stats.image_of_pair >= start) & (stats.image_of_pair < start + SHARD)
        part = {name: getattr(stats, name)[..., pairs] for name in ("class_of_pair", "labelled", "tp", "fp")}
        part |= {name: getattr(stats, name)[:, images] for name in ("confident", "changed")}
        write_arrays(folder / "shards" / f"{start:06}.npz", image_of_pair=stats.image_of_pair[pairs] - np.int32(start), **part)
    select(stats, np.arange(1)).save(folder / "rest.npz")


def prepare(row: Row, images: int, folder: Path) -> None:
    """Writes a work folder with an untrained network, and images."""
    from mess_tf.network.model import build_network

    rng, data = np.random.default_rng(0), folder / "data"
    for name, values, channels in (("images", 256, (3,)), ("labels", row.classes, ())):
        (data / "val" / name).mkdir(parents=True)
        for i in range(images):
            coarse = rng.integers(0, values, (8, 8, *channels)).astype(np.uint8)
            Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)).save(data / "val" / name / f"{i:04}.png")
    (data / "classes.txt").write_text("".join(f"class{number}\n" for number in range(row.classes)))
    heads = HEAD_SPACE[: row.heads // EXITS]
    config = Config(
        data=DataConfig("folder", str(data), input_size=(64, 64)),
        backbone=BackboneConfig(width=0.35),
        exits=ExitsConfig(EXITS + 1, heads=tuple(head.name for head in heads)),
    )
    (folder / "config.json").write_text(configs.to_json(config))
    network = build_network(config, row.classes)
    network.add_heads(heads, config.backbone.batch_norm_momentum)
    weights = Path(best_weights(folder, "stage2"))
    weights.parent.mkdir(parents=True)
    network.save_weights(weights)


def count(images: int, folder: Path) -> dict[str, float]:
    """The command `mess_tf.calibrate`."""
    from mess_tf import calibrate

    before = time.process_time()
    calibrate.run(str(folder))
    return {"counted_images": images, **used("count", before)}


def merge(row: Row, folder: Path) -> dict[str, float]:
    """Shards to statistics, as `calibrate.merge` does."""
    import mess_tf.calibrate  # noqa: F401  for what it takes

    before, shards = time.process_time(), sorted((folder / "shards").iterdir())
    names, pixels = tuple(f"image{i}" for i in range(row.images)), Stats.load(folder / "rest.npz").pixels
    stats = dataclasses.replace(
        Stats.load(folder / "rest.npz"), images=names, pixels=np.repeat(pixels, row.images), **joined([map_arrays(path) for path in shards])
    )
    stats.save(folder / STATS)
    size = sum(path.stat().st_size for path in shards), (folder / STATS).stat().st_size
    return {"pairs": stats.labelled.size, "shards_mib": size[0] / 2**20, "stats_mib": size[1] / 2**20, **used("merge", before)}


def searched(row: Row, time_limit: float, folder: Path) -> dict[str, float]:
    """The search, kernels compiled or loaded before."""
    small = drawn_stats(2, 2, 20, 3, 2)
    search(small, macs_costs(small), Objective("macs", 0.1))
    before, stats = time.process_time(), Stats.load(folder / STATS)
    costs = macs_costs(stats)
    objective = resolve_objective(original(stats, costs), costs, "input-dependent", cost_share=0.6)
    found = search(stats, costs, objective, max_early_exits=row.early_exits, time_limit=time_limit)
    return {**used("search", before), "search_gap_pp": 100 * found.certificate.gap}


def used(step: str, before: float) -> dict[str, float]:
    """CPU seconds since then, and the largest memory of this process."""
    return {f"{step}_s": time.process_time() - before, f"{step}_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in a process of its own."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main(argv) -> None:
    del argv
    results = {}
    columns = {
        "images": 7,
        "heads": 6,
        "classes": 8,
        "pairs": 8,
        "count s": 9,
        "GiB": 6,
        "file MiB": 9,
        "merge s": 8,
        "GiB ": 6,
        "search s": 9,
        "GiB  ": 6,
        "gap pp": 8,
    }
    print(f"{'row':<9}" + "".join(f"{name.strip():>{width}}" for name, width in columns.items()))
    for name in FLAGS.rows:
        row, folder = ROWS[name], Path(FLAGS.output, name)
        if FLAGS.early_exits is not None:
            row = dataclasses.replace(row, early_exits=FLAGS.early_exits)
        (folder / "shards").mkdir(parents=True)
        alone(prepare, row, FLAGS.counted, folder / "work")
        counted = alone(count, FLAGS.counted, folder / "work")
        alone(draw, row, FLAGS.stray, folder)
        merged = alone(merge, row, folder)
        results[name] = result = dataclasses.asdict(row) | counted | merged | alone(searched, row, FLAGS.time_limit, folder)
        print(
            f"{name:<9}{row.images:>7}{row.heads:>6}{row.classes:>8}{result['pairs']:>8}{result['count_s']:>9.0f}{result['count_gib']:>6.2f}"
            f"{result['stats_mib']:>9.0f}{result['merge_s']:>8.1f}{result['merge_gib']:>6.2f}{result['search_s']:>9.1f}{result['search_gib']:>6.2f}{result['search_gap_pp']:>8.3f}",
            flush=True,
        )
        shutil.rmtree(folder)
    print(json.dumps(results))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("output", None, "folder for the files, which are deleted", required=True)
    flags.DEFINE_multi_enum("rows", list(ROWS), ROWS, "which rows to run")
    flags.DEFINE_float("stray", 0.2, "share of the classes that an image does not hold of which some candidate predicts pixels")
    flags.DEFINE_integer("counted", 256, "images of the step count", lower_bound=1)
    flags.DEFINE_integer("early_exits", None, "of the search, in place of what a row has", lower_bound=0)
    flags.DEFINE_float("time_limit", 600.0, "seconds of each search")
    app.run(main)
