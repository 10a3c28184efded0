"""Networks of several branches, which real-time segmentation on phones and boards uses."""

import keras

from networks.blocks import LAYERS, Tensor, basic, conv, depthwise, inverted, pyramid, resized


def fast_scnn(size: tuple[int, int], classes: int) -> keras.Model:
    """Fast-SCNN (arXiv 1902.04502): learning to downsample, then a deep path with pyramid pooling, and a shallow one."""
    image = keras.Input((*size, 3))
    x = conv(LAYERS.Rescaling(1 / 255)(image), 8, strides=2)
    for channels in (12, 16):
        x = conv(depthwise(x, 2, None), channels, 1)
    shallow = x
    for channels, strides in ((16, 2), (24, 2), (32, 1), (32, 1)):
        x = inverted(x, channels, strides)
    x = conv(pyramid(x, (1, 2, 3), 8), 32, 1)
    deep = conv(depthwise(LAYERS.UpSampling2D(4, interpolation="bilinear")(x)), 32, 1, activation=None)
    x = LAYERS.ReLU()(LAYERS.Add()([conv(shallow, 32, 1, activation=None), deep]))
    for _ in range(2):
        x = conv(depthwise(x), 32, 1)
    x = LAYERS.Dropout(0.1)(LAYERS.Conv2D(classes, 1)(x))
    return keras.Model(image, LAYERS.Softmax()(LAYERS.UpSampling2D(8, interpolation="bilinear")(x)))


def _gather_expand(x: Tensor, channels: int, strides: int) -> Tensor:
    y = conv(x, x.shape[-1])
    if strides == 2:
        y = depthwise(depthwise(y, 2, None, 2), 1, None)
        return LAYERS.ReLU()(
            LAYERS.Add()([conv(y, channels, 1, activation=None), conv(depthwise(x, 2, None), channels, 1, activation=None)])
        )
    y = conv(depthwise(y, 1, None, 2), channels, 1, activation=None)
    return LAYERS.ReLU()(LAYERS.Add()([x, y]))


def bisenet_v2(size: tuple[int, int], classes: int) -> keras.Model:
    """BiSeNetV2 (arXiv 2004.02147): a detail and a semantic branch from the image on, joined by bilateral guidance; auxiliary outputs."""
    image = keras.Input((*size, 3))
    detail = LAYERS.Rescaling(1 / 255)(image)
    for channels in (8, 12, 16):
        detail = conv(conv(detail, channels, strides=2), channels)
    x = conv(LAYERS.Rescaling(1 / 255)(image), 8, strides=2)
    x = LAYERS.Concatenate()([conv(conv(x, 4, 1), 8, strides=2), LAYERS.MaxPooling2D(3, 2, "same")(x)])
    x = auxiliary = conv(x, 8)
    for channels in (12, 16, 24):
        x = _gather_expand(_gather_expand(x, channels, 2), channels, 1)
    context = conv(LAYERS.BatchNormalization()(LAYERS.GlobalAveragePooling2D(keepdims=True)(x)), 24, 1)
    x = conv(LAYERS.Add()([context, x]), 16)
    kept = LAYERS.Conv2D(16, 1)(depthwise(detail, 1, None))
    lowered = LAYERS.AveragePooling2D(3, 2, "same")(conv(detail, 16, strides=2, activation=None))
    raised = LAYERS.UpSampling2D(4, interpolation="bilinear")(conv(x, 16, activation=None))
    gate = LAYERS.Activation("sigmoid")(LAYERS.Conv2D(16, 1)(depthwise(x, 1, None)))
    joined = LAYERS.Multiply()([kept, LAYERS.Activation("sigmoid")(raised)])
    low = LAYERS.UpSampling2D(4, interpolation="bilinear")(LAYERS.Multiply()([lowered, gate]))
    x = conv(LAYERS.Add()([joined, low]), 16, activation=None)
    outputs = [LAYERS.UpSampling2D(8, interpolation="bilinear", name="main")(LAYERS.Conv2D(classes, 1)(conv(x, 16)))]
    outputs.append(LAYERS.UpSampling2D(4, interpolation="bilinear", name="auxiliary")(LAYERS.Conv2D(classes, 1)(conv(auxiliary, 8))))
    return keras.Model(inputs=[image], outputs=outputs)


def _bottleneck(x: Tensor, channels: int, strides: int = 1) -> Tensor:
    y = conv(conv(conv(x, channels, 1), channels, strides=strides), 2 * channels, 1, activation=None)
    return LAYERS.Add()([y, conv(x, 2 * channels, 1, strides, None)])


def _context(x: Tensor, channels: int, serial: bool) -> Tensor:
    """Aggregation of maps pooled at four scales: one after another (DAPPM), or side by side (PAPPM)."""
    scales = [conv(x, channels, 1)]
    for window, strides in ((5, 2), (9, 4), (17, 8), (0, 0)):
        y = LAYERS.AveragePooling2D(window, strides, "same")(x) if window else LAYERS.GlobalAveragePooling2D(keepdims=True)(x)
        y = LAYERS.Add()([resized(conv(y, channels, 1), x), scales[-1] if serial else scales[0]])
        scales.append(conv(y, channels) if serial else y)
    if not serial:
        scales = [scales[0], conv(LAYERS.Concatenate()(scales[1:]), 4 * channels, groups=4)]
    return LAYERS.Add()([conv(LAYERS.Concatenate()(scales), 16, 1), conv(x, 16, 1)])


def ddrnet_23_slim(size: tuple[int, int], classes: int) -> keras.Model:
    """DDRNet-23-slim (arXiv 2101.06085): two branches that are fused both ways twice, the deep one at stride 64 in the end."""
    image = keras.Input((*size, 3))
    x = conv(conv(LAYERS.Rescaling(1 / 255)(image), 6, strides=2), 6, strides=2)
    x = basic(basic(x, 6), 6)
    x = basic(basic(x, 8, 2), 8)
    low, high = basic(basic(x, 12, 2), 12), basic(basic(x, 8), 8)
    low, high = LAYERS.Add()([low, conv(high, 12, 3, 2, None)]), LAYERS.Add()([high, resized(conv(low, 8, 1, activation=None), high)])
    low, high = LAYERS.ReLU()(low), LAYERS.ReLU()(high)
    low, high = basic(basic(low, 16, 2), 16), basic(basic(high, 8), 8)
    lowered = conv(conv(high, 12, strides=2), 16, 3, 2, None)
    low, high = LAYERS.Add()([low, lowered]), LAYERS.Add()([high, resized(conv(low, 8, 1, activation=None), high)])
    high = _bottleneck(LAYERS.ReLU()(high), 8)
    x = _context(_bottleneck(LAYERS.ReLU()(low), 12, 2), 6, serial=True)
    x = conv(LAYERS.Add()([resized(x, high), high]), 12)
    return keras.Model(image, resized(LAYERS.Conv2D(classes, 1)(x), image))


def _attend(detail: Tensor, meaning: Tensor) -> Tensor:
    """Pixel-attention-guided fusion (Pag)."""
    meaning = resized(conv(meaning, detail.shape[-1], 1, activation=None), detail)
    alike = LAYERS.Multiply()([conv(detail, 4, 1, activation=None), conv(meaning, 4, 1, activation=None)])
    weight = keras.ops.sigmoid(keras.ops.sum(alike, -1, keepdims=True))
    return (1 - weight) * detail + weight * meaning


def pidnet(size: tuple[int, int], classes: int) -> keras.Model:
    """PIDNet (arXiv 2206.02066): branches for details, meaning and boundaries; the boundaries decide which of the others counts."""
    image = keras.Input((*size, 3))
    x = conv(conv(LAYERS.Rescaling(1 / 255)(image), 6, strides=2), 6, strides=2)
    x = basic(basic(basic(x, 6), 6), 8, 2)
    meaning, detail, boundary = basic(x, 12, 2), basic(x, 8), basic(x, 4)
    detail = _attend(detail, meaning)
    boundary = boundary + resized(conv(meaning, 4, activation=None), boundary)
    meaning, detail, boundary = basic(meaning, 16, 2), basic(detail, 8), basic(boundary, 4)
    detail = _attend(detail, meaning)
    boundary = boundary + resized(conv(meaning, 4, activation=None), boundary)
    meaning, detail, boundary = _bottleneck(meaning, 12, 2), _bottleneck(detail, 8), _bottleneck(boundary, 8)
    meaning = resized(_context(meaning, 6, serial=False), detail)
    edge = keras.ops.sigmoid(boundary)
    x = conv(edge * detail + (1 - edge) * meaning, 16)
    scores = [(x, "main", classes), (detail, "extra", classes), (boundary, "boundary", 1)]
    return keras.Model(image, {name: LAYERS.Conv2D(count, 1)(conv(each, 8)) for each, name, count in scores})
