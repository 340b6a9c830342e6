"""Runs that are killed, stopped, doubled or diverge: real processes, a tiny network, all augmentation."""

import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxft.training.restore import load_checkpoint
from tests.commands.test_train import metrics, same_bits, without_times
from tests.conftest import ROOT, Run, environment

TINY = (
    "-m",
    "jaxft.train",
    "--config=configs/quickstart.py",
    "--config.data.train_split=test",
    "--config.image_size=16",
    "--config.model.pretrained=",
    "--config.model.width=4",
    "--config.batch_size=72",  # 14 steps an epoch, the last of fewer pictures
    "--config.num_epochs=3",
    "--config.augment.flip=True",
    "--config.augment.shift=0.1",
    "--config.augment.crop_area=0.5",
    "--config.augment.mixup=0.2",
    "--config.checkpoint.every_steps=4",
)


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_steps(process: subprocess.Popen[str], workdir: Path, steps: int) -> None:
    """Until metrics.jsonl has so many lines of training."""
    path = workdir / "metrics.jsonl"
    while not path.exists() or path.read_text().count('"train"') < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    result = run(*TINY, "--workdir", workdir)
    assert result.returncode == 0, result.stderr
    return workdir


def assert_same_run(workdir: Path, other: Path) -> None:
    """Metrics lines, parameters, statistics and momentum, bit for bit."""
    assert without_times(metrics(workdir)) == without_times(metrics(other))
    for which in ("latest", "best"):
        mine, theirs = (load_checkpoint(path, which) for path in (workdir, other))
        assert mine.step == theirs.step
        assert same_bits(mine.state, theirs.state)


def test_kill_9_at_any_moment_changes_nothing(run: Run, undisturbed: Path, tmp_path: Path) -> None:
    """benchmarks/kills.py does it a hundred times."""
    rng = random.Random(0)
    for least in (0, 13):
        with started(*TINY, "--workdir", tmp_path / "run") as process:
            wait_for_steps(process, tmp_path / "run", least)
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
    assert run(*TINY, "--workdir", tmp_path / "run").returncode == 0
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_at_the_next_step_and_says_so(
    run: Run, undisturbed: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    command = (*TINY, "--config.checkpoint.every_steps=0", "--workdir", tmp_path / "run")
    with started(*command) as process:
        wait_for_steps(process, tmp_path / "run", 5)
        process.send_signal(number)
        _, error = process.communicate(timeout=300)
    assert process.returncode == code, error
    last_step = metrics(tmp_path / "run")[-1]["step"]
    assert f"stopped by {number.name}; the same command goes on after step {last_step}" in error
    assert "Traceback" not in error
    assert last_step < 42
    assert load_checkpoint(tmp_path / "run", "latest").step == last_step
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(undisturbed))
    states = (load_checkpoint(path, "latest").state for path in (tmp_path / "run", undisturbed))
    assert same_bits(*states)


def test_a_full_disk_costs_no_more_than_its_checkpoints(undisturbed: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: for some steps the system refuses what a checkpoint writes."""
    with started(*TINY, "--workdir", tmp_path / "run") as process, ThreadPoolExecutor() as pool:
        assert process.stderr
        error = pool.submit(process.stderr.read)  # a pipe that is full would stop the run
        wait_for_steps(process, tmp_path / "run", 6)
        limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        wait_for_steps(process, tmp_path / "run", 16)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
        assert process.wait(timeout=300) == 0, error.result()
    text = r"checkpoint \d+ could not be written .*; (checkpoint \d+ stays|there is none yet); trying again at the next"
    assert re.search(text, error.result())
    assert "Traceback" not in error.result()
    assert_same_run(tmp_path / "run", undisturbed)


def test_two_runs_in_one_workdir_are_refused(fails: Callable[..., str], tmp_path: Path) -> None:
    with started(*TINY, "--workdir", tmp_path / "run") as process:
        wait_for_steps(process, tmp_path / "run", 1)
        assert "another run is training in" in fails(*TINY, "--workdir", tmp_path / "run")


def test_a_loss_that_is_no_number_stops_the_run(run: Run, tmp_path: Path) -> None:
    """The rate grows from 0 at step 1 to what nothing can bear: checkpoint 1 is good, and nothing after it."""
    workdir = tmp_path / "run"
    result = run(
        *TINY, "--workdir", workdir, "--config.checkpoint.every_steps=1", "--config.optimizer.learning_rate=1e38"
    )
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"(nan|inf|not finite) at step [23], where the learning rate is (7.14|1.42)\d+e\+3[67];", line)
    assert "the last good checkpoint is 1;" in line
    assert load_checkpoint(workdir, "latest").step == 1


def test_damage_is_refused_or_gone_round(
    run: Run, fails: Callable[..., str], undisturbed: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    two_kept = (*TINY, "--config.checkpoint.keep_latest=2", "--workdir", workdir)
    with started(*two_kept) as process:
        wait_for_steps(process, workdir, 13)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)
    *_, good, damaged = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    (largest,) = sorted((workdir / "checkpoints" / str(damaged)).rglob("*"), key=lambda path: path.stat().st_size)[-1:]
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    for command in (
        two_kept,
        ("-m", "jaxft.export", "--workdir", workdir, "--checkpoint=latest", "--to=torchvision", "--out=never.pth"),
    ):
        result = run(*command)
        assert result.returncode == 2
        assert f"checkpoint {damaged} in {workdir}/checkpoints is damaged" in result.stderr
    result = run(*two_kept, "--config.checkpoint.on_damage=newest_good")
    assert result.returncode == 0, result.stderr
    assert f"goes on after step {good}" in result.stdout
    assert_same_run(workdir, undisturbed)
