"""Tests what a run needs before its first step: the images of both splits, and the preprocessing that it stores."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxft.config import load_config
from jaxft.data import datasets
from jaxft.errors import UserError
from jaxft.training.start import load_splits
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, preprocess
from tests.helpers.reference import torchvision


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Writes two photos of each class and split, of usual shapes."""
    rng = np.random.default_rng(0)
    for i, (split, name) in enumerate((s, n) for s in ("train", "val") for n in ("cat", "dog")):
        (tmp_path / split / name).mkdir(parents=True)
        for shape in ((375, 500 + i), (500, 333)):
            image = Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8))
            image.save(tmp_path / split / name / f"{shape[0]}.png")
    return tmp_path


def config_of(folder: Path, **overrides: str) -> dict[str, str]:
    named = {"data.name": f"folder:{folder}", "data.eval_split": "val", "image_size": "32"}
    return named | {key.replace("__", "."): value for key, value in overrides.items()}


def test_broken_files_of_both_splits_are_reported_at_once(photos: Path) -> None:
    broken = [photos / "train" / "cat" / "375.png", photos / "val" / "dog" / "500.png"]
    for path in broken:
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="2 of 8 files cannot be used") as caught:
        load_splits(load_config("quickstart", config_of(photos)))
    assert all(str(path) in str(caught.value) for path in broken)
    broken[0].unlink()
    with pytest.raises(UserError, match="1 of 4 files cannot be used"):
        load_splits(load_config("quickstart", config_of(photos)))


@pytest.mark.parametrize(("resize", "size"), [(32, 32), (40, 32), (256, 224), (232, 224)])
def test_evaluation_resizes_and_crops_as_torchvision(photos: Path, resize: int, size: int) -> None:
    """Compares the network's input with Resize and CenterCrop of the files, bit for bit but for the normalisation."""
    config = load_config("quickstart", config_of(photos, data__resize=str(resize), image_size=str(size)))
    data = load_splits(config).eval
    ours = np.asarray(preprocess(data.image, Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD, resize)))
    transforms = torchvision.transforms
    steps = [transforms.Resize(resize), transforms.CenterCrop(size), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    expected = np.stack([transform(Image.open(path)).numpy().transpose(1, 2, 0) for path in data.origin.files])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"data__resize": "31"}, "'data.resize' is 31, less than the image_size of 32"),
        ({"data__resize": "40", "data__stored_size": "36"}, "'data.stored_size' is 36, less than data.resize"),
        ({"data__resize": "-2"}, "must be at least 0, or -1 to derive it from the weights"),
    ],
)
def test_sizes_that_cannot_be_cropped_are_refused(
    overrides: dict[str, str], part: str, fails: Callable[..., str]
) -> None:
    arguments = [f"--config.{key}={value}" for key, value in config_of(Path("x"), **overrides).items()]
    assert part in fails("-m", "jaxft.train", "--config=quickstart", *arguments)


def test_without_resize_the_stored_images_are_the_same(photos: Path) -> None:
    """data.resize makes them larger; data.stored_size may make them larger still."""
    for overrides, side in (
        ({}, 32),
        ({"data__resize": "40"}, 40),
        ({"data__resize": "40", "data__stored_size": "48"}, 48),
    ):
        config = load_config("quickstart", config_of(photos, **overrides))
        assert datasets.load_config_data(config.data, "val", config.image_size).image.shape == (4, side, side, 3)
