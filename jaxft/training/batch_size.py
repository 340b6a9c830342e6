"""The largest batch that a device's memory holds, by what XLA says that a training step needs."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np

from jaxft.data.batches import Batch, Examples
from jaxft.data.dataset import Dataset
from jaxft.data.loader import ResidentLoader
from jaxft.errors import UserError

PROBES = (8, 32)  # pictures a device


LEAST_STEPS = 10  # of an epoch


MEMORY_SHARE = 0.7  # of a device's memory that training may take; what it allocates is never packed tightly


def largest_batch_size(
    compile_step: Callable[[Examples, Batch], Any], data: Dataset, device_memory: int, resident: int
) -> int:
    """Over all devices; on each a power of two, such that an epoch has LEAST_STEPS at least. Says so on stdout.

    compile_step: a training step, for pictures by shape alone. device_memory, resident: bytes of each device, in all
    and for pictures that stay there. Raises UserError where not even one picture fits.
    """
    devices = jax.device_count()

    @cache
    def bytes_of(share: int) -> int:
        """On one device, with the pictures of this batch alone."""
        size = share * devices
        image = jax.ShapeDtypeStruct((size, *data.image.shape[1:]), np.uint8)
        examples = jax.eval_shape(Examples.packed, image, jax.ShapeDtypeStruct((size,), np.int32))
        (batch,) = ResidentLoader(examples).batches(np.arange(size), size)
        memory = compile_step(examples, jax.tree.map(lambda array: array[:, None], batch)).memory_analysis()
        given_and_given_back = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return int(given_and_given_back + memory.temp_size_in_bytes)

    at_most = max(len(data.label) // LEAST_STEPS // devices, 1)
    share = largest_share(bytes_of, MEMORY_SHARE * device_memory - resident, at_most)
    needed, there = bytes_of(share) / 2**30, device_memory / 2**30
    print(
        f"batch    {share * devices} pictures; a step needs {needed:.1f} GiB of each device's {there:.1f}", flush=True
    )
    return share * devices


def largest_share(bytes_of: Callable[[int], int], memory: float, at_most: int) -> int:
    """The largest power of two, up to `at_most`, of pictures a device with bytes_of(pictures) <= memory.

    bytes_of compiles a step for its answer, which grows about linearly: two answers foretell the others, and the one
    that is taken is checked. Raises UserError where not even one picture fits.
    """
    low, high = (bytes_of(share) for share in PROBES)
    each = max(high - low, 1) / (PROBES[1] - PROBES[0])
    share = 1
    while 2 * share <= at_most and high + each * (2 * share - PROBES[1]) <= memory:
        share *= 2
    while share > 1 and bytes_of(share) > memory:
        share //= 2
    if share == 1 and bytes_of(1) > memory:
        raise UserError(
            f"a training step needs {bytes_of(1) / 2**30:.1f} GiB for one picture, and there are {memory / 2**30:.1f}; "
            "use a smaller image_size or model.arch, or model.remat=True"
        )
    return share
