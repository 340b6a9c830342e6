"""The script `jaxft`, and the preparation of a command's process before JAX is imported.

jaxft train --config quickstart      is the same as      python -m jaxft.train --config quickstart
"""

import sys
from importlib import import_module
from typing import NoReturn

from jaxft import interrupts  # and nothing that takes longer, before signals are handled

COMMANDS = {
    "train": "fine-tune a network on labelled images",
    "evaluate": "test a checkpoint on its run's test images",
    "predict": "classify images, or serve a web page that does",
    "export": "write a checkpoint for torchvision, for another run or as one StableHLO file",
    "report": "write a run's report again, or compare runs",
    "sheet": "draw images as training sees them",
    "convert": "convert pretrained weights from or to PyTorch's layouts",
}
IN_SEVERAL_PROCESSES = {"train", "evaluate"}


def main() -> NoReturn:
    """Runs the command that sys.argv names and exits."""
    interrupts.end_at_once_on_signals()
    name, *argv = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        run(name, argv)
    from jaxft import process
    from jaxft.errors import run_command

    process.prepare_streams()
    sys.exit(run_command(_without_command, [name]))


def run(name: str, argv: list[str] | None = None) -> NoReturn:
    """Runs a command as this process's only task and exits. argv: its arguments, by default sys.argv's."""
    interrupts.end_at_once_on_signals()
    from jaxft import process

    process.reexec_with_huge_pages()
    process.prepare_streams()
    argv = sys.argv[1:] if argv is None else argv
    if "--debug" not in argv:
        process.divert_native_messages()
    from jaxft.errors import run_command

    if code := run_command(process.import_jax, argv):
        sys.exit(code)
    runner = run_command
    if name in IN_SEVERAL_PROCESSES:
        from jaxft.run.processes import run_together as runner
    command = import_module(f"jaxft.{name}")
    if name == "evaluate":  # else SIGTERM would wait for a step of training, if there are several processes
        import jax

        jax.config.update("jax_enable_preemption_service", False)

    def set_up(_: list[str]) -> None:
        process.set_up()
        interrupts.set_flag_on_signals()

    def main(argv: list[str]) -> None:
        with process.explained_failures():
            command.main(argv)
        interrupts.check()

    try:
        # JAX's own handler of SIGTERM in several processes comes later, so that it replaces ours.
        code = run_command(set_up, argv) or runner(main, argv)
    except SystemExit as end:  # after --help
        code = int(end.code or 0)
    if process.is_command():
        interrupts.exit_now(code)
    sys.exit(code)


def _without_command(argv: list[str]) -> None:
    import difflib

    from jaxft.errors import UserError

    (argument,) = argv
    if argument in ("-h", "--help"):
        print("usage: jaxft COMMAND ...\n\nFine-tunes pretrained networks on your own images, in pure JAX.\n")
        for name, meaning in COMMANDS.items():
            print(f"  {name:<10}{meaning}")
        print("\n`jaxft COMMAND --help` shows a command's options, `jaxft --version` the version.")
    elif argument == "--version":
        from importlib.metadata import version

        print(f"jaxft {version('jaxft')}")
    elif argument.startswith("-"):
        raise UserError(f"options come after the command: jaxft train {argument}; see jaxft --help")
    else:
        matches = difflib.get_close_matches(argument, COMMANDS, 1)
        hint = f"did you mean '{matches[0]}'?" if matches else "see jaxft --help"
        raise UserError(f"there is no command '{argument}'; {hint}")
