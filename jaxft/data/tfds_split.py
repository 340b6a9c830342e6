"""Describes one split of a TFDS dataset, for the process that uses it and the worker that reads it."""

from pathlib import Path
from typing import NamedTuple

from jaxft.data.array_cache import cached_arrays_dir


class TfdsSplit(NamedTuple):
    name: str
    split: str  # in TFDS's syntax: train[:2%]
    data_dir: str
    side: int  # images that differ in size or are larger become squares of this many pixels
    room: float  # bytes of disk that the decoded images may take
    interpolation: str = "bilinear"  # the filter that shrinks them

    @property
    def unchanged_dir(self) -> Path:
        """The cached arrays if the images keep their size."""
        return cached_arrays_dir(self.name, self.split, self.data_dir)

    @property
    def shrunk_dir(self) -> Path:
        """The cached arrays if the images are shrunk to squares."""
        side = str(self.side)
        return cached_arrays_dir(self.name, self.split, self.data_dir, side, interpolation=self.interpolation)

    @property
    def records_file(self) -> Path:
        """Labels and the location of the images, if these stay in their array_record files."""
        return self.shrunk_dir.with_name(f"{self.shrunk_dir.name}.json")
