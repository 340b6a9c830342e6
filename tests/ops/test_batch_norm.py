"""Compares each formulation of BatchNorm and max-pooling with a plain one, results and gradients, in float64."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.ops import batch_norm as batch_norm_module
from jaxft.ops.batch_norm import NormOptions, batch_norm
from jaxft.ops.formulation import Formulation
from jaxft.ops.pool import max_pool
from tests.helpers.formulations import random, same


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("formulation", ["plain", "cpu", "gpu", "tpu"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (8, 8), (5, 8), (8, 5), (7, 3)])
def test_max_pool_equals_flax(shape: tuple[int, int], formulation: Formulation) -> None:
    same(
        partial(max_pool, formulation=formulation),
        partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1))),
        random(2, *shape, 3),
    )


@pytest.mark.parametrize("formulation", ["plain", "cpu", "gpu", "tpu"])
def test_max_pool_gives_the_gradient_to_the_first_of_equals(formulation: Formulation) -> None:
    x = jnp.zeros((1, 4, 4, 1))
    gradient = jax.grad(lambda x: max_pool(x, formulation).sum())(x)[0, :, :, 0]
    np.testing.assert_array_equal(gradient, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("formulation", ["plain", "cpu", "cpu, as bfloat16", "gpu", "tpu"])
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("mask", [None, (1, 0, 1, 1), (0, 1, 0, 0)])
def test_batch_norm_equals_its_definition(
    mask: tuple[int, ...] | None, relu: bool, shortcut: bool, formulation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if formulation == "cpu, as bfloat16":
        monkeypatch.setattr(batch_norm_module, "WIDE_BYTES", 9)
        formulation = "cpu"
    options = NormOptions(relu, formulation=formulation)
    weights = None if mask is None else jnp.array(mask, float)

    def plain(x: jax.Array, other: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        kept = x if mask is None else x[np.flatnonzero(mask)]
        y = (x - kept.mean((0, 1, 2))) / jnp.sqrt(kept.var((0, 1, 2)) + 1e-5) * scale + bias + shortcut * other
        return nn.relu(y) if relu else y

    def ours(x: jax.Array, other: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        mean_estimate = jnp.full(6, 0.1)
        return batch_norm(x, other if shortcut else None, scale, bias, mean_estimate, weights, options)[0]

    same(ours, plain, random(4, 3, 5, 6), random(4, 3, 5, 6, seed=2), random(6), random(6, seed=2))
