"""Compares each formulation of depthwise convolutions with the plain one."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxft.ops import depthwise
from jaxft.ops.depthwise import depthwise_conv
from jaxft.ops.formulation import Formulation
from tests.helpers.devices import uncached_programs
from tests.helpers.formulations import on_x86, onednn_in_double_precision, random, same

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
