"""Everything that changes the process of a command: huge pages, the compilation cache."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from jaxft.files import cache_dir

_TUNABLES = "GLIBC_TUNABLES"


_HUGE_PAGES = "glibc.malloc.hugetlb=1"  # of glibc 2.35; others pass over it


_ASKED = "JAXFT_ASKED_FOR_HUGE_PAGES"  # stays where GLIBC_TUNABLES is taken away, as from a program with capabilities


def environment() -> dict[str, str]:
    """With which a process is to be started."""
    others = [tunable for tunable in os.environ.get(_TUNABLES, "").split(":") if tunable]
    return os.environ | {_TUNABLES: ":".join([*others, _HUGE_PAGES]), _ASKED: "yes"}


def reexec_with_huge_pages() -> None:
    """Starts `python -m jaxft.COMMAND` again, in the same process: glibc reads its environment when a program starts.

    To be called while the package is imported, when nothing has happened yet. A user's own choice stays.
    """
    is_command = sys.argv[0] == "-m"  # which is there while Python looks for the module
    chosen = _ASKED in os.environ or "glibc.malloc.hugetlb" in os.environ.get(_TUNABLES, "")
    if is_command and sys.platform == "linux" and not chosen:
        with suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment())


_COMPILED_BYTES = 2**31  # the oldest go


def set_up_backend() -> None:
    """For commands, not for users of jaxft as a library: it changes the whole process.

    Compiled programs go to jaxft's cache, unless JAX_COMPILATION_CACHE_DIR says otherwise. A bound on its size also
    makes JAX lock it.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = cache_dir() / "compiled"
        _remove_half_written(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _COMPILED_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _remove_half_written(folder: Path) -> None:
    """Programs without their time of use, as a full disk leaves them, for which JAX would keep no others any more."""
    for program in folder.glob("*-cache"):
        if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
            program.unlink(missing_ok=True)
