"""Fine-tuning of the backbone that ships, on real pictures: what it brings, and what stays as it was."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from jaxft.pretrained import catalog
from jaxft.pretrained.convert import load_pretrained
from jaxft.run.metrics_file import read_lines
from jaxft.training.restore import load_checkpoint
from tests.conftest import ROOT, Run, environment

QUICKSTART = ("-m", "jaxft.train", "--config=configs/quickstart.py")


def test_the_backbone_is_small_and_tells_where_it_comes_from() -> None:
    path = catalog.shipped("resnet18_tiny_in200")
    assert path
    assert path.stat().st_size <= 2_000_000
    provenance = load_pretrained("resnet18_tiny_in200").provenance
    assert provenance["num_classes"] == len(provenance["class_names"]) == 200
    assert provenance["train_size"] == 100_000
    assert 0.25 < provenance["eval_accuracy"] < 0.35
    assert provenance["config"]["augment"]["flip"]


def test_a_killed_quickstart_goes_on_and_learns_what_random_weights_cannot_in_its_time(
    run: Run, tmp_path: Path
) -> None:
    """An epoch from random weights gives 20 %, all five 43 % (benchmarks/quickstart.py)."""
    arguments = (*QUICKSTART, "--config.num_epochs=2", "--workdir", tmp_path / "run")
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(1), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("Epoch [1/"):
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert run(*arguments).returncode == 0
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 81))
    accuracies = [row["accuracy"] for row in rows if row["split"] == "eval"]
    assert accuracies[-1] > 0.5
    line = json.loads(run("-m", "jaxft.evaluate", "--workdir", tmp_path / "run", "--json").stdout)
    assert line["accuracy"] == max(accuracies)


def test_a_linear_probe_learns_and_leaves_the_backbone_to_the_bit(run: Run, tmp_path: Path) -> None:
    result = run(
        *QUICKSTART, "--config.optimizer.freeze=backbone", "--config.augment.flip=false", "--workdir", tmp_path / "run"
    )
    assert result.returncode == 0, result.stderr
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["accuracy"] for row in rows if row["split"] == "eval"][-1] > 0.5
    line = json.loads(
        run("-m", "jaxft.evaluate", "--workdir", tmp_path / "run", "--checkpoint=latest", "--json").stdout
    )
    assert abs(line["correct"] - 1000 * rows[-1]["accuracy"]) <= 2  # from pictures, not from features kept of them
    state = load_checkpoint(tmp_path / "run", "latest").state
    shipped = load_pretrained("resnet18_tiny_in200").variables
    for collection, trained in (("params", state.params), ("batch_stats", state.batch_stats)):
        for path, array in flatten_dict(trained).items():
            if path[0] != "fc":
                assert np.array_equal(array, flatten_dict(shipped[collection])[path].astype(np.float32)), path
