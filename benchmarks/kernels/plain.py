"""XLA's formulation of benchmarks/kernels/pointwise.py: norms as passes of their own, and products.

The passes are those of jaxft/ops/batch_norm.py, with barriers where a train step writes to memory.
"""

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.kernels.pointwise import Norm, NormGradient


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _normalised(x: jax.Array, norm: Norm | None) -> jax.Array:
    if norm is None:
        return x
    return lax.optimization_barrier(jnp.maximum((x - norm.mean) * norm.slope + norm.bias, 0).astype(x.dtype))


def _norm_gradient(g: jax.Array, y: jax.Array, after: tuple[Norm, NormGradient], relu: bool) -> jax.Array:
    (mean, slope, bias), (mean_grad, var_grad) = after
    centred = y - mean
    masked = jnp.where(centred * slope + bias > 0, g, 0) if relu else g
    return lax.optimization_barrier((slope * (masked - (mean_grad + centred * var_grad))).astype(g.dtype))


def forward(
    x: jax.Array, kernel: jax.Array, norm: Norm | None, mean_estimate: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pointwise.forward`."""
    y = lax.optimization_barrier(_dot(_normalised(x, norm), kernel).astype(x.dtype))
    centred = y - mean_estimate
    return y, centred.sum(0), jnp.square(centred).sum(0)


# Eight parameters: those of `pointwise.input_gradient`.
def input_gradient(
    g: jax.Array,
    y: jax.Array,
    kernel: jax.Array,
    x: jax.Array,
    after: tuple[Norm, NormGradient],
    before: Norm,
    block_end: tuple[jax.Array, jax.Array] | None = None,
    relu: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pointwise.input_gradient`."""
    dx = _dot(_norm_gradient(g, y, after, relu), kernel.T)
    centred = x - before.mean
    if block_end is None:
        dx = lax.optimization_barrier(dx.astype(g.dtype))
        dx = jnp.where(centred * before.slope + before.bias > 0, dx, 0)
    else:
        dx = lax.optimization_barrier((dx + block_end[0]).astype(g.dtype))
        dx = jnp.where(block_end[1] > 0, dx, 0)
    wide = dx.astype(jnp.float32)
    return dx, wide.sum(0), (wide * centred).sum(0)


# Six parameters and x: those of `pointwise.kernel_gradient`.
def kernel_gradient(
    x: jax.Array,
    g: jax.Array,
    y: jax.Array,
    before: Norm | None,
    after: tuple[Norm, NormGradient],
    relu: bool = False,
) -> jax.Array:
    """See `pointwise.kernel_gradient`."""
    return _dot(_normalised(x, before).T, _norm_gradient(g, y, after, relu))
