"""Where exits go, what a tap declares, and every head of the head space."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mess_tf.configs import HEAD_SPACE, BackboneConfig, Config, DataConfig, ExitsConfig, HeadSpec
from mess_tf.network.backbones import build_backbone
from mess_tf.network.costs import graph_nodes, model_cost, with_input_size
from mess_tf.network.exits import REST_DETAIL, TAP, ExitPoint, Tap, build_head, build_rest, copy_rest, final_point, find_exit_points
from mess_tf.network.layers import BatchNormalization
from mess_tf.network.model import build_network

LAYERS = keras.layers
SIZE = (32, 64)
CLASSES = 5
STRIDE8 = ExitPoint("exit1", Tap("deep", 8, 40, 2), Tap("shallow", 4, 24, 1))
STRIDE16 = ExitPoint("exit2", Tap("deep", 16, 112, 2), Tap("shallow", 8, 40, 1))


def residual_chain(blocks: list[int]) -> keras.Model:
    """One residual block of n 1×1 convolutions, 4 to 4 channels, for each n."""
    image = keras.Input((None, None, 4), name="image")
    x = LAYERS.ReLU()(image)
    for index, convolutions in enumerate(blocks):
        y = x
        for _ in range(convolutions):
            y = LAYERS.Conv2D(4, 1, use_bias=False)(y)
        x = LAYERS.Add(name=f"block{index}")([x, y])
    return keras.Model(image, x, name="chain")


def plain_chain(convolutions: int) -> keras.Model:
    image = keras.Input((None, None, 4), name="image")
    x = image
    for index in range(convolutions):
        x = LAYERS.ReLU(name=f"relu{index}")(LAYERS.Conv2D(4, 1, use_bias=False)(x))
    return keras.Model(image, x, name="plain")


def names(model: keras.Model, count: int) -> list[str]:
    return [point.tap.name for point in find_exit_points(model, count, (4, 4))]


# === Exit points ===


def test_blocks_of_equal_work_are_cut_evenly():
    assert names(residual_chain([1] * 12), 4) == ["block2", "block5", "block8"]
    assert names(residual_chain([1] * 12), 2) == ["block5"]


def test_the_cut_is_where_the_work_is_nearest():
    # Cumulative work 1, 2, 8, 9, 10 of 10; wanted: 10/3 and 20/3.
    assert names(residual_chain([1, 1, 6, 1, 1]), 3) == ["block1", "block2"]


def test_exits_never_share_a_place():
    # Cumulative work 1, 2, 10, 11 of 11: both wanted places, 11/3 and 22/3, could be nearest to a taken one.
    assert names(residual_chain([2, 12, 1, 1]), 4) == ["block0", "block1", "block2"]
    assert names(residual_chain([12, 1, 1, 2]), 4) == ["block0", "block1", "block2"]


def test_without_residual_blocks_a_cut_is_before_a_convolution():
    assert names(plain_chain(8), 4) == ["relu1", "relu3", "relu5"]


def test_no_exit_is_before_the_first_convolution():
    image = keras.Input((None, None, 4), name="image")
    scaled = LAYERS.Rescaling(1 / 255)(image)  # read twice, so a boundary but for its work of 0
    first = LAYERS.Conv2D(4, 1, strides=2, name="first")(scaled)
    second = LAYERS.Conv2D(4, 1, name="second")(first)
    up = LAYERS.UpSampling2D(2)(LAYERS.Conv2D(4, 1)(second))
    assert names(keras.Model(image, LAYERS.Concatenate()([up, scaled])), 3) == ["first", "second"]


def test_too_many_exits_are_an_error():
    assert len(names(residual_chain([1] * 4), 5)) == 4
    with pytest.raises(ValueError, match=r"exits\.count: plain has 3 block boundaries, so at most 4 \(--set exits\.count=4\), got 7"):
        names(plain_chain(4), 7)


def test_exits_go_to_the_layers_that_are_named():
    points = find_exit_points(residual_chain([1] * 6), ("block1", "block4"), (4, 4))
    assert [(point.name, point.tap.name) for point in points] == [("exit1", "block1"), ("exit2", "block4")]


@pytest.mark.parametrize("layers", [("relu3", "relu1"), ("relu1", "relu1"), ("relu1", "nothing"), ()])
def test_layers_that_no_exit_can_read_are_an_error(layers):
    with pytest.raises(ValueError, match=r"exits\.layers: must be some of these, in this order: \['conv2d.*'relu3'.*\]; got"):
        find_exit_points(plain_chain(5), layers, (4, 4))


@pytest.mark.parametrize(
    "config",
    [BackboneConfig(width=0.35), BackboneConfig("efficientnet_lite0"), BackboneConfig("resnet50", output_stride=8)],
    ids=lambda c: c.name,
)
def test_taps_are_what_they_declare(config):
    backbone = build_backbone(config)
    points = find_exit_points(backbone, 6, SIZE)
    assert [point.name for point in points] == ["exit1", "exit2", "exit3", "exit4", "exit5"]
    macs = [point.tap.macs for point in points]
    assert macs == sorted(set(macs))
    taps = {tap.name: tap for point in (*points, final_point(backbone, SIZE)) for tap in (point.tap, point.shallow)}
    features = keras.Model(backbone.input, {name: backbone.get_layer(name).output for name in taps})
    shapes = {name: x.shape for name, x in features(np.zeros((1, *SIZE, 3), np.float32)).items()}
    sized = with_input_size(backbone, SIZE)
    tensors = {node.name: node.output for node in graph_nodes(sized)}
    for name, tap in taps.items():
        assert shapes[name] == (1, SIZE[0] // tap.stride, SIZE[1] // tap.stride, tap.channels)
        assert tap.macs == sum(node.macs for node in graph_nodes(keras.Model(sized.input, tensors[name])))
    total = model_cost(backbone, SIZE).macs
    free = [tap.macs for tap in taps.values() if tap.name.endswith("add") and tap.macs not in macs]
    for index, point in enumerate(points, 1):
        assert point.shallow.macs < point.tap.macs
        assert point.shallow.stride == (8 if point.tap.stride >= 16 else point.tap.stride // 2)
        assert all(abs(point.tap.macs - index / 6 * total) <= abs(other - index / 6 * total) for other in free)
    end = final_point(backbone, SIZE)
    assert end.tap.stride == config.output_stride
    assert end.tap.macs == total


def test_pooled_context_is_no_place_for_an_exit():
    x = image = keras.Input((96, 128, 3))
    for channels in (16, 32, 64):
        x = LAYERS.Conv2D(channels, 3, 2, "same", activation="relu")(x)
    pooled = [LAYERS.Resizing(12, 16)(LAYERS.Conv2D(16, 1)(LAYERS.AveragePooling2D((12 // n, 16 // n))(x))) for n in (1, 2, 3, 6)]
    x = LAYERS.Conv2D(64, 3, padding="same")(LAYERS.Concatenate()([x, *pooled]))
    points = find_exit_points(keras.Model(image, LAYERS.Conv2D(8, 1)(x)), 4, (96, 128))
    assert [point.tap.stride for point in points] == [4, 8, 8]


def two_branches() -> keras.Model:
    """Detail at stride 8 and meaning at stride 32 from the image on, as in BiSeNetV2."""
    image = detail = meaning = keras.Input((96, 128, 3), name="image")
    for index, channels in enumerate((16, 32, 64)):
        detail = LAYERS.Conv2D(channels, 3, 2, "same", activation="relu", name=f"detail{index}")(detail)
    for index, channels in enumerate((8, 16, 32, 64, 64)):
        meaning = LAYERS.Conv2D(channels, 3, 2, "same", activation="relu", name=f"meaning{index}")(meaning)
    low = LAYERS.Multiply()([meaning, LAYERS.AveragePooling2D(4)(detail)])
    return keras.Model(image, LAYERS.Conv2D(8, 1)(LAYERS.Add()([detail, LAYERS.UpSampling2D(4)(low)])), name="two")


def test_exits_of_two_branches_read_both():
    points = find_exit_points(two_branches(), 5, (96, 128))
    assert [(point.tap.name, point.shallow.name) for point in points] == [
        ("meaning0", "meaning0"),
        ("meaning1", "detail0"),
        ("meaning2", "detail1"),
        ("meaning3", "detail2"),
    ]
    assert [point.tap.name for point in find_exit_points(two_branches(), ["detail0", "detail2"], (96, 128))] == ["detail0", "detail2"]


def test_what_bypasses_a_layer_is_named():
    message = r"exits\.layers: must be some .*; the path through meaning0 -> meaning1 -> .* bypasses 'detail1'"
    with pytest.raises(ValueError, match=message):
        find_exit_points(two_branches(), ["detail1", "meaning1"], (96, 128))
    message = r"exits\.count: two has 4 block boundaries, so at most 5 \(--set exits\.count=5\), got 9"
    with pytest.raises(ValueError, match=message):
        find_exit_points(two_branches(), 9, (96, 128))


def test_convolutions_in_custom_layers_make_boundaries():
    class Stage(LAYERS.Layer):
        def build(self, shape):
            self.conv = LAYERS.Conv2D(2 * shape[-1], 3, 2, "same")

        def call(self, x):
            return self.conv(x)

    x = image = keras.Input((None, None, 3), name="image")
    for index in range(4):
        x = Stage(name=f"stage{index}")(x)
    model = keras.Model(image, LAYERS.Conv2D(CLASSES, 1)(x))
    assert [(point.tap.name, point.tap.stride) for point in find_exit_points(model, 4, (32, 64))] == [
        ("stage0", 2),
        ("stage1", 4),
        ("stage2", 8),
    ]
    with pytest.raises(ValueError, match="model: must multiply its image with weights, none of the layers of idle does"):
        find_exit_points(keras.Model(image, LAYERS.ReLU()(image), name="idle"), 2, (32, 64))


# === Heads ===


def structure(head: keras.Model) -> str:
    """A model's graph in JSON without the names, which differ in any two models."""
    text = head.to_json().replace(f'"{head.name}"', '""')
    for index, layer in enumerate(head.layers):
        text = text.replace(f'"{layer.name}"', f'"{index}"')
    return text


def test_no_two_heads_are_the_same(full):
    """What a reduction does to a head does not depend on its blocks: of the others than 1, the heads of one block show it."""
    assert len(HEAD_SPACE) == 120
    specs = HEAD_SPACE if full else [spec for spec in HEAD_SPACE if spec.reduction == 1 or (spec.blocks, spec.dilation) == (1, 1)]
    assert len({structure(build_head(spec, STRIDE16, CLASSES, momentum=0.9)) for spec in specs}) == len(specs) >= 39


@pytest.mark.parametrize("point", [STRIDE16, STRIDE8], ids=["stride16", "stride8"])
def test_heads_build_at_their_taps(point):
    for spec in HEAD_SPACE[::8]:
        head = build_head(spec, point, CLASSES, momentum=0.9)
        taps = (point.tap, point.shallow) if spec.kind == "decoder" else (point.tap,)
        shapes = [(1, 64 // tap.stride, 128 // tap.stride, tap.channels) for tap in taps]
        assert head.name == f"{point.name}.{spec.name}"
        assert [tensor.name for tensor in head.inputs] == [TAP + tap.name for tap in taps]
        assert head([keras.KerasTensor(shape) for shape in shapes]).shape == (*shapes[-1][:3], CLASSES)


@pytest.mark.parametrize("name", ["fcn-r8-b0", "fcn-r1-b3-d2", "deeplab-r2-b1-d4", "decoder-r1-b0", "decoder-r4-b2-d1"])
def test_every_variable_of_a_head_gets_a_gradient(name):
    head = build_head(HeadSpec.parse(name), STRIDE16, CLASSES, momentum=0.9)
    sizes = {TAP + "deep": (2, 4, 8, 112), TAP + "shallow": (2, 8, 16, 40)}
    inputs = [np.random.normal(size=sizes[tensor.name]).astype(np.float32) for tensor in head.inputs]
    with tf.GradientTape() as tape:
        logits = head(inputs, training=True)
        loss = tf.reduce_sum(logits * np.random.normal(size=logits.shape))
    gradients = tape.gradient(loss, [variable.value for variable in head.trainable_variables])
    assert logits.dtype == tf.float32
    assert [v.path for v, slope in zip(head.trainable_variables, gradients, strict=True) if slope is None or not np.any(slope)] == []


@pytest.mark.parametrize(
    ("name", "stride", "dilations"),
    [
        ("fcn-r1-b0", 16, [1]),
        ("fcn-r1-b3-d1", 16, [1, 1, 1, 1]),
        ("fcn-r1-b3-d4", 16, [4, 16, 64, 1]),
        ("deeplab-r1-b0", 8, [4, 8, 16]),
        ("deeplab-r1-b2-d2", 16, [2, 4, 2, 4, 8]),
        ("decoder-r1-b0", 32, [1, 2, 4, 1]),
    ],
)
def test_dilation_grows_with_the_blocks_and_aspp_rates_with_the_resolution(name, stride, dilations):
    head = build_head(
        HeadSpec.parse(name), ExitPoint("exit1", Tap("deep", stride, 8, 2), Tap("shallow", stride // 2, 8, 1)), CLASSES, momentum=0.9
    )
    assert sorted(layer.dilation_rate[0] for layer in head.layers if isinstance(layer, LAYERS.DepthwiseConv2D)) == sorted(dilations)


def test_a_tap_may_have_the_name_of_a_layer_of_the_head():
    keras.backend.clear_session()  # the first names again: conv2d, depthwise_conv2d, add
    taps = [Tap(name, 16, 8, 2) for name in ("conv2d", "add")]
    for spec in ("fcn-r2-b1-d1", "decoder-r1-b1-d1"):
        assert len(build_head(HeadSpec.parse(spec), ExitPoint("exit1", taps[1], taps[0]), CLASSES, momentum=0.9).inputs) in (1, 2)


def test_reduction_makes_a_head_cheaper():
    for kind in ("fcn", "deeplab", "decoder"):
        heads = [build_head(HeadSpec(kind, reduction, 1), STRIDE16, CLASSES, momentum=0.9) for reduction in (2, 4, 8)]
        sizes = {TAP + "deep": (4, 8), TAP + "shallow": (8, 16)}
        macs = [model_cost(head, {tensor.name: sizes[tensor.name] for tensor in head.inputs}).macs for head in heads]
        assert macs == sorted(set(macs), reverse=True)


# === The rest of the original at half the resolution ===


def dilated_network(tail: list[LAYERS.Layer]) -> keras.Model:
    """Image to logits: a strided convolution to `tap`, then `tail`."""
    image = keras.Input((None, None, 3), name="image")
    x = LAYERS.Conv2D(6, 3, strides=2, padding="same", name="tap")(image)
    for layer in tail:
        x = layer(x)
    return keras.Model(image, LAYERS.Conv2D(CLASSES, 1, name="logits")(x))


def test_rest_computes_at_half_resolution_what_the_original_computes():
    tail = [LAYERS.Conv2D(8, 3, padding="same", dilation_rate=2), BatchNormalization(), LAYERS.Activation("relu6")]
    tail += [LAYERS.DepthwiseConv2D(3, padding="same", dilation_rate=4)]
    original = dilated_network(tail)
    rest = build_rest(original, ExitPoint("exit1", Tap("tap", 2, 6, 1), Tap("tap", 2, 6, 1)), 0.9)
    coarse = np.random.default_rng(0).normal(size=(2, 6, 8, 6)).astype(np.float32)
    fine = coarse.repeat(2, axis=1).repeat(2, axis=2)
    expected = keras.Model(original.get_layer("tap").output, original.output)(fine)[:, ::2, ::2]
    assert rest.name == "exit1.rest"
    np.testing.assert_allclose(rest([fine]), expected, rtol=1e-5, atol=1e-5)


def test_rest_starts_from_the_weights_that_the_original_has_and_shares_none():
    original = dilated_network([LAYERS.Conv2D(8, 3, padding="same")])
    rest = build_rest(original, ExitPoint("exit1", Tap("tap", 2, 6, 1), Tap("tap", 2, 6, 1)), 0.9)
    for variable in original.trainable_variables:
        variable.assign(variable + 1)
    before = [array.copy() for array in rest.get_weights()]
    copy_rest(original, rest)
    for old, new, kept in zip(before, rest.get_weights(), original.get_weights()[2:], strict=True):
        np.testing.assert_array_equal(new, kept)
        np.testing.assert_allclose(new, old + 1, rtol=1e-6)


def test_rest_gets_its_resolution_back_from_the_tap_and_learns_from_zero():
    original = dilated_network([LAYERS.Conv2D(8, 3, padding="same", dilation_rate=2, name="deep")])
    point = ExitPoint("exit1", Tap("tap", 2, 6, 1), Tap("tap", 2, 6, 1))
    features = np.random.default_rng(0).normal(size=(2, 16, 32, 6)).astype(np.float32)
    coarse = build_rest(original, point, 0.9)([features])  # its size is not known, and the logits are as small as they are
    rest = build_rest(original, point, 0.9, (32, 64))
    assert rest.inputs[0].shape[-1] == 6 and len(rest.inputs) == 1
    np.testing.assert_allclose(rest([features]), keras.ops.image.resize(coarse, (16, 32)), rtol=1e-5, atol=1e-5)
    correction = rest.get_layer(REST_DETAIL + "correction")
    correction.kernel.assign(np.random.default_rng(0).normal(size=correction.kernel.shape))
    kept = correction.get_weights()
    shared = original.get_layer("deep")
    shared.kernel.assign(2 * shared.kernel)
    copy_rest(original, rest)
    np.testing.assert_array_equal(rest.get_layer("deep").kernel, shared.kernel)
    np.testing.assert_array_equal(correction.get_weights()[0], kept[0])
    assert np.ptp(rest([features]) - keras.ops.image.resize(build_rest(original, point, 0.9)([features]), (16, 32))) > 0.1


def test_rest_of_a_decoder_keeps_its_resolution():
    exits = ExitsConfig(layers=("block4c_add", "block5c_add"))
    network = build_network(Config(data=DataConfig(input_size=SIZE), backbone=BackboneConfig("efficientnet_lite0"), exits=exits), CLASSES)
    for point in network.exit_points:
        rest = build_rest(network.original, point, 0.9)
        deep, shallow = rest.inputs
        sizes = {deep.name: (2, 4), shallow.name: (4, 8)}  # strides 16 and 8
        assert deep.name == TAP + point.tap.name
        assert rest([keras.KerasTensor((1, *sizes[tensor.name], tensor.shape[-1])) for tensor in rest.inputs]).shape == (1, 4, 8, CLASSES)
        assert model_cost(rest, sizes).macs < 0.4 * (model_cost(network.original, SIZE).macs - point.tap.macs)


def test_rest_of_a_network_that_joins_maps_of_fixed_sizes_is_half_as_large_throughout():
    image = keras.Input((32, 64, 3), name="image")
    x = LAYERS.Conv2D(6, 3, strides=2, padding="same", name="tap")(image)
    y = LAYERS.UpSampling2D(2)(LAYERS.Conv2D(6, 1, strides=2)(x))
    bins = LAYERS.Resizing(16, 32)(LAYERS.Conv2D(2, 1)(LAYERS.AveragePooling2D((8, 8))(y)))
    context = LAYERS.UpSampling2D((16, 32))(LAYERS.AveragePooling2D((16, 32))(y))
    resized = keras.ops.image.resize(LAYERS.Concatenate()([x, y, bins, context]), (32, 64))
    original = keras.Model(image, LAYERS.Conv2D(CLASSES, 1)(LAYERS.Concatenate()([resized, LAYERS.Conv2D(2, 1)(image)])))
    rest = build_rest(original, ExitPoint("exit1", Tap("tap", 2, 6, 1), Tap("tap", 2, 6, 1)), 0.9, (32, 64))
    assert rest.output.shape == (None, 16, 32, CLASSES)
    constants = [np.random.normal(size=(1, 1, 1, x.shape[-1])).astype(np.float32) * np.ones((1, *x.shape[1:3], 1)) for x in rest.inputs]
    sources = [original.get_layer(tensor.name.removeprefix(TAP)).output for tensor in rest.inputs]
    np.testing.assert_allclose(rest(constants), keras.Model(sources, original.output)(constants)[:, ::2, ::2], rtol=1e-4, atol=1e-5)


def unet(size: tuple[int | None, int | None]) -> keras.Model:
    image = keras.Input((*size, 3), name="image")
    first = LAYERS.Conv2D(4, 3, padding="same", name="first")(image)
    second = LAYERS.Conv2D(6, 3, strides=2, padding="same", name="second")(first)
    third = LAYERS.Conv2D(8, 3, strides=2, padding="same", name="third")(second)
    x = LAYERS.Concatenate()([LAYERS.UpSampling2D(2)(third), second])
    x = LAYERS.Concatenate()([LAYERS.UpSampling2D(2)(LAYERS.Conv2D(6, 3, padding="same")(x)), first])
    return keras.Model(image, LAYERS.Conv2D(CLASSES, 1)(x))


def test_rest_of_a_unet_fits_or_says_which_sizes_would():
    point = ExitPoint("exit1", Tap("third", 4, 8, 1), Tap("third", 4, 8, 1))
    assert build_rest(unet((None, None)), point, 0.9, (16, 24)).name == "exit1.rest"
    with pytest.raises(ValueError, match=r"rest does not fit exit1, .*; it does with sides .* divisible by 8, such as \(24, 24\): "):
        build_rest(unet((None, None)), point, 0.9, (20, 24))


def test_rest_of_layers_that_depend_on_their_size_is_an_error():
    image = keras.Input((32, 32, 3), name="image")
    x = LAYERS.Conv2D(6, 3, strides=2, padding="same", name="tap")(image)
    weights_per_place = LAYERS.Dense(CLASSES)(LAYERS.Flatten()(x))
    original = keras.Model(image, LAYERS.Conv2D(CLASSES, 1)(x) + LAYERS.Reshape((1, 1, CLASSES))(weights_per_place))
    with pytest.raises(ValueError, match="rest does not fit exit1"):
        build_rest(original, ExitPoint("exit1", Tap("tap", 2, 6, 1), Tap("tap", 2, 6, 1)), 0.9)
