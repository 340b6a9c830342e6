"""Compares each formulation of depthwise convolutions with the plain one, and the norms and GELU with torch's."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.ops import depthwise
from jaxft.ops.dense import dense, patch_conv
from jaxft.ops.depthwise import depthwise_conv
from jaxft.ops.formulation import Formulation
from jaxft.ops.layer_norm import gelu, layer_norm, response_norm
from tests.helpers.devices import uncached_programs
from tests.helpers.formulations import on_x86, onednn_in_double_precision, random, same
from tests.helpers.reference import torch
from tests.helpers.torch_models import nchw

pytestmark = pytest.mark.usefixtures("compile_quickly")


def biased(x: jax.Array, kernel: jax.Array, bias: jax.Array, formulation: Formulation = "plain") -> jax.Array:
    return depthwise_conv(x, kernel, formulation, bias)


@pytest.mark.parametrize(("formulation", "large_map"), [("cpu", 0), ("cpu-onednn", 0), ("cpu-onednn", 1000)])
@pytest.mark.parametrize("shape", [(1, 1, 5), (8, 9, 3)])
def test_formulations_equal_the_plain_one(
    shape: tuple[int, int, int], formulation: Formulation, large_map: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depthwise, "_LARGE_MAP", large_map)
    with jax.enable_x64(True), onednn_in_double_precision():
        arguments = random(3, *shape), random(7, 7, 1, shape[-1]), random(shape[-1])
        same(partial(biased, formulation=formulation), biased, *arguments)


@on_x86
@pytest.mark.parametrize("large_map", [0, 1000])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_onednn_equals_the_plain_one_in_its_own_types(
    dtype: Any, large_map: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depthwise, "_LARGE_MAP", large_map)
    x, kernel = (jnp.asarray(array, dtype) for array in (random(3, 9, 12, 16), random(7, 7, 1, 16)))
    bias = jnp.asarray(random(16), jnp.float32)

    def plain(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return biased(x.astype(jnp.float32), kernel.astype(jnp.float32), bias).astype(dtype)

    with uncached_programs():
        ours = partial(biased, formulation="cpu-onednn")
        same(ours, plain, x, kernel, bias, tolerance=1e-6 if dtype == jnp.float32 else 0.01)


@pytest.mark.parametrize("formulation", ["plain", "cpu", "cpu-onednn"])
def test_patches_are_torchs_convolution(formulation: Formulation) -> None:
    """Also of images with pixels beyond the last whole patch."""
    x, kernel = random(2, 11, 14, 3), random(4, 4, 3, 5)
    weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    expected = torch.nn.functional.conv2d(nchw(x), weight, stride=4)
    with jax.enable_x64(True), onednn_in_double_precision():
        ours = patch_conv(jnp.asarray(x), jnp.asarray(kernel), formulation)
        np.testing.assert_allclose(ours, expected.numpy().transpose(0, 2, 3, 1), rtol=1e-12, atol=1e-12)
        same(partial(dense, formulation=formulation), jnp.matmul, random(2, 3, 5), random(5, 4))


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
        norm = jax.jit(partial(layer_norm, epsilon=1e-6))
        y, pull_back = jax.vjp(norm, *map(jnp.asarray, (x, scale, bias)))
        np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-11)
        for ours, tensor in zip(pull_back(jnp.asarray(gradient)), tensors, strict=True):
            np.testing.assert_allclose(ours, tensor.grad.numpy(), rtol=1e-10, atol=1e-13)


def test_a_channel_of_zeros_has_a_finite_gradient() -> None:
    """As in torch: the norm of zeros has the gradient 0."""
    x = jnp.ones((1, 2, 2, 3)).at[..., 1].set(0)
    total = jax.jit(lambda x, scale, bias: response_norm(x, scale, bias, 1e-6).sum())
    gradients = jax.grad(total, (0, 1, 2))(x, jnp.ones(3), jnp.ones(3))
    assert all(np.isfinite(gradient).all() for gradient in gradients)
