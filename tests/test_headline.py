"""What the headline script concludes from measurements; the measuring itself needs trained bundles and an idle machine."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import headline, statics
from benchmarks.headline import Measured
from mess_tf.configs import BackboneConfig, Config, DataConfig, ExitsConfig
from mess_tf.files import best_weights
from mess_tf.network.model import build_network


def measured(latency_ms, right, pixels=100) -> Measured:
    """Two classes, of which class 0 has `right` of `pixels` pixels in each image, the others being taken for class 1, which is found."""
    right = np.broadcast_to(right, np.shape(latency_ms))
    wrong = pixels - right
    tp, fp, fn = np.stack([right, wrong * 0 + pixels], 1), np.stack([wrong * 0, wrong], 1), np.stack([wrong, wrong * 0], 1)
    return Measured(np.asarray(latency_ms, float), np.stack([tp, fp, fn], 1))


def test_comparison_of_a_case_counted_by_hand():
    result = headline.compare(measured([10.0, 20.0], 50), measured([5.0, 10.0], 75))
    assert result["speedup"] == 2 and result["speedup_interval"] == [2, 2] and result["mean_ms"] == 7.5
    # IoU 50/100 and 100/150 before, 75/100 and 100/125 after.
    expected = 100 * ((0.75 + 0.8) / 2 - (0.5 + 2 / 3) / 2)
    assert result["gain_pp"] == pytest.approx(expected)
    assert result["gain_pp_interval"] == pytest.approx([expected, expected])  # the images are alike


def test_interval_covers_the_spread_over_the_images():
    result = headline.compare(measured([10.0] * 20, 50), measured([5.0] * 10 + [10.0] * 10, [40] * 10 + [70] * 10))
    low, high = result["speedup_interval"]
    assert 1 < low < result["speedup"] < high < 2
    low, high = result["gain_pp_interval"]
    assert -10 < low < result["gain_pp"] < high < 20 and high - low > 2


def test_regions_are_compared_with_the_images_of_their_row(monkeypatch, tmp_path):
    costs = {"original": 20, "no_loss.input-dependent": 16, "no_loss.budgeted": 18, "no_loss.regions": 8}
    for name in costs:
        (tmp_path / name).mkdir()

    def bundle(path: Path) -> SimpleNamespace:
        predicted = SimpleNamespace(cost=SimpleNamespace(mean=costs[path.name]), miou=0.5)
        return SimpleNamespace(manifest=SimpleNamespace(classes=("a", "b"), predicted=predicted))

    monkeypatch.setattr(headline.Bundle, "load", bundle)
    monkeypatch.setattr(headline, "ways_of", lambda path, kind, threads: {kind: None})
    seen = {name: [measured([float(cost)] * 9 + [2.0 * cost], 50 + (name != "original"))] for name, cost in costs.items()}
    monkeypatch.setattr(headline, "measure", lambda *_: seen)
    examples = SimpleNamespace(info=SimpleNamespace(classes=("a", "b")))
    figures, _ = headline.precision_figures(tmp_path, None, examples, 1, 1, 1.0)
    assert figures["speedup_at_no_loss"] == pytest.approx(20 / 8)  # regions promised most
    against = figures["regions_against_images"]["no_loss"]
    assert against["speedup"] == pytest.approx(16 / 8) and against["gain_pp"] == 0
    assert figures["slowest_tenth"]["no_loss"] == pytest.approx(16 / 22)
    assert "no_loss: regions against images 2.00x (2.00 to 2.00), +0.00 pp" in headline.table(figures)


def test_result_that_stands_at_a_deadline():
    first, second = measured([1.0, 3.0], 10), measured([4.0, 6.0], 20)
    stands = headline.at_deadline([first, second], 5.0)
    assert stands.counts[:, 0, 0].tolist() == [20, 10]
    assert headline.at_deadline([first, second], 0.5).counts[:, 0, 0].tolist() == [10, 10], "the first result always counts"
    assert headline.mean_over_deadlines([first], 4.0) == pytest.approx(first.miou_pct / 2)


def test_every_way_sees_the_images_of_a_darker_drive():
    image, label = np.full((2, 3, 3), 100, np.uint8), np.ones((2, 3), np.uint8)
    examples = SimpleNamespace(info=SimpleNamespace(num_classes=2), load=lambda index: (image, label))
    examples = type("Examples", (SimpleNamespace,), {"__len__": lambda self: 1})(**vars(examples))
    ways = {"bright": lambda seen: [((seen[..., 0] == 100).astype(np.uint8), 1.0)]}
    ways["dark"] = lambda seen: [((seen[..., 0] == 40).astype(np.uint8), 1.0)]
    for brightness, right in ((1.0, "bright"), (0.4, "dark")):
        found = headline.measure(ways, examples, 1, brightness)
        assert {name for name in ways if found[name][0].counts[0, 0, 1] == label.size} == {right}


def test_input_dependent_bundles_of_equal_latency_hold_it(monkeypatch):
    held = {}
    monkeypatch.setattr(headline.Bundle, "load", lambda path: SimpleNamespace(manifest=SimpleNamespace(setting=path)))
    monkeypatch.setattr(headline, "Runner", lambda bundle, threads, hold_latency: held.update({bundle.manifest.setting: hold_latency}))
    for row, expected in (("equal_latency", True), ("no_loss", False), ("minus_1pp", False)):
        for setting in ("input-dependent", "budgeted"):
            headline.ways_of(setting, f"{row}.{setting}", 1)
        assert held == {"input-dependent": expected, "budgeted": False}


def manifest(miou, mean):
    predicted = SimpleNamespace(miou=miou, cost=SimpleNamespace(mean=mean))
    return SimpleNamespace(manifest=SimpleNamespace(predicted=predicted, classes=("a", "b"), segments=[SimpleNamespace(miou=miou)]))


@pytest.fixture
def conclude(tmp_path, monkeypatch):
    """Figures from what each bundle promised (mIoU, ms) and did (ms, pixels right)."""

    def run(bundles, statics=()):
        for name in bundles:
            (tmp_path / "B" / name).mkdir(parents=True)
        for name in statics:
            (tmp_path / "S" / name.removeprefix("static ")).mkdir(parents=True)
        done = {name: [measured([ms] * 3, right)] for name, (_, (ms, right)) in bundles.items()}
        done |= {name: [measured([ms] * 3, right)] for name, (ms, right) in dict(statics).items()}
        monkeypatch.setattr(headline.Bundle, "load", lambda path: manifest(*bundles[path.name][0]))
        monkeypatch.setattr(headline, "ways_of", lambda path, kind, threads: {kind: None})
        monkeypatch.setattr(headline, "measure", lambda ways, examples, rounds, brightness: {name: done[name] for name in ways})
        examples = SimpleNamespace(info=SimpleNamespace(classes=("a", "b")))
        return headline.precision_figures(tmp_path / "B", tmp_path / "S", examples, 1, 1, 1.0)[0]

    return run


def test_a_row_goes_by_what_val_promised_and_not_by_this_split(conclude):
    figures = conclude(
        {
            "original": ((0.6, 10), (10.0, 60)),
            "no_loss.input-dependent": ((0.6, 4), (5.0, 60)),
            "no_loss.budgeted": ((0.6, 5), (2.0, 90)),  # better here, but promised less
        }
    )
    assert figures["speedup_at_no_loss"] == 2 and figures["speedup_at_no_loss_interval"] == [2, 2]
    assert figures["speedup_at_1pp"] is None and figures["speedup_at_1pp_interval"] is None
    assert f"{'minus_1pp':<32}no bundle" in headline.table(figures)


def test_a_row_that_is_not_met_here_has_no_figure(conclude):
    figures = conclude(
        {
            "original": ((0.6, 10), (10.0, 60)),
            "no_loss.budgeted": ((0.61, 4), (5.0, 55)),
            "equal_latency.budgeted": ((0.7, 9), (11.0, 80)),
        }
    )
    assert figures["speedup_at_no_loss"] is None and figures["gain_pp_at_equal_latency"] is None
    assert [row["met"] for row in figures["rows"]] == [False, False]
    assert headline.table(figures).count("NOT met") == 2


def test_alternatives_that_nothing_beats_are_named(conclude):
    figures = conclude(
        {"original": ((0.6, 10), (10.0, 60)), "minus_1pp.budgeted": ((0.6, 4), (5.0, 60))},
        {"static half": (4.0, 58), "static smaller": (6.0, 59)},
    )
    assert figures["statics_not_beaten"] == ["static half"]


# === Alternatives without early exits ===

CONFIG = Config(
    data=DataConfig(input_size=(64, 96)),
    backbone=BackboneConfig(width=0.35),
    exits=ExitsConfig(count=3, heads=("fcn-r8-b0",), plain_head="fcn-r8-b0"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training's folder and its network; the weights are random."""
    folder = tmp_path_factory.mktemp("trained")
    network = build_network(CONFIG, 4)
    network.add_heads(CONFIG.exits.head_specs, 0.9)
    path = Path(best_weights(str(folder), "stage2"))
    path.parent.mkdir(parents=True)
    network.save_weights(str(path))
    return str(folder), network


def test_smaller_input_is_the_original_on_a_resized_image(trained, tmp_path):
    folder, original = trained[0], trained[1].original
    network = statics.smaller(folder, CONFIG, "scale0.5", 4)
    image = np.random.default_rng(0).uniform(0, 255, (1, 64, 96, 3)).astype(np.float32)
    made = network(image, training=False)
    tolerance = 1e-4 * np.abs(made).max()  # random weights shrink the logits
    assert tolerance > 0
    np.testing.assert_allclose(made, original(tf.image.resize(image, (32, 64)), training=False), rtol=0, atol=tolerance)
    network.save(tmp_path / "start.keras")
    backbone = BackboneConfig(name="keras_file", weights=str(tmp_path / "start.keras"))
    again = build_network(dataclasses.replace(CONFIG, backbone=backbone), 4)
    np.testing.assert_allclose(again.original(image, training=False), made, rtol=0, atol=tolerance)


@pytest.mark.full
def test_smaller_networks_start_with_the_weights_of_the_original(trained, monkeypatch):
    folder, original = trained[0], trained[1].original
    monkeypatch.setattr(statics, "load_network", lambda *_: trained[1])  # the test above reads it from its file
    for name, stride in (("stride32", 8), ("stride32-deeplab", 32)):
        network = statics.smaller(folder, CONFIG, name, 4)
        shape = network(np.zeros((1, 64, 96, 3), np.float32), training=False).shape
        assert tuple(shape) == (1, 64 // stride, 96 // stride, 4), name
        for layer in ("Conv1", "block_16_project"):
            np.testing.assert_array_equal(network.get_layer(layer).kernel, original.get_layer(layer).kernel)


@pytest.mark.full
def test_training_of_an_alternative_to_an_original_with_a_scaled_input(trained, tmp_path, monkeypatch):
    scaled = dataclasses.replace(CONFIG, backbone=dataclasses.replace(CONFIG.backbone, input_scale=0.5))
    monkeypatch.setattr(statics, "FLAGS", SimpleNamespace(workdir=trained[0], epochs=1, eval_epochs=1, learning_rate=0.01), raising=False)
    monkeypatch.setattr(statics.subprocess, "run", lambda *_, **__: None)  # the training itself
    own = statics.train(tmp_path, scaled, "stride32", 4)
    network = build_network(own, 4).original
    assert network.input.shape == (None, 64, 96, 3) and network.output.shape == (None, 32 // 8, 64 // 8, 4)
