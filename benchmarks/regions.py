"""What one decision per region would gain over one per image, from a trained work folder, without an export.

`python benchmarks/regions.py --workdir W [--split val] [--cells 8,16,32] [--candidates exit1.HEAD,...,final.original]`. The input is cut
into square cells. A cell leaves at an exit where the share SURE_SHARE of its pixels is at least as confident as theta, else it goes on; its
mask is that of the exit where it left. Costs are ideal multiply-accumulates: layers behind an exit and heads cost in proportion to the
cells that reach them. mIoU is of whole masks at the photos' own size, speed-up and difference are against the final exit alone.

Printed for every early exit and cell, at every theta: speed-up, difference in mIoU, share that goes on. Then, for each largest loss of
`--drops`, the fastest choice of thresholds (and of exits) per way to decide:
  image     one decision per image, both thresholds free, up to --exits early exits
  cell N    cells of N pixels, chains of up to --exits early exits: a cell leaves at the first that is sure of it
  image, then cell N
            one decision per image at an early exit; of the images that go on, cells leave at a later one
  random    any cells, in expectation, one early exit
  oracle N  those cells that gain least by going on, by the tangent of the mIoU, one early exit
Thresholds are chosen and judged on the same images. 95 % intervals are of --resamples resamples of the images, the choice held.

Then `--active EXIT ...` runs the layers behind an exit as a phone does that skips them (`mess_tf.network.regions`, what neighbours see of
cells that have left by `--neighbours`), at the thetas of `--theta`: what it costs in MACs that are really left out, and what
mIoU it has, against all layers everywhere and masks merged afterwards. With `--margins`, so many cells around those that go on are worked
on as well, for what the others see; their answers do not count. The last line is one JSON object.
"""

import mess_tf  # noqa: F401  # isort: skip  # before TensorFlow, which then uses oneDNN
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from absl import app, flags
from common import Trained, define_flags

from mess_runtime.images import mask_at, nearest
from mess_runtime.terminal import progress
from mess_tf import metrics
from mess_tf.configs import IGNORE
from mess_tf.data.pipelines import evaluation_batches, network_input
from mess_tf.graph.exporter import head_cost, tensor_shapes
from mess_tf.learning.steps import SURE_SHARE
from mess_tf.network.costs import model_cost
from mess_tf.network.model import FINAL
from mess_tf.network.regions import NEIGHBOURS, STALE, segment_with_cells

THETA = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)
IMAGE_SHARES = (0.0, *np.round(np.concatenate([np.arange(0.3, 0.9, 0.05), np.arange(0.9, 1.0, 0.01)]), 2).tolist())


@dataclasses.dataclass(frozen=True)
class Cells:
    """What is known of all cells of a split.

    Attributes:
      image: int [N], whose cell it is.
      label: float32 [N, C], labelled pixels by class.
      tp, predicted: float32 [K, N, C], labelled pixels by class that an exit gets right, and gives this class.
      leaves: bool [K, T, N], where T options let a cell leave.
      options: what they are.
    """

    image: np.ndarray
    label: np.ndarray
    tp: np.ndarray
    predicted: np.ndarray
    leaves: np.ndarray
    options: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A chain of early exits and what it does: `stages` of (exit, option), relative MACs, mIoU."""

    stages: tuple[tuple[int, int], ...]
    cost: float
    miou: float


def masks_of(trained: Trained) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of every image its label [H, W], and of all candidates class uint8 and confidence float32 [K, h, w] at the network's size."""
    model = trained.network.submodel(trained.candidates)

    @tf.function(autograph=False)
    def predict(image):
        logits = model(image, training=False)
        full = tf.concat([tf.image.resize(tf.cast(logits[name], tf.float32), trained.size) for name in trained.candidates], 0)
        return tf.cast(tf.argmax(full, -1), tf.uint8), tf.reduce_max(tf.nn.softmax(full), -1)

    batches = evaluation_batches(trained.examples)
    for image, label in progress(batches, "regions", "image"):
        classes, confidence = predict(network_input(image.numpy(), trained.size, "stretch"))
        yield label.numpy()[0], classes.numpy(), confidence.numpy()


def cell_map(size: tuple[int, int], side: int) -> np.ndarray:
    """The number of every pixel's cell, row by row: int [h, w]. A side of 0 makes the image one cell."""
    if not side:
        return np.zeros(size, int)
    rows, columns = (np.arange(length) // side for length in size)
    return rows[:, None] * (columns[-1] + 1) + columns


def counted(label: np.ndarray, classes: np.ndarray, cells: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of each cell by class: labelled [N, C], right and predicted [K, N, C]."""
    rows, columns = (nearest(old, new, np.arange(new)) for old, new in zip(cells.shape, label.shape, strict=True))
    valid = label != IGNORE
    base = cells[rows][:, columns][valid] * num_classes
    truth, shape = label[valid].astype(int), (cells.max() + 1, num_classes)

    def count(places: np.ndarray) -> np.ndarray:
        return np.bincount(places, minlength=shape[0] * shape[1]).reshape(shape)

    tp, predicted = [], []
    for mask in classes:
        mask = mask[rows][:, columns][valid].astype(int)
        tp.append(count((base + truth)[mask == truth]))
        predicted.append(count(base + mask))
    return count(base + truth), np.array(tp), np.array(predicted)


def collect(trained: Trained, sides: Sequence[int]) -> dict[int, Cells]:
    """Runs the network once over the split; a side of 0 stands for whole images."""
    num_classes = trained.examples.info.num_classes
    maps = {side: cell_map(trained.size, side) for side in sides}
    parts: dict[int, list] = {side: [] for side in sides}
    for label, classes, confidence in masks_of(trained):
        for side, cells in maps.items():
            sizes = np.bincount(cells.ravel())
            share = np.array(
                [[np.bincount(cells.ravel(), (each >= theta).ravel()) / sizes for theta in THETA] for each in confidence], np.float32
            )
            parts[side].append((*counted(label, classes, cells, num_classes), share))
    result = {}
    for side, images in parts.items():
        label, tp, predicted, share = zip(*images, strict=True)
        share = np.concatenate(share, -1)  # [K, T, N]
        bounds = (SURE_SHARE,) if side else IMAGE_SHARES
        leaves = np.concatenate([share >= bound for bound in bounds], 1)
        options = tuple(f"{theta:g}" if side else f"{theta:g}/{bound:g}" for bound in bounds for theta in THETA)
        image = np.repeat(np.arange(len(images)), maps[side].max() + 1)
        joined = [np.concatenate(each, axis).astype(np.float32) for each, axis in ((label, 0), (tp, 1), (predicted, 1))]
        result[side] = Cells(image, *joined, leaves, options)
    return result


def miou(label: np.ndarray, tp: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """mIoU in 0..1 from counts [..., C]."""
    return metrics.miou(tp, predicted - tp, label - tp)


class Costs:
    """Ideal MACs relative to the final exit alone, `whole`: `reach[k]` of the layers up to exit k, `head[k]` of its head."""

    def __init__(self, trained: Trained):
        shapes = tensor_shapes(trained.network, trained.size)
        reach = np.array([model_cost(trained.network.features([name]), trained.size).macs for name in trained.candidates], float)
        head = np.array([head_cost(trained.network, name, shapes).macs for name in trained.candidates], float)
        self.whole = reach[-1] + head[-1]
        self.reach, self.head = reach / self.whole, head / self.whole

    def of(self, exits: Sequence[int], shares: Sequence[float]) -> float:
        """Cost of a chain whose exits are reached by these shares of the cells, the first by all."""
        before = 0.0
        total = 0.0
        for k, share in zip(exits, shares, strict=True):
            total += share * (self.reach[k] - before + self.head[k])
            before = self.reach[k]
        return float(total)


def chains(cells: Cells, costs: Costs, most: int) -> list[Choice]:
    """Every chain of at most so many early exits, with every option at each of them."""
    final = len(cells.tp) - 1
    values = np.concatenate([cells.tp, cells.predicted], -1)  # [K, N, 2C]
    classes, label = cells.tp.shape[-1], cells.label.sum(0)
    result = [Choice((), 1.0, float(miou(label, *np.split(values[final].sum(0), 2))))]

    def extend(stages: tuple, going: np.ndarray, done: np.ndarray, shares: list[float]) -> None:
        for k in range(stages[-1][0] + 1 if stages else 0, final):
            leaving = (cells.leaves[k] & going).astype(np.float32)  # [T, N]
            left = done + leaving @ values[k]
            total = left + (going - leaving) @ values[final]
            on = (going.sum() - leaving.sum(1)) / going.size
            accuracy = miou(label, total[:, :classes], total[:, classes:])
            exits = [stage for stage, _ in stages] + [k, final]
            for option in range(len(leaving)):
                result.append(
                    Choice((*stages, (k, option)), costs.of(exits, [*shares, shares_of(going), on[option]]), float(accuracy[option]))
                )
            if len(stages) + 1 < most:
                for option in range(len(leaving)):
                    extend((*stages, (k, option)), going & ~cells.leaves[k, option], left[option], [*shares, shares_of(going)])

    def shares_of(going: np.ndarray) -> float:
        return float(going.mean())

    extend((), np.ones(len(cells.image), bool), np.zeros(2 * classes, np.float32), [])
    return result


def image_then_cells(images: Cells, cells: Cells, costs: Costs) -> list[Choice]:
    """Every early exit with one decision per image in front of every later one with one per cell, with every option at both."""
    final, label = len(cells.tp) - 1, cells.label.sum(0)
    classes, of_image = label.size, np.concatenate([images.tp, images.predicted], -1)
    result = []
    for k in range(1, final):
        counts, on = _last_exits(cells, k, range(len(cells.options)))  # [T, I, 2C], [T, I]
        for first in range(k):
            going = 1.0 - images.leaves[first]  # [S, I]
            total = (1 - going) @ of_image[first] + np.einsum("si,tic->tsc", going, counts)  # [T, S, 2C]
            accuracy = miou(label, total[..., :classes], total[..., classes:])
            reached, went = going.mean(1), going @ on.T / len(images.image)  # [S], [S, T]
            for option, then in np.ndindex(went.shape):
                cost = costs.of([first, k, final], [1, reached[option], went[option, then]])
                result.append(Choice(((first, option), (k, then)), cost, float(accuracy[then, option])))
    return result


def _last_exits(cells: Cells, k: int, options: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of exit k and the final one, by option and image: right and predicted pixels [T, I, 2C], and the share of the cells that go on."""
    values = np.concatenate([cells.tp, cells.predicted], -1)
    leaves, images = cells.leaves[k][list(options)], cells.image[-1] + 1
    counts = [np.where(leave[:, None], values[k], values[-1]).reshape(images, -1, values.shape[-1]).sum(1) for leave in leaves]
    return np.array(counts), 1 - leaves.reshape(len(leaves), images, -1).mean(-1)


def fastest(choices: Sequence[Choice], least: float) -> Choice:
    """The cheapest of those that reach an mIoU; the final exit alone always does where `least` is its own."""
    return min((choice for choice in choices if choice.miou >= least), key=lambda choice: choice.cost)


def random_cells(cells: Cells, costs: Costs) -> list[Choice]:
    """One early exit, a share of the cells taken at random goes on: expected counts."""
    final, label = len(cells.tp) - 1, cells.label.sum(0)
    tp, predicted = cells.tp.sum(1), cells.predicted.sum(1)
    result = []
    for k, share in itertools.product(range(final), np.linspace(0, 1, 101)):
        accuracy = miou(label, *(share * each[final] + (1 - share) * each[k] for each in (tp, predicted)))
        result.append(Choice(((k, round(100 * share)),), costs.of([k, final], [1, share]), float(accuracy)))
    return result


def oracle(cells: Cells, costs: Costs) -> list[Choice]:
    """One early exit, those cells go on whose mIoU gains most by it, by the tangent of the mIoU, drawn three times."""
    final, label = len(cells.tp) - 1, cells.label.sum(0)
    held = label > 0
    result = []
    for k, share in itertools.product(range(final), np.linspace(0, 1, 41)):
        more_tp, more = cells.tp[final] - cells.tp[k], cells.predicted[final] - cells.predicted[k]
        on = np.zeros(len(cells.image), bool)
        for _ in range(3):
            tp, predicted = (each[k].sum(0) + extra[on].sum(0) for each, extra in ((cells.tp, more_tp), (cells.predicted, more)))
            union = np.maximum(label + predicted - tp, 1)
            gain = (more_tp / union - tp / union**2 * (more - more_tp))[:, held].mean(1)
            on = np.zeros_like(on)
            on[np.argsort(-gain, kind="stable")[: round(share * on.size)]] = True
            on &= gain > 0
        accuracy = miou(label, *(each[k].sum(0) + extra[on].sum(0) for each, extra in ((cells.tp, more_tp), (cells.predicted, more))))
        result.append(Choice(((k, round(100 * share)),), costs.of([k, final], [1, float(on.mean())]), float(accuracy)))
    return result


def of_images(cells: Cells, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
    """What a chain does to each image: right and predicted pixels [I, 2C], and the shares of its cells that reach each exit [M + 1, I]."""
    values, size = np.concatenate([cells.tp, cells.predicted], -1), np.bincount(cells.image)
    going, reached, counts = np.ones(len(cells.image), bool), [], np.zeros((size.size, values.shape[-1]))
    for k, option in [*choice.stages, (len(cells.tp) - 1, None)]:
        reached.append(np.bincount(cells.image, going) / size)
        leaving = going if option is None else going & cells.leaves[k, option]
        np.add.at(counts, cells.image[leaving], values[k][leaving])
        going = going & ~leaving
    return counts, np.array(reached)


def of_images_then_cells(images: Cells, cells: Cells, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
    """As `of_images`, where the image decides at the first exit."""
    (first, option), (k, then) = choice.stages
    going = ~images.leaves[first, option]
    [counts], [on] = _last_exits(cells, k, [then])
    early = np.concatenate([images.tp[first], images.predicted[first]], -1)
    return np.where(going[:, None], counts, early), np.array([np.ones(going.size), going, going * on])


def intervals(
    images: Cells, costs: Costs, choice: Choice, counts: np.ndarray, reached: np.ndarray, resamples: int
) -> dict[str, list[float]]:
    """95 % of resamples of the images: speed-up and difference in pp of a chain against the final exit; see `of_images`."""
    final, label = len(images.tp) - 1, images.label
    exits, alone = [k for k, _ in choice.stages] + [final], np.concatenate([images.tp[final], images.predicted[final]], -1)
    generator, speed, difference = np.random.default_rng(0), [], []
    for _ in range(resamples):
        draw = generator.integers(len(label), size=len(label))
        here, there = (float(miou(label[draw].sum(0), *np.split(each[draw].sum(0), 2))) for each in (counts, alone))
        speed.append(1 / costs.of(exits, reached[:, draw].mean(1)))
        difference.append(100 * (here - there))
    return {"speedup_95": np.quantile(speed, [0.025, 0.975]).tolist(), "difference_pp_95": np.quantile(difference, [0.025, 0.975]).tolist()}


def active(
    trained: Trained, costs: Costs, k: int, side: int, neighbours: str, margin: int, theta: Sequence[float]
) -> list[dict[str, object]]:
    """Exit k, then the final one at active cells and a margin of cells around them only: a row for each theta."""
    network, names = trained.network, [trained.candidates[k], FINAL]
    first, _ = network.segments(names)
    segment = segment_with_cells(network, names, 1, trained.size, side, neighbours)

    def full(logits):
        return tf.image.resize(tf.cast(logits, tf.float32), trained.size)

    @tf.function(autograph=False)
    def early(image):
        outputs = first({"image": image}, training=False)
        probabilities = tf.nn.softmax(full(outputs["logits"]))
        return outputs, tf.argmax(probabilities, -1), tf.reduce_max(probabilities, -1)

    @tf.function(autograph=False)
    def late(tensors, answer, classes, confidence, least):
        cells = segment.sure(confidence >= least) < SURE_SHARE
        around = tf.nn.max_pool2d(tf.cast(cells, tf.float32)[..., None], 2 * margin + 1, 1, "SAME")[..., 0]
        logits = segment.answer(answer, segment.masked(tensors, around > 0)["logits"], cells)
        merged = segment.merged(classes, tf.argmax(full(logits), -1), cells)
        return tf.cast(merged, tf.uint8), tf.reduce_mean(tf.cast(cells, tf.float32)), tf.reduce_mean(around)

    num_classes = trained.examples.info.num_classes
    matrices = np.zeros((len(theta), num_classes, num_classes), np.int64)
    shares = np.zeros((2, len(theta)))  # of the cells: those that go on, those that are worked on
    for image, label in progress(evaluation_batches(trained.examples), f"active {names[0]}", "image"):
        outputs, classes, confidence = early(network_input(image.numpy(), trained.size, "stretch"))
        tensors = {name: outputs[name] for name in segment.inputs}
        for t, least in enumerate(theta):
            mask, *share = late(tensors, outputs["logits"], classes, confidence, tf.constant(least))
            matrices[t] += metrics.confusion_matrix(label.numpy(), mask_at(mask.numpy(), label.shape[1:], "stretch"), num_classes)
            shares[:, t] += np.array(share) / len(trained.examples)
    dense, skipped = (value * (costs.reach[-1] + costs.head[-1] - costs.reach[k]) for value in segment.shares_of_macs())
    rows = []
    for t, (least, on, worked) in enumerate(zip(theta, *shares, strict=True)):
        cost = costs.reach[k] + costs.head[k] + dense + skipped * worked
        accuracy = float(metrics.miou(*metrics.class_counts(matrices[t])))
        rows.append({"exit": names[0], "cell": side, "neighbours": neighbours, "margin": margin, "theta": least, "goes_on": on})
        rows[-1] |= {"speedup": 1 / cost, "miou": accuracy}
    return rows


def main(argv) -> None:
    del argv
    trained = Trained()
    if trained.config.data.resize != "stretch":
        raise app.UsageError("data.resize: must be stretch, cells of a letterbox are not counted")
    early = [name.split(".")[0] for name in trained.candidates[:-1]]
    for flag, values, known in (("active", FLAGS.active, early), ("theta", [*map(float, FLAGS.theta)], THETA)):
        if not {*values} <= {*known}:
            raise app.UsageError(f"--{flag}: must be of {', '.join(map(str, known))}, got {values}")
    sides = [0, *map(int, FLAGS.cells)]
    collected = collect(trained, sides)
    costs = Costs(trained)
    final = len(trained.candidates) - 1
    best = float(miou(*(each.sum(0) for each in (collected[0].label, collected[0].tp[final], collected[0].predicted[final]))))
    print(f"{FINAL}: {100 * best:.2f} %, {len(trained.examples)} images of {FLAGS.split}")
    for k, name in enumerate(trained.candidates[:-1]):
        accuracy = miou(*(each.sum(0) for each in (collected[0].label, collected[0].tp[k], collected[0].predicted[k])))
        print(f"{name}: {100 * accuracy:.2f} %, {costs.reach[k] + costs.head[k]:.3f} of the MACs")
    figures = {"final_miou": best, "rows": [], "best": [], "active": []}
    for side in sides[1:]:
        cells = collected[side]
        singles = {choice.stages: choice for choice in chains(cells, costs, 1)}
        for k, name in enumerate(trained.candidates[:-1]):
            parts = []
            for option, theta in enumerate(THETA):
                choice, on = singles[((k, option),)], 1 - float(cells.leaves[k, option].mean())
                row = {"cell": side, "exit": name, "theta": theta, "speedup": 1 / choice.cost}
                figures["rows"].append(row | {"difference_pp": 100 * (choice.miou - best), "goes_on": on})
                parts.append(f"{theta:g}: {1 / choice.cost:.2f}x {100 * (choice.miou - best):+.2f} {on:.0%}")
            print(f"cell {side:<3} {name:<22} " + "  ".join(parts))
    images = collected[0]
    # What each way may choose from, the options of its stages, and what a choice does to each image.
    ways = {"image": (chains(images, costs, min(2, FLAGS.exits)), [images.options] * 2, functools.partial(of_images, images))}
    for side in sides[1:]:
        cells, every = collected[side], chains(collected[side], costs, FLAGS.exits)
        for most in range(1, FLAGS.exits + 1):
            some = [choice for choice in every if len(choice.stages) <= most]
            ways[f"cell {side}, {most} early"] = (some, [cells.options] * most, functools.partial(of_images, cells))
        then = functools.partial(of_images_then_cells, images, cells)
        ways[f"image, then cell {side}"] = (image_then_cells(images, cells, costs), [images.options, cells.options], then)
        ways[f"oracle {side}"] = (oracle(cells, costs), [], None)
    ways["random"] = (random_cells(images, costs), [], None)
    ways["oracle image"] = (oracle(images, costs), [], None)
    for drop in map(float, FLAGS.drops):
        for way, (choices, options, of_choice) in ways.items():
            choice = fastest([*choices, Choice((), 1.0, best)], best - drop / 100)
            row = {"drop_pp": drop, "way": way, "speedup": 1 / choice.cost, "difference_pp": 100 * (choice.miou - best)}
            if of_choice and choice.stages:
                named = zip(choice.stages, options, strict=False)
                row["stages"] = [f"{trained.candidates[k]} at {words[option]}" for (k, option), words in named]
                row |= intervals(images, costs, choice, *of_choice(choice), FLAGS.resamples)
            figures["best"].append(row)
            low_high = "({:.2f} to {:.2f})".format(*row["speedup_95"]) if "speedup_95" in row else ""
            where = ", ".join(row.get("stages", []))
            print(f"-{drop:g} pp  {way:<20} {row['speedup']:.2f}x {low_high} {row['difference_pp']:+.2f} pp  {where}")
    for k, side, neighbours, margin in itertools.product(range(final), sides[1:], FLAGS.neighbours, map(int, FLAGS.margins)):
        if trained.candidates[k].split(".")[0] not in FLAGS.active:
            continue
        for row in active(trained, costs, k, side, neighbours, margin, list(map(float, FLAGS.theta))):
            merged = next(each for each in figures["rows"] if all(each[name] == row[name] for name in ("exit", "cell", "theta")))
            row["difference_pp"] = 100 * (row["miou"] - best)
            figures["active"].append(row)
            print(
                f"{row['exit']}, then final at active cells of {side}, {neighbours}, margin {margin}, theta {row['theta']:g}: "
                f"{row['goes_on']:.0%} go on, "
                f"{row['speedup']:.2f}x {row['difference_pp']:+.2f} pp (ideal {merged['speedup']:.2f}x {merged['difference_pp']:+.2f} pp)"
            )
    print(json.dumps(figures))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    define_flags()
    flags.DEFINE_list("cells", ["8", "16", "32"], "sides of cells in pixels of the network's input")
    flags.DEFINE_list("drops", ["0", "0.25", "1"], "largest losses of mIoU in percentage points")
    flags.DEFINE_list("active", [], "exits behind which layers run at active cells only")
    flags.DEFINE_multi_enum("neighbours", [STALE], NEIGHBOURS, "what they see of cells that have left")
    flags.DEFINE_list("margins", ["0"], "cells around those that go on that are worked on as well")
    flags.DEFINE_list("theta", ["0.8", "0.9", "0.95"], "of --active")
    flags.DEFINE_integer("exits", 3, "early exits of a chain at most", lower_bound=1)
    flags.DEFINE_integer("resamples", 1000, "of the images", lower_bound=1)
    app.run(main)
