"""A labelled dataset, where it comes from, and the options for reading one."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Origin:
    """The folder that a dataset was read from, and facts about its files that the start of a run reports."""

    folder: str = ""  # absolute path; "" if the dataset is not a folder's
    layout: str = ""  # "splits" (FOLDER/SPLIT/CLASS) or "classes" (FOLDER/CLASS)
    checksums: tuple[str, ...] = ()  # CRC-32 of the files of each class, in order
    skipped: Mapping[str, int] = field(default_factory=dict)  # counts of skipped files by description, such as ".txt"
    files: tuple[Path, ...] = ()  # of each image, below the folder
    remarks: Mapping[str, int] = field(default_factory=dict)  # counts of unusual images by kind, such as "float"


class Dataset(NamedTuple):
    image: Any  # uint8 (N, H, W, 3): an array or LazyImages
    label: np.ndarray  # int32 (N,)
    class_names: tuple[str, ...]
    origin: Origin = Origin()

    def identity(self) -> dict[str, Any]:
        """Returns what a checkpoint stores to recognise the dataset: class sizes, checksums of labels and files."""
        counts = np.bincount(self.label, minlength=len(self.class_names)).tolist()
        label_crc32 = f"{zlib.crc32(np.ascontiguousarray(self.label, np.int32).data):08x}"
        return {"counts": counts, "label_crc32": label_crc32, "files_crc32": list(self.origin.checksums)}


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
