"""The web page of predict --serve, in a process started as a user does."""

import http.client
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import jaxft
from jaxft.data import datasets
from jaxft.reporting.serve import MAX_BYTES
from tests.helpers.runs import ROOT, environment


@pytest.fixture(scope="module")
def port(small_run: Path) -> Iterator[int]:
    command = [sys.executable, "-m", "jaxft.predict", "--workdir", str(small_run), "--serve", "--port=0"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        match = re.search(r"http://127.0.0.1:(\d+)/", process.stdout.readline())
        assert match, process.stderr.read()
        yield int(match[1])
        process.send_signal(signal.SIGINT)
        process.wait(30)
        assert "Traceback" not in process.stderr.read()


def post(port: int, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", "/predict", body, headers)
        response = connection.getresponse()
        text = response.read().decode()
    return response.status, json.loads(text) if text.startswith("{") else {"error": text}


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


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
        (png(np.zeros((40, 40, 3), np.uint8))[:50], 422, "cannot be read as an image"),
        (bomb.getvalue(), 422, "20000 x 20000 pixels"),
        (bytes(MAX_BYTES + 1), 413, "larger than 20 MB"),
    ):
        found, answer = post(port, body)
        assert (found, part in answer["error"]) == (status, True), answer
    assert post(port, png(np.zeros((40, 40, 3), np.uint8)))[0] == 200  # the server still works


def test_other_host_names_are_refused(port: int) -> None:
    assert post(port, b"", Host="evil.example")[0] == 400


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
    assert "cannot listen" in fails(*predict, "--serve", "--host=203.0.113.1")


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_the_answer(browser: Any, port: int, tmp_path: Path, width: int) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    (tmp_path / "picture.png").write_bytes(png(datasets.load("sample:cifar10", "test").image[5]))
    (tmp_path / "no picture.png").write_text("no picture")
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
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "no picture.png"))
    WebDriverWait(browser, 60).until(lambda _: browser.find_element(By.ID, "error").text)
    assert "cannot be read as an image" in browser.find_element(By.ID, "error").text
