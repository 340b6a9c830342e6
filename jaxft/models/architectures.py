"""The architectures by torchvision's names, as plain data: reading a config needs them, but not Flax."""

from typing import Literal, NamedTuple


class ResNetArchitecture(NamedTuple):
    block: Literal["basic", "bottleneck"]
    depths: tuple[int, ...]  # blocks of each stage
    groups: int = 1  # of the bottleneck's 3x3 convolution
    width_per_group: int = 64  # channels of each group per 64 features of the block


class VGGArchitecture(NamedTuple):
    depths: tuple[int, ...]  # convolutions of each stage
    batch_norm: bool = False


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

_VGG_DEPTHS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
VGGS = {name: VGGArchitecture(depths) for name, depths in _VGG_DEPTHS.items()}
VGGS |= {f"{name}_bn": VGGArchitecture(depths, batch_norm=True) for name, depths in _VGG_DEPTHS.items()}

NAMES = (*RESNETS, *VGGS)
