"""Loads labelled images by the name of their source and split."""

import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxft.data.budget import is_streamed
from jaxft.data.dataset import DataOptions, Dataset
from jaxft.data.fields import Field, describe_field, parse_targets
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
from jaxft.data.lazy_images import LazyImages, is_lazy, stored_images
from jaxft.data.sample import load_sample
from jaxft.data.table import NO_LABEL, ROWS_OF, load_table, table_problems
from jaxft.data.table_file import is_table
from jaxft.data.tfds import load_tfds
from jaxft.errors import UserError, counted, shortened

COMPARED_BYTES = 1 << 30  # size of two splits up to which they are compared for common images, which takes seconds
DEFAULT_OPTIONS = DataOptions()
_SCALED = {
    TWELVE_BIT: "16-bit with values up to 4,095",
    THIRTY_TWO_BIT: "32-bit, by the bits that they use",
    FLOAT: "floats from 0 to 1",
}


def load(
    name: str,
    split: str,
    options: DataOptions = DEFAULT_OPTIONS,
    class_names: tuple[str, ...] | None = None,
    *,
    targets: str = "",
    train_fields: tuple[Field, ...] = (),
) -> Dataset:
    """Returns a split of `sample:NAME`, `folder:PATH`, `table:FILE` or a TFDS dataset.

    A TFDS split may be a slice: train[:2%]. class_names: the training split's, for a folder or a table; None takes the
    names of the subfolders or labels. targets: the config key, for a table. train_fields: those of the training split,
    if it has any. Raises UserError if there is no such dataset or split, or if it cannot be read.
    """
    if name.startswith("table:"):
        fields = train_fields or parse_targets(targets)
        if class_names and len(fields) == 1:
            train_fields = (fields[0]._replace(names=class_names),)
        return load_table(table_path(name), split, options, fields, train_fields)
    if targets.strip() or train_fields:
        raise UserError(f"targets are columns of a table (data.name=table:FILE), but data.name is {name}; remove them")
    if name.startswith("sample:"):
        return load_sample(name.removeprefix("sample:"), split)
    if name.startswith("folder:"):
        path = folder_path(name)
        if is_table(path) and path.is_file():
            raise UserError(f"{path} is a table, not a folder; set {_setting_of(str(path))}")
        return load_folder(path, split, options, class_names)
    prefix, colon, path_text = name.partition(":")
    if colon and exists(Path(path_text)):
        raise UserError(f"data.name begins with '{prefix}:'; {_hint_of_path(path_text)}")
    path = Path(name)
    if len(path.parts) > 1 and exists(path):
        raise UserError(f"data.name {name} is a path; {_hint_of_path(name)}")
    try:
        return load_tfds(name, split, options)
    except UserError:
        if exists(path):
            raise UserError(f"data.name {name} is a path; {_hint_of_path(name)}") from None
        raise


def folder_path(name: str) -> Path:
    """Returns the absolute path of `folder:PATH`. Raises UserError if the path is missing."""
    return _absolute_path(name.removeprefix("folder:"), "folder", "folder:PATH")


def table_path(name: str) -> Path:
    """Returns the absolute path of `table:FILE`. Raises UserError if the path is missing."""
    return _absolute_path(name.removeprefix("table:"), "table", "table:FILE")


def _absolute_path(path: str, what: str, pattern: str) -> Path:
    if not path.strip():
        raise UserError(f"data.name lacks the {what}'s path; set --config.data.name={pattern}")
    if "://" in path:
        raise UserError(f"the {what} {path} is a URL, but only local {what}s are read; copy it and name the copy")
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise UserError(f"there is no home folder for {path}; set --config.data.name={pattern}") from None


def _hint_of_path(path: str) -> str:
    what = "table" if is_table(Path(path)) else "folder of images"
    return f"for a {what} set {_setting_of(path)}"


def _setting_of(path: str) -> str:
    kind = "table" if is_table(Path(path)) else "folder"
    return f"--config.data.name={shlex.quote(f'{kind}:{path}')}"


def load_config_data(
    data: ConfigDict,
    split: str,
    image_size: int,
    class_names: tuple[str, ...] | None = None,
    *,
    targets: str = "",
    train_fields: tuple[Field, ...] = (),
) -> Dataset:
    """Returns a split of the source that the config's `data` section names. The other arguments are those of `load`."""
    side = data.stored_size or max(data.resize, image_size)
    return load(data.name, split, _options(data, side), class_names, targets=targets, train_fields=train_fields)


def _options(data: ConfigDict, side: int) -> DataOptions:
    return DataOptions(
        data.dir,
        side,
        data.holdout,
        data.unreadable,
        data.cache,
        data.layout,
        data.train_split,
        data.eval_split,
        interpolation_of(data),
        data.path_column,
        data.group,
    )


def label_problems(data: ConfigDict, splits: Sequence[str], targets: str) -> list[str]:
    """Returns everything that is wrong with the rows and labels of a table's splits, the training split first.

    data: the config's `data` section. targets: the config key. Raises UserError if the table cannot be read.
    """
    if not data.name.startswith("table:"):
        return []
    path = table_path(data.name)
    found = table_problems(path, splits, _options(data, 0), parse_targets(targets))
    return [f"the table {path}: {problem}" if i == 0 else problem for i, problem in enumerate(found)]


def interpolation_of(data: ConfigDict) -> str:
    """Returns the filter that the config's `data` section names; an auto that was never resolved is bilinear."""
    return "bilinear" if data.interpolation == "auto" else data.interpolation


def describe(train: Dataset, test: Dataset, stream: str = "auto") -> str:
    """Returns one line on class sizes or fields, streaming, and test images that are also in the training set."""
    if train.fields:
        text = ", ".join(describe_field(field, train.label[field.name]) for field in train.fields)
    else:
        text = _describe_classes(train, test)
    if is_streamed(train, stream):
        text += f"; streamed from {_location(train.image)}"
    shared = shared_images(train, test)
    if shared:
        are = "is" if len(shared) == 1 else "are"
        text += f"; {counted(len(shared), 'test image')} {are} also in the training set, which inflates the accuracy"
    if train.group is not None and test.group is not None:
        groups = np.setdiff1d(np.intersect1d(train.group, test.group), test.group[list(shared)])
        if len(groups):
            are = "is" if len(groups) == 1 else "are"
            text += f"; {counted(len(groups), 'group')} {are} in both sets, which inflates the accuracy"
    return text


def _describe_classes(train: Dataset, test: Dataset) -> str:
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
    return text


def describe_origin(train: Dataset, test: Dataset, used: Collection[str] = ()) -> Iterator[str]:
    """Yields lines on the skipped files and rows and the unusual images of both splits of a folder or table.

    used: the names of all splits that a run uses; the rows of a table's other splits are then reported.
    """
    splits = [train.origin]
    if test.origin.layout != "classes":  # otherwise both splits come from the same files
        splits.append(test.origin)
    skipped = sum((Counter(origin.skipped) for origin in splits), Counter())
    remarks = Counter(train.origin.remarks) + Counter(test.origin.remarks)
    skipped[UNREADABLE] = remarks[UNREADABLE]
    if text := describe_skipped(+skipped):
        yield f"skipped: {text}"
    if count := remarks[NO_LABEL]:
        yield f"skipped: {counted(count, 'row')} without a label"
    if used:
        others = {key.removeprefix(ROWS_OF): n for key, n in train.origin.remarks.items() if key.startswith(ROWS_OF)}
        texts = [f"{counted(n, 'row')} of the split '{name}'" for name, n in sorted(others.items()) if name not in used]
        if texts:
            yield f"not used: {shortened(texts, 5)}"
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

    Only the files of a table are compared if comparing images would take long. Images of a single colour do not count:
    two of them are equal without being the same photograph.
    """
    shared = _shared_files(train, test)
    lazy = any(is_lazy(data.image) for data in (train, test))
    if lazy or train.image.nbytes + test.image.nbytes > COMPARED_BYTES:
        return shared
    trained, tested = (np.asarray(data.image) for data in (train, test))  # indexing a memmap takes ten times as long
    trained_on = {hash(image.tobytes()): i for i, image in enumerate(trained)}
    hashes = ((i, hash(image.tobytes())) for i, image in enumerate(tested))
    equal = {i: trained_on[h] for i, h in hashes if h in trained_on and not is_single_colour(tested[i])}
    return dict(sorted((equal | shared).items()))


def _shared_files(train: Dataset, test: Dataset) -> dict[int, int]:
    """Returns the same as `shared_images` by the files' paths, which only the rows of a table can share."""
    if train.origin.layout != "table":
        return {}
    trained_on = {path: i for i, path in enumerate(train.origin.files)}
    return {i: trained_on[path] for i, path in enumerate(test.origin.files) if path in trained_on}


def _location(image: Any) -> str:
    image = stored_images(image)
    if isinstance(image, np.memmap):
        return str(Path(str(image.filename)).parent)
    return "their files" if isinstance(image, LazyImages) else "memory"
