"""How to keep XLA from computing the same thing several times."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata


def materialize(function: Callable[..., Any], static_argnums: int | None = None) -> Callable[..., Any]:
    """Its results are computed once and kept, where XLA on a CPU would compute them again for each use of them.

    (An optimization_barrier is gone by the time XLA's CPU backend fuses.)
    """

    @partial(jax.jit, static_argnums=static_argnums)
    @wraps(function)
    def call(*arguments: Any) -> Any:
        with set_xla_metadata(inlineable=None):  # of jnp's own calls inside
            return function(*arguments)

    @wraps(function)
    def call_apart(*arguments: Any) -> Any:
        if jax.default_backend() != "cpu":
            return function(*arguments)
        with set_xla_metadata(inlineable="false"):
            return call(*arguments)

    return call_apart


def gpu_barrier(tree: Any) -> Any:
    """As it is, and not again within each of its uses, where XLA on a GPU would."""
    return lax.optimization_barrier(tree) if jax.default_backend() == "gpu" else tree
