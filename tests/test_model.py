"""Multi-exit networks: sub-models and segments against the full model, weight files, and the conversion of models made elsewhere."""

import dataclasses
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from mess_tf.configs import BackboneConfig, Config, DataConfig, ExitsConfig, HeadSpec
from mess_tf.files import best_weights
from mess_tf.network.costs import graph_nodes, model_cost
from mess_tf.network.model import FINAL, MultiExitNetwork, build_network, convert, load_network

LAYERS = keras.layers
SIZE = (32, 64)
CLASSES = 5
CONFIG = Config(
    data=DataConfig(input_size=SIZE),
    backbone=BackboneConfig(width=0.35),
    exits=ExitsConfig(count=4, final_head="decoder-r1-b0", plain_head="fcn-r8-b0", heads=("deeplab-r8-b0", "decoder-r8-b0")),
)
SPECS = tuple(HeadSpec.parse(name) for name in ("fcn-r8-b0", "deeplab-r8-b0", "decoder-r8-b0"))


def image(size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.uniform(0, 255, (1, *size, 3)).astype(np.float32)


def scramble(*models: keras.Model) -> None:
    """Random weights that keep features of about their size, batch-norm statistics among them."""
    for model in models:
        for variable in model.weights:
            if variable.name in ("gamma", "moving_variance"):
                variable.assign(np.random.uniform(0.7, 1.3, variable.shape))
            elif variable.name in ("beta", "moving_mean", "bias"):
                variable.assign(np.random.uniform(-0.3, 0.3, variable.shape))


def chain(segments: list[keras.Model], x: np.ndarray) -> list[np.ndarray]:
    """Runs segments one after another, each with the tensors that it asks for: the logits of each."""
    tensors, logits = {"image": x}, []
    for segment in segments:
        outputs = segment({name: tensors[name] for name in segment.input}, training=False)
        logits.append(outputs.pop("logits").numpy())
        tensors |= outputs
    return logits


def ancestors(model: keras.Model, names: tuple[str, ...]) -> set[str]:
    """Names of the layers that these ones depend on, themselves included."""
    inputs = {node.name: node.inputs for node in graph_nodes(model)}
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting.extend(set(inputs[name]) - found)
    return found


@pytest.fixture(scope="module")
def network():
    keras.utils.set_random_seed(0)
    result = build_network(CONFIG, CLASSES)
    result.add_heads(SPECS, 0.9)
    scramble(result.original, *result.heads.values())
    return result


@pytest.fixture(scope="module")
def reference(network):
    """An image, and the raw logits of all candidates from the full model."""
    x = image()
    return x, {name: value.numpy() for name, value in network.submodel(network.candidates)(x, training=False).items()}


# === Sub-models and segments ===


def test_candidates_are_all_heads_at_all_exits_and_the_original(network):
    heads = [f"exit{k}.{spec.name}" for k in (1, 2, 3) for spec in SPECS]
    assert network.candidates == [*heads, "final.original"]
    assert network.num_classes == CLASSES


def test_a_sub_model_gives_what_the_full_model_gives(network, reference):
    x, expected = reference
    assert len({value.tobytes() for value in expected.values()}) == len(network.candidates)
    for name in network.candidates:
        outputs = network.submodel([name])(x, training=False)
        assert list(outputs) == [name]
        np.testing.assert_allclose(outputs[name], expected[name], atol=1e-5)


def test_the_originals_output_is_the_original(network, reference):
    x, expected = reference
    np.testing.assert_allclose(network.original(x, training=False), expected[FINAL], atol=1e-5)
    assert expected[FINAL].shape == (1, 4, 8, CLASSES)


EXITS = ("exit1", "exit2", "exit3", "final")


CHAINS = [chosen for n in (1, 2, 3, 4) for chosen in itertools.combinations(EXITS, n)]
SHORT = {("exit1",), ("final",), ("exit1", "exit3"), ("exit2", "final"), ("exit1", "exit2", "exit3"), EXITS}


@pytest.mark.parametrize("exits", [pytest.param(each, marks=() if each in SHORT else pytest.mark.full) for each in CHAINS], ids="-".join)
def test_chained_segments_give_what_the_full_model_gives(network, reference, exits):
    x, expected = reference
    kinds = dict(zip(EXITS, ("fcn", "decoder", "deeplab"), strict=False))
    candidates = [FINAL if name == "final" else f"{name}.{kinds[name]}-r8-b0" for name in exits]
    segments = network.segments(candidates)
    assert [segment.name for segment in segments] == candidates
    for logits, name in zip(chain(segments, x), candidates, strict=True):
        np.testing.assert_allclose(logits, expected[name], atol=1e-5)
    check_hand_over(segments)


def check_hand_over(segments: list[keras.Model]) -> None:
    """Every tensor handed over is new and read later, and every tensor read has been handed over."""
    known = {"image"}
    for index, segment in enumerate(segments):
        assert set(segment.input) <= known
        handed = set(segment.output) - {"logits"}
        assert not handed & known
        assert all(any(name in later.input for later in segments[index + 1 :]) for name in handed)
        known |= handed


def test_segments_with_the_rest_of_the_original_as_a_head(network):
    other = MultiExitNetwork(network.original, network.exit_points)
    other.add_heads([HeadSpec("rest"), HeadSpec("decoder", 8)], 0.9)
    scramble(*other.heads.values())
    candidates, x = ["exit1.rest", "exit2.decoder-r8-b0", "exit3.rest", FINAL], image()
    segments, expected = other.segments(candidates), other.submodel(candidates)(x, training=False)
    for logits, name in zip(chain(segments, x), candidates, strict=True):
        np.testing.assert_allclose(logits, expected[name], atol=1e-5)
    check_hand_over(segments)


def test_a_shallow_tap_passes_across_a_segment(network):
    """The decoder of exit3 reads a tensor of the first segment that the second one does not need."""
    first, second, third = network.exit_points
    shallow = first.shallow.name
    other = MultiExitNetwork(network.original, (first, second, dataclasses.replace(third, shallow=first.shallow)))
    other.add_heads([HeadSpec("fcn", 8), HeadSpec("decoder", 8)], 0.9)
    candidates = ["exit1.fcn-r8-b0", "exit2.fcn-r8-b0", "exit3.decoder-r8-b0"]
    segments = other.segments(candidates)
    assert [shallow in segment.input for segment in segments] == [False, False, True]
    assert [shallow in segment.output for segment in segments] == [True, False, False]
    check_hand_over(segments)
    x = image()
    expected = other.submodel(candidates)(x, training=False)
    for logits, name in zip(chain(segments, x), candidates, strict=True):
        np.testing.assert_allclose(logits, expected[name], atol=1e-5)


def test_nothing_deeper_than_needed_is_computed(network):
    for point in network.exit_points:
        for kind in ("fcn", "decoder"):
            candidate = f"{point.name}.{kind}-r8-b0"
            features = network.features([candidate])
            assert {layer.name for layer in features.layers} == ancestors(network.original, network.taps(candidate))
            assert model_cost(features, SIZE).macs == point.tap.macs
    assert len(network.features([FINAL]).layers) == len(network.original.layers)


def test_the_bias_of_the_logits_moves_them():
    layers = {"plain": LAYERS.Conv2D(CLASSES, 1), "softmax": LAYERS.Conv2D(CLASSES, 1, activation="softmax")}
    layers |= {"resized": LAYERS.Conv2D(CLASSES, 1), "none": LAYERS.Conv2D(CLASSES, 1, use_bias=False)}
    layers |= {"relu": LAYERS.Conv2D(CLASSES, 1, activation="relu"), "normalised": LAYERS.Conv2D(CLASSES, 1)}
    layers |= {"sum": LAYERS.Conv2D(CLASSES, 1)}
    shift, x = np.array([1, -2, 0, 3, 0.5], np.float32), image()
    for name, layer in layers.items():
        model = plain_network()
        logits = layer(model.layers[-2].output)
        if name == "resized":
            logits = LAYERS.UpSampling2D(2, interpolation="bilinear")(logits)
        elif name == "sum":
            logits = LAYERS.Add()([logits, LAYERS.Conv2D(CLASSES, 1, use_bias=False)(model.layers[-2].output)])
        elif name == "normalised":
            logits = LAYERS.BatchNormalization()(logits)
        network = convert(keras.Model(model.input, logits), 2, SIZE)
        bias = network.logit_bias(FINAL)
        if name in ("none", "relu", "normalised"):
            assert bias is None, name
            continue
        before = network.original(x).numpy()
        bias.assign(bias.numpy() + shift)
        moved = network.original(x).numpy() - before - shift
        np.testing.assert_allclose(moved - moved.mean(axis=-1, keepdims=True), 0, atol=1e-3, err_msg=name)


def test_unknown_candidates_are_errors(network):
    with pytest.raises(KeyError, match=r"candidate: must be one of \['exit1\.fcn-r8-b0', .*, got 'exit9\.fcn-r8-b0'"):
        network.submodel(["exit9.fcn-r8-b0"])


def test_every_exit_trains_its_head_and_what_lies_before_it_and_nothing_else(network):
    candidate = "exit1.decoder-r8-b0"
    features = network.features([candidate])
    variables = network.original.trainable_variables
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(network.head_logits(candidate, features(image(), training=False)) ** 2)
    slopes = tape.gradient(loss, [variable.value for variable in variables])
    before = {id(variable) for variable in features.trainable_variables}
    assert 0 < len(before) < len(variables)
    assert [slope is not None for slope in slopes] == [id(variable) in before for variable in variables]


# === Weight files ===


def test_weights_pass_to_a_network_whose_layers_were_made_in_another_order(network, reference, tmp_path):
    x, expected = reference
    path = str(tmp_path / "weights.npz")
    network.save_weights(path)
    keras.layers.Conv2D(1, 1)  # shifts the numbers in the names of all layers made later
    other = build_network(CONFIG, CLASSES)
    other.add_heads(SPECS[::-1], 0.9)
    other.load_weights(path)
    for name, value in other.submodel(network.candidates)(x, training=False).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5)


def test_float16_halves_the_file_and_loads_as_float32(tmp_path):
    small = convert(plain_network(), 2, SIZE)
    for dtype in ("float32", "float16"):
        small.save_weights(str(tmp_path / dtype), dtype)
    kernel = small.original.trainable_variables[0].numpy()
    small.load_weights(str(tmp_path / "float16"))
    np.testing.assert_array_equal(small.original.trainable_variables[0], kernel.astype(np.float16))
    assert small.original.trainable_variables[0].dtype == "float32"
    with np.load(tmp_path / "float16") as half, np.load(tmp_path / "float32") as full:
        assert sum(half[name].nbytes for name in half.files) * 2 == sum(full[name].nbytes for name in full.files)


def test_a_file_of_another_network_is_an_error_and_loads_nothing(tmp_path):
    def heads(network: MultiExitNetwork, *names: str) -> MultiExitNetwork:
        network.add_heads([HeadSpec.parse(name) for name in names], 0.9)
        return network

    path = str(tmp_path / "weights.npz")
    heads(convert(plain_network(), 2, SIZE), "fcn-r8-b0").save_weights(path)
    for other, message in (
        (heads(convert(plain_network(), 2, SIZE), "fcn-r8-b0", "fcn-r4-b0"), r"missing or of another shape: \['exit1\.fcn-r4-b0/000"),
        (heads(convert(plain_network(), 2, SIZE)), r"missing or of another shape: \[\], unknown: \['exit1\.fcn-r8-b0/000"),
        (heads(convert(plain_network(4), 2, SIZE), "fcn-r8-b0"), r"missing or of another shape: \['final\.original/"),
    ):
        before = [variable.numpy() for variable in other.original.weights]
        with pytest.raises(ValueError, match=rf"weights\.npz: does not fit this network; {message}"):
            other.load_weights(path)
        for value, variable in zip(before, other.original.weights, strict=True):
            np.testing.assert_array_equal(variable, value)


def test_files_of_no_network_are_errors(tmp_path):
    small = convert(plain_network(), 2, SIZE)
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        small.load_weights(str(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ValueError, match=r"text\.npz: must be a complete \.npz file, got "):
        small.load_weights(str(tmp_path / "text.npz"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    small = convert(plain_network(), 2, SIZE)
    path = tmp_path / "weights.npz"
    small.save_weights(str(path))
    before = path.read_bytes()

    def savez(file, **_):
        file.write(b"half a fi")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(OSError, match="disk full"):
        small.save_weights(str(path))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.npz"]


def test_load_network_takes_stage_2_if_there_is_one_else_stage_1(network, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"workdir: must hold trained weights, which `python -m mess_tf\.train` makes, got '"):
        load_network(str(tmp_path), CONFIG, CLASSES)
    trained = MultiExitNetwork(network.original, network.exit_points)
    # A trained network needs no backbone weights, so a file that is gone does not matter.
    config = dataclasses.replace(CONFIG, backbone=dataclasses.replace(CONFIG.backbone, weights="gone.h5"))
    for stage, specs in (("stage1", [HeadSpec.parse(CONFIG.exits.plain_head)]), ("stage2", CONFIG.exits.head_specs)):
        trained.add_heads(specs, 0.9)
        scramble(*trained.heads.values())
        path = tmp_path / "checkpoints" / stage
        path.mkdir(parents=True)
        assert best_weights(str(tmp_path), stage) == str(path / "best.npz")
        trained.save_weights(best_weights(str(tmp_path), stage))
        loaded = load_network(str(tmp_path), config, CLASSES)
        assert loaded.candidates == trained.candidates
        for part, other in zip((trained.original, *trained.heads.values()), (loaded.original, *loaded.heads.values()), strict=True):
            for variable, value in zip(part.weights, other.weights, strict=True):
                np.testing.assert_array_equal(variable, value)


# === Conversion ===


def conv(x: keras.KerasTensor, channels: int, strides: int = 1) -> keras.KerasTensor:
    return LAYERS.ReLU()(LAYERS.Conv2D(channels, 3, strides, padding="same")(x))


def plain_network(width: int = 8) -> keras.Model:
    """Like VGG: convolutions and pooling, no residuals."""
    x = picture = keras.Input((None, None, 3), name="picture")
    for stage in range(4):
        x = conv(conv(x, width * 2**stage), width * 2**stage)
        x = LAYERS.MaxPooling2D()(x)
    return keras.Model(picture, LAYERS.UpSampling2D(4, interpolation="bilinear")(LAYERS.Conv2D(CLASSES, 1)(x)), name="plain")


def unet() -> keras.Model:
    x = picture = keras.Input((None, None, 3), name="picture")
    x = LAYERS.Rescaling(1 / 255)(x)
    skips = []
    for channels in (8, 16, 24):
        x = conv(conv(x, channels), channels)
        skips.append(x)
        x = LAYERS.MaxPooling2D()(x)
    x = conv(x, 32)
    for channels, skip in zip((24, 16, 8), skips[::-1], strict=True):
        x = LAYERS.Conv2DTranspose(channels, 2, strides=2)(x)
        x = conv(LAYERS.Concatenate()([x, skip]), channels)
    return keras.Model(picture, LAYERS.Conv2D(CLASSES, 1)(x), name="unet")


def nested_deeplab() -> keras.Model:
    """A `keras.applications` backbone used as a layer, with explicit padding, and a Sequential as another."""
    backbone = keras.applications.MobileNetV2((*SIZE, 3), alpha=0.35, include_top=False, weights=None)
    projection = keras.Sequential([LAYERS.Conv2D(32, 1, use_bias=False), LAYERS.BatchNormalization(), LAYERS.ReLU()], name="projection")
    picture = keras.Input((*SIZE, 3), name="picture")
    x = backbone(keras.applications.mobilenet_v2.preprocess_input(picture), training=False)
    context = LAYERS.GlobalAveragePooling2D(keepdims=True)(x)
    x = projection(x) + LAYERS.Conv2D(32, 1)(context)
    return keras.Model(picture, LAYERS.Conv2D(CLASSES, 1)(x), name="deeplab")


def softmax_network() -> keras.Model:
    model = plain_network()
    return keras.Model(model.input, LAYERS.Softmax()(model.output), name="softmax")


def upsampled_probabilities() -> keras.Model:
    model = plain_network()
    x = LAYERS.UpSampling2D(2)(LAYERS.Conv2D(CLASSES, 1, activation="softmax")(model.output))
    return keras.Model(model.input, x, name="upsampled_probabilities")


def sequential_network() -> keras.Sequential:
    layers = [
        layer
        for width in (8, 16, 24)
        for layer in (LAYERS.Conv2D(width, 3, 2, padding="same", activation="relu"), LAYERS.BatchNormalization())
    ]
    return keras.Sequential([keras.Input((*SIZE, 3)), *layers, LAYERS.Conv2D(CLASSES, 1)], name="sequential")


def listed_network() -> keras.Model:
    """Input and output given as lists of one."""
    model = plain_network()
    return keras.Model([model.input], [model.output], name="listed")


@pytest.mark.parametrize(
    ("build", "exits"),
    [
        (unet, 4),
        (nested_deeplab, 4),
        (plain_network, 4),
        (softmax_network, 4),
        (upsampled_probabilities, 4),
        (sequential_network, 3),
        (listed_network, 2),
    ],
)
def test_converted_models_compute_what_they_did_and_have_exits(build, exits):
    model = build()
    weights = [variable.numpy() for variable in model.weights]
    network = convert(model, exits, SIZE)
    network.add_heads(SPECS, 0.9)
    x = image()
    outputs = {name: value.numpy() for name, value in network.submodel(network.candidates)(x, training=False).items()}
    probabilities = build in (softmax_network, upsampled_probabilities)
    final = tf.nn.softmax(outputs[FINAL]) if probabilities else outputs[FINAL]
    np.testing.assert_allclose(final, keras.tree.flatten(model([x] if build is listed_network else x, training=False))[0], atol=1e-5)
    assert network.num_classes == CLASSES
    assert {id(variable) for variable in network.original.weights} == {id(variable) for variable in model.weights}
    for variable, value in zip(model.weights, weights, strict=True):
        np.testing.assert_array_equal(variable, value)

    assert len(network.exit_points) == exits - 1
    macs = [point.tap.macs for point in network.exit_points]
    total = model_cost(network.original, SIZE).macs
    assert macs == sorted(set(macs))
    assert macs[0] > 0
    assert macs[-1] < total
    for kind in ("fcn", "decoder"):
        candidates = [*(f"{point.name}.{kind}-r8-b0" for point in network.exit_points), FINAL]
        segments = network.segments(candidates)
        check_hand_over(segments)
        for logits, name in zip(chain(segments, x), candidates, strict=True):
            np.testing.assert_allclose(logits, outputs[name], atol=1e-5)


def test_cut_points_inside_a_nested_backbone_are_found():
    network = convert(nested_deeplab(), 4, SIZE)
    assert all(point.tap.name.startswith("block_") for point in network.exit_points)
    backbone = keras.applications.MobileNetV2((*SIZE, 3), alpha=0.35, include_top=False, weights=None)
    assert model_cost(network.original, SIZE).macs == model_cost(backbone, SIZE).macs + (2 * 1280 * 32 + 1280 * 32) + 2 * 32 * CLASSES


def test_exits_of_a_unet_are_on_its_way_down():
    network = convert(unet(), 4, SIZE)
    assert [(point.tap.stride, point.tap.channels) for point in network.exit_points] == [(1, 8), (2, 16), (4, 24)]


def test_an_exit_before_everything_else_has_a_decoder_that_reads_one_tap():
    point = convert(plain_network(), 9, SIZE).exit_points[0]
    assert point.shallow == point.tap
    network = MultiExitNetwork(plain_network(), (point,))
    network.add_heads([HeadSpec("decoder", 8)], 0.9)
    assert network.taps("exit1.decoder-r8-b0") == (point.tap.name,)


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


def two_inputs() -> keras.Model:
    a, b = keras.Input((*SIZE, 3)), keras.Input((*SIZE, 3))
    return keras.Model([a, b], LAYERS.Add()([a, b]))


def two_outputs() -> keras.Model:
    model = plain_network()
    return keras.Model(model.input, [model.output, model.output])


def classifier() -> keras.Model:
    model = plain_network()
    return keras.Model(model.input, LAYERS.GlobalAveragePooling2D()(model.output))


def grey() -> keras.Model:
    x = keras.Input((*SIZE, 1))
    return keras.Model(x, LAYERS.Conv2D(CLASSES, 3)(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Subclassed, r"model: must be a functional Keras model or a built Sequential, got Subclassed"),
        (lambda: keras.Sequential([LAYERS.Conv2D(3, 1)]), r"model: must be a functional Keras model or a built Sequential, got Sequential"),
        (lambda: LAYERS.Conv2D(3, 1), r"model: must be a functional Keras model or a built Sequential, got Conv2D"),
        (two_inputs, r"model: must map one image \[B, H, W, 3\] to one map .* got inputs and outputs of shapes"),
        (two_outputs, r"model: must map one image"),
        (classifier, r"model: must map one image .*\(None, 5\)\]"),
        (grey, r"model: must map one image .*\(None, 32, 64, 1\)"),
        (plain_network, r"exits\.count: plain has 8 block boundaries, so at most 9 \(--set exits\.count=9\), got 20"),
    ],
)
def test_models_that_cannot_be_converted_are_errors(build, message):
    with pytest.raises(ValueError, match=message):
        convert(build(), 20, SIZE)


@pytest.mark.parametrize("exits", [-1, 0, 1])
def test_a_network_has_two_exits_or_more(exits):
    with pytest.raises(ValueError, match=rf"^exits: must be at least 2, the final one included, or names of layers, got {exits}$"):
        convert(plain_network(), exits, SIZE)


def test_input_scale_resizes_inside_the_network_with_the_same_weights():
    full = Config(data=DataConfig(input_size=(64, 96)), backbone=BackboneConfig(width=0.35), exits=ExitsConfig(count=3))
    half = dataclasses.replace(full, backbone=dataclasses.replace(full.backbone, input_scale=0.5))
    networks = [build_network(config, 5) for config in (full, half)]
    for network in networks:
        network.add_heads([HeadSpec("fcn", 4)], 0.9)
    for pair in zip(networks[0].heads.values(), networks[1].heads.values(), strict=True):
        pair[1].set_weights(pair[0].get_weights())
    networks[1].original.set_weights(networks[0].original.get_weights())
    image = np.random.default_rng(0).uniform(0, 255, (1, 64, 96, 3)).astype(np.float32)
    whole, reduced = (network.submodel(network.candidates) for network in networks)
    expected, found = whole(tf.image.resize(image, (32, 64))), reduced(image)  # 32 x 48, in multiples of 32
    assert all(networks[0].taps(name) == networks[1].taps(name) for name in networks[0].heads)
    for name in networks[0].candidates:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4)
    with pytest.raises(ValueError, match=r"data\.crop_size: must be \(0, 0\)"):
        build_network(dataclasses.replace(half, data=dataclasses.replace(half.data, crop_size=(32, 32))), 5)
