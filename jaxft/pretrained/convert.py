"""Converts variables between torch's state_dicts and Flax, as the families' layouts say."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxft.models.network import Network, abstract_variables
from jaxft.pretrained.families import family_of, family_of_model
from jaxft.pretrained.layout import NUM_BATCHES_TRACKED
from jaxft.pretrained.weights_file import Weights, check_shapes


def torch_shapes(model: Network) -> dict[str, tuple[int, ...]]:
    """Returns {torch's key: torch's shape} of all the model's variables."""
    layout, shapes = family_of_model(model).layout, {}
    for path, array in flatten_dict(abstract_variables(model)).items():
        key, axes = layout(path, array.ndim)
        shapes[key] = tuple(array.shape[i] for i in axes)
    return shapes


def from_torch(tensors: Mapping[str, np.ndarray], model: Network) -> dict[str, Any]:
    """Returns the model's variables from a state_dict with the family's own names; dtypes stay as they are.

    Raises UserError with all keys that are missing, extra or of another shape.
    """
    tensors = {key: array for key, array in tensors.items() if not key.endswith(NUM_BATCHES_TRACKED)}
    check_shapes({key: array.shape for key, array in tensors.items()}, torch_shapes(model))
    layout, places = family_of_model(model).layout, {}
    for path, variable in flatten_dict(abstract_variables(model)).items():
        key, axes = layout(path, variable.ndim)
        places[key] = path, np.argsort(axes)
    variables: dict[tuple[str, ...], np.ndarray] = {}
    for key, tensor in tensors.items():
        path, order = places[key]
        variables[path] = np.asarray(tensor.transpose(order), order="C")
    return {"params": {}, "batch_stats": {}} | unflatten_dict(variables)


def to_torch(weights: Weights) -> dict[str, np.ndarray]:
    """Returns the state_dict that torchvision's model loads with strict=True; the inverse of from_torch.

    A head for 0 classes is left out, as there is none.
    """
    layout, tensors = family_of(weights.provenance["arch"]).layout, {}
    counts = weights.provenance.get("num_batches_tracked", {})
    for path, array in flatten_dict(weights.variables).items():
        if not np.size(array):
            continue
        key, axes = layout(path, array.ndim)
        tensors[key] = np.asarray(np.asarray(array).transpose(axes), order="C")
        if path[0] == "batch_stats":
            count = key.rpartition(".")[0] + NUM_BATCHES_TRACKED
            tensors[count] = np.array(counts.get(count, 0), np.int64)
    return tensors
