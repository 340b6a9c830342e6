"""Compares the operations that benchmarks/floor.py counts with torchvision's figures."""

import pytest

from benchmarks.floor import least, measure
from jaxft.models.resnet import ARCHITECTURES
from tests.helpers.reference import torchvision


@pytest.mark.parametrize(
    ("arch", "weights"),
    [
        ("resnet18", "ResNet18_Weights"),
        ("resnet50", "ResNet50_Weights"),
        ("wide_resnet50_2", "Wide_ResNet50_2_Weights"),
        ("resnext50_32x4d", "ResNeXt50_32X4D_Weights"),
    ],
)
def test_multiply_adds_are_torchvisions(arch: str, weights: str) -> None:
    meta = getattr(torchvision.models, weights).IMAGENET1K_V1.meta
    layers = measure(ARCHITECTURES[arch](num_classes=1000), 224).convolutions
    head = 1000 * layers[-1].outputs // 49  # features behind the mean over 7x7 pixels
    assert sum(layer.multiply_adds for layer in layers) + head == pytest.approx(meta["_ops"] * 1e9, rel=1e-3)


def test_a_machine_twice_as_fast_takes_half_the_time() -> None:
    network = measure(ARCHITECTURES["resnet50"](num_classes=10), 224)
    slow, fast = least(network, 64, 1e14, 1e12), least(network, 64, 2e14, 2e12)
    for work, figures in slow.items():
        assert fast[work]["microseconds"] == pytest.approx(figures["microseconds"] / 2, abs=0.1)
        assert fast[work]["megabytes"] == figures["megabytes"]
