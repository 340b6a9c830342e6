"""Convolutions in the formulations that XLA's CPU backend compiles to fast code."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxft.ops.conv_plain import (
    IMAGE_CHANNELS,
    ceil_div,
    kernel_grad_im2col,
    kernel_grad_per_tap,
    plain_conv,
    plain_input_grad,
    plain_kernel_grad,
)
from jaxft.ops.fusion import materialize

_FULL_BLOCK = 64  # features, of which XLA's CPU kernels compute so many at once


def pointwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
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


@materialize
def _transposed_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a.T @ b, apart from how they came about and what becomes of it, or XLA transposes the other one, or both."""
    return _dot(a.T, b)


_product.defvjp(_product_fwd, _product_bwd)


def conv_small_output(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A convolution with few pixels to compute: a matrix product for each, of the pixels that it sees."""
    batch, height, width, _ = x.shape
    size, features = kernel.shape[0], kernel.shape[-1]

    def seen(position: int, side: int) -> tuple[slice, slice]:
        first = position * stride - size // 2
        low, high = max(first, 0), min(first + size, side)
        return slice(low, high), slice(low - first, high - first)

    rows = []
    for i in range(ceil_div(height, stride)):
        row = []
        for j in range(ceil_div(width, stride)):
            (ys, kernel_ys), (xs, kernel_xs) = seen(i, height), seen(j, width)
            row.append(_dot(x[:, ys, xs].reshape(batch, -1), kernel[kernel_ys, kernel_xs].reshape(-1, features)))
        rows.append(jnp.stack(row, 1))
    return jnp.stack(rows, 1)


@jax.custom_vjp
def conv_space_to_depth(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution of stride 2 on few channels: one of stride 1 on blocks of 2x2 pixels."""
    batch, height, width, channels = x.shape
    size, features = kernel.shape[0], kernel.shape[-1]
    blocks = (size + 1) // 2
    out_height, out_width = ceil_div(height, 2), ceil_div(width, 2)
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


def _conv_space_to_depth_fwd(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return conv_space_to_depth(x, kernel), (x, kernel)


def _conv_space_to_depth_bwd(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients are faster in the plain formulation."""
    x, kernel = residuals
    return plain_input_grad(kernel, dy, x.shape, 2), plain_kernel_grad(x, dy, 2, kernel.shape[0])


conv_space_to_depth.defvjp(_conv_space_to_depth_fwd, _conv_space_to_depth_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv_nhwc(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`plain_conv` whose gradients are of NHWC and HWIO too: others XLA on a CPU makes such outside of loops alone."""
    return plain_conv(x, kernel, stride)


def _conv_nhwc_fwd(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return plain_conv(x, kernel, stride), (x, kernel)


def _conv_nhwc_bwd(stride: int, residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    size = kernel.shape[0]

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return _transposed_dot(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))

    if x.shape[-1] <= IMAGE_CHANNELS:
        kernel_gradient = kernel_grad_im2col(x, dy, stride, size, product)
    elif stride == 2 and size == 3:
        kernel_gradient = kernel_grad_per_tap(x, dy, stride, size, product)
    else:
        kernel_gradient = plain_kernel_grad(x, dy, stride, size)
    return plain_input_grad(kernel, dy, x.shape, stride), kernel_gradient.astype(kernel.dtype)


conv_nhwc.defvjp(_conv_nhwc_fwd, _conv_nhwc_bwd)
