"""Streamed images equal those held on the devices, in the same order, whichever reader is used."""

import pickle
import re
import shutil
import signal
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from jaxft.data import budget, datasets, image_file, lazy_images
from jaxft.data.batches import make_batches
from jaxft.data.dataset import DataOptions, Dataset
from jaxft.data.lazy_images import LazyImages, MappedImages
from jaxft.data.loader import BatchReader, ResidentLoader, make_loader
from jaxft.errors import UserError
from jaxft.files import SAMPLES_DIR
from tests.helpers.runs import ROOT, TINY, Run, metrics, started, wait_for_steps, without_times

DATA = ROOT / "tests" / "fixtures"
STREAMED = "--config.data.stream=always"
MIXED = "--config.augment.cutmix=1"


@given(
    size=st.integers(1, 40),
    share=st.integers(1, 5),
    devices=st.integers(1, 4),
    seed=st.integers(0, 99),
    partners=st.booleans(),
)
def test_a_streamed_batch_contains_the_examples_that_it_indexes(
    size: int, share: int, devices: int, seed: int, partners: bool
) -> None:
    numbers = np.arange(size)
    data = Dataset(numbers.astype(np.uint8).reshape(-1, 1, 1, 1) + np.zeros(3, np.uint8), numbers.astype(np.int32), ())
    order = np.random.default_rng(seed).permutation(size)
    named = list(make_batches(order, share * devices, devices))
    brought = BatchReader(data, named, partners)
    assert len(brought) == len(named)
    for i, batch in enumerate(named):
        own = brought[i]
        assert own.examples is not None
        assert own.examples.image.shape == (devices, share + partners, 3)  # one shape, one program
        for ours, theirs in [(own.index, batch.index), (own.partner, batch.partner)][: 1 + partners]:
            for array in (own.examples.dataset_index, own.examples.label, own.examples.image[..., 0]):
                found = np.take_along_axis(np.asarray(array), np.asarray(ours), 1)
                np.testing.assert_array_equal(found[batch.mask > 0], theirs[batch.mask > 0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes the sample's test images as files, one in ten with another size."""
    folder = tmp_path_factory.mktemp("pictures")
    with tarfile.open(SAMPLES_DIR / "cifar10.tar.xz") as tar:
        tar.extractall(folder, [member for member in tar if member.name.startswith("test")], filter="data")
    for path in sorted((folder / "test").rglob("*.jpg"))[::10]:
        Image.open(path).resize((50, 41)).save(path)
    return folder


def kept_and_lazy(folder: Path) -> tuple[Dataset, Dataset]:
    """Returns the test split from the cache and from its files."""
    load = partial(datasets.load, f"folder:{folder}", "test")
    return load(DataOptions(side=24, cache="always")), load(DataOptions(side=24, cache="never"))


def test_lazy_images_from_files_index_like_arrays(folder: Path) -> None:
    arrays, files = kept_and_lazy(folder)
    assert isinstance(files.image, LazyImages)
    assert files.image.shape == arrays.image.shape
    assert files.image.nbytes == arrays.image.nbytes
    np.testing.assert_array_equal(files.label, arrays.label)
    for index in (7, np.int64(7), [3, 999, 3], np.arange(20).reshape(4, 5), np.array([], int)):
        np.testing.assert_array_equal(files.image[index], arrays.image[index])


@pytest.mark.parametrize("source", ["folder", "records"])
def test_images_shrunk_by_another_filter_are_not_taken_from_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "arrays"))
    if source == "folder":
        load = partial(datasets.load, f"folder:{folder}", "test")
    else:
        load = partial(datasets.load, "tiny_pictures", "train[10%:]")
    options = DataOptions(dir=str(DATA / "array_record"), side=24)
    index = np.arange(5)
    names = ("bilinear", "bicubic")
    kept = {name: np.array(load(options._replace(interpolation=name)).image[index]) for name in names}
    assert (kept["bilinear"] != kept["bicubic"]).any()
    with monkeypatch.context() as patch:
        patch.setattr(image_file, "open_regular", None)  # so that no image can be read again
        patch.setattr("subprocess.run", None)
        for name in names:
            np.testing.assert_array_equal(load(options._replace(interpolation=name)).image[index], kept[name])
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "records"))
    lazy = load(options._replace(interpolation="bicubic", cache="never"))
    assert isinstance(lazy.image, LazyImages)
    np.testing.assert_array_equal(lazy.image[index], kept["bicubic"])


def test_decoded_images_are_cached_if_the_disk_has_twice_their_size(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "not" / "yet"))
    needed = 1000 * 24 * 24 * 3
    free = 2 * needed - 2

    def disk_usage(path: Path) -> Any:
        assert path.is_dir()
        return SimpleNamespace(free=free)

    monkeypatch.setattr(budget.shutil, "disk_usage", disk_usage)
    records = partial(datasets.load, "tiny_pictures", "train")
    options = DataOptions(dir=str(DATA / "array_record"), side=2000)
    assert isinstance(datasets.load(f"folder:{folder}", "test", DataOptions(side=24)).image, LazyImages)
    assert isinstance(records(options).image, np.ndarray)
    free = 2 * needed
    assert isinstance(datasets.load(f"folder:{folder}", "test", DataOptions(side=24)).image, np.memmap)
    free = 0
    assert isinstance(datasets.load(f"folder:{folder}", "test", DataOptions(side=24)).image, np.memmap)
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "other"))
    assert isinstance(records(options).image, LazyImages)


@pytest.mark.parametrize("stream", ["auto", "never"])
def test_images_that_fit_in_memory_are_read_once_without_a_disk_cache(folder: Path, stream: str) -> None:
    kept, in_files = kept_and_lazy(folder)
    loader = make_loader(in_files, ConfigDict({"stream": stream, "workers": 0}))
    assert isinstance(loader, ResidentLoader)
    np.testing.assert_array_equal(loader.examples.gather(np.arange(len(kept.label))), kept.image)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's /dev/full stands for a full disk")
@pytest.mark.parametrize("cache", ["always", "never"])
def test_a_full_disk_is_reported(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    opened = Path.open

    def open_full(path: Path, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        return opened(Path("/dev/full") if "w" in mode else path, mode, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(UserError, match=rf"cannot be kept in {tmp_path} \(No space left on device\).*data.cache=never"):
        datasets.load(f"folder:{folder}", "test", DataOptions(side=24, cache=cache))
    assert not list((tmp_path / "datasets").iterdir())


def test_worker_processes_receive_the_path_of_an_array_and_not_a_copy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    kept = datasets.load(f"folder:{folder}", "test", DataOptions(side=24, cache="always")).image
    pickled = pickle.dumps(MappedImages.of(kept))
    assert len(pickled) < 1000
    index = np.array([[3, 999], [3, 0]])
    np.testing.assert_array_equal(pickle.loads(pickled)[index], kept[index])
    path = Path(kept.filename)
    (tmp_path / "another").write_bytes(bytes(path.stat().st_size))
    (tmp_path / "another").replace(path)
    lazy_images._mapped.cache_clear()  # as in a new process
    with pytest.raises(UserError, match=r"image\.bin has changed since the run began"):
        pickle.loads(pickled)[3]


@pytest.mark.parametrize("side", [32, 20])
def test_lazy_images_from_records_index_like_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    options = DataOptions(dir=str(DATA / "array_record"), side=side)
    load = partial(datasets.load, "tiny_pictures", "train[10%:]")
    records = load(options._replace(cache="never"))
    again = load(options._replace(cache="never"))
    arrays = load(options)
    for data in (records, again):
        assert isinstance(data.image, LazyImages)
        assert data.image.shape == arrays.image.shape
        assert data.class_names == arrays.class_names
        np.testing.assert_array_equal(data.label, arrays.label)
        for index in (7, np.arange(20).reshape(4, 5)):
            np.testing.assert_array_equal(data.image[index], arrays.image[index])


def test_vanished_records_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(DATA / "array_record", tmp_path / "data")
    load = partial(datasets.load, "tiny_pictures", "train", DataOptions(dir=str(tmp_path / "data"), cache="never"))
    records = load()
    for path in tmp_path.rglob("*.array_record*"):
        path.write_bytes(b"no records")
    with pytest.raises(UserError, match=r"image 3 of .*tiny_pictures.* cannot be read: "):
        records.image[3]
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match=r"neither TFDS nor .* has a dataset 'tiny_pictures'"):
        load()


def test_small_images_of_one_size_are_streamed_without_resizing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 6), "red").save(tmp_path / name / "0.png")
    data = datasets.load(f"folder:{tmp_path}", "train", DataOptions(side=24, holdout=0, cache="never"))
    np.testing.assert_array_equal(data.image[[1]], np.broadcast_to(np.array([255, 0, 0], np.uint8), (1, 6, 8, 3)))


def test_unreadable_files_are_found_before_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    broken = sorted((mine / "test" / "cat").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:300])  # the header is whole
    with pytest.raises(UserError, match=rf"1 of 1,000 files cannot be used: {broken}.*data.unreadable=skip"):
        datasets.load(f"folder:{mine}", "test", DataOptions(cache="never"))
    for _ in range(2):  # the second time from the first one's result
        data = datasets.load(f"folder:{mine}", "test", DataOptions(cache="never", unreadable="skip"))
        assert len(data.label) == 999
        assert broken not in data.image.read.paths
    assert capsys.readouterr().err.count(f"skipped: {broken}") == 1
    for path in mine.rglob("*.jpg"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=f"folder:{mine} has no images"):
        datasets.load(f"folder:{mine}", "test", DataOptions(cache="never", unreadable="skip"))


@pytest.fixture(scope="module")
def from_memory(run: Run, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "from_memory"
    result = run(*TINY, MIXED, f"--config.data.name=folder:{folder}", "--workdir", workdir)
    assert result.returncode == 0, result.stderr
    assert "streamed" not in result.stdout
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "cache"), [(0, "never"), (2, "never"), (0, "auto"), (2, "auto")])
def test_a_killed_streamed_run_equals_a_run_from_memory(
    run: Run, folder: Path, from_memory: Path, tmp_path: Path, workers: int, cache: str
) -> None:
    command = (
        *TINY,
        MIXED,
        STREAMED,
        f"--config.data.name=folder:{folder}",
        f"--config.data.workers={workers}",
        f"--config.data.cache={cache}",
        "--workdir",
        tmp_path / "run",
    )
    with started(*command) as process:
        wait_for_steps(process, tmp_path / "run", 6)
        readers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(readers) >= workers
    assert not psutil.wait_procs(readers, timeout=60)[1]
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert "; streamed" in result.stdout
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(from_memory))
    again = run("-m", "jaxft.evaluate", "--workdir", tmp_path / "run")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_streamed_and_resident_runs_on_four_devices_are_equal(run: Run, folder: Path, tmp_path: Path) -> None:
    """CutMix takes a device's partners from the next device."""
    lines = []
    for stream in ("always", "never"):
        command = (*TINY, MIXED, f"--config.data.name=folder:{folder}", f"--config.data.stream={stream}")
        result = run(*command, "--config.num_epochs=1", "--workdir", tmp_path / stream, devices=4)
        assert result.returncode == 0, result.stderr
        lines.append(without_times(metrics(tmp_path / stream)))
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_ctrl_c_ends_the_reader_processes(folder: Path, tmp_path: Path) -> None:
    command = (*TINY, STREAMED, f"--config.data.name=folder:{folder}", "--config.data.workers=2")
    with started(*command, "--workdir", tmp_path / "run") as process:
        wait_for_steps(process, tmp_path / "run", 6)
        readers = psutil.Process(process.pid).children(recursive=True)
        for one in [*readers, process]:  # a terminal signals all processes
            one.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert not psutil.wait_procs(readers, timeout=60)[1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_vanished_file_ends_the_run_with_a_one_line_error(folder: Path, tmp_path: Path, workers: int) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    settings = (f"--config.data.name=folder:{mine}", f"--config.data.workers={workers}", "--config.data.cache=never")
    command = (*TINY, STREAMED, *settings)
    with started(*command, "--workdir", tmp_path / "run") as process:
        wait_for_steps(process, tmp_path / "run", 15)
        shutil.rmtree(mine / "test" / "cat")
        _, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    assert re.search(r"^error: there is no image .*/cat/.*\.jpg$", error, re.MULTILINE)
    assert "Traceback" not in error
