"""Folders of images whose subfolders may be splits or classes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jaxft.data import datasets
from jaxft.data.dataset import DataOptions
from jaxft.errors import MESSAGE_LENGTH, UserError


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "root"


def write(root: Path, folders: Iterable[str]) -> None:
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(5):
            Image.new("RGB", (4, 4), (number, i, 0)).save(root / folder / f"{i}.png")


def below(splits: str, classes: str = "cat dog") -> list[str]:
    return [f"{split}/{name}" for split in splits.split() for name in classes.split()]


def load(root: Path, **options: Any) -> tuple[datasets.Dataset, datasets.Dataset]:
    chosen = DataOptions(**options)
    train = datasets.load(f"folder:{root}", chosen.train_split, chosen)
    return train, datasets.load(f"folder:{root}", chosen.eval_split, chosen, train.class_names)


OVERRIDE = "--config.data.layout=classes"


def named(train: str, test: str) -> str:
    return f"set --config.data.train_split={train} --config.data.eval_split={test}, or {OVERRIDE}"


@pytest.mark.parametrize(
    ("folders", "eval_split", "part"),
    [
        (below("Training Testing"), "test", named("Training", "Testing")),
        (below("TRAIN VAL"), "val", named("TRAIN", "VAL")),
        (below("Train Val Test"), "test", named("Train", "Test")),
        (below("Train Val Test"), "val", named("Train", "Val")),
        (below("training_set test_set"), "test", named("training_set", "test_set")),
        (below("seg_train/seg_train seg_test/seg_test"), "test", named("seg_train", "seg_test")),
        (["My Train/a", "My Train/b", "My Test/a"], "test", named("'My Train'", "'My Test'")),
        (["train", "test"], "test", f"put these into train/CLASS/ and test/CLASS/, or set {OVERRIDE}"),
        (below("fold1 fold2 fold3"), "test", "have the same subfolders (cat, dog): if they are splits, set "),
        ([*below("a b c d"), "e"], "test", f"--config.data.eval_split=b, if classes {OVERRIDE}"),
        (below("cat dog", "train test"), "test", "(test, train), named like splits: move the images to test/CLASS/"),
        (below("training test"), "test", "it has test, training; set --config.data.train_split=training"),
        (below("train valid"), "test", "no split 'test'; it has train, valid; set --config.data.eval_split=valid"),
        (below("train Test other"), "test", "set --config.data.eval_split=Test"),
        ([*below("train"), "test"], "test", "of 'train', set --config.data.name=folder:{root}/train"),
        (below("data/train data/test"), "test", "set --config.data.name=folder:{root}/data"),
        (below("images"), "test", "set --config.data.name=folder:{root}/images"),
        (below("a/b/train a/b/test"), "test", "set --config.data.name=folder:{root}/a/b"),
        (below("train/cats") + below("test"), "test", "set --config.data.train_split=train/cats"),
        (["train/images", "bus/images"], "test", f"if 'train' is a class itself, set {OVERRIDE}"),
        (below("imagesTs imagesTr"), "test", "train_split=imagesTr --config.data.eval_split=imagesTs"),
        (below("testA trainA"), "test", named("trainA", "testA")),
        (below("train test val"), "validation", "set --config.data.eval_split=val"),
        ([*below("less"), *below("more"), "more/emu"], "test", "train_split=more --config.data.eval_split=less"),
    ],
)  # fmt: skip
def test_what_looks_like_splits_is_not_trained_on_as_classes(
    root: Path, folders: list[str], eval_split: str, part: str
) -> None:
    write(root, folders)
    with pytest.raises(UserError) as error:
        load(root, eval_split=eval_split)
    assert part.format(root=root) in str(error.value)
    assert len(str(error.value).replace(str(root), "/home/somebody/pictures")) <= MESSAGE_LENGTH


def test_without_another_split_the_holdout_is_offered(root: Path) -> None:
    write(root, below("train"))
    with pytest.raises(
        UserError, match=rf"no split 'test'; it has train; .* --config\.data\.name=folder:{root}/train$"
    ):
        load(root)
    train, test = load(root / "train")
    assert (len(train.label), len(test.label)) == (8, 2)


def test_a_split_whose_disk_is_missing_is_named(root: Path) -> None:
    write(root, below("train"))
    (root / "test").symlink_to(root / "nowhere")
    with pytest.raises(UserError, match=r"the split 'test' of .* is a link that leads nowhere; mount its disk"):
        load(root)


@pytest.mark.parametrize(
    "folders",
    [
        ["train", "plane", "car"],
        ["test", "control"],
        ["valid", "invalid"],
        ["cat/images", "dog/images"],  # as in Tiny ImageNet
        ["cat/a", "cat/b", "dog/c", "dog/d"],
    ],
)
def test_classes_are_not_taken_for_splits(root: Path, folders: list[str]) -> None:
    write(root, folders)
    train, _ = load(root)
    assert train.class_names == tuple(sorted({folder.split("/")[0] for folder in folders}))
    assert len(train.label) == 4 * len(folders)
    assert train.origin.layout == "classes"


@pytest.mark.parametrize("folders", [below("cat dog", "in out"), ["train", "test"], below("Training Testing")])
def test_the_layout_can_be_set(root: Path, folders: list[str]) -> None:
    write(root, folders)
    train, test = load(root, layout="classes")
    assert len(train.class_names) == 2
    assert len(train.label) + len(test.label) == 5 * len(folders)
    with pytest.raises(UserError, match=r"has no (split 'train'|images in folders)"):
        load(root, layout="splits")


def test_the_suggested_settings_work(root: Path) -> None:
    write(root, below("Training Testing"))
    train, test = load(root, train_split="Training", eval_split="Testing")
    assert train.class_names == ("cat", "dog")
    assert (len(train.label), len(test.label)) == (10, 10)
    assert train.origin.layout == "splits"


def test_a_training_split_of_another_name_is_not_held_out(root: Path) -> None:
    write(root, ["cat", "dog"])
    train, test = load(root, train_split="all", eval_split="rest")
    assert (len(train.label), len(test.label)) == (8, 2)


def test_a_path_without_folder_or_to_a_file_is_explained(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(root, below("train test"))
    archive = tmp_path / "my photos.zip"
    archive.touch()
    with pytest.raises(UserError, match=f"set --config.data.name=folder:{root}$"):
        datasets.load(str(root), "train")
    with pytest.raises(UserError, match=r"my photos\.zip is a file; unpack it"):
        datasets.load(f"folder:{archive}", "train")
    with pytest.raises(UserError, match="lacks the folder's path"):
        datasets.load("folder:", "train")
    with pytest.raises(UserError, match=rf"begins with 'Folder:'; .* set --config\.data\.name=folder:{root}$"):
        datasets.load(f"Folder:{root}", "train")
    with pytest.raises(UserError, match=r"gs://bucket/photos is a URL, but only local folders"):
        datasets.load("folder:gs://bucket/photos", "train")


def test_a_relative_path_gives_the_same_images(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, below("train test"))
    train, _ = load(root)
    monkeypatch.chdir(root.parent)
    relative = datasets.load("folder:root", "train")
    assert relative.origin.folder == str(root)
    assert relative.identity() == train.identity()
