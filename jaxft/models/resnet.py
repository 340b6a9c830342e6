"""ResNet v1.5 in Flax Linen, layer for layer as torchvision builds it (torchvision/models/resnet.py).

A parameter's path is torchvision's key split at its dots: params['layer1']['0']['conv1']['kernel'] is
`layer1.0.conv1.weight`. Images are NHWC; parameters are float32; `dtype` is what the layers compute in.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxft.models.architectures import RESNETS, Architecture
from jaxft.models.heads import HEAD_NORM, Standardize, linear_init
from jaxft.models.policy import Policy
from jaxft.ops.batch_norm import NormOptions, batch_norm
from jaxft.ops.conv import conv as convolve
from jaxft.ops.conv import conv_and_add
from jaxft.ops.elementwise import scale_kernel
from jaxft.ops.formulation import Formulation, default_formulation
from jaxft.ops.pool import max_pool

Stem = Literal["imagenet", "small"]

STEMS: dict[Stem, tuple[int, int]] = {  # size and stride of conv1
    "imagenet": (7, 2),  # followed by a max-pool of stride 2
    "small": (3, 1),  # without one, for images of about 32 pixels (He et al. 2015, section 4.2)
}

EPSILON = 1e-5  # of BatchNorm

# torch: kaiming_normal_(mode="fan_out", nonlinearity="relu")
conv_kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """A convolution padded by size // 2 on each side. It has a bias only after BatchNorm has been folded into it."""

    features: int
    size: int
    stride: int = 1
    groups: int = 1
    dtype: Any = jnp.float32
    formulation: Formulation = "plain"
    folded: bool = False  # the parameters contain its norm: see fold.py

    @nn.compact
    def __call__(
        self, x: jax.Array, norm: "BatchNorm | None" = None, relu: bool = False, shortcut: jax.Array | None = None
    ) -> jax.Array:
        """Convolves x. norm: folded into the convolution, with the `shortcut` and the ReLU that follow it."""
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", conv_kernel_init, shape, jnp.float32)
        bias = None
        if self.folded:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        elif norm:
            kernel, bias = norm.folded_into(kernel)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        options = self.stride, self.groups, self.formulation
        if bias is None:
            return convolve(x, kernel, *options)
        return conv_and_add(x, kernel, bias, shortcut, relu, *options)


class BatchNorm(nn.Module):
    """torch's BatchNorm2d, which normalises with the biased variance and averages the unbiased one.

    `policy.batch_norm` selects the statistics in training: of this device's share of the batch ("update"), of the
    whole batch over the devices ("sync"), or the running ones ("frozen").
    """

    features: int
    policy: Policy = Policy()
    dtype: Any = jnp.float32
    formulation: Formulation = "plain"

    def setup(self) -> None:
        shape = (self.features,)
        self.scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        self.bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        self.running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        self.running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

    def is_frozen(self) -> bool:
        return self.policy.norm_is_frozen("/".join(self.path))

    def folded_into(self, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Folds the norm with its running statistics into a convolution's kernel; returns kernel and bias."""
        statistics = self.running_mean.value, self.running_var.value
        return fold(kernel, self.scale, self.bias, *statistics, self.formulation)

    def __call__(
        self, x: jax.Array, mask: jax.Array | None, relu: bool = False, shortcut: jax.Array | None = None
    ) -> jax.Array:
        """Normalises x by its own statistics and updates the running ones; then adds `shortcut` and applies a ReLU.

        mask: (N,), 0 for padding.
        """
        axis_name = self.policy.axis_name if self.policy.batch_norm == "sync" else None
        options = NormOptions(relu, axis_name, EPSILON, self.formulation)
        y, (mean, var, count) = batch_norm(x, shortcut, self.scale, self.bias, self.running_mean.value, mask, options)
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        # A device whose share is all padding has no statistics to contribute.
        weight = 0 if self.is_initializing() else self.policy.norm_momentum * (count > 0)
        self.running_mean.value += weight * (mean - self.running_mean.value)
        self.running_var.value += weight * (unbiased - self.running_var.value)
        return y.astype(self.dtype)


def fold(
    kernel: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    formulation: Formulation = "plain",
) -> tuple[jax.Array, jax.Array]:
    """Folds BatchNorm into a convolution: its scale into the kernel, its shift into a bias (F,)."""
    slope = scale * jax.lax.rsqrt(var + EPSILON)
    return scale_kernel(kernel, slope, formulation), bias - mean * slope


def bn_name(conv: str) -> str:
    """Returns torchvision's name for a convolution's norm: bn1 for conv1, and 1 for a downsample's 0."""
    return "1" if conv == "0" else conv.replace("conv", "bn")


class Layer(Protocol):
    """A convolution and its norm, with an optional shortcut that is added and an optional ReLU."""

    def __call__(
        self, x: jax.Array, mask: jax.Array | None, *, relu: bool = False, shortcut: jax.Array | None = None
    ) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class ConvBN:
    """Creates a convolution and its BatchNorm as submodules of the module that calls it.

    It is not a module itself, because a module's name would be part of the parameters' paths, where torchvision has
    conv1/kernel and bn1/scale side by side. The fields are what all layers of a network have in common.
    """

    policy: Policy
    train: bool
    dtype: Any
    formulation: Formulation
    folded: bool

    def __call__(self, name: str, features: int, size: int, stride: int = 1, groups: int = 1) -> Layer:
        conv = Conv(features, size, stride, groups, self.dtype, self.formulation, self.folded, name=name)
        norm = BatchNorm(features, self.policy, self.dtype, self.formulation, name=bn_name(name))

        def apply(
            x: jax.Array, mask: jax.Array | None, *, relu: bool = False, shortcut: jax.Array | None = None
        ) -> jax.Array:
            if self.train and not norm.is_frozen():
                return norm(conv(x), mask, relu, shortcut)
            return conv(x, norm, relu, shortcut)  # one pass, since the statistics are known

        return apply


class Downsample(nn.Module):
    """The projection of a block's shortcut: torchvision's Sequential of a 1x1 convolution and a norm."""

    features: int
    stride: int
    conv_bn: ConvBN

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        return self.conv_bn("0", self.features, 1, self.stride)(x, mask)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (ResNet-18 and -34)."""

    features: int
    stride: int
    conv_bn: ConvBN

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        y = self.conv_bn("conv1", self.features, 3, self.stride)(x, mask, relu=True)
        if self.stride > 1 or x.shape[-1] != self.features:
            x = Downsample(self.features, self.stride, self.conv_bn, name="downsample")(x, mask)
        return self.conv_bn("conv2", self.features, 3)(y, mask, relu=True, shortcut=x)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with the stride in the 3x3 (v1.5; ResNet-50 and deeper).

    A wide ResNet has a larger `width_per_group` in the 3x3, a ResNeXt more `groups`.
    """

    features: int
    stride: int
    conv_bn: ConvBN
    groups: int = 1
    width_per_group: int = 64
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        inner = max(self.features * self.width_per_group // 64, 1) * self.groups
        outer = self.features * self.expansion
        y = self.conv_bn("conv1", inner, 1)(x, mask, relu=True)
        y = self.conv_bn("conv2", inner, 3, self.stride, self.groups)(y, mask, relu=True)
        if self.stride > 1 or x.shape[-1] != outer:
            x = Downsample(outer, self.stride, self.conv_bn, name="downsample")(x, mask)
        return self.conv_bn("conv3", outer, 1)(y, mask, relu=True, shortcut=x)


class Stage(nn.Module):
    """Blocks named "0", "1", ...; the first has the stride."""

    block: Callable[..., BasicBlock | Bottleneck]
    depth: int
    stride: int
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        def apply(block: Any, x: jax.Array, mask: jax.Array | None) -> Any:
            return block(x, mask)

        apply = nn.remat(apply) if self.remat else apply
        for i in range(self.depth):
            x = apply(self.block(stride=self.stride if i == 0 else 1, name=str(i)), x, mask)
        return x


class ResNet(nn.Module):
    """The architecture and numerics of a ResNet; a `Policy` sets how it is trained and tested."""

    block: Callable[..., BasicBlock | Bottleneck]
    stage_depths: tuple[int, ...]
    num_classes: int
    width: int = 64
    stem: Stem = "imagenet"
    remat: bool = False  # recompute a block's activations in the backward pass instead of keeping them
    formulation: Formulation = "plain"  # how its layers are computed: see jaxft/ops/README.md
    folded: bool = False  # BatchNorm is folded into the convolutions, for evaluation only: see fold.py
    head_norm: bool = False  # standardise the head's input by statistics of the training set: see heads.py
    dtype: Any = jnp.float32
    precision: str = "high"  # of float32 products on accelerators, as in jax.default_matmul_precision

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        mask: jax.Array | None = None,
        *,
        train: bool,
        features_only: bool = False,
        policy: Policy = Policy(),  # noqa: B008, immutable
    ) -> jax.Array:
        """Returns the logits (N, num_classes), at least float32, of normalised images (N, H, W, 3) or pooled features.

        features_only: returns the pooled features (N, F), before head_norm, instead.
        mask: (N,), 0 for padding, which is then left out of the batch statistics in training.
        policy: matters in training only.
        """
        assert not (train and self.folded), "a folded network has no BatchNorm to train"
        with jax.default_matmul_precision(self.precision):
            x = image if image.ndim == 2 else self._features(image, mask, train, policy)
            if features_only:
                return x
            if self.head_norm:
                x = Standardize(name=HEAD_NORM)(x)
            init = linear_init(x.shape[-1])
            return nn.Dense(self.num_classes, kernel_init=init, bias_init=init, name="fc")(x)

    def _features(self, image: jax.Array, mask: jax.Array | None, train: bool, policy: Policy) -> jax.Array:
        conv_bn = ConvBN(policy, train, self.dtype, self.formulation, self.folded)
        size, stride = STEMS[self.stem]
        x = conv_bn("conv1", self.width, size, stride)(image, mask, relu=True)
        if self.stem == "imagenet":
            x = max_pool(x, self.formulation)
        for i, depth in enumerate(self.stage_depths):
            block = partial(self.block, features=self.width * 2**i, conv_bn=conv_bn)
            x = Stage(block, depth, 1 if i == 0 else 2, self.remat, name=f"layer{i + 1}")(x, mask)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))


def abstract_variables(model: ResNet) -> Any:
    """Returns the shapes and dtypes of the model's variables.

    They do not depend on how its layers are computed, so that all formulations share a trace, and so do all heads.
    """
    plain = model.clone(num_classes=0, formulation="plain", dtype=jnp.float32, precision="high", remat=False)
    variables = _abstract_variables(plain)
    params = variables["params"]
    head = {
        name: jax.ShapeDtypeStruct((*leaf.shape[:-1], model.num_classes), leaf.dtype)
        for name, leaf in params["fc"].items()
    }
    return variables | {"params": params | {"fc": head}}


@cache
def _abstract_variables(model: ResNet) -> Any:
    # NOTES: Where a start spends its time (docs/notes/input-and-startup.md)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(lambda image: model.init(jax.random.key(0), image, train=False), image)


def _block(architecture: Architecture) -> Callable[..., BasicBlock | Bottleneck]:
    if architecture.block == "basic":
        return BasicBlock
    return partial(Bottleneck, groups=architecture.groups, width_per_group=architecture.width_per_group)


ARCHITECTURES: dict[str, Callable[..., ResNet]] = {
    name: partial(ResNet, _block(architecture), architecture.depths) for name, architecture in RESNETS.items()
}


def make_model(config: ConfigDict, num_classes: int, formulation: Formulation | None = None) -> ResNet:
    """Makes the model of a config's `model` section. formulation: by default that of this platform."""
    return ARCHITECTURES[config.arch](
        num_classes=num_classes,
        width=config.width,
        stem=config.stem,
        remat=config.remat,
        head_norm=config.head_norm,
        formulation=formulation or default_formulation(),
        dtype=jnp.dtype(config.dtype),
        precision=config.precision,
    )


def multiply_adds(model: ResNet, image_size: int) -> float:
    """Estimates the multiply-adds of one image's forward pass, within 20 %."""
    num_params = sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(model)["params"]))
    side_behind_stem = image_size / (4 if model.stem == "imagenet" else 1)
    return num_params * side_behind_stem**2 / 20
