"""Damages checkpoints at random, and verifies that each damage is detected or harmless.

    python -m benchmarks.damage --workdir DIR [--damages 1000] [--seed 0]

The checkpoint is that of a ResNet-18 of width 8 with momentum. A damage flips, overwrites, inserts or removes bytes,
truncates, empties or removes a file, swaps two files, or removes a folder. Half of the time every file is equally
likely, half of the time every byte. Then the latest checkpoint is restored: this must raise DamagedCheckpointError or
return the very bits that were saved. Prints JSON.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections import Counter
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

from jaxft.config import default_config
from jaxft.data.batches import replicate
from jaxft.models.resnet import make_model
from jaxft.run.checkpoints import Checkpoints, DamagedCheckpointError
from jaxft.run.metrics_file import MetricsFile
from jaxft.run.workdir import Workdir
from jaxft.training.optimizer import make_optimizer
from jaxft.training.state import TrainState, abstract_train_state, create_train_state

STEP = 100


def bits(state: TrainState) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def damage(folder: Path, rng: random.Random) -> str:
    """Makes one random damage and describes it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    (path,) = rng.choices(files, [path.stat().st_size for path in files] if rng.random() < 0.5 else None)
    name = path.relative_to(folder)
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content) + 1)
    kind = rng.choice(
        ["flip a bit", "overwrite", "insert", "cut out", "truncate", "empty", "remove", "swap", "remove a folder"]
    )
    size = rng.choice([1, 8, 100])
    if kind == "flip a bit" and content:
        content[place % len(content)] ^= 1 << rng.randrange(8)
    elif kind == "overwrite":
        content[place : place + size] = rng.randbytes(min(size, len(content) - place))
    elif kind == "insert":
        content[place:place] = rng.randbytes(size)
    elif kind == "cut out":
        del content[place : place + size]
    elif kind == "truncate":
        del content[place:]
    elif kind == "empty":
        content.clear()
    if kind == "remove":
        path.unlink()
    elif kind == "remove a folder":
        folders = sorted(path for path in folder.rglob("*") if path.is_dir())
        shutil.rmtree(rng.choice(folders))
    elif kind == "swap":
        other = rng.choice(files)
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        path.write_bytes(content)
    return f"{kind}: {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = default_config()
    config.model.arch, config.model.width = "resnet18", 8
    model = make_model(config.model, num_classes=10)
    tx = make_optimizer(config.optimizer, steps_per_epoch=1, num_epochs=1)
    state = jax.jit(partial(create_train_state, model, tx))(jax.random.key(0)).replace(step=np.int32(STEP))
    saved = bits(state)
    pristine = args.workdir / "pristine"
    checkpoints = Checkpoints(Workdir(pristine), MetricsFile(Workdir(pristine).metrics))
    checkpoints.save(replicate(state), {"config": config.to_dict()})
    checkpoints.close()

    rng = random.Random(args.seed)
    noticed: Counter[str] = Counter()
    harmless: Counter[str] = Counter()
    silent, escaped = [], []
    workdir, seconds = args.workdir / "damaged", []
    for number in range(args.damages):
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(pristine, workdir)
        what = damage(workdir / "checkpoints" / str(STEP), rng)
        kind = what.split(":")[0]
        started = time.monotonic()
        try:
            checkpoints = Checkpoints(Workdir(workdir))
            _, restored = checkpoints.restore_latest(abstract_train_state(model, tx), "refuse")
            (harmless.update([kind]) if bits(restored) == saved else silent.append(what))
        except DamagedCheckpointError:
            noticed[kind] += 1
        except Exception as error:  # a traceback instead of a line
            escaped.append(f"{what}: {type(error).__name__}: {error}"[:300])
        seconds.append(time.monotonic() - started)
        if number % 100 == 99:
            print(f"{number + 1} damages, {noticed.total()} noticed, {len(silent)} silent", file=sys.stderr)
    result = {
        "damages": args.damages,
        "noticed": noticed.total(),
        "harmless": harmless.total(),
        "silent": silent,
        "not_told_in_one_line": escaped,
        "noticed_by_kind": dict(noticed),
        "harmless_by_kind": dict(harmless),
        "median_seconds_to_restore": round(float(np.median(seconds)), 4),
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint")},
    }
    print(json.dumps(result, indent=1))
    sys.exit(bool(silent or escaped))


if __name__ == "__main__":
    main()
