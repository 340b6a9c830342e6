"""Runs that are killed, stopped, started twice or diverge: real processes, a tiny network, all augmentation."""

import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxft.training.restore import load_checkpoint
from tests.helpers.runs import TINY, Run, assert_same_run, metrics, same_bits, started, wait_for_steps, without_times


def test_sigkill_at_any_moment_changes_nothing(run: Run, undisturbed: Path, tmp_path: Path) -> None:
    """Kills twice; benchmarks/kills.py does so a hundred times."""
    rng = random.Random(0)
    for least in (0, 13):
        with started(*TINY, "--workdir", tmp_path / "run") as process:
            wait_for_steps(process, tmp_path / "run", least)
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
    assert run(*TINY, "--workdir", tmp_path / "run").returncode == 0
    assert_same_run(tmp_path / "run", undisturbed)


# Two checkpoints are kept: the first epoch's and the signal's.
TO_BE_STOPPED = (*TINY, "--config.checkpoint.every_steps=0", "--config.checkpoint.keep_latest=2", "--workdir")


def stop(workdir: Path, number: signal.Signals) -> tuple[int, str]:
    """Trains until a signal in the second epoch; returns the exit code and stderr."""
    with started(*TO_BE_STOPPED, workdir) as process:
        wait_for_steps(process, workdir, 16)
        process.send_signal(number)
        _, error = process.communicate(timeout=300)
    return process.returncode, error


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """The workdir of a run that SIGTERM stopped (not to be changed), its exit code and its stderr."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    return workdir, *stop(workdir, signal.SIGTERM)


def check_stopped(workdir: Path, error: str, name: str) -> None:
    last_step = metrics(workdir)[-1]["step"]
    assert f"stopped by {name}; resume with the same command (after step {last_step})" in error
    assert "Traceback" not in error
    assert last_step < 42
    assert load_checkpoint(workdir, "latest").step == last_step


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_at_the_next_step_and_says_so(tmp_path: Path) -> None:
    code, error = stop(tmp_path / "run", signal.SIGINT)
    assert code == 130, error
    check_stopped(tmp_path / "run", error, "SIGINT")


def test_a_signal_saves_a_checkpoint_at_the_next_step_and_says_so(
    run: Run, undisturbed: Path, stopped: tuple[Path, int, str], tmp_path: Path
) -> None:
    workdir, code, error = stopped
    assert code == 143, error
    check_stopped(workdir, error, "SIGTERM")
    shutil.copytree(workdir, tmp_path / "run")
    result = run(*TO_BE_STOPPED, tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(undisturbed))
    states = (load_checkpoint(path, "latest").state for path in (tmp_path / "run", undisturbed))
    assert same_bits(*states)


def test_a_full_disk_costs_only_the_checkpoints_of_that_time(undisturbed: Path, tmp_path: Path) -> None:
    """Simulates a full disk for some steps by a file-size limit, which makes the checkpoints' writes fail."""
    with started(*TINY, "--workdir", tmp_path / "run") as process, ThreadPoolExecutor() as pool:
        assert process.stderr
        error = pool.submit(process.stderr.read)  # a full pipe would block the run
        wait_for_steps(process, tmp_path / "run", 6)
        limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        wait_for_steps(process, tmp_path / "run", 16)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
        assert process.wait(timeout=300) == 0, error.result()
    text = r"checkpoint \d+ could not be written .*; (checkpoint \d+ stays|there is none yet); trying again at the next"
    assert re.search(text, error.result())
    assert "Traceback" not in error.result()
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_second_run_in_one_workdir_is_refused(fails: Callable[..., str], tmp_path: Path) -> None:
    with started(*TINY, "--workdir", tmp_path / "run") as process:
        wait_for_steps(process, tmp_path / "run", 1)
        assert "another run is training in" in fails(*TINY, "--workdir", tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate rises from 0 at step 1 to a huge value: only checkpoint 1 is good."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # compiling takes longer than three steps
    workdir = tmp_path / "run"
    diverging = ("--config.optimizer.learning_rate=1e38", "--config.optimizer.freeze=backbone")
    result = run(*TINY, *diverging, "--config.checkpoint.every_steps=1", "--workdir", workdir)
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"(nan|inf|not finite) at step [23], where the learning rate is (7.14|1.42)\d+e\+3[67];", line)
    assert "the last good checkpoint is 1;" in line
    assert load_checkpoint(workdir, "latest").step == 1


def test_a_damaged_checkpoint_is_refused_or_skipped(
    run: Run, fails: Callable[..., str], undisturbed: Path, stopped: tuple[Path, int, str], tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(stopped[0], workdir)
    two_kept = (*TO_BE_STOPPED, workdir)
    *_, good, damaged = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    (largest,) = sorted((workdir / "checkpoints" / str(damaged)).rglob("*"), key=lambda path: path.stat().st_size)[-1:]
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    for command in (
        two_kept,
        ("-m", "jaxft.export", "--workdir", workdir, "--checkpoint=latest", "--to=torchvision", "--out=never.pth"),
    ):
        assert f"checkpoint {damaged} in {workdir}/checkpoints is damaged" in fails(*command)
    result = run(*two_kept, "--config.checkpoint.on_damage=newest_good")
    assert result.returncode == 0, result.stderr
    assert f"resuming after step {good}" in result.stdout
    assert_same_run(workdir, undisturbed)
