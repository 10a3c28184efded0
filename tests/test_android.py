"""The target `android`, and the example app: its Kotlin compiles, and its runner on a JVM decides as Python's does."""

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.compiled_model import CompiledModel
from small_network import small_network

from mess_runtime import engines, runner
from mess_runtime.bundle import MANIFEST, MODEL, Bundle, InputSpec, Regions, write_manifest
from mess_runtime.images import fit
from mess_runtime.runner import Runner
from mess_tf.configs import DataConfig, HeadSpec
from mess_tf.data.sources import open_split
from mess_tf.files import Configuration, ExitChoice
from mess_tf.graph.exporter import Exporter
from mess_tf.network.model import MultiExitNetwork, convert
from mess_tf.targets import android

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "tflite/examples/android"
MAIN = APP / "app/src/main"
FILES = ROOT / "tests/data/android"
JSON = Path("/usr/share/java/com.android.json.jar")  # Android's org.json, of the Debian package libandroid-json-java
FRAMEWORK = Path("/usr/share/android-framework-res/framework-res.apk")  # its resources, of android-framework-res
SDK = ROOT / ".venv-runtimes/types-android/node_modules/@nativescript/types-android/lib/android/android-platform-37.d.ts"
SIZE, PHOTO_SIZE, HEAD, THETA_PIX, EXITS = (32, 64), (60, 90), "fcn-r1-b0", 0.4, ("exit1", "exit2", "final")
FIELDS = ("exit", "confidence", "latency_ms", "budget", "active")  # of a step


# ---------------------------------------------------------------- the target


@pytest.fixture(scope="module")
def photos():
    """Drawn scenes, uint8 [60, 90, 3]."""
    examples = open_split(DataConfig(input_size=PHOTO_SIZE, synthetic_train=2, synthetic_val=6), "val")
    return [examples.load(i)[0] for i in range(len(examples))]


@pytest.fixture(scope="module")
def network(photos):
    tf.keras.utils.set_random_seed(0)
    return trained(small_network(5), 3, photos)


def trained(model: tf.keras.Model, exits: int | list[str], photos: list[np.ndarray]) -> MultiExitNetwork:
    """Random weights, and the statistics of batch normalisation that belong to them."""
    network = convert(model, exits, SIZE)
    network.add_heads([HeadSpec.parse(HEAD)], 0.9)
    run = tf.function(network.submodel(network.candidates), autograph=False)
    images = np.stack([fit(photo, SIZE, "letterbox") for photo in photos]).astype(np.float32)
    for _ in range(40):
        run(images, training=True)
    return network


@pytest.fixture(scope="module", params=["uint8", "float32"])
def bundle(request, network, photos, tmp_path_factory):
    """Three exits, each of the first two sure enough of some of the photos."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    choices = [ExitChoice(name, HEAD, THETA_PIX, 0.5) for name in EXITS[:2]]
    configuration = Configuration("input-dependent", True, (*choices, ExitChoice("final", "original")), None)
    Exporter(network, SIZE).bundle(folder, configuration, None, list("abcde"), InputSpec(*SIZE, request.param, "letterbox"))
    bundle = Bundle.load(folder)
    sure = np.array([[step.trace[-1].confidence for step in itertools.islice(Runner(bundle).refine(photo), 2)] for photo in photos])
    first = float(np.sort(sure[:, 0])[-2])  # exactly what an image has
    rest = sure[sure[:, 0] < first, 1]
    assert len(set(rest)) > 1
    thetas = (first, float(rest.max()), None)
    segments = [dataclasses.replace(each, theta_img=theta) for each, theta in zip(bundle.manifest.segments, thetas, strict=True)]
    write_manifest(folder, dataclasses.replace(bundle.manifest, segments=tuple(segments)))
    return Bundle.load(folder)


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets") / "bundle"
    android.write(bundle, folder)
    return folder


def test_the_folder_is_a_bundle_of_segments_with_their_names(bundle, folder, photos):
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, MODEL, android.SIGNATURES]
    made = CompiledModel.from_file(str(folder / MODEL)).get_signature_list()
    assert set(made) == {f"segment.{name}" for name in EXITS}
    names = json.loads((folder / android.SIGNATURES).read_text())
    assert {name: {kind: sorted(each) for kind, each in tensors.items()} for name, tensors in names.items()} == {
        name: {kind: sorted(each) for kind, each in tensors.items()} for name, tensors in made.items()
    }
    both = Runner(bundle), Runner(Bundle.load(folder))
    for photo in photos[:3]:
        first, second = (each.run(photo) for each in both)
        assert first.exit == second.exit
        np.testing.assert_array_equal(first.mask, second.mask)
    android.write(bundle, folder)  # an earlier export is replaced
    with pytest.raises(ValueError, match=r"--output: must be a folder that is new, empty or of an earlier export, with signatures\.json"):
        android.write(bundle, folder.parent)


# ---------------------------------------------------------------- the app's Kotlin


def stubs() -> dict[str, str]:
    """The Java of sdk_stubs.txt by class."""
    return dict(re.findall(r"^=== (\S+)\n(.*?)(?=^===|\Z)", (FILES / "sdk_stubs.txt").read_text(), re.MULTILINE | re.DOTALL))


def resources() -> dict[str, set[str]]:
    """Names in the app's resources by kind, as its class R has them."""
    layouts = {path.stem: path.read_text(encoding="utf-8") for path in (MAIN / "res/layout").glob("*.xml")}
    strings = (MAIN / "res/values/strings.xml").read_text(encoding="utf-8")
    ids = re.findall(r'"@\+id/(\w+)"', "".join(layouts.values()))
    return {"id": set(ids), "layout": set(layouts), "string": set(re.findall(r'<string name="(\w+)"', strings))}


def compile_kotlin(output: Path, libraries: list[Path], sources: list[Path]) -> None:
    """Without a warning."""
    classes = ":".join(str(path) for path in libraries)
    words = ["kotlinc", "-Werror", "-cp", classes, "-d", output, *sources]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def java(tmp_path_factory):
    """The stubs as Java files, and R."""
    folder = tmp_path_factory.mktemp("java")
    kinds = {kind: " ".join(f"public static final int {name} = 1;" for name in names) for kind, names in resources().items()}
    ids = "public final class R { " + " ".join(f"public static final class {kind} {{ {body} }}" for kind, body in kinds.items()) + " }"
    for name, body in {**stubs(), "org.messtf.example.R": ids}.items():
        path = folder / f"{name.replace('.', '/')}.java"
        path.parent.mkdir(parents=True, exist_ok=True)
        imports = "import android.content.*; import android.graphics.*; import androidx.annotation.*;"
        path.write_text(f"package {name.rpartition('.')[0]}; {imports}\n{body}", encoding="utf-8")
    return sorted(folder.rglob("*.java"))


@pytest.fixture(scope="session")
def classes(java, tmp_path_factory):
    """The app with bundled LiteRT and what the page has to paste, compiled, with what runs the runner here."""
    if not (shutil.which("kotlinc") and shutil.which("java") and JSON.exists()):
        pytest.skip(f"needs kotlinc, java and {JSON} of the Debian packages kotlin and libandroid-json-java")
    output = tmp_path_factory.mktemp("classes")
    (page,) = re.findall(r"^```kotlin\n(.*?)^```", (ROOT / "docs/android.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    pasted = output / "Pasted.kt"
    pasted.write_text(page, encoding="utf-8")
    sources = [pasted, *MAIN.rglob("*.kt"), *(MAIN.parent / "bundled").rglob("*.kt"), *FILES.glob("*.kt")]
    compile_kotlin(output, [JSON], [*sources, *java])
    return output


def test_both_flavours_have_the_same_sources():
    names = [sorted(path.relative_to(MAIN.parent / each) for path in (MAIN.parent / each).rglob("*.kt")) for each in ("bundled", "play")]
    assert names[0] == names[1] != []


@pytest.mark.full
def test_the_flavour_with_play_services_compiles(classes, java, tmp_path):
    compile_kotlin(tmp_path / "play", [JSON, classes], [*(MAIN.parent / "play").rglob("*.kt"), *java])


def members(text: str) -> dict[str, tuple[str, set[tuple[str, int]]]]:
    """Of TypeScript's declarations of Java classes: by class its superclass, and its members' names with their numbers of arguments."""
    classes, scope = {}, []
    for line in text.splitlines():
        depth = len(line) - len(line.lstrip("\t"))
        if found := re.match(r"\s*(?:declare|export) (?:abstract )?(module|class|interface) (\w+)", line):
            scope[depth:] = [found[2]]
            if found[1] != "module":
                parent = re.search(r" extends ([\w.]+)", line)
                classes[".".join(scope)] = (parent[1] if parent else "", set())
        elif found := re.match(r"\s*public (?:static )?(\w+)(?:<[^(]*>)?(\(.*\))?:?", line):
            at, arguments = ".".join(scope[:depth]), len(re.findall(r"\w+\??: ", found[2])) if found[2] else -1
            if at in classes:
                classes[at][1].add((found[1], arguments))
    return classes


def declared(name: str, body: str):
    """Of a stub's Java: (class, superclass, member, number of arguments), -1 for a constant, None for a class as a whole."""
    for inside in re.split(r"(?=(?:class|interface|enum) \w+[^{;]*\{)", body)[1:]:
        own = re.match(r"\w+ (\w+)", inside)[1]
        at = name if name.endswith(f".{own}") else f"{name}.{own}"
        yield at, None, None
        if inside.startswith("enum"):
            yield from ((at, value, -1) for value in re.findall(r"[A-Z_0-9]{2,}", inside))
        for line in re.split(r"[;{}]", re.sub(r"@\w+ |<[^<>]*>", "", inside).partition("{")[2]):
            if found := re.search(r"static final \w+(?:\.\w+)* (\w+) =", line):
                yield at, found[1], -1
            elif found := re.search(r"(\w+)\(([^)]*)\)", line):
                yield at, "constructor" if found[1] == own else found[1], len(found[2].split(",")) if found[2].strip() else 0


def test_the_stubs_of_android_are_in_its_sdk():
    """Names and numbers of arguments; types of arguments are not compared, as TypeScript has one for all numbers."""
    if not SDK.exists():
        pytest.skip(f"needs {SDK}, TypeScript made from the SDK's android.jar, which .ci/run lets npm fetch")
    classes, compared = members(SDK.read_text(encoding="utf-8")), 0
    for name, body in stubs().items():
        if not name.startswith("android."):
            continue
        for at, member, arguments in declared(name, body):
            assert at in classes, at
            if member is None:
                continue
            chain, seen = at, set()
            while chain in classes:
                seen |= classes[chain][1]
                chain = classes[chain][0]
            assert (member, arguments) in seen, (at, member, arguments)
            compared += 1
    assert compared > 80


def test_the_apps_resources_are_whole(tmp_path):
    """Manifest, layout and texts, built with Android's own tool against its resources; their names are those that the Kotlin has."""
    if not (shutil.which("aapt") and FRAMEWORK.exists()):
        pytest.skip(f"needs aapt and {FRAMEWORK} of the Debian packages aapt and android-framework-res")
    manifest = (MAIN / "AndroidManifest.xml").read_text(encoding="utf-8")
    (tmp_path / "AndroidManifest.xml").write_text(
        manifest.replace("<manifest ", '<manifest package="org.messtf.example" ', 1), encoding="utf-8"
    )
    words = ["aapt", "package", "-m", "-J", tmp_path, "-M", tmp_path / "AndroidManifest.xml", "-S", MAIN / "res", "-I", FRAMEWORK]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "org/messtf/example/R.java").read_text(encoding="utf-8")
    kinds = re.findall(r"static final class (\w+) \{(.*?)\}", made, re.DOTALL)
    assert {kind: set(re.findall(r"int (\w+)=", names)) for kind, names in kinds if kind != "attr"} == resources()
    names = re.findall(r"R\.(\w+)\.(\w+)", (MAIN / "kotlin/org/messtf/example/MainActivity.kt").read_text(encoding="utf-8"))
    used = {(kind, name) for kind, name in names} | {("string", name) for name in re.findall(r"@string/(\w+)", manifest)}
    layout = (MAIN / "res/layout/main.xml").read_text(encoding="utf-8")
    used |= {("string", name) for name in re.findall(r"@string/(\w+)", layout)}
    assert used == {(kind, name) for kind, names in resources().items() for name in names}  # none is there for nothing


class Remote:
    """Answers the app's runner on a JVM. Tensors are those of LiteRT in this process; time passes only while a segment runs.

    Attributes:
      clock: nanoseconds.
      asked: the kinds of questions since the last result.
      runs: the signatures that were run since then.
    """

    def __init__(self, classes: Path, folder: Path, durations: np.ndarray):
        self.clock, self.asked, self.runs = 0, [], []
        self._model, self._tensors, self._durations, self._image = CompiledModel.from_file(str(folder / MODEL)), [], durations, 0
        libraries = ":".join([str(classes), str(JSON), "/usr/share/java/kotlin-stdlib.jar"])
        words = ["java", "-cp", libraries, "org.messtf.replay.ReplayKt", folder / MANIFEST, folder / android.SIGNATURES]
        self._process = subprocess.Popen([str(word) for word in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._serve("next")

    def run(self, photo: np.ndarray, thresholds: str = "own", deadline: str = "none"):
        """What the app's runner makes of a photo: exit, trace, milliseconds and mask."""
        self.asked.clear()
        self.runs.clear()
        self._answer(f"{photo.shape[0]} {photo.shape[1]} {photo.tobytes().hex()} {thresholds} {deadline}")
        exit, trace, milliseconds, mask = self._serve("result")
        self._answer()
        self._serve("next")
        self._image += 1
        steps = [step.split("=") for step in trace.split(",")]
        trace = [
            (name, None if sure == "none" else float(sure), float(spent), *(None if each == "none" else int(each) for each in cells))
            for name, sure, spent, *cells in steps
        ]
        return exit, trace, float(milliseconds), np.frombuffer(bytes.fromhex(mask), np.uint8).reshape(photo.shape[:2])

    def end(self) -> None:
        self._answer("end")
        self._serve("close")
        self._answer()
        assert self._process.wait(timeout=60) == 0

    def _serve(self, until: str) -> list[str]:
        """Answers questions up to one of a kind, which is left open; returns its words."""
        while True:
            line = self._process.stdout.readline()
            assert line, "the JVM has ended"
            kind, *words = line.split()
            if kind == until:
                return words
            self.asked.append(kind)
            self._answer(getattr(self, f"_on_{kind}")(*words))

    def _answer(self, value: object = "") -> None:
        self._process.stdin.write(f"{value}\n")
        self._process.stdin.flush()

    def _on_clock(self) -> int:
        return self.clock

    def _on_input(self, signature: str, name: str) -> int:
        return self._keep(self._model.create_input_buffer_by_name(signature, name), self._model.get_input_tensor_details(signature)[name])

    def _on_output(self, signature: str, name: str) -> int:
        return self._keep(self._model.create_output_buffer_by_name(signature, name), self._model.get_output_tensor_details(signature)[name])

    def _keep(self, buffer, details) -> int:
        self._tensors.append((buffer, int(np.prod(details["shape"])), np.dtype(details["dtype"])))
        return len(self._tensors) - 1

    def _on_run(self, signature: str, *tensors: str) -> str:
        pairs = [[word.split("=") for word in words.split(",")] for words in tensors]
        self._model.run_by_name(signature, *({name: self._tensors[int(number)][0] for name, number in each} for each in pairs))
        self.runs.append(signature)
        self.clock += int(self._durations[self._image, EXITS.index(signature.split(".")[1])])
        return ""

    def _on_bytes(self, number: str, values: str) -> str:
        return self._write(number, np.frombuffer(bytes.fromhex(values), np.uint8))

    def _on_floats(self, number: str, values: str) -> str:
        return self._write(number, np.array(values.split(","), np.float32))

    def _write(self, number: str, values: np.ndarray) -> str:
        buffer, size, dtype = self._tensors[int(number)]
        assert (values.size, values.dtype) == (size, dtype)
        buffer.write(values)
        return ""

    def _on_int(self, number: str) -> int:
        return self._read(number, np.int32)[0]

    def _on_sure(self, number: str) -> str:
        return ",".join(map(str, self._read(number, np.float32)))

    def _on_mask(self, number: str) -> str:
        return self._read(number, np.uint8).tobytes().hex()

    def _read(self, number: str, dtype: type) -> np.ndarray:
        buffer, size, found = self._tensors[int(number)]
        assert found == dtype
        return buffer.read(size, found)


@pytest.fixture
def under_one_clock(monkeypatch) -> tuple[np.ndarray, list[int], list[str]]:
    """Durations of segments by image, by which Python's runner runs from now on; the number of the image, and what it ran."""
    durations = np.random.default_rng(0).integers(4_000_000, 12_000_000, (14, len(EXITS)))
    now, image, runs = [0], [0], []
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(perf_counter_ns=lambda: now[0]))
    original = engines.CompiledEngine.run

    def advancing(self, signature, inputs):
        now[0] += int(durations[image[0], EXITS.index(signature.split(".")[1])])
        runs.append(signature)
        return original(self, signature, inputs)

    monkeypatch.setattr(engines.CompiledEngine, "run", advancing)
    return durations, image, runs


def test_the_runner_on_a_jvm_decides_like_the_python_runner(classes, folder, photos, under_one_clock):
    """Masks, exits, confidences, times and the order of signatures, under one clock; the second run of an image is under a deadline."""
    deadlines = [1e6, 5.0, 12.0, 18.0, 21.0, 26.0]
    cases = [(photo, deadline) for photo, each in zip(photos, deadlines, strict=True) for deadline in (None, each)]
    durations, image, runs = under_one_clock
    remote = Remote(classes, folder, durations)
    expected = Runner(Bundle.load(folder))
    left = set()
    for image[0], (photo, deadline) in enumerate(cases):
        runs.clear()
        if deadline is None:
            result, (exit, trace, milliseconds, mask) = expected.run(photo), remote.run(photo)
        else:
            result = expected.run(photo, setting="anytime", deadline_ms=deadline)
            exit, trace, milliseconds, mask = remote.run(photo, thresholds="none,none,none", deadline=str(deadline))
        assert (exit, remote.runs) == (result.exit, runs)
        assert trace == [(step.exit, step.confidence, step.latency_ms, None, None) for step in result.trace]
        assert milliseconds == result.latency_ms
        np.testing.assert_array_equal(mask, result.mask)
        # Of an image, the host writes the pixels, and reads a number per decision and one mask: features stay where they are.
        moved = [kind for kind in remote.asked if kind not in ("run", "clock")]
        late = result.trace[-1].exit != exit and result.trace[-1].exit == "final"
        counts = sum(step.confidence is not None for step in result.trace)
        assert moved[0] in ("bytes", "floats") and moved[1:] == ["int"] * counts + ["mask"] * (1 + late)
        left.add((exit, len(trace), deadline is None))
    assert {each for each, _, own in left if own} == set(EXITS)
    assert len({each[:2] for each in left if not each[2]}) >= 3 and any(trace > EXITS.index(exit) + 1 for exit, trace, _ in left)

    hard = max(photos, key=lambda photo: len(expected.run(photo).trace))
    assert remote.run(hard)[0] == "final"
    assert len(remote.run(hard, thresholds="none,0.0,none")[1]) == 2  # other thresholds than the bundle's
    remote.end()


@pytest.mark.full
@pytest.mark.parametrize("two_strides", [False, True])
def test_on_a_jvm_cells_leave_as_in_python(classes, network, photos, tmp_path, under_one_clock, two_strides):
    """Budgets, active cells, masks and times; every second time under a deadline, which takes a smaller budget where there is one."""
    if two_strides:  # the answers of the exits differ in size
        network = trained(small_network(5, ((24, 2), (32, 2), (32, 1), (96, 2), (96, 1), (96, 1))), ["block_2_add", "block_4_add"], photos)
    pixels = (0.32, 0.45) if two_strides else (0.34, 0.34)
    choices = [ExitChoice(name, HEAD, *theta) for name, theta in zip(EXITS, zip(pixels, (0.3, 0.2), strict=True), strict=False)]
    regions = Regions("nearest", (2, 4), (2, 8))
    configuration = Configuration("input-dependent", False, (*choices, ExitChoice("final", "original")), None, regions=regions)
    Exporter(network, SIZE).bundle(tmp_path / "bundle", configuration, None, list("abcde"), InputSpec(*SIZE, "uint8", "letterbox"))
    android.write(Bundle.load(tmp_path / "bundle"), tmp_path / "assets")
    durations, image, runs = under_one_clock
    remote, expected, seen = Remote(classes, tmp_path / "assets", durations), Runner(Bundle.load(tmp_path / "assets")), set()
    for image[0], (photo, deadline) in enumerate(itertools.product(photos, (None, 17.0))):
        runs.clear()
        result = expected.run(photo, *(() if deadline is None else ("anytime", None, None, deadline)))
        exit, trace, milliseconds, mask = remote.run(photo, deadline=str(deadline or "none"))
        assert (exit, remote.runs, milliseconds) == (result.exit, runs, result.latency_ms)
        assert trace == [tuple(step._asdict()[name] for name in FIELDS) for step in result.trace]
        np.testing.assert_array_equal(mask, result.mask)
        seen |= {(step.budget, step.active) for step in result.trace[1:]}
        assert [kind for kind in remote.asked if kind in ("sure", "int")] == ["sure"] * sum(
            step.confidence is not None for step in result.trace
        )
    assert {budget for budget, _ in seen} == {2, 8} and len(seen) > 2
    remote.end()
