"""How many batches the devices are given in one call."""

from collections.abc import Iterator
from itertools import islice

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxft.data.batches import Batch
from jaxft.models.resnet import ResNet, multiply_adds
from jaxft.training.state import TrainState

MOST = 8  # batches a call on a CPU


WORK = 6e11  # multiply-adds a call on a CPU: some seconds on two cores, for which Ctrl-C has to wait


def batches_per_call(config: ConfigDict, model: ResNet, state: TrainState, *, train: bool) -> int:
    """On a CPU several: with each call it takes the step's memory from the kernel, which has to clear it first."""
    if config.steps_per_call or jax.default_backend() != "cpu":
        return config.steps_per_call or 1
    forward = multiply_adds(model, state.variables(), config.image_size) * config.batch_size
    return int(min(max(WORK / (3 * forward if train else forward), 1), MOST))


def stack_batches(
    batches: Iterator[Batch], number: int, per_call: int, *, first: bool = False
) -> Iterator[tuple[Batch, int]]:
    """The next `number` batches, several (devices, K, B) a call, and how many of these count.

    Each K is compiled: on a CPU one, of which any number may count, and at `first` a single one, to show soon that
    the work has begun; elsewhere, where loops of a known number of turns are faster, per_call or 1.
    """
    on_cpu = jax.default_backend() == "cpu"
    while number:
        count = min(number, per_call)
        if first if on_cpu else count < per_call:
            count = 1
        call = list(islice(batches, count))
        padding = [call[-1]] * (per_call - count) if on_cpu else []
        yield jax.tree.map(lambda *arrays: np.stack(arrays, 1), *call, *padding), count
        number, first = number - count, False


def scan_length(count: int) -> np.int32 | None:
    """As `scan_prefix` takes them: for calls of any number of batches, or of a known one."""
    return np.int32(count) if jax.default_backend() == "cpu" else None
