"""Recognises the network in a checkpoint: which one, its architecture, and what a user should know about it.

Uses only keys and shapes; the numbers are read later.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxft.errors import UserError, shortened
from jaxft.models.network import Network as Model
from jaxft.pretrained.convert import torch_shapes
from jaxft.pretrained.declared import declared_options, doubts, look_alike, read_declared
from jaxft.pretrained.families import FAMILIES
from jaxft.pretrained.family import Family, Tensors
from jaxft.pretrained.joined import Joined
from jaxft.pretrained.layout import NUM_BATCHES_TRACKED
from jaxft.pretrained.state_dict import (
    Network,
    choose,
    distinct,
    excerpt,
    find_networks,
    is_average,
    largest,
    matching_reason,
    names_of,
    stranger,
    summarised,
    unknown,
    unmerged,
)
from jaxft.pretrained.strangers import STRANGERS, TEXT_TOWER
from jaxft.pretrained.torch_files import TensorFile
from jaxft.pretrained.unpickle import Tensor
from jaxft.pretrained.weights_file import check_shapes

_LONGEST = 200  # characters of a text about keys that differ
_CANDIDATES = 3  # architectures that a network is compared with to say how it differs
_SIMILAR = 0.1  # part of the kinds of keys that two networks share


class Examined(NamedTuple):
    """The chosen one of a checkpoint's networks, without a head that cannot be used."""

    network: Network
    arch: str | None  # None if no architecture has its keys and shapes
    notes: list[str]


class Recognised(NamedTuple):
    """A network that was recognised in a checkpoint; its numbers have not been read yet."""

    path: Path
    network: Network
    model: Model
    arch: str
    notes: list[str]  # what a user should know: what was chosen, left out or doubtful


def recognise(file: TensorFile, path: Path, name: str = "", arch: str | None = None) -> Recognised:
    """Returns the network called `name`, or the only one, with its architecture. Raises UserError if none fits."""
    networks = find_networks(file.content, FAMILIES)
    return check(examine(networks, file, path, name), networks, file, path, name, arch)


def examine(networks: Sequence[Network], file: TensorFile, path: Path, name: str) -> Examined:
    """Chooses one of the networks that `find_networks` found, and infers its architecture.

    Raises UserError if there is none, or if the choice is not clear.
    """
    if not networks:
        raise UserError(f"{path} is refused: {unknown(file.content, FAMILIES, _nearest_family)}")
    complete = networks[0].complete  # then all of them are
    if not complete:
        keys = [key for key in largest(file.content) or () if type(key) is str]
        several = len(distinct(networks)) > 1 and not name
        if reason := stranger(keys, FAMILIES) or (several and _nearest_family(keys)):
            raise UserError(f"{path} is refused: {reason}")
    network, notes = _without_unusable_head(choose(networks, path, name))
    return Examined(network, infer_arch(network.tensors, network.family) if complete else None, notes)


def check(
    examined: Examined, networks: Sequence[Network], file: TensorFile, path: Path, name: str, arch: str | None
) -> Recognised:
    """Returns the examined network. Raises UserError if it is not one that jaxft has, or not an `arch`."""
    network, found, notes = examined
    family, tensors = network.family, network.tensors
    keys = [*network.keys.values(), *network.left_out]
    if "visual" in network.components and (reason := matching_reason(TEXT_TOWER, keys)):
        raise UserError(f"{path} is refused: {reason}")
    if found is None and (reason := matching_reason(STRANGERS, keys)):
        raise UserError(f"{path} is refused: {reason}")
    if reason := matching_reason(family.others, tensors) or family.unsupported(tensors):
        raise UserError(f"{path} is not a {family.name} like {family.namings[0].library}'s: {reason}")
    if found is None and (reason := unmerged(tensors)):
        raise UserError(f"{path} is refused: {reason}")
    if found is None or arch not in (None, found):
        raise UserError(f"{path} {_misfit(tensors, family, found, arch)}")
    declared = read_declared(file.content, path)
    if reason := look_alike(declared, found, family.declarations):
        raise UserError(f"{path} has the keys and shapes of a {found}, but {reason}")
    notes = [*notes]
    averages = [other for other in distinct(networks) if is_average(other) and other is not network]
    if averages and not name:
        taken, *others = map(excerpt, names_of([network, *averages]))
        notes.append(f"took {taken}, not {shortened(others)}; {path.name}#{others[0]} takes the other")
    if network.left_out:
        notes.append(f"left out: {summarised(network.left_out)}")
    notes += doubts(declared, found, family.declarations)
    model = family.model_for(found, tensors)
    options = {**network.naming.options, **declared_options(declared, model.options, family.declarations)}
    return Recognised(path, network, model.clone(**options), found, notes)


def infer_arch(tensors: Tensors, family: Family) -> str | None:
    """Returns the architecture of the family that has these keys and shapes, or None."""
    for arch in family.nearest(tensors):
        expected = torch_shapes(family.model_for(arch, tensors))
        if _shapes(tensors, family, expected) == expected:
            return arch
    return None


def _nearest_family(keys: Sequence[str]) -> str:
    """Returns which family's names are the most similar to the keys, and how they differ."""
    given = {_masked(key): key for key in reversed(keys)}
    best: tuple[float, str, dict[str, str]] = (0.0, "", {})
    for family in FAMILIES:
        own = torch_shapes(family.model_for(family.architectures[0], {}))
        for naming in family.namings:
            expected = {_masked(key): key for name in reversed(own) for key in naming.keys(name)}
            similarity = len(expected.keys() & given.keys()) / len(expected.keys() | given.keys())
            if similarity > best[0]:
                best = similarity, f"a {family.name} in the names of {naming.library}", expected
    similarity, name, expected = best
    if similarity < _SIMILAR:
        known = ", ".join(family.name for family in FAMILIES)
        examples = shortened([excerpt(key, 40) for key in keys])
        return f"its {len(keys):,} tensors are not named as those of jaxft's networks ({known}): {examples}"
    missing, extra = (
        shortened([excerpt(a[key], 40) for key in sorted(a.keys() - b.keys())], 1)
        for a, b in ((expected, given), (given, expected))
    )
    return f"it fits none of jaxft's networks; nearest is {name}, but it lacks {missing or 'none'} and has {extra}"


def _masked(key: str) -> str:
    """Returns the last components of a key without numbers, which differ from layer to layer."""
    return re.sub(r"\d+", "#", ".".join(key.split(".")[-3:]))


def _misfit(tensors: Tensors, family: Family, found: str | None, arch: str | None) -> str:
    """Returns which architecture a file holds, or how its tensors differ from the expected or the nearest one."""
    if found:
        return f"holds a {found}, not a {arch}"
    if arch and arch not in family.architectures:
        return f"holds a {family.name}, not a {arch}"
    candidates = [arch] if arch else family.nearest(tensors)[:_CANDIDATES]
    differences = {name: _differences(tensors, family, name) for name in candidates}
    nearest = min(differences, key=lambda name: differences[name][0])
    return f"does not hold a {nearest}: {differences[nearest][1]}"


def _differences(tensors: Tensors, family: Family, arch: str) -> tuple[int, str]:
    """Returns the number of keys that are missing, extra or of another shape, and a text about them."""
    expected = torch_shapes(family.model_for(arch, tensors))
    found = _shapes(tensors, family, expected)
    wrong = sum(found[key] != expected[key] for key in found.keys() & expected.keys())
    text = ""
    for shown in (3, 1):
        try:
            check_shapes(found, expected, shown)
        except UserError as error:
            text = str(error)
        if len(text) <= _LONGEST:
            break
    return len(found.keys() ^ expected.keys()) + wrong, text


def _shapes(tensors: Tensors, family: Family, expected: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns all shapes but those of torch's counts of batches; a missing head gets the expected shapes."""
    shapes = {key: tensor.shape for key, tensor in tensors.items() if not key.endswith(NUM_BATCHES_TRACKED)}
    head = f"{family.head}."
    if not any(key.startswith(head) for key in shapes):
        shapes |= {key: shape for key, shape in expected.items() if key.startswith(head)}
    return shapes


def _without_unusable_head(network: Network) -> tuple[Network, list[str]]:
    """Returns the network without a head that is not one dense layer on the features, and a note if it has no head.

    Fine-tuning replaces the head anyway.
    """
    head = network.family.head
    own = {key: tensor for key, tensor in network.tensors.items() if key.startswith(f"{head}.")}
    weight, bias = (own.get(f"{head}.{leaf}") for leaf in ("weight", "bias"))
    complete = weight is not None and bias is not None
    if complete and not _is_other_layer(network, weight, bias):
        return network, []
    body = {key: tensor for key, tensor in network.tensors.items() if key not in own}
    originals = {key: tensor for key, tensor in network.originals.items() if network.naming.part(key).name in body}
    left_out = [*network.left_out, *(network.keys[key] for key in own)]
    note = f"its head ({summarised([*own])}) is not a dense layer on the features" if own else "it has no head"
    return network._replace(tensors=body, originals=originals, left_out=left_out), [note]


def _is_other_layer(network: Network, weight: Tensor | Joined | None, bias: Tensor | Joined | None) -> bool:
    """Returns whether the head is a convolution, or a well-formed dense layer on another number of features."""
    assert weight is not None
    assert bias is not None
    features = {*network.family.head_inputs(network.tensors)}
    shape = weight.shape
    if len(shape) == 4:  # a convolution
        return True
    return len(shape) == 2 and bias.shape == shape[:1] != (0,) and features not in ({shape[1:]}, set())
