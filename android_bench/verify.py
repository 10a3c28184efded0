"""What the search predicted of a deployment against what the phone does.

Latencies are measured in one go, in turns: the bundle's segments, the original's, each chosen exit as one network, and that exit's prefix
and head. So the error of adding up prefix and head is told apart from the drift of the phone since the search. With images, what the
segments make of them there is compared with what they make of them here, and with the labels.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from android_bench import outputs
from android_bench.session import Session
from mess_runtime.benchmark import created_by
from mess_runtime.bundle import FORMAT, Bundle, check, decode, file_sha256, read_json, write_json
from mess_runtime.files import locked
from mess_runtime.verify import Report, compare
from mess_tf.files import CANDIDATES, Deployment


@dataclasses.dataclass(frozen=True)
class Sum:
    """The latency of one exit as a network of its own, and of its prefix and head added up, in ms; error: sum / whole - 1."""

    submodel: str
    whole_ms: float
    sum_ms: float
    error: float


@dataclasses.dataclass(frozen=True)
class Photos:
    """Images uint8 [h, w, 3], labels uint8 [h, w] and names."""

    images: tuple[np.ndarray, ...]
    labels: tuple[np.ndarray, ...]
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Verification:
    """One phone and backend.

    Attributes:
      precision: of the bundle.
      device, soc, os, runtime, runtime_version, backend_requested, backend_obtained, threads, temperature_c: of its rows.
      predicted_ms, original_predicted_ms: mean latency of an image, from deployment.json.
      measured_ms: the same from the segments measured, with the predicted shares of images per exit.
      original_ms: measured latency of the original network.
      error: predicted / measured - 1.
      segments_ms: measured latency of each segment.
      sums: per chosen exit.
      outputs: what it makes of images against the CPU here, None without images.
    """

    precision: str
    device: str
    soc: str
    os: str
    runtime: str
    runtime_version: str
    backend_requested: str
    backend_obtained: str
    threads: int
    temperature_c: float | None
    predicted_ms: float
    measured_ms: float
    error: float
    original_predicted_ms: float
    original_ms: float
    segments_ms: tuple[float, ...]
    sums: tuple[Sum, ...]
    outputs: Report | None


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A deployment and the files that were exported for it.

    Attributes:
      deployment: what the search promised.
      segments: of the bundle, in order.
      original: the original network.
      parts: of each chosen exit `EXIT.HEAD`: the whole network, its prefix and its head.
      bundle: the folder.
      precision: of the bundle.
    """

    deployment: Deployment
    segments: tuple[Path, ...]
    original: Path
    parts: dict[str, tuple[Path, Path, Path]]
    bundle: Path
    precision: str

    @classmethod
    def load(cls, workdir: Path, deployment: Path) -> "Deployed":
        """Reads a deployment and checks that WORKDIR/bundle, bundle_original, submodels and candidates belong to it.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: the bundle is of another deployment, or the costs were not latencies.
        """
        chosen = Deployment.load(deployment)
        name = chosen.predicted.cost_name
        check(name == "latency_ms", f"{deployment}: predicted.cost_name", "latency_ms (search with --latency)", name)
        check(
            chosen.regions is None, f"{deployment}: regions", "null, as phones are measured where images leave as a whole", chosen.regions
        )
        bundle, original = Bundle.load(workdir / "bundle"), Bundle.load(workdir / "bundle_original")
        wanted = [(each.exit, each.head, each.theta_pix, each.theta_img) for each in chosen.exits]
        got = [(each.exit, each.head, each.theta_pix, each.theta_img) for each in bundle.manifest.segments]
        check(wanted == got, f"{workdir / 'bundle'}: segments", f"those of {deployment}: {wanted}", got)
        submodels, candidates = workdir / "submodels", workdir / chosen.named(CANDIDATES)
        parts = {}
        for each in bundle.manifest.segments:
            name = f"{each.exit}.{each.head}"
            whole = submodels / f"alone.{each.exit}.tflite"
            check(file_sha256(whole) == each.alone_sha256, str(whole), "of the same export as the bundle", "another file")
            parts[name] = whole, candidates / f"prefix.{each.exit}.tflite", candidates / f"head.{name}.tflite"
        whole = submodels / "original.tflite"
        (segment,) = original.manifest.segments
        check(file_sha256(whole) == segment.alone_sha256, str(whole), "of the same export as bundle_original", "another file")
        segments = tuple(submodels / f"segment.{name}.tflite" for name in bundle.manifest.exits)
        return cls(chosen, segments, whole, parts, bundle.folder, bundle.manifest.precision)

    def verify(self, session: Session, photos: Photos | None = None) -> Verification:
        """Measures everything on one phone.

        Raises:
          AdbError, BenchmarkError: see `Session.measure`; or a file could not be measured.
        """
        paths = [*self.segments, self.original, *(path for parts in self.parts.values() for path in parts)]
        rows = {row.sha256: row for row in session.measure(paths)}

        def ms(path: Path) -> float:
            return rows[file_sha256(path)].p50_ms

        lost = [path.name for path in paths if file_sha256(path) not in rows]
        check(not lost, f"{session.device.serial}: verify", "measured completely", f"no latency of {lost}: {session.problems}")
        segments = [ms(path) for path in self.segments]
        reached = [sum(segments[: k + 1]) for k in range(len(segments))]
        predicted = self.deployment.predicted
        measured = sum(rate * arrival for rate, arrival in zip(predicted.exit_rates, reached, strict=True))
        sums = []
        for name, (whole, prefix, head) in self.parts.items():
            total = ms(prefix) + ms(head)
            sums.append(Sum(name, ms(whole), total, total / ms(whole) - 1))
        row = rows[file_sha256(self.segments[0])]
        about = ("device", "soc", "os", "runtime", "runtime_version", "backend_requested", "backend_obtained", "threads", "temperature_c")
        return Verification(
            precision=self.precision,
            **{name: getattr(row, name) for name in about},
            predicted_ms=predicted.cost_mean,
            measured_ms=measured,
            error=predicted.cost_mean / measured - 1,
            original_predicted_ms=self.deployment.original.cost,
            original_ms=ms(self.original),
            segments_ms=tuple(segments),
            sums=tuple(sums),
            outputs=photos and self.compare(session, photos),
        )

    def compare(self, session: Session, photos: Photos) -> Report:
        """Runs the segments on images on one phone and here; what differs beyond the precision becomes a problem of the session.

        Raises:
          AdbError: the phone cannot be used any more.
        """
        exits = [path.stem.partition(".")[2] for path in self.segments]
        segments, backend = dict(zip(exits, self.segments, strict=True)), session.options.settings.backend
        report = compare(
            self.bundle,
            backend,
            lambda _, pixels: outputs.run_segments(session, segments, pixels, photos.names),
            photos.images,
            photos.labels,
            outputs.RUNS,
        )
        session.problems += [f"{session.device.serial}: verify {backend}: {problem}" for problem in _problems(report)]
        return report


def _problems(report: Report) -> list[str]:
    found = list(report.faults)
    for each in report.differences:
        if not each.ok:
            when = "at every inference" if each.first > each.limit else f"at first {each.first:.2%}, later {each.last:.2%}"
            found.append(f"{each.signature}: {each.output} differs from the CPU's by {each.worst:.2%}, at most {each.limit:.2%} ({when})")
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """The `devices` of a verification.json; none where there is no such file.

    Raises:
      ValueError: it is another file; the message begins with the path.
    """

    def from_json(value: Any) -> list[dict[str, Any]]:
        try:
            check(value["format"] == FORMAT, "format", str(FORMAT), value["format"])
            for each in value["devices"]:
                _key(each), each["soc"], each["outputs"] and (each["outputs"]["ok"], each["outputs"]["backend"])
            return value["devices"]
        except (TypeError, KeyError) as error:
            raise ValueError(f"must be what `android_bench verify` writes, got {type(error).__name__} {error}") from error

    return read_json(path, from_json) if path.exists() else []


def refused(path: Path, device: str, soc: str) -> dict[tuple[str, str], str]:
    """By backend and precision: what was found wrong with it on this kind of device.

    What a device has shown itself counts, and otherwise what others with the same processor have shown, any of which can refuse.

    Raises:
      ValueError: see `read`.
    """
    own, others = {}, {}
    for each in read(path):
        if each["outputs"] and (each["device"] == device or (soc and each["soc"] == soc)):
            of = own if each["device"] == device else others
            key = each["backend_requested"], each["precision"]
            if each["outputs"]["ok"]:
                of.setdefault(key, "")
            else:
                value = {name: value for name, value in each["outputs"].items() if name != "ok"}
                problem = _problems(decode(Report, value, f"{path}: outputs"))[0]
                of[key] = f"refused by verify on {each['device']}: {problem}"
    return {key: reason for key, reason in (others | own).items() if reason}


def _key(device: dict[str, Any]) -> tuple[str, ...]:
    return device["device"], device["backend_requested"], device["precision"]


def write(path: Path, verifications: Sequence[Verification]) -> None:
    """Writes what was found out, atomically, in place of what the file says of the same phones, backends and precisions.

    What images have shown stays until images show something else.
    """
    with locked(path):
        earlier = {_key(each): each for each in read(path)}
        for each in verifications:
            value = dataclasses.asdict(each) | {"outputs": each.outputs and each.outputs.to_json()}
            value["outputs"] = value["outputs"] or earlier.get(_key(value), value)["outputs"]
            earlier[_key(value)] = value
        write_json(path, {"format": FORMAT, "created_by": created_by(), "devices": list(earlier.values())})


def describe(verification: Verification) -> str:
    """Returns a few lines for people."""
    each = verification
    original_error = each.original_predicted_ms / each.original_ms - 1
    lines = [
        f"{each.device} ({each.soc}, {each.os}), {each.backend_obtained}, {each.threads} threads",
        f"{'':<12}{'predicted ms':>14}{'measured ms':>14}{'error':>9}",
        f"{'bundle':<12}{each.predicted_ms:>14.3f}{each.measured_ms:>14.3f}{each.error:>+9.1%}",
        f"{'original':<12}{each.original_predicted_ms:>14.3f}{each.original_ms:>14.3f}{original_error:>+9.1%}",
        f"{'speed-up':<12}{each.original_predicted_ms / each.predicted_ms:>14.2f}{each.original_ms / each.measured_ms:>14.2f}",
    ]
    lines += [
        f"prefix + head of {part.submodel}: {part.sum_ms:.3f} ms, whole {part.whole_ms:.3f} ms, {part.error:+.1%}" for part in each.sums
    ]
    return "\n".join(lines)


def describe_outputs(verifications: Sequence[Verification]) -> str:
    """Returns a table of what the phones made of the images, a row for each phone and backend, below one of the CPU here."""
    reports = [each.outputs for each in verifications if each.outputs]
    names = list(dict.fromkeys(name for report in reports for name in report.mious))
    head = ["device", "backend", *(f"{name} mIoU %" for name in names), "pixels", "decisions", ""]
    rows = [head]
    for report in reports:
        if report.mious and len(rows) == 1:
            rows.append(["here", "cpu", *(f"{100 * report.mious[name][0]:.2f}" for name in names), "", "", ""])
    for report in reports:
        mious = [f"{100 * report.mious[name][1]:.2f}" if name in report.mious else "-" for name in names]
        pixels = f"{report.different:.2%}" if report.differences else "-"
        decisions = "-" if report.decisions is None else f"{report.decisions} of {report.images}"
        rows.append([report.device, report.backend, *mious, pixels, decisions, "same" if report.ok else "DIFFERS"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
