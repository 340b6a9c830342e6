"""The set-up of a command's process, each in a separate process."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, Run, environment

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


def test_a_program_that_cannot_be_read_is_replaced(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    run("-c", COMPILES)
    programs = list((tmp_path / "compiled").glob("*-cache"))
    for program in programs:
        program.write_bytes(program.read_bytes()[:100])
    damaged, replaced = (run("-c", COMPILES) for _ in range(2))
    assert (damaged.stdout, damaged.stderr) == ("0\n", "")
    assert replaced.stdout == f"{len(programs)}\n"


UNDER_A_PROFILER = """
import runpy, sys
sys.argv = ["jaxft", "report", "--help"]
sys.setprofile(lambda *_: None)
try:
    runpy.run_module("jaxft", run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("exit code", end.code)
"""


def test_a_command_returns_to_a_profiler(run: Run) -> None:
    assert run("-c", UNDER_A_PROFILER).stdout.splitlines()[-1] == "exit code 0"


def test_a_current_folder_that_was_deleted_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    deletes = f"import os, sys, subprocess; os.rmdir({str(folder)!r}); sys.exit(subprocess.call(sys.argv[1:]))"
    command = [sys.executable, "-m", "jaxft.report", "--workdir", str(tmp_path)]
    result = subprocess.run([sys.executable, "-c", deletes, *command], cwd=folder, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (
        2,
        "error: the current folder cannot be used (No such file or directory); change to another one\n",
    )


@pytest.mark.parametrize("name", ["", "compiled"])
def test_a_file_in_place_of_the_cache_is_reported(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = tmp_path / name if name else tmp_path / "file"
    file.write_text("not a folder")
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path if name else file))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    result = run("-m", "jaxft.report", "--workdir", tmp_path / "none")
    first, *_ = result.stderr.splitlines()
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert first.startswith(
        "compiled programs cannot be kept in" if name else f"error: the cache {file} is not a folder"
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("JAX_PLATFORMS", "cuda", "JAX has no device for JAX_PLATFORMS=cuda; unset JAX_PLATFORMS or pip install"),
        ("JAX_PLATFORMS", "abacus", "JAX has no device for JAX_PLATFORMS=abacus (Backend 'abacus' is not in the list"),
        ("JAX_ENABLE_X64", "maybe", "JAX cannot start: invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'; "),
        ("XLA_FLAGS", "--xla_abacus=1", "XLA cannot use XLA_FLAGS: Unknown flag in XLA_FLAGS: --xla_abacus=1; correct"),
    ],
)
def test_a_wrong_platform_or_flag_is_the_users_error(tmp_path: Path, name: str, value: str, message: str) -> None:
    command = [sys.executable, "-m", "jaxft.train", "--config=quickstart", "--workdir", str(tmp_path / "run")]
    env = {**environment(1), "JAX_PLATFORMS": "", name: value}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []
