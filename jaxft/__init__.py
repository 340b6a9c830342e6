"""Fine-tunes pretrained ResNets, ViTs and ConvNeXts on your own images, in pure JAX.

    import jaxft

    config = jaxft.load_config("configs/quickstart.py", {"num_epochs": "3"})
    jaxft.train_and_evaluate(config, "runs/quickstart")
    model = jaxft.load("runs/quickstart")
    model.predict(["image.jpg"])
    model.evaluate()

Names are imported lazily: JAX is imported only when a function is first accessed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxft.classifier import features, load
    from jaxft.config import default_config, load_config
    from jaxft.errors import UserError
    from jaxft.pretrained.load import load_pretrained
    from jaxft.targets.classification import replace_head
    from jaxft.train import train_and_evaluate

_MODULES = {
    "UserError": "errors",
    "default_config": "config",
    "features": "classifier",
    "load": "classifier",
    "load_config": "config",
    "load_pretrained": "pretrained.load",
    "replace_head": "targets.classification",
    "train_and_evaluate": "train",
}

__all__ = [
    "UserError",
    "default_config",
    "features",
    "load",
    "load_config",
    "load_pretrained",
    "replace_head",
    "train_and_evaluate",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxft' has no attribute '{name}'")
    return getattr(import_module(f"jaxft.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
