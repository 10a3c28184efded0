"""One pass over the calibration split: everything the search needs, per image, exit and head, in WORKDIR/stats.npz.

`python -m mess_tf.calibrate --workdir=W [--data_dir=D]`, after `export_tflite --candidates`: the submodels are what runs, so the statistics
are those of their precision and name the files whose latencies belong to them. The exit policy runs as the .tflite that devices run,
so a threshold means the same there. With --precisions, as given to `export_tflite`, stats.fp16.npz and so on, one for each.
"""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from absl import flags
from ai_edge_litert.interpreter import Interpreter

from mess_runtime.bundle import CONFIDENT_PIXELS, IMAGE, MASK, SIGNATURE, check, check_writable, file_sha256
from mess_runtime.images import mask_at
from mess_runtime.terminal import Bar
from mess_tf import configs, metrics, terminal
from mess_tf.data.examples import Examples
from mess_tf.data.pipelines import evaluation_batches, network_input
from mess_tf.data.sources import open_split
from mess_tf.export_tflite import WEIGHTS
from mess_tf.files import CANDIDATES, STATS, Stats, check_theta_pix, made_by, of_precision
from mess_tf.graph import flatbuffer, policy
from mess_tf.graph.conversion import FP32, PRECISIONS, convert
from mess_tf.graph.exporter import head_cost, head_name, policy_name, tensor_shapes
from mess_tf.network.costs import Cost, model_cost
from mess_tf.network.model import FINAL, MultiExitNetwork, load_network
from mess_tf.network.originals import check_flags, define_flags

THETA_PIX = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
CHUNK = 16  # images whose features are held at once, so that a head is loaded once for all of them

EXPORT_AGAIN = "`python -m mess_tf.export_tflite --candidates` makes them anew"

# Images [1, H, W, 3] of whole values in float32 to each candidate's name and logits float32 [1, h, w, C], the final exit's first.
LogitsOf = Callable[[Sequence[np.ndarray]], Iterator[tuple[str, list[np.ndarray]]]]


def logits_of_keras(network: MultiExitNetwork) -> LogitsOf:
    """Runs the network itself."""
    features_of = tf.function(network.features(network.candidates), autograph=False)
    head_of = tf.function(network.head_logits, autograph=False)

    def run(images):
        features = [features_of(image, training=False) for image in images]
        for candidate in reversed(network.candidates):
            taps = network.taps(candidate)
            yield candidate, [head_of(candidate, {name: each[name] for name in taps}).numpy() for each in features]

    return run


def logits_of_files(prefixes: Mapping[str, Path], heads: Mapping[str, Path]) -> LogitsOf:
    """Runs exported submodels: prefixes by exit, heads by candidate, both shallow to deep."""

    def outputs_of(path: Path, inputs: Sequence[Mapping[str, np.ndarray]]) -> list[Mapping[str, np.ndarray]]:
        runner = Interpreter(str(path), num_threads=os.cpu_count()).get_signature_runner(SIGNATURE)
        details = runner.get_input_details()
        return [runner(**{name: each[name].astype(tensor["dtype"], copy=False) for name, tensor in details.items()}) for each in inputs]

    def run(images):
        for exit_name, prefix in reversed(prefixes.items()):
            features = outputs_of(prefix, [{IMAGE: image} for image in images])
            for candidate, head in reversed(heads.items()):
                if candidate.startswith(f"{exit_name}."):
                    yield candidate, [outputs["logits"] for outputs in outputs_of(head, features)]

    return run


def calibrate(
    network: MultiExitNetwork,
    examples: Examples,
    split: str,
    size: tuple[int, int],
    folder: str | Path,
    theta_pix: Sequence[float] = THETA_PIX,
    fidelity: str = policy.EXACT,
    resize: str = "stretch",
) -> Stats:
    """Runs every exit and head once over a split.

    Args:
      network: with all heads trained.
      examples: the calibration split. Images are fitted to `size`, masks brought back to the image, as on the device.
      split: its name.
      size: (height, width) in pixels of the exported network.
      folder: of the exported candidates, which are run. If there are none, the network itself is, in float32; the hashes stay empty then,
        and the search knows MACs only.
      theta_pix: thresholds of the pixel confidence, increasing.
      fidelity: of the policy, see `policy.decide`.
      resize: how images are fitted, see `images.fit`.

    Returns:
      The statistics, see `Stats`.

    Raises:
      ValueError: the candidates were exported with other weights, or without this fidelity; thresholds do not increase.
    """
    check_theta_pix(theta_pix)
    candidates = network.candidates
    exits = [point.name for point in network.exit_points] + ["final"]
    prefixes = {name: Path(folder) / f"prefix.{name}.tflite" for name in exits}
    heads = {name: Path(folder) / f"{head_name(name, fidelity)}.tflite" for name in candidates}
    weights, of_network, precision = Path(folder) / WEIGHTS, network.weights_sha256(), FP32
    if exported := weights.exists():
        of_files, precision, *_ = (*weights.read_text().split(" "), "")
        check(of_files == of_network, str(weights), f"{of_network}, as of this network; {EXPORT_AGAIN}", of_files)
        there = all(path.exists() for path in heads.values())
        check(there, "fidelity", f"one that the candidates were exported with; {EXPORT_AGAIN}", fidelity)
    logits_of = logits_of_files(prefixes, heads) if exported else logits_of_keras(network)
    thresholds = [(theta, edge_aware) for theta in theta_pix for edge_aware in (False, True)]

    @functools.cache
    def policy_runner(shape: tuple[int, ...]):
        graph = convert(lambda logits: policy.decide(logits, size, thresholds, fidelity), {"logits": shape})
        return Interpreter(model_content=flatbuffer.write({SIGNATURE: graph}), num_threads=os.cpu_count()).get_signature_runner(SIGNATURE)

    num_classes = examples.info.num_classes
    counts = np.zeros((3, len(candidates), len(examples), num_classes), np.int64)
    confident = np.zeros((len(candidates), len(examples), len(theta_pix), 2), np.int64)
    changed = np.zeros(confident.shape[:2], np.int64)
    batches = enumerate(evaluation_batches(examples).as_numpy_iterator())
    with Bar("calibrate", len(examples) * len(candidates), "mask") as bar:
        while chunk := list(itertools.islice(batches, CHUNK)):
            final_masks: dict[int, np.ndarray] = {}
            for candidate, logits in logits_of([network_input(image, size, resize) for _, (image, _) in chunk]):
                k = candidates.index(candidate)
                for (i, (_, label)), each in zip(chunk, logits, strict=True):
                    outputs = policy_runner(each.shape)(logits=each)
                    confident[k, i] = outputs[CONFIDENT_PIXELS].reshape(len(theta_pix), 2)
                    prediction = mask_at(outputs[MASK], label.shape[1:3], resize)
                    counts[:, k, i] = metrics.class_counts(metrics.confusion_matrix(label, prediction, num_classes))
                    if candidate == FINAL:
                        final_masks[i] = outputs[MASK]
                    changed[k, i] = (outputs[MASK] != final_masks[i]).sum()
                    bar.advance(candidate)

    def sha256(path: Path) -> str:
        return file_sha256(path) if exported else ""

    of_exit = [[name for name in candidates if name.startswith(f"{exit_name}.")] for exit_name in exits]

    prefix = [model_cost(network.features(names), size) for names in of_exit]
    shapes = tensor_shapes(network, size)
    head = [head_cost(network, name, shapes) for name in candidates]
    costs = {
        f"{part}_{field.name}": np.array([getattr(cost, field.name) for cost in of_part], np.int64)
        for part, of_part in (("prefix", prefix), ("head", head))
        for field in dataclasses.fields(Cost)
    }

    def policy_sha256(mode: str) -> tuple[str, ...]:
        return tuple(sha256(Path(folder) / f"{policy_name(name, shapes, mode, fidelity)}.tflite") for name in candidates)

    return Stats(
        split=split,
        fidelity=fidelity,
        candidates=tuple(candidates),
        images=examples.names,
        classes=examples.info.classes,
        pixels=np.full(len(examples), size[0] * size[1], np.int64),
        tp=counts[0],
        fp=counts[1],
        fn=counts[2],
        theta_pix=np.array(theta_pix, np.float64),
        confident=confident,
        changed=changed,
        **costs,
        prefix_sha256=tuple(map(sha256, prefixes.values())),
        head_sha256=tuple(map(sha256, heads.values())),
        mask_sha256=policy_sha256("mask"),
        plain_sha256=policy_sha256("plain"),
        edge_sha256=policy_sha256("edge"),
        made_by=json.dumps(made_by() | {"tensorflow": tf.__version__}),
        precision=precision,
    )


def run(
    workdir: str,
    data_dir: str = "",
    split: str = "",
    theta_pix: Sequence[float] = THETA_PIX,
    fidelity: str = policy.EXACT,
    precisions: Sequence[str] = (),
) -> list[Path]:
    """The command: see `calibrate`; the split is the validation split if none is named. Returns the paths of the statistics."""
    config = configs.with_data_dir(configs.load_config(workdir), data_dir)
    check_theta_pix(theta_pix)
    check_writable("workdir", workdir, folder=True)
    check(set(precisions) <= set(PRECISIONS), "precisions", f"of {', '.join(PRECISIONS)}", ",".join(precisions))
    for folder in (Path(workdir, of_precision(CANDIDATES, each)) for each in precisions):
        command = f"`python -m mess_tf.export_tflite --candidates --precisions={','.join(precisions)}`"
        check((folder / WEIGHTS).exists(), "precisions", f"those of exported candidates; {command} makes them", str(folder))
    split = split or config.data.val_split
    examples = open_split(config.data, split)
    network = load_network(workdir, config, examples.info.num_classes)
    paths = []
    for precision in precisions or (None,):
        folder, path = Path(workdir, of_precision(CANDIDATES, precision)), Path(workdir, of_precision(STATS, precision))
        calibrate(network, examples, split, config.data.input_size, folder, theta_pix, fidelity, config.data.resize).save(path)
        paths.append(path)
    return paths


def is_calibrated(workdir: str | os.PathLike, split: str, precision: str | None = None) -> bool:
    """Whether the statistics, of the only or of this precision, are of this split and of the candidates that are there now."""
    folder = Path(workdir, of_precision(CANDIDATES, precision))
    try:
        stats = Stats.load(Path(workdir, of_precision(STATS, precision)))
    except (FileNotFoundError, ValueError):
        return False
    wanted = {f"prefix.{name}": sha256 for name, sha256 in zip(stats.exits, stats.prefix_sha256, strict=True)}
    wanted |= {head_name(name, stats.fidelity): sha256 for name, sha256 in zip(stats.candidates, stats.head_sha256, strict=True)}
    found = {path.stem: file_sha256(path) for path in folder.glob("*.tflite")}
    policies = {*stats.mask_sha256, *stats.plain_sha256, *stats.edge_sha256}
    return stats.split == split and all(found.get(name) == sha256 for name, sha256 in wanted.items()) and policies <= {*found.values()}


def main() -> None:
    check_flags(configs.load_config(FLAGS.workdir))
    for path in run(FLAGS.workdir, FLAGS.data_dir, FLAGS.split, terminal.numbers("theta_pix"), FLAGS.fidelity, FLAGS.precisions):
        print(path)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    define_flags()
    flags.DEFINE_string("workdir", None, "folder of a training", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_string("split", "", "split to calibrate on; default: the validation split")
    flags.DEFINE_enum("fidelity", policy.EXACT, policy.FIDELITIES, "what the exit policy computes at full size, as in export_tflite")
    flags.DEFINE_list("precisions", [], "calibrate candidates.PRECISION of each of these instead, as exported with the same flag")
    flags.DEFINE_list("theta_pix", [str(theta) for theta in THETA_PIX], "grid of pixel thresholds")
    terminal.run(main)
