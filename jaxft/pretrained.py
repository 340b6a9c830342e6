"""Pretrained weights: torchvision's layout to Flax's and back, jaxft's weights files, and the new head."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from jaxft.errors import UserError
from jaxft.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from jaxft.resnet import ARCHITECTURES, ResNet, linear_init
from jaxft.torch_files import read_tensors

# torch's last name and number of axes -> Flax's collection, last name, and torch's axes in Flax's order.
# Everything before the last name is the same, with '.' for torch and one dict a name for Flax.
LAYOUT = {
    ("weight", 4): ("params", "kernel", (2, 3, 1, 0)),  # convolution: OIHW -> HWIO
    ("weight", 2): ("params", "kernel", (1, 0)),  # dense: OI -> IO
    ("weight", 1): ("params", "scale", (0,)),
    ("bias", 1): ("params", "bias", (0,)),
    ("running_mean", 1): ("batch_stats", "mean", (0,)),
    ("running_var", 1): ("batch_stats", "var", (0,)),
}
_TORCH_NAMES = {(collection, leaf, len(axes)): name for (name, _), (collection, leaf, axes) in LAYOUT.items()}

FORMAT = "jaxft 1"  # in the metadata of a weights file


class Weights(NamedTuple):
    variables: dict[str, Any]  # {'params': ..., 'batch_stats': ...}, float32
    provenance: dict[str, Any]  # arch, num_classes, source (file name), source_sha256, mean, std


def torch_shapes(model: ResNet) -> dict[str, tuple[int, ...]]:
    """{torchvision's key: torch's shape} of all that the model holds."""
    shapes = {}
    for (collection, *path, leaf), array in flatten_dict(_abstract_variables(model)).items():
        name = _TORCH_NAMES[collection, leaf, array.ndim]
        axes = LAYOUT[name, array.ndim][2]
        shapes[".".join([*path, name])] = tuple(array.shape[i] for i in np.argsort(axes))
    return shapes


def _abstract_variables(model: ResNet) -> Any:
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(lambda image: model.init(jax.random.key(0), image, train=False), image)


def from_torch(tensors: Mapping[str, np.ndarray], model: ResNet, dtype: Any = np.float32) -> dict[str, Any]:
    """The model's variables from a torchvision state_dict; raises UserError where they do not fit."""
    tensors = {key: array for key, array in tensors.items() if not key.endswith(".num_batches_tracked")}
    _check_shapes({key: array.shape for key, array in tensors.items()}, torch_shapes(model))
    variables = {}
    for key, array in tensors.items():
        *path, name = key.split(".")
        collection, leaf, axes = LAYOUT[name, array.ndim]
        variables[(collection, *path, leaf)] = np.ascontiguousarray(array.transpose(axes), dtype)
    return unflatten_dict(variables)


def _check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError with all keys that are missing, extra or mis-shaped."""
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
    told = [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if told:
        raise UserError("; ".join(told))


def infer_arch(tensors: Mapping[str, np.ndarray]) -> str | None:
    """The architecture whose keys and shapes these are, if any."""
    for arch in ARCHITECTURES:
        try:
            _check_shapes({k: a.shape for k, a in tensors.items() if not k.endswith("tracked")}, _shapes(arch, tensors))
        except UserError:
            continue
        return arch
    return None


def _shapes(arch: str, tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return torch_shapes(_model_for(arch, tensors))


def _model_for(arch: str, tensors: Mapping[str, np.ndarray]) -> ResNet:
    """With the number of classes and the width that the tensors have."""
    num_classes = len(tensors["fc.bias"]) if "fc.bias" in tensors else 1000
    width = len(tensors["bn1.weight"]) if "bn1.weight" in tensors else 64
    return ARCHITECTURES[arch](num_classes=num_classes, width=width)


def read_weights(path: str | Path, arch: str | None = None) -> Weights:
    """Of a jaxft file, or of a torchvision state_dict; `arch` None takes what the file holds.

    Raises UserError where the file cannot be read, or does not fit `arch`.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and (metadata := _jaxft_metadata(path)):
        return _read_jaxft(path, metadata, arch)
    tensors = read_tensors(path)
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
        "num_classes": model.num_classes,
        "source": path.name,
        "source_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
    return Weights(variables, provenance)


def _jaxft_metadata(path: Path) -> dict[str, Any] | None:
    """None for a .safetensors file that jaxft did not write, or that cannot be read."""
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None  # read_tensors tells why
    return json.loads(metadata["jaxft"]) if metadata.get("format") == FORMAT else None


def _read_jaxft(path: Path, provenance: dict[str, Any], arch: str | None) -> Weights:
    if arch not in (None, provenance["arch"]):
        raise UserError(f"{path} holds a {provenance['arch']}, not a {arch}")
    tensors = safetensors.numpy.load_file(path)
    model = ARCHITECTURES[provenance["arch"]](num_classes=provenance["num_classes"], width=provenance["width"])
    expected = {"/".join(key): array.shape for key, array in flatten_dict(_abstract_variables(model)).items()}
    try:
        _check_shapes({key: array.shape for key, array in tensors.items()}, expected)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return Weights(unflatten_dict(tensors, sep="/"), provenance)


def write_weights(path: str | Path, weights: Weights) -> None:
    """A jaxft file: safetensors named 'params/layer1/0/conv1/kernel', the provenance as JSON in the metadata."""
    path = Path(path)
    tensors = {key: np.ascontiguousarray(array) for key, array in flatten_dict(weights.variables, sep="/").items()}
    metadata = {"format": FORMAT, "jaxft": json.dumps(weights.provenance)}
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        safetensors.numpy.save_file(tensors, partial, metadata)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def replace_head(variables: Mapping[str, Any], num_classes: int, rng: jax.Array) -> dict[str, Any]:
    """The same variables with a new dense head, initialised as torch's nn.Linear; everything else is untouched."""
    features = variables["params"]["fc"]["kernel"].shape[0]
    kernel_rng, bias_rng = jax.random.split(rng)
    init = linear_init(features)
    head = {"kernel": init(kernel_rng, (features, num_classes)), "bias": init(bias_rng, (num_classes,))}
    return {**variables, "params": {**variables["params"], "fc": head}}
