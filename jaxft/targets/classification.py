"""Single-label classification: the head, the loss, counts, predictions and scores."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jaxft.data.batches import Array
from jaxft.models.heads import linear_init


@struct.dataclass
class Counts:
    """Sums over pictures, to be divided once on the host."""

    loss: Array
    correct: Array
    num_images: Array


@struct.dataclass
class Predictions:
    """What the network says of each picture (B,), beside the truth."""

    label: Array  # int32
    predicted: Array  # int32, the class of the highest logit
    confidence: Array  # its probability
    rank: Array  # int32, of the label among the logits: 0 where the prediction is right
    loss: Array


def predictions_from_logits(logits: Array, label: Array) -> Predictions:
    own = jnp.take_along_axis(logits, label[:, None], axis=-1)
    before = jnp.arange(logits.shape[-1]) < label[:, None]  # argmax takes the first of equals
    return Predictions(
        label=label,
        predicted=logits.argmax(-1).astype(jnp.int32),
        confidence=jax.nn.softmax(logits).max(-1),
        rank=((logits > own) | ((logits == own) & before)).sum(-1, dtype=jnp.int32),
        loss=optax.softmax_cross_entropy_with_integer_labels(logits, label),
    )


def count_batch(logits: Array, label: Array, mask: Array) -> Counts:
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    correct = logits.argmax(-1) == label
    return Counts((loss * mask).sum(), (correct * mask).sum(), mask.sum())


def count_predictions(predictions: Predictions) -> Counts:
    """On the host, of predictions without padding."""
    loss, correct = np.sum(predictions.loss, dtype=np.float64), np.sum(predictions.rank == 0)
    return Counts(np.asarray(loss), np.asarray(correct), np.asarray(len(predictions.label)))


def cross_entropy(
    logits: Array, label: Array, label_smoothing: float = 0.0, class_weights: tuple[float, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Of each picture (B,): its loss, weighted by its class, and that weight; as torch.nn.functional.cross_entropy."""
    log_probabilities = jax.nn.log_softmax(logits)
    weights = jnp.array(class_weights or (1.0,) * logits.shape[-1], log_probabilities.dtype)
    own = -jnp.take_along_axis(log_probabilities, label[:, None], axis=-1)[:, 0] * weights[label]
    loss = (1 - label_smoothing) * own
    if label_smoothing:
        loss -= label_smoothing * (log_probabilities * weights).mean(-1)
    return loss, weights[label]


TOP_K = (3, 5)  # told where there are at least twice as many classes


CALIBRATION_BINS = 15


def wilson_interval(correct: int, num_images: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy (Wilson 1927), which stays within [0, 1] for few pictures too."""
    z = 1.959963984540054
    centre = (correct + z**2 / 2) / (num_images + z**2)
    half = z / (num_images + z**2) * math.sqrt(correct * (num_images - correct) / num_images + z**2 / 4)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def confusion_matrix(predictions: Predictions, num_classes: int) -> np.ndarray:
    """int64 (num_classes, num_classes): rows are the truth, columns the prediction."""
    pairs = np.asarray(predictions.label, np.int64) * num_classes + predictions.predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


class Calibration(NamedTuple):
    """Of the pictures in each of CALIBRATION_BINS equal bins of confidence; 0 in an empty bin."""

    num_images: np.ndarray
    confidence: np.ndarray  # mean
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599)."""
        return float((self.num_images * np.abs(self.confidence - self.accuracy)).sum() / self.num_images.sum())


def calibration(predictions: Predictions) -> Calibration:
    confidence = np.asarray(predictions.confidence, np.float64)
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    num_images, confidences, correct = (
        np.bincount(bins, weights, CALIBRATION_BINS) for weights in (None, confidence, predictions.rank == 0)
    )
    divisor = np.maximum(num_images, 1)
    return Calibration(num_images, confidences / divisor, correct / divisor)


def evaluation_summary(predictions: Predictions, class_names: Sequence[str]) -> dict[str, Any]:
    """Everything that one evaluation says, ready for JSON; a class without pictures has accuracy None."""
    num_images, correct = len(predictions.label), int((predictions.rank == 0).sum())
    matrix = confusion_matrix(predictions, len(class_names))
    of_class = matrix.sum(1)
    per_class = [int(matrix[i, i]) / int(of_class[i]) if of_class[i] else None for i in range(len(class_names))]
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
        "expected_calibration_error": calibration(predictions).error,
        "confusion_matrix": matrix.tolist(),
    }


def replace_head(variables: Mapping[str, Any], num_classes: int, rng: jax.Array) -> dict[str, Any]:
    """The same variables with a new dense head, initialised as torch's nn.Linear; everything else is untouched."""
    features = variables["params"]["fc"]["kernel"].shape[0]
    kernel_rng, bias_rng = jax.random.split(rng)
    init = linear_init(features)
    head = {"kernel": init(kernel_rng, (features, num_classes)), "bias": init(bias_rng, (num_classes,))}
    return {**variables, "params": {**variables["params"], "fc": head}}


def balanced_class_weights(label: np.ndarray, num_classes: int) -> tuple[float, ...]:
    """N / (C n_c) for a class of n_c pictures: the classes' weights as sklearn's class_weight="balanced" has them."""
    counts = np.maximum(np.bincount(label, minlength=num_classes), 1)
    return tuple((len(label) / (num_classes * counts)).tolist())
