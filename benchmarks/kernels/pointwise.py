"""Pallas kernels for 1x1 convolutions that normalise what they load and reduce what they store. Prototypes.

A 1x1 convolution is a product of pixels (M, K) with a kernel (K, N). In ResNet's bottlenecks a BatchNorm precedes and
follows it, and each norm is a pass or two over memory of its own. Here

- `forward` applies the preceding norm and ReLU to x on load, and sums y and its square for the following norm;
- `input_gradient` computes the following norm's gradient on load, and sums for the gradient of the preceding norm;
- `kernel_gradient` computes both operands on load.

Arithmetic is that of jaxft/ops/batch_norm.py: float32 within a kernel, x's type in memory. The sums are taken of the
values as stored. They come as one partial sum per tile, which XLA adds: no atomics, so results are reproducible.
The kernels are written for Pallas' Triton backend, which jax 0.12 calls deprecated in favour of Mosaic GPU.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

PROGRAMS = 2 * 132  # of kernel_gradient: two for each multiprocessor of an H100


class Tile(NamedTuple):
    """Sides of the blocks that one program of a kernel computes: powers of two, since Triton requires them."""

    pixels: int = 128
    inputs: int = 64  # K, at least 16
    outputs: int = 128  # N, at least 16
    warps: int = 8
    stages: int = 3

    def within(self, inputs: int, outputs: int) -> "Tile":
        """Returns the tile with blocks no larger than the sides of the kernel (K, N)."""
        return self._replace(inputs=min(self.inputs, _power(inputs)), outputs=min(self.outputs, _power(outputs)))


class Norm(NamedTuple):
    """A BatchNorm that has its statistics: (x - mean) * slope + bias, each float32 (C,)."""

    mean: jax.Array
    slope: jax.Array
    bias: jax.Array


class NormGradient(NamedTuple):
    """The inputs of BatchNorm's gradient besides slope and mean: the means of its two sums, each float32 (C,)."""

    mean_grad: jax.Array
    var_grad: jax.Array


def _power(side: int) -> int:
    return max(16, pl.next_power_of_2(side))


def _load(ref: Any, starts: tuple[Any, Any], sizes: tuple[int, int], beyond: bool = False) -> jax.Array:
    """Loads a block of an array; what lies outside is zero. beyond: whole blocks may lie below the array."""
    mask = _mask(ref.shape, starts, sizes, beyond)
    block = ref.at[pl.ds(starts[0], sizes[0]), pl.ds(starts[1], sizes[1])]
    return plgpu.load(block) if mask is None else plgpu.load(block, mask=mask, other=0)


def _store(ref: Any, starts: tuple[Any, Any], values: jax.Array) -> None:
    mask = _mask(ref.shape, starts, values.shape)
    plgpu.store(ref.at[pl.ds(starts[0], values.shape[0]), pl.ds(starts[1], values.shape[1])], values, mask=mask)


def _mask(
    shape: tuple[int, ...], starts: tuple[Any, Any], sizes: tuple[int, ...], beyond: bool = False
) -> jax.Array | None:
    """Returns which elements of a block lie within the array, or None if all blocks do."""
    mask = None
    for axis, (side, start, size) in enumerate(zip(shape, starts, sizes, strict=True)):
        if side % size or (beyond and axis == 0):
            inside = start + lax.broadcasted_iota(jnp.int32, tuple(sizes), axis) < side
            mask = inside if mask is None else mask & inside
    return mask


def _row(ref: Any, start: Any, size: int) -> jax.Array:
    """Loads values per channel from an array (1, C) as (1, size)."""
    return _load(ref, (0, start), (1, size))


def _normalised(x: jax.Array, norm: list[jax.Array], relu: bool = True) -> jax.Array:
    mean, slope, bias = norm
    z = (x - mean) * slope + bias
    return jnp.maximum(z, 0) if relu else z


def _norm_gradient(g: jax.Array, y: jax.Array, norm: list[jax.Array], grads: list[jax.Array], relu: bool) -> jax.Array:
    mean, slope, bias = norm
    mean_grad, var_grad = grads
    centred = y - mean
    if relu:
        g = jnp.where(centred * slope + bias > 0, g, 0)
    return slope * (g - (mean_grad + centred * var_grad))


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _write_sums(refs: tuple[Any, Any], row: Any, start: Any, first: jax.Array, second: jax.Array) -> None:
    for ref, values in zip(refs, (first, second), strict=True):
        _store(ref, (row, start), values.sum(0, keepdims=True))


# One reference for each array of the kernel.
def _forward_kernel(x_ref: Any, kernel_ref: Any, *refs: Any, tile: Tile, has_norm: bool) -> None:
    *norm_refs, estimate_ref, y_ref, sum_ref, square_ref = refs
    (pixels, inputs), outputs = x_ref.shape, kernel_ref.shape[1]
    column, block = pl.program_id(0) * tile.outputs, pl.program_id(1)
    row = block * tile.pixels

    def step(k: Any, total: jax.Array) -> jax.Array:
        k = k * tile.inputs
        x = _load(x_ref, (row, k), (tile.pixels, tile.inputs))
        if has_norm:
            norm = [_row(ref, k, tile.inputs) for ref in norm_refs]
            x = _normalised(x.astype(jnp.float32), norm).astype(x.dtype)
        return total + _dot(x, _load(kernel_ref, (k, column), (tile.inputs, tile.outputs)), (1, 0))

    total = lax.fori_loop(0, pl.cdiv(inputs, tile.inputs), step, jnp.zeros((tile.pixels, tile.outputs), jnp.float32))
    y = total.astype(y_ref.dtype)
    _store(y_ref, (row, column), y)
    centred = y.astype(jnp.float32) - _row(estimate_ref, column, tile.outputs)
    mask = _mask((pixels, outputs), (row, column), y.shape)
    centred = centred if mask is None else jnp.where(mask, centred, 0)
    _write_sums((sum_ref, square_ref), block, column, centred, centred * centred)


def _rows(*vectors: jax.Array) -> list[jax.Array]:
    return [vector.astype(jnp.float32)[None] for vector in vectors]


def forward(
    x: jax.Array,
    kernel: jax.Array,
    norm: Norm | None,
    mean_estimate: jax.Array,
    tile: Tile = Tile(),  # noqa: B008, immutable
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes y = relu(norm(x)) @ kernel, and the sums of y - mean_estimate and of its square.

    x: (M, K). kernel: (K, N), of x's type. norm: None takes x as it is, such as a block's end. Returns y (M, N) in x's
    type and the sums, float32 (N,).
    """
    (pixels, inputs), outputs = x.shape, kernel.shape[1]
    tile = tile.within(inputs, outputs)
    grid = pl.cdiv(outputs, tile.outputs), pl.cdiv(pixels, tile.pixels)  # tiles of the same pixels one after the other
    sums = jax.ShapeDtypeStruct((grid[1], outputs), jnp.float32)
    y, total, squares = pl.pallas_call(
        partial(_forward_kernel, tile=tile, has_norm=norm is not None),
        (jax.ShapeDtypeStruct((pixels, outputs), x.dtype), sums, sums),
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="pointwise_forward",
    )(x, kernel, *_rows(*(norm or ()), mean_estimate))
    return y, total.sum(0), squares.sum(0)


# One reference for each array of the kernel.
def _input_gradient_kernel(
    g_ref: Any, y_ref: Any, kernel_ref: Any, x_ref: Any, *refs: Any, tile: Tile, relu: bool, at_block_end: bool
) -> None:
    side_ref, end_ref = refs[:2] if at_block_end else (None, None)
    rows, (dx_ref, bias_ref, slope_ref) = refs[2 * at_block_end : -3], refs[-3:]
    after, before = rows[:5], rows[5:]
    outputs = g_ref.shape[1]
    column, block = pl.program_id(0) * tile.inputs, pl.program_id(1)
    row = block * tile.pixels

    def step(n: Any, total: jax.Array) -> jax.Array:
        n = n * tile.outputs
        g, y = (_load(ref, (row, n), (tile.pixels, tile.outputs)) for ref in (g_ref, y_ref))
        vectors = [_row(ref, n, tile.outputs) for ref in after]
        dy = _norm_gradient(g.astype(jnp.float32), y.astype(jnp.float32), vectors[:3], vectors[3:], relu)
        kernel = _load(kernel_ref, (column, n), (tile.inputs, tile.outputs))
        return total + _dot(dy.astype(g.dtype), kernel, (1, 1))

    dx = lax.fori_loop(0, pl.cdiv(outputs, tile.outputs), step, jnp.zeros((tile.pixels, tile.inputs), jnp.float32))
    place, size = (row, column), (tile.pixels, tile.inputs)
    centred = _load(x_ref, place, size).astype(jnp.float32)
    mean, *slope_and_bias = (_row(ref, column, tile.inputs) for ref in before)
    centred -= mean
    if at_block_end:
        dx += _load(side_ref, place, size).astype(jnp.float32)
        dx = jnp.where(_load(end_ref, place, size).astype(jnp.float32) > 0, dx, 0)
    else:
        slope, bias = slope_and_bias
        dx = jnp.where(centred * slope + bias > 0, dx, 0)
    stored = dx.astype(dx_ref.dtype)
    _store(dx_ref, place, stored)
    dx = stored.astype(jnp.float32)
    mask = _mask(dx_ref.shape, place, size)
    dx = dx if mask is None else jnp.where(mask, dx, 0)
    _write_sums((bias_ref, slope_ref), block, column, dx, dx * centred)


# Ten parameters: the arrays of one pass over memory.
def input_gradient(
    g: jax.Array,
    y: jax.Array,
    kernel: jax.Array,
    x: jax.Array,
    after: tuple[Norm, NormGradient],
    before: Norm,
    block_end: tuple[jax.Array, jax.Array] | None = None,
    relu: bool = False,
    tile: Tile = Tile(),  # noqa: B008, immutable
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the gradient behind the preceding norm, masked by its ReLU, and the two sums of that norm's gradient.

    g: (M, N), gradient behind the following norm; relu: that norm has a ReLU whose mask g still lacks. y: (M, N), the
    convolution's output, which that norm normalised. x: (M, K), what the preceding norm normalised. block_end: the
    gradient of the shortcut and the block's end (M, K); then the first is added and the second gives the mask. Returns
    (M, K) in g's type, and float32 (K,): the sums of it and of its product with x - mean.
    """
    (pixels, outputs), inputs = g.shape, kernel.shape[0]
    # The sum runs over N here, and the tile's long side is K.
    tile = tile._replace(inputs=tile.outputs, outputs=tile.inputs).within(inputs, outputs)
    grid = pl.cdiv(inputs, tile.inputs), pl.cdiv(pixels, tile.pixels)
    sums = jax.ShapeDtypeStruct((grid[1], inputs), jnp.float32)
    dx, dbias, dslope = pl.pallas_call(
        partial(_input_gradient_kernel, tile=tile, relu=relu, at_block_end=block_end is not None),
        (jax.ShapeDtypeStruct((pixels, inputs), g.dtype), sums, sums),
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="pointwise_input_gradient",
    )(g, y, kernel, x, *(block_end or ()), *_rows(*after[0], *after[1], *before))
    return dx, dbias.sum(0), dslope.sum(0)


# One reference for each array of the kernel.
def _kernel_gradient_kernel(
    x_ref: Any, g_ref: Any, y_ref: Any, *refs: Any, tile: Tile, has_norm: bool, relu: bool, blocks: int, parts: int
) -> None:
    *rows, gradient_ref = refs
    before, after = rows[: 3 * has_norm], rows[3 * has_norm :]
    column, row = pl.program_id(0) * tile.outputs, pl.program_id(1) * tile.inputs
    part = pl.program_id(2)
    beyond = x_ref.shape[0] != parts * blocks * tile.pixels
    norm = [_row(ref, row, tile.inputs) for ref in before]
    vectors = [_row(ref, column, tile.outputs) for ref in after]

    def step(i: Any, total: jax.Array) -> jax.Array:
        pixel = (part * blocks + i) * tile.pixels
        x = _load(x_ref, (pixel, row), (tile.pixels, tile.inputs), beyond)
        if has_norm:
            x = _normalised(x.astype(jnp.float32), norm).astype(x.dtype)
        g, y = (_load(ref, (pixel, column), (tile.pixels, tile.outputs), beyond) for ref in (g_ref, y_ref))
        dy = _norm_gradient(g.astype(jnp.float32), y.astype(jnp.float32), vectors[:3], vectors[3:], relu)
        if beyond:  # what lies outside is zero, but its norm is not
            inside = pixel + lax.broadcasted_iota(jnp.int32, dy.shape, 0) < x_ref.shape[0]
            dy = jnp.where(inside, dy, 0)
        return total + _dot(x, dy.astype(g.dtype), (0, 0))

    total = lax.fori_loop(0, blocks, step, jnp.zeros((tile.inputs, tile.outputs), jnp.float32))
    _store(gradient_ref, (part * pl.cdiv(x_ref.shape[1], tile.inputs) * tile.inputs + row, column), total)


# Nine parameters: the arrays of one pass over memory.
def kernel_gradient(
    x: jax.Array,
    g: jax.Array,
    y: jax.Array,
    before: Norm | None,
    after: tuple[Norm, NormGradient],
    relu: bool = False,
    parts: int = 0,
    tile: Tile = Tile(),  # noqa: B008, immutable
    interpret: bool = False,
) -> jax.Array:
    """Computes relu(before(x)).T @ dy, where dy is the gradient of the norm after the convolution: float32 (K, N).

    x: (M, K); before: None takes it as it is. g, y, after, relu: as in `input_gradient`. parts: the pixels are divided
    among this many programs per tile, and XLA adds their sums; 0 fills an H100 twice.
    """
    (pixels, inputs), outputs = x.shape, g.shape[1]
    tile = tile._replace(pixels=tile.inputs, inputs=tile.pixels).within(inputs, outputs)
    tiles = pl.cdiv(outputs, tile.outputs), pl.cdiv(inputs, tile.inputs)
    parts = parts or max(1, PROGRAMS // (tiles[0] * tiles[1]))
    blocks = pl.cdiv(pl.cdiv(pixels, tile.pixels), parts)
    grid = *tiles, parts
    height = grid[1] * tile.inputs
    gradient = pl.pallas_call(
        partial(_kernel_gradient_kernel, tile=tile, has_norm=before is not None, relu=relu, blocks=blocks, parts=parts),
        jax.ShapeDtypeStruct((parts * height, outputs), jnp.float32),
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="pointwise_kernel_gradient",
    )(x, g, y, *_rows(*(before or ()), *after[0], *after[1]))
    return gradient.reshape(parts, height, outputs).sum(0)[:inputs]
