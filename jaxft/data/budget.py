"""How much disk and memory the images of a split may take."""

import math
import os
import shutil

import jax

from jaxft.data.dataset import Dataset
from jaxft.files import cache_dir

MEMORY_SHARE = 0.3  # of a device's memory that the pictures of one split may take


def room_for_pictures(cache: str) -> float:
    """Bytes of the disk that the decoded pictures of a split may take: config key data.cache."""
    if cache != "auto":
        return {"always": math.inf, "never": -1}[cache]
    existing = next(path for path in (cache_dir().absolute(), *cache_dir().absolute().parents) if path.is_dir())
    return shutil.disk_usage(existing).free / 2


def memory_for_pictures(stream: str) -> float:
    """Bytes beyond which the pictures of a split are streamed: config key data.stream."""
    if stream != "auto":
        return {"always": -1, "never": math.inf}[stream]
    return MEMORY_SHARE * device_memory()


def device_memory() -> int:
    """Bytes of one device; an equal share of the machine's where devices have none of their own."""
    of_device = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return of_device or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def is_streamed(data: Dataset, stream: str) -> bool:
    """Whether each batch brings its pictures; stream: config key data.stream."""
    return data.image.nbytes > memory_for_pictures(stream)
