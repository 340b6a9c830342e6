"""The workdir's lock, and the check that a config belongs to it."""

import errno
import json
import os
from pathlib import Path

import pytest

from jaxft.config import default_config
from jaxft.errors import UserError
from jaxft.run.workdir import Workdir, checkpoint_step, local_folder


def test_a_lock_leaves_no_empty_workdir_behind(tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "runs" / "run")
    with workdir.lock():
        assert workdir.path.is_dir()
        with pytest.raises(UserError, match="another run is training in"), workdir.lock():
            raise AssertionError("two runs hold the lock")
    assert not workdir.path.exists()
    with workdir.lock():
        workdir.metrics.touch()
    assert workdir.metrics.exists()


def test_a_workdir_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--workdir .*file cannot be written"), Workdir(tmp_path / "file").lock():
        raise AssertionError("a file was locked as a folder")
    with pytest.raises(UserError, match="is not a folder"):
        Workdir(tmp_path / "file").resolve_config(default_config())


def test_resolving_a_config_changes_neither_the_config_nor_the_workdir(tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "run")
    config = default_config()
    config.batch_size = 0
    before = config.to_dict()
    assert workdir.resolve_config(config).to_dict() == before
    assert not workdir.path.exists()

    stored = workdir.resolve_config(config)
    stored.batch_size = 96
    workdir.write_config(stored)
    assert workdir.resolve_config(config).batch_size == 96
    assert config.to_dict() == before
    assert [path.name for path in workdir.path.iterdir()] == ["config.json"]


def test_another_config_is_refused_with_every_difference(tmp_path: Path) -> None:
    workdir = Workdir(tmp_path)
    workdir.write_config(default_config())
    other = default_config()
    other.seed, other.model.dtype = 7, "bfloat16"
    other.checkpoint.keep_latest = 9  # may change
    with pytest.raises(UserError, match=r"model\.dtype is 'float32' there and 'bfloat16' here; seed is 0 there and 7 "):
        workdir.resolve_config(other)


def test_a_missing_or_damaged_config_is_reported(tmp_path: Path) -> None:
    workdir = Workdir(tmp_path)
    assert workdir.read_config() is None
    (workdir.checkpoints / "7").mkdir(parents=True)
    assert workdir.has_checkpoint()
    with pytest.raises(UserError, match=r"has checkpoints but no config\.json"):
        workdir.read_config()
    workdir.config.write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        workdir.read_config()


@pytest.mark.parametrize("content", ["[]", '"text"', "3", "null", "", "{", '{"model": 3}', '{"seed": "0"}', '{"x": 1}'])
def test_a_config_of_another_type_is_reported(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json cannot be read \(.*\); put it back, or name another --workdir"):
        Workdir(tmp_path).read_config()


def test_something_else_than_a_config_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.mkdir()
    with pytest.raises(UserError, match="it is a folder, not a file"):
        Workdir(tmp_path).read_config()
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(UserError, match="it is a FIFO, not a file"):
        Workdir(tmp_path).read_config()
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(UserError, match="Too many levels of symbolic links"):
        Workdir(tmp_path).read_config()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "is empty"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null byte"),
        ("file/below", "Not a directory"),
        ("file", "is not a folder"),
        ("caf\udce9", "is not UTF-8, which Orbax cannot open"),
        ("loop", "Too many levels of symbolic links"),
    ],
)
def test_a_path_that_no_workdir_can_have_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("loop").symlink_to("loop")
    with pytest.raises(UserError, match=f"--workdir .*{reason}"):
        local_folder(name)


@pytest.mark.parametrize("name", ["run/checkpoints", "run/checkpoints/60", "run/checkpoints/new/run"])
def test_a_workdir_within_the_checkpoints_of_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / "checkpoints" / "60").mkdir(parents=True)
    assert local_folder(tmp_path / name) == tmp_path / name  # no run's: a folder of this name may hold anything
    (tmp_path / "run" / "config.json").touch()
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=f"{name} is inside the checkpoints of a run; name the run itself, .*/run "):
        local_folder(tmp_path / name)


def test_a_workdir_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_folder("~/my runs/new") == tmp_path / "my runs" / "new"
    with pytest.raises(UserError, match=r"--workdir '.*/my runs' is not a folder"):  # can be pasted
        (tmp_path / "my runs").touch()
        local_folder("~/my runs")


def test_a_folder_that_may_not_be_read_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match="checkpoints cannot be read: Permission denied"):
        Workdir(tmp_path).has_checkpoint()
    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(UserError, match=r"--workdir .* cannot be used \(Permission denied\)"):
        local_folder(tmp_path)


def test_only_canonical_numbers_are_steps() -> None:
    names = ("0", "7", "2147483647", "2147483648", "99999999999999999999", "07", "-7", "+7", "7_0", "7 ", "\u0667", "")
    assert [checkpoint_step(name) for name in names] == [0, 7, 2147483647, *[None] * 9]


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({}, None),
        ({"optimizer.schedule": "step"}, None),
        ({"optimizer.freeze": "backbone", "optimizer.unfreeze": "3: stage4, 9: stage3"}, None),
        ({"num_epochs": 4}, "it can only be raised"),
        ({"optimizer.schedule": "cosine"}, "the cosine schedule depends on it"),
        ({"augment.first_image_size": 16}, "augment.first_image_size depends on it"),
        ({"model.batch_norm": "recalibrate"}, "batch_norm=recalibrate depends on it"),
        (
            {"optimizer.freeze": "backbone", "optimizer.unfreeze": "6: stage4"},
            "optimizer.unfreeze has an epoch in betw",
        ),
    ],
)
def test_num_epochs_may_be_raised_if_nothing_else_changes(
    tmp_path: Path, changes: dict[str, object], obstacle: str | None
) -> None:
    config = default_config()
    config.update_from_flattened_dict(changes)
    config.num_epochs = 5
    workdir = Workdir(tmp_path)
    workdir.write_config(config)
    config.num_epochs = changes.get("num_epochs", 8)
    if obstacle:
        with pytest.raises(
            UserError, match=rf"num_epochs is 5 there and . here, but {obstacle}.*model\.pretrained={tmp_path}"
        ):
            workdir.resolve_config(config)
        return
    assert workdir.resolve_config(config).num_epochs == 8
    workdir.raise_num_epochs(8)
    assert workdir.read_config() == config
    config.seed = 1
    with pytest.raises(UserError, match="seed is 0 there and 1 here"):
        workdir.resolve_config(config)


def test_keys_that_a_recipe_has_gained_do_not_lock_out_an_older_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, config = Workdir(tmp_path), default_config()
    assert workdir.without_newer_keys(config) == config  # not begun
    stored = config.to_dict()
    del stored["optimizer"]["fit_head"], stored["optimizer"]["adaptive_clip"], stored["data"]["workers"]
    workdir.config.write_text(json.dumps(stored))
    config.optimizer.update(fit_head="first", adaptive_clip=0.1, learning_rate=0.5)
    config.data.workers = 2
    found = workdir.without_newer_keys(config)
    assert (found.optimizer.fit_head, found.optimizer.adaptive_clip) == ("no", 0.0)
    assert (found.optimizer.learning_rate, found.data.workers) == (0.5, 2)  # the first is refused by resolve_config
    assert "began with an older jaxft without optimizer.adaptive_clip, optimizer.fit_head;" in capsys.readouterr().err
    assert config.optimizer.fit_head == "first"


def test_a_lock_that_is_not_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(UserError, match=r"/\.lock cannot be locked: Is a directory; remove it"),
        Workdir(tmp_path).lock(),
    ):
        pass
