"""Decodes image files of any format into upright RGB arrays."""

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxft.errors import UserError

MAX_PIXELS = 178_956_970  # Pillow's own limit, of DecompressionBombError: 0.5 GB of RGB


class ImageError(UserError):
    """A file is not an image, or the image has too many pixels."""


@cache
def suffixes() -> frozenset[str]:
    """Returns the suffixes of the files that Pillow reads, such as '.jpg'."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def decode(
    source: Path | bytes, name: str = "", *, side: int | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decodes the first frame of any image that Pillow reads to uint8 (H, W, 3), turned upright by its EXIF data.

    Grey, palette, CMYK and 16-bit images become RGB; transparency becomes white. side: shrinks the image to a square
    of this many pixels. name: for messages, the path by default. Raises ImageError.
    """
    name = name or (str(source) if isinstance(source, Path) else "the image")
    try:
        Image.init()  # loads all formats; Image.open would do so too, but not safely in several threads
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{name} has {width} x {height} pixels; jaxft reads up to {max_pixels:,} in all")
            ImageOps.exif_transpose(image, in_place=True)  # without a copy
            rgb = _to_rgb(image)
            return np.asarray(rgb) if side is None else _shrink(rgb, side)
    except ImageError:
        raise
    except Image.DecompressionBombError:  # unless process.allow_large_images has lifted Pillow's limit
        raise ImageError(f"{name} has more than {MAX_PIXELS:,} pixels, which jaxft does not read") from None
    except FileNotFoundError:
        raise ImageError(f"there is no image {name}") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} cannot be read as an image (Pillow does not know its format)") from None
    except Exception as error:  # Pillow's plugins raise exceptions of any type for damaged files
        raise ImageError(f"{name} cannot be read as an image ({error or type(error).__name__})") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """Converts an image of any mode to uint8 (H, W, 3), turned upright by its EXIF data."""
    return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray((np.clip(grey, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() always copies


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes uint8 (H, W, 3) to (size, size, 3): the shorter side to `size` by Pillow's BILINEAR, then a central crop.

    Equals torchvision's Resize(size) and CenterCrop(size), and preprocessing.resize_and_crop on the device.
    """
    return _shrink(Image.fromarray(image), size)


def _shrink(image: Image.Image, size: int) -> np.ndarray:
    width, height = image.size
    shorter = min(height, width)
    new_height, new_width = int(size * height / shorter), int(size * width / shorter)
    if (new_height, new_width) != (height, width):
        image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return np.asarray(image)[top : top + size, left : left + size]
