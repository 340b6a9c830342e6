"""Checkpoints: the ones kept, that a save captures the state at its call, and that damaged ones are refused."""

import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.data.batches import replicate
from jaxft.errors import UserError
from jaxft.run.checkpoints import Checkpoints, DamagedCheckpointError, NotFiniteError, checksums
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
    metrics.accuracy.update(accuracy or {})
    return Checkpoints(Workdir(workdir), metrics, **options)


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
    checkpoints = Checkpoints(Workdir(tmp_path))
    assert checkpoints.steps() == [20, 40]
    assert (checkpoints.resolve("best"), checkpoints.resolve("latest"), checkpoints.resolve("40")) == (20, 40, 40)
    assert checkpoints.info(20)["note"] == 20
    restored = checkpoints.restore(20, abstract_state())
    np.testing.assert_array_equal(restored.params["w"], [20, 20, 20, 20])
    with pytest.raises(UserError, match=r"no checkpoint '30'.*\[20, 40\]"):
        checkpoints.resolve("30")
    with pytest.raises(UserError, match="no checkpoint 'newest'"):
        checkpoints.resolve("newest")
    checkpoints.close()


def test_only_evaluated_checkpoints_can_be_the_best(tmp_path: Path) -> None:
    checkpoints = writer(tmp_path, {10: 0.3}, keep_latest=2, keep_best=0)
    for step in (5, 10, 15):
        checkpoints.save(make_state(step), {})
        checkpoints.wait()
    assert checkpoints.steps() == [10, 15]
    assert checkpoints.resolve("best") == 10
    checkpoints.close()
    (tmp_path / "checkpoints" / "10").rename(tmp_path / "10")
    with pytest.raises(UserError, match="no checkpoint 'best'"):
        Checkpoints(Workdir(tmp_path)).resolve("best")


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
    checkpoints = Checkpoints(Workdir(tmp_path))
    restored = checkpoints.restore(1, abstract_state(4_000_000))
    assert (np.asarray(restored.params["w"]) == 1).all()
    assert (np.asarray(state.params["w"]) == 51).all()
    checkpoints.close()


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
    assert int(Checkpoints(Workdir(tmp_path)).restore(6, abstract_state(100_000)).step) == 6


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
    assert "checkpoint 2 could not be written" in error
    assert "checkpoint 1 stays" in error
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
