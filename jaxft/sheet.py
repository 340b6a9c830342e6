"""Draws a sheet of images as training sees them, to check augmentation before a long run.

python -m jaxft.sheet --config configs/cifar10_fast.py --out sheet.png [--config.augment.KEY=VALUE ...]

Each row shows one image: first as in evaluation, then as in successive training steps.
"""

if __name__ == "__main__":  # a command's process is prepared before JAX is imported
    from jaxft.cli import run

    run("sheet")

from pathlib import Path

from PIL import Image

from jaxft.config import load_config, parse_overrides
from jaxft.data import datasets
from jaxft.errors import ArgumentParser, UserError
from jaxft.files import atomic_write, output_argument, reason
from jaxft.reporting.sheet_image import draw_sheet
from jaxft.training.auto import IMAGE_SIZE, resolve_auto, resolve_from_weights


def image_format(path: Path) -> str:
    """Returns Pillow's name for the format of a file's suffix. Raises UserError if Pillow cannot write it."""
    kind = Image.registered_extensions().get(path.suffix.lower(), "")
    if kind not in Image.SAVE:
        raise UserError(f"--out {path} must end in .png, .jpg, .webp or another image format's suffix")
    return kind


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.sheet", __doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE_OR_NAME", help="a config file, or the name of one that ships"
    )
    parser.add_argument(
        "--out", type=output_argument, default=Path("sheet.png"), metavar="FILE", help="default: sheet.png"
    )
    args, rest = parser.parse_known_args(argv)
    kind = image_format(args.out)
    config = resolve_from_weights(load_config(args.config, parse_overrides(rest)), {})  # without fetching any
    size = config.image_size or IMAGE_SIZE
    data = datasets.load_config_data(config.data, config.data.train_split, size, targets=config.targets)
    sheet = Image.fromarray(draw_sheet(resolve_auto(config, data), data))
    try:
        with atomic_write(args.out) as file:
            sheet.save(file, kind)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {reason(error)}; name another file") from None
    print(f"{args.out}: each row shows an image as in evaluation, then as training sees it")
