"""Writes a run's report and the files beside it while the run trains."""

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from jaxft.config import default_config
from jaxft.data.dataset import Dataset
from jaxft.data.datasets import shared_images
from jaxft.errors import write_message
from jaxft.files import atomic_write, reason
from jaxft.reporting.evaluation_file import (
    THUMBNAIL,
    Run,
    image_name,
    image_path,
    load_run,
    write_divergence,
    write_evaluation,
)
from jaxft.reporting.page import read_sheet, render, write_page
from jaxft.reporting.sheet_image import draw_sheet
from jaxft.reporting.worst_images import ranked_mistakes, worst_images
from jaxft.run.checkpoints import NotFiniteError
from jaxft.run.workdir import Workdir
from jaxft.targets.classification import Predictions
from jaxft.targets.joint import Calibrations, JointPredictions, targets_of

SHEET = (4, 8)  # rows and columns of augmented images
DRAWN_EVERY = 60  # seconds of training and evaluation


@dataclass(frozen=True)
class Reporter:
    """Keeps a run's report up to date during training. A file that cannot be written never ends the training."""

    workdir: Workdir
    info: dict[str, Any]  # stored with each checkpoint
    train_data: Dataset
    test_data: Dataset
    features_seconds: float = 0.0  # time spent on computing a frozen backbone's features

    def update(
        self,
        predictions: Predictions | JointPredictions,
        calibrations: Calibrations = MappingProxyType({}),
    ) -> None:
        """Writes DIR/evaluation.npz and the list of images to check after an epoch.

        Draws the report at most once a minute and after the last evaluation. calibrations: of the epoch's checkpoint.
        """
        with self._failures(self.workdir.evaluation):
            shared = [
                (image_name(self.test_data, test, self._splits[0]), image_name(self.train_data, train, self._splits[1]))
                for test, train in self._shared.items()
            ]
            write_evaluation(
                self.workdir, self.info, self.test_data, predictions, calibrations, shared, self.features_seconds
            )
            with self._failures(self.workdir.to_check):
                self._write_list(predictions, calibrations)
            run = load_run(self.workdir)
            if _is_due(run):
                with self._failures(self.workdir.sheet):
                    _write_sheet(run, self.train_data)
                with self._failures(self.workdir.report):
                    write_page(self.workdir.report, render(run))

    @contextmanager
    def divergence(self) -> Iterator[None]:
        """Draws the report once more if the loss becomes NaN or infinite, unless no epoch has finished."""
        try:
            yield
        except NotFiniteError as error:
            if self.workdir.evaluation.exists():
                with self._failures(self.workdir.report):
                    run = write_divergence(load_run(self.workdir), error.step)
                    write_page(self.workdir.report, render(run))
            raise

    @cached_property
    def _shared(self) -> dict[int, int]:
        """The test images that are also trained on: position in the test split to position in the training split."""
        return shared_images(self.train_data, self.test_data)

    @property
    def _splits(self) -> tuple[str, str]:
        """The names of the test split and the training split."""
        data = self.info["config"]["data"]
        return data["eval_split"], data["train_split"]

    def _write_list(self, predictions: Predictions | JointPredictions, calibrations: Calibrations) -> None:
        """Writes DIR/images_to_check.csv: the worst images and those in both splits."""
        file = io.StringIO()
        rows = csv.writer(file)
        if isinstance(predictions, JointPredictions):
            rows.writerows(self._rows_of_targets(predictions, calibrations))
        else:
            rows.writerows(self._rows_of_classes(predictions))
        with atomic_write(self.workdir.to_check) as out:
            out.write(file.getvalue().encode(errors="surrogateescape"))  # names that are not UTF-8 keep their bytes

    def _rows_of_classes(self, predictions: Predictions) -> Iterator[list[Any]]:
        """Yields the rows of a single class: all mistakes, the most confident first, and the images in both splits."""
        names = self.info["class_names"]
        yield ["reason", "file", "class", "predicted", "confidence", "training_file"]

        def described(index: int) -> list[Any]:
            classes = [names[array[index]] for array in (predictions.label, predictions.predicted)]
            return [*classes, f"{predictions.confidence[index]:.4f}"]

        for index in ranked_mistakes(predictions).tolist():
            yield ["mistake", self._test_path(index), *described(index), ""]
        for index, path, training_path in self._shared_paths():
            yield ["also trained on", path, *described(index), training_path]

    def _rows_of_targets(self, predictions: JointPredictions, calibrations: Calibrations) -> Iterator[list[Any]]:
        """Yields the rows of several targets: each one's worst images, then the images in both splits."""
        yield ["reason", "target", "file", "label", "predicted", "score", "training_file"]
        for target, worst in worst_images(targets_of(self.info), predictions, calibrations):
            path = self._test_path(worst.position)
            yield [worst.reason, target.field.name, path, worst.label, worst.predicted, f"{worst.score:.4g}", ""]
        for _, path, training_path in self._shared_paths():
            yield ["also trained on", "", path, "", "", "", training_path]

    def _test_path(self, index: int) -> str:
        return image_path(self.test_data, index, self._splits[0])

    def _shared_paths(self) -> Iterator[tuple[int, str, str]]:
        """Yields the position of each test image that is also trained on, and its paths in both splits."""
        for index, other in self._shared.items():
            yield index, self._test_path(index), image_path(self.train_data, other, self._splits[1])

    @contextmanager
    def _failures(self, path: Path) -> Iterator[None]:
        """Reports on stderr that a file could not be written."""
        try:
            yield
        except Exception as error:  # also a bug in drawing: it must not cost the run
            cause = reason(error) or type(error).__name__
            text = " ".join(f"the report in {self.workdir.path} could not be written: {path.name}: {cause}".split())
            write_message(f"\n{text}")


def _is_due(run: Run) -> bool:
    """Returns whether the run has ended or completed another DRAWN_EVERY seconds. Drawing takes 0.5 s."""
    before = sum(row["seconds"] for row in run.rows if row["epoch"] < run.epoch)
    after = sum(row["seconds"] for row in run.rows)
    return run.finished or before // DRAWN_EVERY < after // DRAWN_EVERY


def _write_sheet(run: Run, train_data: Dataset) -> None:
    """Writes DIR/sheet.jpg once, if the run augments its images."""
    if run.config.augment == default_config().augment or read_sheet(run.workdir):
        return
    sheet = Image.fromarray(draw_sheet(run.config, train_data, *SHEET))
    sheet.thumbnail((SHEET[1] * THUMBNAIL, SHEET[0] * THUMBNAIL))
    with atomic_write(run.workdir.sheet) as file:
        sheet.save(file, "JPEG", quality=85)
