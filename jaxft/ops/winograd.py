"""3x3 convolutions of stride 1 with 25 % of the multiplications: F(4x4, 3x3) of Lavin and Gray 2015 (arXiv:1509.09308).

In their notation Y = A^T [(G g G^T) * (B^T d B)] A, where g is the kernel, d a tile of 6x6 pixels of x and Y the 4x4
pixels of the result that read it. The 36 products * are summed over channels: they are matrix products. The gradients
are this formula's own: for d, B ((G g G^T) * (A dY A^T)) B^T, summed where tiles overlap; for g,
G^T ((B^T d B) * (A dY A^T)) G. Narrow types are computed in float32. For CPUs only.
"""

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxft.ops.fusion import materialize

# NOTES: Interpolation points and rounding error (docs/notes/winograd.md)
_POINTS = np.array([0, -(0.5**0.5), 0.5**0.5, -(2**0.5), 2**0.5])  # and infinity; the paper's 0, 1, -1, 2, -2 err more
_OTHERS = [np.delete(_POINTS, i) for i in range(5)]  # for each point


def _powers(degrees: int) -> np.ndarray:
    """Returns the powers 0 to degrees - 1 of the points, (6, degrees); infinity has only the highest."""
    return np.vstack([np.vander(_POINTS, degrees, increasing=True), np.eye(degrees)[-1]])


def _polynomial(roots: np.ndarray) -> np.ndarray:
    """Returns the six coefficients of the polynomial with these roots, lowest first, rounded to make zeros exact."""
    return np.pad(np.round(np.poly(roots)[::-1], 15), (0, 5 - len(roots)))


A = _powers(4)
B_T = np.stack([_polynomial(roots) for roots in (*_OTHERS, _POINTS)])
G = _powers(3) / np.array([*(np.prod(p - others) for p, others in zip(_POINTS, _OTHERS, strict=True)), 1])[:, None]

# For a tile's four middle pixels; the first is also the last of the previous tile, the fourth the first of the next.
B = np.hstack([B_T.T[1:5], np.eye(4)[:, [0, 3]]])


class BatchedMatmul(Protocol):
    def __call__(self, a: jax.Array, b: jax.Array, transpose_a: bool = False, transpose_b: bool = False) -> jax.Array:
        """Multiplies two stacks of 36 matrices, each by its counterpart."""


def xla_matmul(a: jax.Array, b: jax.Array, transpose_a: bool = False, transpose_b: bool = False) -> jax.Array:
    return lax.dot_general(a, b, (([1 if transpose_a else 2], [2 if transpose_b else 1]), ([0], [0])))


def is_profitable(shape: tuple[int, ...], kernel_shape: tuple[int, ...]) -> bool:
    """Returns whether there are enough tiles, real pixels in them and channels; False for a symbolic batch size."""
    # NOTES: When Winograd is profitable (docs/notes/winograd.md)
    batch, height, width, channels = shape
    tiles = -(-height // 4) * -(-width // 4)
    filled = height * width / (16 * tiles)
    return isinstance(batch, int) and batch * tiles >= 32 and filled > 0.6 and min(channels, kernel_shape[-1]) >= 64


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def winograd_conv(x: jax.Array, kernel: jax.Array, matmul: BatchedMatmul) -> jax.Array:
    """Convolves (N, H, W, C), padded by one pixel on each side, with (3, 3, C, F): (N, H, W, F)."""
    return _output_transform(matmul(_input_transform(x), _kernel_transform(kernel)), x.shape).astype(x.dtype)


def winograd_conv_and_add(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, relu: bool, matmul: BatchedMatmul
) -> jax.Array:
    """Computes `winograd_conv` plus `bias` (F,) and an optional ReLU, without a gradient."""
    rows = _output_transform_rows(_tiles(matmul(_input_transform(x), _kernel_transform(kernel)), x.shape))
    return _pixels(_output_transform_columns_and_add(rows, bias, relu), x.shape).astype(x.dtype)


def _fwd(x: jax.Array, kernel: jax.Array, matmul: BatchedMatmul) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return winograd_conv(x, kernel, matmul), (x, kernel)


def _bwd(matmul: BatchedMatmul, residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    split_dy = _output_grad_transform(dy)
    dx = _input_grad_transform(matmul(split_dy, _kernel_transform(kernel), transpose_b=True), x.shape).astype(x.dtype)
    gradients = matmul(_input_transform(x), split_dy, transpose_a=True)  # (36, C, F)
    kernel_gradient = jnp.asarray(np.kron(G, G).T, gradients.dtype) @ gradients.reshape(36, -1)
    return dx, kernel_gradient.reshape(kernel.shape).astype(kernel.dtype)


winograd_conv.defvjp(_fwd, _bwd)


def _kernel_transform(kernel: jax.Array) -> jax.Array:
    """G g G^T: (36, C, F)."""
    kernel = _widened(kernel)
    return (jnp.asarray(np.kron(G, G), kernel.dtype) @ kernel.reshape(9, -1)).reshape(36, *kernel.shape[2:])


def _input_transform(x: jax.Array) -> jax.Array:
    """B^T d B of each tile: (36, tiles, C)."""
    return _input_transform_columns(_input_transform_rows(x)).reshape(36, -1, x.shape[-1])


def _output_grad_transform(dy: jax.Array) -> jax.Array:
    """A dY A^T of each tile: (36, tiles, F)."""
    return _output_grad_transform_columns(_output_grad_transform_rows(dy)).reshape(36, -1, dy.shape[-1])


def _output_transform(products: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A^T products A of each tile: (N, H, W, F)."""
    return _pixels(_output_transform_columns(_output_transform_rows(_tiles(products, shape))), shape)


def _input_grad_transform(products: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """B products B^T of each tile, summed where they overlap: (N, H, W, C)."""
    return _pixels(_input_grad_transform_columns(_input_grad_transform_rows(_tiles(products, shape))), shape)


def _tiles(products: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    batch, height, width, _ = shape
    return products.reshape(6, 6, batch, -(-height // 4), -(-width // 4), -1)


def _pixels(tiles: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Joins tiles (N, rows, 4, columns, 4, F) and cuts off their padding: (N, H, W, F)."""
    batch, rows, _, columns, _, features = tiles.shape
    return tiles.reshape(batch, 4 * rows, 4 * columns, features)[:, : shape[1], : shape[2]]


# NOTES: Input and output transforms (docs/notes/winograd.md). Each half is materialised: one pass over memory.
@materialize
def _input_transform_rows(x: jax.Array) -> jax.Array:
    """(6, N, rows of tiles, W and padding, C)"""
    x = jnp.pad(x, ((0, 0), *((1, 1 + -side % 4) for side in x.shape[1:3]), (0, 0)))
    return _combine(B_T, [x[:, i : x.shape[1] - 5 + i : 4] for i in range(6)], 0)


@materialize
def _input_transform_columns(rows: jax.Array) -> jax.Array:
    """(6, 6, N, rows of tiles, columns of tiles, C)"""
    return _combine(B_T, [rows[:, :, :, j : rows.shape[3] - 5 + j : 4] for j in range(6)], 1)


@materialize
def _output_grad_transform_rows(dy: jax.Array) -> jax.Array:
    dy = jnp.pad(dy, ((0, 0), *((0, -side % 4) for side in dy.shape[1:3]), (0, 0)))
    return _combine(A, [dy[:, i::4] for i in range(4)], 0)


@materialize
def _output_grad_transform_columns(rows: jax.Array) -> jax.Array:
    return _combine(A, [rows[:, :, :, j::4] for j in range(4)], 1)


@materialize
def _output_transform_rows(products: jax.Array) -> jax.Array:
    """(4, 6, N, rows, columns, F)"""
    return _combine(A.T, list(products), 0)


@materialize
def _output_transform_columns(rows: jax.Array) -> jax.Array:
    """(N, rows, 4, columns, 4, F)"""
    return _combine(A.T, list(jnp.moveaxis(rows, 0, 3)), 4)


@partial(materialize, static_argnums=2)
def _output_transform_columns_and_add(rows: jax.Array, bias: jax.Array, relu: bool) -> jax.Array:
    y = _combine(A.T, list(jnp.moveaxis(rows, 0, 3)), 4) + bias
    return jnp.maximum(y, 0) if relu else y


@materialize
def _input_grad_transform_rows(products: jax.Array) -> jax.Array:
    return _combine(B, _with_neighbours(products, 2), 0)


@materialize
def _input_grad_transform_columns(rows: jax.Array) -> jax.Array:
    return _combine(B, _with_neighbours(jnp.moveaxis(rows, 0, 3), 3), 4)


def _with_neighbours(products: jax.Array, axis: int) -> list[jax.Array]:
    """The six products of each tile, then the last of the previous tile and the first of the next along the axis."""

    def shifted(part: jax.Array, by: int) -> jax.Array:
        pads = [(0, 0, 0)] * part.ndim
        pads[axis] = (by, -by, 0)
        return lax.pad(part, jnp.zeros((), part.dtype), pads)

    return [*products, shifted(products[5], 1), shifted(products[0], -1)]


def _combine(matrix: np.ndarray, parts: list[jax.Array], axis: int) -> jax.Array:
    """Multiplies the matrix by the stacked parts, along a new axis; its zeros too, as branches are not vectorised."""
    shape = [1] * (parts[0].ndim + 1)
    shape[axis] = len(matrix)
    wide = [_widened(jnp.expand_dims(part, axis)) for part in parts]
    terms = [
        jnp.asarray(column.reshape(shape), wide[0].dtype) * part for column, part in zip(matrix.T, wide, strict=True)
    ]
    return sum(terms[1:], terms[0])


def _widened(array: jax.Array) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
