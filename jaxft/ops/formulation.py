"""Defines formulations: ways to compute the same network, one for each platform on which XLA makes it fast."""

from typing import Literal

import jax

Formulation = Literal["plain", "cpu", "cpu-onednn", "gpu", "tpu"]


def default_formulation() -> Formulation:
    """Returns the formulation of the platform that JAX computes on; "plain" if the platform has none."""
    formulations: dict[str, Formulation] = {"cpu": "cpu", "gpu": "gpu", "tpu": "tpu"}
    return formulations.get(jax.default_backend(), "plain")


def on_cpu(formulation: Formulation) -> bool:
    """Returns whether the formulation works around XLA's CPU backend, with or without oneDNN."""
    return formulation in ("cpu", "cpu-onednn")


# NOTES: BatchNorm sums in parts (docs/notes/cpu-kernels.md), Winograd in bfloat16 (docs/notes/winograd.md),
# Bfloat16 kernel gradients in two halves (docs/notes/onednn.md)
WIDE_BYTES = 4  # bytes per value: on CPUs, types of at least this size are treated like float32, others like bfloat16
