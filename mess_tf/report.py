"""What a training and its search came to, as one HTML page.

`python -m mess_tf.report --workdir=W [--data_dir=D] [--latency=latency.json]`, after `mess_tf.search`, writes WORKDIR/report/index.html,
which holds everything and needs nothing else: no other file, no network. What it shows is collected here; `pages/report.html` lays it out,
and `pages/report.js` draws the charts and the image viewer. The tables need no JavaScript and hold the charts' values too.
"""

import os

from absl import flags

from mess_tf import arguments, terminal
from mess_tf.files import DEPLOYMENT, REGIONS, STATS, Deployment, Predicted, RegionStats, Stats, shown, unit


def check_flags() -> None:
    """Raises FileNotFoundError, ValueError where there is nothing to report."""
    arguments.check_trained()
    Deployment.load(os.path.join(flags.FLAGS.workdir, DEPLOYMENT))
    arguments.check_latency()


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of a training, with stats.npz and deployment.json", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_string("latency", "", "the latency.json that was searched; default: the workdir's")
    arguments.define_network_flags()
    terminal.run("mess_tf.report", __doc__, check_flags)

import base64
import dataclasses
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tensorflow as tf
from PIL import Image

from mess_runtime.benchmark import LatencyTable
from mess_runtime.bundle import ANYTIME, BUDGETED, INPUT_DEPENDENT, check, check_writable
from mess_runtime.files import write_atomically
from mess_runtime.images import mask_at, placed
from mess_runtime.terminal import progress
from mess_tf import configs, metrics
from mess_tf.configs import IGNORE
from mess_tf.data.examples import Examples, palette
from mess_tf.data.pipelines import network_input
from mess_tf.data.sources import open_split
from mess_tf.graph import policy
from mess_tf.network.model import FINAL, MultiExitNetwork, load_network
from mess_tf.network.originals import allow_flags
from mess_tf.optimise import guarantee
from mess_tf.optimise.regions import configuration_of, only, predict_regions, region_latencies, region_macs, select, taken_shares
from mess_tf.optimise.search import front
from mess_tf.optimise.space import Costs, evaluate_configuration, latency_costs, macs_costs, mixture, original, predict
from mess_tf.region_candidates import Outcomes, plan_of

FLAGS = flags.FLAGS
PAGES = Path(__file__).with_name("pages")
FRONT_POINTS = 20
FRONT_SECONDS = 2.0  # for each point, after which the best found is shown
CURVE_POINTS = 200  # of each curve, evenly picked from those that there are
IMAGES = 36  # at most, and fewer where they fill so many bytes of the page:
IMAGE_BYTES = 3_500_000
IMAGE_SIDE = 480  # pixels of the longer side
CONFIDENCE_COLOURS = ((22, 11, 57), (120, 28, 109), (208, 66, 74), (251, 155, 6), (252, 255, 164))  # from 0 to 1, as bright as it is sure
EXIT_HUES = (300, 95)  # purple to yellow by blue and green, and ever lighter (report.css): told apart whatever colours one sees
ERRORS = {  # what an exit does to a pixel, and its colour
    "right": (235, 235, 235),
    "wrong": (240, 170, 40),
    "wrong, original right": (200, 30, 30),
    "right, original wrong": (40, 110, 210),
    "no label": (128, 128, 128),
}


def exit_of(candidate: str) -> str:
    """`exit1.fcn-r1-b0` to `exit1`."""
    return candidate.partition(".")[0]


def chain_of(deployment: Deployment) -> list[str]:
    """The chosen candidates, shallow to deep."""
    return [f"{choice.exit}.{choice.head}" for choice in deployment.exits]


def css_colours(colours: Iterable[Sequence[int]]) -> list[str]:
    """RGB of 0..255 as CSS writes it."""
    return [f"rgb({' '.join(map(str, colour))})" for colour in colours]


# === What the page shows ===


def searched_costs(stats: Stats, deployment: Deployment, latencies: LatencyTable | None) -> Costs:
    """The costs that the deployment was searched with: of the device and threads that were asked for, or else of those at which the
    original network costs what it says.

    Raises:
      ValueError: the latencies are of other submodels, or of no device that gives the original network that cost.
    """
    if latencies is None:
        return macs_costs(stats)
    rows = [dataclasses.asdict(row) for row in latencies.rows]
    problem = ValueError(f"latency: must be the file that was searched, where the original takes {deployment.original.cost:g} ms")
    asked = deployment.asked
    for device, threads in [(asked.device, asked.threads)] if asked else sorted({(row["device"], row["threads"]) for row in rows}):
        try:
            costs = latency_costs(stats, rows, device, threads, deployment.backend)
        except ValueError as error:  # some of its rows are missing; it may be another device that was searched
            problem = error
            continue
        if np.isclose(original(stats, costs).cost, deployment.original.cost, rtol=1e-9):
            return costs
    raise problem


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """What the chosen configuration does to every image.

    Attributes:
      tp, fp, fn: int64 [I, C], of the mask that comes out.
      reached: int [I], position of the exit where the image leaves; where regions decide, of the deepest one that a part of it came to.
      predicted: of all images, whatever part of them was to choose.
      cells: where regions decide, float64 [I, E], share of the cells that have their answer from each chosen exit; None elsewhere.
      spent: likewise, what each exit cost, after the one before.
    """

    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    reached: np.ndarray
    predicted: Predicted
    cells: np.ndarray | None = None
    spent: np.ndarray | None = None

    @property
    def counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """TP, FP, FN."""
        return self.tp, self.fp, self.fn


def chosen_of(
    stats: Stats, costs: Costs, deployment: Deployment, regions: RegionStats | None = None, latencies: LatencyTable | None = None
) -> Chosen:
    """The outcome of a deployment in the statistics of whole images, or of regions where these decide."""
    if not deployment.regions:
        counts = stats.counts(mixture(stats, costs, deployment))
        return Chosen(*counts, evaluate_configuration(stats, costs, deployment)[2], predict(stats, costs, deployment))
    of_regions = region_macs(regions)
    if latencies is not None:
        rows, asked = [dataclasses.asdict(row) for row in latencies.rows], deployment.asked
        of_regions = region_latencies(regions, stats, costs, rows, asked.device, asked.threads, deployment.backend)
    chosen = only(regions, np.array([configuration_of(regions, deployment.exits)]))
    tp, fp = chosen.tp[0].astype(np.int64), chosen.fp[0].astype(np.int64)
    used = len(deployment.exits)
    cells = chosen.cells[0, :, :used] / chosen.regions.cells
    spent = np.concatenate([*of_regions.of_image[0].by_exit(chosen)]).T[:, :used]
    return Chosen(tp, fp, regions.labelled - tp, (chosen.taken[0] > 0).sum(1), predict_regions(chosen, of_regions, 0), cells, spent)


def judging(stats: Stats, deployment: Deployment) -> Stats:
    """The statistics of the images that the prediction is of: all, or those that the search kept out of choosing."""
    if deployment.predicted.images == len(stats.images):
        return stats
    return guarantee.split(stats, deployment.predicted.images / len(stats.images))[1]


def difference_interval(stats: Stats, chosen: Chosen) -> tuple[float, float]:
    """Of the mIoU, chosen less original: 95 % bootstrap over the images, each drawn for both."""
    drawn = guarantee.resamples(len(stats.images))

    def mious(counts: Iterable[np.ndarray]) -> np.ndarray:
        return metrics.miou(*(drawn @ each for each in counts))

    return guarantee.interval(mious(chosen.counts) - mious(stats.counts(-1)))


def cell_curves(deployment: Deployment, outcome: Chosen) -> list[dict[str, Any]]:
    """Where regions decide, for each chosen exit: by images in percent, the surest first, percentage of the cells that have left there or
    before, and there."""
    if outcome.cells is None:
        return []
    shares = outcome.cells[np.lexsort(-outcome.cells.T[::-1])]
    before = 100 * np.arange(len(shares)) / max(1, len(shares) - 1)
    points = np.stack([np.broadcast_to(before, shares.T.shape), 100 * shares.cumsum(1).T, 100 * shares.T], -1)
    return [{"name": each.exit, "points": thinned(of_exit.tolist())} for each, of_exit in zip(deployment.exits, points, strict=True)]


def exit_names(stats: Stats) -> list[dict[str, Any]]:
    """Every exit, shallow to deep, with the hue in degrees of its colour."""
    return [{"name": name, "hue": round(hue)} for name, hue in zip(stats.exits, np.linspace(*EXIT_HUES, len(stats.exits)), strict=True)]


def front_space(deployment: Deployment) -> dict[str, Any]:
    """Which configurations the front is of; with `anytime`, whose mIoU is a mean over deadlines, those of one exit."""
    if deployment.setting != INPUT_DEPENDENT:
        return {"setting": BUDGETED, "max_early_exits": 0}
    return {"setting": INPUT_DEPENDENT, "max_early_exits": max(2, len(deployment.exits) - 1)}


def front_points(stats: Stats, costs: Costs, deployment: Deployment, predicted: Predicted) -> list[dict[str, Any]]:
    """Configurations, each with its mIoU in percent and its cost in the unit shown: heads alone, the front, the original, the chosen one.

    The front is of images that decide.

    All are scored on all images of the statistics. The front has at most FRONT_POINTS, each found within FRONT_SECONDS, `open` where that
    was too short to prove that it is the best; it has none where nothing was found in that time.
    """
    scale = unit(costs.name)[1]

    def alone(k: int, kind: str = "head") -> dict[str, Any]:
        name = stats.candidates[k]
        cost = scale * float(costs.prefix[stats.exit_of_candidate[k]] + costs.head[k])
        miou = 100 * float(metrics.miou(*(counts.sum(0) for counts in stats.counts(k))))
        choice = {"exit": exit_of(name), "head": name.partition(".")[2], "theta_pix": None, "theta_img": None, "leave": 1.0}
        return {"kind": kind, "miou": miou, "mean": cost, "p90": cost, "edge_aware": False, "exits": [choice]}

    def configured(kind: str, configuration, predicted) -> dict[str, Any]:
        exits = [
            dataclasses.asdict(choice) | {"leave": rate} for choice, rate in zip(configuration.exits, predicted.exit_rates, strict=True)
        ]
        return {
            "kind": kind,
            "miou": 100 * predicted.miou,
            "mean": scale * predicted.cost_mean,
            "p90": scale * predicted.cost_p90,
            "edge_aware": configuration.edge_aware,
            "exits": exits,
        }

    try:
        space = front_space(deployment) | {"quantiles": deployment.certificate.quantiles, "time_limit": FRONT_SECONDS}
        found = front(stats, costs, FRONT_POINTS, **space)
    except TimeoutError:
        found = []
    chosen = configured("chosen", deployment, predicted) | {
        "miou_interval": [100 * value for value in predicted.miou_interval],
        "mean_interval": [scale * value for value in predicted.cost_interval],
    }
    return [
        *(alone(k) for k in range(len(stats.candidates) - 1)),
        *(configured("front", each, each.predicted) | {"open": each.certificate.open > 0} for each in found),
        alone(len(stats.candidates) - 1, "original"),
        chosen,
    ]


def image_confidence(stats: Stats, deployment: Deployment, index: int) -> np.ndarray:
    """Share of confident pixels of every calibration image at a chosen exit that decides, float64 [I]."""
    choice = deployment.exits[index]
    candidate = stats.candidates.index(f"{choice.exit}.{choice.head}")
    threshold = int(np.flatnonzero(stats.theta_pix == choice.theta_pix)[0])
    return stats.confident[candidate, :, threshold, int(deployment.edge_aware)] / stats.pixels


def thinned(points: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """At most CURVE_POINTS of the points of a curve, evenly picked, its ends among them."""
    return [points[i] for i in np.unique(np.linspace(0, len(points) - 1, min(len(points), CURVE_POINTS)).round().astype(int))]


def exit_rate_curves(stats: Stats, deployment: Deployment) -> list[dict[str, Any]]:
    """For each chosen exit that decides: thresholds, each with the percentage of all images that reach it, and the chosen one."""
    curves = []
    decides = deployment.setting == INPUT_DEPENDENT and not deployment.regions
    for k, choice in enumerate(deployment.exits[:-1] if decides else ()):
        confidence, first = np.unique(np.sort(image_confidence(stats, deployment, k)), return_index=True)
        points = np.stack([confidence, 100 * (1 - first / len(stats.images))], axis=1)
        reached = points[confidence >= choice.theta_img - 1e-9, 1].max(initial=0.0)
        curves.append({"name": choice.exit, "points": thinned(points.tolist()), "chosen": [choice.theta_img, float(reached)]})
    return curves


def training_panels(workdir: Path, exits: Sequence[str]) -> list[dict[str, Any]]:
    """Loss and val mIoU of every exit over each stage; of stage 2's heads, the mean loss and the best mIoU of each exit."""
    panels = []
    for stage in ("stage1", "stage2"):
        path = workdir / "logs" / stage / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        for field, join, label in (("loss", np.mean, "loss"), ("miou", max, "val mIoU %")):
            curves: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                for name, keys in itertools.groupby(row.get(field, {}), exit_of):
                    value = float(join([row[field][key] for key in keys]))
                    curves.setdefault(name, []).append((row["epoch"], 100 * value if field == "miou" else value))
            if curves:
                series = [{"name": name, "points": thinned(curves[name])} for name in exits if name in curves]
                panels.append({"title": f"{stage}: {label}", "ylabel": label, "series": series})
    return panels


# === Images ===


def data_uri(pixels: np.ndarray, size: tuple[int, int], quality: int | None) -> str:
    """Pixels as a WebP picture of a (width, height): with a quality, resized smoothly; without, to the nearest pixel and lossless."""
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.BOX if quality else Image.Resampling.NEAREST)
    picture.save(buffer, "webp", lossless=quality is None, quality=quality or 100, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def worth_showing(miou: np.ndarray, lost: np.ndarray, leaves_at: np.ndarray, confidence: np.ndarray) -> list[int]:
    """Which images the page holds, the most telling first: those that lose most, the worst ones, and of each exit from sure to unsure.

    Args:
      miou: float64 [I], of each image where it leaves.
      lost: float64 [I], by leaving there.
      leaves_at: int64 [I], position of that exit.
      confidence: float64 [I], at the first exit.
    """
    kinds = [np.argsort(-lost, kind="stable"), np.argsort(miou, kind="stable")]
    by_confidence = np.argsort(-confidence, kind="stable")
    for position in np.unique(leaves_at):
        here = by_confidence[leaves_at[by_confidence] == position]
        kinds.append(here[np.linspace(0, here.size - 1, min(here.size, IMAGES // 4)).round().astype(int)])
    taken = dict.fromkeys(int(index) for turn in itertools.zip_longest(*kinds) for index in turn if index is not None)
    return list(taken)[:IMAGES]


def edges(cells: np.ndarray, inside: slice) -> list[float]:
    """Where the cells that rows (or columns) of the network's input lie in begin, and the last one ends, in 0..1 of the image inside."""
    begins = np.searchsorted(cells, np.arange(cells[-1] + 2))
    return ((begins.clip(inside.start, inside.stop) - inside.start) / (inside.stop - inside.start)).tolist()


def error_map(label: np.ndarray, mask: np.ndarray, final: np.ndarray) -> np.ndarray:
    """The pixels of ERRORS, uint8 [H, W, 3], of a label, an exit's mask and the original network's, each uint8 [H, W]."""
    here, there = mask == label, final == label
    kind = np.select([label == IGNORE, here & there, there, here], [4, 0, 2, 3], 1)
    return np.array([*ERRORS.values()], np.uint8)[kind]


def confidence_map(logits: tf.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Largest probability of each pixel, uint8 [H, W, 3] in CONFIDENCE_COLOURS."""
    probability = tf.nn.softmax(tf.image.resize(logits, size))[0].numpy().max(-1)
    knots = np.linspace(0, 1, len(CONFIDENCE_COLOURS))
    return np.stack([np.interp(probability, knots, channel) for channel in zip(*CONFIDENCE_COLOURS, strict=True)], -1).astype(np.uint8)


def fitting(items: Iterable[Any], limit: int) -> list[Any]:
    """The first items whose JSON takes at most so many bytes in all, and at least one."""
    taken, size = [], 0
    for item in items:
        size += len(json.dumps(item))
        if taken and size > limit:
            break
        taken.append(item)
    return taken


def gallery(
    network: MultiExitNetwork,
    examples: Examples,
    stats: Stats,
    outcome: Chosen,
    deployment: Deployment,
    size: tuple[int, int],
    resize: str,
) -> Iterator[dict[str, Any]]:
    """Images with their label and, at each chosen exit and the original's, mask, confidence, errors and mIoU in percent.

    Where regions decide, also the exit that each cell has its answer from, and mask and errors that come of it.
    """
    chosen = chain_of(deployment)
    shown = list(dict.fromkeys([*chosen, FINAL]))
    miou = np.array([100 * metrics.miou(*stats.counts(stats.candidates.index(name))) for name in shown])  # [exits, I]
    leaves_at, here = outcome.reached, 100 * metrics.miou(*outcome.counts)
    thetas, decides = tuple((each.theta_pix, each.theta_img) for each in deployment.exits[:-1]), not deployment.regions
    sure = [image_confidence(stats, deployment, k) for k, each in enumerate(deployment.exits) if decides and each.theta_pix is not None]
    surest = sure[0] if sure else here
    if deployment.regions:
        plan, surest = plan_of(network, chosen, deployment.regions, size), outcome.cells[:, 0]
        outcomes = Outcomes(network, plan, size)
    features_of = network.features(shown)

    @tf.function(autograph=False)
    def logits_of(image: tf.Tensor) -> list[tf.Tensor]:
        features = features_of(image, training=False)
        return [tf.cast(network.head_logits(name, features), tf.float32) for name in shown]

    colours = np.vstack([palette(len(stats.classes)), [ERRORS["no label"]]]).astype(np.uint8)
    for index in progress(worth_showing(here, miou[-1] - here, leaves_at, surest), "report", "image"):
        image, label = examples.load(index)
        inside = placed(image.shape[:2], size, resize)
        label = mask_at(label, tuple(part.stop - part.start for part in inside), "stretch")
        shrink = min(1.0, IMAGE_SIDE / max(image.shape[:2]))
        display = tuple(max(1, round(shrink * side)) for side in image.shape[1::-1])
        logits = logits_of(network_input(image, size, resize))
        masks = [policy.decide(each, size, ())["mask"][0].numpy()[inside] for each in logits]
        at_exits = [
            {
                "miou": float(miou[k, index]),
                "sure": 100 * float(sure[k][index]) if k < len(sure) else None,
                "mask": data_uri(colours[masks[k]], display, None),
                "confidence": data_uri(confidence_map(logits[k], size)[inside], display, 50),
                "errors": data_uri(error_map(label, masks[k], masks[-1]), display, None),
            }
            for k in range(len(shown))
        ]
        of_cells = None
        if deployment.regions:
            outcomes.take(network_input(image, size, resize))
            ran = outcomes.outcome(tuple(chosen), thetas)
            mask = ran.mask[inside]
            of_cells = {
                "exits": ran.exits.tolist(),
                "rows": edges(plan.cells[0], inside[0]),
                "columns": edges(plan.cells[1], inside[1]),
                "shares": outcome.cells[index].tolist(),
                "spent": (unit(deployment.predicted.cost_name)[1] * outcome.spent[index]).tolist(),
                "mask": data_uri(colours[mask], display, None),
                "errors": data_uri(error_map(label, mask, masks[-1]), display, None),
            }
        yield {
            "name": stats.images[index],
            "photo": data_uri(image, display, 75),
            "label": data_uri(colours[np.minimum(label, len(stats.classes))], display, None),
            "size": display,
            "leaves": int(leaves_at[index]),
            "miou": float(here[index]),
            "surest": float(surest[index]),
            "lost": float(miou[-1, index] - here[index]),
            "exits": at_exits,
            "cells": of_cells,
        }


# === Page ===


def result(stats: Stats, outcome: Chosen, deployment: Deployment) -> list[dict[str, Any]]:
    """Original, predicted and their difference, mIoU in percent, costs in the unit shown, with 95 % intervals where there are any."""
    predicted, reference = deployment.predicted, deployment.original
    scale = unit(predicted.cost_name)[1]
    rows = [
        {"name": "original", "miou": 100 * reference.miou, "mean": scale * reference.cost, "p90": scale * reference.cost, "speed_up": 1.0},
        {
            "name": "predicted",
            "miou": 100 * predicted.miou,
            "miou_interval": [100 * value for value in predicted.miou_interval],
            "mean": scale * predicted.cost_mean,
            "mean_interval": [scale * value for value in predicted.cost_interval],
            "p90": scale * predicted.cost_p90,
            "speed_up": reference.cost / predicted.cost_mean,
            "speed_up_interval": [reference.cost / value for value in reversed(predicted.cost_interval)],
        },
    ]
    if deployment.setting != ANYTIME:  # whose mIoU is a mean over deadlines
        before, after = rows
        interval = [100 * value for value in difference_interval(stats, outcome)]
        changes = {key: after[key] - before[key] for key in ("miou", "mean", "p90")}
        rows.append({"name": "difference", "miou_interval": interval} | changes)
    return rows


def asked(deployment: Deployment) -> str:
    """What the search was to reach, and what is promised, in words."""
    objective, promise = deployment.constraint, deployment.guarantee
    drop, share = (deployment.asked.max_drop_pp, deployment.asked.cost_share) if deployment.asked else (None, None)
    limits = [] if objective.min_miou is None else [f"an mIoU of at least {100 * objective.min_miou:.2f} %"]
    if drop is not None:  # the limit that it comes to is none where the original is no better than that
        limits = [f"an mIoU {f'at most {drop:g} pp below' if drop >= 0 else f'at least {-drop:g} pp above'} the original's"]
    for name, limit in objective.limits.items():
        of_original = f", {share:g} of the original's" if share and name == deployment.predicted.cost_name else ""
        limits.append(f"{name} of at most {shown(name, limit, 6)}{of_original}")
    words = f"Asked for {'the best mIoU' if objective.minimise is None else f'the least {objective.minimise}'}"
    words += f"{' with ' if limits else ''}{' and '.join(limits)}."
    if promise is not None:
        against = "the original network" if promise.risk == "final" else "the labels"
        words += f" Risk against {against} at most {promise.max_risk:g} with confidence {promise.confidence:g}, for images like these."
    return words


def choice(deployment: Deployment) -> str:
    """Precision and backend, and what else there was to choose from, in words; empty where nothing is known of them."""
    unit_name, scale = unit(deployment.predicted.cost_name)
    words = " on ".join(filter(None, (deployment.precision, deployment.backend)))
    words += ", where every region decides" if words and deployment.regions else ""
    others, who = [], len({each.decide for each in deployment.combinations}) > 1
    for each in deployment.combinations:
        if (each.backend, each.precision, each.decide) != (deployment.backend, deployment.precision, deployment.decide):
            figures = "" if each.miou is None else f"{100 * each.miou:.2f} % at {scale * each.cost_mean:.4g} {unit_name}; "
            named = " on ".join(filter(None, (each.precision, each.backend))) + (f" by {each.decide}" if who else "")
            others.append(f"{named} ({figures}{each.reason})")
    return f"Runs in {words}{', chosen before ' if others else ''}{', '.join(others)}." if words else ""


def class_ious(stats: Stats, deployment: Deployment, outcome: Chosen) -> dict[str, list[float | None]]:
    """IoU in percent per class, None where no label holds it, then the mean: of the chosen exits alone, the original and the mixture."""
    chain = [stats.candidates.index(name) for name in chain_of(deployment)]
    columns = {stats.candidates[k]: stats.counts(k) for k in dict.fromkeys([*chain, -1])}
    columns["chosen mixture"] = outcome.counts
    sums = {name: [count.sum(0) for count in counts] for name, counts in columns.items()}
    iou = {name: 100 * np.append(metrics.class_iou(*counts), metrics.miou(*counts)) for name, counts in sums.items()}
    return {name: [None if np.isnan(value) else float(value) for value in values] for name, values in iou.items()}


def page(
    workdir: Path,
    title: str,
    network: MultiExitNetwork,
    examples: Examples,
    size: tuple[int, int],
    resize: str,
    stats: Stats,
    deployment: Deployment,
    latencies: LatencyTable | None,
    regions: RegionStats | None = None,
) -> str:
    """The HTML page.

    Args:
      workdir: of the training, with its logs.
      title: of the page.
      network: trained.
      examples: the calibration split that `stats` was made of.
      size: (height, width) in pixels of the exported network.
      resize: how images are fitted to it, see `images.fit`.
      stats, deployment: of the workdir.
      latencies: what the search read, None if its costs were MACs.
      regions: statistics of them, where they decide.

    Raises:
      ValueError: see `searched_costs`.
    """
    costs = searched_costs(stats, deployment, latencies)
    outcome = chosen_of(stats, costs, deployment, regions, latencies)
    checks, checked = judging(stats, deployment), None
    if regions is not None and checks is not stats:
        checked = select(regions, np.array([stats.images.index(name.rpartition("#")[0]) for name in checks.images]))
    judged = outcome if checks is stats else chosen_of(checks, costs, deployment, checked, latencies)
    drawn = {  # by report.js
        "unit": unit(costs.name)[0],
        "exits": exit_names(stats),
        "front": front_space(deployment),
        "points": front_points(stats, costs, deployment, outcome.predicted),
        "rates": exit_rate_curves(stats, deployment),
        "cells": cell_curves(deployment, outcome),
        "training": training_panels(workdir, stats.exits),
        "shown": list(dict.fromkeys([*chain_of(deployment), FINAL])),
        "images": fitting(gallery(network, examples, stats, outcome, deployment, size, resize), IMAGE_BYTES),
        "confidence_colours": css_colours(CONFIDENCE_COLOURS),
        "errors": [*zip(ERRORS, css_colours(ERRORS.values()), strict=True)],
        "needed": [None if deployment.regions or each.theta_img is None else 100 * each.theta_img for each in deployment.exits],
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html").render(
        title=title,
        drawn=drawn,
        stats=stats,
        deployment=deployment,
        result=result(checks, judged, deployment),
        budgets=[] if regions is None else taken_shares(regions, configuration_of(regions, deployment.exits)).tolist(),
        asked=asked(deployment),
        choice=choice(deployment),
        classes=class_ious(stats, deployment, outcome),
        certificate=dataclasses.asdict(deployment.certificate),
        latencies=[] if latencies is None else latencies.rows,
        palette=css_colours(palette(len(stats.classes))),
    )


def run(workdir: str | os.PathLike, data_dir: str = "", latency: str | os.PathLike = "") -> Path:
    """Writes WORKDIR/report/index.html, and beside it the deployment.json that it was made from; returns the page's path.

    Args:
      workdir: of a training, with stats.npz and deployment.json.
      data_dir: root of the data; empty for where training found it.
      latency: the latency.json that was searched; empty for the workdir's.

    Raises:
      ValueError: the deployment was searched in other statistics, or with other latencies or none.
    """
    workdir = Path(workdir)
    deployment = Deployment.load(workdir / DEPLOYMENT)
    made_from = (workdir / DEPLOYMENT).read_bytes()
    path = workdir / deployment.named(STATS)
    stats = Stats.load(path)
    deployment.check_stats(workdir / DEPLOYMENT, path)
    check_writable("workdir", workdir, folder=True)
    regions = None
    if deployment.regions:
        regions = RegionStats.load(workdir / deployment.named(REGIONS))
        required = "that of the statistics of the deployment; calibrate and search again"
        check(regions.stats_sha256 == deployment.stats_sha256, f"{REGIONS}: stats_sha256", required, regions.stats_sha256)
    latencies = None
    if deployment.predicted.cost_name == "macs":
        check(not latency, "latency", "left out where the search counted MACs", latency)
    else:
        latencies = LatencyTable.load(latency or workdir / "latency.json")
    config = configs.with_data_dir(configs.load_config(workdir), data_dir)
    examples = open_split(config.data, stats.split)
    network = load_network(workdir, config, examples.info.num_classes)
    title = f"{config.backbone.name} on {config.data.source}: {workdir.resolve().name}"
    of_data = (examples, config.data.input_size, config.data.resize)
    text = page(workdir, title, network, *of_data, stats, deployment, latencies, regions)
    path = page_path(workdir)
    path.parent.mkdir(exist_ok=True)
    path.with_name(DEPLOYMENT).unlink(missing_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    write_atomically(path.with_name(DEPLOYMENT), lambda temporary: temporary.write_bytes(made_from))
    return path


def page_path(workdir: str | os.PathLike) -> Path:
    """Where the page of a work folder is."""
    return Path(workdir, "report", "index.html")


def is_reported(workdir: str | os.PathLike) -> bool:
    """Whether WORKDIR/report is of WORKDIR/deployment.json."""
    page, now = page_path(workdir), Path(workdir, DEPLOYMENT)
    then = page.with_name(DEPLOYMENT)
    return all(path.exists() for path in (page, then, now)) and then.read_bytes() == now.read_bytes()


def main() -> None:
    allow_flags()
    print(run(FLAGS.workdir, FLAGS.data_dir, FLAGS.latency))
