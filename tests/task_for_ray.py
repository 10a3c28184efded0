"""A task for the tests of clusters, whose machines import it."""

import os
import sys
import time
from pathlib import Path

from mess_runtime.files import write_atomically
from mess_tf.tasks import Task


def wait_and_write(number: int, folder: Path) -> None:
    """Notes each start, with the process and its machine, and makes its output once a machine has been killed."""
    ray = sys.modules.get("ray")
    with open(folder / f"{number}.started", "a") as file:
        file.write(f"{os.getpid()} {ray.get_runtime_context().get_node_id() if ray else 'here'}\n")
    while not (folder / "killed").exists():
        time.sleep(0.05)
    write_atomically(folder / f"{number}.txt", lambda path: path.write_text(f"result of {number}"))


def write_gpus(path: Path) -> None:
    """Makes a file of the numbers of the GPUs that it sees."""
    write_atomically(path, lambda temporary: temporary.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "")))


def tasks_in(folder: Path, count: int) -> list[Task]:
    """So many tasks."""
    return [Task(wait_and_write, (number, folder), folder / f"{number}.txt") for number in range(count)]
