"""The report of a run: one HTML file that needs no network, drawn from DIR/evaluation.npz and DIR/metrics.jsonl."""

import base64
import io
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from ml_collections import ConfigDict
from PIL import Image

from jaxft.config import default_config, flatten
from jaxft.files import atomic_write, read_regular
from jaxft.reporting import charts
from jaxft.reporting.evaluation_file import Run, escaped
from jaxft.reporting.sections import (
    Scored,
    calibration_text,
    class_content,
    described_images,
    score_targets,
    target_sections,
    validation_text,
)
from jaxft.run.metrics_file import row_score
from jaxft.run.workdir import Workdir
from jaxft.targets.classification import evaluation_summary, score_cards
from jaxft.targets.joint import format_metric, full_name, is_one_class, value_of_score
from jaxft.targets.metrics import CALIBRATION_BINS, LOWER_IS_BETTER
from jaxft.training.optimizer import learning_rate_schedule

CURVE_POINTS = 60  # at most; a curve with more rows shows their means


def read_sheet(workdir: Workdir) -> bytes:
    """Returns the content of DIR/sheet.jpg, or b"" if it is not a JPEG image."""
    try:
        content = read_regular(workdir.sheet)
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            image.load()
    except Exception:  # Pillow's plugins raise exceptions of any type for damaged files
        return b""
    return content


def write_page(path: Path, html: str) -> None:
    """Writes the page, as UTF-8. Raises OSError."""
    with atomic_write(path) as file:
        file.write(html.encode(errors="backslashreplace"))


def render(run: Run) -> str:
    """Returns the HTML of a run's report."""
    config, sheet = run.config, read_sheet(run.workdir)
    return _template("report").render(
        name=run.name,
        workdir=shlex.quote(run.display_name),
        config_file=shlex.quote(escaped(str(run.workdir.config))),
        repeat_workdir=shlex.quote(f"{run.display_name}-again"),
        config=config,
        epoch=run.epoch,
        diverged=run.diverged,
        unfinished=not run.finished and not run.diverged,
        ended_early=_ended_early_text(run),
        selection=_selection_text(run),
        curves=_curves([run]),
        shared=run.shared,
        num_shared=run.num_shared,
        to_check=run.workdir.to_check.name if run.workdir.to_check.is_file() else "",
        sheet=_data_uri(sheet, "jpeg") if sheet else "",
        settings=_settings(config),
        weights=_weights(run.info["weights"]),
        versions=list(run.info["versions"].items()),
        **(_class_results(run) if is_one_class(run.targets) else _target_results(run)),
    )


def _class_results(run: Run) -> dict[str, Any]:
    """Returns the template's values for a run with a single class."""
    names = run.class_names
    scores = evaluation_summary(run.predictions, names)
    low, high = scores["accuracy_interval"]
    interval = f"{100 * low:.1f} to {100 * high:.1f}%"
    return {
        "subject": f"{len(names)} classes",
        "headline": f"{scores['accuracy']:.2%}",
        "cards": [
            (f"{scores['accuracy']:.2%}", f"accuracy (95 % confidence interval: {interval})"),
            *_best_cards(run),
            *score_cards(scores),
            *_size_cards(run),
            *_speed_cards(run),
        ],
        "content": class_content(run.predictions, names) | {"bins": CALIBRATION_BINS},
        "calibration": _class_calibration(run, scores),
        "mistakes": list(_mistakes(run)),
        "sections": [],
    }


def _target_results(run: Run) -> dict[str, Any]:
    """Returns the template's values for a run with tags, a number or several targets."""
    scored = score_targets(run)
    best, *others = _best_cards(run)
    field = scored[0].target.field
    subject = {"tags": f"{len(field.names)} tags", "number": "a number"}.get(field.kind, "")
    images = zip(described_images(run), run.thumbnails, strict=True)
    return {
        "subject": subject if len(scored) == 1 else f"{len(scored)} targets",
        "headline": f"{escaped(run.metric)} {best[0]}",
        "cards": [
            best,
            *others,
            *(_target_card(run, own) for own in scored),
            (f"{run.num_tested:,}", "test images"),
            *_size_cards(run),
            *_speed_cards(run),
        ],
        "sections": list(target_sections(run, scored)),
        "worst": [{"uri": _png(image), "file": file, "rows": rows} for (file, rows), image in images],
    }


def _target_card(run: Run, own: Scored) -> tuple[str, str]:
    name = escaped(full_name(run.targets, own.target.field.name, own.target.default_metric))
    interval = own.interval_text()
    return own.default_text(), f"{name} after epoch {run.epoch}" + f" (95 % interval: {interval})" * bool(interval)


def _best_cards(run: Run) -> Iterator[tuple[str, str]]:
    """Yields (value, meaning) of the metric that chooses the best checkpoint, on the test and validation splits."""
    metric, best = run.metric, run.best_row
    yield format_metric(metric, best.get(metric)), f"{escaped(metric)} of the best epoch, whose checkpoint is kept"
    if run.config.data.val_split:
        value = format_metric(metric, value_of_score(metric, row_score(best)))
        yield value, f"{escaped(metric)} of the best epoch on the validation split"


def _size_cards(run: Run) -> Iterator[tuple[str, str]]:
    yield f"{run.info['train_size']:,}", "training images"


def _selection_text(run: Run) -> str:
    """Returns a sentence on how the best checkpoint was chosen."""
    extreme = "lowest" if run.metric.rpartition(".")[2] in LOWER_IS_BETTER else "highest"
    chosen = f"The best checkpoint was chosen by the {extreme} {escaped(run.metric)} on"
    if split := validation_text(run):
        return f"{chosen} {split}."
    return f"{chosen} the test split, so its score is optimistic; data.val_split=0.1 avoids that."


def _ended_early_text(run: Run) -> str:
    if not run.ended_early:
        return ""
    evaluations = f"{run.config.stop.patience} evaluation{'s' * (run.config.stop.patience != 1)}"
    return f"The run ended early, because {escaped(run.metric)} had not improved for {evaluations} (stop.patience)."


def _class_calibration(run: Run, scores: Mapping[str, Any]) -> str:
    """Returns a sentence on the temperature of a single class. Its effect is in the latest evaluation's row."""
    row = run.split("eval")[-1]
    for calibration in run.calibrations.values():
        before = {"log_loss": scores["loss"], "ece": scores["expected_calibration_error"]}
        return calibration_text(run, calibration["temperature"], before, row)
    return ""


def _speed_cards(run: Run) -> Iterator[tuple[str, str]]:
    """Yields (value, meaning) of speed and time. Features of a frozen backbone are computed before the first row."""
    train, seconds = run.split("train"), sum(row["seconds"] for row in run.rows)
    if run.features_seconds:
        share = run.info["train_size"] / (run.info["train_size"] + run.num_tested)
        num_images = sum(row["images_per_second"] * row["seconds"] for row in train)
        in_training = sum(row["seconds"] for row in train) + share * run.features_seconds
        if num_images:
            yield f"{num_images / in_training:,.0f}", "images/s in training, computing their features included"
        yield _duration(seconds + run.features_seconds), "time of features, training and evaluation"
        return
    if train:
        yield f"{np.median([row['images_per_second'] for row in train]):,.0f}", "images/s in training (median)"
    yield _duration(seconds), "training and evaluation time"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _mistakes(run: Run) -> Iterator[dict[str, Any]]:
    for index, image, file in zip(run.mistakes.tolist(), run.thumbnails, run.files, strict=True):
        yield {
            "uri": _png(image),
            "file": file,
            "truth": run.class_names[run.predictions.label[index]],
            "predicted": run.class_names[run.predictions.predicted[index]],
            "confidence": float(run.predictions.confidence[index]),
        }


def _settings(config: ConfigDict) -> list[tuple[str, Any, bool]]:
    """Returns (key, value, whether it differs from the default), those that differ first."""
    default = flatten(default_config())
    settings = [(key, value, value != default[key]) for key, value in flatten(config).items()]
    return sorted(settings, key=lambda row: not row[2])


_LISTS = ("class_names", "targets")  # of a provenance, too long for a table


def _weights(provenance: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in provenance.items() if not isinstance(value, dict) and key not in _LISTS]


def render_comparison(runs: Sequence[Run]) -> str:
    """Returns the HTML of a page that shows several runs side by side."""
    summaries = [_summary(run) for run in runs]
    cards = [_compared_cards(run, summary) for run, summary in zip(runs, summaries, strict=True)]
    labels = list(dict.fromkeys(meaning for card in cards for meaning in card))
    configs = [flatten(run.config) for run in runs]
    different = [key for key in configs[0] if any(config[key] != configs[0][key] for config in configs)]
    names = runs[0].class_names
    same_classes = all(summaries) and all(run.class_names == names for run in runs)
    return _template("compare").render(
        names=_distinct_names(runs),
        results=[
            *_compared_metrics(runs, summaries),
            *((label, [card.get(label, "-") for card in cards]) for label in labels),
        ],
        curves=_curves(runs),
        differences=[(key, [config[key] for config in configs]) for key in different],
        classes=[
            (name, [_percent(summary["per_class_accuracy"][name]) for summary in summaries])
            for name in (names if same_classes else ())
        ],
    )


def _summary(run: Run) -> dict[str, Any]:
    """Returns the scores of a run with a single class; {} for other targets."""
    return evaluation_summary(run.predictions, run.class_names) if is_one_class(run.targets) else {}


def _compared_cards(run: Run, summary: Mapping[str, Any]) -> dict[str, str]:
    """Returns {meaning: value} of the figures that a comparison shows besides the targets' metrics."""
    scores = score_cards(summary) if summary else [(f"{run.num_tested:,}", "test images")]
    cards = [*_best_cards(run), *scores, *_size_cards(run), *_speed_cards(run)]
    return {meaning: value for value, meaning in cards}


def _compared_metrics(runs: Sequence[Run], summaries: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Returns a row for the default metric of each target, with its interval; "-" for runs that lack the target."""
    columns: list[dict[tuple[str, str], str]] = []  # {(target, metric): text} of each run
    for run, summary in zip(runs, summaries, strict=True):
        if summary:
            low, high = summary["accuracy_interval"]
            name = "" if all(summaries) else escaped(run.targets[0].field.name)
            columns.append({(name, "accuracy"): f"{summary['accuracy']:.2%} ({low:.1%} to {high:.1%})"})
        else:
            columns.append({(own.name, own.target.default_metric): _with_interval(own) for own in score_targets(run)})
    keys = list(dict.fromkeys(key for column in columns for key in column))
    several = len({name for name, _ in keys}) > 1
    return [
        (
            f"{name}.{metric} (95 % interval)" if several else f"{metric} (95 % interval)",
            [column.get((name, metric), "-") for column in columns],
        )
        for name, metric in keys
    ]


def _with_interval(own: Scored) -> str:
    interval = own.interval_text()
    return f"{own.default_text()} ({interval})" if interval else own.default_text()


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _curves(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Returns charts of losses, metrics, learning rate and speed; for several runs only those of the test split."""
    several = len(runs) > 1
    names = _distinct_names(runs)
    drawn: dict[tuple[str, str], dict[str, charts.Curve]] = {}
    rate: dict[str, charts.Curve] = {}
    speed: dict[str, charts.Curve] = {}
    for run, name in zip(runs, names, strict=True):
        splits = [("eval", "test")] if several else [("train", "training"), ("val", "validation"), ("eval", "test")]
        for key in _drawn_keys(run, losses=not several):
            lines = drawn.setdefault(key, {})
            for split, title in splits:
                curve = _curve(run, split, key[0])
                if len(curve[0]) or (key[0] in ("loss", "accuracy") and split != "val"):
                    lines[f"{name}, {title}" if several else title] = curve
        speed[name] = _curve(run, "train", "images_per_second")
        if run.config.optimizer.fit_head != "only":  # L-BFGS has no learning rate
            rate[name] = _learning_rate(run)
    rates = [charts.curves("Learning rate", rate, from_zero=True)] if rate else []
    return [
        *({"alt": f"{escaped(key)} in each epoch", "uri": _chart(key, lines)} for (key, _), lines in drawn.items()),
        *({"alt": "learning rate", "uri": uri} for uri in rates),
        {"alt": "training speed", "uri": charts.curves("Training, images/s", speed, from_zero=True)},
    ]


def _drawn_keys(run: Run, *, losses: bool) -> list[tuple[str, str]]:
    """Returns (key of a row, kind of target) of the curves of a run. losses: include those of each target."""
    targets = run.targets
    kinds = {full_name(targets, t.field.name, metric): t.field.kind for t in targets for metric in t.metrics}
    keys = [("loss", "")]
    if is_one_class(targets):
        keys.append(("accuracy", "class"))
    elif losses and len(targets) > 1:
        keys += [(f"{target.field.name}.loss", "") for target in targets]
    return list(dict.fromkeys([*keys, (run.metric, kinds[run.metric])]))


def _chart(key: str, lines: Mapping[str, charts.Curve]) -> str:
    title = key.capitalize() if key in ("loss", "accuracy") else escaped(key)
    return charts.curves(title, lines, percent=format_metric(key, 0.0).endswith("%"))


def _curve(run: Run, split: str, key: str) -> charts.Curve:
    """Returns (epochs, values) of the rows that have the key, averaged in at most CURVE_POINTS equal bins.

    Speed is weighted by time.
    """
    rows = [row for row in run.split(split) if key in row]
    if not rows:
        return np.zeros(0), np.zeros(0)
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
