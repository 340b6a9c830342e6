"""Take an ImageNet ResNet, give it a new head, fine-tune it on your pictures, in pure JAX.

    import jaxft

    config = jaxft.load_config("configs/quickstart.py", {"num_epochs": "3"})
    jaxft.train_and_evaluate(config, "runs/quickstart")
    model = jaxft.load("runs/quickstart")
    model.predict(["picture.jpg"])
    model.evaluate()

Each function is imported, and JAX with it, when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxft import process

if TYPE_CHECKING:
    from jaxft.classifier import load
    from jaxft.config import default_config, load_config
    from jaxft.errors import UserError
    from jaxft.pretrained.convert import load_pretrained
    from jaxft.targets.classification import replace_head
    from jaxft.train import train_and_evaluate

process.reexec_with_huge_pages()

_MODULES = {
    "UserError": "errors",
    "default_config": "config",
    "load": "classifier",
    "load_config": "config",
    "load_pretrained": "pretrained.convert",
    "replace_head": "targets.classification",
    "train_and_evaluate": "train",
}

__all__ = [
    "UserError",
    "default_config",
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
