"""Temperature scaling and thresholds, fitted to a validation split; float64, in NumPy on the host."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jaxft.data.fields import Field

TEMPERATURES = (0.05, 20.0)  # the lowest and the highest that is fitted
DEFAULT_THRESHOLD = 0.5


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities (N, C) of classes."""
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities (N, T) of tags."""
    small = np.exp(-np.abs(logits))  # at most 1, so that it does not overflow
    return np.where(logits >= 0, 1, small) / (1 + small)


def fit_temperature(logits: np.ndarray, label: np.ndarray, kind: str) -> float:
    """Returns the temperature whose probabilities have the lowest log loss (Guo et al. 2017).

    logits: (N, C). label: int (N,) for the kind "class", (N, C) of 0 and 1 for "tags"; negative ones are missing.
    Returns 1 if there are no labels, if no temperature is better, or if the best is below TEMPERATURES, as for
    predictions that are all right: they do not determine one. Raises ValueError if a logit is not finite.
    """
    logits, label = np.asarray(logits, np.float64), np.asarray(label)
    known = label >= 0
    logits, label = logits[known], label[known]
    if not np.isfinite(logits).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(logits))} of {logits.size} logits are not finite")
    if not logits.size:
        return 1.0
    loss = _class_loss(logits, label) if kind == "class" else _tag_loss(logits, label)
    scale = _minimise(lambda scale: loss(scale)[1:], 1 / TEMPERATURES[1], 1 / TEMPERATURES[0])
    determined = scale < 1 / TEMPERATURES[0] and loss(scale)[0] < loss(1.0)[0]
    return 1 / scale if determined else 1.0


Loss = Callable[[float], tuple[float, float, float]]  # value, slope and curvature at a scale of the logits, 1 / T


def _class_loss(logits: np.ndarray, label: np.ndarray) -> Loss:
    # Subtracting the label's logit leaves the probabilities as they are, and its log probability is -log(sum(exp)).
    logits = logits - np.take_along_axis(logits, label[:, None].astype(np.int64), axis=1)
    highest = logits.max(1, keepdims=True)

    def loss(scale: float) -> tuple[float, float, float]:
        exponentials = np.exp(scale * (logits - highest))
        total = exponentials.sum(1)
        mean = (exponentials * logits).sum(1) / total
        variance = (exponentials * (logits - mean[:, None]) ** 2).sum(1) / total
        value = np.log(total) + scale * highest[:, 0]
        return float(value.mean()), float(mean.mean()), float(variance.mean())

    return loss


def _tag_loss(logits: np.ndarray, label: np.ndarray) -> Loss:
    margin = np.where(label > 0, -logits, logits)  # the loss of a cell is log(1 + exp(scale * margin))

    def loss(scale: float) -> tuple[float, float, float]:
        wrong = sigmoid(scale * margin)
        value = np.logaddexp(0, scale * margin)
        curvature = margin**2 * wrong * (1 - wrong)
        return float(value.mean()), float((margin * wrong).mean()), float(curvature.mean())

    return loss


def _minimise(slopes: Callable[[float], tuple[float, float]], low: float, high: float) -> float:
    """Returns the minimum of a convex function in [low, high] by Newton's method, or bisection if a step leaves it.

    slopes: returns the first and second derivatives.
    """
    if slopes(low)[0] >= 0:
        return low
    if slopes(high)[0] <= 0:
        return high
    point = 1.0
    for _ in range(200):
        slope, curvature = slopes(point)
        low, high = (point, high) if slope < 0 else (low, point)
        step = -slope / curvature if curvature > 0 else np.inf
        if abs(step) <= 1e-10 * point:  # the step after it would be lost in rounding
            return float(np.clip(point + step, low, high))
        point = point + step if low < point + step < high else (low + high) / 2
    return point


def fit_thresholds(probabilities: np.ndarray, label: np.ndarray) -> list[float]:
    """Returns the threshold of the highest F1 for each tag; a tag is predicted if its probability reaches it.

    probabilities: (N, T). label: (N, T) of 0, 1 and -1 (missing). A threshold is halfway between two neighbouring
    probabilities, the lowest one halfway to 0. The one nearest 0.5 is chosen among those of equal F1. A tag without
    positive or without negative labels has 0.5. Raises ValueError if a probability is not finite.
    """
    probabilities, label = np.asarray(probabilities, np.float64), np.asarray(label)
    known = label >= 0
    if not np.isfinite(probabilities[known]).all():
        raise ValueError("there are probabilities that are not finite")
    return [_fit_threshold(probabilities[own, i], label[own, i] > 0) for i, own in enumerate(known.T)]


def _fit_threshold(probability: np.ndarray, positive: np.ndarray) -> float:
    if positive.all() or not positive.any():
        return DEFAULT_THRESHOLD
    order = np.argsort(-probability, kind="stable")
    probability, positive = probability[order], positive[order]
    last = np.append(np.flatnonzero(np.diff(probability)), len(probability) - 1)  # of each run of equal ones
    upper, lower = probability[last], np.append(probability[last[1:]], 0.0)
    f1 = 2 * positive.cumsum()[last] / (last + 1 + positive.sum())
    halfway = lower + (upper - lower) / 2
    thresholds = np.where(halfway > lower, halfway, upper)[f1 == f1.max()]  # rounded down, it would include `lower`
    return float(thresholds[np.abs(thresholds - DEFAULT_THRESHOLD).argmin()])


def check_calibrations(fields: Iterable[Field], calibrations: Any) -> None:
    """Raises ValueError if calibrations that were read from a file, {target: calibration}, do not fit the fields."""
    known = {field.name: field for field in fields if field.kind != "number"}
    if not isinstance(calibrations, dict) or not calibrations.keys() <= known.keys():
        raise ValueError("calibration is not of the run's targets")
    for name, calibration in calibrations.items():
        temperature: Any = calibration.get("temperature") if isinstance(calibration, dict) else None
        if not _is_number(temperature) or temperature <= 0:
            raise ValueError("a temperature is not a positive number")
        thresholds = calibration.get("thresholds", [])
        expected = len(known[name].names) if known[name].kind == "tags" else 0
        if not isinstance(thresholds, list) or len(thresholds) != expected or not all(map(_is_number, thresholds)):
            raise ValueError("the thresholds do not fit the tags")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
