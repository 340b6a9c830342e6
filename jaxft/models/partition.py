"""Selects the parameters that train: by part of the network, by pattern and by epoch."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jaxft.errors import UserError
from jaxft.models.network import Network, abstract_variables
from jaxft.models.policy import Policy

Parts = Mapping[str, str]  # a network's `parts`

BACKBONE = "backbone"  # everything but the head
RANGE = re.compile(r"(\w+)\s*-\s*(\w+)")  # of parts: block0-block5
MANY_PARTS = 10  # more than these share lines of the table


def parameter_paths(model: Network) -> list[str]:
    """Returns the sorted paths of the parameters: 'conv1/kernel' and so on."""
    return sorted(flatten_dict(abstract_variables(model)["params"], sep="/"))


def stage_of(path: str, parts: Parts) -> str:
    """Returns the part that a parameter belongs to: 'stage1' for 'layer1/0/conv1/kernel'."""
    return next(name for name, pattern in parts.items() if re.match(pattern, path))


def covers(name: str, path: str, parts: Parts) -> bool:
    """Returns whether a name of optimizer.freeze covers a parameter.

    name: a part, a range of parts ('stage1-stage3'), 'backbone' or a regular expression over paths.
    """
    if name == BACKBONE:
        return stage_of(path, parts) != "head"
    if RANGE.fullmatch(name):
        return stage_of(path, parts) in parts_between(name, parts)
    return re.search(parts.get(name, name), path) is not None


def parts_between(name: str, parts: Parts) -> list[str]:
    """Returns the parts of a range such as 'stage1-stage3', both ends included, in the network's order.

    Raises UserError if an end is not a part, or if the first one comes after the last.
    """
    match = RANGE.fullmatch(name)
    assert match
    names, ends = list(parts), match.groups()
    if unknown := [end for end in ends if end not in parts]:
        raise UserError(f"'{name}' is not a range of parts: there is no part '{unknown[0]}'; parts are {listed(parts)}")
    first, last = (names.index(end) for end in ends)
    if first > last:
        raise UserError(f"'{name}' is not a range of parts: '{ends[1]}' comes first; write {ends[1]}-{ends[0]}")
    return names[first : last + 1]


def listed(parts: Parts) -> str:
    """Returns the parts as a text in which numbered ones are a range: 'embed, block0-block11, head'."""
    runs: list[list[str]] = []
    for name in parts:
        if runs and _continues(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _continues(name: str, following: str) -> bool:
    """Returns whether two parts differ only in their number, and the second one's is the next: stage1 and stage2."""
    kind = name.rstrip("0123456789")
    return name != kind and following == f"{kind}{int(name.removeprefix(kind)) + 1}"


def select(paths: list[str], names: str, parts: Parts) -> frozenset[str]:
    """Selects the paths that `names` cover: parts, ranges of parts and regular expressions, separated by commas.

    Raises UserError for a name that covers no path.
    """
    selected: set[str] = set()
    for name in filter(None, (name.strip() for name in names.split(","))):
        try:
            found = {path for path in paths if covers(name, path, parts)}
        except re.error as error:
            raise UserError(f"'{name}' is not a pattern ({error}); parts are {listed(parts)}, {BACKBONE}") from None
        if not found:
            raise UserError(
                f"'{name}' is neither a part of the network nor a pattern that matches a parameter such as {paths[0]}; "
                f"parts are {listed(parts)}, {BACKBONE}"
            )
        selected |= found
    return frozenset(selected)


def parse_unfreeze(text: str) -> list[tuple[int, str]]:
    """Parses '3: stage4, 5: stage3' to [(3, 'stage4'), (5, 'stage3')]: the epochs from which parts are trained.

    Raises UserError if the text has another form.
    """
    phases = []
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        epoch, colon, name = entry.partition(":")
        if not colon or not epoch.strip().isdecimal() or not name.strip():
            raise UserError(f"optimizer.unfreeze is 'EPOCH: PART, ...' as in '3: stage4, 5: stage3', not '{text}'")
        phases.append((int(epoch), name.strip()))
    return phases


def first_epoch(config: ConfigDict, path: str, parts: Parts) -> float:
    """Returns the epoch from which a parameter trains: 1 if it is not frozen, infinity if it always is.

    config: the `optimizer` section, which `make_policy` has accepted.
    """
    if not any(covers(name.strip(), path, parts) for name in config.freeze.split(",") if name.strip()):
        return 1
    unfrozen = (epoch for epoch, name in parse_unfreeze(config.unfreeze) if covers(name, path, parts))
    return min(unfrozen, default=math.inf)


def make_policy(config: ConfigDict, model: Network, epoch: int) -> Policy:
    """Makes the policy of an epoch, counted from 1, from the config's `model` and `optimizer` sections.

    Raises UserError if optimizer.freeze or unfreeze matches no parameters, or if nothing is left to train.
    """
    batch_norm: Any = config.model.batch_norm
    policy = Policy(
        batch_norm="update" if batch_norm == "recalibrate" else batch_norm, test_flip=config.model.test_flip
    )
    freeze, unfreeze = config.optimizer.freeze, config.optimizer.unfreeze
    if not freeze and not unfreeze:
        return policy
    paths = parameter_paths(model)
    frozen = select(paths, freeze, model.parts)
    for first_epoch, name in parse_unfreeze(unfreeze):
        unfrozen = select(paths, name, model.parts)
        if not unfrozen & frozen:
            raise UserError(
                f"optimizer.unfreeze names '{name}', which is not frozen in that epoch; see optimizer.freeze"
            )
        if epoch >= first_epoch:
            frozen -= unfrozen
    if len(frozen) == len(paths):
        raise UserError(f"optimizer.freeze '{freeze}' leaves nothing to train")
    return policy._replace(frozen=frozen)


def trains_only_head(model: Network, policy: Policy) -> bool:
    """Returns whether nothing before the head changes in training: neither parameters nor statistics."""
    return all(stage_of(path, model.parts) == "head" or path in policy.frozen for path in parameter_paths(model))


def split_frozen(params: Mapping[str, Any], frozen: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits the parameters into those that train and those that do not."""
    flat = flatten_dict(params, sep="/")
    trainable = {path: array for path, array in flat.items() if path not in frozen}
    kept = {path: array for path, array in flat.items() if path in frozen}
    return unflatten_dict(trainable, sep="/"), unflatten_dict(kept, sep="/")


def merge(trainable: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Merges the trees that `split_frozen` returned."""
    return unflatten_dict({**flatten_dict(kept), **flatten_dict(trainable)})


def map_with_path(function: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Maps function(path, leaf) over a tree; a path is 'layer1/0/conv1/kernel'."""
    flat = flatten_dict(tree, sep="/")
    return unflatten_dict({path: function(path, leaf) for path, leaf in flat.items()}, sep="/")


def merge_opt_state(source: Any, target: Any) -> Any:
    """Returns the target's tree with the source's leaves at the paths that both optimizer states have."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(source)}
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(jax.tree_util.keystr(path), leaf), target)


def unfreezing(config: ConfigDict, epoch: int) -> list[str]:
    """Returns a line for each part of optimizer.unfreeze that trains only after this epoch."""
    later = [(first, name) for first, name in parse_unfreeze(config.optimizer.unfreeze) if first > epoch]
    return [
        f"{name} trains from epoch {first} on"
        + (f", which is after the last ({config.num_epochs})" if first > config.num_epochs else "")
        for first, name in sorted(later)
    ]


class Row(NamedTuple):
    """A line of the table of parts."""

    name: str
    size: int  # parameters
    trained: int  # those that train
    statistics: str

    def continues(self, other: "Row") -> bool:
        """Returns whether the two parts have consecutive numbers, and both train entirely or not at all."""
        numbers = _continues(other.name.rpartition("-")[2], self.name)
        both_train = self.trained == self.size and other.trained == other.size
        return numbers and self.statistics == other.statistics and (both_train or not self.trained + other.trained)

    def joined(self, other: "Row") -> "Row":
        """Returns one row for both parts, the other one first."""
        first = other.name.partition("-")[0]
        return Row(f"{first}-{self.name}", other.size + self.size, other.trained + self.trained, self.statistics)


def table(model: Network, policy: Policy) -> str:
    """Returns a table with a line per part: its parameters, how many train, and whether its statistics move.

    In a network of many parts, consecutive ones that train alike share a line: 'block0-block5'.
    """
    variables = abstract_variables(model)
    params = flatten_dict(variables["params"], sep="/")
    statistics = flatten_dict(variables.get("batch_stats", {}), sep="/")
    rows: list[Row] = []
    for part in model.parts:
        own = {path: int(np.prod(array.shape)) for path, array in params.items() if stage_of(path, model.parts) == part}
        trained = sum(size for path, size in own.items() if path not in policy.frozen)
        norms = {path.removesuffix("/scale") for path in own if path.endswith("/scale")}
        norms = {norm for norm in norms if f"{norm}/mean" in statistics}
        moving = sum(not policy.norm_is_frozen(norm) for norm in norms)
        text = "" if not norms else "move" if moving == len(norms) else "stay" if not moving else f"{moving} move"
        row = Row(part, sum(own.values()), trained, text)
        if rows and len(model.parts) > MANY_PARTS and row.continues(rows[-1]):
            rows[-1] = row.joined(rows[-1])
        else:
            rows.append(row)
    width = max(8, *(len(row.name) + 1 for row in rows))
    heading = "  statistics" if any(row.statistics for row in rows) else ""
    lines = [f"{'':9}{'part':{width}}{'parameters':>12}{'trained':>12}{heading}"]
    for row in rows:
        lines.append(f"{'':9}{row.name:{width}}{row.size:>12,}{row.trained:>12,}  {row.statistics}".rstrip())
    return "\n".join(lines)
