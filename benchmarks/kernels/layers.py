"""The 1x1 convolutions of a ResNet-50 at 224 px: arrays for them, and the traffic with and without the kernels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels.pointwise import Norm, NormGradient

ROWS = 4096  # random ones, which larger arrays repeat
VALUE = 2  # bytes of bfloat16
# Bytes per pixel and channel for the partial sums of 128 pixels: two in float32, written and read.
PARTIAL_SUMS = 2 * 2 * 4 / 128


class Shape(NamedTuple):
    """A kind of 1x1 convolution, all of one size: the third of a block, or the first, whose input is a block's end."""

    name: str
    side: int  # pixels
    inputs: int
    outputs: int
    number: int  # in the network

    @property
    def starts_block(self) -> bool:
        return self.name.endswith("conv1")


# torchvision's layers. A stage's first block has its conv1 on the side of the stage before. Without the downsamples,
# whose stride the kernels do not have, and layer1.0.conv1, which follows the max-pool.
SHAPES = (
    Shape("layer1.conv3", 56, 64, 256, 3),
    Shape("layer1.conv1", 56, 256, 64, 2),
    Shape("layer2.0.conv1", 56, 256, 128, 1),
    Shape("layer2.conv3", 28, 128, 512, 4),
    Shape("layer2.conv1", 28, 512, 128, 3),
    Shape("layer3.0.conv1", 28, 512, 256, 1),
    Shape("layer3.conv3", 14, 256, 1024, 6),
    Shape("layer3.conv1", 14, 1024, 256, 5),
    Shape("layer4.0.conv1", 14, 1024, 512, 1),
    Shape("layer4.conv3", 7, 512, 2048, 3),
    Shape("layer4.conv1", 7, 2048, 512, 2),
)


def traffic(shape: Shape) -> dict[str, tuple[float, float]]:
    """Returns bytes per image of one such convolution and the norms around it: (XLA's passes, kernels).

    Counted as in the compiled program: what a pass reads, a block's end and its gradient included, and what it writes.
    "forward" needs "kernel_gradient" as well, which recomputes what forward no longer writes.
    """
    k, n = shape.inputs, shape.outputs
    pixels = shape.side**2
    # Passes: normalise the input (read, write), multiply (read, write), sum the output.
    normalise = 0 if shape.starts_block else 2 * k
    forward = normalise + k + n + n, k + n
    # The gradient of the norm after (2 reads, write), product (read, write), and the sums of the norm before: of x and
    # its gradient, or, at a block's end, with the shortcut's gradient added and masked by that end, which is written.
    epilogue = (k + 4 * k, 4 * k) if shape.starts_block else (2 * k, k)
    input_gradient = 3 * n + n + k + epilogue[0], 2 * n + (0 if shape.starts_block else k) + epilogue[1]
    kernel_gradient = k + n, k + 2 * n
    sums = {"forward": n, "input_gradient": k, "kernel_gradient": 0}
    passes = {"forward": forward, "input_gradient": input_gradient, "kernel_gradient": kernel_gradient}
    return {
        name: (pixels * VALUE * plain, pixels * (VALUE * kernels + PARTIAL_SUMS * sums[name]))
        for name, (plain, kernels) in passes.items()
    }


def saved(shape: Shape, with_backward: bool = True) -> float:
    """Returns the bytes per image that the kernels save in all convolutions of a shape.

    with_backward=False: only `forward`, and `kernel_gradient` as far as it recomputes forward's input.
    """
    parts = traffic(shape)
    counted = parts.values() if with_backward else [parts["forward"]]
    return shape.number * sum(plain - kernels for plain, kernels in counted)


class Layer(NamedTuple):
    """The arrays around a 1x1 convolution: see `pointwise.input_gradient` for their meaning."""

    x: jax.Array  # (M, K)
    kernel: jax.Array  # (K, N)
    y: jax.Array  # (M, N)
    g: jax.Array  # (M, N)
    before: Norm
    after: tuple[Norm, NormGradient]


def random_layer(pixels: int, inputs: int, outputs: int, dtype: np.dtype) -> Layer:
    random = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        few = min(shape[0], ROWS), *shape[1:]
        return jnp.resize(jnp.asarray(random.standard_normal(few, np.float32) * np.float32(scale)), shape)

    def norm(channels: int) -> Norm:
        return Norm(normal(channels, scale=0.3), 1 + normal(channels, scale=0.3), normal(channels, scale=0.3))

    x, y, g = (normal(pixels, side).astype(dtype) for side in (inputs, outputs, outputs))
    kernel = normal(inputs, outputs, scale=inputs**-0.5).astype(dtype)
    grads = NormGradient(normal(outputs, scale=0.1), normal(outputs, scale=0.1))
    return Layer(x, kernel, y, g, norm(inputs), (norm(outputs), grads))
