"""A class, one of several: head, loss, counts on the device, scores and display, in the order of their use."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jaxft.data.batches import Array
from jaxft.data.fields import Field
from jaxft.models.heads import get_head, linear_init, set_head
from jaxft.targets import metrics
from jaxft.targets.calibration import fit_temperature, softmax
from jaxft.targets.metrics import CALIBRATION_BINS, calibration_bin
from jaxft.targets.target import Calibration, Counts

TOP_K = (3, 5)  # reported if there are at least twice as many classes

# ---- head ----


def replace_head(
    variables: Mapping[str, Any], num_classes: int, rng: jax.Array, path: tuple[str, ...]
) -> dict[str, Any]:
    """Returns the variables with a new dense head, initialised like torch's nn.Linear; the rest is unchanged.

    path: the network's `head`.
    """
    features = get_head(variables["params"], path)["kernel"].shape[0]
    kernel_rng, bias_rng = jax.random.split(rng)
    init = linear_init(features)
    head = {"kernel": init(kernel_rng, (features, num_classes)), "bias": init(bias_rng, (num_classes,))}
    return {**variables, "params": set_head(variables["params"], path, head)}


# ---- loss ----


def cross_entropy(
    logits: Array, label: Array, label_smoothing: float = 0.0, class_weights: tuple[float, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted loss of each image (B,) and its weight (B,), as in torch.nn.functional.cross_entropy."""
    log_probabilities = jax.nn.log_softmax(logits)
    weights = jnp.array(class_weights or (1.0,) * logits.shape[-1], log_probabilities.dtype)
    own = -jnp.take_along_axis(log_probabilities, label[:, None], axis=-1)[:, 0] * weights[label]
    loss = (1 - label_smoothing) * own
    if label_smoothing:
        loss -= label_smoothing * (log_probabilities * weights).mean(-1)
    return loss, weights[label]


def balanced_class_weights(label: np.ndarray, num_classes: int) -> tuple[float, ...]:
    """Returns N / (C n_c) for each class c with n_c images, as in sklearn's class_weight="balanced"."""
    counts = np.maximum(np.bincount(label, minlength=num_classes), 1)
    return tuple((len(label) / (num_classes * counts)).tolist())


# ---- counts and predictions, on the device ----


@struct.dataclass
class Predictions:
    """Per-image predictions and labels, each of shape (B,)."""

    label: Array  # int32
    predicted: Array  # int32, the class of the highest logit
    confidence: Array  # probability of the predicted class
    rank: Array  # int32, position of the label among the sorted logits: 0 if the prediction is right
    loss: Array
    logits: Array | None = None  # float32 (B, num_classes); files of evaluations lack them


def count_batch(logits: Array, label: Array, mask: Array) -> Counts:
    """Sums loss and correct predictions over the images whose mask is 1."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    correct = logits.argmax(-1) == label
    return Counts((loss * mask).sum(), (correct * mask).sum(), mask.sum())


def predictions_from_logits(logits: Array, label: Array) -> Predictions:
    own = jnp.take_along_axis(logits, label[:, None], axis=-1)
    before = jnp.arange(logits.shape[-1]) < label[:, None]  # argmax takes the first of equal logits
    return Predictions(
        label=label,
        predicted=logits.argmax(-1).astype(jnp.int32),
        confidence=jax.nn.softmax(logits).max(-1),
        rank=((logits > own) | ((logits == own) & before)).sum(-1, dtype=jnp.int32),
        loss=optax.softmax_cross_entropy_with_integer_labels(logits, label),
        logits=logits,
    )


# ---- scores, on the host ----


def count_predictions(predictions: Predictions) -> Counts:
    """Computes the counts of predictions, which must not include padding."""
    loss, correct = np.sum(predictions.loss, dtype=np.float64), np.sum(predictions.rank == 0)
    return Counts(np.asarray(loss), np.asarray(correct), np.asarray(len(predictions.label)))


def evaluation_summary(predictions: Predictions, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns all scores of an evaluation, ready for JSON; a class without images has accuracy None."""
    num_images, correct = len(predictions.label), int((predictions.rank == 0).sum())
    matrix = confusion_matrix(predictions, len(class_names))
    class_sizes = matrix.sum(1)
    per_class = [int(matrix[i, i]) / int(size) if size else None for i, size in enumerate(class_sizes)]
    return {
        "pictures": num_images,
        "correct": correct,
        "accuracy": correct / num_images,
        "accuracy_interval": wilson_interval(correct, num_images),
        "loss": float(np.sum(predictions.loss, dtype=np.float64)) / num_images,
        "top_k_accuracy": {
            str(k): int((predictions.rank < k).sum()) / num_images for k in TOP_K if 2 * k <= len(class_names)
        },
        "mean_per_class_accuracy": float(np.mean([accuracy for accuracy in per_class if accuracy is not None])),
        "per_class_accuracy": dict(zip(class_names, per_class, strict=True)),
        "expected_calibration_error": reliability(predictions).error,
        "confusion_matrix": matrix.tolist(),
    }


def wilson_interval(correct: int, num_images: int) -> tuple[float, float]:
    """Returns the 95 % interval of an accuracy (Wilson 1927), which lies within [0, 1] even for few images."""
    z = 1.959963984540054
    centre = (correct + z**2 / 2) / (num_images + z**2)
    half = z / (num_images + z**2) * math.sqrt(correct * (num_images - correct) / num_images + z**2 / 4)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def confusion_matrix(predictions: Predictions, num_classes: int) -> np.ndarray:
    """Returns int64 (num_classes, num_classes): labels in rows, predictions in columns."""
    pairs = np.asarray(predictions.label, np.int64) * num_classes + predictions.predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


class Reliability(NamedTuple):
    """Statistics of the images in each of CALIBRATION_BINS equal bins of confidence; 0 in an empty bin."""

    num_images: np.ndarray
    confidence: np.ndarray  # mean
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599)."""
        return float((self.num_images * np.abs(self.confidence - self.accuracy)).sum() / self.num_images.sum())


def reliability(predictions: Predictions) -> Reliability:
    return bin_reliability(predictions.confidence, predictions.rank == 0)


def bin_reliability(confidence: Array, correct: Array) -> Reliability:
    """Returns the statistics of predictions with these probabilities (N,), and whether each was right (N,)."""
    confidence = np.asarray(confidence, np.float64)
    bins = calibration_bin(confidence)
    num_images, confidences, num_correct = (
        np.bincount(bins, weights, CALIBRATION_BINS) for weights in (None, confidence, correct)
    )
    divisor = np.maximum(num_images, 1)
    return Reliability(num_images, confidences / divisor, num_correct / divisor)


# ---- display ----


class Prediction(NamedTuple):
    """The most probable classes of one image."""

    label: str
    probability: float
    top_k: tuple[tuple[str, float], ...]  # labels and probabilities, the most probable first

    def to_json(self) -> dict[str, Any]:
        """Returns {"label", "probability", "top_k": [{"label", "probability"}, ...]}."""
        top_k = [{"label": label, "probability": probability} for label, probability in self.top_k]
        return {"label": self.label, "probability": self.probability, "top_k": top_k}

    def __str__(self) -> str:
        return f"{self.label} {self.probability:.1%}"


def rank(probabilities: np.ndarray, class_names: Sequence[str], top_k: int) -> Prediction:
    """Returns the `top_k` most probable classes of one image. probabilities: (num_classes,)."""
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    top = tuple((class_names[i], float(probabilities[i])) for i in order)
    return Prediction(*top[0], top)


def score_lines(scores: Mapping[str, Any]) -> list[str]:
    """Returns the scores of evaluation_summary as lines for a terminal, the accuracy first."""
    low, high = scores["accuracy_interval"]
    return [
        f"accuracy {scores['accuracy']:.2%} ({scores['correct']} of {scores['pictures']}), loss {scores['loss']:.4f}",
        f"95 % interval {low:.2%} to {high:.2%}",
        *(f"top-{k} accuracy {accuracy:.2%}" for k, accuracy in scores["top_k_accuracy"].items()),
        f"mean per-class accuracy {scores['mean_per_class_accuracy']:.2%}",
        f"expected calibration error {scores['expected_calibration_error']:.2%}",
    ]


def score_cards(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (value, meaning) of the scores that a report shows beside the accuracy."""
    return [
        *((f"{accuracy:.1%}", f"top-{k} accuracy") for k, accuracy in scores["top_k_accuracy"].items()),
        (f"{scores['mean_per_class_accuracy']:.1%}", "mean per-class accuracy"),
        (f"{scores['loss']:.3f}", "cross-entropy loss"),
        (f"{scores['expected_calibration_error']:.1%}", "expected calibration error"),
        (f"{scores['pictures']:,}", "test images"),
    ]


# ---- the target ----


@dataclass(frozen=True)
class ClassTarget:
    """One of several classes, with a softmax; images without a label (-1) do not count."""

    field: Field = Field("class", "label", "label")  # noqa: RUF009, immutable
    label_smoothing: float = 0.0  # as in torch's cross_entropy (Szegedy et al. 2016)
    class_weights: tuple[float, ...] = ()  # as in torch's cross_entropy; (): all 1

    default_metric: ClassVar[str] = "accuracy"
    metrics: ClassVar[tuple[str, ...]] = metrics.CLASS_METRICS

    def known(self, label: np.ndarray) -> np.ndarray:
        return label >= 0

    def loss(self, logits: Array, label: Array) -> tuple[jax.Array, jax.Array]:
        """Returns the weighted cross-entropy of each image (B,) and its weight (B,)."""
        known = label >= 0
        losses, weights = cross_entropy(logits, jnp.where(known, label, 0), self.label_smoothing, self.class_weights)
        return losses * known, weights * known

    def count_batch(self, logits: Array, label: Array, mask: Array) -> Counts:
        known = label >= 0
        return count_batch(logits, jnp.where(known, label, 0), mask * known)

    def distillation_loss(self, logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
        """Returns the KL divergence (B,) of the softened predictions, times temperature^2 to keep gradients' scale."""
        student, teacher = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher_logits))
        return temperature**2 * (jnp.exp(teacher) * (teacher - student)).sum(-1)

    def outputs(self, logits: Any, calibration: Calibration) -> Any:
        scaled = logits / calibration["temperature"] if "temperature" in calibration else logits
        return jax.nn.softmax(scaled) if isinstance(logits, jax.Array) else softmax(np.asarray(scaled, np.float64))

    def scores(self, logits: np.ndarray, label: np.ndarray, calibration: Calibration) -> dict[str, float | None]:
        return metrics.class_metrics(*self._known(logits, label, calibration))

    def details(self, logits: np.ndarray, label: np.ndarray, calibration: Calibration) -> dict[str, Any]:
        probabilities, label = self._known(logits, label, calibration)
        correct = int((probabilities.argmax(-1) == label).sum())
        accuracy = {"accuracy": wilson_interval(correct, len(label))} if len(label) else {}
        intervals = {**accuracy, **metrics.class_intervals(probabilities, label)}
        per_class = metrics.per_class(probabilities, label)
        rows = {name: {key: values[i] for key, values in per_class.items()} for i, name in enumerate(self.field.names)}
        return {"num_images": len(label), "intervals": intervals, "per_class": rows}

    def calibrate(self, logits: np.ndarray, label: np.ndarray) -> dict[str, Any]:
        """Fits one temperature (Guo et al. 2017)."""
        return {"temperature": fit_temperature(logits, label, "class")}

    def prediction(self, output: np.ndarray, calibration: Calibration, top_k: int) -> Prediction:
        return rank(output, self.field.names, top_k)

    def _known(self, logits: np.ndarray, label: np.ndarray, calibration: Calibration) -> tuple[np.ndarray, np.ndarray]:
        """Returns the probabilities and labels of images that have a label."""
        known = self.known(label)
        return self.outputs(logits[known], calibration), label[known]
