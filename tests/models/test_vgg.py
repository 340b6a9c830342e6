"""Compares with torchvision's VGGs, with random weights and random running statistics."""

from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from jaxft.config import default_config
from jaxft.errors import UserError
from jaxft.models import vgg
from jaxft.models.architectures import VGGS, VGGArchitecture
from jaxft.models.build import make_model
from jaxft.models.fold import fold_norms
from jaxft.models.partition import make_policy, parameter_paths, select, stage_of
from jaxft.ops.formulation import Formulation
from jaxft.ops.pool import adaptive_avg_pool, max_pool_2x2
from jaxft.pretrained.convert import torch_shapes
from jaxft.pretrained.vgg import FAMILY
from tests.helpers.formulations import onednn_in_double_precision
from tests.helpers.reference import torch, torchvision
from tests.helpers.ten_steps import check_equal, relative, ten_steps
from tests.helpers.torch_models import images, nchw, randomize_norms, to_flax

pytestmark = pytest.mark.usefixtures("compile_quickly")
WIDTH = 4
# Networks with two stages, which compile and run in a fraction of a real one's time.
ARCHITECTURES = VGGS | {"plain": VGGArchitecture((1, 2)), "norms": VGGArchitecture((1, 2), batch_norm=True)}


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    with jax.enable_x64(True):
        yield


class NarrowVGG(torchvision.models.VGG):
    """torchvision's VGG for 10 classes with WIDTH channels in the first stage, in float64, without dropout."""

    def __init__(self, arch: str) -> None:
        torch.nn.Module.__init__(self)
        depths, batch_norm = ARCHITECTURES[arch]
        stages = [[*[WIDTH * min(2**i, 8)] * depth, "M"] for i, depth in enumerate(depths)]
        self.features = torchvision.models.vgg.make_layers([*chain.from_iterable(stages)], batch_norm)
        self.avgpool = torch.nn.AdaptiveAvgPool2d((7, 7))
        layers: list[torch.nn.Module] = []
        for inputs in (stages[-1][0] * 49, 64 * WIDTH):
            layers += [torch.nn.Linear(inputs, 64 * WIDTH), torch.nn.ReLU(True), torch.nn.Dropout(0)]
        self.classifier = torch.nn.Sequential(*layers, torch.nn.Linear(64 * WIDTH, 10))
        self.double()


def random_torch_model(arch: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = NarrowVGG(arch)
    randomize_norms(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def flax_model(arch: str, **options: Any) -> vgg.VGG:
    return vgg.VGG(*ARCHITECTURES[arch], num_classes=10, width=WIDTH, **options)


@pytest.mark.parametrize("arch", VGGS)
def test_parameters_are_torchvisions(arch: str) -> None:
    with torch.device("meta"):  # shapes only
        state = getattr(torchvision.models, arch)().state_dict()
    expected = {key: tuple(value.shape) for key, value in state.items() if not key.endswith("num_batches_tracked")}
    model = vgg.ARCHITECTURES[arch](num_classes=1000)
    assert torch_shapes(model) == expected
    assert {stage_of(path, model.parts) for path in parameter_paths(model)} == {*model.parts}


@pytest.mark.parametrize(
    ("arch", "height", "width"),
    [
        ("plain", 33, 33),  # pooled from 4 to 7 pixels
        ("norms", 56, 97),  # from 7 and 12 pixels
        *(pytest.param(arch, *size, marks=pytest.mark.slow) for arch in VGGS for size in ((32, 32), (224, 224))),
    ],
)
def test_logits_and_every_stage_are_torchvisions(arch: str, height: int, width: int) -> None:
    reference = random_torch_model(arch).eval()
    stages, expected = FAMILY.stages(flax_model(arch)), {}
    for module, path in stages.items():
        reference.get_submodule(module).register_forward_hook(
            lambda _module, _inputs, output, path=path: expected.update({path: output.numpy().copy()})
        )
    x = images(height, width, count=1)
    with torch.no_grad():
        reference(nchw(x))
    for dtype, tolerance in ((jnp.float64, 1e-11), (jnp.float32, 1e-5)):
        model = flax_model(arch, dtype=dtype, formulation="cpu")
        variables = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), to_flax(reference.state_dict(), model))
        apply = partial(model.apply, train=False, capture_intermediates=True, mutable=["intermediates"])
        _, captured = jax.jit(apply)(variables, x.astype(dtype))
        outputs = flatten_dict(captured["intermediates"], sep="/")
        for path, want in expected.items():
            ours = outputs[f"{path}/__call__"][0]
            want = want.transpose(0, 2, 3, 1) if want.ndim == 4 else want
            assert np.abs(ours - want).max() <= tolerance * np.abs(want).max(), (path, dtype)


CASES: list[Any] = [("plain", True, "cpu", True), ("norms", True, "gpu", False), ("norms", False, "plain", False)]
SLOW = [
    (arch, train, formulation, False)
    for arch in VGGS
    for train in (True, False)
    for formulation in ("plain", "cpu", "cpu-onednn", "gpu", "tpu")
] + [("vgg11_bn", True, "cpu", True)]


@pytest.mark.parametrize(
    ("arch", "train", "formulation", "remat"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_gradients_and_running_statistics_are_torchs(
    arch: str, train: bool, formulation: Formulation, remat: bool
) -> None:
    """Gradients of the input and of all parameters, in training and in evaluation mode, in float64."""
    reference = random_torch_model(arch).train(train)
    model = flax_model(arch, dtype=jnp.float64, formulation=formulation, remat=remat)
    variables = to_flax(reference.state_dict(), model)
    x, label = images(64, 64, count=3), np.array([1, 7, 3])
    image = nchw(x).requires_grad_()
    torch.nn.functional.cross_entropy(reference(image), torch.from_numpy(label)).backward()
    assert image.grad is not None
    gradients: dict[str, Any] = {key: parameter.grad for key, parameter in reference.named_parameters()}
    expected = to_flax(reference.state_dict() | gradients, model)

    @jax.jit
    def loss(params: Any, x: jax.Array) -> Any:
        logits, updates = model.apply(variables | {"params": params}, x, train=train, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[jnp.arange(3), label].mean(), updates.get("batch_stats", {})

    with onednn_in_double_precision() if formulation == "cpu-onednn" else nullcontext():
        (grads, image_grad), new_statistics = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)
    largest = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(expected["params"]))
    for (path, ours), want in zip(
        jax.tree.leaves_with_path({"params": grads, "batch_stats": new_statistics}),
        jax.tree.leaves({"params": expected["params"], "batch_stats": expected["batch_stats"]}),
        strict=True,
    ):
        # A bias before BatchNorm has no gradient in training: both sides are rounding errors.
        assert relative(ours, want) <= 1e-9 or np.linalg.norm(ours - want) <= 1e-13 * largest, jax.tree_util.keystr(
            path
        )
    assert relative(image_grad, image.grad.numpy().transpose(0, 2, 3, 1)) <= 1e-9


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=pytest.mark.slow) for arch in ("norms", *VGGS)])
def test_ten_sgd_steps_are_torchs(arch: str) -> None:
    """Parameters and running statistics after ten steps with momentum, in float64."""
    reference = random_torch_model(arch).train()
    model = flax_model(arch, dtype=jnp.float64, formulation="cpu")
    variables = to_flax(reference.state_dict(), model)
    sgd = torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9)
    variables = ten_steps(model, variables, optax.sgd(0.01, 0.9), reference, sgd)
    check_equal(variables, to_flax(reference.state_dict(), model))


@pytest.mark.parametrize("arch", ["plain", "norms"])
def test_folded_networks_give_torchvisions_logits(arch: str) -> None:
    reference = random_torch_model(arch).eval()
    model = flax_model(arch, dtype=jnp.float64, formulation="cpu")
    folded, variables = fold_norms(model, to_flax(reference.state_dict(), model))
    assert variables.keys() == {"params"}
    x = images(64, 64)
    logits = jax.jit(partial(folded.apply, train=False))(variables, x)
    np.testing.assert_allclose(logits, reference(nchw(x)).detach().numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("side", [1, 6, 9])
def test_adaptive_pooling_is_torchs(side: int) -> None:
    x = images(side, side + 1)
    expected = torch.nn.AdaptiveAvgPool2d((7, 7))(nchw(x)).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(adaptive_avg_pool(jnp.asarray(x), 7), expected, rtol=1e-12)


def test_max_pooling_is_torchs() -> None:
    x = images(7, 8).round()  # equal pixels leave the gradient to the first
    image = nchw(x).requires_grad_()
    expected = torch.nn.MaxPool2d(2, 2)(image)
    expected.backward(expected)
    assert image.grad is not None
    formulations: tuple[Formulation, ...] = ("plain", "cpu", "gpu")
    for formulation in formulations:
        pooled, pull_back = jax.vjp(partial(max_pool_2x2, formulation=formulation), jnp.asarray(x))
        np.testing.assert_array_equal(pooled, expected.detach().numpy().transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(pull_back(pooled)[0], image.grad.numpy().transpose(0, 2, 3, 1))


def test_parts_options_and_small_images() -> None:
    config = default_config()
    config.model.update(arch="vgg11", width=WIDTH)
    model = make_model(config.model, 10)
    assert model == flax_model("vgg11", formulation=model.formulation)
    paths = parameter_paths(model)
    assert select(paths, "stage4,hidden", model.parts) == {
        f"{layer}/{leaf}"
        for layer in ("features/11", "features/13", "classifier/0", "classifier/3")
        for leaf in ("kernel", "bias")
    }
    config.optimizer.freeze = "backbone"
    assert {*paths} - make_policy(config, model, 1).frozen == {"classifier/6/kernel", "classifier/6/bias"}
    with pytest.raises(UserError, match="at least 32, not 31"):
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 31, 40, 3)))
    config.model.stem = "small"
    with pytest.raises(UserError, match=r"a vgg11 has no model\.stem; leave it at imagenet, not small"):
        make_model(config.model, 10)


@pytest.mark.parametrize("arch", ["vgg11", "vgg16_bn"])
def test_multiply_adds_are_torchvisions(arch: str) -> None:
    operations = getattr(torchvision.models, f"{arch.upper()}_Weights").DEFAULT.meta["_ops"]
    ours = vgg.ARCHITECTURES[arch](num_classes=1000).multiply_adds(224)
    assert ours == pytest.approx(operations * 1e9, rel=0.01)
