"""Derives what a config leaves open: from the pretrained weights, or from the data by one rule in place of a search.

The rule is BiT's hyper-rule (Kolesnikov et al. 2020, *Big Transfer*, and its bit_hyperrule.py) with smaller
batches. The length is counted in images, so that it does not depend on the batch size. docs/recipes.md lists the other
differences.
"""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxft.config import auto_keys, check_sizes, keys_from_weights
from jaxft.data.dataset import Dataset
from jaxft.errors import UserError
from jaxft.models.network import Network, options_of

SMALL_AREA = 96 * 96  # pixels of an image up to which it is small
SMALL_IMAGE_SIZE, IMAGE_SIZE = 128, 224
BATCH = 64  # the rule is for batches of this many images
STEPS = ((20_000, 500), (500_000, 10_000), (math.inf, 20_000))  # for fewer training images than the first number
EPOCHS = (8, 30)  # least and most
WARMUP = 0.1  # fraction of the epochs
LEARNING_RATE = 0.005  # of a batch of BATCH images
MIXUP_FROM, MIXUP = 20_000, 0.1  # training images, alpha


def resolve_from_weights(config: ConfigDict, provenance: Mapping[str, Any] | None) -> ConfigDict:
    """Returns a copy with the weights' values in place of config.FROM_WEIGHTS; None means random weights.

    An image_size of 0 and options of the network stay if the provenance lacks them. Raises UserError if model.arch is
    auto without weights, or if the sizes contradict each other.
    """
    config = ConfigDict(config.to_dict())
    if provenance is None and config.model.arch == "auto":
        raise UserError("model.arch is auto, which means that of the weights; set --config.model.pretrained too")
    found: dict[str, Any] = {key: value for key, value in (provenance or {}).items() if value is not None}
    found |= found.get("preprocessing", {})  # of a run
    size, resize = found.get("image_size"), found.get("resize")
    values = {f"model.{key}": found[key] for key in config.model if key in found}
    values |= {"image_size": size or 0, "data.interpolation": found.get("interpolation", "bilinear")}
    keys = keys_from_weights(config)
    for key in (key for key in keys if key in values):
        config.update_from_flattened_dict({key: values[key]})
    if "data.resize" in keys:
        config.data.resize = round(resize * config.image_size / size) if size and resize else 0
    check_sizes(config)
    return config


def resolve_options(config: ConfigDict, model: Network) -> ConfigDict:
    """Returns a copy with the model's values of the options that neither the config nor the weights set."""
    config, options = ConfigDict(config.to_dict()), options_of(model)
    for key in keys_from_weights(config):
        section, _, option = key.rpartition(".")
        if section == "model" and option in options:
            config.model[option] = options[option]
    return config


def resolve_auto(config: ConfigDict, train_data: Dataset) -> ConfigDict:
    """Returns a copy with numbers in place of config.AUTO.

    A batch_size of 0 stays, and so does a learning rate that follows from it.
    """
    config = ConfigDict(config.to_dict())
    train_size, height, width, _ = train_data.image.shape
    mixable = all(field.kind != "number" for field in train_data.fields)
    rules: dict[str, Any] = {
        "num_epochs": lambda: num_epochs(train_size),
        "image_size": lambda: SMALL_IMAGE_SIZE if height * width <= SMALL_AREA else IMAGE_SIZE,
        "augment.mixup": lambda: MIXUP if train_size >= MIXUP_FROM and mixable else 0.0,
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
