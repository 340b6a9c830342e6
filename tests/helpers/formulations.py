"""Compares a formulation with the plain one."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxft.ops import onednn

on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="jaxlib has oneDNN for x86 only")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def same(ours: Any, plain: Any, *arguments: Any, tolerance: float = 1e-12) -> None:
    """Compares the results, and the gradients of all arguments for a random gradient of the result."""

    @partial(jax.jit, static_argnums=0)
    def result_and_gradients(function: Any, arguments: Any, gradient: Any) -> Any:
        result, pull_back = jax.vjp(function, *arguments)
        return result, *pull_back(gradient)

    shape = jax.eval_shape(plain, *arguments)
    gradient = random(*shape.shape, seed=1).astype(shape.dtype)
    for a, b in zip(*(result_and_gradients(function, arguments, gradient) for function in (ours, plain)), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@contextmanager
def onednn_in_double_precision() -> Iterator[None]:
    """Replaces oneDNN's operations by XLA's, to compare what is built from them in float64, which oneDNN lacks."""

    def convolution(
        x: jax.Array,
        kernel: jax.Array,
        stride: int,
        padding: tuple[int, int],
        extra: tuple[int, int] = (0, 0),
        transposed: bool = False,
        epilogue: onednn.Epilogue = onednn.Epilogue(),  # noqa: B008, immutable
    ) -> jax.Array:
        pads = [(before, before + more) for before, more in zip(padding, extra, strict=True)]
        kernel = kernel.swapaxes(2, 3) if transposed else kernel
        numbers = ("NHWC", "HWIO", "NHWC")
        return after(lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=numbers), epilogue)

    def depthwise(
        x: jax.Array, kernel: jax.Array, padding: int, dtype: Any = None, bias: jax.Array | None = None
    ) -> jax.Array:
        pads, numbers = [(padding, padding)] * 2, ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            x, kernel, (1, 1), pads, dimension_numbers=numbers, feature_group_count=x.shape[-1]
        )
        return after(y, onednn.Epilogue(bias))

    def matmul(
        a: jax.Array,
        b: jax.Array,
        transpose_a: bool = False,
        transpose_b: bool = False,
        epilogue: onednn.Epilogue = onednn.Epilogue(),  # noqa: B008, immutable
        dtype: Any = None,
        layouts: onednn.Layouts | None = None,
    ) -> jax.Array:
        return after((a.mT if transpose_a else a) @ (b.mT if transpose_b else b), epilogue)

    def after(y: jax.Array, epilogue: onednn.Epilogue) -> jax.Array:
        y = y if epilogue.bias is None else y + epilogue.bias
        y = y if epilogue.shortcut is None else y + epilogue.shortcut
        y = jax.nn.relu(y) if epilogue.relu else y
        return jax.nn.gelu(y, approximate=epilogue.gelu == "tanh") if epilogue.gelu else y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "convolution", convolution)
        patch.setattr(onednn, "matmul", matmul)
        patch.setattr(onednn, "depthwise", depthwise)
        patch.setattr(onednn, "DTYPES", (jnp.float64,))
        yield
