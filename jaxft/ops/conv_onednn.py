"""Convolutions by oneDNN's custom calls, and their gradients. Arrays are NHWC, kernels HWIO."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxft.ops import onednn
from jaxft.ops.conv_plain import (
    IMAGE_CHANNELS,
    Product,
    kernel_grad_im2col,
    kernel_grad_per_tap,
    plain_input_grad,
)
from jaxft.ops.formulation import WIDE_BYTES

# NOTES: Kernel gradients as one product of shifted copies (docs/notes/onednn.md)
_SMALL_MAP = 7  # pixels of a side; on maps up to this size, padding is a large part of the work


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def onednn_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`plain_conv` without groups, for float32 and bfloat16."""
    return onednn_forward(x, kernel, stride, onednn.Epilogue())


def onednn_forward(x: jax.Array, kernel: jax.Array, stride: int, epilogue: onednn.Epilogue) -> jax.Array:
    """Convolves and applies the epilogue, without a gradient; a 1x1 convolution is a matrix product."""
    size, features = kernel.shape[0], kernel.shape[-1]
    if size > 1:
        return onednn.convolution(x, kernel, stride, (size // 2, size // 2), epilogue=epilogue)
    x = x[:, ::stride, ::stride]
    if epilogue.shortcut is not None:
        epilogue = epilogue._replace(shortcut=epilogue.shortcut.reshape(-1, features))
    return onednn.matmul(x.reshape(-1, x.shape[-1]), kernel[0, 0], epilogue=epilogue).reshape(*x.shape[:-1], features)


def _onednn_conv_fwd(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return onednn_conv(x, kernel, stride), (x, kernel)


# NOTES: Input gradients by oneDNN (docs/notes/onednn.md)
def _onednn_conv_bwd(stride: int, residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    size = kernel.shape[0]
    if size == 1:
        dx = _pointwise_input_grad(kernel, dy, x.shape, stride)
    elif stride == 1:
        dx = onednn.convolution(dy, kernel[::-1, ::-1], 1, (size // 2, size // 2), transposed=True)
    elif size == 3:
        dx = _strided_input_grad(kernel, dy)[:, : x.shape[1], : x.shape[2]]
    else:  # the stem, whose input is the image
        dx = plain_input_grad(kernel, dy, x.shape, stride)
    return dx, _kernel_grad(x, dy, stride, size).astype(kernel.dtype)


onednn_conv.defvjp(_onednn_conv_fwd, _onednn_conv_bwd)


def _pointwise_input_grad(kernel: jax.Array, dy: jax.Array, shape: tuple[int, ...], stride: int) -> jax.Array:
    """Gradient of a 1x1 convolution's input of this shape: zero at the pixels that the stride skips."""
    dx = onednn.matmul(dy.reshape(-1, dy.shape[-1]), kernel[0, 0], transpose_b=True).reshape(*dy.shape[:-1], -1)
    pads = [(0, side - 1 - stride * (out - 1), stride - 1) for side, out in zip(shape[1:3], dy.shape[1:3], strict=True)]
    return lax.pad(dx, jnp.zeros((), dx.dtype), ((0, 0, 0), *pads, (0, 0, 0))) if stride > 1 else dx


def _strided_input_grad(kernel: jax.Array, dy: jax.Array) -> jax.Array:
    """Gradient of the input of a 3x3 convolution with stride 2, as four convolutions.

    There is one for each position in a block of 2x2 pixels. It reads the kernel's middle tap, two opposite taps, or the
    four corners.
    """
    batch, height, width, _ = dy.shape

    def at(row: int, column: int) -> jax.Array:
        taps = kernel[::-2] if row else kernel[1:2]
        taps = taps[:, ::-2] if column else taps[:, 1:2]
        return onednn.convolution(dy, taps, 1, (0, 0), extra=(row, column), transposed=True)

    rows = [jnp.stack([at(row, 0), at(row, 1)], 3) for row in (0, 1)]  # (N, H, W, 2, C)
    return jnp.stack(rows, 2).reshape(batch, 2 * height, 2 * width, -1)


def _kernel_grad(x: jax.Array, dy: jax.Array, stride: int, size: int) -> jax.Array:
    """Kernel gradient, float32 (size, size, C, F), as matrix products, because oneDNN's custom calls lack it.

    Their operands are copied as unsigned integers, because XLA's CPU backend copies bfloat16 through
    float32.
    """
    dtype, bits = x.dtype, jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    x, dy = lax.bitcast_convert_type(x, bits), lax.bitcast_convert_type(dy, bits)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        pixels = a.size // a.shape[-1]
        # NOTES: Bfloat16 kernel gradients in two halves (docs/notes/onednn.md)
        few_results = dtype.itemsize < WIDE_BYTES and a.shape[-1] * b.shape[-1] <= 2 * pixels
        halves = math.gcd(pixels, 2) if few_results else 1
        a, b = (lax.bitcast_convert_type(array.reshape(halves, -1, array.shape[-1]), dtype) for array in (a, b))
        return onednn.matmul(a, b, transpose_a=True).sum(0)

    if size > 1 and x.shape[-1] <= IMAGE_CHANNELS:
        return kernel_grad_im2col(x, dy, stride, size, product)
    if stride == 1 and size > 1 and min(dy.shape[1:3]) > _SMALL_MAP:
        return _kernel_grad_shifted(x, dy, size, product)
    return kernel_grad_per_tap(x, dy, stride, size, product)


def _kernel_grad_shifted(x: jax.Array, dy: jax.Array, size: int, product: Product) -> jax.Array:
    """Kernel gradient as one product: x shifted along its rows times dy shifted along its columns.

    Each pair of shifts is one kernel tap.
    """
    shifts = range(-(size // 2), size - size // 2)

    def shifted(array: jax.Array, axis: int, by: int) -> jax.Array:
        pads = [(0, 0, 0)] * 4
        pads[axis] = (by, -by, 0)
        return lax.pad(array, jnp.zeros((), array.dtype), pads)

    all_x = jnp.stack([shifted(x, 2, -j) for j in shifts], 3).reshape(*x.shape[:3], -1)
    all_dy = jnp.stack([shifted(dy, 1, i) for i in shifts], 3).reshape(*x.shape[:3], -1)
    gradient = product(all_x, all_dy).reshape(size, x.shape[-1], size, dy.shape[-1])
    return gradient.transpose(2, 0, 1, 3)
