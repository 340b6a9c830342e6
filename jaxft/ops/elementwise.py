"""Elementwise operations and reductions that XLA must not fuse into their consumers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxft.ops.fusion import materialize

WIDE_BYTES = 4  # bytes of a value, from which a CPU takes sums in parts


# Apart, or XLA on a CPU keeps a bfloat16 x as float32 too.
@materialize
def sum_pixels(x: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    return sum_per_channel(x.astype(jnp.promote_types(x.dtype, jnp.float32)), weights)


def sum_per_channel(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    of_pictures = x.sum((1, 2))  # first, which is more exact too
    return (of_pictures if weights is None else of_pictures * weights[:, None]).sum(0)


@partial(materialize, static_argnums=3)
def add(x: jax.Array, bias: jax.Array, shortcut: jax.Array | None, relu: bool) -> jax.Array:
    """x + bias, in at least float32 on a CPU; then, if asked, `shortcut` added and a ReLU.

    On accelerators in x's type, or a GPU's cuDNN would not do it within the convolution before it.
    """
    if jax.default_backend() != "cpu":
        bias = bias.astype(x.dtype)
    return add_and_relu(x + bias, shortcut, relu).astype(x.dtype)


def add_and_relu(x: jax.Array, shortcut: jax.Array | None, relu: bool) -> jax.Array:
    if shortcut is not None:
        x = x + shortcut
    return jnp.maximum(x, 0) if relu else x


@materialize
def where_positive(y: jax.Array, dy: jax.Array) -> jax.Array:
    return jnp.where(y > 0, dy, 0)


@jax.custom_vjp
def scale_kernel(kernel: jax.Array, slope: jax.Array) -> jax.Array:
    """(height, width, C, F) by (F,)"""
    return kernel * slope


def _scale_kernel_fwd(kernel: jax.Array, slope: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return kernel * slope, (kernel, slope)


def _scale_kernel_bwd(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    kernel, slope = residuals
    return gradient * slope, _product(gradient, kernel).sum((0, 1, 2))


scale_kernel.defvjp(_scale_kernel_fwd, _scale_kernel_bwd)


# Apart, or XLA on a CPU leaves product and sum to YNNPACK, which takes a hundred times as long.
@materialize
def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return a * b


def sum_over_devices(tree: Any, axis_name: str | None) -> Any:
    """psum, but for one device, for which XLA on a CPU would copy everything."""
    return tree if axis_name is None or lax.axis_size(axis_name) == 1 else lax.psum(tree, axis_name)
