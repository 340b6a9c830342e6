"""Evaluation: predictions, cached features and recalibrated statistics over a whole dataset."""

import dataclasses
from collections.abc import Callable
from contextlib import closing
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxft import interrupts
from jaxft.config import resolve
from jaxft.data import datasets
from jaxft.data.batches import Batch, Examples, replicate
from jaxft.data.identity import differences
from jaxft.data.loader import Loader, ResidentLoader, make_loader
from jaxft.errors import UserError, write_message
from jaxft.files import is_folder
from jaxft.models.network import Network
from jaxft.ops import onednn
from jaxft.ops.formulation import Formulation
from jaxft.process import disable_compilation_cache
from jaxft.progress import Progress
from jaxft.run.processes import with_compile_barrier
from jaxft.targets.joint import Calibrations, Targets, targets_of
from jaxft.training.compilation import Compiler, Program, abstract
from jaxft.training.feature_cache import features_path, load_or_compute
from jaxft.training.restore import LoadedCheckpoint, load_checkpoint
from jaxft.training.state import TrainState
from jaxft.training.steps import EvalConfig, EvalStep, eval_step, features_step, map_batches, statistics_step
from jaxft.training.steps_per_call import StepsPerCall, abstract_calls, choose_steps_per_call, stack_batches
from jaxft.transforms.preprocessing import Preprocessing

EvalSteps = Callable[[TrainState, Examples | None, Batch, Any], Any]  # the last: the num_steps of `map_batches`


def evaluate_images(
    p_eval_steps: EvalSteps,
    state: TrainState,
    loader: Loader,
    batch_size: int,
    per_call: StepsPerCall = StepsPerCall(),  # noqa: B008, immutable
) -> Any:
    """Evaluates every image once, on any number of devices: joint.predictions (N,) in the order of the data."""
    return _per_image(p_eval_steps, state, loader, batch_size, per_call, "evaluating")


def extract_features(
    config: EvalConfig,
    state: TrainState,
    loader: Loader,
    batch_size: int,
    per_call: StepsPerCall = StepsPerCall(),  # noqa: B008, immutable
    *,
    keep: bool = False,
) -> Examples:
    """Computes a frozen backbone's pooled features, float32 (N, F), which replace the images; labels stay.

    keep: reads the features from the disk cache, or computes and writes them there.
    """

    def compute() -> Any:
        p_steps = _pmap_steps(features_step, config)
        return _per_image(p_steps, state, loader, batch_size, per_call, "the backbone's features")

    path = features_path(config, state, loader, batch_size) if keep else None
    return Examples(load_or_compute(path, compute) if path else compute(), loader.label)


def cache_features(
    config: EvalConfig,
    state: TrainState,
    loaders: tuple[Loader, ...],
    batch_size: int,
    per_call: StepsPerCall = StepsPerCall(),  # noqa: B008, immutable
    *,
    keep: bool = False,
) -> tuple[Loader, ...]:
    """Replaces the images of the training loader and the others by their features, resident on every device.

    Training images are not averaged with their mirror images, whatever the policy. keep: as in extract_features.
    """
    train_config = config._replace(policy=config.policy._replace(test_flip=False))
    configs = [train_config, *(config for _ in loaders[1:])]
    return tuple(
        ResidentLoader(replicate(extract_features(eval_config, state, loader, batch_size, per_call, keep=keep)))
        for eval_config, loader in zip(configs, loaders, strict=True)
    )


def recalibrate(
    config: EvalConfig,
    state: TrainState,
    loader: Loader,
    batch_size: int,
    per_call: StepsPerCall = StepsPerCall(),  # noqa: B008, immutable
) -> TrainState:
    """Replaces the running statistics by the mean over all batches, as torch.optim.swa_utils.update_bn does.

    Running statistics also average over earlier parameters; the recalibrated ones match the current parameters.
    """
    p_steps = _pmap_steps(statistics_step, config._replace(fold=False))
    per_batch = _per_batch(p_steps, state, loader, batch_size, per_call, "recalibrating")
    mean = replicate(jax.tree.map(lambda a: np.mean(a, axis=0, dtype=np.float64).astype(a.dtype), per_batch))
    if state.ema:
        return dataclasses.replace(state, ema=state.ema | {"batch_stats": mean})
    return dataclasses.replace(state, batch_stats=mean)


def _per_image(
    p_steps: EvalSteps, state: TrainState, loader: Loader, batch_size: int, per_call: StepsPerCall, description: str
) -> Any:
    """Joins a step's results (num_devices, B, ...) of all images on the host: (N, ...)."""

    def p_checked_steps(*arguments: Any) -> Any:
        interrupts.check()
        return p_steps(*arguments)

    per_batch = _per_batch(p_checked_steps, state, loader, shared_equally(batch_size), per_call, description)
    # Padding is only at the end of the last batch.
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[3:])[: loader.num_examples], per_batch)


def _per_batch(
    p_steps: EvalSteps, state: TrainState, loader: Loader, batch_size: int, per_call: StepsPerCall, description: str
) -> Any:
    """Joins a step's results of all batches on the host: (batches, ...)."""
    size = loader.num_examples
    results: list[Any] = []
    counts: list[int] = []
    with Progress(description, size) as progress:
        batches = loader.batches(np.arange(size), batch_size)
        for call, count in stack_batches(batches, -(-size // batch_size), per_call):
            results.append(p_steps(state, loader.examples, call, per_call.scan_length(count)))
            if not counts:  # the first call may have compiled
                progress.restart_clock()
            counts.append(count)
            done = len(results) - 1 - per_call.ahead
            if done >= 0:
                jax.block_until_ready(results[done])
                progress.update(min(counts[done] * batch_size, size))

        def joined(*arrays: np.ndarray) -> np.ndarray:
            return np.concatenate([array[:count] for array, count in zip(arrays, counts, strict=True)])

        return jax.tree.map(joined, *jax.device_get(results))


def pmap_eval_steps(config: EvalConfig) -> EvalSteps:
    return _pmap_steps(eval_step, config)


def make_eval_program(
    config: EvalConfig, state: TrainState, loader: Loader, batch_size: int, per_call: StepsPerCall
) -> Program:
    """Returns the program of `evaluate_images`."""
    function, batch_size = _pmap(eval_step, config), shared_equally(batch_size)
    calls = abstract_calls(loader, batch_size, [-(-loader.num_examples // batch_size)], per_call)
    arguments = [(abstract(state), *call) for call in calls]
    return Program("evaluation step", with_compile_barrier(function), function, arguments)


def _pmap_steps(step: EvalStep, config: EvalConfig) -> EvalSteps:
    return with_compile_barrier(_pmap(step, config))


def _pmap(step: EvalStep, config: EvalConfig) -> Any:
    given: Any = config.preprocessing
    hashable = given._replace(mean=tuple(given.mean), std=tuple(given.std))  # those of a checkpoint are lists
    return _cached_pmap(step, config._replace(preprocessing=hashable))


@lru_cache(maxsize=8)  # so that splits of one size share a compiled program
def _cached_pmap(step: EvalStep, config: EvalConfig) -> Any:
    steps = partial(map_batches, step=step, config=config)
    return jax.pmap(steps, axis_name=config.policy.axis_name, in_axes=(None, None, 0, None), out_axes=None)


def shared_equally(batch_size: int) -> int:
    """Returns the batch size rounded up to a multiple of the number of devices."""
    devices = jax.device_count()
    return -(-batch_size // devices) * devices


class Evaluation(NamedTuple):
    checkpoint: int  # its step
    split: str
    class_names: tuple[str, ...]  # () unless there is a single class
    predictions: Any  # of joint.predictions
    targets: Targets = ()
    calibrations: Calibrations = MappingProxyType({})


def evaluate(
    workdir: str | Path, which: str = "best", data_dir: str | None = None, *, flip: bool = False
) -> Evaluation:
    """Evaluates a checkpoint ('best', 'latest' or a step's number) on the split that its run was tested on.

    flip: average the logits of each image and its mirror image, whatever the run's model.test_flip.
    """
    checkpoint = load_checkpoint(workdir, which)
    if flip:
        checkpoint = checkpoint._replace(policy=checkpoint.policy._replace(test_flip=True))
    return evaluate_checkpoint(checkpoint, data_dir)


def choose_formulation(model: Network, config: ConfigDict, train_size: int) -> Formulation:
    """Returns the model's formulation, with oneDNN if it is on a CPU and its run is long enough to repay compilation.

    The choice depends on the whole run, so that evaluation decides as training did.
    """
    if model.formulation != "cpu":
        return model.formulation
    work = 3 * model.multiply_adds(config.image_size) * train_size * config.num_epochs
    return "cpu-onednn" if onednn.is_worthwhile(config.model.onednn, work) else "cpu"


def evaluate_checkpoint(checkpoint: LoadedCheckpoint, data_dir: str | None = None) -> Evaluation:
    """Evaluates a checkpoint on the split that its run was tested on.

    data_dir: the folder of images, of the table or of prepared TFDS datasets, if it has moved. Test images that differ
    from those of the run are reported on stderr. Raises UserError if the data has other classes than the checkpoint.
    """
    step, info, model, policy, state = checkpoint
    config = resolve(info["config"])
    data = config.data
    if data.name.startswith("folder:"):
        data.name = f"folder:{_find_folder(info, data.name, data_dir)}"
        data.layout = info.get("data", {}).get("layout") or data.layout
    elif data.name.startswith("table:"):
        data.name = f"table:{_find_table(info, data.name, data_dir)}"
    elif data_dir is not None:
        data.dir = data_dir
    targets = targets_of(info)
    fields = tuple(target.field for target in targets) if "targets" in info else ()
    class_names = tuple(info["class_names"])
    load = partial(datasets.load_config_data, data, data.eval_split, config.image_size)
    dataset = load(class_names, targets=config.targets, train_fields=fields)
    if list(dataset.class_names) != info["class_names"]:
        raise UserError(f"{data.name} has other classes than the checkpoint: {', '.join(info['class_names'])}")
    if text := "data" in info and differences(info["data"]["eval"], dataset):
        write_message(f"the test images differ from those of the run: now {text}")
    model = model.clone(formulation=choose_formulation(model, config, info["train_size"]))
    if model.formulation == "cpu-onednn":
        disable_compilation_cache()
    per_call, loader = choose_steps_per_call(config, model, train=False), make_loader(dataset, data)
    eval_config = EvalConfig(model, Preprocessing(**info["preprocessing"]), policy, targets=targets)
    program = make_eval_program(eval_config, state, loader, config.batch_size, per_call)
    with closing(Compiler()) as compiler:
        compiler.wait(program)
    predictions = evaluate_images(program.call, state, loader, config.batch_size, per_call)
    calibrations = info.get("calibration", {})
    return Evaluation(step, data.eval_split, dataset.class_names, predictions, targets, calibrations)


def _find_table(info: dict[str, Any], name: str, data_dir: str | None) -> Path:
    """Returns the table of a run: in `data_dir`, or where it was in training. Raises UserError if it is missing.

    name: the run's data.name, whose path may be relative to the working directory of the training.
    """
    named = datasets.table_path(name)
    stored = Path(info.get("data", {}).get("folder") or named.parent) / named.name
    table = stored if stored.is_file() or not named.is_file() else named
    if data_dir is not None:
        table = datasets.folder_path(data_dir)
        table = table / named.name if is_folder(table) else table
    if not table.is_file():
        raise UserError(f"there is no table {table}; if it has moved, name its folder: --data_dir DIR")
    return table


def _find_folder(info: dict[str, Any], name: str, data_dir: str | None) -> Path:
    """Returns the folder of a run's images: `data_dir`, or where it was in training. Raises UserError if it is missing.

    name: the run's data.name, whose path may be relative to the working directory of the training.
    """
    stored = info.get("data", {}).get("folder")
    named = datasets.folder_path(name)
    if data_dir is not None:
        folder = datasets.folder_path(data_dir)
    else:
        folder = Path(stored) if stored and (is_folder(Path(stored)) or not is_folder(named)) else named
    if not is_folder(folder):
        raise UserError(
            f"there is no folder {folder}; if the run's images have moved, name their folder: --data_dir DIR"
        )
    split = resolve(info["config"]).data.eval_split
    if info.get("data", {}).get("layout") == "splits" and not is_folder(folder / split):
        raise UserError(f"{folder} has no folder '{split}', on which the run was tested; name the folder that holds it")
    return folder
