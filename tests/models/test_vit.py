"""Compares with timm's ViTs, with random weights far from their initial values."""

import re
from functools import cache, partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from jaxft.config import default_config
from jaxft.errors import UserError
from jaxft.models import vit
from jaxft.models.architectures import ALIASES, VITS, ViTArchitecture
from jaxft.models.build import make_model
from jaxft.models.fold import fold_norms
from jaxft.models.network import abstract_variables
from jaxft.models.partition import make_policy, parameter_paths, select, stage_of
from jaxft.models.position import bicubic_weights, resize_grid
from jaxft.ops.formulation import Formulation
from jaxft.pretrained.convert import torch_shapes
from jaxft.pretrained.recognise import infer_arch
from jaxft.pretrained.vit import FAMILY
from tests.helpers.reference import torch, torchvision
from tests.helpers.ten_steps import relative
from tests.helpers.torch_models import images, nchw, to_flax

timm = import_module("timm")
from timm.models.deit import VisionTransformerDistilled  # noqa: E402, after tests.helpers.reference
from timm.models.vision_transformer import VisionTransformer  # noqa: E402, after tests.helpers.reference

pytestmark = pytest.mark.usefixtures("compile_quickly")

# Networks that compile and run in a fraction of a real one's time.
SMALL = {
    "token": ViTArchitecture(4, 24, 2, 3, 4, 32),
    "registers": ViTArchitecture(8, 16, 2, 2, 3, layer_scale=0.5, registers=2, embedded=0),
    "mean": ViTArchitecture(4, 12, 1, 2, 3, layer_scale=0.5, class_token=False, registers=1, pool="mean_norm"),
    "attention": ViTArchitecture(4, 12, 1, 3, 2, pool="attention"),
    "distilled": ViTArchitecture(4, 12, 1, 2, 3, distillation_token=True, embedded=2),
}
TIMM_POOLS = {"token": "token", "mean": "avg", "mean_norm": "avg", "attention": "map"}


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    with jax.enable_x64(True):
        yield


def own(arch: str) -> ViTArchitecture:
    """Returns an architecture; large ones with 4 of their blocks, which would need 20 GB in float64."""
    own = SMALL.get(arch) or VITS[arch]
    return own._replace(depth=4) if own.width >= 1024 else own


def timm_model(own: ViTArchitecture, num_classes: int = 10) -> Any:
    options: dict[str, Any] = {
        "no_embed_class": own.embedded == 0,
        "global_pool": TIMM_POOLS[own.pool],
        "reg_tokens": own.registers,
    }
    options |= {"class_token": own.class_token, "init_values": own.layer_scale or None}
    return (VisionTransformerDistilled if own.distillation_token else VisionTransformer)(
        img_size=own.grid * own.patch,
        patch_size=own.patch,
        num_classes=num_classes,
        embed_dim=own.width,
        depth=own.depth,
        num_heads=own.heads,
        mlp_ratio=(own.hidden or 4 * own.width) / own.width,
        pool_include_prefix=own.pool_all,
        dynamic_img_size=True,
        **options,
    )


def random_torch_model(arch: str) -> Any:
    """Returns timm's network for 10 classes in float64, with parameters of the size of trained ones."""
    torch.manual_seed(0)
    model = timm_model(own(arch)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            near = 0.3 if parameter.ndim == 1 or "token" in name or "pos_embed" in name else parameter.shape[-1] ** -0.5
            parameter.add_(near * torch.randn_like(parameter))
    return model


def flax_model(arch: str, **options: Any) -> vit.ViT:
    a = own(arch)
    return vit.ViT(a, num_classes=10, **{"grid": a.grid, "pool": a.pool, **options})


def one_head(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.startswith("head_dist.")}


def square(arch: str) -> tuple[int, int]:
    return own(arch).grid * own(arch).patch, own(arch).grid * own(arch).patch


def logits_of(reference: Any, x: torch.Tensor) -> torch.Tensor:
    """Returns the logits; those of a distilled network by its first head, as transformers' DeiT has them."""
    if isinstance(reference, VisionTransformerDistilled):
        return reference.head(reference.forward_features(x)[:, 0])
    return reference(x)


def random_variables(model: vit.ViT) -> Any:
    """Returns normally distributed variables, without compiling an initialisation."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(a.dtype), abstract_variables(model))


# Meta's own layouts of DINOv2 are not in timm.
SLOW_ARCHITECTURES = [pytest.param(arch, marks=pytest.mark.slow) for arch in VITS if not arch.startswith("dinov2_vit")]


@pytest.mark.parametrize("arch", ["test_vit", *SLOW_ARCHITECTURES])
def test_parameters_are_timms(arch: str) -> None:
    """Keys and shapes, by which the architecture is recognised; and every one belongs to a part."""
    name = next((theirs for theirs, ours in ALIASES.items() if ours == arch and theirs.startswith("vit")), arch)
    with torch.device("meta"):  # shapes only
        state = one_head(timm.create_model(name, num_classes=1000).state_dict())
    model = vit.ARCHITECTURES[arch](num_classes=1000)
    assert torch_shapes(model) == {key: tuple(value.shape) for key, value in state.items()}
    assert infer_arch(state, FAMILY) == arch
    assert {stage_of(path, model.parts) for path in parameter_paths(model)} == {*model.parts}


@pytest.mark.parametrize("alias", [pytest.param(alias, marks=pytest.mark.slow) for alias in ALIASES if "vit" in alias])
def test_aliases_are_the_same_networks(alias: str) -> None:
    if alias.startswith("dinov2"):  # in Meta's repository
        return
    with torch.device("meta"):
        state = timm.create_model(alias, num_classes=1000).state_dict()
    assert infer_arch(state, FAMILY) == ALIASES[alias]


@pytest.mark.parametrize(
    "arch",
    [
        "token",
        "registers",
        "attention",
        *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("mean", "distilled")),
        *SLOW_ARCHITECTURES,
    ],
)
def test_logits_features_and_every_block_are_timms(arch: str) -> None:
    reference = random_torch_model(arch).eval()
    expected = {}
    for i, block in enumerate(reference.blocks):
        block.register_forward_hook(
            lambda _module, _inputs, output, path=f"blocks/{i}": expected.update({path: output.numpy().copy()})
        )
    x = images(*square(arch), count=1 if arch in VITS else 2)
    with torch.no_grad():
        tokens = reference.forward_features(nchw(x))
        expected["tokens"] = tokens.numpy()
        expected["logits"] = logits_of(reference, nchw(x)).numpy()
        if not own(arch).distillation_token:  # timm returns the mean of both tokens
            expected["pooled"] = reference.forward_head(tokens, pre_logits=True).numpy()
    for dtype, tolerance in ((jnp.float64, 1e-11), (jnp.float32, 1e-5)):
        model = flax_model(arch, dtype=dtype, formulation="cpu")
        state = to_flax(one_head(reference.state_dict()), model)
        variables = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), state)

        @jax.jit
        def outputs(variables: Any, x: jax.Array, model: Any = model) -> Any:
            features, captured = model.apply(
                variables, x, train=False, output="features", capture_intermediates=True, mutable=["intermediates"]
            )
            logits = model.apply(variables, features["pooled"], train=False)
            return features | {"logits": logits}, captured["intermediates"]

        features, captured = outputs(variables, x.astype(dtype))
        blocks = {key.removesuffix("/__call__"): value[0] for key, value in flatten_dict(captured, sep="/").items()}
        for name, want in expected.items():
            ours = (features | blocks)[name]
            assert np.abs(ours - want).max() <= tolerance * np.abs(want).max(), (name, dtype)


def test_token_and_mean_pooling_share_the_weights() -> None:
    reference = random_torch_model("token").eval()
    model = flax_model("token", dtype=jnp.float64, pool="mean")
    features = jax.jit(partial(model.apply, train=False, output="features"))
    pooled = features(to_flax(reference.state_dict(), model), x := images(*square("token")))["pooled"]
    with torch.no_grad():
        expected = reference.forward_features(nchw(x))[:, 1:].mean(1)
    np.testing.assert_allclose(pooled, expected.numpy(), rtol=1e-11, atol=1e-12)


@cache
def gradients(model: vit.ViT) -> Any:
    """Returns a compiled function: the gradients of the mean loss by parameters and images."""

    def loss(params: Any, x: jax.Array, label: jax.Array, keys: jax.Array | None) -> jax.Array:
        logits: Any = model.apply({"params": params}, x, train=keys is not None, keys=keys)
        return -jax.nn.log_softmax(logits)[jnp.arange(len(x)), label].mean()

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


KEYS = 4  # images of a batch
CASES: list[Any] = [("token", True, "cpu", False), ("registers", False, "plain", True)]
SLOW = [
    (arch, train, formulation, formulation == "gpu")
    for arch in (
        *SMALL,
        "test_vit",
        "test_vit2",
        "test_vit3",
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
    )
    for train in (True, False)
    for formulation in ("plain", "cpu", "gpu")
]


@pytest.mark.parametrize(
    ("arch", "train", "formulation", "remat"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_gradients_are_torchs(arch: str, train: bool, formulation: Formulation, remat: bool) -> None:
    """Gradients of the input and of all parameters, in training and in evaluation mode, in float64."""
    reference = random_torch_model(arch).train(train)
    model = flax_model(arch, dtype=jnp.float64, formulation=formulation, remat=remat)
    params = to_flax(one_head(reference.state_dict()), model)["params"]
    x, label = images(*square(arch), count=KEYS), np.array([1, 7, 3, 7])
    image = nchw(x).requires_grad_()
    torch.nn.functional.cross_entropy(logits_of(reference, image), torch.from_numpy(label)).backward()
    assert image.grad is not None
    expected = to_flax(one_head({name: each.grad for name, each in reference.named_parameters()}), model)["params"]
    keys = jax.random.split(jax.random.key(0), KEYS) if train else None
    grads, image_grad = gradients(model)(params, x, label, keys)
    largest = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(expected))
    for (path, ours), want in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        # A query adds the bias of the keys to all its scores, whose gradient is 0: both sides are rounding errors.
        close = relative(ours, want) <= 1e-9 or np.linalg.norm(ours - want) <= 1e-13 * largest
        assert close, jax.tree_util.keystr(path)
    assert relative(image_grad, image.grad.numpy().transpose(0, 2, 3, 1)) <= 1e-9


OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "adamw": (optax.adamw(1e-3, weight_decay=0.05), partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05)),
    "sgd": (optax.sgd(0.01, momentum=0.9), partial(torch.optim.SGD, lr=0.01, momentum=0.9)),
}


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("token", "adamw"),
        ("token", "sgd"),
        *(
            pytest.param(arch, name, marks=pytest.mark.slow)
            for arch in (*[*SMALL][1:], "test_vit", "vit_tiny_patch16_224")
            for name in OPTIMIZERS
        ),
    ],
)
def test_ten_steps_are_torchs(arch: str, name: str) -> None:
    """Parameters after ten steps of an optimizer, in float64."""
    reference = random_torch_model(arch).train()
    model = flax_model(arch, dtype=jnp.float64, formulation="cpu")
    params = to_flax(one_head(reference.state_dict()), model)["params"]
    tx, make_theirs = OPTIMIZERS[name]
    theirs = make_theirs([parameter for key, parameter in reference.named_parameters() if "head_dist" not in key])

    @jax.jit
    def update(params: Any, grads: Any, state: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rng, keys = np.random.default_rng(2), jax.random.split(jax.random.key(0), KEYS)
    state = jax.jit(tx.init)(params)
    for _ in range(10):
        x, label = rng.normal(size=(KEYS, *square(arch), 3)), rng.integers(10, size=KEYS)
        params, state = update(params, gradients(model)(params, x, label, keys)[0], state)
        theirs.zero_grad()
        torch.nn.functional.cross_entropy(logits_of(reference, nchw(x)), torch.from_numpy(label)).backward()
        theirs.step()
    expected = to_flax(one_head(reference.state_dict()), model)["params"]
    for (path, ours), want in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(expected), strict=True):
        key = jax.tree_util.keystr(path)
        if name == "adamw" and key.endswith("['qkv']['bias']"):  # Adam enlarges the key's gradients, which are rounding
            ours, want = (np.delete(a, np.s_[len(a) // 3 : 2 * len(a) // 3]) for a in (np.asarray(ours), want))
        assert relative(ours, want) <= 1e-8, key


@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (24, 17)), ((37, 37), (16, 16)), ((4, 5), (9, 2)), ((3, 3), (1, 4))]
)
def test_position_embeddings_are_interpolated_as_by_torch(old: tuple[int, int], new: tuple[int, int]) -> None:
    grid = np.random.default_rng(0).normal(size=(*old, 3))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(grid.transpose(2, 0, 1)[None].copy()), new, mode="bicubic", antialias=True
    )
    np.testing.assert_allclose(resize_grid(jnp.asarray(grid), new), expected[0].permute(1, 2, 0), rtol=0, atol=1e-13)
    np.testing.assert_allclose(bicubic_weights(old[0], new[0]).sum(1), 1, rtol=1e-14)


def test_an_equal_grid_keeps_its_bits() -> None:
    grid = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
    assert resize_grid(grid, (3, 4)) is grid


@pytest.mark.parametrize(("arch", "height", "width"), [("token", 24, 8), ("registers", 40, 24)])
def test_other_image_sizes_are_timms(arch: str, height: int, width: int) -> None:
    """timm interpolates in float32, whatever the type of the network."""
    reference = random_torch_model(arch).eval()
    model = flax_model(arch, dtype=jnp.float64)
    x = images(height, width)
    logits = jax.jit(partial(model.apply, train=False))(to_flax(reference.state_dict(), model), x)
    with torch.no_grad():
        expected = reference(nchw(x)).numpy()
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_patches_that_do_not_fit_are_refused() -> None:
    model = flax_model("registers")
    for side, near in ((30, "24 or 32"), (7, "8")):
        with pytest.raises(UserError, match=f"cannot process a side of {side}; the nearest sizes are {near}"):
            jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 32, side, 3)))


def test_bfloat16_keeps_tokens_and_logits_in_float32() -> None:
    model = flax_model("attention", dtype=jnp.bfloat16)
    variables, x = random_variables(model), images(*square("attention")).astype(np.float32)

    @jax.jit
    def outputs(variables: Any, x: jax.Array) -> Any:
        narrow, wide = (model.clone(dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
        return [each.apply(variables, x, train=False, output="features") for each in (narrow, wide)]

    narrow, wide = outputs(variables, x)
    assert {leaf.dtype for leaf in jax.tree.leaves([variables, narrow])} == {jnp.dtype("float32")}
    assert 1e-4 < relative(narrow["pooled"], wide["pooled"]) < 0.03


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_all_products_have_the_precision_asked_for(platform: str) -> None:
    """Checks the programs of a TPU and a GPU, including their gradients."""
    with jax.enable_x64(False):
        formulation: Formulation = "gpu" if platform == "cuda" else "tpu"
        model = flax_model("attention", precision="highest", formulation=formulation, remat=True)

        def loss(variables: Any, x: jax.Array) -> Any:
            logits: Any = model.apply(variables, x, train=True)
            return logits.sum()

        image = jax.ShapeDtypeStruct((2, *square("attention"), 3), jnp.float32)
        traced = jax.jit(jax.grad(loss)).trace(abstract_variables(model), image)
        program = traced.lower(lowering_platforms=(platform,)).as_text()
    products = re.findall(r"stablehlo\.dot_general.*", program)
    assert len(products) >= 3 * 14 - 1  # 7 in the block, 8 in the pooling, the patches' and the head's
    for product in products:
        assert re.findall(r"\b(?:DEFAULT|HIGH|HIGHEST)\b", product) == ["HIGHEST"] * 2, product


def test_dropout_and_stochastic_depth_depend_on_the_image_only() -> None:
    model = flax_model("token", dropout=0.5, drop_path=0.9, dtype=jnp.float64)
    x, keys = images(*square("token"), count=6), jax.random.split(jax.random.key(0), 6)
    variables = random_variables(model)
    apply = jax.jit(partial(model.apply, train=True))
    logits = apply(variables, x, keys=keys)
    assert (np.abs(logits - apply(variables, x, keys=None)).max(1) > 1e-3).all()
    np.testing.assert_allclose(apply(variables, x[::-1], keys=keys[::-1]), logits[::-1], rtol=1e-9)


@pytest.mark.slow
def test_initial_parameters_are_distributed_as_timms() -> None:
    own = ViTArchitecture(4, 32, 1, 2, 4, layer_scale=1e-5, registers=2, embedded=3, pool="attention", pool_all=True)
    model = vit.ViT(own, num_classes=100, grid=4, pool="attention")
    init = jax.jit(partial(model.init, train=False))
    ours = flatten_dict(init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"], sep="/")
    torch.manual_seed(0)
    theirs = to_flax(timm_model(own, num_classes=100).state_dict(), model)["params"]
    for path, want in flatten_dict(theirs, sep="/").items():
        np.testing.assert_allclose(np.std(ours[path]), np.std(want), rtol=0.5, atol=1e-9, err_msg=path)
        np.testing.assert_allclose(np.mean(ours[path]), np.mean(want), atol=0.1, err_msg=path)


def test_parameters_of_other_poolings_are_taken_over() -> None:
    with jax.enable_x64(False):
        params = random_variables(flax_model("token", dtype=jnp.float32))["params"]
        for pool in ("mean", "mean_norm", "attention", "token"):
            model = flax_model("token", pool=pool)
            params = vit.repool(model, params, jax.random.key(0))
            shapes = jax.tree.map(lambda a: (a.shape, a.dtype), params)
            assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), abstract_variables(model)["params"])


def test_parts_options_and_folding() -> None:
    config = default_config()
    config.model.arch = "test_vit"
    model = make_model(config.model, 10)
    assert model == vit.ARCHITECTURES["test_vit"](num_classes=10, formulation=model.formulation)
    assert [*model.parts] == ["embed", *(f"block{i}" for i in range(6)), "head"]
    paths = parameter_paths(model)
    assert select(paths, "embed", model.parts) == {
        "cls_token",
        "pos_embed",
        "patch_embed/proj/kernel",
        "patch_embed/proj/bias",
    }
    assert {"norm/scale", "blocks/5/mlp/fc2/bias"} <= select(paths, "block5", model.parts)
    config.optimizer.freeze = "backbone"
    assert {*paths} - make_policy(config, model, 1).frozen == {"head/kernel", "head/bias"}
    variables = {"params": random_variables(model)["params"], "batch_stats": {}}
    jax.tree.map(np.testing.assert_array_equal, fold_norms(model, variables)[1], {"params": variables["params"]})
    config.model.update(pool="attention", norm_eps=1e-12, grid=7, drop_path=0.1)
    model = make_model(config.model, 10)
    assert isinstance(model, vit.ViT)
    assert (model.pool, model.norm_eps, model.grid, model.drop_path) == ("attention", 1e-12, 7, 0.1)
    assert select(parameter_paths(model), "pool", model.parts) > {"attn_pool/latent"}
    config.model.update(arch="resnet18", norm_eps=0.0, grid=0)
    with pytest.raises(UserError, match=r"a resnet18 has no model\.pool; leave it at auto, not attention"):
        make_model(config.model, 10)


@pytest.mark.parametrize("arch", ["vit_b_32", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("vit_h_14",))])
def test_multiply_adds_are_torchvisions(arch: str) -> None:
    weights = getattr(torchvision.models, f"ViT_{arch[4:].title()}_Weights")
    operations = next(entry.meta["_ops"] for entry in weights if "SWAG" not in entry.name or arch == "vit_h_14")
    side = next(entry.meta["min_size"][0] for entry in weights if "SWAG" not in entry.name or arch == "vit_h_14")
    assert vit.ARCHITECTURES[arch](num_classes=1000).multiply_adds(side) == pytest.approx(operations * 1e9, rel=0.01)
