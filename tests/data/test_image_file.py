"""Image files of every format and mode decode to the RGB values that a viewer shows."""

import io
import os
import re
import struct
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxft.data import image_file
from jaxft.data.image_file import ImageError, decode, shrink
from jaxft.transforms.pillow_resize import FILTERS
from tests.helpers.reference import torchvision

COLOUR = (200, 100, 50)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA", "WEBP", "GIF", "JPEG", "ICO", "JPEG2000"])
def test_every_format_decodes_to_rgb(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    array = decode(encoded(Image.new("RGB", (32, 16) if kind != "ICO" else (32, 32), COLOUR), kind, **options))
    assert array.shape == ((16, 32, 3) if kind != "ICO" else (32, 32, 3))
    assert array.dtype == np.uint8
    assert np.abs(array.astype(int) - COLOUR).max() <= (3 if kind in ("JPEG", "GIF") else 0)


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (4, 4), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (4, 4), 1), "PNG", (255, 255, 255)),
        (Image.new("LA", (4, 4), (77, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (*COLOUR, 255)), "PNG", COLOUR),
        (Image.new("I;16", (4, 4), 77 * 256 + 5), "PNG", (77, 77, 77)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("RGB", (4, 4), COLOUR).convert("P", palette=Image.Palette.ADAPTIVE), "PNG", COLOUR),
    ],
    ids=["grey", "1 bit", "grey and alpha", "transparent", "opaque", "16 bits", "CMYK", "palette"],
)
def test_every_mode_becomes_rgb_on_white(image: Image.Image, kind: str, expected: tuple[int, int, int]) -> None:
    np.testing.assert_array_equal(decode(encoded(image, kind)), np.broadcast_to(expected, (4, 4, 3)))


def test_exif_orientation_is_applied() -> None:
    """Stores a red image with a blue left edge as an upright camera does, rotated 90 degrees to the left."""
    seen = np.zeros((40, 24, 3), np.uint8)
    seen[..., 0], seen[:, :8] = 255, (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise to display
    stored = Image.fromarray(np.rot90(seen).copy())
    array = decode(encoded(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(array, seen)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0, 0] == 255


def test_files_that_are_not_images_are_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "cut.png").write_bytes(encoded(Image.effect_noise((64, 64), 50), "PNG")[:900])
    (tmp_path / "folder.jpg").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(ImageError, match=path.name):
            decode(path)


def test_an_image_of_400_million_pixels_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own limit refuses them; in a command, which lifts that limit, jaxft's does."""
    data = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(ImageError, match=r"huge\.png has more than 178,956,970 pixels"):
        decode(data, "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match=r"huge\.png has 20000 x 20000 pixels"):
        decode(data, "huge.png")


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
def test_damaged_files_decode_or_raise_image_error(data: st.DataObject, kind: str) -> None:
    whole = bytearray(encoded(Image.radial_gradient("L").resize((24, 24)).convert("RGB"), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    del whole[data.draw(st.integers(1, len(whole))) :]
    try:
        array = decode(bytes(whole))
    except ImageError:
        return
    assert array.dtype == np.uint8
    assert array.ndim == 3


def resize_and_crop(image: np.ndarray, size: int, interpolation: str) -> np.ndarray:
    """Applies torchvision's Resize and CenterCrop."""
    transforms = torchvision.transforms
    resize = transforms.Resize(size, transforms.InterpolationMode[interpolation.upper()])
    return np.asarray(transforms.CenterCrop(size)(resize(Image.fromarray(image))))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.sampled_from([*FILTERS]), st.integers(0, 2**32 - 1)
)
def test_shrink_equals_torchvisions_resize_and_crop(
    height: int, width: int, size: int, interpolation: str, seed: int
) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    expected = resize_and_crop(image, size, interpolation)
    np.testing.assert_array_equal(shrink(image, size, interpolation), expected)


@pytest.mark.parametrize(
    "suffix", [".pdf", ".h5", ".hdf", ".mpg", ".eps", ".ps", ".grib", ".bufr", ".wmf", ".emf", ".iim"]
)
def test_formats_without_pixels_are_not_image_files(suffix: str) -> None:
    assert {".jpg", ".jfif", ".mpo"} <= image_file.suffixes()
    assert suffix not in image_file.suffixes()


def test_a_program_in_postscript_is_not_run() -> None:
    with pytest.raises(ImageError, match="does not know its format"):
        decode(encoded(Image.new("RGB", (4, 4)), "EPS"), "photo.jpg")


RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize(
    ("values", "kind", "expected", "remark"),
    [
        ((RAMP * 65535).astype(np.uint16), "PNG", (RAMP * 65535).astype(int) >> 8, ()),
        ((RAMP * 4095).astype(np.uint16), "PNG", RAMP * 255, ("twelve_bit",)),
        ((RAMP * 4095).astype(np.uint16), "TIFF", RAMP * 255, ("twelve_bit",)),
        ((RAMP * 4095).astype(np.int32), "TIFF", RAMP * 255, ("twelve_bit",)),
        ((RAMP * 255).astype(np.uint16), "PNG", (RAMP * 255).astype(int) * (255 / 4095), ("twelve_bit",)),
        ((RAMP * 65535).astype(np.int32), "TIFF", (RAMP * 65535).astype(int) >> 8, ()),
        ((RAMP * (2**20 - 1)).astype(np.int32), "TIFF", RAMP * 255, ("thirty_two_bit",)),
        ((RAMP * (2**31 - 1)).astype(np.int32), "TIFF", RAMP * 255, ("thirty_two_bit",)),
        (RAMP.astype(np.float32), "TIFF", RAMP * 255, ("float",)),
        ((RAMP * 1.0000002).astype(np.float32), "TIFF", RAMP * 255, ("float",)),
        (np.zeros((8, 8), np.float32), "TIFF", np.zeros((8, 8)), ("float",)),
    ],
)
def test_values_of_more_than_8_bits_are_scaled(
    values: np.ndarray, kind: str, expected: np.ndarray, remark: tuple[str, ...]
) -> None:
    decoded = image_file.decode_with_remarks(encoded(Image.fromarray(values), kind))
    assert np.abs(decoded.image - expected[..., None]).max() <= 0.6
    assert decoded.remarks == remark


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (RAMP.astype(np.float32) * 255, "holds floats from 0 to 255; jaxft reads floats from 0 to 1"),
        (RAMP.astype(np.float32) - 0.5, "holds floats from -0.5 to 0.5"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "holds floats from nan"),
        ((RAMP * 100).astype(np.int32) - 50, "holds whole numbers from -50 to 50"),
    ],
)
def test_values_of_unknown_meaning_are_refused(values: np.ndarray, part: str) -> None:
    image = Image.fromarray(values)
    with pytest.raises(ImageError, match=f"depth.tiff {part}"):
        decode(encoded(image, "TIFF"), "depth.tiff")
    with pytest.raises(ImageError, match=f"the image {part}"):
        image_file.to_rgb(image)


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError, match="the image has no pixels"):
        image_file.to_rgb(Image.new("RGB", (0, 5)))


def test_colours_of_12_in_16_bits_are_reported_as_nearly_black() -> None:
    """Pillow keeps the upper 8 bits of 16-bit colours, and writes none."""

    def png(largest: int) -> bytes:
        rows = np.broadcast_to((RAMP * largest).astype(">u2")[..., None], (8, 8, 3))
        header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
        lines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
        chunks = ((b"IHDR", header), (b"IDAT", lines), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )

    assert image_file.decode_with_remarks(png(4095)).remarks == ("dark_colours",)
    assert image_file.decode_with_remarks(png(65535)).remarks == ()
    assert decode(png(65535)).max() == 255


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer; run git lfs pull"),
        (b"<!DOCTYPE html>", "it is HTML, XML or SVG"),
        (b"PK\x03\x04\0\0", "it is a zip file; unpack it"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "it is HEIC; pip install pillow-heif"),
        (b"\xff\xd8\xff\xe0", "it is a damaged JPEG"),
        (b"II*\0" + bytes(20), "it is a kind of TIFF that Pillow does not read"),
        (b"hello", "Pillow does not know its format"),
    ],
)
def test_files_of_unknown_format_are_described(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    for source in (tmp_path / "a.jpg", data):
        with pytest.raises(ImageError, match=re.escape(reason)):
            decode(source)


@pytest.mark.parametrize("mode", ["La", "PA", "RGBa", "RGBX", "YCbCr", "LAB", "HSV"])
def test_every_mode_of_pillow_is_converted(mode: str) -> None:
    rgb = Image.new("RGB", (4, 4), COLOUR)
    if mode == "LAB":
        image = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (138, 163, 174)])
    else:
        image = rgb.convert("LA" if mode == "La" else "RGBA" if mode == "RGBa" else mode).convert(mode)
    expected = np.asarray(rgb.convert("L").convert("RGB") if mode == "La" else rgb).astype(int)
    assert np.abs(image_file.to_rgb(image) - expected).max() <= 6


def test_files_of_several_frames_are_noticed() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert image_file.decode_with_remarks(data).remarks == ("animated",), kind
        assert image_file.decode_with_remarks(encoded(frames[0], kind)).remarks == (), kind
    preview = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])  # as a camera stores
    assert image_file.decode_with_remarks(preview).remarks == ()


def test_damaged_exif_data_are_ignored() -> None:
    data = encoded(Image.new("RGB", (8, 8), COLOUR), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert decode(data).shape == (8, 8, 3)


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (30_000, 20), (3, 4_001), (17, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_thin_images_are_not_resized_as_a_whole(
    size: tuple[int, int], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(Image.new(mode, size, 7), "PNG")
    monkeypatch.setattr(Image.Image, "resize", None)
    expected = np.asarray(Image.new(mode, (64, 64), 7).convert("RGB"))
    np.testing.assert_array_equal(decode(data, side=64), expected)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 8), st.integers(200, 900)),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from([*FILTERS]),
    st.integers(0, 2**32 - 1),
)
def test_thin_images_are_shrunk_like_others(
    sides: tuple[int, int], size: int, upright: bool, interpolation: str, seed: int
) -> None:
    """Only the central part is resized; the result is the same as of resizing everything, as torchvision does.

    Pixels of 0 and 255 make negative weights overshoot.
    """
    shape = (*sides[:: -1 if upright else 1], 3)
    image = np.random.default_rng(seed).choice(np.array([0, 255], np.uint8), shape)
    expected = resize_and_crop(image, size, interpolation)
    np.testing.assert_array_equal(shrink(image, size, interpolation), expected)


def test_grey_images_are_shrunk_as_if_they_were_rgb() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (90, 70), np.uint8)
    expected = shrink(np.repeat(grey[..., None], 3, 2), 20)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey), "PNG"), side=20), expected)
    wide = grey.astype(np.uint16) << 8
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(wide), "PNG"), side=20), expected)


def test_bands_of_large_images_make_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_file, "_BAND_BYTES", 4 * 16 * 3)  # three rows
    values = np.random.default_rng(0).integers(0, 65536, (16, 16))
    whole = decode(encoded(Image.fromarray(values.astype(np.uint16)), "PNG"))
    np.testing.assert_array_equal(whole[..., 0], values >> 8)
    rgba = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 4), np.uint8))
    expected = Image.alpha_composite(Image.new("RGBA", (16, 16), "white"), rgba).convert("RGB")
    np.testing.assert_array_equal(image_file.to_rgb(rgba), np.asarray(expected))


def test_at_most_shrinks_only_larger_images() -> None:
    image = Image.effect_noise((40, 30), 50).convert("RGB")
    data = encoded(image, "PNG")
    np.testing.assert_array_equal(decode(data, at_most=30), np.asarray(image))
    for interpolation in FILTERS:
        expected = shrink(np.asarray(image), 20, interpolation)
        np.testing.assert_array_equal(decode(data, at_most=20, interpolation=interpolation), expected)


def test_threads_decode_a_bounded_number_of_pixels_at_once() -> None:
    budget = image_file._PixelBudget()
    budget._limit = 100
    running, most = 0, 0
    lock = threading.Lock()

    def decode_one(pixels: int) -> None:
        nonlocal running, most
        with budget.reserve(pixels):
            with lock:
                running += pixels
                most = max(most, running)
            time.sleep(0.001)
            with lock:
                running -= pixels

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode_one, [30, 40, 50] * 10))
        assert most <= 100
        list(pool.map(decode_one, [500]))  # a larger one is decoded alone
    assert most == 500


def test_a_large_image_within_an_icon_is_not_decoded() -> None:
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 20_000, 20_000)
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png
    with pytest.raises(ImageError, match="icon has 20000 x 20000 pixels"):
        decode(icon, "icon")


@pytest.mark.parametrize(
    ("create", "part"),
    [
        (os.mkfifo, "it is a FIFO, not a file"),
        (Path.mkdir, "it is a folder, not a file"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    ],
)
def test_something_else_in_place_of_an_image_is_refused(
    tmp_path: Path, create: Callable[[Path], object], part: str
) -> None:
    create(tmp_path / "a.png")
    with pytest.raises(ImageError, match=rf"a\.png cannot be read as an image \({part}"):
        decode(tmp_path / "a.png")
