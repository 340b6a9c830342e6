"""Progress: a bar on a terminal, or a plain line every LOG_SECONDS in a log."""

import time
from types import TracebackType

from tqdm import tqdm

from jaxft.errors import on_terminal, write_message
from jaxft.main_process import is_main_process

LOG_SECONDS = 30


class Progress:
    """Counts images and shows their rate on stderr; stdout is for results. Only process 0 shows anything."""

    def __init__(self, description: str, total: int, bar: bool = True) -> None:
        self._description = description
        self._silent = not is_main_process()
        hidden = self._silent or not (bar and on_terminal())
        self._bar = tqdm(desc=description, total=total, unit=" images", disable=hidden, leave=False, smoothing=0.1)
        self._done = 0
        self._total = total
        self._start = self._logged = time.monotonic()

    def update(self, images: int, loss: float | None = None) -> None:
        self._done += images
        note = "" if loss is None else f"loss {loss:.4f}"
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(images)
        now = time.monotonic()
        if self._bar.disable and not self._silent and now - self._logged >= LOG_SECONDS:
            self._logged = now
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate
            write_message(
                f"{self._description}: {self._done}/{self._total} images, {note}{', ' if note else ''}"
                f"{rate:.1f} images/s, {left:.0f} s left"
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
