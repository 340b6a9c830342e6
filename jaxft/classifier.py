"""A trained checkpoint as a Python object that predicts."""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from jaxft.config import resolve
from jaxft.data import image_file
from jaxft.errors import UserError
from jaxft.models.fold import fold_norms
from jaxft.targets.classification import Prediction, rank
from jaxft.training.evaluation import Evaluation, evaluate_checkpoint
from jaxft.training.restore import LoadedCheckpoint, load_checkpoint
from jaxft.training.steps import EvalConfig, predict_step
from jaxft.transforms.preprocessing import Preprocessing

BATCH_SIZE = 64  # at most
ImageLike = str | Path | Image.Image | np.ndarray  # a file, or uint8 (H, W, 3)


class Classifier:
    """A trained checkpoint that classifies images and can be evaluated."""

    def __init__(self, checkpoint: LoadedCheckpoint) -> None:
        self._checkpoint = checkpoint._replace(state=dataclasses.replace(checkpoint.state, opt_state=()))
        self.class_names: tuple[str, ...] = tuple(checkpoint.info["class_names"])
        self.preprocessing = Preprocessing(**checkpoint.info["preprocessing"])
        self._stored_size: int = resolve(checkpoint.info["config"]).data.stored_size
        model, self._variables = fold_norms(checkpoint.model, checkpoint.state.variables())
        step = partial(predict_step, config=EvalConfig(model, self.preprocessing, checkpoint.policy))
        self._p_predict_step = jax.pmap(step, axis_name=checkpoint.policy.axis_name, in_axes=(None, 0))

    def predict(self, pictures: Iterable[ImageLike], top_k: int = 3) -> list[Prediction]:
        """Classifies files, Pillow images or uint8 arrays (H, W, 3), of any size, in their order.

        Raises UserError for a file that cannot be read.
        """
        return [rank(row, self.class_names, top_k) for row in self.probabilities(pictures)]

    def probabilities(self, pictures: Iterable[ImageLike]) -> np.ndarray:
        """Returns the probabilities, float32 (N, num_classes), in the order of class_names."""
        rows = []
        for row in self.stream(pictures):
            if isinstance(row, UserError):
                raise row
            rows.append(row)
        return np.stack(rows) if rows else np.zeros((0, len(self.class_names)), np.float32)

    def stream(self, pictures: Iterable[ImageLike]) -> Iterator[np.ndarray | UserError]:
        """Yields the probabilities (num_classes,) of each image in turn, or the error if it cannot be read.

        Images are read in batches, the next batch while the devices compute.
        """
        waiting: deque[Iterator[np.ndarray | UserError]] = deque()
        source, rows = iter(pictures), 1
        with ThreadPoolExecutor() as pool:
            while chunk := list(islice(source, BATCH_SIZE)):
                rows = max(rows, 1 << (len(chunk) - 1).bit_length())  # few shapes, since each is a compilation
                waiting.append(self._predict_batch(list(pool.map(self._read, chunk)), rows))
                if len(waiting) > 1:
                    yield from waiting.popleft()
            for batch in waiting:
                yield from batch

    def evaluate(self, data_dir: str | None = None) -> Evaluation:
        """Evaluates on the images that the run was tested on. data_dir: folder of prepared TFDS datasets, if moved."""
        return evaluate_checkpoint(self._checkpoint, data_dir)

    def _read(self, image: ImageLike) -> np.ndarray | UserError:
        """Reads and resizes an image as the run did: uint8 (image_size, image_size, 3)."""
        try:
            if isinstance(image, np.ndarray):
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                    raise UserError(f"an image must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
                array = image
            elif isinstance(image, Image.Image):
                array = image_file.to_rgb(image)
            else:
                array = image_file.decode(Path(image))
            if self._stored_size and min(array.shape[:2]) > self._stored_size:  # as the run stored its own images
                array = image_file.shrink(array, self._stored_size)
            return image_file.shrink(array, self.preprocessing.image_size)
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


def load(workdir: str | Path, checkpoint: str = "best") -> Classifier:
    """Loads a run's checkpoint: 'best', 'latest' or the number of a step. Raises UserError if there is none."""
    return Classifier(load_checkpoint(workdir, checkpoint))
