"""Export to TFLite: submodels to measure, and the bundle to deploy.

`python -m mess_tf.export_tflite --workdir=W --candidates` writes WORKDIR/candidates/: per exit `prefix.EXIT` (image to the tensors that
its heads read), per candidate `head.EXIT.HEAD` (those tensors to the mask and its logits), and per size of logits the exit policy alone.
Their latencies add up to those of any deployment. Beside them, `weights.sha256` says of which weights they are, once all are there.

`python -m mess_tf.export_tflite --workdir=W --deployment=deployment.json` writes
  WORKDIR/bundle/           one .tflite with a signature per segment, one per exit alone and one for everything, sharing weights; manifest
  WORKDIR/bundle_original/  the same of the original network alone
  WORKDIR/submodels/        one network per file, for benchmark tools: `alone.EXIT` (image to mask), `segment.EXIT` (as in the bundle) and
                            `logits.EXIT` (image to low-resolution logits, for delegates that know no argmax); `original`
  WORKDIR/examples/         some validation images to try them on

Both take --precision=fp32|fp16|int8. Every file is checked before it is kept.
"""

import contextlib
import csv
import fnmatch
import functools
import io
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging
from ai_edge_litert.interpreter import Interpreter
from PIL import Image

from mess_runtime import bundle as bundles
from mess_tf import configs, graphs, policy
from mess_tf.costs import Cost, graph_nodes, model_cost, with_input_size
from mess_tf.data import Examples, open_split, palette, resize_image, resize_label
from mess_tf.evaluate import accuracies, confusion_matrices
from mess_tf.exits import TAP
from mess_tf.files import Configuration, Deployment, ExitChoice, made_by
from mess_tf.model import FINAL, MultiExitNetwork, load_network

CANDIDATES, WEIGHTS = "candidates", "weights.sha256"
EXAMPLES = 8
CALIBRATION_IMAGES = 64
REDUCED_PRECISION = "TF_SET_ONEDNN_FPMATH_MODE"  # of the environment; useful in training
SHORT_SUM = 32  # products per value; XNNPACK's int8 convolutions of so few are slower than those of float32
FP32, FP16, INT8 = PRECISIONS = bundles.PRECISIONS
# Of float tensors, relative to the largest value; pixels whose two best classes are nearer than this may differ. int8 is judged by mIoU.
TOLERANCE = {FP32: 1e-4, FP16: 3e-2}

Function = Callable[..., Mapping[str, tf.Tensor]]
Tensors = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


class ExportError(RuntimeError):
    """A file that must not be deployed: an op that is not built in, a dynamic shape, or results that differ from Keras."""


def tensor_shapes(network: MultiExitNetwork, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """(1, height, width, channels) of every tensor in the original network, by layer name, for images of `size`."""
    return {node.name: tuple(node.output.shape) for node in graph_nodes(with_input_size(network.original, size))}


def logits_size(network: MultiExitNetwork, candidate: str, shapes: Shapes) -> tuple[int, int]:
    """(height, width) of a candidate's logits: those of its shallowest tap."""
    return max(shapes[name][1:3] for name in network.taps(candidate))


def head_cost(network: MultiExitNetwork, candidate: str, shapes: Shapes) -> Cost:
    """Costs of a candidate's head, from its taps to its logits; the original's own head counts as its prefix."""
    if candidate == FINAL:
        return Cost(0, 0, 0)
    return model_cost(network.heads[candidate], {TAP + name: shape[1:3] for name, shape in shapes.items()})


def policy_name(network: MultiExitNetwork, candidate: str, shapes: Shapes, mode: str, fidelity: str) -> str:
    """Name of the submodel from this candidate's logits to `mask`, or to mask and `plain` or `edge` confidence."""
    height, width = logits_size(network, candidate, shapes)
    return f"{mode}{_suffix(fidelity)}.{height}x{width}"


def head_name(candidate: str, fidelity: str) -> str:
    """Name of the submodel from the tensors that a candidate reads to its mask and its logits."""
    return f"head{_suffix(fidelity)}.{candidate}"


def _suffix(fidelity: str) -> str:
    return "" if fidelity == policy.EXACT else f"-{fidelity}"


# === Conversion ===


def convert(
    function: Function,
    inputs: Mapping[str, tuple[int, ...]],
    precision: str = FP32,
    samples: Callable[[], Iterator[Tensors]] | None = None,
    float_operations: Sequence[str] = (),
) -> graphs.Graph:
    """Converts a function to a graph with static shapes and builtin ops only.

    Args:
      function: takes float32 tensors by name, returns a dict of tensors.
      inputs: name to shape.
      precision: `fp32`; `fp16`: weights of half the size; `int8`: weights and activations, float32 in and out.
      samples: for int8: gives the inputs that the ranges of activations are taken from.
      float_operations: for int8: patterns (`*block4c_expand*`) of the tensors whose operations stay in float32 too, see `_in_float`.

    Raises:
      ExportError: if it cannot be expressed so.
    """
    converter, outputs = _converter(function, inputs, precision, samples)
    in_float32 = convert(function, inputs) if precision == INT8 else None
    weighted = in_float32 is not None and any(graphs.products(operation) for operation in in_float32.operations)
    names = _in_float(in_float32, float_operations) if weighted else []
    try:
        if weighted:
            options = tf.lite.experimental.QuantizationDebugOptions(denylisted_nodes=names)
            debugger = tf.lite.experimental.QuantizationDebugger(converter=converter, debug_options=options)
            means = graphs.channel_means(debugger.calibrated_model, ([sample[name] for name in sorted(inputs)] for sample in samples()))
            debugger.calibrated_model = graphs.with_corrected_biases(debugger.calibrated_model, means, names)
            content = debugger.get_nondebug_quantized_model()
        else:
            content = converter.convert()
    except Exception as error:
        raise ExportError(f"conversion failed: {error}") from error
    graph = graphs.read(content, sorted(inputs), outputs)
    if found := graphs.problems(graph):
        raise ExportError(f"ops: must be builtin, without SPACE_TO_BATCH_ND, and of static shape, got {found}")
    return graph


def _in_float(graph: graphs.Graph, patterns: Sequence[str]) -> list[str]:
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
        products = [(operation, graphs.products(operation)) for operation in graph.operations]
        short = itertools.takewhile(lambda each: each[1] <= SHORT_SUM, products)
        if maps := [operation.outputs[0] for operation, count in short if count]:
            beginning = graphs.cut(graph, graph.inputs, {"smallest": min(maps, key=lambda tensor: math.prod(tensor.shape))})
            kept |= {tensor.description.name.decode() for operation in beginning.operations for tensor in operation.outputs}
    return [name for name in names if name in kept]


def _converter(
    function: Function, inputs: Mapping[str, tuple[int, ...]], precision: str, samples: Callable[[], Iterator[Tensors]] | None
) -> tuple[tf.lite.TFLiteConverter, list[str]]:
    """A converter, and the names of the outputs in its order."""
    specs = {name: tf.TensorSpec(shape, tf.float32, name=name) for name, shape in inputs.items()}
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


def check_parity(content: bytes, inputs: Tensors, expected: Tensors, logits: Tensors, tolerance: float = TOLERANCE[FP32]) -> None:
    """Raises ExportError if a file with one signature, or its signature `full`, does not compute what Keras does.

    Args:
      content: the .tflite.
      inputs: by name.
      expected: outputs of Keras, by name.
      logits: the logits float32 [1, h, w, C] behind each mask, by the mask's name.
      tolerance: see TOLERANCE.
    """
    got = run_signature(content, inputs)
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
        elif np.abs(got[name] - value).max() > tolerance * max(1.0, np.abs(value).max()):
            raise _mismatch(f"{name}: differs from Keras by {np.abs(got[name] - value).max():.2g}")


def run_signature(content: bytes, inputs: Tensors) -> dict[str, np.ndarray]:
    """Runs the only signature of a file, or the one called `full`."""
    interpreter = Interpreter(model_content=content, num_threads=os.cpu_count())
    signatures = interpreter.get_signature_list()
    return interpreter.get_signature_runner(bundles.FULL if bundles.FULL in signatures else next(iter(signatures)))(**inputs)


# === Submodels and bundles ===


class Exporter:
    """Writes checked files of one network.

    Attributes:
      network: what is exported.
      size: (height, width) in pixels of its input.
      fidelity: of the policy, see `policy.decide`.
      precision: of the network, see `convert`. In int8 the policy stays in floating point. What does so in files other than fp32 may be
        computed in float16, see `graphs.write`.
      samples: images float32 [1, H, W, 3] that int8 takes its ranges from.
      float_operations: see `convert`.
      shapes: see `tensor_shapes`.
    """

    def __init__(
        self,
        network: MultiExitNetwork,
        size: tuple[int, int],
        fidelity: str = policy.EXACT,
        precision: str = FP32,
        samples: Sequence[np.ndarray] = (),
        float_operations: Sequence[str] = (),
    ):
        self.network, self.size, self.fidelity, self.precision = network, size, fidelity, precision
        self.images, self.float_operations = samples, float_operations
        self.shapes = tensor_shapes(network, size)

    @functools.cached_property
    def samples(self) -> list[dict[str, np.ndarray]]:
        """An image and all tensors that heads read, for each sample image; without sample images, of noise."""
        features_of = tf.function(self.network.features(self.network.candidates), autograph=False)
        noise = np.random.default_rng(0).uniform(0, 255, self.shapes[bundles.IMAGE]).astype(np.float32)
        return [
            {bundles.IMAGE: image} | {name: tensor.numpy() for name, tensor in features_of(image, training=False).items()}
            for image in self.images or [noise]
        ]

    def converted(self, function: Function, names: Sequence[str], precision: str | None = None) -> graphs.Graph:
        """Converts a function of the image or of tensors of the original network."""
        shapes = {name: self.shapes[name] for name in names}
        return convert(function, shapes, precision or self.precision, lambda: iter(self.samples), self.float_operations)

    @functools.cache  # noqa: B019
    def policy(self, height: int, width: int, thresholds: tuple[tuple[float, bool], ...]) -> graphs.Graph:
        """The exit policy on logits of a size: `logits` to `mask` and, with thresholds, `confident_pixels`."""

        def function(logits):
            return policy.decide(logits, self.size, thresholds, self.fidelity)

        return convert(function, {"logits": (1, height, width, self.network.num_classes)})

    def content(self, signatures: Mapping[str, graphs.Graph]) -> bytes:
        """The file of some graphs."""
        return graphs.write(signatures, self.precision != FP32)

    def save(self, path: Path, graph: graphs.Graph) -> bytes:
        """Writes a graph as a file of its own."""
        content = self.content({bundles.SIGNATURE: graph})
        bundles.write_atomically(path, lambda temporary: temporary.write_bytes(content))
        return content

    def prefix(self, folder: Path, exit_name: str) -> graphs.Graph:
        """Image to every tensor that the heads of an exit read."""
        model = self.network.features([name for name in self.network.candidates if name.startswith(f"{exit_name}.")])
        graph = self.converted(lambda image: model(image, training=False), [bundles.IMAGE])
        features = {name: graphs.stored(graph, name) for name in graph.outputs if name not in self.network.taps(FINAL)}
        graph = graphs.cut(graph, graph.inputs, graph.outputs | features)  # logits are handed on as float32
        with _named(f"prefix.{exit_name}"):
            content = self.save(folder / f"prefix.{exit_name}.tflite", graph)
            if self.precision in TOLERANCE:
                inputs = {bundles.IMAGE: self.samples[0][bundles.IMAGE]}
                expected = {name: self.samples[0][name] for name in graph.outputs}
                check_parity(content, inputs, expected, {}, TOLERANCE[self.precision])
        return graph

    def head(self, folder: Path, candidate: str) -> graphs.Graph:
        """The tensors that a candidate reads to its mask and its logits."""
        names = self.network.taps(candidate)
        graph = self.converted(lambda **features: {"logits": self.network.head_logits(candidate, features)}, names)
        graph = graphs.cut(graph, {name: graphs.taken(graph, name) for name in graph.inputs}, graph.outputs)
        graph = graphs.join(graph, self.policy(*logits_size(self.network, candidate, self.shapes), ()), {"logits": "logits"})
        name = head_name(candidate, self.fidelity)
        with _named(name):
            content = self.save(folder / f"{name}.tflite", graph)
            if self.precision in TOLERANCE:
                inputs = {name: self.samples[0][name] for name in names}
                logits = self.network.head_logits(candidate, {name: tf.constant(value) for name, value in inputs.items()})
                self._check(content, inputs, {bundles.MASK: (logits, ())}, {"logits": logits.numpy()})
        return graph

    def policies(self, folder: Path) -> None:
        """Logits to mask alone, and to mask and confidence, for every size of logits: their differences are what a decision costs."""
        for size, candidate in {logits_size(self.network, name, self.shapes): name for name in self.network.candidates}.items():
            example = np.random.default_rng(0).normal(0, 4, (1, *size, self.network.num_classes)).astype(np.float32)
            for mode, thresholds in (("mask", ()), ("plain", ((0.9, False),)), ("edge", ((0.9, True),))):
                name = policy_name(self.network, candidate, self.shapes, mode, self.fidelity)
                with _named(name):
                    content = self.save(folder / f"{name}.tflite", self.policy(*size, thresholds))
                    self._check(content, {"logits": example}, {bundles.MASK: (tf.constant(example), thresholds)}, {})

    def _check(
        self, content: bytes, inputs: Tensors, exits: Mapping[str, tuple[tf.Tensor, Sequence[tuple[float, bool]]]], features: Tensors
    ) -> None:
        """Compares a file with Keras: masks by name with their logits and thresholds, and features."""
        expected = dict(features)
        for mask, (logits, thresholds) in exits.items():
            for name, value in policy.decide(logits, self.size, thresholds, self.fidelity).items():
                expected[mask.replace(bundles.MASK, name)] = value.numpy()
        tolerance = TOLERANCE.get(self.precision, TOLERANCE[FP32])  # of int8, only the policies are compared, which are float32
        check_parity(content, inputs, expected, {mask: logits for mask, (logits, _) in exits.items()}, tolerance)

    def chain(self, candidates: Sequence[str]) -> tuple[list[keras.Model], Function]:
        """The segments of some candidates, and all of them as one function: image to `EXIT.logits` and the features handed on."""
        models = self.network.segments(candidates)

        def function(image):
            tensors, logits = {bundles.IMAGE: image}, {}
            for candidate, model in zip(candidates, models, strict=True):
                tensors |= model({name: tensors[name] for name in model.input}, training=False)
                logits[f"{candidate.partition('.')[0]}.logits"] = tensors.pop("logits")
            return logits | {name: tensor for name, tensor in tensors.items() if name != bundles.IMAGE}

        return models, function

    def quantization_errors(self, candidates: Sequence[str]) -> list[tuple[float, str]]:
        """What int8 does to the network of some candidates: (root mean square error / scale, tensor) of every operation, largest first.

        The error is that of the operation alone, on exact inputs; rounding alone makes 0.29.
        """
        converter, _ = _converter(self.chain(candidates)[1], {bundles.IMAGE: self.shapes[bundles.IMAGE]}, INT8, lambda: iter(self.samples))
        debugger = tf.lite.experimental.QuantizationDebugger(
            converter=converter, debug_dataset=lambda: ([sample[bundles.IMAGE]] for sample in self.samples[:8])
        )
        debugger.run()
        text = io.StringIO()
        debugger.layer_statistics_dump(text)
        rows = csv.DictReader(io.StringIO(text.getvalue()))
        return sorted(((float(row["mean_squared_error"]) ** 0.5 / float(row["scale"]), row["tensor_name"]) for row in rows), reverse=True)

    def deployed(self, configuration: Configuration, input_type: str) -> dict[str, graphs.Graph]:
        """The signatures of a bundle (see `bundles`), and for each exit `logits.EXIT`, image to logits.

        The network is converted once, and every signature is a part of it.
        """
        choices = configuration.exits
        models, function = self.chain([f"{choice.exit}.{choice.head}" for choice in choices])
        whole = self.converted(function, [bundles.IMAGE])
        if input_type == "uint8":
            pixels = tf.TensorSpec(self.shapes[bundles.IMAGE], tf.uint8, name=bundles.IMAGE)
            whole = graphs.join(_cast(pixels), whole, {bundles.IMAGE: "pixels"})
        for choice in choices:
            name = f"{choice.exit}.logits"
            thresholds = () if choice.theta_pix is None else ((choice.theta_pix, configuration.edge_aware),)
            decision = self.policy(*whole.outputs[name].shape[1:3], thresholds)
            whole = graphs.join(whole, decision, {"logits": name}, f"{choice.exit}.")
        image = dict(whole.inputs)
        features = {name: graphs.stored(whole, name) for model in models for name in model.output if name != "logits"}

        def results(exit_name: str) -> dict[str, graphs.Tensor]:
            names = (bundles.MASK, bundles.CONFIDENT_PIXELS)
            return {name: whole.outputs[f"{exit_name}.{name}"] for name in names if f"{exit_name}.{name}" in whole.outputs}

        signatures = {}
        for choice, model in zip(choices, models, strict=True):
            handed = {name: features[name] for name in model.output if name != "logits"}
            given = {name: (image | features)[name] for name in model.input}
            signatures[bundles.segment_signature(choice.exit)] = graphs.cut(whole, given, results(choice.exit) | handed)
        for choice in choices:
            mask = {bundles.MASK: whole.outputs[f"{choice.exit}.{bundles.MASK}"]}
            signatures[bundles.alone_signature(choice.exit)] = graphs.cut(whole, image, mask)
            signatures[f"logits.{choice.exit}"] = graphs.cut(whole, image, {"logits": whole.outputs[f"{choice.exit}.logits"]})
        everything = {f"{choice.exit}.{name}": tensor for choice in choices for name, tensor in results(choice.exit).items()}
        signatures[bundles.FULL] = graphs.cut(whole, image, everything)
        return signatures

    def bundle(
        self,
        folder: Path,
        configuration: Configuration,
        predicted: bundles.Predicted | None,
        classes: Sequence[str],
        input_spec: bundles.InputSpec | None = None,
        examples: Examples | None = None,
    ) -> dict[str, graphs.Graph]:
        """Writes the deployable folder of a configuration. An earlier one is replaced as a whole.

        Args:
          folder: to write.
          configuration: exits, heads, thresholds.
          predicted: what the search expects, if there was a search.
          classes: names.
          input_spec: how images go in; by default float32, stretched to the network's size.
          examples: images to measure the mIoU of each exit on, for the manifest.

        Returns:
          The graphs of `deployed`.

        Raises:
          ExportError: the file differs from Keras, or its segments, one after another, from the network run at a stretch.
        """
        input_spec = input_spec or bundles.InputSpec(*self.size)
        everything = self.deployed(configuration, input_spec.dtype)
        signatures = {name: graph for name, graph in everything.items() if not name.startswith("logits.")}
        content = self.content(signatures)
        with _named(bundles.MODEL):
            logits_of = {choice.exit: everything[f"logits.{choice.exit}"] for choice in configuration.exits}
            self._check_bundle(content, configuration, logits_of, input_spec.dtype)
        mious = measured_miou(content, examples, self.size, input_spec) if examples else {}
        segments = []
        for choice in configuration.exits:
            alone = everything[bundles.alone_signature(choice.exit)]
            segments.append(
                bundles.Segment(
                    exit=choice.exit,
                    head=choice.head,
                    macs=graphs.macs(everything[bundles.segment_signature(choice.exit)]),
                    alone_macs=graphs.macs(alone),
                    alone_sha256=bundles.sha256(self.content({bundles.SIGNATURE: alone})),
                    theta_pix=choice.theta_pix,
                    theta_img=choice.theta_img,
                    edge_aware=configuration.edge_aware,
                    miou=mious.get(choice.exit),
                )
            )
        for before, after in itertools.pairwise(segments):
            if before.alone_macs >= after.alone_macs:
                logging.warning("%s: costs no less than %s: its head is too heavy for its place", before.exit, after.exit)
        maker = made_by()
        manifest = bundles.Manifest(
            created_by=bundles.CreatedBy(maker["mess_tf"], tf.__version__, maker["git_commit"] or "unknown"),
            input=input_spec,
            classes=tuple(classes),
            palette=tuple(tuple(int(value) for value in colour) for colour in palette(len(classes))),
            setting=configuration.setting,
            precision=self.precision,
            fidelity=self.fidelity,
            sha256=bundles.sha256(content),
            size_bytes=len(content),
            predicted=predicted,
            segments=tuple(segments),
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            (fresh / bundles.MODEL).write_bytes(content)
            bundles.write_manifest(fresh, manifest)
            fresh.chmod(0o755)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return everything

    def _check_bundle(self, content: bytes, configuration: Configuration, logits_of: Mapping[str, graphs.Graph], input_type: str) -> None:
        image = self.samples[0][bundles.IMAGE].round().astype(input_type)
        full = run_signature(content, {bundles.IMAGE: image})
        interpreter, tensors = Interpreter(model_content=content, num_threads=os.cpu_count()), {bundles.IMAGE: image}
        for choice in configuration.exits:
            alone = interpreter.get_signature_runner(bundles.alone_signature(choice.exit))(image=image)
            segment = interpreter.get_signature_runner(bundles.segment_signature(choice.exit))
            made = segment(**{name: tensors[name] for name in segment.get_input_details()})
            tensors |= made
            for name, value in made.items():
                same = np.array_equal(value, full.get(f"{choice.exit}.{name}", value))
                if not same or (name == bundles.MASK and not np.array_equal(alone[name], value)):
                    raise ExportError(f"{choice.exit}: {name} of the segments, of the exit alone and of everything at a stretch differ")
        if self.precision in TOLERANCE:
            exits = {}
            for choice in configuration.exits:
                name = f"{choice.exit}.{choice.head}"
                logits = self.network.submodel([name])(tf.constant(image, tf.float32), training=False)[name]
                alone = self.content({bundles.SIGNATURE: logits_of[choice.exit]})
                check_parity(alone, {bundles.IMAGE: image}, {"logits": logits.numpy()}, {}, TOLERANCE[self.precision])
                thresholds = () if choice.theta_pix is None else ((choice.theta_pix, configuration.edge_aware),)
                exits[f"{choice.exit}.{bundles.MASK}"] = (logits, thresholds)
            self._check(content, {bundles.IMAGE: image}, exits, {})


@contextlib.contextmanager
def _named(file: str) -> Iterator[None]:
    """Puts the file's name in front of an ExportError."""
    try:
        yield
    except ExportError as error:
        raise ExportError(f"{file}: {error}") from error


def _cast(pixels: tf.TensorSpec) -> graphs.Graph:
    """uint8 `image` to float32 `pixels`."""
    function = tf.function(lambda image: {"pixels": tf.cast(image, tf.float32)}).get_concrete_function(pixels)
    content = tf.lite.TFLiteConverter.from_concrete_functions([function]).convert()
    return graphs.read(content, [bundles.IMAGE], ["pixels"])


def measured_miou(content: bytes, examples: Examples, size: tuple[int, int], input_spec: bundles.InputSpec) -> dict[str, float]:
    """mIoU (0..1) of every exit of a bundle's file over a split."""
    run = Interpreter(model_content=content, num_threads=os.cpu_count()).get_signature_runner(bundles.FULL)

    def predict(image: np.ndarray) -> dict[str, np.ndarray]:
        outputs = run(image=resize_image(image, size).numpy().round().astype(input_spec.dtype))
        parts = {name.rpartition("."): value for name, value in outputs.items()}
        return {name: resize_label(mask, image.shape[1:3]).numpy() for (name, _, kind), mask in parts.items() if kind == bundles.MASK}

    return {name: accuracy.miou for name, accuracy in accuracies(confusion_matrices(predict, examples)).items()}


def calibration_images(config: configs.Config, count: int = CALIBRATION_IMAGES) -> list[np.ndarray]:
    """Evenly picked training images, float32 [1, H, W, 3], for the ranges of int8."""
    examples = open_split(config.data, config.data.train_split)
    picked = np.linspace(0, len(examples) - 1, min(count, len(examples))).round().astype(int)
    return [resize_image(examples.load(i)[0][None], config.data.input_size).numpy() for i in picked]


def export_candidates(exporter: Exporter, folder: Path) -> None:
    """Writes every submodel that the search needs a latency of, and then the hash of the network's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).unlink(missing_ok=True)
    network = exporter.network
    exits = [point.name for point in network.exit_points] + ["final"]
    reached = {name: graphs.macs(exporter.prefix(folder, name)) for name in exits}
    exporter.policies(folder)
    cost = {}
    for i, candidate in enumerate(network.candidates, 1):
        exit_name, _, head = candidate.partition(".")
        cost[exit_name, head] = reached[exit_name] + graphs.macs(exporter.head(folder, candidate))
        logging.log_every_n_seconds(logging.INFO, "export: head %d of %d", 10, i, len(network.candidates))
    for (exit_name, head), value in cost.items():
        deeper = [name for name in exits[exits.index(exit_name) + 1 :] if cost.get((name, head), np.inf) <= value]
        if deeper:
            logging.warning("%s.%s: costs no less than at %s: too heavy a head for its place", exit_name, head, deeper[0])
    bundles.write_atomically(folder / WEIGHTS, lambda temporary: temporary.write_text(network.weights_sha256()))


def export_deployment(
    exporter: Exporter,
    deployment: Deployment,
    classes: Sequence[str],
    workdir: Path,
    input_spec: bundles.InputSpec | None = None,
    examples: Examples | None = None,
) -> None:
    """Writes WORKDIR/bundle, WORKDIR/bundle_original and WORKDIR/submodels; see `Exporter.bundle`.

    Raises:
      ValueError: the thresholds were chosen for a policy of another fidelity than the exporter's.
    """
    required = f"{deployment.fidelity}, the fidelity of the statistics that the thresholds were chosen on"
    bundles.check(exporter.fidelity == deployment.fidelity, "fidelity", required, exporter.fidelity)
    cost = bundles.Cost(deployment.predicted.cost_name, deployment.original.cost)
    alone = Configuration(bundles.BUDGETED, False, (ExitChoice(*FINAL.split(".")),), None)
    predicted = bundles.Predicted(deployment.original.miou, cost, (1.0,))
    original = exporter.bundle(workdir / "bundle_original", alone, predicted, classes, input_spec, examples)
    signatures = exporter.bundle(workdir / "bundle", deployment, deployment.predicted.in_manifest(), classes, input_spec, examples)
    submodels = workdir / "submodels"
    shutil.rmtree(submodels, ignore_errors=True)
    submodels.mkdir(parents=True)
    for name, graph in signatures.items():
        if name != bundles.FULL:
            exporter.save(submodels / f"{name}.tflite", graph)
    exporter.save(submodels / "original.tflite", original[bundles.alone_signature("final")])


def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.INFO)
    tf.get_logger().setLevel("ERROR")  # no remarks on tracing one function per head
    if FLAGS.candidates == bool(FLAGS.deployment):
        raise app.UsageError("give either --candidates or --deployment=FILE")
    workdir = Path(FLAGS.workdir)
    config = configs.with_data_dir(configs.load_config(FLAGS.workdir), FLAGS.data_dir)
    examples = open_split(config.data, config.data.val_split)
    classes = examples.info.classes
    network = load_network(FLAGS.workdir, config, len(classes))
    samples = calibration_images(config) if FLAGS.precision == INT8 else ()
    deployment = Deployment.load(FLAGS.deployment) if FLAGS.deployment else None
    fidelity = FLAGS.fidelity or (deployment.fidelity if deployment else policy.EXACT)
    exporter = Exporter(network, config.data.input_size, fidelity, FLAGS.precision, samples, FLAGS.float_operations)
    if deployment is None:
        export_candidates(exporter, workdir / CANDIDATES)
        print(workdir / CANDIDATES)
        return
    input_spec = bundles.InputSpec(*config.data.input_size, FLAGS.input, FLAGS.resize)
    export_deployment(exporter, deployment, classes, workdir, input_spec, examples if FLAGS.measure else None)
    (workdir / "examples").mkdir(exist_ok=True)
    for i in range(min(EXAMPLES, len(examples))):
        Image.fromarray(examples.load(i)[0]).save(workdir / "examples" / f"{Path(examples.names[i]).name}.png")
    print(workdir / "bundle")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "folder of a training", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_bool("candidates", False, "export everything that can be chosen, to measure it")
    flags.DEFINE_string("deployment", "", "deployment.json of the search, to export its bundle")
    flags.DEFINE_enum("precision", FP32, PRECISIONS, "of weights and, with int8, of activations")
    flags.DEFINE_list(
        "float_operations", [], "with int8: patterns of the tensors whose operations stay in float32, see benchmarks/precision.py"
    )
    flags.DEFINE_enum(
        "fidelity",
        None,
        policy.FIDELITIES,
        "what the exit policy computes at full size; default: that of the deployment's statistics, for candidates exact",
    )
    flags.DEFINE_enum("input", "float32", bundles.INPUT_TYPES, "type of the image that goes into a bundle")
    flags.DEFINE_enum("resize", "stretch", bundles.RESIZES, "how images of another size are fitted to the network's")
    flags.DEFINE_bool("measure", True, "measure the mIoU of each exit on the validation split, for the manifest")
    app.run(main)
