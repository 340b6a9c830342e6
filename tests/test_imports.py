"""Importing jaxft is light and changes nothing in the process."""

import json

import pytest

from tests.helpers.runs import ROOT, Run

IMPORTED = """
import sys
import {module}
print(*sorted({{"jax", "flax", "optax", "numpy", "PIL", "matplotlib"}}.intersection(sys.modules)))
"""

# Imports what jaxft's modules import, then the modules; prints what the latter have changed as JSON.
CHANGES = """
import ast, json, logging, os, signal, sys, threading, warnings
from importlib import import_module
from pathlib import Path

import jax, matplotlib, numpy
from PIL import Image, ImageFile

import jaxft


def loggers():
    names = [name for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)]
    state = {name: (lambda l: (l.level, len(l.handlers), len(l.filters), l.propagate, l.disabled))
             (logging.getLogger(name)) for name in ("root", *names)}
    return {name: values for name, values in state.items() if values != (0, 0, 0, True, False)}


def snapshot():
    state = {
        "loggers": loggers(),
        "logging.disable": logging.root.manager.disable,
        "hooks": (sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook, sys.breakpointhook),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "warnings": warnings.filters,
        "environ": dict(os.environ),
        "folder": os.getcwd(),
        "path": sys.path,
        "argv": sys.argv,
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "jax": jax.config.values,
        "jax backends": list(jax._src.xla_bridge._backends),
        "Pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, Image.ID, Image.OPEN, Image.EXTENSION),
        "numpy": (numpy.geterr(), numpy.get_printoptions()),
        "matplotlib": dict(matplotlib.rcParams),
    }
    return {name: repr(value) for name, value in state.items()}


os.execv = os.execve = None  # nor may the process be replaced
package = Path(jaxft.__file__).parent
names = [".".join(path.relative_to(package.parent).with_suffix("").parts) for path in sorted(package.rglob("*.py"))]
names = [name.removesuffix(".__init__") for name in names]
for name in names:
    path = package.parent / name.replace(".", "/")
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    for node in ast.parse(source).body:
        modules = [node.module] if isinstance(node, ast.ImportFrom) else [
            alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if modules and not any(module.split(".")[0] == "jaxft" for module in modules):
            exec(compile(ast.Module([node], []), name, "exec"), {})
before = snapshot()
for name in names:
    import_module(name)
after = snapshot()
print(json.dumps([len(names), {name: (before[name], after[name]) for name in before if before[name] != after[name]}]))
"""


@pytest.mark.parametrize(("module", "expected"), [("jaxft", []), ("jaxft.cli", []), ("jaxft.config", [])])
def test_light_modules_import_no_heavy_packages(run: Run, module: str, expected: list[str]) -> None:
    assert run("-c", IMPORTED.format(module=module)).stdout.split() == expected


def test_importing_any_module_changes_nothing_in_the_process(run: Run) -> None:
    result = run("-c", CHANGES)
    assert result.returncode == 0, result.stderr
    count, changes = json.loads(result.stdout.splitlines()[-1])
    assert changes == {}
    assert count == len(list((ROOT / "jaxft").rglob("*.py")))
