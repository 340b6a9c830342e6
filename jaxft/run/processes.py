"""Data-parallel training in several processes, each with its own devices."""

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils
from orbax.checkpoint.multihost import sync_global_processes

from jaxft.errors import Interrupted, UserError, run_command, write_message
from jaxft.main_process import is_main_process

HEARTBEAT_SECONDS = 30  # if a process is silent for longer, the others end
COMPILE_SECONDS = 3600  # how long the other processes wait for the slowest compilation


def run_together(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Calls run_command in every process that the environment describes; returns the exit code.

    JAX detects TPU pods, Slurm and Open MPI; otherwise JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
    describe the processes. Only process 0 writes to stdout. If one process fails, all of them end.
    """

    def joined(argv: list[str]) -> None:
        _initialize()
        if jax.distributed.is_initialized():
            _keep_stdout_to_main_process()
        try:
            main(argv)
        except Interrupted:
            with suppress(Exception):
                jax.distributed.shutdown()  # waits for the others: if one ended earlier, JAX would abort process 0
            raise
        except JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            raise UserError(
                f"process {jax.process_index()} of {jax.process_count()} lost the others ({str(error)[:150]}); "
                "start all of them again with the same command"
            ) from error

    try:
        code = run_command(joined, argv)
    except Exception:
        write_message(traceback.format_exc())
        code = 1
    if code and jax.distributed.is_initialized():
        os._exit(code)  # otherwise JAX would wait for processes that wait for this one
    return code


def _initialize() -> None:
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        count, index = (
            int(os.environ[name]) if address and name in os.environ else None
            for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        )
        jax.distributed.initialize(
            address, count, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=60
        )
    except ValueError as error:
        if address:
            raise UserError(f"JAX_COORDINATOR_ADDRESS is {address}, but: {error}") from None


def _keep_stdout_to_main_process() -> None:
    """Redirects stdout: ours to /dev/null except in process 0, that of libraries (CPU collectives) to stderr."""
    sys.stdout.flush()
    own = os.dup(1) if is_main_process() else os.open(os.devnull, os.O_WRONLY)
    sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)


def broadcast_bool(value: bool) -> bool:
    """Returns process 0's value. Raises UserError in a process whose own value differs."""
    decided = bool(multihost_utils.broadcast_one_to_all(value))
    if decided != value:
        raise UserError("the processes see different files in the workdir; name one --workdir that all of them share")
    return decided


def with_compile_barrier(function: Any) -> Callable[..., Any]:
    """Wraps a mapped function so that no process runs it before all have compiled it.

    CPU collectives wait only 30 s for the other processes.
    """
    if jax.process_count() == 1:
        return function
    compiled: set[tuple[Any, ...]] = set()

    def call(*arguments: Any) -> Any:
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(arguments))
        if shapes not in compiled:
            function.lower(*arguments).compile()  # cached, so that the call below does not compile again
            sync_global_processes("compiled", timeout=COMPILE_SECONDS)
            compiled.add(shapes)
        return function(*arguments)

    return call
