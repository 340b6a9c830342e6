"""Settings of how a network is trained and tested, as opposed to what it computes."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.data.batches import AXIS_NAME
from jaxft.models.heads import HEAD_NORM
from jaxft.models.network import Network

BatchNormMode = Literal["update", "sync", "frozen"]


class Policy(NamedTuple):
    """Hashable settings: which parameters train, how BatchNorm behaves in training, and how the network is tested."""

    frozen: frozenset[str] = frozenset()  # paths of parameters that do not train: 'layer1/0/bn1/scale'
    batch_norm: BatchNormMode = "update"  # statistics of a device's share, of the whole batch, or the running ones
    norm_momentum: float = 0.1  # weight of the newest batch in the running statistics, as torch counts it
    test_flip: bool = False  # test with the mean of an image's and its mirror image's logits
    axis_name: str = AXIS_NAME  # of the mapped axis over the devices

    def norm_is_frozen(self, path: str) -> bool:
        """Returns whether the norm at 'layer1/0/bn1' keeps its statistics in training; that of the head's input does.

        A BatchNorm does if both of its parameters are frozen, too.
        """
        return path == HEAD_NORM or self.batch_norm == "frozen" or {f"{path}/scale", f"{path}/bias"} <= self.frozen


def named_features(model: Network, variables: Any, image: jax.Array) -> dict[str, jax.Array]:
    """Returns all features of normalised images (N, H, W, 3) in evaluation mode, by name: `pooled`, stage1, ..."""
    return model.apply(variables, image, train=False, output="features")


def eval_features(model: Network, variables: Any, image: jax.Array, policy: Policy) -> jax.Array:
    """Returns the pooled features (N, F) of normalised images (N, H, W, 3) in evaluation mode.

    With test_flip they are the mean over each image and its mirror image; the head is linear, so its logits are the
    mean of both logits.
    """
    if not policy.test_flip:
        return named_features(model, variables, image)["pooled"]
    both = named_features(model, variables, jnp.concatenate([image, image[:, :, ::-1]]))["pooled"]
    return both.reshape(2, image.shape[0], both.shape[-1]).mean(0)


def eval_logits(model: Network, variables: Any, image: jax.Array, policy: Policy) -> jax.Array:
    """Returns the logits (N, num_classes) of normalised images (N, H, W, 3) or of their features (N, F)."""
    features = eval_features(model, variables, image, policy) if image.ndim == 4 else image
    return model.apply(variables, features, train=False)
