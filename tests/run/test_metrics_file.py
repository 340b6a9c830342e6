"""metrics.jsonl after interruptions, damage and failed writes."""

import json
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.errors import UserError
from jaxft.run.metrics_file import MetricsFile


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
    assert metrics.accuracy == {3: 0.03, 6: 0.06, 9: 0.09}
    metrics.open(last_step)
    assert metrics.accuracy == {step: step / 100 for step in (3, 6, 9) if step <= last_step}
    metrics.write({"step": last_step + 1, "split": "train", "loss": 0.0, "accuracy": 0.0})
    metrics.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, last_step + 2))


def test_missing_or_damaged_lines_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, 10)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4] + lines[5:]))
    with pytest.raises(UserError, match=r"lacks step 4, .* the checkpoint is of step 9"):
        MetricsFile(path).open(9)
    path.write_text("".join([*lines[:4], lines[4][:20] + "\n", *lines[5:]]))
    with pytest.raises(UserError, match="damaged in line 5"):
        MetricsFile(path)
    path.unlink()
    with pytest.raises(UserError, match="lacks step 1"):
        MetricsFile(path).open(9)


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
