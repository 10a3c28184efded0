"""Few bundles for many devices, against every set of configurations."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from test_search import enumerate_space, latency_rows, make_stats, of_two_precisions

from mess_runtime.benchmark import LatencyRow, LatencyTable
from mess_runtime.bundle import write_json
from mess_tf.files import Deployment, Objective, Stats
from mess_tf.optimise import fleet
from mess_tf.optimise.fleet import Variant, best_of, divisions, share
from mess_tf.optimise.search import InfeasibleError
from mess_tf.optimise.space import Costs, Resource, evaluate_configuration, latency_costs

SPACE = {"setting": "input-dependent", "max_early_exits": 1, "quantiles": None}
DEVICES = ("a", "b", "c", "d")


def drawn_costs(stats: Stats, seed: int) -> Costs:
    """Latencies of a device, unlike those of others, beside costs that all have."""
    rng = np.random.default_rng(seed)
    prefix = np.cumsum(rng.uniform(0.1, 3, len(stats.exits)))
    head, decision = rng.uniform(0, 3, len(stats.candidates)), rng.uniform(0, 0.5, (len(stats.candidates), 2))
    parameters = Resource("parameters", 2, stats.prefix_parameters.astype(float), stats.head_parameters.astype(float), 0 * decision)
    return Costs((Resource("latency_ms", 0, prefix, head, decision), parameters))


def variant_of(stats: Stats, seed: int, devices=DEVICES) -> Variant:
    return Variant(stats, {name: drawn_costs(stats, 10 * seed + d) for d, name in enumerate(devices)})


def choices(variants, devices) -> tuple[np.ndarray, Objective]:
    """Latencies [n, D] of every configuration that meets a target, which half of them do, and the target."""
    rows = []
    for variant in variants:
        stats = variant.stats
        for configuration in enumerate_space(stats, "input-dependent", 1, None, None):
            scores = {name: evaluate_configuration(stats, costs, configuration) for name, costs in variant.costs.items()}
            chain = [stats.candidates.index(f"{choice.exit}.{choice.head}") for choice in configuration.exits]
            parameters = stats.prefix_parameters[stats.exit_of_candidate[chain[-1]]] + stats.head_parameters[chain].sum()
            latencies = [scores[name][1] if name in scores else math.inf for name in devices]
            rows.append([next(iter(scores.values()))[0], parameters, *latencies])
    rows = np.array(rows)
    min_miou, most = np.quantile(rows[:, 0], 0.5), np.quantile(rows[:, 1], 0.8)
    rows = np.unique(rows[(rows[:, 0] >= min_miou - 1e-12) & (rows[:, 1] <= most), 2:], axis=0)
    no_better = np.array([not ((rows <= row).all(1) & (rows < row).any(1)).any() for row in rows])
    return rows[no_better], Objective(None, float(min_miou), {"parameters": float(most)})


def best_value(rows: np.ndarray, most: int, join) -> float:
    most = min(most, len(rows))
    return min(float(join(rows[list(chosen)].min(0))) for chosen in itertools.combinations(range(len(rows)), most))


def accuracy(shared, variants) -> float:
    of = [variants[each.variant] for each in shared.bundles]
    return min(
        evaluate_configuration(v.stats, next(iter(v.costs.values())), b.configuration)[0] for v, b in zip(of, shared.bundles, strict=True)
    )


@pytest.mark.parametrize(("name", "join"), [("sum", np.sum), ("worst", np.max)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shared_bundles_equal_brute_force(name, join, seed):
    if seed == 2:  # two precisions, one of which a device does not run
        stats = of_two_precisions(seed, heads=(1, 1), images=3)
        variants = [variant_of(each, v) for v, each in enumerate(stats.values())]
        variants[1] = Variant(variants[1].stats, {name: costs for name, costs in variants[1].costs.items() if name != "b"})
    else:
        variants = [variant_of(make_stats(seed, heads=(3, 2), images=5), seed)]
    rows, objective = choices(variants, DEVICES)
    assert len(rows) > 1
    values = []
    for most in (1, 2, 3, 5):
        shared = share(DEVICES, variants, most, objective, name, **SPACE)
        assert shared.value == shared.bound == pytest.approx(best_value(rows, most, join), rel=1e-9)
        assert len(shared.bundles) <= most and accuracy(shared, variants) >= objective.min_miou - 1e-12
        latencies = np.array([bundle.latencies for bundle in shared.bundles])
        assert shared.value == join(latencies[shared.bundle_of, np.arange(4)]) == join(latencies.min(0))
        assert all(bundle.certificate.gap == 0 for bundle in shared.bundles)
        values.append(shared.value)
    assert values == sorted(values, reverse=True)
    assert shared.groups < 15, "some groups are never searched"


@pytest.mark.parametrize(("name", "join"), [("sum", np.sum), ("worst", np.max)])
def test_of_many_devices_the_bound_holds(name, join, monkeypatch):
    """And is that of blocks of devices, which sharing costs something, not of each device alone."""
    monkeypatch.setattr(fleet, "MOST_DEVICES", 2)
    variants = [variant_of(make_stats(0, heads=(3, 2), images=5), 0)]
    rows, objective = choices(variants, DEVICES)
    alone = join(rows.min(0))
    for most, time_limit in itertools.product((1, 2), (math.inf, 1e-9)):
        best = best_value(rows, most, join)
        shared = share(DEVICES, variants, most, objective, name, time_limit=time_limit, **SPACE)
        assert shared.bound <= best * (1 + 1e-9) and best <= shared.value * (1 + 1e-9) and shared.value < 2 * best
        if time_limit == math.inf:
            assert shared.bound >= alone * (1 - 1e-9)
        if most == 1 and time_limit == math.inf:
            pairs = [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 3], [1, 2]]
            of_blocks = [join([best_value(rows[:, block], 1, join) for block in pair]) for pair in pairs]
            assert np.isclose(shared.bound, [*of_blocks, shared.value], rtol=1e-9).any()
            assert name == "worst" or shared.bound > alone * 1.01


@pytest.mark.parametrize("join", [np.sum, np.max])
def test_the_best_bundles_of_those_found(join):
    rng = np.random.default_rng(0)
    for most in (1, 2, 3, 9):
        latencies = rng.lognormal(1, 0.5, (7, 9)).round(1)
        latencies[rng.random(latencies.shape) < 0.2] = math.inf
        latencies[0] = 30 + np.arange(9)  # runs everywhere
        chosen = best_of(latencies, most, join is np.max)
        assert len(chosen) <= most
        assert join(latencies[chosen].min(0)) == pytest.approx(best_value(latencies, most, join), rel=1e-9)
    with pytest.raises(InfeasibleError, match=r"^max_bundles=1 is out of reach: so few do not run on all devices"):
        best_of(np.array([[1.0, math.inf], [math.inf, 1.0]]), 1, join is np.max)


def test_divisions():
    assert [divisions(4, most) for most in (1, 2, 3, 4, 9)] == [1, 8, 14, 15, 15]


def test_what_cannot_be_reached_names_the_device():
    stats = make_stats(0)
    with pytest.raises(InfeasibleError, match="min_miou=1 is out of reach within the limits on a"):
        share(DEVICES, [variant_of(stats, 0)], 2, Objective(None, 1.0), "sum", **SPACE)
    with pytest.raises(ValueError, match="max_bundles: must be at least 1"):
        share(DEVICES, [variant_of(stats, 0)], 0, Objective(None, 0.0), "sum", **SPACE)


def write_latencies(path, stats: Stats, factors: dict[str, float]) -> list[dict]:
    """A latency.json of devices, each so many times slower than another; returns its rows."""
    about = {"soc": "s", "os": "o", "runtime": "r", "runtime_version": "1", "p90_ms": None, "mean_ms": 9.0, "runs": 5}
    about |= {"backend_obtained": "unknown", "temperature_c": None}
    rows = [row for name, factor in factors.items() for row in latency_rows(stats, name, factor=factor)]
    write_json(path, LatencyTable({}, tuple(LatencyRow(**row, **about) for row in rows)).to_json())
    return rows


def test_all_devices_are_a_table_also_where_there_is_one(tmp_path, command):
    stats = make_stats(3)
    stats.save(tmp_path / "stats.npz")
    write_latencies(tmp_path / "latency.json", stats, {"only": 1.0})
    words = [f"--workdir={tmp_path}", f"--latency={tmp_path / 'latency.json'}", "--max_drop_pp=1", "--all_devices"]
    output = tmp_path / "table"
    code, out, err = command("search", *words, f"--output={output}")
    assert (code, err, out.splitlines()[-1]) == (0, "", str(output))
    assert [path.name for path in output.iterdir()] == ["only-t1-max_drop_pp-1.json"]
    refused = command("search", *words, f"--output={tmp_path / 'one.json'}")
    assert refused[0] == 1 and "--output: must be a folder that can be written to, not a .json file" in refused[2]
    assert not (tmp_path / "one.json").exists()


def test_command(tmp_path, command):
    stats = make_stats(3)
    stats.save(tmp_path / "stats.npz")
    rows = write_latencies(tmp_path / "latency.json", stats, {"fast": 1.0, "slow": 9.0, "third": 3.0})
    words = [f"--workdir={tmp_path}", f"--latency={tmp_path / 'latency.json'}", "--max_drop_pp=1", "--all_devices", "--max_bundles=2"]
    code, out, err = command("search", *words, "--fleet=worst")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["fast-t1", "slow-t1", "third-t1"] and lines[-1] == str(tmp_path / "fleet")
    assert "divisions of 3 devices" in lines[-2] and "the optimum" in lines[-2]
    found = json.loads((tmp_path / "fleet" / "fleet.json").read_text())
    for name, each in found["devices"].items():
        deployment = Deployment.load(tmp_path / "fleet" / f"{each['bundle']}.json")
        costs = latency_costs(stats, rows, device=name.removesuffix("-t1"))
        assert each["latency_ms"] == pytest.approx(evaluate_configuration(stats, costs, deployment)[1])
        assert deployment.predicted.miou >= deployment.original.miou - 0.01
    assert found["value"] == found["bound"] == max(each["latency_ms"] for each in found["devices"].values())
    (tmp_path / "fleet" / "bundle7.json").write_text("of a larger fleet")
    for refused, message in ((["--minimise=latency_ms"], "--minimise: must be left out"), (["--limit=latency_ms=3"], "limit: must be")):
        assert message in command("search", *words, *refused)[2]
    assert command("search", *words)[0] == 0
    assert not (tmp_path / "fleet" / "bundle7.json").exists()
    deployment = Deployment.load(tmp_path / "fleet" / "bundle1.json")
    assert dataclasses.replace(deployment.asked, device=None).max_drop_pp == 1.0
