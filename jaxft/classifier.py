"""A trained checkpoint as a Python object that predicts."""

import dataclasses
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from jaxft import interrupts
from jaxft.config import resolve
from jaxft.data import image_file
from jaxft.errors import UserError
from jaxft.models.fold import fold_norms
from jaxft.targets.classification import Prediction, rank
from jaxft.training.evaluation import Evaluation, evaluate_checkpoint
from jaxft.training.restore import LoadedCheckpoint, load_checkpoint
from jaxft.training.steps import EvalConfig, predict_step
from jaxft.transforms.pillow_resize import central_square
from jaxft.transforms.preprocessing import Preprocessing

BATCH_SIZE = 64  # at most
ImageLike = str | Path | Image.Image | np.ndarray  # a file, or uint8 (H, W, 3)
EXPECTED = "a file's path, a Pillow image or a uint8 array (H, W, 3)"


class Classifier:
    """A trained checkpoint that classifies images and can be evaluated."""

    def __init__(self, checkpoint: LoadedCheckpoint) -> None:
        self._checkpoint = checkpoint._replace(state=dataclasses.replace(checkpoint.state, opt_state=()))
        self.class_names: tuple[str, ...] = tuple(checkpoint.info["class_names"])
        self.preprocessing = Preprocessing(**checkpoint.info["preprocessing"])
        self._stored_size: int = resolve(checkpoint.info["config"]).data.stored_size
        model, self._variables = fold_norms(checkpoint.model, checkpoint.state.variables())
        step = partial(predict_step, config=EvalConfig(model, self.preprocessing._replace(resize=0), checkpoint.policy))
        self._p_predict_step = jax.pmap(step, axis_name=checkpoint.policy.axis_name, in_axes=(None, 0))

    @property
    def decoded_size(self) -> int:
        """The side of the square to which larger images may be shrunk while they are decoded; predictions are equal."""
        return self._stored_size or self.preprocessing.resize or self.preprocessing.image_size

    def predict(self, pictures: ImageLike | Iterable[ImageLike], top_k: int = 3) -> list[Prediction]:
        """Classifies files, Pillow images or uint8 arrays (H, W, 3), of any size, in their order.

        A single one is a list of one. Raises UserError for anything else, and for a file that cannot be read.
        """
        if not isinstance(top_k, int | np.integer) or isinstance(top_k, bool) or top_k < 1:
            raise UserError(f"top_k must be a whole number of at least 1, not {top_k!r}")
        return [rank(row, self.class_names, top_k) for row in self.probabilities(pictures)]

    def probabilities(self, pictures: ImageLike | Iterable[ImageLike]) -> np.ndarray:
        """Returns the probabilities, float32 (N, num_classes), in the order of class_names."""
        rows = []
        for row in self.stream(pictures):
            if isinstance(row, UserError):
                raise row
            rows.append(row)
        return np.stack(rows) if rows else np.zeros((0, len(self.class_names)), np.float32)

    def stream(self, pictures: ImageLike | Iterable[ImageLike]) -> Iterator[np.ndarray | UserError]:
        """Yields the probabilities (num_classes,) of each image in turn, or the error if it cannot be read.

        Images are read in batches, the next batch while the devices compute.
        """
        waiting: deque[Iterator[np.ndarray | UserError]] = deque()
        source, rows = iter(_each(pictures)), 1
        with ThreadPoolExecutor() as pool:
            while chunk := list(islice(source, BATCH_SIZE)):
                rows = max(rows, 1 << (len(chunk) - 1).bit_length())  # few shapes, since each is a compilation
                waiting.append(self._predict_batch(list(pool.map(self._read, chunk)), rows))
                if len(waiting) > 1:
                    yield from waiting.popleft()
            for batch in waiting:
                yield from batch

    def evaluate(self, data_dir: str | None = None) -> Evaluation:
        """Evaluates on the images that the run was tested on. data_dir: their folder, if it has moved."""
        return evaluate_checkpoint(self._checkpoint, data_dir)

    def _read(self, image: ImageLike) -> np.ndarray | UserError:
        """Reads and resizes an image as the run did: uint8 (image_size, image_size, 3)."""
        interrupts.check()
        try:
            # A file is shrunk while only one copy of it is in memory; the lines below then change nothing.
            array = _decode(image, self.decoded_size)
            if self._stored_size and min(array.shape[:2]) > self._stored_size:  # as the run stored its own images
                array = image_file.shrink(array, self._stored_size)
            array = image_file.shrink(array, self.preprocessing.resize or self.preprocessing.image_size)
            return central_square(array, self.preprocessing.image_size)
        except UserError as error:
            return error

    def _predict_batch(self, read: list[np.ndarray | UserError], rows: int) -> Iterator[np.ndarray | UserError]:
        """Dispatches a batch, padded to at least `rows`, to the devices; iterating the result waits for them."""
        images = [image for image in read if not isinstance(image, UserError)]
        devices, side = jax.local_device_count(), self.preprocessing.image_size
        batch = np.zeros((devices, -(-rows // devices), side, side, 3), np.uint8)
        batch.reshape(-1, side, side, 3)[: len(images)] = np.reshape(images, (-1, side, side, 3))
        probabilities = self._p_predict_step(self._variables, batch)

        def rows_and_errors() -> Iterator[np.ndarray | UserError]:
            found = iter(np.asarray(probabilities).reshape(-1, len(self.class_names)))
            for image in read:
                yield image if isinstance(image, UserError) else next(found)

        return rows_and_errors()


def _each(pictures: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    """Returns several images as they are, and one as a list. Raises UserError for anything else."""
    if isinstance(pictures, str | os.PathLike | Image.Image):
        return [pictures]
    if isinstance(pictures, np.ndarray):
        return [pictures] if pictures.ndim in (0, 2, 3) else pictures
    if isinstance(pictures, bytes | Mapping | Set) or not isinstance(pictures, Iterable):
        raise UserError(f"expected an image or a list of images, each {EXPECTED}, not {_described(pictures)}")
    return pictures


def _decode(image: ImageLike, at_most: int) -> np.ndarray:
    """Returns uint8 (H, W, 3); files become squares if both sides have more than `at_most` pixels. Raises UserError."""
    if isinstance(image, str | os.PathLike):
        return image_file.decode(Path(image), at_most=at_most)
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


def load(workdir: str | Path, checkpoint: str | int = "best") -> Classifier:
    """Loads a run's checkpoint: 'best', 'latest' or the number of a step. Raises UserError if there is none."""
    if not isinstance(workdir, str | os.PathLike) or not str(workdir):
        raise UserError(f"workdir must be the path of a run's folder, not {workdir!r}")
    return Classifier(load_checkpoint(workdir, str(checkpoint)))
