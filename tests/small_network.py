"""A segmentation network for tests of what comes after training: inverted residual blocks like MobileNetV2's, but few of them."""

from collections.abc import Sequence

import keras

from mess_tf.network.layers import BatchNormalization

BLOCKS = ((24, 2), (32, 2), (96, 2), (96, 1), (96, 1), (96, 1))  # channels, stride
FEW_BLOCKS = BLOCKS[:4]


def small_network(classes: int, blocks: Sequence[tuple[int, int]] = BLOCKS) -> keras.Model:
    """RGB float32 [B, H, W, 3] in 0..255 to logits at stride 16; with all blocks, two exits at equal workload read it at stride 16 too."""
    layers = keras.layers

    def normalised(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
        return BatchNormalization(momentum=0.9, name=f"{name}_bn")(x)

    image = keras.Input((None, None, 3), name="image")
    x = layers.Rescaling(1 / 127.5, -1.0)(image)
    x = layers.ReLU(6.0)(normalised(layers.Conv2D(16, 3, 2, "same", use_bias=False, name="stem")(x), "stem"))
    for number, (channels, stride) in enumerate(blocks):
        name = f"block_{number}"
        y = layers.Conv2D(2 * x.shape[-1], 1, use_bias=False, name=f"{name}_expand")(x)
        y = layers.ReLU(6.0)(normalised(y, f"{name}_expand"))
        y = layers.DepthwiseConv2D(3, stride, "same", use_bias=False, name=f"{name}_depthwise")(y)
        y = layers.ReLU(6.0)(normalised(y, f"{name}_depthwise"))
        y = normalised(layers.Conv2D(channels, 1, use_bias=False, name=f"{name}_project")(y), f"{name}_project")
        x = layers.Add(name=f"{name}_add")([x, y]) if y.shape[-1] == x.shape[-1] else y
    return keras.Model(image, layers.Conv2D(classes, 1, dtype="float32", name="logits")(x), name="small")
