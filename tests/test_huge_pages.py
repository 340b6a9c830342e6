"""Commands that restart themselves with huge pages."""

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from jaxft.process import environment, reexec_with_huge_pages
from tests.helpers.runs import ROOT, Run

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc")

FAULTS = """
import resource
import jax, jax.numpy as jnp

step = jax.jit(lambda x: jnp.sin(x)[::-1])
x = jnp.ones((3000, 3000))  # 34 MiB, which glibc returns to the system when freed
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    x = step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
CHECK_AND_HUGE_PAGES = "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
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
    ("command", "before", "after"),
    [
        (["-m", "jaxft.train"], "", ["", "glibc.malloc.hugetlb=1"]),
        (["-m", "jaxft", "train"], "", ["", "glibc.malloc.hugetlb=1"]),
        (["-m", "jaxft.sheet"], "glibc.malloc.check=0", ["glibc.malloc.check=0", CHECK_AND_HUGE_PAGES]),
        (["-m", "jaxft.sheet"], "glibc.malloc.hugetlb=0", ["glibc.malloc.hugetlb=0"]),
    ],
)
def test_a_command_restarts_with_huge_pages(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], before: str, after: list[str]
) -> None:
    """Restarts once, as the same process, with its arguments and exit code."""
    (tmp_path / "sitecustomize.py").write_text(NOTE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("NOTE", str(tmp_path / "note"))
    monkeypatch.setenv("GLIBC_TUNABLES", before)
    result = run("-W", "error", *command, "--config", "there/is/none.py")
    assert result.returncode == 2 and "there/is/none.py" in result.stderr
    pids, tunables = zip(*(line.split(" ") for line in (tmp_path / "note").read_text().splitlines()), strict=True)
    assert list(tunables) == after and len(set(pids)) == 1


def test_it_restarts_only_once_if_the_setting_is_lost(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOTE + 'os.environ.pop("GLIBC_TUNABLES", None)')
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("NOTE", str(tmp_path / "note"))
    assert run("-m", "jaxft.sheet", "--help").returncode == 0
    assert len((tmp_path / "note").read_text().splitlines()) == 2


def test_the_installed_script_restarts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    script = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    for file in ("/home/me/jaxft/notebook.py", None, "/home/me/.venv/bin/jaxft"):
        script.__file__ = file
        assert started == []
        reexec_with_huge_pages()
    ((program, command, env),) = started
    assert (program, command) == (sys.executable, [sys.executable, *sys.orig_argv[1:]])
    assert env["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    "statement",
    [
        "import jaxft.sheet",
        "jaxft.process.reexec_with_huge_pages()",
        "jaxft.errors.run_command(jaxft.sheet.main, ['--help'])",
        "jaxft.cli.run('sheet', ['--help'])",
    ],
)
def test_other_programs_never_restart(run: Run, tmp_path: Path, statement: str) -> None:
    """A script or notebook that imports jaxft, or even calls its commands, keeps its state."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import os
import jaxft.cli, jaxft.errors, jaxft.process, jaxft.sheet
print("started")
try:
    {statement}
except SystemExit:
    pass
print("ended", "hugetlb" in os.environ.get("GLIBC_TUNABLES", ""))
""")
    lines = run(program).stdout.splitlines()
    assert (lines[0], lines[-1]) == ("started", "ended False")
    assert lines.count("started") == 1


@pytest.mark.skipif(
    "[never]" in (SETTING.read_text() if SETTING.exists() else "[never]"),
    reason="the kernel's settings disable huge pages",
)
def test_a_step_uses_huge_pages(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", environment()["GLIBC_TUNABLES"])
    assert int(run("-c", FAULTS).stdout) < 20_000  # page faults; 176,000 with pages of 4 kB
