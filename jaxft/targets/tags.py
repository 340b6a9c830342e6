"""Tags, any number per image: loss, counts on the device, scores and display, in the order of their use."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.data.batches import Array
from jaxft.data.fields import Field
from jaxft.targets import metrics
from jaxft.targets.calibration import DEFAULT_THRESHOLD, fit_temperature, fit_thresholds, sigmoid
from jaxft.targets.target import Calibration, Counts


class Tags(NamedTuple):
    """The tags of one image."""

    tags: tuple[str, ...]  # those whose probability reaches their threshold, the most probable first
    probabilities: Mapping[str, float]  # of all tags

    def to_json(self) -> dict[str, Any]:
        return {"tags": list(self.tags), "probabilities": dict(self.probabilities)}

    def __str__(self) -> str:
        return ", ".join(f"{tag} {self.probabilities[tag]:.1%}" for tag in self.tags) or "no tag"


@dataclass(frozen=True)
class TagsTarget:
    """Tags with a sigmoid for each; an image's unknown tags (-1) do not count."""

    field: Field
    label_smoothing: float = 0.0  # moves labels from 0 and 1 towards 1/2 by this fraction
    positive_weights: tuple[float, ...] = ()  # of tags that are present, as pos_weight in torch; (): all 1

    default_metric: ClassVar[str] = "mAP"
    metrics: ClassVar[tuple[str, ...]] = metrics.TAG_METRICS

    def known(self, label: np.ndarray) -> np.ndarray:
        """Returns which images have a label of any tag, bool (N,)."""
        return np.any(label >= 0, axis=-1)

    def loss(self, logits: Array, label: Array) -> tuple[jax.Array, jax.Array]:
        """Returns the summed loss and the number of the known tags of each image (B,).

        Their quotient over a batch is the mean of torch.nn.functional.binary_cross_entropy_with_logits.
        """
        known = label >= 0
        goal = jnp.where(known, label, 0) * (1 - self.label_smoothing) + self.label_smoothing / 2
        losses = binary_cross_entropy(logits, goal, jnp.array(self.positive_weights or 1.0, jnp.float32))
        return (losses * known).sum(-1), known.sum(-1).astype(jnp.float32)

    def count_batch(self, logits: Array, label: Array, mask: Array) -> Counts:
        """Counts tags of images: a mean is over all known tags of all images."""
        known = label >= 0
        losses = binary_cross_entropy(logits, jnp.where(known, label, 0), jnp.float32(1))
        correct = (logits > 0) == (label > 0)
        known = known * mask[:, None]
        return Counts((losses * known).sum(), (correct * known).sum(), known.sum())

    def distillation_loss(self, logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
        """Returns the mean over tags of the KL divergence (B,) of the softened probabilities, times temperature^2."""
        student, teacher = logits / temperature, teacher_logits / temperature
        share = jax.nn.sigmoid(teacher)
        positive = share * (jax.nn.log_sigmoid(teacher) - jax.nn.log_sigmoid(student))
        negative = (1 - share) * (jax.nn.log_sigmoid(-teacher) - jax.nn.log_sigmoid(-student))
        return temperature**2 * (positive + negative).mean(-1)

    def outputs(self, logits: Any, calibration: Calibration) -> Any:
        scaled = logits / calibration.get("temperature", 1.0)
        return jax.nn.sigmoid(scaled) if isinstance(logits, jax.Array) else sigmoid(np.asarray(scaled, np.float64))

    def thresholds(self, calibration: Calibration) -> np.ndarray:
        return np.asarray(calibration.get("thresholds") or [DEFAULT_THRESHOLD] * len(self.field.names), np.float64)

    def scores(self, logits: np.ndarray, label: np.ndarray, calibration: Calibration) -> dict[str, float | None]:
        return metrics.tag_metrics(self.outputs(logits, calibration), label, self.thresholds(calibration))

    def details(self, logits: np.ndarray, label: np.ndarray, calibration: Calibration) -> dict[str, Any]:
        arguments = self.outputs(logits, calibration), label, self.thresholds(calibration)
        per_tag = metrics.per_tag(*arguments)
        rows = {
            tag: {key: values[i] for key, values in per_tag.items()} | {"threshold": float(arguments[2][i])}
            for i, tag in enumerate(self.field.names)
        }
        intervals = metrics.tag_intervals(*arguments)
        return {"num_images": int(self.known(label).sum()), "intervals": intervals, "per_tag": rows}

    def calibrate(self, logits: np.ndarray, label: np.ndarray) -> dict[str, Any]:
        """Fits one temperature, and for each tag the threshold of the highest F1."""
        temperature = fit_temperature(logits, label, "tags")
        probabilities = self.outputs(logits, {"temperature": temperature})
        return {"temperature": temperature, "thresholds": fit_thresholds(probabilities, label)}

    def prediction(self, output: np.ndarray, calibration: Calibration, top_k: int) -> Tags:
        """Returns the tags of one image. top_k is for classes; all tags are returned."""
        order = np.argsort(-output, kind="stable")
        reached = output >= self.thresholds(calibration)
        names = self.field.names
        return Tags(tuple(names[i] for i in order if reached[i]), {names[i]: float(output[i]) for i in order})


def binary_cross_entropy(logits: Array, label: Array, positive_weight: Array) -> Any:
    """Returns the loss of each cell, as torch.nn.functional.binary_cross_entropy_with_logits."""
    positive = -positive_weight * jax.nn.log_sigmoid(logits) * label
    return positive - jax.nn.log_sigmoid(-logits) * (1 - label)


def balanced_tag_weights(label: np.ndarray) -> tuple[float, ...]:
    """Returns negatives / positives of each tag, which gives both the same weight in the loss. label: (N, T)."""
    positives, negatives = ((label == value).sum(0) for value in (1, 0))
    return tuple((np.maximum(negatives, 1) / np.maximum(positives, 1)).tolist())
