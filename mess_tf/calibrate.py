"""One pass over the calibration split: everything the search needs, per image, exit and head, in WORKDIR/stats.npz.

The split is counted in shards, each a task with a file in WORKDIR/shards that is left as it is when the command starts again after a kill;
all of them together are the statistics, whatever the shards were and wherever they were counted (`--ray`, see `tasks`).

`python -m mess_tf.calibrate --workdir=W [--data_dir=D]`, after `export_tflite --candidates`: the submodels are what runs, so the statistics
are those of their precision and name the files whose latencies belong to them. The exit policy runs as the .tflite that devices run,
so a threshold means the same there. With --precisions, as given to `export_tflite`, stats.fp16.npz and so on, one for each.

With --regions, or a training whose stage1.regions is another than none, it also writes WORKDIR/regions.npz: the whole outcome of chains of
exits whose cells leave each for itself, for every theta_pix and --theta_img at each of them, in shards likewise; see
`mess_tf.region_candidates`.
"""

from absl import flags

from mess_runtime.bundle import FIDELITIES
from mess_tf import arguments, tasks, terminal
from mess_tf.files import THETA_IMG, check_theta_pix

THETA_PIX = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def check_flags() -> None:
    """Raises FileNotFoundError, ValueError where a flag is wrong, or --workdir is not trained."""
    check_theta_pix(terminal.numbers("theta_pix"))
    arguments.check_trained()


if __name__ == "__main__":
    arguments.define_network_flags()
    flags.DEFINE_string("workdir", None, "folder of a training", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_string("split", "", "split to calibrate on; default: the validation split")
    flags.DEFINE_enum("fidelity", FIDELITIES[0], FIDELITIES, "what the exit policy computes at full size, as in export_tflite")
    flags.DEFINE_list("precisions", [], "calibrate candidates.PRECISION of each of these instead, as exported with the same flag")
    flags.DEFINE_list("theta_pix", [str(theta) for theta in THETA_PIX], "grid of pixel thresholds")
    tasks.define_flag()
    arguments.define_region_flags()
    flags.DEFINE_list("theta_img", [str(theta) for theta in THETA_IMG], "grid of shares of a region's pixels that must be confident")
    flags.DEFINE_integer("max_early", 1, "early exits of a chain whose regions leave, at most", lower_bound=1, upper_bound=2)
    terminal.run("mess_tf.calibrate", __doc__, check_flags)

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from mess_runtime.bundle import (
    CONFIDENT_PIXELS,
    IMAGE,
    MASK,
    SIGNATURE,
    Regions,
    check,
    check_writable,
    decode,
    file_sha256,
    read_json,
)
from mess_runtime.images import mask_at
from mess_runtime.terminal import Bar
from mess_tf import configs, metrics, region_candidates
from mess_tf.data.examples import Examples
from mess_tf.data.pipelines import evaluation_batches, network_input
from mess_tf.data.sources import open_split
from mess_tf.export_tflite import REGIONS_OF_FILES, WEIGHTS
from mess_tf.files import (
    CANDIDATES,
    REGIONS,
    STATS,
    RegionStats,
    Stats,
    joined,
    made_by,
    map_arrays,
    of_precision,
    packed,
    write_arrays,
)
from mess_tf.graph import flatbuffer, policy
from mess_tf.graph.conversion import FP32, INT8, PRECISIONS, convert
from mess_tf.graph.exporter import head_cost, head_name, policy_name, tensor_shapes
from mess_tf.network.costs import Cost, model_cost
from mess_tf.network.model import FINAL, MultiExitNetwork, load_network
from mess_tf.network.originals import allow, allow_flags, allowed
from mess_tf.region_candidates import (
    BY_TRAINING,
    NONE,
    WITHOUT,
    Outcomes,
    Plan,
    RegionOptions,
    configurations,
    needed,
    options_of_flags,
    plan,
    submodels,
)

FLAGS = flags.FLAGS
CHUNK = 16  # images whose features are held at once, so that a head is loaded once for all of them
SHARD = 64  # images whose counts are written at once
SHARDS, REGION_SHARDS = "shards", "region_shards"  # in a work folder
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count())  # of an interpreter; Ray sets it to the CPUs of a task

EXPORT_AGAIN = "`python -m mess_tf.export_tflite --candidates` makes them anew"
REGION_FLAGS = "regions, region_cell, region_dense"
REGIONS_AGAIN = "`python -m mess_tf.export_tflite --candidates`, with the same flags of regions, makes them anew"

# Images [1, H, W, 3] of whole values in float32 to each candidate's name and logits float32 [1, h, w, C], the final exit's first.
LogitsOf = Callable[[Sequence[np.ndarray]], Iterator[tuple[str, list[np.ndarray]]]]


def logits_of_keras(network: MultiExitNetwork) -> LogitsOf:
    """Runs the network itself, its heads without traced functions: each of these keeps 2.5 MiB, and none was faster."""
    features_of = tf.function(network.features(network.candidates), autograph=False)

    def run(images):
        features = [features_of(image, training=False) for image in images]
        for candidate in reversed(network.candidates):
            taps = network.taps(candidate)
            yield candidate, [network.head_logits(candidate, {name: each[name] for name in taps}).numpy() for each in features]

    return run


def logits_of_files(prefixes: Mapping[str, Path], heads: Mapping[str, Path]) -> LogitsOf:
    """Runs exported submodels: prefixes by exit, heads by candidate, both shallow to deep."""

    def outputs_of(path: Path, inputs: Sequence[Mapping[str, np.ndarray]]) -> list[Mapping[str, np.ndarray]]:
        runner = Interpreter(str(path), num_threads=THREADS).get_signature_runner(SIGNATURE)
        details = runner.get_input_details()
        return [runner(**{name: each[name].astype(tensor["dtype"], copy=False) for name, tensor in details.items()}) for each in inputs]

    def run(images):
        for exit_name, prefix in reversed(prefixes.items()):
            features = outputs_of(prefix, [{IMAGE: image} for image in images])
            for candidate, head in reversed(heads.items()):
                if candidate.startswith(f"{exit_name}."):
                    yield candidate, [outputs["logits"] for outputs in outputs_of(head, features)]

    return run


class Calibration:
    """What counts the images of a split: the same for all of them, so that they can be counted in any parts, in any order, anywhere."""

    def __init__(
        self,
        network: MultiExitNetwork,
        examples: Examples,
        split: str,
        size: tuple[int, int],
        folder: str | Path,
        theta_pix: Sequence[float] = THETA_PIX,
        fidelity: str = policy.EXACT,
        resize: str = "stretch",
    ):
        """Looks at what will be run; see `calibrate`."""
        check_theta_pix(theta_pix)
        self.network, self.examples, self.split, self.size = network, examples, split, size
        self.folder, self.fidelity, self.resize = Path(folder), fidelity, resize
        self.theta_pix = np.array(theta_pix, np.float64)
        self.exits = [point.name for point in network.exit_points] + ["final"]
        prefixes = {name: self.folder / f"prefix.{name}.tflite" for name in self.exits}
        heads = {name: self.folder / f"{head_name(name, fidelity)}.tflite" for name in network.candidates}
        weights, of_network, self.precision = self.folder / WEIGHTS, network.weights_sha256(), FP32
        self.shapes = tensor_shapes(network, size)
        self.hashes = {"prefix": ("",) * len(self.exits)} | dict.fromkeys(("head", "mask", "plain", "edge"), ("",) * len(heads))
        exported = weights.exists()
        begun = any(path.exists() for path in (*prefixes.values(), *heads.values()))
        check(exported or not begun, str(weights), f"there, as the last file of an export; {EXPORT_AGAIN}", "no such file")
        if exported:
            of_files, self.precision, *_ = (*weights.read_text().split(" "), "")
            check(of_files == of_network, str(weights), f"{of_network}, as of this network; {EXPORT_AGAIN}", of_files)
            there = all(path.exists() for path in heads.values())
            check(there, "fidelity", f"one that the candidates were exported with; {EXPORT_AGAIN}", fidelity)
            files = {"prefix": prefixes.values(), "head": heads.values()}
            for mode in ("mask", "plain", "edge"):
                names = (policy_name(name, self.shapes, mode, fidelity) for name in heads)
                files[mode] = [self.folder / f"{name}.tflite" for name in names]
            self.hashes = {kind: tuple(map(file_sha256, paths)) for kind, paths in files.items()}
        self.logits_of = logits_of_files(prefixes, heads) if exported else logits_of_keras(network)
        self.regional: RegionCalibration | None = None
        about = (self.hashes, self.precision, fidelity, of_network, self.theta_pix.tolist(), split, size, resize, examples.info.classes)
        self._sha256 = hashlib.sha256(json.dumps([network.candidates, *about]).encode())

    @functools.cached_property
    def _decide(self) -> Callable[[np.ndarray], Mapping[str, np.ndarray]]:
        """Logits float32 [1, h, w, C] to the mask and the confident pixels of all thresholds."""
        thresholds = [(theta, edge_aware) for theta in self.theta_pix.tolist() for edge_aware in (False, True)]

        @functools.cache
        def runner(shape: tuple[int, ...]):
            graph = convert(lambda logits: policy.decide(logits, self.size, thresholds, self.fidelity), {"logits": shape})
            content = flatbuffer.write({SIGNATURE: graph})
            return Interpreter(model_content=content, num_threads=THREADS).get_signature_runner(SIGNATURE)

        return lambda logits: runner(logits.shape)(logits=logits)

    def count(self, images: range) -> dict[str, np.ndarray]:
        """Runs every exit and head once over some images.

        Args:
          images: positions in the split, one after another.

        Returns:
          The arrays of `files.packed`, `confident` and `changed` of these images, see `Stats`.
        """
        candidates, num_classes = self.network.candidates, self.examples.info.num_classes
        counts = np.zeros((3, len(candidates), len(images), num_classes), np.int64)
        confident = np.zeros((len(candidates), len(images), self.theta_pix.size, 2), np.int32)
        changed = np.zeros(confident.shape[:2], np.int32)
        batches = enumerate(evaluation_batches(self.examples, images).as_numpy_iterator())
        with Bar("calibrate", counts[0, ..., 0].size, "mask") as bar:
            while chunk := list(itertools.islice(batches, CHUNK)):
                final_masks: dict[int, np.ndarray] = {}
                for candidate, logits in self.logits_of([network_input(image, self.size, self.resize) for _, (image, _) in chunk]):
                    k = candidates.index(candidate)
                    for (i, (_, label)), each in zip(chunk, logits, strict=True):
                        outputs = self._decide(each)
                        confident[k, i] = outputs[CONFIDENT_PIXELS].reshape(confident.shape[2:])
                        prediction = mask_at(outputs[MASK], label.shape[1:3], self.resize)
                        counts[:, k, i] = metrics.class_counts(metrics.confusion_matrix(label, prediction, num_classes))
                        if candidate == FINAL:
                            final_masks[i] = outputs[MASK]
                        changed[k, i] = (outputs[MASK] != final_masks[i]).sum()
                        bar.advance(candidate)
        tp, fp, fn = counts
        return packed(tp, fp, (tp + fn)[-1]) | {"confident": confident, "changed": changed}

    def key(self, images: range) -> str:
        """SHA-256 of all that the `count` of some images depends on, in lower-case hexadecimal."""
        digest = self._sha256.copy()
        digest.update(json.dumps([(self.examples.names[i], self.examples.digest(i)) for i in images]).encode())
        return digest.hexdigest()

    def stats(self, parts: Sequence[Mapping[str, np.ndarray]]) -> Stats:
        """The statistics of the split, of the `count` of each of its parts, in order."""
        network, candidates = self.network, self.network.candidates
        of_exit = [[name for name in candidates if name.startswith(f"{exit_name}.")] for exit_name in self.exits]
        prefix = [model_cost(network.features(names), self.size) for names in of_exit]
        head = [head_cost(network, name, self.shapes) for name in candidates]
        costs = {
            f"{part}_{field.name}": np.array([getattr(cost, field.name) for cost in of_part], np.int64)
            for part, of_part in (("prefix", prefix), ("head", head))
            for field in dataclasses.fields(Cost)
        }
        return Stats(
            split=self.split,
            fidelity=self.fidelity,
            candidates=tuple(candidates),
            images=self.examples.names,
            classes=self.examples.info.classes,
            pixels=np.full(len(self.examples), self.size[0] * self.size[1], np.int64),
            theta_pix=self.theta_pix,
            **joined(parts),
            **costs,
            **{f"{kind}_sha256": hashes for kind, hashes in self.hashes.items()},
            made_by=json.dumps(made_by() | {"tensorflow": tf.__version__}),
            precision=self.precision,
        )

    def shards(self, images: int) -> list[range]:
        """The split in parts of so many images."""
        return [range(len(self.examples))[start : start + images] for start in range(0, len(self.examples), images)]


class RegionCalibration:
    """What counts the regions of the images of a split, see `Calibration`: every chain, with each pair of thresholds at each early exit."""

    def __init__(self, calibration: Calibration, chains: Plan, theta_img: Sequence[float] = THETA_IMG):
        """Looks at what will be run.

        Args:
          calibration: of the same images; not in int8, since its segments run in float. The files of regions among its candidates
            are named; if there are none, the search knows MACs only.
          chains: what is to be run.
          theta_img: grid.

        Raises:
          ValueError: the candidates were exported for other regions or heads, or there are too many configurations.
        """
        check(calibration.precision != INT8, "precision", f"none of {INT8} with regions", calibration.precision)
        check(calibration.fidelity == policy.EXACT, "fidelity", f"{policy.EXACT} with regions", calibration.fidelity)
        of_files = calibration.folder / REGIONS_OF_FILES
        if of_files.exists():
            read = read_json(of_files, lambda value: decode(Regions, value, "regions"))
            check(read == chains.regions, REGION_FLAGS, f"those of {of_files} ({read}); {REGIONS_AGAIN}", str(chains.regions))
            missing = [name for name in needed(chains) if not (calibration.folder / f"{name}.tflite").exists()]
            check(not missing, "region_heads", f"of exported candidates, without {', '.join(missing)}; {REGIONS_AGAIN}", chains.candidates)

        def sha256(name: str) -> str:
            path = calibration.folder / f"{name}.tflite"
            return file_sha256(path) if of_files.exists() and path.exists() else ""

        self.first_sha256, self.pair_sha256 = (tuple(map(sha256, names)) for names in submodels(chains))
        self.calibration, self.chains = calibration, chains
        self.every = configurations(chains, calibration.theta_pix.tolist(), theta_img)
        regions = dataclasses.astuple(chains.regions)
        self._about = json.dumps([regions, chains.candidates, self.every, self.first_sha256, self.pair_sha256])

    @functools.cached_property
    def _outcomes(self) -> Outcomes:
        return Outcomes(self.calibration.network, self.chains, self.calibration.size)

    def count(self, images: range) -> dict[str, np.ndarray]:
        """See `region_candidates.count`."""
        return region_candidates.count(self._outcomes, self.every, self.calibration.examples, images, self.calibration.resize)

    def key(self, images: range) -> str:
        """SHA-256 of all that the `count` of some images depends on, in lower-case hexadecimal."""
        return hashlib.sha256((self.calibration.key(images) + self._about).encode()).hexdigest()

    def stats(self, parts: Sequence[Mapping[str, np.ndarray]], stats_sha256: str) -> RegionStats:
        """The statistics of the split, of the `count` of each of its parts, in order; `stats_sha256`: of the file of whole images."""
        calibration = self.calibration
        return RegionStats(
            split=calibration.split,
            stats_sha256=stats_sha256,
            images=calibration.examples.names,
            classes=calibration.examples.info.classes,
            neighbours=self.chains.regions.neighbours,
            dense=self.chains.regions.dense,
            candidates=self.chains.candidates,
            first_sha256=self.first_sha256,
            pair_sha256=self.pair_sha256,
            made_by=json.dumps(made_by() | {"tensorflow": tf.__version__}),
            precision=calibration.precision,
            **region_candidates.joined(parts),
            **region_candidates.described(calibration.network, self.chains, calibration.size, self.every),
        )


def calibrate(*args, **kwargs) -> Stats:
    """The statistics of a whole split, made in memory; arguments as of `Calibration`."""
    calibration = Calibration(*args, **kwargs)
    return calibration.stats([calibration.count(range(len(calibration.examples)))])


def calibrations(
    workdir: str,
    data_dir: str = "",
    split: str = "",
    theta_pix: Sequence[float] = THETA_PIX,
    fidelity: str = policy.EXACT,
    precisions: Sequence[str | None] = (None,),
    regions: RegionOptions = WITHOUT,
) -> dict[str | None, Calibration]:
    """What counts the images of a work folder, by precision, and `regional` their regions, but in int8.

    The split is the validation split if none is named.
    """
    config = configs.with_data_dir(configs.load_config(workdir), data_dir)
    split = split or config.data.val_split
    examples = open_split(config.data, split)
    network = load_network(workdir, config, examples.info.num_classes)
    folders = {precision: Path(workdir, of_precision(CANDIDATES, precision)) for precision in precisions}
    fixed = config.data.input_size, theta_pix, fidelity, config.data.resize
    found = {precision: Calibration(network, examples, split, fixed[0], folder, *fixed[1:]) for precision, folder in folders.items()}
    if chains := plan(network, config, regions):
        check(fidelity == policy.EXACT, "fidelity", f"{policy.EXACT} with regions", fidelity)
        for each in found.values():
            each.regional = None if each.precision == INT8 else RegionCalibration(each, chains, regions.theta_img)
    return found


def _opened(allowance: tuple[Sequence[str], bool], *of: Any) -> dict[str | None, Calibration]:
    """What tasks count with, in another process: see `originals.allow` and `calibrations`."""
    allow(*allowance)
    return calibrations(*of)


def count_shard(
    opened: tasks.Opened[Mapping[str | None, Calibration]], precision: str | None, regions: bool, images: range, key: str, path: Path
) -> None:
    """A task: writes the `count` of some images, or of their regions.

    Raises:
      ValueError: what is counted here does not have this key, see `Calibration.key`.
    """
    calibration = opened.value[precision].regional if regions else opened.value[precision]
    check(calibration.key(images) == key, "workdir", "the same on all machines, and the data too", str(path.parent))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, key=np.array(key), **calibration.count(images))


def _is_of(path: Path, key: str) -> bool:
    try:
        return bool(map_arrays(path)["key"] == key)
    except (FileNotFoundError, ValueError, KeyError):
        return False


def shard_tasks(
    opened: tasks.Opened[Mapping[str | None, Calibration]],
    workdir: str,
    precision: str | None = None,
    shard: int = SHARD,
    regions: bool = False,
) -> list[tasks.Task]:
    """The tasks that count a split, or its regions, so many images each.

    Those are done whose files are there, whole, and of the same images and files.
    """
    folder, calibration, result = Path(workdir, of_precision(REGION_SHARDS if regions else SHARDS, precision)), opened.value[precision], []
    counts = calibration.regional if regions else calibration
    for images in calibration.shards(shard):
        path, key = folder / f"{images.start}-{images.stop}.npz", counts.key(images)
        result.append(tasks.Task(count_shard, (opened, precision, regions, images, key, path), path, _is_of(path, key)))
    return result


def merge(
    calibration: Calibration, shards: Sequence[Path], path: Path, region_shards: Sequence[Path] = (), region_path: Path | None = None
) -> None:
    """Writes the statistics of a split, and of its regions, of the files of all shards, in order, and deletes the folders of the shards."""
    calibration.stats([map_arrays(shard) for shard in shards]).save(path)
    if region_shards:
        calibration.regional.stats([map_arrays(shard) for shard in region_shards], file_sha256(path)).save(region_path)
    for folder in {shard.parent for shard in (*shards, *region_shards)}:
        shutil.rmtree(folder)


def run(
    workdir: str,
    data_dir: str = "",
    split: str = "",
    theta_pix: Sequence[float] = THETA_PIX,
    fidelity: str = policy.EXACT,
    precisions: Sequence[str] = (),
    regions: RegionOptions = BY_TRAINING,
    ray: str = "",
    shard: int = SHARD,
) -> list[Path]:
    """The command: see `calibrations` and, for `ray`, `tasks.run`; `shard`: images of a task. Returns the paths of the statistics.

    With regions, those of regions, too; in int8 they are left out.
    """
    check_theta_pix(theta_pix)
    check_writable("workdir", workdir, folder=True)
    check(set(precisions) <= set(PRECISIONS), "precisions", f"of {', '.join(PRECISIONS)}", ",".join(precisions))
    for folder in (Path(workdir, of_precision(CANDIDATES, each)) for each in precisions):
        command = f"`python -m mess_tf.export_tflite --candidates --precisions={','.join(precisions)}`"
        check((folder / WEIGHTS).exists(), "precisions", f"those of exported candidates; {command} makes them", str(folder))
    of = workdir, data_dir, split, theta_pix, fidelity, precisions or (None,), regions
    opened = tasks.Opened(calibrations(*of), _opened, allowed(), *of)
    todo, paths = {}, []
    for precision, calibration in opened.value.items():
        todo[precision, False] = shard_tasks(opened, workdir, precision, shard)
        if regional := calibration.regional:
            print(f"regions: {len(regional.chains.chains)} chains, {len(regional.every)} configurations, {regional.chains.regions}")
            todo[precision, True] = shard_tasks(opened, workdir, precision, shard, regions=True)
        elif regions.of(configs.load_config(workdir)).neighbours != NONE:
            print(f"regions: left out in {INT8}, which their segments do not run in")
    tasks.run([*itertools.chain(*todo.values())], "calibrate", "shard", ray)
    for precision, calibration in opened.value.items():
        shards, of_regions = ([task.output for task in todo.get((precision, regional), ())] for regional in (False, True))
        path, region_path = (Path(workdir, of_precision(name, precision)) for name in (STATS, REGIONS))
        merge(calibration, shards, path, of_regions, region_path)
        paths += [path, region_path] if of_regions else [path]
    return paths


def is_calibrated_with_regions(workdir: str | os.PathLike, config: configs.Config, precision: str | None = None) -> bool:
    """Whether the statistics of regions, as the training had them, belong to those of whole images and to the candidates' files."""
    folder, stats = Path(workdir, of_precision(CANDIDATES, precision)), Path(workdir, of_precision(STATS, precision))
    try:
        found = RegionStats.load(Path(workdir, of_precision(REGIONS, precision)))
    except (FileNotFoundError, ValueError):
        return precision == INT8
    here = {file_sha256(path) for path in folder.glob("region.*.tflite")}
    same = found.neighbours == config.stage1.regions and found.stats_sha256 == file_sha256(stats)
    return same and here == {*found.first_sha256, *found.pair_sha256} - {""}


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
    config = configs.load_config(FLAGS.workdir)
    allow_flags()
    tasks.check_installed(FLAGS.ray)
    theta_img = tuple(terminal.numbers("theta_img"))
    regions = dataclasses.replace(options_of_flags(), max_early=FLAGS.max_early, theta_img=theta_img)
    without = regions.of(config).neighbours == NONE
    terminal.check_left_out(without, "region_cell region_heads max_early theta_img", "without --regions")
    how = (FLAGS.split, terminal.numbers("theta_pix"), FLAGS.fidelity, FLAGS.precisions, regions, FLAGS.ray)
    for path in run(FLAGS.workdir, FLAGS.data_dir, *how):
        print(path)
