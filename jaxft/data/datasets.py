"""Labelled pictures by name and split, as arrays that are read once, cached and memory-mapped."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxft.data import image_folder
from jaxft.data.budget import is_streamed
from jaxft.data.dataset import Dataset
from jaxft.data.image_folder import load_folder
from jaxft.data.lazy_images import LazyImages
from jaxft.data.sample import load_sample
from jaxft.data.tfds import load_tfds

COMPARED_BYTES = 1 << 30


def load(
    name: str,
    split: str,
    data_dir: str = "",
    *,
    side: int = 224,
    holdout: float = 0.2,
    unreadable: str = "refuse",
    class_names: tuple[str, ...] | None = None,
    cache: str = "auto",
) -> Dataset:
    """`name` is `sample:cifar10`, `folder:PATH` or a TFDS name, `split` in TFDS's syntax (`train[:2%]`) for the last.

    side: pictures that differ in size, or are larger, become squares of so many pixels, as preprocessing to that size
    would make them. holdout, unreadable, class_names: of a folder's pictures, see folders.find_files. cache: config
    key data.cache; pictures that are not kept stay in their files, as they can unless TFDS prepared them as tfrecord.
    """
    if name.startswith("sample:"):
        return load_sample(name.removeprefix("sample:"), split)
    if name.startswith("folder:"):
        files = image_folder.find_files(Path(name.removeprefix("folder:")).expanduser(), split, holdout, class_names)
        return load_folder(files, name, split, side, unreadable, cache)
    return load_tfds(name, split, data_dir, side, cache)


def load_config_data(
    data: ConfigDict, split: str, image_size: int, class_names: tuple[str, ...] | None = None
) -> Dataset:
    """A split of what the config's `data` section names; class_names: of the training pictures, if known."""
    return load(
        data.name,
        split,
        data.dir,
        side=data.stored_size or image_size,
        holdout=data.holdout,
        unreadable=data.unreadable,
        class_names=class_names,
        cache=data.cache,
    )


def describe(train: Dataset, test: Dataset, stream: str = "auto") -> str:
    """Pictures per class, and what of the test set is trained on too, where looking for it takes seconds at most."""
    counts = np.bincount(train.label, minlength=len(train.class_names))
    fewest, most = int(counts.min()), int(counts.max())
    text = (
        f"{len(counts):,} classes of {fewest:,} pictures each"
        if fewest == most
        else (
            f"{len(counts):,} classes, from {fewest:,} pictures ({train.class_names[int(counts.argmin())]}) "
            f"to {most:,} ({train.class_names[int(counts.argmax())]})"
        )
    )
    if absent := len(counts) - len(np.unique(test.label)):
        text += f"; {absent} of them not in the test set"
    if is_streamed(train, stream):
        text += f"; streamed from {_place(train.image)}"
    in_files = any(isinstance(data.image, LazyImages) for data in (train, test))
    if not in_files and train.image.nbytes + test.image.nbytes <= COMPARED_BYTES:
        trained_on = {hash(image.tobytes()) for image in train.image}
        if both := sum(hash(image.tobytes()) in trained_on for image in test.image):
            text += f"; {both:,} test pictures are trained on too, which flatters the accuracy"
    return text


def _place(image: Any) -> str:
    if isinstance(image, np.memmap):
        return str(Path(str(image.filename)).parent)
    return "their files" if isinstance(image, LazyImages) else "memory"
