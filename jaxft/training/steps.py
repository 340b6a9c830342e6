"""The training and the evaluation step: pure functions, mapped over devices where they are used."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.data.batches import Array, Batch, Examples, examples_for
from jaxft.models.fold import fold_norms
from jaxft.models.partition import map_with_path, merge, merge_opt_state, split_frozen
from jaxft.models.resnet import ResNet
from jaxft.ops.elementwise import sum_over_devices
from jaxft.targets.classification import Counts, Predictions, count_batch, cross_entropy, predictions_from_logits
from jaxft.training.distill import Distillation, distillation_loss
from jaxft.training.state import TrainState, update_ema
from jaxft.transforms.augment import NO_AUGMENTATION, Augmentation, augment, mix, picture_keys
from jaxft.transforms.preprocessing import Preprocessing, preprocess


class StepConfig(NamedTuple):
    """What is random in a training step, and what it minimises."""

    seed: int = 0
    augmentation: Augmentation = NO_AUGMENTATION
    label_smoothing: float = 0.0  # share of a label that is spread over all classes (Szegedy et al. 2016), as torch's
    class_weights: tuple[float, ...] = ()  # on the loss of each class's pictures, as torch's cross_entropy has it


def training_inputs(
    examples: Examples, batch: Batch, step: Array, preprocessing: Preprocessing, step_config: StepConfig
) -> tuple[jax.Array, list[tuple[Array, Array]]]:
    """The network's input for a batch, and its labels, each with its share (B,) of the picture.

    What is random is a function of the seed, the step and the picture alone, on any number of devices.
    """
    augmentation = step_config.augmentation

    def keys(index: Array) -> jax.Array:
        return picture_keys(
            step_config.seed, step, index if examples.dataset_index is None else examples.dataset_index[index]
        )

    def gather(index: Array) -> jax.Array:
        image = examples.gather(index)
        return image if image.ndim == 2 else augment(image, keys(index), augmentation, preprocessing)

    label = examples.label[batch.index]
    if not augmentation.mixup and not augmentation.cutmix:
        return gather(batch.index), [(label, jnp.ones(label.shape))]
    image, partner = jnp.split(gather(jnp.concatenate([batch.index, batch.partner])), 2)
    mix_keys = jax.vmap(jax.random.fold_in, (0, None))(keys(batch.index), 2)
    image, share = mix(image, partner, mix_keys, augmentation)
    return image, [(label, share), (examples.label[batch.partner], 1 - share)]


TrainStep = Callable[..., tuple[TrainState, Counts]]  # of a state, pictures, a batch and a teacher's variables


def train_step(
    state: TrainState,
    examples: Examples | None,
    batch: Batch,
    teacher: Any = None,
    *,
    model: ResNet,
    tx: optax.GradientTransformation,
    preprocessing: Preprocessing,
    step_config: StepConfig = StepConfig(),  # noqa: B008, it is immutable
    ema_decay: float = 0.0,
    distillation: Distillation | None = None,
) -> tuple[TrainState, Counts]:
    """One update by the mean cross entropy of the batch over all devices; the counts are from before it.

    What `model` has frozen stays as it is to the bit, and nothing is propagated back through it where nothing before
    it trains. teacher: the variables of `distillation`'s network, which sees the same pictures at its own size.
    """
    examples = examples_for(examples, batch)
    image, labels = training_inputs(examples, batch, state.step, preprocessing, step_config)
    total = sum_over_devices(batch.mask.sum(), model.axis_name)
    teacher_logits: Any = None
    if distillation:
        teacher_image, _ = training_inputs(examples, batch, state.step, distillation.preprocessing, step_config)
        teacher_logits = distillation.model.apply(teacher, teacher_image, train=False)
    trainable, kept = split_frozen(state.params, model.frozen)

    def share_of_loss(trainable: Any) -> tuple[jax.Array, tuple[Any, Counts]]:
        variables = {"params": merge(trainable, kept), "batch_stats": state.batch_stats}
        logits, updates = model.apply(variables, image, batch.mask, train=True, mutable=["batch_stats"])
        smoothing, class_weights = step_config.label_smoothing, step_config.class_weights
        parts = [
            (*cross_entropy(logits, label, smoothing, class_weights), share * batch.mask) for label, share in labels
        ]
        loss = sum((losses * share).sum() for losses, _, share in parts)
        weight = sum((weights * share).sum() for _, weights, share in parts)
        loss /= sum_over_devices(weight, model.axis_name)
        if distillation:
            divergence = distillation_loss(logits, teacher_logits, distillation.temperature) * batch.mask
            loss = (1 - distillation.weight) * loss + distillation.weight * divergence.sum() / total
        counts = count_batch(logits, examples.label[batch.index], batch.mask)
        return loss, (updates["batch_stats"], counts)

    grads, (batch_stats, counts) = jax.grad(share_of_loss, has_aux=True)(trainable)
    grads = sum_over_devices(grads, model.axis_name)
    if model.batch_norm == "update":  # each device's own: their mean, weighted by the pictures they saw
        weight = batch.mask.sum() / total

        def mean(path: str, a: jax.Array) -> jax.Array:
            frozen = model.norm_is_frozen(path.rpartition("/")[0])
            return a if frozen else sum_over_devices(a * weight, model.axis_name)

        batch_stats = map_with_path(mean, batch_stats)
    opt_state = merge_opt_state(
        state.opt_state, jax.eval_shape(tx.init, trainable)
    )  # what will train later is left out
    updates, opt_state = tx.update(grads, opt_state, trainable)
    params = merge(optax.apply_updates(trainable, updates), kept)
    opt_state = merge_opt_state(opt_state, state.opt_state)
    new_state = TrainState(state.step + 1, params, batch_stats, opt_state)
    if ema_decay:
        new_state = dataclasses.replace(new_state, ema=update_ema(state.ema, new_state, ema_decay))
    return new_state, sum_over_devices(counts, model.axis_name)


def train_steps(
    state: TrainState,
    examples: Examples | None,
    batches: Batch,
    teacher: Any = None,
    num_steps: Array | None = None,
    *,
    step: TrainStep,
) -> tuple[TrainState, Counts]:
    """With the first `turns` of batches (K, B), or all of them, one after the other: counts (K,)."""
    return scan_prefix(num_steps, lambda state, batch: step(state, examples, batch, teacher), state, batches)


def scan_prefix(num_steps: Array | None, function: Callable[..., Any], carried: Any, each: Any) -> Any:
    """jax.lax.scan with no more than so many of `each`; the results of others are 0."""
    if num_steps is None:
        return jax.lax.scan(function, carried, each)
    function = jax.jit(function)  # traced once
    shapes = jax.eval_shape(function, carried, jax.tree.map(lambda array: array[0], each))[1]
    zeros = jax.tree.map(lambda one: jnp.zeros((len(jax.tree.leaves(each)[0]), *one.shape), one.dtype), shapes)

    def body(k: Array, so_far: Any) -> Any:
        carried, one = function(so_far[0], jax.tree.map(lambda array: array[k], each))
        return carried, jax.tree.map(lambda all, one: all.at[k].set(one), so_far[1], one)

    return jax.lax.fori_loop(0, num_steps, body, (carried, zeros))


Step = Callable[..., Any]  # of variables, pictures and a batch, of a model and its preprocessing


def map_batches(
    state: TrainState,
    examples: Examples | None,
    batches: Batch,
    num_steps: Array | None = None,
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
    step = partial(step, variables, examples, model=model, preprocessing=preprocessing)
    return scan_prefix(num_steps, lambda _, batch: (None, step(batch)), None, batches)[1]


def eval_step(
    variables: Any, examples: Examples | None, batch: Batch, *, model: ResNet, preprocessing: Preprocessing
) -> Predictions:
    """Of each picture of the batch (num_devices, B), padding too; with running statistics."""
    examples = examples_for(examples, batch)
    image = examples.gather(batch.index)
    if image.ndim == 4:
        image = preprocess(image, preprocessing)
    logits: Any = model.apply(variables, image, train=False)
    return jax.lax.all_gather(predictions_from_logits(logits, examples.label[batch.index]), model.axis_name)


def features_step(
    variables: Any, examples: Examples | None, batch: Batch, *, model: ResNet, preprocessing: Preprocessing
) -> jax.Array:
    """What the head sees of each picture of the batch: (num_devices, B, F), padding too."""
    examples = examples_for(examples, batch)
    image = preprocess(examples.gather(batch.index), preprocessing)
    return jax.lax.all_gather(model.apply(variables, image, train=False, features_only=True), model.axis_name)


def statistics_step(
    variables: Any, examples: Examples | None, batch: Batch, *, model: ResNet, preprocessing: Preprocessing
) -> Any:
    """The batch_stats that the batch would leave alone, over all devices."""
    examples = examples_for(examples, batch)
    image = preprocess(examples.gather(batch.index), preprocessing)
    model = model.clone(batch_norm="sync", norm_momentum=1.0)
    _, updates = model.apply(variables, image, batch.mask, train=True, mutable=["batch_stats"])
    return updates["batch_stats"]


def predict_step(variables: Any, image: Array, *, model: ResNet, preprocessing: Preprocessing) -> jax.Array:
    """Probabilities (B, num_classes) of uint8 pictures (B, H, W, 3)."""
    logits: Any = model.apply(variables, preprocess(image, preprocessing), train=False)
    return jax.nn.softmax(logits)
