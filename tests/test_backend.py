"""What a command sets up, in a process of its own."""

from pathlib import Path

import pytest

from tests.conftest import Run

PROGRAM = """
import jax, jax.numpy as jnp
from jaxft.process import set_up_backend

set_up_backend()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # a program as small as this is kept too
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
jax.jit(lambda x: jnp.sin(x)[::-1])(jnp.ones(3))
print(len(hits))
"""


def test_programs_are_compiled_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled" / "half_written-cache").touch()  # as a full disk leaves it; JAX alone would keep no other
    first, second = (int(run("-c", PROGRAM).stdout) for _ in range(2))
    assert (first, second > 0) == (0, True)
    assert list((tmp_path / "compiled").iterdir())
