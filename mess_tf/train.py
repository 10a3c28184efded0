"""Two-stage training of a multi-exit network (mess.md, section 4).

`python -m mess_tf.train --workdir=W --recipe=camvid_lite0 --data_dir=D [--set section.field=value ...]` trains both stages, each from its
last checkpoint if there is one. WORKDIR/config.json keeps the resolved configuration; a later start must ask for the same or nothing.
"""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import keras
from absl import flags

from mess_runtime.files import write_atomically
from mess_tf import configs, terminal
from mess_tf.configs import Config, HeadSpec
from mess_tf.data.examples import Examples
from mess_tf.data.sources import open_split
from mess_tf.learning.stage import check_start, train_stage
from mess_tf.learning.steps import fix_summation_order
from mess_tf.network.model import MultiExitNetwork, build_network
from mess_tf.network.originals import define_flags


def train(config: Config, workdir: str, stages: Literal["stage1", "both"] = "both") -> MultiExitNetwork:
    """Runs the stages of a configuration in WORKDIR, each from its last checkpoint if there is one, and returns the trained network.

    A stage of 0 epochs is left out.

    Sets Keras' random seed and precision policy and TensorFlow's summation order (`fix_summation_order`) for the whole process.
    """
    fix_summation_order()
    keras.mixed_precision.set_global_policy(config.stage1.precision)
    keras.utils.set_random_seed(config.stage1.seed)
    train_examples, val_examples = open_split(config.data, config.data.train_split), open_split(config.data, config.data.val_split)
    network = build_network(configs.with_own_original(config, workdir), train_examples.info.num_classes)
    keep_original(config, workdir)
    momentum = config.backbone.batch_norm_momentum
    network.add_heads([HeadSpec.parse(config.exits.plain_head)], momentum)
    both = stages == "both" and config.stage2.epochs > 0
    if both:
        check_stage2(config, network, train_examples, workdir)
    if config.stage1.epochs:
        train_stage("stage1", config.stage1, network, config, train_examples, val_examples, workdir)
    if both:
        keras.mixed_precision.set_global_policy(config.stage2.precision)
        keras.utils.set_random_seed(config.stage2.seed)
        network.add_heads(config.exits.head_specs, momentum)
        train_stage("stage2", config.stage2, network, config, train_examples, val_examples, workdir)
    return network


def check_stage2(config: Config, network: MultiExitNetwork, train_examples: Examples, workdir: str) -> None:
    """Checks before stage 1 what stage 2 will need: heads that fit, and the files that it starts from.

    Raises:
      FileNotFoundError, ValueError: stage 2 could not start.
    """
    # Heads are many, and all kinds but this one fit every network.
    specs = [spec for spec in config.exits.head_specs if config.stage2.initial or spec.kind == "rest"]
    trial = MultiExitNetwork(network.original, network.exit_points)
    trial.add_heads(specs, config.backbone.batch_norm_momentum)
    check_start("stage2", config.stage2, trial, train_examples, workdir)


def keep_original(config: Config, workdir: str) -> None:
    """Copies the user's own network into the work folder, which then is all that later starts and commands need besides the data."""
    path = Path(workdir, configs.ORIGINAL)
    if config.backbone.name == "keras_file" and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: shutil.copyfile(config.backbone.weights, temporary))


def resolve_config(workdir: str, recipe: str, data: str, data_dir: str, overrides: Sequence[str]) -> Config:
    """The configuration of WORKDIR if it has one, else that of the recipe and flags, which is written there.

    Raises:
      ValueError: for an unknown recipe or override, or if WORKDIR was made with other values than the flags ask for; they are named.
    """
    configs.check_recipe(recipe)
    config = configs.RECIPES[recipe or "default"]
    if data:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=data))
    config = configs.apply_overrides(config, overrides)
    path = os.path.join(workdir, "config.json")
    if os.path.exists(path):
        kept = configs.load_config(workdir)
        old, new = dataclasses.asdict(kept), dataclasses.asdict(config)
        new["data"]["data_dir"] = kept.data.data_dir  # data may move
        fields = [(section, field) for section in old for field in old[section] if old[section][field] != new[section][field]]
        if (recipe or data or overrides) and fields:
            other = "; ".join(f"{section}.{field} {old[section][field]!r}, not {new[section][field]!r}" for section, field in fields)
            raise ValueError(f"workdir: {path} was made with {other}; leave the flags out to go on with it, or choose another folder")
        return configs.with_data_dir(kept, data_dir)
    config = configs.with_data_dir(config, data_dir)
    os.makedirs(workdir, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(configs.to_json(config), encoding="utf-8"))
    return config


def main() -> None:
    config = resolve_config(FLAGS.workdir, FLAGS.recipe, FLAGS.data, FLAGS.data_dir, FLAGS.set)
    train(config, FLAGS.workdir, FLAGS.stages)
    print(os.path.join(FLAGS.workdir, "checkpoints"))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    define_flags()
    flags.DEFINE_string("workdir", None, "folder for everything that this run makes", required=True)
    flags.DEFINE_string("recipe", "", f"one of {sorted(configs.RECIPES)}")
    flags.DEFINE_string("data", "", "data source, in place of the recipe's: synthetic, folder, voc or tfds:NAME")
    flags.DEFINE_string("data_dir", "", "root folder of the data")
    flags.DEFINE_multi_string("set", [], "section.field=value, e.g. stage1.epochs=30; may be given several times")
    flags.DEFINE_enum("stages", "both", ["stage1", "both"], "stages to run")
    terminal.run(main)
