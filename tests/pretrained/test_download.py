"""Downloads from a misbehaving server: the right bytes under the final name, or an error message and no file."""

import dataclasses
import hashlib
import io
import os
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.errors import UserError
from jaxft.pretrained import download
from jaxft.pretrained.download import fetch
from tests.helpers.runs import ROOT

DATA = random.Random(0).randbytes(1_000_000)
NAME = "net-12345678.pth"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


PREFIX = sha256(DATA)[:8]


@dataclasses.dataclass
class Answer:
    """Describes the server's response to one request; the default is a correct one."""

    status: int = 0  # an HTTP error to send and nothing else
    ranges: bool = True  # honours Range; otherwise sends the whole file with status 200
    shift: int = 0  # offset of the range sent from the range requested
    longer: int = 0  # bytes by which Content-Length is too large
    sized: bool = True  # sends a Content-Length
    cut: int | None = None  # bytes after which the connection closes
    reset: bool = False  # ... with a reset
    stall: bool = False  # ... after a hang
    delay: float = 0  # seconds before the body
    redirect: bool = False
    location: str = ""  # where to redirect
    encoding: str = ""  # a Content-Encoding
    endless: bool = False  # sends zeros without end
    trickle: bool = False  # sends the body byte by byte
    trickled_headers: bool = False
    forged_range: int = 0  # sends bytes from this one on with status 206, whatever was asked


OK = Answer()


class Server(ThreadingHTTPServer):
    """Gives each of `answers` once, then always `then`; records where requests start and the bytes sent."""

    daemon_threads = True

    def __init__(self, answers: list[Answer], then: Answer, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.then, self.data = list(answers), then, data
        self.starts: list[int] = []
        self.sent = 0
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/models/{NAME}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        with suppress(ConnectionError):  # the client may disconnect
            self.answer()

    def answer(self) -> None:
        server = self.server
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))
        assert asked
        start = int(asked[1])
        if self.path.startswith("/moved/"):
            answer = OK
        else:
            answer = server.answers.pop(0) if server.answers else server.then
            server.starts.append(start)
        if answer.trickled_headers:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while not server.release.wait(0.02):
                self.wfile.write(b"X: x\r\n" if server.starts.count(0) % 2 else b"x")
            return
        if answer.redirect or answer.location:
            self.send_response(302)
            self.send_header("Location", answer.location or f"/moved/{NAME}")
            self.end_headers()
            return
        if answer.status:
            return self.send_error(answer.status)
        if answer.ranges and start >= len(server.data) and not answer.endless:
            return self.send_error(416)
        if answer.forged_range:
            start = answer.forged_range
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.data) - 1}/{len(server.data)}")
        elif answer.ranges and start:
            start += answer.shift
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.data) - 1}/{len(server.data)}")
        else:
            start = 0
            self.send_response(200)
        body = server.data[start:]
        if answer.encoding:
            self.send_header("Content-Encoding", answer.encoding)
        if answer.sized:
            self.send_header("Content-Length", str(len(body) + answer.longer))
        self.end_headers()
        time.sleep(answer.delay)
        while answer.endless and not server.release.is_set():
            self.wfile.write(bytes(100_000))
            server.sent += 100_000
        if answer.trickle:
            for i in range(len(body)):
                if server.release.wait(0.02):
                    return
                self.wfile.write(body[i : i + 1])
        body = body[: answer.cut]
        server.sent += len(body)
        self.wfile.write(body)
        if answer.stall:
            server.release.wait(20)
        if answer.reset:
            time.sleep(0.2)  # a reset discards what the client has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


@contextmanager
def serving(*answers: Answer, then: Answer = OK, data: bytes = DATA) -> Iterator[Server]:
    with Server(list(answers), then, data) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield server
        finally:
            server.release.set()
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(download, "PAUSE_SECONDS", 0.01)
        monkeypatch.setattr(download, "TIMEOUT_SECONDS", 5.0)
        monkeypatch.setenv("no_proxy", "*")
        yield


def assert_fetched(server: Server, folder: Path) -> None:
    path = fetch(server.url, PREFIX, folder)
    assert path == folder / NAME
    assert path.read_bytes() == DATA
    assert {file.name for file in folder.iterdir()} == {NAME, f"{NAME}.lock"}


def failure(url: str, folder: Path) -> str:
    """Returns the error, which must be one line with all that is needed to fetch the file by other means."""
    with pytest.raises(UserError) as caught:
        fetch(url, PREFIX, folder)
    message = str(caught.value)
    assert "\n" not in message
    assert url in message
    assert PREFIX in message
    assert str(folder) in message
    return message


def test_a_file_is_fetched_once(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    with serving() as server:
        assert_fetched(server, folder)
        assert_fetched(server, folder)
        assert server.starts == [0]


def test_a_valid_file_needs_no_server_and_no_write(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(DATA)
    assert fetch(f"http://127.0.0.1:1/{NAME}", PREFIX, tmp_path) == tmp_path / NAME
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


def test_a_url_may_have_a_query(tmp_path: Path) -> None:
    with serving() as server:
        assert fetch(f"{server.url}?raw=true", PREFIX, tmp_path) == tmp_path / NAME


@pytest.mark.parametrize(
    ("answers", "starts"),
    [
        ([Answer(cut=300_000)], [0, 300_000]),
        ([Answer(cut=300_000, sized=False)], [0, 300_000]),
        ([Answer(cut=300_000, reset=True)], [0, 300_000]),
        ([Answer(cut=1000), Answer(cut=5), Answer(cut=0), Answer(cut=0)], [0, 1000, 1005, 1005, 1005]),
        ([Answer(cut=300_000), Answer(ranges=False)], [0, 300_000]),
        ([Answer(cut=300_000), Answer(ranges=False, cut=200_000)], [0, 300_000, 200_000]),
        ([Answer(cut=300_000), Answer(status=416)], [0, 300_000, 0]),
        ([Answer(cut=300_000), Answer(shift=7)], [0, 300_000, 0]),
        ([Answer(cut=300_000), Answer(redirect=True)], [0, 300_000]),
        ([Answer(redirect=True)], [0]),
        ([Answer(status=500)], [0, 0]),
        ([Answer(status=503), Answer(status=429)], [0, 0, 0]),
        ([Answer(cut=300_000), Answer(status=500)], [0, 300_000, 300_000]),
        ([Answer(longer=1000)], [0]),
        ([Answer(longer=-400_000)], [0, 600_000]),
        ([Answer(longer=-400_000), Answer(longer=-100_000)], [0, 600_000, 900_000]),
        ([Answer(longer=-1_000_000)], [0, 0]),
        ([Answer(sized=False)], [0]),
    ],
    ids=str,
)
def test_a_download_recovers_from_server_faults(answers: list[Answer], starts: list[int], tmp_path: Path) -> None:
    with serving(*answers) as server:
        assert_fetched(server, tmp_path)
        assert server.starts == starts


def test_a_hanging_server_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.5)
    with serving(Answer(cut=300_000, stall=True)) as server:
        assert_fetched(server, tmp_path)
        assert server.starts == [0, 300_000]


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 200), max_size=12),
    idle=st.integers(0, download.TRIES - 1),
    sized=st.booleans(),
    longer=st.sampled_from([0, 50]),
)
def test_any_interruptions_end_with_the_right_bytes(cuts: list[int], idle: int, sized: bool, longer: int) -> None:
    data = DATA[:1000]
    answers = [Answer(cut=cut, sized=sized, longer=longer) for cut in cuts] + [Answer(cut=0)] * idle
    with tempfile.TemporaryDirectory() as folder, serving(*answers, data=data) as server:
        path = fetch(server.url, sha256(data)[:8], Path(folder))
        assert path.read_bytes() == data
        assert server.sent == len(data)  # each byte once


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 999), max_size=download.TRIES - 1))
def test_any_interruptions_without_ranges_end_with_the_right_bytes(cuts: list[int]) -> None:
    data = DATA[:1000]
    answers = [Answer(cut=cut, ranges=False) for cut in cuts]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(*answers, then=Answer(ranges=False), data=data) as server,
    ):
        assert fetch(server.url, sha256(data)[:8], Path(folder)).read_bytes() == data


@pytest.mark.parametrize(
    "then", [OK, Answer(sized=False), Answer(ranges=False), Answer(ranges=False, sized=False)], ids=str
)
def test_wrong_bytes_are_refused_and_reported(then: Answer, tmp_path: Path) -> None:
    wrong = DATA[:-1] + b"?"
    with serving(then=then, data=wrong) as server:
        message = failure(server.url, tmp_path)
        assert server.sent <= 2 * len(wrong)  # the second answer is hardly read
    assert f"{len(wrong)} bytes" in message
    assert sha256(wrong)[:16] in message
    assert [file.name for file in tmp_path.iterdir()] == [f"{NAME}.lock"]


def test_wrong_bytes_are_reported_even_with_a_wrong_length(tmp_path: Path) -> None:
    wrong = DATA[:-1] + b"?"
    with serving(then=Answer(longer=100), data=wrong) as server:
        assert sha256(wrong)[:16] in failure(server.url, tmp_path)
    assert not (tmp_path / NAME).exists()
    with serving() as server:
        assert_fetched(server, tmp_path)


@pytest.mark.parametrize("status", [404, 403])
def test_a_missing_file_is_reported_at_once(status: int, tmp_path: Path) -> None:
    with serving(then=Answer(status=status)) as server:
        assert str(status) in failure(server.url, tmp_path)
        assert server.starts == [0]
    assert [file.name for file in tmp_path.iterdir()] == [f"{NAME}.lock"]


@pytest.mark.parametrize(
    ("then", "requests"), [(Answer(status=500), 3), (Answer(cut=0), 3), (Answer(cut=1000, ranges=False), 4)], ids=str
)
def test_a_server_that_never_recovers_is_given_up(then: Answer, requests: int, tmp_path: Path) -> None:
    with serving(then=then) as server:
        failure(server.url, tmp_path)
        assert len(server.starts) == requests


@pytest.mark.parametrize("then", [Answer(endless=True, sized=False), Answer(endless=True, longer=10**12)], ids=str)
def test_a_download_ends_at_the_known_size(then: Answer, tmp_path: Path) -> None:
    with serving(then=then) as server:
        with pytest.raises(UserError, match="more than 2 MB"):
            fetch(server.url, PREFIX, tmp_path, max_bytes=2_000_000)
        assert server.sent < 20_000_000  # the rest is in the buffers of the sockets
    assert [file.name for file in tmp_path.iterdir()] == [f"{NAME}.lock"]
    (tmp_path / f"{NAME}.partial").write_bytes(DATA[:1000])
    with serving(then=then) as server, pytest.raises(UserError, match="more than 2 MB"):
        fetch(server.url, PREFIX, tmp_path, max_bytes=2_000_000)
    with serving() as server:
        assert_fetched(server, tmp_path)


@pytest.mark.parametrize(
    "then", [Answer(trickle=True), Answer(trickle=True, sized=False), Answer(cut=1, delay=0.01)], ids=str
)
def test_a_download_that_is_too_slow_is_given_up_and_can_be_resumed(
    then: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "RATE_SECONDS", 0.3)
    with serving(then=then) as server:
        assert re.search(r"only \d+ bytes in \d+ s \(the next try resumes\)", failure(server.url, tmp_path))
    part = (tmp_path / f"{NAME}.partial").read_bytes()
    assert part and DATA.startswith(part)
    monkeypatch.undo()
    with serving() as server:
        assert_fetched(server, tmp_path)
        assert server.starts == [len(part)]


def test_headers_that_never_end_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.3)
    with serving(then=Answer(trickled_headers=True)) as server:
        message = failure(server.url, tmp_path)
    assert "no answer within" in message


@pytest.mark.parametrize(
    ("location", "part"),
    [
        ("ftp://127.0.0.1/file", "redirects from http to ftp:"),
        ("file:///etc/passwd", "redirects from http to file:"),
        ("data:,x", "redirects from http to data:"),
        (f"/models/{NAME}", "redirects in a loop"),
        (f"/models/{NAME}?", "redirects in a loop"),
        ("", "HTTP status 302"),
    ],
)
def test_redirects_elsewhere_are_not_followed(location: str, part: str, tmp_path: Path) -> None:
    then = Answer(location=location) if location else Answer(status=302)
    with serving(then=then) as server:
        assert part in failure(server.url, tmp_path)
        assert len(server.starts) <= 6
    assert [file.name for file in tmp_path.iterdir()] == [f"{NAME}.lock"]


def test_a_redirect_from_https_to_http_is_not_followed() -> None:
    headers = Message()
    headers["location"] = "http://example.org/file"
    with pytest.raises(download._FailedError, match="redirects from https to http:"):
        download._Redirects().http_error_302(Request("https://example.org/file"), io.BytesIO(), 302, "", headers)


@pytest.mark.parametrize("url", [f"ftp://127.0.0.1/{NAME}", f"file:///etc/{NAME}", f"data:,{NAME}"])
def test_only_http_is_fetched(url: str, tmp_path: Path) -> None:
    assert "unknown url type" in failure(url, tmp_path)


def test_an_answer_that_was_not_asked_for_is_refused(tmp_path: Path) -> None:
    with serving(then=Answer(encoding="gzip")) as server:
        assert "compresses the file" in failure(server.url, tmp_path)
    with serving(then=Answer(forged_range=500)) as server:
        assert "another part of the file" in failure(server.url, tmp_path)
    with serving(then=Answer(status=204)) as server:
        assert "HTTP status 204 No Content" in failure(server.url, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [f"{NAME}.lock"]


def test_a_server_that_does_not_speak_http_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for _ in range(download.TRIES):
                client, _ = listener.accept()
                with client:
                    client.recv(1000)
                    client.sendall(b"\x1b[2J nonsense\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        message = failure(f"http://127.0.0.1:{listener.getsockname()[1]}/{NAME}", tmp_path)
        thread.join()
    assert "nonsense" in message
    assert message.isprintable()


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    for suffix in ("", ".partial"):
        os.mkfifo(tmp_path / f"{NAME}{suffix}")
        with pytest.raises(UserError, match="it is a FIFO, not a file"):
            fetch(f"http://127.0.0.1:1/{NAME}", PREFIX, tmp_path)
        (tmp_path / f"{NAME}{suffix}").unlink()
        (tmp_path / f"{NAME}{suffix}").mkdir()
        with pytest.raises(UserError, match="it is a folder, not a file"):
            fetch(f"http://127.0.0.1:1/{NAME}", PREFIX, tmp_path)
        (tmp_path / f"{NAME}{suffix}").rmdir()


def test_offline_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.5)
    with serving() as server:
        url = server.url
    start = time.monotonic()
    assert "refused" in failure(url, tmp_path)
    assert time.monotonic() - start < 5
    assert [file.name for file in tmp_path.iterdir()] == [f"{NAME}.lock"]


def test_an_unknown_host_is_reported(tmp_path: Path) -> None:
    failure(f"http://no-such-host.invalid/{NAME}", tmp_path)


def test_a_wrong_file_is_replaced_only_when_the_right_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(b"wrong")
    with serving(then=Answer(cut=0)) as server:
        assert "replacing the wrong one" in failure(server.url, tmp_path)
        assert path.read_bytes() == b"wrong"
    with serving() as server:
        assert_fetched(server, tmp_path)


@pytest.mark.parametrize(
    ("partial", "starts"),
    [
        (DATA, []),  # killed just before the rename
        (DATA[:1234], [1234]),
        (b"", [0]),
        (b"?" * 1234, [1234, 1_000_000, 0]),  # damaged: noticed once complete, and fetched again
        (DATA + b"?", [1_000_001, 0]),
    ],
    ids=["whole", "part", "empty", "damaged", "too long"],
)
@pytest.mark.parametrize("then", [OK, Answer(ranges=False)], ids=["ranges", "no ranges"])
def test_a_partial_file_of_an_earlier_run_is_completed(
    partial: bytes, starts: list[int], then: Answer, tmp_path: Path
) -> None:
    (tmp_path / f"{NAME}.partial").write_bytes(partial)
    with serving(then=then) as server:
        assert_fetched(server, tmp_path)
        if then.ranges:
            assert server.starts == starts


FETCH = """
import pathlib, resource, sys
from jaxft.pretrained.download import fetch
url, prefix, folder, limit = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
fetch(url, prefix, pathlib.Path(folder))
"""


def start_process(server: Server, folder: Path, limit: int = resource.RLIM_INFINITY) -> subprocess.Popen[str]:
    """Starts a process that fetches the file; `limit` is the largest size of a file in bytes."""
    command = [sys.executable, "-c", FETCH, server.url, PREFIX, str(folder), str(limit)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_processes_that_start_together_download_once(tmp_path: Path) -> None:
    with serving(Answer(delay=1)) as server:
        processes = [start_process(server, tmp_path) for _ in range(4)]
        errors = [process.communicate(timeout=30)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * 4, errors
        assert server.starts == [0]
        assert server.sent == len(DATA)
        assert_fetched(server, tmp_path)
    assert all(re.fullmatch(r"(waiting for another process .*\n)?", error) for error in errors), errors


def test_a_killed_download_resumes_where_it_stopped(tmp_path: Path) -> None:
    growing = tmp_path / f"{NAME}.partial"
    with serving(Answer(cut=300_000, stall=True)) as server:
        process = start_process(server, tmp_path)
        end = time.monotonic() + 20
        while not (growing.exists() and growing.stat().st_size == 300_000) and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / NAME).exists()
        assert_fetched(server, tmp_path)
        assert server.starts == [0, 300_000]


def test_a_full_disk_is_reported_and_the_download_resumes_later(tmp_path: Path) -> None:
    """Simulates a full disk by a file-size limit, which makes a write fail in the middle."""
    other = tmp_path / "other.pth"
    other.write_bytes(b"good")
    with serving() as server:
        process = start_process(server, tmp_path, limit=300_000)
        *_, last = process.communicate(timeout=30)[1].splitlines()
        assert last.startswith(f"jaxft.errors.UserError: {tmp_path / NAME} cannot be read or written: File too large")
        assert not (tmp_path / NAME).exists()
        assert fetch(server.url, PREFIX, tmp_path).read_bytes() == DATA
        assert server.starts == [0, 300_000]
    assert other.read_bytes() == b"good"


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"net-12345678\.pth cannot be read or written: Not a directory"):
        fetch(f"http://127.0.0.1:1/{NAME}", PREFIX, tmp_path / "file" / "weights")
    with pytest.raises(UserError, match="cannot be read or written"):
        fetch(f"http://127.0.0.1:1/{NAME}", PREFIX, tmp_path / "file")
