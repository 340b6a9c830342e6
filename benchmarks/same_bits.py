"""Proves that a restructuring changes no number: compares the working tree with an earlier commit, bit for bit.

    python -m benchmarks.same_bits [--base 1a59e0d] [--only NAME]

Copies both trees into a temporary folder and trains, evaluates and predicts with each in separate processes, on the
CPU and with separate caches. There are three short runs of a small pretrained ResNet-18 with a new head: "plain"
SGD on the sample of CIFAR-10; "augmented" with all random augmentation, EMA, gradient accumulation and a stage that is
unfrozen later; "streamed" with AdamW, recalibrated BatchNorm and oneDNN's convolutions. The last two read a folder of
images of several sizes, with more in some classes than in others, made from the sample.

Compares the arrays of the final checkpoint (parameters, batch_stats, optimizer state, EMA), the rows of metrics.jsonl
except for their times, and the output of `evaluate --json` and `predict --json`. Prints one JSON line per run; the exit
code is 1 if anything differs.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

ROOT = Path(__file__).parent.parent
TIMES = ("seconds", "images_per_second")

FOLDER = ("--config.data.name=folder:{folder}", "--config.image_size=32", "--config.num_epochs=2")
RUNS = {
    "plain": ("--config.data.train_split=test", "--config.num_epochs=2"),
    "augmented": (
        *FOLDER,
        "--config.model.test_flip=True",
        "--config.class_weights=balanced",
        "--config.label_smoothing=0.1",
        "--config.augment.shift=0.1",
        "--config.augment.crop_area=0.5",
        "--config.augment.crop_ratio=1.3",
        "--config.augment.trivial=True",
        "--config.augment.erase=0.25",
        "--config.augment.mixup=0.2",
        "--config.augment.cutmix=1.0",
        "--config.optimizer.nesterov=True",
        "--config.optimizer.decay_all=False",
        "--config.optimizer.clip_norm=1.0",
        "--config.optimizer.ema_decay=0.9",
        "--config.optimizer.accumulate_steps=2",
        "--config.optimizer.freeze=stem,stage1,stage2",
        "--config.optimizer.unfreeze=2: stage2",
        "--config.optimizer.head_factor=2.0",
        "--config.optimizer.layer_decay=0.8",
    ),
    "streamed": (
        *FOLDER,
        "--config.model.batch_norm=recalibrate",
        "--config.model.onednn=always",
        "--config.data.stream=always",
        "--config.data.stored_size=48",
        "--config.optimizer.name=adamw",
        "--config.optimizer.learning_rate=0.002",
        "--config.optimizer.weight_decay=0.01",
    ),
}


class Results(NamedTuple):
    arrays: dict[str, np.ndarray]  # by their path in the final checkpoint's state
    rows: list[dict[str, Any]]  # of metrics.jsonl, without times
    evaluation: dict[str, Any]
    predictions: list[dict[str, Any]]  # one per image


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout


def copy_commit(commit: str, tree: Path) -> None:
    """Unpacks a commit's files; leaves no trace in .git, as a worktree would."""
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as tar:
        tar.extractall(tree, filter="data")


def copy_working_tree(tree: Path) -> None:
    """Copies what the commands need, so that an edit while they run changes nothing."""
    for name in ("jaxft", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))


def write_images(folder: Path) -> None:
    """Writes {train,test}/CLASS/*.png: 20 to 74 images per class to train and 30 to test, sides of 40 to 79 pixels."""
    (sample,) = (ROOT / "jaxft").rglob("cifar10.tar.xz")
    counts: dict[tuple[str, str], int] = {}
    rng = np.random.default_rng(0)
    with tarfile.open(sample) as tar:
        for member in sorted(filter(tarfile.TarInfo.isfile, tar.getmembers()), key=lambda member: member.name):
            split, name, file = Path(member.name).parts
            classes = [other for there, other in counts if there == split]
            order = classes.index(name) if name in classes else len(classes)
            counts[split, name] = counts.get((split, name), 0) + 1
            if counts[split, name] > (20 + 6 * order if split == "train" else 30):
                continue
            content = tar.extractfile(member)
            assert content
            target = (folder / split / name / file).with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            width, height = rng.integers(40, 80, 2).tolist()
            Image.open(content).convert("RGB").resize((width, height)).save(target)


def python(tree: Path, *arguments: object) -> str:
    """Runs python with the tree's jaxft and returns what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"} | {
        "PYTHONPATH": str(tree),  # comes before an editable installation
        "JAXFT_CACHE": str(tree.with_name(f"{tree.name}_cache")),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{result.stderr[-4000:]}\nfailed in {tree.name}: {' '.join(command)}")
    return result.stdout


def run(tree: Path, name: str, folder: Path) -> Results:
    workdir = tree.with_name(f"{tree.name}_{name}")
    overrides = [argument.format(folder=folder) for argument in RUNS[name]]
    python(tree, "-m", "jaxft.train", "--config=configs/quickstart.py", *overrides, "--workdir", workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluation = python(tree, "-m", "jaxft.evaluate", "--workdir", workdir, "--json")
    predictions = python(tree, "-m", "jaxft.predict", "--workdir", workdir, "--json", folder / "test")
    return Results(
        final_arrays(workdir / "checkpoints"),
        [{key: value for key, value in row.items() if key not in TIMES} for row in rows],
        json.loads(evaluation),
        [json.loads(line) for line in predictions.splitlines()],
    )


def final_arrays(checkpoints: Path) -> dict[str, np.ndarray]:
    """Reads with Orbax only: the trees' modules need not have the same names."""
    step = max(int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal())
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(checkpoints.absolute() / str(step) / "state")
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(array)
        for path, array in jax.tree_util.tree_leaves_with_path(state)
    }


def different_array(base: dict[str, np.ndarray], tree: dict[str, np.ndarray]) -> str | None:
    """Describes the first array that differs in path, dtype, shape or bytes."""
    for path in sorted(base.keys() | tree.keys()):
        if path not in base or path not in tree:
            return f"{path} is only in the {'base' if path in base else 'working tree'}"
        a, b = base[path], tree[path]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{path}: {a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}"
        if a.tobytes() != b.tobytes():
            return f"{path}: {np.count_nonzero(a != b)} of {a.size} values differ"
    return None


def different_entry(what: str, base: list[dict[str, Any]], tree: list[dict[str, Any]]) -> str | None:
    """Describes the first difference: the object's index, its key and both values."""
    empty: dict[str, Any] = {}
    for i, (a, b) in enumerate(zip_longest(base, tree, fillvalue=empty)):
        for key in a | b:
            if key not in a or key not in b or a[key] != b[key]:
                return f"{what} {i}, {key}: {a.get(key)!r:.80} became {b.get(key)!r:.80}"
    return None


def compare(base: Results, tree: Results) -> dict[str, Any]:
    evaluation = {key: tree.evaluation.get(key) for key in base.evaluation}  # keys may be added
    differences = {
        "same_bits": different_array(base.arrays, tree.arrays),
        "same_rows": different_entry("row", base.rows, tree.rows),
        "same_evaluation": different_entry("evaluation", [base.evaluation], [evaluation]),
        "same_predictions": different_entry("prediction", base.predictions, tree.predictions),
    }
    found = list(filter(None, differences.values()))
    counts = {"arrays": len(base.arrays), "rows": len(base.rows), "predictions": len(base.predictions)}
    same = {name: difference is None for name, difference in differences.items()}
    return counts | same | ({"first_difference": found[0]} if found else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="1a59e0d", help="commit to compare with (default: 1a59e0d)")
    parser.add_argument("--only", choices=RUNS, help="one of the runs")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # this process only reads checkpoints
    commit = git("rev-parse", "--short", args.base).decode().strip()
    all_same = True
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name).resolve()
        base, tree, folder = temporary / "base", temporary / "tree", temporary / "images"
        copy_commit(commit, base)
        copy_working_tree(tree)
        write_images(folder)
        for side in (base, tree):
            imported = Path(python(side, "-c", "import jaxft; print(jaxft.__file__)").strip())
            if not imported.is_relative_to(side):
                sys.exit(f"jaxft was imported from {imported}, not from {side}")
        for run_name in [args.only] if args.only else RUNS:
            started = time.monotonic()
            with ThreadPoolExecutor() as pool:  # in parallel: much of the time is compilation, in one thread
                outcome = compare(*pool.map(partial(run, name=run_name, folder=folder), (base, tree)))
            print(f"{run_name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            all_same = all_same and "first_difference" not in outcome
            print(json.dumps({"run": run_name, "base": commit} | outcome), flush=True)
    sys.exit(not all_same)


if __name__ == "__main__":
    main()
