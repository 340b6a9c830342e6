"""The train step and the evaluation steps: pure functions, mapped over devices by their callers."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxft.data.batches import Array, Batch, Examples, examples_for
from jaxft.models.fold import fold_norms
from jaxft.models.network import Network, is_random
from jaxft.models.partition import map_with_path, merge, merge_opt_state, split_frozen
from jaxft.models.policy import Policy, eval_features, eval_logits
from jaxft.ops.elementwise import sum_over_devices
from jaxft.targets import joint
from jaxft.targets.joint import ONE_CLASS, Targets
from jaxft.training.distill import Distillation, Teacher
from jaxft.training.state import TrainState, update_ema
from jaxft.transforms.augment import NO_AUGMENTATION, Augmentation, augment, image_keys, make_augmentation, mix
from jaxft.transforms.preprocessing import Preprocessing, preprocess

LAYERS = 4  # folded into an image's key for random layers; augmentation and mixup fold in smaller numbers


class StepConfig(NamedTuple):
    """Static settings of a train step."""

    model: Network
    tx: optax.GradientTransformation
    preprocessing: Preprocessing
    policy: Policy = Policy()
    seed: int = 0
    augmentation: Augmentation = NO_AUGMENTATION
    targets: Targets = ONE_CLASS
    ema_decay: float = 0.0  # 0: no EMA
    distillation: Distillation | None = None


# More than six parameters: the parts of a run that a step needs.
def make_step_config(
    config: ConfigDict,
    model: Network,
    policy: Policy,
    tx: optax.GradientTransformation,
    preprocessing: Preprocessing,
    teacher: Teacher | None = None,
    targets: Targets = ONE_CLASS,
) -> StepConfig:
    """Makes a step's settings from a run's config."""
    distillation = None
    if teacher:  # it sees the same crop of each image, at its own image size
        teacher_size = preprocessing.at_size(teacher.preprocessing.image_size)
        distillation = Distillation(
            teacher.model,
            teacher.policy,
            teacher.preprocessing._replace(resize=teacher_size.resize),
            config.distill.weight,
            config.distill.temperature,
        )
    return StepConfig(
        model,
        tx,
        preprocessing,
        policy,
        config.seed,
        make_augmentation(config.augment),
        targets,
        ema_decay=config.optimizer.ema_decay,
        distillation=distillation,
    )


class EvalConfig(NamedTuple):
    """Static settings of an evaluation step."""

    model: Network
    preprocessing: Preprocessing
    policy: Policy = Policy()
    fold: bool = True  # fold BatchNorm into the convolutions first
    targets: Targets = ONE_CLASS


def random_keys(examples: Examples, index: Array, step: Array, seed: int) -> jax.Array:
    """Returns a key for each image (B,), which depends only on the seed, the step and its index in the dataset."""
    return image_keys(seed, step, index if examples.dataset_index is None else examples.dataset_index[index])


def random_layer_keys(model: Network, examples: Examples, batch: Batch, step: Array, seed: int) -> jax.Array | None:
    """Returns the keys (B,) of a model's random layers for a batch; None if it has no such layers."""
    if not is_random(model):
        return None
    return jax.vmap(jax.random.fold_in, (0, None))(random_keys(examples, batch.index, step, seed), LAYERS)


def training_inputs(
    examples: Examples, batch: Batch, step: Array, preprocessing: Preprocessing, seed: int, augmentation: Augmentation
) -> tuple[jax.Array, list[tuple[Any, Array]]]:
    """Returns the network's input for a batch, and its labels, each with its share (B,) of the image.

    Randomness depends only on the seed, the step and the image's index in the dataset, on any number of devices.
    """

    def keys(index: Array) -> jax.Array:
        return random_keys(examples, index, step, seed)

    def gather(index: Array) -> jax.Array:
        image = examples.gather(index)
        return image if image.ndim == 2 else augment(image, keys(index), augmentation, preprocessing)

    label = examples.gather_label(batch.index)
    if not augmentation.mixup and not augmentation.cutmix:
        return gather(batch.index), [(label, jnp.ones(batch.index.shape))]
    image, partner = jnp.split(gather(jnp.concatenate([batch.index, batch.partner])), 2)
    mix_keys = jax.vmap(jax.random.fold_in, (0, None))(keys(batch.index), 2)
    image, share = mix(image, partner, mix_keys, augmentation)
    return image, [(label, share), (examples.gather_label(batch.partner), 1 - share)]


TrainStep = Callable[..., tuple[TrainState, Any]]  # (state, examples, batch, teacher_variables)


def train_step(
    state: TrainState, examples: Examples | None, batch: Batch, teacher_variables: Any = None, *, config: StepConfig
) -> tuple[TrainState, Any]:
    """Makes one update with the mean loss of the batch over all devices; the counts are from before the update.

    Frozen parameters keep their bits, and nothing is propagated back through a frozen prefix. teacher_variables:
    those of config.distillation's network, which gets the same images at its own size.
    """
    model, policy, distillation = config.model, config.policy, config.distillation
    examples = examples_for(examples, batch)
    inputs = partial(training_inputs, examples, batch, state.step, seed=config.seed, augmentation=config.augmentation)
    image, labels = inputs(preprocessing=config.preprocessing)
    total = sum_over_devices(batch.mask.sum(), policy.axis_name)
    teacher_logits: Any = None
    if distillation:
        teacher_image, _ = inputs(preprocessing=distillation.preprocessing)
        teacher_logits = eval_logits(distillation.model, teacher_variables, teacher_image, distillation.policy)
    trainable, kept = split_frozen(state.params, policy.frozen)
    mask = batch.mask
    if policy.batch_norm == "update" and jax.lax.axis_size(policy.axis_name) > 1:
        # A device whose share is only padding normalises it by its own statistics, which nothing else uses. Without
        # any, each BatchNorm would multiply it by 1 / sqrt(epsilon), until float32 overflows and the loss is NaN.
        mask = jnp.where(mask.sum() > 0, mask, 1)
    layer_keys = random_layer_keys(model, examples, batch, state.step, config.seed)

    def share_of_loss(trainable: Any) -> tuple[jax.Array, tuple[Any, Any]]:
        variables = {"params": merge(trainable, kept), "batch_stats": state.batch_stats}
        apply = partial(model.apply, train=True, policy=policy, keys=layer_keys, mutable=["batch_stats"])
        logits, updates = apply(variables, image, mask)
        loss = joint.mean_loss(config.targets, logits, labels, batch.mask, policy.axis_name)
        if distillation:
            temperature = distillation.temperature
            divergence = joint.distillation_loss(config.targets, logits, teacher_logits, temperature) * batch.mask
            loss = (1 - distillation.weight) * loss + distillation.weight * divergence.sum() / total
        counts = joint.count_batch(config.targets, logits, examples.gather_label(batch.index), batch.mask)
        return loss, (updates.get("batch_stats", {}), counts)

    grads, (batch_stats, counts) = jax.grad(share_of_loss, has_aux=True)(trainable)
    grads = sum_over_devices(grads, policy.axis_name)
    if policy.batch_norm == "update":
        batch_stats = average_statistics(batch_stats, batch.mask.sum() / total, policy)
    # Leave out the momentum of parameters that are unfrozen later.
    opt_state = merge_opt_state(state.opt_state, jax.eval_shape(config.tx.init, trainable))
    updates, opt_state = config.tx.update(grads, opt_state, trainable)
    params = merge(optax.apply_updates(trainable, updates), kept)
    opt_state = merge_opt_state(opt_state, state.opt_state)
    new_state = TrainState(state.step + 1, params, batch_stats, opt_state)
    if config.ema_decay:
        new_state = dataclasses.replace(new_state, ema=update_ema(state.ema, new_state, config.ema_decay))
    return new_state, sum_over_devices(counts, policy.axis_name)


def average_statistics(batch_stats: Any, weight: jax.Array, policy: Policy) -> Any:
    """Averages the devices' running statistics. weight: this device's share of the images; all shares sum to 1."""

    def mean(path: str, a: jax.Array) -> jax.Array:
        frozen = policy.norm_is_frozen(path.rpartition("/")[0])
        return a if frozen else sum_over_devices(a * weight, policy.axis_name)

    return map_with_path(mean, batch_stats)


def train_steps(
    state: TrainState,
    examples: Examples | None,
    batches: Batch,
    teacher_variables: Any = None,
    num_steps: Array | None = None,
    *,
    step: TrainStep,
) -> tuple[TrainState, Any]:
    """Trains on the first `num_steps` of K stacked batches (K, B), or on all; returns counts (K,), 0 for the others."""
    return scan_prefix(num_steps, lambda state, batch: step(state, examples, batch, teacher_variables), state, batches)


def scan_prefix(num_steps: Array | None, function: Callable[..., Any], carried: Any, each: Any) -> Any:
    """Runs jax.lax.scan over the first `num_steps` elements, or over all; the results of the others are 0."""
    if num_steps is None:
        return jax.lax.scan(function, carried, each)
    function = jax.jit(function)  # traced once
    shapes = jax.eval_shape(function, carried, jax.tree.map(lambda array: array[0], each))[1]
    zeros = jax.tree.map(lambda one: jnp.zeros((len(jax.tree.leaves(each)[0]), *one.shape), one.dtype), shapes)

    def body(k: Array, so_far: Any) -> Any:
        carried, one = function(so_far[0], jax.tree.map(lambda array: array[k], each))
        return carried, jax.tree.map(lambda all, one: all.at[k].set(one), so_far[1], one)

    return jax.lax.fori_loop(0, num_steps, body, (carried, zeros))


EvalStep = Callable[..., Any]  # (variables, examples, batch, *, config: EvalConfig)


def map_batches(
    state: TrainState,
    examples: Examples | None,
    batches: Batch,
    num_steps: Array | None = None,
    *,
    step: EvalStep,
    config: EvalConfig,
) -> Any:
    """Maps `step` over the first `num_steps` of K stacked batches (K, B), or over all: (K, ...)."""
    variables: Any = state.variables()
    if config.fold:
        model, variables = fold_norms(config.model, variables)
        config = config._replace(model=model)
    step = partial(step, variables, examples, config=config)
    return scan_prefix(num_steps, lambda _, batch: (None, step(batch)), None, batches)[1]


def eval_step(variables: Any, examples: Examples | None, batch: Batch, *, config: EvalConfig) -> Any:
    """Returns joint.predictions of each image with running statistics, (num_devices, B), padding included."""
    examples = examples_for(examples, batch)
    image = examples.gather(batch.index)
    if image.ndim == 4:
        image = preprocess(image, config.preprocessing)
    logits = eval_logits(config.model, variables, image, config.policy)
    predictions = joint.predictions(config.targets, logits, examples.gather_label(batch.index))
    return jax.lax.all_gather(predictions, config.policy.axis_name)


def features_step(variables: Any, examples: Examples | None, batch: Batch, *, config: EvalConfig) -> jax.Array:
    """Returns the pooled features that the head reads, (num_devices, B, F), padding included."""
    examples = examples_for(examples, batch)
    image = preprocess(examples.gather(batch.index), config.preprocessing)
    features = eval_features(config.model, variables, image, config.policy)
    return jax.lax.all_gather(features, config.policy.axis_name)


def statistics_step(variables: Any, examples: Examples | None, batch: Batch, *, config: EvalConfig) -> Any:
    """Returns batch_stats that hold only this batch's statistics, over all devices."""
    examples = examples_for(examples, batch)
    image = preprocess(examples.gather(batch.index), config.preprocessing)
    policy = config.policy._replace(batch_norm="sync", norm_momentum=1.0)
    _, updates = config.model.apply(variables, image, batch.mask, train=True, policy=policy, mutable=["batch_stats"])
    return updates.get("batch_stats", {})


Layer = Literal["pooled", "logits", "probabilities"]


def predict_step(variables: Any, image: Array, *, config: EvalConfig, layer: Layer = "probabilities") -> jax.Array:
    """Returns a row for each of the uint8 images (B, H, W, 3): pooled features (B, F) or one number per class."""
    image = preprocess(image, config.preprocessing)
    if layer == "pooled":
        return eval_features(config.model, variables, image, config.policy)
    logits = eval_logits(config.model, variables, image, config.policy)
    return jax.nn.softmax(logits) if layer == "probabilities" else logits
