"""Converts weights: the command `jaxft convert`, see jaxft/convert.py."""

from jaxft.cli import run

if __name__ == "__main__":
    run("convert")
