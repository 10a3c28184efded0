"""Would a policy that predicts what going on gains beat the share of confident pixels?

`python benchmarks/gain_policy.py --workdir W`, after `mess_tf.calibrate`. For the most accurate head of every early exit: a ridge
regression from all shares of confident pixels that the graph counts (every theta_pix, plain and edge-aware) to what an image gains, in
mIoU, by going on to the final exit. The same shares of the images leave at the exit under every policy, hence at equal cost:
  oracle       those that gain least
  regression   those that are predicted to gain least
  confidence   those with most confident pixels, at the theta_pix that is best on the other blocks
  random       any, mean over 100 draws
Images are taken in blocks of neighbours (frames of a video are alike); what a block is judged by was fitted on the others. The last line
is one JSON object, of each exit: mIoU % at every share, and `regression_gain_pp`, the regression's mean above that of confidence. Of
three ridge penalties the one that does best counts, which is in the regression's favour.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import app, flags
from common import most_accurate

from mess_tf import metrics
from mess_tf.files import Stats

SHARES = (0.2, 0.4, 0.6, 0.8)
DRAWS = 100
PENALTIES = (3.0, 30.0, 300.0)


def miou_pct(stats: Stats, candidate: np.ndarray) -> float:
    """mIoU % of a mixture; candidate: int [I], where each image leaves."""
    return 100 * float(metrics.miou(*(counts.sum(0) for counts in stats.counts(candidate))))


def gains(stats: Stats, early: int, final: int) -> np.ndarray:
    """What each image adds to mIoU by leaving at the final exit, by the tangent in the middle of both: float64 [I]."""
    counts = {k: stats.counts(k) for k in (early, final)}
    tp, fp = (np.mean([counts[k][which].sum(0) for k in counts], axis=0) for which in (0, 1))
    union = stats.labelled_of_class + fp
    held = union > 0

    def worth(candidate: int) -> np.ndarray:
        here, wrong, _ = counts[candidate]
        return (here / np.maximum(union, 1) - tp / np.maximum(union, 1) ** 2 * wrong)[:, held].mean(1)

    return worth(final) - worth(early)


def mixtures(stats: Stats, early: int, final: int, score: np.ndarray) -> np.ndarray:
    """mIoU % where the images with the smallest score leave early, for each of SHARES."""
    ranked = np.argsort(score, kind="stable")
    result = []
    for share in SHARES:
        candidate = np.full(score.size, final)
        candidate[ranked[: round(share * score.size)]] = early
        result.append(miou_pct(stats, candidate))
    return np.array(result)


def cross_fitted(blocks: list[np.ndarray], score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Scores of all images, those of a block from `score(the images of the other blocks)`."""
    images = np.concatenate(blocks)
    result = np.empty(images.size)
    for block in blocks:
        result[block] = score(np.setdiff1d(images, block))[block]
    return result


def policies(stats: Stats, early: int, final: int, blocks: list[np.ndarray]) -> dict[str, np.ndarray]:
    """mIoU % of every policy, for each of SHARES."""
    gain = gains(stats, early, final)
    shares = (stats.confident[early] / stats.pixels[:, None, None]).reshape(gain.size, -1)
    features = np.log((shares + 2e-3) / (1 - shares + 2e-3))
    features = (features - features.mean(0)) / np.maximum(features.std(0), 1e-6)

    def most_telling(fitted: np.ndarray) -> np.ndarray:
        correlations = np.array([np.corrcoef(feature[fitted], gain[fitted])[0, 1] for feature in features.T])
        return -features[:, int(np.nanargmin(correlations))]

    def ridge(penalty: float) -> Callable[[np.ndarray], np.ndarray]:
        def predict(fitted: np.ndarray) -> np.ndarray:
            rows = features[fitted]
            normal = rows.T @ rows + penalty * np.eye(rows.shape[1])
            return features @ np.linalg.solve(normal, rows.T @ (gain[fitted] - gain[fitted].mean()))

        return predict

    draws = [np.random.default_rng(seed).random(gain.size) for seed in range(DRAWS)]
    result = {
        "oracle": mixtures(stats, early, final, gain),
        "confidence": mixtures(stats, early, final, cross_fitted(blocks, most_telling)),
        "random": np.mean([mixtures(stats, early, final, draw) for draw in draws], axis=0),
    }
    fits = [mixtures(stats, early, final, cross_fitted(blocks, ridge(penalty))) for penalty in PENALTIES]
    return result | {"regression": max(fits, key=np.mean)}


def main(argv) -> None:
    del argv
    stats = Stats.load(Path(FLAGS.workdir) / "stats.npz")
    blocks = np.array_split(np.arange(len(stats.images)), FLAGS.blocks)
    *exits, last = (stats.candidates.index(f"{choice.exit}.{choice.head}") for choice in most_accurate(stats))
    figures = {}
    for early in exits:
        name, rows = stats.candidates[early], policies(stats, early, last, blocks)
        print(f"{name}: mIoU % where these shares of the images leave there and not at {stats.candidates[last]}")
        print(f"{'':<12}" + "".join(f"{share:>8.0%}" for share in SHARES))
        for policy, mious in rows.items():
            print(f"{policy:<12}" + "".join(f"{value:>8.2f}" for value in mious))
        figures[name] = {policy: mious.tolist() for policy, mious in rows.items()}
        figures[name]["regression_gain_pp"] = float(np.mean(rows["regression"] - rows["confidence"]))
    print(json.dumps(figures))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "folder of a training", required=True)
    flags.DEFINE_integer("blocks", 8, "of the images", lower_bound=2)
    app.run(main)
