"""How a command's process is set up, before JAX runs anything: compiled programs are kept."""

import os
from pathlib import Path

import jax

from jaxft.datasets import cache_dir

_COMPILED_BYTES = 2**31  # the oldest go


def set_up_backend() -> None:
    """For commands, not for users of jaxft as a library: it changes the whole process.

    Compiled programs go to jaxft's cache, unless JAX_COMPILATION_CACHE_DIR says otherwise. A bound on its size also
    makes JAX lock it.
    """
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
