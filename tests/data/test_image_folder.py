"""Folders of images: splits, classes, the holdout, and errors for wrong folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxft.data import datasets
from jaxft.data.dataset import DataOptions
from jaxft.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Writes two classes: 4 + 2 images to train, some in nested folders, and 1 to test."""
    root = tmp_path / "my pictures é"
    for i in range(4):
        save(root / "train" / "röd" / f"{i}.png", RED)
    save(root / "train" / "blå" / "deep" / "er" / "0.PNG", BLUE)
    save(root / "train" / "blå" / "1.bmp", BLUE)
    save(root / "val" / "blå" / "1.png", BLUE)
    (root / "train" / "röd" / "notes.txt").write_text("not a picture, and not named as one")
    (root / "train" / ".DS_Store").mkdir()
    return root


def load(root: Path, split: str, class_names: tuple[str, ...] | None = None, **options: Any) -> datasets.Dataset:
    return datasets.load(f"folder:{root}", split, DataOptions(**options), class_names)


def test_folders_name_the_splits_and_classes(root: Path) -> None:
    train = load(root, "train")
    assert train.class_names == ("blå", "röd")
    assert train.image.shape == (6, 6, 8, 3)
    np.testing.assert_array_equal(train.image[:, 0, 0], [BLUE] * 2 + [RED] * 4)
    np.testing.assert_array_equal(train.label, [0, 0, 1, 1, 1, 1])


def test_a_class_may_be_missing_in_the_test_split(root: Path) -> None:
    val = load(root, "val", class_names=("aqua", "blå", "röd"))
    np.testing.assert_array_equal(val.label, [1])
    assert val.class_names == ("aqua", "blå", "röd")


def test_images_of_different_sizes_become_squares(root: Path) -> None:
    save(root / "train" / "röd" / "wide.png", RED, (400, 200))
    assert load(root, "train", side=5).image.shape == (7, 5, 5, 3)


def test_large_images_of_one_size_become_squares_too(root: Path) -> None:
    assert load(root, "train", side=4).image.shape == (6, 4, 4, 3)


def test_the_cache_is_rebuilt_when_files_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(root, "train")
    with monkeypatch.context() as patch:
        patch.setattr("jaxft.data.image_folder.decode", None)
        load(root, "train")  # from the cache
    save(root / "train" / "röd" / "0.png", BLUE)
    np.testing.assert_array_equal(load(root, "train").image[2, 0, 0], BLUE)
    (root / "train" / "röd" / "0.png").unlink()
    assert len(load(root, "train").label) == 5


def colours_and_labels(data: datasets.Dataset) -> set[tuple[int, int]]:
    return {(int(image[0, 0, 0]), int(label)) for image, label in zip(data.image, data.label, strict=True)}


def test_without_split_folders_a_fraction_of_each_class_is_held_out(tmp_path: Path) -> None:
    root = tmp_path / "flat"
    for name, count in (("a", 20), ("b", 10), ("c", 1)):
        for i in range(count):
            save(root / name / f"{i}.png", (i, 0, 0))
    train, test = (load(root, split, holdout=0.3) for split in ("train", "test"))
    np.testing.assert_array_equal(np.bincount(train.label), [14, 7, 1])
    np.testing.assert_array_equal(np.bincount(test.label), [6, 3])
    shown = [colours_and_labels(data) for data in (train, test)]
    assert len(shown[0] | shown[1]) == 31
    assert not shown[0] & shown[1]
    save(root / "a" / "another.png", (99, 0, 0))
    again = load(root, "test", holdout=0.3)
    stay = colours_and_labels(again) & shown[1]
    assert len(stay) >= 8  # one more image moves at most one other


def break_text(root: Path) -> None:
    (root / "train" / "blå" / "text.jpg").write_text("hello")


def break_link(root: Path) -> None:
    (root / "train" / "blå" / "link.jpg").symlink_to("nowhere")


def break_empty(root: Path) -> None:
    (root / "train" / "blå" / "empty.png").touch()


@pytest.mark.parametrize("damage", [break_text, break_link, break_empty])
def test_unreadable_files_are_refused_or_listed_and_skipped(
    root: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    damage(root)
    with pytest.raises(UserError, match=r"1 of 7 files cannot be used: .*train/blå/(text|link|empty)\.(jpg|png)"):
        load(root, "train")
    assert not list(cache.glob("datasets/*"))
    assert len(load(root, "train", unreadable="skip").label) == 6
    assert "skipped: " in capsys.readouterr().err


def only(*names: str) -> Callable[[Path], None]:
    def build(root: Path) -> None:
        for name in names:
            save(root / name, RED)

    return build


def empty_folder(root: Path) -> None:
    (root / "train" / "a").mkdir(parents=True)


@pytest.mark.parametrize(
    ("build", "split", "part"),
    [
        (lambda root: None, "train", "there is no folder"),
        (empty_folder, "train", "has no images in folders named by class"),
        (only("a.png"), "train", "has no images in folders named by class"),
        (only("train/a/1.png"), "train", "only one class, a"),
        (only("train/a/1.png", "val/a/1.png", "train/b/1.png"), "test", "no split 'test'; it has train, val"),
        (only("a/1.png", "b/1.png"), "test", "a data.holdout of 0.2 leaves no image"),
        (only("train/a/1.png", "train/b/1.png", "val/c/1.png"), "val", "that the training images lack: c"),
    ],
)
def test_wrong_folders_are_explained(tmp_path: Path, build: Callable[[Path], None], split: str, part: str) -> None:
    build(tmp_path / "root")
    with pytest.raises(UserError) as error:
        load(tmp_path / "root", split, class_names=None if split == "train" else ("a", "b"))
    assert part in str(error.value)
