"""Selects the parameters that train: by part of the network, by pattern and by epoch."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jaxft.errors import UserError
from jaxft.models.network import Network, abstract_variables
from jaxft.models.policy import Policy

Parts = Mapping[str, str]  # a network's `parts`

BACKBONE = "backbone"  # everything but the head


def parameter_paths(model: Network) -> list[str]:
    """Returns the sorted paths of the parameters: 'conv1/kernel' and so on."""
    return sorted(flatten_dict(abstract_variables(model)["params"], sep="/"))


def stage_of(path: str, parts: Parts) -> str:
    """Returns the part that a parameter belongs to: 'stage1' for 'layer1/0/conv1/kernel'."""
    return next(name for name, pattern in parts.items() if re.match(pattern, path))


def select(paths: list[str], names: str, parts: Parts) -> frozenset[str]:
    """Selects the paths that match `names`: parts and regular expressions, separated by commas.

    Raises UserError for a name that matches no path.
    """
    selected: set[str] = set()
    for name in filter(None, (name.strip() for name in names.split(","))):
        try:
            pattern = re.compile(parts.get(name, name))
        except re.error as error:
            raise UserError(f"'{name}' is not a pattern ({error}); parts are {', '.join(parts)}, {BACKBONE}") from None
        found = {
            path for path in paths if (stage_of(path, parts) != "head" if name == BACKBONE else pattern.search(path))
        }
        if not found:
            raise UserError(
                f"'{name}' is neither a part of the network nor a pattern that matches a parameter such as {paths[0]}; "
                f"parts are {', '.join(parts)}, {BACKBONE}"
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

    def named(name: str) -> bool:
        if name == BACKBONE:
            return stage_of(path, parts) != "head"
        return re.search(parts.get(name, name), path) is not None

    if not any(named(name.strip()) for name in config.freeze.split(",") if name.strip()):
        return 1
    return min((epoch for epoch, name in parse_unfreeze(config.unfreeze) if named(name)), default=math.inf)


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


def table(model: Network, policy: Policy) -> str:
    """Returns a table with a line per part: its parameters, how many train, and whether its statistics move."""
    variables = abstract_variables(model)
    lines = [f"{'':9}{'part':8}{'parameters':>12}{'trained':>12}  statistics"]
    params = flatten_dict(variables["params"], sep="/")
    for part in model.parts:
        own = {path: int(np.prod(array.shape)) for path, array in params.items() if stage_of(path, model.parts) == part}
        trained = sum(size for path, size in own.items() if path not in policy.frozen)
        norms = {path.removesuffix("/scale") for path in own if path.endswith("/scale")}
        moving = sum(not policy.norm_is_frozen(norm) for norm in norms)
        text = "" if not norms else "move" if moving == len(norms) else "stay" if not moving else f"{moving} move"
        lines.append(f"{'':9}{part:8}{sum(own.values()):>12,}{trained:>12,}  {text}".rstrip())
    return "\n".join(lines)
