"""VGGs in files of torchvision and training scripts: their names, and which architecture they are."""

import re

from jaxft.models.architectures import VGGS
from jaxft.models.network import Network
from jaxft.models.vgg import ARCHITECTURES, VGG, conv_indices
from jaxft.pretrained.family import Declarations, Family, Naming, Tensors, count_classes, length
from jaxft.pretrained.layout import torch_layers

_HEAD = "classifier.6"


def _nearest(tensors: Tensors) -> list[str]:
    """Returns the architectures whose layers' numbers differ least."""
    matches = (re.match(r"features\.(\d{1,3})\.", key, re.ASCII) for key in tensors)
    found = {int(match[1]) for match in matches if match}
    distances = {}
    for name, (depths, batch_norm) in VGGS.items():
        convs = {index for indices in conv_indices(depths, batch_norm) for index in indices}
        distances[name] = len(found ^ (convs | ({index + 1 for index in convs} if batch_norm else set())))
    return [name for name, distance in distances.items() if distance == min(distances.values())]


def _model_for(arch: str, tensors: Tensors) -> VGG:
    """Returns the model with the number of classes and the width of these tensors."""
    width = length(tensors, "features.0.bias") or length(tensors, "features.0.weight") or 64
    return ARCHITECTURES[arch](num_classes=count_classes(tensors, _HEAD), width=width)


def _head_inputs(tensors: Tensors) -> set[tuple[int, ...]]:
    return {tensors[key].shape for key in ("classifier.3.bias",) if key in tensors}


def _other_kernel(tensors: Tensors) -> str | None:
    size: tuple[int, ...] = tensors["features.0.weight"].shape[2:] if "features.0.weight" in tensors else ()
    if len(size) == 2 and size != (3, 3):
        return f"its first convolution is {size[0]}x{size[1]}, as in AlexNet, not 3x3"
    return None


def _stages(model: Network) -> dict[str, str]:
    """Returns the last ReLU of each stage, which our convolution includes, and the dense layers."""
    assert isinstance(model, VGG)
    last = [indices[-1] for indices in conv_indices(model.stage_depths, model.batch_norm)]
    relus = {f"features.{index + (2 if model.batch_norm else 1)}": f"features/{index}" for index in last}
    return relus | {f"classifier.{index}": f"classifier/{index}" for index in (0, 3, 6)}


FAMILY = Family(
    name="VGG",
    network=VGG,
    architectures=tuple(VGGS),
    namings=(
        Naming("torchvision", ("features.0.weight", "features.0.bias", "classifier.0.weight", "classifier.3.weight")),
        Naming(  # examples/imagenet of github.com/pytorch/examples saves its VGGs so
            "torchvision, with the features in DataParallel",
            ("features.module.0.weight", "features.module.0.bias"),
            {"features.module.{i}": "features.{i}"},
        ),
    ),
    body=r"(features|classifier|pre_logits)\.",
    head=_HEAD,
    others={  # jaxft's VGG cannot represent a network that has such a key
        r"^pre_logits\.": "it has timm's names, in which the hidden layers are convolutions",
        r"^features\.(\d+\.(\d+|block|squeeze|conv\w*)|[a-z]\w*)\.": (
            "its features are blocks of layers, as in MobileNet and EfficientNet"
        ),
    },
    relatives={},
    declarations=Declarations(own_names=r"vgg\d+", model_type="vgg"),
    nearest=_nearest,
    model_for=_model_for,
    head_inputs=_head_inputs,
    unsupported=_other_kernel,
    layout=torch_layers,
    stages=_stages,
)
