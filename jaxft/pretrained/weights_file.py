"""Reads and writes jaxft's own weights files: safetensors with the provenance in the metadata."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError

from jaxft.errors import UserError, shortened
from jaxft.files import atomic_write, reason
from jaxft.models.build import ARCHITECTURES
from jaxft.models.network import Network, abstract_variables, options_of
from jaxft.models.resnet import STEMS
from jaxft.models.vit import POOLS
from jaxft.pretrained.state_dict import excerpt
from jaxft.pretrained.torch_files import TensorFile, write_safetensors
from jaxft.targets.calibration import check_calibrations
from jaxft.targets.joint import targets_of
from jaxft.transforms.pillow_resize import FILTERS
from jaxft.transforms.preprocessing import Preprocessing

FORMAT = "jaxft 1"  # in the metadata of a weights file
CHECKSUM = "sha256"  # in the metadata of files since version 0.2
_FLOATS = tuple(np.dtype(dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))


class Weights(NamedTuple):
    variables: dict[str, Any]  # {'params': ..., 'batch_stats': ...}, with the file's dtypes
    provenance: dict[str, Any]  # arch, its family's options, num_classes, source (file name), source_sha256, mean, ...


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], shown: int = 3) -> None:
    """Raises UserError with the keys that are missing, extra or of another shape: the first ones and their number."""
    reshaped = [
        f"{key} {found[key]} instead of {expected[key]}"
        for key in expected
        if key in found and found[key] != expected[key]
    ]
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "extra": sorted(map(excerpt, found.keys() - expected.keys())),
        "of another shape": reshaped,
    }
    text = [f"{len(keys)} {kind}: {shortened(keys, shown)}" for kind, keys in problems.items() if keys]
    if text:
        raise UserError("; ".join(text))


def check_values(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises UserError unless all tensors are finite floating-point numbers that float32 holds, and variances positive.

    A variance is recognised by its name: running_var in torch, var in Flax.
    """
    problems: dict[str, list[str]] = {}
    for key, array in tensors.items():
        if array.dtype not in _FLOATS:
            problem = f"are {array.dtype}, not floating point,"
        elif not _is_finite(array):
            problem = "are not finite in float32"
        elif key.endswith(("running_var", "/var")) and (array < 0).any():
            problem = "are negative variances"
        else:
            continue
        problems.setdefault(problem, []).append(excerpt(key))
    if problems:
        text = [f"numbers that {problem} in {shortened(keys)}" for problem, keys in problems.items()]
        raise UserError(f"{path} is refused: it holds {'; '.join(text)}")


def _is_finite(array: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(np.float32, copy=False)).all())


def model_of(provenance: Mapping[str, Any]) -> Network:
    """Returns the network that the weights belong to, computing in float32."""
    model = ARCHITECTURES[provenance["arch"]](num_classes=provenance["num_classes"])
    return model.clone(**{key: provenance[key] for key in model.options if key in provenance})


def read_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the provenance from a jaxft file's metadata; None for a file that jaxft did not write.

    Raises UserError if the provenance is incomplete or malformed.
    """
    if not metadata.get("format", "").startswith("jaxft "):
        return None
    try:
        if metadata["format"] != FORMAT:
            raise ValueError(f"format is {excerpt(metadata['format'])}")
        provenance = json.loads(metadata["jaxft"])
        if not isinstance(provenance, dict):
            raise TypeError("it is not an object")
        for key, valid in _VALID.items():
            if key in provenance and not valid(provenance[key]):
                raise ValueError(f"{key} is {excerpt(json.dumps(provenance[key]), 40)}")
        model = model_of(provenance)
        _check_targets(provenance)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or from a newer jaxft: its metadata is wrong: {error}") from None
    provenance = {**options_of(model), "source": path.name} | provenance
    provenance["source"] = excerpt(provenance["source"], 200)  # shown when a run starts
    if "notes" in provenance:
        provenance["notes"] = [excerpt(note, 200) for note in provenance["notes"]]
    return provenance


def read_jaxft_file(path: Path, file: TensorFile, provenance: dict[str, Any], arch: str | None) -> Weights:
    """Returns the weights; `provenance` comes from read_metadata. Raises UserError if damaged or not of `arch`."""
    if arch not in (None, provenance["arch"]):
        raise UserError(f"{path} holds a {provenance['arch']}, not a {arch}")
    expected = {
        "/".join(key): array.shape for key, array in flatten_dict(abstract_variables(model_of(provenance))).items()
    }
    try:
        check_shapes({key: tensor.shape for key, tensor in file.content.items()}, expected)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    tensors = file.load(file.content)
    checksum = file.metadata.get(CHECKSUM)
    if checksum is not None and checksum != _checksum(tensors, file.metadata["jaxft"]):
        raise UserError(f"{path} is damaged: its tensors or its metadata do not match its checksum; fetch it again")
    check_values(path, tensors)
    return Weights({"params": {}, "batch_stats": {}} | unflatten_dict(tensors, sep="/"), provenance)


def write_weights(path: str | Path, weights: Weights) -> None:
    """Writes tensors named 'params/layer1/0/conv1/kernel' and, in the metadata, the provenance as JSON.

    Raises UserError if the file cannot be written.
    """
    path = Path(path)
    tensors = {key: np.asarray(array, order="C") for key, array in flatten_dict(weights.variables, sep="/").items()}
    text = json.dumps(weights.provenance)
    metadata = {"format": FORMAT, "jaxft": text, CHECKSUM: _checksum(tensors, text)}
    try:
        with atomic_write(path) as file:
            write_safetensors(file, tensors, metadata)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a path with NUL
        raise UserError(f"{path} cannot be written: {reason(error)}; name another file") from None


def _checksum(tensors: Mapping[str, np.ndarray], provenance: str) -> str:
    """Returns the SHA-256 of the tensors' names, dtypes, shapes and bytes and of the provenance."""
    sha256 = hashlib.sha256(provenance.encode())
    for key in sorted(tensors):
        array = np.ascontiguousarray(tensors[key])
        sha256.update(json.dumps([key, str(array.dtype), array.shape]).encode())
        sha256.update(array.reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()


def _is_count(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _are_numbers(value: Any, least: float) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(number) in (int, float) and least <= number < math.inf for number in value)
    )


def _check_targets(provenance: Mapping[str, Any]) -> None:
    """Raises ValueError or KeyError if the targets are not fields, or do not fit the head or the calibration."""
    if not {"targets", "calibration"} & provenance.keys():
        return
    fields = [target.field for target in targets_of(provenance)]
    if (outputs := sum(field.num_outputs for field in fields)) != provenance["num_classes"]:
        raise ValueError(f"the targets have {outputs} outputs, the head {provenance['num_classes']}")
    check_calibrations(fields, provenance.get("calibration", {}))


# Checks of the values in the provenance that jaxft reads.
_VALID: dict[str, Callable[[Any], bool]] = {
    "arch": lambda value: isinstance(value, str) and value in ARCHITECTURES,
    "width": lambda value: _is_count(value, 1, 1 << 16),
    "stem": lambda value: isinstance(value, str) and value in STEMS,
    "norm_eps": lambda value: type(value) in (int, float) and 0 <= value <= 0.1,
    "pool": lambda value: isinstance(value, str) and value in POOLS,
    "grid": lambda value: _is_count(value, 1, 1024),
    "num_classes": lambda value: _is_count(value, 0, 1 << 24),  # 0: without a head
    "source": lambda value: isinstance(value, str),
    "source_sha256": lambda value: isinstance(value, str),
    "notes": lambda value: isinstance(value, list) and all(isinstance(note, str) for note in value),
    "mean": lambda value: _are_numbers(value, -math.inf),
    "std": lambda value: _are_numbers(value, 1e-6),
    "class_names": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "image_size": lambda value: _is_count(value, 1, 1024),
    "resize": lambda value: _is_count(value, 0, 1 << 12),  # 0: image_size
    "interpolation": lambda value: isinstance(value, str) and value in FILTERS,
    "preprocessing": lambda value: (  # of the run that the weights were exported from
        isinstance(value, dict)
        and {"image_size", "mean", "std"} <= value.keys() <= {*Preprocessing._fields}
        and all(_VALID[key](value[key]) for key in value)
    ),
    "config": lambda value: (
        isinstance(value, dict)
        and isinstance(value.get("data"), dict)
        and _is_count(value["data"].get("stored_size", 0), 0, 1 << 12)
        and isinstance(value.get("targets", ""), str)
    ),
    "num_batches_tracked": lambda value: (
        isinstance(value, dict) and all(_is_count(number, 0, (1 << 63) - 1) for number in value.values())
    ),
}
