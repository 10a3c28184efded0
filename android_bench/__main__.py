"""Command line: `python -m android_bench devices|run|verify`; see docs/phones.md."""

import argparse
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from android_bench import adb, benchmark_model, verify
from android_bench.session import Options, Session, Store, program_of
from mess_runtime import terminal
from mess_runtime.bundle import Bundle, check, check_writable
from mess_runtime.files import printable
from mess_tf import configs
from mess_tf.data.sources import open_split
from mess_tf.files import VERIFICATION, candidate_files

FAILURES = (adb.AdbError, benchmark_model.BenchmarkError, OSError, ValueError)


def _parser() -> terminal.ArgumentParser:
    parser = terminal.ArgumentParser(prog="android_bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("devices", help="list the phones that adb sees").set_defaults(function=_devices)

    run = commands.add_parser("run", help="measure WORKDIR/candidates")
    run.add_argument("--output", type=Path, metavar="FILE", help="default: WORKDIR/latency.json; merged if it exists")
    run.add_argument("--details", action="store_true", help="also find the time per operation and the peak memory")
    run.set_defaults(function=_run)

    verifying = commands.add_parser("verify", help="compare a deployment's prediction with the phone")
    verifying.add_argument("--output", type=Path, metavar="FILE", help="default: WORKDIR/verification.json")
    verifying.add_argument("--deployment", type=Path, metavar="FILE", help="default: WORKDIR/deployment.json")
    verifying.add_argument("--images", type=int, metavar="N", help="also compare so many images' masks with those made here and the labels")
    verifying.add_argument("--data_dir", default="", help="root of the data; default: where training found it")
    verifying.add_argument("--split", help="that the images are of; default: the validation split")
    verifying.set_defaults(function=_verify, details=False)

    for command in (run, verifying):
        command.add_argument("--workdir", required=True, type=Path, help="folder of a training")
        command.add_argument("--serial", action="append", help="measure on this phone only; may be repeated")
        command.add_argument("--tool", default=benchmark_model.TFLITE, help="tflite or litert (fetched once), or a benchmark_model file")
        command.add_argument("--app", type=Path, metavar="APK", help="measure with the benchmark app instead")
        command.add_argument("--library", type=Path, action="append", default=[], help="file to put beside the tool; may be repeated")
        choices = ", ".join(benchmark_model.BACKENDS)
        command.add_argument("--backend", default=benchmark_model.XNNPACK, help=f"of {choices}; several, with commas, one after another")
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--cpus", default="all", help="all, big, or a hexadecimal taskset mask")
        command.add_argument("--runs", type=int, default=20, help="least number of samples per repetition")
        command.add_argument("--min_seconds", type=float, default=0.5, help="least total time of a repetition's samples")
        command.add_argument("--max_seconds", type=float, default=60.0, help="a repetition ends after this time with the samples it has")
        command.add_argument("--warmup_runs", type=int, default=2)
        command.add_argument("--repetitions", type=int, default=3)
        command.add_argument("--flag", action="append", default=[], metavar="--NAME=VALUE", help="for the tool; may be repeated")
        command.add_argument("--sustained", type=float, default=0.0, metavar="SECONDS", help="measure after so long a time of full load")
        command.add_argument("--max_battery_c", type=float, help="wait while the battery is warmer; default: 40")
        command.add_argument("--max_cooldown_s", type=float, help="give up after waiting so long; default: 600")
        command.add_argument("--keep", action="store_true", help="leave the files on the phone, for the next time")
        command.add_argument("--by_model", action="store_true", help="all phones of a model are one device, as with rented ones")
    return parser


def _options(arguments: argparse.Namespace, backend: str) -> Options:
    for name in ("max_battery_c", "max_cooldown_s"):
        value = getattr(arguments, name)
        check(not arguments.sustained or value is None, f"--{name}", "left out with --sustained, which measures a warm phone", value)
    return Options(
        settings=benchmark_model.Settings(
            backend=backend,
            threads=arguments.threads,
            cpus=arguments.cpus,
            num_runs=arguments.runs,
            min_secs=arguments.min_seconds,
            max_secs=arguments.max_seconds,
            warmup_runs=arguments.warmup_runs,
            extra=tuple(arguments.flag),
        ),
        tool=arguments.tool,
        app=arguments.app,
        libraries=tuple(arguments.library),
        repetitions=arguments.repetitions,
        sustained_s=arguments.sustained,
        max_battery_c=40.0 if arguments.max_battery_c is None else arguments.max_battery_c,
        max_cooldown_s=600.0 if arguments.max_cooldown_s is None else arguments.max_cooldown_s,
        details=arguments.details,
        keep=arguments.keep,
        by_model=arguments.by_model,
        cache=Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mess_tf",
    )


def _say(text: str) -> None:
    for line in text.split("\n"):
        print(printable(line), flush=True)


def _complain(problem: object) -> None:
    terminal.complain(printable(f"android_bench: {problem}"))


def _connected(arguments: argparse.Namespace) -> tuple[list[Options], dict[str, str]]:
    """What is asked for of every backend, and adb's state of the phones to work with, by serial number; empty of those not there.

    Raises:
      NoDeviceError: there is none.
    """
    options = [_options(arguments, backend) for backend in dict.fromkeys(arguments.backend.split(","))]
    states = adb.list_devices()
    serials = dict.fromkeys(arguments.serial or states)  # one given twice is one phone
    if not serials:
        raise adb.NoDeviceError(adb.HOST, "devices", "no phone is connected: plug one in, with USB debugging on")
    return options, {serial: states.get(serial, "") for serial in serials}


def _open(serial: str, state: str) -> adb.Device:
    if not state:
        raise adb.NoDeviceError(serial, "connect", f"no such device, there are: {', '.join(adb.list_devices()) or 'none'}")
    return adb.open_device(serial, state)


def check_phones(arguments: argparse.Namespace) -> list[str]:
    """Checks before long work that `measure` can then begin, and fetches the tool; returns the names of the phones in latencies.

    Raises:
      AdbError, BenchmarkError, ValueError: a flag is wrong, or a phone cannot be reached or used.
    """
    options, states = _connected(arguments)
    names = []
    for serial, state in states.items():
        device = _open(serial, state)
        phone = device.read_phone(arguments.by_model)
        for each in options:
            program_of(device, phone, each)
        names.append(phone.name)
    return names


def _on_phones(arguments: argparse.Namespace, store: Store, work: Callable[[Session], Any]) -> tuple[list[Any], int]:
    """Runs `work` on all phones at once, or on those named, backend after backend.

    Returns:
      What it gave, and the number of problems, which are printed.
    """
    options, states = _connected(arguments)
    stopped = threading.Event()

    def one(serial: str) -> tuple[list[Any], list[str]]:
        done, problems = [], []
        try:
            device = _open(serial, states[serial])
        except FAILURES as error:
            return [], [str(error)]
        for each in options:
            if stopped.is_set():
                break
            session = Session(device, each, store, _say, stopped)
            try:
                done.append(work(session))
            except FAILURES as error:
                text = str(error)
                session.problems.append(text if serial in text else f"{serial}: {text}")
            problems += session.problems
        return done, problems

    with ThreadPoolExecutor(len(states)) as pool:
        futures = [pool.submit(one, serial) for serial in states]
        try:
            outcomes = [future.result() for future in futures]
        except KeyboardInterrupt:
            stopped.set()
            _complain("stopping after the current runs")
            outcomes = [future.result() for future in futures]
    problems = [problem for _, each in outcomes for problem in each]
    for problem in problems:
        _complain(problem)
    return [value for done, _ in outcomes for value in done], len(problems)


def _devices(arguments: argparse.Namespace) -> int:
    states = adb.list_devices()
    if not states:
        raise adb.NoDeviceError(adb.HOST, "devices", "no phone is connected: plug one in, with USB debugging on")
    usable = 0
    for serial, state in states.items():
        try:
            device = adb.open_device(serial, state)
            phone, thermal = device.read_phone(), device.read_thermal()
        except adb.AdbError as error:
            _complain(error)
            continue
        usable += 1
        clocks = sorted(phone.max_khz.values(), reverse=True)
        cpus = ", ".join(f"{clocks.count(khz)} x {khz / 1e6:.2f} GHz" for khz in dict.fromkeys(clocks)) or "unknown"
        about = f"{phone.name}: {phone.soc}, {phone.os}, {phone.abis[0]}, CPUs {cpus}"
        _say(f"{serial} {about}, battery {thermal.battery_percent} % {thermal.battery_c} °C, throttling status {thermal.status}")
    return 0 if usable == len(states) else 1


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads a command line, by default this process's.

    Raises:
      ValueError: naming the argument.
    """
    return _parser().parse_args(words)


def measure(arguments: argparse.Namespace) -> int:
    """The command `run`: measures on all phones at once and returns the number of problems, each of which is a line on stderr.

    Raises:
      AdbError, ValueError: nothing can be measured.
    """
    paths = candidate_files(arguments.workdir)
    if not paths:
        raise ValueError(
            f"{arguments.workdir / 'candidates'}: must hold .tflite files; run mess_tf.export_tflite --candidates first, got none"
        )
    output = arguments.output or arguments.workdir / "latency.json"
    check_writable("--output", output)
    rows, problems = _on_phones(arguments, Store(output), lambda session: session.measure(paths))
    for each in rows:
        _say(f"{each[0].device if each else 'a phone'}: {len(each)} latencies")
    return problems


def _run(arguments: argparse.Namespace) -> int:
    problems = measure(arguments)
    _say(str(arguments.output or arguments.workdir / "latency.json"))
    return 1 if problems else 0


def _verify(arguments: argparse.Namespace) -> int:
    deployed = verify.Deployed.load(arguments.workdir, arguments.deployment or arguments.workdir / "deployment.json")
    output = arguments.output or arguments.workdir / VERIFICATION
    check_writable("--output", output)
    verify.read(output)  # a broken file is found before the work
    photos = _photos(arguments, deployed)
    verifications, problems = _on_phones(arguments, Store(None), lambda session: deployed.verify(session, photos))
    if verifications:
        for each in verifications:
            _say(verify.describe(each))
        if photos:
            _say(verify.describe_outputs(verifications))
        verify.write(output, verifications)
        _say(str(output))
    return 1 if problems else 0


def _photos(arguments: argparse.Namespace, deployed: verify.Deployed) -> verify.Photos | None:
    """Images spread evenly over the split, None where none are asked for."""
    if arguments.images is None:
        for name in ("data_dir", "split"):
            value = getattr(arguments, name)
            check(not value, f"--{name}", "left out without --images", value)
        return None
    check(arguments.images >= 1, "--images", "at least 1", arguments.images)
    check(arguments.app is None, "--images", "left out with --app, which takes no inputs", arguments.images)
    config = configs.with_data_dir(configs.load_config(arguments.workdir), arguments.data_dir).data
    examples = open_split(config, arguments.split or config.val_split)
    check(arguments.images <= len(examples), "--images", f"at most the {len(examples)} of the split", arguments.images)
    classes = Bundle.load(deployed.bundle).manifest.classes
    check(examples.info.classes == classes, "--data_dir", f"data with the bundle's classes, {', '.join(classes)}", examples.info.classes)
    picked = [round(position) for position in np.linspace(0, len(examples) - 1, arguments.images)]
    images, labels = zip(*(examples.load(index) for index in picked), strict=True)
    return verify.Photos(images, labels, tuple(examples.names[index] for index in picked))


def main() -> int:
    """Runs a command and returns its exit code, see `terminal.run`; 1 after any problem of a phone, each one a line on stderr."""

    def command() -> int:
        arguments = parse()
        return arguments.function(arguments)

    return terminal.run("android_bench", command)


if __name__ == "__main__":
    sys.exit(main())
