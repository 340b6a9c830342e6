"""The documentation: its commands work and its errors are the real ones."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from docs.hooks import config_table
from jaxft import evaluate, predict, train
from jaxft.config import default_config, flatten, load_config, parse_overrides
from jaxft.data import datasets
from jaxft.errors import run_command
from tests.helpers.runs import ROOT, SMALL_RUN, environment

FIRST = ROOT / "docs" / "index.md"  # its commands create runs/quickstart
PAGES = [FIRST, ROOT / "README.md", *sorted({*(ROOT / "docs").glob("*.md")} - {FIRST})]
COMMANDS = {"train": train.main, "evaluate": evaluate.main, "predict": predict.main}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Returns the words of each line in bash blocks that begins with python, without comments."""
    lines = "".join(blocks(page, "bash")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]


@pytest.fixture
def desk(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Creates the folder that the documentation assumes: the repository's files, images and a finished run."""
    for name in ("configs", "weights", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    sample = datasets.load("sample:cifar10", "test")
    for i in range(100):
        for path in (f"train/{sample.class_names[sample.label[i * 10]]}/{i}.png", "cat.png", "dog.png"):
            (tmp_path / "pictures" / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(sample.image[i * 10]).save(tmp_path / "pictures" / path)
    for split in ("test", "val"):
        shutil.copytree(tmp_path / "pictures" / "train", tmp_path / "pictures" / split)
    for split in ("train", "val_by_class"):
        shutil.copytree(tmp_path / "pictures" / "train", tmp_path / "tiny_imagenet32" / split)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_names_existing_modules_files_and_keys(page: Path) -> None:
    for words in commands(page):
        if words[1] == "-m":
            module, *arguments = words[2:]
            assert (ROOT / f"{module.replace('.', '/')}.py").exists() or module == "pytest", words
        else:
            assert (ROOT / words[1]).exists(), words
            continue
        if module == "jaxft.train" and "CONFIG" not in arguments[1] and arguments[1].startswith("configs/"):
            rest = [a for a in arguments[2:] if a.startswith("--config.")]
            load_config(str(ROOT / arguments[1]), parse_overrides(rest))


def test_every_config_key_is_in_the_table() -> None:
    table = config_table()
    for key, value in flatten(default_config()).items():
        assert f"| `{key}` |" in table
        assert f"| `{value!r}` |" in table


def test_errors_are_exactly_as_shown(desk: Path, small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs every console block in this process, which has eight devices."""
    shutil.copytree(small_run, "runs/quickstart")
    shown = "".join(block for page in PAGES for block in blocks(page, "console"))
    examples = re.findall(r"^\$ python -m jaxft\.(\w+) (.*)\n((?:(?!\$ ).*\n)*)", shown, re.MULTILINE)
    assert len(examples) >= 10
    for name, arguments, expected in examples:
        argv = shlex.split(arguments, comments=True)
        if "runs/quickstart" in argv and name == "train":
            argv += [
                argument for argument in SMALL_RUN if argument.startswith("--config.")
            ]  # the settings of small_run
        elif "runs/new" in argv:
            argv.insert(2, "--config.batch_size=64")  # divisible by eight devices
        code = run_command(COMMANDS[name], argv)
        output = capsys.readouterr()
        assert output.out + output.err == expected, arguments
        assert code == 2


def test_nearest_neighbours_are_found_by_their_features(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs the example in docs/results.md on 100 images. The nearest neighbour of each one is itself."""
    page = ROOT / "docs" / "results.md"
    for words in commands(page):
        if "--features" in words:
            assert run_command(predict.main, words[3:]) == 0
    (example,) = (block for block in blocks(page, "python") if "train.npz" in block)
    exec(example, {})
    _, _, similar, accuracy = capsys.readouterr().out.splitlines()
    first = sorted(Path("pictures/val").rglob("*.png"))[0]
    assert similar.startswith(f"most similar to {first} are {str(first).replace('val', 'train')} ")
    assert accuracy.startswith("20-NN accuracy ")


@pytest.mark.slow
def test_every_command_works(desk: Path) -> None:
    """Runs them in the order of the pages, with small networks, images and data."""
    make_small = [
        "--config.image_size=32",
        "--config.model.width=8",
        "--config.num_epochs=1",
        "--config.model.pretrained=",
        "--config.model.arch=resnet18",
        "--config.model.stem=imagenet",
    ]
    env = environment(1) | {"PYTHONPATH": str(ROOT)}
    done: set[str] = set()
    for page in PAGES:
        for words in commands(page):
            arguments = words[1:]
            line = " ".join(arguments)
            elsewhere = "pytest" in arguments or "benchmarks" in line or "weights/convert.py" in line  # tested there
            if line in done or elsewhere:
                continue
            done.add(line)
            if "jaxft.train" in arguments and "quickstart/config.json" not in line:
                arguments += make_small
                if "data.name" not in line:
                    arguments += ["--config.data.name=folder:pictures"]
                if "unfreeze" in line:
                    arguments += ["--config.num_epochs=3"]
            result = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
            assert result.returncode == 0, f"{page.name}: {line}\n{result.stderr}"
    assert len(done) >= 20


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """Runs its cells in order, in the folder that contains it."""
    notebook = json.loads((ROOT / "examples" / "finetune.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    env = environment(1) | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", "\n".join(cells)]
    result = subprocess.run(command, cwd=ROOT / "examples", env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for part in ("fc trained", "layer4 the same", "bn1 the same", "accuracy", "for cpu, cuda, tpu"):
        assert part in result.stdout


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs" / "notes").glob("*.md"))], ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    named = re.findall(
        r"\b(?:jaxft|tests|benchmarks|configs|weights|examples)/[\w/]+\.(?:py|md|ipynb)\b", page.read_text()
    )
    misspelt_on_purpose = {"configs/quikstart.py"}
    assert not [name for name in {*named} - misspelt_on_purpose if not (ROOT / name).exists()]


def test_comments_name_headings_of_the_notes() -> None:
    """`# NOTES: HEADING (docs/notes/PAGE.md)`, and further headings after a comma."""
    count = 0
    for module in (ROOT / "jaxft").rglob("*.py"):
        for comment in re.findall(r"# NOTES: (.*?\(docs/notes/[\w-]+\.md\))", module.read_text()):
            headings, _, name = comment.removesuffix(")").rpartition(" (")
            for heading in headings.split(", "):
                assert (
                    f"\n## {heading}\n" in (ROOT / name).read_text() or f"\n# {heading}\n" in (ROOT / name).read_text()
                )
                count += 1
    assert count > 20
