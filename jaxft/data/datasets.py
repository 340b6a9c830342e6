"""Loads labelled images by the name of their source and split."""

import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxft.data.budget import is_streamed
from jaxft.data.dataset import DataOptions, Dataset
from jaxft.data.folder_scan import describe_skipped, exists
from jaxft.data.image_file import (
    ANIMATED,
    DARK_COLOURS,
    FLOAT,
    THIRTY_TWO_BIT,
    TWELVE_BIT,
    is_single_colour,
)
from jaxft.data.image_folder import SINGLE_COLOUR, UNREADABLE, load_folder
from jaxft.data.lazy_images import LazyImages
from jaxft.data.sample import load_sample
from jaxft.data.tfds import load_tfds
from jaxft.errors import UserError, counted

COMPARED_BYTES = 1 << 30  # size of two splits up to which they are compared for common images, which takes seconds
DEFAULT_OPTIONS = DataOptions()
_SCALED = {
    TWELVE_BIT: "16-bit with values up to 4,095",
    THIRTY_TWO_BIT: "32-bit, by the bits that they use",
    FLOAT: "floats from 0 to 1",
}


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
        return load_folder(folder_path(name), split, options, class_names)
    prefix, colon, path_text = name.partition(":")
    if colon and exists(Path(path_text)):
        raise UserError(f"data.name begins with '{prefix}:'; for a folder of images set {_folder_setting(path_text)}")
    path = Path(name)
    if len(path.parts) > 1 and exists(path):
        raise UserError(_hint_of_folder(name))
    try:
        return load_tfds(name, split, options)
    except UserError:
        if exists(path):
            raise UserError(_hint_of_folder(name)) from None
        raise


def folder_path(name: str) -> Path:
    """Returns the absolute path of `folder:PATH`. Raises UserError if the path is missing."""
    path = name.removeprefix("folder:")
    if not path.strip():
        raise UserError("data.name lacks the folder's path; set --config.data.name=folder:PATH")
    if "://" in path:
        raise UserError(f"the folder {path} is a URL, but only local folders are read; copy it and name the copy")
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise UserError(f"there is no home folder for {path}; set --config.data.name=folder:PATH") from None


def _hint_of_folder(name: str) -> str:
    return f"data.name {name} is a path; for a folder of images set {_folder_setting(name)}"


def _folder_setting(path: str) -> str:
    return f"--config.data.name={shlex.quote(f'folder:{path}')}"


def load_config_data(
    data: ConfigDict, split: str, image_size: int, class_names: tuple[str, ...] | None = None
) -> Dataset:
    """Returns a split of the source that the config's `data` section names."""
    side = data.stored_size or max(data.resize, image_size)
    options = DataOptions(
        data.dir,
        side,
        data.holdout,
        data.unreadable,
        data.cache,
        data.layout,
        data.train_split,
        data.eval_split,
        interpolation_of(data),
    )
    return load(data.name, split, options, class_names)


def interpolation_of(data: ConfigDict) -> str:
    """Returns the filter that the config's `data` section names; an auto that was never resolved is bilinear."""
    return "bilinear" if data.interpolation == "auto" else data.interpolation


def describe(train: Dataset, test: Dataset, stream: str = "auto") -> str:
    """Returns one line on class sizes, streaming, and test images that are also in the training set."""
    counts = np.bincount(train.label, minlength=len(train.class_names))
    fewest, most = int(counts.min()), int(counts.max())
    if fewest == most:
        text = f"{len(counts):,} classes of {counted(fewest, 'image')} each"
    else:
        text = (
            f"{len(counts):,} classes, from {counted(fewest, 'image')} ({train.class_names[int(counts.argmin())]}) "
            f"to {most:,} ({train.class_names[int(counts.argmax())]})"
        )
    if absent := len(counts) - len(np.unique(test.label)):
        text += f"; {absent} of them not in the test set"
    if is_streamed(train, stream):
        text += f"; streamed from {_location(train.image)}"
    if shared := len(shared_images(train, test)):
        are = "is" if shared == 1 else "are"
        text += f"; {counted(shared, 'test image')} {are} also in the training set, which inflates the accuracy"
    return text


def describe_origin(train: Dataset, test: Dataset) -> Iterator[str]:
    """Yields lines on the skipped files and the unusual images of both splits of a folder."""
    splits = [train.origin]
    if test.origin.layout != "classes":  # otherwise both splits come from the same files
        splits.append(test.origin)
    skipped = sum((Counter(origin.skipped) for origin in splits), Counter())
    remarks = Counter(train.origin.remarks) + Counter(test.origin.remarks)
    skipped[UNREADABLE] = remarks[UNREADABLE]
    if text := describe_skipped(+skipped):
        yield f"skipped: {text}"
    if texts := [f"{counted(remarks[key], 'image')} ({text})" for key, text in _SCALED.items() if remarks[key]]:
        yield f"scaled to 8 bits: {', '.join(texts)}"
    if count := remarks[DARK_COLOURS]:
        yield f"nearly black: {counted(count, 'image')} (16-bit colours with values up to 4,095); save them with 8 bits"
    if count := remarks[ANIMATED]:
        yield f"{counted(count, 'file')} with several frames or pages: only the first is used"
    if count := remarks[SINGLE_COLOUR]:
        have = "has" if count == 1 else "have"
        yield f"{counted(count, 'image')} {have} a single colour; check whether that is right"


def shared_images(train: Dataset, test: Dataset) -> dict[int, int]:
    """Returns {position in the test split: position in the training split} of the images that are in both.

    It is empty if looking for them would take long. Images of a single colour do not count: two of them are equal
    without being the same photograph.
    """
    lazy = any(isinstance(data.image, LazyImages) for data in (train, test))
    if lazy or train.image.nbytes + test.image.nbytes > COMPARED_BYTES:
        return {}
    trained, tested = (np.asarray(data.image) for data in (train, test))  # indexing a memmap takes ten times as long
    trained_on = {hash(image.tobytes()): i for i, image in enumerate(trained)}
    hashes = ((i, hash(image.tobytes())) for i, image in enumerate(tested))
    return {i: trained_on[h] for i, h in hashes if h in trained_on and not is_single_colour(test.image[i])}


def _location(image: Any) -> str:
    if isinstance(image, np.memmap):
        return str(Path(str(image.filename)).parent)
    return "their files" if isinstance(image, LazyImages) else "memory"
