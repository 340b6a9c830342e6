"""Converts variables between torch's state_dicts and Flax, as the families' layouts say."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxft.errors import UserError
from jaxft.models.architectures import TORCHVISION
from jaxft.models.network import Network, abstract_variables, options_of
from jaxft.pretrained.families import family_of, family_of_model
from jaxft.pretrained.family import Naming
from jaxft.pretrained.layout import NUM_BATCHES_TRACKED
from jaxft.pretrained.weights_file import Weights, check_shapes, model_of


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


def naming_of(weights: Weights, library: str = "") -> Naming:
    """Returns the names that a library gives to the weights' tensors, by default the library they come from.

    Raises UserError if it does not have this network.
    """
    arch = weights.provenance["arch"]
    family = family_of(arch)
    if not library:
        names = weights.provenance.get("names")
        usual = next((naming for naming in family.namings if arch in naming.default_for), family.namings[0])
        return next((naming for naming in family.namings if naming.library == names), usual)
    naming = next((naming for naming in family.namings if naming.library == library), None)
    if naming is None or (library == "torchvision" and arch not in TORCHVISION):
        raise UserError(
            f"{library} has no {arch}; --to torch writes the names of the library that the weights are from"
        )
    return naming


def to_torch(weights: Weights, naming: Naming | None = None) -> dict[str, np.ndarray]:
    """Returns the state_dict that the source's model loads with strict=True; the inverse of from_torch.

    naming: of the tensors; by default the family's own. A head for 0 classes is left out, as there is none.
    """
    family, tensors = family_of(weights.provenance["arch"]), {}
    layout = family.layout
    counts = weights.provenance.get("num_batches_tracked", {})
    for path, array in flatten_dict(weights.variables).items():
        if not np.size(array):
            continue
        key, axes = layout(path, array.ndim)
        tensors[key] = np.asarray(np.asarray(array).transpose(axes), order="C")
        if path[0] == "batch_stats":
            count = key.rpartition(".")[0] + NUM_BATCHES_TRACKED
            tensors[count] = np.array(counts.get(count, 0), np.int64)
    return rename(tensors, naming or family.namings[0])


def own_sizes(model: Network) -> dict[str, Any]:
    """Returns the options of a model that other libraries do not have: a ResNet's width and stem, a VGG's width."""
    return {
        key: getattr(model, key) for key in ("width", "stem") if getattr(model, key, None) != model.options.get(key)
    }


def loading_notes(weights: Weights, naming: Naming) -> Iterator[str]:
    """Yields what to know before a state_dict of these weights is loaded in PyTorch."""
    provenance = weights.provenance
    model = model_of(provenance)
    other = {key: value for key, value in options_of(model).items() if value != model.options[key]}
    if "grid" in other:
        side = other["grid"] * model.patch_size
        yield f"its position embeddings are those of images of {side} pixels: make the network for that size"
    if other.get("norm_eps", 0) and other["norm_eps"] != naming.options.get("norm_eps"):
        yield f"the epsilon of its LayerNorms is {other['norm_eps']:g}: set it in the network that loads the file"
    if "pool" in other:
        yield f"its pooling is {other['pool']}, which {naming.library} has under another name or not at all"
    if not provenance["num_classes"]:
        yield "load it with strict=False: the head's keys are missing"


def rename(tensors: Mapping[str, np.ndarray], naming: Naming) -> dict[str, np.ndarray]:
    """Returns tensors with the family's own names by those of a library, in its shapes."""
    renamed: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        keys = naming.keys(name)
        parts = np.split(array, len(keys)) if len(keys) > 1 else [array]
        renamed |= {
            key: part.reshape(naming.source_shape(name, part.shape)) for key, part in zip(keys, parts, strict=True)
        }
    return renamed
