"""Distinguishes the process that writes files and prints from the others of a distributed run."""

import jax


def is_main_process() -> bool:
    """Returns whether this is process 0, which writes and prints for all of them."""
    return jax.process_index() == 0
