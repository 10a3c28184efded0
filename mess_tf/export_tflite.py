"""Export to TFLite: submodels to measure, and the bundle to deploy.

`python -m mess_tf.export_tflite --workdir=W --candidates` writes WORKDIR/candidates/: per exit `prefix.EXIT` (image to the tensors that
its heads read), per candidate `head.EXIT.HEAD` (those tensors to the mask and its logits), and per size of logits the exit policy alone.
Their latencies add up to those of any deployment. Beside them, `weights.sha256` says of which weights they are, once all are there.

`python -m mess_tf.export_tflite --workdir=W --deployment=deployment.json` writes

* WORKDIR/bundle/: one .tflite with a signature per segment, sharing weights, and those of --extra_signatures; manifest
* WORKDIR/bundle_original/: the same of the original network alone
* WORKDIR/submodels/: one network per file, for benchmark tools: `alone.EXIT` (image to mask), `segment.EXIT` (as in the bundle) and
  `logits.EXIT` (image to low-resolution logits, for delegates that know no argmax); `original`
* WORKDIR/examples/: some validation images to try them on

Both take --precision=fp32|fp16|int8. Every file is checked before it is kept.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from mess_runtime import bundle as bundles
from mess_runtime.files import replace_folder, write_atomically
from mess_runtime.terminal import progress
from mess_tf import configs, terminal
from mess_tf.data.examples import Examples
from mess_tf.data.pipelines import resize_image
from mess_tf.data.sources import open_split
from mess_tf.files import Configuration, Deployment, ExitChoice
from mess_tf.graph import flatbuffer, policy
from mess_tf.graph.conversion import FP32, INT8, PRECISIONS
from mess_tf.graph.exporter import Exporter
from mess_tf.network.model import FINAL, load_network
from mess_tf.network.originals import define_flags

CANDIDATES, WEIGHTS = "candidates", "weights.sha256"
EXAMPLES = 8
CALIBRATION_IMAGES = 64


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
    reached = {name: flatbuffer.macs(exporter.prefix(folder, name)) for name in exits}
    exporter.policies(folder)
    cost = {}
    for candidate in progress(network.candidates, "export", "head"):
        exit_name, _, head = candidate.partition(".")
        cost[exit_name, head] = reached[exit_name] + flatbuffer.macs(exporter.head(folder, candidate))
    for (exit_name, head), value in cost.items():
        deeper = [name for name in exits[exits.index(exit_name) + 1 :] if cost.get((name, head), np.inf) <= value]
        if deeper:
            print(f"{exit_name}.{head}: costs no less than at {deeper[0]}: too heavy a head for its place")
    write_atomically(folder / WEIGHTS, lambda temporary: temporary.write_text(network.weights_sha256()))


def export_deployment(
    exporter: Exporter,
    deployment: Deployment,
    classes: Sequence[str],
    workdir: Path,
    input_spec: bundles.InputSpec | None = None,
    examples: Examples | None = None,
    extra_signatures: Collection[str] = (),
) -> None:
    """Writes WORKDIR/bundle, WORKDIR/bundle_original and WORKDIR/submodels; see `Exporter.bundle`.

    Raises:
      ValueError: the deployment is of another network, or its thresholds were chosen for a policy of another fidelity.
    """
    for choice in deployment.exits:
        known = exporter.network.candidates
        bundles.check(f"{choice.exit}.{choice.head}" in known, "deployment", f"of candidates of this network, {known}", choice)
    required = f"{deployment.fidelity}, the fidelity of the statistics that the thresholds were chosen on"
    bundles.check(exporter.fidelity == deployment.fidelity, "fidelity", required, exporter.fidelity)
    cost = bundles.Cost(deployment.predicted.cost_name, deployment.original.cost)
    alone = Configuration(bundles.BUDGETED, False, (ExitChoice(*FINAL.split(".")),), None)
    predicted = bundles.Predicted(deployment.original.miou, cost, (1.0,))
    original = exporter.bundle(workdir / "bundle_original", alone, predicted, classes, input_spec, examples, extra_signatures)
    signatures = exporter.bundle(
        workdir / "bundle", deployment, deployment.predicted.in_manifest(), classes, input_spec, examples, extra_signatures
    )

    def write(submodels: Path) -> None:
        for name, graph in signatures.items():
            if name != bundles.FULL:
                exporter.save(submodels / f"{name}.tflite", graph)
        exporter.save(submodels / "original.tflite", original[bundles.alone_signature("final")])

    replace_folder(workdir / "submodels", write)


def main() -> None:
    given = [name for name in ("--candidates", "--deployment") if flags.FLAGS[name[2:]].value]
    bundles.check(len(given) == 1, "arguments", "either --candidates or --deployment=FILE", " ".join(given))
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
    export_deployment(exporter, deployment, classes, workdir, input_spec, examples if FLAGS.measure else None, FLAGS.extra_signatures)
    (workdir / "examples").mkdir(exist_ok=True)
    for i in range(min(EXAMPLES, len(examples))):
        Image.fromarray(examples.load(i)[0]).save(workdir / "examples" / f"{Path(examples.names[i]).name}.png")
    print(workdir / "bundle")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    define_flags()
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
    flags.DEFINE_multi_enum(
        "extra_signatures",
        [],
        bundles.EXTRA_SIGNATURES,
        "beside the segments of a bundle: every exit alone, for several in budgeted; everything",
    )
    flags.DEFINE_bool("measure", True, "measure the mIoU of each exit on the validation split, for the manifest")
    terminal.run(main)
