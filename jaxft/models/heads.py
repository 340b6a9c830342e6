"""Initialisers of heads."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def linear_init(fan_in: int) -> Callable[..., jax.Array]:
    """Returns the initialiser of torch's nn.Linear: weight and bias are uniform in +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)
