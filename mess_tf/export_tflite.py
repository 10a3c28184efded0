"""Export to TFLite: submodels to measure, and the bundle to deploy.

`python -m mess_tf.export_tflite --workdir=W --candidates` writes WORKDIR/candidates/: per exit `prefix.EXIT` (image to the tensors that
its heads read), per candidate `head.EXIT.HEAD` (those tensors to the mask and its logits), and per size of logits the exit policy alone.
Their latencies add up to those of any deployment. Beside them, `weights.sha256` says of which weights they are and how exported, once all
are there. With --regions, or a training whose stage1.regions is another than none, also `region.EXIT.HEAD`, a first exit whose cells leave
each for itself, and for every pair of exits in a chain, and budget of cells, `region.EXIT.HEAD.EXIT.HEAD.BUDGET`.

`python -m mess_tf.export_tflite --workdir=W --deployment=deployment.json` writes

* WORKDIR/bundle/: one .tflite with a signature per segment, sharing weights, and those of --extra_signatures; manifest; and, once all else
  is there, the deployment.json that all this was made from
* WORKDIR/bundle_original/: the same of the original network alone
* WORKDIR/submodels/: one network per file, for benchmark tools: `alone.EXIT` (image to mask), the segments as in the bundle and
  `logits.EXIT` (image to low-resolution logits, for delegates that know no argmax); `original`
* WORKDIR/examples/: some validation images to try them on

Candidates take --precision=fp32|fp16|int8, or --precisions=fp16,int8 for WORKDIR/candidates.fp16/ and so on, of which the search then
takes the best; a deployment is of the precision that it was searched in. Every file is checked before it is kept.

`--target=web|mediapipe|android --output=FOLDER` writes what another runtime takes, beside the bundle of `--deployment`, or of one
that is there, `--bundle=FOLDER`: see `mess_tf.targets`. For web LiteRT.js comes from npm, or from `--litertjs=FOLDER`, what
`npm pack` wrote.
"""

from pathlib import Path

from absl import flags

from mess_runtime.bundle import EXTRA_SIGNATURES, FIDELITIES, FP32, INPUT_TYPES, INT8, PRECISIONS, RESIZES, Bundle, check
from mess_runtime.engines import BACKENDS
from mess_tf import arguments, terminal
from mess_tf.files import CANDIDATES, DEPLOYMENT, STATS, Configuration, Deployment, ExitChoice, of_precision, read_arrays, trained_weights

OF_NETWORK = "workdir data_dir precision float_operations fidelity input resize extra_signatures verify measure"


def check_arguments() -> None:
    """Raises ValueError where flags do not go together."""
    values = flags.FLAGS
    given = [name for name in ("--candidates", "--deployment", "--bundle") if values[name[2:]].value]
    check(len(given) == 1, "arguments", "one of --candidates, --deployment=FILE and --bundle=FOLDER", " ".join(given))
    check(bool(values.bundle or values.workdir), "--workdir", f"given with {given[0]}", values.workdir)
    terminal.check_left_out(bool(values.bundle), OF_NETWORK, "with --bundle")
    terminal.check_left_out(values.candidates, "input resize measure extra_signatures verify target", "with --candidates")
    terminal.check_left_out(not values.candidates, "precisions regions region_cell region_heads", "without --candidates")
    terminal.check_left_out(bool(values.precisions), "precision", "with --precisions")
    without = values.candidates and INT8 not in (values.precision, *values.precisions)
    terminal.check_left_out(without, "float_operations", f"without --precision={INT8}")
    terminal.check_left_out(not values.target, "output", "without --target")
    terminal.check_left_out(values.target != "web", "litertjs", "without --target=web")
    check(bool(values.target or not values.bundle), "--target", f"one of {', '.join(arguments.TARGETS)} with --bundle", values.target)
    check(bool(values.output or not values.target), "--output", "given with --target", values.output)
    if values.target:
        source = Path(values.bundle or Path(values.workdir, "bundle"))
        outside = not Path(values.output).resolve().is_relative_to(source.resolve())
        check(outside, "--output", f"a folder outside of the bundle {source}", values.output)
    check({*values.precisions} <= {*PRECISIONS}, "--precisions", f"of {', '.join(PRECISIONS)}", ",".join(values.precisions))
    if values.bundle:
        Bundle.load(values.bundle)
    else:
        arguments.check_trained()
    if values.deployment:
        Deployment.load(values.deployment)


if __name__ == "__main__":
    arguments.define_network_flags()
    flags.DEFINE_string("workdir", None, "folder of a training, unless there is a bundle")
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_bool("candidates", False, "export everything that can be chosen, to measure it")
    arguments.define_region_flags()
    flags.DEFINE_string("deployment", "", "deployment.json of the search, to export its bundle")
    flags.DEFINE_string("bundle", "", "folder of a bundle, to write what --target names")
    flags.DEFINE_enum(
        "target",
        None,
        arguments.TARGETS,
        "another runtime that the bundle is made ready for: web, a folder for any web server; mediapipe, files for ImageSegmenter; "
        "android, a folder for the assets of an app",
    )
    flags.DEFINE_string("output", "", "folder of the target")
    flags.DEFINE_string("litertjs", "", "with --target=web: folder with the packages of LiteRT.js; by default npm fetches them")
    flags.DEFINE_enum(
        "precision",
        None,
        PRECISIONS,
        "of weights and, with int8, of activations; default: that of the deployment's statistics, for candidates fp32",
    )
    flags.DEFINE_list("precisions", [], "candidates of each of these, in candidates.PRECISION, for a search that takes the best")
    flags.DEFINE_list(
        "float_operations", [], "with int8: patterns of the tensors whose operations stay in float32, see benchmarks/precision.py"
    )
    flags.DEFINE_enum(
        "fidelity",
        None,
        FIDELITIES,
        "what the exit policy computes at full size; default: that of the deployment's statistics, for candidates exact",
    )
    flags.DEFINE_enum("input", "uint8", INPUT_TYPES, "type of the image that goes into a bundle")
    flags.DEFINE_enum("resize", None, RESIZES, "how images are fitted: that of the training, data.resize; another one is an error")
    flags.DEFINE_multi_enum(
        "extra_signatures",
        [],
        EXTRA_SIGNATURES,
        "beside the segments of a bundle: every exit alone, for several in budgeted; everything",
    )
    flags.DEFINE_list(
        "verify", [], f"backends ({', '.join(BACKENDS)}) on which a bundle must do what it does on the CPU; recorded in its manifest"
    )
    flags.DEFINE_bool("measure", True, "measure the mIoU of each exit on the validation split, for the manifest")
    terminal.run("mess_tf.export_tflite", __doc__, check_arguments)

import dataclasses
import os
from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image

from mess_runtime import bundle as bundles
from mess_runtime.files import replace_folder, write_atomically
from mess_runtime.terminal import progress
from mess_tf import configs
from mess_tf.data.examples import Examples
from mess_tf.data.pipelines import network_input
from mess_tf.data.sources import open_split
from mess_tf.graph import flatbuffer, policy
from mess_tf.graph.exporter import Exporter
from mess_tf.network.model import FINAL, MultiExitNetwork, load_network, weights_sha256
from mess_tf.network.originals import allow_flags
from mess_tf.region_candidates import BY_TRAINING, Plan, RegionOptions, options_of_flags, plan
from mess_tf.targets import android, mediapipe, web

FLAGS = flags.FLAGS
WEIGHTS, REGIONS_OF_FILES = "weights.sha256", "regions.json"
MODULES = dict(zip(arguments.TARGETS, (web, mediapipe, android), strict=True))
EXAMPLES = 8
CALIBRATION_IMAGES = 64


def calibration_images(config: configs.Config, count: int = CALIBRATION_IMAGES) -> list[np.ndarray]:
    """Evenly picked training images, float32 [1, H, W, 3], for the ranges of int8."""
    examples = open_split(config.data, config.data.train_split)
    picked = np.linspace(0, len(examples) - 1, min(count, len(examples))).round().astype(int)
    return [network_input(examples.load(i)[0], config.data.input_size, config.data.resize) for i in picked]


def export_candidates(exporter: Exporter, folder: Path, chains: Plan | None = None) -> None:
    """Writes every submodel that the search needs a latency of, those of regions too, and then the hash of the network's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / WEIGHTS, folder / REGIONS_OF_FILES, *folder.glob("region.*.tflite")):
        path.unlink(missing_ok=True)
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
    if chains:
        for candidate in progress(sorted({chain[0] for chain in chains.chains}), "export", "first exit"):
            exporter.region_first(folder, candidate, chains.regions)
        for pair, segment in progress([*chains.pairs.items()], "export", "pair"):
            exporter.region_pair(folder, *pair, chains.regions, None if segment else chains.cells)
        bundles.write_json(folder / REGIONS_OF_FILES, dataclasses.asdict(chains.regions))
    text = _made_from(network.weights_sha256(), exporter.precision, exporter.float_operations)
    write_atomically(folder / WEIGHTS, lambda temporary: temporary.write_text(text))


def _made_from(weights_sha256: str, precision: str, float_operations: Sequence[str]) -> str:
    """The content of `weights.sha256`."""
    return " ".join([weights_sha256, precision, *float_operations])


def export_deployment(
    exporter: Exporter,
    deployment: Deployment,
    classes: Sequence[str],
    workdir: Path,
    input_spec: bundles.InputSpec | None = None,
    examples: Examples | None = None,
    extra_signatures: Collection[str] = (),
    backends: Collection[str] = (),
) -> None:
    """Writes WORKDIR/bundle, WORKDIR/bundle_original and WORKDIR/submodels; see `Exporter.bundle`.

    Raises:
      ValueError: the deployment is of another network, or its thresholds were chosen for another precision or a policy of another fidelity,
        or a segment cannot be computed at some cells only, see `RegionChain`.
    """
    for choice in deployment.exits:
        known = exporter.network.candidates
        check(f"{choice.exit}.{choice.head}" in known, "deployment", f"of candidates of this network, {known}", choice)
    required = f"{deployment.fidelity}, the fidelity of the statistics that the thresholds were chosen on"
    check(exporter.fidelity == deployment.fidelity, "fidelity", required, exporter.fidelity)
    required = f"{deployment.precision}, the precision of the statistics that the thresholds were chosen on"
    check(deployment.precision in ("", exporter.precision), "precision", required, exporter.precision)
    exporter.regions_of(deployment)  # says what cannot be done before work starts
    cost = bundles.Cost(deployment.predicted.cost_name, deployment.original.cost)
    alone = Configuration(bundles.BUDGETED, False, (ExitChoice(*FINAL.split(".")),), None)
    predicted = bundles.Predicted(deployment.original.miou, cost, (1.0,), deployment.backend)
    shared = (classes, input_spec, examples, extra_signatures, backends)
    original = exporter.bundle(workdir / "bundle_original", alone, predicted, *shared)
    signatures = exporter.bundle(workdir / "bundle", deployment, deployment.predicted.in_manifest(deployment.backend), *shared)

    def write(submodels: Path) -> None:
        for name, graph in signatures.items():
            if name != bundles.FULL:
                exporter.save(submodels / f"{name}.tflite", graph)
        exporter.save(submodels / "original.tflite", original[bundles.alone_signature("final")])

    replace_folder(workdir / "submodels", write)


@dataclasses.dataclass(frozen=True)
class Options:
    """How a network is exported.

    Attributes:
      precision: see `Exporter`; None for that of the deployment's statistics, for candidates fp32.
      float_operations: see `Exporter`.
      fidelity: see `Exporter`; None for that of the deployment's statistics, for candidates exact.
    """

    precision: str | None = None
    float_operations: tuple[str, ...] = ()
    fidelity: str | None = None


def _open(workdir: str | os.PathLike, data_dir: str) -> tuple[configs.Config, Examples, MultiExitNetwork]:
    """The configuration, the validation split and the trained network."""
    bundles.check_writable("workdir", workdir, folder=True)
    config = configs.with_data_dir(configs.load_config(workdir), data_dir)
    examples = open_split(config.data, config.data.val_split)
    return config, examples, load_network(workdir, config, examples.info.num_classes)


def _exporter(network: MultiExitNetwork, config: configs.Config, options: Options) -> Exporter:
    samples = calibration_images(config) if options.precision == INT8 else ()
    floats = options.float_operations if options.precision == INT8 else ()
    return Exporter(network, config.data.input_size, options.fidelity, options.precision, samples, floats)


def run_candidates(
    workdir: str | os.PathLike,
    data_dir: str = "",
    options: Options = Options(),
    precisions: Sequence[str] = (),
    regions: RegionOptions = BY_TRAINING,
) -> list[Path]:
    """The command with --candidates: see `export_candidates`; of several precisions, or of that of the options. Returns the folders.

    In int8, and with a policy that is not exact, there are no regions.
    """
    check(set(precisions) <= set(PRECISIONS), "precisions", f"of {', '.join(PRECISIONS)}", ",".join(precisions))
    config, _, network = _open(workdir, data_dir)
    folders, chains = [], plan(network, config, regions)
    for precision in dict.fromkeys(precisions or (None,)):
        chosen = dataclasses.replace(options, precision=precision or options.precision or FP32, fidelity=options.fidelity or policy.EXACT)
        folder = Path(workdir, of_precision(CANDIDATES, precision))
        able = chosen.precision != INT8 and chosen.fidelity == policy.EXACT
        export_candidates(_exporter(network, config, chosen), folder, chains if able else None)
        folders.append(folder)
    return folders


def are_exported(workdir: str | os.PathLike, precision: str | None = None, regions: bool = False) -> bool:
    """Whether the candidates, the only ones in fp32 or those of this precision, are of the trained weights, and those of regions there."""
    path, weights = Path(workdir, of_precision(CANDIDATES, precision), WEIGHTS), trained_weights(workdir)
    made_from = _made_from(weights_sha256(read_arrays(weights)), precision or FP32, ())
    there = not regions or precision == INT8 or path.with_name(REGIONS_OF_FILES).exists()
    return there and path.exists() and path.read_text() == made_from


def run_deployment(
    workdir: str | os.PathLike,
    deployment: str | os.PathLike,
    data_dir: str = "",
    options: Options = Options(),
    input_type: str = "uint8",
    resize: str | None = None,
    measure: bool = True,
    extra_signatures: Collection[str] = (),
    backends: Collection[str] = (),
) -> Path:
    """The command with --deployment: see `export_deployment`; also writes some images to try it on. Returns the folder of the bundle."""
    check(set(backends) <= set(BACKENDS), "verify", f"of {', '.join(BACKENDS)}", ",".join(backends))
    of_training = configs.load_config(workdir).data.resize
    required = f"{of_training}, the data.resize of this training, by which its statistics were taken; --set data.resize at its start"
    check(resize in (None, of_training), "--resize", required, resize)
    workdir, chosen = Path(workdir), Deployment.load(deployment)
    precision, fidelity = options.precision or chosen.precision or FP32, options.fidelity or chosen.fidelity
    check(precision == INT8 or not options.float_operations, "--float_operations", f"left out with {precision}", options.float_operations)
    check(chosen.precision in ("", precision), "--precision", f"{chosen.precision}, which was searched, or left out", precision)
    chosen.check_stats(deployment, workdir / chosen.named(STATS))
    config, examples, network = _open(workdir, data_dir)
    exporter = _exporter(network, config, dataclasses.replace(options, precision=precision, fidelity=fidelity))
    input_spec = bundles.InputSpec(*exporter.size, input_type, of_training)
    measured = examples if measure else None
    export_deployment(exporter, chosen, examples.info.classes, workdir, input_spec, measured, extra_signatures, backends)
    (workdir / "examples").mkdir(exist_ok=True)
    for i in range(min(EXAMPLES, len(examples))):
        Image.fromarray(examples.load(i)[0]).save(workdir / "examples" / f"{Path(examples.names[i]).name}.png")
    content = Path(deployment).read_bytes()
    write_atomically(workdir / "bundle" / DEPLOYMENT, lambda temporary: temporary.write_bytes(content))
    return workdir / "bundle"


def is_bundled(workdir: str | os.PathLike, deployment: str | os.PathLike) -> bool:
    """Whether WORKDIR/bundle is whole and was made from this file."""
    try:
        folder = bundles.Bundle.load(Path(workdir, "bundle")).folder
        return (folder / DEPLOYMENT).read_bytes() == Path(deployment).read_bytes()
    except (FileNotFoundError, ValueError):
        return False


def main() -> None:
    allow_flags()
    options = Options(FLAGS.precision, tuple(FLAGS.float_operations), FLAGS.fidelity)
    if FLAGS.candidates:
        for folder in run_candidates(FLAGS.workdir, FLAGS.data_dir, options, FLAGS.precisions, options_of_flags()):
            print(folder)
        return
    target, output, packages = MODULES.get(FLAGS.target), Path(FLAGS.output), [Path(FLAGS.litertjs)] if FLAGS.litertjs else []
    if target:
        target.check(output, *packages)
    if target is mediapipe:
        deployed = bundles.Bundle.load(FLAGS.bundle).manifest if FLAGS.bundle else Deployment.load(FLAGS.deployment)
        mediapipe.check_whole_images(deployed.regions)
    bundle = FLAGS.bundle
    if FLAGS.deployment:
        how = (FLAGS.input, FLAGS.resize, FLAGS.measure, FLAGS.extra_signatures, FLAGS.verify)
        bundle = run_deployment(FLAGS.workdir, FLAGS.deployment, FLAGS.data_dir, options, *how)
        print(bundle)
    if target:
        target.write(bundles.Bundle.load(bundle), output, *packages)
        print(output)
