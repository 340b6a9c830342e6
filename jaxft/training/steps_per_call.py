"""Chooses how many batches the devices get in one call, and stacks them."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxft.data.batches import Batch, Examples
from jaxft.data.loader import Loader
from jaxft.models.network import Network
from jaxft.ops.formulation import on_cpu

# NOTES: Several steps per call (docs/notes/memory.md)
MOST = 8  # batches per call on a CPU
WORK = 6e11  # multiply-adds per call on a CPU: some seconds on two cores, for which Ctrl-C has to wait

# NOTES: Thresholds without a measurement (docs/notes/memory.md)
STEPS_AHEAD = 2  # calls that the host launches before it waits for their results


class StepsPerCall(NamedTuple):
    """Settings of a run's calls of its mapped steps. Each number of stacked batches is compiled separately."""

    steps: int = 1  # batches per call
    padded: bool = False  # pad shorter calls to `steps` and pass their length, instead of compiling for 1 as well
    ahead: int = STEPS_AHEAD

    def scan_length(self, num_steps: int) -> np.int32 | None:
        """Returns the length argument of `scan_prefix`: traced for padded calls, else None (static)."""
        return np.int32(num_steps) if self.padded else None


def choose_steps_per_call(config: ConfigDict, model: Network, *, train: bool) -> StepsPerCall:
    """Chooses several steps per call on a CPU, where every call allocates a step's memory and the kernel zeroes it.

    Accelerators take config.steps_per_call, or 1: loops of static length are faster there. They train STEPS_AHEAD
    calls ahead of the host; a CPU does not, because signals have to wait for the calls that were launched.
    """
    if not on_cpu(model.formulation):
        return StepsPerCall(config.steps_per_call or 1)
    forward = model.multiply_adds(config.image_size) * config.batch_size
    automatic = int(min(max(WORK / (3 * forward if train else forward), 1), MOST))
    return StepsPerCall(config.steps_per_call or automatic, padded=True, ahead=0 if train else STEPS_AHEAD)


def stack_batches(
    batches: Iterator[Batch], number: int, per_call: StepsPerCall, *, first: bool = False
) -> Iterator[tuple[Batch, int]]:
    """Yields the next `number` batches stacked into calls (devices, K, B), each with its count without padding.

    With padding, K is always per_call.steps; without, it is that or 1. first: the first padded call runs a single step,
    so that progress shows early.
    """
    while number:
        count = min(number, per_call.steps)
        single = first if per_call.padded else count < per_call.steps
        count = 1 if single else count
        call = list(islice(batches, count))
        padding = [call[-1]] * (per_call.steps - count) if per_call.padded else []
        yield jax.tree.map(lambda *arrays: np.stack(arrays, 1), *call, *padding), count
        number, first = number - count, False


def abstract_calls(
    loader: Loader, batch_size: int, numbers: Sequence[int], per_call: StepsPerCall
) -> list[tuple[Examples | None, Batch, np.int32 | None]]:
    """Returns (examples, stacked batches, num_steps) of each program that calls of `stack_batches` need.

    The batches are only shapes and dtypes. numbers: the numbers of batches that will be stacked.
    """
    full = per_call.padded or any(number >= per_call.steps for number in numbers)
    single = not per_call.padded and any(number % per_call.steps for number in numbers)
    lengths = [per_call.steps] * full + [1] * single
    batch = loader.blank_batch(batch_size)

    def stacked(steps: int) -> Batch:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((len(a), steps, *a.shape[1:]), a.dtype), batch)

    return [(loader.examples, stacked(steps), per_call.scan_length(1)) for steps in lengths]
