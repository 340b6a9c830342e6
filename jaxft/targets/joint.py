"""All targets of a run: their columns of the head, the sum of their losses, and their scores.

All targets read the same features through one dense layer, so several heads cost no more than one. Each target owns as
many of its columns as it has outputs, in order.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from ml_collections import ConfigDict

from jaxft.config import resolve
from jaxft.data.batches import Array
from jaxft.data.dataset import Dataset
from jaxft.data.fields import Field, parse_fields, parse_targets
from jaxft.errors import UserError, shortened
from jaxft.ops.elementwise import sum_over_devices
from jaxft.targets.classification import ClassTarget, Predictions, balanced_class_weights, predictions_from_logits
from jaxft.targets.metrics import LOWER_IS_BETTER
from jaxft.targets.number import NumberTarget
from jaxft.targets.tags import TagsTarget, balanced_tag_weights
from jaxft.targets.target import Calibration, Counts, Target

Targets = tuple[Target, ...]
Calibrations = Mapping[str, Calibration]  # by target
ONE_CLASS: Targets = (ClassTarget(),)


@struct.dataclass
class JointCounts:
    """Counts of several targets, and the number of images."""

    num_images: Array
    targets: dict[str, Counts]  # by name


@struct.dataclass
class JointPredictions:
    """Logits and labels of each image, for several targets."""

    logits: Array  # float32 (B, outputs of all targets)
    label: Any  # {name: (B, ...)}


# ---- the targets of a run ----


def fields_of(config: ConfigDict, class_names: Sequence[str], fields: Sequence[Field]) -> tuple[Field, ...]:
    """Returns the fields of a dataset; if it has none, because it has a single class, one with its class_names."""
    if fields:
        return tuple(fields)
    return (parse_targets(config.targets)[0]._replace(names=tuple(class_names)),)


_KINDS: Mapping[str, Callable[[Field], Target]] = {"class": ClassTarget, "tags": TagsTarget, "number": NumberTarget}


def target_problems(config: ConfigDict) -> list[str]:
    """Returns the settings of a run's targets that contradict each other, and a best_metric that they do not have.

    Raises UserError if the config key `targets` cannot be parsed.
    """
    targets = config_targets(config)
    kinds = {target.field.kind for target in targets}
    problems = []
    try:
        find_metric(targets, config.best_metric)
    except UserError as error:
        problems.append(str(error))
    if "number" in kinds and (config.augment.mixup > 0 or config.augment.cutmix > 0):
        problems.append("labels that are numbers cannot be mixed; set augment.mixup and augment.cutmix to 0")
    if "class" not in kinds and config.data.sampling != "none":
        problems.append(f"data.sampling={config.data.sampling} needs a target of kind class; set it to none")
    if config.stop.patience and config.model.batch_norm == "recalibrate":
        problems.append("batch_norm=recalibrate needs the last epoch, which stop.patience may leave out; set only one")
    return problems


def config_targets(config: ConfigDict) -> Targets:
    """Returns the targets that a config names, without the names of classes and tags, which the data has."""
    return tuple(_KINDS[field.kind](field) for field in parse_targets(config.targets))


def make_targets(config: ConfigDict, data: Dataset) -> Targets:
    """Makes the targets of a run from its config and its training split."""

    def target(field: Field) -> Target:
        label = data.label[field.name] if data.fields else data.label
        balanced = config.class_weights == "balanced"
        if field.kind == "class":
            weights = balanced_class_weights(label[label >= 0], len(field.names)) if balanced else ()
            return ClassTarget(field, config.label_smoothing, weights)
        if field.kind == "tags":
            return TagsTarget(field, config.label_smoothing, balanced_tag_weights(label) if balanced else ())
        return NumberTarget(field)

    return tuple(target(field) for field in fields_of(config, data.class_names, data.fields))


def targets_of(info: Mapping[str, Any]) -> Targets:
    """Returns the targets of a checkpoint's info or of weights' provenance, without smoothing and class weights."""
    fields = parse_fields(info["targets"]) if "targets" in info else ()
    config = resolve(info.get("config", {}))
    return tuple(_KINDS[field.kind](field) for field in fields_of(config, info["class_names"], fields))


def outputs_of(targets: Targets) -> list[tuple[str, str, tuple[str, ...], float, float]]:
    """Returns the meaning of the head's columns: heads for which it is equal can be exchanged.

    Each target is (name, kind, classes or tags, mean, deviation); the name of a single class does not matter.
    """
    names = ["" if is_one_class(targets) else target.field.name for target in targets]
    fields = [target.field for target in targets]
    return [(name, f.kind, f.names, f.mean, f.std) for name, f in zip(names, fields, strict=True)]


def is_one_class(targets: Targets) -> bool:
    """Returns whether a run has a single class target; its label is then an array (N,), not a dict."""
    return len(targets) == 1 and isinstance(targets[0], ClassTarget)


def first_class(targets: Targets, label: Any) -> np.ndarray:
    """Returns the labels (N,) of the first class target; zeros if there is none."""
    arrays = label if isinstance(label, dict) else {targets[0].field.name: label}
    for target in targets:
        if isinstance(target, ClassTarget):
            return np.asarray(arrays[target.field.name])
    return np.zeros(len(next(iter(arrays.values()))), np.int32)


def count_outputs(targets: Targets) -> int:
    """Returns the number of the head's columns."""
    return sum(target.field.num_outputs for target in targets)


def each(targets: Targets, logits: Any, label: Any = None) -> Iterator[tuple[Target, Any, Any]]:
    """Yields each target with its columns of the logits and its label."""
    start = 0
    for target in targets:
        own = logits if len(targets) == 1 else logits[..., start : start + target.field.num_outputs]
        start += target.field.num_outputs
        yield target, own, label[target.field.name] if isinstance(label, dict) else label


# ---- in a step, on the device ----


def mean_loss(
    targets: Targets, logits: jax.Array, labels: Sequence[tuple[Any, Array]], mask: Array, axis_name: str | None
) -> jax.Array:
    """Returns this device's share of the loss of the whole batch: the weighted sum of the targets' weighted means.

    labels: each with its share (B,) of the image, as training_inputs returns them. A target without any label in the
    batch adds nothing. axis_name: of the mapped devices, or None for one device.
    """
    total: Any = None
    for i, target in enumerate(targets):
        terms = []
        for label, share in labels:
            _, own, own_label = list(each(targets, logits, label))[i]
            terms.append((*target.loss(own, own_label), share * mask))
        loss: Any = sum((losses * share).sum() for losses, _, share in terms)
        weight: Any = sum((weights * share).sum() for _, weights, share in terms)
        weight = sum_over_devices(weight, axis_name) if axis_name else weight
        loss *= target.field.weight
        loss /= jnp.where(weight > 0, weight, 1)
        total = loss if total is None else total + loss
    return total


def distillation_loss(targets: Targets, logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """Returns the weighted sum of the targets' distillation losses (B,)."""
    total: Any = None
    for (target, own, _), (_, teacher, _) in zip(each(targets, logits), each(targets, teacher_logits), strict=True):
        loss = target.field.weight * target.distillation_loss(own, teacher, temperature)
        total = loss if total is None else total + loss
    return total


def count_batch(targets: Targets, logits: Array, label: Any, mask: Array) -> Counts | JointCounts:
    """Returns the counts of a batch: Counts for a single class, else JointCounts."""
    if is_one_class(targets):
        return targets[0].count_batch(logits, label, mask)
    counts = {t.field.name: t.count_batch(own, own_label, mask) for t, own, own_label in each(targets, logits, label)}
    return JointCounts(mask.sum(), counts)


def count_on_host(targets: Targets, predictions: JointPredictions) -> JointCounts:
    """Returns the counts of all predictions, which must not include padding."""
    logits, label = np.asarray(predictions.logits), predictions.label
    count = jax.jit(count_batch, static_argnums=0)
    return jax.device_get(count(targets, logits, label, np.ones(len(logits), np.float32)))


def predictions(targets: Targets, logits: jax.Array, label: Any) -> Predictions | JointPredictions:
    """Returns the predictions of a batch: Predictions for a single class, else JointPredictions."""
    if is_one_class(targets):
        return predictions_from_logits(logits, label)
    return JointPredictions(logits, label)


# ---- scores, on the host ----


def losses_of(targets: Targets, counts: Counts | JointCounts) -> dict[str, float]:
    """Returns the means of counts for a row of metrics: the loss, and the loss of each target if there are several.

    For a single class it adds the accuracy.
    """
    if isinstance(counts, Counts):
        return {
            "loss": targets[0].field.weight * float(counts.loss) / int(counts.num_images),
            "accuracy": float(counts.correct) / int(counts.num_images),
        }
    means = {name: float(own.loss) / max(float(own.num_images), 1.0) for name, own in counts.targets.items()}
    total = sum(target.field.weight * means[target.field.name] for target in targets)
    return {"loss": total} | {f"{name}.loss": mean for name, mean in means.items() if len(targets) > 1}


def scores(targets: Targets, predictions: Any, calibrations: Calibrations) -> dict[str, dict[str, float | None]]:
    """Returns {target: {metric: value}} of predictions, or of any object with logits and labels in NumPy arrays."""
    return {
        target.field.name: target.scores(own, label, calibrations.get(target.field.name, {}))
        for target, own, label in each(targets, np.asarray(predictions.logits), predictions.label)
    }


def details(targets: Targets, predictions: Any, calibrations: Calibrations) -> dict[str, dict[str, Any]]:
    """Returns {target: `Target.details`} of predictions."""
    return {
        target.field.name: target.details(own, label, calibrations.get(target.field.name, {}))
        for target, own, label in each(targets, np.asarray(predictions.logits), predictions.label)
    }


def calibrate(targets: Targets, predictions: Any) -> dict[str, dict[str, Any]]:
    """Returns {target: calibration} fitted to predictions, without the targets that need none."""
    fitted = {
        target.field.name: target.calibrate(own, label)
        for target, own, label in each(targets, np.asarray(predictions.logits), predictions.label)
    }
    return {name: calibration for name, calibration in fitted.items() if calibration}


def full_name(targets: Targets, target: str, metric: str) -> str:
    """Returns the name of a target's metric: METRIC if there is one target, else TARGET.METRIC."""
    return metric if len(targets) == 1 else f"{target}.{metric}"


def flat_scores(targets: Targets, found: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """Returns {full name: value} of the defined scores."""
    return {
        full_name(targets, target, metric): value
        for target, own in found.items()
        for metric, value in own.items()
        if value is not None
    }


def find_metric(targets: Targets, name: str) -> str:
    """Returns the full name of the metric that chooses the best checkpoint: `name`, or the first target's default.

    Raises UserError if no target has such a metric.
    """
    if not name:
        return full_name(targets, targets[0].field.name, targets[0].default_metric)
    known = [full_name(targets, target.field.name, metric) for target in targets for metric in target.metrics]
    if name in known:
        return name
    metric = name.rpartition(".")[2].casefold()
    same = [full for full in known if full.rpartition(".")[2].casefold() == metric]  # with or without a target's name
    longer = [full for full in known if full.casefold().startswith(name.casefold())]  # f1_macro for f1
    longer += [full for full in known if metric and full.rpartition(".")[2].casefold().startswith(metric)]
    matches = (
        difflib.get_close_matches(name, same, 1, cutoff=0) or longer[:1] or difflib.get_close_matches(name, known, 1)
    )
    hint = f"did you mean '{matches[0]}'?" if matches else f"there are {shortened(known, 5)}"
    raise UserError(f"no target has the metric '{name}' of best_metric; {hint}")


def score_of(metric: str, values: Mapping[str, float]) -> float | None:
    """Returns a metric's value, negated if lower is better, so that the highest is the best; None if undefined.

    metric: its full name. values: by full name.
    """
    value = values.get(metric)
    if value is None:
        return None
    return -value if metric.rpartition(".")[2] in LOWER_IS_BETTER else value


def value_of_score(metric: str, score: float) -> float:
    """Inverts score_of: returns the metric's value."""
    return -score if metric.rpartition(".")[2] in LOWER_IS_BETTER else score


def format_metric(metric: str, value: float | None) -> str:
    """Returns a metric's value for display: a percentage, except for errors and losses."""
    if value is None:
        return "undefined"
    name = metric.rpartition(".")[2]
    if name in ("mae", "rmse", "r2", "log_loss", "loss", "brier"):
        return f"{value:.4g}"
    return f"{value:.2%}" if name == "accuracy" else f"{value:.1%}"
