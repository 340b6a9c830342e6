"""Data sets by name and split, the order of their examples, and errors without a network."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxft.data import datasets
from jaxft.data.batches import epoch_order, make_batches
from jaxft.data.dataset import DataOptions
from jaxft.errors import UserError
from jaxft.files import SAMPLES_DIR
from tests.helpers.runs import ROOT

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DATA = ROOT / "tests" / "fixtures"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@given(st.integers(0, 2**32), st.integers(0, 10**6), st.integers(1, 500))
def test_epoch_order_is_a_permutation_determined_by_seed_and_epoch(seed: int, epoch: int, size: int) -> None:
    order = epoch_order(seed, epoch, size)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))
    np.testing.assert_array_equal(order, epoch_order(seed, epoch, size))


def test_each_epoch_and_seed_has_a_different_order() -> None:
    orders = {tuple(epoch_order(seed, epoch, 20)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_epoch_order_is_the_same_as_in_earlier_versions() -> None:
    """A run begun with an earlier version resumes in the same order."""
    np.testing.assert_array_equal(epoch_order(0, 1, 8), [2, 0, 4, 1, 7, 5, 3, 6])


@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 20))
def test_batches_contain_every_example_once(size: int, devices: int, share: int) -> None:
    order = epoch_order(0, 0, size)
    batches = list(make_batches(order, devices * share, devices))
    assert all(batch.index.shape == batch.mask.shape == (devices, share) for batch in batches)
    assert len(batches) == -(-size // (devices * share))
    kept = np.concatenate([np.ravel(batch.index)[np.ravel(batch.mask) == 1] for batch in batches])
    np.testing.assert_array_equal(kept, order)
    assert sum(batch.mask.sum() for batch in batches) == size


def test_the_sample_is_balanced_and_its_splits_share_no_image() -> None:
    train, test = (datasets.load("sample:cifar10", split) for split in ("train", "test"))
    assert train.image.shape == (2000, 32, 32, 3)
    assert test.image.shape == (1000, 32, 32, 3)
    assert (np.bincount(train.label) == 200).all()
    assert (np.bincount(test.label) == 100).all()
    assert train.class_names == CLASSES
    assert not {image.tobytes() for image in train.image} & {image.tobytes() for image in test.image}


def test_tfds_returns_the_stored_images_and_labels(cache: Path) -> None:
    train = datasets.load("tiny_pictures", "train", DataOptions(dir=str(DATA / "array_record")))
    assert train.class_names == ("bird", "cat", "deer")
    assert train.image.shape == (30, 32, 32, 3)
    assert isinstance(train.image, np.memmap)
    sample = datasets.load("sample:cifar10", "train")
    by_bytes = {image.tobytes(): label for image, label in zip(sample.image, sample.label, strict=True)}
    labels = [sample.class_names[by_bytes[image.tobytes()]] for image in train.image]
    assert [train.class_names[label] for label in train.label] == labels


def test_tfds_split_syntax_selects_a_part(cache: Path) -> None:
    whole, part = (
        datasets.load("tiny_pictures", split, DataOptions(dir=str(DATA / "array_record")))
        for split in ("train", "train[:20%]")
    )
    np.testing.assert_array_equal(part.image, whole.image[:6])
    np.testing.assert_array_equal(part.label, whole.label[:6])


def test_of_several_class_labels_tfds_takes_the_one_named_label() -> None:
    """CIFAR-100 has coarse labels as well."""
    import tensorflow_datasets as tfds

    from jaxft.data.tfds_worker import _feature_of_type

    fine, coarse = tfds.features.ClassLabel(num_classes=100), tfds.features.ClassLabel(num_classes=20)

    def builder(**features: Any) -> Any:
        return SimpleNamespace(name="cifar100", info=SimpleNamespace(features=features))

    assert _feature_of_type(builder(coarse_label=coarse, label=fine), tfds.features.ClassLabel) == "label"
    assert _feature_of_type(builder(kind=fine), tfds.features.ClassLabel) == "kind"
    for features in ({}, {"fine": fine, "coarse": coarse}):
        with pytest.raises(UserError, match=f"has {len(features)} features of type ClassLabel"):
            _feature_of_type(builder(**features), tfds.features.ClassLabel)


def test_tfds_is_read_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = datasets.load("tiny_pictures", "test", DataOptions(dir=str(DATA / "array_record")))
    monkeypatch.setattr("subprocess.run", None)
    again = datasets.load("tiny_pictures", "test", DataOptions(dir=str(DATA / "array_record")))
    np.testing.assert_array_equal(first.image, again.image)


def test_a_truncated_cache_is_rebuilt(cache: Path) -> None:
    first = datasets.load("tiny_pictures", "test", DataOptions(dir=str(DATA / "array_record")))
    image = np.array(first.image)
    (path,) = cache.glob("datasets/*/image.bin")
    path.write_bytes(path.read_bytes()[:1000])
    np.testing.assert_array_equal(
        datasets.load("tiny_pictures", "test", DataOptions(dir=str(DATA / "array_record"))).image, image
    )


@pytest.mark.parametrize(
    ("name", "split", "folder", "part"),
    [
        ("tiny_pictures", "trian", "array_record", "Unknown split 'trian'"),
        ("tiny_pictures", "train[:", "array_record", "Error parsing split"),
        ("tiny_pictures", "test[:1%]", "array_record", "has no images"),
        ("tiny_picture", "train", "array_record", "is data.name spelt right?"),
        ("sample:cifar", "train", "", "jaxft ships sample:cifar10"),
        ("sample:cifar10", "train[:2%]", "", "it has test and train"),
        ("fodler:x", "train", "", "is data.name spelt right?"),
    ],
)
def test_wrong_names_are_refused_and_nothing_is_cached(
    cache: Path, name: str, split: str, folder: str, part: str
) -> None:
    with pytest.raises(UserError) as error:
        datasets.load(name, split, DataOptions(dir=str(DATA / folder)))
    assert part in str(error.value)
    assert not list(cache.glob("datasets/*"))


def test_an_unprepared_set_without_network_is_reported_within_ten_seconds(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    started = time.monotonic()
    with pytest.raises(UserError, match=r"'cifar10' is not prepared in .* cannot be reached"):
        datasets.load("cifar10", "train", DataOptions(dir=str(tmp_path / "empty")))
    assert time.monotonic() - started < 10


def test_the_sample_is_what_pillow_decodes() -> None:
    """Compares one image and its label with the archive's file and folder, read by Pillow."""
    import io
    import tarfile

    train = datasets.load("sample:cifar10", "train")
    with tarfile.open(SAMPLES_DIR / "cifar10.tar.xz") as tar:
        file = tar.extractfile("train/frog/0007.jpg")
        assert file
        picture = np.asarray(Image.open(io.BytesIO(file.read())))
    (found,) = np.flatnonzero((train.image == picture).all((1, 2, 3)))
    assert train.class_names[train.label[found]] == "frog"


def test_the_description_mentions_uneven_classes_and_images_in_both_splits() -> None:
    train, test = (datasets.load("sample:cifar10", split) for split in ("train", "test"))
    assert datasets.describe(train, test) == "10 classes of 200 images each"
    few = np.concatenate([np.flatnonzero(train.label == label)[: 5 + label] for label in range(10)])
    uneven = datasets.Dataset(train.image[few], train.label[few], train.class_names)
    mixed = datasets.Dataset(np.concatenate([test.image[:10], train.image[few[:3]]]), np.zeros(13, int), CLASSES)
    assert datasets.describe(uneven, mixed) == (
        "10 classes, from 5 images (airplane) to 14 (truck); 9 of them not in the test set; "
        "3 test images are also in the training set, which inflates the accuracy"
    )
