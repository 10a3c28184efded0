"""What all tests share: quiet logs, fixed seeds, and the data and weights that lie beside the repository."""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before anything imports TensorFlow


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)
    if tensorflow := sys.modules.get("tensorflow"):
        tensorflow.random.set_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder `shared` beside the repository, with data and weights too large for it."""
    return _existing(Path(__file__).resolve().parents[2] / "shared")


@pytest.fixture(scope="session")
def camvid_dir(shared_dir: Path) -> Path:
    """CamVid: {train,val}/{images,labels}."""
    return _existing(shared_dir / "data" / "camvid")


@pytest.fixture(scope="session")
def lite0_weights(shared_dir: Path) -> Path:
    """EfficientNet-Lite0's ImageNet weights, as `mess_tf.pretrained` writes them."""
    return _existing(shared_dir / "weights" / "efficientnet_lite0_imagenet.npz")


def _existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"needs data beside the repository: {path} does not exist")
    return path
