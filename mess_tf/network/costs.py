"""What a network costs before any device has run it: multiply-accumulates, parameters and activation memory."""

import dataclasses
import math
import weakref
from collections.abc import Iterable, Sequence

import keras
import numpy as np
import tensorflow as tf

from mess_tf.network.layers import LogProbability, ResizeLike, TwoClasses

# Packages of `keras.layers`, and layers, that multiply nothing with weights or with one another; `Dot` is the exception.
FREE_PACKAGES = ("activations", "merging", "normalization", "pooling", "preprocessing", "regularization", "reshaping")
FREE_LAYERS = (keras.layers.InputLayer, keras.layers.BatchNormalization, LogProbability, ResizeLike, TwoClasses)
PRODUCTS = ("Matmul", "Einsum", "Dot", "Tensordot", "Inner", "Outer", "Vdot", "Conv", "ConvTranspose", "DepthwiseConv", "SeparableConv")
IN_PLACE = (keras.layers.BatchNormalization, keras.layers.Activation, keras.layers.ReLU, keras.layers.Dropout)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Static costs of a model for one image.

    Attributes:
      macs: multiply-accumulates of convolutions and matrix products.
      parameters: number of weights, moving statistics included.
      memory_bytes: the most float32 activations that are alive at once while its layers run one after another: from when they are computed
        until their last reader has run, the model's inputs from the start and its outputs to the end. What only normalises or activates
        writes over what it reads.
    """

    macs: int
    parameters: int
    memory_bytes: int


def with_input_size(model: keras.Model, sizes: dict[str, tuple[int, int]] | tuple[int, int]) -> keras.Model:
    """Returns the same layers on inputs of a fixed size, so that every shape in the graph is known.

    Args:
      model: a functional model.
      sizes: (height, width) in pixels of its one input, or of each of its inputs by name.
    """
    inputs = keras.tree.map_structure(
        lambda t: keras.Input(
            batch_shape=(1, *(sizes[t.name] if isinstance(sizes, dict) else sizes), t.shape[-1]), dtype=t.dtype, name=t.name
        ),
        model.input,
    )
    return keras.models.clone_model(
        model, input_tensors=inputs, clone_function=lambda layer: layer, call_function=lambda layer, *args, **kwargs: layer(*args, **kwargs)
    )


def operation_macs(operation: keras.Operation, inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> int | None:
    """Multiply-accumulates of one layer for the shapes given (batch first, all known); None where only its graph tells (`traced_macs`)."""
    layers = keras.layers
    package = type(operation).__module__.split(".")
    if isinstance(operation, FREE_LAYERS):
        return 0
    if package[:3] == ["keras", "src", "layers"]:
        if isinstance(operation, layers.DepthwiseConv2D):
            return int(np.prod(output[1:]) * np.prod(operation.kernel_size))
        if isinstance(operation, layers.SeparableConv2D):
            channels = inputs[0][-1] * operation.depth_multiplier
            return int(np.prod(output[1:3]) * channels * (np.prod(operation.kernel_size) + output[-1]))
        if isinstance(operation, layers.Conv2DTranspose):
            return int(np.prod(inputs[0][1:]) * np.prod(operation.kernel_size) * output[-1])
        if isinstance(operation, layers.Conv2D):
            return int(np.prod(output[1:]) * np.prod(operation.kernel_size) * inputs[0][-1] // operation.groups)
        if isinstance(operation, layers.Dense):
            return int(np.prod(output[1:]) * inputs[0][-1])
        if package[3] in FREE_PACKAGES and not isinstance(operation, layers.Dot):
            return 0
    if package[:3] == ["keras", "src", "ops"] and type(operation).__name__ not in PRODUCTS:
        return 0
    return None


def traced_macs(operation: keras.Operation, node_index: int) -> int:
    """Multiply-accumulates of the convolutions and matrix products in the TensorFlow graph of one call of a layer, all shapes known.

    A loop counts once.
    """
    arguments = operation._inbound_nodes[node_index].arguments
    tensors = {id(tensor): tensor for tensor in arguments.keras_tensors}

    def call(*values):
        args, kwargs = arguments.fill_in(dict(zip(tensors, values, strict=True)))
        return operation(*args, **kwargs)

    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors.values()]
    graph = tf.function(call, autograph=False).get_concrete_function(*specs).graph.as_graph_def(add_shapes=True)
    return _products(graph.node) + sum(_products(function.node_def) for function in graph.library.function)


def _products(nodes: Iterable) -> int:
    """Multiply-accumulates of the nodes of a TensorFlow graph."""
    made: dict[str, list[list[int]]] = {}
    for node in nodes:
        made[node.name] = [[dim.size for dim in shape.dim] for shape in node.attr["_output_shapes"].list.shape]
    total = 0
    for node in nodes:

        def read(index: int, node=node) -> list[int]:
            name, _, place = node.input[index].lstrip("^").partition(":")
            return made[name][int(place.rpartition(":")[2] or 0)]

        output = made[node.name][0] if made[node.name] else []
        if node.op in ("Conv2D", "Conv3D"):
            total += math.prod(output) * math.prod(read(1)[:-1])
        elif node.op == "DepthwiseConv2dNative":
            total += math.prod(output) * math.prod(read(1)[:2])
        elif node.op in ("Conv2DBackpropInput", "Conv3DBackpropInputV2"):
            total += math.prod(read(2)) * math.prod(read(1)[:-1])
        elif node.op == "MatMul":
            total += math.prod(output) * read(0)[0 if node.attr["transpose_a"].b else 1]
        elif node.op in ("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"):
            total += math.prod(output) * read(0)[-2 if node.attr["adj_x"].b else -1]
        elif node.op == "Einsum":
            total += _einsum(node.attr["equation"].s.decode(), [read(index) for index in range(len(node.input))])
    return total


def _einsum(equation: str, shapes: list[list[int]]) -> int:
    """Products of a sum over indices; 0 of one that only rearranges a tensor."""
    sizes: dict[str, int] = {}
    for term, shape in zip(equation.partition("->")[0].split(","), shapes, strict=True):
        left, dots, right = term.partition("...")
        shape = list(shape)
        sizes |= dict(zip(left, shape, strict=False))
        sizes |= dict(zip(reversed(right), reversed(shape), strict=False))
        if dots:
            rest = shape[len(left) : len(shape) - len(right)]
            sizes["..."] = max(sizes.get("...", 1), math.prod(rest))
    return math.prod(sizes.values()) if len(shapes) > 1 else 0


def model_cost(model: keras.Model, sizes: dict[str, tuple[int, int]] | tuple[int, int]) -> Cost:
    """Adds up the costs of a functional model's layers at the input sizes given (see `with_input_size`).

    Layers without multiplications (batch normalisation, which is folded into its convolution; resizing; activations) cost 0 MACs, custom
    layers what their TensorFlow graph does.

    Raises:
      ValueError: if a layer is a model itself, whose cost would be missed.
    """
    nested = [layer.name for layer in model.layers if isinstance(layer, keras.Model)]
    if nested:
        raise ValueError(f"model: must have no models among its layers, got {nested}")
    sized = with_input_size(model, sizes)
    nodes = graph_nodes(sized)
    return Cost(sum(node.macs for node in nodes), model.count_params(), _peak_bytes(nodes, keras.tree.flatten(sized.output)))


def uncounted_layers(model: keras.Model, size: tuple[int, int]) -> list[str]:
    """Names of layers that have matrices of weights, but no convolution or matrix product in their graph: their work is not seen.

    Args:
      model: functional, one image to one map.
      size: (height, width) in pixels.
    """
    work: dict[keras.Operation, int] = {}
    for node in graph_nodes(with_input_size(model, size)):
        work[node.operation] = work.get(node.operation, 0) + node.macs
    idle = [operation for operation, macs in work.items() if not macs and operation_macs(operation, [], ()) is None]
    return [each.name for each in idle if any(sum(side > 1 for side in weight.shape) > 1 for weight in getattr(each, "weights", ()))]


def _peak_bytes(nodes: Sequence["Node"], outputs: Sequence[keras.KerasTensor]) -> int:
    """`Cost.memory_bytes` of calls that run in this order."""
    last_reader = {source: number for number, node in enumerate(nodes) for source in node.inputs}
    last_reader |= {node.name: len(nodes) for node in nodes if any(node.output is tensor for tensor in outputs)}
    alive = {node.name: 4 * int(np.prod(node.output.shape[1:])) for node in nodes if isinstance(node.operation, keras.layers.InputLayer)}
    peak = sum(alive.values())
    for number, node in enumerate(nodes):
        done = {source for source in node.inputs if last_reader[source] == number}
        if isinstance(node.operation, IN_PLACE) and done:
            del alive[done.pop()]
        alive[node.name] = 4 * int(np.prod(node.output.shape[1:]))
        peak = max(peak, sum(alive.values()))
        for source in done:
            del alive[source]
    return peak


@dataclasses.dataclass(frozen=True)
class Node:
    """One call of a layer: its name, the tensor it made, the names of the calls it read, and its MACs (0 where shapes are unknown)."""

    name: str
    operation: keras.Operation
    inputs: tuple[str, ...]
    output: keras.KerasTensor
    macs: int


_traced: weakref.WeakKeyDictionary[keras.Operation, dict[tuple, int]] = weakref.WeakKeyDictionary()


def _macs(operation: keras.Operation, node_index: int, shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    counted = operation_macs(operation, shapes, output)
    if counted is not None:
        return counted
    known = _traced.setdefault(operation, {})
    if (key := (*shapes, output)) not in known:
        known[key] = traced_macs(operation, node_index)
    return known[key]


def graph_nodes(model: keras.Model) -> list[Node]:
    """Lists the calls of a functional model in topological order; a layer called several times gets `name:1`, ... after the first."""
    nodes: dict[int, Node] = {}
    calls: dict[str, int] = {}
    stack = list(keras.tree.flatten(model.output))[::-1]
    counted: set[int] = set()  # calls of layers with several results, whose work the first one bears
    while stack:
        tensor = stack[-1]
        operation, node_index, _ = tensor._keras_history
        call = None if isinstance(operation, keras.layers.InputLayer) else operation._inbound_nodes[node_index]
        inputs = call.input_tensors if call else ()
        waiting = [source for source in inputs if id(source) not in nodes]
        if waiting:
            stack.extend(waiting[::-1])
            continue
        stack.pop()
        if id(tensor) not in nodes:
            shapes = [tuple(source.shape) for source in inputs]
            known = all(None not in shape for shape in [*shapes, tensor.shape])
            name = operation.name + (f":{calls[operation.name]}" if operation.name in calls else "")
            calls[operation.name] = calls.get(operation.name, 0) + 1
            macs = _macs(operation, node_index, shapes, tuple(tensor.shape)) if known and id(call) not in counted else 0
            counted.add(id(call))
            nodes[id(tensor)] = Node(name, operation, tuple(nodes[id(source)].name for source in inputs), tensor, macs)
    return list(nodes.values())
