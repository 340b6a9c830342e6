"""A wheel, built from an sdist and installed where nothing else of the project is."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT

NEEDED = ("jaxft", "configs", "pyproject.toml", "README.md", "LICENSE")
BUILD_SDIST = "import setuptools.build_meta as backend; backend.build_sdist('dist')"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel from a copy, because setuptools would leave files in the working tree."""
    source = tmp_path_factory.mktemp("source")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD_SDIST], cwd=source, check=True, stdout=subprocess.DEVNULL)
    (sdist,) = (source / "dist").glob("*.tar.gz")
    unpacked = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (project,) = unpacked.iterdir()
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", source / "dist")
    subprocess.run([sys.executable, "-m", "pip", "wheel", project, *options], check=True)
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bin_dir(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns bin/ of an environment with this wheel and, by a .pth file, the tests' dependencies.

    Python does not read .pth files in that folder of dependencies, so the editable jaxft is not found.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies))
    options = ("--no-deps", "--no-index", "--quiet")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, wheel], check=True)
    return python.parent


def run(folder: Path, *command: object) -> str:
    """Runs a command in `folder` and returns what it prints; it must succeed."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS")}
    env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # compiling takes longer than running
    result = subprocess.run([*map(str, command)], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_listed_packages_are_the_folders_with_modules() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "jaxft").rglob("*.py")}
    packages = {".".join(folder.parts) for folder in folders}
    assert settings["packages"] == sorted(packages | {"jaxft.configs"})
    assert settings["package-dir"] == {"jaxft.configs": "configs"}


def test_the_wheel_holds_all_files_and_names_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())
    files = [path for path in (ROOT / "jaxft").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = {path.relative_to(ROOT).as_posix() for path in files if path.name != "README.md"}
    expected |= {f"jaxft/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert {name for name in names if not name.endswith("README.md")} == expected
    headers = HeaderParser().parsestr(metadata)
    assert (headers["Name"], headers["License-Expression"]) == ("jaxft", "Apache-2.0")
    assert headers["Author"] == "The jaxft authors"


def test_the_script_works_in_an_empty_folder(bin_dir: Path, tmp_path: Path) -> None:
    """Shows help and weights, trains a head on the shipped backbone by a config's name, and predicts."""
    where = "import sys, jaxft; assert jaxft.__file__.startswith(sys.prefix), jaxft.__file__"
    run(tmp_path, bin_dir / "python", "-c", where)
    jaxft = bin_dir / "jaxft"
    assert "convert" in run(tmp_path, jaxft, "--help")
    assert "resnet50.tv_in1k_v1" in run(tmp_path, jaxft, "convert", "--list")
    assert list(tmp_path.iterdir()) == []

    quick = {"num_epochs": 1, "image_size": 16, "data.train_split": "test"}
    quick |= {"optimizer.freeze": "backbone", "augment.flip": False}
    overrides = [f"--config.{key}={value}" for key, value in quick.items()]
    assert "Epoch [1/1], Test Accuracy: " in run(tmp_path, jaxft, "train", "--config", "quickstart", *overrides)
    assert (tmp_path / "runs" / "quickstart" / "report.html").exists()
    image = next((ROOT / "tests" / "fixtures" / "images").glob("*.png"))
    (line,) = run(tmp_path, jaxft, "predict", "--workdir", "runs/quickstart", image).splitlines()
    assert line.split()[0] == str(image) and line.split()[2].endswith("%")
