"""The pipeline: what it makes, what it leaves as it is, and how it goes on where it was stopped."""

import collections
import dataclasses
import functools
import json
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import commands
import keras
import numpy as np
import pytest
from small_network import FEW_BLOCKS, small_network

from android_bench import __main__ as android
from mess_runtime import benchmark
from mess_runtime.bundle import Bundle, file_sha256
from mess_runtime.files import locked
from mess_tf import calibrate, configs, evaluate, pipeline, tasks, train
from mess_tf.data.synthetic import SYNTHETIC_CLASSES
from mess_tf.files import Asked, Deployment, Stats, best_weights
from mess_tf.network.evaluation import Accuracy
from mess_tf.pipeline import STEPS, Pipeline, StepError

ASKED = Asked(cost_share=0.9)
OVERRIDES = (
    "backbone.name=keras_file",
    "data.input_size=[32, 64]",
    "data.synthetic_train=8",
    "data.synthetic_val=4",
    "exits.count=2",
    'exits.heads=["fcn-r8-b0"]',
    "exits.plain_head=fcn-r8-b0",
    "stage1.epochs=1",
)


def of_size(path: Path, *_) -> list[float]:
    """In place of `benchmark._sample`: files take as long as they are large, so that two searches choose the same."""
    return [path.stat().st_size / 1e4] * 3


@pytest.fixture(scope="module", autouse=True)
def steady_latencies():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "_sample", of_size)
        yield
    keras.mixed_precision.set_global_policy("float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.keras"
    keras.utils.set_random_seed(0)
    small_network(len(SYNTHETIC_CLASSES), FEW_BLOCKS).save(path)
    return path


def start(workdir: Path, model: Path, first: str | None = None, asked: Asked = ASKED, latency: Path | None = None) -> None:
    config = train.resolve_config(workdir, "smoke", "", "", [*OVERRIDES, f"backbone.weights={model}"])
    Pipeline(workdir, config, "", asked, latency).run(first)


@pytest.fixture(scope="module")
def made(tmp_path_factory, model) -> Path:
    """A work folder after one undisturbed run."""
    workdir = tmp_path_factory.mktemp("made") / "work"
    start(workdir, model)
    return workdir


def said(text: str) -> list[tuple[str, str]]:
    """Each step's line, as its name and what it says; others are progress."""
    lines = [line.partition(": ")[::2] for line in text.splitlines()]
    return [(name, word) for name, word in lines if name in STEPS and (word == "up to date" or word.startswith("/"))]


@pytest.fixture
def again(made, model, tmp_path, capsys):
    """Starts it again in a copy of that folder, and returns the steps that were done."""
    workdir = tmp_path / "work"
    shutil.copytree(made, workdir, symlinks=True)

    def run(**options) -> list[str]:
        capsys.readouterr()
        start(workdir, model, **options)
        found = said(capsys.readouterr().out)
        assert [name for name, _ in found] == [*STEPS], "one line for each"
        return [name for name, word in found if word != "up to date"]

    run.workdir = workdir
    return run


def hashes(workdir: Path) -> dict[str, str]:
    return {str(path.relative_to(workdir)): file_sha256(path) for path in sorted(workdir.rglob("*")) if path.is_file()}


def assert_same(workdir: Path, made: Path) -> None:
    """All files, bit for bit, but for those that hold times."""
    times = ("tfevents", "/checkpoint", "deployment.json", "latency.json", "report/")
    found, expected = (
        {name: value for name, value in hashes(each).items() if not any(time in name for time in times)} for each in (workdir, made)
    )
    assert found == expected
    names = [{*hashes(each)} for each in (workdir, made)]
    assert {name for name in names[0] ^ names[1] if "tfevents" not in name} == set()
    one, other = (Deployment.load(each / "deployment.json") for each in (workdir, made))
    assert dataclasses.replace(one, certificate=other.certificate) == other


def test_all_steps_make_what_they_should(made):
    deployment = Deployment.load(made / "deployment.json")
    assert deployment.asked == dataclasses.replace(ASKED, device=benchmark.device_name(), threads=1)
    assert deployment.predicted.cost_mean <= 0.9 * deployment.original.cost and deployment.predicted.cost_name == "latency_ms"
    assert Bundle.load(made / "bundle").manifest.exits == tuple(choice.exit for choice in deployment.exits)
    assert {path.suffix for path in made.rglob(".*")} == {".lock"}
    lines = pipeline.summary(made, deployment).splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("original", "predicted", "difference"))] == [
        "original",
        "predicted",
        "difference",
    ]
    assert lines[-2:] == [
        f"report: {made / 'report' / 'index.html'}",
        f"run: python -m mess_runtime run {made / 'bundle'} PHOTO --output={made / 'masks'}",
    ]
    assert (made / "report" / "index.html").exists()


def test_a_second_start_does_nothing(again):
    before = hashes(again.workdir)
    assert again() == []
    assert hashes(again.workdir) == before


def test_another_constraint_does_the_last_three_steps(again):
    assert again(asked=Asked(min_miou=0.0)) == ["search", "bundle", "report"]
    assert Deployment.load(again.workdir / "deployment.json").constraint.min_miou == 0


def test_several_precisions_have_candidates_and_statistics_of_their_own(again, monkeypatch):
    """Beside those of one alone, whose bits they have."""
    monkeypatch.setattr(pipeline.report, "run", lambda workdir, *_: workdir)
    asked = Asked(min_miou=0.0, precisions=("fp32", "fp16"))
    assert again(asked=asked) == ["candidates", "calibrate", "measure", "search", "bundle", "report"]
    folder = again.workdir
    one, same = ({path.name: file_sha256(path) for path in (folder / name).iterdir()} for name in ("candidates", "candidates.fp32"))
    assert one == same
    assert [Stats.load(folder / f"stats.{each}.npz").precision for each in asked.precisions] == ["fp32", "fp16"]
    deployment = Deployment.load(folder / "deployment.json")
    assert (deployment.precision, deployment.backend) == ("fp16", benchmark.BACKEND), "half the size, which is the latency here"
    assert [each.precision for each in deployment.combinations if each.reason] == ["fp32"]
    manifest = Bundle.load(folder / "bundle").manifest
    assert (manifest.precision, manifest.predicted.backend) == ("fp16", benchmark.BACKEND)
    assert again(asked=asked) == ["report"]


@pytest.fixture
def without_bundle_and_report(monkeypatch):
    """These two are called, but do nothing."""
    monkeypatch.setattr(pipeline.export_tflite, "run_deployment", lambda workdir, *_: workdir)
    monkeypatch.setattr(pipeline.report, "run", lambda workdir, *_: workdir)


@pytest.mark.usefixtures("without_bundle_and_report")
def test_from_makes_a_step_and_all_after_it_anew(again, made):
    assert again(first="search") == ["search", "bundle", "report"]
    assert again(first="bundle") == ["bundle", "report"]


@pytest.mark.usefixtures("without_bundle_and_report")
def test_other_latencies_are_searched_again(again, tmp_path):
    document = json.loads((again.workdir / "latency.json").read_text())
    same, other, lacking = (tmp_path / f"{name}.json" for name in ("same", "other", "lacking"))
    same.write_text(json.dumps(document | {"rows": document["rows"][::-1]}))
    asked = dataclasses.replace(ASKED, device=benchmark.device_name(), threads=1)
    assert again(latency=same, asked=asked) == []
    document["rows"] = [row | {"p50_ms": 2 * row["p50_ms"], "p90_ms": None} for row in document["rows"]]
    other.write_text(json.dumps(document))
    assert again(latency=other, asked=asked) == ["search", "bundle", "report"]
    lacking.write_text(json.dumps(document | {"rows": document["rows"][:1]}))
    with pytest.raises(StepError, match=r"^search: latency.json: must have a row .*for every submodel"):
        again(latency=lacking, asked=asked)


def test_the_steps_that_are_tasks_are_told_where_to_run_them(tmp_path, model, monkeypatch):
    told = []
    for step in (train, calibrate):
        monkeypatch.setattr(step, "run", lambda *args, ray, **kwargs: told.append(ray) or [])
    for overrides in ([], ["stage2.epochs=0"]):
        config = train.resolve_config(tmp_path, "smoke", "", "", [*OVERRIDES, f"backbone.weights={model}", *overrides])
        steps = Pipeline(tmp_path, config, "", ASKED, ray="local").steps()
        for name in ("train", "calibrate"):
            steps[name][1]()
    assert told == ["local", "local", "", "local"]


def test_shards_counted_apart_make_the_same_statistics(again, monkeypatch):
    """What is finished is not done again, what is broken or of other thresholds is; another process makes the same of what it is sent."""
    path, workdir = again.workdir / "stats.npz", str(again.workdir)
    expected = path.read_bytes()
    made = {"exact": calibrate.calibrations(workdir), "coarse": calibrate.calibrations(workdir, theta_pix=(0.5,))}
    opened = {
        "exact": tasks.Opened(made["exact"], calibrate._opened, ((), False), workdir),
        "coarse": tasks.Opened(made["coarse"], calibrate._opened, ((), False), workdir, "", "", (0.5,)),
    }
    counted, count = [], calibrate.Calibration.count
    monkeypatch.setattr(calibrate.Calibration, "count", lambda self, images: counted.append(images) or count(self, images))

    def todo(name="exact"):
        return calibrate.shard_tasks(opened[name], workdir, shard=1)

    assert len(todo()) == len(made["exact"][None].examples) > 1
    (last,) = tasks.run(todo()[-1:], "calibrate", "shard")
    last.write_bytes(last.read_bytes()[:-100])
    tasks.run(todo("coarse")[:-1], "calibrate", "shard")
    assert [task.done for task in todo()] == [False] * len(todo())
    for task in todo()[:-1]:  # as a process of its own does
        assert tasks._elsewhere(os.getcwd(), pickle.dumps((tasks._place(task.function), task.arguments))) is None
    assert [task.done for task in todo()] == [True] * (len(todo()) - 1) + [False]
    counted.clear()
    files = tasks.run(todo(), "calibrate", "shard")
    assert counted == [range(len(files) - 1, len(files))]
    calibrate.merge(made["exact"][None], files, path)
    assert path.read_bytes() == expected
    assert not files[0].parent.exists()


def test_what_is_not_the_same_elsewhere_is_said(again):
    workdir = str(again.workdir)
    opened = tasks.Opened(calibrate.calibrations(workdir), calibrate._opened, ((), False), workdir, "", "train")
    task = calibrate.shard_tasks(opened, workdir)[0]
    answer = tasks._elsewhere(os.getcwd(), pickle.dumps((tasks._place(task.function), task.arguments)))
    assert str(answer).startswith("workdir: must be the same on all machines, and the data too, got ")


def test_evaluation_of_a_split_that_lacks_a_class(again, monkeypatch):
    whole = evaluate.confusion_matrices

    def lacking(*arguments):
        matrices = whole(*arguments)
        for matrix in matrices.values():
            matrix[1] = 0
        return matrices

    monkeypatch.setattr(evaluate, "confusion_matrices", lacking)
    for accuracy in json.loads(evaluate.run(str(again.workdir)).read_text()).values():
        first, second, *_ = accuracy["class_iou"]
        assert first is not None and second is None and 0 <= accuracy["miou"] <= 1


def test_evaluation_in_shards_is_that_of_the_whole_split(again, monkeypatch):
    """A second start counts what the first has not."""
    workdir, counted, whole = str(again.workdir), [], evaluate.confusion_matrices
    expected = evaluate.run(workdir).read_bytes()

    def once(predict, examples, images):
        if len(counted) == 2:
            raise KeyboardInterrupt
        counted.append(images)
        return whole(predict, examples, images)

    monkeypatch.setattr(evaluate, "confusion_matrices", once)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(workdir, shard=1)
    first, counted[:] = [*counted], []
    path = evaluate.run(workdir, shard=1)
    assert first + counted == [range(start, start + 1) for start in range(4)]
    assert path.read_bytes() == expected and not path.with_suffix("").exists()


def test_the_table_of_an_evaluation_names_classes_whole():
    header, row = evaluate.table({"final.original": Accuracy(0.5, 0.75, (0.25, 0.1234))}, ["left", "a_very_long_name"]).splitlines()
    assert header.split() == ["mIoU", "pixels", "left", "a_very_long_name"] and len(header) == len(row)
    assert row.split() == ["final.original", "50.00", "75.00", "25.0", "12.3"]


@pytest.mark.usefixtures("without_bundle_and_report")
def test_edited_statistics_are_searched_again(again):
    stats = Stats.load(again.workdir / "stats.npz")
    dataclasses.replace(stats, changed=np.zeros_like(stats.changed)).save(again.workdir / "stats.npz")
    assert again() == ["search", "bundle", "report"]


@pytest.mark.usefixtures("without_bundle_and_report")
def test_what_is_broken_or_gone_is_made_again(again):
    (again.workdir / "bundle" / "model.tflite").unlink()
    assert again() == ["bundle"]
    (again.workdir / "deployment.json").write_text("{}")
    assert again() == ["search", "bundle", "report"]
    path = again.workdir / "latency.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows": []}))
    assert again() == ["measure", "bundle", "report"], "the search finds the same latencies as before"


@pytest.mark.usefixtures("without_bundle_and_report")
def test_other_weights_are_exported_again(again):
    path = best_weights(again.workdir, "stage2")
    arrays = {name: array * np.float32(1.01) for name, array in np.load(path).items()}
    np.savez(path, **arrays)
    assert again() == ["candidates", "calibrate", "measure", "search", "bundle", "report"]


def test_a_training_made_from_something_else_is_an_error(again, made, model, tmp_path):
    other = tmp_path / "other.keras"
    small_network(len(SYNTHETIC_CLASSES), FEW_BLOCKS).save(other)
    config = train.resolve_config(again.workdir, "", "", "", [])
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, weights=str(other)))
    with pytest.raises(StepError, match=r"^train: workdir: must be another folder, since what was trained here was made from another"):
        Pipeline(again.workdir, config, "", ASKED).run()
    assert hashes(again.workdir) == hashes(made)
    path = again.workdir / "data.json"
    path.write_text(path.read_text().replace("train/00000_easy", "train/00000_other"))
    with pytest.raises(StepError, match=r"^train: .*data.json: data must be those of the first start of this training"):
        again()


def test_what_later_versions_add_to_the_configuration_is_no_other_training(again):
    path = again.workdir / "config.json"
    document = json.loads(path.read_text())
    del document["data"]["resize"]  # as before there was such a field
    path.write_text(json.dumps(document))
    config = configs.load_config(again.workdir)
    train.Record(train.made_from(again.workdir, config), ("stage1", "stage2")).save(again.workdir)
    path.write_text(json.dumps(document, indent=1))
    assert config.data.resize == "stretch" and again() == []


def files(workdir: Path) -> list[str]:
    return sorted(path.name for path in workdir.rglob("*") if path.suffix != ".lock")


def test_a_refused_start_leaves_nothing_that_a_later_one_would_take(tmp_path, model, monkeypatch):
    workdir = tmp_path / "work"
    words = [*OVERRIDES, f"backbone.weights={model}", "stage2.initial=none.npz"]
    config = train.resolve_config(workdir, "smoke", "", "", words)
    assert not workdir.exists()
    with pytest.raises(StepError, match=r"^train: stage2\.initial: must be an existing file, got 'none\.npz'"):
        Pipeline(workdir, config, "", ASKED).run()
    assert files(workdir) == []
    junk = tmp_path / "junk.keras"
    junk.write_text("no network")
    monkeypatch.setattr(train, "open_training", lambda *_: pytest.fail("data were opened"))
    config = train.resolve_config(workdir, "smoke", "", "", [*OVERRIDES, f"backbone.weights={junk}"])
    with pytest.raises(StepError, match=r"^train: backbone\.weights: must be a file that Keras' .* got '.*junk\.keras, no ZIP archive'"):
        Pipeline(workdir, config, "", ASKED).run()
    assert files(workdir) == []
    config = train.resolve_config(workdir, "camvid_lite0", "", str(tmp_path / "nowhere"), [])
    monkeypatch.undo()
    with pytest.raises(StepError, match=r"^train: .*nowhere.classes\.txt: missing"):
        Pipeline(workdir, config, "", ASKED).run()
    assert files(workdir) == [] and train.resolve_config(workdir, "camvid_lite0", "", "", []).data.data_dir == ""


def test_what_was_trained_is_not_forgotten_for_a_start_that_is_refused(again, model):
    before = hashes(again.workdir)
    config = configs.load_config(again.workdir)
    config = dataclasses.replace(config, stage2=dataclasses.replace(config.stage2, initial="none.npz"))
    with pytest.raises(StepError, match=r"^train: stage2\.initial: must be an existing file"):
        Pipeline(again.workdir, config, "", ASKED).run("train")
    assert hashes(again.workdir) == before


def test_what_later_steps_need_is_checked_before_any_work(tmp_path, monkeypatch, plug_in, tool):
    workdir, host = tmp_path / "work", benchmark.device_name()
    config = configs.RECIPES["smoke"]
    monkeypatch.setattr(Pipeline, "_run", lambda *_: pytest.fail("work was begun"))

    def refused(message: str, **options) -> None:
        asked = dataclasses.replace(
            ASKED, **{name: options.pop(name) for name in ("device", "threads", "backends", "precisions") if name in options}
        )
        with pytest.raises((OSError, ValueError, RuntimeError), match=message):
            Pipeline(workdir, config, "", asked, **options).run()
        assert not workdir.exists()

    refused(rf"^--device: must be {host}, this machine, without --latency and --android, got 'foo'", device="foo")
    refused(r"^--threads: must be between 1 and 256, got 0", threads=0)
    row = benchmark.LatencyRow("a", "0" * 64, 1, "Pixel", "", "", "tflite", "", "xnnpack", "xnnpack", 1, 1.0, None, 1.0, 3, None)
    table = tmp_path / "latency.json"
    table.write_text(json.dumps({"format": 1, "created_by": {}, "rows": [dataclasses.asdict(row)]}))
    refused(r"^device: must be one of \['Pixel'\] as in latency.json, got 'foo'", device="foo", latency=table)
    refused(r"^threads: must be one of \[1\] as in latency.json, got 2", threads=2, latency=table)
    refused("No such file", latency=tmp_path / "none.json")

    def phones(*words: str):
        return android.parse(["run", f"--workdir={workdir}", *words])

    refused("no phone is connected", phones=phones())
    plug_in("Pixel 8").environment["FAKE_MODE"] = "canned"
    refused("tool: must be tflite, litert or an existing file, got 'none'", phones=phones("--tool=none"))
    ready = phones(f"--tool={tool()}")
    refused(r"^--device: must be one of the phones, Pixel_8-PIXEL8, got 'foo'", device="foo", phones=ready)
    refused(r"^--threads: must be 1, as --android_flag=--threads has it, got 2", threads=2, phones=ready)
    refused(r"^--backends: must be xnnpack, as --android_flag=--backend has it, got 'gpu'", backends=("gpu",), phones=ready)
    refused("no such device", phones=phones("--serial=none"))
    plug_in("Nexus 5")
    refused(r"^device: must be given where latency.json has several", phones=ready)
    with pytest.raises(pytest.fail.Exception, match="work was begun"):
        Pipeline(workdir, config, "", dataclasses.replace(ASKED, device="Pixel_8-PIXEL8"), phones=ready).run()


def test_a_deployment_of_other_statistics_is_not_exported(made, tmp_path):
    path = tmp_path / "other.json"
    dataclasses.replace(Deployment.load(made / "deployment.json"), stats_sha256="0" * 64).save(path)
    before = hashes(made)
    with pytest.raises(ValueError, match=r"other\.json: stats_sha256: must be that of .*stats\.npz; search again, got '0000"):
        pipeline.export_tflite.run_deployment(made, path)
    assert hashes(made) == before


def test_two_at_once_are_refused(again, model):
    with locked(again.workdir / "pipeline"), pytest.raises(ValueError, match=r"^workdir: must be no other pipeline's"):
        again()


def test_latencies_of_phones(again, plug_in, tool):
    """Beside those of this machine, from a phone that runs no graphs."""
    phone = plug_in("Pixel 8")
    phone.environment["FAKE_MODE"] = "canned"
    words = [f"--tool={tool()}", "--repetitions=1", "--runs=5", "--min_seconds=0", "--warmup_runs=1"]
    phones = android.parse(["run", f"--workdir={again.workdir}", *words])
    config = train.resolve_config(again.workdir, "", "", "", [])
    steps = Pipeline(again.workdir, config, "", ASKED, phones=phones)
    of_other_phone = dataclasses.replace(steps, asked=dataclasses.replace(ASKED, device="Nexus_5-NEXUS5"))
    assert not steps.is_measured()
    assert steps.measure() == again.workdir / "latency.json"
    assert steps.is_measured() and not of_other_phone.is_measured()
    assert dataclasses.replace(steps, phones=None).is_measured(), "the rows of this machine are still there"


class Stopped(BaseException):
    """As if the process had ended."""


# What each step is stopped at: before the file is put in its place.
STOPS = {
    "train": "checkpoints/stage2/best.npz",
    "candidates": "candidates/head.exit1.fcn-r8-b0.tflite",
    "calibrate": "stats.npz",
    "measure": "latency.json",
    "search": "deployment.json",
    "bundle": "submodels",
    "report": "report/index.html",
}


def test_stopped_in_each_step_it_ends_with_the_same_files(made, model, full, tmp_path, monkeypatch, capsys):
    """In its short form it begins with the training, whose stops tests/test_train.py has."""
    workdir, replace, stops = tmp_path / "work", os.replace, dict(STOPS)
    if not full:
        del stops["train"]
        trained = ("checkpoints", "logs", "config.json", "data.json", "original.keras", "training.json", ".lock")
        shutil.copytree(made, workdir, symlinks=True)
        for path in workdir.iterdir():
            if not path.name.endswith(trained):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, stop in stops.items():

        def stopped(source, target, stop=stop):
            if Path(target) == workdir / stop:
                raise Stopped
            replace(source, target)

        monkeypatch.setattr(os, "replace", stopped)
        with pytest.raises(Stopped):
            start(workdir, model)
        monkeypatch.setattr(os, "replace", replace)
        found, before = said(capsys.readouterr().out), STEPS[: STEPS.index(name)]
        assert [step for step, _ in found] == [*before], name
        done = before if name == "candidates" and not full else before[:-1]
        assert [step for step, word in found if word == "up to date"] == [*done], name
    start(workdir, model)
    assert_same(workdir, made)


@pytest.mark.full
def test_killed_it_ends_with_the_same_files(made, model, tmp_path, capsys):
    """A process of its own, killed while it exports the candidates; what it leaves half-written is cleared."""
    workdir = tmp_path / "work"
    shutil.copytree(made, workdir, symlinks=True)
    shutil.rmtree(workdir / "candidates")
    words = [f"--workdir={workdir}", "--cost_share=0.9", "--recipe=smoke"]
    words += [f"--set={override}" for override in (*OVERRIDES, f"backbone.weights={model}")]
    output = tmp_path / "output.txt"
    process = commands.start("mess_tf.pipeline", *words, stdout=output, stderr=output)
    while process.is_alive() and not [*workdir.glob("candidates/head.*")]:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, output.read_text()
    assert not (workdir / "candidates" / "weights.sha256").exists()
    with pytest.raises(ValueError, match=r"weights\.sha256: must be there, as the last file of an export; .* makes them anew, got"):
        calibrate.run(str(workdir))
    (workdir / "candidates" / f".head.final.original.tflite.{process.pid}.tmp").write_bytes(b"half")
    capsys.readouterr()
    start(workdir, model)
    assert said(capsys.readouterr().out)[0] == ("train", "up to date")
    assert_same(workdir, made)


def alone(workdir: Path, model: Path, output: Path, snapshots: Path | None = None) -> None:
    """What a process of its own does; into `snapshots` go the work folder before each step, and how long that took."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
    benchmark._sample = of_size
    steps = Pipeline.steps

    def kept(name: str, make) -> object:
        shutil.copytree(workdir, snapshots / name, symlinks=True)
        begin = time.monotonic()
        result = make()
        (snapshots / f"{name}.seconds").write_text(str(time.monotonic() - begin))
        return result

    if snapshots:
        Pipeline.steps = lambda self, *words: {
            name: (is_made, functools.partial(kept, name, make)) for name, (is_made, make) in steps(self, *words).items()
        }
    print("begin", flush=True)
    start(workdir, model)


def run_alone(workdir: Path, model: Path, snapshots: Path | None = None) -> None:
    """To the end. In this process, which has run other things before, the last bits of a training may be others."""
    output = workdir.with_suffix(".txt")
    process = commands.server().Process(target=alone, args=(workdir, model, output, snapshots))
    process.start()
    process.join()
    assert process.exitcode == 0, output.read_text()


def killed_in(name: str, workdir: Path, model: Path, seconds: float) -> str | None:
    """Starts a process, kills it so long after a step has begun, and returns the step that it was in; None if it had ended before."""
    output = workdir.with_suffix(".txt")
    output.write_text("")
    process = commands.server().Process(target=alone, args=(workdir, model, output))
    process.start()
    while process.is_alive() and not ("begin\n" in (text := output.read_text()) and len(said(text)) >= STEPS.index(name)):
        time.sleep(0.005)
    time.sleep(seconds)
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        assert process.exitcode == 0, output.read_text()
        return None
    return STEPS[min(len(said(output.read_text())), len(STEPS) - 1)]


def test_killed_anywhere_it_ends_with_the_same_files(request, model, tmp_path, capsys):
    """`--kills=40` takes long: so many processes, each killed at a random moment of a step, and started again."""
    if not (kills := request.config.getoption("--kills")):
        pytest.skip("needs --kills=N")
    undisturbed = tmp_path / "undisturbed"
    run_alone(undisturbed, model, tmp_path)
    seconds = {name: float((tmp_path / f"{name}.seconds").read_text()) for name in STEPS}
    generator, found, tries = random.Random(0), collections.Counter(), 0
    while found.total() < kills:
        name, workdir = STEPS[tries % len(STEPS)], tmp_path / f"work{tries}"
        tries += 1
        shutil.copytree(tmp_path / name, workdir, symlinks=True)
        place = killed_in(name, workdir, model, generator.random() * seconds[name])
        if place != name:  # steps take less time than they did at first
            seconds[name] /= 2
        if place is not None:
            run_alone(workdir, model)
            assert_same(workdir, undisturbed)
            found[place] += 1
            with capsys.disabled():
                print(f"kill {found.total()} of {kills}, in {place}: started again, the same files", flush=True)
        shutil.rmtree(workdir)
