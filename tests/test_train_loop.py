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


@given(done=st.integers(0, 50), count=st.integers(0, 50), every_steps=st.integers(0, 20), per_call=st.integers(1, 9))
def test_every_batch_has_its_turn(done: int, count: int, every_steps: int, per_call: int) -> None:
    numbers = range(done + 1, done + count + 1)
    batches = [Batch(np.array(step), np.array(step), np.array(1)) for step in numbers]
    rest = iter(batches)
    parts = [list(calls(rest, size, per_call)) for size in up_to_checkpoints(done, done + count, every_steps)]
    assert [batch for part in parts for call in part for batch in call] == batches
    ends = [int(part[-1][-1].index) for part in parts]
    assert set(ends) == {step for step in numbers if every_steps and step % every_steps == 0} | {*numbers[-1:]}
    for part in parts:
        size = sum(len(call) for call in part)
        assert {len(call) for call in part} <= {1, per_call}
        assert len(part) == size // per_call + size % per_call


def test_a_cpus_steps_are_in_no_loop() -> None:
    """Not even in one of a single turn, in which XLA's convolutions on a CPU take twenty times as long."""

    def loops(loop: bool, per_call: int) -> int:
        def step(state: Any, pictures: Any, batch: Batch, teacher: Any) -> Any:
            return state + batch.mask, state

        zeros = np.zeros(per_call, np.float32)
        batches, pictures = Batch(zeros, zeros, zeros), Pictures(np.zeros(1), np.zeros(1))
        steps: Any = partial(train_steps, step=step, loop=loop)
        traced = jax.make_jaxpr(steps)(jnp.zeros(()), pictures, batches)
        return sum(equation.primitive.name in ("scan", "while") for equation in traced.jaxpr.eqns)

    assert [loops(False, per_call) for per_call in (1, 3)] == [0, 0]
    assert loops(True, 3) == 1
