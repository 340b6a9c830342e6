"""Fixtures for tests of weights files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.reference import torch


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    """Returns a function that saves an object by torch.save; it returns the path."""

    def save_in(content: Any, name: str = "file.pth") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save_in
