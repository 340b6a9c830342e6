"""The report: its content, that it is self-contained, and how a browser renders it."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxft import report
from jaxft.data import datasets
from jaxft.errors import UserError
from jaxft.reporting import page as report_page
from jaxft.run.workdir import Workdir
from jaxft.targets.classification import Predictions, evaluation_summary
from tests.helpers.runs import Run

VOID = {"meta", "link", "img", "br", "hr", "input"}
ADDRESSES = {"src", "href", "srcset", "poster", "action", "data"}


class Page(HTMLParser):
    """Asserts that elements nest properly, and collects texts, addresses and elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ADDRESSES]
        if tag == "img":
            assert dict(attrs)["alt"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def assert_self_contained(page: Page, html: str) -> None:
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert "script" not in page.elements
    assert not re.search(r"@import|url\(", html)


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
    assert text.count(", predicted as") == report_page.MISTAKES
    assert "Augmented training images" in text
    with Image.open(small_run / "sheet.jpg") as sheet:
        assert max(sheet.size) <= 8 * report_page.THUMBNAIL
    assert f"--config {small_run}/config.json" in text


@pytest.mark.slow
def test_the_command_in_the_report_repeats_the_run(small_run: Path, run: Run, tmp_path: Path) -> None:
    """Gives the same losses from DIR/config.json only."""
    result = run("-m", "jaxft.train", "--config", small_run / "config.json", "--workdir", tmp_path / "again")
    assert result.returncode == 0, result.stderr
    first, again = (report_page.load_run(Workdir(path)) for path in (small_run, tmp_path / "again"))
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
    report.main(["--workdir", str(tmp_path / "other"), "--compare", str(small_run)])
    html = (tmp_path / "other" / "compare.html").read_text()
    assert capsys.readouterr().out == f"{tmp_path / 'other' / 'compare.html'}\n"
    page = Page(html)
    assert_self_contained(page, html)
    text = " ".join(page.text.split())
    assert "other, small 2 runs side by side" in text
    assert "Config differences other small optimizer.learning_rate 0.125 0.05 Classes" in text
    accuracy = evaluation_summary(report_page.load_run(Workdir(small_run)).predictions, info["class_names"])["accuracy"]
    assert text.count(f"{accuracy:.2%} (") == 2


@pytest.fixture
def hostile(small_run: Path, tmp_path: Path) -> report_page.Run:
    """Returns a run with names special to HTML and Matplotlib, a class without images, no mistake and one epoch."""
    original = report_page.load_run(Workdir(small_run))
    names = ["<script>alert(1)</script>", "$x_1$ & co", "猫", "a" * 300, "never seen"]
    label = np.arange(40, dtype=np.int32) % 4
    predictions = Predictions(label, label, np.full(40, 0.9), np.zeros(40, int), np.full(40, 0.1))
    info = original.info | {"class_names": names}
    shutil.copytree(small_run, tmp_path / "hostile & <b>odd</b>", ignore=shutil.ignore_patterns("checkpoints"))
    (workdir,) = tmp_path.iterdir()
    rows = [row for row in original.rows if row["epoch"] == 1]
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = datasets.Dataset(np.zeros((40, 5, 7, 3), np.uint8), label, tuple(names))
    report_page.update(Workdir(workdir), info, data, data, predictions)
    return report_page.load_run(Workdir(workdir))


def test_odd_names_are_escaped_and_empty_classes_shown(hostile: report_page.Run) -> None:
    html = report_page.render(hostile)
    page = Page(html)
    assert_self_contained(page, html)
    assert "<script>alert(1)</script>" in page.text
    assert "$x_1$ & co" in page.text
    assert "100.00%" in page.text
    Page(report_page.render_comparison([hostile, hostile, hostile]))


def test_the_most_confident_mistakes_are_shown(small_run: Path) -> None:
    run = report_page.load_run(Workdir(small_run))
    sample = datasets.load("sample:cifar10", "test")
    wrong = [i for i in range(1000) if run.predictions.predicted[i] != sample.label[i]]
    expected = sorted(wrong, key=lambda i: -run.predictions.confidence[i])[: report_page.MISTAKES]
    assert run.mistakes.tolist() == expected
    for i, picture in zip(expected, run.thumbnails, strict=True):
        np.testing.assert_array_equal(picture, sample.image[i])


def test_a_report_is_written_at_most_once_a_minute(small_run: Path, tmp_path: Path) -> None:
    """The last epoch's is always written, and jaxft.report writes one at any time."""
    run = report_page.load_run(Workdir(small_run))
    data = datasets.load("sample:cifar10", "test")
    info = run.info | {"config": run.info["config"] | {"num_epochs": 7}}
    row = run.split("eval")[0] | {"seconds": 12.5}
    rows: list[dict[str, Any]] = []
    drawn = []
    for epoch in range(1, 8):
        rows += [row | {"split": split, "epoch": epoch, "step": epoch} for split in ("train", "eval")]
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        report_page.update(Workdir(tmp_path), info, data, data, run.predictions)
        drawn.append((tmp_path / "report.html").exists())
        (tmp_path / "report.html").unlink(missing_ok=True)
        if epoch == 1:
            report.main(["--workdir", str(tmp_path)])
            assert "still training" in (tmp_path / "report.html").read_text()
            (tmp_path / "report.html").unlink()
    assert drawn == [False, False, True, False, True, False, True]


def test_a_report_of_hundreds_of_classes_stays_small(small_run: Path) -> None:
    run = report_page.load_run(Workdir(small_run))
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


def test_errors_are_reported_in_one_line(fails: Callable[..., str], small_run: Path, tmp_path: Path) -> None:
    assert "no finished epoch" in fails("-m", "jaxft.report", "--workdir", tmp_path)
    (tmp_path / "evaluation.npz").write_bytes(b"PK damaged")
    with pytest.raises(UserError, match="cannot be read"):
        report_page.load_run(Workdir(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("kind", ["usual", "hostile", "compare"])
def test_a_browser_renders_the_report(
    browser: Any, small_run: Path, hostile: report_page.Run, tmp_path: Path, width: int, kind: str
) -> None:
    """Every image loads, nothing is wider than the window, and the console is empty."""
    usual = report_page.load_run(Workdir(small_run))
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
    assert report_page._thumbnail(picture).shape == (43, 128, 3)


@pytest.mark.parametrize("name", ["evaluation.npz", "report.html"])
def test_a_report_that_cannot_be_written_does_not_end_the_run(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Simulates a full disk by a folder in place of the file to write."""
    shutil.copytree(small_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    workdir = Workdir(tmp_path / "run")
    run = report_page.load_run(workdir)
    data = datasets.load("sample:cifar10", "test")
    (workdir.path / name).unlink()
    (workdir.path / name).mkdir()
    report_page.update(workdir, run.info, data, data, run.predictions)
    assert f"\nthe report in {workdir.path} could not be written: " in capsys.readouterr().err
    (workdir.path / name).rmdir()
    report_page.update(workdir, run.info, data, data, run.predictions)
    assert capsys.readouterr().err == ""
    assert (workdir.path / name).is_file()


def test_the_sheet_shows_the_training_images_without_reading_them_again(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    workdir = Workdir(tmp_path / "run")
    before = np.asarray(Image.open(workdir.sheet)).astype(int)
    workdir.sheet.unlink()
    run = report_page.load_run(workdir)
    train, test = (datasets.load("sample:cifar10", split) for split in ("train", "test"))
    monkeypatch.setattr(datasets, "load", None)
    report_page.update(workdir, run.info, train, test, run.predictions)
    after = np.asarray(Image.open(workdir.sheet)).astype(int)
    assert np.abs(after - before).max() <= 16  # JPEG magnifies float32 noise
