"""Costs against networks counted by hand and a published figure."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mess_tf.network.costs import graph_nodes, model_cost, uncounted_layers, with_input_size

LAYERS = keras.layers


def test_a_network_counted_by_hand():
    image = keras.Input((None, None, 3), name="image")
    x = LAYERS.Conv2D(8, 3, strides=2, padding="same")(image)  # 4x4x8
    x = LAYERS.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    x = LAYERS.BatchNormalization()(x)
    x = LAYERS.SeparableConv2D(6, 3, padding="same", use_bias=False)(x)  # 4x4x6
    x = LAYERS.Conv2D(4, 1, groups=2, use_bias=False)(x)  # 4x4x4
    x = LAYERS.Conv2DTranspose(5, 2, strides=2, use_bias=False)(x)  # 8x8x5
    x = LAYERS.Add()([x, x])
    x = LAYERS.Dense(7)(x)  # 8x8x7
    cost = model_cost(keras.Model(image, x), (8, 8))
    assert cost.macs == 16 * 8 * 27 + 16 * 8 * 9 + 16 * (8 * 9 + 8 * 6) + 16 * 4 * 3 + 16 * 4 * 4 * 5 + 64 * 5 * 7
    assert cost.parameters == (8 * 27 + 8) + 8 * 9 + 4 * 8 + (8 * 9 + 8 * 6) + 4 * 3 + 4 * 4 * 5 + (5 * 7 + 7)
    # The addition reads the same 8x8x5 twice; the dense layer runs with its result and its own output.
    assert cost.memory_bytes == 4 * (64 * 5 + 64 * 7)


def test_memory_holds_what_is_read_later_and_writes_in_place():
    image = keras.Input((None, None, 3), name="image")
    a = LAYERS.Conv2D(8, 1)(image)
    b = LAYERS.ReLU()(LAYERS.BatchNormalization()(LAYERS.Conv2D(8, 1)(a)))
    model = keras.Model(image, LAYERS.Add()([a, b]))
    assert model_cost(model, (2, 2)).memory_bytes == 4 * 4 * (8 + 8 + 8)  # both branches and their sum
    kept = keras.Model(image, [a, LAYERS.ReLU()(a)])
    assert model_cost(kept, (2, 2)).memory_bytes == 4 * 4 * (8 + 8)  # an output is not written over


def test_mobilenet_v2_has_its_published_macs():
    cost = model_cost(keras.applications.MobileNetV2(weights=None), (224, 224))
    assert cost.macs == 300_774_272
    assert cost.parameters == 3_538_984


def test_several_inputs_have_a_size_each_and_a_shared_layer_counts_each_time():
    large, small = keras.Input((None, None, 2), name="large"), keras.Input((None, None, 2), name="small")
    shared = LAYERS.Conv2D(3, 1, name="shared")
    model = keras.Model([large, small], [shared(large), shared(small)])
    assert model_cost(model, {"large": (4, 6), "small": (2, 3)}).macs == (24 + 6) * 2 * 3
    assert [node.name for node in graph_nodes(model)] == ["large", "shared", "small", "shared:1"]


def test_graph_nodes_come_after_what_they_read():
    image = keras.Input((8, 8, 3), name="image")
    a = LAYERS.Conv2D(4, 1, name="a")(image)
    b = LAYERS.Conv2D(4, 1, name="b")(a)
    nodes = graph_nodes(keras.Model(image, LAYERS.Add(name="sum")([b, a])))
    assert [(node.name, node.inputs) for node in nodes] == [("image", ()), ("a", ("image",)), ("b", ("a",)), ("sum", ("b", "a"))]
    assert nodes[-1].output.shape == (None, 8, 8, 4)


def test_with_input_size_keeps_the_layers_and_knows_all_shapes():
    image = keras.Input((None, None, 3), name="image")
    model = keras.Model(image, LAYERS.Conv2D(4, 3, name="conv")(image))
    fixed = with_input_size(model, (7, 9))
    assert fixed.output.shape == (1, 5, 7, 4)
    assert fixed.get_layer("conv") is model.get_layer("conv")
    x = np.random.normal(size=(1, 7, 9, 3)).astype(np.float32)
    np.testing.assert_array_equal(fixed(x), model(x))


class Encoder(LAYERS.Layer):
    """Everything that multiplies, inside a layer of one's own."""

    def build(self, shape):
        self.down, self.depthwise = LAYERS.Conv2D(8, 3, 2, "same"), LAYERS.DepthwiseConv2D(3, padding="same")
        self.up, self.grouped = LAYERS.Conv2DTranspose(4, 2, 2), LAYERS.Conv2D(6, 3, padding="same", groups=2)
        self.project, self.attend = LAYERS.EinsumDense("abc,cd->abd", (None, 6)), LAYERS.MultiHeadAttention(2, 3)
        self.dense, self.norm = LAYERS.Dense(7), LAYERS.BatchNormalization()

    def call(self, x):
        x = self.norm(self.grouped(self.up(self.depthwise(self.down(x)))))
        x = self.project(tf.reshape(x, (-1, 64, 6)))
        return tf.reshape(self.dense(self.attend(x, x)), (-1, 8, 8, 7))


def test_a_custom_layer_counts_what_its_graph_does():
    image = keras.Input((None, None, 3), name="image")
    model = keras.Model(image, LAYERS.Conv2D(2, 1)(Encoder()(image)))
    convolutions = 16 * 8 * 27 + 16 * 8 * 9 + 16 * 8 * 4 * 4 + 64 * 6 * 9 * 2
    attention = 3 * 64 * 6 * 6 + 2 * 2 * 64 * 64 * 3 + 64 * 6 * 6  # queries, keys, values; products of 2 heads; projection
    assert model_cost(model, (8, 8)).macs == convolutions + 64 * 6 * 6 + attention + 64 * 6 * 7 + 64 * 7 * 2


class Products(LAYERS.Layer):
    """A matrix product in other words."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 4), name="kernel")

    def call(self, x):
        return tf.reduce_sum(x[..., None] * self.kernel, axis=-2)


def test_layers_whose_work_is_not_seen_are_named():
    image = keras.Input((None, None, 3), name="image")
    x = LAYERS.PReLU(shared_axes=(1, 2))(LAYERS.BatchNormalization()(Encoder(name="encoder")(image)))
    model = keras.Model(image, LAYERS.Conv2D(2, 1)(LAYERS.UpSampling2D()(Products(name="products")(x))))
    assert uncounted_layers(model, (8, 8)) == ["products"]


def test_products_of_tensors_count():
    a = keras.Input(batch_shape=(1, 6, 4))
    product = keras.ops.einsum("...ij,...kj->...ik", a, a) + keras.ops.matmul(a, keras.ops.transpose(a, (0, 2, 1)))
    counted = {node.name.rstrip("_0123456789"): node.macs for node in graph_nodes(keras.Model(a, LAYERS.Dot((2, 2))([product, product])))}
    assert {name: macs for name, macs in counted.items() if macs} == {"einsum": 6 * 6 * 4, "matmul": 6 * 6 * 4, "dot": 6 * 6 * 6}


def test_a_model_among_the_layers_is_an_error():
    image, x = keras.Input((8, 8, 3)), keras.Input((8, 8, 3))
    inner = keras.Model(x, LAYERS.Conv2D(4, 1)(x), name="inner")
    with pytest.raises(ValueError, match=r"model: must have no models among its layers, got \['inner'\]"):
        model_cost(keras.Model(image, inner(image)), (8, 8))
