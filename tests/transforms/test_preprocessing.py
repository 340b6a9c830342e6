"""Preprocessing, compared with Pillow and with torchvision's and timm's transforms."""

import math
from functools import reduce
from importlib import import_module
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxft.data import datasets
from jaxft.transforms import preprocessing
from jaxft.transforms.pillow_resize import FILTERS, crop_start, resize_coefficients
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, epoch_image_size, preprocess
from tests.helpers.reference import torchvision

resize = jax.jit(preprocessing.resize, static_argnums=(1, 2, 3))
filters = pytest.mark.parametrize("interpolation", FILTERS)


def pillow_resize(images: np.ndarray, size: int, interpolation: str = "bilinear") -> np.ndarray:
    resized = [Image.fromarray(image).resize((size, size), Image.Resampling[interpolation.upper()]) for image in images]
    return np.stack([np.asarray(image) for image in resized])


def random_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns uint8 (height, width, 3): noise, or only 0 and 255, at which negative weights overshoot most."""
    values = [range(256), (0, 255)][rng.integers(2)]
    return rng.choice(np.array(values, np.uint8), (height, width, 3))


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from([*FILTERS]), st.integers(0, 2**32 - 1))
def test_resize_of_any_square_equals_pillow(side: int, size: int, interpolation: str, seed: int) -> None:
    images = random_image(np.random.default_rng(seed), side, side)[None]
    expected = pillow_resize(images, size, interpolation)
    np.testing.assert_array_equal(resize(images, size, size, interpolation), expected)


def pillows_coefficients(size_in: int, size_out: int, interpolation: str) -> np.ndarray:
    """Returns the coefficients as Pillow's Resample.c computes them, with C's sine."""

    def cubic(x: float) -> float:
        near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
        return near if x < 1 else far if x < 2 else 0.0

    def sinc(x: float) -> float:
        return math.sin(x * math.pi) / (x * math.pi) if x else 1.0

    def weight(x: float) -> float:
        if interpolation == "lanczos":
            return sinc(x) * sinc(x / 3) if x < 3 else 0.0
        return cubic(x) if interpolation == "bicubic" else max(1 - x, 0.0)

    scale = size_in / size_out
    support = FILTERS[interpolation].support * max(scale, 1)
    rows = np.zeros((size_out, size_in), int)
    for i, row in enumerate(rows):
        centre = (i + 0.5) * scale
        span = range(max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), size_in))
        weights = [weight(abs(x - centre + 0.5) * (1 / max(scale, 1))) for x in span]
        total = reduce(add, weights)  # sum() is more exact from Python 3.12 on
        row[list(span)] = [int(w / total * 2**22 + math.copysign(0.5, w)) for w in weights]
    return rows


@filters
def test_coefficients_equal_pillows(interpolation: str) -> None:
    """Up- and downscaling, also by large factors, and sides of few pixels."""
    highs = [[60, 60]] * 40 + [[4, 300]] * 10 + [[900, 9]] * 10
    for size_in, size_out in np.random.default_rng(0).integers(1, highs).tolist():
        _, found = resize_coefficients(size_in, size_out, None, interpolation)
        np.testing.assert_array_equal(found, pillows_coefficients(size_in, size_out, interpolation))


@filters
def test_coefficients_of_exported_files_equal_those_of_the_host(interpolation: str) -> None:
    """They are computed on the device, since an exported file takes images of any size: here 200 sides."""
    size, resize, span = 40, 46, 1000

    @jax.jit
    def on_device(side: jax.Array, shorter: jax.Array) -> tuple[jax.Array, jax.Array]:
        return preprocessing._central_coefficients(side, span, shorter, size, resize, interpolation)

    for sides in np.random.default_rng(0).integers(1, [[1000, 1000], [200, 200]] * 50):
        shorter, longer = sorted(sides.tolist())
        for side in (shorter, min(longer, 5 * shorter)):
            new = int(resize * side / shorter)
            first = crop_start(new, resize, size)
            start, expected = resize_coefficients(side, new, range(first, first + size), interpolation)
            offset, found = on_device(jnp.int32(side), jnp.int32(shorter))  # offset < 0 if side < span
            whole = np.zeros((size, span + 2000), int)
            whole[:, 1000 + start :][:, : expected.shape[1]] = expected
            np.testing.assert_array_equal(found, whole[:, 1000 + int(offset) :][:, :span])


@pytest.mark.parametrize(("interpolation", "factor"), [("bilinear", 258), ("bicubic", 129), ("lanczos", 86)])
def test_sums_are_exact_up_to_the_largest_factor(interpolation: str, factor: int) -> None:
    _, coefficients = resize_coefficients(7 * factor, 7, None, interpolation)
    assert (coefficients[3] != 0).sum() > 500
    for lit in (coefficients[3] == coefficients[3], coefficients[3] > 0, coefficients[3] & 127 > 63):
        pixels = np.where(lit, 255, 0)
        expected = (coefficients @ pixels + 2**21) >> 22
        found = preprocessing._filter(jnp.float32(pixels[None, None, :, None]), coefficients, "nhwc,vw->nhvc")
        np.testing.assert_array_equal(found[0, 0, :, 0], expected.clip(0, 255))


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 80), st.integers(0, 2**32 - 1))
def test_resize_of_any_rectangle_is_within_one_level_of_pillow(height: int, width: int, size: int, seed: int) -> None:
    """From version 13 on, Pillow reduces the height of some rectangles first, which rounds differently."""
    images = np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), np.uint8)
    np.testing.assert_allclose(resize(images, size, size), pillow_resize(images, size), rtol=0, atol=1)


@pytest.mark.parametrize(("size", "interpolation"), [(224, "bicubic"), (97, "lanczos"), (16, "bilinear")])
def test_resize_of_photos_equals_pillow(size: int, interpolation: str) -> None:
    images = datasets.load("sample:cifar10", "test").image[::50]
    expected = pillow_resize(images, size, interpolation)
    np.testing.assert_array_equal(resize(images, size, size, interpolation), expected)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 224), (32, 32, 97), (64, 64, 24), (24, 32, 64), (32, 21, 20), (45, 30, 30)]
)
def test_preprocess_matches_torchvisions_transform(height: int, width: int, size: int) -> None:
    """Compares photos resized to the shape: at most one of 255 levels off, and that in few pixels."""
    originals = datasets.load("sample:cifar10", "test").image[::100]
    images = np.stack([np.asarray(Image.fromarray(image).resize((width, height))) for image in originals])
    transforms = torchvision.transforms
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    expected = np.stack([transform(Image.fromarray(image)).numpy().transpose(1, 2, 0) for image in images])
    ours = jax.jit(preprocess, static_argnums=1)(images, Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD))
    difference = np.abs(ours - expected) * np.array(IMAGENET_STD)  # before normalisation
    assert difference.max() <= (1 + 1e-4) / 255
    assert difference.mean() <= 0.1 / 255
    if height == width:
        assert difference.max() <= 1e-6


def test_preprocess_equals_timms_evaluation() -> None:
    """Compares wide images, images more than twice as tall as wide, and images smaller than the crop."""
    timm_data = import_module("timm.data")
    transform = timm_data.create_transform(
        (3, 56, 56), interpolation="bicubic", crop_pct=0.875, mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    kind = Preprocessing(56, IMAGENET_MEAN, IMAGENET_STD, 64, "bicubic")
    rng = np.random.default_rng(0)
    for height, width in [(70, 101), (150, 71), (30, 30)]:
        image = random_image(rng, height, width)
        expected = transform(Image.fromarray(image)).numpy().transpose(1, 2, 0)
        ours = jax.jit(preprocess, static_argnums=1)(image[None], kind)[0]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)  # of steps of 1/255/0.225


def test_image_size_grows_over_the_epochs() -> None:
    assert [epoch_image_size(0, 224, epoch, 3) for epoch in (1, 2, 3)] == [224, 224, 224]
    assert [epoch_image_size(128, 224, epoch, 5) for epoch in range(1, 6)] == [140, 140, 168, 196, 224]
    assert epoch_image_size(128, 224, 1, 1) == 224
    assert [epoch_image_size(128, 224, epoch, 5, 0, 16) for epoch in range(1, 6)] == [144, 144, 160, 192, 224]
    assert epoch_image_size(3, 224, 1, 5, 0, 16) == 16


def test_a_few_image_sizes_have_equal_shares_of_the_epochs() -> None:
    def sizes(num_epochs: int, num_sizes: int) -> list[int]:
        return [epoch_image_size(112, 224, epoch, num_epochs, num_sizes) for epoch in range(1, num_epochs + 1)]

    assert sizes(6, 2) == [112, 112, 112, 224, 224, 224]
    assert sizes(7, 3) == [112, 112, 112, 168, 168, 224, 224]
    assert sizes(2, 5) == sizes(2, 0) == [112, 224]
    assert sizes(3, 1) == [224, 224, 224]
    assert epoch_image_size(0, 224, 1, 4, 2) == 224
