"""Proof of files on backends: it finds what is wrong, and on a GPU, driven in software, nothing is."""

import ctypes.util
import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from PIL import Image
from small_network import small_network

from mess_runtime import engines, verify
from mess_runtime.__main__ import main
from mess_runtime.bundle import FULL, INT8, MANIFEST, MODEL, SIGNATURE, Bundle, InputSpec, Verification, sha256, write_manifest
from mess_runtime.frames import read_label
from mess_runtime.images import UnreadableError
from mess_runtime.runner import Runner
from mess_tf import metrics
from mess_tf.configs import HeadSpec
from mess_tf.files import Configuration, ExitChoice
from mess_tf.graph import flatbuffer
from mess_tf.graph.conversion import PRECISIONS, ExportError, convert, run_signature
from mess_tf.graph.exporter import Exporter
from mess_tf.graph.policy import FIDELITIES, decide
from mess_tf.network.model import convert as convert_network
from mess_tf.targets import android, mediapipe, web

SIZE = (40, 56)
CLASSES = tuple("abcde")
HEAD = "decoder-r1-b1-d1"
THETA_PIX = 0.35
ROOT = Path(__file__).resolve().parents[1]
# SwiftShader, of Debian's package chromium; with libvulkan1, LiteRT's GPU delegate runs on it.
DRIVER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")
VERSIONS = ("2.1.6", "2.2.0", INSTALLED := "2.3.0", "nightly")


@pytest.fixture(scope="module")
def images():
    """Smooth, so that few pixels are undecided."""
    return [verify._noise(InputSpec(*SIZE), seed) for seed in range(4)]


@pytest.fixture(scope="module")
def network(images):
    """Random weights, and the statistics of batch normalisation that belong to them."""
    tf.keras.utils.set_random_seed(0)
    network = convert_network(small_network(len(CLASSES)), 3, SIZE)
    network.add_heads([HeadSpec.parse(HEAD)], 0.9)
    run = tf.function(network.submodel(network.candidates), autograph=False)
    for _ in range(40):
        run(np.stack(images).astype(np.float32), training=True)
    return network


def configuration(setting: str = "input-dependent") -> Configuration:
    choices = [ExitChoice(name, HEAD, THETA_PIX, 0.5) for name in ("exit1", "exit2")]
    return Configuration(setting, True, (*choices, ExitChoice("final", "original")), None)


@pytest.fixture(scope="module")
def bundle(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    Exporter(network, SIZE).bundle(folder, configuration(), None, CLASSES)
    return Bundle.load(folder)


# ---------------------------------------------------------------- faults are found


@pytest.fixture
def backend(monkeypatch):
    """Runs what another process would run in this one, on the CPU; `faulty(turn, outputs)` may spoil outputs, `text` is its stderr."""

    def install(faulty=lambda turn, outputs: None, text="", accelerated=1.0):
        def on_backend(file, name, runs, folder):
            engine = engines.CompiledEngine(file, 1)
            for signature in engine.inputs:
                engine.prepare(signature)
            with np.load(folder / "images.npz") as arrays:
                for turn, outputs in verify._outputs(engine, list(arrays.values()), runs):
                    faulty(turn, outputs)
                    flat = {f"{signature}/{key}": value for signature, tensors in outputs.items() for key, value in tensors.items()}
                    np.savez(folder / f"{turn}.npz", **flat)
            return accelerated, text, ()

        monkeypatch.setattr(verify, "_on_backend", on_backend)

    return install


def test_the_cpu_in_another_process_gives_what_the_cpu_gives(bundle, images):
    report = verify.verify(bundle.folder, "cpu", images, runs=2)
    assert report.ok and report.decisions == 0 and not report.faults
    assert {(each.signature, each.output) for each in report.differences} == {
        (signature, name) for signature, graph in flatbuffer.read_signatures(bundle.path.read_bytes()).items() for name in graph.outputs
    }
    assert any(each.output not in ("mask", "confident_pixels") for each in report.differences)
    assert all(each.worst <= 1e-6 for each in report.differences)
    assert report.sha256 == bundle.manifest.sha256
    assert "accelerated" not in report.table()


def test_what_is_wrong_from_the_third_run_on_is_found(bundle, images, backend):
    def faulty(turn, outputs):
        if turn >= 2:
            outputs["segment.exit2"]["mask"] = outputs["segment.exit2"]["mask"] ^ 1

    backend(faulty)
    assert verify.verify(bundle.folder, "gpu", images[:1], runs=2).ok
    report = verify.verify(bundle.folder, "gpu", images[:1], runs=3)
    (wrong,) = [each for each in report.differences if not each.ok]
    assert (wrong.signature, wrong.output, wrong.first, wrong.last) == ("segment.exit2", "mask", 0.0, 1.0)
    assert not report.ok and "DIFFERS" in report.table()


def test_a_feature_between_segments_that_is_an_operand_of_its_sum_is_found(bundle, images, backend):
    def faulty(turn, outputs):
        name = next(name for name in outputs["segment.exit1"] if name not in ("mask", "confident_pixels"))
        outputs["segment.exit1"][name] = outputs["segment.exit1"][name] * 0.8

    backend(faulty)
    report = verify.verify(bundle.folder, "gpu", images[:1], runs=1)
    (wrong,) = [each for each in report.differences if not each.ok]
    assert wrong.signature == "segment.exit1" and wrong.worst > 0.05


def test_a_decision_that_differs_is_counted(bundle, images, backend):
    def faulty(turn, outputs):
        outputs["segment.exit1"]["confident_pixels"][:] = SIZE[0] * SIZE[1] * (turn == 1)

    cpu = [Runner(bundle).run(image).exit == "exit1" for image in images[:2]]
    backend(faulty)
    assert verify.verify(bundle.folder, "gpu", images[:2], runs=1).decisions == sum(cpu[i] != (i == 1) for i in range(2))


def test_errors_that_only_go_to_stderr_fail(bundle, images, backend):
    backend(text="I0000 00:00:1.2 3 a.cc:1] fine\nE0000 00:00:1.2 3 environment.cc:105] Validation error: cannot assign\n")
    report = verify.verify(bundle.folder, "gpu", images[:1], runs=1)
    assert report.faults == ("environment.cc:105] Validation error: cannot assign",) and not report.ok


def test_values_that_are_not_finite_fail(bundle, images, backend):
    def faulty(turn, outputs):
        for name, value in outputs["segment.exit1"].items():
            if value.dtype == np.float32:
                outputs["segment.exit1"][name] = np.full_like(value, np.nan)

    backend(faulty)
    report = verify.verify(bundle.folder, "gpu", images[:1], runs=1)
    assert not report.ok and report.faults
    assert all(re.fullmatch(r"segment\.exit1: \S+: (\d+) of \1 values are not finite on gpu", fault) for fault in report.faults)
    json.dumps(report.to_json(), allow_nan=False)  # as android_bench writes it


@pytest.mark.parametrize("weight", [np.nan, 3e38])
def test_weights_that_make_nothing_finite_fail_though_the_mask_is_the_same(images, backend, tmp_path, weight):
    kernel = tf.fill([3, 3, 3, 5], np.float32(weight))
    graph = convert(lambda image: {"mask": tf.argmax(tf.nn.conv2d(image, kernel, 1, "SAME"), -1, tf.int32)}, {"image": (1, *SIZE, 3)})
    (tmp_path / "x.tflite").write_bytes(flatbuffer.write({SIGNATURE: graph}))
    backend()
    report = verify.verify(tmp_path / "x.tflite", "gpu", images[:1], runs=1)
    assert [each.worst for each in report.differences] == [0.0] and not report.ok
    (fault,) = report.faults
    assert re.fullmatch(rf"{SIGNATURE}: \S+, inside: \d+ of \d+ values are not finite on the CPU", fault)


def candidate(network) -> str:
    return next(name for name in network.candidates if name.startswith("exit1."))


@pytest.mark.parametrize("weight", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("of_head", "export"),
    [
        (False, lambda exporter, folder: exporter.bundle(folder / "kept", configuration(), None, CLASSES)),
        (False, lambda exporter, folder: exporter.prefix(folder, "exit1")),
        (True, lambda exporter, folder: exporter.head(folder, candidate(exporter.network))),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_network_whose_values_are_not_finite_is_not_exported(network, tmp_path, weight, of_head, export, precision):
    model = network.heads[candidate(network)] if of_head else network.submodel(["final.original"])
    layer = next(each for each in model._flatten_layers() if isinstance(each, tf.keras.layers.Conv2D))
    before = layer.get_weights()
    layer.set_weights([np.full_like(each, weight) for each in before])
    try:
        with pytest.raises(ExportError, match=r"must be finite, but \d+ of \d+ values that Keras computes are not"):
            export(Exporter(network, SIZE, precision=precision), tmp_path)
    finally:
        layer.set_weights(before)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def not_finite(bundle, tmp_path_factory):
    """The bundle with NaN for the weights of a convolution of its first segment."""
    folder = Path(shutil.copytree(bundle.folder, tmp_path_factory.mktemp("nan") / "bundle"))
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel((folder / MODEL).read_bytes(), 0))
    (*_, kernel) = [
        model.buffers[each.buffer]
        for each in model.subgraphs[0].tensors
        if each.type == schema.TensorType.FLOAT32 and len(each.shape) == 4 and model.buffers[each.buffer].data is not None
    ]
    kernel.data = np.full(len(kernel.data) // 4, np.nan, np.float32).view(np.uint8)
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    content = bytes(builder.Output())
    (folder / MODEL).write_bytes(content)
    write_manifest(folder, dataclasses.replace(bundle.manifest, sha256=sha256(content), size_bytes=len(content)))
    return Bundle.load(folder)


@pytest.mark.parametrize("write", [android.write, mediapipe.write, web.write_bundle])
def test_a_bundle_whose_values_are_not_finite_goes_to_no_target(not_finite, tmp_path, write):
    with pytest.raises(
        ValueError, match=r"model\.tflite: must be a model whose values are finite, got 'segment\.exit1: \S+, inside: \d+ of"
    ):
        write(not_finite, tmp_path / "output")
    assert not list(tmp_path.glob("*/*"))


def test_verify_says_what_is_not_finite_though_there_are_labels_and_masks_of_no_class(not_finite, images, backend):
    backend(lambda turn, outputs: outputs["segment.final"]["mask"].fill(255))
    report = verify.verify(not_finite.folder, "gpu", images[:1], [np.zeros(SIZE, np.uint8)], runs=1)
    assert not report.ok and any("inside" in fault for fault in report.faults)
    assert report.mious["final"][1] == 0


@pytest.mark.parametrize(
    ("height", "words", "message"),
    [
        (SIZE[0], ["--precision=fp32"], "--precision: must be left out for a bundle, which knows it, got 'fp32'"),
        (300, [], "segment.exit1: input 'image': must be one of"),
    ],
)
def test_verify_ends_with_2_where_it_cannot_compare(bundle, tmp_path, monkeypatch, capsys, height, words, message):
    folder = shutil.copytree(bundle.folder, tmp_path / "copy")
    write_manifest(folder, dataclasses.replace(bundle.manifest, input=dataclasses.replace(bundle.manifest.input, height=height)))
    monkeypatch.setattr(sys, "argv", ["mess_runtime", "--verbose", "verify", str(folder), "--backend=cpu", *words])
    assert main() == 2 and message in capsys.readouterr().err


def test_labels_give_the_miou_of_both_sides(bundle, images, backend):
    masks = [Runner(bundle).run(image, "budgeted").mask for image in images]
    backend()
    report = verify.verify(bundle.folder, "gpu", images, [*masks[:3], None], runs=1)
    assert report.mious["final"] == (1.0, 1.0) and report.mious["exit1"][0] < 1


def test_the_miou_is_of_the_classes_that_the_labels_hold(bundle, images):
    """As in training's evaluations: a pixel of a class that no label holds is a miss of the class that it should have, no class more."""
    label = Runner(bundle).run(images[0], "budgeted").mask
    held = label == np.bincount(label.ravel()).argmax()
    one = np.where(held | (np.arange(label.size).reshape(label.shape) % 50 == 0), label[held][0], 255).astype(np.uint8)
    expected = metrics.miou(*metrics.class_counts(metrics.confusion_matrix(one, label, len(bundle.manifest.classes))))
    assert 0.5 < expected < 1
    report = verify.verify(bundle.folder, "cpu", images[:1], [one], runs=1)
    assert report.mious["final"] == (pytest.approx(expected), pytest.approx(expected))
    nothing = verify.verify(bundle.folder, "cpu", images[:1], [np.full_like(label, 255)], runs=1)
    assert nothing.mious["final"] == (0.0, 0.0)


def test_a_label_that_holds_no_classes_is_named(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "images" / "a.jpg"
    Image.new("RGB", (8, 6)).save(path)
    for mode, value in (("RGB", (1, 2, 3)), ("LA", (1, 2)), ("I;16", 7)):
        Image.new(mode, (8, 6), value).save(tmp_path / "labels" / "a.png")
        with pytest.raises(UnreadableError, match=r"a\.png: must have one channel of at most 8 bits, or a palette, got mode "):
            read_label(path, (6, 8))
    Image.new("1", (8, 6), 1).save(tmp_path / "labels" / "a.png")
    np.testing.assert_array_equal(read_label(path, (6, 8)), np.ones((6, 8), np.uint8))


def fake_process(monkeypatch, code: int, stderr: str) -> None:
    done = subprocess.CompletedProcess([], code, "", stderr)
    monkeypatch.setattr(verify, "subprocess", type("module", (), {"run": lambda *_, **__: done, "DEVNULL": None}))


def test_a_backend_that_crashes_or_does_not_load_fails(bundle, images, monkeypatch):
    for code, message in ((-11, "ended with -11"), (1, "RuntimeError: no")):
        fake_process(monkeypatch, code, "" if code < 0 else "Traceback\nRuntimeError: no\nINFO: destroyed\n")
        report = verify.verify(bundle.folder, "gpu", images[:1], runs=1)
        assert report.faults == (message,) and not report.ok


def test_a_backend_that_is_not_there_is_no_pass(bundle, monkeypatch, capsys):
    fake_process(monkeypatch, 1, "ERROR: Failed to initialize WebGPU environment: INTERNAL: No adapters found\n")
    monkeypatch.setattr(sys, "argv", ["mess_runtime", "verify", str(bundle.folder), "--backend=gpu"])
    assert main() == 2
    output = capsys.readouterr()
    assert output.out == "" and "--backend: must be there to verify a file on it, got 'gpu', which needs ai-edge-litert" in output.err


@pytest.mark.parametrize(("wrong", "code"), [(False, 0), (True, 1)])
def test_verify_prints_a_table_and_a_json_line(bundle, images, backend, tmp_path, monkeypatch, capsys, wrong, code):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "images" / "a.png")
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "labels" / "a.png")
    backend(lambda turn, outputs: outputs["segment.final"]["mask"].fill(4) if wrong else None)
    words = ["verify", str(bundle.folder), str(tmp_path / "images"), "--backend=gpu", "--runs=1"]
    monkeypatch.setattr(sys, "argv", ["mess_runtime", *words])
    assert main() == code
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert (report["ok"], report["images"], report["backend"]) == (not wrong, 1, "gpu")
    assert set(report["mious"]) == {"exit1", "exit2", "final", "policy"} and any("DIFFERS" in line for line in lines) == wrong


def test_verify_reads_labels_as_viewers_show_them(bundle, images, backend, tmp_path, monkeypatch, capsys):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    label = Image.fromarray(np.zeros(SIZE, np.uint8))
    Image.fromarray(images[0]).save(tmp_path / "images" / "a.png", exif=turned)
    label.save(tmp_path / "labels" / "a.png")
    backend()
    monkeypatch.setattr(sys, "argv", ["mess_runtime", "verify", str(bundle.folder), str(tmp_path / "images"), "--backend=gpu", "--runs=1"])
    height, width = SIZE
    message = f"a.png: must be as large as its image, {width}x{height}, got {height}x{width}; viewers turn the photo (EXIF orientation 6)"
    assert main() == 2 and message in capsys.readouterr().err
    label.save(tmp_path / "labels" / "a.png", exif=turned)
    assert main() == 0


def test_verify_records_a_proof(bundle, backend, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(bundle.folder, tmp_path / "copy")
    monkeypatch.setattr(sys, "argv", ["mess_runtime", "verify", str(folder), "--backend=gpu", "--runs=1", "--record"])
    backend(lambda turn, outputs: outputs["segment.final"]["mask"].fill(4))
    assert main() == 1 and Bundle.load(folder).manifest.verified == ()
    backend()
    assert (main(), main()) == (0, 0)
    (proof,) = Bundle.load(folder).manifest.verified
    assert (proof.backend, proof.images, proof.different) == ("gpu", 2, 0.0)
    monkeypatch.setattr(sys, "argv", ["mess_runtime", "verify", str(folder / MODEL), "--backend=gpu", "--record"])
    assert main() == 2 and "--record: must be left out for a file without manifest" in capsys.readouterr().err


def test_export_records_the_proof_and_keeps_no_file_that_differs(network, backend, tmp_path):
    exporter = Exporter(network, SIZE)
    backend(accelerated=0.5)
    exporter.bundle(tmp_path / "kept", configuration(), None, CLASSES, backends=("gpu",))
    manifest = Bundle.load(tmp_path / "kept").manifest
    runtime = f"{engines.RUNTIME} {engines.runtime_version()}"
    assert manifest.verified == (Verification("gpu", runtime, "gpu", 0.5, 2, 5, 0.0),)
    before = (tmp_path / "kept" / MANIFEST).read_bytes()
    backend(lambda turn, outputs: outputs["segment.final"]["mask"].fill(4))
    with pytest.raises(ExportError, match=r"segment\.final +mask .* DIFFERS"):
        exporter.bundle(tmp_path / "kept", configuration(), None, CLASSES, backends=("gpu",))
    assert (tmp_path / "kept" / MANIFEST).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_run_warns_of_a_backend_without_proof(bundle, images, tmp_path, monkeypatch, capsys):
    real = engines.CompiledEngine
    monkeypatch.setattr(engines, "CompiledEngine", lambda path, threads, backend: real(path, threads))
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    words = ["mess_runtime", "run", str(bundle.folder), str(tmp_path / "a.png"), f"--output={tmp_path / 'masks'}", "--backend=gpu"]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 0
    assert "the manifest records no proof of the masks on gpu: python -m mess_runtime verify" in capsys.readouterr().err
    proven = dataclasses.replace(bundle.manifest, verified=(Verification("gpu", "x", "y", 1.0, 1, 1, 0.0),))
    write_manifest(bundle.folder, proven)
    assert main() == 0
    write_manifest(bundle.folder, bundle.manifest)
    assert "proof" not in capsys.readouterr().err


def test_the_host_writes_an_image_and_reads_a_count_a_segment_and_a_mask(bundle, images, monkeypatch):
    """All else stays in the runtime's buffers, which on a GPU are its memory."""
    runner, moved = Runner(bundle, engine=engines.COMPILED), []
    buffer = type(runner._engine._inputs["image"])
    read, write = buffer.read, buffer.write

    def counted_read(self, *arguments):
        moved.append(("read", arguments[0]))
        return read(self, *arguments)

    def counted_write(self, value):
        moved.append(("write", value.size))
        write(self, value)

    monkeypatch.setattr(buffer, "read", counted_read)
    monkeypatch.setattr(buffer, "write", counted_write)
    trace = runner.run(images[0]).trace
    decisions = min(len(trace), 2)
    pixels = SIZE[0] * SIZE[1]
    assert moved == [("write", 3 * pixels), *[("read", 1)] * (len(moved) - 2), ("read", pixels)]
    assert len(moved) - 2 == decisions


def test_earlier_manifests_say_nothing_of_backends(bundle):
    value = json.loads(json.dumps(bundle.manifest.to_json()))
    del value["verified"]
    assert type(bundle.manifest).from_json(value) == bundle.manifest


# ---------------------------------------------------------------- a GPU in software


@pytest.fixture(scope="module")
def files(network, images, tmp_path_factory):
    """A function of a precision: a file with the segments of a bundle, and with one exit under every policy."""
    folder = tmp_path_factory.mktemp("files")

    @functools.cache
    def policy(shape: tuple[int, ...], fidelity: str, edge_aware: bool) -> flatbuffer.Graph:
        return convert(lambda logits: decide(logits, SIZE, ((THETA_PIX, edge_aware),), fidelity), {"logits": shape})

    @functools.cache
    def of(precision: str) -> Path:
        exporter = Exporter(network, SIZE, precision=precision, samples=[image[None].astype(np.float32) for image in images])
        everything = exporter.deployed(configuration(), "uint8")
        signatures = {name: graph for name, graph in everything.items() if name.startswith("segment.") or name == FULL}
        to_logits = everything["logits.exit1"]
        for fidelity, edge_aware in itertools.product(FIDELITIES, (False, True)):
            decision = policy(to_logits.outputs["logits"].shape, fidelity, edge_aware)
            joined = flatbuffer.join(to_logits, decision, {"logits": "logits"})
            signatures[f"{fidelity}.{'edge' if edge_aware else 'plain'}"] = joined
        path = folder / f"{precision}.tflite"
        path.write_bytes(exporter.content(signatures))
        return path

    return of


@pytest.fixture(scope="module")
def driver():
    """The environment in which LiteRT finds a GPU."""
    if not ctypes.util.find_library("vulkan") or ("VK_ICD_FILENAMES" not in os.environ and not DRIVER.exists()):
        pytest.skip(f"needs a Vulkan driver: {DRIVER} of the Debian package chromium, and libvulkan1")
    paths = {"PYTHONPATH": str(ROOT / "tflite"), "VK_ICD_FILENAMES": os.environ.get("VK_ICD_FILENAMES", str(DRIVER))}
    return os.environ | paths


def verified(python: Path, environment, *arguments) -> tuple[int, dict]:
    words = [python, "-m", "mess_runtime", "verify", *arguments, "--backend=gpu"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("version", "precision"),
    [
        pytest.param(version, precision, marks=() if version == INSTALLED and precision == INT8 else pytest.mark.full)
        for version in VERSIONS
        for precision in PRECISIONS
    ],
)
def test_a_gpu_gives_what_the_cpu_gives(files, driver, version, precision):
    python = ROOT / ".venv-runtimes" / f"ai-edge-litert-{version}" / "bin" / "python"
    if version == INSTALLED and not python.exists():
        python = Path(sys.executable)
    if not python.exists():
        pytest.skip(f"needs {python}, an environment with nothing but ai-edge-litert {version} and Pillow, which .ci/run makes")
    code, report = verified(python, driver, files(precision), f"--precision={precision}", "--runs=3")
    wrong = [(each["signature"], each["output"], each["worst"]) for each in report["differences"] if each["worst"] > each["limit"]]
    assert (code, wrong, report["faults"], report["accelerated"]) == (0, [], [], 1.0)


def test_a_reshape_that_a_gpu_gets_wrong_in_int8_is_found(driver, tmp_path, monkeypatch):
    """What the converter makes of a pooled branch, if nothing is done about it."""
    kernel = np.random.default_rng(0).normal(size=(1, 1, 8, 8)).astype(np.float32)

    def function(image):
        x = tf.nn.conv2d(tf.pad(image, [[0, 0], [0, 0], [0, 0], [0, 5]]), kernel, 1, "SAME")
        pooled = tf.reshape(tf.nn.relu(tf.reduce_mean(x, (1, 2))), (8,))
        return {"y": tf.nn.relu(x + pooled)}

    samples = [{"image": np.random.default_rng(i).uniform(0, 255, (1, 8, 8, 3)).astype(np.float32)} for i in range(4)]
    monkeypatch.setattr(flatbuffer, "with_broadcasts", lambda graph: graph)
    graph = convert(function, {"image": (1, 8, 8, 3)}, "int8", lambda: iter(samples))
    (tmp_path / "int8.tflite").write_bytes(flatbuffer.write({"serve": graph}))
    code, report = verified(Path(sys.executable), driver, tmp_path / "int8.tflite", "--precision=int8", "--runs=1")
    assert code == 1 and any("Validation error" in fault for fault in report["faults"])


def test_the_runner_runs_on_a_gpu(bundle, images, driver, tmp_path):
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    words = [sys.executable, "-m", "mess_runtime", "run", bundle.folder, tmp_path, f"--output={tmp_path / 'masks'}", "--backend=gpu"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=driver, timeout=300)
    assert done.returncode == 0, done.stderr
    runner = Runner(bundle)
    for index, (image, line) in enumerate(zip(images, done.stdout.splitlines(), strict=False)):
        result, record = runner.run(image), json.loads(line)
        assert record["exit"] == result.exit
        with Image.open(tmp_path / "masks" / f"{index}.png") as mask:
            assert (np.asarray(mask) != result.mask).mean() <= verify.LIMITS["fp32"][1]


# ---------------------------------------------------------------- LiteRT's own command line

# `litert run` of every file in a folder on an image, in one process.
CODE = """
import pathlib, sys
from litert_cli.litert import cli
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.tflite")):
    print(path.stem, flush=True)
    given = [] if path.stem.startswith("segment.") and path.stem != "segment.exit1" else [f"--input={sys.argv[2]}"]
    cli(["run", str(path), *given, "--print-tensors", "--sample-size=1000"], standalone_mode=False)
"""


def test_litert_cli_runs_every_submodel_as_it_is(network, images, tmp_path):
    python = ROOT / ".venv-runtimes" / "litert-cli" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"needs {python}, an environment with nothing but litert-cli, which .ci/run makes")
    exporter = Exporter(network, SIZE)
    graphs = exporter.deployed(configuration(), "uint8")
    del graphs[FULL]
    for name, graph in graphs.items():
        exporter.save(tmp_path / f"{name}.tflite", graph)
    np.save(tmp_path / "image.npy", images[0][None])
    words = [str(word) for word in (python, "-c", CODE, tmp_path, tmp_path / "image.npy")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    printed = dict(zip(sorted(graphs), re.split(rf"^(?:{'|'.join(graphs)})$", done.stdout, flags=re.MULTILINE)[1:], strict=True))
    assert all("Inference complete" in text for text in printed.values())
    for exit in ("exit1", "exit2", "final"):
        (values,) = re.findall(r"  mask .*:\n +\[(.*)\]", printed[f"alone.{exit}"])
        content = flatbuffer.write({SIGNATURE: graphs[f"alone.{exit}"]})
        mask = run_signature(content, {"image": images[0][None]})["mask"].ravel()
        assert values.split() == [*map(str, mask[:1000]), "...", *map(str, mask[-1000:])]
