"""Examples, batches of them and the order in which they are trained on."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Array = jax.Array | np.ndarray  # on the devices or on the host
_LINE = 128  # bytes
AXIS_NAME = "batch"  # of the mapped axis over the devices that share a batch


@struct.dataclass
class Examples:
    """Images and labels: a whole dataset resident on every device, or one batch."""

    image: Array  # uint8 (N, H, W, 3) or `packed`; or float32 (N, F), the features of a frozen backbone
    label: Any  # int32 (N,), or {target: (N, ...)}: see fields.py
    dataset_index: Array | None = None  # int32 (N,), positions in the dataset; None means 0 to N - 1
    shape: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)  # (H, W, 3) of packed images

    @classmethod
    def packed(cls, image: Array, label: Any, dataset_index: Array | None = None) -> "Examples":
        """Packs each image (..., H, W, 3) into rows of 128 bytes.

        TPUs lay NHWC arrays out with N innermost; gathering a batch from them would transpose the whole dataset in
        every step.
        """
        shape = image.shape[-3:]
        lines = (-1, _LINE) if math.prod(shape) % _LINE == 0 else (-1,)
        return cls(image.reshape(*image.shape[:-3], *lines), label, dataset_index, shape)

    def gather(self, index: Array) -> jax.Array:
        """Returns the images (B, H, W, 3) or features (B, F) at these positions."""
        image = jnp.asarray(self.image)[index]
        return image if self.shape is None else image.reshape(*index.shape, *self.shape)

    def gather_label(self, index: Array) -> Any:
        """Returns the labels at these positions."""
        return jax.tree.map(lambda label: label[index], self.label)

    @property
    def num_examples(self) -> int:
        return len(jax.tree.leaves(self.label)[0])


@struct.dataclass
class Batch:
    """Positions of a batch's examples: (B,) for one device, or (devices, B) for all devices."""

    index: Array  # int32 (B,), positions among the examples
    partner: Array  # int32 (B,), position of the example to mix with: the next one in the whole batch
    mask: Array  # float32 (B,), 0 for padding
    examples: Examples | None = None  # the batch's own examples, if it is streamed


def examples_for(examples: Examples | None, batch: Batch) -> Examples:
    """Returns the resident examples, or those that the batch carries."""
    found = batch.examples if examples is None else examples
    assert found is not None, "a batch without examples"
    return found


def replicated_sharding() -> NamedSharding:
    """Returns the sharding that a pmapped step with in_axes=None takes and donates: replicated on local devices."""
    return NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS_NAME,)), PartitionSpec())


def replicate(tree: Any) -> Any:
    """Copies a pytree to every local device."""
    return jax.device_put(tree, replicated_sharding())


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order of an epoch's examples, int64 (size,): a permutation that depends only on the arguments."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size)


def sampled_order(seed: int, epoch: int, label: np.ndarray, power: float) -> np.ndarray:
    """Returns an epoch's order, int64 (N,), in which a class of n images appears in proportion to n^(1 - power).

    power: 1 draws all classes equally often, 0.5 is in between. The images of a class appear equally often, up to one.
    label: int32 (N,); images without a label (-1) are drawn like a class of their own. Depends only on its arguments.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = rng.permutation(len(label))
    order = order[np.argsort(label[order], kind="stable")]  # shuffled within each class
    _, inverse, counts = np.unique(label[order], return_inverse=True, return_counts=True)
    weights = counts[inverse] ** -float(power)
    drawn = np.floor(np.cumsum(weights / weights.sum()) * len(label) + rng.random()).astype(np.int64)
    drawn[-1] = len(label)  # whatever the rounding
    return rng.permutation(np.repeat(order, np.diff(drawn, prepend=0)))  # systematic sampling


def make_batches(order: np.ndarray, batch_size: int, num_devices: int) -> Iterator[Batch]:
    """Yields batches (num_devices, batch_size // num_devices) in the given order; the last one is padded and masked."""
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
    """Yields this process's rows of batches whose first axis is the devices of all processes."""
    rows = [row for row, device in enumerate(jax.devices()) if device.process_index == jax.process_index()]
    for batch in batches:
        yield jax.tree.map(lambda array: array[rows], batch)
