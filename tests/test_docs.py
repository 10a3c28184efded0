"""README and pages: commands, flags, files, names and links exist, and each page begins with a command that runs."""

import ast
import dataclasses
import functools
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import android_bench.__main__
import mess_runtime.__main__
from mess_tf.configs import RECIPES, Config

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "benchmarks/README.md", *DOCS]
PAGES += sorted((REPOSITORY / "models").glob("*/README.md"))
PARSERS = {"mess_runtime": mess_runtime.__main__._parser, "android_bench": android_bench.__main__._parser}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TARGETS = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
SECTIONS = {field.name: {inner.name for inner in dataclasses.fields(field.type)} for field in dataclasses.fields(Config)}


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def commands(text: str) -> Iterator[list[str]]:
    """Words of every `python` and `make` command in the fences of a page, without comments, what follows `;` and the environment."""
    for _, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(\S*/)?(python|make) ", line):
                lexer = shlex.shlex(line, posix=True, punctuation_chars=";")
                lexer.whitespace_split = True
                words = list(itertools.takewhile(lambda word: word != ";", lexer))
                yield [word for word in words if not word.startswith("$")]


def inline(text: str) -> list[str]:
    """The pieces of code in a page's sentences and tables."""
    return [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def source_of(name: str) -> Path | None:
    """The file that `python -m name` runs."""
    for root, kind in itertools.product((REPOSITORY, REPOSITORY / "tflite"), (".py", "/__main__.py")):
        if (path := root / (name.replace(".", "/") + kind)).exists():
            return path
    return None


@functools.cache
def flags_of(path: Path) -> set[str]:
    """Names of the absl flags that a command defines, itself or by what it imports; those of an imported command do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    mine = _defined(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            for other in (source_of(name), path.parent / f"{name}.py"):
                if other and other.exists():
                    library = ast.parse(other.read_text(encoding="utf-8"))
                    library.body = [statement for statement in library.body if not isinstance(statement, ast.If)]
                    mine |= _defined(library)
    return mine


def _defined(tree: ast.Module) -> set[str]:
    constants = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            left, right = node.targets[0], node.value
            several = isinstance(left, ast.Tuple) and isinstance(right, ast.Tuple)
            pairs = zip(left.elts, right.elts, strict=True) if several else [(left, right)]
            constants |= {ast.unparse(name): value.value for name, value in pairs if isinstance(value, ast.Constant)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "attr", "").startswith("DEFINE_")]
    return {name.value if isinstance(name := call.args[0], ast.Constant) else constants[name.id] for call in calls}


def check_command(words: list[str]) -> None:
    """Fails if a command does not exist or does not know its flags."""
    program, *rest = words
    if program == "make":
        assert {word for word in rest if "=" not in word} <= set(TARGETS), rest
        return
    if rest[0] == "-m" and rest[1] in PARSERS:
        if "--help" not in rest:
            PARSERS[rest[1]]().parse_args(rest[2:])
        return
    if rest[0] == "-m":
        path, rest = source_of(rest[1]), rest[2:]
        if not path:
            assert words[2] in ("http.server", "pytest", "venv"), words  # others' commands
            return
    else:
        path, rest = REPOSITORY / rest[0], rest[1:]
        assert path.exists(), words
    known = flags_of(path) | {"help"}
    assert known > {"help"}, f"no flags found in {path}"
    for before, word in itertools.pairwise(["", *rest]):
        if word.startswith("--"):
            assert word[2:].partition("=")[0] in known, words
        else:
            assert before in ("--set", "--limit"), f"{word!r} belongs to no flag: {words}"
        if word.startswith("--recipe="):
            assert word[9:] in RECIPES or word[9:].isupper(), words


@every_page
def test_commands_exist_and_know_their_flags(page):
    for words in commands(page.read_text(encoding="utf-8")):
        try:
            check_command(words)
        except ValueError as error:
            pytest.fail(f"{error}: {words}")


@every_page
def test_flags_fields_files_and_modules_in_sentences_exist(page):
    everything = [path for folder in ("mess_tf", "benchmarks", "docs") for path in (REPOSITORY / folder).glob("*.py")]
    known = set().union(*map(flags_of, everything), {"help"})
    for make_parser in PARSERS.values():
        for parser in make_parser()._subparsers._group_actions[0].choices.values():
            known |= {option[2:] for option in parser._option_string_actions if option.startswith("--")}
    known |= set(re.findall(r'addoption\(\s*"--(\w+)"', (REPOSITORY / "tests/conftest.py").read_text(encoding="utf-8")))
    for code in inline(page.read_text(encoding="utf-8")):
        for flag in re.findall(r"(?:^|[\s\[(])--(\w+)", code):
            assert flag in known, code
        for section, field in re.findall(rf"(?<![\w/.])({'|'.join(SECTIONS)})\.(\w+)", code):
            assert field in SECTIONS[section], code
        for name in re.findall(r"-m (\w+(?:\.\w+)*)", code):
            assert source_of(name), code
        if re.fullmatch(r"(android_bench|benchmarks|docs|mess_tf|models|notebooks|tests|tflite)/[\w./]+", code):
            assert (REPOSITORY / code).exists(), code


@pytest.mark.parametrize("page", [*PAGES, *sorted((REPOSITORY / "notebooks").glob("*.ipynb"))], ids=name_of)
def test_imports_in_examples_exist(page):
    for module, names in re.findall(r"from ((?:mess_|android_bench)[\w.]*) import ([\w, ]+)", page.read_text(encoding="utf-8")):
        path = source_of(module)
        assert path, module
        defined = re.findall(r"^(?:def |class )?(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(names.replace(" ", "").split(",")) <= set(defined), (module, names)


@every_page
def test_links_have_a_text_and_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"\[\]\([^)]*\)", text), "to these MyST alone gives a text"
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        assert not target.startswith("/"), target
        if target.startswith("http") or (not path and anchor.startswith(("mess_", "android_bench"))):
            continue  # of the reference: `make docs` checks it
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            text = file.read_text(encoding="utf-8")
            for name in re.findall(r"^```{include} (\S+)", text, re.MULTILINE):
                text += (file.parent / name).read_text(encoding="utf-8")
            without_directives = re.sub(r"^```{.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", without_directives), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


def test_the_readme_is_short_and_says_how_to_begin():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    assert ["make", "demo"] in (words := list(commands(text))) and ["make", "test"] in words


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_a_page_begins_with_a_command(page):
    assert re.match(r"# .+\n\n```(bash|python)\n", page.read_text(encoding="utf-8"))


def test_every_page_is_in_the_table_of_contents():
    index = (REPOSITORY / "docs/index.md").read_text(encoding="utf-8")
    listed = re.search(r"^```{toctree}\n(?::.*\n)*\n(.*?)^```", index, re.MULTILINE | re.DOTALL).group(1).split()
    assert sorted(listed) == [page.stem for page in DOCS if page.stem != "index"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder that looks like the repository's root; what the pages' commands make stays in it from page to page."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("benchmarks", "docs", "models"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("page", [page for page in DOCS if page.stem != "index"], ids=lambda page: page.stem)
def test_the_first_command_of_a_page_runs(page, clone, plug_in):
    plug_in("Pixel 8")
    language, block = FENCE.search(page.read_text(encoding="utf-8")).groups()
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tflite")]),
    }
    command = ["bash", "-euc", block] if language == "bash" else [sys.executable, "-c", block]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout
