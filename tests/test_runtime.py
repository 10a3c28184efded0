"""The device side against a TensorFlow reference, on three small segments whose arithmetic is exact in float32."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import types
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from mess_runtime import benchmark, bundle, runner
from mess_runtime.bundle import Bundle, Manifest, Segment, file_sha256, write_json, write_manifest
from mess_runtime.runner import Runner

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


def convert(net, function, folder, **shapes):
    specs = {name: tf.TensorSpec(shape, tf.float32, name) for name, shape in shapes.items()}
    concrete = tf.function(function).get_concrete_function(**specs)
    tf.saved_model.save(net, str(folder), signatures={bundle.SIGNATURE: concrete})
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder), signature_keys=[bundle.SIGNATURE])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    return converter.convert()


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


@pytest.fixture(scope="session")
def folder(net, thetas, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle")
    feature_1, feature_2 = (1, HEIGHT // 2, WIDTH // 2, 4), (1, HEIGHT // 4, WIDTH // 4, 4)
    models = [
        convert(net, net.segment1, path / "saved1", image=(1, HEIGHT, WIDTH, 3)),
        convert(net, net.segment2, path / "saved2", feature_1=feature_1),
        convert(net, net.segment3, path / "saved3", feature_1=feature_1, feature_2=feature_2),
    ]
    segments = []
    for name, model, theta in zip(EXITS, models, (*thetas, None), strict=True):
        file = path / f"segment-{name}.tflite"
        file.write_bytes(model)
        pix = None if theta is None else 0.9
        segments.append(Segment(name, "fcn-r1-b0", file.name, file_sha256(file), len(model), 1000, pix, theta, theta is not None))
        shutil.rmtree(path / f"saved{len(segments)}")
    manifest = Manifest(
        created_by=bundle.CreatedBy("0.1.0", tf.__version__, "unknown"),
        input=bundle.InputSpec(HEIGHT, WIDTH),
        classes=("sky", "road", "tree", "car", "sign"),
        palette=PALETTE,
        setting="input-dependent",
        predicted=bundle.Predicted(0.5, bundle.Cost("latency_ms", 1.5)),
        segments=tuple(segments),
    )
    write_manifest(path, manifest)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """A bundle that a test may break."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def run(folder):
    return Runner(Bundle.load(folder))


@pytest.fixture
def invocations(monkeypatch):
    """The interpreters that were invoked, in order."""
    calls, invoke = [], runner.Interpreter.invoke

    def counting(interpreter):
        calls.append(interpreter)
        invoke(interpreter)

    monkeypatch.setattr(runner.Interpreter, "invoke", counting)
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
def test_budgeted_equals_reference_and_runs_each_segment_once(net, run, images, invocations, index):
    for image in images[:4]:
        invocations.clear()
        result = run.run(image, setting="budgeted", exit=EXITS[index])
        assert result.exit == EXITS[index]
        assert len(invocations) == len(set(invocations)) == len(result.trace) == index + 1
        np.testing.assert_array_equal(result.mask, net.everything(image)[0][index])


def test_budgeted_without_exit_goes_to_the_last(run, images):
    assert run.run(images[0], setting="budgeted").exit == "final"


def test_input_dependent_stops_running_once_the_image_left(run, images, invocations):
    for image in images:
        invocations.clear()
        assert len(run.run(image).trace) == len(invocations) == len(set(invocations))


def test_refine_yields_every_exit_and_runs_only_what_is_asked_for(net, run, images, invocations):
    masks = net.everything(images[3])[0]
    steps = run.refine(images[3])
    for index, expected in enumerate(masks):
        result = next(steps)
        assert len(invocations) == len(set(invocations)) == index + 1
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


@pytest.mark.parametrize("size", [(96, 192), (48, 80), (17, 200)])
def test_image_of_another_size(net, run, size):
    image = np.random.default_rng(1).integers(0, 4, (*size, 3), np.uint8)
    small = np.asarray(Image.fromarray(image).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))
    mask = net.everything(small)[0][2]
    # The network's pixel that the centre of an output pixel falls into.
    rows = [int(Fraction(2 * row + 1, 2) * HEIGHT / size[0]) for row in range(size[0])]
    columns = [int(Fraction(2 * column + 1, 2) * WIDTH / size[1]) for column in range(size[1])]
    result = run.run(image, setting="budgeted")
    assert result.mask.dtype == np.uint8
    np.testing.assert_array_equal(result.mask, mask[np.ix_(rows, columns)])
    if size == (96, 192):
        np.testing.assert_array_equal(result.mask, np.kron(mask, np.ones((3, 3), np.uint8)))


@pytest.fixture
def timed(folder, monkeypatch):
    """A runner under a clock that each invocation advances by the duration, in ms, of its segment."""
    clock, durations, names = [0], dict.fromkeys(EXITS, 10), {}
    invoke = runner.Interpreter.invoke

    def advancing(interpreter):
        invoke(interpreter)
        clock[0] += int(durations[names.setdefault(id(interpreter), EXITS[len(names) % 3])] * 1e6)

    monkeypatch.setattr(runner.Interpreter, "invoke", advancing)
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(perf_counter_ns=lambda: clock[0]))
    return Runner(Bundle.load(folder)), durations


@pytest.mark.parametrize(("deadline_ms", "exit", "executed"), [(1, "exit1", 1), (19.9, "exit1", 1), (20, "exit2", 2), (30, "final", 3)])
def test_anytime_gives_the_latest_result_in_time(timed, net, images, deadline_ms, exit, executed):
    result = timed[0].run(images[2], setting="anytime", deadline_ms=deadline_ms)
    assert (result.exit, len(result.trace), result.latency_ms) == (exit, executed, 10 * executed)
    np.testing.assert_array_equal(result.mask, net.everything(images[2])[0][executed - 1])


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
    ],
)
def test_options_that_do_not_go_together(run, images, options, message):
    with pytest.raises(ValueError, match=message):
        run.run(images[0], **options)


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_wrong_image(run, image):
    with pytest.raises(ValueError, match=r"image: must be uint8 \[h, w, 3\], got"):
        run.run(image)


def test_input_dependent_needs_thetas(copy, images):
    def change(value):
        value["setting"] = "anytime"
        value["segments"][1] |= {"theta_pix": None, "theta_img": None}

    edit(copy, change)
    with pytest.raises(ValueError, match="the bundle has no theta_img"):
        Runner(Bundle.load(copy)).run(images[0], setting="input-dependent")


# ---------------------------------------------------------------- manifest and graphs


def test_manifest_round_trip(folder):
    manifest = Bundle.load(folder).manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    for segment in manifest.segments:
        assert Segment.from_json(segment.to_json()) == segment
    no_search = dataclasses.replace(manifest, predicted=None)
    assert Manifest.from_json(json.loads(json.dumps(no_search.to_json()))) == no_search
    assert sorted(path.name for path in folder.iterdir()) == sorted(["manifest.json", *(s.file for s in manifest.segments)])


@pytest.mark.parametrize(
    ("keys", "received", "message"),
    [
        (("format",), 2, r"manifest\.format: must be 1, got 2"),
        (("colour",), 1, r"manifest\.colour: unknown key"),
        (("segments", 1, "theta_imgs"), 0.5, r"segments\[1\]\.theta_imgs: unknown key, must be one of theta_img"),
        (("segments", 0, "file"), "../x.tflite", r"segments\[0\]\.file: must be a plain \.tflite file name"),
        (("segments", 0, "file"), "/x.tflite", r"segments\[0\]\.file: must be a plain"),
        (("segments", 0, "sha256"), "A" * 64, r"segments\[0\]\.sha256: must be 64"),
        (("segments", 0, "size_bytes"), 0, r"segments\[0\]\.size_bytes: must be positive"),
        (("segments", 0, "macs"), 1.5, r"segments\[0\]\.macs: must be of type int"),
        (("segments", 0, "edge_aware"), 1, r"segments\[0\]\.edge_aware: must be of type bool"),
        (("segments", 0, "theta_img"), 1.5, r"segments\[0\]\.theta_img: must be in \[0, 1\]"),
        (("segments", 0, "theta_img"), float("nan"), r"segments\[0\]\.theta_img: must be a finite number"),
        (("segments", 0, "theta_pix"), None, r"segments\[0\]\.theta_img: must be given or null together"),
        (("segments", 1, "exit"), "exit1", r"segments\.exit: must be different"),
        (("segments",), [], r"segments: must be at least one"),
        (("setting",), "fast", r"setting: must be one of"),
        (("predicted", "miou"), 50.0, r"predicted\.miou: must be in \[0, 1\]"),
        (("predicted", "cost", "name"), "joules", r"predicted\.cost\.name: must be one of latency_ms, macs"),
        (("palette", 2), [0, 0], r"palette\[2\]: must be a list of 3"),
        (("palette", 2), [0, 0, 256], r"palette\[2\]: must be three values in 0\.\.255"),
        (("classes",), ["sky"], r"palette: must be one colour for each of 1 classes, got 5"),
        (("input", "height"), 0, r"input\.height: must be positive"),
        (("created_by",), [], r"created_by: must be a JSON object"),
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


def test_thetas_follow_the_setting(copy):
    edit(copy, lambda value: value["segments"][2].update(theta_pix=0.9, theta_img=0.5))
    with pytest.raises(ValueError, match=r"segments\[2\]\.theta_img: must be null in the last segment"):
        Bundle.load(copy)
    edit(copy, lambda value: value["segments"].pop())
    edit(copy, lambda value: value["segments"][0].update(theta_pix=None, theta_img=None))
    edit(copy, lambda value: value["segments"][1].update(theta_pix=None, theta_img=None))
    with pytest.raises(ValueError, match=r"segments\[0\]\.theta_img: must be given for input-dependent"):
        Bundle.load(copy)


def test_changed_or_missing_files(copy):
    path = copy / "segment-exit2.tflite"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"segment-exit2\.tflite: sha256: must be"):
        Bundle.load(copy)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"segment-exit2\.tflite: size: must be"):
        Bundle.load(copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"segment-exit2\.tflite: missing, named by segments\[1\]\.file"):
        Bundle.load(copy)
    (copy / bundle.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: "):
        Bundle.load(copy)


def describe_file(path):
    return {"file": path.name, "sha256": file_sha256(path), "size_bytes": path.stat().st_size}


def test_a_feature_that_nobody_makes(copy):
    edit(copy, lambda value: value["segments"].pop(0))
    with pytest.raises(ValueError, match=r"segment-exit2\.tflite: input 'feature_1': must be 'image' or made by a segment before"):
        Runner(Bundle.load(copy))


def test_a_feature_that_two_segments_make(copy):
    twin = shutil.copy(copy / "segment-exit1.tflite", copy / "twin.tflite")
    edit(copy, lambda value: value["segments"][1].update(describe_file(Path(twin))))
    with pytest.raises(ValueError, match=r"twin\.tflite: output 'feature_1': must be made by one segment only"):
        Runner(Bundle.load(copy))


def test_a_feature_with_another_quantization(folder, monkeypatch):
    load = runner._Stage.__init__

    def altered(stage, path, threads):
        load(stage, path, threads)
        if "feature_1" in stage.outputs:
            stage.outputs["feature_1"]["quantization"] = (0.5, 3)

    monkeypatch.setattr(runner._Stage, "__init__", altered)
    with pytest.raises(ValueError, match=r"segment-exit2\.tflite: feature_1 quantization: must be \(0\.5, 3\), got"):
        Runner(Bundle.load(folder))


def test_graphs_of_another_size(copy):
    edit(copy, lambda value: value["input"].update(height=HEIGHT * 2))
    with pytest.raises(ValueError, match=r"segment-exit1\.tflite: mask: must be uint8 \[1, 64, 64\], got \('uint8', \(1, 32, 64\)\)"):
        Runner(Bundle.load(copy))


def test_a_decision_without_confident_pixels(copy):
    def change(value):
        first, second, last = value["segments"]
        second |= {key: last[key] for key in ("file", "sha256", "size_bytes")}
        value["segments"] = [first, second, dict(last, exit="other", **describe_file(copy / "other.tflite"))]

    shutil.copy(copy / "segment-exit2.tflite", copy / "other.tflite")
    edit(copy, change)
    with pytest.raises(ValueError, match=r"segment-final\.tflite: tensors: must be with 'confident_pixels', got \['mask'\]"):
        Runner(Bundle.load(copy))


def test_a_file_that_is_no_model(copy):
    path = copy / "segment-exit1.tflite"
    path.write_bytes(b"x" * 100)
    edit(copy, lambda value: value["segments"][0].update(describe_file(path)))
    with pytest.raises(ValueError, match=r"segment-exit1\.tflite: .* cannot load it"):
        Runner(Bundle.load(copy))


# ---------------------------------------------------------------- latency.json


@pytest.fixture(scope="session")
def row(folder):
    return benchmark.benchmark_file(folder / "segment-exit1.tflite", threads=1, warmup=1, runs=5, min_seconds=0.0)


def test_row_describes_the_file_and_the_runtime(folder, row):
    path = folder / "segment-exit1.tflite"
    assert (row.submodel, row.sha256, row.size_bytes) == ("segment-exit1", file_sha256(path), path.stat().st_size)
    assert (row.runtime, row.backend_requested, row.backend_obtained, row.threads, row.runs) == (runner.RUNTIME, "xnnpack", "xnnpack", 1, 5)
    assert 0 < row.p50_ms <= row.p90_ms
    assert (row.drift, row.sustained_s) == (None, 0.0)
    assert all((row.device, row.soc, row.os, row.runtime_version))


def test_backend_is_read_from_the_graph(monkeypatch):
    interpreter = types.SimpleNamespace(_get_ops_details=lambda: [{"op_name": "CONV_2D"}])
    assert benchmark._backend(interpreter) == "cpu"
    assert benchmark._backend(types.SimpleNamespace()) == "unknown"


def test_files_are_measured_in_turns_until_runs_and_time_suffice(folder, invocations):
    files = [folder / "segment-exit1.tflite", folder / "segment-final.tflite"]
    lines = []
    rows = benchmark.benchmark_files(files, warmup=2, runs=6, min_seconds=0.0, rounds=3, progress=lines.append)
    turns = [len(list(group)) for _, group in itertools.groupby(invocations, key=id)]
    assert turns == [4] * 6
    assert [row.runs for row in rows] == [6, 6] and all(row.drift > 0 for row in rows)
    assert [line.split()[:3] for line in lines] == [["round", f"{k}/3", path.stem] for k in (1, 2, 3) for path in files]
    assert lines[-1].endswith("eta_s=0")
    (row,) = benchmark.benchmark_files(files[:1], warmup=0, runs=1, min_seconds=0.02, rounds=2)
    assert row.mean_ms * row.runs >= 20


def test_equal_files_are_measured_once(folder, copy):
    rows = benchmark.benchmark_files([root / "segment-exit1.tflite" for root in (folder, copy)], runs=1, min_seconds=0.0, rounds=1)
    assert [row.submodel for row in rows] == ["segment-exit1"]


@pytest.mark.parametrize("argument", ["threads", "runs", "rounds"])
def test_benchmark_arguments(folder, argument):
    with pytest.raises(ValueError, match=f"{argument}: must be at least 1, got 0"):
        benchmark.benchmark_files([folder / "segment-exit1.tflite"], **{argument: 0})


def test_a_file_with_two_signatures_is_refused(net, tmp_path):
    @tf.function(input_signature=[tf.TensorSpec((1, 4), tf.float32, "x")])
    def double(x):
        return {"y": x * 2}

    tf.saved_model.save(net, str(tmp_path / "saved"), signatures={"one": double, "two": double})
    path = tmp_path / "two.tflite"
    path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "saved"), signature_keys=["one", "two"]).convert())
    with pytest.raises(ValueError, match=r"two\.tflite: signatures: must be a single one"):
        benchmark.benchmark_file(path, runs=1, min_seconds=0.0)


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
        bundle.write_atomically(path, fail)
    with pytest.raises(ValueError):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- command line


def command(*arguments, code=0):
    """Runs the program in its own process and returns its lines on stdout and stderr."""
    environment = os.environ | {"PYTHONPATH": str(Path(bundle.__file__).parents[1])}
    words = [sys.executable, "-m", "mess_runtime", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines(), [line for line in done.stderr.splitlines() if line.startswith("mess_runtime")]


def test_run_writes_masks_and_goes_on_after_a_broken_image(folder, net, images, tmp_path):
    sources, output = tmp_path / "images", tmp_path / "masks"
    sources.mkdir()
    for index in (0, 5):
        Image.fromarray(images[index]).save(sources / f"{index}.png")
    (sources / "1.jpg").write_bytes(b"not an image")
    (sources / "notes.txt").write_text("left alone")
    lines, errors = command("run", folder, sources, f"--output={output}", "--setting=budgeted", "--exit=exit2", code=1)
    assert len(errors) == 1 and "1.jpg: not a readable image" in errors[0]
    assert lines[-1] == str(output)
    records = [json.loads(line) for line in lines[:-1]]
    assert [record["image"] for record in records] == [str(sources / "0.png"), str(sources / "5.png")]
    for record, index in zip(records, (0, 5), strict=True):
        masks, counts = net.everything(images[index])
        assert (record["exit"], record["confidence"]) == ("exit2", counts[1] / PIXELS)
        assert [step["exit"] for step in record["segments"]] == ["exit1", "exit2"]
        assert record["latency_ms"] == pytest.approx(sum(step["latency_ms"] for step in record["segments"]))
        with Image.open(output / f"{index}.png") as mask:
            np.testing.assert_array_equal(np.asarray(mask), masks[1])
            np.testing.assert_array_equal(np.asarray(mask.convert("RGB")), np.array(PALETTE)[masks[1]])
    assert sorted(path.name for path in output.iterdir()) == ["0.png", "5.png"]


def test_run_never_loses_a_file(folder, images, tmp_path):
    for name in ("a.png", "a.bmp"):
        Image.fromarray(images[0]).save(tmp_path / name)
    before = (tmp_path / "a.png").read_bytes()
    _, errors = command("run", folder, tmp_path / "a.png", f"--output={tmp_path}", code=1)
    assert len(errors) == 1 and "masks do not replace images" in errors[0]
    _, errors = command("run", folder, tmp_path, f"--output={tmp_path / 'masks'}", code=1)
    assert len(errors) == 1 and "another image's mask is called" in errors[0]
    assert (tmp_path / "a.png").read_bytes() == before


def test_benchmark_measures_folders_and_merges(folder, tmp_path):
    output = tmp_path / "latency.json"
    options = [f"--output={output}", "--runs=2", "--min_seconds=0", "--rounds=1"]
    lines, _ = command("benchmark", folder, *options)
    assert lines[-1] == str(output) and len(lines) == 4
    command("benchmark", folder / "segment-final.tflite", "--threads=2", *options)
    rows = bundle.read_json(output, benchmark.LatencyTable.from_json).rows
    names = ["segment-exit1", "segment-exit2", "segment-final"]
    assert [(row.submodel, row.threads) for row in rows] == [*((name, 1) for name in names), ("segment-final", 2)]


def test_inspect_prints_the_segments(folder, thetas):
    lines, _ = command("inspect", folder)
    rows = [line.split() for line in lines[-4:]]
    assert rows[0] == ["exit", "head", "file", "KiB", "MMACs", "theta_pix", "theta_img", "edge_aware"]
    assert [row[0] for row in rows[1:]] == list(EXITS)
    assert rows[1][5:] == ["0.9", f"{thetas[0]:g}", "yes"] and rows[3][5:] == ["-", "-", "no"]
    assert "setting    input-dependent" in lines
    assert "predicted  mIoU 50.00 %, mean latency_ms 1.5" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "manifest.json"),
        (["run", "nowhere", "x.png", "--output=out"], "manifest.json"),
        (["benchmark", "nowhere.tflite", "--output=out.json"], "nowhere.tflite"),
        (["benchmark", ".", "--output=out.json"], "holds no file with the suffix .tflite"),
        (["run", "nowhere"], "the following arguments are required"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_user_errors_are_one_line(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    lines, errors = command(*arguments, code=1)
    assert lines == []
    assert len(errors) == 1 and message in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_importing_the_device_side_needs_no_tensorflow():
    code = (
        "import sys, mess_runtime.__main__, mess_runtime.benchmark, mess_runtime.runner;"
        "print([name for name in ('tensorflow', 'keras', 'mess_tf') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(bundle.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
