"""Settings of the whole process: huge pages, loggers, exception hooks, limits and the compilation cache.

Only commands (jaxft/cli.py) and the worker processes of jaxft change them. Importing jaxft changes nothing.
"""

import logging
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxft.files import cache_dir

_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb=1"  # since glibc 2.35; older ones ignore it
_ASKED = "JAXFT_ASKED_FOR_HUGE_PAGES"  # survives if GLIBC_TUNABLES is removed, as for programs with capabilities
_COMPILED_BYTES = 2**31  # above this size JAX deletes the least recently used programs


def environment() -> dict[str, str]:
    """Returns the environment of a child process, with huge pages requested."""
    others = [tunable for tunable in os.environ.get(_TUNABLES, "").split(":") if tunable]
    return os.environ | {_TUNABLES: ":".join([*others, _HUGE_PAGES]), _ASKED: "yes"}


def reexec_with_huge_pages() -> None:
    """Executes this command again in the same process, with malloc using pages of 2 MB.

    glibc reads its environment only when a program starts, so this comes before JAX is imported. Does nothing if the
    user has made a choice in GLIBC_TUNABLES, or if the program is not a jaxft command.
    """
    # NOTES: Huge pages (docs/notes/memory.md)
    chosen = _ASKED in os.environ or "glibc.malloc.hugetlb" in os.environ.get(_TUNABLES, "")
    if sys.platform == "linux" and _is_command() and not chosen:
        with suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment())


def _is_command() -> bool:
    """Returns whether Python was started by the script `jaxft` or by `python -m jaxft.COMMAND`."""
    main = sys.modules["__main__"]
    if spec := getattr(main, "__spec__", None):
        return spec.name.partition(".")[0] == "jaxft"
    return Path(getattr(main, "__file__", None) or "").name == "jaxft"


def open_missing_streams() -> None:
    """Replaces a stdout or stderr that the caller has closed by one that discards everything."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115, for as long as the process runs


def set_up() -> None:
    """Prepares the process of a command, after its modules have been imported."""
    _silence_loggers()
    ignore_closed_event_loops()
    allow_large_images()
    _cache_compiled_programs()


def allow_large_images() -> None:
    """Lifts Pillow's limit on pixels, and its warning at half of it; image_file.decode checks the size itself."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None


def _silence_loggers() -> None:
    """Silences the tracebacks that Orbax and gcsfs log for errors that jaxft reports in one line."""
    import absl.logging  # noqa: F401, creates the logger "absl" with a class of its own

    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def ignore_closed_event_loops() -> None:
    """Hides the tracebacks of Orbax's pending reads and writes: after one has failed, the others find a closed loop."""
    excepthook, unraisablehook = sys.excepthook, sys.unraisablehook

    def is_closed_loop(error: BaseException | None) -> bool:
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    def filtered_excepthook(kind: Any, error: BaseException, traceback: Any) -> None:
        if not is_closed_loop(error):
            excepthook(kind, error, traceback)

    def filtered_unraisablehook(unraisable: Any) -> None:
        if not is_closed_loop(unraisable.exc_value):
            unraisablehook(unraisable)

    sys.excepthook, sys.unraisablehook = filtered_excepthook, filtered_unraisablehook


def _cache_compiled_programs() -> None:
    """Keeps compiled programs in jaxft's cache, unless JAX_COMPILATION_CACHE_DIR names another place."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = cache_dir() / "compiled"
        _remove_incomplete(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _COMPILED_BYTES)  # JAX then locks the cache as well
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def disable_compilation_cache() -> None:
    """Stops caching programs compiled from now on: XLA cannot serialise those that call oneDNN."""
    # NOTES: When oneDNN repays recompilation (docs/notes/onednn.md)
    import jax

    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)


def _remove_incomplete(folder: Path) -> None:
    """Removes programs without their access-time file, as after a full disk: with one of them JAX stores no others."""
    for program in folder.glob("*-cache"):
        if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
            program.unlink(missing_ok=True)
