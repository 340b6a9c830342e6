"""The facts about a family of networks that the conversion of weights needs."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jaxft.models.network import Network
from jaxft.pretrained.templates import match, translate

Tensors = Mapping[str, Any]  # by the family's own names; only shapes are read


class Part(NamedTuple):
    """A tensor in a file: a whole tensor of ours, or one of several that are concatenated."""

    name: str  # the family's own name
    number: int = 0  # among those that are concatenated


class Naming(NamedTuple):
    """A library's names of the tensors of a family. The first one of a family has the family's own names.

    The names are templates (templates.py) of whole keys or of layers, that is keys without their last component. They
    are used in both directions; keys that fit none of them are the same on both sides.
    """

    library: str
    anchors: tuple[str, ...]  # keys that each network of the family has; no other network has all of them
    renamed: Mapping[str, str] = {}  # the source's name -> ours
    merged: Mapping[str, tuple[str, ...]] = {}  # our name -> the source's, equal parts along the first axis
    reshaped: Mapping[str, tuple[int, ...]] = {}  # our whole key -> shape in the source: 1, or -1 for an axis of ours
    options: Mapping[str, Any] = {}  # values of the family's options in this library, unless a config.json has others
    axes: Mapping[str, int] = {}  # anchor -> number of axes that tells it from a naming with the same anchors
    default_for: Collection[str] = ()  # architectures that get these names, not the first ones, without a source

    def part(self, key: str) -> Part:
        """Returns what a key of the source, without a prefix, is in the family's own names."""
        for name, sources in self.merged.items():
            for number, source in enumerate(sources):
                if (own := translate(key, [(source, name)])) is not None:
                    return Part(own, number)
        return Part(translate(key, self.renamed.items()) or key)

    def keys(self, name: str) -> tuple[str, ...]:
        """Returns the source's keys of a tensor with this own name; the inverse of `part`."""
        for own, sources in self.merged.items():
            found = [translate(name, [(own, source)]) for source in sources]
            if None not in found:
                return tuple(filter(None, found))
        return (translate(name, [(own, source) for source, own in self.renamed.items()]) or name,)

    def own_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns a tensor's shape without the axes of length 1 that only the source has."""
        axes = self._axes(name)
        if len(axes) != len(shape) or any(axis == 1 != length for axis, length in zip(axes, shape, strict=True)):
            return shape
        return tuple(length for axis, length in zip(axes, shape, strict=True) if axis != 1)

    def source_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of a tensor of ours in the source; the inverse of `own_shape`."""
        axes, lengths = self._axes(name), iter(shape)
        if sum(axis != 1 for axis in axes) != len(shape):
            return shape
        return tuple(1 if axis == 1 else next(lengths) for axis in axes)

    def _axes(self, name: str) -> tuple[int, ...]:
        return next((axes for own, axes in self.reshaped.items() if match(own, name) is not None), ())


class Declarations(NamedTuple):
    """Declarations in files about networks with a family's keys and shapes that may compute something else."""

    own_names: str  # pattern of the names of the family's architectures
    model_type: str  # in Hugging Face's config.json; a pattern
    # pattern of a name in a checkpoint or in a config.json -> what such a network computes otherwise: refused
    look_alikes: Mapping[str, str] = {}
    remarks: Mapping[str, str] = {}  # the same, if the weights are of use all the same: a note
    # by architecture: key of config.json -> the value of a plain network, and what another one means
    timm_arguments: Callable[[str], Mapping[str, tuple[Any, str]]] = lambda arch: {}
    hugging_face_config: Callable[[str], Mapping[str, tuple[Any, str]]] = lambda arch: {}
    option_keys: Mapping[str, str] = {}  # key of Hugging Face's config.json -> option of the family


class Family(NamedTuple):
    """A family of networks: how to find one in a checkpoint, tell it from others, and convert it."""

    name: str
    network: type  # the class of its models
    architectures: Sequence[str]

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
    stages: Callable[[Network], Mapping[str, str]]  # module by the family's own names -> our path with the same output

    # the same network in other libraries, to compare with: arguments of timm.create_model, and by the naming's library
    # the class of a transformers config and its arguments
    timm_model: Callable[[Any], Mapping[str, Any]] = lambda model: {}
    transformers_config: Callable[[Any, str], tuple[str, Mapping[str, Any]]] = lambda model, library: ("", {})


def length(tensors: Tensors, key: str) -> int:
    """Returns the length of a tensor's first axis, or 0 if it has none or is missing."""
    shape = tensors[key].shape if key in tensors else ()
    return shape[0] if shape else 0


def count_classes(tensors: Tensors, head: str) -> int:
    """Returns the number of classes of a dense head, 0 if it is missing."""
    return length(tensors, f"{head}.bias") or 1000 if any(key.startswith(f"{head}.") for key in tensors) else 0
