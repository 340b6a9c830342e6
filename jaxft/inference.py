"""Applies a network to images of any size: reads, resizes and batches them, and returns a row of numbers for each."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
from PIL import Image

from jaxft import interrupts
from jaxft.config import resolve
from jaxft.data import image_file
from jaxft.data.batches import replicate
from jaxft.errors import UserError
from jaxft.models.fold import fold_norms
from jaxft.models.heads import get_head
from jaxft.models.network import Network, options_of
from jaxft.models.policy import Policy
from jaxft.ops.formulation import default_formulation
from jaxft.pretrained.weights_file import Weights, model_of
from jaxft.training.restore import LoadedCheckpoint
from jaxft.training.steps import EvalConfig, Layer, predict_step
from jaxft.transforms.pillow_resize import central_square
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

BATCH_SIZE = 64  # at most
IMAGENET_SIZES = (224, 256)  # image_size and resize of torchvision's usual evaluation
CATALOGUE_KEYS = {"image_size": "crop_size", "resize": "resize_size"}  # fields of Preprocessing -> of NamedWeights

ImageLike = str | Path | Image.Image | np.ndarray  # a file, or uint8 (H, W, 3)
EXPECTED = "a file's path, a Pillow image or a uint8 array (H, W, 3)"


class LoadedNetwork(NamedTuple):
    """A network with everything that is needed to apply it to images."""

    model: Network
    variables: Any
    preprocessing: Preprocessing
    policy: Policy
    stored_size: int = 0  # a run's data.stored_size: larger images are first shrunk to squares of this side; 0: never
    keep_own_size: bool = False  # images of image_size x image_size are only normalised, not resized and cropped


def from_checkpoint(checkpoint: LoadedCheckpoint) -> LoadedNetwork:
    """Returns a run's network with the preprocessing of the run's evaluation."""
    _, info, model, policy, state = checkpoint
    preprocessing = Preprocessing(**info["preprocessing"])
    return LoadedNetwork(model, state.variables(), preprocessing, policy, resolve(info["config"]).data.stored_size)


def from_weights(weights: Weights) -> LoadedNetwork:
    """Returns the network of pretrained weights in float32, with the preprocessing that their provenance names.

    That of weights that were exported from a run is the one of the run's evaluation.
    """
    provenance = weights.provenance
    model = model_of(provenance).clone(formulation=default_formulation())
    variables = replicate(jax.tree.map(np.float32, weights.variables))
    if "preprocessing" in provenance:
        preprocessing = Preprocessing(**provenance["preprocessing"])
        stored_size = provenance["config"]["data"].get("stored_size", 0)
        return LoadedNetwork(model, variables, preprocessing, Policy(), stored_size)
    return LoadedNetwork(model, variables, preprocessing_of(provenance, model), Policy(), keep_own_size=True)


def preprocessing_of(provenance: Mapping[str, Any], model: Network) -> Preprocessing:
    """Returns the preprocessing with which weights are evaluated, with ImageNet's values for those that are unknown.

    The default image size of a network with position embeddings is that of their grid.
    """
    catalogue = {key: provenance[name] for key, name in CATALOGUE_KEYS.items() if name in provenance}
    own = {key: provenance[key] for key in Preprocessing._fields if key in provenance}
    found: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} | catalogue | own
    if "image_size" not in found:
        usual, resize = IMAGENET_SIZES
        patches = options_of(model).get("grid") or usual // model.patch_size
        size = max(patches * model.patch_size, model.min_image_size)
        found = {"resize": round(resize * size / usual)} | found | {"image_size": size}
    return Preprocessing(**found)


class Inference:
    """Maps images to rows of numbers on all local devices, in batches."""

    def __init__(self, network: LoadedNetwork) -> None:
        self.preprocessing = network.preprocessing
        self._stored_size, self._keep_own_size = network.stored_size, network.keep_own_size
        self.num_features, self.num_classes = get_head(network.variables["params"], network.model.head)["kernel"].shape
        model, self._variables = fold_norms(network.model, network.variables)
        config = EvalConfig(model, self.preprocessing._replace(resize=0), network.policy)
        steps = {layer: partial(predict_step, config=config, layer=layer) for layer in get_args(Layer)}
        pmap = partial(jax.pmap, axis_name=config.policy.axis_name, in_axes=(None, 0))
        self._p_steps = {layer: pmap(step) for layer, step in steps.items()}

    @property
    def decoded_size(self) -> int:
        """The side of the square to which larger images may be shrunk while they are decoded; the rows are equal."""
        return self._stored_size or self.preprocessing.resize or self.preprocessing.image_size

    def rows(self, images: ImageLike | Iterable[ImageLike], layer: Layer) -> np.ndarray:
        """Returns the rows of all images, float32 (N, D). Raises UserError for an image that cannot be read."""
        found = []
        for row in self.stream(images, layer):
            if isinstance(row, UserError):
                raise row
            found.append(row)
        width = self.num_features if layer == "pooled" else self.num_classes
        return np.stack(found) if found else np.zeros((0, width), np.float32)

    def stream(self, images: ImageLike | Iterable[ImageLike], layer: Layer) -> Iterator[np.ndarray | UserError]:
        """Yields the row (D,) of each image in turn, or the error if it cannot be read.

        Images are read in batches, the next batch while the devices compute.
        """
        waiting: deque[Iterator[np.ndarray | UserError]] = deque()
        source, size = iter(_as_iterable(images)), 1
        with ThreadPoolExecutor() as pool:
            while chunk := list(islice(source, BATCH_SIZE)):
                size = max(size, 1 << (len(chunk) - 1).bit_length())  # few shapes, since each is a compilation
                waiting.append(self._compute(list(pool.map(self._read, chunk)), size, layer))
                if len(waiting) > 1:
                    yield from waiting.popleft()
            for batch in waiting:
                yield from batch

    def _read(self, image: ImageLike) -> np.ndarray | UserError:
        """Reads and resizes an image as the evaluation does: uint8 (image_size, image_size, 3)."""
        interrupts.check()
        interpolation = self.preprocessing.interpolation
        try:
            # Files are shrunk here, while only one copy is in memory; the lines below then leave them unchanged.
            array = _decode(image, self.decoded_size, interpolation)
            if self._keep_own_size and array.shape[:2] == (self.preprocessing.image_size,) * 2:
                return array
            if self._stored_size and min(array.shape[:2]) > self._stored_size:  # as the run stored its own images
                array = image_file.shrink(array, self._stored_size, interpolation)
            array = image_file.shrink(array, self.preprocessing.resize or self.preprocessing.image_size, interpolation)
            return central_square(array, self.preprocessing.image_size)
        except UserError as error:
            return error

    def _compute(self, read: list[np.ndarray | UserError], size: int, layer: Layer) -> Iterator[np.ndarray | UserError]:
        """Dispatches a batch, padded to at least `size`, to the devices; iterating the result waits for them."""
        images = [image for image in read if not isinstance(image, UserError)]
        if not images:  # nothing to compile a program for
            return iter(read)
        devices, side = jax.local_device_count(), self.preprocessing.image_size
        batch = np.zeros((devices, -(-size // devices), side, side, 3), np.uint8)
        batch.reshape(-1, side, side, 3)[: len(images)] = np.reshape(images, (-1, side, side, 3))
        computed = self._p_steps[layer](self._variables, batch)

        def rows_and_errors() -> Iterator[np.ndarray | UserError]:
            found = iter(np.asarray(computed).reshape(-1, computed.shape[-1]))
            for image in read:
                yield image if isinstance(image, UserError) else next(found)

        return rows_and_errors()


def _as_iterable(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    """Returns several images unchanged, and a single one in a list. Raises UserError for anything else."""
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images]
    if isinstance(images, np.ndarray):
        return [images] if images.ndim in (0, 2, 3) else images
    if isinstance(images, bytes | Mapping | Set) or not isinstance(images, Iterable):
        raise UserError(f"expected an image or a list of images, each {EXPECTED}, not {_described(images)}")
    return images


def _decode(image: ImageLike, at_most: int, interpolation: str) -> np.ndarray:
    """Returns uint8 (H, W, 3); files become squares if both sides have more than `at_most` pixels. Raises UserError."""
    if isinstance(image, str | os.PathLike):
        return image_file.decode(Path(image), at_most=at_most, interpolation=interpolation)
    if isinstance(image, Image.Image):
        try:
            return image_file.to_rgb(image)
        except (OSError, SyntaxError, ValueError) as error:  # its file is incomplete or closed
            raise UserError(f"the Pillow image cannot be read: {error}") from None
    if not isinstance(image, np.ndarray):
        raise UserError(f"an image must be {EXPECTED}, not {_described(image)}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"an array must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
    return image


def _described(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"
