"""How pictures come to the devices: all of them once and for good, or each batch when its turn comes."""

import ctypes
import dataclasses
import signal
import sys
from collections.abc import Iterator
from contextlib import closing

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from jaxft.data.batches import Array, Batch, Examples, local_shard, make_batches, replicate
from jaxft.data.budget import is_streamed
from jaxft.data.dataset import Dataset
from jaxft.data.lazy_images import LazyImages, MappedImages

BATCHES_AHEAD = 3  # that are read before the devices ask for them


_PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h


@dataclasses.dataclass(frozen=True)
class ResidentLoader:
    """All pictures are on every device already."""

    examples: Examples

    @property
    def label(self) -> Array:
        return self.examples.label

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[Batch]:
        """Batches of pictures in this order, of each the part of this process's devices."""
        return local_shard(make_batches(order, batch_size, jax.device_count()))


@dataclasses.dataclass(frozen=True)
class StreamingLoader:
    """Batches bring their pictures, which are read by threads, or by `workers` processes, while the devices work."""

    data: Dataset
    workers: int = 0
    partners: bool = False  # whether pictures are mixed with others
    examples: None = None

    @property
    def label(self) -> Array:
        return self.data.label

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[Batch]:
        """As ResidentLoader: the same pictures in the same order."""
        import grain  # takes a second, which is for those who need it

        parts = local_shard(make_batches(order, batch_size, jax.device_count()))
        reader = BatchReader(self.data, list(parts), self.partners)
        threads = 0 if self.workers else BATCHES_AHEAD
        stream = grain.MapDataset.source(reader).to_iter_dataset(grain.ReadOptions(threads, BATCHES_AHEAD))
        if self.workers:
            flags.FLAGS.mark_as_parsed()  # which Grain asks for, though it needs none of them here
            # Pipes instead: containers have little shared memory, and Grain leaves the last of it behind.
            no_shared_memory = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
            stream = grain.experimental.WithOptionsIterDataset(stream, no_shared_memory)
            workers = grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=1)
            stream = stream.mp_prefetch(workers, worker_init_fn=_start_worker)
        with closing(iter(stream)) as batches:
            yield from batches


Loader = ResidentLoader | StreamingLoader


def make_loader(data: Dataset, config: ConfigDict, *, partners: bool = False) -> Loader:
    """config: its `data` section. partners: whether pictures are mixed with others."""
    if is_streamed(data, config.stream):
        if isinstance(data.image, np.memmap):
            data = data._replace(image=MappedImages.of(data.image))
        return StreamingLoader(data, config.workers, partners)
    in_files = isinstance(data.image, LazyImages)
    image = data.image[np.arange(len(data.label))] if in_files else data.image
    return ResidentLoader(replicate(Examples.packed(image, data.label)))


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """A sequence of batches (devices, B) with their own pictures, read when they are asked for."""

    data: Dataset
    parts: list[Batch]
    partners: bool

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> Batch:
        """Each device has its own pictures and, to mix its last one with, the first of the next device."""
        part = self.parts[i]
        devices, size = part.index.shape
        count = part.mask.sum(1).astype(int)  # of each device's pictures
        number, partner = part.index, np.tile(np.arange(size), (devices, 1))
        if self.partners:
            number = np.c_[number, part.partner[np.arange(devices), count - 1]]
            partner = np.where(partner == count[:, None] - 1, size, partner + 1)
        examples = Examples.packed(self.data.image[number], self.data.label[number], number)
        index = np.tile(np.arange(size), (devices, 1))
        return Batch(index.astype(np.int32), partner.astype(np.int32), part.mask, examples)


def _start_worker(index: int, count: int) -> None:
    """Ctrl-C is for the process that started this one; when that one dies, so does this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
