"""Pooling: max-pools of stride 2, as reduce_window and with a fast gradient, and average-pools."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxft.ops.formulation import Formulation
from jaxft.ops.fusion import materialize_on_cpu


def max_pool(x: jax.Array, formulation: Formulation = "plain") -> jax.Array:
    """Max-pools 3x3 pixels with stride 2, padded by one pixel of -inf; equal pixels leave the gradient to the first."""
    # NOTES: Max-pool gradient on a TPU and on a GPU (docs/notes/accelerators.md)
    if formulation in ("plain", "tpu"):
        return plain_max_pool(x)
    return _max_pool_by_index(x, 3, formulation)


def max_pool_2x2(x: jax.Array, formulation: Formulation = "plain") -> jax.Array:
    """Max-pools 2x2 pixels with stride 2; an odd last row or column is left out, as in torch.

    Equal pixels leave the gradient to the first.
    """
    if formulation in ("plain", "tpu"):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return _max_pool_by_index(x, 2, formulation)


def plain_max_pool(x: jax.Array) -> jax.Array:
    """Max-pools by reduce_window, whose gradient is XLA's select_and_scatter: fast on a TPU, slow on a CPU."""
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)


# NOTES: Max-pool gradient from saved positions (docs/notes/cpu-kernels.md). The gradient of jnp.max would compare x
# with the maxima again: if XLA recomputes x for that with another rounding, no pixel is equal, and it is 0 / 0.
@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool_by_index(x: jax.Array, size: int, formulation: Formulation) -> jax.Array:
    return _max_pool(x, size, formulation=formulation)[0]


@partial(materialize_on_cpu, static_argnums=1)
def _max_pool(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the maxima and the position of each in its window of size x size pixels, 0 to size^2 - 1 in uint8."""
    if size == 3:
        rows, columns = (-(-side // 2) for side in x.shape[1:3])
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    else:
        rows, columns = (side // 2 for side in x.shape[1:3])
    dtype = jnp.promote_types(x.dtype, jnp.float32)  # XLA's CPU backend would round after each comparison
    windows = [
        x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2].astype(dtype)
        for i in range(size)
        for j in range(size)
    ]
    largest, index = windows[0], jnp.zeros(windows[0].shape, jnp.uint8)
    for k, window in enumerate(windows[1:], 1):
        index = jnp.where(window > largest, jnp.uint8(k), index)
        largest = jnp.maximum(largest, window)
    return largest.astype(x.dtype), index


def _max_pool_fwd(x: jax.Array, size: int, formulation: Formulation) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    largest, index = _max_pool(x, size, formulation=formulation)
    return largest, (index, jnp.empty((0, *x.shape[1:3]), x.dtype))


def _max_pool_bwd(
    size: int, formulation: Formulation, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array]:
    index, like = residuals
    gradient = {2: _max_pool_gradient_2x2, 3: _max_pool_gradient}[size]
    return (gradient(index, like, dy, formulation=formulation),)


@materialize_on_cpu
def _max_pool_gradient(index: jax.Array, like: jax.Array, dy: jax.Array) -> jax.Array:
    """Sends dy to the saved positions. like: an empty array (0, H, W) that carries the input's size."""
    _, height, width = like.shape
    batch, rows, columns, channels = dy.shape
    wide = dy.astype(jnp.promote_types(dy.dtype, jnp.float32))

    def grad_to(k: int) -> jax.Array:
        """Gradient that each window sends to its pixel k."""
        return jnp.where(index == k, wide, 0)

    def from_next(gradient: jax.Array, axis: int) -> jax.Array:
        """Shifts by one window: the gradient that the window below (axis 1) or to the right (axis 2) sends."""
        pads = [(0, 0, 0)] * 4
        pads[axis] = (-1, 1, 0)
        return lax.pad(gradient, jnp.zeros((), gradient.dtype), pads)

    # A window's middle is a pixel with even row and column; the other pixels belong to two or four windows.
    even = [grad_to(4), grad_to(5) + from_next(grad_to(3), 2)]
    odd = [
        grad_to(7) + from_next(grad_to(1), 1),
        grad_to(8) + from_next(grad_to(6), 2) + from_next(grad_to(2) + from_next(grad_to(0), 2), 1),
    ]
    pixels = jnp.stack([jnp.stack(even, 3), jnp.stack(odd, 3)], 2)
    return pixels.reshape(batch, 2 * rows, 2 * columns, channels)[:, :height, :width].astype(dy.dtype)


@materialize_on_cpu
def _max_pool_gradient_2x2(index: jax.Array, like: jax.Array, dy: jax.Array) -> jax.Array:
    """Sends dy to the saved positions of windows that do not overlap. like: as in `_max_pool_gradient`."""
    _, height, width = like.shape
    batch, rows, columns, channels = dy.shape
    pixels = [[jnp.where(index == 2 * i + j, dy, 0) for j in range(2)] for i in range(2)]
    gradient = jnp.stack([jnp.stack(row, 3) for row in pixels], 2).reshape(batch, 2 * rows, 2 * columns, channels)
    return jnp.pad(gradient, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))


_max_pool_by_index.defvjp(_max_pool_fwd, _max_pool_bwd)


def avg_pool_2x2(x: jax.Array) -> jax.Array:
    """Average-pools 2x2 pixels with stride 2. The windows over an odd last row or column average its pixels only.

    Equals torch.nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False). XLA compiles it to fast loops, forward and
    backward, on every platform.
    """
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # the mean of a row and itself
    return x.reshape(batch, -(-height // 2), 2, -(-width // 2), 2, channels).mean((2, 4))


def adaptive_avg_pool(x: jax.Array, size: int) -> jax.Array:
    """Average-pools (N, H, W, C) to (N, size, size, C), as torch.nn.AdaptiveAvgPool2d; also enlarges."""
    rows, columns = (_averages(side, size) for side in x.shape[1:3])
    if rows.shape[0] != rows.shape[1]:
        x = jnp.einsum("ih,nhwc->niwc", rows.astype(x.dtype), x)
    return x if columns.shape[0] == columns.shape[1] else jnp.einsum("jw,niwc->nijc", columns.astype(x.dtype), x)


def _averages(side: int, size: int) -> np.ndarray:
    """Returns (size, side) weights: row i averages pixels i * side / size to (i + 1) * side / size, rounded out."""
    weights = np.zeros((size, side))
    for i in range(size):
        low, high = i * side // size, -(-(i + 1) * side // size)
        weights[i, low:high] = 1 / (high - low)
    return weights
