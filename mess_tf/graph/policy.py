"""The exit policy: mask, confidence of every pixel, edge handling, number of confident pixels; see docs/how_it_works.md.

One function, `decide`, makes the graphs on the device and the search's statistics, so that a threshold means the same in both. Builtin
TFLite ops only, and those that runtimes vectorise:

* A class is a plane, not a channel: [rows, classes, columns]. Maxima and sums over the classes then run along whole rows.
* The image is worked on in strips of columns that stay in the processor's cache from the upsampling to the confidence.
* The class of a pixel is the least of `index + distance below the largest logit`, the index scaled so that it is below any distance but 0.
* The median of the window reaches the threshold where at least half of the window does: a box sum of +1 and -1, no sorting. Boxes are
  pooled along the columns, then along the rows, the other axis standing in for the channels.

It is exact in float32, and holds in half precision, in which XNNPACK may compute fp16 files, and GPUs any file: constants and results stay
within what float16 has without subnormals, which XNNPACK flushes to 0, and pixels are counted in integers. Large factors are applied in
two steps, since one of them would be infinite there. What is rounded then are logits and confidences, in their eleventh bit.

Departures: edges are pixels of the predicted mask that differ from one of their 8 neighbours, where the paper runs Canny on the mask; the
window of the median is cut off at the border of the image; of an even number of values the median is the upper of the two in the middle.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from mess_runtime.bundle import CONFIDENT_PIXELS, FIDELITIES, MASK, SURE

# What is computed at the size of the image, the rest at that of the logits: everything; the mask only; nothing.
EXACT, LOW_CONFIDENCE, LOW = FIDELITIES

# Logits are shifted to -LOGIT_SCALE or below, where neighbouring float32 are at least 2**-16 apart: more than 255 steps of the index.
# Neighbouring float16 above LEAST_INDEX, the least that is no subnormal, are one step apart.
LOGIT_SCALE = 2.0**8
LOGIT_RANGE = 250.0  # scaled, what is further below the largest logit would be infinite in float16
INDEX_STEP = 2.0**-24
LEAST_INDEX = 2.0**-14
STEEP = 2.0**15  # twice in a row, it makes any difference of confidence larger than 4
STRIP_VALUES = 150_000  # float32 in a strip; two of them fit a level 2 cache of 1.25 MiB


def decide(
    logits: tf.Tensor, size: tuple[int, int], thresholds: Sequence[tuple[float, bool]], fidelity: str = EXACT
) -> dict[str, tf.Tensor]:
    """What an exit returns for one image.

    The confidence of a pixel is its largest softmax probability after bilinear upsampling of the logits (half-pixel centres).

    Args:
      logits: float32 [1, h, w, C], raw.
      size: (H, W) in pixels of the mask.
      thresholds: T pairs of a confidence in (0, 1] that makes a pixel count, and whether pixels on edges of the mask take the median
        confidence around them.
      fidelity: `exact`; `low_confidence`: mask as in exact, confidence, edges and windows at the size of the logits; `low`: the mask too,
        then enlarged to the nearest pixel. Counts are scaled to H·W pixels.

    Returns:
      `mask` uint8 [1, H, W] and, unless T is 0, `confident_pixels` int32 [T], out of H·W.
    """
    low = tuple(logits.shape[1:3])
    confidence_size = size if fidelity == EXACT else low
    pixels = math.prod(confidence_size)
    # A table, since GPUs divide and multiply integers as floats.
    scaled = None if fidelity == EXACT else (np.arange(pixels + 1) * math.prod(size) // pixels).astype(np.int32)
    window = median_window(confidence_size, logits)
    classes, signs = _planes(logits, confidence_size, thresholds, window)
    counts = []
    for confident in _confident(classes, signs, thresholds, window):
        count = tf.reduce_sum(tf.cast(tf.reduce_sum(confident, 1), tf.int32), keepdims=True)
        counts.append(count if scaled is None else tf.gather(scaled, count))
    if fidelity == LOW_CONFIDENCE:
        classes, _ = _planes(logits, size, (), window)
    if fidelity == LOW:
        classes = _enlarged(tf.transpose(_enlarged(tf.transpose(classes), size[1])), size[0])
    outputs = {MASK: tf.reshape(tf.cast(classes, tf.uint8), (1, *size))}
    return outputs | {CONFIDENT_PIXELS: tf.concat(counts, 0)} if counts else outputs


def decide_by_cell(
    logits: tf.Tensor, size: tuple[int, int], threshold: tuple[float, bool], cells: tuple[np.ndarray, np.ndarray], whole: bool = False
) -> dict[str, tf.Tensor]:
    """What an exit returns for one image of which every cell decides for itself, computed at the size of the image.

    Args:
      logits, size, threshold: see `decide`.
      cells: int [H] and [W], the row and the column of cells that each row and column of the mask lies in, in rising order from 0.
      whole: whether the image decides, and each cell has its share.

    Returns:
      `mask` uint8 [1, H, W], and `sure` float32 [1, rows, columns]: the share of each cell's pixels that are confident.
    """
    window = median_window(size, logits)
    classes, signs = _planes(logits, size, (threshold,), window)
    (plane,) = _confident(classes, signs, (threshold,), window)
    shares = []
    for places in cells:
        inside = np.eye(places[-1] + 1, dtype=np.float32)[places]
        shares.append(np.full_like(inside, 1 / len(inside)) if whole else inside / inside.sum(0))
    first, second = shares[::-1] if threshold[1] else shares  # an edge-aware plane is transposed
    sure = tf.matmul(tf.transpose(tf.matmul(plane, second)), first)
    sure = sure if threshold[1] else tf.transpose(sure)
    return {MASK: tf.reshape(tf.cast(classes, tf.uint8), (1, *size)), SURE: sure[None]}


def _confident(
    classes: tf.Tensor, signs: Sequence[tf.Tensor], thresholds: Sequence[tuple[float, bool]], window: int
) -> Iterator[tf.Tensor]:
    """For each threshold 1 where a pixel is confident, 0 elsewhere: float32 [H, W], or [W, H] if it is edge-aware."""
    edges = _edges(classes) if any(edge_aware for _, edge_aware in thresholds) else None
    for (_, edge_aware), sign in zip(thresholds, signs, strict=True):
        confident = tf.clip_by_value(sign, 0.0, 1.0)
        if edge_aware:
            most = tf.clip_by_value(_along_both(tf.nn.avg_pool2d, sign, window) * STEEP, 0.0, 1.0)
            confident = tf.transpose(confident)
            confident += edges * (most - confident)
        yield confident


def median_window(size: tuple[int, int], logits: tf.Tensor) -> int:
    """Side in pixels of the median's window: twice the output stride of the exit, whose logits are [B, h, w, C]."""
    return 2 * round(size[0] / logits.shape[1])


def _planes(logits: tf.Tensor, size: tuple[int, int], thresholds: Sequence[tuple[float, bool]], window: int):
    """Class index of each pixel, float32 [H, W], and for each threshold a plane that tells which pixels are confident.

    That plane is +2 or -2, plus an offset that is less than 1 over a whole window: it makes a tie count for the confident half.
    """
    index = LEAST_INDEX + INDEX_STEP * np.arange(logits.shape[-1], dtype=np.float32)[:, None]
    classes, signs = [], [[] for _ in thresholds]
    for below in _strips(logits, size):
        classes.append(tf.reduce_min(index - below, 2))
        if thresholds:
            total = tf.reduce_sum(tf.exp(below * (1 / LOGIT_SCALE)), 2)  # 1 / largest probability
            for (theta, _), strips in zip(thresholds, signs, strict=True):
                difference = tf.clip_by_value((np.float32(1 / theta) - total) * STEEP, -1.0, 1.0)
                strips.append(tf.clip_by_value(difference * STEEP + 2.0, -2.0, 2.0) + 0.5 / window**2)
    indices = (_joined(classes) * (1 / LEAST_INDEX) - 1.0) * (LEAST_INDEX / INDEX_STEP)
    return indices, [_joined(strips) for strips in signs]


def _strips(logits: tf.Tensor, size: tuple[int, int]) -> Iterator[tf.Tensor]:
    """Upsampled logits less the largest of the pixel, times LOGIT_SCALE: float32 [1, H, C, n] for strips of n columns, left to right.

    The shift before upsampling is the same for all classes of a pixel, so it changes neither the class nor the softmax.
    """
    height, classes = logits.shape[1], logits.shape[3]
    shifted = tf.maximum(logits - tf.reduce_max(logits, -1, keepdims=True), -LOGIT_RANGE) * LOGIT_SCALE - LOGIT_SCALE
    wide = tf.transpose(_resized(shifted, (height, size[1])), (0, 1, 3, 2))  # [1, h, C, W]
    strips = math.ceil(size[0] * size[1] * classes / STRIP_VALUES)
    step = 16 * math.ceil(size[1] / strips / 16)
    for left in range(0, size[1], step):
        upsampled = _resized(wide[..., left : min(left + step, size[1])], (size[0], classes))
        yield upsampled - tf.reduce_max(upsampled, 2, keepdims=True)


def _resized(values: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    return values if tuple(values.shape[1:3]) == size else tf.image.resize(values, size)


def _enlarged(values: tf.Tensor, rows: int) -> tf.Tensor:
    """[h, w] with the nearest of the h rows in each of so many; whole rows are copied, as the columns stand in for the channels."""
    height, width = values.shape
    return tf.reshape(tf.image.resize(tf.reshape(values, (1, height, 1, width)), (rows, 1), "nearest"), (rows, width))


def _joined(strips: list[tf.Tensor]) -> tf.Tensor:
    """Puts strips [1, H, n] side by side to [H, W], four at a time since XNNPACK joins no more than five."""
    while len(strips) > 1:
        strips = [tf.concat(strips[i : i + 4], 2) for i in range(0, len(strips), 4)]
    return tf.reshape(strips[0], strips[0].shape[1:])


def _edges(classes: tf.Tensor) -> tf.Tensor:
    """0 where a pixel has the class of its 8 neighbours, 1 elsewhere: float32 [H, W] to [W, H]."""
    return tf.minimum(_along_both(tf.nn.max_pool2d, classes, 3) + _along_both(tf.nn.max_pool2d, -classes, 3), 1.0)


def _along_both(pool, values: tf.Tensor, window: int) -> tf.Tensor:
    """Pools float32 [H, W] in windows around each pixel, cut off at the border: [W, H], transposed."""

    def along_columns(values):
        rows, columns = values.shape
        return tf.reshape(pool(tf.reshape(values, (1, rows, 1, columns)), (window, 1), 1, "SAME"), (rows, columns))

    return along_columns(tf.transpose(along_columns(values)))
