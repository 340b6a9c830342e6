"""The table of all architectures, and how a network is made from a config."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxft.errors import UserError
from jaxft.models import resnet, vgg
from jaxft.models.network import Network
from jaxft.ops.formulation import Formulation, default_formulation

ARCHITECTURES: dict[str, Callable[..., Network]] = {**resnet.ARCHITECTURES, **vgg.ARCHITECTURES}

# Keys of the config's `model` section that not all families have.
_OPTIONS: dict[str, Any] = {**resnet.ResNet.options, **vgg.VGG.options}


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
    for key, default in _OPTIONS.items():
        if key not in model.options and config[key] != default:
            raise UserError(f"a {config.arch} has no model.{key}; leave it at {default}, not {config[key]}")
    return model.clone(**{key: config[key] for key in model.options})
