"""The run of the original recipe that several parts share: start-up times it, prediction and export use its network."""

import json
from pathlib import Path

from benchmarks.gpu.command import Clock, Observed, train
from benchmarks.gpu.part import Settings, Skipped, write_json

EPOCHS = 3  # the first one also compiles or loads programs
TOY_EPOCHS = 2
CONFIG = "cifar10"
LEAST = 8  # seconds for a run that is to reach its first checkpoint


def workdir(settings: Settings) -> Path:
    """Returns the workdir of the run; `ensure` trains it."""
    return settings.cache.parent / "original"


def epochs_to_train(settings: Settings) -> int:
    return TOY_EPOCHS if settings.toy else EPOCHS


def run(settings: Settings, seconds: float) -> Observed:
    """Trains or resumes the run and stores its figures."""
    observed = train(settings, workdir(settings), seconds, {"num_epochs": epochs_to_train(settings)}, config=CONFIG)
    write_json(_file(settings), {"rows": observed.rows, "begun": observed.begun()})
    return observed


def ensure(settings: Settings, clock: Clock) -> Observed:
    """Returns what was seen of the run, after training it if needed; of a resumed one, since then.

    Raises Skipped if the time is too short for a checkpoint.
    """
    known = _read(settings)
    if len(known.evaluated()) < epochs_to_train(settings):
        clock.need(LEAST, "training the network")
        run(settings, clock.left())
        known = _read(settings)
    if not known.evaluated():
        raise Skipped("the time was over before the first epoch of the network had ended")
    return known


def _file(settings: Settings) -> Path:
    return workdir(settings).with_suffix(".json")


def _read(settings: Settings) -> Observed:
    if not _file(settings).exists():
        return Observed()
    known = json.loads(_file(settings).read_text())
    return Observed(rows=[(at, row) for at, row in known["rows"]], lines=[(known["begun"], "workdir")])
