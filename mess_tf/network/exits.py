"""Where exits can go (cut points of the graph at equal workload) and what a head is (`HeadSpec` to layers).

Source: mess.md sections 2 and 3; Kouris et al., Multi-Exit Semantic Segmentation Networks, ECCV 2022, arXiv 2106.03527.
"""

import dataclasses
import math
from collections.abc import Sequence

import keras

from mess_tf.configs import HeadSpec
from mess_tf.network.costs import Node, graph_nodes, with_input_size
from mess_tf.network.layers import BatchNormalization, ResizeLike

ASPP_RATES = (2, 4, 8)  # at stride 16, scaled with the resolution elsewhere
MIN_WIDTH, MAX_WIDTH = 64, 256
TAP = "tap."  # before the name of the layer that a head's input comes from: the head's own layers may have the same name


@dataclasses.dataclass(frozen=True)
class Tap:
    """A tensor of the network that a head may read.

    Attributes:
      name: the layer that makes it.
      stride: size of the image, as the first layer with weights reads it, over its size; a power of two.
      channels: its channels.
      macs: multiply-accumulates from the image to it, of everything it depends on.
    """

    name: str
    stride: int
    channels: int
    macs: int


@dataclasses.dataclass(frozen=True)
class ExitPoint:
    """A place for an exit: its tap, and the shallower tap that a decoder head reads beside it (the same one where none is shallower)."""

    name: str
    tap: Tap
    shallow: Tap


def find_exit_points(network: keras.Model, exits: int | Sequence[str], input_size: tuple[int, int]) -> tuple[ExitPoint, ...]:
    """Finds the early exits of a network: with `exits` = N, the N-1 block boundaries nearest to i/N of the workload.

    A boundary is a tensor that every path from the image to the deepest feature map passes, and at which a residual block ends
    (or, in a network without enough residual blocks, one that a convolution reads).

    Args:
      network: functional model, image to logits.
      exits: number of exits, the final one included, or the names of the layers that early exits shall read.
      input_size: (height, width) in pixels for which the workload is counted.

    Raises:
      ValueError: if the graph has too few boundaries, or a layer that is named is not passed by every path, or out of order.
    """
    nodes = graph_nodes(with_input_size(network, input_size))
    by_name = {node.name: node for node in nodes}
    dominators = [_tap(node, by_name) for node in _dominators(nodes)]
    if isinstance(exits, int):
        taps = [_tap(node, by_name) for node in _boundaries(nodes, exits - 1)]
        chosen = _at_equal_workload(taps, exits, sum(node.macs for node in nodes), network.name)
    else:
        taps = [_tap(node, by_name) for node in _boundaries(nodes, 1)]
        names = [tap.name for tap in dominators]
        if not exits or [name for name in names if name in exits] != list(exits):
            raise ValueError(f"exits.layers: must be some of these, in this order: {names}; got {list(exits)}")
        chosen = [tap for tap in dominators if tap.name in exits]
    return tuple(ExitPoint(f"exit{i}", tap, _shallow_tap(tap, taps, dominators)) for i, tap in enumerate(chosen, 1))


def _at_equal_workload(taps: list[Tap], count: int, total: int, name: str) -> list[Tap]:
    if len(taps) < count - 1:
        raise ValueError(f"exits.count: {name} has {len(taps)} block boundaries, so at most {len(taps) + 1}, got {count}")
    chosen: list[int] = []
    for i in range(1, count):
        first, last = (chosen[-1] + 1 if chosen else 0), len(taps) - (count - i)
        chosen.append(min(range(first, last + 1), key=lambda index: abs(taps[index].macs - i / count * total)))
    return [taps[index] for index in chosen]


def final_point(backbone: keras.Model, input_size: tuple[int, int]) -> ExitPoint:
    """The end of a backbone as the place of the original network's own head."""
    nodes = graph_nodes(with_input_size(backbone, input_size))
    by_name = {node.name: node for node in nodes}
    boundaries, dominators = ([_tap(node, by_name) for node in part] for part in (_boundaries(nodes, 1), _dominators(nodes)))
    end = _tap(nodes[-1], by_name)
    return ExitPoint("final", end, _shallow_tap(end, boundaries, dominators))


def _deepest(nodes: list[Node]) -> Node:
    """The last tensor of the coarsest feature map (1x1 maps, as of pooled context, do not count)."""
    maps = [node for node in nodes if len(node.output.shape) == 4 and math.prod(node.output.shape[1:3]) > 1]
    area = min(math.prod(node.output.shape[1:3]) for node in maps)
    return [node for node in maps if math.prod(node.output.shape[1:3]) == area][-1]


def _dominators(nodes: list[Node]) -> list[Node]:
    """Tensors from the first convolution on that every path from the image to the deepest feature map passes, in order."""
    end = _deepest(nodes)
    first = next((index for index, node in enumerate(nodes) if node.macs), 0)
    to_end = {node.name: 0 for node in nodes} | {end.name: 1}
    for node in reversed(nodes):
        for source in node.inputs:
            to_end[source] += to_end[node.name]
    from_image = {}
    for node in nodes:
        from_image[node.name] = sum(from_image[source] for source in node.inputs) if node.inputs else 1
    return [
        node
        for node in nodes[first:]
        if node.inputs
        and len(node.output.shape) == 4
        and from_image[node.name] * to_end[node.name] == from_image[end.name]
        and ":" not in node.name
    ]


def _boundaries(nodes: list[Node], needed: int) -> list[Node]:
    readers: dict[str, list[Node]] = {node.name: [] for node in nodes}
    for node in nodes:
        for source in set(node.inputs):
            readers[source].append(node)
    dominators = _dominators(nodes)
    residual = [node for node in dominators if isinstance(node.operation, keras.layers.Add) or len(readers[node.name]) > 1]
    if len(residual) >= needed:
        return residual
    convolutions = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.SeparableConv2D)
    return [node for node in dominators if any(isinstance(reader.operation, convolutions) for reader in readers[node.name])]


def _tap(node: Node, by_name: dict[str, Node]) -> Tap:
    seen, stack, macs = set(), [node.name], 0
    while stack:
        name = stack.pop()
        if name not in seen:
            seen.add(name)
            macs += by_name[name].macs
            stack.extend(by_name[name].inputs)
    first = next(other for other in by_name.values() if other.macs)
    image_height = by_name[first.inputs[0]].output.shape[1]
    height, channels = node.output.shape[1], node.output.shape[3]
    return Tap(node.name, 2 ** round(math.log2(image_height / height)), channels, macs)


def _shallow_tap(tap: Tap, boundaries: list[Tap], dominators: list[Tap]) -> Tap:
    """The last boundary of stride 8 before a tap of stride >= 16, else of half its stride; failing that, the tensor next before it."""
    wanted = 8 if tap.stride >= 16 else tap.stride // 2
    for taps in (boundaries, dominators):
        fitting = [other for other in taps if other.macs < tap.macs and other.stride == wanted]
        if fitting:
            return fitting[-1]
    return [other for other in dominators if other.macs < tap.macs or other == tap][-2:][0]


def build_head(spec: HeadSpec, exit_point: ExitPoint, num_classes: int, momentum: float) -> keras.Model:
    """Builds one segmentation head.

    Channel reduction, extra blocks, then an FCN, DeepLabV3 (ASPP) or decoder (DeepLabV3+ style) classifier (mess.md, section 3).
    Departure: all 3x3 convolutions are depthwise separable, and widths are a share of the channels left after the reduction, with a floor.

    Args:
      spec: the head's configuration.
      exit_point: the taps it reads.
      num_classes: C.
      momentum: of batch normalisation.

    Returns:
      Functional model named `exitK.SPEC`: [tap float32 [B, h, w, channels]] (a decoder: [tap, shallow tap [B, h', w', channels']])
      to raw logits float32 [B, h, w, C] (a decoder: [B, h', w', C]).
    """
    tap, shallow = exit_point.tap, exit_point.shallow
    inputs = [keras.Input((None, None, tap.channels), name=TAP + tap.name)]
    x = inputs[0]
    channels = math.ceil(tap.channels / spec.reduction)
    if spec.reduction > 1:
        x = _conv(x, channels, momentum)
    for block in range(spec.blocks):
        x = keras.layers.Add()([x, _separable(x, channels, momentum, spec.dilation ** (block + 1), activation=None)])
    width = min(MAX_WIDTH, max(MIN_WIDTH, 8 * math.ceil(channels / 32)))
    if spec.kind == "fcn":
        x = _separable(x, width, momentum)
    else:
        x = _aspp(x, width, momentum, [max(1, rate * 16 // tap.stride) for rate in ASPP_RATES])
    if spec.kind == "decoder":
        if shallow != tap:
            inputs.append(keras.Input((None, None, shallow.channels), name=TAP + shallow.name))
        detail = _conv(inputs[-1], width // 2, momentum)
        x = keras.layers.Concatenate()([ResizeLike()([x, detail]), detail])
        x = _separable(x, width * 3 // 2, momentum)
    logits = keras.layers.Conv2D(num_classes, 1, dtype="float32", name="logits")(x)
    return keras.Model(inputs, logits, name=f"{exit_point.name}.{spec.name}")


def build_rest(original: keras.Model, exit_point: ExitPoint) -> keras.Model:
    """Builds the head that is the rest of the original network at half the resolution, starting from the original's weights.

    The tap is averaged over 2x2 pixels and every dilation behind it is halved: where all of them are even, the layers see the same
    neighbourhood of the image as in the original, at a quarter of the work. A decoder gets its resolution back from the shallower tap.
    Departure: the paper's heads all start from random weights.

    Args:
      original: functional model, image to logits, with the weights to start from.
      exit_point: the tap it reads, beside whatever else of the original the layers behind the tap read.

    Returns:
      Functional model named `exitK.rest`: [tap float32 [B, h, w, channels], ...] to raw logits float32 [B, h', w', C].

    Raises:
      ValueError: if layers behind the tap only work at the original's resolution.
    """
    nodes = graph_nodes(original)
    tensors = {node.name: node.output for node in nodes}
    behind = {exit_point.tap.name}
    for node in nodes:
        if behind.intersection(node.inputs):
            behind.add(node.name)
    sources = {source for node in nodes if node.name in behind - {exit_point.tap.name} for source in node.inputs}
    taps = [exit_point.tap.name, *(node.name for node in nodes if node.name in sources - behind)]
    inputs = [keras.Input(tensors[name].shape[1:], name=TAP + name) for name in taps]
    pooled = keras.layers.AveragePooling2D(2, padding="same")(inputs[0])

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        if "dilation_rate" in config:
            config["dilation_rate"] = tuple(max(1, rate // 2) for rate in layer.dilation_rate)
        return layer.__class__.from_config(config)

    def call(layer: keras.layers.Layer, *args, **kwargs):
        return layer(*keras.tree.map_structure(lambda x: pooled if x is inputs[0] else x, args), **kwargs)

    rest = keras.Model([tensors[name] for name in taps], original.output, name=f"{exit_point.name}.rest")
    try:
        head = keras.models.clone_model(rest, input_tensors=inputs, clone_function=clone, call_function=call)
    except ValueError as error:
        raise ValueError(f"head: rest does not fit {exit_point.name}, the layers behind it depend on their size: {error}") from error
    copy_rest(original, head)
    return head


def copy_rest(original: keras.Model, head: keras.Model) -> None:
    """Gives a head of `build_rest` the weights that the original has now."""
    for layer in head.layers:
        if layer.weights:
            layer.set_weights(original.get_layer(layer.name).get_weights())


def _conv(x: keras.KerasTensor, channels: int, momentum: float, activation: str | None = "relu6") -> keras.KerasTensor:
    x = keras.layers.Conv2D(channels, 1, use_bias=False)(x)
    x = BatchNormalization(momentum=momentum)(x)
    return keras.layers.Activation(activation)(x) if activation else x


def _separable(
    x: keras.KerasTensor, channels: int, momentum: float, dilation: int = 1, activation: str | None = "relu6"
) -> keras.KerasTensor:
    x = keras.layers.DepthwiseConv2D(3, padding="same", dilation_rate=dilation, use_bias=False)(x)
    x = BatchNormalization(momentum=momentum)(x)
    return _conv(keras.layers.Activation("relu6")(x), channels, momentum, activation)


def _aspp(x: keras.KerasTensor, width: int, momentum: float, rates: list[int]) -> keras.KerasTensor:
    """Atrous spatial pyramid pooling (DeepLabV3). The pooled context joins after the projection, which equals joining before it."""
    branches = [_conv(x, width, momentum)] + [_separable(x, width, momentum, rate) for rate in rates]
    y = keras.layers.Conv2D(width, 1, use_bias=False)(keras.layers.Concatenate()(branches))
    context = keras.layers.GlobalAveragePooling2D(keepdims=True)(x)
    context = keras.layers.Conv2D(width, 1, activation="relu")(context)
    context = keras.layers.Conv2D(width, 1, use_bias=False)(context)
    y = BatchNormalization(momentum=momentum)(keras.layers.Add()([y, context]))
    return keras.layers.Activation("relu6")(y)
