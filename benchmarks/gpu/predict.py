"""Part `predict`: `jaxft predict` on a folder, and Classifier.probabilities on arrays in memory, 64 images per batch.

As a command of its own, `python -m benchmarks.gpu.predict WORKDIR FOLDER SECONDS DTYPE` measures the arrays.
"""

import json
import sys
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import original
from benchmarks.gpu.command import Clock, environment, needs_gpu_or_toy, watch
from benchmarks.gpu.part import Settings, Skipped, run_child, say

if TYPE_CHECKING:
    import numpy as np

BATCH = 64  # jaxft.inference.BATCH_SIZE
SAMPLE = "jaxft/samples/cifar10.tar.xz"
TOY_FILES = 300
ARRAYS = 1024  # images per turn, which repeat those that were read
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
DTYPES = ("bfloat16", "float32")
LEAST = 5  # seconds for a process


def images_folder(settings: Settings) -> Path:
    """Returns a folder of images to predict: the data's test images, if they have a folder of their own."""
    if settings.data != "sample:cifar10":
        folder = Path(settings.data.removeprefix("folder:"))
        return folder / "test" if (folder / "test").is_dir() else folder
    folder = settings.cache.parent / "images"
    if not folder.exists():
        with tarfile.open(SAMPLE) as tar:
            tar.extractall(folder, filter="data")
        if settings.toy:
            for path in sorted(folder.rglob("*.jpg"))[TOY_FILES:]:
                path.unlink()
    return folder


def predict(settings: Settings, seconds: float) -> dict[str, Any]:
    """Measures the command from its start to its last line, and the classifier in a process that is warm."""
    needs_gpu_or_toy(settings)
    clock = Clock(seconds)
    original.ensure(settings, clock)
    clock.need(LEAST, "predict")
    workdir, folder = original.workdir(settings), images_folder(settings)
    command = ["jaxft.predict", f"--workdir={workdir}", "--json", str(folder)]
    observed = watch(command, clock.left() / 2, environment(settings))
    times = [at for at, _ in observed.lines]
    if not times:
        raise Skipped("the time was over before the first prediction")
    # The first batch shows when it has started, the last line when it has ended.
    speed = (len(times) - BATCH) / (times[-1] - times[0]) if len(times) > BATCH else None
    settings.results["command"] = {
        "files": len(times),
        "first_prediction_seconds": times[0],
        "seconds": observed.seconds,
        "images_per_second": speed,
        "stopped_at_its_limit": bool(observed.stopped),
    }
    say(f"predict, command: first line after {times[0]:.1f} s, then {speed or 0:,.0f} images/s from files")
    for position, dtype in enumerate(DTYPES):
        share = clock.left() / (len(DTYPES) - position)
        if share < LEAST:
            return {"reason": f"too little time for arrays in {dtype}"}
        measuring = min(share / 4, 1 if settings.toy else 4)
        child = ["benchmarks.gpu.predict", str(workdir), str(folder), str(measuring), dtype]
        try:
            found = run_child(child, share, environment(settings))
        except Skipped as error:
            settings.results[f"arrays, {dtype}"] = {"skipped": str(error)}
            continue
        settings.results[f"arrays, {dtype}"] = found
        say(
            f"predict, arrays in {dtype}: {found['images_per_second']:,.0f} images/s; loaded in "
            f"{found['load_seconds']:.1f} s, first batch in {found['first_batch_seconds']:.1f} s"
        )
    return {}


def first_images(folder: Path, count: int) -> "np.ndarray":
    """Returns images of a folder as one uint8 array (count, H, W, 3), repeated if there are fewer."""
    import numpy as np
    from PIL import Image

    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    chosen = paths[:: max(len(paths) // BATCH, 1)][:BATCH]  # of all classes
    images = [Image.open(path).convert("RGB") for path in chosen]
    arrays = np.stack([np.asarray(image.resize(images[0].size)) for image in images])
    return arrays[np.arange(count) % len(arrays)]


def repeated(turn: Any, images: int, seconds: float) -> float:
    """Returns images per second of a function that processes `images`, after its warm-up, for that many seconds."""
    started, turns = time.monotonic(), 0
    while time.monotonic() - started < seconds or not turns:
        turn()
        turns += 1
    return images * turns / (time.monotonic() - started)


def main() -> None:
    """Prints a JSON object with the speed of a run's classifier on arrays."""
    workdir, folder, seconds, dtype = sys.argv[1:]
    import jax.numpy as jnp

    from jaxft.classifier import Classifier
    from jaxft.process import set_up
    from jaxft.training.restore import load_checkpoint

    set_up()
    images = first_images(Path(folder), ARRAYS)
    started = time.monotonic()
    checkpoint = load_checkpoint(workdir, "best")
    classifier = Classifier(checkpoint._replace(model=checkpoint.model.clone(dtype=jnp.dtype(dtype))))
    loaded = time.monotonic()
    classifier.probabilities(images[:BATCH])
    first = time.monotonic()
    speed = repeated(lambda: classifier.probabilities(images), ARRAYS, float(seconds))
    found = {
        "images_per_second": speed,
        "load_seconds": loaded - started,
        "first_batch_seconds": first - loaded,
        "image_shape": images.shape[1:],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
