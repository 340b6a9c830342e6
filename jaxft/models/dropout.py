"""Dropout and stochastic depth. A key for each image draws its masks, so that the number of devices does not matter."""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, keys: jax.Array | None, layer: int) -> jax.Array:
    """Sets a fraction `rate` of the elements to 0 and scales the others by 1 / (1 - rate), as torch's Dropout does.

    x: (N, ...). keys: (N,), one for each image; None, as in evaluation, returns x. layer: a number that no other
    random layer of the network has.
    """
    return _scale(x, rate, keys, layer, x.shape[1:])


def drop_path(x: jax.Array, rate: float, keys: jax.Array | None, layer: int) -> jax.Array:
    """Sets the residual branch of a fraction `rate` of the images to 0 and scales the others (Huang et al. 2016).

    Equals timm's DropPath and torchvision's StochasticDepth("row"). The arguments are those of `dropout`.
    """
    return _scale(x, rate, keys, layer, (1,) * (x.ndim - 1))


def _scale(x: jax.Array, rate: float, keys: jax.Array | None, layer: int, shape: tuple[int, ...]) -> jax.Array:
    if keys is None or not rate:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate, shape))(keys)
    return jnp.where(keep, x / (1 - rate), 0)
