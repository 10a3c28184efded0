"""Thirteen networks of the kinds that people have, each through the whole pipeline: what it took, and what came out.

`python benchmarks/networks.py --output=FOLDER [--names=unet_xception,pidnet]` saves small re-buildings of published networks
(`tests/networks`) as .keras files, writes a small data set of drawn scenes, and runs `mess_tf.pipeline` on each with the settings of
`--recipe=smoke`: untrained networks, whose mIoU means nothing. What is shown is whether each step takes them, and for how long; all that a
pipeline prints is in FOLDER/NAME.log.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
from absl import app, flags
from PIL import Image

from mess_tf.configs import DataConfig
from mess_tf.data.sources import open_split
from mess_tf.files import Deployment
from mess_tf.network.model import convert

TESTS = Path(__file__).resolve().parents[1] / "tests"
SIZE, SCENES = (64, 128), 8


def write_data(folder: Path, classes: int) -> None:
    """A `folder` data set of drawn scenes; of two classes, the second is what is not the first in the scenes."""
    for split in ("train", "val"):
        examples = open_split(DataConfig(input_size=SIZE, synthetic_train=SCENES, synthetic_val=SCENES), split)
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for index in range(SCENES):
            image, label = examples.load(index)
            label = np.where(label == 255, 255, np.minimum(label, classes - 1)).astype(np.uint8)
            Image.fromarray(image).save(folder / split / "images" / f"{index}.png")
            Image.fromarray(label).save(folder / split / "labels" / f"{index}.png")
    (folder / "classes.txt").write_text("\n".join(examples.info.classes[:classes]) + "\n")


def run(name: str, kind, folder: Path) -> dict:
    """Puts one network through the pipeline: a row of the table."""
    classes = kind.classes or len(open_split(DataConfig(), "val").info.classes)
    keras.utils.set_random_seed(0)
    model = kind.build(SIZE, classes)
    model.save(folder / f"{name}.keras")
    network = convert(model, kind.exits, SIZE, kind.output)
    data = folder / f"data{classes}"
    if not data.exists():
        write_data(data, classes)
    settings = {
        "backbone.name": "keras_file",
        "backbone.weights": folder / f"{name}.keras",
        "backbone.output": kind.output,
        "backbone.width": 1,
        "data.input_size": list(SIZE),
        "exits.count": kind.exits,
        "exits.heads": '["fcn-r8-b0","decoder-r8-b0"]',
    }
    command = [sys.executable, "-m", "mess_tf.pipeline", f"--workdir={folder / name}", "--recipe=smoke", "--data=folder"]
    command += [f"--data_dir={data}", "--max_drop_pp=1", "--import=networks", *(f"--set={key}={value}" for key, value in settings.items())]
    start = time.monotonic()
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, check=False)
    (folder / f"{name}.log").write_text(done.stdout + done.stderr)
    row = {
        "network": name,
        "output": kind.output,
        "exits": [f"{point.tap.name} /{point.tap.stride}" for point in network.exit_points],
        "seconds": round(time.monotonic() - start, 1),
        "exit_code": done.returncode,
    }
    if done.returncode:
        return row | {"error": done.stderr.strip().splitlines()[-1]}
    deployment = Deployment.load(folder / name / "deployment.json")
    return row | {"chosen": [dataclasses.asdict(choice)["exit"] for choice in deployment.exits]}


def main(argv: list[str]) -> None:
    del argv
    sys.path.insert(0, str(TESTS))
    import networks  # of the tests

    folder = Path(flags.FLAGS.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in flags.FLAGS.names or networks.KINDS:
        rows.append(run(name, networks.KINDS[name], folder))
        row = rows[-1]
        said = row.get("error") or ", ".join(row["chosen"])
        print(f"{name:20}  {row['seconds']:6.1f} s  {row['output']:13}  {'; '.join(row['exits']):70}  {said}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "folder for the networks and their work folders", required=True)
    flags.DEFINE_list("names", [], "of tests/networks; default: all")
    app.run(main)
