"""The real adb client on phones that the tests provide, and what phones say about themselves."""

import os
import shutil
import time

import pytest

from android_bench import adb
from mess_runtime.bundle import file_sha256


@pytest.fixture(params=[True, False], ids=["shell_v2", "shell_v1"])
def phone(request, plug_in):
    """A phone of today, and one of 2015 whose shell reports no exit codes and that has no sha256sum."""
    return plug_in("Pixel 8", shell_v2=request.param)


@pytest.fixture
def device(phone):
    return adb.open_device(phone.serial, adb.list_devices()[phone.serial])


def test_what_a_phone_is(phone, device):
    told = device.read_phone()
    system = "Android 14 (API 34)" if phone.shell_v2 else "Android 6.0 (API 23)"
    assert (told.name, told.soc, told.os) == ("Pixel_8-PIXEL8", "Google Tensor", system)
    assert told.abis == ("arm64-v8a", "armeabi-v7a") and told.max_khz == {0: 1800000, 1: 1800000, 2: 2400000, 3: 2800000}
    thermal = device.read_thermal()
    assert (thermal.battery_c, thermal.battery_percent, thermal.status) == (28.5, 85, 0)
    assert thermal.sensors_c == {"VIRTUAL-SKIN": 33.6, "cpu thermal": 41.0} and thermal.hottest_c == 41.0


def test_numbers_that_no_phone_has_are_left_out(device, monkeypatch):
    monkeypatch.setattr(device, "shell", lambda *_: (0, "clock=cpu0 1800000\nclock=cpu99999999999 1800000\nclock=cpu1 " + "9" * 30 + "\n"))
    assert device.read_phone().max_khz == {0: 1800000}


def test_shell_gives_exit_codes_and_both_streams(device):
    assert device.shell("test", "echo out; echo err >&2; exit 3") == (3, "out\nerr\n")
    assert device.shell("test", "printf 'no newline'") == (0, "no newline")
    assert device.shell("test", "echo __exit=7; false") == (1, "__exit=7\n")


def test_push_copies_what_differs_and_checks_it(phone, device, tmp_path):
    names = ("a.tflite", "b'; touch pwned; '.tflite", "c d.so")
    files = {}
    for name in names:
        files[name] = tmp_path / f"local {len(files)}"
        files[name].write_bytes(os.urandom(300_000))
    assert device.push(files) == 3 and device.push(files) == 0
    files[names[0]].write_bytes(b"changed")
    assert device.push(files) == 1
    for name, path in files.items():
        assert device.pull(name) == path.read_bytes()
    assert sorted(phone.files()) == sorted([*names, "mess_bench"]) and device.pull("nothing") is None
    phone.corrupt = True
    files[names[0]].write_bytes(b"changed again")
    with pytest.raises(adb.PushError, match=f"{phone.serial}: push local 0: SHA-256 must be {file_sha256(files[names[0]])}"):
        device.push(files)
    device.clean()
    assert phone.files() == []


def test_programs_run_with_quoted_arguments(phone, device, tmp_path):
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nprintf "%s|" "$@"; echo "$LD_LIBRARY_PATH"; exit 5\n')
    device.push({"program": program})
    odd = ["--a=$(touch pwned)", "two words", "it's", '"; touch pwned', "*"]
    assert device.execute("run", "program", odd, 30) == (5, "|".join(odd) + "|/data/local/tmp/mess_bench\n")
    device.execute("run", "program", [], 30, cpus="c")
    assert (phone.root / "cpus").read_text() == "c\n"
    assert list(phone.root.rglob("pwned")) == [] and "pid" not in phone.files()


def test_programs_that_cannot_run(phone, device, tmp_path):
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(57))
    device.push({"program": program})
    with pytest.raises(adb.WrongAbiError, match=f"{phone.serial}: run: program is not for this phone, which takes arm64-v8a, armeabi-v7a"):
        device.execute("run", "program", [], 30)
    program.write_text("#!/no/such/interpreter\n")
    device.push({"program": program})
    with pytest.raises(adb.NotExecutableError, match="program cannot be started"):
        device.execute("run", "program", [], 30)


def test_a_command_has_a_time_limit_and_can_be_ended(phone, device, tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    device.push({"program": program})
    with pytest.raises(adb.TimedOutError, match=f"{phone.serial}: run: no end after 2 s"):
        device.execute("run", "program", [], 2)
    started, running = time.monotonic(), phone.process
    device.stop()
    assert running.wait(10) is not None and time.monotonic() - started < 30
    device.stop()  # nothing left to stop is no error


def test_a_slow_phone(phone, device, monkeypatch):
    phone.delay_s = 1.5
    assert device.shell("test", "echo slow") == (0, "slow\n")
    monkeypatch.setattr(adb, "SHELL_SECONDS", 1.0)
    with pytest.raises(adb.TimedOutError, match=f"{phone.serial}: read temperatures: no end after 1 s"):
        device.read_thermal()
    phone.delay_s = 0.0
    assert device.read_thermal().battery_c is not None


def test_a_lost_connection_is_no_success(phone, device):
    phone.runs_left = 0
    with pytest.raises(adb.DeviceLostError, match=f"{phone.serial}: measure: connection lost"):
        device.shell("measure", "sleep 1; echo --graph=x")
    phone.close()
    with pytest.raises(adb.AdbError, match=f"{phone.serial}: make folder: "):
        device.push({})


def test_full_storage(phone, device, tmp_path):
    (tmp_path / "local").write_bytes(b"content")
    phone.full = True
    with pytest.raises(adb.NoSpaceError, match="push local: the phone has no space left for /data/local/tmp/mess_bench"):
        device.push({"local": tmp_path / "local"})


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ("unauthorized", adb.UnauthorizedError),
        ("no permissions (user in plugdev group; are your udev rules wrong?)", adb.UnauthorizedError),
        ("offline", adb.OfflineError),
        ("recovery", adb.OfflineError),
    ],
)
def test_states_in_which_nothing_runs(state, error):
    with pytest.raises(error, match="ABC123: connect: "):
        adb.open_device("ABC123", state)


def test_unknown_device_and_no_adb(adb_server, monkeypatch, tmp_path):
    with pytest.raises(adb.NoDeviceError, match="nobody: test: no such device"):
        adb.Device("nobody").shell("test", "true")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("adb") is None
    with pytest.raises(adb.AdbMissingError, match="install Android's platform-tools"):
        adb.list_devices()


@pytest.mark.parametrize(
    ("clocks", "mask"),
    [((), None), ((18, 18, 18, 18), None), ((18,) * 4 + (24,) * 3 + (28,), "f0"), ((24, 18), "1")],
)
def test_big_cpus(clocks, mask):
    assert adb.Phone("p", "s", "o", (), dict(enumerate(clocks))).big_cpus() == mask


@pytest.mark.parametrize(
    ("text", "battery_c", "status", "hottest_c"),
    [
        ("", None, None, None),
        ("  temperature: 285\n", 28.5, None, 28.5),
        ("  temperature: 0\n", None, None, None),
        ("Thermal Status: 3\n\tTemperature{mValue=37.5, mType=0, mName=cpu0, mStatus=0}\n", None, 3, 37.5),
        ("\tTemperature{mValue=99.0, mType=8, mName=battery percent, mStatus=0}\n", None, None, None),
        ("\tTemperature{mValue=NaN, mType=0, mName=cpu0, mStatus=0}\n", None, None, None),
        ("zone=cpu-0-0 45600\nzone=battery 311\nzone=plain 38\nzone=broken -274000\nzone=max 2147483647\n", None, None, 45.6),
    ],
)
def test_temperatures(text, battery_c, status, hottest_c):
    thermal = adb.parse_thermal(text)
    assert (thermal.battery_c, thermal.status, thermal.hottest_c) == (battery_c, status, hottest_c)


@pytest.mark.parametrize(
    "text",
    [
        "zone=" + "a " * 200_000,
        "\n" * 200_000,
        "  level:" + " " * 200_000 + "x",
        "zone=a " + "9" * 10_000,
        "Temperature{mValue=" + "9" * 10_000 + ", mType=0, mName=a}",
    ],
)
def test_what_no_phone_says_takes_no_time(text):
    """These took minutes, or raised, when the patterns could match in many ways."""
    assert adb.parse_thermal(text) == adb.Thermal(None, None, None, {})
