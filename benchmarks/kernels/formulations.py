"""Formulations of parts of a GPU's train step that are not in jaxft/ops, because no GPU has shown a gain from them.

`apply(name)` replaces functions of jaxft in this process, before anything is traced. All give the plain result up to
rounding: tests/benchmarks/test_kernels.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxft.models import layers
from jaxft.ops import conv, pool
from jaxft.ops.conv_plain import IMAGE_CHANNELS, ceil_div
from jaxft.transforms import preprocessing
from jaxft.transforms.pillow_resize import PRECISION_BITS

Convolve = Callable[..., jax.Array]


def apply(name: str) -> None:
    """Replaces what the formulation is about; "" replaces nothing. Raises KeyError for an unknown name."""
    if name:
        FORMULATIONS[name]()


def pad_image_channels(x: jax.Array, kernel: jax.Array, channels: int, stride: int) -> jax.Array:
    """Convolves an image of `channels` instead of three channels; the others are zero.

    cuDNN pads three channels to eight itself, in kernels of its own; here the padding joins the normalisation.
    """
    missing = channels - x.shape[-1]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing)))
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, missing), (0, 0)))
    return conv.plain_conv(x, kernel, stride)


def convolve_blocks(x: jax.Array, kernel: jax.Array, channels: int) -> jax.Array:
    """Convolves with stride 2 as a convolution with stride 1 on blocks of 2x2 pixels, padded to `channels`.

    Unlike ops/conv_xla_cpu.py, its kernel gradient is computed on blocks as well.
    """
    batch, height, width, features_in = x.shape
    size, features = kernel.shape[0], kernel.shape[-1]
    blocks = (size + 1) // 2
    sides = ceil_div(height, 2), ceil_div(width, 2)
    pads = [
        (size // 2, 2 * (out + blocks - 1) - size // 2 - side) for out, side in zip(sides, (height, width), strict=True)
    ]
    rows, columns = (out + blocks - 1 for out in sides)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0))).reshape(batch, rows, 2, columns, 2, features_in)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, 4 * features_in)
    missing = 2 * blocks - size
    kernel = jnp.pad(kernel, ((0, missing), (0, missing), (0, 0), (0, 0)))
    kernel = kernel.reshape(blocks, 2, blocks, 2, features_in, features).transpose(0, 2, 1, 3, 4, 5)
    kernel = kernel.reshape(blocks, blocks, 4 * features_in, features)
    empty = channels - 4 * features_in
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, empty)))
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, empty), (0, 0)))
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _replace_stem(stem: Callable[[jax.Array, jax.Array], jax.Array]) -> None:
    convolve = conv.conv

    def replaced(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1, *rest: Any) -> jax.Array:
        if x.shape[-1] <= IMAGE_CHANNELS and stride == 2:
            return stem(x, kernel)
        return convolve(x, kernel, stride, groups, *rest)

    vars(conv)["conv"] = vars(layers)["convolve"] = replaced


# Positions in a pooling window that send a gradient to a pixel, by the pixel's parity along an axis: of the window that
# begins one row above it or two, and of the next one. Pixels of even rows belong to one window.
_POSITION = {0: (1, None), 1: (2, 0)}


def pool_gradient(index: jax.Array, like: jax.Array, dy: jax.Array, **_options: Any) -> jax.Array:
    """Sends dy to the saved positions, elementwise, so that XLA fuses it into the two passes that read it.

    The formulation in ops/pool.py concatenates, and XLA writes a concatenation to memory.
    """
    _, height, width = like.shape
    batch, rows, columns, channels = dy.shape
    total: Any = 0
    for down in (0, 1):
        for right in (0, 1):
            expected = np.full((2, 2), 255, np.uint8)
            for a in (0, 1):
                for b in (0, 1):
                    row, column = _POSITION[a][down], _POSITION[b][right]
                    if row is not None and column is not None:
                        expected[a, b] = 3 * row + column

            def windows(values: jax.Array, down: int = down, right: int = right) -> jax.Array:
                pads = ((0, 0, 0), (-down, down, 0), (-right, right, 0), (0, 0, 0))
                shifted = lax.pad(values, np.zeros((), values.dtype), pads)
                return shifted[:, :, None, :, None]

            wide = windows(dy).astype(jnp.promote_types(dy.dtype, jnp.float32))
            total += jnp.where(windows(index) == expected[:, None, :, None], wide, 0)
    pixels = total.reshape(batch, 2 * rows, 2 * columns, channels)
    return pixels[:, :height, :width].astype(dy.dtype)


def filter_by_taps(images: jax.Array, coefficients: np.ndarray, equation: str) -> jax.Array:
    """Applies one pass of Pillow's resize as a sum over the two or three pixels that each output pixel depends on.

    In int32, because 22-bit coefficients that sum to one and 8-bit pixels need 31 bits. XLA fuses both passes and the
    normalisation into one kernel; as products they are five, with int32 arrays between them.
    """
    axis = {"nhwc,vw->nhvc": 2, "nhwc,uh->nuwc": 1}[equation]
    used = coefficients != 0
    taps = int(used.sum(1).max())
    first = np.minimum(used.argmax(1), coefficients.shape[1] - taps)
    total: Any = 1 << (PRECISION_BITS - 1)
    for tap in range(taps):
        factor = coefficients[np.arange(len(first)), first + tap]
        shape = [1] * images.ndim
        shape[axis] = -1
        pixels = jnp.take(images, first + tap, axis=axis).astype(jnp.int32)
        total += pixels * factor.reshape(shape)
    return jnp.clip(total >> PRECISION_BITS, 0, 255).astype(jnp.float32)


FORMULATIONS: dict[str, Callable[[], None]] = {
    "stem_channels_4": lambda: _replace_stem(partial(pad_image_channels, channels=4, stride=2)),
    "stem_channels_8": lambda: _replace_stem(partial(pad_image_channels, channels=8, stride=2)),
    "stem_blocks_16": lambda: _replace_stem(partial(convolve_blocks, channels=16)),
    "pool_elementwise": lambda: vars(pool).update(_max_pool_gradient=pool_gradient),
    "resize_by_taps": lambda: vars(preprocessing).update(_filter=filter_by_taps),
}
