"""VGGs in files of torchvision and training scripts: their names, and which architecture they are."""

from collections import Counter

from jaxft.models.architectures import VGGS
from jaxft.models.network import Network
from jaxft.models.vgg import ARCHITECTURES, VGG, conv_indices
from jaxft.pretrained.family import Declarations, Family, Naming, Tensors, count_classes, length
from jaxft.pretrained.layout import torch_layers

_HEAD = "classifier.6"


def _nearest(tensors: Tensors) -> list[str]:
    """Returns the architectures whose layers' numbers differ least."""
    found = {int(number) for part, number, *_ in (key.split(".") for key in tensors) if _is_number(part, number)}
    distances = {}
    for name, (depths, batch_norm) in VGGS.items():
        convs = {index for indices in conv_indices(depths, batch_norm) for index in indices}
        distances[name] = len(found ^ (convs | ({index + 1 for index in convs} if batch_norm else set())))
    return [name for name, distance in distances.items() if distance == min(distances.values())]


def _is_number(part: str, number: str) -> bool:
    return part == "features" and number.isascii() and number.isdecimal() and len(number) < 4


def _model_for(arch: str, tensors: Tensors) -> VGG:
    """Returns the model with the number of classes and the width of these tensors."""
    widths = Counter(filter(None, (length(tensors, f"features.0.{leaf}") for leaf in ("weight", "bias"))))
    width = widths.most_common(1)[0][0] if widths else 64
    return ARCHITECTURES[arch](num_classes=count_classes(tensors, _HEAD), width=width)


def _head_inputs(tensors: Tensors) -> set[tuple[int, ...]]:
    return {tensors[key].shape for key in ("classifier.3.bias",) if key in tensors}


def _stages(model: Network) -> dict[str, str]:
    """Returns the last ReLU of each stage, which our convolution includes, and the dense layers."""
    assert isinstance(model, VGG)
    last = [indices[-1] for indices in conv_indices(model.stage_depths, model.batch_norm)]
    relus = {f"features.{index + (2 if model.batch_norm else 1)}": f"features/{index}" for index in last}
    return relus | {f"classifier.{index}": f"classifier/{index}" for index in (0, 3, 6)}


VGG_FAMILY = Family(
    name="VGG",
    network=VGG,
    architectures=tuple(VGGS),
    namings=(
        Naming("torchvision", ("features.0.weight", "features.0.bias", "classifier.0.weight", "classifier.3.weight")),
    ),
    body=r"(features|classifier|pre_logits)\.",
    head=_HEAD,
    others={  # jaxft's VGG cannot represent a network that has such a key
        r"^pre_logits\.": "it has timm's names, in which the hidden layers are convolutions",
        r"^features\.(\d+\.(\d+|block|squeeze|conv\w*)|[a-z]\w*)\.": (
            "its features are blocks of layers, as in MobileNet, EfficientNet, ConvNeXt and DenseNet"
        ),
        r"^classifier\.[14]\.weight$": "it is an AlexNet",
    },
    declarations=Declarations(own_names=r"vgg\d+", model_type="vgg"),
    nearest=_nearest,
    model_for=_model_for,
    head_inputs=_head_inputs,
    unsupported=lambda tensors: None,
    layout=torch_layers,
    stages=_stages,
)
