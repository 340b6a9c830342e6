"""Contenders of benchmarks/train_step.py that compile beside each other and are measured undisturbed.

XLA and cuDNN choose kernels by timing them. A contender therefore waits for permission to choose; few have it at a
time, and none while others are measured. Those that are compiling on the CPU are paused meanwhile.
"""

import importlib.util
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.child import Child
from benchmarks.gpu.part import Settings
from benchmarks.train_step import Task, is_timms, start, summary, take_turns

GIB = 2**30
MEMORY_SHARE = 0.9  # of a GPU's memory that contenders may need at a time
BYTES = {  # of a GPU's memory per image of 224 px, measured on an H100 with a ResNet-50 (docs/benchmarks.md)
    ("jaxft", "train", "bfloat16"): 0.044 * GIB,
    ("jaxft", "train", "float32"): 0.083 * GIB,
    ("torch", "train", "bfloat16"): 0.044 * GIB,
    ("torch", "train", "float32"): 0.160 * GIB,
}
CONTEXT = GIB  # of a process that uses a GPU
CHECK = 0.1  # seconds between two looks at the contenders


@dataclass(eq=False)
class Contender:
    """A contender, from waiting for its start to its end."""

    name: str  # shown
    kind: str  # jaxft-bfloat16, torch-float32-compile ...
    task: Task
    env: Mapping[str, str] = field(default_factory=dict)
    child: Child | None = None
    started: float = 0.0
    phase: str = ""  # built: waits for permission; granted: chooses kernels; chosen: compiles on the CPU
    report: dict[str, Any] | None = None  # of benchmarks/train_step.py, once it is compiled
    gone: str = ""  # why it cannot be measured

    @property
    def memory(self) -> float:
        """Estimated bytes on a GPU."""
        library, dtype = self.kind.split("-")[:2]
        per_image = BYTES[library, "train", dtype] * (1 if self.task.which == "train" else 0.3)
        return CONTEXT + per_image * self.task.batch

    @property
    def is_compiling(self) -> bool:
        return bool(self.child and not self.report and not self.gone)

    @property
    def is_settled(self) -> bool:
        """Returns whether it is ready or gone."""
        return bool(self.report or self.gone)

    def drop(self, reason: str) -> None:
        self.gone = self.gone or reason
        self.close()

    def close(self) -> None:
        if self.child:
            self.child.kill()
            self.child = None


class Contenders:
    """Starts contenders in order, as many as fit at a time, and measures those that are ready."""

    def __init__(
        self, settings: Settings, everyone: Sequence[Contender], slots: int, limit: float, grants: int = 1
    ) -> None:
        """slots: the number that may compile at a time. grants: the number of them that may choose kernels.

        limit: seconds after which one that compiles is dropped.
        """
        self.everyone = list(everyone)
        self._slots, self._limit, self._grants = slots, limit, grants
        self.memory = MEMORY_SHARE * gpu_memory() if settings.gpu else float("inf")
        missing = [name for name in ("torch", "torchvision", "timm") if not importlib.util.find_spec(name)]
        for contender in self.everyone:
            contender.task = contender.task._replace(is_gated=True, needs_gpu=settings.gpu)
            if contender.kind.startswith("torch"):
                if needed := [name for name in missing if name != "timm" or is_timms(contender.task.arch)]:
                    contender.gone = f"{needed[0]} is not installed"
                elif "compile" in contender.kind and not settings.gpu:
                    contender.gone = "torch.compile takes minutes on a CPU"
            if contender.memory > self.memory:
                contender.gone = f"needs about {contender.memory / GIB:.0f} GiB"

    def poll(self, allowed: Sequence[Contender] | None = None) -> None:
        """Notices what contenders report, starts as many as there are slots, and permits as many as memory allows.

        allowed: those that may be permitted to choose kernels; default: all.
        """
        for contender in self.everyone:
            if contender.is_compiling:
                self._listen(contender)
        alive = [contender for contender in self.everyone if contender.child]
        granted = sum(each.phase == "granted" for each in alive if each.is_compiling)
        for contender in self.everyone if allowed is None else allowed:
            if contender.is_compiling and contender.phase == "built" and granted < self._grants:
                if self._needed(contender) > self.memory:
                    break
                assert contender.child
                contender.child.send()
                contender.phase, contender.started = "granted", time.monotonic()
                granted += 1
        slots = self._slots - sum(each.is_compiling for each in alive)
        waiting = [each for each in self.everyone if not each.child and not each.is_settled]
        for contender in waiting[: max(slots, 0)]:
            contender.child = start(contender.kind, contender.task, contender.env)
            contender.started = time.monotonic()

    def _needed(self, contender: Contender) -> float:
        """Returns the bytes that this contender needs beside others: all earlier ones, and later ones that have them.

        Otherwise, later ones could take memory that an earlier one still needs, and both would wait for ever.
        """
        position = self.everyone.index(contender)
        needed = 0.0
        for other, each in enumerate(self.everyone):
            is_open = not each.gone and not (each.report and not each.child)
            if is_open and (other <= position or each.phase in ("granted", "chosen")):
                needed += each.memory
            elif each.child:
                needed += CONTEXT
        return needed

    def _listen(self, contender: Contender) -> None:
        """Reads what a contender reports; drops it if it has failed or takes too long, waiting not counted."""
        child = contender.child
        assert child
        if not child.has_answer():
            if contender.phase != "built" and time.monotonic() - contender.started > self._limit:
                contender.drop(f"not compiled after {self._limit:.0f} s")
            return
        try:
            report = child.read(5)
        except (RuntimeError, TimeoutError) as error:
            contender.drop(missing(child.all_errors()) or f"failed: {error}"[:700])
            return
        if "phase" in report:
            contender.phase = report["phase"]
        else:
            contender.report = report

    def wait(self, contenders: Sequence[Contender], until: float) -> None:
        """Waits until all these contenders are settled, or until the time. No others are permitted meanwhile."""
        while not all(contender.is_settled for contender in contenders) and time.monotonic() < until:
            self.poll(contenders)
            self.pause()

    def pause(self) -> None:
        time.sleep(CHECK)

    def measure(self, contenders: Sequence[Contender], rounds: int, until: float) -> dict[str, dict[str, Any]]:
        """Lets the ready ones of these contenders take turns; returns the figures of each that had two turns."""
        ready = {each.name: each for each in contenders if each.report and each.child}
        children = {name: each.child for name, each in ready.items() if each.child}
        with self._undisturbed(until):
            turns = take_turns(children, rounds, until - time.monotonic())
        result: dict[str, dict[str, Any]] = {}
        for name, contender in ready.items():
            if len(turns[name]) < 2:
                contender.drop("measured fewer than two times")
                continue
            report = contender.report or {}
            figures = summary(turns[name], contender.task.batch)
            figures |= {key: report[key] for key in ("first_step_seconds", "first_loss", "checked_loss")}
            if report["predicted_memory"]:
                figures["predicted_memory_mib"] = report["predicted_memory"] // 2**20
            result[name] = figures
        return result

    @contextmanager
    def _undisturbed(self, until: float) -> Iterator[None]:
        """Waits until none chooses kernels, and pauses all that compile."""
        while any(each.is_compiling and each.phase == "granted" for each in self.everyone):
            self.poll([])
            if time.monotonic() > until:
                break
            self.pause()
        paused = [each for each in self.everyone if each.is_compiling]
        begun = time.monotonic()
        for each in paused:
            assert each.child
            each.child.pause()
        try:
            yield
        finally:
            for each in paused:
                if each.child:
                    each.child.resume()
                each.started += time.monotonic() - begun  # the pause does not count


def missing(errors: str) -> str:
    """Returns what a process that ended with these messages lacked, a GPU or an XLA flag, or "" if it failed.

    XLA aborts a process whose XLA_FLAGS it does not know.
    """
    flag = re.search(r"Unknown flags? in XLA_FLAGS: *([^\s=]+)", errors)
    gpu = re.search(r"\w+ finds no GPU", errors)
    return f"unknown flag {flag[1]}" if flag else gpu[0] if gpu else ""


def gpu_memory() -> float:
    """Returns the bytes of the first GPU's memory, or an H100's if nvidia-smi does not answer."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split()[0]) * 2**20
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return 75.0 * GIB


def cache_environment(folder: Path) -> dict[str, str]:
    """Returns the variables with which JAX and PyTorch keep compiled programs in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": str(max(len(os.sched_getaffinity(0)) // 4, 1)),
    }
