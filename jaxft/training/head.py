"""Prepares the head at step 0: standardises its input by statistics of the training set, and fits it."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jaxft.data.batches import replicate
from jaxft.data.loader import Loader
from jaxft.main_process import is_main_process
from jaxft.models.heads import HEAD_NORM, get_head, set_head, unfold_standardize
from jaxft.targets.joint import Targets
from jaxft.training.probe import extract_training_features, fit_head, standardization
from jaxft.training.state import TrainState
from jaxft.training.steps import EvalConfig
from jaxft.training.steps_per_call import StepsPerCall


# More than six parameters: those of fit_head, and whether the head is new.
def prepare_head(
    config: ConfigDict,
    eval_config: EvalConfig,
    state: TrainState,
    loader: Loader,
    targets: Targets,
    per_call: StepsPerCall,
    *,
    keeps_head: bool,
) -> TrainState:
    """Sets the statistics of model.head_norm and fits the head, as the config asks for; else returns `state`.

    The loader holds the training images or their cached features, which are computed at most once. keeps_head: the head
    is another run's, and computes the same logits afterwards. Raises UserError if a feature is not finite.
    """
    # Running statistics of random weights are 0 and 1, so features in evaluation mode are not those of training.
    standardise = config.model.head_norm and bool(config.model.pretrained)
    fit = config.optimizer.fit_head == "first"
    if config.model.head_norm and not standardise and is_main_process():
        print("head     features of random weights are not standardised", flush=True)
    if standardise or fit:
        loader = features = extract_training_features(config, eval_config, state, loader, per_call)
        if standardise:
            inputs, path = np.asarray(jax.device_get(features.examples.image)), eval_config.model.head
            state = set_head_norm(state, inputs, keeps_head=keeps_head, path=path)
    if fit:
        state, _ = fit_head(config, eval_config, state, loader, targets, per_call)
    return state


def set_head_norm(state: TrainState, features: np.ndarray, *, keeps_head: bool, path: tuple[str, ...]) -> TrainState:
    """Returns the state with the statistics of these features, float32 (N, F), in head_norm.

    keeps_head: convert the head, so that it computes the same logits; else its arrays stay as they are. path: the
    network's `head`.
    """
    center, scale = standardization(features)
    statistics = {"mean": np.float32(center), "deviation": np.float32(scale / np.sqrt(features.shape[1]))}
    head: Any = jax.device_get(get_head(state.params, path))
    if keeps_head:
        head = unfold_standardize(head, statistics)
    if jax.process_count() > 1:  # all processes must have the same bits
        statistics, head = multihost_utils.broadcast_one_to_all((statistics, head))
    if is_main_process():
        print(
            f"head     features standardised by {len(features):,} training images (mean {center.mean():.3g}, deviation "
            f"{statistics['deviation']:.3g})",
            flush=True,
        )

    def prepared(variables: Any) -> dict[str, Any]:
        params, batch_stats = variables["params"], variables["batch_stats"]
        own_head, own_statistics = replicate((head, statistics))  # each a copy, since a step donates its state
        return {
            "params": set_head(params, path, own_head),
            "batch_stats": {**batch_stats, HEAD_NORM: own_statistics},
        }

    newest = prepared({"params": state.params, "batch_stats": state.batch_stats})
    return dataclasses.replace(state, **newest, ema=prepared(state.ema) if state.ema else {})
