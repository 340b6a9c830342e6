"""Max-pooling, plain and in a formulation with a fast gradient."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxft.ops.fusion import materialize


def max_pool(x: jax.Array) -> jax.Array:
    """Of 3x3 pixels with stride 2, padded by one pixel of -inf. The gradient goes to the first of equals."""
    if jax.default_backend() == "tpu":
        return plain_max_pool(x)
    return _max_pool_by_index(x)


def plain_max_pool(x: jax.Array) -> jax.Array:
    """Its gradient is XLA's own (select and scatter): fast on a TPU, and on a CPU 30 times as slow as the one below."""
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)


@jax.custom_vjp
def _max_pool_by_index(x: jax.Array) -> jax.Array:
    return _max_pool(x)[0]


@materialize
def _max_pool(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maxima, and where in its window each was: 0..8."""
    height, width = (-(-side // 2) for side in x.shape[1:3])
    dtype = jnp.promote_types(x.dtype, jnp.float32)  # for XLA on a CPU would round after each comparison
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    windows = [
        padded[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2].astype(dtype)
        for i in range(3)
        for j in range(3)
    ]
    largest, index = windows[0], jnp.zeros(windows[0].shape, jnp.uint8)
    for k, window in enumerate(windows[1:], 1):
        index = jnp.where(window > largest, jnp.uint8(k), index)
        largest = jnp.maximum(largest, window)
    return largest.astype(x.dtype), index


def _max_pool_fwd(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    largest, index = _max_pool(x)
    return largest, (index, jnp.empty((0, *x.shape[1:3]), x.dtype))


def _max_pool_bwd(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    index, like = residuals
    return (_max_pool_gradient(index, like, dy),)


@materialize
def _max_pool_gradient(index: jax.Array, like: jax.Array, dy: jax.Array) -> jax.Array:
    _, height, width = like.shape
    batch, rows, columns, channels = dy.shape
    wide = dy.astype(jnp.promote_types(dy.dtype, jnp.float32))

    def grad_to(k: int) -> jax.Array:
        """What the windows give to their pixel k."""
        return jnp.where(index == k, wide, 0)

    def from_next(gradient: jax.Array, axis: int) -> jax.Array:
        """Of the window below, or to the right."""
        pads = [(0, 0, 0)] * 4
        pads[axis] = (-1, 1, 0)
        return lax.pad(gradient, jnp.zeros((), gradient.dtype), pads)

    # The windows' middles are the pixels with even numbers; the others belong to two windows, or four.
    even = [grad_to(4), grad_to(5) + from_next(grad_to(3), 2)]
    odd = [
        grad_to(7) + from_next(grad_to(1), 1),
        grad_to(8) + from_next(grad_to(6), 2) + from_next(grad_to(2) + from_next(grad_to(0), 2), 1),
    ]
    pixels = jnp.stack([jnp.stack(even, 3), jnp.stack(odd, 3)], 2)
    return pixels.reshape(batch, 2 * rows, 2 * columns, channels)[:, :height, :width].astype(dy.dtype)


_max_pool_by_index.defvjp(_max_pool_fwd, _max_pool_bwd)
