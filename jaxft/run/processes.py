"""Several processes, each with devices of its own, that train as one."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils
from orbax.checkpoint.multihost import sync_global_processes

from jaxft.errors import UserError, run_command

HEARTBEAT_SECONDS = 30  # without one from a process, the others end


COMPILE_SECONDS = 3600  # that one process may need more than another


def run_together(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """run_command in the processes that the environment names; process 0 alone writes to stdout.

    JAX finds TPU pods, Slurm and Open MPI by itself; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name
    any others. Where one process ends before it is done, all of them do.
    """

    def joined(argv: list[str]) -> None:
        _initialize()
        if jax.distributed.is_initialized():
            _keep_stdout_to_process_0()
        try:
            main(argv)
        except JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            raise UserError(
                f"process {jax.process_index()} of {jax.process_count()} lost the others ({str(error)[:200]}); start "
                "all of them again with the same command"
            ) from error

    try:
        code = run_command(joined, argv)
    except Exception:
        traceback.print_exc()
        code = 1
    if code and jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(code)  # or JAX would wait for processes that wait for this one
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


def _keep_stdout_to_process_0() -> None:
    """What libraries print there by themselves, as a CPU's collectives do, goes to stderr."""
    sys.stdout.flush()
    own = os.open(os.devnull, os.O_WRONLY) if jax.process_index() else os.dup(1)
    sys.stdout = os.fdopen(own, "w")
    os.dup2(2, 1)


def broadcast_bool(value: bool) -> bool:
    """What process 0 says; raises UserError where another differs."""
    decided = bool(multihost_utils.broadcast_one_to_all(value))
    if decided != value:
        raise UserError("the processes see different files in the workdir; name one --workdir that all of them share")
    return decided


def with_compile_barrier(function: Any) -> Callable[..., Any]:
    """A mapped function that no process runs before all have compiled it: a CPU's collectives wait for 30 s only."""
    if jax.process_count() == 1:
        return function
    compiled: set[tuple[Any, ...]] = set()

    def call(*arguments: Any) -> Any:
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(arguments))
        if shapes not in compiled:
            function.lower(*arguments).compile()  # the call below finds it
            sync_global_processes("compiled", timeout=COMPILE_SECONDS)
            compiled.add(shapes)
        return function(*arguments)

    return call
