"""The table of families whose weights are converted."""

from jaxft.models.network import Network
from jaxft.pretrained.family import Family
from jaxft.pretrained.resnet import RESNET
from jaxft.pretrained.vgg import VGG_FAMILY

FAMILIES = (RESNET, VGG_FAMILY)


def family_of(arch: str) -> Family:
    """Returns an architecture's family."""
    return next(family for family in FAMILIES if arch in family.architectures)


def family_of_model(model: Network) -> Family:
    return next(family for family in FAMILIES if isinstance(model, family.network))
