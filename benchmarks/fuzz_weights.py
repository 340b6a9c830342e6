"""Reads mutated weights files: each must give tensors or one clear error, run no code and use little memory.

    python -m benchmarks.fuzz_weights [--count 20000] [--seed 0]

The mutations are flipped bits, truncations, spliced and repeated parts, forged lengths and shapes, and hostile pickles,
in PyTorch's zip and legacy formats and in safetensors. Each file is read twice: its largest state_dict as it is, and as
a network for training, which must be a ResNet with finite numbers. Prints JSON with the counts; the exit code is 1 if
any file breaks a promise.
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
import time
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import safetensors.torch

from jaxft.errors import UserError
from jaxft.pretrained.convert import to_torch
from jaxft.pretrained.load import read_weights
from jaxft.pretrained.torch_files import read_tensors
from tests.helpers.reference import torch
from tests.helpers.runs import ROOT

ALLOWED_GROWTH = 10  # bytes per byte of the file, on top of BASE_BYTES
BASE_BYTES = 2_000_000  # allowed for a file of any size
SECONDS = 10.0  # allowed for a file of any size
NETWORKS = 0.1  # part of the files that hold a whole network
NETWORK = ROOT / "tests" / "fixtures" / "weights" / "width4.safetensors"
HOSTILE_NAMES = (b"os\nsystem", b"builtins\neval", b"builtins\nexec", b"subprocess\nPopen", b"torch\nload", b"io\nopen")
SAFETENSORS, ZIP, LEGACY = "safetensors", "zip", "legacy"
# A tuple of 2**30 empty tuples, in 211 bytes; as a value, a key, a shape or a name it must not be looked into.
NESTED = b")" + b"".join(b"q%ch%ch%c\x86" % (i, i, i) for i in range(30))
HOSTILE_PARTS = (
    NESTED,
    NESTED + b"Ns",
    b"(" + NESTED + b"K\x01K\x01tQ",
    b"(" * 5_000,
    b"}" * 5_000,
    b"\x8b" + struct.pack("<i", 5_000) + b"\x7f" * 5_000,
    b"X\x05\0\0\0\x1b[31m",
    b"X\x03\0\0\0\xed\xa0\x80",  # a lone surrogate
    b"I" + b"9" * 5_000 + b"\n",
)


def originals() -> dict[str, tuple[bytes, bytes]]:
    """Returns a small state_dict and a whole network in each format."""
    small = {
        "conv1.weight": torch.randn(4, 3, 3, 3),
        "bn1.running_var": torch.rand(4).half(),
        "bn1.num_batches_tracked": torch.tensor(3),
        "fc.weight": torch.randn(6, 5).t(),
    }
    network = {key: torch.from_numpy(array) for key, array in to_torch(read_weights(NETWORK)).items()}
    return {kind: (saved(small, kind), saved(network, kind)) for kind in (SAFETENSORS, ZIP, LEGACY)}


def saved(state: dict[str, torch.Tensor], kind: str) -> bytes:
    if kind == SAFETENSORS:
        return safetensors.torch.save({key: value.contiguous() for key, value in state.items()})
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=kind == ZIP)
    return buffer.getvalue()


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
    """Changes bytes of a pickle, or inserts what would take long, or a call that a weights file must never make."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    if rng.random() < 0.5:
        at = rng.randrange(len(data))
        return data[:at] + rng.choice(HOSTILE_PARTS) + data[at:]
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


def read_both(path: Path, broken: list[str]) -> list[str]:
    """Reads a file in both ways and returns what became of it; promises that it breaks are added to `broken`."""
    outcomes = []
    for read in (read_tensors, read_weights):
        outcome = "read"
        try:
            read(path)
        except UserError as error:
            outcome = "refused"
            if path.name not in str(error):
                broken.append(f"the error does not name the file: {error}")
            if not str(error).isprintable():
                broken.append(f"the error is not printable: {error!a}")
        except BaseException as error:
            outcome = "crashed"
            broken.append(f"{read.__name__} {type(error).__name__}: {error}")
        outcomes.append(f"{read.__name__} {outcome}")
    return outcomes


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
        path = Path(folder, "file.pth")
        for data in (*(whole for pair in files.values() for whole in pair), b"text", b"\x80\x02}."):
            path.write_bytes(data)  # lazy imports must not count as audit events
            read_both(path, broken)
        for codec in ("cp437", "raw_unicode_escape", "unicode_escape"):
            codecs.lookup(codec)
        sys.addaudithook(audit)
        tracemalloc.start()
        for i in range(args.count):
            rng = random.Random(f"{args.seed}-{i}")
            kind = rng.choice(list(files))
            content = mutate(rng, kind, files[kind][rng.random() < NETWORKS])
            path.write_bytes(content)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            problems: list[str] = []
            begin = time.perf_counter()
            watching = True
            outcomes.update(f"{kind} {outcome}" for outcome in read_both(path, problems))
            watching = False
            seconds = time.perf_counter() - begin
            used = tracemalloc.get_traced_memory()[1] - before
            if used > ALLOWED_GROWTH * len(content) + BASE_BYTES:
                problems.append(f"allocated {used} bytes for a file of {len(content)}")
            if seconds > SECONDS:
                problems.append(f"took {seconds:.0f} s for a file of {len(content)} bytes")
            broken += [f"{i}: {problem}" for problem in problems]
    broken += [f"it ran {event}" for event in audited]
    print(
        json.dumps({"files": args.count, "outcomes": dict(sorted(outcomes.items())), "broken": broken[:20]}, indent=1)
    )
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
