"""Pretrained weights: torchvision's layout to Flax's and back, jaxft's weights files, and the new head."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxft.errors import UserError
from jaxft.models.partition import abstract_variables
from jaxft.models.resnet import ARCHITECTURES, ResNet
from jaxft.pretrained import catalog
from jaxft.pretrained.resnet import HUGGING_FACE, LAYOUT, NUM_BATCHES_TRACKED, OTHER_FAMILIES, TORCH_NAMES
from jaxft.pretrained.torch_files import read_tensors
from jaxft.pretrained.weights_file import Weights, check_shapes, read_jaxft_file, read_metadata, write_weights
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD


def torch_shapes(model: ResNet) -> dict[str, tuple[int, ...]]:
    """{torchvision's key: torch's shape} of all that the model holds."""
    shapes = {}
    for (collection, *path, leaf), array in flatten_dict(abstract_variables(model)).items():
        name = TORCH_NAMES[collection, leaf, array.ndim]
        axes = LAYOUT[name, array.ndim][2]
        shapes[".".join([*path, name])] = tuple(array.shape[i] for i in np.argsort(axes))
    return shapes


def from_torch(tensors: Mapping[str, np.ndarray], model: ResNet) -> dict[str, Any]:
    """The model's variables from a torchvision state_dict, of the same types.

    Raises UserError where keys or shapes do not fit.
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
    """The state_dict that torchvision's model loads with strict=True: from_torch's inverse."""
    tensors = {}
    for (collection, *path, leaf), array in flatten_dict(weights.variables).items():
        name = TORCH_NAMES[collection, leaf, array.ndim]
        axes = np.argsort(LAYOUT[name, array.ndim][2])
        tensors[".".join([*path, name])] = np.asarray(np.asarray(array).transpose(axes), order="C")
        if collection == "batch_stats":
            key = ".".join(path) + NUM_BATCHES_TRACKED
            tensors[key] = np.array(weights.provenance.get("num_batches_tracked", {}).get(key, 0), np.int64)
    return tensors


def torchvision_keys(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face's keys renamed to torchvision's; other keys are left alone."""

    def rename(key: str) -> str:
        for pattern, name in HUGGING_FACE.items():
            if match := re.match(rf"{pattern}\.(?=\w+$)", key):
                name = re.sub(r"<(\d+)>", lambda number: str(int(number[1]) + 1), match.expand(name))
                return f"{name}.{key[match.end() :]}"
        return key

    return {rename(key): array for key, array in tensors.items()}


def _check_family(tensors: Mapping[str, np.ndarray]) -> None:
    """Raises UserError where the keys are of a network that differs from torchvision's."""
    for pattern, reason in OTHER_FAMILIES.items():
        if any(re.search(pattern, key) for key in tensors):
            raise UserError(reason)
    if "bn1.weight" in tensors and "bn1.running_mean" not in tensors:
        raise UserError("its norms keep no running statistics: GroupNorm, not BatchNorm")


def infer_arch(tensors: Mapping[str, np.ndarray]) -> str | None:
    """The architecture whose keys and shapes these are, if any."""
    depths = tuple(
        len({key.split(".")[1] for key in tensors if key.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    )
    for arch in ARCHITECTURES:
        if _model_for(arch, tensors).stage_depths != depths:
            continue
        try:
            check_shapes(
                {k: a.shape for k, a in tensors.items() if not k.endswith(NUM_BATCHES_TRACKED)}, _shapes(arch, tensors)
            )
        except UserError:
            continue
        return arch
    return None


def _shapes(arch: str, tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return torch_shapes(_model_for(arch, tensors))


def _model_for(arch: str, tensors: Mapping[str, np.ndarray]) -> ResNet:
    """With the number of classes, the width and the stem that the tensors have."""

    def length(key: str, usual: int) -> int:
        shape = tensors[key].shape if key in tensors else ()
        return shape[0] if shape and shape[0] else usual

    small = "conv1.weight" in tensors and tensors["conv1.weight"].shape[2:] == (3, 3)
    return ARCHITECTURES[arch](
        num_classes=length("fc.bias", 1000),
        width=length("bn1.weight", 64),
        stem="small" if small else "imagenet",
    )


def load_pretrained(source: str, arch: str | None = None) -> Weights:
    """Weights by name ('resnet50.tv_in1k_v1': fetched, verified and converted once, then kept) or from a file.

    Raises UserError where they cannot be had, or are not of `arch`.
    """
    if shipped := catalog.shipped(source):
        return read_weights(shipped, arch)
    named = catalog.find(source)
    if named is None:
        if not Path(source).exists() and (near := catalog.near(source)):
            raise UserError(f"there is no weights file {source}, nor weights of that name; named are {', '.join(near)}")
        return read_weights(source, arch)
    converted = catalog.weights_dir() / f"{named.name}.safetensors"
    if not converted.exists():
        variables, provenance = read_weights(catalog.weights_file(named), named.arch)
        write_weights(converted, Weights(variables, provenance | named._asdict()))
    return read_weights(converted, arch)


def read_weights(path: str | Path, arch: str | None = None) -> Weights:
    """Of a jaxft file, or of a torchvision state_dict; `arch` None takes what the file holds.

    Raises UserError where the file cannot be read, or does not fit `arch`.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and (metadata := read_metadata(path)):
        return read_jaxft_file(path, metadata, arch)
    tensors = torchvision_keys(read_tensors(path))
    try:
        _check_family(tensors)
    except UserError as error:
        raise UserError(f"{path} is no ResNet of torchvision's kind: {error}") from None
    found = arch or infer_arch(tensors)
    if found is None:
        raise UserError(f"{path} fits none of {', '.join(ARCHITECTURES)}; name one to see which keys differ")
    try:
        model = _model_for(found, tensors)
        variables = from_torch(tensors, model)
    except UserError as error:
        other = infer_arch(tensors)
        raise UserError(f"{path} holds a {other}, not a {arch}" if other else f"{path} is no {arch}: {error}") from None
    provenance = {
        "arch": found,
        "width": model.width,
        "stem": model.stem,
        "num_classes": model.num_classes,
        "source": path.name,
        "source_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "num_batches_tracked": {
            key: int(value.flat[0])
            for key, value in tensors.items()
            if key.endswith(NUM_BATCHES_TRACKED) and value.size
        },
    }
    return Weights(variables, provenance)
