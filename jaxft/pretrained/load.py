"""Loads pretrained weights by name or from a file, and recognises their architecture."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxft.errors import UserError
from jaxft.models.resnet import ARCHITECTURES, ResNet
from jaxft.pretrained import catalog
from jaxft.pretrained.convert import from_torch, torch_shapes, torchvision_keys
from jaxft.pretrained.resnet import NUM_BATCHES_TRACKED, OTHER_FAMILIES
from jaxft.pretrained.torch_files import read_tensors
from jaxft.pretrained.weights_file import Weights, check_shapes, read_jaxft_file, read_metadata, write_weights
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD


def load_pretrained(source: str, arch: str | None = None) -> Weights:
    """Returns weights by name, such as 'resnet50.tv_in1k_v1', or from a file.

    Named weights are downloaded, verified and converted once, then kept in the cache. Raises UserError if they are
    not available or not of architecture `arch`.
    """
    if shipped := catalog.shipped(source):
        return read_weights(shipped, arch)
    named = catalog.find(source)
    if named is None:
        if not Path(source).exists() and (names := catalog.similar_names(source)):
            raise UserError(f"there is no weights file {source} and no such name; similar names: {', '.join(names)}")
        return read_weights(source, arch)
    converted = catalog.weights_dir() / f"{named.name}.safetensors"
    if not converted.exists():
        variables, provenance = read_weights(catalog.weights_file(named), named.arch)
        write_weights(converted, Weights(variables, provenance | named._asdict()))
    return read_weights(converted, arch)


def read_weights(path: str | Path, arch: str | None = None) -> Weights:
    """Returns the weights in a jaxft file or a state_dict of torchvision, timm or Hugging Face.

    arch: the architecture that the file must have; None takes the file's. Raises UserError if the file cannot be
    read or does not fit.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and (metadata := read_metadata(path)):
        return read_jaxft_file(path, metadata, arch)
    tensors = torchvision_keys(read_tensors(path))
    if reason := _other_family(tensors):
        raise UserError(f"{path} is not a ResNet like torchvision's: {reason}")
    found = arch or infer_arch(tensors)
    if found is None:
        raise UserError(f"{path} fits none of {', '.join(ARCHITECTURES)}; name one to see which keys differ")
    model = _model_for(found, tensors)
    try:
        variables = from_torch(tensors, model)
    except UserError as error:
        other = infer_arch(tensors)
        reason = f"holds a {other}, not a {arch}" if other else f"does not hold a {arch}: {error}"
        raise UserError(f"{path} {reason}") from None
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


def infer_arch(tensors: Mapping[str, np.ndarray]) -> str | None:
    """Returns the architecture that has these keys and shapes, or None."""
    shapes = {key: array.shape for key, array in tensors.items() if not key.endswith(NUM_BATCHES_TRACKED)}
    depths = tuple(
        len({key.split(".")[1] for key in tensors if key.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    )
    for arch in ARCHITECTURES:
        model = _model_for(arch, tensors)
        if model.stage_depths != depths:
            continue
        try:
            check_shapes(shapes, torch_shapes(model))
        except UserError:
            continue
        return arch
    return None


def _model_for(arch: str, tensors: Mapping[str, np.ndarray]) -> ResNet:
    """Returns the model with the number of classes, width and stem of these tensors."""

    def length(key: str, default: int) -> int:
        shape = tensors[key].shape if key in tensors else ()
        return shape[0] if shape and shape[0] else default

    small = "conv1.weight" in tensors and tensors["conv1.weight"].shape[2:] == (3, 3)
    return ARCHITECTURES[arch](
        num_classes=length("fc.bias", 1000),
        width=length("bn1.weight", 64),
        stem="small" if small else "imagenet",
    )


def _other_family(tensors: Mapping[str, np.ndarray]) -> str | None:
    """Returns the reason why jaxft's ResNet cannot represent a network with these keys, or None."""
    for pattern, reason in OTHER_FAMILIES.items():
        if any(re.search(pattern, key) for key in tensors):
            return reason
    if "bn1.weight" in tensors and "bn1.running_mean" not in tensors:
        return "its norms keep no running statistics: GroupNorm, not BatchNorm"
    return None
