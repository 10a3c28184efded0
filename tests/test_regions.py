"""Segments at active cells against the dense network, and against the masked one."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from small_network import small_network

from mess_tf.configs import BackboneConfig, HeadSpec
from mess_tf.graph import flatbuffer
from mess_tf.graph.conversion import FP32, PRECISIONS, ExportError
from mess_tf.graph.policy import decide, decide_by_cell
from mess_tf.graph.regions import budgets, check_segment, region_graphs, segment_graph
from mess_tf.network import regions
from mess_tf.network.backbones import build_backbone
from mess_tf.network.layers import BatchNormalization
from mess_tf.network.model import FINAL, MultiExitNetwork, convert
from mess_tf.network.regions import NEAREST, NEIGHBOURS, STALE, ActiveSegment, _Filler

LAYERS = keras.layers
SIZE, CLASSES = (80, 112), 4


def resnet(bottleneck: bool) -> keras.Model:
    """A network of ResNet's kind at stride 16, whose last stage has more channels and is dilated."""
    image = keras.Input((None, None, 3), name="image")
    x = LAYERS.Conv2D(12, 7, 8, "same", name="stem")(LAYERS.Rescaling(1 / 255)(image))
    for stage, (channels, stride, dilation) in enumerate([(16, 2, 1), (24, 1, 2)]):
        for block in range(3):
            kernels = (1, 3, 1) if bottleneck else (3, 3)
            shortcut = x
            if block == 0:
                shortcut = BatchNormalization(name=f"s{stage}_bn")(LAYERS.Conv2D(channels, 1, stride, name=f"s{stage}_shortcut")(x))
            y = x
            for number, kernel in enumerate(kernels):
                name = f"s{stage}_b{block}_{number}"
                width = channels // 2 if bottleneck and number < 2 else channels
                steps = {"strides": stride} if block == number == 0 else {"dilation_rate": dilation if kernel > 1 else 1}
                y = LAYERS.Conv2D(width, kernel, padding="same", name=name, **steps)(y)
                y = BatchNormalization(name=f"{name}_bn")(y)
                y = LAYERS.Activation("relu", name=f"{name}_relu")(y) if number + 1 < len(kernels) else y
            x = LAYERS.Activation("relu", name=f"s{stage}_b{block}_out")(LAYERS.Add(name=f"s{stage}_b{block}_add")([shortcut, y]))
    return keras.Model(image, LAYERS.Conv2D(CLASSES, 1, dtype="float32", name="logits")(x))


def with_logits(backbone: keras.Model) -> keras.Model:
    return keras.Model(backbone.input, LAYERS.Conv2D(CLASSES, 1, dtype="float32", name="to_logits")(backbone.output))


NETWORKS = {
    "bottleneck": (lambda: resnet(True), ["s0_b1_out"]),
    "basic": (lambda: resnet(False), ["s0_b1_out"]),
    "small": (lambda: small_network(CLASSES), ["block_3_add"]),
    "mobilenet_v2": (lambda: with_logits(build_backbone(BackboneConfig(width=0.35))), ["block_11_add"]),
    "efficientnet_lite0": (lambda: with_logits(build_backbone(BackboneConfig("efficientnet_lite0"))), ["block5b_add"]),
}


@pytest.fixture(scope="module")
def networks():
    """Networks with one early exit, by name, whose weights were drawn at random, built when asked for."""
    built = {}

    def network(name: str) -> MultiExitNetwork:
        if name not in built:
            build, exits = NETWORKS[name]
            built[name] = convert(build(), exits, SIZE)
            built[name].add_heads([HeadSpec.parse("fcn-r2-b0")], 0.9)
            generator = np.random.default_rng(0)
            for variable in built[name].original.weights:
                if variable.name in ("gamma", "moving_variance"):
                    variable.assign(generator.uniform(0.7, 1.3, variable.shape))
                elif variable.name in ("beta", "moving_mean", "bias"):
                    variable.assign(generator.uniform(-0.3, 0.3, variable.shape))
        return built[name]

    return network


def segment_of(network: MultiExitNetwork, cell: int, neighbours: str) -> ActiveSegment:
    return ActiveSegment(network, ["exit1.fcn-r2-b0", FINAL], 1, SIZE, cell, neighbours)


def features(network: MultiExitNetwork) -> tuple[dict, tf.Tensor]:
    """What the first segment hands on for an image, and the logits of the whole network."""
    first, second = network.segments(["exit1.fcn-r2-b0", FINAL])
    image = np.random.default_rng(1).uniform(0, 255, (1, *SIZE, 3)).astype(np.float32)
    tensors = dict(first({"image": image}, training=False))
    del tensors["logits"]
    return tensors, second(tensors, training=False)["logits"]


def close(made: tf.Tensor, expected: tf.Tensor) -> None:
    np.testing.assert_allclose(made, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_active_is_the_dense_network(networks, name):
    network = networks(name)
    tensors, expected = features(network)
    segment = segment_of(network, 2, NEAREST)
    cells = np.random.default_rng(2).permutation(segment.grid[0] * segment.grid[1]).astype(np.int32)
    close(segment.gathered(tensors, tf.constant(cells))["logits"], expected)
    active = segment.active(cells[None])
    for neighbours in NEIGHBOURS:
        close(segment_of(network, 2, neighbours).masked(tensors, active)["logits"], expected)


SMALL = [(name, neighbours, cell) for name in ("bottleneck", "basic", "small") for neighbours in NEIGHBOURS for cell in (1, 2)]


@pytest.mark.parametrize(
    ("name", "neighbours", "cell"),
    [*SMALL, ("mobilenet_v2", NEAREST, 3), ("efficientnet_lite0", NEAREST, 2), ("efficientnet_lite0", STALE, 1)],
)
def test_gathered_is_masked(networks, name, neighbours, cell):
    network = networks(name)
    tensors, dense = features(network)
    segment = segment_of(network, cell, neighbours)
    total = segment.grid[0] * segment.grid[1]
    for count in {1, total // 3} if name in ("bottleneck", "small") else {total // 3}:
        cells = np.random.default_rng(count).permutation(total)[:count].astype(np.int32)
        active = segment.active(cells[None])
        assert int(tf.reduce_sum(tf.cast(active, tf.int32))) == count
        masked = segment.masked(tensors, active)["logits"]
        close(segment.gathered(tensors, tf.constant(cells))["logits"], masked)
        assert np.abs(masked - dense).max() > 1e-3 * np.abs(dense).max()


def test_features_that_have_left_stay_as_they_were(networks):
    network = networks("small")
    tensors, _ = features(network)
    segment = segment_of(network, 1, STALE)
    assert [block.output for block in segment.blocks] == ["block_4_add", "block_5_add"]
    active = np.zeros((2, *segment.grid), bool)
    active[1, 2, 3] = True
    head = network.original.layers[-1]
    nothing, one = segment.masked({name: tf.repeat(value, 2, 0) for name, value in tensors.items()}, active)["logits"].numpy()
    close(nothing, head(tensors["block_3_add"])[0])
    assert (one != nothing).any(-1).tolist() == active[1].tolist()


def test_nearest_active_position_by_hand():
    """Two of nine columns are active: each of the others takes the nearer one, the right one between them, the mean out of reach."""
    values = np.arange(10, 19, dtype=np.float32).reshape(1, 1, 9, 1)
    active = np.zeros((1, 1, 9, 1), bool)
    active[..., [0, 2], :] = True
    filled = _Filler(active, zeros=False)(tf.constant(values))
    assert filled.numpy().ravel().tolist() == [10, 12, 12, 12, 12, 12, 12, 11, 11]
    assert _Filler(active, zeros=True)(tf.constant(values)).numpy().ravel().tolist() == [10, 0, 12, 0, 0, 0, 0, 0, 0]


def test_unsure_cells_and_the_merged_mask(networks):
    """Of a map of 5x7 positions of 16 pixels, cells of 2x2: the last ones are cut off."""
    segment = segment_of(networks("small"), 2, STALE)
    assert segment.size == (5, 7) and segment.grid == (3, 4)
    confident = np.ones((1, *SIZE), np.float32)
    confident[0, 64:, 96:] = 0  # the last cell, 16x16 pixels
    confident[0, :8, :32] = 0  # a quarter of the first
    sure = segment.sure(confident)
    assert sure.numpy().ravel().tolist() == [0.75, *[1] * 10, 0]
    cells = segment.most_unsure(sure, 3)
    assert cells.numpy().tolist() == [[11, 0, 1]]
    early, late = np.full((1, *SIZE), 1, np.uint8), np.full((1, *SIZE), 2, np.uint8)
    merged = segment.merged(early, late, segment.active(cells)).numpy()[0]
    assert (merged[:32, :64] == 2).all() and (merged[64:, 96:] == 2).all() and (merged == 2).sum() == 32 * 64 + 16 * 16
    np.testing.assert_array_equal(segment.merged(early, late, np.zeros((1, 3, 4), bool)), early)  # nothing active: the earlier exit


def test_what_cannot_be_done_is_named():
    image = keras.Input((None, None, 3), name="image")
    x = tap = LAYERS.Conv2D(8, 3, 16, "same", name="stem")(image)
    y = LAYERS.Conv2D(8, 1, name="expand")(x)
    y = LAYERS.Multiply(name="excite")([y, LAYERS.GlobalAveragePooling2D(keepdims=True, name="squeeze")(y)])
    x = LAYERS.Add(name="sum")([x, y])
    network = convert(keras.Model(image, LAYERS.Conv2D(CLASSES, 1)(x)), ["stem"], SIZE)
    network.add_heads([HeadSpec.parse("fcn-r2-b0")], 0.9)
    with pytest.raises(ValueError, match=r"the branch of sum .* squeeze \(GlobalAveragePooling2D\) does not"):
        segment_of(network, 1, STALE)
    network = convert(keras.Model(image, LAYERS.Conv2D(CLASSES, 1, name="plain")(tap)), ["stem"], SIZE)
    network.add_heads([HeadSpec.parse("fcn-r2-b0")], 0.9)
    with pytest.raises(ValueError, match=r"must have a block that adds its own input, after what it reads \(stem\), got \['plain'\]"):
        segment_of(network, 1, STALE)


def filters(graph: flatbuffer.Graph) -> set[bytes]:
    """The weights of convolutions, which have four axes in the file too."""
    constants = [tensor for operation in graph.operations for tensor in operation.inputs if tensor and tensor.content is not None]
    return {bytes(tensor.content) for tensor in constants if len(tensor.shape) == 4}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_export_shares_the_weights_of_the_dense_segment(networks, precision):
    network = networks("bottleneck")
    tensors = {name: value.numpy() for name, value in features(network)[0].items()}
    segment = segment_of(network, 2, NEAREST)
    assert budgets(segment) == [2, 3, 6, 12]
    graphs = {budget: segment_graph(segment, budget, precision, [tensors]) for budget in (3, 12)}
    for budget, graph in graphs.items():
        content = flatbuffer.write({"serve": graph}, precision != FP32)
        check_segment(segment, budget, content, tensors, precision)
    assert filters(graphs[3]) == filters(graphs[12])
    with pytest.raises(ExportError, match="differs from Keras"):
        check_segment(segment, 2, flatbuffer.write({"serve": graphs[3]}), tensors)


@pytest.mark.parametrize("edge_aware", [False, True])
def test_sure_cells_of_an_exit(networks, edge_aware):
    segment = segment_of(networks("small"), 2, STALE)
    logits = tf.constant(np.random.default_rng(3).normal(0, 3, (1, 5, 7, CLASSES)).astype(np.float32))
    made = decide_by_cell(logits, SIZE, (0.7, edge_aware), [segment.cells_of(side, axis) for axis, side in enumerate(SIZE)])
    expected = decide(logits, SIZE, [(0.7, edge_aware)])
    np.testing.assert_array_equal(made["mask"], expected["mask"])
    pixels = np.array([[1024, 1024, 1024, 512], [1024, 1024, 1024, 512], [512, 512, 512, 256]])
    assert round(float(tf.reduce_sum(made["sure"] * pixels))) == int(expected["confident_pixels"][0]) > 0
    if not edge_aware:
        confident = tf.reduce_max(tf.nn.softmax(tf.image.resize(logits, SIZE)), -1) >= 0.7
        np.testing.assert_allclose(made["sure"], segment.sure(confident), atol=1e-6)


def test_a_file_whose_cells_leave(networks, monkeypatch):
    """Three exits in turn: the mask of Keras' masked segment at the least sure cells, the one before elsewhere."""
    monkeypatch.setattr(regions, "TILE_VALUES", 2 * 4 * 4 * 192)  # of three cells, two are gathered first
    network = convert(networks("small").original, ["block_3_add", "block_4_add"], SIZE)
    network.add_heads([HeadSpec.parse("fcn-r2-b0")], 0.9)
    candidates = ["exit1.fcn-r2-b0", "exit2.fcn-r2-b0", FINAL]
    segments = [ActiveSegment(network, candidates, index, SIZE, 2, NEAREST) for index in (1, 2)]
    graphs = region_graphs(network, candidates, segments, SIZE, [(0.3, False)] * 2, shares=(1 / 4, 1))
    assert [*graphs] == ["segment.exit1", "segment.exit2.3", "segment.exit2.12", "segment.final.3", "segment.final.12"]
    interpreter = Interpreter(model_content=flatbuffer.write(graphs))

    def run(signature: str, **tensors) -> dict[str, np.ndarray]:
        runner = interpreter.get_signature_runner(signature)
        return runner(**{name: tensors[name] for name in runner.get_input_details()})

    def same(made: np.ndarray, expected: tf.Tensor) -> None:
        assert (made != expected.numpy()).mean() < 1e-3  # where two classes tie

    made = run("segment.exit1", image=np.random.default_rng(1).uniform(0, 255, (1, *SIZE, 3)).astype(np.float32))
    for segment, name in zip(segments, ("exit2", "final"), strict=True):
        before, cells = made, segment.most_unsure(made["sure"], 3)
        active = segment.active(cells)
        expected = segment.masked({tensor: before[tensor] for tensor in segment.inputs}, active)
        made = run(f"segment.{name}.3", **before)
        same(made["mask"], segment.merged(before["mask"], decide(expected["logits"], SIZE, ())["mask"], active))
        assert (made["mask"] != before["mask"]).any()
        if "sure" in made:
            close(made["block_4_add"], expected["block_4_add"])
            assert (made["sure"] == 2).tolist() == (~active.numpy()).tolist()
    dense = segments[1].dense({name: before[name] for name in segments[1].inputs})["logits"]
    everything = run("segment.final.12", **before)["mask"]  # changes what had not left
    same(everything, segments[1].merged(before["mask"], decide(dense, SIZE, ())["mask"], before["sure"] < 2))
