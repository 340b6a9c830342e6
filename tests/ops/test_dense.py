"""Compares dense layers and convolutions of patches with their plain formulations and torch's."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.ops.dense import dense, dense_and_gelu, patch_conv
from jaxft.ops.formulation import Formulation
from tests.helpers.devices import uncached_programs
from tests.helpers.formulations import on_x86, onednn_in_double_precision, random, same
from tests.helpers.reference import torch
from tests.helpers.torch_models import nchw

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.mark.parametrize("formulation", ["cpu", "cpu-onednn"])
def test_dense_equals_the_plain_one(formulation: Formulation) -> None:
    def with_bias(x: Any, kernel: Any, bias: Any, formulation: Formulation) -> jax.Array:
        return dense(x, kernel, formulation, bias)

    with jax.enable_x64(True), onednn_in_double_precision():
        ours, plain = (partial(with_bias, formulation=name) for name in (formulation, "plain"))
        same(ours, plain, random(2, 3, 5), random(5, 4), random(4))


@pytest.mark.parametrize("approximate", [False, True])
def test_dense_and_gelu_by_onednn_equal_the_plain_ones(approximate: bool) -> None:
    """Compares the forward pass alone, which is one fused product, and the gradients."""
    arguments = random(2, 3, 5), random(5, 4), random(4)

    def function(x: Any, kernel: Any, bias: Any, formulation: Formulation) -> jax.Array:
        return dense_and_gelu(x, kernel, formulation, bias, approximate)

    with jax.enable_x64(True), onednn_in_double_precision():
        ours, plain = (partial(function, formulation=name) for name in ("cpu-onednn", "plain"))
        same(ours, plain, *arguments)
        np.testing.assert_allclose(ours(*arguments), plain(*arguments), atol=1e-12)


@on_x86
@pytest.mark.parametrize("rows", [64, 33])
def test_dense_by_onednn_in_bfloat16(rows: int) -> None:
    """Uses few features and an even number of rows, for which the kernel's gradient is computed in two halves."""
    x, kernel = (jnp.asarray(random(*shape), jnp.bfloat16) for shape in ((rows, 8), (8, 8)))
    with uncached_programs():
        same(partial(dense, formulation="cpu-onednn"), dense, x, kernel, tolerance=0.01)


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
