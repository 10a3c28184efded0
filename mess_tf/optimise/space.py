"""What a configuration costs and does: costs, and the definition of a configuration's accuracy, straight from the statistics; slow."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mess_runtime.bundle import ANYTIME, BUDGETED, INPUT_DEPENDENT, check
from mess_tf.files import Configuration, ExitChoice, Original, Predicted, Stats
from mess_tf.metrics import miou
from mess_tf.optimise import guarantee, kernels

NAMED = 3  # missing submodels, of any number

# === Costs ===


@dataclasses.dataclass(frozen=True, eq=False)
class Resource:
    """One cost of prefixes and heads, and how those of a configuration make up its own.

    Attributes:
      name: with its unit.
      kind: `kernels.MEAN` or `P90` over the images, `TOTAL` of all that is deployed, or `PEAK`, the largest of its parts.
      prefix: float64 [E], from the image to the tap of each exit.
      head: float64 [K], of each candidate, up to its mask.
      decision: float64 [K, 2], of computing a candidate's confidence beside its mask, plain and edge-aware.
    """

    name: str
    kind: int
    prefix: np.ndarray
    head: np.ndarray
    decision: np.ndarray

    def __post_init__(self):
        for part in ("prefix", "head", "decision"):
            values = getattr(self, part)
            wrong = ~(np.isfinite(values) & (values >= 0))
            check(
                not wrong.any(), f"{self.name}.{part}{np.argwhere(wrong)[:1].tolist()}", "finite and at least 0", values[wrong][:1].tolist()
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Costs:
    """All costs; the first one is the mean cost of an image, `macs` or `latency_ms`, above 0 at every prefix.

    Names: `macs` and `macs_p90`, `latency_ms` and `latency_p90_ms` (means and 90th percentiles over the images), `parameters`, `size_bytes`
    and `memory_bytes` (the most that is alive at once).
    """

    resources: tuple[Resource, ...]

    def __post_init__(self):
        check(self.prefix.min() > 0, f"{self.name}.prefix", "above 0 at every exit", self.prefix.tolist())

    @property
    def sha256(self) -> str:
        """SHA-256 of all costs, in lower-case hexadecimal."""
        digest = hashlib.sha256()
        for resource in self.resources:
            digest.update(f"{resource.name} {resource.kind} ".encode())
            for part in (resource.prefix, resource.head, resource.decision):
                digest.update(part.astype(np.float64).tobytes())
        return digest.hexdigest()

    @property
    def names(self) -> list[str]:
        """Of all costs."""
        return [resource.name for resource in self.resources]

    @property
    def name(self) -> str:
        """Of the first one."""
        return self.resources[0].name

    @property
    def prefix(self) -> np.ndarray:
        """Of the first one, float64 [E]."""
        return self.resources[0].prefix

    @property
    def head(self) -> np.ndarray:
        """Of the first one, float64 [K]."""
        return self.resources[0].head

    @property
    def decision(self) -> np.ndarray:
        """Of the first one, float64 [K, 2]."""
        return self.resources[0].decision


def macs_costs(stats: Stats) -> Costs:
    """Costs that need no device; the first are multiply-accumulate operations."""
    free = np.zeros((len(stats.candidates), 2))
    parts = (
        ("macs", kernels.MEAN, stats.prefix_macs, stats.head_macs),
        ("macs_p90", kernels.P90, stats.prefix_macs, stats.head_macs),
        ("parameters", kernels.TOTAL, stats.prefix_parameters, stats.head_parameters),
        ("memory_bytes", kernels.PEAK, stats.prefix_memory_bytes, stats.head_memory_bytes),
    )
    return Costs(tuple(Resource(name, kind, prefix.astype(float), head.astype(float), free) for name, kind, prefix, head in parts))


def matching(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """Rows of latency.json with these values; None for the only value that there is.

    Raises:
      ValueError: there are several values where None is given, or none of the rows has a value.
    """
    for key, value in wanted.items():
        name, known = key.removesuffix("_requested"), sorted({row[key] for row in rows})
        if value is None and len(known) > 1:
            raise ValueError(f"{name}: must be given where latency.json has several, got none; there are {known}")
        if value is not None and value not in known:
            raise ValueError(f"{name}: must be one of {known} as in latency.json, got {value!r}")
        rows = [row for row in rows if value is None or row[key] == value]
    return list(rows)


def measured(rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, str], source: str) -> dict[str, Mapping[str, Any]]:
    """Rows of latency.json by their hash.

    Args:
      rows: of one device, number of threads and backend.
      wanted: submodels that must be there, each with its hash, empty if it has none yet.
      source: the file that names them.

    Raises:
      ValueError: one is missing, or has something that is no latency.
    """
    by_sha256 = {row["sha256"]: row for row in rows}
    known = {row["submodel"] for row in rows}
    problems = []
    for submodel, sha256 in wanted.items():
        if not sha256:
            problems.append(f"{submodel} (not exported yet: {source} has no hash of it)")
        elif sha256 not in by_sha256:
            problems.append(f"{submodel} (stale: another version of it was measured)" if submodel in known else submodel)
    if problems:
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        missing = f"{', '.join(problems[:NAMED])}{more}"
        device = f" of {rows[0]['device']}" if rows else ""
        raise ValueError(f"latency.json: must have a row{device} for every submodel of {source}, missing are {missing}")
    for submodel, sha256 in wanted.items():
        latency = by_sha256[sha256]["p50_ms"]
        check(math.isfinite(latency) and latency > 0, f"latency.json: {submodel}: p50_ms", "above 0", latency)
    return by_sha256


def latency_costs(
    stats: Stats, rows: Sequence[Mapping[str, Any]], device: str | None = None, threads: int | None = None, backend: str | None = None
) -> Costs:
    """Costs of a device, the first in ms (the median), joined to the candidates by the hash of their submodels, and those of `macs_costs`.

    Args:
      stats: with the hashes of the exported submodels.
      rows: of latency.json, no two of the same sha256, device, threads and backend_requested; `submodel`, `p50_ms` and `size_bytes` are
        read as well.
      device: whose rows count; needed where the file has several.
      threads, backend: likewise.

    Raises:
      ValueError: the rows leave the device, the number of threads or the backend open, lack a submodel, or hold something that is no
        latency.
    """
    rows = matching(rows, device=device, threads=threads, backend_requested=backend)
    wanted = {f"prefix.{name}": sha256 for name, sha256 in zip(stats.exits, stats.prefix_sha256, strict=True)}
    wanted |= {f"head.{name}": sha256 for name, sha256 in zip(stats.candidates, stats.head_sha256, strict=True)}
    for mode, of_candidate in (("mask", stats.mask_sha256), ("plain", stats.plain_sha256), ("edge", stats.edge_sha256)):
        wanted |= {f"{mode}.{name}": sha256 for name, sha256 in zip(stats.candidates, of_candidate, strict=True)}
    by_sha256 = measured(rows, wanted, "stats.npz")

    def resource(name: str, kind: int, key: str) -> Resource:
        values = np.array([by_sha256[sha256][key] for sha256 in wanted.values()], np.float64)
        prefix, (head, mask, plain, edge) = values[: len(stats.exits)], values[len(stats.exits) :].reshape(4, -1)
        return Resource(name, kind, prefix, head, np.maximum(np.stack([plain - mask, edge - mask], axis=1), 0.0))

    of_device = (
        resource("latency_ms", kernels.MEAN, "p50_ms"),
        resource("latency_p90_ms", kernels.P90, "p50_ms"),
        resource("size_bytes", kernels.TOTAL, "size_bytes"),
    )
    return Costs((*of_device, *macs_costs(stats).resources))


def arrival_costs(stats: Stats, costs: Costs | Resource, chain: Sequence[int], edge_aware: bool | None) -> np.ndarray:
    """Cost of reaching the result of each exit of a chain: its prefix, all chosen heads up to it, and the decisions taken on the way.

    Args:
      stats: of the candidates.
      costs: of the candidates; of several, the first counts.
      chain: m candidates, shallow to deep.
      edge_aware: how all exits but the last decide; None where none does.

    Returns:
      float64 [m].
    """
    chain = list(chain)
    arrivals = costs.prefix[stats.exit_of_candidate[chain]] + np.cumsum(costs.head[chain])
    if edge_aware is not None:
        decision = costs.decision[chain, int(edge_aware)]
        decision[-1] = 0.0
        arrivals += np.cumsum(decision)
    return arrivals


# === The definition ===


def _decides(configuration: Configuration) -> bool | None:
    return configuration.edge_aware if configuration.setting == INPUT_DEPENDENT else None


def evaluate_configuration(stats: Stats, costs: Costs, configuration: Configuration) -> tuple[float, float, np.ndarray]:
    """Accuracy and cost of one configuration, straight from their definition; slow.

    Args:
      stats: of the candidates.
      costs: of the candidates.
      configuration: a deployment or a plain configuration.

    Returns:
      Three values. mIoU (0..1): of the counts summed over the images, each taken at the exit where it leaves; with `anytime`, the mean
      mIoU of the result that stands at a deadline anywhere between 0 and the horizon, 0 before the first result. Mean cost of an image.
      int64 [I], the exit where each image leaves, as position in `configuration.exits`; with `anytime` always the last.
    """
    chain = [stats.candidates.index(f"{choice.exit}.{choice.head}") for choice in configuration.exits]
    arrivals = arrival_costs(stats, costs, chain, _decides(configuration))
    leaves_at = np.full(len(stats.images), len(chain) - 1)
    if configuration.setting == ANYTIME:
        miou_of_exit = [float(miou(*(counts.sum(0) for counts in stats.counts(k)))) for k in chain]
        return float(mean_over_deadlines(miou_of_exit, arrivals, configuration.horizon)), float(arrivals[-1]), leaves_at
    for position in range(len(chain) - 2, -1, -1):
        choice = configuration.exits[position]
        theta = stats.theta_pix.tolist().index(choice.theta_pix)
        confident = stats.confident[chain[position], :, theta, int(configuration.edge_aware)]
        leaves_at[confident >= np.ceil(choice.theta_img * stats.pixels - 1e-9)] = position  # of several, the first one counts
    tp, fp, fn = (counts.sum(0) for counts in stats.counts(np.array(chain)[leaves_at]))
    return float(miou(tp, fp, fn)), float(arrivals[leaves_at].mean()), leaves_at


def mean_over_deadlines(miou_of_exit: np.ndarray, arrivals: np.ndarray, horizon: float) -> np.ndarray:
    """Mean over all deadlines in [0, horizon] of the mIoU [m] or [m, B] of the latest result, 0 before the first one."""
    changes = np.minimum(np.append(np.maximum.accumulate(arrivals), np.inf), horizon)
    return np.diff(changes) @ np.asarray(miou_of_exit) / horizon


def mixture(stats: Stats, costs: Costs, configuration: Configuration) -> np.ndarray:
    """The candidate where each image leaves, int64 [I]."""
    chain = np.array([stats.candidates.index(f"{choice.exit}.{choice.head}") for choice in configuration.exits])
    return chain[evaluate_configuration(stats, costs, configuration)[2]]


def configuration_costs(stats: Stats, costs: Costs, configuration: Configuration) -> dict[str, float]:
    """All costs of one configuration by name, straight from their definition."""
    chain = [stats.candidates.index(f"{choice.exit}.{choice.head}") for choice in configuration.exits]
    leaves_at = evaluate_configuration(stats, costs, configuration)[2]
    values = {}
    for resource in costs.resources:
        arrivals = arrival_costs(stats, resource, chain, _decides(configuration))
        if resource.kind == kernels.MEAN:
            value = arrivals[leaves_at].mean()
        elif resource.kind == kernels.P90:
            value = np.quantile(arrivals[leaves_at], kernels.P90_SHARE, method="inverted_cdf")
        elif resource.kind == kernels.TOTAL:
            value = arrivals[-1]
        else:
            value = max(resource.prefix[stats.exit_of_candidate[chain[-1]]], resource.head[chain].max())
        values[resource.name] = float(value)
    return values


def original(stats: Stats, costs: Costs) -> Original:
    """The network without early exits."""
    choice = ExitChoice("final", stats.candidates[-1].partition(".")[2])
    accuracy, cost, _ = evaluate_configuration(stats, costs, Configuration(BUDGETED, False, (choice,), None))
    return Original(accuracy, cost)


def predict(stats: Stats, costs: Costs, configuration: Configuration) -> Predicted:
    """What a configuration does on the images of the statistics."""
    accuracy, cost, leaves_at = evaluate_configuration(stats, costs, configuration)
    chain = [stats.candidates.index(f"{choice.exit}.{choice.head}") for choice in configuration.exits]
    arrivals = arrival_costs(stats, costs, chain, _decides(configuration))
    rates = np.bincount(leaves_at, minlength=len(chain)) / leaves_at.size
    drawn = guarantee.resamples(leaves_at.size)
    if configuration.setting == ANYTIME:
        of_exit = np.array([miou(*(drawn @ counts for counts in stats.counts(k))) for k in chain])
        mious = mean_over_deadlines(of_exit, arrivals, configuration.horizon)
    else:
        mious = miou(*(drawn @ counts for counts in stats.counts(np.array(chain)[leaves_at])))
    return Predicted(
        miou=accuracy,
        cost_name=costs.name,
        cost_mean=cost,
        cost_p90=float(np.quantile(arrivals[leaves_at], kernels.P90_SHARE, method="inverted_cdf")),
        exit_rates=tuple(rates.tolist()),
        costs=configuration_costs(stats, costs, configuration),
        miou_interval=guarantee.interval(mious),
        cost_interval=guarantee.interval(drawn @ arrivals[leaves_at] / leaves_at.size),
        images=leaves_at.size,
    )
