"""Targets: what other runtimes than `mess_runtime` take, made of a bundle."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mess_runtime import bundle as bundles
from mess_runtime.engines import CPU
from mess_runtime.runner import Runner
from mess_runtime.verify import check_finite
from mess_tf.graph import flatbuffer


def check_output(output: Path, mark: str) -> None:
    """Raises ValueError where something else than an earlier export, which has `mark` in it, would be replaced."""
    bundles.check_writable("--output", output, folder=True)
    ours = not output.exists() or not any(output.iterdir()) or (output / mark).exists()
    bundles.check(ours, "--output", f"a folder that is new, empty or of an earlier export, with {mark} in it", str(output))


def opened(bundle: bundles.Bundle) -> Runner:
    """Returns what runs a bundle on the CPU.

    Raises:
      ValueError: its file is not what the manifest describes, or a value inside is not finite.
    """
    runner = Runner(bundle, backend=CPU)
    check_finite(bundle)
    return runner


def write_segments(
    bundle: bundles.Bundle, folder: Path, change: Callable[[flatbuffer.Graph], flatbuffer.Graph] = lambda graph: graph
) -> dict[str, flatbuffer.Graph]:
    """Writes the segments of a bundle, without its other signatures, into an empty folder, as a bundle that was proven on no backend.

    Args:
      bundle: to take them from.
      folder: that gets model and manifest.
      change: what is done to each graph; masks and confidences must stay the same, which is checked.

    Returns:
      The graphs by signature.

    Raises:
      ValueError: a mask or a confidence is another one, or see `opened`.
    """
    before = opened(bundle)
    graphs = flatbuffer.read_signatures(bundle.path.read_bytes())
    segments = {name: change(graph) for name, graph in graphs.items() if name.startswith(bundles.segment_signature(""))}
    content = flatbuffer.write(segments, bundle.manifest.precision != "fp32")
    (folder / bundles.MODEL).write_bytes(content)
    manifest = dataclasses.replace(bundle.manifest, sha256=bundles.sha256(content), size_bytes=len(content), verified=())
    bundles.write_manifest(folder, manifest)
    size = bundle.manifest.input
    noise = np.random.default_rng(0).integers(0, 256, (size.height, size.width, 3), np.uint8)
    after = Runner(bundles.Bundle.load(folder), backend=CPU)
    for first, second in itertools.zip_longest(before.refine(noise), after.refine(noise)):
        same = np.array_equal(first.mask, second.mask) and first.trace[-1].confidence == second.trace[-1].confidence
        bundles.check(same, f"{bundle.path}: {first.exit}", "the same on its own", "another mask or confidence")
    return segments
