"""Stage 2 in parts, as tasks: with a frozen network no head needs another one, so each group of them can be trained anywhere.

A part is a group of `group_size` heads, in the order of the configuration, wherever it is trained. It starts from the weights that these
heads have among all, sees the same batches and pixels, and computes the same features. So the heads become the same bits as in one piece
(but for dropout in `rest` heads, and for losses that are scaled for float16 by what all heads of a piece have in common), and so does
what is put together: the log, and the weights of the evaluation that is the best for all heads together.

In one piece, the frozen network runs once for a batch; in parts, once for each of them.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mess_runtime.files import write_atomically
from mess_tf import tasks
from mess_tf.configs import Config, StageConfig
from mess_tf.data.examples import Examples
from mess_tf.files import best_weights, map_arrays, write_arrays
from mess_tf.learning.stage import evaluated_weights, number_of_steps, train_stage
from mess_tf.learning.steps import groups
from mess_tf.network.model import FINAL, MultiExitNetwork

START = "start.npz"  # weights of the original and of all heads before the first step

# A network with its plain heads, and the data `train` and `val`.
Opened = tasks.Opened[tuple[MultiExitNetwork, Mapping[str, Examples]]]


def _folder(workdir: str | os.PathLike, name: str) -> Path:
    return Path(workdir, "checkpoints", name)


def are_wanted(name: str, stage: StageConfig, heads: Sequence[str], workdir: str | os.PathLike, ray: str) -> bool:
    """Whether a stage is trained in parts: as it was begun; otherwise on Ray, if there are several groups."""
    folder = _folder(workdir, name)
    if tf.train.latest_checkpoint(folder):
        return False
    return (folder / START).exists() or (bool(ray) and len(groups(stage, heads)) > 1)


def train_parts(name: str, network: MultiExitNetwork, opened: Opened, config: Config, workdir: str, ray: str = "") -> None:
    """Trains stage 2 in parts, those that are not done, and leaves `network` with the best evaluation's weights.

    WORKDIR then holds what `train_stage` leaves, but for checkpoints: each part keeps its own.

    Args:
      name: of the stage.
      network: with all heads as they start.
      opened: what the tasks work with: the network with its plain heads, which compute as stage 1 did; its weights do not matter.
      config: the whole run.
      workdir: the work folder.
      ray: see `tasks.run`.

    Raises:
      ValueError: see `tasks.run`.
      Exception: what `train_stage` raises.
    """
    stage, (_, data), folder = getattr(config, name), opened.value, _folder(workdir, name)
    start, (_, last_step) = folder / START, number_of_steps(stage, data["train"])
    if not start.exists():
        if stage.initial:
            network.load_weights(stage.initial, other_heads=True)
        folder.mkdir(parents=True, exist_ok=True)
        network.save_weights(str(start))
    taps = tuple(dict.fromkeys(tap for head in network.heads for tap in network.taps(head)))
    todo, names = [], []
    for group in groups(stage, network.heads):
        first = sum(len(task.arguments[2]) for task in todo)
        names.append(f"{name}/{first}-{first + len(group)}")
        output = Path(evaluated_weights(workdir, names[-1], last_step))
        arguments = (opened, names[-1], tuple(group), taps, config, workdir)
        todo.append(tasks.Task(train_part, arguments, output, output.exists(), on_gpu=True))
    tasks.run(todo, name, "group", ray)
    put_together(name, names, workdir)
    network.load_weights(best_weights(workdir, name))


def train_part(opened: Opened, name: str, heads: Sequence[str], taps: Sequence[str], config: Config, workdir: str) -> None:
    """A task: trains some heads, from their last checkpoint if there is one.

    Args:
      opened: see `train_parts`.
      name: STAGE/PART.
      heads: their names.
      taps: the layers that any head of the network reads.
      config: the whole run.
      workdir: the work folder.
    """
    network, data = opened.value
    section = name.partition("/")[0]
    stage = dataclasses.replace(getattr(config, section), initial=str(_folder(workdir, section) / START))
    keras.utils.set_random_seed(stage.seed)
    network = network.part(heads, taps, config.backbone.batch_norm_momentum)
    train_stage(name, stage, network, config, data["train"], data["val"], workdir, keep_all=True)


def put_together(name: str, parts: Sequence[str], workdir: str | os.PathLike) -> None:
    """Writes the log and the best weights of all heads, of the logs and the evaluations of all parts, in order."""
    logs = [Path(workdir, "logs", part, "metrics.jsonl").read_text(encoding="utf-8").splitlines() for part in parts]
    rows = [_joined([json.loads(line) for line in lines]) for lines in zip(*logs, strict=True)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(Path(workdir, "logs", name, "metrics.jsonl"), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    evaluations = {row["step"]: float(np.mean(list(row["miou"].values()))) for row in rows if "miou" in row}
    best = max(evaluations, key=evaluations.get)
    start = map_arrays(_folder(workdir, name) / START)
    arrays = {key: array for key, array in start.items() if key.startswith(f"{FINAL}/")}
    for part in parts:
        arrays |= map_arrays(evaluated_weights(workdir, part, best))
    write_arrays(best_weights(workdir, name), **arrays)
    for part in parts:  # the last one says that the part is done
        for step in evaluations.keys() - {best, max(evaluations)}:
            Path(evaluated_weights(workdir, part, step)).unlink(missing_ok=True)


def _joined(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of the log, of those of all parts: what they say of their heads, and what they have in common."""
    return {
        field: {key: each for row in rows for key, each in row[field].items()} if isinstance(value, dict) else value
        for field, value in rows[0].items()
    }
