"""Finds networks in a checkpoint: the dicts that wrap them, and the prefix of their keys. Knows no family.

A family says under which keys its networks can be recognised (`Naming.anchors`); what precedes such a key is the
prefix. So `_orig_mod.module.`, `student.backbone.` and prefixes that nobody has seen yet are found alike.
"""

import re
import shlex
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from jaxft.errors import UserError, shortened
from jaxft.pretrained.unpickle import Foreign, Tensor, children

# Components of a name that DataParallel, torch.compile and FSDP add, and those that say nothing about the network.
WRAPPING = frozenset({"module", "_orig_mod", "_forward_module"})
TRANSPARENT = WRAPPING | frozenset({"model", "net", "network", "state_dict"})
AVERAGES = re.compile(r"(^|_)(ema|swa|averaged?|avg|shadow)(_|$)", re.IGNORECASE)
MAX_DEPTH = 5  # of dicts around a state_dict
MAX_NETWORKS = 16  # that a checkpoint may hold; each is searched for in all keys of its dict
MAX_KEY = 1000  # characters
UNPREFIXED = "."  # names a network that is not in a dict of its own and has no prefix


class Naming(NamedTuple):
    """How a library names the tensors of a family."""

    library: str
    anchors: tuple[str, ...]  # keys that each network of the family has, and no other network
    renamed: Mapping[str, str] = {}  # pattern of a key without its last component -> the family's own name


class Family(NamedTuple):
    """What has to be known of a family of networks to find it in a checkpoint."""

    name: str
    namings: tuple[Naming, ...]
    body: str  # pattern of keys that belong to the network or change it; other keys may be left out
    head: str  # the dense layer, which may be missing
    others: Mapping[str, str]  # pattern of a key -> the reason why it is another family


class Network(NamedTuple):
    """A network of a known family in a checkpoint."""

    family: Family
    naming: Naming
    wrappers: tuple[str, ...]  # keys of the dicts around it
    prefix: str
    tensors: dict[str, Tensor]  # by the family's own names, without the prefix
    keys: dict[str, str]  # the family's own name -> the key in the file
    left_out: list[str]  # other keys of the same dict, as they may be shown
    problem: str  # why it cannot be read, or ''

    @property
    def components(self) -> tuple[str, ...]:
        return (*self.wrappers, *filter(None, self.prefix.split(".")))


def printable(text: object, length: int = 60) -> str:
    """Returns text from a file as a terminal may show it: without control characters, and not too long."""
    shown = "".join(character if character.isprintable() else "?" for character in str(text)[: length + 1])
    return shown if len(shown) <= length else f"{shown[: length - 3]}..."


def kind_of(value: Any) -> str:
    """Describes a value from a pickle by its type."""
    if isinstance(value, Foreign):
        if value.name.endswith("multiarray._reconstruct"):
            return "a NumPy array"
        if value.name.endswith("Storage"):
            return f"a tensor of {printable(value.name)}"
        return f"an object of {printable(value.name)}"
    name = type(value).__name__
    return "nothing" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def shown_key(key: Any) -> str:
    """Returns a dict's key as it may be shown."""
    return printable(key) if type(key) in (str, int, float, bool) else kind_of(key)


def summarised(keys: Sequence[str], shown: int = 3) -> str:
    """Groups keys by their first telling component: 'module.queue, module.encoder_k.* (4) and 2 more'."""
    counts: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        first = next((i for i, part in enumerate(parts) if part not in TRANSPARENT), len(parts) - 1)
        counts[".".join(parts[: first + 1]) + (".*" if first < len(parts) - 1 else "")] += 1
    groups = [printable(name, 40) + (f" ({count:,})" if count > 1 else "") for name, count in counts.items()]
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
    """Returns the networks of known families in a checkpoint. A part of one counts only if there is no whole one."""
    found = [
        (anchors, place, wrappers, table)
        for wrappers, table in tables(content)
        for place, anchors in _anchored(table, families).items()
    ]
    most = max((anchors for anchors, *_ in found), default=0)
    networks = []
    for _, (i, j, prefix), wrappers, table in [entry for entry in found if entry[0] == most][:MAX_NETWORKS]:
        networks.append(_network(families[i], families[i].namings[j], wrappers, prefix, table))
    return _distinct(networks)


def _anchored(table: Mapping[Any, Any], families: Sequence[Family]) -> Counter[tuple[int, int, str]]:
    """Counts the anchors in a dict by family, naming (their indices) and prefix."""
    anchors = [
        (anchor, i, j)
        for i, family in enumerate(families)
        for j, naming in enumerate(family.namings)
        for anchor in naming.anchors
    ]
    endings = tuple(anchor for anchor, _, _ in anchors)
    counts: Counter[tuple[int, int, str]] = Counter()
    for key in table:
        if type(key) is not str or len(key) > MAX_KEY or not key.endswith(endings):
            continue
        for anchor, i, j in anchors:
            prefix = key.removesuffix(anchor)
            if prefix != key and (not prefix or prefix.endswith(".")):
                counts[i, j, prefix] += 1
                break  # the first naming counts: a key of one may end as one of another does
    return counts


def _network(
    family: Family, naming: Naming, wrappers: tuple[str, ...], prefix: str, table: Mapping[Any, Any]
) -> Network:
    """Splits a dict into the network's tensors, by the family's own names, and other keys."""
    tensors: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    left_out: list[Any] = []
    problem = ""
    for key, value in table.items():
        name = _own_name(key, prefix, naming)
        if name is None or not re.match(family.body, name):
            left_out.append(key)
        elif name in keys:
            problem = f"it holds {name} twice, as {printable(keys[name])} and {printable(key)}; delete one"
        elif not isinstance(value, Tensor):
            problem = f"its entry {shown_key(key)!r} is {kind_of(value)}, not a tensor"
        else:
            tensors[name], keys[name] = value, key
    own = {_untransparent(key): name for name, key in keys.items()}
    for key in left_out:
        if type(key) is str and (name := own.get(_untransparent(key))):
            problem = f"it holds {name} twice, as {printable(keys[name])} and {printable(key)}; delete one"
    return Network(family, naming, wrappers, prefix, tensors, keys, [shown_key(key) for key in left_out], problem)


def _untransparent(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in TRANSPARENT)


def _own_name(key: Any, prefix: str, naming: Naming) -> str | None:
    """Returns the family's own name for a key; None for a key without the prefix."""
    if type(key) is not str or not key.startswith(prefix):
        return None
    key = key[len(prefix) :]
    for pattern, name in naming.renamed.items():
        if match := re.match(rf"{pattern}\.(?=\w+$)", key):
            name = re.sub(r"<(\d+)>", lambda number: str(int(number[1]) + 1), match.expand(name))
            return f"{name}.{key[match.end() :]}"
    return key


def _distinct(networks: Sequence[Network]) -> list[Network]:
    """Drops networks whose tensors are another's, as if an object was saved under two names."""
    distinct: list[Network] = []
    for network in networks:
        if all(network.tensors != other.tensors for other in distinct):
            distinct.append(network)
    return distinct


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

    Raises UserError if there is none such or several.
    """
    names = [printable(name) for name in names_of(networks)]
    listed = shortened([repr(name) for name in names], 6)
    if name:
        called = [network for i, network in enumerate(networks) if name in (names[i], ".".join(network.components))]
        called = called or [network for network in networks if _is_part(name.split("."), network.components)]
        if not called:
            has = f"it has {listed}" if len(networks) > 1 else f"it holds one, which {path} selects"
            raise UserError(f"{path} has no network {printable(name)!r}; {has}")
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
    return network


def is_average(network: Network) -> bool:
    """Returns whether the network is named as a moving average of weights is."""
    return any(AVERAGES.search(part) for part in network.components)


def _is_part(parts: Sequence[str], components: Sequence[str]) -> bool:
    return any([*components[i : i + len(parts)]] == [*parts] for i in range(len(components)))


def _bare(network: Network) -> list[str]:
    return [part for part in network.prefix.split(".") if part not in WRAPPING]


def _prefix(network: Network) -> str:
    return f"the prefix {printable(network.prefix)}" if network.prefix else "no prefix"


def unknown(content: Any, families: Sequence[Family]) -> str:
    """Returns why there is no network of the families in a checkpoint."""
    found = largest(content)
    if found is None:
        return without_tensors(content)
    keys = [key for key in found if type(key) is str]
    for family in families:
        if reason := other_family(family, keys):
            return f"it is not a {family.name} that jaxft knows: {reason}"
    known = " or ".join(family.name for family in families)
    return f"its {len(keys):,} tensors are not named as a {known}'s: {shortened([printable(key) for key in keys])}"


def other_family(family: Family, keys: Collection[str]) -> str | None:
    """Returns the reason why a network with these keys is not of the family, or None."""
    for pattern, reason in family.others.items():
        if any(re.search(pattern, key) for key in keys):
            return reason
    return None


def without_tensors(content: Any) -> str:
    """Returns why a checkpoint without tensors holds no network."""
    save = "torch.save(model.state_dict(), FILE)"
    if isinstance(content, Foreign):
        return f"it is a pickled {printable(content.name)}, whose code jaxft does not run; {save} instead"
    if isinstance(content, Tensor):
        return f"it holds one tensor, not a state_dict; {save}"
    found = children(content)
    modules = [(key, value) for key, value in found.items() if isinstance(value, Foreign) and value.attributes]
    modules.sort(key=lambda item: "_modules" not in (item[1].attributes or {}))
    if modules:
        key, module = modules[0]
        return f"its entry {shown_key(key)!r} is {kind_of(module)}, not a state_dict; {save} instead"
    if not found:
        return f"it holds {kind_of(content)}{' without entries' if type(content) in (dict, list) else ''}; {save}"
    entries = [f"{shown_key(key)!r} is {kind_of(value)}" for key, value in islice(found.items(), 3)]
    entries += [""] * (len(found) - len(entries))  # counted only
    return f"it holds {kind_of(content)} without tensors: {shortened(entries)}; {save}"
