"""How a command's process is set up, before JAX runs anything: fast memory, and compiled programs that are kept."""

import ctypes
import os
import sys
from pathlib import Path

import jax

from jaxft.datasets import cache_dir

_MALLOPT = {  # of glibc's malloc.h
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 64 * 2**20),
    "M_ARENA_MAX": (-8, 1),
}
_COMPILED_BYTES = 2**31  # the oldest go


def set_up_backend() -> None:
    """For commands, not for users of jaxft as a library: it changes the whole process."""
    _keep_freed_memory()
    _keep_compiled_programs()


def _keep_freed_memory() -> None:
    """XLA on a CPU allocates a step's memory anew each time; zeroing the fresh pages takes a sixth of the step."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # no musl
    if mallopt:
        for parameter, value in _MALLOPT.values():
            mallopt(parameter, value)


def _keep_compiled_programs() -> None:
    """In jaxft's cache, unless JAX_COMPILATION_CACHE_DIR says otherwise. A bound on its size also makes JAX lock it."""
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
