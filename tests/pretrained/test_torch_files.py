"""Files written by torch.save and safetensors, and damaged or hostile ones."""

import io
import os
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.errors import UserError
from jaxft.pretrained.torch_files import read_tensors, write_tensors
from tests.helpers.reference import torch

DTYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}


def save(state: Any, path: Path, kind: str) -> Path:
    path = path.with_suffix(".safetensors" if kind == "safetensors" else ".pth")
    if kind == "safetensors":
        safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@settings(deadline=None, max_examples=30)
@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from(list(DTYPES)),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_tensor_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, kind: str, shape: list[int], dtype: Any, transposed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.rand(shape, generator=generator) * 300 - 100).to(dtype)
    if transposed:
        tensor = tensor.permute(list(reversed(range(tensor.ndim))))
    path = save({"a.weight": tensor}, tmp_path_factory.mktemp("files") / "file", kind)
    array = read_tensors(path)["a.weight"]
    assert (array.dtype, array.shape) == (DTYPES[dtype], tensor.shape)
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array.astype(np.float64), tensor.double().numpy())


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_views_of_one_storage_are_read(tmp_path: Path, kind: str) -> None:
    base = torch.arange(24.0)
    views = {"whole": base.view(4, 6), "part": base[6:12], "every_third": base[1::3], "column": base.view(4, 6)[:, 2]}
    arrays = read_tensors(save(views, tmp_path / "file", kind))
    for key, view in views.items():
        np.testing.assert_array_equal(arrays[key], view.numpy())


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_the_dict_with_the_most_tensors_is_read(tmp_path: Path, kind: str) -> None:
    state = OrderedDict({"fc.bias": torch.nn.Parameter(torch.ones(2)), "fc.weight": torch.ones(2, 3)})
    path = save({"loss": torch.ones(()), "model": state, "epoch": 3}, tmp_path / "file", kind)
    np.testing.assert_array_equal(read_tensors(path)["fc.bias"], [1, 1])


def test_tensors_of_older_and_newer_torch_are_read(tmp_path: Path) -> None:
    """Until April 2018, torch wrote _rebuild_tensor with four arguments; a tensor with attributes has its own form."""
    tensor = torch.arange(6.0).view(2, 3)
    tensor.note = "kept by torch"  # type: ignore[attr-defined]
    path = save({"a": tensor}, tmp_path / "file", "zip")
    assert read_tensors(path)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    path = save({"a": torch.arange(6.0)}, tmp_path / "file", "zip")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = members["file/data.pkl"]
    end = pickled.index(b"\x89")  # requires_grad=False, then an OrderedDict of hooks
    old = (
        pickled[:end].replace(b"_rebuild_tensor_v2", b"_rebuild_tensor") + pickled[pickled.index(b"Rq", end + 1) + 3 :]
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, old if name == "file/data.pkl" else content)
    assert read_tensors(path)["a"].tolist() == [0, 1, 2, 3, 4, 5]


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_is_named_and_not_run(tmp_path: Path, kind: str) -> None:
    content = {"fc.bias": Hostile(tmp_path / "ran")}
    path = tmp_path / "file.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        save(content, path, kind)
    message = "torch.save did not write" if kind == "pickle" else r"'fc\.bias' is an object of posix\.system"
    with pytest.raises(UserError, match=message):
        read_tensors(path)
    if kind != "pickle":
        save({"state": {"fc.bias": torch.ones(2)}, "args": Hostile(tmp_path / "ran")}, path, kind)
        assert read_tensors(path)["fc.bias"].tolist() == [1, 1]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_named_in_the_error(tmp_path: Path, kind: str) -> None:
    path = save({"a": torch.rand(50), "b": torch.rand(50)}, tmp_path / "file", kind)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 29):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=path.name):
            read_tensors(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_damaged_file_gives_tensors_or_a_user_error(tmp_path: Path, kind: str) -> None:
    path = save({"a": torch.rand(20), "b": torch.rand(3, 3)}, tmp_path / "file", kind)
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            read_tensors(path)
        except UserError as error:
            assert path.name in str(error)


def test_flipped_bytes_in_a_zip_are_detected(tmp_path: Path) -> None:
    path = save({"a": torch.ones(100)}, tmp_path / "file", "zip")
    whole = path.read_bytes()
    data = np.ones(100, np.float32).tobytes()
    path.write_bytes(whole.replace(data, data[:200] + b"\0\0\0\0" + data[204:]))
    with pytest.raises(UserError, match="CRC"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(2), "not a state_dict"),
        ([1, 2], "holds a list"),
        ({"a": 1}, "'a' is an int"),
        ({1: torch.ones(1)}, "an int is a key"),
        ({"a": torch.ones(1), "b": None}, "'b' is nothing, not a tensor"),
        (
            {"a": torch.ones(1), "b": torch.ones(1, dtype=torch.complex64)},
            "'b' is a tensor of torch.ComplexFloat, not a",
        ),
        (torch.nn.Linear(2, 2), r"pickled torch\.nn\.modules\.linear\.Linear.*torch\.save\(model\.state_dict"),
        ({"model": torch.nn.Linear(2, 2)}, r"'model' is an object of torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_tensors(save(content, tmp_path / "file", "zip"))


def test_an_expanded_tensor_is_read(tmp_path: Path) -> None:
    path = save({"a": torch.tensor(2.0).expand(5), "b": torch.ones(3)}, tmp_path / "file", "zip")
    np.testing.assert_array_equal(read_tensors(path)["a"], [2, 2, 2, 2, 2])


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    """A forged size must not read other memory or make a large array of a small file."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3, 5)}, buffer)
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                assert b"K\x03K\x05\x86" in content  # the pickled tuple (3, 5)
                content = content.replace(b"K\x03K\x05\x86", b"K\x03K\xff\x86")
            new.writestr(name, content)
    with pytest.raises(UserError, match="repeat the same numbers"):
        read_tensors(path)


def test_a_forged_size_allocates_nothing(tmp_path: Path) -> None:
    """The central directory of a zip says 1 GiB for a member of some bytes."""
    path = save({"a": torch.ones(3)}, tmp_path / "file", "zip")
    whole = bytearray(path.read_bytes())
    entry = whole.rindex(b"file/data/0") - 46  # the fixed part of an entry; its compressed size is at 20
    whole[entry + 20 : entry + 24] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(whole)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="a member is larger than the file"):
            read_tensors(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_missing_file_is_named_in_the_error(tmp_path: Path) -> None:
    for name in ("none.pth", "none.safetensors"):
        with pytest.raises(UserError, match=f"no weights file .*{name}"):
            read_tensors(tmp_path / name)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@settings(deadline=None, max_examples=30)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=3),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**16),
)
def test_torch_loads_written_files(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, shapes: list[list[int]], dtype: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    arrays = {f"layer.{i}": (rng.random(shape) * 200).astype(DTYPES[dtype]).T for i, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("files") / f"file{suffix}"
    write_tensors(path, arrays)
    load = safetensors.torch.load_file if suffix == ".safetensors" else torch.load  # weights_only, by default
    loaded = load(path)
    assert loaded.keys() == arrays.keys()
    for key, array in arrays.items():
        assert (loaded[key].dtype, tuple(loaded[key].shape)) == (dtype, array.shape)
        np.testing.assert_array_equal(loaded[key].double().numpy(), array.astype(np.float64))


def test_keras_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    """Recognises HDF5 by its signature (HDF5's format specification) and .keras by the names in its zip."""
    (tmp_path / "resnet50.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with zipfile.ZipFile(tmp_path / "resnet50.keras", "w") as archive:
        archive.writestr("model.weights.h5", b"")
    for name in ("resnet50.h5", "resnet50.keras"):
        with pytest.raises(UserError, match="the stride in the first 1x1"):
            read_tensors(tmp_path / name)
