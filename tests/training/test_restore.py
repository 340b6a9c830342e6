"""Loads checkpoints while a run replaces them, and takes the weights of another run."""

import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxft.config import load_config
from jaxft.errors import UserError
from jaxft.models.build import make_model
from jaxft.models.partition import make_policy
from jaxft.run.checkpoint_reader import CheckpointReader, DamagedCheckpointError
from jaxft.run.metrics_file import MetricsFile
from jaxft.run.workdir import Workdir
from jaxft.targets.classification import ClassTarget
from jaxft.training.optimizer import make_optimizer
from jaxft.training.restore import is_workdir, load_checkpoint, load_weights
from jaxft.training.start import check_not_trained, initial_state
from jaxft.training.state import TrainState
from tests.helpers.runs import ROOT, TINY, Run, assert_same_run, same_bits

FINISHED = ROOT / "tests" / "fixtures" / "workdirs" / "finished"
INTERRUPTED = ROOT / "tests" / "fixtures" / "workdirs" / "interrupted"


@pytest.mark.parametrize("times", [1, 3])
def test_a_checkpoint_that_training_replaces_is_looked_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Removes the checkpoint that is about to be read, and puts it back under the same name or none."""
    workdir = shutil.copytree(FINISHED, tmp_path / "run")
    (checkpoint,) = (workdir / "checkpoints").iterdir()
    restore, calls = CheckpointReader.restore, []

    def interrupted(self: CheckpointReader, step: int, abstract_state: TrainState) -> TrainState:
        calls.append(step)
        if len(calls) <= times:
            (checkpoint / "info" / "metadata").touch()
            raise DamagedCheckpointError("removed meanwhile", "")
        return restore(self, step, abstract_state)

    monkeypatch.setattr(CheckpointReader, "restore", interrupted)
    assert load_checkpoint(workdir, "best").step == int(checkpoint.name)
    assert len(calls) == times + 1


def test_a_damaged_checkpoint_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir = shutil.copytree(FINISHED, tmp_path / "run")
    (checkpoint,) = (workdir / "checkpoints").iterdir()
    (checkpoint / "info" / "metadata").write_text("[]")
    info, calls = CheckpointReader.info, []

    def counted(self: CheckpointReader, step: int) -> dict[str, Any]:
        calls.append(step)
        return info(self, step)

    monkeypatch.setattr(CheckpointReader, "info", counted)
    with pytest.raises(DamagedCheckpointError, match="is damaged"):
        load_checkpoint(workdir, "latest")
    assert len(calls) == 1
    with pytest.raises(UserError, match=r"^model.pretrained: .* is damaged .*; resume that run with .*newest_good, or"):
        load_weights(str(workdir), "resnet18")


def begin(source: Path | str, class_names: tuple[str, ...], **changes: str) -> tuple[TrainState, dict[str, Any]]:
    """Returns the first state of a run of the fixtures' network whose model.pretrained is `source`."""
    overrides = {"model.width": "4", "model.pretrained": str(source), "image_size": "16"} | changes
    config = load_config(str(ROOT / "configs" / "quickstart.py"), overrides)
    model = make_model(config.model, len(class_names))
    policy, tx = make_policy(config, model, 1), make_optimizer(config.optimizer, 1, 1, model.parts)
    targets = (ClassTarget(ClassTarget().field._replace(names=class_names)),)
    return initial_state(config, model, policy, tx, targets)


def test_a_run_starts_from_the_best_checkpoint_of_another() -> None:
    checkpoint = load_checkpoint(FINISHED, "best")
    classes = tuple(checkpoint.info["class_names"])
    expected = jax.device_get(checkpoint.state.variables())

    state, provenance = begin(FINISHED, classes)
    assert same_bits({"params": state.params, "batch_stats": state.batch_stats}, expected)
    assert (int(state.step), provenance["head"]) == (0, "kept")
    assert f"checkpoint {checkpoint.step} (best, accuracy " in provenance["source"]
    assert str(FINISHED) in provenance["source"]

    state, provenance = begin(FINISHED, tuple(reversed(classes)))
    params, old = dict(state.params), dict(expected["params"])
    assert provenance["head"] == "new"
    assert not same_bits(params.pop("fc"), old.pop("fc"))
    assert same_bits(params, old)


def test_a_run_that_is_not_evaluated_gives_its_latest_checkpoint(tmp_path: Path) -> None:
    workdir = shutil.copytree(INTERRUPTED, tmp_path / "my run")
    state, provenance = begin(workdir, ("cat", "dog"), **{"model.width": "2"})
    assert state.params["fc"]["bias"].shape == (2,)
    assert provenance["source"] == f"checkpoint 9 (latest) of {workdir}"


def test_weights_of_an_unsuitable_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a run of a resnet18, not a resnet50; set --config.model.arch=resnet18"):
        begin(FINISHED, ("cat", "dog"), **{"model.arch": "resnet50"})
    with pytest.raises(UserError, match=r"has width 4; set --config.model.width=4"):
        begin(FINISHED, ("cat", "dog"), **{"model.width": "8"})
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"there is no checkpoint in .*, or name another --config.model.pretrained"):
        begin(tmp_path, ("cat", "dog"))


def test_a_folder_with_files_of_a_run_is_a_workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    sources = (
        "~/run",
        str(tmp_path / "run"),
        "gs://bucket/run",
        str(tmp_path),
        "resnet18",
        "https://x.org/a.pth",
        "\0",
    )
    assert [is_workdir(source) for source in sources] == [True, True, True, False, False, False, False]
    (tmp_path / "metrics.jsonl").touch()
    assert is_workdir(str(tmp_path))


def test_a_run_without_its_checkpoints_is_not_trained_again(tmp_path: Path) -> None:
    workdir = Workdir(shutil.copytree(FINISHED, tmp_path / "run"))
    message = (
        r"has metrics up to step 75 but no checkpoint; put checkpoints/ back, name another --workdir, or remove metr"
    )
    for path in workdir.checkpoints.iterdir():
        shutil.rmtree(path)
    for _ in ("empty", "missing"):
        with pytest.raises(UserError, match=message):
            check_not_trained(workdir, MetricsFile(workdir.metrics))
        shutil.rmtree(workdir.checkpoints, ignore_errors=True)
    workdir.metrics.unlink()
    check_not_trained(workdir, MetricsFile(workdir.metrics))


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    """It leaves an empty folder, or after an evaluation a partial checkpoint; a bucket has no empty folders."""
    path = tmp_path / "metrics.jsonl"
    row = '{"step": 1, "split": "%s", "accuracy": 0.5}\n'
    path.write_text(row % "train")
    (tmp_path / "checkpoints").mkdir()
    check_not_trained(Workdir(tmp_path), MetricsFile(path))
    path.write_text(row % "train" + row % "eval")
    (tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir()
    check_not_trained(Workdir(tmp_path), MetricsFile(path))
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="has metrics up to step 1 but no checkpoint"):
        check_not_trained(Workdir(tmp_path), MetricsFile(path))
    (tmp_path / ".url").write_text("gs://bucket/run")
    check_not_trained(Workdir(tmp_path), MetricsFile(path))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_more_epochs_end_like_a_run_that_began_with_them(run: Run, tmp_path: Path, schedule: str) -> None:
    command = (*TINY, f"--config.optimizer.schedule={schedule}", "--config.optimizer.step_epochs=1")
    for folder, epochs in (("raised", 1), ("raised", 2), ("at once", 2)):
        result = run(*command, f"--config.num_epochs={epochs}", "--workdir", tmp_path / folder)
        assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "raised", tmp_path / "at once")
    configs = [(tmp_path / folder / "config.json").read_bytes() for folder in ("raised", "at once")]
    assert configs[0] == configs[1]
