"""Compares Winograd's convolutions with the plain one: exactly in float64, closely in float32 and bfloat16."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.ops import onednn
from jaxft.ops.conv import conv
from jaxft.ops.conv_plain import plain_conv
from jaxft.ops.winograd import BatchedMatmul, is_profitable, winograd_conv, xla_matmul
from tests.helpers.devices import uncached_programs
from tests.helpers.formulations import on_x86, random, same

pytestmark = pytest.mark.usefixtures("compile_quickly")

PRODUCTS = [xla_matmul, pytest.param(onednn.matmul, marks=on_x86)]


@settings(max_examples=12, deadline=None)
@given(st.tuples(*(st.integers(1, 14) for _ in range(2)), st.integers(1, 3)))
def test_winograd_equals_the_plain_convolution(shape: tuple[int, int, int]) -> None:
    with jax.enable_x64(True):
        kernel = random(3, 3, shape[-1], 2)
        same(lambda x, kernel: winograd_conv(x, kernel, xla_matmul), plain_conv, random(2, *shape), kernel)


def error(function: Any, exact: list[np.ndarray], x: jax.Array, kernel: jax.Array, dy: jax.Array) -> float:
    """Returns the largest relative error of the result and both gradients."""

    @jax.jit
    def run(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> Any:
        y, pull_back = jax.vjp(function, x, kernel)
        return y, *pull_back(dy)

    with uncached_programs():
        ours = [np.asarray(array, np.float64) for array in run(x, kernel, dy)]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("product", PRODUCTS)
def test_winograd_is_accurate_in_float32(product: BatchedMatmul) -> None:
    """Compared with torch in float64, from which torch in float32 is 3e-7 to 8e-7 away."""
    from tests.helpers.reference import torch

    x, kernel, dy = np.maximum(random(4, 14, 14, 128), 0), random(3, 3, 128, 64), random(4, 14, 14, 64)
    x64, kernel64 = torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(kernel.transpose(3, 2, 0, 1))
    x64.requires_grad_(), kernel64.requires_grad_()
    y64 = torch.nn.functional.conv2d(x64, kernel64, padding=1)
    y64.backward(torch.from_numpy(dy.transpose(0, 3, 1, 2)))
    assert x64.grad is not None and kernel64.grad is not None
    nhwc, hwio = (0, 2, 3, 1), (2, 3, 1, 0)
    exact = [
        y64.detach().numpy().transpose(nhwc),
        x64.grad.numpy().transpose(nhwc),
        kernel64.grad.numpy().transpose(hwio),
    ]
    arguments = [jnp.asarray(array, jnp.float32) for array in (x, kernel, dy)]
    assert error(lambda x, kernel: winograd_conv(x, kernel, product), exact, *arguments) < 2.5e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_of_many_channels_uses_winograd(dtype: Any) -> None:
    x, kernel = jnp.asarray(random(2, 16, 16, 64), dtype), jnp.asarray(random(3, 3, 64, 64), dtype)
    assert is_profitable(x.shape, kernel.shape)
    cpu = partial(conv, formulation="cpu")
    assert "conv_general_dilated" not in str(jax.make_jaxpr(cpu)(x, kernel))
    same(cpu, plain_conv, x, kernel, tolerance=3e-6 if dtype == jnp.float32 else 0.01)


def test_a_program_for_any_batch_size_does_not_use_winograd() -> None:
    (batch,) = jax.export.symbolic_shape("pictures")
    any_number: Any = batch
    assert not is_profitable((any_number, 16, 16, 64), (3, 3, 64, 64))
