"""The set-up of a command's process, each in a separate process."""

from pathlib import Path

import pytest

from tests.helpers.runs import Run

COMPILES = """
import jax, jax.numpy as jnp
from jaxft import process

process.set_up()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # so that a small program is stored too
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
jax.jit(lambda x: jnp.sin(x)[::-1])(jnp.ones(3))
print(len(hits))
"""

# An object whose finalizer fails gives an unraisable error; the last line is an uncaught one.
FAILS = """
import logging
from jaxft import process

class Failing:
    def __init__(self, message):
        self.message = message
    def __del__(self):
        raise RuntimeError(self.message)

{set_up}
for name in ("absl", "asyncio", "gcsfs", "other"):
    logging.getLogger(name).error(f"logged by {{name}}")
Failing("Event loop is closed")
Failing("another failure")
raise RuntimeError("{last}")
"""


def test_programs_are_compiled_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled" / "half_written-cache").touch()  # as a full disk leaves it; JAX would store no other
    first, second = (int(run("-c", COMPILES).stdout) for _ in range(2))
    assert (first, second > 0) == (0, True)
    assert list((tmp_path / "compiled").iterdir())


def test_a_chosen_compilation_cache_stays(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "chosen"))
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    assert run("-c", COMPILES).returncode == 0
    assert list((tmp_path / "chosen").iterdir())
    assert not (tmp_path / "cache").exists()


def test_only_orbaxs_noise_after_an_error_is_hidden(run: Run) -> None:
    result = run("-c", FAILS.format(set_up="process.set_up()", last="Event loop is closed"))
    assert result.returncode == 1
    assert "another failure" in result.stderr and "logged by other" in result.stderr
    assert "Event loop" not in result.stderr
    assert not any(f"logged by {name}" in result.stderr for name in ("absl", "asyncio", "gcsfs"))
    assert "the last" in run("-c", FAILS.format(set_up="process.set_up()", last="the last")).stderr


def test_without_set_up_nothing_is_hidden(run: Run) -> None:
    result = run("-c", FAILS.format(set_up="", last="Event loop is closed"))
    assert result.stderr.count("Event loop is closed") >= 2
    assert all(f"logged by {name}" in result.stderr for name in ("absl", "asyncio", "gcsfs"))


def test_pillows_limit_is_lifted_in_commands_only(run: Run) -> None:
    program = "from PIL import Image; from jaxft import process; {}; print(Image.MAX_IMAGE_PIXELS)"
    assert run("-c", program.format("process.set_up()")).stdout == "None\n"
    assert run("-c", program.format("import jaxft.data.image_file")).stdout == "89478485\n"
