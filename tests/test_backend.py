"""What a command sets up, in a process of its own."""

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import Run

PROGRAM = """
import json, resource
import jax, jax.numpy as jnp
from jaxft.backend import set_up_backend

set_up_backend()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # a program as small as this is kept too
step = jax.jit(lambda x: jnp.sin(x)[::-1])
x = jnp.ones((3000, 3000))  # 34 MiB: glibc gives what is above 32 back at once
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
faults = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([len(hits), sorted(faults[20:])[10]]))
"""

HOLES = """
import ctypes, time
from pathlib import Path
from jaxft import backend

backend._SECONDS_BETWEEN = 0.05
backend.set_up_backend()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
large = ctypes.c_void_p()
for _ in range(20):
    libc.posix_memalign(ctypes.byref(large), 64, 2**26)
    ctypes.memset(large, 1, 2**26)
    for size in range(8, 105, 8):  # stay
        libc.malloc(size)
    libc.free(large)
    time.sleep(0.1)
print(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_memory_that_no_longer_fits_is_given_back(run: Run) -> None:
    assert int(run("-c", HOLES).stdout) < 600  # MiB; else 20 times 64 more


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_programs_are_compiled_once_and_memory_is_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled" / "half_written-cache").touch()  # as a full disk leaves it; JAX alone would keep no other
    first, second = (json.loads(run("-c", PROGRAM).stdout) for _ in range(2))
    assert (first[0], second[0] > 0) == (0, True)
    assert list((tmp_path / "compiled").iterdir())
    assert second[1] < 100  # page faults of a step, once the heap has grown; else 8,800
