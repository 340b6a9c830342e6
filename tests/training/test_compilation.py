"""Programs are compiled once each, outside the main thread, and what goes wrong there appears in the main thread."""

import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import interrupts
from jaxft.config import default_config
from jaxft.data.batches import Batch, examples_for, replicate
from jaxft.data.datasets import load
from jaxft.data.loader import make_loader
from jaxft.errors import Interrupted
from jaxft.models.policy import Policy
from jaxft.models.resnet import ARCHITECTURES
from jaxft.run.signals import StopSignals
from jaxft.targets.classification import Counts
from jaxft.training import compilation
from jaxft.training.compilation import Compiler, Program
from jaxft.training.loop import make_train_programs, run_steps, steps_between_checkpoints
from jaxft.training.optimizer import make_optimizer
from jaxft.training.state import TrainState
from jaxft.training.steps import make_step_config
from jaxft.training.steps_per_call import StepsPerCall, stack_batches
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from tests.helpers.runs import Run


@pytest.fixture
def compilations() -> Iterator[Counter[bool]]:
    """Counts compiled programs, the small ones of single operations too: {in the main thread: count}."""
    found = Counter[bool]()

    def count(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            found[threading.current_thread() is threading.main_thread()] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    yield found
    jax.monitoring.unregister_event_duration_listener(count)


@pytest.mark.parametrize("stream", ["never", "always"])
@pytest.mark.parametrize("per_call", [StepsPerCall(4, padded=True, ahead=0), StepsPerCall(3)], ids=["padded", "static"])
def test_an_epoch_does_not_compile_in_the_main_thread(
    compilations: Counter[bool], monkeypatch: pytest.MonkeyPatch, stream: str, per_call: StepsPerCall
) -> None:
    """Two sizes in three epochs of 5 steps, with mixing partners, a teacher and checkpoints every 4 steps."""

    def step(state: TrainState, examples: Any, batch: Batch, teacher: Any, *, config: Any) -> tuple[TrainState, Counts]:
        images = examples_for(examples, batch).gather(jnp.concatenate([batch.index, batch.partner]))
        total = jax.lax.psum(images.mean() + teacher["w"].sum() + config.preprocessing.image_size, "batch")
        counts = Counts(total, total, jax.lax.psum(batch.mask.sum(), "batch"))
        return TrainState(state.step + 1, {"w": state.params["w"] * 0.5}, {}, ()), counts

    monkeypatch.setattr("jaxft.training.loop.train_step", step)
    devices = jax.device_count()
    data = load("sample:cifar10", "test")
    data = data._replace(image=data.image[: 10 * devices - 3], label=data.label[: 10 * devices - 3])
    config = default_config()
    config.update_from_flattened_dict(
        {
            "batch_size": 2 * devices,
            "num_epochs": 3,
            "image_size": 32,
            "augment.first_image_size": 16,
            "augment.num_image_sizes": 2,
            "data.stream": stream,
            "checkpoint.every_steps": 4,
        }
    )
    loader = make_loader(data, config.data, partners=True)
    model = ARCHITECTURES["resnet18"](num_classes=10)
    step_config = make_step_config(
        config,
        model,
        Policy(),
        make_optimizer(config.optimizer, 5, 3, model.parts),
        Preprocessing(32, IMAGENET_MEAN, IMAGENET_STD),
    )
    teacher, state = replicate({"w": jnp.ones(2)}), replicate(TrainState(jnp.int32(0), {"w": jnp.ones(3)}, {}, ()))
    programs = make_train_programs(config, step_config, state, loader, per_call, teacher)
    assert programs[1] is programs[2] is not programs[3]
    assert [programs[epoch].name for epoch in (1, 3)] == [
        "train step for 16 pixels",
        "train step for 32 pixels, from epoch 3",
    ]
    compilations.clear()
    with closing(Compiler()) as compiler:
        compiler.start(programs.values())
        for epoch, program in programs.items():
            compiler.wait(program)
            batches = loader.batches(np.arange(len(data.label)), config.batch_size)
            for number in steps_between_checkpoints(int(state.step), 5 * epoch, config.checkpoint.every_steps):
                calls = stack_batches(batches, number, per_call, first=epoch == 1)
                state = run_steps(program.call, state, calls, per_call, StopSignals(), lambda *_: None)
    assert int(state.step) == 15
    assert compilations == {False: 2 if per_call.padded else 4}


def program(work: Callable[[], Any], name: str = "step") -> Program:
    class Function:
        def lower(self, *_: Any) -> "Function":
            return self

        def compile(self) -> None:
            work()

    return Program(name, lambda: None, Function(), [()])


def test_a_failure_in_the_background_is_tried_again_when_the_program_is_needed() -> None:
    attempts: list[bool] = []

    def work() -> None:
        attempts.append(threading.current_thread() is threading.main_thread())
        raise MemoryError("RESOURCE_EXHAUSTED")

    failing, good = program(work), program(lambda: None)
    with closing(Compiler()) as compiler:
        compiler.start([failing, good])
        compiler.wait(good)
        assert attempts == [False]
        with pytest.raises(MemoryError, match="RESOURCE_EXHAUSTED"):
            compiler.wait(failing)
    assert attempts == [False, False]


def test_what_is_compiled_is_shown_if_it_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "SHOWN_AFTER", 0.2)
    monkeypatch.setattr(compilation, "LONG", 0.4)
    quick, slow, later = program(lambda: None), program(lambda: time.sleep(0.5), "a"), program(lambda: None, "c")
    ahead = program(lambda: time.sleep(0.3), "b")
    with closing(Compiler()) as compiler:
        compiler.start([quick, slow, ahead, later])
        for each in (quick, slow):
            compiler.wait(each)
        time.sleep(0.4)
        for each in (ahead, later):
            compiler.wait(each)
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert [re.sub(r"\d+", "N", line) for line in stderr.splitlines()] == [
        "compiling the a",
        "compiled the a in N s",
        "compiled the b in the background, in N s",
    ]


def test_a_signal_does_not_wait_for_a_compilation() -> None:
    released = threading.Event()
    try:
        with pytest.raises(Interrupted), StopSignals(), closing(Compiler()) as compiler:
            threading.Timer(
                0.1, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            ).start()
            compiler.wait(program(lambda: released.wait(20)))
        assert not released.is_set()
    finally:
        released.set()
        interrupts.forget()


# The command ends, in one of several ways, while XLA compiles for some seconds.
ENDS = """
import os, signal, sys, threading, time
from contextlib import closing
from jaxft import cli, interrupts, process, train
from jaxft.errors import UserError
from jaxft.run.signals import StopSignals
import jax, jax.numpy as jnp

def main(argv):
    from jaxft.training.compilation import Compiler, Program

    def slow(x):
        for i in range(500):
            x = jnp.sin(x) @ jnp.cos(x + i)[::-1] + jnp.sort(x, 0)
        return x

    slow = jax.jit(slow)
    program = Program("step", slow, slow, [(jnp.ones((64, 64)),)])
    with StopSignals(), closing(Compiler()) as compiler:
        compiler.start([program])
        interrupts.protect_results()
        time.sleep(2)
        if how == "error":
            raise UserError("diverged")
        if how != "normal":
            os.kill(os.getpid(), getattr(signal, how))
            compiler.wait(program)

how = sys.argv[1]
process.is_command = lambda: True
process.reexec_with_huge_pages = lambda: None
train.main = main
cli.run("train", [])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("normal", 0), ("error", 2), ("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("attempt", range(5))
def test_a_command_ends_during_a_compilation(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, code: int, attempt: int
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    result = run("-c", ENDS, how)
    assert result.returncode == code, result.stderr
    assert len(result.stderr.splitlines()) <= 2 + (code == 130 or code == 143)
    assert not list(tmp_path.glob("*slow*"))  # it had not been compiled yet
