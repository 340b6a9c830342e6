"""Prints what a run starts from, and how to continue at its end."""

import shlex
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxft.config import FROM_WEIGHTS, count_steps_per_epoch, flatten
from jaxft.data import datasets
from jaxft.errors import printable
from jaxft.models.network import Network, options_of
from jaxft.models.partition import make_policy, table, unfreezing
from jaxft.run import remote_workdir
from jaxft.run.workdir import Workdir
from jaxft.targets.joint import Targets, format_metric, is_one_class, value_of_score
from jaxft.training.selection import is_over, last_improvement
from jaxft.training.start import Splits, val_fraction
from jaxft.training.state import TrainState


# More than six parameters: everything that the first lines of a run show.
def print_start(
    config: ConfigDict,
    workdir: Workdir,
    model: Network,
    state: TrainState,
    info: dict[str, Any],
    splits: Splits,
    targets: Targets,
) -> None:
    """Prints the device, data, model, weights, teacher, frozen parts and workdir."""
    train_data, eval_data, val_data = splits
    data, weights = config.data, info["weights"]
    source = weights.get("name", weights["source"])
    outputs = f"{len(info['class_names'])} classes"
    if not is_one_class(targets):
        outputs = " and ".join(f"{target.field.name} ({target.field.num_outputs})" for target in targets)
    if "source_sha256" in weights:
        source += f" (SHA-256 {weights['source_sha256'][:16]}), new head for {outputs}"
    if "head" in weights:
        kept = weights["head"] == "kept"
        source += f", {'same' if kept else 'new'} head for {outputs}"
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    is_fraction = val_fraction(config) is not None
    val_name = f"{data.val_split} of {data.train_split}" if is_fraction else data.val_split
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    onednn = " with oneDNN" if model.formulation == "cpu-onednn" else ""
    device = jax.local_devices()[0].device_kind
    print(f"device   {jax.device_count()} x {device}{processes}, jax {version('jax')}{onednn}")
    print(
        f"data     {printable(data.name)}: {train_data.num_examples:,} images to train on ({data.train_split}), "
        f"{eval_data.num_examples:,} to test on ({data.eval_split})"
        + (f", {val_data.num_examples:,} to validate on ({val_name})" if val_data else "")
    )
    for line in (
        datasets.describe(train_data, eval_data, data.stream),
        *datasets.describe_origin(train_data, eval_data, (data.train_split, data.eval_split, data.val_split)),
    ):
        print(f"{'':9}{printable(line)}")
    options = [f"{key} {value}" for key, value in options_of(model).items() if f"model.{key}" in FROM_WEIGHTS]
    print(f"model    {', '.join([config.model.arch, f'{num_params:,} parameters', config.model.dtype, *options])}")
    print(f"weights  {source}")
    for note in weights.get("notes", ()):
        print(f"{'':9}{note}")
    if "teacher_checkpoint" in info:
        print(f"teacher  checkpoint {info['teacher_checkpoint']} of {config.distill.teacher}")
    if config.optimizer.freeze:
        epochs = int(state.step) // count_steps_per_epoch(config, train_data.num_examples)
        epoch = min(epochs + 1, config.num_epochs)
        print(table(model, make_policy(config, model, epoch)))
        for line in unfreezing(config, epoch):
            print(f"{'':9}{line}")
    resumes = f", resuming after step {int(state.step)}" if state.step else ""
    print(f"workdir  {remote_workdir.display_name(workdir.path)}{resumes}", flush=True)


def print_auto(config: ConfigDict, keys: list[str]) -> None:
    """Prints the values of keys that were derived from the weights or the data, if any."""
    values = flatten(config)
    keys = [key for key in keys if key != "batch_size" and not key.startswith("model.")]  # other lines show these
    if values["data.interpolation"] in ("auto", "bilinear"):
        keys = [key for key in keys if key != "data.interpolation"]
    texts = {key: values[key] if isinstance(values[key], str) else f"{values[key]:.4g}" for key in keys}
    if texts:
        print(f"auto     {', '.join(f'{key} {text}' for key, text in texts.items())}", flush=True)


def print_end(config: ConfigDict, workdir: Workdir, metric: str, scores: Mapping[int, float]) -> None:
    """Prints whether the run ended early, the report's path, how to evaluate the run again, and the config's note."""
    if is_over(config, scores) and len(scores) < config.num_epochs:
        epoch = last_improvement(scores, config.stop.min_delta) + 1
        best = format_metric(metric, value_of_score(metric, scores[sorted(scores)[epoch - 1]]))
        print(
            f"Stopped early: {metric} has not improved since epoch {epoch} ({best}); "
            f"stop.patience is {config.stop.patience}"
        )
    name = shlex.quote(remote_workdir.display_name(workdir.path))
    print(f"Done. Report: {workdir.report}  Re-evaluate: python -m jaxft.evaluate --workdir {name}")
    if config.note:
        print(config.note)
