"""The training loop: mapped steps, an epoch of them, rows of metrics, and the handling of divergence."""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxft.config import count_steps_per_epoch
from jaxft.data.batches import Batch, epoch_order, sampled_order
from jaxft.data.dataset import Dataset
from jaxft.data.loader import Loader
from jaxft.errors import Interrupted, UserError
from jaxft.models.partition import make_policy
from jaxft.models.policy import Policy
from jaxft.progress import Progress
from jaxft.run.checkpoints import Checkpoints, NotFiniteError
from jaxft.run.metrics_file import MetricsFile
from jaxft.run.processes import with_compile_barrier
from jaxft.run.signals import StopSignals
from jaxft.run.trackers import Trackers
from jaxft.targets.joint import Targets, losses_of
from jaxft.training.compilation import Compiler, Program, abstract
from jaxft.training.state import TrainState
from jaxft.training.steps import StepConfig, train_step, train_steps
from jaxft.training.steps_per_call import StepsPerCall, abstract_calls, stack_batches
from jaxft.transforms.preprocessing import epoch_image_size

TrainSteps = Callable[[TrainState, Batch, Any], tuple[TrainState, Any]]  # (state, stacked batches, num_steps)


def pmap_train_steps(config: StepConfig, devices: Sequence[jax.Device] | None = None) -> Any:
    """Returns the pmapped (state, examples, batches, teacher_variables, num_steps) -> (state, counts).

    devices: all by default.
    """
    return jax.pmap(
        partial(train_steps, step=partial(train_step, config=config)),
        axis_name=config.policy.axis_name,
        in_axes=(None, None, 0, None, None),  # state in natural shapes: no leading axis to add or strip
        out_axes=None,
        donate_argnums=0,
        devices=devices,
    )


def make_train_programs(
    config: ConfigDict,
    step_config: StepConfig,
    state: TrainState,
    loader: Loader,
    per_call: StepsPerCall,
    teacher_variables: Any,
) -> dict[int, Program]:
    """Returns the program of each epoch that has steps left after `state`.

    The frozen parameters and the image size depend on the epoch; each combination is one program.
    """
    steps_per_epoch = count_steps_per_epoch(config, loader.num_examples)
    settings: dict[int, tuple[Policy, int]] = {}  # by epoch
    numbers = defaultdict[tuple[Policy, int], list[int]](list)  # of steps between two checkpoints
    for epoch in range(int(state.step) // steps_per_epoch + 1, config.num_epochs + 1):
        size = epoch_image_size(
            config.augment.first_image_size,
            config.image_size,
            epoch,
            config.num_epochs,
            config.augment.num_image_sizes,
            step_config.model.patch_size,
        )
        settings[epoch] = make_policy(config, step_config.model, epoch), size
        first, last = max(int(state.step), (epoch - 1) * steps_per_epoch), epoch * steps_per_epoch
        numbers[settings[epoch]] += steps_between_checkpoints(first, last, config.checkpoint.every_steps)
    abstract_state = abstract(state)

    def program(first: int, policy: Policy, image_size: int) -> Program:
        preprocessing = step_config.preprocessing.at_size(image_size)
        function = pmap_train_steps(step_config._replace(policy=policy, preprocessing=preprocessing))
        steps = with_compile_barrier(function)
        calls = abstract_calls(loader, config.batch_size, numbers[policy, image_size], per_call)
        return Program(
            f"train step for {image_size} pixels" + (f", from epoch {first}" if first > 1 else ""),
            lambda state, batches, num_steps: steps(state, loader.examples, batches, teacher_variables, num_steps),
            function,
            [(abstract_state, examples, batches, teacher_variables, steps) for examples, batches, steps in calls],
        )

    firsts = {key: epoch for epoch, key in reversed(settings.items())}
    programs = {key: program(firsts[key], *key) for key in numbers}
    return {epoch: programs[key] for epoch, key in settings.items()}


@dataclass(frozen=True)
class Trainer:
    """Everything that training an epoch needs besides the state."""

    config: ConfigDict
    programs: dict[int, Program]  # train steps, by epoch
    compiler: Compiler
    loader: Loader
    steps_per_epoch: int
    per_call: StepsPerCall
    first_step: int  # the run starts or resumes after this step
    recalibrate: Callable[[TrainState], TrainState]
    targets: Targets
    order: Callable[[int], np.ndarray]  # of an epoch's images
    checkpoints: Checkpoints
    info: dict[str, Any]  # stored with each checkpoint
    writers: tuple[MetricsFile, Trackers]

    def record(self, row: dict[str, Any]) -> None:
        """Writes a row of metrics to metrics.jsonl and to the trackers."""
        for writer in self.writers:
            writer.write(row)

    def close(self) -> None:
        """Waits for the checkpoint that is being written, closes the files and drops what is left to compile."""
        with ExitStack() as stack:
            for resource in (*self.writers, self.checkpoints, self.compiler):
                stack.callback(resource.close)


def train_epoch(trainer: Trainer, state: TrainState, epoch: int, stop: StopSignals) -> TrainState:
    """Trains from `state` to the end of the epoch, with a checkpoint there and every config.checkpoint.every_steps.

    Raises Interrupted, after saving a checkpoint, if a signal arrived. The order matters: a step's row of metrics is
    written before its checkpoint, because a run resumes from the checkpoint and keeps the rows up to it.
    """
    config, checkpoints = trainer.config, trainer.checkpoints
    last_step = epoch * trainer.steps_per_epoch
    order = trainer.order(epoch)
    order = order[(int(state.step) - (last_step - trainer.steps_per_epoch)) * config.batch_size :]  # the rest of it
    batches = trainer.loader.batches(order, config.batch_size)
    if int(state.step) < last_step:
        trainer.compiler.wait(trainer.programs[epoch])
    with Progress(f"epoch {epoch}/{config.num_epochs}", len(order)) as progress:

        def on_step(step: int, counts: Any, seconds: float) -> None:
            num_images = int(counts.num_images)
            row = metrics_row(step, epoch, "train", losses_of(trainer.targets, counts), num_images, seconds)
            trainer.record(row)
            progress.update(num_images, row["loss"])
            stop.protect_results()
            checkpoints.poll()

        for num_steps in steps_between_checkpoints(int(state.step), last_step, config.checkpoint.every_steps):
            is_first = int(state.step) == trainer.first_step
            calls = stack_batches(batches, num_steps, trainer.per_call, first=is_first)
            state = run_steps(trainer.programs[epoch].call, state, calls, trainer.per_call, stop, on_step)
            if config.model.batch_norm == "recalibrate" and int(state.step) == last_step and epoch == config.num_epochs:
                state = trainer.recalibrate(state)
            checkpoints.save(state, trainer.info)
            stop.saved_step = int(state.step)
            if stop.received:
                checkpoints.finish(state, trainer.info)
                raise Interrupted(stop.received)
    return state


def order_of(config: ConfigDict, data: Dataset, epoch: int) -> np.ndarray:
    """Returns an epoch's order of images, int64 (N,), by data.sampling: a pure function of seed and epoch."""
    power = {"none": 0.0, "sqrt": 0.5, "balanced": 1.0}[config.data.sampling]
    if not power:
        return epoch_order(config.seed, epoch, data.num_examples)
    label, _ = data.first_class()
    return sampled_order(config.seed, epoch, label, power)


def steps_between_checkpoints(first: int, last: int, every_steps: int) -> Iterator[int]:
    """Yields the numbers of steps between checkpoints: at multiples of every_steps (0: none), and at `last`."""
    while first < last:
        step = min((first // every_steps + 1) * every_steps, last) if every_steps else last
        yield step - first
        first = step


def run_steps(
    p_train_steps: TrainSteps,
    state: TrainState,
    calls: Iterable[tuple[Batch, int]],
    per_call: StepsPerCall,
    stop: StopSignals,
    on_step: Callable[[int, Any, float], None],
) -> TrainState:
    """Runs calls of stacked batches until they end or a signal arrives; returns the state after the last step.

    on_step receives each step with its counts and seconds, per_call.ahead calls late so that accelerators never wait.
    """
    step = launched = int(state.step)
    waiting = deque[tuple[Any, int]]()
    started = time.monotonic()

    def report_oldest_call() -> None:
        nonlocal step, started
        counts, count = jax.device_get(waiting.popleft())
        before, started = started, time.monotonic()
        for i in range(count):
            step += 1
            on_step(step, jax.tree.map(lambda array, i=i: array[i], counts), (started - before) / count)

    for batches, count in calls:  # read while the devices work
        if len(waiting) > per_call.ahead:
            report_oldest_call()
        # Every process must call it for every step, in order, even after a signal: hence the list, not a generator.
        if any([stop.reached(launched + i) for i in range(1, count + 1)]):  # noqa: C419, see above
            break
        state, counts = p_train_steps(state, batches, per_call.scan_length(count))
        launched += count
        waiting.append((counts, count))
    while waiting:
        report_oldest_call()
    return state


# More than six parameters: the columns of a row.
def metrics_row(
    step: int, epoch: int, split: str, values: Mapping[str, Any], num_images: int, seconds: float
) -> dict[str, Any]:
    """Returns a row of metrics.jsonl. values: the loss and metrics. Raises NotFiniteError if the loss is not finite."""
    if not math.isfinite(values["loss"]):
        text = f"the {split} loss is {values['loss']}"
        raise NotFiniteError(text, step, made_by=step - 1 if split == "train" else step)
    return {
        "step": step,
        "epoch": epoch,
        "split": split,
        **values,
        "images_per_second": round(num_images / seconds, 2),
        "seconds": round(seconds, 4),
    }


def epochs_evaluated(metrics: MetricsFile, step: int, steps_per_epoch: int) -> int:
    """Returns how many epochs are complete after `step`; the last one counts only once it has been evaluated."""
    epochs, rest = divmod(step, steps_per_epoch)
    return epochs - 1 if epochs and not rest and step not in metrics.scores else epochs


@contextmanager
def report_divergence(checkpoints: Checkpoints, learning_rate: optax.Schedule, optimizer: ConfigDict) -> Iterator[None]:
    """Turns NotFiniteError into a UserError that names the settings which help. optimizer: the config's section.

    A checkpoint whose very next step diverged is set aside: it cannot be resumed from either.
    """
    try:
        yield
    except NotFiniteError as error:
        checkpoints.wait()
        if error.made_by in checkpoints.steps():
            checkpoints.set_aside(error.made_by)
        steps = checkpoints.steps()
        last_good = f"the last good checkpoint is {steps[-1]}" if steps else "there is no good checkpoint"
        if error.made_by == 0:  # no update has been made
            raise UserError(
                f"{error} at step {error.step}, before any update: the network's output is not finite; choose another "
                "model.pretrained, or model.dtype=float32"
            ) from None
        rate = float(learning_rate((error.step - 1) // optimizer.accumulate_steps))
        clip = f" below {optimizer.clip_norm:g}" if optimizer.clip_norm else "=1"
        raise UserError(
            f"{error} at step {error.step}, where the learning rate is {rate:g}; {last_good}; train in another "
            f"--workdir with optimizer.clip_norm{clip} or a lower optimizer.learning_rate"
        ) from None
