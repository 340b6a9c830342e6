"""Reads what a checkpoint and its config.json say about the network: different networks can have the same keys."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.errors import UserError
from jaxft.files import open_regular, read_json
from jaxft.models.architectures import ALIASES
from jaxft.pretrained.family import Declarations
from jaxft.pretrained.state_dict import excerpt
from jaxft.pretrained.unpickle import Foreign

_GROUPS = ("args", "hyper_parameters", "config", "cfg", "opt", "hparams", "meta")  # of a training script's settings
_NAMES = ("arch", "architecture", "model_name", "model", "backbone", "backbone_name", "network")
CONFIG = "config.json"
MAX_EPSILON = 0.1  # of a norm
MAX_CONFIG = 1_000_000  # bytes of a config.json
# Prefixes before the architecture in names of timm and torch.hub; some denote the training data.
_PREFIX = re.compile(r"^(timm/|hf[-_]hub:|torchvision[./]|microsoft/|tv_|gluon_|ssl_|swsl_|ig_|wsl_)+")


class Declared(NamedTuple):
    """The names and settings of a network in its checkpoint and in the config.json beside it."""

    names: dict[str, str]  # place -> name, such as {"arch": "resnet50"}
    config: Mapping[str, Any]  # config.json beside the file, {} without one


def read_declared(content: Any, path: Path) -> Declared:
    """Reads the names in a checkpoint (arch, args.model, ...) and in the config.json beside it."""
    names: dict[str, str] = {}
    top = content if type(content) is dict else {}
    for group, entries in (("", top), *((group, _attributes(top.get(group))) for group in _GROUPS)):
        for key in _NAMES:
            value = entries.get(key)
            if type(value) is str and 0 < len(value) <= 100:
                names[f"{group}.{key}" if group else key] = excerpt(value)
    config = _config_beside(path)
    if type(config.get("architecture")) is str:
        names["config.json"] = excerpt(config["architecture"])
    return Declared(names, config)


def _attributes(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Foreign):  # argparse.Namespace has attributes, AttributeDict of Lightning has items
        return value.items or value.attributes or {}
    return value if type(value) is dict else {}


def _config_beside(path: Path) -> Mapping[str, Any]:
    """Returns the config.json of Hugging Face or timm beside a file, or {}."""
    config = read_small_json(path.with_name(CONFIG))
    return config if "model_type" in config or "architecture" in config else {}


def read_small_json(path: Path) -> Mapping[str, Any]:
    """Returns the JSON object in a file of at most MAX_CONFIG bytes, or {}."""
    try:
        with open_regular(path) as file:
            if len(file.read(MAX_CONFIG + 1)) > MAX_CONFIG:
                return {}
        return read_json(path)
    except (OSError, ValueError):
        return {}


def describes(config: Mapping[str, Any], family: Declarations) -> bool:
    """Returns whether a config.json is of a network of this family."""
    if (name := config.get("architecture")) is not None:
        return type(name) is str and re.search(family.own_names, _plain_name(name)) is not None
    kind = config.get("model_type")
    return type(kind) is str and re.fullmatch(family.model_type, kind) is not None


def _plain_name(name: str) -> str:
    """Returns an architecture's name without a library before it and training data after it."""
    return _PREFIX.sub("", name.lower()).split(".")[0]


def look_alike(declared: Declared, arch: str, family: Declarations) -> str | None:
    """Returns why the network is not the `arch` whose keys and shapes it has, or None."""
    for place, name in declared.names.items():
        for pattern, meaning in family.look_alikes.items():
            if re.search(pattern, name.lower()):
                return f"{place} calls it {name}: {meaning}"
    for key, (plain, meaning) in _options(declared.config, arch, family).items():
        value = _settings(declared.config).get(key, plain)
        if value != plain:
            return f"config.json says {key}={excerpt(value, 20)}: {meaning}"
    return None


def _options(config: Mapping[str, Any], arch: str, family: Declarations) -> Mapping[str, tuple[Any, str]]:
    """Returns the keys of config.json that change what a network with these keys and shapes computes."""
    if "architecture" in config:
        return family.timm_arguments(arch)
    return family.hugging_face_config(arch) if describes(config, family) else {}


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = config.get("model_args", {}) if "architecture" in config else config
    return settings if isinstance(settings, dict) else {}


def declared_options(declared: Declared, plain: Mapping[str, Any], family: Declarations) -> dict[str, Any]:
    """Returns the options of a network in Hugging Face's config.json.

    plain: all options of the model -> their usual values. Raises UserError for a value of another type.
    """
    if "architecture" in declared.config or not describes(declared.config, family):
        return {}
    options = {}
    for key, option in family.option_keys.items():
        if key in declared.config and option in plain:
            value = declared.config[key]
            kinds = (int, float) if type(plain[option]) is float else (type(plain[option]),)
            if type(value) not in kinds or (float in kinds and not 0 < value <= MAX_EPSILON):
                raise UserError(f"config.json says {key}={excerpt(value, 20)}, which is not a value of {option}")
            options[option] = value
    return options


def doubts(declared: Declared, arch: str, family: Declarations) -> list[str]:
    """Returns warnings about declared names other than `arch`, since keys and shapes do not show every difference."""
    found = []
    for place, name in declared.names.items():
        plain = _plain_name(name)
        plain = re.sub(r"_(v1b|ssl|swsl|wsl|in1k|imagenet)$", "", plain)
        if remark := next((text for pattern, text in family.remarks.items() if re.search(pattern, plain)), None):
            found.append(f"{place} calls it {name}, {remark}")
        elif re.search(family.own_names, plain) and ALIASES.get(plain, plain) != arch:
            found.append(f"{place} calls it {name}, but it is taken as a {arch}, as its keys and shapes say")
    kind = str(declared.config.get("model_type", "timm_wrapper"))
    if kind != "timm_wrapper" and not re.fullmatch(family.model_type, kind):
        found.append(f"the config.json beside it is of a {excerpt(kind, 30)}, not of a {arch}")
    return found
