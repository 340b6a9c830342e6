"""The cache of decoded images notices damage of any kind and reads the images again."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxft.data import array_cache, datasets
from jaxft.data.dataset import DataOptions

Damage = Callable[[Path], None]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "root" / "train" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (4, 6), (number, i, 0)).save(tmp_path / "root" / "train" / name / f"{i}.png")
    return tmp_path / "root"


def load(root: Path, cache: str = "auto") -> datasets.Dataset:
    return datasets.load(f"folder:{root}", "train", DataOptions(cache=cache))


def content(data: datasets.Dataset) -> tuple[list[int], list[int], tuple[str, ...]]:
    images = data.image[np.arange(len(data.label))]
    return images.ravel().tolist(), data.label.tolist(), data.class_names


def flip(name: str, position: int) -> Damage:
    def damage(folder: Path) -> None:
        """Flips a bit and restores the time, as damage on the disk would leave it."""
        path = folder / name
        stat, data = path.stat(), bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return damage


def rename_class(folder: Path) -> None:
    path = folder / "info.json"
    path.write_text(path.read_text().replace('"cat"', '"bat"'))


def replace(name: str, create: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        create(folder / name)

    return damage


KINDS: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "empty": Path.touch,
    "list": lambda path: path.write_text("[]"),
}
FILES = ("info.json", "label.npy", "image.bin")


@pytest.mark.parametrize(
    "damage",
    [
        flip("image.bin", 50),
        flip("label.npy", -4),
        flip("label.npy", 20),
        rename_class,
        lambda folder: os.truncate(folder / "image.bin", 100),
        *(replace(name, create) for name in FILES for create in KINDS.values()),
    ],
    ids=["pixel", "label", "header", "class", "cut", *(f"{name} {kind}" for name in FILES for kind in KINDS)],
)
def test_damage_is_noticed(root: Path, damage: Damage) -> None:
    first = load(root)
    before = content(first)
    damage(Path(str(first.image.filename)).parent)
    assert content(load(root)) == before


def test_damage_is_reported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip("image.bin", 3)(Path(str(load(root).image.filename)).parent)
    load(root)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the cached images in ") and line.endswith("are damaged and are read again")


@pytest.mark.parametrize("create", KINDS.values(), ids=KINDS)
def test_something_else_in_place_of_the_folder_is_replaced(root: Path, create: Callable[[Path], object]) -> None:
    first = load(root)
    before, folder = content(first), Path(str(first.image.filename)).parent
    shutil.rmtree(folder)
    create(folder)
    assert content(load(root)) == before


@pytest.mark.parametrize("create", KINDS.values(), ids=KINDS)
def test_the_list_of_images_that_stay_in_their_files_is_checked(root: Path, create: Callable[[Path], object]) -> None:
    before = content(load(root, "never"))
    (path,) = (root.parent / "cache" / "datasets").glob("*.json")
    path.write_text(path.read_text().replace("[0, 1, 2", "[0, 2, 1"))
    assert content(load(root, "never")) == before
    path.unlink()
    create(path)
    assert content(load(root, "never")) == before


def test_arrays_without_checksums_are_sealed_once(root: Path, tmp_path: Path) -> None:
    """As version 0.1 wrote them; those of a TFDS dataset whose files are gone could not be made again."""
    folder = tmp_path / "old"
    array_cache.write_arrays(folder, [(np.zeros((2, 2, 3), np.uint8), 0)], ["a"], None, {"source": "x"})
    info = json.loads((folder / "info.json").read_text())
    old = {key: info[key] for key in ("class_names", "picture_shape", "source")}
    (folder / "info.json").write_text(json.dumps(old))
    opened = array_cache.open_arrays(folder)
    assert opened and opened[1] == info == json.loads((folder / "info.json").read_text())
    flip("image.bin", 0)(folder)
    assert array_cache.open_arrays(folder) is None


def test_a_large_file_is_read_again_only_if_its_times_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_cache, "ALWAYS_CHECKED", 0)
    folder = Path(str(load(root).image.filename)).parent
    with monkeypatch.context() as patch:
        patch.setattr(array_cache, "_checksums", None)
        load(root)
    flip("image.bin", 50)(folder)
    assert array_cache.open_arrays(folder) is None


def test_checksums_cover_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_cache, "CHUNK", 10)
    data = np.arange(35, dtype=np.uint8).tobytes()
    (tmp_path / "x").write_bytes(data)
    before = array_cache._checksums(tmp_path / "x")
    assert len(before) == 4
    for i in range(35):
        (tmp_path / "x").write_bytes(data[:i] + b"\xff" + data[i + 1 :])
        assert sum(a != b for a, b in zip(before, array_cache._checksums(tmp_path / "x"), strict=True)) == 1
