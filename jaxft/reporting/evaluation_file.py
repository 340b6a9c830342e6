"""DIR/evaluation.npz: the latest epoch's predictions, with the images to look at, from which a report is drawn."""

import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from jaxft.config import count_steps_per_epoch, resolve
from jaxft.data.dataset import Dataset
from jaxft.errors import UserError
from jaxft.files import atomic_write, open_regular, reason
from jaxft.reporting.worst_images import largest_losses, ranked_mistakes
from jaxft.run import remote_workdir
from jaxft.run.metrics_file import ALL_KEYS, read_lines, row_score
from jaxft.run.workdir import Workdir
from jaxft.targets.calibration import check_calibrations
from jaxft.targets.classification import Predictions
from jaxft.targets.joint import (
    Calibrations,
    JointPredictions,
    Targets,
    count_outputs,
    find_metric,
    is_one_class,
    targets_of,
)
from jaxft.training.selection import is_over

MISTAKES = 24  # most confident mistakes, or images of the largest loss, that a report shows
SHARED = 100  # test images that are also trained on, and that a report shows
THUMBNAIL = 128  # pixels of the longer side, at most
_KINDS = {"label": "iu", "predicted": "iu", "confidence": "f", "rank": "iu", "loss": "f"}  # NumPy's kinds of dtypes
_INFO = {"config": dict, "class_names": list, "train_size": int, "weights": dict, "versions": dict}


class Run(NamedTuple):
    """A run as it was after its latest epoch."""

    workdir: Workdir
    info: dict[str, Any]  # the info of its checkpoints
    rows: list[dict[str, Any]]  # of metrics.jsonl, with at least one evaluation
    predictions: Any  # for the test split: Predictions of a single class, else JointPredictions
    mistakes: np.ndarray  # int (K,), positions in the test split of the images to show, the worst first
    thumbnails: list[np.ndarray]  # images of the K mistakes
    files: list[str]  # names of the K mistakes
    shared: list[tuple[str, str]]  # test images that are also trained on: their names in both splits, at most SHARED
    num_shared: int  # how many there are
    features_seconds: float  # time spent on computing a frozen backbone's features, in the latest process
    diverged: int  # the step at which the training diverged, or 0
    calibrations: Calibrations = MappingProxyType({})  # of the latest epoch's checkpoint, by target

    @property
    def display_name(self) -> str:
        return escaped(remote_workdir.display_name(self.workdir.path))

    @property
    def name(self) -> str:
        return PurePath(self.display_name).name

    @property
    def config(self) -> ConfigDict:
        return resolve(self.info["config"])

    @property
    def class_names(self) -> list[str]:
        return [escaped(name) for name in self.info["class_names"]]

    @property
    def targets(self) -> Targets:
        return targets_of(self.info)

    @property
    def metric(self) -> str:
        """The full name of the metric that chooses the best checkpoint."""
        return find_metric(self.targets, self.config.best_metric)

    @property
    def num_tested(self) -> int:
        """The number of images in the test split."""
        label = self.predictions.label
        return len(next(iter(label.values())) if isinstance(label, dict) else label)

    @property
    def ended_early(self) -> bool:
        """True if the run ended before its last epoch."""
        scores = {row["step"]: row_score(row) for row in self.split("eval")}
        return self.epoch < self.config.num_epochs and is_over(self.config, scores)

    @property
    def finished(self) -> bool:
        return self.epoch == self.config.num_epochs or self.ended_early

    @property
    def best_row(self) -> dict[str, Any]:
        """The evaluation of the best checkpoint on the test split; the latest of equal ones, as `best` is resolved."""
        return max(self.split("eval"), key=lambda row: (row_score(row), row["step"]))

    @property
    def epoch(self) -> int:
        """The latest epoch that has been evaluated."""
        return self.split("eval")[-1]["epoch"]

    @property
    def steps_per_epoch(self) -> int:
        return count_steps_per_epoch(self.config, self.info["train_size"])

    def split(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["split"] == name]


def escaped(name: str) -> str:
    """Returns a name as HTML and SVG can hold it: bytes that are not UTF-8 and control characters as escapes."""
    text = name.encode(errors="backslashreplace" if _has_foreign_surrogates(name) else "surrogateescape")
    decoded = text.decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in decoded)


def _has_foreign_surrogates(name: str) -> bool:
    """Returns whether a text has surrogates that do not stand for a byte of a file name (PEP 383)."""
    return any("\ud800" <= c <= "\udfff" and not "\udc80" <= c <= "\udcff" for c in name)


def image_path(data: Dataset, index: int, split: str) -> str:
    """Returns the path of an image, or a name like test[12] if it does not come from a file."""
    return os.fspath(data.origin.files[index]) if data.origin.files else f"{split}[{index}]"


def image_name(data: Dataset, index: int, split: str) -> str:
    """Returns an image's path relative to the dataset's folder, printable, or its `image_path` if it has no file."""
    return escaped(image_path(data, index, split).removeprefix(f"{data.origin.folder}/"))


def thumbnail(image: np.ndarray) -> np.ndarray:
    small = Image.fromarray(image)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(small)


# More than six parameters: everything that a report shows and that is not in another file.
def write_evaluation(
    workdir: Workdir,
    info: dict[str, Any],
    test_data: Dataset,
    predictions: Predictions | JointPredictions,
    calibrations: Calibrations = MappingProxyType({}),
    shared: Sequence[tuple[str, str]] = (),
    features_seconds: float = 0.0,
) -> None:
    """Writes the file. shared: `image_name` of test images that are also trained on, in both splits. Raises OSError."""
    split = resolve(info["config"]).data.eval_split
    arrays: dict[str, Any]
    if isinstance(predictions, JointPredictions):
        labels = {_label_key(name): label for name, label in predictions.label.items()}
        arrays = {"logits": np.asarray(predictions.logits, np.float32)} | labels
        mistakes = largest_losses(targets_of(info), predictions)[:MISTAKES]
    else:
        arrays = {name: getattr(predictions, name) for name in _KINDS}
        mistakes = ranked_mistakes(predictions)[:MISTAKES]
    if calibrations:
        arrays["calibration"] = np.array(json.dumps(dict(calibrations)))
    files = [image_name(test_data, index, split) for index in mistakes.tolist()]
    arrays |= {
        "mistakes": mistakes,
        "info": np.array(json.dumps(info)),
        "files": np.array(files, np.str_),
        "shared": np.array(shared[:SHARED], np.str_).reshape(-1, 2),
        "num_shared": np.array(len(shared)),
        "features_seconds": np.array(features_seconds),
        **{f"picture_{i}": thumbnail(test_data.image[index]) for i, index in enumerate(mistakes)},
    }
    _write(workdir.evaluation, arrays)


def _label_key(target: str) -> str:
    return f"label:{target}"


def write_divergence(run: Run, step: int) -> Run:
    """Adds the step at which the training diverged to the file, and returns the run with it. Raises OSError."""
    with open_regular(run.workdir.evaluation) as file, np.load(file) as arrays:
        _write(run.workdir.evaluation, dict(arrays) | {"diverged": np.array(step)})
    return run._replace(diverged=step)


def _write(path: Path, arrays: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


def load_run(workdir: Workdir) -> Run:
    """Loads the files that training wrote. Raises UserError if no epoch is finished or a file is damaged."""
    path = workdir.evaluation
    remedy = "put it back (a run that is not finished writes it again), or train in another workdir"
    try:
        with open_regular(path) as file, np.load(file) as arrays:
            run = _parse(workdir, dict(arrays))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{workdir.path} has no finished epoch to report; name another --workdir") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}; {remedy}") from None
    except Exception as error:  # NumPy and zipfile raise exceptions of any type for damaged files
        cause = (error or type(error).__name__) if zipfile.is_zipfile(path) else "it is not an npz file"
        raise UserError(f"{path} is damaged ({cause}); {remedy}") from None
    _check_run(run, remedy)
    run = run._replace(rows=read_lines(workdir.metrics, ALL_KEYS))
    if not run.split("eval"):
        raise UserError(f"{workdir.metrics} has no evaluation to report; put it back, or name another --workdir")
    return run


def _check_run(run: Run, remedy: str) -> None:
    """Raises UserError if the predictions are those of another run than DIR/config.json's."""
    if difference := run.workdir.other_run(run.config):
        raise UserError(f"{run.workdir.evaluation} is of another run ({difference}); {remedy}")


def _parse(workdir: Workdir, arrays: dict[str, np.ndarray]) -> Run:
    """Returns a run without rows. Raises any exception if the arrays do not fit together.

    Files of version 0.1 have only the predictions, the info and the mistakes.
    """
    info = json.loads(str(_array(arrays, "info", "U", ())))
    _check(isinstance(info, dict), "info is not an object")
    for key, kind in _INFO.items():
        _check(isinstance(info.get(key), kind), f"{key} in info is not a {kind.__name__}")
    _check(all(isinstance(name, str) for name in info["class_names"]), "class_names in info are not texts")
    config, targets = resolve(info["config"]), targets_of(info)
    _check(config.batch_size > 0 and info["train_size"] > 0, "info has a number that is too small")
    find_metric(targets, config.best_metric)

    if is_one_class(targets):
        predictions: Predictions | JointPredictions = _parse_predictions(arrays, len(info["class_names"]))
        size = len(predictions.label)
    else:
        predictions = _parse_joint_predictions(arrays, targets)
        size = len(predictions.logits)
    calibrations = json.loads(str(_array({"calibration": np.array("{}")} | arrays, "calibration", "U", ())))
    check_calibrations([target.field for target in targets], calibrations)

    mistakes = _array(arrays, "mistakes", "iu", (arrays["mistakes"].size,))
    _check_range("mistakes", mistakes, size)
    thumbnails = [arrays[f"picture_{i}"] for i in range(len(mistakes))]
    for image in thumbnails:
        _check(
            image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size > 0,
            "an image is not uint8 (H, W, 3)",
        )
    unnamed = np.array([f"{config.data.eval_split}[{index}]" for index in mistakes.tolist()], np.str_)
    files = _array({"files": unnamed} | arrays, "files", "U", mistakes.shape)
    shared = arrays.get("shared", np.zeros((0, 2), np.str_))
    pairs = _array({"shared": shared}, "shared", "U", (shared.shape[0], 2))
    numbers = {"num_shared": np.array(0), "features_seconds": np.array(0.0), "diverged": np.array(0)} | arrays
    return Run(
        workdir,
        info,
        [],
        predictions,
        mistakes,
        thumbnails,
        [str(name) for name in files],
        [(str(test), str(train)) for test, train in pairs],
        int(_array(numbers, "num_shared", "iu", ())),
        float(_array(numbers, "features_seconds", "f", ())),
        int(_array(numbers, "diverged", "iu", ())),
        calibrations,
    )


def _parse_predictions(arrays: dict[str, np.ndarray], num_classes: int) -> Predictions:
    """Returns the predictions of a single class."""
    _check(num_classes > 1, "info has a number that is too small")
    size = arrays["label"].size
    _check(size > 0, "there are no predictions")
    predictions = Predictions(**{name: _array(arrays, name, kind, (size,)) for name, kind in _KINDS.items()})
    for name in ("label", "predicted", "rank"):
        _check_range(name, getattr(predictions, name), num_classes)
    _check(
        bool((predictions.confidence >= 0).all() and (predictions.confidence <= 1).all()),
        "confidence is not between 0 and 1",
    )
    _check(bool(np.isfinite(predictions.loss).all()), "loss is not finite")
    return predictions


def _parse_joint_predictions(arrays: dict[str, np.ndarray], targets: Targets) -> JointPredictions:
    """Returns the predictions of tags, a number or several targets."""
    size = len(arrays["logits"])
    _check(size > 0, "there are no predictions")
    logits = _array(arrays, "logits", "f", (size, count_outputs(targets)))
    _check(bool(np.isfinite(logits).all()), "logits are not finite")
    label = {}
    for field in (target.field for target in targets):
        key = _label_key(field.name)
        if field.kind == "number":
            label[field.name] = _array(arrays, key, "f", (size,))
            _check(not np.isinf(label[field.name]).any(), f"{key} is not finite")
        else:
            tags = field.kind == "tags"
            label[field.name] = _array(arrays, key, "i", (size, field.num_outputs) if tags else (size,))
            _check_range(key, label[field.name] + 1, 3 if tags else field.num_outputs + 1)  # -1 is missing
    return JointPredictions(logits, label)


def _array(arrays: dict[str, np.ndarray], name: str, kinds: str, shape: Iterable[int]) -> np.ndarray:
    """Returns an array, whose dtype is one of NumPy's `kinds`. Raises ValueError."""
    array = arrays[name]
    _check(array.dtype.kind in kinds and array.shape == tuple(shape), f"{name} is {array.dtype} {array.shape}")
    return array


def _check_range(name: str, array: np.ndarray, size: int) -> None:
    _check(bool((array >= 0).all() and (array < size).all()), f"{name} is out of range")


def _check(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
