"""Dropout and stochastic depth: masks by image, on any devices and in any order, and VGG's own against torch."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.config import default_config
from jaxft.data.batches import Batch, Examples
from jaxft.errors import UserError
from jaxft.models.build import make_model
from jaxft.models.dropout import drop_path, dropout
from jaxft.models.network import is_random
from jaxft.models.partition import make_policy
from jaxft.models.policy import Policy, eval_logits
from jaxft.models.resnet import BasicBlock, ResNet
from jaxft.models.vgg import VGG
from jaxft.training.start import can_cache_features
from jaxft.training.state import create_train_state
from jaxft.training.steps import StepConfig, random_layer_keys, train_step
from jaxft.transforms.preprocessing import Preprocessing
from tests.helpers.devices import replicate_on
from tests.helpers.reference import torch, torchvision
from tests.helpers.runs import same_bits
from tests.helpers.torch_models import flax_model, images, nchw, random_torch_model, to_flax

pytestmark = pytest.mark.usefixtures("compile_quickly")


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_a_fraction_is_zeroed_and_the_rest_scaled(rate: float) -> None:
    """The number of zeros is within five deviations of the binomial distribution's mean, and so is each image's."""
    x = jnp.full((50, 20, 40), 3.0)
    y = np.asarray(jax.jit(partial(dropout, rate=rate, layer=1))(x, keys=keys(50)))
    np.testing.assert_allclose(np.unique(y), [0, 3 / (1 - rate)], rtol=1e-6)
    deviation = np.sqrt(rate * (1 - rate))
    for zeros in (y == 0, (y == 0).reshape(50, -1).T, (y == 0).reshape(50, -1)):
        size = zeros.size if zeros.ndim == 3 else zeros.shape[0]
        fractions = zeros.mean() if zeros.ndim == 3 else zeros.mean(0)
        assert np.all(np.abs(fractions - rate) <= 5 * deviation / np.sqrt(size))


def test_stochastic_depth_drops_whole_branches() -> None:
    x = jax.random.normal(jax.random.key(1), (2000, 2, 3))
    y = np.asarray(drop_path(x, 0.25, keys(2000), 0))
    dropped = (y == 0).all((1, 2))
    np.testing.assert_allclose(y[~dropped], np.asarray(x)[~dropped] / 0.75, rtol=1e-6)
    assert abs(dropped.mean() - 0.25) <= 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_the_expectation_is_the_input_and_layers_differ() -> None:
    x = jnp.arange(1.0, 9.0).reshape(1, 8)
    masked = jax.vmap(lambda key: dropout(x, 0.5, key[None], 0))(keys(4000))
    deviation = np.asarray(x[0])  # of a value that is 0 or twice as large
    assert np.all(np.abs(np.asarray(masked).mean((0, 1)) - np.asarray(x[0])) <= 5 * deviation / np.sqrt(4000))
    wide = jnp.ones((4, 100))
    first, second = (np.asarray(dropout(wide, 0.5, keys(4), layer)) for layer in (0, 1))
    assert 0.3 < (first == second).mean() < 0.7
    assert 0.3 < (first[0] == first[1]).mean() < 0.7


@pytest.mark.parametrize("function", [dropout, drop_path])
def test_nothing_is_dropped_without_keys_or_rate(function: Any) -> None:
    x = jnp.ones((4, 8, 3))
    assert function(x, 0.5, None, 0) is x
    assert function(x, 0.0, keys(4), 0) is x


def batch_of(index: Any, devices: int) -> Batch:
    index = np.asarray(index, np.int32).reshape(devices, -1)
    return Batch(index, np.ones(index.shape, np.float32), index)


def test_masks_belong_to_images_in_any_order_and_change_with_the_step() -> None:
    model = VGG((1,), False, num_classes=3, width=4)
    examples = Examples(np.zeros((8, 4, 4, 3), np.uint8), np.zeros(8, np.int32))
    order = np.random.default_rng(0).permutation(8)
    x = jnp.ones((8, 50))

    def masks(index: Any, step: int, seed: int = 0) -> np.ndarray:
        batch = jax.tree.map(lambda a: a[0], batch_of(index, 1))
        layer_keys = random_layer_keys(model, examples, batch, jnp.int32(step), seed)
        return np.asarray(dropout(x, 0.5, layer_keys, 0))

    plain = masks(np.arange(8), 3)
    np.testing.assert_array_equal(masks(order, 3), plain[order])
    assert (masks(np.arange(8), 4) != plain).any() and (masks(np.arange(8), 3, seed=1) != plain).any()
    assert random_layer_keys(model.clone(dropout=0.0), examples, batch_of(range(8), 1), jnp.int32(0), 0) is None


def test_a_step_is_the_same_on_one_and_on_eight_devices() -> None:
    """Without BatchNorm, whose statistics are those of a device's share; up to the order of sums."""
    model = VGG((1,), False, num_classes=4, width=4)
    tx = optax.sgd(0.1)
    state = jax.jit(partial(create_train_state, model, tx))(jax.random.key(0))
    rng = np.random.default_rng(0)
    examples = Examples(rng.integers(0, 256, (16, 8, 8, 3), np.uint8), rng.integers(0, 4, 16).astype(np.int32))
    config = StepConfig(model, tx, Preprocessing(8, (0.5,) * 3, (0.2,) * 3), Policy())
    results = []
    for devices, rate in ((1, 0.5), (8, 0.5), (1, 0.0)):
        own = config._replace(model=model.clone(dropout=rate))
        step = jax.pmap(partial(train_step, config=own), axis_name="batch", in_axes=(None, None, 0), out_axes=None)
        first = replicate_on(devices, state)
        results.append(step(first, examples, batch_of(range(16), devices))[0].params)
    one, eight, plain = (jax.tree.map(np.asarray, params) for params in results)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), one, eight)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one, plain))) > 1e-3


def test_evaluation_has_no_dropout() -> None:
    model = VGG((1,), False, num_classes=3, width=4)
    x = jnp.ones((2, 8, 8, 3))
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), x)
    expected = model.clone(dropout=0.0).apply(variables, x, train=False)
    np.testing.assert_array_equal(eval_logits(model, variables, x, Policy()), expected)


class MaskedDropout(torch.nn.Module):
    """Multiplies by masks that are set before each forward pass."""

    mask: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask


def test_vggs_dropout_is_torchs_with_the_same_masks() -> None:
    """Logits, gradients and three steps in float64, with torch's masks drawn by our keys."""
    with jax.enable_x64(True):
        hidden, classes, width = 256, 5, 4
        model = VGG((1,), False, num_classes=classes, width=width, dtype=jnp.float64)
        torch.manual_seed(0)
        reference = torchvision.models.VGG(
            torchvision.models.vgg.make_layers([width, "M"]), num_classes=classes, dropout=0.5
        )
        reference.classifier = torch.nn.Sequential(
            torch.nn.Linear(width * 49, hidden),
            torch.nn.ReLU(),
            MaskedDropout(),
            torch.nn.Linear(hidden, hidden),
            torch.nn.ReLU(),
            MaskedDropout(),
            torch.nn.Linear(hidden, classes),
        )
        reference = reference.double().train()
        variables = to_flax(reference.state_dict(), model)
        assert model.dropout == 0.5
        sgd = torch.optim.SGD(reference.parameters(), lr=0.1)
        x, label = images(8, 8, count=3), np.array([1, 0, 3])

        @jax.jit
        def step(variables: Any, keys: jax.Array) -> Any:
            def loss(params: Any) -> Any:
                logits: Any = model.apply({"params": params}, x, train=True, keys=keys)
                return -jax.nn.log_softmax(logits)[jnp.arange(3), label].mean(), logits

            grads, logits = jax.grad(loss, has_aux=True)(variables["params"])
            params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
            return {"params": params}, grads, logits

        for seed in range(3):
            own_keys = keys(3, seed)
            for layer, index in enumerate((2, 5)):
                mask = dropout(jnp.ones((3, hidden)), 0.5, own_keys, layer)
                masked: Any = reference.classifier[index]
                masked.mask = torch.from_numpy(np.array(mask, np.float64))
            sgd.zero_grad()
            logits = reference(nchw(x))
            torch.nn.functional.cross_entropy(logits, torch.from_numpy(label)).backward()
            gradients: Any = {key: parameter.grad for key, parameter in reference.named_parameters()}
            variables, grads, ours = step({"params": variables["params"]}, own_keys)
            np.testing.assert_allclose(ours, logits.detach().numpy(), rtol=1e-10, atol=1e-12)
            jax.tree.map(
                partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-14), grads, to_flax(gradients, model)["params"]
            )
            sgd.step()
        expected = to_flax(reference.state_dict(), model)["params"]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-12), variables["params"], expected)


def test_a_resnets_dropout_is_before_its_head() -> None:
    model = ResNet(BasicBlock, (1,), num_classes=3, width=8, dropout=0.5)
    features = jax.random.normal(jax.random.key(0), (4, 8))
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), jnp.ones((1, 16, 16, 3)))
    ours: Any = model.apply(variables, features, train=True, keys=keys(4))
    head = variables["params"]["fc"]
    expected = dropout(features, 0.5, keys(4), 0) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", ["basic", "vgg"])
def test_named_features_are_torchvisions(arch: str) -> None:
    """Each stage and the head's input; the logits of the features are the network's."""
    with jax.enable_x64(True):
        x = images(64, 64)
        expected: list[np.ndarray] = []
        if arch == "basic":
            reference = random_torch_model(arch).eval()
            model: Any = flax_model(arch, dtype=jnp.float64)
            modules = [f"layer{i}" for i in range(1, 5)] + ["avgpool", "fc"]
        else:
            torch.manual_seed(0)
            reference = torchvision.models.VGG(torchvision.models.vgg.make_layers([4, "M", 8, 8, "M"]), num_classes=5)
            reference.classifier = torch.nn.Sequential(
                *(torch.nn.Linear(8 * 49, 256), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(256, 256)),
                *(torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(256, 5)),
            )
            reference = reference.double().eval()
            model = VGG((1, 2), False, num_classes=5, width=4, dtype=jnp.float64)
            modules = ["features.2", "features.7", "classifier.5", "classifier.6"]
        for name in modules:
            reference.get_submodule(name).register_forward_hook(
                lambda _module, _inputs, output: expected.append(output.numpy().copy())
            )
        with torch.no_grad():
            reference(nchw(x))
        variables = to_flax(reference.state_dict(), model)
        ours: dict[str, Any] = jax.jit(partial(model.apply, train=False, output="features"))(variables, x)
        logits: Any = model.apply(variables, ours["pooled"], train=False)
        names = [f"stage{i}" for i in range(1, len(modules) - 1)]
        assert {*ours} == {*names, "pooled"}
        for array, want in zip([*(ours[name] for name in names), ours["pooled"], logits], expected, strict=True):
            want = want.transpose(0, 2, 3, 1) if array.ndim == 4 else want.reshape(array.shape)
            np.testing.assert_allclose(array, want, rtol=1e-9, atol=1e-11 * np.abs(want).max())


def test_rates_of_the_config() -> None:
    config = default_config()
    config.model.arch = "resnet18"
    assert make_model(config.model, 10).dropout == 0
    config.model.dropout = 0.2
    assert make_model(config.model, 10).dropout == 0.2
    config.model.arch = "vgg11"
    assert make_model(config.model, 10).dropout == 0.2
    config.model.dropout = 0.0
    assert not is_random(make_model(config.model, 10))
    config.model.dropout = -1.0
    assert make_model(config.model, 10).dropout == 0.5
    config.model.drop_path = 0.1
    for arch in ("resnet18", "vgg11"):
        config.model.arch = arch
        with pytest.raises(UserError, match=rf"a {arch} has no model\.drop_path; leave it at 0\.0, not 0\.1"):
            make_model(config.model, 10)


@pytest.mark.parametrize(
    ("arch", "rate", "fit_head", "expected"),
    [
        ("resnet18", 0.0, "no", True),
        ("resnet18", 0.1, "no", False),
        ("resnet18", 0.1, "only", True),  # the fit has no dropout
        ("vgg11", -1.0, "no", False),
        ("vgg11", 0.0, "no", True),
    ],
)
def test_features_are_cached_only_without_random_layers(arch: str, rate: float, fit_head: str, expected: bool) -> None:
    config = default_config()
    config.model.update(arch=arch, dropout=rate, batch_norm="frozen")
    config.optimizer.update(freeze="backbone", fit_head=fit_head)
    model = make_model(config.model, 10)
    assert can_cache_features(config, model, make_policy(config, model, 1)) == expected


def test_the_masks_are_a_function_of_the_key_and_the_layer() -> None:
    """So that a new version of jaxft resumes a run with the same bits."""
    y = np.asarray(dropout(jnp.ones((1, 16)), 0.5, keys(1), 3))[0] > 0
    assert same_bits(y, np.asarray(jax.random.bernoulli(jax.random.fold_in(keys(1)[0], 3), 0.5, (16,))))
