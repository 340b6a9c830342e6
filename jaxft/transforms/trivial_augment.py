"""TrivialAugment (Müller and Hutter 2021, arXiv:2103.10158): one random operation of random strength per image.

The operations, their strengths and their effect on pixels equal torchvision's TrivialAugmentWide applied to Pillow
images. Images are float32 (H, W, 3) in 0..255. A level is in [-1, 1], for some operations in [0, 1].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

LEVELS = 31
LARGEST_SHEAR = 0.99
LARGEST_SHIFT = 32 / 224  # of the side
LARGEST_ANGLE = 135  # degrees
LARGEST_FACTOR = 0.99  # brightness, colour, contrast and sharpness change by a factor of 1 + or - this


def trivial_augment(images: jax.Array, keys: jax.Array, fill: ArrayLike) -> jax.Array:
    """Applies one random operation to each image (N, H, W, 3), drawn from its key (N,).

    fill: the colour (3,) of pixels that a geometric operation uncovers.
    """

    def changed(image: jax.Array, key: jax.Array) -> jax.Array:
        chance = jax.random.uniform(key, (3,))  # in [0, 1)
        operation = jnp.floor(chance[0] * len(OPERATIONS)).astype(jnp.int32)
        level = jnp.floor(chance[1] * LEVELS) / (LEVELS - 1)
        signed = jnp.where(chance[2] < 0.5, level, -level)
        return apply_operation(image, operation, level, signed, fill)

    return jax.vmap(changed)(images, keys)


def apply_operation(
    image: jax.Array, operation: ArrayLike, level: ArrayLike, signed: ArrayLike, fill: ArrayLike
) -> jax.Array:
    """Applies the operation with this index in OPERATIONS."""
    moved = warp(image, jax.lax.switch(operation, MATRICES, signed, *image.shape[:2]), fill)
    return jax.lax.switch(operation, COLOURS, moved, level, signed)


def warp(image: jax.Array, matrix: jax.Array, fill: ArrayLike) -> jax.Array:
    """Samples the nearest pixel at matrix (2, 3) @ (x, y, 1), in pixels from the upper left (Pillow's AFFINE)."""
    height, width, _ = image.shape
    x, y = jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5)
    column, row = (jnp.floor(a * x + b * y + c).astype(jnp.int32) for a, b, c in matrix)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixels = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
    return jnp.where(inside[..., None], pixels, jnp.asarray(fill, image.dtype))


def _matrix(*values: ArrayLike) -> jax.Array:
    return jnp.stack([jnp.asarray(value, jnp.float32) for value in values]).reshape(2, 3)


def _no_motion(level: jax.Array, height: int, width: int) -> jax.Array:
    return _matrix(1, 0, 0, 0, 1, 0)


def _shear_x(level: jax.Array, height: int, width: int) -> jax.Array:
    return _matrix(1, level * LARGEST_SHEAR, 0, 0, 1, 0)


def _shear_y(level: jax.Array, height: int, width: int) -> jax.Array:
    return _matrix(1, 0, 0, level * LARGEST_SHEAR, 1, 0)


def _translate_x(level: jax.Array, height: int, width: int) -> jax.Array:
    return _matrix(1, 0, -jnp.trunc(level * LARGEST_SHIFT * width), 0, 1, 0)


def _translate_y(level: jax.Array, height: int, width: int) -> jax.Array:
    return _matrix(1, 0, 0, 0, 1, -jnp.trunc(level * LARGEST_SHIFT * height))


def _rotate(level: jax.Array, height: int, width: int) -> jax.Array:
    """Rotates counter-clockwise about the centre."""
    angle = jnp.deg2rad(level * LARGEST_ANGLE)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2, height / 2
    return _matrix(cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def _blend(image: jax.Array, other: jax.Array, signed: jax.Array) -> jax.Array:
    """Blends from `other` (at -1) to the image (at 0) and extrapolates up to 1, as Pillow's ImageEnhance."""
    return jnp.clip(other + (1 + signed * LARGEST_FACTOR) * (image - other), 0, 255)


def _grey(image: jax.Array) -> jax.Array:
    weights = jnp.array([0.299, 0.587, 0.114])
    return jnp.round(jnp.dot(image, weights, precision=jax.lax.Precision.HIGHEST))[..., None]


def _same(image: jax.Array, level: jax.Array, signed: jax.Array) -> jax.Array:
    return image


def _brightness(image: jax.Array, level: jax.Array, signed: jax.Array) -> jax.Array:
    return _blend(image, jnp.zeros_like(image), signed)


def _colour(image: jax.Array, level: jax.Array, signed: jax.Array) -> jax.Array:
    return _blend(image, _grey(image), signed)


def _contrast(image: jax.Array, level: jax.Array, signed: jax.Array) -> jax.Array:
    return _blend(image, jnp.round(_grey(image).mean()), signed)


def _sharpness(image: jax.Array, level: jax.Array, signed: jax.Array) -> jax.Array:
    """Blends with the image smoothed by ((1, 1, 1), (1, 5, 1), (1, 1, 1)) / 13; border pixels are not smoothed."""
    rows = image[:-2] + image[1:-1] + image[2:]
    nine = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    inner = jnp.round((nine + 4 * image[1:-1, 1:-1]) / 13)
    return _blend(image, image.at[1:-1, 1:-1].set(inner), signed)


def _posterize(image: jax.Array, level: jax.Array, signed: jax.Array) -> jax.Array:
    """Keeps the 8 to 2 highest bits."""
    step = 2 ** jnp.round(6 * level)
    return jnp.floor(jnp.round(image) / step) * step


def _solarize(image: jax.Array, level: jax.Array, signed: jax.Array) -> jax.Array:
    """Inverts all values at or above a threshold."""
    return jnp.where(image < 255 * (1 - level), image, 255 - image)


def _autocontrast(image: jax.Array, level: jax.Array, signed: jax.Array) -> jax.Array:
    """Stretches each channel to the full range."""
    low, high = image.min((0, 1)), image.max((0, 1))
    return jnp.where(high > low, (image - low) * 255 / jnp.maximum(high - low, 1), image)


def _equalize(image: jax.Array, level: jax.Array, signed: jax.Array) -> jax.Array:
    """Equalises the histogram of each channel, as Pillow's ImageOps.equalize."""

    def channel(values: jax.Array) -> jax.Array:
        histogram = jnp.zeros(256, jnp.int32).at[values].add(1)
        step = (values.size - histogram[values.max()]) // 255
        table = (step // 2 + jnp.cumsum(histogram) - histogram) // jnp.maximum(step, 1)
        return jnp.where(step > 0, jnp.clip(table, 0, 255)[values], values)

    values = jnp.round(image).astype(jnp.int32)
    return jax.vmap(channel, -1, -1)(values).astype(image.dtype)


Motion = Callable[[jax.Array, int, int], jax.Array]
Colour = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


OPERATIONS: dict[str, tuple[Motion, Colour]] = {  # keyed by torchvision's names
    "Identity": (_no_motion, _same),
    "ShearX": (_shear_x, _same),
    "ShearY": (_shear_y, _same),
    "TranslateX": (_translate_x, _same),
    "TranslateY": (_translate_y, _same),
    "Rotate": (_rotate, _same),
    "Brightness": (_no_motion, _brightness),
    "Color": (_no_motion, _colour),
    "Contrast": (_no_motion, _contrast),
    "Sharpness": (_no_motion, _sharpness),
    "Posterize": (_no_motion, _posterize),
    "Solarize": (_no_motion, _solarize),
    "AutoContrast": (_no_motion, _autocontrast),
    "Equalize": (_no_motion, _equalize),
}


MATRICES = [motion for motion, _ in OPERATIONS.values()]
COLOURS = [colour for _, colour in OPERATIONS.values()]
