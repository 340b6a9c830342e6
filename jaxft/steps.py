"""The training and the evaluation step: pure functions, mapped over devices where they are used."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft.augment import NO_AUGMENTATION, Augmentation, augment, mix, picture_keys
from jaxft.distill import Distillation, distillation_loss
from jaxft.folding import fold_norms
from jaxft.layers import sum_over_devices
from jaxft.parts import carry_over, map_with_path, merge, split_frozen
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
    ema: Any = struct.field(default_factory=dict)  # averaged params and batch_stats; {} where none are wanted

    def variables(self) -> dict[str, Any]:
        """What is tested, kept and used: the averages if there are any."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def create_train_state(
    model: ResNet, tx: optax.GradientTransformation, rng: jax.Array, *, ema: bool = False
) -> TrainState:
    """Step 0 with random weights, initialised as torchvision does.

    Drawn by Philox, which compiles in a quarter of the time of JAX's default, threefry.
    """
    rng = jax.random.wrap_key_data(jnp.tile(jax.random.key_data(rng), 2), impl="rbg")
    return initial_train_state(model, tx, model.init(rng, jnp.zeros((1, 32, 32, 3)), train=False), ema=ema)


def initial_train_state(
    model: ResNet, tx: optax.GradientTransformation, variables: Mapping[str, Any], *, ema: bool = False
) -> TrainState:
    """Step 0 from these variables; the optimizer knows the parameters that train alone. ema: averages are wanted."""
    trainable, _ = split_frozen(variables["params"], model.frozen)
    averages = jax.tree.map(jnp.array, dict(variables)) if ema else {}
    opt_state = jax.jit(tx.init)(trainable)  # one program, not one for each shape
    return TrainState(jnp.int32(0), variables["params"], variables["batch_stats"], opt_state, averages)


def abstract_train_state(model: ResNet, tx: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
    """Its shapes and types alone."""
    return jax.eval_shape(partial(create_train_state, model, tx, ema=ema), jax.random.key(0))


_LINE = 128  # bytes


@struct.dataclass
class Pictures:
    """Of a whole data set on every device, or of a batch alone."""

    image: Array  # uint8 (N, H, W, 3), or `in_lines`; or float32 (N, F): the features that a frozen backbone gives
    label: Array  # int32 (N,)
    number: Array | None = None  # int32 (N,), in the data set; None: 0 to N - 1
    shape: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)  # of a picture that is in lines

    @classmethod
    def in_lines(cls, image: Array, label: Array, number: Array | None = None) -> "Pictures":
        """Of (..., H, W, 3): each picture's bytes in lines of 128, as a TPU keeps them.

        Of (N, H, W, 3) it would copy the whole data set in every step, to have each picture's bytes together.
        """
        shape = image.shape[-3:]
        lines = (-1, _LINE) if math.prod(shape) % _LINE == 0 else (-1,)
        return cls(image.reshape(*image.shape[:-3], *lines), label, number, shape)

    def seen(self, index: Array) -> jax.Array:
        """(B, H, W, 3), or features (B, F)."""
        image = jnp.asarray(self.image)[index]
        return image if self.shape is None else image.reshape(*index.shape, *self.shape)


@struct.dataclass
class Batch:
    """Which pictures make a batch, in each device's part of it."""

    index: Array  # int32 (B,), among the pictures
    partner: Array  # int32 (B,): the next picture of the whole batch, to be mixed with
    mask: Array  # float32 (B,), 0 for padding
    pictures: Pictures | None = None  # where the batch brings its own


@struct.dataclass
class Counts:
    """Sums over pictures, to be divided once on the host."""

    loss: Array
    correct: Array
    pictures: Array


@struct.dataclass
class Predictions:
    """What the network says of each picture (B,), beside the truth."""

    label: Array  # int32
    predicted: Array  # int32, the class of the highest logit
    confidence: Array  # its probability
    rank: Array  # int32, of the label among the logits: 0 where the prediction is right
    loss: Array


def _predictions(logits: Array, label: Array) -> Predictions:
    own = jnp.take_along_axis(logits, label[:, None], axis=-1)
    before = jnp.arange(logits.shape[-1]) < label[:, None]  # argmax takes the first of equals
    return Predictions(
        label=label,
        predicted=logits.argmax(-1).astype(jnp.int32),
        confidence=jax.nn.softmax(logits).max(-1),
        rank=((logits > own) | ((logits == own) & before)).sum(-1, dtype=jnp.int32),
        loss=optax.softmax_cross_entropy_with_integer_labels(logits, label),
    )


def _count(logits: Array, label: Array, mask: Array) -> Counts:
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    correct = logits.argmax(-1) == label
    return Counts((loss * mask).sum(), (correct * mask).sum(), mask.sum())


def count_predictions(predictions: Predictions) -> Counts:
    """On the host, of predictions without padding."""
    loss, correct = np.sum(predictions.loss, dtype=np.float64), np.sum(predictions.rank == 0)
    return Counts(np.asarray(loss), np.asarray(correct), np.asarray(len(predictions.label)))


class Objective(NamedTuple):
    """What is random in a training step, and what it minimises."""

    seed: int = 0
    augmentation: Augmentation = NO_AUGMENTATION
    label_smoothing: float = 0.0  # share of a label that is spread over all classes (Szegedy et al. 2016), as torch's
    class_weights: tuple[float, ...] = ()  # on the loss of each class's pictures, as torch's cross_entropy has it


def pictures_of(pictures: Pictures | None, batch: Batch) -> Pictures:
    """The batch's own, or else those that are there for all batches."""
    found = batch.pictures if pictures is None else pictures
    assert found is not None, "a batch without pictures"
    return found


def training_inputs(
    pictures: Pictures, batch: Batch, step: Array, preprocessing: Preprocessing, objective: Objective
) -> tuple[jax.Array, list[tuple[Array, Array]]]:
    """The network's input for a batch, and its labels, each with its share (B,) of the picture.

    What is random is a function of the seed, the step and the picture alone, on any number of devices.
    """
    augmentation = objective.augmentation

    def keys(index: Array) -> jax.Array:
        return picture_keys(objective.seed, step, index if pictures.number is None else pictures.number[index])

    def seen(index: Array) -> jax.Array:
        image = pictures.seen(index)
        return image if image.ndim == 2 else augment(image, keys(index), augmentation, preprocessing)

    label = pictures.label[batch.index]
    if not augmentation.mixup and not augmentation.cutmix:
        return seen(batch.index), [(label, jnp.ones(label.shape))]
    image, partner = jnp.split(seen(jnp.concatenate([batch.index, batch.partner])), 2)
    mix_keys = jax.vmap(jax.random.fold_in, (0, None))(keys(batch.index), 2)
    image, share = mix(image, partner, mix_keys, augmentation)
    return image, [(label, share), (pictures.label[batch.partner], 1 - share)]


def cross_entropy(logits: Array, label: Array, objective: Objective) -> tuple[jax.Array, jax.Array]:
    """Of each picture (B,): its loss, weighted by its class, and that weight; as torch.nn.functional.cross_entropy."""
    log_probabilities = jax.nn.log_softmax(logits)
    weights = jnp.array(objective.class_weights or (1.0,) * logits.shape[-1], log_probabilities.dtype)
    own = -jnp.take_along_axis(log_probabilities, label[:, None], axis=-1)[:, 0] * weights[label]
    loss = (1 - objective.label_smoothing) * own
    if objective.label_smoothing:
        loss -= objective.label_smoothing * (log_probabilities * weights).mean(-1)
    return loss, weights[label]


TrainStep = Callable[..., tuple[TrainState, Counts]]  # of a state, pictures, a batch and a teacher's variables


def train_step(
    state: TrainState,
    pictures: Pictures | None,
    batch: Batch,
    teacher: Any = None,
    *,
    model: ResNet,
    tx: optax.GradientTransformation,
    preprocessing: Preprocessing,
    objective: Objective = Objective(),  # noqa: B008, it is immutable
    ema_decay: float = 0.0,
    distillation: Distillation | None = None,
) -> tuple[TrainState, Counts]:
    """One update by the mean cross entropy of the batch over all devices; the counts are from before it.

    What `model` has frozen stays as it is to the bit, and nothing is propagated back through it where nothing before
    it trains. teacher: the variables of `distillation`'s network, which sees the same pictures at its own size.
    """
    pictures = pictures_of(pictures, batch)
    image, labels = training_inputs(pictures, batch, state.step, preprocessing, objective)
    total = sum_over_devices(batch.mask.sum(), model.axis_name)
    taught: Any = None
    if distillation:
        teachers_image, _ = training_inputs(pictures, batch, state.step, distillation.preprocessing, objective)
        taught = distillation.model.apply(teacher, teachers_image, train=False)
    trainable, kept = split_frozen(state.params, model.frozen)

    def share_of_loss(trainable: Any) -> tuple[jax.Array, tuple[Any, Counts]]:
        variables = {"params": merge(trainable, kept), "batch_stats": state.batch_stats}
        logits, updates = model.apply(variables, image, batch.mask, train=True, mutable=["batch_stats"])
        parts = [(*cross_entropy(logits, label, objective), share * batch.mask) for label, share in labels]
        loss = sum((losses * share).sum() for losses, _, share in parts)
        weight = sum((weights * share).sum() for _, weights, share in parts)
        loss /= sum_over_devices(weight, model.axis_name)
        if distillation:
            divergence = distillation_loss(logits, taught, distillation.temperature) * batch.mask
            loss = (1 - distillation.weight) * loss + distillation.weight * divergence.sum() / total
        counts = _count(logits, pictures.label[batch.index], batch.mask)
        return loss, (updates["batch_stats"], counts)

    grads, (batch_stats, counts) = jax.grad(share_of_loss, has_aux=True)(trainable)
    grads = sum_over_devices(grads, model.axis_name)
    if model.batch_norm == "update":  # each device's own: their mean, weighted by the pictures they saw
        weight = batch.mask.sum() / total

        def mean(path: str, a: jax.Array) -> jax.Array:
            frozen = model.norm_is_frozen(path.rpartition("/")[0])
            return a if frozen else sum_over_devices(a * weight, model.axis_name)

        batch_stats = map_with_path(mean, batch_stats)
    opt_state = carry_over(state.opt_state, jax.eval_shape(tx.init, trainable))  # what will train later is left out
    updates, opt_state = tx.update(grads, opt_state, trainable)
    params = merge(optax.apply_updates(trainable, updates), kept)
    opt_state = carry_over(opt_state, state.opt_state)
    new_state = TrainState(state.step + 1, params, batch_stats, opt_state)
    if ema_decay:
        new_state = dataclasses.replace(new_state, ema=_averaged(state.ema, new_state, ema_decay))
    return new_state, sum_over_devices(counts, model.axis_name)


def _averaged(averages: Any, state: TrainState, decay: float) -> Any:
    """The averages after this step: of few steps at first, or the start would weigh on them for long."""
    weight = 1 - jnp.minimum(decay, (1 + state.step) / (10 + state.step))
    newest = {"params": state.params, "batch_stats": state.batch_stats}
    return jax.tree.map(lambda mean, new: mean + weight * (new - mean), averages, newest)


def train_steps(
    state: TrainState,
    pictures: Pictures | None,
    batches: Batch,
    teacher: Any = None,
    turns: Array | None = None,
    *,
    step: TrainStep,
) -> tuple[TrainState, Counts]:
    """With the first `turns` of batches (K, B), or all of them, one after the other: counts (K,)."""
    return scan_first(turns, lambda state, batch: step(state, pictures, batch, teacher), state, batches)


def scan_first(turns: Array | None, function: Callable[..., Any], carried: Any, each: Any) -> Any:
    """jax.lax.scan with no more than so many of `each`; the results of others are 0."""
    if turns is None:
        return jax.lax.scan(function, carried, each)
    function = jax.jit(function)  # traced once
    shapes = jax.eval_shape(function, carried, jax.tree.map(lambda array: array[0], each))[1]
    zeros = jax.tree.map(lambda one: jnp.zeros((len(jax.tree.leaves(each)[0]), *one.shape), one.dtype), shapes)

    def turn(k: Array, so_far: Any) -> Any:
        carried, one = function(so_far[0], jax.tree.map(lambda array: array[k], each))
        return carried, jax.tree.map(lambda all, one: all.at[k].set(one), so_far[1], one)

    return jax.lax.fori_loop(0, turns, turn, (carried, zeros))


Step = Callable[..., Any]  # of variables, pictures and a batch, of a model and its preprocessing


def with_each(
    state: TrainState,
    pictures: Pictures | None,
    batches: Batch,
    turns: Array | None = None,
    *,
    step: Step,
    model: ResNet,
    preprocessing: Preprocessing,
    fold: bool = True,
) -> Any:
    """What `step` gives for each of the first `turns` of batches (K, B), or for all of them: (K, ...)."""
    variables: Any = state.variables()
    if fold:
        model, variables = fold_norms(model, variables)
    step = partial(step, variables, pictures, model=model, preprocessing=preprocessing)
    return scan_first(turns, lambda _, batch: (None, step(batch)), None, batches)[1]


def eval_step(
    variables: Any, pictures: Pictures | None, batch: Batch, *, model: ResNet, preprocessing: Preprocessing
) -> Predictions:
    """Of each picture of the batch (num_devices, B), padding too; with running statistics."""
    pictures = pictures_of(pictures, batch)
    image = pictures.seen(batch.index)
    if image.ndim == 4:
        image = preprocess(image, preprocessing)
    logits: Any = model.apply(variables, image, train=False)
    return jax.lax.all_gather(_predictions(logits, pictures.label[batch.index]), model.axis_name)


def features_step(
    variables: Any, pictures: Pictures | None, batch: Batch, *, model: ResNet, preprocessing: Preprocessing
) -> jax.Array:
    """What the head sees of each picture of the batch: (num_devices, B, F), padding too."""
    pictures = pictures_of(pictures, batch)
    image = preprocess(pictures.seen(batch.index), preprocessing)
    return jax.lax.all_gather(model.apply(variables, image, train=False, features_only=True), model.axis_name)


def statistics_step(
    variables: Any, pictures: Pictures | None, batch: Batch, *, model: ResNet, preprocessing: Preprocessing
) -> Any:
    """The batch_stats that the batch would leave alone, over all devices."""
    pictures = pictures_of(pictures, batch)
    image = preprocess(pictures.seen(batch.index), preprocessing)
    model = model.clone(batch_norm="sync", norm_momentum=1.0)
    _, updates = model.apply(variables, image, batch.mask, train=True, mutable=["batch_stats"])
    return updates["batch_stats"]


def predict_step(variables: Any, image: Array, *, model: ResNet, preprocessing: Preprocessing) -> jax.Array:
    """Probabilities (B, num_classes) of uint8 pictures (B, H, W, 3)."""
    logits: Any = model.apply(variables, preprocess(image, preprocessing), train=False)
    return jax.nn.softmax(logits)


def replicated_sharding() -> NamedSharding:
    """On every local device, in natural shape: what a mapped step with in_axes=None takes and donates."""
    return NamedSharding(Mesh(np.array(jax.local_devices()), ("batch",)), PartitionSpec())


def replicate(tree: Any) -> Any:
    return jax.device_put(tree, replicated_sharding())
