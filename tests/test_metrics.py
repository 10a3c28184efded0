"""Confusion matrix and mIoU against cases small enough to check by hand."""

import numpy as np
import pytest

from mess_tf import metrics

LABEL = np.array([[0, 1], [1, 255]], np.uint8)
PREDICTION = np.array([[0, 0], [1, 2]], np.uint8)
CONFUSION = [[1, 0, 0], [1, 1, 0], [0, 0, 0]]  # the pixel labelled 255 does not count; class 2 is absent


def test_a_case_by_hand():
    matrix = metrics.confusion_matrix(LABEL, PREDICTION, 3)
    assert matrix.dtype == np.int64
    np.testing.assert_array_equal(matrix, CONFUSION)
    tp, fp, fn = metrics.class_counts(matrix)
    np.testing.assert_array_equal([tp, fp, fn], [[1, 1, 0], [1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(metrics.class_iou(tp, fp, fn), [1 / 2, 1 / 2, np.nan])
    assert metrics.miou(tp, fp, fn) == 1 / 2
    assert metrics.pixel_accuracy(tp, fn) == 2 / 3


def test_a_perfect_prediction_is_1_and_a_predicted_absent_class_costs_only_the_miss():
    label = np.array([[0, 1], [1, 1]])
    assert metrics.miou(*metrics.class_counts(metrics.confusion_matrix(label, label, 3))) == 1
    counts = metrics.class_counts(metrics.confusion_matrix(label, np.array([[0, 1], [1, 2]]), 3))
    assert metrics.miou(*counts) == (1 + 2 / 3) / 2


def test_an_image_without_labels_is_0():
    matrix = metrics.confusion_matrix(np.full((2, 2), 255, np.uint8), PREDICTION, 3)
    tp, fp, fn = metrics.class_counts(matrix)
    assert not matrix.any()
    assert metrics.miou(tp, fp, fn) == metrics.pixel_accuracy(tp, fn) == 0


def test_leading_axes_are_kept_and_summed_counts_are_those_of_the_summed_images():
    labels, predictions = np.random.randint(0, 4, (2, 3, 5, 5))
    labels[1] = 255
    matrices = np.stack([metrics.confusion_matrix(label, prediction, 4) for label, prediction in zip(labels, predictions, strict=True)])
    tp, fp, fn = metrics.class_counts(matrices)
    assert metrics.miou(tp, fp, fn).shape == metrics.pixel_accuracy(tp, fn).shape == (3,)
    assert metrics.miou(tp, fp, fn)[1] == 0
    whole = metrics.class_counts(metrics.confusion_matrix(labels, predictions, 4))
    np.testing.assert_array_equal([tp.sum(0), fp.sum(0), fn.sum(0)], whole)


@pytest.mark.parametrize(
    ("label", "prediction", "message"),
    [
        ([0, 1], [0], r"prediction: must have the label's shape \(2,\), got \(1,\)"),
        ([0, 3], [0, 0], r"label: must be a class in 0\.\.2, got 0\.\.3"),
        ([0, 1], [0, 255], r"prediction: must be a class in 0\.\.2, got 0\.\.255"),
        ([0, 1], [-1, 0], r"prediction: must be a class in 0\.\.2, got -1\.\.0"),
    ],
)
def test_values_that_are_no_class_are_errors(label, prediction, message):
    with pytest.raises(ValueError, match=message):
        metrics.confusion_matrix(np.array(label), np.array(prediction), 3)
