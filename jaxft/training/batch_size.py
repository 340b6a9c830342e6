"""Finds the largest batch that fits into a device's memory, according to XLA's memory analysis of a step."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np

from jaxft.data.batches import Batch, Examples
from jaxft.data.dataset import Dataset
from jaxft.data.loader import ResidentLoader
from jaxft.errors import UserError

PROBES = (8, 32)  # images per device
LEAST_STEPS = 10  # in an epoch

# NOTES: Thresholds without a measurement (docs/notes/memory.md)
MEMORY_SHARE = 0.7  # of a device's memory that training may take; allocations are never packed tightly


def largest_batch_size(
    compile_step: Callable[[Examples, Batch], Any], data: Dataset, device_memory: int, resident: int
) -> int:
    """Returns the largest batch size over all devices, and prints it.

    It is a power of two on each device and leaves at least LEAST_STEPS in an epoch. compile_step: compiles a train step
    for abstract examples. device_memory, resident: bytes of each device, in total and for resident images. Raises
    UserError if not even one image fits.
    """
    # NOTES: Estimated memory of a step (docs/notes/memory.md)
    devices = jax.device_count()

    @cache
    def bytes_of(share: int) -> int:
        """Returns the bytes of a step on one device that holds only this batch's images."""
        size = share * devices
        image = jax.ShapeDtypeStruct((size, *data.image.shape[1:]), np.uint8)
        examples = jax.eval_shape(Examples.packed, image, jax.ShapeDtypeStruct((size,), np.int32))
        (batch,) = ResidentLoader(examples).batches(np.arange(size), size)
        memory = compile_step(examples, jax.tree.map(lambda array: array[:, None], batch)).memory_analysis()
        arguments_and_results = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return int(arguments_and_results + memory.temp_size_in_bytes)

    at_most = max(len(data.label) // LEAST_STEPS // devices, 1)
    share = largest_share(bytes_of, MEMORY_SHARE * device_memory - resident, at_most)
    needed, available = bytes_of(share) / 2**30, device_memory / 2**30
    print(
        f"batch    {share * devices} images; a step needs {needed:.1f} GiB of each device's {available:.1f}",
        flush=True,
    )
    return share * devices


def largest_share(bytes_of: Callable[[int], int], memory: float, at_most: int) -> int:
    """Returns the largest power of two, up to `at_most`, for which bytes_of(images per device) <= memory.

    bytes_of compiles a step. It grows about linearly, so two values predict the others, and only the chosen one is
    checked. Raises UserError if not even one image fits.
    """
    low, high = (bytes_of(share) for share in PROBES)
    per_image = max(high - low, 1) / (PROBES[1] - PROBES[0])
    share = 1
    while 2 * share <= at_most and high + per_image * (2 * share - PROBES[1]) <= memory:
        share *= 2
    while share > 1 and bytes_of(share) > memory:
        share //= 2
    if share == 1 and bytes_of(1) > memory:
        raise UserError(
            f"a training step needs {bytes_of(1) / 2**30:.1f} GiB for one image, and "
            f"{memory / 2**30:.1f} GiB are available; use a smaller image_size or model.arch, or model.remat=True"
        )
    return share
