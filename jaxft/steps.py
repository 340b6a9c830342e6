"""The training and the evaluation step: pure functions, mapped over devices where they are used."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft.preprocessing import Preprocessing, preprocess
from jaxft.resnet import ResNet

Array = jax.Array | np.ndarray  # in a step, and on the host


@struct.dataclass
class TrainState:
    """All that a step changes, in natural shapes: the same on every device."""

    step: Array  # steps done, int32
    params: Any
    batch_stats: Any
    opt_state: Any


def create_train_state(model: ResNet, tx: optax.GradientTransformation, rng: jax.Array) -> TrainState:
    """Step 0 with random weights, initialised as torchvision does."""
    variables = model.init(rng, jnp.zeros((1, 32, 32, 3)), train=False)
    return TrainState(jnp.int32(0), variables["params"], variables["batch_stats"], tx.init(variables["params"]))


def abstract_train_state(model: ResNet, tx: optax.GradientTransformation) -> TrainState:
    """Its shapes and types alone."""
    return jax.eval_shape(partial(create_train_state, model, tx), jax.random.key(0))


@struct.dataclass
class Pictures:
    """A whole data set, on every device."""

    image: Array  # uint8 (N, H, W, 3)
    label: Array  # int32 (N,)


@struct.dataclass
class Batch:
    """Which pictures make a batch, in each device's part of it."""

    index: Array  # int32 (B,)
    mask: Array  # float32 (B,), 0 for padding


@struct.dataclass
class Counts:
    """Sums over pictures, to be divided once on the host."""

    loss: Array
    correct: Array
    pictures: Array


def _count(logits: Array, label: Array, mask: Array) -> Counts:
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    correct = logits.argmax(-1) == label
    return Counts((loss * mask).sum(), (correct * mask).sum(), mask.sum())


def train_step(
    state: TrainState,
    pictures: Pictures,
    batch: Batch,
    *,
    model: ResNet,
    tx: optax.GradientTransformation,
    preprocessing: Preprocessing,
) -> tuple[TrainState, Counts]:
    """One update by the mean cross entropy of the batch over all devices; the counts are from before it."""
    image = preprocess(pictures.image[batch.index], preprocessing)
    label = pictures.label[batch.index]
    total = jax.lax.psum(batch.mask.sum(), model.axis_name)

    def share_of_loss(params: Any) -> tuple[jax.Array, tuple[Any, Counts]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = model.apply(variables, image, batch.mask, train=True, mutable=["batch_stats"])
        counts = _count(logits, label, batch.mask)
        return counts.loss / total, (updates["batch_stats"], counts)

    grads, (batch_stats, counts) = jax.grad(share_of_loss, has_aux=True)(state.params)
    grads = jax.lax.psum(grads, model.axis_name)
    if model.batch_norm == "update":  # each device's own: their mean, weighted by the pictures they saw
        weight = batch.mask.sum() / total
        batch_stats = jax.lax.psum(jax.tree.map(lambda a: a * weight, batch_stats), model.axis_name)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new_state = TrainState(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)
    return new_state, jax.lax.psum(counts, model.axis_name)


def eval_step(
    state: TrainState, pictures: Pictures, batch: Batch, *, model: ResNet, preprocessing: Preprocessing
) -> Counts:
    """Counts over the batch on all devices, with running statistics."""
    image = preprocess(pictures.image[batch.index], preprocessing)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits: Any = model.apply(variables, image, train=False)
    return jax.lax.psum(_count(logits, pictures.label[batch.index], batch.mask), model.axis_name)


def replicated_sharding() -> NamedSharding:
    """On every local device, in natural shape: what a mapped step with in_axes=None takes and donates."""
    return NamedSharding(Mesh(np.array(jax.local_devices()), ("batch",)), PartitionSpec())


def replicate(tree: Any) -> Any:
    return jax.device_put(tree, replicated_sharding())
