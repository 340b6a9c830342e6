"""Compares LayerNorm and GELU with torch's, and each formulation with the plain one."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.ops.formulation import Formulation
from jaxft.ops.layer_norm import gelu, layer_norm_and_input, response_norm
from tests.helpers.formulations import random, same
from tests.helpers.reference import torch

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.mark.parametrize("approximate", [False, True])
def test_layer_norm_and_gelu_equal_the_plain_ones(approximate: bool) -> None:
    """The input of the norm is also that of a shortcut."""

    def block(x: Any, scale: Any, bias: Any, formulation: Formulation) -> jax.Array:
        y, x = layer_norm_and_input(x, scale, bias, 1e-6, formulation=formulation)
        return 2 * x + gelu(y, approximate, formulation)

    with jax.enable_x64(True):
        ours, plain = (partial(block, formulation=name) for name in ("cpu", "plain"))
        same(ours, plain, random(3, 4, 8) + 5, random(8), random(8))


@pytest.mark.parametrize("approximate", [False, True])
def test_gelu_is_torchs(approximate: bool) -> None:
    x = np.linspace(-8, 8, 101)
    image = torch.from_numpy(x).requires_grad_()
    expected = torch.nn.functional.gelu(image, approximate="tanh" if approximate else "none")
    expected.sum().backward()
    assert image.grad is not None
    with jax.enable_x64(True):
        y, pull_back = jax.vjp(partial(gelu, approximate=approximate), jnp.asarray(x))
        np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(pull_back(jnp.ones_like(y))[0], image.grad.numpy(), rtol=1e-11, atol=1e-13)


def test_layer_norm_is_torchs() -> None:
    x, scale, bias = random(2, 3, 7), random(7), random(7, seed=1)
    tensors: list[Any] = [torch.from_numpy(array).requires_grad_() for array in (x, scale, bias)]
    gradient = random(2, 3, 7, seed=2)
    expected = torch.nn.functional.layer_norm(tensors[0], (7,), tensors[1], tensors[2], eps=1e-6)
    expected.backward(torch.from_numpy(gradient))
    with jax.enable_x64(True):

        @jax.jit
        def norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
            return layer_norm_and_input(x, scale, bias, 1e-6)[0]

        y, pull_back = jax.vjp(norm, *map(jnp.asarray, (x, scale, bias)))
        np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-11)
        for ours, tensor in zip(pull_back(jnp.asarray(gradient)), tensors, strict=True):
            np.testing.assert_allclose(ours, tensor.grad.numpy(), rtol=1e-10, atol=1e-13)


def test_a_channel_of_zeros_has_a_finite_gradient() -> None:
    """The norm of zeros has the gradient 0, as in torch."""
    x = jnp.ones((1, 2, 2, 3)).at[..., 1].set(0)
    total = jax.jit(lambda x, scale, bias: response_norm(x, scale, bias, 1e-6).sum())
    gradients = jax.grad(total, (0, 1, 2))(x, jnp.ones(3), jnp.ones(3))
    assert all(np.isfinite(gradient).all() for gradient in gradients)
