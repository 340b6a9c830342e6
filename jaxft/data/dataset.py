"""A labelled dataset: images, integer labels and class names."""

from typing import Any, NamedTuple

import numpy as np


class Dataset(NamedTuple):
    image: Any  # uint8 (N, H, W, 3): an array, or stored.LazyImages
    label: np.ndarray  # int32 (N,)
    class_names: tuple[str, ...]
