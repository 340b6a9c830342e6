"""TODO."""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from jaxft.config import resolve
from jaxft.data import image_file
from jaxft.errors import UserError
from jaxft.models.fold import fold_norms
from jaxft.training.evaluation import Evaluation, evaluate_checkpoint
from jaxft.training.restore import LoadedCheckpoint, load_checkpoint
from jaxft.training.steps import predict_step
from jaxft.transforms.preprocessing import Preprocessing

BATCH_SIZE = 64  # at most


Picture = str | Path | Image.Image | np.ndarray  # a file, or uint8 (H, W, 3)


class Prediction(NamedTuple):
    label: str
    probability: float
    top_k: tuple[tuple[str, float], ...]  # labels and probabilities, the likeliest first


class Classifier:
    """A trained checkpoint that tells what pictures show, and how often it is right."""

    def __init__(self, checkpoint: LoadedCheckpoint) -> None:
        self._checkpoint = checkpoint._replace(state=dataclasses.replace(checkpoint.state, opt_state=()))
        self.class_names: tuple[str, ...] = tuple(checkpoint.info["class_names"])
        self.preprocessing = Preprocessing(**checkpoint.info["preprocessing"])
        self._stored_size: int = resolve(checkpoint.info["config"]).data.stored_size
        model, self._variables = fold_norms(checkpoint.model, checkpoint.state.variables())
        step = partial(predict_step, model=model, preprocessing=self.preprocessing)
        self._p_predict_step = jax.pmap(step, axis_name=model.axis_name, in_axes=(None, 0))

    def predict(self, pictures: Iterable[Picture], top_k: int = 3) -> list[Prediction]:
        """Of files, Pillow images or uint8 arrays (H, W, 3), of any size, in their order.

        Raises UserError for a file that cannot be read.
        """
        return [rank(row, self.class_names, top_k) for row in self.probabilities(pictures)]

    def probabilities(self, pictures: Iterable[Picture]) -> np.ndarray:
        """float32 (N, num_classes), in the order of class_names."""
        rows = []
        for row in self.stream(pictures):
            if isinstance(row, UserError):
                raise row
            rows.append(row)
        return np.stack(rows) if rows else np.zeros((0, len(self.class_names)), np.float32)

    def stream(self, pictures: Iterable[Picture]) -> Iterator[np.ndarray | UserError]:
        """The probabilities (num_classes,) of each picture in turn, or why it cannot be read.

        Pictures are read in batches, the next one while the devices work.
        """
        waiting: deque[Iterator[np.ndarray | UserError]] = deque()
        source, rows = iter(pictures), 1
        with ThreadPoolExecutor() as pool:
            while some := list(islice(source, BATCH_SIZE)):
                rows = max(rows, 1 << (len(some) - 1).bit_length())  # few shapes, for each has to be compiled
                waiting.append(self._predict_batch(list(pool.map(self._read, some)), rows))
                if len(waiting) > 1:
                    yield from waiting.popleft()
            for batch in waiting:
                yield from batch

    def evaluate(self, data_dir: str | None = None) -> Evaluation:
        """On the pictures that the run was tested on; data_dir: where they are by now, if they moved."""
        return evaluate_checkpoint(self._checkpoint, data_dir)

    def _read(self, picture: Picture) -> np.ndarray | UserError:
        """uint8 (image_size, image_size, 3)"""
        try:
            if isinstance(picture, np.ndarray):
                if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                    raise UserError(f"a picture must be uint8 (H, W, 3), not {picture.dtype} {picture.shape}")
                array = picture
            elif isinstance(picture, Image.Image):
                array = image_file.to_rgb(picture)
            else:
                array = image_file.decode(Path(picture))
            if self._stored_size and min(array.shape[:2]) > self._stored_size:  # as the run's own pictures were kept
                array = image_file.shrink(array, self._stored_size)
            return image_file.shrink(array, self.preprocessing.image_size)
        except UserError as error:
            return error

    def _predict_batch(self, read: list[np.ndarray | UserError], rows: int) -> Iterator[np.ndarray | UserError]:
        """Sets the devices to work at once, on `rows` pictures or a few more, and waits for them when iterated."""
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
    """A run's checkpoint, 'best', 'latest' or a step's number, ready to predict. Raises UserError without one."""
    return Classifier(load_checkpoint(workdir, checkpoint))


def rank(probabilities: np.ndarray, class_names: Sequence[str], top_k: int) -> Prediction:
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    top = tuple((class_names[i], float(probabilities[i])) for i in order)
    return Prediction(*top[0], top)
