"""What a network costs before any device has run it: multiply-accumulates, parameters and activation memory."""

import dataclasses
from collections.abc import Sequence

import keras
import numpy as np

IN_PLACE = (keras.layers.BatchNormalization, keras.layers.Activation, keras.layers.ReLU, keras.layers.Dropout)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Static costs of a model for one image.

    Attributes:
      macs: multiply-accumulates of convolutions and dense layers.
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


def operation_macs(operation: keras.Operation, inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """Multiply-accumulates of one layer for the shapes given (batch first, all known)."""
    layers = keras.layers
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
    return 0


def model_cost(model: keras.Model, sizes: dict[str, tuple[int, int]] | tuple[int, int]) -> Cost:
    """Adds up the costs of a functional model's layers at the input sizes given (see `with_input_size`).

    Layers without multiplications (batch normalisation, which is folded into its convolution; resizing; activations) cost 0 MACs.

    Raises:
      ValueError: if a layer is a model itself, whose cost would be missed.
    """
    nested = [layer.name for layer in model.layers if isinstance(layer, keras.Model)]
    if nested:
        raise ValueError(f"model: must have no models among its layers, got {nested}")
    sized = with_input_size(model, sizes)
    nodes = graph_nodes(sized)
    return Cost(sum(node.macs for node in nodes), model.count_params(), _peak_bytes(nodes, keras.tree.flatten(sized.output)))


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


def graph_nodes(model: keras.Model) -> list[Node]:
    """Lists the calls of a functional model in topological order; a layer called several times gets `name:1`, ... after the first."""
    nodes: dict[int, Node] = {}
    calls: dict[str, int] = {}
    stack = list(keras.tree.flatten(model.output))[::-1]
    while stack:
        tensor = stack[-1]
        operation, node_index, _ = tensor._keras_history
        inputs = () if isinstance(operation, keras.layers.InputLayer) else operation._inbound_nodes[node_index].input_tensors
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
            macs = operation_macs(operation, shapes, tuple(tensor.shape)) if known else 0
            nodes[id(tensor)] = Node(name, operation, tuple(nodes[id(source)].name for source in inputs), tensor, macs)
    return list(nodes.values())
