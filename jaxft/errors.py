"""Errors that the user can fix, stops by a signal, their messages and exit codes, and the parsing of arguments."""

import argparse
import difflib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

CLEAR_LINE = "\r\x1b[K"  # a terminal's
MESSAGE_LENGTH = 240  # characters of an error's line, "error: " included
_FAILED_WRITES = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class UserError(Exception):
    """A wrong config, path, file, dataset or version; the message says how to fix it."""


def shortened(names: Sequence[str], shown: int = 3) -> str:
    """Joins the first names: 'a, b, c and 12 more'."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")


def counted(number: int, noun: str) -> str:
    """Returns '1 image' or '2,000 images'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Replaces characters that would end a line or control the terminal, as a file's name may hold."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


class Interrupted(BaseException):
    """A stop by a signal. The exit code is 128 plus its number, as in a shell (Ctrl-C 130, SIGTERM 143)."""

    def __init__(self, number: signal.Signals, remedy: str = "") -> None:
        super().__init__(number, remedy)
        self.number, self.remedy = number, remedy
        self.exit_code = 128 + number

    def __str__(self) -> str:
        return f"stopped by {self.number.name}" + (f"; {self.remedy}" if self.remedy else "")


class ArgumentParser(argparse.ArgumentParser):
    """A parser that raises UserError instead of printing its usage. Every command has --debug.

    No option's value may be empty. If an option is given twice, the last one counts.
    """

    def __init__(self, prog: str, description: str | None, epilog: str | None = None) -> None:
        if Path(sys.argv[0]).name == "jaxft":  # the installed script
            prog = prog.replace("python -m jaxft.", "jaxft ")
        super().__init__(
            prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise UserError(message if ";" in message else f"{message}; see {self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            raise self._unknown(rest[0])
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Returns the options and the other arguments. Raises UserError for an option other than --config.KEY."""
        found, rest = super().parse_known_args(args, namespace)
        for before, argument in zip(["", *rest], rest, strict=False):
            is_value = before.startswith("--config.") and "=" not in before
            if argument.startswith("-") and not argument.startswith("--config.") and not is_value:
                raise self._unknown(argument)
        return found, rest

    def _unknown(self, argument: str) -> UserError:
        options = self._option_string_actions
        matches = difflib.get_close_matches(argument.partition("=")[0], options, 1)
        if not matches and "--config" in options and argument.startswith("--"):
            matches = [f"--config.{argument.removeprefix('--')}"]
        hint = f"did you mean '{matches[0]}'? " if matches else ""
        return UserError(f"unknown argument '{argument}'; {hint}see {self.prog} --help")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if not arg_string:
            raise argparse.ArgumentError(action, "expected a value, not an empty one")
        return super()._get_value(action, arg_string)

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file, flush=True)  # argparse's own ignores a broken pipe


def run_command(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Runs a command and returns its exit code.

    0: done; 2: a UserError, or stdout cannot be written, reported in one line; 130: Ctrl-C; 143: SIGTERM; 141: the
    reader of stdout has gone, as with `| head`. Any other exception is a bug in jaxft and propagates (exit code 1).
    """
    try:
        code = _run(main, argv)
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        failure = _stdout_failure() or error
        if failure.filename is not None or failure.errno not in _FAILED_WRITES:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit would fail as well
        if isinstance(failure, BrokenPipeError):
            return 128 + signal.SIGPIPE
        if "--debug" in argv:
            write_message(traceback.format_exc())
        write_message(f"error: stdout cannot be written: {failure.strerror}; run the same command again elsewhere")
        return 2
    return code


def _stdout_failure() -> OSError | None:
    """Returns the error of writing to stdout, whose buffer keeps what could not be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    return None


def _run(main: Callable[[list[str]], None], argv: list[str]) -> int:
    try:
        main(argv)
    except UserError as error:
        if "--debug" in argv:
            write_message(traceback.format_exc())
        write_message(one_line(f"error: {error}", MESSAGE_LENGTH))
        return 2
    except Interrupted as stop:
        write_message(str(stop))
        return stop.exit_code
    except KeyboardInterrupt:
        write_message("\ninterrupted")
        return 128 + signal.SIGINT
    return 0


def one_line(text: object, length: int) -> str:
    """Joins the lines of a text and cuts out its middle if it is too long, since the remedy is at its end."""
    line = printable(" ".join(str(text).split()))
    if len(line) <= length:
        return line
    end = length // 3
    return f"{line[: length - end - len(' ... ')]} ... {line[-end:]}"


def raise_problems(problems: Sequence[str], subject: str = "") -> None:
    """Raises UserError with all problems, if there are any; writes each to stderr first if one line is too short."""
    if not problems:
        return
    text = f"{f'{subject}: ' if subject else ''}{'; '.join(problems)}"
    if len(problems) > 1 and len(f"error: {text}") > MESSAGE_LENGTH:
        for problem in problems:
            write_message(printable(f"{subject}: {problem}" if subject else problem))
    raise UserError(text)


def write_message(text: str) -> None:
    """Writes to stderr in one call, so that lines of several processes do not mix.

    On a terminal, it first clears the line of a progress bar, which tqdm then draws below the text. Does nothing if
    stderr is missing or cannot be written.
    """
    if sys.stderr:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            sys.stderr.write(f"{CLEAR_LINE if on_terminal() else ''}{text}\n")
            sys.stderr.flush()


def on_terminal() -> bool:
    """Returns whether stderr is a terminal, on which progress bars are drawn."""
    try:
        return bool(sys.stderr and sys.stderr.isatty())
    except (AttributeError, ValueError):  # it has no such method, or is closed
        return False
