"""A ResNet's convolutions in the formulation that runs fastest: the results of the plain one.

What helps only a CPU is chosen in `conv`, by shape. Arrays are NHWC, kernels HWIO.
"""

from functools import partial

import jax

from jaxft.ops import onednn, winograd
from jaxft.ops.conv_onednn import _forward_by_onednn, _onednn_conv
from jaxft.ops.conv_plain import _PICTURE, _WIDE, _divide_up, plain_conv
from jaxft.ops.conv_xla_cpu import _FULL_BLOCK, _conv_in_loops, _conv_of_blocks, _conv_of_few, _pointwise
from jaxft.ops.elementwise import add, sum_of_pixels, where_positive


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
    return *pull_back(dy), sum_of_pixels(dy).astype(bias.dtype), None if alone else dy


conv_and_add.defvjp(_conv_and_add_fwd, _conv_and_add_bwd)


def _is_winograds(x: jax.Array, kernel: jax.Array, stride: int, by_onednn: bool) -> bool:
    narrow = by_onednn and x.dtype.itemsize < _WIDE  # in which oneDNN is as fast without it
    return kernel.shape[0] == 3 and stride == 1 and not narrow and winograd.pays(x.shape, kernel.shape)


def _winograds_product(x: jax.Array, by_onednn: bool) -> winograd.Product:
    return onednn.product if by_onednn and x.dtype in onednn.DTYPES else winograd.product_by_xla
