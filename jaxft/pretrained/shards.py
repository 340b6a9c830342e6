"""Reads the index of a checkpoint in several files, as save_pretrained and huggingface_hub write it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft.errors import UserError, shortened
from jaxft.files import read_json, reason
from jaxft.pretrained.state_dict import excerpt
from jaxft.pretrained.unpickle import MAX_KEY, Tensor

MAX_INDEX = 20_000_000  # bytes
MAX_SHARDS = 1000


def read_index(path: Path) -> dict[str, str]:
    """Returns {key of a tensor: name of the file beside the index that holds it}.

    Raises UserError if the index is damaged or names a file in another folder.
    """
    try:
        if path.stat().st_size > MAX_INDEX:
            raise ValueError(f"it is larger than {MAX_INDEX / 1e6:.0f} MB")
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ValueError('it has no "weight_map"')
        for key, name in index.items():
            if type(name) is not str or not _is_file_name(name):
                shown = f"{excerpt(key, 40)} is in {excerpt(name, 40)!r}"
                raise ValueError(f"{shown}, which is not a file beside the index")
            if len(key) > MAX_KEY:
                raise ValueError(f"the name of one of its tensors has {len(key):,} characters")
        if (count := len({*index.values()})) > MAX_SHARDS:
            raise ValueError(f"it names {count:,} files")
    except (OSError, ValueError) as error:
        text = excerpt(reason(error), 120)
        raise UserError(f"{path} cannot be read as the index of a checkpoint: {text}; is it complete?") from None
    return index


def _is_file_name(name: str) -> bool:
    return name == Path(name).name and name not in ("", ".", "..") and "\0" not in name and len(name) < 256


def join_contents(path: Path, index: Mapping[str, str], contents: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors of all shards as one state_dict; a tensor's storage is preceded by its file's name and '/'.

    contents: by file name. Raises UserError unless the shards hold exactly the tensors that the index says.
    """
    joined: dict[str, Any] = {}
    for name, content in contents.items():
        held = content if isinstance(content, dict) else {}
        expected = {key for key, shard in index.items() if shard == name}
        if absent := sorted(expected - held.keys()):
            raise UserError(
                f"{path.with_name(name)} lacks {len(absent):,} of the tensors that {path.name} says it holds: "
                f"{shortened([excerpt(key, 40) for key in absent])}; fetch both again from one source"
            )
        if foreign := [key for key in held if key not in expected]:
            raise UserError(
                f"{path.with_name(name)} holds {len(foreign):,} tensors that {path.name} does not name in it: "
                f"{shortened([excerpt(key, 40) for key in foreign])}; fetch both again from one source"
            )
        for key, value in held.items():
            joined[key] = value._replace(storage=f"{name}/{value.storage}") if isinstance(value, Tensor) else value
    return joined


def by_shard(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Splits tensors of `join_contents` by the file that holds them, with the storages of that file."""
    split: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, storage = tensor.storage.partition("/")
        split.setdefault(name, {})[key] = tensor._replace(storage=storage)
    return split
