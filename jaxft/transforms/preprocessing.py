"""uint8 pictures to the network's input: pure functions that run inside the jitted step."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

_PRECISION_BITS = 22  # of Pillow's fixed-point coefficients (Resample.c: 32 - 8 - 2)


_LOW_BITS = 11


class Preprocessing(NamedTuple):
    """What a picture goes through on its way to the network; kept with weights and checkpoints."""

    image_size: int  # pixels; of a rectangle, the central square
    mean: tuple[float, float, float]  # of the RGB channels in [0, 1]
    std: tuple[float, float, float]


IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


def epoch_image_size(first: int, last: int, epoch: int, num_epochs: int) -> int:
    """Pixels in an epoch, 1 to num_epochs: from `first` to `last` evenly, in eighths of `last`; first 0: `last`.

    Small pictures early cost little and lose little (Tan and Le 2021, EfficientNetV2).
    """
    if not first or num_epochs == 1:
        return last
    size = first + (last - first) * (epoch - 1) / (num_epochs - 1)
    eighth = last / 8
    return round(round(size / eighth) * eighth)


def resize_coefficients(size_in: int, size_out: int) -> np.ndarray:
    """Pillow's bilinear filter along one side as an int32 matrix (size_out, size_in); rows sum to about 2^22.

    A triangle as wide as the scale when shrinking (antialiased), two neighbours when growing.
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
    """One pass of Pillow's resize, rounded to whole pixel values as Pillow does, with no error at all.

    The 22-bit coefficients are split into two halves whose products with 8-bit pixels are summed exactly in
    float32 (while a picture shrinks 16-fold at most), so that the work is two matrix products on any device.
    """
    product = partial(jnp.einsum, equation, images, precision=jax.lax.Precision.HIGHEST)
    high = product(jnp.asarray(coefficients >> _LOW_BITS, jnp.float32)).astype(jnp.int32)
    low = product(jnp.asarray(coefficients & (2**_LOW_BITS - 1), jnp.float32)).astype(jnp.int32)
    total = (high << _LOW_BITS) + low + (1 << (_PRECISION_BITS - 1))
    return jnp.clip(total >> _PRECISION_BITS, 0, 255).astype(jnp.float32)


def resize(images: ArrayLike, height: int, width: int) -> jax.Array:
    """uint8 (N, H, W, 3) to (N, height, width, 3), whole values 0..255 as float32: Pillow's BILINEAR.

    Bit for bit, but for some rectangles that Pillow 13 resizes in the other order of sides.
    """
    images = jnp.asarray(images, jnp.float32)
    _, old_height, old_width, _ = images.shape
    if width != old_width:
        images = _filter(images, resize_coefficients(old_width, width), "nhwc,vw->nhvc")
    if height != old_height:
        images = _filter(images, resize_coefficients(old_height, height), "nhwc,uh->nuwc")
    return images


def resize_and_crop(images: ArrayLike, size: int) -> jax.Array:
    """The shorter side to `size`, then the central square: torchvision's Resize(size) and CenterCrop(size)."""
    _, height, width, _ = jnp.shape(images)
    shorter = min(height, width)
    images = resize(images, int(size * height / shorter), int(size * width / shorter))
    top, left = (round((side - size) / 2) for side in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def resize_and_crop_any(images: jax.Array, size: int) -> jax.Array:
    """resize_and_crop where height and width are not known while tracing (jax.export's symbolic dimensions)."""
    _, height, width, _ = images.shape
    shorter = jnp.minimum(jnp.asarray(height), jnp.asarray(width))
    pixels = images.astype(jnp.float32)
    pixels = _filter(pixels, _central_coefficients(width, shorter, size), "nhwc,vw->nhvc")
    return _filter(pixels, _central_coefficients(height, shorter, size), "nhwc,uh->nuwc")


def _central_coefficients(size_in: Any, shorter: jax.Array, size: int) -> jax.Array:
    """The rows of resize_coefficients that the central square keeps, int32 (size, size_in)."""
    with jax.enable_x64(True):  # 22 bits are more than float32 can tell
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
    """uint8 (N, H, W, 3) to normalised float32 (N, size, size, 3).

    torchvision's Resize, CenterCrop, ToTensor and Normalize.
    """
    return normalize(resize_and_crop(images, preprocessing.image_size), preprocessing)


def normalize(pixels: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """0..255 to the network's input."""
    return (pixels / 255 - jnp.array(preprocessing.mean)) / jnp.array(preprocessing.std)
