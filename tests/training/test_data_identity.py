"""A run recognises its images by their content: their folder may move, the images may not change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxft
from jaxft import evaluate, train
from jaxft.data import datasets
from jaxft.data.identity import check_data, data_info
from jaxft.errors import UserError, run_command
from tests.helpers.runs import ROOT

RUN = {
    "model.pretrained": "",
    "model.width": "2",
    "image_size": "8",
    "batch_size": "8",
    "data.eval_split": "val",
    "optimizer.schedule": "constant",
    "optimizer.freeze": "backbone",  # compiles faster
    "augment.flip": "False",
    "note": "",
}


pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos` and `run`, the workdir of an epoch that was trained there with a relative path."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("cat", "dog"):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / split / name / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command(folder, "folder:photos", 1) == 0
    return folder


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained` in another place."""
    return shutil.copytree(trained, tmp_path / "copy")


def command(folder: Path, name: str, num_epochs: int) -> int:
    keys = RUN | {"data.name": name, "num_epochs": str(num_epochs)}
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    config = str(ROOT / "configs" / "quickstart.py")
    return run_command(train.main, ["--config", config, "--workdir", str(folder / "run"), *overrides])


def test_a_relative_path_is_found_from_elsewhere(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(evaluate.main, ["--workdir", str(trained / "run")]) == 0
    assert " of 8)" in capsys.readouterr().out


def test_evaluation_uses_the_folder_that_it_is_given(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier = jaxft.load(home / "run")
    expected = classifier.evaluate().predictions
    found = classifier.evaluate(str(home / "photos")).predictions
    np.testing.assert_array_equal(found.confidence, expected.confidence)
    assert "images instead of" not in capsys.readouterr().err
    (home / "photos" / "val" / "cat" / "0.png").unlink()
    assert len(classifier.evaluate(f"folder:{home / 'photos'}").predictions.label) == 7
    assert "now cat has 3 images instead of 4" in capsys.readouterr().err
    with pytest.raises(UserError, match="has no folder 'val', on which the run was tested"):
        classifier.evaluate(str(home / "photos" / "val"))
    with pytest.raises(UserError, match=r"there is no folder /nowhere; .* --data_dir DIR"):
        classifier.evaluate("/nowhere")


def test_a_run_resumes_with_its_images_in_another_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "photos").rename(home / "moved photos")
    assert command(home, f"folder:{home / 'moved photos'}", 2) == 0
    assert "resuming after step 2" in capsys.readouterr().out
    assert json.loads((home / "run" / "config.json").read_text())["data"]["name"] == f"folder:{home / 'moved photos'}"
    assert len(jaxft.load(home / "run").evaluate().predictions.label) == 8


def replace_image(photos: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(photos / "train" / "cat" / "3.png")


def change_label(photos: Path) -> None:
    (photos / "train" / "cat" / "3.png").rename(photos / "train" / "dog" / "8.png")


def add_class(photos: Path) -> None:
    shutil.copytree(photos / "train" / "cat", photos / "train" / "owl")


def rename_class(photos: Path) -> None:
    for split in ("train", "val"):
        (photos / split / "dog").rename(photos / split / "wolf")


def change_test_image(photos: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(photos / "val" / "dog" / "1.png")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (replace_image, "began with other training images: now cat has other images; put them back"),
        (change_label, "now cat has 7 images instead of 8, dog has 9 images instead of 8"),
        (add_class, "(16 images of 2 classes, without owl)"),
        (rename_class, "(16 images of 2 classes, without wolf and with dog)"),
        (change_test_image, "began with other test images: now dog has other images"),
    ],
)
def test_changed_images_are_named(
    home: Path, change: Callable[[Path], None], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(home / "photos")
    before = (home / "run" / "metrics.jsonl").read_bytes()
    assert command(home, f"folder:{home / 'photos'}", 2) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line
    assert (home / "run" / "metrics.jsonl").read_bytes() == before


def test_another_kind_of_data_is_refused_at_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(home, "sample:cifar10", 2) == 2
    assert "data.name is 'folder:photos' there and 'sample:cifar10' here" in capsys.readouterr().err


def test_checkpoints_without_identity_are_compared_by_number_and_classes() -> None:
    """As version 0.1 wrote them."""
    config = jaxft.load_config("quickstart", {"data.name": "folder:a"})
    splits = datasets.load("sample:cifar10", "train"), datasets.load("sample:cifar10", "test")
    names = list(splits[0].class_names)
    info = {"train_size": 2000, "class_names": names, "config": config.to_dict()}
    check_data(config.data.name, info, splits, Path("run"))
    check_data(config.data.name, info | {"data": data_info(*splits)}, splits, Path("run"))
    with pytest.raises(UserError, match=r"began with other training data \(1,999 images instead of 2,000\)"):
        check_data(config.data.name, info | {"train_size": 1999}, splits, Path("run"))
    config.data.name = "folder:b"
    check_data(config.data.name, info | {"data": data_info(*splits)}, splits, Path("run"))
    with pytest.raises(UserError, match=r"began with data\.name=folder:a, and its checkpoints, of version 0\.1,"):
        check_data(config.data.name, info, splits, Path("run"))
