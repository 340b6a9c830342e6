"""Decides how much disk and memory the images of a split may take."""

import math
import os
import shutil

import jax

from jaxft.data.dataset import Dataset
from jaxft.files import cache_dir

# NOTES: Thresholds without a measurement (docs/notes/memory.md)
MEMORY_SHARE = 0.3  # of a device's memory that the images of one split may take


def room_for_images(cache: str) -> float:
    """Returns the bytes of disk that the decoded images of a split may take. cache: the config key data.cache."""
    if cache != "auto":
        return {"always": math.inf, "never": -1}[cache]
    existing = next(path for path in (cache_dir().absolute(), *cache_dir().absolute().parents) if path.is_dir())
    return shutil.disk_usage(existing).free / 2


def is_streamed(data: Dataset, stream: str) -> bool:
    """Returns whether batches carry their images, because the split is too large to stay on the devices.

    stream: the config key data.stream.
    """
    if stream != "auto":
        return stream == "always"
    return data.image.nbytes > MEMORY_SHARE * device_memory()


def device_memory() -> int:
    """Returns the bytes of one device's memory; CPU devices share the machine's memory equally."""
    reported = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return reported or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
