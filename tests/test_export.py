"""Export, calibration, evaluation and the device runtime on one tiny network: what they say of it must agree."""

import dataclasses
import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from small_network import small_network

from mess_runtime.bundle import SIGNATURE, Bundle, InputSpec, Regions, file_sha256
from mess_runtime.runner import Runner
from mess_tf import configs, metrics
from mess_tf.calibrate import calibrate
from mess_tf.configs import BackboneConfig, DataConfig, HeadSpec
from mess_tf.data.sources import open_split
from mess_tf.export_tflite import Options, export_candidates, export_deployment, run_deployment
from mess_tf.files import Certificate, Configuration, Deployment, ExitChoice, Objective, Original, Predicted
from mess_tf.graph import flatbuffer
from mess_tf.graph.conversion import ExportError, check_parity, convert, run_signature
from mess_tf.graph.exporter import Exporter
from mess_tf.graph.policy import decide
from mess_tf.network.backbones import build_backbone
from mess_tf.network.evaluation import accuracies, confusion_matrices, keras_predictor
from mess_tf.network.model import FINAL
from mess_tf.network.model import convert as convert_network
from mess_tf.optimise.space import arrival_costs, evaluate_configuration, macs_costs

SIZE = (32, 64)
HEADS = ("fcn-r1-b0", "decoder-r2-b1-d2", "rest")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A network with random weights, its validation split, its candidates on disk and its statistics."""
    examples = open_split(DataConfig(input_size=SIZE, synthetic_train=2, synthetic_val=6), "val")
    tf.keras.utils.set_random_seed(0)
    network = convert_network(small_network(examples.info.num_classes), 3, SIZE)
    network.add_heads([HeadSpec.parse(name) for name in HEADS], 0.9)
    images = np.stack([examples.load(i)[0] for i in range(len(examples))]).astype(np.float32)
    run = tf.function(network.submodel(network.candidates), autograph=False)
    for _ in range(40):  # moving statistics of the batch normalisation, without which random weights make constant logits
        run(images, training=True)
    probabilities = [tf.nn.softmax(logits).numpy().max(-1) for logits in run(images, training=False).values()]
    thetas = np.quantile(np.concatenate([each.ravel() for each in probabilities]), [0.5, 0.7])
    folder = tmp_path_factory.mktemp("export")
    export_candidates(Exporter(network, SIZE), folder / "candidates")
    stats = calibrate(network, examples, "val", SIZE, folder / "candidates", thetas.tolist())
    return network, examples, folder, stats


def test_thresholds_with_regions():
    """In both settings all exits but the last have them; deployments keep the regions."""
    regions = Regions("stale", (2, 4), (1, 8))
    early, last = ExitChoice("exit1", "rest", 0.5, 0.9), ExitChoice("final", "original")
    for setting, horizon in (("input-dependent", None), ("anytime", 2.0)):
        assert Configuration(setting, False, (early, last), horizon, regions=regions).regions == regions
        with pytest.raises(ValueError, match="exits: must be at least two with regions"):
            Configuration(setting, False, (last,), horizon, regions=regions)
    with pytest.raises(ValueError, match="exits: must be with thresholds in all but the last exit"):
        Configuration("anytime", False, (ExitChoice("exit1", "rest"), last), 2.0, regions=regions)
    with pytest.raises(ValueError, match="setting: must be input-dependent or anytime with regions, got 'budgeted'"):
        Configuration("budgeted", False, (last,), None, regions=regions)


def choices_of(stats, edge_aware: bool) -> list[ExitChoice]:
    """Two early exits, each at the median confidence of the split, and the original."""
    choices = []
    for candidate in (f"exit1.{HEADS[0]}", f"exit2.{HEADS[1]}"):
        shares = stats.confident[stats.candidates.index(candidate), :, 0, int(edge_aware)] / stats.pixels
        choices.append(ExitChoice(*candidate.split("."), float(stats.theta_pix[0]), float(np.sort(shares)[len(shares) // 2])))
    return [*choices, ExitChoice(*FINAL.split("."))]


@pytest.fixture(scope="module")
def exporter(made):
    return Exporter(made[0], SIZE)


@pytest.fixture(scope="module")
def deployed(made, exporter, tmp_path_factory):
    """Deployment of two early exits with plain confidence, and its folder with bundle, bundle_original and submodels."""
    _, examples, _, stats = made
    deployment = Deployment(
        "input-dependent",
        False,
        tuple(choices_of(stats, False)),
        None,
        constraint=Objective("macs", 0.0),
        predicted=Predicted(0.5, "macs", 1.0, 1.0, (0.5, 0.3, 0.2), {}, (0.5, 0.5), (1.0, 1.0), 1),
        original=Original(0.6, 2.0),
        certificate=Certificate(1, 1, {}, 0, 1.0, 0.0, 0.1, None),
        guarantee=None,
        stats_sha256="",
        fidelity="exact",
        made_by={},
        backend="xnnpack",
        precision="fp32",
    )
    folder = tmp_path_factory.mktemp("deployed")
    export_deployment(exporter, deployment, examples.info.classes, folder, examples=examples)
    return deployment, folder


@pytest.fixture(scope="module")
def edge_aware_bundle(made, exporter):
    return bundle_of(made, exporter, "edge-aware", True)


def bundle_of(made, exporter: Exporter, name: str, edge_aware: bool, **options) -> Bundle:
    _, examples, folder, stats = made
    configuration = Configuration("input-dependent", edge_aware, tuple(choices_of(stats, edge_aware)), None)
    exporter.bundle(folder / name, configuration, None, examples.info.classes, **options)
    return Bundle.load(folder / name)


def test_every_submodel_is_there_and_hashed(made):
    network, _, folder, stats = made
    names = {path.name for path in (folder / "candidates").iterdir()}
    assert {f"prefix.{name}.tflite" for name in ("exit1", "exit2", "final")} <= names
    assert {f"head.{name}.tflite" for name in network.candidates} <= names
    hashes = (*stats.prefix_sha256, *stats.head_sha256, *stats.mask_sha256, *stats.plain_sha256, *stats.edge_sha256)
    assert all(len(value) == 64 for value in hashes)


@pytest.mark.parametrize("image_size", [pytest.param(SIZE, marks=pytest.mark.full), (48, 80)])
def test_statistics_equal_the_evaluation(made, image_size):
    network = made[0]
    examples = open_split(DataConfig(input_size=image_size, synthetic_train=2, synthetic_val=3), "val")
    stats = calibrate(network, examples, "val", SIZE, folder="", theta_pix=[0.5])
    result = accuracies(confusion_matrices(keras_predictor(network, network.candidates, SIZE), examples))
    for k, name in enumerate(stats.candidates):
        assert float(metrics.miou(*(counts.sum(0) for counts in stats.counts(k)))) == pytest.approx(result[name].miou, abs=1e-12)


@pytest.mark.parametrize("edge_aware", [False, True])
def test_bundle_does_what_the_search_predicts(made, deployed, edge_aware_bundle, edge_aware):
    _, examples, _, stats = made
    choices = choices_of(stats, edge_aware)
    runner = Runner(edge_aware_bundle if edge_aware else Bundle.load(deployed[1] / "bundle"))
    exits, total = [], np.zeros((examples.info.num_classes,) * 2, np.int64)
    for i in range(len(examples)):
        image, label = examples.load(i)
        result = runner.run(image)
        exits.append(result.exit)
        total += metrics.confusion_matrix(label, result.mask, examples.info.num_classes)
    configuration = Configuration("input-dependent", edge_aware, tuple(choices), None)
    predicted, _, leaves_at = evaluate_configuration(stats, macs_costs(stats), configuration)
    assert exits == [choices[k].exit for k in leaves_at]
    assert len(set(exits)) > 1
    assert float(metrics.miou(*metrics.class_counts(total))) == pytest.approx(predicted, abs=2e-3)


def test_bundle_macs_equal_the_costs_of_the_search(made, deployed):
    _, _, _, stats = made
    bundle = Bundle.load(deployed[1] / "bundle")
    chain = [stats.candidates.index(f"{segment.exit}.{segment.head}") for segment in bundle.manifest.segments]
    reached = np.cumsum([segment.macs for segment in bundle.manifest.segments])
    # A prefix counts what every head of its exit reads, the bundle what the chosen ones read: here the same.
    np.testing.assert_array_equal(reached, arrival_costs(stats, macs_costs(stats), chain, False))


def test_tflite_evaluates_with_the_same_code_as_keras(made, deployed):
    network, examples, _, _ = made
    runner = Runner(Bundle.load(deployed[1] / "bundle_original"))
    on_device = accuracies(confusion_matrices(lambda image: {FINAL: runner.run(image[0].astype(np.uint8)).mask[None]}, examples))
    in_keras = accuracies(confusion_matrices(keras_predictor(network, [FINAL], SIZE), examples))
    assert on_device[FINAL].miou == pytest.approx(in_keras[FINAL].miou, abs=2e-3)


def may_be_computed_in_half_precision(bundle: Bundle) -> bool:
    """Whether the file says what XNNPACK asks for before it computes in float16."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(bundle.path.read_bytes(), 0))
    return {each.name: bytes(model.buffers[each.buffer].data) for each in model.metadata or []} == {
        b"reduced_precision_support": b"fp16accfp16"
    }


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precision(made, edge_aware_bundle, precision):
    network, examples, _, _ = made
    images = [examples.load(i)[0] for i in range(len(examples))]
    samples = [image[None].astype(np.float32) for image in images]
    less = bundle_of(made, Exporter(network, SIZE, precision=precision, samples=samples), precision, True, examples=examples)
    assert less.manifest.precision == precision
    assert less.manifest.size_bytes < 0.9 * edge_aware_bundle.manifest.size_bytes
    assert may_be_computed_in_half_precision(less) and not may_be_computed_in_half_precision(edge_aware_bundle)
    tensors = Interpreter(str(less.path)).get_signature_runner("segment.exit2").get_input_details().values()
    assert {each["dtype"] for each in tensors} == {np.int8 if precision == "int8" else np.float32}
    runners = Runner(edge_aware_bundle), Runner(less)
    masks = [[runner.run(image, "budgeted").mask for image in images] for runner in runners]
    same = [first == second for first, second in zip(*masks, strict=True)]
    assert np.mean(same) > 0.9
    for segment in less.manifest.segments:
        assert 0 <= segment.miou <= 1


def test_first_convolutions_and_named_operations_stay_in_float(made):
    _, examples, _, _ = made
    images = [examples.load(i)[0][None].astype(np.float32) for i in range(2)]
    exporter = Exporter(made[0], SIZE, precision="int8", samples=images)
    candidates = [f"exit1.{HEADS[0]}"]

    def in_float():
        graph = exporter.converted(exporter.chain(candidates)[1], ["image"])
        converting = (flatbuffer.OPERATORS.QUANTIZE, flatbuffer.OPERATORS.DEQUANTIZE)
        operations = [each for each in graph.operations if each.builtin not in converting]
        return [each.outputs[0].description.name.decode() for each in operations if each.inputs[0].description.type == flatbuffer.FLOAT32]

    errors = exporter.quantization_errors(candidates)
    assert errors == sorted(errors, reverse=True) and errors[0][0] > 0
    assert sum("block_2_depthwise" in name for _, name in errors) == 1
    beginning = in_float()  # rescaling, stem and two blocks without the last projection, which sums 48 products
    assert len(beginning) == 8 and "stem" in beginning[2] and "block_1_depthwise" in beginning[-1]
    exporter.float_operations = ["*block_2_depthwise*"]
    more = in_float()
    assert len(more) == len(beginning) + 1 and sum("block_2_depthwise" in name for name in more) == 1
    exporter.float_operations = ["*nowhere*"]
    with pytest.raises(ExportError, match=r"'\*nowhere\*' matches none"):
        in_float()


def test_int8_keeps_the_mean_of_each_channel():
    weights = np.full((1, 1, 32, 2), 0.4, np.float32)
    weights[:, :, 0] = 127  # so 0.4 is rounded off: 31 * 0.4 * 0.5 = 6.2 on average
    image = np.random.default_rng(0).uniform(0, 1, (1, 8, 8, 32)).astype(np.float32)

    def function(x):
        return {"y": tf.nn.bias_add(tf.nn.conv2d(x, weights, 1, "SAME"), [1.0, -2.0])}

    graph = convert(function, {"x": image.shape}, "int8", lambda: iter([{"x": image}]))
    made = run_signature(flatbuffer.write({SIGNATURE: graph}), {"x": image})["y"].mean((0, 1, 2))
    np.testing.assert_allclose(made, function(image)["y"].numpy().mean((0, 1, 2)), atol=0.5)


def test_int8_candidates_hand_int8_on(made, tmp_path):
    network, examples, _, _ = made
    images = [examples.load(i)[0][None].astype(np.float32) for i in range(2)]
    exporter = Exporter(network, SIZE, precision="int8", samples=images)
    exporter.policies(tmp_path)
    prefix, head = exporter.prefix(tmp_path, "exit1"), exporter.head(tmp_path, f"exit1.{HEADS[0]}")
    assert {each.description.type for graph in (prefix.outputs, head.inputs) for each in graph.values()} == {flatbuffer.INT8}
    assert [each.description.type for each in prefix.inputs.values()] == [schema.TensorType.UINT8]
    exporter.head(tmp_path, FINAL)  # without weights
    for path in tmp_path.iterdir():
        interpreter = Interpreter(str(path))
        interpreter.allocate_tensors()
        interpreter.invoke()


@pytest.mark.full
def test_int8_statistics_are_nearer_to_the_int8_bundle_than_those_of_float32(made, tmp_path):
    network, examples, _, stats = made
    asked = {f"exit1.{HEADS[0]}", f"exit2.{HEADS[1]}"}
    heads = {name: head for name, head in network.heads.items() if name in asked}
    network = dataclasses.replace(network, heads=heads)
    exporter = Exporter(network, SIZE, precision="int8", samples=[examples.load(i)[0][None].astype(np.float32) for i in range(2)])
    export_candidates(exporter, tmp_path / "candidates")
    quantised = calibrate(network, examples, "val", SIZE, tmp_path / "candidates", stats.theta_pix.tolist())
    assert quantised.precision == "int8"
    choices = choices_of(quantised, False)
    exporter.bundle(tmp_path / "bundle", Configuration("input-dependent", False, tuple(choices), None), None, stats.classes)
    runner = Runner(Bundle.load(tmp_path / "bundle"))
    of = [f"{choice.exit}.{choice.head}" for choice in choices]
    counted, in_float = ([each.counts(each.candidates.index(name)) for name in of] for each in (quantised, stats))
    apart, from_float = 0, 0
    for i in range(len(examples)):
        image, label = examples.load(i)
        for k, result in enumerate(runner.refine(image)):
            tp, fp, _ = metrics.class_counts(metrics.confusion_matrix(label, result.mask, examples.info.num_classes))
            apart += sum(np.abs(ran - each[i]).sum() for ran, each in zip((tp, fp), counted[k], strict=False))
            from_float += sum(np.abs(ran - each[i]).sum() for ran, each in zip((tp, fp), in_float[k], strict=False))
        assert k == len(of) - 1
    assert apart < 0.6 * from_float  # not 0: how the converter scales an addition's inputs depends on what else reads them


def test_candidates_of_other_weights_or_fidelity_are_an_error(made):
    network, examples, folder, _ = made
    bias = network.logit_bias(FINAL)
    before = bias.numpy()
    bias.assign_add([1.0] * network.num_classes)
    with pytest.raises(ValueError, match=r"weights\.sha256: must be \w{64}, as of this network; .*export_tflite --candidates"):
        calibrate(network, examples, "val", SIZE, folder / "candidates")
    bias.assign(before)
    with pytest.raises(ValueError, match=r"fidelity: must be one that the candidates were exported with.*got 'low'"):
        calibrate(network, examples, "val", SIZE, folder / "candidates", fidelity="low")


def test_float32_input_gives_the_same_masks(made, exporter, deployed):
    _, examples, _, _ = made
    whole = bundle_of(made, exporter, "float32", False, input_spec=InputSpec(*SIZE, "float32"))
    runners = Runner(Bundle.load(deployed[1] / "bundle")), Runner(whole)
    for i in range(len(examples)):
        image, _ = examples.load(i)
        results = [runner.run(image) for runner in runners]
        assert results[0].exit == results[1].exit
        np.testing.assert_array_equal(results[0].mask, results[1].mask)


def test_measured_miou_is_that_of_the_evaluation(made, deployed):
    network, examples, _, _ = made
    bundle = Bundle.load(deployed[1] / "bundle")
    result = accuracies(confusion_matrices(keras_predictor(network, network.candidates, SIZE), examples))
    for segment in bundle.manifest.segments:
        assert segment.miou == pytest.approx(result[f"{segment.exit}.{segment.head}"].miou, abs=2e-3)


@pytest.mark.parametrize("resize", [pytest.param("stretch", marks=pytest.mark.full), "letterbox"])
def test_what_is_promised_is_measured_as_it_runs(made, exporter, resize):
    network, _, folder, _ = made
    examples = open_split(DataConfig(input_size=(120, 150), synthetic_train=2, synthetic_val=3), "val")  # larger, and of another shape
    spec = InputSpec(*SIZE, resize=resize)
    bundle = bundle_of(made, exporter, f"promised-{resize}", False, input_spec=spec, examples=examples)
    stats = calibrate(network, examples, "val", SIZE, folder / "candidates", [0.5], resize=resize)
    runner, counts = Runner(bundle), {segment.exit: 0 for segment in bundle.manifest.segments}
    for i in range(len(examples)):
        image, label = examples.load(i)
        for result in runner.refine(image):
            counts[result.exit] += metrics.confusion_matrix(label, result.mask, examples.info.num_classes)
    for segment in bundle.manifest.segments:
        ran = float(metrics.miou(*metrics.class_counts(counts[segment.exit])))
        k = stats.candidates.index(f"{segment.exit}.{segment.head}")
        assert segment.miou == pytest.approx(ran, abs=1e-12)
        assert float(metrics.miou(*(counts.sum(0) for counts in stats.counts(k)))) == pytest.approx(ran, abs=1e-3)


def test_deployment_writes_each_exit_as_a_file(deployed):
    _, folder = deployed
    exits = ("exit1", "exit2", "final")
    files = {path.name for path in (folder / "submodels").iterdir()}
    assert files == {f"{kind}.{name}.tflite" for kind in ("alone", "segment", "logits") for name in exits} | {"original.tflite"}
    bundle = Bundle.load(folder / "bundle")
    for segment in bundle.manifest.segments:
        path = folder / "submodels" / f"alone.{segment.exit}.tflite"
        assert file_sha256(path) == segment.alone_sha256
    assert bundle.manifest.size_bytes < 1.3 * sum((folder / "submodels" / f"segment.{name}.tflite").stat().st_size for name in exits)
    logits = Interpreter(str(folder / "submodels" / "logits.exit1.tflite")).get_signature_runner("serve").get_output_details()
    assert tuple(logits["logits"]["shape"][1:3]) == (2, 4)
    assert json.loads((folder / "bundle_original" / "manifest.json").read_text())["predicted"]["miou"] == 0.6
    assert bundle.manifest.predicted.exit_rates == deployed[0].predicted.exit_rates == (0.5, 0.3, 0.2)


def test_thresholds_hold_for_one_fidelity_only(made, deployed, tmp_path):
    with pytest.raises(ValueError, match=r"fidelity: must be exact, the fidelity of the statistics .*, got 'low'"):
        export_deployment(Exporter(made[0], SIZE, "low"), deployed[0], made[1].info.classes, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_deployment_is_exported_in_the_precision_that_was_searched(made, deployed, tmp_path):
    assert made[3].precision == "fp32"
    with pytest.raises(ValueError, match=r"precision: must be fp32, the precision of the statistics .*, got 'fp16'"):
        export_deployment(Exporter(made[0], SIZE, precision="fp16"), deployed[0], made[1].info.classes, tmp_path)
    deployed[0].save(tmp_path / "deployment.json")
    (tmp_path / "config.json").write_text(configs.to_json(configs.Config()))
    with pytest.raises(ValueError, match="--precision: must be fp32, which was searched, or left out, got 'int8'"):
        run_deployment(tmp_path, tmp_path / "deployment.json", options=Options("int8"))
    with pytest.raises(ValueError, match="--float_operations: must be left out with fp32"):
        run_deployment(tmp_path, tmp_path / "deployment.json", options=Options(float_operations=("a",)))
    for name in ("bundle", "bundle_original"):
        assert Bundle.load(deployed[1] / name).manifest.predicted.backend == "xnnpack"


def test_a_head_too_heavy_for_its_place_is_warned_of(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Exporter, "prefix", lambda self, folder, name: name)
    monkeypatch.setattr(Exporter, "head", lambda self, folder, candidate: candidate)
    monkeypatch.setattr(Exporter, "policies", lambda self, folder: None)
    cost = {"exit1": 10, "exit2": 20, "final": 30, FINAL: 0} | {f"exit1.{HEADS[0]}": 15, f"exit2.{HEADS[0]}": 5}
    monkeypatch.setattr(flatbuffer, "macs", lambda name: cost.get(name, 1))
    export_candidates(Exporter(made[0], SIZE), tmp_path / "candidates")
    warned = [line for line in capsys.readouterr().out.splitlines() if "too heavy" in line]
    assert warned == [f"exit1.{HEADS[0]}: costs no less than at exit2: too heavy a head for its place"]


def test_an_exit_of_a_bundle_that_costs_no_less_than_a_deeper_one_is_warned_of(made, exporter, monkeypatch, capsys):
    monkeypatch.setattr(flatbuffer, "macs", lambda graph: 100)
    bundle_of(made, exporter, "equal", False)
    warned = [line for line in capsys.readouterr().out.splitlines() if "too heavy" in line]
    pairs = ("exit1: costs no less than exit2", "exit2: costs no less than final")
    assert warned == [f"{pair}: its head is too heavy for its place" for pair in pairs]


def serve(graph: flatbuffer.Graph, **inputs) -> dict[str, np.ndarray]:
    return Interpreter(model_content=flatbuffer.write({"serve": graph})).get_signature_runner("serve")(**inputs)


def test_graphs_are_joined_and_cut_without_changing_results():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 2)).astype(np.float32)

    def deep(x):
        y = tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME"))
        return {"middle": y, "end": tf.nn.conv2d(y, kernel, 1, "SAME")}

    shape = (1, 4, 4, 2)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    whole, after = convert(deep, {"x": shape}), convert(lambda z: {"double": 2.0 * z}, {"z": shape})
    for name in ("end", "middle"):
        whole = flatbuffer.join(whole, after, {"z": name}, f"{name}.")
    expected = deep(tf.constant(x))
    outputs = serve(whole, x=x)
    np.testing.assert_allclose(outputs["end.double"], 2 * expected["end"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs["middle.double"], 2 * expected["middle"], rtol=1e-5, atol=1e-5)
    middle = {"middle": whole.outputs["middle"]}
    front, back = flatbuffer.cut(whole, whole.inputs, middle), flatbuffer.cut(whole, middle, {"end": whole.outputs["end"]})
    np.testing.assert_array_equal(serve(back, middle=serve(front, x=x)["middle"])["end"], outputs["end"])
    assert flatbuffer.macs(whole) == 2 * 16 * 9 * 2 * 2 == flatbuffer.macs(front) + flatbuffer.macs(back)
    with pytest.raises(ValueError, match=r"inputs: must hold all that \['end'\] need, \['x'\] is missing from \[\]"):
        flatbuffer.cut(whole, {}, {"end": whole.outputs["end"]})


def test_signatures_share_weights():
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    one, two = (convert(lambda x, factor=factor: {"y": tf.matmul(x, weights) + factor}, {"x": (1, 64)}) for factor in (1.0, 2.0))
    assert len(flatbuffer.write({"one": one, "two": two})) < 1.3 * len(flatbuffer.write({"one": one}))


def test_a_file_does_not_depend_on_what_was_made_before(made, exporter, tmp_path):
    """Latencies are of a file's hash: a counter in the names of its tensors would make them void."""
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        exporter.prefix(tmp_path / name, "exit2")
        contents.append((tmp_path / name / "prefix.exit2.tflite").read_bytes())
        made[0].segments([f"exit1.{HEADS[0]}", f"exit2.{HEADS[1]}", FINAL])
    assert contents[0] == contents[1]


def test_a_backbone_with_dilation_is_exported(tmp_path):
    """Of dilated convolutions, which TensorFlow runs between SPACE_TO_BATCH_ND and its inverse, builtin ones come."""
    backbone = build_backbone(BackboneConfig(width=0.35, output_stride=8, batch_norm_momentum=0.01))
    backbone(np.random.default_rng(0).uniform(0, 255, (2, *SIZE, 3)), training=True)  # statistics that keep features of about their size
    network = convert_network(keras.Model(backbone.input, keras.layers.Conv2D(5, 1)(backbone.output)), 2, SIZE)
    Exporter(network, SIZE).prefix(tmp_path, "final")
    (tensor,) = Interpreter(str(tmp_path / "prefix.final.tflite")).get_signature_runner("serve").get_output_details().values()
    assert tuple(tensor["shape"]) == (1, 4, 8, 5)


def test_unsupported_ops_are_refused():
    with pytest.raises(ExportError, match="conversion failed"):
        convert(lambda x: {"y": tf.linalg.logdet(x)}, {"x": (1, 4, 4)})


def test_dilation_that_was_not_folded_is_refused():
    with pytest.raises(ExportError, match="SPACE_TO_BATCH_ND"):
        convert(lambda x: {"y": tf.space_to_batch(x, [2, 2], [[0, 0], [0, 0]])}, {"x": (1, 4, 4, 1)})


def test_a_file_that_differs_is_refused(monkeypatch):
    content = flatbuffer.write({"serve": convert(lambda x: {"y": 2.0 * x}, {"x": (1, 4)})})
    inputs = {"x": np.ones((1, 4), np.float32)}
    check_parity(content, inputs, {"y": 2.0 * inputs["x"]}, {})
    with pytest.raises(ExportError, match="y: differs from Keras by"):
        check_parity(content, inputs, {"y": 2.1 * inputs["x"]}, {})
    monkeypatch.setenv("TF_SET_ONEDNN_FPMATH_MODE", "BF16")
    with pytest.raises(ExportError, match="TF_SET_ONEDNN_FPMATH_MODE=BF16 makes Keras itself inexact: export without it"):
        check_parity(content, inputs, {"y": 2.1 * inputs["x"]}, {})


def test_a_mask_may_differ_where_classes_tie_only():
    logits = np.zeros((1, 2, 2, 3), np.float32)
    logits[0, 0, :, 1] = 1.0
    content = flatbuffer.write({"serve": convert(lambda x: decide(x, (2, 2), ()), {"x": logits.shape})})
    mask = np.array([[[1, 1], [2, 0]]], np.uint8)
    check_parity(content, {"x": logits}, {"mask": mask}, {"mask": logits})
    with pytest.raises(ExportError, match="mask: 1 pixels differ from Keras beyond ties"):
        check_parity(content, {"x": logits}, {"mask": np.array([[[1, 2], [2, 0]]], np.uint8)}, {"mask": logits})


def test_a_failed_export_leaves_the_old_bundle(made, exporter, deployed, tmp_path, monkeypatch):
    shutil.copytree(deployed[1] / "bundle_original", tmp_path / "kept")
    before = (tmp_path / "kept" / "manifest.json").read_bytes()
    alone = Configuration("budgeted", False, (ExitChoice(*FINAL.split(".")),), None)
    monkeypatch.setattr("mess_tf.graph.exporter.check_parity", lambda *_: (_ for _ in ()).throw(ExportError("broken")))
    with pytest.raises(ExportError, match=r"model\.tflite: broken"):
        exporter.bundle(tmp_path / "kept", alone, None, made[1].info.classes)
    assert (tmp_path / "kept" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_every_tensor_of_a_file_has_a_name_of_its_own(deployed):
    for path in (deployed[1] / "bundle" / "model.tflite", *(deployed[1] / "submodels").glob("*.tflite")):
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(path.read_bytes(), 0))
        names = [tensor.name for subgraph in model.subgraphs for tensor in subgraph.tensors]
        assert all(names) and len(set(names)) == len(names)


def test_a_bundle_has_no_signature_that_nobody_asked_for(made, exporter, deployed):
    segments = {f"segment.{name}" for name in ("exit1", "exit2", "final")}
    path = deployed[1] / "bundle" / "model.tflite"
    assert flatbuffer.read_signatures(path.read_bytes()).keys() == segments
    bundle = bundle_of(made, exporter, "extra", False, extra_signatures=("alone", "full"))
    assert flatbuffer.read_signatures(bundle.path.read_bytes()).keys() == segments | {
        "full",
        *(name.replace("segment", "alone") for name in segments),
    }
    image = made[1].load(0)[0]
    for name in ("exit1", "exit2", "final"):
        masks = [Runner(each).run(image, "budgeted", name).mask for each in (bundle, Bundle.load(deployed[1] / "bundle"))]
        np.testing.assert_array_equal(*masks)


def test_a_graph_is_the_same_once_written_and_read(deployed):
    content = (deployed[1] / "bundle" / "model.tflite").read_bytes()
    graphs = flatbuffer.read_signatures(content)
    again = flatbuffer.read_signatures(flatbuffer.write(graphs))
    for name, graph in graphs.items():
        kinds = [[each.builtin for each in one.operations] for one in (graph, again[name])]
        assert kinds[0] == kinds[1] and graph.inputs.keys() == again[name].inputs.keys()
    assert again["segment.exit2"].outputs.keys() == graphs["segment.exit2"].outputs.keys()


def test_a_sum_that_is_read_on_is_handed_out_as_a_copy():
    def function(x):
        y = x + 1.0
        return {"sum": y, "end": tf.nn.relu(y), "untouched": x * 2.0}

    x = np.arange(4, dtype=np.float32).reshape(1, 2, 2, 1)
    graph = flatbuffer.with_copied_outputs(convert(function, {"x": x.shape}))
    made = {name: next(each for each in graph.operations if tensor in each.outputs) for name, tensor in graph.outputs.items()}
    assert {name: flatbuffer.OPERATOR_NAMES[each.builtin] for name, each in made.items()} == {
        "sum": "RESHAPE",
        "end": "RELU",
        "untouched": "MUL",
    }
    outputs = serve(graph, x=x)
    np.testing.assert_array_equal(outputs["sum"], x + 1)
    np.testing.assert_array_equal(outputs["end"], x + 1)


def test_pooled_maps_are_broadcast_as_they_are():
    """As behind the pooled context of an ASPP, in int8, which GPU delegates get wrong with a RESHAPE in between."""
    shape = (1, 4, 4, 8)
    samples = [{"x": np.random.default_rng(i).normal(size=shape).astype(np.float32)} for i in range(4)]
    x = keras.Input(shape[1:])
    context = keras.layers.Conv2D(8, 1, use_bias=False)(keras.layers.GlobalAveragePooling2D(keepdims=True)(x))
    y = keras.layers.BatchNormalization()(keras.layers.Add()([keras.layers.Conv2D(8, 1, use_bias=False)(x), context]))
    model = keras.Model(x, y)
    graph = convert(lambda x: {"y": model(x, training=False)}, {"x": shape}, "int8", lambda: iter(samples))
    (addition,) = [each for each in graph.operations if each.builtin == flatbuffer.OPERATORS.ADD and len(each.inputs[1].shape) == 4]
    assert sorted(tensor.shape for tensor in addition.inputs) == [(1, 1, 1, 8), shape]
    assert not [each for each in graph.operations if each.builtin == flatbuffer.OPERATORS.RESHAPE]
    expected = model(samples[0]["x"]).numpy()
    np.testing.assert_allclose(serve(graph, **samples[0])["y"], expected, atol=0.05 * np.abs(expected).max())
