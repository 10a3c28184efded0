"""Segments at active cells against the dense network, and against the masked one; files and bundles of them."""

import dataclasses
import json
import subprocess
import types
from collections.abc import Sequence

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from PIL import Image
from small_network import small_network

from mess_runtime import runner, verify
from mess_runtime.__main__ import main
from mess_runtime.bundle import Bundle, Cost, Predicted, Regions
from mess_runtime.engines import ENGINES
from mess_runtime.runner import Runner
from mess_tf import files
from mess_tf.configs import BackboneConfig, HeadSpec
from mess_tf.export_tflite import export_deployment
from mess_tf.files import Certificate, Configuration, Deployment, ExitChoice, Objective, Original
from mess_tf.graph import flatbuffer
from mess_tf.graph.conversion import FP32, INT8, PRECISIONS, ExportError
from mess_tf.graph.exporter import Exporter
from mess_tf.graph.policy import decide, decide_by_cell
from mess_tf.graph.regions import RegionChain, budgets, check_segment, segment_graph
from mess_tf.network import regions
from mess_tf.network.backbones import build_backbone
from mess_tf.network.layers import BatchNormalization
from mess_tf.network.model import FINAL, MultiExitNetwork, convert
from mess_tf.network.regions import NEAREST, NEIGHBOURS, STALE, ActiveSegment, _Filler, segments_on_grid
from mess_tf.targets import mediapipe, web

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


def deeplab() -> keras.Model:
    """A head of DeepLabV3's kind, whose pooled context joins behind the projection, on a trunk that ends at its last block."""
    trunk = resnet(False)
    x = trunk.get_layer("s1_b2_out").output
    branches = [LAYERS.Conv2D(6, 1, name="aspp_0")(x)]
    branches += [LAYERS.Conv2D(6, 3, padding="same", dilation_rate=rate, name=f"aspp_{rate}")(x) for rate in (1, 2)]
    y = LAYERS.Conv2D(8, 1, name="project")(LAYERS.ReLU()(LAYERS.Concatenate()(branches)))
    y = LAYERS.Add()([y, LAYERS.Conv2D(8, 1, name="context")(LAYERS.GlobalAveragePooling2D(keepdims=True)(x))])
    return keras.Model(trunk.input, LAYERS.Conv2D(CLASSES, 1, dtype="float32", name="to_logits")(LAYERS.ReLU()(y)))


NETWORKS = {
    "bottleneck": (lambda: resnet(True), ["s0_b1_out"]),
    "basic": (lambda: resnet(False), ["s0_b1_out"]),
    "deeplab": (deeplab, ["s1_b2_out"]),
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


FULL = pytest.mark.full
LIKE_OTHERS = ("basic", "mobilenet_v2")


@pytest.mark.parametrize("name", [pytest.param(name, marks=FULL if name in LIKE_OTHERS else ()) for name in NETWORKS])
def test_everything_active_is_the_dense_network(networks, name):
    network = networks(name)
    tensors, expected = features(network)
    segment = segment_of(network, 2, NEAREST)
    cells = np.random.default_rng(2).permutation(segment.grid[0] * segment.grid[1]).astype(np.int32)
    close(segment.gathered(tensors, tf.constant(cells))["logits"], expected)
    active = segment.active(cells[None])
    for neighbours in NEIGHBOURS:
        close(segment_of(network, 2, neighbours).masked(tensors, active)["logits"], expected)


SMALL = [(name, neighbours, cell) for name in ("bottleneck", "small") for neighbours in NEIGHBOURS for cell in (1, 2)]
SMALL += [("deeplab", neighbours, 2) for neighbours in NEIGHBOURS]
OTHERS = [("basic", neighbours, cell) for neighbours in NEIGHBOURS for cell in (1, 2)]
OTHERS += [("deeplab", neighbours, 1) for neighbours in NEIGHBOURS]
OTHERS += [("mobilenet_v2", NEAREST, 3), ("efficientnet_lite0", NEAREST, 2)]


@pytest.mark.parametrize(
    ("name", "neighbours", "cell"),
    [*SMALL, ("efficientnet_lite0", STALE, 1), *(pytest.param(*other, marks=FULL) for other in OTHERS)],
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
    network = convert(keras.Model(image, LAYERS.Conv2DTranspose(CLASSES, 2, 2, name="up")(tap)), ["stem"], SIZE)
    network.add_heads([HeadSpec.parse("fcn-r2-b0")], 0.9)
    with pytest.raises(ValueError, match=r"must have a convolution of stride 1, after what it reads \(stem\), got \['up'\]"):
        segment_of(network, 1, STALE)


def test_answer_is_of_this_exit_where_it_worked(networks):
    """Maps of other sizes are averaged or enlarged; the border between cells lies between positions."""
    segment = segment_of(networks("deeplab"), 1, NEAREST)
    active = np.zeros((1, 5, 7), bool)
    active[0, 2, 3] = True
    late = tf.fill((1, 5, 7, 1), 100.0)
    early = np.arange(10 * 14, dtype=np.float32).reshape(1, 10, 14, 1)
    expected = early[0, ..., 0].reshape(5, 2, 7, 2).mean((1, 3))
    expected[2, 3] = 100
    np.testing.assert_array_equal(segment.answer(early, late, active)[0, ..., 0], expected)
    same_size = segment.answer(late, 2 * late, active)[0, ..., 0].numpy()
    assert same_size[2, 3] == 200 and same_size.sum() == 200 + 34 * 100
    larger = segment.answer(late, tf.zeros((1, 10, 14, 1)), active)[0, ..., 0].numpy()
    assert (larger[4:6, 6:8] == 0).all() and larger.sum() == (140 - 4) * 100


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
def test_a_head_without_blocks_loses_nothing_at_active_cells(networks, neighbours):
    network = networks("deeplab")
    tensors, dense = features(network)
    segment = segment_of(network, 1, neighbours)
    active = segment.active(tf.constant([[0, 3, 4, 17]]))
    made = segment.masked(tensors, active)["logits"]
    places = active.numpy()
    close(made[places], dense[places])
    assert np.abs(made - dense)[~places].max() > 0.01  # the others were not computed
    assert [segment.blocks, segment.size] == [(), (5, 7)]
    head = sum(node.macs for node in segment._nodes if node.name in ("aspp_0", "aspp_1", "aspp_2", "project", "to_logits"))
    assert segment.macs(35) - segment.macs(7) == head - round(head * 7 / 35)


def filters(graph: flatbuffer.Graph) -> set[bytes]:
    """The weights of convolutions, which have four axes in the file too."""
    constants = [tensor for operation in graph.operations for tensor in operation.inputs if tensor and tensor.content is not None]
    return {bytes(tensor.content) for tensor in constants if len(tensor.shape) == 4}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_export_shares_the_weights_of_the_dense_segment(networks, precision):
    network = networks("bottleneck")
    tensors = {name: value.numpy() for name, value in features(network)[0].items()}
    segment = segment_of(network, 2, NEAREST)
    assert budgets(segment) == [2, 3, 5, 6, 12]  # nine of them are 36 of 35 positions
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


CANDIDATES = ["exit1.fcn-r2-b0", "exit2.fcn-r2-b0", FINAL]
CELLS = Regions(NEAREST, (3, 4), (3, 12))


THETAS = (0.43, 0.36)  # near the medians of the confidence at the first two exits


def noise(seed: int) -> np.ndarray:
    """An image of patches."""
    generator = np.random.default_rng(seed)
    patches = generator.integers(0, 256, (SIZE[0] // 16, SIZE[1] // 16, 3)).repeat(16, 0).repeat(16, 1)
    return np.clip(patches + generator.integers(-40, 41, (*SIZE, 3)), 0, 255).astype(np.uint8)


def with_three_exits(model: keras.Model, layers: Sequence[str] = ("block_3_add", "block_4_add", "block_5_add")) -> MultiExitNetwork:
    network = convert(model, [*layers], SIZE)
    network.add_heads([HeadSpec.parse("fcn-r2-b0")], 0.9)
    run = tf.function(network.submodel(network.candidates), autograph=False)
    images = np.stack([noise(seed) for seed in range(7)]).astype(np.float32)
    for _ in range(40):  # moving statistics of the batch normalisation, without which random weights make constant logits
        run(images, training=True)
    return network


@pytest.fixture(scope="module")
def three_exits():
    """The blocks of the small network behind exit 2 and of the final exit can leave cells alone; behind exit 3 there are the logits."""
    keras.utils.set_random_seed(0)
    return with_three_exits(small_network(CLASSES))


@pytest.fixture(scope="module")
def dense_end():
    """The same, but nothing behind exit 3 can leave cells alone."""
    keras.utils.set_random_seed(0)
    small = small_network(CLASSES)
    enlarged = LAYERS.Conv2DTranspose(CLASSES, 2, 2, name="up")(small.get_layer("block_5_add").output)
    return with_three_exits(keras.Model(small.input, enlarged))


def same(made: np.ndarray, expected: tf.Tensor) -> None:
    assert (made != np.asarray(expected)).mean() < 1e-3  # where two classes tie


def run_of(content: bytes):
    interpreter = Interpreter(model_content=content)

    def run(signature: str, tensors) -> dict[str, np.ndarray]:
        runner = interpreter.get_signature_runner(signature)
        return runner(**{name: tensors[name] for name in runner.get_input_details()})

    return run


def test_a_file_whose_cells_leave(three_exits, monkeypatch):
    """Three exits in turn: the mask of Keras' masked segment at the least sure cells, the one before elsewhere."""
    monkeypatch.setattr(regions, "TILE_VALUES", 2 * 4 * 4 * 192)  # of three cells, two are gathered first
    image = noise(1)[None].astype(np.float32)
    chain = RegionChain(three_exits, CANDIDATES, CELLS, SIZE, [(theta, False) for theta in THETAS], images=[image])
    graphs = chain.signatures("float32")
    assert [*graphs] == ["segment.exit1", "segment.exit2.3", "segment.exit2.12", "segment.final.3", "segment.final.12"]
    content = flatbuffer.write(graphs)
    chain.check(content, "float32")
    run = run_of(content)
    made = run("segment.exit1", {"image": image})
    for segment, name in zip(chain.segments, ("exit2", "final"), strict=True):
        before, cells = made, segment.most_unsure(made["sure"], 3)
        active = segment.active(cells)
        expected = segment.masked({tensor: before[tensor] for tensor in segment.inputs}, active)
        made = run(f"segment.{name}.3", before)
        answer = segment.answer(before["answer"], expected["logits"], active)
        same(made["mask"], segment.merged(before["mask"], decide(answer, SIZE, ())["mask"], active))
        assert (made["mask"] != before["mask"]).any()
        assert ("answer" in made) == ("sure" in made)
        if "sure" in made:
            close(made["answer"], answer)
            close(made["block_4_add"], expected["block_4_add"])
            assert (made["sure"] == 2).tolist() == (~active.numpy()).tolist()
    dense = chain.segments[1].dense({name: before[name] for name in chain.segments[1].inputs})["logits"]
    everything = run("segment.final.12", before)["mask"]  # changes what had not left
    same(everything, chain.segments[1].merged(before["mask"], decide(dense, SIZE, ())["mask"], before["sure"] < 2))
    wrong = graphs | {"segment.exit2.3": graphs["segment.exit2.12"]}
    with pytest.raises(ExportError, match=r"segment\.exit2\.3: mask: changed where a cell was left alone"):
        chain.check(flatbuffer.write(wrong), "float32")
    other = RegionChain(
        three_exits, CANDIDATES, CELLS, SIZE, [(THETAS[0], False), (0.4, False)], images=[noise(1)[None].astype(np.float32)]
    )
    with pytest.raises(ExportError, match=r"segment\.exit2\.3: sure: differs from Keras by .* as a mean over the cells"):
        other.check(content, "float32")


def test_a_segment_that_cannot_leave_cells_out_is_always_dense(dense_end):
    candidates = ["exit1.fcn-r2-b0", "exit3.fcn-r2-b0", FINAL]
    assert segments_on_grid(dense_end, candidates, SIZE, CELLS)[1] is None
    images = [noise(seed)[None].astype(np.float32) for seed in (1, 2)]
    chain = RegionChain(dense_end, candidates, CELLS, SIZE, [(theta, True) for theta in THETAS], INT8, images)
    graphs = chain.signatures()
    assert [*graphs] == ["segment.exit1", "segment.exit3.3", "segment.exit3.12", "segment.final.12"]
    assert filters(graphs["segment.exit3.3"]) == filters(graphs["segment.exit3.12"])
    content = flatbuffer.write(graphs, True)
    chain.check(content)
    run = run_of(content)
    before = run("segment.exit1", {"image": noise(1)[None]})
    made = run("segment.exit3.3", before)
    left = made["sure"] == 2
    assert left.sum() == 9
    last = run("segment.final.12", made)["mask"]
    for row, column in zip(*np.nonzero(left[0]), strict=True):
        place = np.s_[0, 32 * row : 32 * (row + 1), 32 * column : 32 * (column + 1)]
        np.testing.assert_array_equal(last[place], before["mask"][place])


def test_regions_that_cannot_be(dense_end):
    with pytest.raises(ValueError, match="regions: must leave out work in one segment at least, got only dense ones; final"):
        segments_on_grid(dense_end, ["exit3.fcn-r2-b0", FINAL], SIZE, CELLS)
    with pytest.raises(ValueError, match=r"regions\.grid: must be of squares of the 5 x 7 positions of final.original, got \(4, 4\)"):
        segments_on_grid(dense_end, ["exit1.fcn-r2-b0", FINAL], SIZE, Regions(STALE, (4, 4), (16,)))
    exporter = Exporter(dense_end, SIZE, fidelity="low")
    with pytest.raises(ValueError, match="fidelity: must be exact with regions, got 'low'"):
        exporter.region_chain(CANDIDATES, CELLS, [(0.3, False)] * 2)


def test_a_deployment_that_cannot_be_is_refused_before_work(dense_end, tmp_path):
    early, last = ExitChoice("exit3", "fcn-r2-b0", 0.5, 0.5), ExitChoice(*FINAL.split("."))
    deployment = Deployment(
        "anytime",
        False,
        (early, last),
        9.0,
        regions=CELLS,
        constraint=Objective("macs", 0.0),
        predicted=files.Predicted(0.5, "macs", 1.0, 1.0, (0.5, 0.5), {}, (0.5, 0.5), (1.0, 1.0), 1),
        original=Original(0.6, 2.0),
        certificate=Certificate(1, 1, {}, 0, 1.0, 0.0, 0.1, None),
        guarantee=None,
        stats_sha256="",
        fidelity="exact",
        made_by={},
    )
    deployment.save(tmp_path / "deployment.json")
    assert Deployment.load(tmp_path / "deployment.json") == deployment
    work = tmp_path / "work"
    with pytest.raises(ValueError, match="regions: must leave out work in one segment at least"):
        export_deployment(Exporter(dense_end, SIZE), deployment, "abcd", work)
    assert not work.exists()


def test_submodels_to_measure(three_exits, tmp_path):
    """A first exit, and a pair at every budget: together what a chain of the two is."""
    exporter = Exporter(three_exits, SIZE)
    exporter.region_first(tmp_path, CANDIDATES[0], CELLS)
    graphs = exporter.region_pair(tmp_path, CANDIDATES[0], FINAL, CELLS)
    assert [*graphs] == [3, 12] and flatbuffer.macs(graphs[3]) < flatbuffer.macs(graphs[12])
    names = [f"region.{CANDIDATES[0]}", *(f"region.{CANDIDATES[0]}.{FINAL}.{budget}" for budget in (12, 3))]
    assert sorted(path.stem for path in tmp_path.iterdir()) == names
    run = {name: run_of((tmp_path / f"{name}.tflite").read_bytes()) for name in names}
    first = run[names[0]]("serve", {"image": noise(1)[None]})
    assert {"mask", "sure"} < {*first}
    assert [*run[names[2]]("serve", first)] == ["mask"]


def test_a_dense_pair_is_measured_at_all_cells(dense_end, tmp_path):
    exporter, pair = Exporter(dense_end, SIZE), ("exit3.fcn-r2-b0", FINAL)
    with pytest.raises(ValueError, match="regions: must leave out work in one segment at least"):
        exporter.region_pair(tmp_path, *pair, CELLS)
    exporter.region_pair(tmp_path, *pair, CELLS, tuple(np.arange(side) // 32 for side in SIZE))
    [path] = tmp_path.iterdir()
    assert path.stem == f"region.{pair[0]}.{pair[1]}.12"
    first, second = dense_end.segments(pair)
    tensors = first({"image": noise(1)[None].astype(np.float32)}, training=False)
    tensors = {name: value.numpy() for name, value in tensors.items() if name != "logits"}
    expected = decide(second(tensors, training=False)["logits"], SIZE, ())["mask"].numpy()
    expected[:, :32, 32:64] = 3  # of a cell that has left before
    before = {"sure": np.zeros((1, 3, 4), np.float32), "mask": np.full((1, *SIZE), 3, np.uint8)}
    before["sure"][0, 0, 1] = 2
    same(run_of(path.read_bytes())("serve", tensors | before)["mask"], expected)


# === A bundle, run ===


@pytest.fixture(scope="module")
def bundle(three_exits, tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("regions") / "bundle"
    early = (ExitChoice(*name.split(".", 1), theta, 0.5) for name, theta in zip(CANDIDATES, THETAS, strict=False))
    exits = (*early, ExitChoice(*FINAL.split(".")))
    configuration = Configuration("input-dependent", False, exits, None, regions=CELLS)
    predicted = Predicted(0.5, Cost("macs", 1.0), (0.5, 0.25, 0.25))
    Exporter(three_exits, SIZE).bundle(folder, configuration, predicted, "abcd", extra_signatures=["alone"])
    return Bundle.load(folder)


def asking(bundle: Bundle, *thetas: float) -> Bundle:
    """The bundle, whose cells leave its early exits from other shares on."""
    *early, last = bundle.manifest.segments
    segments = [dataclasses.replace(each, theta_img=theta) for each, theta in zip(early, thetas, strict=True)]
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, segments=(*segments, last)))


def keras_run(network: MultiExitNetwork, bundle: Bundle, image: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]], np.ndarray]:
    """The mask, budget and active cells of every segment, and the exit that each cell has its answer from, by `masked`."""
    segments = segments_on_grid(network, CANDIDATES, SIZE, CELLS)
    tensors = dict(network.segments(CANDIDATES)[0]({"image": image[None].astype(np.float32)}, training=False))
    alive, mask, steps, cells = tf.ones((1, *CELLS.grid), tf.bool), None, [(12, 12)], np.zeros((1, *CELLS.grid), int)
    answer, budget = None, 12
    for index, choice in enumerate(bundle.manifest.segments):
        logits = tensors.pop("logits")
        answer = logits = logits if budget == 12 else segments[index - 1].answer(answer, logits, alive)
        made = decide(logits, SIZE, ())["mask"]
        mask = made if mask is None else segments[0].merged(mask, made, alive)
        cells = np.where(alive, index, cells)
        if choice.theta_img is None:
            break
        confident = tf.reduce_max(tf.nn.softmax(tf.image.resize(logits, SIZE)), -1) >= choice.theta_pix
        sure = np.where(alive, segments[0].sure(confident), 2)
        unsure = int((sure < choice.theta_img - 1e-5).sum())
        if not unsure:
            break
        budget = next(each for each in CELLS.budgets if each >= unsure)
        steps.append((budget, unsure))
        active = segments[index].active(segments[index].most_unsure(sure, budget))
        alive &= active
        tensors = dict(segments[index].masked({name: tensors[name] for name in segments[index].inputs}, active))
    return mask.numpy()[0], steps, cells[0]


def steps_of(result) -> list[tuple[int, int]]:
    return [(step.budget, step.active) for step in result.trace]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bundle_runs_as_keras_masks(three_exits, bundle, engine):
    assert Bundle.load(bundle.folder).manifest.regions == CELLS
    seen, mixed = set(), False
    for thetas in ((0.05, 0.5), (0.3, 0.2)):
        asked = asking(bundle, *thetas)
        run = Runner(asked, engine=engine)
        for seed in range(1, 7):
            result = run.run(noise(seed))
            mask, steps, cells = keras_run(three_exits, asked, noise(seed))
            assert steps_of(result) == steps
            np.testing.assert_array_equal(result.cells, cells)
            same(result.mask, mask)
            seen.add(tuple(budget for budget, _ in steps))
            assert [step.exit for step in result.trace] == ["exit1", "exit2", "final"][: len(steps)]
            assert result.trace[-1].confidence in (None, 1)
            mixed |= len({*cells.ravel().tolist()}) == 2
    assert len(seen) > 2 and mixed  # images that leave, and small and large budgets


def test_exits_of_two_strides_are_verified_and_run(tmp_path):
    """Every budget of a segment reads the answer of the segment before it, of whatever size, not that of its own first budget."""
    keras.utils.set_random_seed(0)
    small = small_network(CLASSES, ((24, 2), (32, 2), (32, 1), (96, 2), (96, 1), (96, 1)))
    network = with_three_exits(small, ["block_2_add", "block_4_add"])
    early = [ExitChoice(name, "fcn-r2-b0", theta_pix, 0.3) for name, theta_pix in (("exit1", 0.3), ("exit2", 0.4))]
    configuration = Configuration("input-dependent", False, (*early, ExitChoice("final", "original")), None, regions=CELLS)
    Exporter(network, SIZE).bundle(tmp_path / "bundle", configuration, None, [f"class{c}" for c in range(CLASSES)])
    tensors = Runner(Bundle.load(tmp_path / "bundle"))._engine.inputs.values()
    assert len({each["answer"].shape for each in tensors if "answer" in each}) == 2
    report = verify.verify(tmp_path / "bundle", "cpu", [noise(1), noise(2)], runs=2)
    assert report.ok and not report.faults


def test_nothing_active_is_the_first_exit_and_everything_the_dense_network(bundle):
    image = noise(7)
    file = run_of(bundle.path.read_bytes())
    run = Runner(asking(bundle, 0.0, 0.0))
    result = run.run(image)
    assert steps_of(result) == [(12, 12)] and result.exit == "exit1" and result.trace[0].confidence == 1
    np.testing.assert_array_equal(result.mask, file("segment.exit1", {"image": image[None]})["mask"][0])
    run = Runner(only_dense(asking(bundle, 1.0, 1.0)))
    result = run.run(image)
    assert [step.budget for step in result.trace] == [12] * 3 and 0 < result.trace[0].confidence < 1
    alone = file("alone.final", {"image": image[None]})["mask"][0]
    same(result.mask, alone)
    budgeted = run.run(image, setting="budgeted")
    np.testing.assert_array_equal(budgeted.mask, alone)
    *_, refined = run.refine(image)
    np.testing.assert_array_equal(refined.mask, result.mask)
    assert all((each.cells == 2).all() and each.cells.shape == (3, 4) for each in (result, budgeted, refined))


def only_dense(bundle: Bundle) -> Bundle:
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, regions=Regions(NEAREST, (3, 4), (12,))))


def test_budgeted_without_signatures_alone_is_the_dense_chain(bundle, monkeypatch):
    image = noise(7)
    expected = Runner(only_dense(asking(bundle, 1.0, 1.0)), engine="interpreter").run(image).mask
    run = Runner(asking(bundle, 0.0, 0.0), engine="interpreter")
    monkeypatch.delitem(run._engine.inputs, "alone.final")
    result = run.run(image, setting="budgeted")
    assert steps_of(result) == [(12, 12)] * 3
    np.testing.assert_array_equal(result.mask, expected)


@pytest.mark.parametrize(
    ("deadline_ms", "budgets", "exit", "cells"),
    [
        (19, [12], "exit1", [12]),
        (20, [12, 3], "exit2", [9, 3]),
        (39, [12, 3, 3], "final", [9, 0, 3]),
        (50, [12, 12], "exit2", [0, 12]),
        (90, [12, 12, 12], "final", [0, 0, 12]),
    ],
)
def test_anytime_takes_the_largest_budget_in_time(bundle, monkeypatch, deadline_ms, budgets, exit, cells):
    """The first exit and 3 cells take 10 ms, 12 cells 40 ms; more than 3 are unsure at the first two exits."""
    clock = [0]
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(perf_counter_ns=lambda: clock[0]))
    run = Runner(asking(bundle, 1.0, 1.0), engine="interpreter")
    original = run._engine.run

    def advancing(signature, inputs):
        clock[0] += round(run._fastest_ms[signature] * 1e6)
        return original(signature, inputs)

    monkeypatch.setattr(run._engine, "run", advancing)
    run._fastest_ms = {name: 40.0 if name.endswith(".12") else 10.0 for name in run._fastest_ms}
    result = run.run(noise(7), "anytime", deadline_ms=deadline_ms)
    assert ([step.budget for step in result.trace], result.exit, np.bincount(result.cells.ravel()).tolist()) == (budgets, exit, cells)
    assert Runner(asking(bundle, 0.0, 0.0)).run(noise(7), "anytime", deadline_ms=1e3).exit == "exit1"  # no cell is left


def test_held_latency_limits_the_cells_that_go_on(bundle):
    """Half of the cells may go on behind exit 1, a quarter behind exit 2: of all images that is the share that does."""
    run = Runner(asking(bundle, 1.0, 1.0), hold_latency=True)
    taken = [[step.budget for step in run.run(noise(7)).trace[1:]] for _ in range(8)]
    beyond = np.array([[*each, 0, 0][:2] for each in taken]).cumsum(0)
    assert (beyond <= np.outer(np.arange(1, 9), (6, 3))).all()
    assert beyond[-1].tolist() == [2 * (3 + 3 + 12) + 3 + 3, 8 * 3]
    assert {budget for each in taken for budget in each} == {3, 12}


def test_commands_on_a_bundle_with_regions(bundle, tmp_path, monkeypatch, capsys):
    Image.fromarray(noise(3)).save(tmp_path / "a.png")

    def command(*words) -> str:
        monkeypatch.setattr("sys.argv", ["mess_runtime", *map(str, words)])
        assert main() == 0
        return capsys.readouterr().out

    lines = command("run", bundle.folder, tmp_path / "a.png", f"--output={tmp_path / 'masks'}").splitlines()
    trace = Runner(bundle).run(noise(3)).trace
    segments = json.loads(lines[0])["segments"]
    assert [(each["exit"], each["budget"], each["active"]) for each in segments] == [
        (step.exit, step.budget, step.active) for step in trace
    ]
    assert "3 x 4 cells leave each for itself, segments work on 3, 12 of them; neighbours nearest" in command("inspect", bundle.folder)
    report = json.loads(command("verify", bundle.folder, "--backend=cpu", "--runs=1").splitlines()[-1])
    assert report["ok"] and report["decisions"] == 0
    compared = {(each["signature"], each["output"]) for each in report["differences"]}
    assert {("segment.exit2.3", "sure"), ("segment.exit2.12", "block_4_add"), ("segment.final.3", "mask")} < compared


def test_the_cpp_runner_takes_the_same_budgets(bundle, cpp_runner, tmp_path):
    thetas, words = (0.3, 0.2), []
    run = Runner(asking(bundle, *thetas))
    exits = f"exit1={thetas[0]},exit2={thetas[1]},final@3,12"
    seeds = range(1, 7)
    for seed in seeds:
        noise(seed).tofile(tmp_path / f"{seed}.rgb")
        words += [tmp_path / f"{seed}.rgb", tmp_path / f"{seed}.raw"]

    def runner_of(*words) -> subprocess.CompletedProcess:
        return subprocess.run([str(word) for word in (cpp_runner, "cpu", bundle.path, *words)], capture_output=True, text=True)

    done = runner_of(exits, *words)
    assert done.returncode == 0, done.stderr
    lines = iter([line.split() for line in done.stdout.splitlines()])
    for seed in seeds:
        result = run.run(noise(seed))
        for step in result.trace:
            line = next(lines)
            budget = [] if step.exit == "exit1" else ["budget", str(step.budget)]
            unsure = [] if step.confidence is None else ["unsure", str(round(12 * (1 - step.confidence)))]
            leaves = ["leaves"] if step.exit == result.exit else []
            assert (line[0], line[3:]) == (step.exit, budget + unsure + leaves)
        np.testing.assert_array_equal(np.fromfile(tmp_path / f"{seed}.raw", np.uint8).reshape(SIZE), result.mask)
    for wrong, message in (
        ("exit1=3,exit2=3,final", "no signature segment.exit2 (with regions, budgets are given: EXITS@BUDGETS)"),
        ("exit1=1,final@12,3", "budgets must rise from above 0"),
        ("exit1=1,final@", "budgets must be given behind @"),
    ):
        done = runner_of(wrong, *words[:2])
        assert done.returncode == 1 and message in done.stderr


def test_mediapipe_refuses_regions(bundle, tmp_path):
    with pytest.raises(ValueError, match="--target: must be web or android for a deployment with regions"):
        mediapipe.write(bundle, tmp_path / "mediapipe")
    assert not (tmp_path / "mediapipe").exists()


def test_a_page_gets_every_budget(bundle, tmp_path):
    web.write_bundle(bundle, tmp_path / "bundle")
    made = Bundle.load(tmp_path / "bundle")
    assert {*flatbuffer.read_signatures(made.path.read_bytes())} == {
        "segment.exit1",
        *(f"segment.{exit}.{budget}" for exit in ("exit2", "final") for budget in (3, 12)),
    }
