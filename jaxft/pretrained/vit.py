"""ViTs in files of timm, torchvision, Hugging Face and Meta: their names, and which architecture they are."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxft.models.architectures import VITS, ViTArchitecture
from jaxft.models.network import Network
from jaxft.models.vit import ARCHITECTURES, Pool, ViT
from jaxft.pretrained.family import Declarations, Family, Naming, Tensors, count_classes, length
from jaxft.pretrained.layout import torch_layers

_HEAD = "head"

_TIMM_ANCHORS = ("patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight")
_TORCHVISION = {
    "class_token": "cls_token",
    "conv_proj": "patch_embed.proj",
    "encoder.pos_embedding": "pos_embed",
    "encoder.layers.encoder_layer_{i}.ln_1": "blocks.{i}.norm1",
    "encoder.layers.encoder_layer_{i}.self_attention.in_proj_weight": "blocks.{i}.attn.qkv.weight",
    "encoder.layers.encoder_layer_{i}.self_attention.in_proj_bias": "blocks.{i}.attn.qkv.bias",
    "encoder.layers.encoder_layer_{i}.self_attention.out_proj": "blocks.{i}.attn.proj",
    "encoder.layers.encoder_layer_{i}.ln_2": "blocks.{i}.norm2",
    "encoder.ln": "norm",
    "heads.head": "head",
}
_TORCHVISION_ANCHORS = ("class_token", "conv_proj.weight", "encoder.pos_embedding")


def _torchvision(first: str, second: str) -> dict[str, str]:
    """Returns torchvision's names with those of the MLP's dense layers."""
    mlp = "encoder.layers.encoder_layer_{i}.mlp."
    return _TORCHVISION | {mlp + first: "blocks.{i}.mlp.fc1", mlp + second: "blocks.{i}.mlp.fc2"}


_EMBEDDINGS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}


_NORMS = {"layernorm_before": "norm1", "layernorm_after": "norm2"}
_MLP = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_DINOV2 = {"norm1": "norm1", "layer_scale1.lambda1": "ls1.gamma", "norm2": "norm2", "layer_scale2.lambda1": "ls2.gamma"}
_SAVED_QKV = ("attention.query", "attention.key", "attention.value")
_QKV = ("q_proj", "k_proj", "v_proj")
_SAVED_PROJ, _PROJ = {"attention.output.dense": "attn.proj"}, {"attention.o_proj": "attn.proj"}
_VIT_MODELS = {"": "ViTModel or DeiTModel", "vit.": "ViTForImageClassification", "deit.": "DeiTForImageClassification"}
_DINOV2_MODELS = {
    "": "Dinov2Model",
    "dinov2.": "Dinov2ForImageClassification",
    "dinov2_with_registers.": "Dinov2WithRegistersForImageClassification",
}


class _Blocks(NamedTuple):
    """Hugging Face's names of the layers of a block."""

    models: Mapping[str, str]  # prefix of all keys but the head's -> model
    block: str
    qkv: tuple[str, str, str]  # layers in `attention` that are one layer here
    layers: Mapping[str, str]
    anchor: str  # a key in each block that no other model has
    norm_eps: float


# save_pretrained writes the names of the first releases; transformers 5 has others in memory, which torch.save writes.
_HUGGING_FACE = (
    _Blocks(
        _VIT_MODELS,
        "encoder.layer.{i}",
        _SAVED_QKV,
        _NORMS | _SAVED_PROJ | {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"},
        "layernorm_before.weight",
        1e-12,
    ),
    _Blocks(_VIT_MODELS, "layers.{i}", _QKV, _NORMS | _PROJ | _MLP, "layernorm_before.weight", 1e-12),
    _Blocks(
        _DINOV2_MODELS, "encoder.layer.{i}", _SAVED_QKV, _DINOV2 | _SAVED_PROJ | _MLP, "layer_scale1.lambda1", 1e-6
    ),
    _Blocks(_DINOV2_MODELS, "encoder.layer.{i}", _QKV, _DINOV2 | _PROJ | _MLP, "layer_scale1.lambda1", 1e-6),
)


def _hugging_face() -> Iterator[Naming]:
    """Yields the names of ViT, DeiT and DINOv2."""
    for names in _HUGGING_FACE:
        layers = {f"{names.block}.{theirs}": f"blocks.{{i}}.{ours}" for theirs, ours in names.layers.items()}
        for prefix, model in names.models.items():
            block = f"{prefix}{names.block}"
            qkv = tuple(f"{block}.attention.{layer}" for layer in names.qkv)
            anchors = f"{prefix}embeddings.cls_token", f"{block}.{names.anchor}", f"{qkv[0]}.weight"
            yield Naming(
                f"Hugging Face's {model}{'' if names.qkv == _SAVED_QKV else ' in memory'}",
                tuple(anchor.format(i=0) for anchor in anchors),
                {f"{prefix}{key}": own for key, own in (_EMBEDDINGS | layers).items()} | {"classifier": "head"},
                {"blocks.{i}.attn.qkv": qkv},
                options={"norm_eps": names.norm_eps},
            )


def _positions(tensors: Tensors) -> int:
    """Returns the number of position embeddings, 0 if there are none."""
    shape: tuple[int, ...] = tensors["pos_embed"].shape if "pos_embed" in tensors else ()
    return shape[1] if len(shape) == 3 else 0


def _side(positions: int) -> int:
    """Returns the side of a square grid of this many positions; 0 if it is not a square."""
    side = math.isqrt(max(positions, 0))
    return side if side**2 == positions else 0


def _count(tensors: Tensors, name: str) -> int:
    """Returns the number of tokens in a parameter (1, T, D)."""
    shape: tuple[int, ...] = tensors[name].shape if name in tensors else ()
    return shape[1] if len(shape) == 3 else 0


def _facts(tensors: Tensors) -> dict[str, Any]:
    """Returns the fields of ViTArchitecture that the shapes show."""
    blocks = {int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d{1,5})\.", key, re.ASCII))}
    patch: tuple[int, ...] = tensors["patch_embed.proj.weight"].shape if "patch_embed.proj.weight" in tensors else ()
    return {
        "patch": patch[-1] if len(patch) == 4 else 0,
        "width": length(tensors, "blocks.0.norm1.weight"),
        "depth": len(blocks),
        "hidden": length(tensors, "blocks.0.mlp.fc1.bias"),
        "layer_scale": "blocks.0.ls1.gamma" in tensors,
        "class_token": "cls_token" in tensors,
        "distillation_token": "dist_token" in tensors,
        "registers": _count(tensors, "reg_token"),
    }


def _distance(own: ViTArchitecture, facts: dict[str, Any], positions: int) -> float:
    """Returns the number of facts in which an architecture differs, and a fraction more if its grid differs."""
    ours = own._asdict() | {"layer_scale": own.layer_scale > 0, "hidden": own.hidden or 4 * own.width}
    differences = sum(ours[key] != value for key, value in facts.items())
    grid = _side(positions - own.embedded)
    return differences + (0 if own.grid == grid else 0.5 if grid else 0.9)


def _nearest(tensors: Tensors) -> list[str]:
    """Returns the architectures that differ in the fewest facts."""
    facts, positions = _facts(tensors), _positions(tensors)
    distances = {name: _distance(architecture, facts, positions) for name, architecture in VITS.items()}
    return [name for name, distance in distances.items() if distance == min(distances.values())]


def _pool(own: ViTArchitecture, tensors: Tensors) -> Pool:
    if any(key.startswith("attn_pool.") for key in tensors):
        return "attention"
    if "fc_norm.weight" in tensors:
        return "mean_norm"
    return own.pool if own.pool in ("token", "mean") else "token" if own.class_token else "mean"


def _model_for(arch: str, tensors: Tensors) -> ViT:
    """Returns the model with the number of classes, grid and pooling of these tensors."""
    own = VITS[arch]
    grid = _side(_positions(tensors) - own.embedded) or own.grid
    return ARCHITECTURES[arch](num_classes=count_classes(tensors, _HEAD), grid=grid, pool=_pool(own, tensors))


def _head_inputs(tensors: Tensors) -> set[tuple[int, ...]]:
    if "head.dist.weight" in tensors:  # two heads, whose logits are averaged, are not one dense layer
        return {()}
    return {tensors[key].shape for key in ("norm.weight", "fc_norm.weight") if key in tensors}


def _stages(model: Network) -> dict[str, str]:
    assert isinstance(model, ViT)
    norm = {"fc_norm": "fc_norm"} if model.pool == "mean_norm" else {"norm": "norm"}
    return {f"blocks.{i}": f"blocks/{i}" for i in range(model.architecture.depth)} | norm | {_HEAD: _HEAD}


def _timm_model(model: ViT) -> dict[str, Any]:
    pools = {"token": "token", "mean": "avg", "mean_norm": "avg", "attention": "map"}
    own = model.pool == model.architecture.pool
    pool = {} if own else {"global_pool": pools[model.pool], "fc_norm": model.pool == "mean_norm"}
    return {"img_size": model.grid * model.patch_size, **pool}


def _transformers_config(model: ViT, library: str) -> tuple[str, dict[str, Any]]:
    own = model.architecture
    facts: dict[str, Any] = {
        "hidden_size": own.width,
        "num_hidden_layers": own.depth,
        "num_attention_heads": own.heads,
        "image_size": model.grid * own.patch,
        "patch_size": own.patch,
        "layer_norm_eps": model.norm_eps,
    }
    if "Dinov2" in library:
        facts["mlp_ratio"] = model.hidden / own.width
        registers = {"num_register_tokens": own.registers} if own.registers else {}
        return f"Dinov2{'WithRegisters' if registers else ''}Config", facts | registers
    kind = "DeiT" if own.distillation_token else "ViT"
    return f"{kind}Config", facts | {"intermediate_size": model.hidden}


# Arguments of timm's models that change what a network computes, but not its keys and shapes.
_TIMM_ARGUMENTS = {
    "act_layer": ("gelu", "its activation is another than GELU"),
    "pos_embed": ("learn", "it has no learned position embeddings"),
    "fc_norm": (True, "it pools after its last LayerNorm"),
    "pool_include_prefix": (False, "it pools over the class token, too"),
}


def _heads(arch: str) -> tuple[int, str]:
    return VITS[arch].heads, f"a {arch} has {VITS[arch].heads} heads"


def _timm_arguments(arch: str) -> dict[str, tuple[Any, str]]:
    return _TIMM_ARGUMENTS | {"num_heads": _heads(arch)}


def _hugging_face_config(arch: str) -> dict[str, tuple[Any, str]]:
    return {
        "num_attention_heads": _heads(arch),
        "hidden_act": ("gelu", "its activation is another than GELU"),
    }


FAMILY = Family(
    name="ViT",
    network=ViT,
    architectures=tuple(VITS),
    namings=(
        Naming("timm", _TIMM_ANCHORS),
        Naming("timm, with two heads", (*_TIMM_ANCHORS, "dist_token", "head_dist.weight"), {"head_dist": "head.dist"}),
        Naming("Meta's DINOv2", (*_TIMM_ANCHORS, "mask_token"), {"register_tokens": "reg_token"}),
        Naming(
            "torchvision",
            (*_TORCHVISION_ANCHORS, "encoder.layers.encoder_layer_0.mlp.0.weight"),
            _torchvision("0", "3"),
        ),
        Naming(
            "torchvision 0.12",
            (*_TORCHVISION_ANCHORS, "encoder.layers.encoder_layer_0.mlp.linear_1.weight"),
            _torchvision("linear_1", "linear_2"),
        ),
        *_hugging_face(),
    ),
    # Keys that begin so change what the network computes: they are not left out, as a projection head is.
    body=(
        r"(patch_embed|blocks|norm|norm_pre|fc_norm|attn_pool|head|pre_logits|encoder|layers)\.|embeddings\.(?!mask_token)|"
        r"(cls|dist|reg)_token$|pos_embed$|rel_pos|rope|conv_stem|heads\.pre_logits"
    ),
    head=_HEAD,
    others={  # jaxft's ViT cannot represent a network that has such a key
        r"^norm_pre\.": "it has a LayerNorm before the blocks, as CLIP's",
        r"mlp\.(w12|w3|weights_in|weights_out|fc1_g|fc1_x)\.": "its MLPs are gated (SwiGLU), as in DINOv2's giant",
        r"\.(q|k)_norm\.": "it normalises queries and keys",
        r"^patch_embed\.(backbone|norm|conv|proj\.\d)": "its patches come from convolutions: a hybrid ViT",
        r"^(heads\.)?pre_logits\.": "it has a hidden layer before the head",
        r"rel_pos|relative_position|\.(q|v)_bias$": "it has relative position embeddings, as BEiT",
        r"^blocks\.\d+\.(attns|ffns|attn_out_proj|in_proj)\.": "its blocks have parallel layers",
    },
    relatives={
        r"(^|\.)(text_model|token_embedding|transformer\.resblocks|vision_model\.encoder)(\.|$)": (
            "it is CLIP's or SigLIP's, whose image and text towers jaxft does not read"
        ),
        r"(^|\.)layers\.\d+\.blocks\.\d+\.attn\.": "it is a Swin Transformer",
        r"(^|\.)blocks\.\d+\.\d+\.attn\.qkv\.": "its blocks are in chunks, as in DINOv2's training checkpoints",
    },
    declarations=Declarations(
        own_names=r"^(test_)?(vit|deit|dinov2)\d*(_|$)",
        model_type=r"vit|deit|dinov2|dinov2_with_registers",
        look_alikes={r"quickgelu": "its activation is another than GELU"},
        timm_arguments=_timm_arguments,
        hugging_face_config=_hugging_face_config,
        option_keys={"layer_norm_eps": "norm_eps"},
    ),
    nearest=_nearest,
    model_for=_model_for,
    head_inputs=_head_inputs,
    unsupported=lambda tensors: None,
    layout=torch_layers,
    stages=_stages,
    timm_model=_timm_model,
    transformers_config=_transformers_config,
)
