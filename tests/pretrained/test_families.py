"""ViTs and ConvNeXts in checkpoints of training scripts, names in both directions, and networks that look alike."""

import argparse
import json
import re
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from jaxft import convert
from jaxft.errors import UserError
from jaxft.models import vit
from jaxft.models.architectures import VITS
from jaxft.models.build import ARCHITECTURES
from jaxft.models.vit import ViT
from jaxft.pretrained import templates
from jaxft.pretrained.convert import from_torch, naming_of, to_torch, torch_shapes
from jaxft.pretrained.families import FAMILIES, family_of
from jaxft.pretrained.family import Family, Naming
from jaxft.pretrained.load import read_weights
from jaxft.pretrained.torch_files import read_tensors, write_tensors
from jaxft.pretrained.weights_file import Weights, write_weights
from tests.helpers.reference import torch, torchvision

State = dict[str, Any]

SMALLEST = {"ResNet": "resnet18", "VGG": "vgg11", "ViT": "test_vit", "ConvNeXt": "test_convnext"}
NARROW = {"ResNet": {"width": 8}, "VGG": {"width": 2}}


def random_weights(family: Family, num_classes: int = 3, arch: str = "") -> Weights:
    """Returns random weights of an architecture, by default of the family's smallest."""
    arch = arch or SMALLEST[family.name]
    model = ARCHITECTURES[arch](num_classes=num_classes, **NARROW.get(family.name, {}))
    rng = np.random.default_rng(0)
    tensors = {key: rng.uniform(0.5, 2, shape).astype(np.float32) for key, shape in torch_shapes(model).items()}
    options = {key: getattr(model, key) for key in model.options}
    return Weights(from_torch(tensors, model), {"arch": arch, "num_classes": num_classes, **options})


@pytest.fixture(scope="module", params=["ViT", "ConvNeXt"])
def family(request: pytest.FixtureRequest) -> Family:
    return next(family for family in FAMILIES if family.name == request.param)


@pytest.fixture(scope="module")
def state(family: Family) -> State:
    return {key: torch.from_numpy(array) for key, array in to_torch(random_weights(family)).items()}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def doubled(state: State) -> State:
    return {key: value * 2 for key, value in state.items()}


def headless(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith(("head.fc.", "head.weight", "head.bias"))}


def same(weights: Weights, state: State, factor: float = 1) -> bool:
    """Returns whether the weights are those of a state_dict, times a factor, apart from its head."""
    ours = to_torch(weights)
    return all(np.array_equal(ours[key], factor * value.numpy()) for key, value in headless(state).items())


MLP_HEAD = {"0.weight": torch.ones(4, 4), "1.running_mean": torch.ones(4), "3.weight": torch.ones(4, 4)}


def with_mlp_head(state: State) -> State:
    """Returns a state_dict with a multi-layer perceptron as head."""
    head = "head.fc." if "head.fc.weight" in state else "head."
    return headless(state) | prefixed(head, MLP_HEAD)


CHECKPOINTS: dict[str, Any] = {
    "DataParallel": lambda s: prefixed("module.", s),
    "torch.compile": lambda s: {"model": prefixed("_orig_mod.module.", s)},
    "Lightning": lambda s: {
        "state_dict": prefixed("model.backbone.", s) | {"criterion.weight": torch.ones(2)},
        "hyper_parameters": {"lr": 0.1},
        "pytorch-lightning_version": "2.5",
    },
    "mmpretrain": lambda s: {
        "meta": {"epoch": 3},
        "state_dict": prefixed("backbone.", headless(s)) | {"head.fc.weight": torch.ones(3, 4)},
    },
    "args": lambda s: {"model": s, "args": argparse.Namespace(lr=0.1, model="mine"), "epoch": 3},
    "EMA": lambda s: {"state_dict": s, "state_dict_ema": doubled(s), "optimizer": {"state": {}}},
    "MAE": lambda s: {
        "model": headless(s)
        | {"decoder_embed.weight": torch.ones(2), "decoder_blocks.0.norm1.weight": torch.ones(2), "epoch": 3}
    },
    "MoCo v3": lambda s: {"state_dict": prefixed("module.base_encoder.", with_mlp_head(s))},
    "SimCLR": lambda s: {"state_dict": prefixed("encoder.", headless(s)) | prefixed("projector.", MLP_HEAD)},
    "no head": headless,
    "identity as head": lambda s: headless(s) | {"pooler.dense.weight": torch.ones(2, 2)},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_training_scripts_are_read(save: Any, state: State, family: Family, kind: str) -> None:
    weights = read_weights(save(CHECKPOINTS[kind](state)))
    assert same(weights, state)
    assert weights.provenance["arch"] == SMALLEST[family.name]
    notes = " ".join(weights.provenance.get("notes", []))
    assert ("head" in notes) == (kind in ("mmpretrain", "MAE", "MoCo v3", "SimCLR", "no head", "identity as head"))


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (lambda a, b: {"student": prefixed("module.backbone.", a), "teacher": prefixed("backbone.", b)}, "dino"),
        (
            lambda a, b: {"state_dict": prefixed("module.base_encoder.", a) | prefixed("module.momentum_encoder.", b)},
            "moco",
        ),
        (lambda a, b: {"model": prefixed("teacher.backbone.", b) | prefixed("student.backbone.", a)}, "dinov2"),
    ],
)
def test_one_of_several_networks_must_be_named(save: Any, state: State, wrap: Any, names: str) -> None:
    first, second = ("base_encoder", "momentum_encoder") if names == "moco" else ("student", "teacher")
    path = save(wrap(headless(state), headless(doubled(state))))
    with pytest.raises(UserError, match="2 networks"):
        read_weights(path)
    assert same(read_weights(f"{path}#{first}"), state)
    assert same(read_weights(f"{path}#{second}"), state, 2)


@pytest.mark.parametrize(
    ("beside", "part"),
    [
        (lambda key, value: {f"{key}.absmax": torch.ones(2), key: value.to(torch.uint8).reshape(-1, 1)}, "quantised"),
        (lambda key, value: {key: (value * 8).to(torch.int8)}, "int8, not floating point"),
        (lambda key, value: {key: None, f"{key}_orig": value, f"{key}_mask": value}, "weight in parts"),
        (lambda key, value: {key: value[:1]}, "instead of"),
    ],
)
def test_weights_that_are_not_numbers_of_a_layer_are_refused(save: Any, state: State, beside: Any, part: str) -> None:
    key = next(key for key in state if key.endswith("fc2.weight"))
    with pytest.raises(UserError, match=part) as error:
        read_weights(save({**state, **beside(key, state[key])}))
    assert len(str(error.value).partition("file.pth")[2]) <= 240


def test_a_text_tower_is_refused(save: Any, state: State) -> None:
    text = {"text.transformer.resblocks.0.ln_1.weight": torch.ones(2), "logit_scale": torch.ones(())}
    with pytest.raises(UserError, match="an image and a text tower"):
        read_weights(save(prefixed("visual.trunk.", state) | text))
    with pytest.raises(UserError, match="image and text towers"):
        read_weights(save({"visual.conv1.weight": torch.ones(2), "visual.class_embedding": torch.ones(2)} | text))
    assert same(read_weights(save({"model": prefixed("visual.trunk.", state)})), state)


def meta_state(model: str) -> State:
    """Returns the state_dict of a network of timm or torchvision, whose tensors take no space."""
    with torch.device("meta"):
        if model.startswith("torchvision."):
            network = getattr(torchvision.models, model.removeprefix("torchvision."))()
        else:
            network = import_module("timm").create_model(model)
    return {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in network.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("beit_base_patch16_224", "BEiT"),
        ("swin_tiny_patch4_window7_224", "it is a Swin Transformer"),
        ("torchvision.swin_t", "it is a Swin Transformer"),
        ("efficientnet_b0", "it is an EfficientNet or MobileNet"),
        ("torchvision.efficientnet_b0", "it is an EfficientNet or MobileNet"),
        ("mobilenetv3_small_100", "it is an EfficientNet or MobileNet"),
        ("regnetx_002", "it is a RegNet"),
        ("vit_base_patch16_clip_224", "it has a LayerNorm before the blocks"),
        ("mixer_s32_224", "does not hold a vit"),
        ("pit_ti_224", ""),
        ("inception_v3", ""),
    ],
)
def test_other_networks_are_named(save: Any, name: str, part: str) -> None:
    with pytest.raises(UserError) as error:
        read_weights(save(meta_state(name)))
    assert part in str(error.value)
    assert len(str(error.value).partition("file.pth")[2]) <= 240
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("SwinModel", "it is a Swin Transformer"),
        ("CLIPVisionModel", "it is CLIP's or SigLIP's image tower"),
        ("SiglipVisionModel", "it is CLIP's or SigLIP's image tower"),
    ],
)
def test_other_networks_of_transformers_are_named(tmp_path: Path, name: str, part: str) -> None:
    transformers = import_module("transformers")
    small: dict[str, Any] = {"embed_dim": 8, "depths": [1], "num_heads": [2]} if name == "SwinModel" else {}
    small = small or {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = getattr(transformers, name)
    model(model.config_class(**small)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=part):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("arch", "key", "plain", "other"),
    [
        ("test_vit", "num_heads", 2, 4),
        ("test_vit", "act_layer", "gelu", "relu"),
        ("convnext_atto", "act_layer", "gelu", "gelu_tanh"),
        ("test_convnext", "act_layer", "gelu_tanh", "gelu"),
    ],
)
def test_timm_arguments_that_shapes_do_not_show_are_refused(
    tmp_path: Path, arch: str, key: str, plain: Any, other: Any
) -> None:
    write_tensors(tmp_path / "model.safetensors", to_torch(random_weights(family_of(arch), arch=arch)))
    for value in (plain, other):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": arch, "model_args": {key: value}}))
        if value == plain:
            assert read_weights(tmp_path).provenance["arch"] == arch
            continue
        with pytest.raises(UserError, match=f"config.json says {key}={other}"):
            read_weights(tmp_path)


# ---- names ----


NAMINGS = [
    pytest.param(family, naming, id=f"{family.name}: {naming.library}")
    for family in FAMILIES
    for naming in family.namings
]


def source_keys(family: Family, naming: Naming) -> dict[str, tuple[str, ...]]:
    """Returns {own name: the source's keys} of a small network."""
    model = ARCHITECTURES[SMALLEST[family.name]](num_classes=3)
    return {name: naming.keys(name) for name in torch_shapes(model)}


@pytest.mark.parametrize(("family", "naming"), NAMINGS)
def test_names_translate_in_both_directions(family: Family, naming: Naming) -> None:
    found: set[str] = set()
    for name, keys in source_keys(family, naming).items():
        assert [naming.part(key) for key in keys] == [(name, number) for number in range(len(keys))]
        assert found.isdisjoint(keys), "two tensors have one name"
        found |= {*keys}
    for key, own in [*naming.renamed.items(), *((key, own) for own, keys in naming.merged.items() for key in keys)]:
        assert {*re.findall(r"\{.", key)} == {*re.findall(r"\{.", own)}, "each placeholder is on both sides"


# The networks of namings whose anchors the smallest one lacks, and the number of their classes.
ANCHORED = {
    "timm, with two heads": ("deit_tiny_distilled_patch16_224", 0),  # jaxft leaves both heads out
    "Meta's DINOv2": ("dinov2_vits14_reg", 3),
    "Hugging Face's Dinov2Model": ("vit_small_patch14_dinov2", 3),
    "Hugging Face's Dinov2ForImageClassification": ("vit_small_patch14_dinov2", 3),
    "Hugging Face's Dinov2WithRegistersForImageClassification": ("dinov2_vits14_reg", 3),
}
# Shapes of the tensors in such files that jaxft leaves out.
LEFT_OUT: dict[str, dict[str, tuple[int, ...]]] = {
    "timm, with two heads": {f"{head}.weight": (3, 12) for head in ("head", "head_dist")}
    | {f"{head}.bias": (3,) for head in ("head", "head_dist")},
    "Meta's DINOv2": {"mask_token": (1, 12)},
}


@pytest.fixture
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the networks of ANCHORED narrow, with one block and few patches."""
    for arch, _ in ANCHORED.values():
        own = VITS[arch]._replace(width=12, depth=1, heads=2, grid=3)
        monkeypatch.setitem(VITS, arch, own)
        monkeypatch.setitem(ARCHITECTURES, arch, partial(ViT, own, grid=own.grid))
        monkeypatch.setitem(vit.ARCHITECTURES, arch, ARCHITECTURES[arch])


@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize(("family", "naming"), NAMINGS)
def test_each_layout_is_read_and_written_again(family: Family, naming: Naming, tmp_path: Path) -> None:
    """The bytes of the second file are those of the first; the jaxft file between them keeps the library."""
    arch, num_classes = ANCHORED.get(naming.library.removesuffix(" in memory"), ("", 3))
    weights = random_weights(family, num_classes, arch)
    tensors = to_torch(weights, naming)
    left_out = LEFT_OUT.get(naming.library, {})
    tensors |= {key: np.ones(shape, np.float32) for key, shape in left_out.items()}
    assert {*naming.anchors} <= tensors.keys()
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")]
    write_tensors(paths[0], tensors)
    read = read_weights(paths[0])
    assert read.provenance["names"] == naming.library
    jax.tree.map(np.testing.assert_array_equal, read.variables, weights.variables)
    write_weights(paths[1], read)
    again = read_weights(paths[1])
    write_tensors(paths[2], to_torch(again, naming_of(again)))
    before, after = read_tensors(paths[0]), read_tensors(paths[2])
    assert before.keys() - after.keys() == left_out.keys()
    for key, array in after.items():
        assert (before[key].shape, before[key].tobytes()) == (array.shape, array.tobytes()), key


def hugging_face_vit() -> tuple[Family, dict[str, np.ndarray]]:
    family = next(family for family in FAMILIES if family.name == "ViT")
    naming = next(n for n in family.namings if n.library == "Hugging Face's ViTForImageClassification" and n.merged)
    return family, to_torch(random_weights(family), naming)


def test_a_part_of_a_merged_tensor_is_reported_by_its_own_key(tmp_path: Path) -> None:
    _, tensors = hugging_face_vit()
    key = next(key for key in tensors if key.endswith("attention.key.bias"))
    for change, part in (
        ({}, f"it has no {key} beside"),
        ({key: tensors[key][:-1]}, f"its {key} has shape"),
        ({key: tensors[key].astype(np.float16)}, "in float16, not"),
        ({key: tensors[key] * np.nan}, r"attention\.\{query,key,value\}"),
    ):
        broken = {name: array for name, array in tensors.items() if name != key} | change
        write_tensors(tmp_path / "broken.safetensors", broken)
        with pytest.raises(UserError, match=part if "{" in part else re.escape(part)):
            read_weights(tmp_path / "broken.safetensors")


def test_options_come_from_config_json_or_from_the_library(tmp_path: Path) -> None:
    _, tensors = hugging_face_vit()
    write_tensors(tmp_path / "model.safetensors", tensors)
    assert read_weights(tmp_path).provenance["norm_eps"] == 1e-12
    config = {"model_type": "vit", "layer_norm_eps": 1e-5, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = read_weights(tmp_path)
    assert weights.provenance["norm_eps"] == 1e-5
    write_weights(tmp_path / "own.safetensors", weights)
    assert read_weights(tmp_path / "own.safetensors").provenance["norm_eps"] == 1e-5
    for wrong in ("1e-6", -1, True, 5.0):
        (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": wrong}))
        with pytest.raises(UserError, match=r"config\.json says layer_norm_eps="):
            read_weights(tmp_path)


def test_a_library_without_the_network_is_refused(tmp_path: Path, state: State, family: Family, save: Any) -> None:
    for name in ("out.pth", "out.safetensors"):
        with pytest.raises(UserError, match=rf"torchvision has no {SMALLEST[family.name]}; --to torch writes"):
            convert.main([str(save(state)), str(tmp_path / name), "--to", "torchvision"])
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["test_vit", pytest.param("test_convnext", marks=pytest.mark.slow)])
def test_verify_compares_with_timm_even_without_a_head(
    name: str, save: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = import_module("timm").create_model(name)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path, out = str(save(headless(network.state_dict()))), tmp_path / "out.safetensors"
    convert.main([path, str(out), "--verify"])
    assert "largest difference from timm" in capsys.readouterr().out
    verified = read_weights(out).provenance["verified"]
    assert max(verified["float32"].values()) < 1e-5
    assert max(verified["float64"].values()) < 1e-12
    assert len(verified["float64"]) > 5


@pytest.mark.slow
def test_verify_detects_another_order_of_features(save: Any, family: Family, state: State) -> None:
    path = str(save(state))
    wrong = read_weights(path)
    block = wrong.variables["params"]
    block = (block if family.name == "ViT" else block["stages"]["1"])["blocks"]["0"]["mlp"]["fc1"]
    block["kernel"] = np.array(block["kernel"][::-1])
    with pytest.raises(UserError, match="differs from timm's network"):
        convert.verify(path, wrong)


def test_aliases_are_accepted(tmp_path: Path, save: Any, state: State) -> None:
    with pytest.raises(UserError, match="not a vit_b_16"):
        convert.main([str(save(state)), str(tmp_path / "a.safetensors"), "--arch", "vit_base_patch16_224"])
    assert family_of("vit_b_16").name == "ViT"


NUMBERS = st.integers(0, 99_999)
WORDS = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)


@settings(max_examples=100, deadline=None)
@given(words=st.lists(WORDS, min_size=2, max_size=5), i=NUMBERS, j=NUMBERS, leaf=WORDS, added=st.integers(0, 3))
def test_translation_is_inverted(words: list[str], i: int, j: int, leaf: str, added: int) -> None:
    first, *others = words
    pair = (
        f"{first}.{{i}}.{'.'.join(others)}.{{j}}",
        f"{'_'.join(others)}{{j+{added}}}.x.{{i}}" if added else f"{'_'.join(others)}{{j}}.x.{{i}}",
    )
    for end in ("", f".{leaf}"):
        key = f"{first}.{i}.{'.'.join(others)}.{j}{end}"
        own = templates.translate(key, [pair])
        assert own is not None
        assert f"{j + added}.x.{i}{end}" in own
        if j + added <= 99_999:
            assert templates.translate(own, [pair[::-1]]) == key


@settings(max_examples=200, deadline=None)
@given(key=st.text(max_size=20) | st.from_regex(r"(encoder|layer)\.0?[0-9]{1,6}\.\w{0,4}", fullmatch=True))
def test_any_key_translates_or_not(key: str) -> None:
    pair = ("encoder.{i}", "layer{i+1}")
    own = templates.translate(key, [pair])
    if own is not None:
        assert templates.translate(own, [pair[::-1]]) == key
    rest = templates.translate(key, [("4.{*}", "layer1.{*}")])
    assert rest is None or rest == f"layer1.{key.removeprefix('4.')}"
