"""Tasks that need nothing of each other, each a function of files in and a file out: one after the other here, or on machines by Ray.

Ray (https://docs.ray.io, `pip install .[cluster]`) starts processes, spreads the tasks over them, and runs a task again whose process or
machine has died. All machines see the same files under the same paths, and have this package.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from absl import flags

from mess_runtime import terminal
from mess_runtime.bundle import check

LOCAL = "local"
CONNECT_S = 10.0
MAX_RETRIES = 3  # of a task whose process or machine has died

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      function: of a module; makes `output` and is done.
      arguments: of the function: paths, other plain values, `Opened`.
      output: the file, written atomically.
      done: whether an earlier start has made it, so that it is left as it is.
      on_gpu: on a cluster with GPUs, it gets one of its own; all others see none there.
    """

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    output: Path
    done: bool = False
    on_gpu: bool = False


class Opened(Generic[T]):
    """What several tasks work with and is made of files, as a network is.

    Here it is `value`. Another process is sent how it is made, and keeps the last one that it has made.
    """

    def __init__(self, value: T, make: Callable[..., T], *arguments: Any):
        """Keeps it.

        Args:
          value: make(*arguments).
          make: a function of a module.
          arguments: paths and other plain values.
        """
        self.value = value
        self._how = make, arguments

    def __reduce__(self):
        make, arguments = self._how
        return _opened, (pickle.dumps((_place(make), arguments)),)


@functools.lru_cache(maxsize=1)
def _opened(how: bytes) -> Opened:
    place, arguments = pickle.loads(how)
    make = _function(*place)
    return Opened(make(*arguments), make, *arguments)


def _place(function: Callable) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def _function(module: str, name: str) -> Callable:
    return getattr(importlib.import_module(module), name)


def run(tasks: Sequence[Task], what: str, unit: str, ray: str = "") -> list[Path]:
    """Runs tasks, but for those that are done.

    Args:
      tasks: none needs another's output.
      what, unit: see `terminal.Bar`.
      ray: `local` for this machine, `auto` for the cluster that it is part of, or a cluster's address; empty for this process, one after
        the other.

    Returns:
      The outputs, in the order of the tasks.

    Raises:
      ValueError: Ray is not installed, or its machines do not share the files.
      Exception: what a task raises.
    """
    todo = [task for task in tasks if not task.done]
    with terminal.Bar(what, len(tasks), unit, len(tasks) - len(todo)) as bar:
        for _ in _on_ray(todo, ray) if ray and todo else map(_here, todo):
            bar.advance()
    return [task.output for task in tasks]


def _here(task: Task) -> None:
    task.function(*task.arguments)


def _on_ray(tasks: Sequence[Task], address: str) -> Iterator[None]:
    """Yields once for each task that is done."""
    check_installed(address)
    import ray

    with _connected(ray, address):
        remote = ray.remote(max_retries=MAX_RETRIES)(_elsewhere)
        sent, gpus = {}, ray.cluster_resources().get("GPU", 0) > 0
        for task in tasks:
            work = pickle.dumps((_place(task.function), task.arguments))
            sent[remote.options(num_gpus=int(task.on_gpu and gpus)).remote(os.getcwd(), work)] = task
        waiting = list(sent)
        while waiting:
            (ready,), waiting = ray.wait(waiting)
            if (answer := ray.get(ready)) is not None:
                raise answer
            output = sent[ready].output
            check(output.exists(), "--ray", "machines that share the work folder", f"{address}, whose {output} is not seen here")
            yield


def _elsewhere(folder: str, pickled: bytes) -> Exception | None:
    """What a process of Ray does: a task, in the folder that the command was started in. Returns an error that answers the user."""
    try:
        os.chdir(folder)
        place, arguments = pickle.loads(pickled)
        _function(*place)(*arguments)
    except Exception as error:
        if not terminal.is_answer(error):
            raise
        return error


@contextlib.contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would send them
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    before = signal.getsignal(signal.SIGTERM)  # Ray sets one that ends the process without a word
    try:
        with terminal.reading(f"--ray={address}", "local, auto or the address of a cluster that answers"):
            if address not in (LOCAL, "auto") and "://" not in address:  # where nobody answers, Ray tries for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), CONNECT_S).close()
            ray.init(address, **quiet, **({"include_dashboard": False} if address == LOCAL else {}))
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
        yield
    finally:
        ray.shutdown()


def check_installed(ray: str) -> None:
    """Raises a ValueError where Ray is asked for and is not installed."""
    there = not ray or importlib.util.find_spec("ray") is not None
    check(there, "--ray", "left out without Ray, which `pip install .[cluster]` brings", ray)


def define_flag() -> None:
    """Defines --ray."""
    flags.DEFINE_string("ray", "", "Run the tasks on Ray: local, auto or a cluster's address; default: one after the other.")
