"""The script `jaxft`, and the behaviour common to all commands."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from jaxft.cli import COMMANDS
from jaxft.errors import MESSAGE_LENGTH, Interrupted, UserError, run_command, write_message
from jaxft.files import cache_dir, expand_user, output_argument
from jaxft.progress import Progress
from tests.helpers.runs import ROOT, Run, environment

OVERVIEW = """
import sys
sys.argv = ["jaxft", "--help"]
from jaxft import cli
try:
    cli.main()
except SystemExit as end:
    print(end.code, "jax" in sys.modules, "numpy" in sys.modules)
"""


def fail(error: BaseException) -> Callable[[list[str]], None]:
    def main(_: list[str]) -> None:
        raise error

    return main


def test_help_lists_the_commands_in_a_line_each_without_importing_jax(run: Run) -> None:
    shown = run("-c", OVERVIEW).stdout.splitlines()
    assert shown.pop() == "0 False False"
    assert [line.split()[0] for line in shown if line.startswith("  ")] == list(COMMANDS)
    assert max(map(len, shown)) <= 100
    assert run("-m", "jaxft").stdout.splitlines() == run("-m", "jaxft", "-h").stdout.splitlines() == shown


def test_version_is_printed(run: Run) -> None:
    assert run("-m", "jaxft", "--version").stdout == f"jaxft {version('jaxft')}\n"


def test_an_unknown_command_is_refused_with_the_nearest_one(run: Run) -> None:
    for word, hint in (("trian", "did you mean 'train'?"), ("quantize", "see jaxft --help")):
        result = run("-m", "jaxft", word)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"error: there is no command '{word}'; {hint}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        import_module(f"jaxft.{name}").main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m jaxft.{name} ")
    assert "--debug" in shown


@pytest.mark.parametrize("command", [("-m", "jaxft.sheet"), ("-m", "jaxft", "sheet")], ids=" ".join)
def test_a_subcommand_is_the_module(run: Run, command: tuple[str, ...]) -> None:
    result = run(*command, "--config", "none.py")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: there is no config file none.py; ")


def test_importing_and_calling_a_command_leaves_the_process_alone(run: Run) -> None:
    program = """
import os, sys
from jaxft import sheet
from jaxft.errors import run_command

before = (sys.excepthook, dict(os.environ))
code = run_command(sheet.main, ["--config", "none.py"])
print(code, before == (sys.excepthook, dict(os.environ)))
"""
    assert run("-c", program).stdout == "2 True\n"


def test_every_outcome_has_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda _: print("done"), []) == 0
    assert capsys.readouterr() == ("done\n", "")
    assert run_command(fail(UserError("no\n  file x;\nuse y")), []) == 2
    assert capsys.readouterr() == ("", "error: no file x; use y\n")
    assert run_command(fail(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr() == ("", "\ninterrupted\n")
    assert run_command(fail(Interrupted(signal.SIGTERM, "saved")), []) == 143
    assert capsys.readouterr() == ("", "stopped by SIGTERM; saved\n")
    with pytest.raises(ZeroDivisionError):
        run_command(fail(ZeroDivisionError()), [])


def test_debug_shows_the_traceback_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(fail(UserError("no file x")), ["--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1] == "error: no file x"


def test_a_long_message_keeps_its_beginning_and_its_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    text = f"there is no file {'/long/path' * 50}; name another one with --config.data.name=folder:PATH"
    assert run_command(fail(UserError(text)), []) == 2
    line = capsys.readouterr().err.removesuffix("\n")
    assert len(line) == MESSAGE_LENGTH
    assert line.startswith("error: there is no file /long/path/long")
    assert line.endswith("; name another one with --config.data.name=folder:PATH")


def test_a_message_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    class Stream:
        def write(self, text: str) -> None:
            written.append(text)

        def flush(self) -> None:
            pass

    monkeypatch.setattr(sys, "stderr", Stream())
    run_command(fail(UserError("no file x")), [])
    assert written == ["error: no file x\n"]


@pytest.mark.parametrize("arguments", [("convert", "--list"), ("train", "--help")], ids=" ".join)
def test_a_reader_that_has_gone_gives_141_and_no_message(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "jaxft", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment(1), stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize(("closed", "code", "output"), [("1", 2, "error: there is no checkpoint"), ("2", 2, "")])
def test_a_closed_stream_is_not_an_error(closed: str, code: int, output: str) -> None:
    command = f"{sys.executable} -m jaxft.report --workdir there_is_none {closed}>&-"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == code
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert bool(result.stderr) == bool(output)


def test_options_before_the_command_are_refused_with_the_right_order(run: Run) -> None:
    result = run("-m", "jaxft", "--debug")
    assert (result.returncode, result.stdout) == (2, "")
    assert "options come after the command: jaxft train --debug" in result.stderr


def test_a_run_whose_reader_has_gone_says_how_it_resumes(run: Run) -> None:
    program = """
import sys
from jaxft import train
from jaxft.errors import run_command

def broken(*_):
    raise BrokenPipeError(32, "Broken pipe")

train.train_and_evaluate = broken
sys.exit(run_command(train.main, ["--config=quickstart"]))
"""
    result = run("-c", program)
    assert (result.returncode, result.stdout) == (141, "")
    assert (
        result.stderr == "the run has stopped, because nobody reads its output any more; the same command resumes it\n"
    )


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_full_disk_under_stdout_gives_one_line(unbuffered: str) -> None:
    command = [sys.executable, "-m", "jaxft", "--help"]
    env = environment(1) | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:  # noqa: PTH123
        result = subprocess.run(command, cwd=ROOT, env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    line = "error: stdout cannot be written: No space left on device; run the same command again elsewhere\n"
    assert result.stderr == line


def test_characters_that_a_stream_lacks_are_replaced(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is not UTF-8 too, which Python holds as a surrogate."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    program = """
import sys
from jaxft import process
from jaxft.errors import write_message
process.prepare_streams()
print("Gro\\xdfer \\udce9")
write_message("Gro\\xdfer \\udce9")
"""
    result = run("-c", program)
    assert (result.returncode, result.stdout, result.stderr) == (0, "Gro?er ?\n", "Gro\\xdfer \\udce9\n")


def test_messages_need_no_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run_command(fail(UserError("no file x")), []) == 2
    with Progress("epoch 1/1", 10) as progress:
        progress.update(10)
    write_message("unheard")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("jaxft.predict", "--workdir=x", "--topk=3"), "unknown argument '--topk=3'; did you mean '--top_k'? see "),
        (
            ("jaxft.train", "--config=quickstart", "--wrkdir", "x"),
            "'--wrkdir'; did you mean '--workdir'?",
        ),
        (
            ("jaxft.sheet", "--config=quickstart", "x"),
            "argument 'x'; config keys are set by --config.KEY=VALUE",
        ),
        (("jaxft.train", "--config=quickstart", "--seed=1"), "'--seed=1'; did you mean '--config.seed=1'? see "),
        (("jaxft.evaluate", "--workdir", ""), "argument --workdir: expected a value, not an empty one; see "),
        (("jaxft.predict", "--workdir=x", ""), "argument IMAGE_OR_FOLDER: expected a value, not an empty one; see "),
        (("jaxft.report", "--workdir", "x" * 300), "cannot be used (File name too long); name another"),
        (
            ("jaxft.evaluate", "--workdir", "/dev/null/run"),
            "run cannot be used (Not a directory); name another",
        ),
        (("jaxft.sheet", "--config=quickstart", "--out=/none/a.png"), "--out: there is no folder /none; create it"),
        (
            ("jaxft.sheet", "--config=quickstart", "--out=/dev/null/a.png"),
            "a.png cannot be written: Not a directory;",
        ),
        (("jaxft.convert", "resnet18_in1k", "/tmp"), "argument OUT: /tmp is a folder; name a file in it"),
        (("jaxft.convert", "x" * 300, "a.safetensors"), "cannot be read: File name too long"),
        (("jaxft.sheet", "--config", "x" * 300), "cannot be read: File name too long"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_wrong_arguments_are_named_in_one_line(
    fails: Callable[..., str], arguments: tuple[str, ...], message: str
) -> None:
    line = fails("-m", *arguments)
    assert message in line
    assert len(line) <= MESSAGE_LENGTH


def test_the_last_of_two_options_counts(fails: Callable[..., str]) -> None:
    assert "there is no config named b" in fails("-m", "jaxft.sheet", "--config=a", "--config=b")


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAXFT_CACHE", "~/cache")
    assert output_argument("~/a.png") == tmp_path / "a.png"
    assert cache_dir() == tmp_path / "cache"
    assert expand_user(Path("~no_such_user/run")) == Path("~no_such_user/run")


def test_an_error_does_not_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        raise UserError("a\x1b[31m\nb\udce9")

    assert run_command(main, []) == 2
    assert capsys.readouterr().err == "error: a\ufffd[31m b\ufffd\n"
