"""Which parts of the network train: names and patterns to parameters, and these apart from the frozen ones."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jaxft.errors import UserError
from jaxft.models.resnet import ResNet

STAGES = {
    "stem": r"^(conv1|bn1)/",
    "stage1": r"^layer1/",
    "stage2": r"^layer2/",
    "stage3": r"^layer3/",
    "stage4": r"^layer4/",
    "head": r"^fc/",
}


BACKBONE = "backbone"  # everything but the head


def abstract_variables(model: ResNet) -> Any:
    """Shapes and types alone."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(lambda image: model.init(jax.random.key(0), image, train=False), image)


def parameter_paths(model: ResNet) -> list[str]:
    """The parameters' paths: 'conv1/kernel' and so on."""
    return sorted(flatten_dict(abstract_variables(model)["params"], sep="/"))


def stage_of(path: str) -> str:
    """'layer1/0/conv1/kernel' -> 'stage1'"""
    return next(name for name, pattern in STAGES.items() if re.match(pattern, path))


def select(paths: list[str], names: str) -> frozenset[str]:
    """Those of the parameters' paths that are meant by `names`: parts and regular expressions, with commas between.

    Raises UserError for a name that means none of them.
    """
    selected: set[str] = set()
    for name in filter(None, (name.strip() for name in names.split(","))):
        try:
            pattern = re.compile(STAGES.get(name, name))
        except re.error as error:
            raise UserError(f"'{name}' is no pattern ({error}); parts are {', '.join(STAGES)}, {BACKBONE}") from None
        found = {path for path in paths if (stage_of(path) != "head" if name == BACKBONE else pattern.search(path))}
        if not found:
            raise UserError(
                f"'{name}' is no part of the network and no pattern that matches a parameter such as {paths[0]}; "
                f"parts are {', '.join(STAGES)}, {BACKBONE}"
            )
        selected |= found
    return frozenset(selected)


def parse_unfreeze(text: str) -> list[tuple[int, str]]:
    """'3: stage4, 5: stage3' -> [(3, 'stage4'), (5, 'stage3')]: from which epoch on what is trained."""
    phases = []
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        epoch, colon, name = entry.partition(":")
        if not colon or not epoch.strip().isdecimal() or not name.strip():
            raise UserError(f"optimizer.unfreeze is 'EPOCH: PART, ...' as in '3: stage4, 5: stage3', not '{text}'")
        phases.append((int(epoch), name.strip()))
    return phases


def freeze(model: ResNet, config: ConfigDict, epoch: int) -> ResNet:
    """The network with what the config's `optimizer` section freezes in this epoch, counted from 1.

    Raises UserError where a name matches nothing, or nothing is left to train.
    """
    if not config.freeze and not config.unfreeze:
        return model
    paths = parameter_paths(model)
    frozen = select(paths, config.freeze)
    for first_epoch, name in parse_unfreeze(config.unfreeze):
        thawed = select(paths, name)
        if not thawed & frozen:
            raise UserError(f"optimizer.unfreeze names '{name}', which is not frozen then; see optimizer.freeze")
        if epoch >= first_epoch:
            frozen -= thawed
    if len(frozen) == len(paths):
        raise UserError(f"optimizer.freeze '{config.freeze}' leaves nothing to train")
    return model.clone(frozen=frozen)


def trains_only_head(model: ResNet) -> bool:
    """Whether nothing before the head changes: neither parameters nor statistics."""
    return all(stage_of(path) == "head" or path in model.frozen for path in parameter_paths(model))


def split_frozen(params: Mapping[str, Any], frozen: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those that train, and those that do not."""
    flat = flatten_dict(params, sep="/")
    trainable = {path: array for path, array in flat.items() if path not in frozen}
    kept = {path: array for path, array in flat.items() if path in frozen}
    return unflatten_dict(trainable, sep="/"), unflatten_dict(kept, sep="/")


def merge(trainable: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """split_frozen's inverse."""
    return unflatten_dict({**flatten_dict(kept), **flatten_dict(trainable)})


def map_with_path(function: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of function('layer1/0/conv1/kernel', leaf)."""
    flat = flatten_dict(tree, sep="/")
    return unflatten_dict({path: function(path, leaf) for path, leaf in flat.items()}, sep="/")


def merge_opt_state(source: Any, target: Any) -> Any:
    """The target's tree with the source's leaves wherever both have the path; of two states of an optimizer."""
    there = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(source)}
    return jax.tree_util.tree_map_with_path(lambda path, leaf: there.get(jax.tree_util.keystr(path), leaf), target)


def table(model: ResNet) -> str:
    """What trains, a line for each part: parameters, those of them that train, whether BatchNorm's statistics move."""
    variables = abstract_variables(model)
    lines = [f"{'':9}{'part':8}{'parameters':>12}{'trained':>12}  statistics"]
    params = flatten_dict(variables["params"], sep="/")
    for part in STAGES:
        own = {path: int(np.prod(array.shape)) for path, array in params.items() if stage_of(path) == part}
        trained = sum(size for path, size in own.items() if path not in model.frozen)
        norms = {path.removesuffix("/scale") for path in own if path.endswith("/scale")}
        moving = sum(not model.norm_is_frozen(norm) for norm in norms)
        text = "" if not norms else "move" if moving == len(norms) else "stay" if not moving else f"{moving} move"
        lines.append(f"{'':9}{part:8}{sum(own.values()):>12,}{trained:>12,}  {text}".rstrip())
    return "\n".join(lines)
