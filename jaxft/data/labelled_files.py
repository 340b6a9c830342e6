"""Finds the images of a folder with one subfolder per class, and the label of each, without opening them."""

import hashlib
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jaxft.data.dataset import DataOptions
from jaxft.data.folder_layout import check_classes, deeper_hint, holdout_hint, split_folder
from jaxft.data.folder_scan import (
    Scan,
    broken_links,
    count_strays,
    describe_skipped,
    has_images_directly,
    scan,
    subfolders,
)
from jaxft.errors import UserError, counted, printable, shortened, write_message
from jaxft.files import reason

SHOWN = 10  # names in a message


class LabelledFiles(NamedTuple):
    paths: list[Path]
    label: list[int]
    class_names: tuple[str, ...]
    layout: str  # "splits", "classes", or "table"
    skipped: dict[str, int]  # numbers of skipped files and folders by their description

    def fingerprint(self) -> str:
        """Returns a hash of the classes and of the files' names, labels, sizes and times."""
        digest = hashlib.sha256("\0".join(self.class_names).encode(errors="surrogateescape"))
        for path, label in zip(self.paths, self.label, strict=True):
            try:
                found = path.stat()
                state = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
            except OSError as error:  # a dangling link, which decoding reports
                state = reason(error)
            digest.update(os.fsencode(path) + f"\0{label}\0{state}\n".encode())
        return digest.hexdigest()


def find_files(
    root: Path, split: str, options: DataOptions, class_names: tuple[str, ...] | None = None
) -> LabelledFiles:
    """Returns the image files of a split: those of ROOT/SPLIT/CLASS/**, or a part of ROOT/CLASS/**.

    In the second case any split but the training split is the held-out part: of each class the fraction
    `options.holdout`, chosen by a hash of the files' names. class_names: None takes the names of the folders that hold
    images; otherwise a class may have no images here, but no other class may have any. Names that differ only in
    Unicode normalisation are the same. Raises UserError.
    """
    _check_root(root)
    own_folder = split_folder(root, split, options)
    top = own_folder or root
    scans = {name: scan(top / name) for name in subfolders(top)}
    if own_folder is None:
        check_classes(root, scans, options)
    skipped = sum((found.skipped for found in scans.values()), count_strays(top))
    without = {name: found for name, found in scans.items() if not found.images}
    if options.unreadable == "refuse":
        if lost := broken_links(top):
            raise UserError(f"{top} has links that lead nowhere: {shortened(lost)}; mount their disk, or remove them")
        _check_other_files(top, without)
    skipped += Counter({f"class `{name}` has no images": 1 for name in without if class_names is None})
    images = {name: found.images for name, found in scans.items() if found.images}
    if not images:
        inside = "; those directly inside have no class" if has_images_directly(top) else ""
        if not inside and skipped:
            inside = f"; it has {describe_skipped(skipped)}"
        if own_folder is not None and split != options.train_split:
            inside += holdout_hint(root, options)
        raise UserError(f"{top} has no images in folders named by class: {top}/CLASS/*.jpg{inside}")
    images = _named_as(class_names, images, top)
    class_names = class_names or tuple(images)
    _check_unknown(images, class_names, top)
    if len(class_names) < 2:
        hint = deeper_hint(top, class_names[0], None if own_folder is None else split, options)
        raise UserError(f"{top} has images of only one class, {class_names[0]}; there must be two or more{hint}")
    if own_folder is None:
        images = _hold_out(root, images, split, options)
    pairs = [(path, label) for label, name in enumerate(class_names) for path in images.get(name, [])]
    layout = "classes" if own_folder is None else "splits"
    return LabelledFiles([path for path, _ in pairs], [label for _, label in pairs], class_names, layout, skipped)


def _check_root(root: Path) -> None:
    shown = root.relative_to(Path.cwd()) if root.is_relative_to(Path.cwd()) else root
    try:
        is_directory = stat.S_ISDIR(root.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no folder {shown}; data.name is folder:PATH, with PATH/train/CLASS/*.jpg") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL
        raise UserError(f"the folder {shown} cannot be read ({reason(error)}); data.name is folder:PATH") from None
    if not is_directory:
        raise UserError(f"{shown} is a file; unpack it and name the folder: --config.data.name=folder:PATH")


def _check_other_files(top: Path, without_images: Mapping[str, Scan]) -> None:
    """Raises UserError for class folders that hold files but no images."""
    texts = [
        f"{name} ({describe_skipped(found.skipped)})" for name, found in without_images.items() if found.has_other_files
    ]
    if texts:
        raise UserError(
            f"class folders of {top} hold files but no image that can be read: {shortened(texts)}; convert the files, "
            "move the folders elsewhere, or skip them with --config.data.unreadable=skip"
        )


def _named_as(class_names: tuple[str, ...] | None, images: dict[str, list[Path]], top: Path) -> dict[str, list[Path]]:
    """Renames classes to those of `class_names` that differ only in Unicode normalisation.

    Raises UserError if two folders do.
    """

    def normal(name: str) -> str:
        return unicodedata.normalize("NFC", name)

    for name, count in Counter(map(normal, images)).items():
        if count > 1:
            raise UserError(
                f"{top} has {count} folders '{name}' whose names differ only in Unicode normalisation; merge them"
            )
    wanted = {normal(name): name for name in class_names or ()}
    return {wanted.get(normal(name), name): paths for name, paths in images.items()}


def _check_unknown(images: Mapping[str, list[Path]], class_names: tuple[str, ...], top: Path) -> None:
    """Raises UserError if there are images of classes that are not in `class_names`."""
    if unknown := [name for name in images if name not in class_names]:
        similar = {name.casefold().strip(): name for name in class_names}
        texts = [
            f"'{name}' (training has '{similar[key]}')" if (key := name.casefold().strip()) in similar else name
            for name in unknown
        ]
        raise UserError(f"{top} has classes that the training images lack: {shortened(texts, SHOWN)}")


def _hold_out(root: Path, images: Mapping[str, list[Path]], split: str, options: DataOptions) -> dict[str, list[Path]]:
    """Returns each class's part of a split of a folder without splits. Raises UserError if a part is empty."""
    is_training, largest = split == options.train_split, max(map(len, images.values()))
    parts = {name: _part(root, paths, options.holdout, is_training) for name, paths in images.items()}
    if empty := [name for name, part in parts.items() if not part] if is_training else []:
        raise UserError(
            f"a data.holdout of {options.holdout} leaves no image of {shortened(empty)} to train on; add some, or "
            "set a smaller --config.data.holdout"
        )
    if not any(parts.values()):
        raise UserError(
            f"a data.holdout of {options.holdout} leaves no image of {root} for the split '{split}'; "
            f"its largest class has {counted(largest, 'image')}: add some, or set --config.data.holdout=0.5"
        )
    return parts


def _part(root: Path, paths: list[Path], holdout: float, is_training: bool) -> list[Path]:
    """Returns the training or the held-out part of a class.

    It is chosen by hashes of names, so that most images stay in their part when others are added or removed.
    """

    def by_name(path: Path) -> bytes:
        return hashlib.sha256(os.fsencode(path.relative_to(root))).digest()

    held_out = set(sorted(paths, key=by_name)[: round(len(paths) * holdout)])
    return [path for path in paths if (path in held_out) != is_training]


def image_paths(folder: Path) -> list[Path]:
    """Returns the images below a folder that is not divided into classes. Raises UserError if there are none."""
    found = scan(folder)
    skipped = describe_skipped(found.skipped)
    if not found.images:
        raise UserError(f"there are no images in {folder}" + (f"; skipped: {skipped}" if skipped else ""))
    if skipped:
        write_message(printable(f"skipped in {folder}: {skipped}"))
    return found.images
