#!/usr/bin/env python3
"""A stand-in for the two tools called benchmark_model: times the graph with ai-edge-litert and prints what the real ones print.

FAKE_MODE in the environment makes it fail: `garbage`, `fail_late`, `no_gpu`, `hang`, `killed`; with `canned` it prints times without
running the graph, with `heating` larger ones from run to run, with `partial` it says that the delegate took only part of the graph. With
`wrong_gpu` the GPU is right for three inferences, and with `truncated` half of the file of outputs is written.
"""

import json
import os
import signal
import struct
import sys
import time

KIND = "tflite"  # or litert; the tests write the copy that they need
DEFAULTS = {
    "graph": "", "num_runs": "50", "min_secs": "1", "max_secs": "150", "warmup_runs": "1", "warmup_min_secs": "0.5", "num_threads": "-1",
    "report_peak_memory_footprint": "false", "result_file_path": "", "use_gpu": "false", "signature_to_run_for": "",
}  # fmt: skip
OWN = {
    "tflite": {
        "input_layer": "",
        "input_layer_shape": "",
        "input_layer_value_files": "",
        "output_filepath": "",
        "use_xnnpack": "false",
        "use_nnapi": "false",
        "enable_op_profiling": "false",
    },
    "litert": {"dispatch_library_path": "", "use_cpu": "true", "use_npu": "false", "use_profiler": "false"},
}


def info(text, file=None):
    print(f"INFO: {text}", file=file or sys.stdout)


def litert_info(line, text):
    print(f"INFO: [benchmark_litert_model.h:{line}] {text}", file=sys.stderr)


def parse(words):
    known = DEFAULTS | OWN[KIND]
    values, unknown = dict(known), []
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if equals and name in known:
            values[name] = value
        else:
            unknown.append(word)
    if words[:1] == ["--help"]:
        usage = "".join(f"\t--{name}={value:<20}\tstring\toptional\tsome text\n" for name, value in known.items())
        print(f"ERROR: usage: ./benchmark_model <flags>\nFlags:\n{usage}", file=sys.stderr)
        sys.exit(0 if KIND == "litert" else 1)
    return values, unknown


def stats(samples):
    """The `count=` line of xla/tsl/util/stats_calculator.h; samples in whole microseconds."""
    ordered, count = sorted(samples), len(samples)
    p5, median, p95 = (ordered[int(count * share)] for share in (0.05, 0.5, 0.95))
    mean = sum(samples) / count
    text = f"count={count}"
    if count == 1 or ordered[0] == ordered[-1]:
        text += f" curr={samples[-1]}" + ("(all same)" if count > 1 else "")
    else:
        deviation = (sum(value * value for value in samples) / count - mean * mean) ** 0.5
        text += f" first={samples[0]} curr={samples[-1]} min={ordered[0]} max={ordered[-1]} avg={mean:.6g} std={int(deviation)}"
    return f"{text} p5={p5} median={median} p95={p95}", mean, ordered[0], ordered[-1], median, p5, p95


def write_result(path, mean, least, most, median, p5, p95, runs):
    def message(number, content):
        return bytes([number << 3 | 2, len(content)]) + content

    def real(number, value):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)

    numbers = {1: mean, 2: least, 3: most, 5: median, 6: p5, 7: p95}
    latency = b"".join(real(number, value / 1e3) for number, value in numbers.items())
    varint = bytes([runs & 127 | 128, runs >> 7]) if runs > 127 else bytes([runs])
    with open(path, "wb") as file:
        file.write(message(2, latency) + message(4, real(1, 0.5) + b"\x10" + varint))


def op_profile(operations):
    info("Profiling Info for Benchmark Initialization:")
    info("Operator-wise Profiling Info for Regular Benchmark Runs:")
    print("============================== Summary by node type ==============================")
    print("\t             [Node type]\t  [count]\t  [avg ms]\t    [avg %]\t    [cdf %]\t  [mem KB]\t[times called]")
    names = [operation["op_name"] for operation in operations]
    for name in dict.fromkeys(names):
        print(f"\t{name:>24}\t{names.count(name):9}\t{0.25 * names.count(name):10.3f}\t{50:10.3f}%\t{50:10.3f}%\t{0:10.3f}\t{1:9}")
    print(f"\nTimings (microseconds): count=1 curr=4711\nMemory (bytes): count=0\n{len(names)} nodes observed\n")


def main():
    values, unknown = parse(sys.argv[1:])
    modes, graph = os.environ.get("FAKE_MODE", "").split(","), values["graph"]
    if "garbage" in modes:
        os.write(1, b"\x00\xff\xfe count=12 INFO: count=nan\nINFO: count=7 first=x\n")
        return 0
    if "hang" in modes:
        time.sleep(600)
    info("STARTING!")
    info("Log parameter values verbosely: [0]")
    if KIND == "tflite":
        info(f"Graph: [{graph}]")
        info(f"Signature to run: [{values['signature_to_run_for']}]")
        info(f"Loaded model {graph}")
    else:
        print(f"INFO: [benchmark_litert_model.cc:190] Loading model from: {graph}", file=sys.stderr)
    if not os.path.exists(graph):
        print(f"ERROR: Could not open '{graph}'.\nERROR: Failed to load model {graph}\nERROR: Benchmarking failed.", file=sys.stderr)
        return 1

    begin = time.perf_counter()
    operations, invoke, complete, outputs = prepare(values, modes)
    started = time.perf_counter() - begin
    if values["use_gpu"] == "true" and "no_gpu" in modes:
        print("WARN: GPU acceleration is unsupported on this platform.")
    elif values["use_gpu"] == "true":
        info("GPU delegate created.")
        extent = "completely executed by the delegate." if complete else "partially executed by the delegate w/ 1 delegate kernels."
        info(f"Explicitly applied GPU delegate, and the model graph will be {extent}")
    elif values.get("use_xnnpack") == "true":
        extent = "completely executed by the delegate." if complete else "partially executed by the delegate w/ 1 delegate kernels."
        info(f"Explicitly applied XNNPACK delegate, and the model graph will be {extent}")
    elif values.get("use_cpu") == "true":
        text = "VERBOSE: Replacing 3 out of 3 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 1 partitions for subgraph 0."
        print(text, file=sys.stderr)
    info(f"The input model file size (MB): {os.path.getsize(graph) / 1e6:.6g}")
    info(f"Initialized session in {started * 1e3:.3f}ms.")
    last = []
    for least, seconds in ((int(values["warmup_runs"]), values["warmup_min_secs"]), (int(values["num_runs"]), values["min_secs"])):
        limit = float(values["max_secs"])
        until = f"{least} iterations and at least {seconds} seconds but terminate if exceeding {limit:g} seconds."
        info(f"Running benchmark for at least {until}")
        samples = []
        while (len(samples) < least or sum(samples) < float(seconds) * 1e6) and sum(samples) < limit * 1e6:
            samples.append(invoke())
        line, *figures = stats(samples)
        info(f"{line}\n")
        last.append((samples, figures))
    if unknown:
        print(f"WARN: Unconsumed cmdline flags: {' '.join(unknown)}")
    (warm, (warm_mean, *_)), (samples, figures) = last
    if KIND == "tflite":
        times = f"Init: {started * 1e6:.0f}, First inference: {warm[0]}, Warmup (avg): {warm_mean:.6g}, Inference (avg): {figures[0]:.6g}"
        info(f"Inference timings in us: {times}")
        if values["report_peak_memory_footprint"] == "true":
            info("Overall peak memory footprint (MB) via periodic monitoring: 74.2")
        if values["enable_op_profiling"] == "true":
            op_profile(operations)
    else:
        litert_info(89, "\n========== BENCHMARK RESULTS ==========")
        litert_info(94, f"Model initialization: {started * 1e3:.2f} ms")
        litert_info(99, f"Inference (avg):      {figures[0] / 1e3:.2f} ms ({len(samples)} runs)")
        litert_info(120, "======================================\n")
    if "killed" in modes:
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    if "fail_late" in modes:
        print("ERROR: Benchmarking failed.", file=sys.stderr)
        return 1
    if values.get("output_filepath"):
        content = outputs()
        with open(values["output_filepath"], "wb") as file:
            file.write(content[: len(content) // 2] if "truncated" in modes else content)
    if values["result_file_path"]:
        write_result(values["result_file_path"], *figures, len(samples))
    return 0


def prepare(values, modes):
    """Returns the operations, a function that times one inference in whole microseconds, whether all is delegated, and one for outputs."""
    graph = values["graph"]
    if "canned" in modes:
        base = 200 + os.path.getsize(graph) // 100
        if "heating" in modes:
            with open("heat", "ab") as file:
                file.write(b".")
                base = base * (10 + file.tell()) // 10
        ticks = iter(range(10**9))
        return [], lambda: base + next(ticks) % 7, "partial" not in modes, lambda: b""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    plain = values.get("use_xnnpack") == "false"
    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if plain else OpResolverType.AUTO
    interpreter = Interpreter(graph, num_threads=max(1, int(values["num_threads"])), experimental_op_resolver_type=resolver)
    interpreter.allocate_tensors()
    for details in interpreter.get_input_details():
        interpreter.set_tensor(details["index"], np.random.default_rng(0).random(details["shape"]).astype(details["dtype"]))
    if values.get("input_layer_value_files"):
        read_inputs(values, interpreter)
    times = 1
    if "FAKE_SLOW" in os.environ:
        with open(os.environ["FAKE_SLOW"]) as file:
            times = json.load(file).get(os.path.basename(graph).partition(".")[0], 1)
    operations, done = interpreter._get_ops_details(), []

    def invoke():
        begin = time.perf_counter_ns()
        for _ in range(times):
            interpreter.invoke()
        done.append(1)
        return max(1, (time.perf_counter_ns() - begin) // 1000)

    def outputs():
        arrays = [interpreter.get_tensor(details["index"]) for details in interpreter.get_output_details()]
        if "wrong_gpu" in modes and values["use_gpu"] == "true" and len(done) > 3:
            arrays = [np.roll(array, array.size // 2) if array.size > 1 else array * 0 for array in arrays]
        return b"".join(array.tobytes() for array in arrays)

    return operations, invoke, all(operation["op_name"] == "DELEGATE" for operation in operations), outputs


def read_inputs(values, interpreter):
    """Inputs by their order; a file of another size ends the real tool."""
    import numpy as np

    names, shapes = values["input_layer"].split(","), values["input_layer_shape"].split(":")
    files = dict(item.split(":") for item in values["input_layer_value_files"].split(","))
    for name, shape, details in zip(names, shapes, interpreter.get_input_details(), strict=True):
        with open(files[name], "rb") as file:
            content = file.read()
        expected = np.dtype(details["dtype"]).itemsize * int(np.prod(details["shape"]))
        if [int(side) for side in shape.split(",")] != details["shape"].tolist() or len(content) != expected:
            print(f"FATAL: The size of {files[name]} is {len(content)} bytes. It should be {expected} bytes.", file=sys.stderr)
            os.abort()
        interpreter.set_tensor(details["index"], np.frombuffer(content, details["dtype"]).reshape(details["shape"]))


if __name__ == "__main__":
    sys.exit(main())
