"""Command line: `python -m mess_runtime run|benchmark|inspect`."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image

from mess_runtime.bundle import SETTINGS, Bundle, Manifest, read_json, write_atomically, write_json

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mess_runtime", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="segment images: a palette PNG and a JSON line each", allow_abbrev=False)
    run.add_argument("bundle", type=Path)
    run.add_argument("images", nargs="+", type=Path, help="files, and folders whose images are all taken")
    run.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the masks")
    run.add_argument("--setting", choices=SETTINGS, help="default: what the bundle is made for")
    run.add_argument("--exit", help="where to leave, for budgeted")
    run.add_argument("--deadline_ms", type=float, help="for anytime")
    run.add_argument("--threads", type=int, default=1)
    run.set_defaults(function=_run)

    benchmark = commands.add_parser("benchmark", help="measure .tflite files on this machine", allow_abbrev=False)
    benchmark.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files, and folders whose .tflite are all measured")
    benchmark.add_argument("--output", required=True, type=Path, metavar="FILE", help="latency.json, merged if it exists")
    benchmark.add_argument("--threads", type=int, default=1)
    benchmark.add_argument("--runs", type=int, default=50, help="least number of samples per file")
    benchmark.add_argument("--min_seconds", type=float, default=0.5, help="least total time of a file's samples")
    benchmark.add_argument("--rounds", type=int, default=5, help="turns that the samples are spread over")
    benchmark.set_defaults(function=_benchmark)

    inspect = commands.add_parser("inspect", help="check a bundle and print what it holds", allow_abbrev=False)
    inspect.add_argument("bundle", type=Path)
    inspect.set_defaults(function=_inspect)
    return parser


def _expand(paths: list[Path], suffixes: set[str]) -> list[Path]:
    """Returns the files, with every folder replaced by its files of these suffixes, in order and without repetition."""
    files = {}
    for path in paths:
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path}: holds no file with the suffix {' or '.join(sorted(suffixes))}")
        files |= {file.resolve(): file for file in found}
    return list(files.values())


def _mask_paths(images: list[Path], output: Path) -> dict[Path, Path]:
    """Returns the mask's path of each image, after checking that no file is lost."""
    masks = {}
    for image in images:
        mask = output / f"{image.stem}.png"
        if mask in masks.values():
            raise ValueError(f"{image}: another image's mask is called {mask} already")
        masks[image] = mask
    overwritten = {mask.resolve() for mask in masks.values()} & {image.resolve() for image in images}
    if overwritten:
        raise ValueError(f"--output: must be a folder where masks do not replace images, got {output}")
    return masks


def _read_image(path: Path) -> np.ndarray:
    """Returns uint8 [h, w, 3], RGB."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image: {error}") from error


def _run(arguments: argparse.Namespace) -> int:
    from mess_runtime.runner import Runner

    bundle = Bundle.load(arguments.bundle)
    masks = _mask_paths(_expand(arguments.images, IMAGE_SUFFIXES), arguments.output)
    runner = Runner(bundle, arguments.threads)
    palette = [channel for colour in bundle.manifest.palette for channel in colour]
    arguments.output.mkdir(parents=True, exist_ok=True)
    failures = 0
    for path, mask_path in masks.items():
        try:
            image = _read_image(path)
        except ValueError as error:
            print(f"mess_runtime: {error}", file=sys.stderr)
            failures += 1
            continue
        result = runner.run(image, arguments.setting, arguments.exit, arguments.deadline_ms)
        picture = Image.fromarray(result.mask)
        picture.putpalette(palette)
        write_atomically(mask_path, lambda temporary, picture=picture: picture.save(temporary, format="PNG"))
        chosen = next(step for step in result.trace if step.exit == result.exit)
        line = {
            "image": str(path),
            "exit": result.exit,
            "confidence": chosen.confidence,
            "latency_ms": result.latency_ms,
            "segments": [dataclasses.asdict(step) for step in result.trace],
        }
        print(json.dumps(line), flush=True)
    print(arguments.output)
    return 1 if failures else 0


def _benchmark(arguments: argparse.Namespace) -> int:
    from mess_runtime.benchmark import LatencyTable, benchmark_files

    table = read_json(arguments.output, LatencyTable.from_json) if arguments.output.exists() else LatencyTable({}, ())
    rows = benchmark_files(
        _expand(arguments.paths, {".tflite"}),
        threads=arguments.threads,
        runs=arguments.runs,
        min_seconds=arguments.min_seconds,
        rounds=arguments.rounds,
        progress=lambda line: print(line, flush=True),
    )
    write_json(arguments.output, table.merged(rows).to_json())
    print(arguments.output)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    print(_describe(Bundle.load(arguments.bundle).manifest))
    return 0


def _describe(manifest: Manifest) -> str:
    """Returns a few lines about the bundle and a table of its segments."""
    created, predicted = manifest.created_by, manifest.predicted
    lines = [
        f"made by    mess_tf {created.mess_tf}, TensorFlow {created.tensorflow}, commit {created.git_commit}",
        f"input      {manifest.input.height} x {manifest.input.width} pixels",
        f"classes    {len(manifest.classes)}: {', '.join(manifest.classes)}",
        f"setting    {manifest.setting}",
    ]
    if predicted is not None:
        lines.append(f"predicted  mIoU {100 * predicted.miou:.2f} %, mean {predicted.cost.name} {predicted.cost.mean:.6g}")
    table = [("exit", "head", "file", "KiB", "MMACs", "theta_pix", "theta_img", "edge_aware")]
    for segment in manifest.segments:
        thetas = ["-" if theta is None else f"{theta:g}" for theta in (segment.theta_pix, segment.theta_img)]
        size, work = f"{segment.size_bytes / 1024:.1f}", f"{segment.macs / 1e6:.1f}"
        table.append((segment.exit, segment.head, segment.file, size, work, *thetas, "yes" if segment.edge_aware else "no"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines.append("")
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join(lines)


def main() -> int:
    """Runs a command and returns its exit code: 0, or 1 after an error, which is one line on stderr."""
    arguments = _parser().parse_args()
    try:
        return arguments.function(arguments)
    except (ImportError, OSError, ValueError) as error:
        print(f"mess_runtime: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
