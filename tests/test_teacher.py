"""Soft targets: averaged views of trained networks, kept in a file that fits its images."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_network import FEW_BLOCKS, small_network

from mess_tf import configs, train
from mess_tf.data.pipelines import SOFT_STRIDE
from mess_tf.data.sources import open_split
from mess_tf.data.synthetic import SYNTHETIC_CLASSES
from mess_tf.files import best_weights
from mess_tf.learning.soft_targets import SoftTargets
from mess_tf.network.model import build_network
from mess_tf.teacher import load_teachers, soft_targets

SIZE = (16, 32)
SMALL = ("backbone.name=keras_file", "backbone.width=1", "exits.count=2", "stage1.epochs=1", "stage2.epochs=0", "data.synthetic_train=8")
DATA = configs.DataConfig(input_size=SIZE, synthetic_train=3, synthetic_val=1)


def colours(bias: float) -> keras.Model:
    """Red, green and blue of a pixel as the logits of three classes, the first one raised."""
    image = keras.Input((None, None, 3))
    return keras.Model(image, keras.layers.Rescaling(1 / 50, [bias, 0.0, 0.0])(image))


@pytest.fixture
def small(tmp_path) -> configs.Config:
    """Of a short training of a small network."""
    keras.utils.set_random_seed(0)
    small_network(len(SYNTHETIC_CLASSES), FEW_BLOCKS).save(tmp_path / "small.keras")
    return configs.apply_overrides(configs.RECIPES["smoke"], [*SMALL, f"backbone.weights={tmp_path / 'small.keras'}"])


def test_the_targets_are_the_mean_over_networks_and_mirror_images():
    examples = open_split(DATA, "train")
    networks = [colours(0.0), colours(3.0)]
    targets = soft_targets(networks, examples, SIZE)
    assert targets.log_probability.shape == (3, SIZE[0] // SOFT_STRIDE, SIZE[1] // SOFT_STRIDE, 3)
    for index, found in enumerate(targets.log_probability):
        image = tf.image.resize(tf.cast(examples.load(index)[0], tf.float32)[None], SIZE)
        views = []
        for network in networks:
            for view in (slice(None), slice(None, None, -1)):
                logits = tf.image.resize(network(image[:, :, view]), (4, 8))
                views.append(tf.nn.softmax(logits)[0][:, view].numpy())
        np.testing.assert_allclose(np.exp(found), np.mean(views, axis=0), atol=2e-3)


def test_trainings_teach_at_shares_of_their_own_input_scale(tmp_path, small):
    config = configs.apply_overrides(small, ["data.input_size=[64,64]"])
    trained = {}
    for scale in (1.0, 0.5):
        workdir, scaled = tmp_path / str(scale), configs.with_input_scale(config, scale)
        workdir.mkdir()
        (workdir / "config.json").write_text(configs.to_json(scaled))
        network = build_network(scaled, 8)  # as if it were trained
        network.add_heads([configs.HeadSpec.parse(scaled.exits.plain_head)], 0.9)
        for kernel in (each for each in network.original.trainable_variables if each.ndim == 4):
            kernel.assign(kernel * np.random.default_rng(int(10 * scale)).uniform(0.5, 1.5, kernel.shape))
        Path(best_weights(workdir, "stage1")).parent.mkdir(parents=True)
        network.save_weights(best_weights(workdir, "stage1"))
        trained[scale] = network.original
    networks = load_teachers([str(tmp_path / str(scale)) for scale in trained], [1.0, 2.0], config.data, 8)
    image = np.random.default_rng(0).uniform(0, 255, (1, 64, 64, 3)).astype(np.float32)
    np.testing.assert_allclose(networks[0](image), trained[1.0](image), atol=1e-5)
    np.testing.assert_allclose(networks[2](image), trained[0.5](image), atol=1e-5)
    assert [network(image).shape[1] for network in networks] == [4, 8, 2, 4]  # at stride 16


def test_a_file_is_refused_for_other_images_or_classes(tmp_path):
    examples = open_split(DATA, "train")
    targets = SoftTargets(examples.names, np.zeros((3, 4, 8, examples.info.num_classes), np.float16))
    path = str(tmp_path / "teacher.npz")
    with pytest.raises(FileNotFoundError, match=r"teacher: must be an existing file, as `python -m mess_tf\.teacher` makes it, got "):
        SoftTargets.load(path, examples)
    targets.save(path)
    np.testing.assert_array_equal(SoftTargets.load(path, examples).log_probability, targets.log_probability)
    with pytest.raises(ValueError, match="must hold the 1 images"):
        SoftTargets.load(path, open_split(DATA, "val"))
    SoftTargets(examples.names, targets.log_probability[..., 1:]).save(path)
    with pytest.raises(ValueError, match="and 7 classes"):
        SoftTargets.load(path, examples)


@pytest.mark.full
def test_a_training_learns_from_the_file(tmp_path, small):
    examples = open_split(small.data, "train")
    untrained = build_network(small, examples.info.num_classes).original
    soft_targets([untrained], examples, small.data.input_size).save(str(tmp_path / "soft.npz"))
    taught = configs.apply_overrides(small, [f"stage1.teacher={tmp_path / 'soft.npz'}", "stage1.distillation=all", "stage1.alpha=1.0"])
    found = train.train(taught, str(tmp_path / "taught")).original.get_weights()
    plain = train.train(small, str(tmp_path / "plain")).original.get_weights()
    assert max(np.abs(a - b).max() for a, b in zip(found, plain, strict=True)) > 1e-3
