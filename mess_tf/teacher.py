"""Soft targets of the training images from trained networks, for `stage1.teacher` and `stage2.teacher`.

`python -m mess_tf.teacher --workdirs=A,B --output=FILE.npz [--scales=1,1.25]` averages the final exits of some trainings on one data set
over image sizes and mirror images. Such a teacher knows more than any one of them, and a training that learns from it pays nothing for
it: it reads the file instead of running the networks.
"""

from absl import flags

from mess_tf import arguments, terminal

SCALES = (1.0, 1.25)

if __name__ == "__main__":
    arguments.define_network_flags()
    flags.DEFINE_list("workdirs", None, "folders of trainings; the first one's data and input size count", required=True)
    flags.DEFINE_string("output", None, "file to write, .npz", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_list("scales", [f"{scale:g}" for scale in SCALES], "image sizes, as shares of each network's own backbone.input_scale")
    terminal.run("mess_tf.teacher", __doc__, lambda: arguments.check_trained(*flags.FLAGS.workdirs))

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from mess_runtime.bundle import check, check_writable
from mess_runtime.images import placed
from mess_runtime.terminal import progress
from mess_tf import configs
from mess_tf.configs import DataConfig
from mess_tf.data.examples import Examples
from mess_tf.data.pipelines import SOFT_STRIDE, network_input
from mess_tf.data.sources import open_split
from mess_tf.files import MAX_ARRAYS_BYTES
from mess_tf.learning.soft_targets import SoftTargets
from mess_tf.network.model import load_network
from mess_tf.network.originals import allow_flags

FLAGS = flags.FLAGS


def predictor(network: keras.Model, input_size: tuple[int, int], resize: str, mirrored: bool) -> Callable[[np.ndarray], tf.Tensor]:
    """Makes a function from an image uint8 [H, W, 3] to the probabilities float32 [h, w, C] all over it, 1 / SOFT_STRIDE of the input."""
    reduced = tuple(side // SOFT_STRIDE for side in input_size)

    @tf.function(autograph=False, reduce_retracing=True)
    def logits_of(image):
        logits = tf.cast(network(image[:, :, ::-1] if mirrored else image, training=False), tf.float32)
        return logits[:, :, ::-1] if mirrored else logits

    def predict(image):
        logits = logits_of(network_input(image, input_size, resize))
        rows, columns = placed(image.shape[:2], input_size, resize)
        if (rows, columns) != (slice(0, input_size[0]), slice(0, input_size[1])):
            logits = tf.image.resize(logits, input_size)[:, rows, columns]
        return tf.nn.softmax(tf.image.resize(logits, reduced))[0]

    return predict


def soft_targets(networks: Sequence[keras.Model], examples: Examples, input_size: tuple[int, int], resize: str = "stretch") -> SoftTargets:
    """The mean probabilities over networks (image of the input size, fitted as `images.fit` does, to logits) and mirror images."""
    views = [predictor(network, input_size, resize, mirrored) for network in networks for mirrored in (False, True)]
    result = []
    for index in progress(range(len(examples)), "teacher", "image"):
        image, _ = examples.load(index)
        mean = sum(view(image) for view in views) / len(views)
        result.append(np.log(np.maximum(mean, 1e-4)).astype(np.float16))
    return SoftTargets(examples.names, np.stack(result))


def load_teachers(workdirs: Sequence[str], scales: Sequence[float], data: DataConfig, num_classes: int) -> list[keras.Model]:
    """The networks down to the final exit, image of `data.input_size` to logits, of each training at each share of its input scale."""
    networks = []
    for workdir, scale in itertools.product(workdirs, scales):
        config = dataclasses.replace(configs.load_config(workdir), data=data)
        config = configs.with_input_scale(config, scale * config.backbone.input_scale)
        networks.append(load_network(workdir, config, num_classes).original)
    return networks


def run(workdirs: Sequence[str], output: str, data_dir: str = "", scales: Sequence[float] = SCALES) -> Path:
    """The command: writes the soft targets of some trainings, on the data and at the input size of the first, and returns their path."""
    check(len(scales) > 0 and min(scales) > 0, "scales", "positive numbers", scales)
    check_writable("output", output)
    data = configs.with_data_dir(configs.load_config(workdirs[0]), data_dir).data
    examples = open_split(data, data.train_split)
    size = 2 * len(examples) * examples.info.num_classes * math.prod(side // SOFT_STRIDE for side in data.input_size)
    check(size <= MAX_ARRAYS_BYTES, "workdirs", f"of data whose soft targets take at most {MAX_ARRAYS_BYTES} bytes", size)
    networks = load_teachers(workdirs, scales, data, examples.info.num_classes)
    soft_targets(networks, examples, data.input_size, data.resize).save(output)
    return Path(output)


def main() -> None:
    allow_flags()
    print(run(FLAGS.workdirs, FLAGS.output, FLAGS.data_dir, terminal.numbers("scales")))
