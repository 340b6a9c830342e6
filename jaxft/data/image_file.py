"""Decodes image files of any format into upright RGB arrays."""

import io
import math
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxft.errors import UserError, one_line
from jaxft.files import open_regular, reason
from jaxft.transforms.pillow_resize import FILTERS, resize_and_crop_thin

MAX_PIXELS = 178_956_970  # Pillow's own limit, of DecompressionBombError: 0.5 GB of RGB
MAX_RATIO = 16  # ratio of the sides up to which the whole image is resized; beyond it only the central part
_NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}  # formats that Pillow cannot decode itself
_SEVERAL_IMAGES = {"MPO", "PSD"}  # formats whose further frames are previews or layers
_ICONS = {0x10000, 0x20000}  # first four bytes of .ico and .cur
_BAND_BYTES = 1 << 22  # of an image that is converted at once
_WHOLE_BYTES = 1 << 22  # of a file that is read into memory before it is decoded
_BYTES_PER_PIXEL = 8  # of a decoded image and its conversion to RGB
_RESAMPLING = {name: Image.Resampling[name.upper()] for name in FILTERS}

_UNKNOWN = "Pillow does not know its format"
_BEGINNINGS = {  # of files that Pillow does not read
    b"version https://git-lfs": "it is a Git LFS pointer; run git lfs pull",
    b"<": "it is HTML, XML or SVG",
    b"PK\x03\x04": "it is a zip file; unpack it",
    b"\x1f\x8b": "it is compressed by gzip; unpack it",
    b"\xff\xd8\xff": "it is a damaged JPEG",
    b"\x89PNG": "it is a damaged PNG",
    b"II": "it is a kind of TIFF that Pillow does not read",
    b"MM": "it is a kind of TIFF that Pillow does not read",
    b"\0\0\0\x0cJXL": "it is JPEG XL; pip install pillow-jxl-plugin",
    b"\xff\x0a": "it is JPEG XL; pip install pillow-jxl-plugin",
}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}

# The remarks of `decode_with_remarks`.
TWELVE_BIT, THIRTY_TWO_BIT, FLOAT = "twelve_bit", "thirty_two_bit", "float"
DARK_COLOURS, ANIMATED = "dark_colours", "animated"


class ImageError(UserError):
    """A file is not an image, or the image has too many pixels."""


class LargeImageError(Exception):
    """An image is too large or too thin to be stored unchanged."""


class _ValuesError(Exception):
    """An image's values cannot be scaled to 8 bits, because their range is unknown; the message lacks the name."""


class Decoded(NamedTuple):
    image: np.ndarray  # uint8 (H, W, 3)
    remarks: tuple[str, ...]  # of the constants above: rescaled values, nearly black colours, first frame only


@cache
def load_formats() -> tuple[str, ...]:
    """Loads all of Pillow's formats, and those of plugins that are installed: pillow-heif and pillow-jxl-plugin.

    Image.open would load Pillow's own too, but not safely in several threads. Returns the formats that jaxft reads, in
    the order in which Image.open tries them.
    """
    Image.preinit()  # so that JPEG and PNG are tried first, not after all formats with names before theirs
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401, registers itself
    return tuple(kind for kind in Image.ID if kind not in _NOT_IMAGES)


@cache
def suffixes() -> frozenset[str]:
    """Returns the suffixes of the image files that Pillow reads, such as '.jpg'."""
    load_formats()
    readable = {*Image.OPEN, "MPO"} - _NOT_IMAGES  # MPO is opened as JPEG
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in readable)


def decode(
    source: Path | bytes,
    name: str = "",
    *,
    side: int | None = None,
    at_most: int | None = None,
    interpolation: str = "bilinear",
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decodes the first frame of any image that Pillow reads to uint8 (H, W, 3), turned upright by its EXIF data.

    Grey, palette, CMYK, 16-bit and float images become RGB; transparency becomes white. side: shrinks the image to a
    square of this many pixels. at_most: does so only if both sides are longer. interpolation: the filter, a key of
    FILTERS. name: for messages, the path by default. Raises ImageError.
    """
    return decode_with_remarks(
        source, name, side=side, at_most=at_most, interpolation=interpolation, max_pixels=max_pixels
    ).image


def decode_with_remarks(
    source: Path | bytes,
    name: str = "",
    *,
    side: int | None = None,
    at_most: int | None = None,
    interpolation: str = "bilinear",
    max_pixels: int = MAX_PIXELS,
) -> Decoded:
    """Decodes an image as `decode` does, and returns what is unusual about it."""
    name = name or (str(source) if isinstance(source, Path) else "the image")
    with (
        _explained_errors(source, name),
        open_regular(source) if isinstance(source, Path) else io.BytesIO(source) as file,
    ):
        return _decode(file, name, side, interpolation, at_most, max_pixels)


def read_file(
    path: Path, side: int | None, limit: int | None = None, interpolation: str = "bilinear"
) -> tuple[Decoded, int]:
    """Decodes a file as `decode` does and returns the CRC-32 of its content too; most files are opened only once.

    limit: raises LargeImageError, without decoding, for thin images and if both sides have more pixels than this.
    """
    name = str(path)
    with _explained_errors(path, name), open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _WHOLE_BYTES:
            return _decode(file, name, side, interpolation, limit=limit), _file_crc32(path)
        content = file.read()
        return _decode(io.BytesIO(content), name, side, interpolation, limit=limit), zlib.crc32(content)


def _file_crc32(path: Path) -> int:
    crc = 0
    with open_regular(path) as file:
        while data := file.read(1 << 20):
            crc = zlib.crc32(data, crc)
    return crc


# Seven parameters: those of `decode`, and the limit of `read_file`.
def _decode(
    file: IO[bytes],
    name: str,
    side: int | None,
    interpolation: str,
    at_most: int | None = None,
    max_pixels: int = MAX_PIXELS,
    limit: int | None = None,
) -> Decoded:
    formats = load_formats()
    _check_pixels(name, _icon_size(file), max_pixels)
    with open_image(file, formats) as image:
        width, height = image.size
        _check_pixels(name, image.size, max_pixels)
        if limit and (min(width, height) > limit or is_thin(width, height)):
            raise LargeImageError
        deep_colours = image.mode == "RGB" and any(";16" in str(tile.args) for tile in getattr(image, "tile", ()))
        side = at_most if at_most and min(width, height) > at_most else side
        with _decoding.reserve(width * height):
            remarks = (ANIMATED,) if _is_animated(image) else ()
            flat, remark = _flatten(_upright(image))
            if deep_colours and np.asarray(flat).max() < 16:
                remark = (*remark, DARK_COLOURS)
            array = np.asarray(_as_rgb(flat)) if side is None else _shrink(flat, side, interpolation)
        return Decoded(array, (*remarks, *remark))


@contextmanager
def _explained_errors(source: Path | bytes, name: str) -> Iterator[None]:
    """Turns every error of opening or decoding an image, except for LargeImageError, into an ImageError."""
    try:
        yield
    except _ValuesError as error:
        raise ImageError(f"{name} {error}") from None
    except (ImageError, LargeImageError):
        raise
    except Image.DecompressionBombError:  # unless process.allow_large_images has lifted Pillow's limit
        raise ImageError(f"{name} has more than {MAX_PIXELS:,} pixels, which jaxft does not read") from None
    except FileNotFoundError:
        raise ImageError(f"there is no image {name}") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} cannot be read as an image ({_reason_unknown(source)})") from None
    except Exception as error:  # Pillow's plugins raise exceptions of any type for damaged files
        text = one_line(reason(error), 120) or type(error).__name__
        raise ImageError(f"{name} cannot be read as an image ({text})") from error


def open_image(file: IO[bytes], formats: tuple[str, ...] | None = None) -> Image.Image:
    """Opens an image as Image.open does, which also decodes icons."""
    icon_pixels = math.prod(_icon_size(file))
    with _decoding.reserve(icon_pixels) if icon_pixels else nullcontext():
        return Image.open(file, formats=formats)


def to_rgb(image: Image.Image) -> np.ndarray:
    """Converts an image of any mode to uint8 (H, W, 3), turned upright by its EXIF data. Raises ImageError."""
    if not all(image.size):
        raise ImageError("the image has no pixels")
    try:
        flat, _ = _flatten(ImageOps.exif_transpose(image))
    except _ValuesError as error:
        raise ImageError(f"the image {error}") from None
    return np.asarray(_as_rgb(flat))


def _reason_unknown(source: Path | bytes) -> str:
    """Returns why Pillow does not know the format of a file, by its first bytes."""
    if isinstance(source, bytes):
        head = source[:64]
    else:
        try:
            with open_regular(source) as file:
                head = file.read(64)
        except OSError:
            head = b"?"
    if not head:
        return "it is empty"
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        return "it is HEIC; pip install pillow-heif"
    return next((text for start, text in _BEGINNINGS.items() if head.startswith(start)), _UNKNOWN)


def _check_pixels(name: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(f"{name} has {width} x {height} pixels; jaxft reads up to {max_pixels:,} in all")


def _icon_size(file: IO[bytes]) -> tuple[int, int]:
    """Returns (width, height) of the largest image in a Windows icon, which Image.open would decode; (0, 0) if none."""
    kind, count = struct.unpack("<IH", file.read(6).ljust(6, b"\0"))
    sizes = [(0, 0)]
    for entry in range(count if kind in _ICONS else 0):
        file.seek(6 + 16 * entry + 12)
        file.seek(int.from_bytes(file.read(4), "little"))
        header = file.read(24).ljust(24, b"\0")
        is_png = header.startswith(b"\x89PNG")
        width, height = struct.unpack(">ii", header[16:]) if is_png else struct.unpack("<ii", header[4:12])
        sizes.append((abs(width), abs(height)))
    file.seek(0)
    return max(sizes, key=math.prod)


class _PixelBudget:
    """Bounds the pixels that all threads decode at once; a larger image is decoded without others beside it."""

    def __init__(self) -> None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._limit = max(MAX_PIXELS, memory // 8 // _BYTES_PER_PIXEL)
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + pixels <= self._limit)
            self._used += pixels
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()


_decoding = _PixelBudget()


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False)) and image.format not in _SEVERAL_IMAGES
    except Exception:  # a damaged second frame, which is not needed
        return False


def _upright(image: Image.Image) -> Image.Image:
    """Decodes and turns an image by its EXIF data, in place. Damaged EXIF data are ignored."""
    image.load()
    with suppress(Exception):  # of any type; the pixels were read without an error
        ImageOps.exif_transpose(image, in_place=True)  # without a copy
    return image


def _flatten(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Converts any mode to "L" or "RGB", with transparency on white; remarks as in Decoded. Raises _ValuesError.

    Large images are converted in bands of rows, so that no second copy of them is needed.
    """
    if image.mode == "F":
        return _from_floats(image), (FLOAT,)
    if image.mode.startswith("I"):
        return _from_integers(image)
    if image.mode == "La":  # Pillow converts it only to this mode
        image = image.convert("LA")
    if image.has_transparency_data:
        return _on_white(image), ()
    if image.mode in ("L", "RGB"):
        return image, ()  # convert() always copies
    return image.convert("L" if image.mode == "1" else "RGB"), ()


def _as_rgb(flat: Image.Image) -> Image.Image:
    return flat if flat.mode == "RGB" else flat.convert("RGB")


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yields (first row, rows of the image) from top to bottom."""
    rows = max(1, _BAND_BYTES // (4 * image.width))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _extremes(image: Image.Image) -> tuple[float, float]:
    low, high = math.inf, -math.inf
    for _, band in _bands(image):
        values = np.asarray(band)
        low, high = np.minimum(low, values.min()), np.maximum(high, values.max())  # which keep NaN
    return float(low), float(high)


def _grey(image: Image.Image, scale: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    """Returns an image of mode L. scale: maps the values of a band to 0..255."""
    grey = np.empty((image.height, image.width), np.uint8)
    for top, band in _bands(image):
        grey[top : top + band.height] = scale(np.asarray(band))
    return Image.fromarray(grey)


def _from_floats(image: Image.Image) -> Image.Image:
    low, high = _extremes(image)
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # NaN too; float32 rounds
        raise _ValuesError(
            f"holds floats from {low:g} to {high:g}; jaxft reads floats from 0 to 1, so save it with 8 or 16 bits"
        )
    return _grey(image, lambda values: np.round(np.clip(values, 0, 1) * np.float32(255)))


def _from_integers(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Converts 16-bit values, 12-bit values in 16, and 32-bit values by the number of bits that they use."""
    low, high = _extremes(image)
    if low < 0:
        raise _ValuesError(f"holds whole numbers from {low:.0f} to {high:.0f}; save it with 8 or 16 bits, from 0 up")
    if 4096 <= high < 1 << 16:
        return _grey(image, lambda values: values >> 8), ()
    remark, largest = (TWELVE_BIT, 4095) if high < 4096 else (THIRTY_TWO_BIT, (1 << int(high).bit_length()) - 1)
    return _grey(image, lambda values: np.round(values * (255 / largest))), (remark,)


def _on_white(image: Image.Image) -> Image.Image:
    flat = Image.new("RGB", image.size)
    for top, band in _bands(image):
        band = band.convert("RGBA")
        flat.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB"), (0, top))
    return flat


def is_single_colour(image: np.ndarray) -> bool:
    """Returns whether all pixels of an image (H, W, 3) are equal."""
    return bool((image[0] == image[0, 0]).all() and (image == image[0, 0]).all())  # most differ in the first row


def is_thin(width: int, height: int) -> bool:
    """Returns whether an image is so thin that resizing its shorter side would make the other one very long."""
    return max(width, height) > MAX_RATIO * min(width, height)


def shrink(image: np.ndarray, size: int, interpolation: str = "bilinear") -> np.ndarray:
    """Resizes uint8 (H, W, 3) to (size, size, 3): the shorter side to `size` by Pillow, then a central crop.

    Equals torchvision's Resize(size, interpolation) and CenterCrop(size), and preprocessing.resize_and_crop on the
    device. If an image is thin, only the part that the crop keeps is resized, with the same result.
    """
    return _shrink(Image.fromarray(image), size, interpolation)


def _shrink(image: Image.Image, size: int, interpolation: str) -> np.ndarray:
    """Resizes and crops an image of mode L or RGB as `shrink` does.

    Takes at most MAX_RATIO times the memory of the image or of the result.
    """
    width, height = image.size
    shorter = min(height, width)
    new_height, new_width = int(size * height / shorter), int(size * width / shorter)
    if is_thin(width, height) and size > shorter:  # else the resized image is smaller than this one

        def crop(box: tuple[int, int, int, int]) -> np.ndarray:
            return np.asarray(_as_rgb(image.crop(box)))

        return resize_and_crop_thin(crop, (height, width), size, interpolation)
    if (new_height, new_width) != (height, width):
        image = image.resize((new_width, new_height), _RESAMPLING[interpolation])
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return np.asarray(_as_rgb(image))[top : top + size, left : left + size]
