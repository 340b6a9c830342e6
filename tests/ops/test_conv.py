"""Compares each formulation of convolution with the plain one: in float64, and in oneDNN's own types."""

import re
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxft.errors import UserError
from jaxft.ops import conv_onednn, onednn
from jaxft.ops.conv import conv, conv_and_add
from jaxft.ops.conv_plain import plain_conv
from jaxft.ops.formulation import Formulation
from tests.helpers.devices import uncached_programs
from tests.helpers.formulations import on_x86, onednn_in_double_precision, random, same

SHAPES = [(1, 1, 5), (2, 2, 5), (1, 3, 5), (4, 3, 5), (8, 9, 3), (7, 16, 1), (6, 6, 5), (11, 12, 5)]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("size", "shape"),
    [(1, (2, 2, 5)), (1, (7, 16, 1)), *((3, shape) for shape in SHAPES), (7, (8, 9, 3)), (7, (2, 2, 5))],
)
def test_xla_cpu_formulations_equal_the_plain_one(shape: tuple[int, int, int], size: int, stride: int) -> None:
    with jax.enable_x64(True):
        kernel = random(size, size, shape[-1], 4)
        cpu = partial(conv, stride=stride, formulation="cpu")
        same(cpu, partial(plain_conv, stride=stride), random(2, *shape), kernel)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("size", "shape"), [(3, (8, 9, 5)), (3, (6, 6, 5)), (7, (16, 16, 3)), (7, (9, 12, 5))])
def test_gradients_are_convolutions_as_a_loop_needs_them(shape: tuple[int, int, int], size: int, stride: int) -> None:
    """In the loop of a training call, XLA on a CPU takes some twenty times as long for other dimension orders."""

    def gradients(x: Any, kernel: Any) -> Any:
        return jax.grad(lambda x, kernel: (conv(x, kernel, stride, formulation="cpu") ** 2).sum(), (0, 1))(x, kernel)

    program = jax.jit(gradients).lower(random(2, *shape), random(size, size, shape[-1], 4)).as_text()
    orders = re.findall(r"dim_numbers = (.*?),\s*window", program)
    assert len(orders) >= 2 and set(orders) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}


@pytest.mark.parametrize(("stride", "small_map"), [(1, 0), (1, 7), (2, 7)])
@pytest.mark.parametrize(("size", "shape"), [(1, (4, 3, 5)), *((3, shape) for shape in SHAPES), (7, (8, 9, 3))])
def test_onednn_formulations_equal_the_plain_one(
    shape: tuple[int, int, int], size: int, stride: int, small_map: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_onednn, "_SMALL_MAP", small_map)
    with jax.enable_x64(True), onednn_in_double_precision():
        ours = partial(conv, stride=stride, formulation="cpu-onednn")
        same(ours, partial(plain_conv, stride=stride), random(2, *shape), random(size, size, shape[-1], 4))


@on_x86
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("size", "shape"), [(1, (9, 12, 16)), (3, (9, 12, 16)), (7, (16, 16, 3))])
def test_onednn_equals_the_plain_convolution_in_its_own_types(
    shape: tuple[int, int, int], size: int, stride: int, dtype: Any
) -> None:
    x, kernel = (jnp.asarray(array, dtype) for array in (random(2, *shape), random(size, size, shape[-1], 32)))
    ours = partial(conv, stride=stride, formulation="cpu-onednn")
    tolerance = 1e-6 if dtype == jnp.float32 else 0.01
    with uncached_programs():
        same(ours, partial(plain_conv, stride=stride), x, kernel, tolerance=tolerance)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("formulation", "dtype"),
    [
        ("plain", jnp.float32),
        ("cpu", jnp.float32),
        pytest.param("cpu-onednn", jnp.float32, marks=on_x86),
        pytest.param("cpu-onednn", jnp.bfloat16, marks=on_x86),
        ("gpu", jnp.bfloat16),
    ],
)
@pytest.mark.parametrize(
    ("size", "channels", "stride", "groups"), [(1, 16, 1, 1), (1, 16, 2, 1), (3, 64, 1, 1), (3, 16, 2, 4), (7, 3, 2, 1)]
)
def test_conv_and_add_equals_convolution_bias_shortcut_and_relu(
    size: int, channels: int, stride: int, groups: int, dtype: Any, formulation: Formulation, whole: bool
) -> None:
    """With a bias; if whole, with a shortcut and a ReLU too."""
    x, kernel = random(8, 8, 12, channels), random(size, size, channels // groups, 64)
    y = plain_conv(jnp.asarray(x), jnp.asarray(kernel), stride, groups)
    shortcut = 20 * random(*y.shape)
    arguments = [*(jnp.asarray(array, dtype) for array in (x, kernel, shortcut)), jnp.asarray(20 * random(64))]

    def ours(x: jax.Array, kernel: jax.Array, shortcut: jax.Array, bias: jax.Array) -> jax.Array:
        return conv_and_add(x, kernel, bias, shortcut if whole else None, whole, stride, groups, formulation)

    def plain(x: jax.Array, kernel: jax.Array, shortcut: jax.Array, bias: jax.Array) -> jax.Array:
        x, kernel, shortcut = (array.astype(jnp.float32) for array in (x, kernel, shortcut))
        y = plain_conv(x, kernel, stride, groups) + bias
        return (jax.nn.relu(y + shortcut) if whole else y).astype(dtype)

    # Rounded to bfloat16, some values fall on the other side of the ReLU, with their gradients.
    with uncached_programs() if formulation == "cpu-onednn" else nullcontext():
        same(ours, plain, *arguments, tolerance=5e-6 if dtype == jnp.float32 else 0.1)


@on_x86
def test_onednn_works_on_x86() -> None:
    with uncached_programs():
        assert onednn.self_test()


@pytest.mark.parametrize("setting", ["auto", "always", "never"])
def test_onednn_is_for_long_runs(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "self_test", lambda: True)
    assert [onednn.is_worthwhile(setting, work) for work in (1e9, 1e15)] == {
        "auto": [False, True],
        "always": [True, True],
        "never": [False, False],
    }[setting]


def test_onednn_that_does_not_work_is_an_error_or_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "self_test", lambda: False)
    assert not onednn.is_worthwhile("auto", 1e15)
    with pytest.raises(UserError, match="onednn=auto"):
        onednn.is_worthwhile("always", 1e15)
