"""Dense layers and convolutions whose stride is their size, as matrix products in the fastest formulation."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxft.ops import onednn
from jaxft.ops.conv_xla_cpu import product
from jaxft.ops.formulation import WIDE_BYTES, Formulation, on_cpu
from jaxft.ops.fusion import materialize
from jaxft.ops.layer_norm import gelu, gelu_grad


def dense(
    x: jax.Array, kernel: jax.Array, formulation: Formulation = "plain", bias: jax.Array | None = None
) -> jax.Array:
    """Multiplies x (..., C) by a kernel (C, F) of the same type and adds a bias (F,), if any. Returns x's type.

    CPUs add the bias in at least float32. Others add it in x's type, so that it can be fused into the product.
    """
    if not on_cpu(formulation):
        y = jnp.dot(x, kernel)
        return y if bias is None else y + bias.astype(y.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if formulation == "cpu-onednn" and x.dtype in onednn.DTYPES:
        y = _onednn_dense(rows, kernel, bias)
    else:
        y = product(rows, kernel)
        y = y if bias is None else (y + bias).astype(x.dtype)
    return y.reshape(*x.shape[:-1], -1)


# NOTES: Dense layers by oneDNN (docs/notes/families.md)
@jax.custom_vjp
def _onednn_dense(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Multiplies (rows, C) by (C, F) and adds a bias, if any."""
    return onednn.matmul(x, kernel, epilogue=onednn.Epilogue(bias))


def _onednn_dense_fwd(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, tuple]:
    return _onednn_dense(x, kernel, bias), (x, kernel, bias)


def _onednn_dense_bwd(residuals: tuple, dy: jax.Array) -> tuple[jax.Array | None, ...]:
    """Uses x and dy in the shape of the forward pass: for another shape, XLA would compute them again."""
    x, kernel, bias = residuals
    dbias = None if bias is None else _sum_rows(dy).astype(bias.dtype)
    return onednn.matmul(dy, kernel, transpose_b=True), _kernel_grad(x, dy).astype(kernel.dtype), dbias


_onednn_dense.defvjp(_onednn_dense_fwd, _onednn_dense_bwd)


def dense_and_gelu(
    x: jax.Array,
    kernel: jax.Array,
    formulation: Formulation = "plain",
    bias: jax.Array | None = None,
    approximate: bool = False,
) -> jax.Array:
    """Applies GELU to the result of `dense`; approximate: by tanh."""
    if formulation == "cpu-onednn" and x.dtype in onednn.DTYPES:
        y = _onednn_dense_and_gelu(x.reshape(-1, x.shape[-1]), kernel, bias, approximate)
        return y.reshape(*x.shape[:-1], -1)
    return gelu(dense(x, kernel, formulation, bias), approximate, formulation)


# NOTES: GELU (docs/notes/families.md)
@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _onednn_dense_and_gelu(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, approximate: bool) -> jax.Array:
    """Applies GELU before the product is written. A gradient needs its input, so that training computes it apart."""
    return onednn.matmul(x, kernel, epilogue=onednn.Epilogue(bias, gelu="tanh" if approximate else "erf"))


def _onednn_dense_and_gelu_fwd(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, approximate: bool
) -> tuple[jax.Array, tuple]:
    hidden = _onednn_dense(x, kernel, bias)
    return gelu(hidden, approximate, "cpu-onednn"), (x, kernel, bias, hidden)


def _onednn_dense_and_gelu_bwd(approximate: bool, residuals: tuple, dy: jax.Array) -> tuple[jax.Array | None, ...]:
    *own, hidden = residuals
    return _onednn_dense_bwd(tuple(own), gelu_grad(hidden, dy, approximate, formulation="cpu-onednn"))


_onednn_dense_and_gelu.defvjp(_onednn_dense_and_gelu_fwd, _onednn_dense_and_gelu_bwd)


# If this were fused, XLA's CPU backend would also keep a bfloat16 dy as float32.
@materialize
def _sum_rows(dy: jax.Array) -> jax.Array:
    return dy.astype(jnp.promote_types(dy.dtype, jnp.float32)).sum(0)


def _kernel_grad(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Returns x.T @ dy in float32. Wide types transpose the larger operand, which is the faster way."""
    if x.dtype.itemsize >= WIDE_BYTES:
        return onednn.matmul(x, dy, transpose_a=True) if x.size >= dy.size else onednn.matmul(dy, x, transpose_a=True).T
    # NOTES: Bfloat16 kernel gradients in two halves (docs/notes/onednn.md)
    if x.shape[1] * dy.shape[1] > 2 * len(x) or len(x) % 2:
        return onednn.matmul(x, dy, transpose_a=True)
    x, dy = (array.reshape(2, -1, array.shape[1]) for array in (x, dy))
    return onednn.matmul(x, dy, transpose_a=True).sum(0)


def patch_conv(
    x: jax.Array, kernel: jax.Array, formulation: Formulation = "plain", bias: jax.Array | None = None
) -> jax.Array:
    """Convolves (N, H, W, C) with (size, size, C, F) at a stride of `size`, without padding: a product per patch.

    Pixels beyond the last whole patch are left out, as in torch.
    """
    size, _, channels, features = kernel.shape
    height, width = (side // size for side in x.shape[1:3])
    x = x[:, : height * size, : width * size].reshape(-1, height, size, width, size, channels)
    patches = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, size * size * channels)
    return dense(patches, kernel.reshape(-1, features), formulation, bias)
