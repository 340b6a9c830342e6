"""Fine-tuning of the shipped backbone on real images: the accuracy gained, and the frozen parameters."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxft.classifier import Classifier
from jaxft.data import datasets
from jaxft.models.heads import HEAD_NORM
from jaxft.pretrained import catalog
from jaxft.pretrained.load import load_pretrained
from jaxft.run.metrics_file import read_lines
from jaxft.training.restore import load_checkpoint
from tests.helpers.runs import Run

QUICKSTART = ("-m", "jaxft.train", "--config=configs/quickstart.py")


def test_the_backbone_is_small_and_records_its_provenance() -> None:
    path = catalog.shipped("resnet18_tiny_in200")
    assert path
    assert path.stat().st_size <= 2_000_000
    provenance = load_pretrained("resnet18_tiny_in200").provenance
    assert provenance["num_classes"] == len(provenance["class_names"]) == 200
    assert provenance["train_size"] == 100_000
    assert 0.25 < provenance["eval_accuracy"] < 0.35
    assert provenance["config"]["augment"]["flip"]


def test_the_quickstart_beats_random_weights(run: Run, tmp_path: Path) -> None:
    """From random weights one epoch gives 20 %, all five give 43 % (benchmarks/quickstart.py)."""
    result = run(*QUICKSTART, "--config.num_epochs=2", "--workdir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 81))
    assert [row["accuracy"] for row in rows if row["split"] == "eval"][-1] > 0.5


@pytest.mark.slow
def test_a_linear_probe_learns_and_keeps_the_bits_of_the_backbone(run: Run, tmp_path: Path) -> None:
    """Trains with head_norm, which evaluation and prediction fold into the head."""
    head = ("--config.optimizer.freeze=backbone", "--config.augment.flip=false", "--config.model.head_norm=true")
    result = run(*QUICKSTART, *head, "--workdir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["accuracy"] for row in rows if row["split"] == "eval"][-1] > 0.5
    line = json.loads(
        run("-m", "jaxft.evaluate", "--workdir", tmp_path / "run", "--checkpoint=latest", "--json").stdout
    )
    assert abs(line["correct"] - 1000 * rows[-1]["accuracy"]) <= 2  # evaluates images, not cached features
    checkpoint = load_checkpoint(tmp_path / "run", "latest")
    sample = datasets.load("sample:cifar10", "test")
    predicted = Classifier(checkpoint).probabilities(sample.image).argmax(1)
    assert abs(int((predicted == sample.label).sum()) - line["correct"]) <= 2
    state = checkpoint.state
    assert state.batch_stats.pop(HEAD_NORM)["deviation"] != 1
    shipped = load_pretrained("resnet18_tiny_in200").variables
    for collection, trained in (("params", state.params), ("batch_stats", state.batch_stats)):
        for path, array in flatten_dict(trained).items():
            if path[0] != "fc":
                assert np.array_equal(array, flatten_dict(shipped[collection])[path].astype(np.float32)), path
