"""What the search predicted of a deployment against what the phone does.

Measured in one go, in turns: the bundle's segments, the original's, each chosen exit as one network, and that exit's prefix and head. So
the error of adding up prefix and head is told apart from the drift of the phone since the search.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from android_bench.session import Session
from mess_runtime.benchmark import created_by
from mess_runtime.bundle import FORMAT, Bundle, check, file_sha256, write_json
from mess_tf.files import Deployment


@dataclasses.dataclass(frozen=True)
class Sum:
    """The latency of one exit as a network of its own, and of its prefix and head added up, in ms; error: sum / whole - 1."""

    submodel: str
    whole_ms: float
    sum_ms: float
    error: float


@dataclasses.dataclass(frozen=True)
class Verification:
    """One phone.

    Attributes:
      device, soc, os, runtime, runtime_version, backend_obtained, threads, temperature_c: of its rows.
      predicted_ms, original_predicted_ms: mean latency of an image, from deployment.json.
      measured_ms: the same from the segments measured, with the predicted shares of images per exit.
      original_ms: measured latency of the original network.
      error: predicted / measured - 1.
      segments_ms: measured latency of each segment.
      sums: per chosen exit.
    """

    device: str
    soc: str
    os: str
    runtime: str
    runtime_version: str
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


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A deployment and the files that were exported for it.

    Attributes:
      deployment: what the search promised.
      segments: of the bundle, in order.
      original: the original network.
      parts: of each chosen exit `EXIT.HEAD`: the whole network, its prefix and its head.
    """

    deployment: Deployment
    segments: tuple[Path, ...]
    original: Path
    parts: dict[str, tuple[Path, Path, Path]]

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
        bundle, original = Bundle.load(workdir / "bundle"), Bundle.load(workdir / "bundle_original")
        wanted = [(each.exit, each.head, each.theta_pix, each.theta_img) for each in chosen.exits]
        got = [(each.exit, each.head, each.theta_pix, each.theta_img) for each in bundle.manifest.segments]
        check(wanted == got, f"{workdir / 'bundle'}: segments", f"those of {deployment}: {wanted}", got)
        submodels, candidates = workdir / "submodels", workdir / "candidates"
        parts = {}
        for each in bundle.manifest.segments:
            name = f"{each.exit}.{each.head}"
            whole = submodels / f"alone.{each.exit}.tflite"
            check(file_sha256(whole) == each.alone_sha256, str(whole), "of the same export as the bundle", "another file")
            parts[name] = whole, candidates / f"prefix.{each.exit}.tflite", candidates / f"head.{name}.tflite"
        whole = submodels / "original.tflite"
        (segment,) = original.manifest.segments
        check(file_sha256(whole) == segment.alone_sha256, str(whole), "of the same export as bundle_original", "another file")
        return cls(chosen, tuple(submodels / f"segment.{name}.tflite" for name in bundle.manifest.exits), whole, parts)

    def verify(self, session: Session) -> Verification:
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
        about = ("device", "soc", "os", "runtime", "runtime_version", "backend_obtained", "threads", "temperature_c")
        return Verification(
            **{name: getattr(row, name) for name in about},
            predicted_ms=predicted.cost_mean,
            measured_ms=measured,
            error=predicted.cost_mean / measured - 1,
            original_predicted_ms=self.deployment.original.cost,
            original_ms=ms(self.original),
            segments_ms=tuple(segments),
            sums=tuple(sums),
        )


def write(path: Path, verifications: Sequence[Verification]) -> None:
    """Writes what was found out, atomically."""
    devices = [dataclasses.asdict(each) for each in verifications]
    write_json(path, {"format": FORMAT, "created_by": created_by(), "devices": devices})


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
