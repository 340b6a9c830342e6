"""VGG in Flax Linen, layer for layer as torchvision builds it (torchvision/models/vgg.py).

A parameter's path is torchvision's key split at its dots: params['features']['0']['kernel'] is `features.0.weight`.
Images are NHWC; parameters are float32; `dtype` is what the layers compute in.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxft.errors import UserError
from jaxft.models.architectures import VGGS
from jaxft.models.dropout import dropout
from jaxft.models.heads import HEAD_NORM, Standardize
from jaxft.models.layers import BatchNorm, Conv, Dense
from jaxft.models.network import Output, abstract_variables
from jaxft.models.policy import Policy
from jaxft.ops.formulation import Formulation
from jaxft.ops.pool import adaptive_avg_pool, max_pool_2x2

POOLED = 7  # pixels of each side, at any image size, that the classifier sees
HIDDEN = 64  # features of the hidden dense layers per channel of the first stage: 4,096 in torchvision's networks

kernel_init = nn.initializers.normal(0.01)  # of dense layers


def conv_indices(stage_depths: tuple[int, ...], batch_norm: bool) -> list[list[int]]:
    """Returns torchvision's numbers of the convolutions of each stage, among norms, ReLUs and pools."""
    step, index, stages = 3 if batch_norm else 2, 0, []
    for depth in stage_depths:
        stages.append([index + step * i for i in range(depth)])
        index += step * depth + 1
    return stages


class Features(nn.Module):
    """The convolutions with their norms and ReLUs, and a max-pool after each stage."""

    stage_depths: tuple[int, ...]
    width: int
    batch_norm: bool
    remat: bool
    formulation: Formulation
    folded: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool, policy: Policy) -> list[jax.Array]:
        """Returns the output of each stage."""

        def layer(module: nn.Module, x: jax.Array, index: int, features: int) -> jax.Array:
            options: dict[str, Any] = {"dtype": self.dtype, "formulation": self.formulation}
            conv = Conv(features, 3, folded=self.folded, use_bias=True, name=str(index), parent=module, **options)
            if not self.batch_norm:
                return conv(x, relu=True)
            norm = BatchNorm(features, policy, name=str(index + 1), parent=module, **options)
            if train and not norm.is_frozen():
                return norm(conv(x), mask, relu=True)
            return conv(x, norm, relu=True)

        def stage(module: nn.Module, x: jax.Array, indices: tuple[int, ...], features: int) -> jax.Array:
            for index in indices:
                x = layer(module, x, index, features)
            return max_pool_2x2(x, self.formulation)

        stage = nn.remat(stage, static_argnums=(2, 3)) if self.remat else stage
        stages = []
        for i, indices in enumerate(conv_indices(self.stage_depths, self.batch_norm)):
            x = stage(self, x, tuple(indices), self.width * min(2**i, 8))
            stages.append(x)
        return stages


class Classifier(nn.Module):
    """Two hidden dense layers with dropout, and the head."""

    hidden: int
    num_classes: int
    dropout: float
    dtype: Any
    formulation: Formulation

    @nn.compact
    def __call__(self, x: jax.Array, output: Output, norm: Standardize | None, keys: jax.Array | None) -> jax.Array:
        """Returns the logits of pooled pixels (N, 7, 7, C) or of the head's features (N, F), or these features.

        norm: standardises the head's input, but not the features that are returned.
        """
        if x.ndim == 4:
            x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)  # torch's order: channels, rows, columns
            for layer, name in enumerate(("0", "3")):
                shape = (x.shape[-1], self.hidden)
                dense = Dense(shape, self.dtype, self.formulation, kernel_init=kernel_init, name=name)
                x = nn.relu(dense(x))
                x = dropout(x, self.dropout, keys, layer)
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if output == "features":
            return x
        return nn.Dense(self.num_classes, kernel_init=kernel_init, name="6")(norm(x) if norm else x)


class VGG(nn.Module):
    """The architecture and numerics of a VGG; a `Policy` sets how it is trained and tested."""

    stage_depths: tuple[int, ...]
    batch_norm: bool
    num_classes: int
    width: int = 64
    remat: bool = False  # recompute a stage's activations in the backward pass instead of keeping them
    formulation: Formulation = "plain"  # how its layers are computed: see jaxft/ops/README.md
    folded: bool = False  # BatchNorm is folded into the convolutions, for evaluation only: see fold.py
    head_norm: bool = False  # standardise the head's input by statistics of the training set: see heads.py
    dropout: float = 0.5  # after both hidden layers, in training
    dtype: Any = jnp.float32
    precision: str = "high"  # of float32 products on accelerators, as in jax.default_matmul_precision

    options: ClassVar[Mapping[str, Any]] = {"width": 64}
    random_layers: ClassVar[Mapping[str, float]] = {"dropout": 0.5}
    patch_size: ClassVar[int] = 1
    head: ClassVar[tuple[str, ...]] = ("classifier", "6")

    @property
    def parts(self) -> Mapping[str, str]:
        """The convolutions between two pools are a stage."""
        stages = {}
        for i, indices in enumerate(conv_indices(self.stage_depths, self.batch_norm), 1):
            names = chain(indices, [index + 1 for index in indices] if self.batch_norm else [])
            stages[f"stage{i}"] = rf"^features/({'|'.join(map(str, names))})/"
        return stages | {"hidden": r"^classifier/[03]/", "head": r"^classifier/6/"}

    @property
    def min_image_size(self) -> int:
        """Each max-pool halves the image, down to one pixel."""
        return 2 ** len(self.stage_depths)

    @staticmethod
    def norm_of(conv: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the path of a convolution's norm: features/1 for features/0."""
        return (*conv[:-1], str(int(conv[-1]) + 1))

    @nn.nowrap
    def multiply_adds(self, image_size: int) -> float:
        """Estimates the multiply-adds of one image's forward pass, within 20 %."""
        params = flatten_dict(abstract_variables(self)["params"])
        total = sum(array.size for (part, *_), array in params.items() if part == "classifier")
        for i, indices in enumerate(conv_indices(self.stage_depths, self.batch_norm)):
            kernels = sum(params["features", str(index), "kernel"].size for index in indices)
            total += kernels * (image_size // 2**i) ** 2
        return float(total)

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
        """Returns the logits (N, num_classes), at least float32, of normalised images (N, H, W, 3) or head features.

        output: "features" returns {"stage1": (N, h, w, C), ..., "stage5", "pooled": (N, F)} instead. A stage ends with
        its max-pool; pooled is the output of the hidden layers, before head_norm. mask: (N,), 0 for padding, which is
        then left out of the batch statistics in training. policy: matters in training only. keys: (N,), for dropout in
        training; None: no dropout. Raises UserError for images that are too small.
        """
        assert not (train and self.folded), "a folded network has no BatchNorm to train"
        x, features = image, {}
        with jax.default_matmul_precision(self.precision):
            if image.ndim == 4:
                if (side := min(image.shape[1:3])) < self.min_image_size:
                    raise UserError(f"a VGG needs an image_size of at least {self.min_image_size}, not {side}")
                options = (self.width, self.batch_norm, self.remat, self.formulation, self.folded, self.dtype)
                stages = Features(self.stage_depths, *options, name="features")(image, mask, train, policy)
                features = {f"stage{i}": stage for i, stage in enumerate(stages, 1)}
                x = adaptive_avg_pool(stages[-1], POOLED)
            norm = Standardize(name=HEAD_NORM) if self.head_norm else None
            computed = (self.dtype, self.formulation)
            hidden = HIDDEN * self.width
            classifier = Classifier(hidden, self.num_classes, self.dropout, *computed, name="classifier")
            x = classifier(x, output, norm, keys)
            return features | {"pooled": x} if output == "features" else x


ARCHITECTURES: dict[str, Callable[..., VGG]] = {
    name: partial(VGG, architecture.depths, architecture.batch_norm) for name, architecture in VGGS.items()
}
