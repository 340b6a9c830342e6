"""Examples, batches of them and the order in which they are trained on."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Array = jax.Array | np.ndarray  # in a step, and on the host


_LINE = 128  # bytes


@struct.dataclass
class Examples:
    """Of a whole data set on every device, or of a batch alone."""

    image: Array  # uint8 (N, H, W, 3), or `packed`; or float32 (N, F): the features that a frozen backbone gives
    label: Array  # int32 (N,)
    dataset_index: Array | None = None  # int32 (N,), in the data set; None: 0 to N - 1
    shape: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)  # of a picture that is in lines

    @classmethod
    def packed(cls, image: Array, label: Array, dataset_index: Array | None = None) -> "Examples":
        """Of (..., H, W, 3): each picture's bytes in lines of 128, as a TPU keeps them.

        Of (N, H, W, 3) it would copy the whole data set in every step, to have each picture's bytes together.
        """
        shape = image.shape[-3:]
        lines = (-1, _LINE) if math.prod(shape) % _LINE == 0 else (-1,)
        return cls(image.reshape(*image.shape[:-3], *lines), label, dataset_index, shape)

    def gather(self, index: Array) -> jax.Array:
        """(B, H, W, 3), or features (B, F)."""
        image = jnp.asarray(self.image)[index]
        return image if self.shape is None else image.reshape(*index.shape, *self.shape)


@struct.dataclass
class Batch:
    """Which pictures make a batch, in each device's part of it."""

    index: Array  # int32 (B,), among the pictures
    partner: Array  # int32 (B,): the next picture of the whole batch, to be mixed with
    mask: Array  # float32 (B,), 0 for padding
    examples: Examples | None = None  # where the batch brings its own


def examples_for(examples: Examples | None, batch: Batch) -> Examples:
    """The batch's own, or else those that are there for all batches."""
    found = batch.examples if examples is None else examples
    assert found is not None, "a batch without pictures"
    return found


def replicated_sharding() -> NamedSharding:
    """On every local device, in natural shape: what a mapped step with in_axes=None takes and donates."""
    return NamedSharding(Mesh(np.array(jax.local_devices()), ("batch",)), PartitionSpec())


def replicate(tree: Any) -> Any:
    return jax.device_put(tree, replicated_sharding())


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch's pictures, int64 (size,): a fresh permutation, a pure function of its arguments."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size)


def make_batches(order: np.ndarray, batch_size: int, num_devices: int) -> Iterator[Batch]:
    """Batches of shape (num_devices, batch_size // num_devices) in the given order, the last padded and masked."""
    shape = (num_devices, batch_size // num_devices)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        padding = (0, batch_size - len(index))
        mask = np.ones(len(index), np.float32)
        yield Batch(
            np.pad(index, padding).astype(np.int32).reshape(shape),
            np.pad(np.roll(index, -1), padding).astype(np.int32).reshape(shape),
            np.pad(mask, padding).reshape(shape),
        )


def local_shard(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Of batches (devices of all processes, B): the rows of this process's devices."""
    rows = [row for row, device in enumerate(jax.devices()) if device.process_index == jax.process_index()]
    for batch in batches:
        yield jax.tree.map(lambda array: array[rows], batch)
