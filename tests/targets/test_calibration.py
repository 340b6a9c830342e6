"""Temperatures and thresholds beside SciPy, PyTorch and exhaustive search."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.targets.calibration import TEMPERATURES, fit_temperature, fit_thresholds, sigmoid, softmax


def random_logits(seed: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns overconfident or timid logits (60, 4) and labels, some missing."""
    rng = np.random.default_rng(seed)
    scale = rng.choice([0.1, 1, 8])
    if kind == "class":
        label = rng.integers(-1, 4, 60)
        return scale * (rng.normal(size=(60, 4)) + np.eye(4)[label]), label
    label = rng.integers(-1, 2, (60, 4))
    return scale * (rng.normal(size=(60, 4)) + label), label


def log_loss(logits: np.ndarray, label: np.ndarray, kind: str, temperature: float) -> float:
    known = label >= 0
    logits, label = logits[known] / temperature, label[known]
    if kind == "tags":
        return float(np.logaddexp(0, np.where(label > 0, -logits, logits)).mean())
    return float((scipy.special.logsumexp(logits, axis=1) - logits[np.arange(len(label)), label]).mean())


@pytest.mark.parametrize("kind", ["class", "tags"])
@pytest.mark.parametrize("seed", range(12))
def test_a_temperature_has_the_lowest_log_loss(seed: int, kind: str) -> None:
    logits, label = random_logits(seed, kind)
    found = fit_temperature(logits, label, kind)
    loss = log_loss(logits, label, kind, found)
    expected = scipy.optimize.minimize_scalar(
        lambda log: log_loss(logits, label, kind, np.exp(log)),
        bounds=np.log(TEMPERATURES),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert TEMPERATURES[0] < found < TEMPERATURES[1]
    assert found == pytest.approx(np.exp(expected.x), rel=1e-5)
    assert loss <= expected.fun + 1e-14
    step = 1e-4  # of log T: the error of a central difference is about its square
    slope = [log_loss(logits, label, kind, found * np.exp(sign * step)) for sign in (1, -1)]
    assert (slope[0] - slope[1]) / (2 * step) == pytest.approx(0, abs=1e-8)
    known = (label >= 0) if kind == "class" else (label >= 0).any(1)
    assert fit_temperature(logits[known], label[known], kind) == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("kind", ["class", "tags"])
def test_a_temperature_equals_torchs(kind: str) -> None:
    logits, label = random_logits(2, kind)
    known = label >= 0
    inputs, target = torch.tensor(logits[known]), torch.tensor(label[known])
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_temperature], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        scaled = inputs / log_temperature.exp()
        if kind == "class":
            loss = torch.nn.functional.cross_entropy(scaled, target)
        else:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(scaled, target.double())
        loss.backward()
        return loss

    optimiser.step(closure)
    assert fit_temperature(logits, label, kind) == pytest.approx(float(log_temperature.detach().exp()), rel=1e-6)


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["class", "tags"]), st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
def test_a_temperature_never_raises_the_log_loss(seed: int, kind: str, scale: float) -> None:
    rng = np.random.default_rng(seed)
    logits = scale * np.round(rng.standard_t(1, (5, 3)), 1)
    label = rng.integers(-1, 3, 5) if kind == "class" else rng.integers(-1, 2, (5, 3))
    found = fit_temperature(logits, label, kind)
    assert TEMPERATURES[0] <= found <= TEMPERATURES[1]
    if (label >= 0).any():
        grid = np.geomspace(*TEMPERATURES, 50)
        losses = [log_loss(logits, label, kind, other) for other in grid]
        loss = log_loss(logits, label, kind, found)
        assert loss <= log_loss(logits, label, kind, 1.0) * (1 + 1e-12) + 1e-15
        if found != 1 or losses[0] > min(losses) * (1 + 1e-9):  # otherwise the lowest may be beyond the bound
            assert loss <= min(losses) * (1 + 1e-12) + 1e-15


def test_temperatures_of_degenerate_labels() -> None:
    logits, label = 3 * np.eye(4), np.arange(4)
    assert fit_temperature(logits, label, "class") == 1  # all right: the lower, the better
    assert fit_temperature(logits, (label + 1) % 4, "class") == TEMPERATURES[1]  # all wrong
    assert fit_temperature(1e5 * logits, label, "class") == 1  # has a loss of 0 already
    assert fit_temperature(np.ones((4, 4)), label, "class") == 1  # does not depend on it
    assert fit_temperature(np.zeros((4, 4)), np.ones((4, 4), int), "tags") == 1
    assert fit_temperature(logits, np.full(4, -1), "class") == 1
    assert fit_temperature(np.zeros((0, 4)), np.zeros((0, 4), int), "tags") == 1
    with pytest.raises(ValueError, match="1 of 16 logits are not finite"):
        fit_temperature(np.where(logits == logits[0, 0], np.nan, 0)[[0, 1, 1, 1]][:, [0, 2, 2, 2]], label, "class")


def test_probabilities_equal_scipys() -> None:
    logits = np.random.default_rng(0).normal(0, 300, (20, 5))
    assert softmax(logits) == pytest.approx(scipy.special.softmax(logits, axis=1), rel=1e-12)
    assert sigmoid(logits) == pytest.approx(scipy.special.expit(logits), rel=1e-12)
    assert softmax(np.array([[1e4, -1e4]])).tolist() == [[1, 0]]


def f1(probability: np.ndarray, positive: np.ndarray, threshold: float) -> float:
    predicted = probability >= threshold
    return 2 * (predicted & positive).sum() / max(predicted.sum() + positive.sum(), 1)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 10), st.integers(-1, 1)), max_size=12))
def test_a_threshold_has_the_highest_f1(cells: list[tuple[int, int]]) -> None:
    probability, label = np.array([p / 10 for p, _ in cells]), np.array([label for _, label in cells], int)
    (found,) = fit_thresholds(probability[:, None], label[:, None])
    known = label >= 0
    probability, positive = probability[known], label[known] == 1
    if positive.all() or not positive.any():
        assert found == 0.5
        return
    ascending = np.unique(probability)
    candidates = [(low + high) / 2 for low, high in zip([0, *ascending[:-1]], ascending, strict=True)]
    scores = [f1(probability, positive, threshold) for threshold in candidates]
    best = [threshold for threshold, score in zip(candidates, scores, strict=True) if score == max(scores)]
    assert f1(probability, positive, found) == max(scores)
    assert max(scores) >= max(f1(probability, positive, threshold) for threshold in np.linspace(0, 1, 41))
    assert abs(found - 0.5) == pytest.approx(min(abs(threshold - 0.5) for threshold in best), abs=1e-15)


def test_each_tag_has_its_own_threshold() -> None:
    probabilities = np.array([[0.9, 0.2, 0.5, 0.3], [0.8, 0.1, 0.5, 0.7], [0.1, 0.3, 0.5, 0.6]])
    label = np.array([[1, 1, 1, 0], [1, 0, 1, 1], [0, 1, 1, -1]])
    assert fit_thresholds(probabilities, label) == pytest.approx([0.45, 0.15, 0.5, 0.5])
    with pytest.raises(ValueError, match="not finite"):
        fit_thresholds(np.full((1, 1), np.nan), np.ones((1, 1), int))


def test_a_threshold_lies_between_neighbouring_floats() -> None:
    low = 0.3
    high = float(np.nextafter(low, 1))
    assert fit_thresholds(np.array([[low], [high]]), np.array([[0], [1]])) == [high]
