"""A picture file, of whatever kind, as the uint8 RGB array that a person would call the picture."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxft.errors import UserError

MAX_PIXELS = 178_956_970  # where Pillow would raise DecompressionBombError: 0.5 GB of RGB


Image.MAX_IMAGE_PIXELS = None  # checked here, without Pillow's warning at half of it


Image.init()


SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


class ImageError(UserError):
    """A file that is no picture, or not one to be read."""


def decode(
    source: Path | bytes, name: str = "", *, side: int | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """uint8 (H, W, 3) of anything that Pillow reads: turned as EXIF says, transparency on white, the first frame.

    Grey, palette, CMYK and 16-bit pictures become RGB. side: shrunk to a square of so many pixels, unless None.
    Raises ImageError with `name`, or the path.
    """
    name = name or (str(source) if isinstance(source, Path) else "the picture")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise ImageError(f"{name} has {width} x {height} pixels; jaxft reads up to {max_pixels:,} in all")
            ImageOps.exif_transpose(picture, in_place=True)  # without a copy
            rgb = _to_rgb(picture)
            return np.asarray(rgb) if side is None else _shrink(rgb, side)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"there is no picture {name}") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} cannot be read as a picture (it is in no format that Pillow knows)") from None
    except Exception as error:  # Pillow's plugins raise whatever they like for damaged files
        raise ImageError(f"{name} cannot be read as a picture ({error or type(error).__name__})") from error


def to_rgb(picture: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of a picture of any mode, turned as EXIF says."""
    return np.asarray(_to_rgb(ImageOps.exif_transpose(picture)))


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits, which convert() would clip
        grey = np.asarray(picture).astype(np.int64)
        return Image.fromarray((np.clip(grey, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # which would copy it


def shrink(picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) to (size, size, 3): the shorter side to `size` by Pillow's BILINEAR, then the central square.

    torchvision's Resize(size) and CenterCrop(size), and what preprocessing.resize_and_crop does on the device.
    """
    return _shrink(Image.fromarray(picture), size)


def _shrink(picture: Image.Image, size: int) -> np.ndarray:
    width, height = picture.size
    shorter = min(height, width)
    new_height, new_width = int(size * height / shorter), int(size * width / shorter)
    if (new_height, new_width) != (height, width):
        picture = picture.resize((new_width, new_height), Image.Resampling.BILINEAR)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return np.asarray(picture)[top : top + size, left : left + size]
