"""Reads and writes .pth and .safetensors files without torch; code in a pickle is never executed."""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from jaxft.errors import UserError
from jaxft.files import atomic_write

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
MOST_GROWTH = 10  # bytes of tensors per byte of their file, so that a small file cannot fill the memory
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
    """The file holds something that a weights file does not need."""


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


class _Unpickler(pickle._Unpickler):
    """An unpickler of ordered dicts and tensors only.

    Derived from the Python implementation: the C one allocates memory for any memo index that a damaged file names.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]  # allocates memory for any length that a file names

    def load_build(self: Any) -> None:
        """Ignores the attributes that a file sets on an object, such as a state_dict's _metadata."""
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
        raise _RefusedError(f"it asks for {module}.{name}, which does not belong in a weights file")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, name, key, *_ = pid
        if kind != "storage" or name not in _DTYPES or not isinstance(key, str):
            raise _RefusedError(f"it holds a {kind!r} of {name!r} where a tensor's storage belongs")
        return _Storage(np.dtype(_DTYPES[name]), key)


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Returns {key: array} of a state_dict in a .safetensors file or in torch.save's format, zip or legacy.

    Unwraps {'state_dict': ...} and {'model': ...} and removes the prefix 'module.' of keys. Raises UserError if the
    file is missing, damaged or holds something else.
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
    """Reads torch's old format: pickled magic number, version, machine, object, storage keys; then the storages."""
    file = io.BytesIO(path.read_bytes())  # unlike a file, it does not allocate memory for a wrong length
    if _Unpickler(file).load() != _LEGACY_MAGIC:
        raise ValueError("not a torch file")
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
            raise _RefusedError(f"its entry {key!r} is not a tensor")
    return content


def _arrays(tensors: dict[str, _Tensor], data: dict[str, bytes]) -> dict[str, np.ndarray]:
    size = sum(math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in tensors.values())
    if size > MOST_GROWTH * sum(map(len, data.values())):
        raise _RefusedError("its tensors repeat the same numbers")
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
    """Writes a state_dict as .safetensors, or as .pth in torch.save's zip format.

    Raises UserError if the file cannot be written.
    """
    path = Path(path)
    tensors = {key: np.asarray(array, order="C") for key, array in tensors.items()}
    try:
        with atomic_write(path) as file:
            if path.suffix == ".safetensors":
                safetensors.numpy.save_file(tensors, file.name)
            else:
                _write_zip(file, tensors)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def _write_zip(file: IO[bytes], tensors: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(file, "w") as archive:  # torch requires stored, not compressed, members
        archive.writestr("archive/data.pkl", _pickle_state_dict(tensors))
        archive.writestr("archive/byteorder", "little")
        for i, array in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{i}", array.tobytes())
        archive.writestr("archive/version", "3\n")


def _pickle_state_dict(tensors: dict[str, np.ndarray]) -> bytes:
    """Returns the pickle that torch.save writes for contiguous tensors that each have their own storage."""

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
