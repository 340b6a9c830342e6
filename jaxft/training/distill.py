"""Knowledge distillation: a network also learns the predictions of a trained network (Hinton et al. 2015)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.models.network import Network
from jaxft.models.policy import Policy
from jaxft.transforms.preprocessing import Preprocessing


class Teacher(NamedTuple):
    """A trained network, with its variables on every device."""

    model: Network
    policy: Policy
    preprocessing: Preprocessing
    variables: Any
    checkpoint: int  # its step


class Distillation(NamedTuple):
    """Static settings of distillation in a train step: the teacher without its variables."""

    model: Network
    policy: Policy
    preprocessing: Preprocessing
    weight: float  # of the teacher's predictions in the loss; the labels have the rest
    temperature: float


def distillation_loss(logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """Returns the KL divergence (B,) of the softened predictions, times temperature^2 to keep the gradients' scale."""
    student, teacher = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher_logits))
    return temperature**2 * (jnp.exp(teacher) * (teacher - student)).sum(-1)
