"""Deployment search: which exits, which heads and which thresholds meet a constraint best.

stats (what each candidate did to each image) → costs → the optimum of the space → deployment.json; see `optimise.search`, and
`optimise.regions` where every cell of an image leaves for itself. Of several backends, precisions and ways to decide each is searched, and
the best of all is taken; see `optimise.combinations`.
"""

import os

from absl import flags

from mess_runtime.bundle import ANYTIME, BUDGETED, FORMAT, INPUT_DEPENDENT, check, check_writable, file_sha256, read_json, write_json
from mess_tf import arguments, tasks, terminal
from mess_tf.files import FLEETS, SUM


def check_flags() -> None:
    """Raises ValueError where flags do not go together, or ask for nothing."""
    values = flags.FLAGS
    terminal.check_left_out(not values.latency, "device threads backends precisions all_devices", "without --latency")
    terminal.check_left_out(values.all_devices, "device threads check_share max_risk", "with --all_devices")
    terminal.check_left_out(values.max_bundles is None, "fleet", "without --max_bundles")
    arguments.questions()
    check(os.path.isdir(values.workdir), "--workdir", "an existing folder", values.workdir)
    arguments.check_latency()


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run, with stats.npz.", required=True)
    flags.DEFINE_string("latency", None, "latency.json: the costs are its medians in ms; without it, they are MACs.")
    arguments.define_question_flags()
    flags.DEFINE_bool("all_devices", False, "A deployment for each device and number of threads of the file.")
    flags.DEFINE_integer("max_bundles", None, "With --all_devices: so many deployments at most, which the devices share.", lower_bound=1)
    flags.DEFINE_enum(
        "fleet", SUM, FLEETS, "What the shared deployments make least: the total of the devices' mean latencies, or the largest."
    )
    tasks.define_flag()
    flags.DEFINE_string(
        "output", None, "The file to write, or the folder for several; default: deployment.json, deployments or fleet in the workdir."
    )
    terminal.run("mess_tf.search", __doc__, check_flags)

import dataclasses
import hashlib
import itertools
import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mess_runtime.files import safe_name
from mess_tf.files import (
    DEPLOYMENT,
    IMAGE_DECIDES,
    REGIONS,
    STATS,
    VERIFICATION,
    Asked,
    Combination,
    Deployment,
    RegionStats,
    Stats,
    of_precision,
    shown,
    unit,
)
from mess_tf.optimise import kernels
from mess_tf.optimise.combinations import Option, Regional, choose, deployed, options_of, reference, sha256
from mess_tf.optimise.fleet import Shared, Variant, share
from mess_tf.optimise.search import InfeasibleError, resolve_objective
from mess_tf.optimise.space import matching, original

REASON_WIDTH = 120  # of the reason why a combination was not chosen, in the table
SHOWN_S = 1.0  # of compiling; less is not worth a word
FLEET = "fleet.json"


def _took(seconds: float, compiled_s: float) -> str:
    return f"{seconds:.1f} s" + (f", compiled in {compiled_s:.0f} s before" if compiled_s > SHOWN_S else "")


def table(deployment: Deployment, compiled_s: float = 0.0) -> str:
    """The chosen exits, and what they promise next to the original network.

    Args:
      deployment: that was found.
      compiled_s: see `kernels.compiled_s`.
    """
    confidence = "edge-aware" if deployment.edge_aware else "plain"
    lines = compared(deployment.combinations, deployment.predicted.cost_name) if len(deployment.combinations) > 1 else []
    lines.append(f"{'exit':<8}{'head':<24}{'theta_pix':>10}{'theta_img':>10}{'leave here':>12}")
    for choice, rate in zip(deployment.exits, deployment.predicted.exit_rates, strict=True):
        pix, img = ("-" if theta is None else f"{theta:.4f}" for theta in (choice.theta_pix, choice.theta_img))
        lines.append(f"{choice.exit:<8}{choice.head:<24}{pix:>10}{img:>10}{rate:>12.1%}")
    predicted, reference = deployment.predicted, deployment.original
    name, scale = unit(predicted.cost_name)
    if each := deployment.regions:
        cells = f"regions: {each}"
    lines += [
        f"{deployment.setting}, {confidence} confidence{f', {cells}' if each else ''}",
        f"{'':<12}{'mIoU %':>10}{'mean ' + name:>14}{'p90 ' + name:>14}",
        f"{'original':<12}{100 * reference.miou:>10.2f}{scale * reference.cost:>14.4g}{scale * reference.cost:>14.4g}",
        f"{'predicted':<12}{100 * predicted.miou:>10.2f}{scale * predicted.cost_mean:>14.4g}{scale * predicted.cost_p90:>14.4g}",
        f"{'difference':<12}{100 * (predicted.miou - reference.miou):>+10.2f}{predicted.cost_mean / reference.cost:>13.3f}x"
        f"{predicted.cost_p90 / reference.cost:>13.3f}x",
    ]
    low, high = (100 * value for value in predicted.miou_interval)
    cheap, dear = (scale * value for value in predicted.cost_interval)
    lines.append(
        f"95 % of resamples of the {predicted.images} images: mIoU {low:.2f} to {high:.2f} %, mean {cheap:.4g} to {dear:.4g} {name}"
    )
    lines += [
        f"{name} {shown(name, predicted.costs[name], 6)}, at most {shown(name, limit, 6)}"
        for name, limit in deployment.constraint.limits.items()
        if name in predicted.costs
    ]
    if (promise := deployment.guarantee) is not None:
        against = "the original network" if promise.risk == "final" else "the labels"
        lines.append(
            f"risk against {against} at most {promise.max_risk:g} with confidence {promise.confidence:g} "
            f"({promise.estimate:.4f} on {promise.images} checking images), for images like these"
        )
    certificate = deployment.certificate
    cut = ", ".join(f"{count} by {rule}" for rule, count in certificate.cut_by_rule.items())
    scored = f"{certificate.scored} scored{f', cut {cut}' if cut else ''}"
    proven = "the optimum" if certificate.gap == 0 else f"within {certificate.gap:.6g} of the optimum, {certificate.open} left open"
    lines.append(f"{certificate.covered} configurations: {scored}; {proven}; {_took(certificate.seconds, compiled_s)}")
    return "\n".join(lines)


def compared(rows: Sequence[Combination], cost_name: str) -> list[str]:
    """The best of each backend, precision and way to decide, and why it is not the one chosen."""
    name, scale = unit(cost_name)
    decides = {row.decide for row in rows} != {IMAGE_DECIDES}
    who = f"{'decides':<9}" if decides else ""
    lines = [f"{'backend':<9}{'':<6}{who}{'mIoU %':>8}{'mean ' + name:>12}"]
    for row in rows:
        figures = f"{'-':>8}{'-':>12}" if row.miou is None else f"{100 * row.miou:>8.2f}{scale * row.cost_mean:>12.4g}"
        why = textwrap.shorten(row.reason, REASON_WIDTH, placeholder=" ...") or "chosen"
        who = f"{row.decide:<9}" if decides else ""
        lines.append(f"{row.backend or '-':<9}{row.precision:<6}{who}{figures}  {' + '.join(row.exits)}{': ' if row.exits else ''}{why}")
    return lines


def overview(rows: Sequence[tuple[str, Asked, Deployment | None]]) -> str:
    """One line per row of `run_table`."""
    units = {unit(deployment.predicted.cost_name) for _, _, deployment in rows if deployment is not None}
    mean = " ".join(["mean", *(name for name, _ in units)])  # of one kind of cost
    lines = [f"{'device':<24}{'constraint':<28}{'mIoU %':>8}{mean:>12} {'original':>9}  exits"]
    for device, each, deployment in rows:
        asked = ", ".join(f"{name}={value:g}" for name, value in each.constraint.items() if isinstance(value, float))
        if deployment is None:
            lines.append(f"{device:<24}{asked:<28}  out of reach")
            continue
        predicted = deployment.predicted
        exits = " + ".join(f"{choice.exit}.{choice.head}" for choice in deployment.exits)
        share = predicted.cost_mean / deployment.original.cost
        figures = f"{100 * predicted.miou:>8.2f}{unit(predicted.cost_name)[1] * predicted.cost_mean:>12.4g} {share:>8.3f}x"
        several = len({(row.backend, row.precision) for row in deployment.combinations}) > 1
        chosen = f", {deployment.precision} on {deployment.backend}" if several else ""
        chosen += ", regions" if deployment.regions else ""
        lines.append(f"{device:<24}{asked:<28}{figures}  {exits}{chosen}")
    return "\n".join(lines)


def _rows(latency: str | os.PathLike) -> list[dict[str, Any]]:
    from mess_runtime.benchmark import LatencyTable  # needs an interpreter

    rows = [dataclasses.asdict(row) for row in LatencyTable.load(latency).rows]
    check(bool(rows), f"{latency}: rows", "at least one", rows)
    return rows


def options(workdir: str | os.PathLike, asked: Asked, latency: str | os.PathLike | None) -> list[Option]:
    """What there is to choose from: statistics of the precisions, latencies of the backends, and what verification.json has refused."""
    check(latency or not (asked.backends or asked.precisions), "latency", "given with backends or precisions", latency)
    stats, regional = {}, {}
    for precision in asked.precisions or (None,):
        path = Path(workdir, of_precision(STATS, precision))
        each = Stats.load(path)
        check(precision in (None, each.precision), f"{path}: precision", str(precision), each.precision)
        stats[file_sha256(path)] = each
        regions = Path(workdir, of_precision(REGIONS, precision))
        if asked.decide != IMAGE_DECIDES and regions.exists():
            regional[file_sha256(path)] = _regional(regions, path)
    if not latency:
        return options_of(stats, None, regional=regional)
    rows = _rows(latency)
    refused = _refused(workdir, matching(rows, device=asked.device, threads=asked.threads)[0])
    return options_of(stats, rows, asked.device, asked.threads, asked.backends, refused, regional)


def _regional(path: Path, stats: Path) -> Regional:
    """Statistics of regions and whether they belong to these of whole images."""
    each = RegionStats.load(path)
    if each.stats_sha256 != file_sha256(stats):
        return Regional(each, file_sha256(path), reason=f"{path} was made with other statistics than {stats.name}; calibrate again")
    return Regional(each, file_sha256(path))


def _refused(workdir: str | os.PathLike, row: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    from android_bench import verify  # needs an interpreter

    return verify.refused(Path(workdir, VERIFICATION), row["device"], row["soc"])


def run(
    workdir: str | os.PathLike, asked: Asked, latency: str | os.PathLike | None = None, output: str | os.PathLike | None = None
) -> Deployment:
    """The command for one device and one constraint.

    Args:
      workdir: with stats.npz, or those of the precisions that are asked for.
      asked: what to search for.
      latency: latency.json, or None for costs in multiply-accumulates.
      output: the file to write; None for WORKDIR/deployment.json.

    Raises:
      InfeasibleError, TimeoutError, ValueError: see `combinations.options_of` and `combinations.choose`.
    """
    choices = options(workdir, asked, latency)
    deployment = dataclasses.replace(choose(choices, asked), costs_sha256=sha256(choices))
    deployment.save(output or Path(workdir, DEPLOYMENT))
    return deployment


def is_searched(workdir: str | os.PathLike, asked: Asked, latency: str | os.PathLike | None) -> bool:
    """Whether WORKDIR/deployment.json is the answer to this question, in these statistics and with these costs."""
    try:
        found = Deployment.load(Path(workdir, DEPLOYMENT))
    except (FileNotFoundError, ValueError):
        return False
    return found.asked == asked and found.costs_sha256 == sha256(options(workdir, asked, latency))


def search_row(opened: tasks.Opened[Sequence[Option]], asked: Asked, costs_sha256: str, path: Path) -> None:
    """A task: writes the best deployment for one device and constraint, or null where the constraint is out of reach.

    Raises:
      ValueError: what is searched here does not have this hash, see `combinations.sha256`.
    """
    check(sha256(opened.value) == costs_sha256, "workdir", "the same on all machines, and the latencies too", str(path.parent))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        dataclasses.replace(choose(opened.value, asked), costs_sha256=costs_sha256).save(path)
    except InfeasibleError:
        write_json(path, None)


def run_table(
    workdir: str | os.PathLike,
    asked: Mapping[str, Sequence[Asked]],
    latency: str | os.PathLike | None,
    folder: str | os.PathLike,
    ray: str = "",
) -> list[tuple[str, Asked, Deployment | None]]:
    """The command for several devices or constraints.

    Each is a task with a file in FOLDER/rows; the folder is deleted when all are there.

    Args:
      workdir, latency: as of `run`.
      asked: by name of the device.
      folder: of the files to write, one for each row.
      ray: see `tasks.run`.

    Returns:
      Device, question and the best deployment, None where the constraint is out of reach.

    Raises:
      ValueError: two rows would be written into one file.
    """
    folder, todo, rows = Path(folder), [], [(name, each) for name in asked for each in asked[name]]
    files = [folder / f"{safe_name(name)}-{_given(each)}.json" for name, each in rows]
    twice = [path.name for path in files if files.count(path) > 1]
    check(not twice, "constraint", "such that no two rows of the table have a file of one name", ", ".join(dict.fromkeys(twice)))
    for name, questions in asked.items():
        of = workdir, questions[0], latency
        opened = tasks.Opened(options(*of), options, *of)
        costs_sha256 = sha256(opened.value)
        for each in questions:
            about = json.dumps([name, dataclasses.asdict(each), costs_sha256])
            path = folder / "rows" / f"{hashlib.sha256(about.encode()).hexdigest()}.json"
            todo.append(tasks.Task(search_row, (opened, each, costs_sha256, path), path, path.exists()))
    found = []
    for (name, each), path, file in zip(rows, tasks.run(todo, "search", "row", ray), files, strict=True):
        found.append((name, each, Deployment.load(path) if read_json(path, lambda value: value) else None))
        if (deployment := found[-1][2]) is not None:
            deployment.save(file)
    shutil.rmtree(folder / "rows")
    return found


def _given(asked: Asked) -> str:
    """The constraint in the name of a file."""
    (given,) = (f"{key}-{value:g}" for key, value in asked.constraint.items() if isinstance(value, float))
    return given


def run_fleet(
    workdir: str | os.PathLike, asked: Mapping[str, Asked], latency: str | os.PathLike, most: int, fleet: str, folder: str | os.PathLike
) -> str:
    """The command for the bundles that many devices share, see `fleet.share`.

    Args:
      workdir, latency: as of `run`.
      asked: by name of the device.
      most: bundles.
      fleet: `sum` or `worst`.
      folder: to write: `bundle1.json` and so on, each a deployment with the figures of the slowest of its devices, and `fleet.json`. What
        such files an earlier fleet has left there are deleted.

    Returns:
      Which device gets which, as a table.
    """
    of_device = {name: options(workdir, each, latency) for name, each in asked.items()}
    for name, each in of_device.items():
        names = [option.name for option in each]
        one = len({option.backend for option in each}) == 1
        check(one, "max_bundles", "asked of one backend, as --backends names it", f"{', '.join(names)} on {name}")
    (first, question), *_ = asked.items()
    check(not {"latency_ms", "latency_p90_ms"} & {*question.limits}, "limit", "of costs that are the same on all devices", question.limits)
    against, able = reference(of_device[first]), next(option.costs for option in of_device[first] if option.costs)
    objective = resolve_objective(against, able, question.setting, **question.constraint)
    variants = [
        Variant(option.stats, {name: each[v].costs for name, each in of_device.items() if each[v].costs})
        for v, option in enumerate(of_device[first])
    ]
    space = question.space | {"setting": question.setting}
    shared = share([*asked], variants, most, dataclasses.replace(objective, minimise=None), fleet, **space)
    alone = [min(original(each.stats, each.costs[name]).cost for each in variants if name in each.costs) for name in asked]

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FLEET).unlink(missing_ok=True)  # it names the others, so it is written last
    for stale in folder.glob("bundle*.json"):
        stale.unlink()
    for number, each in enumerate(shared.bundles):
        slowest = max(np.flatnonzero(shared.bundle_of == number), key=lambda d, of=each: of.latencies[d])
        name = [*asked][slowest]
        option = of_device[name][each.variant]
        asks = resolve_objective(against, option.costs, question.setting, **question.constraint)
        deployment = deployed(option, asked[name], each.configuration, asks, each.certificate)
        dataclasses.replace(deployment, costs_sha256=sha256([option])).save(folder / f"bundle{number + 1}.json")
    of_devices = {
        name: {"bundle": f"bundle{number + 1}", "latency_ms": float(shared.bundles[number].latencies[d])}
        for d, (name, number) in enumerate(zip(asked, shared.bundle_of.tolist(), strict=True))
    }
    about = {name: getattr(shared, name) for name in ("value", "bound", "divisions", "groups", "seconds")}
    write_json(folder / FLEET, {"format": FORMAT, "fleet": fleet, "max_bundles": most, **about, "devices": of_devices})
    return fleet_table([*asked], shared, fleet, alone, kernels.compiled_s())


def fleet_table(devices: Sequence[str], shared: Shared, fleet: str, originals: Sequence[float], compiled_s: float = 0.0) -> str:
    """Which device gets which bundle; `originals`: ms of the fastest original network on each; `compiled_s`: as of `table`."""
    lines = [f"{'device':<32}{'bundle':>8}{'mean ms':>12}{'original':>12}"]
    for name, number, cost in zip(devices, shared.bundle_of, originals, strict=True):
        lines.append(f"{name:<32}{number + 1:>8}{shared.bundles[number].latencies[devices.index(name)]:>12.4g}{cost:>12.4g}")
    for number, each in enumerate(shared.bundles):
        exits = " + ".join(f"{choice.exit}.{choice.head}" for choice in each.configuration.exits)
        lines.append(f"bundle {number + 1}: {exits}")
    proven = "the optimum" if shared.value == shared.bound else f"within {shared.value - shared.bound:.4g} ms of the optimum"
    lines.append(
        f"{'total' if fleet == SUM else 'largest'} {shared.value:.4g} ms; {shared.divisions} divisions of {len(devices)} devices, "
        f"{shared.groups} groups searched; {proven}; {_took(shared.seconds, compiled_s)}"
    )
    return "\n".join(lines)


def _of_devices(asked: Sequence[Asked], latency: str | None, all_devices: bool) -> dict[str, list[Asked]]:
    """The questions for every device and number of threads that the flags allow, by its name."""
    if not latency:
        return {"macs": [*asked]}
    rows = _rows(latency)
    if not all_devices:
        return {asked[0].device or rows[0]["device"]: [*asked]}
    pairs = sorted({(row["device"], row["threads"]) for row in rows})
    return {
        f"{device}-t{threads}": [dataclasses.replace(each, device=device, threads=threads) for each in asked] for device, threads in pairs
    }


def main() -> None:
    """The command; see the flags."""
    values = flags.FLAGS
    tasks.check_installed(values.ray)
    devices = _of_devices(arguments.questions(), values.latency, values.all_devices)
    questions = [*itertools.chain(*devices.values())]
    if values.max_bundles is not None:
        check(values.all_devices, "max_bundles", "given with --all_devices", values.max_bundles)
        terminal.check_left_out(True, "minimise max_cost cost_share ray", "with --max_bundles")
        check(len(questions) == len(devices), "constraint", "one with one value with --max_bundles", len(questions) // len(devices))
        check(values.setting != ANYTIME, "setting", f"{INPUT_DEPENDENT} or {BUDGETED} with --max_bundles", values.setting)
        check(values.decide in (None, IMAGE_DECIDES), "decide", f"{IMAGE_DECIDES} with --max_bundles", values.decide)
        folder = values.output or os.path.join(values.workdir, "fleet")
        check_writable("--output", folder, folder=True)
        asked = {name: each for name, (each,) in devices.items()}
        print(run_fleet(values.workdir, asked, values.latency, values.max_bundles, values.fleet, folder))
        print(folder)
        return
    if values.all_devices or len(questions) > 1:
        terminal.check_left_out(True, "check_share", "where several constraints make a table")
        folder = values.output or os.path.join(values.workdir, "deployments")
        check_writable("--output", folder, folder=True)
        print(overview(run_table(values.workdir, devices, values.latency, folder, values.ray)))
        print(folder)
        return
    check(not values.ray, "--ray", "left out where no constraints or devices make a table", values.ray)
    (asked,) = questions
    output = Path(values.output or os.path.join(values.workdir, DEPLOYMENT))
    check_writable("--output", output)
    deployment = run(values.workdir, asked, values.latency, output)
    print(table(deployment, kernels.compiled_s()))
    print(output)
