"""Heads: initialisers, their place among a network's parameters, and the standardisation of their input."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

HEAD_NORM = "head_norm"  # name of the Standardize module before the head, and its key in batch_stats


def linear_init(fan_in: int) -> Callable[..., jax.Array]:
    """Returns the initialiser of torch's nn.Linear: weight and bias are uniform in +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def get_head(params: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    """Returns the head's parameters, {"kernel": ..., "bias": ...}. path: the network's `head`."""
    for name in path:
        params = params[name]
    return params


def set_head(params: Mapping[str, Any], path: tuple[str, ...], head: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters with another head; the rest is unchanged."""
    name, *rest = path
    return {**params, name: set_head(params[name], tuple(rest), head) if rest else head}


class Standardize(nn.Module):
    """Standardises features (N, F) by statistics that are set once: `mean` (F,) and one `deviation` () for all.

    Neither training nor recalibration changes them. One deviation needs no epsilon, since a feature that never varies
    is not divided by its own.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:], jnp.float32)
        deviation = self.variable("batch_stats", "deviation", jnp.ones, (), jnp.float32)
        return (x - mean.value) / deviation.value


def fold_standardize(head: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Folds Standardize into the dense layer that follows it: returns the same function of its unchanged input."""
    kernel = head["kernel"] / statistics["deviation"]
    return {"kernel": kernel, "bias": head["bias"] - (statistics["mean"][:, None] * kernel).sum(0)}


def unfold_standardize(head: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Inverts fold_standardize: returns the dense layer that computes the same after Standardize."""
    bias = head["bias"] + (statistics["mean"][:, None] * head["kernel"]).sum(0)
    return {"kernel": head["kernel"] * statistics["deviation"], "bias": bias}
