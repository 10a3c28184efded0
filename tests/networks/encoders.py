"""Networks with one trunk, a decoder or a head behind it."""

import keras

from networks.blocks import LAYERS, Tensor, basic, conv, resized


def unet_xception(size: tuple[int, int], classes: int) -> keras.Model:
    """keras.io, "Image segmentation with a U-Net-like architecture": separable convolutions, residuals, no skips; softmax."""
    image = keras.Input((*size, 3))
    x = LAYERS.Rescaling(1 / 255)(image)
    x = previous = conv(x, 8, strides=2)
    for channels in (12, 16, 24):
        for _ in range(2):
            x = LAYERS.BatchNormalization()(LAYERS.SeparableConv2D(channels, 3, padding="same")(LAYERS.Activation("relu")(x)))
        x = LAYERS.MaxPooling2D(3, strides=2, padding="same")(x)
        x = previous = LAYERS.add([x, LAYERS.Conv2D(channels, 1, strides=2, padding="same")(previous)])
    for channels in (24, 16, 12, 8):
        for _ in range(2):
            x = LAYERS.BatchNormalization()(LAYERS.Conv2DTranspose(channels, 3, padding="same")(LAYERS.Activation("relu")(x)))
        x = LAYERS.UpSampling2D(2)(x)
        x = previous = LAYERS.add([x, LAYERS.Conv2D(channels, 1, padding="same")(LAYERS.UpSampling2D(2)(previous))])
    return keras.Model(image, LAYERS.Conv2D(classes, 3, activation="softmax", padding="same")(x))


def unet_plus_plus(size: tuple[int, int], classes: int) -> keras.Model:
    """UNet++ (arXiv 1807.10165) as in keras-unet-collection: an output for each depth of the decoder, all in a list."""
    image = keras.Input((*size, 3))
    widths = (6, 8, 12, 16)
    grid: dict[tuple[int, int], Tensor] = {}
    for depth, width in enumerate(widths):
        x = LAYERS.MaxPooling2D()(grid[depth - 1, 0]) if depth else LAYERS.Rescaling(1 / 255)(image)
        grid[depth, 0] = conv(conv(x, width), width)
        for column in range(1, depth + 1):
            row = depth - column
            up = LAYERS.Conv2DTranspose(widths[row], 2, 2)(grid[row + 1, column - 1])
            grid[row, column] = conv(LAYERS.Concatenate()([*(grid[row, i] for i in range(column)), up]), widths[row])
    outputs = []
    for column in range(1, len(widths)):
        name = "output_final" if column == len(widths) - 1 else f"output_sup{column}"
        outputs.append(LAYERS.Softmax(name=name)(LAYERS.Conv2D(classes, 1)(grid[0, column])))
    return keras.Model([image], outputs)


def _rsu(x: Tensor, channels: int, middle: int, depth: int) -> Tensor:
    """Residual U-block."""
    x = conv(x, channels)
    skips = [conv(x, middle)]
    for _ in range(depth - 2):
        skips.append(conv(LAYERS.MaxPooling2D(padding="same")(skips[-1]), middle))
    y = conv(skips[-1], middle, dilation_rate=2)
    for index, skip in enumerate(reversed(skips)):
        y = conv(LAYERS.Concatenate()([resized(y, skip), skip]), channels if index == len(skips) - 1 else middle)
    return LAYERS.Add()([x, y])


def u2net(size: tuple[int, int], classes: int) -> keras.Model:
    """U²-Net (arXiv 2005.09007): U-blocks in a U, sigmoids at every depth and a fused one; two classes."""
    del classes
    image = keras.Input((*size, 3))
    x, skips = LAYERS.Rescaling(1 / 255)(image), []
    for channels, depth in ((8, 5), (12, 4), (16, 3)):
        x = _rsu(x, channels, 4, depth)
        skips.append(x)
        x = LAYERS.MaxPooling2D(padding="same")(x)
    x = _rsu(x, 16, 6, 2)
    decoded = [x]
    for skip in reversed(skips):
        x = _rsu(LAYERS.Concatenate()([resized(x, skip), skip]), skip.shape[-1], 4, 3)
        decoded.append(x)
    sides = [resized(LAYERS.Conv2D(1, 3, padding="same")(each), image) for each in decoded]
    fused = LAYERS.Conv2D(1, 1)(LAYERS.Concatenate()(sides))
    return keras.Model(image, [LAYERS.Activation("sigmoid", name="fused")(fused), *(LAYERS.Activation("sigmoid")(side) for side in sides)])


def segnet(size: tuple[int, int], classes: int) -> keras.Model:
    """SegNet as in keras_segmentation: explicit padding, pixels in a row, softmax over them."""
    image = keras.Input((*size, 3))
    x = LAYERS.Rescaling(1 / 255)(image)
    for channels in (8, 12, 16, 16):
        x = LAYERS.ZeroPadding2D(1)(x)
        x = LAYERS.Activation("relu")(LAYERS.BatchNormalization()(LAYERS.Conv2D(channels, 3)(x)))
        x = LAYERS.MaxPooling2D()(x)
    for channels in (16, 12, 8):
        x = LAYERS.ZeroPadding2D(1)(LAYERS.UpSampling2D()(x))
        x = LAYERS.BatchNormalization()(LAYERS.Conv2D(channels, 3)(x))
    x = LAYERS.Conv2D(classes, 3, padding="same", name="scores")(x)
    x = LAYERS.Reshape((size[0] // 2 * (size[1] // 2), -1))(x)
    return keras.Model(image, LAYERS.Activation("softmax")(x))


def fcn8(size: tuple[int, int], classes: int) -> keras.Model:
    """FCN-8s (keras.io): scores of three depths added, under mixed precision."""
    with _mixed_precision():
        image = keras.Input((*size, 3))
        x, pools = LAYERS.Rescaling(1 / 255)(image), []
        for channels in (8, 8, 12, 16, 16):
            x = LAYERS.Conv2D(channels, 3, padding="same", activation="relu")(x)
            x = LAYERS.MaxPooling2D(padding="same")(x)
            pools.append(x)
        x = LAYERS.Dropout(0.5)(LAYERS.Conv2D(32, 3, padding="same", activation="relu")(x))
        x = LAYERS.Conv2D(classes, 1)(x)
        for pool in (pools[3], pools[2]):
            x = LAYERS.Add()([LAYERS.UpSampling2D(2, interpolation="bilinear")(x), LAYERS.Conv2D(classes, 1)(pool)])
        return keras.Model(image, LAYERS.UpSampling2D(8, interpolation="bilinear", dtype="float32")(x))


class _mixed_precision:  # noqa: N801
    def __enter__(self):
        self.policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy("mixed_bfloat16")

    def __exit__(self, *_):
        keras.config.set_dtype_policy(self.policy)


def _resnet(size: tuple[int, int], widths: tuple[int, ...]) -> tuple[keras.Model, list[str]]:
    image = keras.Input((*size, 3), name="image")
    x = LAYERS.MaxPooling2D(3, 2, "same")(conv(LAYERS.Rescaling(1 / 255)(image), widths[0], 7, 2))
    names = []
    for index, width in enumerate(widths):
        x = basic(basic(x, width, 2 if index else 1), width)
        names.append(x._keras_history.operation.name)
    return keras.Model(image, x, name="backbone"), names


def deeplab_v3_plus(size: tuple[int, int], classes: int) -> keras.Model:
    """keras.io, "Multiclass semantic segmentation using DeepLabV3+": dilated pyramid, upsampling by factors that fit one size."""
    image = keras.Input((*size, 3))
    backbone, names = _resnet(size, (8, 12, 16))
    backbone = keras.Model(backbone.input, [backbone.get_layer(names[2]).output, backbone.get_layer(names[0]).output])
    x, low = backbone(image)
    height, width = x.shape[1:3]
    pooled = conv(LAYERS.AveragePooling2D((height, width))(x), 12, 1)
    pooled = LAYERS.UpSampling2D((height // pooled.shape[1], width // pooled.shape[2]), interpolation="bilinear")(pooled)
    x = conv(LAYERS.Concatenate()([pooled, *(conv(x, 12, 1 if rate == 1 else 3, dilation_rate=rate) for rate in (1, 2, 4))]), 12, 1)
    x = LAYERS.UpSampling2D((size[0] // 4 // x.shape[1], size[1] // 4 // x.shape[2]), interpolation="bilinear")(x)
    x = conv(conv(LAYERS.Concatenate()([x, conv(low, 6, 1)]), 12), 12)
    x = LAYERS.UpSampling2D((size[0] // x.shape[1], size[1] // x.shape[2]), interpolation="bilinear")(x)
    return keras.Model(image, LAYERS.Conv2D(classes, 1, padding="same")(x))


@keras.saving.register_keras_serializable("networks")
class SpatialPyramidPooling(LAYERS.Layer):
    """Parallel dilated convolutions and global context in one layer."""

    def __init__(self, channels: int, rates: tuple[int, ...], **kwargs):
        super().__init__(**kwargs)
        self.channels, self.rates = channels, tuple(rates)

    def build(self, shape):
        def block(kernel: int, rate: int = 1) -> keras.Sequential:
            layers = [LAYERS.Conv2D(self.channels, kernel, padding="same", dilation_rate=rate, use_bias=False)]
            return keras.Sequential([*layers, LAYERS.BatchNormalization(), LAYERS.ReLU()])

        self.branches = [block(1), *(block(3, rate) for rate in self.rates)]
        self.context, self.projection = block(1), block(1)
        for branch in self.branches:
            branch.build(shape)
        self.context.build((None, 1, 1, shape[-1]))
        self.projection.build((*shape[:-1], self.channels * (len(self.rates) + 2)))
        super().build(shape)

    def call(self, x, training=False):
        context = self.context(keras.ops.mean(x, (1, 2), keepdims=True), training=training)
        results = [branch(x, training=training) for branch in self.branches]
        results.append(keras.ops.image.resize(context, x.shape[1:3]))
        return self.projection(keras.ops.concatenate(results, -1), training=training)

    def compute_output_shape(self, shape):
        return (*shape[:-1], self.channels)

    def get_config(self):
        return super().get_config() | {"channels": self.channels, "rates": self.rates}


def deeplab_v3_hub(size: tuple[int, int], classes: int) -> keras.Model:
    """DeepLabV3+ as KerasHub's segmenter is made: a nested backbone with its maps in a dict, a pyramid that is one layer, a nested head."""
    backbone, names = _resnet(size, (8, 12, 16, 24))
    maps = {f"P{index}": backbone.get_layer(name).output for index, name in enumerate(names, 2)}
    image = keras.Input((*size, 3), name="inputs")
    features = keras.Model(backbone.input, maps, name="pyramid")(image)
    x = SpatialPyramidPooling(12, (2, 4), name="spp")(features["P5"])
    x = LAYERS.UpSampling2D(8, interpolation="bilinear", name="upsample_backbone")(x)
    x = LAYERS.Concatenate()([x, conv(features["P2"], 6, 1)])
    head = keras.Sequential([LAYERS.Conv2D(12, 1, use_bias=False), LAYERS.BatchNormalization(), LAYERS.ReLU()], name="segmentation_head")
    x = LAYERS.UpSampling2D(4, interpolation="bilinear")(head(x))
    return keras.Model(image, LAYERS.Conv2D(classes, 1, activation="softmax", name="segmentation_output")(x))


def lraspp_mobilenet_v3(size: tuple[int, int], classes: int) -> keras.Model:
    """MobileNetV3-small of keras.applications with the LR-ASPP head (arXiv 1905.02244): a gate of pooled features, two scales."""
    backbone = keras.applications.MobileNetV3Small((*size, 3), alpha=0.35, minimalistic=False, include_top=False, weights=None)
    maps = [layer for layer in backbone.layers if layer.name.endswith("project_bn") or layer.name.endswith("_add")]
    low = [layer for layer in maps if layer.output.shape[1] == size[0] // 8][-1].output
    backbone = keras.Model(backbone.input, [low, backbone.output], name="mobilenet")
    image = keras.Input((*size, 3))
    low, x = backbone(image)
    gate = LAYERS.Conv2D(16, 1, activation="sigmoid")(LAYERS.GlobalAveragePooling2D(keepdims=True)(x))
    x = LAYERS.Multiply()([conv(x, 16, 1), gate])
    x = LAYERS.Resizing(*low.shape[1:3])(x)
    x = LAYERS.Add()([LAYERS.Conv2D(classes, 1)(x), LAYERS.Conv2D(classes, 1)(low)])
    return keras.Model(image, LAYERS.Resizing(*size)(x))
