"""Arrays on the forced CPU devices, and JAX's compilation cache."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def replicate_on(devices: int, tree: Any) -> Any:
    """Copies a pytree to the first devices, as a pmapped step returns it: with another sharding it compiles twice."""
    mesh = Mesh(np.array(jax.local_devices()[:devices]), ("batch",))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


@contextmanager
def uncached_programs() -> Iterator[None]:
    """Keeps programs that are compiled meanwhile out of the cache: XLA cannot serialise those that call oneDNN."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)
