"""Every kind of picture file becomes the RGB that a person sees."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxft.data import image_file
from jaxft.data.image_file import ImageError, decode, shrink
from tests.helpers.reference import torchvision

COLOUR = (200, 100, 50)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA", "WEBP", "GIF", "JPEG", "ICO", "JPEG2000"])
def test_formats(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    array = decode(encoded(Image.new("RGB", (32, 16) if kind != "ICO" else (32, 32), COLOUR), kind, **options))
    assert array.shape == ((16, 32, 3) if kind != "ICO" else (32, 32, 3))
    assert array.dtype == np.uint8
    assert np.abs(array.astype(int) - COLOUR).max() <= (3 if kind in ("JPEG", "GIF") else 0)


@pytest.mark.parametrize(
    ("picture", "kind", "expected"),
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
def test_modes(picture: Image.Image, kind: str, expected: tuple[int, int, int]) -> None:
    np.testing.assert_array_equal(decode(encoded(picture, kind)), np.broadcast_to(expected, (4, 4, 3)))


def test_exif_orientation_turns_the_picture() -> None:
    """A red picture with a blue left edge, stored as a camera held upright stores it: turned to the left by 90."""
    seen = np.zeros((40, 24, 3), np.uint8)
    seen[..., 0], seen[:, :8] = 255, (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    stored = Image.fromarray(np.rot90(seen).copy())
    array = decode(encoded(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(array, seen)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0, 0] == 255


def test_what_is_no_picture_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "cut.png").write_bytes(encoded(Image.effect_noise((64, 64), 50), "PNG")[:900])
    (tmp_path / "folder.jpg").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(ImageError, match=path.name):
            decode(path)


def test_a_picture_of_400_million_pixels_is_refused_before_it_is_decoded() -> None:
    data = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(ImageError, match="20000 x 20000 pixels"):
        decode(data, "huge.png")


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
def test_damaged_files_are_read_or_told(data: st.DataObject, kind: str) -> None:
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


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_shrink_is_torchvisions_resize_and_crop(height: int, width: int, size: int, seed: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    transforms = torchvision.transforms
    transform = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
    np.testing.assert_array_equal(shrink(picture, size), np.asarray(transform(Image.fromarray(picture))))


def test_pillow_still_raises_beyond_our_own_bound() -> None:
    assert Image.MAX_IMAGE_PIXELS is None
    assert ".jpg" in image_file.SUFFIXES
    assert ".pdf" not in image_file.SUFFIXES
