"""Where jaxft keeps files: the cache and the packaged samples."""

import os
from pathlib import Path

SAMPLES_DIR = Path(__file__).parent / "samples"


def cache_dir() -> Path:
    """Where jaxft keeps what it can make again; the environment variable JAXFT_CACHE moves it."""
    return Path(os.environ.get("JAXFT_CACHE") or Path.home() / ".cache" / "jaxft")
