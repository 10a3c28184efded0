"""Backbones as functional Keras models, made by surgery on `keras.applications` so that ImageNet weights fit one to one.

Every backbone takes RGB float32 [B, H, W, 3] in 0..255 (its preprocessing is its first layer) and returns its last block's feature map.
"""

import dataclasses
import os
import re
from collections.abc import Callable

import keras
import numpy as np

from mess_tf.configs import LITES, BackboneConfig
from mess_tf.files import read_arrays
from mess_tf.network.costs import graph_nodes
from mess_tf.network.layers import BatchNormalization
from mess_tf.network.originals import flatten

Rule = Callable[[keras.layers.Layer], dict | None]


def build_backbone(config: BackboneConfig) -> keras.Model:
    """Builds a backbone.

    Args:
      config: name, width multiplier, output stride, weights and batch-norm momentum.

    Returns:
      Model: RGB float32 [B, H, W, 3] in 0..255 to float32 [B, H/output_stride, W/output_stride, channels].

    Raises:
      ValueError: weights that the backbone does not have, or that do not fit it.
      FileNotFoundError: a weight file that does not exist.
      ConnectionError: `imagenet` weights that could not be downloaded.
    """
    return _efficientnet_lite(config) if config.name in LITES else _of_application(config)


def _same_padding(layer: keras.layers.Layer) -> dict | None:
    """Replaces explicit padding before a strided convolution by the equal padding='same': one op less, and dilation stays possible.

    What drops activations or whole blocks in training is left out.
    """
    if isinstance(layer, keras.layers.ZeroPadding2D | keras.layers.Dropout) or type(layer).__name__ == "StochasticDepth":
        return None
    layer_config = layer.get_config()
    if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D):
        layer_config["padding"] = "same"
    return layer_config


def _as_it_is(layer: keras.layers.Layer) -> dict:
    return layer.get_config()


@dataclasses.dataclass(frozen=True)
class _Application:
    """What the surgery has to know of a network of `keras.applications`.

    Attributes:
      class_name: in `keras.applications`.
      last: pattern of the layer that ends the trunk, the last that matches; empty for the network's output.
      preprocess: what the images need that the network does not do itself; the class, with its arguments.
      rule: see `_rewrite`.
      reversed_channels: whether its first kernel reads BGR.
    """

    class_name: str
    last: str = ""
    preprocess: tuple[type[keras.layers.Layer], dict] | None = None
    rule: Rule = _same_padding
    reversed_channels: bool = False


_CENTRED = (keras.layers.Rescaling, {"scale": 1 / 127.5, "offset": -1.0})
_MEANS = (keras.layers.Normalization, {"mean": [123.68, 116.779, 103.939], "variance": [1.0, 1.0, 1.0]})
_APPLICATIONS = {
    "mobilenet_v2": _Application("MobileNetV2", "block_16_project_BN", _CENTRED),
    "mobilenet_v3_small": _Application("MobileNetV3Small", r"expanded_conv_\d+_add"),
    "mobilenet_v3_large": _Application("MobileNetV3Large", r"expanded_conv_\d+_add"),
    **{f"efficientnet_v2_b{number}": _Application(f"EfficientNetV2B{number}", r"block\w+_add") for number in range(4)},
    "convnext_tiny": _Application("ConvNeXtTiny"),
    "resnet50": _Application("ResNet50", r"conv5_block\d_out", _MEANS, _as_it_is, True),
    "resnet101": _Application("ResNet101", r"conv5_block\d_out", _MEANS, _as_it_is, True),
}


def _of_application(config: BackboneConfig) -> keras.Model:
    known = _APPLICATIONS[config.name]
    options = {"alpha": config.width} if config.width != 1 or config.name == "mobilenet_v2" else {}
    build = getattr(keras.applications, known.class_name)
    base = flatten(_application(config, lambda weights: build(input_shape=(224, 224, 3), include_top=False, weights=weights, **options)))
    tensors = [node.output for node in graph_nodes(base) if not known.last or re.fullmatch(known.last, node.name)]
    preprocess = known.preprocess and known.preprocess[0](**known.preprocess[1], name="preprocess")
    model = _rewrite(keras.Model(base.input, tensors[-1], name=config.name), preprocess, config, known.rule)
    if config.weights != "none":
        for layer in model.layers:
            if layer.weights and layer is not preprocess:
                layer.set_weights(base.get_layer(layer.name).get_weights())
    if known.reversed_channels:
        kernel = next(layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)).kernel
        kernel.assign(keras.ops.flip(kernel, axis=2))
    return model


def package_command(name: str) -> str:
    """The command that makes a file of the ImageNet weights of an EfficientNet-Lite."""
    return f"python -m mess_tf.pretrained --network={name} --output={name}_imagenet.npz"


def _efficientnet_lite(config: BackboneConfig) -> keras.Model:
    """EfficientNet without squeeze-and-excitation, with ReLU6 and with only one block in its first and last stage."""
    if config.weights == "imagenet":
        raise ValueError(
            f"backbone.weights: {config.name} has no download in keras.applications; make a file by `{package_command(config.name)}` "
            "and pass its path, got 'imagenet'"
        )
    build = getattr(keras.applications, f"EfficientNetB{config.name[-1]}")
    base = build(include_top=False, weights=None, input_shape=(224, 224, 3))

    def to_lite(layer: keras.layers.Layer) -> dict | None:
        if layer.name.startswith(("rescaling", "normalization", "block1b", "block7b")) or "_se_" in layer.name:
            return None
        layer_config = _same_padding(layer)
        if isinstance(layer, keras.layers.Activation):
            layer_config["activation"] = "relu6"
        return layer_config

    scale = keras.layers.Rescaling(1 / 127.5, -1.0, name="preprocess")
    trunk = keras.Model(base.input, base.get_layer("block7a_project_bn").output, name=config.name)
    model = _rewrite(trunk, scale, config, to_lite)
    if config.weights != "none":
        _load_lite(model, config.weights)
    return model


def _rewrite(trunk: keras.Model, preprocess: keras.layers.Layer | None, config: BackboneConfig, rule: Rule) -> keras.Model:
    """Rebuilds a network for images of any size, at the configured output stride.

    Where a stride would exceed the output stride it becomes 1, and all later convolutions on that path are dilated by it instead (a trous).

    Args:
      rule: a layer's new configuration, or None to leave the layer out (its first input passes through).
    """
    strides: dict[int, tuple[int, int]] = {}  # id of a new tensor -> (stride against the image, dilation that replaces lost strides)

    def call(layer: keras.layers.Layer, *args, **kwargs):
        args = tuple(preprocessed if argument is image else argument for argument in args)
        first = next(argument for argument in keras.tree.flatten(args) if isinstance(argument, keras.KerasTensor))
        layer_config = rule(layer)
        if layer_config is None:
            return first
        stride, dilation = strides.get(id(first), (1, 1))
        own_stride = np.max(layer_config.get("strides", 1)).item()
        if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D):
            if np.max(layer.kernel_size) > 1:
                layer_config["dilation_rate"] = (dilation, dilation)
            if stride * own_stride > config.output_stride:
                layer_config["strides"] = (1, 1)
                dilation, own_stride = dilation * own_stride, 1
        cls = layer.__class__
        if cls is keras.layers.BatchNormalization:
            cls, layer_config["momentum"] = BatchNormalization, config.batch_norm_momentum
        outputs = cls.from_config(layer_config)(*args, **kwargs)
        strides[id(outputs)] = (stride * own_stride, dilation)
        alive.append(outputs)
        return outputs

    alive = []  # keeps the ids above from being used twice
    image = keras.Input((None, None, 3), name="image")
    preprocessed = preprocess(image) if preprocess else image
    return keras.models.clone_model(trunk, input_tensors=image, clone_function=lambda layer: layer, call_function=call)


def _application(config: BackboneConfig, build: Callable[[str | None], keras.Model]) -> keras.Model:
    """Builds a `keras.applications` model with the configured weights."""
    if config.weights == "none":
        return build(None)
    if config.weights != "imagenet" and not os.path.exists(config.weights):
        raise FileNotFoundError(f"backbone.weights: must be 'none', 'imagenet' or an existing Keras weight file, got {config.weights!r}")
    try:
        return build(config.weights)
    except (ValueError, OSError) as error:
        if config.weights == "imagenet":
            raise
        raise ValueError(f"backbone.weights: {config.weights!r} does not fit {config.name}: {error}") from error
    except Exception as error:
        if "URL fetch failure" not in str(error):
            raise
        raise ConnectionError(
            f"backbone.weights: 'imagenet' for {config.name} is downloaded by keras.applications, which failed ({error}). "
            "Connect to the internet once, or pass a downloaded file or 'none'."
        ) from error


def _load_lite(model: keras.Model, path: str) -> None:
    """Loads a state dict of an EfficientNet-Lite saved as NumPy arrays (keys and layouts as in `mess_tf.pretrained`)."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"backbone.weights: no file {path!r}; make one by `{package_command(model.name)}`")
    state = read_arrays(path)
    blocks = sorted({layer.name.split("_")[0] for layer in model.layers if layer.name.startswith("block")})
    prefixes = {"stem": ""} | {block: f"_blocks.{index}." for index, block in enumerate(blocks)}
    parts = {
        "stem": {"conv": "_conv_stem", "bn": "_bn0"},
        "block": {"expand_conv": "_expand_conv", "expand_bn": "_bn0", "dwconv": "_depthwise_conv", "bn": "_bn1"}
        | {"project_conv": "_project_conv", "project_bn": "_bn2"},
    }
    for layer in model.layers:
        if not layer.weights or layer.name == "preprocess":
            continue
        block, part = layer.name.split("_", 1)
        key = prefixes[block] + parts["stem" if block == "stem" else "block"][part]
        try:
            if "bn" in part:
                values = [state[f"{key}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")]
            else:
                axes = (2, 3, 0, 1) if part == "dwconv" else (2, 3, 1, 0)
                values = [np.transpose(state[f"{key}.weight"], axes)]
            layer.set_weights(values)
        except (KeyError, ValueError) as error:
            raise ValueError(f"backbone.weights: {path!r} does not fit {model.name} at {layer.name}: {error}") from error
