"""Where exits can go (cut points of the graph at equal workload) and what a head is (`HeadSpec` to layers).

Source: Kouris et al., Multi-Exit Semantic Segmentation Networks, ECCV 2022, arXiv 2106.03527.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from mess_runtime.bundle import check
from mess_tf.configs import HeadSpec
from mess_tf.network.costs import Node, graph_nodes, with_input_size
from mess_tf.network.layers import BatchNormalization, ResizeLike

ASPP_RATES = (2, 4, 8)  # at stride 16, scaled with the resolution elsewhere
MIN_WIDTH, MAX_WIDTH = 64, 256
TRUNK_SHARE = 0.01  # of the work: what is done on coarser maps than those is a side branch, such as pooled context
BRANCH_SHARE = 0.1  # of the work: a path that runs beside the trunk and does as much is a branch of its own
REST_DETAIL = "rest_detail."  # before the names of a rest's layers that the original does not have
TAP = "tap."  # before the name of the layer that a head's input comes from: the head's own layers may have the same name


@dataclasses.dataclass(frozen=True)
class Tap:
    """A tensor of the network that a head may read.

    Attributes:
      name: the layer that makes it.
      stride: size of the image, as the first layer with multiplications reads it, over its size; a power of two.
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
    (or, in a network without enough residual blocks, one that a layer with multiplications reads). Where two branches run beside each
    other, the taps are on the one that goes deeper, and the shallower tap of an exit is as far along the other one.

    Args:
      network: functional model, image to logits.
      exits: number of exits, the final one included, or the names of the layers that early exits shall read.
      input_size: (height, width) in pixels for which the workload is counted.

    Raises:
      ValueError: for fewer than 2 exits; if the graph has too few boundaries, or a layer that is named is not passed by every path, or out
        of order, or two maps that a layer joins differ in size, as a U-Net's where a side cannot be halved.
    """
    check(not isinstance(exits, int) or exits >= 2, "exits", "at least 2, the final one included, or names of layers", exits)
    nodes = graph_nodes(with_input_size(network, input_size))
    if unfit := _unfit(nodes):
        hint = ""
        for multiple in (2**power for power in range(1, 9)):
            rounded = tuple(multiple * math.ceil(side / multiple) for side in input_size)
            if not _unfit(graph_nodes(with_input_size(network, rounded))):
                hint = f"; sides that are divisible by {multiple} fit, such as {rounded}"
                break
        raise ValueError(f"input_size: must fit the layers of {network.name}, got {tuple(input_size)}, where {unfit}{hint}")
    if not any(node.macs for node in nodes):
        raise ValueError(f"model: must multiply its image with weights, none of the layers of {network.name} does")
    by_name = {node.name: node for node in nodes}
    if isinstance(exits, int):
        end, boundaries = _end_with_boundaries(nodes, exits - 1, network.name)
        dominators = [_tap(node, by_name) for node in _dominators(nodes, end)]
        taps = [_tap(node, by_name) for node in boundaries]
        chosen = _at_equal_workload(taps, exits, sum(node.macs for node in nodes))
    else:
        end = _end_behind(nodes, exits)
        dominators = [_tap(node, by_name) for node in _dominators(nodes, end)]
        taps = [_tap(node, by_name) for node in _boundaries(nodes, end, 1)]
        names = [tap.name for tap in dominators]
        if not exits or [name for name in names if name in exits] != list(exits):
            bypassed = [name for name in exits if name in by_name and name not in names]
            hint = f"; {_bypass(nodes, end, bypassed[0])}" if bypassed else ""
            raise ValueError(f"exits.layers: must be some of these, in this order: {names}; got {list(exits)}{hint}")
        chosen = [tap for tap in dominators if tap.name in exits]
    branch = _branch(nodes, end)
    reached = _tap(end, by_name).macs

    def shallow(tap: Tap) -> Tap:
        behind = _behind(nodes, tap.name)
        beside = [other for other in branch if other.stride == _shallow_stride(tap) and not behind & _before(by_name, other.name)]
        if beside:
            return min(beside, key=lambda other: abs(other.macs / branch[-1].macs - tap.macs / reached))
        return _shallow_tap(tap, taps, dominators)

    return tuple(ExitPoint(f"exit{i}", tap, shallow(tap)) for i, tap in enumerate(chosen, 1))


def _at_equal_workload(taps: list[Tap], count: int, total: int) -> list[Tap]:
    chosen: list[int] = []
    for i in range(1, count):
        first, last = (chosen[-1] + 1 if chosen else 0), len(taps) - (count - i)
        chosen.append(min(range(first, last + 1), key=lambda index: abs(taps[index].macs - i / count * total)))
    return [taps[index] for index in chosen]


def final_point(backbone: keras.Model, input_size: tuple[int, int]) -> ExitPoint:
    """The end of a backbone as the place of the original network's own head."""
    nodes = graph_nodes(with_input_size(backbone, input_size))
    by_name = {node.name: node for node in nodes}
    deepest = _ends(nodes)[0]
    boundaries, dominators = (
        [_tap(node, by_name) for node in part] for part in (_boundaries(nodes, deepest, 1), _dominators(nodes, deepest))
    )
    end = _tap(nodes[-1], by_name)
    return ExitPoint("final", end, _shallow_tap(end, boundaries, dominators))


def _area(node: Node) -> int:
    """Places of a feature map [B, H, W, C] or of tokens [B, N, C]; 0 of anything else, and of 1x1 maps as of pooled context."""
    area = math.prod(node.output.shape[1:-1]) if len(node.output.shape) in (3, 4) else 0
    return area if area > 1 else 0


def _is_map(node: Node) -> bool:
    return len(node.output.shape) == 4 and _area(node) > 0


def _is_padding(node: Node) -> bool:
    return type(node.operation).__name__ in ("ZeroPadding2D", "Pad")


def _ends(nodes: list[Node]) -> list[Node]:
    """The coarsest feature maps of the trunk, the last first: all the work passes through them, or some of it is done at their size."""
    work: dict[int, int] = {}
    for node in nodes:
        work[_area(node)] = work.get(_area(node), 0) + node.macs
    areas = sorted({_area(node) for node in nodes if _is_map(node)})
    total = sum(work.values())
    done = [sum(macs for area, macs in work.items() if 0 < area <= limit) for limit in areas]
    passed = {_area(node) for node in _dominators(nodes, nodes[-1])}
    trunk = next((area for area, macs in zip(areas, done, strict=True) if macs >= TRUNK_SHARE * total or area in passed), areas[-1])
    return [node for node in nodes[::-1] if _is_map(node) and _area(node) == trunk]


def _end_with_boundaries(nodes: list[Node], needed: int, name: str) -> tuple[Node, list[Node]]:
    """The last of the coarsest maps of the trunk that has enough boundaries before it, and these."""
    best = None
    for end in _ends(nodes):
        boundaries = _boundaries(nodes, end, needed)
        if len(boundaries) >= needed:
            return end, boundaries
        if best is None or len(boundaries) > len(best[1]):
            best = end, boundaries
    end, boundaries = best
    inside = {node.name for node in _dominators(nodes, end)}
    bypassed = [node for node in nodes if node.name in _before({each.name: each for each in nodes}, end.name) - inside and node.macs]
    hint = f"; {_bypass(nodes, end, max(bypassed, key=lambda node: node.macs).name)}" if bypassed else ""
    most = len(boundaries) + 1
    most = f"at most {most} (--set exits.count={most})" if boundaries else "it takes no early exit"
    raise ValueError(f"exits.count: {name} has {len(boundaries)} block boundaries, so {most}, got {needed + 1}{hint}")


def _end_behind(nodes: list[Node], names: Sequence[str]) -> Node:
    """The last of the coarsest maps of the trunk that lies behind the layers named, or else the last of these themselves."""
    by_name = {node.name: node for node in nodes}
    ends = _ends(nodes)
    for end in (*ends, *(by_name[name] for name in names[-1:] if name in by_name and _is_map(by_name[name]))):
        if set(names) <= {node.name for node in _dominators(nodes, end)}:
            return end
    return ends[0]


def _before(by_name: dict[str, Node], name: str) -> set[str]:
    """A tensor and all that it depends on."""
    seen, stack = set(), [name]
    while stack:
        if (name := stack.pop()) not in seen:
            seen.add(name)
            stack.extend(by_name[name].inputs)
    return seen


def _behind(nodes: list[Node], name: str) -> set[str]:
    """All that depends on a tensor."""
    found = {name}
    for node in nodes:
        if found.intersection(node.inputs):
            found.add(node.name)
    return found - {name}


def _bypass(nodes: list[Node], end: Node, name: str) -> str:
    """Says which path from the image to `end` leaves a tensor out."""
    by_name = {node.name: node for node in nodes}
    if name not in _before(by_name, end.name):
        return f"{name!r} is not on the way to {end.name!r}"
    arrival: dict[str, str | None] = {}  # the reader through which a tensor was first met on the way back
    stack: list[tuple[str, str | None]] = [(end.name, None)]
    while stack:
        place, reader = stack.pop(0)
        if place not in arrival and place != name:
            arrival[place] = reader
            stack.extend((source, place) for source in by_name[place].inputs)
    place = next((node.name for node in nodes if not node.inputs and node.name in arrival), None)
    path = []
    while place is not None:
        path.append(place)
        place = arrival[place]
    working = [place for place in path if by_name[place].macs] or path
    shown = [*working[:3], "...", *working[-2:]] if len(working) > 6 else working
    return f"the path through {' -> '.join(shown)} bypasses {name!r}"


def _branch(nodes: list[Node], end: Node) -> list[Tap]:
    """The boundaries of the path that runs beside the trunk and does a good share of the work, in order; empty if there is none."""
    by_name = {node.name: node for node in nodes}
    before, behind = _before(by_name, end.name), _behind(nodes, end.name)
    beside = [node for node in nodes if node.name not in before | behind]
    if sum(node.macs for node in beside) < BRANCH_SHARE * sum(node.macs for node in nodes):
        return []
    maps = [node for node in beside if _is_map(node)]
    if not maps:
        return []
    last = max(maps, key=lambda node: _tap(node, by_name).macs)
    taps = [_tap(node, by_name) for node in _dominators(nodes, last)]
    return [tap for tap in taps if tap.macs]


def _dominators(nodes: list[Node], end: Node) -> list[Node]:
    """Tensors from the first convolution on that every path from the image to `end` passes, in order."""
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
        and not _is_padding(node)  # TFLite makes it part of the convolution that reads it, so nothing can be handed on behind it
    ]


def _boundaries(nodes: list[Node], end: Node, needed: int) -> list[Node]:
    readers: dict[str, list[Node]] = {node.name: [] for node in nodes}
    for node in nodes:
        for source in set(node.inputs):
            readers[source].append(node)
    dominators = _dominators(nodes, end)
    residual = [node for node in dominators if isinstance(node.operation, keras.layers.Add) or len(readers[node.name]) > 1]
    if len(residual) >= needed:
        return residual
    multiplied: set[str] = set()  # by a convolution, or another layer with multiplications, that reads it
    for node in reversed(nodes):
        if any(reader.macs or (_is_padding(reader) and reader.name in multiplied) for reader in readers[node.name]):
            multiplied.add(node.name)
    return [node for node in dominators if node.name in multiplied]


def _tap(node: Node, by_name: dict[str, Node]) -> Tap:
    macs = sum(by_name[name].macs for name in _before(by_name, node.name))
    nodes = list(by_name.values())
    first = next((index for index, other in enumerate(nodes) if other.macs), len(nodes))
    images = [other for other in nodes[:first] if len(other.output.shape) == 4 and other.output.shape[-1] == nodes[0].output.shape[-1]]
    image_height = images[-1].output.shape[1]
    height, channels = node.output.shape[1], node.output.shape[3]
    return Tap(node.name, 2 ** round(math.log2(image_height / height)), channels, macs)


def _shallow_stride(tap: Tap) -> int:
    return 8 if tap.stride >= 16 else tap.stride // 2


def _shallow_tap(tap: Tap, boundaries: list[Tap], dominators: list[Tap]) -> Tap:
    """The last boundary of stride 8 before a tap of stride >= 16, else of half its stride; failing that, the tensor next before it."""
    wanted = _shallow_stride(tap)
    for taps in (boundaries, dominators):
        fitting = [other for other in taps if other.macs < tap.macs and other.stride == wanted]
        if fitting:
            return fitting[-1]
    return [other for other in dominators if other.macs < tap.macs or other == tap][-2:][0]


def build_head(spec: HeadSpec, exit_point: ExitPoint, num_classes: int, momentum: float) -> keras.Model:
    """Builds one segmentation head.

    Channel reduction, extra blocks, then an FCN, DeepLabV3 (ASPP) or decoder (DeepLabV3+ style) classifier.
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


def _unfit(nodes: Sequence[Node]) -> str:
    """Says which layer joins maps that differ in size, which Keras finds only when it computes; empty if none does."""
    shapes = {node.name: tuple(node.output.shape) for node in nodes}
    for node in nodes:
        if isinstance(node.operation, keras.layers.Concatenate):
            axis = node.operation.axis % len(shapes[node.name])
            others = {shapes[name][:axis] + shapes[name][axis + 1 :] for name in node.inputs}
            if len(others) > 1:
                sizes = " and ".join("x".join(map(str, shapes[name][1:-1])) for name in node.inputs)
                return f"{node.name} joins maps of {sizes} positions"
    return ""


def build_rest(original: keras.Model, exit_point: ExitPoint, momentum: float, input_size: tuple[int, int] | None = None) -> keras.Model:
    """Builds the head that is the rest of the original network at half the resolution, starting from the original's weights.

    The tap is averaged over 2x2 pixels and every dilation behind it is halved: where all of them are even, the layers see the same
    neighbourhood of the image as in the original, at a quarter of the work. A decoder gets its resolution back from the shallower tap;
    where sizes do not fit then, as in a U-Net, all that the rest reads is averaged, and sizes that layers behind the tap have are halved.
    Where its logits are coarser than the tap, the tap's detail corrects them at its own resolution, by nothing before training.
    Departure: the paper's heads all start from random weights.

    Args:
      original: functional model, image to logits, with the weights to start from.
      exit_point: the tap it reads, beside whatever else of the original the layers behind the tap read.
      momentum: of batch normalisation in the layers that the original does not have.
      input_size: (height, width) in pixels of the image for which it must fit; None if the original has a size of its own.

    Returns:
      Functional model named `exitK.rest`: [tap float32 [B, h, w, channels], ...] to raw logits float32 [B, h', w', C].

    Raises:
      ValueError: if layers behind the tap only work at the original's resolution; where it fits at other sizes, the message says which.
    """
    name = f"{exit_point.name}.rest"

    def attempt(size: tuple[int, int] | None) -> keras.Model:
        try:
            return _rest(original, exit_point, momentum, size, False, name)
        except Exception:  # whatever the layers raise where sizes do not fit
            return _rest(original, exit_point, momentum, size, True, name)

    try:
        return attempt(input_size)
    except Exception as error:
        hint = ""
        for multiple in (2**power for power in range(1, 9)) if input_size and None in original.input.shape[1:3] else ():
            rounded = tuple(multiple * math.ceil(side / multiple) for side in input_size)
            if rounded != input_size and _fits(attempt, rounded):
                hint = f"; it does with sides of data.input_size that are divisible by {multiple}, such as {rounded}"
                break
        reason = re.sub(r".*\x1b\[1m(.*?)\x1b\[0m.*", r"\1", str(error).strip(), flags=re.DOTALL).splitlines()[0]  # Keras has it in bold
        raise ValueError(f"head: rest does not fit {exit_point.name}, the layers behind it depend on their size{hint}: {reason}") from error


def _fits(attempt: Callable[[tuple[int, int]], keras.Model], size: tuple[int, int]) -> bool:
    try:
        attempt(size)
    except Exception:  # as in build_rest
        return False
    return True


def _rest(
    original: keras.Model, exit_point: ExitPoint, momentum: float, size: tuple[int, int] | None, everything: bool, name: str
) -> keras.Model:
    """Clones what is behind a tap, with the tap, or everything that is read, at half the resolution."""
    nodes = graph_nodes(original)
    tensors = {node.name: node.output for node in nodes}
    behind = {exit_point.tap.name} | _behind(nodes, exit_point.tap.name)
    sources = {source for node in nodes if node.name in behind - {exit_point.tap.name} for source in node.inputs}
    taps = [exit_point.tap.name, *(node.name for node in nodes if node.name in sources - behind)]
    inputs = [keras.Input(tensors[tap].shape[1:], name=TAP + tap) for tap in taps]
    halved = {
        id(tensor): keras.layers.AveragePooling2D(2, padding="same")(tensor)
        for tensor in (inputs if everything else inputs[:1])
        if len(tensor.shape) == 4 and tensor.shape[1:3] != (1, 1)
    }
    configs = _halved_sizes(nodes, behind) if everything else {}

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config() | configs.get(layer.name, {})
        if "dilation_rate" in config:
            config["dilation_rate"] = tuple(max(1, rate // 2) for rate in layer.dilation_rate)
        return layer.__class__.from_config(config)

    def call(layer: keras.layers.Layer, *args, **kwargs):
        args, kwargs = keras.tree.map_structure(lambda x: halved.get(id(x), x), (args, kwargs))
        return layer(*args, **kwargs)

    rest = keras.Model([tensors[tap] for tap in taps], original.output, name=name)
    head = keras.models.clone_model(rest, input_tensors=inputs, clone_function=clone, call_function=call)
    nodes = nodes if size is None else graph_nodes(with_input_size(original, size))
    shapes = {node.name: node.output.shape for node in nodes}
    # TensorFlow checks what Keras leaves open for sizes unknown.
    logits = tf.function(head, autograph=False).get_concrete_function([tf.TensorSpec(shapes[tap]) for tap in taps]).outputs[0]
    if (logits.shape[1] or math.inf) < (shapes[taps[0]][1] or 0):
        head = keras.Model(inputs, _with_detail(head.output, inputs[0], momentum), name=name)
    copy_rest(original, head)
    return head


def _with_detail(logits: keras.KerasTensor, tap: keras.KerasTensor, momentum: float) -> keras.KerasTensor:
    """Logits at the tap's resolution, corrected by what the tap and they tell together; the correction starts at zero."""

    def named(part: str, layer: type, *args, **kwargs) -> keras.layers.Layer:
        return layer(*args, **kwargs, name=REST_DETAIL + part)

    def normalised(part: str, x: keras.KerasTensor) -> keras.KerasTensor:
        x = named(f"{part}_norm", BatchNormalization, momentum=momentum)(x)
        return named(f"{part}_relu6", keras.layers.Activation, "relu6")(x)

    width = MIN_WIDTH // 2
    logits = named("logits", ResizeLike)([logits, tap])
    x = normalised("tap", named("tap", keras.layers.Conv2D, width, 1, use_bias=False)(tap))
    x = named("join", keras.layers.Concatenate)([x, logits])
    x = normalised("around", named("around", keras.layers.DepthwiseConv2D, 3, padding="same", use_bias=False)(x))
    x = normalised("mix", named("mix", keras.layers.Conv2D, width, 1, use_bias=False)(x))
    x = named("correction", keras.layers.Conv2D, logits.shape[-1], 1, kernel_initializer="zeros", dtype="float32")(x)
    return named("sum", keras.layers.Add, dtype="float32")([x, logits])


def _halved_sizes(nodes: list[Node], behind: set[str]) -> dict[str, dict]:
    """New values of the layers behind a tap that have sizes of their own, where all maps are half as large as in the original.

    Windows that pool a map into few bins are halved, so that there are as many bins; what enlarges the bins again does it half as much.
    """
    configs: dict[str, dict] = {}
    bins: set[str] = set()  # tensors as large as in the original
    for node in nodes:
        if node.name not in behind or not node.inputs:
            continue
        kind, layer = type(node.operation).__name__, node.operation
        of_bins = all(source in bins for source in node.inputs)
        if of_bins and kind in ("UpSampling2D", "Resizing", "Resize"):
            of_bins = False
            if kind == "UpSampling2D":
                configs[layer.name] = {"size": tuple(math.ceil(factor / 2) for factor in layer.size)}
        elif kind.startswith("Global"):
            of_bins = True
        elif kind in ("AveragePooling2D", "MaxPooling2D") and min(layer.pool_size) > 3 and not of_bins:
            sides = {"pool_size": layer.pool_size, "strides": layer.strides}
            configs[layer.name] = {key: tuple(math.ceil(side / 2) for side in value) for key, value in sides.items()}
            of_bins = True
        if kind == "Resizing":
            configs[layer.name] = {"height": math.ceil(layer.height / 2), "width": math.ceil(layer.width / 2)}
        elif kind == "Resize":
            configs[layer.name] = {"size": tuple(math.ceil(side / 2) for side in layer.size)}
        elif kind == "Reshape" and not of_bins:
            *places, channels = layer.target_shape
            sides = [-1] if len(places) == 1 else [side if side == -1 else math.ceil(side / 2) for side in places]
            configs[layer.name] = {"target_shape": (*sides, channels)}
        if of_bins:
            bins.add(node.name)
    return configs


def copy_rest(original: keras.Model, head: keras.Model) -> None:
    """Gives a head of `build_rest` the weights that the original has now."""
    for layer in head.layers:
        if layer.weights and not layer.name.startswith(REST_DETAIL):
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
