"""The arithmetic of a ResNet's layers in the formulation that runs fastest: the results of the plain ones.

What helps only XLA's CPU backend is chosen in `conv`, by shape. Arrays are NHWC, kernels HWIO.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata


def unfused(function: Callable[..., Any], static_argnums: int | None = None) -> Callable[..., Any]:
    """Its results are computed once and kept, where XLA on a CPU would compute them again for each use of them.

    (An optimization_barrier is gone by the time XLA's CPU backend fuses.)
    """
    call = jax.jit(function, static_argnums=static_argnums)

    @wraps(function)
    def call_apart(*arguments: Any) -> Any:
        if jax.default_backend() != "cpu":
            return function(*arguments)
        with set_xla_metadata(inlineable="false"):
            return call(*arguments)

    return call_apart


def plain_conv(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    """A convolution padded by size // 2 on each side (SAME would pad a stride of 2 unlike torch)."""
    pads = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    """`plain_conv`, as one of the formulations below where that is faster."""
    height, width, channels = x.shape[1:]
    size = kernel.shape[0]
    if jax.default_backend() != "cpu" or groups > 1:
        return plain_conv(x, kernel, stride, groups)
    if size == 1:
        return _pointwise(x, kernel, stride)
    if _divide_up(height, stride) * _divide_up(width, stride) <= 4:
        return _conv_of_few(x, kernel, stride)
    if stride == 2 and channels <= 4:
        return _conv_of_blocks(x, kernel)
    return plain_conv(x, kernel, stride)


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def _pointwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A 1x1 convolution as a matrix product."""
    x = x[:, ::stride, ::stride]
    return _product(x.reshape(-1, x.shape[-1]), kernel[0, 0]).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Of matrices (pixels, channels) and (channels, features)."""
    return _dot(x, kernel)


def _product_fwd(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dot(x, kernel), (x, kernel)


def _product_bwd(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    # The smaller is transposed: that is dear.
    kernel_gradient = _transposed_dot(x, dy) if x.shape[1] <= dy.shape[1] else _transposed_dot(dy, x).T
    return _dot(dy, kernel.T), kernel_gradient


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b, summed in float32 at least: for that XLA on a CPU has products of bfloat16; for others it widens both."""
    return jnp.dot(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32)).astype(a.dtype)


@unfused
def _transposed_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a.T @ b, apart from how they came about and what becomes of it, or XLA transposes the other one, or both."""
    return _dot(a.T, b)


_product.defvjp(_product_fwd, _product_bwd)


def _conv_of_few(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A convolution with few pixels to compute: a matrix product for each, of the pixels that it sees."""
    batch, height, width, _ = x.shape
    size, features = kernel.shape[0], kernel.shape[-1]

    def seen(position: int, side: int) -> tuple[slice, slice]:
        first = position * stride - size // 2
        low, high = max(first, 0), min(first + size, side)
        return slice(low, high), slice(low - first, high - first)

    rows = []
    for i in range(_divide_up(height, stride)):
        row = []
        for j in range(_divide_up(width, stride)):
            (ys, kernel_ys), (xs, kernel_xs) = seen(i, height), seen(j, width)
            row.append(_dot(x[:, ys, xs].reshape(batch, -1), kernel[kernel_ys, kernel_xs].reshape(-1, features)))
        rows.append(jnp.stack(row, 1))
    return jnp.stack(rows, 1)


@jax.custom_vjp
def _conv_of_blocks(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution of stride 2 on few channels: one of stride 1 on blocks of 2x2 pixels."""
    batch, height, width, channels = x.shape
    size, features = kernel.shape[0], kernel.shape[-1]
    blocks = (size + 1) // 2
    out_height, out_width = _divide_up(height, 2), _divide_up(width, 2)
    pads = [
        (size // 2, 2 * (out + blocks - 1) - size // 2 - side)
        for out, side in ((out_height, height), (out_width, width))
    ]
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    x = x.reshape(batch, out_height + blocks - 1, 2, out_width + blocks - 1, 2, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, out_height + blocks - 1, out_width + blocks - 1, 4 * channels)
    kernel = jnp.pad(kernel, ((0, 2 * blocks - size), (0, 2 * blocks - size), (0, 0), (0, 0)))
    kernel = kernel.reshape(blocks, 2, blocks, 2, channels, features).transpose(0, 2, 1, 3, 4, 5)
    kernel = kernel.reshape(blocks, blocks, 4 * channels, features)
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _conv_of_blocks_fwd(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _conv_of_blocks(x, kernel), (x, kernel)


def _conv_of_blocks_bwd(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients are faster in the plain formulation."""
    return jax.vjp(partial(plain_conv, stride=2), *residuals)[1](dy)


_conv_of_blocks.defvjp(_conv_of_blocks_fwd, _conv_of_blocks_bwd)


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Of 3x3 pixels with stride 2, padded by one pixel of -inf. The gradient goes to the first of equals."""
    return _max_pool(x)[0]


@unfused
def _max_pool(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maxima, and where in its window each was: 0..8."""
    height, width = (_divide_up(side, 2) for side in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    windows = [x[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2] for i in range(3) for j in range(3)]
    largest, place = windows[0], jnp.zeros(windows[0].shape, jnp.uint8)
    for k, window in enumerate(windows[1:], 1):
        place = jnp.where(window > largest, jnp.uint8(k), place)
        largest = jnp.maximum(largest, window)
    return largest, place


def _max_pool_fwd(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    largest, place = _max_pool(x)
    return largest, (place, jnp.empty((0, *x.shape[1:3]), x.dtype))


def _max_pool_bwd(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    """XLA's own (select and scatter) takes 30 times as long on a CPU."""
    place, like = residuals
    return (_max_pool_gradient(place, like, dy),)


@unfused
def _max_pool_gradient(place: jax.Array, like: jax.Array, dy: jax.Array) -> jax.Array:
    _, height, width = like.shape
    batch, out_height, _, channels = dy.shape
    zero = jnp.zeros((), dy.dtype)

    def share(i: int) -> jax.Array:
        """Of a window's row i, spread over the columns."""
        columns = [
            lax.pad(jnp.where(place == 3 * i + j, dy, zero), zero, ((0, 0, 0), (0, 0, 0), (j, 2 - j, 1), (0, 0, 0)))
            for j in range(3)
        ]
        return sum(columns[1:], columns[0])[:, :, 1 : width + 1]

    above = jnp.pad(share(0)[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))  # the next window's first row
    rows = jnp.stack([share(1), share(2) + above], 2)
    return rows.reshape(batch, 2 * out_height, width, channels)[:, :height]


max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def batch_norm(
    x: jax.Array,
    shortcut: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    weights: jax.Array | None,
    epsilon: float,
    relu: bool,
    axis_name: str | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """x normalised by its own statistics, scaled and shifted; then, if asked, `shortcut` added and a ReLU.

    Also returns the statistics: mean and biased variance (C,) and the number of values that went into each, in at
    least float32 and in two passes: E[x^2] - E[x]^2 would cancel where the mean is large. No gradient flows through
    these. weights: (N,), 0 leaves a picture out of the statistics. axis_name: of the devices over which to take
    them, if not of this one alone.
    """
    return _batch_norm_fwd(x, shortcut, scale, bias, weights, epsilon, relu, axis_name)[0]


def _batch_norm_fwd(
    x: jax.Array,
    shortcut: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    weights: jax.Array | None,
    epsilon: float,
    relu: bool,
    axis_name: str | None,
) -> tuple:
    mean, var, count = _statistics(x, weights, axis_name)
    inverse = lax.rsqrt(var + epsilon)
    y = normalize(x, mean, scale * inverse, bias, shortcut, relu)
    # Of what the ReLU let through, y tells where there is a shortcut; else x does, which is read anyway.
    kept = y if relu and shortcut is not None else None
    return (y, (mean, var, count)), (x, kept, shortcut is None, scale, bias, weights, mean, inverse, count)


def _statistics(
    x: jax.Array, weights: jax.Array | None, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    pixels = x.shape[1] * x.shape[2]
    if weights is None:
        count = sum_over_devices(jnp.asarray(x.shape[0] * pixels, x.dtype), axis_name)
    else:
        weights = weights.astype(x.dtype)
        count = sum_over_devices(weights.sum() * pixels, axis_name)

    def mean_of(a: jax.Array) -> jax.Array:
        of_pictures = a.sum((1, 2))  # first, which is more exact too
        if weights is not None:
            of_pictures *= weights[:, None]
        return sum_over_devices(of_pictures.sum(0), axis_name) / jnp.maximum(count, 1)

    mean = mean_of(x)
    return mean, mean_of(jnp.square(x - mean)), count


@partial(unfused, static_argnums=5)
def normalize(
    x: jax.Array, mean: jax.Array, slope: jax.Array, bias: jax.Array, shortcut: jax.Array | None, relu: bool
) -> jax.Array:
    """(x - mean) * slope + bias, in at least float32; then, if asked, `shortcut` added and a ReLU."""
    y = (x - mean) * slope + bias
    if shortcut is not None:
        y = y + shortcut
    return (jnp.maximum(y, 0) if relu else y).astype(x.dtype)


def _batch_norm_bwd(epsilon: float, relu: bool, axis_name: str | None, residuals: tuple, cotangents: tuple) -> tuple:
    x, y, alone, scale, bias, weights, mean, inverse, count = residuals
    dy = cotangents[0]
    slope = scale * inverse
    if y is not None:
        dy = _where_positive(y, dy)
    relu = relu and y is None
    dbias, dslope = _affine_gradients(x, dy, mean, slope, bias, relu)
    divisor = jnp.maximum(count, 1)
    through_mean = sum_over_devices(dbias, axis_name) / divisor
    through_var = sum_over_devices(dslope, axis_name) * jnp.square(inverse) / divisor
    dx = _normalize_gradient(x, dy, mean, slope, bias, weights, through_mean, through_var, relu)
    return dx, None if alone else dy, dslope * inverse, dbias, None


@unfused
def _where_positive(y: jax.Array, dy: jax.Array) -> jax.Array:
    return jnp.where(y > 0, dy, 0)


def _behind_relu(centred: jax.Array, dy: jax.Array, slope: jax.Array, bias: jax.Array, relu: bool) -> jax.Array:
    return jnp.where(centred * slope + bias > 0, dy, 0) if relu else dy


@partial(unfused, static_argnums=5)
def _affine_gradients(
    x: jax.Array, dy: jax.Array, mean: jax.Array, slope: jax.Array, bias: jax.Array, relu: bool
) -> tuple[jax.Array, jax.Array]:
    centred = x - mean
    dy = _behind_relu(centred, dy.astype(centred.dtype), slope, bias, relu)
    return dy.sum((0, 1, 2)), (dy * centred).sum((0, 1, 2))


@partial(unfused, static_argnums=8)
def _normalize_gradient(
    x: jax.Array,
    dy: jax.Array,
    mean: jax.Array,
    slope: jax.Array,
    bias: jax.Array,
    weights: jax.Array | None,
    through_mean: jax.Array,
    through_var: jax.Array,
    relu: bool,
) -> jax.Array:
    centred = x - mean
    dy = _behind_relu(centred, dy.astype(centred.dtype), slope, bias, relu)
    common = through_mean + centred * through_var
    if weights is not None:
        common *= weights.astype(common.dtype)[:, None, None, None]
    return (slope * (dy - common)).astype(x.dtype)


def sum_over_devices(tree: Any, axis_name: str | None) -> Any:
    """psum, but for one device, for which XLA on a CPU would copy everything."""
    return tree if axis_name is None or lax.axis_size(axis_name) == 1 else lax.psum(tree, axis_name)


batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)
