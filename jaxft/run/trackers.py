"""Copies the lines of metrics.jsonl to TensorBoard and to Weights & Biases."""

import hashlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import Any

from ml_collections import ConfigDict

from jaxft.data.fields import parse_targets
from jaxft.errors import UserError
from jaxft.files import reason
from jaxft.main_process import is_main_process
from jaxft.run.remote_workdir import display_name
from jaxft.run.workdir import Workdir

SCALARS = ("loss", "accuracy", "images_per_second")  # of a single class, besides best_metric
NOT_SCALARS = ("step", "epoch", "split", "score", "seconds")  # keys of a row


def check_trackers(log: ConfigDict) -> None:
    """Raises UserError if the config's `log` section needs a package that is not installed."""
    needed = (
        ("log.tensorboard", log.tensorboard, "tensorboardX", "'jaxft[tensorboard]'"),
        ("log.wandb", log.wandb, "wandb", "wandb"),
    )
    for key, wanted, module, package in needed:
        if wanted and importlib.util.find_spec(module) is None:
            raise UserError(f"{key} needs {module}: pip install {package}")


class Trackers:
    """Writes each line to the trackers that the config's `log` section names, from process 0.

    kept: the lines from before an interruption. They are written to TensorBoard again, because a killed process may
    have lost them; Weights & Biases accepts each step only once. Raises UserError if DIR/tensorboard cannot be written.
    """

    def __init__(self, config: ConfigDict, workdir: Workdir, kept: Iterable[dict[str, Any]]) -> None:
        fields = parse_targets(config.targets)
        one_class = len(fields) == 1 and fields[0].kind == "class"
        self._keys = (*SCALARS, config.best_metric) if one_class else ()  # (): all
        self._writers: list[Callable[[dict[str, float], int], None]] = []
        self._closers: list[Callable[[], None]] = []
        if not is_main_process():
            return
        if config.log.tensorboard:
            from tensorboardX import SummaryWriter

            rows = list(kept)
            suffix = f".{len(rows):09}"  # file names hold only the second, and two writers may share it
            try:
                board = SummaryWriter(str(workdir.tensorboard), purge_step=1, filename_suffix=suffix)
            except OSError as error:
                raise UserError(
                    f"{workdir.tensorboard} cannot be written: {reason(error)}; move it away, or set "
                    "--config.log.tensorboard=False"
                ) from None

            def write_scalars(row: dict[str, float], step: int) -> None:
                for key, value in row.items():
                    board.add_scalar(key, value, step)

            self._writers.append(write_scalars)
            for row in rows:
                self.write(row)
            self._closers.append(board.close)
        if config.log.wandb:
            import wandb

            name = display_name(workdir.path.resolve())
            run = wandb.init(
                project=config.log.wandb,
                name=PurePath(name).name,
                dir=workdir.path,
                id=hashlib.sha256(name.encode()).hexdigest()[:16],  # the same if another machine resumes the run
                resume="allow",
                config=config.to_dict(),
            )
            self._writers.append(run.log)
            self._closers.append(run.finish)

    def write(self, row: dict[str, Any]) -> None:
        """Writes a line of metrics.jsonl."""
        keys = dict.fromkeys(self._keys or [key for key in row if key not in NOT_SCALARS])
        scalars = {f"{row['split']}/{key}": row[key] for key in keys if key in row}
        for write in self._writers:
            write(scalars, row["step"])

    def close(self) -> None:
        for close in self._closers:
            close()
