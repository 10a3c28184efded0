"""The exit policy: mask, confidence map, edge handling, image confidence (mess.md, section 5).

The same functions make the search's statistics and the graphs on the device, so that a threshold means the same in both. Builtin TFLite
ops only.

Departures: edges are pixels of the predicted mask that differ from one of their 8 neighbours, where the paper runs Canny on the mask; the
window of the median is cut off at the border of the image; of an even number of values the median is the upper of the two in the middle.
"""

from collections.abc import Sequence

import tensorflow as tf


def upsample(logits: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Bilinear upsampling (half-pixel centres) of logits float32 [B, h, w, C] to [B, H, W, C], shifted so that exp() of it cannot overflow.

    The shift is the same for all classes of a pixel, so it changes neither the class nor the softmax.
    """
    return tf.image.resize(logits - tf.reduce_max(logits, -1, keepdims=True), size)


def mask(upsampled: tf.Tensor) -> tf.Tensor:
    """Class of each pixel: float32 [B, H, W, C] to uint8 [B, H, W]."""
    return tf.cast(tf.argmax(upsampled, -1, tf.int32), tf.uint8)


def median_window(size: tuple[int, int], logits: tf.Tensor) -> int:
    """Side in pixels of the median's window: twice the output stride of the exit, whose logits are [B, h, w, C]."""
    return 2 * round(size[0] / logits.shape[1])


def confident_pixels(upsampled: tf.Tensor, predicted: tf.Tensor, theta_pix: Sequence[float], edge_aware: bool, window: int) -> tf.Tensor:
    """Counts the pixels of one image whose confidence, the largest softmax probability, is at least theta_pix.

    Args:
      upsampled: float32 [1, H, W, C], of `upsample`.
      predicted: uint8 [1, H, W], of `mask`.
      theta_pix: T thresholds in 0..1.
      edge_aware: replace the confidence on edges of the predicted mask by the median of the window around the pixel.
      window: side of that window in pixels.

    Returns:
      int32 [T].
    """
    exponentials = tf.exp(upsampled)
    largest, total = tf.reduce_max(exponentials, -1), tf.reduce_sum(exponentials, -1)
    edges = _edges(predicted) if edge_aware else None
    counts = []
    for theta in theta_pix:
        confident = tf.cast(largest >= theta * total, tf.float32)
        if edge_aware:
            # The median reaches the threshold where at least half of the window does.
            half = _box_mean(confident, window) - (0.5 - 0.25 / window**2)
            confident += edges * (tf.clip_by_value(half * 1e7, 0.0, 1.0) - confident)
        counts.append(tf.reduce_sum(tf.cast(confident, tf.int32)))
    return tf.stack(counts)


def _edges(predicted: tf.Tensor) -> tf.Tensor:
    """1.0 where a pixel differs from one of its 8 neighbours, else 0.0: uint8 [1, H, W] to float32 [1, H, W]."""
    classes = tf.cast(predicted, tf.float32)[..., None]
    spread = tf.nn.max_pool2d(classes, 3, 1, "SAME") + tf.nn.max_pool2d(-classes, 3, 1, "SAME")
    return tf.clip_by_value(spread[..., 0], 0.0, 1.0)


def _box_mean(values: tf.Tensor, window: int) -> tf.Tensor:
    """Mean of the window around each pixel, cut off at the border: float32 [1, H, W] to the same.

    First along the columns, then along the rows, the other axis standing in for the channels: pooling of many channels is what runtimes
    vectorise.
    """
    for _ in range(2):
        _, rows, columns = values.shape
        pooled = tf.nn.avg_pool2d(tf.reshape(values, (1, rows, 1, columns)), (window, 1), 1, "SAME")
        values = tf.transpose(tf.reshape(pooled, (1, rows, columns)), (0, 2, 1))
    return values
