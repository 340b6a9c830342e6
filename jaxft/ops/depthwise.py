"""Depthwise convolutions in the fastest formulation. Arrays are NHWC, kernels (size, size, 1, C)."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxft.ops import onednn
from jaxft.ops.conv_plain import plain_conv
from jaxft.ops.elementwise import sum_pixels
from jaxft.ops.formulation import Formulation, on_cpu
from jaxft.ops.fusion import materialize

# NOTES: Depthwise convolutions (docs/notes/cpu-kernels.md)
_LARGE_MAP = 28 * 28  # pixels; kernel gradients of larger maps are computed image by image, of others at once


def depthwise_conv(
    x: jax.Array, kernel: jax.Array, formulation: Formulation = "plain", bias: jax.Array | None = None
) -> jax.Array:
    """Convolves each channel with its own kernel of odd size, padded by size // 2 on each side; adds a bias (C,).

    CPUs add the bias in at least float32. Others add it in x's type, so that it can be fused into the convolution.
    """
    if not on_cpu(formulation):
        y = plain_conv(x, kernel, groups=x.shape[-1])
        return y if bias is None else y + bias.astype(y.dtype)
    return _cpu_conv(x, kernel, bias, formulation == "cpu-onednn" and x.dtype in onednn.DTYPES)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cpu_conv(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, by_onednn: bool) -> jax.Array:
    if by_onednn:
        return onednn.depthwise(x, kernel, kernel.shape[0] // 2, bias=bias)
    return _sum_of_taps(_pad(x, kernel.shape[0] // 2), kernel, bias)


def _cpu_conv_fwd(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, by_onednn: bool) -> tuple[jax.Array, tuple]:
    return _cpu_conv(x, kernel, bias, by_onednn), (x, kernel, bias)


def _cpu_conv_bwd(by_onednn: bool, residuals: tuple, dy: jax.Array) -> tuple[jax.Array | None, ...]:
    x, kernel, bias = residuals
    kernel_grad = _onednn_kernel_grad if by_onednn else _kernel_grad
    dkernel = kernel_grad(x, dy, kernel.shape[0]).astype(kernel.dtype)
    dbias = None if bias is None else sum_pixels(dy, formulation="cpu").astype(bias.dtype)
    return _cpu_conv(dy, kernel[::-1, ::-1], None, by_onednn), dkernel, dbias


_cpu_conv.defvjp(_cpu_conv_fwd, _cpu_conv_bwd)


@partial(materialize, static_argnums=1)
def _pad(x: jax.Array, border: int) -> jax.Array:
    """Pads the image, materialised: fused into a sum of taps, each tap would check for the border."""
    return jnp.pad(x, ((0, 0), (border, border), (border, border), (0, 0)))


@materialize
def _sum_of_taps(padded: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Convolves a padded image in one pass, as a sum of shifted images in at least float32. Returns its type."""
    wide = jnp.promote_types(padded.dtype, jnp.float32)
    size = kernel.shape[0]
    height, width = (side - size + 1 for side in padded.shape[1:3])
    y = jnp.zeros((), wide) if bias is None else bias
    for i in range(size):
        for j in range(size):
            y = y + padded[:, i : i + height, j : j + width].astype(wide) * kernel[i, j, 0].astype(wide)
    return y.astype(padded.dtype)


def _kernel_grad(x: jax.Array, dy: jax.Array, size: int) -> jax.Array:
    """Returns the kernel gradient, at least float32, image by image and tap by tap, so that caches hold an image."""
    wide = jnp.promote_types(x.dtype, jnp.float32)

    # If it were fused, XLA's CPU backend would compute product and sum channel by channel.
    @materialize
    def product(padded: jax.Array, dy: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        return lax.dynamic_slice(padded, (i, j, 0), dy.shape).astype(wide) * dy.astype(wide)

    def add_image(total: jax.Array, arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        padded, dy = arrays
        taps = jnp.arange(size * size)
        return total + lax.map(lambda tap: product(padded, dy, tap // size, tap % size).sum((0, 1)), taps), None

    total, _ = lax.scan(add_image, jnp.zeros((size * size, x.shape[-1]), wide), (_pad(x, size // 2), dy))
    return total.reshape(size, size, 1, -1)


def _onednn_kernel_grad(x: jax.Array, dy: jax.Array, size: int) -> jax.Array:
    """Returns the kernel gradient, float32, which is itself a depthwise convolution: of each x with its dy as kernel.

    Large maps are computed image by image, small ones as the channels of a single image, which copies x and dy.
    """
    count, height, width, channels = x.shape
    if height * width > _LARGE_MAP:
        grads = [onednn.depthwise(x[i : i + 1], dy[i, :, :, None], size // 2, jnp.float32) for i in range(count)]
        return sum(grads[1:], grads[0])[0][:, :, None]
    x, dy = (array.transpose(1, 2, 0, 3).reshape(1, height, width, -1) for array in (x, dy))
    grad = onednn.depthwise(x, dy[0][:, :, None], size // 2, jnp.float32)
    return grad.reshape(size, size, count, channels).sum(2, keepdims=True)
