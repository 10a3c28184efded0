"""Soft targets of the training images from trained networks, for `stage1.teacher` and `stage2.teacher`.

`python -m mess_tf.teacher --workdirs=A,B --output=FILE.npz [--scales=1,1.25]` averages the final exits of some trainings on one data set
over image sizes and mirror images. Such a teacher knows more than any one of them, and a training that learns from it pays nothing for
it: it reads the file instead of running the networks.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

from mess_runtime.bundle import write_atomically
from mess_tf import configs
from mess_tf.backbones import read_arrays
from mess_tf.data import SOFT_STRIDE, Examples, open_split, resize_image
from mess_tf.model import load_network


@dataclasses.dataclass(frozen=True, eq=False)
class SoftTargets:
    """What a teacher says of the images of a training split.

    Attributes:
      names: of the images, in the order of the split.
      log_probability: float16 [N, h, w, C], of the whole image at 1 / SOFT_STRIDE of the input size.
    """

    names: tuple[str, ...]
    log_probability: np.ndarray

    @classmethod
    def load(cls, path: str, examples: Examples) -> "SoftTargets":
        """Reads a file of this module.

        Raises:
          FileNotFoundError, ValueError: if there is no such file, or it was made for other images or classes.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"teacher: there is no file {path!r}; `python -m mess_tf.teacher --output={path}` makes it")
        arrays = read_arrays(path)
        targets = cls(tuple(arrays["names"].tolist()), arrays["log_probability"])
        if targets.names != examples.names or targets.log_probability.shape[3] != examples.info.num_classes:
            raise ValueError(
                f"teacher: {path} must hold the {len(examples)} images and {examples.info.num_classes} classes of the training split, "
                f"got {len(targets.names)} images, the first is {targets.names[:1]}, and {targets.log_probability.shape[3]} classes"
            )
        return targets

    def save(self, path: str) -> None:
        """Writes the file atomically."""

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez(file, names=np.array(self.names), log_probability=self.log_probability)

        write_atomically(path, write)


def predictor(network: keras.Model, input_size: tuple[int, int], scale: float, mirrored: bool) -> Callable[[np.ndarray], tf.Tensor]:
    """Makes a function from an image uint8 [H, W, 3] to the probabilities float32 [h, w, C] at 1 / SOFT_STRIDE of the input size."""
    size = tuple(round(scale * side) for side in input_size)
    reduced = tuple(side // SOFT_STRIDE for side in input_size)

    @tf.function(autograph=False, reduce_retracing=True)
    def predict(image):
        image = resize_image(image, size)[None]
        logits = network(image[:, :, ::-1] if mirrored else image, training=False)
        probability = tf.nn.softmax(tf.image.resize(tf.cast(logits, tf.float32), reduced))[0]
        return probability[:, ::-1] if mirrored else probability

    return lambda image: predict(tf.convert_to_tensor(image))


def soft_targets(networks: Sequence[keras.Model], examples: Examples, input_size: tuple[int, int], scales: Sequence[float]) -> SoftTargets:
    """The mean probabilities over networks (image to logits), scales of the input size and mirror images."""
    views = [predictor(*view) for view in itertools.product(networks, [input_size], scales, (False, True))]
    result = []
    for index in range(len(examples)):
        image, _ = examples.load(index)
        mean = sum(view(image) for view in views) / len(views)
        result.append(np.log(np.maximum(mean, 1e-4)).astype(np.float16))
        if (index + 1) % 50 == 0:
            print(f"{index + 1} of {len(examples)} images", flush=True)
    return SoftTargets(examples.names, np.stack(result))


def main(argv: Sequence[str]) -> None:
    del argv
    each = [configs.with_data_dir(configs.load_config(workdir), FLAGS.data_dir) for workdir in FLAGS.workdirs]
    data = each[0].data
    examples = open_split(data, data.train_split)
    networks = [
        load_network(workdir, config, examples.info.num_classes).original for workdir, config in zip(FLAGS.workdirs, each, strict=True)
    ]
    soft_targets(networks, examples, data.input_size, [float(scale) for scale in FLAGS.scales]).save(FLAGS.output)
    print(FLAGS.output)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_list("workdirs", None, "folders of trainings; the first one's data and input size count", required=True)
    flags.DEFINE_string("output", None, "file to write, .npz", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_list("scales", ["1", "1.25"], "image sizes, as shares of the input size")
    app.run(main)
