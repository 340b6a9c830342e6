"""Recognises a file's format, mostly by its first bytes."""

import json
import os
import re
import struct
import zipfile
from typing import IO, NamedTuple

ZIP, LEGACY, SAFETENSORS = "PyTorch", "PyTorch before 1.6", "safetensors"  # the formats that are read
INDEX = "index of a checkpoint in several files"  # as is this one, with the files that it names
MAX_HEADER = 100_000_000  # bytes of a safetensors header, the limit of its library
_HEAD = 1024  # bytes that are looked at; tar's signature is at 257
_TABLE_MAGIC = bytes.fromhex("57fb808b247547db")  # the end of a LevelDB table, as a TensorFlow .index file is

_KERAS = "Keras's ResNets are v1, with the stride in the first 1x1, which jaxft does not have"
_SAVE = "save the network's state_dict in PyTorch: torch.save(model.state_dict(), FILE)"
_UNPACK = "unpack it, and give the weights file that it holds"

# First bytes, the format, and what to do.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip", "unpack it with gunzip, and give the weights file that it holds"),
    (b"BZh", "bzip2", "unpack it with bunzip2, and give the weights file that it holds"),
    (b"\xfd7zXZ", "xz", "unpack it with unxz, and give the weights file that it holds"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "unpack it with unzstd, and give the weights file that it holds"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip", _UNPACK),
    (b"Rar!", "RAR", _UNPACK),
    (b"\x93NUMPY", "NumPy array", _SAVE),
    (b"\x89HDF\r\n\x1a\n", "HDF5", f"such as Keras writes; {_KERAS}"),
    (b"GGUF", "GGUF", "such as llama.cpp reads; give a weights file of a ResNet"),
    (b"\x89PNG", "PNG image", "give a weights file"),
    (b"\xff\xd8\xff", "JPEG image", "give a weights file"),
    (b"%PDF", "PDF", "give a weights file"),
    (b"\x7fELF", "ELF", "a program; give a weights file"),
)


class Format(NamedTuple):
    name: str
    problem: str = ""  # why jaxft does not read it, and what to do; '' for the formats that it reads


def identify(file: IO[bytes], name: str) -> Format:
    """Returns the format of an open file called `name`. Leaves the file at its start."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(max(size - 8, 0))
    tail = file.read(8)
    file.seek(0)
    head = file.read(_HEAD)
    found = _binary(head, tail, size, name) or _text(head, file, name)
    file.seek(0)
    return found


def _binary(head: bytes, tail: bytes, size: int, name: str) -> Format | None:
    if not size:
        return Format("empty", "it is empty; fetch it again")
    if not any(head) and size >= 16:
        return Format("zeros", "it begins with zeros only, as an unfinished download does; fetch it again")
    if head[:4] == b"PK\x03\x04":
        return Format(ZIP)
    if head[:4] == b"PK\x05\x06":
        return Format("zip", "it is an empty zip archive")
    if (part := re.search(r"-(\d{5})-of-(\d{5})\.(safetensors|bin)$", name)) and part[2] != "00001":
        text = f"it is one of {int(part[2])} files of a checkpoint; give their folder, or their index (*.index.json)"
        return Format("shard", text)
    for signature, kind, remedy in _SIGNATURES:
        if head.startswith(signature):
            return Format(kind, f"its format is {kind}; {remedy}")
    if head[257:262] == b"ustar":
        return Format("tar", f"it is a tar archive; {_UNPACK}")
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= MAX_HEADER:
        return Format(SAFETENSORS)
    if head[0] == 0x80 and len(head) > 1 and 2 <= head[1] <= 5:  # a pickle's protocol
        return Format(LEGACY)
    if tail == _TABLE_MAGIC or re.search(r"\.data-\d{5}-of-\d{5}$", name):
        return Format("TensorFlow checkpoint", f"it is a part of a TensorFlow checkpoint; {_SAVE}")
    if head[4:8] == b"TFL3":
        return Format("TensorFlow Lite", f"it is a TensorFlow Lite file; {_SAVE}")
    if name == "saved_model.pb":
        return Format("TensorFlow SavedModel", f"it is a TensorFlow SavedModel; {_SAVE}")
    if head[0] == 0x08 and len(head) > 2 and head[1] < 32 and head[2] in (0x12, 0x3A, 0x42):  # ir_version, a string
        return Format("ONNX", f"it is an ONNX file, whose weights may be folded or renamed; {_SAVE}")
    if name.endswith(".msgpack"):
        return Format("Flax msgpack", f"it is a msgpack file of Flax; {_SAVE}")
    return None


def _text(head: bytes, file: IO[bytes], name: str) -> Format:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"version https://git-lfs"):
        size = re.search(rb"^size (\d{1,18})$", text, re.MULTILINE)
        stands_for = f" for a file of {int(size[1]):,} bytes" if size else ""
        return Format("Git LFS pointer", f"it is a Git LFS pointer{stands_for}; in its repository: git lfs pull")
    if text.startswith(b"<"):
        kind = "XML" if text.startswith(b"<?xml") else "HTML"
        remedy = "a web page or a server's error; fetch the file from its direct address"
        return Format(kind, f"it is {kind}: {remedy}" + (" (/resolve/, not /blob/)" if b"hugging" in head else ""))
    if text[:1] in (b"{", b"["):
        return _json(file)
    if text.startswith(b"model_checkpoint_path"):
        return Format("TensorFlow checkpoint", f"it names a TensorFlow checkpoint; {_SAVE}")
    if not re.search(rb"[^\t\n\r\x1b\x20-\x7e\x80-\xff]", head) and _decodes(head):
        return Format("text", f"it is a text file, which begins {_begin(text)}; give a weights file")
    first = head[:4].hex(" ")
    return Format("unknown", f"it begins with the bytes {first}, which no format of weights does; is it complete?")


def _json(file: IO[bytes]) -> Format:
    """Returns the format of a JSON file, judged by its first megabyte."""
    file.seek(0)
    if b'"weight_map"' in file.read(1 << 20):
        return Format(INDEX)
    return Format("JSON", "it is JSON; give the weights file (such as model.safetensors) that belongs to it")


def _decodes(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 4 and len(head) == _HEAD  # cut within a character
    return True


def _begin(text: bytes) -> str:
    return json.dumps(text.decode(errors="replace").split("\n")[0][:30], ensure_ascii=True)


def other_zip(archive: zipfile.ZipFile) -> Format | None:
    """Returns the format of a zip archive that torch.save did not write; None if it did."""
    names = archive.namelist()
    pickles = [name for name in names if name.endswith("/data.pkl") or name == "data.pkl"]
    if "model.weights.h5" in names:
        return Format("Keras", f"it is a Keras file; {_KERAS}")
    if any("/code/" in f"/{name}" for name in names) and pickles:
        return Format("TorchScript", f"it is a TorchScript archive; {_SAVE}")
    if any(name.endswith(("exported_program.json", "models/model.json")) for name in names):
        return Format("torch.export archive", f"it is an archive of torch.export; {_SAVE}")
    if names and all(name.endswith(".npy") for name in names):
        return Format("NumPy archive", f"it is a NumPy archive (.npz); {_SAVE}")
    if len(pickles) != 1 or "/" not in pickles[0]:
        weights = [name for name in names if name.endswith((".pth", ".pt", ".bin", ".safetensors", ".ckpt"))]
        held = f"it holds {weights[0]!a}; " if weights else ""
        return Format("zip", f"it is a zip archive that torch.save did not write; {held}{_UNPACK}")
    return None
