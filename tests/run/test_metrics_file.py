"""metrics.jsonl after interruptions, damage and failed writes."""

import json
import os
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.errors import UserError
from jaxft.run.metrics_file import ALL_KEYS, MetricsFile, read_calibration, read_lines, read_scores


def write_metrics(path: Path, last_step: int, every: int = 3) -> None:
    metrics = MetricsFile(path)
    metrics.open(0)
    for step in range(1, last_step + 1):
        metrics.write({"step": step, "split": "train", "loss": 1 / step, "accuracy": 0.0})
        if step % every == 0:
            metrics.write({"step": step, "split": "eval", "loss": 0.0, "accuracy": step / 100})
    metrics.close()


@given(last_step=st.integers(0, 10), torn=st.integers(0, 40))
def test_lines_after_the_checkpoint_are_cut(
    tmp_path_factory: pytest.TempPathFactory, last_step: int, torn: int
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    write_metrics(path, 10)
    torn_line = json.dumps({"step": 11, "split": "train", "loss": 0.5})[:torn]
    path.write_text(path.read_text() + torn_line)

    metrics = MetricsFile(path)
    assert metrics.scores == {3: 0.03, 6: 0.06, 9: 0.09}
    metrics.open(last_step)
    assert metrics.scores == {step: step / 100 for step in (3, 6, 9) if step <= last_step}
    metrics.write({"step": last_step + 1, "split": "train", "loss": 0.0, "accuracy": 0.0})
    metrics.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, last_step + 2))


def test_missing_or_damaged_lines_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, 10)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4] + lines[5:]))
    with pytest.raises(UserError, match=r"damaged in line 5 \(step 5 follows step 3\)"):
        MetricsFile(path)
    path.write_text("".join(lines[:5]))
    with pytest.raises(UserError, match=r"lacks step 5, .* the checkpoint is of step 9"):
        MetricsFile(path).open(9)
    path.write_text("".join([*lines[:4], lines[4][:20] + "\n", *lines[5:]]))
    with pytest.raises(UserError, match="damaged in line 5"):
        MetricsFile(path)
    path.unlink()
    with pytest.raises(UserError, match="lacks step 1"):
        MetricsFile(path).open(9)


def test_an_editors_line_ends_and_blank_lines_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, 10)
    rows = read_lines(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\n  \n")
    assert read_lines(path) == rows
    MetricsFile(path).open(9)
    assert read_lines(path) == [row for row in rows if row["step"] <= 9]


def test_lines_are_buffered_until_they_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Simulates a full disk by a file-size limit, which makes a write fail in the middle of a line."""
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.open(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for step in range(1, 11):
            metrics.write({"step": step, "split": "train", "accuracy": 0.0})
        with pytest.raises(OSError):
            metrics.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == 100
    assert capsys.readouterr().err.count("cannot be written") == 1
    metrics.write({"step": 11, "split": "train", "accuracy": 0.0})
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, 12))


def test_no_flipped_bit_changes_an_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In metrics.jsonl, accuracy.json decides; in accuracy.json, its checksum reports the damage."""
    path, seal = tmp_path / "metrics.jsonl", tmp_path / "accuracy.json"
    write_metrics(path, 4, every=2)
    expected = {2: 0.02, 4: 0.04}
    for file in (path, seal):
        content = file.read_bytes()
        for bit in range(0, len(content) * 8, 3):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            assert read_scores(path) == expected, bit
        file.write_bytes(content)
    assert "accuracy.json is damaged (" in capsys.readouterr().err
    path.write_bytes(path.read_bytes().replace(b"0.02", b"0.92"))
    with pytest.raises(UserError, match=r"damaged in line 3 \(accuracy 0.92 of step 2, but accuracy.json has 0.02\)"):
        MetricsFile(path)
    assert read_scores(path) == expected
    assert "until then, accuracy.json decides" in capsys.readouterr().err
    path.unlink()
    assert read_scores(path) == expected
    seal.unlink()
    assert read_scores(path) is None


def test_a_lost_evaluation_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, 7)
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "0.03" not in line))
    with pytest.raises(UserError, match="lacks the evaluation after step 3"):
        MetricsFile(path).open(7)


def test_runs_without_accuracy_json_still_work(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, 6)
    (tmp_path / "accuracy.json").unlink()
    assert read_scores(path) == {3: 0.03, 6: 0.06}
    metrics = MetricsFile(path)
    metrics.open(6)
    for row in ({"step": 7, "split": "train", "accuracy": 0.0}, {"step": 7, "split": "eval", "accuracy": 0.5}):
        metrics.write(row)
    metrics.close()
    assert json.loads((tmp_path / "accuracy.json").read_text())["accuracy"] == {"3": 0.03, "6": 0.06, "7": 0.5}
    metrics = MetricsFile(path)
    metrics.open(6)  # the checkpoint of step 7 was lost
    assert read_scores(path) == {3: 0.03, 6: 0.06}
    metrics.close()


CALIBRATION = {"tags": {"temperature": 1.5, "thresholds": [0.25, 0.5]}}


def write_validated(path: Path, last_step: int, every: int = 3) -> MetricsFile:
    """Writes rows as a run with a validation split does, whose best_metric is an error; leaves the file open."""
    metrics = MetricsFile(path)
    metrics.open(0)
    for step in range(1, last_step + 1):
        metrics.write({"step": step, "split": "train", "loss": 1 / step})
        if step % every == 0:
            metrics.calibrations[step] = {"tags": {"temperature": 1.5, "thresholds": [0.25, step / 100]}}
            metrics.write({"step": step, "split": "val", "loss": 0.5, "mae": step / 10})
            metrics.write({"step": step, "split": "eval", "loss": 0.0, "mae": 2.0, "score": -step / 10})
    return metrics


def test_a_score_decides_and_a_calibration_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_validated(path, 6).close()
    assert read_scores(path) == {3: -0.3, 6: -0.6} == MetricsFile(path).scores
    assert read_calibration(path, 3) == {"tags": {"temperature": 1.5, "thresholds": [0.25, 0.03]}}
    assert read_calibration(path, 4) == {}
    content = json.loads((tmp_path / "accuracy.json").read_text())
    assert content["accuracy"] == {"3": -0.3, "6": -0.6} and content["calibration"].keys() == {"3", "6"}


@given(end=st.integers(0, 9), last_step=st.integers(0, 6))
def test_a_validation_without_its_test_is_repeated(
    tmp_path_factory: pytest.TempPathFactory, end: int, last_step: int
) -> None:
    """Cuts the file after any row of the last epoch, as if the run was killed there; accuracy.json may be newer."""
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    write_validated(path, 6).close()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: 10 - min(end, 5)]))  # 3 steps and 2 evaluations in each of two epochs
    metrics = MetricsFile(path)
    if sum(row["split"] == "train" for row in metrics.rows) < last_step:
        return  # a checkpoint is written after its rows
    kept = metrics.open(last_step)
    evaluated = [step for step in (3, 6) if step <= last_step and step in metrics.scores]
    assert [row["step"] for row in kept if row["split"] == "val"] == evaluated
    assert [row["step"] for row in kept if row["split"] == "eval"] == evaluated
    assert [row["step"] for row in kept if row["split"] == "train"] == list(range(1, last_step + 1))
    assert read_lines(path) == kept
    if last_step == 6 and evaluated == [3]:
        metrics.calibrations[6] = CALIBRATION
        metrics.write({"step": 6, "split": "val", "loss": 0.5})
        metrics.write({"step": 6, "split": "eval", "loss": 0.5, "score": -0.6})
        assert read_calibration(path, 6) == CALIBRATION and read_scores(path) == {3: -0.3, 6: -0.6}
    metrics.close()
    assert MetricsFile(path).rows == read_lines(path)


def test_no_flipped_bit_changes_a_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, seal = tmp_path / "metrics.jsonl", tmp_path / "accuracy.json"
    write_validated(path, 3).close()
    content, expected = seal.read_bytes(), read_calibration(path, 3)
    for bit in range(0, len(content) * 8, 5):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        seal.write_bytes(flipped)
        assert read_calibration(path, 3) in ({}, expected), bit
        assert read_scores(path) == {3: -0.3}
    assert "accuracy.json is damaged (" in capsys.readouterr().err


GOOD = {"step": 1, "epoch": 1, "split": "train", "loss": 0.5, "accuracy": 0.5, "images_per_second": 9.0, "seconds": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (GOOD | {"accuracy": 2.0}, "accuracy is not between 0 and 1"),
        (GOOD | {"accuracy": float("nan")}, "accuracy is not a number"),
        (GOOD | {"accuracy": None}, "accuracy is not a number"),
        (GOOD | {"accuracy": "0.5"}, "accuracy is not a number"),
        (GOOD | {"accuracy": True}, "accuracy is not a number"),
        (GOOD | {"accuracy": 10**400}, "accuracy is not a number"),
        (GOOD | {"loss": float("inf")}, "loss is not a number"),
        (GOOD | {"score": None}, "score is not a number"),
        (
            {"step": 1, "epoch": 1, "split": "eval", "loss": 0, "images_per_second": 1, "seconds": 1},
            "it lacks accuracy",
        ),
        (GOOD | {"seconds": [1]}, "seconds is not a number"),
        (GOOD | {"step": 10**30}, "step is not a positive whole number"),
        (GOOD | {"step": 1.5}, "step is not a positive whole number"),
        (GOOD | {"step": 0}, "step is not a positive whole number"),
        (GOOD | {"epoch": "1"}, "epoch is not a positive whole number"),
        (GOOD | {"split": "test"}, "split is not train, val or eval"),
        ({"step": 1, "split": "train", "accuracy": 0.5}, "it lacks epoch"),
        ([GOOD], "it is not a JSON object"),
        (None, "it is not a JSON object"),
    ],
)
def test_rows_of_wrong_type_or_range_are_reported(tmp_path: Path, row: object, reason: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"damaged in line 1 \({reason}\); put it back, or name another --workdir"):
        read_lines(path, ALL_KEYS)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (GOOD, "step 1 follows step 1"),
        (GOOD | {"step": 2, "split": "val"}, "the evaluation of step 2 follows step 1"),
        (GOOD | {"step": 2, "split": "eval"}, "the evaluation of step 2 follows step 1"),
        (b"\xff\xfe\x00", "it is not a JSON object"),
        (b"[" * 100_000, "it is not a JSON object"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "it is not a JSON object"),
        (b'{"step": 2', "it is not a JSON object"),
    ],
)
def test_a_damaged_second_line_is_reported(tmp_path: Path, second: object, reason: str) -> None:
    path = tmp_path / "metrics.jsonl"
    content = second if isinstance(second, bytes) else json.dumps(second).encode()
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + content + b"\n")
    with pytest.raises(UserError, match=rf"damaged in line 2 \({reason}"):
        read_lines(path, ALL_KEYS)


def test_something_else_than_a_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    os.mkfifo(path)
    with pytest.raises(UserError, match="cannot be read: it is a FIFO, not a file"):
        MetricsFile(path)
