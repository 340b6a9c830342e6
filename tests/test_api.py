"""The public names of `import jaxft`."""

import subprocess
import sys

import pytest

import jaxft


def test_importing_jaxft_is_light() -> None:
    code = "import sys, jaxft; print(*{'jax', 'numpy', 'PIL', 'matplotlib'}.intersection(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == ""


@pytest.mark.parametrize("name", jaxft.__all__)
def test_every_public_name_exists_and_has_a_docstring(name: str) -> None:
    assert getattr(jaxft, name).__doc__
    assert name in dir(jaxft)


def test_other_names_raise_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tensor'"):
        jaxft.tensor  # noqa: B018
