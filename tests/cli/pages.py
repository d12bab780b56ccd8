"""Writes the help pages of the package: python -m tests.cli.pages. With --check, names those that have changed.

In a process of its own, because a help lists the subclasses that are imported.
"""

import contextlib
import io
import os
import sys
import tempfile
from unittest import mock

from lightning_align.console.pages import PAGES, heading

COMMANDS = ("all", "fit", "validate", "test", "predict", "tokenizer", "judge", "export", "chat", "eval")


def rendered(command: str) -> str:
    """What the parser prints of a command, at a fixed width."""
    from lightning_align.cli import run

    out = io.StringIO()
    arguments = ["--help"] if command == "all" else [command, "--help"]
    fixed = {"COLUMNS": "110"}
    with mock.patch.dict(os.environ, fixed), mock.patch.object(sys, "argv", ["lightning-align"]):
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            run(arguments)
    lines = out.getvalue().replace("\b", "").splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def main() -> None:
    PAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for command in COMMANDS:
            file, text = PAGES / f"{command}.txt", f"{heading()}\n{rendered(command)}"
            if "--check" not in sys.argv:
                file.write_text(text, encoding="utf-8")
            elif not file.is_file() or file.read_text(encoding="utf-8") != text:
                print(file.name)


if __name__ == "__main__":
    main()
