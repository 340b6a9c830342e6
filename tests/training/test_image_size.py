"""Image sizes that a network cannot process are refused before a run begins, with the nearest ones."""

import re

import pytest

from jaxft.config import default_config
from jaxft.errors import UserError
from jaxft.models.build import make_model
from jaxft.training.start import check_image_size


def check(arch: str, image_size: int, first: int = 0, num_image_sizes: int = 0) -> None:
    config = default_config()
    config.model.arch = arch
    config.update(image_size=image_size, num_epochs=5)
    config.augment.update(first_image_size=first, num_image_sizes=num_image_sizes)
    check_image_size(config, make_model(config.model, 10))


@pytest.mark.parametrize(
    ("arch", "sizes", "message"),
    [
        ("vgg11", (31,), "image_size is 31, but a vgg11 needs at least 32; set it to that or more"),
        ("vgg11", (64, 16), "augment.first_image_size is 16, but a vgg11 needs at least 32; set it to that or more"),
        (
            "vit_b_16",
            (225,),
            "a vit_b_16 has patches of 16 pixels, which do not divide an image_size of 225; "
            "the nearest sizes are 224 and 240",
        ),
        (
            "vit_small_patch14_dinov2",
            (10,),
            "image_size is 10, but a vit_small_patch14_dinov2 needs at least 14; set it to that or more",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arch: str, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message) + "$"):
        check(arch, *sizes)


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [
        ("resnet18", (1,)),
        ("resnet50d", (225, 97)),
        ("vgg11", (32,)),
        ("vit_b_16", (16,)),
        ("vit_b_16", (224, 100)),  # sizes before the last are rounded
        ("vit_small_patch14_dinov2", (224, 140)),
    ],
)
def test_others_are_accepted(arch: str, sizes: tuple[int, ...]) -> None:
    check(arch, *sizes)
