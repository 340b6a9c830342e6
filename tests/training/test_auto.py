"""Tests the values that a run derives from its data, and that a resumed run uses the stored ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxft
from jaxft import evaluate, sheet
from jaxft.config import AUTO, auto_keys, flatten, load_config
from jaxft.data.dataset import Dataset
from jaxft.errors import UserError, run_command
from jaxft.run.workdir import Workdir
from jaxft.training import auto
from jaxft.training.auto import resolve_auto
from jaxft.training.summary import print_auto

pytestmark = pytest.mark.usefixtures("compile_quickly")


def images(count: int, height: int = 32, width: int = 32) -> Dataset:
    """Returns a dataset of this many images, without their memory."""
    image = np.broadcast_to(np.uint8(0), (count, height, width, 3))
    return Dataset(image, np.zeros(count, np.int32), ("cat",))


@pytest.mark.parametrize(
    ("count", "num_epochs", "mixup"),
    [
        (1, 30, 0.0),
        (1_000, 30, 0.0),
        (2_000, 16, 0.0),
        (4_000, 8, 0.0),
        (19_999, 8, 0.0),
        (20_000, 30, 0.1),
        (50_000, 13, 0.1),
        (499_999, 8, 0.1),
        (1_281_167, 8, 0.1),
    ],
)
def test_length_and_mixup_follow_from_the_number_of_images(count: int, num_epochs: int, mixup: float) -> None:
    config = resolve_auto(load_config("auto", {}), images(count))
    assert (config.num_epochs, config.augment.mixup) == (num_epochs, mixup)
    assert config.optimizer.warmup_epochs == pytest.approx(0.1 * num_epochs)
    assert auto_keys(config) == []


@pytest.mark.parametrize(("shape", "size"), [((32, 32), 128), ((96, 96), 128), ((96, 97), 224), ((256, 256), 224)])
def test_image_size_follows_from_the_images(shape: tuple[int, int], size: int) -> None:
    assert resolve_auto(load_config("auto", {}), images(9, *shape)).image_size == size


def test_learning_rate_is_proportional_to_the_batch_size() -> None:
    rates = [
        resolve_auto(load_config("auto", {"batch_size": str(size)}), images(9)).optimizer.learning_rate
        for size in (64, 128, 1024)
    ]
    assert rates == pytest.approx([rates[0], 2 * rates[0], 16 * rates[0]])
    unknown = resolve_auto(load_config("auto", {"batch_size": "0"}), images(9))
    assert auto_keys(unknown) == ["batch_size", "optimizer.learning_rate"]


def test_values_that_are_set_stay() -> None:
    overrides = {"num_epochs": "3", "image_size": "40", "augment.mixup": "0.5", "optimizer.learning_rate": "0.7"}
    config = load_config("auto", overrides | {"optimizer.warmup_epochs": "1"})
    before = config.to_dict()
    assert resolve_auto(config, images(30_000)).to_dict() == before
    config = load_config("auto", {})
    assert resolve_auto(config, images(9)).to_dict() != config.to_dict()
    assert {key: flatten(config)[key] for key in AUTO} == AUTO | {"batch_size": 64}, "the argument has changed"


def test_a_crop_of_unknown_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"'data.resize' is 256 and image_size is 0; set both"):
        load_config("auto", {"data.resize": "256"})


def test_a_resumed_run_takes_what_it_began_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, workdir = load_config("auto", {}), Workdir(tmp_path)
    assert workdir.resolve_config(config) == config, "it has not begun"
    began = resolve_auto(config, images(500))
    workdir.write_config(began)
    resumed = workdir.resolve_config(config)
    assert resumed == began
    assert resolve_auto(resumed, images(30_000)) == began
    print_auto(resumed, auto_keys(config))
    rate = f"{auto.LEARNING_RATE:.4g}"
    assert capsys.readouterr().out == (
        f"auto     num_epochs 30, image_size 128, augment.mixup 0, optimizer.learning_rate {rate}, "
        "optimizer.warmup_epochs 3\n"
    )
    print_auto(resumed, [])
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="num_epochs is 30 there and 29 here"):
        workdir.resolve_config(load_config("auto", {"num_epochs": "29"}))


@pytest.mark.slow
def test_a_run_stores_what_it_derived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command resumes it, and the other commands find plain numbers."""
    rng = np.random.default_rng(0)
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    monkeypatch.setattr(auto, "SMALL_IMAGE_SIZE", 16)
    monkeypatch.setattr(auto, "EPOCHS", (2, 2))
    tiny = {"model.arch": "resnet18", "model.width": "4", "model.pretrained": "", "batch_size": "16"}
    overrides = tiny | {"data.name": f"folder:{tmp_path}", "optimizer.fit_head": "no", "augment.crop_area": "1"}
    config, workdir = load_config("auto", overrides), tmp_path / "run"
    state = jaxft.train_and_evaluate(config, workdir)
    derived = {"num_epochs": 2, "image_size": 16, "augment.mixup": 0, "optimizer.learning_rate": auto.LEARNING_RATE / 4}
    stored = flatten(load_config(str(workdir / "config.json"), {}))
    assert {key: stored[key] for key in derived} == derived
    assert int(state.step) == 2
    line = (
        f"auto     num_epochs 2, image_size 16, augment.mixup 0, optimizer.learning_rate {auto.LEARNING_RATE / 4:.4g}"
    )
    assert line in capsys.readouterr().out

    monkeypatch.undo()  # a later version may have another rule: a run continues with its stored values
    jaxft.train_and_evaluate(config, workdir)
    output = capsys.readouterr().out
    assert "resuming after step 2" in output
    assert line in output
    with pytest.raises(UserError, match="num_epochs is 2 there and 3 here"):
        jaxft.train_and_evaluate(load_config("auto", overrides | {"num_epochs": "3"}), workdir)
    assert run_command(evaluate.main, ["--workdir", str(workdir), "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["accuracy"] <= 1


def test_a_sheet_has_the_derived_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "SMALL_IMAGE_SIZE", 16)
    arguments = ["--config", "auto", "--config.data.name=sample:cifar10", "--out", str(tmp_path / "sheet.png")]
    assert run_command(sheet.main, arguments) == 0
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (9 * (16 + 4), 8 * (16 + 4))
