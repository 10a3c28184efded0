"""Conversion of functions to graphs of builtin operations, and the check that a file computes what Keras does."""

import fnmatch
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from mess_runtime import bundle as bundles
from mess_tf.graph import flatbuffer

REDUCED_PRECISION = "TF_SET_ONEDNN_FPMATH_MODE"  # of the environment; useful in training
SHORT_SUM = 32  # products per value; XNNPACK's int8 convolutions of so few are slower than those of float32
FP32, FP16, INT8 = PRECISIONS = bundles.PRECISIONS
# Of float tensors, relative to the largest value; pixels whose two best classes are nearer than this may differ. int8 is judged by mIoU.
TOLERANCE = {FP32: 1e-4, FP16: 3e-2}

Inputs = Mapping[str, tuple[int, ...] | tf.TensorSpec]  # a shape is of float32
Function = Callable[..., Mapping[str, tf.Tensor]]
Tensors = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


class ExportError(RuntimeError):
    """A file that must not be deployed: an op that is not built in, a dynamic shape, or results that differ from Keras."""


def convert(
    function: Function,
    inputs: Inputs,
    precision: str = FP32,
    samples: Callable[[], Iterator[Tensors]] | None = None,
    float_operations: Sequence[str] = (),
) -> flatbuffer.Graph:
    """Converts a function to a graph with static shapes and builtin ops only.

    Args:
      function: takes tensors by name, returns a dict of tensors.
      inputs: name to shape, of float32, or to type and shape.
      precision: `fp32`; `fp16`: weights of half the size; `int8`: weights and activations, float32 in and out.
      samples: for int8: gives the inputs that the ranges of activations are taken from.
      float_operations: for int8: patterns (`*block4c_expand*`) of the tensors whose operations stay in float32 too, see `_in_float`.

    Raises:
      ExportError: if it cannot be expressed so.
    """
    converter, outputs = converter_of(function, inputs, precision, samples)
    in_float32 = convert(function, inputs) if precision == INT8 else None
    weighted = in_float32 is not None and any(flatbuffer.products(operation) for operation in in_float32.operations)
    names = _in_float(in_float32, float_operations) if weighted else []
    try:
        if weighted:
            options = tf.lite.experimental.QuantizationDebugOptions(denylisted_nodes=names)
            debugger = tf.lite.experimental.QuantizationDebugger(converter=converter, debug_options=options)
            means = flatbuffer.channel_means(debugger.calibrated_model, ([sample[name] for name in sorted(inputs)] for sample in samples()))
            debugger.calibrated_model = flatbuffer.with_corrected_biases(debugger.calibrated_model, means, names)
            content = debugger.get_nondebug_quantized_model()
        else:
            content = converter.convert()
    except Exception as error:
        raise ExportError(f"conversion failed: {error}") from error
    graph = flatbuffer.with_broadcasts(flatbuffer.read(content, sorted(inputs), outputs))
    if found := flatbuffer.problems(graph):
        raise ExportError(f"ops: must be builtin, without SPACE_TO_BATCH_ND, and of static shape, got {found}")
    return graph


def _in_float(graph: flatbuffer.Graph, patterns: Sequence[str]) -> list[str]:
    """Names of the tensors whose operations stay in float32 in an int8 network: at its beginning, and those that match a pattern.

    int8 kernels win where a value sums many products. The first convolutions sum few, on the largest maps: they stay in float32 up to the
    smallest map among them, which is the one that is quantised.
    """
    names = [tensor.description.name.decode() for operation in graph.operations for tensor in operation.outputs]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ExportError(f"float_operations: must match tensors of the graph, {pattern!r} matches none; they are like {names[-1]!r}")
    kept = {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    if bundles.IMAGE in graph.inputs:
        products = [(operation, flatbuffer.products(operation)) for operation in graph.operations]
        short = itertools.takewhile(lambda each: each[1] <= SHORT_SUM, products)
        if maps := [operation.outputs[0] for operation, count in short if count]:
            beginning = flatbuffer.cut(graph, graph.inputs, {"smallest": min(maps, key=lambda tensor: math.prod(tensor.shape))})
            kept |= {tensor.description.name.decode() for operation in beginning.operations for tensor in operation.outputs}
    return [name for name in names if name in kept]


def converter_of(
    function: Function, inputs: Inputs, precision: str, samples: Callable[[], Iterator[Tensors]] | None
) -> tuple[tf.lite.TFLiteConverter, list[str]]:
    """A converter, and the names of the outputs in its order."""
    specs = {
        name: tf.TensorSpec(*((each.shape, each.dtype) if isinstance(each, tf.TensorSpec) else (each, tf.float32)), name=name)
        for name, each in inputs.items()
    }
    concrete = tf.function(lambda **tensors: function(**tensors), autograph=False).get_concrete_function(**specs)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if precision == FP16:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_types = [tf.float16]
    if precision == INT8:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.representative_dataset = lambda: ([sample[name] for name in sorted(inputs)] for sample in samples())
    return converter, sorted(concrete.structured_outputs)


def _mismatch(text: str) -> ExportError:
    mode = os.environ.get(REDUCED_PRECISION)
    return ExportError(f"{text}; {REDUCED_PRECISION}={mode} makes Keras itself inexact: export without it" if mode else text)


@functools.cache
def pixels(shape: tuple[int, int, int, int], dtype: tf.DType = tf.float32) -> flatbuffer.Graph:
    """uint8 `image` to `image` of another type."""
    return convert(lambda image: {bundles.IMAGE: tf.cast(image, dtype)}, {bundles.IMAGE: tf.TensorSpec(shape, tf.uint8)})


def check_parity(content: bytes, inputs: Tensors, expected: Tensors, logits: Tensors, tolerance: float = TOLERANCE[FP32]) -> None:
    """Raises ExportError if a file with one signature, or its signature `full`, does not compute what Keras does.

    Args:
      content: the .tflite.
      inputs: by name.
      expected, logits, tolerance: see `check_outputs`.
    """
    check_outputs(run_signature(content, inputs), expected, logits, tolerance)


def check_outputs(got: Tensors, expected: Tensors, logits: Tensors, tolerance: float = TOLERANCE[FP32]) -> None:
    """Raises ExportError if outputs are not what Keras computes.

    Args:
      got: outputs of a file, by name.
      expected: outputs of Keras, by name.
      logits: the logits float32 [1, h, w, C] behind each mask, by the mask's name.
      tolerance: see TOLERANCE.
    """
    for name, value in {**{f"the logits of {name}": value for name, value in logits.items()}, **expected}.items():
        check_finite(name, value)
    for name, value in expected.items():
        if name in logits:
            best = np.sort(tf.image.resize(logits[name], value.shape[1:]).numpy(), axis=-1)
            tie = best[..., -1] - best[..., -2] <= tolerance * max(1.0, np.abs(best).max())
            wrong = int(((got[name] != value) & ~tie).sum())
            if wrong:
                raise _mismatch(f"{name}: {wrong} pixels differ from Keras beyond ties")
        elif value.dtype == np.int32:
            if np.abs(got[name] - value).max() > 10 * tolerance * expected[name.replace(bundles.CONFIDENT_PIXELS, bundles.MASK)].size:
                raise _mismatch(f"{name}: Keras counts {value.tolist()}, the file {got[name].tolist()}")
        elif not np.abs(got[name] - value).max() <= tolerance * max(1.0, np.abs(value).max()):  # which a NaN is not either
            raise _mismatch(f"{name}: differs from Keras by {np.abs(got[name] - value).max():.2g}")


def check_finite(name: str, value: Any) -> None:
    """Raises ExportError unless all that Keras computes is finite."""
    wrong = int(np.size(value) - np.isfinite(value).sum())
    if wrong:
        raise ExportError(f"{name}: must be finite, but {wrong} of {np.size(value)} values that Keras computes are not")


def run_signature(content: bytes, inputs: Tensors) -> dict[str, np.ndarray]:
    """Runs the only signature of a file, or the one called `full`."""
    interpreter = Interpreter(model_content=content, num_threads=os.cpu_count())
    signatures = interpreter.get_signature_list()
    return interpreter.get_signature_runner(bundles.FULL if bundles.FULL in signatures else next(iter(signatures)))(**inputs)
