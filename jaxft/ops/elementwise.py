"""Elementwise operations and reductions that XLA must not fuse into their consumers. Arrays are NHWC."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxft.ops.formulation import Formulation, on_cpu
from jaxft.ops.fusion import materialize_on_cpu


# If this were fused, XLA's CPU backend would also keep a bfloat16 x as float32.
@materialize_on_cpu
def sum_pixels(x: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Sums x over images and pixels, in at least float32: (C,). weights: (N,)."""
    return sum_per_channel(x.astype(jnp.promote_types(x.dtype, jnp.float32)), weights)


def sum_per_channel(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Sums x (N, H, W, C) over images and pixels in its own type. weights: (N,)."""
    per_image = x.sum((1, 2))  # pixels first, which is also more exact
    return (per_image if weights is None else per_image * weights[:, None]).sum(0)


def add(
    x: jax.Array, bias: jax.Array, shortcut: jax.Array | None, relu: bool, formulation: Formulation = "plain"
) -> jax.Array:
    """Adds a bias (C,) and a shortcut, if any, and applies an optional ReLU.

    CPUs add the bias in at least float32. Others add it in x's type, so that cuDNN can fuse it into the convolution
    before it.
    """
    # NOTES: Folded BatchNorm on accelerators (docs/notes/accelerators.md)
    if not on_cpu(formulation):
        bias = bias.astype(x.dtype)
    return _add(x, bias, shortcut, relu, formulation=formulation)


@partial(materialize_on_cpu, static_argnums=3)
def _add(x: jax.Array, bias: jax.Array, shortcut: jax.Array | None, relu: bool) -> jax.Array:
    return add_and_relu(x + bias, shortcut, relu).astype(x.dtype)


def add_and_relu(x: jax.Array, shortcut: jax.Array | None, relu: bool) -> jax.Array:
    if shortcut is not None:
        x = x + shortcut
    return jnp.maximum(x, 0) if relu else x


@materialize_on_cpu
def where_positive(y: jax.Array, dy: jax.Array) -> jax.Array:
    """Gradient of a ReLU whose result was y."""
    return jnp.where(y > 0, dy, 0)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def scale_kernel(kernel: jax.Array, slope: jax.Array, formulation: Formulation = "plain") -> jax.Array:
    """Multiplies a kernel (height, width, C, F) by a slope per feature (F,)."""
    return kernel * slope


def _scale_kernel_fwd(
    kernel: jax.Array, slope: jax.Array, formulation: Formulation
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return kernel * slope, (kernel, slope)


def _scale_kernel_bwd(
    formulation: Formulation, residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    kernel, slope = residuals
    return gradient * slope, _product(gradient, kernel, formulation=formulation).sum((0, 1, 2))


scale_kernel.defvjp(_scale_kernel_fwd, _scale_kernel_bwd)


# If this were fused, XLA's CPU backend would leave product and sum to YNNPACK, which takes a hundred times as long.
@materialize_on_cpu
def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return a * b


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def gate_and_add(x: jax.Array, gate: jax.Array, shortcut: jax.Array, formulation: Formulation = "plain") -> jax.Array:
    """Returns relu(x * gate + shortcut) of x and shortcut (N, H, W, C) and a gate (N, C), in x's dtype.

    Computes in the wider of the dtypes of x and gate.
    """
    return _gate_and_add(x, gate, shortcut, formulation=formulation)


@materialize_on_cpu
def _gate_and_add(x: jax.Array, gate: jax.Array, shortcut: jax.Array) -> jax.Array:
    return add_and_relu(x * gate[:, None, None], shortcut, relu=True).astype(x.dtype)


def _gate_and_add_fwd(
    x: jax.Array, gate: jax.Array, shortcut: jax.Array, formulation: Formulation
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    y = gate_and_add(x, gate, shortcut, formulation)
    return y, (x, gate, y)


def _gate_and_add_bwd(
    formulation: Formulation, residuals: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, gate, y = residuals
    dy = where_positive(y, dy, formulation=formulation)
    dgate = _product(dy, x.astype(gate.dtype), formulation=formulation).sum((1, 2))
    return (dy * gate[:, None, None]).astype(x.dtype), dgate, dy


gate_and_add.defvjp(_gate_and_add_fwd, _gate_and_add_bwd)


def sum_over_devices(tree: Any, axis_name: str | None) -> Any:
    """Computes psum over `axis_name`, if any; returns `tree` itself for one device, where XLA on a CPU would copy."""
    # NOTES: No sum over devices on one device (docs/notes/cpu-kernels.md)
    return tree if axis_name is None or lax.axis_size(axis_name) == 1 else lax.psum(tree, axis_name)
