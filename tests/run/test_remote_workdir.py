"""A workdir that is a URL: a folder by file://, which fsspec treats as it does a bucket."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxft.errors import UserError
from jaxft.run import remote_workdir
from jaxft.run.remote_workdir import COMMITTED, reading_folder, synced, training_folder
from tests.commands.test_train import metrics
from tests.conftest import Run
from tests.run.test_survival import TINY, assert_same_run, started, undisturbed, wait_for_steps

assert undisturbed  # a fixture


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_checkpoint(workdir: Path, step: int, content: str) -> None:
    folder = workdir / "checkpoints" / str(step)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "array").write_text(content)
    (folder / COMMITTED).write_text(f"saved {content}")


def contents(folder: Path) -> dict[str, str]:
    """Of what a workdir is about; not hidden."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path.read_text() for name, path in names.items() if not name.startswith(".")}


def test_a_folder_of_this_machine_is_used_as_it_is(tmp_path: Path) -> None:
    assert training_folder(tmp_path) == reading_folder(str(tmp_path)) == tmp_path
    with synced(tmp_path, tmp_path):
        (tmp_path / "metrics.jsonl").write_text("1\n")
    assert contents(tmp_path) == {"metrics.jsonl": "1\n"}


def test_what_training_writes_and_removes_is_so_there(tmp_path: Path) -> None:
    url, there = f"file://{tmp_path}/bucket/run", tmp_path / "bucket" / "run"
    folder = training_folder(url)
    with synced(url, folder):
        (folder / "config.json").write_text("{}")
        (folder / "metrics.jsonl").write_text("1\n")
        (folder / "half.partial").write_text("not whole yet")
        (folder / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
        write_checkpoint(folder, 1, "a")
        write_checkpoint(folder, 2, "b")
    expected = {"config.json": "{}", "metrics.jsonl": "1\n"}
    of_1, of_2 = (
        {f"checkpoints/{step}/state/array": text, f"checkpoints/{step}/{COMMITTED}": f"saved {text}"}
        for step, text in (("1", "a"), ("2", "b"))
    )
    assert contents(there) == expected | of_1 | of_2
    with synced(url, folder):
        shutil.rmtree(folder / "checkpoints" / "1")
        (folder / "metrics.jsonl").write_text("1\n2\n")
    assert contents(there) == expected | of_2 | {"metrics.jsonl": "1\n2\n"}
    assert contents(reading_folder(url)) == contents(there)


def test_it_is_brought_there_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_workdir, "PUSH_SECONDS", 0.01)
    url = f"file://{tmp_path}/run"
    with synced(url, folder := training_folder(url)):
        write_checkpoint(folder, 1, "a")
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "checkpoints" / "1" / COMMITTED).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_new_machine_goes_on_and_takes_no_half_checkpoint(tmp_path: Path, cache: Path) -> None:
    url, there = f"file://{tmp_path}/run", tmp_path / "run"
    write_checkpoint(there, 1, "a")
    write_checkpoint(there, 2, "b")
    (there / "checkpoints" / "2" / COMMITTED).unlink()
    with synced(url, folder := training_folder(url)):
        assert set(contents(folder)) == {"checkpoints/1/state/array", f"checkpoints/1/{COMMITTED}"}
        write_checkpoint(folder, 2, "c")
    assert contents(there)["checkpoints/2/state/array"] == "c"


def test_half_of_an_earlier_pull_is_no_checkpoint(tmp_path: Path) -> None:
    url, there = f"file://{tmp_path}/run", tmp_path / "run"
    write_checkpoint(there, 1, "a")
    folder = reading_folder(url)
    write_checkpoint(folder, 2, "b")
    (folder / "checkpoints" / "2" / COMMITTED).unlink()
    assert contents(reading_folder(url)) == contents(there)


def test_another_run_of_the_same_steps_replaces_the_old_one(tmp_path: Path) -> None:
    url, there = f"file://{tmp_path}/run", tmp_path / "run"
    write_checkpoint(there, 1, "a")
    assert contents(reading_folder(url))["checkpoints/1/state/array"] == "a"
    shutil.rmtree(there)
    write_checkpoint(there, 1, "b")
    assert contents(reading_folder(url))["checkpoints/1/state/array"] == "b"


def test_what_a_killed_run_could_not_bring_there_is_gone_on_from(tmp_path: Path) -> None:
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
    shutil.rmtree(there)  # by a person
    with synced(url, folder):
        assert contents(folder) == {}


def test_a_bucket_that_cannot_be_written_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, there = f"file://{tmp_path}/bucket/run", tmp_path / "bucket"
    there.write_text("a file where a folder should be")
    folder = training_folder(url)
    with pytest.raises(UserError, match=r"cannot be written: "), synced(url, folder):
        raise AssertionError("refused before anything is trained")
    there.unlink()
    with pytest.raises(UserError, match=r"cannot be written .*; all of the run is in /"), synced(url, folder):
        shutil.rmtree(there)
        there.write_text("by now a file")
        (folder / "config.json").write_text("{}")
        write_checkpoint(folder, 1, "a")
    there.unlink()
    with synced(url, folder):
        pass
    assert contents(there / "run") == contents(folder) != {}


@pytest.mark.parametrize(
    ("workdir", "reason"),
    [
        ("nonsense://bucket/run", "cannot be opened: ValueError: Protocol not known: nonsense"),
        ("gs:/bucket/run", "lacks a slash; write gs://BUCKET/RUN"),
        ("file:///", "names no folder"),
    ],
)
def test_a_url_that_cannot_be_used_is_told(fails: Callable[..., str], workdir: str, reason: str) -> None:
    assert reason in fails("-m", "jaxft.evaluate", "--workdir", workdir)


@pytest.mark.slow
def test_a_machine_that_vanishes_loses_nothing(run: Run, undisturbed: Path, tmp_path: Path, cache: Path) -> None:
    """SIGTERM, as a spot machine gets it, and then another machine; then kill -9 on that one, and the same again."""
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
    assert f"workdir  {url}, goes on after step" in result.stdout
    assert_same_run(there, undisturbed)
    assert (there / "report.html").exists()
    assert run("-m", "jaxft.report", "--workdir", url, "--compare", undisturbed).returncode == 0
    assert (there / "compare.html").exists()
    assert metrics(there)[-1]["step"] == 42
