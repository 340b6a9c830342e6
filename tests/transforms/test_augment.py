"""Augmentation: compared with Pillow, and a function of only the seed, the step and the image."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxft.config import load_config
from jaxft.data import datasets
from jaxft.data.batches import epoch_order
from jaxft.reporting.sheet_image import draw_sheet
from jaxft.sheet import main
from jaxft.transforms.augment import (
    Augmentation,
    Boxes,
    augment,
    crop_and_resize,
    erase,
    image_keys,
    mix,
    random_boxes,
)
from jaxft.transforms.pillow_resize import FILTERS
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, preprocess
from tests.helpers.runs import ROOT

pytestmark = pytest.mark.usefixtures("compile_quickly")

PREPROCESSING = Preprocessing(32, IMAGENET_MEAN, IMAGENET_STD)
augment_compiled = jax.jit(augment, static_argnums=(2, 3))
EVERYTHING = Augmentation(flip=True, shift=0.1, crop_area=0.3, crop_ratio=4 / 3)


@pytest.mark.parametrize("interpolation", FILTERS)
@settings(deadline=None, max_examples=3)
@given(
    st.tuples(st.integers(8, 40), st.integers(8, 40)),
    st.integers(4, 70),
    st.booleans(),
    st.floats(0.1, 1),
    st.floats(0, 1),
)
def test_crop_and_resize_matches_pillow(
    interpolation: str, sides: tuple[int, int], size: int, mirrored: bool, part: float, place: float
) -> None:
    """Pixels from 96 to 159 never overshoot so far that they are clipped, so the order of the passes is irrelevant."""
    height, width = sides
    image = np.random.default_rng(0).integers(96, 160, (height, width, 3), np.uint8)
    left, top = place * (1 - part), (1 - place) * (1 - part)
    right, bottom = left + part, top + part
    pixels = (left * width, top * height, right * width, bottom * height)
    kind = Image.Resampling[interpolation.upper()]
    expected = np.asarray(Image.fromarray(image).resize((size, size), kind, pixels), np.float32)
    across = (right, left) if mirrored else (left, right)
    boxes = Boxes(*(jnp.array([side]) for side in (top, bottom, *across)))
    (ours,) = jax.jit(crop_and_resize, static_argnums=(2, 4))(image[None], boxes, size, 100.0, interpolation)
    # Pillow rounds after each pass, and negative weights enlarge the error of the first.
    np.testing.assert_allclose(ours[:, ::-1] if mirrored else ours, expected, rtol=0, atol=1.3)


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos"])
def test_overshooting_crops_are_clipped_after_each_pass_as_pillows(interpolation: str) -> None:
    image = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (30, 30, 3))
    kind = Image.Resampling[interpolation.upper()]
    expected = np.asarray(Image.fromarray(image).resize((26, 26), kind, (3, 6, 21, 24)), np.float32)
    boxes = Boxes(*(jnp.array([side / 30]) for side in (6, 24, 3, 21)))
    (ours,) = jax.jit(crop_and_resize, static_argnums=(2, 4))(image[None], boxes, 26, 100.0, interpolation)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1.3)
    assert ours.min() == 0 and ours.max() == 255


def test_boxes_show_the_mean_colour_outside_the_image() -> None:
    image = jnp.full((1, 10, 10, 3), 200, jnp.uint8)
    boxes = Boxes(*(jnp.array([side]) for side in (0.5, 1.5, 0.0, 1.0)))
    (ours,) = crop_and_resize(image, boxes, 10, jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(ours[:5], 200, rtol=1e-6)
    np.testing.assert_allclose(ours[6:], np.broadcast_to([1, 2, 3], (4, 10, 3)), rtol=1e-6)


def test_augmentation_depends_only_on_seed_step_and_image() -> None:
    sample = datasets.load("sample:cifar10", "test")
    index = np.arange(0, 64)

    def seen(seed: int, step: int, index: np.ndarray) -> np.ndarray:
        return np.asarray(
            augment_compiled(sample.image[index], image_keys(seed, step, index), EVERYTHING, PREPROCESSING)
        )

    whole = seen(0, 3, index)
    np.testing.assert_allclose(np.concatenate([seen(0, 3, part) for part in np.split(index, 8)]), whole, atol=1e-6)
    for other in (seen(1, 3, index), seen(0, 4, index)):
        assert (np.abs(other - whole).max((1, 2, 3)) > 0.1).all()


def test_no_augmentation_equals_preprocessing_bit_for_bit() -> None:
    images = datasets.load("sample:cifar10", "test").image[:8]
    keys = image_keys(0, 0, np.arange(8))
    np.testing.assert_array_equal(
        augment(images, keys, Augmentation(), PREPROCESSING), preprocess(images, PREPROCESSING)
    )


def test_flip_mirrors_half_of_the_images_and_leaves_the_rest_unchanged() -> None:
    images = datasets.load("sample:cifar10", "test").image[:400]
    ours = augment(images, image_keys(0, 0, np.arange(400)), Augmentation(flip=True), PREPROCESSING)
    plain = preprocess(images, PREPROCESSING)
    same = np.abs(ours - plain).max((1, 2, 3)) < 1e-4
    mirrored = np.abs(ours - plain[:, :, ::-1]).max((1, 2, 3)) < 1e-4
    assert (same | mirrored).all()
    assert 160 < mirrored.sum() < 240  # 4 standard deviations of a fair coin


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 50)])
def test_random_boxes_cover_the_requested_areas_ratios_and_positions(height: int, width: int) -> None:
    keys = jax.random.split(jax.random.key(0), 5000)
    boxes = random_boxes(keys, Augmentation(crop_area=0.3, crop_ratio=4 / 3), height, width)
    shorter = min(height, width)
    tall = np.asarray(boxes.bottom - boxes.top) * height
    wide = np.asarray(boxes.right - boxes.left) * width
    area = tall * wide / shorter**2
    assert 0.28 < area.min() < 0.31
    assert area.max() > 0.97
    assert abs(area.mean() - 0.65) < 0.02
    assert 1.3 < (wide / tall).max() <= 4 / 3 + 1e-3
    for start, end, side in ((boxes.top, boxes.bottom, height), (boxes.left, boxes.right, width)):
        low = (1 - shorter / side) / 2
        assert np.min(start) >= low - 1e-6
        assert np.max(end) <= 1 - low + 1e-6
        assert np.min(start) < low + 0.01
        assert np.max(end) > 1 - low - 0.01


def test_trivial_augment_runs_between_crop_and_normalisation() -> None:
    images = jnp.asarray(datasets.load("sample:cifar10", "test").image[:64])
    keys = image_keys(0, 0, np.arange(64))
    plain, changed = (
        np.asarray(augment_compiled(images, keys, Augmentation(flip=True, trivial=trivial), PREPROCESSING))
        for trivial in (False, True)
    )
    assert 0.02 < (np.abs(plain - changed).max((1, 2, 3)) < 1e-4).mean() < 0.4  # the share of unchanged images
    assert changed.min() >= plain.min() - 1.5
    assert np.abs(changed).max() < 3  # normalised pixels


def test_erased_rectangles_have_the_mean_colour_and_the_requested_size() -> None:
    images = jnp.ones((2000, 40, 40, 3))
    erased = np.asarray(erase(images, jax.random.split(jax.random.key(0), 2000), 0.25)) == 0
    assert (erased.all(-1) == erased.any(-1)).all()
    area = erased[..., 0].mean((1, 2))
    assert 0.21 < (area > 0).mean() < 0.29  # 4 standard deviations
    assert area[area > 0].min() > 0.015
    assert area.max() < 0.36
    for mask in erased[area > 0][:100, ..., 0]:
        assert mask.sum() == mask.any(0).sum() * mask.any(1).sum()  # a rectangle


def test_mixup_blends_two_images_in_the_proportion_of_their_labels() -> None:
    ones, zeros, keys = jnp.ones((500, 8, 8, 3)), jnp.zeros((500, 8, 8, 3)), jax.random.split(jax.random.key(0), 500)
    mixed, share = mix(ones, zeros, keys, Augmentation(mixup=0.4))
    np.testing.assert_allclose(mixed, np.broadcast_to(share[:, None, None, None], mixed.shape), rtol=1e-6)
    expected = np.random.default_rng(0).beta(0.4, 0.4, 100_000)
    assert abs(share.mean() - 0.5) < 4 * expected.std() / 500**0.5
    assert abs(share.std() - expected.std()) < 0.03


def test_cutmix_pastes_a_square_and_weights_labels_by_area() -> None:
    ones, keys = jnp.ones((500, 16, 16, 3)), jax.random.split(jax.random.key(0), 500)
    zeros = jnp.zeros_like(ones)
    mixed, share = mix(ones, zeros, keys, Augmentation(cutmix=1.0))
    assert np.isin(mixed, (0, 1)).all()
    np.testing.assert_allclose(mixed.mean((1, 2, 3)), share, rtol=1e-6)
    assert abs(share.mean() - 0.5) < 0.06
    for pasted in np.asarray(mixed[:50, ..., 0]) == 0:
        assert pasted.sum() == pasted.any(0).sum() * pasted.any(1).sum()


def test_mixup_and_cutmix_are_chosen_equally_often() -> None:
    ones, zeros, keys = jnp.ones((400, 8, 8, 3)), jnp.zeros((400, 8, 8, 3)), jax.random.split(jax.random.key(1), 400)
    mixed, _ = mix(ones, zeros, keys, Augmentation(mixup=1.0, cutmix=1.0))
    cut = np.isin(mixed, (0, 1)).all((1, 2, 3))
    assert 150 < cut.sum() < 250


@pytest.mark.parametrize(("crop_area", "interpolation"), [(1.0, "bilinear"), (0.999, "bilinear"), (1.0, "lanczos")])
def test_without_random_crops_training_sees_what_evaluation_crops(crop_area: float, interpolation: str) -> None:
    """An augmentation that changes almost nothing; with random crops it shows the whole image."""
    image = np.asarray(Image.effect_noise((40, 50), 90).convert("RGB").resize((60, 48)))[None]
    preprocessing = Preprocessing(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 40, interpolation)
    keys = image_keys(0, 0, np.arange(1))
    found = np.asarray(augment(image, keys, Augmentation(shift=1e-6, crop_area=crop_area), preprocessing))
    cropped, whole = (preprocess(image, p) for p in (preprocessing, preprocessing._replace(resize=0)))
    near, far = (cropped, whole) if crop_area == 1 else (whole, cropped)
    assert np.abs(found - near).mean() < 0.01 < 0.05 < np.abs(found - far).mean()


def test_the_crop_keeps_its_share_at_another_size() -> None:
    preprocessing = PREPROCESSING._replace(image_size=224, resize=256, interpolation="bicubic")
    assert preprocessing.at_size(112) == preprocessing._replace(image_size=112, resize=128)
    assert PREPROCESSING.at_size(16) == PREPROCESSING._replace(image_size=16)


def test_a_sheet_that_cannot_be_written_leaves_no_file(
    fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["-m", "jaxft.sheet", "--config=quickstart", "--config.image_size=32", "--out"]
    assert "must end in .png, .jpg" in fails(*command, tmp_path / "sheet.txt")
    assert "cannot write mode RGB as XBM" in fails(*command, tmp_path / "sheet.xbm")

    def save(image: Image.Image, file: IO[bytes], kind: str) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", save)
    assert fails(*command, tmp_path / "sheet.png").endswith(
        "sheet.png cannot be written: No space left on device; name another file"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_sheet_shows_images_as_evaluated_and_as_augmented(tmp_path: Path) -> None:
    config = load_config(str(ROOT / "configs" / "quickstart.py"), {"image_size": "32"})
    main(
        [
            "--config",
            str(ROOT / "configs" / "quickstart.py"),
            "--out",
            str(tmp_path / "s.png"),
            "--config.image_size=32",
        ]
    )
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    train = datasets.load("sample:cifar10", "train")
    np.testing.assert_array_equal(sheet, draw_sheet(config, train))
    first = train.image[epoch_order(0, 1, 2000)[0]]
    np.testing.assert_array_equal(sheet[:32, :32], first)
    for column in range(1, 9):  # the quickstart flips images
        shown = sheet[:32, 36 * column :][:, :32].astype(int)
        assert min(np.abs(shown - other).max() for other in (first.astype(int), first[:, ::-1].astype(int))) <= 1
