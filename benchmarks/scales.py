"""Would an early exit at another input size pay? The same weights serve any size: a small input first, and the network's own where unsure.

`python benchmarks/scales.py --workdir W [--data_dir D] [--scales 0.5,0.75,1]`, from a trained work folder, without an export. One decision
per image, by the share of confident pixels. Printed, for each largest loss of `--drops`: the largest speed-up in multiply-accumulates over
the final exit at the input's own size, and, at equal cost, the best mIoU, for
  one exit        any exit at any of the sizes, for all images
  same size       an early exit and a later one at any one of the sizes: layers are shared
  another size    an exit at one size, then any at another: nothing is shared but weights
Exits, sizes and thresholds are chosen and judged on the same images. 95 % intervals are of --resamples resamples of the images, the choice
held. The last line is one JSON object.
"""

import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import app, flags
from common import Trained, define_flags
from regions import Cells, Costs, collect, miou

from mess_tf.rescale import rescale

ONE, SAME, ANOTHER = "one exit", "same size", "another size"


@dataclasses.dataclass(frozen=True, eq=False)
class Size:
    """The network at one size of its input.

    Attributes:
      names: of the exits.
      images: what they do to each image.
      values: [K, I, 2C], right and predicted pixels by class.
      reach, head: [K], multiply-accumulates.
    """

    names: list[str]
    images: Cells
    values: np.ndarray
    reach: np.ndarray
    head: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """A way to run the images.

    Attributes:
      way, words: which.
      miou: in 0..1.
      leaves: bool [I], which images leave early.
      early, late: [I, 2C], counts of those that do and of those that do not.
      first, more: cost of all images, and of those that do not leave.
    """

    way: str
    words: str
    miou: float
    leaves: np.ndarray
    early: np.ndarray
    late: np.ndarray
    first: float
    more: float

    @property
    def costs(self) -> np.ndarray:
        """Of each image."""
        return self.first + self.more * ~self.leaves

    @property
    def cost(self) -> float:
        """Mean over the images."""
        return self.first + self.more * float(1 - self.leaves.mean())

    @property
    def counts(self) -> np.ndarray:
        """Right and predicted pixels of each image by class: [I, 2C]."""
        return np.where(self.leaves[:, None], self.early, self.late)


def at_scale(scale: float, folder: Path) -> Size:
    """Runs the network at a size of its input over the split."""
    output = folder / f"{scale:g}"
    rescale(Path(FLAGS.workdir).resolve(), scale, output)
    workdir, FLAGS.workdir = FLAGS.workdir, str(output)
    trained = Trained()
    FLAGS.workdir = workdir
    if trained.config.data.resize != "stretch":
        raise app.UsageError("data.resize: must be stretch")
    costs = Costs(trained)
    names = [f"{name} at {scale:g}" for name in trained.candidates]
    images = collect(trained, [0])[0]
    return Size(names, images, np.concatenate([images.tp, images.predicted], -1), costs.reach * costs.whole, costs.head * costs.whole)


def choices(sizes: list[Size]) -> Iterator[Choice]:
    """Every exit alone, and every pair of exits at every option."""
    label = sizes[0].images.label.sum(0)

    def score(counts: np.ndarray) -> np.ndarray:
        return miou(label, *np.split(counts, 2, -1))

    ends = [(size, k) for size in sizes for k in range(len(size.names))]
    everything = np.ones(len(sizes[0].images.label), bool)
    for size, k in ends:
        values, cost = size.values[k], float(size.reach[k] + size.head[k])
        yield Choice(ONE, size.names[k], float(score(values.sum(0))), everything, values, values, cost, 0.0)
    for (first, k), (then, m) in itertools.permutations(ends, 2):
        same = first is then
        if same and m < k:
            continue
        cost, more = first.reach[k] + first.head[k], then.reach[m] + then.head[m] - (first.reach[k] if same else 0.0)
        leaves, early, late = first.images.leaves[k], first.values[k], then.values[m]
        accuracy = score(late.sum(0) + leaves.astype(float) @ (early - late))
        for option, words in enumerate(first.images.options):
            named = f"{first.names[k]}, where {words}, then {then.names[m]}"
            way = SAME if same else ANOTHER
            yield Choice(way, named, float(accuracy[option]), leaves[option], early, late, float(cost), float(more))


def intervals(label: np.ndarray, choice: Choice, original: Choice) -> dict[str, list[float]]:
    """95 % of resamples of the images: speed-up and difference in pp against the original."""
    generator, speed, difference = np.random.default_rng(0), [], []
    counts, costs = choice.counts, choice.costs
    for _ in range(FLAGS.resamples):
        draw = generator.integers(len(label), size=len(label))
        speed.append(original.cost / costs[draw].mean())
        here, there = (miou(label[draw].sum(0), *np.split(each[draw].sum(0), 2)) for each in (counts, original.late))
        difference.append(100 * float(here - there))
    return {"speedup_95": np.quantile(speed, [0.025, 0.975]).tolist(), "difference_pp_95": np.quantile(difference, [0.025, 0.975]).tolist()}


def main(argv) -> None:
    del argv
    with tempfile.TemporaryDirectory() as folder:
        sizes = [at_scale(float(scale), Path(folder)) for scale in FLAGS.scales]
    every = [*choices(sizes)]
    whole = sizes[FLAGS.scales.index("1")]
    original = next(choice for choice in every if choice.words == whole.names[-1])
    alone = [choice for choice in every if choice.way == ONE]
    for choice in alone:
        print(f"{choice.words:<32} {100 * choice.miou:.2f} %, {choice.cost / original.cost:.3f} of the MACs")
    figures = {
        "final_miou": original.miou,
        "alone": {choice.words: [choice.miou, choice.cost / original.cost] for choice in alone},
        "best": [],
    }
    asked = [(f"-{drop} pp", original.miou - float(drop) / 100) for drop in FLAGS.drops]
    for way in (ONE, SAME, ANOTHER):
        of_way = [choice for choice in every if choice.way in (ONE, way)]
        found = [(name, min((each for each in of_way if each.miou >= least), key=lambda each: each.cost)) for name, least in asked]
        found.append(("equal cost", max((each for each in of_way if each.cost <= original.cost), key=lambda each: each.miou)))
        for name, choice in found:
            row = {"way": way, "asked": name, "chosen": choice.words, "speedup": original.cost / choice.cost}
            row |= {"difference_pp": 100 * (choice.miou - original.miou)} | intervals(whole.images.label, choice, original)
            figures["best"].append(row)
            speed, difference = ("({:.2f} to {:.2f})".format(*row[f"{each}_95"]) for each in ("speedup", "difference_pp"))
            print(f"{name:<11}{way:<13}{row['speedup']:.2f}x {speed} {row['difference_pp']:+.2f} pp {difference}  {choice.words}")
    print(json.dumps(figures))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    define_flags()
    flags.DEFINE_list("scales", ["0.5", "0.75", "1"], "sizes of the input, 1 among them")
    flags.register_validator("scales", lambda given: "1" in given, "must hold 1")
    flags.DEFINE_list("drops", ["0", "0.25", "1"], "largest losses of mIoU in percentage points")
    flags.DEFINE_integer("resamples", 1000, "of the images", lower_bound=1)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main)
