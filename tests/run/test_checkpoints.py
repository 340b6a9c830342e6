"""Checkpoints: the ones kept, that a save captures the state at its call, and that damaged ones are refused."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import default_config
from jaxft.data.batches import replicate
from jaxft.errors import UserError
from jaxft.files import with_checksum
from jaxft.run import checkpoint_reader as module
from jaxft.run.checkpoint_reader import CheckpointReader, DamagedCheckpointError, checksums
from jaxft.run.checkpoints import Checkpoints, NotFiniteError
from jaxft.run.metrics_file import MetricsFile
from jaxft.run.workdir import Workdir
from jaxft.training.state import TrainState


def make_state(step: int, size: int = 4) -> TrainState:
    return replicate(TrainState(jnp.int32(step), {"w": jnp.full(size, step, jnp.float32)}, {}, ()))


def random_state(step: int) -> TrainState:
    w = np.random.default_rng(step).standard_normal(100_000, np.float32)
    return replicate(TrainState(jnp.int32(step), {"w": w}, {}, ()))


def abstract_state(size: int = 4) -> TrainState:
    return jax.eval_shape(lambda: make_state(0, size))


def writer(workdir: Path, accuracy: dict[int, float] | None = None, **options: int) -> Checkpoints:
    """Returns the checkpoints of a run with the given evaluation accuracies, by step."""
    metrics = MetricsFile(workdir / "metrics.jsonl")
    metrics.scores.update(accuracy or {})
    return Checkpoints(Workdir(workdir), metrics, **options)


def saved(workdir: Path, *steps: int, **overrides: int | str) -> Checkpoints:
    """Saves checkpoints of a run with config.json, and returns its writer."""
    config = default_config()
    config.update_from_flattened_dict(overrides)
    Workdir(workdir).write_config(config)
    checkpoints = writer(workdir, keep_latest=len(steps))
    for step in steps:
        checkpoints.save(make_state(step), {"config": config.to_dict()})
    checkpoints.close()
    return writer(workdir)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    """Steps 15, 25 and 35 lie within an epoch and are never evaluated."""
    accuracy = {10: 0.3, 20: 0.8, 30: 0.5, 40: 0.6}
    checkpoints = writer(tmp_path, accuracy)
    for step in (10, 15, 20, 25, 30, 35, 40):
        checkpoints.save(make_state(step), {"note": step})
    checkpoints.close()
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}, "split": "eval", "accuracy": {value}}}\n' for step, value in accuracy.items())
    )
    reader = CheckpointReader(Workdir(tmp_path))
    assert reader.steps() == [20, 40]
    assert (reader.resolve("best"), reader.resolve("latest"), reader.resolve("40")) == (20, 40, 40)
    assert reader.info(20)["note"] == 20
    restored = reader.restore(20, abstract_state())
    np.testing.assert_array_equal(restored.params["w"], [20, 20, 20, 20])
    with pytest.raises(UserError, match=r"no checkpoint '30'.*\[20, 40\]"):
        reader.resolve("30")
    with pytest.raises(UserError, match="no checkpoint 'newest'"):
        reader.resolve("newest")


def test_only_evaluated_checkpoints_can_be_the_best(tmp_path: Path) -> None:
    checkpoints = writer(tmp_path, {10: 0.3}, keep_latest=2, keep_best=0)
    for step in (5, 10, 15):
        checkpoints.save(make_state(step), {})
        checkpoints.wait()
    assert checkpoints.steps() == [10, 15]
    assert checkpoints.resolve("best") == 10
    checkpoints.close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "split": "eval", "accuracy": 0.3}\n')
    (tmp_path / "checkpoints" / "10").rename(tmp_path / "10")
    with pytest.raises(
        UserError, match=r"no checkpoint 'best' .* none of them is evaluated yet; .* latest or .*\[15\]"
    ):
        CheckpointReader(Workdir(tmp_path)).resolve("best")


def test_a_missing_best_checkpoint_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = saved(tmp_path, 5, 6)
    rows = [f'{{"step": {step}, "split": "eval", "accuracy": {value}}}\n' for step, value in ((5, 0.9), (6, 0.3))]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    reader = CheckpointReader(Workdir(tmp_path))
    assert reader.resolve("best") == 5
    assert not capsys.readouterr().err
    (tmp_path / "checkpoints" / "5").rename(tmp_path / "checkpoints" / "4")
    assert reader.resolve("best") == 6
    assert "lacks checkpoint 5, the best one; checkpoint 6 is used" in capsys.readouterr().err
    checkpoints.close()


def test_the_latest_is_the_best_without_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, 5, 6)
    assert CheckpointReader(Workdir(tmp_path)).resolve("best") == 6
    assert "has no metrics.jsonl, so its latest checkpoint, 6, is used" in capsys.readouterr().err


def test_training_continues_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """Donates the buffers being saved to steps that overwrite them at once."""
    state = make_state(1, size=4_000_000)
    step = jax.pmap(
        lambda state, _: TrainState(state.step + 1, {"w": state.params["w"] + 1}, {}, ()),
        axis_name="batch",
        in_axes=(None, 0),
        out_axes=None,
        donate_argnums=0,
    )
    checkpoints = writer(tmp_path)
    checkpoints.save(state, {})
    for _ in range(50):
        state = step(state, np.zeros(jax.local_device_count()))
    jax.block_until_ready(state)
    checkpoints.close()
    restored = CheckpointReader(Workdir(tmp_path)).restore(1, abstract_state(4_000_000))
    assert (np.asarray(restored.params["w"]) == 1).all()
    assert (np.asarray(state.params["w"]) == 51).all()


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    checkpoints = writer(tmp_path)
    for value in (np.nan, -np.inf):
        state = TrainState(jnp.int32(7), {"w": jnp.array([1.0, value])}, {}, ())
        with pytest.raises(NotFiniteError, match="params/w is not finite"):
            checkpoints.save(replicate(state), {})
    assert checkpoints.steps() == []
    checkpoints.close()


def test_a_checksum_depends_on_every_bit_the_dtype_and_the_shape() -> None:
    array = np.arange(12, dtype=np.float32)
    seen = {checksums(other)[""] for other in (array, array.reshape(3, 4), array.view(np.int32), array.astype("f8"))}
    for bit in range(array.nbytes * 8):
        flipped = array.copy()
        flipped.view(np.uint8)[bit // 8] ^= 1 << bit % 8
        seen.add(checksums(flipped)[""])
    assert len(seen) == 4 + array.nbytes * 8


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bytes(folder: Path) -> None:
    """Flips one bit in the middle of the arrays, which Orbax itself does not notice."""
    path = largest_file(folder / "state")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoints = writer(tmp_path, keep_latest=3)
    for step in (5, 6, 7):
        checkpoints.save(random_state(step), {})
    checkpoints.close()
    flip_bytes(tmp_path / "checkpoints" / "7")
    path = largest_file(tmp_path / "checkpoints" / "6")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    checkpoints = writer(tmp_path)
    for step in (6, 7):
        with pytest.raises(DamagedCheckpointError, match=rf"checkpoint {step} in .* is damaged"):
            checkpoints.restore(step, abstract_state(100_000))
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint 7 .*on_damage=newest_good"):
        checkpoints.restore_latest(abstract_state(100_000), "refuse")
    assert checkpoints.steps() == [5, 6, 7]
    _, state = checkpoints.restore_latest(abstract_state(100_000), "newest_good")
    assert (int(state.step), checkpoints.steps()) == (5, [5])
    assert {path.name for path in (tmp_path / "damaged_checkpoints").iterdir()} == {"6", "7"}
    info = checkpoints.info(5)
    checkpoints.save(random_state(6), info)  # the damaged checkpoint of this step was moved away
    checkpoints.close()
    assert int(CheckpointReader(Workdir(tmp_path)).restore(6, abstract_state(100_000)).step) == 6


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from an event loop that Orbax abandons
def test_a_failed_save_keeps_the_earlier_checkpoint_and_the_next_succeeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Simulates a full disk by a file-size limit, which makes writes fail."""
    checkpoints = writer(tmp_path)
    checkpoints.save(random_state(1), {})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        checkpoints.save(random_state(2), {})
        with pytest.raises(UserError, match="the last checkpoint could not be written"):
            checkpoints.finish(random_state(2), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert "checkpoint 2 could not be written (File too large); checkpoint 1 stays" in error
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    checkpoints.save(random_state(3), {})
    checkpoints.finish(random_state(3), {})
    assert checkpoints.steps() == [3]
    np.testing.assert_array_equal(
        checkpoints.restore(3, abstract_state(100_000)).params["w"], random_state(3).params["w"]
    )
    checkpoints.close()


def test_an_unwritable_folder_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Replaces the folder by a file, which stops even root from writing."""
    checkpoints = writer(tmp_path)
    checkpoints.save(make_state(1), {})
    checkpoints.wait()
    folder = tmp_path / "checkpoints"
    folder.rename(tmp_path / "away")
    folder.touch()
    checkpoints.save(make_state(2), {})
    checkpoints.wait()
    assert "checkpoint 2 could not be written" in capsys.readouterr().err
    folder.unlink()
    (tmp_path / "away").rename(folder)
    checkpoints.save(make_state(3), {})
    checkpoints.finish(make_state(3), {})
    assert checkpoints.steps() == [3]
    checkpoints.close()


@pytest.mark.parametrize("name", [module.COMMIT, module.INFO, module.TREE])
def test_a_json_file_of_another_type_is_damage(tmp_path: Path, name: str) -> None:
    checkpoints = saved(tmp_path, 5, 6)
    for content in ("[]", '"text"', "3", "", '{"', "[" * 10**5, "null"):
        (tmp_path / "checkpoints" / "6" / name).write_text(content)
        with pytest.raises(DamagedCheckpointError, match=r"checkpoint 6 .* is damaged .*use --checkpoint 5"):
            checkpoints.info(6)
    _, state = checkpoints.restore_latest(abstract_state(), "newest_good")
    assert (int(state.step), names(tmp_path / "damaged_checkpoints")) == (5, {"6"})
    checkpoints.save(make_state(6), {})
    checkpoints.close()
    assert checkpoints.steps()[-1] == 6


def test_damaged_metadata_of_an_earlier_checkpoint_does_not_stop_a_run(tmp_path: Path) -> None:
    """Orbax's manager reads those of all checkpoints."""
    checkpoints = saved(tmp_path, 5, 6)
    (tmp_path / "checkpoints" / "5" / module.COMMIT).write_text('{"init_timestamp_nsecs": "soon"}')
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint 5 .* is damaged"):
        checkpoints.restore_latest(abstract_state(), "refuse")
    assert int(checkpoints.restore_latest(abstract_state(), "newest_good")[1].step) == 6
    assert names(tmp_path / "damaged_checkpoints") == {"5"}
    checkpoints.close()


@pytest.mark.parametrize("name", [module.INFO, "state/manifest.ocdbt", module.COMMIT])
def test_something_else_than_a_file_is_damage(tmp_path: Path, name: str) -> None:
    checkpoints = saved(tmp_path, 5, 6)
    path = tmp_path / "checkpoints" / "6" / name
    path.unlink()
    if name == module.COMMIT:  # not needed once a checkpoint is complete
        assert int(checkpoints.restore(6, abstract_state()).step) == 6
    path.symlink_to(path)
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint 6 .* is damaged \(Too many levels of symbolic links"):
        checkpoints.restore(6, abstract_state())
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint 6 .* is damaged"):
        checkpoints.restore(6, abstract_state())
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint 6 .* is damaged \(it is a FIFO"):
        checkpoints.restore(6, abstract_state())
    assert int(checkpoints.restore_latest(abstract_state(), "newest_good")[1].step) == 5
    checkpoints.close()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("by_orbax", [False, True])
def test_a_file_that_may_not_be_read_is_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, by_orbax: bool
) -> None:
    """Nothing is moved, because the checkpoint may be whole."""
    checkpoints = saved(tmp_path, 5, 6)

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number)) if not by_orbax else ValueError(f"INTERNAL: [OS error {number}: E]")

    owner, name = (module.ocp.Checkpointer, "restore") if by_orbax else (module, "open_regular")
    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(UserError, match=rf"checkpoint 6 .* cannot be read \({os.strerror(number)}") as caught:
        checkpoints.restore_latest(abstract_state(), "newest_good")
    assert not isinstance(caught.value, DamagedCheckpointError)
    assert names(tmp_path / "checkpoints") == {"5", "6"}


def test_a_fault_that_passes_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 5)
    restore, calls = module.ocp.Checkpointer.restore, []

    def fail_once(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == 1:
            raise ValueError("UNAVAILABLE")
        return restore(*arguments, **options)

    monkeypatch.setattr(module.ocp.Checkpointer, "restore", fail_once)
    assert int(checkpoints.restore(5, abstract_state()).step) == 5


def test_no_checkpoint_is_moved_if_none_is_good(tmp_path: Path) -> None:
    """The cause may be outside them, as after an upgrade."""
    checkpoints = saved(tmp_path, 5, 6)
    for step in ("5", "6"):
        flip_bytes(tmp_path / "checkpoints" / step)
    with pytest.raises(UserError, match=r"there is no good checkpoint in .*, and nothing was moved: checkpoint 6 .*"):
        checkpoints.restore_latest(abstract_state(), "newest_good")
    assert names(tmp_path / "checkpoints") == {"5", "6"}


def rewrite_info(folder: Path, **changes: object) -> None:
    """Changes the info of a checkpoint, with a new checksum."""
    path = folder / module.INFO
    path.write_text(json.dumps(with_checksum(json.loads(path.read_text()) | changes)))


def test_other_versions_are_not_damage(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 5)
    folder = tmp_path / "checkpoints" / "5"
    info = json.loads((folder / module.INFO).read_text())
    with pytest.raises(UserError, match=r"other arrays than this version makes \(params/w: float32\[4\] instead of fl"):
        checkpoints.restore_latest(abstract_state(size=5), "newest_good")
    rewrite_info(folder, format=2)
    with pytest.raises(
        UserError, match=r"checkpoint 5 .* has format 2, and this jaxft reads 1; install the newest jaxft"
    ):
        checkpoints.restore_latest(abstract_state(), "newest_good")
    of_version_0_1 = {key: value for key, value in info.items() if key not in ("format", "step")}
    (folder / module.INFO).write_text(json.dumps(with_checksum(of_version_0_1)))
    assert int(checkpoints.restore(5, abstract_state()).step) == 5


@pytest.mark.parametrize("stores_step", [True, False])
def test_exchanged_checkpoints_are_noticed(tmp_path: Path, stores_step: bool) -> None:
    checkpoints = saved(tmp_path, 4, 5, 6)
    folder = tmp_path / "checkpoints"
    if not stores_step:
        for step in (5, 6):
            info = json.loads((folder / str(step) / module.INFO).read_text())
            (folder / str(step) / module.INFO).write_text(json.dumps(with_checksum({"arrays": info["arrays"]})))
    (folder / "5").rename(folder / "x")
    (folder / "6").rename(folder / "5")
    (folder / "x").rename(folder / "6")
    for step, other in ((5, 6), (6, 5)):
        with pytest.raises(DamagedCheckpointError, match=rf"checkpoints/{step} is not checkpoint {step} but {other}"):
            checkpoints.restore(step, abstract_state())
    assert int(checkpoints.restore_latest(abstract_state(), "newest_good")[1].step) == 4
    assert names(folder) == {"4"}


def test_a_checkpoint_of_another_run_is_noticed(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "run", 5, 6)
    saved(tmp_path / "other", 6, seed=1)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "6", tmp_path / "run" / "checkpoints" / "6")
    with pytest.raises(
        DamagedCheckpointError, match=r"checkpoint 6 .* is of another run \(seed is 1 there and 0 in conf"
    ):
        checkpoints.restore(6, abstract_state())
    assert int(checkpoints.restore_latest(abstract_state(), "newest_good")[1].step) == 5
    (tmp_path / "run" / "config.json").unlink()  # predicting needs only the checkpoint
    assert int(CheckpointReader(Workdir(tmp_path / "run")).restore(5, abstract_state()).step) == 5


@pytest.mark.parametrize(("schedule", "accepted"), [("constant", True), ("cosine", False)])
def test_a_checkpoint_of_a_shorter_run_is_noticed(tmp_path: Path, schedule: str, accepted: bool) -> None:
    overrides: dict[str, int | str] = {"num_epochs": 3, "optimizer.schedule": schedule}
    checkpoints = saved(tmp_path, 5, **overrides)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_epochs": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if accepted:  # num_epochs may have been raised since then
        assert int(checkpoints.restore(5, abstract_state()).step) == 5
    else:
        with pytest.raises(DamagedCheckpointError, match="num_epochs is 3 there and 4 in config"):
            checkpoints.restore(5, abstract_state())


@pytest.mark.parametrize(
    "name", ["99999999999999999999", "007", "-7", "\N{FULLWIDTH DIGIT SEVEN}", "7 (copy)", "7.orbax-checkpoint-tmp"]
)
def test_a_folder_with_another_name_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    checkpoints = saved(tmp_path, 5)
    (tmp_path / "checkpoints" / name).mkdir()
    assert checkpoints.steps() == [5]
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoints.resolve(name)
    if len(name) == 20:  # the latest for Orbax, which would then save no other
        with pytest.raises(UserError, match=f"{name} is not a checkpoint of a run; move it away"):
            checkpoints.restore_latest(abstract_state(), "refuse")
    else:
        checkpoints.restore_latest(abstract_state(), "refuse")
        checkpoints.save(make_state(6), {})
        checkpoints.wait()
        assert checkpoints.steps() == [6]
        checkpoints.close()


def test_a_folder_that_cannot_be_used_is_reported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="checkpoints cannot be read: Not a directory"):
        CheckpointReader(Workdir(tmp_path)).steps()
    with pytest.raises(UserError, match="checkpoints cannot be written: File exists"):
        writer(tmp_path)
    (tmp_path / "run").mkdir()
    checkpoints = saved(tmp_path / "run", 5, 6)
    flip_bytes(tmp_path / "run" / "checkpoints" / "6")
    (tmp_path / "run" / "damaged_checkpoints").touch()
    with pytest.raises(UserError, match=r"checkpoints/6 cannot be moved to .*: File exists"):
        checkpoints.restore_latest(abstract_state(), "newest_good")
