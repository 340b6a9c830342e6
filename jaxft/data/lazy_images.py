"""Pictures that stay in their files, and are read each time they are asked for."""

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
    """For worker processes it is pickled."""

    def __call__(self, number: int) -> np.ndarray:
        """uint8 (H, W, 3)"""

    def where(self, number: int) -> str:
        """For a message."""


@dataclasses.dataclass(frozen=True)
class LazyImages:
    """Indexed as an array uint8 (N, H, W, 3) is."""

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
        """Raises UserError where a file is no longer what it was."""
        numbers, places = np.unique(index, return_inverse=True)  # a batch's padding is one picture many times
        pictures = np.empty((len(numbers), *self.shape[1:]), np.uint8)

        def read(place: int) -> None:
            picture = self.read(int(numbers[place]))
            if picture.shape != self.shape[1:]:
                raise UserError(f"{self.read.where(int(numbers[place]))} has changed its size since the run began")
            pictures[place] = picture

        list(_reading_threads(os.getpid()).map(read, range(len(numbers))))
        return pictures[places.reshape(np.shape(index))]


@dataclasses.dataclass(frozen=True)
class MappedImages:
    """A memory-mapped array uint8 (N, H, W, 3), of which worker processes get no copy but its file's name."""

    path: Path
    inode: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, image: np.memmap) -> "MappedImages":
        path = Path(str(image.filename))
        return cls(path, path.stat().st_ino, image.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Raises UserError where the file is no longer what it was."""
        return _mapped(self)[index]


@cache
def _mapped(pictures: MappedImages) -> np.ndarray:
    if not pictures.path.exists() or pictures.path.stat().st_ino != pictures.inode:
        raise UserError(f"{pictures.path} has changed since the run began; run the command again")
    return np.memmap(pictures.path, np.uint8, "r", shape=pictures.shape)


@cache
def _reading_threads(process: int) -> ThreadPoolExecutor:
    """Of this process: threads do not survive a fork."""
    return ThreadPoolExecutor(os.cpu_count(), "reading")
