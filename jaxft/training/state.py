"""The training state, and the EMA of its weights."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxft.data.batches import Array
from jaxft.models.network import Network, example_side
from jaxft.models.partition import split_frozen
from jaxft.models.policy import Policy


@struct.dataclass
class TrainState:
    """Everything that a step changes. It is replicated, so arrays have no leading device axis."""

    step: Array  # int32, number of steps done
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = struct.field(default_factory=dict)  # averaged params and batch_stats; {} without EMA

    def variables(self) -> dict[str, Any]:
        """Returns the variables to evaluate, predict and export with: the EMA if there is one."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def create_train_state(
    model: Network,
    tx: optax.GradientTransformation,
    rng: jax.Array,
    policy: Policy = Policy(),  # noqa: B008, immutable
    *,
    ema: bool = False,
) -> TrainState:
    """Creates the state of step 0 with random weights, initialised as torchvision does."""
    # NOTES: Compiling random numbers (docs/notes/input-and-startup.md): Philox instead of JAX's default, threefry
    side = example_side(model)
    rng = jax.random.wrap_key_data(jnp.tile(jax.random.key_data(rng), 2), impl="rbg")
    return initial_train_state(tx, model.init(rng, jnp.zeros((1, side, side, 3)), train=False), policy, ema=ema)


def initial_train_state(
    tx: optax.GradientTransformation,
    variables: Mapping[str, Any],
    policy: Policy = Policy(),  # noqa: B008, immutable
    *,
    ema: bool = False,
) -> TrainState:
    """Creates the state of step 0 from these variables. The optimizer's state holds only parameters that train."""
    variables = {"batch_stats": {}, **variables}  # which a network without BatchNorm lacks
    trainable, _ = split_frozen(variables["params"], policy.frozen)
    averages = jax.tree.map(jnp.array, dict(variables)) if ema else {}
    opt_state = jax.jit(tx.init)(trainable)  # one program, not one for each shape
    return TrainState(jnp.int32(0), variables["params"], variables["batch_stats"], opt_state, averages)


def abstract_train_state(
    model: Network,
    tx: optax.GradientTransformation,
    policy: Policy = Policy(),  # noqa: B008, immutable
    *,
    ema: bool = False,
) -> TrainState:
    """Returns the shapes and dtypes of the state."""
    return jax.eval_shape(partial(create_train_state, model, tx, policy=policy, ema=ema), jax.random.key(0))


def update_ema(averages: Any, state: TrainState, decay: float) -> Any:
    """Updates the EMA after a step. Its decay is smaller at first, to forget the initial weights soon."""
    weight = 1 - jnp.minimum(decay, (1 + state.step) / (10 + state.step))
    newest = {"params": state.params, "batch_stats": state.batch_stats}
    return jax.tree.map(lambda mean, new: mean + weight * (new - mean), averages, newest)
