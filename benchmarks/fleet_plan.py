"""What a search for many device models costs: a sample is searched, the rest is extrapolated and said to be.

`python benchmarks/fleet_plan.py [--sample=3 --constraints=2 --shared=6]`. Needs no network and no phone: statistics of the paper's size are
drawn (`paper_space.py`), and latencies are MACs at a speed of each device model, each submodel off by a factor of its own (log-normal,
sigma 0.3), since what is fast differs between phones. Seconds are those of the CPU, of all threads, compiling left out.
The last line is one JSON object:
  rows_per_device, table_mib_per_device: of latency.json.
  join_s: reading one device's rows and joining them to the statistics.
  search_s: of one device under one constraint (mean over the sample), up to `--max_early_exits` early exits, to the proven optimum.
  fleet_hours: of `--devices` times `--limits` such searches, extrapolated.
  share_s, share_groups, share_divisions: of `--shared` devices that share three bundles, total latency.
  peak_gib: largest memory of the process.
"""

import dataclasses
import json
import resource
import time

import numpy as np
from absl import app, flags
from paper_space import drawn_stats

from mess_runtime.benchmark import LatencyRow, LatencyTable
from mess_tf.files import Objective, Stats
from mess_tf.optimise.fleet import SUM, Variant, share
from mess_tf.optimise.search import search
from mess_tf.optimise.space import Costs, latency_costs, original

DROPS_PP = np.linspace(0.5, 5, 20)


def with_hashes(stats: Stats) -> Stats:
    """The same, as if its submodels had been exported."""
    k = len(stats.candidates)
    hashes = {
        "prefix_sha256": tuple(f"{e:064x}" for e in range(len(stats.exits))),
        "head_sha256": tuple(f"{100 + c:064x}" for c in range(k)),
    }
    hashes |= {f"{mode}_sha256": (f"{m:064x}",) * k for m, mode in enumerate(("mask", "plain", "edge"), start=50)}
    return dataclasses.replace(stats, **hashes)


def table_of(stats: Stats, device: int) -> str:
    """latency.json of one simulated device model."""
    rng = np.random.default_rng(device)
    speed = rng.lognormal(0, 0.5) * 1e-8
    macs = dict(zip(stats.prefix_sha256, stats.prefix_macs, strict=True)) | dict(zip(stats.head_sha256, stats.head_macs, strict=True))
    macs |= {of[0]: factor * 1e7 for of, factor in ((stats.mask_sha256, 1), (stats.plain_sha256, 2), (stats.edge_sha256, 3))}
    about = {"size_bytes": 1000, "device": f"model{device}", "soc": "simulated", "os": "none", "runtime": "none", "runtime_version": "0"}
    about |= {"backend_requested": "cpu", "backend_obtained": "cpu", "threads": 1, "p90_ms": None, "runs": 50, "temperature_c": None}
    rows = []
    for sha256, each in macs.items():
        latency = float(each) * speed * rng.lognormal(0, 0.3)
        rows.append(LatencyRow(submodel=sha256[-8:], sha256=sha256, p50_ms=latency, mean_ms=latency, **about))
    return json.dumps(LatencyTable({}, tuple(rows)).to_json())


def joined(stats: Stats, text: str) -> Costs:
    """The costs of a device, from what its file holds."""
    rows = LatencyTable.from_json(json.loads(text)).rows
    return latency_costs(stats, [dataclasses.asdict(row) for row in rows])


def searched(stats: Stats, costs: Costs, drop_pp: float) -> float:
    """CPU seconds of one search."""
    before = time.process_time()
    objective = Objective(costs.name, original(stats, costs).miou - drop_pp / 100)
    found = search(stats, costs, objective, max_early_exits=FLAGS.max_early_exits)
    assert found.certificate.gap == 0
    return time.process_time() - before


def main(argv) -> None:
    del argv
    stats = with_hashes(drawn_stats(2, 2, 20, 3, 2))
    searched(stats, joined(stats, table_of(stats, 0)), 1.0)  # compiles, or loads what is compiled
    stats = with_hashes(drawn_stats(heads=FLAGS.heads, images=FLAGS.images))
    tables = [table_of(stats, device) for device in range(max(FLAGS.sample, FLAGS.shared))]
    before = time.process_time()
    costs = [joined(stats, text) for text in tables]
    join_s = (time.process_time() - before) / len(tables)
    drops = DROPS_PP[np.linspace(0, DROPS_PP.size - 1, FLAGS.constraints).round().astype(int)]
    seconds = [searched(stats, each, drop) for each in costs[: FLAGS.sample] for drop in drops]
    questions = FLAGS.devices * FLAGS.limits
    hours = (FLAGS.devices * join_s + questions * float(np.mean(seconds))) / 3600
    result = {
        "rows_per_device": len(json.loads(tables[0])["rows"]),
        "table_mib_per_device": len(tables[0]) / 2**20,
        "join_s": join_s,
        "search_s": float(np.mean(seconds)),
        "fleet_hours": hours,
    }
    print(f"{len(seconds)} searches: {min(seconds):.1f} to {max(seconds):.1f} CPU s each, mean {np.mean(seconds):.1f}")
    print(f"{FLAGS.devices} device models x {FLAGS.limits} constraints: {hours:.1f} CPU hours, extrapolated", flush=True)
    names = [f"model{device}" for device in range(FLAGS.shared)]
    before = time.process_time()
    objective = Objective(None, original(stats, costs[0]).miou - 0.01)
    variant = Variant(stats, dict(zip(names, costs, strict=False)))
    space = {"setting": "input-dependent", "max_early_exits": FLAGS.max_early_exits, "quantiles": None}
    shared = share(names, [variant], 3, objective, SUM, **space)
    result |= {"share_s": time.process_time() - before, "share_groups": shared.groups, "share_divisions": shared.divisions}
    alone = share(names, [variant], len(names), objective, SUM, **space)
    print(
        f"{len(names)} device models, total mean latency: {alone.value:.4g} ms with a bundle each, {shared.value:.4g} with three "
        f"(bound {shared.bound:.4g}); {shared.groups} groups searched of {2 ** len(names) - 1}, {result['share_s']:.0f} CPU s"
    )
    print(json.dumps(result | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_integer("sample", 3, "device models that are searched", lower_bound=1)
    flags.DEFINE_integer("constraints", 2, "constraints of each of them", lower_bound=1)
    flags.DEFINE_integer("shared", 6, "device models that share three bundles", lower_bound=3)
    flags.DEFINE_integer("devices", 1000, "device models of the fleet")
    flags.DEFINE_integer("limits", 20, "constraints of each of them")
    flags.DEFINE_integer("max_early_exits", 1, "of a configuration")
    flags.DEFINE_integer("heads", 80, "at each of five exits")
    flags.DEFINE_integer("images", 500, "of the statistics")
    app.run(main)
