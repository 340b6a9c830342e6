"""The workdir's lock, and the check that a config belongs to it."""

from pathlib import Path

import pytest

from jaxft.config import default_config
from jaxft.errors import UserError
from jaxft.run.workdir import Workdir


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
