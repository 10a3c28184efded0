"""Accuracy of every exit and head of a training.

`python -m mess_tf.evaluate --workdir=W [--split=val]` prints the table and writes WORKDIR/evaluation_SPLIT.json.
"""

from absl import flags

from mess_tf import arguments, terminal

if __name__ == "__main__":
    arguments.define_network_flags()
    flags.DEFINE_string("workdir", None, "folder of a training", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_string("split", "", "split to evaluate on; default: the validation split")
    terminal.run("mess_tf.evaluate", __doc__, arguments.check_workdir)

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mess_runtime.bundle import check_writable, write_json
from mess_tf import configs
from mess_tf.data.sources import open_split
from mess_tf.network.evaluation import Accuracy, accuracies, confusion_matrices, keras_predictor
from mess_tf.network.model import load_network
from mess_tf.network.originals import check_flags

FLAGS = flags.FLAGS


def table(result: dict[str, Accuracy], classes: Sequence[str]) -> str:
    """A table in percent: one row per candidate, mIoU, pixel accuracy and the IoU of each class."""
    width = max(map(len, result))
    rows = [f"{'':{width}}  {'mIoU':>6} {'pixels':>6} " + " ".join(f"{name[:7]:>7}" for name in classes)]
    for name, accuracy in result.items():
        iou = " ".join(f"{100 * value:7.1f}" for value in accuracy.class_iou)
        rows.append(f"{name:{width}}  {100 * accuracy.miou:6.2f} {100 * accuracy.pixel_accuracy:6.2f} {iou}")
    return "\n".join(rows)


def run(workdir: str, data_dir: str = "", split: str = "") -> Path:
    """The command: evaluates a training on a split (default: the validation split), prints the table and returns the file's path."""
    config = configs.with_data_dir(configs.load_config(workdir), data_dir)
    check_writable("workdir", workdir, folder=True)
    split = split or config.data.val_split
    examples = open_split(config.data, split)
    network = load_network(workdir, config, examples.info.num_classes)
    predict = keras_predictor(network, network.candidates, config.data.input_size, resize=config.data.resize)
    result = accuracies(confusion_matrices(predict, examples))
    print(table(result, examples.info.classes))
    path = Path(workdir, f"evaluation_{split}.json")
    write_json(path, {name: dataclasses.asdict(accuracy) for name, accuracy in result.items()})
    return path


def main() -> None:
    check_flags(configs.load_config(FLAGS.workdir))
    print(run(FLAGS.workdir, FLAGS.data_dir, FLAGS.split))
