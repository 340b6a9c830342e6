"""What `import jaxft` offers."""

import subprocess
import sys

import pytest

import jaxft


def test_importing_jaxft_is_light() -> None:
    code = "import sys, jaxft; print(*{'jax', 'numpy', 'PIL', 'matplotlib'}.intersection(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == ""


@pytest.mark.parametrize("name", jaxft.__all__)
def test_everything_offered_is_there_and_explained(name: str) -> None:
    assert getattr(jaxft, name).__doc__
    assert name in dir(jaxft)


def test_anything_else_is_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tensor'"):
        jaxft.tensor  # noqa: B018
