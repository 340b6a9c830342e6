"""Compiles a run's programs before they are needed, and shows what is being compiled."""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import jax

from jaxft import interrupts
from jaxft.errors import write_message
from jaxft.main_process import is_main_process
from jaxft.ops.formulation import Formulation, on_cpu

SHOWN_AFTER = 1.0  # seconds: programs that are read from the cache of compiled programs are not worth a line
LONG = 5.0  # seconds of a compilation whose end is reported too


@dataclass(frozen=True, eq=False)
class Program:
    """A mapped function and all arguments for which a run compiles it; each set of shapes is compiled once."""

    name: str  # for messages: "train step for 112 pixels"
    call: Callable[..., Any]  # what the run calls
    function: Any  # the pmapped function behind it
    arguments: Sequence[tuple[Any, ...]]  # abstract, except for arrays that stay on the devices

    def compile(self) -> float:
        """Compiles the function, so that later calls find it in JAX's own cache; returns the seconds."""
        started = time.monotonic()
        for arguments in self.arguments:
            self.function.lower(*arguments).compile()
        return time.monotonic() - started


def compiles_ahead(formulation: Formulation) -> bool:
    """Returns whether a run compiles its later programs while the first one trains: on accelerators."""
    return not on_cpu(formulation)  # NOTES: Compiling ahead (docs/notes/input-and-startup.md)


class Compiler:
    """Compiles programs one after the other in a thread: those of `start` ahead of time, others when `wait` needs them.

    XLA compiles without Python's global lock. The main thread only waits, so that it notices signals. With several
    processes the calls themselves compile, see with_compile_barrier: pmap.lower accepts no abstract arguments there.
    """

    def __init__(self) -> None:
        self._ahead = jax.process_count() == 1
        self._called: set[Program] = set()
        # Not a daemon thread: Python must not end while XLA's C++ would return to it.
        self._thread = ThreadPoolExecutor(1, "compiling")
        self._futures: dict[Program, Future[float]] = {}
        self._needed: Program | None = None  # the one that `wait` waits for

    def start(self, programs: Iterable[Program]) -> None:
        """Begins to compile the programs in the background, in this order."""
        for program in programs:
            if self._ahead and program not in self._futures:
                self._futures[program] = self._thread.submit(self._compile, program)

    def wait(self, program: Program) -> None:
        """Returns as soon as the program is compiled. Raises Interrupted at a signal, or what the compilation raised.

        A program that failed in the background is compiled again: there may have been too little memory beside the
        step that was training.
        """
        if not self._ahead:
            if program not in self._called:
                _show(f"compiling the {program.name}")
            self._called.add(program)
            return
        ahead = program in self._futures
        self._needed = program
        self.start([program])
        future = self._futures[program]
        started, shown = time.monotonic(), False
        while not wait([future], timeout=0.1).done:
            interrupts.check()
            if not shown and time.monotonic() - started >= SHOWN_AFTER:
                shown = True
                _show(f"compiling the {program.name}")
        self._needed = None
        if ahead and future.exception():
            del self._futures[program]
            self.wait(program)
            return
        seconds = future.result()
        if shown and seconds >= LONG:
            _show(f"compiled the {program.name} in {seconds:.0f} s")

    def close(self) -> None:
        """Drops the programs that wait to be compiled. The current one is finished, which nothing waits for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, program: Program) -> float:
        seconds = program.compile()
        if self._needed is not program and seconds >= SHOWN_AFTER:
            _show(f"compiled the {program.name} in the background, in {seconds:.0f} s")
        return seconds


def abstract(tree: Any) -> Any:
    """Returns shapes, dtypes and shardings of arrays that are donated before the compilation reads them."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def _show(text: str) -> None:
    if is_main_process():
        write_message(text)
