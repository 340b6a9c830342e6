"""Fits a head to a backbone's fixed features: multinomial logistic regression by L-BFGS, without a learning rate.

The penalty is chosen on held-out training images, as in published linear probes (Kornblith et al. 2019, Radford et al.
2021). Neither the choice nor the result depends on the scale of the features.
"""

import dataclasses
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jaxft import interrupts
from jaxft.data.batches import replicate
from jaxft.data.loader import Loader, ResidentLoader
from jaxft.errors import UserError
from jaxft.main_process import is_main_process
from jaxft.models.heads import HEAD_NORM, set_head, unfold_standardize
from jaxft.targets import joint
from jaxft.targets.joint import ONE_CLASS, Targets, first_class
from jaxft.training.evaluation import extract_features
from jaxft.training.loop import Trainer, metrics_row
from jaxft.training.state import TrainState
from jaxft.training.steps import EvalConfig
from jaxft.training.steps_per_call import StepsPerCall

INVERSE_PENALTIES = tuple(float(10**exponent) for exponent in np.arange(-1, 4.1, 0.5))  # to choose from
HELD_OUT = 0.2  # fraction of each class on which they are compared
ITERATIONS = 500  # of L-BFGS, at most; it stops earlier at the optimum
TOLERANCE = 1e-4  # norm of the gradient at the optimum, relative to the gradient at 0
MEMORY = 20  # history size of L-BFGS

ONLY_FIT = (
    "optimizer.fit_head=only trains only the head, on fixed features: it needs optimizer.freeze=backbone, and no "
    "optimizer.unfreeze, augment keys or distill.teacher; or set optimizer.fit_head=first"
)


# ---- the solver ----


class LossConfig(NamedTuple):
    """Settings of the loss, the same as in training; static in jit."""

    num_outputs: int
    targets: Targets = ONE_CLASS


class Fit(NamedTuple):
    kernel: np.ndarray  # float32 (F, C), for features as the network computes them
    bias: np.ndarray  # float32 (C,)
    inverse_penalty: float  # the chosen one of INVERSE_PENALTIES


def fit_linear_head(features: np.ndarray, label: Any, loss_config: LossConfig, seed: int) -> Fit:
    """Chooses the penalty by the loss on held-out images, then fits all images. features: float32 (N, F)."""
    center, scale = standardization(features)
    inputs = ((features - center) / scale).astype(np.float32)
    zero = {
        "kernel": np.zeros((features.shape[1], loss_config.num_outputs), np.float32),
        "bias": np.zeros(loss_config.num_outputs, np.float32),
    }
    inverse_penalty = INVERSE_PENALTIES[len(INVERSE_PENALTIES) // 2]
    held_out = hold_out(first_class(loss_config.targets, label), seed)
    everything = np.ones(len(features), np.float32)
    if held_out.any():
        kept = np.where(held_out, 0, everything)
        losses, params = [], zero
        for candidate in INVERSE_PENALTIES:  # warm starts: each fit begins where the one with the larger penalty ended
            interrupts.check()
            params = minimize(params, inputs, label, kept, np.float32(candidate), loss_config)
            losses.append(float(mean_loss(params, inputs, label, 1 - kept, loss_config)))
            if len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]:  # weaker penalties take the longest
                break
        inverse_penalty = INVERSE_PENALTIES[int(np.argmin(losses))]
    params = jax.device_get(minimize(zero, inputs, label, everything, np.float32(inverse_penalty), loss_config))
    kernel = params["kernel"] / scale
    bias = params["bias"] - center @ kernel
    return Fit(kernel.astype(np.float32), bias.astype(np.float32), inverse_penalty)


def standardization(features: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the mean (F,) of the features and one scale, with which centred features have a mean square norm of 1.

    A scale for each feature would amplify those that hardly vary: with 250 to 1,000 images of CIFAR-10, it costs up to
    2 points of accuracy.
    """
    center = features.mean(0, dtype=np.float64)
    return center, float(np.sqrt(features.var(0, dtype=np.float64).sum())) or 1.0


def hold_out(label: np.ndarray, seed: int) -> np.ndarray:
    """Returns a mask (N,) of HELD_OUT of each class, chosen at random; at least one image of each class stays."""
    mask = np.zeros(len(label), bool)
    rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
    for own in (np.flatnonzero(label == c) for c in np.unique(label)):
        count = min(max(round(HELD_OUT * len(own)), 1), len(own) - 1)
        mask[rng.permutation(own)[:count]] = True
    return mask


@partial(jax.jit, static_argnames="loss_config")
def mean_loss(params: Any, inputs: jax.Array, label: Any, mask: jax.Array, loss_config: LossConfig) -> jax.Array:
    """Returns the loss of the images whose mask is 1, as the train step computes it."""
    logits = jnp.matmul(inputs, params["kernel"], precision=jax.lax.Precision.HIGHEST) + params["bias"]
    return joint.mean_loss(loss_config.targets, logits, [(label, jnp.ones_like(mask))], mask, axis_name=None)


@partial(jax.jit, static_argnames="loss_config")
def minimize(
    params: Any,
    inputs: jax.Array,
    label: Any,
    mask: jax.Array,
    inverse_penalty: jax.Array,
    loss_config: LossConfig,
) -> Any:
    """Minimises mean_loss + |kernel|^2 / (2 * inverse_penalty * N) by L-BFGS, for the N images whose mask is 1.

    This is the objective of scikit-learn's LogisticRegression with C = inverse_penalty. The mask keeps the shapes, so
    that one compiled program does all fits.
    """

    def value(params: Any) -> jax.Array:
        penalty = (params["kernel"] ** 2).sum() / (2 * inverse_penalty * mask.sum())
        return mean_loss(params, inputs, label, mask, loss_config) + penalty

    lbfgs = optax.lbfgs(memory_size=MEMORY)
    value_and_grad = optax.value_and_grad_from_state(value)
    goal = TOLERANCE * optax.tree.norm(jax.grad(value)(jax.tree.map(jnp.zeros_like, params)))

    def unfinished(carried: Any) -> jax.Array:
        _, state, count = carried
        return (count == 0) | ((count < ITERATIONS) & (optax.tree.norm(optax.tree.get(state, "grad")) > goal))

    def iterate(carried: Any) -> Any:
        params, state, count = carried
        loss, grad = value_and_grad(params, state=state)
        updates, state = lbfgs.update(grad, state, params, value=loss, grad=grad, value_fn=value)
        return optax.apply_updates(params, updates), state, count + 1

    return jax.lax.while_loop(unfinished, iterate, (params, lbfgs.init(params), 0))[0]


# ---- the fit in a run ----


def without_epochs(config: ConfigDict) -> ConfigDict:
    """Returns the config with a single epoch if the run only fits the head, so that the config describes the run.

    Raises UserError if a part is unfrozen later.
    """
    if config.optimizer.fit_head != "only":
        return config
    if config.optimizer.unfreeze:
        raise UserError(ONLY_FIT)
    config = ConfigDict(config.to_dict())
    config.num_epochs = 1
    return config


def extract_training_features(
    config: ConfigDict, eval_config: EvalConfig, state: TrainState, loader: Loader, per_call: StepsPerCall
) -> ResidentLoader:
    """Returns a loader of the training set's features, float32 (N, F). The given one may hold them already.

    Raises UserError if a feature is not finite.
    """
    if loader.examples is None or loader.examples.shape is not None:
        eval_config = eval_config._replace(policy=eval_config.policy._replace(test_flip=False))
        keep = config.data.cache != "never"
        loader = ResidentLoader(extract_features(eval_config, state, loader, config.batch_size, per_call, keep=keep))
    assert isinstance(loader, ResidentLoader), "features are resident"
    finite = np.isfinite(np.asarray(jax.device_get(loader.examples.image))).all(1)
    if wrong := int((~finite).sum()):
        raise UserError(
            f"the backbone's features of {wrong:,} of {len(finite):,} images are not finite; choose another "
            "model.pretrained, or set model.dtype=float32"
        )
    return loader


def fit_head(
    config: ConfigDict,
    eval_config: EvalConfig,
    state: TrainState,
    loader: Loader,
    targets: Targets,
    per_call: StepsPerCall,
) -> tuple[TrainState, Any]:
    """Returns the state with a head fitted to all training images, and the head's counts on them.

    The loader holds images or cached features. With head_norm, the head is converted to its outputs. Raises UserError
    if a feature is not finite.
    """
    examples = extract_training_features(config, eval_config, state, loader, per_call).examples
    features, label = jax.tree.map(np.asarray, jax.device_get((examples.image, examples.label)))
    features = features.astype(np.float32)
    loss_config = LossConfig(eval_config.model.num_classes, targets)
    fit = fit_linear_head(features, label, loss_config, config.seed)
    head = {"kernel": fit.kernel, "bias": fit.bias}
    logits = jnp.asarray(features @ head["kernel"] + head["bias"])
    if HEAD_NORM in state.batch_stats:
        head = unfold_standardize(head, jax.device_get(state.batch_stats[HEAD_NORM]))
    if jax.process_count() > 1:  # all processes must have the same bits
        head = multihost_utils.broadcast_one_to_all(head)
    if is_main_process():
        print(
            f"head     fitted to {len(features):,} images by L-BFGS; inverse penalty {fit.inverse_penalty:g}, "
            f"chosen on a {HELD_OUT:.0%} sample",
            flush=True,
        )
    counts = jax.device_get(joint.count_batch(targets, logits, label, jnp.ones(len(features))))
    path = eval_config.model.head
    state = dataclasses.replace(state, params=set_head(state.params, path, replicate(head)))
    if state.ema:
        averages = {**state.ema, "params": set_head(state.ema["params"], path, replicate(head))}
        state = dataclasses.replace(state, ema=averages)
    return state, counts


def fit_head_as_epoch(
    trainer: Trainer,
    eval_config: EvalConfig,
    state: TrainState,
    per_call: StepsPerCall,
) -> TrainState:
    """Fits the head in place of an epoch of steps: one row of metrics and one checkpoint, of step 1."""
    if int(state.step):  # a resumed run that lacks only the evaluation
        return state
    started = time.monotonic()
    state, counts = fit_head(trainer.config, eval_config, state, trainer.loader, trainer.targets, per_call)
    state = dataclasses.replace(state, step=replicate(np.int32(1)))
    seconds = time.monotonic() - started
    values = joint.losses_of(trainer.targets, counts)
    trainer.record(metrics_row(1, 1, "train", values, int(counts.num_images), seconds))
    trainer.checkpoints.save(state, trainer.info)
    return state
