"""LayerNorm, GELU and global response normalisation: statistics and functions in at least float32."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxft.ops.formulation import Formulation, on_cpu
from jaxft.ops.fusion import materialize, materialize_on_cpu

_SLOPE, _CUBIC = math.sqrt(2 / math.pi), 0.044715  # of GELU by tanh


def layer_norm_and_input(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    dtype: Any = None,
    formulation: Formulation = "plain",
) -> tuple[jax.Array, jax.Array]:
    """Normalises x (..., C) over its last axis, with the biased variance; scale and bias are (C,).

    Returns the result and x itself. A shortcut should use this x: on a CPU the backward pass then adds the gradients of
    both in a single pass over memory. dtype: of the result; default: at least float32.
    """
    dtype = dtype or jnp.promote_types(x.dtype, jnp.float32)
    if on_cpu(formulation):
        return _cpu_layer_norm(x, scale, bias, epsilon, dtype)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centered = wide - wide.mean(-1, keepdims=True)
    y = centered * lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + epsilon) * scale + bias
    return y.astype(dtype), x


# NOTES: LayerNorm (docs/notes/families.md)
@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _cpu_layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    return _cpu_layer_norm_fwd(x, scale, bias, epsilon, dtype)[0]


def _cpu_layer_norm_fwd(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Any
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    mean, inverse = _statistics(x, epsilon)
    y = ((x - mean) * inverse * scale + bias).astype(dtype)
    return (y, x), (x, scale, mean, inverse)


def _cpu_layer_norm_bwd(
    epsilon: float, dtype: Any, residuals: tuple, gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    dx, dscale, dbias = _layer_norm_grad(*residuals, *gradients)
    return dx, dscale, dbias


_cpu_layer_norm.defvjp(_cpu_layer_norm_fwd, _cpu_layer_norm_bwd)


@partial(materialize, static_argnums=1)
def _statistics(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and the inverse standard deviation over the last axis, in at least float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = x.mean(-1, keepdims=True)
    return mean, lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + epsilon)


@materialize
def _layer_norm_grad(
    x: jax.Array, scale: jax.Array, mean: jax.Array, inverse: jax.Array, dy: jax.Array, shortcut: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of x (including the shortcut's), scale and bias."""
    normalized, dy = (x - mean) * inverse, dy.astype(mean.dtype)
    by_scale = dy * scale
    average = by_scale.mean(-1, keepdims=True)
    projection = (by_scale * normalized).mean(-1, keepdims=True)
    dx = shortcut + (by_scale - average - normalized * projection) * inverse
    axes = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (dy * normalized).sum(axes), dy.sum(axes)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gelu(x: jax.Array, approximate: bool = False, formulation: Formulation = "plain") -> jax.Array:
    """Returns x * Phi(x), computed in at least float32; approximate: by tanh (Hendrycks and Gimpel 2016).

    Only x is kept for the backward pass.
    """
    return _gelu(x, approximate, formulation=formulation)


# NOTES: GELU (docs/notes/families.md)
@partial(materialize_on_cpu, static_argnums=1)
def _gelu(x: jax.Array, approximate: bool) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * _cdf(wide, approximate)).astype(x.dtype)


@partial(materialize_on_cpu, static_argnums=2)
def gelu_grad(x: jax.Array, dy: jax.Array, approximate: bool) -> jax.Array:
    """Returns the gradient of gelu's input x, given that of its result."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    cdf = _cdf(wide, approximate)
    if approximate:
        slope = 2 * cdf * (1 - cdf) * _SLOPE * (1 + 3 * _CUBIC * wide**2)
    else:
        slope = jnp.exp(-0.5 * wide * wide) * (1 / math.sqrt(2 * math.pi))
    return (dy * (cdf + wide * slope)).astype(x.dtype)


def _cdf(x: jax.Array, approximate: bool) -> jax.Array:
    """Returns the normal distribution function."""
    if approximate:
        return 0.5 * (1 + jnp.tanh(_SLOPE * (x + _CUBIC * x**3)))
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))


def _gelu_fwd(x: jax.Array, approximate: bool, formulation: Formulation) -> tuple[jax.Array, jax.Array]:
    return gelu(x, approximate, formulation), x


def _gelu_bwd(approximate: bool, formulation: Formulation, x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    return (gelu_grad(x, dy, approximate, formulation=formulation),)


gelu.defvjp(_gelu_fwd, _gelu_bwd)


def response_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Adds to x (N, H, W, C) its product with each channel's norm over the image, relative to the channels' mean.

    Global response normalisation (Woo et al. 2023, section 3.3). Returns at least float32.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.square(x).sum((1, 2), keepdims=True)
    positive = squares > 0  # torch's norm has the gradient 0 at 0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
    return x + (x * (norm / (norm.mean(-1, keepdims=True) + epsilon)) * scale + bias)
