"""Accuracy of every exit and head: mIoU, IoU per class, pixel accuracy. One code for Keras and TFLite models."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from mess_runtime import terminal
from mess_runtime.images import mask_at
from mess_tf import metrics
from mess_tf.data.examples import Examples
from mess_tf.data.pipelines import evaluation_batches, network_input
from mess_tf.network.model import MultiExitNetwork
from mess_tf.network.replicas import count, on_replicas, own_replicas, total_of_processes

# Images uint8 [1, H, W, 3], as many as replicas or fewer, to the masks uint8 [H, W] of these images by name.
Predictor = Callable[..., Mapping[Hashable, Sequence[np.ndarray]]]


def keras_predictor(
    network: MultiExitNetwork,
    candidates: Sequence[str],
    size: tuple[int, int],
    shifts: Mapping[Hashable, np.ndarray] | None = None,
    resize: str = "stretch",
) -> Predictor:
    """Makes a function from images to masks by candidate, which takes one image per replica.

    As on the device, the network sees the image at its input size, and the mask of that size is brought to the image's.

    Args:
      network: says what the candidates are.
      candidates: names of what predicts.
      size: (height, width) in pixels of the network's input.
      shifts: float32 [C] each, to be subtracted from the logits; with them, a mask per (candidate, key of the shift).
      resize: how images are fitted to this size, see `images.fit`.
    """
    strategy, places = tf.distribute.get_strategy(), {replica: place for place, replica in enumerate(own_replicas())}
    keys = [None] if shifts is None else list(shifts)
    features_of = on_replicas(functools.partial(network.features(candidates), training=False))
    offsets = tf.stack([tf.zeros(network.num_classes)] if shifts is None else list(shifts.values()))[:, None, None]

    def masks_of(name, features):
        logits = tf.image.resize(tf.cast(network.head_logits(name, features), tf.float32), size)[0]
        return tf.map_fn(lambda offset: tf.cast(tf.argmax(logits - offset, -1, tf.int32), tf.uint8), offsets, tf.uint8)

    # A graph per candidate: in one graph of all, every candidate's maps lie in memory at once.
    masks_of = {name: on_replicas(functools.partial(masks_of, name)) for name in candidates}

    def predict(*images):
        inputs = [network_input(image, size, resize) for image in images]

        def input_of(replica):  # replicas without an image of their own see the last one
            return tf.constant(inputs[min(places[replica.replica_id_in_sync_group], len(inputs) - 1)])

        features = features_of(strategy.experimental_distribute_values_from_function(input_of))
        result = {}
        for name in candidates:
            found = strategy.experimental_local_results(masks_of[name]({tap: features[tap] for tap in network.taps(name)}))
            masks = [mask_at(mask.numpy(), image.shape[1:3], resize) for mask, image in zip(found, images, strict=False)]
            for place, key in enumerate(keys):
                result[name if shifts is None else (name, key)] = [mask[place] for mask in masks]
        return result

    return predict


def confusion_matrices(predict: Predictor, examples: Examples, images: range | None = None) -> dict[Hashable, np.ndarray]:
    """Sums confusion matrices over a split, or some of its images: name to int64 [C, C] (see `metrics.confusion_matrix`).

    Every replica takes its share.
    """
    total: dict[Hashable, np.ndarray] = {}
    replicas, own = count(), own_replicas()
    indices = [index for index in images or range(len(examples)) if index % replicas in own]
    pairs = iter(terminal.progress(evaluation_batches(examples, indices), "evaluate", "image"))
    while group := list(itertools.islice(pairs, len(own))):
        for name, masks in predict(*(image.numpy() for image, _ in group)).items():
            for (_, label), mask in zip(group, masks, strict=True):
                matrix = metrics.confusion_matrix(label.numpy()[0], mask, examples.info.num_classes)
                total[name] = total[name] + matrix if name in total else matrix
    return dict(zip(total, total_of_processes(np.array([*total.values()])), strict=True))


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
