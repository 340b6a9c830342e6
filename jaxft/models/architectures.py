"""The architectures by torchvision's names, as plain data: reading a config needs them, but not Flax."""

from typing import Literal, NamedTuple


class Architecture(NamedTuple):
    block: Literal["basic", "bottleneck"]
    depths: tuple[int, ...]  # blocks of each stage
    groups: int = 1  # of the bottleneck's 3x3 convolution
    width_per_group: int = 64  # channels of each group per 64 features of the block


RESNETS = {
    "resnet18": Architecture("basic", (2, 2, 2, 2)),
    "resnet34": Architecture("basic", (3, 4, 6, 3)),
    "resnet50": Architecture("bottleneck", (3, 4, 6, 3)),
    "resnet101": Architecture("bottleneck", (3, 4, 23, 3)),
    "resnet152": Architecture("bottleneck", (3, 8, 36, 3)),
    "wide_resnet50_2": Architecture("bottleneck", (3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": Architecture("bottleneck", (3, 4, 23, 3), width_per_group=128),
    "resnext50_32x4d": Architecture("bottleneck", (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": Architecture("bottleneck", (3, 4, 23, 3), groups=32, width_per_group=8),
    "resnext101_64x4d": Architecture("bottleneck", (3, 4, 23, 3), groups=64, width_per_group=4),
}
