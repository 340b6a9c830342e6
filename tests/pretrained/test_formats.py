"""Files that hold no weights, or hold them in another format: what they are, and what to do."""

import gzip
import io
import os
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxft.errors import UserError
from jaxft.pretrained.load import load_pretrained, read_weights
from tests.helpers.reference import torch
from tests.helpers.runs import ROOT

TINY = (ROOT / "jaxft" / "samples" / "resnet18_tiny_in200.safetensors").read_bytes()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 102530333\n"


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.pth"))
    return buffer.getvalue()


def array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.pth", LFS, "Git LFS pointer for a file of 102,530,333 bytes; in its repository: git lfs pull"),
        ("a.pth", b"\n <!DOCTYPE html><html>", "it is HTML"),
        ("a.pth", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "it is XML"),
        ("model.safetensors.index.json", b'{"weight_map": {}}', 'it has no "weight_map"'),
        ("config.json", b'{"a": 1}', "it is JSON"),
        ("a.pth.gz", gzip.compress(TINY), "gunzip"),
        ("a.tar", tarred(), "tar archive"),
        ("a.npz", zipped("a.npy"), "NumPy archive"),
        ("a.npy", array(), "NumPy array"),
        ("a.zip", zipped("b/model.pth", "readme.txt"), "it holds 'b/model.pth'"),
        ("a.pt", zipped("a/data.pkl", "a/code/b.py", "a/constants.pkl"), "TorchScript"),
        ("a.onnx", b"\x08\x07\x12\x07pytorch", "ONNX"),
        ("a.index", bytes(2) + b"\x01" * 50 + bytes.fromhex("57fb808b247547db"), "TensorFlow checkpoint"),
        ("a.data-00000-of-00001", b"\x9c\x01\xf3" * 30, "TensorFlow checkpoint"),
        ("checkpoint", b'model_checkpoint_path: "a"', "TensorFlow checkpoint"),
        ("a.msgpack", b"\x83\xa6params", "msgpack"),
        ("a.pth", b"", "it is empty"),
        ("a.pth", bytes(5000), "zeros only"),
        ("a.pth", "Café: a text\n".encode(), "it is a text file"),
        ("a.pth", b"\x9c\x01\xf3\xfe" * 30, "the bytes 9c 01 f3 fe"),
        ("a.pth", TINY[:-10], "is it complete?"),
        ("a.safetensors", zipped("a/data.pkl")[:-10], "is it complete?"),
        ("a.pth", struct.pack("<Q", 1000) + b"{}", "is it complete?"),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / name)
    assert part in str(error.value)
    assert "fetch it again" not in str(error.value) or part in ("is it complete?", "it is empty", "zeros only")
    assert len(str(error.value)) < 230 + len(str(tmp_path))


@pytest.mark.parametrize("name", ["a.bin", "a.pth", "a", "pytorch_model.bin"])
def test_safetensors_are_read_under_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TINY)
    assert read_weights(tmp_path / name).provenance["width"] == 16


def test_a_folder_gives_its_weights_or_says_what_it_holds(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(UserError) as error:
            load_pretrained(str(tmp_path))
        return str(error.value)

    assert "is a folder without model.safetensors" in message()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"fc.bias": "a.safetensors"}}')
    assert "a.safetensors is missing, which model.safetensors.index.json names" in message()
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "epoch3.pth").write_bytes(TINY)
    assert "it holds epoch3.pth" in message()
    (tmp_path / "checkpoints").mkdir()
    assert "is a run's workdir" in message()
    (tmp_path / "pytorch_model.bin").write_bytes(TINY)
    assert load_pretrained(str(tmp_path)).provenance["width"] == 16


@pytest.mark.parametrize(
    ("address", "part"),
    [
        ("https://example.com/a.pth", "https://example.com/a.pth is a URL; only names are fetched"),
        ("https://download.pytorch.org/models/resnet18-f37072fd.pth", "the name of this one is resnet18.tv_in1k_v1"),
        ("hf://timm/a", "only names are fetched"),
        ("timm/resnet50.a1_in1", "similar names: resnet50.a1_in1k"),
    ],
)
def test_an_address_is_not_taken_for_a_file(address: str, part: str) -> None:
    with pytest.raises(UserError) as error:
        load_pretrained(address)
    assert part in str(error.value)


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pth")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    for name, part in (("fifo.pth", "it is a FIFO"), ("loop.pth", "symbolic links"), ("a\0.pth", "null byte")):
        with pytest.raises(UserError, match=part):
            load_pretrained(str(tmp_path / name))


# ---- hostile pickles ----

NESTED = b")" + b"".join(b"q%ch%ch%c\x86" % (i, i, i) for i in range(30))  # a tuple of 2**30 empty ones
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpuK\x04tQ"
KEY = b"X\x15\0\0\0layer1.0.conv1.weight"


def tensor(shape: bytes) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\0" + shape + b"K\x01\x85\x89}tR"


@pytest.mark.parametrize(
    "pickled",
    [
        b"(" + NESTED + b"K\x01K\x01tQ.",  # as a storage's type
        b"}" + NESTED + b"K\x01s.",  # as a key
        b"}" + KEY + NESTED + b"s.",  # as a tensor
        b"}" + KEY + tensor(NESTED) + b"s.",  # as a shape
        b"}(" + KEY + tensor(b"K\x04\x85") + NESTED + b"Nu.",  # as a key beside tensors
        b"}" + KEY + tensor(b"(" + b"K\x02" * 100_000 + b"t") + b"s.",
        b"}" + KEY + tensor(b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b"\x85") + b"s.",
        b"}(\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b"q\0N" + b"h\0N" * 100_000 + b"u.",
        b"(" * 3_000_000 + b".",
        b"}(" + KEY + tensor(b"K\x04\x85") + b"X" + struct.pack("<I", 10**7) + b"a." * 5_000_000 + b"Nu.",
        b"]("
        + b"K\x01K\x02\x86" * 9999
        + b"eq\0"
        + b"0ccollections\nOrderedDict\nq\x01("
        + b"h\x01h\0\x85R" * 9999
        + b"l.",
        b"}(" + b"h\0" + b".",
        b"I" + b"9" * 100_000 + b"\n.",
        b"}q\0" + KEY + b"h\0s.",  # holds itself
    ],
    ids=range(14),
)
def test_hostile_pickles_are_refused_quickly(tmp_path: Path, pickled: bytes) -> None:
    """Nothing is hashed, formatted or multiplied before its type is known: these would take minutes or gigabytes."""
    path = tmp_path / "hostile.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + pickled)
        archive.writestr("a/data/0", bytes(16))
    with pytest.raises(UserError, match=r"hostile\.pth"):
        read_weights(path)


def test_a_pickled_call_beside_the_weights_is_not_made(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"a": torch.ones(1), "b": Touch()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="not named as those of jaxft's networks"):
        read_weights(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()
