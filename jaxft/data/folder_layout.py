"""Decides whether a folder holds SPLIT/CLASS/** or CLASS/**, and refuses classes that look like splits."""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxft.data.dataset import DataOptions
from jaxft.data.folder_scan import Scan, broken_links, has_images, has_images_directly, subfolders
from jaxft.errors import UserError, shortened
from jaxft.files import is_folder

_TRAINING = {"train", "training", "trainset", "trn"}
_TESTING = {"test", "testing", "testset", "tst"}
_VALIDATION = {"val", "valid", "validation", "valset", "dev", "eval", "evaluation"}
_OVERRIDE = "--config.data.layout=classes"


def split_folder(root: Path, split: str, options: DataOptions) -> Path | None:
    """Returns the folder of a split, or None if `root` holds the classes themselves.

    A folder is a split if it has the split's name and its images are in subfolders. Raises UserError if the other
    split has a folder but this one has none, with the setting that names one.
    """
    if not split.strip("./ "):
        raise UserError(
            f"'{split}' cannot be the name of a split; set --config.data.train_split and --config.data.eval_split"
        )
    if options.layout == "classes":
        return None
    known = dict.fromkeys(("train", options.train_split, options.eval_split, split))
    if options.layout == "auto" and not any(_is_split(root / name) for name in known):
        return None
    if is_folder(root / split):
        return root / split
    if split in broken_links(root):
        raise UserError(f"the split '{split}' of {root} is a link that leads nowhere; mount its disk, or remove it")
    raise UserError(_missing_split(root, split, options))


def _is_split(folder: Path) -> bool:
    return is_folder(folder) and (_has_class_folders(folder) or not has_images_directly(folder))


def _has_class_folders(folder: Path) -> bool:
    return any(has_images(folder / name) for name in subfolders(folder))


def _missing_split(root: Path, split: str, options: DataOptions) -> str:
    existing = subfolders(root)
    text = f"{root} has no split '{split}'; it has {shortened(existing, 10)}"
    if split == options.train_split:
        others = [name for name in existing if name != options.eval_split and _has_class_folders(root / name)]
        if others := _first_by_name(others, _TRAINING):
            return f"{text}; set {_setting('train', others[0])}"
        return f"{text}; put the images to train on into {root}/{split}/CLASS/, or set {_OVERRIDE}"
    others = [name for name in existing if name != options.train_split and _has_class_folders(root / name)]
    if others := _first_by_name(others, *_test_names(split)):
        return f"{text}; set {_setting('eval', others[0])}"
    return text + holdout_hint(root, options)


def holdout_hint(root: Path, options: DataOptions) -> str:
    """Returns what to set to test on a part of the training split."""
    whole = shlex.quote(f"folder:{root / options.train_split}")
    return f"; to hold out a part of '{options.train_split}', set --config.data.name={whole}"


def _first_by_name(names: Iterable[str], *groups: set[str]) -> list[str]:
    """Sorts names by the first group that holds one of their words."""
    return sorted(names, key=lambda name: [not _words(name) & words for words in groups])


def _test_names(eval_split: str) -> tuple[set[str], set[str]]:
    """Returns the names of test and validation splits, those of the kind of `eval_split` first."""
    return (_VALIDATION, _TESTING) if eval_split.lower() in _VALIDATION else (_TESTING, _VALIDATION)


def check_classes(root: Path, found: Mapping[str, Scan], options: DataOptions) -> None:
    """Raises UserError if the folders that are taken for classes look like splits, unless the layout was set."""
    if options.layout != "auto":
        return
    names = [name for name, scan in found.items() if scan.images]
    whole = {name for name in names if found[name].per_subfolder[""] == len(found[name].images)}
    training, testing = _roles({name: name in whole for name in names}, options.eval_split)
    if training and testing and {training, testing} <= whole:
        raise UserError(
            f"{training} and {testing} in {root} are named like splits, with images directly inside: put these into "
            f"{training}/CLASS/ and {testing}/CLASS/, or set {_OVERRIDE}"
        )
    if training and testing:
        raise UserError(
            f"{training} and {testing} in {root} are named like splits: set {_setting('train', training)} "
            f"{_setting('eval', testing)}, or {_OVERRIDE}"
        )
    common = _common_subfolders([found[name] for name in names])
    if any(_words(name) & (_TRAINING | _TESTING | _VALIDATION) for name in common):
        raise UserError(
            f"the classes in {root} have the same subfolders ({shortened(common)}), named like splits: move the images "
            f"to {common[0]}/CLASS/ and so on, or use all with {_OVERRIDE}"
        )
    if common:
        # A training set is the largest, or called imagesTr.
        names.sort(key=lambda name: (not _words(name) & {*_TRAINING, "tr"}, -len(found[name].images)))
        raise UserError(
            f"{shortened(names)} in {root} have the same subfolders ({shortened(common)}): if they are splits, set "
            f"{_setting('train', names[0])} {_setting('eval', names[1])}, if classes {_OVERRIDE}"
        )


def _roles(exact: Mapping[str, bool], eval_split: str) -> tuple[str, str]:
    """Returns the names of the folders that are named like a training and a test split, or ''.

    exact: {name: whether the whole name must be a split's, because the folder's images are directly inside}. Otherwise
    one word of the name suffices, as in seg_train.
    """

    def first(*groups: set[str]) -> str:
        for words in groups:
            for name, is_exact in exact.items():
                if name.lower() in words or (not is_exact and _words(name) & words):
                    return name
        return ""

    return first(_TRAINING), first(*_test_names(eval_split))


def _words(name: str) -> set[str]:
    """Returns the words of a name in lower case: {'seg', 'train'} for 'seg_train2' and 'segTrain'."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}


def _common_subfolders(scans: Iterable[Scan]) -> list[str]:
    """Returns the names of two or more subfolders that most scanned folders share and that hold most of their images.

    A single shared subfolder, such as CLASS/images, is not a sign of splits; then the result is empty.
    """
    scans = list(scans)
    counts = Counter(name for scan in scans for name in scan.per_subfolder if name)
    common = sorted(name for name, count in counts.items() if count > 1 and count > len(scans) / 2)
    inside = [sum(scan.per_subfolder[name] for name in common) > len(scan.images) / 2 for scan in scans]
    return common if len(common) > 1 and sum(inside) > len(scans) / 2 else []


def deeper_hint(root: Path, name: str, split: str | None, options: DataOptions) -> str:
    """Returns a hint if the only folder found, `root`/`name`, holds the classes or splits instead of a class, or ''.

    split: the name of the split whose folder is `root`, or None.
    """
    folder = root / name
    for _ in range(5):  # folders that hold a single one; links could go round for ever
        inner = [other for other in subfolders(folder) if has_images(folder / other)]
        if len(inner) != 1 or has_images_directly(folder):
            break
        folder /= inner[0]
    if len(inner) < 2:
        return "" if split is None or options.layout != "auto" else f"; if '{split}' is a class itself, set {_OVERRIDE}"
    if split is not None:
        setting = _setting("train" if split == options.train_split else "eval", f"{split}/{folder.relative_to(root)}")
        return f"; if the classes are {shortened(inner)}, set {setting}"
    return (
        f"; if the classes or splits are {shortened(inner)}, set --config.data.name={shlex.quote(f'folder:{folder}')}"
    )


def _setting(kind: str, split: str) -> str:
    return f"--config.data.{kind}_split={shlex.quote(split)}"
