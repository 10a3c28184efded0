"""Command lines and parsers of the two tools called benchmark_model, on what they really print (data/benchmark_model)."""

import json
import re
import struct
import urllib.error
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from android_bench import benchmark_model
from android_bench.adb import parse_thermal
from android_bench.benchmark_model import APP_TOOL, BenchmarkError, OpTime, Settings, Tool, arguments, parse, parse_details, read_usage
from mess_runtime.bundle import file_sha256

DATA = Path(__file__).parent / "data" / "benchmark_model"
SETTINGS = Settings("xnnpack", 2, "all", 20, 0.5, 60.0, 3, ())
COUNT = "INFO: count=9 first=20 curr=21 min=19 max=30 avg=22.5 std=3 p5=19 median=21 p95=30\n"
XNNPACK_LINE = "INFO: Explicitly applied XNNPACK delegate, and the model graph will be completely executed by the delegate.\n"
GOOD = XNNPACK_LINE + COUNT + "\n" + COUNT


def read(name: str) -> str:
    return (DATA / f"{name}.txt").read_text()


def result_file(runs: int, mean, least, most, median, p5, p95) -> bytes:
    """A tflite.tools.benchmark.BenchmarkResult, encoded by hand; latencies in ms."""

    def real(number: int, value: float) -> bytes:
        return bytes([number << 3 | 5]) + struct.pack("<f", value)

    latency = b"".join(real(*item) for item in ((1, mean), (2, least), (3, most), (4, 0.1), (5, median), (6, p5), (7, p95), (8, 119.5)))
    misc = real(1, 4.27) + bytes([2 << 3, runs, 3 << 3, 1])
    memory = bytes([1 << 3, 100, 2 << 3, 100]) + real(3, 74.2)
    return b"".join(bytes([number << 3 | 2, len(part)]) + part for number, part in ((2, latency), (3, memory), (4, misc)))


GOOD_RESULT = (9, 0.0225, 0.019, 0.030, 0.021, 0.019, 0.030)


# ---------------------------------------------------------------- what succeeds


@pytest.mark.parametrize(
    ("name", "backend", "code", "expected"),
    [
        ("tflite_seconds", "cpu", 0, (50, 1239.807, 1247.415, 1240.27, 1238.588, 1252.566, "cpu")),
        ("tflite_xnnpack", "xnnpack", 0, (24, 42.405, 42.729, 42.4354, 42.142, 42.763, "xnnpack")),
        ("tflite_gpu_profile", "gpu", 0, (108, 8.705, 8.982, 8.70866, 8.268, 9.464, "gpu")),
        ("litert", "xnnpack", 0, (10, 234.001, 237.160, 233.910, 230.370, 237.160, "xnnpack")),
        ("logcat", "xnnpack", None, (50, 62.015, 79.110, 63.7432, 51.002, 80.120, "xnnpack")),
    ],
)
def test_outputs_of_every_kind(name, backend, code, expected):
    measured = parse(read(name), code, None, backend)
    got = (measured.runs, measured.p50_ms, measured.p95_ms, measured.mean_ms, measured.min_ms, measured.max_ms, measured.backend_obtained)
    assert got[:-1] == pytest.approx(expected[:-1]) and got[-1] == expected[-1]
    assert not measured.fell_back(backend)


@pytest.mark.parametrize(("name", "backend"), [("tflite_1_13", "cpu"), ("tflite_no_prefix", "nnapi"), ("tflite_2_15", "cpu")])
def test_builds_without_a_median_need_a_result_file(name, backend):
    with pytest.raises(BenchmarkError, match="prints no median"):
        parse(read(name), 0, None, backend)
    line = re.findall(r"count=.*min=(\d+) max=(\d+) avg=(\S+)", read(name))[-1]
    least, most, mean = (float(value) / 1e3 for value in line)
    runs = int(re.findall(r"count=(\d+)", read(name))[-1])
    if runs < 128:
        measured = parse(read(name), 0, result_file(runs, mean, least, most, mean, least, most), backend)
        assert measured.p50_ms == pytest.approx(mean) and measured.backend_obtained == backend


@pytest.mark.parametrize("line", ["count=7 curr=50(all same)", "count=7 curr=50(all same) p5=50 median=50 p95=50", "count=1 curr=50"])
def test_short_forms_of_the_count_line(line):
    measured = parse(f"{XNNPACK_LINE}INFO: {line}\n\nINFO: {line}\n", 0, None, "xnnpack")
    assert (measured.runs, measured.p50_ms, measured.min_ms, measured.max_ms) == (int(line[6]), 0.05, 0.05, 0.05)


def test_result_file_comes_first_and_the_text_stands_in():
    precise = parse(GOOD, 0, result_file(9, 0.022504, *GOOD_RESULT[2:]), "xnnpack")
    assert precise.mean_ms == pytest.approx(0.022504, rel=1e-6)
    for broken in (None, b"", b"\xff\xfe", result_file(*GOOD_RESULT)[:9], b"\x08\x01"):
        assert parse(GOOD, 0, broken, "xnnpack").mean_ms == 0.0225


def test_the_profile_holds_no_measurement():
    assert "Timings (microseconds): count=108" in read("tflite_gpu_profile")
    assert parse(read("tflite_gpu_profile"), 0, None, "gpu").runs == 108


# ---------------------------------------------------------------- what fails (the numbers are printed all the same)

MISSING = "ERROR: Could not open 'm.tflite'.\nERROR: Failed to load model m.tflite\nERROR: Benchmarking failed.\n"


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("ERROR: Please specify the name of your TF Lite input file with --graph\n", 1, "exit code 1 and said: Please specify"),
        (MISSING, 1, "Could not open 'm.tflite'"),
        ("INFO: [benchmark_litert_model.cc:190] Loading model from: m\nERROR: Benchmarking failed.\n", 1, "exit code 1"),
        (
            "ERROR: Select TensorFlow op(s), included in the given model, is(are) not supported by this interpreter.\n",
            1,
            "Select TensorFlow",
        ),
        ("ERROR: Node number 57 (BATCH_MATMUL) failed to prepare.\nERROR: Failed to allocate tensors!\n", 1, "Node number 57"),
        ("ERROR: Failed to apply GPU delegate.\nERROR: Benchmarking failed.\n", 1, "Failed to apply GPU delegate"),
        (GOOD + "ERROR: Disallowed CPU fallback detected.\n", 1, "Disallowed CPU fallback"),
        ("ERROR: Signature not specified or incorrect. Pass one of the following\n", 1, "Signature not specified"),
        (
            "ERROR: Failed to parse flag 'num_runs' against argv '--num_runs=abc'\nusage: benchmark_model <flags>\n",
            1,
            "Failed to parse flag",
        ),
        (GOOD + "FATAL: The size of f is 3 bytes. It should be 4 bytes.\n", 134, "The size of f"),
        (GOOD + "FATAL: The size of f is 3 bytes. It should be 4 bytes.\n", 0, "The size of f"),
        (GOOD + "ERROR: Benchmarking failed.\n", 0, "the tool failed"),
        (GOOD + "ERROR: Benchmarking failed.\n", None, "the tool failed"),
        ("07-19 14:10:14.701  7937  7937 E tflite  : Benchmarking failed.\n" + GOOD, None, "Benchmarking failed"),
        (GOOD + "WARN: Unconsumed cmdline flags: --use_gpu --foo=1\n", 0, "ignored flags: Unconsumed cmdline flags: --use_gpu --foo=1"),
        (GOOD, 137, "exit code 137"),
        (XNNPACK_LINE + COUNT, 0, "got 1"),
        (GOOD + COUNT, 0, "got 3"),
        ("", 0, "got 0: nothing"),
        ("INFO: count=0\nINFO: count=0 p5=0 median=0 p95=0\n", 0, "no inference was run"),
        (GOOD.replace("median=21", "median=18"), 0, "min ≤ median"),
        (GOOD.replace("avg=22.5", "avg=35.5"), 0, "min ≤ mean"),
        (GOOD.replace("avg=22.5", "avg=nan"), 0, "min ≤ mean"),
        (GOOD.replace("avg=22.5", "avg=1e999"), 0, "min ≤ mean"),
        (GOOD.replace("avg=22.5", "avg=2-2"), 0, "not numbers"),
        ("INFO: count=2 curr=7\nINFO: count=2 curr=7 p5=7 median=7 p95=7\n", 0, "must have their min, max and avg"),
        ("INFO: count=4 curr=0(all same)\nINFO: count=4 curr=0(all same)\n", 0, "must be positive"),
    ],
)
def test_failures(text, code, message):
    with pytest.raises(BenchmarkError, match=re.escape(message)):
        parse(text, code, result_file(*GOOD_RESULT) if code else None, "xnnpack")


def test_result_file_of_another_run():
    with pytest.raises(BenchmarkError, match="of another run"):
        parse(GOOD, 0, result_file(10, *GOOD_RESULT[1:]), "xnnpack")
    with pytest.raises(BenchmarkError, match="the result file has p50_ms"):
        parse(GOOD, 0, result_file(9, 0.0225, 0.019, 0.030, 0.027, 0.019, 0.030), "xnnpack")


PIECES = st.sampled_from(
    [
        *GOOD.splitlines(),
        *MISSING.splitlines(),
        "",
        "WARN: Unconsumed cmdline flags: --x",
        "count=",
        "INFO: count=3 curr=",
        "07-19 14:10:10.858",
    ]
)


@settings(deadline=None)
@given(
    st.lists(PIECES | st.text(max_size=30) | st.from_regex(benchmark_model._COUNT, fullmatch=True), max_size=12),
    st.sampled_from([0, 1, 137, None]),
    st.none() | st.binary(max_size=80) | st.just(result_file(*GOOD_RESULT)),
    st.sampled_from(benchmark_model.BACKENDS),
)
@example([*GOOD.splitlines()], 0, None, "xnnpack")
@example(["INFO: count=" + "9" * 5000, "INFO: count=" + "9" * 5000], 0, None, "cpu")
@example(["INFO: Replacing 99999999999999999999 out of 1 node(s) with delegate (X)"], 0, None, "gpu")
def test_no_text_crashes_the_parser_and_no_failed_run_has_numbers(lines, code, result, backend):
    text = "\n".join(lines)
    try:
        measured = parse(text, code, result, backend)
    except BenchmarkError:
        measured = None
    parse_details(text)
    parse_thermal(text)
    if measured:
        assert code in (0, None) and "Benchmarking failed" not in text and "Unconsumed cmdline flags" not in text
        assert 0 <= measured.min_ms <= measured.p50_ms <= measured.p95_ms <= measured.max_ms < float("inf")
        assert measured.runs > 0 and measured.p50_ms > 0
        proven = {"gpu": "GPU", "nnapi": "NNAPI", "npu": "NPU"}.get(backend)
        if proven and not measured.fell_back(backend):
            assert re.search(rf"applied {proven}|delegate \(", text)


@settings(deadline=None)
@given(st.binary(max_size=200))
@example(result_file(*GOOD_RESULT))
def test_no_result_file_crashes_the_parser(content):
    try:
        assert parse(GOOD, 0, content, "xnnpack").runs == 9
    except BenchmarkError as error:
        assert "the result file" in str(error) or "latencies must be" in str(error)


# ---------------------------------------------------------------- where it ran


@pytest.mark.parametrize(
    ("log", "backend", "expected"),
    [
        ("", "gpu", "cpu"),
        ("WARN: GPU acceleration is unsupported on this platform.", "gpu", "cpu"),
        ("INFO: Though GPU delegate is explicitly applied, the model graph will not be executed by the delegate.", "gpu", "cpu"),
        ("INFO: Explicitly applied GPU delegate, and the model graph will be completely executed by the delegate.", "gpu", "gpu"),
        (
            "INFO: Explicitly applied GPU delegate, and the model graph will be partially executed by the delegate w/ 3 delegate kernels.",
            "gpu",
            "gpu+cpu",
        ),
        ("VERBOSE: Replacing 66 out of 66 node(s) with delegate (LITERT_CL) node, yielding 1 partitions", "gpu", "gpu"),
        ("VERBOSE: Replacing 60 out of 66 node(s) with delegate (LITERT_CL) node, yielding 4 partitions", "gpu", "gpu+cpu"),
        ("VERBOSE: Replacing 0 out of 66 node(s) with delegate (TfLiteGpuDelegateV2) node, yielding 0 partitions", "gpu", "cpu"),
        ("VERBOSE: Replacing 66 out of 66 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 1 partitions", "gpu", "cpu"),
        ("VERBOSE: Replacing 31 out of 31 node(s) with delegate (TfLiteNnapiDelegate) node, yielding 1 partitions", "nnapi", "nnapi"),
        ("INFO: Explicitly applied NNAPI delegate, and the model graph will be completely executed by the delegate.", "gpu", "cpu"),
        ("VERBOSE: Replacing 2 out of 3 node(s) with delegate (DispatchDelegate) node, yielding 3 partitions", "npu", "npu+cpu"),
        ("INFO: Created TensorFlow Lite XNNPACK delegate for CPU.", "xnnpack", "xnnpack"),
        ("VERBOSE: Replacing 0 out of 5 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 0 partitions", "xnnpack", "cpu"),
        ("INFO: Though XNNPACK delegate is explicitly applied, the model graph will not be executed by the delegate.", "xnnpack", "cpu"),
        ("", "xnnpack", "unknown"),
        ("", "cpu", "cpu"),
        ("VERBOSE: Replacing 5 out of 5 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 1 partitions", "cpu", "unknown"),
    ],
)
def test_backend_obtained(log, backend, expected):
    measured = parse(f"{log}\n{COUNT}\n{COUNT}", 0, None, backend)
    assert measured.backend_obtained == expected
    assert measured.fell_back(backend) == (backend in ("gpu", "nnapi", "npu") and expected == "cpu")


# ---------------------------------------------------------------- command lines


def usage(*flags: str) -> str:
    return "ERROR: usage: ./benchmark_model <flags>\nFlags:\n" + "".join(f"\t--{flag}=50     \tint32\toptional\ttext\n" for flag in flags)


BASE = ("num_runs", "min_secs", "max_secs", "warmup_runs", "warmup_min_secs", "num_threads", "graph")
TFLITE = read_usage(usage(*BASE, "input_layer_shape", "use_xnnpack", "use_gpu", "use_nnapi", "enable_op_profiling", "result_file_path"))
LITERT = read_usage(
    usage(*BASE, "dispatch_library_path", "use_cpu", "use_gpu", "use_npu", "use_profiler", "result_file_path", "gpu-precision")
)
OLD = read_usage(usage("num_runs", "warmup_runs", "num_threads", "graph", "input_layer_shape", "use_nnapi"))
COMMON = ["--graph=/p/m.tflite", "--num_runs=20", "--num_threads=2", "--warmup_runs=3"]
TIMES = ["--min_secs=0.5", "--max_secs=60", "--warmup_min_secs=0"]


def with_backend(backend: str, *extra: str) -> Settings:
    return Settings(backend, 2, "all", 20, 0.5, 60.0, 3, extra)


@pytest.mark.parametrize(
    ("tool", "settings", "details", "expected"),
    [
        (TFLITE, with_backend("xnnpack"), False, [*COMMON, "--use_xnnpack=true", *TIMES, "--result_file_path=/p/r"]),
        (TFLITE, with_backend("cpu"), False, [*COMMON, "--use_xnnpack=false", *TIMES, "--result_file_path=/p/r"]),
        (TFLITE, with_backend("gpu"), True, [*COMMON, "--use_gpu=true", "--enable_op_profiling=true", *TIMES, "--result_file_path=/p/r"]),
        (TFLITE, with_backend("nnapi"), False, [*COMMON, "--use_nnapi=true", *TIMES, "--result_file_path=/p/r"]),
        (LITERT, with_backend("xnnpack"), False, [*COMMON, "--use_cpu=true", *TIMES, "--result_file_path=/p/r"]),
        (LITERT, with_backend("npu"), True, [*COMMON, "--use_npu=true", "--use_profiler=true", *TIMES, "--result_file_path=/p/r"]),
        (
            LITERT,
            with_backend("gpu", "--gpu-precision=fp16"),
            False,
            [*COMMON, "--use_gpu=true", *TIMES, "--result_file_path=/p/r", "--gpu-precision=fp16"],
        ),
        (OLD, with_backend("cpu"), False, COMMON),
        (APP_TOOL, with_backend("xnnpack"), False, [*COMMON, "--use_xnnpack=true", *TIMES]),
    ],
)
def test_command_lines(tool, settings, details, expected):
    assert arguments(tool, settings, "/p/m.tflite", "/p/r", details) == expected


@pytest.mark.parametrize(
    ("tool", "settings", "message"),
    [
        (TFLITE, with_backend("npu"), "the tflite tool has no backend npu"),
        (LITERT, with_backend("cpu"), "the litert tool has no backend cpu"),
        (LITERT, with_backend("nnapi"), "the litert tool has no backend nnapi"),
        (OLD, with_backend("xnnpack"), "this build of the tflite tool does not know --use_xnnpack"),
        (TFLITE, with_backend("gpu", "--gpu_backend=cl"), "does not know --gpu_backend"),
    ],
)
def test_what_a_build_cannot_do_is_not_asked_of_it(tool, settings, message):
    with pytest.raises(BenchmarkError, match=message):
        arguments(tool, settings, "/p/m.tflite", None)


def test_a_usage_text_tells_the_tools_apart():
    assert (TFLITE.kind, LITERT.kind, OLD.kind) == ("tflite", "litert", "tflite")
    assert "gpu-precision" in LITERT.flags and isinstance(OLD, Tool)
    for text in ("", "hello", usage("graph"), usage("input_layer_shape")):
        with pytest.raises(BenchmarkError, match="neither TensorFlow Lite's nor LiteRT's"):
            read_usage(text)


# ---------------------------------------------------------------- details, and the program


def test_time_per_operation():
    times, peak = parse_details(read("tflite_gpu_profile"))
    assert times == (OpTime("TfLiteGpuDelegateV2", 1, 8.69, 0.0),) and peak == 74.2
    times, peak = parse_details(read("op_profile_old"))
    assert [(each.node_type, each.count, each.mean_ms) for each in times] == [
        ("CONV_2D", 36, 13.695),
        ("DEPTHWISE_CONV_2D", 17, 4.229),
        ("ADD", 10, 2.93),
    ]
    assert peak is None and parse_details(read("litert")) == ((), 88.5)


def test_fetch_records_what_it_fetched(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(b"program")
    monkeypatch.setitem(benchmark_model.DOWNLOADS, ("litert", "arm64-v8a"), source.as_uri())
    cache = tmp_path / "cache"
    path = benchmark_model.fetch("litert", ("arm64-v8a", "armeabi-v7a"), cache)
    assert path.read_bytes() == b"program"
    assert json.loads(path.with_suffix(".json").read_text()) == {"url": source.as_uri(), "sha256": file_sha256(source)}
    source.write_bytes(b"newer")
    assert benchmark_model.fetch("litert", ("arm64-v8a",), cache).read_bytes() == b"program"
    path.write_bytes(b"tampered")
    with pytest.raises(BenchmarkError, match="remove both to fetch it again"):
        benchmark_model.fetch("litert", ("arm64-v8a",), cache)


def test_fetch_says_what_to_do_without_a_network(tmp_path, monkeypatch):
    def offline(url, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(
        BenchmarkError, match=r"cannot fetch https://\S+/android_aarch64_benchmark_model .*: download it elsewhere and give"
    ):
        benchmark_model.fetch("tflite", ("arm64-v8a",), tmp_path)
    with pytest.raises(BenchmarkError, match="no litert tool is offered for x86_64, only for arm64-v8a"):
        benchmark_model.fetch("litert", ("x86_64",), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".tflite-arm64-v8a.lock"}  # which is empty, and stays
