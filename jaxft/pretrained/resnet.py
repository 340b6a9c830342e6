"""ResNets in files of torchvision, timm, Hugging Face and others: their names, and which architecture they are."""

from collections import Counter
from typing import Any

from jaxft.models.architectures import RESNETS
from jaxft.models.resnet import ARCHITECTURES, ResNet
from jaxft.pretrained.family import Declarations, Family, Naming, Tensors, count_classes, length
from jaxft.pretrained.layout import torch_layers

_STAGES = range(1, 5)
_LAYERS = tuple(f"layer{stage}" for stage in _STAGES)

# Hugging Face's keys (transformers' modeling_resnet.py) -> torchvision's; numbers in <> are incremented.
_HUGGING_FACE = {
    r"embedder\.embedder\.convolution": "conv1",
    r"embedder\.embedder\.normalization": "bn1",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution": r"layer<\1>.\2.conv<\3>",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization": r"layer<\1>.\2.bn<\3>",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution": r"layer<\1>.\2.downsample.0",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization": r"layer<\1>.\2.downsample.1",
}
_HUGGING_FACE_ANCHOR = "encoder.stages.{}.layers.0.layer.0.convolution.weight"

# The shortcut's name in github.com/kuangliu/pytorch-cifar and SupContrast, whose ResNets have `stem=small`.
_SHORTCUT = {r"(layer\d\.\d+)\.shortcut\.([01])": r"\1.downsample.\2"}


def _sequential(before: int) -> dict[str, str]:
    """Returns the names of torch.nn.Sequential(*resnet.children()), as lightly, fastai and many loops save a backbone.

    before: modules before the first stage, less one. With a small stem (SimCLR on CIFAR) there is no max-pool.
    """
    return {"0": "conv1", "1": "bn1"} | {rf"{before + stage}\.(.+)": rf"layer{stage}.\1" for stage in _STAGES}


# Patterns of the names that a checkpoint's `arch` or a config.json's `architecture` may have for networks whose keys
# and shapes are those of a plain ResNet -> what they compute otherwise (timm/models/resnet.py).
LOOK_ALIKES = {
    r"blur": "it blurs before each stride (BlurPool, which has no weights)",
    r"resne(t|xt)aa": "it averages before each stride (anti-aliasing, which has no weights)",
    r"caffe|msra|v1a$|resnet\d+_v1$": "the stride is in the first 1x1 convolution of a block (v1)",
}
# Names of networks whose backbone is a plain ResNet at another output stride; the weights are of use all the same.
DILATED = r"deeplab|fcn|pspnet|dilated|_os(8|16)"

# Hugging Face's config.json: key -> the value of a plain ResNet, and what another one means.
_HUGGING_FACE_CONFIG = {
    "hidden_act": ("relu", "its activation is another than ReLU"),
    "downsample_in_first_stage": (False, "its first stage has a stride"),
    "downsample_in_bottleneck": (False, "the stride is in the first 1x1 convolution of a block (v1)"),
}
# Arguments of timm's models that change what a network computes, but not its keys: as above.
TIMM_ARGUMENTS = {
    "act_layer": ("relu", "its activation is another than ReLU"),
    "aa_layer": (None, "it has anti-aliasing before each stride"),
    "output_stride": (32, "its last stages are dilated"),
    "avg_down": (False, "its shortcuts average"),
    "replace_stem_pool": (False, "its stem has a convolution instead of the max-pool"),
}


def _hugging_face_config(arch: str) -> dict[str, tuple[Any, str]]:
    basic = RESNETS[arch].block == "basic"  # has no first 1x1
    return {key: row for key, row in _HUGGING_FACE_CONFIG.items() if not (basic and key.endswith("in_bottleneck"))}


def _nearest(tensors: Tensors) -> list[str]:
    """Returns the architectures with the same block whose depths differ least."""
    block = "bottleneck" if any(key.endswith(".conv3.weight") for key in tensors) else "basic"
    blocks = {tuple(key.split(".")[:2]) for key in tensors}
    depths = [sum(layer == name for layer, *_ in blocks) for name in _LAYERS]
    distances = {
        name: sum(abs(ours - theirs) for ours, theirs in zip(depths, architecture.depths, strict=True))
        for name, architecture in RESNETS.items()
        if architecture.block == block
    }
    return [name for name, distance in distances.items() if distance == min(distances.values())]


def _model_for(arch: str, tensors: Tensors) -> ResNet:
    """Returns the model with the number of classes, width and stem of these tensors."""
    stem = ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var")
    widths = Counter(filter(None, (length(tensors, key) for key in stem)))
    small = "conv1.weight" in tensors and tensors["conv1.weight"].shape[2:] == (3, 3)
    return ARCHITECTURES[arch](
        num_classes=count_classes(tensors, "fc"),
        width=widths.most_common(1)[0][0] if widths else 64,  # the most frequent one: a single tensor may be wrong
        stem="small" if small else "imagenet",
    )


def _head_inputs(tensors: Tensors) -> set[tuple[int, ...]]:
    last = [key for key in tensors if key.startswith("layer4.") and key.endswith(".running_mean")]
    return {tensors[key].shape for key in last if ".downsample." in key}


def _without_statistics(tensors: Tensors) -> str | None:
    if "bn1.weight" in tensors and "bn1.running_mean" not in tensors:
        return "its norms keep no running statistics: GroupNorm, not BatchNorm"
    return None


FAMILY = Family(
    name="ResNet",
    network=ResNet,
    architectures=tuple(RESNETS),
    namings=(
        Naming("torchvision", tuple(f"layer{stage}.0.conv1.weight" for stage in _STAGES), _SHORTCUT),
        Naming(
            "Hugging Face's ResNetForImageClassification",
            tuple(f"resnet.{_HUGGING_FACE_ANCHOR.format(stage - 1)}" for stage in _STAGES),
            {rf"resnet\.{pattern}": name for pattern, name in _HUGGING_FACE.items()} | {r"classifier\.1": "fc"},
        ),
        Naming(
            "Hugging Face's ResNetModel",
            tuple(_HUGGING_FACE_ANCHOR.format(stage - 1) for stage in _STAGES),
            _HUGGING_FACE,
        ),
        Naming("torch.nn.Sequential", tuple(f"{3 + stage}.0.conv1.weight" for stage in _STAGES), _sequential(3)),
        Naming(  # module 3 has no weights in the one before
            "torch.nn.Sequential without max-pool",
            ("3.0.conv1.weight", "3.0.bn1.weight", "3.0.conv2.weight", "3.0.bn2.weight"),
            _sequential(2),
        ),
    ),
    # Layers between these change what the network computes: they are not left out as a projection head is.
    body=r"((conv|bn|norm|layer|stage|stem|root|downsample|se|sa|ca|cbam|attn|attnpool)[\d_]*|fc|encoder|embedder|[0-7])\.",
    head="fc",
    others={  # jaxft's ResNet cannot represent a network that has such a key
        r"^conv1\.0\.": "its stem is three 3x3 convolutions (timm's ResNet-C, -D and -S), not one 7x7",
        r"^attnpool\.": "it is CLIP's: three convolutions at the start, attention at the end",
        r"(^|\.)(se|se_module|attn|cbam|sa|ca)\d*\.": "its blocks hold attention (SE-, ECA- or CBAM-ResNet)",
    },
    relatives={
        r"(^|\.)(stages\.\d+\.(blocks|layers)\.\d+|block\d\.unit\d+)\.conv\d\.weight$": (
            "it is a ResNet v2 (BiT): GroupNorm or BatchNorm before each convolution"
        ),
        r"branch2[abc]|moving_(mean|variance)": "it is a Caffe or Keras ResNet v1: the stride in the first 1x1",
        r"(^|\.)(backbone\.bottom_up\.)?res[2-5]\.0\.conv1\.": (
            "it has detectron2's names, whose ResNets are Caffe's v1: the stride in the first 1x1"
        ),
    },
    declarations=Declarations(
        own_names=r"resne(t|xt)\d+",
        model_type="resnet",
        look_alikes=LOOK_ALIKES,
        remarks={DILATED: "whose last stages are dilated; jaxft's are not"},
        timm_arguments=TIMM_ARGUMENTS,
        hugging_face_config=_hugging_face_config,
    ),
    nearest=_nearest,
    model_for=_model_for,
    head_inputs=_head_inputs,
    unsupported=_without_statistics,
    layout=torch_layers,
    # torchvision's `relu` after conv1; our conv1 includes the norm and the ReLU
    stages=lambda model: {"relu": "conv1"} | {name: name for name in (*_LAYERS, "fc")},
)
