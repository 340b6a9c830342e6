"""The table of all architectures, and how a network is made from a config."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxft.errors import UserError
from jaxft.models import convnext, resnet, vgg, vit
from jaxft.models.network import Network
from jaxft.ops.formulation import Formulation, default_formulation

ARCHITECTURES: dict[str, Callable[..., Network]] = {
    **resnet.ARCHITECTURES,
    **vgg.ARCHITECTURES,
    **convnext.ARCHITECTURES,
    **vit.ARCHITECTURES,
}

# Options whose value in a config may stand for the weights' or the architecture's own.
FROM_WEIGHTS: dict[str, Any] = {"norm_eps": 0.0, "pool": "auto", "grid": 0}
# Keys of the config's `model` section that not all families have, with the values that stand for a family's own.
_OPTIONS: dict[str, Any] = {**resnet.ResNet.options, **vgg.VGG.options, **convnext.ConvNeXt.options}
_OPTIONS |= FROM_WEIGHTS
_RATES = {"dropout": -1.0, "drop_path": 0.0}


def make_model(config: ConfigDict, num_classes: int, formulation: Formulation | None = None) -> Network:
    """Makes the model of a config's `model` section. formulation: by default that of this platform.

    Raises UserError if a key is set that the architecture does not have.
    """
    model = ARCHITECTURES[config.arch](
        num_classes=num_classes,
        remat=config.remat,
        head_norm=config.head_norm,
        formulation=formulation or default_formulation(),
        dtype=jnp.dtype(config.dtype),
        precision=config.precision,
    )
    rates = {key: config[key] for key in _RATES if config[key] != _RATES[key]}
    for key, default in {**_OPTIONS, **_RATES}.items():
        if key not in (*model.options, *model.random_layers) and config[key] not in (default, 0):
            raise UserError(f"a {config.arch} has no model.{key}; leave it at {default}, not {config[key]}")
    rates = {key: rate for key, rate in rates.items() if key in model.random_layers}
    options = {key: config[key] for key in model.options if config[key] != FROM_WEIGHTS.get(key)}
    return model.clone(**options, **rates)
