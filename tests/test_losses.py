"""Losses against 2×2 cases computed by hand, and the invariants of their gradients."""

import math

import numpy as np
import pytest
import tensorflow as tf

from mess_tf.learning import losses

# Softmax of LOGITS: (1/4, 3/4), (1/2, 1/2), (3/4, 1/4), (9/10, 1/10).
LOGITS = tf.math.log([[[1.0, 3.0], [1.0, 1.0]], [[3.0, 1.0], [9.0, 1.0]]])
LABELS = np.array([[0, 1], [0, 255]], np.uint8)
NO_LABELS = np.full((2, 2), 255, np.uint8)
# The teacher says 1, 1, 0, 0: wrong, right, right, not labelled.
TEACHER = tf.math.log([[[1.0, 4.0], [1.0, 3.0]], [[4.0, 1.0], [1.0, 1.0]]])


def kl(p: tuple[float, float], q: tuple[float, float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def gradient(loss, *logits: tf.Tensor) -> list[tf.Tensor | None]:
    with tf.GradientTape() as tape:
        tape.watch(logits)
        value = loss(*logits)
    return tape.gradient(value, logits)


# === Cross-entropy ===


def test_cross_entropy_by_hand():
    expected = (math.log(4) + math.log(2) + math.log(4 / 3)) / 3
    assert losses.cross_entropy(LOGITS, LABELS).numpy() == pytest.approx(expected, rel=1e-6)


def test_class_weights_by_hand():
    expected = (2 * math.log(4) + 5 * math.log(2) + 2 * math.log(4 / 3)) / 9
    assert losses.cross_entropy(LOGITS, LABELS, np.float32([2, 5])).numpy() == pytest.approx(expected, rel=1e-6)


def test_label_smoothing_by_hand():
    uniform = (math.log(4) + math.log(4 / 3)) / 2, math.log(2), (math.log(4) + math.log(4 / 3)) / 2
    hard = math.log(4), math.log(2), math.log(4 / 3)
    expected = sum(0.8 * a + 0.2 * b for a, b in zip(hard, uniform, strict=True)) / 3
    assert losses.cross_entropy(LOGITS, LABELS, label_smoothing=0.2).numpy() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: losses.cross_entropy(x, NO_LABELS, np.float32([2, 5]), 0.1),
        lambda x: losses.distillation(x, TEACHER, NO_LABELS, filtered=True),
        lambda x: losses.distillation(x, TEACHER, NO_LABELS, filtered=False),
    ],
)
def test_an_image_without_labels_has_loss_0_and_gradient_0(loss):
    assert loss(LOGITS).numpy() == 0
    (slope,) = gradient(loss, LOGITS)
    np.testing.assert_array_equal(slope, np.zeros((2, 2, 2)))


def test_ignored_pixels_get_no_gradient():
    for loss in (lambda x: losses.cross_entropy(x, LABELS), lambda x: losses.distillation(x, TEACHER, LABELS, filtered=False)):
        (slope,) = gradient(loss, LOGITS)
        assert not slope[1, 1].numpy().any()
        assert slope[0, 0].numpy().all()


# === Distillation ===


def test_distillation_by_hand():
    wrong, right = kl((1 / 5, 4 / 5), (1 / 4, 3 / 4)), kl((1 / 4, 3 / 4), (1 / 2, 1 / 2)) + kl((4 / 5, 1 / 5), (3 / 4, 1 / 4))
    assert losses.distillation(LOGITS, TEACHER, LABELS, filtered=True).numpy() == pytest.approx(right / 3, rel=1e-5)
    assert losses.distillation(LOGITS, TEACHER, LABELS, filtered=False).numpy() == pytest.approx((wrong + right) / 3, rel=1e-5)


def test_temperature_by_hand():
    squared = tf.math.log([[[1.0, 9.0]]]), tf.math.log([[[1.0, 16.0]]])  # at T = 2: (1/4, 3/4) and (1/5, 4/5)
    value = losses.distillation(*squared, np.array([[1]]), filtered=True, temperature=2.0)
    assert value.numpy() == pytest.approx(4 * kl((1 / 5, 4 / 5), (1 / 4, 3 / 4)), rel=1e-5)


def test_filtered_is_0_where_the_teacher_is_wrong_everywhere():
    labels = 1 - np.argmax(TEACHER, -1)
    loss = lambda x: losses.distillation(x, TEACHER, labels, filtered=True)  # noqa: E731
    assert loss(LOGITS).numpy() == 0
    assert not gradient(loss, LOGITS)[0].numpy().any()


def test_filtered_is_plain_distillation_where_the_teacher_is_right_everywhere():
    labels = np.argmax(TEACHER, -1)
    values = [losses.distillation(LOGITS, TEACHER, labels, filtered).numpy() for filtered in (True, False)]
    assert values[0] == values[1] > 0


def test_equal_logits_have_no_divergence():
    for temperature in (1.0, 3.0):
        assert losses.distillation(LOGITS, LOGITS + 1.0, LABELS, filtered=False, temperature=temperature).numpy() == pytest.approx(
            0, abs=1e-6
        )


def test_no_gradient_flows_into_the_teacher():
    student, teacher = gradient(lambda x, y: losses.distillation(x, y, LABELS, filtered=False), LOGITS, TEACHER)
    assert teacher is None
    assert student.numpy().any()


# === Sampled upsampling ===


@pytest.mark.parametrize(
    ("size", "full_size"), [((4, 6), (32, 48)), ((5, 3), (32, 64)), ((23, 30), (90, 120)), ((1, 2), (7, 9)), ((6, 6), (6, 6))]
)
def test_upsample_at_is_tf_image_resize_at_the_pixels_asked_for(size, full_size):
    logits = np.random.normal(size=(2, *size, 3)).astype(np.float32)
    rows, columns = (np.sort(np.random.permutation(side)[: side // 2]) for side in full_size)
    expected = tf.image.resize(logits, full_size).numpy()[:, rows][:, :, columns]
    np.testing.assert_allclose(losses.upsample_at(logits, full_size, rows, columns), expected, atol=1e-5)


def test_interpolation_by_hand():
    expected = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    np.testing.assert_allclose(losses.interpolation_matrix(2, 4), expected)


# === Exit schedule ===


def test_round_robin_is_the_schedule_of_l1():
    exits = 6
    assert [losses.round_robin(j, exits - 1) for j in range(20)] == [1 + j % (exits - 1) for j in range(20)]


@pytest.mark.parametrize("early_exits", [1, 2, 5])
def test_round_robin_updates_every_early_exit_equally_often(early_exits):
    turns = [losses.round_robin(step, early_exits) for step in range(4 * early_exits)]
    assert turns[:early_exits] == list(range(1, early_exits + 1))
    assert all(turns.count(number) == 4 for number in range(1, early_exits + 1))
