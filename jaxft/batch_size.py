"""The largest batch that a device's memory holds, by what XLA says that a training step needs."""

from collections.abc import Callable
from typing import Any

from jaxft.errors import UserError

PROBES = (8, 32)  # pictures a device
LEAST_STEPS = 10  # of an epoch
MEMORY_SHARE = 0.7  # of a device's memory that training may take; what it allocates is never packed tightly


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


def bytes_of_step(compiled: Any) -> int:
    """On one device, of a compiled program; what it is given and gives back included."""
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(kept + memory.temp_size_in_bytes)
