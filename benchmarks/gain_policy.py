"""Which policy should say which images leave early? Those of the paper, others, and ones that learn what going on is worth, at equal cost.

`python benchmarks/gain_policy.py --workdir W [--data_dir D]`, from a trained work folder, without an export. For every early exit, the same
shares of the images leave there under every policy, the others at the final exit, hence at equal cost. Those leave first
  oracle               that gain least by going on, in mIoU, by its tangent
  confidence           with most pixels at least as confident as theta, at the theta that is best on other images: the paper's policy
  per-class thresholds the same with a theta for each predicted class, found on other images one after another
  mean confidence      with the highest mean confidence
  worst patch          whose least confident PATCH x PATCH pixels, by their SURE_SHARE quantile, are most confident
  agreement            with most pixels of the same class as at the exit before (none at the first)
  regression           that gain least by a ridge regression on all of that, and on how much of the image is of which class
  random               any, mean over 100 draws
Images are taken in blocks of neighbours (frames of a video are alike); what a block is judged by was fitted on the others. The last line
is one JSON object, of each exit: mIoU % at every share, and `regression_gain_pp`, the regression's mean above that of confidence. Of
three ridge penalties the one that does best counts, which is in the regression's favour.
"""

import dataclasses
import json
import os
from collections.abc import Callable

import numpy as np
from absl import app, flags
from common import Trained, define_flags
from regions import cell_map, counted, masks_of, miou

from mess_tf.learning.steps import SURE_SHARE

SHARES = (0.2, 0.4, 0.6, 0.8)
THETA = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
PATCH = 32  # pixels of the network's input
DRAWS = 100
PENALTIES = (3.0, 30.0, 300.0)


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of every image at every exit.

    Attributes:
      label: [I, C], labelled pixels by class.
      tp, predicted: [K, I, C], labelled pixels by class that an exit gets right, and gives this class.
      area: [K, I, C], share of the pixels that an exit gives a class.
      unsure: [K, I, C, T], share of the pixels that it gives a class with less confidence than theta.
      mean, worst, agreement: [K, I], see above; 0 for the agreement of the first exit.
    """

    label: np.ndarray
    tp: np.ndarray
    predicted: np.ndarray
    area: np.ndarray
    unsure: np.ndarray
    mean: np.ndarray
    worst: np.ndarray
    agreement: np.ndarray


def know(trained: Trained) -> Known:
    """Runs the network once over the split."""
    num_classes, whole = trained.examples.info.num_classes, cell_map(trained.size, 0)
    patches = cell_map(trained.size, PATCH)
    members = [patches == number for number in range(patches.max() + 1)]
    rows = []
    for label, classes, confidence in masks_of(trained):
        held, tp, predicted = counted(label, classes, whole, num_classes)
        of_class = np.stack([classes == number for number in range(num_classes)], 1)  # [K, C, h, w]
        below = np.stack([confidence < theta for theta in THETA], 1)  # [K, T, h, w]
        unsure = np.einsum("kchw,kthw->kct", of_class, below, dtype=np.float32) / whole.size
        worst = np.min([np.quantile(confidence[:, member], 1 - SURE_SHARE, axis=1) for member in members], 0)
        agreement = np.concatenate([[0.0], np.mean(classes[1:] == classes[:-1], (1, 2))])
        rows.append((held[0], tp[:, 0], predicted[:, 0], of_class.mean((2, 3)), unsure, confidence.mean((1, 2)), worst, agreement))
    label, *others = zip(*rows, strict=True)
    return Known(np.array(label), *(np.stack(each, 1) for each in others))


def gains(known: Known, early: int) -> np.ndarray:
    """What each image adds to mIoU by leaving at the final exit, by the tangent in the middle of both: float64 [I]."""
    label = known.label.sum(0)
    tp, predicted = (np.mean([each[k].sum(0) for k in (early, -1)], axis=0) for each in (known.tp, known.predicted))
    union = label + predicted - tp
    held = union > 0

    def worth(k: int) -> np.ndarray:
        here, wrong = known.tp[k], known.predicted[k] - known.tp[k]
        return (here / np.maximum(union, 1) - tp / np.maximum(union, 1) ** 2 * wrong)[:, held].mean(1)

    return worth(-1) - worth(early)


def mixtures(known: Known, early: int, score: np.ndarray) -> np.ndarray:
    """mIoU % where the images with the smallest score leave early, for each of SHARES."""
    ranked = np.argsort(score, kind="stable")
    result = []
    for share in SHARES:
        leave, stay = np.split(ranked, [round(share * score.size)])
        tp, predicted = (each[early, leave].sum(0) + each[-1, stay].sum(0) for each in (known.tp, known.predicted))
        result.append(100 * float(miou(known.label.sum(0), tp, predicted)))
    return np.array(result)


def cross_fitted(blocks: list[np.ndarray], score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Scores of all images, those of a block from `score(the images of the other blocks)`."""
    images = np.concatenate(blocks)
    result = np.empty(images.size)
    for block in blocks:
        result[block] = score(np.setdiff1d(images, block))[block]
    return result


def of_images(known: Known, images: np.ndarray) -> Known:
    """What is known of some of them."""
    values = {field.name: getattr(known, field.name)[:, images] for field in dataclasses.fields(known) if field.name != "label"}
    return Known(known.label[images], **values)


def policies(known: Known, early: int, blocks: list[np.ndarray]) -> dict[str, np.ndarray]:
    """mIoU % of every policy, for each of SHARES."""
    gain, unsure = gains(known, early), known.unsure[early]
    num_classes = unsure.shape[1]

    def thresholds(chosen: np.ndarray) -> np.ndarray:
        """Score of all images with a threshold for each class, by number."""
        return unsure[:, np.arange(num_classes), chosen].sum(1)

    def fitness(chosen: np.ndarray, fitted: np.ndarray) -> float:
        return float(mixtures(of_images(known, fitted), early, thresholds(chosen)[fitted]).mean())

    def best(choices: list[np.ndarray], fitted: np.ndarray) -> np.ndarray:
        return max(choices, key=lambda chosen: fitness(chosen, fitted))

    def same(fitted: np.ndarray) -> np.ndarray:
        return best([np.full(num_classes, t) for t in range(len(THETA))], fitted)

    def by_class(fitted: np.ndarray) -> np.ndarray:
        chosen = same(fitted)
        for number in [*range(num_classes)] * 2:
            others = np.arange(num_classes) != number
            chosen = best([np.where(others, chosen, t) for t in range(len(THETA))], fitted)
        return thresholds(chosen)

    shares = np.concatenate([1 - unsure.sum(1), known.area[early], np.stack([known.mean, known.worst, known.agreement], -1)[early]], 1)
    features = np.log((shares + 2e-3) / (1 - shares + 2e-3))
    features = (features - features.mean(0)) / np.maximum(features.std(0), 1e-6)

    def ridge(penalty: float) -> Callable[[np.ndarray], np.ndarray]:
        def predict(fitted: np.ndarray) -> np.ndarray:
            rows = features[fitted]
            normal = rows.T @ rows + penalty * np.eye(rows.shape[1])
            return features @ np.linalg.solve(normal, rows.T @ (gain[fitted] - gain[fitted].mean()))

        return predict

    scores = {
        "oracle": gain,
        "confidence": cross_fitted(blocks, lambda fitted: thresholds(same(fitted))),
        "per-class thresholds": cross_fitted(blocks, by_class),
        "mean confidence": -known.mean[early],
        "worst patch": -known.worst[early],
    }
    if early:
        scores["agreement"] = -known.agreement[early]
    result = {name: mixtures(known, early, score) for name, score in scores.items()}
    fits = [mixtures(known, early, cross_fitted(blocks, ridge(penalty))) for penalty in PENALTIES]
    draws = [np.random.default_rng(seed).random(gain.size) for seed in range(DRAWS)]
    random = np.mean([mixtures(known, early, draw) for draw in draws], axis=0)
    return result | {"regression": max(fits, key=np.mean), "random": random}


def main(argv) -> None:
    del argv
    trained = Trained()
    if trained.config.data.resize != "stretch":
        raise app.UsageError("data.resize: must be stretch")
    known = know(trained)
    blocks = np.array_split(np.arange(len(known.label)), FLAGS.blocks)
    figures = {}
    for early, name in enumerate(trained.candidates[:-1]):
        rows = policies(known, early, blocks)
        print(f"{name}: mIoU % where these shares of the images leave there and not at {trained.candidates[-1]}")
        print(f"{'':<21}" + "".join(f"{share:>8.0%}" for share in SHARES))
        for policy, mious in rows.items():
            print(f"{policy:<21}" + "".join(f"{value:>8.2f}" for value in mious))
        figures[name] = {policy: mious.tolist() for policy, mious in rows.items()}
        figures[name]["regression_gain_pp"] = float(np.mean(rows["regression"] - rows["confidence"]))
    print(json.dumps(figures))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    define_flags()
    flags.DEFINE_integer("blocks", 8, "of the images", lower_bound=2)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main)
