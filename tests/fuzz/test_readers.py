"""Every reader of files and of what phones say, on damaged content: a typed error that names the file, or a value that holds what it must.

`python -m pytest tests/fuzz --fuzz=2000` is the long run.
"""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
from mutations import mutated_bytes, mutated_json
from test_datasets import coco_document

from android_bench import adb, benchmark_model, session
from benchmarks.paper_space import drawn_stats
from mess_runtime.benchmark import LatencyRow, LatencyTable
from mess_runtime.bundle import Manifest, read_json
from mess_tf import configs
from mess_tf.data import coco
from mess_tf.files import Deployment, Objective, Stats, read_arrays
from mess_tf.optimise.search import search
from mess_tf.optimise.space import macs_costs

ROW = LatencyRow("a", "0" * 64, 1, "Pixel", "Tensor", "14", "tflite", "1", "xnnpack", "xnnpack", 1, 1.0, 1.5, 1.1, 3, 40.0)


def small_stats() -> Stats:
    return drawn_stats(exits=2, heads=2, images=4, classes=3, thetas=2)


@pytest.fixture(scope="module")
def documents(request):
    """A valid document of every JSON file, with its reader."""
    stats = small_stats()
    deployment = search(stats, macs_costs(stats), Objective("macs", 0.0))
    manifest = next((request.config.rootpath / "models").glob("*/*/*/manifest.json")).read_bytes()

    def encoded(value) -> bytes:
        return json.dumps({"format": 1, **dataclasses.asdict(value)}).encode()

    return {
        "manifest.json": (manifest, lambda path: read_json(path, Manifest.from_json)),
        "latency.json": (
            encoded(LatencyTable({}, (ROW, dataclasses.replace(ROW, threads=2)))),
            lambda p: read_json(p, LatencyTable.from_json),
        ),
        "deployment.json": (encoded(deployment), Deployment.load),
        "config.json": (configs.to_json(configs.RECIPES["smoke"]).encode(), lambda path: configs.load_config(str(path.parent))),
        "latency.runs.json": (encoded(session.RunLog({}, (), ())), lambda path: read_json(path, session.RunLog.from_json)),
        "instances.json": (
            json.dumps(coco_document()).encode(),
            lambda path: [objects.read() for _, objects in coco.read_objects(path, training=False)],
        ),
    }


@pytest.mark.parametrize("name", ["manifest.json", "latency.json", "deployment.json", "config.json", "latency.runs.json", "instances.json"])
def test_json(fuzz, documents, tmp_path, name):
    content, read = documents[name]
    path = tmp_path / name
    path.write_bytes(content)
    read(path)

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        try:
            read(path)
        except ValueError as error:
            assert name in str(error)

    fuzz(mutated_json(content), check)


def test_statistics(fuzz, tmp_path):
    path = tmp_path / "stats.npz"
    small_stats().save(path)
    content = path.read_bytes()

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        try:
            Stats.load(path)
        except ValueError as error:
            assert "stats.npz" in str(error)

    fuzz(mutated_bytes(content), check)


@pytest.mark.parametrize("pack", [np.savez, np.savez_compressed])
def test_arrays(fuzz, tmp_path, pack):
    file, path = io.BytesIO(), tmp_path / "weights.npz"
    pack(file, **{"final.original/000.kernel": np.ones((3, 3), np.float32), "names": np.array(["a", "b"]), "n": np.int64(1)})

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        try:
            read_arrays(path)
        except ValueError as error:
            assert "weights.npz" in str(error)

    fuzz(mutated_bytes(file.getvalue()), check)


PHONE = b"""  level: 85
  temperature: 285
Thermal Status: 0
\tTemperature{mValue=33.6, mType=3, mName=VIRTUAL-SKIN, mStatus=0}
zone=cpu-0-0 45600
"""
RUN = b"""INFO: Explicitly applied GPU delegate, and the model graph will be completely executed by the delegate.
INFO: count=5 first=300 curr=200 min=200 max=300 avg=220 std=40
INFO: count=50 first=210 curr=205 min=200 max=260 avg=207.5 std=3
Operator-wise Profiling Info for Regular Benchmark Runs:
Summary by node type ==============================
\t[Node type]\t[count]\t[avg ms]\t[avg %]\t[cdf %]\t[mem KB]\t[times called]
\tCONV_2D\t5\t1.234\t61.7%\t61.7%\t0.000\t5
Overall peak memory footprint (MB) via periodic monitoring: 12.5
"""


def test_what_a_phone_tells_of_its_heat(fuzz):
    fuzz(mutated_bytes(PHONE), lambda damaged: adb.parse_thermal(damaged.decode("utf-8", "replace")))


def test_what_the_benchmark_tool_prints(fuzz):
    def check(damaged: bytes) -> None:
        text = damaged.decode("utf-8", "replace")
        benchmark_model.parse_details(text)
        with contextlib.suppress(benchmark_model.BenchmarkError):
            benchmark_model.parse(text, 0, None, "gpu")

    fuzz(mutated_bytes(RUN), check)
