"""PyTorch and torchvision as the reference to be compared with."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch


def _declare_torchvision_operators() -> None:
    """Beside a CPU build of torch the compiled operators may not load, and torchvision's import misses their names."""
    spec = importlib.util.find_spec("torchvision")
    assert spec and spec.origin
    source = Path(spec.origin).with_name("_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in {*re.findall(r'register_meta\("(\w+)"\)', source), "nms", "qnms", "qroi_align", "qroi_pool"}:
        library.define(f"{name}(Tensor x) -> Tensor")
    _libraries.append(library)  # its definitions go when it goes


_libraries: list[Any] = []
try:
    import torchvision
except RuntimeError:
    _declare_torchvision_operators()
    import torchvision

__all__ = ["torch", "torchvision"]
