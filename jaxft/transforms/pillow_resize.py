"""Pillow's resizing with a central crop, in NumPy: its filters and coefficients, and thin images without Pillow."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import PIL

PRECISION_BITS = 22  # in Pillow's fixed-point coefficients (Resample.c: 32 - 8 - 2)
TALL_BY_HEIGHT = int(PIL.__version__.split(".")[0]) >= 13  # resizes the height first if it is over twice the width


class Filter(NamedTuple):
    """A filter of Pillow's: its value at a distance from the output pixel's centre."""

    support: int  # distance from which on it is 0, in input pixels when growing and output pixels when shrinking
    kernel: Callable[[Any], Any]  # maps a NumPy or JAX array of distances, at least 0, to weights


def _triangle(x: Any) -> Any:
    return (1 - x).clip(0)


def _cubic(x: Any) -> Any:
    """Returns Keys's cubic convolution kernel with a = -0.5."""
    x = x.clip(0, 2)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return near * (x < 1) + far * (x >= 1)


# Taylor coefficients of sin(t) / t in t^2; up to t = pi the rest is below 1e-18.
_SINC = [(-1) ** k / math.factorial(2 * k + 1) for k in range(16)]


def _lanczos(x: Any) -> Any:
    """Returns sinc(x) * sinc(x / 3), as a polynomial because platforms differ in their sines.

    With t = pi * x / 3 and s = sin(t) / t it is s^2 * (1 - 4/3 * t^2 * s^2), since sin(3t) = 3 sin(t) - 4 sin(t)^3.
    """
    square = (x.clip(0, 3) * (math.pi / 3)) ** 2
    sinc: Any = 0.0
    for coefficient in reversed(_SINC):
        sinc = sinc * square + coefficient
    return sinc * sinc * (1 - 4 / 3 * square * sinc * sinc)


FILTERS = {"bilinear": Filter(1, _triangle), "bicubic": Filter(2, _cubic), "lanczos": Filter(3, _lanczos)}


def resize_coefficients(
    size_in: int, size_out: int, rows: range | None = None, interpolation: str = "bilinear"
) -> tuple[int, np.ndarray]:
    """Returns Pillow's filter along one side: int32 (size_out, size_in), rows summing to about 2^22.

    The filter widens with the scale when shrinking (antialiasing). rows: computes only these rows of the filter, and
    only the columns of the pixels that they depend on. Also returns the first of these pixels; without rows it is 0.
    Source: precompute_coeffs and normalize_coeffs_8bpc in Pillow's Resample.c.
    """
    support, kernel = FILTERS[interpolation]
    scale = size_in / size_out
    filter_scale = max(scale, 1.0)
    centre = (np.array(range(size_out) if rows is None else rows) + 0.5) * scale
    first = np.maximum((centre - support * filter_scale + 0.5).astype(int), 0)
    last = np.minimum((centre + support * filter_scale + 0.5).astype(int), size_in)
    start = int(first[0])
    pixel = np.arange(start, last[-1])
    weights = kernel(np.abs((pixel - centre[:, None] + 0.5) * (1 / filter_scale)))
    weights *= (pixel >= first[:, None]) & (pixel < last[:, None])
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # summed in Pillow's order
    weights *= 2**PRECISION_BITS
    return start, (weights + np.copysign(0.5, weights)).astype(np.int32)


def crop_start(side: Any, resize: int, size: int, round: Callable[[Any], Any] = round) -> Any:
    """Returns where the crop of `size` pixels begins along a side of at least `resize` pixels.

    It is the centre of the central square of `resize` pixels, because stored images are such squares.
    """
    return round((side - resize) / 2) + round((resize - size) / 2)


def resize_and_crop_thin(
    crop: Callable[[tuple[int, int, int, int]], np.ndarray],
    sides: tuple[int, int],
    size: int,
    interpolation: str = "bilinear",
) -> np.ndarray:
    """Resizes an image's shorter side to `size` and crops the centre: uint8 (size, size, 3).

    Equals Pillow's result, but computes only what the crop keeps. crop: returns the pixels of (left, top, right,
    bottom), uint8 (h, w, 3), of an image whose height and width are `sides`.
    """
    passes, bounds = [], []
    for axis, equation in ((1, "hwc,vw->hvc"), (0, "hwc,uh->uwc")):
        new = int(size * sides[axis] / min(sides))
        first = crop_start(new, size, size)
        start, coefficients = resize_coefficients(sides[axis], new, range(first, first + size), interpolation)
        passes.append((coefficients.astype(float), equation))
        bounds.append((start, start + coefficients.shape[1]))
    (left, right), (top, bottom) = bounds
    pixels = crop((left, top, right, bottom))
    if TALL_BY_HEIGHT and sides[0] > 2 * sides[1] and sides[1] > size:
        passes.reverse()
    for coefficients, equation in passes:
        total = np.einsum(equation, pixels.astype(float), coefficients, optimize=True)  # exact in float64
        pixels = np.clip(np.floor(total / 2**PRECISION_BITS + 0.5), 0, 255)
    return pixels.astype(np.uint8)


def central_square(image: np.ndarray, size: int) -> np.ndarray:
    """Crops the centre of an image (H, W, C) to (size, size, C)."""
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]
