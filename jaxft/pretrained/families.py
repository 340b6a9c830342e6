"""The table of families whose weights are converted."""

from jaxft.models.network import Network
from jaxft.pretrained import convnext, resnet, vgg, vit
from jaxft.pretrained.family import Family

FAMILIES = (resnet.FAMILY, vgg.FAMILY, vit.FAMILY, convnext.FAMILY)


def family_of(arch: str) -> Family:
    """Returns an architecture's family."""
    return next(family for family in FAMILIES if arch in family.architectures)


def family_of_model(model: Network) -> Family:
    return next(family for family in FAMILIES if isinstance(model, family.network))
