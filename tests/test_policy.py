"""The exit policy against NumPy and SciPy references."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from mess_tf import policy

SIZE = (40, 56)
THETAS = (0.3, 0.5, 0.8)


def random_logits(seed: int, scale: float, height: int = 5, width: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (1, height, width, 4)).astype(np.float32)


def reference(logits: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask, plain and edge-aware confidence map, written from mess.md with windows cut off at the border."""
    probabilities = tf.nn.softmax(tf.image.resize(logits, SIZE)).numpy()[0]
    mask, confidence = probabilities.argmax(-1), probabilities.max(-1)
    edges = ndimage.maximum_filter(mask, 3, mode="nearest") != ndimage.minimum_filter(mask, 3, mode="nearest")
    edge_aware = confidence.copy()
    before = (window - 1) // 2
    for row, column in np.argwhere(edges):
        rows = slice(max(0, row - before), row - before + window)
        columns = slice(max(0, column - before), column - before + window)
        values = np.sort(confidence[rows, columns].ravel())
        edge_aware[row, column] = values[values.size // 2]  # the upper median
    return mask, confidence, edge_aware


@pytest.mark.parametrize("window", [7, 8, 16])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_counts_equal_the_reference(window, scale):
    logits = random_logits(window, scale)
    mask, plain, edge_aware = reference(logits, window)
    upsampled = policy.upsample(tf.constant(logits), SIZE)
    predicted = policy.mask(upsampled)
    np.testing.assert_array_equal(predicted.numpy()[0], mask)
    for edges, confidence in ((False, plain), (True, edge_aware)):
        counts = policy.confident_pixels(upsampled, predicted, THETAS, edges, window).numpy()
        np.testing.assert_array_equal(counts, [(confidence >= theta).sum() for theta in THETAS])
    assert (edge_aware != plain).any()


def test_window_is_twice_the_output_stride():
    assert policy.median_window((360, 480), tf.zeros((1, 45, 60, 3))) == 16
    assert policy.median_window((360, 480), tf.zeros((1, 23, 30, 3))) == 32


def test_one_class_everywhere_has_no_edges():
    logits = np.zeros((1, 5, 7, 4), np.float32)
    logits[..., 2] = 3.0
    upsampled = policy.upsample(tf.constant(logits), SIZE)
    predicted = policy.mask(upsampled)
    assert (predicted.numpy() == 2).all()
    for edges in (False, True):
        confidence = np.exp(3) / (np.exp(3) + 3)
        counts = policy.confident_pixels(upsampled, predicted, (confidence - 0.01, confidence + 0.01), edges, 16).numpy()
        assert counts.tolist() == [SIZE[0] * SIZE[1], 0]


def test_large_logits_do_not_overflow():
    logits = random_logits(0, 1.0) + 1000.0
    upsampled = policy.upsample(tf.constant(logits), SIZE)
    counts = policy.confident_pixels(upsampled, policy.mask(upsampled), THETAS, False, 8).numpy()
    probabilities = tf.nn.softmax(tf.image.resize(logits - 1000.0, SIZE)).numpy().max(-1)
    expected = [(probabilities >= theta).sum() for theta in THETAS]
    np.testing.assert_allclose(counts, expected, atol=3)  # rounding of the large logits
