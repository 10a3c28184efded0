"""What all tests share: quiet logs, fixed seeds, and the data and weights that lie beside the repository."""

import gc
import importlib.util
import itertools
import os
import random
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_adbd
import numpy as np
import pytest
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Before anything imports TensorFlow. Its threads would only wait for those of the other test worker.
SINGLE_THREAD = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as `mess_tf` does, which tests may import later
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(dict.fromkeys(SINGLE_THREAD, "1"))
# The files that take longest, in the order in which the workers begin them: none is left with one of these alone at the end.
LONGEST = (
    "search",
    "train",
    "terminal",
    "pipeline",
    "export",
    "region_search",
    "networks",
    "recipes",
    "backends",
    "android",
    "replicas",
    "regions",
    "mediapipe",
    "web",
    "model",
    "backbones",
    "originals",
)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        full = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if item not in full]
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish():
    gc.freeze()  # what is imported stays until the end: no need to look through it again and again


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also the cases that a short form stands for, as in CI; marked `full`")
    parser.addoption("--kills", type=int, default=0, metavar="N", help="of the pipeline, at random moments; see tests/test_pipeline.py")
    parser.addoption(
        "--fuzz", type=int, default=60, metavar="N", help="mutations for each reader that tests/fuzz tries; the longest random searches"
    )


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)
    if tensorflow := sys.modules.get("tensorflow"):
        tensorflow.random.set_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder `shared` beside the repository, with data and weights too large for it."""
    return _existing(Path(__file__).resolve().parents[2] / "shared")


@pytest.fixture(scope="session")
def camvid_dir(shared_dir: Path) -> Path:
    """CamVid: {train,val}/{images,labels}."""
    return _existing(shared_dir / "data" / "camvid")


@pytest.fixture(scope="session")
def lite0_weights(shared_dir: Path) -> Path:
    """EfficientNet-Lite0's ImageNet weights, as `mess_tf.pretrained` writes them."""
    return _existing(shared_dir / "weights" / "efficientnet_lite0_imagenet.npz")


def _existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"needs data beside the repository: {path} does not exist")
    return path


@pytest.fixture(scope="session")
def adb_server(tmp_path_factory):
    """An adb server for fake phones only, which the real adb client of this process and its children talks to."""
    if not fake_adbd.have_adb():
        pytest.skip("needs the adb client: Debian package adb")
    server = fake_adbd.Server(tmp_path_factory.mktemp("adb"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.adb("start-server")
        yield server
        server.stop()


@pytest.fixture
def plug_in(adb_server, tmp_path_factory):
    """Makes fake phones and connects them: `plug_in("Pixel 8", shell_v2=False)`."""
    phones = []

    def make(model: str, **options):
        phones.append(fake_adbd.Phone(tmp_path_factory.mktemp("phone"), model, **options))
        adb_server.connect(phones[-1])
        return phones[-1]

    yield make
    for phone in phones:
        phone.close()
        adb_server.adb("disconnect", phone.serial)


@pytest.fixture
def tool(tmp_path):
    """Writes the stand-in benchmark_model of a kind, `tflite` or `litert`, and returns its path."""

    def make(kind: str = "tflite") -> Path:
        text = (Path(__file__).parent / "fake_benchmark_model.py").read_text()
        path = tmp_path / f"{kind}_benchmark_model"
        path.write_text(text.replace('KIND = "tflite"', f'KIND = "{kind}"'))
        return path

    return make


@pytest.fixture(scope="session")
def full(request) -> bool:
    """Of --full."""
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def fuzz_count(request) -> int:
    """Of --fuzz."""
    return request.config.getoption("--fuzz")


@pytest.fixture
def fuzz(request, fuzz_count) -> Callable[[st.SearchStrategy, Callable[[Any], None]], None]:
    """Calls a function with as many drawn values as `--fuzz` says, the same ones each time, and prints how many there were."""

    def run(strategy: st.SearchStrategy, function: Callable[[Any], None]) -> None:
        count = itertools.count()

        @settings(
            max_examples=fuzz_count,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def example(value):
            next(count)
            function(value)

        example()
        print(f"{request.node.name}: {next(count)} mutations")

    return run


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command `mess_tf.X` in this process, which has loaded everything; returns its exit code, stdout and stderr."""

    def call(name: str, *words) -> tuple[int, str, str]:
        before = set(flags.FLAGS)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        capsys.readouterr()
        try:
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning), pytest.raises(SystemExit) as end:
                runpy.run_module(f"mess_tf.{name}", run_name="__main__")  # warns that the module is there already
        finally:
            for flag in {*flags.FLAGS} - before:
                delattr(flags.FLAGS, flag)
            flags.FLAGS.unparse_flags()
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def cpp_runner(tmp_path_factory):
    """tflite/examples/cpp, built against the library in ai-edge-litert's wheel."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    library = Path(importlib.util.find_spec("ai_edge_litert").submodule_search_locations[0])
    path = tmp_path_factory.mktemp("cpp") / "mess_runner"
    source = Path(__file__).parents[1] / "tflite" / "examples" / "cpp" / "mess_runner.cc"
    words = [
        "g++",
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        source,
        "-o",
        path,
        f"-L{library}",
        "-l:libLiteRt.so",
        f"-Wl,-rpath,{library}",
    ]
    subprocess.run([str(word) for word in words], check=True)
    return path
