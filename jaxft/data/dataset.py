"""A labelled dataset, where it comes from, and the options for reading one."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.data.fields import Field


@dataclass(frozen=True)
class Origin:
    """The folder that a dataset was read from, and facts about its files that the start of a run reports."""

    folder: str = ""  # absolute path, of a table the folder that holds it; "" for TFDS and samples
    layout: str = ""  # "splits" (FOLDER/SPLIT/CLASS), "classes" (FOLDER/CLASS), or "table"
    checksums: tuple[str, ...] = ()  # CRC-32 of the files of each class, in order, or of all files of a table
    skipped: Mapping[str, int] = field(default_factory=dict)  # counts of skipped files by description, such as ".txt"
    files: tuple[Path, ...] = ()  # of each image, below the folder
    remarks: Mapping[str, int] = field(default_factory=dict)  # counts of unusual images by kind, such as "float"


class Dataset(NamedTuple):
    image: Any  # uint8 (N, H, W, 3): an array or LazyImages
    label: Any  # int32 (N,); with fields: {field's name: array (N, ...)}, as table.py encodes it
    class_names: tuple[str, ...]  # () with fields
    origin: Origin = Origin()
    fields: tuple[Field, ...] = ()  # labelled columns of a table, unless classes are its only labels
    group: np.ndarray | None = None  # int32 (N,): examples of one group stay in one split

    @property
    def num_examples(self) -> int:
        """The number of images, N."""
        return int(self.image.shape[0])

    def first_class(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """Returns the labels of the first field of classes, int32 (N,), and the classes; zeros and () without one."""
        if not self.fields:
            return self.label, self.class_names
        for own in self.fields:
            if own.kind == "class":
                return self.label[own.name], own.names
        return np.zeros(self.num_examples, np.int32), ()

    def identity(self) -> dict[str, Any]:
        """Returns what a checkpoint stores to recognise the dataset: class sizes, checksums of labels and files.

        With fields, it has the number of images and a checksum of each field's labels instead of class sizes.
        """
        grouped = {} if self.group is None else {"group_crc32": _crc32(self.group)}
        if self.fields:
            labels = {field.name: _crc32(self.label[field.name], repr(field[4:])) for field in self.fields}
            files = {"files_crc32": list(self.origin.checksums)}
            return {"num_images": self.num_examples, "labels_crc32": labels} | files | grouped
        counts = np.bincount(self.label, minlength=len(self.class_names)).tolist()
        label_crc32 = _crc32(np.asarray(self.label, np.int32))
        return {"counts": counts, "label_crc32": label_crc32, "files_crc32": list(self.origin.checksums)} | grouped


def _crc32(array: np.ndarray, prefix: str = "") -> str:
    return f"{zlib.crc32(np.ascontiguousarray(array).data, zlib.crc32(prefix.encode())):08x}"


class DataOptions(NamedTuple):
    """Options for reading a split, named like keys of the config's `data` section (except for `side`)."""

    dir: str = ""  # folder of prepared TFDS datasets; "": $TFDS_DATA_DIR or ~/tensorflow_datasets
    side: int = 224  # images that differ in size or are larger become squares of this many pixels
    holdout: float = 0.2  # fraction of each class that a folder without splits keeps for testing
    unreadable: str = "refuse"  # "refuse" or "skip" files that are not images
    cache: str = "auto"  # "auto", "always" or "never" keep decoded images on disk
    layout: str = "auto"  # "auto", "splits" or "classes": how a folder is arranged
    train_split: str = "train"  # in a folder without splits, any other name means the held-out part
    eval_split: str = "test"  # name by which a folder of test images is recognised
    interpolation: str = "bilinear"  # "bilinear", "bicubic" or "lanczos": the filter that shrinks images to squares
    path_column: str = "path"  # column of a table that holds the images' paths
    group: str = ""  # column of a table; rows with the same value stay in one split
