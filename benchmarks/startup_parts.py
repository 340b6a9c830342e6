"""Runs `jaxft.train` up to its first step and prints how long each part of the start took, as one JSON line.

python -m benchmarks.startup_parts --config configs/cifar10.py --workdir DIR [--config.KEY=VALUE ...]

It takes the arguments of jaxft.train, prepares the process as that command does, and calls the same functions, some of
them wrapped by a clock. The seconds are wall time since the process began. "parts" adds up to "total": the time of a
function does not include that of others in the list, or of JAX's tracing, lowering, compiling and loading of programs,
which JAX reports itself. "in_background" is such work of other threads, which the total does not contain, and
"cpu_seconds" is that of all threads. The process ends as soon as the first step's metrics are written, so DIR is left
as a killed run leaves it.
"""

import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

PARTS = {  # functions of jaxft, by the name under which they are called
    "config": ["jaxft.train:load_config"],
    "find the files": ["jaxft.data.image_folder:find_files"],
    "fingerprint of the files": ["jaxft.data.labelled_files:LabelledFiles.fingerprint"],
    "read the images": ["jaxft.data.image_folder:write_arrays"],
    "open and check the cached images": ["jaxft.data.image_folder:open_arrays"],
    "other data": ["jaxft.train:load_splits"],
    "make the model": ["jaxft.train:make_model", "jaxft.train:choose_formulation"],
    "load the weights": ["jaxft.training.start:load_pretrained"],
    "state and checkpoints": ["jaxft.train:begin_or_resume"],
    "print the start": ["jaxft.train:print_start"],
    "copy the images": ["jaxft.train:make_loaders"],
    "run the first step": ["jaxft.train:train_epoch"],
}
JAX_PARTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
    "/jax/compilation_cache/cache_retrieval_time_sec": "load compiled programs",
}


class Clock:
    """Divides the main thread's time into parts; nested parts are not counted twice."""

    def __init__(self, started: float) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.background: dict[str, float] = defaultdict(float)
        self._open = ["other"]
        self._since = started
        self._events: dict[int, list[tuple[float, float]]] = defaultdict(list)  # (begin, seconds) by thread

    def switch(self) -> None:
        """Gives the time since the last change to the innermost part."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def begin(self, part: str) -> None:
        self.switch()
        self._open.append(part)

    def end(self) -> None:
        self.switch()
        self._open.pop()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return function(*arguments, **keywords)
            self.begin(part)
            try:
                return function(*arguments, **keywords)
            finally:
                self.end()

        return wrapper

    def listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Listens to JAX's durations. One that ends now contains those that began after it, such as inner traces."""
        if event not in JAX_PARTS:
            return
        begin = time.clock_gettime(time.CLOCK_BOOTTIME) - duration_secs
        events = self._events[threading.get_ident()]
        own = duration_secs
        while events and events[-1][0] >= begin:
            own -= events.pop()[1]
        events.append((begin, duration_secs))
        if threading.current_thread() is not threading.main_thread():
            self.background[JAX_PARTS[event]] += own
            return
        self.switch()
        self.seconds[JAX_PARTS[event]] += own
        self.seconds[self._open[-1]] -= own

    def print_and_exit(self) -> NoReturn:
        import jax

        self.switch()
        parts = {name: round(seconds, 2) for name, seconds in self.seconds.items()}
        background = {name: round(seconds, 2) for name, seconds in self.background.items()}
        device = jax.local_devices()[0].device_kind
        total = round(sum(self.seconds.values()), 2)
        result = {"device": device, "total": total, "parts": parts, "in_background": background}
        print(json.dumps(result | {"cpu_seconds": round(time.process_time(), 2)}), flush=True)
        os._exit(0)


def process_start() -> float:
    """Returns when this process began, on Linux's CLOCK_BOOTTIME; an exec does not change it."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def find(name: str) -> tuple[Any, str]:
    """Returns the object that has a function of PARTS, and its attribute."""
    module, _, path = name.partition(":")
    *owners, attribute = path.split(".")
    owner: Any = import_module(module)
    for inner in owners:
        owner = getattr(owner, inner)
    return owner, attribute


def main(argv: list[str]) -> None:
    from jaxft import process

    if "GLIBC_TUNABLES" not in os.environ:  # as jaxft.process.reexec_with_huge_pages does for a command
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], process.environment())
    clock = Clock(process_start())
    clock.begin("import JAX")
    clock.seconds["start Python"] = clock.seconds.pop("other")
    clock.end()
    clock.timed("import JAX", process.import_jax)([])
    import jax

    jax.monitoring.register_event_duration_secs_listener(clock.listen)
    clock.begin("import the rest")
    train = import_module("jaxft.train")
    from jaxft.run.processes import run_together

    clock.end()
    for part, names in PARTS.items():
        for name in names:
            owner, attribute = find(name)
            setattr(owner, attribute, clock.timed(part, getattr(owner, attribute)))
    owner, attribute = find("jaxft.training.loop:Trainer.record")
    record = getattr(owner, attribute)

    def record_and_exit(trainer: Any, row: dict[str, Any]) -> None:
        record(trainer, row)
        if row["split"] == "train":
            clock.print_and_exit()

    setattr(owner, attribute, record_and_exit)
    clock.timed("check XLA_FLAGS and the cache", process.set_up)()

    def run(argv: list[str]) -> None:
        clock.end()
        clock.timed("start the devices", jax.devices)()
        train.main(argv)

    clock.begin("look for other processes")
    sys.exit(run_together(run, argv))


if __name__ == "__main__":
    main(sys.argv[1:])
