"""Files that are whole or not there, one writer at a time, strictly read: `mess_runtime.files`, and arrays in `mess_tf.files`."""

import io
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mess_runtime import files
from mess_tf.files import map_arrays, read_arrays, write_arrays

RUNTIME = Path(files.__file__).parents[1]


def child(code: str, *arguments) -> subprocess.Popen:
    """A Python process that imports `files` and runs some code."""
    words = [
        sys.executable,
        "-c",
        f"import sys, time\nfrom pathlib import Path\nfrom mess_runtime import files\n{code}",
        *map(str, arguments),
    ]
    return subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(RUNTIME)}, stdout=subprocess.PIPE, text=True)


def kill_when_it_says_so(process: subprocess.Popen) -> None:
    assert process.stdout.readline().strip() == "now"
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_what_a_killed_write_leaves_is_no_result_and_is_cleared(tmp_path):
    path = tmp_path / "prefix.final.tflite"
    write = "def write(path):\n path.write_text('half'); print('now', flush=True); time.sleep(60)\n"
    kill_when_it_says_so(child(f"{write}files.write_atomically(sys.argv[1], write)", path))
    (left,) = tmp_path.iterdir()
    assert not left.name.endswith(".tflite") and left.name.endswith(".tmp")
    files.write_atomically(path, lambda temporary: temporary.write_text("whole"))
    assert [each.name for each in tmp_path.iterdir()] == [path.name] and path.read_text() == "whole"


def test_what_a_running_process_writes_is_not_cleared(tmp_path):
    write = "def write(path):\n path.write_text('theirs'); print('now', flush=True); sys.stdin.read(1)\n"
    words = [sys.executable, "-c", f"import sys\nfrom mess_runtime import files\n{write}files.write_atomically(sys.argv[1], write)"]
    process = subprocess.Popen(
        [*words, str(tmp_path / "a.json")], env=os.environ | {"PYTHONPATH": str(RUNTIME)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    files.write_atomically(tmp_path / "a.json", lambda temporary: temporary.write_text("ours"))
    process.communicate(b"\n")
    assert process.returncode == 0 and (tmp_path / "a.json").read_text() == "theirs"


def test_an_old_folder_stays_until_the_new_one_is_complete(tmp_path):
    folder = tmp_path / "bundle"
    for content in ("1", "2"):
        files.replace_folder(folder, lambda fresh, content=content: (fresh / "model").write_text(content))
        assert (folder / "model").read_text() == content

    def fail(fresh):
        (fresh / "model").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.replace_folder(folder, fail)
    write = "def write(path):\n (path / 'model').write_text('half'); print('now', flush=True); time.sleep(60)\n"
    kill_when_it_says_so(child(f"{write}files.replace_folder(Path(sys.argv[1]), write)", folder))
    assert (folder / "model").read_text() == "2"
    files.replace_folder(folder, lambda fresh: (fresh / "model").write_text("3"))
    assert [each.name for each in tmp_path.iterdir()] == ["bundle"] and [each.name for each in folder.iterdir()] == ["model"]


def test_a_folder_is_replaced_without_the_exchange_of_names(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    for content in ("1", "2"):
        files.replace_folder(tmp_path / "bundle", lambda fresh, content=content: (fresh / "model").write_text(content))
    assert (tmp_path / "bundle" / "model").read_text() == "2" and len(list(tmp_path.iterdir())) == 1


def test_a_lock_keeps_others_out_and_goes_with_its_process(tmp_path):
    path = tmp_path / "latency.json"
    process = child("with files.locked(sys.argv[1]):\n print('now', flush=True); time.sleep(60)", path)
    assert process.stdout.readline().strip() == "now"
    with pytest.raises(BlockingIOError), files.locked(path, wait=False):
        pass
    process.kill()
    process.wait()
    with files.locked(path, wait=False):
        pass


def test_a_lock_makes_threads_wait(tmp_path):
    inside, most = [], []

    def work():
        with files.locked(tmp_path / "a"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' comes twice"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff\xfe", "Expecting"),
        ("{", "Expecting"),
        (b'{"\xe9": 1}', "must be JSON in UTF-8, got byte 0xe9 at 2"),
    ],
)
def test_json_that_is_none(text, message):
    with pytest.raises(ValueError, match=message):
        files.parse_json(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Pixel 8-t4", "Pixel_8-t4"),
        ("../../../escaped", "_.._.._escaped"),
        ("", "_"),
        ("..", "_"),
        ("a" * 300, "a" * 60),
        ("a\x1b[31m\n/", "a_31m_"),
    ],
)
def test_any_text_becomes_a_safe_name(text, name):
    assert files.safe_name(text) == name


def test_control_characters_do_not_reach_a_terminal():
    assert files.printable("Pixel\x1b[2J 8\n\u202e\x9b") == "Pixel [2J 8   "


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def damaged(content: bytes, how: str) -> bytes:
    """An .npz whose only array is broken in some way."""
    header = b"\x93NUMPY\x01\x00"
    bodies = {
        "token": header + struct.pack("<H", 4) + b"{'a\n",
        "huge": header
        + struct.pack("<H", 72)
        + b"{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999999999,), }".ljust(71)
        + b"\n",
        "negative": header + struct.pack("<H", 60) + b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }".ljust(59) + b"\n",
        "deep": header + struct.pack("<H", 5000) + b"(" * 4999 + b"\n",
        "object": header
        + struct.pack("<H", 60)
        + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(59)
        + b"\n"
        + b"cos\nsystem\n",
    }
    if how in bodies:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.npy", bodies[how])
        return file.getvalue()
    if how == "truncated":
        return content[: len(content) // 2]
    if how == "deflate":
        return content[:60] + b"\xff" * 20 + content[80:]
    return {"empty": b"", "text": b"hello", "pickle": b"\x80\x04N."}[how]


@pytest.mark.parametrize("how", ["token", "huge", "negative", "deep", "object", "truncated", "deflate", "empty", "text", "pickle"])
def test_broken_arrays_are_one_kind_of_error_that_names_the_file(tmp_path, how):
    path = tmp_path / "stats.npz"
    path.write_bytes(damaged(npz(a=np.arange(1000)), how))
    with pytest.raises(ValueError, match=r"stats\.npz: must be a complete \.npz file, got ."):
        read_arrays(path)


def test_sizes_are_looked_at_before_anything_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    path.write_bytes(npz(a=np.zeros(100_000), b=np.arange(3)))
    assert read_arrays(path)["b"].tolist() == [0, 1, 2]
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    monkeypatch.setattr("mess_tf.files.MAX_ARRAYS_BYTES", 100_000)
    with pytest.raises(ValueError, match=r"a\.npz: arrays: must be of at most 100000 bytes, got 800"):
        read_arrays(path)


def test_mapped_arrays_are_those_that_were_written(tmp_path):
    path = tmp_path / "a.npz"
    arrays = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "none": np.zeros((0, 2)), "text": np.array("a"), "n": np.int64(1)}
    write_arrays(path, **arrays)
    mapped = map_arrays(path)
    for name, array in arrays.items():
        assert np.array_equal(mapped[name], array) and mapped[name].dtype == array.dtype and mapped[name].shape == array.shape
        assert not mapped[name].flags.writeable
    content = path.read_bytes()
    write_arrays(path, **arrays)
    assert path.read_bytes() == content
    values = content.index(arrays["a"].tobytes())
    for broken, found in (
        (content[: values + 4] + b"\x07" + content[values + 5 :], "a.npy is damaged"),
        (content[: len(content) // 2], "."),
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"a\.npz: must be a complete \.npz file, got '?{found}"):
            map_arrays(path)
    for other in (np.asfortranarray(arrays["a"]), np.array([{}])):
        np.savez(path, a=other)
        with pytest.raises(ValueError, match=r"a\.npz: must be a complete \.npz file, got a is no plain array"):
            map_arrays(path)
    path.write_bytes(npz(a=arrays["a"]))
    with pytest.raises(ValueError, match=r"a\.npz: must be a complete \.npz file, got a is compressed"):
        map_arrays(path)


def test_a_missing_file_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "none.npz")
