"""The plain convolution, the reference for all others, and its gradients as convolutions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

IMAGE_CHANNELS = 4  # channels, at most


WIDE_BYTES = 4  # bytes of a value


def plain_conv(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    """A convolution padded by size // 2 on each side (SAME would pad a stride of 2 unlike torch)."""
    pads = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def plain_input_grad(kernel: jax.Array, dy: jax.Array, shape: tuple[int, ...], stride: int) -> jax.Array:
    """Of `plain_conv`: a convolution of dy, with zeros between its pixels, with the kernel turned around."""
    size = kernel.shape[0]
    pads = [
        (size - 1 - size // 2, side - 1 - stride * (seen - 1) + size // 2)
        for side, seen in zip(shape[1:3], dy.shape[1:3], strict=True)
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
    """Of `plain_conv`: a convolution of x with dy, whose channels are the pictures."""
    pads = [
        (size // 2, size + stride * (seen - 1) - side - size // 2)
        for side, seen in zip(x.shape[1:3], dy.shape[1:3], strict=True)
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


Product = Callable[[jax.Array, jax.Array], jax.Array]


def kernel_grad_im2col(x: jax.Array, dy: jax.Array, stride: int, size: int, product: Product) -> jax.Array:
    """One product, of all that each pixel of dy has seen."""
    height, width = (stride * (side - 1) + 1 for side in dy.shape[1:3])
    pads = (size // 2, size // 2)
    x = jnp.pad(x, ((0, 0), pads, pads, (0, 0)))
    columns = jnp.stack([x[:, :, j : j + width : stride] for j in range(size)], 3)
    windows = jnp.stack([columns[:, i : i + height : stride] for i in range(size)], 3)
    return product(windows.reshape(*dy.shape[:3], -1), dy).reshape(size, size, x.shape[-1], -1)


def kernel_grad_per_tap(x: jax.Array, dy: jax.Array, stride: int, size: int, product: Product) -> jax.Array:
    """A product for each of the kernel's pixels, of what it sees with the gradients of what that went to."""

    def seen(offset: int, axis: int) -> tuple[slice, slice]:
        """Along one side: which of x's pixels, and which of dy's they meet."""
        first = offset - size // 2
        low = max(0, -(first // stride))
        high = min(dy.shape[axis], (x.shape[axis] - 1 - first) // stride + 1)
        return slice(low * stride + first, max((high - 1) * stride + first + 1, 0), stride), slice(low, high)

    def of(i: int, j: int) -> jax.Array:
        (ys, dys), (xs, dxs) = seen(i, 1), seen(j, 2)
        a, b = x[:, ys, xs], dy[:, dys, dxs]
        return product(a, b) if a.size else jnp.zeros((a.shape[-1], b.shape[-1]), jnp.float32)

    return jnp.stack([jnp.stack([of(i, j) for j in range(size)]) for i in range(size)])
