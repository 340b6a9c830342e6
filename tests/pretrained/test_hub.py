"""Weights by name from a local server that answers as the Hugging Face Hub does."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import file_download

from jaxft.errors import UserError
from jaxft.pretrained import hub
from jaxft.pretrained.convert import to_torch
from jaxft.pretrained.load import load_pretrained, read_weights
from jaxft.pretrained.torch_files import write_tensors
from tests.helpers.hub import Repository, Server, serving
from tests.helpers.runs import ROOT

CONFIG = {
    "architecture": "resnet18",
    "num_classes": 3,
    "pretrained_cfg": {
        "input_size": [3, 64, 64],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "crop_mode": "center",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.3, 0.2, 0.1],
    },
    "label_names": ["cat", "dog", "owl"],
}
TIMM = json.dumps(CONFIG).encode()


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """A ResNet-18 of width 4 with three classes, by torchvision's names."""
    tensors = to_torch(read_weights(ROOT / "tests" / "fixtures" / "weights" / "width4.safetensors"))
    return tensors | {"fc.weight": tensors["fc.weight"][:3], "fc.bias": tensors["fc.bias"][:3]}


@pytest.fixture(scope="module")
def weights(tensors: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    write_tensors(path, tensors)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches, no token, and no pauses between tries."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "jaxft"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # else it asks for a list of agents first
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, Repository]], Server]]:
    """Returns a function that starts a server and makes it the Hub."""
    running = []

    def start(repositories: dict[str, Repository]) -> Server:
        context = serving(repositories)
        server = context.__enter__()
        running.append(context)
        use(server.endpoint, monkeypatch)
        return server

    yield start
    for context in running:
        context.__exit__(None, None, None)


def use(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what HF_ENDPOINT does before huggingface_hub is imported."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def message(source: str) -> str:
    """Returns the error, which must be one line of at most 240 characters without the folders of the test."""
    with pytest.raises(UserError) as caught:
        load_pretrained(source)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text.replace(huggingface_hub.constants.HF_HUB_CACHE, "CACHE")) <= 240
    return text


def dead_endpoint() -> str:
    """Returns an address where nothing listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


def test_weights_are_fetched_and_converted_once(
    serve: Callable[..., Server],
    weights: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repository = Repository({"config.json": TIMM, "model.safetensors": weights, "pytorch_model.bin": b"", "a.md": b""})
    server = serve({"me/net": repository})
    first = load_pretrained("hf:me/net", "resnet18")
    (tmp_path / "model.safetensors").write_bytes(weights)
    jax.tree.map(np.testing.assert_array_equal, first.variables, read_weights(tmp_path).variables)
    expected = {
        "arch": "resnet18",
        "width": 4,
        "num_classes": 3,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.3, 0.2, 0.1),
        "image_size": 64,
        "resize": 67,
        "interpolation": "bicubic",
        "class_names": ["cat", "dog", "owl"],
        "name": f"hf:me/net@{repository.commit[:12]}",
        "commit": repository.commit,
    }
    assert {key: first.provenance[key] for key in expected} == expected
    assert "notes" not in first.provenance
    files = [line for line in server.requests if "/resolve/" in line or "/cdn/" in line]
    assert {line.rpartition("/")[2] for line in files} == {"config.json", "model.safetensors"}

    before = len(server.requests)
    again = load_pretrained(f"hf:me/net@{repository.commit}")
    assert server.requests[before:] == [f"HEAD /me/net/resolve/{repository.commit}/config.json"]
    jax.tree.map(np.testing.assert_array_equal, first.variables, again.variables)
    assert json.loads(json.dumps(first.provenance)) == again.provenance
    with pytest.raises(UserError, match="hf:me/net holds a resnet18, not a resnet50"):
        load_pretrained("hf:me/net", "resnet50")

    (converted,) = (tmp_path / "jaxft").rglob("*.safetensors")
    converted.write_bytes(b"damaged")  # it is converted again, from the Hub's cache
    before = len(server.requests)
    jax.tree.map(np.testing.assert_array_equal, first.variables, load_pretrained("hf:me/net").variables)
    assert not any(line.startswith("GET") and "/api/" not in line for line in server.requests[before:])
    assert capsys.readouterr() == ("", "")

    use(dead_endpoint(), monkeypatch)
    jax.tree.map(np.testing.assert_array_equal, first.variables, load_pretrained("hf:me/net").variables)
    text = capsys.readouterr().err
    assert "is out of reach" in text
    assert text.endswith(f"; hf:me/net is commit {repository.commit[:12]} in the cache\n")
    assert "me/other is not in" in message("hf:me/other")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    converted.unlink()
    jax.tree.map(np.testing.assert_array_equal, first.variables, load_pretrained("hf:me/net").variables)
    assert capsys.readouterr().err == ""
    assert "HF_HUB_OFFLINE is set; unset it" in message("hf:me/other")


def test_a_new_commit_is_fetched(serve: Callable[..., Server], weights: bytes) -> None:
    repository = Repository({"config.json": TIMM, "model.safetensors": weights})
    server = serve({"me/net": repository})
    assert load_pretrained("hf:me/net").provenance["image_size"] == 64
    repository.files["config.json"] = TIMM.replace(b"64, 64", b"96, 96")
    assert load_pretrained("hf:me/net").provenance["image_size"] == 96
    assert sum(line.startswith("GET /cdn/") for line in server.requests) == 1, "the weights are the same"


def test_a_broken_connection_resumes(
    serve: Callable[..., Server], weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    repository = Repository({"config.json": TIMM, "model.safetensors": weights}, cut=20_000)
    server = serve({"me/net": repository})
    assert load_pretrained("hf:me/net").provenance["num_classes"] == 3
    assert "bytes=20000-" in server.ranges


def test_a_token_is_sent(serve: Callable[..., Server], weights: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"config.json": TIMM, "model.safetensors": weights}
    server = serve(
        {"me/gated": Repository(files, token="right", gated=True), "me/private": Repository(files, token="right")}
    )
    assert "me/gated is gated: accept its conditions there, then `hf auth login`" in message("hf:me/gated")
    assert "there is no" in (text := message("hf:me/private"))
    assert "me/private, or it is private: check the name; for a private one `hf auth login`" in text
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "HTTP status 401; the token is not accepted" in message("hf:me/private")
    monkeypatch.setenv("HF_TOKEN", "right")
    assert load_pretrained("hf:me/gated").provenance["num_classes"] == 3
    assert server.tokens == {None, "Bearer wrong", "Bearer right"}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            {"model.safetensors": None},
            "neither model.safetensors nor pytorch_model.bin, whole or in shards: it holds no",
        ),
        (
            {"model.safetensors": None, "a.pth": b"0", "b.h5": b"0"},
            "neither model.safetensors nor pytorch_model.bin, whole or in shards: it holds a.pth, b.h5",
        ),
        ({"config.json": None}, "has no config.json of timm or transformers"),
        ({"config.json": b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'}, "is a llama, which jaxft"),
        ({"config.json": b'{"architecture": "efficientnet_b0"}'}, "is a efficientnet_b0, which jaxft does not have"),
        ({"config.json": b'{"architecture": ["a"]}'}, "is a ['a'], which jaxft does not have"),
        ({"config.json": b"[1"}, "is neither timm's nor transformers'; jaxft reads ResNet"),
        ({"config.json": b"{" + b" " * 1_000_001 + b"}"}, "has 1,000,003 bytes, so it is not timm's"),
        ({"model.safetensors": b"<html>"}, "it is HTML"),
        ({"model.safetensors": b'{"weight_map": 3}'}, "model.safetensors cannot be read as the index"),
    ],
)
def test_a_repository_without_a_network_of_ours_is_refused(
    serve: Callable[..., Server], weights: bytes, change: dict[str, bytes | None], part: str
) -> None:
    files = {"config.json": TIMM, "model.safetensors": weights} | change
    server = serve({"me/net": Repository({name: data for name, data in files.items() if data is not None})})
    with pytest.raises(UserError) as caught:
        load_pretrained("hf:me/net")
    assert part in str(caught.value)
    if files["model.safetensors"] == weights:
        assert not any("/cdn/" in line for line in server.requests), "no weights were fetched"


def test_what_the_hub_refuses_is_one_line(serve: Callable[..., Server], weights: bytes) -> None:
    files = {"config.json": TIMM, "model.safetensors": weights}
    server = serve(
        {
            "me/net": Repository(files),
            "me/short": Repository(files, sizes={"model.safetensors": len(weights) + 5}),
            "me/huge": Repository(files, sizes={"model.safetensors": 10**11}),
            "me/down": Repository(files, status=503),
            "me/refused": Repository(files, status=403),
            "me/odd": Repository(files, false_commit="../../../../odd"),
        }
    )
    assert "me/missing, or it is private" in message("hf:me/missing")
    assert "me/net has no revision 'v9'; name a branch" in message("hf:me/net@v9")
    assert "could not be fetched (peer closed connection" in message("hf:me/short")
    assert "hf:me/huge has 100,000,000,000 bytes of weights" in message("hf:me/huge")
    assert "is out of reach (HTTP status 503)" in message("hf:me/down")
    assert "HTTP status 403; the token is not accepted" in message("hf:me/refused")
    assert "does not answer as the Hugging Face Hub does" in message("hf:me/odd")
    before = len(server.requests)
    for source in ("hf:", "hf:net", "hf:me/net/file", "hf:me/net@", "hf:../net", "hf:a b/c", "hf:a--b/c", "hf:#x"):
        assert "OWNER/NAME" in message(source)
    assert "if it is a repository on the Hub: hf:me/net" in message("me/net")
    assert "the name of this one is hf:me/net" in message("https://huggingface.co/me/net/tree/main")
    assert len(server.requests) == before


def test_an_answer_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        use(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        started = time.monotonic()
        assert "is out of reach (timed out); try again" in message("hf:me/net")
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_cache_that_cannot_be_written_is_named(
    serve: Callable[..., Server], weights: bytes, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    serve({"me/net": Repository({"config.json": TIMM, "model.safetensors": weights})})

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", refuse)
        text = f"{huggingface_hub.constants.HF_HUB_CACHE} cannot be written: {os.strerror(number)}; free some space"
        assert text in message("hf:me/net")
    with monkeypatch.context() as patch:  # our own copy is not needed
        patch.setattr("jaxft.pretrained.weights_file.atomic_write", refuse)
        assert load_pretrained("hf:me/net").provenance["num_classes"] == 3


def test_shards_are_fetched_with_their_index(
    serve: Callable[..., Server], tensors: dict[str, np.ndarray], weights: bytes, tmp_path: Path
) -> None:
    keys = list(tensors)
    files, index = {"config.json": TIMM}, dict[str, str]()
    for i, part in enumerate((keys[:40], keys[40:])):
        name = f"model-{i + 1:05}-of-00002.safetensors"
        write_tensors(tmp_path / name, {key: tensors[key] for key in part})
        files[name] = (tmp_path / name).read_bytes()
        index |= dict.fromkeys(part, name)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": index}).encode()
    files["pytorch_model.bin"] = b"not needed"
    lacking = {name: data for name, data in files.items() if "00002-of" not in name}
    serve({"me/net": Repository(files), "me/lacking": Repository(lacking)})
    variables = load_pretrained("hf:me/net").variables
    (tmp_path / "model.safetensors").write_bytes(weights)
    jax.tree.map(np.testing.assert_array_equal, variables, read_weights(tmp_path / "model.safetensors").variables)
    text = message("hf:me/lacking")
    assert "lacks model-00002-of-00002.safetensors, which its model.safetensors.index.json names" in text


def test_commands_take_a_name(
    serve: Callable[..., Server],
    weights: bytes,
    tmp_path: Path,
    fails: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from jaxft.convert import main

    serve({"me/net": Repository({"config.json": TIMM, "model.safetensors": weights})})
    main(["hf:me/net", str(tmp_path / "out.safetensors")])
    assert "resnet18, 3 classes, from hf:me/net (SHA-256" in capsys.readouterr().out
    main(["hf:me/net#.", "--info"])
    output = capsys.readouterr().out
    assert "head      fc, 3 classes\n" in output
    assert "images    64 pixels, cropped from 67, bicubic\n" in output
    assert "me/other, or it is private" in fails("-m", "jaxft.convert", "hf:me/other", "--info")


@pytest.mark.slow
def test_a_killed_download_starts_again(weights: bytes, tmp_path: Path) -> None:
    """Runs commands in processes of their own, since the Hub's library reads its variables once."""
    with serving({"me/net": Repository({"config.json": TIMM, "model.safetensors": weights}, token="right")}) as server:
        variables = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "right"}
        environment = os.environ | variables | {"JAXFT_CACHE": str(tmp_path / "jaxft"), "no_proxy": "*"}
        command = [sys.executable, "-m", "jaxft.convert", "hf:me/net", str(tmp_path / "out.safetensors")]
        server.stall = True
        with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
            assert server.stalled.wait(60)
            process.kill()
        server.stall = False
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, ""), result
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, ""), result
    assert (tmp_path / "home" / "hub" / "models--me--net").is_dir()
