"""Tests `python -m benchmarks.gpu`: arguments, JSON, time limits, and how it reads flags and kernels."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import contenders, families, kernels, steps, variants
from benchmarks.gpu.contenders import missing
from benchmarks.gpu.part import Settings, Skipped, run_child, say
from benchmarks.gpu.variant_table import Variant
from benchmarks.train_step import Task, is_timms


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(toy=True, data="sample:cifar10", weights="", folder=tmp_path / "scratch", cache=tmp_path / "cache")


def entries(monkeypatch: pytest.MonkeyPatch, **parts: Callable[..., Any]) -> dict[str, gpu.Entry]:
    """Makes parts of functions, as the command finds them: in a module."""
    module = types.ModuleType("parts_of_this_test")
    vars(module).update(parts)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return {name: gpu.Entry(f"{module.__name__}:{name}", 1) for name in parts}


def test_parts_report_ok_skipped_failed_and_stopped(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0)

    def good(settings: Settings, seconds: float) -> dict[str, Any]:
        say(f"good: {settings.folder.name}")
        settings.results["first"] = 1
        return {"second": 2 / 3}

    def missing(settings: Settings, seconds: float) -> dict[str, Any]:
        raise Skipped("there is no GPU")

    def broken(settings: Settings, seconds: float) -> dict[str, Any]:
        settings.results["before"] = True
        raise RuntimeError("it\nbroke")

    def slow(settings: Settings, seconds: float) -> dict[str, Any]:
        settings.results["found"] = (3, float("nan"))
        time.sleep(10)
        return {}

    def slower(settings: Settings, seconds: float) -> dict[str, Any]:
        time.sleep(10)
        return {}

    parts = entries(monkeypatch, good=good, missing=missing, broken=broken, slow=slow, slower=slower)
    assert gpu.run(parts, settings, gpu.RESERVE + 0.6, tmp_path / "out.json") == 1
    *lines, last = capsys.readouterr().out.splitlines()
    results = json.loads(last)
    assert lines[0] == "good: good"
    assert results["good"] | {"seconds": 0} == {"status": "ok", "seconds": 0, "first": 1, "second": 0.66667}
    assert results["missing"] | {"seconds": 0} == {"status": "skipped", "seconds": 0, "reason": "there is no GPU"}
    assert results["broken"]["status"] == "failed" and results["broken"]["reason"] == "RuntimeError: it broke"
    assert results["broken"]["before"] is True
    assert results["slow"]["status"] == "ok" and results["slow"]["found"] == [3, None]
    assert results["slow"]["reason"].endswith("incomplete")
    assert results["slower"]["status"] == "skipped"
    assert json.loads((tmp_path / "out.json").read_text()) == results
    assert not any(settings.folder.iterdir())


def test_parts_that_are_skipped_are_no_failure(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    def missing(settings: Settings, seconds: float) -> dict[str, Any]:
        raise Skipped("there is no GPU")

    assert gpu.run(entries(monkeypatch, missing=missing), settings, 60, None) == 0
    assert gpu.run({"gone": gpu.Entry("benchmarks.gpu.gone:gone", 1)}, settings, 60, None) == 1


SCRIPT = """
import sys
from pathlib import Path
from benchmarks.child import Child
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.part import Settings, say

def part(settings, seconds):
    child = Child([sys.executable, "-c", "import time; time.sleep(60)"])
    settings.results["pid"] = child.process.pid
    say("started")
    child.read(60)

settings = Settings(True, "", "", Path(sys.argv[1]))
sys.exit(gpu.run({name: gpu.Entry("__main__:part", 1) for name in ("one", "two")}, settings, 60, Path(sys.argv[2])))
"""


def test_a_signal_ends_children_and_prints_what_is_known(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "scratch"), str(tmp_path / "out.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGTERM)
        results = json.loads(process.stdout.read().splitlines()[-1])
    assert process.returncode == 130
    assert results["one"]["reason"] == "stopped by a signal"
    assert results["two"] == {"status": "skipped", "reason": "stopped before it"}
    with pytest.raises(ProcessLookupError):
        os.kill(results["one"]["pid"], 0)
    assert json.loads((tmp_path / "out.json").read_text()) == results


def test_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = gpu.parse([])
    assert (args.minutes, args.toy, args.data, args.weights, args.out) == (8, False, "sample:cifar10", "", None)
    assert gpu.parse([f"--data=folder:{tmp_path}"]).data == f"folder:{tmp_path}"
    wrong = (
        "--minutes=0",
        "--minutes=nan",
        "--data=folder:missing",
        "--data=cifar10",
        "--weights=missing",
        "--parts=steps,none",
    )
    for argument in (*wrong, "--parts=steps,none", "--out=missing/out.json"):
        with pytest.raises(SystemExit, match="2"):
            gpu.parse([argument])
    assert "there is no part none; there are machine, steps" in capsys.readouterr().err


def test_run_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "child_of_test.py").write_text(
        "import json, sys, time\n"
        "print(json.dumps({'a': 1})); print('noise')\n"
        "if sys.argv[1] == 'skip': print(json.dumps({'skipped': 'no GPU'}))\n"
        "if sys.argv[1] == 'fail': sys.exit('it broke')\n"
        "if sys.argv[1] == 'wait': sys.stdout.flush(); time.sleep(60)\n"
    )
    assert run_child(["child_of_test", "pass"], 20) == {"a": 1}
    with pytest.raises(Skipped, match="no GPU"):
        run_child(["child_of_test", "skip"], 20)
    with pytest.raises(RuntimeError, match="exit code 1: it broke"):
        run_child(["child_of_test", "fail"], 20)
    with pytest.raises(Skipped, match="not done within"):
        run_child(["child_of_test", "wait"], 0.5)


def test_what_is_missing_is_noticed() -> None:
    message = (
        "F1126 23:47:09.887812 1 parse_flags_from_env.cc:234] Unknown flag in XLA_FLAGS: --xla_gpu_x=true\n*** Check"
    )
    assert missing(message) == "unknown flag --xla_gpu_x"
    assert missing("Unknown flags in XLA_FLAGS: --xla_a=1 --xla_b=2") == "unknown flag --xla_a"
    assert missing("PyTorch finds no GPU\n") == "PyTorch finds no GPU"
    assert missing("RESOURCE_EXHAUSTED: out of memory") == ""


def test_kernels_are_classified_by_name() -> None:
    names = {
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64": "convolution",
        "sm90_xmma_wgrad_indexed_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize64x64x64": "convolution",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x64_32x4>": "convolution",
        "_ZN17cutlass__5x_cudnn6KernelINS_4conv6kernel23ImplicitGemmConvolutionINS1_11threadblock22": "convolution",
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bx_coopA_bias_TNT": "product",
        "void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_bf16_64x128_64x4_nt_align8>": "product",
        "input_reduce_select_fusion_2": "norm or sum",
        "input_convert_reduce_fusion": "norm or sum",
        "loop_convert_fusion_4": "elementwise",  # contains "conv"
        "loop_compare_convert_fusion_5": "elementwise",
        "input_convert_transpose_fusion_7": "copy or transpose",
        "memcpy128": "copy or transpose",
        "MemcpyD2D": "copy or transpose",
        "input_concatenate_fusion": "max-pool",
        "void nhwcAddPaddingKernel<__nv_bfloat16, __nv_bfloat16, float, true>": "cuDNN padding or layout",
        "redzone_checker": "other",
    }
    assert {name: kernels.kind(name) for name in names} == names


def line(name: str, *events: tuple[str, float, float]) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        events=[SimpleNamespace(name=e, start_ns=a, end_ns=b, stats=[("hlo_op", f"{e}.1")]) for e, a, b in events],
    )


def test_a_trace_of_a_gpu_counts_its_streams_only() -> None:
    compute = line("Stream #14(Compute)", ("loop_convert_fusion", 0, 4e6), ("nvjet_sm90", 4e6, 6e6))
    copies = line("Stream #15(MemcpyH2D)", ("MemcpyH2D", 5e6, 7e6), ("loop_convert_fusion", 8e6, 10e6))
    planes = [
        SimpleNamespace(name="/host:CPU", lines=[line("python", ("convolution.3", 0, 9e9))]),
        SimpleNamespace(name="/device:GPU:1", lines=[line("Stream #1", ("other", 0, 9e9))]),
        SimpleNamespace(name="/device:GPU:0", lines=[compute, copies, line("XLA Modules", ("jit_f", 0, 9e9))]),
    ]
    found = kernels.figures(
        list(kernels.device_kernels(SimpleNamespace(planes=planes))), 2, {"nvjet_sm90.1": "layer1/0/conv1"}
    )
    assert (found["span_ms"], found["busy_ms"], found["kernels"]) == (5, 4.5, 2)
    assert found["idle_share"] == pytest.approx(0.1)
    assert found["ms_by_class"] == {"elementwise": 3, "product": 1, "copy or transpose": 1}
    assert found["most"][0] == {"kernel": "loop_convert_fusion", "class": "elementwise", "launches": 1, "ms": 3}
    assert {each["kernel"]: each.get("from") for each in found["most"]}["nvjet_sm90"] == "layer1/0/conv1"


def test_a_trace_of_a_cpu_counts_operations() -> None:
    other = SimpleNamespace(name="StartRegion", start_ns=0, end_ns=1, stats=[("_ct", 1)])
    host = SimpleNamespace(name="pool", events=[*line("pool", ("dot", 0, 1)).events, other])
    profile = SimpleNamespace(planes=[SimpleNamespace(name="/host:CPU", lines=[host])])
    assert [kernel.name for kernel in kernels.device_kernels(profile)] == ["dot"]


def test_sources_of_operations() -> None:
    path = "jit(f)/transpose(jvp(ResNet))/ResNet._features/layer1/0/bn1/sub"
    hlo = f'  ROOT %add.3 = f32[8]{{0}} fusion(%a), metadata={{op_name="{path}"}}'
    assert kernels.sources(hlo) == {"add.3": "backward layer1/0/bn1/sub"}


def test_variants_that_helped_are_combined() -> None:
    table = {
        "baseline_recompiled": Variant(),
        "a": Variant("--xla_a=true"),
        "b": Variant("--xla_b=true", formulation="stem_channels_8"),
        "c": Variant(formulation="pool_elementwise"),
        "wrong": Variant("--xla_wrong=true"),
        "remat": Variant(overrides={"model.remat": True}),
    }
    ratios = {"baseline_recompiled": 1.01, "a": 1.02, "b": 1.05, "c": 1.008, "wrong": 2.0, "remat": 1.5}
    results: dict[str, Any] = {
        name: {"status": "ok", "ratio": ratio, "same_loss": name != "wrong"} for name, ratio in ratios.items()
    }
    del results["remat"]["same_loss"]
    assert variants.helpful(results, table) == ["b", "a"]  # c's gain is within the noise
    both = variants.combined([table["b"], table["c"], table["a"]])
    assert both == Variant("--xla_b=true --xla_a=true", {}, "stem_channels_8+pool_elementwise")
    assert variants.is_exact(both) and not variants.is_exact(table["remat"])
    stems = {name: Variant(formulation=name) for name in ("stem_blocks_16", "plain", "stem_channels_8")}
    assert variants.compatible(["b", "stem_blocks_16", "plain", "c"], table | stems) == ["b", "c"]
    assert variants.compatible(["plain", "b", "a"], table | stems) == ["plain", "a"]
    baseline = {"first_loss": 2.4, "checked_loss": 0.5}
    assert variants.is_same({"first_loss": 2.41, "checked_loss": 0.6}, baseline)
    assert not variants.is_same({"first_loss": 2.5, "checked_loss": 0.5}, baseline)
    assert not variants.is_same({"first_loss": float("nan"), "checked_loss": 0.5}, baseline)


def test_ratios_to_the_best_pytorch() -> None:
    figures = {
        "jaxft": {"images_per_second": 600.0},
        "torch eager": {"images_per_second": 400.0},
        "torch compile": {"images_per_second": 500.0},
    }
    result = steps.compared(figures)
    assert (result["best_torch"], result["ratio"]) == ("torch compile", 1.2)
    assert steps.compared({"jaxft": {"images_per_second": 600.0}}) == {}


class FakeChild:
    """A contender without a process: ready as soon as it may be, or never."""

    alive: ClassVar[list["FakeChild"]] = []

    def __init__(self, kind: str, task: Task, env: Mapping[str, str]) -> None:
        self.kind, self.task, self.flags, self.paused = kind, task, env.get("XLA_FLAGS", ""), False
        self.answers: list[dict[str, Any]] = [{"phase": "built"}]
        self.ready = False
        self.alive.append(self)

    def has_answer(self) -> bool:
        return bool(self.answers)

    def read(self, seconds: float) -> dict[str, Any]:
        if "all_fusions" in self.flags:
            raise RuntimeError("exit code -6: aborted")
        return self.answers.pop(0)

    def all_errors(self) -> str:
        return f"Unknown flag in XLA_FLAGS: {self.flags}"

    def send(self, line: str = "") -> None:
        if self.ready:
            compiling = [each for each in self.alive if not each.ready]
            assert all(each.paused for each in compiling)
            rate = 5000 * (1.1 if "conv_fusion" in self.flags else 1) * (1.05 if self.task.formulation else 1)
            self.answers.append({"seconds": self.task.batch / rate, "cpu_seconds": 1.0, "peak_memory": 2**30})
        elif "compile-graphs" not in self.kind or self.task.batch != 256:
            self.ready = True
            self.answers.append(
                {
                    "first_step_seconds": 16.0,
                    "first_loss": 2.3,
                    "checked_loss": 1.0,
                    "predicted_memory": 2**30 if self.kind.startswith("jaxft") else None,
                }
            )

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def kill(self) -> None:
        self.alive.remove(self)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> Settings:
    """Settings for an H100 on which all contenders are fakes."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(contenders, "start", FakeChild)
    monkeypatch.setattr(contenders, "gpu_memory", lambda: 80e9)
    monkeypatch.setattr(contenders, "CHECK", 0)
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(steps, "COMPILE_LIMIT", 0.1)
    for module in (steps, variants):
        monkeypatch.setattr(module, "MEASURE", 0.1)
    return dataclasses.replace(settings, toy=False, gpu=True)


def test_cases_on_a_gpu_are_measured_in_order(on_gpu: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu.results.update(steps.steps(on_gpu, 20))
    lines = capsys.readouterr().out.splitlines()
    first = "steps: train 256 bfloat16: jaxft 5000 images/s (5000 to 5000), 1.0 (predicted 1.0) GiB, first step 16 s"
    assert any(line.startswith(first) for line in lines)
    labels = [case.label for case in steps.CASES]
    measured = [label for label in labels if on_gpu.results[label].get("ratio")]
    assert measured == labels
    train = on_gpu.results["train 256 bfloat16"]
    assert train["best_torch"] in ("torch compile", "torch eager") and train["ratio"] == 1
    assert train["not_measured"] == {"torch compile-graphs": "not compiled after 0 s"}
    assert not FakeChild.alive


def test_families_on_a_gpu(on_gpu: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu.results.update(families.families(on_gpu, 20))
    assert [*on_gpu.results] == [case.label for case in families.CASES]
    assert all(result["ratio"] == 1 for result in on_gpu.results.values())
    assert capsys.readouterr().out.startswith("families: vit_small_patch16_224 train 256 bfloat16: jaxft 5000 images/s")
    assert {is_timms(case.arch) for case in families.CASES} == {True, False}
    assert not FakeChild.alive


def test_variants_on_a_gpu(on_gpu: Settings) -> None:
    on_gpu.results.update(variants.variants(on_gpu, 20))
    results = on_gpu.results
    assert results["all_fusions_with_triton"]["reason"] == "unknown flag --xla_gpu_experimental_all_fusions_with_triton"
    assert results["conv_fusion"]["ratio"] == pytest.approx(1.1)
    assert results["batch_512"]["status"] == results["float32"]["status"] == "ok"
    assert results["helped"][0] == "conv_fusion" and len(results["helped"]) > 1
    name = "+".join(variants.compatible(results["helped"], variants.chosen(False)))
    assert results[f"{name}, compiled undisturbed"]["ratio"] == results[f"{name} at 64"]["ratio"] > 1.15
    assert {*variants.chosen(False)} < {*results}
    assert not FakeChild.alive


@pytest.mark.slow
def test_toy(tmp_path: Path) -> None:
    """Runs every part to its end."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", f"--out={out}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600)
    results = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == results
    assert [*results] == [*gpu.PARTS]
    unexpected = {
        name: result.get("reason")
        for name, result in results.items()
        if result["status"] != "ok" and not (result["status"] == "skipped" and "GPU" in result["reason"])
    }
    assert not unexpected and done.returncode == 0
    assert results["variants"]["unknown"]["reason"].startswith("unknown flag")
