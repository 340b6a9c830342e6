"""The interface of a target (a class, tags or a number to predict) to the rest of the package."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from flax import struct

from jaxft.data.batches import Array
from jaxft.data.fields import Field

Calibration = Mapping[str, Any]  # {"temperature": T} and for tags also {"thresholds": [...]}; {}: not calibrated


@struct.dataclass
class Counts:
    """Sums over images, from which the host computes means at the end."""

    loss: Array
    correct: Array
    num_images: Array


class Target(Protocol):
    """A kind of prediction. It is static in jit; its arrays on the host are float64."""

    default_metric: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]

    @property
    def field(self) -> Field:
        """The labels that it predicts."""

    def known(self, label: np.ndarray) -> np.ndarray:
        """Returns which images have a label, bool (N,)."""

    def loss(self, logits: Array, label: Array) -> tuple[jax.Array, jax.Array]:
        """Returns the weighted loss of each image (B,) and its weight (B,), which is 0 without a label.

        logits: (B, field.num_outputs). The loss of a batch is the sum of the losses over the sum of the weights.
        """

    def count_batch(self, logits: Array, label: Array, mask: Array) -> Counts:
        """Sums the plain loss and the correct predictions over the labels of images whose mask is 1."""

    def distillation_loss(self, logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
        """Returns the distances (B,) of the predictions from those of a teacher."""

    def outputs(self, logits: Any, calibration: Calibration) -> Any:
        """Returns probabilities (N, C), or values (N,) in the number's unit; in NumPy or in a traced function."""

    def scores(self, logits: np.ndarray, label: np.ndarray, calibration: Calibration) -> dict[str, float | None]:
        """Returns each of `metrics` over the images that have a label; None if it is undefined."""

    def details(self, logits: np.ndarray, label: np.ndarray, calibration: Calibration) -> dict[str, Any]:
        """Returns {"num_images", "intervals": {metric: 95 % interval}, "per_class" or "per_tag": ...}, for JSON."""

    def calibrate(self, logits: np.ndarray, label: np.ndarray) -> dict[str, Any]:
        """Returns the calibration fitted to these images."""

    def prediction(self, output: np.ndarray, calibration: Calibration, top_k: int) -> Any:
        """Returns the prediction of one image for display. output: a row of `outputs`."""
