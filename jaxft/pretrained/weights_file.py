"""Reads and writes jaxft's own weights files: safetensors with the provenance in the metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from jaxft.errors import UserError
from jaxft.files import atomic_write
from jaxft.models.partition import abstract_variables
from jaxft.models.resnet import ARCHITECTURES, ResNet

FORMAT = "jaxft 1"  # in the metadata of a weights file


class Weights(NamedTuple):
    variables: dict[str, Any]  # {'params': ..., 'batch_stats': ...}, with the file's dtypes
    provenance: dict[str, Any]  # arch, width, stem, num_classes, source (file name), source_sha256, mean, std, ...


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError with all keys that are missing, extra or of another shape."""
    reshaped = [
        f"{key} {found[key]} instead of {expected[key]}"
        for key in expected
        if key in found and found[key] != expected[key]
    ]
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "extra": sorted(found.keys() - expected.keys()),
        "of another shape": reshaped,
    }
    text = [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if text:
        raise UserError("; ".join(text))


def model_of(provenance: Mapping[str, Any]) -> ResNet:
    """Returns the network that the weights belong to, computing in float32."""
    keys = ("num_classes", "width", "stem")
    return ARCHITECTURES[provenance["arch"]](**{key: provenance[key] for key in keys if key in provenance})


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Returns the provenance in a jaxft file; None for a file that jaxft did not write or that cannot be read.

    Raises UserError if the provenance is incomplete or malformed.
    """
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None  # read_tensors reports why
    if metadata.get("format") != FORMAT:
        return None
    try:
        provenance = json.loads(metadata["jaxft"])
        model_of(provenance)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or from a newer jaxft: its metadata is wrong at {error}") from None
    return provenance


def read_jaxft_file(path: Path, provenance: dict[str, Any], arch: str | None) -> Weights:
    """Returns the weights; `provenance` comes from read_metadata. Raises UserError if they are not of `arch`."""
    if arch not in (None, provenance["arch"]):
        raise UserError(f"{path} holds a {provenance['arch']}, not a {arch}")
    tensors = safetensors.numpy.load_file(path)
    expected = {
        "/".join(key): array.shape for key, array in flatten_dict(abstract_variables(model_of(provenance))).items()
    }
    try:
        check_shapes({key: array.shape for key, array in tensors.items()}, expected)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return Weights(unflatten_dict(tensors, sep="/"), provenance)


def write_weights(path: str | Path, weights: Weights) -> None:
    """Writes tensors named 'params/layer1/0/conv1/kernel' and, in the metadata, the provenance as JSON.

    Raises UserError if the file cannot be written.
    """
    path = Path(path)
    tensors = {key: np.asarray(array, order="C") for key, array in flatten_dict(weights.variables, sep="/").items()}
    metadata = {"format": FORMAT, "jaxft": json.dumps(weights.provenance)}
    try:
        with atomic_write(path) as file:
            safetensors.numpy.save_file(tensors, file.name, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None
