"""How batches are parted and called: pure functions of the train loop."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxft.steps import Batch, Pictures, train_steps
from jaxft.train import calls, up_to_checkpoints


def numbered(first: int, last: int) -> list[Batch]:
    return [Batch(np.array(step), np.array(step), np.array(1)) for step in range(first, last + 1)]


@given(done=st.integers(0, 50), count=st.integers(0, 50), every_steps=st.integers(0, 20), per_call=st.integers(1, 9))
def test_every_batch_has_its_turn(done: int, count: int, every_steps: int, per_call: int) -> None:
    batches = numbered(done + 1, done + count)
    parts = list(up_to_checkpoints(batches, done, every_steps))
    assert [batch for part in parts for batch in part] == batches
    ends = [int(part[-1].index) for part in parts]
    due = {step for step in range(done + 1, done + count + 1) if every_steps and step % every_steps == 0}
    assert set(ends) == due | ({done + count} if count else set())
    for part in parts:
        called = list(calls(part, per_call))
        assert [batch for call in called for batch in call] == part
        assert {len(call) for call in called} <= {1, per_call}
        assert len(called) == len(part) // per_call + len(part) % per_call


def test_a_cpus_steps_are_in_no_loop() -> None:
    """Not even in one of a single turn, in which XLA's convolutions on a CPU take twenty times as long."""

    def loops(loop: bool, per_call: int) -> int:
        def step(state: Any, pictures: Any, batch: Batch) -> Any:
            return state + batch.mask, state

        batches, pictures = Batch(*3 * [np.zeros(per_call, np.float32)]), Pictures(np.zeros(1), np.zeros(1))
        steps: Any = partial(train_steps, step=step, loop=loop)
        traced = jax.make_jaxpr(steps)(jnp.zeros(()), pictures, batches)
        return sum(equation.primitive.name in ("scan", "while") for equation in traced.jaxpr.eqns)

    assert [loops(False, per_call) for per_call in (1, 3)] == [0, 0]
    assert loops(True, 3) == 1
