"""Memory in pages of 2 MB for a command: a CPU's training step takes its memory from the kernel anew each time."""

import os
import sys
from contextlib import suppress

_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb=1"  # of glibc 2.35; others pass over it
_ASKED = "JAXFT_ASKED_FOR_HUGE_PAGES"  # stays where GLIBC_TUNABLES is taken away, as from a program with capabilities


def environment() -> dict[str, str]:
    """With which a process is to be started."""
    others = [tunable for tunable in os.environ.get(_TUNABLES, "").split(":") if tunable]
    return os.environ | {_TUNABLES: ":".join([*others, _HUGE_PAGES]), _ASKED: "yes"}


def ask_for_them() -> None:
    """Starts `python -m jaxft.COMMAND` again, in the same process: glibc reads its environment when a program starts.

    To be called while the package is imported, when nothing has happened yet. A user's own choice stays.
    """
    is_command = sys.argv[0] == "-m"  # which is there while Python looks for the module
    chosen = _ASKED in os.environ or "glibc.malloc.hugetlb" in os.environ.get(_TUNABLES, "")
    if is_command and sys.platform == "linux" and not chosen:
        with suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment())
