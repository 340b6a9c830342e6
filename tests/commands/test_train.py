"""Whole runs of the commands, each in its own process."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxft.data import datasets
from jaxft.pretrained.load import read_weights
from jaxft.pretrained.weights_file import Weights, write_weights
from jaxft.training.restore import load_checkpoint
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from tests.helpers.formulations import on_x86
from tests.helpers.reference import torch, torchvision
from tests.helpers.runs import ROOT, SMALL_RUN, Run, environment, metrics, same_bits, without_times

SYNC = (*SMALL_RUN, "--config.model.batch_norm=sync")


def test_a_run_learns_and_logs_its_progress(small_run: Path, small_run_output: str) -> None:
    rows = metrics(small_run)
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "eval"))
    assert [row["step"] for row in train] == list(range(1, 85))
    assert [(row["step"], row["epoch"]) for row in test] == [(28, 1), (56, 2), (84, 3)]
    assert np.mean([row["loss"] for row in train[-20:]]) < np.mean([row["loss"] for row in train[:20]]) - 0.2
    assert test[-1]["accuracy"] > 0.25  # 0.1 by chance
    for row in test:
        assert f"Epoch [{row['epoch']}/3], Test Accuracy: {row['accuracy']:.2%}" in small_run_output
    assert set(rows[0]) == {"step", "epoch", "split", "loss", "accuracy", "images_per_second", "seconds"}
    assert json.loads((small_run / "config.json").read_text())["model"]["width"] == 8


def test_evaluate_reproduces_the_accuracy_from_the_checkpoint(
    run: Run, small_run: Path, small_run_scores: dict[str, Any]
) -> None:
    rows = [row for row in metrics(small_run) if row["split"] == "eval"]
    best = max(rows, key=lambda row: row["accuracy"])
    assert (small_run_scores["checkpoint"], small_run_scores["pictures"]) == (best["step"], 1000)
    assert small_run_scores["accuracy"] == best["accuracy"]
    assert small_run_scores["loss"] == pytest.approx(best["loss"], rel=1e-5)
    result = run("-m", "jaxft.evaluate", "--workdir", small_run, "--checkpoint=56")
    assert result.returncode == 0, result.stderr
    accuracy = next(row["accuracy"] for row in rows if row["step"] == 56)
    assert f"checkpoint 56: accuracy {accuracy:.2%} ({accuracy * 1000:.0f} of 1000), loss " in result.stdout


@pytest.mark.slow
def test_eight_devices_match_one(run: Run, tmp_path: Path) -> None:
    """Compares the losses with synchronised statistics, and the counts of one checkpoint's evaluation.

    The rate is low because random weights magnify float32 noise at every step; test_steps.py uses float64.
    """
    rate = "--config.optimizer.learning_rate=0.0001"
    gentle = (*SYNC, "--config.num_epochs=1", "--config.data.train_split=test", rate)
    for devices in (1, 8):
        result = run(*gentle, "--workdir", tmp_path / str(devices), devices=devices)
        assert result.returncode == 0, result.stderr
        assert f"{devices} x cpu" in result.stdout
    one, eight = metrics(tmp_path / "1"), metrics(tmp_path / "8")
    assert [row["step"] for row in one] == [row["step"] for row in eight]
    assert max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(one, eight, strict=True)) < 1e-3

    evaluate = ("-m", "jaxft.evaluate", "--json", "--workdir", tmp_path / "8")
    counts = [json.loads(run(*evaluate, devices=devices).stdout) for devices in (1, 3)]
    assert counts[0]["correct"] == counts[1]["correct"] == eight[-1]["accuracy"] * 1000
    assert counts[0]["pictures"] == counts[1]["pictures"] == 1000


@pytest.mark.slow
def test_a_killed_run_ends_like_an_uninterrupted_one(small_run: Path, tmp_path: Path) -> None:
    """Kills after each epoch's line, while its checkpoint is being written or just after that."""
    for epoch in (1, 2, None):
        command = [sys.executable, *SMALL_RUN, "--workdir", str(tmp_path / "killed")]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment(1), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout
            for line in process.stdout:
                if line.startswith(f"Epoch [{epoch}/"):
                    process.send_signal(signal.SIGKILL)
        assert process.returncode == (0 if epoch is None else -signal.SIGKILL)
    assert without_times(metrics(tmp_path / "killed")) == without_times(metrics(small_run))
    assert same_bits(load_checkpoint(tmp_path / "killed", "latest").state, load_checkpoint(small_run, "latest").state)


@pytest.fixture
def finished(small_run: Path, tmp_path: Path) -> Path:
    """Returns a copy of `small_run` to train in."""
    return shutil.copytree(small_run, tmp_path / "finished")


def test_a_finished_run_has_nothing_left_to_do(run: Run, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_text()
    result = run(*SMALL_RUN, "--workdir", finished)
    assert result.returncode == 0, result.stderr
    assert "Epoch [" not in result.stdout
    assert (finished / "metrics.jsonl").read_text() == before


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


@pytest.mark.slow
def test_training_starts_from_the_pretrained_weights(run: Run, weights_file: Path, tmp_path: Path) -> None:
    """With a learning rate of 0, all parameters but the head keep the bits of the converted weights."""
    weights = read_weights(weights_file)
    write_weights(tmp_path / "converted.safetensors", Weights(weights.variables, weights.provenance))
    result = run(
        "-m",
        "jaxft.train",
        "--config=configs/quickstart.py",
        "--config.num_epochs=1",
        "--config.image_size=32",
        "--config.data.name=tiny_pictures",
        "--config.data.dir=tests/fixtures/array_record",
        "--config.optimizer.learning_rate=0",
        "--config.model.width=64",
        "--config.batch_size=8",
        f"--config.model.pretrained={tmp_path / 'converted.safetensors'}",
        "--workdir",
        tmp_path / "run",
        devices=2,
    )
    assert result.returncode == 0, result.stderr
    assert "new head for 3 classes" in result.stdout
    assert weights.provenance["source_sha256"][:16] in result.stdout
    params = load_checkpoint(tmp_path / "run", "latest").state.params
    head = params.pop("fc")
    weights.variables["params"].pop("fc")
    assert same_bits(params, weights.variables["params"])
    assert head["kernel"].shape == (512, 3)


@pytest.mark.slow
def test_an_exported_run_has_the_same_accuracy_in_torchvision(run: Run, weights_file: Path, tmp_path: Path) -> None:
    """Evaluates the sample with torchvision's transforms and network, loaded with strict=True."""
    result = run(
        *("-m", "jaxft.train", "--config=configs/quickstart.py", "--config.num_epochs=1", "--config.image_size=32"),
        "--config.data.train_split=test",
        *("--config.model.width=64", f"--config.model.pretrained={weights_file}", "--workdir", tmp_path / "run"),
    )
    assert result.returncode == 0, result.stderr
    export = run("-m", "jaxft.export", "--workdir", tmp_path / "run", "--to=torchvision", "--out", tmp_path / "out.pth")
    assert export.returncode == 0, export.stderr
    line = json.loads(run("-m", "jaxft.evaluate", "--workdir", tmp_path / "run", "--json").stdout)

    model = torchvision.models.resnet18(num_classes=10)
    model.load_state_dict(torch.load(tmp_path / "out.pth"), strict=True)
    transforms = torchvision.transforms
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    sample = datasets.load("sample:cifar10", "test")
    with torch.no_grad():
        logits = model.eval()(torch.stack([normalize(Image.fromarray(image)) for image in sample.image]))
    assert int((logits.argmax(1).numpy() == sample.label).sum()) == line["correct"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--config.optimizer.learning_rat=1"], "did you mean 'optimizer.learning_rate'?"),
        (["--config.num_epochs=many"], "takes a whole number"),
        (["--config=configs/quikstart.py"], "did you mean configs/quickstart.py?"),
        (["stray"], "unknown argument 'stray'"),
        (["--config.batch_size=30"], "cannot be shared equally by 8 devices; use 24 or 32"),
        (["--config.batch_size=3"], "use 8"),
        (["--config.model.pretrained=none.pth"], "no weights file none.pth"),
        (["--config.model.pretrained=README.md"], "it is a text file"),
        (["--config.data.name=sample:cats"], "jaxft ships sample:cifar10"),
        (["--config.data.eval_split=validation"], "has no split 'validation'"),
    ],
)
def test_errors_are_reported_in_one_line_and_nothing_is_written(
    fails: Callable[..., str], tmp_path: Path, arguments: list[str], part: str
) -> None:
    workdir = tmp_path / "workdir"
    command = ("-m", "jaxft.train", "--config=configs/quickstart.py", "--config.batch_size=64")
    assert part in fails(*command, "--workdir", workdir, *arguments)
    assert not workdir.exists()


def test_wrong_weights_are_reported_in_one_line(fails: Callable[..., str], weights_file: Path, tmp_path: Path) -> None:
    arguments = ("--config=configs/quickstart.py", "--config.batch_size=64", "--workdir", tmp_path / "workdir")
    command = partial(fails, "-m", "jaxft.train", *arguments)
    pretrained = f"--config.model.pretrained={weights_file}"
    assert "has width 64" in command(pretrained)
    assert "holds a resnet18, not a resnet50" in command(pretrained, "--config.model.arch=resnet50")
    (tmp_path / "cut.pth").write_bytes(weights_file.read_bytes()[:100_000])
    assert "is it complete?" in command(f"--config.model.pretrained={tmp_path / 'cut.pth'}")
    assert not (tmp_path / "workdir").exists()


def test_a_workdir_with_another_config_is_refused(fails: Callable[..., str], finished: Path) -> None:
    before = sorted(finished.rglob("*"))
    line = fails(*SMALL_RUN, "--workdir", finished, "--config.seed=1", "--config.model.dtype=bfloat16")
    assert "seed is 0 there and 1 here" in line
    assert "model.dtype is 'float32' there and 'bfloat16' here" in line
    assert sorted(finished.rglob("*")) == before


def test_evaluate_reports_errors_in_one_line(fails: Callable[..., str], small_run: Path, tmp_path: Path) -> None:
    evaluate = partial(fails, "-m", "jaxft.evaluate")
    assert "there is no checkpoint in" in evaluate("--workdir", tmp_path)
    assert "no checkpoint '7'" in evaluate("--workdir", small_run, "--checkpoint", "7")
    assert "--workdir" in evaluate()
    assert list(tmp_path.iterdir()) == []


@on_x86
def test_onednn_trains_and_evaluates_like_xla(run: Run, small_run: Path, tmp_path: Path) -> None:
    """Its programs cannot be cached, which must cause no warning."""
    workdir = tmp_path / "run"
    result = run(*SMALL_RUN, "--config.num_epochs=1", "--config.model.onednn=always", "--workdir", workdir)
    assert result.returncode == 0, result.stderr
    assert "with oneDNN" in result.stdout
    assert "compilation cache" not in result.stderr
    ours, theirs = ([row["loss"] for row in metrics(path)][:3] for path in (workdir, small_run))
    # Later losses differ more: values near 0 fall on ReLU's other side.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)

    scores = json.loads(run("-m", "jaxft.evaluate", "--workdir", workdir, "--checkpoint=latest", "--json").stdout)
    assert scores["loss"] == pytest.approx(metrics(workdir)[-1]["loss"], rel=1e-5)
