"""Memory in pages of 2 MB for a command: a CPU's training step takes its memory from the kernel anew each time."""

import os
import sys

_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb=1"  # of glibc 2.35; others pass over it


def environment() -> dict[str, str]:
    """With which a process is to be started."""
    others = [tunable for tunable in os.environ.get(_TUNABLES, "").split(":") if tunable]
    return os.environ | {_TUNABLES: ":".join([*others, _HUGE_PAGES])}


def ask_for_them() -> None:
    """Starts `python -m jaxft.COMMAND` again, in the same process: glibc reads its environment when a program starts.

    To be called while the package is imported, when nothing has happened yet. A user's own choice stays.
    """
    is_command = sys.argv[0] == "-m"  # which is there while Python looks for the module
    if is_command and sys.platform == "linux" and "glibc.malloc.hugetlb" not in os.environ.get(_TUNABLES, ""):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment())
