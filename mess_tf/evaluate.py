"""Accuracy of every exit and head of a training.

`python -m mess_tf.evaluate --workdir=W [--split=val]` prints the table and writes WORKDIR/evaluation_SPLIT.json; with
`--ray`, shards of images are counted elsewhere, see `tasks`.
"""

from absl import flags

from mess_tf import arguments, tasks, terminal

if __name__ == "__main__":
    arguments.define_network_flags()
    flags.DEFINE_string("workdir", None, "folder of a training", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_string("split", "", "split to evaluate on; default: the validation split")
    tasks.define_flag()
    terminal.run("mess_tf.evaluate", __doc__, arguments.check_trained)

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mess_runtime.bundle import check, check_writable, write_json
from mess_tf import configs
from mess_tf.data.examples import Examples
from mess_tf.data.sources import open_split
from mess_tf.files import map_arrays, write_arrays
from mess_tf.network.evaluation import Accuracy, Predictor, accuracies, confusion_matrices, keras_predictor
from mess_tf.network.model import load_network
from mess_tf.network.originals import allow, allow_flags, allowed

FLAGS = flags.FLAGS
SHARD = 64  # images whose counts are written at once


def table(result: dict[str, Accuracy], classes: Sequence[str]) -> str:
    """A table in percent: one row per candidate, mIoU, pixel accuracy and the IoU of each class."""
    width = max(map(len, result))
    rows = [f"{'':{width}}  {'mIoU':>6} {'pixels':>6} " + " ".join(f"{name:>7}" for name in classes)]
    for name, accuracy in result.items():
        iou = " ".join(f"{100 * value:{max(7, len(name))}.1f}" for name, value in zip(classes, accuracy.class_iou, strict=True))
        rows.append(f"{name:{width}}  {100 * accuracy.miou:6.2f} {100 * accuracy.pixel_accuracy:6.2f} {iou}")
    return "\n".join(rows)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What counts the images of a split.

    Attributes:
      examples: the split.
      candidates: what predicts.
      predict: an image to a mask per candidate.
      about: what the masks depend on beside the images.
    """

    examples: Examples
    candidates: Sequence[str]
    predict: Predictor
    about: Sequence[Any]

    def key(self, images: range) -> str:
        """16 digits of the SHA-256 of all that the confusion matrices of some images depend on, in lower-case hexadecimal."""
        of_images = [(self.examples.names[i], self.examples.digest(i)) for i in images]
        return hashlib.sha256(json.dumps([self.about, of_images]).encode()).hexdigest()[:16]


def evaluation(workdir: str, data_dir: str, split: str, allowance: tuple[Sequence[str], bool]) -> Evaluation:
    """What counts the images of a work folder, also in another process; `allowance`: see `originals.allow`."""
    allow(*allowance)
    config = configs.with_data_dir(configs.load_config(workdir), data_dir)
    examples = open_split(config.data, split)
    network = load_network(workdir, config, examples.info.num_classes)
    size, resize = config.data.input_size, config.data.resize
    predict = keras_predictor(network, network.candidates, size, resize=resize)
    about = network.candidates, network.weights_sha256(), size, resize, examples.info.classes
    return Evaluation(examples, network.candidates, predict, about)


def count_shard(opened: tasks.Opened[Evaluation], images: range, key: str, path: Path) -> None:
    """A task: writes the confusion matrices of some images.

    Raises:
      ValueError: what is counted here does not have this key, see `Evaluation.key`.
    """
    each = opened.value
    check(each.key(images) == key, "workdir", "the same on all machines, and the data too", str(path.parent))
    found = confusion_matrices(each.predict, each.examples, images)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, matrices=np.stack([found[name] for name in each.candidates]))


def run(workdir: str, data_dir: str = "", split: str = "", ray: str = "", shard: int = SHARD) -> Path:
    """The command: evaluates a training on a split (default: the validation split), prints the table and returns the file's path.

    The split is counted in shards, each a task with a file in WORKDIR/evaluation_SPLIT, which all together are the result.

    Args:
      workdir, data_dir, split: as the flags.
      ray: see `tasks.run`.
      shard: images of a task.
    """
    split = split or configs.load_config(workdir).data.val_split
    check_writable("workdir", workdir, folder=True)
    of = workdir, data_dir, split, allowed()
    opened, folder, todo = tasks.Opened(evaluation(*of), evaluation, *of), Path(workdir, f"evaluation_{split}"), []
    examples = opened.value.examples
    for images in (range(len(examples))[start : start + shard] for start in range(0, len(examples), shard)):
        path = folder / f"{images.start}-{images.stop}.{(key := opened.value.key(images))}.npz"
        todo.append(tasks.Task(count_shard, (opened, images, key, path), path, path.exists()))
    matrices = sum(map_arrays(path)["matrices"] for path in tasks.run(todo, "evaluate", "shard", ray))
    result = accuracies(dict(zip(opened.value.candidates, matrices, strict=True)))
    print(table(result, examples.info.classes))
    path = Path(workdir, f"evaluation_{split}.json")
    write_json(path, {name: dataclasses.asdict(accuracy) | {"class_iou": _known(accuracy.class_iou)} for name, accuracy in result.items()})
    shutil.rmtree(folder)
    return path


def _known(values: Sequence[float]) -> list[float | None]:
    """For JSON, which has no NaN: None for a class that no label holds."""
    return [None if np.isnan(value) else float(value) for value in values]


def main() -> None:
    allow_flags()
    tasks.check_installed(FLAGS.ray)
    print(run(FLAGS.workdir, FLAGS.data_dir, FLAGS.split, FLAGS.ray))
