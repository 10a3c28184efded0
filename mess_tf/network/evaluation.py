"""Accuracy of every exit and head: mIoU, IoU per class, pixel accuracy. One code for Keras and TFLite models."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from mess_runtime import terminal
from mess_runtime.images import mask_at
from mess_tf import metrics
from mess_tf.data.examples import Examples
from mess_tf.data.pipelines import evaluation_batches, network_input
from mess_tf.network.model import MultiExitNetwork

Predictor = Callable[[np.ndarray], dict[Hashable, np.ndarray]]


def keras_predictor(
    network: MultiExitNetwork,
    candidates: Sequence[str],
    size: tuple[int, int],
    shifts: Mapping[Hashable, np.ndarray] | None = None,
    resize: str = "stretch",
) -> Predictor:
    """Makes a function from an image uint8 [1, H, W, 3] to a dict of masks uint8 [1, H, W], one per candidate.

    As on the device, the network sees the image at its input size, and the mask of that size is brought to the image's.

    Args:
      network: says what the candidates are.
      candidates: names of what predicts.
      size: (height, width) in pixels of the network's input.
      shifts: float32 [C] each, to be subtracted from the logits; with them, a mask per (candidate, key of the shift).
      resize: how images are fitted to this size, see `images.fit`.
    """
    features_of = tf.function(network.features(candidates), autograph=False)
    offsets = tf.stack([tf.zeros(network.num_classes)] if shifts is None else list(shifts.values()))[:, None, None]

    @tf.function(autograph=False)
    def masks_of(name, features):  # a graph per candidate: in one graph of all, every candidate's maps lie in memory at once
        logits = tf.image.resize(tf.cast(network.head_logits(name, features), tf.float32), size)[0]
        return tf.map_fn(lambda offset: tf.cast(tf.argmax(logits - offset, -1, tf.int32), tf.uint8), offsets, tf.uint8)

    def predict(image):
        features = features_of(network_input(image, size, resize), training=False)
        result = {}
        for name in candidates:
            masks = masks_of(name, {tap: features[tap] for tap in network.taps(name)})
            masks = mask_at(masks.numpy(), image.shape[1:3], resize)[:, None]
            result |= dict(zip([name] if shifts is None else [(name, key) for key in shifts], masks, strict=True))
        return result

    return predict


def confusion_matrices(predict: Predictor, examples: Examples) -> dict[Hashable, np.ndarray]:
    """Sums confusion matrices over a split: name to int64 [C, C] (see `metrics.confusion_matrix`)."""
    total: dict[Hashable, np.ndarray] = {}
    for image, label in terminal.progress(evaluation_batches(examples), "evaluate", "image"):
        for name, mask in predict(image.numpy()).items():
            matrix = metrics.confusion_matrix(label.numpy(), mask, examples.info.num_classes)
            total[name] = total[name] + matrix if name in total else matrix
    return total


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Accuracy of one candidate, all in 0..1; a class that no label holds has the IoU NaN."""

    miou: float
    pixel_accuracy: float
    class_iou: tuple[float, ...]


def accuracies(matrices: Mapping[Hashable, np.ndarray]) -> dict[Hashable, Accuracy]:
    """Turns confusion matrices into accuracies."""
    result = {}
    for name, matrix in matrices.items():
        tp, fp, fn = metrics.class_counts(matrix)
        iou = tuple(float(value) for value in metrics.class_iou(tp, fp, fn))
        result[name] = Accuracy(float(metrics.miou(tp, fp, fn)), float(metrics.pixel_accuracy(tp, fn)), iou)
    return result
