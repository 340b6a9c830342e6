"""BatchNorm with the shortcut and the ReLU that follow it, and the gradient of all three. Arrays are NHWC."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxft.ops.elementwise import add_and_relu, sum_over_devices, sum_per_channel, sum_pixels, where_positive
from jaxft.ops.formulation import WIDE_BYTES, Formulation, on_cpu
from jaxft.ops.fusion import gpu_barrier, materialize, materialize_on_cpu

Statistics = tuple[jax.Array, jax.Array, jax.Array]


class NormOptions(NamedTuple):
    """Static settings of `batch_norm`."""

    relu: bool = False  # apply a ReLU at the end
    axis_name: str | None = None  # of the mapped axis over which statistics are taken; None: each device has its own
    epsilon: float = 1e-5
    formulation: Formulation = "plain"


# Seven parameters, because custom_vjp takes arrays by position.
@partial(jax.custom_vjp, nondiff_argnums=(6,))
def batch_norm(
    x: jax.Array,
    shortcut: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    mean_estimate: jax.Array,
    weights: jax.Array | None,
    options: NormOptions,
) -> tuple[jax.Array, Statistics]:
    """Normalises x by its own statistics, scales and shifts it, and adds `shortcut`, if any.

    Also returns the statistics in at least float32: mean (C,), biased variance (C,) and the number of values that went
    into each. No gradient flows through them. mean_estimate: (C,), close to the mean, such as the running mean.
    weights: (N,), 0 leaves an image out of the statistics.
    """
    return _batch_norm_fwd(x, shortcut, scale, bias, mean_estimate, weights, options)[0]


# Seven parameters: those of `batch_norm`.
def _batch_norm_fwd(
    x: jax.Array,
    shortcut: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    mean_estimate: jax.Array,
    weights: jax.Array | None,
    options: NormOptions,
) -> tuple:
    mean, var, count = _statistics(x, mean_estimate, weights, options)
    inverse = lax.rsqrt(var + options.epsilon)
    y = normalize(x, mean, scale * inverse, bias, shortcut, options.relu, formulation=options.formulation)
    if shortcut is not None:
        y = gpu_barrier(y, options.formulation)
    # The backward pass needs the ReLU's mask: from y if there is a shortcut, else recomputed from x, which it reads
    # anyway.
    kept = y if options.relu and shortcut is not None else None
    return (y, (mean, var, count)), (x, kept, shortcut is None, scale, bias, weights, mean, inverse, count)


def _statistics(x: jax.Array, mean_estimate: jax.Array, weights: jax.Array | None, options: NormOptions) -> Statistics:
    """Returns mean (C,), biased variance (C,) and number of values, over all devices of the axis.

    Two passes on a CPU and in the plain formulation, because E[x^2] - E[x]^2 cancels for large means. One pass over
    x - mean_estimate on accelerators, where memory traffic dominates: the variance is off by
    (mean - mean_estimate)^2 / 10^7.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    formulation, axis_name = options.formulation, options.axis_name
    pixels = x.shape[1] * x.shape[2]
    if weights is None:
        count = sum_over_devices(jnp.asarray(x.shape[0] * pixels, dtype), axis_name)
    else:
        weights = weights.astype(dtype)
        count = sum_over_devices(weights.sum() * pixels, axis_name)
    divisor = jnp.maximum(count, 1)
    # NOTES: BatchNorm statistics in one pass (docs/notes/accelerators.md)
    if formulation in ("gpu", "tpu"):
        centred = x.astype(dtype) - mean_estimate
        sums = sum_per_channel(centred, weights), sum_per_channel(jnp.square(centred), weights)
        mean, square = (total / divisor for total in sum_over_devices(sums, axis_name))
        return mean_estimate + mean, jnp.maximum(square - jnp.square(mean), 0), count
    mean = sum_over_devices(sum_pixels(x, weights, formulation=formulation), axis_name) / divisor
    if on_cpu(formulation) and x.dtype.itemsize >= WIDE_BYTES:
        squares = _sum_chunks(_squares_in_chunks(x, mean, weights))
    else:
        squares = _sum_of_squares(x, mean, weights, formulation=formulation)
    return mean, sum_over_devices(squares, axis_name) / divisor, count


@materialize_on_cpu
def _sum_of_squares(x: jax.Array, mean: jax.Array, weights: jax.Array | None) -> jax.Array:
    return sum_per_channel(jnp.square(x - mean), weights)


# XLA's CPU backend adds float32 arrays, here up to 16 chunks of one, faster than it reduces one; not bfloat16 arrays.
def _chunks(x: jax.Array) -> jax.Array:
    """Reshapes (N, H, W, C) to (chunks, pixels, C)."""
    features = x.shape[-1]
    return x.reshape(math.gcd(x.size // features, 16), -1, features)


@materialize
def _squares_in_chunks(x: jax.Array, mean: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Sums the squared deviations over chunks: (pixels, C)."""
    per_pixel = jnp.ones(x.shape[0], x.dtype) if weights is None else weights
    per_pixel = jnp.broadcast_to(per_pixel[:, None, None, None], (*x.shape[:3], 1))
    num_chunks = len(_chunks(x))
    chunks = zip(_chunks(x), per_pixel.reshape(num_chunks, -1, 1), strict=True)
    terms = [jnp.square(chunk - mean) * weight for chunk, weight in chunks]
    return sum(terms[1:], terms[0])


@materialize
def _sum_chunks(chunks: jax.Array) -> jax.Array:
    return chunks.sum(0)


@partial(materialize_on_cpu, static_argnums=5)
def normalize(
    x: jax.Array, mean: jax.Array, slope: jax.Array, bias: jax.Array, shortcut: jax.Array | None, relu: bool
) -> jax.Array:
    """(x - mean) * slope + bias in at least float32, plus `shortcut`, if any, and an optional ReLU; of x's type."""
    return add_and_relu((x - mean) * slope + bias, shortcut, relu).astype(x.dtype)


def _batch_norm_bwd(options: NormOptions, residuals: tuple, cotangents: tuple) -> tuple:
    x, y, no_shortcut, scale, bias, weights, mean, inverse, count = residuals
    formulation = options.formulation
    dy = cotangents[0]
    slope = scale * inverse
    if y is not None:
        dy = where_positive(y, dy, formulation=formulation)
    relu = options.relu and y is None
    if not on_cpu(formulation):
        dbias, dslope = _affine_grads(x, dy, mean, slope, bias, relu)
    elif x.dtype.itemsize >= WIDE_BYTES:
        sums = _sum_chunks(_affine_grads_in_chunks(x, dy, mean, slope, bias, relu))
        dbias, dslope = sums[0], sums[1]
    else:
        dy, relu = _materialized_relu_grad(x, dy, mean, slope, bias) if relu else dy, False
        dbias, dslope = sum_pixels(dy, None, formulation=formulation), _sum_of_products(x, dy, mean)
    # NOTES: Gradient of BatchNorm on a GPU (docs/notes/accelerators.md): else the ReLU's mask is kept for both uses
    mean, dbias = gpu_barrier((mean, dbias), formulation)
    divisor = jnp.maximum(count, 1)
    sums = sum_over_devices((dbias, dslope), options.axis_name)
    mean_grad, var_grad = sums[0] / divisor, sums[1] * jnp.square(inverse) / divisor
    dx = _normalize_gradient(x, dy, mean, slope, bias, weights, mean_grad, var_grad, relu, formulation=formulation)
    return dx, None if no_shortcut else dy, dslope * inverse, dbias, None, None


def _relu_grad(centred: jax.Array, dy: jax.Array, slope: jax.Array, bias: jax.Array, relu: bool) -> jax.Array:
    return jnp.where(centred * slope + bias > 0, dy, 0) if relu else dy


def _affine_grads(
    x: jax.Array, dy: jax.Array, mean: jax.Array, slope: jax.Array, bias: jax.Array, relu: bool
) -> tuple[jax.Array, jax.Array]:
    """Sums dy, masked by the ReLU if there is one, and its products with x - mean: (C,) each."""
    centred = x - mean
    dy = _relu_grad(centred, dy.astype(centred.dtype), slope, bias, relu)
    return dy.sum((0, 1, 2)), (dy * centred).sum((0, 1, 2))


# If this were fused, XLA's CPU backend would write all that it sums to memory, as float32.
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
    """`_affine_grads` summed over chunks, in one pass over x and dy: (pixels, 2, C)."""
    first, second = (jnp.asarray(row, x.dtype)[:, None] for row in np.eye(2))

    def chunk_terms(x: jax.Array, dy: jax.Array) -> jax.Array:
        centred = x[:, None] - mean
        return _relu_grad(centred, dy[:, None], slope, bias, relu) * (first + second * centred)

    terms = [chunk_terms(*chunks) for chunks in zip(_chunks(x), _chunks(dy), strict=True)]
    return sum(terms[1:], terms[0])


# Nine parameters: the arrays of one pass over memory.
@partial(materialize_on_cpu, static_argnums=8)
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
    """Gradient with respect to x of (x - mean) * slope, including the terms that flow through mean and variance."""
    centred = x - mean
    dy = _relu_grad(centred, dy.astype(centred.dtype), slope, bias, relu)
    common = mean_grad + centred * var_grad
    if weights is not None:
        common *= weights.astype(common.dtype)[:, None, None, None]
    return (slope * (dy - common)).astype(x.dtype)


batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)
