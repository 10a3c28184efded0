"""Masked cross-entropy, the exit schedule of stage 1 and positive filtering distillation; see docs/how_it_works.md.

The losses are those of the full-resolution output, taken on a grid of its pixels: every n-th row and column, the first ones drawn anew
each step. The bilinear upsampling is computed at these pixels only, which is exact there and makes the loss n*n times cheaper; over the
steps every pixel counts alike.

On several replicas a loss is the share of this one's images in the mean over the whole batch: the shares' sum is what one replica has.
"""

import numpy as np
import tensorflow as tf

from mess_tf.configs import IGNORE
from mess_tf.network.replicas import total


def round_robin(step: int, early_exits: int) -> int:
    """The early exit, 1..early_exits, that batch `step` updates beside the final one (exit dropout)."""
    return 1 + step % early_exits


def interpolation_matrix(size: int, full_size: int) -> np.ndarray:
    """Bilinear upsampling with half-pixel centres along one axis, as a float32 matrix [full_size, size]."""
    centre = np.clip((np.arange(full_size) + 0.5) * size / full_size - 0.5, 0, size - 1)
    lower = np.floor(centre).astype(int)
    upper = np.minimum(lower + 1, size - 1)
    matrix = np.zeros((full_size, size), np.float32)
    np.add.at(matrix, (np.arange(full_size), lower), 1 - (centre - lower))
    np.add.at(matrix, (np.arange(full_size), upper), centre - lower)
    return matrix


def upsample_at(logits: tf.Tensor, size: tuple[int, int], rows: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    """Bilinearly upsampled logits at chosen rows and columns of the full-resolution map.

    Args:
      logits: float [B, h, w, C] with known h, w.
      size: (H, W), the full resolution.
      rows, columns: int32 [R] and [S], indices into H and W.

    Returns:
      float32 [B, R, S, C].
    """
    height, width = logits.shape[1:3]
    vertical = tf.gather(interpolation_matrix(height, size[0]), rows)  # [R, h]
    horizontal = tf.gather(interpolation_matrix(width, size[1]), columns)  # [S, w]
    return tf.einsum("rh,sw,bhwc->brsc", vertical, horizontal, tf.cast(logits, tf.float32))


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor, class_weights: tf.Tensor | None = None, label_smoothing: float = 0.0) -> tf.Tensor:
    """Mean cross-entropy over the labelled pixels, each weighted by its class; 0 if no pixel is labelled.

    Args:
      logits: float32 [..., C], raw.
      labels: integers [...], 0..C-1 or 255 for pixels that do not count.
      class_weights: float32 [C], or None for equal weights.
      label_smoothing: share of the target spread evenly over the C classes.

    Returns:
      float32 scalar: sum of weight * loss over sum of weights.
    """
    labels = tf.cast(labels, tf.int32)
    valid = labels != IGNORE
    classes = tf.where(valid, labels, 0)
    log_probability = tf.nn.log_softmax(logits)
    loss = -tf.reduce_sum(tf.one_hot(classes, logits.shape[-1]) * log_probability, axis=-1)  # faster on a CPU than the sparse op
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * tf.reduce_mean(log_probability, axis=-1)
    weights = tf.cast(valid, tf.float32)
    if class_weights is not None:
        weights *= tf.gather(class_weights, classes)
    return tf.math.divide_no_nan(tf.reduce_sum(weights * loss), total(tf.reduce_sum(weights)))


def distillation(student: tf.Tensor, teacher: tf.Tensor, labels: tf.Tensor, filtered: bool, temperature: float = 1.0) -> tf.Tensor:
    """Mean over the labelled pixels of KL(teacher || student), counted as 0 where the teacher is wrong if `filtered` (positive filtering).

    Args:
      student, teacher: float32 [..., C], raw logits; no gradient flows into the teacher.
      labels: integers [...], 0..C-1 or 255 for pixels that do not count.
      filtered: count only pixels where the teacher's class is the label (PFD), else all labelled ones (plain KD).
      temperature: T of both softmaxes; the loss is scaled by T*T so that its gradient keeps its size.

    Returns:
      float32 scalar, 0 if no pixel is labelled.
    """
    teacher = tf.stop_gradient(teacher)
    labels = tf.cast(labels, tf.int32)
    valid = tf.cast(labels != IGNORE, tf.float32)
    log_teacher = tf.nn.log_softmax(teacher / temperature)
    divergence = tf.reduce_sum(tf.exp(log_teacher) * (log_teacher - tf.nn.log_softmax(student / temperature)), axis=-1)
    counted = valid
    if filtered:
        counted *= tf.cast(tf.argmax(teacher, -1, tf.int32) == labels, tf.float32)
    return temperature**2 * tf.math.divide_no_nan(tf.reduce_sum(counted * divergence), total(tf.reduce_sum(valid)))


def class_weights(class_pixels: np.ndarray, kind: str) -> np.ndarray:
    """Computes the loss weight of every class.

    Args:
      class_pixels: int [C], labelled pixels per class.
      kind: `none` (all ones) or `sqrt_median_frequency` (square root of the present classes' median frequency over the class's own).

    Returns:
      float32 [C]; a class without pixels weighs 0 unless kind is `none`.
    """
    if kind == "none":
        return np.ones(len(class_pixels), np.float32)
    if kind != "sqrt_median_frequency":
        raise ValueError(f"kind: must be 'none' or 'sqrt_median_frequency', got {kind!r}")
    present = class_pixels > 0
    weights = np.zeros(len(class_pixels), np.float32)
    weights[present] = np.sqrt(np.median(class_pixels[present]) / class_pixels[present])
    return weights
