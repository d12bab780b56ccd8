"""Help that needs no parser, because building the parser takes seconds."""

from importlib.metadata import version
from pathlib import Path

COMMANDS = ("fit", "validate", "test", "predict", "tokenizer", "judge", "export", "chat", "eval", "configs", "env")
"""All commands."""
USAGE = f"lightning-align {{{','.join(COMMANDS)}}} ..."
EPILOG = """Also:
  tokenizer: train a tokenizer on your rows
  judge:     turn graded samples of a task into preference pairs
  export:    write a model that transformers and vLLM read
  chat:      talk to a checkpoint or an exported model, or to two of them
  eval:      evaluate a model on tasks of the lm-eval harness
  configs:   list the shipped configurations, or copy one to edit it
  env:       print versions, devices and kernels, for bug reports
Print the version: `lightning-align --version`.
Show the arguments of a command: `lightning-align fit --help`.
Show the arguments of a class: `lightning-align fit --model.help DPOModule`, `--data.help DPODataModule`.
"""
PAGES = Path(__file__).parent / "help"
RENDERED_WITH = ("lightning", "jsonargparse")
"""Packages whose releases decide what a page says."""


def heading() -> str:
    """Return the first line of a page's file: the releases that it is of."""
    return "# " + ", ".join(f"{name} {version(name)}" for name in RENDERED_WITH)


def page(command: str) -> str | None:
    """Return the help of a command, or None if there is no page or it was rendered with other releases."""
    file = PAGES / f"{command}.txt"
    if not file.is_file():
        return None
    first, _, text = file.read_text(encoding="utf-8").partition("\n")
    return text if first == heading() else None
