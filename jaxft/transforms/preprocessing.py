"""Turns uint8 images into network inputs: pure functions that run inside the jitted step."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

_PRECISION_BITS = 22  # in Pillow's fixed-point coefficients (Resample.c: 32 - 8 - 2)
_LOW_BITS = 11


class Preprocessing(NamedTuple):
    """Image size and normalisation of a network's input; stored with weights and checkpoints."""

    image_size: int  # pixels: the shorter side after resizing, and the side of the central crop
    mean: tuple[float, float, float]  # per RGB channel, for values in [0, 1]
    std: tuple[float, float, float]


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def epoch_image_size(first: int, last: int, epoch: int, num_epochs: int) -> int:
    """Returns the image size of an epoch (1 to num_epochs): linear from `first` to `last`, in steps of `last` / 8.

    first = 0 means `last` in every epoch. Small images in early epochs save time at little cost in accuracy (Tan and
    Le 2021, EfficientNetV2).
    """
    if not first or num_epochs == 1:
        return last
    size = first + (last - first) * (epoch - 1) / (num_epochs - 1)
    eighth = last / 8
    return round(round(size / eighth) * eighth)


def resize_coefficients(size_in: int, size_out: int) -> np.ndarray:
    """Returns Pillow's bilinear filter along one side: int32 (size_out, size_in), rows summing to about 2^22.

    The filter is a triangle that widens with the scale when shrinking (antialiasing) and spans two neighbours when
    growing.
    Source: precompute_coeffs and normalize_coeffs_8bpc in Pillow's Resample.c.
    """
    scale = size_in / size_out
    support = max(scale, 1.0)
    centre = (np.arange(size_out) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(int), 0)
    last = np.minimum((centre + support + 0.5).astype(int), size_in)
    pixel = np.arange(size_in)
    weights = np.maximum(0, 1 - np.abs((pixel - centre[:, None] + 0.5) * (1 / support)))
    weights *= (pixel >= first[:, None]) & (pixel < last[:, None])
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # summed in Pillow's order
    return np.floor(0.5 + weights * 2**_PRECISION_BITS).astype(np.int32)


def _filter(images: jax.Array, coefficients: np.ndarray | jax.Array, equation: str) -> jax.Array:
    """Applies one pass of Pillow's resize and rounds to whole pixel values, bit for bit as Pillow does.

    The 22-bit coefficients are split into two halves. Their products with 8-bit pixels sum exactly in float32 (up to
    16-fold shrinking), so the work is two matrix products on any device.
    """
    product = partial(jnp.einsum, equation, images, precision=jax.lax.Precision.HIGHEST)
    high = product(jnp.asarray(coefficients >> _LOW_BITS, jnp.float32)).astype(jnp.int32)
    low = product(jnp.asarray(coefficients & (2**_LOW_BITS - 1), jnp.float32)).astype(jnp.int32)
    total = (high << _LOW_BITS) + low + (1 << (_PRECISION_BITS - 1))
    return jnp.clip(total >> _PRECISION_BITS, 0, 255).astype(jnp.float32)


def resize(images: ArrayLike, height: int, width: int) -> jax.Array:
    """Resizes uint8 (N, H, W, 3) to float32 (N, height, width, 3) with whole values in 0..255, as Pillow's BILINEAR.

    Equals Pillow bit for bit, except for some rectangles whose sides Pillow 13 resizes in the other order.
    """
    images = jnp.asarray(images, jnp.float32)
    _, old_height, old_width, _ = images.shape
    if width != old_width:
        images = _filter(images, resize_coefficients(old_width, width), "nhwc,vw->nhvc")
    if height != old_height:
        images = _filter(images, resize_coefficients(old_height, height), "nhwc,uh->nuwc")
    return images


def resize_and_crop(images: ArrayLike, size: int) -> jax.Array:
    """Resizes the shorter side to `size` and crops the centre: torchvision's Resize(size) and CenterCrop(size)."""
    _, height, width, _ = jnp.shape(images)
    shorter = min(height, width)
    images = resize(images, int(size * height / shorter), int(size * width / shorter))
    top, left = (round((side - size) / 2) for side in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def resize_and_crop_any(images: jax.Array, size: int) -> jax.Array:
    """Does the same as resize_and_crop for heights and widths unknown at trace time (jax.export's symbolic shapes)."""
    _, height, width, _ = images.shape
    shorter = jnp.minimum(jnp.asarray(height), jnp.asarray(width))
    pixels = images.astype(jnp.float32)
    pixels = _filter(pixels, _central_coefficients(width, shorter, size), "nhwc,vw->nhvc")
    return _filter(pixels, _central_coefficients(height, shorter, size), "nhwc,uh->nuwc")


def _central_coefficients(size_in: Any, shorter: jax.Array, size: int) -> jax.Array:
    """Returns the rows of resize_coefficients that the central crop keeps, int32 (size, size_in)."""
    with jax.enable_x64(True):  # float32 is too coarse for 22 bits
        side = jnp.asarray(size_in, jnp.float64)
        size_out = jnp.floor(size * side / shorter)
        row = jnp.arange(size) + jnp.round((size_out - size) / 2)
        scale = side / size_out
        support = jnp.maximum(scale, 1.0)
        centre = ((row + 0.5) * scale)[:, None]
        first = jnp.maximum(jnp.floor(centre - support + 0.5), 0)
        last = jnp.minimum(jnp.floor(centre + support + 0.5), side)
        pixel = jnp.arange(size_in, dtype=jnp.float64)
        weights = jnp.maximum(0, 1 - jnp.abs((pixel - centre + 0.5) * (1 / support)))
        weights *= (pixel >= first) & (pixel < last)
        weights /= weights.sum(1, keepdims=True)
        return jnp.floor(0.5 + weights * 2**_PRECISION_BITS).astype(jnp.int32)


def preprocess(images: ArrayLike, preprocessing: Preprocessing) -> jax.Array:
    """Resizes, crops and normalises uint8 (N, H, W, 3) to float32 (N, size, size, 3).

    Equals torchvision's Resize, CenterCrop, ToTensor and Normalize.
    """
    return normalize(resize_and_crop(images, preprocessing.image_size), preprocessing)


def normalize(pixels: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """Normalises pixels in 0..255 by the mean and standard deviation."""
    return (pixels / 255 - jnp.array(preprocessing.mean)) / jnp.array(preprocessing.std)
