"""What is read below a folder of images, and what is skipped and reported."""

import os
from pathlib import Path

import pytest

from jaxft.data.folder_scan import count_strays, describe_skipped, scan, subfolders
from jaxft.data.labelled_files import image_paths
from jaxft.errors import UserError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in scan(folder).images]


def test_images_are_sorted_with_those_of_subfolders_last(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg", "a/z.PNG", "a/y/1.webp", "a/a.tif", "c.jpeg", "B.bmp", "0/x.gif")
    assert found(tmp_path) == ["B.bmp", "b.jpg", "c.jpeg", "0/x.gif", "a/a.tif", "a/z.PNG", "a/y/1.webp"]


@pytest.mark.parametrize(
    "name",
    [".git", ".ipynb_checkpoints", "@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information"],
)
def test_folders_that_programs_create_are_skipped_at_every_depth(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "1.jpg", f"{name}/2.jpg", f"deep/{name}/more/3.jpg")
    assert found(tmp_path) == ["1.jpg"]
    assert dict(scan(tmp_path).skipped) == {f"folder {name}": 2}
    assert subfolders(tmp_path) == ["deep"]
    assert dict(count_strays(tmp_path)) == {f"folder {name}": 1, "beside the class folders": 1}


def test_links_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    cat = tmp_path / "train" / "cat"
    touch(cat, "1.jpg", "real/2.jpg", ".store/5.jpg")
    touch(tmp_path, "elsewhere/3.jpg", "elsewhere/deep/4.jpg", "train/dog/9.jpg")
    targets: dict[str, Path | str] = {
        "again": tmp_path / "elsewhere",
        "more": tmp_path / "elsewhere",
        "a_real": cat / "real",
        "self": ".",
        "parent": "..",
        "loop": "loop",
        "store": ".store",
    }
    for name, target in targets.items():
        (cat / name).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to(cat)
    (cat / "6.jpg").symlink_to(tmp_path / "elsewhere" / "3.jpg")
    expected = ["1.jpg", "6.jpg", "again/3.jpg", "again/deep/4.jpg", "real/2.jpg", "store/5.jpg"]
    assert found(cat) == expected
    assert dict(scan(cat).skipped) == {"linked to nothing": 1, "folder .store": 1}


def test_a_linked_class_folder_is_read(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/1.jpg")
    (tmp_path / "cat").symlink_to("elsewhere")
    assert found(tmp_path / "cat") == ["1.jpg"]


def test_what_is_skipped_is_described(tmp_path: Path) -> None:
    names = [f"{i}.HEIC" for i in range(3)] + ["a.txt", "b.txt", "noext", ".hidden.jpg", "c.mpg", "d.h5", "e.pdf"]
    touch(tmp_path, *names, "f.eps", "@eaDir/x.jpg", "z.jpg")
    (tmp_path / "gone").symlink_to("nowhere")
    result = scan(tmp_path)
    assert [path.name for path in result.images] == ["z.jpg"]
    text = describe_skipped(result.skipped)
    assert text.startswith("3 .heic (no reader: pip install pillow-heif), 2 .txt, ")
    for part in ("1 hidden", "1 without a suffix", "1 .mpg", "1 .h5", "1 .pdf", "1 .eps", "folder @eaDir"):
        assert part in text


def test_a_folder_that_cannot_be_read_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "1.jpg", "secret/2.jpg")
    scandir = os.scandir

    def guarded(path: Path) -> object:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match=r"secret cannot be read \(Permission denied\)"):
        scan(tmp_path)


def test_predict_reports_what_it_skips_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path, "1.jpg", "deep/2.jpg", "@eaDir/3.jpg", "a.heic")
    assert [path.name for path in image_paths(tmp_path)] == ["1.jpg", "2.jpg"]
    assert "1 .heic (no reader: pip install pillow-heif), folder @eaDir" in capsys.readouterr().err
    (tmp_path / "only").mkdir()
    touch(tmp_path, "only/a.heic")
    with pytest.raises(UserError, match=r"no images in .*only; skipped: 1 \.heic"):
        image_paths(tmp_path / "only")
