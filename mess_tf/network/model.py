"""The multi-exit network: an original network with early exits, its sub-models, and the segments between chosen exits."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence

import keras
import numpy as np

from mess_tf.configs import Config, HeadSpec, with_own_original
from mess_tf.files import best_weights, read_arrays, trained_weights, write_arrays
from mess_tf.network.backbones import build_backbone
from mess_tf.network.costs import graph_nodes
from mess_tf.network.exits import TAP, ExitPoint, build_head, build_rest, copy_rest, final_point, find_exit_points
from mess_tf.network.layers import dilate_directly
from mess_tf.network.originals import load_original, plain_original

FINAL = "final.original"


@dataclasses.dataclass
class MultiExitNetwork:
    """An original network and heads on its taps. Candidates are named `exitK.HEAD`; the original's own output is `final.original`.

    Attributes:
      original: functional model, RGB float32 [B, H, W, 3] in 0..255 to raw logits float32 [B, h, w, C].
      exit_points: where early exits can be, shallow to deep.
      heads: candidate name to functional model, taps to raw logits.
      input_size: (height, width) in pixels that heads must fit; None if `original` has a size of its own.
      always: names of layers whose outputs `features` gives whatever is asked for.
    """

    original: keras.Model
    exit_points: tuple[ExitPoint, ...]
    heads: dict[str, keras.Model] = dataclasses.field(default_factory=dict)
    input_size: tuple[int, int] | None = None
    always: tuple[str, ...] = ()

    def __post_init__(self):
        dilate_directly(self.original)

    @property
    def num_classes(self) -> int:
        return self.original.output.shape[-1]

    @property
    def candidates(self) -> list[str]:
        """All candidates, shallow to deep, the original last."""
        return [*self.heads, FINAL]

    def add_heads(self, specs: Sequence[HeadSpec], momentum: float) -> None:
        """Puts each of `specs` at every exit point. A head of the same name that is there already is kept as it is, any other goes.

        Raises:
          ValueError: if a head does not fit; the heads stay as they were.
        """
        self.heads = self._heads([(point, spec) for point in self.exit_points for spec in specs], momentum)

    def part(self, names: Sequence[str], always: Sequence[str], momentum: float) -> "MultiExitNetwork":
        """The same original with some heads only, by name; those that are here are shared, others are built.

        The graph behind `features`, and with it every bit, is that of the network with all heads if `always` are the taps of these.
        """
        points = {point.name: point for point in self.exit_points}
        places = [(points[exit_name], HeadSpec.parse(head)) for exit_name, _, head in (name.partition(".") for name in names)]
        return MultiExitNetwork(self.original, self.exit_points, self._heads(places, momentum), self.input_size, tuple(always))

    def _heads(self, places: Sequence[tuple[ExitPoint, HeadSpec]], momentum: float) -> dict[str, keras.Model]:
        heads: dict[str, keras.Model] = {}
        for point, spec in places:
            name = f"{point.name}.{spec.name}"
            if name in self.heads:
                heads[name] = self.heads[name]
            elif spec.kind == "rest":
                heads[name] = build_rest(self.original, point, momentum, self.input_size)
            else:
                heads[name] = build_head(spec, point, self.num_classes, momentum)
            dilate_directly(heads[name])
        return heads

    def taps(self, candidate: str) -> tuple[str, ...]:
        """Names of the layers whose outputs a candidate reads; for the original, its last layer."""
        if candidate == FINAL:
            return (graph_nodes(self.original)[-1].name,)
        if candidate not in self.heads:
            raise KeyError(f"candidate: must be one of {self.candidates}, got {candidate!r}")
        return tuple(tensor.name.removeprefix(TAP) for tensor in self.heads[candidate].inputs)

    def save_weights(self, path: str, dtype: str = "float32", original: bool = True) -> None:
        """Writes all weights of the original, or not, and the heads to one .npz file, atomically; `dtype` float16 halves it."""
        kept = [(name, each) for name, each in self._variables() if original or not name.startswith(f"{FINAL}/")]
        write_arrays(path, **{name: variable.numpy().astype(dtype) for name, variable in kept})

    def load_weights(self, path: str, other_heads: bool = False) -> None:
        """Reads a file of `save_weights` into a network of the same candidates.

        Args:
          path: of the file.
          other_heads: the file may lack heads, which then stay as they are (those that are the rest of the original start from its weights
            in the file), and hold others, which are left out.

        Raises:
          ValueError: if a weight is missing, unknown or of another shape; nothing is loaded then.
        """
        variables, saved = self._fitting(path, other_heads)
        for name, variable in variables.items():
            variable.assign(saved[name])
        for name, head in self.heads.items():
            if name.endswith(".rest") and not any(variable.startswith(f"{name}/") for variable in variables):
                copy_rest(self.original, head)

    def check_weights(self, path: str, other_heads: bool = False) -> None:
        """Raises what `load_weights` would raise, and loads nothing."""
        self._fitting(path, other_heads)

    def _fitting(self, path: str, other_heads: bool) -> tuple[dict[str, keras.Variable], dict[str, np.ndarray]]:
        """The variables that a file has values for, and these values."""
        saved = read_arrays(path)
        variables = dict(self._variables())
        if other_heads:
            shared = {name.split("/")[0] for name in saved} & {*self.heads} | {FINAL}
            saved, variables = ({name: each[name] for name in each if name.split("/")[0] in shared} for each in (saved, variables))
        wrong = [name for name in variables if name not in saved or saved[name].shape != variables[name].shape]
        unknown = sorted(saved.keys() - variables.keys())
        if wrong or unknown:
            raise ValueError(f"{path}: does not fit this network; missing or of another shape: {wrong[:3]}, unknown: {unknown[:3]}")
        return variables, saved

    def weights_sha256(self) -> str:
        """SHA-256 of all weights of the original and the heads, see `weights_sha256`."""
        return weights_sha256({name: variable.numpy() for name, variable in self._variables()})

    def _variables(self) -> list[tuple[str, keras.Variable]]:
        """Every weight with a name that does not depend on how many layers a process has made before."""
        parts = {FINAL: self.original} | self.heads
        return [
            (f"{part}/{index:03d}.{variable.name}", variable)
            for part, model in parts.items()
            for index, variable in enumerate(model.weights)
        ]

    def features(self, candidates: Iterable[str], others: Iterable[str] = ()) -> keras.Model:
        """Image to a dict of every tensor that these candidates read, and others, by layer name. Computes nothing deeper than they need."""
        names = dict.fromkeys([*self.always, *(name for candidate in candidates for name in self.taps(candidate)), *others])
        tensors = {node.name: node.output for node in graph_nodes(self.original)}
        return keras.Model(self.original.input, {name: tensors[name] for name in names}, name="features")

    def head_logits(self, candidate: str, features: dict, training: bool = False):
        """Applies one candidate to features (see `features`): raw logits float32 [B, h, w, C] at the head's own resolution."""
        tensors = [features[name] for name in self.taps(candidate)]
        return tensors[0] if candidate == FINAL else self.heads[candidate](tensors, training=training)

    def logit_bias(self, candidate: str) -> keras.Variable | None:
        """The bias, float32 [C], by which a candidate's logits can be moved; None if the layer that makes them has none."""
        nodes = {node.name: node for node in graph_nodes(self.original if candidate == FINAL else self.heads[candidate])}
        *_, node = nodes.values()
        while not getattr(node.operation, "weights", ()) and (len(node.inputs) == 1 or isinstance(node.operation, keras.layers.Add)):
            # such as resizing, a softmax, or a sum, which any of its terms can move
            node = nodes[node.inputs[0]]
        bias, activation = (getattr(node.operation, name, None) for name in ("bias", "activation"))
        moves = activation in (None, keras.activations.linear, keras.activations.softmax)
        return bias if moves and bias is not None and tuple(bias.shape) == (self.num_classes,) else None

    def submodel(self, candidates: Sequence[str]) -> keras.Model:
        """Image to a dict of the raw logits of some candidates: the full model, or the sub-model of one exit."""
        features = self.features(candidates)
        return keras.Model(features.input, {name: self.head_logits(name, features.output) for name in candidates}, name="submodel")

    def segments(self, candidates: Sequence[str]) -> list[keras.Model]:
        """Splits the network into one segment per chosen candidate; chained, they compute what `submodel(candidates)` computes.

        Args:
          candidates: one per exit, shallow to deep.

        Returns:
          Functional models, dict to dict. Inputs: `image`, or the tensors of earlier segments that this one reads.
          Outputs: `logits` of its candidate, and the tensors that later segments or heads still need and no earlier one has handed over.
        """
        nodes = {node.name: node for node in graph_nodes(self.original)}
        image = next(name for name, node in nodes.items() if not node.inputs)
        done: set[str] = {image}
        owned, read = [], []  # per segment: nodes computed, nodes read from before
        for candidate in candidates:
            new, stack = set(), list(self.taps(candidate))
            inputs = {name for name in stack if name in done}
            while stack:
                name = stack.pop()
                if name not in done and name not in new:
                    new.add(name)
                    stack.extend(nodes[name].inputs)
                    inputs.update(source for source in nodes[name].inputs if source in done)
            owned.append(new)
            read.append(sorted(inputs, key=list(nodes).index))
            done |= new
        segments = []
        for k, candidate in enumerate(candidates):
            handed = [name for name in nodes if name in owned[k] and any(name in later for later in read[k + 1 :])]
            inputs = {
                name: keras.Input(batch_shape=nodes[name].output.shape, dtype=nodes[name].output.dtype, name=name) for name in read[k]
            }
            wanted = dict.fromkeys([*self.taps(candidate), *handed])
            inner = keras.Model([nodes[n].output for n in read[k]], [nodes[n].output for n in wanted if n in owned[k]], name="features")
            made = dict(zip([n for n in wanted if n in owned[k]], keras.tree.flatten(inner([inputs[n] for n in read[k]])), strict=True))
            logits = self.head_logits(candidate, inputs | made)
            segments.append(keras.Model(inputs, {"logits": logits} | {name: made[name] for name in handed}, name=candidate))
        return segments


def convert(model: keras.Model, exits: int | Sequence[str], input_size: tuple[int, int], output: str = "") -> MultiExitNetwork:
    """Turns any functional segmentation network into a multi-exit network; its layers and weights are used as they are.

    Layers of equal names, and those with a name that means something else here (such as `image` or `logits`), are renamed, in `model` too.
    What `model` computes in half precision, the network computes in Keras' global precision.

    Args:
      model: functional or a built Sequential, one image [B, H, W, 3] to one map [B, h, w, C] (any h, w; it is resized
        to the image bilinearly). The image holds 0..255: a network that wants something else starts with a layer that makes it so. The
        map holds logits, or probabilities if a softmax or sigmoid follows the last layer with weights. One channel is the logit or the
        probability of the second of two classes.
      exits: number of exits, the final one included, of which the early ones are put at equal workload, see `exits.find_exit_points`, or
        the names of the layers to put early exits at.
      input_size: (height, width) in pixels for which the workload is counted.
      output: the key of the map among several outputs, or the name of the layer that makes it; may be empty if there is one output.

    Returns:
      A network without early heads (see `MultiExitNetwork.add_heads`).

    Raises:
      ValueError: for a model that is not functional, has other inputs or outputs, layers that are channels_first or weights that are not
        finite and float32, was made for another size only, or has too few cut points; for fewer than 2 exits.
    """
    original, renamed = plain_original(model, output)
    size = tuple(original.input.shape[1:3])
    if any(side not in (None, wanted) for side, wanted in zip(size, input_size, strict=True)):
        fitting = ",".join(str(side or wanted) for side, wanted in zip(size, input_size, strict=True))
        hint = f"--set data.input_size=[{fitting}] is that; keras.Input((None, None, 3)) takes any"
        raise ValueError(f"input_size: must be {size}, the only one that {model.name} takes, got {tuple(input_size)}; {hint}")
    exits = exits if isinstance(exits, int) else [renamed.get(name, name) for name in exits]
    return MultiExitNetwork(original, find_exit_points(original, exits, input_size), input_size=input_size)


def build_network(config: Config, num_classes: int, own: keras.Model | None = None) -> MultiExitNetwork:
    """Builds the backbone with the original network's own head (`exits.final_head`), or loads a whole network, and converts it.

    Args:
      config: of the training.
      num_classes: of the data.
      own: the network of a .keras file, where that is read already.

    Returns:
      A network without early heads.

    Raises:
      FileNotFoundError, ValueError: for a .keras file that is not there, cannot be read, or has other classes than the data.
    """
    if config.backbone.name == "keras_file":
        original = own or load_original(config.backbone.weights)
    else:
        backbone = build_backbone(config.backbone)
        point = final_point(backbone, config.data.input_size)
        head = build_head(HeadSpec.parse(config.exits.final_head), point, num_classes, config.backbone.batch_norm_momentum)
        tensors = {node.name: node.output for node in graph_nodes(backbone)}
        logits = head([tensors[tensor.name.removeprefix(TAP)] for tensor in head.inputs])
        original = keras.Model(backbone.input, logits, name=config.backbone.name)
    try:
        network = convert(original, config.exits.layers or config.exits.count, config.data.input_size, config.backbone.output)
    except ValueError as error:
        if config.backbone.name != "keras_file":
            raise
        path = repr(config.backbone.weights)
        names_field = str(error).startswith(("exits.", "backbone."))
        raise ValueError(f"{error}; the network is {path}" if names_field else f"backbone.weights: {path}: {error}") from error
    if network.num_classes != num_classes:
        path, received = config.backbone.weights, network.num_classes
        raise ValueError(f"backbone.weights: {path!r} must have the data's {num_classes} classes, got {received}")
    training_size, sides = config.data.training_size, tuple(network.original.input.shape[1:3])
    if any(side not in (None, wanted) for side, wanted in zip(sides, training_size, strict=True)):
        raise ValueError(f"data.crop_size: must be (0, 0) with a network that takes images of {sides} only, got {config.data.crop_size}")
    if config.backbone.input_scale == 1:
        return network
    if config.data.training_size != config.data.input_size:
        raise ValueError(f"data.crop_size: must be (0, 0) with another backbone.input_scale than 1, got {config.data.crop_size}")
    image = keras.Input((*config.data.input_size, 3), name="image")
    scaled = [32 * max(1, round(config.backbone.input_scale * side / 32)) for side in config.data.input_size]
    resized = keras.Model(image, network.original(keras.ops.image.resize(image, scaled)), name=original.name)
    return convert(resized, [point.tap.name for point in network.exit_points], config.data.input_size)  # the same exits at every scale


def weights_sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the weights that a network has or that a file of `save_weights` holds, in lower-case hexadecimal."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(name.encode() + array.astype(np.float32).tobytes())
    return digest.hexdigest()


def without_weights(config: Config, workdir: str | os.PathLike) -> Config:
    """The same configuration of a network whose weights come from the work folder: those of the backbone are not read, nor downloaded."""
    config = with_own_original(config, workdir)
    if config.backbone.name == "keras_file":
        return config
    return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, weights="none"))


def load_network(workdir: str | os.PathLike, config: Config, num_classes: int) -> MultiExitNetwork:
    """Rebuilds a trained network: with all candidate heads after stage 2, with the plain ones after stage 1."""
    path = trained_weights(workdir)
    specs = config.exits.head_specs if path == best_weights(workdir, "stage2") else (HeadSpec.parse(config.exits.plain_head),)
    network = build_network(without_weights(config, workdir), num_classes)
    network.add_heads(specs, config.backbone.batch_norm_momentum)
    network.load_weights(path)
    return network
