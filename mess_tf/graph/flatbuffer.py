"""Graphs of TFLite operations: read from .tflite files, joined, cut at named tensors, and written as one file that shares weights.

A network and its exit policies are converted once each. Everything that is deployed is joined and cut from these, so that the segments of
a chain, a network run at a stretch and each exit alone hold the same operations, weights and scales.
"""

import copy
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

OPERATORS = schema.BuiltinOperator
FLOAT32, INT8 = schema.TensorType.FLOAT32, schema.TensorType.INT8
ELEMENTWISE = (OPERATORS.ADD, OPERATORS.SUB, OPERATORS.MUL, OPERATORS.DIV, OPERATORS.MAXIMUM, OPERATORS.MINIMUM)
OPERATOR_NAMES = {code: name for name, code in vars(OPERATORS).items() if not name.startswith("_")}


@dataclasses.dataclass(eq=False)
class Tensor:
    """A tensor: its description, and its content where it is constant."""

    description: schema.TensorT
    content: np.ndarray | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(side) for side in self.description.shape) if self.description.shape is not None else ()


@dataclasses.dataclass(eq=False)
class Operation:
    """An operation and the tensors that it reads (None where an optional one is left out) and makes."""

    description: schema.OperatorT
    code: schema.OperatorCodeT
    inputs: list[Tensor | None]
    outputs: list[Tensor]

    @property
    def builtin(self) -> int:
        return max(self.code.builtinCode, self.code.deprecatedBuiltinCode)


@dataclasses.dataclass(eq=False)
class Graph:
    """Operations in order of execution, and the tensors that go in and come out by name."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    operations: list[Operation]

    def renamed(self, outputs: Mapping[str, str]) -> "Graph":
        """The same graph with only some outputs: new name to present name."""
        return cut(self, self.inputs, {new: self.outputs[old] for new, old in outputs.items()})


def read(content: bytes, inputs: Sequence[str], outputs: Sequence[str]) -> Graph:
    """Reads a .tflite with one subgraph, whose inputs and outputs have these names, in order."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    (subgraph,) = model.subgraphs
    return _graph(model, subgraph, inputs, outputs)


def read_signatures(content: bytes) -> dict[str, Graph]:
    """Reads a .tflite as `write` makes it: its graphs by the name of the signature."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    graphs = {}
    for definition in model.signatureDefs:
        subgraph = model.subgraphs[definition.subgraphIndex]
        inputs, outputs = (
            {each.tensorIndex: each.name.decode() for each in tensors} for tensors in (definition.inputs, definition.outputs)
        )
        names = [inputs[i] for i in subgraph.inputs], [outputs[i] for i in subgraph.outputs]
        graphs[definition.signatureKey.decode()] = _graph(model, subgraph, *names)
    return graphs


def _graph(model: schema.ModelT, subgraph: schema.SubGraphT, inputs: Sequence[str], outputs: Sequence[str]) -> Graph:
    tensors = [Tensor(each, model.buffers[each.buffer].data) for each in subgraph.tensors]
    operations = [
        Operation(
            each,
            model.operatorCodes[each.opcodeIndex],
            [tensors[i] if i >= 0 else None for i in each.inputs],
            [tensors[i] for i in each.outputs],
        )
        for each in subgraph.operators
    ]
    return Graph(
        {name: tensors[i] for name, i in zip(inputs, subgraph.inputs, strict=True)},
        {name: tensors[i] for name, i in zip(outputs, subgraph.outputs, strict=True)},
        operations,
    )


def join(first: Graph, second: Graph, wires: Mapping[str, str], prefix: str = "") -> Graph:
    """Feeds outputs of one graph to another.

    Args:
      first: makes the outputs that `second` reads.
      second: is copied, so that it can be joined several times.
      wires: input of `second` to output of `first`; all inputs.
      prefix: of the names of the second graph's outputs.

    Returns:
      A graph with the inputs of the first and the outputs of both.
    """
    placed = {id(tensor): first.outputs[wires[name]] for name, tensor in second.inputs.items()}

    def place(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in placed:
            placed[id(tensor)] = tensor if tensor.content is not None else Tensor(copy.copy(tensor.description), None)
        return placed[id(tensor)]

    operations = [
        Operation(each.description, each.code, [place(tensor) for tensor in each.inputs], [place(tensor) for tensor in each.outputs])
        for each in second.operations
    ]
    outputs = {prefix + name: place(tensor) for name, tensor in second.outputs.items()}
    return Graph(first.inputs, first.outputs | outputs, first.operations + operations)


def cut(graph: Graph, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Graph:
    """The part of a graph that makes some of its tensors from others.

    Args:
      graph: the whole.
      inputs: tensors by name where the part begins; those that it does not read are left out.
      outputs: tensors by name that the part makes.

    Raises:
      ValueError: if the outputs need an input of the whole graph that is not among the inputs.
    """
    given = {id(tensor) for tensor in inputs.values()}
    needed, kept = {id(tensor) for tensor in outputs.values()}, []
    for operation in reversed(graph.operations):
        if any(id(tensor) in needed and id(tensor) not in given for tensor in operation.outputs):
            kept.append(operation)
            needed |= {id(tensor) for tensor in operation.inputs if tensor is not None}
    missing = [name for name, tensor in graph.inputs.items() if id(tensor) in needed and id(tensor) not in given]
    if missing:
        raise ValueError(f"inputs: must hold all that {sorted(outputs)} need, {missing} is missing from {sorted(inputs)}")
    return Graph({name: tensor for name, tensor in inputs.items() if id(tensor) in needed}, dict(outputs), kept[::-1])


def with_broadcasts(graph: Graph) -> Graph:
    """A graph whose elementwise operations read [1, 1, 1, C] as it is, where the converter put a RESHAPE to [C] before them.

    LiteRT's GPU delegates take what comes out of such a RESHAPE of int8 for whole numbers, and compute nonsense without an error.
    """
    whole: dict[int, Tensor] = {}
    for operation in graph.operations:
        source, result = operation.inputs[0], operation.outputs[0]
        if (
            operation.builtin == OPERATORS.RESHAPE
            and source.content is None
            and source.shape[-1:] == result.shape == (math.prod(source.shape),)
        ):
            readers = [each for each in graph.operations if result in each.inputs]
            wide = all(each.builtin in ELEMENTWISE and max(len(i.shape) for i in each.inputs) == len(source.shape) for each in readers)
            if wide and result not in graph.outputs.values():
                whole[id(result)] = source
    operations = [
        Operation(each.description, each.code, [whole.get(id(tensor), tensor) for tensor in each.inputs], each.outputs)
        for each in graph.operations
        if id(each.outputs[0]) not in whole
    ]
    return Graph(graph.inputs, graph.outputs, operations)


def with_copied_outputs(graph: Graph) -> Graph:
    """A graph that hands out a copy of what an elementwise operation made, if it reads that on itself.

    LiteRT's GPU delegate on OpenCL hands out an operand instead of such a sum (google-ai-edge/LiteRT, issue 8599).
    """
    read = {id(tensor) for operation in graph.operations for tensor in operation.inputs}
    operations, outputs = list(graph.operations), dict(graph.outputs)
    for operation in graph.operations:
        (made, *_) = operation.outputs
        for name in [name for name, tensor in graph.outputs.items() if tensor is made and id(made) in read]:
            if operation.builtin in ELEMENTWISE:
                outputs[name] = Tensor(copy.copy(made.description), None)
                operations.append(_reshape(made, outputs[name]))
    return Graph(graph.inputs, outputs, operations)


def with_cuts(graph: Graph) -> Graph:
    """A graph that can be cut at its outputs: what the converter let read the source of a RESHAPE that makes an output reads the output.

    It does so with tokens of a transformer that are handed on as a map.
    """
    operations = list(graph.operations)
    for made in graph.outputs.values():
        producer = next((each for each in operations if made in each.outputs), None)
        if producer is None or producer.builtin != OPERATORS.RESHAPE or producer.inputs[0].content is not None:
            continue
        source = producer.inputs[0]
        if not any(source in each.inputs for each in operations if each is not producer):
            continue
        again = Tensor(copy.copy(source.description), None)
        behind = [
            Operation(each.description, each.code, [again if tensor is source else tensor for tensor in each.inputs], each.outputs)
            for each in operations
            if each is not producer
        ]
        place = next((index for index, each in enumerate(behind) if source in each.outputs), -1) + 1
        operations = [*behind[:place], producer, _reshape(made, again), *behind[place:]]
    return Graph(graph.inputs, graph.outputs, operations)


def with_float_ends(graph: Graph) -> Graph:
    """A graph that takes and hands out float32 where it was int8, with the same values, for runtimes whose buffers know no int8."""

    def as_float(tensor: Tensor) -> Tensor:
        description = copy.copy(tensor.description)
        description.type, description.quantization = FLOAT32, None
        return Tensor(description, None)

    def conversion(builtin: int, version: int, source: Tensor, result: Tensor) -> Operation:
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = builtin
        code.version = version
        return Operation(schema.OperatorT(), code, [source], [result])

    inputs, outputs = dict(graph.inputs), dict(graph.outputs)
    before, behind = [], []
    for name, tensor in graph.inputs.items():
        if tensor.description.type == INT8:
            inputs[name] = as_float(tensor)
            before.append(conversion(OPERATORS.QUANTIZE, 1, inputs[name], tensor))
    for name, tensor in graph.outputs.items():
        if tensor.description.type == INT8:
            outputs[name] = as_float(tensor)
            behind.append(conversion(OPERATORS.DEQUANTIZE, 2, tensor, outputs[name]))
    return Graph(inputs, outputs, [*before, *graph.operations, *behind])


def _reshape(source: Tensor, result: Tensor) -> Operation:
    shape, description, code, options = schema.TensorT(), schema.OperatorT(), schema.OperatorCodeT(), schema.ReshapeOptionsT()
    shape.name, shape.type, shape.shape = b"shape", schema.TensorType.INT32, [len(result.shape)]
    options.newShape = np.array(result.shape, np.int32)
    code.builtinCode = code.deprecatedBuiltinCode = OPERATORS.RESHAPE
    code.version = 1
    description.builtinOptionsType, description.builtinOptions = schema.BuiltinOptions.ReshapeOptions, options
    return Operation(description, code, [source, Tensor(shape, np.frombuffer(options.newShape.tobytes(), np.uint8))], [result])


def stored(graph: Graph, name: str) -> Tensor:
    """An output as the graph works with it: the int8 tensor where the output is its float copy."""
    for operation in graph.operations:
        if (
            operation.builtin == OPERATORS.DEQUANTIZE
            and operation.outputs[0] is graph.outputs[name]
            and operation.inputs[0].content is None
        ):
            return operation.inputs[0]
    return graph.outputs[name]


def taken(graph: Graph, name: str) -> Tensor:
    """An input as the graph works with it: the int8 tensor where its only reader quantises it."""
    readers = [operation for operation in graph.operations if graph.inputs[name] in operation.inputs]
    if len(readers) == 1 and readers[0].builtin == OPERATORS.QUANTIZE:
        return readers[0].outputs[0]
    return graph.inputs[name]


def products(operation: Operation) -> int:
    """Products that are summed to one value of the output, 0 unless it is a convolution or matrix product."""
    if operation.builtin in (OPERATORS.CONV_2D, OPERATORS.FULLY_CONNECTED):
        return math.prod(operation.inputs[1].shape[1:])
    if operation.builtin == OPERATORS.DEPTHWISE_CONV_2D:
        return math.prod(operation.inputs[1].shape[1:3])
    if operation.builtin == OPERATORS.BATCH_MATMUL:
        return operation.inputs[0].shape[-1]
    return 0


def macs(graph: Graph) -> int:
    """Multiply-accumulates of the convolutions and matrix products of a graph."""
    total = 0
    for operation in graph.operations:
        if operation.builtin == OPERATORS.TRANSPOSE_CONV:
            total += math.prod(operation.inputs[2].shape) * math.prod(operation.inputs[1].shape[:3])
        else:
            total += math.prod(operation.outputs[0].shape) * products(operation)
    return total


def channel_means(content: bytes, samples: Iterable[Sequence[np.ndarray]]) -> dict[int, np.ndarray]:
    """Mean over samples and places of each channel that the convolutions of a float .tflite read, by the index of their input."""
    interpreter = Interpreter(
        model_content=content,
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        num_threads=os.cpu_count(),
    )
    interpreter.allocate_tensors()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    read = {int(operation.inputs[0]) for operation, _ in _convolutions(model)}
    means: dict[int, list[np.ndarray]] = {index: [] for index in read}
    for sample in samples:
        for details, value in zip(interpreter.get_input_details(), sample, strict=True):
            interpreter.set_tensor(details["index"], value)
        interpreter.invoke()
        for index in read:
            means[index].append(interpreter.get_tensor(index).mean((0, 1, 2)))
    return {index: np.mean(values, axis=0) for index, values in means.items()}


def _convolutions(model: schema.ModelT) -> Iterable[tuple[schema.OperatorT, bool]]:
    """Convolutions with a bias, and whether each is depthwise."""
    for operation in model.subgraphs[0].operators:
        code = model.operatorCodes[operation.opcodeIndex]
        builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
        if builtin in (OPERATORS.CONV_2D, OPERATORS.DEPTHWISE_CONV_2D) and len(operation.inputs) > 2 and operation.inputs[2] >= 0:
            yield operation, builtin == OPERATORS.DEPTHWISE_CONV_2D


def with_corrected_biases(content: bytes, means: Mapping[int, np.ndarray], kept: Iterable[str]) -> bytes:
    """A float .tflite whose biases make up for what rounding the weights to int8 does to the mean of each channel.

    Args:
      content: with one subgraph; the weights of convolutions will be rounded to 127 steps of the largest of their output channel.
      means: of every convolution's input by its index: the mean of each channel.
      kept: names of outputs of the convolutions that stay in float32.
    """
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    (subgraph,) = model.subgraphs
    for operation, depthwise in _convolutions(model):
        weights, bias = (subgraph.tensors[i] for i in operation.inputs[1:])
        if subgraph.tensors[operation.outputs[0]].name.decode() in kept:
            continue
        values = np.frombuffer(bytes(model.buffers[weights.buffer].data), np.float32).reshape(weights.shape)
        inside = (0, 1, 2) if depthwise else (1, 2, 3)  # axes of one output channel
        step = np.maximum(np.abs(values).max(inside, keepdims=True) / 127, np.finfo(np.float32).tiny)
        shift = ((np.round(values / step) * step - values) * means[int(operation.inputs[0])]).sum(inside)
        buffer = schema.BufferT()
        buffer.data = np.frombuffer((np.frombuffer(bytes(model.buffers[bias.buffer].data), np.float32) - shift).tobytes(), np.uint8)
        model.buffers.append(buffer)
        bias.buffer = len(model.buffers) - 1
    builder = flatbuffers.Builder(len(content) + 65536)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def problems(graph: Graph) -> list[str]:
    """What keeps a graph from being deployed: custom and Flex operations, dilation that was not folded, dynamic shapes."""
    refused = (OPERATORS.CUSTOM, OPERATORS.SPACE_TO_BATCH_ND, OPERATORS.BATCH_TO_SPACE_ND)
    found = []
    for operation in graph.operations:
        if operation.builtin in refused:
            custom = f" {operation.code.customCode.decode()}" if operation.code.customCode else ""
            found.append(OPERATOR_NAMES[operation.builtin] + custom)
        for tensor in operation.outputs:
            if tensor.description.shapeSignature is not None and -1 in tensor.description.shapeSignature:
                found.append(f"dynamic shape {list(tensor.description.shapeSignature)} of {tensor.description.name.decode()}")
    return sorted(set(found))


class _Once:
    """Quantisation parameters that several tensors of a file share: written at the first, referred to by the others."""

    def __init__(self, quantization: schema.QuantizationParametersT):
        self._quantization, self._offset = quantization, None

    def Pack(self, builder: flatbuffers.Builder) -> int:  # noqa: N802
        if self._offset is None:
            self._offset = self._quantization.Pack(builder)
        return self._offset


def write(graphs: Mapping[str, Graph], half_precision: bool = False, metadata: Mapping[str, bytes] = MappingProxyType({})) -> bytes:
    """One .tflite with a signature per graph, under its name.

    Constants of equal content and equal scales are stored once. Every tensor has a name of its own, since tools that edit files ask for
    that; outputs that a graph reads itself are copied, see `with_copied_outputs`.

    Args:
      graphs: by the name of the signature.
      half_precision: lets XNNPACK compute in float16 where the processor can (ARMv8.2-A; not x86), and in float32 elsewhere.
      metadata: more of it, by name.
    """
    model = schema.ModelT()
    model.version = 3
    model.description = "mess_tf"
    model.operatorCodes, model.subgraphs, model.signatureDefs = [], [], []
    model.buffers = [schema.BufferT()]  # the first one is empty, for all that is not constant
    buffers: dict[bytes, int] = {}
    codes: dict[tuple, int] = {}
    quantizations: dict[str, _Once] = {}
    names: dict[str, int] = {}
    for signature, graph in graphs.items():
        graph = with_copied_outputs(graph)
        model.subgraphs.append(_subgraph(signature, graph, model, buffers, codes, quantizations, names))
        definition = schema.SignatureDefT()
        definition.signatureKey, definition.subgraphIndex = signature, len(model.subgraphs) - 1
        definition.inputs = _tensor_maps(graph.inputs, model.subgraphs[-1].inputs)
        definition.outputs = _tensor_maps(graph.outputs, model.subgraphs[-1].outputs)
        model.signatureDefs.append(definition)
    model.metadata = []
    for name, content in {**({"reduced_precision_support": b"fp16accfp16"} if half_precision else {}), **metadata}.items():
        buffer, entry = schema.BufferT(), schema.MetadataT()
        buffer.data = np.frombuffer(content, np.uint8)
        model.buffers.append(buffer)
        entry.name, entry.buffer = name, len(model.buffers) - 1
        model.metadata.append(entry)
    builder = flatbuffers.Builder(sum(map(len, buffers)) + 65536)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _subgraph(
    name: str,
    graph: Graph,
    model: schema.ModelT,
    buffers: dict[bytes, int],
    codes: dict[tuple, int],
    quantizations: dict[str, _Once],
    names: dict[str, int],
) -> schema.SubGraphT:
    subgraph = schema.SubGraphT()
    subgraph.name, subgraph.tensors, subgraph.operators = name, [], []
    positions: dict[int, int] = {}

    def position(tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        if id(tensor) not in positions:
            positions[id(tensor)] = len(subgraph.tensors)
            description = copy.copy(tensor.description)
            description.buffer = 0
            description.name = _unique((description.name or b"tensor").decode(), names)
            if (quantization := description.quantization) is not None:
                described = repr({key: value if value is None else np.ravel(value).tolist() for key, value in vars(quantization).items()})
                description.quantization = quantizations.setdefault(described, _Once(quantization))
            if tensor.content is not None:
                content = bytes(tensor.content)
                if content not in buffers:
                    buffers[content] = len(model.buffers)
                    buffer = schema.BufferT()
                    buffer.data = np.frombuffer(content, np.uint8)
                    model.buffers.append(buffer)
                description.buffer = buffers[content]
            subgraph.tensors.append(description)
        return positions[id(tensor)]

    def positions_of(tensors: Iterable[Tensor | None]) -> np.ndarray:
        return np.array([position(tensor) for tensor in tensors], np.int32)

    subgraph.inputs = positions_of(graph.inputs.values())
    for operation in graph.operations:
        description = copy.copy(operation.description)
        key = (operation.builtin, operation.code.customCode, operation.code.version)
        if key not in codes:
            codes[key] = len(model.operatorCodes)
            model.operatorCodes.append(operation.code)
        description.opcodeIndex = codes[key]
        description.inputs, description.outputs = positions_of(operation.inputs), positions_of(operation.outputs)
        subgraph.operators.append(description)
    subgraph.outputs = positions_of(graph.outputs.values())
    return subgraph


def _unique(name: str, names: dict[str, int]) -> str:
    """The name, with a number behind it where it is taken; `names` holds those that are, and how often each was asked for."""
    count = names.get(name, 0)
    names[name] = count + 1
    return _unique(f"{name}.{count}", names) if count else name


def _tensor_maps(tensors: Iterable[str], positions: np.ndarray) -> list[schema.TensorMapT]:
    maps = []
    for name, position in zip(tensors, positions, strict=True):
        tensor_map = schema.TensorMapT()
        tensor_map.name, tensor_map.tensorIndex = name, int(position)
        maps.append(tensor_map)
    return maps
