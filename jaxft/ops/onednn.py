"""oneDNN's convolutions and matrix products, which jaxlib contains for x86 CPUs but never uses by itself.

They are XLA's own custom calls (openxla/xla: xla/backends/cpu/runtime/onednn), described as in its
xla/service/cpu/onednn_config.proto. This is not a public interface, so `self_test` first tries them in another
process. XLA can neither export a program that contains them nor keep it in its compilation cache, for which a process
calls `jaxft.process.disable_compilation_cache`.

    python -m jaxft.ops.onednn

fails if they do not work.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import UserError

# NOTES: When oneDNN repays recompilation (docs/notes/onednn.md)
_WORTHWHILE = 5e12  # multiply-adds; they take a minute or two on two cores
DTYPES = (jnp.float32, jnp.bfloat16)


def is_worthwhile(setting: str, multiply_adds: float) -> bool:
    """Returns whether a run of this many multiply-adds should use oneDNN. setting: config key model.onednn.

    Raises UserError if the setting is "always" but oneDNN does not work on this machine.
    """
    if setting == "never" or (setting == "auto" and multiply_adds < _WORTHWHILE):
        return False
    if self_test():
        return True
    if setting == "always":
        raise UserError("oneDNN does not work with this jaxlib on this machine; set --config.model.onednn=auto")
    return False


def self_test() -> bool:
    """Returns whether oneDNN gives correct results on this machine. A crash would end only the child process."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-m", "jaxft.ops.onednn"]
    try:
        return not subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode
    except subprocess.TimeoutExpired:
        return False


class Epilogue(NamedTuple):
    """Post-ops before a result is written: adds `bias` (F,) and `shortcut` of its shape, then applies an activation."""

    bias: jax.Array | None = None
    shortcut: jax.Array | None = None
    relu: bool = False
    gelu: Literal["", "erf", "tanh"] = ""


Layouts = tuple[Sequence[int], Sequence[int], Sequence[int]]  # axes of two operands and the result, major to minor


# Seven parameters: those of oneDNN's convolution.
def convolution(
    x: jax.Array,
    kernel: jax.Array,
    stride: int,
    padding: tuple[int, int],
    extra: tuple[int, int] = (0, 0),
    transposed: bool = False,
    epilogue: Epilogue = Epilogue(),  # noqa: B008, immutable
) -> jax.Array:
    """Convolves (N, H, W, C) with (rows, columns, C, F), or (rows, columns, F, C) if transposed.

    padding: pixels above and below, and left and right. extra: more pixels below, and on the right.
    """
    before, after = padding, [sum(pads) for pads in zip(padding, extra, strict=True)]
    sides = [
        (side + low + high - size) // stride + 1
        for side, low, high, size in zip(x.shape[1:3], before, after, kernel.shape[:2], strict=True)
    ]
    images = {"dims": 4, "data": {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}}
    inputs, outputs = (3, 2) if transposed else (2, 3)
    kernels = {"input_feature_dim": inputs, "output_feature_dim": outputs, "spatial_dims": [0, 1]}
    config = {
        "dims": 4,
        "input": images,
        "kernel": {"dims": 4, "filter": kernels},
        "output": images,
        "window": {"strides": [stride] * 2, "pad_left": before, "pad_right": after, "window_dilations": [1, 1]},
        "feature_groups": 1,
    }
    result = jax.ShapeDtypeStruct((x.shape[0], *sides, kernel.shape[outputs]), x.dtype)
    return _call("convolution", "onednn_conv_config", config, result, epilogue, x, kernel)


def depthwise(
    x: jax.Array, kernel: jax.Array, padding: int, dtype: Any = None, bias: jax.Array | None = None
) -> jax.Array:
    """Convolves each channel of (N, H, W, C) with its own kernel, of any size (rows, columns, 1, C); adds a bias (C,).

    padding: pixels on each side. dtype: of the result, float32 or x's.
    """
    sides = (side + 2 * padding - size + 1 for side, size in zip(x.shape[1:3], kernel.shape[:2], strict=True))
    images = {"dims": 4, "data": {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}}
    kernels = {"input_feature_dim": 2, "output_feature_dim": 3, "spatial_dims": [0, 1]}
    pads = [padding, padding]
    config = {
        "dims": 4,
        "input": images,
        "kernel": {"dims": 4, "filter": kernels},
        "output": images,
        "window": {"strides": [1, 1], "pad_left": pads, "pad_right": pads, "window_dilations": [1, 1]},
        "feature_groups": x.shape[3],
    }
    result = jax.ShapeDtypeStruct((x.shape[0], *sides, x.shape[3]), dtype or x.dtype)
    return _call("convolution", "onednn_conv_config", config, result, Epilogue(bias), x, kernel)


# Seven parameters: those of oneDNN's matrix product.
def matmul(
    a: jax.Array,
    b: jax.Array,
    transpose_a: bool = False,
    transpose_b: bool = False,
    epilogue: Epilogue = Epilogue(),  # noqa: B008, immutable
    dtype: Any = None,
    layouts: Layouts | None = None,
) -> jax.Array:
    """Multiplies matrices or stacks of them: a @ b, a @ b.mT or a.mT @ b.

    dtype: of the result, float32 or a's; default: a's, or float32 if a is transposed. layouts: those of a, b and the
    result, without an epilogue; default: row-major.
    """
    result = jax.ShapeDtypeStruct(
        (*a.shape[:-2], a.shape[-1 if transpose_a else -2], b.shape[-2 if transpose_b else -1]),
        dtype or (jnp.float32 if transpose_a else a.dtype),
    )
    config = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    if epilogue.bias is not None:
        epilogue = epilogue._replace(bias=epilogue.bias.reshape(*[1] * (a.ndim - 1), -1))
    return _call("matmul", "onednn_matmul_config", config, result, epilogue, a, b, layouts=layouts)


def _call(
    name: str,
    description: str,
    config: dict[str, Any],
    result: jax.ShapeDtypeStruct,
    epilogue: Epilogue,
    *operands: jax.Array,
    layouts: Layouts | None = None,
) -> jax.Array:
    added = {"BIAS": epilogue.bias, "BINARY_ADD": epilogue.shortcut}
    added = {operation: array for operation, array in added.items() if array is not None}
    activations = ["RELU"] * epilogue.relu + ([f"GELU_{epilogue.gelu.upper()}"] if epilogue.gelu else [])
    config = {description: config | {"fusions": {"ops": [*added, *activations]}}}
    call = jax.ffi.ffi_call(
        f"__onednn${name}",
        result,
        custom_call_api_version=2,
        legacy_backend_config=json.dumps(config),
        input_layouts=layouts and layouts[:2],
        output_layouts=layouts and layouts[2],
    )
    return call(*operands, *added.values())


def check() -> None:
    """Raises AssertionError if a product or a convolution differs from NumPy's."""
    random = np.random.default_rng(0)

    def compare(ours: jax.Array, theirs: np.ndarray) -> None:
        tolerance = 1e-5 if ours.dtype == jnp.float32 else 1e-2
        difference = np.abs(np.asarray(ours, np.float64) - theirs).max()
        assert ours.shape == theirs.shape and difference <= tolerance * np.abs(theirs).max(), difference

    for dtype in (jnp.float32, jnp.bfloat16):
        a, b, c = (jnp.asarray(random.normal(size=shape), dtype) for shape in ((40, 32), (32, 48), (40, 48)))
        wide_a, wide_b, wide_c = (np.asarray(array, np.float64) for array in (a, b, c))
        compare(matmul(a, b), wide_a @ wide_b)
        compare(matmul(a, c, transpose_a=True), wide_a.T @ wide_c)
        compare(matmul(c, b, transpose_b=True), wide_c @ wide_b.T)
        compare(matmul(c, b, transpose_b=True, dtype=jnp.float32), wide_c @ wide_b.T)
        compare(matmul(jnp.stack([a, 2 * a]), jnp.stack([b, b])), np.stack([wide_a @ wide_b, 2 * wide_a @ wide_b]))
        heads = jnp.asarray(random.normal(size=(2, 5, 3, 8)), dtype).swapaxes(1, 2)
        wide_scores = np.asarray(heads, np.float64) @ np.asarray(heads, np.float64).swapaxes(2, 3)
        layouts = ((0, 2, 1, 3), (0, 2, 1, 3), (0, 1, 2, 3))
        compare(matmul(heads, heads, transpose_b=True, dtype=jnp.float32, layouts=layouts), wide_scores)
        scores = jnp.asarray(wide_scores, dtype)
        mean = np.asarray(scores, np.float64).swapaxes(2, 3) @ np.asarray(heads, np.float64)
        compare(matmul(scores, heads, transpose_a=True, layouts=(layouts[2], *layouts[:2])), mean)
        bias, shortcut = jnp.arange(-24.0, 24), c
        after = np.maximum(wide_a @ wide_b + np.asarray(bias) + wide_c, 0)
        compare(matmul(a, b, epilogue=Epilogue(bias, shortcut, relu=True)), after)
        for kind in ("erf", "tanh"):
            expected = jax.nn.gelu(wide_a @ wide_b + np.asarray(bias), approximate=kind == "tanh")
            compare(matmul(a, b, epilogue=Epilogue(bias, gelu=kind)), np.asarray(expected, np.float64))
        for size, stride, extra, transposed in ((3, 1, 0, False), (3, 2, 0, False), (7, 2, 0, False), (2, 1, 1, True)):
            x = jnp.asarray(random.normal(size=(2, 9, 8, 32)), dtype)
            kernel = jnp.asarray(random.normal(size=(size, size, 32, 32)), dtype)
            low = size // 2 - extra
            y = convolution(x, kernel, stride, (low, low), (extra, extra), transposed)
            epilogue = Epilogue(jnp.arange(-16.0, 16), y, relu=True)
            changed = convolution(x, kernel, stride, (low, low), (extra, extra), transposed, epilogue)
            wide = np.pad(np.asarray(x, np.float64), ((0, 0), *[(low, low + extra)] * 2, (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(wide, (size, size), (1, 2))[:, ::stride, ::stride]
            terms = "nyxcij,ijfc->nyxf" if transposed else "nyxcij,ijcf->nyxf"
            expected = np.einsum(terms, windows, np.asarray(kernel, np.float64))
            compare(y, expected)
            compare(changed, np.maximum(expected + np.asarray(epilogue.bias) + np.asarray(y, np.float64), 0))
        for shape in ((2, 9, 8, 40), (1, 20, 20, 24)):
            x = jnp.asarray(random.normal(size=shape), dtype)
            for kernel_shape in ((7, 7), shape[1:3]):  # the second kind are kernel gradients
                kernel = jnp.asarray(random.normal(size=(*kernel_shape, 1, shape[3])), dtype)
                wide = np.pad(np.asarray(x, np.float64), ((0, 0), (3, 3), (3, 3), (0, 0)))
                windows = np.lib.stride_tricks.sliding_window_view(wide, kernel_shape, (1, 2))
                expected = np.einsum("nyxcij,ijc->nyxc", windows, np.asarray(kernel[:, :, 0], np.float64))
                for result in (dtype, jnp.float32):
                    compare(depthwise(x, kernel, 3, result), expected)
                bias = jnp.arange(float(shape[3]))
                compare(depthwise(x, kernel, 3, bias=bias), expected + np.asarray(bias))


if __name__ == "__main__":
    check()
