"""Ten training steps beside PyTorch, and the relative difference of two arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.models.network import Network
from tests.helpers.reference import torch
from tests.helpers.torch_models import nchw


def relative(ours: Any, expected: Any) -> float:
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def ten_steps(
    model: Network,
    variables: Any,
    tx: optax.GradientTransformation,
    reference: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Any:
    """Trains both networks on the same ten batches of four random images of 32 pixels, in the model's dtype.

    Returns our variables; the reference changes in place.
    """

    @jax.jit
    def step(variables: Any, state: Any, x: jax.Array, label: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            logits, updates = model.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])
            return -jax.nn.log_softmax(logits)[jnp.arange(4), label].mean(), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        changes, state = tx.update(grads, state, variables["params"])
        return variables | updates | {"params": optax.apply_updates(variables["params"], changes)}, state

    rng, state = np.random.default_rng(2), jax.jit(tx.init)(variables["params"])
    for _ in range(10):
        x, label = rng.normal(size=(4, 32, 32, 3)), rng.integers(10, size=4)
        variables, state = step(variables, state, x, label)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(reference(nchw(x)), torch.from_numpy(label)).backward()
        optimizer.step()
    return variables


def check_equal(variables: Any, expected: Any) -> None:
    """Asserts that all variables differ by at most 1e-8 of their norm."""
    for (path, ours), want in zip(jax.tree.leaves_with_path(variables), jax.tree.leaves(expected), strict=True):
        assert relative(ours, want) <= 1e-8, jax.tree_util.keystr(path)
