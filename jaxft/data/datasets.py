"""Loads labelled images by the name of their source and split."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxft.data.budget import is_streamed
from jaxft.data.dataset import DataOptions, Dataset
from jaxft.data.image_folder import load_folder
from jaxft.data.lazy_images import LazyImages
from jaxft.data.sample import load_sample
from jaxft.data.tfds import load_tfds

COMPARED_BYTES = 1 << 30  # size of two splits up to which they are compared for common images, which takes seconds
DEFAULT_OPTIONS = DataOptions()


def load(
    name: str, split: str, options: DataOptions = DEFAULT_OPTIONS, class_names: tuple[str, ...] | None = None
) -> Dataset:
    """Returns a split of `sample:NAME`, `folder:PATH` or a TFDS dataset. A TFDS split may be a slice: train[:2%].

    class_names: the training split's, for a folder; None takes the names of the subfolders. Raises UserError if there
    is no such dataset or split, or if it cannot be read.
    """
    if name.startswith("sample:"):
        return load_sample(name.removeprefix("sample:"), split)
    if name.startswith("folder:"):
        return load_folder(Path(name.removeprefix("folder:")).expanduser(), split, options, class_names)
    return load_tfds(name, split, options)


def load_config_data(
    data: ConfigDict, split: str, image_size: int, class_names: tuple[str, ...] | None = None
) -> Dataset:
    """Returns a split of the source that the config's `data` section names."""
    side = data.stored_size or image_size
    options = DataOptions(data.dir, side, data.holdout, data.unreadable, data.cache)
    return load(data.name, split, options, class_names)


def describe(train: Dataset, test: Dataset, stream: str = "auto") -> str:
    """Returns one line on class sizes, streaming, and test images that are also in the training set."""
    counts = np.bincount(train.label, minlength=len(train.class_names))
    fewest, most = int(counts.min()), int(counts.max())
    if fewest == most:
        text = f"{len(counts):,} classes of {fewest:,} images each"
    else:
        text = (
            f"{len(counts):,} classes, from {fewest:,} images ({train.class_names[int(counts.argmin())]}) "
            f"to {most:,} ({train.class_names[int(counts.argmax())]})"
        )
    if absent := len(counts) - len(np.unique(test.label)):
        text += f"; {absent} of them not in the test set"
    if is_streamed(train, stream):
        text += f"; streamed from {_location(train.image)}"
    if shared := _num_shared(train, test):
        text += f"; {shared:,} test images are also in the training set, which inflates the accuracy"
    return text


def _num_shared(train: Dataset, test: Dataset) -> int:
    """Counts the test images that are also in the training set; 0 if looking for them would take long."""
    lazy = any(isinstance(data.image, LazyImages) for data in (train, test))
    if lazy or train.image.nbytes + test.image.nbytes > COMPARED_BYTES:
        return 0
    trained_on = {hash(image.tobytes()) for image in train.image}
    return sum(hash(image.tobytes()) in trained_on for image in test.image)


def _location(image: Any) -> str:
    if isinstance(image, np.memmap):
        return str(Path(str(image.filename)).parent)
    return "their files" if isinstance(image, LazyImages) else "memory"
