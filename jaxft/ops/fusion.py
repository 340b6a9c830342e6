"""Keeps XLA from fusing a computation into its consumers, which would each compute it again."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from jaxft.ops.formulation import Formulation, on_cpu


def materialize(
    function: Callable[..., Any], static_argnums: int | tuple[int, ...] | None = None
) -> Callable[..., Any]:
    """Materialises the function's result: XLA's CPU backend would otherwise fuse it into every consumer.

    The function must run on CPUs only. An optimization_barrier does not help: the CPU pipeline drops it before
    fusion.
    """

    # NOTES: Keeping XLA from recomputing a result (docs/notes/cpu-kernels.md)
    @partial(jax.jit, static_argnums=static_argnums)
    @wraps(function)
    def call(*arguments: Any) -> Any:
        with set_xla_metadata(inlineable=None):  # jnp's own calls inside must not inherit the mark
            return function(*arguments)

    @wraps(function)
    def marked_call(*arguments: Any) -> Any:
        with set_xla_metadata(inlineable="false"):
            return call(*arguments)

    return marked_call


def materialize_on_cpu(
    function: Callable[..., Any], static_argnums: int | tuple[int, ...] | None = None
) -> Callable[..., Any]:
    """Applies `materialize` on CPUs only; the wrapped function takes a keyword `formulation` in addition."""
    materialized = materialize(function, static_argnums)

    @wraps(function)
    def call(*arguments: Any, formulation: Formulation) -> Any:
        return materialized(*arguments) if on_cpu(formulation) else function(*arguments)

    return call


def gpu_barrier(tree: Any, formulation: Formulation) -> Any:
    """Returns `tree`, on GPUs behind an optimization_barrier, so that consumers do not recompute it."""
    # NOTES: Barriers at the ends of blocks (docs/notes/accelerators.md)
    return lax.optimization_barrier(tree) if formulation == "gpu" else tree
