"""Three targets, many of whose labels are missing, and their loss in torch."""

from typing import Any

import numpy as np

from jaxft.data.fields import Field
from jaxft.targets.classification import ClassTarget
from jaxft.targets.number import NumberTarget
from jaxft.targets.tags import TagsTarget
from tests.helpers.reference import torch

SMOOTHING = 0.1
CLASS_WEIGHTS, TAG_WEIGHTS = (0.5, 1.0, 2.0, 0.25), (2.0, 1.0, 1.0, 0.5, 4.0)  # exact in float32
CLASS = ClassTarget(Field("class", "species", "species", 2.0, tuple("abcd")), SMOOTHING, CLASS_WEIGHTS)
TAGS = TagsTarget(Field("tags", "tags", "tags", 0.5, tuple("pqrst")), SMOOTHING, TAG_WEIGHTS)
NUMBER = NumberTarget(Field("number", "age", "age", 0.25, mean=40.0, std=12.0))
TARGETS = (CLASS, TAGS, NUMBER)  # ten columns of the head


def random_labels(num_images: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns labels of TARGETS; about a third of them are missing."""
    rng = np.random.default_rng(seed)
    missing = rng.random(num_images) < 1 / 3
    return {
        "species": np.where(rng.random(num_images) < 1 / 3, -1, rng.integers(4, size=num_images)).astype(np.int32),
        "tags": rng.integers(-1, 2, (num_images, 5)).astype(np.int8),
        "age": np.where(missing, np.nan, rng.normal(size=num_images)).astype(np.float32),
    }


def joint_loss(logits: torch.Tensor, label: dict[str, np.ndarray]) -> Any:
    """Returns the sum of the means of torch's losses over the known labels, by the weights of TARGETS.

    A number without any label in the batch adds nothing.
    """
    functional = torch.nn.functional
    classes = torch.from_numpy(label["species"]).long()
    weight = torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
    total: Any = CLASS.field.weight * functional.cross_entropy(
        logits[:, :4], classes, weight, ignore_index=-1, label_smoothing=SMOOTHING
    )
    known = label["tags"] >= 0
    goal = torch.from_numpy(label["tags"][known].astype(np.float64)) * (1 - SMOOTHING) + SMOOTHING / 2
    pos_weight = torch.tensor(TAG_WEIGHTS, dtype=torch.float64).expand(len(known), 5)[known]
    total += TAGS.field.weight * functional.binary_cross_entropy_with_logits(
        logits[:, 4:9][known], goal, pos_weight=pos_weight
    )
    if (known := ~np.isnan(label["age"])).any():
        value = torch.from_numpy(label["age"][known].astype(np.float64))
        total += NUMBER.field.weight * functional.mse_loss(logits[known, 9], value)
    return total
