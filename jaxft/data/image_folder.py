"""Reads the images of a folder with one subfolder per class, and keeps them decoded in the cache."""

import dataclasses
import json
import os
import shutil
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxft import interrupts
from jaxft.data.array_cache import cached_arrays_dir, open_arrays, open_written, write_arrays
from jaxft.data.budget import room_for_images
from jaxft.data.dataset import DataOptions, Dataset, Origin
from jaxft.data.image_file import (
    Decoded,
    ImageError,
    LargeImageError,
    decode,
    is_single_colour,
    is_thin,
    open_image,
    read_file,
)
from jaxft.data.labelled_files import SHOWN, LabelledFiles, find_files
from jaxft.data.lazy_images import LazyImages
from jaxft.errors import UserError, counted, printable, shortened, write_message
from jaxft.files import atomic_write, cache_dir, matches_checksum, open_regular, read_json, reason, with_checksum
from jaxft.progress import Progress

EXIF_ORIENTATION = 0x0112
SINGLE_COLOUR, UNREADABLE = "single_colour", "unreadable"  # remarks beside those of image_file
_TASK_FILES, _TASK_BYTES = 16, 1 << 22  # that a thread reads at once, at most: files, and bytes of decoded images
Result = TypeVar("Result")


class UnreadableError(UserError):
    """Files of one or several splits are not images."""

    def __init__(self, problems: list[str], num_files: int) -> None:
        super().__init__(
            f"{len(problems):,} of {counted(num_files, 'file')} cannot be used: {shortened(problems, SHOWN)}; "
            "fix or remove them, or skip them with --config.data.unreadable=skip"
        )
        self.problems, self.num_files = problems, num_files


class SizesDifferError(Exception):
    """Images cannot be stored unchanged, because they differ in size, are large or are thin."""


class ReadImage(NamedTuple):
    decoded: Decoded
    crc32: int  # of the file
    is_single_colour: bool


class Unusable(NamedTuple):
    problem: str
    size: tuple[int, int] | None  # (height, width) by the header, if it can be read


@dataclasses.dataclass
class Readings:
    """Checksums, counts and remarks that are collected while all images of a split are read."""

    checksums: list[int]  # CRC-32 of the files of each class, in order
    remarks: Counter[str] = dataclasses.field(default_factory=Counter)
    counts: Counter[int] = dataclasses.field(default_factory=Counter)  # readable images of each class
    unusable: list[int] = dataclasses.field(default_factory=list)  # indices of the files that are not images

    def add(self, read: ReadImage, label: int) -> None:
        self.checksums[label] = zlib.crc32(read.crc32.to_bytes(4, "little"), self.checksums[label])
        self.counts[label] += 1
        self.remarks.update(read.decoded.remarks)
        self.remarks[SINGLE_COLOUR] += read.is_single_colour

    def to_json(self) -> dict[str, Any]:
        checksums = [f"{crc:08x}" for crc in self.checksums]
        return {"checksums": checksums, "remarks": dict(+self.remarks), "unusable": self.unusable}


def load_folder(root: Path, split: str, options: DataOptions, class_names: tuple[str, ...] | None = None) -> Dataset:
    """Returns a split of the images below `root`, decoded once and memory-mapped from the cache.

    If the cache has no room for them, they are decoded whenever they are used. Raises UserError.
    """
    files = find_files(root, split, options, class_names)
    return load_files(files, root, f"folder:{root}", split, options)[0]


def load_files(
    files: LabelledFiles, root: Path, name: str, split: str, options: DataOptions
) -> tuple[Dataset, list[int]]:
    """Returns the images of a split's files as `load_folder` does, and the indices of the files that are not images.

    name: the source's, by which the cache knows it. root: the folder that holds the files. Raises UserError.
    """
    arrays_dir = cached_arrays_dir(name, split, interpolation=options.interpolation)
    source = {"fingerprint": files.fingerprint(), "unreadable": options.unreadable, "side": options.side, "version": 3}
    opened = open_arrays(arrays_dir)
    if opened and options.cache != "never" and _matches(opened[1], source):
        return _with_origin(*opened, root, files)
    try:
        if len(files.paths) * options.side**2 * 3 > room_for_images(options.cache):
            return _open_lazily(root, files, source, options, arrays_dir.with_name(f"{arrays_dir.name}.json"))
        found = _unchanged_or_square(partial(_write_arrays, arrays_dir, files, source, options), options.side)
    except ValueError as error:
        raise UserError(f"{name} {error}") from None
    except OSError as error:
        raise UserError(
            f"the images cannot be kept in {cache_dir()} ({reason(error)}): make room there, name another "
            "folder with the environment variable JAXFT_CACHE, or set --config.data.cache=never"
        ) from error
    return _with_origin(open_written(arrays_dir), found, root, files)


def _with_origin(
    data: Dataset, found: Mapping[str, Any], root: Path, files: LabelledFiles
) -> tuple[Dataset, list[int]]:
    """Returns the dataset with its origin, and the indices of the files that are not images."""
    unusable = set(found.get("unusable", ()))
    paths = tuple(path for number, path in enumerate(files.paths) if number not in unusable)
    origin = Origin(
        str(root),
        files.layout,
        tuple(found["checksums"]),
        files.skipped,
        paths if len(paths) == data.num_examples else (),
        found["remarks"],
    )
    return data._replace(origin=origin), sorted(unusable)


def _unchanged_or_square(read: Callable[[int | None], Result], side: int) -> Result:
    """Returns read(None), which reads the images unchanged, or read(side) if it finds that their sizes differ.

    In a folder of several sizes that is usually found at the second image, so that reading starts again at no cost.
    """
    try:
        return read(None)
    except SizesDifferError:
        return read(side)


def _write_arrays(
    arrays_dir: Path, files: LabelledFiles, source: dict[str, Any], options: DataOptions, side: int | None
) -> dict[str, Any]:
    """Reads all images and writes them into the cache; returns the content of its info.json."""
    readings = Readings([0] * len(files.class_names))
    found = dict(source)

    def examples() -> Iterator[tuple[np.ndarray, int]]:
        for image, number in read_images(files, side, options, readings):
            yield image, files.label[number]
        found.update(readings.to_json())

    write_arrays(arrays_dir, examples(), files.class_names, None, found)
    return found


def _header_size(path: Path) -> tuple[int, int] | None:
    try:
        with open_regular(path) as file, open_image(file) as image:
            on_its_side = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
            return image.size if on_its_side else image.size[::-1]
    except Exception:  # Pillow's plugins raise exceptions of any type; decoding reports them
        return None


def read_images(
    files: LabelledFiles, side: int | None, options: DataOptions, readings: Readings
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields each image with the index of its file, shrunk to a square of `side` pixels unless that is None.

    If it is None, raises SizesDifferError unless all images, including those with only a readable header, have one
    size, are not thin, and their shorter side is at most options.side. options.unreadable: "refuse" raises UserError
    with the files that are not images; "skip" lists them on stderr. readings: is filled meanwhile. Raises UserError if
    all files of a class are skipped.
    """
    problems: list[str] = []
    common: tuple[int, ...] | None = None
    limit = options.side if side is None else None
    with ThreadPoolExecutor() as pool, Progress("reading images", len(files.paths), log_after=5) as progress:
        read = partial(_read, side=side, limit=limit, interpolation=options.interpolation)
        for number, found in enumerate(_map_ahead(pool, read, files.paths, _files_per_task(files, options.side))):
            progress.update(1)
            size = found.size if isinstance(found, Unusable) else found.decoded.image.shape[:2]
            if limit and size:
                common = common or size
                if size != common or min(size) > limit or is_thin(*size):
                    raise SizesDifferError
            if isinstance(found, Unusable):
                problems.append(found.problem)
                readings.unusable.append(number)
            elif not problems or options.unreadable == "skip":
                readings.add(found, files.label[number])
                yield found.decoded.image, number
    if problems and options.unreadable == "refuse":
        raise UnreadableError(problems, len(files.paths))
    readings.remarks[UNREADABLE] = len(problems)
    for problem in problems[:SHOWN]:
        write_message(printable(f"skipped: {problem}"))
    if len(problems) > SHOWN:
        write_message(f"skipped: {len(problems) - SHOWN:,} more")
    lost = [files.class_names[label] for label in sorted(set(files.label)) if not readings.counts[label]]
    if lost and readings.counts:  # without any image, the caller says so
        raise UserError(
            f"no file of these classes can be read as an image: {shortened(lost, SHOWN)}; fix or remove them"
        )


def _read(path: Path, side: int | None, limit: int | None, interpolation: str) -> ReadImage | Unusable:
    """Reads an image. Raises SizesDifferError, before decoding it, if it exceeds `limit` or is thin."""
    try:
        decoded, crc32 = read_file(path, side, limit, interpolation)
        return ReadImage(decoded, crc32, is_single_colour(decoded.image))
    except LargeImageError:
        if _header_size(path):
            raise SizesDifferError from None
        return _read(path, limit, None, interpolation)  # damaged, although Pillow could open it
    except ImageError as error:
        return Unusable(str(error), _header_size(path) if limit else None)
    except OSError as error:
        return Unusable(f"{path} cannot be read ({reason(error)})", None)


def _files_per_task(files: LabelledFiles, side: int) -> int:
    """Returns how many files a thread reads at once: several, because handing over a small image takes as long.

    Few enough for all threads to be busy, and for their images to take little memory.
    """
    # NOTES: Reading many small images (docs/notes/input-and-startup.md)
    by_memory = _TASK_BYTES // (3 * side**2)
    return max(1, min(_TASK_FILES, by_memory, len(files.paths) // (64 * (os.cpu_count() or 1))))


def _map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Path], Result], paths: list[Path], at_once: int
) -> Iterator[Result]:
    """Maps like pool.map, but in tasks of `at_once` paths, and holding only a few results, not the whole folder's."""

    def task(start: int) -> list[Result]:
        return [function(path) for path in paths[start : start + at_once]]

    starts = iter(range(0, len(paths), at_once))
    waiting = deque(pool.submit(task, start) for start in islice(starts, 4 * (os.cpu_count() or 1)))
    while waiting:
        for result in waiting.popleft().result():
            interrupts.check()
            yield result
        waiting.extend(pool.submit(task, start) for start in islice(starts, 1))


def _open_lazily(
    root: Path, files: LabelledFiles, source: dict[str, Any], options: DataOptions, checked: Path
) -> tuple[Dataset, list[int]]:
    """Returns a dataset whose images stay in their files, and the indices of the files that are not images.

    checked: a file in the cache that records which files are images, since finding out means reading all of them.
    Raises ValueError if no file is an image.
    """
    try:
        found = read_json(checked)
    except (OSError, ValueError):
        found = {}
    if not (_matches(found, source) and matches_checksum(found)):
        found = with_checksum(source | _unchanged_or_square(partial(_check_images, files, options), options.side))
        checked.parent.mkdir(parents=True, exist_ok=True)
        if checked.is_dir() and not checked.is_symlink():
            shutil.rmtree(checked)
        with atomic_write(checked, "w") as file:
            json.dump(found, file)
    numbers = found["numbers"]
    if not numbers:
        raise ValueError("has no images")
    height, width = found["size"]
    reader = ImageFiles([files.paths[i] for i in numbers], found["shrunk_to"], options.interpolation)
    image = LazyImages(reader, len(numbers), height, width)
    data = Dataset(image, np.array([files.label[i] for i in numbers], np.int32), files.class_names)
    return _with_origin(data, found, root, files)


def _check_images(files: LabelledFiles, options: DataOptions, side: int | None) -> dict[str, Any]:
    """Reads all images; returns which of them are usable, and their size."""
    readings = Readings([0] * len(files.class_names))
    numbers, size = [], (0, 0)
    for image, number in read_images(files, side, options, readings):
        numbers.append(number)
        size = image.shape[:2]
    return readings.to_json() | {"numbers": numbers, "size": size, "shrunk_to": side}


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Reads images from files, by index."""

    paths: list[Path]
    side: int | None  # pixels of the square that images are shrunk to
    interpolation: str = "bilinear"

    def __call__(self, number: int) -> np.ndarray:
        """Returns uint8 (H, W, 3). Raises ImageError if the file has changed and cannot be read."""
        return decode(self.paths[number], side=self.side, interpolation=self.interpolation)

    def where(self, number: int) -> str:
        return str(self.paths[number])


def _matches(info: dict[str, Any], source: dict[str, Any]) -> bool:
    return all(info.get(key) == value for key, value in source.items())
