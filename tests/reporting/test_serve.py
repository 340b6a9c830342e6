"""The web page of predict --serve: in a process started as a user does, and its limits with a stand-in classifier."""

import asyncio
import http.client
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

import jaxft
from jaxft.data import datasets
from jaxft.data.fields import Field
from jaxft.errors import UserError
from jaxft.reporting import http_server
from jaxft.reporting.http_server import Queue, Uploads, make_server
from jaxft.reporting.serve import MAX_BYTES, allowed_names, listen, make_app
from jaxft.targets.classification import ClassTarget, Prediction, rank
from jaxft.targets.number import NumberTarget
from jaxft.targets.tags import TagsTarget
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from tests.helpers.runs import ROOT, environment


@contextmanager
def serving(workdir: Path, number: signal.Signals) -> Iterator[int]:
    """Starts the command and stops it by a signal, with a client that owes bytes."""
    command = [sys.executable, "-m", "jaxft.predict", "--workdir", str(workdir), "--serve", "--port=0"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        match = re.search(r"http://127.0.0.1:(\d+)/", process.stdout.readline())
        assert match, process.stderr.read()
        port = int(match[1])
        yield port
        with socket.create_connection(("127.0.0.1", port)) as owing:
            owing.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nx")
            time.sleep(0.3)
            process.send_signal(number)
            assert process.wait(20) == 128 + number
        assert process.stderr.read() == f"stopped by {number.name}\n"


@pytest.fixture(scope="module")
def port(small_run: Path) -> Iterator[int]:
    with serving(small_run, signal.SIGTERM) as port:
        yield port


def post(port: int, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", "/predict", body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def png(array: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


IMAGE = png(np.zeros((40, 40, 3), np.uint8))


def test_the_answer_equals_the_classifiers_prediction(port: int, small_run: Path) -> None:
    picture = datasets.load("sample:cifar10", "test").image[5]
    status, answer = post(port, png(picture))
    (prediction,) = jaxft.load(small_run).predict([picture])
    assert status == 200
    assert [top["label"] for top in answer["top_k"]] == [label for label, _ in prediction.top_k]
    np.testing.assert_allclose([top["probability"] for top in answer["top_k"]], [p for _, p in prediction.top_k], 1e-4)


def test_bodies_that_are_not_images_are_refused(port: int) -> None:
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")  # 400 million pixels in a few kilobytes
    for body, status, part in (
        (b"", 422, "cannot be read as an image"),
        (b"<script>alert(1)</script>", 422, "cannot be read as an image"),
        (IMAGE[:50], 422, "cannot be read as an image"),
        (bomb.getvalue(), 422, "20000 x 20000 pixels"),
        (bytes(MAX_BYTES + 1), 413, "larger than 20 MB"),
    ):
        found, answer = post(port, body)
        assert (found, part in answer["error"]) == (status, True), answer
    assert post(port, IMAGE)[0] == 200  # the server still works


def test_only_the_page_is_served_and_it_may_load_nothing_else(port: int) -> None:
    for path, status in (("/", 200), ("/../../etc/passwd", 404)):
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == status
            assert status != 200 or "default-src 'none'" in str(response.headers["Content-Security-Policy"])


def test_errors_are_reported_in_one_line(fails: Callable[..., str], small_run: Path) -> None:
    predict = ("-m", "jaxft.predict", "--workdir", small_run)
    assert "name either images and folders, or --serve" in fails(*predict)
    serve = (*predict, "--serve")
    assert "cannot listen on 203.0.113.1" in fails(*serve, "--host=203.0.113.1")
    assert "between 0 and 65535, not 99999" in fails(*serve, "--port=99999")
    assert "between 0 and 65535, not -1" in fails(*serve, "--port=-1")
    assert "--host" in fails(*serve, "--host=")
    assert "'no-such-host.invalid' is not known" in fails(*serve, "--host=no-such-host.invalid")
    assert "is not a host name" in fails(*serve, f"--host={'x' * 300}")
    assert "without scheme" in fails(*serve, "--allow_host=http://photos.example.org")
    with listen("127.0.0.1", 0) as taken:
        assert "in use" in fails(*serve, f"--port={taken.getsockname()[1]}")


# The rest starts the server in a thread of this process, with limits that are short enough to wait for.


class StandIn:
    """A classifier that answers at once."""

    class_names: tuple[str, ...] = ("cat", "dog")
    decoded_size = 32
    preprocessing = Preprocessing(32, IMAGENET_MEAN, IMAGENET_STD)

    def predict(self, pictures: list[np.ndarray], top_k: int) -> list[Prediction]:
        return [rank(np.array([0.25, 0.75], np.float32), self.class_names, top_k) for _ in pictures]


class JointStandIn(StandIn):
    """A classifier of tags with a threshold each and a number, whose names are not harmless in HTML."""

    class_names = ()
    targets = (
        ClassTarget(Field("class", "kind", "kind", names=("cat", "dog"))),
        TagsTarget(Field("tags", "tags", "tags", names=("<b>indoor</b>", "night"))),
        NumberTarget(Field("number", "age", "age")),
    )
    calibrations: ClassVar[dict[str, Any]] = {"tags": {"temperature": 2.0, "thresholds": [0.25, 0.75]}}

    def predict(self, pictures: list[np.ndarray], top_k: int) -> list[Any]:
        outputs = {"kind": np.array([0.25, 0.75]), "tags": np.array([0.5, 0.625]), "age": np.array(31.25)}
        found = {
            target.field.name: target.prediction(
                outputs[target.field.name], self.calibrations.get(target.field.name, {}), top_k
            )
            for target in self.targets
        }
        return [found for _ in pictures]


@contextmanager
def running(
    host: str = "127.0.0.1",
    allow_hosts: tuple[str, ...] = (),
    max_total: int = 100_000_000,
    classifier: Any = StandIn(),  # noqa: B008, without state
) -> Iterator[int]:
    uploads = Uploads(MAX_BYTES, max_total)
    with listen(host, 0) as listener:
        app = make_app(classifier, host, 2, uploads, allow_hosts)
        server = make_server(app, uploads)
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def test_the_answer_has_all_targets() -> None:
    with running(classifier=JointStandIn()) as port:
        status, answer = post(port, IMAGE)
    tags = {"night": 0.625, "<b>indoor</b>": 0.5}
    assert (status, list(answer)) == (200, ["targets"])
    assert [top["label"] for top in answer["targets"].pop("kind")["top_k"]] == ["dog", "cat"]
    assert answer["targets"] == {
        "tags": {
            "tags": ["<b>indoor</b>"],
            "probabilities": tags,
            "thresholds": {"<b>indoor</b>": 0.25, "night": 0.75},
        },
        "age": {"value": 31.25},
    }


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADER_SECONDS", "BODY_SECONDS", "LINGER_SECONDS", "STOP_SECONDS"):
        monkeypatch.setattr(http_server, name, 0.3)


def head(length: object = 10**6, extra: str = "") -> bytes:
    return f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n{extra}\r\n".encode()


def exchange(port: int, *parts: bytes, pause: float = 0.0, seconds: float = 5.0) -> tuple[str, bool]:
    """Sends the parts, then the last one until the server closes; returns its statuses and whether it closed."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        end = time.monotonic() + seconds
        try:
            for part in parts:
                connection.sendall(part)
            while pause and time.monotonic() < end:
                connection.sendall(parts[-1])
                time.sleep(pause)
        except ConnectionError:
            pass
        try:
            while part := connection.recv(65536):
                received += part
        except ConnectionError:
            pass
        except TimeoutError:
            return received.decode(), False
    return " ".join(re.findall(r"HTTP/1.1 (\d+)", received.decode("latin-1"))), True


@pytest.mark.parametrize(
    ("parts", "pause", "status"),
    [
        ((), 0.0, ""),  # silent
        ((b"GET / HTTP/1.1\r\nX: ", b"x"), 0.05, ""),  # endless headers
        ((head(), b"x"), 0.05, "408"),
        ((head(), b"x"), 0.0, "408"),
        ((head(1000, "Expect: 100-continue\r\n"),), 0.0, "100 408"),
        ((head(10**9), bytes(10**5)), 0.001, "413"),
        ((head(10**9, "Expect: 100-continue\r\n"),), 0.0, "413"),
        ((head(10**9).replace(b"/predict", b"/elsewhere"), bytes(10**5)), 0.001, "404"),
        ((head().replace(b"Content-Length: 1000000", b"Transfer-Encoding: chunked"), b"1\r\nx\r\n"), 0.05, "408"),
        ((head().replace(b"Content-Length: 1000000", b"Transfer-Encoding: chunked") + b"zz\r\n",), 0.0, "400"),
        ((b"\x16\x03\x01\x02\x00\r\n\r\n",), 0.0, "400"),
        ((b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000,), 0.0, "400"),
        ((head("5\r\nContent-Length: 4"),), 0.0, "400"),
        ((head(-1),), 0.0, "400"),
    ],
)
@pytest.mark.usefixtures("short_limits")
def test_connections_of_bad_clients_are_closed(
    parts: tuple[bytes, ...], pause: float, status: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with running() as port:
        assert exchange(port, *parts, pause=pause) == (status, True)
        assert post(port, IMAGE)[0] == 200
    assert capfd.readouterr() == ("", "")


def test_clients_that_disconnect_leave_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with running() as port:
        for begin in (head(), head() + b"x", head(len(IMAGE)) + IMAGE, b"GET / HT", b""):
            for reset in (False, True):
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(begin)
                    if reset:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert post(port, IMAGE)[0] == 200
    assert capfd.readouterr() == ("", "")


def test_unfinished_bodies_hold_bounded_memory_and_give_way() -> None:
    with running(max_total=2 * MAX_BYTES) as port:
        clients = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(6)]
        for client in clients:
            client.sendall(head(MAX_BYTES) + bytes(1000))
        assert post(port, IMAGE)[0] == 200  # a part of the memory is for small bodies
        assert post(port, bytes(3_000_000))[0] == 422  # one of the slow bodies is dropped for it
        assert [client for client in clients if b"503" in read_now(client)]
        for client in clients:
            client.close()


def read_now(client: socket.socket) -> bytes:
    client.setblocking(False)
    try:
        return client.recv(1000)
    except BlockingIOError:
        return b""


def test_the_oldest_silent_connection_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 5)
    with running() as port:
        clients = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(8)]
        assert post(port, IMAGE)[0] == 200
        assert clients[0].recv(1) == b""
        clients[-1].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert clients[-1].recv(12) == b"HTTP/1.1 200"
        for client in clients:
            client.close()


def test_cheap_requests_go_first() -> None:
    done = []

    async def request(queue: Queue, cost: int) -> None:
        async with queue.turn(cost) as in_thread:
            done.append(await in_thread(abs, cost))

    async def requests() -> None:
        queue = Queue()
        tasks = [asyncio.create_task(request(queue, cost)) for cost in (5, 9, 3, 7, 3)]
        await asyncio.sleep(0)
        tasks[3].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await request(queue, 1)

    asyncio.run(requests())
    assert done == [5, 3, 3, 9, 1]


def test_methods_and_addresses() -> None:
    with running() as port, closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        for method, path, status, allow in (  # one connection, also after errors
            ("GET", "/", 200, None),
            ("HEAD", "/", 200, None),
            ("GET", "/predict", 405, "POST"),
            ("HEAD", "/predict", 405, "POST"),
            ("PUT", "/predict", 405, "POST"),
            ("POST", "/", 405, "GET"),
            ("GET", "/predict/", 404, None),
        ):
            connection.request(method, path)
            response = connection.getresponse()
            text = response.read()
            assert response.status == status
            assert (allow is None) == ("Allow" not in response.headers)
            assert allow is None or allow in response.headers["Allow"]
            assert method == "HEAD" or status == 200 or json.loads(text)["error"]
            if (method, path) == ("GET", "/predict"):
                assert b"curl --data-binary @FILE http://127.0.0.1:" in text


def form(*parts: bytes) -> bytes:
    return b"".join(b'--x\r\nContent-Disposition: form-data; name="a"%s\r\n' % part for part in parts) + b"--x--\r\n"


FILE = b'; filename="a.png"\r\nContent-Type: image/png\r\n\r\n' + IMAGE
TEXT = b"\r\n\r\nphoto.jpg"


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        (form(FILE), 200, ""),
        (form(TEXT, FILE), 200, ""),
        (form(FILE, FILE), 422, "2 files"),
        (form(TEXT), 422, "-F file=@FILE"),
        (form(b'; filename=""\r\n\r\n'), 422, "empty"),
        (form(FILE)[:-9], 422, "incomplete"),
        (b"", 422, "incomplete"),
    ],
)
def test_a_form_with_one_file_is_answered(body: bytes, status: int, part: str) -> None:
    with running() as port:
        found, answer = post(port, body, Content_Type="multipart/form-data; boundary=x")
    assert (found, part in answer.get("error", "")) == (status, True), answer


def test_wrong_encodings_are_named() -> None:
    with running() as port:
        for body, headers, status, part in (
            (b"{}", {"Content_Type": "application/json"}, 415, "not JSON: curl --data-binary @FILE"),
            (IMAGE, {"Content_Encoding": "gzip"}, 415, "without a Content-Encoding"),
            (IMAGE[:30], {"Content_Type": "application/x-www-form-urlencoded"}, 422, "with --data-binary"),
            (IMAGE, {"Content_Type": "application/x-www-form-urlencoded"}, 200, ""),
        ):
            found, answer = post(port, body, **headers)
            assert (found, part in answer.get("error", "")) == (status, True), answer


def test_images_that_cost_too_much_are_refused() -> None:
    image = png(np.zeros((64, 64), np.uint8), "JPEG", progressive=True)
    last = image.rindex(b"\xff\xda")
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(IMAGE), 22) + IMAGE
    with running() as port:
        for body, status, part in (
            (image, 200, ""),
            (image[:last] + image[last:-2] * 200 + b"\xff\xd9", 422, "more than 100 scans"),
            (image[:2] + b"\xff\xe0\0\2" * 20_000 + image[2:], 422, "more than 100 scans"),
            (image + b"\xff\xda" * 200, 200, ""),  # what follows the image, as in a phone's moving photos
            (icon, 422, "cannot be read as an image; the page reads AVIF"),
            (png(np.zeros((4000, 4000), np.uint8), "BMP")[:2000], 422, "BMP images up to 10,000,000"),
            (png(np.zeros((1, 60_000), np.uint8)), 200, ""),
            (png(np.zeros((60_000, 1), np.uint8)), 200, ""),
        ):
            found, answer = post(port, body)
            assert (found, part in answer.get("error", "")) == (status, True), answer


@pytest.mark.parametrize(
    ("host", "allow_hosts", "accepted", "refused"),
    [
        ("127.0.0.1", (), ["localhost", "127.0.0.1", "[::1]:80", "LOCALHOST."], ["evil.example", "192.0.2.1", "a b"]),
        ("0.0.0.0", (), ["127.0.0.1", "localhost", socket.gethostname()], ["evil.example", "192.0.2.1"]),
        ("127.0.0.1", ("photos.example.org", "Other."), ["photos.example.org", "other"], ["example.org"]),
    ],
)  # fmt: skip
def test_only_names_of_this_machine_are_answered(
    host: str, allow_hosts: tuple[str, ...], accepted: list[str], refused: list[str]
) -> None:
    with running(host, allow_hosts) as port:
        for name in accepted:
            assert post(port, IMAGE, Host=name)[0] == 200, name
            assert post(port, IMAGE, Origin=f"https://{name}")[0] == 200, name
        for name in refused:
            assert post(port, IMAGE, Host=name)[0] == 400, name
            assert post(port, IMAGE, Origin=f"https://{name}")[0] == 403, name
        assert post(port, IMAGE, Origin="null")[0] == 403


def test_a_client_may_ask_for_the_address_that_it_connects_to() -> None:
    with running("0.0.0.0") as port, closing(http.client.HTTPConnection("127.0.0.2", port, timeout=10)) as connection:
        for name, status in (("127.0.0.2", 200), (f"127.0.0.2:{port}", 200), ("127.0.0.3", 400)):
            connection.request("GET", "/", headers={"Host": name})
            response = connection.getresponse()
            response.read()
            assert response.status == status


def test_allowed_names_are_names() -> None:
    assert {"photos.example.org", "::2"} <= allowed_names("::1", ["Photos.example.org", "[::2]"])
    for name in ("http://a", "a:80", "a/b", "*", ""):
        with pytest.raises(UserError, match="--allow_host takes a name"):
            allowed_names("::1", [name])


def test_the_page_knows_the_limit() -> None:
    page = files("jaxft.reporting").joinpath("templates/serve.html").read_text("utf-8")
    assert f"const maxBytes = {MAX_BYTES:_};" in page


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_the_answer(browser: Any, port: int, tmp_path: Path, width: int) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    (tmp_path / "picture.png").write_bytes(png(datasets.load("sample:cifar10", "test").image[5]))
    (tmp_path / "no picture.png").write_text("no picture")
    (tmp_path / "large.png").write_bytes(bytes(MAX_BYTES + 1))
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("browser")  # discards the entries of earlier pages
    browser.get(f"http://127.0.0.1:{port}/")
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "picture.png"))
    WebDriverWait(browser, 60).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#answer li"))
    assert len(browser.find_elements(By.CSS_SELECTOR, "#answer li")) == 3
    assert browser.execute_script("return document.getElementById('picture').naturalWidth") == 32
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    assert browser.get_log("browser") == []
    for name, part in (("no picture.png", "cannot be read as an image"), ("large.png", "larger than 20 MB")):
        browser.find_element(By.ID, "file").send_keys(str(tmp_path / name))
        shown = browser.find_element(By.ID, "error")
        WebDriverWait(browser, 60).until(lambda _, shown=shown, part=part: part in shown.text)  # type: ignore[misc]


@pytest.mark.slow
def test_a_browser_shows_all_targets(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    (tmp_path / "picture.png").write_bytes(IMAGE)
    browser.get_log("browser")  # discards the entries of earlier pages
    with running(classifier=JointStandIn()) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        browser.find_element(By.ID, "file").send_keys(str(tmp_path / "picture.png"))
        WebDriverWait(browser, 60).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#answer section"))
        assert [e.text for e in browser.find_elements(By.CSS_SELECTOR, "#answer h2")] == ["kind", "tags", "age"]
        assert [e.text for e in browser.find_elements(By.CSS_SELECTOR, "#answer .number")] == ["31.25"]
        rows = [e.text.splitlines() for e in browser.find_elements(By.CSS_SELECTOR, "#answer li")]
        assert rows == [["dog", "75.0%"], ["cat", "25.0%"], ["night", "62.5%"], ["<b>indoor</b>", "50.0%"]]
        assert [e.text.split()[0] for e in browser.find_elements(By.CSS_SELECTOR, "li.below")] == ["night"]
        marks = browser.find_elements(By.CSS_SELECTOR, "#answer i")
        assert [mark.value_of_css_property("left") != "0px" for mark in marks] == [True, True]
    assert browser.get_log("browser") == []
