"""Loads pretrained weights by name or from a file."""

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from jaxft.errors import UserError, shortened
from jaxft.files import is_folder
from jaxft.models.network import options_of
from jaxft.pretrained import catalog, hub
from jaxft.pretrained.convert import from_torch, torch_shapes
from jaxft.pretrained.layout import NUM_BATCHES_TRACKED
from jaxft.pretrained.processor import read_facts
from jaxft.pretrained.recognise import Recognised, recognise
from jaxft.pretrained.state_dict import excerpt
from jaxft.pretrained.torch_files import TensorFile, open_tensors
from jaxft.pretrained.weights_file import Weights, check_values, read_jaxft_file, read_metadata, write_weights
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD


def load_pretrained(source: str, arch: str | None = None) -> Weights:
    """Returns weights by name, such as 'resnet50.tv_in1k_v1' or 'hf:timm/resnet50.a1_in1k', or from a file.

    Named weights are downloaded, verified and converted once, then kept in the cache. Raises UserError if they are
    not available or not of architecture `arch`.
    """
    if hub.is_name(source):
        return _load_from_hub(source, arch)
    if shipped := catalog.shipped(source):
        return read_weights(shipped, arch)
    named = catalog.find(source)
    if named is None:
        return read_weights(source, arch)
    if arch not in (None, named.arch):
        raise UserError(f"{source} holds a {named.arch}, not a {arch}")
    converted = catalog.weights_dir() / f"{named.name}.safetensors"
    if converted.exists():
        with suppress(UserError):  # if it is damaged, it is converted again
            return read_weights(converted)
    variables, provenance = read_weights(catalog.weights_file(named), named.arch)
    write_weights(converted, Weights(variables, provenance | named._asdict()))
    return read_weights(converted)


def _load_from_hub(source: str, arch: str | None) -> Weights:
    """Returns the weights of a repository on the Hub. A converted copy of each commit is kept."""
    repository, network = hub.parse(source)
    if network:
        return read_weights(source, arch)
    commit = hub.find_commit(repository)
    converted = catalog.weights_dir() / "hub" / repository.id.replace("/", "--") / f"{commit.hash}.safetensors"
    weights = None
    if converted.exists():
        with suppress(UserError):  # if it is damaged, it is converted again
            weights = read_weights(converted)
    if weights is None:
        variables, provenance = read_weights(hub.fetch(repository, commit), arch)
        name = f"{hub.PREFIX}{repository.id}@{commit.hash[:12]}"
        weights = Weights(variables, provenance | {"name": name, "commit": commit.hash})
        with suppress(UserError, OSError):  # without a copy, the next start converts it again
            converted.parent.mkdir(parents=True, exist_ok=True)
            write_weights(converted, weights)
    if arch not in (None, weights.provenance["arch"]):
        raise UserError(f"{source} holds a {weights.provenance['arch']}, not a {arch}")
    return weights


def read_weights(source: str | Path, arch: str | None = None) -> Weights:
    """Returns the weights in a jaxft file or a checkpoint of torchvision, timm, Hugging Face or a training script.

    source: a file, a folder that holds one, or FILE#NAME for one of several networks. arch: the architecture that it
    must have; None takes the file's. A network without a head gets one for 0 classes. Raises UserError if the file
    cannot be read or does not fit.
    """
    path, name = locate(source)
    with open_tensors(path) as file:
        provenance = read_metadata(path, file.metadata)
        if provenance is None:
            return read_numbers(file, recognise(file, path, name, arch))
        if name:
            raise UserError(f"{path} is a jaxft file, which holds one network; leave out #{name}")
        return read_jaxft_file(path, file, provenance, arch)


def read_network(
    source: str | Path, select: Callable[[Recognised], Mapping[str, Any]]
) -> tuple[Recognised, dict[str, np.ndarray]] | None:
    """Returns a network and the numbers of the tensors that `select` chooses; None for a jaxft file."""
    path, name = locate(source)
    with open_tensors(path) as file:
        if read_metadata(path, file.metadata) is not None:
            return None
        recognised = recognise(file, path, name)
        return recognised, file.load(select(recognised))


def locate(source: str | Path) -> tuple[Path, str]:
    """Splits FILE#NAME; returns the file and the network's name or ''. A folder stands for the weights file in it.

    A name on the Hub is fetched. A file whose own name has a '#' takes precedence. Raises UserError for a URL and for
    other folders.
    """
    text = str(source)
    if hub.is_name(text):
        repository, network = hub.parse(text)
        return hub.fetch(repository, hub.find_commit(repository)), network
    if "://" in text:
        raise UserError(_address(text))
    text = os.path.expanduser(text)  # noqa: PTH111 - Path's raises RuntimeError for an unknown user
    name = ""
    if not os.path.lexists(text.replace("\0", "")):
        for at in (at for at in reversed(range(len(text))) if text[at] == "#"):
            if os.path.lexists(text[:at]):
                text, name = text[:at], text[at + 1 :]
                break
    path = Path(text)
    if is_folder(path):
        return _file_in(path), name
    if not os.path.lexists(text.replace("\0", "")):
        if names := catalog.similar_names(text.split("/")[-1]):
            raise UserError(f"there is no weights file {source} and no such name; similar names: {', '.join(names)}")
        if hub.is_id(text):
            raise UserError(f"there is no weights file or run {source}; if it is a repository on the Hub: hf:{text}")
    return path, name


def _address(text: str) -> str:
    """Returns the message that refuses a URL."""
    file = PurePosixPath(urlsplit(text).path).name if text.startswith("http") else ""
    named = [weights.name for weights in catalog.WEIGHTS if file and weights.url.endswith(f"/{file}")]
    remedy = f"the name of this one is {named[0]}" if named else "download it, and give the file"
    if on_hub := re.match(r"(hf://|https?://(huggingface\.co|hf\.co)/)([^/]+/[^/@?#]+)", text):
        remedy = f"the name of this one is {hub.PREFIX}{on_hub[3]}"
    return f"{text} is a URL; only names are fetched (jaxft convert --list): {remedy}"


def _file_in(folder: Path) -> Path:
    for name in hub.WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    names = sorted(path.name for path in folder.iterdir())
    if (folder / "checkpoints").is_dir():
        raise UserError(
            f"{folder} is a run's workdir; jaxft export --workdir {folder} --to flax --out FILE.safetensors"
        )
    suffixes = (".pth", ".pt", ".bin", ".safetensors", ".ckpt", ".tar", ".index.json")
    files = [name for name in names if name.endswith(suffixes)]
    files += [name for name in names if any((folder / name / file).is_file() for file in hub.WEIGHTS)]
    found = f"it holds {shortened(files)}; give one of these" if files else "give a weights file"
    raise UserError(f"{folder} is a folder without {hub.WEIGHTS[0]} or {hub.WEIGHTS[2]}: {found}")


def read_numbers(file: TensorFile, recognised: Recognised) -> Weights:
    """Reads a recognised network's numbers. Raises UserError if they are damaged, not finite or not floating point."""
    path, network, model, arch, notes = recognised
    tensors = file.load(network.tensors)
    check_values(path, {network.keys[key]: array for key, array in tensors.items() if not _is_count(key)})
    if not model.num_classes:
        head, shapes = f"{network.family.head}.", torch_shapes(model)
        tensors |= {key: np.zeros(shape, np.float32) for key, shape in shapes.items() if key.startswith(head)}
    facts = read_facts(path, network.family.declarations, model.num_classes)
    provenance = {
        "arch": arch,
        **options_of(model),
        "num_classes": model.num_classes,
        "source": path.name,
        "source_sha256": file.sha256(),
        "names": network.naming.library,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        **facts.values,
        "num_batches_tracked": {
            key: int(value.flat[0])
            for key, value in tensors.items()
            if _is_count(key) and value.size and value.dtype.kind in "iu"
        },
    }
    if network.components:
        provenance["network"] = excerpt(".".join(network.components))
    if notes := [*notes, *facts.notes]:
        provenance["notes"] = notes
    return Weights(from_torch(tensors, model), provenance)


def _is_count(key: str) -> bool:
    return key.endswith(NUM_BATCHES_TRACKED)
