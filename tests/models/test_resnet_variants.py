"""Compares timm's variants of ResNets with timm, with random weights and random running statistics."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.torch

from jaxft.config import default_config
from jaxft.errors import UserError
from jaxft.models import resnet
from jaxft.models.architectures import RESNETS
from jaxft.models.build import make_model
from jaxft.models.fold import fold_norms
from jaxft.models.network import Network
from jaxft.models.partition import parameter_paths, select, stage_of
from jaxft.models.resnet import ARCHITECTURES, BasicBlock, BlockOptions, Bottleneck, ResNet
from jaxft.ops.formulation import Formulation
from jaxft.ops.pool import avg_pool_2x2
from jaxft.pretrained.convert import to_torch, torch_shapes
from jaxft.pretrained.load import read_weights
from jaxft.pretrained.resnet import FAMILY
from tests.helpers.formulations import onednn_in_double_precision
from tests.helpers.reference import torch, torchvision
from tests.helpers.ten_steps import check_equal, relative, ten_steps
from tests.helpers.torch_models import images, nchw, randomize_norms, to_flax

import timm  # isort: skip, after torchvision

pytestmark = pytest.mark.usefixtures("compile_quickly")

# Networks that compile and run in a fraction of a real one's time; timm's have a narrow stem only if it is deep.
WIDTH, DEPTHS = 8, (1, 2)
NARROW: dict[str, tuple[Any, Any, Any, str]] = {  # our block and timm's, our deep stem and timm's
    "basic": (BasicBlock, timm.models.resnet.BasicBlock, "deep", "deep"),
    "bottleneck": (Bottleneck, timm.models.resnet.Bottleneck, "tiered", "deep_tiered"),
}
VARIANTS = [name for name, architecture in RESNETS.items() if architecture.zero_init]


def some_of_the(archs: list[str], *quick: str) -> list[Any]:
    """Returns the architectures as parameters of a test; all but the quick ones are slow."""
    return [arch if arch in quick else pytest.param(arch, marks=pytest.mark.slow) for arch in archs]


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    with jax.enable_x64(True):
        yield


def random_torch_model(arch: str) -> Any:
    torch.manual_seed(0)
    model: Any
    if arch in NARROW:
        _, block, _, stem_type = NARROW[arch]
        model = timm.models.resnet.ResNet(
            block,
            DEPTHS,
            num_classes=10,
            stem_width=WIDTH // 2,
            stem_type=stem_type,
            avg_down=True,
            channels=(WIDTH, 2 * WIDTH),
            block_args={"attn_layer": "se"},
        )
        model.layer3 = model.layer4 = torch.nn.Identity()
    else:
        model = timm.create_model(arch, num_classes=10)
    model = model.double()
    randomize_norms(model)
    return model


def flax_model(arch: str, **options: Any) -> ResNet:
    if arch not in NARROW:
        return ARCHITECTURES[arch](num_classes=10, **options)
    block, _, deep_stem, _ = NARROW[arch]
    block_options = BlockOptions(average_shortcut=True, squeeze_excite=True, zero_init=True)
    return ResNet(
        block, DEPTHS, num_classes=10, width=WIDTH, deep_stem=deep_stem, block_options=block_options, **options
    )


@pytest.mark.parametrize("arch", some_of_the(VARIANTS, "resnet26t", "resnet50s", "seresnext26d_32x4d"))
def test_parameters_are_timms(arch: str) -> None:
    with torch.device("meta"):  # shapes only
        state = timm.create_model(arch).state_dict()
    expected = {key: tuple(value.shape) for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert not hasattr(torchvision.models, arch)
    assert torch_shapes(ARCHITECTURES[arch](num_classes=1000)) == expected


@pytest.mark.parametrize(
    ("arch", "height", "width"),
    [
        ("basic", 32, 32),
        ("bottleneck", 34, 50),  # an average-pool of 9 x 13 pixels
        *(pytest.param(arch, *size, marks=pytest.mark.slow) for arch in VARIANTS for size in ((64, 64), (97, 160))),
    ],
)
def test_logits_and_every_stage_are_timms(arch: str, height: int, width: int) -> None:
    reference = random_torch_model(arch).eval()
    x = images(height, width, count=1)
    with torch.no_grad():
        _, *stages = reference.forward_intermediates(nchw(x), intermediates_only=True)
        stages = stages[: len(flax_model(arch).stage_depths)]
        pooled = reference.forward_head(stages[-1], pre_logits=True)
        expected = {f"stage{i}": stage.numpy().transpose(0, 2, 3, 1) for i, stage in enumerate(stages, 1)}
        expected |= {"pooled": pooled.numpy(), "logits": reference(nchw(x)).numpy()}
    tolerances = {jnp.float64: 1e-11, jnp.float32: 1e-5}
    if arch == "bottleneck":
        del tolerances[jnp.float32]  # which saves the default tests a compilation
    for dtype, tolerance in tolerances.items():
        model = flax_model(arch, dtype=dtype, formulation="cpu")
        variables = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), to_flax(reference.state_dict(), model))

        def outputs(variables: Any, x: jax.Array, model: ResNet = model) -> Any:
            features: Any = model.apply(variables, x, train=False, output="features")
            return features | {"logits": model.apply(variables, features["pooled"], train=False)}

        ours = jax.jit(outputs)(variables, x.astype(dtype))
        assert ours.keys() == expected.keys()
        for name, want in expected.items():
            assert np.abs(ours[name] - want).max() <= tolerance * np.abs(want).max(), (name, dtype)


CASES: list[Any] = [("basic", True, "cpu", True), ("bottleneck", False, "gpu", False)]
SLOW = [(arch, train, "cpu", False) for arch in VARIANTS for train in (True, False)] + [
    (arch, train, formulation, False)
    for arch in NARROW
    for train in (True, False)
    for formulation in ("plain", "cpu", "cpu-onednn", "gpu", "tpu")
]


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
    side = 32 if arch in NARROW else 64
    x, label = images(side, side, count=3), np.array([1, 7, 3])
    image = nchw(x).requires_grad_()
    torch.nn.functional.cross_entropy(reference(image), torch.from_numpy(label)).backward()
    assert image.grad is not None
    gradients: dict[str, Any] = {key: parameter.grad for key, parameter in reference.named_parameters()}
    expected = to_flax(reference.state_dict() | gradients, model)

    def loss(params: Any, x: jax.Array) -> Any:
        logits, updates = model.apply(variables | {"params": params}, x, train=train, mutable=["batch_stats"])
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
    assert relative(image_grad, image.grad.numpy().transpose(0, 2, 3, 1)) <= 1e-9


@pytest.mark.parametrize("arch", some_of_the([*NARROW]))
def test_ten_sgd_steps_are_torchs(arch: str) -> None:
    """Parameters and running statistics after ten steps with momentum, in float64."""
    reference = random_torch_model(arch).train()
    model = flax_model(arch, dtype=jnp.float64, formulation="plain")
    variables = to_flax(reference.state_dict(), model)
    sgd = torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9)
    variables = ten_steps(model, variables, optax.sgd(0.01, 0.9), reference, sgd)
    check_equal(variables, to_flax(reference.state_dict(), model))


@pytest.mark.parametrize("arch", some_of_the([*NARROW, *VARIANTS], *NARROW))
def test_folded_networks_give_timms_logits(arch: str) -> None:
    reference = random_torch_model(arch).eval()
    model = flax_model(arch, dtype=jnp.float64, formulation="plain")
    folded, variables = fold_norms(model, to_flax(reference.state_dict(), model))
    assert variables.keys() == {"params"}
    assert not [path for path in jax.tree.leaves_with_path(variables) if "scale" in jax.tree_util.keystr(path[0])]
    x = images(32, 32)
    logits = jax.jit(partial(folded.apply, train=False))(variables, x)
    np.testing.assert_allclose(logits, reference(nchw(x)).detach().numpy(), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("arch", some_of_the(VARIANTS, "resnet10t", "seresnet18"))
def test_files_of_timm_are_recognised_and_written_back(tmp_path: Path, arch: str) -> None:
    """timm's network loads the tensors strictly, and each has the bits that it had."""
    reference = timm.create_model(arch, num_classes=7)
    randomize_norms(reference)
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "timm.safetensors")
    weights = read_weights(tmp_path / "timm.safetensors")
    assert (weights.provenance["arch"], weights.provenance["width"]) == (arch, 64)
    back = {key: torch.from_numpy(array.copy()) for key, array in to_torch(weights).items()}
    reference.load_state_dict(back, strict=True)
    with safetensors.safe_open(tmp_path / "timm.safetensors", "np") as file:
        assert {*file.keys()} == back.keys()
        assert all(file.get_tensor(key).tobytes() == back[key].numpy().tobytes() for key in back)


def test_a_sequential_of_a_deep_stem_is_recognised(tmp_path: Path) -> None:
    reference = timm.create_model("resnet10t")
    torch.save(torch.nn.Sequential(*[*reference.children()][:-2]).state_dict(), tmp_path / "body.pth")
    weights = read_weights(tmp_path / "body.pth")
    assert (weights.provenance["arch"], weights.provenance["num_classes"]) == ("resnet10t", 0)


def test_random_initialisation_is_timms() -> None:
    """Each layer has the same deviation and range, as far as a sample shows."""
    torch.manual_seed(0)
    block: Any = timm.models.resnet.BasicBlock
    reference = timm.models.resnet.ResNet(block, (2,), channels=(64,), block_args={"attn_layer": "se"})
    model = ResNet(
        block=BasicBlock,
        stage_depths=(2,),
        num_classes=1000,
        block_options=BlockOptions(squeeze_excite=True, zero_init=True),
    )
    expected = to_flax(reference.state_dict(), model)["params"]
    key = jax.random.key(0, impl="rbg")
    ours = jax.jit(lambda: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False))()["params"]
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        few = 0.4 if b.size < 100 else 0.1  # biases of 8 to 64 hidden channels
        assert abs(float(a.std()) - float(b.std())) <= few * float(b.std()), jax.tree_util.keystr(path)
        assert abs(float(abs(a).max()) - float(abs(b).max())) <= 0.4 * float(abs(b).max()), jax.tree_util.keystr(path)
    assert not ours["layer1"]["0"]["bn2"]["scale"].any()


@pytest.mark.parametrize(("height", "width"), [(6, 8), (7, 9), (1, 2)])
def test_average_pooling_is_torchs(height: int, width: int) -> None:
    x = images(height, width)
    image = nchw(x).requires_grad_()
    expected = torch.nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)(image)
    expected.backward(expected)
    assert image.grad is not None
    pooled, pull_back = jax.vjp(avg_pool_2x2, jnp.asarray(x))
    np.testing.assert_allclose(pooled, expected.detach().numpy().transpose(0, 2, 3, 1), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(pull_back(pooled)[0], image.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-12, atol=1e-15)


def test_parts_and_options() -> None:
    config = default_config()
    config.model.arch = "resnet50d"
    model: Network = make_model(config.model, 10)
    paths = parameter_paths(model)
    assert {"conv1/0/kernel", "conv1/4/scale", "conv1/6/kernel", "bn1/bias"} <= select(paths, "stem", model.parts)
    assert {stage_of(path, model.parts) for path in paths} == {*model.parts}
    config.model.stem = "small"
    with pytest.raises(UserError, match=r"deep stem of its own; leave model\.stem at imagenet, not small"):
        make_model(config.model, 10)
    config.model.arch = "seresnet18"
    assert make_model(config.model, 10).options["stem"] == "imagenet"


@pytest.mark.parametrize(
    ("arch", "expected"),  # timm's results/benchmark-infer-*.csv at 224 pixels, in 1e9
    [("resnet50d", 4.35), ("resnet50s", 5.47), ("seresnet50", 4.11), ("resnet18d", 2.06), ("seresnext50_32x4d", 4.26)],
)
def test_multiply_adds_are_estimated(arch: str, expected: float) -> None:
    assert ARCHITECTURES[arch](num_classes=1000).multiply_adds(224) == pytest.approx(expected * 1e9, rel=0.2)


def test_stages_to_compare_are_timms_modules() -> None:
    reference: Any = timm.create_model("seresnet18")
    assert {*FAMILY.stages(ARCHITECTURES["seresnet18"](num_classes=10))} <= {
        name for name, _ in reference.named_modules()
    }
    assert resnet.squeezed_channels(64) == reference.layer1[0].se.fc1.out_channels == 8
