"""The plain convolution, the reference for all others, its gradients as convolutions, and kernel gradients as products.

Arrays are NHWC, kernels HWIO.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# NOTES: Kernel gradient of the stem as one product (docs/notes/cpu-kernels.md)
IMAGE_CHANNELS = 4  # input with at most this many channels is an image


def plain_conv(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    """Convolves with padding of size // 2 on each side, as torch does; SAME pads stride 2 differently."""
    pads = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def plain_input_grad(kernel: jax.Array, dy: jax.Array, shape: tuple[int, ...], stride: int) -> jax.Array:
    """Gradient of `plain_conv`'s input: a convolution of dy, dilated by the stride, with the kernel reversed."""
    size = kernel.shape[0]
    pads = [
        (size - 1 - size // 2, side - 1 - stride * (out - 1) + size // 2)
        for side, out in zip(shape[1:3], dy.shape[1:3], strict=True)
    ]
    return lax.conv_general_dilated(
        dy,
        kernel[::-1, ::-1].transpose(0, 1, 3, 2),
        (1, 1),
        pads,
        lhs_dilation=(stride, stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def plain_kernel_grad(x: jax.Array, dy: jax.Array, stride: int, size: int) -> jax.Array:
    """Gradient of `plain_conv`'s kernel: a convolution of x with dy whose channels are the images."""
    pads = [
        (size // 2, size + stride * (out - 1) - side - size // 2)
        for side, out in zip(x.shape[1:3], dy.shape[1:3], strict=True)
    ]
    gradient = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        (1, 1),
        pads,
        rhs_dilation=(stride, stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return gradient.transpose(1, 2, 0, 3)


Product = Callable[[jax.Array, jax.Array], jax.Array]  # (..., C) and (..., F), summed over all pixels: (C, F)


def kernel_grad_im2col(x: jax.Array, dy: jax.Array, stride: int, size: int, product: Product) -> jax.Array:
    """Kernel gradient as one product of dy with im2col of x, the inputs that each of its pixels reads."""
    height, width = (stride * (side - 1) + 1 for side in dy.shape[1:3])
    pads = (size // 2, size // 2)
    x = jnp.pad(x, ((0, 0), pads, pads, (0, 0)))
    columns = jnp.stack([x[:, :, j : j + width : stride] for j in range(size)], 3)
    windows = jnp.stack([columns[:, i : i + height : stride] for i in range(size)], 3)
    return product(windows.reshape(*dy.shape[:3], -1), dy).reshape(size, size, x.shape[-1], -1)


def kernel_grad_per_tap(x: jax.Array, dy: jax.Array, stride: int, size: int, product: Product) -> jax.Array:
    """Kernel gradient as one product per kernel tap: the inputs it reads times the output gradients it feeds."""

    def matching(offset: int, axis: int) -> tuple[slice, slice]:
        """Along one axis: the pixels of x that the tap reads, and the pixels of dy that it feeds."""
        first = offset - size // 2
        low = max(0, -(first // stride))
        high = min(dy.shape[axis], (x.shape[axis] - 1 - first) // stride + 1)
        return slice(low * stride + first, max((high - 1) * stride + first + 1, 0), stride), slice(low, high)

    def tap(i: int, j: int) -> jax.Array:
        (ys, dys), (xs, dxs) = matching(i, 1), matching(j, 2)
        a, b = x[:, ys, xs], dy[:, dys, dxs]
        return product(a, b) if a.size else jnp.zeros((a.shape[-1], b.shape[-1]), jnp.float32)

    return jnp.stack([jnp.stack([tap(i, j) for j in range(size)]) for i in range(size)])
