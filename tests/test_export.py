"""Export, calibration, evaluation and the device runtime on one tiny network: what they say of it must agree."""

import numpy as np
import pytest
import tensorflow as tf

from mess_runtime.bundle import Bundle, Cost, Predicted
from mess_runtime.runner import Runner
from mess_tf import metrics
from mess_tf.calibrate import calibrate
from mess_tf.configs import BackboneConfig, Config, DataConfig, ExitsConfig, HeadSpec
from mess_tf.data import open_split
from mess_tf.evaluate import accuracies, confusion_matrices, keras_predictor
from mess_tf.export_tflite import Exporter, ExportError, check_parity, convert, export_candidates
from mess_tf.files import Configuration, ExitChoice
from mess_tf.model import FINAL, build_network
from mess_tf.search import arrival_costs, evaluate_configuration, macs_costs

SIZE = (32, 64)
HEADS = ("fcn-r1-b0", "decoder-r2-b1-d2")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A network with random weights, its validation split, its candidates on disk and its statistics."""
    config = Config(
        data=DataConfig(input_size=SIZE, synthetic_train=2, synthetic_val=6),
        backbone=BackboneConfig(width=0.35),
        exits=ExitsConfig(count=3),
    )
    examples = open_split(config.data, "val")
    tf.keras.utils.set_random_seed(0)
    network = build_network(config, examples.info.num_classes)
    network.add_heads([HeadSpec.parse(name) for name in HEADS], 0.9)
    images = np.stack([examples.load(i)[0] for i in range(len(examples))]).astype(np.float32)
    run = tf.function(network.submodel(network.candidates))
    for _ in range(40):  # moving statistics of the batch normalisation, without which random weights make constant logits
        run(images, training=True)
    probabilities = [tf.nn.softmax(logits).numpy().max(-1) for logits in run(images, training=False).values()]
    thetas = np.quantile(np.concatenate([each.ravel() for each in probabilities]), [0.5, 0.7])
    folder = tmp_path_factory.mktemp("export")
    export_candidates(network, SIZE, folder / "candidates")
    stats = calibrate(network, examples, "val", SIZE, folder / "candidates", thetas.tolist())
    return network, examples, folder, stats


def bundle_of(made, name: str, choices: list[ExitChoice], edge_aware: bool = False) -> Bundle:
    network, examples, folder, _ = made
    configuration = Configuration("input-dependent", edge_aware, tuple(choices), None)
    Exporter(network, SIZE).bundle(folder / name, configuration, Predicted(0.5, Cost("macs", 1.0)), examples.info.classes)
    return Bundle.load(folder / name)


def choices_of(stats, edge_aware: bool) -> list[ExitChoice]:
    """Two early exits, each at the median confidence of the split, and the original."""
    choices = []
    for candidate in (f"exit1.{HEADS[0]}", f"exit2.{HEADS[1]}"):
        shares = stats.confident[stats.candidates.index(candidate), :, 0, int(edge_aware)] / stats.pixels
        choices.append(ExitChoice(*candidate.split("."), float(stats.theta_pix[0]), float(np.sort(shares)[len(shares) // 2])))
    return [*choices, ExitChoice(*FINAL.split("."))]


def test_every_submodel_is_there_and_hashed(made):
    network, _, folder, stats = made
    names = {path.name for path in (folder / "candidates").iterdir()}
    assert {f"prefix.{name}.tflite" for name in ("exit1", "exit2", "final")} <= names
    assert {f"head.{name}.tflite" for name in network.candidates} <= names
    hashes = (*stats.prefix_sha256, *stats.head_sha256, *stats.mask_sha256, *stats.plain_sha256, *stats.edge_sha256)
    assert all(len(value) == 64 for value in hashes)


def test_statistics_equal_the_evaluation(made):
    network, examples, _, stats = made
    result = accuracies(confusion_matrices(keras_predictor(network, network.candidates), examples))
    for k, name in enumerate(stats.candidates):
        assert float(metrics.miou(stats.tp[k].sum(0), stats.fp[k].sum(0), stats.fn[k].sum(0))) == pytest.approx(
            result[name].miou, abs=1e-12
        )


@pytest.mark.parametrize("edge_aware", [False, True])
def test_bundle_does_what_the_search_predicts(made, edge_aware):
    _, examples, _, stats = made
    choices = choices_of(stats, edge_aware)
    bundle = bundle_of(made, f"bundle{int(edge_aware)}", choices, edge_aware)
    runner = Runner(bundle)
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


def test_bundle_macs_equal_the_costs_of_the_search(made):
    _, _, _, stats = made
    bundle = bundle_of(made, "macs", choices_of(stats, False))
    chain = [stats.candidates.index(f"{segment.exit}.{segment.head}") for segment in bundle.manifest.segments]
    reached = np.cumsum([segment.macs for segment in bundle.manifest.segments])
    # A prefix counts what every head of its exit reads, the bundle what the chosen ones read: here the same.
    np.testing.assert_array_equal(reached, arrival_costs(stats, macs_costs(stats), chain, False))


def test_tflite_evaluates_with_the_same_code_as_keras(made):
    network, examples, _, _ = made
    bundle = bundle_of(made, "evaluated", [ExitChoice(*FINAL.split("."))])
    runner = Runner(bundle)
    on_device = accuracies(confusion_matrices(lambda image: {FINAL: runner.run(image[0].astype(np.uint8)).mask[None]}, examples))
    in_keras = accuracies(confusion_matrices(keras_predictor(network, [FINAL]), examples))
    assert on_device[FINAL].miou == pytest.approx(in_keras[FINAL].miou, abs=2e-3)


def test_unsupported_ops_are_refused():
    with pytest.raises(ExportError, match="conversion failed"):
        convert(lambda x: {"y": tf.linalg.logdet(x)}, {"x": (1, 4, 4)})


def test_dilation_that_was_not_folded_is_refused():
    with pytest.raises(ExportError, match="SPACE_TO_BATCH_ND"):
        convert(lambda x: {"y": tf.space_to_batch(x, [2, 2], [[0, 0], [0, 0]])}, {"x": (1, 4, 4, 1)})


def test_a_file_that_differs_is_refused():
    content = convert(lambda x: {"y": 2.0 * x}, {"x": (1, 4)})
    example = {"x": np.ones((1, 4), np.float32)}
    check_parity(content, lambda x: {"y": 2.0 * x}, example, None)
    with pytest.raises(ExportError, match="y: differs from Keras by"):
        check_parity(content, lambda x: {"y": 2.1 * x}, example, None)


def test_a_failed_export_leaves_the_old_bundle(made, monkeypatch):
    network, examples, folder, _ = made
    alone = Configuration("budgeted", False, (ExitChoice(*FINAL.split(".")),), None)
    exporter = Exporter(network, SIZE)
    exporter.bundle(folder / "kept", alone, Predicted(0.5, Cost("macs", 1.0)), examples.info.classes)
    before = (folder / "kept" / "manifest.json").read_bytes()
    monkeypatch.setattr("mess_tf.export_tflite.check_parity", lambda *_: (_ for _ in ()).throw(ExportError("broken")))
    with pytest.raises(ExportError, match=r"segment-final\.tflite: broken"):
        exporter.bundle(folder / "kept", alone, Predicted(0.5, Cost("macs", 1.0)), examples.info.classes)
    assert (folder / "kept" / "manifest.json").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
