"""Blocks that several of the networks share."""

import keras

LAYERS = keras.layers
Tensor = keras.KerasTensor


def conv(x: Tensor, channels: int, kernel: int = 3, strides: int = 1, activation: str | None = "relu", **options) -> Tensor:
    """Convolution, batch normalisation, activation."""
    x = LAYERS.BatchNormalization()(LAYERS.Conv2D(channels, kernel, strides, "same", use_bias=False, **options)(x))
    return LAYERS.Activation(activation)(x) if activation else x


def depthwise(x: Tensor, strides: int = 1, activation: str | None = "relu", multiplier: int = 1, kernel: int = 3) -> Tensor:
    x = LAYERS.DepthwiseConv2D(kernel, strides, "same", depth_multiplier=multiplier, use_bias=False)(x)
    x = LAYERS.BatchNormalization()(x)
    return LAYERS.Activation(activation)(x) if activation else x


def basic(x: Tensor, channels: int, strides: int = 1) -> Tensor:
    """The residual block of ResNet-18."""
    y = conv(conv(x, channels, strides=strides), channels, activation=None)
    if strides > 1 or x.shape[-1] != channels:
        x = conv(x, channels, 1, strides, None)
    return LAYERS.ReLU()(LAYERS.Add()([x, y]))


def inverted(x: Tensor, channels: int, strides: int = 1, expansion: int = 2) -> Tensor:
    """The inverted residual block of MobileNetV2."""
    y = conv(depthwise(conv(x, expansion * x.shape[-1], 1), strides), channels, 1, activation=None)
    return LAYERS.Add()([x, y]) if strides == 1 and x.shape[-1] == channels else y


def resized(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear to the size of another map, as a constant."""
    return keras.ops.image.resize(x, like.shape[1:3])


def pyramid(x: Tensor, bins: tuple[int, ...], channels: int) -> Tensor:
    """Pyramid pooling (PSPNet)."""
    height, width = x.shape[1:3]
    branches = [x]
    for count in bins:
        window = (max(1, height // count), max(1, width // count))
        y = conv(LAYERS.AveragePooling2D(window, window, "same")(x), channels, 1)
        branches.append(LAYERS.Resizing(height, width)(y))
    return LAYERS.Concatenate()(branches)
