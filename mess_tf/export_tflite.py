"""Export to TFLite: submodels to measure, and the bundle to deploy.

`python -m mess_tf.export_tflite --workdir=W --candidates` writes WORKDIR/candidates/: per exit `prefix.EXIT` (image to the tensors that
its heads read), per candidate `head.EXIT.HEAD` (those tensors to the mask), and per size of logits the exit policy alone. Their latencies
add up to those of any deployment. `python -m mess_tf.export_tflite --workdir=W --deployment=deployment.json` writes WORKDIR/bundle/ (one
segment per chosen exit, run by mess_runtime or an app), WORKDIR/submodels/ (each chosen exit as one network, image to mask),
WORKDIR/bundle_original/ (the original network alone) and WORKDIR/examples/ (some validation images to try them on).
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import flatbuffers
import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from PIL import Image

from mess_runtime import bundle as bundles
from mess_tf import configs, policy
from mess_tf.costs import graph_nodes, model_cost, with_input_size
from mess_tf.data import open_split, palette
from mess_tf.files import Configuration, Deployment, ExitChoice, made_by
from mess_tf.model import FINAL, MultiExitNetwork, load_network

CANDIDATES = "candidates"
EXAMPLES = 8
LOGITS_TOLERANCE = 1e-3  # of float tensors, relative to the largest value; pixels whose two best classes are nearer than this may differ

Graph = Callable[..., Mapping[str, tf.Tensor]]


class ExportError(RuntimeError):
    """A file that must not be deployed: an op that is not built in, a dynamic shape, or results that differ from Keras."""


def feature_sizes(network: MultiExitNetwork, size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """(height, width) of every tensor in the original network, by layer name."""
    nodes = graph_nodes(with_input_size(network.original, size))
    return {node.name: tuple(node.output.shape[1:3]) for node in nodes if len(node.output.shape) == 4}


def logits_size(network: MultiExitNetwork, candidate: str, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a candidate's logits: those of its shallowest tap."""
    sizes = feature_sizes(network, size)
    return max(sizes[name] for name in network.taps(candidate))


def head_macs(network: MultiExitNetwork, candidate: str, size: tuple[int, int]) -> int:
    """Multiply-accumulates of a candidate's head, from its taps to its logits; the original's own head counts as its prefix."""
    return 0 if candidate == FINAL else model_cost(network.heads[candidate], feature_sizes(network, size)).macs


def policy_name(network: MultiExitNetwork, candidate: str, size: tuple[int, int], mode: str, fidelity: str) -> str:
    """Name of the submodel from this candidate's logits to `mask`, or to mask and `plain` or `edge` confidence."""
    height, width = logits_size(network, candidate, size)
    return f"{mode}{_suffix(fidelity)}.{height}x{width}"


def head_name(candidate: str, fidelity: str) -> str:
    """Name of the submodel from the tensors that a candidate reads to its mask."""
    return f"head{_suffix(fidelity)}.{candidate}"


def _suffix(fidelity: str) -> str:
    return "" if fidelity == policy.EXACT else f"-{fidelity}"


def convert(graph: Graph, inputs: Mapping[str, tuple[int, ...]]) -> bytes:
    """Converts a function to a float32 .tflite with static shapes, builtin ops only and one signature `serve`.

    Args:
      graph: takes float32 tensors by name, returns a dict of tensors.
      inputs: name to shape.

    Raises:
      ExportError: if it cannot be expressed so.
    """
    specs = {name: tf.TensorSpec(shape, tf.float32, name=name) for name, shape in inputs.items()}
    function = tf.function(lambda **tensors: graph(**tensors)).get_concrete_function(**specs)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    try:
        content = converter.convert()
    except Exception as error:
        raise ExportError(f"conversion failed: {error}") from error
    content = _with_signature(content, sorted(inputs), sorted(function.structured_outputs))
    check_ops(content)
    return content


def _with_signature(content: bytes, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """Names the inputs and outputs of a model, which are in this order. (The converter does it too, but then takes 5 times as long.)"""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    signature = schema.SignatureDefT()
    signature.signatureKey = bundles.SIGNATURE
    signature.subgraphIndex = 0
    for attribute, names, tensors in (("inputs", inputs, model.subgraphs[0].inputs), ("outputs", outputs, model.subgraphs[0].outputs)):
        maps = []
        for name, tensor in zip(names, tensors, strict=True):
            tensor_map = schema.TensorMapT()
            tensor_map.name, tensor_map.tensorIndex = name, int(tensor)
            maps.append(tensor_map)
        setattr(signature, attribute, maps)
    model.signatureDefs = [signature]
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def check_ops(content: bytes) -> None:
    """Raises ExportError for custom or Flex ops, SPACE_TO_BATCH_ND (a dilation that was not folded) and dynamic shapes."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    used = {max(op.builtinCode, op.deprecatedBuiltinCode) for op in model.operatorCodes}
    refused = used & {schema.BuiltinOperator.CUSTOM, schema.BuiltinOperator.SPACE_TO_BATCH_ND, schema.BuiltinOperator.BATCH_TO_SPACE_ND}
    if refused:
        custom = [op.customCode.decode() for op in model.operatorCodes if op.customCode]
        raise ExportError(f"ops: must be builtin and without SPACE_TO_BATCH_ND, got {sorted(names[code] for code in refused)} {custom}")
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            if tensor.shapeSignature is not None and -1 in tensor.shapeSignature:
                raise ExportError(f"shapes: must be static, got {list(tensor.shapeSignature)} for {tensor.name.decode()}")


def check_parity(content: bytes, graph: Graph, inputs: Mapping[str, np.ndarray], logits: Callable[..., tf.Tensor] | None = None) -> None:
    """Raises ExportError if a file and the function it was made from disagree.

    Args:
      content: the .tflite.
      graph: the function.
      inputs: what to run both on.
      logits: gives the logits behind `mask`; pixels whose two best classes are within the tolerance may differ (ties).
    """
    interpreter = Interpreter(model_content=content, num_threads=1)
    got = interpreter.get_signature_runner(bundles.SIGNATURE)(**inputs)
    tensors = {name: tf.constant(value) for name, value in inputs.items()}
    for name, value in graph(**tensors).items():
        expected = value.numpy()
        if name == bundles.MASK:
            best = np.sort(tf.image.resize(logits(**tensors), expected.shape[1:]).numpy(), axis=-1)
            tie = best[..., -1] - best[..., -2] <= LOGITS_TOLERANCE * max(1.0, np.abs(best).max())
            wrong = int(((got[name] != expected) & ~tie).sum())
            if wrong:
                raise ExportError(f"{name}: {wrong} pixels differ from Keras beyond ties")
        elif name == bundles.CONFIDENT_PIXELS:
            if abs(int(got[name][0]) - int(expected[0])) > 1e-3 * got[bundles.MASK].size:
                raise ExportError(f"{name}: Keras counts {int(expected[0])}, the file {int(got[name][0])}")
        elif np.abs(got[name] - expected).max() > LOGITS_TOLERANCE * max(1.0, np.abs(expected).max()):
            raise ExportError(f"{name}: differs from Keras by {np.abs(got[name] - expected).max():.2g}")


class Exporter:
    """Writes checked submodels of one network at one input size and one fidelity of the policy (see `policy.decide`)."""

    def __init__(self, network: MultiExitNetwork, size: tuple[int, int], fidelity: str = policy.EXACT):
        self.network, self.size, self.fidelity = network, size, fidelity
        nodes = graph_nodes(with_input_size(network.original, size))
        self.shapes = {node.name: tuple(node.output.shape) for node in nodes}
        image = np.random.default_rng(0).uniform(0, 255, self.shapes[bundles.IMAGE]).astype(np.float32)
        features = network.features(network.candidates)(image)
        self.examples = {bundles.IMAGE: image} | {name: tensor.numpy() for name, tensor in features.items()}

    def write(self, path: Path, graph: Graph, names: Sequence[str], logits: Callable | None = None) -> None:
        """Converts, checks and writes one submodel whose inputs are the image or tensors of the original network."""
        try:
            content = convert(graph, {name: self.shapes[name] for name in names})
            check_parity(content, graph, {name: self.examples[name] for name in names}, logits)
        except ExportError as error:
            raise ExportError(f"{path.name}: {error}") from error
        bundles.write_atomically(path, lambda temporary: temporary.write_bytes(content))

    def prefix(self, folder: Path, exit_name: str) -> None:
        """Image to every tensor that the heads of an exit read."""
        model = self.network.features([name for name in self.network.candidates if name.startswith(f"{exit_name}.")])
        self.write(folder / f"prefix.{exit_name}.tflite", lambda image: model(image, training=False), [bundles.IMAGE])

    def head(self, folder: Path, candidate: str) -> None:
        """The tensors that a candidate reads to its mask."""

        def logits(**features):
            return self.network.head_logits(candidate, features)

        self.write(
            folder / f"{head_name(candidate, self.fidelity)}.tflite",
            lambda **features: policy.decide(logits(**features), self.size, [], self.fidelity),
            self.network.taps(candidate),
            logits,
        )

    def policies(self, folder: Path) -> None:
        """Logits to mask alone, and to mask and confidence, for every size of logits: their differences are what a decision costs."""
        for candidate in {logits_size(self.network, name, self.size): name for name in self.network.candidates}.values():
            shape = (1, *logits_size(self.network, candidate, self.size), self.network.num_classes)
            example = np.random.default_rng(0).normal(0, 4, shape).astype(np.float32)
            for mode, thresholds in (("mask", []), ("plain", [(0.9, False)]), ("edge", [(0.9, True)])):

                def graph(logits, thresholds=thresholds):
                    return policy.decide(logits, self.size, thresholds, self.fidelity)

                content = convert(graph, {"logits": shape})
                check_parity(content, graph, {"logits": example}, lambda logits: logits)
                path = folder / f"{policy_name(self.network, candidate, self.size, mode, self.fidelity)}.tflite"
                bundles.write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))

    def submodel(self, folder: Path, candidate: str) -> None:
        """One exit as a network of its own: image to mask."""
        model = self.network.submodel([candidate])
        self.write(
            folder / f"{candidate}.tflite",
            lambda image: policy.decide(model(image, training=False)[candidate], self.size, [], self.fidelity),
            [bundles.IMAGE],
            lambda image: model(image, training=False)[candidate],
        )

    def bundle(self, folder: Path, configuration: Configuration, predicted: bundles.Predicted, classes: Sequence[str]) -> None:
        """The deployable folder of a configuration: one segment per chosen exit and a manifest. An earlier one is replaced as a whole."""
        choices = configuration.exits
        names = [f"{choice.exit}.{choice.head}" for choice in choices]
        models = self.network.segments(names)
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            segments, before = [], 0
            for k, (choice, model) in enumerate(zip(choices, models, strict=True), 1):
                reached = model_cost(self.network.features(names[:k]), self.size).macs
                macs = reached - before + head_macs(self.network, names[k - 1], self.size)
                segments.append(self._segment(fresh, choice, model, configuration.edge_aware, macs))
                before = reached
            maker = made_by()
            manifest = bundles.Manifest(
                created_by=bundles.CreatedBy(maker["mess_tf"], tf.__version__, maker["git_commit"] or "unknown"),
                input=bundles.InputSpec(*self.size),
                classes=tuple(classes),
                palette=tuple(tuple(int(value) for value in colour) for colour in palette(len(classes))),
                setting=configuration.setting,
                predicted=predicted,
                segments=tuple(segments),
            )
            bundles.write_manifest(fresh, manifest)
            fresh.chmod(0o755)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _segment(self, folder: Path, choice: ExitChoice, model: keras.Model, edge_aware: bool, macs: int) -> bundles.Segment:
        thresholds = [] if choice.theta_pix is None else [(choice.theta_pix, edge_aware)]

        def graph(**tensors):
            outputs = dict(model(tensors, training=False))
            return policy.decide(outputs.pop("logits"), self.size, thresholds, self.fidelity) | outputs

        names = list(model.input)
        path = folder / f"segment-{choice.exit}.tflite"
        self.write(path, graph, names, lambda **tensors: model(tensors, training=False)["logits"])
        return bundles.Segment(
            exit=choice.exit,
            head=choice.head,
            file=path.name,
            sha256=bundles.file_sha256(path),
            size_bytes=path.stat().st_size,
            macs=macs,
            theta_pix=choice.theta_pix,
            theta_img=choice.theta_img,
            edge_aware=edge_aware,
        )


def export_candidates(network: MultiExitNetwork, size: tuple[int, int], folder: Path) -> None:
    """Writes every submodel that the search needs a latency of."""
    folder.mkdir(parents=True, exist_ok=True)
    exporter = Exporter(network, size)
    for exit_name in [point.name for point in network.exit_points] + ["final"]:
        exporter.prefix(folder, exit_name)
    exporter.policies(folder)
    for i, candidate in enumerate(network.candidates, 1):
        exporter.head(folder, candidate)
        logging.log_every_n_seconds(logging.INFO, "export: head %d of %d", 10, i, len(network.candidates))


def export_deployment(
    network: MultiExitNetwork, size: tuple[int, int], deployment: Deployment, classes: Sequence[str], workdir: Path
) -> None:
    """Writes WORKDIR/bundle, WORKDIR/bundle_original and the chosen exits as networks of their own in WORKDIR/submodels."""
    exporter = Exporter(network, size)
    submodels = workdir / "submodels"
    shutil.rmtree(submodels, ignore_errors=True)
    submodels.mkdir(parents=True)
    for choice in deployment.exits:
        exporter.submodel(submodels, f"{choice.exit}.{choice.head}")
    cost = bundles.Cost(deployment.predicted.cost_name, deployment.original.cost)
    alone = Configuration(bundles.BUDGETED, False, (ExitChoice(*FINAL.split(".")),), None)
    exporter.bundle(workdir / "bundle_original", alone, bundles.Predicted(deployment.original.miou, cost), classes)
    cost = bundles.Cost(deployment.predicted.cost_name, deployment.predicted.cost_mean)
    exporter.bundle(workdir / "bundle", deployment, bundles.Predicted(deployment.predicted.miou, cost), classes)


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
    if FLAGS.candidates:
        export_candidates(network, config.data.input_size, workdir / CANDIDATES)
        print(workdir / CANDIDATES)
        return
    export_deployment(network, config.data.input_size, Deployment.load(FLAGS.deployment), classes, workdir)
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
    app.run(main)
