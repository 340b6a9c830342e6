"""Progress: a bar on a terminal, or a plain line every LOG_SECONDS in a log."""

import time
from types import TracebackType

from tqdm import tqdm

from jaxft.errors import on_terminal, write_message
from jaxft.main_process import is_main_process

LOG_SECONDS = 30


class Progress:
    """Counts images and shows their rate on stderr; stdout is for results. Only process 0 shows anything.

    unit: of what is counted, if not images. log_after: seconds until the first line in a log.
    """

    def __init__(
        self,
        description: str,
        total: int,
        bar: bool = True,
        *,
        unit: str = "images",
        log_after: float = LOG_SECONDS,
    ) -> None:
        self._description = description
        self._silent = not is_main_process()
        hidden = self._silent or not (bar and on_terminal())
        self._bar = tqdm(desc=description, total=total, unit=f" {unit}", disable=hidden, leave=False, smoothing=0.1)
        self._unit = unit
        self._done = 0
        self._total = total
        self._start = time.monotonic()
        self._next_log = self._start + log_after

    def restart_clock(self) -> None:
        """Excludes the time so far, as that of a compilation, from the rate and the time left."""
        self._bar.unpause()
        self._start = time.monotonic()

    def update(self, images: int, loss: float | None = None) -> None:
        self._done += images
        note = "" if loss is None else f"loss {loss:.4f}"
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(images)
        now = time.monotonic()
        if self._bar.disable and not self._silent and now >= self._next_log:
            self._next_log = now + LOG_SECONDS
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate
            write_message(
                f"{self._description}: {self._done}/{self._total} {self._unit}, {note}{', ' if note else ''}"
                f"{rate:.1f} {self._unit}/s, {left:.0f} s left"
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
