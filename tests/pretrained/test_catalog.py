"""The table of named weights, compared with torchvision's metadata."""

import hashlib
import math
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from jaxft import convert
from jaxft.files import cache_dir
from jaxft.models.architectures import ALIASES, NAMES
from jaxft.models.architectures import TORCHVISION as TORCHVISION_ARCHITECTURES
from jaxft.models.build import ARCHITECTURES
from jaxft.models.network import num_params
from jaxft.pretrained import download
from jaxft.pretrained.catalog import PARAMETERS, WEIGHTS, NamedWeights, find, similar_names, table, weights_file
from jaxft.pretrained.listing import FAMILY_NAMES
from tests.helpers.reference import torchvision

MODELS = torchvision.models
TORCHVISION = [
    (f"{arch}.tv_in1k_{enum.name.removeprefix('IMAGENET1K_').lower()}", enum)
    for arch in sorted(TORCHVISION_ARCHITECTURES)
    for enum in MODELS.get_model_weights(arch)
    if math.isfinite(enum.meta["_metrics"]["ImageNet-1K"]["acc@1"])  # one of vgg16's files has no trained head
    and "SWAG" not in enum.name  # not for commercial use
]


@pytest.mark.parametrize(("name", "enum"), TORCHVISION)
def test_torchvision_rows_match_torchvisions_metadata(name: str, enum: Any) -> None:
    weights = find(name)
    assert weights
    transforms = enum.transforms()
    assert weights.url == enum.url
    assert weights.top1 == enum.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    assert [weights.crop_size] == transforms.crop_size
    assert [weights.resize_size] == transforms.resize_size
    assert weights.interpolation == transforms.interpolation.value
    assert list(weights.mean) == transforms.mean
    assert list(weights.std) == transforms.std
    assert PARAMETERS[weights.arch] == enum.meta["num_params"]
    assert enum.meta["_file_size"] * 2**20 < weights.max_bytes


def test_exactly_torchvisions_weights_are_listed() -> None:
    assert {w.name for w in WEIGHTS if w.source == "torchvision"} == {name for name, _ in TORCHVISION}


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: weights.name)
def test_every_row_is_consistent(weights: NamedWeights) -> None:
    assert re.fullmatch("[0-9a-f]{8}", weights.sha256_prefix)
    assert weights.url.startswith("https://")
    assert weights.url.endswith((f"-{weights.sha256_prefix}.pth", f"-{weights.sha256_prefix}.safetensors"))
    assert weights.name.startswith(f"{weights.arch}.")
    assert weights.arch in ARCHITECTURES
    assert weights.interpolation in ("bilinear", "bicubic")
    assert 160 <= weights.crop_size <= weights.resize_size <= 320
    assert 69 < weights.top1 < 85
    assert weights.license


def test_names_urls_and_checksums_are_unique() -> None:
    for column in ("name", "url", "sha256_prefix"):
        assert len({getattr(weights, column) for weights in WEIGHTS}) == len(WEIGHTS)


def test_the_table_lists_all_weights_within_100_columns() -> None:
    head, *lines = table().splitlines()
    assert head.split()[:5] == ["name", "top-1", "%", "data.resize", "image_size"]
    assert [line.split()[0] for line in lines] == [weights.name for weights in WEIGHTS]
    assert [float(line.split()[1]) for line in lines] == [weights.top1 for weights in WEIGHTS]
    assert max(map(len, (head, *lines))) <= 100


@pytest.mark.parametrize(
    "arch", [name if name == "vgg11" else pytest.param(name, marks=pytest.mark.slow) for name in PARAMETERS]
)
def test_parameters_are_those_of_the_models(arch: str) -> None:
    assert num_params(ARCHITECTURES[arch](num_classes=1000)) == PARAMETERS[arch]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_family_is_listed_with_its_weights(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    timm = import_module("timm")
    convert.main(["--list", family])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["model.arch", "parameters", "image_size", "weights"]
    assert max(map(len, (head, *lines))) <= 140
    for line in lines:
        arch, parameters, image_size, *weights = line.replace(", ", " ").split()
        assert arch in NAMES
        assert parameters == f"{PARAMETERS[arch]:,}"
        assert image_size.isdecimal()
        for name in weights:
            tag = name.removeprefix("hf:timm/")
            assert (
                weights[:2] == ["files", "of"] or find(name) or timm.get_pretrained_cfg(tag, allow_unregistered=False)
            )


def test_all_architectures_are_in_one_list(capsys: pytest.CaptureFixture[str]) -> None:
    listed = []
    for family in FAMILY_NAMES:
        convert.main(["--list", family])
        listed += [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert sorted(listed) == sorted(NAMES)
    assert {*PARAMETERS} == {*NAMES}
    assert {*ALIASES.values()} <= {*NAMES}
    convert.main(["--list"])
    output = capsys.readouterr().out
    assert output.startswith(table())
    assert "vit (" in output


def test_a_misspelt_name_gets_the_nearest_names() -> None:
    assert find("resnet50.tv_v2") is None
    assert similar_names("resnet50.tv_v2")[0] == "resnet50.tv_in1k_v2"
    assert similar_names("ResNet50.A1_in1k")[0] == "resnet50.a1_in1k"
    assert similar_names("resnet50")[:2] == ["resnet50.tv_in1k_v1", "resnet50.tv_in1k_v2"]
    assert similar_names("efficientnet_v2") == []


def test_a_cached_file_is_used_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    monkeypatch.setattr(download, "_open", None)  # any download would fail
    data = b"weights"
    weights = WEIGHTS[0]._replace(sha256_prefix=hashlib.sha256(data).hexdigest()[:8])
    path = tmp_path / "weights" / "resnet18-f37072fd.pth"
    path.parent.mkdir()
    path.write_bytes(data)
    assert weights_file(weights) == path
    assert cache_dir() == tmp_path
