"""Commands of this project, each in a process of its own, which begins with Keras imported: seconds less than `python -m` each time."""

import functools
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

# What conftest sets for this process, and users have not.
OURS = ("TF_CPP_MIN_LOG_LEVEL", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")


@functools.cache
def server() -> multiprocessing.context.ForkServerContext:
    """The process that the others are forked from: it ends with this one, and runs nothing of TensorFlow."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["keras"])
    with mock.patch.dict(os.environ):
        for name in OURS:
            os.environ.pop(name, None)
        forkserver.ensure_running()
    return context


def _command(module: str, words: list[str], stdout: str, stderr: str) -> None:
    """What a forked process does, as `python -m module words` would."""
    gc.freeze()
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.argv = ["-m", *words]  # as long as Python looks for the module
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start(module: str, *words, stdout: Path, stderr: Path) -> BaseProcess:
    """Starts a command, which appends what it writes to files."""
    process = server().Process(target=_command, args=(module, [*map(str, words)], str(stdout), str(stderr)))
    process.start()
    return process


def run(module: str, *words) -> subprocess.CompletedProcess:
    """Runs a command to its end."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = start(module, *words, stdout=stdout, stderr=stderr)
        process.join()
        return subprocess.CompletedProcess(words, process.exitcode, stdout.read_text(), stderr.read_text())
