"""Abuses the web page of `predict --serve`, and verifies that an honest client is served meanwhile and afterwards.

    python -m benchmarks.page_abuse [--workdir DIR] [--only PART_OF_A_NAME]

Starts the real server in a child process, by default with the network of one training step on noise at 224 px. The
abuses are bodies that are not images or cost much to decode, bodies that never end, clients that stall, disconnect or
do not speak HTTP, foreign hosts, and signals while clients owe bytes. During each one, an honest client sends an image
again and again: it must get the right answer within two seconds. The server's memory must stay within a bound, it must
print nothing, and signals must stop it within a few seconds with the shell's exit codes.

Prints a table and a last line of JSON; the exit code is 1 if anything is wrong.
"""

import argparse
import http.client
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

HONEST_MS = 2_000  # the slowest honest answer allowed
GROWTH_MB = 600  # memory allowed above that of the idle server; one AVIF of 49 million pixels takes 470
STOP_SECONDS = 8
MB = 2**20


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int
    output: list[str] = field(default_factory=list)

    def connect(self, timeout: float = 30) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def post(self, body: bytes, headers: dict[str, str] | None = None, path: str = "/predict") -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def memory(self, key: str) -> float:
        """Returns VmRSS, or VmHWM, its peak since `reset_peak`, in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(rf"{key}:\s+(\d+) kB", status)
        assert match
        return int(match[1]) * 1024 / MB

    def reset_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


@contextmanager
def serving(workdir: Path) -> Iterator[Server]:
    command = [sys.executable, "-m", "jaxft.predict", "--workdir", str(workdir), "--serve", "--port=0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        try:
            lines = ""
            while not (match := re.search(r"http://127.0.0.1:(\d+)/", lines)):
                lines += (line := process.stdout.readline())
                assert line, f"the server did not start: {lines}"
            server = Server(process, int(match[1]))
            reader = threading.Thread(target=lambda: server.output.extend(process.stdout or ()))
            reader.start()
            yield server
        finally:
            process.kill()


def train(folder: Path) -> Path:
    """Trains for one step on noise, which is the quickest way to a workdir of this version."""
    rng = np.random.default_rng(0)
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (folder / "noise" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "noise" / name / f"{i}.png")
    command = [sys.executable, "-m", "jaxft.train", "--config=configs/quickstart.py", f"--workdir={folder / 'run'}"]
    settings = {"model.pretrained": "", "model.width": 8, "image_size": 224, "batch_size": 8, "num_epochs": 1}
    settings["data.name"] = f"folder:{folder / 'noise'}"
    subprocess.run([*command, *(f"--config.{key}={value}" for key, value in settings.items())], check=True)
    return folder / "run"


# Bodies.


def encoded(array: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int) -> bytes:
    """Returns a PNG of zeros, without ever holding its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    row = bytes(1 + (width * channels * depth + 7) // 8)
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    """Returns a run-length-encoded BMP of zeros."""
    row = b"".join(bytes([min(255, width - x), 0]) for x in range(0, width, 255)) + b"\0\0"
    data = row * height + b"\0\1"
    palette = bytes(1024)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + palette + data


def scans(count: int) -> bytes:
    """Returns a progressive JPEG that repeats its last scan."""
    image = encoded(np.zeros((2000, 2000), np.uint8), "JPEG", progressive=True)
    last = image.rindex(b"\xff\xda")
    return image[:last] + image[last:-2] * count + b"\xff\xd9"


def ico_of(image: bytes) -> bytes:
    """Returns an icon that declares 16 x 16 pixels and holds any PNG."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(image), 22) + image


def animation(frames: int) -> bytes:
    buffer = io.BytesIO()
    first, *rest = [Image.new("P", (500, 500), i % 256) for i in range(frames)]
    first.save(buffer, "GIF", save_all=True, append_images=rest)
    return buffer.getvalue()


def form(*parts: bytes) -> bytes:
    lines = [b'--x\r\nContent-Disposition: form-data; name="file"%s\r\n' % part for part in parts]
    return b"\r\n".join([*lines, b"--x--\r\n"])


# Abuses. Each is a function that returns a summary of the answers to its clients.


def posts(content: bytes, headers: dict[str, str] | None = None, times: int = 1) -> Callable[[Server], str]:
    def act(server: Server) -> str:
        with ThreadPoolExecutor(times) as pool:
            answers = list(pool.map(lambda _: server.post(content, headers), range(times)))
        return "; ".join(sorted({f"{status} {json.loads(text).get('error', 'answered')}" for status, text in answers}))

    return act


def sends(*parts: bytes, pause: float = 0.0, times: int = 1, seconds: float = 15.0) -> Callable[[Server], str]:
    """Sends parts, the last one again and again, until the server answers and closes, or for `seconds`."""

    def one(server: Server) -> str:
        with server.connect(timeout=seconds) as connection:
            reader = ThreadPoolExecutor(1)
            answer = reader.submit(_read_all, connection)
            end = time.monotonic() + seconds
            with suppress(OSError):
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause)
                while parts and pause and not answer.done() and time.monotonic() < end:
                    connection.sendall(parts[-1])
                    time.sleep(pause)
            text, closed = answer.result()
            reader.shutdown()
        status = re.findall(r"HTTP/1\.1 (\d+)", text)
        return f"{' '.join(status[:3]) or 'no answer'}, {'closed' if closed else 'still open'}"

    def act(server: Server) -> str:
        with ThreadPoolExecutor(times) as pool:
            return "; ".join(sorted(set(pool.map(one, [server] * times))))

    return act


def _read_all(connection: socket.socket) -> tuple[str, bool]:
    received = b""
    with suppress(TimeoutError):
        try:
            while part := connection.recv(65536):
                received += part
        except ConnectionError:
            pass
        return received.decode("latin-1"), True
    return received.decode("latin-1"), False


def leaves(begin: bytes, reset: bool, times: int = 50) -> Callable[[Server], str]:
    """Disconnects in the middle of a request."""

    def act(server: Server) -> str:
        for _ in range(times):
            with server.connect() as connection:
                connection.sendall(begin)
                time.sleep(0.01)
                if reset:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return "disconnected"

    return act


def holds(count: int, body: bytes, declared: int, seconds: float = 4.0) -> Callable[[Server], str]:
    """Opens connections that send a part of a body, or nothing, and waits."""

    def act(server: Server) -> str:
        connections = []
        for _ in range(count):
            with suppress(OSError):
                connection = server.connect()
                connection.setblocking(False)
                connections.append(connection)
        waiting = dict.fromkeys(connections, post_head(declared) + body if declared else b"")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for connection, rest in waiting.items():
                with suppress(OSError):
                    waiting[connection] = rest[connection.send(rest[:MB]) :] if rest else rest
            time.sleep(0.01)
        for connection in connections:
            connection.close()
        return f"{len(connections)} connections"

    return act


def unread(server: Server) -> str:
    """Asks for the page many times over one connection and reads no answer."""
    with server.connect(timeout=20) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            for _ in range(200_000):
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        except ConnectionError:
            return "closed"
        except TimeoutError:
            return "still open"
    return "all sent"


def reuse(server: Server) -> str:
    """Uses one connection after errors."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    found = []
    for method, path, body in (
        ("GET", "/predict", None),
        ("POST", "/predict", b"no image"),
        ("GET", "/", None),
        ("HEAD", "/", None),
        ("POST", "/nothing", b"body"),
        ("POST", "/predict", HONEST),
    ):
        connection.request(method, path, body)
        response = connection.getresponse()
        response.read()
        found.append(str(response.status))
    connection.close()
    return " ".join(found)


def post_head(length: int | str, extra: str = "") -> bytes:
    return f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n{extra}\r\n".encode()


GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
HONEST = encoded(np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8))
NOISE = np.random.default_rng(2).integers(0, 256, (3000, 4000, 3), np.uint8)
FORM = {"Content-Type": "multipart/form-data; boundary=x"}
FILE = b'; filename="a.png"\r\n\r\n' + HONEST


def abuses() -> Iterator[tuple[str, Callable[[Server], str], str]]:
    """Yields (name, function, pattern of the summary that it returns)."""
    # More than 60 lines: a table with one line for each abuse.
    yield "nothing", posts(b""), "422 the file is empty"
    yield "text", posts(b"<script>alert(1)</script>"), "422 .*cannot be read as an image"
    yield "half a PNG", posts(HONEST[: len(HONEST) // 2]), "422 .*cannot be read as an image"
    yield "1-bit PNG of 400 MP", posts(png(20_000, 20_000, 1, 0)), "422 .*20000 x 20000 pixels"
    yield "16-bit grey, 7,000 x 7,000", posts(png(7_000, 7_000, 16, 0)), "200"
    yield "the same, 8 at once", posts(png(7_000, 7_000, 16, 0), times=8), "200"
    yield "8-bit RGBA, 7,000 x 7,000", posts(png(7_000, 7_000, 8, 6)), "200"
    yield "16-bit RGBA, 7,000 x 7,000", posts(png(7_000, 7_000, 16, 6)), "200"
    yield "12 MP of noise, JPEG, 20 at once", posts(encoded(NOISE, "JPEG"), times=20), "200"
    yield (
        "49 MP JPEG, progressive",
        posts(encoded(np.zeros((7000, 7000, 3), np.uint8), "JPEG", progressive=True)),
        "200",
    )
    yield "JPEG 2000", posts(encoded(NOISE[:99], "JPEG2000")), "422 .*reads AVIF, BMP"
    yield "JPEG of 3,000 scans", posts(scans(3_000)), "422 .*scans"
    yield "49 MP AVIF", posts(encoded(np.zeros((7000, 7000, 3), np.uint8), "AVIF", speed=10)), "200"
    yield "49 MP BMP, compressed", posts(bmp(7000, 7000)), "422 .*up to 10,000,000"
    yield "10 MP BMP, compressed", posts(bmp(3160, 3160)), "200"
    yield (
        "49 MP TIFF of floats",
        posts(encoded(np.zeros((7000, 7000), np.float32), "TIFF", compression="tiff_lzw")),
        "200",
    )
    yield "49 MP GIF", posts(encoded(np.zeros((7000, 7000), np.uint8), "GIF")), "200"
    yield "48 MP WebP", posts(encoded(np.zeros((3000, 16000, 3), np.uint8), "WEBP")), "422 .*up to 25,000,000"
    yield "24 MP WebP", posts(encoded(np.zeros((4000, 6000, 3), np.uint8), "WEBP")), "200"
    yield "thin, 1 x 10,000", posts(png(1, 10_000, 8, 0)), "200"
    yield "thin, 20,000 x 1", posts(png(20_000, 1, 8, 0)), "200"
    yield "thin, 20,000,000 x 1, 4 at once", posts(png(20_000_000, 1, 8, 0), times=4), "200"
    yield "GIF of 2,000 frames", posts(animation(2_000)), "200"
    yield "icon that hides a 400 MP PNG", posts(ico_of(png(20_000, 20_000, 1, 0))), "422"
    yield "PostScript", posts(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"), "422"
    yield "form with a file", posts(form(FILE), FORM), "200"
    yield "form with two files", posts(form(FILE, FILE), FORM), "422 .*2 files"
    yield "form without a file", posts(form(b"\r\n\r\na.png"), FORM), "422 .*no file"
    yield "form cut off", posts(form(FILE)[:-8], FORM), "422 .*incomplete"
    yield "JSON", posts(b"{}", {"Content-Type": "application/json"}), "415 .*not JSON.*curl"
    yield "gzip", posts(zlib.compress(HONEST), {"Content-Encoding": "gzip"}), "415"
    yield "200 images at once", posts(HONEST, times=200), "^200 answered$"
    yield "30 noisy 12 MP PNGs at once", posts(encoded(NOISE[:1200], compress_level=0)[:19_000_000], times=30), "200"
    yield "21 MB", posts(bytes(21_000_000)), "413"
    yield "10 GB declared, sent for ever", sends(post_head(10**10), bytes(MB), pause=0.001), "^413, closed"
    yield "chunks for ever", sends(CHUNKED, b"100000\r\n%s\r\n" % bytes(MB), pause=0.001), "^413, closed"
    yield (
        "body to another address, for ever",
        sends(post_head(10**10).replace(b"/predict", b"/"), bytes(MB), pause=0.001),
        "^405, closed",
    )
    yield "413 that expects 100-continue", sends(post_head(10**9, "Expect: 100-continue\r\n")), "^413, closed"
    yield "100-continue, then nothing", sends(post_head(1000, "Expect: 100-continue\r\n")), "^100 408, closed"
    yield "body at 1 byte/s, 20 clients", sends(post_head(10**6), b"x", pause=1.0, times=20), "^408, closed"
    yield "headers at 1 byte/s, 100 clients", sends(GET, b"x", pause=1.0, times=100), "^no answer, closed"
    yield "connected, silent, 100 clients", sends(pause=0.0, times=100), "^no answer, closed"
    yield "600 silent connections", holds(600, b"", 0), "connections"
    yield "30 unfinished bodies of 19 MB", holds(30, bytes(19_000_000), 19_500_000, 8.0), "30 connections"
    yield "100 bodies without a byte", holds(100, b"", 19_500_000, 6.0), "100 connections"
    yield "disconnects in a body", leaves(post_head(10**6) + bytes(1000), reset=False), "disconnected"
    yield "resets in a body", leaves(post_head(10**6) + bytes(1000), reset=True), "disconnected"
    yield "disconnects before the answer", leaves(post_head(len(HONEST)) + HONEST, reset=True), "disconnected"
    yield "headers of 1 MB", sends(GET + b"X: " + b"x" * MB), "^400, closed"
    yield "10,000 headers", sends(GET + b"X: x\r\n" * 10_000 + b"\r\n"), "^(200|400), closed"
    yield "random bytes", sends(np.random.default_rng(3).bytes(10_000)), ", closed"
    yield "TLS", sends(bytes.fromhex("1603010200010001fc0303") + bytes(400)), "^400, closed"
    yield "HTTP/2", sends(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), "^400.*, closed"
    yield "two lengths", sends(post_head("4\r\nContent-Length: 5") + b"abcde"), "^400, closed"
    yield "negative length", sends(post_head(-1)), "^400, closed"
    yield "length and chunks", sends(post_head(4, "Transfer-Encoding: chunked\r\n") + b"0\r\n\r\n"), "^4.., closed"
    yield "broken chunks", sends(CHUNKED + b"zz\r\n\r\n"), "^400, closed"
    yield "websocket", sends(GET + b"Connection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n"), "^200, closed"
    yield "answers that nobody reads", unread, "closed"
    yield "one connection after errors", reuse, "405 422 200 200 404 200"
    yield "another host", posts(HONEST, {"Host": "evil.example"}), "400 .*--allow_host"
    yield "another address", posts(HONEST, {"Host": "192.0.2.1"}), "400 .*--allow_host"
    yield "a page of another host", posts(HONEST, {"Origin": "http://evil.example"}), "403"


def abuse(server: Server, name: str, act: Callable[[Server], str], expected: str, idle: float, right: str) -> dict:
    """Runs one abuse with an honest client beside it."""
    server.reset_peak()
    times, problems = [], []

    def ask() -> None:
        started = time.monotonic()
        try:
            status, text = server.post(HONEST)
            if (status, text) != (200, right):
                problems.append(f"the honest client got {status} {text[:80]}")
        except OSError as error:
            problems.append(f"the honest client got {error!r}")
        times.append(1000 * (time.monotonic() - started))

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(act, server)
        while not answer.done() or len(times) < 3:
            ask()
            time.sleep(0.05)
    ask()
    peak = server.memory("VmHWM")
    text = answer.result()
    if not re.search(expected, text):
        problems.append(f"expected {expected}")
    if max(times) > HONEST_MS:
        problems.append(f"the honest client waited {max(times):.0f} ms")
    if peak > idle + GROWTH_MB:
        problems.append(f"{peak:.0f} MB")
    if server.output:
        problems.append(f"it printed {server.output[-1].strip()[:80]!r}")
        server.output.clear()
    row = {"abuse": name, "answer": text, "ms": round(max(times)), "peak_mb": round(peak), "problems": problems}
    show(row)
    return row


def stop(workdir: Path, number: signal.Signals) -> dict:
    """Sends one signal while clients owe bytes, an image is being decoded, and others wait."""
    with serving(workdir) as server:
        server.post(HONEST)
        owing = [server.connect() for _ in range(20)]
        for connection, head in zip(owing, [post_head(10**7) + b"x", GET, b"", post_head(10**8)] * 5, strict=True):
            connection.sendall(head)
        with ThreadPoolExecutor(4) as pool:
            large = [pool.submit(server.post, image) for image in [encoded(NOISE, "JPEG")] * 2]
            time.sleep(0.3)
            started = time.monotonic()
            server.process.send_signal(number)
            try:
                code = server.process.wait(30)
            except subprocess.TimeoutExpired:
                code = None
            seconds = time.monotonic() - started
            statuses = [future.result()[0] if not future.exception() else 0 for future in large]
        for connection in owing:
            connection.close()
    printed = "".join(server.output)
    problems = [f"exit code {code}"] if code != 128 + number else []
    problems += [f"{seconds:.1f} s"] if seconds > STOP_SECONDS else []
    problems += ["a traceback"] if "Traceback" in printed else []
    problems += [f"requests that were being answered got {statuses}"] if statuses != [200, 200] else []
    answer = f"exit {code} after {seconds:.1f} s, {statuses}: {printed.strip()}"
    row = {"abuse": f"{number.name} while clients owe bytes", "answer": answer, "problems": problems}
    show(row)
    return row


def show(row: dict) -> None:
    wrong = "  WRONG: " + "; ".join(row["problems"]) if row["problems"] else ""
    line = f"{row['abuse']:36}  {row['answer'][:60]:60}  {row.get('ms', ''):>6}  {row.get('peak_mb', ''):>6}{wrong}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="workdir of a run (default: one made for this)")
    parser.add_argument("--only", default="", help="only the abuses whose name contains this")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workdir = args.workdir or train(Path(folder))
        print(f"{'abuse':36}  {'answer':60}  {'ms':>6}  {'peak MB':>6}")
        rows = []
        with serving(workdir) as server:
            status, right = server.post(HONEST)
            assert status == 200, right
            for _ in range(20):
                server.post(HONEST)
            idle = server.memory("VmRSS")
            rows += [abuse(server, *row, idle, right) for row in abuses() if args.only in row[0]]
        if args.only in "signals":
            rows += [stop(workdir, number) for number in (signal.SIGTERM, signal.SIGINT)]
    wrong = [row for row in rows if row["problems"]]
    result = {
        "abuses": len(rows),
        "wrong": wrong,
        "idle_mb": round(idle),
        "largest_mb": max((row["peak_mb"] for row in rows if "peak_mb" in row), default=0),
        "slowest_honest_ms": max((row["ms"] for row in rows if "ms" in row), default=0),
        "versions": {name: version(name) for name in ("jax", "pillow", "starlette", "uvicorn", "h11")},
    }
    print(json.dumps(result))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
