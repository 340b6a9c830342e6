"""Vision Transformers in Flax Linen, as timm builds them (timm/models/vision_transformer.py and deit.py).

A parameter's path is timm's key split at its dots: params['blocks']['0']['attn']['qkv']['kernel'] is
`blocks.0.attn.qkv.weight`. Images are NHWC; parameters are float32; `dtype` is what the products compute in. Tokens
between them, LayerNorm and softmax are at least float32, as they are in torch's autocast.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.errors import UserError
from jaxft.models.architectures import VITS, ViTArchitecture
from jaxft.models.dropout import drop_path, dropout
from jaxft.models.heads import HEAD_NORM, Standardize, linear_init
from jaxft.models.layers import Dense, LayerNorm
from jaxft.models.network import Output
from jaxft.models.policy import Policy
from jaxft.models.position import resize_grid
from jaxft.ops.attention import attention
from jaxft.ops.dense import dense_and_gelu, patch_conv
from jaxft.ops.formulation import Formulation

Pool = Literal["token", "mean", "mean_norm", "attention"]
POOLS: tuple[Pool, ...] = get_args(Pool)

# timm truncates at 2, which is 100 standard deviations away.
kernel_init = nn.initializers.normal(0.02)
token_init = nn.initializers.normal(1e-6)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel's size."""

    features: int
    size: int
    layer: Callable[..., Dense]

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """Returns the patches (N, height / size, width / size, features)."""
        shape = (self.size, self.size, image.shape[-1], self.features)
        init = linear_init(self.size**2 * image.shape[-1])  # torch's nn.Conv2d
        return self.layer(shape, kernel_init=init, bias_init=init, apply_kernel=patch_conv, name="proj")(image)


class Attention(nn.Module):
    """Self-attention with several heads."""

    heads: int
    layer: Callable[..., Dense]
    formulation: Formulation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        layer = self.layer((width, 3 * width), name="qkv")
        q, k, v = (part.reshape(batch, tokens, self.heads, -1) for part in jnp.split(layer(x), 3, axis=-1))
        y = attention(q, k, v, layer.formulation).reshape(batch, tokens, width)
        return self.layer((width, width), name="proj")(y)


class MLP(nn.Module):
    """Two dense layers with an exact GELU between them."""

    hidden: int
    layer: Callable[..., Dense]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = self.layer((width, self.hidden), apply_kernel=dense_and_gelu, name="fc1")(x)
        return self.layer((self.hidden, width), name="fc2")(x)


class LayerScale(nn.Module):
    """Multiplies each feature by a parameter (Touvron et al. 2021)."""

    initial: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.param("gamma", nn.initializers.constant(self.initial), x.shape[-1:], jnp.float32)


class Block(nn.Module):
    """Attention and an MLP; each has a LayerNorm before it, and its result is added to the tokens."""

    heads: int
    hidden: int
    layer_scale: float
    norm: Callable[..., LayerNorm]
    layer: Callable[..., Dense]
    formulation: Formulation
    number: int
    drop_path: float

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Processes tokens (N, T, D). keys: (N,), for drop_path."""
        attention = Attention(self.heads, self.layer, self.formulation, name="attn")
        for i, layer in enumerate((attention, MLP(self.hidden, self.layer, name="mlp")), 1):
            y, x = self.norm(name=f"norm{i}").with_input(x)
            y = layer(y).astype(x.dtype)
            if self.layer_scale:
                y = LayerScale(self.layer_scale, name=f"ls{i}")(y)
            x = x + drop_path(y, self.drop_path, keys, 2 * self.number + i)  # the head's dropout has 0
        return x


class Blocks(nn.Module):
    """Blocks named "0", "1", ...; the rate of drop_path rises from 0 to that of the last one, as in timm."""

    depth: int
    drop_path: float
    remat: bool
    block: Callable[..., Block]

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        def apply(block: Any, x: jax.Array, keys: jax.Array | None) -> Any:
            return block(x, keys)

        apply = nn.remat(apply) if self.remat else apply
        for i in range(self.depth):
            rate = self.drop_path * i / max(self.depth - 1, 1)
            x = apply(self.block(number=i, drop_path=rate, name=str(i)), x, keys)
        return x


class AttentionPool(nn.Module):
    """One learned query attends to all tokens, and an MLP follows: timm's AttentionPoolLatent."""

    heads: int
    hidden: int
    norm: Callable[..., LayerNorm]
    layer: Callable[..., Dense]
    formulation: Formulation = "plain"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Pools tokens (N, T, D) to (N, D), in the type of x."""
        batch, tokens, width = x.shape
        latent = self.param("latent", nn.initializers.normal(width**-0.5), (1, 1, width), jnp.float32)
        q = self.layer((width, width), name="q")(latent).reshape(1, 1, self.heads, width // self.heads)
        layer = self.layer((width, 2 * width), name="kv")
        k, v = (part.reshape(batch, tokens, self.heads, -1) for part in jnp.split(layer(x), 2, axis=-1))
        q = jnp.broadcast_to(q, (batch, *q.shape[1:]))
        y = attention(q, k, v, layer.formulation).reshape(batch, 1, width)
        y = self.layer((width, width), name="proj")(y).astype(x.dtype)
        return (y + MLP(self.hidden, self.layer, name="mlp")(self.norm(name="norm")(y)))[:, 0]


class ViT(nn.Module):
    """The architecture and numerics of a ViT; a `Policy` sets how it is trained and tested."""

    architecture: ViTArchitecture
    num_classes: int
    norm_eps: float = 1e-6  # epsilon of LayerNorm
    # The pooled features. token: the first token; mean: the mean of the patches; attention: AttentionPool. All three
    # follow the last LayerNorm. mean_norm: the mean comes before that norm, which is then named fc_norm.
    pool: Pool = "token"
    grid: int = 14  # side of the grid of position embeddings, which are interpolated to that of an image
    remat: bool = False  # recompute a block's activations in the backward pass instead of keeping them
    formulation: Formulation = "plain"  # how its layers are computed: see jaxft/ops/README.md
    folded: bool = False  # has no effect, since there is no BatchNorm
    head_norm: bool = False  # standardise the head's input by statistics of the training set: see heads.py
    dropout: float = 0.0  # before the head, in training
    drop_path: float = 0.0  # rate of the last block's stochastic depth, in training
    dtype: Any = jnp.float32
    precision: str = "high"  # of float32 products on accelerators, as in jax.default_matmul_precision

    random_layers: ClassVar[Mapping[str, float]] = {"dropout": 0.0, "drop_path": 0.0}
    head: ClassVar[tuple[str, ...]] = ("head",)

    @property
    def options(self) -> Mapping[str, Any]:
        """The options and their values in timm's network."""
        return {"norm_eps": 1e-6, "pool": self.architecture.pool, "grid": self.architecture.grid}

    @property
    def parts(self) -> Mapping[str, str]:
        """The parts from input to head; the last LayerNorm belongs to the last block."""
        last = self.architecture.depth - 1
        return {
            "embed": r"^(patch_embed|cls_token|dist_token|reg_token|pos_embed)(/|$)",
            **{f"block{i}": rf"^blocks/{i}/" for i in range(last)},
            f"block{last}": rf"^(blocks/{last}|norm|fc_norm)/",
            **({"pool": r"^attn_pool/"} if self.pool == "attention" else {}),
            "head": r"^head/",
        }

    @property
    def min_image_size(self) -> int:
        return self.architecture.patch

    @property
    def patch_size(self) -> int:
        return self.architecture.patch

    @staticmethod
    def norm_of(conv: tuple[str, ...]) -> None:
        """Returns None, since there is no BatchNorm."""

    @nn.nowrap
    def multiply_adds(self, image_size: int) -> float:
        """Estimates the multiply-adds of one image's forward pass, within 20 %."""
        width, hidden = self.architecture.width, self.hidden
        patches = (image_size // self.patch_size) ** 2
        tokens = patches + sum(self._tokens().values())
        block = tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width
        return float(self.architecture.depth * block + patches * self.patch_size**2 * 3 * width)

    @property
    def hidden(self) -> int:
        """The number of features inside the MLPs."""
        return self.architecture.hidden or 4 * self.architecture.width

    @nn.nowrap
    def _tokens(self) -> dict[str, int]:
        """Returns the number of the tokens that are not patches, by their parameter's name."""
        own = self.architecture
        counts = {"cls_token": int(own.class_token), "dist_token": int(own.distillation_token)}
        return {name: count for name, count in (counts | {"reg_token": own.registers}).items() if count}

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

        output: "features" returns {"tokens": (N, T, D), "pooled": (N, D)} instead. tokens begin with the class token,
        if there is one, and are normalised by the last LayerNorm unless `pool` is mean_norm; pooled is before
        head_norm. mask and policy have no effect. keys: (N,), for dropout and stochastic depth in training; None:
        neither. Raises UserError for images whose sides the patches do not divide.
        """
        with jax.default_matmul_precision(self.precision):
            features = {"pooled": image} if image.ndim == 2 else self._features(image, keys)
            if output == "features":
                return features
            x = dropout(features["pooled"], self.dropout, keys, 0)
            if self.head_norm:
                x = Standardize(name=HEAD_NORM)(x)
            return nn.Dense(self.num_classes, kernel_init=kernel_init, name="head")(x)

    def _features(self, image: jax.Array, keys: jax.Array | None) -> dict[str, jax.Array]:
        own = self.architecture
        layer = partial(Dense, dtype=self.dtype, formulation=self.formulation)
        norm = partial(LayerNorm, self.norm_eps, self.dtype, self.formulation)
        _check_sides(image, own.patch)
        x = self._embed(PatchEmbed(own.width, own.patch, layer, name="patch_embed")(image))
        block = partial(Block, own.heads, self.hidden, own.layer_scale, norm, layer, self.formulation)
        x = Blocks(own.depth, self.drop_path, self.remat, block, name="blocks")(x, keys)
        last_norm = partial(LayerNorm, self.norm_eps, x.dtype, self.formulation)
        tokens = x if self.pool == "mean_norm" else last_norm(name="norm")(x)
        if self.pool == "token":
            if not own.class_token:
                raise UserError("model.pool is token, but this ViT has no class token; set it to mean")
            return {"tokens": tokens, "pooled": tokens[:, 0]}
        x = tokens if own.pool_all else tokens[:, sum(self._tokens().values()) :]
        if self.pool == "attention":
            x = AttentionPool(own.heads, self.hidden, norm, layer, self.formulation, name="attn_pool")(x)
        else:
            x = x.mean(1)
        return {"tokens": tokens, "pooled": last_norm(name="fc_norm")(x) if self.pool == "mean_norm" else x}

    def _embed(self, x: jax.Array) -> jax.Array:
        """Returns tokens (N, T, D) with position embeddings, in at least float32, from patches (N, h, w, D)."""
        own, batch = self.architecture, x.shape[0]
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        size = own.embedded + self.grid**2
        positions = self.param("pos_embed", kernel_init, (1, size, own.width), jnp.float32)[0]
        grid = positions[own.embedded :].reshape(self.grid, self.grid, own.width)
        x = (x + resize_grid(grid, (x.shape[1], x.shape[2]))).reshape(batch, -1, own.width)
        inits = {"cls_token": token_init, "dist_token": kernel_init, "reg_token": token_init}
        tokens = [
            self.param(name, inits[name], (1, count, own.width), jnp.float32)[0]
            for name, count in self._tokens().items()
        ]
        first = jnp.concatenate(tokens)
        first = first.at[: own.embedded].add(positions[: own.embedded]).astype(x.dtype)
        return jnp.concatenate([jnp.broadcast_to(first, (batch, *first.shape)), x], 1)


def _check_sides(image: jax.Array, patch: int) -> None:
    """Raises UserError if patches do not divide the sides of the images."""
    for side in image.shape[1:3]:
        if side % patch:
            low = side // patch * patch
            near = f"{low} or {low + patch}" if low else f"{patch}"
            raise UserError(
                f"a ViT with patches of {patch} pixels cannot process a side of {side}; the nearest sizes are {near}"
            )


def _make(architecture: ViTArchitecture) -> Callable[..., ViT]:
    return partial(ViT, architecture, pool=architecture.pool, grid=architecture.grid)


ARCHITECTURES: dict[str, Callable[..., ViT]] = {name: _make(architecture) for name, architecture in VITS.items()}


def repool(model: ViT, params: Mapping[str, Any], rng: jax.Array) -> dict[str, Any]:
    """Returns the parameters of pretrained weights, adapted to the model's way of pooling.

    The last LayerNorm keeps its parameters whether it comes before or after the mean. An AttentionPool that the weights
    lack is random.
    """
    params = dict(params)
    norm, other = ("fc_norm", "norm") if model.pool == "mean_norm" else ("norm", "fc_norm")
    if other in params:
        params[norm] = params.pop(other)
    if model.pool != "attention":
        params.pop("attn_pool", None)
    elif "attn_pool" not in params:
        own = model.architecture
        pool = AttentionPool(own.heads, model.hidden, partial(LayerNorm, model.norm_eps), Dense)
        params["attn_pool"] = jax.jit(pool.init)(rng, jnp.zeros((1, 1, own.width)))["params"]
    return params
