"""Describes a weights file, even one that would be refused, for `jaxft convert FILE --info`."""

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from jaxft.errors import UserError, shortened
from jaxft.models.build import ARCHITECTURES
from jaxft.models.network import options_of
from jaxft.pretrained import catalog, formats
from jaxft.pretrained.declared import read_declared
from jaxft.pretrained.families import FAMILIES, family_of
from jaxft.pretrained.joined import Joined
from jaxft.pretrained.layout import NUM_BATCHES_TRACKED
from jaxft.pretrained.load import locate, read_numbers
from jaxft.pretrained.recognise import check, examine
from jaxft.pretrained.state_dict import (
    distinct,
    excerpt,
    find_networks,
    kind_of,
    names_of,
    shown_key,
    summarised,
    tables,
)
from jaxft.pretrained.torch_files import TensorFile, open_tensors, open_weights
from jaxft.pretrained.unpickle import Tensor, children
from jaxft.pretrained.weights_file import model_of, read_jaxft_file, read_metadata

SHOWN = 8  # names in a line
MOST_ENTRIES = 100  # of a checkpoint


def describe(source: str, arch: str | None = None) -> dict[str, Any]:
    """Returns a weights file's format, network, naming, architecture, head, dtypes and other entries.

    Keys of unknown facts are missing. `usable` says whether jaxft reads the file, and `reason` why not.
    """
    found: dict[str, Any] = {"usable": False, "reason": None}
    try:
        path, name = _file_of(source)
        found |= {"file": str(path), "bytes": path.stat().st_size if path.is_file() else None}
        with open_weights(path) as opened:
            found["format"] = formats.identify(opened, path.name).name
        with open_tensors(path) as file:
            _describe(found, path, file, name, arch)
        found["usable"] = True
    except (UserError, OSError) as error:
        found["reason"] = str(error)
    return found


def _file_of(source: str) -> tuple[Path, str]:
    """Returns the file of a source, which may also be a name, and the name of the requested network."""
    if path := catalog.shipped(source):
        return path, ""
    named = catalog.find(source)
    return (catalog.weights_file(named), "") if named else locate(source)


def _describe(found: dict[str, Any], path: Path, file: TensorFile, name: str, arch: str | None) -> None:
    """Adds facts to `found` one after the other. Raises UserError where the file is refused."""
    provenance = read_metadata(path, file.metadata)
    if provenance is not None:
        family, model = family_of(provenance["arch"]), model_of(provenance)
        found |= {"format": "jaxft", "family": family.name, "arch": provenance["arch"], **options_of(model)}
        found |= {"num_classes": model.num_classes, "source": provenance["source"]}
        found["head"] = family.head if model.num_classes else None
        found |= _sizes(file.content)
        read_jaxft_file(path, file, provenance, arch)
        return
    found["entries"] = _entries(file.content)
    found["declared"] = read_declared(file.content, path).names
    networks = find_networks(file.content, FAMILIES)
    found["networks"] = [excerpt(name) for name in names_of(distinct(networks))]
    examined = examine(networks, file, path, name)
    network = examined.network
    found |= {
        "wrapper": ".".join(network.wrappers),
        "prefix": excerpt(network.prefix),
        "names": network.naming.library,
        "family": network.family.name,
        "left_out": network.left_out,
        "notes": examined.notes,
    }
    found |= _sizes(network.tensors)
    if examined.arch:
        found["arch"] = examined.arch
    recognised = check(examined, networks, file, path, name, arch)
    model = recognised.model
    head = network.family.head if model.num_classes else None
    found |= {**options_of(model), "head": head, "num_classes": model.num_classes, "notes": recognised.notes}
    provenance = read_numbers(file, recognised).provenance
    found |= {
        key: provenance[key] for key in ("image_size", "resize", "interpolation", "mean", "std") if key in provenance
    }


def _entries(content: Any) -> dict[str, str]:
    """Returns a checkpoint's outer entries with their kinds; {} for a bare state_dict."""
    if any(isinstance(value, Tensor) for value in children(content).values()):
        return {}
    found = {shown_key(key): kind_of(value) for key, value in islice(children(content).items(), MOST_ENTRIES)}
    counts: Counter[str] = Counter()
    for wrappers, table in tables(content):
        counts[wrappers[0]] += sum(isinstance(value, Tensor) for value in table.values())
    return found | {key: f"{counts[key]:,} tensor{'s' * (counts[key] > 1)}" for key in found if counts[key]}


def _sizes(tensors: Mapping[str, Tensor | Joined]) -> dict[str, Any]:
    """Counts the parameters and statistics of a network in torch's or jaxft's names."""
    counted = {key: tensor for key, tensor in tensors.items() if not key.endswith(NUM_BATCHES_TRACKED)}
    sizes = {key: _size(tensor) for key, tensor in counted.items()}
    statistics = sum(size for key, size in sizes.items() if "running_" in key or key.startswith("batch_stats/"))
    return {
        "parameters": sum(sizes.values()) - statistics,
        "statistics": statistics,
        "dtypes": sorted({str(tensor.dtype) for tensor in counted.values()}),
    }


def _size(tensor: Tensor | Joined) -> int:
    size = 1
    for length in tensor.shape:
        size *= length
    return size


def lines(found: Mapping[str, Any]) -> list[str]:
    """Returns the description as aligned lines."""
    rows: dict[str, str] = {"file": f"{found['file']}, {found['bytes']:,} bytes" if found.get("bytes") else ""}
    rows["format"] = found.get("format", "")
    if found.get("entries"):
        entries = [f"{key} ({kind})" for key, kind in found["entries"].items()]
        rows["holds"] = shortened(entries, SHOWN)
    if len(found.get("networks", ())) > 1:
        rows["networks"] = shortened(found["networks"], SHOWN)
    if "names" in found:
        place = [found["wrapper"] and f"in {found['wrapper']}", found["prefix"] and f"prefix {found['prefix']}"]
        rows["network"] = ", ".join(filter(None, [*place, f"keys as in {found['names']}"]))
    if "arch" in found:
        rows["arch"] = f"{found['arch']} ({found['family']})"
    if "head" in found:
        options = ARCHITECTURES[found["arch"]](num_classes=0).options
        rows["arch"] += "".join(f", {key} {found[key]}" for key in options)
        rows["head"] = f"{found['head']}, {found['num_classes']:,} classes" if found["head"] else "none"
    if found.get("declared"):
        rows["declared"] = ", ".join(f"{place}: {name}" for place, name in found["declared"].items())
    if "dtypes" in found:
        sizes = f"{found['parameters']:,} parameters, {found['statistics']:,} statistics"
        rows["tensors"] = f"{sizes}, {' and '.join(found['dtypes'])}"
    if "image_size" in found:
        size, resize = found["image_size"], found.get("resize", found["image_size"])
        rows["images"] = f"{size} pixels, cropped from {resize}, {found.get('interpolation', 'bilinear')}"
    if found.get("left_out"):
        rows["left out"] = summarised(found["left_out"], SHOWN)
    notes = [note for note in found.get("notes", ()) if not note.startswith("left out")]
    rows["note"] = "; ".join(notes)
    reason = str(found["reason"]).removeprefix(f"{found['file']} ").removeprefix("is refused: ")
    rows["usable"] = "yes" if found["usable"] else f"no: {reason}"
    return [f"{name:10}{text}" for name, text in rows.items() if text]
