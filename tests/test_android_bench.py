"""`python -m android_bench` with the real adb client and phones that the tests provide.

The tests of the whole path run submodels of a tiny network; the others, where only the phone matters, files of any content.
"""

import dataclasses
import json
import sys
import threading
import types

import pytest
from fake_adbd import slow_down

from android_bench import __main__ as command
from android_bench import adb, session, verify
from mess_runtime.benchmark import LatencyRow, LatencyTable
from mess_runtime.bundle import file_sha256, read_json
from mess_runtime.verify import Report

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


def measure(bench, workdir, tool, *words):
    app = any(str(word).startswith("--app=") for word in words)
    return bench("run", f"--workdir={workdir}", *([] if app else [f"--tool={tool()}"]), *FAST, *words)


def test_two_phones_at_once(bench, canned, workdir, tool):
    phones = [canned("Pixel 8"), canned("Nexus 5", shell_v2=False)]
    code, out, err = measure(bench, workdir, tool)
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


# ---------------------------------------------------------------- what goes wrong, and the same command again


def test_one_serial_given_twice_is_one_phone(bench, canned, workdir, tool):
    phone = canned()
    code, _, err = measure(bench, workdir, tool, f"--serial={phone.serial}", f"--serial={phone.serial}")
    assert (code, err) == (0, "")
    assert len(runs_of(workdir)) == len(phone.benchmarked) == 2 * len(NAMES)


def test_by_model_another_phone_goes_on(bench, canned, workdir, tool):
    one, other = (canned(number=number) for number in ("A", "B"))
    code, _, err = measure(bench, workdir, tool, "--by_model", "--repetitions=1", f"--serial={one.serial}")
    assert (code, err) == (0, "")
    code, _, err = measure(bench, workdir, tool, "--by_model", "--repetitions=2", f"--serial={other.serial}")
    assert (code, err) == (0, "")
    assert len(one.benchmarked) == len(other.benchmarked) == len(NAMES)
    assert {row.device for row in rows_of(workdir)} == {"Pixel_8"} and len(rows_of(workdir)) == len(NAMES)


def test_two_phones_of_one_name_are_told_apart_or_refused(bench, canned, workdir, tool):
    phones = [canned() for _ in range(2)]
    code, _, err = measure(bench, workdir, tool)
    assert code == 1 and "device: must be another name than that of 127.0.0.1:" in err and "got 'Pixel_8-PIXEL8'" in err
    assert sorted(len(phone.benchmarked) for phone in phones) == [0, 2 * len(NAMES)]
    assert {row.runs for row in rows_of(workdir)} == {rows_of(workdir)[0].runs}


def test_what_a_phone_says_moves_no_cursor_and_names_no_path(bench, canned, workdir, tool):
    phone = canned("../../Pixel\x1b[2J8")
    code, out, err = measure(bench, workdir, tool)
    assert code == 0 and "\x1b" not in out + err
    assert {row.device for row in rows_of(workdir)} == {"_.._Pixel_2J8-.._.._PIXEL_2J8"}
    assert phone.benchmarked


def test_two_commands_keep_each_others_rows(tmp_path):
    """Another process writes the file between this one's reading and its writing."""
    row = LatencyRow("a", "0" * 64, 1, "", "", "", "tflite", "", "xnnpack", "xnnpack", 1, 1.0, None, 1.0, 3, None)
    ours, theirs = session.Store(tmp_path / "latency.json"), session.Store(tmp_path / "latency.json")
    theirs.add(rows=[dataclasses.replace(row, device="theirs")])
    ours.add(rows=[dataclasses.replace(row, device="ours")])
    assert {each.device for each in rows_of(tmp_path)} == {"ours", "theirs"}


def test_unplugged_in_a_run(bench, canned, adb_server, workdir, tool):
    phone, other = canned(), canned("Nexus 5")
    phone.runs_left = 5
    code, _, err = measure(bench, workdir, tool)
    broken = phone.benchmarked[5].removesuffix(".tflite")
    (name,) = [path.stem for path in (workdir / "candidates").iterdir() if file_sha256(path) == broken]
    assert code == 1 and err.startswith(f"android_bench: {phone.serial}: measure {name}: connection lost") and err.count("\n") == 1
    kept = [run for run in runs_of(workdir) if run.device == "Pixel_8-PIXEL8"]
    assert [f"{run.sha256}.tflite" for run in kept] == phone.benchmarked[:5]
    rows = rows_of(workdir)
    assert [row.device for row in rows].count("Pixel_8-PIXEL8") == 1 and [row.device for row in rows].count("Nexus_5-NEXUS5") == 4

    phone.runs_left = None
    adb_server.connect(phone)
    done = len(phone.benchmarked), len(other.benchmarked)
    assert measure(bench, workdir, tool)[0] == 0
    assert len(phone.benchmarked) - done[0] == 3 and len(other.benchmarked) == done[1] == 8
    assert [run for run in runs_of(workdir) if run.device == "Pixel_8-PIXEL8"][:5] == kept
    assert len(rows_of(workdir)) == 8 and phone.files() == []

    (workdir / "latency.json").unlink()
    assert measure(bench, workdir, tool)[0] == 0
    assert len(rows_of(workdir)) == 8 and len(phone.benchmarked) == done[0] + 3


def test_unplugged_in_a_push(bench, canned, adb_server, workdir, tool):
    phone = canned()
    phone.push_limit = 60_000
    code, _, err = measure(bench, workdir, tool, "--keep")
    assert code == 1 and err.startswith(f"android_bench: {phone.serial}: push ") and "connection lost" in err
    assert rows_of(workdir) == () == runs_of(workdir)
    first = len(phone.received)
    assert 0 < first < 5 and len(phone.files()) == first + 2  # the folder, and half of a file

    phone.push_limit = None
    adb_server.connect(phone)
    assert measure(bench, workdir, tool)[0] == 0
    assert len(phone.received) == len(set(phone.received)) == 5 and phone.files() == []


def test_full_storage(bench, canned, workdir, tool):
    phone = canned()
    phone.full = True
    code, _, err = measure(bench, workdir, tool)
    assert code == 1 and f"{phone.serial}: push " in err and "no space left for /data/local/tmp/mess_bench" in err
    assert rows_of(workdir) == () and phone.files() == []
    phone.full = False
    assert measure(bench, workdir, tool)[0] == 0


def test_file_that_arrives_broken(bench, canned, workdir, tool):
    phone = canned()
    phone.corrupt = True
    code, _, err = measure(bench, workdir, tool)
    assert code == 1 and f"{phone.serial}: push " in err and "SHA-256 must be" in err and phone.benchmarked == []
    phone.corrupt = False
    assert measure(bench, workdir, tool)[0] == 0


def test_unauthorized_phone_beside_another(bench, canned, adb_server, workdir, tool):
    good, bad = canned("Pixel 8"), canned("Nexus 5")
    bad.authorized = False
    adb_server.connect(bad)
    code, _, err = measure(bench, workdir, tool)
    assert code == 1 and err == (
        f"android_bench: {bad.serial}: connect: the phone must allow this computer: unlock it and confirm USB debugging "
        "(device unauthorized)\n"
    )
    assert {row.device for row in rows_of(workdir)} == {"Pixel_8-PIXEL8"} and len(good.benchmarked) == 8
    bad.authorized = True
    adb_server.connect(bad)
    assert measure(bench, workdir, tool)[0] == 0 and len(rows_of(workdir)) == 8 and len(good.benchmarked) == 8


@pytest.mark.parametrize(
    ("mode", "message"),
    [("garbage", "got 0"), ("canned,fail_late", "exit code 1 and said: Benchmarking failed."), ("canned,killed", "exit code 137")],
)
def test_tool_that_fails(bench, canned, workdir, tool, mode, message):
    phone = canned()
    phone.environment["FAKE_MODE"] = mode
    code, _, err = measure(bench, workdir, tool)
    lines = err.splitlines()
    assert code == 1 and len(lines) == 4 and lines[3] == f"android_bench: {phone.serial}: 3 submodels in a row failed"
    assert all(line.startswith(f"android_bench: {phone.serial}: measure ") and message in line for line in lines[:3])
    assert rows_of(workdir) == () == runs_of(workdir)
    phone.environment["FAKE_MODE"] = "canned"
    assert measure(bench, workdir, tool)[0] == 0 and len(rows_of(workdir)) == 4


def test_tool_that_hangs(bench, canned, workdir, tool, monkeypatch):
    phone = canned()
    phone.environment["FAKE_MODE"] = "hang"
    monkeypatch.setattr(session, "LOADING_S", 1.0)
    monkeypatch.setattr(session, "FAILURES_IN_A_ROW", 1)
    code, _, err = measure(bench, workdir, tool, "--max_seconds=0")
    assert code == 1 and "no end after 1 s" in err
    assert phone.process.wait(10) is not None and phone.files() == []
    phone.environment["FAKE_MODE"] = "canned"
    monkeypatch.setattr(session, "LOADING_S", 60.0)
    assert measure(bench, workdir, tool)[0] == 0 and len(rows_of(workdir)) == 4


def test_silent_fallback_is_never_the_gpu(bench, canned, workdir, tool):
    phone = canned()
    phone.environment["FAKE_MODE"] = "canned,no_gpu"
    code, _, err = measure(bench, workdir, tool, "--backend=gpu")
    assert code == 1 and f"{phone.serial}: measure: asked for gpu, ran on cpu: {', '.join(sorted(NAMES))}" in err
    assert {(row.backend_requested, row.backend_obtained) for row in rows_of(workdir)} == {("gpu", "cpu")}
    phone.environment["FAKE_MODE"] = "canned"
    assert measure(bench, workdir, tool, "--backend=gpu")[0] == 0
    assert {(row.backend_requested, row.backend_obtained) for row in rows_of(workdir)} == {("gpu", "gpu")}
    assert measure(bench, workdir, tool)[0] == 0
    assert {(row.backend_requested, row.backend_obtained) for row in rows_of(workdir)} == {("gpu", "gpu"), ("xnnpack", "xnnpack")}
    assert len(rows_of(workdir)) == 8


def test_backends_in_one_go(bench, canned, workdir, tool):
    canned()
    assert measure(bench, workdir, tool, "--backend=xnnpack,gpu", "--repetitions=1")[0] == 0
    rows = rows_of(workdir)
    assert len(rows) == 8 and {row.backend_requested for row in rows} == {"xnnpack", "gpu"}
    code, _, err = measure(bench, workdir, lambda: tool("litert"), "--backend=gpu")
    assert code == 1 and "rows of Pixel_8-PIXEL8: must be measured with" in err and "another --output" in err


def test_an_accelerator_that_takes_only_part(bench, canned, workdir, tool):
    canned().environment["FAKE_MODE"] = "canned,partial"
    code, out, err = measure(bench, workdir, tool, "--backend=gpu", "--repetitions=1")
    assert (code, err) == (0, "") and "WARNING: asked for gpu, the log shows something else: head.exit1.fcn-r1-b0 (gpu+cpu)," in out
    assert {row.backend_obtained for row in rows_of(workdir)} == {"gpu+cpu"}


def test_tool_for_another_processor(bench, canned, workdir, tmp_path):
    phone = canned()
    path = tmp_path / "benchmark_model"
    path.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(57))
    code, _, err = measure(bench, workdir, lambda: path)
    assert code == 1 and f"{phone.serial}: read usage: benchmark_model is not for this phone, which takes arm64-v8a, armeabi-v7a" in err
    path.write_text("#!/no/such/interpreter\n")
    code, _, err = measure(bench, workdir, lambda: path)
    assert code == 1 and f"{phone.serial}: read usage: benchmark_model cannot be started" in err
    path.write_text("#!/bin/sh\necho hello\n")
    code, _, err = measure(bench, workdir, lambda: path)
    assert code == 1 and f"{phone.serial}: neither TensorFlow Lite's nor LiteRT's benchmark_model" in err
    assert phone.files() == []


def test_stopped_by_the_user(canned, workdir, tool):
    phone = canned()
    arguments = command._parser().parse_args(["run", f"--workdir={workdir}", f"--tool={tool()}", *FAST])
    stopped, lines = threading.Event(), []

    def say(line):
        lines.append(line)
        if "3/8" in line:
            stopped.set()

    store = session.Store(workdir / "latency.json")
    device = adb.open_device(phone.serial, "device")
    with pytest.raises(adb.AdbError, match="the same command goes on from here"):
        session.Session(device, command._options(arguments, "xnnpack"), store, say, stopped).measure(
            sorted((workdir / "candidates").iterdir())
        )
    assert len(runs_of(workdir)) == 3 and phone.files() == []


@pytest.mark.parametrize("name", ["latency.json", "latency.runs.json"])
def test_broken_file_of_results(bench, canned, workdir, tool, name):
    canned()
    (workdir / name).write_text('{"format": 1, "rows"')
    code, _, err = measure(bench, workdir, tool)
    assert code == 1 and name in err
    assert (workdir / name).read_text() == '{"format": 1, "rows"'


# ---------------------------------------------------------------- heat


def test_a_hot_phone_must_cool(bench, canned, workdir, tool, monkeypatch):
    phone = canned()
    monkeypatch.setattr(session, "COOLDOWN_POLL_S", 0.1)
    phone.set_heat(45.0, 0, 60.0)
    code, _, err = measure(bench, workdir, tool, "--max_cooldown_s=0.2")
    assert code == 1 and f"{phone.serial}: cool down: after 0 s still too hot: battery 45.0 °C (at most 40)" in err
    assert phone.benchmarked == []
    phone.set_heat(30.0, 2, 60.0)
    read_thermal = adb.Device.read_thermal

    def read_once_hot(device):
        thermal = read_thermal(device)
        phone.set_heat(30.0, 0, 60.0)
        return thermal

    monkeypatch.setattr(adb.Device, "read_thermal", read_once_hot)
    code, out, _ = measure(bench, workdir, tool)
    assert code == 0 and "waiting to cool: battery 30.0 °C (at most 40), throttling status 2 (must be 0)" in out


def test_throttling_is_flagged(bench, canned, workdir, tool):
    phone = canned()
    phone.environment["FAKE_MODE"] = "canned,heating"
    code, out, _ = measure(bench, workdir, tool)
    assert code == 0 and "WARNING: throttled: the last repetition took 1." in out
    assert all(row.drift > 1.1 for row in rows_of(workdir))


def test_sustained_speed(bench, canned, workdir, tool):
    phone = canned()
    phone.set_heat(45.0, 1, 60.0)
    assert measure(bench, workdir, tool, "--sustained=0.01")[0] == 0
    largest = max((workdir / "candidates").iterdir(), key=lambda path: path.stat().st_size)
    assert phone.benchmarked[0] == f"{file_sha256(largest)}.tflite" and len(phone.benchmarked) == 9
    assert {(row.sustained_s, row.temperature_c) for row in rows_of(workdir)} == {(0.01, 60.0)}
    assert measure(bench, workdir, tool)[0] == 1, "rows of a cool phone must not stand beside them"


# ---------------------------------------------------------------- other ways to run


def test_benchmark_app(bench, canned, workdir, tool, tmp_path, monkeypatch):
    phone = canned()
    monkeypatch.setattr(session, "LOG_POLL_S", 0.1)
    program = tool()
    program.chmod(0o755)
    phone.environment["FAKE_APP"] = str(program)
    package = tmp_path / "app.apk"
    package.write_bytes(b"apk")
    code, _, err = measure(bench, workdir, tool, f"--app={package}")
    assert (code, err) == (0, "")
    rows = rows_of(workdir)
    assert {(row.runtime, row.runtime_version) for row in rows} == {("tflite benchmark app", f"sha256 {file_sha256(package)[:16]}")}
    assert [row.p50_ms * 1e3 // 100 for row in rows] == [(200 + row.size_bytes // 100) // 100 for row in rows]
    assert not (phone.root / "app").exists() and phone.files() == []
    phone.environment["FAKE_MODE"] = "canned,fail_late"
    code, _, err = measure(bench, workdir, tool, f"--app={package}", f"--output={workdir / 'again.json'}")
    assert code == 1 and "the tool failed and said: Benchmarking failed." in err and rows_of(workdir, "again.json") == ()


def test_big_cpus_and_other_flags(bench, canned, workdir, tool):
    phone = canned()
    assert measure(bench, workdir, tool, "--cpus=big", "--flag=--use_nnapi=false", "--threads=2")[0] == 0
    assert (phone.root / "cpus").read_text() == "c\n"
    (run, *_) = runs_of(workdir)
    assert run.conditions.settings.extra == ("--use_nnapi=false",) and run.conditions.settings.threads == 2
    code, _, err = measure(bench, workdir, tool, "--flag=--gpu_backend=cl")
    assert code == 1 and "does not know --gpu_backend" in err


def test_rows_of_other_cpus_or_flags_do_not_stand_side_by_side(bench, canned, workdir, tool):
    canned()
    assert measure(bench, workdir, tool, "--cpus=big")[0] == 0
    before = rows_of(workdir)
    for words in ([], ["--cpus=big", "--flag=--use_nnapi=false"]):
        code, _, err = measure(bench, workdir, tool, *words)
        assert code == 1 and "must be measured with" in err and "or in another --output, got" in err
    assert rows_of(workdir) == before


def test_big_needs_a_phone_that_tells_its_slowest_cpus(bench, canned, workdir, tool, monkeypatch):
    canned()
    monkeypatch.setattr(adb.Phone, "big_cpus", lambda self: None)
    code, _, err = measure(bench, workdir, tool, "--cpus=big")
    assert code == 1 and "cpus: must be all or a mask" in err and "got 'big'" in err


def test_kept_files_are_not_copied_again(bench, canned, workdir, tool, tmp_path):
    phone = canned()
    library = tmp_path / "lib it's.so"
    library.write_bytes(b"library")
    assert "6 files copied" in measure(bench, workdir, tool, "--keep", f"--library={library}")[1]
    assert "lib it's.so" in phone.files()
    assert "0 files copied" in measure(bench, workdir, tool, f"--library={library}")[1]
    assert phone.files() == []


def test_names_reach_no_shell(bench, canned, workdir, tool):
    phone = canned("$(touch pwned)`touch pwned`; touch pwned")
    (workdir / "candidates" / "$(touch pwned); 'touch pwned' `touch pwned`.tflite").write_bytes(b"model")
    assert measure(bench, workdir, tool)[0] == 0
    assert len(rows_of(workdir)) == 5
    assert list(phone.root.rglob("pwned")) == []


# ---------------------------------------------------------------- the other commands


def test_devices(bench, canned, adb_server):
    phone, locked = canned("Pixel 8"), canned("Nexus 5")
    code, out, err = bench("devices")
    assert (code, err) == (0, "") and (
        f"{phone.serial} Pixel_8-PIXEL8: Google Tensor, Android 14 (API 34), arm64-v8a, CPUs 1 x 2.80 GHz, 1 x 2.40 GHz, 2 x 1.80 GHz, "
        "battery 85 % 28.5 °C, throttling status 0\n"
    ) in out
    locked.authorized = False
    adb_server.connect(locked)
    code, out, err = bench("devices")
    assert code == 1 and f"{locked.serial}: connect: the phone must allow" in err and phone.serial in out


def test_nothing_to_talk_to(bench, adb_server, workdir, tool, monkeypatch, tmp_path):
    assert bench("devices")[::2] == (1, "android_bench: adb: devices: no phone is connected: plug one in, with USB debugging on\n")
    code, _, err = measure(bench, workdir, tool, "--serial=nobody")
    assert code == 1 and err == "android_bench: nobody: connect: no such device, there are: none\n"
    code, _, err = bench("run", f"--workdir={tmp_path}")
    assert code == 1 and "run mess_tf.export_tflite --candidates first" in err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "android_bench: adb: devices: not found: install" in bench("devices")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads=0"], "threads: must be at least 1, got 0"),
        (["--cpus=fast"], "cpus: must be all, big or a hexadecimal mask, got 'fast'"),
        (["--runs=0"], "num_runs: must be at least 1"),
        (["--warmup_runs=0"], "warmup_runs: must be at least 1"),
        (["--min_seconds=9", "--max_seconds=1"], "min_secs: must be in [0, max_secs = 1.0]"),
        (["--flag=use_gpu"], "extra: must be --name=value"),
        (["--repetitions=0"], "repetitions: must be at least 1"),
        (["--sustained=-1"], "sustained: must be at least 0"),
        (["--app=nowhere.apk"], "nowhere.apk: must be an existing file"),
        (["--app=a.apk", "--tool=litert"], "tool: must be left out with the app, got 'litert'"),
        (["--app=a.apk", "--library=a.so"], "library: must be left out with the app, which holds its own, got ['a.so']"),
        (["--sustained=1", "--max_cooldown_s=5"], "--max_cooldown_s: must be left out with --sustained"),
        (["--backend=quantum"], "backend: must be one of xnnpack, cpu, gpu, nnapi, npu, got 'quantum'"),
        (["--backend=xnnpack,quantum"], "backend: must be one of xnnpack, cpu, gpu, nnapi, npu, got 'quantum'"),
    ],
)
def test_arguments(bench, workdir, tool, words, message):
    code, _, err = measure(bench, workdir, tool, *words)
    assert code == 1 and message in err and err.count("\n") == 1


# ---------------------------------------------------------------- the whole path: run, search, export, verify

SIZE = (32, 64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network with random weights, and its work folder with candidates and stats.npz."""
    import keras

    from mess_tf.calibrate import calibrate
    from mess_tf.configs import DataConfig, HeadSpec
    from mess_tf.data.sources import open_split
    from mess_tf.export_tflite import export_candidates
    from mess_tf.graph.exporter import Exporter
    from mess_tf.network.model import convert

    examples = open_split(DataConfig(input_size=SIZE, synthetic_train=2, synthetic_val=3), "val")
    keras.utils.set_random_seed(0)
    image = x = keras.Input((None, None, 3))
    for stride in (2, 2, 1, 1):
        x = keras.layers.Conv2D(16, 3, stride, "same", activation="relu")(x)
    network = convert(keras.Model(image, keras.layers.Conv2D(examples.info.num_classes, 1)(x)), 2, SIZE)
    network.add_heads([HeadSpec.parse("fcn-r1-b0")], 0.9)
    workdir = tmp_path_factory.mktemp("trained")
    export_candidates(Exporter(network, SIZE), workdir / "candidates")
    calibrate(network, examples, "val", SIZE, workdir / "candidates", (0.2, 0.5)).save(workdir / "stats.npz")
    return network, examples.info.classes, workdir


def cheapest(workdir, device):
    """What the search finds for a phone when any accuracy is enough."""
    from mess_tf.files import Objective, Stats
    from mess_tf.optimise.search import search
    from mess_tf.optimise.space import latency_costs

    stats = Stats.load(workdir / "stats.npz")
    costs = latency_costs(stats, [dataclasses.asdict(row) for row in rows_of(workdir)], device)
    return search(stats, costs, Objective(costs.name, 0.0))


def test_from_phones_to_deployments(bench, plug_in, trained, tool):
    from mess_tf.export_tflite import export_deployment
    from mess_tf.graph.exporter import Exporter

    network, classes, workdir = trained
    fast, slow = plug_in("Pixel 8"), plug_in("Nexus 5", shell_v2=False)
    early, late = [], []
    for path in (workdir / "candidates").glob("[ph]*.*.tflite"):
        (early if ".exit1." in path.name else late).append(file_sha256(path))
    slow_down(fast, dict.fromkeys(late, 30))
    slow_down(slow, dict.fromkeys(early, 30))
    assert bench("devices")[0] == 0
    code, _, err = measure(bench, workdir, tool, "--details", "--repetitions=1")
    assert (code, err) == (0, "")
    chosen = {device: cheapest(workdir, device) for device in ("Pixel_8-PIXEL8", "Nexus_5-NEXUS5")}
    assert chosen["Pixel_8-PIXEL8"].exits[0].exit == "exit1" and chosen["Nexus_5-NEXUS5"].exits[0].exit == "final"

    details = read_json(workdir / "latency.runs.json", session.RunLog.from_json).details
    assert {each.sha256 for each in details} == {file_sha256(path) for path in (workdir / "candidates").glob("*.tflite")}
    assert len(details) == 2 * len({each.sha256 for each in details}) and {each.peak_memory_mb for each in details} == {74.2}
    assert all(op.count > 0 and op.mean_ms > 0 for each in details for op in each.op_times) and all(each.op_times for each in details)

    deployment = chosen["Pixel_8-PIXEL8"]
    deployment.save(workdir / "deployment.json")
    export_deployment(Exporter(network, SIZE), deployment, classes, workdir)
    litert = f"--tool={tool('litert')}"
    code, out, err = bench("verify", f"--workdir={workdir}", f"--serial={fast.serial}", litert, *FAST)
    assert (code, err) == (0, "")
    (device,) = json.loads((workdir / "verification.json").read_text())["devices"]
    assert device["device"] == "Pixel_8-PIXEL8" and device["runtime"] == "litert benchmark_model"
    assert device["predicted_ms"] == deployment.predicted.cost_mean and device["original_predicted_ms"] == deployment.original.cost
    assert device["measured_ms"] == pytest.approx(device["segments_ms"][0]) and device["original_ms"] > 0
    assert device["error"] == pytest.approx(device["predicted_ms"] / device["measured_ms"] - 1)
    (parts,) = device["sums"]
    assert parts["submodel"] == "exit1.fcn-r1-b0" and parts["error"] == pytest.approx(parts["sum_ms"] / parts["whole_ms"] - 1)
    assert f"prefix + head of exit1.fcn-r1-b0: {parts['sum_ms']:.3f} ms" in out
    assert fast.files() == [] and slow.files() == []

    chosen["Nexus_5-NEXUS5"].save(workdir / "deployment.json")
    code, _, err = bench("verify", f"--workdir={workdir}", litert, *FAST)
    assert code == 1 and "bundle: segments: must be those of" in err


@pytest.fixture(scope="module")
def two_exits(trained, tmp_path_factory):
    """A work folder with a bundle of two exits, where one of three images leaves early."""
    from mess_tf import configs
    from mess_tf.export_tflite import export_deployment
    from mess_tf.files import Certificate, Deployment, ExitChoice, Objective, Original, Predicted, Stats
    from mess_tf.graph.exporter import Exporter

    network, classes, elsewhere = trained
    workdir = tmp_path_factory.mktemp("two_exits")
    stats = Stats.load(elsewhere / "stats.npz")
    theta_img = float((stats.confident[0, :, 1, 0] / stats.pixels).max())
    deployment = Deployment(
        "input-dependent",
        False,
        (ExitChoice("exit1", "fcn-r1-b0", float(stats.theta_pix[1]), theta_img), ExitChoice("final", "original")),
        None,
        Objective("latency_ms", 0.0),
        Predicted(0.1, "latency_ms", 1.0, 1.0, (0.5, 0.5), {}, (0.1, 0.1), (1.0, 1.0), 3),
        Original(0.1, 1.0),
        Certificate(1, 1, {}, 0, 1.0, 0.0, 0.1, None),
        None,
        "",
        "exact",
        {},
    )
    deployment.save(workdir / "deployment.json")
    export_deployment(Exporter(network, SIZE), deployment, classes, workdir)
    (workdir / "candidates").symlink_to(elsewhere / "candidates")
    data = configs.DataConfig(input_size=SIZE, synthetic_train=2, synthetic_val=3)
    (workdir / "config.json").write_text(configs.to_json(configs.Config(data=data)))
    return workdir


QUICK = ("--runs=1", "--min_seconds=0", "--repetitions=1", "--warmup_runs=1")


@pytest.mark.full
def test_what_a_phone_makes_of_images(bench, plug_in, two_exits, tool):
    """Backend by backend against the CPU here and the labels; one that is wrong from the fourth inference on is found."""
    phone = plug_in("Pixel 8")
    phone.environment["FAKE_MODE"] = "wrong_gpu"
    words = ("verify", f"--workdir={two_exits}", f"--tool={tool()}", *QUICK, "--images=3", "--backend=xnnpack,gpu")
    code, out, err = bench(*words)
    assert code == 1 and phone.files() == []
    for line in err.splitlines():
        assert line.startswith(f"android_bench: {phone.serial}: verify gpu: segment.")
    assert "segment.exit1: mask differs from the CPU's by " in err and "(at first 0.00%, later " in err
    cpu, gpu = json.loads((two_exits / "verification.json").read_text())["devices"]
    assert (cpu["backend_requested"], gpu["backend_requested"]) == ("xnnpack", "gpu") and cpu["measured_ms"] > 0
    cpu, gpu = cpu["outputs"], gpu["outputs"]
    assert (cpu["ok"], cpu["images"], cpu["runs"], cpu["decisions"], cpu["faults"]) == (True, 3, 5, 0, [])
    assert all(each["worst"] == 0 for each in cpu["differences"])
    made = {(each["signature"], each["output"]) for each in cpu["differences"]}
    assert {("segment.exit1", "mask"), ("segment.exit1", "confident_pixels"), ("segment.final", "mask")} < made
    assert set(cpu["mious"]) == {"exit1", "final", "policy"} and all(here == there for here, there in cpu["mious"].values())
    assert gpu["ok"] is False and gpu["decisions"] == 1 and gpu["mious"]["exit1"][0] == cpu["mious"]["exit1"][0] != gpu["mious"]["exit1"][1]
    assert all(each["first"] == 0 < each["last"] for each in gpu["differences"] if each["output"] == "mask")
    refused = verify.refused(two_exits / "verification.json", "Pixel_8-PIXEL8", "")
    assert list(refused) == [("gpu", "fp32")] and refused["gpu", "fp32"].startswith("refused by verify on Pixel_8-PIXEL8: segment.exit1: ")
    table = [line.split() for line in out.splitlines()]
    at = next(row for row, cells in enumerate(table) if cells[:2] == ["device", "backend"])
    here, there, wrong = table[at + 1 : at + 4]
    assert here[:2] == ["here", "cpu"] and here[2:5] == there[2:5] and there[-1] == "same" and wrong[-1] == "DIFFERS"


@pytest.mark.parametrize(
    ("mode", "backend", "message"),
    [
        ("truncated", "xnnpack", "segment.exit1: val/00000_easy: the file of outputs must hold "),
        ("no_gpu", "gpu", "segment.exit1: val/00000_easy: asked for gpu, ran on cpu"),
    ],
)
def test_a_phone_that_gives_no_outputs(bench, plug_in, two_exits, tool, mode, backend, message):
    phone = plug_in("Pixel 8")
    phone.environment["FAKE_MODE"] = mode
    words = ("verify", f"--workdir={two_exits}", f"--tool={tool()}", *QUICK, "--images=2", f"--backend={backend}")
    code, out, err = bench(*words)
    assert code == 1 and f"{phone.serial}: verify {backend}: {message}" in err
    found = {each["backend_requested"]: each for each in json.loads((two_exits / "verification.json").read_text())["devices"]}
    outputs = found[backend]["outputs"]
    assert outputs["ok"] is False and outputs["mious"] == {} and len(outputs["faults"]) == 1
    assert out.splitlines()[-2].endswith("DIFFERS")


def test_what_images_have_shown_stays(tmp_path):
    """Until images show something else; other phones, backends and precisions stand beside it."""

    def verification(backend, precision="fp32", **outputs):
        report = Report("bundle", "", precision, backend, "", "", 1.0, 1, 5, (), None, {}, **outputs) if outputs else None
        about = dict.fromkeys(("device", "soc", "os", "runtime", "runtime_version"), "x")
        return verify.Verification(precision, **about, **ROW, backend_requested=backend, backend_obtained=backend, outputs=report)

    path = tmp_path / "verification.json"
    verify.write(path, [verification("gpu", faults=("wrong",)), verification("xnnpack", faults=())])
    verify.write(path, [verification("gpu", "int8", faults=())])
    verify.write(path, [verification("gpu")])
    found = {(each["backend_requested"], each["precision"]): each["outputs"]["ok"] for each in verify.read(path)}
    assert found == {("gpu", "fp32"): False, ("xnnpack", "fp32"): True, ("gpu", "int8"): True}
    assert verify.refused(path, "x", "") == verify.refused(path, "another", "x") == {("gpu", "fp32"): "refused by verify on x: wrong"}
    assert verify.refused(path, "another", "") == {} and verify.refused(tmp_path / "none.json", "x", "x") == {}
    own = verification("gpu", faults=())
    verify.write(path, [dataclasses.replace(own, device="another")])
    assert verify.refused(path, "another", "x") == {}, "what it has shown itself counts"
    assert verify.refused(path, "a third", "x") == {("gpu", "fp32"): "refused by verify on x: wrong"}
    verify.write(path, [own])
    assert all(each["outputs"]["ok"] for each in verify.read(path)) and verify.refused(path, "x", "x") == {}
    path.write_text('{"format": 1, "devices": [{}]}')
    with pytest.raises(ValueError, match=r"verification\.json: must be what `android_bench verify` writes, got KeyError 'device'"):
        verify.read(path)


ROW = {"threads": 1, "temperature_c": None, "segments_ms": (), "sums": ()}
ROW |= dict.fromkeys(("predicted_ms", "measured_ms", "error", "original_predicted_ms", "original_ms"), 1.0)


def test_images_are_asked_for_in_vain(bench, plug_in, two_exits, tool):
    plug_in("Pixel 8")
    words = ("verify", f"--workdir={two_exits}", *QUICK)
    for more, message in (
        (["--split=val"], "--split: must be left out without --images, got 'val'"),
        (["--images=4"], "--images: must be at most the 3 of the split, got 4"),
        (["--images=0"], "--images: must be at least 1, got 0"),
        (["--images=1", "--app=a.apk"], "--images: must be left out with --app"),
    ):
        code, _, err = bench(*words, *more)
        assert code == 1 and message in err and err.count("\n") == 1
    code, _, err = bench(*words, "--images=1", f"--tool={tool('litert')}")
    assert code == 1 and "does not know --input_layer, --input_layer_shape, --input_layer_value_files, --output_filepath" in err


def test_measured_latency_is_that_of_the_segments(tmp_path):
    """Input-dependent: the mean over the exits, weighted with the predicted shares of images."""
    from mess_tf.files import Certificate, Deployment, ExitChoice, Objective, Original, Predicted

    paths = [tmp_path / f"{name}.tflite" for name in ("one", "two", "original", "whole", "prefix", "head")]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]))
    deployment = Deployment(
        "input-dependent",
        False,
        (ExitChoice("exit1", "h", 0.5, 0.5), ExitChoice("final", "original")),
        None,
        Objective("latency_ms", 0.5),
        Predicted(0.6, "latency_ms", 4.0, 5.0, (0.75, 0.25), {}, (0.6, 0.6), (4.0, 4.0), 1),
        Original(0.7, 10.0),
        Certificate(1, 1, {}, 0, 4.0, 0.0, 0.1, None),
        None,
        "",
        "exact",
        {},
    )
    deployed = verify.Deployed(deployment, (paths[0], paths[1]), paths[2], {"exit1.h": tuple(paths[3:])}, tmp_path, "fp32")
    rows = {path: 2.0**number for number, path in enumerate(paths)}
    about = dict.fromkeys(("device", "soc", "os", "runtime", "runtime_version", "backend_requested", "backend_obtained"), "x") | {
        "threads": 1
    }
    made = [types.SimpleNamespace(sha256=file_sha256(path), p50_ms=ms, temperature_c=None, **about) for path, ms in rows.items()]
    phone = types.SimpleNamespace(measure=lambda files: made, device=types.SimpleNamespace(serial="ABC"), problems=[])
    verification = deployed.verify(phone)
    assert verification.measured_ms == 0.75 * 1 + 0.25 * (1 + 2) and verification.error == 4.0 / 1.5 - 1
    assert verification.sums == (verify.Sum("exit1.h", 8.0, 16.0 + 32.0, 5.0),)
    assert "bundle" in verify.describe(verification) and "+500.0%" in verify.describe(verification)
    made.pop()
    with pytest.raises(ValueError, match=r"ABC: verify: must be measured completely, got \"no latency of \['head.tflite'\]"):
        deployed.verify(phone)
