"""Tests how batches are divided into calls, and the loop that makes the calls."""

import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.config import default_config
from jaxft.data.batches import Batch
from jaxft.errors import MESSAGE_LENGTH, UserError
from jaxft.models.resnet import ARCHITECTURES
from jaxft.ops.formulation import Formulation
from jaxft.run.checkpoints import Checkpoints, NotFiniteError
from jaxft.run.metrics_file import MetricsFile
from jaxft.run.signals import StopSignals
from jaxft.run.workdir import Workdir
from jaxft.targets.classification import Counts
from jaxft.training.loop import report_divergence, run_steps, steps_between_checkpoints
from jaxft.training.state import TrainState
from jaxft.training.steps import scan_prefix, train_steps
from jaxft.training.steps_per_call import STEPS_AHEAD, StepsPerCall, choose_steps_per_call, stack_batches


@given(
    done=st.integers(0, 50),
    count=st.integers(0, 50),
    every_steps=st.integers(0, 20),
    per_call=st.integers(1, 9),
    padded=st.booleans(),
)
def test_every_batch_is_trained_on_once(done: int, count: int, every_steps: int, per_call: int, padded: bool) -> None:
    numbers = range(done + 1, done + count + 1)
    rest = iter([Batch(np.full(1, step), np.full(1, step), np.ones(1)) for step in numbers])
    calls = StepsPerCall(per_call, padded)
    sizes = enumerate(steps_between_checkpoints(done, done + count, every_steps))
    parts = [list(stack_batches(rest, size, calls, first=not i)) for i, size in sizes]
    trained = [[step for batches, length in part for step in batches.index[0, :length].tolist()] for part in parts]
    assert [step for part in trained for step in part] == list(numbers)
    assert {part[-1] for part in trained} == {step for step in numbers if every_steps and step % every_steps == 0} | {
        *numbers[-1:]
    }
    compiled = {batches.index.shape[1] for part in parts for batches, _ in part}
    if padded:
        assert compiled <= {per_call}
        assert [length for part in parts[:1] for _, length in part[:1]] == [1][:count]
    else:
        assert compiled <= {1, per_call}
        assert all(length == batches.index.shape[1] for part in parts for batches, length in part)


@pytest.mark.parametrize("num_steps", [None, 0, 1, 3])
def test_train_steps_takes_num_steps(num_steps: int | None) -> None:
    def step(state: Any, examples: Any, batch: Batch, teacher_variables: Any) -> Any:
        return state + batch.index, Counts(batch.index, state, batch.mask)

    batches = Batch(np.array([3, 5, 7]), np.zeros(3), np.ones(3))
    traced: Any = np.int32(num_steps) if num_steps is not None else None
    state, counts = jax.jit(partial(train_steps, step=step))(jnp.int32(100), None, batches, None, traced)
    done = 3 if num_steps is None else num_steps
    assert int(state) == 100 + sum([3, 5, 7][:done])
    np.testing.assert_array_equal(counts.loss, [3, 5, 7][:done] + [0] * (3 - done))
    np.testing.assert_array_equal(counts.correct, [100, 103, 108][:done] + [0] * (3 - done))


@pytest.mark.parametrize(
    ("image_size", "batch_size", "setting", "train", "test"),
    [(224, 64, 0, 1, 2), (224, 16, 0, 3, 8), (64, 32, 0, 8, 8), (64, 32, 5, 5, 5)],
)
def test_a_call_on_a_cpu_takes_some_seconds(
    image_size: int, batch_size: int, setting: int, train: int, test: int
) -> None:
    """On accelerators it takes as many steps as the config says, or one."""
    config = default_config()
    config.update(image_size=image_size, batch_size=batch_size, steps_per_call=setting)

    def found(formulation: Formulation) -> list[StepsPerCall]:
        model = ARCHITECTURES["resnet50"](num_classes=10, formulation=formulation)
        return [choose_steps_per_call(config, model, train=train) for train in (True, False)]

    for formulation in ("cpu", "cpu-onednn"):
        assert found(formulation) == [StepsPerCall(train, True, 0), StepsPerCall(test, True, STEPS_AHEAD)]
    assert found("gpu") == found("tpu") == 2 * [StepsPerCall(setting or 1, False, STEPS_AHEAD)]


def test_a_loop_of_traced_length_traces_its_body_once() -> None:
    """Tracing a ResNet-50's step takes a second or two."""
    traced = 0

    def step(total: Any, number: Any) -> Any:
        nonlocal traced
        traced += 1
        return total + number, 100 * number

    first = jax.jit(lambda num_steps: scan_prefix(num_steps, step, jnp.int32(0), jnp.array([3, 5, 7], jnp.int32)))
    total, each = first(np.int32(2))
    assert total == 8 and traced == 1
    np.testing.assert_array_equal(each, [300, 500, 0])


@pytest.mark.parametrize(
    ("clip_norm", "step", "parts"),
    [
        (0.0, 1_000_000, ["at step 1000000, where the learning rate is 0.00171", "optimizer.clip_norm=1 or a lower"]),
        (0.5, 7, ["where the learning rate is", "optimizer.clip_norm below 0.5 or a lower optimizer.learning_rate"]),
        (0.0, 1, ["before any update", "model.pretrained"]),
    ],
)
def test_divergence_names_the_step_and_what_helps(
    clip_norm: float, step: int, parts: list[str], tmp_path: Path
) -> None:
    config = default_config().optimizer
    config.clip_norm = clip_norm
    workdir = Workdir(tmp_path / "run")
    checkpoints = Checkpoints(workdir, MetricsFile(workdir.metrics))
    what = "params/layer4/2/downsample/0/kernel is not finite" if step > 1 else "the train loss is nan"
    with pytest.raises(UserError) as error, report_divergence(checkpoints, lambda _: jnp.float32(0.00171), config):
        raise NotFiniteError(what, step, made_by=step - 1)
    assert all(part in str(error.value) for part in [what, *parts])
    assert len(f"error: {error.value}") <= MESSAGE_LENGTH


def test_signals_are_handled_while_a_cpu_computes() -> None:
    heard, in_time = threading.Event(), []

    def work(number: Any) -> Any:
        in_time.append(heard.wait(20))
        return number

    def step(state: Any, examples: Any, batch: Batch, teacher_variables: Any) -> Any:
        return state, Counts(jax.pure_callback(work, batch.mask, batch.mask), batch.mask, batch.mask)

    one = np.ones((1, 1), np.float32)
    each: Any = jax.jit(partial(train_steps, step=step))
    steps: Any = lambda state, batches, num_steps: each(  # noqa: E731
        state, None, jax.tree.map(lambda array: array[0], batches), None, num_steps
    )
    found: list[int] = []
    state = TrainState(jnp.int32(0), {}, {}, ())
    before = signal.signal(signal.SIGALRM, lambda *_: heard.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        calls = [(Batch(one, one, one), 1)]
        run_steps(steps, state, calls, StepsPerCall(1, True, 0), StopSignals(), lambda step, *_: found.append(step))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert in_time == [True] and found == [1]
