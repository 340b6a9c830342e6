"""The report of runs with tags, numbers and several targets, and with a validation split."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxft import report
from jaxft.data import datasets
from jaxft.data.dataset import Dataset, Origin
from jaxft.data.fields import Field
from jaxft.evaluate import evaluation_json
from jaxft.reporting import page as report_page
from jaxft.reporting import sections, worst_images
from jaxft.reporting.evaluation_file import MISTAKES, Run, load_run
from jaxft.reporting.reporter import Reporter
from jaxft.run.workdir import Workdir
from jaxft.targets import metrics
from jaxft.targets.classification import evaluation_summary
from jaxft.targets.joint import JointPredictions
from jaxft.training.evaluation import evaluate
from tests.helpers.pages import Page, assert_self_contained
from tests.helpers.tables import SPLITS

FIELDS = (
    Field("class", "kind", "kind", 2.0, ("cat", "dog")),
    Field("tags", "tags", "tags", 0.5, ("big", "wet", "old")),
    Field("number", "age", "age", 1.0, (), 40.0, 10.0),
)


@pytest.fixture(scope="module")
def table_run(targets_run: Path) -> Workdir:
    return Workdir(targets_run)


@pytest.fixture
def copy(table_run: Workdir, tmp_path: Path) -> Workdir:
    """A copy of `table_run` without checkpoints, to be changed."""
    shutil.copytree(table_run.path, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return Workdir(tmp_path / "run")


@pytest.fixture
def tags_run(copy: Workdir) -> Workdir:
    """The workdir of a run on tags that has ended early and has no validation split."""
    rng = np.random.default_rng(0)
    label = {"tags": rng.integers(0, 2, (24, 3), np.int8)}
    write_run(copy, FIELDS[1:2], label, rng.normal(size=(24, 3)), {"mAP": [0.625, 0.5]}, {"num_epochs": 9})
    return copy


# More than six parameters: everything that the page is drawn from.
def write_run(
    workdir: Workdir,
    fields: tuple[Field, ...],
    label: dict[str, Any],
    logits: np.ndarray,
    values: dict[str, list[float]],
    changes: dict[str, Any],
) -> Run:
    """Replaces the run in a workdir by one with these predictions, whose first test image is also trained on.

    values: the best metric of each epoch. Without a validation split, and with a patience of one evaluation.
    """
    info = load_run(workdir).info
    data = info["config"]["data"] | {"name": "table:made.csv", "val_split": ""}
    config = info["config"] | {"best_metric": "", "data": data, "stop": {"patience": 1, "min_delta": 0.0}} | changes
    info = info | {"config": config, "targets": [field._asdict() for field in fields]}
    workdir.config.write_text(json.dumps(config))
    common = {"loss": 1.0, "images_per_second": 9.0, "seconds": 1.0}
    ((metric, scores),) = values.items()
    rows = []
    for step, score in enumerate(scores, 1):
        rows.append({"step": step, "epoch": step, "split": "train"} | common)
        rows.append({"step": step, "epoch": step, "split": "eval", metric: score, "score": score} | common)
    workdir.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    workdir.path.joinpath("accuracy.json").unlink(missing_ok=True)
    workdir.report.unlink()
    images = np.random.default_rng(0).integers(0, 256, (len(logits), 8, 8, 3), np.uint8)
    files = tuple(Path(f"/photos/{i}.png") for i in range(len(logits)))
    test = Dataset(images, label, (), Origin("/photos", "table", files=files), fields)
    train = test._replace(image=images[::-1] // 2, origin=Origin("/photos", "table", files=(Path("/a"), files[0])))
    Reporter(workdir, info, train, test).update(JointPredictions(logits.astype(np.float32), label))
    return load_run(workdir)


def text_of(html: str) -> str:
    return " ".join(Page(html).text.split())


def test_the_page_has_a_section_for_each_target(table_run: Workdir) -> None:
    """Compares the scores with those that evaluate prints; the calibration is that of the latest checkpoint."""
    html = table_run.report.read_text()
    assert_self_contained(Page(html), html)
    text = text_of(html)
    scores = evaluation_json(evaluate(table_run.path, "latest"))
    assert "3 targets; after epoch 2 of 2." in text
    assert "chosen by the highest colour.accuracy on the validation split 'val'." in text
    for title in ("Class: colour 19 test images", "Tags: tags 18 test images", "Number: brightness 20 test images"):
        assert f"{title} have a label." in text
    colour, tags, brightness = (scores["targets"][name] for name in ("colour", "tags", "brightness"))
    low, high = colour["intervals"]["accuracy"]
    assert f"{colour['accuracy']:.2%} colour.accuracy after epoch 2 (95 % interval: {low:.2%} to {high:.2%})" in text
    low, high = tags["intervals"]["mAP"]
    assert f"{tags['mAP']:.1%} tags.mAP after epoch 2 (95 % interval: {low:.1%} to {high:.1%})" in text
    low, high = brightness["intervals"]["mae"]
    assert f"{brightness['mae']:.4g} brightness.mae after epoch 2 (95 % interval: {low:.4g} to {high:.4g})" in text
    assert f"rmse {brightness['rmse']:.4g} r2 {brightness['r2']:.4g}" in text
    assert f"f1_weighted {tags['f1_weighted']:.1%} exact_match {tags['exact_match']:.1%}" in text
    for tag, row in tags["per_tag"].items():
        values = [row[key] for key in ("average_precision", "auroc", "precision", "recall", "f1")]
        cells = " ".join("-" if value is None else f"{100 * value:.1f}%" for value in values)
        assert f"{tag} {row['num_images']} {cells} {row['threshold']:.3f}" in text
    for name in ("colour", "tags"):
        before, after = scores["uncalibrated"][name], scores["targets"][name]
        assert f"log loss from {before['log_loss']:.4g} to {after['log_loss']:.4g} and the expected" in text
    assert html.count("<figure>") == min(MISTAKES, SPLITS["test"] - 1)  # the first image has no label
    assert "colour: no label , predicted" in text


def test_the_page_has_curves_of_each_loss_and_of_the_chosen_metric(table_run: Workdir) -> None:
    run = load_run(table_run)
    charts = [chart["alt"] for chart in report_page._curves([run])]
    keys = ("loss", "colour.loss", "tags.loss", "brightness.loss", "colour.accuracy")
    assert charts == [*(f"{key} in each epoch" for key in keys), "learning rate", "training speed"]


def test_the_gallery_shows_the_largest_losses(table_run: Workdir) -> None:
    run = load_run(table_run)
    losses = np.zeros(len(run.predictions.logits))
    for own in sections.score_targets(run):
        image_losses = worst_images.image_losses(own.target, own.logits, own.label)
        losses += own.target.field.weight * np.nan_to_num(image_losses)
        total = own.target.count_batch(own.logits, own.label, np.ones(len(losses), np.float32))
        if own.target.field.kind != "tags":
            assert np.nansum(image_losses) == pytest.approx(float(total.loss), rel=1e-5)
    assert run.mistakes.tolist() == np.argsort(-losses, kind="stable")[: len(run.mistakes)].tolist()
    assert run.files[0] == f"images/test{run.mistakes[0]}.png"


def test_a_page_says_that_the_run_ended_early(tags_run: Workdir) -> None:
    """It is drawn after the last evaluation although a minute has not passed."""
    text = text_of(tags_run.report.read_text())
    assert "3 tags; after epoch 2 of 9. The run ended early, because mAP had not improved for 1 evaluation" in text
    assert "chosen by the highest mAP on the test split, so its score is optimistic; data.val_split=0.1" in text
    assert ", not finished" not in text and "A temperature" not in text
    assert "62.5% mAP of the best epoch, whose checkpoint is kept" in text


def test_a_class_with_a_validation_split_keeps_its_page(small_run: Path, tmp_path: Path) -> None:
    """Adds how the checkpoint was chosen, curves of the metric, and the temperature with its effect."""
    run = load_run(Workdir(small_run))
    workdir = Workdir(tmp_path)
    config = run.info["config"] | {"best_metric": "log_loss"}
    info = run.info | {"config": config | {"data": config["data"] | {"val_split": "0.25"}}}
    workdir.config.write_text(json.dumps(info["config"]))
    rows = []
    for row in run.rows:
        if row["split"] == "eval":
            own = {"log_loss": row["epoch"] / 8, "ece": 0.0625}
            rows += [row | own | {"split": "val"}, row | own | {"score": -own["log_loss"] - 1}]
        else:
            rows.append(row)
    workdir.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = datasets.load("sample:cifar10", "test")
    Reporter(workdir, info, data, data).update(run.predictions, {"label": {"temperature": 1.5}})
    text, summary = text_of(workdir.report.read_text()), evaluation_summary(run.predictions, run.class_names)
    assert "chosen by the lowest log_loss on the held-out 25 % of the training images." in text
    assert "A temperature of 1.5, fitted on the held-out 25 % of the training images, changes the log loss" in text
    assert f"from {summary['loss']:.4g} to 0.375 and the expected calibration error from " in text
    assert f"{summary['expected_calibration_error']:.1%} to 6.2%. The diagram shows" in text
    assert "0.125 log_loss of the best epoch, whose checkpoint is kept" in text
    assert "1.125 log_loss of the best epoch on the validation split" in text
    assert "Classes class images accuracy" in text
    alts = [chart["alt"] for chart in report_page._curves([load_run(workdir)])][:3]
    assert alts == [f"{key} in each epoch" for key in ("loss", "accuracy", "log_loss")]


def test_runs_are_compared_by_what_they_share(
    table_run: Workdir, tags_run: Workdir, small_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(table_run.path, tmp_path / "again", ignore=shutil.ignore_patterns("checkpoints"))
    runs = [load_run(Workdir(path)) for path in (table_run.path, tmp_path / "again", tags_run.path, small_run)]
    several, _, tags, classes = runs
    text = text_of(report_page.render_comparison(runs))
    own = {scored.name: report_page._with_interval(scored) for scored in sections.score_targets(several)}
    (of_tags,) = (report_page._with_interval(scored) for scored in sections.score_targets(tags))
    assert f"colour.accuracy (95 % interval) {own['colour']} {own['colour']} - -" in text
    assert f"tags.mAP (95 % interval) {own['tags']} {own['tags']} {of_tags} -" in text
    assert f"brightness.mae (95 % interval) {own['brightness']} {own['brightness']} - -" in text
    assert "label.accuracy (95 % interval) - - - " in text
    assert "test images 24 24 24 1,000" in text
    same = text_of(report_page.render_comparison([tags, tags]))
    assert f"mAP (95 % interval) {of_tags} {of_tags}" in same
    assert "accuracy (95 % interval)" in text_of(report_page.render_comparison([classes, classes]))


def test_images_to_check_are_listed_by_target(copy: Workdir) -> None:
    """Compares with a list by hand: a class by confidence, tags by loss, a number by its error; no missing labels."""
    logits = np.array(
        [  # cat, dog; big, wet, old; age
            [0, 2, -5, -5, -5, 0],
            [3, 0, 5, 5, -5, 1],
            [0, 4, 5, -5, -1, 2],
            [0, 9, 1, 1, 1, 3],
        ]
    )
    label = {
        "kind": np.array([0, 0, 0, -1], np.int32),
        "tags": np.array([[0, 1, 0], [1, 1, 0], [1, -1, 1], [-1, -1, -1]], np.int8),
        "age": np.array([0.5, 1, -1, np.nan], np.float32),
    }
    write_run(copy, FIELDS, label, logits, {"kind.accuracy": [0.5, 0.5]}, {})
    with copy.to_check.open(newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    sigmoid = 1 / (1 + np.exp(-np.array([-4.0, -2.0])))
    losses = np.logaddexp(0, [5, -5, -5]).mean(), np.logaddexp(0, [-5, 1]).mean()
    assert rows == [
        ("mistake", "kind", "/photos/2.png", "cat", "dog", f"{1 - sigmoid[0]:.4g}", ""),
        ("mistake", "kind", "/photos/0.png", "cat", "dog", f"{1 - sigmoid[1]:.4g}", ""),
        ("mistake", "tags", "/photos/0.png", "wet", "no tag", f"{losses[0]:.4g}", ""),
        ("mistake", "tags", "/photos/2.png", "big|old", "big", f"{losses[1]:.4g}", ""),
        ("large error", "age", "/photos/2.png", "30", "60", "30", ""),
        ("large error", "age", "/photos/0.png", "45", "40", "5", ""),
        ("large error", "age", "/photos/1.png", "50", "50", "0", ""),
        ("also trained on", "", "/photos/0.png", "", "", "", "/photos/0.png"),
    ]


def test_odd_names_and_targets_without_labels_are_shown(copy: Workdir) -> None:
    """Names special to HTML and Matplotlib, a tag that no image has, a constant number, and no class label at all."""
    odd = "<script>alert(1)</script>"
    fields = (
        FIELDS[0]._replace(name=odd, names=("$x_1$ & co", "b" * 300)),
        FIELDS[1]._replace(name="$t_1$", names=(odd, "\u732b", "never\nseen")),
        FIELDS[2]._replace(name="a&b", std=1.0),
    )
    label = {
        odd: np.full(30, -1, np.int32),
        "$t_1$": np.tile(np.array([1, 0, 0], np.int8), (30, 1)),
        "a&b": np.zeros(30, np.float32),
    }
    logits = np.random.default_rng(0).normal(size=(30, 6))
    run = write_run(copy, fields, label, logits, {f"{odd}.accuracy": [0.5, 0.5]}, {})
    html = copy.report.read_text()
    page = Page(html)
    assert_self_contained(page, html)
    text = text_of(html)
    assert f"Class: {odd} No test image has a label." in text
    assert "never\\nseen" in text and "r2 undefined" in text
    assert f"{odd}: no label , predicted $x_1$" in text or f"{odd}: no label , predicted bbb" in text
    Page(report_page.render_comparison([run, run]))


def test_intervals_of_many_tags_wait_for_the_end(copy: Workdir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their resampling takes seconds, which a page drawn during training does not spend."""
    monkeypatch.setattr(sections, "RESAMPLED_CELLS", 10)
    run = load_run(copy)
    config = run.info["config"] | {"num_epochs": 9}
    unfinished = run._replace(info=run.info | {"config": config})
    ended, going = ([own.interval for own in sections.score_targets(each)] for each in (run, unfinished))
    assert ended[0] == going[0] and ended[2] == going[2]
    assert ended[1] is not None and going[1] is None


def test_a_page_of_many_images_stays_small(copy: Workdir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "number_intervals", lambda *_: {"mae": (0.0, 1.0)})
    rng = np.random.default_rng(0)
    number = FIELDS[2]
    label = {"age": rng.normal(size=20_000).astype(np.float32)}
    run = load_run(copy)
    info = run.info | {"targets": [number._asdict()]}
    info["config"] = info["config"] | {"best_metric": "mae"}
    rows = [row | {"mae": 1.0} for row in run.rows]
    predictions = JointPredictions(rng.normal(size=(20_000, 1)).astype(np.float32), label)
    html = report_page.render(run._replace(info=info, rows=rows, predictions=predictions, calibrations={}))
    assert "The diagram of predictions shows 1,000 of them." in text_of(html)
    assert len(html) < 1_500_000


def damaged_arrays() -> dict[str, dict[str, Any]]:
    """Returns replaced arrays of evaluation.npz by what is wrong with them."""
    size = SPLITS["test"]
    calibrations = {
        "a calibration that is a list": "[]",
        "a calibration of a number": '{"brightness": {"temperature": 1.0}}',
        "a temperature of 0": '{"colour": {"temperature": 0}}',
        "a temperature that is NaN": '{"colour": {"temperature": NaN}}',
        "one threshold of two": '{"tags": {"temperature": 1.0, "thresholds": [0.5]}}',
    }
    return {
        "logits of another width": {"logits": np.zeros((size, 5), np.float32)},
        "integer logits": {"logits": np.zeros((size, 6), int)},
        "infinite logits": {"logits": np.full((size, 6), np.inf, np.float32)},
        "no images": {"logits": np.zeros((0, 6), np.float32)},
        "flat logits": {"logits": np.float32(0)},
        "a class that does not exist": {"label:colour": np.full(size, 3, np.int32)},
        "a class below -1": {"label:colour": np.full(size, -2, np.int32)},
        "tags of another width": {"label:tags": np.zeros((size, 3), np.int8)},
        "a tag of 2": {"label:tags": np.full((size, 2), 2, np.int8)},
        "an infinite number": {"label:brightness": np.full(size, np.inf, np.float32)},
        "a mistake beyond the end": {"mistakes": np.full(size, size)},
        **{name: {"calibration": np.array(text)} for name, text in calibrations.items()},
    }


def check_damaged(fails: Callable[..., str], workdir: Workdir, changes: dict[str, Any]) -> None:
    with np.load(workdir.evaluation) as file:
        arrays = dict(file)
    np.savez(workdir.evaluation, **arrays | changes)
    line = fails("-m", "jaxft.report", "--workdir", workdir.path)
    assert f"{workdir.evaluation} is damaged (" in line and "train in another workdir" in line


@pytest.mark.parametrize("damage", damaged_arrays())
def test_wrong_arrays_are_reported_in_one_line(fails: Callable[..., str], copy: Workdir, damage: str) -> None:
    check_damaged(fails, copy, damaged_arrays()[damage])


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "tag"},
        {"names": [1, 2, 3]},
        {"names": []},
        {"std": 0},
        {"mean": None},
        {"name": "tags"},
        {"weights": 1.0},
        {"column": 3},
    ],
)
def test_wrong_targets_are_reported_in_one_line(
    fails: Callable[..., str], copy: Workdir, change: dict[str, Any]
) -> None:
    info = load_run(copy).info
    info["targets"][0] |= change
    check_damaged(fails, copy, {"info": np.array(json.dumps(info))})


def test_a_missing_array_is_reported_in_one_line(fails: Callable[..., str], copy: Workdir) -> None:
    with np.load(copy.evaluation) as file:
        arrays = dict(file)
    del arrays["label:tags"]
    np.savez(copy.evaluation, **arrays)
    assert "is damaged ('label:tags')" in fails("-m", "jaxft.report", "--workdir", copy.path)


def test_the_command_draws_the_page_again(copy: Workdir, capsys: pytest.CaptureFixture[str]) -> None:
    before = text_of(copy.report.read_text())
    copy.report.unlink()
    report.main(["--workdir", str(copy.path)])
    assert capsys.readouterr().out == f"{copy.report}\n"
    after = text_of(copy.report.read_text())
    first, last = "The best checkpoint", "How to reproduce it"  # between them, the workdir is not named
    shown = [text[text.index(first) : text.index(last)] for text in (before, after)]
    assert shown[0] == shown[1]


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_renders_the_page(browser: Any, table_run: Workdir, width: int) -> None:
    """Every image loads, nothing is wider than the window, and the console is empty."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(table_run.report.as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    assert all(browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth)"))
