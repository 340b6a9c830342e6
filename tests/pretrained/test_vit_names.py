"""ViTs in files of timm, torchvision, Hugging Face and Meta: recognised, converted both ways, and told from others."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import convert
from jaxft.errors import UserError
from jaxft.models import vit
from jaxft.models.architectures import ViTArchitecture
from jaxft.pretrained.convert import from_torch, rename, to_torch, torch_shapes
from jaxft.pretrained.describe import describe
from jaxft.pretrained.families import FAMILIES
from jaxft.pretrained.load import read_weights
from jaxft.pretrained.state_dict import Network, choose, find_networks
from jaxft.pretrained.torch_files import open_tensors, read_tensors
from jaxft.pretrained.vit import FAMILY
from jaxft.pretrained.weights_file import Weights
from tests.helpers.reference import torch, torchvision
from tests.helpers.torch_models import images, nchw

transformers = import_module("transformers")

pytestmark = pytest.mark.usefixtures("compile_quickly")
State = dict[str, Any]
OWN = ViTArchitecture(4, 12, 1, 2, 3, 20)  # the small networks of this module
VIT: dict[str, Any] = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
VIT |= {"image_size": 12, "patch_size": 4, "num_labels": 5, "attn_implementation": "sdpa"}
DINOV2 = {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
SCALED = OWN._replace(hidden=24, layer_scale=1e-5)
DISTILLED = OWN._replace(distillation_token=True, embedded=2)
# transformers' class -> our architecture, its config and the output that is compared
MODELS: dict[str, tuple[ViTArchitecture, Any]] = {
    "ViTModel": (OWN, partial(transformers.ViTConfig, **VIT)),
    "ViTForImageClassification": (OWN, partial(transformers.ViTConfig, **VIT)),
    "DeiTModel": (DISTILLED, partial(transformers.DeiTConfig, **VIT)),
    "DeiTForImageClassification": (DISTILLED, partial(transformers.DeiTConfig, **VIT)),
    "DeiTForImageClassificationWithTeacher": (DISTILLED, partial(transformers.DeiTConfig, **VIT)),
    "Dinov2Model": (SCALED, partial(transformers.Dinov2Config, **DINOV2)),
    "Dinov2ForImageClassification": (SCALED, partial(transformers.Dinov2Config, **DINOV2)),
    "Dinov2WithRegistersForImageClassification": (
        SCALED._replace(registers=4),
        partial(transformers.Dinov2WithRegistersConfig, **DINOV2),
    ),
}


def random_model(name: str) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, name)(MODELS[name][1]()).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def read(path: Path) -> tuple[Network, Mapping[str, np.ndarray]]:
    """Returns the only network in a file, and its tensors by our names."""
    with open_tensors(path) as file:
        network = choose(find_networks(file.content, FAMILIES), path)
        return network, file.load(network.tensors)


def converted(name: str, network: Network, tensors: Mapping[str, np.ndarray]) -> tuple[vit.ViT, Any]:
    num_classes = tensors["head.bias"].size if "head.bias" in tensors else 0
    own = MODELS[name][0]
    model = vit.ViT(own, num_classes, grid=own.grid, dtype=jnp.float64, **network.naming.options)
    if num_classes and tensors["head.weight"].shape[1] != own.width:  # DINOv2's, on the class token and the mean
        tensors = {key: value for key, value in tensors.items() if not key.startswith("head.")}
        model = model.clone(num_classes=0)
    shapes = torch_shapes(model)
    heads = {key: np.zeros(shapes[key]) for key in ("head.weight", "head.bias") if not model.num_classes}
    return model, from_torch({**tensors, **heads}, model)


@pytest.mark.parametrize("name", MODELS)
def test_names_of_transformers_in_files_and_in_memory(name: str, tmp_path: Path, save: Callable[..., Path]) -> None:
    """Both are converted there and back with the same bits; what is left out has no effect on the features."""
    reference = random_model(name)
    reference.save_pretrained(tmp_path)
    state = dict(reference.state_dict())
    for path, in_memory in ((tmp_path / "model.safetensors", False), (save(state), True)):
        network, tensors = read(path)
        assert network.naming.library.endswith(" in memory") == in_memory
        before = read_tensors(path)
        after = rename(tensors, network.naming)
        left_out = {"mask_token", "pooler.dense", "cls_classifier", "distillation_classifier"}
        for key in before.keys() ^ after.keys():
            assert any(part in key for part in left_out), key
        for key, tensor in after.items():
            assert tensor.tobytes() == before[key].tobytes(), key
        model, variables = converted(name, network, tensors)
        assert model.norm_eps == (1e-6 if name.startswith("Dinov2") else 1e-12)
        assert jax.tree.all(jax.tree.map(lambda array: array.dtype == np.float64, variables))


@pytest.mark.parametrize(
    "name",
    [
        "ViTForImageClassification",
        "Dinov2WithRegistersForImageClassification",
        *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS),
    ],
)
def test_features_and_logits_are_transformers(name: str, tmp_path: Path) -> None:
    reference = random_model(name)
    reference.save_pretrained(tmp_path)
    x = images(12, 12)
    with torch.no_grad():
        base = reference.base_model(nchw(x)).last_hidden_state.numpy()
        output = reference(nchw(x))
    with jax.enable_x64(True):
        model, variables = converted(name, *read(tmp_path / "model.safetensors"))
        features = jax.jit(partial(model.apply, train=False, output="features"))(variables, x)
        logits = np.asarray(model.apply(variables, features["pooled"], train=False))
        tokens = np.asarray(features["tokens"])
    assert np.abs(tokens - base).max() <= 1e-11 * np.abs(base).max()
    if model.num_classes:
        expected = output.logits.numpy()
        assert np.abs(logits - expected).max() <= 1e-11 * np.abs(expected).max()


def torchvision_model() -> Any:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(12, 4, 1, 2, 12, 20, num_classes=5).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("older", [False, True])
def test_names_of_torchvision(older: bool, save: Callable[..., Path]) -> None:
    state = torchvision_model().state_dict()
    if older:
        new_names = {"mlp.0": "mlp.linear_1", "mlp.3": "mlp.linear_2"}
        for new, old in new_names.items():
            state = {key.replace(new, old): value for key, value in state.items()}
    network, tensors = read(save({f"module.{key}": value for key, value in state.items()}))
    model = vit.ViT(OWN, 5, grid=3, dtype=jnp.float64)
    after = rename(to_torch(Weights(from_torch(tensors, model), {"arch": "vit_b_16"})), network.naming)
    assert after.keys() == state.keys()
    assert all(tensor.tobytes() == state[key].numpy().tobytes() for key, tensor in after.items())
    if older:
        return
    torchvision_model().load_state_dict({key: torch.from_numpy(value.copy()) for key, value in after.items()})
    x = images(12, 12)
    with torch.no_grad():
        expected = torchvision_model()(nchw(x)).numpy()
    with jax.enable_x64(True):
        logits = np.asarray(jax.jit(partial(model.apply, train=False))(from_torch(tensors, model), x))
    assert np.abs(logits - expected).max() <= 1e-11 * np.abs(expected).max()


def state_of(arch: str, num_classes: int = 7) -> State:
    """Returns a state_dict by timm's names with random numbers."""
    rng = np.random.default_rng(0)
    shapes = torch_shapes(vit.ARCHITECTURES[arch](num_classes=num_classes))
    return {key: torch.from_numpy(rng.uniform(0.5, 2, shape).astype(np.float32)) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def state() -> State:
    return state_of("test_vit")


@pytest.mark.parametrize("arch", ["test_vit", pytest.param("test_vit2", marks=pytest.mark.slow)])
def test_a_round_trip_is_bit_identical(arch: str, save: Any, tmp_path: Path) -> None:
    state = state_of(arch)
    paths = [str(save({"state_dict": {f"module.{key}": value for key, value in state.items()}}))]
    paths += [str(tmp_path / name) for name in ("a.safetensors", "b.pth")]
    convert.main([*paths[:2], "--arch", arch])
    convert.main([*paths[1:], "--to", "torch"])
    after = read_tensors(Path(paths[2]))
    assert after.keys() == state.keys()
    for key, tensor in state.items():
        assert after[key].tobytes() == tensor.numpy().tobytes(), key
    provenance = read_weights(paths[1]).provenance
    found = [provenance[key] for key in ("arch", "num_classes", "norm_eps", "pool", "grid")]
    assert found == [arch, 7, 1e-6, vit.ARCHITECTURES[arch](num_classes=7).pool, 10]


def test_the_grid_and_the_pooling_come_from_the_tensors(save: Any, state: State) -> None:
    state = dict(state) | {"pos_embed": torch.ones(1, 1 + 144, 64)}
    state |= {f"fc_norm.{leaf}": state.pop(f"norm.{leaf}") for leaf in ("weight", "bias")}
    found = describe(str(save(state)))
    assert (found["arch"], found["grid"], found["pool"], found["usable"]) == ("test_vit", 12, "mean_norm", True)


def test_registers_of_meta_and_of_timm_are_two_layouts(save: Any) -> None:
    """timm adds the position embedding of the class token to the class token; shapes only."""
    for arch, names in (("dinov2_vits14_reg", "Meta's DINOv2"), ("vit_small_patch14_reg4_dinov2", "timm")):
        shapes = torch_shapes(vit.ARCHITECTURES[arch](num_classes=0))
        tensors = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items() if not key.startswith("head.")}
        if names != "timm":
            tensors |= {"register_tokens": tensors.pop("reg_token"), "mask_token": torch.zeros(1, 384)}
        found = describe(str(save(tensors)))
        assert (found["arch"], found["names"], found["head"]) == (arch, names, None)
        assert found["left_out"] == ([] if names == "timm" else ["mask_token"])


@pytest.mark.parametrize("with_teacher", [False, True])
def test_two_heads_are_left_out(with_teacher: bool, save: Any) -> None:
    state = state_of("deit_tiny_distilled_patch16_224", 3)
    if with_teacher:
        state |= {f"head_dist.{leaf}": torch.ones(state[f"head.{leaf}"].shape) for leaf in ("weight", "bias")}
    weights = read_weights(save(state))
    assert weights.provenance["arch"] == "deit_tiny_distilled_patch16_224"
    assert weights.provenance["num_classes"] == (0 if with_teacher else 3)
    notes = " ".join(weights.provenance.get("notes", []))
    assert ("not a dense layer on the features" in notes) == with_teacher


def test_config_json_has_the_epsilon_and_the_heads(save: Any, state: State, tmp_path: Path) -> None:
    library = "Hugging Face's ViTForImageClassification"
    naming = next(naming for naming in FAMILY.namings if naming.library == library)
    renamed = rename({key: value.numpy() for key, value in state.items()}, naming)
    path = save({key: torch.from_numpy(value.copy()) for key, value in renamed.items()}, "pytorch_model.bin")
    assert read_weights(path).provenance["norm_eps"] == 1e-12
    config = {"model_type": "vit", "layer_norm_eps": 1e-5, "num_attention_heads": 2, "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = read_weights(tmp_path)
    assert (weights.provenance["norm_eps"], weights.provenance["arch"]) == (1e-5, "test_vit")
    for wrong, part in (({"num_attention_heads": 4}, "a test_vit has 2 heads"), ({"hidden_act": "relu"}, "GELU")):
        (tmp_path / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(UserError, match=part):
            read_weights(tmp_path)


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"norm_pre.weight": (64,)}, "LayerNorm before the blocks, as CLIP's"),
        ({"blocks.0.mlp.w12.weight": (8, 64)}, r"gated \(SwiGLU\), as in DINOv2's giant"),
        ({"blocks.0.attn.q_norm.weight": (32,)}, "it normalises queries and keys"),
        ({"blocks.0.attn.q_bias": (64,)}, "relative position embeddings"),
        ({"pre_logits.fc.weight": (64, 64)}, "hidden layer before the head"),
        ({"pos_embed": (1, 90, 64)}, r"does not hold a test_vit: 1 of another shape: pos_embed \(1, 90, 64\)"),
    ],
)
def test_other_networks_are_refused_with_the_reason(
    keys: dict[str, tuple[int, ...]], part: str, save: Any, state: State
) -> None:
    with pytest.raises(UserError, match=part):
        read_weights(save(state | {key: torch.ones(shape) for key, shape in keys.items()}))


def test_a_text_tower_is_refused(save: Any) -> None:
    clip = {"text_model.embeddings.token_embedding.weight": torch.ones(2, 2)}
    clip |= {"vision_model.encoder.layers.0.self_attn.k_proj.weight": torch.ones(2, 2)}
    with pytest.raises(UserError, match="CLIP's or SigLIP's"):
        read_weights(save(clip))
