"""Files that several processes share and that a kill may interrupt: whole or not there, one writer at a time, strictly read."""

import contextlib
import ctypes
import glob
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_TEMPORARY = ".{name}.{process}.tmp"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' renameat2


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of somebody else
        return True
    return True


def temporary_beside(path: Path) -> Path:
    """A name in the folder of `path` that no reader takes for a result. What killed processes have left under such a name is deleted."""
    for left in path.parent.glob(_TEMPORARY.format(name=glob.escape(path.name), process="*")):
        process = left.name.split(".")[-2]
        if process.isdecimal() and not _alive(int(process)):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink(missing_ok=True)
    return path.with_name(_TEMPORARY.format(name=path.name, process=os.getpid()))


def write_atomically(path: str | os.PathLike, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill a temporary file in the folder of `path`, then puts it in the place of `path`."""
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill an empty folder beside `folder`, then puts it in its place. The old one stays until the new one is complete.

    Where the system can exchange two names in one step (Linux), there is no moment without a folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = temporary_beside(folder)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        write(fresh)
        if not folder.exists():
            os.replace(fresh, folder)
        elif not _exchange(fresh, folder):
            old = temporary_beside(folder.with_name(f"{folder.name}.old"))
            os.replace(folder, old)
            os.replace(fresh, folder)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


@contextlib.contextmanager
def locked(path: str | os.PathLike, wait: bool = True) -> Iterator[None]:
    """Keeps other processes, and threads, that ask for the same lock out while inside. It goes with the process, however that ends.

    Args:
      path: what is locked; beside it an empty `.NAME.lock` is made, which stays.
      wait: until the lock is free.

    Raises:
      BlockingIOError: the lock is held, and `wait` is off.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # not on Windows
        yield
        return
    path = Path(path)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def parse_json(text: str | bytes) -> Any:
    """Reads JSON in which no key comes twice.

    Raises:
      ValueError: it is not JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"the key {key!r} comes twice")
            result[key] = value
        return result

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"must be JSON in UTF-8, got byte {error.object[error.start]:#04x} at {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"must be JSON, got {error}") from error


def safe_name(text: str) -> str:
    """A file name for any text: letters, digits, `_`, `.`, `=` and `-` stay, what is between them becomes `_`.

    It is never hidden, and has at most 60 characters.
    """
    return re.sub(r"[^\w.=-]+", "_", text).lstrip(".")[:60] or "_"


def printable(text: str) -> str:
    """The text without what moves a terminal's cursor or colours it: control characters become spaces."""
    return "".join(character if character.isprintable() else " " for character in text)
