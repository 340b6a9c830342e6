"""Tests how a formulation is chosen, and what oneDNN asks of the process."""

import math

import jax
import pytest

from jaxft.config import default_config
from jaxft.models.build import make_model
from jaxft.models.resnet import ARCHITECTURES
from jaxft.ops import onednn
from jaxft.ops.formulation import Formulation, default_formulation
from jaxft.process import disable_compilation_cache
from jaxft.training.evaluation import choose_formulation


@pytest.mark.parametrize(
    ("backend", "formulation"), [("cpu", "cpu"), ("gpu", "gpu"), ("tpu", "tpu"), ("metal", "plain")]
)
def test_a_model_is_made_in_its_platforms_formulation(
    backend: str, formulation: Formulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert default_formulation() == formulation
    assert make_model(default_config().model, 10).formulation == formulation
    assert make_model(default_config().model, 10, "tpu").formulation == "tpu"


@pytest.mark.parametrize(
    ("formulation", "train_size", "chosen"),
    [("cpu", 100, "cpu"), ("cpu", 100_000, "cpu-onednn"), ("gpu", 100_000, "gpu"), ("plain", 100_000, "plain")],
)
def test_only_long_runs_on_a_cpu_use_onednn(
    formulation: Formulation, train_size: int, chosen: Formulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "self_test", lambda: True)
    model = ARCHITECTURES["resnet18"](num_classes=10, formulation=formulation)
    config = default_config()
    config.image_size = 32
    assert choose_formulation(model, config, train_size) == chosen


def test_the_compilation_cache_can_be_disabled() -> None:
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    try:
        disable_compilation_cache()
        assert getattr(jax.config, name) == math.inf
    finally:
        jax.config.update(name, before)
