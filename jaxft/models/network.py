"""The interface of a network: what the rest of the package uses of a Flax module, whatever its family."""

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from jaxft.models.heads import get_head, set_head
from jaxft.ops.formulation import Formulation

# logits, or all named features: `pooled` (N, F), which is the head's input, and stage1, ... (N, h, w, C) or `tokens`
# (N, T, D) if the family has them
Output = Literal["logits", "features"]


class Network(Protocol):
    """A Flax module that is called as `ResNet` is, with the facts of its family that other modules need."""

    num_classes: int
    remat: bool
    formulation: Formulation
    folded: bool  # BatchNorm is folded into the convolutions: see fold.py
    dtype: Any  # of the computation
    precision: str
    head_norm: bool  # its head's input is standardised: see heads.py
    dropout: float  # rate in training; the family says before which layers

    @property
    def options(self) -> Mapping[str, Any]:
        """Fields that are facts of the weights, by their names in the config, with the source's values."""

    @property
    def random_layers(self) -> Mapping[str, float]:
        """Fields that are rates of random layers, with the values of the source's training: {"dropout": 0.5}."""

    @property
    def parts(self) -> Mapping[str, str]:
        """The parts of the network, from the input to the head, with a pattern of the paths of their parameters."""

    @property
    def head(self) -> tuple[str, ...]:
        """The path of the dense layer that maps features to logits."""

    @property
    def min_image_size(self) -> int:
        """The shorter side, in pixels, of the smallest images that it can process."""

    @property
    def patch_size(self) -> int:
        """A number that divides both sides of all images that it can process."""

    @staticmethod
    def norm_of(conv: tuple[str, ...]) -> tuple[str, ...] | None:
        """Returns the path of the BatchNorm that would follow the convolution at `conv`; None without BatchNorm."""

    def multiply_adds(self, image_size: int) -> float:
        """Estimates the multiply-adds of one image's forward pass, within 20 %."""

    # flax.linen.Module's
    def __hash__(self) -> int: ...
    def init(self, *args: Any, **kwargs: Any) -> Any: ...
    def apply(self, *args: Any, **kwargs: Any) -> Any: ...
    def clone(self, **kwargs: Any) -> Any: ...


def options_of(model: Network) -> dict[str, Any]:
    """Returns the model's own values of its family's options: {"width": 64, "stem": "imagenet"} of a ResNet."""
    return {key: getattr(model, key) for key in model.options}


def is_random(model: Network) -> bool:
    """Returns whether the model has random layers in training: dropout or stochastic depth."""
    return any(getattr(model, name) for name in model.random_layers)


def example_side(model: Network) -> int:
    """Returns the side, about 32 pixels, of an image that the model can process."""
    return max(-(-32 // model.patch_size) * model.patch_size, model.min_image_size)


def abstract_variables(model: Network) -> Any:
    """Returns the shapes and dtypes of the model's variables.

    They do not depend on how its layers are computed, so that all formulations share a trace, and so do all heads.
    """
    plain = model.clone(num_classes=0, formulation="plain", dtype=jnp.float32, precision="high", remat=False)
    variables = _abstract_variables(plain)
    head = {
        name: jax.ShapeDtypeStruct((*leaf.shape[:-1], model.num_classes), leaf.dtype)
        for name, leaf in get_head(variables["params"], model.head).items()
    }
    return variables | {"params": set_head(variables["params"], model.head, head)}


@cache
def _abstract_variables(model: Network) -> Any:
    # NOTES: Where a start spends its time (docs/notes/input-and-startup.md)
    side = example_side(model)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(lambda image: model.init(jax.random.key(0), image, train=False), image)


def num_params(model: Network) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(model)["params"]))
