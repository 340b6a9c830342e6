"""Names of the classes that pretrained weights predict."""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any


def names_for(provenance: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns a name for each output of weights with this provenance; () for those without a head.

    They are the provenance's own; without any, ImageNet's for 1,000 outputs, else "class 0", "class 1", ...
    """
    number = provenance["num_classes"]
    if len(names := provenance.get("class_names", ())) == number:
        return tuple(names)
    return imagenet_names() if number == 1000 else tuple(f"class {i}" for i in range(number))


@cache
def imagenet_names() -> tuple[str, ...]:
    """Returns the names of ImageNet's 1,000 classes, in the order of the outputs."""
    text = files("jaxft.targets").joinpath("imagenet_classes.txt").read_text("utf-8")
    return tuple(line for line in text.splitlines() if not line.startswith("#"))
