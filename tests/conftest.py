"""Fixtures for all test files: settings of the process, folders, and runs that several of them read."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before jax is imported
os.environ["NPROC"] = "16"  # threads, or eight devices on few cores wait for each other for ever
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from jaxft import process
from jaxft.errors import run_command
from tests.helpers.runs import ROOT, SMALL_RUN, TINY, Run, environment
from tests.helpers.tables import table_config, write_table

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one is slow
hypothesis.settings.load_profile("any machine")

# By duration; two files that begin with the same run are not neighbours, or one worker would wait for the other.
LONGEST = (
    "test_survival",
    "test_resnet",
    "test_conv",
    "test_train",
    "test_steps",
    "test_convert",
    "test_quickstart",
    "test_compatibility",
    "test_augment",
    "test_export",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the longest files first, so that no worker of pytest-xdist is left with one when the others are done."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def hooks_of_a_command() -> None:
    """Hides Orbax's closed event loops, as commands do: else they fail whichever test runs when they are collected."""
    process.ignore_closed_event_loops()


@pytest.fixture(scope="session")
def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pytest-xdist's workers have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def empty_caches(tmp_path_factory: pytest.TempPathFactory, of_all_workers: Path) -> None:
    """Compiles each program once per session: one cache for the commands' processes, one for each worker."""
    os.environ["JAXFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(of_all_workers / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="module")
def compile_quickly() -> Iterator[None]:
    """Lets XLA skip optimizations, for modules in which compiling takes far longer than running."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs python in the repository's root, on a number of forced CPU devices, with output captured as text."""

    def run_python(*arguments: object, devices: int = 1) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=environment(devices), capture_output=True, text=True, timeout=600)

    return run_python


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that must fail with a UserError; returns its one line.

    The command ("-m", MODULE, ...) runs in this process, with its eight devices.
    """

    def run_failing(*arguments: object) -> str:
        _, module, *argv = map(str, arguments)
        main = importlib.import_module(module).main
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(ROOT)
            code = run_command(main, argv)
        stdout, stderr = capsys.readouterr()
        assert (code, stdout) == (2, ""), stderr
        (line,) = stderr.splitlines()
        assert line.startswith("error: ")
        return line

    return run_failing


def run_once(run: Run, output: Path, *arguments: object) -> str:
    """Runs a command, unless another worker of pytest-xdist has; returns what it printed, which `output` keeps."""
    with FileLock(output.with_suffix(".lock")):
        if not output.exists():
            result = run(*arguments)
            assert result.returncode == 0, result.stderr
            output.write_text(result.stdout)
    return output.read_text()


@pytest.fixture(scope="session")
def small_run(run: Run, of_all_workers: Path) -> Path:
    """The workdir of three short epochs on the sample, for the commands that follow training. Not to be changed."""
    workdir = of_all_workers / "small"
    run_once(run, workdir.with_suffix(".txt"), *SMALL_RUN, "--workdir", workdir)
    return workdir


@pytest.fixture(scope="session")
def small_run_output(small_run: Path) -> str:
    """The output of the command that trained `small_run`."""
    return small_run.with_suffix(".txt").read_text()


@pytest.fixture(scope="session")
def small_run_scores(run: Run, small_run: Path) -> dict[str, Any]:
    """The scores of `small_run`'s best checkpoint, from `evaluate --json`."""
    output = small_run.with_name("small_scores.json")
    return json.loads(run_once(run, output, "-m", "jaxft.evaluate", "--workdir", small_run, "--json"))


@pytest.fixture(scope="session")
def undisturbed(run: Run, of_all_workers: Path) -> Path:
    """The workdir of TINY, which nothing interrupted. Not to be changed."""
    workdir = of_all_workers / "undisturbed"
    run_once(run, workdir.with_suffix(".txt"), *TINY, "--workdir", workdir)
    return workdir


@pytest.fixture(scope="session")
def targets_run(of_all_workers: Path) -> Path:
    """The workdir of two epochs on a class, tags and a number, from ../table/labels.csv. Not to be changed."""
    from jaxft.train import train_and_evaluate

    folder = of_all_workers / "targets"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            table = write_table(folder / "table")
            jax.config.update("jax_disable_most_optimizations", True)
            train_and_evaluate(table_config(table, optimizer__learning_rate="0.1"), folder / "run")
            jax.config.update("jax_disable_most_optimizations", False)
    return folder / "run"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window; install chromium and chromium-driver (or let Selenium fetch them)."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if path := shutil.which("chromium"):
        options.binary_location = path
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()
