"""metrics.jsonl after interruptions, and summaries of predictions."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from jaxft.targets.classification import Predictions, evaluation_summary, reliability, wilson_interval
from jaxft.targets.metrics import CALIBRATION_BINS


@given(st.integers(1, 20_000), st.floats(0, 1))
def test_the_wilson_interval_equals_scipys(num_images: int, share: float) -> None:
    correct = round(share * num_images)
    expected = scipy.stats.binomtest(correct, num_images).proportion_ci(0.95, "wilson")
    low, high = wilson_interval(correct, num_images)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low < high <= 1


def random_predictions(num_classes: int, num_images: int) -> tuple[Predictions, np.ndarray]:
    """Returns predictions and their probabilities (num_images, num_classes); no image has the last class."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (num_images, num_classes))
    label = rng.integers(0, num_classes - 1, num_images).astype(np.int32)
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = np.argsort(-probability, axis=1)
    rank = (order == label[:, None]).argmax(1)
    loss = -np.log(probability[np.arange(num_images), label])
    return Predictions(label, order[:, 0], probability.max(1), rank, loss), probability


def test_the_summary_equals_counts_by_hand() -> None:
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
    assert reliability(predictions).num_images.sum() == 500
    json.dumps(summary)


def test_full_confidence_is_calibrated_only_if_always_right() -> None:
    always = np.ones(4)
    predictions = Predictions(np.arange(4), np.arange(4), always, np.zeros(4, int), np.zeros(4))
    assert reliability(predictions).error == 0
    assert reliability(dataclasses.replace(predictions, rank=np.ones(4, int))).error == 1
    assert evaluation_summary(predictions, ["a", "b", "c", "d"])["top_k_accuracy"] == {}
