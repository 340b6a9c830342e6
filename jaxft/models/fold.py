"""Folds norms into the layers beside them: BatchNorm for evaluation, which saves a pass, and a head's input norm."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxft.models.heads import HEAD_NORM, fold_standardize, get_head, set_head
from jaxft.models.layers import FoldedNorm, fold
from jaxft.models.network import Network


def fold_norms(model: Network, variables: Any) -> tuple[Network, dict[str, Any]]:
    """Folds every BatchNorm into its convolution (inference only): its scale into the kernel, its shift into a bias.

    head_norm, if there is one, is folded into the head. Returns the folded model and its variables; a folded model is
    returned unchanged.
    """
    if model.folded:
        return model, variables
    folded = _fold(variables["params"], variables["batch_stats"], model.head, model.norm_of)
    return model.clone(folded=True, head_norm=False), {"params": folded}


def fold_head_norm(variables: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Returns the variables with a plain head, which contains head_norm; those without head_norm are unchanged.

    path: the network's `head`.
    """
    params, statistics = variables["params"], dict(variables["batch_stats"])
    if HEAD_NORM not in statistics:
        return dict(variables)
    head = fold_standardize(get_head(params, path), statistics.pop(HEAD_NORM))
    return {**variables, "params": set_head(params, path, head), "batch_stats": statistics}


@partial(jax.jit, static_argnums=(2, 3))
def _fold(
    params: Any, batch_stats: Any, head: tuple[str, ...], norm_of: Callable[[tuple[str, ...]], tuple[str, ...] | None]
) -> dict[str, Any]:
    variables = fold_head_norm({"params": params, "batch_stats": batch_stats}, head)
    flat, statistics = (flatten_dict(variables[collection]) for collection in ("params", "batch_stats"))
    for *conv, name in list(flat):
        norm = norm_of(tuple(conv))
        if name != "kernel" or norm is None or (*norm, "scale") not in flat:
            continue
        parameters = (flat.pop((*norm, name)) for name in ("scale", "bias"))
        folded = FoldedNorm(*parameters, *(statistics[*norm, name] for name in ("mean", "var")))
        kernel, bias = fold(flat[*conv, "kernel"], flat.get((*conv, "bias")), folded)
        flat |= {(*conv, "kernel"): kernel, (*conv, "bias"): bias}
    return unflatten_dict(flat)
