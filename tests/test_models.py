"""The trained bundles in models/: they load, run, and do on the validation images what their manifests promise."""

import collections
from pathlib import Path

import numpy as np
import pytest

from mess_runtime.bundle import MANIFEST, Bundle
from mess_runtime.runner import Runner
from mess_tf import metrics
from mess_tf.configs import DataConfig
from mess_tf.data.sources import open_split

MODELS = Path(__file__).resolve().parents[1] / "models"
FOLDERS = [str(path.parent.relative_to(MODELS)) for path in sorted(MODELS.rglob(MANIFEST))]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_bundle_segments_a_photo_of_any_size(folder):
    bundle = Bundle.load(MODELS / folder)
    photo = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    result = Runner(bundle).run(photo)
    assert result.mask.shape == (300, 500) and result.mask.max() < len(bundle.manifest.classes)
    assert result.exit in bundle.manifest.exits


def outcome(bundle: Bundle, data: DataConfig) -> tuple[float, list[float]]:
    """The mIoU of a bundle on the validation images, and the shares of them, with regions of their cells, that leave at each exit."""
    examples, runner, exits = open_split(data, "val"), Runner(bundle), collections.Counter()
    counts = np.zeros((3, examples.info.num_classes), np.int64)
    for index in range(len(examples)):
        image, label = examples.load(index)
        result = runner.run(image)
        counts += metrics.class_counts(metrics.confusion_matrix(label, result.mask, examples.info.num_classes))
        exits.update([result.exit] if result.cells is None else [bundle.manifest.exits[k] for k in result.cells.ravel()])
    return float(metrics.miou(*counts)), [exits[name] / exits.total() for name in bundle.manifest.exits]


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if Bundle.load(MODELS / folder).manifest.predicted])
def test_a_bundle_keeps_its_promise(folder, shared_dir):
    name, ignored = ("voc_animals", 255) if folder.startswith("voc") else ("camvid", 11)
    root = shared_dir / "data" / name
    if not root.is_dir():
        pytest.skip(f"needs {root}")
    bundle = Bundle.load(MODELS / folder)
    miou, rates = outcome(bundle, DataConfig("folder", str(root), ignore_value=ignored))
    assert miou == pytest.approx(bundle.manifest.predicted.miou, abs=1e-3)
    assert rates == pytest.approx(bundle.manifest.predicted.exit_rates, abs=0.02)
