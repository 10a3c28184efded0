"""Networks as others write and save them: what is taken, what it becomes, and what is refused in which words."""

import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from mess_tf.configs import BackboneConfig, Config, DataConfig, ExitsConfig, HeadSpec
from mess_tf.files import Configuration, ExitChoice
from mess_tf.graph.exporter import Exporter, logits_size, policy_name
from mess_tf.network import originals
from mess_tf.network.costs import graph_nodes
from mess_tf.network.model import FINAL, MultiExitNetwork, build_network, convert

LAYERS = keras.layers
SIZE = (32, 48)
CLASSES = 4


def trunk(size: tuple[int | None, int | None] = (None, None)) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """Image to features at stride 8."""
    image = keras.Input((*size, 3))
    x = LAYERS.Rescaling(1 / 255)(image)
    for width in (8, 16, 24):
        x = LAYERS.Conv2D(width, 3, 2, "same", activation="relu")(x)
    return image, x


def picture() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (1, *SIZE, 3)).astype(np.float32)


def from_file(model: keras.Model, tmp_path, **backbone) -> MultiExitNetwork:
    model.save(tmp_path / "mine.keras")
    config = BackboneConfig("keras_file", weights=str(tmp_path / "mine.keras"), **backbone)
    return build_network(Config(DataConfig(input_size=SIZE), config, ExitsConfig(count=2)), CLASSES)


# === Outputs ===


def test_an_output_in_a_list_of_one_is_taken(tmp_path):
    image, x = trunk()
    model = keras.Model([image], [LAYERS.Conv2D(CLASSES, 1)(x)])
    network = from_file(model, tmp_path)
    np.testing.assert_allclose(network.original(picture()), keras.tree.flatten(model([picture()]))[0], atol=1e-5)


def several_outputs(kind: type) -> keras.Model:
    image, x = trunk()
    deep, side = LAYERS.Conv2D(CLASSES, 1, name="deep")(x), LAYERS.Conv2D(CLASSES, 3, padding="same", name="side")(x)
    return keras.Model(image, {"main": deep, "helper": side} if kind is dict else [deep, side])


@pytest.mark.parametrize(
    ("kind", "name", "index"), [(list, "deep", 0), (list, "side", 1), (dict, "main", "main"), (dict, "side", "helper")]
)
def test_one_of_several_outputs_is_chosen_by_name(kind, name, index, tmp_path):
    model = several_outputs(kind)
    network = from_file(model, tmp_path, output=name)
    np.testing.assert_allclose(network.original(picture()), model(picture())[index], atol=1e-5)


def test_several_outputs_without_a_name_and_unknown_names_are_errors(tmp_path):
    required = r"backbone\.weights: '.*mine\.keras': model: must map one image .* to one map"
    with pytest.raises(ValueError, match=rf"{required}.*backbone\.output=NAME chooses one: 'deep' \(None, .*4\), 'side'"):
        from_file(several_outputs(list), tmp_path)
    with pytest.raises(ValueError, match=r"backbone\.output: must name an output or layer .*'helper', 'main', .*, got 'aux'"):
        from_file(several_outputs(dict), tmp_path, output="aux")


def test_pixels_in_a_row_are_an_error_that_names_the_layer_before_which_can_be_taken(tmp_path):
    image, x = trunk(SIZE)
    logits = LAYERS.Conv2D(CLASSES, 1, name="scores")(x)
    model = keras.Model(image, LAYERS.Softmax()(LAYERS.Reshape((-1, CLASSES))(logits)))
    with pytest.raises(
        ValueError, match=r"must map one image .*\(None, 24, 4\)\]; backbone\.output=NAME takes .* the last one is 'scores'"
    ):
        from_file(model, tmp_path)
    probabilities = tf.nn.softmax(from_file(model, tmp_path, output="scores").original(picture()))
    np.testing.assert_allclose(tf.reshape(probabilities, (1, 24, CLASSES)), model(picture()), atol=1e-5)


def test_a_network_of_another_size_is_an_error(tmp_path):
    image, x = trunk((64, 64))
    model = keras.Model(image, LAYERS.Conv2D(CLASSES, 1)(x), name="square")
    message = r"backbone\.weights: '.*mine\.keras': input_size: must be \(64, 64\), the only one that square takes, got \(32, 48\)"
    with pytest.raises(ValueError, match=rf"{message}; --set data\.input_size=\[64,64\] is that"):
        from_file(model, tmp_path)
    image, x = trunk(SIZE)
    keras.Model(image, LAYERS.Conv2D(CLASSES, 1)(x)).save(tmp_path / "fixed.keras")
    backbone = BackboneConfig("keras_file", weights=str(tmp_path / "fixed.keras"))
    with pytest.raises(ValueError, match=r"exits\.count: .* \(--set exits\.count=\d\), got 9; the network is '.*fixed\.keras'$"):
        build_network(Config(DataConfig(input_size=SIZE), backbone, ExitsConfig(count=9)), CLASSES)
    config = Config(DataConfig(input_size=SIZE, crop_size=(16, 16)), backbone, ExitsConfig(count=2))
    with pytest.raises(ValueError, match=r"data\.crop_size: must be \(0, 0\) with a network that takes images of \(32, 48\) only"):
        build_network(config, CLASSES)


# === Activations at the end ===


def scored(channels: int, activation: str | None, separate: bool) -> tuple[keras.Model, keras.KerasTensor]:
    image, x = trunk()
    x = LAYERS.Conv2D(channels, 1, activation=None if separate else activation)(x)
    if separate:
        x = keras.ops.sigmoid(x) if activation == "sigmoid" else LAYERS.Activation(activation)(x)
    return keras.Model(image, LAYERS.UpSampling2D(2)(x))


@pytest.mark.parametrize("separate", [False, True])
def test_one_channel_becomes_two_classes(separate):
    probabilities, x = scored(1, "sigmoid", separate), picture()
    logits = convert(probabilities, 2, SIZE).original(x)
    expected = probabilities(x).numpy()[..., 0]
    np.testing.assert_allclose(tf.nn.softmax(logits)[..., 1], expected, atol=1e-5)
    assert logits.shape[-1] == 2
    raw = scored(1, None, False)
    of_raw = convert(raw, 2, SIZE).original(x)
    np.testing.assert_allclose(tf.nn.softmax(of_raw)[..., 1], tf.sigmoid(raw(x))[..., 0], atol=1e-5)
    with pytest.raises(ValueError, match="model: must not end in a softmax over one channel"):
        convert(scored(1, "softmax", False), 2, SIZE)


@pytest.mark.parametrize("separate", [False, True])
def test_several_sigmoids_become_logits_of_their_shares(separate):
    model, x = scored(CLASSES, "sigmoid", separate), picture()
    expected = model(x).numpy()
    found = tf.nn.softmax(convert(model, 2, SIZE).original(x)).numpy()
    np.testing.assert_allclose(found, expected / expected.sum(-1, keepdims=True), atol=1e-5)
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


def test_a_sigmoid_that_gates_the_logits_is_none_of_their_own():
    image, x = trunk()
    model = keras.Model(image, LAYERS.Multiply()([LAYERS.Conv2D(CLASSES, 1)(x), LAYERS.Conv2D(CLASSES, 1, activation="sigmoid")(x)]))
    np.testing.assert_allclose(convert(model, 2, SIZE).original(picture()), model(picture()), atol=1e-5)


# === Names ===


def test_layers_of_equal_names_in_nested_models_are_told_apart():
    image = x = keras.Input((*SIZE, 3))
    for number, width in enumerate((8, 16, 24)):
        layers = [LAYERS.Conv2D(width, 3, 2, "same", name="conv"), LAYERS.ReLU(name="act")]
        x = keras.Sequential(layers, name=f"block{number}")(x)
    model = keras.Model(image, LAYERS.Conv2D(CLASSES, 1)(x))
    expected = model(picture()).numpy()
    network = convert(model, 3, SIZE)
    np.testing.assert_allclose(network.original(picture()), expected, atol=1e-5)
    names = [layer.name for layer in network.original.layers]
    assert [*names[:2], *names[3:5]] == ["image", "conv", "block1_conv", "block1_act"]
    convert(model, 3, SIZE)  # the names are unique now


def test_layers_with_names_of_the_projects_own(tmp_path):
    names = ["image", "pixels", "logits", "mask", "confident_pixels", "exit1.mask", "tap.x", "a:1", "final.logits"]
    x = image = keras.Input((*SIZE, 3))
    for number, name in enumerate(names):
        x = LAYERS.Conv2D(8, 3, 2 if number in (1, 7) else 1, "same", name=name)(x)
    model = keras.Model(image, LAYERS.Conv2D(CLASSES, 1)(x))
    expected = model(picture()).numpy()
    exits = ["logits", "mask", "exit1.mask", "a:1"]
    network = convert(model, exits, SIZE)
    assert [point.tap.name for point in network.exit_points] == ["layer_logits", "layer_mask", "layer_exit1_mask", "layer_a_1"]
    network.add_heads([HeadSpec("fcn", 8)], 0.9)
    np.testing.assert_allclose(network.original(picture()), expected, atol=1e-5)
    choices = [ExitChoice(f"exit{k}", "fcn-r8-b0", 0.9, 0.5) for k in (1, 2, 3, 4)]
    configuration = Configuration("input-dependent", False, (*choices, ExitChoice("final", "original")), None)
    Exporter(network, SIZE).bundle(tmp_path / "bundle", configuration, None, ["a", "b", "c", "d"])


# === Precision ===


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_files_of_mixed_precision_compute_in_float32(policy, tmp_path):
    keras.mixed_precision.set_global_policy(policy)
    try:
        image, x = trunk()
        x = keras.ops.cast(LAYERS.BatchNormalization()(x), policy.removeprefix("mixed_"))
        model = keras.Model(image, LAYERS.Activation("linear", dtype="float32")(LAYERS.Conv2D(CLASSES, 1)(x)))
    finally:
        keras.mixed_precision.set_global_policy("float32")
    expected = model(picture()).numpy()
    network = from_file(model, tmp_path)
    assert {node.output.dtype for node in graph_nodes(network.original)} == {"float32"}
    np.testing.assert_allclose(network.original(picture()), expected, atol=0.05 * np.abs(expected).max())
    network.add_heads([HeadSpec("fcn", 8)], 0.9)
    assert list(Exporter(network, SIZE).prefix(tmp_path, "exit1").outputs) == [network.exit_points[0].tap.name]


def test_weights_of_half_precision_are_an_error():
    image, x = trunk()
    model = keras.Model(image, LAYERS.Conv2D(CLASSES, 1, dtype="bfloat16", name="half")(x))
    with pytest.raises(ValueError, match=r"model: must have float32 weights .*: \['half'\]"):
        convert(model, 2, SIZE)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_an_error(value, tmp_path):
    image, x = trunk()
    broken = LAYERS.Conv2D(CLASSES, 1, bias_initializer=keras.initializers.Constant(value), name="broken")
    message = r"^backbone\.weights: .*: model: must have finite weights, those of these layers are not: \['broken'\]$"
    with pytest.raises(ValueError, match=message):
        from_file(keras.Model(image, broken(x)), tmp_path)


# === Layers ===


def test_channels_first_is_an_error_that_names_the_layers():
    image, x = trunk()
    inner = keras.Sequential([keras.Input((None, None, 24)), LAYERS.MaxPooling2D(2, data_format="channels_first", name="pool")])
    with pytest.raises(ValueError, match=r"model: must be channels_last throughout, these layers are channels_first: \['pool'\]"):
        convert(keras.Model(image, LAYERS.Conv2D(CLASSES, 1)(inner(x))), 2, SIZE)


CUSTOM = """
import keras
@keras.saving.register_keras_serializable("theirs")
class Doubled(keras.layers.Layer):
    def call(self, x):
        return 2 * x
"""


def test_custom_classes_are_registered_by_import(tmp_path, monkeypatch):
    (tmp_path / "their_layers.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    module = types.ModuleType("elsewhere")
    exec(CUSTOM, module.__dict__)
    image, x = trunk()
    model = keras.Model(image, LAYERS.Conv2D(CLASSES, 1)(module.Doubled()(x)))
    expected = model(picture()).numpy()
    registered = keras.saving.get_custom_objects()
    del registered["theirs>Doubled"]
    try:
        with pytest.raises(ValueError, match=r"'.*mine\.keras': it does not know 'Doubled'; --import=MODULE imports the module") as caught:
            from_file(model, tmp_path)
        assert len(str(caught.value)) < 400
        originals.allow(["their_layers"], False)
        np.testing.assert_allclose(from_file(model, tmp_path).original(picture()), expected, atol=1e-4)
        with pytest.raises(ValueError, match=r"--import: must name modules that Python finds .*, got 'no_such_module'"):
            originals.allow(["no_such_module"], False)
    finally:
        registered.pop("theirs>Doubled", None)
        sys.modules.pop("their_layers", None)


def test_lambdas_run_only_if_asked_for(tmp_path, monkeypatch):
    image, x = trunk()
    model = keras.Model(image, LAYERS.Conv2D(CLASSES, 1)(LAYERS.Lambda(lambda x: 2 * x)(x)))
    with pytest.raises(
        ValueError, match=r"'.*mine\.keras': a Lambda layer carries Python code; if you trust the file, --unsafe_loading runs it"
    ):
        from_file(model, tmp_path)
    monkeypatch.setattr("keras.src.backend.common.global_state.GLOBAL_STATE_TRACKER", types.SimpleNamespace())
    originals.allow([], True)
    np.testing.assert_allclose(from_file(model, tmp_path).original(picture()), model(picture()), atol=1e-4)


# === Heads ===


def test_heads_stay_as_they_were_if_one_does_not_fit():
    image, x = trunk(SIZE)
    y = LAYERS.Conv2D(CLASSES, 1)(LAYERS.Flatten()(x)[:, None, None, :])  # weights of this size of image alone
    network = convert(keras.Model(image, LAYERS.Concatenate()([LAYERS.Conv2D(CLASSES, 1)(x), LAYERS.UpSampling2D((4, 6))(y)])), 2, SIZE)
    network.add_heads([HeadSpec("fcn", 8)], 0.9)
    before = dict(network.heads)
    with pytest.raises(ValueError, match="head: rest does not fit exit1"):
        network.add_heads([HeadSpec("fcn", 8), HeadSpec("rest")], 0.9)
    assert network.heads == before
    assert network.candidates == ["exit1.fcn-r8-b0", FINAL]


@pytest.mark.parametrize("factor", [1, 4])
def test_the_policy_of_a_head_is_of_the_size_of_its_logits(factor, tmp_path):
    image, x = trunk(SIZE)
    x = LAYERS.Conv2D(24, 3, padding="same", activation="relu")(x)
    network = convert(keras.Model(image, LAYERS.UpSampling2D(factor)(LAYERS.Conv2D(CLASSES, 1)(x))), 4, SIZE)
    network.add_heads([HeadSpec("fcn", 8), HeadSpec("rest")], 0.9)
    exporter = Exporter(network, SIZE)
    sizes = {name: logits_size(name, exporter.shapes) for name in ("exit3.fcn-r8-b0", "exit3.rest", FINAL)}
    height, width = (4, 6) if factor == 1 else (2 * factor, 3 * factor)  # at least the tap's
    assert sizes == {"exit3.fcn-r8-b0": (4, 6), "exit3.rest": (height, width), FINAL: (4 * factor, 6 * factor)}
    assert exporter.head(tmp_path, "exit3.rest").outputs["logits"].shape == (1, height, width, CLASSES)
    assert policy_name("exit3.rest", exporter.shapes, "mask", "exact") == f"mask.{height}x{width}"


def test_sizes_that_do_not_fit_are_refused_before_training():
    image = keras.Input((None, None, 3))
    skip = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(image)
    x = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(keras.layers.MaxPooling2D()(skip))
    x = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(keras.layers.MaxPooling2D()(x))
    x = keras.layers.Conv2DTranspose(4, 2, strides=4)(x)
    unet = keras.Model(image, keras.layers.Conv2D(2, 1)(keras.layers.Concatenate(name="skips")([x, skip])), name="unet")
    message = (
        r"input_size: must fit the layers of unet, got \(18, 24\), where skips joins maps of 16x24 and 18x24 positions; sides that are "
    )
    with pytest.raises(ValueError, match=message + r"divisible by 4 fit, such as \(20, 24\)"):
        convert(unet, 2, (18, 24))
    assert len(convert(unet, 2, (20, 24)).exit_points) == 1
