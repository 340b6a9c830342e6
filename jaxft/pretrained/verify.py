"""Compares a converted network with that of the library whose names its file has.

torch and the library are imported only here.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxft.errors import UserError, shortened
from jaxft.models.architectures import ALIASES, TORCHVISION
from jaxft.pretrained import catalog
from jaxft.pretrained.declared import CONFIG, describes, read_small_json
from jaxft.pretrained.layout import NUM_BATCHES_TRACKED
from jaxft.pretrained.load import read_network
from jaxft.pretrained.recognise import Recognised
from jaxft.pretrained.state_dict import Network, find_networks
from jaxft.pretrained.unpickle import Tensor
from jaxft.pretrained.weights_file import Weights, model_of

SIDE = 224  # pixels of the images, unless the network is made for another size
_HUGGING_FACE = "Hugging Face's "


class Comparison(NamedTuple):
    """The largest differences after each stage, relative to the largest value."""

    against: str  # libraries and their versions
    float32: dict[str, float]
    float64: dict[str, float]


class _Reference(NamedTuple):
    """How a library's network is made and gets the tensors of a file."""

    library: str  # timm, torchvision or transformers
    originals: bool  # it takes the file's names, not the family's own
    make: Callable[[Recognised, Mapping[str, Any], Any], tuple[Any, Collection[str]]]


def compare(source: str, weights: Weights) -> Comparison:
    """Compares the network of a file with the library's, on random images.

    The library's network gets the tensors as they are in the file, so that the comparison does not depend on our
    conversion. The head is compared only if there is one. Raises UserError if no library has such a network.
    """
    named = catalog.find(source)
    found: list[_Reference] = []

    def select(recognised: Recognised) -> Mapping[str, Any]:
        found.append(_reference(recognised))
        return recognised.network.originals if found[0].originals else recognised.network.tensors

    read = read_network(catalog.weights_file(named) if named else source, select)
    if read is None:
        raise UserError(f"{source} is a jaxft file; --verify compares a file of torchvision, timm or Hugging Face")
    (reference,), (recognised, tensors) = found, read
    single, double = (
        largest_differences(reference, recognised, tensors, weights, dtype) for dtype in (np.float32, np.float64)
    )
    against = f"{reference.library} {version(reference.library)} with torch {version('torch')}"
    return Comparison(against, single, double)


def _reference(recognised: Recognised) -> _Reference:
    """Chooses the library: the one whose names the file has, else one that has the family's own names."""
    network, arch, model = recognised.network, recognised.arch, recognised.model
    library = network.naming.library
    for key, value in model.options.items():
        if key in ("width", "stem") and getattr(model, key) != value:
            raise UserError(f"--verify: no library has a {arch} of {key} {getattr(model, key)} to compare with")
    if library.startswith(_HUGGING_FACE):
        return _Reference("transformers", True, _make_transformers)
    names = {naming.library.split(",")[0] for naming in network.family.namings}
    if arch in TORCHVISION and (library.startswith("torchvision") or "timm" not in names):
        own = network.family.namings[0].library == "torchvision"  # also for files that differ from torchvision's
        return _Reference("torchvision", not own, _make_torchvision)
    return _Reference("timm", False, _make_timm)


def largest_differences(
    reference: _Reference, recognised: Recognised, tensors: Mapping[str, np.ndarray], weights: Weights, dtype: Any
) -> dict[str, float]:
    """Returns max |ours - the library's| / max |the library's| after each stage."""
    torch = _import("torch")
    network, model = recognised.network, recognised.model
    state = {key: torch.from_numpy(np.asarray(array).astype(dtype)) for key, array in tensors.items()}
    with torch.random.fork_rng(devices=[]):
        theirs, missing = reference.make(recognised, state, torch.from_numpy(np.ones(1, dtype)).dtype)
    if wrong := [key for key in missing if _is_needed(key, network)]:
        raise UserError(f"{recognised.path}: {reference.library}'s {recognised.arch} also has {shortened(wrong)}")
    stages = dict(network.family.stages(model_of(weights.provenance)))
    if not weights.provenance["num_classes"]:
        del stages[network.family.head]
    outputs: dict[str, Any] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            outputs[path] = (output[0] if isinstance(output, tuple) else output).numpy().copy()

        return hook

    modules = dict(theirs.named_modules())
    for name, path in stages.items():
        if module := modules.get(_module_name(name, network, theirs)):
            module.register_forward_hook(keep(path))
    side = getattr(model, "grid", 0) * model.patch_size or SIDE
    image = np.random.default_rng(0).normal(size=(2 if side <= SIDE else 1, side, side, 3)).astype(dtype)
    with torch.no_grad():
        theirs.eval()(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()))
    differences = {}
    for path, ours in _stages(weights, image, outputs).items():
        expected = outputs[path]
        if expected.ndim == 4 and expected.shape != ours.shape:
            expected = expected.transpose(0, 2, 3, 1)
        expected = expected.reshape(ours.shape)
        differences[path] = float(np.abs(ours - expected).max() / max(np.abs(expected).max(), np.finfo(dtype).tiny))
    return differences


def _is_needed(key: str, network: Network) -> bool:
    """Returns whether a tensor of the library's network that the file lacks has an effect on its features."""
    name = network.naming.part(key).name
    head = f"{network.family.head}."
    of_head = name.startswith(head) and not any(key.startswith(head) for key in network.tensors)
    unused = key.endswith((NUM_BATCHES_TRACKED, "mask_token")) or "pooler." in key
    return not (of_head or unused)


def _module_name(name: str, network: Network, theirs: Any) -> str:
    """Returns the library's name of a module: the common part of the keys of its parameters; without any, the same."""
    content = {key: Tensor(np.dtype(np.float32), tuple(value.shape), key) for key, value in theirs.state_dict().items()}
    naming = find_networks(content, (network.family,))[0].naming
    own = [key for key in network.tensors if key.startswith(f"{name}.")]
    keys = [source.split(".")[:-1] for key in own for source in naming.keys(key)]
    shared = takewhile(lambda parts: len({*parts}) == 1, zip(*keys, strict=False))
    return ".".join(parts[0] for parts in shared) or name


def _stages(weights: Weights, image: np.ndarray, paths: Collection[str]) -> dict[str, np.ndarray]:
    """Returns the outputs of the modules of jaxft's network at these paths, computed in the image's dtype."""
    with jax.enable_x64(True):
        model = model_of(weights.provenance).clone(dtype=image.dtype)
        variables = jax.tree.map(lambda array: array.astype(image.dtype), weights.variables)
        _, captured = jax.jit(
            lambda variables, image: model.apply(
                variables,
                image,
                train=False,
                capture_intermediates=lambda module, _: "/".join(module.path) in paths,
                mutable=["intermediates"],
            )
        )(variables, image)
    outputs = flatten_dict(captured["intermediates"], sep="/")
    return {path: np.asarray(outputs[f"{path}/__call__"][0]) for path in paths}


def _import(name: str) -> Any:
    """Imports torch or a library of networks. Raises UserError if it is missing or does not fit torch."""
    try:
        import torch

        if name == "torch":
            return torch
        if name == "torchvision":
            import torchvision

            return torchvision
        if name == "timm":
            import timm

            return timm
        import transformers
    except ImportError:
        raise UserError(
            f"--verify compares with PyTorch: pip install torch {'' if name == 'torch' else name}"
        ) from None
    except RuntimeError as error:  # torchvision's operators need the torch that it was built with
        raise UserError(f"torchvision does not fit this torch ({error}); install both from the same index") from None
    return transformers


def _make_torchvision(recognised: Recognised, state: Mapping[str, Any], dtype: Any) -> tuple[Any, Collection[str]]:
    models = _import("torchvision").models
    model = recognised.model
    size = {"image_size": getattr(model, "grid", 0) * model.patch_size} if "grid" in model.options else {}
    reference = getattr(models, recognised.arch)(num_classes=model.num_classes or 1000, **size)
    return _load(reference.to(dtype), state)


def _make_timm(recognised: Recognised, state: Mapping[str, Any], dtype: Any) -> tuple[Any, Collection[str]]:
    timm = _import("timm")
    arch, model = recognised.arch, recognised.model
    names = [name for name in (arch, *(name for name, own in ALIASES.items() if own == arch)) if timm.is_model(name)]
    if not names:
        raise UserError(f"--verify: timm {version('timm')} has no {arch} to compare with")
    arguments = recognised.network.family.timm_model(model)
    reference = timm.create_model(names[0], num_classes=model.num_classes or 1000, **arguments)
    return _load(reference.to(dtype), state)


def _load(reference: Any, state: Mapping[str, Any]) -> tuple[Any, Collection[str]]:
    """Loads tensors, which may lack or have axes of length 1. Returns the network and the keys that are missing."""
    shapes = {key: value.shape for key, value in reference.state_dict().items()}
    fitting = {}
    for key, tensor in state.items():
        lengths = [[n for n in shape if n != 1] for shape in (tensor.shape, shapes.get(key, tensor.shape))]
        fitting[key] = tensor.reshape(shapes[key]) if key in shapes and lengths[0] == lengths[1] else tensor
    missing, extra = reference.load_state_dict(fitting, strict=False)
    if extra:
        raise UserError(f"the library's network has no {shortened(extra)}")
    return reference, missing


@contextmanager
def _quietly(transformers: Any) -> Iterator[None]:
    """Switches off the progress bars and reports of transformers."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _make_transformers(recognised: Recognised, state: Mapping[str, Any], dtype: Any) -> tuple[Any, Collection[str]]:
    """Makes the network of the config.json beside the file, else of the architecture."""
    transformers = _import("transformers")
    network, model = recognised.network, recognised.model
    if describes(read_small_json(recognised.path.with_name(CONFIG)), network.family.declarations):
        config = transformers.AutoConfig.from_pretrained(str(recognised.path.parent), local_files_only=True)
    else:
        name, facts = network.family.transformers_config(model, network.naming.library)
        config = getattr(transformers, name)(**facts)
    with_head = "ForImageClassification" in network.naming.library
    auto = transformers.AutoModelForImageClassification if with_head else transformers.AutoModel
    if with_head:
        config.num_labels = model.num_classes or 2
    kind = auto._model_mapping[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    with _quietly(transformers):
        reference, info = kind.from_pretrained(
            None, config=config, state_dict=dict(state), output_loading_info=True, dtype=dtype
        )
    if extra := [*info["unexpected_keys"], *info["mismatched_keys"]]:
        raise UserError(f"transformers' {type(reference).__name__} has no {shortened(sorted(map(str, extra)))}")
    return reference, sorted(info["missing_keys"])
