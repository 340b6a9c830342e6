"""Derives image size, length and rates of a run from its data: one rule in place of a search.

The rule is BiT's hyper-rule (Kolesnikov et al. 2020, *Big Transfer*, and its bit_hyperrule.py) with smaller
batches. The length is counted in images, so that it does not depend on the batch size. docs/recipes.md lists the other
differences.
"""

import math
from typing import Any

from ml_collections import ConfigDict

from jaxft.config import auto_keys
from jaxft.data.dataset import Dataset

SMALL_AREA = 96 * 96  # pixels of an image up to which it is small
SMALL_IMAGE_SIZE, IMAGE_SIZE = 128, 224
BATCH = 64  # the rule is for batches of this many images
STEPS = ((20_000, 500), (500_000, 10_000), (math.inf, 20_000))  # for fewer training images than the first number
EPOCHS = (8, 30)  # least and most
WARMUP = 0.1  # fraction of the epochs
LEARNING_RATE = 0.005  # of a batch of BATCH images
MIXUP_FROM, MIXUP = 20_000, 0.1  # training images, alpha


def resolve_auto(config: ConfigDict, train_data: Dataset) -> ConfigDict:
    """Returns a copy with numbers in place of config.AUTO.

    A batch_size of 0 stays, and so does a learning rate that follows from it.
    """
    config = ConfigDict(config.to_dict())
    train_size, height, width, _ = train_data.image.shape
    rules: dict[str, Any] = {
        "num_epochs": lambda: num_epochs(train_size),
        "image_size": lambda: SMALL_IMAGE_SIZE if height * width <= SMALL_AREA else IMAGE_SIZE,
        "augment.mixup": lambda: MIXUP if train_size >= MIXUP_FROM else 0.0,
        "optimizer.warmup_epochs": lambda: WARMUP * config.num_epochs,
        "optimizer.learning_rate": lambda: LEARNING_RATE * config.batch_size / BATCH,
    }
    if not config.batch_size:
        del rules["optimizer.learning_rate"]
    for key in (key for key in auto_keys(config) if key in rules):
        config.update_from_flattened_dict({key: rules[key]()})
    return config


def num_epochs(train_size: int) -> int:
    """Returns the epochs in which the rule's number of images has been seen, within EPOCHS."""
    steps = next(steps for limit, steps in STEPS if train_size < limit)
    low, high = EPOCHS
    return min(max(round(steps * BATCH / train_size), low), high)
