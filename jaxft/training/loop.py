"""The training loop's parts: mapped steps, calls of several steps, rows of metrics, divergence."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from jaxft.data.batches import Batch, Examples
from jaxft.errors import UserError
from jaxft.models.resnet import ResNet
from jaxft.run.checkpoints import Checkpoints, NotFiniteError
from jaxft.run.metrics_file import MetricsFile
from jaxft.run.signals import StopSignals
from jaxft.targets.classification import Counts
from jaxft.training.distill import Distillation, Teacher
from jaxft.training.evaluation import STEPS_AHEAD
from jaxft.training.state import TrainState
from jaxft.training.steps import StepConfig, train_step, train_steps
from jaxft.training.steps_per_call import scan_length
from jaxft.transforms.augment import make_augmentation
from jaxft.transforms.preprocessing import Preprocessing

TrainSteps = Callable[[TrainState, Examples | None, Batch, Any], tuple[TrainState, Counts]]  # the last: its `turns`


def epochs_evaluated(metrics: MetricsFile, step: int, steps_per_epoch: int) -> int:
    """After `step`: the epoch that it ends does not count before its evaluation is done."""
    epochs, rest = divmod(step, steps_per_epoch)
    return epochs - 1 if epochs and not rest and step not in metrics.accuracy else epochs


@contextmanager
def report_divergence(checkpoints: Checkpoints, learning_rate: optax.Schedule) -> Iterator[None]:
    """Turns NotFiniteError into a UserError. A checkpoint that led there at once is set aside: it is no good either."""
    try:
        yield
    except NotFiniteError as error:
        checkpoints.wait()
        if error.made_by in checkpoints.steps():
            checkpoints.set_aside(error.made_by)
        steps = checkpoints.steps()
        last_good = f"the last good checkpoint is {steps[-1]}" if steps else "there is no good checkpoint"
        raise UserError(
            f"{error} at step {error.step}, where the learning rate is {float(learning_rate(error.step - 1)):g}; "
            f"{last_good}; train in another --workdir with a lower optimizer.learning_rate"
        ) from None


def pmap_train_steps(
    config: ConfigDict,
    model: ResNet,
    tx: optax.GradientTransformation,
    preprocessing: Preprocessing,
    class_weights: tuple[float, ...] = (),
    teacher: Teacher | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Any:
    """Of (state, pictures, batches, the teacher's variables, turns). devices: other than all that there are."""
    distill = config.distill
    step = partial(
        train_step,
        model=model,
        tx=tx,
        preprocessing=preprocessing,
        step_config=StepConfig(config.seed, make_augmentation(config.augment), config.label_smoothing, class_weights),
        ema_decay=config.optimizer.ema_decay,
        distillation=teacher
        and Distillation(teacher.model, teacher.preprocessing, distill.weight, distill.temperature),
    )
    return jax.pmap(
        partial(train_steps, step=step),
        axis_name=model.axis_name,
        in_axes=(None, None, 0, None, None),  # state in natural shapes: no leading axis to add or strip
        out_axes=None,
        donate_argnums=0,
        devices=devices,
    )


def steps_between_checkpoints(first: int, last: int, every_steps: int) -> Iterator[int]:
    """After `first` steps, how many come before the next multiple of every_steps, and so on up to `last`."""
    while first < last:
        step = min((first // every_steps + 1) * every_steps, last) if every_steps else last
        yield step - first
        first = step


def run_steps(
    p_train_steps: TrainSteps,
    state: TrainState,
    examples: Examples | None,
    calls: Iterable[tuple[Batch, int]],
    stop: StopSignals,
) -> Iterator[tuple[TrainState, int, Counts, float]]:
    """The newest state, and each step with its counts and the seconds it took.

    Counts arrive STEPS_AHEAD calls late so that accelerators never wait; the last state is the one after the last.
    """
    calls_ahead = 0 if jax.default_backend() == "cpu" else STEPS_AHEAD
    step = launched = int(state.step)
    waiting = deque[tuple[Counts, int]]()
    started = time.monotonic()

    def arrived() -> Iterator[tuple[TrainState, int, Counts, float]]:
        nonlocal step, started
        counts, count = jax.device_get(waiting.popleft())
        before, started = started, time.monotonic()
        for i in range(count):
            step += 1
            yield state, step, jax.tree.map(lambda array, i=i: array[i], counts), (started - before) / count

    for batches, count in calls:  # which are read while the devices work
        if len(waiting) > calls_ahead:
            yield from arrived()
        if any([stop.reached(launched + i) for i in range(1, count + 1)]):  # noqa: C419, each has to be asked
            break
        state, counts = p_train_steps(state, examples, batches, scan_length(count))
        launched += count
        waiting.append((counts, count))
    while waiting:
        yield from arrived()


def metrics_row(step: int, epoch: int, split: str, counts: Counts, seconds: float) -> dict[str, Any]:
    """A line of metrics.jsonl; raises NotFiniteError where the loss is none."""
    num_images = int(counts.num_images)
    loss = float(counts.loss) / num_images
    if not math.isfinite(loss):
        raise NotFiniteError(f"the {split} loss is {loss}", step, made_by=step - 1 if split == "train" else step)
    return {
        "step": step,
        "epoch": epoch,
        "split": split,
        "loss": loss,
        "accuracy": float(counts.correct) / num_images,
        "images_per_second": round(num_images / seconds, 2),
        "seconds": round(seconds, 4),
    }
