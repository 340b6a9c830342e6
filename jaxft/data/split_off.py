"""Splits a validation or test part off labelled images: stratified by class, without dividing groups."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jaxft.data.dataset import Dataset
from jaxft.data.lazy_images import select_images
from jaxft.errors import UserError, counted, shortened

_STREAM = 0x76616C  # of random numbers, so that they differ from those of the epochs' order


def split_off(data: Dataset, fraction: float, seed: int, group: np.ndarray | None = None) -> tuple[Dataset, Dataset]:
    """Returns the rest of a dataset and the held-out fraction of it; the images stay where they are.

    The parts have equal shares of each class: of the labels, or of the first field of classes. Each class keeps an
    image in the rest. group: int (N,); examples of one group stay in one part. The parts depend only on the arguments,
    not on the platform. Raises UserError if a part would be empty or a class has only one image.
    """
    strata, names = data.first_class()
    bits = np.random.Philox(key=np.array([seed, _STREAM], np.uint64)).random_raw(data.num_examples)
    held_out = choose_held_out(strata, names, np.argsort(bits, kind="stable"), fraction, group, "data.val_split")
    rest, chosen = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    part = select_examples(data, chosen)
    origin = replace(part.origin, skipped={}, remarks={})  # since those of the rest cover both
    return select_examples(data, rest), part._replace(origin=origin)


def select_examples(data: Dataset, index: np.ndarray) -> Dataset:
    """Returns the examples at these positions of a dataset, without copying their images."""
    label = {name: array[index] for name, array in data.label.items()} if data.fields else data.label[index]
    files = tuple(data.origin.files[i] for i in index) if data.origin.files else ()
    return data._replace(
        image=select_images(data.image, index),
        label=label,
        origin=replace(data.origin, files=files),
        group=None if data.group is None else data.group[index],
    )


def choose_held_out(
    strata: np.ndarray,
    names: Sequence[str],
    order: np.ndarray,
    fraction: float,
    group: np.ndarray | None,
    setting: str,
) -> np.ndarray:
    """Returns which examples are held out, bool (N,).

    strata: int (N,), the class of each, -1 if it has none. names: of the classes; () if all are 0 because there are
    none. order: a permutation of the examples; the first ones are held out if groups do not prevent it. setting: the
    config key that has the fraction. Raises UserError.
    """
    classes, sizes = np.unique(strata, return_counts=True)
    if single := [names[i] for i, size in zip(classes, sizes, strict=True) if names and i >= 0 and size == 1]:
        raise UserError(
            f"classes with one image cannot be divided by {setting}={fraction:g}: {shortened(single)}; add images, or "
            "name a split for each part"
        )
    if group is None:
        held_out = _hold_out_examples(strata, order, fraction)
    else:
        held_out = _hold_out_groups(strata, order, fraction, group, bool(names))
    if not held_out.any() or held_out.all():
        what = "no image to train on" if held_out.any() else "no image to hold out"
        groups = "" if group is None else f" in {counted(len(np.unique(group)), 'group')}"
        raise UserError(
            f"{setting}={fraction:g} leaves {what} of {counted(len(strata), 'image')}{groups}; set another fraction, "
            "or add images"
        )
    return held_out


def _hold_out_examples(strata: np.ndarray, order: np.ndarray, fraction: float) -> np.ndarray:
    """Holds out the first examples of each stratum: its share, rounded down or up so that the total is right."""
    present, inverse, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    shares = [fraction * int(size) for size in sizes]
    quotas = [min(math.floor(share), int(size) - 1) for share, size in zip(shares, sizes, strict=True)]
    first = np.full(len(present), len(strata))
    rank = np.empty(len(strata), int)
    rank[order] = np.arange(len(strata))
    np.minimum.at(first, inverse, rank)
    by_remainder = sorted(range(len(present)), key=lambda k: (quotas[k] - shares[k], first[k]))
    for k in by_remainder[: max(round(fraction * len(strata)) - sum(quotas), 0)]:
        quotas[k] = min(quotas[k] + 1, int(sizes[k]) - 1)
    held_out = np.zeros(len(strata), bool)
    ordered = order[np.argsort(inverse[order], kind="stable")]  # by stratum, then by order
    starts = np.cumsum(sizes) - sizes
    for start, quota in zip(starts, quotas, strict=True):
        held_out[ordered[start : start + quota]] = True
    return held_out


def _hold_out_groups(
    strata: np.ndarray, order: np.ndarray, fraction: float, group: np.ndarray, keep_classes: bool
) -> np.ndarray:
    """Holds out groups, the largest first, each if that brings the strata closer to their shares.

    If none does, the group that deviates least is held out. keep_classes: whether each stratum of a class keeps an
    image in the rest, for which groups with all images of a class are never held out.
    """
    present, stratum, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    groups, member, group_sizes = np.unique(group, return_inverse=True, return_counts=True)
    rank = np.full(len(groups), len(strata))
    position = np.empty(len(strata), int)
    position[order] = np.arange(len(strata))
    np.minimum.at(rank, member, position)
    pairs, counts = np.unique(np.stack([member, stratum], 1), axis=0, return_counts=True)
    content: list[list[tuple[int, int]]] = [[] for _ in groups]  # of each group: (stratum, images)
    for (g, k), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        content[g].append((k, count))
    missing = [fraction * int(size) for size in sizes]  # from each stratum's share
    left = sizes.tolist()
    must_stay = [keep_classes and label >= 0 for label in present.tolist()]

    def change(g: int) -> float:
        """Returns how the squared deviation changes if a group is held out."""
        return sum(count * (count - 2 * missing[k]) for k, count in content[g])

    def is_allowed(g: int) -> bool:
        """Returns whether something of everything that must stay is left if a group is held out."""
        empties = any(must_stay[k] and left[k] == count for k, count in content[g])
        return not empties and len(strata) - num_held_out > group_sizes[g]

    chosen: list[int] = []
    num_held_out = 0
    for g in sorted(range(len(groups)), key=lambda g: (-int(group_sizes[g]), int(rank[g]))):
        if change(g) < 0 and is_allowed(g):
            chosen.append(g)
            num_held_out += int(group_sizes[g])
            for k, count in content[g]:
                missing[k] -= count
                left[k] -= count
    if not chosen and fraction > 0:
        allowed = [g for g in range(len(groups)) if is_allowed(g)]
        chosen = [min(allowed, key=lambda g: (change(g), int(rank[g])))] if allowed else []
    return np.isin(member, chosen)
