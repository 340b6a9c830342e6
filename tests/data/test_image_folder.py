"""Folders of images: splits, classes, the holdout, and errors for wrong folders."""

import io
import os
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from PIL import Image

from jaxft.data import datasets, image_file
from jaxft.data.dataset import DataOptions
from jaxft.data.identity import differences
from jaxft.errors import UserError
from jaxft.files import open_regular

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


@pytest.mark.parametrize("cache_images", ["auto", "never"])
def test_each_file_is_opened_once(root: Path, monkeypatch: pytest.MonkeyPatch, cache_images: str) -> None:
    opened: Counter[Path] = Counter()

    def counting(path: Path) -> IO[bytes]:
        opened[path] += 1
        return open_regular(path)

    monkeypatch.setattr(image_file, "open_regular", counting)
    train = load(root, "train", cache=cache_images)
    assert opened == dict.fromkeys(train.origin.files, 1)
    assert len(opened) == 6


def gradients(root: Path, sizes: list[tuple[int, int]]) -> list[Path]:
    """Writes one image of each size (width, height), divided into two classes."""
    paths = [root / "train" / "ab"[2 * i // len(sizes)] / f"{i:02}.png" for i in range(len(sizes))]
    for path, (width, height) in zip(paths, sizes, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.arange(3 * width * height).reshape(height, width, 3) % 251
        Image.fromarray(values.astype(np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("cache_images", ["auto", "never"])
@pytest.mark.parametrize("position", [0, 1, 9])
@pytest.mark.parametrize("size", [(12, 11), (40, 41), (40, 1)])
def test_one_image_of_another_size_makes_all_squares(
    tmp_path: Path, position: int, size: tuple[int, int], cache_images: str
) -> None:
    sizes = [(12, 10)] * 10
    sizes[position] = size
    paths = gradients(tmp_path / "mixed", sizes)
    train = load(tmp_path / "mixed", "train", side=20, cache=cache_images)
    expected = np.stack([image_file.decode(path, side=20) for path in paths])
    np.testing.assert_array_equal(train.image[np.arange(10)], expected)


@pytest.mark.parametrize("position", [0, 9])
@pytest.mark.parametrize("shape", [(10, 12, 3), (20, 20, 3)])
def test_a_damaged_image_counts_by_the_size_in_its_header(
    tmp_path: Path, position: int, shape: tuple[int, int, int]
) -> None:
    """A size of its own makes the others squares, as if it could be decoded."""
    sizes = [(12, 10)] * 10
    sizes[position] = (12, 10) if shape == (10, 12, 3) else (13, 10)
    path = gradients(tmp_path / "root", sizes)[position]
    buffer = io.BytesIO()
    Image.open(path).save(buffer, "JPEG")
    path.unlink()
    path.with_suffix(".jpg").write_bytes(buffer.getvalue()[:-30])
    with pytest.raises(UserError, match=rf"1 of 10 files cannot be used: .*{position:02}\.jpg"):
        load(tmp_path / "root", "train", side=20)
    assert load(tmp_path / "root", "train", side=20, unreadable="skip").image.shape == (9, *shape)


def test_the_cache_is_rebuilt_when_files_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(root, "train")
    with monkeypatch.context() as patch:
        patch.setattr("jaxft.data.image_folder.read_file", None)
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


def archive_inside(root: Path) -> None:
    root.mkdir()
    (root / "photos.zip").touch()


def empty_folder(root: Path) -> None:
    (root / "train" / "a").mkdir(parents=True)


@pytest.mark.parametrize(
    ("build", "split", "part"),
    [
        (lambda root: None, "train", "there is no folder"),
        (archive_inside, "train", "root/CLASS/*.jpg; it has 1 .zip"),
        (empty_folder, "train", "has no images in folders named by class"),
        (only("a.png"), "train", "has no images in folders named by class"),
        (only("train/a/1.png"), "train", "only one class, a"),
        (only("train/a/1.png", "val/a/1.png", "train/b/1.png"), "test", "no split 'test'; it has train, val"),
        (only("a/1.png", "b/1.png"), "test", "largest class has 1 image: add some, or set --config.data.holdout=0.5"),
        (only("train/a/1.png", "train/b/1.png", "val/c/1.png"), "val", "that the training images lack: c"),
    ],
)
def test_wrong_folders_are_explained(tmp_path: Path, build: Callable[[Path], None], split: str, part: str) -> None:
    build(tmp_path / "root")
    with pytest.raises(UserError) as error:
        load(tmp_path / "root", split, class_names=None if split == "train" else ("a", "b"))
    assert part in str(error.value)


def test_a_class_that_the_holdout_takes_whole_is_refused(tmp_path: Path) -> None:
    only("a/1.png", "b/1.png", "b/2.png", "b/3.png")(tmp_path / "root")
    with pytest.raises(UserError, match=r"a data\.holdout of 0\.6 leaves no image of a to train on"):
        load(tmp_path / "root", "train", holdout=0.6)


def names_of_bytes(root: Path) -> None:
    """Renames an image and a class to names that are not UTF-8."""
    (root / "train" / "röd" / "1.png").rename(root / "train" / "röd" / os.fsdecode(b"caf\xe9.png"))
    for split in ("train", "val"):
        (root / split / "blå").rename(root / split / os.fsdecode(b"bl\xe5"))


def test_names_that_are_not_utf8_are_read(root: Path) -> None:
    before = load(root, "train")
    names_of_bytes(root)
    train = load(root, "train")
    assert train.class_names == ("bl\udce5", "röd")
    np.testing.assert_array_equal(train.image, before.image)
    assert load(root, "val", train.class_names).label.tolist() == [0]
    assert load(root, "train", cache="never").label.tolist() == train.label.tolist()
    assert load(root, "train").class_names == train.class_names  # from the cache
    flat = load(root / "train", "train")
    assert flat.class_names == train.class_names


def test_classes_that_differ_only_in_normalisation_are_the_same(root: Path) -> None:
    for name in ("blå", "röd"):
        if (root / "val" / name).exists():
            (root / "val" / name).rename(root / "val" / unicodedata.normalize("NFD", name))
    train = load(root, "train")
    assert load(root, "val", train.class_names).label.tolist() == [0]
    save(root / "train" / unicodedata.normalize("NFD", "röd") / "0.png", RED)
    with pytest.raises(UserError, match="2 folders 'röd' whose names differ only in Unicode normalisation; merge them"):
        load(root, "train")


def test_a_class_of_other_case_is_named_with_its_sibling(root: Path) -> None:
    (root / "val" / "blå").rename(root / "val" / "Blå")
    with pytest.raises(UserError, match=r"training images lack: 'Blå' \(training has 'blå'\)"):
        load(root, "val", ("blå", "röd"))


def test_a_class_folder_without_a_readable_image_is_refused_or_reported(root: Path) -> None:
    for name in ("1.HEIC", "2.HEIC", "info.txt"):
        path = root / "train" / "iphone" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with pytest.raises(UserError, match=r"iphone \(2 \.heic \(no reader: pip install pillow-heif\), 1 \.txt\)"):
        load(root, "train")
    train = load(root, "train", unreadable="skip")
    assert train.class_names == ("blå", "röd")
    line = next(datasets.describe_origin(train, load(root, "val", train.class_names)))
    assert line.startswith("skipped: 2 .heic (no reader: pip install pillow-heif), 2 .txt, ")
    assert "class `iphone` has no images" in line


def test_a_class_of_which_no_image_can_be_decoded_is_refused(root: Path) -> None:
    for path in (root / "train" / "röd").glob("*.png"):
        path.write_text("no image")
    with pytest.raises(UserError, match="4 of 6 files cannot be used"):
        load(root, "train")
    with pytest.raises(UserError, match="no file of these classes can be read as an image: röd"):
        load(root, "train", unreadable="skip")


def test_unusual_images_are_counted(root: Path) -> None:
    noise = np.random.default_rng(0).random((6, 8))
    Image.fromarray((noise * 4000).astype(np.uint16)).save(root / "train" / "röd" / "12bit.png")
    Image.fromarray(noise.astype(np.float32)).save(root / "train" / "röd" / "float.tif")
    frames = [Image.fromarray((noise * scale).astype(np.uint8)) for scale in (100, 200)]
    frames[0].save(root / "train" / "röd" / "moving.gif", save_all=True, append_images=frames[1:])
    (root / "train" / "röd" / "broken.jpg").touch()
    for _ in range(2):  # decoded, then from the cache
        train = load(root, "train", unreadable="skip")
        assert list(datasets.describe_origin(train, load(root, "val", train.class_names))) == [
            "skipped: 1 .txt, 1 unreadable, folder .DS_Store",
            "scaled to 8 bits: 1 image (16-bit with values up to 4,095), 1 image (floats from 0 to 1)",
            "1 file with several frames or pages: only the first is used",
            "7 images have a single colour; check whether that is right",
        ]


def test_images_of_a_single_colour_are_not_said_to_be_trained_on_too(root: Path) -> None:
    train = load(root, "train")
    assert "also in the training set" not in datasets.describe(train, load(root, "val", train.class_names))


def test_the_skipped_files_of_a_folder_without_splits_are_counted_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(5):
            save(tmp_path / "flat" / name / f"{i}.png", (i, 0, 0))
    (tmp_path / "flat" / "a" / "notes.txt").touch()
    train, test = (load(tmp_path / "flat", split) for split in ("train", "test"))
    assert next(datasets.describe_origin(train, test)) == "skipped: 1 .txt"


def test_thin_images_of_one_size_become_squares(root: Path) -> None:
    for path in (root / "train").rglob("*.*"):
        if path.suffix.lower() in (".png", ".bmp"):
            save(path, RED, (400, 1))
    assert load(root, "train", side=4).image.shape == (6, 4, 4, 3)


def test_a_cached_class_that_was_removed_is_forgotten(root: Path) -> None:
    assert load(root, "val", ("blå", "grön", "röd")).class_names == ("blå", "grön", "röd")
    assert load(root, "val", ("blå", "röd")).class_names == ("blå", "röd")


def test_an_image_replaced_by_one_of_the_same_size_and_time_is_read_again(root: Path) -> None:
    path = root / "train" / "blå" / "1.bmp"
    stat = path.stat()
    first = load(root, "train")
    save(path, RED)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    again = load(root, "train")
    np.testing.assert_array_equal(again.image[0, 0, 0], RED)
    assert differences(first.identity(), again) == "blå has other images"


def test_the_identity_is_that_of_the_content(root: Path) -> None:
    first = load(root, "train").identity()
    moved = root.with_name("moved")
    shutil.copytree(root, moved)
    for options in ({}, {"cache": "never"}, {"side": 3}):
        assert load(moved, "train", **options).identity() == first
    (moved / "train" / "röd" / "0.png").rename(moved / "train" / "blå" / "9.png")
    assert differences(first, load(moved, "train")) == "blå has 3 images instead of 2, röd has 3 images instead of 4"


def test_a_linked_class_whose_disk_is_missing_is_refused(root: Path) -> None:
    (root / "train" / "grön").symlink_to("/nowhere/grön")
    with pytest.raises(UserError, match=r"train has links that lead nowhere: grön; mount their disk, or remove them"):
        load(root, "train")
    train = load(root, "train", unreadable="skip")
    assert train.class_names == ("blå", "röd")
    assert train.origin.skipped["linked to nothing"] == 1


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "loop", "~nobody-of-this-name/x"])
def test_paths_that_no_folder_can_have_are_reported(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    path = name if name.startswith("~") else f"{tmp_path}/{name}"
    with pytest.raises(UserError, match=r"cannot be read|there is no folder|no home folder"):
        datasets.load(f"folder:{path}", "train")


@pytest.mark.parametrize("split", ["", ".", "x" * 300, "a\0b"])
def test_names_that_no_split_can_have_are_reported(root: Path, split: str) -> None:
    with pytest.raises(UserError, match=r"cannot be the name of a split|has no split"):
        load(root, split, eval_split=split)
