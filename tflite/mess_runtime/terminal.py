"""What every command shares towards the person in front of it: other libraries' lines, errors, arguments, progress.

A command that succeeds prints what it did and nothing else. What other libraries write meanwhile, some of them from C++ to the file
descriptors 1 and 2, goes to a temporary file (see `begin`). It is shown with --verbose, and when a library or this program fails, and is
dropped otherwise. A process of its own waits for the command to end, and shows the text too where the command crashed or was killed.

Nothing here needs more than the standard library. Progress bars need `rich`; without it there are lines.
"""

import argparse
import contextlib
import difflib
import dis
import itertools
import os
import pathlib
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NoReturn, Self, TypeVar

OURS = ("mess_runtime", "mess_tf", "android_bench")
# Where a `raise` of this project made one of these, it answers the user. From anywhere else it is a fault, as every other exception.
ANSWERS = (ValueError, ImportError, FloatingPointError)
SHOWN_PROBLEMS = 5  # of each kind, and kinds
LINE_S = 10.0  # seconds between two lines of progress
REFRESH_S = 0.1  # between two pictures of a bar; no thread draws it, since that would disturb what is measured

T = TypeVar("T")


# === Other libraries' lines ===


class _Capture:
    """Sends the file descriptors 1 and 2 to a temporary file; `sys.stdout` and `stderr` here lead where these did."""

    def __init__(self):
        self._text = tempfile.TemporaryFile()  # noqa: SIM115 (open until the process ends)
        self.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        stdout = sys.stdout
        sys.stdout = os.fdopen(os.dup(1), "w", 1 if stdout.isatty() else -1, encoding=stdout.encoding, errors=stdout.errors)
        alive, self._alive = os.pipe()
        self._watcher = os.fork() if hasattr(os, "fork") else None
        if self._watcher == 0:
            self._watch(alive)
        os.close(alive)
        for descriptor in (1, 2):
            os.dup2(self._text.fileno(), descriptor)

    def _watch(self, alive: int) -> NoReturn:
        """The process that waits for the end of the command's: `end` writes before it, a crash does not."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.close(self._alive)
        if not os.read(alive, 1):
            self._show()
        os._exit(0)

    def _show(self) -> None:
        self.stderr.flush()
        os.write(self.stderr.fileno(), os.pread(self._text.fileno(), os.fstat(self._text.fileno()).st_size, 0))

    def end(self, show: bool) -> None:
        """Shows the text and what comes after it, or drops both."""
        sys.stderr.flush()
        os.write(self._alive, b".")
        if self._watcher:
            os.waitpid(self._watcher, 0)
        if show:
            self._show()
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(self.stderr.fileno(), 2)
        else:
            sys.stderr = self.stderr


_capture: _Capture | None = None
_verbose = False
_flags: set[str] = set()


def begin() -> None:
    """Starts to catch other libraries' lines if Python is about to run a command, as in `python -m mess_tf.train`.

    A package calls this at its own import, before it imports a library: some already write then. Imported by any other program, nothing
    happens.
    """
    global _capture
    if sys.argv[0] == "-m" and _capture is None:  # this is so as long as Python looks for the command
        with contextlib.suppress(OSError):  # no place for a temporary file
            _capture = _Capture()


def show_libraries() -> None:
    """What --verbose does: shows other libraries' lines, also those written so far, and the traceback of every error."""
    global _verbose
    _verbose = True
    _end_capture(show=True)


def _end_capture(show: bool) -> None:
    global _capture
    if _capture is not None:
        ending, _capture = _capture, None
        ending.end(show)


def complain(line: str) -> None:
    """Writes a line to stderr."""
    print(line, file=_capture.stderr if _capture else sys.stderr, flush=True)


# === Errors ===


def know_flags(names: Iterable[str]) -> None:
    """Names the flags of the running command, without `--`, by which functions call their arguments: in messages they begin with it."""
    _flags.update(names)


def _with_dashes(message: str) -> str:
    """The message of an error, `ARGUMENT: ...` or `STEP: ARGUMENT: ...`, with the argument as the flag that it is, if it is one."""
    words = message.split(": ", 2)
    for place, word in enumerate(words[:-1]):
        if word in _flags:
            return ": ".join([*words[:place], f"--{word}", *words[place + 1 :]])
        if not word.isidentifier():
            break
    return message


class Terminated(KeyboardInterrupt):
    """SIGTERM, as `kill` and `timeout` send it: a command ends as with Ctrl-C."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM the exception; signals are handled in the main thread only."""

    def stop(*_: Any) -> NoReturn:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(name: str, command: Callable[[], int | None], failed: int = 1) -> int:
    """Runs a command, which returns its exit code or None for 0.

    An error that answers the user is one line on stderr, `NAME: ARGUMENT: must be REQUIRED, got RECEIVED`. A fault of this program is its
    traceback, after what other libraries wrote, and a line that says so. Both end with `failed`, an interruption with 130, by SIGTERM with
    143.
    """
    global _verbose
    _verbose = False
    _flags.clear()
    error, lines, show = None, [], False
    try:
        with _terminable():
            code = command() or 0
            sys.stdout.flush()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt as end:
        number = signal.SIGTERM if isinstance(end, Terminated) else signal.SIGINT
        code, lines = 128 + number, [f"{name}: stopped"]
    except BrokenPipeError:  # the reader of stdout, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = failed
    except Exception as failure:
        code, error = failed, failure
        answers = is_answer(error)
        show = not (answers and isinstance(error, (OSError, *ANSWERS)))  # what our RuntimeErrors are of, libraries may explain
        if _verbose or not answers:
            lines += ["".join(traceback.format_exception(error)).rstrip()]
        if answers:
            lines += [f"{name}: {_with_dashes(one_line(error))}"]
        else:
            lines += [f"{name}: this is a fault of the program, not of what you gave it; please report the command and all these lines"]
    _close_bars()
    _end_capture(show)
    for line in lines:
        complain(line)
    return code


def is_answer(error: Exception) -> bool:
    """Whether an exception tells the user something that this project meant to say, or the system did of a file."""
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in OURS:
        return True
    entry = error.__traceback__
    while entry.tb_next:
        entry = entry.tb_next
    code, spec = entry.tb_frame.f_code, entry.tb_frame.f_globals.get("__spec__")
    raised = dis.opname[code.co_code[entry.tb_lasti]] == "RAISE_VARARGS"
    return isinstance(error, ANSWERS) and raised and spec is not None and spec.name.partition(".")[0] in OURS


def one_line(error: Exception) -> str:
    """The message of an exception, of the system's ones beginning with the path."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return "; ".join(" ".join(line.split()) for line in str(error).splitlines() if line.strip()) or type(error).__name__


@contextlib.contextmanager
def reading(flag: str, required: str) -> Iterator[None]:
    """While a file is read that a flag names: begins the message of what is wrong with it with the flag, and what the file must be."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag}: must be {required}, got {one_line(error)}") from error


def first_few(problems: Sequence[str]) -> str:
    """Some of many problems `FILE: SENTENCE`, a line each; those that differ in the file and in what was found share one.

    With --verbose all of them are named.
    """
    shown = len(problems) if _verbose else SHOWN_PROBLEMS
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        name, _, sentence = problem.partition(": ")
        kind = re.sub(rf"\bgot .*?(?=;|$)|(?<!\w){re.escape(pathlib.Path(name).stem)}(?!\w)", "", sentence)
        kinds.setdefault(kind, []).append(problem)
    lines = []
    for first, *others in kinds.values():
        names = [pathlib.Path(each.partition(": ")[0]).name for each in others[:shown]]
        more = f" and {len(others) - len(names)} more (--verbose names all)" if len(others) > len(names) else ""
        lines.append(first + (f"; likewise {', '.join(names)}{more}, {1 + len(others)} in all" if others else ""))
    if len(lines) > shown:
        lines[shown:] = [f"... and {len(lines) - shown} more, {len(problems)} problems in all (--verbose names all)"]
    return "\n".join(lines)


# === Arguments ===


def unknown_flag(word: str, flags: Collection[str]) -> str:
    """The message about a word, `--NAME` or `--NAME=VALUE`, that is none of a command's flags."""
    flag = word.partition("=")[0]
    nearest = ", ".join(difflib.get_close_matches(flag, flags, 3, 0.4))
    return f"{flag}: must be a flag of this command, {f'nearest {nearest}' if nearest else 'see --help'}, got {word!r}"


class _Verbose(argparse.Action):
    def __call__(self, *_: Any) -> None:
        show_libraries()


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with --verbose, whose errors are ValueErrors like all others."""

    _PATTERNS = (
        (r"argument (?:\S+/)?([^\s/]+): invalid (\w+) value: (.*)", r"\1: must be of type \2, got \3"),
        (r"argument (?:\S+/)?([^\s/]+): invalid choice: (.*?) \(choose from (.*)\)", r"\1: must be one of \3, got \2"),
        (r"argument (?:\S+/)?([^\s/]+): expected .*", r"\1: must be given a value, got nothing"),
        (r"the following arguments are required: (.*)", r"\1: must be given, got nothing"),
    )

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)
        self.add_argument("--verbose", action=_Verbose, nargs=0, help="also show other libraries' lines, and the traceback of an error")

    def parse_known_args(self, args=None, namespace=None):
        """Knows all arguments, or raises."""
        self._words = sys.argv[1:] if args is None else list(args)
        know_flags(option.removeprefix("--") for option in self._option_string_actions)
        namespace, others = super().parse_known_args(args, namespace)
        for word in others:
            if word.startswith("-"):
                raise ValueError(unknown_flag(word, self._option_string_actions))
            raise ValueError(f"arguments: must be those that --help names, got {word!r}")
        return namespace, others

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):  # of which one may have been given, with a slip of the pen
            for word in itertools.takewhile(lambda word: word != "--", self._words):
                if word.startswith("--") and word.partition("=")[0] not in self._option_string_actions:
                    raise ValueError(unknown_flag(word, self._option_string_actions))
        for pattern, text in self._PATTERNS:
            if re.fullmatch(pattern, message):
                message = re.sub(pattern, text, message)
        raise ValueError(message)


# === Progress ===


def _say(line: str) -> None:
    print(line, flush=True)


class Bar:
    """Progress of long work: on a terminal a bar with the time left, elsewhere lines. To be entered and left as a context.

    Several bars stand below each other, whichever thread they are of. Lines that are printed meanwhile stand above them.
    """

    _lock = threading.RLock()
    _display: Any = None  # of rich, for all bars
    _open: int = 0

    def __init__(
        self, what: str, total: int, unit: str = "", done: int = 0, say: Callable[[str], None] = _say, most_s: float | None = None
    ):
        """Does nothing yet.

        Args:
          what: is being done.
          total, unit: of how many of what; without a unit, only the share is shown.
          done: how many are done already.
          say: receives the lines where there is no bar.
          most_s: of work that ends as soon as it can, and at the latest after so many seconds: these are shown instead of the time left.
        """
        self._most_s = most_s
        self._what, self._total, self._unit, self._say = what, total, unit, say
        self._first = self._done = done

    def __enter__(self) -> Self:
        self._start = self._last = time.monotonic()
        with Bar._lock:
            Bar._open += 1
            if Bar._display is None:
                Bar._display = _open_display()
            self._task = None if Bar._display is None else self._shown(Bar._display)
        return self

    def _shown(self, display: Any) -> int:
        left = self._most_s is None
        return display.add_task(self._what, total=self._total, completed=self._done, count=self._count(), left=left, note="")

    def _count(self) -> str:
        share = f"{self._unit} {self._done} of {self._total}" if self._unit else f"{self._done / max(self._total, 1):.0%}"
        return share if self._most_s is None else f"{share}, {time.monotonic() - self._start:.0f} of at most {self._most_s:.0f} s"

    def advance(self, note: str | None = None, line: str | None = None) -> None:
        """One more is done, see `reach`."""
        self.reach(self._done + 1, note, line)

    def reach(self, done: int, note: str | None = None, line: str | None = None) -> None:
        """So many are done.

        Args:
          done: of the total, those from before included.
          note: what to show beside the bar from now on.
          line: without a bar, to be printed at once, or nothing if empty. By default there is a line every ten seconds.
        """
        self._done = done
        now = time.monotonic()
        if self._task is not None:
            with Bar._lock:
                Bar._display.update(self._task, completed=done, count=self._count(), **({} if note is None else {"note": note}))
                if now - self._last >= REFRESH_S:
                    self._last = now
                    Bar._display.refresh()
        elif line is not None:
            if line:
                self._say(line)
        elif now - self._last >= LINE_S and done > self._first:
            self._last = now
            left = (now - self._start) / (done - self._first) * (self._total - done)
            self._say(f"{self._what}: {self._count()}" + (f", eta {left:.0f} s" if self._most_s is None else ""))

    def __exit__(self, *_: Any) -> None:
        with Bar._lock:
            Bar._open -= 1
            if self._task is not None:
                Bar._display.remove_task(self._task)
            if not Bar._open:
                _close_bars()


def progress(items: Iterable[T], what: str, unit: str) -> Iterator[T]:
    """Yields items, whose number is known, and shows how far they are: a bar, or `what: unit 3 of 10, eta 20 s` from time to time."""
    with Bar(what, len(items), unit) as bar:
        for item in items:
            yield item
            bar.advance()


def _open_display() -> Any:
    """rich's display of bars; None where there is no terminal to draw on, or no rich."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        return None

    class Left(TimeRemainingColumn):
        def render(self, task):
            return super().render(task) if task.fields["left"] else ""

    what, count, note = (TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[count]", "fields[note]"))
    display = Progress(what, BarColumn(), count, Left(), note, auto_refresh=False, transient=True)
    display.start()
    return display


def _close_bars() -> None:
    """Takes all bars away, also those of work that an exception has ended."""
    if Bar._display is not None:
        Bar._display.stop()
    Bar._display, Bar._open = None, 0
