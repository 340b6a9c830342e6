"""Runs `python -m jaxft COMMAND ...`, which is the same as the script `jaxft`."""

from jaxft.cli import main

if __name__ == "__main__":
    main()
