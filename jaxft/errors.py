"""What the user can mend, told in one line with exit code 2; and what a signal ends."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A wrong config, path, file, data set or version; the message holds the remedy."""


class Interrupted(BaseException):
    """Ended by a signal; the exit code is 128 and its number, as a shell has it (Ctrl-C 130, SIGTERM 143)."""

    def __init__(self, number: signal.Signals, saved: str = "") -> None:
        super().__init__(f"stopped by {number.name}" + (f"; {saved}" if saved else ""))
        self.exit_code = 128 + number


class ArgumentParser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit. Every command has --debug."""

    def __init__(self, prog: str, description: str | None, epilog: str | None = None) -> None:
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


def run_command(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Runs a command and returns its exit code: 0 done, 2 for a UserError, 130 for Ctrl-C, 143 for SIGTERM.

    Any other exception is a bug of ours and keeps its traceback (exit code 1).
    """
    try:
        main(argv)
    except UserError as error:
        if "--debug" in argv:
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough; the rest goes nowhere, or flushing would raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
