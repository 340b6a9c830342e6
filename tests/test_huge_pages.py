"""A command's process, from its start."""

import os
import sys
from pathlib import Path

import pytest

from jaxft.process import environment
from tests.conftest import ROOT, Run

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc")

FAULTS = """
import resource
import jax, jax.numpy as jnp

step = jax.jit(lambda x: jnp.sin(x)[::-1])
x = jnp.ones((3000, 3000))  # 34 MiB, which glibc gives back at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    x = step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
NOTE = """
import os, sys
with open(os.environ["NOTE"], "a") as note:
    note.write(f'{os.getpid()} {os.environ.get("GLIBC_TUNABLES", "")}\\n')
"""


@pytest.fixture(autouse=True)
def not_asked_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLIBC_TUNABLES", "JAXFT_ASKED_FOR_HUGE_PAGES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ["", "glibc.malloc.hugetlb=1"]),
        ("glibc.malloc.check=0", ["glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1"]),
        ("glibc.malloc.hugetlb=0", ["glibc.malloc.hugetlb=0"]),
    ],
)
def test_a_command_starts_again_with_huge_pages(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: list[str]
) -> None:
    """Once, as the same process, with its arguments and its exit code."""
    (tmp_path / "sitecustomize.py").write_text(NOTE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("NOTE", str(tmp_path / "note"))
    monkeypatch.setenv("GLIBC_TUNABLES", before)
    result = run("-W", "error", "-m", "jaxft.train", "--config", "there/is/none.py")
    assert result.returncode == 2 and "there/is/none.py" in result.stderr
    pids, tunables = zip(*(line.split(" ") for line in (tmp_path / "note").read_text().splitlines()), strict=True)
    assert list(tunables) == after and len(set(pids)) == 1


def test_it_starts_again_once_where_the_choice_does_not_arrive(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOTE + 'os.environ.pop("GLIBC_TUNABLES", None)')
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("NOTE", str(tmp_path / "note"))
    assert run("-m", "jaxft.train", "--help").returncode == 0
    assert len((tmp_path / "note").read_text().splitlines()) == 2


def test_a_program_that_imports_jaxft_does_not(run: Run) -> None:
    program = "import os, jaxft; print('hugetlb' in os.environ.get('GLIBC_TUNABLES', ''))"
    assert run("-c", program).stdout == "False\n"


@pytest.mark.skipif(
    "[never]" in (SETTING.read_text() if SETTING.exists() else "[never]"), reason="of the kernel's settings"
)
def test_a_step_takes_huge_pages(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", environment()["GLIBC_TUNABLES"])
    assert int(run("-c", FAULTS).stdout) < 20_000  # page faults; of 4 kB 176,000
