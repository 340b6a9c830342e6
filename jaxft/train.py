"""Fine-tunes a ResNet on labelled pictures.

python -m jaxft.train --config configs/cifar10.py [--workdir DIR] [--config.KEY=VALUE ...]

The same command with the same workdir goes on where it stopped.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxft import bucket, datasets, report
from jaxft.augment import NO_AUGMENTATION, make_augmentation
from jaxft.backend import set_up_backend
from jaxft.batch_size import largest_batch_size
from jaxft.calls import batches_per_call, calls, turns
from jaxft.checkpoint import (
    Checkpoints,
    NotFiniteError,
    check_workdir,
    has_checkpoint,
    load_checkpoint,
    workdir_lock,
    write_config,
)
from jaxft.config import default_config, explanations, flatten, load_config, parse_overrides
from jaxft.distill import Distillation, Teacher
from jaxft.distributed import compiled_by_all, on_all, run_together
from jaxft.errors import ArgumentParser, Interrupted, UserError
from jaxft.evaluate import (
    STEPS_AHEAD,
    evaluate_pictures,
    extract_features,
    pmap_eval_steps,
    recalibrate,
    with_its_convolutions,
)
from jaxft.feed import OnDevices, make_feed
from jaxft.folding import fold_norms
from jaxft.interrupt import StopSignals
from jaxft.metrics import MetricsFile
from jaxft.optimizer import learning_rate_schedule, make_optimizer
from jaxft.parts import freeze, table, trains_head_alone
from jaxft.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, epoch_image_size
from jaxft.pretrained import load_pretrained, replace_head
from jaxft.progress import Progress
from jaxft.resnet import ResNet, make_model
from jaxft.steps import (
    Batch,
    Counts,
    Objective,
    Pictures,
    TrainState,
    abstract_train_state,
    count_predictions,
    create_train_state,
    initial_train_state,
    replicate,
    train_step,
    train_steps,
)
from jaxft.trackers import Trackers, check_trackers

TrainSteps = Callable[[TrainState, Pictures | None, Batch, Any], tuple[TrainState, Counts]]  # the last: its `turns`


def train_and_evaluate(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains for config.num_epochs, with a checkpoint and an evaluation after each; resumes from the latest one.

    workdir: a folder, or a URL such as gs://BUCKET/RUN. Raises UserError for what the user can mend, before anything
    is written; Interrupted for SIGTERM and Ctrl-C.
    """
    folder = bucket.training_folder(workdir)
    with workdir_lock(folder), bucket.kept_like(workdir, folder):
        return _train_and_evaluate(config, folder)


def _train_and_evaluate(config: ConfigDict, workdir: Path) -> TrainState:
    config = ConfigDict(config.to_dict())
    check_workdir(config, workdir)
    check_batch_size(config.batch_size)
    check_trackers(config.log)

    # data
    train_data = datasets.load_config_data(config.data, config.data.train_split, config.image_size)
    eval_data = datasets.load_config_data(
        config.data, config.data.eval_split, config.image_size, train_data.class_names
    )
    train_size = len(train_data.label)
    if not config.batch_size:
        config.batch_size = find_batch_size(config, train_data, eval_data)
    steps_per_epoch = math.ceil(train_size / config.batch_size)
    last_step = steps_per_epoch * config.num_epochs

    # model
    model = freeze(make_model(config.model, len(train_data.class_names)), config.optimizer, config.num_epochs)
    tx = make_optimizer(config.optimizer, steps_per_epoch, config.num_epochs)

    # weights and state
    metrics = MetricsFile(workdir / "metrics.jsonl")
    if on_all(has_checkpoint(workdir)):
        checkpoints = Checkpoints(workdir, metrics, config.checkpoint.keep_latest, config.checkpoint.keep_best)
        abstract_state = abstract_train_state(model, tx, ema=config.optimizer.ema_decay > 0)
        info, state = checkpoints.restore_latest(abstract_state, config.checkpoint.on_damage)
        check_data(info, train_data, workdir)
        teacher = load_teacher(config.distill.teacher, train_data.class_names, info.get("teacher_checkpoint", "best"))
    else:
        state, provenance = initial_state(config, model, tx)
        teacher = load_teacher(config.distill.teacher, train_data.class_names, "best")
        info = run_info(config, train_data, provenance, teacher)
        write_config(config, workdir)
        checkpoints = Checkpoints(workdir, metrics, config.checkpoint.keep_latest, config.checkpoint.keep_best)
        state = replicate(state)
    model = with_its_convolutions(model, state, config, train_size)
    teacher = teacher and teacher._replace(model=teacher.model.clone(by_onednn=model.by_onednn))
    trackers = Trackers(config, workdir, metrics.open(last_step=int(state.step)))
    first_epoch = epochs_evaluated(metrics, int(state.step), steps_per_epoch) + 1
    print_start(config, workdir, model, state, info, train_data, eval_data, first_epoch)

    # loop
    if first_epoch <= config.num_epochs and jax.process_index() == 0:
        print("compiling the first step, which takes a while", file=sys.stderr, flush=True)
    preprocessing = Preprocessing(**info["preprocessing"])
    image_size = partial(
        epoch_image_size, config.augment.first_image_size, config.image_size, num_epochs=config.num_epochs
    )
    learning_rate = learning_rate_schedule(config.optimizer, steps_per_epoch, config.num_epochs)

    balanced = config.class_weights == "balanced"
    class_weights = balanced_class_weights(train_data.label, model.num_classes) if balanced else ()

    @cache
    def compiled(model: ResNet, size: int) -> TrainSteps:
        mapped = pmap_train_steps(config, model, tx, preprocessing._replace(image_size=size), class_weights, teacher)
        steps, variables = compiled_by_all(mapped), teacher and teacher.variables
        return lambda state, pictures, batches, turns: steps(state, pictures, batches, variables, turns)

    per_call, tests_per_call = (batches_per_call(config, model, state, train=train) for train in (True, False))
    resumed_at = int(state.step)
    p_eval_steps = pmap_eval_steps(model, preprocessing)
    mixed = config.augment.mixup > 0 or config.augment.cutmix > 0
    train_feed, eval_feed = make_feed(train_data, config.data, partners=mixed), make_feed(eval_data, config.data)
    if first_epoch <= config.num_epochs and features_suffice(config, model):
        train_feed, eval_feed = (
            OnDevices(
                replicate(extract_features(seeing, preprocessing, state, feed, config.batch_size, tests_per_call))
            )
            for seeing, feed in ((model.clone(test_flip=False), train_feed), (model, eval_feed))
        )
    with (
        StopSignals() as stop,
        closing(metrics),
        closing(trackers),
        closing(checkpoints),
        divergence_told(checkpoints, learning_rate),
    ):
        for epoch in range(first_epoch, config.num_epochs + 1):
            order = datasets.epoch_order(config.seed, epoch, train_size)
            order = order[(int(state.step) - (epoch - 1) * steps_per_epoch) * config.batch_size :]  # what is to come
            batches = train_feed.batches(order, config.batch_size)
            p_train_steps = compiled(freeze(model, config.optimizer, epoch), image_size(epoch))
            with Progress(f"epoch {epoch}/{config.num_epochs}", len(order)) as progress, stop.deferred():
                parts = up_to_checkpoints(int(state.step), epoch * steps_per_epoch, config.checkpoint.every_steps)
                for num_steps in parts:
                    part = calls(batches, num_steps, per_call, first=int(state.step) == resumed_at)
                    steps = run_steps(p_train_steps, state, train_feed.pictures, part, stop)
                    for state, step, counts, seconds in steps:  # noqa: B007, the last one's state is the part's
                        row = metrics_row(step, epoch, "train", counts, seconds)
                        metrics.write(**row)
                        trackers.write(row)
                        progress.update(int(counts.pictures), row["loss"])
                        checkpoints.poll()
                    if config.model.batch_norm == "recalibrate" and int(state.step) == last_step:
                        state = recalibrate(model, preprocessing, state, train_feed, config.batch_size, per_call)
                    checkpoints.save(state, info)
                    if stop.received:
                        checkpoints.finish(state, info)
                        raise Interrupted(stop.received, f"the same command goes on after step {int(state.step)}")

            started = time.monotonic()
            predictions = evaluate_pictures(p_eval_steps, state, eval_feed, config.batch_size, tests_per_call)
            counts = count_predictions(predictions)
            row = metrics_row(int(state.step), epoch, "eval", counts, time.monotonic() - started)
            metrics.write(**row)
            trackers.write(row)
            print(f"Epoch [{epoch}/{config.num_epochs}], Test Accuracy: {row['accuracy']:.2%}", flush=True)
            if jax.process_index() == 0:
                report.update(workdir, info, eval_data, predictions)
        checkpoints.finish(state, info)
    again = f"python -m jaxft.evaluate --workdir {bucket.shown_as(workdir)}"
    print(f"done; look at {workdir / 'report.html'}, and test again by: {again}")
    if config.note:
        print(config.note)
    return state


def epochs_evaluated(metrics: MetricsFile, step: int, steps_per_epoch: int) -> int:
    """After `step`: the epoch that it ends does not count before its evaluation is done."""
    epochs, rest = divmod(step, steps_per_epoch)
    return epochs - 1 if epochs and not rest and step not in metrics.accuracy else epochs


@contextmanager
def divergence_told(checkpoints: Checkpoints, learning_rate: optax.Schedule) -> Iterator[None]:
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


def find_batch_size(config: ConfigDict, train_data: datasets.Dataset, eval_data: datasets.Dataset) -> int:
    """What config.batch_size = 0 stands for, on the devices that there are now."""
    model = freeze(make_model(config.model, len(train_data.class_names)), config.optimizer, config.num_epochs)
    tx = make_optimizer(config.optimizer, steps_per_epoch=1, num_epochs=1)
    state = abstract_train_state(model, tx, ema=config.optimizer.ema_decay > 0)
    teacher = load_teacher(config.distill.teacher, train_data.class_names, "best")
    preprocessing = Preprocessing(config.image_size, IMAGENET_MEAN, IMAGENET_STD)
    steps = pmap_train_steps(config, model, tx, preprocessing, teacher=teacher)

    def compile_step(pictures: Pictures, batch: Batch) -> Any:
        return steps.lower(state, pictures, batch, teacher and teacher.variables, turns(1)).compile()

    stream = config.data.stream
    resident = sum(data.image.nbytes for data in (train_data, eval_data) if not datasets.is_streamed(data, stream))
    return largest_batch_size(compile_step, train_data, datasets.device_memory(), resident)


def check_batch_size(batch_size: int) -> None:
    devices = jax.device_count()
    if batch_size % devices:
        below = batch_size // devices * devices
        hint = f"{below} or {below + devices}" if below else f"{devices}"
        raise UserError(f"batch_size {batch_size} cannot be shared equally by {devices} devices; use {hint}")


def initial_state(
    config: ConfigDict, model: ResNet, tx: optax.GradientTransformation
) -> tuple[TrainState, dict[str, Any]]:
    """Step 0 with pretrained weights and a new head, or with random weights; and where they come from."""
    rng = jax.random.key(config.seed)
    ema = config.optimizer.ema_decay > 0
    if not config.model.pretrained:
        return jax.jit(partial(create_train_state, model, tx, ema=ema))(rng), {"source": "random initialisation"}
    weights = load_pretrained(config.model.pretrained, config.model.arch)
    for key in ("width", "stem"):
        there = weights.provenance.get(key, config.model[key])
        if there != config.model[key]:
            raise UserError(f"{config.model.pretrained} has {key} {there}; set --config.model.{key} to it")
    variables = jax.tree.map(np.float32, weights.variables)
    variables = replace_head(variables, model.num_classes, rng)
    return initial_train_state(model, tx, variables, ema=ema), weights.provenance


def load_teacher(workdir: str, class_names: tuple[str, ...], which: str) -> Teacher | None:
    """The network to learn from, of a run's checkpoint; raises UserError where it knows other classes."""
    if not workdir:
        return None
    step, info, model, state = load_checkpoint(workdir, which)
    if tuple(info["class_names"]) != class_names:
        raise UserError(f"distill.teacher {workdir} knows other classes than the data: {info['class_names']}")
    model, variables = fold_norms(model, replicate(state.variables()))
    return Teacher(model, Preprocessing(**info["preprocessing"]), variables, step)


def run_info(
    config: ConfigDict, train_data: datasets.Dataset, provenance: dict[str, Any], teacher: Teacher | None
) -> dict[str, Any]:
    """What a checkpoint holds besides the state, so that it can be used with nothing else at hand."""
    info = {"teacher_checkpoint": str(teacher.checkpoint)} if teacher else {}
    return info | {
        "config": config.to_dict(),
        "class_names": list(train_data.class_names),
        "train_size": len(train_data.label),
        "preprocessing": {
            "image_size": config.image_size,
            "mean": provenance.get("mean", IMAGENET_MEAN),
            "std": provenance.get("std", IMAGENET_STD),
        },
        "weights": provenance,
        "versions": {name: version(name) for name in ("jaxft", "jax", "flax", "optax", "orbax-checkpoint")},
    }


def check_data(info: dict[str, Any], train_data: datasets.Dataset, workdir: Path) -> None:
    """Raises UserError where the pictures are not those that the run began with."""
    if (info["train_size"], info["class_names"]) != (len(train_data.label), list(train_data.class_names)):
        raise UserError(f"{workdir} began with {info['train_size']} other pictures to train; name another --workdir")


def features_suffice(config: ConfigDict, model: ResNet) -> bool:
    """Whether the head sees the same of a picture in every epoch, so that the backbone needs to see it only once."""
    augmented = make_augmentation(config.augment) != NO_AUGMENTATION or config.augment.first_image_size > 0
    return trains_head_alone(model) and not augmented and not config.distill.teacher


def balanced_class_weights(label: np.ndarray, num_classes: int) -> tuple[float, ...]:
    """N / (C n_c) for a class of n_c pictures: the classes' weights as sklearn's class_weight="balanced" has them."""
    counts = np.maximum(np.bincount(label, minlength=num_classes), 1)
    return tuple((len(label) / (num_classes * counts)).tolist())


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
        objective=Objective(config.seed, make_augmentation(config.augment), config.label_smoothing, class_weights),
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


def up_to_checkpoints(first: int, last: int, every_steps: int) -> Iterator[int]:
    """After `first` steps, how many come before the next multiple of every_steps, and so on up to `last`."""
    while first < last:
        step = min((first // every_steps + 1) * every_steps, last) if every_steps else last
        yield step - first
        first = step


def run_steps(
    p_train_steps: TrainSteps,
    state: TrainState,
    pictures: Pictures | None,
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
        state, counts = p_train_steps(state, pictures, batches, turns(count))
        launched += count
        waiting.append((counts, count))
    while waiting:
        yield from arrived()


def metrics_row(step: int, epoch: int, split: str, counts: Counts, seconds: float) -> dict[str, Any]:
    """A line of metrics.jsonl; raises NotFiniteError where the loss is none."""
    pictures = int(counts.pictures)
    loss = float(counts.loss) / pictures
    if not math.isfinite(loss):
        raise NotFiniteError(f"the {split} loss is {loss}", step, made_by=step - 1 if split == "train" else step)
    return {
        "step": step,
        "epoch": epoch,
        "split": split,
        "loss": loss,
        "accuracy": float(counts.correct) / pictures,
        "images_per_second": round(pictures / seconds, 2),
        "seconds": round(seconds, 4),
    }


def print_start(
    config: ConfigDict,
    workdir: Path,
    model: ResNet,
    state: TrainState,
    info: dict[str, Any],
    train_data: datasets.Dataset,
    eval_data: datasets.Dataset,
    first_epoch: int,
) -> None:
    device = jax.local_devices()[0]
    weights = info["weights"]
    source = weights.get("name", weights["source"])
    if "source_sha256" in weights:
        source += f" (SHA-256 {weights['source_sha256'][:16]}), new head for {len(info['class_names'])} classes"
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    by_onednn = " with oneDNN" if model.by_onednn else ""
    print(f"device   {jax.device_count()} x {device.device_kind}{processes}, jax {version('jax')}{by_onednn}")
    data = config.data
    print(
        f"data     {data.name}: {info['train_size']:,} pictures of {data.train_split} to train, "
        f"{len(eval_data.label):,} of {data.eval_split} to test"
    )
    print(f"{'':9}{datasets.describe(train_data, eval_data, data.stream)}")
    print(f"model    {config.model.arch}, {num_params:,} parameters, {config.model.dtype}")
    print(f"weights  {source}")
    if "teacher_checkpoint" in info:
        print(f"teacher  learns from checkpoint {info['teacher_checkpoint']} of {config.distill.teacher}")
    if config.optimizer.freeze:
        print(table(freeze(model, config.optimizer, first_epoch)))
    print(
        f"workdir  {bucket.shown_as(workdir)}" + (f", goes on after step {int(state.step)}" if state.step else ""),
        flush=True,
    )


def main(argv: list[str]) -> None:
    defaults = flatten(default_config())
    keys = "".join(f"\n  {f'{key}={defaults[key]}':<34} {meaning}" for key, meaning in explanations().items())
    parser = ArgumentParser("python -m jaxft.train", __doc__, f"config keys with their defaults:{keys}")
    parser.add_argument("--config", required=True, metavar="FILE", help="a file with get_config(), as in configs/")
    parser.add_argument(
        "--workdir", metavar="DIR", help="for checkpoints and metrics, gs:// too (default: runs/CONFIG)"
    )
    args, rest = parser.parse_known_args(argv)
    set_up_backend()
    config = load_config(args.config, parse_overrides(rest))
    workdir = args.workdir or Path("runs", Path(args.config).stem)
    train_and_evaluate(config, workdir)


if __name__ == "__main__":
    sys.exit(run_together(main, sys.argv[1:]))
