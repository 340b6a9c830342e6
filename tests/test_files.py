"""Files and folders that are written as a whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.files import STALE_SECONDS, atomic_directory, atomic_write, open_regular, partial_path, read_json, reason


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path, "w", fsync=True) as file:
        file.write("né")
        file.flush()
        assert path.read_text() == "old"
        assert Path(file.name) == partial_path(path)
    assert path.read_bytes() == "né".encode()
    with atomic_write(tmp_path / "b.bin") as file:
        file.write(b"\0")
    assert names(tmp_path) == ["a.txt", "b.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_no_partial(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path, "w") as file:
        file.write("new")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_target_that_cannot_be_replaced_raises_os_error(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError), atomic_write(tmp_path / "a"):
        pass
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "a"):
        raise AssertionError("opened in a folder that does not exist")
    assert names(tmp_path) == ["a"]


KILLED = """
import os, signal, sys
from pathlib import Path
from jaxft.files import atomic_directory, atomic_write

path = Path(sys.argv[1])
with atomic_write(path / "file", "w") as file, atomic_directory(path / "folder") as folder:
    file.write("new")
    file.flush()
    (folder / "member").write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_leaves_the_old_content_and_a_partial_that_a_later_write_removes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "member").write_text("old")
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert result.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "member").read_text() == "old"
    left = sorted(path for path in tmp_path.iterdir() if path.name.startswith("."))
    assert [path.name.partition(".partial-")[0] for path in left] == [".file", ".folder"]

    write_both(tmp_path)
    assert all(path.exists() for path in left)  # the process may still be alive, on another machine
    for path in left:
        os.utime(path, (0, path.stat().st_mtime - STALE_SECONDS - 60))
    write_both(tmp_path)
    assert names(tmp_path) == ["file", "folder"]


def write_both(folder: Path) -> None:
    with atomic_write(folder / "file", "w") as file, atomic_directory(folder / "folder"):
        file.write("newest")


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "not" / "yet" / "there"
    for text in ("first", "second"):
        with atomic_directory(path) as partial:
            (partial / text).touch()
        assert names(path) == [text]
    with pytest.raises(ValueError), atomic_directory(path) as partial:
        (partial / "third").touch()
        raise ValueError
    assert names(path) == ["second"]
    assert names(path.parent) == ["there"]


def test_of_two_processes_that_create_a_folder_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_the_race(path: Path, target: Path) -> None:
        target.mkdir()
        (target / "theirs").touch()
        raise OSError("Directory not empty")

    monkeypatch.setattr(Path, "rename", lose_the_race)
    with atomic_directory(tmp_path / "folder") as partial:
        (partial / "ours").touch()
    assert names(tmp_path / "folder") == ["theirs"]
    assert names(tmp_path) == ["folder"]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "link").symlink_to("a.txt")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"a"
    expected = {
        "fifo": "it is a FIFO, not a file",
        ".": "it is a folder, not a file",
        "loop": "Too many levels of symbolic links",
        "missing": "No such file or directory",
        "a.txt/b": "Not a directory",
        "a\0b": "embedded null byte",
    }
    found = {}
    for name in expected:
        with pytest.raises(OSError) as caught:
            open_regular(tmp_path / name)
        found[name] = reason(caught.value)
    assert found == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "it holds a list, not an object"),
        ("null", "it holds a NoneType, not an object"),
        ('{"a": ', "Expecting value"),
        ("[" * 100_000, "it is nested too deeply"),
        ("\xff", "codec can't decode"),
    ],
)
def test_json_of_another_type_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_json(path)


def test_a_json_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, "ü"]}', "utf-8")
    assert read_json(path) == {"a": [1, "ü"]}


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("none/a", FileNotFoundError),
        ("file/a", NotADirectoryError),
        ("folder", IsADirectoryError),
        ("x" * 300, OSError),
        ("a\0", OSError),
    ],
)
def test_a_failed_write_names_the_path_and_not_its_partial(tmp_path: Path, name: str, error: type[OSError]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(error) as raised, atomic_write(tmp_path / name):
        pass
    assert raised.value.filename == str(tmp_path / name)
    assert ".partial-" not in str(raised.value)
    assert names(tmp_path) == ["file", "folder"]


def test_an_error_of_the_content_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="other"), atomic_write(tmp_path / "a"):
        (tmp_path / "other").read_bytes()
    with pytest.raises(OSError) as full, atomic_write(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.filename == str(tmp_path / "a")


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127)  # 254 bytes
    with atomic_write(path, "w") as file:
        file.write("new")
    with atomic_directory(tmp_path / ("b" * 255)):
        pass
    assert path.read_text() == "new"
    assert len(names(tmp_path)) == 2
