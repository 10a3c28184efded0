"""Segmentation networks as people bring them, as .keras files: ImageNet backbones of `mess_tf` with the heads of the literature.

    python benchmarks/originals.py --weights=mobilenet_v2_imagenet.weights.h5 --output=deeplabv3.keras [--classes=7] [--output_stride=16]

MobileNetV2 with the head of Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, arXiv 1706.05587: a 1x1 and three
dilated 3x3 convolutions of 256 channels and pooled context side by side, 256 channels again, and logits at the map's size. The rates are
those of the paper for 513 pixels, 6, 12 and 18 at stride 16, in proportion to the input: 3, 6 and 9 for 256.
"""

import keras
from absl import app, flags

from mess_tf.configs import BackboneConfig
from mess_tf.network.backbones import build_backbone
from mess_tf.network.layers import BatchNormalization

WIDTH = 256
RATES = (3, 6, 9)
MOMENTUM = 0.95


def deeplabv3(weights: str, classes: int, output_stride: int = 16) -> keras.Model:
    """MobileNetV2 with a DeepLabV3 head.

    Args:
      weights: see `BackboneConfig`.
      classes: C.
      output_stride: of the map that the head reads.

    Returns:
      Functional model, float32 [B, H, W, 3] of 0 to 255 to logits float32 [B, H / output_stride, W / output_stride, C].
    """
    layers = keras.layers
    backbone = build_backbone(BackboneConfig(weights=weights, output_stride=output_stride, batch_norm_momentum=MOMENTUM))

    def convolved(x: keras.KerasTensor, name: str, rate: int = 0) -> keras.KerasTensor:
        kernel = 3 if rate else 1
        x = layers.Conv2D(WIDTH, kernel, padding="same", dilation_rate=rate or 1, use_bias=False, name=name)(x)
        return layers.ReLU(name=f"{name}_relu")(BatchNormalization(momentum=MOMENTUM, name=f"{name}_bn")(x))

    x = backbone.output
    branches = [convolved(x, "aspp_0")]
    branches += [convolved(x, f"aspp_{number}", rate * 16 // output_stride) for number, rate in enumerate(RATES, 1)]
    y = layers.Conv2D(WIDTH, 1, use_bias=False, name="project")(layers.Concatenate(name="aspp")(branches))
    # Pooled context joins behind the projection, which equals joining before it. It has a bias in place of statistics of few values.
    context = layers.Conv2D(WIDTH, 1, activation="relu", name="context")(layers.GlobalAveragePooling2D(keepdims=True, name="pool")(x))
    context = layers.Conv2D(WIDTH, 1, use_bias=False, name="project_context")(context)
    y = BatchNormalization(momentum=MOMENTUM, name="project_bn")(layers.Add(name="with_context")([y, context]))
    y = layers.ReLU(name="project_relu")(y)
    return keras.Model(backbone.input, layers.Conv2D(classes, 1, name="logits")(y), name="deeplabv3_mobilenet_v2")


def main(argv):
    del argv
    deeplabv3(flags.FLAGS.weights, flags.FLAGS.classes, flags.FLAGS.output_stride).save(flags.FLAGS.output)
    print(flags.FLAGS.output)


if __name__ == "__main__":
    flags.DEFINE_string("weights", None, "See `backbone.weights`.", required=True)
    flags.DEFINE_string("output", None, "The .keras file to write.", required=True)
    flags.DEFINE_integer("classes", 7, "Classes.", lower_bound=2)
    flags.DEFINE_integer("output_stride", 16, "Of the map that the head reads.", lower_bound=8)
    app.run(main)
