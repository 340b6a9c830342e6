"""Converts variables between torchvision's state_dict and Flax, following the tables of pretrained/resnet.py."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxft.models.partition import abstract_variables
from jaxft.models.resnet import ResNet
from jaxft.pretrained.resnet import LAYOUT, NUM_BATCHES_TRACKED, TORCH_NAMES
from jaxft.pretrained.weights_file import Weights, check_shapes

TORCHVISION_VARIANT = {"width": 64, "stem": "imagenet"}  # model.width and model.stem of torchvision's networks


def torch_shapes(model: ResNet) -> dict[str, tuple[int, ...]]:
    """Returns {torchvision's key: torch's shape} of all the model's variables."""
    shapes = {}
    for (collection, *path, leaf), array in flatten_dict(abstract_variables(model)).items():
        name = TORCH_NAMES[collection, leaf, array.ndim]
        axes = LAYOUT[name, array.ndim][2]
        shapes[".".join([*path, name])] = tuple(array.shape[i] for i in np.argsort(axes))
    return shapes


def from_torch(tensors: Mapping[str, np.ndarray], model: ResNet) -> dict[str, Any]:
    """Returns the model's variables from a torchvision state_dict; dtypes stay as they are.

    Raises UserError with all keys that are missing, extra or of another shape.
    """
    tensors = {key: array for key, array in tensors.items() if not key.endswith(NUM_BATCHES_TRACKED)}
    check_shapes({key: array.shape for key, array in tensors.items()}, torch_shapes(model))
    variables = {}
    for key, array in tensors.items():
        *path, name = key.split(".")
        collection, leaf, axes = LAYOUT[name, array.ndim]
        variables[(collection, *path, leaf)] = np.asarray(array.transpose(axes), order="C")
    return unflatten_dict(variables)


def to_torch(weights: Weights) -> dict[str, np.ndarray]:
    """Returns the state_dict that torchvision's model loads with strict=True; the inverse of from_torch.

    A head for 0 classes is left out, as there is none.
    """
    tensors = {}
    for (collection, *path, leaf), array in flatten_dict(weights.variables).items():
        if not np.size(array):
            continue
        name = TORCH_NAMES[collection, leaf, array.ndim]
        axes = np.argsort(LAYOUT[name, array.ndim][2])
        tensors[".".join([*path, name])] = np.asarray(np.asarray(array).transpose(axes), order="C")
        if collection == "batch_stats":
            key = ".".join(path) + NUM_BATCHES_TRACKED
            tensors[key] = np.array(weights.provenance.get("num_batches_tracked", {}).get(key, 0), np.int64)
    return tensors
