"""TensorBoard's event files, read as TensorBoard reads them and compared with metrics.jsonl."""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxft.config import default_config
from jaxft.errors import UserError
from jaxft.run import trackers
from jaxft.run.trackers import Trackers, check_trackers
from jaxft.run.workdir import Workdir
from tests.helpers.runs import TINY, Run, metrics, started, wait_for_steps


def events(folder: Path) -> Iterator[Event]:
    """Yields the Events of all files; a TFRecord is a length, its checksum, the Event and its checksum."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Returns values by tag and step; a restart discards those at its step and later."""
    found: dict[tuple[str, int], float] = {}
    for event in events(folder):
        if event.HasField("session_log") and event.session_log.status == event.session_log.START:
            found = {(tag, step): value for (tag, step), value in found.items() if step < event.step}
        for value in event.summary.value:
            assert (value.tag, event.step) not in found
            found[value.tag, event.step] = value.simple_value
    return found


@pytest.mark.slow
def test_tensorboard_has_each_metrics_line_once_after_a_kill(run: Run, tmp_path: Path) -> None:
    command = (*TINY, "--config.log.tensorboard=True", "--workdir", tmp_path / "run")
    with started(*command) as process:
        wait_for_steps(process, tmp_path / "run", 18)
        process.kill()
    result = run(*command)
    assert result.returncode == 0, result.stderr
    rows = metrics(tmp_path / "run")
    found = scalars(tmp_path / "run" / "tensorboard")
    keys = ("loss", "accuracy", "images_per_second")
    assert set(found) == {(f"{row['split']}/{key}", row["step"]) for row in rows for key in keys}
    for row in rows:
        assert found[f"{row['split']}/loss", row["step"]] == pytest.approx(row["loss"], rel=1e-6)


def test_tensorboard_has_the_values_of_the_restarted_run(tmp_path: Path) -> None:
    config = default_config()
    config.log.tensorboard = True
    rows: list[dict[str, Any]] = []
    for first in (1, 3):  # again from step 3 on
        rows = rows[: first - 1]
        board = Trackers(config, Workdir(tmp_path), rows)
        for step in range(first, 5):
            row = {"loss": step / 2, "accuracy": first / 8, "images_per_second": 9.0}
            rows.append(row | {"step": step, "split": "train", "epoch": 1})
            board.write(rows[-1])
        board.close()
    found = scalars(tmp_path / "tensorboard")
    assert [found["train/loss", step] for step in range(1, 5)] == [0.5, 1, 1.5, 2]
    assert [found["train/accuracy", step] for step in range(1, 5)] == [1 / 8, 1 / 8, 3 / 8, 3 / 8]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"loss", "accuracy", "images_per_second"}),
        ({"best_metric": "mAP"}, {"loss", "accuracy", "images_per_second", "mAP"}),
        ({"targets": "tags:tags"}, {"loss", "accuracy", "images_per_second", "mAP", "f1_macro"}),
    ],
)
def test_tensorboard_has_the_chosen_metric_of_a_class_and_all_of_other_targets(
    tmp_path: Path, changes: dict[str, str], expected: set[str]
) -> None:
    config = default_config()
    config.log.tensorboard = True
    config.update(changes)
    row = {"loss": 1.0, "accuracy": 0.5, "mAP": 0.25, "f1_macro": 0.125, "score": 0.25, "images_per_second": 9.0}
    board = Trackers(config, Workdir(tmp_path), [])
    board.write({"step": 7, "epoch": 2, "split": "val", **row, "seconds": 0.5})
    board.close()
    assert scalars(tmp_path / "tensorboard") == {(f"val/{key}", 7): row[key] for key in expected}


@pytest.mark.parametrize("damage", [Path.touch, os.mkfifo, lambda path: path.symlink_to(path.name)])
def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    config = default_config()
    config.log.tensorboard = True
    damage(tmp_path / "tensorboard")
    with pytest.raises(UserError, match=f"{tmp_path}/tensorboard cannot be written: .*log.tensorboard=False"):
        Trackers(config, Workdir(tmp_path), [])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = default_config()
    check_trackers(config.log)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    check_trackers(config.log)
    config.log.wandb = "flowers"
    with pytest.raises(UserError, match=r"log\.wandb needs wandb: pip install wandb"):
        check_trackers(config.log)
    config.log.tensorboard = True
    with pytest.raises(UserError, match=r"log\.tensorboard needs tensorboardX: pip install 'jaxft\[tensorboard\]'"):
        check_trackers(config.log)
