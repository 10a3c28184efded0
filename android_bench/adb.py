"""Phones over adb: the only module that starts processes.

Every command has a time limit, and every failure is an `AdbError` that names the device and the step. What reaches a shell on the phone
is either text written here or quoted. adb's own exit code cannot be trusted (a lost connection ends with 0, and old devices report none),
so each shell command prints its exit code last, and a missing one means that the connection was lost.
"""

import dataclasses
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from mess_runtime.bundle import file_sha256
from mess_runtime.files import printable, safe_name

FOLDER = "/data/local/tmp/mess_bench"
PID_FILE = "pid"
RESULT_FILE = "result.pb"
OUTPUT_FILE = "outputs.bin"
HOST = "adb"  # stands for the serial where no device is meant
APP = "org.tensorflow.lite.benchmark"
SHELL_SECONDS = 30.0
SLOWEST_PUSH = 250_000  # bytes per second
EXIT_CODE = re.compile(r"\n?__exit=(\d+)\s*\Z")
# Types of Android's Temperature that are temperatures: CPU, GPU, battery, skin, USB port, power amplifier, NPU.
THERMAL_TYPES = {"0", "1", "2", "3", "4", "5", "9"}


class AdbError(OSError):
    """A device, what was being done, and what went wrong."""

    def __init__(self, serial: str, step: str, problem: str):
        super().__init__(f"{serial}: {step}: {problem}")


class AdbMissingError(AdbError):
    """There is no adb on this machine."""


class NoDeviceError(AdbError):
    """adb sees no device, or not the one asked for."""


class UnauthorizedError(AdbError):
    """The phone has not allowed this machine yet."""


class OfflineError(AdbError):
    """adb lists the device but does not reach it."""


class DeviceLostError(AdbError):
    """The connection broke while something was running."""


class NoSpaceError(AdbError):
    """The phone's storage is full."""


class NotExecutableError(AdbError):
    """A program cannot be started on the phone."""


class WrongAbiError(AdbError):
    """A program is made for another processor."""


class PushError(AdbError):
    """A file is not on the phone as it is here."""


class TimedOutError(AdbError):
    """A command took longer than it may."""


# What adb or the phone say → what it is. The first match counts.
_CAUSES = (
    (r"unauthorized", UnauthorizedError, "the phone must allow this computer: unlock it and confirm USB debugging"),
    (r"no permissions", UnauthorizedError, "this user may not open the USB device: see developer.android.com on udev rules"),
    (r"no devices|device '.*' not found|unknown device", NoDeviceError, "no such device, see `adb devices`"),
    (r"No space left on device", NoSpaceError, f"the phone has no space left for {FOLDER}"),
    (r"device offline", OfflineError, "the device is offline: reconnect it"),
    (r"closed|connection reset|protocol fault|device still connecting|couldn't read|failed to read", DeviceLostError, "connection lost"),
)


def _error(serial: str, step: str, said: str) -> AdbError:
    """The typed error for what adb printed."""
    said = " ".join(said.split())[-300:]
    for pattern, kind, meaning in _CAUSES:
        if re.search(pattern, said, re.IGNORECASE):
            return kind(serial, step, f"{meaning} ({said})")
    return AdbError(serial, step, said or "failed without saying why")


def _adb(serial: str, step: str, words: Sequence[str], seconds: float) -> tuple[str, str, int]:
    """Runs adb and returns its stdout, stderr and exit code."""
    command = ["adb", *(["-s", serial] if serial != HOST else []), *words]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)
    except FileNotFoundError:
        raise AdbMissingError(HOST, step, "not found: install Android's platform-tools (Debian: apt-get install adb)") from None
    except subprocess.TimeoutExpired:
        raise TimedOutError(serial, step, f"no end after {seconds:.0f} s") from None
    stdout, stderr = (part.decode(errors="replace").replace("\r\n", "\n") for part in (done.stdout, done.stderr))
    return stdout, stderr, done.returncode


def list_devices() -> dict[str, str]:
    """Returns the state of every device that adb sees, by serial: `device`, `offline`, `unauthorized` or another word of adb.

    Raises:
      AdbMissingError: there is no adb.
    """
    stdout, stderr, code = _adb(HOST, "devices", ["devices"], SHELL_SECONDS)
    if code:
        raise _error(HOST, "devices", stderr)
    lines = stdout.partition("List of devices attached")[2].splitlines()
    return {line.split("\t")[0]: line.split("\t")[1] for line in lines if "\t" in line}


def open_device(serial: str, state: str) -> "Device":
    """Returns a device of `list_devices`.

    Raises:
      AdbError: it is in a state in which nothing can run, or does not answer.
    """
    if state != "device":
        known = any(re.search(pattern, f"device {state}", re.IGNORECASE) for pattern, *_ in _CAUSES)
        raise _error(serial, "connect", f"device {state}") if known else OfflineError(serial, "connect", f"its state is {state!r}")
    return Device(serial)


@dataclasses.dataclass(frozen=True)
class Thermal:
    """How warm a phone is; degrees Celsius.

    Attributes:
      battery_c: of the battery, None where it does not tell.
      battery_percent: charge, likewise.
      status: Android's throttling status, 0 (none) to 6, None before Android 10.
      sensors_c: readings by sensor name, without those that are no plausible temperature.
    """

    battery_c: float | None
    battery_percent: int | None
    status: int | None
    sensors_c: dict[str, float]

    @property
    def hottest_c(self) -> float | None:
        """The highest reading, None where there is none."""
        readings = [*self.sensors_c.values(), *([] if self.battery_c is None else [self.battery_c])]
        return max(readings, default=None)


def parse_thermal(text: str) -> Thermal:
    """Reads `dumpsys battery`, `dumpsys thermalservice` and `zone=TYPE VALUE` lines of the kernel, any of which may be missing."""

    def number(pattern: str) -> int | None:
        found = re.search(pattern, text, re.MULTILINE)
        return int(found[1]) if found else None

    sensors = {}
    for value, kind, name in re.findall(r"Temperature\{mValue=([-+0-9.eE]{1,30}), mType=(\d{1,3}), mName=([^,}]{0,99})", text):
        if kind in THERMAL_TYPES:
            sensors[name] = value
    for name, value in re.findall(r"^zone=(\S.{0,99}) (-?\d{1,9})$", text, re.MULTILINE):
        # Kernels count in thousandths, some in tenths, of a degree.
        sensors.setdefault(name, f"{int(value) / (1000 if abs(int(value)) >= 1000 else 10 if abs(int(value)) >= 150 else 1)}")
    readings = {}
    for name, value in sensors.items():
        try:
            if 0 < float(value) < 150:
                readings[name] = float(value)
        except ValueError:
            continue
    tenths = number(r"^[ \t]*temperature:[ \t]*(-?\d{1,5})[ \t\r]*$")
    return Thermal(
        None if not tenths else tenths / 10,
        number(r"^[ \t]*level:[ \t]*(\d{1,3})[ \t\r]*$"),
        number(r"^Thermal Status:[ \t]*(\d)[ \t\r]*$"),
        readings,
    )


@dataclasses.dataclass(frozen=True)
class Phone:
    """What a device is.

    Attributes:
      name: model and serial number, or model alone (see `Device.read_phone`), without spaces: the `device` of its latencies.
      soc, os: names as in latency.json.
      abis: of its processor, the preferred one first.
      max_khz: highest clock of each CPU, by number; empty where the phone does not tell.
    """

    name: str
    soc: str
    os: str
    abis: tuple[str, ...]
    max_khz: dict[int, int]

    def big_cpus(self) -> str | None:
        """Returns the taskset mask, in hexadecimal, of all CPUs but those with the lowest highest clock; None where none stands out."""
        slowest = min(self.max_khz.values(), default=0)
        big = [cpu for cpu, khz in self.max_khz.items() if khz > slowest]
        return f"{sum(1 << cpu for cpu in big):x}" if big else None


class Device:
    """One phone. All its files are in `FOLDER`; `clean` removes them."""

    def __init__(self, serial: str):
        self.serial = serial

    def shell(self, step: str, script: str, seconds: float | None = None) -> tuple[int, str]:
        """Runs a script and returns its exit code and its stdout and stderr together.

        Args:
          step: what for, to be named in errors.
          script: for the phone's shell; whatever is not constant in it must be quoted.
          seconds: time limit, by default `SHELL_SECONDS`.

        Raises:
          AdbError: the script did not run to its end.
        """
        stdout, stderr, _ = _adb(self.serial, step, ["shell", f"( {script} ) 2>&1; e=$?; echo; echo __exit=$e"], seconds or SHELL_SECONDS)
        found = EXIT_CODE.search(stdout)
        if not found:
            raise _error(self.serial, step, stderr.strip() or "connection closed")
        return int(found[1]), stdout[: found.start()]

    def read_phone(self, by_model: bool = False) -> Phone:
        """Asks the phone what it is.

        Args:
          by_model: name it by its model alone, so that all phones of a model are one device.

        Raises:
          AdbError: it does not answer.
        """
        clocks = 'cd /sys/devices/system/cpu && for c in cpu[0-9]*; do echo "clock=$c $(cat $c/cpufreq/cpuinfo_max_freq)"; done'
        _, text = self.shell("read properties", f"getprop; ({clocks}) 2>/dev/null")
        properties = {name: printable(value)[:200] for name, value in re.findall(r"^\[([^\]\n]{1,99})\]: \[(.*)\]$", text, re.MULTILINE)}

        def first(*names: str) -> str:
            return next((properties[name] for name in names if properties.get(name)), "unknown")

        model, number = first("ro.product.model", "ro.product.name"), properties.get("ro.serialno") or self.serial
        maker = properties.get("ro.soc.manufacturer", "")
        return Phone(
            name=safe_name(model if by_model else f"{model}-{number}"),
            soc=f"{maker} {first('ro.soc.model', 'ro.board.platform', 'ro.hardware')}".strip(),
            os=f"Android {first('ro.build.version.release')} (API {first('ro.build.version.sdk')})",
            abis=tuple(first("ro.product.cpu.abilist", "ro.product.cpu.abi").split(",")),
            max_khz={int(cpu): int(khz) for cpu, khz in re.findall(r"^clock=cpu(\d{1,3}) (\d{1,9})$", text, re.MULTILINE)},
        )

    def read_thermal(self) -> Thermal:
        """Reads battery, throttling status and thermal zones.

        Raises:
          AdbError: the phone does not answer.
        """
        zones = 'for z in /sys/class/thermal/thermal_zone*; do echo "zone=$(cat $z/type) $(cat $z/temp)"; done'
        _, text = self.shell("read temperatures", f"dumpsys battery; dumpsys thermalservice; {zones}")
        return parse_thermal(text)

    def push(self, files: Mapping[str, Path]) -> int:
        """Puts files into `FOLDER`, those that are not there with the same SHA-256 yet, and checks that they have arrived.

        Args:
          files: local path by plain name on the phone.

        Returns:
          Number of files that were copied.

        Raises:
          AdbError: a copy failed.
        """
        self._checked("make folder", f"mkdir -p {FOLDER} && chmod 755 {FOLDER}")
        wanted = {name: file_sha256(path) for name, path in files.items()}
        there = self._hashes(wanted)
        missing = [name for name in files if there.get(name) != wanted[name]]
        for name in missing:
            step, seconds = f"push {files[name].name}", SHELL_SECONDS + files[name].stat().st_size / SLOWEST_PUSH
            stdout, stderr, code = _adb(self.serial, step, ["push", str(files[name]), f"{FOLDER}/{name}"], seconds)
            if code:
                raise _error(self.serial, step, stderr + stdout)
        if missing:
            there = self._hashes(wanted)
            for name in missing:
                if there.get(name) != wanted[name]:
                    problem = f"SHA-256 must be {wanted[name]} on the phone, got {there.get(name, 'no such file')}"
                    raise PushError(self.serial, f"push {files[name].name}", problem)
        return len(missing)

    def pull(self, name: str) -> bytes | None:
        """Returns the content of a file in `FOLDER`, None if it cannot be read."""
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "file"
            _, stderr, code = _adb(self.serial, f"pull {name}", ["pull", f"{FOLDER}/{name}", str(local)], SHELL_SECONDS)
            if code and list_devices().get(self.serial) != "device":
                raise _error(self.serial, f"pull {name}", stderr)
            return local.read_bytes() if local.is_file() and not code else None

    def execute(self, step: str, program: str, arguments: Sequence[str], seconds: float, cpus: str | None = None) -> tuple[int, str]:
        """Runs a program that is in `FOLDER`, there, without old results; `stop` ends it should it still be running.

        Args:
          step: what for.
          program: plain name.
          arguments: each is quoted.
          seconds: time limit.
          cpus: taskset mask in hexadecimal, None for all.

        Returns:
          Exit code, and stdout and stderr together.

        Raises:
          WrongAbiError, NotExecutableError: it cannot be started.
          AdbError: it did not run to its end.
        """
        words = [*(["taskset", cpus] if cpus else []), f"./{program}", *arguments]
        start = f"echo $$ > {PID_FILE}; export LD_LIBRARY_PATH={FOLDER}; exec {shlex.join(words)}"
        prepare = f"cd {FOLDER} && rm -f {RESULT_FILE} {OUTPUT_FILE} && chmod 755 ./{shlex.quote(program)}"
        script = f"{prepare} && sh -c {shlex.quote(start)}; e=$?; rm -f {PID_FILE}; exit $e"
        code, text = self.shell(step, script, seconds)
        problem = " ".join(text.split())[-300:]
        if re.search(r"not executable: \d+-bit ELF|Exec format error|unexpected e_machine|CANNOT LINK EXECUTABLE", text):
            taken = ", ".join(self.read_phone().abis)
            raise WrongAbiError(self.serial, step, f"{program} is not for this phone, which takes {taken} ({problem})")
        if code in (126, 127):
            raise NotExecutableError(self.serial, step, f"{program} cannot be started ({problem})")
        return code, text

    def stop(self) -> None:
        """Ends a program of `execute` that an earlier, broken run has left."""
        self.shell("stop", f'[ ! -f {FOLDER}/{PID_FILE} ] || kill -9 "$(cat {FOLDER}/{PID_FILE})" 2>/dev/null; rm -f {FOLDER}/{PID_FILE}')

    def clean(self) -> None:
        """Ends what still runs and removes `FOLDER`."""
        self.stop()
        self._checked("clean", f"rm -rf {FOLDER}")

    def install(self, package: Path) -> None:
        """Installs the benchmark app."""
        step, seconds = f"install {package.name}", 120 + package.stat().st_size / SLOWEST_PUSH
        stdout, stderr, code = _adb(self.serial, step, ["install", "-r", "-d", "-g", str(package)], seconds)
        if code or "Success" not in stdout:
            said = f"{stdout} {stderr}"
            if "NO_MATCHING_ABIS" in said:
                taken = ", ".join(self.read_phone().abis)
                raise WrongAbiError(self.serial, step, f"this phone takes {taken} ({' '.join(said.split())[-300:]})")
            raise _error(self.serial, step, said)

    def uninstall(self) -> None:
        """Removes the benchmark app."""
        _adb(self.serial, "uninstall", ["uninstall", APP], SHELL_SECONDS)

    def start_app(self, step: str, arguments: Sequence[str]) -> None:
        """Empties the log and starts the benchmark app with arguments without spaces or quotes."""
        odd = [word for word in arguments if not re.fullmatch(r"[\w./=:,+-]+", word)]
        if odd:
            raise NotExecutableError(self.serial, step, f"the app takes only words of letters, digits and ./=:,+-, got {odd}")
        extra = shlex.quote('"' + " ".join(arguments) + '"')
        code, text = self.shell(step, f"logcat -c; am start -S -n {APP}/.BenchmarkModelActivity --es args {extra}")
        if code or "Error" in text:
            raise NotExecutableError(self.serial, step, f"the app does not start ({' '.join(text.split())[-300:]})")

    def read_log(self, step: str) -> str:
        """Returns what the benchmark app has logged since its start."""
        return self.shell(step, "logcat -d -s tflite:V litert:V AndroidRuntime:E")[1]

    def stop_app(self) -> None:
        """Ends the benchmark app."""
        self.shell("stop app", f"am force-stop {APP}")

    def _checked(self, step: str, script: str) -> None:
        code, text = self.shell(step, script)
        if code:
            raise _error(self.serial, step, text)

    def _hashes(self, names: Mapping[str, str]) -> dict[str, str]:
        """SHA-256 of those files in `FOLDER` that are there, by name. Phones before Android 8 have no sha256sum: their files are read."""
        code, text = self.shell("hash files", f"cd {FOLDER} && sha256sum ./* ", SHELL_SECONDS * 4)
        if code != 127:
            return {name: value for value, name in re.findall(r"^([0-9a-f]{64})\s+\*?\./(.+)$", text, re.MULTILINE)}
        listed = self.shell("list files", f"cd {FOLDER} && ls")[1].split("\n")
        found = {}
        for name in set(listed) & set(names):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "file"
                path.write_bytes(self.pull(name) or b"")
                found[name] = file_sha256(path)
        return found
