"""The report: its content, that it is self-contained, and how a browser renders it."""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxft import report
from jaxft.data import datasets
from jaxft.data.dataset import Origin
from jaxft.files import partial_path
from jaxft.reporting import evaluation_file
from jaxft.reporting import page as report_page
from jaxft.reporting import reporter as reporter_module
from jaxft.reporting.evaluation_file import THUMBNAIL, load_run
from jaxft.reporting.reporter import Reporter
from jaxft.run.checkpoints import NotFiniteError
from jaxft.run.workdir import Workdir
from jaxft.targets.classification import Predictions, evaluation_summary
from tests.helpers.pages import Page, assert_self_contained
from tests.helpers.runs import Run


def test_a_run_writes_a_self_contained_report(small_run: Path, run: Run) -> None:
    html = (small_run / "report.html").read_text()
    page = Page(html)
    assert_self_contained(page, html)
    line = json.loads(run("-m", "jaxft.evaluate", "--workdir", small_run, "--checkpoint=latest", "--json").stdout)
    text = " ".join(page.text.split())
    low, high = line["accuracy_interval"]
    assert f"{line['accuracy']:.2%} accuracy (95 % confidence interval: {100 * low:.1f} to {high:.1%})" in text
    for name, accuracy in line["per_class_accuracy"].items():
        assert re.search(rf"{name} +100 +{100 * accuracy:.1f}%", text), name
    for part in (
        "model.width 8",
        "data.name sample:cifar10",
        "random initialisation",
        "orbax-checkpoint",
        "after epoch 3",
    ):
        assert part in text
    assert text.count(", predicted as") == evaluation_file.MISTAKES
    assert "Augmented training images" in text
    with Image.open(small_run / "sheet.jpg") as sheet:
        assert max(sheet.size) <= 8 * THUMBNAIL
    assert f"--config {small_run}/config.json" in text


@pytest.mark.slow
def test_the_command_in_the_report_repeats_the_run(small_run: Path, run: Run, tmp_path: Path) -> None:
    """Gives the same losses from DIR/config.json only."""
    result = run("-m", "jaxft.train", "--config", small_run / "config.json", "--workdir", tmp_path / "again")
    assert result.returncode == 0, result.stderr
    first, again = (load_run(Workdir(path)) for path in (small_run, tmp_path / "again"))
    assert [row["loss"] for row in first.rows] == [row["loss"] for row in again.rows]


def test_a_comparison_shows_runs_side_by_side(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small_run, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints"))
    with np.load(tmp_path / "other" / "evaluation.npz") as file:
        arrays = dict(file)
    info = json.loads(str(arrays["info"]))
    info["config"]["optimizer"]["learning_rate"] = 0.125
    np.savez(tmp_path / "other" / "evaluation.npz", **arrays | {"info": np.array(json.dumps(info))})
    (tmp_path / "other" / "config.json").write_text(json.dumps(info["config"]))
    report.main(["--workdir", str(tmp_path / "other"), "--compare", str(small_run)])
    html = (tmp_path / "other" / "compare.html").read_text()
    assert capsys.readouterr().out == f"{tmp_path / 'other' / 'compare.html'}\n"
    page = Page(html)
    assert_self_contained(page, html)
    text = " ".join(page.text.split())
    assert "other, small 2 runs side by side" in text
    assert "Config differences other small optimizer.learning_rate 0.125 0.05 Classes" in text
    accuracy = evaluation_summary(load_run(Workdir(small_run)).predictions, info["class_names"])["accuracy"]
    assert text.count(f"{accuracy:.2%} (") == 2


@pytest.fixture
def hostile(small_run: Path, tmp_path: Path) -> evaluation_file.Run:
    """Returns a run with names special to HTML and Matplotlib, a class without images, no mistake and one epoch."""
    original = load_run(Workdir(small_run))
    names = ["<script>alert(1)</script>", "$x_1$ & co", "猫", "a" * 300, "never seen"]
    label = np.arange(40, dtype=np.int32) % 4
    predictions = Predictions(label, label, np.full(40, 0.9), np.zeros(40, int), np.full(40, 0.1))
    info = original.info | {"class_names": names}
    shutil.copytree(small_run, tmp_path / "hostile & <b>odd</b>", ignore=shutil.ignore_patterns("checkpoints"))
    (workdir,) = tmp_path.iterdir()
    rows = [row for row in original.rows if row["epoch"] == 1]
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = datasets.Dataset(np.zeros((40, 5, 7, 3), np.uint8), label, tuple(names))
    Reporter(Workdir(workdir), info, data, data).update(predictions)
    return load_run(Workdir(workdir))


def test_odd_names_are_escaped_and_empty_classes_shown(hostile: evaluation_file.Run) -> None:
    html = report_page.render(hostile)
    page = Page(html)
    assert_self_contained(page, html)
    assert "<script>alert(1)</script>" in page.text
    assert "$x_1$ & co" in page.text
    assert "100.00%" in page.text
    Page(report_page.render_comparison([hostile, hostile, hostile]))


def test_the_most_confident_mistakes_are_shown(small_run: Path) -> None:
    run = load_run(Workdir(small_run))
    sample = datasets.load("sample:cifar10", "test")
    wrong = [i for i in range(1000) if run.predictions.predicted[i] != sample.label[i]]
    expected = sorted(wrong, key=lambda i: -run.predictions.confidence[i])[: evaluation_file.MISTAKES]
    assert run.mistakes.tolist() == expected
    for i, picture in zip(expected, run.thumbnails, strict=True):
        np.testing.assert_array_equal(picture, sample.image[i])


def test_a_report_is_written_at_most_once_a_minute(small_run: Path, tmp_path: Path) -> None:
    """The last epoch's is always written, and jaxft.report writes one at any time."""
    run = load_run(Workdir(small_run))
    data = datasets.load("sample:cifar10", "test")
    info = run.info | {"config": run.info["config"] | {"num_epochs": 7}}
    row = run.split("eval")[0] | {"seconds": 12.5}
    rows: list[dict[str, Any]] = []
    drawn = []
    for epoch in range(1, 8):
        rows += [row | {"split": split, "epoch": epoch, "step": epoch} for split in ("train", "eval")]
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        Reporter(Workdir(tmp_path), info, data, data).update(run.predictions)
        drawn.append((tmp_path / "report.html").exists())
        (tmp_path / "report.html").unlink(missing_ok=True)
        if epoch == 1:
            report.main(["--workdir", str(tmp_path)])
            assert ", not finished" in (tmp_path / "report.html").read_text()
            (tmp_path / "report.html").unlink()
    assert drawn == [False, False, True, False, True, False, True]


def test_a_report_of_hundreds_of_classes_stays_small(small_run: Path) -> None:
    run = load_run(Workdir(small_run))
    rng = np.random.default_rng(0)
    names = [f"class {i}" for i in range(300)]
    label, predicted = rng.integers(0, 300, (2, 5000), np.int32)
    predictions = dataclasses.replace(
        run.predictions,
        label=label,
        predicted=predicted,
        confidence=rng.random(5000),
        rank=np.where(label == predicted, 0, 7),
        loss=np.ones(5000),
    )
    info = run.info | {"class_names": names}
    html = report_page.render(run._replace(info=info, predictions=predictions))
    assert f"{evaluation_summary(predictions, names)['accuracy']:.2%}" in Page(html).text
    assert len(html) < 1_000_000


def test_a_run_without_an_epoch_has_no_report(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "no finished epoch" in fails("-m", "jaxft.report", "--workdir", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("kind", ["usual", "hostile", "compare"])
def test_a_browser_renders_the_report(
    browser: Any, small_run: Path, hostile: evaluation_file.Run, tmp_path: Path, width: int, kind: str
) -> None:
    """Every image loads, nothing is wider than the window, and the console is empty."""
    usual = load_run(Workdir(small_run))
    html = (
        report_page.render_comparison([usual, hostile])
        if kind == "compare"
        else report_page.render(usual if kind == "usual" else hostile)
    )
    (tmp_path / "page.html").write_text(html)
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    beyond = browser.execute_script(
        """return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll')
        && e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 200))"""
    )
    assert beyond == []
    sizes = browser.execute_script("return [...document.images].map(image => image.complete && image.naturalWidth)")
    assert len(sizes) >= 4
    assert all(sizes)


def test_thumbnails_are_small() -> None:
    picture = np.asarray(Image.new("RGB", (900, 300), "red"))
    assert evaluation_file.thumbnail(picture).shape == (43, 128, 3)


@pytest.fixture
def copy(small_run: Path, tmp_path: Path) -> Workdir:
    """A copy of `small_run` without checkpoints, to be changed."""
    shutil.copytree(small_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return Workdir(tmp_path / "run")


@pytest.mark.parametrize("name", ["evaluation.npz", "report.html", "images_to_check.csv", "sheet.jpg"])
def test_a_report_that_cannot_be_written_does_not_end_the_run(
    copy: Workdir, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Simulates a full disk by a folder in place of the file to write, and of its partial file."""
    run = load_run(copy)
    data = datasets.load("sample:cifar10", "test")
    reporter = Reporter(copy, run.info, data, data)
    for path in (copy.path / name, partial_path(copy.path / name)):
        (copy.path / name).unlink(missing_ok=True)
        path.mkdir()
        reporter.update(run.predictions)
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"the report in {copy.path} could not be written: {name}: Is a directory")
        path.rmdir()
        reporter.update(run.predictions)
        assert capsys.readouterr().err == ""
        assert (copy.path / name).is_file()


def test_a_bug_in_drawing_does_not_end_the_run(
    copy: Workdir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(copy)
    data = datasets.load("sample:cifar10", "test")
    monkeypatch.setattr(reporter_module, "render", lambda run: 1 / 0)
    Reporter(copy, run.info, data, data).update(run.predictions)
    assert capsys.readouterr().err.endswith("could not be written: report.html: division by zero\n")


def test_a_report_says_where_training_diverged(
    copy: Workdir, small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only if an epoch was finished; the command says so too, until training continues."""
    run = load_run(copy)
    info = run.info | {"config": run.info["config"] | {"num_epochs": 9}}
    copy.raise_num_epochs(9)
    data = datasets.load("sample:cifar10", "test")
    reporter = Reporter(copy, info, data, data)
    reporter.update(run.predictions)
    copy.report.unlink()
    with pytest.raises(NotFiniteError), reporter.divergence():
        raise NotFiniteError("the train loss is nan", 1234, 1233)
    for _ in range(2):
        text = " ".join(Page(copy.report.read_text()).text.split())
        assert "after epoch 3 of 9. Training diverged at step 1,234: the loss became infinite or NaN" in text
        copy.report.unlink()
        report.main(["--workdir", str(copy.path)])
    reporter.update(load_run(copy).predictions)
    assert load_run(copy).diverged == 0
    copy.evaluation.unlink()
    copy.report.unlink()
    with pytest.raises(NotFiniteError), reporter.divergence():
        raise NotFiniteError("the train loss is nan", 2, 1)
    assert not copy.report.exists()
    assert capsys.readouterr().err == ""


def test_time_and_speed_include_the_features_of_a_frozen_backbone(copy: Workdir) -> None:
    """2,000 training images in 3 epochs, 1,000 test images; two thirds of the time are for training features."""
    run = load_run(copy)
    rows = [row | {"seconds": 0.5 if row["split"] == "train" else 2.0} for row in run.rows]
    steps = len(run.split("train"))
    rows = [row | {"images_per_second": 6000 / steps / 0.5} for row in rows]
    cards = {name: value for value, name in report_page._speed_cards(run._replace(rows=rows, features_seconds=90.0))}
    assert cards["time of features, training and evaluation"] == report_page._duration(90 + steps * 0.5 + 6)
    assert cards["images/s in training, computing their features included"] == f"{6000 / (60 + steps * 0.5):,.0f}"


def test_images_to_check_are_named(copy: Workdir, tmp_path: Path) -> None:
    """In the report and in a list: mistakes and test images that are also trained on, whatever their names are."""
    run = load_run(copy)
    root = tmp_path / "photos"
    names = ["1.png", "<b>&.png", os.fsdecode(b"caf\xe9.png"), "gr\u00fcn\n\u732b.png"]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 8, 8, 3), np.uint8)
    paths = [root / split / "cat" / name for split in ("train", "test") for name in names]
    label = np.zeros(4, np.int32)
    train, test = (
        datasets.Dataset(array, label, ("cat", "dog"), Origin(str(root), files=tuple(files)))
        for array, files in ((images[[0, 1, 2, 3]], paths[:4]), (images[[4, 1, 4, 3]], paths[4:]))
    )
    wrong = np.array([1, 0, 1, 1], np.int32)
    confidence = np.array([0.6, 0.99, 0.9, 0.8], np.float32)
    predictions = Predictions(label, wrong, confidence, wrong, np.ones(4, np.float32))
    config = run.info["config"] | {"data": run.info["config"]["data"] | {"name": f"folder:{root}"}}
    info = run.info | {"class_names": ["cat", "dog"], "config": config}
    copy.config.write_text(json.dumps(config))
    Reporter(copy, info, train, test).update(predictions)
    found = load_run(copy)
    assert found.files == ["test/cat/caf\\xe9.png", "test/cat/gr\u00fcn\\n\u732b.png", "test/cat/1.png"]
    assert found.shared == [
        (f"test/cat/{name}", f"train/cat/{name}") for name in ("<b>&.png", "gr\u00fcn\\n\u732b.png")
    ]
    html = copy.report.read_text()
    page = Page(html)
    assert_self_contained(page, html)
    for name in (*found.files, *(name for pair in found.shared for name in pair)):
        assert name in page.text
    assert "2 test images are also in the training set" in " ".join(page.text.split())
    with copy.to_check.open(errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["reason"], row["file"], row["predicted"], row["training_file"]) for row in rows] == [
        *(("mistake", str(paths[4 + i]), "dog", "") for i in (2, 3, 0)),
        ("also trained on", str(paths[5]), "cat", str(paths[1])),
        ("also trained on", str(paths[7]), "dog", str(paths[3])),
    ]


def damaged_arrays() -> dict[str, dict[str, Any]]:
    """Returns replaced arrays of evaluation.npz by what is wrong with them."""
    return {
        "a field of another type": {"label": np.array(["a"] * 1000)},
        "a float label": {"label": np.zeros(1000)},
        "another length": {"rank": np.zeros(999, np.int32)},
        "no images": {name: np.zeros(0, np.int32) for name in ("label", "predicted", "rank")},
        "a class that does not exist": {"predicted": np.full(1000, 10, np.int32)},
        "NaN": {"loss": np.full(1000, np.nan, np.float32)},
        "a confidence of 2": {"confidence": np.full(1000, 2, np.float32)},
        "an object": {"loss": np.array([{}] * 1000, object)},
        "a mistake beyond the end": {"mistakes": np.full(24, 1000)},
        "more mistakes than images": {"mistakes": np.arange(25)},
        "a flat image": {"picture_0": np.zeros((5, 5), np.uint8)},
        "info that is no JSON": {"info": np.array("{")},
        "info that is a list": {"info": np.array("[]")},
        "info without a config": {"info": np.array("{}")},
        "info that is a number": {"info": np.array(7)},
        "files of another type": {"files": np.zeros(24)},
        "a nested config": {"info": np.array('{"config": ' * 9 + "1" + "}" * 9)},
    }


@pytest.mark.parametrize("damage", damaged_arrays())
def test_wrong_arrays_are_reported_in_one_line(fails: Callable[..., str], copy: Workdir, damage: str) -> None:
    with np.load(copy.evaluation) as file:
        arrays = dict(file)
    np.savez(copy.evaluation, **arrays | damaged_arrays()[damage])
    line = fails("-m", "jaxft.report", "--workdir", copy.path)
    assert f"{copy.evaluation} is damaged (" in line and "train in another workdir" in line


def test_predictions_of_another_run_are_reported(fails: Callable[..., str], copy: Workdir) -> None:
    copy.config.write_text(json.dumps(json.loads(copy.config.read_text()) | {"seed": 7}))
    line = fails("-m", "jaxft.report", "--workdir", copy.path)
    assert f"{copy.evaluation} is of another run (seed is 0 there and 7 in config.json)" in line


def test_damaged_files_are_reported_and_replaced(fails: Callable[..., str], copy: Workdir) -> None:
    """In place of evaluation.npz: part of it, another file, a folder, a FIFO, a link to itself."""
    run = load_run(copy)
    path, whole = copy.evaluation, copy.evaluation.read_bytes()
    data = datasets.load("sample:cifar10", "test")

    def contents() -> Iterator[str]:
        array = io.BytesIO()
        np.save(array, np.zeros(3))
        flipped = bytearray(whole)
        flipped[len(flipped) // 2] ^= 1
        for content in (b"", whole[:1000], whole[:-30], bytes(flipped), b"PK damaged", array.getvalue(), b"{}"):
            path.write_bytes(content)
            yield "is damaged"
        for make in (os.mkfifo, lambda path: path.symlink_to(path), Path.mkdir):
            path.unlink()
            make(path)
            yield "cannot be read"

    for problem in contents():
        line = fails("-m", "jaxft.report", "--workdir", copy.path)
        assert problem in line and "pickle" not in line  # NumPy advises allow_pickle for any other file
        if not path.is_dir():
            Reporter(copy, run.info, data, data).update(run.predictions)
            assert load_run(copy).rows == run.rows


@pytest.mark.parametrize("content", [None, "", "[]\n", "{}\n", '{"step": 1, "split": "train", "accuracy": 1}\n'])
def test_odd_rows_are_reported_in_one_line(fails: Callable[..., str], copy: Workdir, content: str | None) -> None:
    copy.metrics.unlink() if content is None else copy.metrics.write_text(content)
    assert str(copy.metrics) in fails("-m", "jaxft.report", "--workdir", copy.path)


@pytest.mark.parametrize("make", [lambda p: p.write_bytes(b""), lambda p: p.write_text("x"), os.mkfifo, Path.mkdir])
def test_a_sheet_that_is_not_an_image_is_left_out(
    copy: Workdir, make: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    copy.sheet.unlink()
    make(copy.sheet)
    report.main(["--workdir", str(copy.path)])
    assert f"{copy.sheet} is not an image" in capsys.readouterr().err
    assert "Augmented training images" not in copy.report.read_text()


def test_names_are_printable() -> None:
    for name, expected in {
        "a.png": "a.png",
        "gr\u00fcn \u732b": "gr\u00fcn \u732b",
        "a\nb\x1b[0m": "a\\nb\\x1b[0m",
        os.fsdecode(b"caf\xe9"): "caf\\xe9",
        "\ud800": "\\ud800",
    }.items():
        assert evaluation_file.escaped(name) == expected


def test_the_sheet_shows_the_training_images_without_reading_them_again(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    workdir = Workdir(tmp_path / "run")
    before = np.asarray(Image.open(workdir.sheet)).astype(int)
    workdir.sheet.unlink()
    run = load_run(workdir)
    train, test = (datasets.load("sample:cifar10", split) for split in ("train", "test"))
    monkeypatch.setattr(datasets, "load", None)
    Reporter(workdir, run.info, train, test).update(run.predictions)
    after = np.asarray(Image.open(workdir.sheet)).astype(int)
    assert np.abs(after - before).max() <= 16  # JPEG magnifies float32 noise
