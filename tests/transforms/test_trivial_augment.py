"""The operations of TrivialAugment, compared with torchvision's on Pillow images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxft.data import datasets
from jaxft.transforms.trivial_augment import LEVELS, OPERATIONS, apply_operation, trivial_augment
from tests.helpers.reference import torchvision

pytestmark = pytest.mark.usefixtures("compile_quickly")

autoaugment = torchvision.transforms.autoaugment
NEAREST = torchvision.transforms.InterpolationMode.NEAREST

SIDE = 224  # torchvision's largest shift is 32 pixels, ours 32 / 224 of the side


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Returns a photo, a nearly black one, an image of two greys and one of a single colour."""
    photo = Image.fromarray(datasets.load("sample:cifar10", "test").image[5]).resize((SIDE, SIDE))
    greys = Image.fromarray(
        np.random.default_rng(0).choice(np.array([60, 190], np.uint8), (SIDE, SIDE, 1)).repeat(3, 2)
    )
    return [photo, photo.point(lambda value: value // 20), greys, Image.new("RGB", (SIDE, SIDE), (200, 30, 7))]


def test_the_operations_are_those_of_torchvision() -> None:
    strengths = autoaugment.TrivialAugmentWide()._augmentation_space(LEVELS)
    assert list(OPERATIONS) == list(strengths)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("step", [0, 1, 14, 30])
@pytest.mark.parametrize("sign", [1, -1])
def test_each_operation_matches_torchvision(name: str, step: int, sign: int, images: list[Image.Image]) -> None:
    strengths, signed = autoaugment.TrivialAugmentWide()._augmentation_space(LEVELS)[name]
    strength = float(strengths[step]) if strengths.ndim else 0.0
    for image in images:
        theirs = autoaugment._apply_op(image, name, strength * (sign if signed else 1), NEAREST, [1, 2, 3])
        ours = apply_operation(
            jnp.asarray(image, jnp.float32),
            list(OPERATIONS).index(name),
            jnp.float32(step / (LEVELS - 1)),
            jnp.float32(sign * step / (LEVELS - 1)),
            jnp.array([1.0, 2.0, 3.0]),
        )
        difference = np.abs(np.asarray(ours) - np.asarray(theirs, np.float32)).max(-1)
        # Pillow rounds to integers and computes coordinates in fixed point, so a pixel may come from its neighbour:
        # after a rotation by 135 degrees along whole diagonals, whose coordinates lie halfway between pixels.
        neighbours = {"ShearX": 0.002, "ShearY": 0.002, "Rotate": 0.005 if step == LEVELS - 1 else 0.002}
        assert (difference > 1.001).mean() <= neighbours.get(name, 0), name


def test_each_image_gets_its_own_operation() -> None:
    images = jnp.asarray(datasets.load("sample:cifar10", "test").image[:1].repeat(400, 0), jnp.float32)
    changed = np.asarray(jax.jit(trivial_augment)(images, jax.random.split(jax.random.key(0), 400), jnp.zeros(3)))
    same = (np.abs(changed - images).max((1, 2, 3)) == 0).mean()
    assert 0.07 < same < 0.25  # one operation in 14 is the identity, and so are the lowest levels of others
    assert len(np.unique(changed.reshape(400, -1), axis=0)) > 150
    assert changed.min() >= 0
    assert changed.max() <= 255
