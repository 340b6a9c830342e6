"""A ResNet's convolutions in the formulation that runs fastest: the results of the plain one.

What helps only a CPU is chosen in `conv`, by shape. Arrays are NHWC, kernels HWIO.
"""

from functools import partial

import jax

from jaxft.ops import onednn, winograd
from jaxft.ops.conv_onednn import onednn_conv, onednn_forward
from jaxft.ops.conv_plain import IMAGE_CHANNELS, WIDE_BYTES, ceil_div, plain_conv
from jaxft.ops.conv_xla_cpu import _FULL_BLOCK, conv_nhwc, conv_small_output, conv_space_to_depth, pointwise_conv
from jaxft.ops.elementwise import add, sum_pixels, where_positive


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1, by_onednn: bool = False) -> jax.Array:
    """`plain_conv`, as one of the formulations below where that is faster."""
    height, width, channels = x.shape[1:]
    size, features = kernel.shape[0], kernel.shape[-1]
    if jax.default_backend() != "cpu" or groups > 1:
        return plain_conv(x, kernel, stride, groups)
    if _uses_winograd(x, kernel, stride, by_onednn):
        return winograd.winograd_conv(x, kernel, _winograd_matmul(x, by_onednn))
    if by_onednn and x.dtype in onednn.DTYPES:
        return onednn_conv(x, kernel, stride)
    if size == 1:
        return pointwise_conv(x, kernel, stride)
    if ceil_div(height, stride) * ceil_div(width, stride) <= 4:
        return conv_small_output(x, kernel, stride)
    if stride == 2 and channels <= IMAGE_CHANNELS and features < _FULL_BLOCK:
        return conv_space_to_depth(x, kernel)
    return conv_nhwc(x, kernel, stride)


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
        wide = x.dtype.itemsize >= WIDE_BYTES  # in which a shortcut takes a pass of its own as well
        if _uses_winograd(x, kernel, stride, by_onednn):
            if shortcut is None:
                product = _winograd_matmul(x, by_onednn)
                return winograd.winograd_conv_and_add(x, kernel, bias, relu, product)
        elif by_onednn and x.dtype in onednn.DTYPES and (shortcut is None or not wide):
            return onednn_forward(x, kernel, stride, onednn.Epilogue(bias, shortcut, relu))
    return add(conv(x, kernel, stride, groups, by_onednn), bias, shortcut, relu)


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
        dy = where_positive(y, dy)
    _, pull_back = jax.vjp(lambda x, kernel: conv(x, kernel, stride, groups, by_onednn), x, kernel)
    return *pull_back(dy), sum_pixels(dy).astype(bias.dtype), None if alone else dy


conv_and_add.defvjp(_conv_and_add_fwd, _conv_and_add_bwd)


def _uses_winograd(x: jax.Array, kernel: jax.Array, stride: int, by_onednn: bool) -> bool:
    narrow = by_onednn and x.dtype.itemsize < WIDE_BYTES  # in which oneDNN is as fast without it
    return kernel.shape[0] == 3 and stride == 1 and not narrow and winograd.is_profitable(x.shape, kernel.shape)


def _winograd_matmul(x: jax.Array, by_onednn: bool) -> winograd.BatchedMatmul:
    return onednn.matmul if by_onednn and x.dtype in onednn.DTYPES else winograd.xla_matmul
