"""Tests how benchmarks/accelerators.py reads compiled programs."""

import subprocess
from typing import Any

import pytest

from benchmarks import accelerators
from benchmarks.accelerators import bytes_of, cycles, kernels
from benchmarks.gpu.variant_table import Variant

GPU = """HloModule jit_f

%add (a: f32[8], b: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
}

ENTRY %main (x: bf16[4,8], kernel: f32[8]) -> f32[] {
  %x.1 = bf16[4,8]{1,0} parameter(0), metadata={op_name="x"}
  %kernel.1 = f32[8]{0} parameter(1)
  %cudnn-conv.2 = (f32[4,8]{1,0}, u8[0]{0}) custom-call(%x.1, %kernel.1), custom_call_target="__cudnn$convForward"
  %y.1 = f32[4,8]{1,0} get-tuple-element(%cudnn-conv.2), index=0
  ROOT %loop_fusion.3 = f32[] fusion(%y.1, %x.1), kind=kLoop, calls=%add
}
"""
TPU = """
  %f.1 = f32[8]{0} fusion(%a), metadata={op_name="jit(s)/jvp(ResNet)/ResNet._features/layer1/0/bn1/sub"}, \
backend_config={"estimated_cycles":"120"}
  ROOT %f.2 = f32[8]{0} fusion(%f.1), metadata={op_name="jit(s)/transpose(jvp(ResNet))/ResNet._features/conv1/mul"}, \
backend_config={"estimated_cycles":"7"}
  ROOT %f.4 = f32[8]{0} fusion(%f.1), metadata={op_name="jit(s)/jvp(ViT)/ViT._features/blocks/0/mlp/fc1/dot_general"}, \
backend_config={"estimated_cycles":"3"}
  ROOT %f.5 = f32[8]{0} fusion(%f.1), metadata={op_name="jit(s)/jvp(ConvNeXt)/stages/0/blocks/1/conv_dw/conv"}, \
backend_config={"estimated_cycles":"2"}
  %copy.3 = f32[8]{0} copy(%f.1), backend_config={"estimated_cycles":"5"}
  %copy.4 = f32[8]{0} copy(%f.1)
"""


def test_bytes_of_arrays_and_tuples() -> None:
    assert bytes_of("bf16[2,3]{1,0:T(8,128)(2,1)}") == 12
    assert bytes_of("(f32[2,3]{1,0}, pred[], u8[0]{0})") == 25


def test_a_kernel_moves_its_operands_and_its_results() -> None:
    assert list(kernels(GPU)) == [
        ("__cudnn$convForward", 2 * 32 + 4 * 8 + 4 * 32),
        ("loop_fusion", 4 * 32 + 2 * 32 + 4),
    ]


def test_cycles_belong_to_layers() -> None:
    assert list(cycles(TPU)) == [
        ("forward bn", 120),
        ("backward conv", 7),
        ("forward mlp", 3),
        ("forward conv", 2),
        ("forward copy", 5),
    ]


def test_a_variant_that_aborts_leaves_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[-3:] == ["--config.model.remat=True", "--formulation", "stem"]
        assert env["XLA_FLAGS"].endswith("--xla_no")
        return subprocess.CompletedProcess(command, -6, "", "F1127 flags.cc] Unknown flag in XLA_FLAGS: --xla_no\n")

    monkeypatch.setattr(subprocess, "run", run)
    variant = Variant("--xla_no", {"model.remat": True}, "stem")
    predicted = accelerators.predict_variant(variant, ["--target=h100"])
    assert predicted == {"failed": "F1127 flags.cc] Unknown flag in XLA_FLAGS: --xla_no"}
