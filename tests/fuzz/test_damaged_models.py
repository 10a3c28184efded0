"""Damaged .tflite files: an error that names the file, or masks, but never the end of the process."""

import os
import shutil
import signal
import traceback
from pathlib import Path

import numpy as np
import pytest
from mutations import mutated_bytes
from test_runtime import folder, images, net, signatures, thetas  # noqa: F401

from mess_runtime import engines
from mess_runtime.bundle import MODEL, Bundle, Manifest, file_sha256, read_json, write_json
from mess_runtime.runner import Runner

SECONDS = 60


def outcome(path: Path, engine: str) -> str:
    """What happens to a process that runs a bundle: `ok`, `refused`, or how it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            runner = Runner(Bundle.load(path), engine=engine)
            runner.run(np.zeros((40, 70, 3), np.uint8))
            said = "ok"
        except ValueError as error:
            said = "refused" if MODEL in str(error) else f"no file is named: {error}"
        except BaseException:
            said = traceback.format_exc()
        os.write(writing, said.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return said or f"ended by {os.waitstatus_to_exitcode(status)}"


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_damaged_models(fuzz, folder, tmp_path, engine):  # noqa: F811
    path = Path(shutil.copytree(folder, tmp_path / "bundle"))
    content = (path / MODEL).read_bytes()
    manifest = read_json(path / "manifest.json", Manifest.from_json).to_json()
    assert outcome(path, engine) == "ok"
    outcomes = {}

    def check(damaged: bytes) -> None:
        (path / MODEL).write_bytes(damaged)
        write_json(path / "manifest.json", manifest | {"sha256": file_sha256(path / MODEL), "size_bytes": max(1, len(damaged))})
        received = outcome(path, engine)
        outcomes[received] = outcomes.get(received, 0) + 1

    fuzz(mutated_bytes(content, ("bit", "bit", "bit", "fill", "end")), check)
    print(engine, outcomes)
    assert not outcomes.keys() - {"ok", "refused"}, outcomes
