"""Measures depthwise convolutions of ConvNeXt-T at 224 px on a CPU beside PyTorch's: the formulations of jaxft/ops.

    python -m benchmarks.depthwise [--batch 8] [--dtype float32] [--rounds 9]

Prints the median milliseconds of the forward pass, the input's gradient and the kernel's gradient, by stage. The
contenders take turns in one process.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxft.ops.depthwise import depthwise_conv
from jaxft.ops.formulation import Formulation
from jaxft.process import disable_compilation_cache

STAGES = ((56, 96), (28, 192), (14, 384), (7, 768))  # pixels of a side, channels
SIZE = 7
PARTS = ("forward", "input gradient", "kernel gradient")
FORMULATIONS: tuple[Formulation, ...] = ("cpu-onednn", "cpu", "plain")

Pass = Callable[[], Any]


def passes_of_jaxft(formulation: Formulation, x: np.ndarray, kernel: np.ndarray, dtype: str) -> Iterator[Pass]:
    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return depthwise_conv(x, kernel, formulation)

    gradients = [
        lambda x, kernel, dy: jax.vjp(lambda x: convolve(x, kernel), x)[1](dy),
        lambda x, kernel, dy: jax.vjp(lambda kernel: convolve(x, kernel), kernel)[1](dy),
    ]
    arrays = [jnp.asarray(array, dtype) for array in (x, kernel, x)]
    for function in (lambda x, kernel, dy: convolve(x, kernel), *gradients):
        program = jax.jit(function).lower(*arrays).compile()
        yield partial(_run, program, *arrays)


def _run(program: Any, *arrays: jax.Array) -> None:
    jax.block_until_ready(program(*arrays))


def passes_of_torch(x: np.ndarray, kernel: np.ndarray, dtype: str) -> Iterator[Pass]:
    images, weight = (torch.from_numpy(a.transpose(0, 3, 1, 2)) for a in (x, kernel.transpose(3, 0, 1, 2)))
    images = images.to(getattr(torch, dtype), memory_format=torch.channels_last)
    weight = weight.to(images.dtype)
    channels = weight.shape[0]
    yield lambda: torch.nn.functional.conv2d(images, weight, padding=SIZE // 2, groups=channels)
    options = ([1, 1], [SIZE // 2] * 2, [1, 1], False, [0, 0], channels)
    for mask in ([True, False, False], [False, True, False]):
        yield partial(torch.ops.aten.convolution_backward, images, images, weight, None, *options, mask)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.depthwise", description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    disable_compilation_cache()  # XLA cannot cache programs with oneDNN's calls
    contenders = (*FORMULATIONS, "torch")
    print(f"{'':28}" + "".join(f"{name:>12}" for name in contenders))
    rng = np.random.default_rng(0)
    for side, channels in STAGES:
        x, kernel = (
            rng.normal(size=shape).astype(np.float32)
            for shape in ((args.batch, side, side, channels), (SIZE, SIZE, 1, channels))
        )
        passes = [[*passes_of_jaxft(formulation, x, kernel, args.dtype)] for formulation in FORMULATIONS]
        passes.append([*passes_of_torch(x, kernel, args.dtype)])
        for part, contending in zip(PARTS, zip(*passes, strict=True), strict=True):
            times: list[list[float]] = [[] for _ in contending]
            for turn in range(args.rounds + 1):  # the first one does not count
                for i, run in enumerate(contending):
                    start = time.perf_counter()
                    run()
                    times[i] += [1e3 * (time.perf_counter() - start)] * (turn > 0)
            medians = "".join(f"{statistics.median(taken):12.1f}" for taken in times)
            print(f"{side:2}x{side:<2} x {channels:3} {part:17}{medians}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
