"""Convolutions in formulations that XLA's CPU backend compiles to fast code. Arrays are NHWC, kernels HWIO."""

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

# NOTES: Space-to-depth for a narrow stem (docs/notes/cpu-kernels.md)
FULL_BLOCK = 64  # features that XLA's CPU kernels compute at once


def pointwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Computes a 1x1 convolution as a matrix product."""
    x = x[:, ::stride, ::stride]
    return product(x.reshape(-1, x.shape[-1]), kernel[0, 0]).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies (pixels, channels) by (channels, features)."""
    return _dot(x, kernel)


def _product_fwd(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dot(x, kernel), (x, kernel)


def _product_bwd(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    # NOTES: Kernel gradients of 1x1 convolutions (docs/notes/cpu-kernels.md). Transposes are expensive, so the smaller
    # operand is transposed.
    kernel_gradient = _transposed_dot(x, dy) if x.shape[1] <= dy.shape[1] else _transposed_dot(dy, x).T
    return _dot(dy, kernel.T), kernel_gradient


# NOTES: Products of bfloat16 with a float32 result (docs/notes/cpu-kernels.md)
def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b accumulated in at least float32.

    XLA's CPU backend has bfloat16 kernels only with a float32 result; otherwise it upcasts both operands.
    """
    return jnp.dot(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32)).astype(a.dtype)


@materialize
def _transposed_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a.T @ b, materialised: if it were fused, XLA would transpose the wrong operand or both."""
    return _dot(a.T, b)


product.defvjp(_product_fwd, _product_bwd)


def conv_small_output(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Computes a convolution with few output pixels as one matrix product per pixel, of the inputs that it reads."""
    batch, height, width, _ = x.shape
    size, features = kernel.shape[0], kernel.shape[-1]

    def window(position: int, side: int) -> tuple[slice, slice]:
        """Along one axis: the pixels of x within the window, and the part of the kernel on them."""
        first = position * stride - size // 2
        low, high = max(first, 0), min(first + size, side)
        return slice(low, high), slice(low - first, high - first)

    rows = []
    for i in range(ceil_div(height, stride)):
        row = []
        for j in range(ceil_div(width, stride)):
            (ys, kernel_ys), (xs, kernel_xs) = window(i, height), window(j, width)
            row.append(_dot(x[:, ys, xs].reshape(batch, -1), kernel[kernel_ys, kernel_xs].reshape(-1, features)))
        rows.append(jnp.stack(row, 1))
    return jnp.stack(rows, 1)


@jax.custom_vjp
def conv_space_to_depth(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes a convolution of stride 2 on few channels as one of stride 1 on blocks of 2x2 pixels."""
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
    """Computes the gradients in the plain formulation, which is faster."""
    x, kernel = residuals
    return plain_input_grad(kernel, dy, x.shape, 2), plain_kernel_grad(x, dy, 2, kernel.shape[0])


conv_space_to_depth.defvjp(_conv_space_to_depth_fwd, _conv_space_to_depth_bwd)


# NOTES: Convolutions inside a loop, Kernel gradients of strided 3x3 convolutions (docs/notes/cpu-kernels.md)
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv_nhwc(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`plain_conv` with gradients written as NHWC x HWIO convolutions.

    XLA's CPU backend rewrites other layouts only outside loops; inside one they are about 20 times as slow.
    """
    return plain_conv(x, kernel, stride)


def _conv_nhwc_fwd(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return plain_conv(x, kernel, stride), (x, kernel)


def _conv_nhwc_bwd(stride: int, residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    size = kernel.shape[0]

    def kernel_product(a: jax.Array, b: jax.Array) -> jax.Array:
        return _transposed_dot(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))

    if x.shape[-1] <= IMAGE_CHANNELS:
        kernel_gradient = kernel_grad_im2col(x, dy, stride, size, kernel_product)
    elif stride == 2 and size == 3:
        kernel_gradient = kernel_grad_per_tap(x, dy, stride, size, kernel_product)
    else:
        kernel_gradient = plain_kernel_grad(x, dy, stride, size)
    return plain_input_grad(kernel, dy, x.shape, stride), kernel_gradient.astype(kernel.dtype)


conv_nhwc.defvjp(_conv_nhwc_fwd, _conv_nhwc_bwd)
