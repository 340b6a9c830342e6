"""Folds norms into the layers beside them: BatchNorm for evaluation, which saves a pass, and a head's input norm."""

from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxft.models.heads import HEAD_NORM, fold_standardize
from jaxft.models.resnet import ResNet, bn_name, fold


def fold_norms(model: ResNet, variables: Any) -> tuple[ResNet, dict[str, Any]]:
    """Folds every BatchNorm into its convolution (inference only): its scale into the kernel, its shift into a bias.

    head_norm, if there is one, is folded into the head. Returns the folded model and its variables; a folded model is
    returned unchanged.
    """
    if model.folded:
        return model, variables
    return model.clone(folded=True, head_norm=False), {"params": _fold(variables["params"], variables["batch_stats"])}


def fold_head_norm(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables with a plain head, which contains head_norm; those without head_norm are unchanged."""
    params, statistics = variables["params"], dict(variables["batch_stats"])
    if HEAD_NORM not in statistics:
        return dict(variables)
    head = fold_standardize(params["fc"], statistics.pop(HEAD_NORM))
    return {**variables, "params": {**params, "fc": head}, "batch_stats": statistics}


@jax.jit
def _fold(params: Any, batch_stats: Any) -> dict[str, Any]:
    variables = fold_head_norm({"params": params, "batch_stats": batch_stats})
    flat, statistics = (flatten_dict(variables[collection]) for collection in ("params", "batch_stats"))
    for *block, conv, name in list(flat):
        if name != "kernel" or conv == "fc":
            continue
        norm = (*block, bn_name(conv))
        scale, bias = (flat.pop((*norm, name)) for name in ("scale", "bias"))
        mean, var = (statistics[*norm, name] for name in ("mean", "var"))
        kernel, bias = fold(flat[*block, conv, "kernel"], scale, bias, mean, var)
        flat |= {(*block, conv, "kernel"): kernel, (*block, conv, "bias"): bias}
    return unflatten_dict(flat)
