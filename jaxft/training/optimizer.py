"""Optimizers in torch's conventions, learning rate schedules, and learning rate factors by part of the network."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxft.models.partition import Parts, first_epoch, map_with_path, stage_of

# optimizer.name -> scaling of the gradients, before weight decay and learning rate
SCALERS = {
    "adamw": optax.scale_by_adam,
    "adabelief": optax.scale_by_belief,
    "lamb": optax.scale_by_adam,  # the trust ratio follows the weight decay
    "lion": optax.scale_by_lion,
}

# Not decayed if decay_all is False, although they have three axes: timm's VisionTransformer.no_weight_decay
UNDECAYED = ("cls_token", "dist_token", "pos_embed", "reg_token")


def learning_rate_schedule(config: ConfigDict, steps_per_epoch: int, num_epochs: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates.

    It grows linearly from 0 in the warm-up, and is then constant, falls to 0 in half a cosine or a line, or falls in
    steps. One update takes optimizer.accumulate_steps batches.
    """
    updates_per_epoch = steps_per_epoch / config.accumulate_steps
    warmup = int(config.warmup_epochs * updates_per_epoch)
    decay = max(int(num_epochs * updates_per_epoch) - warmup, 1)
    step = max(round(config.step_epochs * updates_per_epoch), 1)  # torch's StepLR
    schedule = {
        "constant": lambda: optax.constant_schedule(config.learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, decay),
        "linear": lambda: optax.linear_schedule(config.learning_rate, 0.0, decay),
        "step": lambda: optax.exponential_decay(config.learning_rate, step, config.step_factor, staircase=True),
    }[config.schedule]()
    if not warmup:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), schedule], [warmup])


def learning_rate_factor(config: ConfigDict, path: str, parts: Parts) -> float:
    """Returns a parameter's learning rate factor: layer_decay once per later part, and head_factor for the head."""
    part = stage_of(path, parts)
    later_parts = len(parts) - 1 - list(parts).index(part)
    return config.layer_decay**later_parts * (config.head_factor if part == "head" else 1.0)


def is_decayed(path: str, array: Any) -> bool:
    """Returns whether weight decay applies to a parameter if decay_all is False: not to vectors, as in timm."""
    return array.ndim > 1 and path.rpartition("/")[2] not in UNDECAYED


def unfreeze_warmup(config: ConfigDict, steps_per_epoch: int, parts: Parts) -> optax.GradientTransformation:
    """Multiplies the updates of a part by a factor that grows linearly from 0 to 1 after the part is unfrozen.

    The warm-up takes optimizer.unfreeze_warmup epochs. The updates of parts that train from the beginning do not
    change. When a backbone joins a trained head, its momentum is zero, and the learning rate may be at its peak.
    """
    updates_per_epoch = steps_per_epoch / config.accumulate_steps
    length = max(config.unfreeze_warmup * updates_per_epoch, 1)

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByScheduleState]:
        def scaled(path: str, array: jax.Array) -> jax.Array:
            epoch = first_epoch(config, path, parts)
            if epoch <= 1:
                return array
            since = state.count - (epoch - 1) * updates_per_epoch
            return array * jnp.clip(since / length, 0, 1).astype(array.dtype)

        return map_with_path(scaled, updates), optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def make_optimizer(
    config: ConfigDict, steps_per_epoch: int, num_epochs: int, parts: Parts
) -> optax.GradientTransformation:
    """Makes the optimizer of a config's `optimizer` section.

    parts: those of the network, whose parameters are nested dicts.

    sgd is torch.optim.SGD: g += weight_decay * p; m = momentum * m + g; p -= learning_rate * m, and with Nesterov
    p -= learning_rate * (g + momentum * m). The others decouple the decay, as torch.optim.AdamW does.
    """

    def decayed(params: Any) -> Any:
        return jax.tree.map(lambda _: True, params) if config.decay_all else map_with_path(is_decayed, params)

    decay = optax.add_decayed_weights(config.weight_decay, decayed) if config.weight_decay else optax.identity()
    if config.name == "sgd":
        trace = optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity()
        direction = [decay, trace]
    else:
        trust = [optax.scale_by_trust_ratio()] if config.name == "lamb" else []
        direction = [SCALERS[config.name](), decay, *trust]
    if config.layer_decay != 1 or config.head_factor != 1:

        def scaled(path: str, update: jax.Array) -> jax.Array:
            return update * learning_rate_factor(config, path, parts)

        direction.append(optax.stateless(lambda updates, _: map_with_path(scaled, updates)))
    if config.unfreeze_warmup and config.unfreeze:
        direction.append(unfreeze_warmup(config, steps_per_epoch, parts))
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.adaptive_clip:
        clip.append(optax.adaptive_grad_clip(config.adaptive_clip))
    schedule = learning_rate_schedule(config, steps_per_epoch, num_epochs)
    tx = optax.chain(*clip, *direction, optax.scale_by_learning_rate(schedule))
    if config.accumulate_steps == 1:
        return tx
    return optax.MultiSteps(tx, config.accumulate_steps).gradient_transformation()
