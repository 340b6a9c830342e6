"""Ranks the images of a test split to look at: wrong predictions, large losses and large errors."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from jaxft.targets import joint
from jaxft.targets.classification import Predictions
from jaxft.targets.joint import Calibrations, JointPredictions, Target, Targets
from jaxft.targets.number import NumberTarget
from jaxft.targets.tags import TagsTarget
from jaxft.targets.target import Calibration

ERRORS = 100  # largest errors of a number that are listed
NO_TAG = "no tag"


class Worst(NamedTuple):
    """An image whose prediction for one target is wrong, or far from the label."""

    reason: str  # "mistake" or "large error"
    position: int  # in the test split
    label: str
    predicted: str
    score: float  # confidence of a class, loss of tags, absolute error of a number


def ranked_mistakes(predictions: Predictions) -> np.ndarray:
    """Returns the positions of all wrong predictions, int (K,), the most confident first."""
    wrong = np.flatnonzero(predictions.rank)
    return wrong[np.argsort(-predictions.confidence[wrong], kind="stable")]


def largest_losses(targets: Targets, predictions: JointPredictions) -> np.ndarray:
    """Returns the positions of all images with a label, int (K,), the largest loss first.

    The loss is the weighted sum of the targets' losses, without those whose label is missing.
    """
    losses = np.stack(
        [target.field.weight * image_losses(target, *own) for target, *own in _each(targets, predictions)]
    )
    labelled = np.flatnonzero(~np.isnan(losses).all(0))
    return labelled[np.argsort(-np.nansum(losses, axis=0)[labelled], kind="stable")]


def image_losses(target: Target, logits: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Returns a target's loss for each image, float64 (N,), NaN without a label; for tags the mean over known ones."""
    losses, weights = (np.asarray(array, np.float64) for array in jax.device_get(target.loss(logits, label)))
    return np.where(weights > 0, losses / np.where(weights > 0, weights, 1), np.nan)


def worst_images(
    targets: Targets, predictions: JointPredictions, calibrations: Calibrations
) -> Iterator[tuple[Target, Worst]]:
    """Yields the images of all wrong classes and tags and of the ERRORS largest errors of a number, the worst first.

    The tags of an image are wrong if one of the known ones is.
    """
    for target, logits, label in _each(targets, predictions):
        calibration = calibrations.get(target.field.name, {})
        outputs = target.outputs(logits, calibration)
        reason, limit, scores = "mistake", len(label), np.full(len(label), np.nan)  # NaN: the image is not listed
        if isinstance(target, NumberTarget):
            reason, limit, scores = "large error", ERRORS, np.abs(outputs - target.values(label))
        elif isinstance(target, TagsTarget):
            wrong = ((label >= 0) & ((outputs >= target.thresholds(calibration)) != (label > 0))).any(-1)
            scores[wrong] = image_losses(target, logits, label)[wrong]
        else:
            wrong = (label >= 0) & (outputs.argmax(-1) != label)
            scores[wrong] = outputs.max(-1)[wrong]
        ranked = np.argsort(-scores, kind="stable")[: np.count_nonzero(~np.isnan(scores))]
        for index in ranked[:limit].tolist():
            truth, predicted = label_text(target, label[index]), predicted_text(target, outputs[index], calibration)
            yield target, Worst(reason, index, truth, predicted, float(scores[index]))


def label_text(target: Target, label: np.ndarray, separator: str = "|") -> str:
    """Returns one image's label for display, "" if it is missing. Only known tags are named."""
    if isinstance(target, NumberTarget):
        return "" if np.isnan(label) else f"{float(target.values(label)):.6g}"
    if isinstance(target, TagsTarget):
        present = [target.field.names[i] for i in np.flatnonzero(label > 0)]
        return (separator.join(present) or NO_TAG) if (label >= 0).any() else ""
    return target.field.names[int(label)] if label >= 0 else ""


def predicted_text(target: Target, output: np.ndarray, calibration: Calibration) -> str:
    """Returns one image's prediction in the form of `label_text`. output: a row of the target's outputs."""
    prediction = target.prediction(output, calibration, 1)
    if isinstance(target, NumberTarget):
        return f"{prediction.value:.6g}"
    if isinstance(target, TagsTarget):
        return "|".join(name for name in target.field.names if name in prediction.tags) or NO_TAG
    return prediction.label


def _each(targets: Targets, predictions: JointPredictions) -> Iterator[tuple[Target, np.ndarray, np.ndarray]]:
    return joint.each(targets, np.asarray(predictions.logits), predictions.label)
