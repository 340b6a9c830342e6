"""A number, standardised inside and shown in its unit: loss, counts on the device, scores and display."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.data.batches import Array
from jaxft.data.fields import Field
from jaxft.targets import metrics
from jaxft.targets.target import Calibration, Counts


class Number(NamedTuple):
    """The number predicted for one image, in the unit of the labels."""

    value: float

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value}

    def __str__(self) -> str:
        return f"{self.value:.4g}"


@dataclass(frozen=True)
class NumberTarget:
    """A number with a squared error; images without a label (NaN) do not count."""

    field: Field

    default_metric: ClassVar[str] = "mae"
    metrics: ClassVar[tuple[str, ...]] = metrics.NUMBER_METRICS

    def known(self, label: np.ndarray) -> np.ndarray:
        return ~np.isnan(label)

    def loss(self, logits: Array, label: Array) -> tuple[jax.Array, jax.Array]:
        """Returns the squared error of the standardised number (B,) and its weight (B,)."""
        known = ~jnp.isnan(label)
        error = jnp.where(known, logits[:, 0] - jnp.where(known, label, 0), 0)
        return error**2, known.astype(jnp.float32)

    def count_batch(self, logits: Array, label: Array, mask: Array) -> Counts:
        """Sums the squared errors; nothing is correct or wrong."""
        losses, known = self.loss(logits, label)
        return Counts((losses * mask).sum(), jnp.zeros(()), (known * mask).sum())

    def distillation_loss(self, logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
        """Returns the squared difference from the teacher (B,); the temperature has no meaning here."""
        return (logits[:, 0] - teacher_logits[:, 0]) ** 2

    def outputs(self, logits: Any, calibration: Calibration) -> Any:
        standardised = logits[:, 0] if isinstance(logits, jax.Array) else np.asarray(logits[:, 0], np.float64)
        return standardised * self.field.std + self.field.mean

    def values(self, label: np.ndarray) -> np.ndarray:
        """Returns the labels (N,) in their unit."""
        return np.asarray(label, np.float64) * self.field.std + self.field.mean

    def scores(self, logits: np.ndarray, label: np.ndarray, calibration: Calibration) -> dict[str, float | None]:
        return metrics.number_metrics(*self._known(logits, label))

    def details(self, logits: np.ndarray, label: np.ndarray, calibration: Calibration) -> dict[str, Any]:
        predicted, value = self._known(logits, label)
        return {"num_images": len(value), "intervals": metrics.number_intervals(predicted, value)}

    def calibrate(self, logits: np.ndarray, label: np.ndarray) -> dict[str, Any]:
        return {}

    def prediction(self, output: np.ndarray, calibration: Calibration, top_k: int) -> Number:
        return Number(float(output))

    def _known(self, logits: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the predictions and the labels of images that have one, in their unit."""
        known = self.known(label)
        return self.outputs(logits[known], {}), self.values(label[known])
