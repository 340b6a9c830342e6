"""Knowledge distillation: a network also learns the predictions of a trained network (Hinton et al. 2015)."""

from typing import Any, NamedTuple

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
