"""The device side against a TensorFlow reference, on three small segments whose arithmetic is exact in float32."""

import concurrent.futures
import ctypes.util
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from fractions import Fraction
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from PIL import Image

from mess_runtime import benchmark, bundle, engines, files, runner
from mess_runtime.__main__ import main
from mess_runtime.bundle import (
    MODEL,
    Bundle,
    InputSpec,
    Manifest,
    Regions,
    Segment,
    alone_signature,
    file_sha256,
    segment_signature,
    sha256,
    write_json,
    write_manifest,
)
from mess_runtime.frames import Writer, open_sources
from mess_runtime.runner import Runner, exit_within
from mess_tf.graph import flatbuffer
from mess_tf.graph.conversion import convert

HEIGHT, WIDTH, CLASSES = 32, 64, 5
PIXELS = HEIGHT * WIDTH
EXITS = ("exit1", "exit2", "final")
PALETTE = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))


class Net(tf.Module):
    """Three segments; the last reads the feature of the first beside that of the second. Whole weights keep all sums exact."""

    def __init__(self):
        generator = np.random.default_rng(7)

        def weights(*shape):
            return tf.Variable(generator.integers(-1, 2, shape).astype(np.float32))

        self.stem, self.middle, self.deep = weights(3, 3, 3, 4), weights(3, 3, 4, 4), weights(3, 3, 4, 4)
        self.heads = [weights(1, 1, 4, CLASSES), weights(1, 1, 4, CLASSES), weights(1, 1, 8, CLASSES)]

    def exit(self, feature, head, threshold):
        logits = tf.image.resize(tf.nn.conv2d(feature, self.heads[head], 1, "SAME"), (HEIGHT, WIDTH))
        confident = tf.cast(tf.reduce_max(logits, -1) >= threshold, tf.int32)
        return {"mask": tf.cast(tf.argmax(logits, -1, tf.int32), tf.uint8), "confident_pixels": tf.reduce_sum(confident, (1, 2))}

    def segment1(self, image):
        feature = tf.nn.relu(tf.nn.conv2d(image, self.stem, 2, "SAME"))
        return {"feature_1": feature, **self.exit(feature, 0, 6.0)}

    def segment2(self, feature_1):
        feature = tf.nn.relu(tf.nn.conv2d(feature_1, self.middle, 2, "SAME"))
        return {"feature_2": feature, **self.exit(feature, 1, 20.0)}

    def segment3(self, feature_1, feature_2):
        deep = tf.nn.relu(tf.nn.conv2d(feature_2, self.deep, 1, "SAME"))
        both = tf.concat([tf.image.resize(deep, (HEIGHT // 2, WIDTH // 2)), feature_1], -1)
        outputs = self.exit(both, 2, 0.0)
        return {"mask": outputs["mask"]}

    def everything(self, image):
        """Masks and numbers of confident pixels of all exits, computed by TensorFlow."""
        first = self.segment1(tf.constant(image[None], tf.float32))
        second = self.segment2(first["feature_1"])
        third = self.segment3(first["feature_1"], second["feature_2"])
        masks = [out["mask"][0].numpy() for out in (first, second, third)]
        return masks, [int(out["confident_pixels"][0]) for out in (first, second)]


@pytest.fixture(scope="session")
def net():
    return Net()


@pytest.fixture(scope="session")
def images():
    """Flat to busy and dark to bright, so that confidences differ; small values keep the reference exact."""
    generator = np.random.default_rng(3)
    noise = generator.integers(0, 4, (24, HEIGHT, WIDTH, 3))
    return [(image % (1 + index % 4)).astype(np.uint8) for index, image in enumerate(noise)]


@pytest.fixture(scope="session")
def thetas(net, images):
    """Shares that images of the set reach exactly, so that the comparison's last bit matters."""
    first, second = np.array([net.everything(image)[1] for image in images]).T
    theta1 = np.sort(first)[len(images) * 2 // 3]
    rest = np.sort(second[first < theta1])
    return float(theta1 / PIXELS), float(rest[len(rest) // 2] / PIXELS)


IMAGE_SHAPE, FEATURE_1, FEATURE_2 = (1, HEIGHT, WIDTH, 3), (1, HEIGHT // 2, WIDTH // 2, 4), (1, HEIGHT // 4, WIDTH // 4, 4)


def alone(net, index):
    """The function from the image to one exit."""

    def function(image):
        first = net.segment1(image)
        second = net.segment2(first["feature_1"])
        outputs = (first, second, net.segment3(first["feature_1"], second["feature_2"]))[index]
        return {name: tensor for name, tensor in outputs.items() if not name.startswith("feature")}

    return function


@pytest.fixture(scope="session")
def signatures(net):
    """The graphs of the bundle by signature."""
    made = {
        segment_signature("exit1"): convert(net.segment1, {"image": IMAGE_SHAPE}),
        segment_signature("exit2"): convert(net.segment2, {"feature_1": FEATURE_1}),
        segment_signature("final"): convert(net.segment3, {"feature_1": FEATURE_1, "feature_2": FEATURE_2}),
    }
    return made | {alone_signature(name): convert(alone(net, index), {"image": IMAGE_SHAPE}) for index, name in enumerate(EXITS)}


@pytest.fixture(scope="session")
def folder(signatures, thetas, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle")
    (path / MODEL).write_bytes(flatbuffer.write(signatures))
    segments = []
    for name, theta in zip(EXITS, (*thetas, None), strict=True):
        alone_sha256 = sha256(flatbuffer.write({"serve": signatures[alone_signature(name)]}))
        pix = None if theta is None else 0.9
        segments.append(Segment(name, "fcn-r1-b0", 1000, 2000, alone_sha256, pix, theta, theta is not None, 0.5))
    manifest = Manifest(
        created_by=bundle.CreatedBy("0.1.0", tf.__version__, "unknown"),
        input=InputSpec(HEIGHT, WIDTH, "float32"),
        classes=("sky", "road", "tree", "car", "sign"),
        palette=PALETTE,
        setting="input-dependent",
        precision="fp32",
        fidelity="exact",
        **describe_file(path / MODEL),
        predicted=bundle.Predicted(0.5, bundle.Cost("latency_ms", 1.5), (0.5, 0.25, 0.25)),
        segments=tuple(segments),
    )
    write_manifest(path, manifest)
    return path


def describe_file(path):
    return {"sha256": file_sha256(path), "size_bytes": path.stat().st_size}


@pytest.fixture(scope="session")
def submodels(signatures, tmp_path_factory):
    """Files with one signature each."""
    path = tmp_path_factory.mktemp("submodels")
    for name, graph in signatures.items():
        (path / f"{name}.tflite").write_bytes(flatbuffer.write({"serve": graph}))
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """A bundle that a test may break."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(params=engines.ENGINES)
def run(folder, request):
    return Runner(Bundle.load(folder), engine=request.param)


@pytest.fixture
def invocations(monkeypatch):
    """The signatures that were run, in order."""
    calls = []
    for engine in (engines.InterpreterEngine, engines.CompiledEngine):

        def counting(self, signature, inputs, run=engine.run):
            calls.append(signature)
            return run(self, signature, inputs)

        monkeypatch.setattr(engine, "run", counting)
    return calls


def edit(folder, change):
    """Changes the manifest's JSON in place."""
    path = folder / bundle.MANIFEST
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


def confidences(result):
    return [step.confidence for step in result.trace]


# ---------------------------------------------------------------- execution


def test_input_dependent_equals_reference(net, thetas, run, images):
    left_at = []
    for image in images:
        masks, counts = net.everything(image)
        expected = next((k for k in range(2) if counts[k] >= round(thetas[k] * PIXELS)), 2)
        result = run.run(image)
        left_at.append(result.exit)
        assert result.exit == EXITS[expected]
        assert [step.exit for step in result.trace] == list(EXITS[: expected + 1])
        assert confidences(result) == [*(count / PIXELS for count in counts), None][: expected + 1]
        assert result.latency_ms == sum(step.latency_ms for step in result.trace) > 0
        np.testing.assert_array_equal(result.mask, masks[expected])
    assert set(left_at) == set(EXITS)
    counts = np.array([net.everything(image)[1] for image in images])
    assert all(counts[:, k].max() > counts[:, k].min() for k in range(2))


def test_theta_img_is_compared_as_a_whole_number_of_pixels(copy, net, images):
    counts = net.everything(images[5])[1]
    for surplus, leaves_at in ((0.0, "exit1"), (1e-12, "exit1"), (0.5, "final")):
        theta = (counts[0] + surplus) / PIXELS

        def change(value, theta=theta):
            value["segments"][0]["theta_img"], value["segments"][1]["theta_img"] = theta, 1.0

        edit(copy, change)
        assert Runner(Bundle.load(copy)).run(images[5]).exit == leaves_at


@pytest.mark.parametrize("index", range(3))
def test_budgeted_equals_reference_and_runs_one_signature(net, run, images, invocations, index):
    run.run(images[9], setting="budgeted", exit=EXITS[index])
    for image in images[:4]:
        invocations.clear()
        result = run.run(image, setting="budgeted", exit=EXITS[index])
        assert result.exit == EXITS[index]
        assert invocations == [alone_signature(EXITS[index])] and len(result.trace) == 1
        np.testing.assert_array_equal(result.mask, net.everything(image)[0][index])


def test_budgeted_without_exit_goes_to_the_last(run, images):
    assert run.run(images[0], setting="budgeted").exit == "final"


def test_input_dependent_stops_running_once_the_image_left(run, images, invocations):
    for image in images:
        invocations.clear()
        assert [segment_signature(step.exit) for step in run.run(image).trace] == invocations


def test_refine_yields_every_exit_and_runs_only_what_is_asked_for(net, run, images, invocations):
    masks = net.everything(images[3])[0]
    steps = run.refine(images[3])
    for index, expected in enumerate(masks):
        result = next(steps)
        assert invocations == [segment_signature(name) for name in EXITS[: index + 1]]
        assert (result.exit, len(result.trace)) == (EXITS[index], index + 1)
        np.testing.assert_array_equal(result.mask, expected)
    assert next(steps, None) is None


def test_refine_refuses_to_mix_two_images(run, images):
    steps = run.refine(images[0])
    next(steps)
    run.run(images[1])
    with pytest.raises(RuntimeError, match="another image"):
        next(steps)


def test_results_outlive_the_next_image(run, images):
    first = run.run(images[0], setting="budgeted")
    before = first.mask.copy()
    run.run(images[9], setting="budgeted")
    np.testing.assert_array_equal(first.mask, before)


def resized(image, width, height):
    across = Image.fromarray(image).resize((width, image.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(across.resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("size", [(96, 192), (48, 80), (17, 200)])
def test_image_of_another_size(net, run, size):
    image = np.random.default_rng(1).integers(0, 4, (*size, 3), np.uint8)
    small = resized(image, WIDTH, HEIGHT)
    mask = net.everything(small)[0][2]
    # The network's pixel that the centre of an output pixel falls into.
    rows = [int(Fraction(2 * row + 1, 2) * HEIGHT / size[0]) for row in range(size[0])]
    columns = [int(Fraction(2 * column + 1, 2) * WIDTH / size[1]) for column in range(size[1])]
    result = run.run(image, setting="budgeted")
    assert result.mask.dtype == np.uint8
    np.testing.assert_array_equal(result.mask, mask[np.ix_(rows, columns)])
    if size == (96, 192):
        np.testing.assert_array_equal(result.mask, np.kron(mask, np.ones((3, 3), np.uint8)))


@pytest.mark.parametrize("size", [(96, 96), (20, 300), (300, 20)])
def test_letterboxed_image_keeps_its_aspect_ratio(net, copy, size):
    edit(copy, lambda value: value["input"].update(resize="letterbox"))
    image = np.random.default_rng(1).integers(0, 4, (*size, 3), np.uint8)
    scale = min(HEIGHT / size[0], WIDTH / size[1])
    height, width = round(size[0] * scale), round(size[1] * scale)
    top, left = (HEIGHT - height) // 2, (WIDTH - width) // 2
    boxed = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    inside = np.s_[top : top + height, left : left + width]
    boxed[inside] = resized(image, width, height)
    mask = net.everything(boxed)[0][2][inside]
    run = Runner(Bundle.load(copy))
    run.run(np.zeros((HEIGHT, WIDTH, 3), np.uint8))  # leaves nothing behind in the margins
    result = run.run(image, setting="budgeted")
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, mask.shape, strict=True))
    np.testing.assert_array_equal(result.mask, mask[np.ix_(rows, columns)])


@pytest.fixture
def timed(folder, monkeypatch):
    """A runner under a clock that each run advances by the duration, in ms, of its segment."""
    clock, durations = [0], dict.fromkeys(EXITS, 10)
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(perf_counter_ns=lambda: clock[0]))
    run = Runner(Bundle.load(folder), engine=engines.INTERPRETER)
    original = run._engine.run

    def advancing(signature, inputs):
        clock[0] += int(durations[signature.partition(".")[2]] * 1e6)
        return original(signature, inputs)

    monkeypatch.setattr(run._engine, "run", advancing)
    run._fastest_ms = {segment_signature(name): 10.0 for name in EXITS}
    return run, durations


@pytest.mark.parametrize(("deadline_ms", "exit", "executed"), [(1, "exit1", 1), (19.9, "exit1", 1), (20, "exit2", 2), (30, "final", 3)])
def test_anytime_gives_the_latest_result_in_time(timed, net, images, deadline_ms, exit, executed):
    result = timed[0].run(images[2], setting="anytime", deadline_ms=deadline_ms)
    assert (result.exit, len(result.trace), result.latency_ms) == (exit, executed, 10 * executed)
    np.testing.assert_array_equal(result.mask, net.everything(images[2])[0][executed - 1])


def test_time_counts_until_a_result_can_be_read_as_a_gpu_works_on_behind_its_call(folder, monkeypatch, images):
    clock, at_work = [0], [0]
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(perf_counter_ns=lambda: clock[0]))
    run = Runner(Bundle.load(folder), engine=engines.INTERPRETER)
    called, read = run._engine.run, run._engine.get

    def returning_at_once(signature, inputs):
        at_work[0] = 10_000_000
        return called(signature, inputs)

    def waiting(*value):
        clock[0] += at_work[0]
        at_work[0] = 0
        return read(*value)

    monkeypatch.setattr(run._engine, "run", returning_at_once)
    monkeypatch.setattr(run._engine, "get", waiting)
    for options, steps in (({"setting": "anytime", "deadline_ms": 1000}, len(EXITS)), ({"setting": "budgeted"}, 1)):
        result = run.run(images[2], **options)
        assert [step.latency_ms for step in result.trace] == [10] * steps
        assert result.latency_ms == 10 * steps


def test_anytime_drops_a_result_that_turned_out_late(timed, net, images):
    run, durations = timed
    durations["final"] = 30
    result = run.run(images[2], setting="anytime", deadline_ms=40)
    assert (result.exit, [step.latency_ms for step in result.trace]) == ("exit2", [10, 10, 30])
    np.testing.assert_array_equal(result.mask, net.everything(images[2])[0][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"setting": "fast"}, "setting: must be one of input-dependent, budgeted, anytime, got 'fast'"),
        ({"exit": "exit1"}, "exit: must be left out unless"),
        ({"setting": "budgeted", "exit": "exit9"}, "exit: must be one of exit1, exit2, final, got 'exit9'"),
        ({"setting": "anytime"}, "deadline_ms: must be positive"),
        ({"setting": "anytime", "deadline_ms": 0.0}, "deadline_ms: must be positive"),
        ({"deadline_ms": 5.0}, "deadline_ms: must be left out unless"),
        ({"latency_budget_ms": 5.0}, "latency_budget_ms: must be left out unless"),
        ({"setting": "budgeted", "exit": "exit1", "latency_budget_ms": 5.0}, "latency_budget_ms: must be left out where the exit is given"),
        ({"setting": "budgeted", "latency_budget_ms": 5.0}, "latency: must be with rows of this bundle's"),
    ],
)
def test_options_that_do_not_go_together(run, images, options, message):
    with pytest.raises(ValueError, match=message):
        run.run(images[0], **options)


@pytest.mark.parametrize(
    "image", [None, [[[0, 0, 0]]], np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)]
)
def test_wrong_image(run, image):
    with pytest.raises(ValueError, match=r"image: must be (a NumPy array, )?uint8 \[h, w, 3\], got"):
        run.run(image)


@pytest.mark.parametrize("threads", [0, 100_000])
def test_threads_that_no_system_has(folder, threads):
    with pytest.raises(ValueError, match=f"threads: must be between 1 and 256, got {threads}"):
        Runner(Bundle.load(folder), threads)


def test_a_runner_that_threads_share_gives_each_its_mask(run, images):
    alone = [run.run(image, "input-dependent") for image in images]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda image: run.run(image, "input-dependent"), images * 4))
    for result, expected in zip(together, alone * 4, strict=True):
        assert result.exit == expected.exit
        np.testing.assert_array_equal(result.mask, expected.mask)


@pytest.mark.parametrize("source", ["camera:-1", "camera:", "camera:x", "camera:99999"])
def test_cameras_have_numbers(source):
    with pytest.raises(ValueError, match=f"source: must be camera:NUMBER, the number of a camera from 0 on, got '{source}'"):
        open_sources([source])


def test_input_dependent_needs_thetas(copy, images):
    def change(value):
        value["setting"] = "anytime"
        value["segments"][1] |= {"theta_pix": None, "theta_img": None}

    edit(copy, change)
    with pytest.raises(ValueError, match="the bundle has no theta_img"):
        Runner(Bundle.load(copy)).run(images[0], setting="input-dependent")


def test_held_latency_lets_no_more_images_go_on_than_expected(copy, net, images):
    """Of images that no exit is sure of, as many go on as were expected to, and after surer ones not many more."""
    confident = [net.everything(image)[1][0] for image in images]
    unsure, sure = images[int(np.argmin(confident))], images[int(np.argmax(confident))]

    def change(value):
        value["segments"][0]["theta_img"], value["segments"][1]["theta_img"] = max(confident) / PIXELS, 1.0

    edit(copy, change)
    run, plain = (Runner(Bundle.load(copy), hold_latency=hold) for hold in (True, False))
    assert {plain.run(unsure).exit for _ in range(8)} == {"final"}
    left = np.array([EXITS.index(run.run(unsure).exit) for _ in range(40)])
    for depth, share in ((1, 0.5), (2, 0.25)):
        beyond = np.cumsum(left >= depth)
        np.testing.assert_array_equal(beyond, np.floor(share * np.arange(1, 41)))
    for _ in range(10):
        with pytest.raises(ValueError, match="image"):  # what is refused is no image that could have gone on
            run.run(unsure[..., 0])
    assert [run.run(unsure).exit for _ in range(2)] == ["exit1", "exit2"]
    assert {run.run(sure).exit for _ in range(300)} == {"exit1"}
    beyond = np.cumsum([run.run(unsure).exit != "exit1" for _ in range(200)])
    assert beyond[98] == 99 and beyond[-1] == int(0.5 * (100 + 199))  # what 100 images have left over, and no more


def test_held_latency_needs_something_to_hold(copy, images):
    run = Runner(Bundle.load(copy), hold_latency=True)
    for options in ({"setting": "anytime", "deadline_ms": 5.0}, {"setting": "budgeted"}):
        with pytest.raises(
            ValueError, match=f"hold_latency: must be left out unless the setting is input-dependent, got '{options['setting']}'"
        ):
            run.run(images[0], **options)
    edit(copy, lambda value: value.update(predicted=None))
    with pytest.raises(ValueError, match="hold_latency: must be left out, as the manifest holds no prediction"):
        Runner(Bundle.load(copy), hold_latency=True)


# ---------------------------------------------------------------- manifest and graphs


WITH_REGIONS = {"neighbours": "nearest", "grid": [3, 4], "budgets": [2, 6, 12], "dense": []}


def test_manifest_round_trip(folder):
    manifest = Bundle.load(folder).manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    for segment in manifest.segments:
        assert Segment.from_json(segment.to_json()) == segment
    no_search = dataclasses.replace(manifest, predicted=None)
    assert Manifest.from_json(json.loads(json.dumps(no_search.to_json()))) == no_search
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.tflite"]
    assert "regions" not in manifest.to_json()  # earlier runtimes refuse keys that they do not know
    with_regions = dataclasses.replace(manifest, regions=Regions("nearest", (3, 4), (2, 6, 12)))
    assert Manifest.from_json(json.loads(json.dumps(with_regions.to_json()))) == with_regions


@pytest.mark.parametrize(
    ("keys", "received", "message"),
    [
        (("format",), 2, r"manifest\.format: must be 1, got 2"),
        (("colour",), 1, r"manifest\.colour: unknown key"),
        (("segments", 1, "theta_imgs"), 0.5, r"segments\[1\]\.theta_imgs: unknown key, must be one of theta_img"),
        (("segments", 0, "alone_sha256"), "A" * 64, r"segments\[0\]\.sha256: must be 64"),
        (("segments", 0, "exit"), "../x", r"segments\[0\]\.exit: must be a name of letters"),
        (("sha256",), "A" * 64, r"sha256: must be 64"),
        (("size_bytes",), 0, r"size_bytes: must be positive"),
        (("precision",), "int4", r"precision: must be one of fp32, fp16, int8"),
        (("input", "resize"), "crop", r"resize: must be one of stretch, letterbox"),
        (("segments", 0, "macs"), 1.5, r"segments\[0\]\.macs: must be of type int"),
        (("segments", 0, "edge_aware"), 1, r"segments\[0\]\.edge_aware: must be of type bool"),
        (("segments", 0, "theta_img"), 1.5, r"segments\[0\]\.theta_img: must be in \[0, 1\]"),
        (("segments", 0, "theta_img"), float("nan"), r"segments\[0\]\.theta_img: must be a finite number"),
        (("segments", 0, "theta_img"), 10**400, r"segments\[0\]\.theta_img: must be a finite number"),
        (("segments", 0, "theta_pix"), None, r"segments\[0\]\.theta_img: must be given or null together"),
        (("segments", 1, "exit"), "exit1", r"segments\.exit: must be different"),
        (("segments",), [], r"segments: must be at least one"),
        (("setting",), "fast", r"setting: must be one of"),
        (("predicted", "miou"), 50.0, r"predicted\.miou: must be in \[0, 1\]"),
        (("predicted", "cost", "name"), "joules", r"predicted\.cost\.name: must be one of latency_ms, macs"),
        (("predicted", "exit_rates"), [0.5, 0.5], r"predicted\.exit_rates: must be 3 shares, one per segment"),
        (("predicted", "exit_rates"), [0.5, 0.5, 0.5], r"predicted\.exit_rates: must be shares that sum to 1"),
        (("palette", 2), [0, 0], r"palette\[2\]: must be a list of 3"),
        (("palette", 2), [0, 0, 256], r"palette\[2\]: must be three values in 0\.\.255"),
        (("classes",), ["sky"], r"palette: must be one colour for each of 1 classes, got 5"),
        (("input", "height"), 0, r"input\.height: must be positive"),
        (("created_by",), [], r"created_by: must be a JSON object"),
        (("regions",), WITH_REGIONS | {"cell": 2}, r"regions\.cell: unknown key"),
        (("regions",), WITH_REGIONS | {"neighbours": "none"}, r"regions\.neighbours: must be one of stale, nearest, zeros"),
        (("regions",), WITH_REGIONS | {"grid": [0, 4]}, r"regions\.grid: must be positive"),
        (("regions",), WITH_REGIONS | {"budgets": [4, 4, 12]}, r"regions\.budgets: must be positive, each larger"),
        (("regions",), WITH_REGIONS | {"budgets": [4]}, r"regions\.budgets: must be such that the last is all 12 cells"),
        (("regions",), WITH_REGIONS | {"grid": [33, 4], "budgets": [132]}, r"regions\.grid: must be of no more cells than 32 x 64 pixels"),
        (("regions",), WITH_REGIONS | {"dense": ["exit1"]}, r"regions\.dense: must be different ones of exit2, final, got \('exit1',\)"),
        (("regions",), WITH_REGIONS | {"dense": ["final", "final"]}, r"regions\.dense: must be different ones of exit2, final"),
    ],
)
def test_manifest_is_strict(copy, keys, received, message):
    value = json.loads((copy / bundle.MANIFEST).read_text())
    inner = value
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = received
    (copy / bundle.MANIFEST).write_text(json.dumps(value))
    with pytest.raises(ValueError, match=message) as raised:
        Bundle.load(copy)
    assert str(copy / bundle.MANIFEST) in str(raised.value)


def test_manifest_with_a_missing_key(copy):
    edit(copy, lambda value: value["segments"][2].pop("head"))
    with pytest.raises(ValueError, match=r"segments\[2\]: must be an object with the key 'head'"):
        Bundle.load(copy)


def test_a_manifest_that_is_not_utf8(copy):
    (copy / bundle.MANIFEST).write_bytes('{"classes": ["stra\u00dfe"]}'.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"^{copy / bundle.MANIFEST}: must be JSON in UTF-8, got byte 0xdf at 18$"):
        Bundle.load(copy)


def test_thetas_follow_the_setting(copy):
    edit(copy, lambda value: value["segments"][2].update(theta_pix=0.9, theta_img=0.5))
    with pytest.raises(ValueError, match=r"segments\[2\]\.theta_img: must be null in the last segment"):
        Bundle.load(copy)
    edit(copy, lambda value: value["segments"].pop())
    edit(copy, lambda value: value["segments"][0].update(theta_pix=None, theta_img=None))
    edit(copy, lambda value: value["segments"][1].update(theta_pix=None, theta_img=None))
    with pytest.raises(ValueError, match=r"segments\[0\]\.theta_img: must be given for input-dependent"):
        Bundle.load(copy)
    edit(copy, lambda value: value.update(setting="anytime", regions=WITH_REGIONS))
    with pytest.raises(ValueError, match=r"segments\[0\]\.theta_img: must be given with regions"):
        Bundle.load(copy)
    edit(copy, lambda value: value["segments"][0].update(theta_pix=0.9, theta_img=0.5))
    edit(copy, lambda value: value.update(predicted=None))
    assert Bundle.load(copy).manifest.regions.cells == 12
    edit(copy, lambda value: value.update(setting="budgeted"))
    with pytest.raises(ValueError, match="setting: must be input-dependent or anytime with regions"):
        Bundle.load(copy)
    edit(copy, lambda value: value["segments"].pop(0))
    edit(copy, lambda value: value.update(setting="anytime"))
    with pytest.raises(ValueError, match="exits: must be at least two with regions"):
        Bundle.load(copy)


def test_changed_or_missing_file(copy):
    path = copy / MODEL
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.tflite: sha256: must be"):
        Bundle.load(copy)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"model\.tflite: size: must be"):
        Bundle.load(copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.tflite: missing, described by manifest\.json beside it"):
        Bundle.load(copy)
    (copy / bundle.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: "):
        Bundle.load(copy)


def replace_model(folder, content):
    (folder / MODEL).write_bytes(content)
    edit(folder, lambda value: value.update(describe_file(folder / MODEL)))
    return Bundle.load(folder)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_budgeted_without_signatures_of_exits_alone(copy, signatures, net, images, engine):
    """Segments one after another give the same masks; latencies of exits alone are not theirs."""
    segments = {name: graph for name, graph in signatures.items() if name.startswith("segment.")}
    run = Runner(replace_model(copy, flatbuffer.write(segments)), engine=engine)
    for index, name in enumerate(EXITS):
        result = run.run(images[4], "budgeted", name)
        assert (result.exit, [step.exit for step in result.trace]) == (name, list(EXITS[: index + 1]))
        np.testing.assert_array_equal(result.mask, net.everything(images[4])[0][index])
    with pytest.raises(ValueError, match=r"latency_budget_ms: must be left out for a file without alone\.EXIT"):
        run.run(images[4], "budgeted", latency_budget_ms=5.0)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_signatures_that_do_not_fit_the_manifest(copy, signatures, engine):
    missing = {name: graph for name, graph in signatures.items() if name != "segment.exit2"}
    with pytest.raises(ValueError, match=r"signatures: must be with 'segment\.exit2', got"):
        Runner(replace_model(copy, flatbuffer.write(missing)), engine=engine)
    swapped = signatures | {"segment.exit1": signatures["alone.exit1"]}  # hands no feature over
    with pytest.raises(ValueError, match=r"segment\.exit2: input 'feature_1': must be one of"):
        Runner(replace_model(copy, flatbuffer.write(swapped)), engine=engine)
    undecided = signatures | {"segment.exit1": signatures["segment.exit1"].renamed({"mask": "mask", "feature_1": "feature_1"})}
    with pytest.raises(ValueError, match=r"segment\.exit1: output 'confident_pixels': must be"):
        Runner(replace_model(copy, flatbuffer.write(undecided)), engine=engine)


def few_classes(folder, net, images):
    """Takes the highest class of an image's last mask out of a manifest; returns that image and class."""
    image = max(images, key=lambda image: net.everything(image)[0][2].max())
    top = net.everything(image)[0][2].max()
    edit(folder, lambda value: value.update(classes=value["classes"][:top], palette=value["palette"][:top]))
    return image, top


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_a_mask_with_a_value_that_is_no_class(copy, net, images, engine):
    image, top = few_classes(copy, net, images)
    run = Runner(Bundle.load(copy), engine=engine)
    with pytest.raises(ValueError, match=rf"final: mask: must be of classes 0 to {top - 1}, got {top}"):
        run.run(image, "budgeted", "final")


@pytest.mark.parametrize("height", [HEIGHT * 2, 10**9])  # the latter takes no memory
@pytest.mark.parametrize("engine", engines.ENGINES)
def test_graphs_of_another_size(copy, engine, height):
    edit(copy, lambda value: value["input"].update(height=height))
    with pytest.raises(ValueError, match=r"segment\.exit1: input 'image': must be one of"):
        Runner(Bundle.load(copy), engine=engine)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_a_file_that_is_no_model(copy, engine):
    with pytest.raises(ValueError, match=r"model\.tflite: .* cannot load it"):
        Runner(replace_model(copy, b"x" * 100), engine=engine)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_a_tensor_without_name(copy, engine):
    """The runtime takes it for a valid file, and crashes as soon as it is asked for the name."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel((copy / MODEL).read_bytes(), 0))
    model.subgraphs[1].tensors[2].name = None
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    with pytest.raises(ValueError, match=r"model\.tflite: must be a model whose tensors have names, got 'none for number 2'"):
        Runner(replace_model(copy, bytes(builder.Output())), engine=engine)


# ---------------------------------------------------------------- latency.json


@pytest.fixture(scope="session")
def row(submodels):
    (row,) = benchmark.benchmark_files([submodels / "segment.exit1.tflite"], threads=1, warmup=1, runs=5, min_seconds=0.0, rounds=1)
    return row


def test_row_describes_the_file_and_the_runtime(submodels, row):
    path = submodels / "segment.exit1.tflite"
    assert (row.submodel, row.sha256, row.size_bytes) == ("segment.exit1", file_sha256(path), path.stat().st_size)
    assert (row.runtime, row.backend_requested, row.backend_obtained, row.threads, row.runs) == (
        engines.RUNTIME,
        "xnnpack",
        "xnnpack",
        1,
        5,
    )
    assert 0 < row.p50_ms <= row.p90_ms
    assert (row.drift, row.sustained_s) == (None, 0.0)
    assert all((row.device, row.soc, row.os, row.runtime_version))


def test_backend_is_read_from_the_graph(monkeypatch):
    interpreter = types.SimpleNamespace(_get_ops_details=lambda: [{"op_name": "CONV_2D"}])
    assert benchmark._backend(interpreter) == "cpu"
    assert benchmark._backend(types.SimpleNamespace()) == "unknown"


def test_files_are_measured_in_turns_until_runs_and_time_suffice(submodels, monkeypatch, capsys):
    files = [submodels / "segment.exit1.tflite", submodels / "segment.final.tflite"]
    invocations, invoke = [], engines.Interpreter.invoke

    def counting(interpreter):
        invocations.append(interpreter)
        invoke(interpreter)

    monkeypatch.setattr(engines.Interpreter, "invoke", counting)
    rows = benchmark.benchmark_files(files, warmup=2, runs=6, min_seconds=0.0, rounds=3, progress=True)
    lines = capsys.readouterr().out.splitlines()
    turns = [len(list(group)) for _, group in itertools.groupby(invocations, key=id)]
    assert turns == [4] * 6
    assert [row.runs for row in rows] == [6, 6] and all(row.drift > 0 for row in rows)
    assert [line.split()[:3] for line in lines] == [["round", f"{k}/3", path.stem] for k in (1, 2, 3) for path in files]
    assert lines[-1].endswith("eta_s=0")
    (row,) = benchmark.benchmark_files(files[:1], warmup=0, runs=1, min_seconds=0.02, rounds=2)
    assert row.mean_ms * row.runs >= 20


def test_equal_files_are_measured_once(submodels, tmp_path):
    twin = shutil.copy(submodels / "segment.exit1.tflite", tmp_path / "twin.tflite")
    rows = benchmark.benchmark_files([submodels / "segment.exit1.tflite", twin], runs=1, min_seconds=0.0, rounds=1)
    assert [row.submodel for row in rows] == ["segment.exit1"]


def test_what_another_process_measures_meanwhile_stays(submodels, tmp_path, monkeypatch):
    ours, theirs, real = submodels / "segment.exit1.tflite", submodels / "segment.exit2.tflite", benchmark.benchmark_files

    def files(paths, *arguments, **options):
        if paths == [ours]:
            benchmark.measure([theirs], tmp_path / "latency.json", runs=1, min_seconds=0.0, rounds=1)
        return real(paths, *arguments, **options)

    monkeypatch.setattr(benchmark, "benchmark_files", files)
    benchmark.measure([ours], tmp_path / "latency.json", runs=1, min_seconds=0.0, rounds=1)
    assert {row.submodel for row in benchmark.LatencyTable.load(tmp_path / "latency.json").rows} == {"segment.exit1", "segment.exit2"}


@pytest.mark.parametrize(
    ("argument", "value", "required"),
    [
        *((name, 0, "at least 1") for name in ("threads", "runs", "rounds")),
        ("threads", 100_000, "at most 256"),
        *(("min_seconds", value, "at least 0 and finite") for value in (float("inf"), float("nan"), -1.0)),
    ],
)
def test_benchmark_arguments(submodels, argument, value, required):
    with pytest.raises(ValueError, match=f"{argument}: must be {required}, got {value}"):
        benchmark.benchmark_files([submodels / "segment.exit1.tflite"], **{argument: value})


def test_a_file_with_several_signatures_is_refused(folder):
    with pytest.raises(ValueError, match=r"model\.tflite: signatures: must be a single one"):
        benchmark.benchmark_files([folder / MODEL], runs=1, min_seconds=0.0)


@pytest.mark.parametrize(
    ("recorded", "there", "backend", "warning"),
    [
        ("xnnpack", True, "cpu", ""),
        ("gpu", True, "gpu", ""),
        ("gpu", False, "cpu", "on the CPU, as the backend gpu that the search chose is not there: no adapter"),
        ("npu", True, "cpu", "on the CPU, as the backend npu that the search chose is not there: it is none of xnnpack, cpu, gpu"),
    ],
)
def test_the_backend_that_the_search_chose_is_the_default(copy, images, monkeypatch, capsys, recorded, there, backend, warning):
    real, asked = engines.CompiledEngine, []

    def engine(path, threads, backend):
        asked.append(backend)
        if backend == "gpu" and not there:
            raise ValueError("no adapter")
        return real(path, threads)

    monkeypatch.setattr(engines, "CompiledEngine", engine)
    edit(copy, lambda value: value["predicted"].update(backend=recorded))
    runner = Runner(Bundle.load(copy))
    assert (runner.backend, asked[-1]) == (backend, backend) and runner.run(images[0]).exit in EXITS
    assert warning in (err := capsys.readouterr().err) and bool(err) == bool(warning)
    assert Runner(Bundle.load(copy), backend="cpu").backend == "cpu" and not capsys.readouterr().err
    if not there:
        with pytest.raises(ValueError, match="no adapter"):
            Runner(Bundle.load(copy), backend="gpu")


def test_the_exit_within_a_latency_budget(folder, row):
    manifest = Bundle.load(folder).manifest
    rows = [
        dataclasses.replace(row, sha256=segment.alone_sha256, p50_ms=milliseconds, p90_ms=9.0)
        for segment, milliseconds in zip(manifest.segments, (2.0, 6.0, 4.0), strict=True)
    ]
    assert [exit_within(manifest, rows, budget, 1) for budget in (2.0, 3.9, 4.0, 6.0)] == ["exit1", "exit1", "final", "final"]
    best = dataclasses.replace(manifest.segments[1], miou=0.6)
    manifest = dataclasses.replace(manifest, segments=(manifest.segments[0], best, manifest.segments[2]))
    assert [exit_within(manifest, rows, budget, 1) for budget in (5.9, 6.0)] == ["final", "exit2"]
    with pytest.raises(ValueError, match=r"latency_budget_ms: must be at least 2 for exit1, got 1\.9"):
        exit_within(manifest, rows, 1.9, 1)
    with pytest.raises(ValueError, match=r"at 2 threads on this device, got \"none of \['exit1', 'exit2', 'final'\]\""):
        exit_within(manifest, rows, 9.0, 2)
    on_gpu = [dataclasses.replace(each, backend_requested="gpu", p50_ms=1.0) for each in rows]
    assert [exit_within(manifest, [*rows, *on_gpu], 3.9, 1, backend) for backend in ("cpu", "gpu")] == ["exit1", "exit2"]
    others = [dataclasses.replace(each, device="another", p50_ms=1.0) for each in rows]
    assert exit_within(manifest, [*others, *rows], 3.9, 1) == "exit1"  # of two devices, this one


def test_latency_table_round_trip_and_merge(row, tmp_path):
    other_threads = dataclasses.replace(row, threads=2)
    other_device = dataclasses.replace(row, device="phone", temperature_c=31.5)
    table = benchmark.LatencyTable({"android_bench": "0.1.0"}, (row, other_threads, other_device))
    path = tmp_path / "latency.json"
    write_json(path, table.to_json())
    assert bundle.read_json(path, benchmark.LatencyTable.from_json) == table
    faster = dataclasses.replace(row, p50_ms=row.p50_ms / 2, runtime="other")
    merged = table.merged([faster])
    assert merged.rows == (faster, other_threads, other_device)
    assert set(merged.created_by) == {"mess_runtime", "python", "numpy", "git_commit"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.update(format=0), r"latency\.format: must be 1, got 0"),
        (lambda value: value.update(row=[]), r"latency\.row: unknown key, must be one of rows"),
        (lambda value: value["rows"][0].update(p99_ms=1.0), r"rows\[0\]\.p99_ms: unknown key"),
        (lambda value: value["rows"][0].pop("soc"), r"rows\[0\]: must be an object with the key 'soc'"),
        (lambda value: value["rows"][0].update(threads=1.0), r"rows\[0\]\.threads: must be of type int"),
        (lambda value: value["rows"][0].update(p50_ms=0.0), r"rows\[0\]\.p50_ms: must be positive"),
        (lambda value: value["rows"][0].update(p50_ms=1e9), r"rows\[0\]\.p50_ms: must be at most p90_ms"),
        (lambda value: value["rows"][0].update(drift=0.0), r"rows\[0\]\.drift: must be positive"),
        (lambda value: value["rows"][0].update(sustained_s=-1.0), r"rows\[0\]\.sustained_s: must be at least 0"),
        (lambda value: value["rows"][0].update(temperature_c="warm"), r"rows\[0\]\.temperature_c: must be a finite number"),
        (lambda value: value["rows"].append(value["rows"][0]), r"latency\.rows: must be different"),
    ],
)
def test_latency_is_strict(row, change, message):
    value = json.loads(json.dumps(benchmark.LatencyTable({"by": "hand"}, (row,)).to_json()))
    change(value)
    with pytest.raises(ValueError, match=message):
        benchmark.LatencyTable.from_json(value)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "latency.json"
    write_json(path, {"a": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, fail)
    with pytest.raises(ValueError):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- command line


def program(*arguments, code=0):
    """Runs the program in its own process and returns its lines on stdout and stderr."""
    environment = os.environ | {"PYTHONPATH": str(Path(bundle.__file__).parents[1])}
    words = [sys.executable, "-m", "mess_runtime", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines(), [line for line in done.stderr.splitlines() if line.startswith("mess_runtime")]


@pytest.fixture
def command(monkeypatch, capsys):
    """Likewise in this process, which has loaded everything."""

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["mess_runtime", *map(str, arguments)])
        capsys.readouterr()
        try:
            returned = main()
        except SystemExit as end:
            returned = end.code
        assert returned == code
        out, err = capsys.readouterr()
        return out.splitlines(), err.splitlines()

    return run


def test_run_writes_masks_and_goes_on_after_a_broken_image(folder, net, images, tmp_path):
    sources, output = tmp_path / "images", tmp_path / "masks"
    sources.mkdir()
    for index in (0, 5):
        Image.fromarray(images[index]).save(sources / f"{index}.png")
    (sources / "1.jpg").write_bytes(b"not an image")
    (sources / "notes.txt").write_text("left alone")
    lines, errors = program("run", folder, sources, f"--output={output}", "--setting=budgeted", "--exit=exit2", code=1)
    assert "1.jpg: not a readable image" in errors[0]
    assert errors[1:] == ["mess_runtime: 1 of 3 sources could not be read: a line above for each"]
    assert lines[-1] == str(output)
    records = [json.loads(line) for line in lines[:-1]]
    assert [record["image"] for record in records] == [str(sources / "0.png"), str(sources / "5.png")]
    for record, index in zip(records, (0, 5), strict=True):
        masks, counts = net.everything(images[index])
        assert (record["exit"], record["confidence"]) == ("exit2", counts[1] / PIXELS)
        assert [step["exit"] for step in record["segments"]] == ["exit2"]
        assert record["latency_ms"] == pytest.approx(sum(step["latency_ms"] for step in record["segments"]))
        with Image.open(output / f"{index}.png") as mask:
            np.testing.assert_array_equal(np.asarray(mask), masks[1])
            np.testing.assert_array_equal(np.asarray(mask.convert("RGB")), np.array(PALETTE)[masks[1]])
    assert sorted(path.name for path in output.iterdir()) == ["0.png", "5.png"]


def test_run_says_where_a_deadline_was_missed(command, folder, images, tmp_path):
    for index in (0, 1):
        Image.fromarray(images[index]).save(tmp_path / f"{index}.png")
    for deadline, missed in (("1e-6", True), ("1e6", False)):
        words = (tmp_path / "0.png", tmp_path / "1.png", f"--output={tmp_path / 'masks'}", "--setting=anytime", f"--deadline_ms={deadline}")
        lines, errors = command("run", folder, *words)
        assert [json.loads(line)["deadline_missed"] for line in lines[:-1]] == [missed, missed]
        assert errors == ["mess_runtime: 2 of 2 masks came after the deadline of 1e-06 ms"] * missed
    lines, _ = command("run", folder, tmp_path / "0.png", f"--output={tmp_path / 'masks'}")
    assert "deadline_missed" not in json.loads(lines[0])


@pytest.mark.parametrize(
    ("text", "got"),
    [(None, "No such file or directory"), ("{", "must be JSON, got Expecting"), ('{"format": 9}', "latency.format: must be 1")],
)
def test_a_latency_file_that_is_none_is_named_with_its_flag(command, folder, tmp_path, text, got):
    table = tmp_path / "latency.json"
    if text is not None:
        table.write_text(text)
    words = ("x.png", f"--output={tmp_path}", "--setting=budgeted", f"--latency={table}", "--latency_budget_ms=5")
    _, (error,) = command("run", folder, *words, code=1)
    made = "a latency.json, which `python -m mess_runtime benchmark` or `android_bench run` makes"
    assert error.startswith(f"mess_runtime: --latency: must be {made}, got {table}: {got}")
    if text is not None:
        _, (error,) = command("benchmark", folder / "model.tflite", f"--output={table}", code=1)
        assert error.startswith(f"mess_runtime: --output: must be {made}, got {table}: {got}")


def test_run_never_loses_a_file(command, folder, images, tmp_path):
    for name in ("a.png", "a.bmp"):
        Image.fromarray(images[0]).save(tmp_path / name)
    before = (tmp_path / "a.png").read_bytes()
    _, errors = command("run", folder, tmp_path / "a.png", f"--output={tmp_path}", code=1)
    assert len(errors) == 1 and "masks do not replace images" in errors[0]
    _, errors = command("run", folder, tmp_path, f"--output={tmp_path / 'masks'}", code=1)
    assert len(errors) == 1 and "another image's mask is called" in errors[0]
    assert (tmp_path / "a.png").read_bytes() == before


@pytest.mark.parametrize(
    ("names", "overlay", "message"),
    [
        (("a.png", "b/a.jpg"), False, "a.png already"),
        (("a.png", "b/A.png"), False, "A.png already"),  # one file where names are compared without their case
        (("a.png", "a.overlay.png"), True, "a.overlay.png already"),
        (("a.png", "a.overlay.png"), False, None),
        (("clip.000001.png", "clip.mp4"), False, "clip.000001.png already"),
        (("clip.000001.overlay.png", "clip.mp4"), True, "clip.000001.overlay.png already"),
        (("clip.1.png", "clip.mp4"), True, None),
        (("clip.avi", "clip.mp4"), False, "clip.NUMBER.png already"),
        (("camera0.000007.png", "camera:0"), False, "camera0.000007.png already"),
        (("out/clip.000003.png", "clip.mp4"), False, "already"),
    ],
)
def test_no_mask_takes_the_place_of_another(tmp_path, names, overlay, message):
    sources = [Path(name) if name.startswith("camera:") else tmp_path / name for name in names]
    if message is None:
        Writer(tmp_path / "out", PALETTE, overlay, sources)
    else:
        with pytest.raises(ValueError, match=re.escape(message)):
            Writer(tmp_path / "out", PALETTE, overlay, sources)


def test_links_that_lead_to_themselves_are_named(command, folder, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "loop.png").symlink_to("loop.png")
    _, errors = command("run", folder, tmp_path / "images", f"--output={tmp_path / 'masks'}", code=1)
    assert len(errors) == 1 and "loop.png: not a readable image" in errors[0]


def test_benchmark_measures_folders_and_merges(command, submodels, tmp_path):
    output = tmp_path / "latency.json"
    options = [f"--output={output}", "--runs=2", "--min_seconds=0", "--rounds=1"]
    lines, _ = command("benchmark", submodels, *options)
    assert lines[-1] == str(output) and len(lines) == 7
    command("benchmark", submodels / "segment.final.tflite", "--threads=2", *options)
    rows = bundle.read_json(output, benchmark.LatencyTable.from_json).rows
    names = sorted(path.stem for path in submodels.iterdir())
    assert [(row.submodel, row.threads) for row in rows] == [*((name, 1) for name in names), ("segment.final", 2)]


NO_GPU = "mess_runtime: --backend: must be cpu on this machine, got 'gpu', which needs ai-edge-litert 2.1.6 or newer and a GPU"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--deadline_ms=5"], "deadline_ms: must be left out unless the setting is anytime, got 5.0"),
        (["--setting=anytime"], "deadline_ms: must be positive milliseconds for anytime, got None"),
        (["--setting=budgeted", "--exit=exit9"], "exit: must be one of exit1, exit2, final, got 'exit9'"),
        (["--setting=budgeted", "--hold_latency"], "hold_latency: must be left out unless the setting is input-dependent"),
        (["--backend=gpu"], NO_GPU),
        ([], "none.png"),
    ],
)
def test_a_run_that_fails_leaves_no_folder_and_names_none(command, folder, tmp_path, monkeypatch, options, message):
    if "--backend=gpu" in options:

        def absent(*_, **__):
            raise RuntimeError("of LiteRT")

        monkeypatch.setattr(engines.CompiledModel, "from_file", absent)
    if options:
        monkeypatch.setattr("mess_runtime.frames.read_photo", lambda path: pytest.fail("an image was read"))
    lines, errors = command("run", folder, tmp_path / "none.png", f"--output={tmp_path / 'masks'}", *options, code=1)
    assert lines == [] and message in errors[-1] and not (tmp_path / "masks").exists()


def test_run_chooses_the_exit_within_a_budget(command, folder, submodels, images, tmp_path):
    command("benchmark", submodels, f"--output={tmp_path / 'latency.json'}", "--runs=2", "--min_seconds=0", "--rounds=1")
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    options = [f"--output={tmp_path / 'masks'}", "--setting=budgeted", f"--latency={tmp_path / 'latency.json'}"]
    lines, _ = command("run", folder, tmp_path / "a.png", "--latency_budget_ms=1000", *options)
    assert json.loads(lines[0])["exit"] == "final"
    _, errors = command("run", folder, tmp_path / "a.png", "--latency_budget_ms=1e-9", *options, code=1)
    assert len(errors) == 1 and "latency_budget_ms: must be at least" in errors[0]


def test_run_writes_overlays(command, folder, net, images, tmp_path):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    command("run", folder, tmp_path / "a.png", f"--output={tmp_path / 'masks'}", "--overlay", "--setting=budgeted")
    colours = np.array(PALETTE, np.float64)[net.everything(images[0])[0][2]]
    with Image.open(tmp_path / "masks" / "a.overlay.png") as overlay:
        np.testing.assert_allclose(np.asarray(overlay), (images[0] + colours) / 2, atol=1)


def test_run_takes_videos(command, folder, tmp_path):
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    path = str(tmp_path / "clip.avi")
    video = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 10, (WIDTH, HEIGHT))
    for value in (0, 100, 200):
        video.write(np.full((HEIGHT, WIDTH, 3), value, np.uint8))
    video.release()
    lines, _ = command("run", folder, path, f"--output={tmp_path / 'masks'}", "--frames=2")
    assert [json.loads(line)["mask"] for line in lines[:-1]] == ["clip.000001.png", "clip.000002.png"]
    assert sorted(each.name for each in (tmp_path / "masks").iterdir()) == ["clip.000001.png", "clip.000002.png"]


def test_run_takes_cameras(command, folder, net, images, tmp_path, monkeypatch):
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    frames = iter(images[:3])

    class Camera:
        def __init__(self, number):
            assert number == 7

        def read(self):
            return True, np.ascontiguousarray(next(frames)[..., ::-1])  # OpenCV's order is BGR

        def release(self):
            released.append(True)

    released = []
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    options = [f"--output={tmp_path / 'masks'}", "--frames=2", "--setting=budgeted"]
    lines, _ = command("run", folder, "camera:7", *options)
    assert [json.loads(line)["mask"] for line in lines[:-1]] == ["camera7.000001.png", "camera7.000002.png"]
    for image, line in zip(images[:2], lines[:-1], strict=True):
        with Image.open(tmp_path / "masks" / json.loads(line)["mask"]) as mask:
            np.testing.assert_array_equal(np.asarray(mask), net.everything(image)[0][2])
    assert released


def test_inspect_prints_the_segments(command, folder, thetas):
    lines, _ = command("inspect", folder)
    rows = [line.split() for line in lines[-4:]]
    assert rows[0] == ["exit", "head", "MMACs", "alone", "mIoU", "leave", "here", "theta_pix", "theta_img", "edge_aware"]
    assert [row[0] for row in rows[1:]] == list(EXITS)
    assert rows[1][5:] == ["50.0%", "0.9", f"{thetas[0]:g}", "yes"] and rows[3][5:] == ["25.0%", "-", "-", "no"]
    assert "setting    input-dependent" in lines
    assert f"input      {HEIGHT} x {WIDTH} pixels, float32, stretch" in lines
    expected = "predicted  mIoU 50.00 %, mean latency_ms 1.5: by the search, of the device and the day that its latencies were measured"
    assert expected in lines


BUNDLE_MADE = "the folder that `python -m mess_tf.export_tflite --deployment=FILE` or the pipeline makes"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], f"nowhere: must be a bundle, {BUNDLE_MADE}, got no folder"),
        (["inspect", "."], f".: must be a bundle, {BUNDLE_MADE}, got a folder without manifest.json"),
        (["verify", ".", "--backend=cpu"], f".: must be a bundle, {BUNDLE_MADE}, got a folder without manifest.json"),
        (["verify", "nowhere", "--backend=cpu", "--record"], f"nowhere: must be a bundle, {BUNDLE_MADE}, got no folder"),
        (["verify", "nowhere.tflite", "--backend=cpu"], "nowhere.tflite"),
        (["verify", "nowhere", "--backend=npu"], "--backend: must be one of 'cpu', 'gpu', got 'npu'"),
        (["verify", "nowhere", "--bakend=cpu"], "--bakend: must be a flag of this command, nearest --backend"),
        (["run", "nowhere", "x.png", "--output=out"], f"nowhere: must be a bundle, {BUNDLE_MADE}, got no folder"),
        (["benchmark", "nowhere.tflite", "--output=out.json"], "nowhere.tflite"),
        (["benchmark", ".", "--output=out.json"], "must hold files with the suffix .tflite, got none"),
        (["run", "nowhere"], "sources, --output: must be given, got nothing"),
        (["run", "a", "b", "--outptu=x"], "--outptu: must be a flag of this command, nearest --output, "),
        (["run", "a", "b", "--output=/proc/x"], "--output: must be a folder that can be written to, got '/proc/x'"),
        (["run", "a", "b", "--output=x.json"], "--output: must be a folder that can be written to, not a .json file, got 'x.json'"),
        (["benchmark", "a", "--output=/proc/x.json"], "--output: must be a file in a folder that exists and can be written to, got"),
        (["fly"], "command: must be one of 'run', 'verify', 'benchmark', 'inspect', got 'fly'"),
    ],
)
def test_user_errors_are_one_line(command, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    lines, errors = command(*arguments, code=2 if arguments[0] == "verify" else 1)  # where 1 says that a file differs
    assert lines == []
    assert len(errors) == 1 and message in errors[0]
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- other runtimes and languages


@pytest.mark.parametrize("name", ["ai-edge-litert", "tflite-runtime", "tensorflow"])
def test_every_runtime_gives_the_same_masks(folder, net, images, thetas, tmp_path, name):
    python = Path(__file__).parents[1] / ".venv-runtimes" / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"needs {python}, an environment with nothing but {name} and Pillow, which .ci/run makes")
    for index in range(6):
        Image.fromarray(images[index]).save(tmp_path / f"{index}.png")
    code = "import sys; from mess_runtime import __main__, engines; print(engines.RUNTIME); sys.exit(__main__.main())"
    environment = os.environ | {"PYTHONPATH": str(Path(bundle.__file__).parents[1])}
    words = [str(python), "-c", code, "run", str(folder), str(tmp_path), f"--output={tmp_path / 'masks'}"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == name
    records = [json.loads(line) for line in done.stdout.splitlines()[1:-1]]
    for index, record in enumerate(records):
        masks, counts = net.everything(images[index])
        left = next((k for k in range(2) if counts[k] >= round(thetas[k] * PIXELS)), 2)
        assert record["exit"] == EXITS[left]
        with Image.open(tmp_path / "masks" / f"{index}.png") as mask:
            np.testing.assert_array_equal(np.asarray(mask), masks[left])
    assert len(records) == 6


def run_cpp(runner, backend, model, thetas, images, dtype, folder, environment=None):
    """By image: the words of its lines, and its mask. All are run by one process."""
    exits = ",".join([*(f"{name}={math.ceil(theta * PIXELS - 1e-9)}" for name, theta in zip(EXITS, thetas, strict=False)), EXITS[-1]])
    files = [(folder / f"{index}.rgb", folder / f"{index}.raw") for index in range(len(images))]
    for (pixels, _), image in zip(files, images, strict=True):
        image.astype(dtype).tofile(pixels)
    words = [str(word) for word in (runner, backend, model, exits, *itertools.chain(*files))]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "not on a GPU" not in done.stderr
    lines = iter([line.split() for line in done.stdout.splitlines() if not line.startswith("INFO: ")])  # LiteRT's, of GPUs
    for _, mask in files:
        seen = [next(lines)]
        while seen[-1][-1] != "leaves":
            seen.append(next(lines))
        yield seen, np.fromfile(mask, np.uint8).reshape(HEIGHT, WIDTH)
    assert next(lines, None) is None


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_cpp_runner_decides_like_the_python_runner(cpp_runner, folder, images, thetas, tmp_path, backend):
    driver = Path("/usr/lib/chromium/vk_swiftshader_icd.json")
    if backend == "gpu" and not (driver.exists() and ctypes.util.find_library("vulkan")):
        pytest.skip(f"needs a Vulkan driver: {driver} of the Debian package chromium, and libvulkan1")
    run, seen = Runner(Bundle.load(folder)), set()
    environment = os.environ | {"VK_ICD_FILENAMES": str(driver)}
    images = images[:8] if backend == "cpu" else images[:4]
    made = run_cpp(cpp_runner, backend, folder / MODEL, thetas, images, np.float32, tmp_path, environment)
    for image, (lines, mask) in zip(images, made, strict=True):
        expected = run.run(image)
        assert [line[0] for line in lines] == [step.exit for step in expected.trace]
        counts = [int(line[4]) / PIXELS if len(line) > 4 and line[3] == "confident_pixels" else None for line in lines]
        assert counts == confidences(expected)
        np.testing.assert_array_equal(mask, expected.mask)
        seen.add(expected.exit)
    assert len(seen) > 1


def test_cpp_runner_names_what_is_wrong(cpp_runner, folder, net, images, copy, tmp_path):
    images[0].tofile(tmp_path / "uint8.rgb")
    model, usage = folder / MODEL, "usage: mess_runner cpu|gpu model.tflite"
    cut, few, alone = (shutil.copytree(copy, tmp_path / name) / MODEL for name in ("cut", "few", "alone"))
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    image, top = few_classes(few.parent, net, images)
    image.astype(np.float32).tofile(tmp_path / "float32.rgb")
    (alone.parent / bundle.MANIFEST).unlink()
    for words, message in (
        (["cpu", "nowhere.tflite", "final", "uint8.rgb", "o"], "loading nowhere.tflite failed"),
        (["cpu", model, "exit1=3,final", "uint8.rgb", "o"], "segment.final reads feature_2, which no segment before it makes"),
        (
            ["cpu", model, "exit1=3,exit2=3,final", "uint8.rgb", "o"],
            f"the image must have {HEIGHT * WIDTH * 12} bytes, got {HEIGHT * WIDTH * 3}",
        ),
        (["cpu", model, "exit9", "uint8.rgb", "o"], "the model has no signature segment.exit9"),
        (["cpu", model, "exit1=3", "uint8.rgb", "o"], "the last exit must be given without a number"),
        (["cpu", model, "exit1,final", "uint8.rgb", "o"], "only the last exit has no number"),
        (["cpu", model, "exit1=abc,final", "uint8.rgb", "o"], "exit1 must be given a whole number of pixels, got exit1=abc"),
        (["cpu", model, "exit1=0.9,final", "uint8.rgb", "o"], "exit1 must be given a whole number of pixels, got exit1=0.9"),
        (["cpu", model, "exit1=,final", "uint8.rgb", "o"], "exit1 must be given a whole number of pixels, got exit1="),
        (["cpu", model, "exit1=0.9x,final@12", "uint8.rgb", "o"], "exit1 must be given a share of pixels, got exit1=0.9x"),
        (
            ["cpu", model, "exit1=0.9,final@3,12x", "uint8.rgb", "o"],
            "budgets must be whole numbers of cells, got 12x in exit1=0.9,final@3,12x",
        ),
        (
            ["cpu", cut, "final", "uint8.rgb", "o"],
            f"model.tflite must have {len(content)} bytes, as manifest.json says, got {len(content) // 2}",
        ),
        (["cpu", alone, "final", "uint8.rgb", "o"], "manifest.json must lie beside the model"),
        (
            ["cpu", few, f"exit1={PIXELS + 1},exit2={PIXELS + 1},final", "float32.rgb", "o"],
            f"the mask of final must be of classes 0 to {top - 1}, got {top}",
        ),
        (["npu", model, "final", "uint8.rgb", "o"], usage),
        (["cpu", model, "final", "uint8.rgb"], usage),
    ):
        done = subprocess.run([str(word) for word in (cpp_runner, *words)], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1 and message in done.stderr, (words, done)
    assert not (tmp_path / "o").exists()


def test_importing_the_device_side_needs_no_tensorflow():
    code = (
        "import sys, mess_runtime.__main__, mess_runtime.benchmark, mess_runtime.runner;"
        "print([name for name in ('tensorflow', 'keras', 'mess_tf') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(bundle.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not engines.SHARED_WEIGHTS, reason="weights are shared on Linux only")
def test_signatures_keep_one_copy_of_their_packed_weights(tmp_path):
    """Of four signatures with the same weights: those of the file and one packed copy, where each would pack its own otherwise."""
    mib, channels = 2**20, 2048
    weights = tf.Variable(np.random.default_rng(0).normal(size=(1, 1, channels, channels)).astype(np.float32))

    def signature(side):
        shape = {f"image{side}": (1, side, side, channels)}
        return convert(lambda **image: {"features": tf.nn.conv2d(*image.values(), weights, 1, "SAME")}, shape)

    path = tmp_path / MODEL
    path.write_bytes(flatbuffer.write({f"side{side}": signature(side) for side in range(1, 5)}))
    code = """
import sys
import numpy as np
from mess_runtime import engines

def kept():  # beside the file itself
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem"))

before = kept()
engine = engines.open_engine(sys.argv[1], 1, "compiled")
for name in engine.inputs:
    engine.prepare(name)
    images = {key: np.ones(tensor.shape, tensor.dtype) for key, tensor in engine.inputs[name].items()}
    engine.run(name, {key: engine.put(name, key, image) for key, image in images.items()})
print(kept() - before)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(bundle.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=environment, check=True)
    kept = int(done.stdout.split()[-1]) / 1024
    packed = weights.numpy().nbytes / mib
    assert kept < 3 * packed, f"{kept:.0f} MiB for {packed:.0f} MiB of weights"
