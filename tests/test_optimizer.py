"""Against torch.optim."""

import jax
import numpy as np
import optax
import pytest

from jaxft.config import default_config
from jaxft.optimizer import learning_rate_schedule, make_optimizer
from tests.reference import torch


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
        tx = make_optimizer(config, steps_per_epoch=10, num_epochs=1)
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
