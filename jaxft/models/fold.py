"""Folds BatchNorm into convolutions, for evaluation: both then take one pass over memory."""

from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxft.models.resnet import ResNet, bn_name, fold


def fold_norms(model: ResNet, variables: Any) -> tuple[ResNet, dict[str, Any]]:
    """Folds every BatchNorm into its convolution (inference only): its scale into the kernel, its shift into a bias.

    Returns the folded model and its variables; a folded model is returned unchanged.
    """
    if model.folded:
        return model, variables
    return model.clone(folded=True), {"params": _fold(variables["params"], variables["batch_stats"])}


@jax.jit
def _fold(params: Any, batch_stats: Any) -> dict[str, Any]:
    flat, statistics = flatten_dict(params), flatten_dict(batch_stats)
    for *block, conv, name in list(flat):
        if name != "kernel" or conv == "fc":
            continue
        norm = (*block, bn_name(conv))
        scale, bias = (flat.pop((*norm, name)) for name in ("scale", "bias"))
        mean, var = (statistics[*norm, name] for name in ("mean", "var"))
        kernel, bias = fold(flat[*block, conv, "kernel"], scale, bias, mean, var)
        flat |= {(*block, conv, "kernel"): kernel, (*block, conv, "bias"): bias}
    return unflatten_dict(flat)
