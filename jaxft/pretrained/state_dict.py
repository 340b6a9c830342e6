"""Finds networks in a checkpoint: the dicts around them, and the prefix of their keys.

A family names keys by which its networks can be recognised (`Naming.anchors`); the part before such a key is the
prefix. So `_orig_mod.module.`, `student.backbone.` and any other prefix are found alike.
"""

import re
import shlex
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple

from jaxft.errors import UserError, shortened
from jaxft.pretrained.family import Family, Naming, Part
from jaxft.pretrained.joined import Joined
from jaxft.pretrained.strangers import STRANGERS
from jaxft.pretrained.unpickle import Foreign, Tensor, children

# Components of keys that torch.compile, FSDP, activation checkpointing and Fabric insert before or inside a network,
# that DataParallel puts before it, and those that do not distinguish networks.
_INSERTED = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
WRAPPING = frozenset({"module"})
TRANSPARENT = WRAPPING | frozenset({"model", "net", "network", "state_dict"})
AVERAGES = re.compile(r"(^|_)(ema|swa|averaged?|avg|shadow)(_|$)", re.IGNORECASE)
MAX_DEPTH = 5  # of dicts around a state_dict
MAX_NETWORKS = 16  # networks of a checkpoint that are considered; each takes a pass over all keys of its dict
_SAVE = "torch.save(model.state_dict(), FILE)"
_SAVE_FLOATS = "torch.save(model.float().state_dict(), FILE)"
_REBUILT = {  # torch/_utils.py: functions in pickles -> what they make
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has no numbers",
    "torch._utils._rebuild_tensor_v3": "a tensor of a dtype such as float8",
}
# Pattern of keys whose tensors are only parts of a layer's weight -> how to merge them.
_PARTS = {
    r"\.parametrizations\.": "torch.nn.utils.parametrize.remove_parametrizations",
    r"\.weight_(orig|mask)$": "torch.nn.utils.prune.remove or remove_spectral_norm",
    r"\.weight_[gv]$": "torch.nn.utils.remove_weight_norm",
    r"\.(base_layer|lora_\w+)\.": "merge_and_unload of PEFT",
}
UNPREFIXED = "."  # names a network that is not in a dict of its own and has no prefix


class Network(NamedTuple):
    """A network of a known family in a checkpoint."""

    family: Family
    naming: Naming
    wrappers: tuple[str, ...]  # keys of the dicts around it
    prefix: str
    tensors: dict[str, Tensor | Joined]  # by the family's own names, without the prefix
    keys: dict[str, str]  # the family's own name -> the key in the file, or its keys in the form a.{b,c}.d
    originals: dict[str, Tensor]  # the same tensors by the source's names, without the prefix
    left_out: list[Any]  # other keys of the same dict; in a chosen network, as they may be shown
    problem: str  # why it cannot be read, or ''
    complete: bool  # it has all anchors of its naming

    @property
    def components(self) -> tuple[str, ...]:
        return (*self.wrappers, *filter(None, self.prefix.split(".")))


class _Plain(NamedTuple):
    """A key without the components that say nothing about its tensor."""

    name: str  # without those that _INSERTED matches
    bare: str  # also without those in TRANSPARENT


def excerpt(text: object, length: int = 60) -> str:
    """Returns text from a file as a terminal may show it: without control characters, and not too long."""
    shown = "".join(character if character.isprintable() else "?" for character in str(text)[: length + 1])
    return shown if len(shown) <= length else f"{shown[: length - 3]}..."


def kind_of(value: Any) -> str:
    """Describes a value from a pickle by its type."""
    if isinstance(value, Foreign):
        if value.name.endswith("multiarray._reconstruct"):
            return "a NumPy array"
        if value.name.endswith("Storage"):
            return f"a tensor of {excerpt(value.name.removesuffix('Storage'))}"
        if value.name in _REBUILT:
            return _REBUILT[value.name]
        return f"an object of {excerpt(value.name)}"
    name = type(value).__name__
    return "nothing" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def shown_key(key: Any) -> str:
    """Returns a dict's key as it may be shown."""
    return excerpt(key) if type(key) in (str, int, float, bool) else kind_of(key)


def summarised(keys: Sequence[str], shown: int = 3) -> str:
    """Groups keys by their first component that is not in TRANSPARENT: 'module.queue, module.encoder_k.* (4)'."""
    counts: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        first = next((i for i, part in enumerate(parts) if part not in TRANSPARENT), len(parts) - 1)
        counts[".".join(parts[: first + 1]) + (".*" if first < len(parts) - 1 else "")] += 1
    groups = [excerpt(name, 40) + (f" ({count:,})" if count > 1 else "") for name, count in counts.items()]
    return shortened(groups, shown)


def tables(content: Any) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    """Yields each dict that holds tensors, with the keys of the containers around it: outer ones first, each once."""
    seen: set[int] = set()
    queue: deque[tuple[tuple[Any, ...], Any]] = deque([((), content)])
    while queue:
        path, value = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        found = children(value)
        if any(isinstance(child, Tensor) for child in found.values()):
            yield tuple(map(shown_key, path)), found
        if len(path) < MAX_DEPTH:
            queue.extend(((*path, key), child) for key, child in found.items() if _holds_something(child))


def _holds_something(value: Any) -> bool:
    return bool(value.items if isinstance(value, Foreign) else type(value) in (dict, list, tuple) and value)


def largest(content: Any) -> dict[Any, Any] | None:
    """Returns the dict that holds the most tensors, or None."""
    found = (table for _, table in tables(content))
    return max(found, key=lambda table: sum(isinstance(value, Tensor) for value in table.values()), default=None)


def find_networks(content: Any, families: Sequence[Family]) -> list[Network]:
    """Returns the networks of known families in a checkpoint that have the largest part of their family's anchors.

    So an incomplete network is returned only if there is no complete one. A network that was saved under two names is
    found twice; `distinct` drops the second.
    """
    found = [(place, wrappers, table) for wrappers, table in tables(content) for place in _places(table, families)]
    most = max((place.part for place, _, _ in found), default=0)
    networks = []
    plain: dict[Any, _Plain] = {}  # of all text keys, once for all networks
    for place, wrappers, table in [entry for entry in found if entry[0].part == most][:MAX_NETWORKS]:
        plain |= {key: _plain(key) for key in table if type(key) is str and key not in plain}
        networks.append(_network(place, wrappers, table, plain))
    return networks


class _Place(NamedTuple):
    """A prefix in a dict behind which anchors of a naming were found."""

    family: Family
    naming: Naming
    prefix: str
    keys: frozenset[str]  # that are anchors

    @property
    def part(self) -> Fraction:
        return Fraction(len(self.keys), len(self.naming.anchors))


def _places(table: Mapping[Any, Any], families: Sequence[Family]) -> list[_Place]:
    """Returns the places of networks in a dict.

    If the anchors of several namings are the same keys, the one with the larger part of its anchors is taken, then the
    one with more anchors, then the one with the shorter prefix.
    """
    namings = [(family, naming) for family in families for naming in family.namings]
    anchors = [(anchor, i) for i, (_, naming) in enumerate(namings) for anchor in naming.anchors]
    endings = tuple(anchor for anchor, _ in anchors)
    found: dict[tuple[int, str], set[str]] = {}
    for key, value in table.items():
        if type(key) is not str or not (key := _INSERTED.sub("", key)).endswith(endings):
            continue
        for anchor, i in anchors:
            prefix = key.removesuffix(anchor)
            axes = namings[i][1].axes.get(anchor)
            if axes is not None and not (isinstance(value, Tensor) and len(value.shape) == axes):
                continue
            if prefix != key and (not prefix or prefix.endswith(".")):
                found.setdefault((i, prefix), set()).add(key)
    places = [_Place(*namings[i], prefix, frozenset(keys)) for (i, prefix), keys in found.items()]
    taken: set[str] = set()
    kept = []
    for place in sorted(places, key=lambda place: (-place.part, -len(place.keys), len(place.prefix))):
        if taken.isdisjoint(place.keys):
            kept.append(place)
            taken |= place.keys
    return [place for place in places if place in kept]


def _network(
    place: _Place, wrappers: tuple[str, ...], table: Mapping[Any, Any], plain: Mapping[Any, _Plain]
) -> Network:
    """Splits a dict into the network's tensors, by the family's own names, and other keys."""
    family, naming, prefix, _ = place
    parts: dict[str, dict[int, Tensor]] = {}
    keys: dict[str, dict[int, str]] = {}
    originals: dict[str, Tensor] = {}
    left_out: list[Any] = []
    problem = ""
    for key, value in table.items():
        in_prefix = key in plain and plain[key].name.startswith(prefix)
        part = naming.part(plain[key].name[len(prefix) :]) if in_prefix else Part("")
        name = part.name
        if not name or not re.match(family.body, name):
            left_out.append(key)
        elif part.number in keys.get(name, ()):
            problem = f"it holds {name} twice, as {excerpt(keys[name][part.number])} and {excerpt(key)}; delete one"
        elif not isinstance(value, Tensor):
            if value is None or name.startswith(f"{family.head}."):  # a head is not needed, nor a layer without state
                left_out.append(key)
            else:
                problem = f"its entry {shown_key(key)!r} is {kind_of(value)}, not a plain tensor; {_SAVE_FLOATS}"
        else:
            parts.setdefault(name, {})[part.number] = value
            keys.setdefault(name, {})[part.number] = key
            originals[plain[key].name[len(prefix) :]] = value
    own = {plain[key].bare: (name, key) for name, found in keys.items() for key in found.values()}
    for key in left_out:
        if key in plain and plain[key].bare in own:
            name, other = own[plain[key].bare]
            problem = f"it holds {name} twice, as {excerpt(other)} and {excerpt(key)}; delete one"
    tensors: dict[str, Tensor | Joined] = {}
    for name, found in parts.items():
        joined = _join(naming, name, found)
        if isinstance(joined, str):
            problem = problem or f"{joined} beside {excerpt(next(iter(keys[name].values())), 80)}"
        else:
            tensors[name] = joined
    shown = {name: _in_braces([keys[name][number] for number in sorted(keys[name])]) for name in tensors}
    return Network(family, naming, wrappers, prefix, tensors, shown, originals, left_out, problem, place.part == 1)


def _join(naming: Naming, name: str, parts: Mapping[int, Tensor]) -> Tensor | Joined | str:
    """Returns the tensor with this own name, before its numbers are read, or what is wrong with its parts."""
    names = naming.keys(name)
    if missing := [key for number, key in enumerate(names) if number not in parts and len(names) > 1]:
        return f"it has no {shortened(missing)}"
    tensors = [parts[number] for number in sorted(parts)]
    dtype, shape = tensors[0].dtype, tensors[0].shape
    for key, tensor in zip(names, tensors, strict=True):
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            return f"its {key} has shape {tensor.shape} in {tensor.dtype}, not {shape} in {dtype}, as the tensor"
    if len(tensors) == 1:
        own = naming.own_shape(name, shape)
        return tensors[0] if own == shape else Joined(dtype, own, (tensors[0],))
    if not shape:
        return f"its {names[0]} is a single number"
    return Joined(dtype, (len(tensors) * shape[0], *shape[1:]), tuple(tensors))


def _in_braces(keys: Sequence[str]) -> str:
    """Returns keys that differ in one component as one text: attention.{query,key,value}.weight."""
    first, *others = (key.split(".") for key in keys)
    differing = [
        i for i, _ in enumerate(first) if any(len(other) != len(first) or other[i] != first[i] for other in others)
    ]
    if len(differing) != 1:
        return keys[0]
    (at,) = differing
    return ".".join([*first[:at], f"{{{','.join(part[at] for part in (first, *others))}}}", *first[at + 1 :]])


def _plain(key: str) -> _Plain:
    name = _INSERTED.sub("", key)
    return _Plain(name, ".".join(part for part in name.split(".") if part not in TRANSPARENT))


def distinct(networks: Sequence[Network]) -> list[Network]:
    """Drops networks that share their tensors with an earlier one, as when an object was saved under two names."""
    kept: list[Network] = []
    for network in networks:
        if all(network.tensors != other.tensors for other in kept):
            kept.append(network)
    return kept


def names_of(networks: Sequence[Network]) -> list[str]:
    """Returns the shortest names that distinguish the networks: ['student', 'teacher']."""
    counts = Counter(part for network in networks for part in {*network.components})
    names = []
    for network in networks:
        own = [part for part in network.components if counts[part] == 1 and part not in WRAPPING]
        names.append(own[0] if own and len(networks) > 1 else ".".join(network.components) or UNPREFIXED)
    return names


def choose(networks: Sequence[Network], path: object, name: str = "") -> Network:
    """Returns the network called `name`, or the only one that is not an average of weights.

    Raises UserError if there is none, or several.
    """
    everywhere, networks = networks, distinct(networks)
    names = [excerpt(name) for name in names_of(networks)]
    listed = shortened([repr(name) for name in names], 6)
    if name:
        called = [network for i, network in enumerate(networks) if name in (names[i], ".".join(network.components))]
        parts = _INSERTED.sub("", f"{name}.").rstrip(".").split(".")
        called = called or distinct([network for network in everywhere if _is_part(parts, network.components)])
        if not called:
            has = f"it has {listed}" if len(networks) > 1 else f"it holds one, which {path} selects"
            raise UserError(f"{path} has no network {excerpt(name)!r}; {has}")
        networks = called
    else:
        plain = [network for network in networks if not is_average(network)]
        networks = plain if len(plain) == 1 else networks
    if len(networks) > 1:
        first, second = networks[:2]
        if first.wrappers == second.wrappers and _bare(first) == _bare(second):
            raise UserError(f"{path} holds each tensor twice, with {_prefix(first)} and {_prefix(second)}; delete one")
        example = shlex.quote(f"{path}#{names[0]}")
        raise UserError(f"{path} holds {len(networks)} networks: {listed}; choose one, as in {example}")
    (network,) = networks
    if network.problem:
        raise UserError(f"{path} is refused: {network.problem}")
    return network._replace(left_out=[shown_key(key) for key in network.left_out])


def is_average(network: Network) -> bool:
    """Returns whether the network's name is that of a moving average of weights (EMA, SWA)."""
    return any(AVERAGES.search(part) for part in network.components)


def _is_part(parts: Sequence[str], components: Sequence[str]) -> bool:
    return any([*components[i : i + len(parts)]] == [*parts] for i in range(len(components)))


def _bare(network: Network) -> list[str]:
    return [part for part in network.prefix.split(".") if part not in WRAPPING]


def _prefix(network: Network) -> str:
    return f"the prefix {excerpt(network.prefix)}" if network.prefix else "no prefix"


def unknown(content: Any, families: Sequence[Family], compare: Callable[[Sequence[str]], str]) -> str:
    """Returns why there is no network of the families in a checkpoint. compare: says how keys differ from theirs."""
    found = largest(content)
    if found is None:
        return without_tensors(content)
    keys = [key for key in found if type(key) is str]
    if not keys:
        return f"its tensors have {kind_of(next(iter(found)))} as key, not text, as in a list; {_SAVE}"
    return stranger(keys, families) or compare(keys)


def stranger(keys: Collection[str], families: Sequence[Family]) -> str | None:
    """Returns which network that jaxft does not have has such keys, or None."""
    for family in families:
        if reason := matching_reason(family.relatives, keys):
            return f"it is not a {family.name} that jaxft knows: {reason}"
    return matching_reason(STRANGERS, keys)


def matching_reason(reasons: Mapping[str, str], keys: Collection[str]) -> str | None:
    """Returns the first reason whose pattern is found in one of the keys, or None."""
    for pattern, reason in reasons.items():
        if any(re.search(pattern, key) for key in keys):
            return reason
    return None


def unmerged(keys: Collection[str]) -> str | None:
    """Returns how to merge weights that are saved in parts (pruned, normalised, with LoRA), or None."""
    for pattern, function in _PARTS.items():
        if key := next((key for key in keys if re.search(pattern, key)), None):
            return f"it holds a layer's weight in parts ({excerpt(key)}); merge them before saving, by {function}"
    return None


def without_tensors(content: Any) -> str:
    """Returns why a checkpoint without tensors holds no network."""
    if isinstance(content, Foreign):
        return f"it is a pickled {excerpt(content.name)}, whose code jaxft does not run; {_SAVE} instead"
    if isinstance(content, Tensor):
        return f"it holds one tensor, not a state_dict; {_SAVE}"
    found = children(content)
    modules = [(key, value) for key, value in found.items() if isinstance(value, Foreign) and value.attributes]
    modules.sort(key=lambda item: "_modules" not in (item[1].attributes or {}))
    if modules:
        key, module = modules[0]
        return f"its entry {shown_key(key)!r} is {kind_of(module)}, not a state_dict; {_SAVE} instead"
    if not found:
        return f"it holds {kind_of(content)}{' without entries' if type(content) in (dict, list) else ''}; {_SAVE}"
    entries = [f"{shown_key(key)!r} is {kind_of(value)}" for key, value in islice(found.items(), 3)]
    entries += [""] * (len(found) - len(entries))  # counted only
    return f"it holds {kind_of(content)} without tensors: {shortened(entries)}; {_SAVE}"
