"""A folder of the user's own pictures: which files there are, their classes, and which are held out."""

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
from jaxft.data.budget import room_for_pictures
from jaxft.data.dataset import Dataset
from jaxft.data.image_file import SUFFIXES, ImageError, decode
from jaxft.data.lazy_images import LazyImages
from jaxft.errors import UserError
from jaxft.files import cache_dir
from jaxft.progress import Progress

SHOWN = 10  # names in a message


Result = TypeVar("Result")


class LabelledFiles(NamedTuple):
    paths: list[Path]
    label: list[int]
    class_names: tuple[str, ...]

    def fingerprint(self) -> str:
        """Of the files' names, sizes and times: another one means other pictures."""
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.label, strict=True):
            stat = path.stat() if path.exists() else None  # a dangling link, which decoding will tell
            digest.update(f"{path}\0{label}\0{stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
        return digest.hexdigest()


def find_files(root: Path, split: str, holdout: float, class_names: tuple[str, ...] | None) -> LabelledFiles:
    """The pictures of `split`: of ROOT/SPLIT/CLASS/**, or else the part of ROOT/CLASS/** that is held out or is not.

    In the second case "train" names the pictures that are trained on and any other name those held out: of each
    class the fraction `holdout`, chosen by the files' names alone. class_names: None takes the folders' names;
    otherwise a class may lack pictures but not have another name. Raises UserError.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; data.name is folder:PATH, with PATH/train/CLASS/*.jpg")
    has_splits = any((root / name).is_dir() for name in ("train", split))
    top = root / split if has_splits else root
    if not top.is_dir():
        raise UserError(f"{root} has no split '{split}'; it has {', '.join(_folders(root))}")
    found = {name: pictures_below(top / name) for name in _folders(top)}
    if class_names is None:
        class_names = tuple(name for name, paths in found.items() if paths)
    if not any(found.values()):
        raise UserError(f"{top} has no pictures in folders named by class: {top}/CLASS/*.jpg")
    if unknown := sorted(name for name, paths in found.items() if paths and name not in class_names):
        raise UserError(f"{top} has classes that the training pictures lack: {_shortened(unknown)}")
    if len(class_names) < 2:
        raise UserError(f"{top} has pictures of one class alone, {class_names[0]}; there must be two or more")
    if not has_splits:
        found = {name: _part(root, paths, split, holdout) for name, paths in found.items()}
        if not any(found.values()):
            raise UserError(f"a data.holdout of {holdout} leaves no picture of {root} for the split '{split}'")
    pairs = [(path, label) for label, name in enumerate(class_names) for path in found.get(name, [])]
    return LabelledFiles([path for path, _ in pairs], [label for _, label in pairs], class_names)


def _folders(top: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(top) if entry.is_dir() and not entry.name.startswith("."))


def pictures_below(folder: Path) -> list[Path]:
    """Every file with a picture's ending, dangling links too, in the order of names."""
    return [
        Path(parent, name)
        for parent, folders, names in os.walk(folder)
        for name in (folders.sort() or sorted(names))  # os.walk goes down in the order that it finds here
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
    ]


def _part(root: Path, paths: list[Path], split: str, holdout: float) -> list[Path]:
    """By the names' hashes, so that most pictures stay where they are when others come or go."""

    def by_name(path: Path) -> bytes:
        return hashlib.sha256(str(path.relative_to(root)).encode(errors="surrogateescape")).digest()

    held_out = set(sorted(paths, key=by_name)[: round(len(paths) * holdout)])
    return [path for path in paths if (path in held_out) == (split != "train")]


def stored_size(files: LabelledFiles, side: int) -> tuple[tuple[int, int], int | None]:
    """(height, width) of what is kept of each picture, and the side of the square that it is shrunk to, if it is.

    Pictures stay as they are where all that can be read have one size, as their headers tell, and no larger one.
    """
    common: tuple[int, int] | None = None
    with ThreadPoolExecutor() as pool:
        for size in _map_ahead(pool, _header_size, files.paths):
            if size and (min(size) > side or size != (common := common or size)):
                return (side, side), side
    return (common, None) if common else ((side, side), side)


def _header_size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as picture:
            turned = picture.getexif().get(0x0112, 1) >= 5  # EXIF's orientation: lying on its side
            return picture.size if turned else picture.size[::-1]
    except Exception:  # Pillow's plugins raise whatever they like; decoding tells it
        return None


def read_pictures(files: LabelledFiles, side: int | None, unreadable: str) -> Iterator[tuple[np.ndarray, int]]:
    """Each picture and its number among the files, in order, shrunk to a square of `side` pixels unless None.

    unreadable: "refuse" raises UserError with the files that are no pictures, "skip" lists them and goes on.
    """
    problems: list[str] = []
    with ThreadPoolExecutor() as pool, Progress("reading pictures", len(files.paths)) as progress:
        read = partial(_read, side=side)
        for number, picture in enumerate(_map_ahead(pool, read, files.paths)):
            progress.update(1)
            if isinstance(picture, ImageError):
                problems.append(str(picture))
            elif not problems or unreadable == "skip":
                yield picture, number
    if problems and unreadable == "refuse":
        raise UserError(
            f"{len(problems)} of {len(files.paths)} files cannot be used: {_shortened(problems)}; "
            "mend or remove them, or pass over them by --config.data.unreadable=skip"
        )
    for problem in problems[:SHOWN]:
        print(f"skipped: {problem}", file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"skipped: {len(problems) - SHOWN} more", file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Reads the pictures of files by their numbers."""

    paths: list[Path]
    side: int | None  # of the squares that pictures are shrunk to

    def __call__(self, number: int) -> np.ndarray:
        """Raises ImageError where a file is no longer what it was."""
        return decode(self.paths[number], side=self.side)

    def where(self, number: int) -> str:
        return str(self.paths[number])


def _read(path: Path, side: int | None) -> np.ndarray | ImageError:
    try:
        return decode(path, side=side)
    except ImageError as error:
        return error


def _map_ahead(pool: ThreadPoolExecutor, function: Callable[[Path], Result], paths: list[Path]) -> Iterator[Result]:
    """pool.map that holds a few results at a time, not all pictures of the folder."""
    ahead = 4 * (os.cpu_count() or 1)
    waiting = [pool.submit(function, path) for path in paths[:ahead]]
    for i in range(len(paths)):
        yield waiting[i % ahead].result()
        if i + ahead < len(paths):
            waiting[i % ahead] = pool.submit(function, paths[i + ahead])


def _shortened(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def load_folder(files: LabelledFiles, name: str, split: str, side: int, unreadable: str, cache: str) -> Dataset:
    source = {"fingerprint": files.fingerprint(), "unreadable": unreadable, "side": side}
    arrays_dir = cached_arrays_dir(name, split)
    opened = open_arrays(arrays_dir)
    if opened and cache != "never" and all(opened[1].get(key) == value for key, value in source.items()):
        return opened[0]
    if len(files.paths) * side**2 * 3 > room_for_pictures(cache):
        data = _read_lazily(files, side, unreadable, source, arrays_dir.with_name(f"{arrays_dir.name}.json"))
        if not len(data.label):
            raise UserError(f"{name} has no pictures")
        return data
    _, side_or_none = stored_size(files, side)
    pictures = read_pictures(files, side_or_none, unreadable)
    examples = ((picture, files.label[number]) for picture, number in pictures)
    try:
        write_arrays(arrays_dir, examples, files.class_names, None, source)
    except ValueError as error:
        raise UserError(f"{name} {error}") from None
    except OSError as error:
        raise _cannot_cache(error) from error
    opened = open_arrays(arrays_dir)
    assert opened, f"{arrays_dir} was just written"
    return opened[0]


def _read_lazily(files: LabelledFiles, side: int, unreadable: str, source: dict[str, Any], checked: Path) -> Dataset:
    """checked: a file that remembers which of these files are pictures, for which all have to be read once."""
    try:
        found = json.loads(checked.read_text())
    except (OSError, ValueError):
        found = {}
    if any(found.get(key) != value for key, value in source.items()):
        size, side_or_none = stored_size(files, side)
        numbers = [number for _, number in read_pictures(files, side_or_none, unreadable)]
        found = source | {"numbers": numbers, "size": size, "shrunk_to": side_or_none}
        partial = checked.with_suffix(f".partial-{os.getpid()}")
        try:
            checked.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(found))
            partial.replace(checked)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _cannot_cache(error) from error
    numbers = found["numbers"]
    height, width = found["size"]
    reader = ImageFiles([files.paths[i] for i in numbers], found["shrunk_to"])
    image = LazyImages(reader, len(numbers), height, width)
    return Dataset(image, np.array([files.label[i] for i in numbers], np.int32), files.class_names)


def _cannot_cache(error: OSError) -> UserError:
    return UserError(
        f"what was read of the pictures cannot be kept in {cache_dir()} ({error.strerror or error}): make room there, "
        "or name another folder by the environment variable JAXFT_CACHE; --config.data.cache=never needs next to none"
    )
