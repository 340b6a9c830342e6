"""Compares attention in each formulation with torch's and with the plain one."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.ops.attention import attention
from jaxft.ops.formulation import Formulation
from tests.helpers.devices import uncached_programs
from tests.helpers.formulations import on_x86, onednn_in_double_precision, random, same
from tests.helpers.reference import torch

pytestmark = pytest.mark.usefixtures("compile_quickly")


SHAPES = (2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8)  # of queries, keys and values


def arrays(factor: float, dtype: Any) -> list[jax.Array]:
    return [jnp.asarray(factor * random(*shape, seed=i), dtype) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("formulation", ["plain", "cpu"])
def test_attention_is_torchs(formulation: Formulation) -> None:
    q, k, v = random(2, 3, 4, 5), random(2, 6, 4, 5, seed=1), random(2, 6, 4, 5, seed=2)
    a, b, c = (torch.from_numpy(x.transpose(0, 2, 1, 3).copy()) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(a, b, c).numpy().transpose(0, 2, 1, 3)
    with jax.enable_x64(True):
        ours = partial(attention, formulation=formulation)
        np.testing.assert_allclose(ours(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)), expected, atol=1e-13)
        same(ours, attention, q, k, v)


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


@pytest.mark.parametrize("formulation", ["plain", "cpu"])
def test_the_softmax_is_float32_in_bfloat16(formulation: Formulation) -> None:
    """The sum over 512 equal weights would be rounded to 8 bits otherwise."""
    q, k = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 512, 1, 8), jnp.bfloat16)
    mean = attention(q, k, jnp.ones_like(k), formulation)
    assert mean.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mean.astype(jnp.float32), 1)


def test_large_scores_do_not_overflow() -> None:
    q = jnp.full((1, 2, 1, 4), 100.0)
    assert np.isfinite(attention(q, q, q, "cpu")).all()
