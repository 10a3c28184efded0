"""The headline: the original network against the deployed multi-exit networks, and against what one would do instead.

`python benchmarks/headline.py --bundle_dir B --data_dir D --split S [--statics DIR] [--plot FOLDER]`, B as `make_headline.py` writes it:
B/PRECISION/original, ROW.SETTING, anytime, exits.SCALE. DIR/PRECISION/NAME, as `statics.py` writes it, holds alternatives without early
exits.

All bundles of a precision run in one process, with the same threads, in random order on every ten images in a row, each as on a device
that runs nothing else. The latency of an image is the wall clock from the uint8 image to the mask of the image's size: resizing,
conversion and Python included. mIoU is that of the masks returned.
Input-dependent bundles of equal latency hold their latency (`Runner`): harder images than those of val must not make them slower than the
original.

Nothing is chosen here: of the bundles of a row, the one counts that promised most when it was chosen, on val (`predicted` in its manifest).

`anytime` counts for a row with the first exit that met it on val (`miou` in its manifest), and the mean time until its mask is there; at
equal latency, with the result that stands when the original's mean latency is over.

The last line is one JSON object; intervals are of 95 %, from a bootstrap over the images (mIoU from summed TP, FP, FN):
  speedup_at_no_loss, speedup_at_1pp: mean latency of the original over that of the row's bundle.
  gain_pp_at_equal_latency: mIoU of the row's bundle less that of the original, in percentage points.
  Each is null if val offered no configuration for the row, or if the bundle does not meet the row on this split (`rows` says how it did).
  The figures at the top level are of the first precision; those of others stand under their name.
  regions_against_images: by row, what the bundle that decides per region does against the one that decides per image and promised most.
  slowest_tenth: mean latency of a bundle's slowest 10 % of the images over the mean of the original's, for the bundle of each row.
  statics_not_beaten: alternatives that no chosen bundle beats in both latency and mIoU.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

from mess_runtime.bundle import ANYTIME, BUDGETED, INPUT_DEPENDENT, PRECISIONS, Bundle, check
from mess_runtime.runner import Runner
from mess_tf import metrics
from mess_tf.configs import DataConfig
from mess_tf.data.examples import Examples
from mess_tf.data.sources import open_split

ORIGINAL, EXITS, BY_REGION = "original", "exits", "regions"
RESAMPLES = 2000
ROUNDING = 1e-9  # of sums of float64
DEADLINES = 50
BLOCK = 10  # images
NO_LOSS, MINUS_1PP, EQUAL_LATENCY = ROWS = ("no_loss", "minus_1pp", "equal_latency")
DROPS_PP = {NO_LOSS: 0.0, MINUS_1PP: 1.0}

Masks = list[tuple[np.ndarray, float]]


@dataclasses.dataclass
class Measured:
    """What one way of running did to a split.

    Attributes:
      latency_ms: [images], median of the rounds.
      counts: TP, FP and FN, int64 [images, 3, C].
    """

    latency_ms: np.ndarray
    counts: np.ndarray

    @property
    def mean_ms(self) -> float:
        return float(self.latency_ms.mean())

    @property
    def miou_pct(self) -> float:
        return 100 * float(metrics.miou(*self.counts.sum(0)))


# === Measuring ===


def ways_of(folder: Path, kind: str, threads: int) -> dict[str, Callable[[np.ndarray], Masks]]:
    """How a bundle is run, by name: functions from an image to (mask, ms since the start), several with `anytime`."""
    bundle = Bundle.load(folder)
    runner = Runner(bundle, threads, hold_latency=kind.startswith(EQUAL_LATENCY) and bundle.manifest.setting == INPUT_DEPENDENT)

    def anytime(image):
        start = time.perf_counter_ns()
        return [(result.mask, (time.perf_counter_ns() - start) / 1e6) for result in runner.refine(image)]

    def once(*arguments):
        def run(image):
            start = time.perf_counter_ns()
            mask = runner.run(image, *arguments).mask
            return [(mask, (time.perf_counter_ns() - start) / 1e6)]

        return run

    if kind == ANYTIME:
        return {kind: anytime}
    family, _, scale = kind.partition(".")
    if family == EXITS:
        return {f"{name} at {scale} alone": once(BUDGETED, name) for name in runner.manifest.exits}
    return {kind: once()}


def measure(
    ways: Mapping[str, Callable[[np.ndarray], Masks]], examples: Examples, rounds: int, brightness: float
) -> dict[str, list[Measured]]:
    """Runs every way over a split, in blocks of images, in random order per block; a list of results per way, in the order of arrival."""
    names, classes = list(ways), examples.info.num_classes
    latency: dict[str, list] = {name: [[] for _ in range(len(examples))] for name in names}  # [images][rounds][results]
    counts: dict[str, list] = {name: [] for name in names}  # [images][results][3, C]
    order = np.random.default_rng(0)
    for start in range(0, len(examples), BLOCK):
        block = [(i, *examples.load(i)) for i in range(start, min(start + BLOCK, len(examples)))]
        block = [(i, np.clip(np.round(brightness * image), 0, 255).astype(np.uint8), label) for i, image, label in block]
        for turn in range(rounds):
            for name in order.permutation(names).tolist():
                ways[name](block[0][1])  # what ran before has left the caches cold
                for i, image, label in block:
                    results = ways[name](image)
                    latency[name][i].append([ms for _, ms in results])
                    if turn == 0:
                        counts[name].append([metrics.class_counts(metrics.confusion_matrix(label, mask, classes)) for mask, _ in results])
    medians = {name: np.median(latency[name], axis=1) for name in names}
    return {name: [Measured(medians[name][:, k], np.array(counts[name])[:, k]) for k in range(medians[name].shape[1])] for name in names}


# === Comparing ===


def compare(original: Measured, other: Measured) -> dict[str, object]:
    """Speed-up and gain in mIoU over the original, with bootstrap intervals over the images, paired."""
    images = len(original.latency_ms)
    drawn = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=RESAMPLES).astype(np.float64)
    ratios = (drawn @ original.latency_ms) / (drawn @ other.latency_ms)
    sums = [np.tensordot(drawn, side.counts, 1) for side in (original, other)]  # [RESAMPLES, 3, C]
    gains = np.subtract(*(100 * metrics.miou(*np.moveaxis(each, 1, 0)) for each in reversed(sums)))
    return {
        "mean_ms": other.mean_ms,
        "miou_pct": other.miou_pct,
        "speedup": original.mean_ms / other.mean_ms,
        "speedup_interval": np.quantile(ratios, [0.025, 0.975]).tolist(),
        "gain_pp": other.miou_pct - original.miou_pct,
        "gain_pp_interval": np.quantile(gains, [0.025, 0.975]).tolist(),
    }


def meets(row: str, comparison: Mapping[str, object]) -> bool:
    """Whether a bundle does on this split what its row asks for."""
    missing = 1 - comparison["speedup"] if row == EQUAL_LATENCY else -DROPS_PP[row] - comparison["gain_pp"]
    return missing <= ROUNDING


def anytime_row(row: str, results: list[Measured], original: Measured, bundle: Bundle, original_bundle: Bundle) -> Measured | None:
    """The result of an anytime bundle that counts for a row; None if val showed none."""
    if row == EQUAL_LATENCY:
        return at_deadline(results, original.mean_ms)
    wanted = original_bundle.manifest.segments[-1].miou - DROPS_PP[row] / 100
    good = [k for k, segment in enumerate(bundle.manifest.segments) if segment.miou >= wanted]
    return results[good[0]] if good else None


def at_deadline(results: list[Measured], deadline_ms: float) -> Measured:
    """The latest result of each image that is there in time, or the first."""
    arrivals = np.array([result.latency_ms for result in results])  # [results, images]
    latest = np.maximum((arrivals <= deadline_ms).sum(0) - 1, 0)
    counts = np.array([result.counts for result in results])
    images = np.arange(latest.size)
    return Measured(np.maximum(arrivals[0], deadline_ms), counts[latest, images])


def mean_over_deadlines(results: list[Measured], horizon_ms: float) -> float:
    """Mean mIoU, percent, over deadlines spread evenly up to the horizon; 0 before the first result."""
    deadlines = (np.arange(DEADLINES) + 0.5) / DEADLINES * horizon_ms
    first = results[0].mean_ms
    return float(np.mean([at_deadline(results, deadline).miou_pct if deadline >= first else 0.0 for deadline in deadlines]))


def precision_figures(
    folder: Path, statics: Path | None, examples: Examples, threads: int, rounds: int, brightness: float
) -> tuple[dict[str, object], dict[str, list[Measured]]]:
    """Measures one precision.

    Returns:
      Its figures, see the module, and what was measured.
    """
    kinds = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    bundles = {name: Bundle.load(path) for name, path in kinds.items()}
    for name, bundle in bundles.items():
        classes = bundle.manifest.classes
        check(classes == examples.info.classes, f"{kinds[name]}: classes", f"those of the data, {examples.info.classes}", classes)
    ways = {}
    for name, path in kinds.items():
        ways |= ways_of(path, name, threads)
    alternatives = sorted(path for path in statics.iterdir() if path.is_dir()) if statics and statics.is_dir() else []
    for path in alternatives:
        ways |= ways_of(path, f"static {path.name}", threads)
    measured = measure(ways, examples, rounds, brightness)
    original = measured[ORIGINAL][0]

    rows, figures, by_region, slowest = [], {}, {}, {}
    for row in ROWS:
        candidates = [name for name in bundles if name.startswith(f"{row}.")]
        if row == EQUAL_LATENCY:
            candidates.sort(key=lambda name: -bundles[name].manifest.predicted.miou)
        else:
            candidates.sort(key=lambda name: bundles[name].manifest.predicted.cost.mean)
        found = {name: measured[name][0] for name in candidates}
        if ANYTIME in bundles:
            found[f"{row}.{ANYTIME}"] = anytime_row(row, measured[ANYTIME], original, bundles[ANYTIME], bundles[ORIGINAL])
        for name, result in found.items():
            comparison = compare(original, result) if result else {}
            rows.append({"row": name, "met": meets(row, comparison) if result else None} | comparison)
        best = next((each for each in rows if candidates and each["row"] == candidates[0]), None)
        key, value = {
            NO_LOSS: ("speedup_at_no_loss", "speedup"),
            MINUS_1PP: ("speedup_at_1pp", "speedup"),
            EQUAL_LATENCY: ("gain_pp_at_equal_latency", "gain_pp"),
        }[row]
        met = best is not None and best["met"]
        if candidates:
            latency_ms = np.sort(measured[candidates[0]][0].latency_ms)
            slowest[row] = float(latency_ms[-max(1, latency_ms.size // 10) :].mean() / original.mean_ms)
        per_image = [name for name in candidates if not name.endswith(f".{BY_REGION}")]
        if per_image and f"{row}.{BY_REGION}" in found:
            by_region[row] = compare(found[per_image[0]], found[f"{row}.{BY_REGION}"])
        figures |= {key: best[value] if met else None, f"{key}_interval": best[f"{value}_interval"] if met else None}
    shown = {row["row"] for row in rows} | {ORIGINAL, ANYTIME}
    rows += [{"row": name} | compare(original, results[0]) for name, results in measured.items() if name not in shown]
    chosen = [name for name in measured if name.endswith((f".{INPUT_DEPENDENT}", f".{BUDGETED}", f".{BY_REGION}"))]
    figures |= {
        "original_ms": original.mean_ms,
        "original_miou_pct": original.miou_pct,
        "statics_not_beaten": [
            f"static {path.name}"
            for path in alternatives
            if not any(beats(measured[name][0], measured[f"static {path.name}"][0]) for name in chosen)
        ],
        "slowest_tenth": slowest,
        "rows": rows,
    }
    if by_region:
        figures["regions_against_images"] = by_region
    if ANYTIME in bundles:
        figures["anytime_mean_miou_pct"] = mean_over_deadlines(measured[ANYTIME], original.mean_ms)
    return figures, measured


def beats(one: Measured, other: Measured) -> bool:
    """At most the latency and at least the mIoU."""
    return one.mean_ms <= other.mean_ms and one.miou_pct >= other.miou_pct


# === Showing ===


def table(figures: Mapping[str, object]) -> str:
    """The rows as text."""
    lines = [f"{'':<32}{'mIoU %':>8}{'ms':>9}{'speed-up':>10}  {'95 %':<14}{'gain pp':>8}  {'95 %':<16}"]
    lines.append(f"{ORIGINAL:<32}{figures['original_miou_pct']:>8.2f}{figures['original_ms']:>9.2f}")
    for row in figures["rows"]:
        if "mean_ms" not in row:
            lines.append(f"{row['row']:<32}no exit met this on val")
            continue
        (slow, fast), (low, high) = row["speedup_interval"], row["gain_pp_interval"]
        lines.append(
            f"{row['row']:<32}{row['miou_pct']:>8.2f}{row['mean_ms']:>9.2f}{row['speedup']:>9.2f}x  {f'{slow:.2f} to {fast:.2f}':<14}"
            f"{row['gain_pp']:>+8.2f}  {f'{low:+.2f} to {high:+.2f}':<16}" + ("" if row.get("met", True) else "  NOT met on this split")
        )
    for row in ROWS:
        if not any(each["row"].startswith(f"{row}.") and not each["row"].endswith(ANYTIME) for each in figures["rows"]):
            lines.append(f"{row:<32}no bundle: no configuration met this on val, or the row was not asked for")
    for row, each in figures.get("regions_against_images", {}).items():
        low, high = each["speedup_interval"]
        lines.append(f"{row}: regions against images {each['speedup']:.2f}x ({low:.2f} to {high:.2f}), {each['gain_pp']:+.2f} pp")
    for row, times in figures["slowest_tenth"].items():
        lines.append(f"{row}: the slowest tenth of the images takes {times:.2f} of the original's mean")
    if "anytime_mean_miou_pct" in figures:
        lines.append(f"anytime: mean mIoU {figures['anytime_mean_miou_pct']:.2f} % over the deadlines up to the original's latency")
    return "\n".join(lines)


def draw(path: Path, measured: Mapping[str, list[Measured]], title: str) -> None:
    """Latency against mIoU of everything that was measured."""

    def points(chosen: Callable[[str], bool]) -> np.ndarray:
        pairs = [(each.mean_ms, each.miou_pct) for name, results in measured.items() if chosen(name) for each in results]
        return np.array(sorted(pairs)).reshape(-1, 2)

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for label, chosen, style in (
        ("input-dependent", lambda name: name.endswith(f".{INPUT_DEPENDENT}"), "o-"),
        ("one decision per region", lambda name: name.endswith(f".{BY_REGION}"), "P-"),
        ("budgeted", lambda name: name.endswith(f".{BUDGETED}"), "s"),
        ("anytime", lambda name: name == ANYTIME, "d:"),
        ("one exit alone, its best head", lambda name: name.endswith(" alone"), "^"),
        ("without early exits", lambda name: name.startswith("static "), "x"),
        ("original", lambda name: name == ORIGINAL, "k*"),
    ):
        if (each := points(chosen)).size:
            axes.plot(*each.T, style, label=label, markersize=12 if style == "k*" else 7)
    for name, results in measured.items():
        if name.startswith("static ") or name.endswith(" alone"):
            text = name.removeprefix("static ").removesuffix(" alone")
            axes.annotate(text, (results[0].mean_ms, results[0].miou_pct), (4, -11), textcoords="offset points", fontsize=8)
    axes.set(xlabel="mean latency of an image, ms", ylabel="mIoU, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(path)


def main(argv) -> None:
    del argv
    root = Path(FLAGS.bundle_dir)
    found = [name for name in PRECISIONS if (root / name / ORIGINAL).is_dir()]
    if not found:
        raise app.UsageError(f"--bundle_dir: must hold PRECISION/{ORIGINAL} for one of {', '.join(PRECISIONS)}, got {root}")
    config = DataConfig(source=FLAGS.data, data_dir=FLAGS.data_dir, ignore_value=FLAGS.ignore_value)
    examples = open_split(config, FLAGS.split)
    document = {"split": FLAGS.split, "images": len(examples), "brightness": FLAGS.brightness}
    document |= {"threads": FLAGS.threads, "rounds": FLAGS.rounds, "precision": found[0]}
    for precision in found:
        statics = Path(FLAGS.statics) / precision if FLAGS.statics else None
        figures, measured = precision_figures(root / precision, statics, examples, FLAGS.threads, FLAGS.rounds, FLAGS.brightness)
        title = f"{precision}, {len(examples)} images of {FLAGS.split}, {FLAGS.threads} thread(s)"
        print(f"\n{title}\n{table(figures)}", flush=True)
        if FLAGS.plot:
            draw(Path(FLAGS.plot) / f"headline_{precision}.png", measured, title)
        document |= figures if precision == found[0] else {precision: figures}
    print(json.dumps(document))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("bundle_dir", None, "folder of make_headline.py", required=True)
    flags.DEFINE_string("data_dir", None, "root of the data", required=True)
    flags.DEFINE_string("split", "val", "split to run over")
    flags.DEFINE_string("data", "folder", "source of the data")
    flags.DEFINE_integer("ignore_value", 11, "label value of pixels without a class; 11 is CamVid's")
    flags.DEFINE_string("statics", "", "folder of statics.py")
    flags.DEFINE_string("plot", "", "folder for a picture per precision")
    flags.DEFINE_float("brightness", 1.0, "factor of the pixels, to see what a darker drive does to the choices", lower_bound=0.0)
    flags.DEFINE_integer("threads", 1, "interpreter threads")
    flags.DEFINE_integer("rounds", 3, "runs of each image", lower_bound=1)
    app.run(main)
