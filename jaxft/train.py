"""Fine-tunes an image classifier on labelled images.

python -m jaxft.train --config configs/cifar10.py [--workdir DIR] [--config.KEY=VALUE ...]

Run the same command with the same workdir to resume.
"""

if __name__ == "__main__":  # a command's process is prepared before JAX is imported
    from jaxft.cli import run

    run("train")

import time
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from jaxft.config import (
    auto_keys,
    count_steps_per_epoch,
    default_config,
    explanations,
    flatten,
    keys_from_weights,
    load_config,
    parse_overrides,
)
from jaxft.errors import ArgumentParser, UserError, write_message
from jaxft.main_process import is_main_process
from jaxft.models.build import make_model
from jaxft.models.partition import make_policy
from jaxft.process import disable_compilation_cache
from jaxft.reporting.reporter import Reporter
from jaxft.run import remote_workdir
from jaxft.run.metrics_file import MetricsFile
from jaxft.run.signals import StopSignals
from jaxft.run.trackers import Trackers, check_trackers
from jaxft.run.workdir import Workdir
from jaxft.targets.joint import count_outputs, make_targets
from jaxft.training.auto import resolve_auto, resolve_from_weights, resolve_options
from jaxft.training.batch_size import check_batch_size, find_batch_size
from jaxft.training.compilation import Compiler, compiles_ahead
from jaxft.training.evaluation import (
    cache_features,
    choose_formulation,
    make_eval_program,
    recalibrate,
)
from jaxft.training.head import prepare_head
from jaxft.training.loop import (
    Trainer,
    epochs_evaluated,
    make_train_programs,
    order_of,
    report_divergence,
    train_epoch,
)
from jaxft.training.optimizer import learning_rate_schedule, make_optimizer
from jaxft.training.probe import ONLY_FIT, fit_head_as_epoch, without_epochs
from jaxft.training.selection import Evaluated, Selection, check_metric, is_over
from jaxft.training.start import (
    begin_or_resume,
    can_cache_features,
    check_image_size,
    check_labels,
    load_splits,
    load_start_weights,
    make_loaders,
)
from jaxft.training.state import TrainState
from jaxft.training.steps import EvalConfig, make_step_config
from jaxft.training.steps_per_call import choose_steps_per_call
from jaxft.training.summary import print_auto, print_end, print_start
from jaxft.transforms.preprocessing import Preprocessing


def train_and_evaluate(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains for config.num_epochs epochs with a checkpoint and an evaluation after each, or resumes from the latest.

    workdir: a folder, or a URL such as gs://BUCKET/RUN. Raises UserError, if possible before anything is
    written, and Interrupted for SIGTERM and Ctrl-C.
    """
    folder = Workdir(remote_workdir.training_folder(workdir))
    with folder.lock(), remote_workdir.synced(workdir, folder.path):
        return _train_and_evaluate(config, folder)


# More than 60 lines: the whole course of a run, from data to the last checkpoint, in one place.
def _train_and_evaluate(config: ConfigDict, workdir: Workdir) -> TrainState:
    """Trains in a locked workdir on this machine."""
    config = without_epochs(workdir.without_newer_keys(config))
    auto = [*auto_keys(config), *keys_from_weights(config)]
    config = workdir.resolve_config(config)
    check_batch_size(config.batch_size)
    check_trackers(config.log)
    metric = check_labels(config)

    # weights, from which the config takes some values
    pretrained = None
    if not workdir.has_checkpoint():
        pretrained = load_start_weights(config)
        config = resolve_from_weights(config, pretrained.provenance if pretrained else None)

    # data
    splits = load_splits(config)
    train_data, eval_data, _ = splits
    config = resolve_auto(config, train_data)
    targets = make_targets(config, train_data)
    split_name = config.data.val_split if splits.val else config.data.eval_split
    check_metric(targets, metric, splits.val or eval_data, split_name)
    if not config.batch_size:
        config.batch_size = find_batch_size(config, splits, targets)
        config = resolve_auto(config, train_data)  # the learning rate follows from the batch size
    steps_per_epoch = count_steps_per_epoch(config, train_data.num_examples)

    # model and state
    model = make_model(config.model, count_outputs(targets))
    config = resolve_options(config, model)
    check_image_size(config, model)
    model = model.clone(formulation=choose_formulation(model, config, train_data.num_examples))
    if model.formulation == "cpu-onednn":
        disable_compilation_cache()
    policy = make_policy(config, model, config.num_epochs)
    only_fit = config.optimizer.fit_head == "only"
    if only_fit and not can_cache_features(config, model, policy):
        raise UserError(ONLY_FIT)
    tx = make_optimizer(config.optimizer, steps_per_epoch, config.num_epochs, model.parts)
    metrics = MetricsFile(workdir.metrics)
    (state, info, teacher), checkpoints = begin_or_resume(
        config, workdir, model, tx, splits, targets, metrics, pretrained
    )
    del pretrained  # the state has them now
    trackers = Trackers(config, workdir, metrics.open(last_step=int(state.step)))
    first_epoch = epochs_evaluated(metrics, int(state.step), steps_per_epoch) + 1
    print_start(config, workdir, model, state, info, splits, targets)
    print_auto(config, auto)

    # steps and loaders
    preprocessing = Preprocessing(**info["preprocessing"])
    per_call, eval_per_call = (choose_steps_per_call(config, model, train=train) for train in (True, False))
    step_config = make_step_config(config, model, policy, tx, preprocessing, teacher, targets)
    eval_config = EvalConfig(model, preprocessing, policy, targets=targets)
    loaders, features_seconds = make_loaders(config, splits), 0.0
    if first_epoch <= config.num_epochs and can_cache_features(config, model, policy):
        started = time.monotonic()
        keep = config.data.cache != "never"
        loaders = cache_features(eval_config, state, loaders, config.batch_size, eval_per_call, keep=keep)
        features_seconds = time.monotonic() - started
    train_loader, *eval_loaders = loaders
    if not int(state.step):
        keeps_head = info["weights"].get("head") == "kept"
        state = prepare_head(config, eval_config, state, train_loader, targets, eval_per_call, keeps_head=keeps_head)

    # programs
    teacher_variables = teacher and teacher.variables
    programs = make_train_programs(config, step_config, state, train_loader, per_call, teacher_variables)
    evaluated = [
        Evaluated(split, name, loader, make_eval_program(eval_config, state, loader, config.batch_size, eval_per_call))
        for split, name, loader in zip(
            ("eval", "val"), (config.data.eval_split, config.data.val_split), eval_loaders, strict=False
        )
    ]
    compiler = Compiler()
    if compiles_ahead(model.formulation) and not only_fit:
        for program in programs.values():
            compiler.start([program, *(split.program for split in evaluated)])

    # loop
    trainer = Trainer(
        config,
        programs,
        compiler,
        train_loader,
        steps_per_epoch,
        per_call,
        first_step=int(state.step),
        recalibrate=lambda state: recalibrate(eval_config, state, train_loader, config.batch_size, per_call),
        targets=targets,
        order=partial(order_of, config, train_data),
        checkpoints=checkpoints,
        info=info,
        writers=(metrics, trackers),
    )
    learning_rate = learning_rate_schedule(config.optimizer, steps_per_epoch, config.num_epochs)
    test, *val = evaluated
    selection = Selection(config, targets, metric, test, val[0] if val else None, eval_per_call)
    reporter = Reporter(workdir, info, train_data, eval_data, features_seconds)
    divergence = reporter.divergence() if is_main_process() else nullcontext()
    not_finite = report_divergence(checkpoints, learning_rate, config.optimizer)
    with StopSignals() as stop, closing(trainer), not_finite, divergence:
        for epoch in range(first_epoch, config.num_epochs + 1):
            if is_over(config, metrics.scores):
                break
            if only_fit:
                state = fit_head_as_epoch(trainer, eval_config, state, eval_per_call)
            else:
                state = train_epoch(trainer, state, epoch, stop)
            stop.protect_results()
            predictions, line = selection.evaluate(trainer, metrics, state, epoch)
            print(line, flush=True)
            if is_main_process():
                reporter.update(predictions, metrics.calibrations.get(int(state.step), {}))
        checkpoints.finish(state, info)
    print_end(config, workdir, metric, metrics.scores)
    return state


def main(argv: list[str]) -> None:
    defaults = flatten(default_config())
    keys = "".join(f"\n  {f'{key}={defaults[key]}':<34} {meaning}" for key, meaning in explanations().items())
    parser = ArgumentParser("python -m jaxft.train", __doc__, f"config keys with their defaults:{keys}")
    parser.add_argument(
        "--config", required=True, metavar="FILE_OR_NAME", help="a config file, or the name of one that ships"
    )
    parser.add_argument(
        "--workdir", metavar="DIR", help="folder or gs:// URL of checkpoints and metrics (default: runs/CONFIG)"
    )
    args, rest = parser.parse_known_args(argv)
    config = load_config(args.config, parse_overrides(rest))
    workdir = args.workdir or Path("runs", Path(args.config).stem)
    try:
        train_and_evaluate(config, workdir)
    except BrokenPipeError:
        write_message("the run has stopped, because nobody reads its output any more; the same command resumes it")
        raise
