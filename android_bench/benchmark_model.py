"""The two programs called `benchmark_model`: their command lines, and what their output proves.

TensorFlow Lite's and LiteRT's tool share a base and differ in flags and in what they print. Which flags a build knows is read from its
own usage text, since an unknown flag is no error to it. A run counts only if it ended well, measured something, took every flag, and its
log shows on what it ran: both tools go on, silently and with exit code 0, on the CPU when an accelerator is missing.
"""

import dataclasses
import functools
import json
import math
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from mess_runtime.bundle import check, file_sha256, write_json
from mess_runtime.files import locked, write_atomically

TFLITE, LITERT = "tflite", "litert"
XNNPACK, CPU, GPU, NNAPI, NPU, UNKNOWN = "xnnpack", "cpu", "gpu", "nnapi", "npu", "unknown"
BACKENDS = (XNNPACK, CPU, GPU, NNAPI, NPU)

_NIGHTLY = "https://storage.googleapis.com/tensorflow-nightly-public/prod/tensorflow/release/lite/tools/nightly/latest"
DOWNLOADS = {
    (TFLITE, "arm64-v8a"): f"{_NIGHTLY}/android_aarch64_benchmark_model",
    (TFLITE, "armeabi-v7a"): f"{_NIGHTLY}/android_arm_benchmark_model",
    (LITERT, "arm64-v8a"): "https://storage.googleapis.com/litert/binaries/2.2.0/android_arm64/benchmark_model",
}
FETCH_SECONDS = 60

# A line of either tool, from its streams or from logcat: severity, then text.
_LINE = re.compile(
    r"(?:\d\d-\d\d \d\d:\d\d:\d\d\.\d+ +\d+ +\d+ (?P<letter>[VDIWEF]) \S+ *: )?"
    r"(?:(?P<severity>VERBOSE|INFO|WARN|WARNING|ERROR|FATAL): )?(?:\[[\w./-]+:\d+\] )?(?P<text>.*)"
)
_COUNT = re.compile(
    r"count=(?P<count>\d{1,15})(?: first=\d{1,15})?(?: curr=(?P<curr>\d{1,15})(?P<same>\(all same\))?)?"
    r"(?: min=(?P<min>\d{1,15}) max=(?P<max>\d{1,15}) avg=(?P<avg>[-+\d.e]{1,30}|nan|inf) std=\d{1,15})?"
    r"(?: p5=\d{1,15} median=(?P<median>\d{1,15}) p95=(?P<p95>\d{1,15}))?\s*",
    re.ASCII,
)
_EXPLICIT = re.compile(r"Explicitly applied (\w+) delegate, and the model graph will be (completely|partially) executed by the delegate")
_REFUSED = re.compile(r"Though (\w+) delegate is explicitly applied, the model graph will not be executed by the delegate")
_REPLACING = re.compile(r"Replacing (\d{1,9}) out of (\d{1,9}) node\(s\) with delegate \((\w+)\)")
_DELEGATES = {XNNPACK: r"XNNPack", GPU: r"Gpu|^LITERT_(CL|GL|WEBGPU)", NNAPI: r"Nnapi", NPU: r"Dispatch"}
_NODE_TYPE = re.compile(
    r"\s{0,99}(\S{1,99}(?: \S{1,99}){0,9})\s{1,99}(\d{1,9})\s{1,99}([\d.]{1,30})\s{1,99}[\d.]{1,30}%\s{1,99}[\d.]{1,30}%"
    r"\s{1,99}([\d.]{1,30})(?:\s{1,99}(\d{1,15}))?\s{0,99}"
)
_PEAK = re.compile(r"(?:Overall peak memory footprint \(MB\) via periodic monitoring|Peak memory):\s+([\d.]+)")


class BenchmarkError(RuntimeError):
    """A run that proves nothing; the message says why."""


# === Command lines ===


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a submodel is measured.

    Attributes:
      backend: one of `BACKENDS`: XNNPACK, the built-in CPU kernels, GPU, NNAPI (TFLite's tool) or NPU (LiteRT's).
      threads: of the interpreter.
      cpus: `all`, `big` (all but the slowest kind of CPU) or a taskset mask in hexadecimal.
      num_runs, min_secs: least number and least total time in seconds of the samples of one run of the tool.
      max_secs: a run of the tool ends after so many seconds with the samples it has.
      warmup_runs: invocations that are not counted.
      extra: more flags for the tool, each `--name=value`.
    """

    backend: str
    threads: int
    cpus: str
    num_runs: int
    min_secs: float
    max_secs: float
    warmup_runs: int
    extra: tuple[str, ...]

    def __post_init__(self):
        check(self.backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", self.backend)
        check(self.threads >= 1, "threads", "at least 1", self.threads)
        check(re.fullmatch(r"all|big|[0-9a-f]{1,16}", self.cpus) is not None, "cpus", "all, big or a hexadecimal mask", self.cpus)
        check(self.num_runs >= 1, "num_runs", "at least 1", self.num_runs)
        check(0 <= self.min_secs <= self.max_secs, "min_secs", f"in [0, max_secs = {self.max_secs}]", self.min_secs)
        check(self.warmup_runs >= 1, "warmup_runs", "at least 1", self.warmup_runs)
        for flag in self.extra:
            check(re.fullmatch(r"--[\w-]+=.*", flag) is not None, "extra", "--name=value", flag)


@dataclasses.dataclass(frozen=True)
class Tool:
    """What one build can do.

    Attributes:
      kind: `tflite` or `litert`.
      flags: names that it knows.
    """

    kind: str
    flags: frozenset[str]


# The benchmark app prints no usage text; these flags are in every build of it since TensorFlow 2.3. It cannot write a result file.
APP_TOOL = Tool(
    TFLITE,
    frozenset(
        {"graph", "num_runs", "min_secs", "max_secs", "warmup_runs", "warmup_min_secs", "num_threads"}
        | {"use_xnnpack", "use_gpu", "use_nnapi", "enable_op_profiling"}
        | {"gpu_precision_loss_allowed", "nnapi_accelerator_name", "nnapi_allow_fp16", "nnapi_execution_preference"}
    ),
)


def read_usage(text: str) -> Tool:
    """Returns what the usage text of `--help` tells.

    Raises:
      BenchmarkError: it is not one of the two tools.
    """
    flags = frozenset(re.findall(r"^\s+--([\w-]+)=", text, re.MULTILINE))
    for kind, flag in ((TFLITE, "input_layer_shape"), (LITERT, "dispatch_library_path")):
        if {"graph", flag} <= flags:
            return Tool(kind, flags)
    said = " ".join(text.split())[:200]
    raise BenchmarkError(f"neither TensorFlow Lite's nor LiteRT's benchmark_model: its --help lists {len(flags)} known flags ({said})")


@dataclasses.dataclass(frozen=True)
class Feed:
    """What a run reads and where its outputs go.

    Attributes:
      inputs: shape, and path on the phone of the raw values, in the order of the graph's inputs.
      output_file: path on the phone for the raw values of all outputs, in their order, as the last inference leaves them.
    """

    inputs: tuple[tuple[tuple[int, ...], str], ...]
    output_file: str


def arguments(
    tool: Tool, settings: Settings, graph: str, result_file: str | None, details: bool = False, feed: Feed | None = None
) -> list[str]:
    """Returns the command line.

    Args:
      tool: who is going to read it.
      settings: how to measure.
      graph: the submodel's path on the phone.
      result_file: where the tool may write its figures; left out where it cannot.
      details: also ask for the time per operation and the peak memory, which disturbs the latency.
      feed: what to read, by default noise.

    Raises:
      BenchmarkError: this build cannot do what the settings ask for.
    """
    backends = {
        (TFLITE, XNNPACK): {"use_xnnpack": "true"},
        (TFLITE, CPU): {"use_xnnpack": "false"} if "use_xnnpack" in tool.flags else {},
        (TFLITE, GPU): {"use_gpu": "true"},
        (TFLITE, NNAPI): {"use_nnapi": "true"},
        (LITERT, XNNPACK): {"use_cpu": "true"} if "use_cpu" in tool.flags else {},
        (LITERT, GPU): {"use_gpu": "true"},
        (LITERT, NPU): {"use_npu": "true"},
    }
    if (tool.kind, settings.backend) not in backends:
        raise BenchmarkError(f"the {tool.kind} tool has no backend {settings.backend}")
    needed = {"graph": graph, "num_runs": settings.num_runs, "num_threads": settings.threads, "warmup_runs": settings.warmup_runs}
    needed |= backends[tool.kind, settings.backend]
    # Older builds lack some of these; then their defaults hold.
    wanted = {"min_secs": settings.min_secs, "max_secs": settings.max_secs, "warmup_min_secs": 0}
    if result_file is not None:
        wanted["result_file_path"] = result_file
    if details:
        needed["enable_op_profiling" if tool.kind == TFLITE else "use_profiler"] = "true"
        wanted["report_peak_memory_footprint"] = "true"
    if feed is not None:  # inputs go by their order, so the names are ours: the graph's may hold the colon that separates them
        names = [f"input{number}" for number in range(len(feed.inputs))]
        needed["input_layer"] = ",".join(names)
        needed["input_layer_shape"] = ":".join(",".join(map(str, shape)) for shape, _ in feed.inputs)
        needed["input_layer_value_files"] = ",".join(f"{name}:{path}" for name, (_, path) in zip(names, feed.inputs, strict=True))
        needed["output_filepath"] = feed.output_file
    given = {flag.removeprefix("--").partition("=")[0] for flag in settings.extra}
    missing = sorted((needed.keys() | given) - tool.flags)
    if missing:
        raise BenchmarkError(f"this build of the {tool.kind} tool does not know {', '.join(f'--{name}' for name in missing)}")
    flags = needed | {name: value for name, value in wanted.items() if name in tool.flags}
    return [f"--{name}={value:g}" if isinstance(value, float) else f"--{name}={value}" for name, value in flags.items()] + [*settings.extra]


# === Output ===


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One successful run of a tool.

    Attributes:
      runs: number of samples.
      p50_ms, p95_ms, mean_ms, min_ms, max_ms: of the samples.
      backend_obtained: what the log proves: the backend asked for, followed by `+cpu` if an accelerator took only part of the graph;
        `cpu` if it was not applied; `unknown` if the log does not tell.
    """

    runs: int
    p50_ms: float
    p95_ms: float
    mean_ms: float
    min_ms: float
    max_ms: float
    backend_obtained: str

    def fell_back(self, requested: str) -> bool:
        """Whether an accelerator was asked for and none of the graph ran there."""
        return requested not in (XNNPACK, CPU) and self.backend_obtained.partition("+")[0] != requested


def parse(text: str, code: int | None, result: bytes | None, requested: str) -> Measurement:
    """Reads the outcome of a run.

    Args:
      text: stdout and stderr together, or the app's lines of logcat.
      code: exit code, None for the app.
      result: content of the tool's result file, if there is one. Its figures are more precise than those in the text.
      requested: backend that was asked for.

    Raises:
      BenchmarkError: the run failed, or what it printed cannot be trusted.
    """
    lines = [_LINE.fullmatch(line) for line in text.split("\n")]
    errors = [line["text"] for line in lines if line and (line["severity"] in ("ERROR", "FATAL") or line["letter"] in ("E", "F"))]
    said = " / ".join(errors)[:400] or " ".join(text.split())[-200:] or "nothing"
    texts = [line["text"] for line in lines if line]
    unconsumed = next((line for line in texts if "Unconsumed cmdline flags" in line), None)
    if unconsumed:
        raise BenchmarkError(f"the tool ignored flags: {unconsumed}")
    if code not in (0, None):
        raise BenchmarkError(f"the tool ended with exit code {code} and said: {said}")
    if any("Benchmarking failed" in line for line in texts) or any(line and line["severity"] == "FATAL" for line in lines):
        raise BenchmarkError(f"the tool failed and said: {said}")
    counts = [found for line in texts if (found := _COUNT.fullmatch(line))]
    if len(counts) != 2:
        raise BenchmarkError(f"there must be one `count=` line for the warm-up and one for the measurement, got {len(counts)}: {said}")
    return _measurement(counts[1], _read_result(result), obtained(texts, requested))


def _measurement(line: re.Match, result: dict[str, float] | None, backend: str) -> Measurement:
    """Joins the measurement's `count=` line, in microseconds, with the result file, in milliseconds, after checking both."""
    runs = int(line["count"])
    if runs == 0:
        raise BenchmarkError("no inference was run")
    if runs == 1 or line["same"]:
        figures = {name: line["curr"] for name in ("p50_ms", "p95_ms", "mean_ms", "min_ms", "max_ms")}
    else:
        names = {"p50_ms": "median", "p95_ms": "p95", "mean_ms": "avg", "min_ms": "min", "max_ms": "max"}
        figures = {ours: line[theirs] for ours, theirs in names.items()}
        if line["min"] is None:
            raise BenchmarkError(f"a `count=` line of {runs} different samples must have their min, max and avg, got {line[0]!r}")
    try:
        figures = {name: float(value) / 1e3 for name, value in figures.items() if value is not None}
    except ValueError:
        raise BenchmarkError(f"not numbers: {line[0]!r}") from None
    if result is not None:
        if result.pop("runs") != runs:
            raise BenchmarkError(f"the result file is of another run than {line[0]!r}")
        for name, value in figures.items():
            # Text: whole microseconds, and six digits of the mean.
            if not abs(result[name] - value) <= 1.5e-3 + 2e-5 * value:
                raise BenchmarkError(f"the result file has {name} = {result[name]}, the log {line[0]!r}")
        figures = result
    if "p50_ms" not in figures:
        raise BenchmarkError("this build prints no median (TensorFlow up to about 2.15): use a newer benchmark_model")
    ordered = [figures[name] for name in ("min_ms", "p50_ms", "p95_ms", "max_ms")]
    plausible = all(map(math.isfinite, figures.values())) and ordered == sorted(ordered) and figures["p50_ms"] > 0
    slack = 1.5e-3 + 2e-5 * figures["max_ms"]
    if not plausible or not figures["min_ms"] - slack <= figures["mean_ms"] <= figures["max_ms"] + slack:
        raise BenchmarkError(f"latencies must be positive and min ≤ median ≤ p95 ≤ max, min ≤ mean ≤ max, got {figures}")
    return Measurement(runs=runs, backend_obtained=backend, **figures)


def obtained(texts: Sequence[str], requested: str) -> str:
    """Returns what the lines of a log prove about where the graph ran; see `Measurement`."""
    swaps = [(found[3], int(found[1]), int(found[2])) for line in texts if (found := _REPLACING.search(line))]
    if requested == CPU:
        return UNKNOWN if any(part for _, part, _ in swaps) else CPU
    mine = [(part, whole) for delegate, part, whole in swaps if re.search(_DELEGATES[requested], delegate)]
    explicit = [found[2] for line in texts if (found := _EXPLICIT.search(line)) and found[1].lower() == requested]
    refused = any(found[1].lower() == requested for line in texts if (found := _REFUSED.search(line)))
    applied = not refused and (bool(explicit) or any(part for part, _ in mine))
    if requested == XNNPACK:
        created = not mine and any("Created TensorFlow Lite XNNPACK delegate for CPU" in line for line in texts)
        return CPU if refused else XNNPACK if applied or created else CPU if mine else UNKNOWN
    complete = "partially" not in explicit if explicit else all(part == whole for part, whole in mine)
    return CPU if not applied else requested if complete else f"{requested}+{CPU}"


def accelerated(text: str, requested: str) -> float | None:
    """Returns the share of a graph's operations that a log shows on the backend asked for, None where it does not tell."""
    swaps = [found.groups() for found in _REPLACING.finditer(text) if re.search(_DELEGATES.get(requested, r"$^"), found[3])]
    if whole := sum(int(whole) for _, whole, _ in swaps):
        return sum(int(part) for part, *_ in swaps) / whole
    return {requested: 1.0, CPU: 0.0}.get(obtained(text.split("\n"), requested))


@functools.cache
def _result_class() -> type[message.Message]:
    """tflite.tools.benchmark.BenchmarkResult, as far as it is read here."""
    real, number = descriptor_pb2.FieldDescriptorProto.TYPE_FLOAT, descriptor_pb2.FieldDescriptorProto.TYPE_INT32
    latency = {1: "mean_ms", 2: "min_ms", 3: "max_ms", 5: "p50_ms", 7: "p95_ms"}
    messages = {
        "Latency": [(index, name, real, None) for index, name in latency.items()],
        "Misc": [(2, "runs", number, None)],
        "Result": [(2, "latency", None, "Latency"), (4, "misc", None, "Misc")],
    }
    file = descriptor_pb2.FileDescriptorProto(name="benchmark_result.proto", package="mess", syntax="proto2")
    for name, fields in messages.items():
        described = file.message_type.add(name=name)
        for index, field, kind, of in fields:
            kind = kind or descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
            described.field.add(name=field, number=index, type=kind, type_name=of and f".mess.{of}", label=1)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("mess.Result"))


def _read_result(content: bytes | None) -> dict[str, float] | None:
    """The figures of a result file by the names of `Measurement`, None unless it is one and complete."""
    try:
        result = _result_class().FromString(content or b"")
    except message.DecodeError:
        return None
    figures = {field.name: value for part in (result.latency, result.misc) for field, value in part.ListFields()}
    return figures if len(figures) == 6 else None


@dataclasses.dataclass(frozen=True)
class OpTime:
    """What the operations of one type take.

    Attributes:
      node_type: name of the operation or delegate.
      count: number of them in the graph.
      mean_ms: of all of them together, per inference.
      memory_kb: likewise.
    """

    node_type: str
    count: int
    mean_ms: float
    memory_kb: float


def parse_details(text: str) -> tuple[tuple[OpTime, ...], float | None]:
    """Reads a run with `details`: the time per type of operation, and the peak memory in MB, None where it was not printed."""
    peak = _PEAK.search(text)
    _, _, regular = text.partition("Operator-wise Profiling Info for Regular Benchmark Runs")
    times = []
    for raw in (regular or text).partition("Summary by node type")[2].split("\n")[2:]:
        line = _LINE.fullmatch(raw[:1000])
        found = _NODE_TYPE.fullmatch(line["text"]) if line else None
        if not found:
            break
        try:
            times.append(OpTime(found[1], int(found[2]), float(found[3]), float(found[4])))
        except ValueError:
            break
    return tuple(times), float(peak[1]) if peak and peak[1].count(".") <= 1 and peak[1] != "." else None


# === The program ===


def fetch(kind: str, abis: Sequence[str], cache: Path) -> Path:
    """Returns the tool of a kind for a phone, fetched from its makers' address the first time.

    Args:
      kind: `tflite` or `litert`.
      abis: of the phone, the preferred one first.
      cache: folder; beside each tool lies a JSON file with its address and SHA-256.

    Raises:
      BenchmarkError: there is none for this phone, it cannot be fetched, or the file in the cache is not the one that was fetched.
    """
    abi = next((abi for abi in abis if (kind, abi) in DOWNLOADS), None)
    if abi is None:
        known = sorted(abi for tool, abi in DOWNLOADS if tool == kind)
        raise BenchmarkError(
            f"no {kind} tool is offered for {', '.join(abis)}, only for {', '.join(known)}: build it and give it as --tool"
        )
    path, url = cache / f"{kind}-{abi}", DOWNLOADS[kind, abi]
    record = path.with_suffix(".json")
    cache.mkdir(parents=True, exist_ok=True)
    with locked(path):  # several phones may need it at once
        if not (path.exists() and record.exists()):
            try:
                with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as response:
                    content = response.read()
            except (urllib.error.URLError, OSError) as error:
                raise BenchmarkError(f"cannot fetch {url} ({error}): download it elsewhere and give the file as --tool") from error
            write_atomically(path, lambda temporary: temporary.write_bytes(content))
            write_json(record, {"url": url, "sha256": file_sha256(path)})
    try:
        recorded = json.loads(record.read_text())["sha256"]
    except (ValueError, KeyError, TypeError):
        recorded = "nothing"
    if recorded != file_sha256(path):
        raise BenchmarkError(
            f"{path}: SHA-256 must be {recorded} as in {record.name}, got {file_sha256(path)}: remove both to fetch it again"
        )
    return path
