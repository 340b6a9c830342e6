"""Everything that is prepared before the first step of a run."""

from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxft.data import datasets
from jaxft.data.batches import Batch, Examples, replicate
from jaxft.data.budget import device_memory, is_streamed
from jaxft.errors import UserError
from jaxft.models.fold import fold_norms
from jaxft.models.partition import freeze, table, trains_only_head
from jaxft.models.resnet import ResNet, make_model
from jaxft.pretrained.convert import load_pretrained
from jaxft.run import remote_workdir
from jaxft.targets.classification import replace_head
from jaxft.training.batch_size import largest_batch_size
from jaxft.training.distill import Teacher
from jaxft.training.loop import pmap_train_steps
from jaxft.training.optimizer import make_optimizer
from jaxft.training.restore import load_checkpoint
from jaxft.training.state import TrainState, abstract_train_state, create_train_state, initial_train_state
from jaxft.training.steps_per_call import scan_length
from jaxft.transforms.augment import NO_AUGMENTATION, make_augmentation
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing


def find_batch_size(config: ConfigDict, train_data: datasets.Dataset, eval_data: datasets.Dataset) -> int:
    """What config.batch_size = 0 stands for, on the devices that there are now."""
    model = freeze(make_model(config.model, len(train_data.class_names)), config.optimizer, config.num_epochs)
    tx = make_optimizer(config.optimizer, steps_per_epoch=1, num_epochs=1)
    state = abstract_train_state(model, tx, ema=config.optimizer.ema_decay > 0)
    teacher = load_teacher(config.distill.teacher, train_data.class_names, "best")
    preprocessing = Preprocessing(config.image_size, IMAGENET_MEAN, IMAGENET_STD)
    steps = pmap_train_steps(config, model, tx, preprocessing, teacher=teacher)

    def compile_step(examples: Examples, batch: Batch) -> Any:
        return steps.lower(state, examples, batch, teacher and teacher.variables, scan_length(1)).compile()

    stream = config.data.stream
    resident = sum(data.image.nbytes for data in (train_data, eval_data) if not is_streamed(data, stream))
    return largest_batch_size(compile_step, train_data, device_memory(), resident)


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


def can_cache_features(config: ConfigDict, model: ResNet) -> bool:
    """Whether the head sees the same of a picture in every epoch, so that the backbone needs to see it only once."""
    augmented = make_augmentation(config.augment) != NO_AUGMENTATION or config.augment.first_image_size > 0
    return trains_only_head(model) and not augmented and not config.distill.teacher


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
        f"workdir  {remote_workdir.display_name(workdir)}"
        + (f", goes on after step {int(state.step)}" if state.step else ""),
        flush=True,
    )
