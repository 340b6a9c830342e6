"""Brings images to the devices: the whole split once, or a stream of batches."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from jaxft.data.batches import Batch, Examples, local_shard, make_batches, replicate
from jaxft.data.budget import is_streamed
from jaxft.data.dataset import Dataset, Origin
from jaxft.data.lazy_images import as_array, pickled_by_path
from jaxft.process import allow_large_images, end_with_parent

BATCHES_AHEAD = 3  # batches to prefetch


@dataclasses.dataclass(frozen=True)
class ResidentLoader:
    """A split whose images are on every device."""

    examples: Examples

    @property
    def label(self) -> Any:
        return self.examples.label

    @property
    def num_examples(self) -> int:
        return self.examples.num_examples

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[Batch]:
        """Yields batches in this order: of each, this process's shard with shape (local devices, B)."""
        return local_shard(make_batches(order, batch_size, jax.device_count()))

    def blank_batch(self, batch_size: int) -> Batch:
        """Returns a batch of the shapes and dtypes of all others."""
        return next(self.batches(np.zeros(1, int), batch_size))


@dataclasses.dataclass(frozen=True)
class StreamingLoader:
    """A split whose batches carry their images, prefetched by threads or by `workers` processes."""

    data: Dataset
    workers: int = 0
    partners: bool = False  # also read the mixing partners that belong to another device's share (mixup, CutMix)
    examples: None = None

    @property
    def label(self) -> Any:
        return self.data.label

    @property
    def num_examples(self) -> int:
        return self.data.num_examples

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[Batch]:
        """Yields the same batches as ResidentLoader, with their images."""
        import grain  # takes a second

        shards = local_shard(make_batches(order, batch_size, jax.device_count()))
        reader = BatchReader(self.data, list(shards), self.partners)
        threads = 0 if self.workers else BATCHES_AHEAD
        stream = grain.MapDataset.source(reader).to_iter_dataset(grain.ReadOptions(threads, BATCHES_AHEAD))
        if self.workers:
            flags.FLAGS.mark_as_parsed()  # Grain insists on it, although it needs no flags here
            # Use pipes: containers have little shared memory, and Grain does not free its last block.
            # NOTES: Worker processes answer through pipes (docs/notes/input-and-startup.md)
            no_shared_memory = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
            stream = grain.experimental.WithOptionsIterDataset(stream, no_shared_memory)
            workers = grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=1)
            stream = stream.mp_prefetch(workers, worker_init_fn=_start_worker)
        with closing(iter(stream)) as batches:
            yield from batches

    def blank_batch(self, batch_size: int) -> Batch:
        """Returns a batch of the shapes and dtypes of all others, without reading an image."""
        blank = self.data._replace(image=np.broadcast_to(np.uint8(0), self.data.image.shape))
        (shard,) = local_shard(make_batches(np.zeros(1, int), batch_size, jax.device_count()))
        return BatchReader(blank, [shard], self.partners)[0]


Loader = ResidentLoader | StreamingLoader


def make_loader(data: Dataset, config: ConfigDict, *, partners: bool = False) -> Loader:
    """Makes the loader of a split. config: the `data` section. partners: whether images are mixed with others."""
    if is_streamed(data, config.stream):
        data = data._replace(image=pickled_by_path(data.image), origin=Origin())  # pickled without file names
        return StreamingLoader(data, config.workers, partners)
    return ResidentLoader(replicate(Examples.packed(as_array(data.image), data.label)))


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """A random-access source of batches (devices, B) that carry their images; indexing it reads a batch's images."""

    data: Dataset
    shards: list[Batch]
    partners: bool

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> Batch:
        """Reads each device's images and, if they are mixed, the next device's first one as partner of its last."""
        shard = self.shards[i]
        devices, size = shard.index.shape
        count = shard.mask.sum(1).astype(int)  # images of each device, without padding
        dataset_index, partner = shard.index, np.tile(np.arange(size), (devices, 1))
        if self.partners:
            dataset_index = np.c_[dataset_index, shard.partner[np.arange(devices), count - 1]]
            partner = np.where(partner == count[:, None] - 1, size, partner + 1)
        label = jax.tree.map(lambda array: array[dataset_index], self.data.label)
        examples = Examples.packed(self.data.image[dataset_index], label, dataset_index)
        index = np.tile(np.arange(size), (devices, 1))
        return Batch(index.astype(np.int32), partner.astype(np.int32), shard.mask, examples)


def _start_worker(index: int, count: int) -> None:
    """Prepares a worker process of Grain."""
    end_with_parent()
    allow_large_images()
