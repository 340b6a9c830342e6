"""ConvNeXts in files of timm, torchvision, transformers and Meta: their names, and which architecture they are."""

import re
from typing import Any

from jaxft.models.architectures import CONVNEXTS, ConvNeXtArchitecture
from jaxft.models.convnext import ARCHITECTURES, ConvNeXt
from jaxft.models.network import Network
from jaxft.pretrained.family import Declarations, Family, Naming, Tensors, count_classes, length
from jaxft.pretrained.layout import torch_layers

_HEAD = "head.fc"
_BLOCK = "stages.{i}.blocks.{j}"

# torchvision's keys (torchvision/models/convnext.py) -> timm's. Stages and downsampling alternate.
_TORCHVISION = {"features.0.{i}": "stem.{i}", "classifier.0": "head.norm", "classifier.2": _HEAD}
for _stage in range(4):
    _block = f"features.{2 * _stage + 1}.{{j}}"
    _own = f"stages.{_stage}.blocks.{{j}}"
    _TORCHVISION |= {
        f"{_block}.block.0": f"{_own}.conv_dw",
        f"{_block}.block.2": f"{_own}.norm",
        f"{_block}.block.3": f"{_own}.mlp.fc1",
        f"{_block}.block.5": f"{_own}.mlp.fc2",
        f"{_block}.layer_scale": f"{_own}.gamma",
    }
    if _stage:
        _TORCHVISION[f"features.{2 * _stage}.{{i}}"] = f"stages.{_stage}.downsample.{{i}}"

# transformers' keys (modeling_convnext.py, modeling_convnextv2.py) without the prefix -> timm's.
_HUGGING_FACE = {
    "embeddings.patch_embeddings": "stem.0",
    "embeddings.layernorm": "stem.1",
    "encoder.stages.{i}.downsampling_layer.{j}": "stages.{i}.downsample.{j}",
    "encoder.stages.{i}.layers.{j}.dwconv": f"{_BLOCK}.conv_dw",
    "encoder.stages.{i}.layers.{j}.layernorm": f"{_BLOCK}.norm",
    "encoder.stages.{i}.layers.{j}.pwconv1": f"{_BLOCK}.mlp.fc1",
    "encoder.stages.{i}.layers.{j}.pwconv2": f"{_BLOCK}.mlp.fc2",
    "encoder.stages.{i}.layers.{j}.grn": f"{_BLOCK}.mlp.grn",
    "encoder.stages.{i}.layers.{j}.layer_scale_parameter": f"{_BLOCK}.gamma",
    "layernorm": "head.norm",
}
_HUGGING_FACE_ANCHORS = ("embeddings.patch_embeddings.weight", "encoder.stages.0.layers.0.dwconv.weight")

# Keys of github.com/facebookresearch/ConvNeXt and ConvNeXt-V2 -> timm's.
_META = {
    "downsample_layers.0.{i}": "stem.{i}",
    "downsample_layers.{i}.{j}": "stages.{i}.downsample.{j}",
    "stages.{i}.{j}.dwconv": f"{_BLOCK}.conv_dw",
    "stages.{i}.{j}.norm": f"{_BLOCK}.norm",
    "stages.{i}.{j}.pwconv1": f"{_BLOCK}.mlp.fc1",
    "stages.{i}.{j}.pwconv2": f"{_BLOCK}.mlp.fc2",
    "stages.{i}.{j}.grn.gamma": f"{_BLOCK}.mlp.grn.weight",
    "stages.{i}.{j}.grn.beta": f"{_BLOCK}.mlp.grn.bias",
    "stages.{i}.{j}.gamma": f"{_BLOCK}.gamma",
    "norm": "head.norm",
    "head": _HEAD,
}
_RESPONSE_NORM = {f"{_BLOCK}.mlp.grn.{leaf}": (1, 1, 1, -1) for leaf in ("weight", "bias")}
# timm's dense layers are 1x1 convolutions in small networks, for speed.
_ONE_BY_ONE_IN_TIMM = [name for name in CONVNEXTS if name.endswith(("atto", "femto", "pico", "nano"))]
_ONE_BY_ONE = {f"{_BLOCK}.mlp.{layer}.weight": (-1, -1, 1, 1) for layer in ("fc1", "fc2")}
_ANCHORS = ("stem.0.weight", "stages.0.blocks.0.conv_dw.weight", "stages.0.blocks.0.mlp.fc1.weight")

_OTHER_MIXER = "its blocks mix pixels without a 7x7 depthwise convolution (InceptionNeXt, MetaFormer)"

# Arguments of timm's models that change what a network computes, but not its keys: value of a plain one, meaning.
_TIMM_ARGUMENTS = {
    "output_stride": (32, "its last stages are dilated"),
    "global_pool": ("avg", "it does not pool by the mean"),
}


def _found(tensors: Tensors) -> ConvNeXtArchitecture:
    """Returns the depths, widths and version that these tensors show; 0 for missing ones."""
    matches = (re.match(r"stages\.([0-3])\.blocks\.(\d{1,3})\.", key, re.ASCII) for key in tensors)
    blocks = {(int(match[1]), int(match[2])) for match in matches if match}
    depths = tuple(sum(stage == i for stage, _ in blocks) for i in range(4))
    widths = tuple(length(tensors, f"stages.{i}.blocks.0.conv_dw.weight") for i in range(4))
    return ConvNeXtArchitecture(depths, widths, any(".mlp.grn." in key for key in tensors))


def _nearest(tensors: Tensors) -> list[str]:
    """Returns the architectures of the same version whose depths, then widths, differ least."""
    found = _found(tensors)

    def distance(name: str) -> tuple[bool, int, int]:
        known = CONVNEXTS[name]
        depths, widths = (
            sum(abs(ours - theirs) for ours, theirs in zip(a, b, strict=True))
            for a, b in ((known.depths, found.depths), (known.widths, found.widths))
        )
        return known.response_norm != found.response_norm, depths, widths

    nearest = min(map(distance, CONVNEXTS))
    return [name for name in CONVNEXTS if distance(name) == nearest]


def _model_for(arch: str, tensors: Tensors) -> ConvNeXt:
    """Returns the model with the number of classes of these tensors."""
    return ARCHITECTURES[arch](num_classes=count_classes(tensors, _HEAD))


def _head_inputs(tensors: Tensors) -> set[tuple[int, ...]]:
    return {tensors[key].shape for key in ("head.norm.weight",) if key in tensors}


def _other_layers(tensors: Tensors) -> str | None:
    size = tensors["stem.0.weight"].shape[2:] if "stem.0.weight" in tensors else (4, 4)
    if len(size) == 2 and size != (4, 4):
        return f"its stem has patches of {size[0]}x{size[1]} pixels, not 4x4"
    kernels = {tensor.shape[2:] for key, tensor in tensors.items() if key.endswith(".conv_dw.weight")}
    if other := sorted(kernel for kernel in kernels if len(kernel) == 2 and kernel != (7, 7)):
        return f"it has depthwise kernels of {other[0][0]}x{other[0][1]}, not 7x7"
    norms = [key for key in tensors if re.fullmatch(r"stages\.\d+\.blocks\.\d+\.norm\.weight", key)]
    if norms and not any(key.replace("weight", "bias") in tensors for key in norms):
        return "its norms have no bias: RMSNorm, not LayerNorm"
    return None


def _timm_arguments(arch: str) -> dict[str, tuple[Any, str]]:
    activation = "gelu_tanh" if CONVNEXTS[arch].tanh else "gelu"
    return _TIMM_ARGUMENTS | {"act_layer": (activation, f"its activation is another than {activation}")}


def _hugging_face_config(arch: str) -> dict[str, tuple[Any, str]]:
    activation = "gelu_pytorch_tanh" if CONVNEXTS[arch].tanh else "gelu"
    return {"hidden_act": (activation, f"its activation is another than {activation}")}


def _stages(model: Network) -> dict[str, str]:
    """Returns the stem, the last block of each stage, the norm and the head."""
    assert isinstance(model, ConvNeXt)
    last = [f"stages.{i}.blocks.{depth - 1}" for i, depth in enumerate(model.architecture.depths)]
    return {name: name.replace(".", "/") for name in ("stem", *last, "head.norm", _HEAD)}


def _transformers_config(model: ConvNeXt, library: str) -> tuple[str, dict[str, Any]]:
    own = model.architecture
    return "ConvNextV2Config" if own.response_norm else "ConvNextConfig", {
        "depths": [*own.depths],
        "hidden_sizes": [*own.widths],
        "layer_norm_eps": model.norm_eps or own.norm_eps,
        "hidden_act": "gelu_pytorch_tanh" if own.tanh else "gelu",
    }


FAMILY = Family(
    name="ConvNeXt",
    network=ConvNeXt,
    architectures=tuple(CONVNEXTS),
    namings=(
        Naming("timm", _ANCHORS, axes={_ANCHORS[-1]: 2}),
        Naming(
            "timm, with 1x1 convolutions",
            _ANCHORS,
            reshaped=_ONE_BY_ONE,
            axes={_ANCHORS[-1]: 4},
            default_for=_ONE_BY_ONE_IN_TIMM,
        ),
        Naming(
            "torchvision",
            ("features.0.0.weight", "features.1.0.block.0.weight", "features.1.0.layer_scale"),
            _TORCHVISION,
            reshaped={f"{_BLOCK}.gamma": (-1, 1, 1)},
        ),
        *(
            Naming(
                f"Hugging Face's {name}ForImageClassification",
                tuple(f"{name.lower()}.{anchor}" for anchor in _HUGGING_FACE_ANCHORS),
                {f"{name.lower()}.{key}": own for key, own in _HUGGING_FACE.items()} | {"classifier": _HEAD},
                reshaped=_RESPONSE_NORM,
                options={"norm_eps": 1e-12},
            )
            for name in ("ConvNext", "ConvNextV2")
        ),
        Naming(
            "Hugging Face's ConvNextModel and ConvNextV2Model",
            _HUGGING_FACE_ANCHORS,
            _HUGGING_FACE,
            reshaped=_RESPONSE_NORM,
            options={"norm_eps": 1e-12},
        ),
        Naming(
            "Meta",
            ("downsample_layers.0.0.weight", "stages.0.0.dwconv.weight"),
            _META,
            reshaped=_RESPONSE_NORM,
        ),
    ),
    body=r"(stem|stages|head|norm|norm_pre|features|classifier|embeddings|encoder|downsample_layers)\.",
    head=_HEAD,
    others={  # jaxft's ConvNeXt cannot represent a network that has such a key
        r"^stem\.[2-9]\.": "its stem is two overlapping convolutions (timm's _ols), not one of 4x4 patches",
        r"^norm_pre\.": "it normalises before it pools (timm's _hnf)",
        r"^head\.pre_logits\.": "its head has a hidden layer (timm's _mlp)",
        r"\.(xca|convs|pos_embd|shortcut)\.": "its blocks hold other layers, as in EdgeNeXt",
        r"\.token_mixer\.": _OTHER_MIXER,
    },
    relatives={r"(^|\.)stages\.\d+\.(blocks\.)?\d+\.token_mixer\.": _OTHER_MIXER},
    declarations=Declarations(
        own_names=r"convnext",
        model_type=r"convnext(v2)?",
        timm_arguments=_timm_arguments,
        hugging_face_config=_hugging_face_config,
        option_keys={"layer_norm_eps": "norm_eps"},
    ),
    nearest=_nearest,
    model_for=_model_for,
    head_inputs=_head_inputs,
    unsupported=_other_layers,
    layout=torch_layers,
    stages=_stages,
    transformers_config=_transformers_config,
)
