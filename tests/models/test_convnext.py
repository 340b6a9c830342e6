"""Compares with the ConvNeXts of timm, torchvision and transformers, with random parameters."""

from contextlib import nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.config import default_config
from jaxft.errors import UserError
from jaxft.models import convnext
from jaxft.models.architectures import CONVNEXTS, ConvNeXtArchitecture
from jaxft.models.build import make_model
from jaxft.models.convnext import ConvNeXt
from jaxft.models.fold import fold_norms
from jaxft.models.partition import make_policy, parameter_paths, select, stage_of, trains_only_head
from jaxft.ops.formulation import Formulation
from jaxft.pretrained.convert import from_torch, torch_shapes
from jaxft.pretrained.convnext import FAMILY
from jaxft.pretrained.family import Naming
from tests.helpers.formulations import onednn_in_double_precision
from tests.helpers.reference import torch, torchvision
from tests.helpers.ten_steps import check_equal, relative, ten_steps
from tests.helpers.torch_models import images, nchw

timm = import_module("timm")

pytestmark = pytest.mark.usefixtures("compile_quickly")
# Networks that compile and run in a fraction of a real one's time.
ARCHITECTURES = CONVNEXTS | {
    "first": ConvNeXtArchitecture((1, 1, 1, 1), (8, 12, 16, 20)),
    "second": ConvNeXtArchitecture((1, 1, 1, 1), (8, 12, 16, 20), response_norm=True),
}
NAMINGS: dict[str, Naming] = {naming.library: naming for naming in FAMILY.namings}
HUGGING_FACE = "Hugging Face's ConvNext{}ForImageClassification"
# Larger ones would need more than 3 GB in float64; only their shapes are compared.
REAL = [name for name in CONVNEXTS if not name.endswith(("large", "huge", "base"))]


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    with jax.enable_x64(True):
        yield


def build(library: str, arch: str) -> torch.nn.Module:
    """Builds a library's network for 10 classes."""
    architecture = ARCHITECTURES[arch]
    depths, widths, second = architecture.depths, architecture.widths, architecture.response_norm
    if library == "timm":
        if arch in CONVNEXTS:
            return timm.create_model(arch, num_classes=10)
        layer_scale = {"use_grn": True, "ls_init_value": None} if second else {}
        return timm.models.convnext.ConvNeXt(depths=depths, dims=widths, num_classes=10, **layer_scale)
    if library == "torchvision":
        blocks = [
            torchvision.models.convnext.CNBlockConfig(width, out, depth)
            for width, out, depth in zip(widths, (*widths[1:], None), depths, strict=True)
        ]
        return torchvision.models.ConvNeXt(blocks, num_classes=10)
    transformers = import_module("transformers")
    config, model = (
        (transformers.ConvNextV2Config, transformers.ConvNextV2ForImageClassification)
        if second
        else (transformers.ConvNextConfig, transformers.ConvNextForImageClassification)
    )
    return model(config(hidden_sizes=widths, depths=depths, num_labels=10))


def random_torch_model(library: str, arch: str) -> torch.nn.Module:
    """Builds a network in float64 with parameters far from their initial values."""
    torch.manual_seed(0)
    model = build(library, arch).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
            if parameter.ndim > 1 and parameter.shape[0] > 1 and parameter[0].numel() > 1:
                parameter.div_(0.3 * parameter[0].numel() ** 0.5)
            elif name.endswith("weight"):
                parameter.add_(1)
    return model


def naming_of(library: str, arch: str) -> Naming:
    if library == "transformers":
        return NAMINGS[HUGGING_FACE.format("V2" if ARCHITECTURES[arch].response_norm else "")]
    return NAMINGS[library]


def flax_model(library: str, arch: str, **options: Any) -> Any:
    options = {**naming_of(library, arch).options, **options}
    return ConvNeXt(ARCHITECTURES[arch], num_classes=10, **options)


def to_flax(state: dict[str, torch.Tensor], library: str, arch: str, model: Any) -> dict[str, Any]:
    """Converts a library's parameters, or their gradients, by the table of names."""
    naming, tensors = naming_of(library, arch), {}
    for key, tensor in state.items():
        name, array = naming.part(key).name, tensor.detach().numpy()
        shape = NAMINGS["timm, with 1x1 convolutions"].own_shape(name, naming.own_shape(name, array.shape))
        tensors[name] = array.reshape(shape)
    return from_torch(tensors, model)


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=() if arch in ("convnext_atto", "convnextv2_tiny") else pytest.mark.slow)
        for arch in CONVNEXTS
    ],
)
def test_parameters_are_timms(arch: str) -> None:
    with torch.device("meta"):  # shapes only
        state = timm.create_model(arch, num_classes=7).state_dict()
    one_by_one = NAMINGS["timm, with 1x1 convolutions"]
    model = convnext.ARCHITECTURES[arch](num_classes=7)
    assert torch_shapes(model) == {key: one_by_one.own_shape(key, tuple(value.shape)) for key, value in state.items()}
    assert {stage_of(path, model.parts) for path in parameter_paths(model)} == {*model.parts}


# Modules of each library with the output of a stage, and of the last norm.
STAGES = {
    "timm": [*(f"stages.{i}" for i in range(4)), "head.flatten"],
    "torchvision": [*(f"features.{i}" for i in (1, 3, 5, 7)), "classifier.1"],
    "transformers": [*(f"{{}}.encoder.stages.{i}" for i in range(4)), "{}.layernorm"],
}


@pytest.mark.parametrize(
    ("library", "arch", "height", "width"),
    [
        ("torchvision", "first", 33, 70),
        ("timm", "second", 70, 32),
        ("transformers", "second", 40, 40),
        *(
            pytest.param(library, arch, 64, 64, marks=pytest.mark.slow)
            for library, arch in (
                ("transformers", "first"),
                ("torchvision", "convnext_tiny"),
                ("transformers", "convnext_tiny"),
                ("transformers", "convnextv2_tiny"),
                *(("timm", name) for name in ("first", *REAL)),
            )
        ),
    ],
)
def test_logits_and_every_stage_are_the_librarys(library: str, arch: str, height: int, width: int) -> None:
    reference = random_torch_model(library, arch).eval()
    names, expected = ("stage1", "stage2", "stage3", "stage4", "pooled"), {}
    prefix = "convnextv2" if ARCHITECTURES[arch].response_norm else "convnext"
    for module, name in zip(STAGES[library], names, strict=True):
        reference.get_submodule(module.format(prefix)).register_forward_hook(
            lambda _module, _inputs, output, name=name: expected.update({name: output.numpy().copy()})
        )
    x = images(height, width)
    with torch.no_grad():
        output = reference(nchw(x))
        expected["logits"] = (output if library != "transformers" else output.logits).numpy()
    tolerances = {jnp.float64: 1e-11, jnp.float32: 1e-5}
    if library != "timm" and arch not in CONVNEXTS:
        del tolerances[jnp.float32]  # which saves the default tests a compilation
    for dtype, tolerance in tolerances.items():
        model = flax_model(library, arch, dtype=dtype, formulation="cpu" if arch in CONVNEXTS else "plain")
        variables = to_flax(reference.state_dict(), library, arch, model)
        variables = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), variables)

        @jax.jit
        def outputs(variables: Any, x: jax.Array, model: Any = model) -> Any:
            features = model.apply(variables, x, train=False, output="features")
            return features | {"logits": model.apply(variables, features["pooled"], train=False)}

        for name, ours in outputs(variables, x.astype(dtype)).items():
            want = expected[name]
            want = want.transpose(0, 2, 3, 1) if want.ndim == 4 else want
            assert np.abs(ours - want).max() <= tolerance * np.abs(want).max(), (name, dtype)


CASES: list[Any] = [("torchvision", "first", False, "plain", False), ("timm", "second", True, "plain", True)]
SLOW: list[Any] = [
    (library, arch, train, formulation, formulation == "gpu")
    for library, arch in (
        *(("timm", name) for name in ("first", "second", "test_convnext", "convnext_atto", "convnextv2_atto")),
        ("torchvision", "convnext_tiny"),
        ("transformers", "first"),
        ("transformers", "second"),
    )
    for train, formulation in ((True, "cpu"), (False, "cpu"), (True, "plain"), (True, "cpu-onednn"), (True, "gpu"))
]


@pytest.mark.parametrize(
    ("library", "arch", "train", "formulation", "remat"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_gradients_are_torchs(library: str, arch: str, train: bool, formulation: Formulation, remat: bool) -> None:
    """Gradients of the input and of all parameters, in training and in evaluation mode, in float64."""
    reference = random_torch_model(library, arch).train(train)
    model = flax_model(library, arch, dtype=jnp.float64, formulation=formulation, remat=remat)
    variables = to_flax(reference.state_dict(), library, arch, model)
    x, label = images(40, 32, count=3), np.array([1, 7, 3])
    image = nchw(x).requires_grad_()
    logits = reference(image) if library != "transformers" else reference(image).logits
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(label)).backward()
    assert image.grad is not None
    gradients: dict[str, Any] = {key: parameter.grad for key, parameter in reference.named_parameters()}
    expected = to_flax(gradients, library, arch, model)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, x, train=train)
        return -jax.nn.log_softmax(logits)[jnp.arange(3), label].mean()

    with onednn_in_double_precision() if formulation == "cpu-onednn" else nullcontext():
        grads, image_grad = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables["params"], x)
    for (path, ours), want in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected["params"]), strict=True):
        assert relative(ours, want) <= 1e-9, jax.tree_util.keystr(path)
    assert relative(image_grad, image.grad.numpy().transpose(0, 2, 3, 1)) <= 1e-9


@pytest.mark.parametrize(
    ("arch", "optimizer"),
    [
        pytest.param(arch, optimizer, marks=pytest.mark.slow)
        for arch in ("first", "second", "test_convnext", "convnextv2_atto")
        for optimizer in ("sgd", "adamw")
    ],
)
def test_ten_steps_are_torchs(arch: str, optimizer: str) -> None:
    """Parameters after ten steps of SGD with momentum, or of AdamW, in float64."""
    reference = random_torch_model("timm", arch).train()
    model = flax_model("timm", arch, dtype=jnp.float64, formulation="cpu")
    params = to_flax(reference.state_dict(), "timm", arch, model)["params"]
    theirs: Any
    if optimizer == "sgd":
        theirs, tx = torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9), optax.sgd(0.01, 0.9)
    else:
        theirs = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.05)
        tx = optax.adamw(1e-3, weight_decay=0.05)
    variables = ten_steps(model, {"params": params}, tx, reference, theirs)
    check_equal(variables["params"], to_flax(reference.state_dict(), "timm", arch, model)["params"])


def test_the_rates_of_stochastic_depth_are_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block has its own number, and the head's dropout another one."""
    rates: dict[int, float] = {}

    def record(x: jax.Array, rate: float, keys: jax.Array | None, layer: int) -> jax.Array:
        assert layer not in rates and keys is not None
        rates[layer] = rate
        return x

    monkeypatch.setattr(convnext, "drop_path", record)
    monkeypatch.setattr(convnext, "dropout", record)
    model = flax_model("timm", "second", dropout=0.2, drop_path=0.3)
    keys = jax.random.split(jax.random.key(0), 2)
    image = jnp.zeros((2, 32, 32, 3), jnp.float32)
    jax.eval_shape(partial(model.init, train=True), jax.random.key(0), image, keys=keys)
    architecture = ARCHITECTURES["second"]
    theirs = timm.models.convnext.ConvNeXt(
        depths=architecture.depths, dims=architecture.widths, drop_path_rate=0.3, drop_rate=0.2
    )
    blocks = [getattr(block.drop_path, "drop_prob", 0.0) for stage in theirs.stages for block in stage.blocks]
    np.testing.assert_allclose([rates[i] for i in sorted(rates)], [theirs.head.drop.p, *blocks], rtol=1e-6)


def test_parts_options_and_small_images() -> None:
    config = default_config()
    config.model.update(arch="test_convnext", norm_eps=1e-12, drop_path=0.1)
    model = make_model(config.model, 10)
    assert model == flax_model("timm", "test_convnext", norm_eps=1e-12, drop_path=0.1, formulation=model.formulation)
    paths = parameter_paths(model)
    assert select(paths, "stem", model.parts) == {
        f"stem/{layer}" for layer in ("0/kernel", "0/bias", "1/scale", "1/bias")
    }
    assert {"head/norm/scale", "stages/3/blocks/1/gamma"} <= select(paths, "stage4", model.parts)
    config.optimizer.freeze = "backbone"
    policy = make_policy(config, model, 1)
    assert {*paths} - policy.frozen == {"head/fc/kernel", "head/fc/bias"}
    assert trains_only_head(model, policy)
    with pytest.raises(UserError, match="at least 32, not 31"):
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 31, 40, 3)))
    config.model.stem = "small"
    with pytest.raises(UserError, match=r"a test_convnext has no model\.stem; leave it at imagenet, not small"):
        make_model(config.model, 10)


def test_nothing_is_folded() -> None:
    model = flax_model("timm", "first")
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert variables.keys() == {"params"}
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variables["params"])
    folded, after = fold_norms(model, {"params": ones, "batch_stats": {}})
    assert folded == model.clone(folded=True)
    jax.tree.map(np.testing.assert_array_equal, after["params"], ones)


@pytest.mark.parametrize("arch", ["convnext_tiny", "convnext_base"])
def test_multiply_adds_are_torchvisions(arch: str) -> None:
    name = arch.replace("convnext", "ConvNeXt").replace("tiny", "Tiny").replace("base", "Base")
    operations = getattr(torchvision.models, f"{name}_Weights").DEFAULT.meta["_ops"]
    ours = convnext.ARCHITECTURES[arch](num_classes=1000).multiply_adds(224)
    assert ours == pytest.approx(operations * 1e9, rel=0.01)
