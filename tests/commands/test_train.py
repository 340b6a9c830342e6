"""Whole runs of the commands, in processes of their own."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from jaxft.data import datasets
from jaxft.pretrained.convert import read_weights
from jaxft.pretrained.weights_file import Weights, write_weights
from jaxft.training.restore import load_checkpoint
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from tests.conftest import ROOT, SMALL_RUN, Run, environment
from tests.helpers.formulations import on_x86
from tests.helpers.reference import torch, torchvision

SMALL = (
    "-m",
    "jaxft.train",
    "--config=configs/quickstart.py",
    "--config.image_size=32",
    "--config.model.pretrained=",
    "--config.model.width=8",
    "--config.batch_size=72",  # 2,000 pictures leave 56 for the last batch, too few for 8 devices of 9
    "--config.num_epochs=3",
)
SMALL_SYNC = (*SMALL, "--config.model.batch_norm=sync")


def metrics(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def same_bits(a: Any, b: Any) -> bool:
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def finished(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The workdir and the output of a run on one device that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    result = run(*SMALL_SYNC, "--workdir", workdir)
    assert result.returncode == 0, result.stderr
    return workdir, result.stdout


def test_a_run_learns_and_tells_it(finished: tuple[Path, str]) -> None:
    workdir, output = finished
    rows = metrics(workdir)
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "eval"))
    assert [row["step"] for row in train] == list(range(1, 85))
    assert [(row["step"], row["epoch"]) for row in test] == [(28, 1), (56, 2), (84, 3)]
    assert np.mean([row["loss"] for row in train[-20:]]) < np.mean([row["loss"] for row in train[:20]]) - 0.2
    assert test[-1]["accuracy"] > 0.25  # 0.1 by chance
    for row in test:
        assert f"Epoch [{row['epoch']}/3], Test Accuracy: {row['accuracy']:.2%}" in output
    assert set(rows[0]) == {"step", "epoch", "split", "loss", "accuracy", "images_per_second", "seconds"}
    assert json.loads((workdir / "config.json").read_text())["model"]["width"] == 8


def test_evaluate_gives_the_same_from_the_checkpoint_alone(run: Run, finished: tuple[Path, str]) -> None:
    workdir, _ = finished
    rows = [row for row in metrics(workdir) if row["split"] == "eval"]
    best = max(rows, key=lambda row: row["accuracy"])
    for which, row in (("best", best), ("84", rows[-1])):
        result = run("-m", "jaxft.evaluate", "--workdir", workdir, "--checkpoint", which, "--json")
        assert result.returncode == 0, result.stderr
        line = json.loads(result.stdout)
        assert (line["checkpoint"], line["pictures"]) == (row["step"], 1000)
        assert (line["accuracy"], line["loss"]) == (row["accuracy"], pytest.approx(row["loss"], rel=1e-5))
    text = run("-m", "jaxft.evaluate", "--workdir", workdir).stdout
    assert f"accuracy {best['accuracy']:.2%} ({best['accuracy'] * 1000:.0f} of 1000)" in text


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(run: Run, tmp_path: Path) -> None:
    """The loss curve with synchronised statistics, and the very counts of one checkpoint's evaluation.

    At a gentle rate, for random weights magnify float32 noise at every step; test_steps.py compares in float64.
    """
    rate = "--config.optimizer.learning_rate=0.0001"
    gentle = (*SMALL_SYNC, "--config.num_epochs=1", "--config.data.train_split=test", rate)
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
def test_a_killed_run_ends_as_if_it_had_not_been(finished: tuple[Path, str], tmp_path: Path) -> None:
    """kill -9 after each epoch's line, while its checkpoint is being written or just is."""
    for epoch in (1, 2, None):
        command = [sys.executable, *SMALL_SYNC, "--workdir", str(tmp_path / "killed")]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment(1), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout
            for line in process.stdout:
                if line.startswith(f"Epoch [{epoch}/"):
                    process.send_signal(signal.SIGKILL)
        assert process.returncode == (0 if epoch is None else -signal.SIGKILL)
    assert without_times(metrics(tmp_path / "killed")) == without_times(metrics(finished[0]))
    assert same_bits(load_checkpoint(tmp_path / "killed", "latest").state, load_checkpoint(finished[0], "latest").state)


def test_a_finished_run_has_nothing_left_to_do(run: Run, finished: tuple[Path, str]) -> None:
    before = (finished[0] / "metrics.jsonl").read_text()
    result = run(*SMALL_SYNC, "--workdir", finished[0])
    assert result.returncode == 0, result.stderr
    assert "Epoch [" not in result.stdout
    assert (finished[0] / "metrics.jsonl").read_text() == before


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


@pytest.mark.slow
def test_training_starts_from_the_pretrained_weights(run: Run, weights_file: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 all but the head and the statistics is, at the end, bit for bit what was converted."""
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
    """Every prediction on the sample, by torchvision's own transforms and network, loaded with strict=True."""
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
        (["--config.model.pretrained=README.md"], "is it complete?"),
        (["--config.data.name=sample:cats"], "jaxft ships sample:cifar10"),
        (["--config.data.eval_split=validation"], "has no split 'validation'"),
    ],
)
def test_mistakes_are_told_in_one_line_and_nothing_is_written(
    fails: Callable[..., str], tmp_path: Path, arguments: list[str], part: str
) -> None:
    workdir = tmp_path / "workdir"
    command = ("-m", "jaxft.train", "--config=configs/quickstart.py", "--config.batch_size=64")
    assert part in fails(*command, "--workdir", workdir, *arguments, devices=8)
    assert not workdir.exists()


def test_wrong_weights_are_told_in_one_line(fails: Callable[..., str], weights_file: Path, tmp_path: Path) -> None:
    command = partial(fails, "-m", "jaxft.train", "--config=configs/quickstart.py", "--workdir", tmp_path / "workdir")
    pretrained = f"--config.model.pretrained={weights_file}"
    assert "has width 64" in command(pretrained)
    assert "holds a resnet18, not a resnet50" in command(pretrained, "--config.model.arch=resnet50")
    (tmp_path / "cut.pth").write_bytes(weights_file.read_bytes()[:100_000])
    assert "is it complete?" in command(f"--config.model.pretrained={tmp_path / 'cut.pth'}")
    assert not (tmp_path / "workdir").exists()


def test_a_workdir_of_another_config_is_refused(fails: Callable[..., str], finished: tuple[Path, str]) -> None:
    before = sorted(finished[0].rglob("*"))
    line = fails(*SMALL_SYNC, "--workdir", finished[0], "--config.seed=1", "--config.model.dtype=bfloat16")
    assert "seed is 0 there and 1 here" in line
    assert "model.dtype is 'float32' there and 'bfloat16' here" in line
    assert sorted(finished[0].rglob("*")) == before


def test_evaluate_tells_mistakes_in_one_line(
    fails: Callable[..., str], finished: tuple[Path, str], tmp_path: Path
) -> None:
    evaluate = partial(fails, "-m", "jaxft.evaluate")
    assert "there is no checkpoint in" in evaluate("--workdir", tmp_path)
    assert "no checkpoint '7'" in evaluate("--workdir", finished[0], "--checkpoint", "7")
    assert "--workdir" in evaluate()
    assert list(tmp_path.iterdir()) == []


@on_x86
def test_onednn_trains_and_evaluates_alike(run: Run, small_run: Path, tmp_path: Path) -> None:
    """With programs that cannot be kept."""
    workdir = tmp_path / "run"
    result = run(*SMALL_RUN, "--config.model.onednn=always", "--workdir", workdir)
    assert result.returncode == 0, result.stderr
    assert "with oneDNN" in result.stdout
    assert "compilation cache" not in result.stderr
    ours, theirs = ([row["loss"] for row in metrics(path)][:3] for path in (workdir, small_run))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)  # later ones differ by ReLUs that fall on the other side of 0

    scores = json.loads(run("-m", "jaxft.evaluate", "--workdir", workdir, "--checkpoint=latest", "--json").stdout)
    assert scores["loss"] == pytest.approx(metrics(workdir)[-1]["loss"], rel=1e-5)
