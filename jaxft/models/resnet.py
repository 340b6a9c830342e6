"""ResNet v1.5 in Flax Linen, layer for layer as torchvision builds it (torchvision/models/resnet.py).

A parameter's path is torchvision's key split at its dots: params['layer1']['0']['conv1']['kernel'] is
`layer1.0.conv1.weight`. Images are NHWC; parameters are float32; `dtype` is what the layers compute in.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxft.models.heads import linear_init
from jaxft.ops.batch_norm import batch_norm
from jaxft.ops.conv import conv as convolve
from jaxft.ops.conv import conv_and_add
from jaxft.ops.elementwise import scale_kernel
from jaxft.ops.pool import max_pool

BatchNormMode = Literal["update", "frozen", "sync"]


Stem = Literal["imagenet", "small"]


STEMS: dict[Stem, tuple[int, int]] = {  # conv1's size and stride
    "imagenet": (7, 2),  # then a max-pool of stride 2
    "small": (3, 1),  # alone: for pictures of about 32 pixels (He et al. 2015, section 4.2)
}


EPSILON = 1e-5  # of BatchNorm


# torch: kaiming_normal_(mode="fan_out", nonlinearity="relu")
conv_kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """A convolution padded by size // 2 on each side: without bias, or with what its norm has become."""

    features: int
    size: int
    stride: int = 1
    groups: int = 1
    dtype: Any = jnp.float32
    by_onednn: bool = False
    folded: bool = False  # its norm is in its parameters: see folding.py

    @nn.compact
    def __call__(
        self, x: jax.Array, norm: "BatchNorm | None" = None, relu: bool = False, shortcut: jax.Array | None = None
    ) -> jax.Array:
        """norm: to be folded into it, with the `shortcut` and the ReLU that follow."""
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", conv_kernel_init, shape, jnp.float32)
        bias = None
        if self.folded:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        elif norm:
            kernel, bias = norm.folded_into(kernel)
        x, kernel, how = x.astype(self.dtype), kernel.astype(self.dtype), (self.stride, self.groups, self.by_onednn)
        if bias is None:
            return convolve(x, kernel, *how)
        return conv_and_add(x, kernel, bias, shortcut, relu, *how)


class BatchNorm(nn.Module):
    """torch's BatchNorm2d: biased variance to normalise, unbiased in the running average. And what follows it.

    `mode` is "update" (statistics of this device's share of the batch), "sync" (of the whole batch, over
    `axis_name`) or "frozen" (the running statistics, in training too), which it also is where `frozen` has the paths
    of both its parameters.
    """

    features: int
    mode: BatchNormMode = "update"
    frozen: frozenset[str] = frozenset()
    axis_name: str = "batch"
    dtype: Any = jnp.float32
    momentum: float = 0.1  # the weight of the new value, as torch counts it

    def setup(self) -> None:
        shape = (self.features,)
        self.scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        self.bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        self.running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        self.running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

    def is_frozen(self) -> bool:
        return self.mode == "frozen" or has_norm(self.frozen, "/".join(self.path))

    def folded_into(self, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        """With the running statistics: the kernel and the bias of a convolution that is normalised already."""
        return fold(kernel, self.scale, self.bias, self.running_mean.value, self.running_var.value)

    def __call__(
        self, x: jax.Array, mask: jax.Array | None, relu: bool = False, shortcut: jax.Array | None = None
    ) -> jax.Array:
        """x by its own statistics, which move the running ones; then `shortcut` added, and a ReLU if asked.

        mask: (N,), 1 for a picture that counts and 0 for padding.
        """
        axis_name = self.axis_name if self.mode == "sync" else None
        y, (mean, var, count) = batch_norm(
            x, shortcut, self.scale, self.bias, self.running_mean.value, mask, EPSILON, relu, axis_name
        )
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        # A device whose share is all padding has nothing to add.
        weight = 0 if self.is_initializing() else self.momentum * (count > 0)
        self.running_mean.value += weight * (mean - self.running_mean.value)
        self.running_var.value += weight * (unbiased - self.running_var.value)
        return y.astype(self.dtype)


def fold(
    kernel: jax.Array, scale: jax.Array, bias: jax.Array, mean: jax.Array, var: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A convolution's kernel with the slope of its norm, and the bias that is left of that."""
    slope = scale * jax.lax.rsqrt(var + EPSILON)
    return scale_kernel(kernel, slope), bias - mean * slope


def has_norm(frozen: frozenset[str], path: str) -> bool:
    """Whether all parameters of the BatchNorm at 'layer1/0/bn1' are frozen, and so its statistics are too."""
    return {f"{path}/scale", f"{path}/bias"} <= frozen


def bn_name(conv: str) -> str:
    """What torchvision calls a convolution's norm: conv1's bn1, and a downsample's 0 has 1."""
    return "1" if conv == "0" else conv.replace("conv", "bn")


def conv_bn(
    name: str,
    features: int,
    size: int,
    stride: int = 1,
    groups: int = 1,
    *,
    conv: Callable[..., Conv],
    norm: Callable[..., BatchNorm],
) -> Callable[..., jax.Array]:
    """A convolution and its norm, which is folded into it where it has fixed statistics."""
    convolution, its_norm = conv(features, size, stride, groups, name=name), norm(features, name=bn_name(name))

    def apply(
        x: jax.Array,
        mask: jax.Array | None,
        train: bool,
        relu: bool = False,
        shortcut: jax.Array | None = None,
    ) -> jax.Array:
        if train and not its_norm.is_frozen():
            return its_norm(convolution(x), mask, relu, shortcut)
        return convolution(x, its_norm, relu, shortcut)

    return apply


class Downsample(nn.Module):
    """The projection of a block's shortcut: torchvision's Sequential of a 1x1 convolution and a norm."""

    features: int
    stride: int
    conv_bn: Callable[..., Callable[..., jax.Array]]

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        return self.conv_bn("0", self.features, 1, self.stride)(x, mask, train)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (ResNet-18 and -34)."""

    features: int
    stride: int
    conv_bn: Callable[..., Callable[..., jax.Array]]

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        y = self.conv_bn("conv1", self.features, 3, self.stride)(x, mask, train, relu=True)
        if self.stride > 1 or x.shape[-1] != self.features:
            x = Downsample(self.features, self.stride, self.conv_bn, name="downsample")(x, mask, train)
        return self.conv_bn("conv2", self.features, 3)(y, mask, train, relu=True, shortcut=x)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with the stride in the 3x3 (v1.5; ResNet-50 and deeper).

    A wide ResNet has more `width_per_group` in the 3x3, a ResNeXt more `groups`.
    """

    features: int
    stride: int
    conv_bn: Callable[..., Callable[..., jax.Array]]
    groups: int = 1
    width_per_group: int = 64
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        inner = max(self.features * self.width_per_group // 64, 1) * self.groups
        outer = self.features * self.expansion
        y = self.conv_bn("conv1", inner, 1)(x, mask, train, relu=True)
        y = self.conv_bn("conv2", inner, 3, self.stride, self.groups)(y, mask, train, relu=True)
        if self.stride > 1 or x.shape[-1] != outer:
            x = Downsample(outer, self.stride, self.conv_bn, name="downsample")(x, mask, train)
        return self.conv_bn("conv3", outer, 1)(y, mask, train, relu=True, shortcut=x)


class Stage(nn.Module):
    """Blocks named "0", "1", ..., of which the first has the stride."""

    block: Callable[..., BasicBlock | Bottleneck]
    depth: int
    stride: int
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        def through(block: Any, x: jax.Array, mask: jax.Array | None) -> Any:
            return block(x, mask, train)

        through = nn.remat(through) if self.remat else through
        for i in range(self.depth):
            x = through(self.block(stride=self.stride if i == 0 else 1, name=str(i)), x, mask)
        return x


class ResNet(nn.Module):
    block: Callable[..., BasicBlock | Bottleneck]
    stage_depths: tuple[int, ...]
    num_classes: int
    width: int = 64
    stem: Stem = "imagenet"
    batch_norm: BatchNormMode = "update"
    norm_momentum: float = 0.1  # the weight of the newest batch in the running statistics
    frozen: frozenset[str] = frozenset()  # paths of parameters that do not train: 'layer1/0/bn1/scale'
    remat: bool = False  # a block's activations are not kept for the backward pass
    by_onednn: bool = False  # its convolutions, on a CPU: see jaxft/ops/onednn.py
    folded: bool = False  # its norms, into its convolutions, in evaluation: see jaxft/models/fold.py
    test_flip: bool = False  # see the mean of a picture and its mirror image, but in training
    axis_name: str = "batch"
    dtype: Any = jnp.float32
    precision: str = "high"  # of products of float32 on accelerators, as jax.default_matmul_precision has it

    def norm_is_frozen(self, path: str) -> bool:
        """Whether the running statistics at 'layer1/0/bn1' stay as they are in training."""
        return self.batch_norm == "frozen" or has_norm(self.frozen, path)

    @nn.compact
    def __call__(
        self, image: jax.Array, mask: jax.Array | None = None, *, train: bool, features_only: bool = False
    ) -> jax.Array:
        """Logits (N, num_classes), at least float32, of normalised pictures (N, H, W, 3) or of their features.

        The features are what the head sees, (N, F); features_only returns them instead.
        mask: (N,), 0 for padding, which then stays out of the batch statistics in training.
        """
        assert not (train and self.folded), "without norms"
        with jax.default_matmul_precision(self.precision):
            if image.ndim == 2:
                x = image
            elif self.test_flip and not train:
                both = self._features(jnp.concatenate([image, image[:, :, ::-1]]), None, train)
                x = both.reshape(2, image.shape[0], both.shape[-1]).mean(0)
            else:
                x = self._features(image, mask, train)
            if features_only:
                return x
            init = linear_init(x.shape[-1])
            return nn.Dense(self.num_classes, kernel_init=init, bias_init=init, name="fc")(x)

    def _features(self, image: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        norm = partial(
            BatchNorm,
            mode=self.batch_norm,
            momentum=self.norm_momentum,
            frozen=self.frozen,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        conv = partial(Conv, dtype=self.dtype, by_onednn=self.by_onednn, folded=self.folded)
        layer = partial(conv_bn, conv=conv, norm=norm)
        size, stride = STEMS[self.stem]
        x = layer("conv1", self.width, size, stride)(image, mask, train, relu=True)
        if self.stem == "imagenet":
            x = max_pool(x)
        for i, depth in enumerate(self.stage_depths):
            block = partial(self.block, features=self.width * 2**i, conv_bn=layer)
            x = Stage(block, depth, 1 if i == 0 else 2, self.remat, name=f"layer{i + 1}")(x, mask, train)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))


ARCHITECTURES: dict[str, Callable[..., ResNet]] = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "resnet152": partial(ResNet, Bottleneck, (3, 8, 36, 3)),
    "wide_resnet50_2": partial(ResNet, partial(Bottleneck, width_per_group=128), (3, 4, 6, 3)),
    "wide_resnet101_2": partial(ResNet, partial(Bottleneck, width_per_group=128), (3, 4, 23, 3)),
    "resnext50_32x4d": partial(ResNet, partial(Bottleneck, groups=32, width_per_group=4), (3, 4, 6, 3)),
    "resnext101_32x8d": partial(ResNet, partial(Bottleneck, groups=32, width_per_group=8), (3, 4, 23, 3)),
    "resnext101_64x4d": partial(ResNet, partial(Bottleneck, groups=64, width_per_group=4), (3, 4, 23, 3)),
}


def make_model(config: ConfigDict, num_classes: int) -> ResNet:
    """Of the config's `model` section."""
    return ARCHITECTURES[config.arch](
        num_classes=num_classes,
        width=config.width,
        stem=config.stem,
        batch_norm="update" if config.batch_norm == "recalibrate" else config.batch_norm,
        remat=config.remat,
        test_flip=config.test_flip,
        dtype=jnp.dtype(config.dtype),
        precision=config.precision,
    )


def multiply_adds(model: ResNet, variables: Any, image_size: int) -> float:
    """Of one picture's forward pass, to a fifth."""
    num_params = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    side_behind_stem = image_size / (4 if model.stem == "imagenet" else 1)
    return num_params * side_behind_stem**2 / 20
