"""Against torch.optim."""

from importlib import import_module
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from jaxft.config import default_config
from jaxft.models.build import ARCHITECTURES
from jaxft.models.network import abstract_variables
from jaxft.models.resnet import ResNet
from jaxft.training.optimizer import is_decayed, learning_rate_factor, learning_rate_schedule, make_optimizer
from tests.helpers.reference import torch


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_sgd_is_torchs(momentum: float, nesterov: bool, weight_decay: float) -> None:
    if nesterov and not momentum:
        momentum = 0.5  # torch knows no Nesterov without momentum
    config = default_config().optimizer
    config.update(learning_rate=0.1, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=5), rng.normal(size=(10, 5))

    reference = torch.nn.Parameter(torch.from_numpy(start.copy()))
    sgd = torch.optim.SGD([reference], lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    with jax.enable_x64(True):
        tx = make_optimizer(config, steps_per_epoch=10, num_epochs=1, parts=ResNet.parts)
        params = jax.numpy.asarray(start)
        opt_state = tx.init(params)
        for gradient in gradients:
            reference.grad = torch.from_numpy(gradient)
            sgd.step()
            updates, opt_state = tx.update(jax.numpy.asarray(gradient), opt_state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, reference.detach().numpy(), rtol=1e-6)  # the rate itself is float32


def test_cosine_is_torchs() -> None:
    config = default_config().optimizer
    config.update(learning_rate=0.3, schedule="cosine")
    schedule = learning_rate_schedule(config, steps_per_epoch=7, num_epochs=3)
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=0.3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=21)
    for step in range(21):
        assert float(schedule(step)) == pytest.approx(sgd.param_groups[0]["lr"], abs=1e-7)
        sgd.step()
        cosine.step()


def test_warm_up_grows_evenly_to_the_full_rate_and_the_schedule_ends_at_zero() -> None:
    config = default_config().optimizer
    config.update(learning_rate=0.4, schedule="cosine", warmup_epochs=1.0)
    schedule = learning_rate_schedule(config, steps_per_epoch=4, num_epochs=3)
    np.testing.assert_allclose([schedule(step) for step in range(5)], [0, 0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    assert float(schedule(12)) == pytest.approx(0, abs=1e-8)


def updates_of(config: Any, gradients: np.ndarray, start: np.ndarray, steps_per_epoch: int = 100) -> np.ndarray:
    with jax.enable_x64(True):
        tx = make_optimizer(config, steps_per_epoch, num_epochs=1, parts=ResNet.parts)
        params = {"fc": {"kernel": jax.numpy.asarray(start)}}
        opt_state = tx.init(params)
        for gradient in gradients:
            updates, opt_state = tx.update({"fc": {"kernel": jax.numpy.asarray(gradient)}}, opt_state, params)
            params = optax.apply_updates(params, updates)
        return np.asarray(params["fc"]["kernel"])


def test_adamw_is_torchs() -> None:
    config = default_config().optimizer
    config.update(name="adamw", learning_rate=2**-7, weight_decay=0.1)
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(4, 3)), rng.normal(size=(10, 4, 3))
    reference = torch.nn.Parameter(torch.from_numpy(start.copy()))
    adamw = torch.optim.AdamW([reference], lr=2**-7, weight_decay=0.1)
    for gradient in gradients:
        reference.grad = torch.from_numpy(gradient)
        adamw.step()
    np.testing.assert_allclose(updates_of(config, gradients, start), reference.detach().numpy(), rtol=1e-6)


def test_clipping_is_torchs() -> None:
    config = default_config().optimizer
    config.update(learning_rate=1.0, momentum=0.0, clip_norm=0.5)
    gradient = np.random.default_rng(0).normal(size=(4, 3))
    reference = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    reference.grad = torch.from_numpy(gradient.copy())
    torch.nn.utils.clip_grad_norm_([reference], 0.5)
    np.testing.assert_allclose(-updates_of(config, gradient[None], np.zeros((4, 3))), reference.grad, rtol=1e-5)


def test_accumulated_gradients_are_those_of_the_larger_batch() -> None:
    config = default_config().optimizer
    config.update(learning_rate=0.1, weight_decay=1e-2)
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(4, 3)), rng.normal(size=(12, 4, 3))
    whole = updates_of(config, gradients.reshape(4, 3, 4, 3).mean(1), start)
    config.accumulate_steps = 3
    np.testing.assert_allclose(updates_of(config, gradients, start), whole, rtol=1e-6)
    half_way = updates_of(config, gradients[:2], start)
    np.testing.assert_array_equal(half_way, start)


def test_the_decay_leaves_biases_and_norms_alone_on_request() -> None:
    config = default_config().optimizer
    config.update(weight_decay=0.1, decay_all=False)
    tx = make_optimizer(config, 10, 1, ResNet.parts)
    params = {"conv1": {"kernel": jax.numpy.ones((1, 1, 1, 2))}, "bn1": {"scale": jax.numpy.ones(2)}}
    updates, _ = tx.update(jax.tree.map(jax.numpy.zeros_like, params), tx.init(params), params)
    assert (updates["conv1"]["kernel"] < 0).all()
    assert (updates["bn1"]["scale"] == 0).all()


@pytest.mark.parametrize("name", ["adabelief", "lamb", "lion"])
def test_every_optimizer_goes_downhill(name: str) -> None:
    config = default_config().optimizer
    config.update(name=name, learning_rate=0.05)
    tx = make_optimizer(config, 10, 1, ResNet.parts)
    params = {"fc": {"kernel": jax.numpy.array([[3.0, -2.0]])}}
    opt_state = tx.init(params)
    for _ in range(50):
        updates, opt_state = tx.update(params, opt_state, params)  # the gradient of half the sum of squares
        params = optax.apply_updates(params, updates)
    assert np.abs(params["fc"]["kernel"]).sum() < 3


def test_steps_down_are_torchs() -> None:
    config = default_config().optimizer
    config.update(learning_rate=0.1, schedule="step", step_epochs=2, step_factor=0.3)
    schedule = learning_rate_schedule(config, steps_per_epoch=5, num_epochs=7)
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    torch_schedule = torch.optim.lr_scheduler.StepLR(reference, step_size=2, gamma=0.3)
    for epoch in range(7):
        assert float(schedule(epoch * 5)) == pytest.approx(reference.param_groups[0]["lr"], rel=1e-6)
        assert float(schedule(epoch * 5 + 4)) == pytest.approx(reference.param_groups[0]["lr"], rel=1e-6)
        reference.step()
        torch_schedule.step()


def test_linear_falls_to_zero() -> None:
    config = default_config().optimizer
    config.update(learning_rate=0.1, schedule="linear")
    schedule = learning_rate_schedule(config, steps_per_epoch=5, num_epochs=2)
    np.testing.assert_allclose([schedule(step) for step in (0, 5, 10)], [0.1, 0.05, 0.0], atol=1e-9)


def test_an_unfrozen_part_warms_up_while_the_rest_continues() -> None:
    config = default_config().optimizer
    config.update(learning_rate=1.0, momentum=0.0, freeze="backbone", unfreeze="2: stage4, 3: backbone")
    config.unfreeze_warmup = 0.5
    tx = make_optimizer(config, steps_per_epoch=4, num_epochs=4, parts=ResNet.parts)
    ones = {name: {"kernel": jax.numpy.ones(2)} for name in ("conv1", "layer4", "fc")}
    state, sizes = tx.init(ones), []
    for _ in range(12):
        updates, state = tx.update(ones, state, ones)
        sizes.append([-float(updates[name]["kernel"][0]) for name in ones])
    conv1, layer4, fc = np.transpose(sizes)
    assert fc.tolist() == [1] * 12
    assert layer4[4:].tolist() == [0, 0.5, 1, 1, 1, 1, 1, 1]
    assert conv1[8:].tolist() == [0, 0.5, 1, 1]


def test_the_warm_up_counts_updates_of_several_batches() -> None:
    config = default_config().optimizer
    config.update(learning_rate=1.0, momentum=0.0, freeze="backbone", unfreeze="2: backbone", accumulate_steps=2)
    config.unfreeze_warmup = 1.0
    tx = make_optimizer(config, steps_per_epoch=4, num_epochs=3, parts=ResNet.parts)
    ones = {"conv1": {"kernel": jax.numpy.ones(2)}}
    state, sizes = tx.init(ones), []
    for _ in range(12):
        updates, state = tx.update(ones, state, ones)
        sizes.append(-float(updates["conv1"]["kernel"][0]))
    assert sizes[4:] == [0, 0, 0, 0.5, 0, 1, 0, 1]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_adaptive_clipping_bounds_updates_relative_to_the_weights(scale: float) -> None:
    """A network with its kernels multiplied has gradients divided by the same factor."""
    config = default_config().optimizer
    config.update(learning_rate=1.0, momentum=0.0, adaptive_clip=0.25)
    rng = np.random.default_rng(0)
    kernel = jax.numpy.asarray(scale * rng.normal(size=(3, 3, 8, 4)), "float32")
    params, gradient = ({"conv1": {"kernel": array}} for array in (kernel, 100 * kernel))
    tx = make_optimizer(config, 10, 1, ResNet.parts)
    updates, _ = tx.update(gradient, tx.init(params), params)
    norm, weights = (np.sqrt(np.square(a).sum((0, 1, 2))) for a in (updates["conv1"]["kernel"], kernel))
    np.testing.assert_allclose(norm, 0.25 * weights, rtol=1e-5)


def test_without_the_new_keys_the_optimizer_has_the_same_state() -> None:
    config = default_config().optimizer
    config.update(freeze="backbone", unfreeze="2: backbone", clip_norm=1.0)
    before = make_optimizer(config, 10, 2, ResNet.parts).init({"fc": {"kernel": jax.numpy.ones(2)}})
    config.unfreeze_warmup = 1.0
    after = make_optimizer(config, 10, 2, ResNet.parts).init({"fc": {"kernel": jax.numpy.ones(2)}})
    assert len(jax.tree.leaves(after)) == len(jax.tree.leaves(before)) + 1


def factors_and_decays(arch: str) -> tuple[dict[str, tuple[float, bool]], dict[str, tuple[float, bool]]]:
    """Returns timm's and our factor of the learning rate, and whether weight decay applies, by timm's key."""
    timm = import_module("timm")
    optim = import_module("timm.optim")
    reference = timm.create_model(arch, num_classes=3)
    names = {parameter: name for name, parameter in reference.named_parameters()}
    excluded = reference.no_weight_decay() if hasattr(reference, "no_weight_decay") else ()
    groups = optim.param_groups_layer_decay(reference, 0.1, excluded, layer_decay=0.5)
    theirs = {names[p]: (group["lr_scale"], group["weight_decay"] > 0) for group in groups for p in group["params"]}

    config = default_config().optimizer
    config.layer_decay = 0.5
    model = ARCHITECTURES[arch](num_classes=3)
    ours = {}
    for path, array in flatten_dict(abstract_variables(model)["params"], sep="/").items():
        key = path.replace("/", ".").replace("kernel", "weight").replace("scale", "weight")
        ours[key] = learning_rate_factor(config, path, model.parts), is_decayed(path, array)
    assert ours.keys() == theirs.keys()
    return theirs, ours


@pytest.mark.parametrize("arch", ["test_vit", pytest.param("vit_small_patch14_reg4_dinov2", marks=pytest.mark.slow)])
def test_rates_and_decay_of_a_vit_are_timms(arch: str) -> None:
    theirs, ours = factors_and_decays(arch)
    assert ours == theirs


def test_rates_of_a_convnext_fall_by_stage_and_its_decay_is_timms() -> None:
    """timm multiplies once per block, so that its stem has 0.5**10 here; our last norm is not part of the head."""
    theirs, ours = factors_and_decays("test_convnext")
    assert {key: decays for key, (_, decays) in ours.items()} == {key: decays for key, (_, decays) in theirs.items()}
    factors = {key: factor for key, (factor, _) in ours.items()}
    assert factors["stem.0.weight"] == 0.5**5
    assert {factors[f"stages.{i}.blocks.0.conv_dw.weight"] for i in range(4)} == {0.5**i for i in range(1, 5)}
    assert factors["head.norm.weight"] == 0.5
    assert factors["head.fc.weight"] == 1
    by_theirs = sorted(factors, key=lambda key: (theirs[key][0], factors[key]))
    assert [factors[key] for key in by_theirs] == sorted(factors.values())
