"""A ResNet's pooling and normalisation in the formulation that runs fastest: the results of the plain ones.

Arrays are NHWC.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxft.ops.elementwise import (
    WIDE_BYTES,
    add_and_relu,
    sum_over_devices,
    sum_per_channel,
    sum_pixels,
    where_positive,
)
from jaxft.ops.fusion import gpu_barrier, materialize


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def batch_norm(
    x: jax.Array,
    shortcut: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    mean_estimate: jax.Array,
    weights: jax.Array | None,
    epsilon: float,
    relu: bool,
    axis_name: str | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """x normalised by its own statistics, scaled and shifted; then, if asked, `shortcut` added and a ReLU.

    Also returns the statistics: mean and biased variance (C,) and the number of values that went into each, in at
    least float32. No gradient flows through these. near: (C,), about the mean, such as the running one. weights:
    (N,), 0 leaves a picture out of the statistics. axis_name: of the devices over which to take them, if not of this
    one alone.
    """
    return _batch_norm_fwd(x, shortcut, scale, bias, mean_estimate, weights, epsilon, relu, axis_name)[0]


def _batch_norm_fwd(
    x: jax.Array,
    shortcut: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    mean_estimate: jax.Array,
    weights: jax.Array | None,
    epsilon: float,
    relu: bool,
    axis_name: str | None,
) -> tuple:
    mean, var, count = _statistics(x, mean_estimate, weights, axis_name)
    inverse = lax.rsqrt(var + epsilon)
    y = normalize(x, mean, scale * inverse, bias, shortcut, relu)
    # Of what the ReLU let through, y tells where there is a shortcut; else x does, which is read anyway.
    kept = y if relu and shortcut is not None else None
    return (y, (mean, var, count)), (x, kept, shortcut is None, scale, bias, weights, mean, inverse, count)


def _statistics(
    x: jax.Array, mean_estimate: jax.Array, weights: jax.Array | None, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """In two passes, or E[x^2] - E[x]^2 would cancel where the mean is large; but on accelerators, where a pass costs
    more than its sums, in one, of how far x is from `near`: the variance errs by (mean - near)^2 / 10^7.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    pixels = x.shape[1] * x.shape[2]
    if weights is None:
        count = sum_over_devices(jnp.asarray(x.shape[0] * pixels, dtype), axis_name)
    else:
        weights = weights.astype(dtype)
        count = sum_over_devices(weights.sum() * pixels, axis_name)
    divisor = jnp.maximum(count, 1)
    if jax.default_backend() != "cpu":
        centred = x.astype(dtype) - mean_estimate
        sums = sum_per_channel(centred, weights), sum_per_channel(jnp.square(centred), weights)
        mean, square = (total / divisor for total in sum_over_devices(sums, axis_name))
        return mean_estimate + mean, jnp.maximum(square - jnp.square(mean), 0), count
    mean = sum_over_devices(sum_pixels(x, weights), axis_name) / divisor
    in_chunks = x.dtype.itemsize >= WIDE_BYTES
    squares = _sum_chunks(_squares_in_chunks(x, mean, weights)) if in_chunks else _sum_of_squares(x, mean, weights)
    return mean, sum_over_devices(squares, axis_name) / divisor, count


@materialize
def _sum_of_squares(x: jax.Array, mean: jax.Array, weights: jax.Array | None) -> jax.Array:
    return sum_per_channel(jnp.square(x - mean), weights)


# XLA on a CPU adds arrays of float32, here up to 16 parts of one, faster than it sums one; not those of bfloat16.
def _chunks(x: jax.Array) -> jax.Array:
    """(parts, pixels, C) of (N, H, W, C)"""
    features = x.shape[-1]
    return x.reshape(math.gcd(x.size // features, 16), -1, features)


@materialize
def _squares_in_chunks(x: jax.Array, mean: jax.Array, weights: jax.Array | None) -> jax.Array:
    of_pixels = jnp.ones(x.shape[0], x.dtype) if weights is None else weights
    of_pixels = jnp.broadcast_to(of_pixels[:, None, None, None], (*x.shape[:3], 1))
    num_chunks = len(_chunks(x))
    chunks = zip(_chunks(x), of_pixels.reshape(num_chunks, -1, 1), strict=True)
    terms = [jnp.square(part - mean) * weight for part, weight in chunks]
    return sum(terms[1:], terms[0])


@materialize
def _sum_chunks(chunks: jax.Array) -> jax.Array:
    return chunks.sum(0)


@partial(materialize, static_argnums=5)
def normalize(
    x: jax.Array, mean: jax.Array, slope: jax.Array, bias: jax.Array, shortcut: jax.Array | None, relu: bool
) -> jax.Array:
    """(x - mean) * slope + bias, in at least float32; then, if asked, `shortcut` added and a ReLU."""
    y = add_and_relu((x - mean) * slope + bias, shortcut, relu).astype(x.dtype)
    return y if shortcut is None else gpu_barrier(y)


def _batch_norm_bwd(epsilon: float, relu: bool, axis_name: str | None, residuals: tuple, cotangents: tuple) -> tuple:
    x, y, alone, scale, bias, weights, mean, inverse, count = residuals
    dy = cotangents[0]
    slope = scale * inverse
    if y is not None:
        dy = where_positive(y, dy)
    relu = relu and y is None
    if jax.default_backend() != "cpu":
        dbias, dslope = _affine_grads(x, dy, mean, slope, bias, relu)
    elif x.dtype.itemsize >= WIDE_BYTES:
        sums = _sum_chunks(_affine_grads_in_chunks(x, dy, mean, slope, bias, relu))
        dbias, dslope = sums[0], sums[1]
    else:
        dy, relu = _materialized_relu_grad(x, dy, mean, slope, bias) if relu else dy, False
        dbias, dslope = sum_pixels(dy, None), _sum_of_products(x, dy, mean)
    mean, dbias = gpu_barrier((mean, dbias))  # or what the ReLU let through is kept for both uses
    divisor = jnp.maximum(count, 1)
    sums = sum_over_devices((dbias, dslope), axis_name)
    mean_grad, var_grad = sums[0] / divisor, sums[1] * jnp.square(inverse) / divisor
    dx = _normalize_gradient(x, dy, mean, slope, bias, weights, mean_grad, var_grad, relu)
    return dx, None if alone else dy, dslope * inverse, dbias, None, None


def _relu_grad(centred: jax.Array, dy: jax.Array, slope: jax.Array, bias: jax.Array, relu: bool) -> jax.Array:
    return jnp.where(centred * slope + bias > 0, dy, 0) if relu else dy


def _affine_grads(
    x: jax.Array, dy: jax.Array, mean: jax.Array, slope: jax.Array, bias: jax.Array, relu: bool
) -> tuple[jax.Array, jax.Array]:
    """The sums of dy, behind the ReLU if asked, and of its products with x - mean."""
    centred = x - mean
    dy = _relu_grad(centred, dy.astype(centred.dtype), slope, bias, relu)
    return dy.sum((0, 1, 2)), (dy * centred).sum((0, 1, 2))


# Apart, or XLA on a CPU writes all that it sums to memory, as float32.
@materialize
def _materialized_relu_grad(
    x: jax.Array, dy: jax.Array, mean: jax.Array, slope: jax.Array, bias: jax.Array
) -> jax.Array:
    return _relu_grad(x - mean, dy, slope, bias, relu=True)


@materialize
def _sum_of_products(x: jax.Array, dy: jax.Array, mean: jax.Array) -> jax.Array:
    return sum_per_channel((x - mean) * dy, None)


@partial(materialize, static_argnums=5)
def _affine_grads_in_chunks(
    x: jax.Array, dy: jax.Array, mean: jax.Array, slope: jax.Array, bias: jax.Array, relu: bool
) -> jax.Array:
    """(pixels, 2, C): `_affine_grads` of the parts' pixels, one pass over x and dy."""
    first, second = (jnp.asarray(row, x.dtype)[:, None] for row in np.eye(2))

    def of_part(x: jax.Array, dy: jax.Array) -> jax.Array:
        centred = x[:, None] - mean
        return _relu_grad(centred, dy[:, None], slope, bias, relu) * (first + second * centred)

    terms = [of_part(*chunks) for chunks in zip(_chunks(x), _chunks(dy), strict=True)]
    return sum(terms[1:], terms[0])


@partial(materialize, static_argnums=8)
def _normalize_gradient(
    x: jax.Array,
    dy: jax.Array,
    mean: jax.Array,
    slope: jax.Array,
    bias: jax.Array,
    weights: jax.Array | None,
    mean_grad: jax.Array,
    var_grad: jax.Array,
    relu: bool,
) -> jax.Array:
    centred = x - mean
    dy = _relu_grad(centred, dy.astype(centred.dtype), slope, bias, relu)
    common = mean_grad + centred * var_grad
    if weights is not None:
        common *= weights.astype(common.dtype)[:, None, None, None]
    return (slope * (dy - common)).astype(x.dtype)


batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)
