"""Splitting a part off labelled images."""

import itertools
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from jaxft.data import datasets
from jaxft.data.dataset import DataOptions, Dataset, Origin
from jaxft.data.fields import Field
from jaxft.data.lazy_images import LazyImages, MappedImages, SelectedImages, is_lazy, pickled_by_path
from jaxft.data.loader import ResidentLoader, StreamingLoader, make_loader
from jaxft.data.split_off import split_off
from jaxft.errors import UserError
from jaxft.training.feature_cache import _images


def numbered(label: list[int], group: list[int] | None = None) -> Dataset:
    """Returns images (1, 1) that hold their own number."""
    count = len(label)
    image = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1) + np.zeros(3, np.uint8)
    names = tuple(f"class{i}" for i in range(max(label) + 1))
    origin = Origin(files=tuple(Path(f"{i}.png") for i in range(count)), remarks={"animated": 2}, skipped={".txt": 1})
    groups = None if group is None else np.array(group, np.int32)
    return Dataset(image, np.array(label, np.int32), names, origin, group=groups)


def numbers(data: Dataset) -> list[int]:
    found = np.asarray(data.image)[:, 0, 0, 0].tolist()
    assert [str(path) for path in data.origin.files] == [f"{i}.png" for i in found]
    return found


classes = st.lists(st.integers(2, 12), min_size=1, max_size=6).map(
    lambda sizes: [k for k, size in enumerate(sizes) for _ in range(size)]
)


@given(label=classes, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 2**31 - 1), data=st.data())
def test_parts_are_disjoint_complete_and_stratified(
    label: list[int], fraction: float, seed: int, data: st.DataObject
) -> None:
    label = data.draw(st.permutations(label))
    whole = numbered(label)
    try:
        rest, part = split_off(whole, fraction, seed)
    except UserError as error:
        assert "leaves no image to hold out" in str(error)
        assert round(fraction * len(label)) == 0
        return
    assert sorted(numbers(rest) + numbers(part)) == list(range(len(label)))
    for data_part in (rest, part):
        np.testing.assert_array_equal(data_part.label, whole.label[numbers(data_part)])
    ideal = fraction * np.bincount(label)
    counts = np.bincount(part.label, minlength=len(ideal))
    assert (np.abs(counts - ideal) <= 1).all()
    assert (np.bincount(rest.label, minlength=len(ideal)) >= 1).all()
    assert part.num_examples == round(fraction * len(label)) or (np.bincount(rest.label) == 1).any()
    again = split_off(whole, fraction, seed)
    assert numbers(again[1]) == numbers(part)


@given(label=classes, fraction=st.floats(0.05, 0.95), seed=st.integers(0, 99), data=st.data())
def test_groups_are_never_divided(label: list[int], fraction: float, seed: int, data: st.DataObject) -> None:
    group = data.draw(st.lists(st.integers(0, 8), min_size=len(label), max_size=len(label)))
    whole = numbered(label, group)
    try:
        rest, part = split_off(whole, fraction, seed, whole.group)
    except UserError as error:
        assert "leaves no image to hold out" in str(error)
        return
    assert rest.group is not None and part.group is not None
    assert not set(rest.group) & set(part.group)
    assert sorted(numbers(rest) + numbers(part)) == list(range(len(label)))
    assert set(rest.label) == set(label)


def test_other_seeds_hold_out_others() -> None:
    whole = numbered([0, 1] * 20)
    parts = [tuple(numbers(split_off(whole, 0.25, seed)[1])) for seed in range(5)]
    assert len(set(parts)) == 5


def test_a_split_depends_only_on_the_seed() -> None:
    whole = numbered([0, 1] * 10, [i // 2 for i in range(20)])
    assert numbers(split_off(whole, 0.3, 7)[1]) == [0, 3, 6, 10, 15, 17]
    assert numbers(split_off(whole, 0.3, 7, whole.group)[1]) == [6, 7, 10, 11, 14, 15]


def test_groups_of_one_size_reach_the_fraction() -> None:
    whole = numbered([0] * 50 + [1] * 50, [i // 5 for i in range(100)])
    rest, part = split_off(whole, 0.2, 0, whole.group)
    assert np.bincount(part.label).tolist() == [10, 10]
    assert rest.num_examples == 80


def test_a_group_larger_than_the_fraction_is_held_out_if_there_is_no_smaller_one() -> None:
    whole = numbered([0, 1] * 10, [i // 4 for i in range(20)])
    rest, part = split_off(whole, 0.05, 0, whole.group)
    assert (rest.num_examples, part.num_examples) == (16, 4)


def test_a_group_with_all_images_of_a_class_stays() -> None:
    whole = numbered([0] * 5 + [1] * 20, [0] * 5 + [1 + i // 2 for i in range(20)])
    rest, part = split_off(whole, 0.2, 0, whole.group)
    assert set(part.label) == {1}
    assert (rest.label == 0).sum() == 5


@pytest.mark.parametrize(
    ("label", "group", "fraction", "expected"),
    [
        ([0, 0, 1, 2, 2], None, 0.5, r"classes with one image cannot be divided by data\.val_split=0\.5: class1;"),
        ([0] * 4, None, 0.1, r"data\.val_split=0\.1 leaves no image to hold out of 4 images; set another"),
        ([0] * 4, [3] * 4, 0.5, r"leaves no image to hold out of 4 images in 1 group;"),
    ],
)
def test_data_that_cannot_be_divided_is_an_error(
    label: list[int], group: list[int] | None, fraction: float, expected: str
) -> None:
    whole = numbered(label, group)
    with pytest.raises(UserError, match=expected):
        split_off(whole, fraction, 0, whole.group)


def test_fields_are_stratified_by_the_first_of_classes_even_where_it_is_missing() -> None:
    fields = (Field("number", "age", "age"), Field("class", "kind", "kind", names=("a", "b")))
    kind = np.array([0, 1, -1] * 10, np.int32)
    age = np.arange(30, dtype=np.float32)
    whole = numbered([0] * 30)._replace(label={"age": age, "kind": kind}, class_names=(), fields=fields)
    rest, part = split_off(whole, 0.2, 0)
    assert np.bincount(part.label["kind"] + 1).tolist() == [2, 2, 2]
    assert part.label["age"].tolist() == numbers(part)
    assert (rest.fields, rest.num_examples) == (fields, 24)
    without = whole._replace(label={"age": age}, fields=fields[:1])
    assert split_off(without, 0.2, 0)[1].num_examples == 6


def test_the_rest_reports_what_was_found_in_both_parts() -> None:
    rest, part = split_off(numbered([0, 1] * 5), 0.2, 0)
    assert rest.origin.remarks == {"animated": 2} and rest.origin.skipped == {".txt": 1}
    assert not part.origin.remarks and not part.origin.skipped


def test_a_part_can_be_divided_again() -> None:
    rest, _ = split_off(numbered([0, 1] * 10), 0.3, 0)
    rest, part = split_off(rest, 0.3, 1)
    assert isinstance(rest.image.images, np.ndarray)
    assert set(numbers(rest)).isdisjoint(numbers(part))


@pytest.fixture(params=["auto", "never"])
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Dataset:
    """Returns the images of a folder, memory-mapped or in their files."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name, i in itertools.product(("cat", "dog"), range(6)):
        (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "train" / name / f"{i}.png")
    return datasets.load(f"folder:{tmp_path}", "train", DataOptions(cache=request.param))


@pytest.mark.parametrize(("stream", "workers"), [("never", 0), ("always", 0), ("always", 1)])
def test_parts_are_read_by_all_loaders(folder: Dataset, stream: str, workers: int) -> None:
    rest, part = split_off(folder, 0.34, 0)
    assert isinstance(part.image, SelectedImages)
    assert part.image.shape == (4, 8, 8, 3) and part.image.nbytes == 4 * 8 * 8 * 3
    assert (rest.num_examples, is_lazy(part.image)) == (8, isinstance(folder.image, LazyImages))
    every = np.arange(folder.num_examples)
    expected = np.asarray(folder.image[every])[[folder.origin.files.index(path) for path in part.origin.files]]
    np.testing.assert_array_equal(np.asarray(part.image), expected)
    np.testing.assert_array_equal(part.image[np.array([[2, 0], [1, 1]])], expected[[[2, 0], [1, 1]]])
    np.testing.assert_array_equal(part.image[3], expected[3])
    loader = make_loader(part, ConfigDict({"stream": stream, "workers": workers}))
    assert isinstance(loader, StreamingLoader if stream == "always" else ResidentLoader)
    (batch,) = loader.batches(np.array([3, 1, 0]), 2 * jax.device_count())
    examples = batch.examples or loader.examples
    assert examples is not None
    present = np.nonzero(batch.mask)
    index = batch.index[present] if batch.examples is None else (present[0], batch.index[present])
    images = np.asarray(examples.image)[index].reshape(-1, 8, 8, 3)
    np.testing.assert_array_equal(images, expected[[3, 1, 0]])
    np.testing.assert_array_equal(np.asarray(examples.label)[index], part.label[[3, 1, 0]])
    hashed = _images(loader)
    if hashed is not None:
        np.testing.assert_array_equal(np.concatenate(list(hashed)).reshape(-1, 8, 8, 3), expected)
    assert "classes of" in datasets.describe(rest, part, stream)


def test_memory_mapped_parts_are_pickled_without_their_images(folder: Dataset) -> None:
    _, part = split_off(folder, 0.34, 0)
    image = pickled_by_path(part.image)
    if not is_lazy(image):
        assert isinstance(image.images, MappedImages)
    copy = pickle.loads(pickle.dumps(image))
    np.testing.assert_array_equal(copy[np.arange(4)], np.asarray(part.image))
    assert len(pickle.dumps(image)) < 4000
