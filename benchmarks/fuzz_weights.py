"""Reads mutated weights files: each must give tensors or one clear error, run no code and use little memory.

    python -m benchmarks.fuzz_weights [--count 20000] [--seed 0]

The mutations are flipped bits, truncations, spliced and repeated parts, forged lengths and shapes, and hostile pickles,
in PyTorch's zip and legacy formats and in safetensors. Prints JSON with the counts; the exit code is 1 if any file
breaks a promise.
"""

import argparse
import codecs
import io
import json
import pickle
import random
import resource
import struct
import sys
import tempfile
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors.torch

from jaxft.errors import UserError
from jaxft.pretrained.torch_files import read_tensors
from tests.helpers.reference import torch

ALLOWED_GROWTH = 10  # bytes per byte of the file, on top of BASE_BYTES
BASE_BYTES = 2_000_000  # allowed for a file of any size
HOSTILE_NAMES = (b"os\nsystem", b"builtins\neval", b"builtins\nexec", b"subprocess\nPopen", b"torch\nload", b"io\nopen")
SAFETENSORS, ZIP, LEGACY = "safetensors", "zip", "legacy"


def originals() -> dict[str, bytes]:
    state = {
        "conv1.weight": torch.randn(4, 3, 3, 3),
        "bn1.running_var": torch.rand(4).half(),
        "bn1.num_batches_tracked": torch.tensor(3),
        "fc.weight": torch.randn(6, 5).t(),
    }
    files = {SAFETENSORS: safetensors.torch.save({key: value.contiguous() for key, value in state.items()})}
    for kind in (ZIP, LEGACY):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=kind == ZIP)
        files[kind] = buffer.getvalue()
    return files


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Makes one to four random changes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) or 1)
        kind = rng.randrange(6)
        if kind == 0 and changed:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            changed[at : at + 8] = struct.pack("<q", rng.choice([-1, 2**31, 2**40, 2**62, rng.getrandbits(62)]))
        elif kind == 3:
            other = rng.randrange(len(changed) or 1)
            changed[at:at] = changed[other : other + rng.randrange(64)]
        elif kind == 4:
            changed[at : at + 4] = struct.pack("<I", rng.getrandbits(32))
        else:
            changed[at : at + 1] = bytes([rng.choice(b"(.0123cRbBtTuQX\x80\x8a\x8b\x96\x93")])
    return bytes(changed)


def mutate_pickle(rng: random.Random, data: bytes) -> bytes:
    """Changes bytes of a pickle, or inserts a call of a function that a weights file must never call."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    call = b"c" + rng.choice(HOSTILE_NAMES) + b"\n(X\x09\x00\x00\x00touch ranitR."
    at = rng.randrange(len(data))
    return rng.choice([pickle.PROTO + b"\x02" + call, data[:at] + call + data[at:], data[:-1] + call])


def mutate(rng: random.Random, kind: str, data: bytes) -> bytes:
    if kind == LEGACY and rng.random() < 0.5:
        start = data.index(b"ccollections")
        return data[:start] + mutate_pickle(rng, data[start:])
    if kind == SAFETENSORS and rng.random() < 0.5:
        (length,) = struct.unpack("<Q", data[:8])
        header = mutate_bytes(rng, data[8 : 8 + length])
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    if kind == ZIP and rng.random() < 0.7:  # with valid checksums: otherwise zipfile rejects the file first
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", rng.choice([0, 8])) as new:
            for name in old.namelist():
                content = old.read(name)
                if name.endswith("data.pkl"):
                    content = mutate_pickle(rng, content)
                elif rng.random() < 0.1:
                    content = rng.choice([mutate_bytes(rng, content), b"\0" * 3_000_000])
                new.writestr(name, content)
        return buffer.getvalue()
    return mutate_bytes(rng, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    torch.manual_seed(args.seed)
    files = originals()
    outcomes: Counter[str] = Counter()
    broken: list[str] = []
    audited: list[str] = []
    watching = False

    def audit(event: str, arguments: tuple) -> None:
        if watching and event in ("os.system", "subprocess.Popen", "exec", "compile", "import", "os.exec"):
            audited.append(f"{event} {arguments[:1]}")

    with tempfile.TemporaryDirectory() as folder:
        for kind, data in files.items():  # lazy imports must not count as audit events
            (path := Path(folder, f"warm.{'safetensors' if kind == SAFETENSORS else 'pth'}")).write_bytes(data)
            read_tensors(path)
        for codec in ("cp437", "raw_unicode_escape", "unicode_escape"):
            codecs.lookup(codec)
        sys.addaudithook(audit)
        tracemalloc.start()
        for i in range(args.count):
            rng = random.Random(f"{args.seed}-{i}")
            kind = rng.choice(list(files))
            content = mutate(rng, kind, files[kind])
            path = Path(folder, f"file.{'safetensors' if kind == SAFETENSORS else 'pth'}")
            path.write_bytes(content)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            watching = True
            try:
                tensors = read_tensors(path)
                assert all(isinstance(array, np.ndarray) for array in tensors.values())
                outcome = "read"
            except UserError as error:
                outcome = "refused"
                if path.name not in str(error):
                    broken.append(f"{i}: the error does not name the file: {error}")
            except BaseException as error:
                outcome = "crashed"
                broken.append(f"{i}: {type(error).__name__}: {error}")
            watching = False
            outcomes[f"{kind} {outcome}"] += 1
            used = tracemalloc.get_traced_memory()[1] - before
            if used > ALLOWED_GROWTH * len(content) + BASE_BYTES:
                broken.append(f"{i}: allocated {used} bytes for a file of {len(content)}")
    broken += [f"it ran {event}" for event in audited]
    print(
        json.dumps({"files": args.count, "outcomes": dict(sorted(outcomes.items())), "broken": broken[:20]}, indent=1)
    )
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
