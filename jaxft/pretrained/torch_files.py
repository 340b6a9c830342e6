"""Reads and writes .pth and .safetensors files without torch; nothing in a pickle is executed."""

import hashlib
import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from jaxft.errors import UserError
from jaxft.files import atomic_write, open_regular, reason
from jaxft.pretrained import formats
from jaxft.pretrained.joined import Joined, load_joined
from jaxft.pretrained.shards import by_shard, join_contents, read_index
from jaxft.pretrained.state_dict import excerpt, kind_of, largest, without_tensors
from jaxft.pretrained.unpickle import MAX_KEY, STORAGES, Foreign, RefusedError, Tensor, Unpickler

TORCHVISION_FILES = "https://download.pytorch.org/models/ (resnet50-0676ba61.pth)"
MOST_GROWTH = 10  # bytes of tensors per byte of their file, so that a small file cannot fill the memory
MAX_PICKLE = 1 << 26  # bytes of all that a checkpoint holds besides its tensors
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py, MAGIC_NUMBER
_STORAGE_NAMES = {dtype: name.removeprefix("torch.") for name, dtype in STORAGES.items()}
_SAFETENSORS_DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8},
}


_Read = Callable[[Mapping[str, Tensor]], dict[str, np.ndarray]]


class TensorFile(NamedTuple):
    """An open weights file. Its structure has been read; its tensors are read on demand."""

    format: str
    content: Any  # nested containers with Tensor and Foreign in them
    metadata: Mapping[str, str]  # of a .safetensors file
    load: Callable[[Mapping[str, Tensor | Joined]], dict[str, np.ndarray]]
    sha256: Callable[[], str]


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Opens a .safetensors file, or one in torch.save's format, zip or legacy, whatever its name is.

    The index of a checkpoint in several files is opened as one file with the tensors of all. Raises UserError if a file
    is missing, damaged or of another format; so does its `load`.
    """
    with open_weights(path) as file, ExitStack() as stack:
        found = _identify(path, file, path.name)
        if found.name != formats.INDEX:
            yield _open(path, file, found)
            return
        index = read_index(path)
        shards: dict[str, TensorFile] = {}
        for name in sorted({*index.values()}):
            shard = path.with_name(name)
            if not os.path.lexists(shard):
                raise UserError(f"{shard} is missing, which {path.name} names; fetch it into the same folder")
            opened = stack.enter_context(open_weights(shard))
            shards[name] = _open(shard, opened, _identify(shard, opened, ""))
        yield _join(path, index, shards)


def _identify(path: Path, file: IO[bytes], name: str) -> formats.Format:
    with _translated(path, "a weights file"):
        found = formats.identify(file, name)
        if found.problem:
            raise RefusedError(found.problem)
        return found


def _open(path: Path, file: IO[bytes], found: formats.Format) -> TensorFile:
    """Reads the structure of an open file of one of the formats that hold tensors."""
    open_as = {formats.ZIP: _open_zip, formats.LEGACY: _open_legacy, formats.SAFETENSORS: _open_safetensors}
    with _translated(path, found.name):
        if found.name not in open_as:
            raise RefusedError(f"it is {found.name}, not a file of tensors")
        content, metadata, read = open_as[found.name](path, file)

    def load(tensors: Mapping[str, Tensor | Joined]) -> dict[str, np.ndarray]:
        with _translated(path, found.name):
            return load_joined(tensors, read)

    def sha256() -> str:
        with _translated(path, found.name):
            file.seek(0)
            return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()

    return TensorFile(found.name, content, metadata, load, sha256)


def _join(path: Path, index: Mapping[str, str], shards: Mapping[str, TensorFile]) -> TensorFile:
    """Returns open shards as one file, whose SHA-256 is that of the lines that `sha256sum SHARDS` prints."""
    content = join_contents(path, index, {name: shard.content for name, shard in shards.items()})

    def read(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for name, held in by_shard(tensors).items():
            arrays |= shards[name].load(held)
        return arrays

    def sha256() -> str:
        lines = [f"{shard.sha256()}  {name}\n" for name, shard in shards.items()]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    first = next(iter(shards.values()))
    return TensorFile(first.format, content, {}, lambda tensors: load_joined(tensors, read), sha256)


@contextmanager
def open_weights(path: Path) -> Iterator[IO[bytes]]:
    """Opens a weights file of any format. Raises UserError if it is missing, not readable or not a regular file."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise UserError(f"there is no weights file {path}; torchvision's are at {TORCHVISION_FILES}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    with file:
        yield file


@contextmanager
def _translated(path: Path, kind: str) -> Iterator[None]:
    """Turns any exception about a damaged or unsuitable file into a UserError."""
    try:
        yield
    except RefusedError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    except Exception as error:  # a damaged pickle can raise anything
        detail = excerpt(f"{type(error).__name__}: {error}", 80)
        raise UserError(
            f"{path} cannot be read as {kind} ({detail}); is it complete? compare its size, and fetch it again"
        ) from error


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Returns {key: array} of a file's state_dict, the dict that holds the most tensors.

    Raises UserError if the file is missing, damaged or holds something else.
    """
    path = Path(path)
    with open_tensors(path) as file:
        found = largest(file.content)
        if found is None:
            raise UserError(f"{path} is refused: {without_tensors(file.content)}")
        for key, value in found.items():
            if type(key) is not str:
                raise UserError(f"{path} is refused: {kind_of(key)} is a key of its tensors")
            if not isinstance(value, Tensor):
                raise UserError(f"{path} is refused: its entry {excerpt(key)!r} is {kind_of(value)}, not a tensor")
        return file.load(found)


def _open_zip(path: Path, file: IO[bytes]) -> tuple[Any, Mapping[str, str], _Read]:
    archive = zipfile.ZipFile(file)
    if other := formats.other_zip(archive):
        raise RefusedError(other.problem)
    size = file.seek(0, io.SEEK_END)
    if sum(info.file_size for info in archive.infolist()) > MOST_GROWTH * size:
        raise RefusedError("it unpacks to far more than its own size")
    if any(info.compress_size > size for info in archive.infolist()):  # zipfile would allocate as much
        raise ValueError("a member is larger than the file")
    (pickle_name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if archive.getinfo(pickle_name).file_size > MAX_PICKLE:
        raise RefusedError(f"it holds more than {MAX_PICKLE:,} bytes besides its tensors")
    folder = pickle_name.removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
        raise RefusedError("it was written on a big-endian machine")
    content = Unpickler().load(io.BytesIO(archive.read(pickle_name)))

    def read(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        storages = {tensor.storage for tensor in tensors.values()}
        return _arrays(tensors, {key: archive.read(f"{folder}data/{key}") for key in storages})  # checks their CRC

    return content, {}, read


class _Bounded:
    """The beginning of a file. Reading with a wrong length from the file does not allocate that much memory."""

    def __init__(self, file: IO[bytes], end: int) -> None:
        self._file, self._end = file, end

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int) -> bytes:
        return self._file.read(max(min(size, self._end - self._file.tell()), 0))

    def readline(self) -> bytes:
        return self._file.readline(max(self._end - self._file.tell(), 0))


def _open_legacy(path: Path, file: IO[bytes]) -> tuple[Any, Mapping[str, str], _Read]:
    """Reads torch's old format: pickled magic number, version, machine, object, storage keys; then the storages."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    pickles, unpickler = _Bounded(file, min(size, MAX_PICKLE)), Unpickler()
    magic = unpickler.load(pickles)
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise RefusedError(
            f"it is a pickle of {kind_of(magic)} that torch.save did not write; torch.save(model.state_dict(), FILE)"
        )
    _, machine, content, keys = (unpickler.load(pickles) for _ in range(4))
    if type(machine) is dict and machine.get("little_endian") is False:
        raise RefusedError("it was written on a big-endian machine")
    places: dict[str, tuple[int, int]] = {}
    for key in keys if type(keys) is list else ():
        (count,) = struct.unpack("<Q", file.read(8))
        if type(key) is not str or key not in unpickler.storages:
            raise RefusedError("it holds numbers of a type that weights do not have (complex or quantized)")
        length = count * unpickler.storages[key].itemsize
        places[key] = file.tell(), length
        if file.tell() + length > size:
            raise ValueError("the file ends within a tensor")
        file.seek(length, io.SEEK_CUR)

    def read(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        data = {}
        for key in {tensor.storage for tensor in tensors.values()}:
            start, length = places[key]
            file.seek(start)
            data[key] = file.read(length)
        return _arrays(tensors, data)

    return content, {}, read


def _open_safetensors(path: Path, file: IO[bytes]) -> tuple[Any, Mapping[str, str], _Read]:
    opened = safe_open(path, "np")
    content: dict[str, Any] = {}
    for key in opened.keys():  # noqa: SIM118 - not a dict
        if len(key) > MAX_KEY:
            raise RefusedError(f"the name of one of its tensors has {len(key):,} characters")
        part = opened.get_slice(key)
        dtype = _SAFETENSORS_DTYPES.get(part.get_dtype())
        shape = tuple(part.get_shape())
        content[key] = Foreign(f"{part.get_dtype()}Storage") if dtype is None else Tensor(np.dtype(dtype), shape, key)

    def read(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return {key: opened.get_tensor(tensor.storage) for key, tensor in tensors.items()}

    return content, opened.metadata() or {}, read


def _arrays(tensors: Mapping[str, Tensor], data: dict[str, bytes]) -> dict[str, np.ndarray]:
    size = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    if size > MOST_GROWTH * sum(map(len, data.values())):
        raise RefusedError("its tensors repeat the same numbers")
    return {key: _array(tensor, data[tensor.storage]) for key, tensor in tensors.items()}


def _array(tensor: Tensor, data: bytes) -> np.ndarray:
    storage = np.frombuffer(data, tensor.dtype)
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if count and not tensor.offset <= last < len(storage):
        raise ValueError("a tensor reaches outside its storage")
    if not count:
        return np.empty(tensor.shape, tensor.dtype)
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
                write_safetensors(file, tensors)
            else:
                _write_zip(file, tensors)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a path with NUL
        raise UserError(f"{path} cannot be written: {reason(error)}; name another file") from None


def write_safetensors(file: IO[bytes], tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors to an open file and keeps its permissions, which the library would restrict to the owner."""
    mode = os.fstat(file.fileno()).st_mode & 0o777
    safetensors.numpy.save_file(tensors, file.name, metadata)
    Path(file.name).chmod(mode)


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
        storage = name("torch", _STORAGE_NAMES[array.dtype])
        size = pickle.LONG1 + b"\x08" + struct.pack("<q", array.size)
        strides = [stride // array.itemsize for stride in array.strides]
        pickled += text(key) + name("torch._utils", "_rebuild_tensor_v2") + pickle.MARK
        pickled += pickle.MARK + text("storage") + storage + text(str(i)) + text("cpu") + size
        pickled += pickle.TUPLE + pickle.BINPERSID
        pickled += pickle.BININT1 + b"\0" + integers(array.shape) + integers(strides) + pickle.NEWFALSE + ordered_dict
        pickled += pickle.TUPLE + pickle.REDUCE
    return pickled + pickle.SETITEMS + pickle.STOP
