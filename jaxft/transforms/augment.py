"""Random augmentation of training images: pure functions of a key that run on the device, inside the step."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from jaxft.transforms.pillow_resize import FILTERS
from jaxft.transforms.preprocessing import Preprocessing, normalize, preprocess
from jaxft.transforms.trivial_augment import trivial_augment


class Augmentation(NamedTuple):
    """Settings of the random augmentation; the config's `augment` section explains them."""

    flip: bool = False
    shift: float = 0.0
    crop_area: float = 1.0
    crop_ratio: float = 1.0
    trivial: bool = False
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0


NO_AUGMENTATION = Augmentation()


def make_augmentation(config: ConfigDict) -> Augmentation:
    """Reads the config's `augment` section."""
    return Augmentation(**{name: config[name] for name in Augmentation._fields})


class Boxes(NamedTuple):
    """The crop of each image, in fractions of its sides; left > right mirrors it."""

    top: jax.Array  # (N,)
    bottom: jax.Array
    left: jax.Array
    right: jax.Array


def image_keys(seed: int, step: ArrayLike, index: ArrayLike) -> jax.Array:
    """Derives a key per image from seed, step and its index in the dataset (N,), so that devices do not matter."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(index))


def random_boxes(keys: jax.Array, augmentation: Augmentation, height: int, width: int, share: float = 1.0) -> Boxes:
    """Draws a crop for each image: the central square or a random part of it, randomly shifted and mirrored.

    The crop covers at least `crop_area` of the square, with an aspect ratio of at most `crop_ratio` (Szegedy et al.
    2015; torchvision's RandomResizedCrop). share: the part of the central square's sides that is used at all.
    """

    def box(key: jax.Array) -> Boxes:
        chance = jax.random.uniform(key, (7,))  # one draw, because each takes a fifth of a second to compile
        area = augmentation.crop_area + (1 - augmentation.crop_area) * chance[0]
        ratio = augmentation.crop_ratio ** (2 * chance[1] - 1)  # width to height
        size = jnp.minimum(jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)]), 1.0)
        corner = (1 - size) * chance[2:4] + augmentation.shift * (2 * chance[4:6] - 1)
        # from fractions of the central square to fractions of the whole image
        shorter = min(height, width)
        scale = jnp.array([shorter / height * share, shorter / width * share])
        corner, size = (1 - scale) / 2 + corner * scale, size * scale
        (top, left), (bottom, right) = corner, corner + size
        flip = augmentation.flip & (chance[6] < 0.5)
        return Boxes(top, bottom, jnp.where(flip, right, left), jnp.where(flip, left, right))

    return jax.vmap(box)(keys)


def sampling_weights(
    start: jax.Array, end: jax.Array, size_in: int, size_out: int, interpolation: str = "bilinear"
) -> jax.Array:
    """Returns Pillow's filter for the part of a side from `start` to `end`: (size_out, size_in).

    start, end: fractions of the side; start > end mirrors it. Rows sum to 1, or to 0 beyond the ends of the side.
    """
    scale = (end - start) * size_in / size_out
    filter_scale = jnp.maximum(jnp.abs(scale), 1.0)
    centre = (start * size_in + (jnp.arange(size_out) + 0.5) * scale)[:, None]
    weights = FILTERS[interpolation].kernel(jnp.abs(jnp.arange(size_in) + 0.5 - centre) / filter_scale)
    inside = (centre >= 0) & (centre <= size_in)
    return jnp.where(inside, weights / weights.sum(1, keepdims=True), 0.0)


def crop_and_resize(
    images: jax.Array, boxes: Boxes, size: int, fill: ArrayLike, interpolation: str = "bilinear"
) -> jax.Array:
    """Resizes the crop of each uint8 image (N, H, W, 3) to float32 (N, size, size, 3) in 0..255.

    fill: the colour (3,) outside of the image.
    """
    _, height, width, _ = images.shape
    weights = partial(sampling_weights, interpolation=interpolation)
    vertical = jax.vmap(lambda a, b: weights(a, b, height, size))(boxes.top, boxes.bottom)
    horizontal = jax.vmap(lambda a, b: weights(a, b, width, size))(boxes.left, boxes.right)
    fill = jnp.asarray(fill)

    def apply(equation: str, weights: jax.Array, pixels: jax.Array) -> jax.Array:
        # By default a TPU rounds pixels to bfloat16.
        pixels = jnp.einsum(equation, weights, pixels, precision=jax.lax.Precision.HIGHEST)
        # Negative weights overshoot at edges; Pillow clips after each pass, too.
        return pixels if interpolation == "bilinear" else jnp.clip(pixels, -fill, 255 - fill)

    pixels = images.astype(jnp.float32) - fill
    pixels = apply("nvw,nhwc->nhvc", horizontal, pixels)
    return apply("nuh,nhvc->nuvc", vertical, pixels) + fill


def erase(images: jax.Array, keys: jax.Array, probability: float) -> jax.Array:
    """Erases, with the given probability, a random rectangle of each normalised image (N, H, W, 3) to the mean colour.

    The rectangle covers 2 to 33 % of the area, with an aspect ratio of up to 3.3: Random Erasing (Zhong et al. 2017)
    with torchvision's bounds.
    """

    def mask(key: jax.Array) -> jax.Array:
        chance = jax.random.uniform(key, (5,))
        area = 0.02 + 0.31 * chance[0]
        ratio = 3.3 ** (2 * chance[1] - 1)
        size = jnp.minimum(jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)]), 1.0)
        inside = _rectangle((1 - size) * chance[2:4], size, *images.shape[1:3])
        return inside & (chance[4] < probability)

    return jnp.where(jax.vmap(mask)(keys)[..., None], 0.0, images)


def _rectangle(corner: jax.Array, size: jax.Array, height: int, width: int) -> jax.Array:
    """Returns a mask, bool (height, width), of the pixels inside a rectangle.

    corner, size: (2,), vertical and horizontal, in fractions of the sides.
    """
    rows, columns = (
        (start <= places) & (places < start + extent)
        for start, extent, places in zip(
            corner, size, ((jnp.arange(n) + 0.5) / n for n in (height, width)), strict=True
        )
    )
    return rows[:, None] & columns[None, :]


def mix(
    images: jax.Array, partners: jax.Array, keys: jax.Array, augmentation: Augmentation
) -> tuple[jax.Array, jax.Array]:
    """Mixes images with their partners; returns the mixed images and the weight (N,) of each image's own label.

    mixup (Zhang et al. 2017) blends both; cutmix (Yun et al. 2019) pastes a rectangle of the partner. The weight is
    drawn from Beta(alpha, alpha) per image. If both alphas are positive, each is used half of the time.
    """

    def blend(image: jax.Array, partner: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        chance_key, share_key = jax.random.split(key)
        chance = jax.random.uniform(chance_key, (3,))
        both = augmentation.mixup > 0 and augmentation.cutmix > 0
        cut = chance[0] < 0.5 if both else jnp.bool_(augmentation.cutmix > 0)
        alpha = jnp.where(cut, augmentation.cutmix, augmentation.mixup)
        added = jax.random.beta(share_key, alpha, alpha)
        side = jnp.sqrt(1 - added)
        corner = (1 - side) * chance[1:]
        foreign = _rectangle(corner, jnp.stack([side, side]), *image.shape[:2])
        own = jnp.where(cut, 1 - foreign.mean(), added)
        weight = jnp.where(cut, 1.0 - foreign, added)[..., None]
        return image * weight + partner * (1 - weight), own

    return jax.vmap(blend)(images, partners, keys)


def augment(images: ArrayLike, keys: jax.Array, augmentation: Augmentation, preprocessing: Preprocessing) -> jax.Array:
    """Preprocesses uint8 (N, H, W, 3) to float32 (N, size, size, 3) with random augmentation drawn from keys (N,).

    Without random crops it shows the same part of the image as evaluation; with them, parts of the whole square.
    """
    if augmentation._replace(mixup=0.0, cutmix=0.0) == NO_AUGMENTATION:
        return preprocess(images, preprocessing)
    images = jnp.asarray(images)
    _, height, width, _ = images.shape
    share = preprocessing.cropped_share if augmentation.crop_area == 1 else 1.0
    boxes = random_boxes(keys, augmentation, height, width, share)
    fill = 255 * jnp.array(preprocessing.mean)
    further_keys = jax.vmap(jax.random.fold_in, (0, None))
    images = crop_and_resize(images, boxes, preprocessing.image_size, fill, preprocessing.interpolation)
    if augmentation.trivial:
        images = trivial_augment(images, further_keys(keys, 3), fill)
    images = normalize(images, preprocessing)
    if augmentation.erase:
        images = erase(images, further_keys(keys, 1), augmentation.erase)
    return images
