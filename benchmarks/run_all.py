"""Every benchmark once, small: whether all of them run, what each takes, and the figures that it ends with.

`python benchmarks/run_all.py --workdir W [--data_dir D] --output DIR [--images 48] [--names regions,precision]` copies the trained work
folder W to DIR/work, takes the first `--images` of its validation split, exports and calibrates them once, and then calls each script with
few rounds. Figures of so few images and rounds mean nothing: the commands in `benchmarks/README.md` make those. What trains starts from
nothing on drawn scenes. Every script's output is in DIR/NAME.log. The last line is one JSON object: seconds and result by script; the exit
status is 1 where one failed.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

from mess_runtime.files import write_atomically
from mess_tf import configs

NEEDS = {"search_vs_peers": ("optuna", "pymoo"), "policy_cost": ("cv2",), "cluster": ("ray",)}


def subset(config: configs.Config, folder: Path, images: int) -> None:
    """Makes a data folder of links to the first images of every split of a folder source."""
    root = Path(config.data.data_dir)
    folder.mkdir(parents=True)
    shutil.copy(root / "classes.txt", folder / "classes.txt")
    for split in {config.data.train_split, config.data.val_split}:
        for image in sorted((root / split / "images").iterdir())[:images]:
            label = root / split / "labels" / f"{image.stem}.png"
            for path in (image, label):
                link = folder / split / path.parent.name / path.name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())


def commands(work: Path, output: Path, config: configs.Config) -> dict[str, list[str]]:
    """Words of every benchmark's command, in the order in which they run."""
    workdir, bundles = f"--workdir={work}", output / "bundles"
    photos = Path(config.data.data_dir, config.data.val_split, "images")
    read = [f"--data={config.data.source}", f"--data_dir={config.data.data_dir}", f"--ignore_value={config.data.ignore_value}"]
    make = [
        workdir,
        f"--original={work}",
        f"--output={bundles}",
        "--precisions=fp32",
        "--scales=1",
        "--rows=no_loss",
        "--settings=budgeted",
    ]
    return {
        "regions": [workdir, "--cells=16", "--exits=2", "--resamples=100"],
        "regions_blocks": ["--networks=mobilenet_v2", "--precisions=fp32", "--blocks=1", "--rounds=3"],
        "gain_policy": [workdir, "--blocks=4"],
        "scales": [workdir, "--scales=0.5,1", "--resamples=100"],
        "cell_policy": [workdir, "--cell=32", "--folds=2", "--epochs=1"],
        "precision": [workdir, "--rounds=3"],
        "mixed_precision": [workdir, "--rounds=3"],
        "policy_cost": [workdir, "--rounds=3", "--images=4", "--threads=1"],
        "runtime_overhead": [workdir, "--rounds=3"],
        "anytime": [workdir, "--images=20", "--deadlines=4"],
        "closed_loop": [workdir, "--rounds=1", "--runs=5"],
        "make_headline": [*make, "--noanytime", "--noexits"],
        "headline": [f"--bundle_dir={bundles}", "--rounds=1", *read],
        "backends": [f"--bundles={bundles}/fp32/original", f"--pythons={sys.executable}", "--backend=cpu", "--runs=2"],
        "rewrite_bundles": [f"--bundles={bundles}/fp32/original", f"--images={photos}"],
        "statics": [workdir, f"--output={output / 'statics'}", "--names=scale0.5", "--epochs=1", "--precisions=fp32"],
        "ablations": [f"--workdir={output / 'ablations'}", "--recipe=smoke", "--seeds=1", "--fewer=2"],
        "seeds": [f"--workdir={output / 'seeds'}", "--recipe=smoke", "--seeds=1"],
        "input_pipeline": ["--recipe=smoke", "--steps=3", "--rounds=1"],
        "strategies": ["--rounds=3", "--size=64x64", "--batch=2", "--exits=2"],
        "train_step": ["--steps=6", "--size=64x64", "--batch=2", "--exits=3"],
        "networks": [f"--output={output / 'networks'}", "--names=unet_xception"],
        "search_scaling": ["--rows=1_exit"],
        "statistics_growth": [f"--output={output / 'statistics'}", "--rows=base", "--counted=8"],
        "search_vs_peers": ["--seeds=1", "--max_early_exits=1", "--time_limit=20"],
        "fleet_plan": ["--sample=1", "--constraints=1", "--shared=3", "--heads=8", "--images=50"],
        "guarantee": ["--sets=3"],
        "cluster": [workdir, "--images=16"],
    }


def run(name: str, words: list[str], log: Path) -> dict[str, object]:
    """Calls one script; returns its seconds, and the JSON of its last line, or how it failed."""
    start = time.monotonic()
    script = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *words]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    log.write_text(done.stdout + done.stderr)
    if done.returncode:
        return {"seconds": seconds, "error": f"status {done.returncode}, see {log}"}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        return {"seconds": seconds, "result": json.loads(last)}
    except json.JSONDecodeError:  # what makes files ends with their place
        return {"seconds": seconds, "result": last}


def summary(outcome: dict[str, object]) -> str:
    """The error, or the first figures of a result."""
    if "error" in outcome:
        return f"FAILED: {outcome['error']}"
    result = outcome["result"]
    if not isinstance(result, dict):
        return str(result)
    figures = [f"{name} {value:.4g}" for name, value in result.items() if isinstance(value, float | int)]
    return ", ".join(figures[:3]) or ", ".join(result)[:100]


def prepared(output: Path) -> tuple[Path, configs.Config]:
    """Copies the work folder, its data cut down, and exports and calibrates it."""
    work, data = output / "work", output / "data"
    config = configs.with_data_dir(configs.load_config(FLAGS.workdir), FLAGS.data_dir)
    if not (work / "config.json").exists():  # it is written last
        for folder in (work, data):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(FLAGS.workdir, work, ignore=shutil.ignore_patterns("ckpt-*", "config.json"))
        subset(config, data, FLAGS.images)
        config = configs.with_data_dir(config, str(data.resolve()))
        write_atomically(work / "config.json", lambda temporary: temporary.write_text(configs.to_json(config)))
    for command in ("export_tflite", "calibrate"):
        words = ["--candidates"] if command == "export_tflite" else []
        subprocess.run([sys.executable, "-m", f"mess_tf.{command}", f"--workdir={work}", *words], check=True)
    return work, configs.load_config(work)


def main(argv) -> None:
    del argv
    if configs.load_config(FLAGS.workdir).data.source != "folder":
        raise app.UsageError("--workdir: must be of a training on --data=folder, whose first images are taken")
    output = Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    work, config = prepared(output)
    outcomes = {}
    for name, words in commands(work, output, config).items():
        if FLAGS.names and name not in FLAGS.names:
            continue
        missing = [module for module in NEEDS.get(name, ()) if importlib.util.find_spec(module) is None]
        if missing:
            print(f"{name:<18} left out: needs {', '.join(missing)}, see CONTRIBUTING.md", flush=True)
            continue
        outcomes[name] = run(name, words, output / f"{name}.log")
        print(f"{name:<18} {outcomes[name]['seconds']:6.0f} s  {summary(outcomes[name])}", flush=True)
    print(json.dumps(outcomes))
    sys.exit(any("error" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "folder of a training", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_string("output", None, "folder to write", required=True)
    flags.DEFINE_integer("images", 48, "of each split that are used", lower_bound=8)
    flags.DEFINE_list("names", [], "scripts to run; default: all")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main)
