"""Compares attention in each formulation with torch's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.ops.attention import attention
from jaxft.ops.formulation import Formulation
from tests.helpers.formulations import random, same
from tests.helpers.reference import torch

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.mark.parametrize("formulation", ["plain", "cpu"])
def test_attention_is_torchs(formulation: Formulation) -> None:
    q, k, v = random(2, 3, 4, 5), random(2, 6, 4, 5, seed=1), random(2, 6, 4, 5, seed=2)
    a, b, c = (torch.from_numpy(x.transpose(0, 2, 1, 3).copy()) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(a, b, c).numpy().transpose(0, 2, 1, 3)
    with jax.enable_x64(True):
        ours = partial(attention, formulation=formulation)
        np.testing.assert_allclose(ours(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)), expected, atol=1e-13)
        same(ours, attention, q, k, v)


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
