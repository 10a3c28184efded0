"""Tasks without a cluster, and on one of two machines of which one dies. What runs as tasks is tested where it is made."""

import contextlib
import dataclasses
import functools
import importlib.machinery
import os
import re
import signal
import sys
import threading
import time
import types

import pytest
import task_for_ray

from mess_tf import tasks
from mess_tf.files import Asked
from mess_tf.search import run_table

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


def test_what_is_done_is_left_as_it_is(tmp_path):
    todo = task_for_ray.tasks_in(tmp_path, 3)
    (tmp_path / "killed").touch()
    done = tasks.Task(todo[0].function, todo[0].arguments, todo[0].output, done=True)
    assert tasks.run([done, *todo[1:]], "test", "task") == [task.output for task in todo]
    assert [path.name for path in sorted(tmp_path.glob("*.txt"))] == ["1.txt", "2.txt"]


def test_an_error_ends_all(tmp_path):
    missing = tasks.Task(run_table, (tmp_path, {"a": [Asked(min_miou=0.5)]}, None, tmp_path), tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"stats\.npz"):
        tasks.run([missing], "test", "task")


def test_without_ray_its_flag_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tasks.check_installed("")
    with pytest.raises(ValueError, match=r"^--ray: must be left out without Ray, which `pip install \.\[cluster\]` brings, got 'local'"):
        tasks.check_installed("local")


@pytest.fixture
def ray(monkeypatch):
    """Ray's functions, which run tasks in this process, the last one first; `calls` are those of `init` and `shutdown`.

    `resources` are those of the cluster, `gpus` how many each task was given.
    """
    stand_in = types.ModuleType("ray")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("ray", None)
    stand_in.calls, stand_in.resources, stand_in.gpus, results = [], {"CPU": 2.0}, [], {}

    def given(function, num_gpus):
        stand_in.gpus.append(num_gpus)
        return types.SimpleNamespace(remote=functools.partial(send, function))

    def send(function, *arguments):
        results[len(results)] = function(*arguments)
        return len(results) - 1

    stand_in.init = lambda *words, **options: stand_in.calls.append((words, options))
    stand_in.shutdown = lambda: stand_in.calls.append("shutdown")
    stand_in.cluster_resources = lambda: stand_in.resources
    stand_in.remote = lambda max_retries: lambda function: types.SimpleNamespace(options=functools.partial(given, function))
    stand_in.wait = lambda waiting: (waiting[-1:], waiting[:-1])
    stand_in.get = results.get
    stand_in.get_runtime_context = lambda: types.SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    return stand_in


def test_tasks_are_sent_to_ray_and_their_answers_are_heard(ray, tmp_path):
    (tmp_path / "killed").touch()
    todo = task_for_ray.tasks_in(tmp_path, 3)
    outputs = tasks.run(todo, "test", "task", tasks.LOCAL)
    assert [output.read_text() for output in outputs] == [f"result of {number}" for number in range(3)]
    (words, options), end = ray.calls
    assert (words, end) == ((tasks.LOCAL,), "shutdown") and options["include_dashboard"] is False
    missing = tasks.Task(run_table, (tmp_path, {"a": [Asked(min_miou=0.5)]}, None, tmp_path), tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"stats\.npz"):
        tasks.run([missing], "test", "task", tasks.LOCAL)
    unseen = tasks.Task(os.fspath, ("file",), tmp_path / "file")
    with pytest.raises(ValueError, match=r"^--ray: must be machines that share the work folder, got "):
        tasks.run([unseen], "test", "task", tasks.LOCAL)
    assert ray.calls[-1] == "shutdown"


def test_a_task_that_wants_a_gpu_gets_one_where_there_is_any(ray, tmp_path):
    (tmp_path / "killed").touch()
    todo = [dataclasses.replace(task, on_gpu=number == 1) for number, task in enumerate(task_for_ray.tasks_in(tmp_path, 3))]
    for resources in ({"CPU": 2.0}, {"CPU": 2.0, "GPU": 1.0}):
        ray.resources = resources
        tasks.run(todo, "test", "task", tasks.LOCAL)
    assert ray.gpus == [0, 0, 0, 0, 1, 0]


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize("address", ["127.0.0.1:1", "first"])
def test_an_address_where_nobody_answers_is_said(tmp_path, address):
    with pytest.raises(
        ValueError, match=rf"^--ray={re.escape(address)}: must be local, auto or the address of a cluster that answers, got "
    ):
        tasks.run(task_for_ray.tasks_in(tmp_path, 1), "test", "task", address)


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two machines with a CPU each, on this one."""
    pytest.importorskip("ray", reason="needs Ray: pip install .[cluster]")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # which pytest has added to
        nodes = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        yield nodes
        nodes.shutdown()


@pytest.mark.full
def test_tasks_of_a_machine_that_dies_are_run_again(cluster, tmp_path):
    """And no other: every task waits until one machine is killed with what it runs."""
    other = cluster.add_node(**NODE)
    todo = task_for_ray.tasks_in(tmp_path, 4)

    def starts():
        return [line.split() for path in tmp_path.glob("*.started") for line in path.read_text().splitlines()]

    def kill():
        while not (there := [pid for pid, node in starts() if node == other.node_id]) or len(starts()) < 2:
            time.sleep(0.05)
        cluster.remove_node(other, allow_graceful=False)
        for pid in there:  # what runs on the machine dies with it
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        (tmp_path / "killed").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    outputs = tasks.run(todo, "test", "task", cluster.address)
    killer.join()
    assert [output.read_text() for output in outputs] == [f"result of {number}" for number in range(4)]
    assert sorted(len(path.read_text().splitlines()) for path in tmp_path.glob("*.started")) == [1, 1, 1, 2]


@pytest.mark.full
def test_errors_of_a_cluster_answer_like_those_here(cluster, tmp_path):
    missing = tasks.Task(run_table, (tmp_path, {"a": [Asked(min_miou=0.5)]}, None, tmp_path), tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"stats\.npz"):
        tasks.run([missing], "test", "task", cluster.address)
    unseen = tasks.Task(os.fspath, ("file",), tmp_path / "file")
    with pytest.raises(ValueError, match=r"^--ray: must be machines that share the work folder, got "):
        tasks.run([unseen], "test", "task", cluster.address)


@pytest.mark.full
def test_ray_shows_a_gpu_to_the_task_that_was_given_it(cluster, tmp_path):
    """Of the others, none sees it."""
    cluster.add_node(**NODE, num_gpus=1)
    todo = [tasks.Task(task_for_ray.write_gpus, (tmp_path / name,), tmp_path / name, on_gpu=name == "own") for name in ("own", "none")]
    tasks.run(todo, "test", "task", cluster.address)
    assert [task.output.read_text() for task in todo] == ["0", ""]
