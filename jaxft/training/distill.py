"""Knowledge distillation: a network that also learns what a trained one says of each picture (Hinton et al. 2015)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.models.resnet import ResNet
from jaxft.transforms.preprocessing import Preprocessing


class Teacher(NamedTuple):
    model: ResNet
    preprocessing: Preprocessing
    variables: Any
    checkpoint: int  # its step


class Distillation(NamedTuple):
    """What a training step needs of the teacher besides its variables."""

    model: ResNet
    preprocessing: Preprocessing
    weight: float  # of what the teacher says; the rest is for the labels
    temperature: float


def distillation_loss(logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """Of each picture (B,): the divergence of the softened predictions, times temperature^2 for gradients alike."""
    own, taught = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher_logits))
    return temperature**2 * (jnp.exp(taught) * (taught - own)).sum(-1)
