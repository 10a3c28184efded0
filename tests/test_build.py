"""BUILD against the tree: every source in its target, every command a binary, and each target's dependencies those of its imports."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("android_bench", "mess_runtime", "mess_tf")
FOLDERS = (ROOT / "android_bench", ROOT / "tflite/mess_runtime", ROOT / "mess_tf")
# Distribution of a module, where its name is another.
DISTRIBUTIONS = {"PIL": "pillow", "absl": "absl_py", "cv2": "opencv_python_headless", "google": "protobuf"}
# Imported where it is there: other interpreters, the reader of videos and cameras, that of COCO's regions, clusters.
OPTIONAL = {"tflite_runtime", "cv2", "pycocotools", "ray", ("mess_runtime", "tensorflow")}
# Needed by a module that another package loads by its name.
INDIRECT = {("learning", "tensorboard")}


def targets() -> dict[str, dict]:
    """What BUILD declares, by name: it is read as the Python that it also is."""
    found = {}

    def rule(kind):
        def declare(name, **attributes):
            found[name] = {"kind": kind, "srcs": [], "deps": []} | attributes

        return declare

    def glob(patterns):
        return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))

    names = {kind: rule(kind) for kind in ("py_library", "py_binary", "py_test", "genrule")}
    ignored = dict.fromkeys(("package", "licenses", "exports_files"), lambda *_, **__: None)
    exec(compile((ROOT / "BUILD").read_text(), "BUILD", "exec"), names | ignored | {"glob": glob})
    return found


TARGETS = targets()
LIBRARIES = {name: target for name, target in TARGETS.items() if target["kind"] == "py_library"}


def module_of(path: Path) -> str:
    """Dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts[parts[0] == "tflite" :] if part != "__init__")


LIBRARY_OF = {module_of(ROOT / source): name for name, target in LIBRARIES.items() for source in target["srcs"]}


def imported(source: str) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / source).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dependency(library: str, name: str) -> str | None:
    """The target that a library needs for an import; None for what needs none."""
    package = name.partition(".")[0]
    if package in OURS:
        module = name
        while module not in LIBRARY_OF:  # a name inside a module
            module, dot, _ = module.rpartition(".")
            assert dot, f"{name} is in no target of BUILD"
        return None if LIBRARY_OF[module] == library else f":{LIBRARY_OF[module]}"
    if package in sys.stdlib_module_names or {package, (library, package)} & OPTIONAL:
        return None
    return f"@pypi//{DISTRIBUTIONS.get(package, package)}"


def test_every_source_is_in_one_library():
    sources = [source for target in LIBRARIES.values() for source in target["srcs"]]
    assert sorted(sources) == sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in folder.rglob("*.py"))


def test_every_command_is_a_binary():
    commands = {path.stem for path in (ROOT / "mess_tf").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    binaries = {name: target["main"] for name, target in TARGETS.items() if target["kind"] == "py_binary"}
    others = {"runtime": "tflite/mess_runtime/__main__.py", "phones": "android_bench/__main__.py"}
    assert binaries == {name: f"mess_tf/{name}.py" for name in commands} | others


@pytest.mark.parametrize("name", LIBRARIES)
def test_dependencies_are_what_is_imported(name):
    target = LIBRARIES[name]
    needed = {dependency(name, module) for source in target["srcs"] for module in imported(source)} - {None}
    needed |= {f"@pypi//{package}" for library, package in INDIRECT if library == name}
    assert sorted(needed) == target["deps"]


def test_external_dependencies_are_pinned():
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    needed = {name for target in TARGETS.values() for name in target["deps"] if name.startswith("@pypi//")}
    assert {name.removeprefix("@pypi//") for name in needed} <= {name.replace("-", "_") for name in pinned}


def test_packages_of_the_wheel_are_those_of_the_tree():
    listed = re.search(r"^packages = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert set(ast.literal_eval(listed)) == {module_of(path) for folder in FOLDERS for path in folder.rglob("__init__.py")}
