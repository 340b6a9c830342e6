"""Compares with torchvision's ResNets, with random weights and random running statistics."""

import math
import re
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models.layers import BatchNorm
from jaxft.models.network import abstract_variables
from jaxft.models.policy import Policy, eval_features, eval_logits
from jaxft.models.resnet import ARCHITECTURES, BasicBlock, ResNet
from jaxft.ops.formulation import Formulation
from jaxft.pretrained.convert import torch_shapes
from tests.helpers.formulations import onednn_in_double_precision
from tests.helpers.reference import torch, torchvision
from tests.helpers.ten_steps import relative
from tests.helpers.torch_models import flax_model, images, nchw, random_torch_model, to_flax

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0, impl="rbg")  # compiles much sooner than JAX's default generator
TORCHVISIONS = [arch for arch in ARCHITECTURES if hasattr(torchvision.models, arch)]  # others: test_resnet_variants.py
STAGES = ("conv1", "layer1", "layer2", "layer3", "layer4", "fc")


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("arch", TORCHVISIONS)
def test_parameters_are_torchvisions(arch: str) -> None:
    with torch.device("meta"):  # shapes only
        state = getattr(torchvision.models, arch)().state_dict()
    expected = {key: tuple(value.shape) for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert torch_shapes(ARCHITECTURES[arch](num_classes=1000)) == expected


SIZES = [(224, 224), (64, 64), (97, 97), (160, 224)]


@pytest.mark.parametrize(
    ("arch", "height", "width"),
    [
        ("bottleneck", 160, 224),
        ("resnext50_32x4d", 97, 97),
        *(pytest.param(arch, *size, marks=pytest.mark.slow) for arch in TORCHVISIONS for size in SIZES),
    ],
)
def test_logits_and_every_stage_are_torchvisions(arch: str, height: int, width: int) -> None:
    reference = random_torch_model(arch).eval()
    expected: dict[str, np.ndarray] = {}
    for name in STAGES:
        module = "relu" if name == "conv1" else name  # conv1 has its norm and its ReLU inside
        getattr(reference, module).register_forward_hook(
            lambda _module, _inputs, output, name=name: expected.update({name: output.numpy().copy()})
        )
    x = images(height, width, count=1)
    with torch.no_grad():
        reference(nchw(x))
    tolerances = {jnp.float64: 1e-11, jnp.float32: 1e-5}
    if (arch, height) == ("resnext50_32x4d", 97):
        del tolerances[jnp.float32]  # which saves the default tests a compilation
    for dtype, tolerance in tolerances.items():
        model = flax_model(arch, dtype=dtype, formulation="cpu")
        variables = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), to_flax(reference.state_dict(), model))
        apply = partial(
            model.apply,
            train=False,
            capture_intermediates=lambda module, _: module.name in STAGES,
            mutable=["intermediates"],
        )
        _, captured = jax.jit(apply)(variables, x.astype(dtype))
        for name in STAGES:
            ours = captured["intermediates"][name]["__call__"][0]
            want = expected[name].transpose(0, 2, 3, 1) if name != "fc" else expected[name]
            assert np.abs(ours - want).max() <= tolerance * np.abs(want).max(), (name, dtype)


@pytest.mark.parametrize(
    ("arch", "train", "formulation"),
    [
        ("bottleneck", True, "cpu"),
        pytest.param("basic", True, "plain", marks=pytest.mark.slow),
        ("basic", False, "cpu-onednn"),
        ("basic", True, "tpu"),
        *(pytest.param(arch, train, "cpu", marks=pytest.mark.slow) for arch in TORCHVISIONS for train in (True, False)),
        *(
            pytest.param(arch, train, formulation, marks=pytest.mark.slow)
            for arch, train in (("resnet18", True), ("resnet18", False), ("resnet50", True))
            for formulation in ("plain", "cpu-onednn", "gpu", "tpu")
        ),
    ],
)
def test_gradients_and_running_statistics_are_torchs(arch: str, train: bool, formulation: Formulation) -> None:
    """Gradients of the input and of all parameters, in training and in evaluation mode, in float64."""
    reference = random_torch_model(arch).train(train)
    model = flax_model(arch, dtype=jnp.float64, formulation=formulation)
    variables = to_flax(reference.state_dict(), model)
    x, label = images(64, 64, count=3), np.array([1, 7, 3])

    image = nchw(x).requires_grad_()
    torch.nn.functional.cross_entropy(reference(image), torch.from_numpy(label)).backward()
    gradient = image.grad
    assert gradient is not None
    gradients: dict[str, Any] = {key: parameter.grad for key, parameter in reference.named_parameters()}
    expected = to_flax(reference.state_dict() | gradients, model)

    def loss(params: Any, x: jax.Array) -> Any:
        variables_ = {"params": params, "batch_stats": variables["batch_stats"]}
        logits, updates = model.apply(variables_, x, train=train, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[jnp.arange(3), label].mean(), updates["batch_stats"]

    with onednn_in_double_precision() if formulation == "cpu-onednn" else nullcontext():
        gradients_of = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        (grads, image_grad), new_statistics = gradients_of(variables["params"], x)
    for (path, ours), want in zip(
        jax.tree.leaves_with_path({"params": grads, "batch_stats": new_statistics}),
        jax.tree.leaves({"params": expected["params"], "batch_stats": expected["batch_stats"]}),
        strict=True,
    ):
        assert relative(ours, want) <= 1e-9, jax.tree_util.keystr(path)
    assert relative(image_grad, gradient.numpy().transpose(0, 2, 3, 1)) <= 1e-9


@pytest.mark.parametrize("formulation", ["plain", "cpu", "gpu"])
@pytest.mark.parametrize("mask", [(1, 1, 1, 1, 1), (1, 1, 1, 0, 0), (1, 0, 0, 0, 0)])
def test_batch_norm_leaves_padding_out(mask: tuple[int, ...], formulation: Formulation) -> None:
    x = images(3, 4, count=5) * 2 + 1
    reference = torch.nn.BatchNorm2d(3).double().train()
    kept = np.flatnonzero(mask)
    expected = reference(nchw(x[kept])).detach().numpy().transpose(0, 2, 3, 1)
    statistics: dict[str, Any] = reference.state_dict()
    norm = BatchNorm(3, dtype=jnp.float64, formulation=formulation)
    variables = norm.init(jax.random.key(0), x, None)
    y, updates = norm.apply(variables, x, jnp.array(mask), mutable=["batch_stats"])
    np.testing.assert_allclose(np.asarray(y)[kept], expected, atol=1e-12)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], statistics["running_mean"], atol=1e-12)
    np.testing.assert_allclose(updates["batch_stats"]["var"], statistics["running_var"], atol=1e-12)


@pytest.mark.parametrize("formulation", ["plain", "cpu"])
def test_batch_norm_is_accurate_for_a_large_mean(formulation: Formulation) -> None:
    """In float32, in which E[x^2] - E[x]^2 would lose every digit: mean 10,000, deviation 1."""
    x = (images(32, 32, count=8) + 10_000).astype(np.float32)
    exact = x.astype(np.float64)
    expected = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + 1e-5)
    norm = BatchNorm(3, formulation=formulation)
    variables = jax.tree.map(lambda a: a.astype(jnp.float32), norm.init(jax.random.key(0), x, None))
    y, _ = norm.apply(variables, x, None, mutable=["batch_stats"])
    assert np.abs(y - expected).max() < 5e-3


@pytest.mark.parametrize("formulation", ["gpu", "tpu"])
def test_batch_norm_in_one_pass_is_accurate_if_the_running_mean_is_close(formulation: Formulation) -> None:
    """In float32, with a running mean that is one deviation off: mean 10,000, deviation 1."""
    x = (images(32, 32, count=8) + 10_000).astype(np.float32)
    exact = x.astype(np.float64)
    expected = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + 1e-5)
    norm = BatchNorm(3, formulation=formulation)
    variables = jax.tree.map(lambda a: a.astype(jnp.float32), norm.init(jax.random.key(0), x, None))
    variables["batch_stats"]["mean"] += 10_001
    y, _ = norm.apply(variables, x, None, mutable=["batch_stats"])
    assert np.abs(y - expected).max() < 5e-3


def test_frozen_batch_norm_uses_and_keeps_its_running_statistics() -> None:
    reference = random_torch_model("resnet18").eval()
    model = ARCHITECTURES["resnet18"](num_classes=10, dtype=jnp.float64, formulation="cpu")
    variables = to_flax(reference.state_dict(), model)
    x = images(64, 64)
    apply = partial(model.apply, train=True, policy=Policy(batch_norm="frozen"), mutable=["batch_stats"])
    logits, updates = jax.jit(apply)(variables, x)
    np.testing.assert_allclose(logits, reference(nchw(x)).detach().numpy(), rtol=1e-10)
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])


def test_bfloat16_keeps_parameters_and_logits_in_float32() -> None:
    model = ResNet(BasicBlock, (1, 1), num_classes=10, width=16, formulation="cpu")
    x = images(64, 64).astype(np.float32)
    variables = jax.jit(partial(model.init, train=False))(KEY, x)
    full: Any = jax.jit(partial(model.apply, train=False))(variables, x)
    half: Any = jax.jit(partial(model.clone(dtype=jnp.bfloat16).apply, train=False))(variables, x)
    assert half.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert 0 < np.abs(half - full).max() < 0.05 * np.abs(full).max()


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_all_products_have_the_precision_asked_for(precision: str) -> None:
    """Checks a TPU's program, including its gradients."""
    model = ResNet(BasicBlock, (1, 1), num_classes=10, width=8, precision=precision, formulation="tpu")
    variables = abstract_variables(model)

    def gradients(variables: Any, x: jax.Array) -> Any:
        def loss(variables: Any) -> jax.Array:
            return model.apply(variables, x, train=True, mutable=["batch_stats"])[0].sum()

        return jax.grad(loss)(variables)

    traced = jax.jit(gradients).trace(variables, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32))
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    products = re.findall(r"stablehlo\.(?:convolution|dot_general).*", program)
    assert len(products) >= 3 * 6  # the stem, three blocks' and the head; forward, and to inputs and kernels
    for product in products:
        assert re.findall(r"\b(?:DEFAULT|HIGH|HIGHEST)\b", product) == [precision.upper()] * 2


def test_random_initialisation_is_torchvisions() -> None:
    """Each layer has the same deviation and range, as far as a sample shows."""
    torch.manual_seed(0)
    reference = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=1000)
    expected = to_flax(reference.state_dict(), model)["params"]
    ours = jax.jit(lambda: model.init(KEY, jnp.zeros((1, 32, 32, 3)), train=False))()["params"]
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        assert abs(float(a.std()) - float(b.std())) <= 0.05 * float(b.std()), jax.tree_util.keystr(path)
        assert abs(float(abs(a).max()) - float(abs(b).max())) <= 0.35 * float(abs(b).max())


def test_rematerialisation_keeps_less_and_gives_the_same() -> None:
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)
    kept, grads = [], []
    for remat in (False, True):
        model = ResNet(BasicBlock, (2,), num_classes=10, width=4, stem="small", remat=remat, formulation="cpu")
        variables = random_variables(model)

        def loss(params: Any, model: ResNet = model, variables: Any = variables) -> Any:
            variables = variables | {"params": params}
            logits: Any = model.apply(variables, images, train=True, mutable=["batch_stats"])[0]
            return logits.var()

        residuals = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], variables["params"])
        kept.append(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(residuals)))
        grads.append(jax.jit(jax.grad(loss))(variables["params"]))
    assert kept[1] < 0.5 * kept[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *grads)


def random_variables(model: ResNet) -> Any:
    return jax.jit(partial(model.init, train=False))(KEY, jnp.zeros((1, 32, 32, 3)))


def test_test_flip_averages_the_logits_of_both_mirror_images() -> None:
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32, 32, 3)), jnp.float32)
    model = ResNet(BasicBlock, (1,), num_classes=10, width=8, formulation="cpu")
    variables = random_variables(model)

    def logits(images: jax.Array, policy: Policy) -> Any:
        return jax.jit(partial(eval_logits, model, policy=policy))(variables, images)

    one, other = (logits(batch, Policy()) for batch in (images, images[:, :, ::-1]))
    assert np.abs(one - other).max() > 1e-3
    flip = Policy(test_flip=True)
    np.testing.assert_allclose(logits(images, flip), (one + other) / 2, rtol=1e-5, atol=1e-6)
    features = jax.jit(partial(eval_features, model, policy=flip))(variables, images)
    np.testing.assert_allclose(logits(features, flip), (one + other) / 2, rtol=1e-5, atol=1e-6)
