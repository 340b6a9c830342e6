"""TODO."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxft.config import resolve
from jaxft.data import datasets
from jaxft.data.batches import Batch, Examples, replicate
from jaxft.data.loader import Loader, make_loader
from jaxft.errors import UserError
from jaxft.models.resnet import ResNet, multiply_adds
from jaxft.ops import onednn
from jaxft.progress import Progress
from jaxft.run.processes import with_compile_barrier
from jaxft.targets.classification import Predictions
from jaxft.training.restore import LoadedCheckpoint, load_checkpoint
from jaxft.training.state import TrainState
from jaxft.training.steps import Step, eval_step, features_step, map_batches, statistics_step
from jaxft.training.steps_per_call import batches_per_call, scan_length, stack_batches
from jaxft.transforms.preprocessing import Preprocessing

Steps = Callable[[TrainState, Examples | None, Batch, Any], Any]  # the last: `map_batches`'s turns


STEPS_AHEAD = 2  # that the host runs before the devices


def evaluate_pictures(
    p_eval_steps: Steps, state: TrainState, loader: Loader, batch_size: int, per_call: int = 1
) -> Predictions:
    """Of each picture (N,) in the order of the data, once, on any number of devices."""
    return _of_pictures(p_eval_steps, state, loader, batch_size, per_call, "evaluating")


def extract_features(
    model: ResNet, preprocessing: Preprocessing, state: TrainState, loader: Loader, batch_size: int, per_call: int = 1
) -> Examples:
    """The same labels with what the head sees of each picture, float32 (N, F), for a backbone that stays as it is."""
    p_steps = _pmap_steps(features_step, model, preprocessing)
    return Examples(_of_pictures(p_steps, state, loader, batch_size, per_call, "the backbone's features"), loader.label)


def recalibrate(
    model: ResNet, preprocessing: Preprocessing, state: TrainState, loader: Loader, batch_size: int, per_call: int = 1
) -> TrainState:
    """With running statistics that are the mean of every batch's, as torch.optim.swa_utils.update_bn has them.

    A batch's own statistics belong to the parameters as they are now, running ones also to earlier ones.
    """
    p_steps = _pmap_steps(statistics_step, model, preprocessing, fold=False)
    of_batches = _of_batches(p_steps, state, loader, batch_size, per_call, "recalibrating")
    mean = replicate(jax.tree.map(lambda a: np.mean(a, axis=0, dtype=np.float64).astype(a.dtype), of_batches))
    if state.ema:
        return dataclasses.replace(state, ema=state.ema | {"batch_stats": mean})
    return dataclasses.replace(state, batch_stats=mean)


def _of_pictures(
    p_steps: Steps, state: TrainState, loader: Loader, batch_size: int, per_call: int, description: str
) -> Any:
    """A step's results (num_devices, B, ...) for all pictures, on the host: (N, ...)."""
    devices = jax.device_count()
    of_batches = _of_batches(p_steps, state, loader, -(-batch_size // devices) * devices, per_call, description)
    # Padding is at the end of the last batch alone.
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[3:])[: len(loader.label)], of_batches)


def _of_batches(
    p_steps: Steps, state: TrainState, loader: Loader, batch_size: int, per_call: int, description: str
) -> Any:
    """A step's results for all batches, on the host: (batches, ...)."""
    size = len(loader.label)
    results: list[Any] = []
    counts: list[int] = []
    with Progress(description, size) as progress:
        batches = loader.batches(np.arange(size), batch_size)
        for call, count in stack_batches(batches, -(-size // batch_size), per_call):
            results.append(p_steps(state, loader.examples, call, scan_length(count)))
            counts.append(count)
            if len(results) > STEPS_AHEAD:
                jax.block_until_ready(results[-1 - STEPS_AHEAD])
                progress.update(min(counts[-1 - STEPS_AHEAD] * batch_size, size))

        def joined(*arrays: np.ndarray) -> np.ndarray:
            return np.concatenate([array[:count] for array, count in zip(arrays, counts, strict=True)])

        return jax.tree.map(joined, *jax.device_get(results))


def pmap_eval_steps(model: ResNet, preprocessing: Preprocessing) -> Steps:
    return _pmap_steps(eval_step, model, preprocessing)


def _pmap_steps(step: Step, model: ResNet, preprocessing: Preprocessing, *, fold: bool = True) -> Steps:
    steps = partial(map_batches, step=step, model=model, preprocessing=preprocessing, fold=fold)
    return with_compile_barrier(
        jax.pmap(steps, axis_name=model.axis_name, in_axes=(None, None, 0, None), out_axes=None)
    )


class Evaluation(NamedTuple):
    checkpoint: int  # its step
    split: str
    class_names: tuple[str, ...]
    predictions: Predictions


def evaluate(
    workdir: str | Path, which: str = "best", data_dir: str | None = None, *, flip: bool = False
) -> Evaluation:
    """A checkpoint, 'best', 'latest' or a step's number, on the split that its run was tested on.

    flip: with the mean of each picture's and its mirror image's logits, whatever the run's model.test_flip.
    """
    checkpoint = load_checkpoint(workdir, which)
    if flip:
        checkpoint = checkpoint._replace(model=checkpoint.model.clone(test_flip=True))
    return evaluate_checkpoint(checkpoint, data_dir)


def choose_formulation(model: ResNet, state: TrainState, config: ConfigDict, train_size: int) -> ResNet:
    """The model with oneDNN's convolutions where its training is long enough: to train and to evaluate alike."""
    work = 3 * multiply_adds(model, state.variables(), config.image_size) * train_size * config.num_epochs
    return model.clone(by_onednn=onednn.is_chosen(config.model.onednn, work))


def evaluate_checkpoint(checkpoint: LoadedCheckpoint, data_dir: str | None = None) -> Evaluation:
    step, info, model, state = checkpoint
    config = resolve(info["config"])
    data = config.data
    if data_dir is not None:
        data.dir = data_dir
    dataset = datasets.load_config_data(data, data.eval_split, config.image_size, tuple(info["class_names"]))
    if list(dataset.class_names) != info["class_names"]:
        raise UserError(f"{data.name} has other classes than the checkpoint: {', '.join(info['class_names'])}")
    model = choose_formulation(model, state, config, info["train_size"])
    p_eval_steps = pmap_eval_steps(model, Preprocessing(**info["preprocessing"]))
    per_call = batches_per_call(config, model, state, train=False)
    predictions = evaluate_pictures(p_eval_steps, state, make_loader(dataset, data), config.batch_size, per_call)
    return Evaluation(step, data.eval_split, dataset.class_names, predictions)
