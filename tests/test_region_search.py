"""Chains of exits whose cells leave: statistics against Keras, the search against brute force, predictions against bundles."""

import base64
import dataclasses
import io
import itertools
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import browsers
import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from small_network import FEW_BLOCKS, small_network

from mess_runtime.benchmark import LatencyRow, LatencyTable
from mess_runtime.bundle import Bundle, Cost, Predicted, Regions, file_sha256, write_json
from mess_runtime.images import mask_at
from mess_runtime.runner import Runner
from mess_tf import calibrate, configs, metrics, report, search, tasks
from mess_tf.configs import BackboneConfig, Config, DataConfig, ExitsConfig, HeadSpec, StageConfig
from mess_tf.data.examples import Examples
from mess_tf.data.pipelines import network_input
from mess_tf.data.sources import open_split
from mess_tf.export_tflite import run_candidates, run_deployment
from mess_tf.files import (
    THETA_IMG_WHOLE,
    Asked,
    Configuration,
    Deployment,
    ExitChoice,
    Objective,
    Original,
    RegionStats,
    Stats,
    best_weights,
    map_arrays,
)
from mess_tf.graph.exporter import Exporter
from mess_tf.graph.policy import decide, decide_by_cell
from mess_tf.network.model import FINAL, MultiExitNetwork, build_network, convert
from mess_tf.network.regions import segments_on_grid
from mess_tf.optimise.regions import configuration_of, predict_regions, region_macs, search_regions, select, taken_shares
from mess_tf.optimise.search import InfeasibleError
from mess_tf.pipeline import Pipeline
from mess_tf.region_candidates import Outcomes, RegionOptions, configurations, count, described, plan

LAYERS = keras.layers
SIZE = (64, 96)
HEAD = "fcn-r8-b0"
THETA_IMG = (0.3, 0.7)


def confidences(network: MultiExitNetwork, val: Examples) -> list[float]:
    """The middle confidence of the first two exits, rising."""
    images = np.concatenate([network_input(val.load(i)[0], SIZE, "stretch") for i in range(len(val))])
    logits = network.submodel(network.candidates[:2])(images, training=False).values()
    return sorted(round(float(np.median(tf.reduce_max(tf.nn.softmax(each), -1))), 3) for each in logits)


def sharpen(network: MultiExitNetwork) -> None:
    """Makes an untrained network sure of something, which differs from cell to cell."""
    for part in (network.original, *network.heads.values()):
        for kernel in (each for each in part.trainable_variables if each.ndim == 4):
            kernel.assign(3 * kernel)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, MultiExitNetwork, Examples]:
    """A work folder with candidates and statistics of an untrained network whose stage 1 was to have regions; network and images.

    Behind the second exit it can only run densely.
    """
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("work")
    config = Config(
        data=DataConfig(input_size=SIZE, synthetic_val=5),
        backbone=BackboneConfig("keras_file", weights=str(folder / "small.keras")),
        exits=ExitsConfig(count=3, layers=("block_3_add", "block_5_add"), plain_head=HEAD),
        stage1=StageConfig(regions="nearest", region_cell=48),
    )
    (folder / "config.json").write_text(configs.to_json(config))
    val = open_split(config.data, "val")
    small = small_network(val.info.num_classes)
    enlarged = LAYERS.Conv2DTranspose(val.info.num_classes, 2, 2, name="up")(small.get_layer("block_5_add").output)
    keras.Model(small.input, enlarged).save(config.backbone.weights)
    network = build_network(config, val.info.num_classes)
    network.add_heads([HeadSpec.parse(HEAD)], 0.9)
    sharpen(network)
    Path(best_weights(folder, "stage1")).parent.mkdir(parents=True)
    network.save_weights(best_weights(folder, "stage1"))
    run_candidates(folder)
    paths = calibrate.run(folder, theta_pix=confidences(network, val), regions=RegionOptions(max_early=2, theta_img=THETA_IMG))
    assert [path.name for path in paths] == ["stats.npz", "regions.npz"]

    return folder, network, val


@pytest.fixture(scope="module")
def stats(made) -> RegionStats:
    return RegionStats.load(made[0] / "regions.npz")


def by_hand(network: MultiExitNetwork, stats: RegionStats, number: int, image: np.ndarray) -> tuple[np.ndarray, list[int], list[int]]:
    """Mask, budgets and cells by exit of a configuration: the masked or dense segments of Keras, one after another."""
    exits = stats.exits(number)
    chain = [f"{choice.exit}.{choice.head}" for choice in exits]
    models = network.segments(chain)
    segments = segments_on_grid(network, chain, SIZE, stats.regions)
    some = next(filter(None, segments))
    cells = [some.cells_of(side, axis) for axis, side in enumerate(SIZE)]
    tensors = dict(models[0]({"image": image}, training=False))
    alive, answer, taken = np.ones((1, *stats.regions.grid), bool), np.zeros((1, *stats.regions.grid), int), []
    mask, before, budget = None, None, stats.regions.cells
    for index, choice in enumerate(exits):
        logits = tensors.pop("logits")
        before = logits = logits if budget == stats.regions.cells else segments[index - 1].answer(before, logits, alive)
        made = decide(logits, SIZE, ())["mask"]
        mask = made if mask is None else some.merged(mask, made, alive)
        answer[alive] = index
        if choice.theta_pix is None:
            break
        sure = np.where(alive, decide_by_cell(logits, SIZE, (choice.theta_pix, False), cells, segments[index] is None)["sure"], 2)
        unsure = int((sure < choice.theta_img - 1e-5).sum())
        if not unsure:
            break
        segment, model = segments[index], models[index + 1]
        budget = min(each for each in stats.regions.budgets if each >= unsure and (segment or each == stats.regions.cells))
        taken.append(budget)
        inputs = {name: tensors[name] for name in model.input}
        if segment is None:
            tensors |= model(inputs, training=False)
            continue
        chosen = segment.active(segment.most_unsure(tf.constant(sure, tf.float32), budget))
        tensors |= segment.masked(inputs, chosen)
        alive = alive & chosen.numpy()
    counts = np.bincount(answer.ravel(), minlength=stats.cells.shape[2]).tolist()
    return np.asarray(mask), taken + [0] * (stats.taken.shape[2] - len(taken)), counts


def test_statistics_are_what_keras_does_image_by_image(made, stats):
    _, network, val = made
    assert stats.regions == Regions("nearest", (2, 2), (1, 2, 4))  # three of the cells, 3x3 of 4x6 positions, are more work than all
    assert stats.candidates == (f"exit1.{HEAD}", f"exit2.{HEAD}", FINAL)
    pairs, of_image = 2 * len(THETA_IMG), 2 * len(THETA_IMG_WHOLE)
    assert len(stats.chains) == 2 * pairs + pairs * of_image  # behind exit 2, which only runs densely, no cell leaves for itself
    dense = stats.pairs.tolist().index([1, 2])
    budgets = set()
    for i, k in itertools.product(range(len(val)), range(len(stats.chains))):
        if (i + k) % 2:  # half of them are enough
            continue
        image, label = val.load(i)
        mask, taken, cells = by_hand(network, stats, k, network_input(image, SIZE, "stretch"))
        assert (stats.taken[k, i].tolist(), stats.cells[k, i].tolist()) == (taken, cells)
        budgets.add(tuple(taken))
        check_counts(stats.tp[k, i], stats.fp[k, i], mask_at(mask, label.shape, "stretch"), label)
        np.testing.assert_array_equal(stats.labelled[i], np.bincount(label[label < 255], minlength=val.info.num_classes))
    assert len(budgets) > 4 and {len(stats.exits(k)) for k in range(len(stats.chains))} == {2, 3}
    assert any(0 < first < 4 and second == 4 for first, second in budgets)  # some cells have left, the others are computed densely
    everything = [k for k in range(len(stats.chains)) if (stats.taken[k, :, 0] == 4).all()]
    whole = Stats.load(made[0] / "stats.npz")
    for k in everything:
        chain = stats.chains[k]
        if (chain >= 0).sum() == 2:  # all cells went on: the later exit itself
            assert np.abs(stats.tp[k] - whole.counts(whole.candidates.index(stats.candidates[chain[1]]))[0]).sum() < 20
    assert stats.first_macs.tolist()[1:] == [0, 0]  # they begin no chain
    assert (np.diff(stats.pair_macs[:dense], axis=1) > 0).all() and stats.pair_macs[dense, :-1].tolist() == [0, 0]
    position = whole.candidates.index(stats.candidates[0])
    assert stats.first_macs[0] == whole.prefix_macs[0] + whole.head_macs[position]
    for (first, second), macs in zip(stats.pairs.tolist(), stats.pair_macs, strict=True):
        head = whole.head_macs[whole.candidates.index(stats.candidates[second])]
        assert macs[-1] == whole.prefix_macs[second] - whole.prefix_macs[first] + head


def check_counts(tp: np.ndarray, fp: np.ndarray, mask: np.ndarray, label: np.ndarray) -> None:
    """Asserts that these are the counts of a mask [h, w], but for pixels where two classes tie."""
    matrix = metrics.confusion_matrix(label.reshape(1, *label.shape), mask.reshape(1, *label.shape), tp.size)
    right, wrong, _ = metrics.class_counts(matrix)
    assert np.abs(tp - right).sum() + np.abs(fp - wrong).sum() <= label.size * 1e-3


@pytest.fixture(scope="module")
def dense_start() -> tuple[MultiExitNetwork, Config, Examples]:
    """An untrained network between whose first exits there is a pooling alone; the second has a head without convolutions of stride 1."""
    keras.utils.set_random_seed(1)
    config = Config(
        data=DataConfig(input_size=SIZE, synthetic_val=4),
        exits=ExitsConfig(plain_head=HEAD),
        stage1=StageConfig(regions="nearest", region_cell=32),
    )
    val = open_split(config.data, "val")
    trunk = small_network(val.info.num_classes, FEW_BLOCKS[:2])
    x = LAYERS.AveragePooling2D(2, name="pool")(trunk.get_layer("block_1_project_bn").output)
    for number in range(2):
        y = LAYERS.Conv2D(32, 3, padding="same", activation="relu", name=f"late_{number}")(x)
        x = LAYERS.Add(name=f"late_{number}_add")([x, y])
    logits = LAYERS.Conv2D(val.info.num_classes, 1, dtype="float32", name="logits")(x)
    network = convert(keras.Model(trunk.input, logits), ["block_1_project_bn", "pool", "late_0_add"], SIZE)
    network.add_heads([HeadSpec.parse(HEAD)], 0.9)
    name, read = f"exit2.{HEAD}", network.heads[f"exit2.{HEAD}"].inputs
    network.heads[name] = keras.Model(read, LAYERS.Conv2DTranspose(val.info.num_classes, 2, 2, name="up")(read[0]), name=name)
    sharpen(network)
    return network, config, val


@pytest.mark.parametrize(
    ("exits", "dense"),
    [
        (("exit1", "exit2", "final"), ()),
        (("exit2", "exit3", "final"), ("exit3",)),
        pytest.param(("exit2", "exit3", "final"), (), marks=pytest.mark.full),
    ],
)
def test_statistics_are_what_a_bundle_does(dense_start, tmp_path, exits, dense):
    """Of chains that begin with a segment that can only be, or shall be, dense, and of one without; thresholds of each exit differ.

    In front of a dense segment the whole image leaves or none of it.
    """
    network, config, val = dense_start
    chains = plan(network, config, RegionOptions(max_early=2, dense=dense))
    chain, decides = tuple(name for name in chains.candidates if name.partition(".")[0] in exits), exits[0] == "exit1" or bool(dense)
    assert [each is None for each in chains.segments[chain]] == [decides, False]
    pix = confidences(network, val)[:: 1 if exits[0] == "exit1" else -1]
    every = [(chain, tuple(zip(pix, img, strict=True))) for img in ((0.2, 0.5), (0.5, 0.2), (0.5, 0.9), (0.9, 0.5))]
    counts = count(Outcomes(network, chains, SIZE), every, val, range(len(val)), "stretch")

    choices = [ExitChoice(*name.split(".", 1), *theta) for name, theta in zip(chain, [*every[0][1], ()], strict=True)]
    configuration = Configuration("input-dependent", False, tuple(choices), None, regions=chains.regions)
    exporter = Exporter(network, SIZE)
    exporter.bundle(tmp_path / "bundle", configuration, Predicted(0.5, Cost("macs", 1.0), (0.5, 0.25, 0.25)), val.info.classes)
    bundle, seen = Bundle.load(tmp_path / "bundle"), set()
    for k, (_, thetas) in enumerate(every):
        *early, last = bundle.manifest.segments
        early = [dataclasses.replace(each, theta_img=img) for each, (_, img) in zip(early, thetas, strict=True)]
        manifest = dataclasses.replace(bundle.manifest, segments=(*early, last))
        runner = Runner(dataclasses.replace(bundle, manifest=manifest), engine="interpreter")
        for i in range(len(val)):
            image, label = val.load(i)
            result = runner.run(image)
            budgets = [step.budget for step in result.trace[1:]]
            assert counts["taken"][k, i].tolist() == budgets + [0] * (2 - len(budgets))
            assert counts["cells"][k, i].tolist() == np.bincount(result.cells.ravel(), minlength=3).tolist()
            check_counts(counts["tp"][k, i], counts["fp"][k, i], result.mask, label)
            assert not decides or not budgets or 0 not in result.cells
            seen.add(tuple(budgets))
    everything = chains.regions.cells
    assert any(budgets[-1] < everything for budgets in seen if len(budgets) == 2)
    assert not decides or (() in seen and {budgets[0] for budgets in seen if budgets} == {everything})


def test_costs_of_a_dense_pair_have_one_budget(dense_start):
    network, config, _ = dense_start
    chains = plan(network, config, RegionOptions(max_early=2))
    of = described(network, chains, SIZE, configurations(chains, [0.5], [0.5, 0.9]))
    dense = [name.partition(".")[0] for name in next(pair for pair, segment in chains.pairs.items() if segment is None)]
    assert dense == ["exit1", "exit2"] and (f"exit1.{HEAD}", f"exit2.{HEAD}") in chains.left_out
    macs = dict(zip(map(tuple, of["pairs"].tolist()), of["pair_macs"].tolist(), strict=True))
    parameters = dict(zip(map(tuple, of["pairs"].tolist()), of["pair_parameters"].tolist(), strict=True))
    classes = network.num_classes
    up = 4 * 6 * 32 * classes * 4  # what each of the 4x6 positions of exit 2 adds to 2x2 of its logits
    assert (macs[0, 1], parameters[0, 1]) == ([0] * (len(chains.regions.budgets) - 1) + [up], 4 * 32 * classes + classes)
    assert macs[0, 3][-1] == macs[1, 3][-1] and parameters[0, 3] == parameters[1, 3]  # the pooling is free
    assert of["chains"][-4:].tolist() == [[1, 2, 3]] * 4
    whole = [*zip(of["chains"][:, 0].tolist(), of["chains"][:, 1].tolist(), of["theta_img"][:, 0].tolist(), strict=True)]
    assert {img for first, second, img in whole if (first, second) == (0, 1)} == {*THETA_IMG_WHOLE}
    assert of["theta_img"][-4:].tolist() == [[0.5, 0.5], [0.5, 0.9], [0.9, 0.5], [0.9, 0.9]]


def test_shards_of_regions_counted_apart_make_the_same_statistics(made, tmp_path):
    """What is finished is not done again, unless it is of other thresholds; another process makes the same of what it is sent."""
    folder, network, val = made
    of = str(folder), "", "", confidences(network, val), "exact", (None,), RegionOptions(max_early=2, theta_img=THETA_IMG)
    opened = tasks.Opened(calibrate.calibrations(*of), calibrate._opened, ((), False), *of)
    regional = opened.value[None].regional
    other = calibrate.RegionCalibration(opened.value[None], regional.chains, THETA_IMG[:1])

    def todo() -> list[tasks.Task]:
        return calibrate.shard_tasks(opened, str(folder), shard=3, regions=True)

    for task in todo():
        assert tasks._elsewhere(os.getcwd(), pickle.dumps((tasks._place(task.function), task.arguments))) is None
        assert sum(each.done for each in todo()) == (1 if task.output.name.startswith("0-") else 2)
    assert other.key(range(3)) != regional.key(range(3))
    shards = [map_arrays(path) for path in tasks.run(todo(), "calibrate", "shard")]
    regional.stats(shards, file_sha256(folder / "stats.npz")).save(tmp_path / "regions.npz")
    assert (tmp_path / "regions.npz").read_bytes() == (folder / "regions.npz").read_bytes()
    shutil.rmtree(task.output.parent)


def random_stats(seed: int, images: int = 5, classes: int = 3) -> RegionStats:
    """Small numbers, so that ties abound; chains of two and three, in which the last exit runs densely behind the second."""
    rng = np.random.default_rng(seed)
    chains = np.array([[0, 1, -1], [0, 2, -1], [0, 1, 2], [0, 1, 2]]).repeat(3, 0)
    k, used = len(chains), chains >= 0
    theta_pix, theta_img = np.where(used[:, 1:], rng.random((2, k, 2)), np.nan)
    labelled = rng.integers(0, 5, (images, classes)) + 1
    taken = np.where(used[:, 1:], rng.choice([0, 1, 4], (k, 2)), 0)[:, None].repeat(images, 1).astype(np.int32)
    taken = np.where(rng.random(taken.shape) < 0.3, 0, taken).astype(np.int32)
    taken[..., 1] = np.where((taken[..., 0] > 0) & (taken[..., 1] > 0), 4, 0)
    cells = np.zeros((k, images, 3), np.int32)
    cells[..., 1:] = np.where(used[:, None, 1:], rng.integers(0, 3, (k, images, 2)), 0)
    cells[..., 0] = 4 - cells.sum(2)
    names = ("exit1.a", "exit2.a", "final.a")
    return RegionStats(
        split="val",
        stats_sha256="0" * 64,
        images=tuple(f"image{i}" for i in range(images)),
        classes=tuple(f"class{c}" for c in range(classes)),
        neighbours="stale",
        grid=np.array([2, 2]),
        budgets=np.array([1, 4]),
        dense=("exit2",),
        candidates=names,
        chains=chains,
        theta_pix=theta_pix,
        theta_img=theta_img,
        tp=rng.integers(0, labelled + 1, (k, images, classes)).astype(np.int32),
        fp=rng.integers(0, 4, (k, images, classes)).astype(np.int32),
        labelled=labelled,
        taken=taken,
        cells=cells,
        first_macs=np.array([2, 0, 0]),
        first_parameters=np.array([10, 0, 0]),
        pairs=np.array([[0, 1], [0, 2], [1, 2]]),
        pair_macs=rng.integers(1, 9, (3, 2)) * [[1, 1], [1, 1], [0, 1]],
        pair_parameters=np.array([4, 9, 6]),
        first_sha256=("1", "", ""),
        pair_sha256=("a", "b", "c", "d", "", "f"),
        made_by="{}",
        precision="fp32",
    )


def scored_by_hand(stats: RegionStats) -> list[tuple[float, dict[str, float]]]:
    """mIoU and costs of every configuration, image by image."""
    result = []
    pairs = [tuple(pair) for pair in stats.pairs.tolist()]
    for k, chain in enumerate(stats.chains.tolist()):
        chain = [c for c in chain if c >= 0]
        hops = [pairs.index(pair) for pair in itertools.pairwise(chain)]
        costs = []
        for i in range(len(stats.images)):
            cost = int(stats.first_macs[chain[0]])
            for hop, budget in zip(hops, stats.taken[k, i].tolist(), strict=False):
                cost += int(stats.pair_macs[hop, stats.budgets.tolist().index(budget)]) if budget else 0
            costs.append(cost)
        tp, fp = stats.tp[k].sum(0), stats.fp[k].sum(0)
        values = {"macs": float(np.mean(costs)), "macs_p90": float(sorted(costs)[int(np.ceil(0.9 * len(costs))) - 1])}
        values["parameters"] = float(stats.first_parameters[chain[0]] + sum(stats.pair_parameters[hop] for hop in hops))
        result.append((float(metrics.miou(tp, fp, stats.labelled.sum(0) - tp)), values))
    return result


@pytest.mark.parametrize("seed", range(20))
def test_search_is_brute_force(seed):
    stats = random_stats(seed)
    costs, scored, original = region_macs(stats), scored_by_hand(stats), Original(0.5, 20.0)
    rng = np.random.default_rng(seed)
    for most, minimise in itertools.product((1, 2), (None, "macs", "macs_p90", "parameters")):
        able = [k for k in range(len(scored)) if (stats.chains[k] >= 0).sum() <= most + 1]
        example = scored[int(rng.choice(able))]
        limits = {name: example[1][name] for name in rng.choice([*example[1]], rng.integers(0, 3), replace=False) if name != minimise}
        objective = Objective(minimise, example[0] if minimise or seed % 2 else None, limits)
        found = search_regions(stats, costs, objective, original, "exact", most)
        meets = [
            (accuracy, values)
            for accuracy, values in (scored[k] for k in able)
            if accuracy >= (objective.min_miou or 0) - 1e-12 and all(values[name] <= limit + 1e-9 for name, limit in limits.items())
        ]
        name = minimise or "macs"
        order = [(-round(accuracy, 12), values[name]) for accuracy, values in meets]
        best = min(order) if minimise is None else min(order, key=lambda each: (each[1], each[0]))
        assert (round(found.predicted.miou, 12), found.predicted.costs[name]) == (-best[0], best[1])
        assert (found.certificate.covered, found.certificate.scored, found.certificate.gap) == (len(able), len(able), 0)
        number = configuration_of(stats, found.exits)
        rates = [stats.cells[number, :, e].sum() / stats.cells[number].sum() for e in range(len(found.exits))]
        assert found.predicted.exit_rates == pytest.approx(rates)
        assert found.predicted.costs == pytest.approx(scored[number][1])
        dense = tuple(choice.exit for choice in found.exits[1:] if choice.exit == "exit2")
        assert found.regions == dataclasses.replace(stats.regions, dense=dense)
    shares = taken_shares(stats, number)
    assert shares.shape == (len(found.exits) - 1, 3) and shares.sum(1) == pytest.approx(1)


def test_what_no_configuration_reaches_names_the_nearest():
    stats = random_stats(0)
    best = max(accuracy for accuracy, _ in scored_by_hand(stats))
    with pytest.raises(InfeasibleError, match=rf"macs<=1 is out of reach where regions decide; .* mIoU {best:.6f}|highest mIoU is out of"):
        search_regions(stats, region_macs(stats), Objective("macs", best, {"macs": 1}), Original(0.5, 20.0), "exact")
    with pytest.raises(InfeasibleError, match="max_early_exits: must be at least 1 where regions decide"):
        search_regions(stats, region_macs(stats), Objective(), Original(0.5, 20.0), "exact", 0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"setting": "anytime", "cost_share": 0.5}, "decide: must be image with the setting anytime, got 'best'"),
        ({"max_risk": 0.1}, "decide: must be image with max_risk, which is shown of whole images"),
        ({"min_miou": 0.1, "limits": {"size_bytes": 9.0}}, "decide: must be image with size_bytes, which is not known of regions"),
        ({"min_miou": 0.1, "minimise": "memory_bytes"}, "decide: must be image with memory_bytes, which is not known of regions"),
    ],
)
def test_what_regions_cannot_be_asked(setting, message):
    with pytest.raises(ValueError, match=message):
        Asked(**setting, decide="best")
    assert Asked(**setting).deciders(True) == ("image",)


def test_file_is_strict(tmp_path):
    stats = random_stats(1)
    stats.save(tmp_path / "regions.npz")
    again = RegionStats.load(tmp_path / "regions.npz")
    for field in dataclasses.fields(RegionStats):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(stats, field.name))
    cells = stats.cells.copy()
    cells[0, 0, 0] += 1
    same = {name: np.minimum(getattr(stats, name), 0) for name in ("theta_pix", "theta_img")}
    dense = np.where(stats.taken == 4, 1, stats.taken).astype(np.int32)
    for changed, message in (
        ({"budgets": np.array([1, 3])}, "budgets: must be such that the last is all 4 cells"),
        (same, "chains: must be with other thresholds where they are the same"),
        ({"neighbours": "none"}, "neighbours: must be one of stale, nearest, zeros"),
        ({"chains": stats.chains[:, ::-1].copy()}, "chains: must be positions of two candidates or more, each deeper"),
        ({"theta_img": np.nan_to_num(stats.theta_img, nan=0.5)}, "theta_img: must be in .0, 1. at every early exit, NaN elsewhere"),
        ({"pairs": stats.pairs[[0, 0, 2]]}, "pairs: must be distinct, all neighbours in a chain among them"),
        ({"tp": stats.tp + 9}, "tp: must be at most the labelled pixels"),
        ({"tp": stats.tp.astype(np.int64)}, "tp: must be int32, got 'int64'"),
        ({"taken": stats.taken + 1}, "taken: must be 0 or of the budgets .1, 4."),
        ({"taken": dense}, r"taken: must be 0 or of the budgets .1, 4. that the pair has, got \[1\]"),
        ({"pair_macs": 0 * stats.pair_macs}, "pair_macs: must be above 0 at the last budget, got 0"),
        ({"cells": cells}, "cells: must be 4 in each image"),
        ({"pair_sha256": ()}, "pair_sha256: must be 6 strings"),
        ({"first_macs": -stats.first_macs}, "first_macs: must be without negative values"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(stats, **changed)
    images = select(stats, np.array([1, 3]))
    assert images.images == ("image1", "image3") and (images.tp == stats.tp[:, [1, 3]]).all()


def test_what_cannot_be_planned(made):
    folder, network, _ = made
    config = configs.load_config(folder)
    none = dataclasses.replace(config, stage1=dataclasses.replace(config.stage1, regions="none"))
    assert plan(network, none, RegionOptions()) is None
    chains = plan(network, none, RegionOptions("stale", 16, (f"exit2.{HEAD}", f"exit1.{HEAD}")))
    assert chains.chains == [(f"exit1.{HEAD}", f"exit2.{HEAD}")] and chains.regions == Regions("stale", (4, 6), (3, 6, 9, 12, 18, 24))
    with pytest.raises(ValueError, match=r"regions: must be none with this network, got .final\.original: must have a convolution"):
        plan(network, config, RegionOptions(candidates=(f"exit2.{HEAD}", FINAL)))
    with pytest.raises(ValueError, match=r"region_heads: must be of the candidates exit1.fcn-r8-b0, .* got 'exit1.other'"):
        plan(network, config, RegionOptions(candidates=("exit1.other", FINAL)))
    with pytest.raises(ValueError, match="region_heads: must be of two exits or more, one each"):
        plan(network, config, RegionOptions(candidates=(FINAL,)))
    with pytest.raises(ValueError, match="region_dense: must be of the exits exit2, final, got 'exit1'"):
        plan(network, config, RegionOptions(dense=("exit1",)))
    with pytest.raises(ValueError, match=r"region_dense: must be fewer than all .* the first \(exit2, final\), got 'exit2, final'"):
        plan(network, config, RegionOptions(dense=("exit2", "final")))
    with pytest.raises(ValueError, match="region_cell: must be less than the image's 64 x 96 pixels, got 500"):
        plan(network, config, RegionOptions(cell=500))
    with pytest.raises(ValueError, match="theta_img: must be increasing shares"):
        RegionOptions(theta_img=(0.0, 0.5))
    chains = plan(network, config, RegionOptions(max_early=2))
    message = r"theta_pix, theta_img: must be so few .* 5000 configurations, .* \(chains: 2 with 1 early, 1 with 2 early\)"
    with pytest.raises(ValueError, match=f"{message}, got 110 pairs, 6270 configurations"):  # 2 * 110 + 110 * (11 * 5)
        configurations(chains, [*range(11)], [*range(10)])


def latency_file(folder: Path) -> Path:
    """Files take as long as they have bytes; of a region's budget, so many times more."""
    rows = []
    for path in sorted((folder / "candidates").glob("*.tflite")):
        budget = path.stem.rpartition(".")[2]
        slower = int(budget) / 4 if path.stem.startswith("region.") and budget.isdigit() else 1
        time = path.stat().st_size / 1e5 * slower
        rows.append(
            LatencyRow(
                path.stem,
                file_sha256(path),
                path.stat().st_size,
                *("board", "soc", "os", "runtime", "1", "xnnpack", "xnnpack", 1),
                *(time, time, time, 3, None, None),
            )
        )
    write_json(folder / "latency.json", LatencyTable({}, tuple(rows)).to_json())
    return folder / "latency.json"


def test_search_of_a_work_folder(made, stats, tmp_path):
    folder, *_ = made
    names = {path.stem for path in (folder / "candidates").glob("region.*.tflite")}
    first, second = f"exit1.{HEAD}", f"exit2.{HEAD}"
    pairs = {f"region.{first}.{later}.{n}" for later in (second, FINAL) for n in (1, 2, 4)}
    assert names == {f"region.{first}", f"region.{second}.{FINAL}.4"} | pairs
    assert calibrate.is_calibrated(folder, "val") and calibrate.is_calibrated_with_regions(folder, configs.load_config(folder))
    output, latency = tmp_path / "deployment.json", latency_file(folder)
    for file in (None, latency):
        found = {name: search.run(folder, Asked(min_miou=0.0, decide=name), file, output) for name in ("image", "regions")}
        assert found["image"].regions is None and found["regions"].regions == stats.regions
        best = search.run(folder, Asked(min_miou=0.0), file, output)
        assert Deployment.load(output) == best
        assert best.predicted.cost_mean == min(each.predicted.cost_mean for each in found.values())
        assert {row.decide: row.cost_mean for row in best.combinations} == {name: each.predicted.cost_mean for name, each in found.items()}
        lines = search.table(best).splitlines()
        assert [line.split()[-1] == "chosen" for line in lines[1:3]] == [not row.reason for row in best.combinations]
        assert "decides" in lines[0] and {"image", "regions"} == {line.split()[2] for line in lines[1:3]}
        assert "plain confidence, regions: 2 x 2 cells, nearest, budgets of 1, 2, 4" in search.table(found["regions"])
    assert set(found["regions"].predicted.costs) == {"latency_ms", "latency_p90_ms", "macs", "macs_p90", "parameters"}
    number = configuration_of(stats, found["regions"].exits)
    expected = []
    time = {row.submodel: row.p50_ms for row in LatencyTable.load(latency).rows}
    chain = [f"{choice.exit}.{choice.head}" for choice in found["regions"].exits]
    for taken in stats.taken[number]:
        expected.append(time[f"region.{chain[0]}"] + (time[f"region.{chain[0]}.{chain[1]}.{taken[0]}"] if taken[0] else 0))
        if len(chain) == 3 and taken[1]:
            expected[-1] += time[f"region.{chain[1]}.{chain[2]}.{taken[1]}"] + max(time["plain.8x12"] - time["mask.8x12"], 0)
    assert found["regions"].predicted.cost_mean == pytest.approx(np.mean(expected))
    checked = search.run(folder, Asked(min_miou=0.0, decide="regions", check_share=0.4), None, output)
    assert checked.predicted.images == 2

    rows = [row for row in json.loads(latency.read_text())["rows"] if not re.search(r"region\..*\.2$", row["submodel"])]
    write_json(tmp_path / "latency.json", {**json.loads(latency.read_text()), "rows": rows})
    with pytest.raises(ValueError, match=r"decide: must be image, since latency.json: must have a row .* missing are region.exit1.*\.2"):
        search.run(folder, Asked(min_miou=0.0, decide="regions"), tmp_path / "latency.json", output)
    for who in ("best", None):
        without = search.run(folder, Asked(min_miou=0.0, decide=who), tmp_path / "latency.json", output)
        assert [row.reason != "" for row in without.combinations] == [False, True] and without.regions is None
        _, chosen, left_out, *_ = search.table(without).splitlines()
        assert chosen.split()[2] == "image"
        assert re.fullmatch(r"xnnpack +fp32 +regions +- +-  latency\.json: must have a row .*for every submodel .* \.\.\.", left_out)


def test_regions_that_were_not_exported_are_an_error(made, tmp_path):
    """Flags that `calibrate` has and `export_tflite --candidates` had not; what was calibrated before stays."""
    shutil.copytree(made[0], tmp_path / "work")
    before = (tmp_path / "work" / "regions.npz").read_bytes()
    message = r"region_dense: must be those of .* \(2 x 2 cells, nearest, .*same flags.* got '4 x 6 cells, nearest, budgets of 3, "
    with pytest.raises(ValueError, match=message):
        calibrate.run(tmp_path / "work", regions=RegionOptions(cell=16))
    (tmp_path / "work" / "candidates" / f"region.exit1.{HEAD}.exit2.{HEAD}.4.tflite").unlink()
    with pytest.raises(ValueError, match=f"region_heads: must be of exported candidates, without region.exit1.{HEAD}.exit2.{HEAD}.4;"):
        calibrate.run(tmp_path / "work")
    assert (tmp_path / "work" / "regions.npz").read_bytes() == before


def test_pipeline_knows_what_regions_need(made, tmp_path):
    config, latency = configs.load_config(made[0]), latency_file(made[0])

    def done(decide: str | None) -> list[str]:
        steps = Pipeline(tmp_path / "work", config, "", Asked(min_miou=0.0, decide=decide), latency).steps()
        return [name for name in ("candidates", "calibrate") if steps[name][0]()]

    shutil.copytree(made[0], tmp_path / "work")
    assert done(None) == done("best") == ["candidates", "calibrate"]
    (tmp_path / "work" / "regions.npz").unlink()
    assert done("regions") == ["candidates"] and done("image") == ["candidates", "calibrate"]
    (tmp_path / "work" / "candidates" / "regions.json").unlink()
    assert done("regions") == [] and done("image") == ["candidates", "calibrate"]
    plain = dataclasses.replace(config, stage1=dataclasses.replace(config.stage1, regions="none"))
    with pytest.raises(ValueError, match=r"--decide: must be image without stage1\.regions, got 'regions'"):
        Pipeline(tmp_path / "work", plain, "", Asked(min_miou=0.0, decide="regions"), latency).check()
    Pipeline(tmp_path / "work", plain, "", Asked(min_miou=0.0, decide="best"), latency).check()


@pytest.mark.full
def test_prediction_is_what_the_bundle_does_and_the_report_says(made, stats, tmp_path, monkeypatch):
    """The mask of a bundle's runs, budgets and cells, counted over the split that the search has seen."""
    folder, _, val = made
    numbers = [k for k in range(len(stats.chains)) if (stats.chains[k] >= 0).sum() == 3]
    number = max(numbers, key=lambda k: len({tuple(taken) for taken in stats.taken[k].tolist()}))
    predicted = predict_regions(stats, region_macs(stats), number)
    deployment = search.run(folder, Asked(min_miou=0.0, decide="regions"), None, tmp_path / "deployment.json")
    dataclasses.replace(deployment, exits=stats.exits(number), predicted=predicted).save(folder / "deployment.json")
    run_deployment(folder, folder / "deployment.json", measure=False)
    bundle = Bundle.load(folder / "bundle")
    assert bundle.manifest.predicted.exit_rates == predicted.exit_rates and bundle.manifest.regions == stats.regions
    runner, matrix, results = Runner(bundle, threads=1), 0, {}
    for i in range(len(val)):
        image, label = val.load(i)
        results[val.names[i]] = result = runner.run(image)
        matrix += metrics.confusion_matrix(label, result.mask, val.info.num_classes)
        assert [step.budget for step in result.trace[1:]] == [int(each) for each in stats.taken[number, i] if each]
    assert metrics.miou(*metrics.class_counts(matrix)) == pytest.approx(predicted.miou, abs=2e-3)

    monkeypatch.setattr(report, "front", lambda *_, **__: [])
    page = report.run(folder)
    text = page.read_text(encoding="utf-8")
    words = " ".join(re.sub(r"<[^>]+>", " ", text).split())
    rates = [f"{each} {100 * rate:.1f} %" for each, rate in zip(("exit1", "exit2", "final"), predicted.exit_rates, strict=True)]
    assert "Where cells leave exit leave here" in words and all(rate in words for rate in rates)
    shares = " ".join(f"{100 * share:.1f} %" for share in taken_shares(stats, number)[0])
    assert f"How many cells exits work on exit none 1 2 4 exit2 {shares} final" in words
    drawn = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    check_cells(drawn, stats, number, results, runner.manifest.palette)
    check_page(page, drawn)


def check_cells(drawn: dict, stats: RegionStats, number: int, results: dict, colours: tuple) -> None:
    """Asserts that the report's cells, costs and merged masks are those of the runner, and of the statistics."""
    spent = [each[number] for each in region_macs(stats).of_image[0].by_exit(stats)]
    assert {image["name"] for image in drawn["images"]} == {*results} == {*stats.images}
    for image in drawn["images"]:
        cells, result, i = image["cells"], results[image["name"]], stats.images.index(image["name"])
        np.testing.assert_array_equal(cells["exits"], result.cells)
        assert cells["shares"] == [(result.cells == k).mean() for k in range(3)] == (stats.cells[number, i] / 4).tolist()
        assert cells["spent"] == pytest.approx([1e-9 * each[i] for each in spent])
        assert (cells["rows"], cells["columns"]) == ([0, 0.75, 1], [0, 0.5, 1])  # 6 of 8 and 6 of 12 positions
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(cells["mask"].partition(",")[2]))).convert("RGB"))
        assert (mask != np.array(colours)[result.mask]).any(-1).mean() < 2e-3
        tp, fp = (getattr(stats, name)[number, i] for name in ("tp", "fp"))
        assert image["miou"] == pytest.approx(100 * metrics.miou(tp, fp, stats.labelled[i] - tp))
    curves = [np.array(curve["points"]) for curve in drawn["cells"]]
    assert [curve["name"] for curve in drawn["cells"]] == ["exit1", "exit2", "final"]
    shares = np.stack([curve[:, 2] for curve in curves])
    assert sorted(shares.T.tolist()) == sorted((100 * stats.cells[number] / 4).tolist()) and (np.diff(shares[0]) <= 0).all()
    np.testing.assert_allclose(np.stack([curve[:, 1] for curve in curves]), shares.cumsum(0))


def check_page(page: Path, drawn: dict) -> None:
    """Asserts that a browser shows an image's cells in the colour of their exit, and on request an exit alone."""
    browser = browsers.start()
    try:
        browsers.show(browser, page.as_uri(), width=390, dark=True)

        def sources() -> list[str]:
            return [each.get_attribute("src") for each in browser.find_elements(By.CSS_SELECTOR, ".panes img")]

        image = max(drawn["images"], key=lambda each: each["lost"])
        cells = image["cells"]
        assert sources() == [image["photo"], image["label"], image["photo"], cells["mask"], cells["errors"]]
        areas = browser.find_elements(By.CSS_SELECTOR, ".panes .cells .exit")
        assert [area.get_attribute("d").count("M") for area in areas] == [int(4 * share) for share in cells["shares"]]
        colours = [area.value_of_css_property("fill") for area in areas]
        assert len({*colours}) == 3
        assert all(f"{100 * share:.1f} %" in browser.find_element(By.CSS_SELECTOR, ".facts").text for share in cells["shares"])
        assert browser.execute_script("const page = document.documentElement; return page.scrollWidth <= page.clientWidth")
        browser.find_element(By.CSS_SELECTOR, "#viewer").send_keys(Keys.ARROW_DOWN)
        assert sources()[2:] == [image["exits"][0][name] for name in ("mask", "confidence", "errors")]
        assert len(browser.find_elements(By.CSS_SELECTOR, "#cells-chart path.area")) == 3
        assert browser.get_log("browser") == []
    finally:
        browser.quit()
