"""What one would do instead of early exits: the original network made smaller, fine-tuned, and exported the same way.

`python benchmarks/statics.py --workdir W --output DIR [--data_dir D] [--names ...] [--epochs 12] [--precisions fp32,int8]` starts from the
original network of a training and writes DIR/PRECISION/NAME, bundles for `headline.py --statics DIR`. Names are parts joined by `-`:
  scaleX    the image is resized to X of its size inside the network (`backbone.input_scale`), and the logits straight to the image's size
  strideN   the backbone at output stride N (8 only with another HEAD than a decoder, which would read another tap)
  HEAD      another final head of the backbone's kind, `fcn`, `deeplab` or `decoder` (with reduction 1 and no blocks), new where it differs
Each is trained in DIR/train/NAME by `mess_tf.train`, plainly, on whole images, as W was trained otherwise; stopped, it goes on from there.
"""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
from absl import app, flags

from mess_runtime.bundle import BUDGETED, InputSpec
from mess_runtime.files import write_atomically
from mess_tf import configs
from mess_tf.configs import Config, HeadSpec
from mess_tf.data.sources import open_split
from mess_tf.export_tflite import calibration_images
from mess_tf.files import Configuration, ExitChoice
from mess_tf.graph.conversion import FP32, INT8, PRECISIONS
from mess_tf.graph.exporter import Exporter
from mess_tf.network.backbones import build_backbone
from mess_tf.network.model import FINAL, build_network, load_network

NAMES = ("scale0.75", "scale0.6", "scale0.5", "stride32", "deeplab", "scale0.75-deeplab", "scale0.6-deeplab", "scale0.5-deeplab")
NAMES += ("stride32-deeplab",)


def smaller(workdir: str, config: Config, name: str, num_classes: int) -> keras.Model:
    """The original network of a training as `name` says, with its weights wherever a layer has kept its shape."""
    trained = load_network(workdir, config, num_classes).original
    backbone, head = dataclasses.replace(config.backbone, weights="none"), config.exits.final_head
    for part in name.split("-"):
        kind, number = re.fullmatch(r"([a-z]+)([\d.]*)", part).groups()
        if kind == "scale":
            backbone = dataclasses.replace(backbone, input_scale=float(number))
        elif kind == "stride":
            backbone = dataclasses.replace(backbone, output_stride=int(number))
        else:
            head = HeadSpec(kind).name
    data, exits = dataclasses.replace(config.data, crop_size=(0, 0)), dataclasses.replace(config.exits, final_head=head)
    network = build_network(dataclasses.replace(config, data=data, backbone=backbone, exits=exits), num_classes).original
    if head == config.exits.final_head:
        network.set_weights(trained.get_weights())
    else:
        for layer in build_backbone(backbone).layers:
            network.get_layer(layer.name).set_weights(trained.get_layer(layer.name).get_weights())
    return network


def train(folder: Path, config: Config, name: str, num_classes: int) -> Config:
    """Fine-tunes one alternative in `folder` and returns its configuration."""
    if not (folder / "config.json").exists():
        start = folder / "start.keras"
        stage = dataclasses.replace(config.stage1, exits="none", initial="", epochs=FLAGS.epochs, learning_rate=FLAGS.learning_rate)
        own = Config(
            data=dataclasses.replace(config.data, crop_size=(0, 0)),
            backbone=dataclasses.replace(config.backbone, name="keras_file", width=1.0, input_scale=1.0, weights=str(start)),
            exits=dataclasses.replace(config.exits, count=2, layers=(), plain_head="fcn-r8-b0"),
            stage1=dataclasses.replace(stage, eval_epochs=FLAGS.eval_epochs),
            stage2=dataclasses.replace(config.stage2, epochs=0),
        )
        folder.mkdir(parents=True, exist_ok=True)
        network = smaller(FLAGS.workdir, config, name, num_classes)

        def save(temporary: Path) -> None:  # Keras looks at the suffix
            network.save(f"{temporary}.keras")
            os.replace(f"{temporary}.keras", temporary)

        write_atomically(start, save)
        write_atomically(folder / "config.json", lambda temporary: temporary.write_text(configs.to_json(own)))
    subprocess.run([sys.executable, "-m", "mess_tf.train", f"--workdir={folder}"], check=True)
    return configs.load_config(str(folder))


def main(argv) -> None:
    del argv
    config = configs.with_data_dir(configs.load_config(FLAGS.workdir), FLAGS.data_dir)
    examples = open_split(config.data, config.data.val_split)
    output, classes = Path(FLAGS.output), examples.info.classes
    alone = Configuration(BUDGETED, False, (ExitChoice(*FINAL.split(".")),), None)
    for name in FLAGS.names:
        folder = output / "train" / name
        own = train(folder, config, name, len(classes))
        network = load_network(str(folder), own, len(classes))
        for precision in FLAGS.precisions:
            samples = calibration_images(config) if precision == INT8 else ()
            exporter = Exporter(network, config.data.input_size, precision=precision, samples=samples)
            spec = InputSpec(*config.data.input_size, resize=config.data.resize)
            exporter.bundle(output / precision / name, alone, None, classes, spec, examples)
            print(output / precision / name, flush=True)
    print(output)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "folder of a training", required=True)
    flags.DEFINE_string("output", None, "folder to write", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_list("names", list(NAMES), "what to make, see above")
    flags.DEFINE_list("precisions", [FP32, INT8], f"of {', '.join(PRECISIONS)}")
    flags.DEFINE_integer("epochs", 12, "of fine-tuning", lower_bound=1)
    flags.DEFINE_integer("eval_epochs", 4, "epochs between evaluations; the best counts", lower_bound=1)
    flags.DEFINE_float("learning_rate", 0.01, "at the start of fine-tuning")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main)
