"""The structure of the package: which folder may import which, and where platforms are asked for."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT

PACKAGE = ROOT / "jaxft"
MODULES = sorted(PACKAGE.rglob("*.py"))
# A module or folder may import only those before it (docs/architecture.md).
ORDER = [
    "errors",
    "interrupts",
    "files",
    "main_process",
    "process",
    "progress",
    "transforms",
    "ops",
    "data",
    "models",
    "config",
    "targets",
    "pretrained",
    "run",
    "training",
    "inference",
    "classifier",
    "reporting",
]
COMMANDS = {"train", "evaluate", "predict", "export", "report", "sheet", "convert"}
ENTRY_POINTS = {"__init__", "__main__", "cli"}  # import lazily, by name


def unit(module: Path) -> str:
    """Returns the folder or module directly in the package: 'ops' for ops/conv.py."""
    return module.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(module: Path) -> Iterator[str]:
    """Yields the units that a module imports from, anywhere in its code."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jaxft":
            yield from [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]


def functions(module: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(module: Path) -> None:
    """No cycles; data does not import training; commands import libraries, never each other."""
    own = unit(module)
    if own in ENTRY_POINTS:
        return
    allowed = {own, *(ORDER if own in COMMANDS else ORDER[: ORDER.index(own)])}
    allowed |= {"cli"} if own in COMMANDS else set()  # only if run as `python -m jaxft.COMMAND`
    assert set(imported(module)) <= allowed


def test_every_folder_says_what_belongs_in_it() -> None:
    for folder in {module.parent for module in MODULES}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_the_platform_is_asked_for_in_one_place() -> None:
    found = {str(module.relative_to(PACKAGE)) for module in MODULES if "default_backend" in module.read_text()}
    assert found == {"ops/formulation.py"}


def test_long_and_wide_functions_state_their_reason() -> None:
    """Over 60 lines or six parameters: a comment directly above the function says why."""
    silent = []
    for module in MODULES:
        lines = module.read_text().splitlines()
        for function in functions(module):
            arguments = function.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            wide = len([name for name in names if name not in ("self", "cls")]) > 6
            assert function.end_lineno
            long = function.end_lineno - function.lineno >= 60
            first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
            if (wide or long) and not lines[first - 2].lstrip().startswith("#"):
                silent.append(f"{module.relative_to(PACKAGE)}: {function.name}")
    assert not silent
