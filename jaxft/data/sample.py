"""Loads the samples that are packaged with jaxft."""

import io
import tarfile

import numpy as np
from PIL import Image

from jaxft.data.dataset import Dataset
from jaxft.errors import UserError
from jaxft.files import SAMPLES_DIR


def load_sample(name: str, split: str) -> Dataset:
    """Returns a split of a packaged sample, a .tar.xz of `SPLIT/CLASS/*.jpg`. Raises UserError if it does not exist."""
    path = SAMPLES_DIR / f"{name}.tar.xz"
    if not path.is_file():
        raise UserError(f"there is no sample '{name}'; jaxft ships {', '.join(_sample_names())}")
    with tarfile.open(path, "r:xz") as tar:
        files = {member.name: file.read() for member in tar if (file := tar.extractfile(member))}
    splits = sorted({name.split("/")[0] for name in files})
    if split not in splits:
        raise UserError(f"the sample '{name}' has no split '{split}'; it has {' and '.join(splits)}")
    class_names = tuple(sorted({name.split("/")[1] for name in files}))
    names = sorted(name for name in files if name.startswith(f"{split}/"))
    images = [np.asarray(Image.open(io.BytesIO(files[name]))) for name in names]
    labels = [class_names.index(name.split("/")[1]) for name in names]
    return Dataset(np.stack(images), np.array(labels, np.int32), class_names)


def _sample_names() -> list[str]:
    return sorted(f"sample:{path.name.removesuffix('.tar.xz')}" for path in SAMPLES_DIR.glob("*.tar.xz"))
