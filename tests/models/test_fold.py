"""Compares folded BatchNorm with torch's own folding and with torchvision's networks."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxft.models.fold import fold_norms
from jaxft.ops.formulation import Formulation
from tests.helpers.formulations import onednn_in_double_precision
from tests.helpers.reference import torch
from tests.helpers.torch_models import flax_model, images, nchw, random_torch_model, to_flax


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    with jax.enable_x64(True):
        yield


def test_kernels_and_biases_are_torchs() -> None:
    reference = random_torch_model("resnet50").eval()
    model, folded = fold_norms(*with_variables("resnet50", reference))
    params = flatten_dict(folded["params"], sep=".")
    pairs = {"0": "1"} | {f"conv{i}": f"bn{i}" for i in (1, 2, 3)}
    modules = dict(reference.named_modules())
    for name, conv in modules.items():
        if not isinstance(conv, torch.nn.Conv2d):
            continue
        block, _, last = name.rpartition(".")
        norm = modules[f"{block}.{pairs[last]}".lstrip(".")]
        assert isinstance(norm, torch.nn.BatchNorm2d) and norm.running_mean is not None
        fused = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
        assert fused.bias is not None
        kernel = fused.weight.detach().numpy().transpose(2, 3, 1, 0)
        np.testing.assert_allclose(params.pop(f"{name}.kernel"), kernel, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(params.pop(f"{name}.bias"), fused.bias.detach().numpy(), rtol=1e-12, atol=1e-14)
    assert sorted(params) == ["fc.bias", "fc.kernel"]
    assert fold_norms(model, folded) == (model, folded)


def with_variables(arch: str, reference: torch.nn.Module, **options: Any) -> tuple[Any, Any]:
    model = flax_model(arch, dtype=jnp.float64, **options)
    return model, to_flax(reference.state_dict(), model)


@pytest.mark.parametrize("formulation", ["plain", "cpu", "cpu-onednn", "gpu"])
@pytest.mark.parametrize(
    "arch",
    [
        "basic",
        "bottleneck",
        *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("resnet18", "resnet50", "resnext50_32x4d")),
    ],
)
def test_logits_are_torchvisions(arch: str, formulation: Formulation) -> None:
    reference = random_torch_model(arch).eval()
    x = images(64, 64)
    model, variables = fold_norms(*with_variables(arch, reference, formulation=formulation))
    with onednn_in_double_precision() if formulation == "cpu-onednn" else nullcontext():
        logits = jax.jit(partial(model.apply, train=False))(variables, x)
    np.testing.assert_allclose(logits, reference(nchw(x)).detach().numpy(), rtol=1e-10, atol=1e-11)
