"""A network as people bring it, as a .keras file: the backbone of a trained work folder under a DeepLabV3 head.

    python benchmarks/originals.py --workdir=models/voc_lite0 --classes=7 --output=deeplabv3.keras

The head is that of Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, arXiv 1706.05587: a 1x1 and three dilated
3x3 convolutions of 256 channels and pooled context side by side, 256 channels again, and logits at the map's size. The rates are those of
the paper for 513 pixels, 6, 12 and 18 at stride 16, in proportion to the input: 3, 6 and 9 for 256. It starts from random weights:
`mess_tf.train --set backbone.name=keras_file` goes on from the file.
"""

import keras
from absl import app, flags

from mess_tf import configs
from mess_tf.network.costs import graph_nodes
from mess_tf.network.layers import BatchNormalization
from mess_tf.network.model import load_network

WIDTH = 256
RATES = (3, 6, 9)
MOMENTUM = 0.95


def deeplabv3(trunk: keras.Model, end: str, classes: int) -> keras.Model:
    """A network with another head.

    Args:
      trunk: functional model, float32 [B, H, W, 3] of 0 to 255 to anything.
      end: name of its layer that makes the features [B, h, w, channels] that the head reads.
      classes: C.

    Returns:
      Functional model of the same input to logits float32 [B, h, w, C], with the trunk's layers up to `end`.
    """
    layers = keras.layers

    def convolved(x: keras.KerasTensor, name: str, rate: int = 0) -> keras.KerasTensor:
        kernel = 3 if rate else 1
        x = layers.Conv2D(WIDTH, kernel, padding="same", dilation_rate=rate or 1, use_bias=False, name=name)(x)
        return layers.ReLU(name=f"{name}_relu")(BatchNormalization(momentum=MOMENTUM, name=f"{name}_bn")(x))

    x = next(node.output for node in graph_nodes(trunk) if node.name == end)
    branches = [convolved(x, "aspp_0"), *(convolved(x, f"aspp_{number}", rate) for number, rate in enumerate(RATES, 1))]
    y = layers.Conv2D(WIDTH, 1, use_bias=False, name="project")(layers.Concatenate(name="aspp")(branches))
    # Pooled context joins behind the projection, which equals joining before it. It has a bias in place of statistics of few values.
    context = layers.Conv2D(WIDTH, 1, activation="relu", name="context")(layers.GlobalAveragePooling2D(keepdims=True, name="pool")(x))
    context = layers.Conv2D(WIDTH, 1, use_bias=False, name="project_context")(context)
    y = BatchNormalization(momentum=MOMENTUM, name="project_bn")(layers.Add(name="with_context")([y, context]))
    y = layers.ReLU(name="project_relu")(y)
    return keras.Model(trunk.input, layers.Conv2D(classes, 1, name="logits")(y), name="deeplabv3")


def main(argv):
    del argv
    workdir, classes = flags.FLAGS.workdir, flags.FLAGS.classes
    trained = load_network(workdir, configs.load_config(workdir), classes).original
    deeplabv3(trained, flags.FLAGS.end, classes).save(flags.FLAGS.output)
    print(flags.FLAGS.output)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Trained work folder.", required=True)
    flags.DEFINE_string("output", None, "The .keras file to write.", required=True)
    flags.DEFINE_integer("classes", None, "Classes.", lower_bound=2, required=True)
    flags.DEFINE_string("end", "block7a_project_bn", "Layer whose features the head reads.")
    app.run(main)
