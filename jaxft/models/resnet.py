"""ResNet v1.5 in Flax Linen, layer for layer as torchvision builds it (torchvision/models/resnet.py).

timm's variants (timm/models/resnet.py) have deep stems, average-pooled shortcuts (He et al. 2018) or squeeze and
excitation (Hu et al. 2018). A parameter's path is the library's key split at its dots:
params['layer1']['0']['conv1']['kernel'] is `layer1.0.conv1.weight`. Images are NHWC; parameters are float32; `dtype` is
what the layers compute in.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxft.errors import UserError
from jaxft.models.architectures import RESNETS, DeepStem, ResNetArchitecture
from jaxft.models.dropout import dropout
from jaxft.models.heads import HEAD_NORM, Standardize, linear_init
from jaxft.models.layers import BatchNorm, Conv, conv_kernel_init
from jaxft.models.network import Output, abstract_variables
from jaxft.models.policy import Policy
from jaxft.ops.elementwise import gate_and_add
from jaxft.ops.formulation import Formulation
from jaxft.ops.pool import avg_pool_2x2, max_pool

Stem = Literal["imagenet", "small"]

STEMS: dict[Stem, tuple[int, int]] = {  # size and stride of conv1
    "imagenet": (7, 2),  # followed by a max-pool of stride 2
    "small": (3, 1),  # without one, for images of about 32 pixels (He et al. 2015, section 4.2)
}
# Channels of the three 3x3 convolutions of a deep stem, per 8 of the network's width; the first has stride 2.
DEEP_STEMS: dict[DeepStem, tuple[int, int, int]] = {"deep": (4, 4, 8), "tiered": (3, 4, 8), "wide": (8, 8, 16)}


def bn_name(conv: str) -> str:
    """Returns torchvision's name for a convolution's norm: bn1 for conv1, and in a Sequential the next number."""
    return str(int(conv) + 1) if conv.isdecimal() else conv.replace("conv", "bn")


def squeezed_channels(features: int) -> int:
    """Returns the number of hidden channels in timm's SEModule: a sixteenth, rounded to a multiple of 8."""
    return max(8, (features // 16 + 4) // 8 * 8)


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

    def norm(self, name: str, features: int, zero_init: bool = False) -> BatchNorm:
        """Creates only the norm. zero_init: its scale is 0 at first."""
        return BatchNorm(features, self.policy, self.dtype, self.formulation, zero_init, name=name)

    def __call__(
        self, name: str, features: int, size: int, stride: int = 1, groups: int = 1, norm: BatchNorm | None = None
    ) -> Layer:
        """Creates both. norm: by default a new one with the name `bn_name(name)`."""
        conv = Conv(features, size, stride, groups, self.dtype, self.formulation, self.folded, name=name)
        norm = norm or self.norm(bn_name(name), features)

        def apply(
            x: jax.Array, mask: jax.Array | None, *, relu: bool = False, shortcut: jax.Array | None = None
        ) -> jax.Array:
            if self.train and not norm.is_frozen():
                return norm(conv(x), mask, relu, shortcut)
            return conv(x, norm, relu, shortcut)  # one pass, since the statistics are known

        return apply


class DeepStem3x3(nn.Module):
    """The three 3x3 convolutions of timm's deep stems, whose last norm is outside this Sequential."""

    features: tuple[int, int, int]
    conv_bn: ConvBN

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, norm: BatchNorm) -> jax.Array:
        first, second, third = self.features
        x = self.conv_bn("0", first, 3, stride=2)(x, mask, relu=True)
        x = self.conv_bn("3", second, 3)(x, mask, relu=True)
        return self.conv_bn("6", third, 3, norm=norm)(x, mask, relu=True)


class Downsample(nn.Module):
    """The projection of a block's shortcut: torchvision's Sequential of a 1x1 convolution and a norm.

    average: timm's, with an average-pool before them instead of the stride.
    """

    features: int
    stride: int
    conv_bn: ConvBN
    average: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        if not self.average:
            return self.conv_bn("0", self.features, 1, self.stride)(x, mask)
        x = avg_pool_2x2(x) if self.stride > 1 else x
        return self.conv_bn("1", self.features, 1)(x, mask)


class PixelConv(nn.Module):
    """A 1x1 convolution of images of one pixel (N, C), with torch's initial bias, in at least float32."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", conv_kernel_init, (1, 1, x.shape[-1], self.features), jnp.float32)
        return x @ kernel[0, 0] + self.param("bias", linear_init(x.shape[-1]), (self.features,), jnp.float32)


class SqueezeExcite(nn.Module):
    """Squeeze and excitation: scales channels by a gate that is computed from their means (timm's SEModule).

    The end of the block follows: the shortcut is added, and a ReLU applied.
    """

    formulation: Formulation

    @nn.compact
    def __call__(self, x: jax.Array, shortcut: jax.Array) -> jax.Array:
        features = x.shape[-1]
        hidden = nn.relu(PixelConv(squeezed_channels(features), name="fc1")(mean_of_pixels(x)))
        gate = nn.sigmoid(PixelConv(features, name="fc2")(hidden))
        return gate_and_add(x, gate, shortcut, self.formulation)


def mean_of_pixels(x: jax.Array) -> jax.Array:
    """Averages (N, H, W, C) over pixels, in at least float32: (N, C)."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """Options of the blocks of timm's variants."""

    average_shortcut: bool = False
    squeeze_excite: bool = False
    zero_init: bool = False  # the last norm's scale is 0 at first


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (ResNet-18 and -34)."""

    features: int
    stride: int
    conv_bn: ConvBN
    options: BlockOptions = BlockOptions()
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        y = self.conv_bn("conv1", self.features, 3, self.stride)(x, mask, relu=True)
        return end_block(self, "conv2", 3, y, x, mask)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with the stride in the 3x3 (v1.5; ResNet-50 and deeper).

    A wide ResNet has a larger `width_per_group` in the 3x3, a ResNeXt more `groups`.
    """

    features: int
    stride: int
    conv_bn: ConvBN
    options: BlockOptions = BlockOptions()
    groups: int = 1
    width_per_group: int = 64
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        inner = max(self.features * self.width_per_group // 64, 1) * self.groups
        y = self.conv_bn("conv1", inner, 1)(x, mask, relu=True)
        y = self.conv_bn("conv2", inner, 3, self.stride, self.groups)(y, mask, relu=True)
        return end_block(self, "conv3", 1, y, x, mask)


def end_block(
    block: BasicBlock | Bottleneck, name: str, size: int, y: jax.Array, x: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Applies the last convolution, called `name`, to y; adds the shortcut of the block's input x; applies a ReLU."""
    features, conv_bn, options = block.features * block.expansion, block.conv_bn, block.options
    if block.stride > 1 or x.shape[-1] != features:
        x = Downsample(features, block.stride, conv_bn, options.average_shortcut, name="downsample")(x, mask)
    layer = conv_bn(name, features, size, norm=conv_bn.norm(bn_name(name), features, options.zero_init))
    if not options.squeeze_excite:
        return layer(y, mask, relu=True, shortcut=x)
    return SqueezeExcite(conv_bn.formulation, name="se")(layer(y, mask), x)


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
    dropout: float = 0.0  # before the head, in training
    dtype: Any = jnp.float32
    precision: str = "high"  # of float32 products on accelerators, as in jax.default_matmul_precision
    deep_stem: DeepStem = ""  # three 3x3 convolutions instead of `stem`
    block_options: BlockOptions = BlockOptions()

    options: ClassVar[Mapping[str, Any]] = {"width": 64, "stem": "imagenet"}
    random_layers: ClassVar[Mapping[str, float]] = {"dropout": 0.0}
    parts: ClassVar[Mapping[str, str]] = {
        "stem": r"^(conv1|bn1)/",
        "stage1": r"^layer1/",
        "stage2": r"^layer2/",
        "stage3": r"^layer3/",
        "stage4": r"^layer4/",
        "head": r"^fc/",
    }
    head: ClassVar[tuple[str, ...]] = ("fc",)
    min_image_size: ClassVar[int] = 1
    patch_size: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.deep_stem and self.stem != "imagenet":
            raise UserError(f"this ResNet has a deep stem of its own; leave model.stem at imagenet, not {self.stem}")
        super().__post_init__()

    @staticmethod
    def norm_of(conv: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the path of a convolution's norm: layer1/0/bn1 for layer1/0/conv1, bn1 for a deep stem's conv1/6."""
        return ("bn1",) if conv == ("conv1", "6") else (*conv[:-1], bn_name(conv[-1]))

    @nn.nowrap
    def multiply_adds(self, image_size: int) -> float:
        """Estimates the multiply-adds of one image's forward pass, within 20 % (ResNet-200: 35 %)."""
        side_after_stem = image_size / (4 if self.stem == "imagenet" else 1)
        params = flatten_dict(abstract_variables(self)["params"])
        total = sum(leaf.size for path, leaf in params.items() if "se" not in path) * side_after_stem**2 / 20
        if self.deep_stem:  # its convolutions have four times the pixels, and half of the network's width
            total += sum(leaf.size for path, leaf in params.items() if path[0] == "conv1") * (image_size / 2) ** 2
        return total

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        mask: jax.Array | None = None,
        *,
        train: bool,
        output: Output = "logits",
        policy: Policy = Policy(),  # noqa: B008, immutable
        keys: jax.Array | None = None,
    ) -> Any:
        """Returns the logits (N, num_classes), at least float32, of normalised images (N, H, W, 3) or pooled features.

        output: "features" returns {"stage1": (N, h, w, C), ..., "stage4", "pooled": (N, F)} instead; pooled is before
        head_norm. mask: (N,), 0 for padding, which is then left out of the batch statistics in training. policy:
        matters in training only. keys: (N,), for dropout in training; None: no dropout.
        """
        assert not (train and self.folded), "a folded network has no BatchNorm to train"
        with jax.default_matmul_precision(self.precision):
            features = {"pooled": image} if image.ndim == 2 else self._features(image, mask, train, policy)
            if output == "features":
                return features
            x = dropout(features["pooled"], self.dropout, keys, 0)
            if self.head_norm:
                x = Standardize(name=HEAD_NORM)(x)
            init = linear_init(x.shape[-1])
            return nn.Dense(self.num_classes, kernel_init=init, bias_init=init, name="fc")(x)

    def _features(self, image: jax.Array, mask: jax.Array | None, train: bool, policy: Policy) -> dict[str, jax.Array]:
        conv_bn = ConvBN(policy, train, self.dtype, self.formulation, self.folded)
        if self.deep_stem:
            first, second, third = (self.width * eighths // 8 for eighths in DEEP_STEMS[self.deep_stem])
            x = DeepStem3x3((first, second, third), conv_bn, name="conv1")(image, mask, conv_bn.norm("bn1", third))
        else:
            size, stride = STEMS[self.stem]
            x = conv_bn("conv1", self.width, size, stride)(image, mask, relu=True)
        if self.stem == "imagenet":
            x = max_pool(x, self.formulation)
        features = {}
        for i, depth in enumerate(self.stage_depths):
            block = partial(self.block, features=self.width * 2**i, conv_bn=conv_bn, options=self.block_options)
            x = Stage(block, depth, 1 if i == 0 else 2, self.remat, name=f"layer{i + 1}")(x, mask)
            features[f"stage{i + 1}"] = x
        return features | {"pooled": mean_of_pixels(x)}


def _block(architecture: ResNetArchitecture) -> Callable[..., BasicBlock | Bottleneck]:
    if architecture.block == "basic":
        return BasicBlock
    return partial(Bottleneck, groups=architecture.groups, width_per_group=architecture.width_per_group)


def _options(architecture: ResNetArchitecture) -> BlockOptions:
    return BlockOptions(architecture.average_shortcut, architecture.squeeze_excite, architecture.zero_init)


ARCHITECTURES: dict[str, Callable[..., ResNet]] = {
    name: partial(
        ResNet,
        _block(architecture),
        architecture.depths,
        deep_stem=architecture.deep_stem,
        block_options=_options(architecture),
    )
    for name, architecture in RESNETS.items()
}
