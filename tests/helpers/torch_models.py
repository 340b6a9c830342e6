"""torchvision's networks with random weights and random running statistics, in float64, and their Flax counterparts."""

from typing import Any

import numpy as np

from jaxft.models.network import Network
from jaxft.models.resnet import ARCHITECTURES, BasicBlock, Bottleneck, ResNet
from jaxft.pretrained.convert import from_torch
from tests.helpers.reference import torch, torchvision


class NarrowResNet(torchvision.models.ResNet):
    """torchvision's ResNet for 10 classes with `width` channels after the stem, which torchvision fixes at 64."""

    def __init__(self, block: Any, depths: tuple[int, ...], width: int) -> None:
        self.width = width
        super().__init__(block, list(depths))
        self.fc = torch.nn.Linear(8 * width * block.expansion, 10)

    def _make_layer(self, block: Any, planes: int, *arguments: Any, **options: Any) -> torch.nn.Sequential:
        if planes == 64:  # the first stage, which follows the stem
            self.inplanes = self.width
            self.conv1 = torch.nn.Conv2d(3, self.width, 7, 2, 3, bias=False)
            self.bn1 = torch.nn.BatchNorm2d(self.width)
        return super()._make_layer(block, planes * self.width // 64, *arguments, **options)


# Networks that compile and run in a fraction of a real one's time, with shortcuts of both kinds.
_NARROW_DEPTHS, _NARROW_WIDTH = (2, 1, 1, 1), 16
_NARROW_BLOCKS: dict[str, Any] = {"basic": BasicBlock, "bottleneck": Bottleneck}


def flax_model(arch: str, **options: Any) -> ResNet:
    """Builds the counterpart of `random_torch_model(arch)`."""
    if arch in _NARROW_BLOCKS:
        return ResNet(_NARROW_BLOCKS[arch], _NARROW_DEPTHS, num_classes=10, width=_NARROW_WIDTH, **options)
    return ARCHITECTURES[arch](num_classes=10, **options)


def random_torch_model(arch: str, seed: int = 0) -> torch.nn.Module:
    """Builds a network for 10 classes, with statistics and affine parameters far from 0 and 1.

    arch: torchvision's name, or "basic" or "bottleneck" for a narrow network of such blocks.
    """
    torch.manual_seed(seed)
    if arch in _NARROW_BLOCKS:
        block = getattr(torchvision.models.resnet, _NARROW_BLOCKS[arch].__name__)
        model = NarrowResNet(block, _NARROW_DEPTHS, _NARROW_WIDTH).double()
    else:
        model = getattr(torchvision.models, arch)(num_classes=10).double()
    randomize_norms(model)
    return model


@torch.no_grad()
def randomize_norms(model: torch.nn.Module) -> None:
    """Sets the statistics and the affine parameters of every BatchNorm to random values far from 0 and 1."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)


def to_flax(state: dict[str, torch.Tensor], model: Network) -> dict[str, Any]:
    return from_torch({key: value.numpy().copy() for key, value in state.items()}, model)


def images(height: int, width: int, count: int = 2) -> np.ndarray:
    """Returns normally distributed float64 images (count, height, width, 3)."""
    return np.random.default_rng(1).normal(size=(count, height, width, 3))


def nchw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))
