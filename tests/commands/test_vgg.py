"""Whole runs of a VGG: the public commands work for a second family of networks."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxft import export
from jaxft.models import vgg
from jaxft.pretrained.convert import to_torch
from jaxft.pretrained.torch_files import read_tensors
from jaxft.pretrained.weights_file import Weights, write_weights
from jaxft.training.restore import load_checkpoint
from tests.helpers.reference import torch
from tests.helpers.runs import Run, metrics

VGG = (
    *("-m", "jaxft.train", "--config=quickstart", "--config.model.arch=vgg11", "--config.image_size=32"),
    *("--config.model.width=2", "--config.model.pretrained="),
)


@pytest.mark.slow
def test_a_head_is_fitted_and_exported(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From random weights: only the head trains, under its own name."""
    head_only = (
        "--config.data.train_split=test",  # half as many images
        "--config.optimizer.freeze=backbone",
        "--config.optimizer.fit_head=only",
        "--config.augment.flip=False",
    )
    result = run(*VGG, *head_only, "--workdir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert re.search(r"hidden +116,992 +0\n", result.stdout)
    assert metrics(tmp_path / "run")[-1]["accuracy"] > 0.15  # 0.1 by chance
    export.main(["--workdir", str(tmp_path / "run"), "--to", "torchvision", "--out", str(tmp_path / "a.pth")])
    assert "warning: torchvision's vgg11 cannot load" in capsys.readouterr().err
    checkpoint = load_checkpoint(tmp_path / "run", "best")
    assert isinstance(checkpoint.model, vgg.VGG)
    exported = read_tensors(tmp_path / "a.pth")
    head = np.asarray(checkpoint.state.params["classifier"]["6"]["kernel"])
    np.testing.assert_array_equal(exported["classifier.6.weight"], head.T)


def test_too_small_images_are_refused_before_a_run_begins(fails: Callable[..., str], tmp_path: Path) -> None:
    smaller = ("--config.batch_size=48", "--config.augment.first_image_size=16")
    message = fails(*VGG, *smaller, "--workdir", tmp_path / "run")
    assert message == "error: augment.first_image_size is 16, but a vgg11 needs at least 32; set it to that or more"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_learns_resumes_and_starts_another(run: Run, tmp_path: Path) -> None:
    bn = (*VGG, "--config.model.arch=vgg11_bn", "--config.model.width=8", "--workdir", tmp_path / "run")
    for num_epochs in (1, 3):
        result = run(*bn, f"--config.num_epochs={num_epochs}", "--config.optimizer.schedule=constant")
        assert result.returncode == 0, result.stderr
    assert metrics(tmp_path / "run")[-1]["accuracy"] > 0.2
    checkpoint = load_checkpoint(tmp_path / "run", "latest")
    weights = Weights(checkpoint.state.variables(), {"arch": "vgg11_bn", "width": 8, "num_classes": 10})
    write_weights(tmp_path / "own.safetensors", weights)
    torch.save({k: torch.from_numpy(v.copy()) for k, v in to_torch(weights).items()}, tmp_path / "torch.pth")
    for source in (tmp_path / "run", tmp_path / "own.safetensors", tmp_path / "torch.pth"):
        other = (*bn[:-1], tmp_path / source.stem / "other", f"--config.model.pretrained={source}")
        result = run(*other, "--config.num_epochs=1", "--config.optimizer.freeze=stage1,stage2")
        assert result.returncode == 0, result.stderr
        assert metrics(tmp_path / source.stem / "other")[-1]["accuracy"] > 0.2
