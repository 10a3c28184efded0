"""Confusion matrix to mIoU: the project's one rule for ignored pixels and absent classes. NumPy only."""

import numpy as np

from mess_tf.configs import IGNORE


def confusion_matrix(label: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts pixels by labelled class (rows) and predicted class (columns).

    Args:
      label: integers of any shape; 0..C-1, or 255 for pixels that do not count.
      prediction: integers of the same shape, 0..C-1.
      num_classes: C.

    Returns:
      int64 [C, C].

    Raises:
      ValueError: if the shapes differ, or a value that counts is no class.
    """
    label, prediction = np.asarray(label), np.asarray(prediction)
    if label.shape != prediction.shape:
        raise ValueError(f"prediction: must have the label's shape {label.shape}, got {prediction.shape}")
    valid = label != IGNORE
    rows, columns = label[valid], prediction[valid]
    for name, values in (("label", rows), ("prediction", columns)):
        if values.size and (values.min() < 0 or values.max() >= num_classes):
            raise ValueError(f"{name}: must be a class in 0..{num_classes - 1}, got {values.min()}..{values.max()}")
    cells = np.multiply(rows, num_classes, dtype=np.int64) + columns
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_counts(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits confusion matrices [..., C, C] into (TP, FP, FN), int64 [..., C] each."""
    tp = np.diagonal(confusion, axis1=-2, axis2=-1)
    return tp.copy(), confusion.sum(-2) - tp, confusion.sum(-1) - tp


def class_iou(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
    """IoU of each class, float64 [..., C] in 0..1; NaN for a class that no label holds."""
    tp, fp, fn = (np.asarray(counts, np.float64) for counts in (tp, fp, fn))
    present = tp + fn > 0
    return np.where(present, tp / np.where(present, tp + fp + fn, 1.0), np.nan)


def miou(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
    """Mean IoU over the classes present in the labels (TP + FN > 0), in 0..1; 0 where there is none.

    A prediction of an absent class costs only through the misses it causes in the classes present.

    Args:
      tp, fp, fn: counts [..., C], summed over the images that count.

    Returns:
      float64 [...].
    """
    iou = class_iou(tp, fp, fn)
    present = ~np.isnan(iou)
    return np.where(present, iou, 0.0).sum(-1) / np.maximum(present.sum(-1), 1)


def pixel_accuracy(tp: np.ndarray, fn: np.ndarray) -> np.ndarray:
    """Share of labelled pixels that are right, float64 [...] in 0..1; 0 where nothing is labelled."""
    tp, fn = np.asarray(tp, np.float64).sum(-1), np.asarray(fn, np.float64).sum(-1)
    return tp / np.maximum(tp + fn, 1.0)
