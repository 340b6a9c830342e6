"""Settings of the whole process: huge pages, streams, loggers, hooks, limits and the compilation cache.

Only commands (jaxft/cli.py) and the worker processes of jaxft change them. Importing jaxft changes nothing.
"""

import builtins
import glob
import io
import math
import os
import re
import select
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxft import interrupts
from jaxft.errors import CLEAR_LINE, UserError, on_terminal, one_line, write_message
from jaxft.files import cache_dir, partial_path, reason

_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb=1"  # since glibc 2.35; older ones ignore it
_ASKED = "JAXFT_ASKED_FOR_HUGE_PAGES"  # survives if GLIBC_TUNABLES is removed, as for programs with capabilities
_PR_SET_PDEATHSIG = 1  # from Linux's sys/prctl.h
_COMPILED_BYTES = 2**31  # above this size JAX deletes the least recently used programs


def environment() -> dict[str, str]:
    """Returns the environment of a child process, with huge pages requested."""
    others = [tunable for tunable in os.environ.get(_TUNABLES, "").split(":") if tunable]
    return os.environ | {_TUNABLES: ":".join([*others, _HUGE_PAGES]), _ASKED: "yes"}


def reexec_with_huge_pages() -> None:
    """Executes this command again in the same process, with malloc using pages of 2 MB.

    glibc reads its environment only when a program starts, so this comes before JAX is imported. Does nothing if the
    user has made a choice in GLIBC_TUNABLES, or if the program is not a jaxft command.
    """
    # NOTES: Huge pages (docs/notes/memory.md)
    chosen = _ASKED in os.environ or "glibc.malloc.hugetlb" in os.environ.get(_TUNABLES, "")
    if sys.platform == "linux" and is_command() and not chosen:
        interrupts.hold_signals()  # while Python starts again
        with suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment())
        interrupts.end_at_once_on_signals()


def is_command() -> bool:
    """Returns whether Python was started by the script `jaxft` or by `python -m jaxft.COMMAND`.

    False if a profiler or debugger has started and will continue after the command, as with `coverage run -m`.
    """
    if sys.gettrace() or sys.getprofile():
        return False
    main = sys.modules["__main__"]
    if spec := getattr(main, "__spec__", None):
        return spec.name.partition(".")[0] == "jaxft"
    return Path(getattr(main, "__file__", None) or "").name == "jaxft"


def prepare_streams() -> None:
    """Lets stdout and stderr replace characters that they cannot encode, and discard everything if they are closed."""
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115, for as long as the process runs
        elif isinstance(stream, io.TextIOWrapper):  # a notebook's are not
            stream.reconfigure(errors=errors)


def divert_native_messages() -> None:
    """Lets messages of native code appear on lines of their own, instead of within a terminal's progress bar.

    XLA writes them to file descriptor 2. If that is the terminal, it becomes a pipe to a child process, which writes
    each line to the terminal; sys.stderr stays there. The child is forked before JAX has threads, and ends with this
    process, after its last words. Does nothing if stderr is not a terminal, or if the program is not a jaxft command.
    """
    if not (on_terminal() and is_command()):
        return
    reading, writing = os.pipe()
    alive, end = os.pipe()  # closed by the kernel at the end; programs that this process starts do not inherit it
    if not os.fork():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):  # the terminal's, for all of us
            signal.signal(number, signal.SIG_IGN)
        os.close(end)
        terminal = os.dup(2)
        for wanted, fd in enumerate((reading, terminal, alive)):  # nobody waits for this process's stdout
            os.dup2(fd, wanted)
        os.closerange(3, max(reading, writing, alive, end, terminal) + 1)
        try:
            _relay(0, 1, 2)
        finally:
            os._exit(0)
    terminal = os.dup(2)
    os.dup2(writing, 2)
    for fd in (reading, writing, alive):
        os.close(fd)
    assert sys.stderr
    sys.stderr = os.fdopen(terminal, "w", 1, sys.stderr.encoding, sys.stderr.errors)


def _relay(source: int, terminal: int, alive: int) -> None:
    """Copies lines to the terminal until nothing can write to `source`, or until `alive` is closed."""
    rest = b""
    while True:
        ready = select.select([source, alive], [], [])[0]
        chunk = os.read(source, 65536) if source in ready else b""
        *lines, rest = (rest + chunk).split(b"\n")
        if not chunk and rest:
            lines, rest = [rest], b""
        for line in lines:
            # XLA times its candidates without a delay then: the program may be slower, but works.
            if b"Delay kernel timed out" not in line:
                os.write(terminal, CLEAR_LINE.encode() + line + b"\n")
        if not chunk:
            return


def import_jax(_: list[str]) -> None:
    """Imports JAX. Raises UserError if one of its environment variables has a value that it does not accept."""
    try:
        import jax  # noqa: F401
    except ValueError as error:
        raise UserError(f"JAX cannot start: {error}; correct or unset it") from error


def set_up() -> None:
    """Prepares the process of a command, after its modules have been imported. Raises UserError."""
    try:
        Path.cwd()  # needed for relative paths
    except OSError as error:
        raise UserError(f"the current folder cannot be used ({reason(error)}); change to another one") from None
    _check_xla_flags()
    _silence_loggers()
    ignore_closed_event_loops()
    allow_large_images()
    _cache_compiled_programs()


def _check_xla_flags() -> None:
    """Raises UserError if XLA cannot parse XLA_FLAGS. Otherwise it would abort the process without an exception."""
    if "XLA_FLAGS" not in os.environ or not is_command():
        return
    from jaxlib import xla_client

    reading, writing = os.pipe()
    child = os.fork()  # JAX has no threads yet; it takes 20 ms
    if not child:
        os.dup2(writing, 2)
        xla_client.CompileOptions()  # parses them
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as errors:
        problem = errors.readline()
    if os.waitpid(child, 0)[1]:
        problem = (problem.partition("] ")[2] or problem).strip()
        raise UserError(f"XLA cannot use XLA_FLAGS: {problem}; correct or unset it")


@contextmanager
def explained_failures() -> Iterator[None]:
    """Turns an error into a UserError if JAX finds no device of the requested platform."""
    try:
        yield
    except UserError:
        raise
    except Exception:  # JAX raises RuntimeError or AssertionError
        import jax

        try:
            jax.devices()
        except Exception as error:
            raise UserError(_without_device(str(error), jax.config.values["jax_platforms"] or "")) from error
        raise


def _without_device(error: str, platforms: str) -> str:
    found = re.sub(r"^Unable to initialize backend '\w+': | \(set JAX_PLATFORMS.*", "", " ".join(error.split()))
    message = f"JAX has no device for JAX_PLATFORMS={platforms}" if platforms else "JAX finds no device"
    extras = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}
    remedies = ["unset JAX_PLATFORMS"] if platforms else []
    remedies += [f"pip install 'jaxft[{extras[name]}]'" for name in platforms.split(",") if name in extras]
    remedy = " or ".join(remedies or ["see whether its driver works"])
    return f"{message}{f' ({found[:100]})' if found else ''}; {remedy}"


def end_with_parent() -> None:
    """Lets only the parent of a worker process handle Ctrl-C, and ends the worker if the parent dies."""
    import ctypes

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def allow_large_images() -> None:
    """Lifts Pillow's limit on pixels, and its warning at half of it; image_file.decode checks the size itself.

    Also silences Pillow's warnings of damaged metadata, which name a line of its code instead of the file.
    """
    from PIL import Image

    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.MAX_IMAGE_PIXELS = None


def _silence_loggers() -> None:
    """Silences the tracebacks that Orbax and gcsfs log for errors that jaxft reports in one line."""
    import logging

    import absl.logging  # noqa: F401, creates the logger "absl" with a class of its own

    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def ignore_closed_event_loops() -> None:
    """Hides the tracebacks "event loop is closed" of Orbax's pending reads and writes after one of them has failed."""
    excepthook, unraisablehook = sys.excepthook, sys.unraisablehook

    def is_closed_loop(error: BaseException | None) -> bool:
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    def filtered_excepthook(kind: Any, error: BaseException, traceback: Any) -> None:
        if not is_closed_loop(error):
            excepthook(kind, error, traceback)

    def filtered_unraisablehook(unraisable: Any) -> None:
        if not is_closed_loop(unraisable.exc_value):
            unraisablehook(unraisable)

    sys.excepthook, sys.unraisablehook = filtered_excepthook, filtered_unraisablehook


def _cache_compiled_programs() -> None:
    """Keeps compiled programs in jaxft's cache, unless JAX_COMPILATION_CACHE_DIR names another place."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_dir() / "compiled"
    lock = folder / ".lockfile"  # JAX's, for the limit on the size
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_incomplete(folder)
        if lock.is_dir():
            shutil.rmtree(lock)
        for file in (lock, probe := partial_path(folder / "probe")):
            file.open("ab").close()
        probe.unlink()
    except OSError as error:  # JAX would warn about each program
        _report_cache(folder, reason(error))
        return
    _remove_unreadable(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _COMPILED_BYTES)  # JAX then locks the cache as well
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _report_cache(folder: Path, problem: str) -> None:
    write_message(
        f"compiled programs cannot be kept in {folder} ({problem}), so each command compiles them again; make room or "
        "name another folder with JAXFT_CACHE"
    )


def disable_compilation_cache() -> None:
    """Disables the compilation cache for the rest of the process, since XLA cannot serialise calls of oneDNN."""
    # NOTES: When oneDNN repays recompilation (docs/notes/onednn.md)
    import jax

    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)


def _remove_incomplete(folder: Path) -> None:
    """Removes programs that lack their access-time file, as after a full disk: JAX would store no others."""
    for program in folder.glob("*-cache"):
        time = program.with_name(f"{program.name.removesuffix('-cache')}-atime")
        if not (program.is_file() and time.is_file()):
            _remove(program, time)


def _remove_unreadable(folder: Path) -> None:
    """Deletes each compiled program for which JAX warns that it cannot be read; JAX itself would never replace it.

    If the folder cannot be read or written, that is reported once instead of JAX's warnings.
    """
    import warnings

    show = warnings.showwarning
    reported = False

    def filtered(message: Any, *arguments: Any, **keywords: Any) -> None:
        nonlocal reported
        pattern = r"Error (reading|writing) persistent compilation cache entry for '(.*?)': ((\w+).*)"
        found = re.match(pattern, str(message), re.DOTALL)
        if not found:
            show(message, *arguments, **keywords)
        elif found[1] == "reading" and not issubclass(getattr(builtins, found[4], Exception), OSError):
            _remove(*folder.glob(f"{glob.escape(found[2])}-*"))  # the warning does not name the file
        elif not reported:
            reported = True
            _report_cache(folder, one_line(found[3], 100))

    warnings.showwarning = filtered


def _remove(*paths: Path) -> None:
    for path in paths:
        with suppress(OSError):  # another process may be doing the same
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
