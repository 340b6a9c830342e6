"""Image files of every format and mode decode to the RGB values that a viewer shows."""

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


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_shrink_equals_torchvisions_resize_and_crop(height: int, width: int, size: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    transforms = torchvision.transforms
    transform = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
    np.testing.assert_array_equal(shrink(image, size), np.asarray(transform(Image.fromarray(image))))


def test_a_pdf_is_not_an_image_file() -> None:
    assert ".jpg" in image_file.suffixes()
    assert ".pdf" not in image_file.suffixes()
