"""A labelled dataset, and the options for reading one."""

from typing import Any, NamedTuple

import numpy as np


class Dataset(NamedTuple):
    image: Any  # uint8 (N, H, W, 3): an array or LazyImages
    label: np.ndarray  # int32 (N,)
    class_names: tuple[str, ...]


class DataOptions(NamedTuple):
    """Options for reading a split, named like keys of the config's `data` section (except for `side`)."""

    dir: str = ""  # folder of prepared TFDS datasets; "": $TFDS_DATA_DIR or ~/tensorflow_datasets
    side: int = 224  # images that differ in size or are larger become squares of this many pixels
    holdout: float = 0.2  # fraction of each class that a folder without splits keeps for testing
    unreadable: str = "refuse"  # "refuse" or "skip" files that are not images
    cache: str = "auto"  # "auto", "always" or "never" keep decoded images on disk
