"""The report of a run: one HTML file that needs no network, drawn from DIR/evaluation.npz and DIR/metrics.jsonl."""

import base64
import dataclasses
import io
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
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
from jaxft.files import atomic_write
from jaxft.reporting import charts
from jaxft.reporting.sheet_image import draw_sheet
from jaxft.run import remote_workdir
from jaxft.run.metrics_file import read_lines
from jaxft.run.workdir import Workdir
from jaxft.targets.classification import (
    CALIBRATION_BINS,
    Predictions,
    calibration,
    confusion_matrix,
    evaluation_summary,
    score_cards,
)
from jaxft.training.optimizer import learning_rate_schedule

MISTAKES = 24  # shown
CONFUSIONS = 8  # listed
SHEET = (4, 8)  # rows and columns of augmented images
THUMBNAIL = 128  # pixels of the longer side, at most
DRAWN_EVERY = 60  # seconds of training and evaluation
CURVE_POINTS = 60  # at most; a curve with more rows shows their means


class Run(NamedTuple):
    """A run as it was after its latest epoch."""

    workdir: Workdir
    info: dict[str, Any]  # the info of its checkpoints
    rows: list[dict[str, Any]]  # of metrics.jsonl
    predictions: Predictions  # of the test split
    mistakes: np.ndarray  # int (K,), positions in the test split, the most confident first
    thumbnails: list[np.ndarray]  # images of the K mistakes

    @property
    def display_name(self) -> str:
        return remote_workdir.display_name(self.workdir.path)

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


def update(
    workdir: Workdir, info: dict[str, Any], train_data: Dataset, test_data: Dataset, predictions: Predictions
) -> None:
    """Writes DIR/evaluation.npz after an epoch, and draws the report at most once a minute and after the last epoch.

    A failure is reported on stderr and does not end the training. train_data: for the sheet of augmented images.
    """
    try:
        _write_evaluation(workdir, info, test_data, predictions)
        run = load_run(workdir)
        if _is_due(run):
            _write_sheet(run, train_data)
            write_page(workdir.report, render(run))
    except (OSError, UserError) as error:
        message = " ".join(f"the report in {workdir.path} could not be written: {error}".split())
        print(f"\n{message}", file=sys.stderr, flush=True)


def _write_evaluation(workdir: Workdir, info: dict[str, Any], test_data: Dataset, predictions: Predictions) -> None:
    wrong = np.flatnonzero(predictions.rank)
    mistakes = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:MISTAKES]
    thumbnails = {f"picture_{i}": _thumbnail(test_data.image[index]) for i, index in enumerate(mistakes)}
    arrays = dataclasses.asdict(predictions) | thumbnails
    with atomic_write(workdir.evaluation) as file:
        np.savez_compressed(file, mistakes=mistakes, info=np.array(json.dumps(info)), **arrays)


def _is_due(run: Run) -> bool:
    """Returns whether the latest epoch is the last, or completed another minute of the run. Drawing takes 0.5 s."""
    before = sum(row["seconds"] for row in run.rows if row["epoch"] < run.epoch)
    after = sum(row["seconds"] for row in run.rows)
    return run.epoch == run.config.num_epochs or before // DRAWN_EVERY < after // DRAWN_EVERY


def _write_sheet(run: Run, train_data: Dataset) -> None:
    """Writes DIR/sheet.jpg once, if the run augments its images."""
    if run.config.augment == default_config().augment or run.workdir.sheet.exists():
        return
    sheet = Image.fromarray(draw_sheet(run.config, train_data, *SHEET))
    sheet.thumbnail((SHEET[1] * THUMBNAIL, SHEET[0] * THUMBNAIL))
    with atomic_write(run.workdir.sheet) as file:
        sheet.save(file, "JPEG", quality=85)


def _thumbnail(image: np.ndarray) -> np.ndarray:
    thumbnail = Image.fromarray(image)
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(thumbnail)


def load_run(workdir: Workdir) -> Run:
    """Loads the files that `update` wrote. Raises UserError if no epoch is finished or a file is damaged."""
    path = workdir.evaluation
    if not path.exists():
        raise UserError(f"{workdir.path} has no finished epoch to report; name another --workdir")
    try:
        with np.load(path) as file:
            predictions = Predictions(**{field.name: file[field.name] for field in dataclasses.fields(Predictions)})
            mistakes = file["mistakes"]
            thumbnails = [file[f"picture_{i}"] for i in range(len(mistakes))]
            info = json.loads(str(file["info"]))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); the next epoch writes it again, or train in another workdir"
        ) from None
    return Run(workdir, info, read_lines(workdir.metrics), predictions, mistakes, thumbnails)


def write_page(path: Path, html: str) -> None:
    """Writes the page. Raises UserError if the file cannot be written."""
    try:
        with atomic_write(path, "w") as file:
            file.write(html)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def render(run: Run) -> str:
    """Returns the HTML of a run's report."""
    config, names = run.config, run.class_names
    scores = evaluation_summary(run.predictions, names)
    matrix = confusion_matrix(run.predictions, len(names))
    sheet = run.workdir.sheet
    return _template("report").render(
        name=run.name,
        workdir=shlex.quote(run.display_name),
        config_file=shlex.quote(str(run.workdir.config)),
        repeat_workdir=shlex.quote(f"{run.display_name}-again"),
        config=config,
        class_names=names,
        epoch=run.epoch,
        scores=scores,
        cards=list(_cards(run, scores)),
        curves=_curves([run]),
        classes=_classes(matrix, names),
        confusion=charts.confusion(matrix, names),
        reliability=charts.reliability(calibration(run.predictions)),
        bins=CALIBRATION_BINS,
        confusions=_confusions(matrix, names),
        mistakes=list(_mistakes(run)),
        sheet=_data_uri(sheet.read_bytes(), "jpeg") if sheet.exists() else "",
        settings=_settings(config),
        weights=_weights(run.info["weights"]),
        versions=list(run.info["versions"].items()),
    )


def _cards(run: Run, scores: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (value, meaning) of the figures at the top of the page."""
    best = max(run.split("eval"), key=lambda row: row["accuracy"])
    yield f"{best['accuracy']:.2%}", "accuracy of the best epoch, whose checkpoint is kept"
    yield from score_cards(scores)
    yield f"{run.info['train_size']:,}", "training images"
    speed = np.median([row["images_per_second"] for row in run.split("train")])
    yield f"{speed:,.0f}", "images/s in training (median)"
    yield _duration(sum(row["seconds"] for row in run.rows)), "training and evaluation time"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _classes(matrix: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row per class, the least accurate first and classes without images last."""
    rows = []
    for i, (name, counts) in enumerate(zip(names, matrix, strict=True)):
        num_images, wrong = int(counts.sum()), counts.copy()
        wrong[i] = 0
        row = {
            "name": name,
            "num_images": num_images,
            "accuracy": int(counts[i]) / num_images if num_images else None,
            "taken_for": names[wrong.argmax()] if wrong.any() else "",
            "times": int(wrong.max()),
        }
        rows.append(row)
    return sorted(rows, key=lambda row: (row["accuracy"] is None, row["accuracy"]))


def _confusions(matrix: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, int]]:
    """Returns (true class, predicted class, times) of the most frequent confusions."""
    wrong = matrix - np.diag(np.diag(matrix))
    most_frequent = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]
    pairs = [divmod(int(flat), len(names)) for flat in most_frequent]
    return [(names[i], names[j], int(wrong[i, j])) for i, j in pairs if wrong[i, j]]


def _mistakes(run: Run) -> Iterator[dict[str, Any]]:
    for index, thumbnail in zip(run.mistakes.tolist(), run.thumbnails, strict=True):
        yield {
            "uri": _png(thumbnail),
            "index": index,
            "truth": run.class_names[run.predictions.label[index]],
            "predicted": run.class_names[run.predictions.predicted[index]],
            "confidence": float(run.predictions.confidence[index]),
        }


def _settings(config: ConfigDict) -> list[tuple[str, Any, bool]]:
    """Returns (key, value, whether it differs from the default), those that differ first."""
    default = flatten(default_config())
    settings = [(key, value, value != default[key]) for key, value in flatten(config).items()]
    return sorted(settings, key=lambda row: not row[2])


def _weights(provenance: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in provenance.items() if not isinstance(value, dict) and key != "class_names"]


def render_comparison(runs: Sequence[Run]) -> str:
    """Returns the HTML of a page that shows several runs side by side."""
    scores = [evaluation_summary(run.predictions, run.class_names) for run in runs]
    cards = [{meaning: value for value, meaning in _cards(run, score)} for run, score in zip(runs, scores, strict=True)]
    labels = list(dict.fromkeys(meaning for card in cards for meaning in card))
    accuracy = [
        f"{score['accuracy']:.2%} ({score['accuracy_interval'][0]:.1%} to {score['accuracy_interval'][1]:.1%})"
        for score in scores
    ]
    configs = [flatten(run.config) for run in runs]
    different = [key for key in configs[0] if any(config[key] != configs[0][key] for config in configs)]
    names = runs[0].class_names
    same_classes = all(run.class_names == names for run in runs)
    return _template("compare").render(
        names=_distinct_names(runs),
        results=[
            ("accuracy (95 % interval)", accuracy),
            *((label, [card.get(label, "-") for card in cards]) for label in labels),
        ],
        curves=_curves(runs),
        differences=[(key, [config[key] for config in configs]) for key in different],
        classes=[
            (name, [_percent(score["per_class_accuracy"][name]) for score in scores])
            for name in (names if same_classes else ())
        ],
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _curves(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Returns charts of loss, accuracy, learning rate and speed; for several runs without the training split."""
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
    """Returns (epochs, values), averaged in at most CURVE_POINTS equal bins; speed is weighted by time."""
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


def _template(name: str) -> Any:
    environment = Environment(loader=PackageLoader("jaxft.reporting"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(f"{name}.html.jinja")


def _png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return _data_uri(buffer.getvalue(), "png")


def _data_uri(image: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
