"""Metrics by scikit-learn's definitions, with 95 % bootstrap intervals; float64, in NumPy on the host.

Each metric is computed for rows of image weights (R, N). One row of ones gives the metric itself; rows that count how
often each image was drawn give its values in bootstrap resamples, without copying or sorting the images again.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

LOWER_IS_BETTER = frozenset({"log_loss", "ece", "brier", "mae", "rmse", "loss"})
_AVERAGES = tuple(
    f"{metric}_{mean}" for metric in ("precision", "recall", "f1") for mean in ("macro", "micro", "weighted")
)
_PROBABILITIES = ("log_loss", "ece", "brier")
CLASS_METRICS = ("accuracy", "balanced_accuracy", *_AVERAGES, "auroc", "mAP", *_PROBABILITIES)
TAG_METRICS = ("mAP", "auroc", *_AVERAGES, "exact_match", "accuracy", *_PROBABILITIES)
NUMBER_METRICS = ("mae", "rmse", "r2")

CALIBRATION_BINS = 15  # as in Guo et al. 2017, https://arxiv.org/abs/1706.04599
_CHUNK = 2**22  # weights in memory at once, if that is at least _MIN_ROWS resamples
_MIN_ROWS = 32  # sorting the images once for fewer resamples would take longer than the resamples
_MOST_CELLS = 5 * 10**9  # probabilities times resamples, about 30 s on one core
_FEWEST_RESAMPLES = 100  # however many images there are
_BLOCK = 2**19  # weights that are gathered at once, so that they stay in the processor's cache
_EPSILON = float(np.finfo(np.float64).eps)

Metrics = dict[str, float | None]
Columns = dict[str, list[float | None]]
Intervals = dict[str, tuple[float, float] | None]
Weighted = dict[str, np.ndarray]  # for each row of weights: metrics (R,) or columns (R, C); NaN if undefined


# ---- metrics ----


def class_metrics(probabilities: np.ndarray, label: np.ndarray) -> Metrics:
    """Returns CLASS_METRICS of probabilities (N, C) and labels (N,), none of them missing; None if undefined.

    Macro averages are over the classes that occur among the labels or predictions, balanced_accuracy and mAP over
    those that occur among the labels. auroc is one-vs-rest, averaged over the classes that have both positive and
    negative images (scikit-learn raises an error unless all classes do); for two classes it is the binary one.
    Raises ValueError if a probability is not finite or a label is out of range.
    """
    return _once(_class_scores, CLASS_METRICS, *_check_class(probabilities, label))


def tag_metrics(probabilities: np.ndarray, label: np.ndarray, thresholds: Any) -> Metrics:
    """Returns TAG_METRICS of probabilities (N, T) and labels (N, T) of 0, 1 and -1 (missing); None if undefined.

    A tag is predicted if its probability is at least its threshold (T,). Cells without a label are left out, tag by
    tag; exact_match leaves out images with any such cell. Macro averages are over the tags with a label, mAP over those
    with a positive one, auroc over those with both. Raises ValueError if a probability is not finite.
    """
    return _once(_tag_scores, TAG_METRICS, *_check_tags(probabilities, label, thresholds))


def number_metrics(predicted: np.ndarray, value: np.ndarray) -> Metrics:
    """Returns NUMBER_METRICS of predictions (N,) and labels (N,), none of them missing; None if undefined.

    r2 is undefined if the labels do not vary. Raises ValueError if a number is not finite.
    """
    return _once(_number_scores, NUMBER_METRICS, *_check_numbers(predicted, value))


def per_class(probabilities: np.ndarray, label: np.ndarray) -> Columns:
    """Returns a value for each class of precision, recall, f1, average_precision, auroc and num_images (of labels).

    Precision, recall and F1 are None for a class that neither labels nor predictions have.
    """
    arguments = _check_class(probabilities, label)
    return _columns(_class_columns(*arguments, np.ones((1, len(arguments[1])))))


def per_tag(probabilities: np.ndarray, label: np.ndarray, thresholds: Any) -> Columns:
    """Returns a value for each tag of the same as `per_class`; num_images counts positive labels."""
    arguments = _check_tags(probabilities, label, thresholds)
    return _columns(_tag_columns(*arguments, np.ones((1, len(arguments[1])))))


# ---- bootstrap intervals ----


def class_intervals(probabilities: np.ndarray, label: np.ndarray, resamples: int = 1000, seed: int = 0) -> Intervals:
    """Returns the 95 % interval of each of CLASS_METRICS except accuracy, which has a closed form.

    They are percentiles over bootstrap resamples of the images; very large sets have fewer. A metric that is undefined
    in more than half of the resamples has None.
    """
    names = tuple(name for name in CLASS_METRICS if name != "accuracy")
    return _intervals(_class_scores, names, resamples, seed, *_check_class(probabilities, label))


def tag_intervals(
    probabilities: np.ndarray, label: np.ndarray, thresholds: Any, resamples: int = 1000, seed: int = 0
) -> Intervals:
    """Returns the 95 % interval of each of TAG_METRICS; see class_intervals. The thresholds are taken as given."""
    return _intervals(_tag_scores, TAG_METRICS, resamples, seed, *_check_tags(probabilities, label, thresholds))


def number_intervals(predicted: np.ndarray, value: np.ndarray, resamples: int = 1000, seed: int = 0) -> Intervals:
    """Returns the 95 % interval of each of NUMBER_METRICS; see class_intervals."""
    return _intervals(_number_scores, NUMBER_METRICS, resamples, seed, *_check_numbers(predicted, value))


def _once(scores: Callable[..., Weighted], names: tuple[str, ...], *arguments: np.ndarray) -> Metrics:
    num_images = len(arguments[0])
    found = scores(*arguments, np.ones((1, num_images))) if num_images else {}
    return {name: _defined(found[name][0]) if found else None for name in names}


def _columns(found: Weighted) -> Columns:
    counts: list[float | None] = [int(count) for count in found.pop("num_images")[0]]
    return {name: [_defined(value) for value in values[0]] for name, values in found.items()} | {"num_images": counts}


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _intervals(
    scores: Callable[..., Weighted], names: tuple[str, ...], resamples: int, seed: int, *arguments: np.ndarray
) -> Intervals:
    num_images = len(arguments[0])
    if not num_images:
        return dict.fromkeys(names)
    resamples = min(resamples, max(_MOST_CELLS // arguments[0].size, _FEWEST_RESAMPLES))
    chunks = [scores(*arguments, weights) for weights in _resample(num_images, resamples, seed)]
    intervals: Intervals = {}
    for name in names:
        values = np.concatenate([chunk[name] for chunk in chunks])
        values = values[~np.isnan(values)]
        low, high = np.percentile(values, (2.5, 97.5)) if 2 * len(values) >= resamples else (np.nan, np.nan)
        intervals[name] = None if np.isnan(low) else (float(low), float(high))
    return intervals


def _resample(num_images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields how often each image was drawn in resamples of num_images draws, float64 (R, N) in chunks of rows."""
    rng = np.random.default_rng(seed)
    chunk = max(_CHUNK // num_images, _MIN_ROWS)
    for start in range(0, resamples, chunk):
        draws = rng.integers(num_images, size=(min(chunk, resamples - start), num_images))
        yield np.stack([np.bincount(row, minlength=num_images) for row in draws]).astype(np.float64)


# ---- input ----


def _check_class(probabilities: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    probabilities, label = np.asarray(probabilities, np.float64), np.asarray(label, np.int64)
    _check_finite(probabilities)
    if label.shape != probabilities.shape[:1]:
        raise ValueError(f"labels of shape {label.shape} do not fit probabilities of shape {probabilities.shape}")
    if len(label) and not 0 <= label.min() <= label.max() < probabilities.shape[1]:
        raise ValueError(f"labels are {label.min()} to {label.max()}, expected 0 to {probabilities.shape[1] - 1}")
    return probabilities, label


def _check_tags(
    probabilities: np.ndarray, label: np.ndarray, thresholds: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the probabilities and labels of the images that have a label, and whether each tag is predicted."""
    probabilities, label = np.asarray(probabilities, np.float64), np.asarray(label, np.int64)
    if label.shape != probabilities.shape:
        raise ValueError(f"labels of shape {label.shape} do not fit probabilities of shape {probabilities.shape}")
    kept = (label >= 0).any(1)
    probabilities, label = probabilities[kept], label[kept]
    _check_finite(probabilities)
    return probabilities, label, probabilities >= np.asarray(thresholds, np.float64)


def _check_numbers(predicted: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    predicted, value = np.asarray(predicted, np.float64), np.asarray(value, np.float64)
    if predicted.shape != value.shape:
        raise ValueError(f"labels of shape {value.shape} do not fit predictions of shape {predicted.shape}")
    _check_finite(predicted)
    _check_finite(value)
    return predicted, value


def _check_finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(values))} of {values.size} values are not finite")


# ---- metrics of weighted images ----


def _class_scores(probabilities: np.ndarray, label: np.ndarray, weights: np.ndarray) -> Weighted:
    columns = _class_columns(probabilities, label, weights)
    rows = np.arange(len(label))
    predicted, own = probabilities.argmax(1), probabilities[rows, label]
    top = probabilities[rows, predicted]
    gap = np.zeros((len(label), CALIBRATION_BINS))
    gap[rows, calibration_bin(top)] = top - (predicted == label)
    log_loss = -np.log(np.clip(own, _EPSILON, 1 - _EPSILON))
    brier = (probabilities**2).sum(1) - own**2 + (1 - own) ** 2
    num_images = weights.sum(1)
    accuracy, log_losses, briers = (weights @ values / num_images for values in (predicted == label, log_loss, brier))
    auroc = columns["auroc"][:, 1:] if probabilities.shape[1] == 2 else columns["auroc"]
    support = columns["num_images"]
    recall = np.where(support > 0, columns["recall"], np.nan)
    micro = dict.fromkeys(("precision_micro", "recall_micro", "f1_micro"), accuracy)
    return {
        "accuracy": accuracy,
        "balanced_accuracy": _mean(recall),
        **{f"{name}_macro": _mean(columns[name]) for name in ("precision", "recall", "f1")},
        **{f"{name}_weighted": _mean(columns[name], support) for name in ("precision", "recall", "f1")},
        **micro,
        "auroc": _mean(auroc),
        "mAP": _mean(columns["average_precision"]),
        "log_loss": log_losses,
        "ece": np.abs(weights @ gap).sum(1) / num_images,
        "brier": briers,
    }


def _tag_scores(probabilities: np.ndarray, label: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> Weighted:
    columns = _tag_columns(probabilities, label, predicted, weights)
    known, positive = label >= 0, label == 1
    correct = known & (predicted == positive)
    own = np.clip(np.where(positive, probabilities, 1 - probabilities), _EPSILON, 1 - _EPSILON)
    cell = np.arange(len(label))[:, None] * CALIBRATION_BINS + calibration_bin(probabilities)
    gap = np.bincount(cell[known], (probabilities - positive)[known], len(label) * CALIBRATION_BINS)
    num_cells = weights @ known.sum(1)

    def cell_mean(values: np.ndarray) -> np.ndarray:
        return weights @ np.where(known, values, 0).sum(1) / num_cells

    num_correct, num_predicted, num_positive = (
        weights @ values.sum(1) for values in (correct & positive, known & predicted, positive)
    )
    complete = known.all(1)
    support = columns["num_images"]
    return {
        "mAP": _mean(columns["average_precision"]),
        "auroc": _mean(columns["auroc"]),
        **{f"{name}_macro": _mean(columns[name]) for name in ("precision", "recall", "f1")},
        **{
            f"{name}_weighted": np.where(num_positive > 0, _mean(columns[name], support), 0)
            for name in ("precision", "recall", "f1")
        },
        "precision_micro": _ratio(num_correct, num_predicted),
        "recall_micro": _ratio(num_correct, num_positive),
        "f1_micro": _ratio(2 * num_correct, num_predicted + num_positive),
        "exact_match": _ratio(weights @ (complete & correct.all(1)), weights @ complete, np.nan),
        "accuracy": cell_mean(correct),
        "log_loss": cell_mean(-np.log(own)),
        "ece": np.abs(weights @ gap.reshape(-1, CALIBRATION_BINS)).sum(1) / num_cells,
        "brier": cell_mean((probabilities - positive) ** 2),
    }


def _number_scores(predicted: np.ndarray, value: np.ndarray, weights: np.ndarray) -> Weighted:
    error, num_images = predicted - value, weights.sum(1)
    squares = weights @ error**2
    # The labels are compared with each other, because equal ones can deviate from their rounded mean.
    first = value[(weights > 0).argmax(1), None]
    varies = ((weights > 0) & (value != first)).any(1)
    deviation = value - (weights @ value / num_images)[:, None]
    total = np.einsum("rn,rn->r", weights, deviation**2)
    return {
        "mae": weights @ np.abs(error) / num_images,
        "rmse": np.sqrt(squares / num_images),
        "r2": 1 - _ratio(squares, np.where(varies, total, 0), np.nan),
    }


def _class_columns(probabilities: np.ndarray, label: np.ndarray, weights: np.ndarray) -> Weighted:
    """Returns the values of each class, as per_class has them."""
    num_classes, predicted = probabilities.shape[1], probabilities.argmax(1)
    correct = label == predicted
    num_correct, num_predicted, support = (
        _sum_by_group(values, group, num_classes)
        for values, group in ((weights[:, correct], label[correct]), (weights, predicted), (weights, label))
    )
    curves = (_curve(probabilities[:, i], label == i) for i in range(num_classes))
    return _precision_recall_f1(num_correct, num_predicted, support, num_predicted + support > 0) | _areas(
        curves, weights
    )


def _tag_columns(probabilities: np.ndarray, label: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> Weighted:
    """Returns the values of each tag, as per_tag has them."""
    known, positive = label >= 0, label == 1
    counts = (weights @ values for values in (positive & predicted, known & predicted, positive, known))
    num_correct, num_predicted, support, num_known = counts
    curves = (_curve(probabilities[:, i], positive[:, i], known[:, i]) for i in range(label.shape[1]))
    return _precision_recall_f1(num_correct, num_predicted, support, num_known > 0) | _areas(curves, weights)


def _precision_recall_f1(
    num_correct: np.ndarray, num_predicted: np.ndarray, support: np.ndarray, counts: np.ndarray
) -> Weighted:
    """Returns precision, recall, F1 and support of columns (R, C); 0 for 0/0, and NaN where `counts` is False."""
    values = {
        "precision": _ratio(num_correct, num_predicted),
        "recall": _ratio(num_correct, support),
        "f1": _ratio(2 * num_correct, num_predicted + support),
    }
    return {name: np.where(counts, value, np.nan) for name, value in values.items()} | {"num_images": support}


def _sum_by_group(weights: np.ndarray, group: np.ndarray, num_groups: int) -> np.ndarray:
    """Returns the sums of weights (R, N) over the images of each group, (R, num_groups)."""
    return np.stack([np.bincount(group, row, num_groups) for row in weights])


def calibration_bin(probabilities: np.ndarray) -> np.ndarray:
    """Returns the index of each probability's bin, in an array of the same shape. A bin includes its upper bound."""
    return np.clip(np.ceil(probabilities * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, otherwise: float = 0.0) -> np.ndarray:
    """Returns numerator / denominator, and `otherwise` if the denominator is 0."""
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), otherwise)


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Returns the mean of the columns (R, C) that are not NaN; NaN if there are none."""
    share = ~np.isnan(values) if weights is None else np.where(np.isnan(values), 0, weights)
    return _ratio((np.nan_to_num(values) * share).sum(1), share.sum(1), np.nan)


# ---- areas under curves ----


class _Curve(NamedTuple):
    """The images of one class or tag, by falling probability. Images of equal probability form a step.

    Only steps with a positive image (S of them) add to the areas. They are given by their bounds among all images
    and among the P positive ones.
    """

    order: np.ndarray  # (N,) images
    positive: np.ndarray  # (P,) places in `order`
    bounds: tuple[np.ndarray, np.ndarray]  # (S,) places in `order`: first, and last + 1
    positive_bounds: tuple[np.ndarray, np.ndarray]  # (S,) the same in `positive`


def _curve(score: np.ndarray, positive: np.ndarray, known: np.ndarray | None = None) -> _Curve:
    order = np.argsort(-score, kind="stable")
    if known is not None:
        order = order[known[order]]
    score, positive = score[order], np.flatnonzero(positive[order])
    start = np.concatenate([[0], np.flatnonzero(np.diff(score)) + 1, [len(score)]])
    steps, first = np.unique(np.searchsorted(start, positive, "right") - 1, return_index=True)
    last = np.append(first[1:], len(positive))[: len(first)]
    return _Curve(order, positive, (start[steps], start[steps + 1]), (first, last))


def _areas(curves: Iterator[_Curve], weights: np.ndarray) -> Weighted:
    """Returns AUROC and average precision of each curve, (R, C); NaN if they are undefined."""
    areas = [_area(curve, weights) for curve in curves]
    auroc, average_precision = (np.stack(values, axis=1) for values in zip(*areas, strict=True))
    return {"average_precision": average_precision, "auroc": auroc}


def _area(curve: _Curve, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the AUROC and the average precision of one curve, each (R,)."""
    num_rows = max(_BLOCK // max(weights.shape[1], 1), 1)
    blocks = [_block_area(curve, weights[i : i + num_rows]) for i in range(0, len(weights), num_rows)]
    auroc, average_precision = zip(*blocks, strict=True)
    return np.concatenate(auroc), np.concatenate(average_precision)


def _block_area(curve: _Curve, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ordered = weights.take(curve.order, axis=1)
    above = _prefix_sums(ordered)
    positives_above = _prefix_sums(ordered[:, curve.positive])
    positives, negatives = positives_above[:, -1], above[:, -1] - positives_above[:, -1]
    before, after = (positives_above.take(bound, axis=1) for bound in curve.positive_bounds)
    all_before, all_after = (above.take(bound, axis=1) for bound in curve.bounds)
    gain = after - before
    precision = after / np.maximum(all_after, 1)
    # Half of the negative images in the step of a positive one count as ranked below it.
    below = negatives[:, None] - (all_before - before + all_after - after) / 2
    auroc = _ratio((gain * below).sum(1), positives * negatives, np.nan)
    return auroc, _ratio((gain * precision).sum(1), positives, np.nan)


def _prefix_sums(values: np.ndarray) -> np.ndarray:
    """Returns the sums of the first 0, 1, ..., N columns, (R, N + 1)."""
    sums = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=sums[:, 1:])
    return sums
