"""ResNets in files of torchvision, timm, Hugging Face and others: their names, and which architecture they are."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from jaxft.models.architectures import RESNETS, DeepStem, ResNetArchitecture
from jaxft.models.network import Network
from jaxft.models.resnet import ARCHITECTURES, DEEP_STEMS, BasicBlock, ResNet
from jaxft.pretrained.family import Declarations, Family, Naming, Tensors, count_classes, length
from jaxft.pretrained.layout import torch_layers

_STAGES = range(1, 5)
_LAYERS = tuple(f"layer{stage}" for stage in _STAGES)

# Hugging Face's keys (transformers' modeling_resnet.py) -> torchvision's.
_HUGGING_FACE = {
    "embedder.embedder.convolution": "conv1",
    "embedder.embedder.normalization": "bn1",
    "encoder.stages.{i}.layers.{j}.layer.{k}.convolution": "layer{i+1}.{j}.conv{k+1}",
    "encoder.stages.{i}.layers.{j}.layer.{k}.normalization": "layer{i+1}.{j}.bn{k+1}",
    "encoder.stages.{i}.layers.{j}.shortcut.convolution": "layer{i+1}.{j}.downsample.0",
    "encoder.stages.{i}.layers.{j}.shortcut.normalization": "layer{i+1}.{j}.downsample.1",
}
_HUGGING_FACE_ANCHOR = "encoder.stages.{}.layers.0.layer.0.convolution.weight"
_ANCHORS = tuple(f"{layer}.0.conv1.weight" for layer in _LAYERS)


def _sequential(before: int) -> dict[str, str]:
    """Returns the names of torch.nn.Sequential(*resnet.children()), as lightly, fastai and many loops save a backbone.

    before: modules before the first stage, less one. With a small stem (SimCLR on CIFAR) there is no max-pool.
    """
    stem = {"0": "conv1", "0.{i}": "conv1.{i}", "1": "bn1"}
    return stem | {f"{before + stage}.{{*}}": f"layer{stage}.{{*}}" for stage in _STAGES}


# Patterns of the names that a checkpoint's `arch` or a config.json's `architecture` may have for networks whose keys
# and shapes are those of a plain ResNet -> what they compute differently (timm/models/resnet.py).
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
# Arguments of timm's models that change what a network computes, but not its keys: as above. Others, such as avg_down
# and stem_type, show in the keys.
TIMM_ARGUMENTS = {
    "act_layer": ("relu", "its activation is another than ReLU"),
    "aa_layer": (None, "it has anti-aliasing before each stride"),
    "output_stride": (32, "its last stages are dilated"),
    "replace_stem_pool": (False, "its stem has a convolution instead of the max-pool"),
}


def _hugging_face_config(arch: str) -> dict[str, tuple[Any, str]]:
    basic = RESNETS[arch].block == "basic"  # has no first 1x1
    return {key: row for key, row in _HUGGING_FACE_CONFIG.items() if not (basic and key.endswith("in_bottleneck"))}


def _nearest(tensors: Tensors) -> list[str]:
    """Returns the architectures with the same kinds of layers whose depths differ least."""
    block = "bottleneck" if any(key.endswith(".conv3.weight") for key in tensors) else "basic"
    found = (_has(tensors, ".se."), _deep_stem(tensors), _has(tensors, ".downsample.2."))
    blocks = {tuple(key.split(".")[:2]) for key in tensors}
    depths = [sum(layer == name for layer, *_ in blocks) for name in _LAYERS]

    def distance(architecture: ResNetArchitecture) -> tuple[int, ...]:
        has = (architecture.squeeze_excite, architecture.deep_stem, architecture.average_shortcut)
        difference = sum(abs(ours - theirs) for ours, theirs in zip(depths, architecture.depths, strict=True))
        return architecture.block != block, *(a != b for a, b in zip(has, found, strict=True)), difference

    distances = {name: distance(architecture) for name, architecture in RESNETS.items()}
    return [name for name in RESNETS if distances[name] == min(distances.values())]


def _has(tensors: Tensors, part: str) -> bool:
    return any(part in key for key in tensors)


def _deep_stem(tensors: Tensors) -> DeepStem:
    """Returns the kind of a deep stem by the channels of its convolutions; '' for one convolution."""
    channels = [length(tensors, f"conv1.{i}.weight") for i in (0, 3, 6)]
    if not channels[0]:
        return ""
    return next((stem for stem, eighths in DEEP_STEMS.items() if _in_proportion(channels, eighths)), "deep")


def _in_proportion(channels: Sequence[int], eighths: Sequence[int]) -> bool:
    width = channels[-1] * 8 // eighths[-1]
    return [*channels] == [width * number // 8 for number in eighths]


def _model_for(arch: str, tensors: Tensors) -> ResNet:
    """Returns the model with the number of classes, width and stem of these tensors."""
    deep_stem = RESNETS[arch].deep_stem
    last = "conv1.6.weight" if deep_stem else "conv1.weight"
    stem = (last, "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var")
    widths = Counter(filter(None, (length(tensors, key) for key in stem)))
    width = widths.most_common(1)[0][0] if widths else 0  # the most frequent one: a single tensor may be wrong
    if deep_stem:
        width = width * 8 // DEEP_STEMS[deep_stem][-1]
    small = not deep_stem and "conv1.weight" in tensors and tensors["conv1.weight"].shape[2:] == (3, 3)
    return ARCHITECTURES[arch](
        num_classes=count_classes(tensors, "fc"), width=width or 64, stem="small" if small else "imagenet"
    )


def _stages(model: Network) -> dict[str, str]:
    """Returns the stem's ReLU, which our conv1 includes, the stages and the head."""
    assert isinstance(model, ResNet)
    relu = "act1" if model.block_options.zero_init else "relu"  # in timm and in torchvision
    return {relu: "conv1"} | {name: name for name in (*_LAYERS, "fc")}


def _transformers_config(model: ResNet, library: str) -> tuple[str, dict[str, Any]]:
    basic = model.block is BasicBlock
    return "ResNetConfig", {
        "depths": [*model.stage_depths],
        "embedding_size": model.width,
        "hidden_sizes": [model.width * 2**i * (1 if basic else 4) for i in range(4)],
        "layer_type": "basic" if basic else "bottleneck",
    }


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
        Naming("torchvision", _ANCHORS),
        Naming(  # whose ResNets have `stem=small`
            "github.com/kuangliu/pytorch-cifar and SupContrast",
            (*_ANCHORS, "layer2.0.shortcut.0.weight"),
            {"layer{i}.{j}.shortcut.{k}": "layer{i}.{j}.downsample.{k}"},
        ),
        Naming(
            "Hugging Face's ResNetForImageClassification",
            tuple(f"resnet.{_HUGGING_FACE_ANCHOR.format(stage - 1)}" for stage in _STAGES),
            {f"resnet.{key}": name for key, name in _HUGGING_FACE.items()} | {"classifier.1": "fc"},
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
    # Keys that begin so change what the network computes: they are not left out, as a projection head is.
    body=r"((conv|bn|norm|layer|stage|stem|root|downsample|maxpool|se|sa|ca|cbam|attn|attnpool)[\d_]*|fc|encoder|embedder|[0-7])\.",
    head="fc",
    others={  # jaxft's ResNet cannot represent a network that has such a key
        r"^maxpool\.": "its stem ends with a convolution instead of the max-pool (ResNet-RS)",
        r"^attnpool\.": "it is CLIP's: three convolutions at the start, attention at the end",
        r"(^|\.)(se_module|attn|cbam|sa|ca|se\d+)\d*\.|\.se\.(?!fc[12]\.)": (
            "its blocks hold attention other than timm's squeeze and excitation (ECA-, CBAM- or an older SE-ResNet)"
        ),
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
        timm_arguments=lambda arch: TIMM_ARGUMENTS,
        hugging_face_config=_hugging_face_config,
    ),
    nearest=_nearest,
    model_for=_model_for,
    head_inputs=_head_inputs,
    unsupported=_without_statistics,
    layout=torch_layers,
    stages=_stages,
    transformers_config=_transformers_config,
)
