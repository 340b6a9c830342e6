"""The architectures by torchvision's names, as plain data: reading a config needs them, but not Flax."""

from typing import Literal, NamedTuple

DeepStem = Literal["", "deep", "tiered", "wide"]


class ResNetArchitecture(NamedTuple):
    block: Literal["basic", "bottleneck"]
    depths: tuple[int, ...]  # blocks of each stage
    groups: int = 1  # of the bottleneck's 3x3 convolution
    width_per_group: int = 64  # channels of each group per 64 features of the block
    deep_stem: DeepStem = ""  # three 3x3 convolutions instead of one 7x7: see DEEP_STEMS in resnet.py
    average_shortcut: bool = False  # a shortcut with a stride is an average-pool and a convolution without stride
    squeeze_excite: bool = False  # each block scales its channels by a function of their means
    zero_init: bool = False  # the last norm of each block has scale 0 at first, as in timm


class VGGArchitecture(NamedTuple):
    depths: tuple[int, ...]  # convolutions of each stage
    batch_norm: bool = False


class ViTArchitecture(NamedTuple):
    patch: int  # pixels of a patch's side
    width: int  # features of a token
    depth: int  # blocks
    heads: int
    grid: int  # patches of a side of the images that it was made for
    hidden: int = 0  # features inside the MLPs; 0: four times `width`
    layer_scale: float = 0.0  # initial value of LayerScale; 0: without
    class_token: bool = True
    distillation_token: bool = False
    registers: int = 0  # further tokens, after the class token
    embedded: int = 1  # position embeddings of tokens that are not patches: those of the first ones
    pool: Literal["token", "mean", "mean_norm", "attention"] = "token"  # see ViT.pool
    pool_all: bool = False  # pool over the class token and registers, too


class ConvNeXtArchitecture(NamedTuple):
    depths: tuple[int, ...]  # blocks of each stage
    widths: tuple[int, ...]  # channels of each stage
    response_norm: bool = False  # version 2: global response normalisation instead of LayerScale
    norm_eps: float = 1e-6
    tanh: bool = False  # GELU by tanh, not by erf


RESNETS = {
    "resnet18": ResNetArchitecture("basic", (2, 2, 2, 2)),
    "resnet34": ResNetArchitecture("basic", (3, 4, 6, 3)),
    "resnet50": ResNetArchitecture("bottleneck", (3, 4, 6, 3)),
    "resnet101": ResNetArchitecture("bottleneck", (3, 4, 23, 3)),
    "resnet152": ResNetArchitecture("bottleneck", (3, 8, 36, 3)),
    "wide_resnet50_2": ResNetArchitecture("bottleneck", (3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": ResNetArchitecture("bottleneck", (3, 4, 23, 3), width_per_group=128),
    "resnext50_32x4d": ResNetArchitecture("bottleneck", (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": ResNetArchitecture("bottleneck", (3, 4, 23, 3), groups=32, width_per_group=8),
    "resnext101_64x4d": ResNetArchitecture("bottleneck", (3, 4, 23, 3), groups=64, width_per_group=4),
}

_DEPTHS = {
    10: (1, 1, 1, 1),
    14: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    26: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    269: (3, 30, 48, 8),
}
_DEEP_STEMS: dict[str, DeepStem] = {"c": "deep", "d": "deep", "s": "wide", "t": "tiered"}


def _timm(depth: int, variant: str = "", groups: int = 1, width_per_group: int = 64) -> ResNetArchitecture:
    """Returns a ResNet of timm/models/resnet.py. variant: '', 'c', 'd', 's' or 't'."""
    return ResNetArchitecture(
        "basic" if depth in (10, 18, 34) else "bottleneck",
        _DEPTHS[depth],
        groups,
        width_per_group,
        _DEEP_STEMS.get(variant, ""),
        average_shortcut=variant in ("d", "t"),
        zero_init=True,
    )


# Those that torchvision does not have, by timm's names.
_VARIANTS = {10: "t", 14: "t", 18: "d", 26: " dt", 34: "d", 50: "cdst", 101: "cds", 152: "cds", 200: " d"}
RESNETS |= {
    f"resnet{depth}{variant.strip()}": _timm(depth, variant.strip())
    for depth, variants in _VARIANTS.items()
    for variant in variants
}
RESNETS |= {
    "resnext50d_32x4d": _timm(50, "d", 32, 4),
    "resnext101_32x4d": _timm(101, "", 32, 4),
    "resnext101_32x16d": _timm(101, "", 32, 16),
    "resnext101_32x32d": _timm(101, "", 32, 32),
}
_SQUEEZE_EXCITE = {
    "seresnet18": _timm(18),
    "seresnet34": _timm(34),
    "seresnet50": _timm(50),
    "seresnet50t": _timm(50, "t"),
    "seresnet101": _timm(101),
    "seresnet152": _timm(152),
    "seresnet152d": _timm(152, "d"),
    "seresnet200d": _timm(200, "d"),
    "seresnet269d": _timm(269, "d"),
    "seresnext26d_32x4d": _timm(26, "d", 32, 4),
    "seresnext26t_32x4d": _timm(26, "t", 32, 4),
    "seresnext50_32x4d": _timm(50, "", 32, 4),
    "seresnext101_32x4d": _timm(101, "", 32, 4),
    "seresnext101_32x8d": _timm(101, "", 32, 8),
    "seresnext101d_32x8d": _timm(101, "d", 32, 8),
    "seresnext101_64x4d": _timm(101, "", 64, 4),
}
RESNETS |= {name: architecture._replace(squeeze_excite=True) for name, architecture in _SQUEEZE_EXCITE.items()}

_VGG_DEPTHS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
VGGS = {name: VGGArchitecture(depths) for name, depths in _VGG_DEPTHS.items()}
VGGS |= {f"{name}_bn": VGGArchitecture(depths, batch_norm=True) for name, depths in _VGG_DEPTHS.items()}

_VIT_SIZES = {  # width, depth, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


def _vit(size: str, patch: int, image_size: int) -> ViTArchitecture:
    return ViTArchitecture(patch, *_VIT_SIZES[size], grid=image_size // patch)


VITS = {
    "vit_b_16": _vit("base", 16, 224),
    "vit_b_32": _vit("base", 32, 224),
    "vit_l_16": _vit("large", 16, 224),
    "vit_l_32": _vit("large", 32, 224),
    "vit_h_14": _vit("huge", 14, 224),
}
# Those that torchvision does not have, by the names of timm/models/vision_transformer.py and deit.py.
_VIT_PATCHES = {
    224: {"tiny": (16,), "small": (8, 16, 32), "base": (8,), "large": (14,)},
    384: {"tiny": (16,), "small": (16, 32), "base": (16, 32), "large": (16, 32)},
}
VITS |= {
    f"vit_{size}_patch{patch}_{image_size}": _vit(size, patch, image_size)
    for image_size, sizes in _VIT_PATCHES.items()
    for size, patches in sizes.items()
    for patch in patches
}
VITS |= {
    f"deit_{size}_distilled_patch16_{image_size}": _vit(size, 16, image_size)._replace(
        distillation_token=True, embedded=2
    )
    for size, image_size in (("tiny", 224), ("small", 224), ("base", 224), ("base", 384))
}
_DEIT3 = [(size, 16, image_size) for size in ("small", "base", "large") for image_size in (224, 384)]
VITS |= {
    f"deit3_{size}_patch{patch}_{image_size}": _vit(size, patch, image_size)._replace(layer_scale=1e-6, embedded=0)
    for size, patch, image_size in [*_DEIT3, ("medium", 16, 224), ("huge", 14, 224)]
}
for _size in ("small", "base", "large"):
    _dinov2 = _vit(_size, 14, 518)._replace(layer_scale=1e-5)
    VITS[f"vit_{_size}_patch14_dinov2"] = _dinov2
    VITS[f"vit_{_size}_patch14_reg4_dinov2"] = _dinov2._replace(registers=4, embedded=0)
    # Meta's own name and layout: timm adds the position embedding of the class token to the class token.
    VITS[f"dinov2_vit{_size[0]}14_reg"] = _dinov2._replace(registers=4)
# Tiny networks that timm publishes for tests.
VITS |= {
    "test_vit": ViTArchitecture(16, 64, 6, 2, 10, 192),
    "test_vit2": ViTArchitecture(
        16, 64, 8, 2, 10, 192, layer_scale=1e-5, class_token=False, registers=1, pool="mean_norm"
    ),
    "test_vit3": ViTArchitecture(
        16, 96, 9, 3, 10, 192, layer_scale=1e-5, class_token=False, registers=1, pool="attention", pool_all=True
    ),
}

# Other libraries' names of networks -> ours.
ALIASES = {
    "vit_base_patch16_224": "vit_b_16",
    "vit_base_patch32_224": "vit_b_32",
    "vit_large_patch16_224": "vit_l_16",
    "vit_large_patch32_224": "vit_l_32",
    "vit_huge_patch14_224": "vit_h_14",
    "deit_tiny_patch16_224": "vit_tiny_patch16_224",
    "deit_small_patch16_224": "vit_small_patch16_224",
    "deit_base_patch16_224": "vit_b_16",
    "deit_base_patch16_384": "vit_base_patch16_384",
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dinov2_vitb14": "vit_base_patch14_dinov2",
    "dinov2_vitl14": "vit_large_patch14_dinov2",
}

_CONVNEXT_SIZES = {  # blocks of each stage, channels of the first one
    "tiny": ((3, 3, 9, 3), 96),
    "small": ((3, 3, 27, 3), 96),
    "base": ((3, 3, 27, 3), 128),
    "large": ((3, 3, 27, 3), 192),
    "atto": ((2, 2, 6, 2), 40),
    "femto": ((2, 2, 6, 2), 48),
    "pico": ((2, 2, 6, 2), 64),
    "nano": ((2, 2, 8, 2), 80),
    "xlarge": ((3, 3, 27, 3), 256),
    "xxlarge": ((3, 4, 30, 3), 384),
    "huge": ((3, 3, 27, 3), 352),
}


def _convnext(size: str, response_norm: bool = False, norm_eps: float = 1e-6) -> ConvNeXtArchitecture:
    depths, width = _CONVNEXT_SIZES[size]
    return ConvNeXtArchitecture(depths, (width, 2 * width, 4 * width, 8 * width), response_norm, norm_eps)


CONVNEXTS = {
    f"convnext_{size}": _convnext(size, norm_eps=1e-5 if size == "xxlarge" else 1e-6)
    for size in _CONVNEXT_SIZES
    if size != "huge"
}
CONVNEXTS |= {
    f"convnextv2_{size}": _convnext(size, response_norm=True)
    for size in _CONVNEXT_SIZES
    if size not in ("xlarge", "xxlarge")
}
# timm's smallest ones, for tests
CONVNEXTS["test_convnext"] = ConvNeXtArchitecture((1, 2, 4, 2), (24, 32, 48, 64), norm_eps=1e-5, tanh=True)
CONVNEXTS["test_convnext2"] = ConvNeXtArchitecture((1, 1, 1, 1), (32, 64, 96, 128), norm_eps=1e-5, tanh=True)

NAMES = (*RESNETS, *VGGS, *VITS, *CONVNEXTS)
# Those that torchvision has.
TORCHVISION = frozenset(
    {
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
        *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", *VGGS),
        *("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"),
        *("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
    }
)


def canonical(name: str) -> str:
    """Returns our name of a network that may be called as in timm."""
    return ALIASES.get(name, name)
