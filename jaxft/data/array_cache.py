"""A cache of labelled images: uint8 arrays in a folder, written once, checked when opened and memory-mapped."""

import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxft import interrupts
from jaxft.data.dataset import Dataset
from jaxft.data.image_file import shrink
from jaxft.errors import UserError, write_message
from jaxft.files import (
    atomic_directory,
    atomic_write,
    cache_dir,
    matches_checksum,
    open_regular,
    read_json,
    read_regular,
    with_checksum,
)

CHUNK = 1 << 24  # bytes with a checksum of their own, so that several threads share the work
# NOTES: Checksums of cached images (docs/notes/input-and-startup.md)
ALWAYS_CHECKED = 1 << 30  # bytes up to which images are checked whenever they are opened


def cached_arrays_dir(name: str, split: str, *more: str, interpolation: str = "bilinear") -> Path:
    """Returns the cache folder of a split. more: everything else that its content depends on."""
    if interpolation != "bilinear":  # bilinear caches keep the name that they had when there was no other filter
        more = (*more, interpolation)
    key = hashlib.sha256(json.dumps([name, split, *more]).encode()).hexdigest()[:16]
    return cache_dir() / "datasets" / f"{re.sub(r'[^a-z0-9_.]+', '_', name[-50:].lower())}-{key}"


def open_arrays(arrays_dir: Path) -> tuple[Dataset, dict[str, Any]] | None:
    """Returns the memory-mapped dataset and its info.json, which includes the `source` given.

    None if they are incomplete or do not match their checksums, which is reported on stderr. Arrays of version 0.1,
    which have no checksums, get them now.
    """
    image_file = arrays_dir / "image.bin"
    try:
        info = read_json(arrays_dir / "info.json")
        labels = read_regular(arrays_dir / "label.npy")
        label = np.load(io.BytesIO(labels))
        shape = (len(label), *info["picture_shape"])
        if image_file.stat().st_size != np.prod(shape, dtype=np.int64):
            return None
        if "crc32" not in info:
            info = _add_checksums(arrays_dir, info, labels, _checksums(image_file))
        elif not (
            matches_checksum(info) and info["label_crc32"] == zlib.crc32(labels) and _is_intact(image_file, info)
        ):
            write_message(f"the cached images in {arrays_dir} are damaged and are read again")
            return None
        image = np.memmap(image_file, np.uint8, "r", shape=shape)
        return Dataset(image, label, tuple(info["class_names"])), info
    except Exception:  # NumPy raises exceptions of any type for damaged files
        return None


def write_arrays(
    arrays_dir: Path,
    examples: Iterable[tuple[np.ndarray, int]],
    class_names: Iterable[str],
    side: int | None,
    source: dict[str, Any],
    interpolation: str = "bilinear",
) -> None:
    """Writes (image, label) pairs into a folder, atomically.

    Images are uint8 (H, W, 1 or 3). They are shrunk to squares of `side` pixels, or must all have one size if it is
    None. source: describes where they come from, for open_arrays; read after the last example. Raises ValueError if
    there are no images, or if one has another size or dtype.
    """
    labels = []
    shape: tuple[int, ...] | None = None
    if arrays_dir.is_symlink() or (arrays_dir.exists() and not arrays_dir.is_dir()):
        arrays_dir.unlink()  # not a folder, which could not be replaced
    with atomic_directory(arrays_dir) as partial_dir:
        with (partial_dir / "image.bin").open("wb") as file:
            writer = _ChecksumWriter(file)
            for image, label in examples:
                image = as_stored(image, side, interpolation)
                shape = shape or image.shape
                if image.shape != shape:
                    raise ValueError(f"has images of {shape} and of {image.shape}, although it declares one size")
                writer.write(np.ascontiguousarray(image).data.cast("B"))
                labels.append(label)
        if not labels:
            raise ValueError("has no images")
        np.save(partial_dir / "label.npy", np.array(labels, np.int32))
        info = {"class_names": list(class_names), "picture_shape": shape} | source
        _add_checksums(partial_dir, info, (partial_dir / "label.npy").read_bytes(), writer.checksums())


def open_written(arrays_dir: Path) -> Dataset:
    """Opens arrays that were written just now. Raises UserError if something else keeps their place."""
    opened = open_arrays(arrays_dir)
    if opened is None:
        raise UserError(f"{arrays_dir} cannot be replaced; remove it, or name another cache folder with JAXFT_CACHE")
    return opened[0]


class _ChecksumWriter:
    """Writes a file and computes the CRC-32 of each CHUNK meanwhile, so that it need not be read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._complete: list[int] = []
        self._crc, self._filled = 0, 0  # of the last chunk

    def write(self, data: memoryview) -> None:
        while data:
            part = data[: CHUNK - self._filled]
            self._file.write(part)
            self._crc, self._filled = zlib.crc32(part, self._crc), self._filled + len(part)
            if self._filled == CHUNK:
                self._complete.append(self._crc)
                self._crc, self._filled = 0, 0
            data = data[len(part) :]

    def checksums(self) -> list[int]:
        return [*self._complete, self._crc] if self._filled else self._complete


def _add_checksums(arrays_dir: Path, info: dict[str, Any], labels: bytes, images: list[int]) -> dict[str, Any]:
    """Writes info.json with checksums of the images, the labels and of itself."""
    info = with_checksum(info | {"image_crc32": images, "label_crc32": zlib.crc32(labels)})
    with suppress(PermissionError), atomic_write(arrays_dir / "info.json", "w") as file:  # a cache shared read-only
        json.dump(info, file)
    _remember_check(arrays_dir / "image.bin")
    return info


def _checksums(path: Path) -> list[int]:
    """Returns the CRC-32 of each CHUNK of a file, read by several threads. Raises OSError."""
    with open_regular(path) as file, ThreadPoolExecutor(os.cpu_count()) as pool, ExitStack() as stack:
        size = os.fstat(file.fileno()).st_size
        found = pool.map(lambda at: zlib.crc32(os.pread(file.fileno(), CHUNK, at)), range(0, size, CHUNK))
        if size <= ALWAYS_CHECKED:
            return list(found)
        from jaxft.progress import Progress  # imports JAX, which the process that reads TFDS does not need

        progress = stack.enter_context(Progress("checking the cached images", size >> 20, unit="MB", log_after=5))
        checksums = []
        for checksum in found:
            interrupts.check()
            checksums.append(checksum)
            progress.update(CHUNK >> 20)
        return checksums


def _is_intact(image_file: Path, info: dict[str, Any]) -> bool:
    """Returns whether the images match their checksums.

    Large files that are unchanged since they were last checked, as their times say, are not read again.
    """
    stamp = _stamp(image_file)
    if stamp["size"] > ALWAYS_CHECKED:
        with suppress(OSError, ValueError):
            if read_json(_check_file(image_file)) == stamp:
                return True
    if _checksums(image_file) != info["image_crc32"]:
        return False
    _remember_check(image_file)
    return True


def _stamp(image_file: Path) -> dict[str, int]:
    stat = image_file.stat()
    return {"size": stat.st_size, "mtime": stat.st_mtime_ns, "ctime": stat.st_ctime_ns, "inode": stat.st_ino}


def _check_file(image_file: Path) -> Path:
    return image_file.with_name("checked.json")


def _remember_check(image_file: Path) -> None:
    if _stamp(image_file)["size"] > ALWAYS_CHECKED:
        with suppress(OSError), atomic_write(_check_file(image_file), "w") as file:
            json.dump(_stamp(image_file), file)


def as_stored(image: np.ndarray, side: int | None, interpolation: str = "bilinear") -> np.ndarray:
    """Converts an image (H, W, 1 or 3) to uint8 (H, W, 3), shrunk to a square of `side` pixels unless that is None.

    Raises ValueError for another dtype or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"has an image that is {image.dtype} of shape {image.shape}; expected uint8, 1 or 3 channels")
    if image.shape[2] == 1:
        image = np.broadcast_to(image, (*image.shape[:2], 3))
    return image if side is None else shrink(np.ascontiguousarray(image), side, interpolation)
