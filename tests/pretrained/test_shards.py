"""Checkpoints in several files: read as one, and every wrong file is named."""

import hashlib
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxft.errors import UserError
from jaxft.pretrained import shards, torch_files
from jaxft.pretrained.convert import to_torch
from jaxft.pretrained.describe import describe
from jaxft.pretrained.load import load_pretrained, read_weights
from jaxft.pretrained.torch_files import write_tensors
from tests.helpers.reference import torch
from tests.helpers.runs import ROOT

WIDTH_4 = ROOT / "tests" / "fixtures" / "weights" / "width4.safetensors"
INDEX = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return to_torch(read_weights(WIDTH_4))


def save(folder: Path, tensors: dict[str, np.ndarray], suffix: str = ".safetensors", count: int = 3) -> Path:
    """Writes shards and their index as save_pretrained does; returns the index."""
    index: dict[str, str] = {}
    keys, stem = sorted(tensors), INDEX[suffix].partition(".")[0]
    for i in range(count):
        name = f"{stem}-{i + 1:05}-of-{count:05}{suffix}"
        held = {key: tensors[key] for key in keys[i::count]}
        if suffix == ".bin":
            torch.save({key: torch.from_numpy(array) for key, array in held.items()}, folder / name)
        else:
            write_tensors(folder / name, held)
        index |= dict.fromkeys(held, name)
    path = folder / INDEX[suffix]
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return path


@pytest.mark.parametrize("suffix", INDEX)
def test_shards_are_read_as_one_file(tmp_path: Path, tensors: dict[str, np.ndarray], suffix: str) -> None:
    path = save(tmp_path, tensors, suffix)
    weights = read_weights(path)
    same(weights.variables, read_weights(WIDTH_4).variables)
    same(load_pretrained(str(tmp_path)).variables, weights.variables)
    shard = sorted(tmp_path.glob(f"*{suffix}"))
    lines = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in shard)
    provenance = {"source": path.name, "source_sha256": hashlib.sha256(lines.encode()).hexdigest(), "width": 4}
    assert {key: weights.provenance[key] for key in provenance} == provenance
    found = describe(str(tmp_path))
    assert (found["format"], found["usable"], found["arch"]) == (
        "index of a checkpoint in several files",
        True,
        "resnet18",
    )


def test_only_the_network_is_read(
    tmp_path: Path, tensors: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes are checked first, and other tensors are never read."""
    path = save(tmp_path, {f"backbone.{key}": array for key, array in tensors.items()} | {"queue": np.ones((2, 3))})
    loaded: list[str] = []
    original = torch_files.load_joined
    monkeypatch.setattr(
        torch_files, "load_joined", lambda tensors, read: [*map(loaded.append, tensors)] and original(tensors, read)
    )
    weights = read_weights(path)
    same(weights.variables, read_weights(WIDTH_4).variables)
    assert "left out: queue" in weights.provenance["notes"]
    assert not any("queue" in name for name in loaded)
    loaded.clear()
    with pytest.raises(UserError, match="holds a resnet18, not a resnet50"):
        read_weights(path, "resnet50")
    assert not loaded


def test_a_wrong_shard_is_named(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    path = save(tmp_path, tensors)
    first, second, _ = sorted(tmp_path.glob("*.safetensors"))

    def message(source: Path = path) -> str:
        with pytest.raises(UserError) as error:
            read_weights(source)
        text = str(error.value)
        assert text.isprintable()
        assert len(text.replace(str(tmp_path), "")) <= 240
        return text

    assert "it is one of 3 files of a checkpoint; give their folder, or their index" in message(second)
    assert "it is one of 3 files" in message(first)
    content = second.read_bytes()
    second.unlink()
    assert f"{second} is missing, which {path.name} names" in message()
    second.write_bytes(content[:-10])
    assert f"{second} cannot be read as safetensors" in message()
    second.write_bytes(first.read_bytes())
    assert f"{second} lacks" in message()
    second.write_bytes(content)
    write_tensors(second, {**torch_files.read_tensors(_renamed(second)), "foreign.weight": np.ones(3)})
    assert f"{second} holds 1 tensors that {path.name} does not name in it: foreign.weight" in message()
    second.write_text("version https://git-lfs.github.com/spec/v1\nsize 12")
    assert f"{second} is refused: it is a Git LFS pointer" in message()
    second.write_text(path.read_text())
    assert "not a file of tensors" in message()


def _renamed(path: Path) -> Path:
    return path.rename(path.with_name("a.safetensors"))


@pytest.mark.parametrize(
    ("index", "part"),
    [
        ("{", "cannot be read as the index of a checkpoint"),
        ("[]", "it holds a list, not an object"),
        ('{"weight_map": []}', 'it has no "weight_map"'),
        ('{"weight_map": {"a": "../b.safetensors"}}', "'../b.safetensors', which is not a file beside the index"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "is not a file beside the index"),
        ('{"weight_map": {"a": ".."}}', "is not a file beside the index"),
        ('{"weight_map": {"a": 3}}', "is not a file beside the index"),
        ('{"weight_map": {"a": "b\\u0000"}}', "is not a file beside the index"),
        (json.dumps({"weight_map": {"a" * 2000: "b"}}), "the name of one of its tensors has 2,000 characters"),
        (json.dumps({"weight_map": {str(i): f"{i}.bin" for i in range(1001)}}), "it names 1,001 files"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, index: str, part: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(index)
    with pytest.raises(UserError) as error:
        shards.read_index(path)
    assert part in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.slow
def test_folders_of_save_pretrained_are_read(tmp_path: Path) -> None:
    """A small max_shard_size gives several files with an index; the numbers are those of the single file."""
    transformers = import_module("transformers")
    config = transformers.ResNetConfig(depths=[2, 2, 2, 2], layer_type="basic", hidden_sizes=[64, 128, 256, 512])
    model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10MB")
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    one, many = (load_pretrained(str(tmp_path / name)) for name in ("one", "many"))
    same(one.variables, many.variables)
