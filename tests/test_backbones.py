"""Backbones: output strides, gradients, weights of `keras.applications` and of EfficientNet-Lite0, and what goes wrong with them."""

import urllib.error

import keras
import matplotlib.cbook
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from mess_tf.configs import BACKBONES, LITES, BackboneConfig
from mess_tf.files import read_arrays
from mess_tf.network.backbones import _APPLICATIONS, build_backbone

CHANNELS = {"mobilenet_v2": 160, "efficientnet_lite0": 320, "resnet50": 2048}
SIZE = (64, 96)
FULL = pytest.mark.full
BGR_MEANS = np.float32([103.939, 116.779, 123.68])
MILITARY_UNIFORM = 652  # as the weights count the classes of ImageNet


def config(name: str, output_stride: int = 32, weights: str = "none") -> BackboneConfig:
    return BackboneConfig(name, width=0.5 if name == "mobilenet_v2" else 1.0, output_stride=output_stride, weights=weights)


def application(name: str) -> keras.Model:
    if name == "mobilenet_v2":
        return keras.applications.MobileNetV2((*SIZE, 3), alpha=0.5, include_top=False, weights=None)
    return keras.applications.ResNet50(input_shape=(*SIZE, 3), include_top=False, weights=None)


def image(batch: int = 1, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.uniform(0, 255, (batch, *size, 3)).astype(np.float32)


def scramble(model: keras.Model) -> None:
    """Gives the batch normalisations values that are all different, so that no two can be swapped unseen."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            for variable in layer.weights:
                centre = 0.0 if variable.name in ("beta", "moving_mean") else 1.0
                variable.assign(centre + np.random.uniform(-0.3, 0.3, variable.shape))


@pytest.fixture(scope="module")
def backbones():
    """A function that builds each backbone once, all output strides of a name with the same weights."""
    built = {}

    def get(name: str, output_stride: int) -> keras.Model:
        if (name, output_stride) not in built:
            model = built[name, output_stride] = build_backbone(config(name, output_stride))
            if output_stride == 32:
                scramble(model)
            else:
                model.set_weights(get(name, 32).get_weights())
        return built[name, output_stride]

    return get


@pytest.fixture(scope="module")
def applications(tmp_path_factory):
    """Each of the two `keras.applications` models with random weights, and the file that holds them."""
    result = {}
    for name in ("mobilenet_v2", "resnet50"):
        model = application(name)
        scramble(model)
        path = str(tmp_path_factory.mktemp(name) / "random.weights.h5")
        model.save_weights(path)
        result[name] = model, path
    return result


# === Structure ===


@pytest.mark.parametrize("output_stride", [8, pytest.param(16, marks=FULL), 32])
@pytest.mark.parametrize("name", CHANNELS)
def test_output_shape_is_as_declared_and_every_variable_gets_a_gradient(backbones, name, output_stride):
    model = backbones(name, output_stride)
    assert model.input.shape == (None, None, None, 3)
    statistics = [variable.numpy() for variable in model.non_trainable_variables]
    with tf.GradientTape() as tape:
        features = model(image(2, (32, 64)), training=True)
        loss = tf.reduce_sum(features * np.random.normal(size=features.shape).astype(np.float32))
    for variable, value in zip(model.non_trainable_variables, statistics, strict=True):
        variable.assign(value)
    assert features.shape == (2, 32 // output_stride, 64 // output_stride, CHANNELS[name])
    gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    assert [
        variable.path for variable, slope in zip(model.trainable_variables, gradients, strict=True) if slope is None or not np.any(slope)
    ] == []


@pytest.mark.parametrize("name", CHANNELS)
def test_dilation_changes_the_resolution_and_not_the_values(backbones, name, full):
    """À trous: the coarse features are found in the finer ones, from the first place (resnet50) or the last one of each cell."""
    x = image()
    coarse = backbones(name, 32)(x).numpy()
    for output_stride in (16, 8) if full else (8,):
        ratio = 32 // output_stride
        first = 0 if name == "resnet50" else ratio - 1
        fine = backbones(name, output_stride)(x).numpy()[:, first::ratio, first::ratio]
        np.testing.assert_allclose(fine, coarse, atol=1e-4 * np.abs(coarse).max())


def test_images_of_any_size_pass(backbones):
    assert backbones("mobilenet_v2", 32)(image(1, (45, 60))).shape == (1, 2, 2, 160)


# === Weights of keras.applications ===


@pytest.mark.parametrize(
    ("name", "last_layer", "preprocess"),
    [
        ("mobilenet_v2", "block_16_project_BN", lambda x: x / 127.5 - 1),
        ("resnet50", "conv5_block3_out", lambda x: x[..., ::-1] - BGR_MEANS),
    ],
)
def test_features_are_those_of_keras_applications(applications, name, last_layer, preprocess):
    base, path = applications[name]
    x = image(2)
    expected = keras.Model(base.input, base.get_layer(last_layer).output)(preprocess(x), training=False).numpy()
    features = build_backbone(config(name, weights=path))(x, training=False).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50"])
def test_a_missing_file_is_an_error(name, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"backbone\.weights: must be 'none', 'imagenet' or an existing Keras weight file, got '.*no\.h5'"
    ):
        build_backbone(config(name, weights=str(tmp_path / "no.h5")))


@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_a_file_of_another_network_is_an_error(applications):
    with pytest.raises(ValueError, match=r"backbone\.weights: '.*random\.weights\.h5' does not fit mobilenet_v2: "):
        build_backbone(config("mobilenet_v2", weights=applications["resnet50"][1]))


def test_a_file_of_another_kind_is_an_error(tmp_path):
    (tmp_path / "notes.weights.h5").write_text("no weights")
    with pytest.raises(ValueError, match=r"backbone\.weights: '.*notes\.weights\.h5' does not fit mobilenet_v2: "):
        build_backbone(config("mobilenet_v2", weights=str(tmp_path / "notes.weights.h5")))


def test_imagenet_weights_of_a_width_without_any_are_an_error():
    with pytest.raises(ValueError, match="alpha must be one of"):
        build_backbone(BackboneConfig(width=0.9, weights="imagenet"))


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50"])
def test_a_download_without_a_connection_says_what_to_do(name, monkeypatch, tmp_path):
    def urlretrieve(*_):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("keras.src.utils.file_utils.urlretrieve", urlretrieve)
    monkeypatch.setattr("keras.src.backend.config._KERAS_DIR", str(tmp_path))
    with pytest.raises(ConnectionError, match=rf"backbone\.weights: 'imagenet' for {name} .*no route.*or pass a downloaded file or 'none'"):
        build_backbone(config(name, weights="imagenet"))


OTHERS = {  # the last layer of the trunk, where it is not the network's, and what it passes on
    "mobilenet_v3_small": ("MobileNetV3Small", "expanded_conv_10_add", 96),
    "efficientnet_v2_b0": ("EfficientNetV2B0", "block6h_add", 192),
    "convnext_tiny": ("ConvNeXtTiny", "", 768),
}


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", *(pytest.param(name, marks=FULL) for name in ("convnext_tiny", "efficientnet_v2_b0"))]
)
def test_other_networks_have_the_features_of_keras_applications_and_any_output_stride(name, tmp_path):
    class_name, last, channels = OTHERS[name]
    base = getattr(keras.applications, class_name)(input_shape=(*SIZE, 3), include_top=False, weights=None)
    scramble(base)
    base.save_weights(tmp_path / "random.weights.h5")
    x = image()
    expected = keras.Model(base.input, base.get_layer(last).output if last else base.output)(x, training=False).numpy()
    coarse, fine = (build_backbone(config(name, stride, str(tmp_path / "random.weights.h5"))) for stride in (32, 8))
    features = coarse(x, training=False).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-4 * np.abs(expected).max())
    shape = (1, SIZE[0] // 8, SIZE[1] // 8, channels)
    assert fine.compute_output_shape((1, *SIZE, 3)) == shape
    if name == "convnext_tiny":  # the others pool the whole map on the way, which is another one then
        np.testing.assert_allclose(fine(x, training=False).numpy()[:, 1::4, 1::4], features, atol=1e-4 * np.abs(features).max())


def test_every_name_is_one_of_keras_applications():
    assert sorted([*_APPLICATIONS, *LITES]) == sorted(BACKBONES)
    assert all(hasattr(keras.applications, known.class_name) for known in _APPLICATIONS.values())


# === Weights of EfficientNet-Lite ===


@pytest.mark.parametrize(("number", "parameters"), [(1, 3_774_624), pytest.param(2, 4_413_488, marks=FULL)])
def test_larger_lites_are_those_of_the_packages(number, parameters):
    """Counted with the packages' weights in them, of which none was left over; the first and the last stage have one block in all."""
    model = build_backbone(config(f"efficientnet_lite{number}"))
    blocks = {layer.name.split("_")[0] for layer in model.layers if layer.name.startswith("block")}
    assert sorted(block for block in blocks if block[5] in "17") == ["block1a", "block7a"]
    assert model.count_params() == parameters


@pytest.fixture(scope="module")
def lite0(lite0_weights):
    return build_backbone(config("efficientnet_lite0", weights=str(lite0_weights))), read_arrays(str(lite0_weights))


def test_lite0_uses_every_array_before_the_classifier(lite0):
    model, state = lite0
    unused = ("_conv_head.", "_bn1.", "_fc.")
    arrays = [a for key, a in state.items() if not key.startswith(unused) and not key.endswith("num_batches_tracked")]
    weights = [w for layer in model.layers if layer.name != "preprocess" for w in layer.get_weights()]
    assert sorted(np.sort(w, None).tobytes() for w in weights) == sorted(np.sort(a, None).tobytes() for a in arrays)


def test_lite0_completed_by_hand_recognises_a_uniform(lite0):
    """The classifier in NumPy. The photograph, of an admiral in uniform, comes with matplotlib."""
    model, state = lite0
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        x = np.asarray(Image.open(file).resize((224, 224)), np.float32)[None]
    y = np.einsum("bhwc,dc->bhwd", model(x).numpy(), state["_conv_head.weight"][:, :, 0, 0])
    scale = state["_bn1.weight"] / np.sqrt(state["_bn1.running_var"] + 1e-3)
    y = np.clip((y - state["_bn1.running_mean"]) * scale + state["_bn1.bias"], 0, 6).mean((1, 2))
    logits = y @ state["_fc.weight"].T + state["_fc.bias"]
    assert logits.argmax() == MILITARY_UNIFORM


def test_lite0_has_no_download():
    with pytest.raises(
        ValueError, match=r"backbone\.weights: efficientnet_lite0 has no download .*python -m mess_tf\.pretrained.*got 'imagenet'"
    ):
        build_backbone(config("efficientnet_lite0", weights="imagenet"))


def test_lite0_files_that_are_missing_or_do_not_fit_are_errors(lite0, tmp_path):
    _, state = lite0
    path = str(tmp_path / "w.npz")
    with pytest.raises(FileNotFoundError, match=r"backbone\.weights: no file '.*w\.npz'; make one by `python -m mess_tf\.pretrained"):
        build_backbone(config("efficientnet_lite0", weights=path))
    name = "_blocks.2._depthwise_conv.weight"
    for broken in ({key: value for key, value in state.items() if key != name}, state | {name: state[name][:5]}):
        np.savez(path, **broken)
        with pytest.raises(ValueError, match=r"backbone\.weights: '.*w\.npz' does not fit efficientnet_lite0 at block2b_dwconv"):
            build_backbone(config("efficientnet_lite0", weights=path))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_npz_is_an_error(content, tmp_path):
    (tmp_path / "w.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.npz: must be a complete \.npz file, got "):
        read_arrays(str(tmp_path / "w.npz"))
