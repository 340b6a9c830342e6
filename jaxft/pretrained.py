"""Pretrained weights: torchvision's layout to Flax's and back, jaxft's weights files, and the new head."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from jaxft import named_weights
from jaxft.errors import UserError
from jaxft.parts import abstract_variables
from jaxft.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from jaxft.resnet import ARCHITECTURES, ResNet, linear_init
from jaxft.torch_files import read_tensors

# torch's last name and number of axes -> Flax's collection, last name, and torch's axes in Flax's order.
# Everything before the last name is the same, with '.' for torch and one dict a name for Flax.
# Sources: torch.nn.Conv2d, Linear and BatchNorm2d; flax.linen.Conv and Dense.
LAYOUT = {
    ("weight", 4): ("params", "kernel", (2, 3, 1, 0)),  # convolution: OIHW -> HWIO
    ("weight", 2): ("params", "kernel", (1, 0)),  # dense: OI -> IO
    ("weight", 1): ("params", "scale", (0,)),
    ("bias", 1): ("params", "bias", (0,)),
    ("running_mean", 1): ("batch_stats", "mean", (0,)),
    ("running_var", 1): ("batch_stats", "var", (0,)),
}
_TORCH_NAMES = {(collection, leaf, len(axes)): name for (name, _), (collection, leaf, axes) in LAYOUT.items()}
_TRACKED = ".num_batches_tracked"  # torch counts the batches behind running statistics; Flax does not

# Hugging Face's keys (transformers' modeling_resnet.py) -> torchvision's; numbers in <> grow by one.
HUGGING_FACE = {
    r"resnet\.embedder\.embedder\.convolution": "conv1",
    r"resnet\.embedder\.embedder\.normalization": "bn1",
    r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution": r"layer<\1>.\2.conv<\3>",
    r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization": r"layer<\1>.\2.bn<\3>",
    r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution": r"layer<\1>.\2.downsample.0",
    r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization": r"layer<\1>.\2.downsample.1",
    r"classifier\.1": "fc",
}

# Part of a key -> why a network with such a key cannot be computed by ours.
OTHER_FAMILIES = {
    r"^conv1\.0\.": "its stem is three 3x3 convolutions (timm's ResNet-C, -D and -S), not one 7x7",
    r"\.(se|se_module|attn)\.": "its blocks hold attention (SE-, ECA- or CBAM-ResNet)",
    r"^stem\.conv\.|\.norm1\.|^root\.conv": "it is a ResNet v2 (BiT): GroupNorm or BatchNorm before each convolution",
    r"branch2[abc]|moving_(mean|variance)": "it is a Caffe or Keras ResNet v1: the stride in the first 1x1",
}

FORMAT = "jaxft 1"  # in the metadata of a weights file


class Weights(NamedTuple):
    variables: dict[str, Any]  # {'params': ..., 'batch_stats': ...}, of the file's own types
    provenance: dict[str, Any]  # arch, width, stem, num_classes, source (file name), source_sha256, mean, std, ...


def torch_shapes(model: ResNet) -> dict[str, tuple[int, ...]]:
    """{torchvision's key: torch's shape} of all that the model holds."""
    shapes = {}
    for (collection, *path, leaf), array in flatten_dict(abstract_variables(model)).items():
        name = _TORCH_NAMES[collection, leaf, array.ndim]
        axes = LAYOUT[name, array.ndim][2]
        shapes[".".join([*path, name])] = tuple(array.shape[i] for i in np.argsort(axes))
    return shapes


def from_torch(tensors: Mapping[str, np.ndarray], model: ResNet) -> dict[str, Any]:
    """The model's variables from a torchvision state_dict, of the same types.

    Raises UserError where keys or shapes do not fit.
    """
    tensors = {key: array for key, array in tensors.items() if not key.endswith(_TRACKED)}
    _check_shapes({key: array.shape for key, array in tensors.items()}, torch_shapes(model))
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
        name = _TORCH_NAMES[collection, leaf, array.ndim]
        axes = np.argsort(LAYOUT[name, array.ndim][2])
        tensors[".".join([*path, name])] = np.asarray(np.asarray(array).transpose(axes), order="C")
        if collection == "batch_stats":
            key = ".".join(path) + _TRACKED
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
    depths = tuple(
        len({key.split(".")[1] for key in tensors if key.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    )
    for arch in ARCHITECTURES:
        if _model_for(arch, tensors).stage_depths != depths:
            continue
        try:
            _check_shapes({k: a.shape for k, a in tensors.items() if not k.endswith(_TRACKED)}, _shapes(arch, tensors))
        except UserError:
            continue
        return arch
    return None


def _shapes(arch: str, tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return torch_shapes(_model_for(arch, tensors))


def model_of(provenance: Mapping[str, Any]) -> ResNet:
    """The network, computing in float32, whose weights these are."""
    keys = ("num_classes", "width", "stem")
    return ARCHITECTURES[provenance["arch"]](**{key: provenance[key] for key in keys if key in provenance})


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
    if shipped := named_weights.shipped(source):
        return read_weights(shipped, arch)
    named = named_weights.find(source)
    if named is None:
        if not Path(source).exists() and (near := named_weights.near(source)):
            raise UserError(f"there is no weights file {source}, nor weights of that name; named are {', '.join(near)}")
        return read_weights(source, arch)
    converted = named_weights.weights_dir() / f"{named.name}.safetensors"
    if not converted.exists():
        variables, provenance = read_weights(named_weights.weights_file(named), named.arch)
        write_weights(converted, Weights(variables, provenance | named._asdict()))
    return read_weights(converted, arch)


def read_weights(path: str | Path, arch: str | None = None) -> Weights:
    """Of a jaxft file, or of a torchvision state_dict; `arch` None takes what the file holds.

    Raises UserError where the file cannot be read, or does not fit `arch`.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and (metadata := _jaxft_metadata(path)):
        return _read_jaxft(path, metadata, arch)
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
            key: int(value.flat[0]) for key, value in tensors.items() if key.endswith(_TRACKED) and value.size
        },
    }
    return Weights(variables, provenance)


def _jaxft_metadata(path: Path) -> dict[str, Any] | None:
    """None for a .safetensors file that jaxft did not write, or that cannot be read."""
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None  # read_tensors tells why
    if metadata.get("format") != FORMAT:
        return None
    try:
        provenance = json.loads(metadata["jaxft"])
        model_of(provenance)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or of a newer jaxft: its metadata is wrong at {error}") from None
    return provenance


def _read_jaxft(path: Path, provenance: dict[str, Any], arch: str | None) -> Weights:
    if arch not in (None, provenance["arch"]):
        raise UserError(f"{path} holds a {provenance['arch']}, not a {arch}")
    tensors = safetensors.numpy.load_file(path)
    expected = {
        "/".join(key): array.shape for key, array in flatten_dict(abstract_variables(model_of(provenance))).items()
    }
    try:
        _check_shapes({key: array.shape for key, array in tensors.items()}, expected)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return Weights(unflatten_dict(tensors, sep="/"), provenance)


def write_weights(path: str | Path, weights: Weights) -> None:
    """A jaxft file: safetensors named 'params/layer1/0/conv1/kernel', the provenance as JSON in the metadata."""
    path = Path(path)
    tensors = {key: np.asarray(array, order="C") for key, array in flatten_dict(weights.variables, sep="/").items()}
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
