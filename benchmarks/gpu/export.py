"""Part `export`: a network exported as StableHLO, run without jaxft's model code and compared with `predict`.

As a command of its own, `python -m benchmarks.gpu.export WORKDIR FOLDER SECONDS FILE ...` runs the exported files as
examples/run_exported.py does.
"""

import json
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.gpu import original
from benchmarks.gpu.command import Clock, environment, needs_gpu_or_toy, watch
from benchmarks.gpu.part import Settings, Skipped, run_child, say
from benchmarks.gpu.predict import BATCH, first_images, images_folder, repeated

LEAST = 5  # seconds for a process
TOLERANCE = 0.05  # of a probability: bfloat16 rounds each of some 50 layers to 8 bits, in another order


def export(settings: Settings, seconds: float) -> dict[str, Any]:
    """Exports for all platforms and for this one, and runs both files in a process of their own."""
    needs_gpu_or_toy(settings)
    clock = Clock(seconds)
    original.ensure(settings, clock)
    workdir = original.workdir(settings)
    platform = "cuda" if settings.gpu else "cpu"
    files = {"all platforms": [], f"only {platform}": [f"--platform={platform}"]}
    paths = {name: settings.folder / f"{name.replace(' ', '-')}.zip" for name in files}
    for name, options in files.items():
        clock.need(LEAST, f"an export for {name}")
        command = ["jaxft.export", f"--workdir={workdir}", "--to=stablehlo", f"--out={paths[name]}", *options]
        observed = watch(command, clock.left(), environment(settings))
        if observed.stopped:
            raise Skipped(f"the time was over during the export for {name}")
        settings.results[name] = {
            "export_seconds": observed.seconds,
            "megabytes": paths[name].stat().st_size / 1e6,
        }
    clock.need(LEAST, "the exported networks")
    measuring = min(clock.left() / 6, 0.5 if settings.toy else 3)
    child = ["benchmarks.gpu.export", str(workdir), str(images_folder(settings)), str(measuring)]
    found = run_child([*child, *(str(path) for path in paths.values())], clock.left(), environment(settings))
    wrong = []
    for name, figures in zip(files, found["files"], strict=True):
        settings.results[name] |= figures
        say(
            f"export, {name}: {figures['images_per_second']:,.0f} images/s, first batch in "
            f"{figures['first_batch_seconds']:.1f} s; probabilities differ from predict's by at most "
            f"{figures['largest_difference']:.1g}, labels of {figures['different_labels']} of {BATCH} images"
        )
        if not figures["largest_difference"] <= TOLERANCE:  # also if it is NaN
            wrong.append(name)
    if wrong:
        raise RuntimeError(f"exported for {' and '.join(wrong)}: other probabilities than predict's")
    return {}


def main() -> None:
    """Prints a JSON object with the speed of each file and its difference from the run's classifier."""
    workdir, folder, seconds, *files = sys.argv[1:]
    import jax
    import numpy as np

    from jaxft.classifier import load
    from jaxft.process import set_up

    set_up()
    images = first_images(Path(folder), BATCH)
    expected = load(workdir).probabilities(images)
    results = []
    for file in files:
        started = time.monotonic()
        with zipfile.ZipFile(file) as archive:
            network = jax.jit(jax.export.deserialize(bytearray(archive.read("model.stablehlo"))).call)
        found = np.asarray(network(images))
        first = time.monotonic()
        results.append(
            {
                "first_batch_seconds": first - started,
                "images_per_second": repeated(lambda: np.asarray(network(images)), BATCH, float(seconds)),  # noqa: B023, called at once
                "largest_difference": float(np.abs(found - expected).max()),
                "different_labels": int((found.argmax(1) != expected.argmax(1)).sum()),
            }
        )
    print(json.dumps({"files": results}))


if __name__ == "__main__":
    import jax.export  # noqa: F401, a module of its own

    main()
