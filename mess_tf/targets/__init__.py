"""Targets: what other runtimes than `mess_runtime` take, made of a bundle."""

from pathlib import Path

from mess_runtime import bundle as bundles


def check_output(output: Path, mark: str) -> None:
    """Raises ValueError where something else than an earlier export, which has `mark` in it, would be replaced."""
    bundles.check_writable("--output", output, folder=True)
    ours = not output.exists() or not any(output.iterdir()) or (output / mark).exists()
    bundles.check(ours, "--output", f"a folder that is new, empty or of an earlier export, with {mark} in it", str(output))


def check_whole_images(regions: bundles.Regions | None) -> None:
    """Raises ValueError where cells leave each for itself: of the targets, only the page runs that."""
    bundles.check(regions is None, "--target", "web for a deployment with regions", regions)
