"""Submodels and bundles of one network: checked files."""

import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from mess_runtime import bundle as bundles
from mess_runtime.files import replace_folder, write_atomically
from mess_runtime.images import mask_at
from mess_runtime.verify import verify
from mess_tf.data.examples import Examples, palette
from mess_tf.data.pipelines import network_input
from mess_tf.files import Configuration, ExitChoice, made_by
from mess_tf.graph import flatbuffer, policy
from mess_tf.graph.conversion import (
    FP32,
    INT8,
    TOLERANCE,
    ExportError,
    Function,
    Tensors,
    check_finite,
    check_parity,
    convert,
    converter_of,
    pixels,
    run_signature,
)
from mess_tf.graph.regions import RegionChain
from mess_tf.network.costs import Cost, graph_nodes, model_cost, with_input_size
from mess_tf.network.evaluation import accuracies, confusion_matrices
from mess_tf.network.exits import TAP
from mess_tf.network.model import FINAL, MultiExitNetwork

VERIFIED_IMAGES = 3
REGION_THRESHOLD = (0.9, False)  # of submodels, whose latency does not depend on it

Shapes = Mapping[str, tuple[int, ...]]


def tensor_shapes(network: MultiExitNetwork, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """(1, height, width, channels) for images of `size`: of every tensor in the original, by layer name, and of each candidate's logits."""
    shapes = {node.name: tuple(node.output.shape) for node in graph_nodes(with_input_size(network.original, size))}
    features = {name: keras.KerasTensor(shape) for name, shape in shapes.items()}
    return shapes | {name: tuple(network.head_logits(name, features).shape) for name in network.candidates}


def logits_size(candidate: str, shapes: Shapes) -> tuple[int, int]:
    """(height, width) of a candidate's logits."""
    return shapes[candidate][1:3]


def head_cost(network: MultiExitNetwork, candidate: str, shapes: Shapes) -> Cost:
    """Costs of a candidate's head, from its taps to its logits; the original's own head counts as its prefix."""
    if candidate == FINAL:
        return Cost(0, 0, 0)
    return model_cost(network.heads[candidate], {TAP + name: shape[1:3] for name, shape in shapes.items()})


def policy_name(candidate: str, shapes: Shapes, mode: str, fidelity: str) -> str:
    """Name of the submodel from this candidate's logits to `mask`, or to mask and `plain` or `edge` confidence."""
    height, width = logits_size(candidate, shapes)
    return f"{mode}{_suffix(fidelity)}.{height}x{width}"


def head_name(candidate: str, fidelity: str) -> str:
    """Name of the submodel from the tensors that a candidate reads to its mask and its logits."""
    return f"head{_suffix(fidelity)}.{candidate}"


def _suffix(fidelity: str) -> str:
    return "" if fidelity == policy.EXACT else f"-{fidelity}"


class Exporter:
    """Writes checked files of one network.

    Attributes:
      network: what is exported.
      size: (height, width) in pixels of its input.
      fidelity: of the policy, see `policy.decide`.
      precision: of the network, see `convert`. In int8 the policy stays in floating point. What does so in files other than fp32 may be
        computed in float16, see `flatbuffer.write`.
      images: the samples [1, H, W, 3], whole values in float32, that int8 takes its ranges from; without samples, one of noise.
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
        self.float_operations = float_operations
        self.shapes = tensor_shapes(network, size)
        self.images = samples or [np.random.default_rng(0).integers(0, 256, self.shapes[bundles.IMAGE]).astype(np.float32)]

    @functools.cached_property
    def samples(self) -> list[dict[str, np.ndarray]]:
        """Each image and all tensors that heads read.

        Raises:
          ExportError: one is not finite.
        """
        features_of, samples = tf.function(self.network.features(self.network.candidates), autograph=False), []
        for image in self.images:
            features = {name: tensor.numpy() for name, tensor in features_of(image, training=False).items()}
            for name, value in features.items():
                check_finite(name, value)
            samples.append({bundles.IMAGE: image} | features)
        return samples

    def converted(self, function: Function, names: Sequence[str], precision: str | None = None) -> flatbuffer.Graph:
        """Converts a function of the image or of tensors of the original network."""
        shapes = {name: self.shapes[name] for name in names}
        return convert(function, shapes, precision or self.precision, lambda: iter(self.samples), self.float_operations)

    def policy(self, height: int, width: int, thresholds: tuple[tuple[float, bool], ...]) -> flatbuffer.Graph:
        """The exit policy on logits of a size: `logits` to `mask` and, with thresholds, `confident_pixels`."""
        return _policy((1, height, width, self.network.num_classes), self.size, thresholds, self.fidelity)

    def content(self, signatures: Mapping[str, flatbuffer.Graph]) -> bytes:
        """The file of some graphs."""
        return flatbuffer.write(signatures, self.precision != FP32)

    def save(self, path: Path, graph: flatbuffer.Graph, *compared: Any) -> None:
        """Writes a graph as a file of its own, after a check if there is something to compare with, see `_check`."""
        content = self.content({bundles.SIGNATURE: graph})
        if compared:
            with _named(path.stem):
                self._check(content, *compared)
        write_atomically(path, lambda temporary: temporary.write_bytes(content))

    def prefix(self, folder: Path, exit_name: str) -> flatbuffer.Graph:
        """Image, uint8, to every tensor that the heads of an exit read."""
        model = self.network.features([name for name in self.network.candidates if name.startswith(f"{exit_name}.")])
        expected = {name: self.samples[0][name] for name in model.output}
        graph = self.converted(lambda image: model(image, training=False), [bundles.IMAGE])
        features = {name: flatbuffer.stored(graph, name) for name in graph.outputs if name not in self.network.taps(FINAL)}
        outputs = graph.outputs | features  # logits are handed on as float32
        graph = flatbuffer.Graph(graph.inputs, outputs, graph.operations)
        whole = flatbuffer.join(pixels(self.shapes[bundles.IMAGE]), graph, {bundles.IMAGE: bundles.IMAGE})
        graph = flatbuffer.cut(whole, whole.inputs, {name: whole.outputs[name] for name in outputs})
        compared = ({bundles.IMAGE: self.images[0].astype(np.uint8)}, {}, expected) if self.precision in TOLERANCE else ()
        self.save(folder / f"prefix.{exit_name}.tflite", graph, *compared)
        return graph

    def head(self, folder: Path, candidate: str) -> flatbuffer.Graph:
        """The tensors that a candidate reads to its mask and its logits."""
        inputs = {name: self.samples[0][name] for name in self.network.taps(candidate)}
        logits = self.network.head_logits(candidate, {name: tf.constant(value) for name, value in inputs.items()})
        check_finite(candidate, logits)
        graph = self.converted(lambda **features: {"logits": self.network.head_logits(candidate, features)}, [*inputs])
        graph = flatbuffer.cut(graph, {name: flatbuffer.taken(graph, name) for name in graph.inputs}, graph.outputs)
        graph = flatbuffer.join(graph, self.policy(*logits_size(candidate, self.shapes), ()), {"logits": "logits"})
        compared = (inputs, {bundles.MASK: (logits, ())}, {"logits": logits.numpy()}) if self.precision in TOLERANCE else ()
        self.save(folder / f"{head_name(candidate, self.fidelity)}.tflite", graph, *compared)
        return graph

    def policies(self, folder: Path) -> None:
        """Logits to mask alone, and to mask and confidence, for every size of logits: their differences are what a decision costs."""
        for size, candidate in {logits_size(name, self.shapes): name for name in self.network.candidates}.items():
            example = np.random.default_rng(0).normal(0, 4, (1, *size, self.network.num_classes)).astype(np.float32)
            for mode, thresholds in (("mask", ()), ("plain", ((0.9, False),)), ("edge", ((0.9, True),))):
                path = folder / f"{policy_name(candidate, self.shapes, mode, self.fidelity)}.tflite"
                compared = {"logits": example}, {bundles.MASK: (tf.constant(example), thresholds)}, {}
                self.save(path, self.policy(*size, thresholds), *compared)

    def region_chain(
        self,
        candidates: Sequence[str],
        regions: bundles.Regions,
        thresholds: Sequence[tuple[float, bool]],
        cells: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> RegionChain:
        """Candidates of which every cell leaves for itself.

        Args:
          candidates: one per exit, shallow to deep.
          regions: cells and budgets.
          thresholds, cells: see `RegionChain`.

        Raises:
          ValueError: the policy is not exact, operations are to stay in float32, or a segment cannot be computed at some cells only.
        """
        bundles.check(self.fidelity == policy.EXACT, "fidelity", f"{policy.EXACT} with regions", self.fidelity)
        bundles.check(not self.float_operations, "float_operations", "left out with regions", self.float_operations)
        return RegionChain(self.network, candidates, regions, self.size, thresholds, self.precision, self.images, cells)

    def region_first(self, folder: Path, candidate: str, regions: bundles.Regions) -> flatbuffer.Graph:
        """`region.CANDIDATE`: image, uint8, to the mask of a first exit, how sure its cells are, and what the final exit needs.

        What another exit would be handed instead of that is a copy more or less.
        """
        with _named(f"region.{candidate}"):
            graph = self.region_chain([candidate, FINAL], regions, [REGION_THRESHOLD]).first()
            self.save(folder / f"region.{candidate}.tflite", graph)
        return graph

    def region_pair(
        self, folder: Path, first: str, second: str, regions: bundles.Regions, cells: tuple[np.ndarray, np.ndarray] | None = None
    ) -> dict[int, flatbuffer.Graph]:
        """`region.FIRST.SECOND.BUDGET`, a file for every budget: what the first exit hands on to the mask of the second, the last one.

        In the middle of a longer chain it also says how sure its cells are, and copies features that are handed on. With `cells`, see
        `RegionChain`, there is one file, of the dense segment.

        Raises:
          ValueError: all between the two can only be computed as a whole, without `cells`, or not at all.
        """
        with _named(f"region.{first}.{second}"):
            graphs = self.region_chain([first, second], regions, [REGION_THRESHOLD], cells).later(1)
        for budget, graph in graphs.items():
            self.save(folder / f"region.{first}.{second}.{budget}.tflite", graph)
        return graphs

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
        converter, _ = converter_of(
            self.chain(candidates)[1], {bundles.IMAGE: self.shapes[bundles.IMAGE]}, INT8, lambda: iter(self.samples)
        )
        debugger = tf.lite.experimental.QuantizationDebugger(
            converter=converter, debug_dataset=lambda: ([sample[bundles.IMAGE]] for sample in self.samples[:8])
        )
        debugger.run()
        text = io.StringIO()
        debugger.layer_statistics_dump(text)
        rows = csv.DictReader(io.StringIO(text.getvalue()))
        return sorted(((float(row["mean_squared_error"]) ** 0.5 / float(row["scale"]), row["tensor_name"]) for row in rows), reverse=True)

    def deployed(self, configuration: Configuration, input_type: str) -> dict[str, flatbuffer.Graph]:
        """The signatures of a bundle (see `bundles`), and for each exit `logits.EXIT`, image to logits.

        The network is converted once, and every signature is a part of it.
        """
        choices = configuration.exits
        models, function = self.chain([f"{choice.exit}.{choice.head}" for choice in choices])
        whole = flatbuffer.with_cuts(self.converted(function, [bundles.IMAGE]))
        if input_type == "uint8":
            whole = flatbuffer.join(pixels(self.shapes[bundles.IMAGE]), whole, {bundles.IMAGE: bundles.IMAGE})
        for choice in choices:
            name = f"{choice.exit}.logits"
            thresholds = () if configuration.regions else _thresholds(configuration, choice)
            decision = self.policy(*whole.outputs[name].shape[1:3], thresholds)
            whole = flatbuffer.join(whole, decision, {"logits": name}, f"{choice.exit}.")
        image = dict(whole.inputs)
        features = {name: flatbuffer.stored(whole, name) for model in models for name in model.output if name != "logits"}

        def results(exit_name: str) -> dict[str, flatbuffer.Tensor]:
            names = (bundles.MASK, bundles.CONFIDENT_PIXELS)
            return {name: whole.outputs[f"{exit_name}.{name}"] for name in names if f"{exit_name}.{name}" in whole.outputs}

        chain = self.regions_of(configuration)
        signatures = chain.signatures(input_type) if chain else {}
        for choice, model in () if chain else zip(choices, models, strict=True):
            handed = {name: features[name] for name in model.output if name != "logits"}
            given = {name: (image | features)[name] for name in model.input}
            signatures[bundles.segment_signature(choice.exit)] = flatbuffer.cut(whole, given, results(choice.exit) | handed)
        for choice in choices:
            mask = {bundles.MASK: whole.outputs[f"{choice.exit}.{bundles.MASK}"]}
            signatures[bundles.alone_signature(choice.exit)] = flatbuffer.cut(whole, image, mask)
            signatures[f"logits.{choice.exit}"] = flatbuffer.cut(whole, image, {"logits": whole.outputs[f"{choice.exit}.logits"]})
        everything = {f"{choice.exit}.{name}": tensor for choice in choices for name, tensor in results(choice.exit).items()}
        signatures[bundles.FULL] = flatbuffer.cut(whole, image, everything)
        return signatures

    def regions_of(self, configuration: Configuration) -> RegionChain | None:
        """The chain of a configuration with regions, see `region_chain`; None without."""
        if configuration.regions is None:
            return None
        candidates = [f"{choice.exit}.{choice.head}" for choice in configuration.exits]
        thresholds = [each for choice in configuration.exits for each in _thresholds(configuration, choice)]
        return self.region_chain(candidates, configuration.regions, thresholds)

    def bundle(
        self,
        folder: Path,
        configuration: Configuration,
        predicted: bundles.Predicted | None,
        classes: Sequence[str],
        input_spec: bundles.InputSpec | None = None,
        examples: Examples | None = None,
        extra_signatures: Collection[str] = (),
        backends: Collection[str] = (),
    ) -> dict[str, flatbuffer.Graph]:
        """Writes the deployable folder of a configuration. An earlier one is replaced as a whole.

        Args:
          folder: to write.
          configuration: exits, heads, thresholds.
          predicted: what the search expects, if there was a search.
          classes: names.
          input_spec: how images go in; by default uint8, stretched to the network's size.
          examples: images to measure the mIoU of each exit on, for the manifest.
          extra_signatures: of `bundles.EXTRA_SIGNATURES`, written beside the segments.
          backends: some of `mess_runtime.engines`, on which the file must do what it does on the CPU; recorded in the manifest.

        Returns:
          The graphs of `deployed`.

        Raises:
          ExportError: what Keras computes is not finite, the file differs from it, or its segments, one after another, from the network run
            at a stretch, or a backend from the CPU.
          ValueError: a backend is not there.
        """
        names = [f"{choice.exit}.{choice.head}" for choice in configuration.exits]
        for name, logits in self.network.submodel(names)(tf.constant(self.images[0]), training=False).items():
            check_finite(name, logits)
        input_spec = input_spec or bundles.InputSpec(*self.size)
        everything = self.deployed(configuration, input_spec.dtype)
        kept = (bundles.segment_signature(""), *extra_signatures)
        content = self.content({name: graph for name, graph in everything.items() if name.startswith(kept)})
        with _named(bundles.MODEL):
            self._check_bundle(content, configuration, everything, input_spec.dtype)
        mious = measured_miou(self.content({bundles.FULL: everything[bundles.FULL]}), examples, input_spec) if examples else {}
        segments = []
        for index, choice in enumerate(configuration.exits):
            alone = everything[bundles.alone_signature(choice.exit)]
            dense = configuration.regions.cells if configuration.regions and index else None
            segments.append(
                bundles.Segment(
                    exit=choice.exit,
                    head=choice.head,
                    macs=flatbuffer.macs(everything[bundles.segment_signature(choice.exit, dense)]),
                    alone_macs=flatbuffer.macs(alone),
                    alone_sha256=bundles.sha256(self.content({bundles.SIGNATURE: alone})),
                    theta_pix=choice.theta_pix,
                    theta_img=choice.theta_img,
                    edge_aware=configuration.edge_aware,
                    miou=mious.get(choice.exit),
                )
            )
        for before, after in itertools.pairwise(segments):
            if before.alone_macs >= after.alone_macs:
                print(f"{before.exit}: costs no less than {after.exit}: its head is too heavy for its place")
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
            regions=configuration.regions,
        )

        def write(fresh: Path) -> None:
            (fresh / bundles.MODEL).write_bytes(content)
            bundles.write_manifest(fresh, manifest)
            if backends:
                photos = [examples.load(i)[0] for i in range(min(VERIFIED_IMAGES, len(examples)))] if examples else []
                reports = [verify(fresh, backend, photos) for backend in backends]
                if refused := [report.table() for report in reports if not report.ok]:
                    raise ExportError("\n".join(refused))
                proven = tuple(report.verification for report in reports)
                bundles.write_manifest(fresh, dataclasses.replace(manifest, verified=proven))

        replace_folder(folder, write)
        return everything

    def _check_bundle(
        self, content: bytes, configuration: Configuration, everything: Mapping[str, flatbuffer.Graph], input_type: str
    ) -> None:
        image = self.images[0].astype(input_type)
        at_a_stretch = self.content({bundles.FULL: everything[bundles.FULL]})
        full = run_signature(at_a_stretch, {bundles.IMAGE: image})
        interpreter, tensors = Interpreter(model_content=content, num_threads=os.cpu_count()), {bundles.IMAGE: image}
        chain = self.regions_of(configuration)
        if chain:
            chain.check(content, input_type)
        for choice in configuration.exits:
            alone = self.content({bundles.SIGNATURE: everything[bundles.alone_signature(choice.exit)]})
            mask = run_signature(alone, {bundles.IMAGE: image})[bundles.MASK]
            if chain:  # whose segments are converted each for itself, and in int8 quantised so
                made = {bundles.MASK: mask}
            else:
                segment = interpreter.get_signature_runner(bundles.segment_signature(choice.exit))
                made = segment(**{name: tensors[name] for name in segment.get_input_details()})
                tensors |= made
            for name, value in made.items():
                same = np.array_equal(value, full.get(f"{choice.exit}.{name}", value))
                if not same or (name == bundles.MASK and not np.array_equal(mask, value)):
                    raise ExportError(f"{choice.exit}: {name} of the segments, of the exit alone and of everything at a stretch differ")
        if self.precision in TOLERANCE:
            exits, names = {}, [f"{choice.exit}.{choice.head}" for choice in configuration.exits]
            logits_of = self.network.submodel(names)(tf.constant(image, tf.float32), training=False)
            for choice, name in zip(configuration.exits, names, strict=True):
                logits = logits_of[name]
                to_logits = self.content({bundles.SIGNATURE: everything[f"logits.{choice.exit}"]})
                check_parity(to_logits, {bundles.IMAGE: image}, {"logits": logits.numpy()}, {}, TOLERANCE[self.precision])
                thresholds = () if configuration.regions else _thresholds(configuration, choice)
                exits[f"{choice.exit}.{bundles.MASK}"] = (logits, thresholds)
            self._check(at_a_stretch, {bundles.IMAGE: image}, exits, {})


def _thresholds(configuration: Configuration, choice: ExitChoice) -> tuple[tuple[float, bool], ...]:
    """What `policy.decide` takes of an exit."""
    return () if choice.theta_pix is None else ((choice.theta_pix, configuration.edge_aware),)


@contextlib.contextmanager
def _named(file: str) -> Iterator[None]:
    """Puts the file's name in front of an ExportError."""
    try:
        yield
    except ExportError as error:
        raise ExportError(f"{file}: {error}") from error


@functools.cache
def _policy(
    logits: tuple[int, int, int, int], size: tuple[int, int], thresholds: tuple[tuple[float, bool], ...], fidelity: str
) -> flatbuffer.Graph:
    """`Exporter.policy` by the shape of the logits."""
    return convert(lambda logits: policy.decide(logits, size, thresholds, fidelity), {"logits": logits})


def measured_miou(content: bytes, examples: Examples, input_spec: bundles.InputSpec) -> dict[str, float]:
    """mIoU (0..1) of every exit of a bundle's file over a split, its images fitted as the bundle says."""
    size = (input_spec.height, input_spec.width)
    run = Interpreter(model_content=content, num_threads=os.cpu_count()).get_signature_runner(bundles.FULL)

    def predict(image: np.ndarray) -> dict[str, np.ndarray]:
        outputs = run(image=network_input(image, size, input_spec.resize).astype(input_spec.dtype))
        parts = {name.rpartition("."): value for name, value in outputs.items()}
        masks = {name: mask for (name, _, kind), mask in parts.items() if kind == bundles.MASK}
        return {name: mask_at(mask, image.shape[1:3], input_spec.resize) for name, mask in masks.items()}

    return {name: accuracy.miou for name, accuracy in accuracies(confusion_matrices(predict, examples)).items()}
