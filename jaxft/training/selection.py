"""Evaluates each epoch, and decides which checkpoint is the best and when a run ends early."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxft.data.dataset import Dataset
from jaxft.data.loader import Loader
from jaxft.errors import UserError
from jaxft.run.metrics_file import MetricsFile
from jaxft.targets import joint
from jaxft.targets.classification import count_predictions
from jaxft.targets.joint import Targets
from jaxft.training.compilation import Program
from jaxft.training.evaluation import evaluate_images
from jaxft.training.loop import Trainer, metrics_row
from jaxft.training.state import TrainState
from jaxft.training.steps_per_call import StepsPerCall


class Evaluated(NamedTuple):
    """A split that is evaluated after each epoch."""

    split: str  # as in metrics.jsonl: "val" or "eval"
    name: str  # data.val_split or data.eval_split
    loader: Loader
    program: Program


@dataclass(frozen=True)
class Selection:
    """Evaluates the test split and, if there is one, the validation split, which then chooses the best checkpoint."""

    config: ConfigDict
    targets: Targets
    metric: str  # its full name
    test: Evaluated
    val: Evaluated | None
    per_call: StepsPerCall

    def evaluate(self, trainer: Trainer, metrics: MetricsFile, state: TrainState, epoch: int) -> tuple[Any, str]:
        """Evaluates and records an epoch; returns the predictions of the test split and the line to print.

        Raises UserError if the metric is undefined.
        """
        step, calibrations, score, line = int(state.step), {}, None, f"Epoch [{epoch}/{self.config.num_epochs}]"
        simple = self.val is None and joint.is_one_class(self.targets) and self.metric == "accuracy"
        predictions: Any = None
        for split in (self.val, self.test):
            if split is None:
                continue
            trainer.compiler.wait(split.program)
            started = time.monotonic()
            size = self.config.batch_size
            predictions = evaluate_images(split.program.call, state, split.loader, size, self.per_call)
            seconds = time.monotonic() - started
            if split is self.val:
                calibrations = joint.calibrate(self.targets, predictions)
                metrics.calibrations[step] = calibrations
            values = self._values(predictions, calibrations, simple=simple)
            if not simple:
                if score is None:
                    score = self._score(values, split)
                values |= {"score": score} if split is self.test else {}
            trainer.record(metrics_row(step, epoch, split.split, values, split.loader.num_examples, seconds))
            shown = "Accuracy" if self.metric == "accuracy" else self.metric
            kind = "Test" if split is self.test else "Val"
            line += f", {kind} {shown}: {joint.format_metric(self.metric, values.get(self.metric))}"
        return predictions, line

    def _values(self, predictions: Any, calibrations: joint.Calibrations, *, simple: bool) -> dict[str, Any]:
        """Returns the losses and the metrics of a split. simple: only the loss and the accuracy of a single class."""
        one_class = joint.is_one_class(self.targets)
        counts = count_predictions(predictions) if one_class else joint.count_on_host(self.targets, predictions)
        values: dict[str, Any] = joint.losses_of(self.targets, counts)
        if simple:
            return values
        found = joint.flat_scores(self.targets, joint.scores(self.targets, predictions, calibrations))
        return values | {name: value for name, value in found.items() if name not in values}

    def _score(self, values: Mapping[str, float], split: Evaluated) -> float:
        score = joint.score_of(self.metric, values)
        if score is None:
            raise _undefined(self.metric, split.name)
        return score


def check_metric(targets: Targets, metric: str, data: Dataset, name: str) -> None:
    """Raises UserError if the metric that chooses the best checkpoint is undefined on the labels of a split.

    This depends on no prediction, so that it is known before anything is trained. data: the split. name: its name.
    """
    if joint.is_one_class(targets) and metric == "accuracy":
        return
    for target in targets:
        label = data.label[target.field.name] if isinstance(data.label, dict) else data.label
        label = np.unique(label, axis=0)  # since how often a label occurs does not matter
        scores = target.scores(np.zeros((len(label), target.field.num_outputs)), label, {})
        for key, value in scores.items():
            if value is None and metric == joint.full_name(targets, target.field.name, key):
                raise _undefined(metric, name)


def _undefined(metric: str, name: str) -> UserError:
    return UserError(
        f"{metric} is undefined on the images of '{name}', for example because all have the same label; choose another "
        "best_metric or another split"
    )


def last_improvement(scores: Mapping[int, float], min_delta: float) -> int:
    """Returns the index, in order of steps, of the latest evaluation that was an improvement; -1 without evaluations.

    The first evaluation is an improvement. A later one is if its score exceeds that of the latest improvement by more
    than `min_delta`.
    """
    best, index = -float("inf"), -1
    for i, step in enumerate(sorted(scores)):
        if index < 0 or scores[step] > best + min_delta:
            best, index = scores[step], i
    return index


def is_over(config: ConfigDict, scores: Mapping[int, float]) -> bool:
    """Returns whether a run ends early: none of the last `stop.patience` evaluations was an improvement.

    Depends only on the scores in metrics.jsonl, so a resumed run decides as an uninterrupted one does.
    """
    patience = config.stop.patience
    return bool(patience) and len(scores) - 1 - last_improvement(scores, config.stop.min_delta) >= patience
