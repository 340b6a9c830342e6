"""Tests that benchmarks/kernels computes what jaxft's own formulations do, on the CPU."""

from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu.variant_table import VARIANTS
from benchmarks.kernels import formulations, plain, pointwise
from benchmarks.kernels.layers import random_layer
from jaxft.config import load_config, parse_overrides
from jaxft.models import layers
from jaxft.ops import conv, pool
from jaxft.ops.conv_plain import plain_conv
from jaxft.transforms import preprocessing

MODULES = conv, layers, pool, preprocessing
TILE = pointwise.Tile(pixels=32, inputs=16, outputs=16)


# Pixels, inputs and outputs that no block divides, and some that blocks do.
@pytest.mark.parametrize(
    ("sides", "dtype", "start_of_block"), [((77, 24, 40), "float32", True), ((64, 32, 24), "bfloat16", False)]
)
def test_pointwise_kernels_equal_passes_and_products(
    sides: tuple[int, int, int], dtype: str, start_of_block: bool
) -> None:
    """At the start of a block the input has no norm of its own, and its gradient joins that of the shortcut."""
    layer = random_layer(*sides, jnp.dtype(dtype))
    before = None if start_of_block else layer.before
    block_end = (layer.x[::-1], layer.x) if start_of_block else None

    def compute(kernels: ModuleType, *, parts: dict[str, int], **options: Any) -> Any:
        backward = layer.y, layer.kernel, layer.x, layer.after, layer.before, block_end, start_of_block
        return (
            kernels.forward(layer.x, layer.kernel, before, layer.after[0].mean, **options),
            kernels.input_gradient(layer.g, *backward, **options),
            kernels.kernel_gradient(layer.x, layer.g, layer.y, before, layer.after, start_of_block, **parts, **options),
        )

    result = jax.jit(partial(compute, pointwise, parts={"parts": 3}, tile=TILE, interpret=True))()
    expected = jax.jit(partial(compute, plain, parts={}))()
    # bfloat16: values are rounded to 2^-8, and their float32 sums come in another order.
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_formulations_of_the_stem_equal_the_plain_convolution() -> None:
    random = np.random.default_rng(0)
    x, kernel, dy = (
        jnp.asarray(random.standard_normal(shape, np.float32)) for shape in ((1, 9, 8, 3), (7, 7, 3, 4), (1, 5, 4, 4))
    )

    @partial(jax.jit, static_argnums=0)
    def forward_and_gradient(stem: Any) -> Any:
        y, pull_back = jax.vjp(partial(stem, x), kernel)
        return y, *pull_back(dy)

    expected = forward_and_gradient(partial(plain_conv, stride=2))
    stems = (
        partial(formulations.pad_image_channels, channels=8, stride=2),
        partial(formulations.convolve_blocks, channels=16),
    )
    for stem in stems:
        for a, b in zip(forward_and_gradient(stem), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_elementwise_pool_gradient_has_the_same_bits() -> None:
    sides = 7, 6
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, *sides, 3)), jnp.bfloat16)
    y, index = pool._max_pool(x, 3, formulation="gpu")
    arrays = index, jnp.empty((0, *sides), x.dtype), jnp.asarray(random.standard_normal(y.shape), jnp.bfloat16)
    result, expected = (
        np.asarray(jax.jit(partial(function, formulation="gpu"))(*arrays))
        for function in (formulations.pool_gradient, pool._max_pool_gradient)
    )
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("size", [28, 9])
def test_resizing_by_taps_has_the_same_bits(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 17, 3), np.uint8)
    expected = jax.jit(partial(preprocessing.resize_and_crop, size=size))(images)
    monkeypatch.setattr(preprocessing, "_filter", formulations.filter_by_taps)
    np.testing.assert_array_equal(jax.jit(partial(preprocessing.resize_and_crop, size=size))(images), expected)


@pytest.mark.parametrize("name", formulations.FORMULATIONS)
def test_formulations_find_what_they_replace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces only attributes that exist."""
    for module in MODULES:
        for attribute, value in list(vars(module).items()):
            if not attribute.startswith("__"):
                monkeypatch.setitem(vars(module), attribute, value)
    known = {module: set(vars(module)) for module in MODULES}
    formulations.apply(name)
    assert all(set(vars(module)) == names for module, names in known.items())


def test_variants_name_formulations_and_config_keys() -> None:
    assert {variant.formulation for variant in VARIANTS.values()} == {"", *formulations.FORMULATIONS}
    for variant in VARIANTS.values():
        load_config("configs/cifar10.py", parse_overrides([f"--config.{k}={v}" for k, v in variant.overrides.items()]))
