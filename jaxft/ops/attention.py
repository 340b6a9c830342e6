"""Attention of tokens to tokens. The softmax is computed in at least float32.

On a CPU jax.nn.dot_product_attention takes 1.5 to 3 times as long as these formulations, forward and backward.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxft.ops import onednn
from jaxft.ops.formulation import Formulation, on_cpu
from jaxft.ops.fusion import materialize


def attention(q: jax.Array, k: jax.Array, v: jax.Array, formulation: Formulation = "plain") -> jax.Array:
    """Returns the mean of values, weighted by softmax(q k / sqrt(d)): (N, T, heads, d), in v's type.

    q: (N, T, heads, d). k, v: (N, S, heads, d).
    """
    if formulation == "cpu-onednn" and q.dtype in onednn.DTYPES:
        return _onednn_attention(q, k, v)
    if on_cpu(formulation):
        return _attention_on_cpu(q, k, v)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("nthd,nshd->nhts", q, k, preferred_element_type=wide)
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("nhts,nshd->nthd", weights.astype(v.dtype), v)


def _attention_on_cpu(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Scales the queries and normalises the result, which are d wide, instead of the scores, which are S wide."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum("nhtd,nhsd->nhts", q, k, preferred_element_type=wide)
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    y = jnp.einsum("nhts,nhsd->nhtd", weights.astype(v.dtype), v, preferred_element_type=wide)
    return (y / weights.sum(-1, keepdims=True)).astype(v.dtype).transpose(0, 2, 1, 3)


# NOTES: Attention on a CPU (docs/notes/families.md)
@jax.custom_vjp
def _onednn_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Computes attention with few passes over the scores: only its result is divided by the sums of the softmax.

    The backward pass keeps the exponentials and the inverse of their sums. It computes the softmax's mean gradient as
    the sum of y dy, as flash attention does (Dao et al. 2022, appendix B).
    """
    return _onednn_attention_fwd(q, k, v)[0]


def _onednn_attention_fwd(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple]:
    weights = _exponentials(_scores(q, k), q.shape[-1] ** -0.5, v.dtype)
    inverse = 1 / _row_sums(weights)
    y = _normalized(_mix(weights, v), inverse, v.dtype)
    return y, (q, k, v, weights, inverse, y)


def _onednn_attention_bwd(residuals: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, weights, inverse, y = residuals
    dy, mean = _divided_gradient(dy, y, inverse)
    dscores = _score_gradient(weights, _scores(dy, v), mean, q.shape[-1] ** -0.5)
    gradients = _mix(dscores, k), _mix(dscores, q, transpose=True), _mix(weights, dy, transpose=True)
    dq, dk, dv = (gradient.astype(v.dtype) for gradient in gradients)
    return dq, dk, dv


_onednn_attention.defvjp(_onednn_attention_fwd, _onednn_attention_bwd)

# Axes of (N, heads, T, d) in memory, which is that of (N, T, heads, d), and of scores (N, heads, T, S).
_TOKENS, _SCORES = (0, 2, 1, 3), (0, 1, 2, 3)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Returns the scores q k^T (N, heads, T, S), in at least float32. q: (N, T, heads, d). k: (N, S, heads, d)."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q, k = q.swapaxes(1, 2), k.swapaxes(1, 2)
    return onednn.matmul(q, k, transpose_b=True, dtype=dtype, layouts=(_TOKENS, _TOKENS, _SCORES))


def _mix(weights: jax.Array, v: jax.Array, transpose: bool = False) -> jax.Array:
    """Multiplies weights (N, heads, T, S), or their transposes, by tokens: (N, T, heads, d), in at least float32."""
    dtype, layouts = jnp.promote_types(v.dtype, jnp.float32), (_SCORES, _TOKENS, _TOKENS)
    return onednn.matmul(weights, v.swapaxes(1, 2), transpose, dtype=dtype, layouts=layouts).swapaxes(1, 2)


@partial(materialize, static_argnums=(1, 2))
def _exponentials(scores: jax.Array, scale: float, dtype: Any) -> jax.Array:
    """Returns exp(scale (scores - maximum of the row))."""
    return jnp.exp((scores - scores.max(-1, keepdims=True)) * scale).astype(dtype)


@materialize
def _row_sums(weights: jax.Array) -> jax.Array:
    """Sums the weights as they are rounded, so that the divided ones sum to 1."""
    return weights.astype(jnp.promote_types(weights.dtype, jnp.float32)).sum(-1, keepdims=True)


@partial(materialize, static_argnums=2)
def _normalized(y: jax.Array, inverse: jax.Array, dtype: Any) -> jax.Array:
    """Multiplies y (N, T, heads, d) by `inverse` (N, heads, T, 1)."""
    return (y * inverse.swapaxes(1, 2)).astype(dtype)


@materialize
def _divided_gradient(dy: jax.Array, y: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns dy times `inverse`, and its product with y summed over features: (N, heads, T, 1)."""
    divided = dy * inverse.swapaxes(1, 2)
    return divided.astype(dy.dtype), (divided * y).sum(-1, keepdims=True).swapaxes(1, 2)


@partial(materialize, static_argnums=3)
def _score_gradient(weights: jax.Array, dweights: jax.Array, mean: jax.Array, scale: float) -> jax.Array:
    return (weights * (dweights - mean) * scale).astype(weights.dtype)
