"""Prepares everything that a run needs before its first step: data, state and teacher."""

from contextlib import suppress
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxft.data import datasets
from jaxft.data.batches import replicate
from jaxft.data.dataset import Dataset
from jaxft.data.identity import check_data, data_info
from jaxft.data.image_folder import UnreadableError
from jaxft.data.loader import Loader, make_loader
from jaxft.data.split_off import split_off
from jaxft.errors import UserError, raise_problems
from jaxft.models.fold import fold_norms
from jaxft.models.heads import HEAD_NORM, get_head
from jaxft.models.network import Network, is_random, options_of
from jaxft.models.partition import make_policy, trains_only_head
from jaxft.models.policy import Policy
from jaxft.models.vit import ViT, repool
from jaxft.ops.formulation import Formulation
from jaxft.pretrained.load import load_pretrained
from jaxft.pretrained.weights_file import Weights
from jaxft.run import remote_workdir
from jaxft.run.checkpoint_reader import DamagedCheckpointError
from jaxft.run.checkpoints import Checkpoints
from jaxft.run.metrics_file import MetricsFile
from jaxft.run.processes import broadcast_bool
from jaxft.run.workdir import Workdir
from jaxft.targets.classification import replace_head
from jaxft.targets.joint import Targets, config_targets, find_metric, outputs_of, target_problems, targets_of
from jaxft.training.auto import IMAGE_SIZE
from jaxft.training.distill import Teacher
from jaxft.training.restore import is_workdir, load_checkpoint, load_weights, named_after
from jaxft.training.state import TrainState, abstract_train_state, create_train_state, initial_train_state
from jaxft.transforms.augment import NO_AUGMENTATION, make_augmentation
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing


class Start(NamedTuple):
    """The starting point of a new or resumed run."""

    state: TrainState  # on every local device
    info: dict[str, Any]  # stored with each checkpoint: config, class_names, preprocessing, weights, versions, ...
    teacher: Teacher | None


class Splits(NamedTuple):
    """The images of a run."""

    train: Dataset
    eval: Dataset
    val: Dataset | None = None  # chooses the best checkpoint, thresholds and temperatures in place of `eval`


def check_labels(config: ConfigDict) -> str:
    """Returns the full name of the metric that chooses the best checkpoint.

    Raises UserError, which names everything that is wrong with targets, metric, splits and the rows of a table, before
    weights are loaded and images are read.
    """
    problems = target_problems(config)
    names = [config.data.train_split, config.data.eval_split]
    try:
        names = split_names(config)
    except UserError as error:
        problems.append(str(error))
    raise_problems(problems + datasets.label_problems(config.data, names, config.targets))
    return find_metric(config_targets(config), config.best_metric)


def split_names(config: ConfigDict) -> list[str]:
    """Returns the names of the training split, the test split and the validation split if it has a name.

    Raises UserError if data.val_split is one of the others, or a number that is not a fraction.
    """
    names, val_split = [config.data.train_split, config.data.eval_split], config.data.val_split
    if not val_split or val_fraction(config) is not None:
        return names
    if val_split in names:
        text = f"data.val_split is {val_split}, which is also trained or tested on"
        raise UserError(f"{text}; name another split, or a fraction of the training images such as 0.1")
    return [*names, val_split]


def load_splits(config: ConfigDict) -> Splits:
    """Loads the training split, the test split and the validation split if the config names one.

    The others have the training split's classes. Raises UserError, with the files of all splits that are not images.
    """
    unreadable: list[UnreadableError] = []
    splits: list[Dataset] = []
    fraction = val_fraction(config)
    for split in split_names(config):
        try:
            class_names, fields = (splits[0].class_names, splits[0].fields) if splits else (None, ())
            load = partial(datasets.load_config_data, config.data, split, config.image_size or IMAGE_SIZE)
            splits.append(load(class_names, targets=config.targets, train_fields=fields))
        except UnreadableError as error:
            unreadable.append(error)
        except UserError as error:
            raise unreadable[0] if unreadable else error from None
    if len(unreadable) == 1:
        raise unreadable[0]
    if unreadable:
        problems = [problem for error in unreadable for problem in error.problems]
        raise UnreadableError(problems, sum(error.num_files for error in unreadable))
    train_data, eval_data, *val_data = splits
    if fraction is None:
        if val_data and val_data[0].origin.layout == "classes":
            raise UserError(
                f"{val_data[0].origin.folder} has no folders of splits, so data.val_split cannot be "
                f"'{config.data.val_split}'; set it to a fraction of the training images, such as 0.1"
            )
        return Splits(train_data, eval_data, *val_data)
    train_data, held_out = split_off(train_data, fraction, config.seed, train_data.group)
    return Splits(train_data, eval_data, held_out)


def val_fraction(config: ConfigDict) -> float | None:
    """Returns data.val_split as a fraction of the training images; None if it is empty or a split's name.

    Raises UserError if it is a number that is not a fraction.
    """
    try:
        fraction = float(config.data.val_split)
    except ValueError:
        return None
    if not 0 < fraction < 1:
        raise UserError(f"data.val_split is {config.data.val_split}; a fraction lies between 0 and 1, such as 0.1")
    return fraction


def make_loaders(config: ConfigDict, splits: Splits) -> tuple[Loader, ...]:
    """Makes the loaders of the training split, the test split and the validation split if there is one."""
    mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
    others = [make_loader(data, config.data) for data in splits[1:] if data]
    return make_loader(splits.train, config.data, partners=mixes), *others


def load_start_weights(config: ConfigDict) -> Weights | None:
    """Loads the weights of model.pretrained, from another run if it names one; None for random weights.

    Raises UserError if they cannot be read or are not of model.arch.
    """
    source = config.model.pretrained
    if not source:
        return None
    load = load_weights if is_workdir(source) else load_pretrained
    return Weights(*load(source, None if config.model.arch == "auto" else config.model.arch))


# More than six parameters: the parts of a run that exist before its state.
def begin_or_resume(
    config: ConfigDict,
    workdir: Workdir,
    model: Network,
    tx: optax.GradientTransformation,
    splits: Splits,
    targets: Targets,
    metrics: MetricsFile,
    weights: Weights | None = None,
) -> tuple[Start, Checkpoints]:
    """Resumes from the latest checkpoint, or begins at step 0 and writes the workdir's config.

    weights: those of a new run, if they are already loaded. Raises UserError if the checkpoint, the weights or the
    teacher cannot be used.
    """
    policy = make_policy(config, model, config.num_epochs)
    ema = config.optimizer.ema_decay > 0
    make_checkpoints = partial(
        Checkpoints, workdir, metrics, config.checkpoint.keep_latest, config.checkpoint.keep_best
    )
    if broadcast_bool(workdir.has_checkpoint()):
        checkpoints = make_checkpoints()
        abstract_state = abstract_train_state(model, tx, policy, ema=ema)
        with suppress(DamagedCheckpointError):  # before arrays of another number of classes are restored
            check_data(config.data.name, checkpoints.info(checkpoints.steps()[-1]), splits, workdir.path)
        info, state = checkpoints.restore_latest(abstract_state, config.checkpoint.on_damage)
        check_data(config.data.name, info, splits, workdir.path)
        info = info | {"data": data_info(*splits)}
        if info["config"]["data"]["name"] != config.data.name:  # the folder has moved
            info["config"]["data"]["name"] = config.data.name
            workdir.rename_data(config.data.name)
        if info["config"]["num_epochs"] != config.num_epochs:  # raised by the user
            info = info | {"config": info["config"] | {"num_epochs": config.num_epochs}}
            workdir.raise_num_epochs(config.num_epochs)
        which = info.get("teacher_checkpoint", "best")
        teacher = load_teacher(config, targets, which, model.formulation)
        return Start(state, info, teacher), checkpoints
    check_not_trained(workdir, metrics)
    state, provenance = initial_state(config, model, policy, tx, targets, weights)
    teacher = load_teacher(config, targets, "best", model.formulation)
    info = run_info(config, splits, provenance, teacher)
    workdir.write_config(config)
    return Start(replicate(state), info, teacher), make_checkpoints()


def check_not_trained(workdir: Workdir, metrics: MetricsFile) -> None:
    """Raises UserError if a run without checkpoints had some, which training again would replace.

    A run that was killed before its first checkpoint was complete has an empty folder, or a partial checkpoint. A
    bucket has no empty folders, and receives the metrics of an epoch before its checkpoint.
    """
    remote = remote_workdir.is_mirror(workdir.path)
    evaluated = len(metrics.scores) >= (2 if remote else 1) and not any(workdir.checkpoints.glob("*-tmp*"))
    if evaluated or (metrics.rows and not remote and not workdir.checkpoints.exists()):
        raise UserError(
            f"{remote_workdir.display_name(workdir.path)} has metrics up to step {metrics.rows[-1]['step']} but no "
            f"checkpoint; put {workdir.checkpoints.name}/ back, name another --workdir, or remove {metrics.path.name} "
            "to train again from the start"
        )


def initial_state(
    config: ConfigDict,
    model: Network,
    policy: Policy,
    tx: optax.GradientTransformation,
    targets: Targets = (),
    weights: Weights | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state of step 0, pretrained or random, and the provenance of the weights.

    weights: those of load_start_weights, which is called by default. The head of pretrained weights is replaced, except
    if they come from another run with the same targets. Raises UserError if the weights belong to another
    architecture or have other options than the model.
    """
    rng = jax.random.key(config.seed)
    ema = config.optimizer.ema_decay > 0
    if not config.model.pretrained:
        create = jax.jit(partial(create_train_state, model, tx, policy=policy, ema=ema))
        return create(rng), {"source": "random initialisation"}
    weights = weights or load_start_weights(config)
    assert weights
    variables, provenance = weights
    of_run = is_workdir(config.model.pretrained)
    for key, ours in options_of(model).items():
        if (value := provenance.get(key, ours)) != ours and key != "pool":  # repool, below, can change that one
            raise UserError(f"{config.model.pretrained} has {key} {value}; set --config.model.{key}={value}")
    if isinstance(model, ViT):
        variables = {**variables, "params": repool(model, variables["params"], rng)}
    variables = jax.tree.map(np.float32, variables)
    keeps_head = of_run and outputs_of(targets_of(provenance)) == outputs_of(targets)
    if of_run:
        provenance = provenance | {"head": "kept" if keeps_head else "new"}
    if not keeps_head:
        variables = replace_head(variables, model.num_classes, rng, model.head)
    if model.head_norm:  # the identity, until training/head.py sets it
        num_features = get_head(variables["params"], model.head)["kernel"].shape[0]
        identity = {"mean": np.zeros(num_features, np.float32), "deviation": np.float32(1)}
        variables = {**variables, "batch_stats": {**variables["batch_stats"], HEAD_NORM: identity}}
    return initial_train_state(tx, variables, policy, ema=ema), provenance


def load_teacher(config: ConfigDict, targets: Targets, which: str, formulation: Formulation) -> Teacher | None:
    """Loads the network of config.distill.teacher, if any, from a run's checkpoint.

    Raises UserError if it was trained on other classes or targets.
    """
    workdir = config.distill.teacher
    if not workdir:
        return None
    try:
        step, info, model, policy, state = load_checkpoint(workdir, which)
    except UserError as error:
        raise named_after(error, "distill.teacher") from None
    if outputs_of(found := targets_of(info)) != outputs_of(targets):
        if info["class_names"]:
            raise UserError(f"distill.teacher {workdir} was trained on other classes: {', '.join(info['class_names'])}")
        texts = [f"{t.field.name} ({', '.join(t.field.names) or t.field.kind})" for t in found]
        raise UserError(f"distill.teacher {workdir} was not trained on the same targets, but on {'; '.join(texts)}")
    model, variables = fold_norms(model.clone(formulation=formulation), replicate(state.variables()))
    return Teacher(model, policy, Preprocessing(**info["preprocessing"]), variables, step)


def run_info(config: ConfigDict, splits: Splits, provenance: dict[str, Any], teacher: Teacher | None) -> dict[str, Any]:
    """Returns the info that a checkpoint stores with the state: everything that is needed to use it."""
    train_data = splits.train
    info: dict[str, Any] = {"teacher_checkpoint": str(teacher.checkpoint)} if teacher else {}
    if train_data.fields:
        info["targets"] = [field._asdict() for field in train_data.fields]
    return info | {
        "config": config.to_dict(),
        "class_names": list(train_data.class_names),
        "train_size": train_data.num_examples,
        "data": data_info(*splits),
        "preprocessing": {
            "image_size": config.image_size,
            "mean": provenance.get("mean", IMAGENET_MEAN),
            "std": provenance.get("std", IMAGENET_STD),
            "resize": config.data.resize,
            "interpolation": datasets.interpolation_of(config.data),
        },
        "weights": provenance,
        "versions": {name: version(name) for name in ("jaxft", "jax", "flax", "optax", "orbax-checkpoint")},
    }


def check_image_size(config: ConfigDict, model: Network) -> None:
    """Raises UserError if the network cannot process the images of an epoch."""
    first, patch, arch = config.augment.first_image_size, model.patch_size, config.model.arch
    key = "augment.first_image_size" if first else "image_size"
    if (size := first or config.image_size) < model.min_image_size:
        raise UserError(f"{key} is {size}, but a {arch} needs at least {model.min_image_size}; set it to that or more")
    if config.image_size % patch:  # sizes of earlier epochs are rounded
        low = config.image_size // patch * patch
        raise UserError(
            f"a {arch} has patches of {patch} pixels, which do not divide an image_size of {config.image_size}; "
            f"the nearest sizes are {low} and {low + patch}"
        )


def can_cache_features(config: ConfigDict, model: Network, policy: Policy) -> bool:
    """Returns whether the head gets the same features of an image in every epoch, so that they can be computed once."""
    augmented = make_augmentation(config.augment) != NO_AUGMENTATION or config.augment.first_image_size > 0
    random = is_random(model) and config.optimizer.fit_head != "only"
    return trains_only_head(model, policy) and not augmented and not random and not config.distill.teacher
