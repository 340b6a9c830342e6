"""Tests which checkpoint is the best and when a run ends early; a run with a validation split that is killed."""

import copy
import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft import evaluate, train
from jaxft.config import default_config
from jaxft.errors import MESSAGE_LENGTH, UserError, run_command
from jaxft.run.metrics_file import MetricsFile
from jaxft.run.workdir import Workdir
from jaxft.targets import joint
from jaxft.train import train_and_evaluate
from jaxft.training.evaluation import evaluate_checkpoint
from jaxft.training.restore import load_checkpoint
from jaxft.training.selection import is_over, last_improvement
from tests.helpers.runs import assert_same_run, metrics, started, wait_for_steps
from tests.helpers.tables import table_changes, table_config

DEVICES = 8  # as this process has
PATIENCE = 2
STEPS = 3  # of an epoch

# The error falls for some epochs and then rises, at different epochs on the validation split and on the test split.
STOPS_EARLY: dict[str, Any] = {
    "seed": "0",
    "num_epochs": "10",
    "best_metric": "brightness.mae",
    "stop__patience": str(PATIENCE),
    "data__sampling": "balanced",
    "checkpoint__every_steps": "2",
    "optimizer__learning_rate": "0.05",
    "optimizer__warmup_epochs": "0",
    "optimizer__schedule": "constant",
}

pytestmark = pytest.mark.usefixtures("compile_quickly", "no_reports")

scores_by_step = st.dictionaries(st.integers(1, 100), st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 0.75]), max_size=12)


@given(scores_by_step, st.integers(0, 4), st.sampled_from([0.0, 0.25, 0.5]))
def test_a_run_ends_when_a_loop_over_its_scores_does(scores: dict[int, float], patience: int, min_delta: float) -> None:
    """The loop waits like Keras' EarlyStopping: an improvement exceeds the one before it by more than min_delta."""
    config = default_config()
    config.stop.update(patience=patience, min_delta=min_delta)
    best, waited, latest = -np.inf, 0, -1
    for i, step in enumerate(sorted(scores)):
        waited += 1
        if i == 0 or scores[step] - best > min_delta:
            best, waited, latest = scores[step], 0, i
    assert last_improvement(scores, min_delta) == latest
    assert is_over(config, scores) == (patience > 0 and waited >= patience and bool(scores))


@pytest.fixture(scope="module")
def stopped_early(table: Path) -> Path:
    """The workdir of a run that ended early and that nothing interrupted. Not to be changed."""
    train_and_evaluate(table_config(table, **STOPS_EARLY), table.parent / "stopped_early")
    return table.parent / "stopped_early"


def of_split(workdir: Path, split: str, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in metrics(workdir) if row["split"] == split}


def assert_same_selection(workdir: Path, expected: Path) -> None:
    """Compares rows, scores, calibrations and checkpoints, bit for bit."""
    assert_same_run(workdir, expected)
    assert (workdir / "accuracy.json").read_bytes() == (expected / "accuracy.json").read_bytes()
    assert Workdir(workdir).steps() == Workdir(expected).steps()
    for which in ("best", "latest"):
        ours, theirs = (load_checkpoint(path, which).info["calibration"] for path in (workdir, expected))
        assert ours == theirs and ours.keys() == {"colour", "tags"}


def test_the_validation_split_chooses_the_best_checkpoint(stopped_early: Path) -> None:
    validated, tested, scores = (
        of_split(stopped_early, *names)
        for names in (("val", "brightness.mae"), ("eval", "brightness.mae"), ("eval", "score"))
    )
    assert scores == {step: -value for step, value in validated.items()}
    best = min(validated, key=lambda step: validated[step])
    assert best != min(tested, key=lambda step: tested[step]), "the splits agree, so this test shows nothing"
    evaluation = evaluate.evaluate(stopped_early, "best")
    assert evaluation.checkpoint == best
    assert evaluation.split == "test"
    found = joint.scores(evaluation.targets, evaluation.predictions, evaluation.calibrations)
    assert found["brightness"]["mae"] == pytest.approx(tested[best], rel=1e-5)


def test_the_run_ends_after_evaluations_without_improvement(
    stopped_early: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validated = of_split(stopped_early, "val", "brightness.mae")
    best = min(validated, key=lambda step: validated[step])
    assert len(validated) < 10
    assert max(validated) == best + PATIENCE * STEPS
    assert Workdir(stopped_early).steps() == [best, max(validated) - 1, max(validated)]
    train_and_evaluate(table_config(table, **STOPS_EARLY), stopped_early)  # changes nothing
    assert len(of_split(stopped_early, "eval", "loss")) == len(validated)
    out = capsys.readouterr().out
    text = f"brightness.mae has not improved since epoch {best // STEPS} ({validated[best]:.4g})"
    assert f"Stopped early: {text}; stop.patience is 2" in out


def test_calibrations_are_those_of_the_validation_split(stopped_early: Path) -> None:
    """Fits them again to the predictions of the restored checkpoint."""
    checkpoint = load_checkpoint(stopped_early, "best")
    recorded = json.loads((stopped_early / "accuracy.json").read_text())["calibration"]
    assert checkpoint.info["calibration"] == recorded[str(checkpoint.step)]
    assert sorted(map(int, recorded)) == sorted(of_split(stopped_early, "val", "loss"))
    info = copy.deepcopy(checkpoint.info)
    info["config"]["data"]["eval_split"] = "val"
    del info["data"]
    on_val = evaluate_checkpoint(checkpoint._replace(info=info))
    fitted = joint.calibrate(on_val.targets, on_val.predictions)
    for name in ("colour", "tags"):
        assert fitted[name]["temperature"] == pytest.approx(
            recorded[str(checkpoint.step)][name]["temperature"], rel=1e-3
        )
    assert fitted["tags"]["thresholds"] == pytest.approx(info["calibration"]["tags"]["thresholds"], abs=1e-4)


def test_calibrations_of_another_run_are_refused(stopped_early: Path, tmp_path: Path) -> None:
    """Their file is intact, but its thresholds are of other tags."""
    workdir = tmp_path / "run"
    shutil.copytree(stopped_early, workdir)
    file = MetricsFile(workdir / "metrics.jsonl")
    step = Workdir(workdir).steps()[0]
    file.calibrations[step]["tags"]["thresholds"] = [0.5]
    file.write(file.rows[-1])  # an evaluation, with which accuracy.json is written
    with pytest.raises(UserError, match=r"accuracy.json is of another run \(the thresholds do not fit the tags\)"):
        load_checkpoint(workdir, str(step))


@pytest.mark.slow
@pytest.mark.parametrize("least", [(7,), (1, 5, 9, 13, 17, 20)])
def test_sigkill_at_any_moment_changes_nothing(
    least: tuple[int, ...], stopped_early: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # as in this process
    arguments = [f"--config.{key}={value}" for key, value in table_changes(table, **STOPS_EARLY).items()]
    rng, workdir = random.Random(0), tmp_path / "run"
    for steps in least:
        with started(
            "-m", "jaxft.train", "--config=quickstart", *arguments, "--workdir", workdir, devices=DEVICES
        ) as run:
            wait_for_steps(run, workdir, steps)
            time.sleep(rng.uniform(0, 0.1))
            run.send_signal(signal.SIGKILL)
    train_and_evaluate(table_config(table, **STOPS_EARLY), workdir)
    assert_same_selection(workdir, stopped_early)


@pytest.mark.parametrize("rows_lost", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_while_it_evaluated_evaluates_again(
    rows_lost: int, stopped_early: Path, table: Path, tmp_path: Path
) -> None:
    """Lacks the row of the test split, or those of both splits; accuracy.json may have the lost evaluation already."""
    workdir = tmp_path / "run"
    shutil.copytree(stopped_early, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[:-rows_lost]))
    train_and_evaluate(table_config(table, **STOPS_EARLY), workdir)
    assert_same_selection(workdir, stopped_early)


def test_an_undefined_metric_is_refused_before_training(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All validation images have the same brightness. The next command with this workdir may choose another metric."""
    rows = [line.split(",") for line in table.read_text().splitlines()]
    lines = [",".join([*row[:-1], "100" if row[1] == "val" else row[-1]]) for row in rows]
    constant = table.with_name("constant.csv")
    constant.write_text("\n".join(lines))
    changes = table_changes(constant, best_metric="brightness.r2")
    arguments = [f"--config.{key}={value}" for key, value in changes.items()]
    assert run_command(train.main, ["--config=quickstart", *arguments, "--workdir", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(
        "error: brightness.r2 is undefined on the images of 'val', for example because all have the same label"
    )
    assert "choose another best_metric or another split" in line and len(line) <= MESSAGE_LENGTH
    assert not (tmp_path / "run" / "config.json").exists()
