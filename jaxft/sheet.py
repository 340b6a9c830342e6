"""A sheet of pictures as training shows them, to look at before hours are spent on it.

python -m jaxft.sheet --config configs/cifar10_fast.py --out sheet.png [--config.augment.KEY=VALUE ...]

Each row is a picture: first as it is tested, then as it is seen in one training step after the other.
"""

import sys
from pathlib import Path

from PIL import Image

from jaxft.config import load_config, parse_overrides
from jaxft.errors import ArgumentParser, UserError, run_command
from jaxft.reporting.sheet_image import draw_sheet


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.sheet", __doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="a file with get_config(), as in configs/")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"), metavar="FILE", help="default: sheet.png")
    args, rest = parser.parse_known_args(argv)
    sheet = Image.fromarray(draw_sheet(load_config(args.config, parse_overrides(rest))))
    try:
        sheet.save(args.out)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {args.out} cannot be written: {error}") from None
    print(f"{args.out}: each row is a picture as it is tested, then as training sees it")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
