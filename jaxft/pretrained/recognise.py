"""Recognises the network in a checkpoint: which one, its architecture, and what a user should know about it.

Uses only keys and shapes; the numbers are read later. The functions below `recognise` are specific to ResNets.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.errors import UserError, shortened
from jaxft.models.architectures import RESNETS
from jaxft.models.resnet import ARCHITECTURES, ResNet
from jaxft.pretrained.convert import torch_shapes
from jaxft.pretrained.declared import doubts, look_alike, read_declared
from jaxft.pretrained.resnet import NUM_BATCHES_TRACKED, RESNET
from jaxft.pretrained.state_dict import (
    Network,
    choose,
    distinct,
    excerpt,
    find_networks,
    is_average,
    names_of,
    other_family,
    summarised,
    unknown,
    unmerged,
)
from jaxft.pretrained.torch_files import TensorFile
from jaxft.pretrained.unpickle import Tensor
from jaxft.pretrained.weights_file import check_shapes

FAMILIES = (RESNET,)


class Recognised(NamedTuple):
    """A network that was recognised in a checkpoint; its numbers have not been read yet."""

    path: Path
    network: Network
    model: ResNet
    arch: str
    notes: list[str]  # what a user should know: what was chosen, left out or doubtful


def recognise(file: TensorFile, path: Path, name: str = "", arch: str | None = None) -> Recognised:
    """Finds the network called `name`, or the only one, and its architecture. Raises UserError if it does not fit."""
    networks = find_networks(file.content, FAMILIES)
    if not networks:
        raise UserError(f"{path} is refused: {unknown(file.content, FAMILIES)}")
    network = choose(networks, path, name)
    if reason := other_family(network.family, network.tensors) or _without_statistics(network.tensors):
        raise UserError(f"{path} is not a ResNet like torchvision's: {reason}")
    network, notes = without_unusable_head(network)
    found = infer_arch(network.tensors)
    if found is None and (reason := unmerged(network.tensors)):
        raise UserError(f"{path} is refused: {reason}")
    if found is None or arch not in (None, found):
        raise UserError(f"{path} {_misfit(network.tensors, found, arch)}")
    declared = read_declared(file.content, path)
    if reason := look_alike(declared, found):
        raise UserError(f"{path} has the keys and shapes of a {found}, but {reason}")
    averages = [other for other in distinct(networks) if is_average(other) and other is not network]
    if averages and not name:
        taken, *others = map(excerpt, names_of([network, *averages]))
        notes.append(f"took {taken}, not {shortened(others)}; {path.name}#{others[0]} takes the other")
    if network.left_out:
        notes.append(f"left out: {summarised(network.left_out)}")
    return Recognised(path, network, _model_for(found, network.tensors), found, notes + doubts(declared, found))


def _misfit(tensors: Mapping[str, Tensor], found: str | None, arch: str | None) -> str:
    """Returns which architecture a file holds, or how its tensors differ from the expected or the nearest one."""
    if found:
        return f"holds a {found}, not a {arch}"
    differences = {name: _differences(tensors, name) for name in ([arch] if arch else _nearest(tensors))}
    nearest = min(differences, key=lambda name: differences[name][0])
    return f"does not hold a {nearest}: {differences[nearest][1]}"


def _nearest(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the architectures with the same block whose depths differ least."""
    block = "bottleneck" if any(key.endswith(".conv3.weight") for key in tensors) else "basic"
    depths = _depths(tensors)
    distances = {
        name: sum(abs(ours - theirs) for ours, theirs in zip(depths, architecture.depths, strict=True))
        for name, architecture in RESNETS.items()
        if architecture.block == block
    }
    return [name for name, distance in distances.items() if distance == min(distances.values())]


def _depths(tensors: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the number of blocks of each stage."""
    blocks = {tuple(key.split(".")[:2]) for key in tensors}
    return tuple(sum(stage == f"layer{i}" for stage, *_ in blocks) for i in range(1, 5))


def _differences(tensors: Mapping[str, Tensor], arch: str) -> tuple[int, str]:
    """Returns the number of keys that are missing, extra or of another shape, and a text about them."""
    found, expected = _shapes(tensors), torch_shapes(_model_for(arch, tensors))
    try:
        check_shapes(found, expected)
    except UserError as error:
        wrong = sum(found[key] != expected[key] for key in found.keys() & expected.keys())
        return len(found.keys() ^ expected.keys()) + wrong, str(error)
    return 0, ""


def without_unusable_head(network: Network) -> tuple[Network, list[str]]:
    """Returns the network without a head that is not one dense layer on the features, and a note if it has no head.

    Fine-tuning replaces the head anyway.
    """
    head = network.family.head
    own = {key: tensor for key, tensor in network.tensors.items() if key.startswith(f"{head}.")}
    weight, bias = (own.get(f"{head}.{leaf}") for leaf in ("weight", "bias"))
    complete = weight is not None and bias is not None
    if complete and not _is_other_layer(network.tensors, weight, bias):
        return network, []
    body = {key: tensor for key, tensor in network.tensors.items() if key not in own}
    left_out = [*network.left_out, *(network.keys[key] for key in own)]
    note = f"its head ({summarised([*own])}) is not a dense layer on the features" if own else "it has no head"
    return network._replace(tensors=body, left_out=left_out), [note]


def _is_other_layer(tensors: Mapping[str, Tensor], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Returns whether the head is a convolution, or a well-formed dense layer on another number of features."""
    assert weight is not None
    assert bias is not None
    last = [key for key in tensors if key.startswith("layer4.") and key.endswith(".running_mean")]
    features = {tensors[key].shape for key in last if ".downsample." in key}
    shape = weight.shape
    if len(shape) == 4:  # a convolution
        return True
    return len(shape) == 2 and bias.shape == shape[:1] != (0,) and features not in ({shape[1:]}, set())


def _without_statistics(tensors: Mapping[str, Tensor]) -> str | None:
    if "bn1.weight" in tensors and "bn1.running_mean" not in tensors:
        return "its norms keep no running statistics: GroupNorm, not BatchNorm"
    return None


def infer_arch(tensors: Mapping[str, Any]) -> str | None:
    """Returns the architecture that has these keys and shapes, or None."""
    shapes = _shapes(tensors)
    for arch, architecture in RESNETS.items():
        if architecture.depths == _depths(tensors) and torch_shapes(_model_for(arch, tensors)) == shapes:
            return arch
    return None


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns all shapes but those of torch's counts of batches; a missing head gets the shapes of 0 classes."""
    shapes = {key: tensor.shape for key, tensor in tensors.items() if not key.endswith(NUM_BATCHES_TRACKED)}
    if not any(key.startswith("fc.") for key in shapes):
        model = _model_for("resnet18" if "layer1.0.conv3.weight" not in shapes else "resnet50", tensors)
        shapes |= {key: shape for key, shape in torch_shapes(model).items() if key.startswith("fc.")}
    return shapes


def _model_for(arch: str, tensors: Mapping[str, Any]) -> ResNet:
    """Returns the model with the number of classes, width and stem of these tensors."""

    def length(key: str) -> int:
        shape = tensors[key].shape if key in tensors else ()
        return shape[0] if shape else 0

    stem = ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var")
    widths = Counter(filter(None, map(length, stem)))  # the most frequent one: a single tensor may be wrong
    small = "conv1.weight" in tensors and tensors["conv1.weight"].shape[2:] == (3, 3)
    return ARCHITECTURES[arch](
        num_classes=length("fc.bias") or 1000 if any(key.startswith("fc.") for key in tensors) else 0,
        width=widths.most_common(1)[0][0] if widths else 64,
        stem="small" if small else "imagenet",
    )
