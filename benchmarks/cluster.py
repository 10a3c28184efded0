"""Training of heads, calibration, evaluation and search as tasks of a cluster of two machines, one of which is killed: as in one process.

`python benchmarks/cluster.py --workdir=W [--data_dir=D --images=4]`, W with exported candidates. Ray's two machines are processes of this
one, with a core each. Each command runs in a copy of W here and in another one there; what is trained is the recipe `smoke`, a head in each
group. The second machine is killed, with what runs on it, once the first group of heads, and once the first shard of calibration is
finished.
The last line is one JSON object:
  groups, groups_before_kill: of heads, and how many were finished when the machine was killed.
  shards, shards_before_kill: of calibration, likewise.
  heads_equal, statistics_equal, evaluation_equal, deployments_equal: whether they are the same, bit for bit (but for the seconds in
    certificates); of the heads, the best weights and the log.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from mess_tf import calibrate, configs, evaluate, train
from mess_tf.files import REGIONS, STATS, Asked, best_weights
from mess_tf.search import run_table

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
ASKED = {"macs": [Asked(max_drop_pp=drop) for drop in (1.0, 10.0)]}


def children(process: int) -> list[int]:
    """Of a process, and theirs."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [each for child in map(int, found) for each in (child, *children(child))]


def kill_machine(cluster, node) -> None:
    """All at once, as when the power fails."""
    gone = [each for _, process in node.live_processes() for each in (process.pid, *children(process.pid))]
    for process in gone:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)


def results(work: Path, address: str) -> tuple[bytes, bytes, list[object]]:
    """Statistics, evaluation and deployments of a work folder."""
    common = {"data_dir": FLAGS.data_dir, "ray": address, "shard": FLAGS.images}
    (statistics,) = calibrate.run(str(work), **common)
    evaluation = evaluate.run(str(work), **common)
    rows = run_table(work, ASKED, None, work / "deployments", address)
    deployments = [each and dataclasses.replace(each, certificate=dataclasses.replace(each.certificate, seconds=0.0)) for *_, each in rows]
    return statistics.read_bytes(), evaluation.read_bytes(), deployments


def heads(work: Path, address: str) -> tuple[dict[str, bytes], bytes]:
    """Best weights and log of stage 2 of a training."""
    config = configs.of_recipe("smoke", "", ["stage2.group_size=1"])
    train.run(str(work), config, ray=address)
    weights = {name: array.tobytes() for name, array in np.load(best_weights(work, "stage2")).items()}
    return weights, (work / "logs" / "stage2" / "metrics.jsonl").read_bytes()


def with_a_death(cluster, made: Callable[[], list[Path]], function: Callable[..., Any], work: Path) -> tuple[Any, int | None]:
    """What a function makes on two machines, the second of which is killed once something is made, and how much there was by then."""
    second, killed = cluster.add_node(**NODE), []

    def kill() -> None:
        while not (done := made()):
            time.sleep(0.05)
        kill_machine(cluster, second)
        killed.append(len(done))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    found = function(work, cluster.address)
    killer.join()
    return found, killed[0]


def main(argv) -> None:
    del argv
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    with tempfile.TemporaryDirectory() as folder:
        here, there = Path(folder, "here"), Path(folder, "there")
        for copy in (here, there):
            shutil.copytree(FLAGS.workdir, copy, ignore=shutil.ignore_patterns("ckpt-*", "*shards", STATS, REGIONS, "logs"))
        trained = Path(folder, "trained")
        expected = (heads(Path(folder, "trained_here"), ""), *results(here, ""))
        of_heads, groups_before_kill = with_a_death(cluster, lambda: [*trained.glob("checkpoints/stage2/*-*/2.npz")], heads, trained)
        found, shards_before_kill = with_a_death(cluster, lambda: [*there.glob("shards/[0-9]*.npz")], results, there)
        cluster.shutdown()
        groups = len([*trained.glob("logs/stage2/*-*/metrics.jsonl")])
        shards = len(calibrate.calibrations(str(here), FLAGS.data_dir)[None].shards(FLAGS.images))
    names = ("heads", "statistics", "evaluation", "deployments")
    same = {f"{name}_equal": one == other for name, one, other in zip(names, expected, (of_heads, *found), strict=True)}
    counts = {"groups": groups, "groups_before_kill": groups_before_kill, "shards": shards, "shards_before_kill": shards_before_kill}
    print(json.dumps(counts | same))
    sys.exit(not (groups_before_kill < groups and shards_before_kill < shards and all(same.values())))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "folder of a training, with candidates", required=True)
    flags.DEFINE_string("data_dir", "", "root of the data; default: where training found it")
    flags.DEFINE_integer("images", 4, "of a shard", lower_bound=1)
    app.run(main)
