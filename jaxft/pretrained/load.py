"""Loads pretrained weights by name or from a file."""

import os
from contextlib import suppress
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import numpy as np

from jaxft.errors import UserError, shortened
from jaxft.files import is_folder
from jaxft.models.network import options_of
from jaxft.pretrained import catalog
from jaxft.pretrained.convert import from_torch, torch_shapes
from jaxft.pretrained.layout import NUM_BATCHES_TRACKED
from jaxft.pretrained.recognise import Recognised, recognise
from jaxft.pretrained.state_dict import excerpt
from jaxft.pretrained.torch_files import TensorFile, open_tensors
from jaxft.pretrained.weights_file import Weights, check_values, read_jaxft_file, read_metadata, write_weights
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD

FILES_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")  # as Hugging Face and timm save them


def load_pretrained(source: str, arch: str | None = None) -> Weights:
    """Returns weights by name, such as 'resnet50.tv_in1k_v1', or from a file.

    Named weights are downloaded, verified and converted once, then kept in the cache. Raises UserError if they are
    not available or not of architecture `arch`.
    """
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


def read_network(source: str | Path) -> dict[str, np.ndarray] | None:
    """Returns a network's unconverted tensors by its family's names; None for a jaxft file."""
    path, name = locate(source)
    with open_tensors(path) as file:
        if read_metadata(path, file.metadata) is not None:
            return None
        return file.load(recognise(file, path, name).network.tensors)


def locate(source: str | Path) -> tuple[Path, str]:
    """Splits FILE#NAME and returns the file, also for a folder that holds one, and the network's name or ''.

    A file whose own name has a '#' takes precedence. Raises UserError for a URL and for other folders.
    """
    text = str(source)
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
    if not os.path.lexists(text.replace("\0", "")) and (names := catalog.similar_names(text.split("/")[-1])):
        raise UserError(f"there is no weights file {source} and no such name; similar names: {', '.join(names)}")
    return path, name


def _address(text: str) -> str:
    """Returns the message that refuses a URL."""
    file = PurePosixPath(urlsplit(text).path).name if text.startswith("http") else ""
    named = [weights.name for weights in catalog.WEIGHTS if file and weights.url.endswith(f"/{file}")]
    remedy = f"the name of this one is {named[0]}" if named else "download it, and give the file"
    return f"{text} is a URL; only names are fetched (jaxft convert --list): {remedy}"


def _file_in(folder: Path) -> Path:
    for name in FILES_IN_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    names = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".index.json") for name in names):
        raise UserError(
            f"{folder} holds a checkpoint in several files; jaxft reads one file: save_pretrained(..., "
            "max_shard_size='100GB')"
        )
    if (folder / "checkpoints").is_dir():
        raise UserError(
            f"{folder} is a run's workdir; jaxft export --workdir {folder} --to flax --out FILE.safetensors"
        )
    files = [name for name in names if name.endswith((".pth", ".pt", ".bin", ".safetensors", ".ckpt", ".tar"))]
    files += [name for name in names if any((folder / name / file).is_file() for file in FILES_IN_FOLDERS)]
    found = f"it holds {shortened(files)}; give one of these" if files else "give a weights file"
    raise UserError(f"{folder} is a folder without {' or '.join(FILES_IN_FOLDERS)}: {found}")


def read_numbers(file: TensorFile, recognised: Recognised) -> Weights:
    """Reads a recognised network's numbers. Raises UserError if they are damaged, not finite or not floating point."""
    path, network, model, arch, notes = recognised
    tensors = file.load(network.tensors)
    check_values(path, {network.keys[key]: array for key, array in tensors.items() if not _is_count(key)})
    if not model.num_classes:
        head, shapes = f"{network.family.head}.", torch_shapes(model)
        tensors |= {key: np.zeros(shape, np.float32) for key, shape in shapes.items() if key.startswith(head)}
    provenance = {
        "arch": arch,
        **options_of(model),
        "num_classes": model.num_classes,
        "source": path.name,
        "source_sha256": file.sha256(),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "num_batches_tracked": {
            key: int(value.flat[0])
            for key, value in tensors.items()
            if _is_count(key) and value.size and value.dtype.kind in "iu"
        },
    }
    if network.components:
        provenance["network"] = excerpt(".".join(network.components))
    if notes:
        provenance["notes"] = notes
    return Weights(from_torch(tensors, model), provenance)


def _is_count(key: str) -> bool:
    return key.endswith(NUM_BATCHES_TRACKED)
