"""The facts about a family of networks that the conversion of weights needs."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jaxft.models.network import Network

Tensors = Mapping[str, Any]  # by the family's own names; only shapes are read


class Naming(NamedTuple):
    """A library's names of the tensors of a family."""

    library: str
    anchors: tuple[str, ...]  # keys that each network of the family has; no other network has all of them
    renamed: Mapping[str, str] = {}  # pattern of a key without its last component -> the family's own name


class Declarations(NamedTuple):
    """Declarations in files about networks with a family's keys and shapes that may compute something else."""

    own_names: str  # pattern of the names of the family's architectures
    model_type: str  # in Hugging Face's config.json
    # pattern of a name in a checkpoint or in a config.json -> what such a network computes otherwise: refused
    look_alikes: Mapping[str, str] = {}
    remarks: Mapping[str, str] = {}  # the same, if the weights are of use all the same: a note
    # key of config.json -> the value of a plain network, and what another one means; Hugging Face's by architecture
    timm_arguments: Mapping[str, tuple[Any, str]] = {}
    hugging_face_config: Callable[[str], Mapping[str, tuple[Any, str]]] = lambda arch: {}


class Family(NamedTuple):
    """A family of networks: how to find one in a checkpoint, tell it from others, and convert it."""

    name: str
    network: type  # the class of its models
    architectures: Collection[str]

    # finding one
    namings: tuple[Naming, ...]
    body: str  # pattern of keys that belong to the network or change it; other keys may be left out
    head: str  # the dense layer, which may be missing
    others: Mapping[str, str]  # pattern of a key beside the anchors -> the reason why it is another family
    relatives: Mapping[str, str]  # pattern of a key in a file without anchors -> the reason why it is not read
    declarations: Declarations

    # its architecture
    nearest: Callable[[Tensors], Sequence[str]]  # the architectures that may have these tensors, or nearly
    model_for: Callable[[str, Tensors], Network]  # an architecture's model with the classes and options of the tensors
    head_inputs: Callable[[Tensors], Collection[tuple[int, ...]]]  # the number of features, by each layer that shows it
    unsupported: Callable[[Tensors], str | None]  # why no architecture has these tensors, if `others` cannot tell

    # converting it
    layout: Callable[[tuple[str, ...], int], tuple[str, tuple[int, ...]]]  # as layout.torch_layers
    stages: Callable[[Network], Mapping[str, str]]  # torchvision's module -> path of ours with the same output


def length(tensors: Tensors, key: str) -> int:
    """Returns the length of a tensor's first axis, or 0 if it has none or is missing."""
    shape = tensors[key].shape if key in tensors else ()
    return shape[0] if shape else 0


def count_classes(tensors: Tensors, head: str) -> int:
    """Returns the number of classes of a dense head, 0 if it is missing."""
    return length(tensors, f"{head}.bias") or 1000 if any(key.startswith(f"{head}.") for key in tensors) else 0
