"""Variants of the train step on a GPU: XLA flags, config keys and formulations, each with its question.

`python -m benchmarks.accelerators --variants` predicts each, benchmarks/gpu/variants.py measures it. A variant runs in
a process of its own, because an unknown XLA flag aborts the process. This module imports neither JAX nor jaxft.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One change to the usual step: bfloat16, 224 px, one step per call."""

    flags: str = ""  # added to XLA_FLAGS
    overrides: Mapping[str, Any] = {}  # config keys, as on the command line: {"model.batch_norm": "frozen"}
    formulation: str = ""  # a name in benchmarks/kernels/formulations.py: replaces a function before tracing


# Ordered by expected gain: where time is short, the first ones are measured. Predictions are in
# docs/notes/accelerators.md: no flag changes the untuned program's traffic for the better.
VARIANTS: dict[str, Variant] = {
    "plain": Variant(),
    "stem_channels_8": Variant(formulation="stem_channels_8"),
    "stem_blocks_16": Variant(formulation="stem_blocks_16"),
    "fusion_autotuner": Variant("--xla_gpu_experimental_enable_fusion_autotuner=true"),
    "conv_fusion": Variant("--xla_gpu_experimental_enable_conv_fusion=true"),
    "pool_elementwise": Variant(formulation="pool_elementwise"),
    "all_fusions_with_triton": Variant("--xla_gpu_experimental_all_fusions_with_triton=true"),
    "block_level_rewriter": Variant("--xla_gpu_experimental_enable_fusion_block_level_rewriter=true"),
    "runtime_fusion": Variant("--xla_gpu_use_runtime_fusion=true"),
    "same_shape_multi_output": Variant("--xla_gpu_experimental_enable_same_shape_multi_output_fusion=true"),
    "triton_multi_output": Variant("--xla_gpu_unsupported_enable_triton_multi_output_fusion=true"),
    "cudnn_gemm_fusion": Variant("--xla_gpu_cudnn_gemm_fusion_level=3"),
    "command_buffer_off": Variant("--xla_gpu_enable_command_buffer="),
    "force_conv_nhwc": Variant("--xla_gpu_force_conv_nhwc=true"),
    "stem_channels_4": Variant(formulation="stem_channels_4"),
    "resize_by_taps": Variant(formulation="resize_by_taps"),
    "steps_per_call_8": Variant(overrides={"steps_per_call": 8}),
    "frozen_statistics": Variant(overrides={"model.batch_norm": "frozen"}),
    "float32": Variant(overrides={"model.dtype": "float32"}),
    "remat": Variant(overrides={"model.remat": True}),
}
