"""Part `families`: train step and evaluation of ViTs and ConvNeXts beside PyTorch's, torchvision's if it has them."""

from typing import Any

from benchmarks.gpu.part import Settings
from benchmarks.gpu.steps import Case, measure_cases

CASES = (
    Case("train", 256, "bfloat16", ("compile",), arch="vit_small_patch16_224"),
    Case("train", 256, "bfloat16", ("compile",), arch="convnext_tiny"),
    Case("train", 64, "bfloat16", ("compile",), arch="vit_b_16"),
    Case("forward", 256, "bfloat16", ("compile",), arch="vit_small_patch16_224"),
    Case("forward", 256, "bfloat16", ("compile",), arch="convnext_tiny"),
)
TOY_CASES = (
    Case("train", 8, "bfloat16", ("eager",), arch="test_vit"),
    Case("train", 8, "bfloat16", ("eager",), arch="test_convnext"),
)


def families(settings: Settings, seconds: float) -> dict[str, Any]:
    """Measures the cases in order of importance, as far as time allows."""
    return measure_cases("families", TOY_CASES if settings.toy else CASES, settings, seconds)
