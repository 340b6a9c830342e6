"""A ResNet's convolutions in the formulation that runs fastest: the results of the plain one.

What helps only a CPU is chosen in `conv`, by shape. Arrays are NHWC, kernels HWIO.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxft import layers, onednn, winograd
from jaxft.unfused import unfused

_PICTURE = 4  # channels, at most
_SMALL_MAP = 7  # pixels of a side, up to which padding is a good part of the work
_WIDE = 4  # bytes of a value
_FULL_BLOCK = 64  # features, of which XLA's CPU kernels compute so many at once


def plain_conv(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    """A convolution padded by size // 2 on each side (SAME would pad a stride of 2 unlike torch)."""
    pads = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1, by_onednn: bool = False) -> jax.Array:
    """`plain_conv`, as one of the formulations below where that is faster."""
    height, width, channels = x.shape[1:]
    size, features = kernel.shape[0], kernel.shape[-1]
    if jax.default_backend() != "cpu" or groups > 1:
        return plain_conv(x, kernel, stride, groups)
    if _is_winograds(x, kernel, stride, by_onednn):
        return winograd.winograd_conv(x, kernel, _winograds_product(x, by_onednn))
    if by_onednn and x.dtype in onednn.DTYPES:
        return _onednn_conv(x, kernel, stride)
    if size == 1:
        return _pointwise(x, kernel, stride)
    if _divide_up(height, stride) * _divide_up(width, stride) <= 4:
        return _conv_of_few(x, kernel, stride)
    if stride == 2 and channels <= _PICTURE and features < _FULL_BLOCK:
        return _conv_of_blocks(x, kernel)
    return _conv_in_loops(x, kernel, stride)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def conv_and_add(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    shortcut: jax.Array | None,
    relu: bool,
    stride: int = 1,
    groups: int = 1,
    by_onednn: bool = False,
) -> jax.Array:
    """`conv`, then `bias` (F,) and `shortcut`, if any, added, and a ReLU if asked; the result alone is kept."""
    if jax.default_backend() == "cpu" and groups == 1:
        wide = x.dtype.itemsize >= _WIDE  # in which a shortcut takes a pass of its own as well
        if _is_winograds(x, kernel, stride, by_onednn):
            if shortcut is None:
                product = _winograds_product(x, by_onednn)
                return winograd.winograd_conv_and_add(x, kernel, bias, relu, product)
        elif by_onednn and x.dtype in onednn.DTYPES and (shortcut is None or not wide):
            return _forward_by_onednn(x, kernel, stride, onednn.Then(bias, shortcut, relu))
    return layers.add(conv(x, kernel, stride, groups, by_onednn), bias, shortcut, relu)


def _conv_and_add_fwd(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    shortcut: jax.Array | None,
    relu: bool,
    stride: int,
    groups: int,
    by_onednn: bool,
) -> tuple[jax.Array, tuple]:
    y = conv_and_add(x, kernel, bias, shortcut, relu, stride, groups, by_onednn)
    return y, (x, kernel, bias, shortcut is None, y if relu else None)


def _conv_and_add_bwd(
    relu: bool, stride: int, groups: int, by_onednn: bool, residuals: tuple, dy: jax.Array
) -> tuple[jax.Array | None, ...]:
    x, kernel, bias, alone, y = residuals
    if relu:
        dy = layers.where_positive(y, dy)
    _, pull_back = jax.vjp(lambda x, kernel: conv(x, kernel, stride, groups, by_onednn), x, kernel)
    return *pull_back(dy), layers.sum_of_pixels(dy).astype(bias.dtype), None if alone else dy


conv_and_add.defvjp(_conv_and_add_fwd, _conv_and_add_bwd)


def _is_winograds(x: jax.Array, kernel: jax.Array, stride: int, by_onednn: bool) -> bool:
    narrow = by_onednn and x.dtype.itemsize < _WIDE  # in which oneDNN is as fast without it
    return kernel.shape[0] == 3 and stride == 1 and not narrow and winograd.pays(x.shape, kernel.shape)


def _winograds_product(x: jax.Array, by_onednn: bool) -> winograd.Product:
    return onednn.product if by_onednn and x.dtype in onednn.DTYPES else winograd.product_by_xla


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
    x, kernel = residuals
    return _plain_input_gradient(kernel, dy, x.shape, 2), _plain_kernel_gradient(x, dy, 2, kernel.shape[0])


_conv_of_blocks.defvjp(_conv_of_blocks_fwd, _conv_of_blocks_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_in_loops(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`plain_conv` whose gradients are of NHWC and HWIO too: others XLA on a CPU makes such outside of loops alone."""
    return plain_conv(x, kernel, stride)


def _conv_in_loops_fwd(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return plain_conv(x, kernel, stride), (x, kernel)


def _conv_in_loops_bwd(
    stride: int, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    size = kernel.shape[0]

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return _transposed_dot(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))

    if x.shape[-1] <= _PICTURE:
        kernel_gradient = _gradient_by_windows(x, dy, stride, size, product)
    elif stride == 2 and size == 3:
        kernel_gradient = _gradient_by_pixels(x, dy, stride, size, product)
    else:
        kernel_gradient = _plain_kernel_gradient(x, dy, stride, size)
    return _plain_input_gradient(kernel, dy, x.shape, stride), kernel_gradient.astype(kernel.dtype)


_conv_in_loops.defvjp(_conv_in_loops_fwd, _conv_in_loops_bwd)


def _plain_input_gradient(kernel: jax.Array, dy: jax.Array, shape: tuple[int, ...], stride: int) -> jax.Array:
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


def _plain_kernel_gradient(x: jax.Array, dy: jax.Array, stride: int, size: int) -> jax.Array:
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


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _onednn_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`plain_conv` without groups, for float32 and bfloat16."""
    return _forward_by_onednn(x, kernel, stride, onednn.Then())


def _forward_by_onednn(x: jax.Array, kernel: jax.Array, stride: int, then: onednn.Then) -> jax.Array:
    size, features = kernel.shape[0], kernel.shape[-1]
    if size > 1:
        return onednn.convolution(x, kernel, stride, (size // 2, size // 2), then=then)
    x = x[:, ::stride, ::stride]
    if then.shortcut is not None:
        then = then._replace(shortcut=then.shortcut.reshape(-1, features))
    return onednn.product(x.reshape(-1, x.shape[-1]), kernel[0, 0], then=then).reshape(*x.shape[:-1], features)


def _onednn_conv_fwd(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _onednn_conv(x, kernel, stride), (x, kernel)


def _onednn_conv_bwd(stride: int, residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    size = kernel.shape[0]
    if size == 1:
        dx = _pointwise_input_gradient(kernel, dy, x.shape, stride)
    elif stride == 1:
        dx = onednn.convolution(dy, kernel[::-1, ::-1], 1, (size // 2, size // 2), transposed=True)
    elif size == 3:
        dx = _strided_input_gradient(kernel, dy)[:, : x.shape[1], : x.shape[2]]
    else:  # the stem's, of pictures
        dx = _plain_input_gradient(kernel, dy, x.shape, stride)
    return dx, _kernel_gradient(x, dy, stride, size).astype(kernel.dtype)


_onednn_conv.defvjp(_onednn_conv_fwd, _onednn_conv_bwd)


def _pointwise_input_gradient(kernel: jax.Array, dy: jax.Array, shape: tuple[int, ...], stride: int) -> jax.Array:
    dx = onednn.product(dy.reshape(-1, dy.shape[-1]), kernel[0, 0], transpose_b=True).reshape(*dy.shape[:-1], -1)
    between = [
        (0, side - 1 - stride * (seen - 1), stride - 1) for side, seen in zip(shape[1:3], dy.shape[1:3], strict=True)
    ]
    return lax.pad(dx, jnp.zeros((), dx.dtype), ((0, 0, 0), *between, (0, 0, 0))) if stride > 1 else dx


def _strided_input_gradient(kernel: jax.Array, dy: jax.Array) -> jax.Array:
    """Of a 3x3 convolution with stride 2: each 2x2 pixels see the kernel's middle, two corners of a side, or four."""
    batch, height, width, _ = dy.shape

    def of(row: int, column: int) -> jax.Array:
        seen = kernel[::-2] if row else kernel[1:2]
        seen = seen[:, ::-2] if column else seen[:, 1:2]
        return onednn.convolution(dy, seen, 1, (0, 0), extra=(row, column), transposed=True)

    rows = [jnp.stack([of(row, 0), of(row, 1)], 3) for row in (0, 1)]  # (N, H, W, 2, C)
    return jnp.stack(rows, 2).reshape(batch, 2 * height, 2 * width, -1)


def _kernel_gradient(x: jax.Array, dy: jax.Array, stride: int, size: int) -> jax.Array:
    """Of products, as oneDNN has no other way to it: in float32, (size, size, C, F).

    They are of copies, made as bits, for XLA on a CPU copies bfloat16 by way of float32.
    """
    dtype, bits = x.dtype, jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    x, dy = lax.bitcast_convert_type(x, bits), lax.bitcast_convert_type(dy, bits)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        """Summed over all pixels: (C, F) of (..., C) and (..., F)."""
        pixels = a.size // a.shape[-1]
        few = dtype.itemsize < _WIDE and a.shape[-1] * b.shape[-1] <= 2 * pixels
        parts = math.gcd(pixels, 2) if few else 1  # of many pixels for few results, which takes longer at once
        a, b = (lax.bitcast_convert_type(array.reshape(parts, -1, array.shape[-1]), dtype) for array in (a, b))
        return onednn.product(a, b, transpose_a=True).sum(0)

    if size > 1 and x.shape[-1] <= _PICTURE:
        return _gradient_by_windows(x, dy, stride, size, product)
    if stride == 1 and size > 1 and min(dy.shape[1:3]) > _SMALL_MAP:
        return _gradient_by_shifts(x, dy, size, product)
    return _gradient_by_pixels(x, dy, stride, size, product)


Product = Callable[[jax.Array, jax.Array], jax.Array]


def _gradient_by_windows(x: jax.Array, dy: jax.Array, stride: int, size: int, product: Product) -> jax.Array:
    """One product, of all that each pixel of dy has seen."""
    height, width = (stride * (side - 1) + 1 for side in dy.shape[1:3])
    pads = (size // 2, size // 2)
    x = jnp.pad(x, ((0, 0), pads, pads, (0, 0)))
    columns = jnp.stack([x[:, :, j : j + width : stride] for j in range(size)], 3)
    windows = jnp.stack([columns[:, i : i + height : stride] for i in range(size)], 3)
    return product(windows.reshape(*dy.shape[:3], -1), dy).reshape(size, size, x.shape[-1], -1)


def _gradient_by_shifts(x: jax.Array, dy: jax.Array, size: int, product: Product) -> jax.Array:
    """One product, of x shifted along its rows with dy shifted along its columns: each pair a pixel of the kernel."""
    shifts = range(-(size // 2), size - size // 2)

    def shifted(array: jax.Array, axis: int, by: int) -> jax.Array:
        pads = [(0, 0, 0)] * 4
        pads[axis] = (by, -by, 0)
        return lax.pad(array, jnp.zeros((), array.dtype), pads)

    all_x = jnp.stack([shifted(x, 2, -j) for j in shifts], 3).reshape(*x.shape[:3], -1)
    all_dy = jnp.stack([shifted(dy, 1, i) for i in shifts], 3).reshape(*x.shape[:3], -1)
    gradient = product(all_x, all_dy).reshape(size, x.shape[-1], size, dy.shape[-1])
    return gradient.transpose(2, 0, 1, 3)


def _gradient_by_pixels(x: jax.Array, dy: jax.Array, stride: int, size: int, product: Product) -> jax.Array:
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
