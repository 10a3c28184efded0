"""`python -m android_bench` with the real adb client and phones that the tests provide."""

import json
import sys
import threading

import pytest

from android_bench import __main__ as command
from android_bench import adb, session
from mess_runtime.benchmark import LatencyTable
from mess_runtime.bundle import file_sha256, read_json

NAMES = ("prefix.exit1", "prefix.final", "head.exit1.fcn-r1-b0", "head.final.original")
FAST = ("--runs=5", "--min_seconds=0", "--repetitions=2", "--warmup_runs=1")


@pytest.fixture
def workdir(tmp_path):
    """Files to measure in the mode `canned`, where their content does not matter."""
    folder = tmp_path / "work"
    (folder / "candidates").mkdir(parents=True)
    for size, name in enumerate(NAMES, 1):
        (folder / "candidates" / f"{name}.tflite").write_bytes(name.encode() * 1000 * size)
    return folder


@pytest.fixture
def bench(monkeypatch, capfd):
    """Runs a command in this process and returns its exit code, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["android_bench", *map(str, words)])
        try:
            code = command.main()
        except SystemExit as error:
            code = error.code
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def canned(plug_in):
    """Plugs in a phone that runs no graphs."""

    def make(model="Pixel 8", **options):
        phone = plug_in(model, **options)
        phone.environment["FAKE_MODE"] = "canned"
        return phone

    return make


def rows_of(workdir, name="latency.json"):
    path = workdir / name
    return read_json(path, LatencyTable.from_json).rows if path.exists() else ()


def runs_of(workdir):
    path = workdir / "latency.runs.json"
    return read_json(path, session.RunLog.from_json).runs if path.exists() else ()


def test_two_phones_at_once(bench, canned, workdir, tool):
    phones = [canned("Pixel 8"), canned("Nexus 5", shell_v2=False)]
    code, out, err = bench("run", f"--workdir={workdir}", f"--tool={tool()}", *FAST)
    assert (code, err) == (0, "")
    rows = rows_of(workdir)
    assert {(row.device, row.submodel) for row in rows} == {(d, n) for d in ("Pixel_8-PIXEL8", "Nexus_5-NEXUS5") for n in NAMES}
    for row in rows:
        path = workdir / "candidates" / f"{row.submodel}.tflite"
        assert (row.sha256, row.size_bytes, row.runs) == (file_sha256(path), path.stat().st_size, 10)
        assert 200 + row.size_bytes // 100 <= row.p50_ms * 1e3 <= 206 + row.size_bytes // 100
        assert (row.backend_requested, row.backend_obtained, row.temperature_c) == ("xnnpack", "xnnpack", 41.0)
        assert row.runtime == "tflite benchmark_model" and row.runtime_version == f"sha256 {file_sha256(tool())[:16]}"
        assert row.p90_ms is None and 0.9 < row.drift < 1.1 and row.sustained_s == 0
    assert all(f"{phone.serial} repetition 2/2 8/8" in out for phone in phones) and out.rstrip().endswith("latency.json")
    for phone in phones:
        assert sorted(phone.benchmarked) == sorted(2 * [f"{file_sha256(path)}.tflite" for path in (workdir / "candidates").iterdir()])
        assert phone.benchmarked[:4] != phone.benchmarked[4:], "the order must differ between repetitions"
        assert phone.files() == []
