"""``python -m lightning_align``: the command line, for launchers that start modules."""

from lightning_align.cli import main

if __name__ == "__main__":
    main()
