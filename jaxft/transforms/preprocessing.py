"""Turns uint8 images into network inputs: pure functions that run inside the jitted step."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxft.transforms.pillow_resize import (
    FILTERS,
    PRECISION_BITS,
    TALL_BY_HEIGHT,
    crop_start,
    resize_coefficients,
)

_LOW_BITS = 7


class Preprocessing(NamedTuple):
    """Size, interpolation and normalisation of a network's input; stored with weights and checkpoints."""

    image_size: int  # pixels: the side of the central square that is cropped
    mean: tuple[float, float, float]  # per RGB channel, for values in [0, 1]
    std: tuple[float, float, float]
    resize: int = 0  # pixels of the shorter side before the central crop; 0: image_size; older checkpoints lack it
    interpolation: str = "bilinear"  # a key of FILTERS; older checkpoints lack it

    def at_size(self, image_size: int) -> "Preprocessing":
        """Returns the same for another image size: the crop keeps its share of the image."""
        return self._replace(image_size=image_size, resize=round(self.resize * image_size / self.image_size))

    @property
    def cropped_share(self) -> float:
        """The side of the central crop, relative to the shorter side of the image."""
        return self.image_size / self.resize if self.resize else 1.0


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def epoch_image_size(
    first: int, last: int, epoch: int, num_epochs: int, num_sizes: int = 0, multiple_of: int = 1
) -> int:
    """Returns the image size of an epoch (1 to num_epochs), which grows from `first` to `last` in steps of `last` / 8.

    num_sizes: that many sizes, each for an equal share of the epochs and `last` at the end; 0 means one per epoch.
    first = 0 means `last` in every epoch. Sizes are rounded to a multiple of `multiple_of`, as `last` must be. Small
    images in early epochs save time at little cost in accuracy (Tan and Le 2021, EfficientNetV2).
    """
    num_sizes = min(num_sizes or num_epochs, num_epochs)
    if not first or num_sizes == 1:
        return last
    size = first + (last - first) * ((epoch - 1) * num_sizes // num_epochs) / (num_sizes - 1)
    eighth = last / 8
    return max(round(round(round(size / eighth) * eighth) / multiple_of), 1) * multiple_of


def _filter(images: jax.Array, coefficients: np.ndarray | jax.Array, equation: str) -> jax.Array:
    """Applies one pass of Pillow's resize and rounds to whole pixel values, bit for bit as Pillow does.

    Splits each coefficient into its upper 16 and lower 7 bits, so that the work is two matrix products on any device.
    Their partial sums are whole numbers below 2^24, which float32 holds exactly. A row's absolute coefficients sum to
    at most 1.6 * 2^22 (Lanczos), so the upper parts to 1.6 * 2^15 and 1 for each negative one; a lower part is at most
    127. Times 255, this allows 518 pixels: shrinking 258-fold (bilinear), 129-fold (bicubic) or 86-fold (Lanczos).
    """
    product = partial(jnp.einsum, equation, images, precision=jax.lax.Precision.HIGHEST)
    high = product(jnp.asarray(coefficients >> _LOW_BITS, jnp.float32)).astype(jnp.int32)
    low = product(jnp.asarray(coefficients & (2**_LOW_BITS - 1), jnp.float32)).astype(jnp.int32)
    total = (high << _LOW_BITS) + low + (1 << (PRECISION_BITS - 1))
    return jnp.clip(total >> PRECISION_BITS, 0, 255).astype(jnp.float32)


def resize(images: ArrayLike, height: int, width: int, interpolation: str = "bilinear") -> jax.Array:
    """Resizes uint8 (N, H, W, 3) to float32 (N, height, width, 3) with whole values in 0..255.

    Equals Pillow bit for bit, except for some rectangles whose sides Pillow 13 resizes in the other order.
    """
    images = jnp.asarray(images, jnp.float32)
    _, old_height, old_width, _ = images.shape
    if width != old_width:
        images = _filter(images, resize_coefficients(old_width, width, None, interpolation)[1], "nhwc,vw->nhvc")
    if height != old_height:
        images = _filter(images, resize_coefficients(old_height, height, None, interpolation)[1], "nhwc,uh->nuwc")
    return images


def resize_and_crop(images: ArrayLike, size: int, resize: int = 0, interpolation: str = "bilinear") -> jax.Array:
    """Resizes the shorter side to `resize` (0: `size`) and crops the central square of `size` pixels.

    Equals torchvision's Resize(resize, interpolation) and CenterCrop(size); if resize - size is not a multiple of 4, up
    to a shift by one pixel. Only the pixels that the crop keeps are computed, so the memory does not depend on the
    longer side.
    """
    images = jnp.asarray(images, jnp.float32)
    _, height, width, _ = images.shape
    shorter = min(height, width)
    resize = resize or size
    passes = []
    for axis, equation in ((2, "nhwc,vw->nhvc"), (1, "nhwc,uh->nuwc")):
        old = images.shape[axis]
        new = int(resize * old / shorter)
        first = crop_start(new, resize, size)
        if new == old:
            images = jax.lax.slice_in_dim(images, first, first + size, axis=axis)
            continue
        start, coefficients = resize_coefficients(old, new, range(first, first + size), interpolation)
        images = jax.lax.slice_in_dim(images, start, start + coefficients.shape[1], axis=axis)
        passes.append((coefficients, equation))
    if TALL_BY_HEIGHT and height > 2 * width and shorter > resize:
        passes.reverse()
    for coefficients, equation in passes:
        images = _filter(images, coefficients, equation)
    return images


def resize_and_crop_any(
    images: jax.Array,
    size: int,
    resize: int = 0,
    stored_size: int = 0,
    interpolation: str = "bilinear",
    *,
    tall_by_height: bool = False,
) -> jax.Array:
    """Resizes and crops as `resize_and_crop` does, for symbolic heights and widths (jax.export).

    stored_size: first shrinks larger images to central squares of this side, as a run with data.stored_size does; 0:
    never. tall_by_height: resizes the height first if it is over twice the width, as Pillow does since version 13.
    """
    shorter = _shorter(images)
    resize_any = partial(_resize_any, interpolation=interpolation, tall_by_height=tall_by_height)

    def at_once(images: jax.Array) -> jax.Array:
        return resize_any(images, size, resize or size)

    def in_two_steps(images: jax.Array) -> jax.Array:
        return resize_and_crop(resize_any(images, stored_size, stored_size), size, resize, interpolation)

    if not stored_size:
        return at_once(images)
    return jax.lax.cond(shorter > stored_size, in_two_steps, at_once, images)


def _shorter(images: jax.Array) -> jax.Array:
    """Returns the length of the shorter side as an array, since it may be unknown at trace time."""
    return jnp.minimum(*(jnp.asarray(side, jnp.int32) for side in images.shape[1:3]))


def _resize_any(images: jax.Array, size: int, resize: int, *, interpolation: str, tall_by_height: bool) -> jax.Array:
    """Resizes uint8 (N, H, W, 3) to float32 (N, size, size, 3), reading only the pixels that the crop depends on."""
    _, height, width, _ = images.shape
    shorter = _shorter(images)
    # An upper bound of the pixels that the crop spans, with the filter's support at both ends.
    span = jax.core.min_dim(height, width)
    span += 4 * FILTERS[interpolation].support * (span // resize + 1) + 4
    part, coefficients = images, {}
    for axis in (1, 2):
        side = part.shape[axis]
        first, coefficients[axis] = _central_coefficients(
            side, jax.core.min_dim(side, span), shorter, size, resize, interpolation
        )
        part = jax.lax.dynamic_slice_in_dim(part, first, coefficients[axis].shape[1], axis)
    part = part.astype(jnp.float32)

    def by_width(part: jax.Array) -> jax.Array:
        return _filter(_filter(part, coefficients[2], "nhwc,vw->nhvc"), coefficients[1], "nhwc,uh->nuwc")

    def by_height(part: jax.Array) -> jax.Array:
        return _filter(_filter(part, coefficients[1], "nhwc,uh->nuwc"), coefficients[2], "nhwc,vw->nhvc")

    if not tall_by_height:
        return by_width(part)
    tall = jnp.asarray(height, jnp.int32) > 2 * jnp.asarray(width, jnp.int32)
    return jax.lax.cond(tall & (shorter > resize), by_height, by_width, part)


def _central_coefficients(
    size_in: Any, span: Any, shorter: jax.Array, size: int, resize: int, interpolation: str
) -> tuple[jax.Array, jax.Array]:
    """Returns the first pixel that the central crop depends on, and its rows of resize_coefficients from there on.

    The rows are int32 (size, span).
    """
    with jax.enable_x64(True):  # float32 is too coarse for 22 bits
        side = jnp.asarray(size_in, jnp.float64)
        size_out = jnp.floor(resize * side / shorter)
        row = jnp.arange(size) + crop_start(size_out, resize, size, jnp.round)
        scale = side / size_out
        support, kernel = FILTERS[interpolation]
        filter_scale = jnp.maximum(scale, 1.0)
        centre = ((row + 0.5) * scale)[:, None]
        first = jnp.maximum(jnp.floor(centre - support * filter_scale + 0.5), 0)
        last = jnp.minimum(jnp.floor(centre + support * filter_scale + 0.5), side)
        start = jnp.minimum(first[0, 0], side - jnp.asarray(span, jnp.float64))
        pixel = start + jnp.arange(span, dtype=jnp.float64)
        weights = kernel(jnp.abs((pixel - centre + 0.5) * (1 / filter_scale)))
        weights *= (pixel >= first) & (pixel < last)
        weights /= weights.sum(1, keepdims=True)
        rounded = jnp.floor(0.5 + jnp.abs(weights) * 2**PRECISION_BITS)
        return start.astype(jnp.int32), jnp.where(weights < 0, -rounded, rounded).astype(jnp.int32)


def preprocess(images: ArrayLike, preprocessing: Preprocessing) -> jax.Array:
    """Resizes, crops and normalises uint8 (N, H, W, 3) to float32 (N, size, size, 3).

    Equals torchvision's Resize, CenterCrop, ToTensor and Normalize.
    """
    size, _, _, resize, interpolation = preprocessing
    return normalize(resize_and_crop(images, size, resize, interpolation), preprocessing)


def normalize(pixels: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """Normalises pixels in 0..255 by the mean and standard deviation."""
    return (pixels / 255 - jnp.array(preprocessing.mean)) / jnp.array(preprocessing.std)
