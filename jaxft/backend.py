"""How a command's process is set up, before JAX runs anything: fast memory, and compiled programs that are kept."""

import ctypes
import os
import sys
import threading
import time
from pathlib import Path

import jax

from jaxft.datasets import cache_dir

_MALLOPT = {  # of glibc's malloc.h
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, -1),  # never
    "M_TOP_PAD": (-2, 64 * 2**20),
    "M_ARENA_MAX": (-8, 1),
}
_MADV_HUGEPAGE = 14  # of Linux's mman.h
_HUGE_PAGE = 2**21
_SECONDS_BETWEEN = 5
_COMPILED_BYTES = 2**31  # the oldest go


def set_up_backend() -> None:
    """For commands, not for users of jaxft as a library: it changes the whole process."""
    _keep_freed_memory()
    _keep_compiled_programs()


def _keep_freed_memory() -> None:
    """XLA on a CPU allocates a step's memory anew each time; zeroing the fresh pages takes a sixth of the step."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl
        return
    for parameter, value in _MALLOPT.values():
        libc.mallopt(parameter, value)
    _use_huge_pages(libc)
    threading.Thread(target=_give_back_holes, args=(libc,), name="malloc_trim", daemon=True).start()


def _use_huge_pages(libc: ctypes.CDLL) -> None:
    """For what the heap will grow into, and the kernel's until then: fewer page faults and misses of the TLB.

    (What GLIBC_TUNABLES=glibc.malloc.hugetlb=1 does, but it must be set before the process starts.)
    """
    libc.malloc.restype = ctypes.c_void_p
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    start = libc.malloc(ctypes.c_size_t(size))
    if start is None:  # a limit on the address space
        return
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(start + size - first), _MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(start))


def _give_back_holes(libc: ctypes.CDLL) -> None:
    """At times something small lands where a step's memory ended: the next step no longer fits there, and takes more.

    (glibc aligns by asking for more than it needs.) All that is free but the heap's end goes back to the kernel, in
    some 15 ms.
    """
    while True:
        time.sleep(_SECONDS_BETWEEN)
        libc.malloc_trim(ctypes.c_size_t(sys.maxsize))


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
