"""The sections of a report, one for each target: scores, tables and charts for the templates."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft.reporting import charts
from jaxft.reporting.evaluation_file import Run, escaped
from jaxft.reporting.worst_images import label_text
from jaxft.targets import metrics
from jaxft.targets.classification import (
    Predictions,
    bin_reliability,
    confusion_matrix,
    reliability,
    wilson_interval,
)
from jaxft.targets.joint import Target, each, format_metric
from jaxft.targets.number import NumberTarget
from jaxft.targets.tags import TagsTarget
from jaxft.targets.target import Calibration
from jaxft.training.start import val_fraction

CONFUSIONS = 8  # listed
RESAMPLED_CELLS = 100_000  # while a run trains, the intervals of larger tables of tags (images x tags) are left out


class Scored(NamedTuple):
    """A target with its predictions on the test split."""

    target: Target
    logits: np.ndarray  # (N, C)
    label: np.ndarray  # (N, ...), with missing ones
    calibration: Calibration
    scores: dict[str, float | None]
    interval: tuple[float, float] | None  # 95 %, of the default metric

    @property
    def name(self) -> str:
        return escaped(self.target.field.name)

    @property
    def known(self) -> np.ndarray:
        """The images that have a label, bool (N,)."""
        return self.target.known(self.label)

    def default_text(self) -> str:
        """Returns the default metric's value for display."""
        return format_metric(self.target.default_metric, self.scores[self.target.default_metric])

    def interval_text(self) -> str:
        """Returns the two ends of the interval as text, such as "61.6% to 80.3%"; "" if there is none."""
        bounds = [format_metric(self.target.default_metric, bound) for bound in self.interval or ()]
        return " to ".join(bounds)


def score_targets(run: Run) -> list[Scored]:
    """Returns the targets of a run with their scores, in order. The run must not have a single class."""
    scored = []
    for target, logits, label in each(run.targets, np.asarray(run.predictions.logits), run.predictions.label):
        calibration = run.calibrations.get(target.field.name, {})
        scores = target.scores(logits, label, calibration)
        own = Scored(target, logits, label, calibration, scores, None)
        scored.append(own._replace(interval=_interval(own, always=run.finished)))
    return scored


def _interval(own: Scored, *, always: bool) -> tuple[float, float] | None:
    """Returns the 95 % interval of the default metric, or None.

    always: also resample many images with tags, which takes seconds.
    """
    target, known = own.target, own.known
    if not known.any():
        return None
    if isinstance(target, NumberTarget):
        outputs, values = target.outputs(own.logits[known], {}), target.values(own.label[known])
        return metrics.number_intervals(outputs, values)[target.default_metric]
    if isinstance(target, TagsTarget):
        if own.label.size > RESAMPLED_CELLS and not always:
            return None
        arguments = target.outputs(own.logits, own.calibration), own.label, target.thresholds(own.calibration)
        return metrics.tag_intervals(*arguments)[target.default_metric]
    num_images = int(known.sum())
    return wilson_interval(round(num_images * (own.scores[target.default_metric] or 0)), num_images)


def target_sections(run: Run, scored: Sequence[Scored]) -> Iterator[dict[str, Any]]:
    """Yields the content of each target's section for the template."""
    for own in scored:
        known = own.known
        logits, label = own.logits[known], own.label[known]
        content: dict[str, Any] = {}
        if len(label):
            if isinstance(own.target, NumberTarget):
                content = _number_content(own.target, logits, label)
            elif isinstance(own.target, TagsTarget):
                content = _tags_content(own.target, logits, label, own.calibration)
            else:
                content = _class_content(own.target, logits, label, own.calibration)
        kind = own.target.field.kind
        yield content | {
            "kind": kind,
            "title": f"{kind.capitalize()}: {own.name}",
            "num_images": len(label),
            "metrics": [(metric, format_metric(metric, own.scores[metric])) for metric in own.target.metrics],
            "calibration": _calibration_of(run, own),
            "bins": metrics.CALIBRATION_BINS,
        }


def class_content(predictions: Predictions, names: Sequence[str]) -> dict[str, Any]:
    """Returns the tables and charts of classes. predictions: at least one."""
    matrix, bins = confusion_matrix(predictions, len(names)), reliability(predictions)
    return {
        "classes": _classes(matrix, names),
        "confusion": charts.confusion(matrix, names),
        "confusions": _confusions(matrix, names),
        "reliability": charts.reliability(bins),
        "calibration_error": bins.error,
    }


def _class_content(target: Target, logits: np.ndarray, label: np.ndarray, calibration: Calibration) -> dict[str, Any]:
    probabilities = target.outputs(logits, calibration)
    predicted = probabilities.argmax(-1)
    wrong = (predicted != label).astype(np.int32)  # in place of ranks: only whether they are 0 matters here
    predictions = Predictions(label, predicted, probabilities.max(-1), wrong, np.zeros(len(label)))
    return class_content(predictions, [escaped(name) for name in target.field.names])


def _tags_content(
    target: TagsTarget, logits: np.ndarray, label: np.ndarray, calibration: Calibration
) -> dict[str, Any]:
    probabilities, thresholds = target.outputs(logits, calibration), target.thresholds(calibration)
    columns = metrics.per_tag(probabilities, label, thresholds) | {"threshold": thresholds.tolist()}
    rows = [
        {"name": escaped(name)} | {key: values[i] for key, values in columns.items()}
        for i, name in enumerate(target.field.names)
    ]
    known = label >= 0
    bins = bin_reliability(probabilities[known], label[known] > 0)
    return {
        "tags": sorted(rows, key=lambda row: (row["average_precision"] is None, row["average_precision"])),
        "reliability": charts.reliability(bins, "probability of a tag", "images that have it"),
        "calibration_error": bins.error,
    }


def _number_content(target: NumberTarget, logits: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    predicted, truth, name = target.outputs(logits, {}), target.values(label), escaped(target.field.name)
    return {
        "scatter": charts.scatter(truth, predicted, name),
        "histogram": charts.histogram(predicted - truth, name),
        "drawn": min(len(truth), charts.DRAWN_POINTS),
    }


def _classes(matrix: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row per class, the least accurate first and classes without images last."""
    rows = []
    for i, (name, counts) in enumerate(zip(names, matrix, strict=True)):
        num_images, wrong = int(counts.sum()), counts.copy()
        wrong[i] = 0
        row = {
            "name": name,
            "num_images": num_images,
            "accuracy": int(counts[i]) / num_images if num_images else None,
            "taken_for": names[wrong.argmax()] if wrong.any() else "",
            "times": int(wrong.max()),
        }
        rows.append(row)
    return sorted(rows, key=lambda row: (row["accuracy"] is None, row["accuracy"]))


def _confusions(matrix: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, int]]:
    """Returns (true class, predicted class, times) of the most frequent confusions."""
    wrong = matrix - np.diag(np.diag(matrix))
    most_frequent = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]
    pairs = [divmod(int(flat), len(names)) for flat in most_frequent]
    return [(names[i], names[j], int(wrong[i, j])) for i, j in pairs if wrong[i, j]]


def described_images(run: Run) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Yields the file of each image of the gallery, and (target, label, prediction) for each target."""
    logits = np.asarray(run.predictions.logits)[run.mistakes]
    label = {name: array[run.mistakes] for name, array in run.predictions.label.items()}
    rows: list[list[tuple[str, str, str]]] = [[] for _ in run.files]
    for target, own, own_label in each(run.targets, logits, label):
        calibration = run.calibrations.get(target.field.name, {})
        for row, output, truth in zip(rows, target.outputs(own, calibration), own_label, strict=True):
            prediction = str(target.prediction(output, calibration, 1))
            texts = target.field.name, label_text(target, truth, ", "), prediction
            row.append((escaped(texts[0]), escaped(texts[1]), escaped(texts[2])))
    yield from zip(run.files, rows, strict=True)


def validation_text(run: Run) -> str:
    """Returns a description of the validation split, or "" if there is none."""
    if (fraction := val_fraction(run.config)) is not None:
        return f"the held-out {100 * fraction:.4g} % of the training images"
    return f"the validation split '{escaped(run.config.data.val_split)}'" if run.config.data.val_split else ""


def calibration_text(run: Run, temperature: float, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Returns a sentence on what a temperature changes. before, after: log_loss and ece."""
    texts = [[format_metric(key, values.get(key)) for values in (before, after)] for key in ("log_loss", "ece")]
    return (
        f"A temperature of {temperature:.4g}, fitted on {validation_text(run)}, changes the log loss from "
        f"{texts[0][0]} to {texts[0][1]} and the expected calibration error from {texts[1][0]} to {texts[1][1]}."
    )


def _calibration_of(run: Run, own: Scored) -> str:
    if "temperature" not in own.calibration or not own.known.any():
        return ""
    before = own.target.scores(own.logits, own.label, {})
    return calibration_text(run, own.calibration["temperature"], before, own.scores)
