"""Fine-tunes a ResNet on labelled pictures.

python -m jaxft.train --config configs/cifar10.py [--workdir DIR] [--config.KEY=VALUE ...]

The same command with the same workdir goes on where it stopped.
"""

import math
import sys
import time
from contextlib import closing
from functools import cache, partial
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxft.config import default_config, explanations, flatten, load_config, parse_overrides
from jaxft.data import datasets
from jaxft.data.batches import epoch_order, replicate
from jaxft.data.loader import ResidentLoader, make_loader
from jaxft.errors import ArgumentParser, Interrupted
from jaxft.models.partition import freeze
from jaxft.models.resnet import ResNet, make_model
from jaxft.process import set_up_backend
from jaxft.progress import Progress
from jaxft.reporting import page
from jaxft.run import remote_workdir
from jaxft.run.checkpoints import Checkpoints
from jaxft.run.metrics_file import MetricsFile
from jaxft.run.processes import broadcast_bool, run_together, with_compile_barrier
from jaxft.run.signals import StopSignals
from jaxft.run.trackers import Trackers, check_trackers
from jaxft.run.workdir import check_workdir, has_checkpoint, workdir_lock, write_config
from jaxft.targets.classification import balanced_class_weights, count_predictions
from jaxft.training.evaluation import (
    choose_formulation,
    evaluate_pictures,
    extract_features,
    pmap_eval_steps,
    recalibrate,
)
from jaxft.training.loop import (
    TrainSteps,
    epochs_evaluated,
    metrics_row,
    pmap_train_steps,
    report_divergence,
    run_steps,
    steps_between_checkpoints,
)
from jaxft.training.optimizer import learning_rate_schedule, make_optimizer
from jaxft.training.start import (
    can_cache_features,
    check_batch_size,
    check_data,
    find_batch_size,
    initial_state,
    load_teacher,
    print_start,
    run_info,
)
from jaxft.training.state import TrainState, abstract_train_state
from jaxft.training.steps_per_call import batches_per_call, stack_batches
from jaxft.transforms.preprocessing import Preprocessing, epoch_image_size


def train_and_evaluate(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains for config.num_epochs, with a checkpoint and an evaluation after each; resumes from the latest one.

    workdir: a folder, or a URL such as gs://BUCKET/RUN. Raises UserError for what the user can mend, before anything
    is written; Interrupted for SIGTERM and Ctrl-C.
    """
    folder = remote_workdir.training_folder(workdir)
    with workdir_lock(folder), remote_workdir.synced(workdir, folder):
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
    if broadcast_bool(has_checkpoint(workdir)):
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
    model = choose_formulation(model, state, config, train_size)
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
        steps, variables = with_compile_barrier(mapped), teacher and teacher.variables
        return lambda state, examples, batches, num_steps: steps(state, examples, batches, variables, num_steps)

    per_call, tests_per_call = (batches_per_call(config, model, state, train=train) for train in (True, False))
    resumed_at = int(state.step)
    p_eval_steps = pmap_eval_steps(model, preprocessing)
    mixed = config.augment.mixup > 0 or config.augment.cutmix > 0
    train_loader, eval_loader = (
        make_loader(train_data, config.data, partners=mixed),
        make_loader(eval_data, config.data),
    )
    if first_epoch <= config.num_epochs and can_cache_features(config, model):
        train_loader, eval_loader = (
            ResidentLoader(
                replicate(extract_features(seeing, preprocessing, state, loader, config.batch_size, tests_per_call))
            )
            for seeing, loader in ((model.clone(test_flip=False), train_loader), (model, eval_loader))
        )
    with (
        StopSignals() as stop,
        closing(metrics),
        closing(trackers),
        closing(checkpoints),
        report_divergence(checkpoints, learning_rate),
    ):
        for epoch in range(first_epoch, config.num_epochs + 1):
            order = epoch_order(config.seed, epoch, train_size)
            order = order[(int(state.step) - (epoch - 1) * steps_per_epoch) * config.batch_size :]  # what is to come
            batches = train_loader.batches(order, config.batch_size)
            p_train_steps = compiled(freeze(model, config.optimizer, epoch), image_size(epoch))
            with Progress(f"epoch {epoch}/{config.num_epochs}", len(order)) as progress, stop.deferred():
                parts = steps_between_checkpoints(
                    int(state.step), epoch * steps_per_epoch, config.checkpoint.every_steps
                )
                for num_steps in parts:
                    part = stack_batches(batches, num_steps, per_call, first=int(state.step) == resumed_at)
                    steps = run_steps(p_train_steps, state, train_loader.examples, part, stop)
                    for state, step, counts, seconds in steps:  # noqa: B007, the last one's state is the part's
                        row = metrics_row(step, epoch, "train", counts, seconds)
                        metrics.write(**row)
                        trackers.write(row)
                        progress.update(int(counts.num_images), row["loss"])
                        checkpoints.poll()
                    if config.model.batch_norm == "recalibrate" and int(state.step) == last_step:
                        state = recalibrate(model, preprocessing, state, train_loader, config.batch_size, per_call)
                    checkpoints.save(state, info)
                    if stop.received:
                        checkpoints.finish(state, info)
                        raise Interrupted(stop.received, f"the same command goes on after step {int(state.step)}")

            started = time.monotonic()
            predictions = evaluate_pictures(p_eval_steps, state, eval_loader, config.batch_size, tests_per_call)
            counts = count_predictions(predictions)
            row = metrics_row(int(state.step), epoch, "eval", counts, time.monotonic() - started)
            metrics.write(**row)
            trackers.write(row)
            print(f"Epoch [{epoch}/{config.num_epochs}], Test Accuracy: {row['accuracy']:.2%}", flush=True)
            if jax.process_index() == 0:
                page.update(workdir, info, eval_data, predictions)
        checkpoints.finish(state, info)
    again = f"python -m jaxft.evaluate --workdir {remote_workdir.display_name(workdir)}"
    print(f"done; look at {workdir / 'report.html'}, and test again by: {again}")
    if config.note:
        print(config.note)
    return state


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
