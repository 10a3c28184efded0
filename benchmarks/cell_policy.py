"""Would a policy that learns what going on is worth to a cell beat how confident its pixels are?

`python benchmarks/cell_policy.py --workdir W [--data_dir D] [--cell 16]`, from a trained work folder, without an export. One early exit,
then the final one; a share of all cells goes on, those that a policy puts first, at ideal costs (see `regions.py`):
  oracle gain          those whose mIoU gains most, by its tangent
  oracle disagreement  those in which most pixels change their class
  quantile             those whose SURE_SHARE quantile of confidence is lowest: the policy of bundles whose cells leave
  mean                 those whose mean confidence is lowest
  entropy              those whose mean entropy is highest
  learned gain         a network's estimate of the gain by the tangent (mean squared error)
  learned disagreement a network's estimate of the share of pixels that change (cross-entropy)
  random               any
A learned policy is a perceptron of two hidden layers on what is known of a cell at the exit: probabilities of the classes, quantiles of the
confidence, entropy, all of these around the cell and of the whole image, those of the exit before, and the features that the exit reads. It
is fitted on other images than it is judged by (--folds). Printed for each exit and policy: the speed-up at each largest loss of mIoU of
`--drops`, at the best share for it. The last line is one JSON object.
"""

import mess_tf  # noqa: F401  # isort: skip  # before TensorFlow, which then uses oneDNN
import json
import os
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from common import Trained, define_flags
from regions import Costs, cell_map, counted, miou

from mess_runtime.terminal import progress
from mess_tf.data.pipelines import evaluation_batches, network_input
from mess_tf.learning.steps import SURE_SHARE

QUANTILES = (0.0, 1 - SURE_SHARE, 0.25, 0.5)
ENTROPY, MEAN, QUANTILE = -1, -2, -1 - len(QUANTILES)  # where they are in what is known of a cell


def known(trained: Trained, side: int) -> Iterator[tuple[np.ndarray, np.ndarray, list[np.ndarray]]]:
    """Of each image what is known of its cells: classes [K, H, W], statistics of the exits [K, h, w, S] and features [h, w, C] of each."""
    network, size = trained.network, trained.size
    height, width = (length // side for length in size)
    features_of = network.features(trained.candidates)

    def in_cells(values: tf.Tensor) -> tf.Tensor:
        split = tf.reshape(values, (-1, height, side, width, side, values.shape[-1]))
        return tf.reshape(tf.transpose(split, (0, 1, 3, 2, 4, 5)), (-1, height, width, side * side, values.shape[-1]))

    @tf.function(autograph=False)
    def predict(image):
        features = features_of(image, training=False)
        logits = [network.head_logits(name, features) for name in trained.candidates]
        probability = tf.nn.softmax(tf.concat([tf.image.resize(tf.cast(each, tf.float32), size) for each in logits], 0))
        confidence = tf.sort(in_cells(tf.reduce_max(probability, -1, keepdims=True))[..., 0], -1)
        entropy = -tf.reduce_sum(probability * tf.math.log(probability + 1e-6), -1, keepdims=True)
        quantiles = [confidence[..., int(share * side * side)] for share in QUANTILES]
        values = [*quantiles, tf.reduce_mean(confidence, -1), tf.reduce_mean(in_cells(entropy)[..., 0], -1)]
        statistics = tf.concat([tf.reduce_mean(in_cells(probability), 3), tf.stack(values, -1)], -1)
        deep = [tf.cast(features[network.taps(name)[0]], tf.float32) for name in trained.candidates[:-1]]
        return tf.argmax(probability, -1), statistics, [tf.image.resize(each, (height, width), "area")[0] for each in deep]

    for image, label in progress(evaluation_batches(trained.examples), "cells", "image"):
        classes, statistics, deep = predict(network_input(image.numpy(), size, "stretch"))
        yield label.numpy()[0], classes.numpy(), statistics.numpy(), [each.numpy() for each in deep]


def inputs(statistics: np.ndarray, features: np.ndarray, k: int) -> np.ndarray:
    """What a policy at exit k sees: float32 [I, h, w, D]; from statistics [I, K, h, w, S] and features [I, h, w, C]."""
    here = statistics[:, k]
    padded = np.pad(here, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows, columns = here.shape[1:3]
    around = np.mean([padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)], 0)
    whole = np.broadcast_to(here.mean((1, 2), keepdims=True), here.shape)
    return np.concatenate([here, around, whole, *([statistics[:, k - 1]] if k else []), features], -1).astype(np.float32)


def learned(x: np.ndarray, y: np.ndarray, loss: str, folds: int) -> np.ndarray:
    """Estimates of y [I, N] from x [I, N, D], each image's from the images of other folds."""
    fold, result = np.random.default_rng(0).permutation(len(x)) % folds, np.zeros(y.shape)
    for judged in range(folds):
        fit = fold != judged
        mean, scale = x[fit].mean((0, 1)), x[fit].std((0, 1)) + 1e-3
        unit = y[fit].std() if loss == "mse" else 1.0
        keras.utils.set_random_seed(judged)
        hidden = [layer for width in (64, 32) for layer in (keras.layers.Dense(width, "relu"), keras.layers.Dropout(0.2))]
        model = keras.Sequential([keras.Input(x.shape[-1:]), *hidden, keras.layers.Dense(1)])
        steps = FLAGS.epochs * -(-y[fit].size // 512)
        rate = keras.optimizers.schedules.CosineDecay(2e-3, steps)
        objective = loss if loss == "mse" else keras.losses.BinaryCrossentropy(from_logits=True)
        model.compile(keras.optimizers.AdamW(rate, weight_decay=1e-3), objective)
        model.fit(((x[fit] - mean) / scale).reshape(-1, x.shape[-1]), y[fit].ravel() / unit, 512, FLAGS.epochs, verbose=0)
        result[~fit] = model.predict(((x[~fit] - mean) / scale).reshape(-1, x.shape[-1]), 8192, verbose=0).reshape(result[~fit].shape)
    return result


def speedups(score: np.ndarray, k: int, label: np.ndarray, counts: np.ndarray, costs: Costs, drops: list[float]) -> list[float]:
    """The largest speed-up at each loss, in percentage points, where cells with the highest scores go on; counts: [K, N, 2C]."""
    order = np.argsort(-score.ravel(), kind="stable")
    more = np.cumsum((counts[-1] - counts[k])[order], 0)
    total = counts[k].sum(0) + np.concatenate([np.zeros_like(more[:1]), more])
    accuracy = miou(label, *np.split(total, 2, -1))
    reached = [np.flatnonzero(accuracy >= accuracy[-1] - drop / 100)[0] / len(more) for drop in drops]
    return [1 / costs.of([k, len(counts) - 1], [1, share]) for share in reached]


def main(argv) -> None:
    del argv
    trained, drops = Trained(), [float(drop) for drop in FLAGS.drops]
    if trained.config.data.resize != "stretch" or any(length % FLAGS.cell for length in trained.size):
        raise app.UsageError("--cell: must divide the input of a network whose data.resize is stretch")
    cells, images = cell_map(trained.size, FLAGS.cell), []
    for label, classes, statistics, features in known(trained, FLAGS.cell):
        images.append((*counted(label, classes, cells, trained.examples.info.num_classes), statistics, features))
    label, tp, predicted, statistics, features = zip(*images, strict=True)
    tp, predicted, label = np.stack(tp, 1), np.stack(predicted, 1), np.array(label)  # [K, I, N, C], [I, N, C]
    counts, statistics = np.concatenate([tp, predicted], -1), np.array(statistics)
    truth, pixels = label.sum((0, 1)), np.maximum(label.sum(-1), 1)
    flat = counts.reshape(len(counts), -1, counts.shape[-1]).astype(float)
    costs, figures = Costs(trained), {"cell": FLAGS.cell, "images": len(label), "drops": drops, "exits": {}}
    hits, given = np.split(flat[-1].sum(0), 2)
    union = np.maximum(truth + given - hits, 1)
    for k, name in enumerate(trained.candidates[:-1]):
        more_hits, more = tp[-1] - tp[k], predicted[-1] - predicted[k]
        gain = (more_hits / union - hits / union**2 * (more - more_hits)).mean(-1)
        changed = np.maximum(np.abs(more).sum(-1) / 2, np.abs(more_hits).sum(-1)) / pixels
        x = inputs(statistics, np.array([each[k] for each in features]), k)
        x = x.reshape(len(x), -1, x.shape[-1])
        here = statistics[:, k].reshape(len(x), -1, statistics.shape[-1])
        policies = {
            "oracle gain": gain,
            "oracle disagreement": changed,
            "quantile": -here[..., QUANTILE],
            "mean": -here[..., MEAN],
            "entropy": here[..., ENTROPY],
            "learned gain": learned(x, gain, "mse", FLAGS.folds),
            "learned disagreement": learned(x, changed, "cross-entropy", FLAGS.folds),
            "random": np.random.default_rng(0).random(gain.shape),
        }
        figures["exits"][name] = {}
        for policy, score in policies.items():
            found = figures["exits"][name][policy] = speedups(score, k, truth, flat, costs, drops)
            print(f"{name:<22} {policy:<21}" + "  ".join(f"-{drop:g} pp {value:.2f}x" for drop, value in zip(drops, found, strict=True)))
    print(json.dumps(figures))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    define_flags()
    flags.DEFINE_integer("cell", 16, "side of a cell in pixels of the network's input", lower_bound=2)
    flags.DEFINE_list("drops", ["0", "0.25", "1"], "largest losses of mIoU in percentage points")
    flags.DEFINE_integer("folds", 3, "parts of the images, each judged by what the others teach", lower_bound=2)
    flags.DEFINE_integer("epochs", 8, "of a learned policy", lower_bound=1)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main)
