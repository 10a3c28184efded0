"""The networks that people have, from the Keras model to a checked bundle."""

import networks
import numpy as np
import pytest
import tensorflow as tf

from mess_tf.configs import HeadSpec
from mess_tf.files import Configuration, ExitChoice
from mess_tf.graph.exporter import Exporter
from mess_tf.network.model import FINAL, MultiExitNetwork, convert

SIZE, CLASSES = (64, 128), 5
NO_REST = {"segformer_hub"}  # its layers on tokens are made for one size
# Whose bundles `make test` makes: tokens, several branches, transposed and half-precision layers, pixels in a row, dilation.
BUNDLED = {"segformer_hub", "fast_scnn", "unet_plus_plus", "fcn8", "segnet", "deeplab_v3_plus"}


@pytest.mark.parametrize("name", networks.KINDS)
def test_a_network_gets_exits_and_a_bundle(name, full, tmp_path):
    kind = networks.KINDS[name]
    model = kind.build(SIZE, CLASSES)
    image = np.random.default_rng(0).uniform(0, 255, (1, *SIZE, 3)).astype(np.float32)
    outputs = [output.numpy().astype(np.float32) for output in tf.nest.flatten(model([image] if isinstance(model.input, list) else image))]
    network = convert(model, kind.exits, SIZE, kind.output)
    assert network.num_classes == (kind.classes or CLASSES)
    macs = [point.tap.macs for point in network.exit_points]
    assert macs == sorted(set(macs)) and len(macs) == kind.exits - 1
    assert network.exit_points[-1].tap.stride in (4, 8, 16, 32)
    logits = network.original(image).numpy()
    views = [logits, tf.nn.softmax(logits).numpy(), tf.nn.softmax(logits).numpy()[..., 1:]]
    tolerance = 0.05 if name == "fcn8" else 1e-4  # saved in half precision
    assert any(
        np.allclose(view.ravel(), output.ravel(), atol=tolerance * max(1, np.abs(output).max()))
        for view in views
        for output in outputs
        if view.size == output.size
    )
    deepest = MultiExitNetwork(network.original, network.exit_points[-1:], input_size=SIZE)
    head = HeadSpec("decoder", 8) if name in NO_REST else HeadSpec("rest")
    deepest.add_heads([head], 0.9)
    if not full and name not in BUNDLED:
        return
    early = ExitChoice(network.exit_points[-1].name, head.name, 0.9, 0.5)
    configuration = Configuration("input-dependent", False, (early, ExitChoice(*FINAL.split("."))), None)
    classes = [str(index) for index in range(network.num_classes)]
    assert "segment.final" in Exporter(deepest, SIZE).bundle(tmp_path / "bundle", configuration, None, classes)  # compared with Keras
