"""metrics.jsonl after interruptions, and what predictions add up to."""

import dataclasses
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from jaxft.errors import UserError
from jaxft.run.metrics_file import MetricsFile
from jaxft.targets.classification import CALIBRATION_BINS, Predictions, calibration, evaluation_summary, wilson_interval


def write_metrics(path: Path, last_step: int, every: int = 3) -> None:
    metrics = MetricsFile(path)
    metrics.open(0)
    for step in range(1, last_step + 1):
        metrics.write(step=step, split="train", loss=1 / step, accuracy=0.0)
        if step % every == 0:
            metrics.write(step=step, split="eval", loss=0.0, accuracy=step / 100)
    metrics.close()


@given(last_step=st.integers(0, 10), torn=st.integers(0, 40))
def test_what_lies_beyond_the_checkpoint_is_cut(
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
    metrics.write(step=last_step + 1, split="train", loss=0.0, accuracy=0.0)
    metrics.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, last_step + 2))


def test_lines_that_are_lost_or_damaged_are_told(tmp_path: Path) -> None:
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


def test_lines_wait_until_they_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file-size limit stands for a full disk: the system itself refuses, in the middle of a line."""
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.open(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for step in range(1, 11):
            metrics.write(step=step, split="train", accuracy=0.0)
        with pytest.raises(OSError):
            metrics.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == 100
    assert capsys.readouterr().err.count("cannot be written") == 1
    metrics.write(step=11, split="train", accuracy=0.0)
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, 12))


@given(st.integers(1, 20_000), st.floats(0, 1))
def test_the_interval_is_scipys(pictures: int, share: float) -> None:
    correct = round(share * pictures)
    expected = scipy.stats.binomtest(correct, pictures).proportion_ci(0.95, "wilson")
    low, high = wilson_interval(correct, pictures)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low < high <= 1


def random_predictions(num_classes: int, pictures: int) -> tuple[Predictions, np.ndarray]:
    """With the probabilities (pictures, num_classes) that they come from; no picture is of the last class."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (pictures, num_classes))
    label = rng.integers(0, num_classes - 1, pictures).astype(np.int32)
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = np.argsort(-probability, axis=1)
    rank = (order == label[:, None]).argmax(1)
    loss = -np.log(probability[np.arange(pictures), label])
    return Predictions(label, order[:, 0], probability.max(1), rank, loss), probability


def test_the_summary_is_what_one_counts_by_hand() -> None:
    names = [f"class {i}" for i in range(11)]
    predictions, probability = random_predictions(11, 500)
    summary = evaluation_summary(predictions, names)
    pairs = list(zip(predictions.label.tolist(), probability.argmax(1).tolist(), strict=True))
    assert summary["confusion_matrix"] == [[pairs.count((i, j)) for j in range(11)] for i in range(11)]
    right = [truth == guess for truth, guess in pairs]
    assert (summary["pictures"], summary["correct"], summary["accuracy"]) == (500, sum(right), sum(right) / 500)
    recalls = [
        np.mean([ok for ok, (truth, _) in zip(right, pairs, strict=True) if truth == i]).item() for i in range(10)
    ]
    assert summary["per_class_accuracy"] == dict(zip(names, [*recalls, None], strict=True))
    assert summary["mean_per_class_accuracy"] == pytest.approx(np.mean(recalls))
    for k in (3, 5):
        in_top = [truth in np.argsort(row)[-k:] for (truth, _), row in zip(pairs, probability, strict=True)]
        assert summary["top_k_accuracy"][str(k)] == np.mean(in_top)

    error = 0.0
    for i in range(CALIBRATION_BINS):
        low, high = i / CALIBRATION_BINS, (i + 1) / CALIBRATION_BINS
        inside = (predictions.confidence > low) & (predictions.confidence <= high)
        if inside.any():
            error += inside.mean() * abs(np.mean(np.array(right)[inside]) - predictions.confidence[inside].mean())
    assert summary["expected_calibration_error"] == pytest.approx(error)
    assert calibration(predictions).num_images.sum() == 500
    json.dumps(summary)


def test_certainty_that_is_always_right_is_calibrated() -> None:
    always = np.ones(4)
    predictions = Predictions(np.arange(4), np.arange(4), always, np.zeros(4, int), np.zeros(4))
    assert calibration(predictions).error == 0
    assert calibration(dataclasses.replace(predictions, rank=np.ones(4, int))).error == 1
    assert evaluation_summary(predictions, ["a", "b", "c", "d"])["top_k_accuracy"] == {}
