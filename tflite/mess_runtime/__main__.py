"""Command line: `python -m mess_runtime run|verify|benchmark|inspect`."""

import argparse
import json
import sys
from pathlib import Path

from mess_runtime import terminal
from mess_runtime.bundle import PRECISIONS, SETTINGS, Bundle, Manifest, check, check_writable


def _parser() -> terminal.ArgumentParser:
    parser = terminal.ArgumentParser(prog="mess_runtime", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="segment images, videos and cameras: a palette PNG and a JSON line per frame")
    run.add_argument("bundle", type=Path)
    run.add_argument("sources", nargs="+", help="image and video files, folders whose images are all taken, camera:NUMBER")
    run.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the masks")
    run.add_argument("--overlay", action="store_true", help="also write NAME.overlay.png, the mask over the image")
    run.add_argument("--frames", type=int, metavar="N", help="stop a video or camera after N frames")
    run.add_argument("--setting", choices=SETTINGS, help="default: what the bundle is made for")
    run.add_argument("--exit", help="where to leave, for budgeted")
    run.add_argument("--latency", type=Path, metavar="FILE", help="latency.json with the alone.EXIT submodels, for --latency_budget_ms")
    run.add_argument("--latency_budget_ms", type=float, help="for budgeted: the best exit that keeps it")
    run.add_argument("--deadline_ms", type=float, help="for anytime")
    run.add_argument(
        "--hold_latency", action="store_true", help="for input-dependent: no more images go on than expected, however unsure the network is"
    )
    run.add_argument("--threads", type=int, default=1)
    run.add_argument("--engine", choices=("compiled", "interpreter"), help="default: the faster of those installed")
    run.add_argument("--backend", choices=("cpu", "gpu"), help="default: the one that the search chose, if it is there")
    run.set_defaults(function=_run)

    verify = commands.add_parser(
        "verify", help="compare a file's outputs on a backend with those on the CPU; 1 if they differ, 2 where that cannot be told"
    )
    verify.add_argument("path", type=Path, help="bundle or .tflite")
    verify.add_argument("images", nargs="*", type=Path, help="files and folders; images/NAME.jpg may have labels/NAME.png; default: noise")
    verify.add_argument("--backend", choices=("cpu", "gpu"), required=True)
    verify.add_argument("--runs", type=int, default=5, help="of the first image")
    verify.add_argument("--precision", choices=PRECISIONS, help="of a .tflite; a bundle knows it")
    verify.add_argument("--record", action="store_true", help="if all is well, say so in the bundle's manifest")
    verify.set_defaults(function=_verify)

    benchmark = commands.add_parser("benchmark", help="measure .tflite files on this machine")
    benchmark.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files, and folders whose .tflite are all measured")
    benchmark.add_argument("--output", required=True, type=Path, metavar="FILE", help="latency.json, merged if it exists")
    benchmark.add_argument("--threads", type=int, default=1)
    benchmark.add_argument("--runs", type=int, default=50, help="least number of samples per file")
    benchmark.add_argument("--min_seconds", type=float, default=0.5, help="least total time of a file's samples")
    benchmark.add_argument("--rounds", type=int, default=5, help="turns that the samples are spread over")
    benchmark.set_defaults(function=_benchmark)

    inspect = commands.add_parser("inspect", help="check a bundle and print what it holds")
    inspect.add_argument("bundle", type=Path)
    inspect.set_defaults(function=_inspect)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from mess_runtime.benchmark import LatencyTable
    from mess_runtime.frames import UnreadableError, Writer, is_film, open_sources
    from mess_runtime.runner import Runner

    used = arguments.latency is None or arguments.latency_budget_ms is not None
    check(used, "--latency", "left out without --latency_budget_ms", str(arguments.latency))
    check_writable("--output", arguments.output, folder=True)
    bundle = Bundle.load(arguments.bundle)
    sources = open_sources(arguments.sources, arguments.frames)
    films = [path for path, _ in sources if is_film(path)]
    check(arguments.frames is None or films, "--frames", "left out without a video or camera", arguments.frames)
    check(arguments.frames is None or arguments.frames > 0, "--frames", "at least 1", arguments.frames)
    writer = Writer(arguments.output, bundle.manifest.palette, arguments.overlay, [path for path, _ in sources])
    rows = LatencyTable.load(arguments.latency).rows if arguments.latency else ()
    runner = Runner(bundle, arguments.threads, arguments.engine, rows, arguments.hold_latency, arguments.backend)
    if runner.backend != "cpu" and runner.backend not in {each.backend for each in bundle.manifest.verified}:
        command = f"python -m mess_runtime verify {arguments.bundle} --backend={runner.backend}"
        terminal.complain(f"mess_runtime: the manifest records no proof of the masks on {runner.backend}: {command}")
    options = arguments.setting, arguments.exit, arguments.latency_budget_ms, arguments.deadline_ms
    runner.plan(*options)  # what is wrong with them is said before any image is read
    broken, late = [], 0
    for source, frames in sources:
        try:
            for name, image in frames:
                result = runner.run(image, *options)
                writer.write(name, image, result.mask)
                line = {
                    "image": str(source),
                    "mask": f"{name}.png",
                    "exit": result.exit,
                    "confidence": next(step.confidence for step in result.trace if step.exit == result.exit),
                    "latency_ms": result.latency_ms,
                    **({} if arguments.deadline_ms is None else {"deadline_missed": result.latency_ms > arguments.deadline_ms}),
                    "segments": [step.to_json() for step in result.trace],
                }
                late += line.get("deadline_missed", False)
                print(json.dumps(line), flush=True)
        except UnreadableError as error:
            terminal.complain(f"mess_runtime: {terminal.one_line(error)}")
            broken.append(source)
    if late:
        terminal.complain(f"mess_runtime: {late} of {writer.written} masks came after the deadline of {arguments.deadline_ms:g} ms")
    if broken and len(sources) > 1:
        terminal.complain(f"mess_runtime: {len(broken)} of {len(sources)} sources could not be read: a line above for each")
    if writer.written:
        print(arguments.output)
    return 1 if broken else 0


def _verify(arguments: argparse.Namespace) -> int:
    from mess_runtime import engines, verify
    from mess_runtime.frames import expand, read_label
    from mess_runtime.images import SUFFIXES, read_photo

    check(not arguments.record or not arguments.path.is_file(), "--record", "left out for a file without manifest", str(arguments.path))
    paths = expand(arguments.images, SUFFIXES)
    images = [read_photo(path) for path in paths]
    labels = [read_label(path, image.shape[:2]) for path, image in zip(paths, images, strict=True)]
    try:
        report = verify.verify(arguments.path, arguments.backend, images, labels, arguments.runs, arguments.precision)
    except engines.AbsentError as error:
        terminal.complain(f"mess_runtime: --{terminal.one_line(error)}")  # an error of `backend`
        return 2
    if arguments.record and report.ok:
        verify.record(arguments.path, report)
    print(report.table())
    print(json.dumps(report.to_json()))
    return 0 if report.ok else 1


def _benchmark(arguments: argparse.Namespace) -> int:
    from mess_runtime.benchmark import measure
    from mess_runtime.frames import expand

    check_writable("--output", arguments.output)
    measure(
        expand(arguments.paths, {".tflite"}),
        arguments.output,
        threads=arguments.threads,
        runs=arguments.runs,
        min_seconds=arguments.min_seconds,
        rounds=arguments.rounds,
    )
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
        f"input      {manifest.input.height} x {manifest.input.width} pixels, {manifest.input.dtype}, {manifest.input.resize}",
        f"model      {manifest.size_bytes / 1024:.1f} KiB, {manifest.precision}, policy {manifest.fidelity}",
        f"classes    {len(manifest.classes)}: {', '.join(manifest.classes)}",
        f"setting    {manifest.setting}",
    ]
    if (regions := manifest.regions) is not None:
        rows, columns = regions.grid
        cells = f"{rows} x {columns} cells leave each for itself, segments work on {', '.join(map(str, regions.budgets))} of them"
        whole = f"; the whole image goes on to {', '.join(regions.dense)}" if regions.dense else ""
        lines.append(f"regions    {cells}; neighbours {regions.neighbours}{whole}")
    if predicted is not None:
        on = f" on {predicted.backend}" if predicted.backend else ""
        figures = f"mIoU {100 * predicted.miou:.2f} %, mean {predicted.cost.name} {predicted.cost.mean:.6g}{on}"
        lines.append(f"predicted  {figures}: by the search, of the device and the day that its latencies were measured")
    table = [("exit", "head", "MMACs", "alone", "mIoU", "leave here", "theta_pix", "theta_img", "edge_aware")]
    rates = ["-"] * len(manifest.segments) if predicted is None else [f"{100 * rate:.1f}%" for rate in predicted.exit_rates]
    for segment, rate in zip(manifest.segments, rates, strict=True):
        thetas = ["-" if theta is None else f"{theta:g}" for theta in (segment.theta_pix, segment.theta_img)]
        work = [f"{macs / 1e6:.1f}" for macs in (segment.macs, segment.alone_macs)]
        miou = "-" if segment.miou is None else f"{100 * segment.miou:.2f}"
        table.append((segment.exit, segment.head, *work, miou, rate, *thetas, "yes" if segment.edge_aware else "no"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines.append("")
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join(lines)


def main() -> int:
    """Runs a command and returns its exit code, see `terminal.run`."""

    def command() -> int:
        arguments = _parser().parse_args()
        return arguments.function(arguments)

    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    # CI must tell a file that differs from a slip of the pen.
    return terminal.run("mess_runtime", command, failed=2 if "verify" in words[:1] else 1)


if __name__ == "__main__":
    sys.exit(main())
