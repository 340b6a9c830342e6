"""Fine-tunes a ResNet on labelled pictures.

python -m jaxft.train --config configs/cifar10.py [--workdir DIR] [--config.KEY=VALUE ...]

The same command with the same workdir goes on where it stopped.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxft import datasets, report
from jaxft.augment import make_augmentation
from jaxft.checkpoint import Checkpoints, check_workdir, has_checkpoint, write_config
from jaxft.config import default_config, explanations, flatten, load_config
from jaxft.errors import ArgumentParser, UserError, run_command
from jaxft.evaluate import STEPS_AHEAD, evaluate_pictures, pmap_eval_step
from jaxft.metrics import MetricsFile
from jaxft.optimizer import make_optimizer
from jaxft.parts import freeze, table
from jaxft.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, epoch_image_size
from jaxft.pretrained import load_pretrained, replace_head
from jaxft.progress import Progress
from jaxft.resnet import ResNet, make_model
from jaxft.steps import (
    Batch,
    Counts,
    Pictures,
    TrainState,
    abstract_train_state,
    count_predictions,
    create_train_state,
    initial_train_state,
    replicate,
    train_step,
)

PTrainStep = Callable[[TrainState, Pictures, Batch], tuple[TrainState, Counts]]


def train_and_evaluate(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains for config.num_epochs, with an evaluation and a checkpoint after each; resumes from the latest one.

    Raises UserError for what the user can mend, before anything is written.
    """
    workdir = Path(workdir)
    check_workdir(config, workdir)
    check_batch_size(config.batch_size)

    # data
    train_data = datasets.load_config_data(config.data, config.data.train_split, config.image_size)
    eval_data = datasets.load_config_data(
        config.data, config.data.eval_split, config.image_size, train_data.class_names
    )
    train_size = len(train_data.label)
    steps_per_epoch = math.ceil(train_size / config.batch_size)

    # model
    model = freeze(make_model(config.model, len(train_data.class_names)), config.optimizer, config.num_epochs)
    tx = make_optimizer(config.optimizer, steps_per_epoch, config.num_epochs)

    # weights and state
    if has_checkpoint(workdir):
        checkpoints = Checkpoints(workdir, config.checkpoint.keep_latest, config.checkpoint.keep_best)
        info = checkpoints.info(checkpoints.latest_step())
        check_data(info, train_data, workdir)
        state = checkpoints.restore(checkpoints.latest_step(), abstract_train_state(model, tx))
    else:
        state, provenance = initial_state(config, model, tx)
        info = run_info(config, train_data, provenance)
        write_config(config, workdir)
        checkpoints = Checkpoints(workdir, config.checkpoint.keep_latest, config.checkpoint.keep_best)
        state = replicate(state)
    first_epoch = int(state.step) // steps_per_epoch + 1
    metrics = MetricsFile(workdir / "metrics.jsonl", last_step=int(state.step))
    print_start(config, workdir, model, state, info, len(eval_data.label), first_epoch)

    # loop
    if first_epoch <= config.num_epochs:
        print("compiling the first step, which takes a while", file=sys.stderr, flush=True)
    preprocessing = Preprocessing(**info["preprocessing"])
    image_size = partial(
        epoch_image_size, config.augment.first_image_size, config.image_size, num_epochs=config.num_epochs
    )

    @cache
    def compiled(model: ResNet, size: int) -> PTrainStep:
        return pmap_train_step(config, model, tx, preprocessing._replace(image_size=size))

    def p_train_step(epoch: int) -> PTrainStep:
        return compiled(freeze(model, config.optimizer, epoch), image_size(epoch))

    p_eval_step = pmap_eval_step(model, preprocessing)
    train_pictures = replicate(Pictures(train_data.image, train_data.label))
    eval_pictures = replicate(Pictures(eval_data.image, eval_data.label))
    with closing(checkpoints), closing(metrics):
        for epoch in range(first_epoch, config.num_epochs + 1):
            order = datasets.epoch_order(config.seed, epoch, train_size)
            batches = datasets.batches(order, config.batch_size, jax.local_device_count())
            first_step = int(state.step) + 1
            started = time.monotonic()
            with Progress(f"epoch {epoch}/{config.num_epochs}", train_size) as progress:
                steps = run_steps(p_train_step(epoch), state, train_pictures, batches)
                for step, (newest_state, counts) in enumerate(steps, first_step):
                    state = newest_state
                    started, seconds = time.monotonic(), time.monotonic() - started
                    row = metrics_row(step, epoch, "train", counts, seconds)
                    metrics.write(**row)
                    progress.update(int(counts.pictures), row["loss"])

            started = time.monotonic()
            predictions = evaluate_pictures(p_eval_step, state, eval_pictures, config.batch_size)
            counts = count_predictions(predictions)
            row = metrics_row(int(state.step), epoch, "eval", counts, time.monotonic() - started)
            metrics.write(**row)
            print(f"Epoch [{epoch}/{config.num_epochs}], Test Accuracy: {row['accuracy']:.2%}", flush=True)
            checkpoints.save(state, info, row["accuracy"])
            report.update(workdir, info, eval_data, predictions)
    print(f"done; look at {workdir / 'report.html'}, and test again by: python -m jaxft.evaluate --workdir {workdir}")
    return state


def check_batch_size(batch_size: int) -> None:
    devices = jax.local_device_count()
    if batch_size % devices:
        below = batch_size // devices * devices
        hint = f"{below} or {below + devices}" if below else f"{devices}"
        raise UserError(f"batch_size {batch_size} cannot be shared equally by {devices} devices; use {hint}")


def initial_state(
    config: ConfigDict, model: ResNet, tx: optax.GradientTransformation
) -> tuple[TrainState, dict[str, Any]]:
    """Step 0 with pretrained weights and a new head, or with random weights; and where they come from."""
    rng = jax.random.key(config.seed)
    if not config.model.pretrained:
        return jax.jit(partial(create_train_state, model, tx))(rng), {"source": "random initialisation"}
    weights = load_pretrained(config.model.pretrained, config.model.arch)
    for key in ("width", "stem"):
        there = weights.provenance.get(key, config.model[key])
        if there != config.model[key]:
            raise UserError(f"{config.model.pretrained} has {key} {there}; set --config.model.{key} to it")
    variables = jax.tree.map(np.float32, weights.variables)
    variables = replace_head(variables, model.num_classes, rng)
    return initial_train_state(model, tx, variables), weights.provenance


def run_info(config: ConfigDict, train_data: datasets.Dataset, provenance: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds besides the state, so that it can be used with nothing else at hand."""
    return {
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


def pmap_train_step(
    config: ConfigDict, model: ResNet, tx: optax.GradientTransformation, preprocessing: Preprocessing
) -> PTrainStep:
    step = partial(
        train_step,
        model=model,
        tx=tx,
        preprocessing=preprocessing,
        augmentation=make_augmentation(config.augment),
        label_smoothing=config.label_smoothing,
        seed=config.seed,
    )
    return jax.pmap(
        step, axis_name=model.axis_name, in_axes=(None, None, 0), out_axes=None, donate_argnums=0
    )  # state in natural shapes: no leading axis to add or strip


def run_steps(
    p_train_step: PTrainStep, state: TrainState, pictures: Pictures, batches: Iterable[Batch]
) -> Iterator[tuple[TrainState, Counts]]:
    """The newest state with each step's counts, which arrive STEPS_AHEAD late so that the devices never wait."""
    waiting: deque[Counts] = deque()
    for batch in batches:
        state, counts = p_train_step(state, pictures, batch)
        waiting.append(counts)
        if len(waiting) > STEPS_AHEAD:
            yield state, jax.device_get(waiting.popleft())
    for counts in waiting:
        yield state, jax.device_get(counts)


def metrics_row(step: int, epoch: int, split: str, counts: Counts, seconds: float) -> dict[str, Any]:
    """A line of metrics.jsonl; raises UserError where the loss is no number."""
    pictures = int(counts.pictures)
    loss = float(counts.loss) / pictures
    if not math.isfinite(loss):
        raise UserError(f"the {split} loss is {loss} at step {step}; a lower optimizer.learning_rate may help")
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
    eval_size: int,
    first_epoch: int,
) -> None:
    device = jax.local_devices()[0]
    weights = info["weights"]
    source = weights.get("name", weights["source"])
    if "source_sha256" in weights:
        source += f" (SHA-256 {weights['source_sha256'][:16]}), new head for {len(info['class_names'])} classes"
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"device   {jax.local_device_count()} x {device.device_kind}, jax {version('jax')}")
    data = config.data
    print(
        f"data     {data.name}: {info['train_size']:,} pictures of {data.train_split} to train, "
        f"{eval_size:,} of {data.eval_split} to test"
    )
    print(f"model    {config.model.arch}, {num_params:,} parameters, {config.model.dtype}")
    print(f"weights  {source}")
    if config.optimizer.freeze:
        print(table(freeze(model, config.optimizer, first_epoch)))
    print(f"workdir  {workdir}" + (f", goes on with epoch {first_epoch}" if first_epoch > 1 else ""), flush=True)


def main(argv: list[str]) -> None:
    defaults = flatten(default_config())
    keys = "".join(f"\n  {f'{key}={defaults[key]}':<34} {meaning}" for key, meaning in explanations().items())
    parser = ArgumentParser("python -m jaxft.train", __doc__, f"config keys with their defaults:{keys}")
    parser.add_argument("--config", required=True, metavar="FILE", help="a file with get_config(), as in configs/")
    parser.add_argument(
        "--workdir", type=Path, metavar="DIR", help="for checkpoints and metrics (default: runs/CONFIG)"
    )
    args, rest = parser.parse_known_args(argv)
    config = load_config(args.config, parse_overrides(rest))
    train_and_evaluate(config, args.workdir or Path("runs", Path(args.config).stem))


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """['--config.seed=1', '--config.batch_size', '32'] -> {'seed': '1', 'batch_size': '32'}"""
    overrides = {}
    rest = iter(arguments)
    for argument in rest:
        key, equals, value = argument.partition("=")
        if not key.startswith("--config."):
            raise UserError(f"unknown argument '{argument}'; see python -m jaxft.train --help")
        overrides[key.removeprefix("--config.")] = value if equals else next(rest, "")
    return overrides


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
