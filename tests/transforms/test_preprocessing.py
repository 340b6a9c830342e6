"""Preprocessing, compared with Pillow and torchvision's transforms."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxft.data import datasets
from jaxft.transforms import preprocessing
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, epoch_image_size, preprocess
from tests.helpers.reference import torchvision

resize = jax.jit(preprocessing.resize, static_argnums=(1, 2))


def pillow_resize(images: np.ndarray, size: int) -> np.ndarray:
    resized = [Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image) for image in resized])


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(0, 2**32 - 1))
def test_resize_of_any_square_equals_pillow(side: int, size: int, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (1, side, side, 3), np.uint8)
    np.testing.assert_array_equal(resize(images, size, size), pillow_resize(images, size))


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 80), st.integers(0, 2**32 - 1))
def test_resize_of_any_rectangle_is_within_one_level_of_pillow(height: int, width: int, size: int, seed: int) -> None:
    """From version 13 on, Pillow reduces the height of some rectangles first, which rounds differently."""
    images = np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), np.uint8)
    np.testing.assert_allclose(resize(images, size, size), pillow_resize(images, size), rtol=0, atol=1)


@pytest.mark.parametrize("size", [224, 97, 16])
def test_resize_of_photos_equals_pillow(size: int) -> None:
    images = datasets.load("sample:cifar10", "test").image[::50]
    np.testing.assert_array_equal(resize(images, size, size), pillow_resize(images, size))


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


def test_image_size_grows_over_the_epochs() -> None:
    assert [epoch_image_size(0, 224, epoch, 3) for epoch in (1, 2, 3)] == [224, 224, 224]
    assert [epoch_image_size(128, 224, epoch, 5) for epoch in range(1, 6)] == [140, 140, 168, 196, 224]
    assert epoch_image_size(128, 224, 1, 1) == 224


def test_a_few_image_sizes_have_equal_shares_of_the_epochs() -> None:
    def sizes(num_epochs: int, num_sizes: int) -> list[int]:
        return [epoch_image_size(112, 224, epoch, num_epochs, num_sizes) for epoch in range(1, num_epochs + 1)]

    assert sizes(6, 2) == [112, 112, 112, 224, 224, 224]
    assert sizes(7, 3) == [112, 112, 112, 168, 168, 224, 224]
    assert sizes(2, 5) == sizes(2, 0) == [112, 224]
    assert sizes(3, 1) == [224, 224, 224]
    assert epoch_image_size(0, 224, 1, 4, 2) == 224
