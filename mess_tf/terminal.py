"""How the commands `python -m mess_tf.X` meet the person at the terminal: `mess_runtime.terminal` for flags of absl.

A command begins, where it is the main program, with its flags and `terminal.run`, and only then imports what takes seconds: an error in
the flags is said at once.
"""

import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import flags

from mess_runtime import terminal
from mess_runtime.bundle import check

HELP = ("-h", "-help", "--help")


def run(name: str, docstring: str, check_flags: Callable[[], None] = lambda: None) -> NoReturn:
    """Parses the flags, imports a command, runs its function `main` and exits; see `mess_runtime.terminal.run`.

    Args:
      name: of the module.
      docstring: of the module, for --help.
      check_flags: raises an error where the flags are wrong, before anything is imported.
    """
    flags.DEFINE_bool("verbose", False, "Also show other libraries' lines, and the traceback of an error.", module_name=sys.argv[0])

    def command() -> None:
        if any(word in HELP for word in sys.argv[1:]):
            print(_help(name, docstring))
            return
        _parse(sys.argv)
        if flags.FLAGS.verbose:
            terminal.show_libraries()
        check_flags()
        importlib.import_module(name).main()

    sys.exit(terminal.run(name, command))


def check_left_out(needless: bool, names: str, reason: str) -> None:
    """Raises a ValueError for a flag that would have no effect.

    Args:
      needless: whether they have none here.
      names: of the flags, with spaces between.
      reason: the end of `--device: must be left out ...`.
    """
    for name in names.split():
        check(not (needless and flags.FLAGS[name].present), f"--{name}", f"left out {reason}", flags.FLAGS[name].value)


def numbers(name: str) -> list[float]:
    """The numbers of a list flag, each once, none if it was not given.

    Raises:
      ValueError: one is not a finite number.
    """
    text = ",".join(flags.FLAGS[name].value or ())
    try:
        values = list(dict.fromkeys(float(word) for word in flags.FLAGS[name].value or ()))
    except ValueError:
        raise ValueError(f"--{name}: must be numbers with commas between, got {text!r}") from None
    check(all(map(math.isfinite, values)), f"--{name}", "finite", text)
    return values


def _own() -> dict[str, flags.Flag]:
    """The flags of the command, by name, in the order in which they were defined; libraries have flags too."""
    modules = [sys.argv[0], *(name for name in flags.FLAGS.flags_by_module_dict() if name.startswith("mess_tf."))]
    return {flag.name: flag for module in modules for flag in flags.FLAGS.get_flags_for_module(module)}


def _parse(words: list[str]) -> None:
    own = _own()
    terminal.know_flags(own)
    names = [f"--{name}" for name in own]
    try:
        others = flags.FLAGS(words)[1:]
    except flags.UnrecognizedFlagError as error:
        word = next(word for word in words[1:] if word.startswith("-") and word.lstrip("-").partition("=")[0] == error.flagname)
        raise ValueError(terminal.unknown_flag(word, names)) from error
    except (flags.Error, ValueError) as error:
        raise ValueError(_message(str(error).splitlines()[0], own)) from error
    foreign = [f"--{name}" for name in flags.FLAGS if flags.FLAGS[name].present and name not in own]  # of libraries
    if foreign:
        raise ValueError(terminal.unknown_flag(foreign[0], names))
    check(not others, "arguments", "flags, as --help names them", " ".join(others))


def _message(said: str, own: dict[str, flags.Flag]) -> str:
    """What absl said, in the words of all other errors."""
    if missing := re.fullmatch(r"Missing value for flag (\S+)", said):
        return f"{missing[1]}: must be given a value, got nothing"
    if not (wrong := re.fullmatch(r"flag --(\w+)=(.*?): (.*)", said)):
        return said
    name, value, reason = wrong.groups()
    if "must have a value" in reason:
        return f"--{name}: must be given, got nothing"
    parser = own[name].parser
    values = getattr(parser, "enum_values", None)
    required = f"one of {', '.join(values)}" if values else parser.syntactic_help or "true or false"
    required = re.sub("^(?=integer)", "an ", re.sub("^(?=number)", "a ", required))
    return f"--{name}: must be {required}, got {value!r}"


def _help(name: str, docstring: str) -> str:
    """The command's docstring and its flags."""
    rows = []
    for flag in _own().values():
        values = getattr(flag.parser, "enum_values", None)
        value = "" if flag.boolean else "=" + ("|".join(values) if values else flag.flag_type().split()[-1].upper())
        default = "" if flag.default in (None, "", [], False) else f" Default: {flag.default_as_str}."
        required = " Required." if any("must have a value" in each.message for each in flag.validators) else ""
        text = " ".join(flag.help.removesuffix("repeat this option to specify a list of values").split()).rstrip(".; ")
        rows.append((f"--{flag.name}{value}", f"{re.sub('^<.*?>: ', '', text)}.{required}{default}"))
    rows.append(("--help", "Show this."))
    width = max(len(left) for left, _ in rows)
    table = [f"  {left:{width}}  {right}" for left, right in rows]
    return "\n".join([f"python -m {name}: {inspect.cleandoc(docstring)}", "", *table])
