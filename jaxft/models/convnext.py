"""ConvNeXt and ConvNeXt V2 in Flax Linen, layer for layer as timm builds them (timm/models/convnext.py).

A parameter's path is timm's key split at its dots: params['stages']['0']['blocks']['1']['conv_dw']['kernel'] is
`stages.0.blocks.1.conv_dw.weight`. Images are NHWC; parameters are float32; `dtype` is what the layers compute in.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.errors import UserError
from jaxft.models.architectures import CONVNEXTS, ConvNeXtArchitecture
from jaxft.models.dropout import drop_path, dropout
from jaxft.models.heads import HEAD_NORM, Standardize
from jaxft.models.layers import Dense, LayerNorm
from jaxft.models.network import Output
from jaxft.models.policy import Policy
from jaxft.ops.dense import dense, dense_and_gelu, patch_conv
from jaxft.ops.depthwise import depthwise_conv
from jaxft.ops.formulation import Formulation
from jaxft.ops.layer_norm import response_norm

PATCH = 4  # pixels of each side of the stem's patches
KERNEL = 7  # pixels of each side of the depthwise kernels
EXPANSION = 4  # hidden features of a block per channel
LAYER_SCALE = 1e-6  # initial value
GRN_EPSILON = 1e-6


class Layers(NamedTuple):
    """Creates the layers of a network with the numerics that they share."""

    epsilon: float  # of LayerNorm
    tanh: bool  # GELU by tanh, not by erf
    formulation: Formulation
    dtype: Any

    def dense(self, *shape: int, name: str, apply_kernel: Callable[..., jax.Array] = dense) -> Dense:
        return Dense(shape, self.dtype, self.formulation, apply_kernel=apply_kernel, name=name)

    def norm(self, name: str) -> LayerNorm:
        return LayerNorm(self.epsilon, self.dtype, self.formulation, name=name)


class ResponseNorm(nn.Module):
    """Global response normalisation of ConvNeXt V2, with statistics in at least float32."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = (self.param(name, nn.initializers.zeros, x.shape[-1:]) for name in ("scale", "bias"))
        return response_norm(x, scale, bias, GRN_EPSILON).astype(self.dtype)


class Mlp(nn.Module):
    """Two dense layers with GELU, and in ConvNeXt V2 response normalisation, between them."""

    features: int
    response: bool
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = EXPANSION * self.features
        with_gelu = partial(dense_and_gelu, approximate=self.layers.tanh)
        x = self.layers.dense(self.features, hidden, name="fc1", apply_kernel=with_gelu)(x)
        if self.response:
            x = ResponseNorm(self.layers.dtype, name="grn")(x)
        return self.layers.dense(hidden, self.features, name="fc2")(x)


class Block(nn.Module):
    """A depthwise convolution, LayerNorm and two dense layers, with LayerScale in the first version, and a shortcut."""

    features: int
    response: bool  # ConvNeXt V2: response normalisation, and no LayerScale
    drop_path: float
    number: int  # among all blocks of the network
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        dtype = self.layers.dtype
        shape = (KERNEL, KERNEL, 1, self.features)
        y = self.layers.dense(*shape, name="conv_dw", apply_kernel=depthwise_conv)(x)
        y = self.layers.norm("norm")(y)
        y = Mlp(self.features, self.response, self.layers, name="mlp")(y)
        y = y.astype(jnp.promote_types(dtype, jnp.float32))
        if not self.response:
            y = y * self.param("gamma", nn.initializers.constant(LAYER_SCALE), (self.features,))
        return (x + drop_path(y, self.drop_path, keys, 1 + self.number)).astype(dtype)


class Blocks(nn.Module):
    """Blocks named "0", "1", ..."""

    blocks: tuple[Callable[..., Block], ...]
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        def apply(block: Any, x: jax.Array, keys: jax.Array | None) -> Any:
            return block(x, keys)

        apply = nn.remat(apply) if self.remat else apply
        for i, block in enumerate(self.blocks):
            x = apply(block(name=str(i)), x, keys)
        return x


class Patches(nn.Module):
    """A convolution of patches and LayerNorm: the stem, or with the norm first the downsampling between stages."""

    features: int
    size: int
    norm_first: bool
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        conv, norm = ("1", "0") if self.norm_first else ("0", "1")
        apply_conv = self.layers.dense(*shape, name=conv, apply_kernel=patch_conv)
        normalize = self.layers.norm(norm)
        return apply_conv(normalize(x)) if self.norm_first else normalize(apply_conv(x))


class Stage(nn.Module):
    """Downsampling, except in the first stage, and blocks."""

    features: int
    blocks: tuple[Callable[..., Block], ...]
    downsample: bool
    remat: bool
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        if self.downsample:
            x = Patches(self.features, 2, True, self.layers, name="downsample")(x)
        return Blocks(self.blocks, self.remat, name="blocks")(x, keys)


class Stages(nn.Module):
    """Stages named "0" to "3"."""

    architecture: ConvNeXtArchitecture
    drop_path: float
    remat: bool
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> list[jax.Array]:
        """Returns the output of each stage."""
        response, depths = self.architecture.response_norm, self.architecture.depths
        last, number, stages = sum(depths) - 1, 0, []
        for i, (depth, features) in enumerate(zip(depths, self.architecture.widths, strict=True)):
            blocks = tuple(
                partial(Block, features, response, self.drop_path * block / max(last, 1), block, self.layers)
                for block in range(number, number + depth)
            )
            x = Stage(features, blocks, i > 0, self.remat, self.layers, name=str(i))(x, keys)
            number += depth
            stages.append(x)
        return stages


class Head(nn.Module):
    """LayerNorm of the pooled features, dropout, and the dense layer that maps them to logits."""

    num_classes: int
    epsilon: float
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, output: Output, norm: Standardize | None, keys: jax.Array | None) -> jax.Array:
        """Returns the logits of a map (N, h, w, C) or of normalised features (N, C), or these features.

        norm: standardises the dense layer's input, but not the features that are returned.
        """
        if x.ndim == 4:
            wide = jnp.promote_types(x.dtype, jnp.float32)
            x = LayerNorm(self.epsilon, wide, name="norm")(x.astype(wide).mean((1, 2)))
        if output == "features":
            return x
        x = dropout(x, self.dropout, keys, 0)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.02), name="fc")(norm(x) if norm else x)


class ConvNeXt(nn.Module):
    """The architecture and numerics of a ConvNeXt; a `Policy` sets how it is trained and tested."""

    architecture: ConvNeXtArchitecture
    num_classes: int
    norm_eps: float = 0.0  # epsilon of the last norm, which differs in transformers; 0: the architecture's
    remat: bool = False  # recompute a block's activations in the backward pass instead of keeping them
    formulation: Formulation = "plain"  # how its layers are computed: see jaxft/ops/README.md
    folded: bool = False  # there is no BatchNorm to fold
    head_norm: bool = False  # standardise the head's input by statistics of the training set: see heads.py
    dropout: float = 0.0  # before the head, in training
    drop_path: float = 0.0  # stochastic depth in training: rate of the last block, rising from 0 in the first
    dtype: Any = jnp.float32
    precision: str = "high"  # of float32 products on accelerators, as in jax.default_matmul_precision

    options: ClassVar[Mapping[str, Any]] = {"norm_eps": 0.0}
    random_layers: ClassVar[Mapping[str, float]] = {"dropout": 0.0, "drop_path": 0.0}
    parts: ClassVar[Mapping[str, str]] = {
        "stem": r"^stem/",
        "stage1": r"^stages/0/",
        "stage2": r"^stages/1/",
        "stage3": r"^stages/2/",
        "stage4": r"^(stages/3|head/norm)/",  # all that the features of a frozen backbone depend on is before the head
        "head": r"^head/fc/",
    }
    head: ClassVar[tuple[str, ...]] = ("head", "fc")
    min_image_size: ClassVar[int] = 32
    patch_size: ClassVar[int] = 1

    @staticmethod
    def norm_of(conv: tuple[str, ...]) -> None:
        """Returns None: there is no BatchNorm."""

    @nn.nowrap
    def multiply_adds(self, image_size: int) -> float:
        """Counts the multiply-adds of the kernels in one image's forward pass."""
        widths, total = self.architecture.widths, 0
        before, size = 3, PATCH
        for depth, width in zip(self.architecture.depths, widths, strict=True):
            image_size //= size
            block = width * (KERNEL**2 + 2 * EXPANSION * width)
            total += image_size**2 * (size**2 * before * width + depth * block)
            before, size = width, 2
        return float(total + before * self.num_classes)

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

        output: "features" returns {"stage1": (N, h, w, C), ..., "stage4", "pooled": (N, F)} instead; pooled is after
        the last LayerNorm and before head_norm. mask and policy have no effect. keys: (N,), for dropout and stochastic
        depth in training; None: neither. Raises UserError for images that are too small.
        """
        architecture = self.architecture
        layers = Layers(architecture.norm_eps, architecture.tanh, self.formulation, self.dtype)
        x, features = image, {}
        with jax.default_matmul_precision(self.precision):
            if image.ndim == 4:
                if (side := min(image.shape[1:3])) < self.min_image_size:
                    raise UserError(f"a ConvNeXt needs an image_size of at least {self.min_image_size}, not {side}")
                x = Patches(architecture.widths[0], PATCH, False, layers, name="stem")(image)
                stages = Stages(architecture, self.drop_path, self.remat, layers, name="stages")(x, keys)
                features = {f"stage{i}": stage for i, stage in enumerate(stages, 1)}
                x = stages[-1]
            norm = Standardize(name=HEAD_NORM) if self.head_norm else None
            head = Head(self.num_classes, self.norm_eps or architecture.norm_eps, self.dropout, name="head")
            x = head(x, output, norm, keys)
            return features | {"pooled": x} if output == "features" else x


ARCHITECTURES: dict[str, Callable[..., ConvNeXt]] = {
    name: partial(ConvNeXt, architecture) for name, architecture in CONVNEXTS.items()
}
