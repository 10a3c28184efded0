"""SegFormer (arXiv 2105.15203) as KerasHub has it: every stage is made of custom layers on tokens."""

import keras

from networks.blocks import LAYERS, conv


@keras.saving.register_keras_serializable("networks")
class PatchEmbedding(LAYERS.Layer):
    """Overlapping patches: a map to tokens [B, N, channels]."""

    def __init__(self, channels: int, patch: int, stride: int, **kwargs):
        super().__init__(**kwargs)
        self.channels, self.patch, self.stride = channels, patch, stride
        self.projection = LAYERS.Conv2D(channels, patch, stride, "same")
        self.norm = LAYERS.LayerNormalization()

    def build(self, shape):
        self.projection.build(shape)
        self.norm.build((None, None, self.channels))
        super().build(shape)

    def call(self, x):
        x = self.projection(x)
        return self.norm(keras.ops.reshape(x, (-1, x.shape[1] * x.shape[2], self.channels)))

    def get_config(self):
        return super().get_config() | {"channels": self.channels, "patch": self.patch, "stride": self.stride}


@keras.saving.register_keras_serializable("networks")
class Encoder(LAYERS.Layer):
    """Attention to tokens of a reduced map, and a feed-forward part with a depthwise convolution."""

    def __init__(self, channels: int, heads: int, reduction: int, height: int, width: int, **kwargs):
        super().__init__(**kwargs)
        self.values = {"channels": channels, "heads": heads, "reduction": reduction, "height": height, "width": width}
        self.norm1, self.norm2, self.norm3 = (LAYERS.LayerNormalization() for _ in range(3))
        self.query, self.key_value, self.out = LAYERS.Dense(channels), LAYERS.Dense(2 * channels), LAYERS.Dense(channels)
        self.reduce = LAYERS.Conv2D(channels, reduction, reduction, "same")
        self.expand, self.shrink = LAYERS.Dense(2 * channels), LAYERS.Dense(channels)
        self.depthwise = LAYERS.DepthwiseConv2D(3, padding="same")

    def build(self, shape):
        channels = self.values["channels"]
        tokens, wide, place = (None, None, channels), (None, None, 2 * channels), (None, None, None, channels)
        for layer in (self.norm1, self.norm2, self.norm3, self.query, self.key_value, self.out, self.expand):
            layer.build(tokens)
        self.reduce.build(place)
        self.depthwise.build((*place[:3], 2 * channels))
        self.shrink.build(wide)
        super().build(shape)

    def call(self, x):
        channels, heads, _, height, width = self.values.values()
        y = self.norm1(x)
        reduced = self.reduce(keras.ops.reshape(y, (-1, height, width, channels)))
        reduced = self.norm2(keras.ops.reshape(reduced, (-1, reduced.shape[1] * reduced.shape[2], channels)))
        key, value = keras.ops.split(self.key_value(reduced), 2, -1)
        q, k, v = (
            keras.ops.transpose(keras.ops.reshape(t, (-1, t.shape[1], heads, channels // heads)), (0, 2, 1, 3))
            for t in (self.query(y), key, value)
        )
        weights = keras.ops.softmax(keras.ops.matmul(q, keras.ops.transpose(k, (0, 1, 3, 2))) * (channels // heads) ** -0.5)
        attended = keras.ops.transpose(keras.ops.matmul(weights, v), (0, 2, 1, 3))
        x = x + self.out(keras.ops.reshape(attended, (-1, height * width, channels)))
        y = keras.ops.reshape(self.expand(self.norm3(x)), (-1, height, width, 2 * channels))
        y = keras.ops.gelu(keras.ops.reshape(self.depthwise(y), (-1, height * width, 2 * channels)), approximate=True)
        return x + self.shrink(y)

    def compute_output_shape(self, shape):
        return shape

    def get_config(self):
        return super().get_config() | self.values


def segformer_hub(size: tuple[int, int], classes: int) -> keras.Model:
    """Mix Transformer as a nested backbone, linear layers on its four maps, joined at stride 4."""
    image = keras.Input((*size, 3), name="inputs")
    x, maps = LAYERS.Rescaling(1 / 255)(image), {}
    for index, (channels, patch, stride, reduction) in enumerate(((8, 7, 4, 8), (16, 3, 2, 4), (24, 3, 2, 2), (32, 3, 2, 1))):
        height, width = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
        x = PatchEmbedding(channels, patch, stride)(x)
        for _ in range(2):
            x = Encoder(channels, channels // 8, reduction, height, width)(x)
        x = LAYERS.Reshape((height, width, channels), name=f"output_level_{index}")(LAYERS.LayerNormalization()(x))
        maps[f"P{index + 1}"] = x
    backbone = keras.Model(image, maps, name="mit_backbone")
    image = keras.Input((*size, 3), name="inputs")
    features = backbone(image)
    linear = [LAYERS.Dense(16, name=f"linear_{name}")(each) for name, each in features.items()]
    joined = LAYERS.Concatenate()([LAYERS.Resizing(*linear[0].shape[1:3])(each) for each in linear])
    x = LAYERS.Conv2D(classes, 1)(conv(joined, 16, 1))
    return keras.Model(image, LAYERS.Resizing(*size)(x), name="segformer")
