"""Original networks that others wrote: read from files, checked, and brought into the one form that this project works with."""

import importlib
import os
import re
import zipfile
from collections.abc import Iterator, Sequence

import keras
import numpy as np
from absl import flags

from mess_runtime.bundle import check
from mess_tf.network.costs import Node, graph_nodes
from mess_tf.network.layers import LogProbability, TwoClasses

# What inputs and outputs are called beside the names of layers, in segments, heads and files.
_RESERVED = re.compile(r"image|pixels|logits|mask|confident_pixels|sure|answer|cells|tap\..*|(exit\d+|final)\..*|.*:.*")
HALF = ("float16", "bfloat16")


def allow_flags() -> None:
    """Does what the flags --import and --unsafe_loading ask for, see `allow`."""
    allow(flags.FLAGS["import"].value, flags.FLAGS.unsafe_loading)


_allowed: tuple[tuple[str, ...], bool] = (), False


def allowed() -> tuple[tuple[str, ...], bool]:
    """What `allow` was last given, for another process."""
    return _allowed


def allow(imports: Sequence[str], unsafe_loading: bool) -> None:
    """Lets networks with custom classes be loaded.

    Args:
      imports: modules that register them.
      unsafe_loading: whether Lambda layers may run the code that they carry.

    Raises:
      ValueError: a module that cannot be imported.
    """
    global _allowed
    _allowed = tuple(imports), unsafe_loading
    for module in imports:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"--import: must name modules that Python finds (see PYTHONPATH), got {module!r}: {error}") from error
    if unsafe_loading:
        keras.config.enable_unsafe_deserialization()


def load_original(path: str) -> keras.Model:
    """Reads a .keras file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: Keras cannot read it; where a custom class or a Lambda is why, the message says what to do.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"backbone.weights: must be an existing file, got {path!r}")
    check(not (problem := _no_keras_file(path)), "backbone.weights", "a file that Keras' model.save(NAME.keras) made", f"{path}, {problem}")
    try:
        return keras.models.load_model(path, compile=False)
    except Exception as error:  # the file's classes and Keras raise what they like
        text, hint = str(error), ""
        if unknown := re.search(r"(?:Could not locate|Unknown) (?:class|function|layer|object)?:? ?'(.+?)'", text):
            text = f"it does not know {unknown[1]!r}"
            hint = "; --import=MODULE imports the module that registers it with keras.saving.register_keras_serializable"
        elif "Lambda" in text and "safe_mode" in text:
            text = "a Lambda layer carries Python code"
            hint = "; if you trust the file, --unsafe_loading runs it; better is a layer class of your own and --import=MODULE"
        raise ValueError(f"backbone.weights: Keras cannot load {path!r}: {text}{hint}") from error


def _no_keras_file(path: str) -> str:
    """What a file is that is no archive of a network; Keras says that it is not there."""
    if os.path.isdir(path):
        return "a folder"
    try:
        with zipfile.ZipFile(path) as archive:
            names = {*archive.namelist()}
    except zipfile.BadZipFile:
        with open(path, "rb") as file:
            start = file.read(8)
        return "an HDF5 file of older versions of Keras: load it and save it again" if start == b"\x89HDF\r\n\x1a\n" else "no ZIP archive"
    missing = [name for name in ("config.json", "model.weights.h5") if name not in names]
    return f"an archive without {' and '.join(missing)}" if missing else ""


def plain_original(model: keras.Model, output: str = "") -> tuple[keras.Model, dict[str, str]]:
    """Brings a network into the form that `MultiExitNetwork` has: one graph, `image` to float32 logits.

    The layers and their weights are used as they are, but for their names and precision: of layers of equal names all but the first, and
    layers with a name that means something else here, are renamed, and what computes in half precision gets Keras' global precision.

    Args:
      model: see `model.convert`.
      output: see `model.convert`.

    Returns:
      The network, and the new names of layers by their old ones.

    Raises:
      ValueError: see `model.convert`.
    """
    if not _is_graph(model):
        raise ValueError(f"model: must be a functional Keras model or a built Sequential, got {type(model).__name__}")
    _check_layers(model)
    _set_precision(model)
    shapes = [tuple(tensor.shape) for tensor in (*model.inputs, *model.outputs)]
    if len(model.inputs) != 1 or len(shapes[0]) != 4 or shapes[0][3] != 3:
        raise ValueError(f"model: must map one image [B, H, W, 3] to one map [B, h, w, C], got inputs and outputs of shapes {shapes}")
    names = _output_names(model)
    renamed = _make_names_unique(model)
    network = flatten(keras.Model(model.inputs[0], model.outputs, name=model.name))
    tensor = _chosen_output(network, names, output, renamed)
    network = keras.Model(network.input, tensor, name=network.name)
    activation = _last_activation(network)
    if tensor.shape[-1] == 1:
        if activation == "softmax":
            raise ValueError("model: must not end in a softmax over one channel, which is 1 everywhere")
        network = keras.Model(network.input, TwoClasses(activation == "sigmoid")(tensor), name=network.name)
    elif activation:
        network = keras.Model(network.input, LogProbability()(tensor), name=network.name)
    return network, renamed


def _is_graph(operation) -> bool:
    """Whether the layers inside are known: a functional model, or a Sequential that has been built."""
    if isinstance(operation, keras.Sequential):
        return operation.built
    return isinstance(operation, keras.Model) and hasattr(operation, "operations")


def _check_layers(model: keras.Model) -> None:
    first = [layer.name for layer in _layers(model) if getattr(layer, "data_format", None) == "channels_first"]
    if first:
        raise ValueError(f"model: must be channels_last throughout, these layers are channels_first: {first}")
    half = [layer.name for layer in _layers(model) if layer.quantization_mode or any(v.dtype in HALF for v in layer.weights)]
    if half:
        raise ValueError(f"model: must have float32 weights (it may compute in mixed precision), those of these layers are not: {half}")
    wrong = [layer.name for layer in _layers(model) if not all(np.isfinite(value).all() for value in layer.get_weights())]
    if wrong:
        raise ValueError(f"model: must have finite weights, those of these layers are not: {wrong}")


def _layers(model: keras.Model) -> list[keras.layers.Layer]:
    """All layers, those inside models and custom layers too."""
    return [layer for layer in model._flatten_layers(include_self=False) if not isinstance(layer, keras.Model)]


def _set_precision(model: keras.Model) -> None:
    """What was saved to compute in half precision computes as Keras' global policy says: float32 but in training of other precision."""
    policy = keras.config.dtype_policy()
    for layer in _layers(model):
        if layer.compute_dtype in HALF:
            layer.dtype_policy = policy
    for operation, _ in _operations(model):
        if getattr(operation, "dtype", None) in HALF and not isinstance(operation, keras.layers.Layer):
            operation.dtype = policy.compute_dtype  # keras.ops.cast


def _operations(model: keras.Model, parent: str = "") -> Iterator[tuple[keras.Operation, str]]:
    """Every operation that is no model, with the name of the nested model that it is in."""
    for operation in model.layers if isinstance(model, keras.Sequential) else model.operations:
        if _is_graph(operation):
            yield from _operations(operation, operation.name)
        else:
            yield operation, parent


def _make_names_unique(model: keras.Model) -> dict[str, str]:
    """Renames layers in place; returns the new name of each old one that only one layer had."""
    named = {id(operation): (operation, parent) for operation, parent in _operations(model)}
    named = [each for each in named.values() if not isinstance(each[0], keras.layers.InputLayer)]
    counts: dict[str, int] = {}
    for operation, _ in named:
        counts[operation.name] = counts.get(operation.name, 0) + 1
    taken, renamed = {*counts}, {}
    seen: set[str] = set()
    for operation, parent in named:
        old = operation.name
        if old in seen or _RESERVED.fullmatch(old):
            base = re.sub(r"\W", "_", f"{parent or 'layer'}_{old}")
            new = next(name for name in (base, *(f"{base}_{i}" for i in range(1, len(named) + 2))) if name not in taken)
            taken.add(new)
            operation.name = new
            if counts[old] == 1:
                renamed[old] = new
        seen.add(old)
    return renamed


def flatten(model: keras.Model) -> keras.Model:
    """Puts the layers of nested models into the outer graph, so that cut points inside them are seen; the input becomes `image`.

    The names of all layers must differ.
    """

    def conversion(operation) -> bool:  # what inlining a nested model puts in front of it
        return type(operation).__name__ == "ConvertToTensor"

    def call(operation, *args, **kwargs):
        if conversion(operation):
            return args[0]
        return operation.call(args[0] if args else kwargs["inputs"]) if _is_graph(operation) else operation(*args, **kwargs)

    while True:
        image = keras.tree.map_structure(lambda t: keras.Input(t.shape[1:], name="image"), model.input)
        model = keras.models.clone_model(model, input_tensors=image, clone_function=lambda layer: layer, call_function=call)
        if not any(_is_graph(operation) or conversion(operation) for operation in model.operations):
            return model


def _output_names(model: keras.Model) -> list[str]:
    """What each output is called: its key where the outputs are a dict, else the layer that makes it."""
    outputs = None if isinstance(model, keras.Sequential) else model.output
    keys = {id(tensor): key for key, tensor in outputs.items()} if isinstance(outputs, dict) else {}
    return [keys.get(id(tensor), tensor._keras_history.operation.name) for tensor in model.outputs]


def _chosen_output(network: keras.Model, names: Sequence[str], output: str, renamed: dict[str, str]) -> keras.KerasTensor:
    """The map of logits: the only output, the one called `output`, or what the layer of that name makes."""
    tensors = network.outputs
    described = ", ".join(f"{name!r} {tuple(tensor.shape)}" for name, tensor in zip(names, tensors, strict=True))
    shapes = [tuple(tensor.shape) for tensor in (*network.inputs, *tensors)]
    required = "model: must map one image [B, H, W, 3] to one map [B, h, w, C]"
    maps = {node.name: node.output for node in graph_nodes(network) if _is_map(node.output)}
    if not output:
        if len(tensors) > 1:
            raise ValueError(f"{required}, got inputs and outputs of shapes {shapes}; backbone.output=NAME chooses one: {described}")
        if not _is_map(tensors[0]):
            hint = f"; backbone.output=NAME takes the map that a layer makes, the last one is {[*maps][-1]!r}" if maps else ""
            raise ValueError(f"{required}, got inputs and outputs of shapes {shapes}{hint}")
        return tensors[0]
    chosen = dict(zip(names, tensors, strict=True)).get(output, maps.get(renamed.get(output, output)))
    if chosen is None or not _is_map(chosen):
        known = [name for name in names if name not in maps] + list(maps)[:0:-1]
        raise ValueError(f"backbone.output: must name an output or layer that makes a map [B, h, w, C], like {known[:8]}, got {output!r}")
    return chosen


def _is_map(tensor: keras.KerasTensor) -> bool:
    return len(tensor.shape) == 4 and tensor.shape[-1] is not None and "float" in tensor.dtype


def _last_activation(model: keras.Model) -> str:
    """`softmax` or `sigmoid` if one is applied in or after the last layer that has weights, else nothing."""
    nodes: dict[str, Node] = {node.name: node for node in graph_nodes(model)}
    *_, node = nodes.values()
    while True:
        applied = getattr(node.operation, "activation", None)
        names = [getattr(each, "__name__", type(each).__name__).lower() for each in (applied, type(node.operation))]
        for activation in ("softmax", "sigmoid"):
            if any(name.startswith(activation) for name in names):
                return activation
        if getattr(node.operation, "weights", ()) or len(node.inputs) != 1:
            return ""
        node = nodes[node.inputs[0]]
