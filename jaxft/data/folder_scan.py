"""Finds the images below a folder, and counts what is skipped there."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from jaxft.data.image_file import suffixes
from jaxft.errors import UserError, shortened
from jaxft.files import reason

SHOWN = 10  # kinds of skipped files in a message
_SYSTEM_FOLDERS = {"__macosx", "$recycle.bin", "system volume information", "lost+found"}
_HIDDEN = ".@#"  # first characters of folders that programs create: .ipynb_checkpoints, @eaDir, #recycle
_PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
HIDDEN_FILE, NO_SUFFIX, BROKEN_LINK = "hidden", "without a suffix", "linked to nothing"
WITHOUT_CLASS = "beside the class folders"


@dataclass
class Scan:
    """The images below a folder in the order of their names: files of a folder before those of its subfolders."""

    images: list[Path] = field(default_factory=list)
    per_subfolder: Counter[str] = field(default_factory=Counter)  # images by the first subfolder; "": directly inside
    skipped: Counter[str] = field(default_factory=Counter)  # files by suffix, and folders as "folder NAME"

    @property
    def has_other_files(self) -> bool:
        """Returns whether there are files that are neither images nor hidden."""
        return any(name != HIDDEN_FILE and not name.startswith("folder ") for name in self.skipped)


def scan(folder: Path) -> Scan:
    """Finds the images below a folder, at any depth, including dangling links with an image's suffix.

    Follows links, but reads each folder only once and never a parent of `folder`. Skips hidden folders and files.
    Raises UserError for a folder that cannot be read.
    """
    found = Scan()
    seen = {_identity(path) for path in (*folder.resolve().parents, *_real_folders(folder))}
    _scan(folder, "", found, seen, linked=False)
    return found


def subfolders(folder: Path) -> list[str]:
    """Returns the names of a folder's subfolders, except for hidden ones, sorted. Raises UserError."""
    return sorted(entry.name for entry in _entries(folder) if _is_folder(entry) and not is_hidden(entry.name))


def broken_links(folder: Path) -> list[str]:
    """Returns the names of links in a folder that lead nowhere, except for those with an image's suffix."""
    found = [entry.name for entry in _entries(folder) if entry.is_symlink() and _kind(entry) == BROKEN_LINK]
    return sorted(name for name in found if not _is_image(name))


def exists(path: Path) -> bool:
    """Returns whether a path exists. An invalid path, and one without permission, count as missing."""
    with suppress(OSError, ValueError):
        return path.exists()
    return False


def has_images(folder: Path) -> bool:
    """Returns whether a folder holds an image at any depth; stops at the first. Links to folders are not followed."""
    return any(_is_image(name) for real in _real_folders(folder) for name in _file_names(real))


def has_images_directly(folder: Path) -> bool:
    return any(_is_image(name) for name in _file_names(folder))


def count_strays(folder: Path) -> Counter[str]:
    """Counts what a folder holds besides class folders: hidden folders, images without a class, other files."""
    found: Counter[str] = Counter()
    for entry in _entries(folder):
        if _is_folder(entry):
            found.update([f"folder {entry.name}"] if is_hidden(entry.name) else [])
        elif _is_image(entry.name):
            found[WITHOUT_CLASS] += 1
        else:
            found[HIDDEN_FILE if entry.name.startswith(".") else _kind(entry)] += 1
    return found


def is_hidden(folder_name: str) -> bool:
    return folder_name[0] in _HIDDEN or folder_name.lower() in _SYSTEM_FOLDERS


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """Returns '120 .heic (no reader: pip install pillow-heif), 3 .txt, folder @eaDir', the most frequent first.

    Files come before folders.
    """
    texts = []
    folders = {name for name in skipped if name.startswith(("folder ", "class "))}
    for name, count in sorted(skipped.items(), key=lambda item: (item[0] in folders, -item[1])):
        if name in folders:
            texts.append(name if count == 1 else f"{count:,} {name.replace('folder', 'folders', 1)}")
        else:
            plugin = _PLUGINS.get(name)
            texts.append(f"{count:,} {name}" + (f" (no reader: pip install {plugin})" if plugin else ""))
    return shortened(texts, SHOWN)


def _scan(folder: Path, top: str, found: Scan, seen: set[tuple[int, int]], *, linked: bool) -> None:
    """Adds the images and skipped files below `folder` to `found`.

    top: its first parent below the scanned folder. linked: whether it was reached by a link.
    """
    entries = sorted(_entries(folder), key=lambda entry: entry.name)
    folders = []
    for entry in entries:
        name = entry.name
        if _is_folder(entry):
            folders.append(entry)
        elif name.startswith("."):
            found.skipped[HIDDEN_FILE] += 1
        elif _is_image(name):  # also a FIFO or a dangling link, which decoding reports
            found.images.append(folder / name)
            found.per_subfolder[top] += 1
        else:
            found.skipped[_kind(entry)] += 1
    for entry in folders:
        if is_hidden(entry.name):
            found.skipped[f"folder {entry.name}"] += 1
            continue
        by_link = linked or entry.is_symlink()
        if by_link:
            identity = _identity(Path(entry.path))
            if identity in seen:
                continue
            seen.add(identity)
        _scan(Path(entry.path), top or entry.name, found, seen, linked=by_link)


def _real_folders(folder: Path) -> Iterator[Path]:
    """Yields a folder and all folders below it that are neither hidden nor links."""
    yield folder
    for entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False) and not is_hidden(entry.name):
            yield from _real_folders(Path(entry.path))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be read ({reason(error)}); change its permissions, or move it elsewhere"
        ) from None


def _identity(folder: Path) -> tuple[int, int]:
    try:
        stat = folder.stat()
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read ({reason(error)})") from None
    return stat.st_dev, stat.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _file_names(folder: Path) -> Iterator[str]:
    return (entry.name for entry in _entries(folder) if not _is_folder(entry))


def _is_image(name: str) -> bool:
    stem, _, suffix = name.rpartition(".")
    return f".{suffix.lower()}" in suffixes() and stem != "" and not name.startswith(".")


def _kind(entry: os.DirEntry[str]) -> str:
    """Returns a skipped file's suffix, or another description for `Scan.skipped`."""
    try:
        entry.stat()
    except OSError:
        return BROKEN_LINK
    return Path(entry.name).suffix.lower() or NO_SUFFIX
