"""The console script, and ``python -m lightning_align`` for launchers that start modules."""

import gc
import sys

import lightning_align
from lightning_align.console import configs
from lightning_align.console.errors import unknown_command
from lightning_align.console.pages import COMMANDS, page

ABBREVIATIONS = {"-h": "--help"}


def main() -> None:
    """Run the command line."""
    words = [ABBREVIATIONS.get(word, word) for word in sys.argv[1:]]
    match words:
        case ["--version"] | ["version"]:
            print(f"lightning-align {lightning_align.__version__}")
        case ["configs", *rest]:
            sys.exit(configs.main(rest))
        case ["env", *rest]:
            from lightning_align.console import env

            sys.exit(env.main(rest))
        case ["--help" | "help"] if (text := page("all")) is not None:
            print(text, end="")
        case [] if (text := page("all")) is not None:
            print(text, end="", file=sys.stderr)
            sys.exit(2)
        case [command, "--help"] | ["help", command] if (text := page(command)) is not None:
            print(text, end="")
        case [command, *_] if not command.startswith("-") and command not in COMMANDS:
            print(f"lightning-align: error: {unknown_command(command, COMMANDS)}", file=sys.stderr)
            sys.exit(2)
        case _:
            # Importing makes half a million objects, which stay. Looking through them for garbage takes a fifth of the time.
            gc.disable()
            from lightning_align import cli

            gc.freeze()
            gc.enable()
            cli.main()


if __name__ == "__main__":
    main()
