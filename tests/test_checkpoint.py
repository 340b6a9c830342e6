"""What Orbax keeps, and that a save is of the moment it was asked for."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.checkpoint import Checkpoints
from jaxft.errors import UserError
from jaxft.steps import TrainState, replicate


def make_state(step: int, size: int = 4) -> TrainState:
    return replicate(TrainState(jnp.int32(step), {"w": jnp.full(size, step, jnp.float32)}, {}, ()))


def test_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step, accuracy in ((10, 0.3), (20, 0.8), (30, 0.5), (40, 0.6)):
        checkpoints.save(make_state(step), {"note": step}, accuracy)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [20, 40]
    assert (checkpoints.resolve("best"), checkpoints.resolve("latest"), checkpoints.resolve("40")) == (20, 40, 40)
    assert checkpoints.info(20) == {"note": 20}
    restored = checkpoints.restore(20, jax.eval_shape(lambda: make_state(0)))
    np.testing.assert_array_equal(restored.params["w"], [20, 20, 20, 20])
    with pytest.raises(UserError, match=r"no checkpoint '30'.*\[20, 40\]"):
        checkpoints.resolve("30")
    with pytest.raises(UserError, match="no checkpoint 'newest'"):
        checkpoints.resolve("newest")
    checkpoints.close()


def test_training_goes_on_while_a_save_is_written(tmp_path: Path) -> None:
    """The buffers that were saved are donated at once to steps that overwrite them."""
    state = make_state(1, size=4_000_000)
    step = jax.pmap(
        lambda state, _: TrainState(state.step + 1, {"w": state.params["w"] + 1}, {}, ()),
        axis_name="batch",
        in_axes=(None, 0),
        out_axes=None,
        donate_argnums=0,
    )
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {}, 0.5)
    for _ in range(50):
        state = step(state, np.zeros(jax.local_device_count()))
    jax.block_until_ready(state)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore(1, jax.eval_shape(lambda: make_state(1, size=4_000_000)))
    assert (np.asarray(restored.params["w"]) == 1).all()
    assert (np.asarray(state.params["w"]) == 51).all()
    checkpoints.close()


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(5, size=100_000), {}, 0.5)
    checkpoints.close()
    for path in (tmp_path / "checkpoints" / "5" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint 5 in .* cannot be restored"):
        checkpoints.restore(5, jax.eval_shape(lambda: make_state(0, size=100_000)))
    checkpoints.close()
