"""Images that are read or gathered whenever they are indexed: files, memory-mapped arrays and selections of them."""

import dataclasses
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxft.errors import UserError


class Reader(Protocol):
    """Reads one image; it is pickled for worker processes."""

    def __call__(self, number: int) -> np.ndarray:
        """Returns an image, uint8 (H, W, 3). Raises UserError if it cannot be read."""

    def where(self, number: int) -> str:
        """Returns the location of an image, for messages."""


@dataclasses.dataclass(frozen=True)
class LazyImages:
    """Images that can be indexed like an array uint8 (N, H, W, 3)."""

    read: Reader
    count: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.count, self.height, self.width, 3

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Gathers images (*index.shape, H, W, 3), read in parallel threads. Raises UserError if a file has changed."""
        numbers, inverse = np.unique(index, return_inverse=True)  # a batch's padding repeats one image
        images = np.empty((len(numbers), *self.shape[1:]), np.uint8)

        def read(i: int) -> None:
            image = self.read(int(numbers[i]))
            if image.shape != self.shape[1:]:
                raise UserError(f"{self.read.where(int(numbers[i]))} has changed its size since the run began")
            images[i] = image

        list(_reading_threads(os.getpid()).map(read, range(len(numbers))))
        return images[inverse.reshape(np.shape(index))]


@dataclasses.dataclass(frozen=True)
class MappedImages:
    """A memory-mapped array uint8 (N, H, W, 3) that is pickled as its file's name, not as a copy."""

    path: Path
    inode: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, image: np.memmap) -> "MappedImages":
        path = Path(str(image.filename))
        return cls(path, path.stat().st_ino, image.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Gathers images from the file. Raises UserError if it has been replaced."""
        return _mapped(self)[index]


@dataclasses.dataclass(frozen=True, eq=False)
class SelectedImages:
    """A selection of images, which stay where they are: in memory, in a memory-mapped array or in their files."""

    images: Any  # an array, LazyImages or MappedImages
    index: np.ndarray  # int64 (N,), positions among them

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.index), *self.images.shape[1:]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Gathers images (*index.shape, H, W, 3)."""
        return self.images[self.index[index]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.images[self.index], dtype)


def select_images(image: Any, index: np.ndarray) -> SelectedImages:
    """Returns a selection of a dataset's images, which may be a selection themselves, without copying them."""
    if isinstance(image, SelectedImages):
        image, index = image.images, image.index[index]
    return SelectedImages(image, np.asarray(index, np.int64))


def stored_images(image: Any) -> Any:
    """Returns an array or LazyImages: a dataset's images, or those from which they are selected."""
    return image.images if isinstance(image, SelectedImages) else image


def is_lazy(image: Any) -> bool:
    """Returns whether a dataset's images are read from their files whenever they are used."""
    return isinstance(stored_images(image), LazyImages)


def as_array(image: Any) -> np.ndarray:
    """Returns a dataset's images as an array: read from their files, or gathered, if they are not in one."""
    return image[np.arange(image.shape[0])] if isinstance(image, LazyImages | SelectedImages) else image


def pickled_by_path(image: Any) -> Any:
    """Returns a dataset's images, with a memory-mapped array replaced by MappedImages."""
    if isinstance(image, SelectedImages):
        return dataclasses.replace(image, images=pickled_by_path(image.images))
    return MappedImages.of(image) if isinstance(image, np.memmap) else image


@cache
def _mapped(images: MappedImages) -> np.ndarray:
    if not images.path.exists() or images.path.stat().st_ino != images.inode:
        raise UserError(f"{images.path} has changed since the run began; run the command again")
    return np.memmap(images.path, np.uint8, "r", shape=images.shape)


@cache
def _reading_threads(process: int) -> ThreadPoolExecutor:
    """Returns the thread pool of this process; `process` is its id, because threads do not survive a fork."""
    return ThreadPoolExecutor(os.cpu_count(), "reading")
