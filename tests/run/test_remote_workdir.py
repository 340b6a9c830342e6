"""A workdir that is a URL: here a file:// folder, which fsspec treats like a bucket."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxft.errors import UserError
from jaxft.files import partial_path
from jaxft.run import remote_workdir
from jaxft.run.remote_workdir import reading_folder, synced, training_folder
from jaxft.run.workdir import COMMIT
from tests.helpers.runs import TINY, Run, assert_same_run, metrics, started, wait_for_steps


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_checkpoint(workdir: Path, step: int, content: str) -> None:
    folder = workdir / "checkpoints" / str(step)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "array").write_text(content)
    (folder / COMMIT).write_text(f"saved {content}")


def contents(folder: Path) -> dict[str, str]:
    """Returns the text of each file that is not hidden, by relative path."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path.read_text() for name, path in names.items() if not name.startswith(".")}


def test_a_local_folder_is_used_directly(tmp_path: Path) -> None:
    assert training_folder(tmp_path) == reading_folder(str(tmp_path)) == tmp_path
    with synced(tmp_path, tmp_path):
        (tmp_path / "metrics.jsonl").write_text("1\n")
    assert contents(tmp_path) == {"metrics.jsonl": "1\n"}


def test_files_written_and_removed_by_training_are_synchronised(tmp_path: Path) -> None:
    url, there = f"file://{tmp_path}/bucket/run", tmp_path / "bucket" / "run"
    folder = training_folder(url)
    with synced(url, folder):
        (folder / "config.json").write_text("{}")
        (folder / "metrics.jsonl").write_text("1\n")
        partial_path(folder / "report.html").write_text("incomplete")
        (folder / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
        write_checkpoint(folder, 1, "a")
        write_checkpoint(folder, 2, "b")
    expected = {"config.json": "{}", "metrics.jsonl": "1\n"}
    of_1, of_2 = (
        {f"checkpoints/{step}/state/array": text, f"checkpoints/{step}/{COMMIT}": f"saved {text}"}
        for step, text in (("1", "a"), ("2", "b"))
    )
    assert contents(there) == expected | of_1 | of_2
    assert not partial_path(there / "report.html").exists()
    with synced(url, folder):
        shutil.rmtree(folder / "checkpoints" / "1")
        (folder / "metrics.jsonl").write_text("1\n2\n")
    assert contents(there) == expected | of_2 | {"metrics.jsonl": "1\n2\n"}
    assert contents(reading_folder(url)) == contents(there)


def test_files_are_uploaded_during_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_workdir, "PUSH_SECONDS", 0.01)
    url = f"file://{tmp_path}/run"
    with synced(url, folder := training_folder(url)):
        write_checkpoint(folder, 1, "a")
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "checkpoints" / "1" / COMMIT).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_new_machine_resumes_and_ignores_an_incomplete_checkpoint(tmp_path: Path, cache: Path) -> None:
    url, there = f"file://{tmp_path}/run", tmp_path / "run"
    write_checkpoint(there, 1, "a")
    write_checkpoint(there, 2, "b")
    (there / "checkpoints" / "2" / COMMIT).unlink()
    with synced(url, folder := training_folder(url)):
        assert set(contents(folder)) == {"checkpoints/1/state/array", f"checkpoints/1/{COMMIT}"}
        write_checkpoint(folder, 2, "c")
    assert contents(there)["checkpoints/2/state/array"] == "c"


def test_an_incomplete_download_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    url, there = f"file://{tmp_path}/run", tmp_path / "run"
    write_checkpoint(there, 1, "a")
    folder = reading_folder(url)
    write_checkpoint(folder, 2, "b")
    (folder / "checkpoints" / "2" / COMMIT).unlink()
    assert contents(reading_folder(url)) == contents(there)


def test_another_run_with_the_same_steps_replaces_the_local_copy(tmp_path: Path) -> None:
    url, there = f"file://{tmp_path}/run", tmp_path / "run"
    write_checkpoint(there, 1, "a")
    assert contents(reading_folder(url))["checkpoints/1/state/array"] == "a"
    shutil.rmtree(there)
    write_checkpoint(there, 1, "b")
    assert contents(reading_folder(url))["checkpoints/1/state/array"] == "b"


def test_a_killed_run_resumes_from_files_not_yet_uploaded(tmp_path: Path) -> None:
    url, there = f"file://{tmp_path}/run", tmp_path / "run"
    with synced(url, folder := training_folder(url)):
        (folder / "config.json").write_text("{}")
        (folder / "metrics.jsonl").write_text("1\n")
    (folder / "metrics.jsonl").write_text("1\n2\n")
    write_checkpoint(folder, 2, "b")
    with synced(url, folder):
        assert "checkpoints/2/state/array" in contents(folder)
    assert contents(there) == contents(folder)

    (there / "metrics.jsonl").write_text("another run's\n")
    with synced(url, folder):
        assert contents(folder)["metrics.jsonl"] == "another run's\n"
    shutil.rmtree(there)  # as a user might
    with synced(url, folder):
        assert contents(folder) == {}


def test_nothing_is_lost_if_the_bucket_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, there = f"file://{tmp_path}/bucket/run", tmp_path / "bucket"
    there.write_text("a file where a folder should be")
    folder = training_folder(url)
    with pytest.raises(UserError, match=r"cannot be written: "), synced(url, folder):
        raise AssertionError("training must not start")
    there.unlink()
    with pytest.raises(UserError, match=r"cannot be written .*; the whole run is in /"), synced(url, folder):
        shutil.rmtree(there)
        there.write_text("by now a file")
        (folder / "config.json").write_text("{}")
        write_checkpoint(folder, 1, "a")
    there.unlink()
    with synced(url, folder):
        pass
    assert contents(there / "run") == contents(folder) != {}


def test_a_run_that_replaces_its_checkpoints_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, there = f"file://{tmp_path}/run", tmp_path / "run"
    write_checkpoint(there, 1, "a")
    pull = remote_workdir._Mirror._pull

    def replace_first(mirror: remote_workdir._Mirror) -> None:
        if (there / "checkpoints" / "1").exists():
            shutil.rmtree(there / "checkpoints" / "1")
            write_checkpoint(there, 2, "b")
        pull(mirror)

    monkeypatch.setattr(remote_workdir._Mirror, "_pull", replace_first)
    assert set(contents(reading_folder(url))) == {"checkpoints/2/state/array", f"checkpoints/2/{COMMIT}"}


@pytest.mark.parametrize("where", ["checkpoints/1/state/fifo", "metrics.jsonl", f"checkpoints/1/{COMMIT}"])
def test_a_fifo_does_not_stop_a_reader_or_an_upload(tmp_path: Path, where: str) -> None:
    url, there = f"file://{tmp_path}/run", tmp_path / "run"
    with synced(url, folder := training_folder(url)):
        write_checkpoint(folder, 1, "a")
    (there / where).unlink(missing_ok=True)
    os.mkfifo(there / where)
    with pytest.raises(UserError, match=r"cannot be read: .* is not a file"):
        reading_folder(url)
    (there / where).unlink()
    (folder / where).unlink(missing_ok=True)
    os.mkfifo(folder / where)
    shutil.rmtree(there)
    mirror = remote_workdir._Mirror(url, folder)
    if where.endswith("fifo"):
        with pytest.raises(OSError, match="it is a FIFO, not a file"):
            mirror.push()
    else:
        mirror.push()
    assert not (there / where).exists()


@pytest.mark.parametrize(
    ("workdir", "reason"),
    [
        ("nonsense://bucket/run", "cannot be opened: ValueError: Protocol not known: nonsense"),
        ("gs:/bucket/run", "lacks a slash; write gs://BUCKET/RUN"),
        ("file:///", "names no folder"),
    ],
)
def test_an_unusable_url_is_reported(fails: Callable[..., str], workdir: str, reason: str) -> None:
    assert reason in fails("-m", "jaxft.evaluate", "--workdir", workdir)


@pytest.mark.slow
def test_no_progress_is_lost_with_a_machine(run: Run, undisturbed: Path, tmp_path: Path, cache: Path) -> None:
    """Stops a run by SIGTERM, as on a spot machine; resumes on another machine, kills it there, resumes again."""
    url, there = f"file://{tmp_path}/run", tmp_path / "run"
    with started(*TINY, "--workdir", url) as process:
        wait_for_steps(process, training_folder(url), 5)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=300)
    assert process.returncode == 143, error
    shutil.rmtree(cache)
    with started(*TINY, "--workdir", url) as process:
        wait_for_steps(process, training_folder(url), 20)
        process.send_signal(signal.SIGKILL)
    result = run(*TINY, "--workdir", url)
    assert result.returncode == 0, result.stderr
    assert f"workdir  {url}, resuming after step" in result.stdout
    assert_same_run(there, undisturbed)
    assert (there / "report.html").exists()
    assert run("-m", "jaxft.report", "--workdir", url, "--compare", undisturbed).returncode == 0
    assert (there / "compare.html").exists()
    assert metrics(there)[-1]["step"] == 42
