"""The config: every key with its default and meaning; config files and overrides are checked against them."""

import ast
import difflib
import importlib.util
import inspect
import io
import json
import math
import sys
import tokenize
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxft.errors import UserError
from jaxft.files import open_regular, reason
from jaxft.models.architectures import NAMES, canonical


# More than 60 lines: one line per key, with all keys in one place.
def default_config() -> ConfigDict:
    """Returns every key with its default. The comments are the help of `jaxft train` and the page of config keys."""
    return ConfigDict(
        {
            "note": "",  # printed at the end of a run
            "seed": 0,  # random seed of the new head, the order of images and augmentation
            "num_epochs": 10,  # passes over the training images; 0: by their number (jaxft/training/auto.py)
            "batch_size": 64,  # over all devices; 0: the largest power of two per device that fits into its memory
            "image_size": 224,  # pixels of the crop's side; 0: that of the weights' config.json, else by the data
            "model": {
                "arch": "resnet50",  # resnet18, vgg16_bn, vit_b_16, convnext_tiny, ...; auto: that of the weights
                "pretrained": "",  # a name (`jaxft convert --list`), hf:OWNER/NAME, a file, a workdir, or '' for none
                "stem": "imagenet",  # ResNets: imagenet, or small: one 3x3 convolution, for images of about 32 pixels
                "width": 64,  # channels of the first stage; 64 in torchvision's networks
                "dtype": "float32",  # dtype of the computation: float32 or bfloat16; parameters are always float32
                "precision": "high",  # float32 products: default, high (GPU: TF32; TPU: 3 bfloat16 passes) or highest
                "onednn": "auto",  # oneDNN's convolutions on a CPU: always, never, or auto (in long runs)
                "remat": False,  # recompute each block's activations in the backward pass: less memory, more time
                "test_flip": False,  # average the logits of each image and its mirror image, except in training
                "batch_norm": "update",  # update (per device), sync (all devices), frozen, recalibrate (after training)
                "norm_eps": 0.0,  # epsilon of LayerNorm; 0: that of the weights, else the architecture's
                "pool": "auto",  # a ViT's features: token (class token), mean, mean_norm, attention; auto: the weights'
                "grid": 0,  # side of a ViT's grid of position embeddings, in patches; 0: as in the weights
                "dropout": -1.0,  # dropout's rate before the head; -1: the architecture's own (VGG: 0.5, others: 0)
                "drop_path": 0.0,  # stochastic depth: rate of the last residual branch, rising from 0 in the first
                "head_norm": False,  # standardise the head's input by the training set's statistics, computed once
            },
            "data": {
                "name": "cifar10",  # a TFDS name, folder:PATH, table:FILE (csv, tsv, jsonl, parquet), or sample:cifar10
                "dir": "",  # folder of prepared TFDS datasets; '' for $TFDS_DATA_DIR or ~/tensorflow_datasets
                "train_split": "train",  # split to train on; TFDS's syntax is allowed: train[:90%]
                "eval_split": "test",  # split to evaluate on after each epoch
                "val_split": "",  # split, or fraction of train_split, that chooses the best checkpoint; '': eval_split
                "path_column": "path",  # column of a table that holds the images' paths, relative to the table
                "group": "",  # column of a table; rows with the same value stay in one split
                "sampling": "none",  # draw training images by class: balanced, sqrt (in between), or none: each once
                "stored_size": 0,  # images of several sizes are stored as squares of this side; 0: resize or image_size
                "resize": 0,  # shorter side before evaluation's central crop; 0: image_size; -1: that of the weights
                "interpolation": "auto",  # bilinear, bicubic, lanczos; auto: that of the weights' config, else bilinear
                "layout": "auto",  # arrangement of a folder: splits (PATH/SPLIT/CLASS), classes (PATH/CLASS), or auto
                "holdout": 0.2,  # fraction of a folder's images to evaluate on, if it has no folder for each split
                "unreadable": "refuse",  # files of a folder that are not images: refuse or skip
                "cache": "auto",  # keep decoded images on disk: always, never, or auto (up to half of the free space)
                "stream": "auto",  # read images batch by batch: always, never, or auto (if too large for the devices)
                "workers": 0,  # processes that read streamed images; 0: threads
            },
            "optimizer": {
                "name": "sgd",  # sgd, adamw, adabelief, lamb or lion
                "learning_rate": 0.001,  # peak value, if a schedule changes it; -1: by the batch size
                "momentum": 0.9,  # momentum of sgd
                "nesterov": False,  # Nesterov momentum for sgd
                "weight_decay": 0.0,  # added to the gradient by sgd, as torch does; decoupled in the other optimizers
                "decay_all": True,  # apply weight decay to biases, norms, class tokens and position embeddings too
                "schedule": "constant",  # constant, cosine or linear (to 0 at the end), or step
                "step_epochs": 30.0,  # epochs between two drops of the step schedule
                "step_factor": 0.1,  # factor of each drop of the step schedule
                "warmup_epochs": 0.0,  # epochs of linear warm-up from 0; -1: a fraction of num_epochs
                "clip_norm": 0.0,  # largest global norm of the gradient; 0: no clipping
                "adaptive_clip": 0.0,  # largest norm of a unit's gradient relative to its weights' norm; 0: no clipping
                "ema_decay": 0.0,  # decay of an EMA of the weights, for evaluation, prediction and export; 0: no EMA
                "accumulate_steps": 1,  # gradient accumulation: batches per update
                "freeze": "",  # comma-separated: parts, ranges (stage1-stage3), backbone (all but the head) or patterns
                "unfreeze": "",  # epochs from which frozen parts train again: '3: stage4, 5: stage1-stage3'
                "unfreeze_warmup": 0.0,  # epochs of linear warm-up from 0 for each part after it is unfrozen
                "fit_head": "no",  # fit the head to frozen features: first (before training), only (instead), or no
                "head_factor": 1.0,  # multiplies the learning rate of the head
                "layer_decay": 1.0,  # each part's learning rate relative to the next; a ViT's parts are its blocks
            },
            "targets": "",  # of a table: [NAME=]KIND:COLUMN[*WEIGHT], ...; kinds: class, tags, number; '': class:label
            "best_metric": "",  # metric that chooses the best checkpoint: [TARGET.]METRIC; '': the first target's
            "stop": {  # early stopping
                "patience": 0,  # evaluations without improvement after which a run ends; 0: never
                "min_delta": 0.0,  # an improvement of best_metric counts if it exceeds this
            },
            "class_weights": "none",  # none, or balanced: weigh the loss so that rare classes count as much as others
            "label_smoothing": 0.0,  # fraction of each label that is spread evenly over all classes
            "augment": {  # random changes of the training images, different in each epoch
                "flip": False,  # mirror half of the images
                "shift": 0.0,  # largest random shift, as a fraction of the side
                "first_image_size": 0,  # image size of the first epoch, growing to image_size in the last; 0: constant
                "num_image_sizes": 0,  # sizes from first_image_size to image_size, in equal shares; 0: one per epoch
                "crop_area": 1.0,  # smallest area of a random crop, as a fraction of the image; 1: no cropping
                "crop_ratio": 1.0,  # largest aspect ratio of a random crop; its inverse is the smallest
                "trivial": False,  # TrivialAugment: one random operation for each image (shear, rotate, brighten, ...)
                "erase": 0.0,  # probability that a random rectangle is erased
                "mixup": 0.0,  # alpha of mixup, which blends pairs of images and labels; 0: off; -1: by their number
                "cutmix": 0.0,  # alpha of CutMix, which pastes a rectangle of another image; 0: off
            },
            "distill": {
                "teacher": "",  # workdir of the teacher's run on the same classes; '' for none
                "weight": 0.5,  # weight of the teacher's predictions in the loss; the labels have the rest
                "temperature": 2.0,  # softens the predictions of teacher and student
            },
            "steps_per_call": 0,  # steps per device call; 0: several on a CPU, else 1. 10 help if a step takes a few ms
            "log": {  # in addition to metrics.jsonl
                "tensorboard": False,  # write DIR/tensorboard; needs pip install 'jaxft[tensorboard]'
                "wandb": "",  # a project of Weights & Biases; needs pip install wandb
            },
            "checkpoint": {
                "every_steps": 0,  # steps between checkpoints within an epoch; 0: only one after each epoch
                "keep_latest": 2,  # newest checkpoints to keep; 2, since a run may diverge right after the newest
                "keep_best": 1,  # most accurate checkpoints to keep in addition
                "on_damage": "refuse",  # refuse to resume from a damaged checkpoint, or use the newest_good one
            },
        }
    )


CHOICES: dict[str, tuple[str, ...]] = {
    "model.arch": ("auto", *NAMES),
    "model.stem": ("imagenet", "small"),
    "model.pool": ("auto", "token", "mean", "mean_norm", "attention"),
    "model.dtype": ("float32", "bfloat16"),
    "model.precision": ("default", "high", "highest"),
    "model.batch_norm": ("update", "frozen", "sync", "recalibrate"),
    "model.onednn": ("auto", "always", "never"),
    "class_weights": ("none", "balanced"),
    "data.interpolation": ("auto", "bilinear", "bicubic", "lanczos"),
    "data.layout": ("auto", "splits", "classes"),
    "data.unreadable": ("refuse", "skip"),
    "data.sampling": ("none", "balanced", "sqrt"),
    "data.cache": ("auto", "always", "never"),
    "data.stream": ("auto", "always", "never"),
    "optimizer.name": ("sgd", "adamw", "adabelief", "lamb", "lion"),
    "optimizer.schedule": ("constant", "cosine", "linear", "step"),
    "optimizer.fit_head": ("no", "first", "only"),
    "checkpoint.on_damage": ("refuse", "newest_good"),
}


RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "num_epochs": (1, 2**31 - 1),
    "batch_size": (0, 2**31 - 1),
    "image_size": (1, 4096),
    "model.width": (1, 4096),
    "model.norm_eps": (0, 0.1),
    "model.grid": (0, 1024),
    "model.dropout": (-1, 0.99),
    "model.drop_path": (0, 0.99),
    "data.stored_size": (0, 4096),
    "data.resize": (0, 4096),
    "data.holdout": (0, 1),
    "data.workers": (0, 1024),
    "label_smoothing": (0, 1),
    "stop.patience": (0, 2**31 - 1),
    "stop.min_delta": (0, sys.float_info.max),
    "augment.first_image_size": (0, 4096),
    "augment.num_image_sizes": (0, 4096),
    "augment.shift": (0, 1),
    "augment.crop_area": (0.01, 1),
    "augment.crop_ratio": (1, 10),
    "augment.erase": (0, 1),
    "augment.mixup": (0, 100),
    "augment.cutmix": (0, 100),
    "optimizer.ema_decay": (0, 0.999999),
    "optimizer.learning_rate": (0, sys.float_info.max),
    "optimizer.momentum": (0, 1),
    "optimizer.weight_decay": (0, sys.float_info.max),
    "optimizer.step_epochs": (0, sys.float_info.max),
    "optimizer.step_factor": (0, 1),
    "optimizer.warmup_epochs": (0, 2**31 - 1),
    "optimizer.clip_norm": (0, sys.float_info.max),
    "optimizer.adaptive_clip": (0, sys.float_info.max),
    "optimizer.unfreeze_warmup": (0, 2**31 - 1),
    "optimizer.accumulate_steps": (1, 2**31 - 1),
    "optimizer.head_factor": (0, sys.float_info.max),
    "optimizer.layer_decay": (0, 1),
    "distill.weight": (0, 1),
    "distill.temperature": (0.01, 100),
    "steps_per_call": (0, 10_000),
    "checkpoint.every_steps": (0, 2**31 - 1),
    "checkpoint.keep_latest": (1, 2**31 - 1),
    "checkpoint.keep_best": (0, 2**31 - 1),
}


# Values that stand for one that depends on the data or the device. It is derived when a run begins, and stored.
AUTO: dict[str, float] = {
    "num_epochs": 0,
    "batch_size": 0,
    "image_size": 0,
    "augment.mixup": -1,
    "optimizer.learning_rate": -1,
    "optimizer.warmup_epochs": -1,
}


# The same for values that are taken from the pretrained weights, or from the architecture if the weights lack them.
FROM_WEIGHTS: dict[str, Any] = {
    "model.arch": "auto",
    "model.norm_eps": 0.0,
    "model.pool": "auto",
    "model.grid": 0,
    "image_size": 0,
    "data.resize": -1,
    "data.interpolation": "auto",
}


# Keys that may change when a run is resumed: they do not affect its results.
MAY_CHANGE = {
    "note",
    "steps_per_call",
    *(f"data.{key}" for key in ("dir", "cache", "layout", "stream", "workers")),
    *(f"log.{key}" for key in ("tensorboard", "wandb")),
    *(f"checkpoint.{key}" for key in ("every_steps", "keep_latest", "keep_best", "on_damage")),
}


def may_change(key: str, there: Any, here: Any) -> bool:
    """Returns whether a key may change from `there` to `here` when a run is resumed.

    A folder or table of images may move, since check_data compares the images themselves.
    """
    if key == "data.name":
        return any(all(str(name).startswith(kind) for name in (there, here)) for kind in ("folder:", "table:"))
    return key in MAY_CHANGE


def count_steps_per_epoch(config: ConfigDict, train_size: int) -> int:
    """Returns the number of training steps in an epoch; fitting only the head counts as one."""
    return 1 if config.optimizer.fit_head == "only" else math.ceil(train_size / config.batch_size)


def auto_keys(config: ConfigDict) -> list[str]:
    """Returns the keys whose value is still to be derived, in the order of AUTO."""
    values = flatten(config)
    return [key for key, value in AUTO.items() if values[key] == value]


def keys_from_weights(config: ConfigDict) -> list[str]:
    """Returns the keys whose value is still to be taken from the weights, in the order of FROM_WEIGHTS."""
    values = flatten(config)
    return [key for key, value in FROM_WEIGHTS.items() if values[key] == value]


def explanations() -> dict[str, str]:
    """Returns {'optimizer.learning_rate': the comment beside it in default_config, or ''}."""
    source = inspect.getsource(default_config)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }

    def leaves(node: ast.Dict, prefix: str) -> Iterator[tuple[str, str]]:
        for key, value in zip(node.keys, node.values, strict=True):
            assert isinstance(key, ast.Constant) and isinstance(key.value, str)
            if isinstance(value, ast.Dict):
                yield from leaves(value, f"{prefix}{key.value}.")
            else:
                yield f"{prefix}{key.value}", comments.get(value.lineno, "")

    (call,) = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    assert isinstance(call.args[0], ast.Dict)
    return dict(leaves(call.args[0], ""))


def resolve(stored: Mapping[str, Any]) -> ConfigDict:
    """Returns a run's stored config, with defaults for keys that it lacks."""
    config = default_config()
    _update(config, flatten(ConfigDict(stored)), "of the run")
    return config


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns {'optimizer.learning_rate': 0.001, ...}."""

    def leaves(node: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, ConfigDict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(leaves(config, ""))


def load_config(path: str, overrides: dict[str, str]) -> ConfigDict:
    """Returns the defaults, changed by a config and then by overrides ({'optimizer.learning_rate': '0.01'}).

    path: a Python file with get_config(), a run's config.json, or the name of a config that ships ('quickstart').
    Raises UserError for a missing or broken file, an unknown key (with its nearest neighbour), a wrong type or a
    value out of range.
    """
    config = default_config()
    _update(config, flatten(_get_config(path)), f"in {path}")
    _update(config, {key: _parse(key, text, config) for key, text in overrides.items()}, "on the command line")
    config.model.arch = canonical(config.model.arch)
    _check_values(config)
    return config


def shipped_configs() -> dict[str, Path]:
    """Returns {'quickstart': its file, ...} of the configs that ship with jaxft."""
    package = Path(__file__).parent  # of an installed wheel, or of a clone, where configs/ is beside it
    files = sorted((package / "configs").glob("*.py")) or sorted((package.parent / "configs").glob("*.py"))
    return {file.stem: file for file in files}


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """Parses ['--config.seed=1', '--config.batch_size', '32'] to {'seed': '1', 'batch_size': '32'}."""
    overrides = {}
    rest = iter(arguments)
    for argument in rest:
        key, equals, value = argument.partition("=")
        if not key.startswith("--config."):
            raise UserError(f"unknown argument '{argument}'; config keys are set by --config.KEY=VALUE")
        overrides[key.removeprefix("--config.")] = value if equals else next(rest, "")
    return overrides


def _get_config(path: str) -> ConfigDict:
    file = _find(path)
    try:
        if file.suffix == ".json":  # written into a workdir
            return ConfigDict(json.loads(file.read_text()))
        spec = importlib.util.spec_from_file_location("jaxft_config_file", file)
        assert spec and spec.loader, "its name must end in .py or .json"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return ConfigDict(module.get_config())
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f" (line {lines[-1]})" if lines else ""
        raise UserError(f"{path} gives no config: {type(error).__name__}: {error}{where}") from error


def _find(path: str) -> Path:
    """Returns the file of a path or of a shipped config's name. Raises UserError that suggests the closest one."""
    file, shipped = Path(path), shipped_configs()
    if path in shipped:
        return shipped[path]
    try:
        open_regular(file).close()
        return file
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {reason(error)}") from None
    is_name = file.name == path and not file.suffix
    candidates = {other.name: str(other) for other in file.parent.glob("*.py")} | {name: name for name in shipped}
    matches = difflib.get_close_matches(file.name, candidates, 1, 0.4)
    hint = f"did you mean {candidates[matches[0]]}?" if matches else ""
    if is_name or not matches:
        hint = f"{hint} jaxft ships {', '.join(shipped)}".lstrip()
    raise UserError(f"there is no config {'named' if is_name else 'file'} {path}; {hint}")


def _unknown_key(key: str, known: list[str]) -> str:
    if section := [other for other in known if other.startswith(f"{key}.")]:
        return f"'{key}' is a group of config keys; set one of them, such as '{section[0]}'"
    matches = difflib.get_close_matches(key, known, 1)
    return f"there is no config key '{key}'; " + (f"did you mean '{matches[0]}'?" if matches else "see jaxft/config.py")


def _parse(key: str, text: str, config: ConfigDict) -> Any:
    """Returns an override's value, converted to the type of the value that it replaces."""
    known = flatten(config)
    if key not in known:
        raise UserError(_unknown_key(key, list(known)))
    if isinstance(known[key], str):
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text  # of a wrong type, which _update reports


def _update(config: ConfigDict, values: dict[str, Any], where: str) -> None:
    known = flatten(config)
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{_unknown_key(key, list(known))} ({where})")
        expected = type(known[key])
        if expected is float and type(value) is int:
            value = float(value)
        if type(value) is not expected:
            raise UserError(f"config key '{key}' takes {_article(expected)}, not {value!r} ({where})")
        *parents, leaf = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[leaf] = value


def _article(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}[kind]


def _check_values(config: ConfigDict) -> None:
    values = flatten(config)
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            matches = difflib.get_close_matches(values[key], choices, 1)
            hint = f"did you mean '{matches[0]}'?" if matches else f"one of {', '.join(choices)}"
            raise UserError(f"config key '{key}' cannot be '{values[key]}'; {hint}")
    for key, (low, high) in RANGES.items():
        if not low <= values[key] <= high and values[key] not in (AUTO.get(key), FROM_WEIGHTS.get(key)):
            bounds = f"at least {low}" if values[key] < low else f"at most {high}"
            for table, source in ((AUTO, "data"), (FROM_WEIGHTS, "weights")):
                if table.get(key, low) < low:
                    bounds += f", or {table[key]} to derive it from the {source}"
                    break
            raise UserError(f"config key '{key}' must be {bounds}, not {values[key]}")
    check_sizes(config)


def check_sizes(config: ConfigDict) -> None:
    """Raises UserError if image_size, data.resize and data.stored_size contradict each other."""
    resize, image_size, stored_size = config.data.resize, config.image_size, config.data.stored_size
    if resize > 0 and not image_size:
        raise UserError(f"config key 'data.resize' is {resize} and image_size is 0; set both, or data.resize to 0")
    if 0 < resize < image_size:
        raise UserError(
            f"config key 'data.resize' is {resize}, less than the image_size of {image_size} that is cropped from it; "
            f"set it to 0 or at least {image_size}"
        )
    if stored_size and stored_size < resize:
        raise UserError(
            f"config key 'data.stored_size' is {stored_size}, less than data.resize; set it to 0 or at least {resize}"
        )
