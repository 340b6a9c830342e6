"""Reads and writes the tensors of .pth and .safetensors files without torch, and runs nothing a file asks to run."""

import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from jaxft.errors import UserError

_DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


_STORAGES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


TORCHVISION_FILES = "https://download.pytorch.org/models/ (resnet50-0676ba61.pth)"


MOST_GROWTH = 10  # of tensors against their file: a small file must not fill the memory


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py, MAGIC_NUMBER


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


class _RefusedError(Exception):
    pass


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


class _Unpickler(pickle._Unpickler):
    """Knows ordered dicts and tensors, and nothing else.

    The one written in Python: the one in C makes room for whatever memo index a damaged file names.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]  # makes room for whatever length it names

    def load_build(self: Any) -> None:
        """The attributes that a file gives an object (a state_dict's _metadata) are dropped."""
        self.stack.pop()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in _DTYPES:
            return name
        raise _RefusedError(f"it asks for {module}.{name}, which is no part of a file of weights")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, name, key, *_ = pid
        if kind != "storage" or name not in _DTYPES or not isinstance(key, str):
            raise _RefusedError(f"it holds a {kind!r} of {name!r} where a tensor's storage belongs")
        return _Storage(np.dtype(_DTYPES[name]), key)


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """{key: array} of a state_dict in a .safetensors file or in torch.save's format, zip or legacy.

    A state_dict wrapped as {'state_dict': ...} or {'model': ...} and keys with a 'module.' prefix are unwrapped.
    Raises UserError where the file is missing, damaged or holds something else.
    """
    path = Path(path)
    try:
        if _is_keras(path):
            raise _RefusedError("it is a Keras file; Keras's ResNets are v1, with the stride in the first 1x1")
        if path.suffix == ".safetensors":
            tensors = safetensors.numpy.load_file(path)
        elif zipfile.is_zipfile(path):
            tensors = _read_zip(path)
        else:
            tensors = _read_legacy(path)
    except FileNotFoundError:
        raise UserError(f"there is no weights file {path}; torchvision's are at {TORCHVISION_FILES}") from None
    except _RefusedError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}; is it complete? fetch it again") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"{path} cannot be read as a .pth or .safetensors file ({type(error).__name__}: {error}); "
            "is it complete? fetch it again"
        ) from error
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def _is_keras(path: Path) -> bool:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return "model.weights.h5" in archive.namelist()
    with path.open("rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def _read_zip(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        if sum(info.file_size for info in archive.infolist()) > MOST_GROWTH * path.stat().st_size:
            raise _RefusedError("it unpacks to far more than its own size")
        (pickle_name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = pickle_name.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise _RefusedError("it was written on a big-endian machine")
        tensors = _state_dict(_Unpickler(io.BytesIO(archive.read(pickle_name))).load())
        storages = {tensor.storage.key for tensor in tensors.values()}
        data = {key: archive.read(f"{folder}data/{key}") for key in storages}  # checks their CRC
    return _arrays(tensors, data)


def _read_legacy(path: Path) -> dict[str, np.ndarray]:
    """Pickles of magic number, version, machine, object and storage keys, then each storage with its length."""
    file = io.BytesIO(path.read_bytes())  # which reads no more than there is, whatever a length says
    if _Unpickler(file).load() != _LEGACY_MAGIC:
        raise ValueError("no torch file")
    _Unpickler(file).load()
    _Unpickler(file).load()
    tensors = _state_dict(_Unpickler(file).load())
    dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in tensors.values()}
    data = {}
    for key in _Unpickler(file).load():
        (count,) = struct.unpack("<Q", file.read(8))
        data[key] = file.read(count * dtypes[key].itemsize)
    return _arrays(tensors, data)


def _state_dict(content: Any) -> dict[str, _Tensor]:
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise _RefusedError(f"it holds a {type(content).__name__}, not a state_dict")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, _Tensor):
            raise _RefusedError(f"its entry {key!r} is no tensor")
    return content


def _arrays(tensors: dict[str, _Tensor], data: dict[str, bytes]) -> dict[str, np.ndarray]:
    size = sum(math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in tensors.values())
    if size > MOST_GROWTH * sum(map(len, data.values())):
        raise _RefusedError("its tensors show the same numbers over and over")
    return {key: _array(tensor, data[tensor.storage.key]) for key, tensor in tensors.items()}


def _array(tensor: _Tensor, data: bytes) -> np.ndarray:
    storage = np.frombuffer(data, tensor.storage.dtype)
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if count and not (0 <= tensor.offset <= last < len(storage) and count <= len(storage)):
        raise ValueError("a tensor reaches outside its storage")
    if min((*tensor.shape, *tensor.strides), default=0) < 0:
        raise ValueError("a tensor of negative size")
    strides = [stride * storage.itemsize for stride in tensor.strides]
    return np.asarray(np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides), order="C")


def write_tensors(path: str | Path, tensors: dict[str, np.ndarray]) -> None:
    """A state_dict as .safetensors, or as .pth in torch.save's zip format; it appears whole or not at all."""
    path = Path(path)
    tensors = {key: np.asarray(array, order="C") for key, array in tensors.items()}
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        if path.suffix == ".safetensors":
            safetensors.numpy.save_file(tensors, partial)
        else:
            with zipfile.ZipFile(partial, "w") as archive:  # stored, not compressed, as torch wants it
                archive.writestr("archive/data.pkl", _pickle_state_dict(tensors))
                archive.writestr("archive/byteorder", "little")
                for i, array in enumerate(tensors.values()):
                    archive.writestr(f"archive/data/{i}", array.tobytes())
                archive.writestr("archive/version", "3\n")
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _pickle_state_dict(tensors: dict[str, np.ndarray]) -> bytes:
    """The pickle that torch.save writes for contiguous tensors, each with a storage of its own."""

    def text(value: str) -> bytes:
        data = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(data)) + data

    def integers(values: Iterable[int]) -> bytes:
        return pickle.MARK + b"".join(pickle.LONG1 + b"\x08" + struct.pack("<q", n) for n in values) + pickle.TUPLE

    def name(module: str, attribute: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()

    ordered_dict = name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    pickled = pickle.PROTO + b"\x02" + ordered_dict + pickle.MARK
    for i, (key, array) in enumerate(tensors.items()):
        storage = name("torch", _STORAGES[array.dtype])
        size = pickle.LONG1 + b"\x08" + struct.pack("<q", array.size)
        strides = [stride // array.itemsize for stride in array.strides]
        pickled += text(key) + name("torch._utils", "_rebuild_tensor_v2") + pickle.MARK
        pickled += pickle.MARK + text("storage") + storage + text(str(i)) + text("cpu") + size
        pickled += pickle.TUPLE + pickle.BINPERSID
        pickled += pickle.BININT1 + b"\0" + integers(array.shape) + integers(strides) + pickle.NEWFALSE + ordered_dict
        pickled += pickle.TUPLE + pickle.REDUCE
    return pickled + pickle.SETITEMS + pickle.STOP
