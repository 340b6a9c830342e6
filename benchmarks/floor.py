"""The least time that a picture's train step and evaluation can take on a machine, by its operations and its bytes.

python -m benchmarks.floor [--arch resnet50] [--image_size 224] [--batch 256] [--teraflops 790] [--terabytes 4.3]

The machine's rates are an H200's by default, measured with a bfloat16 product and a copy. Nothing runs but this
arithmetic. A convolution takes as long as its operations or as its bytes at best, a pass over memory as long as its
bytes. BatchNorm is reckoned twice: as passes of its own, which is how XLA has it, and within the convolutions (sums are
taken as values are written, values are normalised as they are read), which no library does. One JSON object.
"""

import argparse
import json
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.resnet import ARCHITECTURES, BasicBlock, Bottleneck, Conv, ResNet

BYTES = 2  # of a value in bfloat16
UPDATE_BYTES = 2 + 2 + 4 + 20  # of a parameter: read forward and backward, its gradient, SGD with momentum in float32


class Convolution(NamedTuple):
    seen: int  # values
    made: int
    parameters: int
    multiply_adds: int


class Network(NamedTuple):
    convolutions: list[Convolution]  # of one picture; the first sees the picture itself
    block_ends: int  # values


def measure(model: ResNet, image_size: int) -> Network:
    convolutions: list[Convolution] = []
    block_ends = 0

    def note(call: Any, arguments: Any, keywords: Any, context: nn.module.InterceptorContext) -> Any:
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

    with nn.intercept_methods(note):
        picture = jnp.zeros((1, image_size, image_size, 3))
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), picture)
    return Network(convolutions, block_ends)


Part = tuple[float, float]  # operations, and values that are read or written


def parts(network: Network, batch_norm_apart: bool) -> dict[str, list[Part]]:
    layers, ends = network
    made = sum(layer.made for layer in layers)
    forward: list[Part] = [(2 * layer.multiply_adds, layer.seen + layer.made) for layer in layers]
    # What a gradient is formed of as it is read: the gradient behind BatchNorm, and what BatchNorm has seen.
    read = 1 if batch_norm_apart else 2
    backward: list[Part] = [(2 * layer.multiply_adds, read * layer.made + layer.seen) for layer in layers]
    backward += [(2 * layer.multiply_adds, read * (layer.made + layer.seen)) for layer in layers[1:]]
    if not batch_norm_apart:  # a block's end is written once for two readers, and has a gradient from both
        return {"evaluation": [*forward, (0, ends)], "train": [*forward, *backward, (0, 4 * ends)]}
    normalise = 2 * made + ends  # the shortcut is read too
    # Forward sums. Backward a block end's two gradients, added and masked by its ReLU, two sums, and the gradient.
    return {
        "evaluation": [*forward, (0, normalise)],
        "train": [*forward, *backward, (0, made + normalise + 5 * made + 4 * ends)],
    }


def least(network: Network, batch: int, operations_per_second: float, bytes_per_second: float) -> dict[str, Any]:
    update = sum(layer.parameters for layer in network.convolutions) * UPDATE_BYTES / batch
    result: dict[str, Any] = {}
    for name, apart in (("batch_norm_apart", True), ("batch_norm_within", False)):
        for work, passes in parts(network, apart).items():
            moved = BYTES * sum(values for _, values in passes) + (update if work == "train" else 0)
            seconds = sum(
                max(operations / operations_per_second, BYTES * values / bytes_per_second)
                for operations, values in passes
            )
            seconds += update / bytes_per_second if work == "train" else 0
            result[f"{work}, {name}"] = {
                "gigaflop": round(sum(operations for operations, _ in passes) / 1e9, 2),
                "megabytes": round(moved / 1e6, 1),
                "microseconds": round(seconds * 1e6, 1),
                "images_per_second": round(1 / seconds),
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50", choices=ARCHITECTURES)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256, help="pictures that share an update of the parameters")
    parser.add_argument("--teraflops", type=float, default=790)
    parser.add_argument("--terabytes", type=float, default=4.3, help="that memory moves in a second")
    args = parser.parse_args()
    network = measure(ARCHITECTURES[args.arch](num_classes=10), args.image_size)
    print(json.dumps(least(network, args.batch, args.teraflops * 1e12, args.terabytes * 1e12), indent=1))


if __name__ == "__main__":
    main()
