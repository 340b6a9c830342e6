"""Evaluates a checkpoint on the images that its run was tested on.

python -m jaxft.evaluate --workdir runs/cifar10 [--checkpoint best|latest|STEP] [--json]
"""

if __name__ == "__main__":  # a command's process is prepared before JAX is imported
    from jaxft.cli import run

    run("evaluate")

import json
from typing import Any

from jaxft.errors import ArgumentParser
from jaxft.targets import joint
from jaxft.targets.classification import evaluation_summary, score_lines
from jaxft.training.evaluation import Evaluation, evaluate

SHOWN = ("balanced_accuracy", "f1_macro", "auroc", "rmse", "r2", "log_loss", "ece")  # after the default metric
CALIBRATED = ("log_loss", "ece", "brier")  # metrics that a temperature changes


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """Returns all scores of an evaluation, ready for JSON.

    {"checkpoint", "split", "targets": {name: {metric: value, ...}}}; for a single class also the keys of
    evaluation_summary, and with a calibration "uncalibrated": {name: {metric: value}} and "calibration".
    """
    targets, predictions, calibrations = evaluation.targets, evaluation.predictions, evaluation.calibrations
    summary: dict[str, Any] = {"checkpoint": evaluation.checkpoint, "split": evaluation.split}
    if joint.is_one_class(targets):
        summary |= evaluation_summary(predictions, evaluation.class_names)
    summary["targets"] = target_scores(evaluation)
    if calibrations:
        before = joint.scores(targets, predictions, {})
        summary["uncalibrated"] = {name: {key: before[name][key] for key in CALIBRATED} for name in calibrations}
        summary["calibration"] = dict(calibrations)
    return summary


def target_scores(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Returns {target: its kind, metrics, intervals, and the metrics of each class or tag}."""
    arguments = evaluation.targets, evaluation.predictions, evaluation.calibrations
    kinds = {target.field.name: {"kind": target.field.kind} for target in evaluation.targets}
    scores, details = joint.scores(*arguments), joint.details(*arguments)
    return {name: kinds[name] | scores[name] | details[name] for name in kinds}


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """Returns the scores of an evaluation as lines for a terminal, the most important one first."""
    targets, predictions, calibrations = evaluation.targets, evaluation.predictions, evaluation.calibrations
    if joint.is_one_class(targets):
        lines = score_lines(evaluation_summary(predictions, evaluation.class_names))
    else:
        found = target_scores(evaluation)
        lines = [_target_line(target, targets, found[target.field.name]) for target in targets]
    after = joint.scores(targets, predictions, calibrations) if calibrations else {}
    before = joint.scores(targets, predictions, {}) if calibrations else {}
    for name, calibration in calibrations.items():
        if before[name]["log_loss"] is None:  # no label in this split
            continue
        changes = [f"{key} {_number(before[name][key])} -> {_number(after[name][key])}" for key in CALIBRATED]
        prefix = "" if len(targets) == 1 else f"{name}: "
        lines.append(f"{prefix}calibrated by a temperature of {calibration['temperature']:.3f}: {', '.join(changes)}")
    return lines


def _target_line(target: joint.Target, targets: joint.Targets, own: dict[str, Any]) -> str:
    """Returns a line with the metrics of a target, the default one first with its 95 % interval."""
    shown = [target.default_metric, *(metric for metric in SHOWN if metric in target.metrics)]
    texts = []
    for metric in shown:
        text = f"{metric} {joint.format_metric(metric, own[metric])}"
        if metric == target.default_metric and own["intervals"].get(metric):
            low, high = (joint.format_metric(metric, bound) for bound in own["intervals"][metric])
            text += f" (95 % interval {low} to {high})"
        texts.append(text)
    prefix = "" if len(targets) == 1 else f"{target.field.name}: "
    return f"{prefix}{', '.join(texts)}, {own['num_images']:,} images"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.evaluate", __doc__)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="workdir of the run")
    parser.add_argument("--checkpoint", default="best", help="best (default), latest or the number of a step")
    parser.add_argument("--data_dir", help="folder of the images, or of prepared TFDS datasets, if it has moved")
    parser.add_argument(
        "--flip", action="store_true", help="average over each image and its mirror image, as model.test_flip does"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with the confusion matrix")
    args = parser.parse_args(argv)
    evaluation = evaluate(args.workdir, args.checkpoint, args.data_dir, flip=args.flip)
    if args.json:
        print(json.dumps(evaluation_json(evaluation)))
        return
    first, *others = evaluation_lines(evaluation)
    print(f"checkpoint {evaluation.checkpoint}: {first} on {evaluation.split}")
    for line in others:
        print(f"  {line}")
