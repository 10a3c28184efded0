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


@pytest.fixture(scope="module")
def outcome(camvid_dir):
    """Makes a function from a bundle to its mIoU on the validation images and the shares that leave at each exit.

    Images are decoded once, and bundles with the same file and the same thresholds run once.
    """
    examples, known = open_split(DataConfig("folder", str(camvid_dir), ignore_value=11), "val"), {}

    def run(bundle: Bundle) -> tuple[float, list[float]]:
        manifest = bundle.manifest
        key = manifest.sha256, manifest.setting, tuple(segment.theta_img for segment in manifest.segments)
        if key not in known:
            runner, counts, exits = Runner(bundle), np.zeros((3, len(manifest.classes)), np.int64), collections.Counter()
            for index in range(len(examples)):
                image, label = examples.load(index)
                result = runner.run(image)
                counts += metrics.class_counts(metrics.confusion_matrix(label, result.mask, examples.info.num_classes))
                exits[result.exit] += 1
            known[key] = float(metrics.miou(*counts)), [exits[name] / len(examples) for name in manifest.exits]
        return known[key]

    return run


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if Bundle.load(MODELS / folder).manifest.predicted])
def test_a_bundle_keeps_its_promise(folder, outcome):
    bundle = Bundle.load(MODELS / folder)
    miou, rates = outcome(bundle)
    assert miou == pytest.approx(bundle.manifest.predicted.miou, abs=1e-3)
    assert rates == pytest.approx(bundle.manifest.predicted.exit_rates, abs=0.02)
