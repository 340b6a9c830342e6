"""Computes the least time of an image's train step and evaluation on a machine, from its operations and bytes.

python -m benchmarks.floor [--arch resnet50] [--image_size 224] [--batch 256] [--dtype bfloat16]
    [--teraflops 790] [--terabytes 4.3] [--measure]

The machine's rates are an H200's by default, measured with a bfloat16 product and a copy; --measure takes those of this
machine, from a matrix product and a pass over memory. Everything else is arithmetic. At best, a convolution takes as
long as its operations or its bytes, whichever is more, and a pass over memory as long as its bytes. BatchNorm counts
twice: as separate passes, which is how XLA computes it in training, and within the convolutions, which is how jaxft
evaluates (in training no library sums values while it writes them). Prints one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.models.layers import Conv
from jaxft.models.resnet import ARCHITECTURES, BasicBlock, Bottleneck, ResNet
from jaxft.ops import onednn
from jaxft.ops.formulation import default_formulation
from jaxft.process import disable_compilation_cache

UPDATE_BYTES = 4 + 20  # per parameter: its gradient, and SGD with momentum in float32


class Convolution(NamedTuple):
    inputs: int  # values
    outputs: int
    parameters: int
    multiply_adds: int


class Network(NamedTuple):
    convolutions: list[Convolution]  # for one image; the first reads the image itself
    block_ends: int  # values


def measure(model: ResNet, image_size: int) -> Network:
    """Records the convolutions of one image's forward pass, and the values at the ends of blocks."""
    convolutions: list[Convolution] = []
    block_ends = 0

    def record(call: Any, arguments: Any, keywords: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal block_ends
        result, module = call(*arguments, **keywords), context.module
        if isinstance(module, Conv):
            x = arguments[0]
            parameters = module.size**2 * (x.shape[-1] // module.groups) * module.features
            multiply_adds = result.shape[1] * result.shape[2] * parameters
            convolutions.append(Convolution(x.size, result.size, parameters, multiply_adds))
        elif isinstance(module, BasicBlock | Bottleneck):
            block_ends += result.size
        return result

    with nn.intercept_methods(record):
        image = jnp.zeros((1, image_size, image_size, 3))
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
    return Network(convolutions, block_ends)


Part = tuple[float, float]  # operations, and values read or written


def parts(network: Network, batch_norm_apart: bool) -> dict[str, list[Part]]:
    """Lists the parts of a train step and of an evaluation."""
    layers, ends = network
    outputs = sum(layer.outputs for layer in layers)
    forward: list[Part] = [(2 * layer.multiply_adds, layer.inputs + layer.outputs) for layer in layers]
    # Within convolutions a gradient is computed as it is read, from that behind BatchNorm and from BatchNorm's input.
    read = 1 if batch_norm_apart else 2
    backward: list[Part] = [(2 * layer.multiply_adds, read * layer.outputs + layer.inputs) for layer in layers]
    backward += [(2 * layer.multiply_adds, read * (layer.outputs + layer.inputs)) for layer in layers[1:]]
    if not batch_norm_apart:  # a block's end is written once for two consumers, and has a gradient from both
        return {"evaluation": [*forward, (0, ends)], "train": [*forward, *backward, (0, 4 * ends)]}
    normalise = 2 * outputs + ends  # the shortcut is read too
    # Forward: sums. Backward: a block end's two gradients, added and masked by its ReLU, two sums, and the gradient.
    return {
        "evaluation": [*forward, (0, normalise)],
        "train": [*forward, *backward, (0, outputs + normalise + 5 * outputs + 4 * ends)],
    }


def least(
    network: Network, batch: int, operations_per_second: float, bytes_per_second: float, value: int = 2
) -> dict[str, Any]:
    """Returns the least time and traffic per image. value: bytes of one."""
    read_twice = 2 * value  # a parameter, forward and backward
    update = sum(layer.parameters for layer in network.convolutions) * (read_twice + UPDATE_BYTES) / batch
    result: dict[str, Any] = {}
    for name, apart in (("batch_norm_apart", True), ("batch_norm_within", False)):
        for work, passes in parts(network, apart).items():
            moved = value * sum(values for _, values in passes) + (update if work == "train" else 0)
            seconds = sum(
                max(operations / operations_per_second, value * values / bytes_per_second)
                for operations, values in passes
            )
            seconds += update / bytes_per_second if work == "train" else 0
            result[f"{work}, {name}"] = {
                "gigaflop": round(sum(operations for operations, _ in passes) / 1e9, 2),
                "megabytes": round(moved / 1e6, 1),
                "microseconds": round(seconds * 1e6, 1),
                "images_per_second": round(1 / seconds, 1),
            }
    return result


def rates(dtype: Any) -> tuple[float, float]:
    """Measures the machine's operations and bytes per second: the best of several products and passes."""
    with_onednn = default_formulation() == "cpu" and onednn.self_test()
    if with_onednn:
        disable_compilation_cache()
    multiply = jax.jit(onednn.matmul if with_onednn else jnp.dot)
    matrix = jnp.ones((4096, 4096), dtype)

    def best(function: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(10):
            started = time.perf_counter()
            jax.block_until_ready(function())
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    values = jnp.ones(2**26, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def one_pass() -> Any:
        nonlocal values
        values = add(values)
        return values

    return 2 * 4096**3 / best(lambda: multiply(matrix, matrix)), 2 * values.nbytes / best(one_pass)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50", choices=ARCHITECTURES)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256, help="images that share an update of the parameters")
    parser.add_argument("--teraflops", type=float, default=790)
    parser.add_argument("--terabytes", type=float, default=4.3, help="moved by memory per second")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--measure", action="store_true", help="this machine's rates instead")
    args = parser.parse_args()
    dtype = jnp.dtype(args.dtype)
    operations, moved = rates(dtype) if args.measure else (args.teraflops * 1e12, args.terabytes * 1e12)
    network = measure(ARCHITECTURES[args.arch](num_classes=10), args.image_size)
    machine = {"teraflops": round(operations / 1e12, 3), "terabytes": round(moved / 1e12, 4)}
    print(json.dumps(machine | least(network, args.batch, operations, moved, dtype.itemsize), indent=1))


if __name__ == "__main__":
    main()
