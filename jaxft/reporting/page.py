"""TODO."""

import base64
import dataclasses
import io
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from ml_collections import ConfigDict
from PIL import Image

from jaxft.config import default_config, flatten, resolve
from jaxft.data.dataset import Dataset
from jaxft.errors import UserError
from jaxft.reporting import charts
from jaxft.reporting.sheet_image import draw_sheet
from jaxft.run import remote_workdir
from jaxft.run.metrics_file import read_lines
from jaxft.targets.classification import (
    CALIBRATION_BINS,
    Predictions,
    calibration,
    confusion_matrix,
    evaluation_summary,
)
from jaxft.training.optimizer import learning_rate_schedule

MISTAKES = 24  # shown


SHEET = (4, 8)  # rows and columns of pictures as training sees them


THUMBNAIL = 128  # pixels of the longer side, at most


DRAWN_EVERY = 60  # seconds of training and testing


CURVE_POINTS = 60  # at most; a curve of more rows shows the mean of each such part


class Run(NamedTuple):
    """What a workdir tells of its latest epoch."""

    workdir: Path
    info: dict[str, Any]  # what checkpoints hold besides the state
    rows: list[dict[str, Any]]  # of metrics.jsonl
    predictions: Predictions  # of the test split
    mistakes: np.ndarray  # int (K,), the most confident first
    pictures: list[np.ndarray]  # the K pictures

    @property
    def display_name(self) -> str:
        return remote_workdir.display_name(self.workdir)

    @property
    def name(self) -> str:
        return PurePath(self.display_name).name

    @property
    def config(self) -> ConfigDict:
        return resolve(self.info["config"])

    @property
    def class_names(self) -> list[str]:
        return self.info["class_names"]

    @property
    def epoch(self) -> int:
        return self.rows[-1]["epoch"]

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.info["train_size"] / self.config.batch_size)

    def split(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["split"] == name]


def update(workdir: Path, info: dict[str, Any], test_data: Dataset, predictions: Predictions) -> None:
    """Writes DIR/evaluation.npz, all that the report needs besides metrics.jsonl, and the report.

    Drawing takes half a second, so it is done once in a minute and after the last epoch. A full disk is told on stderr:
    training is worth more than its report.
    """
    try:
        _update(workdir, info, test_data, predictions)
    except OSError as error:
        print(f"\nthe report in {workdir} could not be written: {error}", file=sys.stderr, flush=True)


def _update(workdir: Path, info: dict[str, Any], test_data: Dataset, predictions: Predictions) -> None:
    wrong = np.flatnonzero(predictions.rank)
    mistakes = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:MISTAKES]
    pictures = {f"picture_{i}": _thumbnail(test_data.image[index]) for i, index in enumerate(mistakes)}
    arrays = dataclasses.asdict(predictions) | pictures
    partial = workdir / "evaluation.npz.partial"
    with partial.open("wb") as file:
        np.savez_compressed(file, mistakes=mistakes, info=np.array(json.dumps(info)), **arrays)
    partial.replace(workdir / "evaluation.npz")
    run = load_run(workdir)
    before, after = (sum(row["seconds"] for row in run.rows if row["epoch"] < epoch) for epoch in (run.epoch, math.inf))
    if run.epoch == run.config.num_epochs or before // DRAWN_EVERY < after // DRAWN_EVERY:
        if run.config.augment != default_config().augment and not (workdir / "sheet.jpg").exists():
            sheet = Image.fromarray(draw_sheet(run.config, *SHEET))
            sheet.thumbnail((SHEET[1] * THUMBNAIL, SHEET[0] * THUMBNAIL))
            sheet.save(workdir / "sheet.jpg", quality=85)
        _write(workdir / "report.html", render(run))


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(image)


def load_run(workdir: Path) -> Run:
    path = workdir / "evaluation.npz"
    if not path.exists():
        raise UserError(f"{workdir} has no finished epoch to report; name another --workdir")
    try:
        with np.load(path) as file:
            predictions = Predictions(**{field.name: file[field.name] for field in dataclasses.fields(Predictions)})
            mistakes = file["mistakes"]
            pictures = [file[f"picture_{i}"] for i in range(len(mistakes))]
            info = json.loads(str(file["info"]))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); the next epoch, or training again, writes it anew") from None
    return Run(workdir, info, read_lines(workdir / "metrics.jsonl"), predictions, mistakes, pictures)


def render(run: Run) -> str:
    """report.html"""
    config, scores, names = run.config, evaluation_summary(run.predictions, run.class_names), run.class_names
    matrix = confusion_matrix(run.predictions, len(names))
    off_diagonal = matrix - np.diag(np.diag(matrix))
    default = flatten(default_config())
    return _template("report").render(
        name=run.name,
        workdir=shlex.quote(run.display_name),
        config_file=shlex.quote(str(run.workdir / "config.json")),
        repeat_workdir=shlex.quote(f"{run.display_name}-again"),
        config=config,
        class_names=names,
        epoch=run.epoch,
        scores=scores,
        cards=list(_cards(run, scores)),
        curves=_curves([run]),
        classes=sorted(
            _classes(matrix, off_diagonal, names), key=lambda row: (row["accuracy"] is None, row["accuracy"])
        ),
        confusion=charts.confusion(matrix, names),
        reliability=charts.reliability(calibration(run.predictions)),
        bins=CALIBRATION_BINS,
        confusions=[
            (names[i], names[j], int(off_diagonal[i, j]))
            for i, j in (
                divmod(int(flat), len(names)) for flat in np.argsort(-off_diagonal, axis=None, kind="stable")[:8]
            )
            if off_diagonal[i, j]
        ],
        mistakes=[
            {
                "uri": _png(picture),
                "index": index,
                "truth": names[run.predictions.label[index]],
                "predicted": names[run.predictions.predicted[index]],
                "confidence": float(run.predictions.confidence[index]),
            }
            for index, picture in zip(run.mistakes.tolist(), run.pictures, strict=True)
        ],
        sheet=_data_uri((run.workdir / "sheet.jpg").read_bytes(), "jpeg")
        if (run.workdir / "sheet.jpg").exists()
        else "",
        settings=sorted(
            ((key, value, value != default[key]) for key, value in flatten(config).items()), key=lambda row: not row[2]
        ),
        weights=[
            (key, value)
            for key, value in run.info["weights"].items()
            if not isinstance(value, dict) and key != "class_names"
        ],
        versions=list(run.info["versions"].items()),
    )


def render_comparison(runs: Sequence[Run]) -> str:
    """compare.html"""
    scores = [evaluation_summary(run.predictions, run.class_names) for run in runs]
    cards = [{meaning: value for value, meaning in _cards(run, score)} for run, score in zip(runs, scores, strict=True)]
    labels = list(dict.fromkeys(meaning for card in cards for meaning in card))
    accuracy = [
        f"{score['accuracy']:.2%} ({score['accuracy_interval'][0]:.1%} to {score['accuracy_interval'][1]:.1%})"
        for score in scores
    ]
    configs = [flatten(run.config) for run in runs]
    same_classes = all(run.class_names == runs[0].class_names for run in runs)
    return _template("compare").render(
        names=_distinct_names(runs),
        results=[
            ("accuracy (95 % interval)", accuracy),
            *((label, [card.get(label, "-") for card in cards]) for label in labels),
        ],
        curves=_curves(runs),
        differences=[
            (key, [config[key] for config in configs])
            for key in configs[0]
            if any(config[key] != configs[0][key] for config in configs)
        ],
        classes=[
            (name, [_percent(score["per_class_accuracy"][name]) for score in scores]) for name in runs[0].class_names
        ]
        if same_classes
        else [],
    )


def _template(name: str) -> Any:
    environment = Environment(loader=PackageLoader("jaxft.reporting"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(f"{name}.html.jinja")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _cards(run: Run, scores: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(value, meaning)"""
    best = max(run.split("eval"), key=lambda row: row["accuracy"])
    yield f"{best['accuracy']:.2%}", "in the best epoch, whose checkpoint is kept"
    for k, accuracy in scores["top_k_accuracy"].items():
        yield _percent(accuracy), f"right among the likeliest {k}"
    yield _percent(scores["mean_per_class_accuracy"]), "mean accuracy of classes"
    yield f"{scores['loss']:.3f}", "cross entropy"
    yield _percent(scores["expected_calibration_error"]), "calibration error"
    yield f"{scores['pictures']:,}", "pictures tested"
    yield f"{run.info['train_size']:,}", "pictures trained on"
    speed = np.median([row["images_per_second"] for row in run.split("train")])
    yield f"{speed:,.0f}", "images/s in training (median)"
    yield _duration(sum(row["seconds"] for row in run.rows)), "time of training and testing"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _classes(matrix: np.ndarray, off_diagonal: np.ndarray, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for i, name in enumerate(names):
        pictures, times = int(matrix[i].sum()), int(off_diagonal[i].max())
        yield {
            "name": name,
            "pictures": pictures,
            "accuracy": int(matrix[i, i]) / pictures if pictures else None,
            "taken_for": names[off_diagonal[i].argmax()] if times else "",
            "times": times,
        }


def _curves(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Loss and accuracy, of training and test, learning rate and speed, against epochs."""
    several = len(runs) > 1
    names = _distinct_names(runs)
    loss: dict[str, charts.Curve] = {}
    accuracy: dict[str, charts.Curve] = {}
    rate: dict[str, charts.Curve] = {}
    speed: dict[str, charts.Curve] = {}
    for run, name in zip(runs, names, strict=True):
        test, train = f"{name}, test" if several else "test", f"{name}, training" if several else "training"
        if not several:
            loss[train] = _curve(run, "train", "loss")
            accuracy[train] = _curve(run, "train", "accuracy")
        loss[test] = _curve(run, "eval", "loss")
        accuracy[test] = _curve(run, "eval", "accuracy")
        speed[name] = _curve(run, "train", "images_per_second")
        rate[name] = _learning_rate(run)
    return [
        {"alt": "loss in each epoch", "uri": charts.curves("Loss", loss)},
        {"alt": "accuracy in each epoch", "uri": charts.curves("Accuracy", accuracy, percent=True)},
        {"alt": "learning rate", "uri": charts.curves("Learning rate", rate, from_zero=True)},
        {"alt": "training speed", "uri": charts.curves("Training, images/s", speed, from_zero=True)},
    ]


def _curve(run: Run, split: str, key: str) -> charts.Curve:
    """Against epochs; means of equal parts where there are many rows, weighted by seconds for the speed."""
    rows = run.split(split)
    x, y, seconds = (np.array([row[name] for row in rows], float) for name in ("step", key, "seconds"))
    weights = seconds if key == "images_per_second" else np.ones(len(rows))
    starts = np.linspace(0, len(rows), min(len(rows), CURVE_POINTS), endpoint=False).astype(int)
    total = np.add.reduceat(weights, starts)
    means = [np.add.reduceat(values * weights, starts) / total for values in (x / run.steps_per_epoch, y)]
    return means[0], means[1]


def _learning_rate(run: Run) -> charts.Curve:
    config = run.config
    steps = np.linspace(0, config.num_epochs * run.steps_per_epoch - 1, 200)
    schedule = learning_rate_schedule(config.optimizer, run.steps_per_epoch, config.num_epochs)
    return (steps + 1) / run.steps_per_epoch, np.broadcast_to(
        np.asarray(schedule(jnp.asarray(steps) // config.optimizer.accumulate_steps)), steps.shape
    )


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [run.display_name for run in runs]


def _png(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return _data_uri(buffer.getvalue(), "png")


def _data_uri(image: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from None
