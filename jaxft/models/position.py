"""Interpolates a ViT's position embeddings to the grid of an image's patches, as timm's resample_abs_pos_embed does.

torch.nn.functional.interpolate(mode="bicubic", antialias=True) is the reference. Other libraries differ from timm when
the grids are not equal: Meta's DINOv2 and transformers' ViT, DeiT and DINOv2 without registers interpolate without
antialiasing, for which torch takes -0.75 as Keys' coefficient instead of -0.5; Meta's adds 0.1 to the new size when it
computes the scale. transformers' DINOv2 with registers does the same as timm.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.transforms.pillow_resize import FILTERS


def resize_grid(embedding: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Interpolates embeddings (height, width, D) to another grid, in at least float32.

    Returns them unchanged if the grids are equal.
    """
    if embedding.shape[:2] == size:
        return embedding
    dtype = jnp.promote_types(embedding.dtype, jnp.float32)
    rows, columns = (
        jnp.asarray(bicubic_weights(old, new), dtype) for old, new in zip(embedding.shape[:2], size, strict=True)
    )
    return jnp.einsum("yh,xw,hwd->yxd", rows, columns, embedding.astype(dtype), precision="highest")


@cache
def bicubic_weights(old: int, new: int) -> np.ndarray:
    """Returns the float64 matrix (new, old) that resamples a line of pixels with antialiasing.

    Source: _compute_indices_min_size_weights_aa in torch's aten/src/ATen/native/cpu/UpSampleKernel.cpp.
    """
    scale = old / new
    stretch = max(scale, 1.0)  # the filter covers this many pixels per unit
    center = scale * (np.arange(new) + 0.5)
    first = np.maximum((center - 2 * stretch + 0.5).astype(int), 0)
    last = np.minimum((center + 2 * stretch + 0.5).astype(int), old)
    pixel = np.arange(old)
    weights = FILTERS["bicubic"].kernel(np.abs(pixel - center[:, None] + 0.5) / stretch)
    weights[(pixel < first[:, None]) | (pixel >= last[:, None])] = 0
    return weights / weights.sum(1, keepdims=True)
