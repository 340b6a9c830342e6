"""Convolution in the fastest formulation; all formulations equal `plain_conv` up to rounding.

`conv` picks the formulation by platform and, on a CPU, by shape. Arrays are NHWC, kernels HWIO.
"""

from functools import partial

import jax

from jaxft.ops import onednn, winograd
from jaxft.ops.conv_onednn import onednn_conv, onednn_forward
from jaxft.ops.conv_plain import IMAGE_CHANNELS, ceil_div, plain_conv
from jaxft.ops.conv_xla_cpu import FULL_BLOCK, conv_nhwc, conv_small_output, conv_space_to_depth, pointwise_conv
from jaxft.ops.elementwise import add, sum_pixels, where_positive
from jaxft.ops.formulation import WIDE_BYTES, Formulation, on_cpu

# NOTES: Convolutions with at most four output pixels (docs/notes/cpu-kernels.md)
_SMALL_OUTPUT = 4  # pixels


def conv(
    x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1, formulation: Formulation = "plain"
) -> jax.Array:
    """Convolves as `plain_conv` does, on a CPU in the formulation that is fastest for these shapes."""
    height, width, channels = x.shape[1:]
    size, features = kernel.shape[0], kernel.shape[-1]
    if not on_cpu(formulation) or groups > 1:
        return plain_conv(x, kernel, stride, groups)
    if _uses_winograd(x, kernel, stride, formulation):
        return winograd.winograd_conv(x, kernel, _winograd_matmul(x, formulation))
    if _uses_onednn(x, formulation):
        return onednn_conv(x, kernel, stride)
    if size == 1:
        return pointwise_conv(x, kernel, stride)
    if ceil_div(height, stride) * ceil_div(width, stride) <= _SMALL_OUTPUT:
        return conv_small_output(x, kernel, stride)
    if stride == 2 and channels <= IMAGE_CHANNELS and features < FULL_BLOCK:
        return conv_space_to_depth(x, kernel)
    return conv_nhwc(x, kernel, stride)


# Eight parameters, because custom_vjp takes arrays by position and static arguments by their numbers.
@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def conv_and_add(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    shortcut: jax.Array | None,
    relu: bool,
    stride: int = 1,
    groups: int = 1,
    formulation: Formulation = "plain",
) -> jax.Array:
    """Convolves, adds `bias` (F,) and `shortcut`, if any, and applies an optional ReLU.

    Only the result is kept for the backward pass.
    """
    if on_cpu(formulation) and groups == 1:
        wide = x.dtype.itemsize >= WIDE_BYTES  # oneDNN adds a shortcut to wide types in a separate pass
        if _uses_winograd(x, kernel, stride, formulation):
            if shortcut is None:
                matmul = _winograd_matmul(x, formulation)
                return winograd.winograd_conv_and_add(x, kernel, bias, relu, matmul)
        elif _uses_onednn(x, formulation) and (shortcut is None or not wide):
            return onednn_forward(x, kernel, stride, onednn.Epilogue(bias, shortcut, relu))
    return add(conv(x, kernel, stride, groups, formulation), bias, shortcut, relu, formulation)


# Eight parameters: those of `conv_and_add`.
def _conv_and_add_fwd(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    shortcut: jax.Array | None,
    relu: bool,
    stride: int,
    groups: int,
    formulation: Formulation,
) -> tuple[jax.Array, tuple]:
    y = conv_and_add(x, kernel, bias, shortcut, relu, stride, groups, formulation)
    return y, (x, kernel, bias, shortcut is None, y if relu else None)


def _conv_and_add_bwd(
    relu: bool, stride: int, groups: int, formulation: Formulation, residuals: tuple, dy: jax.Array
) -> tuple[jax.Array | None, ...]:
    x, kernel, bias, no_shortcut, y = residuals
    if relu:
        dy = where_positive(y, dy, formulation=formulation)
    _, pull_back = jax.vjp(lambda x, kernel: conv(x, kernel, stride, groups, formulation), x, kernel)
    dx, dkernel = pull_back(dy)
    dbias = sum_pixels(dy, formulation=formulation).astype(bias.dtype)
    return dx, dkernel, dbias, None if no_shortcut else dy


conv_and_add.defvjp(_conv_and_add_fwd, _conv_and_add_bwd)


def _uses_onednn(x: jax.Array, formulation: Formulation) -> bool:
    return formulation == "cpu-onednn" and x.dtype in onednn.DTYPES


def _uses_winograd(x: jax.Array, kernel: jax.Array, stride: int, formulation: Formulation) -> bool:
    # oneDNN's narrow convolutions are as fast without Winograd.
    narrow = formulation == "cpu-onednn" and x.dtype.itemsize < WIDE_BYTES
    return kernel.shape[0] == 3 and stride == 1 and not narrow and winograd.is_profitable(x.shape, kernel.shape)


def _winograd_matmul(x: jax.Array, formulation: Formulation) -> winograd.BatchedMatmul:
    return onednn.matmul if _uses_onednn(x, formulation) else winograd.xla_matmul
