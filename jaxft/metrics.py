"""What is counted: the lines of metrics.jsonl, and what predictions say of a network."""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft.errors import UserError
from jaxft.steps import Predictions

TOP_K = (3, 5)  # told where there are at least twice as many classes
CALIBRATION_BINS = 15


class MetricsFile:
    """DIR/metrics.jsonl: each training step and each evaluation once, in order, whatever came between.

    accuracy: of the evaluations in it, by step. Raises UserError where it is damaged, but for a last line that a
    killed run left half-written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = read_lines(path)
        self.accuracy = {line["step"]: line["accuracy"] for line in self._lines if line["split"] == "eval"}
        self._file: int | None = None
        self._pending = b""
        self._failed = False

    def open(self, last_step: int) -> list[dict[str, Any]]:
        """To append to, after what an interrupted run wrote beyond its checkpoint at `last_step` is cut off.

        Returns the lines that are kept.
        """
        kept = [line for line in self._lines if line["step"] <= last_step]
        steps = [line["step"] for line in kept if line["split"] == "train"]
        if steps != list(range(1, last_step + 1)):
            lost = min({*range(1, last_step + 1)} - {*steps}, default=last_step)
            raise UserError(
                f"{self.path} lacks step {lost}, or has it twice, and the checkpoint is of step {last_step}; "
                "put the file back, or name another --workdir"
            )
        for step in [step for step in self.accuracy if step > last_step]:
            del self.accuracy[step]
        if jax.process_index():
            return kept
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            partial.replace(self.path)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error}") from None
        return kept

    def write(self, **line: Any) -> None:
        """A line that cannot be written now, as on a full disk, is kept for the next time."""
        if line["split"] == "eval":
            self.accuracy[line["step"]] = line["accuracy"]
        if jax.process_index():
            return
        self._pending += (json.dumps(line) + "\n").encode()
        try:
            self.flush()
        except OSError as error:
            if not self._failed:
                print(f"{self.path} cannot be written ({error}); its lines are kept for later", file=sys.stderr)
            self._failed = True

    def flush(self) -> None:
        """Raises OSError."""
        while self._pending and self._file is not None:
            self._pending = self._pending[os.write(self._file, self._pending) :]
        self._failed = False

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Without a last line that is half-written; raises UserError for another that is damaged."""
    texts = path.read_bytes().split(b"\n") if path.exists() else []
    lines = []
    for number, text in enumerate(texts[:-1], 1):
        try:
            line = json.loads(text)
            assert {"step", "split", "accuracy"} <= line.keys()
        except (ValueError, AssertionError, AttributeError):
            raise UserError(f"{path} is damaged in line {number}; put it back, or name another --workdir") from None
        lines.append(line)
    return lines


def wilson_interval(correct: int, pictures: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy (Wilson 1927), which stays within [0, 1] for few pictures too."""
    z = 1.959963984540054
    centre = (correct + z**2 / 2) / (pictures + z**2)
    half = z / (pictures + z**2) * math.sqrt(correct * (pictures - correct) / pictures + z**2 / 4)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def confusion_matrix(predictions: Predictions, num_classes: int) -> np.ndarray:
    """int64 (num_classes, num_classes): rows are the truth, columns the prediction."""
    pairs = np.asarray(predictions.label, np.int64) * num_classes + predictions.predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


class Calibration(NamedTuple):
    """Of the pictures in each of CALIBRATION_BINS equal bins of confidence; 0 in an empty bin."""

    pictures: np.ndarray
    confidence: np.ndarray  # mean
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599)."""
        return float((self.pictures * np.abs(self.confidence - self.accuracy)).sum() / self.pictures.sum())


def calibration(predictions: Predictions) -> Calibration:
    confidence = np.asarray(predictions.confidence, np.float64)
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    pictures, confidences, correct = (
        np.bincount(bins, weights, CALIBRATION_BINS) for weights in (None, confidence, predictions.rank == 0)
    )
    divisor = np.maximum(pictures, 1)
    return Calibration(pictures, confidences / divisor, correct / divisor)


def summarise(predictions: Predictions, class_names: Sequence[str]) -> dict[str, Any]:
    """Everything that one evaluation says, ready for JSON; a class without pictures has accuracy None."""
    pictures, correct = len(predictions.label), int((predictions.rank == 0).sum())
    matrix = confusion_matrix(predictions, len(class_names))
    of_class = matrix.sum(1)
    per_class = [int(matrix[i, i]) / int(of_class[i]) if of_class[i] else None for i in range(len(class_names))]
    return {
        "pictures": pictures,
        "correct": correct,
        "accuracy": correct / pictures,
        "accuracy_interval": wilson_interval(correct, pictures),
        "loss": float(np.sum(predictions.loss, dtype=np.float64)) / pictures,
        "top_k_accuracy": {
            str(k): int((predictions.rank < k).sum()) / pictures for k in TOP_K if 2 * k <= len(class_names)
        },
        "mean_per_class_accuracy": float(np.mean([accuracy for accuracy in per_class if accuracy is not None])),
        "per_class_accuracy": dict(zip(class_names, per_class, strict=True)),
        "expected_calibration_error": calibration(predictions).error,
        "confusion_matrix": matrix.tolist(),
    }
