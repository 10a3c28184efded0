"""Two-stage training of a multi-exit network; see docs/how_it_works.md.

`python -m mess_tf.train --workdir=W --recipe=camvid_lite0 --data_dir=D [--set section.field=value ...]` trains both stages, each from its
last checkpoint if there is one. WORKDIR/config.json keeps the resolved configuration; a later start must ask for the same or nothing.

`--strategy` says on which devices, and may be another one at each start. With `--ray`, the groups of heads of stage 2 are trained
elsewhere, see `tasks` and `learning.parts`.
"""

from absl import flags

from mess_runtime.bundle import check
from mess_tf import arguments, tasks, terminal
from mess_tf.configs import STRATEGIES, check_strategy
from mess_tf.files import best_weights


def check_arguments() -> None:
    """Raises ValueError where the flags ask for no training, or for data, devices or machines that are not there."""
    values = flags.FLAGS
    arguments.check_training()
    check_strategy(values.strategy)
    check(not values.ray or values.strategy == "none", "--ray", f"left out with --strategy={values.strategy}", values.ray)
    check(not values.ray or values.stages == "both", "--ray", f"left out with --stages={values.stages}", values.ray)
    tasks.check_installed(values.ray)


if __name__ == "__main__":
    arguments.define_network_flags()
    arguments.define_training_flags()
    flags.DEFINE_enum("stages", "both", ["stage1", "both"], "stages to run")
    flags.DEFINE_enum("strategy", "none", STRATEGIES, "devices: one, all GPUs here, all GPUs of the machines in TF_CONFIG, or a TPU")
    tasks.define_flag()
    terminal.run("mess_tf.train", __doc__, check_arguments)

import dataclasses
import hashlib
import json
import os
import reprlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import keras

from mess_runtime.bundle import FORMAT, check_writable, decode_versioned, file_sha256, read_json, write_json
from mess_runtime.files import locked, temporary_beside, write_atomically
from mess_runtime.terminal import complain, first_few
from mess_tf import configs
from mess_tf.configs import Config, HeadSpec
from mess_tf.data.examples import DataError, Examples
from mess_tf.data.sources import open_split, open_training
from mess_tf.learning.parts import are_wanted, train_parts
from mess_tf.learning.stage import check_start, train_stage
from mess_tf.learning.steps import fix_summation_order
from mess_tf.network.costs import uncounted_layers
from mess_tf.network.model import MultiExitNetwork, build_network, without_weights
from mess_tf.network.originals import allow, allow_flags, allowed, load_original
from mess_tf.network.replicas import count, open_strategy, own_replicas

FLAGS = flags.FLAGS
CONFIG, RECORD, DATA_RECORD = "config.json", "training.json", "data.json"
SHOWN_DIFFERENCES = 3


def train(config: Config, workdir: str, stages: Literal["stage1", "both"] = "both") -> MultiExitNetwork:
    """Runs the stages of a configuration in WORKDIR, each from its last checkpoint if there is one, and returns the trained network.

    A stage of 0 epochs is left out. It trains on the devices of the `tf.distribute` strategy in scope.

    Sets Keras' random seed and precision policy and TensorFlow's summation order (`fix_summation_order`) for the whole process.
    """
    return train_stages(config, workdir, stages, *prepare(config, workdir, stages))


def prepare(config: Config, workdir: str, stages: Literal["stage1", "both"]) -> tuple[MultiExitNetwork, dict[str, Examples]]:
    """Opens and checks all that `train` needs, and writes nothing; returns the network with its plain heads, and data `train` and `val`.

    Raises:
      FileNotFoundError, ValueError: the training could not start.
    """
    config = configs.with_own_original(config, workdir)
    network, data = _open(config, workdir)
    if config.backbone.name == "keras_file" and (names := uncounted_layers(network.original, config.data.input_size)):
        seen = f"no multiplication is seen in the layers {', '.join(names)}, which have weights"
        complain(f"warning: backbone.weights: {seen}: exits are placed, and MACs counted, as if they cost nothing")
    network.add_heads([HeadSpec.parse(config.exits.plain_head)], config.backbone.batch_norm_momentum)
    if config.stage1.epochs:
        check_start("stage1", config.stage1, network, data["train"], workdir)
    if stages == "both" and config.stage2.epochs:
        check_stage2(config, network, data["train"], workdir)
    return network, data


def _open(config: Config, workdir: str) -> tuple[MultiExitNetwork, dict[str, Examples]]:
    """The network as it comes, without heads, and its data, which are those of the first start."""
    fix_summation_order()
    keras.mixed_precision.set_global_policy(config.stage1.precision)
    keras.utils.set_random_seed(config.stage1.seed)
    own = load_original(config.backbone.weights) if config.backbone.name == "keras_file" else None
    data = dict(zip(("train", "val"), open_training(config.data), strict=True))
    check(len(data["val"]) >= count(), "data.val_split", f"at least {count()} images, one for each replica", len(data["val"]))
    check_data(workdir, data)
    return build_network(config, data["train"].info.num_classes, own), data


def _opened(allowance: tuple[Sequence[str], bool], config: Config, workdir: str) -> tuple[MultiExitNetwork, dict[str, Examples]]:
    """What tasks train heads with, in another process; see `originals.allow`."""
    allow(*allowance)
    network, data = _open(without_weights(config, workdir), workdir)
    network.add_heads([HeadSpec.parse(config.exits.plain_head)], config.backbone.batch_norm_momentum)
    keras.mixed_precision.set_global_policy(config.stage2.precision)
    return network, data


def train_stages(
    config: Config, workdir: str, stages: Literal["stage1", "both"], network: MultiExitNetwork, data: Mapping[str, Examples], ray: str = ""
) -> MultiExitNetwork:
    """What `train` does once all is prepared; `ray`: see `tasks.run`."""
    keep_data(workdir, data)
    keep_original(config, workdir)
    if config.stage1.epochs:
        train_stage("stage1", config.stage1, network, config, data["train"], data["val"], workdir)
    if stages == "both" and config.stage2.epochs:
        keras.mixed_precision.set_global_policy(config.stage2.precision)
        keras.utils.set_random_seed(config.stage2.seed)
        plain = MultiExitNetwork(network.original, network.exit_points, network.heads, network.input_size)
        network.add_heads(config.exits.head_specs, config.backbone.batch_norm_momentum)
        if trains_heads(config) and are_wanted("stage2", config.stage2, [*network.heads], workdir, ray):
            opened = tasks.Opened((plain, data), _opened, allowed(), config, workdir)
            train_parts("stage2", network, opened, config, workdir, ray)
        else:
            train_stage("stage2", config.stage2, network, config, data["train"], data["val"], workdir)
    return network


def trains_heads(config: Config) -> bool:
    """Whether there is a stage 2 of heads alone, whose groups can be trained elsewhere."""
    return config.stage2.epochs > 0 and config.stage2.trains == "heads"


def check_stage2(config: Config, network: MultiExitNetwork, train_examples: Examples, workdir: str) -> None:
    """Checks before stage 1 what stage 2 will need: heads that fit, and the files that it starts from.

    Raises:
      FileNotFoundError, ValueError: stage 2 could not start.
    """
    # Heads are many, and all kinds but this one fit every network.
    specs = [spec for spec in config.exits.head_specs if config.stage2.initial or spec.kind == "rest"]
    trial = MultiExitNetwork(network.original, network.exit_points, input_size=network.input_size)
    trial.add_heads(specs, config.backbone.batch_norm_momentum)
    check_start("stage2", config.stage2, trial, train_examples, workdir)


def _digests(splits: Mapping[str, Examples]) -> dict[str, dict[str, Any]]:
    """The content of data.json."""
    return {name: {"classes": list(examples.info.classes), "images": examples.digests} for name, examples in splits.items()}


def keep_data(workdir: str | os.PathLike, splits: Mapping[str, Examples]) -> None:
    """Writes what the data are into WORKDIR/data.json, if it is not there yet."""
    if not (path := Path(workdir, DATA_RECORD)).exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, _digests(splits))


def check_data(workdir: str | os.PathLike, splits: Mapping[str, Examples]) -> None:
    """Compares the data with those of the first start, if there was one.

    Raises:
      DataError: images, labels or classes are others than at the first start; the first few are named.
    """
    path = Path(workdir, DATA_RECORD)
    if not path.exists():
        return
    kept = read_json(path, lambda value: value)
    for name, now in _digests(splits).items():
        then = kept.get(name, {})
        before, after = then.get("images", {}), now["images"]
        problems = [f"{image}: {'changed' if image in after else 'gone'}" for image in before if before[image] != after.get(image)]
        problems += [f"{image}: new" for image in after if image not in before]
        if then.get("classes") != now["classes"]:
            problems.append(f"classes {then.get('classes')}, now {now['classes']}")
        if problems:
            advice = "give them back, choose another --workdir, or delete the file to go on with the data as they are"
            raise DataError(f"{path}: data must be those of the first start of this training ({advice}), got\n{first_few(problems)}")


def has_its_data(workdir: str | os.PathLike, config: Config) -> bool:
    """Whether a trained work folder's data are those of its first start; a folder of data that is gone counts as unchanged.

    Raises:
      DataError: they are others, see `check_data`, or not in order.
    """
    there = config.data.source not in configs.FILE_SOURCES or os.path.isdir(config.data.data_dir)
    if there and Path(workdir, DATA_RECORD).exists():
        splits = {"train": config.data.train_split, "val": config.data.val_split}
        check_data(workdir, {name: open_split(config.data, split) for name, split in splits.items()})
    return True


def keep_original(config: Config, workdir: str) -> None:
    """Copies the user's own network into the work folder, which then is all that later starts and commands need besides the data."""
    path = Path(workdir, configs.ORIGINAL)
    if config.backbone.name == "keras_file" and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: shutil.copyfile(config.backbone.weights, temporary))


def resolve_config(workdir: str, recipe: str, data: str, data_dir: str, overrides: Sequence[str]) -> Config:
    """The configuration of WORKDIR if something was trained with it, else that of the recipe and flags.

    Raises:
      ValueError: for an unknown recipe or override, or if WORKDIR was made with other values than the flags ask for; they are named.
    """
    config = configs.of_recipe(recipe, data, overrides)
    path = os.path.join(workdir, CONFIG)
    if os.path.exists(path):
        kept = configs.load_config(workdir)
        fields = _differences(kept, config)
        differs = bool((recipe or data or overrides) and fields)
        if differs and os.path.isdir(os.path.join(workdir, "checkpoints")):
            shown = [f"{field} {reprlib.repr(old)}, not {reprlib.repr(new)}" for field, (old, new) in fields.items()]
            more = [f"{len(shown) - SHOWN_DIFFERENCES} more"] if len(shown) > SHOWN_DIFFERENCES else []
            other = "; ".join([*shown[:SHOWN_DIFFERENCES], *more])
            raise ValueError(f"workdir: {path} was made with {other}; leave the flags out to go on with it, or choose another folder")
        if not differs:
            return configs.with_data_dir(kept, data_dir)
        for name in (RECORD, DATA_RECORD, configs.ORIGINAL):  # of what was never trained
            Path(workdir, name).unlink(missing_ok=True)
    return configs.with_data_dir(config, data_dir)


def _differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Values that differ, by section.field; where data lie is none: they may move."""
    old, new = dataclasses.asdict(old), dataclasses.asdict(new)
    fields = [(section, field) for section in old for field in old[section] if (section, field) != ("data", "data_dir")]
    both = {f"{section}.{field}": (old[section][field], new[section][field]) for section, field in fields}
    return {name: (one, other) for name, (one, other) in both.items() if one != other}


def _written(workdir: str | os.PathLike, config: Config) -> str:
    """The text of config.json: as it stands in WORKDIR, where it may lack fields that later versions have added, or as it will be."""
    path = Path(workdir, CONFIG)
    is_kept = path.exists() and not _differences(configs.load_config(workdir), config)
    return path.read_text(encoding="utf-8") if is_kept else configs.to_json(config)


@dataclasses.dataclass(frozen=True)
class Record:
    """The content of WORKDIR/training.json: what a training is made from, and how far it is.

    Attributes:
      made_from: SHA-256 of the configuration (without `data.data_dir`: data may move) and of each file that it names, by its field.
      ended: the stages that have come to their end, or have no epochs.
    """

    made_from: dict[str, str]
    ended: tuple[str, ...]

    @classmethod
    def load(cls, workdir: str | os.PathLike) -> "Record | None":
        """Reads the file; None if there is none, as before the first start."""
        path = Path(workdir) / RECORD
        return read_json(path, lambda value: decode_versioned(cls, value, "training")) if path.exists() else None

    def save(self, workdir: str | os.PathLike) -> None:
        """Writes the file."""
        write_json(Path(workdir) / RECORD, {"format": FORMAT, **dataclasses.asdict(self)})


def made_from(workdir: str | os.PathLike, config: Config) -> dict[str, str]:
    """What the training of a work folder and its configuration is made from, see `Record`; files that are not there have no hash."""
    document = json.loads(_written(workdir, config))
    document["data"].pop("data_dir")
    text = json.dumps(document, sort_keys=True)
    files = {"backbone.weights": config.backbone.weights}
    for name, stage in (("stage1", config.stage1), ("stage2", config.stage2)):
        files |= {f"{name}.initial": stage.initial, f"{name}.teacher": stage.teacher}
    return {CONFIG: hashlib.sha256(text.encode()).hexdigest()} | {
        field: file_sha256(path) for field, path in files.items() if os.path.isfile(path)
    }


def check_made_from(workdir: str | os.PathLike, config: Config) -> None:
    """Compares what a training was made from, if there is one, with what is there now. (Files that are gone count as unchanged.)

    Raises:
      ValueError: it was made from other files, or from another configuration.
    """
    if (record := Record.load(workdir)) is None:
        return
    now = made_from(workdir, config)
    other = [name for name in now if record.made_from.get(name, now[name]) != now[name]]
    check(not other, "workdir", f"another folder, since what was trained here was made from another {' and '.join(other)}", str(workdir))


def is_trained(workdir: str | os.PathLike, config: Config) -> bool:
    """Whether all stages have ended.

    Raises:
      ValueError: it was made from something else than there is now, see `check_made_from`.
    """
    check_made_from(workdir, config)
    record = Record.load(workdir)
    weights = [best_weights(workdir, name) for name in ("stage1", "stage2") if getattr(config, name).epochs]
    return record is not None and {*record.ended} == {"stage1", "stage2"} and all(map(os.path.exists, weights))


def run(workdir: str | os.PathLike, config: Config, stages: Literal["stage1", "both"] = "both", anew: bool = False, ray: str = "") -> Path:
    """The command: trains in WORKDIR from its last checkpoint, and returns the folder of the weights.

    Nothing of a training that could not start stays: the configuration and what it was made from are written once all is checked.

    Args:
      workdir: the folder.
      config: see `resolve_config`.
      stages: see `train`.
      anew: forgets what was trained here, once all is checked.
      ray: see `tasks.run`; of stage 2's groups of heads.
    """
    check_writable("workdir", workdir, folder=True)
    os.makedirs(workdir, exist_ok=True)
    try:
        with locked(Path(workdir, "checkpoints"), wait=False):
            if anew:
                gone = not os.path.isfile(config.backbone.weights)
                with tempfile.TemporaryDirectory() as nothing:
                    prepared = prepare(configs.with_own_original(config, workdir) if gone else config, nothing, stages)
                forget(workdir, config)
            else:
                check_made_from(workdir, config)  # nothing is mixed with what was made from something else
                prepared = prepare(config, workdir, stages)
            text = _written(workdir, config)
            write_atomically(Path(workdir, CONFIG), lambda temporary: temporary.write_text(text, encoding="utf-8"))
            record = Record.load(workdir) or Record(made_from(workdir, config), ())
            record.save(workdir)
            train_stages(config, workdir, stages, *prepared, ray)
            ended = ("stage1", "stage2") if stages == "both" else ("stage1", *record.ended)
            dataclasses.replace(record, ended=tuple(sorted({*ended}))).save(workdir)
    except BlockingIOError:
        raise ValueError(f"workdir: must be no other training's, which is still running, got {str(workdir)!r}") from None
    return Path(workdir, "checkpoints")


def run_on(strategy: str, workdir: str | os.PathLike, config: Config, stages: Literal["stage1", "both"] = "both", ray: str = "") -> Path:
    """Runs the command on the devices of a strategy, see `replicas.open_strategy`; `ray`: see `run`.

    Of several processes that train together the first one writes the work folder, which all must see. The others do the same in a
    temporary copy of its checkpoints.
    """
    with open_strategy(strategy).scope():
        if 0 in own_replicas():
            return run(workdir, config, stages, ray=ray)
        with tempfile.TemporaryDirectory() as own:
            if (checkpoints := Path(workdir, "checkpoints")).exists():
                shutil.copytree(checkpoints, Path(own, "checkpoints"))
            train(configs.with_own_original(config, workdir), own, stages)
    return Path(workdir, "checkpoints")


def forget(workdir: str | os.PathLike, config: Config) -> None:
    """Removes a training, weights and logs, but for its configuration; also the copy of the user's own network, if that is still there."""
    workdir = Path(workdir)
    for name in (RECORD, DATA_RECORD):
        (workdir / name).unlink(missing_ok=True)
    if os.path.isfile(config.backbone.weights):
        (workdir / configs.ORIGINAL).unlink(missing_ok=True)
    for name in ("checkpoints", "logs"):
        if (workdir / name).is_symlink():  # of `mess_tf.rescale`: another folder's
            (workdir / name).unlink()
        elif (workdir / name).exists():  # gone at once: the next start must not go on from the half
            shutil.rmtree((workdir / name).rename(temporary_beside(workdir / name)))


def main() -> None:
    config = resolve_config(FLAGS.workdir, FLAGS.recipe, FLAGS.data, FLAGS.data_dir, FLAGS.set)
    allow_flags()
    check(not FLAGS.ray or trains_heads(config), "--ray", "left out where stage 2 trains no heads", FLAGS.ray)
    print(run_on(FLAGS.strategy, FLAGS.workdir, config, FLAGS.stages, FLAGS.ray))
