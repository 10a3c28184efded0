"""What a training and its search came to, as one HTML page and PNGs.

`python -m mess_tf.report --workdir=W [--data_dir=D] [--latency=latency.json]`, after `mess_tf.search`, writes WORKDIR/report/: index.html,
which holds everything and needs nothing else, and each of its pictures as PNG. The lines of its charts take the colour of the page's text,
so that it reads in light and dark.
"""

import dataclasses
import html
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import tensorflow as tf
from absl import flags
from matplotlib.figure import Figure

from mess_runtime.benchmark import LatencyTable
from mess_runtime.bundle import file_sha256, read_json, write_atomically
from mess_tf import configs, metrics, terminal
from mess_tf.data.examples import Examples, palette
from mess_tf.data.pipelines import resize_image
from mess_tf.data.sources import open_split
from mess_tf.files import Deployment, Stats
from mess_tf.graph import policy
from mess_tf.network.model import MultiExitNetwork, load_network
from mess_tf.network.originals import define_flags
from mess_tf.optimise.space import Costs, evaluate_configuration, latency_costs, macs_costs

STRIPS = 5
INK = "#010203"  # stands for the colour of the page's text in every SVG
STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>
:root {{ color-scheme: light dark; --line: #8886; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 0 auto; padding: 1rem 1.5rem 4rem; }}
h2 {{ margin-top: 2.5rem; border-bottom: 1px solid var(--line); }}
svg, img {{ max-width: 100%; height: auto; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .15rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }}
th:first-child, td:first-child {{ text-align: left; }}
p, figcaption {{ max-width: 75ch; }} figure {{ margin: 0; }} figcaption {{ opacity: .75; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def exit_colours(exits: Sequence[str]) -> dict[str, tuple]:
    """A colour per exit, shallow to deep, readable on white and on black."""
    return dict(zip(exits, matplotlib.colormaps["turbo"](np.linspace(0.12, 0.88, len(exits))), strict=True))


def exit_of(candidate: str) -> str:
    """`exit1.fcn-r1-b0` to `exit1`."""
    return candidate.partition(".")[0]


# === Pictures ===


def front_picture(stats: Stats, costs: Costs, deployment: Deployment) -> Figure:
    """Accuracy against cost: every candidate left at alone, the front of these, the original and the chosen configuration."""
    scale, unit = (1e-9, "GMACs") if costs.name == "macs" else (1.0, "ms")
    cost = scale * (costs.prefix[stats.exit_of_candidate] + costs.head)
    miou = 100 * metrics.miou(stats.tp.sum(1), stats.fp.sum(1), stats.fn.sum(1))
    figure = Figure((9, 5))
    axes = figure.add_subplot(xlabel=f"mean {unit} per image", ylabel=f"mIoU % on {stats.split}")
    for name, colour in exit_colours(stats.exits).items():
        here = [k for k, candidate in enumerate(stats.candidates) if exit_of(candidate) == name]
        axes.scatter(
            cost[here], miou[here], s=70 if name == "final" else 22, color=[colour], marker="*" if name == "final" else "o", label=name
        )
    order = np.argsort(cost)
    best = np.maximum.accumulate(miou[order])
    front = order[miou[order] >= best]
    axes.step(cost[front], miou[front], where="post", color=INK, linewidth=0.8, label="best exit alone")
    predicted = deployment.predicted
    axes.scatter(scale * predicted.cost_mean, 100 * predicted.miou, s=190, facecolors="none", edgecolors=INK, linewidths=2, label="chosen")
    axes.axhline(100 * deployment.original.miou, color=INK, linewidth=0.8, linestyle=":", label="original's mIoU")
    low = min(miou[front].min(), 100 * predicted.miou)
    axes.set_ylim(low - 3, miou.max() + 1.5)
    axes.legend(ncols=2, loc="lower right")
    return figure


def exit_rates_picture(stats: Stats, deployment: Deployment) -> Figure:
    """Share of images that would leave at the first chosen exit for each threshold of its image confidence, and the confidences."""
    choice = deployment.exits[0]
    confidence = np.sort(image_confidence(stats, deployment, 0))
    figure = Figure((9, 3.2))
    axes = figure.add_subplot(xlabel=f"image confidence at {choice.exit}, pixels above {choice.theta_pix:.2f}", ylabel="images")
    axes.hist(confidence, bins=24, color=exit_colours(stats.exits)[choice.exit], alpha=0.7)
    axes.axvline(choice.theta_img, color=INK, linewidth=1.5)
    axes.annotate("leaves →", (choice.theta_img, axes.get_ylim()[1]), xytext=(4, -12), textcoords="offset points")
    rate = axes.twinx()
    rate.spines["right"].set_visible(True)
    rate.set(ylabel="% of images leaving, by threshold", ylim=(0, 105))
    rate.step(confidence, 100 * (1 - np.arange(confidence.size) / confidence.size), where="pre", color=INK, linewidth=0.9)
    return figure


def training_picture(workdir: Path, exits: Sequence[str]) -> Figure:
    """Losses and val mIoU of every exit over both stages; of stage 2's heads, the mean loss and the best mIoU of each exit."""
    stages = [name for name in ("stage1", "stage2") if (workdir / "logs" / name / "metrics.jsonl").exists()]
    figure = Figure((9, 5.5))
    axes = figure.subplots(2, len(stages), squeeze=False)
    for column, stage in enumerate(stages):
        rows = [json.loads(line) for line in (workdir / "logs" / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for line, (field, join, label) in enumerate((("loss", np.mean, "loss"), ("miou", max, "val mIoU %"))):
            panel = axes[line, column]
            panel.set(title=stage if line == 0 else None, xlabel="epoch", ylabel=label)
            curves: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                for name, keys in itertools.groupby(row.get(field, {}), exit_of):
                    value = float(join([row[field][key] for key in keys]))
                    curves.setdefault(name, []).append((row["epoch"], 100 * value if field == "miou" else value))
            for name in curves:
                colour = exit_colours(exits)[name]
                panel.plot(
                    *zip(*curves[name], strict=True), color=colour, label=name, marker="o" if field == "miou" else None, markersize=3
                )
            panel.legend(fontsize=8, ncols=2)
    return figure


def image_confidence(stats: Stats, deployment: Deployment, index: int) -> np.ndarray:
    """Share of confident pixels of every calibration image at a chosen exit that decides, float64 [I]."""
    choice = deployment.exits[index]
    candidate = stats.candidates.index(f"{choice.exit}.{choice.head}")
    threshold = int(np.flatnonzero(stats.theta_pix == choice.theta_pix)[0])
    return stats.confident[candidate, :, threshold, int(deployment.edge_aware)] / stats.pixels


def strips(network: MultiExitNetwork, examples: Examples, stats: Stats, deployment: Deployment, size: tuple[int, int], leaves_at) -> Figure:
    """Some images in rows, from sure to unsure at the first chosen exit: image, label, each chosen exit's mask and confidence."""
    names = [f"{choice.exit}.{choice.head}" for choice in deployment.exits]
    features_of = network.features(names)
    decides = deployment.exits[0].theta_pix is not None
    order = np.argsort(-image_confidence(stats, deployment, 0)) if decides else np.arange(len(examples))
    chosen = order[np.linspace(0, len(order) - 1, min(STRIPS, len(order))).astype(int)]
    colours = np.vstack([palette(len(stats.classes)), [0, 0, 0]]).astype(np.uint8)
    figure = Figure((2.3 * (2 + 2 * len(names)), 1.9 * len(chosen)))
    axes = figure.subplots(len(chosen), 2 + 2 * len(names), squeeze=False)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    for row, index in zip(axes, chosen, strict=True):
        image, label = examples.load(index)
        row[0].imshow(image)
        row[1].imshow(colours[np.minimum(label, len(stats.classes))])
        row[1].set_xlabel("label", fontsize=8)
        features = features_of(resize_image(tf.cast(image[None], tf.float32), size), training=False)
        for k, name in enumerate(names):
            logits = tf.cast(network.head_logits(name, features), tf.float32)
            probability = tf.nn.softmax(tf.image.resize(logits, size))[0].numpy().max(-1)
            row[2 + 2 * k].imshow(colours[policy.decide(logits, size, ())["mask"][0].numpy()])
            row[3 + 2 * k].imshow(probability, vmin=0, vmax=1, cmap="magma")
            here = ", leaves here" if leaves_at[index] == k else ""
            row[2 + 2 * k].set_xlabel(f"{deployment.exits[k].exit}{here}", fontsize=8)
            if deployment.exits[k].theta_pix is not None:
                row[3 + 2 * k].set_xlabel(f"confident: {image_confidence(stats, deployment, k)[index]:.1%}", fontsize=8)
        row[0].set_xlabel(Path(stats.images[index]).name, fontsize=8)
    return figure


# === Page ===


def svg(figure: Figure) -> str:
    """A figure as an SVG element whose ink is the colour of the text around it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=150, transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(INK, "currentColor", text[text.index("<svg") :])


def html_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Cells are escaped; numbers come as text already."""
    cells = [f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(cells)}</tbody></table></div>'


def summary_table(deployment: Deployment) -> str:
    """Original and chosen configuration side by side."""
    predicted, reference = deployment.predicted, deployment.original
    scale, unit = (1e-9, "GMACs") if predicted.cost_name == "macs" else (1.0, "ms")
    rows = [
        ("original", f"{100 * reference.miou:.2f}", f"{scale * reference.cost:.4g}", f"{scale * reference.cost:.4g}", "1"),
        (
            f"chosen ({deployment.setting})",
            f"{100 * predicted.miou:.2f}",
            f"{scale * predicted.cost_mean:.4g}",
            f"{scale * predicted.cost_p90:.4g}",
            f"{reference.cost / predicted.cost_mean:.2f}×",
        ),
    ]
    return html_table(["", "mIoU %", f"mean {unit}", f"p90 {unit}", "speed-up"], rows)


def exits_table(deployment: Deployment) -> str:
    """The chosen exits, their heads and thresholds, and how many images leave there."""
    rows = []
    for choice, rate in zip(deployment.exits, deployment.predicted.exit_rates, strict=True):
        thresholds = ["–" if value is None else f"{value:.4f}" for value in (choice.theta_pix, choice.theta_img)]
        rows.append((choice.exit, choice.head, *thresholds, f"{rate:.1%}"))
    return html_table(["exit", "head", "θ_pix", "θ_img", "leave here"], rows)


def class_table(stats: Stats, deployment: Deployment, leaves_at: np.ndarray) -> str:
    """IoU per class of each chosen exit alone, of the original and of the mixture, in percent."""
    chain = [stats.candidates.index(f"{choice.exit}.{choice.head}") for choice in deployment.exits]
    images = np.arange(len(stats.images))
    columns = {stats.candidates[k]: [counts[k].sum(0) for counts in (stats.tp, stats.fp, stats.fn)] for k in dict.fromkeys([*chain, -1])}
    columns["chosen mixture"] = [counts[np.array(chain)[leaves_at], images].sum(0) for counts in (stats.tp, stats.fp, stats.fn)]
    iou = np.stack([metrics.class_iou(*counts) for counts in columns.values()], axis=1)
    rows = [
        (name, *("–" if np.isnan(value) else f"{100 * value:.1f}" for value in row)) for name, row in zip(stats.classes, iou, strict=True)
    ]
    rows.append(("mean", *(f"{100 * metrics.miou(*counts):.2f}" for counts in columns.values())))
    return html_table(["class", *columns], rows)


def certificate_table(deployment: Deployment) -> str:
    """What the search covered, and how."""
    rows = []
    for field, value in dataclasses.asdict(deployment.certificate).items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        rows += [
            (f"{field} {name}".strip(), f"{entry:,.4g}" if isinstance(entry, float) else f"{entry:,}" if isinstance(entry, int) else entry)
            for name, entry in entries
        ]
    return html_table(["", ""], rows)


def latency_table(table: LatencyTable) -> str:
    """Every measured submodel."""
    header = ["submodel", "device", "backend asked", "obtained", "threads", "p50 ms", "p90 ms", "runs", "KiB"]
    rows = [
        (
            row.submodel,
            row.device,
            row.backend_requested,
            row.backend_obtained,
            row.threads,
            f"{row.p50_ms:.2f}",
            f"{row.p90_ms:.2f}",
            row.runs,
            f"{row.size_bytes / 1024:.0f}",
        )
        for row in table.rows
    ]
    return html_table(header, rows)


@dataclasses.dataclass(frozen=True)
class Section:
    """One heading of the page: a caption, then a picture (which is also written as `name`.png) or a table."""

    title: str
    caption: str
    content: Figure | str
    name: str = ""


def page(title: str, sections: Sequence[Section]) -> str:
    """The HTML page."""
    parts = []
    for section in sections:
        if isinstance(section.content, Figure):
            with matplotlib.rc_context({"svg.hashsalt": section.name}):  # two pictures on one page share no ids
                content = svg(section.content)
        else:
            content = section.content
        parts.append(
            f"<h2>{html.escape(section.title)}</h2><figure>{content}<figcaption>{html.escape(section.caption)}</figcaption></figure>"
        )
    return PAGE.format(title=html.escape(title), body="\n".join(parts))


def report(
    workdir: Path,
    network: MultiExitNetwork,
    examples: Examples,
    size: tuple[int, int],
    stats: Stats,
    deployment: Deployment,
    latencies: LatencyTable | None,
) -> list[Section]:
    """Collects the sections of the page.

    Args:
      workdir: of the training, with its logs.
      network: trained.
      examples: the calibration split that `stats` was made of.
      size: (height, width) in pixels of the exported network.
      stats, deployment: of the workdir.
      latencies: what the search read, None if its costs were MACs.

    Raises:
      ValueError: if the latencies were measured on several devices or thread counts, or are of other submodels.
    """
    costs = macs_costs(stats) if latencies is None else latency_costs(stats, [dataclasses.asdict(row) for row in latencies.rows])
    leaves_at = evaluate_configuration(stats, costs, deployment)[2]
    sections = [
        Section("Result", f"Predicted from {len(stats.images)} images of {stats.split}.", summary_table(deployment)),
        Section(
            "Chosen exits", "An image leaves at the first exit whose share of confident pixels reaches θ_img.", exits_table(deployment)
        ),
        Section(
            "Accuracy and cost",
            "Each dot is one head, run alone for every image (budgeted).",
            front_picture(stats, costs, deployment),
            "front",
        ),
    ]
    if deployment.exits[0].theta_pix is not None:
        caption = "Images by their confidence at the first chosen exit, and how many would leave if the threshold were elsewhere."
        sections.append(Section("Exit rates", caption, exit_rates_picture(stats, deployment), "exit_rates"))
    sections += [
        Section(
            "Examples",
            "From the surest to the least sure image at the first exit: image, label, each mask and its confidence (bright is sure).",
            strips(network, examples, stats, deployment, size, leaves_at),
            "examples",
        ),
        Section("IoU per class", "In percent; a class that no label holds has none.", class_table(stats, deployment, leaves_at)),
        Section(
            "Training",
            "Stage 2 shows each exit's mean loss over its heads and the mIoU of its best head.",
            training_picture(workdir, stats.exits),
            "training",
        ),
        Section(
            "Search certificate",
            "Every covered configuration was scored, or cut by a rule that proves it no better.",
            certificate_table(deployment),
        ),
    ]
    if latencies is not None:
        sections.append(Section("Latencies", "Of every submodel; those of a deployment are sums of these.", latency_table(latencies)))
    return sections


def main() -> None:
    workdir = Path(FLAGS.workdir)
    deployment = Deployment.load(workdir / "deployment.json")
    stats = Stats.load(workdir / "stats.npz")
    if deployment.stats_sha256 and deployment.stats_sha256 != file_sha256(workdir / "stats.npz"):
        raise ValueError(f"{workdir / 'deployment.json'}: must be searched in this stats.npz; run mess_tf.search again")
    latencies = None
    if deployment.predicted.cost_name != "macs":
        latencies = read_json(FLAGS.latency or workdir / "latency.json", LatencyTable.from_json)
    config = configs.with_data_dir(configs.load_config(FLAGS.workdir), FLAGS.data_dir)
    examples = open_split(config.data, stats.split)
    network = load_network(FLAGS.workdir, config, examples.info.num_classes)
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        sections = report(workdir, network, examples, config.data.input_size, stats, deployment, latencies)
        for section in sections:
            if isinstance(section.content, Figure):
                path = folder / f"{section.name}.png"
                write_atomically(
                    path, lambda temporary, figure=section.content: figure.savefig(temporary, format="png", dpi=110, facecolor="white")
                )
        text = page(f"{config.backbone.name} on {config.data.source}: {os.path.basename(workdir.resolve())}", sections)
    write_atomically(folder / "index.html", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(folder / "index.html")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    define_flags()
    flags.DEFINE_string("workdir", None, "folder of a training, with stats.npz and deployment.json", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_string("latency", "", "the latency.json that was searched; default: the workdir's")
    terminal.run(main)
