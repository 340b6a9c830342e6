"""The lines of metrics.jsonl for those who look at them elsewhere: in TensorBoard, in Weights & Biases."""

import hashlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxft.errors import UserError
from jaxft.run.remote_workdir import display_name

SCALARS = ("loss", "accuracy", "images_per_second")


def check_trackers(log: ConfigDict) -> None:
    """Raises UserError where the config's `log` section asks for what is not installed."""
    needed = (
        ("log.tensorboard", log.tensorboard, "tensorboardX", "'jaxft[tensorboard]'"),
        ("log.wandb", log.wandb, "wandb", "wandb"),
    )
    for key, wanted, module, package in needed:
        if wanted and importlib.util.find_spec(module) is None:
            raise UserError(f"{key} needs {module}: pip install {package}")


class Trackers:
    """Writes from process 0 alone.

    TensorBoard has the lines of before an interruption written anew, `kept`, for a killed process may not have written
    them; Weights & Biases takes each step once.
    """

    def __init__(self, config: ConfigDict, workdir: Path, kept: Iterable[dict[str, Any]]) -> None:
        self._writers: list[Callable[[dict[str, float], int], None]] = []
        self._closers: list[Callable[[], None]] = []
        if jax.process_index():
            return
        if config.log.tensorboard:
            from tensorboardX import SummaryWriter

            rows = list(kept)
            suffix = f".{len(rows):09}"  # or a writer of the same second would overwrite this one's file
            board = SummaryWriter(str(workdir / "tensorboard"), purge_step=1, filename_suffix=suffix)

            def write_scalars(row: dict[str, float], step: int) -> None:
                for key, value in row.items():
                    board.add_scalar(key, value, step)

            self._writers.append(write_scalars)
            for row in rows:
                self.write(row)
            self._closers.append(board.close)
        if config.log.wandb:
            import wandb

            where = display_name(workdir.resolve())  # on whatever machine it goes on
            identity = hashlib.sha256(where.encode()).hexdigest()[:16]
            run = wandb.init(
                project=config.log.wandb,
                name=PurePath(where).name,
                dir=workdir,
                id=identity,
                resume="allow",
                config=config.to_dict(),
            )
            self._writers.append(run.log)
            self._closers.append(run.finish)

    def write(self, row: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        scalars = {f"{row['split']}/{key}": row[key] for key in SCALARS}
        for write in self._writers:
            write(scalars, row["step"])

    def close(self) -> None:
        for close in self._closers:
            close()
