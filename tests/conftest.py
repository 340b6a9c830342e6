"""What several test files share: paths, and commands run as a user runs them."""

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

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one is slow
hypothesis.settings.load_profile("any machine")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before jax is imported
os.environ["NPROC"] = "16"  # threads, or eight devices on few cores wait for each other for ever
os.environ["JAX_PLATFORMS"] = "cpu"

ROOT = Path(__file__).parent.parent

LONGEST = ("test_survival", "test_steps", "test_quickstart", "test_train", "test_resnet", "test_export")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process of pytest-xdist is left with one when the others are done."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


Run = Callable[..., subprocess.CompletedProcess[str]]


def environment(devices: int) -> dict[str, str]:
    """Of a process on a number of forced CPU devices."""
    return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


@pytest.fixture(scope="session")
def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pytest-xdist's workers have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, of_all_workers: Path) -> None:
    os.environ["JAXFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(of_all_workers / "compiled")  # of the commands' processes
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs python in the repository's root, on a number of forced CPU devices, with output captured as text."""

    def run_python(*arguments: object, devices: int = 1) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=environment(devices), capture_output=True, text=True, timeout=600)

    return run_python


@pytest.fixture
def fails(run: Run) -> Callable[..., str]:
    """Runs a command that must fail by the user's mistake; its one line."""

    def run_failing(*arguments: object, **options: object) -> str:
        result = run(*arguments, **options)
        assert result.returncode == 2, result.stderr
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        return line

    return run_failing


SMALL_RUN = (
    "-m",
    "jaxft.train",
    "--config=configs/quickstart.py",
    "--config.image_size=32",
    "--config.model.pretrained=",
    "--config.model.width=8",
    "--config.num_epochs=2",
    "--config.data.train_split=test",
)


@pytest.fixture(scope="session")
def small_run(run: Run, of_all_workers: Path) -> Path:
    """The workdir of two short epochs on the sample, for the commands that follow training. Not to be changed."""
    workdir = of_all_workers / "small"
    with FileLock(of_all_workers / "small.lock"):
        if not (workdir / "report.html").exists():
            result = run(*SMALL_RUN, "--workdir", workdir)
            assert result.returncode == 0, result.stderr
    return workdir


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
