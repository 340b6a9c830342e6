"""The config: every key with its default and meaning, files and overrides that are checked against it."""

import ast
import difflib
import importlib.util
import inspect
import io
import json
import sys
import tokenize
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxft.errors import UserError
from jaxft.models.resnet import ARCHITECTURES


def default_config() -> ConfigDict:
    """Every key with its default."""
    return ConfigDict(
        {
            "note": "",  # printed at the end of a run
            "seed": 0,  # of the new head and of the order of pictures
            "num_epochs": 10,  # times that all pictures are trained on
            "batch_size": 64,  # over all devices; 0: the largest power of two on each that fits into its memory
            "image_size": 224,  # pixels of the shorter side after resizing; the central square is seen
            "model": {
                "arch": "resnet50",  # resnet18 to resnet152, wide_resnet50_2, resnext50_32x4d, ...
                "pretrained": "",  # a name (weights/convert.py --list), a file, or '' for random weights
                "stem": "imagenet",  # or small: one 3x3 convolution, for pictures of about 32 pixels
                "width": 64,  # channels of the first stage; torchvision's ResNets have 64
                "dtype": "float32",  # of the computation: float32 or bfloat16; parameters are float32
                "precision": "high",  # of float32's products: a GPU's TF32, a TPU's three of bfloat16; highest: float32
                "onednn": "auto",  # or always or never: a CPU's convolutions by oneDNN; auto: of long runs
                "remat": False,  # a block's activations are computed again for its gradient: less memory, more time
                "test_flip": False,  # tested and used with the mean of a picture's and its mirror image's logits
                "batch_norm": "update",  # or sync, over all devices; frozen; recalibrate, over all pictures at the end
            },
            "data": {
                "name": "cifar10",  # a TFDS name, folder:PATH, or sample:cifar10
                "dir": "",  # of prepared TFDS sets; '' for $TFDS_DATA_DIR or ~/tensorflow_datasets
                "train_split": "train",  # in TFDS's syntax: train[:90%]
                "eval_split": "test",  # tested on after each epoch
                "stored_size": 0,  # pixels of the squares that pictures of differing sizes are kept as; 0: image_size
                "holdout": 0.2,  # fraction of a folder's pictures to test with, where it has no folders by split
                "unreadable": "refuse",  # a folder's files that are no pictures; or skip
                "cache": "auto",  # decoded pictures on the disk, if half of what is free holds them; or always or never
                "stream": "auto",  # batch by batch what would take much of the memory; or always or never
                "workers": 0,  # processes that read streamed pictures; 0: threads
            },
            "optimizer": {
                "name": "sgd",  # or adamw, adabelief, lamb, lion
                "learning_rate": 0.001,  # at its highest, where a schedule changes it
                "momentum": 0.9,  # of sgd
                "nesterov": False,  # of sgd
                "weight_decay": 0.0,  # sgd adds it to the gradient as torch's does; the others decouple it
                "decay_all": True,  # also biases and BatchNorm's parameters
                "schedule": "constant",  # or cosine or linear, to 0 at the end, or step
                "step_epochs": 30.0,  # of the schedule step: the learning rate falls after each so many,
                "step_factor": 0.1,  # by this
                "warmup_epochs": 0.0,  # of linear growth from 0
                "clip_norm": 0.0,  # largest norm of the whole gradient; 0: any
                "ema_decay": 0.0,  # of the average of weights that is tested, kept and used instead of the last ones
                "accumulate_steps": 1,  # batches behind one update
                "freeze": "",  # stem, stage1 to stage4, head, backbone (all but the head), patterns; commas between
                "unfreeze": "",  # from which epoch on what trains again: '3: stage4, 5: stage3'
                "head_factor": 1.0,  # on the learning rate of the head
                "layer_decay": 1.0,  # on the learning rate, from each part to the one before: stage4, stage3, ...
            },
            "class_weights": "none",  # or balanced: classes with few pictures count as much as those with many
            "label_smoothing": 0.0,  # share of a label that is spread over all classes
            "augment": {  # of the training pictures, each time anew
                "flip": False,  # mirrored half of the time
                "shift": 0.0,  # at most, as a fraction of the side
                "first_image_size": 0,  # pixels in the first epoch, growing to image_size in the last; 0: no growth
                "crop_area": 1.0,  # smallest part of the area that is seen; 1: all of it
                "crop_ratio": 1.0,  # of its width to its height, at most, and at least the inverse
                "trivial": False,  # one operation of TrivialAugment for each picture: moved, turned, recoloured, ...
                "erase": 0.0,  # probability that a rectangle is blotted out
                "mixup": 0.0,  # alpha: how evenly two pictures and their labels are added up; 0: not at all
                "cutmix": 0.0,  # the same, one picture showing through a hole in the other
            },
            "distill": {
                "teacher": "",  # workdir of a run on the same classes, whose predictions are learnt; '' for none
                "weight": 0.5,  # of what the teacher says; the rest is for the labels
                "temperature": 2.0,  # that softens both networks' predictions
            },
            "steps_per_call": 0,  # 0: one, on a CPU several. On a GPU or TPU 10 save time where one takes few ms
            "log": {  # besides metrics.jsonl
                "tensorboard": False,  # DIR/tensorboard; needs pip install 'jaxft[tensorboard]'
                "wandb": "",  # a project of Weights & Biases; needs pip install wandb
            },
            "checkpoint": {
                "every_steps": 0,  # besides the one after each epoch; 0: none
                "keep_latest": 2,  # newest kept; two, for a run may diverge right after the newest
                "keep_best": 1,  # checkpoints of the highest accuracy kept besides
                "on_damage": "refuse",  # to resume from a damaged checkpoint; or newest_good: take one that is whole
            },
        }
    )


CHOICES: dict[str, tuple[str, ...]] = {
    "model.arch": tuple(ARCHITECTURES),
    "model.stem": ("imagenet", "small"),
    "model.dtype": ("float32", "bfloat16"),
    "model.precision": ("default", "high", "highest"),
    "model.batch_norm": ("update", "frozen", "sync", "recalibrate"),
    "model.onednn": ("auto", "always", "never"),
    "class_weights": ("none", "balanced"),
    "data.unreadable": ("refuse", "skip"),
    "data.cache": ("auto", "always", "never"),
    "data.stream": ("auto", "always", "never"),
    "optimizer.name": ("sgd", "adamw", "adabelief", "lamb", "lion"),
    "optimizer.schedule": ("constant", "cosine", "linear", "step"),
    "checkpoint.on_damage": ("refuse", "newest_good"),
}


RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "num_epochs": (1, 2**31 - 1),
    "batch_size": (0, 2**31 - 1),
    "image_size": (1, 4096),
    "model.width": (1, 4096),
    "data.stored_size": (0, 4096),
    "data.holdout": (0, 1),
    "data.workers": (0, 1024),
    "label_smoothing": (0, 1),
    "augment.first_image_size": (0, 4096),
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


# What an interrupted run may go on with another value of: the results are the same.
MAY_CHANGE = {
    "note",
    "steps_per_call",
    *(f"data.{key}" for key in ("dir", "cache", "stream", "workers")),
    *(f"log.{key}" for key in ("tensorboard", "wandb")),
    *(f"checkpoint.{key}" for key in ("every_steps", "keep_latest", "keep_best", "on_damage")),
}


def explanations() -> dict[str, str]:
    """{'optimizer.learning_rate': what the comment beside it in default_config says, or ''}"""
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
    """A config as a run has kept it, with the defaults of keys that were not there yet."""
    config = default_config()
    _update(config, flatten(ConfigDict(stored)), "of the run")
    return config


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{'optimizer.learning_rate': 0.001, ...}"""

    def leaves(node: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, ConfigDict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(leaves(config, ""))


def load_config(path: str, overrides: dict[str, str]) -> ConfigDict:
    """The defaults, changed by the file's get_config() and then by overrides ({'optimizer.learning_rate': '0.01'}).

    Raises UserError for a missing or broken file, an unknown key (with its nearest neighbour), a wrong type or a
    value out of range.
    """
    config = default_config()
    _update(config, flatten(_get_config(path)), f"in {path}")
    _update(config, {key: _parse(key, text, config) for key, text in overrides.items()}, "on the command line")
    _check_values(config)
    return config


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


def _get_config(path: str) -> ConfigDict:
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [other.name for other in file.parent.glob("*.py")], 1, 0.4)
        hint = f"did you mean {file.parent / near[0]}?" if near else "see configs/ for the ones that ship"
        raise UserError(f"there is no config file {path}; {hint}")
    try:
        if file.suffix == ".json":  # of a workdir
            return ConfigDict(json.loads(file.read_text()))
        spec = importlib.util.spec_from_file_location("jaxft_config_file", file)
        assert spec and spec.loader, "its name must end in .py or .json"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return ConfigDict(module.get_config())
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f" (line {lines[-1]})" if lines else ""
        raise UserError(f"{path} gives no config: {type(error).__name__}: {error}{where}") from error


def _unknown_key(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"there is no config key '{key}'; " + (f"did you mean '{near[0]}'?" if near else "see jaxft/config.py")


def _parse(key: str, text: str, config: ConfigDict) -> Any:
    """An override's value, by the type of the value it replaces."""
    known = flatten(config)
    if key not in known:
        raise UserError(_unknown_key(key, list(known)))
    if isinstance(known[key], str):
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text  # of a wrong type, which _update tells


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
    return {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}[kind]


def _check_values(config: ConfigDict) -> None:
    values = flatten(config)
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            near = difflib.get_close_matches(values[key], choices, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"one of {', '.join(choices)}"
            raise UserError(f"config key '{key}' cannot be '{values[key]}'; {hint}")
    for key, (low, high) in RANGES.items():
        if not low <= values[key] <= high:
            bounds = f"at least {low}" if values[key] < low else f"at most {high}"
            raise UserError(f"config key '{key}' must be {bounds}, not {values[key]}")
