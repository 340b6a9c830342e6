"""Tests the values that a run derives from its data, and that a resumed run uses the stored ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import jaxft
from jaxft import evaluate, export, sheet
from jaxft.config import AUTO, FROM_WEIGHTS, auto_keys, flatten, keys_from_weights, load_config
from jaxft.data.dataset import Dataset
from jaxft.errors import UserError, run_command
from jaxft.models.build import make_model
from jaxft.pretrained.convert import to_torch
from jaxft.pretrained.torch_files import write_tensors
from jaxft.run.workdir import Workdir
from jaxft.training import auto, start
from jaxft.training.auto import resolve_auto, resolve_from_weights, resolve_options
from jaxft.training.restore import load_checkpoint
from jaxft.training.summary import print_auto
from tests.helpers.runs import ROOT

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


def write_images(folder: Path) -> None:
    """Writes 16 training and 16 test images of two classes."""
    rng = np.random.default_rng(0)
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / name / f"{i}.png")


@pytest.mark.slow
def test_a_run_stores_what_it_derived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command resumes it, and the other commands find plain numbers."""
    write_images(tmp_path)
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


FACTS = {
    "arch": "vit_b_16",
    "norm_eps": 1e-12,
    "pool": "token",
    "grid": 14,
    "image_size": 240,
    "resize": 256,
    "interpolation": "bicubic",
}
OPEN = {"model.arch": "auto", "model.pretrained": "x", "data.resize": "-1", "image_size": "0"}


def resolved(provenance: dict[str, Any] | None, **changes: str) -> dict[str, Any]:
    overrides = OPEN | {key.replace("__", "."): value for key, value in changes.items()}
    config = resolve_from_weights(load_config("cifar10", overrides), provenance)
    return {key: value for key, value in flatten(config).items() if key in FROM_WEIGHTS}


def test_what_a_config_leaves_open_comes_from_the_weights() -> None:
    expected = {f"model.{key}": FACTS[key] for key in ("arch", "norm_eps", "pool", "grid")}
    expected |= {"image_size": 240, "data.resize": 256, "data.interpolation": "bicubic"}
    assert resolved(FACTS) == expected
    assert resolved({"arch": "vit_b_16", "preprocessing": FACTS, "image_size": None}) == expected, "of another run"
    assert resolved(FACTS, image_size="480") == expected | {"image_size": 480, "data.resize": 512}
    assert resolved(FACTS, data__interpolation="lanczos")["data.interpolation"] == "lanczos"
    assert resolved(FACTS, data__resize="0")["data.resize"] == 0
    assert resolved(FACTS, model__pool="mean", model__norm_eps="1e-5")["model.pool"] == "mean", "refused later"
    unknown = {"model.norm_eps": 0, "model.pool": "auto", "model.grid": 0}
    unknown |= {"model.arch": "resnet18", "image_size": 0, "data.resize": 0, "data.interpolation": "bilinear"}
    assert resolved({"arch": "resnet18"}) == unknown
    assert resolved(None, model__arch="resnet18") == unknown
    assert resolved({"arch": "resnet18", "image_size": 64, "resize": 0})["data.resize"] == 0
    with pytest.raises(UserError, match=r"model.arch is auto, which means that of the weights; set"):
        resolved(None)
    with pytest.raises(
        UserError, match=r"'data.stored_size' is 250, less than data.resize; set it to 0 or at least 256"
    ):
        resolved(FACTS, data__stored_size="250")


def test_options_without_weights_are_the_architecture_s() -> None:
    config = load_config("cifar10", {"model.arch": "test_vit", "model.norm_eps": "1e-5"})
    model = make_model(config.model, 2)
    config = resolve_options(config, model)
    assert (config.model.norm_eps, config.model.pool, config.model.grid) == (1e-5, "token", 10)
    assert make_model(config.model, 2) == model


def test_a_resumed_run_takes_what_the_weights_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, workdir = load_config("cifar10", OPEN), Workdir(tmp_path)
    began = resolve_from_weights(config, FACTS)
    workdir.write_config(began)
    assert workdir.resolve_config(config) == began
    with pytest.raises(UserError, match=r"data.interpolation is 'bicubic' there and 'lanczos' here"):
        workdir.resolve_config(load_config("cifar10", OPEN | {"data.interpolation": "lanczos"}))
    print_auto(began, keys_from_weights(config))
    assert capsys.readouterr().out == "auto     image_size 240, data.resize 256, data.interpolation bicubic\n"
    print_auto(began, keys_from_weights(load_config("cifar10", {"data.interpolation": "bicubic"})))
    assert capsys.readouterr().out == ""


def test_a_run_from_before_these_keys_resumes(tmp_path: Path) -> None:
    config, workdir = load_config("cifar10", {}), Workdir(tmp_path)
    workdir.write_config(config)
    stored = json.loads(workdir.config.read_text())
    for key in FROM_WEIGHTS:
        section, _, leaf = key.rpartition(".")
        if leaf in ("norm_eps", "pool", "grid", "interpolation"):
            del stored[section][leaf]
    workdir.config.write_text(json.dumps(stored))
    assert workdir.resolve_config(config) == config


@pytest.mark.slow
def test_a_run_takes_its_network_from_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are loaded once; a resumed run does not need them, and a run from that run takes the same."""
    folder, photos = tmp_path / "weights", tmp_path / "photos"
    write_images(photos)
    folder.mkdir()
    weights = jaxft.load_pretrained(str(ROOT / "tests" / "fixtures" / "weights" / "width4.safetensors"))
    write_tensors(folder / "model.safetensors", to_torch(weights))
    cfg = {"input_size": [3, 16, 16], "crop_pct": 0.8, "interpolation": "bicubic", "mean": [0.1] * 3, "std": [0.9] * 3}
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": cfg}))
    loaded: list[str] = []

    def counted(source: str, arch: str | None) -> Any:
        loaded.append(source)
        return jaxft.load_pretrained(source, arch)

    monkeypatch.setattr(start, "load_pretrained", counted)
    overrides = OPEN | {"model.width": "4", "model.pretrained": str(folder), "batch_size": "16", "num_epochs": "1"}
    overrides |= {"data.name": f"folder:{photos}", "data.eval_split": "val"}
    jaxft.train_and_evaluate(load_config("cifar10", overrides), tmp_path / "run")
    assert loaded == [str(folder)]
    line = "auto     image_size 16, data.resize 20, data.interpolation bicubic\n"
    assert line in capsys.readouterr().out
    info = load_checkpoint(tmp_path / "run", "latest").info
    preprocessing = {"image_size": 16, "resize": 20, "interpolation": "bicubic", "mean": [0.1] * 3, "std": [0.9] * 3}
    assert info["preprocessing"] == preprocessing
    stored = flatten(load_config(str(tmp_path / "run" / "config.json"), {}))
    assert (stored["model.arch"], stored["data.interpolation"]) == ("resnet18", "bicubic")
    shutil.rmtree(folder)
    jaxft.train_and_evaluate(load_config("cifar10", overrides), tmp_path / "run")
    assert "resuming after step 1" in capsys.readouterr().out
    assert run_command(evaluate.main, ["--workdir", str(tmp_path / "run"), "--json"]) == 0

    second = overrides | {"model.pretrained": str(tmp_path / "run")}
    jaxft.train_and_evaluate(load_config("cifar10", second), tmp_path / "second")
    assert line in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "second", "latest").info["preprocessing"] == preprocessing
    out = str(tmp_path / "out.safetensors")
    assert run_command(export.main, ["--workdir", str(tmp_path / "run"), "--to", "flax", "--out", out]) == 0
    provenance = jaxft.load_pretrained(out).provenance
    assert resolve_from_weights(load_config("cifar10", overrides), provenance).data.resize == 20
