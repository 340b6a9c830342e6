"""Tests how often an epoch draws each image if it samples by class, and the labels of streamed batches."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxft.data.batches import make_batches, sampled_order
from jaxft.data.dataset import Dataset
from jaxft.data.loader import BatchReader

labels = st.lists(st.integers(-1, 4), min_size=1, max_size=200).map(np.array)  # -1: missing
powers = st.sampled_from([0.5, 1.0])


@given(labels, powers, st.integers(0, 99))
def test_classes_and_images_are_drawn_in_proportion(label: np.ndarray, power: float, seed: int) -> None:
    """A class of n images is drawn in proportion to n^(1 - power), its images equally often; each up to one."""
    order = sampled_order(seed, 1, label, power)
    assert order.shape == label.shape and order.dtype == np.int64
    drawn = np.bincount(order, minlength=len(label))
    classes, sizes = np.unique(label, return_counts=True)
    shares = len(label) * sizes ** (1 - power) / (sizes ** (1 - power)).sum()
    for c, size, share in zip(classes, sizes, shares, strict=True):
        own = drawn[label == c]
        assert abs(own.sum() - share) < 1 + 1e-9
        assert np.abs(own - share / size).max() < 1 + 1e-9


def test_balanced_sampling_draws_classes_equally_and_sqrt_in_between() -> None:
    label = np.repeat([0, 1, 2], [64, 16, 4])
    balanced, between, plain = (
        np.bincount(label[sampled_order(0, 1, label, power)], minlength=3) for power in (1.0, 0.5, 0.0)
    )
    assert balanced.tolist() == [28, 28, 28]
    assert between.tolist() == [48, 24, 12]  # in proportion to 8, 4 and 2
    assert plain.tolist() == [64, 16, 4]


@given(labels, powers, st.integers(0, 99), st.integers(1, 99))
def test_the_order_depends_on_seed_and_epoch_only(label: np.ndarray, power: float, seed: int, epoch: int) -> None:
    order = sampled_order(seed, epoch, label, power)
    np.testing.assert_array_equal(sampled_order(seed, epoch, label.copy(), power), order)
    if len(set(order)) > 20:  # the same order by chance is impossible
        assert (sampled_order(seed, epoch + 1, label, power) != order).any()
        assert (sampled_order(seed + 1, epoch, label, power) != order).any()


def test_all_images_of_a_class_have_their_turn() -> None:
    """A class that is drawn less often than it has images shows others in the next epochs."""
    label = np.repeat([0, 1], [50, 5])
    seen = set[int]()
    for epoch in range(1, 31):
        seen |= set(sampled_order(0, epoch, label, 1.0).tolist())
    assert seen == set(range(55))


@given(st.integers(1, 30), st.integers(1, 4), st.booleans())
def test_a_streamed_batch_carries_the_labels_of_every_target(size: int, devices: int, partners: bool) -> None:
    rng = np.random.default_rng(size)
    tags, age = rng.integers(-1, 2, (size, 3)).astype(np.int8), rng.normal(size=size).astype(np.float32)
    label: dict[str, np.ndarray] = {"tags": tags, "age": age}
    data = Dataset(np.zeros((size, 1, 1, 3), np.uint8), label, ())
    batches = list(make_batches(rng.permutation(size), 3 * devices, devices))
    for i, batch in enumerate(batches):
        own = BatchReader(data, batches, partners)[i]
        assert own.examples is not None
        pairs = [(own.index, batch.index), (own.partner, batch.partner)][: 1 + partners]
        for device, mask in enumerate(np.asarray(batch.mask) > 0):
            for ours, theirs in ((np.asarray(a)[device][mask], np.asarray(b)[device][mask]) for a, b in pairs):
                for name, array in label.items():
                    np.testing.assert_array_equal(own.examples.label[name][device][ours], array[theirs])
