"""Compares attention, dense layers, LayerNorm and GELU with their plain formulations, above all by oneDNN."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxft.ops.attention import attention
from jaxft.ops.dense import dense
from jaxft.ops.formulation import Formulation
from jaxft.ops.layer_norm import gelu, layer_norm_and_input
from tests.helpers.devices import uncached_programs
from tests.helpers.formulations import on_x86, onednn_in_double_precision, random, same

pytestmark = pytest.mark.usefixtures("compile_quickly")

SHAPES = (2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8)  # of queries, keys and values


def arrays(factor: float, dtype: Any) -> list[jax.Array]:
    return [jnp.asarray(factor * random(*shape, seed=i), dtype) for i, shape in enumerate(SHAPES)]


def test_attention_by_onednn_equals_the_plain_one() -> None:
    """Scores of up to about 1000, whose exponentials overflow unless the maximum is subtracted."""
    with jax.enable_x64(True), onednn_in_double_precision():
        same(partial(attention, formulation="cpu-onednn"), attention, *arrays(10, jnp.float64))


@on_x86
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 0.01)])
def test_attention_by_onednn_in_its_own_types(dtype: Any, tolerance: float) -> None:
    with uncached_programs():
        ours = partial(attention, formulation="cpu-onednn")
        same(ours, attention, *arrays(1, dtype), tolerance=tolerance)


@pytest.mark.parametrize("formulation", ["cpu", "cpu-onednn"])
def test_dense_equals_the_plain_one(formulation: Formulation) -> None:
    def with_bias(x: Any, kernel: Any, bias: Any, formulation: Formulation) -> jax.Array:
        return dense(x, kernel, formulation, bias)

    with jax.enable_x64(True), onednn_in_double_precision():
        ours, plain = (partial(with_bias, formulation=name) for name in (formulation, "plain"))
        same(ours, plain, random(2, 3, 5), random(5, 4), random(4))


@on_x86
@pytest.mark.parametrize("rows", [64, 33])
def test_dense_by_onednn_in_bfloat16(rows: int) -> None:
    """With few features and an even number of rows, the kernel's gradient is computed in two halves."""
    x, kernel = (jnp.asarray(random(*shape), jnp.bfloat16) for shape in ((rows, 8), (8, 8)))
    with uncached_programs():
        same(partial(dense, formulation="cpu-onednn"), dense, x, kernel, tolerance=0.01)


@pytest.mark.parametrize("approximate", [False, True])
def test_layer_norm_and_gelu_equal_the_plain_ones(approximate: bool) -> None:
    """The input of the norm is also that of a shortcut."""

    def block(x: Any, scale: Any, bias: Any, formulation: Formulation) -> jax.Array:
        y, x = layer_norm_and_input(x, scale, bias, 1e-6, formulation=formulation)
        return 2 * x + gelu(y, approximate, formulation)

    with jax.enable_x64(True):
        ours, plain = (partial(block, formulation=name) for name in ("cpu", "plain"))
        same(ours, plain, random(3, 4, 8) + 5, random(8), random(8))
