"""Training runs as the tests start them: commands in processes of their own, tiny configurations, and comparisons."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.training.restore import load_checkpoint

ROOT = Path(__file__).parent.parent.parent

Run = Callable[..., subprocess.CompletedProcess[str]]

# Two sizes of run serve all tests, so that the suite's compilation cache holds few programs.
_RANDOM_WEIGHTS = ("-m", "jaxft.train", "--config=configs/quickstart.py", "--config.model.pretrained=")
SMALL_RUN = (
    *_RANDOM_WEIGHTS,
    "--config.image_size=32",
    "--config.model.width=8",
    "--config.batch_size=72",  # 2,000 images leave 56 for the last batch, too few for 8 devices of 9
    "--config.num_epochs=3",
)
TINY = (
    *_RANDOM_WEIGHTS,
    "--config.data.train_split=test",
    "--config.image_size=16",
    "--config.model.width=4",
    "--config.model.dropout=0.1",
    "--config.batch_size=72",  # 14 steps an epoch, the last of fewer images
    "--config.num_epochs=3",
    "--config.augment.flip=True",
    "--config.augment.shift=0.1",
    "--config.augment.crop_area=0.5",
    "--config.augment.mixup=0.2",
    "--config.checkpoint.every_steps=4",
)


def environment(devices: int) -> dict[str, str]:
    """Returns the environment of a process with this many forced CPU devices."""
    return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


@contextmanager
def started(*arguments: object, devices: int = 1) -> Iterator[subprocess.Popen[str]]:
    """Starts python in the repository's root, on forced CPU devices, and kills it in the end."""
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_steps(process: subprocess.Popen[str], workdir: Path, steps: int) -> None:
    """Waits until metrics.jsonl has this many lines of training."""
    path = workdir / "metrics.jsonl"
    while not path.exists() or path.read_text().count('"train"') < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def metrics(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def same_bits(a: Any, b: Any) -> bool:
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def assert_same_run(workdir: Path, other: Path) -> None:
    """Compares metrics lines, parameters, statistics and momentum, bit for bit."""
    assert without_times(metrics(workdir)) == without_times(metrics(other))
    for which in ("latest", "best"):
        mine, theirs = (load_checkpoint(path, which) for path in (workdir, other))
        assert mine.step == theirs.step
        assert same_bits(mine.state, theirs.state)
