"""Loads the user's own images from a folder with one subfolder per class, ROOT/SPLIT/CLASS/** or ROOT/CLASS/**."""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from jaxft.data.array_cache import cached_arrays_dir, open_arrays, write_arrays
from jaxft.data.budget import room_for_images
from jaxft.data.dataset import DataOptions, Dataset
from jaxft.data.image_file import ImageError, decode, suffixes
from jaxft.data.lazy_images import LazyImages
from jaxft.errors import UserError, shortened
from jaxft.files import atomic_write, cache_dir
from jaxft.progress import Progress

SHOWN = 10  # names in a message
EXIF_ORIENTATION = 0x0112
Result = TypeVar("Result")


class LabelledFiles(NamedTuple):
    paths: list[Path]
    label: list[int]
    class_names: tuple[str, ...]

    def fingerprint(self) -> str:
        """Returns a hash of the files' names, labels, sizes and times, which changes with the images."""
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.label, strict=True):
            stat = path.stat() if path.exists() else None  # a dangling link, which decoding reports
            digest.update(f"{path}\0{label}\0{stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
        return digest.hexdigest()


def load_folder(root: Path, split: str, options: DataOptions, class_names: tuple[str, ...] | None = None) -> Dataset:
    """Returns a split of the images below `root`, decoded once and memory-mapped from the cache.

    If the cache has no room for them, they are decoded whenever they are used. Raises UserError.
    """
    files = find_files(root, split, options.holdout, class_names)
    name = f"folder:{root}"
    arrays_dir = cached_arrays_dir(name, split)
    source = {"fingerprint": files.fingerprint(), "unreadable": options.unreadable, "side": options.side}
    opened = open_arrays(arrays_dir)
    if opened and options.cache != "never" and _matches(opened[1], source):
        return opened[0]
    try:
        if len(files.paths) * options.side**2 * 3 > room_for_images(options.cache):
            return _open_lazily(files, source, arrays_dir.with_name(f"{arrays_dir.name}.json"))
        _, side = stored_size(files, options.side)
        images = read_images(files, side, options.unreadable)
        examples = ((image, files.label[number]) for image, number in images)
        write_arrays(arrays_dir, examples, files.class_names, None, source)
    except ValueError as error:
        raise UserError(f"{name} {error}") from None
    except OSError as error:
        raise UserError(
            f"the images cannot be kept in {cache_dir()} ({error.strerror or error}): make room there, name another "
            "folder with the environment variable JAXFT_CACHE, or set --config.data.cache=never"
        ) from error
    opened = open_arrays(arrays_dir)
    assert opened, f"{arrays_dir} was just written"
    return opened[0]


def find_files(root: Path, split: str, holdout: float, class_names: tuple[str, ...] | None) -> LabelledFiles:
    """Returns the image files of a split: those of ROOT/SPLIT/CLASS/**, or a part of ROOT/CLASS/**.

    In the second case any split but "train" is the held-out part: of each class the fraction `holdout`, chosen by a
    hash of the files' names; "train" is the rest. class_names: None takes the names of the folders that hold images;
    otherwise a class may have no images here, but no other class may have any. Raises UserError.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; data.name is folder:PATH, with PATH/train/CLASS/*.jpg")
    has_splits = any((root / name).is_dir() for name in ("train", split))
    top = root / split if has_splits else root
    if not top.is_dir():
        raise UserError(f"{root} has no split '{split}'; it has {', '.join(_folders(root))}")
    found = {name: image_paths(top / name) for name in _folders(top)}
    if class_names is None:
        class_names = tuple(name for name, paths in found.items() if paths)
    if not any(found.values()):
        raise UserError(f"{top} has no images in folders named by class: {top}/CLASS/*.jpg")
    if unknown := sorted(name for name, paths in found.items() if paths and name not in class_names):
        raise UserError(f"{top} has classes that the training images lack: {shortened(unknown, SHOWN)}")
    if len(class_names) < 2:
        raise UserError(f"{top} has images of only one class, {class_names[0]}; there must be two or more")
    if not has_splits:
        found = {name: _part(root, paths, split, holdout) for name, paths in found.items()}
        if not any(found.values()):
            raise UserError(f"a data.holdout of {holdout} leaves no image of {root} for the split '{split}'")
    pairs = [(path, label) for label, name in enumerate(class_names) for path in found.get(name, [])]
    return LabelledFiles([path for path, _ in pairs], [label for _, label in pairs], class_names)


def _folders(top: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(top) if entry.is_dir() and not entry.name.startswith("."))


def image_paths(folder: Path) -> list[Path]:
    """Returns all files below `folder` with an image's suffix, dangling links included, sorted by name."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders.sort()  # os.walk descends in this order
        images = (name for name in sorted(names) if Path(name).suffix.lower() in suffixes() and name[0] != ".")
        found += [Path(parent, name) for name in images]
    return found


def _part(root: Path, paths: list[Path], split: str, holdout: float) -> list[Path]:
    """Returns the training or the held-out part of a class.

    It is chosen by hashes of names, so that most images stay in their part when others are added or removed.
    """

    def by_name(path: Path) -> bytes:
        return hashlib.sha256(str(path.relative_to(root)).encode(errors="surrogateescape")).digest()

    held_out = set(sorted(paths, key=by_name)[: round(len(paths) * holdout)])
    return [path for path in paths if (path in held_out) == (split != "train")]


def stored_size(files: LabelledFiles, side: int) -> tuple[tuple[int, int], int | None]:
    """Returns (height, width) of the stored images, and the side of the square they are shrunk to, or None.

    Reads only the headers. If all images have one size, and its shorter side is at most `side`, they are stored
    unchanged. Files without a readable header are ignored.
    """
    common: tuple[int, int] | None = None
    with ThreadPoolExecutor() as pool:
        for size in _map_ahead(pool, _header_size, files.paths):
            if size is None:
                continue
            if common is None:
                common = size
            if min(size) > side or size != common:
                return (side, side), side
    return (common, None) if common else ((side, side), side)


def _header_size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as image:
            on_its_side = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
            return image.size if on_its_side else image.size[::-1]
    except Exception:  # Pillow's plugins raise exceptions of any type; decoding reports them
        return None


def read_images(files: LabelledFiles, side: int | None, unreadable: str) -> Iterator[tuple[np.ndarray, int]]:
    """Yields each image with the index of its file, shrunk to a square of `side` pixels unless that is None.

    unreadable: "refuse" raises UserError with the files that are not images; "skip" lists them on stderr.
    """
    problems: list[str] = []
    with ThreadPoolExecutor() as pool, Progress("reading images", len(files.paths)) as progress:
        read = partial(_read, side=side)
        for number, image in enumerate(_map_ahead(pool, read, files.paths)):
            progress.update(1)
            if isinstance(image, ImageError):
                problems.append(str(image))
            elif not problems or unreadable == "skip":
                yield image, number
    if problems and unreadable == "refuse":
        raise UserError(
            f"{len(problems)} of {len(files.paths)} files cannot be used: {shortened(problems, SHOWN)}; "
            "fix or remove them, or skip them with --config.data.unreadable=skip"
        )
    for problem in problems[:SHOWN]:
        print(f"skipped: {problem}", file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"skipped: {len(problems) - SHOWN} more", file=sys.stderr, flush=True)


def _read(path: Path, side: int | None) -> np.ndarray | ImageError:
    try:
        return decode(path, side=side)
    except ImageError as error:
        return error


def _map_ahead(pool: ThreadPoolExecutor, function: Callable[[Path], Result], paths: list[Path]) -> Iterator[Result]:
    """Like pool.map, but holds only a few results at a time instead of all images of the folder."""
    ahead = 4 * (os.cpu_count() or 1)
    waiting = [pool.submit(function, path) for path in paths[:ahead]]
    for i in range(len(paths)):
        yield waiting[i % ahead].result()
        if i + ahead < len(paths):
            waiting[i % ahead] = pool.submit(function, paths[i + ahead])


def _open_lazily(files: LabelledFiles, source: dict[str, Any], checked: Path) -> Dataset:
    """Returns a dataset whose images stay in their files. Raises ValueError if no file is an image.

    checked: a file in the cache that records which files are images, since finding out means reading all of them.
    """
    try:
        found = json.loads(checked.read_text())
    except (OSError, ValueError):
        found = {}
    if not _matches(found, source):
        size, side = stored_size(files, source["side"])
        numbers = [number for _, number in read_images(files, side, source["unreadable"])]
        found = source | {"numbers": numbers, "size": size, "shrunk_to": side}
        checked.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(checked, "w") as file:
            json.dump(found, file)
    numbers = found["numbers"]
    if not numbers:
        raise ValueError("has no images")
    height, width = found["size"]
    reader = ImageFiles([files.paths[i] for i in numbers], found["shrunk_to"])
    image = LazyImages(reader, len(numbers), height, width)
    return Dataset(image, np.array([files.label[i] for i in numbers], np.int32), files.class_names)


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Reads images from files, by index."""

    paths: list[Path]
    side: int | None  # pixels of the square that images are shrunk to

    def __call__(self, number: int) -> np.ndarray:
        """Returns uint8 (H, W, 3). Raises ImageError if the file has changed and cannot be read."""
        return decode(self.paths[number], side=self.side)

    def where(self, number: int) -> str:
        return str(self.paths[number])


def _matches(info: dict[str, Any], source: dict[str, Any]) -> bool:
    return all(info.get(key) == value for key, value in source.items())
