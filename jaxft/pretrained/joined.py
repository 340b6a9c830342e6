"""Tensors of a network that a file holds in parts or in another shape."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jaxft.pretrained.unpickle import Tensor


class Joined(NamedTuple):
    """Tensors of one shape that are concatenated along the first axis, or one tensor in another shape."""

    dtype: np.dtype
    shape: tuple[int, ...]
    parts: tuple[Tensor, ...]


def load_joined(
    tensors: Mapping[str, Tensor | Joined], read: Callable[[Mapping[str, Tensor]], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns the numbers of all tensors. read: does so for tensors that are whole, all in one call."""
    parts = {key: tensor.parts if isinstance(tensor, Joined) else (tensor,) for key, tensor in tensors.items()}
    arrays = read({f"{key} {i}": part for key, found in parts.items() for i, part in enumerate(found)})
    joined = {}
    for key, tensor in tensors.items():
        found = [arrays.pop(f"{key} {i}") for i in range(len(parts[key]))]
        joined[key] = (found[0] if len(found) == 1 else np.concatenate(found)).reshape(tensor.shape)
    return joined
