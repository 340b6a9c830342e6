"""Errors that the user can fix, stops by a signal, and the exit codes of both."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

MESSAGE_LENGTH = 240  # characters of an error's line, "error: " included


class UserError(Exception):
    """A wrong config, path, file, dataset or version; the message says how to fix it."""


def shortened(names: Sequence[str], shown: int = 3) -> str:
    """Joins the first names: 'a, b, c and 12 more'."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")


class Interrupted(BaseException):
    """A stop by a signal. The exit code is 128 plus its number, as in a shell (Ctrl-C 130, SIGTERM 143)."""

    def __init__(self, number: signal.Signals, saved: str = "") -> None:
        super().__init__(f"stopped by {number.name}" + (f"; {saved}" if saved else ""))
        self.exit_code = 128 + number


class ArgumentParser(argparse.ArgumentParser):
    """A parser that raises UserError instead of printing its usage. Every command has --debug."""

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
        raise UserError(f"{message}; see {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file, flush=True)  # argparse's own ignores a broken pipe


def run_command(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Runs a command and returns its exit code.

    0: done; 2: UserError, reported in one line; 130: Ctrl-C; 143: SIGTERM; 141: the reader of stdout has gone, as with
    `| head`. Any other exception is a bug in jaxft and propagates (exit code 1).
    """
    try:
        code = _run(main, argv)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit would fail as well
        return 128 + signal.SIGPIPE
    return code


def _run(main: Callable[[list[str]], None], argv: list[str]) -> int:
    try:
        main(argv)
    except UserError as error:
        if "--debug" in argv:
            traceback.print_exc()
        _write_line(_one_line(f"error: {error}", MESSAGE_LENGTH))
        return 2
    except Interrupted as stop:
        _write_line(str(stop))
        return stop.exit_code
    except KeyboardInterrupt:
        _write_line("\ninterrupted")
        return 128 + signal.SIGINT
    return 0


def _one_line(text: str, length: int) -> str:
    """Joins the lines and cuts the middle out of a text that is too long: the remedy is at its end."""
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    end = length // 3
    return f"{line[: length - end - len(' ... ')]} ... {line[-end:]}"


def _write_line(text: str) -> None:
    """Writes to stderr in one call, so that lines of several processes do not mix."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
