"""The search against brute force, and the two files around it."""

import dataclasses
import functools
import itertools
import json
import math
import os
import time
from pathlib import Path

import numba
import numpy as np
import pytest

import mess_tf.search
from benchmarks.paper_space import drawn_stats
from mess_runtime.benchmark import LatencyRow, LatencyTable
from mess_runtime.bundle import file_sha256, write_json
from mess_runtime.verify import Report
from mess_tf.files import (
    COSTS,
    Asked,
    Certificate,
    Combination,
    Configuration,
    Deployment,
    ExitChoice,
    Objective,
    Original,
    Stats,
    joined,
    packed,
)
from mess_tf.optimise import guarantee, kernels, optimum, pairs
from mess_tf.optimise.combinations import choose, options_of, reference, sha256
from mess_tf.optimise.search import InfeasibleError, exit_orders, front, resolve_objective, search, search_guaranteed
from mess_tf.optimise.space import (
    Costs,
    configuration_costs,
    evaluate_configuration,
    latency_costs,
    macs_costs,
    mean_over_deadlines,
    mixture,
    original,
)
from mess_tf.search import is_searched, overview, run, run_table, table

REPOSITORY = Path(__file__).resolve().parents[1]


def make_stats(seed: int, heads=(2, 1), images=4, classes=3, thetas=2, largest=6) -> Stats:
    """Random statistics of a small space; small numbers, so that ties abound."""
    rng = np.random.default_rng(seed)
    candidates = [f"exit{e + 1}.fcn-b{h}" for e, number in enumerate(heads) for h in range(number)] + ["final.fcn"]
    k, exits = len(candidates), len(heads) + 1
    pixels = rng.integers(1, largest + 1, images)
    labelled = rng.integers(0, largest + 1, (images, classes))
    labelled[0, 0] = 1
    tp = rng.integers(0, labelled + 1, (k, images, classes))
    confident = -np.sort(-rng.integers(0, pixels[:, None, None] + 1, (k, images, thetas, 2)), axis=2)
    return Stats(
        split="val",
        fidelity="exact",
        candidates=tuple(candidates),
        images=tuple(f"image{i}" for i in range(images)),
        classes=tuple(f"class{c}" for c in range(classes)),
        pixels=pixels,
        **packed(tp, rng.integers(0, largest + 1, tp.shape), labelled),
        theta_pix=np.linspace(0.5, 0.9, thetas),
        confident=confident.astype(np.int32),
        changed=np.concatenate([rng.integers(0, pixels + 1, (k - 1, images)), np.zeros((1, images))]).astype(np.int32),
        prefix_macs=np.cumsum(rng.integers(1, 5, exits)),
        head_macs=rng.integers(0, 4, k),
        prefix_parameters=np.cumsum(rng.integers(1, 5, exits)),
        head_parameters=rng.integers(0, 4, k),
        prefix_memory_bytes=rng.integers(1, 5, exits),
        head_memory_bytes=rng.integers(0, 6, k),
        prefix_sha256=tuple(f"{e:064x}" for e in range(exits)),
        head_sha256=tuple(f"{100 + c:064x}" for c in range(k)),
        mask_sha256=tuple(f"{200 + c % 2:064x}" for c in range(k)),
        plain_sha256=tuple(f"{202 + c % 2:064x}" for c in range(k)),
        edge_sha256=tuple(f"{204 + c % 2:064x}" for c in range(k)),
        made_by='{"mess_tf": "0"}',
    )


def enumerate_space(stats: Stats, setting: str, max_early_exits: int, quantiles: int | None, horizon: float | None) -> list[Configuration]:
    """Every configuration of the space, written down without the search's own enumeration."""
    space = []
    most = 1 if setting == "budgeted" else max_early_exits + 1
    for chain in itertools.chain.from_iterable(itertools.combinations(range(len(stats.candidates)), size) for size in range(1, most + 1)):
        names = [stats.candidates[k].split(".", 1) for k in chain]
        if len({name for name, _ in names}) < len(chain):
            continue
        if setting != "input-dependent" or len(chain) == 1:
            space.append(Configuration(setting, False, tuple(ExitChoice(*name) for name in names), horizon))
            continue
        for edge in (0, 1):
            options = []
            for k, name in zip(chain[:-1], names[:-1], strict=True):
                of_exit = []
                for t, theta_pix in enumerate(stats.theta_pix.tolist()):
                    shares = sorted(float(n / p) for n, p in zip(stats.confident[k, :, t, edge], stats.pixels, strict=True))
                    if quantiles is not None and len(chain) > 2 and quantiles < len(shares):
                        shares = [shares[round(q * (len(shares) - 1) / (quantiles - 1))] for q in range(quantiles)]
                    of_exit += [ExitChoice(*name, theta_pix, share) for share in sorted(set(shares))]
                options.append(of_exit)
            for early in itertools.product(*options):
                space.append(Configuration(setting, bool(edge), (*early, ExitChoice(*names[-1])), None))
    return space


def some_costs(stats: Stats) -> Costs:
    """Costs with decisions that cost something."""
    rng = np.random.default_rng(0)
    first, *others = macs_costs(stats).resources
    decision = rng.integers(0, 3, (len(stats.candidates), 2)).astype(float)
    return Costs((dataclasses.replace(first, decision=decision), *(dataclasses.replace(other, decision=decision) for other in others)))


def meets(objective: Objective, accuracy: float, values: dict[str, float]) -> bool:
    within = all(values[name] <= limit * (1 + 1e-12) for name, limit in objective.limits.items())
    return within and accuracy >= (objective.min_miou or 0.0) - 1e-12


def best_by_brute_force(scores: list[tuple[float, dict[str, float]]], objective: Objective) -> tuple[float, float] | None:
    """(mIoU, value of the cost that counts) of the optimum, the other one breaking ties; None if nothing is feasible."""
    name = objective.minimise or "macs"
    feasible = [(round(accuracy, 12), values[name]) for accuracy, values in scores if meets(objective, accuracy, values)]
    if objective.minimise:
        feasible.sort(key=lambda each: (each[1], -each[0]))
    else:
        feasible.sort(key=lambda each: (-each[0], each[1]))
    return feasible[0] if feasible else None


def check_against_brute_force(stats: Stats, setting: str, max_early_exits: int, quantiles: int | None, asked: int = 4) -> int:
    """Compares at so many feasible, tight and unreachable objectives; returns how many searches found something."""
    rng = np.random.default_rng(0)
    costs = some_costs(stats)
    found = 0

    @functools.cache
    def scores(horizon: float | None) -> list[tuple[float, dict[str, float]]]:
        return [
            (evaluate_configuration(stats, costs, configuration)[0], configuration_costs(stats, costs, configuration))
            for configuration in enumerate_space(stats, setting, max_early_exits, quantiles, horizon)
        ]

    anytime = setting == "anytime"
    reference = scores(original(stats, costs).cost if anytime else None)
    (some, values), (other, others) = (reference[index] for index in rng.integers(0, len(reference), 2))
    name, second = rng.choice(["macs", "macs_p90", "parameters", "memory_bytes"], 2, replace=False).tolist()
    objectives = [
        *(Objective("macs", accuracy) for accuracy in (some, other, 0.0, 1.0)),
        *(Objective(limits={"macs": limit}) for limit in (values["macs"], others["macs"], 1e4, 0.5)),
        Objective(name, some),
        Objective(name, min(some, other), {second: max(values[second], others[second])}),
        Objective(None, min(some, other), {name: values[name], second: max(values[second], others[second])}),
        Objective(),
    ]
    for index in rng.choice(len(objectives), asked, replace=False):
        objective = objectives[index]
        horizon = objective.limits.get("macs", original(stats, costs).cost) if anytime else None
        expected = best_by_brute_force(scores(horizon), objective)
        if expected is None:
            with pytest.raises(InfeasibleError):
                search(stats, costs, objective, setting, max_early_exits, quantiles)
            continue
        deployment = search(stats, costs, objective, setting, max_early_exits, quantiles)
        predicted = deployment.predicted
        assert (predicted.miou, predicted.costs[objective.minimise or "macs"]) == pytest.approx(expected, abs=1e-8)
        certificate = deployment.certificate
        assert certificate.open == 0 and certificate.gap == 0
        passes = 2 if objective.minimise not in (None, "macs") and not anytime else 1
        assert certificate.covered == passes * len(scores(horizon)) == certificate.scored + sum(certificate.cut_by_rule.values())
        found += 1
    return found


SHAPES = (
    ({"heads": (2, 1)}, 2),
    ({"heads": (3,), "images": 6, "thetas": 3, "largest": 40}, 1),
    ({"heads": (1, 1, 1), "images": 3}, 1),
    ({"heads": (1, 1), "images": 6, "largest": 40}, 2),
    ({"heads": (), "classes": 1}, 0),
    ({"heads": (1, 1, 1), "images": 3}, 2),
    ({"heads": (1, 1, 1), "images": 3, "thetas": 1}, 3),
)


@pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.full) for first in (35, 70))])
def test_input_dependent_equals_brute_force(first):
    found = 0
    for seed in range(first, first + 35):
        shape, early_exits = SHAPES[seed % len(SHAPES)]
        found += check_against_brute_force(make_stats(seed, **shape), "input-dependent", early_exits, (2, None, 3)[seed % 3])
    assert found > 80


def test_bounds_and_branches_equal_brute_force(monkeypatch):
    """As above, but small spaces are bounded, cut and split as large ones are, rather than scored at once."""
    monkeypatch.setattr(optimum, "CHEAP_STEPS", -1)
    monkeypatch.setattr(optimum, "CHEAP_PASSES", 0)
    monkeypatch.setattr(optimum, "SCAN_STEPS", 100)
    for seed in range(20):
        shape, early_exits = SHAPES[seed % 4]
        check_against_brute_force(make_stats(seed, **shape), "input-dependent", early_exits, None, asked=2)


def test_blocks_of_cuts_equal_brute_force(monkeypatch, fuzz_count):
    """With two early exits and so many images that a block holds several cuts."""
    monkeypatch.setattr(optimum, "CHEAP_STEPS", -1)
    monkeypatch.setattr(optimum, "CHEAP_PASSES", 0)
    found = 0
    for seed in range(max(1, fuzz_count // 30)):
        stats = make_stats(seed, heads=(1, 1, 2), images=40, thetas=1, largest=40)
        assert len(stats.images) > 3 * pairs.BLOCKS
        found += check_against_brute_force(stats, "input-dependent", 2, 20, asked=2)
    assert found


def test_costs_of_pairs_equal_brute_force(monkeypatch):
    """The best mIoU at limits that some configuration just meets; nothing but single exits is known before pairs are bounded."""
    monkeypatch.setattr(optimum, "CHEAP_STEPS", -1)
    monkeypatch.setattr(optimum, "CHEAP_PASSES", 0)
    monkeypatch.setattr(optimum.Optimiser, "_improve", lambda *arguments: None)
    stats = make_stats(0, heads=(1, 1), images=40, thetas=1, largest=40)
    costs = some_costs(stats)
    scores = [
        (evaluate_configuration(stats, costs, each)[0], configuration_costs(stats, costs, each))
        for each in enumerate_space(stats, "input-dependent", 2, 20, None)
    ]
    for limit in np.quantile([values["macs"] for _, values in scores], np.linspace(0.02, 0.6, 25), method="nearest").tolist():
        objective = Objective(limits={"macs": limit})
        predicted = search(stats, costs, objective, "input-dependent", 2, 20).predicted
        assert (predicted.miou, predicted.costs["macs"]) == pytest.approx(best_by_brute_force(scores, objective), abs=1e-8)


def test_splitting_before_pairs_equals_brute_force(monkeypatch, fuzz_count):
    """As above, but parts are split until they hold hardly more than one pair of orders."""
    monkeypatch.setattr(optimum, "CHEAP_STEPS", -1)
    monkeypatch.setattr(optimum, "CHEAP_PASSES", 0)
    monkeypatch.setattr(optimum, "CHEAP_PAIRS", 1)
    branch, pairs_split = optimum.Optimiser._branch, []

    def counted(self, node, values):
        parts = branch(self, node, values)
        pairs_split.append(len(node.potentials) == 2 and len(parts) == 2)
        return parts

    monkeypatch.setattr(optimum.Optimiser, "_branch", counted)
    stats = make_stats(100, heads=(1, 2, 1), images=40, thetas=1, largest=40)
    assert check_against_brute_force(stats, "input-dependent", 2, 12, asked=min(12, max(2, fuzz_count // 30)))
    assert any(pairs_split)


def test_wandering_finds_what_is_in_the_space(monkeypatch):
    """With three early exits and nothing but single exits to start from: random changes stay in the space, some make it better."""
    monkeypatch.setattr(optimum, "CHEAP_STEPS", -1)
    monkeypatch.setattr(optimum, "CHEAP_PASSES", 0)
    monkeypatch.setattr(optimum, "SCAN_STEPS", 3e5)
    monkeypatch.setattr(optimum.Optimiser, "_improve", lambda *arguments: None)
    wander, gains = optimum.Optimiser._wander, []

    def watched(self):
        before = self.value
        wander(self)
        part = self.problem.roots[self.best.root]
        assert part.least <= len(self.best.early) <= part.most
        assert all(part.allowed[k, t, cut - 1] for k, t, cut in self.best.early)
        gains.append(self.value < before)

    monkeypatch.setattr(optimum.Optimiser, "_wander", watched)
    for seed in range(4):
        stats = make_stats(seed, heads=(2, 1, 2), images=4, thetas=1, largest=40)
        assert check_against_brute_force(stats, "input-dependent", 3, None, asked=3)
    assert 0 < sum(gains) < len(gains)


def test_reducing_again_drops_nothing_more(monkeypatch):
    """The same bounds say the same of what is left, so that a node can be reduced before each step that profits from it."""
    monkeypatch.setattr(optimum, "CHEAP_STEPS", -1)
    monkeypatch.setattr(optimum, "CHEAP_PASSES", 0)
    reduce, dropped = optimum.Optimiser._reduce, []

    def twice(self, node, relaxation, values):
        before = node.candidate.size
        lacking = reduce(self, node, relaxation, values)
        again = reduce(self, node, relaxation, values)
        assert again == pytest.approx(lacking, abs=1e-12)
        dropped.append(before - node.candidate.size if node.candidate.size else 0)
        return again

    monkeypatch.setattr(optimum.Optimiser, "_reduce", twice)
    stats = drawn_stats(exits=3, heads=6, images=60, classes=4, thetas=3)
    costs = macs_costs(stats)
    search(stats, costs, Objective(limits={"macs": 0.6 * original(stats, costs).cost}), "input-dependent", 2, 20)
    assert max(dropped) > 0


@pytest.mark.parametrize("setting", ["budgeted", "anytime"])
def test_other_settings_equal_brute_force(setting):
    for seed in range(40):
        assert check_against_brute_force(make_stats(seed, heads=(2, 2, 1)), setting, seed % 4, None)


def test_rounding_does_not_change_a_decision():
    rng = np.random.default_rng(0)
    pixels = rng.integers(2**21, 2**22, 300)
    # The second image lacks 2^-22 of a pixel to be as sure as the first: the least that two images of this size can differ by.
    pixels[:2] = 2**22, pow(2500001, -1, 2**22)
    confident = (pixels[:, None, None] * rng.random((2, 300, 1, 2))).astype(np.int64)
    confident[:, :2] = np.array([2500001, 2500001 * pixels[1] // 2**22])[:, None, None]
    stats = dataclasses.replace(make_stats(0, heads=(1,), images=300, thetas=1), pixels=pixels, confident=confident.astype(np.int32))
    order, ends = (array[0, 0] for array in exit_orders(stats, edge_aware=False, quantiles=None))
    assert ends.all()
    for leaving, image in enumerate(order, start=1):
        theta_img = float(confident[0, image, 0, 0] / pixels[image])
        exits = (ExitChoice("exit1", "fcn-b0", 0.5, theta_img), ExitChoice("final", "fcn"))
        _, _, leaves_at = evaluate_configuration(stats, macs_costs(stats), Configuration("input-dependent", False, exits, None))
        assert sorted(np.flatnonzero(leaves_at == 0)) == sorted(order[:leaving])


def two_images() -> Stats:
    """Two images of 4 pixels and two classes; exit1 is right about the first image only."""
    return Stats(
        split="val",
        fidelity="exact",
        candidates=("exit1.a", "final.b"),
        images=("easy", "hard"),
        classes=("left", "right"),
        pixels=np.array([4, 4]),
        **packed(
            tp=np.array([[[2, 2], [2, 0]], [[2, 2], [2, 2]]]),
            fp=np.array([[[0, 0], [2, 0]], [[0, 0], [0, 0]]]),
            labelled=np.array([[2, 2], [2, 2]]),
        ),
        theta_pix=np.array([0.5]),
        confident=np.array([[[[3, 3]], [[1, 3]]], [[[4, 4]], [[4, 4]]]], np.int32),
        changed=np.array([[0, 2], [0, 0]], np.int32),
        prefix_macs=np.array([10, 30]),
        head_macs=np.array([2, 5]),
        prefix_parameters=np.array([100, 300]),
        head_parameters=np.array([20, 50]),
        prefix_memory_bytes=np.array([64, 48]),
        head_memory_bytes=np.array([32, 80]),
        prefix_sha256=("", ""),
        head_sha256=("", ""),
        mask_sha256=("", ""),
        plain_sha256=("", ""),
        edge_sha256=("", ""),
        made_by="{}",
    )


def test_hand_computed_mixture():
    stats = two_images()
    deployment = search(stats, macs_costs(stats), Objective("macs", 1.0))
    assert deployment.exits == (ExitChoice("exit1", "a", 0.5, 0.75), ExitChoice("final", "b"))
    assert not deployment.edge_aware  # with edges, exit1 is as sure of the hard image
    assert deployment.predicted.miou == 1.0
    assert deployment.predicted.cost_mean == (12 + 37) / 2
    assert deployment.predicted.cost_p90 == 37
    assert deployment.predicted.exit_rates == (0.5, 0.5)
    assert deployment.predicted.costs == {"macs": 24.5, "macs_p90": 37, "parameters": 370, "memory_bytes": 80}
    assert deployment.original == Original(1.0, 35.0)
    alone = Configuration("budgeted", False, (ExitChoice("exit1", "a"),), None)
    accuracy, cost, leaves_at = evaluate_configuration(stats, macs_costs(stats), alone)
    assert accuracy == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert (cost, leaves_at.tolist()) == (12, [0, 0])


def test_anytime_mean_over_deadlines():
    assert mean_over_deadlines([0.5, 0.8], np.array([2.0, 6.0]), 10.0) == pytest.approx((0.5 * 4 + 0.8 * 4) / 10)
    assert mean_over_deadlines([0.5, 0.8], np.array([2.0, 6.0]), 4.0) == pytest.approx(0.5 * 2 / 4)
    assert mean_over_deadlines([0.5], np.array([2.0]), 1.0) == 0.0
    stats = two_images()
    deployment = search(stats, macs_costs(stats), Objective(limits={"macs": 100.0}), "anytime")
    assert [choice.exit for choice in deployment.exits] == ["exit1", "final"]
    assert deployment.horizon == 100.0
    assert deployment.predicted.cost_mean == 37
    assert deployment.predicted.miou == pytest.approx((25 * 7 / 12 + 63) / 100)


def test_drop_of_zero_keeps_the_original_feasible():
    for seed in range(20):
        stats = make_stats(seed, heads=(2, 1), classes=11)
        costs = macs_costs(stats)
        objective = resolve_objective(original(stats, costs), costs, "budgeted", max_drop_pp=0.0)
        assert search(stats, costs, objective, "budgeted").predicted.miou >= original(stats, costs).miou - 1e-12


def test_resolve_objective():
    reference, costs = Original(0.6, 50.0), macs_costs(two_images())
    resolve = functools.partial(resolve_objective, reference, costs)
    assert resolve("budgeted", max_drop_pp=1.0).min_miou == pytest.approx(0.59)
    assert resolve("anytime", cost_share=0.4) == Objective(limits={"macs": 20.0})
    assert resolve("budgeted", min_miou=0.3) == Objective("macs", 0.3)
    assert resolve("budgeted", max_cost=7.0, limits={"parameters": 9.0}) == Objective(limits={"macs": 7.0, "parameters": 9.0})
    assert resolve("budgeted", min_miou=0.3, minimise="parameters", limits={"macs": 9.0}) == Objective("parameters", 0.3, {"macs": 9.0})
    with pytest.raises(ValueError, match="one of --min_miou"):
        resolve("budgeted")
    with pytest.raises(ValueError, match="one of --min_miou"):
        resolve("budgeted", min_miou=0.3, cost_share=0.4)
    with pytest.raises(ValueError, match="max_drop_pp"):
        resolve("anytime", max_drop_pp=1.0)
    with pytest.raises(ValueError, match="minimise"):
        resolve("budgeted", max_cost=7.0, minimise="parameters")
    with pytest.raises(ValueError, match=r"limits\.macs: must be left out where the constraint is one on it, got 9\.0"):
        resolve("budgeted", max_cost=7.0, limits={"macs": 9.0})
    for name in ("min_miou", "max_drop_pp", "max_cost", "cost_share"):
        with pytest.raises(ValueError, match=f"{name}: must be finite, got nan"):
            resolve("budgeted", **{name: math.nan})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"min_miou": 65.0}, r"min_miou: must be in \[0, 1\], not in percent, got 65\.0"),
        ({"max_drop_pp": -500.0}, r"max_drop_pp: must be percentage points"),
        ({"max_cost": math.nan}, "max_cost: must be above 0 and finite, got nan"),
        ({"cost_share": -1.0}, "cost_share: must be above 0 and finite"),
        ({"max_risk": 7.0}, "max_risk: must be between 0 and 1"),
        ({"min_miou": 0.5, "time_limit": -5.0}, "time_limit: must be above 0"),
        ({"min_miou": 0.5, "limits": {"foo": 3.0}}, "limit: must be of costs latency_ms, .*, got 'foo'"),
        ({"min_miou": 0.5, "minimise": "foo"}, "minimise: must be of costs latency_ms, .*, got 'foo'"),
        ({}, "constraint: must be one of --min_miou, .* and --max_risk, got 'none'"),
    ],
)
def test_a_question_that_has_no_answer_is_refused_before_any_work(asked, message):
    with pytest.raises(ValueError, match=message):
        Asked(**asked)


def test_names_of_costs_are_those_of_the_statistics():
    stats = make_stats(0)
    assert set(latency_costs(stats, latency_rows(stats)).names) == set(COSTS)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_drop_pp": -30.0}, r"^--max_drop_pp=-30: min_miou=0\.\d+ is out of reach; the highest mIoU is at "),
        ({"cost_share": 1e-3}, r"^--cost_share=0\.001: macs<=0\.\d+ is out of reach; the least macs is at "),
    ],
)
def test_what_is_out_of_reach_is_named_by_its_flag(asked, message):
    options = options_of({"": dataclasses.replace(two_images(), fp=two_images().fp + 1)}, None)
    with pytest.raises(InfeasibleError, match=message):
        choose(options, Asked(**asked))
    with pytest.raises(ValueError, match=r"^max_drop_pp: must be at least -\d+\.?\d*, which is an mIoU of 100 %, got -99"):
        choose(options, Asked(max_drop_pp=-99.0))


def test_infeasible_names_the_nearest_on_each_axis():
    stats = dataclasses.replace(two_images(), fp=two_images().fp + 1)
    costs = macs_costs(stats)
    with pytest.raises(InfeasibleError, match=r"min_miou=1 is out .* highest mIoU is at exit1.a \+ final.b: mIoU 0.666667, macs 24.5$"):
        search(stats, costs, Objective("macs", 1.0))
    with pytest.raises(InfeasibleError, match=r"macs<=11.9 is out of reach; the least macs is at exit1.a: mIoU 0\.\d+, macs 12$"):
        search(stats, costs, Objective(limits={"macs": 11.9}))
    asked = Objective("macs", 0.6, {"parameters": 130.0})
    with pytest.raises(InfeasibleError, match=r"highest mIoU is at exit1.a: .* the least parameters is at final.b: .* parameters 350$"):
        search(stats, costs, asked)


def test_time_limit_gives_a_bound_that_holds():
    stats = make_stats(5, heads=(2, 2), images=12, thetas=3, largest=40)
    costs = macs_costs(stats)
    exact = search(stats, costs, Objective()).predicted.miou
    stopped = search(stats, costs, Objective(), time_limit=1e-6)
    assert stopped.certificate.open > 0 and stopped.certificate.bound >= exact - 1e-12
    assert stopped.predicted.miou + stopped.certificate.gap == pytest.approx(stopped.certificate.bound)
    assert "left open" in table(stopped)
    within = Objective("macs", original(stats, costs).miou)
    stopped = search(stats, costs, within, time_limit=1e-6)
    assert stopped.certificate.bound <= search(stats, costs, within).predicted.cost_mean <= stopped.predicted.cost_mean


def test_front_has_every_step_once():
    stats = make_stats(1, heads=(2,), images=5)
    costs = macs_costs(stats)
    scored = [evaluate_configuration(stats, costs, each)[:2] for each in enumerate_space(stats, "input-dependent", 1, None, None)]
    best, expected = -1.0, []
    for accuracy, cost in sorted(scored, key=lambda each: (each[1], -each[0])):
        if accuracy > best + 1e-12:
            best = accuracy
            expected.append((accuracy, cost))
    points = front(stats, costs, max_early_exits=1)
    assert np.array([(point.predicted.miou, point.predicted.cost_mean) for point in points]) == pytest.approx(np.array(expected))


def test_table_of_devices_and_constraints(tmp_path, monkeypatch):
    """Each row is a search of its own, and a table that was stopped goes on."""
    stats = two_images()
    stats.save(tmp_path / "stats.npz")
    devices = {"slow": [Asked(min_miou=0.9), Asked(max_cost=1.0)], "other": [Asked(min_miou=0.5), Asked(max_cost=1.0)]}
    choose, asked = mess_tf.search.choose, []

    def stopped(options, each):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(each)
        return choose(options, each)

    monkeypatch.setattr(mess_tf.search, "choose", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_table(tmp_path, devices, None, tmp_path / "table")
    asked.clear()
    rows = run_table(tmp_path, devices, None, tmp_path / "table")
    assert asked == devices["other"][1:]
    assert [(device, each, deployment is None) for device, each, deployment in rows] == [
        (device, each, each.max_cost is not None) for device in devices for each in devices[device]
    ]
    assert {path.name for path in (tmp_path / "table").iterdir()} == {"slow-min_miou-0.9.json", "other-min_miou-0.5.json"}
    assert Deployment.load(tmp_path / "table" / "slow-min_miou-0.9.json") == rows[0][2]
    alone = run(tmp_path, devices["slow"][0])
    assert rows[0][2] == dataclasses.replace(
        alone, certificate=dataclasses.replace(alone.certificate, seconds=rows[0][2].certificate.seconds)
    )
    header, *lines = overview(rows).splitlines()
    assert header.split()[:6] == ["device", "constraint", "mIoU", "%", "mean", "GMACs"]
    assert [line.split()[:2] for line in lines][:2] == [["slow", "min_miou=0.9"], ["slow", "max_cost=1"]]


def test_predictions_have_intervals_around_them():
    stats = make_stats(0, heads=(2,), images=40, largest=60)
    predicted = search(stats, macs_costs(stats), Objective()).predicted
    low, high = predicted.miou_interval
    assert low < predicted.miou < high and high - low < 0.5
    assert predicted.cost_interval[0] <= predicted.cost_mean <= predicted.cost_interval[1]
    assert predicted.images == 40


@pytest.mark.parametrize("argument", [{"setting": "fast"}, {"max_early_exits": -1}, {"quantiles": 1}, {"time_limit": 0}])
def test_search_refuses(argument):
    stats = two_images()
    with pytest.raises(ValueError, match=f"^{next(iter(argument))}: must be"):
        search(stats, macs_costs(stats), Objective("macs", 0.5), **argument)


def test_costs_name_the_entry_that_is_wrong():
    first, *others = macs_costs(two_images()).resources
    with pytest.raises(ValueError, match=r"macs\.prefix"):
        Costs((dataclasses.replace(first, prefix=np.array([0.0, 1.0])), *others))
    for value in (math.nan, -1.0):
        with pytest.raises(ValueError, match=r"macs\.head\[\[1\]\]: must be finite"):
            dataclasses.replace(first, head=np.array([1.0, value]))
    with pytest.raises(ValueError, match=r"^objective: must be of costs macs"):
        search(two_images(), Costs((first, *others)), Objective(limits={"joules": 1.0}))


# === Guarantee ===


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_promised_risk_is_exceeded_as_rarely_as_promised(confidence):
    """1,000 checking sets, on a path whose risks lie closely around the promise, so that each step is a chance to be wrong."""
    rng = np.random.default_rng(0)
    max_risk, risks = 0.1, np.linspace(0.06, 0.14, 17)
    broken = 0
    for _ in range(1000):
        # Most images lose nothing, some lose much: the losses of 100 images at every point of the path.
        losses = (rng.random(100) < 2 * risks[:, None]) * rng.random(100)
        shown = guarantee.last_shown(range(risks.size), lambda step, of=losses: of[step], max_risk, confidence)
        broken += shown is not None and risks[shown] > max_risk
    assert 0 < broken <= 1000 * (1 - confidence)


def test_p_value_is_small_only_where_the_risk_is_shown():
    assert guarantee.p_value(np.zeros(100), 0.05) == pytest.approx(0.95**100)  # only chance explains no loss in any image
    assert guarantee.p_value(np.full(100, 0.2), 0.1) == 1.0
    n = 100
    least = guarantee.least_risk(n, 0.95)
    assert guarantee.p_value(np.zeros(n), least * 1.001) < 0.05 < guarantee.p_value(np.zeros(n), least * 0.999)


def test_image_losses_by_hand():
    stats = two_images()
    assert guarantee.image_losses(stats, np.array([0, 0]), "final").tolist() == [0.0, 0.5]
    assert guarantee.image_losses(stats, np.array([0, 0]), "labels").tolist() == [0.0, 0.5]
    assert guarantee.image_losses(stats, np.array([0, 1]), "labels").tolist() == [0.0, 0.0]


def test_guaranteed_search_keeps_choosing_and_checking_images_apart():
    stats = make_stats(0, heads=(2,), images=60, thetas=3, largest=40)
    costs = macs_costs(stats)
    start = original(stats, costs).cost
    _, deployment = search_guaranteed([(stats, costs)], stats, start, 0.8, 0.9, "final", 0.5, max_early_exits=1)
    promise = deployment.guarantee
    assert (promise.images, deployment.predicted.images) == (30, 30) and promise.estimate < 0.8
    choosing, checking = guarantee.split(stats, 0.5)
    assert sorted(name.partition("#")[0] for name in (*choosing.images, *checking.images)) == sorted(stats.images)
    losses = guarantee.image_losses(checking, mixture(checking, costs, deployment), "final")
    assert promise.estimate == pytest.approx(losses.mean()) and guarantee.p_value(losses, 0.8) <= 0.1
    assert deployment.predicted.cost_mean < original(stats, costs).cost
    with pytest.raises(InfeasibleError, match=r"max_risk=0.001 cannot be shown .* shows no less than 0\.0739"):
        search_guaranteed([(stats, costs)], stats, start, 0.001, 0.9, "final", 0.5, max_early_exits=1)


# === latency ===


def latency_rows(stats: Stats, device="board", threads=1, factor=1.0, backend="xnnpack") -> list[dict]:
    names = [f"prefix.{name}" for name in stats.exits] + [f"head.{name}" for name in stats.candidates]
    names += [f"{mode}.{size}" for mode in ("mask", "plain", "edge") for size in ("45x60", "23x30")]
    hashes = (*stats.prefix_sha256, *stats.head_sha256, *stats.mask_sha256[:2], *stats.plain_sha256[:2], *stats.edge_sha256[:2])
    about = {"device": device, "threads": threads, "backend_requested": backend, "size_bytes": 9}
    return [
        {"submodel": name, "sha256": sha256, "p50_ms": factor * (index + 1)} | about
        for index, (name, sha256) in enumerate(zip(names, hashes, strict=True))
    ]


def test_latency_join_is_by_hash():
    stats = make_stats(0)
    rows = latency_rows(stats)[::-1]
    for row in rows:
        row["submodel"] = "renamed." + row["submodel"]
    costs = latency_costs(stats, rows)
    assert costs.name == "latency_ms"
    assert costs.prefix.tolist() == [1, 2, 3]
    assert costs.head.tolist() == [4, 5, 6, 7]
    assert costs.decision.tolist() == [[2, 4]] * 4  # what confidence adds to the mask


def test_latency_device_and_threads():
    stats = make_stats(0)
    rows = latency_rows(stats) + latency_rows(stats, threads=2, factor=0.5) + latency_rows(stats, device="phone", factor=3.0)
    assert latency_costs(stats, rows, "board", 2).prefix.tolist() == [0.5, 1, 1.5]
    assert latency_costs(stats, rows, "phone").prefix.tolist() == [3, 6, 9]
    with pytest.raises(ValueError, match="device: must be given"):
        latency_costs(stats, rows)
    with pytest.raises(ValueError, match="threads: must be given"):
        latency_costs(stats, rows, "board")
    with pytest.raises(ValueError, match="device: must be one of"):
        latency_costs(stats, rows, "tablet")
    rows += latency_rows(stats, device="phone", factor=0.25, backend="gpu")
    assert latency_costs(stats, rows, "phone", backend="gpu").prefix.tolist() == [0.25, 0.5, 0.75]
    with pytest.raises(
        ValueError, match=r"backend: must be given where latency.json has several, got none; there are \['gpu', 'xnnpack'\]"
    ):
        latency_costs(stats, rows, "phone")


def test_latency_missing_stale_and_not_exported():
    stats = make_stats(0)
    rows = latency_rows(stats)
    with pytest.raises(ValueError, match=r"missing are head\.final\.fcn$"):
        latency_costs(stats, [row for row in rows if row["submodel"] != "head.final.fcn"])
    with pytest.raises(ValueError, match=r"missing are edge\.exit1\.fcn-b1, edge\.final\.fcn$"):
        latency_costs(stats, rows[:-1])
    with pytest.raises(ValueError, match=r"missing are prefix\.exit2 \(stale"):
        latency_costs(stats, [row | {"sha256": "f" * 64} if row["submodel"] == "prefix.exit2" else row for row in rows])
    with pytest.raises(ValueError, match=r"prefix\.final \(not exported yet"):
        latency_costs(dataclasses.replace(stats, prefix_sha256=("", "", "")), rows)


# === backends and precisions ===


def of_two_precisions(seed: int, **shape) -> dict[str, Stats]:
    """Statistics in fp16 and in int8, by a name of each, which see the same labels and have other counts and files."""
    one = dataclasses.replace(make_stats(seed, **shape), precision="fp16")
    rng = np.random.default_rng(1000 + seed)
    right, _, missed = one.counts(0)
    tp = rng.integers(0, np.broadcast_to(right + missed + 1, (len(one.candidates), *right.shape)))
    counts = packed(tp, rng.integers(0, 7, tp.shape), right + missed)
    other = dataclasses.replace(make_stats(seed, **shape), precision="int8", **counts)
    kinds = ("prefix_sha256", "head_sha256", "mask_sha256", "plain_sha256", "edge_sha256")
    renamed = {kind: tuple(f"f{sha256[1:]}" for sha256 in getattr(other, kind)) for kind in kinds}
    return {"of fp16": one, "of int8": dataclasses.replace(other, **renamed)}


def rows_of_two(stats: dict[str, Stats], *backends: str, turn: int = 0) -> list[dict]:
    """In fp16 a GPU is faster than XNNPACK, in int8 slower; turned round, another one is the fastest."""
    pairs = itertools.product(("fp16", "int8"), ("xnnpack", "gpu"))
    factors = dict(zip(pairs, np.roll([1.0, 0.7, 0.5, 0.6], turn), strict=True))
    return [
        row
        for each in stats.values()
        for backend in backends
        for row in latency_rows(each, factor=factors[each.precision, backend], backend=backend)
    ]


@pytest.mark.parametrize("setting", ["input-dependent", "budgeted", "anytime"])
def test_the_best_of_all_backends_and_precisions_equals_brute_force(setting):
    chosen = set()
    for seed in range(3):
        stats = of_two_precisions(seed, heads=(1, 1), images=3)
        rows = rows_of_two(stats, "xnnpack", "gpu", turn=seed)
        costs = {(each.precision, name): latency_costs(each, rows, backend=name) for each in stats.values() for name in ("xnnpack", "gpu")}
        by_precision = {each.precision: each for each in stats.values()}
        originals = [original(by_precision["fp16"], costs["fp16", backend]) for backend in ("xnnpack", "gpu")]
        reference = min(originals, key=lambda each: each.cost)
        questions = [Asked(cost_share=0.8), Asked(max_cost=reference.cost), Asked(min_miou=0.9 * reference.miou)]
        if setting != "anytime":
            questions += [Asked(max_drop_pp=1.0), Asked(max_drop_pp=-2.0, minimise="size_bytes")]

        @functools.cache
        def scores(horizon: float | None, costs=costs, by_precision=by_precision) -> list[tuple[tuple[str, str], float, dict[str, float]]]:
            of_all = []
            for key, of_costs in costs.items():
                stats = by_precision[key[0]]
                for each in enumerate_space(stats, setting, 1, None, horizon):
                    of_all.append((key, evaluate_configuration(stats, of_costs, each)[0], configuration_costs(stats, of_costs, each)))
            return of_all

        for asked in (dataclasses.replace(each, setting=setting, max_early_exits=1) for each in questions):
            objective = resolve_objective(reference, costs["fp16", "gpu"], setting, **asked.constraint)
            horizon = objective.limits.get("latency_ms", reference.cost) if setting == "anytime" else None
            scored = []
            for key, accuracy, values in scores(horizon):
                if meets(objective, accuracy, values):
                    rank = (-accuracy,) if objective.minimise is None else (values[objective.minimise], -accuracy)
                    scored.append((*(round(value, 9) for value in rank), round(values["latency_ms"], 9), key))
            options = options_of(stats, rows)
            if not scored:
                with pytest.raises(InfeasibleError, match=r"^--\w+=\S+: fp16 on gpu: .*; fp16 on xnnpack: .*; int8 on gpu: "):
                    choose(options, asked)
                continue
            deployment = choose(options, asked)
            predicted = deployment.predicted
            rank = (-predicted.miou,) if objective.minimise is None else (predicted.costs[objective.minimise], -predicted.miou)
            assert (*rank, predicted.cost_mean) == pytest.approx(min(scored)[:-1], abs=1e-8)
            key = (deployment.precision, deployment.backend)
            assert key in {each[-1] for each in scored if each[:-1] == min(scored)[:-1]}
            assert deployment.original == original(by_precision[key[0]], costs[key])
            assert [(each.precision, each.backend) for each in deployment.combinations if not each.reason] == [key]
            chosen.add(key)
    assert len(chosen) >= 2


def test_what_verify_has_refused_is_never_chosen():
    stats = of_two_precisions(0)
    rows, asked = rows_of_two(stats, "xnnpack", "gpu"), Asked(min_miou=0.0)
    best = choose(options_of(stats, rows), asked)
    assert (best.precision, best.backend) == ("int8", "xnnpack")
    refused = {("xnnpack", "int8"): "refused by verify on board: mask"}
    options = options_of(stats, rows, refused=refused)
    second = choose(options, asked)
    assert (second.precision, second.backend) == ("int8", "gpu")
    (row,) = (each for each in second.combinations if (each.precision, each.backend) == ("int8", "xnnpack"))
    assert (row.miou, row.exits, row.reason) == (None, (), "refused by verify on board: mask")
    lines = table(second).splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [["gpu", "fp16"], ["xnnpack", "fp16"], ["gpu", "int8"], ["xnnpack", "int8"]]
    assert lines[3].endswith(": chosen") and lines[4].endswith("-  refused by verify on board: mask")
    assert " against " in lines[1] and lines[5].split()[:2] == ["exit", "head"]
    assert sha256(options) != sha256(options_of(stats, rows))
    with pytest.raises(ValueError, match=r"backends: must be such that one can be chosen .*'int8 on xnnpack: refused by verify on board"):
        options_of({"of int8": stats["of int8"]}, rows, backends=["xnnpack"], refused=refused)
    alone = {key: "refused" for key in itertools.product(("gpu", "xnnpack"), ("fp16", "int8"))}
    with pytest.raises(ValueError, match=r"fp16 on gpu: refused; fp16 on xnnpack: refused; int8 on gpu: refused"):
        options_of(stats, rows, refused=alone)


def test_the_original_is_the_same_whatever_can_be_chosen():
    stats = of_two_precisions(0)
    rows = rows_of_two(stats, "xnnpack", "gpu")
    one, other = stats.values()
    fp16_refused = {("gpu", "fp16"): "no", ("xnnpack", "fp16"): "no"}
    against = reference(options_of(stats, rows, refused=fp16_refused))
    assert against.miou == original(one, macs_costs(one)).miou != original(other, macs_costs(other)).miou
    assert against.cost == original(other, latency_costs(other, rows, backend="xnnpack")).cost
    assert reference(options_of(stats, rows, backends=["xnnpack"])).cost == original(one, latency_costs(one, rows, backend="xnnpack")).cost


def test_combinations_that_cannot_be_compared_or_were_not_measured():
    stats = of_two_precisions(0)
    one, other = stats.values()
    rows = rows_of_two({"": one}, "xnnpack", "gpu") + rows_of_two({"": other}, "xnnpack")
    gpu = next(each for each in options_of(stats, rows) if (each.stats.precision, each.backend) == ("int8", "gpu"))
    assert gpu.costs is None and "missing are prefix.exit1 (stale: another version of it was measured), " in gpu.reason
    assert gpu.reason.endswith(" more")
    assert [each.reason for each in options_of(stats, rows, backends=["xnnpack"])] == ["", ""]
    with pytest.raises(ValueError, match=r"backends: must be of \['gpu', 'xnnpack'\] as in latency.json, got 'xnnpack,npu'"):
        options_of(stats, rows, backends=["xnnpack", "npu"])
    with pytest.raises(ValueError, match=r"statistics in int8: images: must be those in fp16"):
        options_of(stats | {"of int8": dataclasses.replace(other, images=("a", "b", "c", "d"))}, rows)


# === a guarantee over backends and precisions ===


def sure_of_two() -> dict[str, Stats]:
    """As `of_two_precisions`, of 60 images; int8 loses a tenth of the right pixels at every exit."""
    one = dataclasses.replace(make_stats(0, heads=(2,), images=60, thetas=3, largest=40), precision="fp16")
    kinds = ("prefix_sha256", "head_sha256", "mask_sha256", "plain_sha256", "edge_sha256")
    renamed = {kind: tuple(f"f{sha256[1:]}" for sha256 in getattr(one, kind)) for kind in kinds}
    return {"of fp16": one, "of int8": dataclasses.replace(one, precision="int8", tp=one.tp * 9 // 10, **renamed)}


def test_a_guarantee_over_backends_and_precisions_is_against_the_original_in_the_highest():
    stats = sure_of_two()
    options = options_of(stats, rows_of_two(stats, "xnnpack", "gpu"))
    asked = Asked(max_risk=0.5, confidence=0.9, precisions=("fp16", "int8"), max_early_exits=1)
    deployment = choose(options, asked)
    assert (deployment.precision, deployment.backend) == ("int8", "xnnpack")  # half the cost everywhere
    option = next(each for each in options if each.name == "int8 on xnnpack")
    checking, of_fp16 = (guarantee.split(each, 0.5)[1] for each in (option.stats, stats["of fp16"]))
    right = of_fp16.counts(-1)[0].sum(1), checking.counts(mixture(checking, option.costs, deployment))[0].sum(1)
    losses = np.maximum(right[0] - right[1], 0) / np.maximum(sum(of_fp16.counts(-1)[::2]).sum(1), 1)
    assert deployment.guarantee.estimate == pytest.approx(losses.mean()) and guarantee.p_value(losses, 0.5) <= 0.1
    assert deployment.predicted.images == deployment.guarantee.images == 30
    assert {row.reason for row in deployment.combinations if row.miou is None} == {"the cheapest that is shown is int8 on xnnpack"}
    alone = [choose(options_of(stats, rows_of_two(stats, name), backends=[name]), asked) for name in ("gpu", "xnnpack")]
    assert deployment.predicted.cost_mean <= min(each.predicted.cost_mean for each in alone)


def test_a_guarantee_takes_no_choice_by_the_checking_images(monkeypatch):
    """What is tested, and in which order, is the same whatever the checking images hold."""
    paths = []

    def recorded(path, losses_of, max_risk, confidence):
        path = list(path)
        paths.append([(number, each.exits) for number, each in path])
        return path[-1]

    monkeypatch.setattr(guarantee, "last_shown", recorded)
    stats = sure_of_two()
    checks = guarantee.split_positions(60, 0.5)[1]
    of_checks = np.isin(stats["of fp16"].image_of_pair, checks)
    for right in (1, 0):
        changed = {name: dataclasses.replace(each, tp=np.where(of_checks, right * each.tp, each.tp)) for name, each in stats.items()}
        choose(options_of(changed, rows_of_two(changed, "xnnpack", "gpu")), Asked(max_risk=0.5, max_early_exits=1))
    assert paths[0] == paths[1] and len({number for number, _ in paths[0]}) > 1


def test_a_guarantee_leaves_out_what_cannot_be_chosen_or_compared():
    stats = sure_of_two()
    refused = {("xnnpack", "int8"): "no", ("gpu", "int8"): "no"}
    deployment = choose(options_of(stats, rows_of_two(stats, "xnnpack", "gpu"), refused=refused), Asked(max_risk=0.9, confidence=0.5))
    assert (deployment.precision, deployment.backend) == ("fp16", "gpu")
    reasons = {(row.precision, row.backend): row.reason for row in deployment.combinations}
    assert reasons["int8", "gpu"] == "no" and reasons["fp16", "xnnpack"] == "the cheapest that is shown is fp16 on gpu"
    with pytest.raises(ValueError, match=r"^risk: must be labels where several precisions are compared, .* got 'final'"):
        Asked(max_risk=0.5, risk="final", precisions=("fp16", "int8"))
    with pytest.raises(InfeasibleError, match=r"size_bytes<=1 is out of reach"):
        choose(options_of(stats, rows_of_two(stats, "xnnpack", "gpu")), Asked(max_risk=0.5, limits={"size_bytes": 1.0}))


# === stats.npz ===


def stored(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def test_stats_round_trip(tmp_path):
    stats = make_stats(0)
    stats.save(tmp_path / "stats.npz")
    loaded = Stats.load(tmp_path / "stats.npz")
    for field in dataclasses.fields(Stats):
        before, after = getattr(stats, field.name), getattr(loaded, field.name)
        assert type(before) is type(after)
        assert np.array_equal(before, after)
    assert stats.exits == ("exit1", "exit2", "final")
    assert stats.exit_of_candidate.tolist() == [0, 0, 1, 2]
    two_images().save(tmp_path / "stats.npz")
    assert Stats.load(tmp_path / "stats.npz").head_sha256 == ("", "")


def test_counts_are_those_that_were_packed():
    rng = np.random.default_rng(0)
    labelled = rng.integers(0, 3, (6, 5)) * rng.integers(0, 2, (6, 5))
    labelled[2] = 0
    tp = rng.integers(0, labelled + 1, (4, 6, 5))
    fp = rng.integers(0, 3, tp.shape) * (rng.random(tp.shape) < 0.1)
    parts = [packed(*(each[..., images, :] for each in (tp, fp, labelled))) for images in (slice(2), slice(2, 3), slice(3, 6))]
    one = dataclasses.replace(make_stats(0, heads=(2, 1), images=6, classes=5), **packed(tp, fp, labelled))
    assert one.labelled.size < 30
    for k in (0, 3, np.array([3, 0, 1, 2, 3, 3])):
        of_image = np.broadcast_to(k, 6), np.arange(6)
        expected = tp[of_image], fp[of_image], labelled - tp[of_image]
        assert all(np.array_equal(*each) for each in zip(one.counts(k), expected, strict=True))
    assert one.labelled_of_class.tolist() == labelled.sum(0).tolist()
    others = [{name: getattr(one, name)[:, images] for name in ("confident", "changed")} for images in (slice(2), slice(2, 3), slice(3, 6))]
    whole = joined([part | other for part, other in zip(parts, others, strict=True)])
    assert all(np.array_equal(array, getattr(one, name)) and array.dtype == np.int32 for name, array in whole.items())
    drawn = guarantee.select(one, np.array([4, 0, 0]))
    assert all(
        np.array_equal(*each)
        for each in zip(drawn.counts(1), (tp[1, [4, 0, 0]], fp[1, [4, 0, 0]], (labelled - tp[1])[[4, 0, 0]]), strict=True)
    )
    with pytest.raises(ValueError, match="labelled: must be below 2147483648 pixels of a class in each image, got 2147483648"):
        packed(tp, fp, labelled * 2**30)


def changed(array: np.ndarray, index: tuple, value: float) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


BROKEN = {
    "nan": ("theta_pix", lambda v: changed(v, (0,), np.nan)),
    "decreasing": ("theta_pix", lambda v: v[::-1]),
    "above_one": ("theta_pix", lambda v: changed(v, (-1,), 1.5)),
    "theta_shape": ("theta_pix", lambda v: v[None]),
    "theta_dtype": ("theta_pix", lambda v: v.astype(np.float32)),
    "negative_tp": ("tp", lambda v: changed(v, (0, 0), -1)),
    "nan_tp": ("tp", lambda v: changed(v.astype(float), (0, 0), np.nan)),
    "fp_shape": ("fp", lambda v: v[:, :-1]),
    "tp_above_labelled": ("tp", lambda v: v + 7),
    "labelled_dtype": ("labelled", lambda v: v.astype(np.int64)),
    "pairs_out_of_order": ("class_of_pair", lambda v: v[::-1]),
    "class_of_pair_above": ("class_of_pair", lambda v: changed(v, (-1,), 3)),
    "image_of_pair_above": ("image_of_pair", lambda v: changed(v, (-1,), 4)),
    "negative_head": ("head_macs", lambda v: changed(v, (0,), -1)),
    "prefix_shape": ("prefix_macs", lambda v: v[:-1]),
    "no_pixels": ("pixels", lambda v: changed(v, (0,), 0)),
    "too_many_pixels": ("pixels", lambda v: changed(v, (0,), 2**22 + 1)),
    "confident_shape": ("confident", lambda v: v[..., :1]),
    "confident_above_pixels": ("confident", lambda v: v + 7),
    "candidate_order": ("candidates", lambda v: v[::-1]),
    "candidate_gap": ("candidates", lambda v: np.char.replace(v, "exit2", "exit3")),
    "two_finals": ("candidates", lambda v: np.char.replace(v, "exit2", "final")),
    "candidate_twice": ("candidates", lambda v: np.char.replace(v, "b1", "b0")),
    "no_images": ("images", lambda v: v[:0]),
    "image_numbers": ("images", lambda v: np.arange(v.size)),
    "class_twice": ("classes", lambda v: np.char.replace(v, "class1", "class0")),
    "prefix_hashes": ("prefix_sha256", lambda v: v[1:]),
    "head_hashes": ("head_sha256", lambda v: v[1:]),
    "edge_hashes": ("edge_sha256", lambda v: v[1:]),
    "fidelity": ("fidelity", lambda v: np.array("high")),
    "made_by": ("made_by", lambda v: np.array("me")),
    "made_by_list": ("made_by", lambda v: np.array("[]")),
    "format": ("format", lambda v: v + 1),
}


@pytest.mark.parametrize("case", BROKEN)
def test_stats_name_the_broken_key(tmp_path, case):
    make_stats(0).save(tmp_path / "stats.npz")
    key, change = BROKEN[case]
    arrays = stored(tmp_path / "stats.npz")
    np.savez(tmp_path / "stats.npz", **arrays | {key: change(arrays[key])})
    with pytest.raises(ValueError, match=rf"stats\.npz: {key}: must be"):
        Stats.load(tmp_path / "stats.npz")


def test_stats_without_labels():
    stats = make_stats(0)
    with pytest.raises(ValueError, match="at least one labelled pixel"):
        dataclasses.replace(stats, tp=stats.tp * 0, labelled=stats.labelled * 0)


def test_stats_unknown_missing_and_broken_off(tmp_path):
    path = tmp_path / "stats.npz"
    make_stats(0).save(path)
    arrays = stored(path)
    np.savez(path, surplus=1, **arrays)
    with pytest.raises(ValueError, match="got 'unknown surplus'"):
        Stats.load(path)
    np.savez(path, **{key: value for key, value in arrays.items() if key != "fp"})
    with pytest.raises(ValueError, match="got 'missing fp'"):
        Stats.load(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"complete \.npz file"):
        Stats.load(path)
    np.savez_compressed(path, **arrays)
    with pytest.raises(ValueError, match="is compressed"):
        Stats.load(path)
    np.savez(path, **arrays | {"format": 1})
    with pytest.raises(ValueError, match=r"format: must be 2; `python -m mess_tf\.calibrate` makes the file anew, got 1"):
        Stats.load(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"stats\.npz: must exist, `python -m mess_tf\.calibrate` makes it"):
        Stats.load(path)


# === deployment.json ===


@pytest.fixture
def deployment() -> Deployment:
    stats = two_images()
    return search(stats, macs_costs(stats), Objective("macs", 0.9))


def test_deployment_round_trip(tmp_path, deployment):
    stats = two_images()
    others = [search(stats, macs_costs(stats), Objective(limits={"macs": 90.0}), setting) for setting in ("budgeted", "anytime")]
    for each in (deployment, *others):
        each.save(tmp_path / "deployment.json")
        loaded = Deployment.load(tmp_path / "deployment.json")
        assert loaded == each
        expected = (each.predicted.miou, each.predicted.cost_mean)
        assert evaluate_configuration(stats, macs_costs(stats), loaded)[:2] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format"),
        ({"surplus": 1}, "surplus"),
        ({"setting": "fast"}, "setting: must be"),
        ({"setting": "budgeted"}, "exits: must be one exit"),
        ({"setting": "anytime"}, "exits: must be with thresholds"),
        ({"horizon": 3.0}, "horizon"),
        ({"edge_aware": 1}, "edge_aware"),
        ({"exits": []}, "exits: must be"),
        ({"exits": [{"exit": "exit1", "head": "a", "theta_pix": 0.5, "theta_img": None}]}, "thresholds or none"),
        ({"exits": [{"exit": "exit1", "head": "a", "theta_pix": 0.5, "theta_img": 1.5}]}, "theta_img: must be in"),
        ({"original": {"miou": math.nan, "cost": 1.0}}, "original.miou"),
        ({"constraint": {"minimise": "macs", "min_miou": None, "limits": {}}}, "min_miou: must be given where a cost is minimised"),
        ({"constraint": {"minimise": "macs", "min_miou": 2.0, "limits": {}}}, "min_miou: must be in"),
        ({"constraint": {"minimise": None, "min_miou": None, "limits": {"macs": -1.0}}}, r"limits.macs: must be above 0"),
        ({"guarantee": {"risk": "loss", "max_risk": 0.1, "confidence": 0.9, "estimate": 0.0, "images": 1}}, "risk: must be one of"),
        ({"stats_sha256": None}, "stats_sha256"),
    ],
)
def test_deployment_is_strict(tmp_path, deployment, change, message):
    path = tmp_path / "deployment.json"
    deployment.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        Deployment.load(path)
    assert str(error.value).startswith(str(path))


def test_deployment_needs_a_file_a_rate_per_exit_and_every_key(tmp_path, deployment):
    with pytest.raises(ValueError, match="exit_rates"):
        dataclasses.replace(deployment, predicted=dataclasses.replace(deployment.predicted, exit_rates=(1.0,)))
    path = tmp_path / "deployment.json"
    deployment.save(path)
    content = json.loads(path.read_text())
    del content["certificate"]["gap"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"certificate: .*'gap'"):
        Deployment.load(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"deployment\.json: must exist, `python -m mess_tf\.search` makes it"):
        Deployment.load(path)


def test_nothing_half_written_is_left(tmp_path, deployment, monkeypatch):
    stats_path, deployment_path = tmp_path / "stats.npz", tmp_path / "deployment.json"
    make_stats(0).save(stats_path)
    deployment.save(deployment_path)
    before = {path: path.read_bytes() for path in (stats_path, deployment_path)}

    def broken_savez(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", broken_savez)
    with pytest.raises(OSError, match="disk full"):
        make_stats(1).save(stats_path)
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(deployment, certificate=Certificate(1, 1, {}, 0, math.nan, 0.0, 0.1, None)).save(deployment_path)

    def broken_replace(source, target):
        raise OSError("no such device")

    monkeypatch.setattr(os, "replace", broken_replace)
    with pytest.raises(OSError, match="no such device"):
        deployment.save(deployment_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# === command ===


def test_time_that_kernels_are_compiled_in_is_no_time_of_the_search(monkeypatch):
    """A kernel is compiled in the middle of a search."""
    stats, run = two_images(), optimum.Optimiser.run
    monkeypatch.setattr(optimum.Optimiser, "run", lambda self: numba.njit(lambda x: x + 1)(1) and run(self))
    began, compiled = time.perf_counter(), kernels.compiled_s()
    found = search(stats, macs_costs(stats), Objective("macs", 0.9))
    took, compiled = time.perf_counter() - began, kernels.compiled_s() - compiled
    assert compiled > 0 and found.certificate.seconds + compiled < took


def test_the_table_says_what_compiling_took(deployment):
    deployment = dataclasses.replace(deployment, certificate=dataclasses.replace(deployment.certificate, seconds=0.26))
    assert table(deployment).endswith("the optimum; 0.3 s") and table(deployment, 0.9) == table(deployment)
    assert table(deployment, 41.3).endswith("the optimum; 0.3 s, compiled in 41 s before")


def test_table_has_one_unit_for_a_cost(deployment):
    predicted = dataclasses.replace(deployment.predicted, costs={"macs": 24.5, "macs_p90": 37e6, "parameters": 370.0, "memory_bytes": 80.0})
    rows = [Combination("gpu", "fp16", 1.0, 24.5, ("final.b",), ""), Combination("gpu", "int8", 0.9, 50e6, ("final.b",), "")]
    limited = Objective("macs", 0.9, {"macs_p90": 4e7, "parameters": 400.0})
    lines = table(dataclasses.replace(deployment, predicted=predicted, constraint=limited, combinations=tuple(rows))).splitlines()
    assert lines[0].endswith("mean GMACs") and lines[2].split()[3] == "0.05"
    assert {"macs_p90 0.037 GMACs, at most 0.04 GMACs", "parameters 370, at most 400"} <= {*lines}


def test_table(deployment):
    lines = table(deployment).splitlines()
    assert lines[1].split() == ["exit1", "a", "0.5000", "0.7500", "50.0%"]
    assert lines[2].split() == ["final", "b", "-", "-", "50.0%"]
    assert lines[7].split() == ["difference", "+0.00", "0.700x", "1.057x"]


def test_command(tmp_path, command):
    stats = make_stats(3)
    stats.save(tmp_path / "stats.npz")
    about = {"soc": "s", "os": "o", "runtime": "r", "runtime_version": "1", "p90_ms": 99.0, "mean_ms": 9.0, "runs": 5}
    about |= {"backend_obtained": "unknown", "temperature_c": None}
    rows = tuple(LatencyRow(**row, **about) for row in latency_rows(stats))
    write_json(tmp_path / "latency.json", LatencyTable({}, rows).to_json())
    words = (f"--workdir={tmp_path}", f"--latency={tmp_path / 'latency.json'}", "--max_drop_pp=1", "--max_early_exits=2")
    code, out, err = command("search", *words)
    assert (code, err) == (0, "")
    path = tmp_path / "deployment.json"
    assert out.splitlines()[-1] == str(path)
    deployment = Deployment.load(path)
    costs = latency_costs(stats, latency_rows(stats))
    objective = resolve_objective(original(stats, costs), costs, "input-dependent", max_drop_pp=1.0)
    expected = search(stats, costs, objective, max_early_exits=2)
    assert (deployment.exits, deployment.predicted) == (expected.exits, expected.predicted)
    assert deployment.stats_sha256 == file_sha256(tmp_path / "stats.npz")


def test_command_over_backends_and_precisions(tmp_path):
    """Searched again where anything that decides has changed, and only then; what a phone of the same kind has refused is left out."""
    stats = of_two_precisions(0)
    for each in stats.values():
        each.save(tmp_path / f"stats.{each.precision}.npz")
    about = {"soc": "s", "os": "o", "runtime": "r", "runtime_version": "1", "p90_ms": 99.0, "mean_ms": 9.0, "runs": 5}
    about |= {"backend_obtained": "unknown", "temperature_c": None}
    rows = rows_of_two(stats, "xnnpack", "gpu")
    unique = {(row["sha256"], row["backend_requested"]): LatencyRow(**row, **about) for row in rows}
    latency = tmp_path / "latency.json"
    write_json(latency, LatencyTable({}, tuple(unique.values())).to_json())
    asked = Asked(min_miou=0.0, backends=("xnnpack", "gpu"), precisions=("fp16", "int8"))
    deployment = run(tmp_path, asked, latency)
    assert Deployment.load(tmp_path / "deployment.json") == deployment
    assert (deployment.precision, deployment.backend, deployment.asked) == ("int8", "xnnpack", asked)
    assert deployment.stats_sha256 == file_sha256(tmp_path / deployment.named("stats.npz"))
    assert deployment.predicted.in_manifest(deployment.backend).backend == "xnnpack"
    assert is_searched(tmp_path, asked, latency) and not is_searched(tmp_path, dataclasses.replace(asked, backends=()), latency)

    outputs = Report("bundle", "", "int8", "xnnpack", "", "", 1.0, 1, 5, (), None, {}, ("shader",)).to_json()
    refusal = {"device": "another", "soc": "s", "backend_requested": "xnnpack", "precision": "int8", "outputs": outputs}
    write_json(tmp_path / "verification.json", {"format": 1, "devices": [refusal]})
    assert not is_searched(tmp_path, asked, latency)
    deployment = run(tmp_path, asked, latency)
    assert (deployment.precision, deployment.backend) == ("int8", "gpu")
    assert [each.reason for each in deployment.combinations if each.miou is None] == ["refused by verify on another: shader"]
    ((_, _, again),) = run_table(tmp_path, {"board": [asked]}, latency, tmp_path / "deployments")
    assert again.exits == deployment.exits and ", int8 on gpu" in overview([("board", asked, again)])

    of_fp16 = dataclasses.replace(asked, precisions=("fp16",))
    (tmp_path / "stats.int8.npz").rename(tmp_path / "stats.fp16.npz")
    with pytest.raises(ValueError, match=r"stats\.fp16\.npz: precision: must be fp16, got 'int8'"):
        run(tmp_path, of_fp16, latency)
    with pytest.raises(ValueError, match="latency: must be given with backends or precisions, got None"):
        run(tmp_path, asked)


@pytest.mark.parametrize("change", [{"precisions": ("fp8",)}, {"precisions": ("fp16", "fp16")}, {"backends": ("gpu", "gpu")}])
def test_backends_and_precisions_are_different_and_known(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}: must be "):
        Asked(min_miou=0.5, **change)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ([], "--min_miou, --max_drop_pp"),
        (["--max_cost=0.5"], "macs<=0.5 is out of reach; the least macs is at"),
        (["--max_risk=0.1", "--max_cost=9"], "max_risk: must be given for one device, without another constraint"),
    ],
)
def test_command_that_fails_writes_nothing(tmp_path, command, constraint, message):
    make_stats(3).save(tmp_path / "stats.npz")
    code, out, err = command("search", f"--workdir={tmp_path}", *constraint)
    assert (code, out) == (1, "") and message in err
    assert [path.name for path in tmp_path.iterdir()] == ["stats.npz"]
